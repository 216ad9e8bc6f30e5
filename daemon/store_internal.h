/* What the files of the store share. Nobody else includes this. */
#ifndef SPURION_STORE_INTERNAL_H
#define SPURION_STORE_INTERNAL_H

#include <pthread.h>
#include <rocksdb/c.h>
#include <stdatomic.h>

#include "daemon/store.h"
#include "daemon/store_keys.h"

/* Column families; names in store_family_names. */
typedef enum store_family {
    FAMILY_DEFAULT, /* RocksDB's own; unused */
    FAMILY_META,
    FAMILY_ROLLOUT,
    FAMILY_RECORD,
    FAMILY_BY_RULE,
    FAMILY_BY_FEATURE,
    FAMILY_BY_EFFECT,
    FAMILY_BY_TIME,
    FAMILY_ALERT,
    FAMILY_COUNTER,
    FAMILY_INBOX,
    FAMILY_REPLY,
    FAMILY_PRODUCER,
    FAMILY_COUNT
} store_family;

extern const char *const store_family_names[FAMILY_COUNT];

/* First byte of a key in FAMILY_COUNTER. */
enum {
    COUNTER_STEP = 's',        /* run, step */
    COUNTER_RULE = 'r',        /* run, rule, step */
    COUNTER_FEATURE = 'f',     /* run, sae, index, step */
    COUNTER_RUN = 'S',         /* run */
    COUNTER_RULE_RUN = 'R',    /* run, rule */
    COUNTER_FEATURE_RUN = 'F', /* run, sae, index */
    COUNTER_OPEN = 'o',        /* run, step: has rollouts and is not closed; value empty */
    COUNTER_CLOSED = 'c'       /* run, step, rule; value empty */
};

/* First byte of a key in FAMILY_META and FAMILY_REPLY. */
enum { META_OWN = 'o', META_TEXT = 't', REPLY_KEY = 'k', REPLY_EXPIRY = 'e' };

struct spurion_store {
    char *path;
    rocksdb_t *db;
    rocksdb_options_t *options;
    rocksdb_block_based_table_options_t *table;
    rocksdb_cache_t *cache;
    rocksdb_ratelimiter_t *limiter;
    rocksdb_column_family_handle_t *families[FAMILY_COUNT];
    rocksdb_writeoptions_t *write;
    rocksdb_readoptions_t *read;
    uint64_t free_bytes_min;
    bool unsynced;

    pthread_mutex_t writer; /* one commit at a time: what it reads (rows, counters) it writes */
    spurion_arena scratch;  /* of the commit; under writer */
    pthread_mutex_t intake; /* tickets in the order they are written */
    uint64_t ticket_next;   /* under intake */
    pthread_mutex_t trimmer;
    uint64_t alert_epoch;
    _Atomic uint64_t alert_next;
    int64_t synced_written_ms; /* when the file of what is synced was last written; under writer */

    atomic_bool failed;
    _Atomic uint64_t commits, rows, rows_same, rows_conflict, alerts, inbox_puts, corruptions, refused_for_space;
    _Atomic int64_t last_sync_ns;
};

/* Turns RocksDB's message into a status with `what` was being done, counts corruptions, frees the message. */
spurion_status store_error(spurion_store *s, char *message, const char *what);
/* Counts a DATA_LOSS that our own checks found; passes every status on. */
spurion_status store_note(spurion_store *s, spurion_status st);

/* Names the first of (name, bound) that does not hold. */
spurion_status store_check_name(spurion_bytes name, const char *what);
spurion_status store_check_identity(const spurion_identity *identity);

/* RESOURCE_EXHAUSTED when less than free_bytes_min + bytes is free. */
spurion_status store_check_space(spurion_store *s, uint64_t bytes);
/* Writes and syncs the batch; on failure the store takes no more. UNAVAILABLE at once when it failed before. */
spurion_status store_write(spurion_store *s, rocksdb_writebatch_t *batch);

/* Point read. *found false: no such key. value: copied into the arena, envelope opened. A damaged value is DATA_LOSS, counted. */
spurion_status store_read(bool *found, spurion_bytes *value, spurion_arena *arena, spurion_store *s, store_family family,
                          const store_key *key);
/* The same without an envelope and without the value. */
spurion_status store_exists(bool *found, spurion_store *s, store_family family, const store_key *key);
/* Puts payload in its envelope under key. */
spurion_status store_put(rocksdb_writebatch_t *batch, spurion_arena *arena, spurion_store *s, store_family family,
                         const store_key *key, spurion_bytes payload);

/* A range scan [lower, upper) of one family; value_at gives what the iterator holds, good until it moves. */
typedef struct store_scan {
    rocksdb_iterator_t *it;
    rocksdb_readoptions_t *read;
    store_key lower, upper; /* RocksDB keeps pointers to these */
    spurion_store *store;
    bool descending;
} store_scan;

/* Begins before the first key (the last when descending), or after `after` (size 0: none). scan must not move in memory. */
void store_scan_init(store_scan *scan, spurion_store *s, store_family family, bool descending, const rocksdb_snapshot_t *snapshot,
                     spurion_bytes after);
/* lower and upper for all keys that begin with prefix. Call before init. */
void store_scan_prefix(store_scan *scan, const store_key *prefix);
bool store_scan_valid(const store_scan *scan);
void store_scan_move(store_scan *scan);
spurion_bytes store_scan_key(const store_scan *scan);
spurion_bytes store_scan_value(const store_scan *scan);
/* OK, or why the scan ended early. */
spurion_status store_scan_status(store_scan *scan);
void store_scan_fini(store_scan *scan);

spurion_bytes store_copy(spurion_arena *arena, spurion_bytes b); /* data NULL: no memory */
/* The key's next name, copied: names that are given away end with a NUL. r->bad: no memory, or no name. */
spurion_bytes store_read_name(spurion_arena *arena, store_key_reader *r);
/* run, group and id of an identity that points into a key, copied. */
spurion_status store_own_names(spurion_identity *out, spurion_arena *arena);
spurion_status store_no_memory(void);

/* The file that says up to which sequence number of RocksDB's everything was synced: catches a log that was cut (store_synced.c). */
spurion_status store_synced_check(spurion_store *s);
void store_synced_write(spurion_store *s, bool now);

#endif

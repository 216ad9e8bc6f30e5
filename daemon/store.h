/* The store: every judged rollout, its evidence, indexes, counters, alerts and what was promised to producers, in one RocksDB
 * directory. docs/store.md has the layout, docs/guarantees.md what is promised.
 * Thread: one writer (the sink) calls commit; inbox_put, meta_put and everything that reads may come from any thread.
 * Memory: results live in the arena that the caller lends; what batches point to is only borrowed for the call.
 * Record, verdict, alert and inbox values are opaque bytes here: the pipeline encodes them (proto/codec.h). */
#ifndef SPURION_STORE_H
#define SPURION_STORE_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/base/arena.h"
#include "spurion/limits.h"
#include "spurion/rollout.h"
#include "spurion/status.h"

#define SPURION_STORE_FORMAT_VERSION 1
#define SPURION_DIGEST_BYTES 32
#define SPURION_STORE_PAGE_MAX 1000               /* rows of one page */
#define SPURION_STORE_EXAMINED_MAX 4096           /* index entries that one page looks at */
#define SPURION_STORE_FREE_BYTES_MIN (1ull << 30) /* default of free_bytes_min: 4 x the largest log would be 256 MiB */
#define SPURION_STORE_BUFFER_BYTES ((size_t)48 << 20)   /* write buffers of all column families together */
#define SPURION_STORE_KEY_BYTES_MAX 256           /* idempotency key, meta key */

typedef struct spurion_store spurion_store;

typedef struct spurion_store_options {
    const char *path;        /* directory; made (with parents) when it does not exist */
    bool unsynced;           /* acknowledge without sync: for the tests' negative control only. SPURION_STORE_SYNC=0 sets it too */
    uint64_t free_bytes_min; /* below: writes answer RESOURCE_EXHAUSTED; 0: SPURION_STORE_FREE_BYTES_MIN */
} spurion_store_options;

/* Opens or makes a store. Errors: FAILED_PRECONDITION (unknown format_version; directory holds something else; another process has
 * it: each with expected and found), RESOURCE_EXHAUSTED (space is checked before RocksDB is touched, recovery writes), DATA_LOSS
 * (damage, or a log that ends before what was acknowledged), PERMISSION_DENIED, UNAVAILABLE (other input/output errors). */
spurion_status spurion_store_open(spurion_store **out, const spurion_store_options *options) SPURION_MUST_USE;
/* Flushes and closes. No other thread may be inside. Takes NULL. */
void spurion_store_close(spurion_store *s);

/* ---- what is written ---- */

/* Identity of a rollout. Names: 1..SPURION_NAME_BYTES_MAX bytes; step >= 0. */
typedef struct spurion_identity {
    spurion_bytes run, group, id;
    int64_t step;
    int32_t attempt;
} spurion_identity;

typedef struct spurion_store_flag {
    spurion_bytes rule;
    float effect; /* the rule's effect (verdict.flags[].effect) */
} spurion_store_flag;

typedef struct spurion_store_feature {
    spurion_bytes sae;
    int32_t index;
    float attribution; /* kept with the index entry and summed in the counter; 0 when not explained */
    bool counted;      /* catalogued and active: into the counters of (run, step, feature) */
    bool indexed;      /* findable by feature */
} spurion_store_feature;

typedef enum spurion_row_outcome {
    SPURION_ROW_STORED,  /* new */
    SPURION_ROW_SAME,    /* identity known with the same digest: nothing of it was written or counted */
    SPURION_ROW_CONFLICT /* identity known with another digest: ALREADY_EXISTS; nothing was written or counted */
} spurion_row_outcome;

/* A judged rollout. Rows of refused rollouts are not stored: a refused rollout does not occupy its identity. */
typedef struct spurion_store_row {
    spurion_identity identity;
    uint8_t digest[SPURION_DIGEST_BYTES]; /* of its content */
    int64_t time_ms;                      /* wall clock, when it was judged */
    float reward, counterfactual_reward, effect;
    const spurion_store_flag *flags;
    int32_t flag_count;
    const spurion_store_feature *features; /* written to indexes and counters; empty in what is read back */
    int32_t feature_count;
    spurion_bytes verdict;       /* always kept: answers the same rollout when it is sent again */
    spurion_bytes record;        /* whole record; size 0: none (flagged rollouts have one, and a share of the rest) */
    bool has_record;             /* out, of reads: a record is stored (its bytes are read only where asked for) */
    spurion_row_outcome outcome; /* out, of commit */
    spurion_bytes cursor;        /* out, of queries: goes on after this row */
} spurion_store_row;

/* An alert to append. Numbers are consecutive from 1 under the store's epoch, in the order of the batch. */
typedef struct spurion_store_alert {
    spurion_bytes alert; /* at most SPURION_ALERT_BYTES_MAX on the wire is the caller's care */
    int32_t row;         /* >= 0: belongs to this row, and is dropped unless that row is STORED */
    int32_t closing;     /* >= 0: belongs to this closing, and is dropped when it was closed before */
    uint64_t sequence;   /* out: its number, 0 when dropped */
} spurion_store_alert;

/* Marks (run, step, rule) as closed, once: what keeps a rate alert from being sent twice. rule of size 0: the step itself is closed
 * (for every rule) and is no longer listed by spurion_store_open_steps. */
typedef struct spurion_store_closing {
    spurion_bytes run, rule;
    int64_t step;
    bool closed_before; /* out */
} spurion_store_closing;

/* What of a producer's epoch is stored: ranges of sequences, encoded by the pipeline. Replaces the value. */
typedef struct spurion_store_mark {
    spurion_bytes run, producer;
    uint64_t epoch;
    spurion_bytes ranges;
} spurion_store_mark;

typedef struct spurion_store_reply {
    spurion_bytes key; /* idempotency key, 1..SPURION_STORE_KEY_BYTES_MAX bytes */
    spurion_bytes reply;
    int64_t expires_ms; /* wall clock */
} spurion_store_reply;

/* One micro-batch's worth: everything in it becomes durable together, or nothing does. Rows that the store already has are left out
 * with all that belongs to them (indexes, counters, alerts); inbox entries, marks and replies are written all the same.
 * Counters follow from the rows: each STORED row adds 1 scored to every rule in `rules`, 1 flagged to each of its flags. */
typedef struct spurion_store_batch {
    spurion_store_row *rows;
    int32_t row_count;
    const spurion_bytes *rules; /* ids of the rules in force */
    int32_t rule_count;
    spurion_store_alert *alerts;
    int32_t alert_count;
    spurion_store_closing *closings;
    int32_t closing_count;
    const spurion_store_mark *marks;
    int32_t mark_count;
    const spurion_store_reply *replies;
    int32_t reply_count;
    const uint64_t *inbox_done; /* tickets of spurion_store_inbox_put that are judged (or refused) now */
    int32_t inbox_done_count;
} spurion_store_batch;

/* Writes the batch and returns OK only after it is synced: acknowledge after it, never before. RESOURCE_EXHAUSTED: too little
 * space, nothing written, try later. UNAVAILABLE: a write or sync failed now or before; the store takes no more writes until it is
 * opened again (a failed sync is not retried as if nothing had happened). INVALID_ARGUMENT: a name or step out of bounds, nothing
 * written. */
spurion_status spurion_store_commit(spurion_store *s, spurion_store_batch *batch) SPURION_MUST_USE;

/* Keeps an accepted, not yet judged rollout (or message) until its ticket comes in inbox_done. Synced; any thread.
 * Several values take one sync. reply, marks: written in the same batch, or NULL, 0. tickets: (value_count), ascending. */
spurion_status spurion_store_inbox_put(uint64_t *tickets, spurion_store *s, const spurion_bytes *values, int32_t value_count,
                                       const spurion_store_reply *reply, const spurion_store_mark *marks,
                                       int32_t mark_count) SPURION_MUST_USE;

/* Texts about the store or its contents, e.g. what a provenance stands for. Synced; any thread.
 * Key: 1..SPURION_STORE_KEY_BYTES_MAX. */
spurion_status spurion_store_meta_put(spurion_store *s, spurion_bytes key, spurion_bytes value) SPURION_MUST_USE;

/* Removes up to count_max replies that expired before now_ms. *removed may be NULL. Any thread, one at a time. */
spurion_status spurion_store_trim(int32_t *removed, spurion_store *s, int64_t now_ms, int32_t count_max) SPURION_MUST_USE;

/* ---- what is read ---- */
/* NOT_FOUND: no such entry. DATA_LOSS: it is damaged (counted in stats); the intact rest is still served. */

/* The row of an identity; features empty, record empty unless with_record and there is one. */
spurion_status spurion_store_get(spurion_store_row *out, spurion_arena *arena, spurion_store *s, const spurion_identity *identity,
                                 bool with_record) SPURION_MUST_USE;

typedef enum spurion_store_order {
    SPURION_ORDER_STEP,  /* step, then group, id, attempt */
    SPURION_ORDER_TIME,  /* when judged */
    SPURION_ORDER_EFFECT /* the rule's effect when a rule is named, else the rollout's; most negative first. Rollouts whose effect
                            is exactly 0 (nothing was removed) are not in this order */
} spurion_store_order;

/* Zero is a query for all rows of the run: every condition is off until its has_ or size says otherwise. All conditions must hold. */
typedef struct spurion_store_query {
    spurion_bytes run; /* required */
    spurion_store_order order;
    bool descending;    /* largest first: with ORDER_EFFECT most positive first */
    bool flagged;       /* only flagged rollouts */
    spurion_bytes rule; /* size > 0: flagged by this rule */
    spurion_bytes sae;  /* size > 0: feature sae/index indexed */
    int32_t index;
    spurion_bytes group;                                                                         /* size > 0 */
    bool has_step_min, has_step_max, has_time_min, has_time_max, has_effect_min, has_effect_max; /* all inclusive */
    int64_t step_min, step_max, time_min, time_max;
    float effect_min, effect_max;
    bool with_record;     /* read records too */
    int32_t limit;        /* 1..SPURION_STORE_PAGE_MAX; 0: 100 */
    uint64_t bytes_max;   /* stop before verdicts and records of the page pass this (one row always fits); 0: none */
    spurion_bytes cursor; /* size 0: from the start; of another query or damaged: INVALID_ARGUMENT */
} spurion_store_query;

/* A page may hold fewer rows than asked, even none, while there is more: the work per page is bounded. more false: the end. */
typedef struct spurion_store_page {
    spurion_store_row *rows;
    int32_t row_count;
    int32_t damaged_count; /* rows left out because they are damaged (counted in stats) */
    bool more;
    spurion_bytes cursor; /* of the page's end; each row carries its own too, so that a caller may stop earlier */
} spurion_store_page;

spurion_status spurion_store_query_page(spurion_store_page *out, spurion_arena *arena, spurion_store *s,
                                        const spurion_store_query *query) SPURION_MUST_USE;

/* All rows of a run in the order of steps, as they were at open, with their records: for exports. The row given by next points into
 * the export and is good until the following next. *found false: the end. Damaged rows end with DATA_LOSS; next may be called
 * again. */
typedef struct spurion_store_export spurion_store_export;
spurion_status spurion_store_export_open(spurion_store_export **out, spurion_store *s, spurion_bytes run) SPURION_MUST_USE;
spurion_status spurion_store_export_next(bool *found, spurion_store_row *out, spurion_store_export *e) SPURION_MUST_USE;
void spurion_store_export_close(spurion_store_export *e);

/* Counters. What a kind counts: STEP all rows of (run, step); RULE those under (run, rule, step); FEATURE those where the
 * catalogued feature was active in (run, feature, step). */
typedef enum spurion_count_kind { SPURION_COUNT_STEP, SPURION_COUNT_RULE, SPURION_COUNT_FEATURE } spurion_count_kind;

typedef struct spurion_store_count {
    spurion_bytes rule; /* RULE */
    spurion_bytes sae;  /* FEATURE */
    int32_t index;      /* FEATURE */
    int64_t step;       /* -1: all steps of the run */
    uint64_t scored;    /* rollouts: judged (STEP), judged under the rule (RULE), active (FEATURE) */
    uint64_t flagged;   /* of these: flagged by any rule (STEP, FEATURE), by the rule (RULE) */
    double effect_sum;  /* STEP: of effect; RULE: of the rule's effect over the flagged; FEATURE: of attribution */
    double reward_sum, reward_square_sum, counterfactual_sum; /* STEP only */
} spurion_store_count;

typedef struct spurion_store_counts_query {
    spurion_count_kind kind;
    spurion_bytes run;
    spurion_bytes rule; /* RULE with totals false */
    spurion_bytes sae;  /* FEATURE with totals false */
    int32_t index;
    bool totals; /* one entry for each rule (feature) of the run over all steps, instead of one for each step; for STEP one entry */
    bool has_step_min, has_step_max;
    int64_t step_min, step_max;
    int32_t limit; /* 1..SPURION_STORE_PAGE_MAX; 0: 100 */
    spurion_bytes cursor;
} spurion_store_counts_query;

typedef struct spurion_store_counts_page {
    spurion_store_count *counts;
    int32_t count;
    bool more;
    spurion_bytes cursor;
} spurion_store_counts_page;

spurion_status spurion_store_counts(spurion_store_counts_page *out, spurion_arena *arena, spurion_store *s,
                                    const spurion_store_counts_query *query) SPURION_MUST_USE;

/* What a rate alert needs: the counter of (run, rule, step), and the sum over all steps <= step. All zero where nothing was
 * counted. */
spurion_status spurion_store_rule_counts(spurion_store_count *at_step, spurion_store_count *through_step, spurion_store *s,
                                         spurion_bytes run, spurion_bytes rule, int64_t step) SPURION_MUST_USE;

typedef struct spurion_store_worst {
    spurion_identity identity;
    float effect; /* the rule's */
} spurion_store_worst;

/* The rollouts of (run, step) that the rule flagged, largest |effect| first (ties by group, id, attempt); at most limit <= 64. */
spurion_status spurion_store_worst_of_step(spurion_store_worst **out, int32_t *count, spurion_arena *arena, spurion_store *s,
                                           spurion_bytes run, spurion_bytes rule, int64_t step, int32_t limit) SPURION_MUST_USE;

typedef struct spurion_store_run {
    spurion_bytes run;
    int64_t first_ms, last_ms, step_min, step_max;
    uint64_t rollouts, flagged;
} spurion_store_run;

/* Runs after `after` (size 0: from the start) in key order; *more when the limit (1..SPURION_STORE_PAGE_MAX) cut the list. */
spurion_status spurion_store_runs(spurion_store_run **out, int32_t *count, bool *more, spurion_arena *arena, spurion_store *s,
                                  spurion_bytes after, int32_t limit) SPURION_MUST_USE;

typedef struct spurion_store_open_step {
    spurion_bytes run;
    int64_t step;
} spurion_store_open_step;

/* Steps with stored rollouts that no closing has closed: what a restarted daemon has to close. run of size 0: of all runs. */
spurion_status spurion_store_open_steps(spurion_store_open_step **out, int32_t *count, spurion_arena *arena, spurion_store *s,
                                        spurion_bytes run, int32_t limit) SPURION_MUST_USE;
spurion_status spurion_store_step_closed(bool *out, spurion_store *s, spurion_bytes run, int64_t step,
                                         spurion_bytes rule) SPURION_MUST_USE;

typedef struct spurion_store_alert_entry {
    uint64_t sequence;
    spurion_bytes alert;
} spurion_store_alert_entry;

/* Alerts with sequence >= from_sequence, ascending; stops at limit or before the alerts pass bytes_max (0: none; one always fits). */
spurion_status spurion_store_alerts(spurion_store_alert_entry **out, int32_t *count, spurion_arena *arena, spurion_store *s,
                                    uint64_t from_sequence, int32_t limit, uint64_t bytes_max) SPURION_MUST_USE;
/* The stream's epoch (random, made with the store: another epoch is another store) and the number the next alert will have. */
uint64_t spurion_store_alert_epoch(const spurion_store *s);
uint64_t spurion_store_alert_next(const spurion_store *s);

typedef struct spurion_store_inbox_entry {
    uint64_t ticket;
    spurion_bytes value;
} spurion_store_inbox_entry;

/* Inbox entries with ticket > after_ticket (0: from the start), in the order they were accepted. damaged: entries left out, or
 * NULL. */
spurion_status spurion_store_inbox(spurion_store_inbox_entry **out, int32_t *count, int32_t *damaged, spurion_arena *arena,
                                   spurion_store *s, uint64_t after_ticket, int32_t limit) SPURION_MUST_USE;

/* NOT_FOUND when unknown, or expired at now_ms. */
spurion_status spurion_store_reply_get(spurion_bytes *out, spurion_arena *arena, spurion_store *s, spurion_bytes key,
                                       int64_t now_ms) SPURION_MUST_USE;
spurion_status spurion_store_mark_get(spurion_bytes *ranges, spurion_arena *arena, spurion_store *s, spurion_bytes run,
                                      spurion_bytes producer, uint64_t epoch) SPURION_MUST_USE;
/* Marks of a run (size 0: of all runs), for a daemon that starts again. */
spurion_status spurion_store_marks(spurion_store_mark **out, int32_t *count, spurion_arena *arena, spurion_store *s,
                                   spurion_bytes run, int32_t limit) SPURION_MUST_USE;
spurion_status spurion_store_meta_get(spurion_bytes *out, spurion_arena *arena, spurion_store *s,
                                      spurion_bytes key) SPURION_MUST_USE;

/* ---- how it is ---- */

typedef struct spurion_store_stats {
    uint64_t free_bytes, free_bytes_min; /* not ready below twice the minimum */
    bool writable;                       /* no write has failed, and there is space */
    bool low_space;                      /* below twice the minimum */
    bool failed;                         /* a write or sync failed: no more writes on this handle */
    uint64_t commits, rows, rows_same, rows_conflict, alerts, inbox_puts, corruptions, refused_for_space;
    int64_t last_sync_ns; /* duration of the last synced write */
} spurion_store_stats;

void spurion_store_stats_get(spurion_store_stats *out, spurion_store *s);

/* A consistent copy of the store in a new directory (hard links where it can): restore by opening it. */
spurion_status spurion_store_checkpoint(spurion_store *s, const char *path) SPURION_MUST_USE;

#endif

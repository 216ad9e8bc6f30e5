/* Counters of a commit: collected in memory, then each read, raised and put once. Thread: the writer. Memory: the commit's arena. */
#ifndef SPURION_STORE_COUNT_H
#define SPURION_STORE_COUNT_H

#include "daemon/store_internal.h"

typedef struct store_tally_entry {
    spurion_bytes key;
    store_counter delta;
} store_tally_entry;

typedef struct store_tally {
    spurion_arena *arena;
    store_tally_entry *entries; /* open addressing, key.data NULL: free */
    size_t capacity, used;      /* capacity: a power of two */
} store_tally;

spurion_status store_tally_init(store_tally *t, spurion_arena *arena);
/* Adds delta to the counter of key. */
spurion_status store_tally_add(store_tally *t, const store_key *key, const store_counter *delta);
/* Puts every counter, raised, into the batch. DATA_LOSS when one is damaged: counting on would be counting wrong. */
spurion_status store_tally_write(store_tally *t, rocksdb_writebatch_t *batch, spurion_store *s);

/* kind, run, and where the kind has them rule | sae, index, and step. */
void store_count_key(store_key *k, uint8_t kind, spurion_bytes run, spurion_bytes name, int32_t index, int64_t step);

#endif

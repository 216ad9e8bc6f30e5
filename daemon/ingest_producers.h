/* What came from each producer of the tap: the set of its sequences that are here, those that are durable, those that are lost, and
 * how far its word about steps reaches. One object for the daemon.
 * Thread: any; stage, encode and settle only the sink. Memory: grows with producers (at most SPURION_PRODUCERS_KEPT are remembered,
 * idle ones go first: what they said is in the store) and with ranges (at most SPURION_RANGES_MAX each). */
#ifndef SPURION_INGEST_PRODUCERS_H
#define SPURION_INGEST_PRODUCERS_H

#include <stdbool.h>
#include <stdint.h>

#include "spurion/codec.h"
#include "spurion/messages.h"
#include "spurion/status.h"

#define SPURION_PRODUCERS_KEPT 4096

typedef struct spurion_producers spurion_producers;
typedef struct spurion_producer spurion_producer; /* one (run, producer, epoch); good while something of it is pending or pinned */

/* Reads the durable mark of a producer. NOT_FOUND: there is none. *mark is good until the next call or until the load returns. */
typedef spurion_status (*spurion_producers_load)(void *context, spurion_bytes *mark, spurion_bytes run, spurion_bytes producer, uint64_t epoch);

spurion_status spurion_producers_create(spurion_producers **out, spurion_producers_load load, void *context) SPURION_MUST_USE;
void spurion_producers_destroy(spurion_producers *p);

typedef enum spurion_taken {
    SPURION_TAKEN,       /* new: now pending; *out is pinned until settle or drop */
    SPURION_TAKEN_BEFORE /* pending or stored already */
} spurion_taken;

/* A message came. RESOURCE_EXHAUSTED: too many holes (it stays missing), UNAVAILABLE: the mark could not be read. */
spurion_status spurion_producers_take(spurion_taken *taken, spurion_producer **out, spurion_producers *p, const spurion_tap *tap) SPURION_MUST_USE;
/* The message could not be worked on after all: it is missing again. Unpins. */
void spurion_producers_drop(spurion_producers *p, spurion_producer *producer, uint64_t sequence);

/* Answers Sync from what is known; ranges in m. *out (may be NULL) gives the producer, pinned, for staging losses and the closing. */
spurion_status spurion_producers_sync(spurion_sync_reply *reply, spurion_producer **out, spurion_producers *p, const spurion_memory *m,
                                      const spurion_sync *sync) SPURION_MUST_USE;

/* ---- the sink: staged changes become a mark, which becomes durable with a batch, and is settled after it ---- */

/* The message `sequence` is done: its rollouts are in this batch or before. step_seen: highest step of its rollouts, -1: none. */
void spurion_producers_stage(spurion_producers *p, spurion_producer *producer, uint64_t sequence, int64_t step_seen, int64_t step_end);
/* The losses and the end that a Sync told. */
void spurion_producers_stage_sync(spurion_producers *p, spurion_producer *producer, const spurion_sync *sync);
/* The mark with everything staged, in m. */
spurion_status spurion_producers_encode(spurion_bytes *mark, spurion_producers *p, spurion_producer *producer, const spurion_memory *m) SPURION_MUST_USE;

/* What a producer has said about steps, counting only what came without a hole. */
typedef struct spurion_word {
    int64_t seen, ended;  /* highest step shown, highest StepEnd; -1: none */
    bool closed;          /* said goodbye, and everything before it is stored */
} spurion_word;

/* The batch with the mark is durable: what was staged is stored. Unpins once for each stage and stage_sync (count of them). */
void spurion_producers_settle(spurion_word *word, spurion_producers *p, spurion_producer *producer, int pins);

spurion_bytes spurion_producer_run(const spurion_producer *producer);
spurion_bytes spurion_producer_name(const spurion_producer *producer);
uint64_t spurion_producer_epoch(const spurion_producer *producer);

/* The word in a mark's bytes: for a daemon that starts again. DATA_LOSS: not a mark. */
spurion_status spurion_producers_word_of(spurion_word *out, spurion_bytes mark) SPURION_MUST_USE;

/* For Status: at most max, the most recent ones; names in m. */
spurion_status spurion_producers_list(spurion_producer_status *out, int32_t *count, spurion_producers *p, const spurion_memory *m,
                                      int32_t max) SPURION_MUST_USE;

#endif

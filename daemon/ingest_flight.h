/* The rollouts in flight, by identity: two of one identity are never judged at the same time, and Status can name what is stuck.
 * Thread: any. Memory: entries belong to the caller, who keeps them until they left; the table itself is taken in create. */
#ifndef SPURION_INGEST_FLIGHT_H
#define SPURION_INGEST_FLIGHT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "spurion/codec.h"
#include "spurion/messages.h"
#include "spurion/status.h"

typedef enum spurion_stage { SPURION_STAGE_QUEUED, SPURION_STAGE_GROUPING, SPURION_STAGE_JUDGING, SPURION_STAGE_STORING } spurion_stage;

typedef struct spurion_flight_entry {
    /* filled by the caller before enter */
    spurion_key key;
    unsigned char digest[SPURION_ROLLOUT_DIGEST_BYTES];
    int64_t since_ms;                        /* monotonic */
    _Atomic int stage;                       /* spurion_stage */
    /* of the table */
    uint64_t hash;
    struct spurion_flight_entry *chain;      /* same bucket */
    struct spurion_flight_entry *waiters;    /* same identity and content, came later; linked by their own waiters member */
    struct spurion_flight_entry *older, *newer;
} spurion_flight_entry;

typedef struct spurion_flights spurion_flights;

typedef enum spurion_enter {
    SPURION_ENTERED,   /* the identity is this entry's until leave */
    SPURION_WAITING,   /* same identity and content is in flight: the entry now hangs on it, and comes back from its leave */
    SPURION_OCCUPIED   /* same identity, other content is in flight: ALREADY_EXISTS */
} spurion_enter;

spurion_status spurion_flights_create(spurion_flights **out) SPURION_MUST_USE;
void spurion_flights_destroy(spurion_flights *f);

spurion_enter spurion_flights_enter(spurion_flights *f, spurion_flight_entry *entry);
/* Takes entry out; gives the list of those that waited for it (linked by waiters), first come first. */
spurion_flight_entry *spurion_flights_leave(spurion_flights *f, spurion_flight_entry *entry);

int64_t spurion_flights_count(spurion_flights *f);
/* Whether a rollout of (run, step or before) is in flight. */
bool spurion_flights_has_step(spurion_flights *f, spurion_bytes run, int64_t step);
/* Copies the oldest ones, at most max, names into m. */
spurion_status spurion_flights_list(spurion_flight *out, int32_t *count, spurion_flights *f, const spurion_memory *m, int32_t max,
                                    int64_t now_ms) SPURION_MUST_USE;

#endif

/* The inside of a client handle, shared by client.c (calls), tap.c (publishing) and alerts.c. */
#ifndef SPURION_HANDLE_H
#define SPURION_HANDLE_H

#include <sys/types.h>

#include "spurion/client.h"
#include "spurion/codec.h"

#include "sp.h"

/* Memory of one answer: chunks from malloc, freed together at the next call. */
typedef struct spurion_pool {
    struct spurion_pool_chunk *head;
    size_t bytes;
} spurion_pool;

void *spurion_pool_take(void *pool, size_t bytes);
void spurion_pool_reset(spurion_pool *p);
static inline spurion_memory spurion_pool_memory(spurion_pool *p)
{
    spurion_memory m = {spurion_pool_take, p};
    return m;
}

/* One request on its way over REQ, and its answer; sent again when the connection is made anew. */
typedef struct spurion_call {
    spurion_sp sp;
    unsigned char *frame;       /* header, SP request id, body */
    size_t frame_size, frame_capacity, frame_at;
    uint32_t id;
    uint64_t sent_on;           /* sp.opened when it was sent */
    bool under_way;
} spurion_call;

spurion_status spurion_call_init(spurion_call *k, const char *url) SPURION_MUST_USE;
void spurion_call_fini(spurion_call *k);
spurion_status spurion_call_start(spurion_call *k, spurion_bytes body) SPURION_MUST_USE;
/* Moves the call along without waiting. OK: *reply.data is the answer (borrowed until the next step), or NULL: not yet.
 * UNAVAILABLE: no connection now; the call stays under way. */
spurion_status spurion_call_step(spurion_call *k, spurion_bytes *reply) SPURION_MUST_USE;
/* Gives the call up; an answer that still comes is not taken for the next one's. */
void spurion_call_abandon(spurion_call *k);

/* A batch that waits for the daemon to confirm it. data is a whole Tap message. */
typedef struct spurion_ring_entry {
    struct spurion_ring_entry *next;
    uint64_t sequence;
    uint32_t rollouts;
    int64_t sent_ms;              /* when the last of it went over the tap */
    size_t size;
    char data[];
} spurion_ring_entry;

/* A batch that went over the tap and that the ring forgot before the daemon said whether it came. */
typedef struct spurion_unsure {
    uint64_t sequence;
    uint32_t rollouts;
    int64_t sent_ms;
} spurion_unsure;

typedef struct spurion_tap_state {
    spurion_sp sp;
    bool on;
    uint64_t epoch, sequence;
    spurion_ring_entry *first, *last;
    spurion_ring_entry *sending;  /* the next to go over the tap; NULL: all went */
    size_t sending_at;            /* bytes of its frame that went */
    size_t ring_bytes;
    uint64_t stored_through;
    uint64_t published_rollouts, dropped_batches, dropped_rollouts, refilled;
    uint64_t confirmed;         /* the highest stored_through so far */
    uint64_t forgotten_batches; /* confirmed once, and missing later */
    spurion_unsure *unsure;       /* in the order of their numbers */
    int32_t unsure_count, unsure_capacity;
    spurion_range *lost;          /* forgotten for good, not yet settled with the daemon; in order */
    int32_t lost_count, lost_capacity;
    uint64_t lost_rollouts;       /* dropped by the ring, whether they had a number or not */
    spurion_call sync;            /* Sync and Fill, beside the calls of the user */
    bool filling;                 /* the call under way is a Fill */
    bool closing;                 /* Sync says goodbye */
    bool closing_asked, closed;   /* in the Sync under way; answered */
    uint64_t lost_asked, lost_told; /* of lost_rollouts: in the Sync under way; answered */
    int64_t sync_at_ms, sync_started_ms;
    uint64_t answers;             /* to Sync so far */
} spurion_tap_state;

typedef struct spurion_alerts_state {
    spurion_sp sp;
    bool on, started;
    uint64_t epoch, next_seq;     /* the number that is due */
    uint64_t fetch_below;         /* numbers from next_seq to below this one are fetched by rpc */
    spurion_pool pool, held_pool;
    spurion_alert held;           /* came live while older ones are fetched */
    bool has_held;
    spurion_alerts_reply page;    /* fetched, being given out */
    int32_t page_at;
    int64_t look_at_ms;          /* when to ask the store although nothing came live */
} spurion_alerts_state;

struct spurion_client {
    pid_t pid;
    char error[SPURION_MESSAGE_BYTES];
    uint32_t retry_after_ms;
    int timeout_ms, sync_interval_ms;
    size_t ring_bytes_max;
    spurion_ring_policy policy;
    char run[SPURION_NAME_BYTES_MAX + 1], producer[SPURION_NAME_BYTES_MAX + 1];
    bool has_rpc;
    spurion_call call;
    uint64_t call_id;
    unsigned char key[16];        /* of idempotency: random at open, counted up */
    spurion_pool pool;            /* the last answer, unpacked */
    spurion_pool previous;        /* the one before, until the request that may borrow from it is packed */
    spurion_pool scratch;         /* one page of it, one Sync */
    char *answer;                 /* its pages, joined */
    size_t answer_capacity;
    spurion_tap_state tap;
    spurion_alerts_state alerts;
};

/* Keeps the text and gives the code. */
spurion_code spurion_client_fail(spurion_client *c, const spurion_status *st);
/* FAILED_PRECONDITION in a forked child. Begins every call: the last answer becomes the previous. */
spurion_status spurion_client_enter(spurion_client *c) SPURION_MUST_USE;
/* A request of `method` around body, packed. */
spurion_status spurion_client_request(spurion_client *c, spurion_bytes *out, const spurion_memory *m, const char *method, spurion_bytes body,
                                      spurion_bytes key, spurion_bytes page, int timeout_ms) SPURION_MUST_USE;
/* Calls and waits; pages are joined. *out in the handle's pool. retry: send again while the daemon is busy or away. */
spurion_status spurion_client_call(spurion_client *c, spurion_bytes *out, const char *method, spurion_bytes body, bool retry,
                                   int timeout_ms) SPURION_MUST_USE;
void spurion_tap_fini(spurion_tap_state *t);
void spurion_alerts_fini(spurion_alerts_state *a);

#endif

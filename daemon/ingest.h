/* Calls and items: what a message is while it is in flight. A call is one message (request or tap); an item is one of its rollouts.
 * From the wire to the sink a call has one owner at a time: nng's thread decodes it, the intake admits its rollouts, the sink answers
 * and frees it. The items go their own way through batcher and engine in between.
 * Memory: the call's arena holds the decoded message and, later, the answers; each item's job has its own arena. All of it is reserved
 * against engine.queue_max before the call is accepted. */
#ifndef SPURION_INGEST_H
#define SPURION_INGEST_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/ingest_flight.h"
#include "daemon/ingest_producers.h"
#include "daemon/ingest_queue.h"
#include "daemon/job.h"
#include "daemon/transport.h"
#include "spurion/codec.h"
#include "spurion/messages.h"

typedef enum spurion_call_kind {
    SPURION_CALL_SCORE,
    SPURION_CALL_SUBMIT,
    SPURION_CALL_INBOX,    /* a Submit of an earlier life of the daemon */
    SPURION_CALL_TAP,
    SPURION_CALL_SYNC,     /* only where something must become durable */
    SPURION_CALL_STEP_END,
    SPURION_CALL_READ
} spurion_call_kind;

typedef enum spurion_fate {
    SPURION_FATE_JUDGE,    /* goes to the engine, or comes from it with a verdict */
    SPURION_FATE_KNOWN,    /* stored before: answer holds the verdict */
    SPURION_FATE_REFUSED,  /* job.verdict says why */
    SPURION_FATE_ABANDONED,/* not judged, and nobody is told that it was: shutting down or the device failed */
    SPURION_FATE_NONE      /* no rollout: stands for a message without any */
} spurion_fate;

struct spurion_call;

typedef struct spurion_item {
    spurion_node node;     /* first: an item is its node */
    spurion_flight_entry flight;
    spurion_job job;
    struct spurion_call *call;
    spurion_fate fate;
    bool entered;          /* stands in the table of flights */
    bool judged;           /* counted in the pipeline's judged */
    spurion_bytes answer;  /* packed verdict, in job.arena (KNOWN) or the call's arena (after the sink) */
} spurion_item;

typedef struct spurion_call {
    spurion_node node;     /* first */
    spurion_arena arena;
    spurion_call_kind kind;
    spurion_transport_call *wire; /* NULL: nobody waits for an answer over rpc */
    struct spurion_http_call *http; /* NULL: nobody waits for one over HTTP (service_http.h) */
    spurion_request request;
    int64_t since_ms, deadline_ms;
    size_t reserved;

    spurion_rollouts list; /* SCORE, SUBMIT, INBOX, TAP */
    spurion_bytes producer;
    bool want_tokens;
    spurion_tap tap;
    spurion_sync sync;
    spurion_step_end step_end;
    spurion_producer *source; /* TAP, SYNC: pinned */
    uint64_t ticket;       /* SUBMIT, INBOX */

    spurion_item *items;
    int32_t item_count;
    int32_t open;          /* items that the sink has not seen; the sink's alone */
    bool *mine;            /* SUBMIT: (list.count) the desk has admitted the item and it waits for nobody; NULL: the intake admits */
    spurion_status abandoned; /* not OK: why */
    struct spurion_call *done_next;
    int done_pins;
} spurion_call;

struct spurion_pipeline;

spurion_call *spurion_call_create(spurion_call_kind kind, spurion_transport_call *wire);
/* Frees the call with its items, and gives back what it had reserved. Takes NULL. */
void spurion_call_destroy(struct spurion_pipeline *p, spurion_call *call);
/* Memory of the call, for the codec. */
spurion_memory spurion_arena_memory(spurion_arena *arena);

/* Reserves memory for a decoded call; UNAVAILABLE when too much is in flight. */
spurion_status spurion_call_reserve(struct spurion_pipeline *p, spurion_call *call, size_t wire_bytes) SPURION_MUST_USE;
/* Makes the items of call->list, and one without a rollout when the list is empty or the call must outlive its rollouts (SUBMIT). */
spurion_status spurion_call_make_items(spurion_call *call) SPURION_MUST_USE;

/* Takes one message of the tap (channel or Fill). *before: it came before and is dropped; else it goes to the intake. */
spurion_status spurion_ingest_tap(bool *before, struct spurion_pipeline *p, spurion_bytes message) SPURION_MUST_USE;

/* Enters an item into the flights and looks into the store: sets its fate. false: it waits for another one of its identity and will be
 * pushed to the sink by whoever finishes that. Intake and desk. */
bool spurion_ingest_admit(struct spurion_pipeline *p, spurion_item *item);
/* Ends what leave gave back: those that waited for `item` get its fate and go to the sink. */
void spurion_ingest_release_waiters(struct spurion_pipeline *p, spurion_item *item, spurion_flight_entry *waiters);

/* Refuses an item that is in no flight. */
void spurion_ingest_refuse(spurion_item *item, const spurion_status *why);

/* Gives an item of a call without names (HTTP) its rollout's, and checks the rollout whole; before it is admitted. */
void spurion_item_name(spurion_item *item, const spurion_rollout *rollout);

/* The intake thread. */
void *spurion_ingest_main(void *pipeline);

#endif

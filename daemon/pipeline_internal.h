/* Private to the pipeline's files (pipeline*.c, ingest.c, service*.c): the one object that they share. Every member says who writes it. */
#ifndef SPURION_PIPELINE_INTERNAL_H
#define SPURION_PIPELINE_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "daemon/batcher.h"
#include "daemon/engine.h"
#include "daemon/ingest.h"
#include "daemon/pipeline.h"
#include "daemon/store.h"

typedef enum spurion_count {
    SPURION_STAT_REQUESTS, SPURION_STAT_REQUESTS_REFUSED, SPURION_STAT_TAPS, SPURION_STAT_TAPS_BEFORE, SPURION_STAT_TAPS_REFUSED,
    SPURION_STAT_RECEIVED, SPURION_STAT_JUDGED, SPURION_STAT_REFUSED, SPURION_STAT_FLAGGED, SPURION_STAT_KNOWN,
    SPURION_STAT_ALERTS, SPURION_STAT_BATCHES, SPURION_STAT_COMMITS, SPURION_STAT_STEPS_CLOSED, SPURION_STAT_CONFLICTS,
    SPURION_STAT_TOKENS, SPURION_STAT_PREPARED_AHEAD
} spurion_stat;
#define SPURION_STAT_COUNT 17

typedef enum spurion_state { SPURION_STATE_STARTING, SPURION_STATE_SERVING, SPURION_STATE_DRAINING } spurion_state;

typedef struct spurion_pages spurion_pages;
struct spurion_http;
struct spurion_http_calls;
typedef struct spurion_step_runs spurion_step_runs;

typedef struct spurion_pipeline {
    const spurion_config *config;  /* = &active */
    spurion_config active;         /* rules and catalogue change by SIGHUP, under policy */
    spurion_config *reloaded;      /* main: owns the rules in force after a SIGHUP, or NULL */
    const spurion_source *source;  /* main: where the configuration came from */
    pthread_rwlock_t policy;       /* read by who looks at rules, catalogue or provenance beside the engine; written by a reload */
    pthread_mutex_t gate;          /* held by the engine while it judges, by main while it reloads */
    _Atomic bool reloading;        /* main: the engine leaves the gate alone */
    _Atomic int64_t judged;        /* rollouts that the engine has judged and the sink has not yet let go */
    int64_t start_ms;
    spurion_store *store;          /* main, before the threads */
    spurion_transport *transport;  /* main */
    spurion_engine *engine;        /* engine thread, before ready */
    spurion_batcher *batcher;      /* engine thread, before ready */
    spurion_flights *flights;
    spurion_producers *producers;
    spurion_pages *pages;
    spurion_step_runs *runs;       /* sink */
    struct spurion_http *http;     /* main; NULL: not listened */
    struct spurion_http_calls *http_calls;

    spurion_queue intake;          /* calls */
    spurion_queue sink;            /* items, and calls of kind SYNC and STEP_END as items of fate NONE */
    spurion_queue desk;            /* calls */

    _Atomic int state;             /* spurion_state; main */
    _Atomic bool abandon;          /* main: no more work for the engine */
    _Atomic bool store_blocked;    /* sink, main: no space; new work is refused */
    _Atomic int failed;            /* exit status of the first fatal failure, 0: none; engine, sink */
    _Atomic size_t bytes;          /* reserved */
    _Atomic uint64_t first_ticket; /* desk: of the first Submit of this life; UINT64_MAX: none yet */
    _Atomic int64_t engine_tick_ms;/* engine: last turn of its loop */
    _Atomic uint64_t counts[SPURION_STAT_COUNT];

    pthread_mutex_t ready_lock;    /* main waits for the engine */
    pthread_cond_t ready_cond;
    bool ready;
    spurion_status ready_status;

    spurion_bytes *rules;          /* ids of config->rules */
} spurion_pipeline;

static inline void spurion_stat_add(spurion_pipeline *p, spurion_stat which, uint64_t n)
{
    atomic_fetch_add_explicit(&p->counts[which], n, memory_order_relaxed);
}

/* Ends the daemon with this status; the first one stands. Any thread. */
void spurion_pipeline_fail(spurion_pipeline *p, int exit_status);

/* The engine turns, or waits for work. */
bool spurion_pipeline_alive(spurion_pipeline *p);
/* New work is taken: serving, and the store has space and no failure. */
bool spurion_pipeline_ready(spurion_pipeline *p);

/* Answers a call and destroys it: status, or the method's packed reply, in pages where it is long. Any thread. */
void spurion_service_answer(spurion_pipeline *p, spurion_call *call, const spurion_status *st, spurion_bytes body);
/* Answers without destroying; the call has no wire afterwards. */
void spurion_service_reply(spurion_pipeline *p, spurion_call *call, const spurion_status *st, spurion_bytes body);

/* Threads. */
void *spurion_sink_main(void *pipeline);
void *spurion_desk_main(void *pipeline);

/* What a status means for the process. */
int spurion_pipeline_exit_of(int code);

#endif

/* A pool of workers that runs numbered items. Items are fixed by the caller, so results do not depend on the worker count.
 * Thread: one thread at a time calls run; it works too, as worker 0. Workers sleep after a short spin: the machine may be shared. */
#ifndef SPURION_CPU_POOL_H
#define SPURION_CPU_POOL_H

#include <stdint.h>

#include "spurion/status.h"

typedef struct spurion_pool spurion_pool;

/* Does one item. worker: 0 .. workers - 1, for scratch memory of its own. */
typedef void (*spurion_pool_fn)(void *context, int64_t item, int worker);

/* Starts `workers` - 1 threads (the caller of run is the first worker). Gives the pool. */
spurion_status spurion_pool_create(spurion_pool **out, int workers) SPURION_MUST_USE;
void spurion_pool_destroy(spurion_pool *p);

int spurion_pool_workers(const spurion_pool *p);

/* Runs fn for the items 0 .. count - 1, each once, in any order; returns when all are done. Takes no memory. */
void spurion_pool_run(spurion_pool *p, spurion_pool_fn fn, void *context, int64_t count);

#endif

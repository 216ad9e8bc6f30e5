/* An unbounded queue of linked nodes between threads: what is in it is bounded by the bytes that were reserved before (ingest.h), so
 * a push never waits and never fails. Thread: any. Memory: the nodes'. */
#ifndef SPURION_INGEST_QUEUE_H
#define SPURION_INGEST_QUEUE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct spurion_node {
    struct spurion_node *next;
} spurion_node;

typedef struct spurion_queue {
    pthread_mutex_t lock;
    pthread_cond_t some;
    spurion_node *head, **tail;
    bool closed;
} spurion_queue;

void spurion_queue_init(spurion_queue *q);
void spurion_queue_fini(spurion_queue *q);
/* Takes node. After close too: what was begun is finished. */
void spurion_queue_push(spurion_queue *q, spurion_node *node);
/* Takes a list of nodes, linked by next. */
void spurion_queue_push_list(spurion_queue *q, spurion_node *first);
/* Gives everything that waits as a list, in order; at most max nodes. Waits until there is something, until deadline_ms (monotonic,
 * spurion_clock_ms; INT64_MAX: for ever) or until the queue is closed. NULL: nothing came in time, or *closed and empty. */
spurion_node *spurion_queue_take(bool *closed, spurion_queue *q, int max, int64_t deadline_ms);
/* Wakes the taker once, without a node. */
void spurion_queue_wake(spurion_queue *q);
void spurion_queue_close(spurion_queue *q);

#endif

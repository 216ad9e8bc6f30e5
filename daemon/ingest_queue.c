/* See ingest_queue.h. */
#include "daemon/ingest_queue.h"

#include <string.h>

#include "daemon/base/clock.h"

void spurion_queue_init(spurion_queue *q)
{
    pthread_condattr_t attr;

    memset(q, 0, sizeof *q);
    q->tail = &q->head;
    pthread_mutex_init(&q->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&q->some, &attr);
    pthread_condattr_destroy(&attr);
}

void spurion_queue_fini(spurion_queue *q)
{
    pthread_cond_destroy(&q->some);
    pthread_mutex_destroy(&q->lock);
}

void spurion_queue_push_list(spurion_queue *q, spurion_node *first)
{
    spurion_node *last = first;

    if (first == NULL) {
        return;
    }
    while (last->next != NULL) {
        last = last->next;
    }
    pthread_mutex_lock(&q->lock);
    *q->tail = first;
    q->tail = &last->next;
    pthread_cond_signal(&q->some);
    pthread_mutex_unlock(&q->lock);
}

void spurion_queue_push(spurion_queue *q, spurion_node *node)
{
    node->next = NULL;
    spurion_queue_push_list(q, node);
}

static void wait_until(spurion_queue *q, int64_t deadline_ms)
{
    struct timespec at;

    if (deadline_ms == INT64_MAX) {
        pthread_cond_wait(&q->some, &q->lock);
        return;
    }
    at.tv_sec = (time_t)(deadline_ms / 1000);
    at.tv_nsec = (long)(deadline_ms % 1000) * 1000000;
    pthread_cond_timedwait(&q->some, &q->lock, &at);
}

spurion_node *spurion_queue_take(bool *closed, spurion_queue *q, int max, int64_t deadline_ms)
{
    spurion_node *first, *last;

    pthread_mutex_lock(&q->lock);
    if (q->head == NULL && !q->closed && spurion_clock_ms() < deadline_ms) {
        wait_until(q, deadline_ms); /* once: a wake without a node is an answer too */
    }
    first = q->head;
    last = first;
    for (int n = 1; last != NULL && last->next != NULL && n < max; n++) {
        last = last->next;
    }
    if (last != NULL) {
        q->head = last->next;
        last->next = NULL;
        if (q->head == NULL) {
            q->tail = &q->head;
        }
    }
    *closed = q->closed && q->head == NULL;
    pthread_mutex_unlock(&q->lock);
    return first;
}

void spurion_queue_wake(spurion_queue *q)
{
    pthread_mutex_lock(&q->lock);
    pthread_cond_signal(&q->some);
    pthread_mutex_unlock(&q->lock);
}

void spurion_queue_close(spurion_queue *q)
{
    pthread_mutex_lock(&q->lock);
    q->closed = true;
    pthread_cond_broadcast(&q->some);
    pthread_mutex_unlock(&q->lock);
}

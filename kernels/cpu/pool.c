/* Workers take items from an atomic counter. A worker joins a job under the lock and only while the job is open, so a late
 * one can never run an item of a job that is over. Thread: see pool.h. Memory: all of it taken in create. */
#include "kernels/cpu/pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

enum { SPIN_ROUNDS = 400 }; /* about 20 us: longer would steal the core of other processes */

typedef struct pool_thread {
    spurion_pool *pool;
    pthread_t thread;
    int worker;
} pool_thread;

struct spurion_pool {
    pthread_mutex_t lock;
    pthread_cond_t wake; /* a job was opened, or stop */
    pthread_cond_t idle; /* active fell to 0 */
    atomic_uint opened;  /* jobs opened so far; written under the lock, spun on without it */
    atomic_int active;   /* threads inside the job; changed under the lock */
    bool open, stop;
    spurion_pool_fn fn;
    void *context;
    int64_t count;
    atomic_llong next;
    int workers, started;
    pool_thread *threads;
};

static void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static void work(spurion_pool *p, spurion_pool_fn fn, void *context, int64_t count, int worker)
{
    for (;;) {
        int64_t item = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed);
        if (item >= count) {
            return;
        }
        fn(context, item, worker);
    }
}

/* Waits for a job newer than seen. false: stop. */
static bool wait_for_job(spurion_pool *p, unsigned seen)
{
    for (int i = 0; i < SPIN_ROUNDS && atomic_load_explicit(&p->opened, memory_order_relaxed) == seen; i++) {
        cpu_relax();
    }
    pthread_mutex_lock(&p->lock);
    while (!p->stop && !(p->open && atomic_load(&p->opened) != seen)) {
        pthread_cond_wait(&p->wake, &p->lock);
    }
    return !p->stop; /* the lock is held */
}

static void *thread_main(void *arg)
{
    pool_thread *t = arg;
    spurion_pool *p = t->pool;
    unsigned seen = 0;

    while (wait_for_job(p, seen)) {
        spurion_pool_fn fn = p->fn;
        void *context = p->context;
        int64_t count = p->count;
        seen = atomic_load(&p->opened);
        atomic_fetch_add(&p->active, 1);
        pthread_mutex_unlock(&p->lock);
        work(p, fn, context, count, t->worker);
        pthread_mutex_lock(&p->lock);
        if (atomic_fetch_sub(&p->active, 1) == 1) {
            pthread_cond_signal(&p->idle);
        }
        pthread_mutex_unlock(&p->lock);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

/* Workers take no signals: those belong to the main thread. */
static int start_thread(pool_thread *t)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&t->thread, NULL, thread_main, t);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc == 0) {
        (void)pthread_setname_np(t->thread, "worker");
    }
    return rc;
}

spurion_status spurion_pool_create(spurion_pool **out, int workers)
{
    *out = NULL;
    if (workers < 1) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "worker count: expected at least 1, found %d", workers);
    }
    spurion_pool *p = calloc(1, sizeof *p);
    if (p == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a pool of %d workers", workers);
    }
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->idle, NULL);
    p->workers = workers;
    p->threads = calloc((size_t)workers, sizeof *p->threads);
    if (p->threads == NULL) {
        spurion_pool_destroy(p);
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a pool of %d workers", workers);
    }
    for (int i = 1; i < workers; i++) {
        pool_thread *t = &p->threads[p->started];
        t->pool = p;
        t->worker = i;
        if (start_thread(t) != 0) {
            spurion_pool_destroy(p);
            return spurion_error(SPURION_RESOURCE_EXHAUSTED, "could not start worker %d of %d", i + 1, workers);
        }
        p->started++;
    }
    *out = p;
    return spurion_ok();
}

void spurion_pool_destroy(spurion_pool *p)
{
    if (p == NULL) {
        return;
    }
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < p->started; i++) {
        pthread_join(p->threads[i].thread, NULL);
    }
    pthread_cond_destroy(&p->idle);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    free(p->threads);
    free(p);
}

int spurion_pool_workers(const spurion_pool *p)
{
    return p->workers;
}

static void run_alone(spurion_pool_fn fn, void *context, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        fn(context, i, 0);
    }
}

void spurion_pool_run(spurion_pool *p, spurion_pool_fn fn, void *context, int64_t count)
{
    if (p->started == 0 || count <= 1) {
        run_alone(fn, context, count);
        return;
    }
    pthread_mutex_lock(&p->lock);
    p->fn = fn;
    p->context = context;
    p->count = count;
    p->open = true;
    atomic_store(&p->next, 0);
    atomic_fetch_add(&p->opened, 1);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);

    work(p, fn, context, count, 0);

    for (int i = 0; i < SPIN_ROUNDS && atomic_load_explicit(&p->active, memory_order_relaxed) != 0; i++) {
        cpu_relax();
    }
    pthread_mutex_lock(&p->lock);
    p->open = false; /* whoever has not joined by now stays out */
    while (atomic_load(&p->active) != 0) {
        pthread_cond_wait(&p->idle, &p->lock);
    }
    pthread_mutex_unlock(&p->lock);
}

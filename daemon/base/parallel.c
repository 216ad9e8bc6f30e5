/* See parallel.h. Parts are handed out by a counter; threads live as long as the call. */
#include "daemon/base/parallel.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

typedef struct parts {
    spurion_parallel_fn work;
    void *context;
    int count;
    atomic_int next;
} parts;

static void *run(void *arg)
{
    parts *p = arg;
    for (int i = atomic_fetch_add(&p->next, 1); i < p->count; i = atomic_fetch_add(&p->next, 1)) {
        p->work(p->context, i);
    }
    return NULL;
}

static int cpu_count(void)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

void spurion_parallel(spurion_parallel_fn work, void *context, int count)
{
    parts p = {.work = work, .context = context, .count = count};
    pthread_t threads[SPURION_PARALLEL_MAX];
    int cpus = count > 1 ? cpu_count() : 1, wanted = count < cpus ? count : cpus, started = 1;

    wanted = wanted < SPURION_PARALLEL_MAX ? wanted : SPURION_PARALLEL_MAX;
    while (started < wanted && pthread_create(&threads[started], NULL, run, &p) == 0) {
        started++;
    }
    (void)run(&p);
    for (int i = 1; i < started; i++) {
        pthread_join(threads[i], NULL);
    }
}

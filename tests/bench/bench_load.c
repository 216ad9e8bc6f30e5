/* Load on a daemon through libspurion: groups of random token ids, scored.
 *   bench_load RPC closed|poisson CONNECTIONS GROUPS RATE PROMPT COMPLETION GROUP VOCAB SEED RUN
 * closed: every connection sends its next group when it has its answer. poisson: groups arrive at exponential intervals, RATE a second; a
 * free connection takes the next one, and its latency counts from its arrival, so that waiting for a connection counts too.
 * Prints one JSON object: for each group when it arrived and when its verdicts were there, in seconds since the start. */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "spurion/client.h"

enum { CONNECTIONS_MAX = 200, GROUP_MAX = 64, TIMEOUT_MS = 600000 };

typedef struct load {
    spurion_client_options options;
    pthread_mutex_t lock;
    pthread_barrier_t barrier; /* the connections and main: the clock starts when all are connected */
    int next, groups, refused;
    double start, *arrival, *done; /* (groups) seconds since start; closed: arrival is when it was sent */
    bool closed;
    int prompt, completion, group, vocab;
    uint64_t seed;
    const char *run;
} load;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* splitmix64 (Steele, Lea, Flood 2014). */
static uint64_t random_next(uint64_t *s)
{
    uint64_t z = *s += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static void wait_until(double when)
{
    struct timespec t = {(time_t)when, (long)((when - floor(when)) * 1e9)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) != 0) {
    }
}

/* Group g: its rollouts share a prompt. ids: room for prompt + group * completion. names: (group + 1) of 24 bytes. */
static void group_make(spurion_rollout *r, int32_t *ids, char (*names)[24], const load *l, int g)
{
    uint64_t s = l->seed * UINT64_C(1000003) + (uint64_t)g;
    int count = l->prompt + l->group * l->completion;

    for (int i = 0; i < count; i++) {
        ids[i] = 3 + (int32_t)(random_next(&s) % (uint64_t)(l->vocab - 3));
    }
    (void)snprintf(names[l->group], sizeof names[0], "g%d", g);
    for (int i = 0; i < l->group; i++) {
        (void)snprintf(names[i], sizeof names[0], "%d", i);
        memset(&r[i], 0, sizeof r[i]);
        r[i].run = (spurion_bytes){l->run, strlen(l->run)};
        r[i].group = (spurion_bytes){names[l->group], strlen(names[l->group])};
        r[i].id = (spurion_bytes){names[i], strlen(names[i])};
        r[i].group_size = l->group;
        r[i].prompt_ids = ids;
        r[i].prompt_id_count = l->prompt;
        r[i].completion_ids = ids + l->prompt + i * l->completion;
        r[i].completion_id_count = l->completion;
    }
}

static int take(load *l)
{
    pthread_mutex_lock(&l->lock);
    int g = l->next < l->groups ? l->next++ : -1;
    pthread_mutex_unlock(&l->lock);
    return g;
}

static void score(load *l, spurion_client *c, const spurion_rollout *rollouts, int g)
{
    spurion_verdicts v;
    int refused = 0;

    if (spurion_client_score(c, &v, rollouts, l->group, false, TIMEOUT_MS) != SPURION_OK) {
        fprintf(stderr, "bench_load: %s\n", spurion_client_error(c));
        exit(1);
    }
    l->done[g] = now() - l->start;
    for (int i = 0; i < v.count; i++) {
        refused += v.verdicts[i].code != SPURION_OK;
    }
    pthread_mutex_lock(&l->lock);
    l->refused += refused;
    pthread_mutex_unlock(&l->lock);
}

static void *connection(void *context)
{
    load *l = context;
    spurion_rollout rollouts[GROUP_MAX];
    char names[GROUP_MAX + 1][24];
    int32_t *ids = malloc(((size_t)l->prompt + (size_t)l->group * (size_t)l->completion) * sizeof *ids);
    spurion_client *c;
    spurion_hello_reply hello;

    if (!ids || spurion_client_open(&c, &l->options) != SPURION_OK || spurion_client_hello(c, &hello, TIMEOUT_MS) != SPURION_OK) {
        fprintf(stderr, "bench_load: no connection: %s\n", ids ? spurion_client_error(c) : "no memory");
        exit(1);
    }
    pthread_barrier_wait(&l->barrier);
    pthread_barrier_wait(&l->barrier); /* l->start is set between the two */
    for (int g = take(l); g >= 0; g = take(l)) {
        group_make(rollouts, ids, names, l, g);
        if (l->closed) {
            l->arrival[g] = now() - l->start;
        } else {
            wait_until(l->start + l->arrival[g]);
        }
        score(l, c, rollouts, g);
    }
    spurion_client_close(c);
    free(ids);
    return NULL;
}

static void report(const load *l)
{
    printf("{\"groups\":%d,\"rollouts\":%d,\"refused\":%d,\"arrival\":[", l->groups, l->groups * l->group, l->refused);
    for (int g = 0; g < l->groups; g++) {
        printf("%s%.6f", g ? "," : "", l->arrival[g]);
    }
    printf("],\"done\":[");
    for (int g = 0; g < l->groups; g++) {
        printf("%s%.6f", g ? "," : "", l->done[g]);
    }
    printf("]}\n");
}

int main(int argc, char **argv)
{
    load l = {.lock = PTHREAD_MUTEX_INITIALIZER};
    pthread_t threads[CONNECTIONS_MAX];
    int count = argc == 12 ? atoi(argv[3]) : 0;
    double rate = argc == 12 ? atof(argv[5]) : 0, at = 0;

    if (argc == 12) {
        l.options.rpc = argv[1];
        l.closed = strcmp(argv[2], "closed") == 0;
        l.groups = atoi(argv[4]), l.prompt = atoi(argv[6]), l.completion = atoi(argv[7]), l.group = atoi(argv[8]), l.vocab = atoi(argv[9]);
        l.seed = strtoull(argv[10], NULL, 10);
        l.run = argv[11];
    }
    if (count < 1 || count > CONNECTIONS_MAX || l.groups < 1 || l.prompt < 1 || l.completion < 1 || l.group < 1 || l.group > GROUP_MAX ||
        l.vocab < 4 || (!l.closed && !(rate > 0))) {
        fprintf(stderr, "usage: bench_load RPC closed|poisson CONNECTIONS GROUPS RATE PROMPT COMPLETION GROUP VOCAB SEED RUN\n");
        return 64;
    }
    l.arrival = calloc((size_t)l.groups, sizeof *l.arrival);
    l.done = calloc((size_t)l.groups, sizeof *l.done);
    if (!l.arrival || !l.done || pthread_barrier_init(&l.barrier, NULL, (unsigned)count + 1) != 0) {
        return 71;
    }
    for (int g = 0; g < l.groups && !l.closed; g++) {
        uint64_t s = l.seed ^ (UINT64_C(0xa5a5) << 40) ^ (uint64_t)g;
        at -= log(((double)(random_next(&s) >> 11) + 0.5) / 9007199254740992.0) / rate;
        l.arrival[g] = at;
    }
    for (int i = 0; i < count; i++) {
        if (pthread_create(&threads[i], NULL, connection, &l) != 0) {
            return 71;
        }
    }
    pthread_barrier_wait(&l.barrier);
    l.start = now();
    pthread_barrier_wait(&l.barrier);
    for (int i = 0; i < count; i++) {
        pthread_join(threads[i], NULL);
    }
    report(&l);
    return 0;
}

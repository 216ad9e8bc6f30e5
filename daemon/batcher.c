/* See batcher.h. One lock; open groups in a small hash table, whole groups in a first-in first-out list. */
#include "daemon/batcher.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/check.h"
#include "daemon/base/clock.h"
#include "spurion/limits.h"

#define GROUPS_OPEN_MAX 8192
#define BUCKETS 8192
#define BEFORE_MAX 65536      /* groups that are remembered, by a hash of 64 bits each; power of two */

/* Jobs of one group part; jobs are linked through their own list because a job is in one group at a time. */
typedef struct group {
    struct group *next;       /* free list, or whole list */
    struct group *chain;      /* same bucket */
    struct group *older, *newer; /* open groups by age */
    uint64_t hash;
    char names[2 * SPURION_NAME_BYTES_MAX];
    size_t run_size, group_size_bytes;
    int64_t step, deadline_ms;
    spurion_job **jobs;
    int count, room;
    int came, wanted;         /* members that came, members it says it has (0: not said) */
    bool split, touched;      /* touched: by the message that is being added */
    struct group *touched_next;
} group;

struct spurion_batcher {
    spurion_batcher_options options;
    pthread_mutex_t lock;
    pthread_cond_t some;
    group *groups;            /* the memory of all */
    group *free, *buckets[BUCKETS];
    group *oldest, *newest;   /* open */
    group *whole, **whole_tail;
    group *touched;
    uint64_t *before;         /* hashes of groups that were whole, a table that forgets */
    int64_t job_count;
    int32_t number;
    bool draining;
    group *carried;           /* taken off the whole list, did not fit into the last micro-batch; engine thread only */
    int carried_rows;
};

static uint64_t hash_more(uint64_t h, const void *data, size_t size)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < size; i++) {
        h = (h ^ p[i]) * UINT64_C(0x100000001b3);
    }
    return h ^ h >> 31;
}

static uint64_t hash_of(const spurion_rollout *r)
{
    uint64_t h = hash_more(UINT64_C(0xcbf29ce484222325), r->run.data, r->run.size);
    h = hash_more(h, &r->step, sizeof r->step);
    h = hash_more(h, r->group.data, r->group.size);
    return h != 0 ? h : 1;
}

spurion_status spurion_batcher_create(spurion_batcher **out, const spurion_batcher_options *options)
{
    spurion_batcher *b = calloc(1, sizeof *b);
    pthread_condattr_t attr;

    *out = NULL;
    if (b != NULL) {
        b->groups = calloc(GROUPS_OPEN_MAX, sizeof *b->groups);
        b->before = calloc(BEFORE_MAX, sizeof *b->before);
    }
    if (b == NULL || b->groups == NULL || b->before == NULL) {
        spurion_batcher_destroy(b);
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "batcher: no memory");
    }
    b->options = *options;
    b->whole_tail = &b->whole;
    for (int i = GROUPS_OPEN_MAX - 1; i >= 0; i--) {
        b->groups[i].next = b->free;
        b->free = &b->groups[i];
    }
    pthread_mutex_init(&b->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&b->some, &attr);
    pthread_condattr_destroy(&attr);
    *out = b;
    return spurion_ok();
}

void spurion_batcher_destroy(spurion_batcher *b)
{
    if (b == NULL) {
        return;
    }
    for (int i = 0; b->groups != NULL && i < GROUPS_OPEN_MAX; i++) {
        free(b->groups[i].jobs);
    }
    free(b->groups);
    free(b->before);
    free(b);
}

/* ---- groups, under the lock ---- */

static bool is_group(const group *g, uint64_t hash, const spurion_rollout *r)
{
    return g->hash == hash && g->step == r->step && g->run_size == r->run.size && g->group_size_bytes == r->group.size &&
           memcmp(g->names, r->run.data, r->run.size) == 0 && memcmp(g->names + SPURION_NAME_BYTES_MAX, r->group.data, r->group.size) == 0;
}

static group *find(spurion_batcher *b, uint64_t hash, const spurion_rollout *r)
{
    group *g = b->buckets[hash % BUCKETS];
    while (g != NULL && !is_group(g, hash, r)) {
        g = g->chain;
    }
    return g;
}

static group *begin(spurion_batcher *b, uint64_t hash, const spurion_rollout *r, bool split)
{
    group *g = b->free;

    if (g == NULL) {
        return NULL;
    }
    SPURION_ASSERT(r->run.size <= SPURION_NAME_BYTES_MAX && r->group.size <= SPURION_NAME_BYTES_MAX);
    b->free = g->next;
    g->next = NULL;
    g->hash = hash;
    g->step = r->step;
    memcpy(g->names, r->run.data, g->run_size = r->run.size);
    memcpy(g->names + SPURION_NAME_BYTES_MAX, r->group.data, g->group_size_bytes = r->group.size);
    g->count = g->came = g->wanted = 0;
    g->split = split;
    g->touched = false;
    g->deadline_ms = spurion_clock_ms() + b->options.group_wait_ms;
    g->chain = b->buckets[hash % BUCKETS];
    b->buckets[hash % BUCKETS] = g;
    g->older = b->newest;
    g->newer = NULL;
    if (b->newest != NULL) {
        b->newest->newer = g;
    } else {
        b->oldest = g;
    }
    b->newest = g;
    return g;
}

static void release(spurion_batcher *b, group *g)
{
    g->count = 0;
    if (g->room > 64) { /* a huge group's array is not kept */
        free(g->jobs);
        g->jobs = NULL;
        g->room = 0;
    }
    g->next = b->free;
    b->free = g;
}

/* Takes g out of the open ones: it is whole, or has nothing to judge. */
static void finish(spurion_batcher *b, group *g)
{
    group **at = &b->buckets[g->hash % BUCKETS];

    while (*at != g) {
        at = &(*at)->chain;
    }
    *at = g->chain;
    if (g->older != NULL) {
        g->older->newer = g->newer;
    } else {
        b->oldest = g->newer;
    }
    if (g->newer != NULL) {
        g->newer->older = g->older;
    } else {
        b->newest = g->older;
    }
    for (group **t = &b->touched; *t != NULL; t = &(*t)->touched_next) {
        if (*t == g) {
            *t = g->touched_next;
            break;
        }
    }
    b->before[g->hash & (BEFORE_MAX - 1)] = g->hash;
    if (g->count == 0) {
        release(b, g);
        return;
    }
    g->next = NULL;
    *b->whole_tail = g;
    b->whole_tail = &g->next;
    pthread_cond_signal(&b->some);
}

static void touch(spurion_batcher *b, group *g)
{
    if (!g->touched) {
        g->touched = true;
        g->touched_next = b->touched;
        b->touched = g;
    }
}

/* One member more; the group may be whole now. */
static void came(spurion_batcher *b, group *g, const spurion_rollout *r)
{
    g->came++;
    g->wanted = r->group_size > g->wanted ? r->group_size : g->wanted;
    touch(b, g);
    if ((!g->split && g->wanted > 0 && g->came >= g->wanted) || g->count >= SPURION_BATCH_ROLLOUTS_MAX) {
        finish(b, g);
    }
}

/* Finds the open group of r or begins it; takes the lock for good, on return it is held. NULL: no room. */
static group *find_or_begin(spurion_batcher *b, const spurion_rollout *r)
{
    uint64_t hash = hash_of(r);
    bool split;
    group *g;

    pthread_mutex_lock(&b->lock);
    g = find(b, hash, r);
    if (g != NULL) {
        return g;
    }
    split = b->before[hash & (BEFORE_MAX - 1)] == hash;
    if (!split && b->options.came_before != NULL) { /* only the intake begins groups, so nobody else can in between */
        pthread_mutex_unlock(&b->lock);
        split = b->options.came_before(b->options.context, r);
        pthread_mutex_lock(&b->lock);
    }
    return begin(b, hash, r, split);
}

/* ---- intake ---- */

spurion_status spurion_batcher_add(spurion_batcher *b, spurion_job *job)
{
    spurion_status st = spurion_ok();
    group *g = find_or_begin(b, &job->rollout);

    if (g == NULL) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "batcher: expected at most %d open groups, found more", GROUPS_OPEN_MAX);
        goto out;
    }
    if (g->count == g->room) {
        int room = g->room == 0 ? 8 : g->room * 2;
        spurion_job **p = realloc(g->jobs, (size_t)room * sizeof *p);
        if (p == NULL) {
            st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "batcher: no memory");
            goto out;
        }
        g->jobs = p;
        g->room = room;
    }
    g->jobs[g->count++] = job;
    b->job_count++;
    came(b, g, &job->rollout);
out:
    pthread_mutex_unlock(&b->lock);
    return st;
}

void spurion_batcher_skip(spurion_batcher *b, const spurion_rollout *rollout)
{
    group *g;

    if (rollout->run.data == NULL || rollout->group.data == NULL || rollout->step < 0 || rollout->group_size == 0) {
        return; /* nobody waits for it */
    }
    g = find_or_begin(b, rollout);
    if (g != NULL) {
        came(b, g, rollout);
    }
    pthread_mutex_unlock(&b->lock);
}

void spurion_batcher_message_end(spurion_batcher *b)
{
    pthread_mutex_lock(&b->lock);
    while (b->touched != NULL) {
        group *g = b->touched;
        b->touched = g->touched_next;
        g->touched = false;
        if (g->wanted == 0 || g->split || b->draining) {
            finish(b, g);
        }
    }
    pthread_cond_signal(&b->some); /* a group that stays open has a deadline to be watched */
    pthread_mutex_unlock(&b->lock);
}

void spurion_batcher_drain(spurion_batcher *b)
{
    pthread_mutex_lock(&b->lock);
    b->draining = true;
    pthread_cond_broadcast(&b->some);
    pthread_mutex_unlock(&b->lock);
}

int64_t spurion_batcher_job_count(spurion_batcher *b)
{
    int64_t count;

    pthread_mutex_lock(&b->lock);
    count = b->job_count;
    pthread_mutex_unlock(&b->lock);
    return count;
}

/* ---- engine ---- */

static void finish_due(spurion_batcher *b, int64_t now_ms)
{
    while (b->oldest != NULL && (b->draining || b->oldest->deadline_ms <= now_ms)) {
        finish(b, b->oldest);
    }
}

static void wait_until(spurion_batcher *b, int64_t deadline_ms)
{
    struct timespec at;

    if (b->oldest != NULL && b->oldest->deadline_ms < deadline_ms) {
        deadline_ms = b->oldest->deadline_ms;
    }
    if (deadline_ms == INT64_MAX) {
        pthread_cond_wait(&b->some, &b->lock);
        return;
    }
    at.tv_sec = (time_t)(deadline_ms / 1000);
    at.tv_nsec = (long)(deadline_ms % 1000) * 1000000;
    pthread_cond_timedwait(&b->some, &b->lock, &at);
}

/* Next whole group, waiting until deadline_ms; NULL: none came. Under the lock. */
static group *next_whole(spurion_batcher *b, int64_t deadline_ms)
{
    group *g;

    for (;;) {
        int64_t now = spurion_clock_ms();
        finish_due(b, now);
        if (b->whole != NULL || now >= deadline_ms || b->draining) {
            break;
        }
        wait_until(b, deadline_ms);
    }
    g = b->whole;
    if (g != NULL) {
        b->whole = g->next;
        if (b->whole == NULL) {
            b->whole_tail = &b->whole;
        }
    }
    return g;
}

/* Hands the jobs of g on and frees it. */
static void give(spurion_job **jobs, int *count, spurion_batcher *b, group *g)
{
    int32_t number = b->number;

    b->number = b->number == INT32_MAX ? 0 : b->number + 1;
    for (int i = 0; i < g->count; i++) {
        g->jobs[i]->group_number = number;
        g->jobs[i]->group_split = g->split;
        jobs[(*count)++] = g->jobs[i];
    }
    b->job_count -= g->count;
    release(b, g);
}

spurion_status spurion_batcher_take(spurion_job **jobs, int *job_count, spurion_batcher *b, int job_max)
{
    int64_t deadline_ms = INT64_MAX;
    int rows = 0;

    SPURION_ASSERT(job_max >= SPURION_BATCH_ROLLOUTS_MAX);
    *job_count = 0;
    pthread_mutex_lock(&b->lock);
    for (;;) {
        group *g = b->carried;
        int more = b->carried_rows;
        b->carried = NULL;
        if (g == NULL) {
            g = next_whole(b, deadline_ms);
            if (g == NULL) {
                break;
            }
            pthread_mutex_unlock(&b->lock); /* g is ours alone now */
            more = b->options.rows(b->options.context, g->jobs, g->count);
            pthread_mutex_lock(&b->lock);
        }
        if (*job_count > 0 && (rows + more > b->options.rows_max || *job_count + g->count > job_max)) {
            b->carried = g;
            b->carried_rows = more;
            break;
        }
        give(jobs, job_count, b, g);
        rows += more;
        if (rows >= b->options.rows_max) {
            break;
        }
        if (deadline_ms == INT64_MAX) {
            deadline_ms = spurion_clock_ms() + b->options.batch_wait_ms;
        }
    }
    pthread_mutex_unlock(&b->lock);
    return *job_count > 0 ? spurion_ok() : spurion_error(SPURION_CANCELLED, "batcher: drained");
}

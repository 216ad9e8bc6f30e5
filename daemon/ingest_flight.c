/* See ingest_flight.h. A chained hash table under one lock, and a list from oldest to newest. */
#include "daemon/ingest_flight.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/check.h"

#define BUCKETS 16384 /* power of two; some thousands are in flight at most */

struct spurion_flights {
    pthread_mutex_t lock;
    spurion_flight_entry *buckets[BUCKETS];
    spurion_flight_entry *oldest, *newest;
    int64_t count;
};

static uint64_t hash_bytes(uint64_t h, const void *data, size_t size)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < size; i++) {
        h = (h ^ p[i]) * UINT64_C(0x100000001b3); /* FNV-1a */
    }
    return h ^ (h >> 29);
}

static uint64_t hash_key(const spurion_key *k)
{
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    h = hash_bytes(h, k->run.data, k->run.size);
    h = hash_bytes(h, &k->step, sizeof k->step);
    h = hash_bytes(h, k->group.data, k->group.size);
    h = hash_bytes(h, k->id.data, k->id.size);
    return hash_bytes(h, &k->attempt, sizeof k->attempt);
}

static bool bytes_equal(spurion_bytes a, spurion_bytes b)
{
    return a.size == b.size && memcmp(a.data, b.data, a.size) == 0;
}

static bool key_equal(const spurion_key *a, const spurion_key *b)
{
    return a->step == b->step && a->attempt == b->attempt && bytes_equal(a->run, b->run) && bytes_equal(a->group, b->group) &&
           bytes_equal(a->id, b->id);
}

spurion_status spurion_flights_create(spurion_flights **out)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "flights: no memory");
    }
    pthread_mutex_init(&(*out)->lock, NULL);
    return spurion_ok();
}

void spurion_flights_destroy(spurion_flights *f)
{
    if (f != NULL) {
        pthread_mutex_destroy(&f->lock);
        free(f);
    }
}

static void link_newest(spurion_flights *f, spurion_flight_entry *e)
{
    e->older = f->newest;
    e->newer = NULL;
    if (f->newest != NULL) {
        f->newest->newer = e;
    } else {
        f->oldest = e;
    }
    f->newest = e;
    f->count++;
}

spurion_enter spurion_flights_enter(spurion_flights *f, spurion_flight_entry *entry)
{
    spurion_enter result = SPURION_ENTERED;
    spurion_flight_entry **bucket, *e;

    entry->hash = hash_key(&entry->key);
    entry->waiters = NULL;
    pthread_mutex_lock(&f->lock);
    bucket = &f->buckets[entry->hash & (BUCKETS - 1)];
    for (e = *bucket; e != NULL && !(e->hash == entry->hash && key_equal(&e->key, &entry->key)); e = e->chain) {
    }
    if (e == NULL) {
        entry->chain = *bucket;
        *bucket = entry;
        link_newest(f, entry);
    } else if (memcmp(e->digest, entry->digest, sizeof e->digest) != 0) {
        result = SPURION_OCCUPIED;
    } else {
        while (e->waiters != NULL) {
            e = e->waiters;
        }
        e->waiters = entry;
        result = SPURION_WAITING;
    }
    pthread_mutex_unlock(&f->lock);
    return result;
}

spurion_flight_entry *spurion_flights_leave(spurion_flights *f, spurion_flight_entry *entry)
{
    spurion_flight_entry **at, *waiters;

    pthread_mutex_lock(&f->lock);
    at = &f->buckets[entry->hash & (BUCKETS - 1)];
    while (*at != NULL && *at != entry) {
        at = &(*at)->chain;
    }
    SPURION_ASSERT(*at == entry);
    *at = entry->chain;
    if (entry->older != NULL) {
        entry->older->newer = entry->newer;
    } else {
        f->oldest = entry->newer;
    }
    if (entry->newer != NULL) {
        entry->newer->older = entry->older;
    } else {
        f->newest = entry->older;
    }
    f->count--;
    waiters = entry->waiters;
    entry->waiters = NULL;
    pthread_mutex_unlock(&f->lock);
    return waiters;
}

int64_t spurion_flights_count(spurion_flights *f)
{
    int64_t count;

    pthread_mutex_lock(&f->lock);
    count = f->count;
    pthread_mutex_unlock(&f->lock);
    return count;
}

bool spurion_flights_has_step(spurion_flights *f, spurion_bytes run, int64_t step)
{
    bool found = false;

    pthread_mutex_lock(&f->lock);
    for (const spurion_flight_entry *e = f->oldest; e != NULL && !found; e = e->newer) {
        found = e->key.step <= step && bytes_equal(e->key.run, run);
    }
    pthread_mutex_unlock(&f->lock);
    return found;
}

static bool copy_bytes(spurion_bytes *out, const spurion_memory *m, spurion_bytes in)
{
    char *p = m->take(m->context, in.size + 1);
    if (p == NULL) {
        return false;
    }
    memcpy(p, in.data, in.size);
    p[in.size] = '\0';
    out->data = p;
    out->size = in.size;
    return true;
}

spurion_status spurion_flights_list(spurion_flight *out, int32_t *count, spurion_flights *f, const spurion_memory *m, int32_t max,
                                    int64_t now_ms)
{
    static const char *const stages[] = {"queued", "grouping", "judging", "storing"};
    bool ok = true;
    int32_t n = 0;

    pthread_mutex_lock(&f->lock);
    for (const spurion_flight_entry *e = f->oldest; ok && e != NULL && n < max; e = e->newer, n++) {
        out[n].step = e->key.step;
        out[n].age_ms = now_ms > e->since_ms ? (uint64_t)(now_ms - e->since_ms) : 0;
        out[n].stage = spurion_bytes_of(stages[atomic_load(&e->stage)]);
        ok = copy_bytes(&out[n].run, m, e->key.run) && copy_bytes(&out[n].group, m, e->key.group) && copy_bytes(&out[n].id, m, e->key.id);
    }
    pthread_mutex_unlock(&f->lock);
    *count = ok ? n : 0;
    return ok ? spurion_ok() : spurion_error(SPURION_RESOURCE_EXHAUSTED, "flights: no memory for the list");
}

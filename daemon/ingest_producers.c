/* See ingest_producers.h. */
#include "daemon/ingest_producers.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/check.h"
#include "daemon/base/clock.h"
#include "daemon/ingest_ranges.h"

#define BUCKETS 1024
#define MARK_VERSION 1

/* What a stored, not yet contiguous message said about steps. */
typedef struct note {
    uint64_t sequence;
    int64_t seen, ended;
} note;

/* The part of a producer that a mark holds. */
typedef struct mark {
    spurion_ranges stored;
    note *notes;          /* by sequence, behind the contiguous part */
    int32_t note_count, note_room;
    int64_t seen, ended;
    uint64_t lost_messages, lost_rollouts;
    uint64_t closing;     /* 1 + last sequence when the producer said goodbye, 0: it did not */
} mark;

struct spurion_producer {
    spurion_producer *chain;
    char run[SPURION_NAME_BYTES_MAX + 1], name[SPURION_NAME_BYTES_MAX + 1];
    size_t run_size, name_size;
    uint64_t epoch, highest;
    int64_t used_ms;
    int pins;
    spurion_ranges received; /* pending or stored */
    mark durable, staged;
};

struct spurion_producers {
    pthread_mutex_t lock;
    spurion_producer *buckets[BUCKETS];
    int32_t count;
    spurion_producers_load load;
    void *context;
};

/* ---- marks ---- */

static void mark_init(mark *m)
{
    memset(m, 0, sizeof *m);
    spurion_ranges_init(&m->stored);
    m->seen = m->ended = -1;
}

static void mark_fini(mark *m)
{
    spurion_ranges_fini(&m->stored);
    free(m->notes);
}

static bool notes_room(mark *m, int32_t count)
{
    if (count > m->note_room) {
        int32_t room = count + count / 2 + 8;
        note *p = realloc(m->notes, (size_t)room * sizeof *p);
        if (p == NULL) {
            return false;
        }
        m->notes = p;
        m->note_room = room;
    }
    return true;
}

static bool mark_copy(mark *out, const mark *in)
{
    if (!notes_room(out, in->note_count) || !spurion_ranges_copy(&out->stored, &in->stored)) {
        return false;
    }
    if (in->note_count > 0) {
        memcpy(out->notes, in->notes, (size_t)in->note_count * sizeof *in->notes);
    }
    out->note_count = in->note_count;
    out->seen = in->seen;
    out->ended = in->ended;
    out->lost_messages = in->lost_messages;
    out->lost_rollouts = in->lost_rollouts;
    out->closing = in->closing;
    return true;
}

/* Moves the notes that are contiguous now into the word. */
static void mark_advance(mark *m)
{
    uint64_t through = spurion_ranges_through(&m->stored);
    int32_t n = 0;

    while (n < m->note_count && m->notes[n].sequence <= through) {
        m->seen = m->notes[n].seen > m->seen ? m->notes[n].seen : m->seen;
        m->ended = m->notes[n].ended > m->ended ? m->notes[n].ended : m->ended;
        n++;
    }
    if (n > 0) {
        memmove(m->notes, m->notes + n, (size_t)(m->note_count - n) * sizeof *m->notes);
        m->note_count -= n;
    }
}

static void mark_note(mark *m, uint64_t sequence, int64_t seen, int64_t ended)
{
    int32_t at = m->note_count;

    if (!notes_room(m, m->note_count + 1)) {
        return; /* the step then closes by its time-out */
    }
    while (at > 0 && m->notes[at - 1].sequence > sequence) {
        at--;
    }
    memmove(m->notes + at + 1, m->notes + at, (size_t)(m->note_count - at) * sizeof *m->notes);
    m->notes[at].sequence = sequence;
    m->notes[at].seen = seen;
    m->notes[at].ended = ended;
    m->note_count++;
}

static void mark_word(spurion_word *out, const mark *m)
{
    out->seen = m->seen;
    out->ended = m->ended;
    out->closed = m->closing != 0 && spurion_ranges_through(&m->stored) >= m->closing - 1;
}

/* ---- the bytes of a mark: little-endian words, a version first ---- */

static void put(unsigned char **at, uint64_t v)
{
    for (int i = 0; i < 8; i++) {
        *(*at)++ = (unsigned char)(v >> (8 * i));
    }
}

static uint64_t get(const unsigned char **at)
{
    uint64_t v = 0;
    for (int i = 0; i < 8; i++) {
        v |= (uint64_t)*(*at)++ << (8 * i);
    }
    return v;
}

#define MARK_WORDS_FIXED 8

static spurion_status mark_encode(spurion_bytes *out, const spurion_memory *m, const mark *k)
{
    size_t words = MARK_WORDS_FIXED + 2 * (size_t)k->stored.count + 3 * (size_t)k->note_count;
    unsigned char *data = m->take(m->context, words * 8), *at = data;

    if (data == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "mark: no memory for %zu words", words);
    }
    put(&at, MARK_VERSION);
    put(&at, (uint64_t)k->seen);
    put(&at, (uint64_t)k->ended);
    put(&at, k->lost_messages);
    put(&at, k->lost_rollouts);
    put(&at, k->closing);
    put(&at, (uint64_t)k->stored.count);
    put(&at, (uint64_t)k->note_count);
    for (int32_t i = 0; i < k->stored.count; i++) {
        put(&at, k->stored.ranges[i].first);
        put(&at, k->stored.ranges[i].last);
    }
    for (int32_t i = 0; i < k->note_count; i++) {
        put(&at, k->notes[i].sequence);
        put(&at, (uint64_t)k->notes[i].seen);
        put(&at, (uint64_t)k->notes[i].ended);
    }
    out->data = (const char *)data;
    out->size = words * 8;
    return spurion_ok();
}

static spurion_status mark_decode(mark *k, spurion_bytes in)
{
    const unsigned char *at = (const unsigned char *)in.data;
    uint64_t ranges, notes;

    if (in.size < MARK_WORDS_FIXED * 8 || in.size % 8 != 0 || get(&at) != MARK_VERSION) {
        return spurion_error(SPURION_DATA_LOSS, "mark: expected version %d, found something else (%zu bytes)", MARK_VERSION, in.size);
    }
    k->seen = (int64_t)get(&at);
    k->ended = (int64_t)get(&at);
    k->lost_messages = get(&at);
    k->lost_rollouts = get(&at);
    k->closing = get(&at);
    ranges = get(&at);
    notes = get(&at);
    if (ranges > in.size || notes > in.size || in.size / 8 != MARK_WORDS_FIXED + 2 * ranges + 3 * notes) {
        return spurion_error(SPURION_DATA_LOSS, "mark: expected as many words as it counts, found %zu", in.size / 8);
    }
    for (uint64_t i = 0; i < ranges; i++) {
        uint64_t first = get(&at), last = get(&at);
        if (first == 0 || last < first || !spurion_ranges_add(NULL, &k->stored, first, last)) {
            return spurion_error(SPURION_DATA_LOSS, "mark: expected ranges of sequences, found others");
        }
    }
    for (uint64_t i = 0; i < notes; i++) {
        uint64_t sequence = get(&at);
        int64_t seen = (int64_t)get(&at), ended = (int64_t)get(&at);
        mark_note(k, sequence, seen, ended);
    }
    return spurion_ok();
}

spurion_status spurion_producers_word_of(spurion_word *out, spurion_bytes in)
{
    spurion_status st;
    mark m;

    mark_init(&m);
    st = mark_decode(&m, in);
    mark_word(out, &m);
    mark_fini(&m);
    return st;
}

/* ---- the table ---- */

static spurion_bytes bytes_of(const char *data, size_t size)
{
    spurion_bytes b = {data, size};
    return b;
}

spurion_bytes spurion_producer_run(const spurion_producer *p)
{
    return bytes_of(p->run, p->run_size);
}

spurion_bytes spurion_producer_name(const spurion_producer *p)
{
    return bytes_of(p->name, p->name_size);
}

uint64_t spurion_producer_epoch(const spurion_producer *p)
{
    return p->epoch;
}

static uint32_t bucket_of(spurion_bytes run, spurion_bytes name, uint64_t epoch)
{
    uint64_t h = UINT64_C(0xcbf29ce484222325) ^ epoch;
    for (size_t i = 0; i < run.size; i++) {
        h = (h ^ (unsigned char)run.data[i]) * UINT64_C(0x100000001b3);
    }
    h ^= 0xff;
    for (size_t i = 0; i < name.size; i++) {
        h = (h ^ (unsigned char)name.data[i]) * UINT64_C(0x100000001b3);
    }
    return (uint32_t)((h ^ h >> 32) % BUCKETS);
}

static void producer_free(spurion_producer *p)
{
    spurion_ranges_fini(&p->received);
    mark_fini(&p->durable);
    mark_fini(&p->staged);
    free(p);
}

/* Forgets the producer that was silent for longest and has nothing pending. */
static void evict(spurion_producers *all)
{
    spurion_producer **oldest = NULL, *gone;

    for (int i = 0; i < BUCKETS; i++) {
        for (spurion_producer **at = &all->buckets[i]; *at != NULL; at = &(*at)->chain) {
            if ((*at)->pins == 0 && (oldest == NULL || (*at)->used_ms < (*oldest)->used_ms)) {
                oldest = at;
            }
        }
    }
    if (oldest != NULL) {
        gone = *oldest;
        *oldest = gone->chain;
        producer_free(gone);
        all->count--;
    }
}

static spurion_status producer_load(spurion_producer *p, spurion_producers *all)
{
    spurion_bytes bytes = {NULL, 0};
    spurion_status st = all->load(all->context, &bytes, spurion_producer_run(p), spurion_producer_name(p), p->epoch);

    if (st.code == SPURION_NOT_FOUND) {
        return spurion_ok();
    }
    if (st.code == SPURION_OK) {
        st = mark_decode(&p->durable, bytes);
    }
    if (st.code == SPURION_OK && (!mark_copy(&p->staged, &p->durable) || !spurion_ranges_copy(&p->received, &p->durable.stored))) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "producers: no memory");
    }
    p->highest = spurion_ranges_last(&p->durable.stored);
    return st;
}

/* Finds or makes; under the lock. */
static spurion_status find(spurion_producer **out, spurion_producers *all, spurion_bytes run, spurion_bytes name, uint64_t epoch)
{
    spurion_producer **bucket = &all->buckets[bucket_of(run, name, epoch)], *p;
    spurion_status st;

    for (p = *bucket; p != NULL; p = p->chain) {
        if (p->epoch == epoch && p->run_size == run.size && p->name_size == name.size && memcmp(p->run, run.data, run.size) == 0 &&
            memcmp(p->name, name.data, name.size) == 0) {
            p->used_ms = spurion_clock_ms();
            *out = p;
            return spurion_ok();
        }
    }
    SPURION_ASSERT(run.size <= SPURION_NAME_BYTES_MAX && name.size <= SPURION_NAME_BYTES_MAX);
    p = calloc(1, sizeof *p);
    if (p == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "producers: no memory");
    }
    memcpy(p->run, run.data, p->run_size = run.size);
    memcpy(p->name, name.data, p->name_size = name.size);
    p->epoch = epoch;
    p->used_ms = spurion_clock_ms();
    spurion_ranges_init(&p->received);
    mark_init(&p->durable);
    mark_init(&p->staged);
    SPURION_TRY(st, producer_load(p, all));
    if (all->count >= SPURION_PRODUCERS_KEPT) {
        evict(all);
    }
    bucket = &all->buckets[bucket_of(run, name, epoch)];
    p->chain = *bucket;
    *bucket = p;
    all->count++;
    *out = p;
    p = NULL;
out:
    if (p != NULL) {
        producer_free(p);
    }
    return st;
}

spurion_status spurion_producers_create(spurion_producers **out, spurion_producers_load load, void *context)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "producers: no memory");
    }
    pthread_mutex_init(&(*out)->lock, NULL);
    (*out)->load = load;
    (*out)->context = context;
    return spurion_ok();
}

void spurion_producers_destroy(spurion_producers *p)
{
    if (p == NULL) {
        return;
    }
    for (int i = 0; i < BUCKETS; i++) {
        while (p->buckets[i] != NULL) {
            spurion_producer *gone = p->buckets[i];
            p->buckets[i] = gone->chain;
            producer_free(gone);
        }
    }
    pthread_mutex_destroy(&p->lock);
    free(p);
}

/* ---- what comes in ---- */

spurion_status spurion_producers_take(spurion_taken *taken, spurion_producer **out, spurion_producers *all, const spurion_tap *tap)
{
    spurion_producer *p;
    spurion_status st;
    bool fresh = false;

    *out = NULL;
    *taken = SPURION_TAKEN_BEFORE;
    pthread_mutex_lock(&all->lock);
    SPURION_TRY(st, find(&p, all, tap->run, tap->producer, tap->epoch));
    if (spurion_ranges_has(&p->received, tap->sequence)) {
        goto out;
    }
    if (p->received.count >= SPURION_RANGES_MAX && !spurion_ranges_touches(&p->received, tap->sequence)) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "producer: expected at most %d holes in its sequences, found more; Sync and fill",
                           SPURION_RANGES_MAX);
        goto out;
    }
    if (!spurion_ranges_add(&fresh, &p->received, tap->sequence, tap->sequence)) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "producers: no memory");
        goto out;
    }
    p->highest = tap->sequence > p->highest ? tap->sequence : p->highest;
    p->pins++;
    *taken = SPURION_TAKEN;
    *out = p;
out:
    pthread_mutex_unlock(&all->lock);
    return st;
}

void spurion_producers_drop(spurion_producers *all, spurion_producer *p, uint64_t sequence)
{
    pthread_mutex_lock(&all->lock);
    spurion_ranges_remove(&p->received, sequence);
    p->pins--;
    pthread_mutex_unlock(&all->lock);
}

static spurion_status give_ranges(const spurion_range **out, int32_t *count, const spurion_memory *m, const spurion_ranges *in)
{
    int32_t n = in->count < SPURION_RANGES_MAX ? in->count : SPURION_RANGES_MAX; /* the next Sync tells the rest */
    spurion_range *copy = m->take(m->context, (size_t)(n > 0 ? n : 1) * sizeof *copy);

    if (copy == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "producers: no memory for the answer");
    }
    if (n > 0) {
        memcpy(copy, in->ranges, (size_t)n * sizeof *copy);
    }
    *out = copy;
    *count = n;
    return spurion_ok();
}

spurion_status spurion_producers_sync(spurion_sync_reply *reply, spurion_producer **out, spurion_producers *all, const spurion_memory *m,
                                      const spurion_sync *sync)
{
    spurion_ranges missing, pending;
    spurion_producer *p;
    spurion_status st;

    memset(reply, 0, sizeof *reply);
    spurion_ranges_init(&missing);
    spurion_ranges_init(&pending);
    pthread_mutex_lock(&all->lock);
    SPURION_TRY(st, find(&p, all, sync->run, sync->producer, sync->epoch));
    p->highest = sync->last_sequence > p->highest ? sync->last_sequence : p->highest;
    if (!spurion_ranges_missing(&missing, &p->received, sync->last_sequence) ||
        !spurion_ranges_difference(&pending, &p->received, &p->durable.stored)) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "producers: no memory");
        goto out;
    }
    for (int32_t i = 0; i < sync->lost_count; i++) { /* what the caller lost is not asked for */
        spurion_ranges_cut(&missing, sync->lost[i].first, sync->lost[i].last);
    }
    SPURION_TRY(st, give_ranges(&reply->missing, &reply->missing_count, m, &missing));
    SPURION_TRY(st, give_ranges(&reply->pending, &reply->pending_count, m, &pending));
    reply->stored_through = spurion_ranges_through(&p->durable.stored);
    reply->lost_messages = p->durable.lost_messages;
    reply->lost_rollouts = p->durable.lost_rollouts;
    if (out != NULL) {
        p->pins++;
        *out = p;
    }
out:
    pthread_mutex_unlock(&all->lock);
    spurion_ranges_fini(&missing);
    spurion_ranges_fini(&pending);
    return st;
}

/* ---- the sink ---- */

void spurion_producers_stage(spurion_producers *all, spurion_producer *p, uint64_t sequence, int64_t step_seen, int64_t step_end)
{
    pthread_mutex_lock(&all->lock);
    if (spurion_ranges_add(NULL, &p->staged.stored, sequence, sequence)) {
        if (step_seen >= 0 || step_end >= 0) {
            mark_note(&p->staged, sequence, step_seen, step_end);
        }
        mark_advance(&p->staged);
    }
    pthread_mutex_unlock(&all->lock);
}

void spurion_producers_stage_sync(spurion_producers *all, spurion_producer *p, const spurion_sync *sync)
{
    pthread_mutex_lock(&all->lock);
    for (int32_t i = 0; i < sync->lost_count; i++) {
        uint64_t before = spurion_ranges_total(&p->received), lost;
        if (p->received.count + 2 > SPURION_RANGES_MAX ||
            !spurion_ranges_fill(&p->staged.stored, &p->received, sync->lost[i].first, sync->lost[i].last)) {
            break; /* told again by the next Sync */
        }
        lost = spurion_ranges_total(&p->received) - before;
        p->staged.lost_messages += lost;
        if (sync->lost_counts != NULL && lost == sync->lost[i].last - sync->lost[i].first + 1) { /* what came late was not lost */
            p->staged.lost_rollouts += sync->lost_counts[i];
        }
    }
    if (sync->lost_counts == NULL && sync->lost_rollouts > p->staged.lost_rollouts) {
        p->staged.lost_rollouts = sync->lost_rollouts;
    }
    if (sync->closing) {
        p->staged.closing = sync->last_sequence + 1;
    }
    mark_advance(&p->staged);
    pthread_mutex_unlock(&all->lock);
}

spurion_status spurion_producers_encode(spurion_bytes *out, spurion_producers *all, spurion_producer *p, const spurion_memory *m)
{
    spurion_status st;

    pthread_mutex_lock(&all->lock);
    st = mark_encode(out, m, &p->staged);
    pthread_mutex_unlock(&all->lock);
    return st;
}

void spurion_producers_settle(spurion_word *word, spurion_producers *all, spurion_producer *p, int pins)
{
    pthread_mutex_lock(&all->lock);
    if (!mark_copy(&p->durable, &p->staged)) { /* only memory: Sync goes on calling it pending, which is safe */
        SPURION_ASSERT(p->pins >= pins);
    }
    p->pins -= pins;
    SPURION_ASSERT(p->pins >= 0);
    mark_word(word, &p->staged);
    pthread_mutex_unlock(&all->lock);
}

/* ---- Status ---- */

static bool copy_name(spurion_bytes *out, const spurion_memory *m, spurion_bytes in)
{
    char *p = m->take(m->context, in.size + 1);
    if (p == NULL) {
        return false;
    }
    memcpy(p, in.data, in.size);
    p[in.size] = '\0';
    *out = bytes_of(p, in.size);
    return true;
}

static int by_use(const void *a, const void *b)
{
    int64_t x = (*(spurion_producer *const *)a)->used_ms, y = (*(spurion_producer *const *)b)->used_ms;
    return x > y ? -1 : x < y;
}

static spurion_status list_one(spurion_producer_status *out, const spurion_memory *m, spurion_producer *p)
{
    uint64_t here = spurion_ranges_total(&p->received);

    if (!copy_name(&out->run, m, spurion_producer_run(p)) || !copy_name(&out->producer, m, spurion_producer_name(p))) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "producers: no memory for the list");
    }
    out->epoch = p->epoch;
    out->stored = spurion_ranges_through(&p->durable.stored);
    out->highest = p->highest;
    out->missing = p->highest > here ? p->highest - here : 0;
    out->lost = p->durable.lost_rollouts;
    return spurion_ok();
}

spurion_status spurion_producers_list(spurion_producer_status *out, int32_t *count, spurion_producers *all, const spurion_memory *m,
                                      int32_t max)
{
    spurion_producer **order = NULL;
    spurion_status st = spurion_ok();
    int32_t n = 0;

    *count = 0;
    pthread_mutex_lock(&all->lock);
    order = calloc((size_t)all->count + 1, sizeof *order);
    if (order == NULL) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "producers: no memory for the list");
        goto out;
    }
    for (int i = 0; i < BUCKETS; i++) {
        for (spurion_producer *p = all->buckets[i]; p != NULL; p = p->chain) {
            order[n++] = p;
        }
    }
    qsort(order, (size_t)n, sizeof *order, by_use);
    for (int32_t i = 0; i < n && i < max; i++) {
        SPURION_TRY(st, list_one(&out[i], m, order[i]));
        *count = i + 1;
    }
out:
    pthread_mutex_unlock(&all->lock);
    free(order);
    return st;
}

/* See ingest.h. */
#include "daemon/ingest.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/base/check.h"
#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/pipeline_internal.h"
#include "daemon/service_http.h"

#define ITEM_BYTES 8192          /* what an item costs beside its texts: tokens, verdict */
#define JOB_BYTES_MAX (256u << 20)
#define SAVED_REPLY_DIGEST 32    /* a saved reply begins with the digest of its request's body */

/* ---- calls ---- */

static void *arena_take(void *context, size_t bytes)
{
    return spurion_arena_take(context, bytes);
}

spurion_memory spurion_arena_memory(spurion_arena *arena)
{
    spurion_memory m = {arena_take, arena};
    return m;
}

spurion_call *spurion_call_create(spurion_call_kind kind, spurion_transport_call *wire)
{
    spurion_call *c = calloc(1, sizeof *c);
    if (c != NULL) {
        c->kind = kind;
        c->wire = wire;
        c->since_ms = spurion_clock_ms();
        c->deadline_ms = INT64_MAX;
        spurion_arena_init(&c->arena, 0); /* the codec has its own limit for a message */
    }
    return c;
}

void spurion_call_destroy(spurion_pipeline *p, spurion_call *c)
{
    if (c == NULL) {
        return;
    }
    for (int32_t i = 0; i < c->item_count; i++) {
        spurion_job_fini(&c->items[i].job);
    }
    free(c->items);
    spurion_arena_fini(&c->arena);
    atomic_fetch_sub(&p->bytes, c->reserved);
    free(c);
}

spurion_status spurion_call_reserve(spurion_pipeline *p, spurion_call *c, size_t wire_bytes)
{
    size_t items = (size_t)(c->list.count > 0 ? c->list.count : 1);
    size_t need = c->arena.bytes_used + 2 * wire_bytes + items * (sizeof(spurion_item) + ITEM_BYTES);
    size_t before = atomic_fetch_add(&p->bytes, need);

    if (before > 0 && before + need > p->config->engine.queue_max) { /* alone, one message of any allowed size is taken */
        atomic_fetch_sub(&p->bytes, need);
        return spurion_error(SPURION_UNAVAILABLE, "queue: expected at most %llu bytes in flight, found %zu; try again",
                             (unsigned long long)p->config->engine.queue_max, before + need);
    }
    c->reserved += need;
    return spurion_ok();
}

static void identify(spurion_item *it)
{
    const spurion_rollout *r = &it->job.rollout;

    it->flight.key.run = r->run;
    it->flight.key.step = r->step;
    it->flight.key.group = r->group;
    it->flight.key.id = r->id;
    it->flight.key.attempt = r->attempt;
    it->flight.since_ms = it->call->since_ms;
    spurion_job_identify(&it->job);
    it->job.verdict.has_step = r->step >= 0;
}

static void item_init(spurion_item *it, spurion_call *c, int32_t place)
{
    const spurion_refusal *refusal = &c->list.refusals[place];

    it->job.rollout = c->list.rollouts[place];
    it->job.want_tokens = true; /* evidence of flagged ones shows them; a reply only where asked for */
    it->job.delivery = it;
    identify(it);
    if (refusal->code != SPURION_OK) {
        it->fate = SPURION_FATE_REFUSED;
        it->job.verdict.code = refusal->code;
        it->job.verdict.message = refusal->message;
    } else {
        it->fate = SPURION_FATE_JUDGE;
        spurion_rollout_digest(it->flight.digest, &it->job.rollout);
    }
}

spurion_status spurion_call_make_items(spurion_call *c)
{
    int32_t n = c->list.count, extra = n == 0 || c->kind == SPURION_CALL_SUBMIT;

    c->items = calloc((size_t)(n + extra), sizeof *c->items);
    if (c->items == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "rollouts: no memory for %d", n);
    }
    c->item_count = c->open = n + extra;
    for (int32_t i = 0; i < c->item_count; i++) {
        c->items[i].call = c;
        c->items[i].fate = SPURION_FATE_NONE;
        spurion_job_init(&c->items[i].job, JOB_BYTES_MAX);
        if (i < n) {
            item_init(&c->items[i], c, i);
        }
    }
    return spurion_ok();
}

void spurion_ingest_refuse(spurion_item *it, const spurion_status *why)
{
    spurion_job_refuse(&it->job, why);
    it->fate = SPURION_FATE_REFUSED;
}

static void refuse(spurion_item *it, spurion_status why)
{
    spurion_ingest_refuse(it, &why);
}

void spurion_item_name(spurion_item *it, const spurion_rollout *rollout)
{
    SPURION_ASSERT(!it->entered);
    it->job.rollout = *rollout;
    identify(it);
    if (it->fate == SPURION_FATE_JUDGE) {
        spurion_status st = spurion_rollout_check(rollout);
        if (st.code != SPURION_OK) {
            spurion_ingest_refuse(it, &st);
        }
    }
}

/* ---- the tap ---- */

spurion_status spurion_ingest_tap(bool *before, spurion_pipeline *p, spurion_bytes message)
{
    size_t bytes = atomic_load(&p->bytes);
    spurion_call *c;
    spurion_taken taken;
    spurion_memory m;
    spurion_status st;

    *before = false;
    if (atomic_load(&p->state) != SPURION_STATE_SERVING || atomic_load(&p->store_blocked)) {
        return spurion_error(SPURION_UNAVAILABLE, "tap: expected to be serving, found draining or a full store; try again");
    }
    if (bytes > 0 && bytes + 2 * message.size > p->config->engine.queue_max) { /* under a flood decoding for nothing would starve the engine */
        return spurion_error(SPURION_UNAVAILABLE, "queue: expected at most %llu bytes in flight, found %zu; try again",
                             (unsigned long long)p->config->engine.queue_max, bytes);
    }
    c = spurion_call_create(SPURION_CALL_TAP, NULL);
    if (c == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "tap: no memory");
    }
    m = spurion_arena_memory(&c->arena);
    SPURION_TRY(st, spurion_codec_decode_tap(&c->tap, &m, message));
    c->list = c->tap.list;
    c->producer = c->tap.producer;
    SPURION_TRY(st, spurion_call_reserve(p, c, message.size));
    SPURION_TRY(st, spurion_call_make_items(c));
    SPURION_TRY(st, spurion_producers_take(&taken, &c->source, p->producers, &c->tap));
    if (taken == SPURION_TAKEN_BEFORE) {
        *before = true;
        goto out;
    }
    spurion_stat_add(p, SPURION_STAT_RECEIVED, (uint64_t)c->list.count);
    spurion_queue_push(&p->intake, &c->node);
    c = NULL;
out:
    spurion_call_destroy(p, c);
    return st;
}

/* ---- admission ---- */

static spurion_status already_exists(void)
{
    return spurion_error(SPURION_ALREADY_EXISTS, "run, step, group, id, attempt: expected a new identity or the same content as before, "
                                                 "found other content under this identity");
}

void spurion_ingest_release_waiters(spurion_pipeline *p, spurion_item *item, spurion_flight_entry *waiters)
{
    while (waiters != NULL) {
        spurion_item *w = (spurion_item *)((char *)waiters - offsetof(spurion_item, flight));
        waiters = waiters->waiters;
        w->flight.waiters = NULL;
        if (item->fate == SPURION_FATE_ABANDONED) {
            w->fate = SPURION_FATE_ABANDONED;
            if (w->call->abandoned.code == SPURION_OK) {
                w->call->abandoned = item->call->abandoned;
            }
        } else if (item->answer.size > 0) { /* a refusal is an answer too */
            char *copy = spurion_arena_copy(&w->job.arena, item->answer.data, item->answer.size);
            w->fate = SPURION_FATE_KNOWN;
            w->answer.data = copy;
            w->answer.size = copy != NULL ? item->answer.size : 0;
            if (copy == NULL) {
                refuse(w, spurion_error(SPURION_RESOURCE_EXHAUSTED, "rollout: no memory for the stored verdict"));
            }
        } else {
            spurion_status why = spurion_error((spurion_code)item->job.verdict.code, "%s", item->job.verdict.message.data);
            refuse(w, why);
        }
        spurion_queue_push(&p->sink, &w->node);
    }
}

/* What the store knows of an entered item. */
static void look_up(spurion_pipeline *p, spurion_item *it)
{
    const spurion_key *k = &it->flight.key;
    spurion_identity identity = {k->run, k->group, k->id, k->step, k->attempt};
    spurion_store_row row;
    spurion_status st = spurion_store_get(&row, &it->job.arena, p->store, &identity, false);

    if (st.code == SPURION_NOT_FOUND) {
        return;
    }
    if (st.code != SPURION_OK) {
        refuse(it, st);
    } else if (memcmp(row.digest, it->flight.digest, sizeof row.digest) != 0) {
        refuse(it, already_exists());
    } else {
        it->fate = SPURION_FATE_KNOWN;
        it->answer = row.verdict;
        spurion_stat_add(p, SPURION_STAT_KNOWN, 1);
    }
}

bool spurion_ingest_admit(spurion_pipeline *p, spurion_item *it)
{
    SPURION_ASSERT(it->fate == SPURION_FATE_JUDGE && !it->entered);
    switch (spurion_flights_enter(p->flights, &it->flight)) {
    case SPURION_WAITING:
        spurion_stat_add(p, SPURION_STAT_KNOWN, 1);
        return false;
    case SPURION_OCCUPIED:
        refuse(it, already_exists());
        return true;
    case SPURION_ENTERED:
        break;
    }
    it->entered = true;
    look_up(p, it);
    if (it->fate != SPURION_FATE_JUDGE) {
        it->entered = false;
        spurion_ingest_release_waiters(p, it, spurion_flights_leave(p->flights, &it->flight));
    }
    return true;
}

/* ---- the intake thread ---- */

/* An answer that was given under the same idempotency key. */
static bool answer_again(spurion_pipeline *p, spurion_call *c)
{
    static const spurion_bytes nothing = {NULL, 0};
    unsigned char digest[SAVED_REPLY_DIGEST];
    spurion_rollout body;
    spurion_bytes saved;
    spurion_status st;

    if (c->kind != SPURION_CALL_SCORE || c->request.idempotency_key.size == 0) {
        return false;
    }
    st = spurion_store_reply_get(&saved, &c->arena, p->store, c->request.idempotency_key, spurion_clock_wall_ms());
    if (st.code != SPURION_OK || saved.size < SAVED_REPLY_DIGEST) {
        return false; /* unknown, expired or damaged: the identities still answer */
    }
    memset(&body, 0, sizeof body);
    body.completion = c->request.body;
    spurion_rollout_digest(digest, &body);
    if (memcmp(digest, saved.data, sizeof digest) != 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "idempotency_key: expected the request it was first used for, found another one");
        spurion_service_answer(p, c, &st, nothing);
        return true;
    }
    saved.data += SAVED_REPLY_DIGEST;
    saved.size -= SAVED_REPLY_DIGEST;
    st = spurion_ok();
    spurion_service_answer(p, c, &st, saved);
    return true;
}

static void send_to_sink(spurion_pipeline *p, spurion_item *it)
{
    spurion_batcher_skip(p->batcher, &it->job.rollout);
    atomic_store(&it->flight.stage, SPURION_STAGE_STORING);
    spurion_queue_push(&p->sink, &it->node);
}

static void take_item(spurion_pipeline *p, spurion_item *it)
{
    spurion_status st;

    if (it->fate == SPURION_FATE_JUDGE && !it->entered && !spurion_ingest_admit(p, it)) {
        return;
    }
    if (it->fate == SPURION_FATE_JUDGE) {
        spurion_engine_prepare(p->engine, &it->job);
        if (atomic_load(&p->engine_tick_ms) != INT64_MAX) {
            spurion_stat_add(p, SPURION_STAT_PREPARED_AHEAD, 1);
        }
        if (it->job.verdict.code != SPURION_OK) {
            it->fate = SPURION_FATE_REFUSED;
        }
    }
    if (it->fate != SPURION_FATE_JUDGE) {
        send_to_sink(p, it);
        return;
    }
    atomic_store(&it->flight.stage, SPURION_STAGE_GROUPING);
    st = spurion_batcher_add(p->batcher, &it->job);
    if (st.code != SPURION_OK) {
        refuse(it, st);
        spurion_queue_push(&p->sink, &it->node);
    }
}

static void take_call(spurion_pipeline *p, spurion_call *c)
{
    static const spurion_bytes nothing = {NULL, 0};
    spurion_item *items = c->items; /* c and they may be gone as soon as the last one of ours is on its way */
    const bool *mine = c->mine;
    int32_t n = c->item_count, rollouts = c->list.count;
    bool repeated = false;

    if (c->kind == SPURION_CALL_SCORE && spurion_clock_ms() > c->deadline_ms) {
        spurion_status st = spurion_error(SPURION_DEADLINE_EXCEEDED, "deadline: expected to begin within the caller's time, found it over");
        spurion_service_answer(p, c, &st, nothing);
        return;
    }
    if (c->http != NULL && !spurion_http_admit(&repeated, p, c)) {
        return;
    }
    if (!repeated && answer_again(p, c)) {
        return;
    }
    if (c->http != NULL) {
        spurion_http_name(p, c);
    }
    for (int32_t i = 0; i < n; i++) {
        if (mine == NULL || i >= rollouts || mine[i]) {
            take_item(p, &items[i]);
        }
    }
    spurion_batcher_message_end(p->batcher);
}

void *spurion_ingest_main(void *arg)
{
    spurion_pipeline *p = arg;
    bool closed = false;

    while (!closed) {
        spurion_node *node = spurion_queue_take(&closed, &p->intake, 16, INT64_MAX);
        while (node != NULL) {
            spurion_call *c = (spurion_call *)node;
            node = node->next;
            take_call(p, c);
        }
    }
    return NULL;
}

/* See service.h. Decoding, dispatch and answers. */
#include "daemon/service.h"

#include <string.h>

#include "daemon/base/check.h"
#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/pipeline_internal.h"
#include "daemon/service_http.h"

#define RETRY_AFTER_MS 200

static const spurion_bytes nothing = {NULL, 0};

/* ---- answers ---- */

/* Packs and sends one reply; memory from the call's arena. */
static void send_reply(spurion_call *c, const spurion_status *st, spurion_bytes body, const char *next)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_reply reply;
    spurion_bytes packed;
    spurion_status packing;

    memset(&reply, 0, sizeof reply);
    reply.call_id = c->request.call_id;
    reply.code = st->code;
    if (st->code != SPURION_OK) {
        reply.message = spurion_bytes_of(st->message);
        if (st->code == SPURION_UNAVAILABLE || st->code == SPURION_RESOURCE_EXHAUSTED) {
            reply.retry_after_ms = RETRY_AFTER_MS;
        }
    } else {
        reply.body = body;
    }
    if (next[0] != '\0') {
        reply.next_page_token = spurion_bytes_of(next);
    }
    packing = spurion_codec_encode_reply(&packed, &m, &reply);
    if (packing.code != SPURION_OK || packed.size > SPURION_REPLY_BYTES_MAX) {
        static const char empty[1];
        spurion_log_error("SERVICE-REPLY", "cannot pack a reply: %s", packing.message);
        spurion_transport_reply(c->wire, empty, 0);
    } else {
        spurion_transport_reply(c->wire, packed.data, packed.size);
    }
    c->wire = NULL;
}

void spurion_service_reply(spurion_pipeline *p, spurion_call *c, const spurion_status *st, spurion_bytes body)
{
    char next[SPURION_PAGE_TOKEN_BYTES] = "";

    if (c->http != NULL) {
        spurion_http_answer(p, c, st, body);
        return;
    }
    if (c->wire == NULL) {
        return;
    }
    if (st->code != SPURION_OK) {
        spurion_stat_add(p, SPURION_STAT_REQUESTS_REFUSED, 1);
    } else if (body.size > SPURION_PAGE_BYTES) {
        spurion_status keep = spurion_pages_keep(next, p->pages, body);
        if (keep.code != SPURION_OK) {
            send_reply(c, &keep, nothing, "");
            return;
        }
        body.size = SPURION_PAGE_BYTES;
    }
    send_reply(c, st, body, next);
}

void spurion_service_answer(spurion_pipeline *p, spurion_call *c, const spurion_status *st, spurion_bytes body)
{
    spurion_service_reply(p, c, st, body);
    spurion_call_destroy(p, c);
}

/* ---- handlers on nng's threads: each takes the call, and answers it or hands it on ---- */

spurion_status spurion_service_check_open(spurion_pipeline *p)
{
    if (atomic_load(&p->state) != SPURION_STATE_SERVING) {
        return spurion_error(SPURION_UNAVAILABLE, "daemon: expected to be serving, found shutting down; try again");
    }
    if (atomic_load(&p->store_blocked)) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "store: expected space for new work, found none; try again");
    }
    return spurion_ok();
}

static void handle_hello(spurion_pipeline *p, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_hello_reply reply;
    spurion_bytes body = nothing;
    spurion_hello hello;
    spurion_status st;
    char provenance[17];

    memset(&reply, 0, sizeof reply);
    SPURION_TRY(st, spurion_codec_decode_hello(&hello, &m, c->request.body));
    if (hello.proto_min > SPURION_PROTO_VERSION || hello.proto_max < SPURION_PROTO_VERSION) {
        st = spurion_error(SPURION_FAILED_PRECONDITION, "protocol: expected version %d among those offered, found %u to %u",
                           SPURION_PROTO_VERSION, hello.proto_min, hello.proto_max);
        goto out;
    }
    reply.proto = SPURION_PROTO_VERSION;
    reply.server_version = spurion_bytes_of(SPURION_VERSION);
    reply.epoch = spurion_store_alert_epoch(p->store);
    pthread_rwlock_rdlock(&p->policy);
    (void)snprintf(provenance, sizeof provenance, "%s", spurion_engine_provenance(p->engine));
    pthread_rwlock_unlock(&p->policy);
    reply.provenance = spurion_bytes_of(provenance);
    reply.frame_bytes_max = SPURION_FRAME_BYTES_MAX;
    reply.reply_bytes_max = SPURION_REPLY_BYTES_MAX;
    SPURION_TRY(st, spurion_codec_encode_hello_reply(&body, &m, &reply));
out:
    spurion_service_answer(p, c, &st, body);
}

static void handle_rollouts(spurion_pipeline *p, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    bool score = c->kind == SPURION_CALL_SCORE;
    spurion_score in;
    spurion_status st;

    SPURION_TRY(st, spurion_service_check_open(p));
    SPURION_TRY(st, score ? spurion_codec_decode_score(&in, &m, c->request.body) : spurion_codec_decode_submit(&in, &m, c->request.body));
    c->list = in.list;
    c->producer = in.producer;
    c->want_tokens = in.want_tokens;
    SPURION_TRY(st, spurion_call_reserve(p, c, c->request.body.size));
    SPURION_TRY(st, spurion_call_make_items(c));
    spurion_stat_add(p, SPURION_STAT_RECEIVED, (uint64_t)c->list.count);
    spurion_queue_push(score ? &p->intake : &p->desk, &c->node);
    return;
out:
    spurion_service_answer(p, c, &st, nothing);
}

static void handle_fill(spurion_pipeline *p, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_fill_reply reply = {0};
    spurion_bytes body = nothing;
    spurion_fill fill;
    spurion_status st;

    SPURION_TRY(st, spurion_service_check_open(p));
    SPURION_TRY(st, spurion_codec_decode_fill(&fill, &m, c->request.body));
    for (int32_t i = 0; i < fill.count; i++) {
        bool before;
        st = spurion_ingest_tap(&before, p, fill.taps[i]);
        if (st.code == SPURION_UNAVAILABLE && i > 0) {
            break; /* the caller sends the rest again */
        }
        if (st.code != SPURION_OK) {
            char text[SPURION_MESSAGE_BYTES];
            memcpy(text, st.message, sizeof text);
            st = spurion_error((spurion_code)st.code, "taps[%d]: %.400s", i, text);
            goto out;
        }
        reply.taken++;
    }
    SPURION_TRY(st, spurion_codec_encode_fill_reply(&body, &m, &reply));
out:
    spurion_service_answer(p, c, &st, body);
}

/* What is to be durable goes through the sink; everything else is answered at once. */
static void handle_sync(spurion_pipeline *p, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_sync_reply reply;
    spurion_bytes body = nothing;
    spurion_status st;
    bool durable;

    SPURION_TRY(st, spurion_service_check_open(p));
    SPURION_TRY(st, spurion_codec_decode_sync(&c->sync, &m, c->request.body));
    durable = c->sync.lost_count > 0 || c->sync.lost_rollouts > 0 || c->sync.closing;
    if (durable) {
        SPURION_TRY(st, spurion_call_reserve(p, c, c->request.body.size));
        SPURION_TRY(st, spurion_call_make_items(c));
    }
    SPURION_TRY(st, spurion_producers_sync(&reply, durable ? &c->source : NULL, p->producers, &m, &c->sync));
    if (durable) {
        spurion_queue_push(&p->sink, &c->items[0].node);
        return;
    }
    SPURION_TRY(st, spurion_codec_encode_sync_reply(&body, &m, &reply));
out:
    spurion_service_answer(p, c, &st, body);
}

static void handle_step_end(spurion_pipeline *p, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_status st;

    SPURION_TRY(st, spurion_service_check_open(p));
    SPURION_TRY(st, spurion_codec_decode_step_end(&c->step_end, &m, c->request.body));
    SPURION_TRY(st, spurion_call_reserve(p, c, c->request.body.size));
    SPURION_TRY(st, spurion_call_make_items(c));
    spurion_queue_push(&p->sink, &c->items[0].node);
    return;
out:
    spurion_service_answer(p, c, &st, nothing);
}

static void handle_read(spurion_pipeline *p, spurion_call *c)
{
    spurion_queue_push(&p->desk, &c->node);
}

typedef struct method {
    const char *name;
    spurion_call_kind kind;
    void (*handle)(spurion_pipeline *p, spurion_call *c);
} method;

static const method methods[] = {
    {"Hello", SPURION_CALL_READ, handle_hello},         {"Score", SPURION_CALL_SCORE, handle_rollouts},
    {"Submit", SPURION_CALL_SUBMIT, handle_rollouts},   {"Fill", SPURION_CALL_READ, handle_fill},
    {"Sync", SPURION_CALL_SYNC, handle_sync},           {"StepEnd", SPURION_CALL_STEP_END, handle_step_end},
    {"Query", SPURION_CALL_READ, handle_read},          {"Get", SPURION_CALL_READ, handle_read},
    {"Counts", SPURION_CALL_READ, handle_read},         {"Runs", SPURION_CALL_READ, handle_read},
    {"Alerts", SPURION_CALL_READ, handle_read},         {"Status", SPURION_CALL_READ, handle_read},
    {"Catalogue", SPURION_CALL_READ, handle_read},      {"Rules", SPURION_CALL_READ, handle_read},
};

static spurion_status find_method(const method **out, spurion_bytes path)
{
    static const char prefix[] = SPURION_METHOD_PREFIX;
    size_t n = sizeof prefix - 1;

    if (path.size <= n || memcmp(path.data, prefix, n) != 0) {
        return spurion_error(SPURION_UNIMPLEMENTED, "method: expected %s..., found %.128s", prefix, path.data);
    }
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++) {
        if (strlen(methods[i].name) == path.size - n && memcmp(methods[i].name, path.data + n, path.size - n) == 0) {
            *out = &methods[i];
            return spurion_ok();
        }
    }
    return spurion_error(SPURION_UNIMPLEMENTED, "method: expected one of spurion.v1, found %.128s", path.data);
}

/* The next slice of a long answer. */
static void answer_page(spurion_pipeline *p, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    char next[SPURION_PAGE_TOKEN_BYTES];
    spurion_bytes slice = nothing;
    spurion_status st = spurion_pages_get(&slice, next, p->pages, c->request.page_token, &m);

    send_reply(c, &st, slice, next);
    spurion_call_destroy(p, c);
}

void spurion_service_request(void *context, spurion_transport_call *wire, const char *data, size_t size)
{
    spurion_pipeline *p = context;
    spurion_call *c = spurion_call_create(SPURION_CALL_READ, wire);
    spurion_bytes message = {data, size};
    const method *found = NULL;
    spurion_memory m;
    spurion_status st;

    spurion_stat_add(p, SPURION_STAT_REQUESTS, 1);
    if (c == NULL) {
        spurion_transport_reply(wire, data, 0); /* no memory even to say so: the caller times out and tries again */
        return;
    }
    m = spurion_arena_memory(&c->arena);
    SPURION_TRY(st, spurion_codec_decode_request(&c->request, &m, message));
    if (c->request.page_token.size > 0) {
        answer_page(p, c);
        return;
    }
    SPURION_TRY(st, find_method(&found, c->request.method));
    if (c->request.timeout_ms > 0) {
        c->deadline_ms = c->since_ms + c->request.timeout_ms;
    }
    c->kind = found->kind;
    found->handle(p, c);
    return;
out:
    spurion_service_answer(p, c, &st, nothing);
}

void spurion_service_tap(void *context, const char *data, size_t size)
{
    spurion_pipeline *p = context;
    spurion_bytes message = {data, size};
    bool before;
    spurion_status st = spurion_ingest_tap(&before, p, message);

    if (st.code != SPURION_OK) { /* it stays missing, and Sync says so */
        spurion_stat_add(p, SPURION_STAT_TAPS_REFUSED, 1);
        if (st.code != SPURION_UNAVAILABLE) {
            spurion_log_warn("TAP-REFUSED", "message of %zu bytes not taken: %s", size, st.message);
        }
    } else {
        spurion_stat_add(p, before ? SPURION_STAT_TAPS_BEFORE : SPURION_STAT_TAPS, 1);
    }
}

/* ---- the desk thread ---- */

/* Refusals and duplicates of a Submit, after its rollouts were admitted. */
static spurion_status submit_reply(spurion_bytes *body, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    size_t n = (size_t)(c->list.count > 0 ? c->list.count : 1);
    uint32_t *places = spurion_arena_take_array(&c->arena, n, sizeof *places);
    uint32_t *codes = spurion_arena_take_array(&c->arena, n, sizeof *codes);
    spurion_bytes *messages = spurion_arena_take_array(&c->arena, n, sizeof *messages);
    spurion_submit_reply reply;

    memset(&reply, 0, sizeof reply);
    if (places == NULL || codes == NULL || messages == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "Submit: no memory for the answer");
    }
    for (int32_t i = 0; i < c->list.count; i++) {
        const spurion_item *it = &c->items[i];
        if (c->mine[i] && it->fate == SPURION_FATE_REFUSED) {
            places[reply.refused_count] = (uint32_t)i;
            codes[reply.refused_count] = (uint32_t)it->job.verdict.code;
            messages[reply.refused_count++] = it->job.verdict.message;
            continue;
        }
        reply.accepted++;
        reply.duplicates += !c->mine[i] || it->fate == SPURION_FATE_KNOWN;
    }
    reply.refused = places;
    reply.refused_codes = codes;
    reply.refused_messages = messages;
    return spurion_codec_encode_submit_reply(body, &m, &reply);
}

/* The inbox could not take it: nothing of the message was accepted. */
static void submit_failed(spurion_pipeline *p, spurion_call *c, const spurion_status *st)
{
    for (int32_t i = 0; i < c->list.count; i++) {
        spurion_item *it = &c->items[i];
        if (c->mine[i] && it->entered) {
            spurion_ingest_refuse(it, st);
            it->entered = false;
            spurion_ingest_release_waiters(p, it, spurion_flights_leave(p->flights, &it->flight));
        }
    }
}

static void submit(spurion_pipeline *p, spurion_call *c)
{
    spurion_bytes body = nothing;
    uint64_t ticket = 0;
    spurion_status st;
    bool worth = false;

    c->mine = spurion_arena_take_array(&c->arena, (size_t)c->list.count + 1, sizeof *c->mine);
    if (c->mine == NULL) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "Submit: no memory");
        spurion_service_answer(p, c, &st, nothing);
        return;
    }
    for (int32_t i = 0; i < c->list.count; i++) {
        spurion_item *it = &c->items[i];
        c->mine[i] = true;
        if (it->fate == SPURION_FATE_JUDGE) {
            c->mine[i] = spurion_ingest_admit(p, it);
        }
        worth = worth || !c->mine[i] || it->entered;
    }
    if (worth) { /* as it came: after a restart it is decoded and admitted again */
        st = spurion_store_inbox_put(&ticket, p->store, &c->request.body, 1, NULL, NULL, 0);
    } else {
        st = spurion_ok();
    }
    if (st.code == SPURION_OK) {
        uint64_t first = UINT64_MAX;
        c->ticket = ticket;
        if (ticket != 0) {
            (void)atomic_compare_exchange_strong(&p->first_ticket, &first, ticket);
        }
        st = submit_reply(&body, c);
    } else {
        submit_failed(p, c, &st);
    }
    spurion_service_reply(p, c, &st, body);
    spurion_queue_push(&p->intake, &c->node);
}

void *spurion_desk_main(void *arg)
{
    spurion_pipeline *p = arg;
    bool closed = false;

    while (!closed) {
        spurion_node *node = spurion_queue_take(&closed, &p->desk, 16, INT64_MAX);
        while (node != NULL) {
            spurion_call *c = (spurion_call *)node;
            node = node->next;
            if (c->kind == SPURION_CALL_SUBMIT) {
                submit(p, c);
            } else {
                spurion_bytes body = nothing;
                spurion_status st;
                pthread_rwlock_rdlock(&p->policy);
                st = spurion_service_read(&body, p, c);
                pthread_rwlock_unlock(&p->policy);
                spurion_service_answer(p, c, &st, body);
            }
        }
    }
    return NULL;
}

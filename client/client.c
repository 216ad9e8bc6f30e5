/* libspurion: the handle and its calls; see client.h. Thread: one at a time. */
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "handle.h"

#define TIMEOUT_MS 30000
#define SYNC_INTERVAL_MS 1000
#define RING_BYTES ((size_t)64 << 20)
#define RETRY_MS 20
#define ANSWER_KEPT ((size_t)1 << 20) /* a longer answer's memory goes back with the next call */
#define PAGE_TOKEN_BYTES 256
#define RESTARTS_MAX 5

/* --- memory of answers --- */

typedef struct spurion_pool_chunk {
    struct spurion_pool_chunk *next;
    size_t used, size;
    _Alignas(16) char data[];
} spurion_pool_chunk;

void *spurion_pool_take(void *pool, size_t bytes)
{
    spurion_pool *p = pool;
    spurion_pool_chunk *k = p->head;

    if (bytes > SPURION_DECODE_BYTES_MAX) {
        return NULL;
    }
    bytes = (bytes + 15) & ~(size_t)15;
    if (!k || k->size - k->used < bytes) {
        size_t size = bytes > 65536 ? bytes : 65536;
        k = malloc(sizeof *k + size);
        if (!k) {
            return NULL;
        }
        k->next = p->head;
        k->used = 0;
        k->size = size;
        p->head = k;
        p->bytes += size;
    }
    k->used += bytes;
    return k->data + k->used - bytes;
}

void spurion_pool_reset(spurion_pool *p)
{
    while (p->head) {
        spurion_pool_chunk *next = p->head->next;
        free(p->head);
        p->head = next;
    }
    p->bytes = 0;
}

/* --- the handle --- */

spurion_code spurion_client_fail(spurion_client *c, const spurion_status *st)
{
    if (st->code != SPURION_OK) {
        memcpy(c->error, st->message, sizeof c->error);
    }
    return (spurion_code)st->code;
}

spurion_status spurion_client_enter(spurion_client *c)
{
    if (c->pid != getpid()) {
        return spurion_error(SPURION_FAILED_PRECONDITION,
                             "this handle was opened by process %ld; expected a handle of its own in process %ld (open one after fork)",
                             (long)c->pid, (long)getpid());
    }
    spurion_pool_reset(&c->previous); /* what is asked may borrow from the last answer, a cursor: it stays until the request is packed */
    c->previous = c->pool;
    memset(&c->pool, 0, sizeof c->pool);
    spurion_pool_reset(&c->scratch);
    if (c->answer_capacity > ANSWER_KEPT) {
        free(c->answer);
        c->answer = NULL;
        c->answer_capacity = 0;
    }
    return spurion_ok();
}

static spurion_status name_copy(char *out, const char *name, const char *what)
{
    spurion_status st;
    SPURION_TRY(st, spurion_name_check(spurion_bytes_of(name), what));
    memcpy(out, name, strlen(name) + 1);
out:
    return st;
}

static spurion_status producer_name(spurion_client *c, const char *given)
{
    char host[64] = "host";

    if (given) {
        return name_copy(c->producer, given, "producer");
    }
    (void)gethostname(host, sizeof host - 1);
    (void)snprintf(c->producer, sizeof c->producer, "%s-%ld", host, (long)getpid());
    return spurion_ok();
}

static spurion_status tap_open(spurion_client *c, const spurion_client_options *o)
{
    spurion_status st = spurion_ok();

    if (!o->rollouts) {
        goto out;
    }
    if (!o->run || !o->rpc) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "the tap: expected run and rpc beside rollouts, found %s", o->run ? "no rpc" : "no run");
        goto out;
    }
    SPURION_TRY(st, name_copy(c->run, o->run, "run"));
    SPURION_TRY(st, producer_name(c, o->producer));
    SPURION_TRY(st, spurion_sp_init(&c->tap.sp, o->rollouts, SPURION_SP_PUB, SPURION_SP_SUB, 0));
    SPURION_TRY(st, spurion_call_init(&c->tap.sync, o->rpc));
    memcpy(&c->tap.epoch, c->key, sizeof c->tap.epoch);
    c->tap.epoch >>= 1; /* a number that signed readers can hold */
    c->tap.on = true;
out:
    return st;
}

spurion_code spurion_client_open(spurion_client **out, const spurion_client_options *o)
{
    spurion_status st;
    spurion_client *c = calloc(1, sizeof *c);

    *out = c;
    if (!c) {
        return SPURION_RESOURCE_EXHAUSTED;
    }
    c->pid = getpid();
    c->timeout_ms = o->timeout_ms > 0 ? o->timeout_ms : TIMEOUT_MS;
    c->sync_interval_ms = o->sync_interval_ms > 0 ? o->sync_interval_ms : SYNC_INTERVAL_MS;
    c->ring_bytes_max = o->ring_bytes_max ? o->ring_bytes_max : RING_BYTES;
    c->policy = o->policy;
    if (getrandom(c->key, sizeof c->key, 0) != (ssize_t)sizeof c->key) {
        st = spurion_error(SPURION_INTERNAL, "getrandom failed");
        goto out;
    }
    if (o->rpc) {
        SPURION_TRY(st, spurion_call_init(&c->call, o->rpc));
        c->has_rpc = true;
    }
    SPURION_TRY(st, tap_open(c, o));
    if (o->alerts) {
        SPURION_TRY(st, spurion_sp_init(&c->alerts.sp, o->alerts, SPURION_SP_SUB, SPURION_SP_PUB, SPURION_ALERT_BYTES_MAX));
        c->alerts.on = true;
    }
    st = spurion_ok();
out:
    return spurion_client_fail(c, &st);
}

void spurion_client_close(spurion_client *c)
{
    if (!c) {
        return;
    }
    if (c->has_rpc) {
        spurion_call_fini(&c->call);
    }
    spurion_tap_fini(&c->tap);
    spurion_alerts_fini(&c->alerts);
    spurion_pool_reset(&c->pool);
    spurion_pool_reset(&c->previous);
    spurion_pool_reset(&c->scratch);
    free(c->answer);
    free(c);
}

const char *spurion_client_error(const spurion_client *c)
{
    return c ? c->error : "no memory for a handle";
}

uint32_t spurion_client_retry_after_ms(const spurion_client *c)
{
    return c->retry_after_ms;
}

size_t spurion_client_memory_bytes(const spurion_client *c)
{
    const spurion_tap_state *t = &c->tap;

    return sizeof *c + c->pool.bytes + c->previous.bytes + c->scratch.bytes + c->answer_capacity + t->ring_bytes +
           (size_t)t->lost_capacity * sizeof *t->lost + (size_t)t->unsure_capacity * sizeof *t->unsure + c->call.frame_capacity +
           c->call.sp.in_capacity + t->sync.frame_capacity + t->sync.sp.in_capacity + c->alerts.sp.in_capacity + c->alerts.pool.bytes +
           c->alerts.held_pool.bytes;
}

const char *spurion_client_version(void)
{
    return SPURION_VERSION;
}

/* --- calls --- */

spurion_status spurion_client_request(spurion_client *c, spurion_bytes *out, const spurion_memory *m, const char *method, spurion_bytes body,
                                      spurion_bytes key, spurion_bytes page, int timeout_ms)
{
    spurion_request r = {.call_id = ++c->call_id, .timeout_ms = (uint32_t)timeout_ms, .idempotency_key = key, .body = body, .page_token = page};
    char *path = m->take(m->context, sizeof SPURION_METHOD_PREFIX + strlen(method));

    if (!path) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a request");
    }
    memcpy(path, SPURION_METHOD_PREFIX, sizeof SPURION_METHOD_PREFIX);
    strcat(path, method);
    r.method = spurion_bytes_of(path);
    return spurion_codec_encode_request(out, m, &r);
}

/* Waits for the answer of the call under way, or until the time is up. */
static spurion_status call_wait(spurion_client *c, spurion_reply *reply, int64_t deadline)
{
    spurion_status st;
    spurion_memory m = spurion_pool_memory(&c->scratch);
    spurion_bytes got;

    for (;;) {
        int64_t left = deadline - spurion_sp_now_ms();
        st = spurion_call_step(&c->call, &got);
        if (st.code == SPURION_OK && got.data) {
            return spurion_codec_decode_reply(reply, &m, got);
        }
        if (st.code != SPURION_OK && st.code != SPURION_UNAVAILABLE) {
            return st;
        }
        if (left <= 0) {
            spurion_call_abandon(&c->call);
            return st.code == SPURION_OK ? spurion_error(SPURION_DEADLINE_EXCEEDED, "%s: no answer in time", c->call.sp.url) : st;
        }
        spurion_sp_wait(&c->call.sp, c->call.frame_at < c->call.frame_size, left < 200 ? (int)left : 200);
    }
}

/* One page: asks, waits, and asks again while the daemon is busy and time is left. */
static spurion_status page_call(spurion_client *c, spurion_reply *reply, const char *method, spurion_bytes body, spurion_bytes key,
                                spurion_bytes page, bool retry, int64_t deadline)
{
    spurion_status st;
    spurion_memory m = spurion_pool_memory(&c->scratch);
    spurion_bytes packed;

    for (;;) {
        int64_t left = deadline - spurion_sp_now_ms();
        spurion_pool_reset(&c->scratch);
        SPURION_TRY(st, spurion_client_request(c, &packed, &m, method, body, key, page, left > 0 ? (int)left : 1));
        SPURION_TRY(st, spurion_call_start(&c->call, packed));
        SPURION_TRY(st, call_wait(c, reply, deadline));
        c->retry_after_ms = reply->retry_after_ms;
        if (reply->code == SPURION_OK) {
            break;
        }
        st = spurion_error((spurion_code)reply->code, "%.*s", (int)reply->message.size, reply->message.data ? reply->message.data : "");
        left = deadline - spurion_sp_now_ms();
        if (!retry || (reply->code != SPURION_UNAVAILABLE && reply->code != SPURION_RESOURCE_EXHAUSTED) || reply->retry_after_ms == 0 ||
            left <= (int64_t)reply->retry_after_ms) {
            break;
        }
        spurion_sp_wait(&c->call.sp, false, (int)(reply->retry_after_ms > RETRY_MS ? reply->retry_after_ms : RETRY_MS));
    }
out:
    return st;
}

/* Adds a page to the answer. */
static spurion_status answer_add(spurion_client *c, size_t *size, spurion_bytes page)
{
    size_t need = *size + page.size + 1;

    if (need > SPURION_DECODE_BYTES_MAX) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "answer: expected at most %u bytes, found more (ask for less)", SPURION_DECODE_BYTES_MAX);
    }
    if (need > c->answer_capacity) {
        size_t capacity = need > 2 * c->answer_capacity ? need : 2 * c->answer_capacity;
        char *grown = realloc(c->answer, capacity);
        if (!grown) {
            return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for an answer of %zu bytes", need);
        }
        c->answer = grown;
        c->answer_capacity = capacity;
    }
    if (page.size) {
        memcpy(c->answer + *size, page.data, page.size);
    }
    *size += page.size;
    c->answer[*size] = '\0';
    return spurion_ok();
}

spurion_status spurion_client_call(spurion_client *c, spurion_bytes *out, const char *method, spurion_bytes body, bool retry, int timeout_ms)
{
    spurion_status st;
    int64_t deadline = spurion_sp_now_ms() + (timeout_ms > 0 ? timeout_ms : c->timeout_ms);
    spurion_bytes key = {(const char *)c->key, sizeof c->key}, page = {NULL, 0};
    char token[PAGE_TOKEN_BYTES];
    size_t size = 0;
    int restarts = 0;

    if (!c->has_rpc) {
        return spurion_error(SPURION_FAILED_PRECONDITION, "%s: expected a handle opened with an rpc address", method);
    }
    for (size_t i = 0; ++c->key[i] == 0 && i + 1 < sizeof c->key; i++) {
    }
    for (bool more = true; more;) {
        spurion_reply reply;
        st = page_call(c, &reply, method, body, retry ? key : (spurion_bytes){NULL, 0}, page, retry, deadline);
        if (st.code == SPURION_NOT_FOUND && page.size && restarts++ < RESTARTS_MAX) { /* another daemon by now, or it forgot: from the start */
            page.size = 0;
            size = 0;
            continue;
        }
        SPURION_TRY(st, st);
        SPURION_TRY(st, answer_add(c, &size, reply.body));
        if (reply.next_page_token.size > sizeof token) {
            st = spurion_error(SPURION_INTERNAL, "%s: expected a page token of at most %zu bytes, found %zu", method, sizeof token,
                               reply.next_page_token.size);
            goto out;
        }
        if (reply.next_page_token.size) {
            memcpy(token, reply.next_page_token.data, reply.next_page_token.size);
        }
        page = (spurion_bytes){token, reply.next_page_token.size};
        more = page.size > 0;
    }
    out->data = c->answer;
    out->size = size;
out:
    return st;
}

/* A call whose request and reply are messages of codec.h. */
#define SPURION_CALL(c, method, encode, in, decode, out, retry, timeout_ms)                   \
    do {                                                                                      \
        spurion_status st;                                                                    \
        spurion_bytes body = {NULL, 0}, answer = {NULL, 0};                                   \
        spurion_memory m = spurion_pool_memory(&(c)->pool);                                   \
        SPURION_TRY(st, spurion_client_enter(c));                                             \
        SPURION_TRY(st, encode(&body, &m, in));                                               \
        spurion_pool_reset(&(c)->previous);                                                   \
        SPURION_TRY(st, spurion_client_call((c), &answer, method, body, retry, timeout_ms));  \
        SPURION_TRY(st, decode(out, &m, answer));                                             \
    out:                                                                                      \
        return spurion_client_fail((c), &st);                                                 \
    } while (0)

/* Requests without fields. */
static spurion_status encode_nothing(spurion_bytes *out, const spurion_memory *m, const void *in)
{
    (void)m;
    (void)in;
    out->data = "";
    out->size = 0;
    return spurion_ok();
}

spurion_code spurion_client_hello(spurion_client *c, spurion_hello_reply *out, int timeout_ms)
{
    spurion_hello in = {SPURION_PROTO_VERSION, SPURION_PROTO_VERSION, spurion_bytes_of(SPURION_VERSION)};
    SPURION_CALL(c, "Hello", spurion_codec_encode_hello, &in, spurion_codec_decode_hello_reply, out, false, timeout_ms);
}

spurion_code spurion_client_score(spurion_client *c, spurion_verdicts *out, const spurion_rollout *rollouts, int32_t count, bool want_tokens,
                                  int timeout_ms)
{
    spurion_score in = {{rollouts, NULL, count}, want_tokens, spurion_bytes_of(c->producer[0] ? c->producer : NULL)};
    SPURION_CALL(c, "Score", spurion_codec_encode_score, &in, spurion_codec_decode_score_reply, out, true, timeout_ms);
}

spurion_code spurion_client_submit(spurion_client *c, spurion_submit_reply *out, const spurion_rollout *rollouts, int32_t count, int timeout_ms)
{
    spurion_score in = {{rollouts, NULL, count}, false, spurion_bytes_of(c->producer[0] ? c->producer : NULL)};
    SPURION_CALL(c, "Submit", spurion_codec_encode_submit, &in, spurion_codec_decode_submit_reply, out, true, timeout_ms);
}

spurion_code spurion_client_query(spurion_client *c, spurion_query_reply *out, const spurion_query *query, int timeout_ms)
{
    SPURION_CALL(c, "Query", spurion_codec_encode_query, query, spurion_codec_decode_query_reply, out, false, timeout_ms);
}

spurion_code spurion_client_get(spurion_client *c, spurion_record *out, const spurion_key *key, int timeout_ms)
{
    SPURION_CALL(c, "Get", spurion_codec_encode_get, key, spurion_codec_decode_record, out, false, timeout_ms);
}

spurion_code spurion_client_counts(spurion_client *c, spurion_counts_reply *out, const spurion_counts *what, int timeout_ms)
{
    SPURION_CALL(c, "Counts", spurion_codec_encode_counts, what, spurion_codec_decode_counts_reply, out, false, timeout_ms);
}

spurion_code spurion_client_runs(spurion_client *c, spurion_runs_reply *out, const spurion_runs *what, int timeout_ms)
{
    SPURION_CALL(c, "Runs", spurion_codec_encode_runs, what, spurion_codec_decode_runs_reply, out, false, timeout_ms);
}

spurion_code spurion_client_alerts(spurion_client *c, spurion_alerts_reply *out, const spurion_alerts *what, int timeout_ms)
{
    SPURION_CALL(c, "Alerts", spurion_codec_encode_alerts, what, spurion_codec_decode_alerts_reply, out, false, timeout_ms);
}

spurion_code spurion_client_status(spurion_client *c, spurion_status_reply *out, int timeout_ms)
{
    SPURION_CALL(c, "Status", encode_nothing, NULL, spurion_codec_decode_status_reply, out, false, timeout_ms);
}

spurion_code spurion_client_catalogue(spurion_client *c, spurion_catalogue_reply *out, const spurion_page *page, int timeout_ms)
{
    SPURION_CALL(c, "Catalogue", spurion_codec_encode_catalogue, page, spurion_codec_decode_catalogue_reply, out, false, timeout_ms);
}

spurion_code spurion_client_rules(spurion_client *c, spurion_rules_reply *out, int timeout_ms)
{
    SPURION_CALL(c, "Rules", encode_nothing, NULL, spurion_codec_decode_rules_reply, out, false, timeout_ms);
}

spurion_code spurion_client_end_step(spurion_client *c, spurion_step_end_reply *out, const spurion_step_end *what, int timeout_ms)
{
    SPURION_CALL(c, "StepEnd", spurion_codec_encode_step_end, what, spurion_codec_decode_step_end_reply, out, false, timeout_ms);
}

/* See service_http.h. Memory: what belongs to a request lives in its call's arena; the list of calls in flight only links it. */
#include "daemon/service_http.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/base/check.h"
#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/base/sha256.h"
#include "daemon/dialect.h"
#include "daemon/pipeline_internal.h"
#include "daemon/service.h"
#include "daemon/service_metrics.h"

#define RETRY_AFTER_S 1
#define RUNS_MAX 64        /* runs whose step is remembered; a forgotten one goes on after its last step in the store */
#define STATUS_DIGITS 3
#define SHORT_HASH 8       /* bytes of a hash in a name */

static const spurion_bytes nothing = {NULL, 0};

/* ---- paths ---- */

typedef enum answer { ANSWER_REWARD, ANSWER_LIVE, ANSWER_READY, ANSWER_METRICS } answer;

typedef struct endpoint {
    const char *path;
    answer answer;
    spurion_dialect dialect;
} endpoint;

static const endpoint endpoints[] = {
    {"/get_reward", ANSWER_REWARD, SPURION_DIALECT_OPENRLHF},
    {"/remote_rm", ANSWER_REWARD, SPURION_DIALECT_SLIME},
    {"/remote_rm/verdict", ANSWER_REWARD, SPURION_DIALECT_SLIME_VERDICT},
    {"/classify", ANSWER_REWARD, SPURION_DIALECT_CLASSIFY},
    {"/v1/classify", ANSWER_REWARD, SPURION_DIALECT_V1_CLASSIFY},
    {"/pooling", ANSWER_REWARD, SPURION_DIALECT_POOLING},
    {"/v1/embeddings", ANSWER_REWARD, SPURION_DIALECT_EMBEDDINGS},
    {"/predict", ANSWER_REWARD, SPURION_DIALECT_PREDICT},
    {"/health", ANSWER_LIVE, 0},
    {"/healthz", ANSWER_LIVE, 0},
    {"/livez", ANSWER_LIVE, 0},
    {"/readyz", ANSWER_READY, 0},
    {"/metrics", ANSWER_METRICS, 0},
};

typedef struct target {
    const endpoint *endpoint;
    spurion_bytes run;         /* into the path, or the configuration */
    spurion_http_reward reward;
} target;

/* Takes "/word" from the front of *path. */
static bool take_word(const char **path, const char *word)
{
    size_t n = strlen(word);

    if ((*path)[0] != '/' || strncmp(*path + 1, word, n) != 0 || (*path)[1 + n] != '/') {
        return false;
    }
    *path += 1 + n;
    return true;
}

/* [/run/NAME][/clean | /counterfactual | /action]/endpoint */
static bool find_target(target *out, const spurion_config *config, const char *path)
{
    static const char *const rewards[] = {"clean", "counterfactual", "action"};
    bool prefixed = false;

    out->run = spurion_bytes_of(config->http.run);
    out->reward = config->http.reward;
    if (take_word(&path, "run")) {
        out->run = (spurion_bytes){path + 1, strcspn(path + 1, "/")};
        if (spurion_name_check(out->run, "run").code != SPURION_OK) {
            return false;
        }
        path += 1 + out->run.size;
        prefixed = true;
    }
    for (int i = 0; i < 3; i++) {
        if (take_word(&path, rewards[i])) {
            out->reward = (spurion_http_reward)i;
            prefixed = true;
            break;
        }
    }
    for (size_t i = 0; i < sizeof endpoints / sizeof *endpoints; i++) {
        if (strcmp(endpoints[i].path, path) == 0) {
            out->endpoint = &endpoints[i];
            return !prefixed || endpoints[i].answer == ANSWER_REWARD;
        }
    }
    return false;
}

static spurion_http_route route(void *context, const char *path)
{
    spurion_http_route r = {false, false, false};
    target t;

    if (find_target(&t, ((spurion_pipeline *)context)->config, path)) {
        r.found = true;
        r.post = t.endpoint->answer == ANSWER_REWARD;
        r.open = t.endpoint->answer == ANSWER_LIVE || t.endpoint->answer == ANSWER_READY;
    }
    return r;
}

/* ---- calls in flight ---- */

/* The HTTP side of a call. */
struct spurion_http_call {
    spurion_exchange *x;
    spurion_call *call;
    spurion_ask ask;
    spurion_http_reward reward;
    spurion_bytes run;
    unsigned char hash[SPURION_SHA256_BYTES]; /* of run, endpoint, reward and body */
    int repeat;                               /* which of the same requests that are in flight together */
    bool listed;
    struct spurion_http_call *next;
};

typedef struct run_step {
    char name[SPURION_NAME_BYTES_MAX];
    size_t size;
    int64_t step, rollouts, last_ms;
} run_step;

struct spurion_http_calls {
    pthread_mutex_t lock;       /* of the list */
    struct spurion_http_call *first;
    run_step runs[RUNS_MAX];    /* intake only; size 0: free */
};

spurion_status spurion_http_calls_create(spurion_http_calls **out)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "http: no memory");
    }
    pthread_mutex_init(&(*out)->lock, NULL);
    return spurion_ok();
}

/* Takes h out of the list: nobody finds it any more. */
static void unlist(spurion_http_calls *calls, struct spurion_http_call *h)
{
    pthread_mutex_lock(&calls->lock);
    for (struct spurion_http_call **at = &calls->first; h->listed && *at != NULL; at = &(*at)->next) {
        if (*at == h) {
            *at = h->next;
            break;
        }
    }
    h->listed = false;
    pthread_mutex_unlock(&calls->lock);
}

/* ---- answers ---- */

static void reply_json(spurion_exchange *x, int status, spurion_bytes json)
{
    spurion_http_reply(x, status, "application/json", json, 0);
}

void spurion_http_answer(spurion_pipeline *p, spurion_call *c, const spurion_status *st, spurion_bytes body)
{
    struct spurion_http_call *h = c->http;

    unlist(p->http_calls, h); /* from here on h->x is ours alone */
    c->http = NULL;
    if (st->code == SPURION_OK && body.size > STATUS_DIGITS) {
        int status = (body.data[0] - '0') * 100 + (body.data[1] - '0') * 10 + (body.data[2] - '0');
        reply_json(h->x, status, (spurion_bytes){body.data + STATUS_DIGITS, body.size - STATUS_DIGITS});
        return;
    }
    bool again = st->code == SPURION_UNAVAILABLE || st->code == SPURION_RESOURCE_EXHAUSTED;
    spurion_stat_add(p, SPURION_STAT_REQUESTS_REFUSED, 1);
    spurion_http_reply_error(h->x, spurion_http_status_of(st->code), st, again ? RETRY_AFTER_S : 0);
}

static bool is_transient(int code)
{
    return code == SPURION_RESOURCE_EXHAUSTED || code == SPURION_UNAVAILABLE || code == SPURION_INTERNAL || code == SPURION_ABORTED;
}

/* One rollout was refused: the whole answer is its error, by name. There is no place for it beside the others' rewards, and a 0 would lie. */
static void put_refusal(spurion_text *t, const struct spurion_http_call *h, const spurion_verdict *v, int32_t i)
{
    char message[SPURION_MESSAGE_BYTES + 64];

    char place[16] = "";

    if (!h->ask.single) {
        (void)snprintf(place, sizeof place, "[%d]", i);
    }
    (void)snprintf(message, sizeof message, "%s%s: %.*s", h->ask.field, place, (int)v->message.size, v->message.data);
    spurion_text_print(t, "%03d{\"error\":{\"code\":%d,\"type\":\"%s\",\"message\":", spurion_http_status_of(v->code),
                       spurion_http_status_of(v->code), spurion_code_name(v->code));
    spurion_json_put_string(t, spurion_bytes_of(message));
    spurion_text_add(t, ",\"run\":", 7);
    spurion_json_put_string(t, v->run);
    spurion_text_print(t, ",\"step\":%lld,\"group\":", (long long)v->step);
    spurion_json_put_string(t, v->group);
    spurion_text_add(t, ",\"rollout\":", 11);
    spurion_json_put_string(t, v->id);
    spurion_text_add(t, "}}", 2);
    spurion_log_warn("HTTP-ROLLOUT", "run %.*s step %lld rollout %.*s: %s %s", (int)v->run.size, v->run.data, (long long)v->step, (int)v->id.size,
                     v->id.data, spurion_code_name(v->code), message);
}

spurion_status spurion_http_body(spurion_bytes *out, bool *keep, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    struct spurion_http_call *h = c->http;
    spurion_verdict *verdicts = spurion_arena_take_array(&c->arena, (size_t)c->list.count + 1, sizeof *verdicts);
    spurion_text t;
    spurion_status st;
    int32_t refused = -1;

    memset(&t, 0, sizeof t);
    *keep = true;
    if (verdicts == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "request: no memory for the answer");
    }
    for (int32_t i = 0; i < c->list.count; i++) {
        SPURION_TRY(st, spurion_codec_decode_verdict(&verdicts[i], &m, c->items[i].answer));
        refused = refused < 0 && verdicts[i].code != SPURION_OK ? i : refused;
        *keep = *keep && !is_transient(verdicts[i].code);
    }
    if (refused >= 0) {
        put_refusal(&t, h, &verdicts[refused], refused);
    } else {
        spurion_text_add(&t, "200", STATUS_DIGITS);
        spurion_ask_write(&t, &h->ask, verdicts, h->reward, spurion_clock_wall_ms() / 1000);
    }
    out->data = t.failed ? NULL : spurion_arena_copy(&c->arena, t.data, t.size);
    out->size = t.size;
    st = out->data != NULL ? spurion_ok() : spurion_error(SPURION_RESOURCE_EXHAUSTED, "request: no memory for the answer");
out:
    spurion_text_fini(&t);
    return st;
}

/* ---- a reward request, on the HTTP thread ---- */

static spurion_status hash_add(spurion_sha256 *s, const void *data, size_t size)
{
    uint64_t n = size;
    spurion_status st = spurion_sha256_update(s, &n, sizeof n);

    return st.code == SPURION_OK && size > 0 ? spurion_sha256_update(s, data, size) : st;
}

static spurion_status hash_request(struct spurion_http_call *h, const target *t, spurion_bytes body)
{
    spurion_sha256 s = {NULL};
    unsigned char reward = (unsigned char)t->reward;
    spurion_status st;

    SPURION_TRY(st, spurion_sha256_init(&s));
    SPURION_TRY(st, hash_add(&s, t->run.data, t->run.size));
    SPURION_TRY(st, hash_add(&s, t->endpoint->path, strlen(t->endpoint->path)));
    SPURION_TRY(st, hash_add(&s, &reward, 1));
    SPURION_TRY(st, hash_add(&s, body.data, body.size));
    SPURION_TRY(st, spurion_sha256_finish(h->hash, &s));
out:
    spurion_sha256_fini(&s);
    return st;
}

static spurion_status fill_call(spurion_pipeline *p, spurion_call *c, const target *t, spurion_bytes body)
{
    const spurion_config *config = p->config;
    spurion_ask_options options = {config->http.text_form, config->http.completion_after, config->model.on_too_long == SPURION_TOO_LONG_TRUNCATE};
    spurion_memory m = spurion_arena_memory(&c->arena);
    struct spurion_http_call *h = c->http;
    spurion_refusal *refusals;
    char *key;
    spurion_status st;

    SPURION_TRY(st, spurion_ask_read(&h->ask, &m, t->endpoint->dialect, body, &options));
    SPURION_TRY(st, hash_request(h, t, body));
    h->reward = t->reward;
    h->run.data = spurion_arena_copy(&c->arena, t->run.data, t->run.size);
    h->run.size = t->run.size;
    key = spurion_arena_take(&c->arena, 2 * sizeof h->hash + 1);
    refusals = spurion_arena_take_array(&c->arena, (size_t)h->ask.count + 1, sizeof *refusals);
    if (h->run.data == NULL || key == NULL || refusals == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "request: no memory");
    }
    spurion_hex(key, h->hash, sizeof h->hash);
    c->request.idempotency_key = (spurion_bytes){key, 2 * sizeof h->hash};
    c->request.body = c->request.idempotency_key; /* the key is a hash of the whole request already */
    c->producer = spurion_bytes_of("http");
    c->list = (spurion_rollouts){h->ask.rollouts, refusals, h->ask.count};
    SPURION_TRY(st, spurion_call_reserve(p, c, body.size));
    SPURION_TRY(st, spurion_call_make_items(c));
out:
    return st;
}

static void answer_empty(spurion_exchange *x, const spurion_ask *ask, spurion_http_reward reward)
{
    spurion_text t;

    memset(&t, 0, sizeof t);
    spurion_ask_write(&t, ask, NULL, reward, spurion_clock_wall_ms() / 1000);
    reply_json(x, 200, (spurion_bytes){t.data, t.failed ? 0 : t.size});
    spurion_text_fini(&t);
}

static void ask_reward(spurion_pipeline *p, spurion_exchange *x, const target *t, spurion_bytes body)
{
    spurion_call *c = spurion_call_create(SPURION_CALL_SCORE, NULL);
    spurion_status st;

    spurion_stat_add(p, SPURION_STAT_REQUESTS, 1);
    if (c != NULL) {
        c->http = spurion_arena_take(&c->arena, sizeof *c->http);
    }
    if (c == NULL || c->http == NULL) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "request: no memory; try again");
        spurion_call_destroy(p, c);
        spurion_http_reply_error(x, 429, &st, RETRY_AFTER_S);
        return;
    }
    c->http->x = x;
    c->http->call = c;
    SPURION_TRY(st, spurion_service_check_open(p));
    SPURION_TRY(st, fill_call(p, c, t, body));
    if (c->list.count == 0) {
        answer_empty(x, &c->http->ask, t->reward);
        c->http = NULL;
        spurion_call_destroy(p, c);
        return;
    }
    spurion_stat_add(p, SPURION_STAT_RECEIVED, (uint64_t)c->list.count);
    spurion_queue_push(&p->intake, &c->node);
    return;
out:
    if (st.code == SPURION_INVALID_ARGUMENT && spurion_http_may_log(p->http)) {
        spurion_log_warn("HTTP-REQUEST", "%s: %s", t->endpoint->path, st.message);
    }
    if (st.code == SPURION_UNAVAILABLE && atomic_load(&p->state) == SPURION_STATE_SERVING) {
        st.code = SPURION_RESOURCE_EXHAUSTED; /* 429: too much of it, not: no service */
    } else if (st.code == SPURION_RESOURCE_EXHAUSTED && atomic_load(&p->store_blocked)) {
        st.code = SPURION_UNAVAILABLE;        /* 503: nobody's requests are taken */
    }
    spurion_service_answer(p, c, &st, nothing);
}

/* ---- names, on the intake's thread ---- */

/* The step after the last one of the run in the store; 0 for a new run. */
static int64_t next_step(spurion_pipeline *p, spurion_bytes run)
{
    spurion_store_query q;
    spurion_store_page page;
    spurion_arena arena;
    int64_t step = 0;

    memset(&q, 0, sizeof q);
    q.run = run;
    q.order = SPURION_ORDER_STEP;
    q.descending = true;
    q.limit = 1;
    spurion_arena_init(&arena, 0);
    do {
        if (spurion_store_query_page(&page, &arena, p->store, &q).code != SPURION_OK) {
            break;
        }
        if (page.row_count > 0) {
            step = page.rows[0].identity.step + 1;
            break;
        }
        q.cursor = page.cursor;
    } while (page.more);
    spurion_arena_fini(&arena);
    return step;
}

static run_step *find_run(spurion_pipeline *p, spurion_bytes run)
{
    run_step *all = p->http_calls->runs, *oldest = all;

    for (int i = 0; i < RUNS_MAX; i++) {
        if (all[i].size == run.size && memcmp(all[i].name, run.data, run.size) == 0) {
            return &all[i];
        }
        if (all[i].size == 0 || (oldest->size > 0 && all[i].last_ms < oldest->last_ms)) {
            oldest = &all[i];
        }
    }
    memcpy(oldest->name, run.data, oldest->size = run.size);
    oldest->step = next_step(p, run);
    oldest->rollouts = 0;
    oldest->last_ms = spurion_clock_ms();
    return oldest;
}

/* A step is so many rollouts, or ends with a pause in which the daemon has closed it. */
static int64_t step_of(spurion_pipeline *p, spurion_bytes run, int32_t count)
{
    run_step *r = find_run(p, run);
    int64_t now = spurion_clock_ms();

    if (r->rollouts >= p->config->http.step_rollouts || (r->rollouts > 0 && now - r->last_ms >= p->config->engine.step_wait_ms)) {
        r->step++;
        r->rollouts = 0;
    }
    r->rollouts += count;
    r->last_ms = now;
    return r->step;
}

/* Completions of one prompt are a group; where nobody knows the prompt, each rollout is alone. */
static spurion_bytes group_of(spurion_call *c, int32_t i, const char *request)
{
    unsigned char digest[SPURION_ROLLOUT_DIGEST_BYTES];
    char hex[2 * SHORT_HASH + 1];
    spurion_rollout prompt;

    if (!c->http->ask.divided[i]) {
        return spurion_bytes_of(spurion_arena_printf(&c->arena, "alone-%s-%d", request, i));
    }
    memset(&prompt, 0, sizeof prompt);
    prompt.completion = c->http->ask.prompts[i];
    spurion_rollout_digest(digest, &prompt);
    spurion_hex(hex, digest, SHORT_HASH);
    return spurion_bytes_of(spurion_arena_printf(&c->arena, "prompt-%s", hex));
}

void spurion_http_name(spurion_pipeline *p, spurion_call *c)
{
    struct spurion_http_call *h = c->http;
    int64_t step = step_of(p, h->run, c->list.count);
    char request[2 * SHORT_HASH + 1];

    spurion_hex(request, h->hash, SHORT_HASH);
    for (int32_t i = 0; i < c->list.count; i++) {
        spurion_rollout *r = &h->ask.rollouts[i];
        r->run = h->run;
        r->step = step;
        r->group = group_of(c, i, request);
        r->id = spurion_bytes_of(h->repeat == 0 ? spurion_arena_printf(&c->arena, "%s-%d", request, i)
                                                : spurion_arena_printf(&c->arena, "%s-%d.%d", request, i, h->repeat));
        r->group_size = h->ask.divided[i] ? p->config->http.group_size : 0;
        spurion_item_name(&c->items[i], r);
    }
}

bool spurion_http_admit(bool *repeated, spurion_pipeline *p, spurion_call *c)
{
    struct spurion_http_call *h = c->http;
    spurion_exchange *left = NULL;

    pthread_mutex_lock(&p->http_calls->lock);
    for (struct spurion_http_call *e = p->http_calls->first; e != NULL && left == NULL; e = e->next) {
        if (memcmp(e->hash, h->hash, sizeof h->hash) != 0) {
            continue;
        }
        if (spurion_http_gone(e->x)) { /* its client has given up and asks again: it gets that one's answer */
            left = e->x;
            e->x = h->x;
        } else {
            h->repeat = e->repeat >= h->repeat ? e->repeat + 1 : h->repeat;
        }
    }
    if (left == NULL) {
        h->listed = true;
        h->next = p->http_calls->first;
        p->http_calls->first = h;
    }
    pthread_mutex_unlock(&p->http_calls->lock);
    *repeated = h->repeat > 0;
    if (left != NULL) {
        spurion_status st = spurion_error(SPURION_CANCELLED, "request: the client has gone; another one waits for its answer");
        spurion_http_reply_error(left, spurion_http_status_of(st.code), &st, 0);
        c->http = NULL;
        spurion_call_destroy(p, c);
        return false;
    }
    return true;
}

/* ---- the port ---- */

static void request(void *context, spurion_exchange *x, const char *path, spurion_bytes body)
{
    spurion_pipeline *p = context;
    spurion_text t;
    target at;
    bool well = true;

    memset(&t, 0, sizeof t);
    if (!find_target(&at, p->config, path)) { /* the route was found a moment ago */
        spurion_status st = spurion_error(SPURION_NOT_FOUND, "path: expected an endpoint");
        spurion_http_reply_error(x, 404, &st, 0);
        return;
    }
    switch (at.endpoint->answer) {
    case ANSWER_REWARD: ask_reward(p, x, &at, body); return;
    case ANSWER_LIVE: well = spurion_pipeline_alive(p); break;
    case ANSWER_READY: well = spurion_pipeline_ready(p); break;
    case ANSWER_METRICS: spurion_metrics_print(&t, p); break;
    }
    if (at.endpoint->answer == ANSWER_METRICS) {
        spurion_http_reply(x, t.failed ? 500 : 200, "text/plain; version=0.0.4; charset=utf-8", (spurion_bytes){t.data, t.size}, 0);
    } else {
        spurion_http_reply(x, well ? 200 : 503, "text/plain", spurion_bytes_of(well ? "ok\n" : "not ready\n"), well ? 0 : RETRY_AFTER_S);
    }
    spurion_text_fini(&t);
}

static bool reserve(void *context, size_t bytes)
{
    spurion_pipeline *p = context;
    size_t before = atomic_fetch_add(&p->bytes, bytes);

    if (before > 0 && before + bytes > p->config->engine.queue_max) {
        atomic_fetch_sub(&p->bytes, bytes);
        return false;
    }
    return true;
}

static void release(void *context, size_t bytes)
{
    atomic_fetch_sub(&((spurion_pipeline *)context)->bytes, bytes);
}

spurion_status spurion_service_http_start(spurion_pipeline *p, bool insecure)
{
    const spurion_config *c = p->config;
    spurion_http_options options = {c->listen.http, c->http.token_file, c->http.body_max, c->http.connections_max, insecure};
    spurion_http_handlers handlers = {route, request, reserve, release, p};
    spurion_status st;

    if (c->listen.http == NULL) {
        return spurion_ok();
    }
    st = spurion_http_start(&p->http, &options, &handlers);
    if (st.code == SPURION_OK) {
        spurion_log_info("LISTEN", "http://%s, port %d%s", c->listen.http, spurion_http_port(p->http),
                         c->http.token_file != NULL ? ", with a token" : "");
    }
    return st;
}

/* Life of the daemon: opens everything in order, listens when the engine is ready, waits for signals, drains. See pipeline.h.
 * Thread: main for pipeline_run; the engine thread is here too. */
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "daemon/base/check.h"
#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/pipeline_internal.h"
#include "daemon/pipeline_sink.h"
#include "daemon/service.h"
#include "daemon/service_http.h"

#define TICK_MS 1000
#define RELOAD_WAIT_MS 5000      /* for verdicts under way, before a SIGHUP gives up */
#define LOADING_TICK_MS 20       /* while the inbox of an earlier life is being loaded */
#define INBOX_PAGE 16
#define TRIM_COUNT 1000
#define STACK_BYTES (1u << 20)
#define ENGINE_STALL_MS 120000   /* a turn of the engine that takes so long is no life: the supervisor is not told of one */

/* ---- what fails ---- */

void spurion_pipeline_fail(spurion_pipeline *p, int exit_status)
{
    int none = 0;

    if (atomic_compare_exchange_strong(&p->failed, &none, exit_status)) {
        (void)kill(getpid(), SIGTERM); /* wakes the main thread, which drains what can be drained */
    }
}

int spurion_pipeline_exit_of(int code)
{
    switch (code) {
    case SPURION_OK:
        return 0;
    case SPURION_DATA_LOSS:
        return 65;
    case SPURION_UNAVAILABLE:
        return 69;
    case SPURION_RESOURCE_EXHAUSTED:
        return 71;
    case SPURION_PERMISSION_DENIED:
        return 77;
    case SPURION_INVALID_ARGUMENT:
    case SPURION_NOT_FOUND:
    case SPURION_OUT_OF_RANGE:
    case SPURION_FAILED_PRECONDITION:
    case SPURION_UNIMPLEMENTED:
        return 78;
    default:
        return 70;
    }
}

/* ---- systemd: one datagram, no library (sd_notify(3)) ---- */

static void notify(const char *text)
{
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un to;
    size_t n = path != NULL ? strlen(path) : 0;
    int fd;

    if (n == 0 || n >= sizeof to.sun_path) {
        return;
    }
    memset(&to, 0, sizeof to);
    to.sun_family = AF_UNIX;
    memcpy(to.sun_path, path, n);
    if (path[0] == '@') {
        to.sun_path[0] = '\0';
    }
    fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd >= 0) {
        (void)sendto(fd, text, strlen(text), MSG_NOSIGNAL, (struct sockaddr *)&to, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n));
        (void)close(fd);
    }
}

/* ---- the engine thread ---- */

static int group_rows(void *context, spurion_job *const *jobs, int job_count)
{
    return spurion_engine_rows(((spurion_pipeline *)context)->engine, jobs, job_count);
}

/* Whether the store holds members of this group: a group that comes again is a later part of it. */
static bool came_before(void *context, const spurion_rollout *rollout)
{
    spurion_pipeline *p = context;
    spurion_store_query q;
    spurion_store_page page;
    spurion_arena arena;
    bool found = false;

    memset(&q, 0, sizeof q);
    q.run = rollout->run;
    q.group = rollout->group;
    q.has_step_min = q.has_step_max = true;
    q.step_min = q.step_max = rollout->step;
    q.limit = 1;
    spurion_arena_init(&arena, 0);
    do {
        if (spurion_store_query_page(&page, &arena, p->store, &q).code != SPURION_OK) {
            break;
        }
        found = page.row_count > 0;
        q.cursor = page.cursor;
    } while (!found && page.more);
    spurion_arena_fini(&arena);
    return found;
}

static void say_ready(spurion_pipeline *p, spurion_status st)
{
    pthread_mutex_lock(&p->ready_lock);
    p->ready = true;
    p->ready_status = st;
    pthread_cond_signal(&p->ready_cond);
    pthread_mutex_unlock(&p->ready_lock);
}

static spurion_status engine_open(spurion_pipeline *p)
{
    spurion_batcher_options options;
    spurion_status st;

    SPURION_TRY(st, spurion_engine_create(&p->engine, p->config));
    memset(&options, 0, sizeof options);
    options.rows_max = spurion_engine_batch_rows(p->engine);
    options.batch_wait_ms = p->config->engine.batch_wait_ms;
    options.group_wait_ms = p->config->engine.group_wait_ms;
    options.rows = group_rows;
    options.came_before = came_before;
    options.context = p;
    SPURION_TRY(st, spurion_batcher_create(&p->batcher, &options));
out:
    return st;
}

/* Judges one micro-batch and hands it to the sink. */
static void judge(spurion_pipeline *p, spurion_job **jobs, int count)
{
    bool skipped = atomic_load(&p->abandon);
    spurion_node *first = NULL, **tail = &first;
    spurion_status st = spurion_ok();

    if (!skipped) {
        for (int i = 0; i < count; i++) {
            atomic_store(&((spurion_item *)jobs[i]->delivery)->flight.stage, SPURION_STAGE_JUDGING);
        }
        while (atomic_load(&p->reloading)) {
            (void)nanosleep(&(struct timespec){0, 1000000}, NULL);
        }
        pthread_mutex_lock(&p->gate);
        st = spurion_engine_judge(p->engine, jobs, count);
        atomic_fetch_add(&p->judged, count);
        pthread_mutex_unlock(&p->gate);
        spurion_stat_add(p, SPURION_STAT_BATCHES, 1);
    }
    if (st.code == SPURION_INTERNAL) { /* a device that failed once is not trusted with the next one */
        spurion_log_error("ENGINE-FAILED", "%s", st.message);
        atomic_store(&p->abandon, true);
        spurion_pipeline_fail(p, 70);
    }
    for (int i = 0; i < count; i++) {
        spurion_item *it = jobs[i]->delivery;
        it->judged = !skipped;
        if (skipped || st.code == SPURION_INTERNAL) {
            it->fate = SPURION_FATE_ABANDONED;
        } else if (st.code != SPURION_OK) {
            spurion_job_refuse(&it->job, &st);
        }
        atomic_store(&it->flight.stage, SPURION_STAGE_STORING);
        it->node.next = NULL;
        *tail = &it->node;
        tail = &it->node.next;
    }
    spurion_queue_push_list(&p->sink, first);
}

static void *engine_main(void *arg)
{
    spurion_pipeline *p = arg;
    spurion_job **jobs = calloc(SPURION_BATCH_ROLLOUTS_MAX, sizeof *jobs);
    spurion_status st = jobs != NULL ? engine_open(p) : spurion_error(SPURION_RESOURCE_EXHAUSTED, "engine: no memory");
    bool ok = st.code == SPURION_OK;
    int count;

    say_ready(p, st);
    while (ok) {
        atomic_store(&p->engine_tick_ms, INT64_MAX); /* waiting is no stall */
        st = spurion_batcher_take(jobs, &count, p->batcher, SPURION_BATCH_ROLLOUTS_MAX);
        if (st.code != SPURION_OK) {
            break;
        }
        atomic_store(&p->engine_tick_ms, spurion_clock_ms());
        judge(p, jobs, count);
    }
    free(jobs);
    return NULL;
}

/* ---- opening ---- */

/* A mark of a producer, for ingest_producers. The bytes live until the next call on this thread; the table's lock serialises them. */
typedef struct mark_loader {
    spurion_pipeline *p;
    spurion_arena arena;
} mark_loader;

static spurion_status load_mark(void *context, spurion_bytes *mark, spurion_bytes run, spurion_bytes producer, uint64_t epoch)
{
    mark_loader *l = context;

    spurion_arena_reset(&l->arena);
    return spurion_store_mark_get(mark, &l->arena, l->p->store, run, producer, epoch);
}

static spurion_status check_config(const spurion_config *config)
{
    if (config->store.path == NULL) {
        return spurion_error(SPURION_FAILED_PRECONDITION, "store.path: expected a directory (what is acknowledged must be kept), found none");
    }
    if (config->listen.rpc_count == 0) {
        return spurion_error(SPURION_FAILED_PRECONDITION, "listen.rpc: expected at least one address, found none");
    }
    return spurion_ok();
}

static spurion_bytes *rule_ids(const spurion_config *config)
{
    spurion_bytes *ids = calloc((size_t)config->rule_count + 1, sizeof *ids);

    for (int32_t i = 0; ids != NULL && i < config->rule_count; i++) {
        ids[i] = spurion_bytes_of(config->rules[i].id);
    }
    return ids;
}

static spurion_status open_parts(spurion_pipeline *p, mark_loader *loader)
{
    spurion_store_options options = {p->config->store.path, false, 0};
    spurion_transport_handlers handlers = {spurion_service_request, spurion_service_tap, p};
    spurion_status st;

    p->rules = rule_ids(p->config);
    if (p->rules == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "daemon: no memory");
    }
    SPURION_TRY(st, spurion_store_open(&p->store, &options));
    SPURION_TRY(st, spurion_flights_create(&p->flights));
    SPURION_TRY(st, spurion_producers_create(&p->producers, load_mark, loader));
    SPURION_TRY(st, spurion_pages_create(&p->pages));
    SPURION_TRY(st, spurion_steps_open(p));
    SPURION_TRY(st, spurion_http_calls_create(&p->http_calls));
    SPURION_TRY(st, spurion_transport_create(&p->transport, &handlers));
out:
    return st;
}

/* name: what `top -H` shows, at most 15 bytes. */
static spurion_status thread_start(pthread_t *out, const char *name, void *(*run)(void *), spurion_pipeline *p, size_t stack_bytes)
{
    pthread_attr_t attr;
    int rc;

    pthread_attr_init(&attr);
    if (stack_bytes > 0) {
        pthread_attr_setstacksize(&attr, stack_bytes);
    }
    rc = pthread_create(out, &attr, run, p);
    pthread_attr_destroy(&attr);
    if (rc == 0) {
        (void)pthread_setname_np(*out, name);
    }
    return rc == 0 ? spurion_ok() : spurion_error(SPURION_RESOURCE_EXHAUSTED, "thread: %s", strerror(rc));
}

static int wait_signal(const sigset_t *set, int ms)
{
    struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000};
    int s = sigtimedwait(set, NULL, &t);
    return s < 0 ? 0 : s;
}

/* Loading a large model takes minutes: the supervisor is told to wait, and a signal ends it at once (nothing is begun yet). */
static spurion_status wait_ready(spurion_pipeline *p, const sigset_t *set)
{
    bool ready = false;

    while (!ready) {
        int s = wait_signal(set, 5);
        if (s == SIGTERM || s == SIGINT) {
            return spurion_error(SPURION_CANCELLED, "stopped while the model was loading");
        }
        notify("EXTEND_TIMEOUT_USEC=30000000");
        pthread_mutex_lock(&p->ready_lock);
        if (!p->ready) {
            struct timespec at;
            clock_gettime(CLOCK_REALTIME, &at);
            at.tv_nsec += 100000000;
            at.tv_sec += at.tv_nsec / 1000000000;
            at.tv_nsec %= 1000000000;
            pthread_cond_timedwait(&p->ready_cond, &p->ready_lock, &at);
        }
        ready = p->ready;
        pthread_mutex_unlock(&p->ready_lock);
    }
    return p->ready_status;
}

static spurion_status keep_provenance(spurion_pipeline *p)
{
    char key[64];

    (void)snprintf(key, sizeof key, "provenance/%s", spurion_engine_provenance(p->engine));
    return spurion_store_meta_put(p->store, spurion_bytes_of(key), spurion_bytes_of(spurion_engine_provenance_text(p->engine)));
}

static spurion_status listen_all(spurion_pipeline *p)
{
    const struct {
        spurion_channel channel;
        const char **urls;
        int32_t count;
    } lists[] = {{SPURION_CHANNEL_RPC, p->config->listen.rpc, p->config->listen.rpc_count},
                 {SPURION_CHANNEL_ROLLOUTS, p->config->listen.rollouts, p->config->listen.rollouts_count},
                 {SPURION_CHANNEL_ALERTS, p->config->listen.alerts, p->config->listen.alerts_count}};
    const char *text = getenv("SPURION_INSECURE_LISTEN");
    bool insecure = text != NULL && strcmp(text, "1") == 0;
    spurion_status st = spurion_ok();

    if (insecure) {
        spurion_log_warn("LISTEN-INSECURE", "SPURION_INSECURE_LISTEN=1: anyone who reaches the ports may use them");
    }
    spurion_transport_start(p->transport); /* before the listeners, so that nobody connects to a deaf socket */
    for (int i = 0; i < 3; i++) {
        for (int32_t k = 0; k < lists[i].count; k++) {
            SPURION_TRY(st, spurion_transport_listen(p->transport, lists[i].channel, lists[i].urls[k], insecure));
            spurion_log_info("LISTEN", "%s", lists[i].urls[k]);
        }
    }
    SPURION_TRY(st, spurion_service_http_start(p, insecure));
out:
    return st;
}

/* ---- the inbox of an earlier life ---- */

/* Takes one entry to the intake. UNAVAILABLE: the queue is full, later. */
static spurion_status inbox_take(spurion_pipeline *p, const spurion_store_inbox_entry *entry)
{
    spurion_call *c = spurion_call_create(SPURION_CALL_INBOX, NULL);
    spurion_score in;
    spurion_memory m;
    spurion_status st;

    if (c == NULL) {
        return spurion_error(SPURION_UNAVAILABLE, "inbox: no memory now");
    }
    m = spurion_arena_memory(&c->arena);
    c->ticket = entry->ticket;
    SPURION_TRY(st, spurion_codec_decode_submit(&in, &m, entry->value));
    c->list = in.list;
    c->producer = in.producer;
    SPURION_TRY(st, spurion_call_reserve(p, c, entry->value.size));
    SPURION_TRY(st, spurion_call_make_items(c));
    spurion_queue_push(&p->intake, &c->node);
    c = NULL;
out:
    spurion_call_destroy(p, c);
    return st;
}

/* Loads what fits. *after: the last ticket taken. true: all is loaded. */
static bool inbox_load(spurion_pipeline *p, uint64_t *after)
{
    spurion_store_inbox_entry *entries;
    spurion_arena arena;
    spurion_status st;
    int32_t count, damaged = 0;
    bool done = true;

    spurion_arena_init(&arena, 0);
    for (;;) {
        st = spurion_store_inbox(&entries, &count, &damaged, &arena, p->store, *after, INBOX_PAGE);
        if (st.code != SPURION_OK || damaged > 0) {
            spurion_log_error("INBOX-DAMAGED", "%d entries of the inbox cannot be read: %s", damaged, st.message);
        }
        if (st.code != SPURION_OK || count == 0) {
            break;
        }
        for (int32_t i = 0; i < count; i++) {
            if (entries[i].ticket >= atomic_load(&p->first_ticket)) {
                goto out; /* of this life: the desk has sent it on */
            }
            st = inbox_take(p, &entries[i]);
            if (st.code == SPURION_UNAVAILABLE) {
                done = false;
                goto out;
            }
            if (st.code != SPURION_OK) {
                spurion_log_error("INBOX-ENTRY", "entry %llu cannot be judged and stays: %s", (unsigned long long)entries[i].ticket, st.message);
            }
            *after = entries[i].ticket;
        }
        spurion_arena_reset(&arena);
    }
out:
    spurion_arena_fini(&arena);
    return done;
}

/* ---- waiting and draining ---- */

bool spurion_pipeline_alive(spurion_pipeline *p)
{
    int64_t began = atomic_load(&p->engine_tick_ms);

    return began == INT64_MAX || spurion_clock_ms() - began < ENGINE_STALL_MS;
}

bool spurion_pipeline_ready(spurion_pipeline *p)
{
    spurion_store_stats stats;

    spurion_store_stats_get(&stats, p->store);
    return atomic_load(&p->state) == SPURION_STATE_SERVING && !atomic_load(&p->store_blocked) && stats.writable && !stats.low_space;
}

static void tick(spurion_pipeline *p)
{
    spurion_store_stats stats;

    spurion_store_stats_get(&stats, p->store);
    if (stats.failed) {
        spurion_pipeline_fail(p, 74);
    }
    if (spurion_pipeline_alive(p)) {
        notify("WATCHDOG=1");
    }
    spurion_status st = spurion_store_trim(NULL, p->store, spurion_clock_wall_ms(), TRIM_COUNT);
    if (st.code != SPURION_OK && st.code != SPURION_RESOURCE_EXHAUSTED) {
        spurion_log_warn("STORE-TRIM", "%s", st.message);
    }
}

static void log_state(spurion_pipeline *p)
{
    spurion_log_info("STATE", "in_flight=%lld bytes=%zu judged=%llu refused=%llu flagged=%llu alerts=%llu",
                     (long long)spurion_flights_count(p->flights), atomic_load(&p->bytes),
                     (unsigned long long)atomic_load(&p->counts[SPURION_STAT_JUDGED]),
                     (unsigned long long)atomic_load(&p->counts[SPURION_STAT_REFUSED]),
                     (unsigned long long)atomic_load(&p->counts[SPURION_STAT_FLAGGED]),
                     (unsigned long long)atomic_load(&p->counts[SPURION_STAT_ALERTS]));
}

/* ---- SIGHUP ---- */

/* Waits until no verdict is under way (the engine is at the gate, the sink has let everything go) and takes the policy for writing. false: not in
 * time, because the store has no space. */
static bool take_policy(spurion_pipeline *p)
{
    int64_t end = spurion_clock_ms() + RELOAD_WAIT_MS;

    while (atomic_load(&p->judged) > 0 || pthread_rwlock_trywrlock(&p->policy) != 0) {
        if (spurion_clock_ms() >= end) {
            return false;
        }
        (void)nanosleep(&(struct timespec){0, 1000000}, NULL);
    }
    return true;
}

/* Puts the new rules in force and gives the policy back. Frees what held the old ones. */
static void put_in_force(spurion_pipeline *p, spurion_config *fresh, spurion_bytes *ids, spurion_engine_reload *reload)
{
    p->active.rules = fresh->rules;
    p->active.rule_count = fresh->rule_count;
    p->active.catalogue = fresh->catalogue;
    spurion_engine_reload_apply(p->engine, reload);
    free(p->rules);
    p->rules = ids;
    pthread_rwlock_unlock(&p->policy);
    if (p->reloaded != NULL) {
        spurion_config_fini(p->reloaded);
        free(p->reloaded);
    }
    p->reloaded = fresh;
}

/* Reads the configuration again; what was judged before ends with the old rules, what is judged after has the new ones. */
static spurion_status reload(spurion_pipeline *p)
{
    spurion_config *fresh = calloc(1, sizeof *fresh), merged = p->active;
    spurion_engine_reload *made = NULL;
    spurion_bytes *ids = NULL;
    char names[400];
    bool still;
    spurion_status st;

    if (fresh == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory");
    }
    SPURION_TRY(st, spurion_config_load(fresh, p->source->path, p->source->overrides, p->source->override_count));
    spurion_config_difference(names, sizeof names, p->config, fresh);
    merged.rules = fresh->rules;
    merged.rule_count = fresh->rule_count;
    merged.catalogue = fresh->catalogue;
    ids = rule_ids(fresh);
    if (ids == NULL) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory");
        goto out;
    }
    for (int32_t i = 0; i < fresh->rule_count; i++) { /* reward.sd stays what it was at the start */
        if (fresh->rules[i].has_effect_sd_min && !p->active.reward.has_sd) {
            st = spurion_error(SPURION_FAILED_PRECONDITION, "rule '%s': effect_sd_min expected reward.sd at the start, found none", fresh->rules[i].id);
            goto out;
        }
    }
    SPURION_TRY(st, spurion_engine_reload_make(&made, p->engine, &merged));
    atomic_store(&p->reloading, true);
    pthread_mutex_lock(&p->gate);
    still = take_policy(p);
    if (still) {
        put_in_force(p, fresh, ids, made);
        fresh = NULL;
        ids = NULL;
    }
    pthread_mutex_unlock(&p->gate);
    atomic_store(&p->reloading, false);
    if (!still) {
        spurion_engine_reload_destroy(made);
        st = spurion_error(SPURION_UNAVAILABLE, "expected verdicts to be stored within %d ms, found some still waiting; send SIGHUP again", RELOAD_WAIT_MS);
        goto out;
    }
    if (names[0] != '\0') {
        spurion_log_warn("CONFIG-RESTART", "changed, and in force only after a restart: %s", names);
    }
    st = keep_provenance(p);
    if (st.code != SPURION_OK) { /* the rules are in force all the same */
        spurion_log_error("PROVENANCE", "what %s stands for is not stored: %s", spurion_engine_provenance(p->engine), st.message);
        st = spurion_ok();
    }
out:
    free(ids);
    if (fresh != NULL) {
        spurion_config_fini(fresh);
        free(fresh);
    }
    return st;
}

static void hang_up(spurion_pipeline *p)
{
    spurion_status st = reload(p);

    if (st.code != SPURION_OK) {
        spurion_log_error("CONFIG-RELOAD", "kept the rules and catalogue in force: %s", st.message);
    } else {
        spurion_log_info("CONFIG-RELOAD", "%d rules in force; provenance %s", p->config->rule_count, spurion_engine_provenance(p->engine));
    }
    st = p->http != NULL ? spurion_http_reload(p->http) : spurion_ok();
    if (st.code != SPURION_OK) {
        spurion_log_error("HTTP-TOKEN", "kept the tokens in force: %s", st.message);
    }
}

static void serve(spurion_pipeline *p, const sigset_t *set)
{
    uint64_t after = 0;
    bool loaded = false;
    int64_t next = 0;

    for (;;) {
        int s = wait_signal(set, loaded ? TICK_MS : LOADING_TICK_MS);
        if (s == SIGTERM || s == SIGINT) {
            return;
        }
        if (s == SIGUSR1) {
            log_state(p);
        } else if (s == SIGHUP) {
            hang_up(p);
        }
        if (!loaded) {
            loaded = inbox_load(p, &after);
        }
        if (spurion_clock_ms() >= next) {
            next = spurion_clock_ms() + TICK_MS;
            tick(p);
        }
    }
}

typedef struct threads {
    pthread_t intake, engine, sink, desk;
} threads;

/* Joins a thread. false: a second signal came, or the time is over. With finish_ms: work is abandoned when it is over. */
static bool join(spurion_pipeline *p, pthread_t thread, const sigset_t *set, int64_t abandon_ms, int64_t stop_ms)
{
    while (pthread_tryjoin_np(thread, NULL) == EBUSY) {
        int64_t now = spurion_clock_ms();
        int s;
        if (now >= abandon_ms) {
            atomic_store(&p->abandon, true);
        }
        if (now >= stop_ms) {
            spurion_log_error("DRAIN-LATE", "a thread is still busy after %d ms; leaving it", SPURION_STOP_MS);
            return false;
        }
        s = wait_signal(set, 10);
        if ((s == SIGTERM || s == SIGINT) && atomic_load(&p->failed) == 0) {
            spurion_log_warn("STOP-NOW", "second signal: leaving at once; what is not acknowledged comes again");
            return false;
        }
    }
    return true;
}

/* From the front to the back, each stage after the one that feeds it. */
static bool drain(spurion_pipeline *p, const threads *t, const sigset_t *set)
{
    int64_t start = spurion_clock_ms(), abandon_ms = start + SPURION_DRAIN_MS, stop_ms = start + SPURION_STOP_MS;

    atomic_store(&p->state, SPURION_STATE_DRAINING);
    if (atomic_load(&p->failed) != 0) {
        atomic_store(&p->abandon, true);
    }
    notify("STOPPING=1");
    spurion_log_info("DRAIN", "no new work; %lld rollouts in flight", (long long)spurion_flights_count(p->flights));
    if (p->http != NULL) {
        spurion_http_quiesce(p->http);
    }
    spurion_queue_close(&p->desk);
    if (!join(p, t->desk, set, abandon_ms, stop_ms)) {
        return false;
    }
    spurion_queue_close(&p->intake);
    if (!join(p, t->intake, set, abandon_ms, stop_ms)) {
        return false;
    }
    spurion_batcher_drain(p->batcher);
    if (!join(p, t->engine, set, abandon_ms, stop_ms)) {
        return false;
    }
    spurion_queue_close(&p->sink);
    return join(p, t->sink, set, abandon_ms, stop_ms);
}

static void init_shared(spurion_pipeline *p, const spurion_config *config)
{
    memset(p, 0, sizeof *p);
    p->active = *config;
    p->config = &p->active;
    pthread_rwlock_init(&p->policy, NULL);
    pthread_mutex_init(&p->gate, NULL);
    p->start_ms = spurion_clock_ms();
    spurion_queue_init(&p->intake);
    spurion_queue_init(&p->sink);
    spurion_queue_init(&p->desk);
    pthread_mutex_init(&p->ready_lock, NULL);
    pthread_cond_init(&p->ready_cond, NULL);
    atomic_store(&p->first_ticket, UINT64_MAX);
    atomic_store(&p->engine_tick_ms, INT64_MAX);
}

static int fail_start(const char *what, const spurion_status *st)
{
    if (st->code == SPURION_CANCELLED) {
        spurion_log_info("STOPPED", "%s", st->message);
        return 0;
    }
    spurion_log_error(what, "%s: %s", spurion_code_name(st->code), st->message);
    fprintf(stderr, "spuriond: %s: %s\n", spurion_code_name(st->code), st->message);
    notify("STATUS=failed to start");
    return spurion_pipeline_exit_of(st->code);
}

static int run(spurion_pipeline *p, mark_loader *loader, const sigset_t *set)
{
    threads t;
    spurion_status st;
    int status;

    SPURION_TRY(st, check_config(p->config));
    SPURION_TRY(st, open_parts(p, loader)); /* first: what is wrong with the store is known before the model is read */
    notify("STATUS=loading the model");
    SPURION_TRY(st, thread_start(&t.engine, "engine", engine_main, p, 0)); /* its stack: the engine's libraries decide */
    SPURION_TRY(st, wait_ready(p, set));
    SPURION_TRY(st, keep_provenance(p));
    SPURION_TRY(st, thread_start(&t.sink, "sink", spurion_sink_main, p, STACK_BYTES));
    SPURION_TRY(st, thread_start(&t.intake, "intake", spurion_ingest_main, p, STACK_BYTES * 2));
    SPURION_TRY(st, thread_start(&t.desk, "desk", spurion_desk_main, p, STACK_BYTES * 2));
    atomic_store(&p->state, SPURION_STATE_SERVING);
    SPURION_TRY(st, listen_all(p));
    notify("READY=1\nSTATUS=serving");
    spurion_log_info("READY", "serving; provenance %s", spurion_engine_provenance(p->engine));
    serve(p, set);
    if (!drain(p, &t, set)) {
        status = atomic_load(&p->failed);
        return status != 0 ? status : 75; /* threads are left behind: nothing they use may be closed */
    }
    spurion_store_close(p->store);
    status = atomic_load(&p->failed);
    spurion_log_info("STOPPED", "exit status %d", status);
    return status;
out:
    return fail_start("START-FAILED", &st);
}

int spurion_pipeline_run(const spurion_config *config, const spurion_source *source)
{
    spurion_pipeline *p = calloc(1, sizeof *p);
    mark_loader *loader = calloc(1, sizeof *loader);
    sigset_t set;

    if (p == NULL || loader == NULL) {
        free(p);
        free(loader);
        return 71;
    }
    /* A rollout's memory is a few chunks of 256 KiB, mostly untouched. Mapped one by one they go back whole; from the heap, where glibc
     * moves them after the first free, they would stay as touched pages, and 22 threads have heaps of their own. */
    (void)mallopt(M_MMAP_THRESHOLD, 128 << 10);
    (void)mallopt(M_ARENA_MAX, 4);
    sigemptyset(&set); /* before any thread starts, so that all of them inherit it */
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    init_shared(p, config);
    p->source = source;
    loader->p = p;
    spurion_arena_init(&loader->arena, 0);
    return run(p, loader, &set); /* p stays: nng's threads may still look at it until _exit */
}

/* libspurion against a small daemon made of nng sockets: the ring's policies with exact counts, refilling, fork, peers that never answer,
 * memory, pages, retries, alerts in order. The daemon is a child process, which ends as a crash does, by SIGKILL: libnng 1.5.2's nng_close, which
 * spuriond does not use, hangs now and then (its reaper waits for a connection that is just being made). What it notes is shared memory. */
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

#include <nng/nng.h>
#include <nng/protocol/pubsub0/pub.h>
#include <nng/protocol/pubsub0/sub.h>
#include <nng/protocol/reqrep0/rep.h>

#include "spurion/client.h"
#include "spurion/codec.h"

#define BATCHES_MAX 4096
#define PATIENCE_MS 20000
#define QUERY_ROWS 500
#define MEMORY_BYTES ((size_t)32 << 20)
#define ALERTS_MAX 8
#define WAITED_MS_MAX 5000 /* of calls that may take 150 ms, on a machine that does other things too; for ever is longer */

/* --- a daemon --- */

typedef struct fake {
    char folder[64], rpc[128], tap[128], alerts[128];
    pid_t pid;                        /* 0: it does not run */
    pthread_mutex_t lock;             /* between the processes */
    char *memory;                     /* of one request; in the daemon's process */
    size_t memory_used;
    /* under the lock */
    bool received[BATCHES_MAX + 1], lost[BATCHES_MAX + 1], deaf_to[BATCHES_MAX + 1];
    int rollouts_of[BATCHES_MAX + 1], twice, syncs, fills, hellos;
    uint64_t lost_rollouts, highest;
    int64_t step_end;
    bool closing;
    size_t page_bytes;                /* 0: answers are not paged */
    int forget_pages, busy;           /* this many times: an unknown page token; UNAVAILABLE */
    char *kept;                       /* answer whose pages are asked for; in the daemon's process */
    size_t kept_size;
    char keys[16][16];                /* idempotency keys of Score requests */
    int key_count;
    char cursor[32];                  /* of the last query */
    uint64_t alert_epoch, alert_last;
    uint64_t to_send[ALERTS_MAX];     /* numbers of alerts for the live channel */
    int to_send_count;
} fake;

/* In the daemon's process, which has no test around it. */
static void must(bool right)
{
    if (!right) {
        abort();
    }
}

static void hold(fake *f)
{
    must(pthread_mutex_lock(&f->lock) == 0);
}

static void let_go(fake *f)
{
    must(pthread_mutex_unlock(&f->lock) == 0);
}

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void *take(void *context, size_t bytes)
{
    fake *f = context;
    void *out = f->memory + f->memory_used;

    bytes = (bytes + 15) & ~(size_t)15;
    if (f->memory_used + bytes > MEMORY_BYTES) {
        return NULL;
    }
    f->memory_used += bytes;
    return out;
}

static void note_tap(fake *f, const spurion_memory *m, spurion_bytes in, bool live)
{
    spurion_tap tap;
    spurion_status st = spurion_codec_decode_tap(&tap, m, in);

    must(st.code == SPURION_OK && tap.sequence >= 1 && tap.sequence <= BATCHES_MAX);
    if (live && f->deaf_to[tap.sequence]) {
        return;
    }
    f->twice += f->received[tap.sequence];
    f->received[tap.sequence] = true;
    f->rollouts_of[tap.sequence] = tap.list.count;
    f->step_end = tap.has_step_end ? tap.step_end : f->step_end;
}

static spurion_status on_sync(spurion_bytes *body, fake *f, const spurion_memory *m, spurion_bytes in)
{
    spurion_status st;
    spurion_sync s;
    spurion_sync_reply r = {0};
    spurion_range *missing = take(f, BATCHES_MAX * sizeof *missing);

    SPURION_TRY(st, spurion_codec_decode_sync(&s, m, in));
    f->syncs++;
    f->highest = s.last_sequence;
    f->lost_rollouts = s.lost_rollouts;
    f->closing = s.closing;
    for (int32_t i = 0; i < s.lost_count; i++) {
        for (uint64_t n = s.lost[i].first; n <= s.lost[i].last; n++) {
            f->lost[n] = true;
        }
    }
    while (r.stored_through < s.last_sequence && (f->received[r.stored_through + 1] || f->lost[r.stored_through + 1])) {
        r.stored_through++;
    }
    for (uint64_t n = r.stored_through + 1; n <= s.last_sequence; n++) {
        if (!f->received[n] && !f->lost[n]) {
            missing[r.missing_count].first = missing[r.missing_count].last = n;
            r.missing_count += r.missing_count < 1000;
        }
    }
    r.missing = missing;
    SPURION_TRY(st, spurion_codec_encode_sync_reply(body, m, &r));
out:
    return st;
}

static spurion_status on_fill(spurion_bytes *body, fake *f, const spurion_memory *m, spurion_bytes in)
{
    spurion_status st;
    spurion_fill fill;
    spurion_fill_reply r = {0};

    SPURION_TRY(st, spurion_codec_decode_fill(&fill, m, in));
    f->fills++;
    for (int32_t i = 0; i < fill.count; i++) {
        note_tap(f, m, fill.taps[i], false);
        r.taken++;
    }
    SPURION_TRY(st, spurion_codec_encode_fill_reply(body, m, &r));
out:
    return st;
}

static spurion_status on_query(spurion_bytes *body, fake *f, const spurion_memory *m, spurion_bytes in)
{
    spurion_status st;
    spurion_query q;
    spurion_row *rows = take(f, QUERY_ROWS * sizeof *rows);
    spurion_query_reply r = {rows, QUERY_ROWS, spurion_bytes_of("the-cursor")};

    SPURION_TRY(st, spurion_codec_decode_query(&q, m, in));
    (void)snprintf(f->cursor, sizeof f->cursor, "%.*s", (int)q.cursor.size, q.cursor.data ? q.cursor.data : "");
    memset(rows, 0, QUERY_ROWS * sizeof *rows);
    for (int i = 0; i < QUERY_ROWS; i++) {
        rows[i].key.run = rows[i].key.group = rows[i].key.id = spurion_bytes_of("name");
        rows[i].key.step = i;
    }
    SPURION_TRY(st, spurion_codec_encode_query_reply(body, m, &r));
out:
    return st;
}

static spurion_status on_score(spurion_bytes *body, fake *f, const spurion_memory *m, spurion_bytes in, spurion_bytes key)
{
    spurion_status st;
    spurion_score s;
    spurion_verdict *v;
    spurion_verdicts r;

    must(key.size == 16);
    memcpy(f->keys[f->key_count++ % 16], key.data, 16);
    if (f->busy-- > 0) {
        return spurion_error(SPURION_UNAVAILABLE, "busy");
    }
    SPURION_TRY(st, spurion_codec_decode_score(&s, m, in));
    v = take(f, (size_t)s.list.count * sizeof *v);
    memset(v, 0, (size_t)s.list.count * sizeof *v);
    for (int32_t i = 0; i < s.list.count; i++) {
        v[i].run = s.list.rollouts[i].run;
        v[i].group = s.list.rollouts[i].group;
        v[i].id = s.list.rollouts[i].id;
        v[i].has_step = true;
        v[i].reward = (float)i;
        v[i].scored_position = -1;
    }
    r.verdicts = v;
    r.count = s.list.count;
    SPURION_TRY(st, spurion_codec_encode_score_reply(body, m, &r));
out:
    return st;
}

static void make_alert(spurion_alert *a, uint64_t epoch, uint64_t seq)
{
    memset(a, 0, sizeof *a);
    a->epoch = epoch;
    a->seq = seq;
    a->kind = SPURION_ALERT_KIND_RATE;
    a->run = spurion_bytes_of("run");
    a->rule = spurion_bytes_of("rule");
    a->step = (int64_t)seq;
}

static spurion_status on_alerts(spurion_bytes *body, fake *f, const spurion_memory *m, spurion_bytes in)
{
    spurion_status st;
    spurion_alerts q;
    spurion_alert list[3];
    spurion_alerts_reply r = {list, 0, f->alert_epoch, f->alert_last, 0};

    SPURION_TRY(st, spurion_codec_decode_alerts(&q, m, in));
    r.next_seq = q.from_seq == 0 || (q.epoch && q.epoch != f->alert_epoch) ? 1 : q.from_seq;
    while (r.count < 3 && r.next_seq <= f->alert_last) { /* small pages */
        make_alert(&list[r.count++], f->alert_epoch, r.next_seq++);
    }
    SPURION_TRY(st, spurion_codec_encode_alerts_reply(body, m, &r));
out:
    return st;
}

/* A page of the answer; the rest is kept under a token. */
static void cut_page(spurion_reply *r, fake *f, spurion_bytes body, size_t from, const spurion_memory *m)
{
    char *token = m->take(m->context, 24);

    if (from == 0 && body.size > f->page_bytes) {
        free(f->kept);
        f->kept = malloc(body.size);
        must(f->kept != NULL);
        memcpy(f->kept, body.data, f->kept_size = body.size);
    }
    r->body = (spurion_bytes){body.data + from, body.size - from < f->page_bytes ? body.size - from : f->page_bytes};
    if (from + r->body.size < body.size) {
        (void)snprintf(token, 24, "%zu", from + r->body.size);
        r->next_page_token = spurion_bytes_of(token);
    }
}

static void answer(fake *f, spurion_bytes in, spurion_bytes *out)
{
    spurion_memory m = {take, f};
    spurion_request q;
    spurion_bytes body = {"", 0};
    spurion_status st = spurion_codec_decode_request(&q, &m, in);
    spurion_reply r = {0};
    const char *method = q.method.data + strlen(SPURION_METHOD_PREFIX);
    size_t from = 0;

    must(st.code == SPURION_OK);
    r.call_id = q.call_id;
    if (q.page_token.size) {
        from = strtoul(q.page_token.data, NULL, 10);
        body = (spurion_bytes){f->kept, f->kept_size};
        if (f->forget_pages-- > 0) {
            st = spurion_error(SPURION_NOT_FOUND, "page_token: another");
        }
    } else if (!strcmp(method, "Sync")) {
        st = on_sync(&body, f, &m, q.body);
    } else if (!strcmp(method, "Fill")) {
        st = on_fill(&body, f, &m, q.body);
    } else if (!strcmp(method, "Query")) {
        st = on_query(&body, f, &m, q.body);
    } else if (!strcmp(method, "Score")) {
        st = on_score(&body, f, &m, q.body, q.idempotency_key);
    } else if (!strcmp(method, "Alerts")) {
        st = on_alerts(&body, f, &m, q.body);
    } else {
        spurion_hello_reply h = {.proto = 1, .server_version = spurion_bytes_of("fake")};
        f->hellos++;
        st = spurion_codec_encode_hello_reply(&body, &m, &h);
    }
    r.body = body;
    if (st.code != SPURION_OK) {
        r.code = st.code;
        r.message = spurion_bytes_of(strcpy(m.take(m.context, sizeof st.message), st.message));
        r.retry_after_ms = 20;
        r.body = (spurion_bytes){NULL, 0};
    } else if (f->page_bytes) {
        cut_page(&r, f, body, from, &m);
    }
    st = spurion_codec_encode_reply(out, &m, &r);
    must(st.code == SPURION_OK);
}

/* Alerts that the test wants on the live channel. */
static void send_alerts(fake *f, nng_socket pub)
{
    hold(f);
    for (int i = 0; i < f->to_send_count; i++) {
        spurion_memory m = {take, f};
        spurion_alert a;
        spurion_bytes out;
        f->memory_used = 0;
        make_alert(&a, f->alert_epoch, f->to_send[i]);
        must(spurion_codec_encode_alert(&out, &m, &a).code == SPURION_OK);
        must(nng_send(pub, (void *)(uintptr_t)out.data, out.size, 0) == 0);
    }
    f->to_send_count = 0;
    let_go(f);
}

static _Noreturn void serve(fake *f, nng_socket rep, nng_socket sub, nng_socket pub)
{
    for (;;) {
        nng_msg *msg;
        spurion_bytes out;
        spurion_memory m = {take, f};

        send_alerts(f, pub);
        while (nng_recvmsg(sub, &msg, NNG_FLAG_NONBLOCK) == 0) {
            hold(f);
            f->memory_used = 0;
            note_tap(f, &m, (spurion_bytes){nng_msg_body(msg), nng_msg_len(msg)}, true);
            let_go(f);
            nng_msg_free(msg);
        }
        if (nng_recvmsg(rep, &msg, 0) != 0) {
            continue;
        }
        hold(f);
        f->memory_used = 0;
        answer(f, (spurion_bytes){nng_msg_body(msg), nng_msg_len(msg)}, &out);
        nng_msg_clear(msg);
        (void)nng_msg_append(msg, out.data, out.size);
        let_go(f);
        if (nng_sendmsg(rep, msg, 0) != 0) {
            nng_msg_free(msg);
        }
    }
}

/* The daemon's process. told: gets a byte when it listens. */
static _Noreturn void fake_run(fake *f, int told)
{
    nng_socket rep = NNG_SOCKET_INITIALIZER, sub = NNG_SOCKET_INITIALIZER, pub = NNG_SOCKET_INITIALIZER;

    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int fd = 3; fd < 64; fd++) { /* the client's connections are the test's */
        if (fd != told) {
            (void)close(fd);
        }
    }
    (void)unlink(f->rpc + strlen("ipc://")); /* what a killed one left */
    (void)unlink(f->tap + strlen("ipc://"));
    (void)unlink(f->alerts + strlen("ipc://"));
    must(nng_rep0_open(&rep) == 0 && nng_sub0_open(&sub) == 0 && nng_pub0_open(&pub) == 0);
    must(nng_socket_set(sub, NNG_OPT_SUB_SUBSCRIBE, "", 0) == 0 && nng_socket_set_int(sub, NNG_OPT_RECVBUF, 4096) == 0);
    must(nng_socket_set_size(sub, NNG_OPT_RECVMAXSZ, SPURION_FRAME_BYTES_MAX) == 0);
    must(nng_socket_set_size(rep, NNG_OPT_RECVMAXSZ, SPURION_FRAME_BYTES_MAX) == 0);
    must(nng_socket_set_ms(rep, NNG_OPT_RECVTIMEO, 2) == 0);
    must(nng_listen(rep, f->rpc, NULL, 0) == 0 && nng_listen(sub, f->tap, NULL, 0) == 0 && nng_listen(pub, f->alerts, NULL, 0) == 0);
    must(write(told, "", 1) == 1);
    serve(f, rep, sub, pub);
}

static void fake_start(fake *f)
{
    int ends[2];
    char byte;

    assert_int_equal(pipe(ends), 0);
    f->pid = fork();
    assert_true(f->pid >= 0);
    if (f->pid == 0) {
        fake_run(f, ends[1]);
    }
    (void)close(ends[1]);
    assert_int_equal(read(ends[0], &byte, 1), 1);
    (void)close(ends[0]);
}

/* Ends without a word, as a crash does; what was received stays. */
static void fake_end(fake *f)
{
    int status = 0;

    if (f->pid) {
        hold(f); /* not in the middle of a note */
        assert_int_equal(kill(f->pid, SIGKILL), 0);
        assert_int_equal(waitpid(f->pid, &status, 0), f->pid);
        let_go(f);
        f->pid = 0;
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL); /* not by a check of its own */
    }
}

static int setup(void **state)
{
    fake *f = mmap(NULL, sizeof *f, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_t shared;

    assert_true(f != MAP_FAILED);
    (void)snprintf(f->folder, sizeof f->folder, "/tmp/spurion-client.XXXXXX");
    assert_non_null(mkdtemp(f->folder));
    (void)snprintf(f->rpc, sizeof f->rpc, "ipc://%s/rpc", f->folder);
    (void)snprintf(f->tap, sizeof f->tap, "ipc://%s/tap", f->folder);
    (void)snprintf(f->alerts, sizeof f->alerts, "ipc://%s/alerts", f->folder);
    f->memory = malloc(MEMORY_BYTES);
    f->alert_epoch = 7;
    f->step_end = -1;
    assert_non_null(f->memory);
    assert_int_equal(pthread_mutexattr_init(&shared), 0);
    assert_int_equal(pthread_mutexattr_setpshared(&shared, PTHREAD_PROCESS_SHARED), 0);
    assert_int_equal(pthread_mutexattr_setrobust(&shared, PTHREAD_MUTEX_ROBUST), 0);
    assert_int_equal(pthread_mutex_init(&f->lock, &shared), 0);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fake *f = *state;
    char command[128];

    fake_end(f);
    (void)snprintf(command, sizeof command, "rm -rf '%s'", f->folder);
    assert_int_equal(system(command), 0);
    pthread_mutex_destroy(&f->lock);
    free(f->memory);
    assert_int_equal(munmap(f, sizeof *f), 0);
    return 0;
}

static int received_count(fake *f)
{
    int n = 0;
    hold(f);
    for (int i = 0; i <= BATCHES_MAX; i++) {
        n += f->received[i];
    }
    let_go(f);
    return n;
}

/* What the daemon's thread wrote before is seen after this. */
static void look(fake *f)
{
    hold(f);
    let_go(f);
}

/* --- the other side --- */

static spurion_client *client_of(const fake *f, spurion_ring_policy policy, size_t ring, int timeout_ms)
{
    spurion_client_options o = {f->rpc, f->tap, f->alerts, "run", "producer", ring, policy, timeout_ms, 50};
    spurion_client *c;

    if (spurion_client_open(&c, &o) != SPURION_OK) {
        fail_msg("%s", spurion_client_error(c));
    }
    return c;
}

static void ok(spurion_client *c, spurion_code code)
{
    if (code != SPURION_OK) {
        fail_msg("%s: %s", spurion_code_name(code), spurion_client_error(c));
    }
}

/* Two rollouts, a group; the texts together of a given size. */
static spurion_code publish(spurion_client *c, int64_t step, size_t bytes)
{
    char *text = malloc(bytes + 1);
    spurion_rollout r[2];
    spurion_code code;

    assert_non_null(text);
    memset(text, 'x', bytes);
    memset(r, 0, sizeof r);
    for (int i = 0; i < 2; i++) {
        r[i].step = step;
        r[i].group = spurion_bytes_of("group");
        r[i].id = spurion_bytes_of(i ? "one" : "zero");
        r[i].prompt = (spurion_bytes){text, bytes / 4};
        r[i].completion = (spurion_bytes){text, bytes / 4};
    }
    code = spurion_client_publish(c, r, 2);
    free(text); /* the ring keeps a copy */
    return code;
}

static spurion_tap_stats stats_of(const spurion_client *c)
{
    spurion_tap_stats s;
    spurion_client_tap_stats(&s, c);
    return s;
}

static void test_client_delivers_every_batch_once_confirmed(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_NEW, 0, PATIENCE_MS);

    fake_start(f);
    ok(c, spurion_client_ready(c, PATIENCE_MS));
    for (int i = 0; i < 300; i++) {
        ok(c, publish(c, i / 100, 4000));
    }
    ok(c, spurion_client_step_end(c, 2));
    ok(c, spurion_client_flush(c, PATIENCE_MS));
    assert_int_equal(received_count(f), 301);
    assert_int_equal(stats_of(c).published_rollouts, 600);
    assert_int_equal(stats_of(c).stored_through, 301);
    assert_int_equal(stats_of(c).ring_bytes, 0);
    assert_int_equal(f->step_end, 2);
    assert_false(f->closing);
    ok(c, spurion_client_leave(c, PATIENCE_MS));
    look(f);
    assert_true(f->closing);
    spurion_client_close(c);
}

static void test_client_sends_again_what_was_missed(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_NEW, 0, PATIENCE_MS);

    f->deaf_to[2] = f->deaf_to[5] = f->deaf_to[6] = f->deaf_to[40] = true;
    fake_start(f);
    ok(c, spurion_client_ready(c, PATIENCE_MS));
    for (int i = 0; i < 40; i++) {
        ok(c, publish(c, 1, 1000));
    }
    ok(c, spurion_client_flush(c, PATIENCE_MS));
    assert_int_equal(received_count(f), 40);
    assert_true(stats_of(c).refilled_batches >= 4);
    assert_int_equal(stats_of(c).dropped_rollouts, 0);
    assert_true(f->fills >= 1);
    spurion_client_close(c);
}

static void test_client_outlives_the_daemon(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_NEW, 0, PATIENCE_MS);

    for (int i = 0; i < 60; i++) {
        if (i % 20 == 10) {
            fake_start(f);
            ok(c, spurion_client_ready(c, PATIENCE_MS));
        } else if (i && i % 20 == 0) {
            fake_end(f); /* with batches on their way */
        }
        ok(c, publish(c, 1, 1000));
    }
    ok(c, spurion_client_flush(c, PATIENCE_MS));
    assert_int_equal(received_count(f), 60);
    assert_int_equal(stats_of(c).stored_through, 60);
    spurion_client_close(c);
}

/* How many batches of a size fit, found from the first refusal. */
static int fill_ring(spurion_client *c, size_t bytes)
{
    int n = 0;
    while (publish(c, 1, bytes) == SPURION_OK) {
        n++;
    }
    return n;
}

static void test_client_drop_new_counts_exactly(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_NEW, 100000, PATIENCE_MS);
    int fit = fill_ring(c, 4000);

    assert_in_range(fit, 15, 50);
    for (int i = 0; i < 9; i++) {
        assert_int_equal(publish(c, 1, 4000), SPURION_RESOURCE_EXHAUSTED);
    }
    assert_non_null(strstr(spurion_client_error(c), "2 rollouts dropped"));
    assert_int_equal(stats_of(c).dropped_batches, 10);
    assert_int_equal(stats_of(c).dropped_rollouts, 20);
    assert_int_equal(stats_of(c).published_rollouts, 2 * fit);
    fake_start(f);
    assert_int_equal(spurion_client_flush(c, PATIENCE_MS), SPURION_DATA_LOSS);
    assert_non_null(strstr(spurion_client_error(c), "20 rollouts in 10 batches were dropped"));
    assert_int_equal(received_count(f), fit);
    assert_int_equal(f->lost_rollouts, 20); /* the daemon knows too */
    ok(c, publish(c, 2, 4000)); /* there is room again */
    spurion_client_close(c);
}

static void test_client_drop_oldest_counts_exactly(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_OLDEST, 100000, PATIENCE_MS);
    int kept;

    for (int i = 0; i < 200; i++) {
        ok(c, publish(c, 1, 4000));
    }
    kept = 200 - (int)stats_of(c).dropped_batches;
    assert_in_range(kept, 15, 50);
    assert_int_equal(stats_of(c).dropped_rollouts, 2 * (200 - kept));
    fake_start(f);
    assert_int_equal(spurion_client_flush(c, PATIENCE_MS), SPURION_DATA_LOSS);
    assert_int_equal(received_count(f), kept);
    for (int i = 1; i <= 200; i++) { /* the youngest stay */
        assert_int_equal(f->received[i], i > 200 - kept);
        assert_int_equal(f->lost[i], i <= 200 - kept);
    }
    assert_int_equal(f->lost_rollouts, 2 * (200 - kept));
    assert_int_equal(stats_of(c).stored_through, 200);
    spurion_client_close(c);
}

/* A backup was restored, or the store began anew: what was confirmed is gone, and the ring let go of it. */
static void test_client_says_when_the_daemon_forgot(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_NEW, 0, PATIENCE_MS);

    fake_start(f);
    for (int i = 0; i < 40; i++) {
        ok(c, publish(c, 1, 100));
    }
    ok(c, spurion_client_flush(c, PATIENCE_MS));
    hold(f);
    for (int i = 11; i <= 20; i++) {
        f->received[i] = 0;
    }
    f->received[30] = 0;
    let_go(f);
    ok(c, publish(c, 2, 100));
    assert_int_equal(spurion_client_flush(c, PATIENCE_MS), SPURION_DATA_LOSS);
    assert_non_null(strstr(spurion_client_error(c), "11 batches that the daemon had confirmed"));
    assert_int_equal(f->received[41], 1); /* what came since is there */
    for (int i = 1; i <= 40; i++) {
        assert_int_equal(f->lost[i], (i >= 11 && i <= 20) || i == 30);
    }
    assert_int_equal(stats_of(c).stored_through, 41);
    ok(c, publish(c, 2, 100));
    assert_int_equal(spurion_client_flush(c, PATIENCE_MS), SPURION_DATA_LOSS);
    assert_int_equal(f->received[42], 1);
    spurion_client_close(c);
}

/* What the ring forgets may have come all the same: only what did not is lost. */
static void test_client_counts_as_lost_only_what_did_not_come(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_OLDEST, 100000, PATIENCE_MS);
    int64_t start = now_ms();

    for (int i = 1; i <= 10; i++) {
        f->deaf_to[3 * i] = true;
    }
    fake_start(f);
    while (!stats_of(c).connected && now_ms() - start < PATIENCE_MS) { /* not ready: no Sync is answered before the ring is full */
        (void)spurion_client_pump(c);
    }
    hold(f); /* the daemon reads nothing and answers nothing; its sockets take what they hold */
    for (int i = 0; i < 200; i++) {
        ok(c, publish(c, 1, 4000));
    }
    let_go(f);
    assert_int_equal(spurion_client_flush(c, PATIENCE_MS), SPURION_DATA_LOSS);
    assert_int_equal(received_count(f) + (int)stats_of(c).dropped_batches, 200);
    assert_int_equal(f->lost_rollouts, 2 * stats_of(c).dropped_batches);
    for (int i = 1; i <= 200; i++) {
        assert_true(f->received[i] != f->lost[i]);
    }
    assert_true(stats_of(c).dropped_batches >= 5);
    assert_true(received_count(f) > 40); /* more than the ring held */
    spurion_client_close(c);
}

static void test_client_block_waits_for_room(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_BLOCK, 50000, 300);
    int fit = fill_ring(c, 4000); /* the last one waited in vain */
    int64_t start = now_ms();

    assert_int_equal(publish(c, 1, 4000), SPURION_RESOURCE_EXHAUSTED);
    assert_in_range(now_ms() - start, 290, 2000);
    assert_int_equal(stats_of(c).dropped_batches, 2);
    start = now_ms();
    assert_int_equal(publish(c, 1, 200000), SPURION_RESOURCE_EXHAUSTED); /* can never fit: no use in waiting */
    assert_in_range(now_ms() - start, 0, 289);
    spurion_client_close(c);

    c = client_of(f, SPURION_RING_BLOCK, 50000, PATIENCE_MS);
    fake_start(f);
    for (int i = 0; i < 10 * fit; i++) {
        ok(c, publish(c, 1, 4000));
    }
    ok(c, spurion_client_flush(c, PATIENCE_MS));
    assert_int_equal(received_count(f), 10 * fit);
    assert_int_equal(stats_of(c).dropped_batches, 0);
    spurion_client_close(c);
}

static void test_client_memory_is_bounded_by_the_ring(void **state)
{
    fake *f = *state;
    size_t ring = 1 << 20, most = 0;
    spurion_client *c = client_of(f, SPURION_RING_DROP_OLDEST, ring, PATIENCE_MS);

    for (int i = 0; i < 500; i++) { /* 50 MB */
        size_t bytes;
        ok(c, publish(c, 1, 100000));
        bytes = spurion_client_memory_bytes(c);
        most = bytes > most ? bytes : most;
        assert_true(stats_of(c).ring_bytes <= ring);
    }
    assert_true(most >= ring / 2);
    assert_true(most <= ring + 600000); /* the ring, and the batch that is being packed */
    spurion_client_close(c);
}

static void test_client_refuses_a_batch_over_the_frame(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_OLDEST, (size_t)64 << 20, 1000);
    size_t size = 3 << 20;
    char *text = malloc(size);
    spurion_rollout r[6];

    assert_non_null(text);
    memset(text, 'x', size);
    memset(r, 0, sizeof r);
    for (int i = 0; i < 6; i++) {
        r[i].group = r[i].id = spurion_bytes_of("g");
        r[i].prompt = spurion_bytes_of("p");
        r[i].completion = (spurion_bytes){text, size};
    }
    assert_int_equal(spurion_client_publish(c, r, 6), SPURION_RESOURCE_EXHAUSTED);
    assert_non_null(strstr(spurion_client_error(c), "expected at most 16777216 bytes packed, found 18"));
    assert_int_equal(stats_of(c).dropped_rollouts, 6);
    ok(c, spurion_client_publish(c, r, 5));
    assert_int_equal(spurion_client_publish(c, r, 0), SPURION_INVALID_ARGUMENT);
    spurion_client_close(c);
    free(text);
}

/* --- fork --- */

/* In the child: every call says FAILED_PRECONDITION. Exit status: calls that did not. */
static int child(spurion_client *c)
{
    spurion_hello_reply hello;
    spurion_verdicts verdicts;
    spurion_status_reply status;
    spurion_alert alert;
    int wrong = 0;

    wrong += publish(c, 1, 100) != SPURION_FAILED_PRECONDITION;
    wrong += spurion_client_step_end(c, 1) != SPURION_FAILED_PRECONDITION;
    wrong += spurion_client_pump(c) != SPURION_FAILED_PRECONDITION;
    wrong += spurion_client_flush(c, 10) != SPURION_FAILED_PRECONDITION;
    wrong += spurion_client_leave(c, 10) != SPURION_FAILED_PRECONDITION;
    wrong += spurion_client_ready(c, 10) != SPURION_FAILED_PRECONDITION;
    wrong += spurion_client_hello(c, &hello, 10) != SPURION_FAILED_PRECONDITION;
    wrong += spurion_client_score(c, &verdicts, NULL, 0, false, 10) != SPURION_FAILED_PRECONDITION;
    wrong += spurion_client_status(c, &status, 10) != SPURION_FAILED_PRECONDITION;
    wrong += spurion_client_alert_next(c, &alert) != SPURION_FAILED_PRECONDITION;
    wrong += spurion_client_alert_from(c, 1) != SPURION_FAILED_PRECONDITION;
    wrong += strstr(spurion_client_error(c), "open one after fork") == NULL;
    spurion_client_close(c);
    return wrong;
}

static void test_client_refuses_to_work_in_a_forked_child(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_NEW, 0, PATIENCE_MS);
    spurion_client_options o = {0};
    spurion_client *early;
    int status;
    pid_t pid;

    o.rpc = f->rpc;
    ok(c, spurion_client_open(&early, &o)); /* opened, never used */
    for (int i = 0; i < 5; i++) {
        ok(c, publish(c, 1, 1000));
    }
    pid = fork(); /* before nng's threads are in this process: the child of a trainer has none either */
    assert_true(pid >= 0);
    if (pid == 0) {
        int wrong = child(c);
        spurion_hello_reply hello;
        wrong += spurion_client_hello(early, &hello, 10) != SPURION_FAILED_PRECONDITION;
        _exit(wrong);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    fake_start(f); /* the parent's handle is as it was, its sockets too */
    for (int i = 0; i < 5; i++) {
        ok(c, publish(c, 1, 1000));
    }
    ok(c, spurion_client_flush(c, PATIENCE_MS));
    assert_int_equal(received_count(f), 10);
    spurion_client_close(early);
    spurion_client_close(c);
}

/* --- peers that do not answer --- */

static int plain_listen(const char *url)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    (void)snprintf(a.sun_path, sizeof a.sun_path, "%s", url + strlen("ipc://"));
    assert_true(fd >= 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(fd, 8), 0);
    return fd;
}

static void nothing_waits(fake *f, spurion_code expected)
{
    spurion_client *c = client_of(f, SPURION_RING_DROP_OLDEST, 1 << 20, 200);
    spurion_hello_reply hello;
    spurion_alert alert;
    int64_t start = now_ms();
    spurion_code code;

    for (int i = 0; i < 2000; i++) {
        ok(c, publish(c, i / 10, 3000));
        ok(c, spurion_client_step_end(c, i / 10));
        code = spurion_client_pump(c);
        assert_true(code == SPURION_OK || code == SPURION_UNAVAILABLE);
    }
    assert_true(now_ms() - start < PATIENCE_MS); /* 6,000 calls; one that waits takes 200 ms */
    start = now_ms();
    assert_int_equal(spurion_client_hello(c, &hello, 150), expected);
    assert_in_range(now_ms() - start, 140, WAITED_MS_MAX);
    start = now_ms();
    assert_int_equal(spurion_client_flush(c, 150), SPURION_DEADLINE_EXCEEDED);
    assert_in_range(now_ms() - start, 140, WAITED_MS_MAX);
    start = now_ms();
    code = spurion_client_ready(c, 150);
    assert_true(code == SPURION_UNAVAILABLE || code == SPURION_DEADLINE_EXCEEDED);
    assert_in_range(now_ms() - start, 140, WAITED_MS_MAX);
    start = now_ms();
    code = spurion_client_alert_next(c, &alert);
    assert_true(code == SPURION_UNAVAILABLE || code == SPURION_DEADLINE_EXCEEDED);
    assert_in_range(now_ms() - start, 0, WAITED_MS_MAX);
    start = now_ms();
    spurion_client_close(c);
    assert_true(now_ms() - start < 100);
}

static void test_client_never_waits_when_nobody_listens(void **state)
{
    nothing_waits(*state, SPURION_UNAVAILABLE);
}

static void test_client_never_waits_for_a_daemon_that_does_not_answer(void **state)
{
    fake *f = *state;
    int rpc = plain_listen(f->rpc), tap = plain_listen(f->tap), alerts = plain_listen(f->alerts);

    nothing_waits(f, SPURION_UNAVAILABLE);
    close(rpc);
    close(tap);
    close(alerts);
}

/* A peer that greets, and then neither reads nor answers: the sockets fill up. */
static void *greet_only(void *context)
{
    int listener = *(int *)context, fd = accept(listener, NULL, NULL);
    unsigned char got[8];

    assert_true(fd >= 0);
    assert_int_equal(recv(fd, got, 8, MSG_WAITALL), 8);
    assert_int_equal(send(fd, got[5] == 0x20 ? "\0SP\0\0\x21\0\0" : got[5] == 0x21 ? "\0SP\0\0\x20\0\0" : "\0SP\0\0\x31\0\0", 8, 0), 8);
    return (void *)(intptr_t)fd;
}

static void test_client_never_waits_for_a_daemon_that_does_not_read(void **state)
{
    fake *f = *state;
    int tap = plain_listen(f->tap);
    pthread_t thread;
    void *fd;
    spurion_client *c = client_of(f, SPURION_RING_DROP_OLDEST, 1 << 20, 200);
    int64_t start;

    assert_int_equal(pthread_create(&thread, NULL, greet_only, &tap), 0);
    for (start = now_ms(); !stats_of(c).connected && now_ms() - start < PATIENCE_MS;) {
        (void)spurion_client_pump(c);
    }
    assert_true(stats_of(c).connected);
    start = now_ms();
    for (int i = 0; i < 2000; i++) { /* 20 MB: more than the socket holds */
        ok(c, publish(c, 1, 10000));
    }
    assert_true(now_ms() - start < PATIENCE_MS); /* of 2,000 calls, each of which might wait 200 ms */
    assert_true(stats_of(c).dropped_batches > 0);
    assert_int_equal(pthread_join(thread, &fd), 0);
    spurion_client_close(c);
    close((int)(intptr_t)fd);
    close(tap);
}

/* --- calls --- */

static void test_client_joins_pages_and_begins_again_when_they_are_forgotten(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_NEW, 0, PATIENCE_MS);
    spurion_query q = {.run = {"run", 3}};
    spurion_query_reply r;

    f->page_bytes = 777;
    f->forget_pages = 1;
    fake_start(f);
    for (int round = 0; round < 3; round++) {
        ok(c, spurion_client_query(c, &r, &q, PATIENCE_MS));
        assert_int_equal(r.count, QUERY_ROWS);
        for (int i = 0; i < QUERY_ROWS; i++) {
            assert_int_equal(r.rows[i].key.step, i);
        }
        look(f);
        assert_string_equal(f->cursor, round ? "the-cursor" : "");
        q.cursor = r.cursor; /* borrows from the answer: the next call may be given it */
    }
    assert_true(spurion_client_memory_bytes(c) < ((size_t)2 << 20));
    spurion_client_close(c);
}

static void test_client_tries_again_under_one_key(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_NEW, 0, PATIENCE_MS);
    spurion_rollout r = {.run = {"run", 3}, .group = {"g", 1}, .id = {"i", 1}, .prompt = {"p", 1}, .completion = {"c", 1}};
    spurion_verdicts v;
    spurion_code code;
    int64_t start = now_ms();

    f->busy = 3;
    fake_start(f);
    ok(c, spurion_client_score(c, &v, &r, 1, false, PATIENCE_MS));
    assert_int_equal(v.count, 1);
    look(f);
    assert_int_equal(f->key_count, 4);
    for (int i = 1; i < 4; i++) {
        assert_memory_equal(f->keys[i], f->keys[0], 16);
    }
    ok(c, spurion_client_score(c, &v, &r, 1, false, PATIENCE_MS));
    hold(f);
    assert_memory_not_equal(f->keys[4], f->keys[0], 16);
    f->busy = 1000;
    let_go(f);
    while ((code = spurion_client_score(c, &v, &r, 1, false, 200)) == SPURION_DEADLINE_EXCEEDED && now_ms() - start < PATIENCE_MS) {
        /* the machine was busy when the time was up */
    }
    assert_int_equal(code, SPURION_UNAVAILABLE);
    assert_int_equal(spurion_client_retry_after_ms(c), 20);
    spurion_client_close(c);
}

/* --- alerts --- */

static void send_alert(fake *f, uint64_t seq)
{
    hold(f);
    assert_true(f->to_send_count < ALERTS_MAX);
    f->to_send[f->to_send_count++] = seq;
    let_go(f);
}

/* Waits for the next alert, and wants it to be this one. */
static void expect_alert(spurion_client *c, uint64_t seq)
{
    spurion_alert a;
    spurion_code code = SPURION_NOT_FOUND;
    int64_t start = now_ms();

    while ((code = spurion_client_alert_next(c, &a)) != SPURION_OK && now_ms() - start < PATIENCE_MS) {
        struct pollfd p = {spurion_client_alert_fd(c), POLLIN, 0};
        assert_true(code == SPURION_NOT_FOUND || code == SPURION_UNAVAILABLE);
        (void)poll(&p, p.fd >= 0 ? 1 : 0, 20);
    }
    ok(c, code);
    assert_int_equal(a.seq, seq);
    assert_int_equal(a.step, (int64_t)seq);
    assert_int_equal(a.rule.size, 4);
    assert_memory_equal(a.rule.data, "rule", 4);
}

static void set_alerts(fake *f, uint64_t epoch, uint64_t last)
{
    hold(f);
    f->alert_epoch = epoch;
    f->alert_last = last;
    let_go(f);
}

static void test_client_gives_alerts_in_order_and_once(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_NEW, 0, PATIENCE_MS);
    spurion_alert a;

    f->alert_last = 10;
    fake_start(f);
    ok(c, spurion_client_alert_from(c, 4));
    for (uint64_t n = 4; n <= 10; n++) { /* stored ones, in pages of three */
        expect_alert(c, n);
    }
    assert_int_equal(spurion_client_alert_next(c, &a), SPURION_NOT_FOUND);
    set_alerts(f, 7, 20); /* ten more; the live channel carries some, twice, not in order */
    send_alert(f, 13);
    send_alert(f, 11);
    send_alert(f, 20);
    send_alert(f, 20);
    for (uint64_t n = 11; n <= 20; n++) {
        expect_alert(c, n);
    }
    for (int i = 0; i < 20; i++) {
        assert_int_equal(spurion_client_alert_next(c, &a), SPURION_NOT_FOUND);
    }
    spurion_client_close(c);
}

/* "No space in the store" cannot be stored, so it has no number; it is given all the same, and disturbs none that has one. */
static void test_client_gives_an_alert_without_a_number(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_NEW, 0, PATIENCE_MS);
    spurion_alert a;
    spurion_code code;
    int64_t start = now_ms();

    f->alert_last = 2;
    fake_start(f);
    ok(c, spurion_client_alert_from(c, 1));
    expect_alert(c, 1);
    expect_alert(c, 2);
    code = spurion_client_alert_next(c, &a);
    while (code == SPURION_NOT_FOUND && now_ms() - start < PATIENCE_MS) { /* the first may be sent before the connection is there */
        send_alert(f, 0);
        (void)poll(NULL, 0, 20);
        code = spurion_client_alert_next(c, &a);
    }
    ok(c, code);
    assert_int_equal(a.seq, 0);
    set_alerts(f, 7, 3);
    send_alert(f, 3);
    while ((code = spurion_client_alert_next(c, &a)) != SPURION_OK || a.seq == 0) { /* more of those that were sent before */
        assert_true((code == SPURION_OK || code == SPURION_NOT_FOUND) && now_ms() - start < PATIENCE_MS);
        (void)poll(NULL, 0, 5);
    }
    assert_int_equal(a.seq, 3);
    assert_int_equal(spurion_client_alert_next(c, &a), SPURION_NOT_FOUND);
    spurion_client_close(c);
}

static void test_client_begins_with_what_comes(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_NEW, 0, PATIENCE_MS);
    spurion_alert a;

    f->alert_last = 10;
    fake_start(f);
    assert_int_equal(spurion_client_alert_next(c, &a), SPURION_NOT_FOUND); /* without a number: what is stored is old */
    set_alerts(f, 7, 12);
    expect_alert(c, 11); /* also when the live channel brings nothing: it was just opened, or looks in the store after a while */
    expect_alert(c, 12);
    fake_end(f);
    set_alerts(f, 7, 15); /* raised while this end was away */
    fake_start(f);
    expect_alert(c, 13);
    expect_alert(c, 14);
    expect_alert(c, 15);
    spurion_client_close(c);
}

static void test_client_follows_another_store(void **state)
{
    fake *f = *state;
    spurion_client *c = client_of(f, SPURION_RING_DROP_NEW, 0, PATIENCE_MS);

    f->alert_last = 3;
    fake_start(f);
    ok(c, spurion_client_alert_from(c, 1));
    expect_alert(c, 1);
    expect_alert(c, 2);
    expect_alert(c, 3);
    fake_end(f);
    set_alerts(f, 8, 2); /* the store was set up anew */
    fake_start(f);
    expect_alert(c, 1);
    expect_alert(c, 2);
    spurion_client_close(c);
}

static void test_client_says_what_is_wrong_with_its_options(void **state)
{
    spurion_client_options o = {.rpc = "smoke://signals"};
    spurion_client *c;

    (void)state;
    assert_int_equal(spurion_client_open(&c, &o), SPURION_INVALID_ARGUMENT);
    assert_non_null(strstr(spurion_client_error(c), "found 'smoke://signals'"));
    spurion_client_close(c);
    o.rpc = "ipc:///tmp/none";
    o.rollouts = "ipc:///tmp/none";
    assert_int_equal(spurion_client_open(&c, &o), SPURION_INVALID_ARGUMENT);
    assert_non_null(strstr(spurion_client_error(c), "found no run"));
    spurion_client_close(c);
    o.run = "a\nb";
    assert_int_equal(spurion_client_open(&c, &o), SPURION_INVALID_ARGUMENT);
    spurion_client_close(c);
    o.rollouts = NULL;
    ok(c, spurion_client_open(&c, &o));
    assert_int_equal(publish(c, 1, 100), SPURION_FAILED_PRECONDITION);
    spurion_client_close(c);
    spurion_client_close(NULL);
}

#define CASE(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(test_client_refuses_to_work_in_a_forked_child),
        CASE(test_client_says_what_is_wrong_with_its_options),
        CASE(test_client_never_waits_when_nobody_listens),
        CASE(test_client_never_waits_for_a_daemon_that_does_not_answer),
        CASE(test_client_never_waits_for_a_daemon_that_does_not_read),
        CASE(test_client_memory_is_bounded_by_the_ring),
        CASE(test_client_refuses_a_batch_over_the_frame),
        CASE(test_client_delivers_every_batch_once_confirmed),
        CASE(test_client_sends_again_what_was_missed),
        CASE(test_client_says_when_the_daemon_forgot),
        CASE(test_client_outlives_the_daemon),
        CASE(test_client_drop_new_counts_exactly),
        CASE(test_client_drop_oldest_counts_exactly),
        CASE(test_client_counts_as_lost_only_what_did_not_come),
        CASE(test_client_block_waits_for_room),
        CASE(test_client_joins_pages_and_begins_again_when_they_are_forgotten),
        CASE(test_client_tries_again_under_one_key),
        CASE(test_client_gives_alerts_in_order_and_once),
        CASE(test_client_gives_an_alert_without_a_number),
        CASE(test_client_begins_with_what_comes),
        CASE(test_client_follows_another_store),
    };
    return cmocka_run_group_tests_name("client", tests, NULL, NULL);
}

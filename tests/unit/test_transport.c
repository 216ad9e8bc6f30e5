/* The transport against plain SP sockets: limits, calls, taps, alerts, and who may connect. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "daemon/transport.h"

/* One transport for all tests: it has no end but the process's. */
typedef struct world {
    spurion_transport *t;
    char folder[64], rpc[128], taps[128], alerts[128];
    _Atomic int tap_count;
    _Atomic size_t tap_bytes;
    _Atomic(spurion_transport_call *) held; /* a request that asked to be kept */
} world;

static void on_request(void *context, spurion_transport_call *call, const char *data, size_t size)
{
    world *w = context;
    if (size == 4 && memcmp(data, "hold", 4) == 0) {
        atomic_store(&w->held, call);
        return;
    }
    spurion_transport_reply(call, data, size); /* an echo */
}

static void on_tap(void *context, const char *data, size_t size)
{
    world *w = context;
    (void)data;
    atomic_fetch_add(&w->tap_bytes, size);
    atomic_fetch_add(&w->tap_count, 1);
}

static int set_up(void **state)
{
    world *w = calloc(1, sizeof *w);
    spurion_transport_handlers h = {on_request, on_tap, w};

    strcpy(w->folder, "/tmp/spurion-transport-XXXXXX");
    assert_non_null(mkdtemp(w->folder));
    assert_int_equal(spurion_transport_create(&w->t, &h).code, SPURION_OK);
    /* the limits stand before anything listens */
    for (int i = 0; i < SPURION_CHANNEL_COUNT; i++) {
        assert_int_equal(spurion_transport_recv_bytes_max(w->t, (spurion_channel)i), SPURION_FRAME_BYTES_MAX);
    }
    (void)snprintf(w->rpc, sizeof w->rpc, "ipc://%s/deep/er/rpc", w->folder);
    (void)snprintf(w->taps, sizeof w->taps, "ipc://%s/taps", w->folder);
    (void)snprintf(w->alerts, sizeof w->alerts, "ipc://%s/alerts", w->folder);
    spurion_transport_start(w->t);
    assert_int_equal(spurion_transport_listen(w->t, SPURION_CHANNEL_RPC, w->rpc, false).code, SPURION_OK);
    assert_int_equal(spurion_transport_listen(w->t, SPURION_CHANNEL_ROLLOUTS, w->taps, false).code, SPURION_OK);
    assert_int_equal(spurion_transport_listen(w->t, SPURION_CHANNEL_ALERTS, w->alerts, false).code, SPURION_OK);
    *state = w;
    return 0;
}

/* ---- a peer on plain sockets ---- */

static void read_all(int fd, void *data, size_t size)
{
    for (size_t at = 0; at < size;) {
        ssize_t n = read(fd, (char *)data + at, size - at);
        if (n <= 0) {
            fail_msg("expected %zu bytes, found the end after %zu", size, at);
        }
        at += (size_t)n;
    }
}

static int dial(const char *url, unsigned char protocol)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    unsigned char hello[8] = {0, 'S', 'P', 0, 0, protocol, 0, 0}, back[8];
    struct timeval limit = {10, 0};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    strcpy(to.sun_path, url + 6);
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof to), 0);
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    assert_int_equal(write(fd, hello, 8), 8);
    read_all(fd, back, 8);
    assert_memory_equal(back, "\0SP", 3);
    return fd;
}

static void send_frame(int fd, const void *data, size_t size)
{
    unsigned char head[9] = {1};
    for (int i = 0; i < 8; i++) {
        head[1 + i] = (unsigned char)(size >> (56 - 8 * i));
    }
    assert_int_equal(write(fd, head, 9), 9);
    assert_int_equal(send(fd, data, size, MSG_NOSIGNAL), (ssize_t)size);
}

static size_t receive_frame(int fd, void *data, size_t room)
{
    unsigned char head[9];
    size_t size = 0;
    read_all(fd, head, 9);
    for (int i = 0; i < 8; i++) {
        size = size << 8 | head[1 + i];
    }
    assert_true(size <= room);
    read_all(fd, data, size);
    return size;
}

static void wait_pipes(world *w, spurion_channel channel, int64_t want)
{
    spurion_transport_stats s;
    do {
        sched_yield();
        spurion_transport_stats_get(&s, w->t);
    } while (s.pipes[channel] != want); /* the test's own time limit ends a wait in vain */
}

/* ---- what must hold ---- */

static void test_transport_answers_calls(void **state)
{
    world *w = *state;
    char data[64];
    int fd = dial(w->rpc, 0x30);

    for (int i = 0; i < 100; i++) {
        char out[16] = {(char)0x80, 0, 0, (char)i};
        int n = 4 + snprintf(out + 4, 12, "call %d", i);
        send_frame(fd, out, (size_t)n);
        assert_int_equal(receive_frame(fd, data, sizeof data), n);
        assert_memory_equal(data, out, (size_t)n);
    }
    close(fd);
    wait_pipes(w, SPURION_CHANNEL_RPC, 0);
}

static void test_transport_keeps_a_call_until_it_is_answered(void **state)
{
    world *w = *state;
    char data[64];
    int slow = dial(w->rpc, 0x30), fast = dial(w->rpc, 0x30);

    send_frame(slow, "\x80\0\0\1hold", 8);
    while (atomic_load(&w->held) == NULL) {
        sched_yield();
    }
    send_frame(fast, "\x80\0\0\2quick", 9); /* nobody waits for the slow one */
    assert_int_equal(receive_frame(fast, data, sizeof data), 9);
    spurion_transport_reply(atomic_exchange(&w->held, NULL), "done", 4);
    assert_int_equal(receive_frame(slow, data, sizeof data), 8);
    assert_memory_equal(data, "\x80\0\0\1done", 8);
    close(slow);
    close(fast);
    wait_pipes(w, SPURION_CHANNEL_RPC, 0);
}

static void test_transport_survives_a_caller_that_left(void **state)
{
    world *w = *state;
    char data[64];

    for (int i = 0; i < SPURION_TRANSPORT_CALLS + 10; i++) { /* more than there are contexts: each comes back */
        int fd = dial(w->rpc, 0x30);
        send_frame(fd, "\x80\0\0\1hold", 8);
        while (atomic_load(&w->held) == NULL) {
            sched_yield();
        }
        close(fd);
        spurion_transport_reply(atomic_exchange(&w->held, NULL), "late", 4);
    }
    wait_pipes(w, SPURION_CHANNEL_RPC, 0);
    int fd = dial(w->rpc, 0x30);
    send_frame(fd, "\x80\0\0\1well", 8);
    assert_int_equal(receive_frame(fd, data, sizeof data), 8);
    close(fd);
    wait_pipes(w, SPURION_CHANNEL_RPC, 0);
}

static void test_transport_drops_a_frame_over_the_limit(void **state)
{
    world *w = *state;
    unsigned char head[9] = {1, 0, 0, 0, 0, 0x01, 0, 0, 0x01}; /* 16 MiB and one byte */
    char data[8];
    int fd = dial(w->rpc, 0x30);

    assert_int_equal(write(fd, head, 9), 9);
    assert_true(read(fd, data, sizeof data) <= 0); /* closed, before a byte of it is read */
    close(fd);
    wait_pipes(w, SPURION_CHANNEL_RPC, 0);
}

static void test_transport_takes_taps(void **state)
{
    world *w = *state;
    int fd = dial(w->taps, 0x20), before = atomic_load(&w->tap_count);
    size_t size = 1 << 20;
    char *data = calloc(1, size);

    for (int i = 0; i < 8; i++) {
        send_frame(fd, data, size);
    }
    while (atomic_load(&w->tap_count) < before + 8) {
        sched_yield();
    }
    assert_int_equal(atomic_load(&w->tap_bytes), 8 * size);
    close(fd);
    free(data);
    wait_pipes(w, SPURION_CHANNEL_ROLLOUTS, 0);
}

static void test_transport_publishes_to_all(void **state)
{
    world *w = *state;
    int fds[3];
    char data[64];

    for (int i = 0; i < 3; i++) {
        fds[i] = dial(w->alerts, 0x21);
    }
    wait_pipes(w, SPURION_CHANNEL_ALERTS, 3);
    for (int i = 0; i < 10; i++) {
        spurion_transport_publish(w->t, "alert", 5);
    }
    for (int i = 0; i < 3; i++) {
        for (int k = 0; k < 10; k++) {
            assert_int_equal(receive_frame(fds[i], data, sizeof data), 5);
        }
        close(fds[i]);
    }
    wait_pipes(w, SPURION_CHANNEL_ALERTS, 0);
}

static void test_transport_a_stopped_subscriber_blocks_nobody(void **state)
{
    world *w = *state;
    int deaf = dial(w->alerts, 0x21);
    char data[1024] = {0};

    wait_pipes(w, SPURION_CHANNEL_ALERTS, 1);
    for (int i = 0; i < 20000; i++) { /* far more than its buffers hold; it never reads */
        spurion_transport_publish(w->t, data, sizeof data);
    }
    close(deaf);
    wait_pipes(w, SPURION_CHANNEL_ALERTS, 0);
}

static void test_transport_refuses_too_many(void **state)
{
    world *w = *state;
    spurion_transport_stats before, after;
    static int fds[SPURION_CONNECTIONS_MAX];
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    char data[16];
    int one;

    spurion_transport_stats_get(&before, w->t);
    for (int i = 0; i < SPURION_CONNECTIONS_MAX; i++) {
        fds[i] = dial(w->rpc, 0x30);
    }
    wait_pipes(w, SPURION_CHANNEL_RPC, SPURION_CONNECTIONS_MAX);
    one = socket(AF_UNIX, SOCK_STREAM, 0);
    strcpy(to.sun_path, w->rpc + 6);
    assert_int_equal(connect(one, (struct sockaddr *)&to, sizeof to), 0);
    assert_int_equal(send(one, "\0SP\0\0\x30\0\0", 8, MSG_NOSIGNAL), 8);
    while (read(one, data, sizeof data) > 0) { /* a greeting, then the end */
    }
    spurion_transport_stats_get(&after, w->t);
    assert_int_equal(after.refused, before.refused + 1);
    close(one);
    for (int i = 0; i < SPURION_CONNECTIONS_MAX; i++) {
        close(fds[i]);
    }
    wait_pipes(w, SPURION_CHANNEL_RPC, 0);
}

static void test_transport_listens_only_where_it_may(void **state)
{
    world *w = *state;
    struct stat s;

    assert_int_equal(spurion_transport_listen(w->t, SPURION_CHANNEL_RPC, "tcp://0.0.0.0:0", false).code, SPURION_FAILED_PRECONDITION);
    assert_int_equal(spurion_transport_listen(w->t, SPURION_CHANNEL_RPC, "tcp://127.evil.example:0", false).code, SPURION_FAILED_PRECONDITION);
    assert_int_equal(spurion_transport_listen(w->t, SPURION_CHANNEL_RPC, "abstract://x", false).code, SPURION_FAILED_PRECONDITION);
    assert_int_equal(spurion_transport_listen(w->t, SPURION_CHANNEL_RPC, "ws://127.0.0.1:0", false).code, SPURION_FAILED_PRECONDITION);
    assert_int_equal(spurion_transport_listen(w->t, SPURION_CHANNEL_RPC, "ipc://relative", false).code, SPURION_FAILED_PRECONDITION);
    assert_int_equal(spurion_transport_listen(w->t, SPURION_CHANNEL_RPC, w->rpc, false).code, SPURION_UNAVAILABLE);
    assert_int_equal(spurion_transport_listen(w->t, SPURION_CHANNEL_RPC, "tcp://127.0.0.1:0", false).code, SPURION_OK);
    assert_int_equal(stat(w->rpc + 6, &s), 0);
    assert_int_equal(s.st_mode & 0777, 0660);
    *strrchr(w->rpc, '/') = '\0';
    assert_int_equal(stat(w->rpc + 6, &s), 0);
    assert_int_equal(s.st_mode & 0777, 0750);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_transport_answers_calls),
        cmocka_unit_test(test_transport_keeps_a_call_until_it_is_answered),
        cmocka_unit_test(test_transport_survives_a_caller_that_left),
        cmocka_unit_test(test_transport_drops_a_frame_over_the_limit),
        cmocka_unit_test(test_transport_takes_taps),
        cmocka_unit_test(test_transport_publishes_to_all),
        cmocka_unit_test(test_transport_a_stopped_subscriber_blocks_nobody),
        cmocka_unit_test(test_transport_refuses_too_many),
        cmocka_unit_test(test_transport_listens_only_where_it_may),
    };
    int failed = cmocka_run_group_tests(tests, set_up, NULL);
    (void)fflush(NULL);
    _exit(failed != 0); /* nng's threads stay behind, as in the daemon */
}

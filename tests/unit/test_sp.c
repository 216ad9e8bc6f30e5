/* SP over plain sockets against real nng peers (libnng is in this test only) and against peers that misbehave byte by byte. */
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <cmocka.h>

#include <nng/nng.h>
#include <nng/protocol/pipeline0/pull.h>
#include <nng/protocol/pubsub0/pub.h>
#include <nng/protocol/pubsub0/sub.h>
#include <nng/protocol/reqrep0/rep.h>

#include "handle.h"

#define PATIENCE_MS 10000

static char folder[64];

static int make_folder(void **state)
{
    (void)state;
    (void)snprintf(folder, sizeof folder, "/tmp/spurion-sp.XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    char command[128];
    (void)state;
    (void)snprintf(command, sizeof command, "rm -rf '%s'", folder);
    return system(command);
}

static const char *ipc_url(const char *name)
{
    static char url[128];
    (void)snprintf(url, sizeof url, "ipc://%s/%s", folder, name);
    return url;
}

static void must(spurion_status st)
{
    if (st.code != SPURION_OK) {
        fail_msg("%s: %s", spurion_code_name(st.code), st.message);
    }
}

/* A listener of nng; for tcp the port is found out. */
static void nng_serve(char url_out[128], nng_socket s, const char *url)
{
    nng_listener l;
    int port = 0;

    assert_int_equal(nng_socket_set_ms(s, NNG_OPT_RECVTIMEO, PATIENCE_MS), 0);
    assert_int_equal(nng_socket_set_size(s, NNG_OPT_RECVMAXSZ, SPURION_FRAME_BYTES_MAX), 0);
    assert_int_equal(nng_listen(s, url, &l, 0), 0);
    if (strncmp(url, "tcp", 3) == 0) {
        assert_int_equal(nng_listener_get_int(l, NNG_OPT_TCP_BOUND_PORT, &port), 0);
        (void)snprintf(url_out, 128, "tcp://127.0.0.1:%d", port);
    } else {
        (void)snprintf(url_out, 128, "%s", url);
    }
}

/* Steps until the connection is open. */
static void open_up(spurion_sp *s)
{
    int64_t deadline = spurion_sp_now_ms() + PATIENCE_MS;
    spurion_status st = spurion_sp_step(s);

    while (st.code != SPURION_OK && spurion_sp_now_ms() < deadline) {
        assert_int_equal(st.code, SPURION_UNAVAILABLE);
        spurion_sp_wait(s, false, 100);
        st = spurion_sp_step(s);
    }
    must(st);
}

/* Bytes whose place can be told from their value. */
static void pattern(unsigned char *data, size_t size, unsigned seed)
{
    for (size_t i = 0; i < size; i++) {
        data[i] = (unsigned char)(i * 31 + (i >> 8) * 7 + seed);
    }
}

/* --- requests --- */

/* One request to an nng REP socket and its answer: the request turned round, at most a reply's size. */
static void round_trip(spurion_call *k, nng_socket rep, size_t size)
{
    unsigned char *data = malloc(size + 1);
    spurion_bytes reply = {NULL, 0};
    int64_t deadline = spurion_sp_now_ms() + PATIENCE_MS;
    size_t back;
    void *got = NULL;
    size_t got_size = 0;
    bool arrived = false; /* nng gives NULL for an empty message */

    assert_non_null(data);
    pattern(data, size, (unsigned)size);
    must(spurion_call_start(k, (spurion_bytes){(const char *)data, size}));
    while (!arrived && spurion_sp_now_ms() < deadline) {
        spurion_status st = spurion_call_step(k, &reply);
        assert_true(st.code == SPURION_OK || st.code == SPURION_UNAVAILABLE);
        arrived = nng_recv(rep, &got, &got_size, NNG_FLAG_ALLOC | NNG_FLAG_NONBLOCK) == 0;
        if (!arrived) {
            spurion_sp_wait(&k->sp, k->frame_at < k->frame_size, 5);
        }
    }
    assert_true(arrived);
    assert_int_equal(got_size, size);
    assert_true(size == 0 || memcmp(got, data, size) == 0);
    back = size < SPURION_REPLY_BYTES_MAX ? size : SPURION_REPLY_BYTES_MAX;
    for (size_t i = 0; i < back; i++) {
        data[i] = ((unsigned char *)got)[size - 1 - i];
    }
    nng_free(got, got_size);
    assert_int_equal(nng_send(rep, data, back, 0), 0);
    while (!reply.data && spurion_sp_now_ms() < deadline) {
        must(spurion_call_step(k, &reply));
        if (!reply.data) {
            spurion_sp_wait(&k->sp, false, 100);
        }
    }
    assert_non_null(reply.data);
    assert_int_equal(reply.size, back);
    assert_memory_equal(reply.data, data, back);
    assert_false(k->under_way);
    free(data);
}

static void requests(const char *where)
{
    static const size_t sizes[] = {0, 1, 3, 4, 255, 256, 32764, 32768, 70000, 5000000, SPURION_FRAME_BYTES_MAX - 4};
    nng_socket rep;
    spurion_call k;
    char url[128];

    assert_int_equal(nng_rep0_open(&rep), 0);
    nng_serve(url, rep, where);
    must(spurion_call_init(&k, url));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        round_trip(&k, rep, sizes[i]);
    }
    assert_int_equal(k.sp.opened, 1);
    spurion_call_fini(&k);
    nng_close(rep);
}

static void test_sp_requests_reach_nng_over_ipc(void **state)
{
    (void)state;
    requests(ipc_url("rep"));
}

static void test_sp_requests_reach_nng_over_tcp(void **state)
{
    (void)state;
    requests("tcp://127.0.0.1:0");
}

static void test_sp_refuses_a_request_over_the_limit(void **state)
{
    spurion_call k;
    spurion_status st;
    char *data = calloc(1, SPURION_FRAME_BYTES_MAX);

    (void)state;
    assert_non_null(data);
    must(spurion_call_init(&k, ipc_url("none")));
    st = spurion_call_start(&k, (spurion_bytes){data, SPURION_FRAME_BYTES_MAX - 3});
    assert_int_equal(st.code, SPURION_RESOURCE_EXHAUSTED);
    assert_non_null(strstr(st.message, "expected at most 16777216"));
    spurion_call_fini(&k);
    free(data);
}

/* --- publish, subscribe --- */

static void send_all(spurion_sp *s, const unsigned char *data, size_t size)
{
    int64_t deadline = spurion_sp_now_ms() + PATIENCE_MS;
    unsigned char header[9];
    size_t at = 0, head = spurion_sp_header(s, header, size);

    while (at < head && spurion_sp_now_ms() < deadline) {
        must(spurion_sp_send(s, header, head, &at));
    }
    for (at = 0; at < size && spurion_sp_now_ms() < deadline;) {
        must(spurion_sp_send(s, data, size, &at));
        if (at < size) {
            spurion_sp_wait(s, true, 100);
        }
    }
    assert_int_equal(at, size);
}

static void publishes(const char *where)
{
    nng_socket sub;
    spurion_sp s;
    char url[128];
    unsigned char *data = malloc(300000);

    assert_non_null(data);
    assert_int_equal(nng_sub0_open(&sub), 0);
    assert_int_equal(nng_socket_set(sub, NNG_OPT_SUB_SUBSCRIBE, "", 0), 0);
    assert_int_equal(nng_socket_set_int(sub, NNG_OPT_RECVBUF, 128), 0);
    nng_serve(url, sub, where);
    must(spurion_sp_init(&s, url, SPURION_SP_PUB, SPURION_SP_SUB, 0));
    open_up(&s);
    for (unsigned i = 0; i < 100; i++) {
        size_t size = i * i * 29, got_size;
        void *got;
        pattern(data, size, i);
        send_all(&s, data, size);
        assert_int_equal(nng_recv(sub, &got, &got_size, NNG_FLAG_ALLOC), 0);
        assert_int_equal(got_size, size);
        assert_memory_equal(got, data, size);
        nng_free(got, got_size);
    }
    spurion_sp_fini(&s);
    nng_close(sub);
    free(data);
}

static void test_sp_publishes_to_nng_over_ipc(void **state)
{
    (void)state;
    publishes(ipc_url("sub"));
}

static void test_sp_publishes_to_nng_over_tcp(void **state)
{
    (void)state;
    publishes("tcp://127.0.0.1:0");
}

static void test_sp_receives_what_nng_publishes(void **state)
{
    nng_socket pub;
    spurion_sp s;
    char url[128];
    const unsigned char *data;
    size_t size;
    unsigned seen = 0, last = 0;
    int64_t deadline = spurion_sp_now_ms() + PATIENCE_MS;

    (void)state;
    assert_int_equal(nng_pub0_open(&pub), 0);
    nng_serve(url, pub, "tcp://127.0.0.1:0");
    must(spurion_sp_init(&s, url, SPURION_SP_SUB, SPURION_SP_PUB, 1024));
    open_up(&s);
    for (unsigned n = 1; seen < 50 && spurion_sp_now_ms() < deadline; n++) { /* nng takes a moment to serve a new pipe: the first may be missed */
        unsigned char out[1024];
        size_t out_size = 4 + n % 1000;
        pattern(out, sizeof out, n);
        memcpy(out, &n, sizeof n);
        assert_int_equal(nng_send(pub, out, out_size, 0), 0);
        spurion_sp_wait(&s, false, 20);
        must(spurion_sp_receive(&s, &data, &size));
        if (data) {
            unsigned got;
            memcpy(&got, data, sizeof got);
            assert_true(got > last);
            assert_int_equal(size, 4 + got % 1000);
            pattern(out, sizeof out, got);
            memcpy(out, &got, sizeof got);
            assert_memory_equal(data, out, size);
            last = got;
            seen++;
        }
    }
    assert_int_equal(seen, 50);
    spurion_sp_fini(&s);
    nng_close(pub);
}

static void test_sp_refuses_another_protocol(void **state)
{
    nng_socket pull;
    spurion_sp s;
    spurion_status st = spurion_ok();
    char url[128];

    (void)state;
    assert_int_equal(nng_pull0_open(&pull), 0);
    nng_serve(url, pull, ipc_url("pull"));
    must(spurion_sp_init(&s, url, SPURION_SP_REQ, SPURION_SP_REP, 1024));
    for (int i = 0; i < 100 && !strstr(st.message, "greeting of"); i++) {
        st = spurion_sp_step(&s);
        assert_int_equal(st.code, SPURION_UNAVAILABLE);
        spurion_sp_wait(&s, false, 50);
    }
    assert_non_null(strstr(st.message, "expected the greeting of SP protocol 0x31"));
    st = spurion_sp_step(&s); /* and says so still while it waits to dial again */
    assert_non_null(strstr(st.message, "0x31"));
    spurion_sp_fini(&s);
    nng_close(pull);
}

/* --- peers made of plain sockets --- */

static int plain_listen(const char *name)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    (void)snprintf(a.sun_path, sizeof a.sun_path, "%s/%s", folder, name);
    assert_true(fd >= 0);
    (void)unlink(a.sun_path);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(fd, 8), 0);
    return fd;
}

static const unsigned char rep_greeting[8] = {0, 'S', 'P', 0, 0, 0x31, 0, 0};

/* Accepts a client and greets it byte by byte. Gives the peer's socket. */
static int greet_slowly(spurion_sp *s, int listener)
{
    unsigned char got[8];
    int fd;

    (void)spurion_sp_step(s).code;
    fd = accept(listener, NULL, NULL);
    assert_true(fd >= 0);
    for (int i = 0; i < 8; i++) {
        spurion_status st = spurion_sp_step(s);
        assert_int_equal(st.code, SPURION_UNAVAILABLE);
        assert_int_equal(send(fd, rep_greeting + i, 1, 0), 1);
    }
    open_up(s);
    assert_int_equal(recv(fd, got, sizeof got, MSG_WAITALL), 8);
    assert_memory_equal(got, "\0SP\0\0\x30\0\0", 8);
    return fd;
}

static void test_sp_reads_frames_byte_by_byte(void **state)
{
    static const unsigned char frames[] = {1, 0, 0, 0, 0, 0, 0, 0, 3, 'a', 'b', 'c', 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 'x'};
    static const char *const expected[] = {"abc", "", "x"};
    int listener = plain_listen("slow"), fd, found = 0;
    spurion_sp s;

    (void)state;
    must(spurion_sp_init(&s, ipc_url("slow"), SPURION_SP_REQ, SPURION_SP_REP, 16));
    fd = greet_slowly(&s, listener);
    for (size_t i = 0; i < sizeof frames; i++) {
        const unsigned char *data;
        size_t size;
        assert_int_equal(send(fd, frames + i, 1, 0), 1);
        must(spurion_sp_receive(&s, &data, &size));
        if (data) {
            assert_int_equal(size, strlen(expected[found]));
            assert_memory_equal(data, expected[found], size);
            found++;
        }
    }
    assert_int_equal(found, 3);
    assert_true(s.in_capacity <= 32);
    spurion_sp_fini(&s);
    close(fd);
    close(listener);
}

/* A header that must end the connection before any memory is taken for it. */
static void refuse_header(const unsigned char header[9], const char *part)
{
    int listener = plain_listen("bad"), fd;
    spurion_sp s;
    const unsigned char *data;
    size_t size;
    spurion_status st;

    must(spurion_sp_init(&s, ipc_url("bad"), SPURION_SP_REQ, SPURION_SP_REP, 1000));
    fd = greet_slowly(&s, listener);
    assert_int_equal(send(fd, header, 9, 0), 9);
    st = spurion_sp_receive(&s, &data, &size);
    assert_int_equal(st.code, SPURION_UNAVAILABLE);
    assert_non_null(strstr(st.message, part));
    assert_null(data);
    assert_int_equal(s.state, SPURION_SP_CLOSED);
    assert_true(s.in_capacity < 1100);
    spurion_sp_fini(&s);
    close(fd);
    close(listener);
}

static void test_sp_refuses_frames_over_the_limit(void **state)
{
    (void)state;
    refuse_header((const unsigned char *)"\1\0\0\0\0\0\0\3\351", "expected a message of at most 1000 bytes, found 1001");
    refuse_header((const unsigned char *)"\1\377\377\377\377\377\377\377\377", "found 18446744073709551615");
    refuse_header((const unsigned char *)"\2\0\0\0\0\0\0\0\1", "expected a message");
}

static void test_sp_comes_back_after_a_break_in_a_frame(void **state)
{
    int listener = plain_listen("cut"), fd;
    spurion_sp s;
    const unsigned char *data;
    size_t size;
    spurion_status st;

    (void)state;
    must(spurion_sp_init(&s, ipc_url("cut"), SPURION_SP_REQ, SPURION_SP_REP, 1000));
    fd = greet_slowly(&s, listener);
    assert_int_equal(send(fd, "\1\0\0\0\0\0\0\0\5ab", 11, 0), 11);
    must(spurion_sp_receive(&s, &data, &size));
    assert_null(data);
    close(fd);
    st = spurion_sp_receive(&s, &data, &size);
    assert_int_equal(st.code, SPURION_UNAVAILABLE);
    assert_non_null(strstr(st.message, "closed by the daemon"));
    while (s.state == SPURION_SP_CLOSED) { /* the pause before dialling again */
        spurion_sp_wait(&s, false, 100);
        (void)spurion_sp_step(&s).code;
    }
    fd = greet_slowly(&s, listener);
    assert_int_equal(s.opened, 2);
    assert_int_equal(send(fd, "\1\0\0\0\0\0\0\0\2ok", 11, 0), 11);
    must(spurion_sp_receive(&s, &data, &size));
    assert_int_equal(size, 2); /* nothing of the broken frame is left */
    assert_memory_equal(data, "ok", 2);
    spurion_sp_fini(&s);
    close(fd);
    close(listener);
}

static void test_sp_never_waits_for_a_silent_peer(void **state)
{
    int listener = plain_listen("silent");
    spurion_sp s;
    int64_t start;

    (void)state;
    must(spurion_sp_init(&s, ipc_url("silent"), SPURION_SP_REQ, SPURION_SP_REP, 1000));
    start = spurion_sp_now_ms();
    for (int i = 0; i < 1000; i++) {
        spurion_status st = spurion_sp_step(&s);
        assert_int_equal(st.code, SPURION_UNAVAILABLE);
    }
    assert_true(spurion_sp_now_ms() - start < 1000);
    assert_int_equal(s.state, SPURION_SP_GREETING);
    spurion_sp_fini(&s);
    close(listener);
}

static void test_sp_says_why_there_is_no_connection(void **state)
{
    spurion_sp s;
    spurion_status st;

    (void)state;
    must(spurion_sp_init(&s, ipc_url("nobody"), SPURION_SP_REQ, SPURION_SP_REP, 1000));
    for (int i = 0; i < 50; i++) { /* also between attempts */
        st = spurion_sp_step(&s);
        assert_int_equal(st.code, SPURION_UNAVAILABLE);
        assert_non_null(strstr(st.message, "No such file or directory"));
    }
    spurion_sp_fini(&s);
    must(spurion_sp_init(&s, "tcp://127.0.0.1:1", SPURION_SP_REQ, SPURION_SP_REP, 1000));
    st = spurion_sp_step(&s);
    for (int i = 0; i < 100 && !strstr(st.message, "refused"); i++) {
        spurion_sp_wait(&s, false, 20);
        st = spurion_sp_step(&s);
    }
    assert_non_null(strstr(st.message, "Connection refused"));
    spurion_sp_fini(&s);
    assert_int_equal(spurion_sp_init(&s, "http://x", SPURION_SP_REQ, SPURION_SP_REP, 1).code, SPURION_INVALID_ARGUMENT);
    assert_int_equal(spurion_sp_init(&s, "ipc://", SPURION_SP_REQ, SPURION_SP_REP, 1).code, SPURION_INVALID_ARGUMENT);
}

/* Takes a request from the plain peer's side: its SP id and body. */
static uint32_t take_request(int fd, char *body, size_t size)
{
    unsigned char head[13];
    uint64_t length = 0;

    assert_int_equal(recv(fd, head, sizeof head, MSG_WAITALL), (ssize_t)sizeof head);
    assert_int_equal(head[0], 1);
    for (int i = 1; i < 9; i++) {
        length = length << 8 | head[i];
    }
    assert_int_equal(length, size + 4);
    assert_int_equal(recv(fd, body, size, MSG_WAITALL), (ssize_t)size);
    return (uint32_t)head[9] << 24 | (uint32_t)head[10] << 16 | (uint32_t)head[11] << 8 | head[12];
}

static void answer_request(int fd, uint32_t id, char byte)
{
    unsigned char frame[14] = {1, 0, 0, 0, 0, 0, 0, 0, 5, (unsigned char)(id >> 24), (unsigned char)(id >> 16), (unsigned char)(id >> 8),
                               (unsigned char)id, (unsigned char)byte};
    assert_int_equal(send(fd, frame, sizeof frame, 0), (ssize_t)sizeof frame);
}

static void test_sp_asks_again_on_a_new_connection_and_ignores_other_answers(void **state)
{
    int listener = plain_listen("again"), fd;
    spurion_call k;
    spurion_bytes reply;
    char body[5];
    uint32_t id, again;

    (void)state;
    must(spurion_call_init(&k, ipc_url("again")));
    must(spurion_call_start(&k, (spurion_bytes){"hello", 5}));
    fd = greet_slowly(&k.sp, listener);
    must(spurion_call_step(&k, &reply));
    id = take_request(fd, body, 5);
    assert_true(id & 0x80000000U);
    close(fd); /* the daemon dies with the request in hand */
    assert_int_equal(spurion_call_step(&k, &reply).code, SPURION_UNAVAILABLE);
    assert_true(k.under_way);
    while (k.sp.state == SPURION_SP_CLOSED) {
        spurion_sp_wait(&k.sp, false, 100);
        (void)spurion_sp_step(&k.sp).code;
    }
    fd = greet_slowly(&k.sp, listener);
    must(spurion_call_step(&k, &reply));
    again = take_request(fd, body, 5);
    assert_int_equal(again, id);
    assert_memory_equal(body, "hello", 5);
    answer_request(fd, id - 1, 'x'); /* an answer to something else */
    answer_request(fd, id, 'y');
    must(spurion_call_step(&k, &reply));
    assert_int_equal(reply.size, 1);
    assert_int_equal(*reply.data, 'y');
    spurion_call_fini(&k);
    close(fd);
    close(listener);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sp_requests_reach_nng_over_ipc),
        cmocka_unit_test(test_sp_requests_reach_nng_over_tcp),
        cmocka_unit_test(test_sp_refuses_a_request_over_the_limit),
        cmocka_unit_test(test_sp_publishes_to_nng_over_ipc),
        cmocka_unit_test(test_sp_publishes_to_nng_over_tcp),
        cmocka_unit_test(test_sp_receives_what_nng_publishes),
        cmocka_unit_test(test_sp_refuses_another_protocol),
        cmocka_unit_test(test_sp_reads_frames_byte_by_byte),
        cmocka_unit_test(test_sp_refuses_frames_over_the_limit),
        cmocka_unit_test(test_sp_comes_back_after_a_break_in_a_frame),
        cmocka_unit_test(test_sp_never_waits_for_a_silent_peer),
        cmocka_unit_test(test_sp_says_why_there_is_no_connection),
        cmocka_unit_test(test_sp_asks_again_on_a_new_connection_and_ignores_other_answers),
    };
    return cmocka_run_group_tests_name("sp", tests, make_folder, remove_folder);
}

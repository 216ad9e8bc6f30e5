/* See transport.h. Memory: everything is taken in create; nng copies messages. State of a context is owned by whoever holds its call:
 * nng while it receives or sends, the handler's side in between; the hand-over is nng's own lock. */
#include "daemon/transport.h"

#include <arpa/inet.h>
#include <errno.h>
#include <grp.h>
#include <pwd.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nng/nng.h>
#include <nng/protocol/pubsub0/pub.h>
#include <nng/protocol/pubsub0/sub.h>
#include <nng/protocol/reqrep0/rep.h>

#include "daemon/base/check.h"
#include "daemon/base/log.h"

#define TAPS_QUEUED 32      /* messages that wait in nng while a callback decodes; more are dropped and asked for again by Sync */
#define GROUPS_MAX 256      /* groups of a peer that are looked at */

struct spurion_transport_call {
    spurion_transport *transport;
    nng_ctx ctx;
    nng_aio *aio;
    enum { CALL_RECEIVING, CALL_HELD, CALL_SENDING } state;
};

typedef struct channel {
    spurion_transport *transport;
    nng_socket socket;
    _Atomic int64_t pipes;
} channel;

struct spurion_transport {
    spurion_transport_handlers handlers;
    channel channels[SPURION_CHANNEL_COUNT];
    nng_aio *tap_aio;
    spurion_transport_call calls[SPURION_TRANSPORT_CALLS];
    _Atomic uint64_t refused, requests, taps, published, publish_failed;
};

static spurion_status nng_failed(const char *what, int rv)
{
    spurion_code code = rv == NNG_EADDRINUSE ? SPURION_UNAVAILABLE : rv == NNG_EPERM ? SPURION_PERMISSION_DENIED : SPURION_INTERNAL;
    return spurion_error(code, "%s: %s", what, nng_strerror(rv));
}

/* ---- rpc: receive -> held -> send -> receive, for ever ---- */

static void call_receive(spurion_transport_call *c)
{
    c->state = CALL_RECEIVING;
    nng_ctx_recv(c->ctx, c->aio);
}

static void call_event(void *arg)
{
    spurion_transport_call *c = arg;
    spurion_transport *t = c->transport;
    int rv = nng_aio_result(c->aio);
    nng_msg *m;

    if (c->state == CALL_SENDING) {
        if (rv != 0) { /* the peer is gone: the message stays ours */
            nng_msg_free(nng_aio_get_msg(c->aio));
            nng_aio_set_msg(c->aio, NULL);
        }
        call_receive(c);
        return;
    }
    SPURION_ASSERT(c->state == CALL_RECEIVING);
    if (rv != 0) {
        if (rv != NNG_ECLOSED) {
            call_receive(c);
        }
        return;
    }
    m = nng_aio_get_msg(c->aio);
    nng_aio_set_msg(c->aio, NULL);
    c->state = CALL_HELD;
    atomic_fetch_add_explicit(&t->requests, 1, memory_order_relaxed);
    t->handlers.request(t->handlers.context, c, nng_msg_body(m), nng_msg_len(m));
    nng_msg_free(m);
}

void spurion_transport_reply(spurion_transport_call *call, const char *data, size_t size)
{
    nng_msg *m = NULL;

    SPURION_ASSERT(call->state == CALL_HELD);
    SPURION_ASSERT(size <= SPURION_REPLY_BYTES_MAX);
    if (nng_msg_alloc(&m, 0) != 0 || nng_msg_append(m, data, size) != 0) {
        if (m != NULL) {
            nng_msg_free(m);
        }
        spurion_log_error("TRANSPORT-MEMORY", "no memory for a reply of %zu bytes; the caller will time out", size);
        call_receive(call);
        return;
    }
    call->state = CALL_SENDING;
    nng_aio_set_msg(call->aio, m);
    nng_ctx_send(call->ctx, call->aio);
}

/* ---- rollouts ---- */

static void tap_event(void *arg)
{
    spurion_transport *t = arg;
    int rv = nng_aio_result(t->tap_aio);

    if (rv == NNG_ECLOSED) {
        return;
    }
    if (rv == 0) {
        nng_msg *m = nng_aio_get_msg(t->tap_aio);
        nng_aio_set_msg(t->tap_aio, NULL);
        atomic_fetch_add_explicit(&t->taps, 1, memory_order_relaxed);
        t->handlers.tap(t->handlers.context, nng_msg_body(m), nng_msg_len(m));
        nng_msg_free(m);
    }
    nng_recv_aio(t->channels[SPURION_CHANNEL_ROLLOUTS].socket, t->tap_aio);
}

/* ---- alerts ---- */

void spurion_transport_publish(spurion_transport *t, const char *data, size_t size)
{
    nng_msg *m = NULL;
    int rv = nng_msg_alloc(&m, 0);

    if (rv == 0 && (rv = nng_msg_append(m, data, size)) == 0) {
        rv = nng_sendmsg(t->channels[SPURION_CHANNEL_ALERTS].socket, m, NNG_FLAG_NONBLOCK);
    }
    if (rv != 0) {
        if (m != NULL) {
            nng_msg_free(m);
        }
        atomic_fetch_add_explicit(&t->publish_failed, 1, memory_order_relaxed);
        return;
    }
    atomic_fetch_add_explicit(&t->published, 1, memory_order_relaxed);
}

/* ---- who may connect ---- */

/* Whether uid has our group among its groups, so that the socket's mode 0660 was meant for it. */
static bool in_our_group(uid_t uid)
{
    struct passwd pw, *found = NULL;
    char text[4096];
    gid_t groups[GROUPS_MAX];
    int n = GROUPS_MAX;

    if (getpwuid_r(uid, &pw, text, sizeof text, &found) != 0 || found == NULL) {
        return false;
    }
    if (getgrouplist(pw.pw_name, pw.pw_gid, groups, &n) < 0) {
        return false;
    }
    for (int i = 0; i < n; i++) {
        if (groups[i] == getegid()) {
            return true;
        }
    }
    return false;
}

static bool is_stranger(nng_pipe p)
{
    uint64_t uid, gid;

    if (nng_pipe_get_uint64(p, NNG_OPT_IPC_PEER_UID, &uid) != 0) {
        return false; /* not a unix socket */
    }
    if (uid == (uint64_t)geteuid() || uid == 0) {
        return false;
    }
    if (nng_pipe_get_uint64(p, NNG_OPT_IPC_PEER_GID, &gid) == 0 && gid == (uint64_t)getegid()) {
        return false;
    }
    return !in_our_group((uid_t)uid);
}

/* Every pipe that comes to ADD_PRE leaves by REM_POST, also one that is closed at once. */
static void pipe_event(nng_pipe p, nng_pipe_ev ev, void *arg)
{
    channel *c = arg;
    bool full;

    if (ev == NNG_PIPE_EV_REM_POST) {
        atomic_fetch_sub(&c->pipes, 1);
        return;
    }
    full = atomic_fetch_add(&c->pipes, 1) >= SPURION_CONNECTIONS_MAX;
    if (full || is_stranger(p)) {
        atomic_fetch_add(&c->transport->refused, 1);
        spurion_log_warn("TRANSPORT-REFUSED", "connection refused: %s", full ? "too many" : "peer is of another user and group");
        (void)nng_pipe_close(p);
    }
}

/* ---- set-up ---- */

static spurion_status channel_open(spurion_transport *t, spurion_channel which)
{
    channel *c = &t->channels[which];
    int rv = which == SPURION_CHANNEL_RPC        ? nng_rep0_open(&c->socket)
             : which == SPURION_CHANNEL_ROLLOUTS ? nng_sub0_open(&c->socket)
                                                 : nng_pub0_open(&c->socket);
    if (rv != 0) {
        return nng_failed("open socket", rv);
    }
    c->transport = t;
    /* First of all, before any listener exists: the library's default is no limit at all. */
    if ((rv = nng_socket_set_size(c->socket, NNG_OPT_RECVMAXSZ, SPURION_FRAME_BYTES_MAX)) != 0) {
        return nng_failed("set receive limit", rv);
    }
    if (which == SPURION_CHANNEL_ROLLOUTS) {
        if ((rv = nng_socket_set(c->socket, NNG_OPT_SUB_SUBSCRIBE, "", 0)) != 0 ||
            (rv = nng_socket_set_int(c->socket, NNG_OPT_RECVBUF, TAPS_QUEUED)) != 0) {
            return nng_failed("subscribe", rv);
        }
    } else if (which == SPURION_CHANNEL_ALERTS) {
        if ((rv = nng_socket_set_int(c->socket, NNG_OPT_SENDBUF, SPURION_TRANSPORT_ALERTS_QUEUED)) != 0) {
            return nng_failed("set send buffer", rv);
        }
    }
    if ((rv = nng_pipe_notify(c->socket, NNG_PIPE_EV_ADD_PRE, pipe_event, c)) != 0 ||
        (rv = nng_pipe_notify(c->socket, NNG_PIPE_EV_REM_POST, pipe_event, c)) != 0) {
        return nng_failed("watch connections", rv);
    }
    return spurion_ok();
}

static spurion_status calls_open(spurion_transport *t)
{
    for (int i = 0; i < SPURION_TRANSPORT_CALLS; i++) {
        spurion_transport_call *c = &t->calls[i];
        int rv = nng_aio_alloc(&c->aio, call_event, c);
        c->transport = t;
        if (rv == 0) {
            nng_aio_set_timeout(c->aio, NNG_DURATION_INFINITE);
            rv = nng_ctx_open(&c->ctx, t->channels[SPURION_CHANNEL_RPC].socket);
        }
        if (rv != 0) {
            return nng_failed("open context", rv);
        }
    }
    return spurion_ok();
}

spurion_status spurion_transport_create(spurion_transport **out, const spurion_transport_handlers *handlers)
{
    spurion_transport *t = calloc(1, sizeof *t);
    spurion_status st;
    int rv;

    *out = NULL;
    if (t == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "transport: no memory");
    }
    t->handlers = *handlers;
    for (int i = 0; i < SPURION_CHANNEL_COUNT; i++) {
        SPURION_TRY(st, channel_open(t, (spurion_channel)i));
    }
    SPURION_TRY(st, calls_open(t));
    if ((rv = nng_aio_alloc(&t->tap_aio, tap_event, t)) != 0) {
        st = nng_failed("open tap", rv);
        goto out;
    }
    nng_aio_set_timeout(t->tap_aio, NNG_DURATION_INFINITE);
    *out = t;
out:
    return st; /* a half-made transport stays: sockets are only left by the end of the process, which follows */
}

/* Makes the directories above path, 0750. */
static spurion_status make_parents(const char *path)
{
    char text[512];
    size_t n = strlen(path);

    if (n >= sizeof text || path[0] != '/') {
        return spurion_error(SPURION_FAILED_PRECONDITION, "listen: expected ipc:///absolute/path, found ipc://%s", path);
    }
    memcpy(text, path, n + 1);
    for (char *p = text + 1; *p != '\0'; p++) {
        if (*p != '/') {
            continue;
        }
        *p = '\0';
        if (mkdir(text, 0750) != 0 && errno != EEXIST) {
            return spurion_error(SPURION_PERMISSION_DENIED, "listen: cannot make directory %s: %s", text, strerror(errno));
        }
        *p = '/';
    }
    return spurion_ok();
}

static bool is_loopback(const char *host)
{
    struct in_addr four;

    if (host == NULL) {
        return false;
    }
    if (inet_pton(AF_INET, host, &four) == 1) {
        return ntohl(four.s_addr) >> 24 == 127;
    }
    return strcmp(host, "localhost") == 0 || strcmp(host, "::1") == 0;
}

static spurion_status check_url(const char *url, bool insecure)
{
    nng_url *u = NULL;
    spurion_status st = spurion_ok();

    if (strncmp(url, "ipc://", 6) == 0) {
        return make_parents(url + 6);
    }
    if (strncmp(url, "tcp://", 6) != 0) {
        return spurion_error(SPURION_FAILED_PRECONDITION, "listen: expected ipc:// or tcp://, found %s", url);
    }
    if (nng_url_parse(&u, url) != 0) {
        return spurion_error(SPURION_FAILED_PRECONDITION, "listen: expected tcp://host:port, found %s", url);
    }
    if (!is_loopback(u->u_hostname) && !insecure) {
        st = spurion_error(SPURION_FAILED_PRECONDITION,
                           "listen: expected a loopback address (nothing here is encrypted or asks for a password), found %s; "
                           "SPURION_INSECURE_LISTEN=1 listens there all the same", url);
    }
    nng_url_free(u);
    return st;
}

spurion_status spurion_transport_listen(spurion_transport *t, spurion_channel channel, const char *url, bool insecure)
{
    nng_listener l;
    char what[256];
    spurion_status st;
    int rv;

    SPURION_TRY(st, check_url(url, insecure));
    (void)snprintf(what, sizeof what, "listen on %s", url);
    if ((rv = nng_listener_create(&l, t->channels[channel].socket, url)) != 0) {
        return nng_failed(what, rv);
    }
    if (strncmp(url, "ipc://", 6) == 0) {
        rv = nng_listener_set_int(l, NNG_OPT_IPC_PERMISSIONS, 0660);
    } else {
        rv = nng_listener_set_bool(l, NNG_OPT_TCP_NODELAY, true);
    }
    if (rv != 0 || (rv = nng_listener_start(l, 0)) != 0) {
        return nng_failed(what, rv);
    }
out:
    return st;
}

void spurion_transport_start(spurion_transport *t)
{
    for (int i = 0; i < SPURION_TRANSPORT_CALLS; i++) {
        call_receive(&t->calls[i]);
    }
    nng_recv_aio(t->channels[SPURION_CHANNEL_ROLLOUTS].socket, t->tap_aio);
}

void spurion_transport_stats_get(spurion_transport_stats *out, const spurion_transport *t)
{
    for (int i = 0; i < SPURION_CHANNEL_COUNT; i++) {
        out->pipes[i] = atomic_load(&t->channels[i].pipes);
    }
    out->refused = atomic_load(&t->refused);
    out->requests = atomic_load(&t->requests);
    out->taps = atomic_load(&t->taps);
    out->published = atomic_load(&t->published);
    out->publish_failed = atomic_load(&t->publish_failed);
}

size_t spurion_transport_recv_bytes_max(const spurion_transport *t, spurion_channel channel)
{
    size_t bytes = 0;
    if (nng_socket_get_size(t->channels[channel].socket, NNG_OPT_RECVMAXSZ, &bytes) != 0) {
        return 0;
    }
    return bytes;
}

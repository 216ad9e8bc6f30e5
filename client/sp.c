/* SP over plain sockets; see sp.h. */
#include "sp.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define BACKOFF_MIN_MS 10
#define BACKOFF_MAX_MS 1000

int64_t spurion_sp_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

spurion_status spurion_sp_init(spurion_sp *s, const char *url, int self, int peer, size_t bytes_max)
{
    memset(s, 0, sizeof *s);
    s->fd = -1;
    s->self = self;
    s->peer = peer;
    s->bytes_max = bytes_max;
    if (strlen(url) >= sizeof s->url) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "address: expected at most %zu bytes, found %zu", sizeof s->url - 1, strlen(url));
    }
    if ((strncmp(url, "ipc://", 6) != 0 || !url[6]) && strncmp(url, "tcp://", 6) != 0) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "address: expected ipc:///path or tcp://host:port, found '%s'", url);
    }
    memcpy(s->url, url, strlen(url) + 1);
    s->local = url[0] == 'i';
    return spurion_ok();
}

void spurion_sp_drop(spurion_sp *s)
{
    if (s->fd >= 0) {
        close(s->fd);
    }
    s->fd = -1;
    s->state = SPURION_SP_CLOSED;
    s->in_size = 0;
    s->in_want = 0;
    s->in_header = false;
    /* jitter from the clock: processes that lost the same daemon do not return in step */
    s->backoff_ms = s->backoff_ms ? s->backoff_ms * 2 : BACKOFF_MIN_MS;
    s->backoff_ms = s->backoff_ms > BACKOFF_MAX_MS ? BACKOFF_MAX_MS : s->backoff_ms;
    s->retry_at_ms = spurion_sp_now_ms() + s->backoff_ms / 2 + spurion_sp_now_ms() % (s->backoff_ms / 2 + 1);
}

void spurion_sp_fini(spurion_sp *s)
{
    if (s->fd >= 0) {
        close(s->fd);
    }
    free(s->in);
    memset(s, 0, sizeof *s);
    s->fd = -1;
}

/* Drops the connection and keeps the reason for whoever asks while it is not made anew. */
static spurion_status gone(spurion_sp *s)
{
    spurion_sp_drop(s);
    return spurion_error(SPURION_UNAVAILABLE, "%s: %s", s->url, s->why);
}

static spurion_status broken(spurion_sp *s, const char *what, int error)
{
    (void)snprintf(s->why, sizeof s->why, "%s: %s", what, error ? strerror(error) : "closed by the daemon");
    return gone(s);
}

static spurion_status unix_dial(spurion_sp *s)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    const char *path = s->url + 6;

    if (strlen(path) >= sizeof a.sun_path) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a socket path below %zu bytes", s->url, sizeof a.sun_path);
    }
    memcpy(a.sun_path, path, strlen(path) + 1);
    s->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (s->fd < 0 || (connect(s->fd, (struct sockaddr *)&a, sizeof a) != 0 && errno != EINPROGRESS)) {
        return broken(s, "connect", errno);
    }
    s->state = SPURION_SP_CONNECTING;
    return spurion_ok();
}

static spurion_status tcp_dial(spurion_sp *s)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL, *use;
    char host[sizeof s->url], *port;
    int one = 1, rc;
    unsigned count = 0, turn;

    memcpy(host, s->url + 6, strlen(s->url + 6) + 1);
    port = strrchr(host, ':');
    if (!port) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected tcp://host:port", s->url);
    }
    *port++ = '\0';
    rc = getaddrinfo(host[0] == '[' ? strtok(host + 1, "]") : host, port, &hints, &found);
    if (rc != 0) {
        (void)snprintf(s->why, sizeof s->why, "%s", gai_strerror(rc));
        return gone(s);
    }
    for (use = found; use; use = use->ai_next) {
        count++;
    }
    for (use = found, turn = s->dials++ % count; turn > 0; turn--) {
        use = use->ai_next;
    }
    s->fd = socket(use->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    rc = s->fd >= 0 && connect(s->fd, use->ai_addr, use->ai_addrlen) == 0 ? 0 : errno;
    freeaddrinfo(found);
    if (s->fd < 0 || (rc != 0 && rc != EINPROGRESS)) {
        return broken(s, "connect", rc);
    }
    (void)setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    s->state = SPURION_SP_CONNECTING;
    return spurion_ok();
}

static spurion_status connect_finish(spurion_sp *s)
{
    struct pollfd p = {s->fd, POLLOUT, 0};
    int error = 0;
    socklen_t size = sizeof error;
    static const unsigned char head[4] = {0, 'S', 'P', 0};

    if (poll(&p, 1, 0) == 0) {
        return spurion_ok();
    }
    if (getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0 || error != 0) {
        return broken(s, "connect", error ? error : errno);
    }
    memcpy(s->greeting, head, sizeof head);
    s->greeting[4] = (unsigned char)(s->self >> 8);
    s->greeting[5] = (unsigned char)s->self;
    s->greeting[6] = s->greeting[7] = 0;
    s->greeting_sent = s->greeting_got = 0;
    s->state = SPURION_SP_GREETING;
    return spurion_ok();
}

static spurion_status greet(spurion_sp *s)
{
    unsigned char want[8] = {0, 'S', 'P', 0, (unsigned char)(s->peer >> 8), (unsigned char)s->peer, 0, 0};
    unsigned char got[8];
    ssize_t n;

    if (s->greeting_sent < sizeof s->greeting) {
        n = send(s->fd, s->greeting + s->greeting_sent, sizeof s->greeting - s->greeting_sent, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN && errno != EINTR) {
            return broken(s, "greeting", errno);
        }
        s->greeting_sent += n > 0 ? (size_t)n : 0;
    }
    n = recv(s->fd, got, sizeof got - s->greeting_got, 0);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
        return broken(s, "greeting", n == 0 ? 0 : errno);
    }
    if (n > 0 && memcmp(got, want + s->greeting_got, (size_t)n) != 0) {
        (void)snprintf(s->why, sizeof s->why, "expected the greeting of SP protocol 0x%02x, found another (is this the right address?)",
                       (unsigned)s->peer);
        return gone(s);
    }
    s->greeting_got += n > 0 ? (size_t)n : 0;
    if (s->greeting_sent == sizeof s->greeting && s->greeting_got == sizeof got) {
        s->state = SPURION_SP_OPEN;
        s->backoff_ms = 0;
        s->why[0] = '\0';
        s->opened++;
    }
    return spurion_ok();
}

spurion_status spurion_sp_step(spurion_sp *s)
{
    spurion_status st = spurion_ok();

    if (s->state == SPURION_SP_CLOSED) {
        if (spurion_sp_now_ms() < s->retry_at_ms) {
            return spurion_error(SPURION_UNAVAILABLE, "%s: %s", s->url, s->why[0] ? s->why : "not connected");
        }
        SPURION_TRY(st, s->local ? unix_dial(s) : tcp_dial(s));
    }
    if (s->state == SPURION_SP_CONNECTING) {
        SPURION_TRY(st, connect_finish(s));
    }
    if (s->state == SPURION_SP_GREETING) {
        SPURION_TRY(st, greet(s));
    }
    if (s->state != SPURION_SP_OPEN) {
        st = spurion_error(SPURION_UNAVAILABLE, "%s: %s", s->url, s->why[0] ? s->why : "no answer to the greeting yet");
    }
out:
    return st;
}

spurion_status spurion_sp_send(spurion_sp *s, const void *data, size_t size, size_t *at)
{
    while (*at < size) {
        ssize_t n = send(s->fd, (const char *)data + *at, size - *at, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0 && errno == EAGAIN) {
            break;
        }
        if (n < 0) {
            return broken(s, "send", errno);
        }
        *at += (size_t)n;
    }
    return spurion_ok();
}

size_t spurion_sp_header(const spurion_sp *s, unsigned char out[9], size_t size)
{
    size_t n = 0;
    if (s->local) {
        out[n++] = 1;
    }
    for (int shift = 56; shift >= 0; shift -= 8) {
        out[n++] = (unsigned char)((uint64_t)size >> shift);
    }
    return n;
}

/* Reads until in_want bytes of the frame are there. */
static spurion_status fill(spurion_sp *s)
{
    while (s->in_size < s->in_want) {
        ssize_t n = recv(s->fd, s->in + s->in_size, s->in_want - s->in_size, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0 && errno == EAGAIN) {
            break;
        }
        if (n <= 0) {
            return broken(s, "receive", n == 0 ? 0 : errno);
        }
        s->in_size += (size_t)n;
    }
    return spurion_ok();
}

static spurion_status in_reserve(spurion_sp *s, size_t size)
{
    if (size > s->in_capacity) {
        unsigned char *grown = realloc(s->in, size);
        if (!grown) {
            return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a message of %zu bytes", size);
        }
        s->in = grown;
        s->in_capacity = size;
    }
    return spurion_ok();
}

/* The header is whole: the length of what follows, capped before any memory is taken for it. */
static spurion_status header_read(spurion_sp *s)
{
    const unsigned char *p = s->in + (s->local ? 1 : 0);
    uint64_t length = 0;

    for (int i = 0; i < 8; i++) {
        length = length << 8 | p[i];
    }
    if ((s->local && s->in[0] != 1) || length > s->bytes_max) {
        (void)snprintf(s->why, sizeof s->why, "expected a message of at most %zu bytes, found %llu", s->bytes_max, (unsigned long long)length);
        return gone(s);
    }
    s->in_header = false;
    s->in_size = 0;
    s->in_want = (size_t)length;
    return in_reserve(s, (size_t)length + 1);
}

spurion_status spurion_sp_receive(spurion_sp *s, const unsigned char **data, size_t *size)
{
    spurion_status st;

    *data = NULL;
    *size = 0;
    if (s->in_want == 0 && !s->in_header) {
        SPURION_TRY(st, in_reserve(s, 16));
        s->in_header = true;
        s->in_size = 0;
        s->in_want = s->local ? 9 : 8;
    }
    SPURION_TRY(st, fill(s));
    if (s->in_header && s->in_size == s->in_want) {
        SPURION_TRY(st, header_read(s));
        SPURION_TRY(st, fill(s));
    }
    if (!s->in_header && s->in_size == s->in_want) {
        *data = s->in;
        *size = s->in_want;
        s->in_want = 0;
    }
out:
    if (st.code != SPURION_OK) {
        s->in_header = false;
        s->in_want = 0;
    }
    return st;
}

void spurion_sp_wait(const spurion_sp *s, bool write, int timeout_ms)
{
    struct pollfd p = {s->fd, (short)(write ? POLLOUT : POLLIN), 0};
    int64_t until_retry = s->retry_at_ms - spurion_sp_now_ms();

    if (s->state == SPURION_SP_CONNECTING || (s->state == SPURION_SP_GREETING && s->greeting_sent < sizeof s->greeting)) {
        p.events = POLLOUT;
    } else if (s->state == SPURION_SP_GREETING) {
        p.events = POLLIN;
    } else if (s->state == SPURION_SP_CLOSED) {
        timeout_ms = until_retry < timeout_ms ? (until_retry > 0 ? (int)until_retry : 0) : timeout_ms;
    }
    if (timeout_ms > 0) {
        (void)poll(&p, s->fd >= 0 ? 1 : 0, timeout_ms);
    }
}

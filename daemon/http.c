/* See http.h. An exchange is made when a request's head is there, and freed by the library's completion callback; while a stage holds it,
 * its connection is suspended, and a suspended connection is never completed. */
#include "daemon/http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <microhttpd.h>
#include <netdb.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/base/sha256.h"
#include "spurion/json.h"

#define HEAD_BYTES_MAX ((size_t)16384 + 4096) /* of one connection: request line, headers, and the library's own needs */
#define READ_SECONDS 10u        /* silence in the middle of a request */
#define IDLE_SECONDS 75u        /* between two requests of a connection */
#define BACKLOG 4096u           /* connections that wait; the system's own limit is often lower */
#define FIRST_BYTES ((size_t)64 << 10)
#define DISCARD_BYTES_MAX ((uint64_t)256 << 20) /* of a refused body: read, so that the client gets to read its answer */
#define TOKEN_BYTES_MAX 4096
#define LOGGED_PER_SECOND 10

typedef struct tokens {
    unsigned char digest[SPURION_HTTP_TOKENS_MAX][SPURION_SHA256_BYTES];
    int count;
} tokens;

struct spurion_http {
    spurion_http_options options;
    spurion_http_handlers handlers;
    struct MHD_Daemon *daemon;
    char host[256];             /* without brackets */
    int port;
    pthread_mutex_t lock;       /* tokens */
    tokens tokens;
    _Atomic int64_t connections;
    _Atomic uint64_t requests, statuses[6];
    _Atomic int64_t log_second; /* and how many lines were logged in it */
    _Atomic int log_count;
};

struct spurion_exchange {
    spurion_http *http;
    struct MHD_Connection *connection;
    char path[SPURION_HTTP_PATH_BYTES_MAX];
    bool post, refused;         /* refused: the answer stands, the body is only read */
    bool held;                  /* handed to the handler */
    char *body;
    size_t size, room;          /* room is what is reserved */
    uint64_t expected, discarded;
    struct MHD_Response *response;
    int status;
};

/* ---- answers ---- */

int spurion_http_status_of(int code)
{
    static const int statuses[SPURION_CODE_COUNT] = {200, 499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401};
    return code >= 0 && code < SPURION_CODE_COUNT ? statuses[code] : 500;
}

static struct MHD_Response *make_response(const char *type, spurion_bytes body, int retry_after_s)
{
    struct MHD_Response *r = MHD_create_response_from_buffer(body.size, (void *)body.data, MHD_RESPMEM_MUST_COPY);
    char seconds[16];

    if (r == NULL) {
        return NULL;
    }
    (void)MHD_add_response_header(r, "Content-Type", type);
    (void)MHD_add_response_header(r, "Cache-Control", "no-store");
    (void)MHD_add_response_header(r, "X-Content-Type-Options", "nosniff");
    if (retry_after_s > 0) {
        (void)snprintf(seconds, sizeof seconds, "%d", retry_after_s);
        (void)MHD_add_response_header(r, "Retry-After", seconds);
    }
    return r;
}

static struct MHD_Response *make_error(int status, const spurion_status *why, int retry_after_s)
{
    spurion_text t;
    struct MHD_Response *r;

    memset(&t, 0, sizeof t);
    spurion_text_print(&t, "{\"error\":{\"code\":%d,\"type\":\"%s\",\"message\":", status, spurion_code_name(why->code));
    spurion_json_put_string(&t, (spurion_bytes){why->message, strlen(why->message)});
    spurion_text_add(&t, "}}\n", 3);
    r = t.failed ? NULL : make_response("application/json", (spurion_bytes){t.data, t.size}, retry_after_s);
    spurion_text_fini(&t);
    return r;
}

/* Gives the response to the library's thread, which waits for it. */
static void resume(spurion_exchange *x, int status, struct MHD_Response *r)
{
    x->status = status;
    x->response = r; /* NULL, without memory: the connection is closed */
    MHD_resume_connection(x->connection);
}

void spurion_http_reply(spurion_exchange *x, int status, const char *type, spurion_bytes body, int retry_after_s)
{
    resume(x, status, make_response(type, body, retry_after_s));
}

void spurion_http_reply_error(spurion_exchange *x, int status, const spurion_status *why, int retry_after_s)
{
    resume(x, status, make_error(status, why, retry_after_s));
}

bool spurion_http_gone(const spurion_exchange *x)
{
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(x->connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    char byte;
    ssize_t n;

    if (info == NULL) {
        return false;
    }
    n = recv(info->connect_fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

static enum MHD_Result queue(spurion_exchange *x)
{
    enum MHD_Result ok;

    if (x->response == NULL) {
        return MHD_NO;
    }
    (void)MHD_set_connection_option(x->connection, MHD_CONNECTION_OPTION_TIMEOUT, IDLE_SECONDS);
    if (x->status == 401) {
        (void)MHD_add_response_header(x->response, "WWW-Authenticate", "Bearer");
    } else if (x->status == 405) {
        (void)MHD_add_response_header(x->response, "Allow", x->post ? "POST" : "GET, HEAD");
    }
    ok = MHD_queue_response(x->connection, (unsigned)x->status, x->response);
    MHD_destroy_response(x->response);
    x->response = NULL;
    if (ok == MHD_YES) {
        atomic_fetch_add(&x->http->statuses[x->status / 100 % 6], 1);
    }
    return ok;
}

bool spurion_http_may_log(spurion_http *h)
{
    int64_t now = spurion_clock_ms() / 1000;

    if (atomic_exchange(&h->log_second, now) != now) {
        int left_out = atomic_exchange(&h->log_count, 0) - LOGGED_PER_SECOND;
        if (left_out > 0) {
            spurion_log_warn("HTTP-QUIET", "%d lines about refused requests were left out", left_out);
        }
    }
    return atomic_fetch_add(&h->log_count, 1) < LOGGED_PER_SECOND;
}

/* The answer stands; what is left of the body is read first, because a client that is still writing would not see it. */
static void refuse(spurion_exchange *x, int status, spurion_status why, int retry_after_s)
{
    x->refused = true;
    x->status = status;
    x->response = make_error(status, &why, retry_after_s);
    if (status != 401 && status != 404 && status != 429 && status != 503 && spurion_http_may_log(x->http)) {
        spurion_log_warn("HTTP-REFUSED", "%d for %.128s: %s", status, x->path, why.message);
    }
}

/* ---- who may ask ---- */

static spurion_status digest_of(unsigned char out[SPURION_SHA256_BYTES], const char *data, size_t size)
{
    spurion_sha256 h = {NULL};
    spurion_status st;

    SPURION_TRY(st, spurion_sha256_init(&h));
    SPURION_TRY(st, spurion_sha256_update(&h, data, size));
    SPURION_TRY(st, spurion_sha256_finish(out, &h));
out:
    spurion_sha256_fini(&h);
    return st;
}

static bool same_digest(const unsigned char *a, const unsigned char *b)
{
    unsigned differ = 0;
    for (int i = 0; i < SPURION_SHA256_BYTES; i++) {
        differ |= (unsigned)(a[i] ^ b[i]);
    }
    return differ == 0;
}

static bool may_ask(spurion_http *h, const char *header)
{
    unsigned char digest[SPURION_SHA256_BYTES];
    bool yes = false;

    if (h->options.token_file == NULL) {
        return true;
    }
    if (header == NULL || strncasecmp(header, "Bearer ", 7) != 0 || digest_of(digest, header + 7, strlen(header + 7)).code != SPURION_OK) {
        return false;
    }
    pthread_mutex_lock(&h->lock);
    for (int i = 0; i < h->tokens.count; i++) {
        yes |= same_digest(digest, h->tokens.digest[i]);
    }
    pthread_mutex_unlock(&h->lock);
    return yes;
}

static spurion_status read_tokens(tokens *out, const char *path)
{
    char data[TOKEN_BYTES_MAX + 1], *save = NULL;
    struct stat s;
    spurion_status st = spurion_ok();
    size_t n = 0;
    FILE *f = fopen(path, "rb");

    memset(out, 0, sizeof *out);
    if (f == NULL) {
        return spurion_error(errno == EACCES ? SPURION_PERMISSION_DENIED : SPURION_NOT_FOUND, "http.token_file: %s: %s", path, strerror(errno));
    }
    if (fstat(fileno(f), &s) != 0 || !S_ISREG(s.st_mode)) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "http.token_file: %s: expected a regular file", path);
    } else if (s.st_mode & 022) {
        st = spurion_error(SPURION_PERMISSION_DENIED, "http.token_file: %s: expected a file that only its owner writes, found mode %03o", path,
                           s.st_mode & 0777u);
    } else {
        n = fread(data, 1, sizeof data, f);
    }
    (void)fclose(f);
    if (st.code == SPURION_OK && n > TOKEN_BYTES_MAX) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "http.token_file: %s: expected at most %d bytes, found more", path, TOKEN_BYTES_MAX);
    }
    if (st.code != SPURION_OK) {
        return st;
    }
    if (s.st_mode & 044) {
        spurion_log_warn("HTTP-TOKEN", "%s can be read by others (mode %03o)", path, s.st_mode & 0777u);
    }
    data[n] = '\0';
    for (char *t = strtok_r(data, " \t\r\n", &save); t != NULL && st.code == SPURION_OK; t = strtok_r(NULL, " \t\r\n", &save)) {
        if (out->count == SPURION_HTTP_TOKENS_MAX || strlen(t) < 16) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "http.token_file: %s: expected one or two tokens of at least 16 characters, found %s",
                                 path, strlen(t) < 16 ? "a shorter one" : "more");
        }
        st = digest_of(out->digest[out->count++], t, strlen(t));
    }
    if (st.code == SPURION_OK && out->count == 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "http.token_file: %s: expected one or two tokens, found none", path);
    }
    return st;
}

spurion_status spurion_http_reload(spurion_http *h)
{
    tokens fresh;
    spurion_status st;

    if (h->options.token_file == NULL) {
        return spurion_ok();
    }
    st = read_tokens(&fresh, h->options.token_file);
    if (st.code == SPURION_OK) {
        pthread_mutex_lock(&h->lock);
        h->tokens = fresh;
        pthread_mutex_unlock(&h->lock);
    }
    return st;
}

/* Against DNS rebinding: a page that was loaded from a name which now resolves to us sends that name. Addresses and our own name are none. */
static bool known_host(const spurion_http *h, const char *host)
{
    char name[256];
    struct in6_addr any;
    size_t n;

    if (host == NULL || h->options.insecure || h->options.token_file != NULL) {
        return true;
    }
    if (host[0] == '[') {
        return strchr(host, ']') != NULL;
    }
    n = strcspn(host, ":");
    if (n >= sizeof name) {
        return false;
    }
    memcpy(name, host, n);
    name[n] = '\0';
    return strcasecmp(name, "localhost") == 0 || strcasecmp(name, h->host) == 0 || inet_pton(AF_INET, name, &any) == 1;
}

/* ---- a request ---- */

static const char *header_of(spurion_exchange *x, const char *name)
{
    return MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, name);
}

/* Content-Length as a number; false: there is none, or it is no number. */
static bool body_size(uint64_t *out, const char *text)
{
    char *end;

    if (text == NULL || *text < '0' || *text > '9') {
        return false;
    }
    errno = 0;
    *out = strtoull(text, &end, 10);
    return errno == 0 && *end == '\0';
}

/* Everything that can be refused before the body. */
static void check_head(spurion_exchange *x, const char *method)
{
    spurion_http *h = x->http;
    spurion_http_route route = h->handlers.route(h->handlers.context, x->path);
    bool post = strcmp(method, "POST") == 0, get = strcmp(method, "GET") == 0 || strcmp(method, "HEAD") == 0;
    const char *length = header_of(x, "Content-Length");
    uint64_t size = 0;

    x->post = route.post;
    if (!known_host(h, header_of(x, "Host"))) {
        refuse(x, 403, spurion_error(SPURION_PERMISSION_DENIED, "Host: expected an address, localhost or this daemon's name, found another"), 0);
    } else if (!route.found) {
        refuse(x, 404, spurion_error(SPURION_NOT_FOUND, "path: expected an endpoint of docs/http.md, found %.128s", x->path), 0);
    } else if (route.post ? !post : !get) {
        refuse(x, 405, spurion_error(SPURION_UNIMPLEMENTED, "method: expected %s, found %.32s", route.post ? "POST" : "GET", method), 0);
    } else if (!route.open && !may_ask(h, header_of(x, "Authorization"))) {
        refuse(x, 401, spurion_error(SPURION_UNAUTHENTICATED, "Authorization: expected Bearer and a token of this daemon's, found none"), 0);
    } else if (post && header_of(x, "Origin") != NULL) {
        refuse(x, 403, spurion_error(SPURION_PERMISSION_DENIED, "Origin: expected none, found a web page's"), 0);
    } else if (header_of(x, "Transfer-Encoding") != NULL || (post && length == NULL)) {
        refuse(x, 411, spurion_error(SPURION_INVALID_ARGUMENT, "Content-Length: expected the body's size, found %s",
                                     length != NULL ? "Transfer-Encoding beside it" : "none"), 0);
    } else if (post && !body_size(&size, length)) {
        refuse(x, 400, spurion_error(SPURION_INVALID_ARGUMENT, "Content-Length: expected a number, found another text"), 0);
    } else if (size > h->options.body_bytes_max) {
        refuse(x, 413, spurion_error(SPURION_OUT_OF_RANGE, "body: expected at most %zu bytes (http.body_max), found %llu",
                                     h->options.body_bytes_max, (unsigned long long)size), 0);
    }
    x->expected = size;
}

static spurion_exchange *begin(spurion_http *h, struct MHD_Connection *connection, const char *url, const char *method)
{
    spurion_exchange *x = calloc(1, sizeof *x);
    size_t n = strlen(url);

    if (x == NULL) {
        return NULL;
    }
    x->http = h;
    x->connection = connection;
    memcpy(x->path, url, n < sizeof x->path ? n : sizeof x->path - 1);
    atomic_fetch_add(&h->requests, 1);
    (void)MHD_set_connection_option(connection, MHD_CONNECTION_OPTION_TIMEOUT, READ_SECONDS);
    if (n >= sizeof x->path) {
        refuse(x, 414, spurion_error(SPURION_INVALID_ARGUMENT, "path: expected at most %d bytes, found %zu", SPURION_HTTP_PATH_BYTES_MAX - 1, n), 0);
    } else {
        check_head(x, method);
    }
    return x;
}

static void free_body(spurion_exchange *x)
{
    free(x->body);
    if (x->room > 0) {
        x->http->handlers.release(x->http->handlers.context, x->room);
    }
    x->body = NULL;
    x->size = x->room = 0;
}

static void busy(spurion_exchange *x)
{
    free_body(x);
    refuse(x, 429, spurion_error(SPURION_UNAVAILABLE, "queue: expected room for this request, found it full; try again"), 1);
}

static void take_body(spurion_exchange *x, const char *data, size_t size)
{
    spurion_http *h = x->http;

    if (x->size + size > h->options.body_bytes_max) { /* the library counts Content-Length; this is for the day it does not */
        free_body(x);
        refuse(x, 413, spurion_error(SPURION_OUT_OF_RANGE, "body: expected at most %zu bytes, found more", h->options.body_bytes_max), 0);
        return;
    }
    if (x->size + size + 1 > x->room) {
        size_t room = x->room > 0 ? x->room : x->expected < FIRST_BYTES ? (size_t)x->expected + 1 : FIRST_BYTES;
        char *p;
        while (room < x->size + size + 1) {
            room *= 2;
        }
        if (!h->handlers.reserve(h->handlers.context, room - x->room)) {
            busy(x);
            return;
        }
        p = realloc(x->body, room);
        if (p == NULL) {
            h->handlers.release(h->handlers.context, room - x->room);
            busy(x);
            return;
        }
        x->body = p;
        x->room = room;
    }
    memcpy(x->body + x->size, data, size);
    x->size += size;
    x->body[x->size] = '\0';
}

static void hand_over(spurion_exchange *x)
{
    spurion_bytes body = {x->body != NULL ? x->body : "", x->size};
    char *own = x->body, path[SPURION_HTTP_PATH_BYTES_MAX];
    spurion_http *h = x->http;
    size_t room = x->room;

    memcpy(path, x->path, sizeof path);
    x->body = NULL; /* x may be answered, and gone, before the handler returns */
    x->size = x->room = 0;
    x->held = true;
    MHD_suspend_connection(x->connection);
    h->handlers.request(h->handlers.context, x, path, body);
    free(own);
    if (room > 0) {
        h->handlers.release(h->handlers.context, room);
    }
}

/* The library calls this once with the head, for each piece of the body, once at its end, and once more after a resume. */
static enum MHD_Result on_request(void *context, struct MHD_Connection *connection, const char *url, const char *method, const char *version,
                                  const char *data, size_t *size, void **state)
{
    spurion_exchange *x = *state;

    (void)version;
    if (x == NULL) {
        *state = x = begin(context, connection, url, method);
        if (x != NULL && x->refused && (x->expected > DISCARD_BYTES_MAX || header_of(x, "Expect") != NULL)) {
            return queue(x); /* nobody waits for that much, and who asks first need not send it */
        }
        return x != NULL ? MHD_YES : MHD_NO;
    }
    if (*size > 0) {
        if (x->refused) {
            x->discarded += *size;
            if (x->discarded > DISCARD_BYTES_MAX) {
                return MHD_NO;
            }
        } else {
            take_body(x, data, *size);
        }
        *size = 0;
        return MHD_YES;
    }
    if (x->refused || x->held) {
        return queue(x);
    }
    hand_over(x);
    return MHD_YES;
}

static void on_completed(void *context, struct MHD_Connection *connection, void **state, enum MHD_RequestTerminationCode how)
{
    spurion_exchange *x = *state;

    (void)context;
    (void)connection;
    (void)how;
    if (x == NULL) {
        return;
    }
    free_body(x);
    if (x->response != NULL) {
        MHD_destroy_response(x->response);
    }
    free(x);
    *state = NULL;
}

static void on_connection(void *context, struct MHD_Connection *connection, void **state, enum MHD_ConnectionNotificationCode what)
{
    spurion_http *h = context;

    (void)connection;
    (void)state;
    atomic_fetch_add(&h->connections, what == MHD_CONNECTION_NOTIFY_STARTED ? 1 : -1);
}

/* The library's own words go into our log, without what the peer wrote. */
static void on_log(void *context, const char *format, va_list args)
{
    char text[256];

    (void)context;
    (void)vsnprintf(text, sizeof text, format, args);
    text[strcspn(text, "\n")] = '\0';
    spurion_log_debug("HTTP", "%s", text);
}

/* Bytes that are no valid escape stay as they are; a NUL would end the path early. */
static size_t on_unescape(void *context, struct MHD_Connection *connection, char *text)
{
    char *to = text;

    (void)context;
    (void)connection;
    for (const char *from = text; *from != '\0';) {
        unsigned value;
        char hex[3] = {from[0] == '%' ? from[1] : '\0', '\0', '\0'};
        hex[1] = hex[0] != '\0' ? from[2] : '\0';
        if (strspn(hex, "0123456789abcdefABCDEF") == 2 && sscanf(hex, "%2x", &value) == 1 && value != 0) {
            *to++ = (char)value;
            from += 3;
        } else {
            *to++ = *from++;
        }
    }
    *to = '\0';
    return (size_t)(to - text);
}

/* ---- listening ---- */

static spurion_status split_address(spurion_http *h, char port[16])
{
    const char *text = h->options.address, *colon = strrchr(text, ':');
    size_t n = colon != NULL ? (size_t)(colon - text) : 0;

    if (n >= 2 && text[0] == '[' && text[n - 1] == ']') {
        text++;
        n -= 2;
    }
    if (colon == NULL || n == 0 || n >= sizeof h->host || strlen(colon + 1) == 0 || strlen(colon + 1) > 5 ||
        strspn(colon + 1, "0123456789") != strlen(colon + 1)) {
        return spurion_error(SPURION_FAILED_PRECONDITION, "listen.http: expected host:port, found %.128s", h->options.address);
    }
    memcpy(h->host, text, n);
    (void)snprintf(port, 16, "%s", colon + 1);
    return spurion_ok();
}

static bool is_loopback(const struct sockaddr *a)
{
    if (a->sa_family == AF_INET) {
        return ntohl(((const struct sockaddr_in *)(const void *)a)->sin_addr.s_addr) >> 24 == 127;
    }
    return a->sa_family == AF_INET6 && IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)(const void *)a)->sin6_addr);
}

static spurion_status listen_on(spurion_http *h, const struct addrinfo *at)
{
    unsigned flags = MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_AUTO | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG;
    const union MHD_DaemonInfo *info;

    if (!is_loopback(at->ai_addr) && !h->options.insecure) {
        return spurion_error(SPURION_FAILED_PRECONDITION,
                             "listen.http: expected a loopback address (nothing here is encrypted), found %s; SPURION_INSECURE_LISTEN=1 listens "
                             "there all the same", h->options.address);
    }
    flags |= at->ai_family == AF_INET6 ? (unsigned)MHD_USE_IPv6 : 0u;
    h->daemon = MHD_start_daemon(flags, 0, NULL, NULL, on_request, h, MHD_OPTION_EXTERNAL_LOGGER, on_log, h, MHD_OPTION_SOCK_ADDR, at->ai_addr,
                                 MHD_OPTION_CONNECTION_TIMEOUT, READ_SECONDS, MHD_OPTION_CONNECTION_LIMIT, (unsigned)h->options.connections_max,
                                 MHD_OPTION_CONNECTION_MEMORY_LIMIT, HEAD_BYTES_MAX, MHD_OPTION_LISTEN_BACKLOG_SIZE, BACKLOG,
                                 MHD_OPTION_UNESCAPE_CALLBACK, on_unescape, h, MHD_OPTION_NOTIFY_COMPLETED, on_completed, h,
                                 MHD_OPTION_NOTIFY_CONNECTION, on_connection, h, MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_END);
    if (h->daemon == NULL) {
        return spurion_error(SPURION_UNAVAILABLE, "listen.http: %s: %s", h->options.address, strerror(errno));
    }
    info = MHD_get_daemon_info(h->daemon, MHD_DAEMON_INFO_BIND_PORT);
    h->port = info != NULL ? info->port : 0;
    return spurion_ok();
}

spurion_status spurion_http_start(spurion_http **out, const spurion_http_options *options, const spurion_http_handlers *handlers)
{
    struct addrinfo hints, *at = NULL;
    spurion_http *h = calloc(1, sizeof *h);
    spurion_status st;
    char port[16];
    int rc;

    *out = NULL;
    if (h == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "http: no memory");
    }
    h->options = *options;
    h->handlers = *handlers;
    pthread_mutex_init(&h->lock, NULL);
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
    SPURION_TRY(st, split_address(h, port));
    SPURION_TRY(st, spurion_http_reload(h));
    rc = getaddrinfo(h->host, port, &hints, &at);
    if (rc != 0) {
        st = spurion_error(SPURION_FAILED_PRECONDITION, "listen.http: %s: %s", h->options.address, gai_strerror(rc));
        goto out;
    }
    *out = h; /* before the first request, whose handler may look for it there */
    SPURION_TRY(st, listen_on(h, at));
    h = NULL;
out:
    if (at != NULL) {
        freeaddrinfo(at);
    }
    if (h != NULL) {
        *out = NULL;
        pthread_mutex_destroy(&h->lock);
        free(h);
    }
    return st;
}

int spurion_http_port(const spurion_http *h)
{
    return h->port;
}

void spurion_http_quiesce(spurion_http *h)
{
    MHD_socket s = MHD_quiesce_daemon(h->daemon);

    if (s != MHD_INVALID_SOCKET) {
        (void)close(s);
    }
}

void spurion_http_stats_get(spurion_http_stats *out, spurion_http *h)
{
    out->connections = atomic_load(&h->connections);
    out->requests = atomic_load(&h->requests);
    for (int i = 0; i < 6; i++) {
        out->statuses[i] = atomic_load(&h->statuses[i]);
    }
}

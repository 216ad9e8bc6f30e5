/* The HTTP port over libmicrohttpd, which only http.c knows: connections, limits, who may ask, and answers that come later. Nothing of what
 * the paths mean is known here (service_http.c).
 * Thread: one of the library's own calls the handlers, one at a time, and they must not block; spurion_http_reply from any thread.
 * Memory: a request's body grows as it arrives, reserved with the owner first; freed when the handler returns. Like the transport it has no
 * destroy: an exchange may be held by any stage until the process ends. */
#ifndef SPURION_HTTP_H
#define SPURION_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "spurion/rollout.h"
#include "spurion/status.h"

#define SPURION_HTTP_TOKENS_MAX 2      /* accepted at the same time, so that one can follow the other */
#define SPURION_HTTP_PATH_BYTES_MAX 1024
#define SPURION_HTTP_CONNECTION_BYTES ((size_t)24 << 10) /* memory of one connection, without its body */

typedef struct spurion_http spurion_http;
/* A request that waits for its answer. */
typedef struct spurion_exchange spurion_exchange;

/* What a path is. */
typedef struct spurion_http_route {
    bool found;
    bool post;      /* POST, else GET and HEAD */
    bool open;      /* answered without a token */
} spurion_http_route;

typedef struct spurion_http_handlers {
    spurion_http_route (*route)(void *context, const char *path);
    /* A whole request came. path and body are good until the handler returns. spurion_http_reply must follow exactly once. */
    void (*request)(void *context, spurion_exchange *x, const char *path, spurion_bytes body);
    /* Memory for a body, and back. false: too much is in flight, the request gets 429. */
    bool (*reserve)(void *context, size_t bytes);
    void (*release)(void *context, size_t bytes);
    void *context;
} spurion_http_handlers;

typedef struct spurion_http_options {
    const char *address;     /* host:port, [v6]:port; port 0: any */
    const char *token_file;  /* NULL: nobody is asked for a token */
    size_t body_bytes_max;
    int connections_max;
    bool insecure;           /* other addresses than loopback's are listened on */
} spurion_http_options;

typedef struct spurion_http_stats {
    int64_t connections;     /* now */
    uint64_t requests;       /* that had a whole head */
    uint64_t statuses[6];    /* answers by hundreds: [2] is 2xx */
} spurion_http_stats;

/* Reads the tokens and listens. FAILED_PRECONDITION: an address that is none or is not loopback's; INVALID_ARGUMENT: no token in the file;
 * UNAVAILABLE: the address is taken. handlers are copied. *out is set before the first request comes. */
spurion_status spurion_http_start(spurion_http **out, const spurion_http_options *options, const spurion_http_handlers *handlers) SPURION_MUST_USE;
/* The port it listens on. */
int spurion_http_port(const spurion_http *h);
/* Reads the token file again; on failure the old tokens stay. */
spurion_status spurion_http_reload(spurion_http *h) SPURION_MUST_USE;
/* No new connections. */
void spurion_http_quiesce(spurion_http *h);
void spurion_http_stats_get(spurion_http_stats *out, spurion_http *h);

/* Answers; body is copied. retry_after_s 0: without that header. type: Content-Type. x is gone afterwards. */
void spurion_http_reply(spurion_exchange *x, int status, const char *type, spurion_bytes body, int retry_after_s);
/* Whether the client has closed its side while x waits: nobody would read the answer. */
bool spurion_http_gone(const spurion_exchange *x);

/* Whether one more line about what clients do wrong may be logged now: ten a second, so that a flood of nonsense fills no disk. */
bool spurion_http_may_log(spurion_http *h);

/* The HTTP status that a code is told as (google.rpc.Code's table). */
int spurion_http_status_of(int code);
/* An error as every endpoint here tells it: {"error":{"code":…,"type":…,"message":…}}. Any thread. */
void spurion_http_reply_error(spurion_exchange *x, int status, const spurion_status *why, int retry_after_s);

#endif

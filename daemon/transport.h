/* The three channels over libnng: rpc (REP, a fixed pool of contexts), rollouts (SUB that listens), alerts (PUB that listens).
 * The only file that knows nng is transport.c. What was measured of libnng 1.5.2 fixes the rules (docs/protocol.md, "The library"):
 * a receive limit on every socket before anything listens; contexts are never closed; no cancel, no aio time-outs; nothing is closed
 * before the process ends, so there is no destroy: the owner flushes its own data and leaves with _exit.
 * Thread: handlers run on nng's threads, several at once, and must not block; reply and publish may be called from any thread. */
#ifndef SPURION_TRANSPORT_H
#define SPURION_TRANSPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "spurion/limits.h"
#include "spurion/rollout.h"
#include "spurion/status.h"

#define SPURION_TRANSPORT_CALLS (SPURION_CONNECTIONS_MAX + 16) /* contexts: one for each connection, so that nobody starves */
#define SPURION_TRANSPORT_ALERTS_QUEUED 1024                   /* alerts that a slow subscriber may be behind before it misses some */

typedef struct spurion_transport spurion_transport;
/* A request that waits for its answer. */
typedef struct spurion_transport_call spurion_transport_call;

typedef struct spurion_transport_handlers {
    /* A request came. data is good until the handler returns. spurion_transport_reply must follow exactly once, now or later. */
    void (*request)(void *context, spurion_transport_call *call, const char *data, size_t size);
    /* A message of the tap came. data is good until the handler returns. */
    void (*tap)(void *context, const char *data, size_t size);
    void *context;
} spurion_transport_handlers;

typedef enum spurion_channel { SPURION_CHANNEL_RPC, SPURION_CHANNEL_ROLLOUTS, SPURION_CHANNEL_ALERTS } spurion_channel;
#define SPURION_CHANNEL_COUNT 3

typedef struct spurion_transport_stats {
    int64_t pipes[SPURION_CHANNEL_COUNT];   /* connections now */
    uint64_t refused;                       /* connections refused: too many, or a stranger */
    uint64_t requests, taps, published, publish_failed;
} spurion_transport_stats;

/* Opens the sockets with their limits; nothing listens yet. handlers are copied. */
spurion_status spurion_transport_create(spurion_transport **out, const spurion_transport_handlers *handlers) SPURION_MUST_USE;

/* Listens on url: ipc:///absolute/path (mode 0660, missing directories made 0750) or tcp://host:port with a loopback host, unless
 * insecure. FAILED_PRECONDITION: other schemes, abstract sockets, other hosts. UNAVAILABLE: the address is taken. */
spurion_status spurion_transport_listen(spurion_transport *t, spurion_channel channel, const char *url, bool insecure) SPURION_MUST_USE;
/* Begins to take requests and taps; once, after the listeners stand. */
void spurion_transport_start(spurion_transport *t);

/* Answers call and gives it back to the pool; data is copied. At most SPURION_REPLY_BYTES_MAX bytes. */
void spurion_transport_reply(spurion_transport_call *call, const char *data, size_t size);
/* Sends to every subscriber that keeps up. Never blocks. */
void spurion_transport_publish(spurion_transport *t, const char *data, size_t size);

void spurion_transport_stats_get(spurion_transport_stats *out, const spurion_transport *t);
/* The receive limit that the library reports for a channel, in bytes; 0 would mean none. */
size_t spurion_transport_recv_bytes_max(const spurion_transport *t, spurion_channel channel);

#endif

/* libspurion: the C client. It speaks nng's SP protocol over plain sockets (TCP, unix), so that no trainer process loads libnng.
 *
 * A handle belongs to one thread at a time and starts no thread of its own. After fork the child gets FAILED_PRECONDITION from every call
 * on the parent's handle and opens one of its own. Memory: what options say (the ring), one receive buffer, and what one answer needs;
 * spurion_client_memory_bytes tells. Every pointer in a result borrows from the handle until the next call on it
 * (which may be given it: a cursor, a rollout).
 *
 * Every call returns a code of status.h; spurion_client_error gives the text of the last failure on the handle. Calls that wait take a
 * time-out in milliseconds (0: the handle's own) and end with DEADLINE_EXCEEDED; UNAVAILABLE means that the daemon could not be reached. */
#ifndef SPURION_CLIENT_H
#define SPURION_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "spurion/messages.h"
#include "spurion/rollout.h"
#include "spurion/status.h"

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define SPURION_API __attribute__((visibility("default")))
#else
#define SPURION_API
#endif

typedef struct spurion_client spurion_client;

/* What to do with a batch when the ring has no room. */
typedef enum spurion_ring_policy {
    SPURION_RING_DROP_NEW = 0, /* refuse it: RESOURCE_EXHAUSTED, counted */
    SPURION_RING_DROP_OLDEST,  /* forget the oldest batches that the daemon has not confirmed; counted and reported to it */
    SPURION_RING_BLOCK         /* wait, up to the time-out, for the daemon to confirm some */
} spurion_ring_policy;

typedef struct spurion_client_options {
    const char *rpc;           /* ipc:///path or tcp://host:port; NULL: no calls */
    const char *rollouts;      /* the tap; NULL: no publishing */
    const char *alerts;        /* NULL: no alerts */
    const char *run;           /* of the tap */
    const char *producer;      /* name of this process in the run, the same after a restart; NULL: host name and pid */
    size_t ring_bytes_max;     /* bytes of unconfirmed batches kept for sending again; 0: 64 MiB */
    spurion_ring_policy policy;
    int timeout_ms;            /* of calls that wait; 0: 30000 */
    int sync_interval_ms;      /* how often publishing asks what arrived; 0: 1000 */
} spurion_client_options;

/* Makes a handle; connects at first use. options are copied. Gives the handle, also on failure where *out is not NULL, for its text. */
SPURION_API spurion_code spurion_client_open(spurion_client **out, const spurion_client_options *options);
/* Closes without waiting: what the daemon has not confirmed may be lost (spurion_client_flush first). NULL is fine. */
SPURION_API void spurion_client_close(spurion_client *c);
/* Text of the last failure, "" if there was none. Borrowed until the next call. */
SPURION_API const char *spurion_client_error(const spurion_client *c);
/* Milliseconds after which to try again, as the daemon said with the last UNAVAILABLE or RESOURCE_EXHAUSTED; 0: it did not say. */
SPURION_API uint32_t spurion_client_retry_after_ms(const spurion_client *c);
SPURION_API size_t spurion_client_memory_bytes(const spurion_client *c);
SPURION_API const char *spurion_client_version(void);

/* ---- the tap: rollouts to be watched; the trainer never waits (policy BLOCK apart) ---- */

typedef struct spurion_tap_stats {
    uint64_t epoch, sequence;             /* last batch published */
    uint64_t stored_through;              /* batches up to here are durable at the daemon */
    uint64_t published_rollouts;
    uint64_t dropped_batches, dropped_rollouts; /* refused or forgotten by the ring's policy: they are lost */
    uint64_t refilled_batches;            /* sent again because the daemon had missed them */
    size_t ring_bytes;                    /* unconfirmed now */
    bool connected;
} spurion_tap_stats;

/* Publishes rollouts (their run is the handle's where absent). Copies them into the ring and sends what the socket takes; never waits
 * (but see SPURION_RING_BLOCK). RESOURCE_EXHAUSTED: they were dropped, and are counted as such. */
SPURION_API spurion_code spurion_client_publish(spurion_client *c, const spurion_rollout *rollouts, int32_t count);
/* Says that this process has published everything of `step`. Never waits. */
SPURION_API spurion_code spurion_client_step_end(spurion_client *c, int64_t step);
/* Moves the tap along without publishing: sends, asks what is missing, sends it again. Never waits. */
SPURION_API spurion_code spurion_client_pump(spurion_client *c);
/* Waits until everything published is durable at the daemon, or is known to be lost (DATA_LOSS, with the exact number in the text). Batches
 * that the daemon had confirmed and has no more (its store was replaced by an older copy) are lost too, and told so from then on. */
SPURION_API spurion_code spurion_client_flush(spurion_client *c, int timeout_ms);
/* Flush, and say goodbye: no step of the run waits for this producer any longer. Publishing again takes it back. */
SPURION_API spurion_code spurion_client_leave(spurion_client *c, int timeout_ms);
/* The READY: waits until the daemon answers and has taken note of this producer. */
SPURION_API spurion_code spurion_client_ready(spurion_client *c, int timeout_ms);
SPURION_API void spurion_client_tap_stats(spurion_tap_stats *out, const spurion_client *c);

/* ---- calls ---- */

SPURION_API spurion_code spurion_client_hello(spurion_client *c, spurion_hello_reply *out, int timeout_ms);
/* Judges rollouts now. Verdicts in their order; a refused one carries its code. Retried under one idempotency key until the time-out. */
SPURION_API spurion_code spurion_client_score(spurion_client *c, spurion_verdicts *out, const spurion_rollout *rollouts, int32_t count,
                                              bool want_tokens, int timeout_ms);
/* Hands rollouts over; OK means that all but those named in *out are durable and will be judged. */
SPURION_API spurion_code spurion_client_submit(spurion_client *c, spurion_submit_reply *out, const spurion_rollout *rollouts, int32_t count,
                                               int timeout_ms);
SPURION_API spurion_code spurion_client_query(spurion_client *c, spurion_query_reply *out, const spurion_query *query, int timeout_ms);
SPURION_API spurion_code spurion_client_get(spurion_client *c, spurion_record *out, const spurion_key *key, int timeout_ms);
SPURION_API spurion_code spurion_client_counts(spurion_client *c, spurion_counts_reply *out, const spurion_counts *what, int timeout_ms);
SPURION_API spurion_code spurion_client_runs(spurion_client *c, spurion_runs_reply *out, const spurion_runs *what, int timeout_ms);
SPURION_API spurion_code spurion_client_alerts(spurion_client *c, spurion_alerts_reply *out, const spurion_alerts *what, int timeout_ms);
SPURION_API spurion_code spurion_client_status(spurion_client *c, spurion_status_reply *out, int timeout_ms);
SPURION_API spurion_code spurion_client_catalogue(spurion_client *c, spurion_catalogue_reply *out, const spurion_page *page, int timeout_ms);
SPURION_API spurion_code spurion_client_rules(spurion_client *c, spurion_rules_reply *out, int timeout_ms);
/* Ends a step for a producer that does not publish through this handle's tap. */
SPURION_API spurion_code spurion_client_end_step(spurion_client *c, spurion_step_end_reply *out, const spurion_step_end *what, int timeout_ms);

/* ---- alerts as they come ---- */

/* A descriptor that turns readable when spurion_client_alert_next may have something; -1: no connection yet (call alert_next). It changes
 * when the connection is made anew. */
SPURION_API int spurion_client_alert_fd(const spurion_client *c);
/* The next alert: OK and *out, NOT_FOUND when there is none now. Never waits. Alerts come in the order of their numbers, each once: what
 * the live channel missed is fetched by rpc (then it waits for that call). *out borrows until the next call. */
SPURION_API spurion_code spurion_client_alert_next(spurion_client *c, spurion_alert *out);
/* Begins with the alert of this number (1: all that are stored). Without it: those that are raised from now on. */
SPURION_API spurion_code spurion_client_alert_from(spurion_client *c, uint64_t seq);

#ifdef __cplusplus
}
#endif

#endif

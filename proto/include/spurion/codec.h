/* Wire <-> plain structs, for daemon and client alike. Every check of outside bytes lives behind this header: nesting, number of
 * fields, memory, UTF-8, names, ranges, enums. The only user of protobuf-c.
 * Thread: any; no state. Memory: only through spurion_memory; nothing is ever freed here, the owner of the memory does that at once. */
#ifndef SPURION_CODEC_H
#define SPURION_CODEC_H

#include "spurion/messages.h"
#include "spurion/rollout.h"
#include "spurion/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Where results live. take: gives bytes of memory aligned to 16, zeroed or not, or NULL. One message takes at most
 * SPURION_DECODE_BYTES_MAX in all. spurion_arena fits by a two-line wrapper. */
typedef struct spurion_memory {
    void *(*take)(void *context, size_t bytes);
    void *context;
} spurion_memory;

/* Encoders: *out is the message, packed, in m. in is checked as far as its reader would refuse it (names, sizes).
 * Errors: INVALID_ARGUMENT, RESOURCE_EXHAUSTED (memory). */
/* Decoders: out borrows from m and, for bytes with a size, is NUL-terminated too; `in` may go afterwards.
 * Errors: INVALID_ARGUMENT (no such message; names field, expected and found), RESOURCE_EXHAUSTED (a limit of limits.h). */
#define SPURION_CODEC(name, type)                                                                                        \
    spurion_status spurion_codec_encode_##name(spurion_bytes *out, const spurion_memory *m, const type *in) SPURION_MUST_USE; \
    spurion_status spurion_codec_decode_##name(type *out, const spurion_memory *m, spurion_bytes in) SPURION_MUST_USE;

SPURION_CODEC(request, spurion_request)
SPURION_CODEC(reply, spurion_reply)
SPURION_CODEC(hello, spurion_hello)
SPURION_CODEC(hello_reply, spurion_hello_reply)
SPURION_CODEC(score, spurion_score)              /* ScoreRequest; single rollouts may be refused: list.refusals */
SPURION_CODEC(score_reply, spurion_verdicts)     /* ScoreReply */
SPURION_CODEC(submit, spurion_score)             /* SubmitRequest; as score */
SPURION_CODEC(submit_reply, spurion_submit_reply)
SPURION_CODEC(tap, spurion_tap)                  /* Tap; as score; rollouts of another run than the tap's are refused */
SPURION_CODEC(fill, spurion_fill)
SPURION_CODEC(fill_reply, spurion_fill_reply)
SPURION_CODEC(sync, spurion_sync)
SPURION_CODEC(sync_reply, spurion_sync_reply)
SPURION_CODEC(step_end, spurion_step_end)
SPURION_CODEC(step_end_reply, spurion_step_end_reply)
SPURION_CODEC(query, spurion_query)
SPURION_CODEC(query_reply, spurion_query_reply)
SPURION_CODEC(get, spurion_key)                  /* GetRequest; its reply is a record */
SPURION_CODEC(rollout, spurion_rollout)          /* one Rollout: the store's inbox */
SPURION_CODEC(verdict, spurion_verdict)          /* one Verdict: the store's small rows and answers */
SPURION_CODEC(record, spurion_record)
SPURION_CODEC(counts, spurion_counts)
SPURION_CODEC(counts_reply, spurion_counts_reply)
SPURION_CODEC(runs, spurion_runs)
SPURION_CODEC(runs_reply, spurion_runs_reply)
SPURION_CODEC(alert, spurion_alert)              /* at most SPURION_ALERT_BYTES_MAX packed, or OUT_OF_RANGE */
SPURION_CODEC(alerts, spurion_alerts)
SPURION_CODEC(alerts_reply, spurion_alerts_reply)
SPURION_CODEC(status_reply, spurion_status_reply)
SPURION_CODEC(catalogue, spurion_page)           /* CatalogueRequest */
SPURION_CODEC(catalogue_reply, spurion_catalogue_reply)
SPURION_CODEC(rules_reply, spurion_rules_reply)

#undef SPURION_CODEC

/* Status and Rules take an empty body (StatusRequest, RulesRequest have no fields). */

/* A ScoreReply of verdicts that are packed already (spurion_codec_encode_verdict), byte by byte the same as encode_score_reply's. */
spurion_status spurion_codec_join_verdicts(spurion_bytes *out, const spurion_memory *m, const spurion_bytes *verdicts, int32_t count) SPURION_MUST_USE;

/* The checks of one rollout that need no model: names, step, attempt, texts or ids but not both, UTF-8, tags, sizes.
 * For readers of other forms (judge's JSON Lines); the decoders apply it themselves. Errors name the field. */
spurion_status spurion_rollout_check(const spurion_rollout *r) SPURION_MUST_USE;
/* 1..SPURION_NAME_BYTES_MAX bytes of UTF-8 without control characters. what: the field, for the message. */
spurion_status spurion_name_check(spurion_bytes name, const char *what) SPURION_MUST_USE;
/* Length of the longest prefix of data that is well-formed UTF-8 (RFC 3629); == size when all of it is. */
size_t spurion_utf8_valid_prefix(const char *data, size_t size);
/* Whether data is one JSON object and nothing else. Nesting up to 32. */
bool spurion_json_object_check(const char *data, size_t size);

/* SHA-256 over a rollout's content (texts or ids, tags, trainer_reward), not its identity: same digest, same content. */
#define SPURION_ROLLOUT_DIGEST_BYTES 32
void spurion_rollout_digest(unsigned char out[SPURION_ROLLOUT_DIGEST_BYTES], const spurion_rollout *r);

static inline spurion_bytes spurion_bytes_of(const char *text)
{
    spurion_bytes b = {text, 0};
    if (text != NULL) {
        while (text[b.size] != '\0') {
            b.size++;
        }
    }
    return b;
}

#ifdef __cplusplus
}
#endif

#endif

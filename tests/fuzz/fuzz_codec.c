/* libFuzzer: every decoder of the wire. The first byte chooses the message, the rest is its bytes. What decodes must encode again, and
 * what comes of that must decode to the same bytes: no decoder gives out what its own encoder would not write. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/arena.h"
#include "daemon/base/check.h"
#include "spurion/codec.h"

static void *take(void *context, size_t bytes)
{
    return spurion_arena_take(context, bytes);
}

/* Decodes; encodes what came out; decodes and encodes that again: the two encodings are equal. */
#define TRY(name, type)                                                                          \
    do {                                                                                         \
        type first, second;                                                                      \
        spurion_bytes one, two;                                                                  \
        spurion_status st = spurion_codec_decode_##name(&first, &m, in);                         \
        SPURION_ASSERT(st.code == SPURION_OK || st.message[0] != '\0');                          \
        if (st.code != SPURION_OK || spurion_codec_encode_##name(&one, &m, &first).code != 0) {  \
            break;                                                                               \
        }                                                                                        \
        st = spurion_codec_decode_##name(&second, &m, one);                                      \
        if (st.code == SPURION_RESOURCE_EXHAUSTED) {                                             \
            break;                                                                               \
        }                                                                                        \
        SPURION_ASSERT(st.code == SPURION_OK);                                                   \
        SPURION_ASSERT(spurion_codec_encode_##name(&two, &m, &second).code == SPURION_OK);       \
        SPURION_ASSERT(one.size == two.size && memcmp(one.data, two.data, one.size) == 0);       \
    } while (0)

/* Names that were checked stay checked: what a refused rollout shows of itself can be printed. */
static void check_list(const spurion_rollouts *list)
{
    for (int32_t i = 0; i < list->count; i++) {
        const spurion_rollout *r = &list->rollouts[i];
        unsigned char digest[SPURION_ROLLOUT_DIGEST_BYTES];
        SPURION_ASSERT(r->id.data == NULL || spurion_name_check(r->id, "id").code == SPURION_OK);
        if (list->refusals[i].code == SPURION_OK) {
            SPURION_ASSERT(spurion_rollout_check(r).code == SPURION_OK);
            spurion_rollout_digest(digest, r);
        } else {
            SPURION_ASSERT(list->refusals[i].message.size > 0);
        }
    }
}

static void try_lists(const spurion_memory *m, spurion_bytes in)
{
    spurion_score score;
    spurion_tap tap;

    if (spurion_codec_decode_score(&score, m, in).code == SPURION_OK) {
        check_list(&score.list);
    }
    if (spurion_codec_decode_tap(&tap, m, in).code == SPURION_OK) {
        check_list(&tap.list);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    spurion_arena arena;
    spurion_memory m = {take, &arena};
    spurion_bytes in = {(const char *)data + 1, size - 1};

    if (size == 0) {
        return 0;
    }
    spurion_arena_init(&arena, 256u << 20);
    switch (data[0] % 25) {
    case 0: TRY(request, spurion_request); break;
    case 1: TRY(reply, spurion_reply); break;
    case 2: TRY(hello, spurion_hello); break;
    case 3: TRY(hello_reply, spurion_hello_reply); break;
    case 4: TRY(rollout, spurion_rollout); break;
    case 5: TRY(verdict, spurion_verdict); break;
    case 6: TRY(record, spurion_record); break;
    case 7: TRY(score_reply, spurion_verdicts); break;
    case 8: TRY(submit_reply, spurion_submit_reply); break;
    case 9: TRY(fill, spurion_fill); break;
    case 10: TRY(sync, spurion_sync); break;
    case 11: TRY(sync_reply, spurion_sync_reply); break;
    case 12: TRY(step_end, spurion_step_end); break;
    case 13: TRY(query, spurion_query); break;
    case 14: TRY(query_reply, spurion_query_reply); break;
    case 15: TRY(get, spurion_key); break;
    case 16: TRY(counts, spurion_counts); break;
    case 17: TRY(counts_reply, spurion_counts_reply); break;
    case 18: TRY(runs_reply, spurion_runs_reply); break;
    case 19: TRY(alert, spurion_alert); break;
    case 20: TRY(alerts_reply, spurion_alerts_reply); break;
    case 21: TRY(status_reply, spurion_status_reply); break;
    case 22: TRY(catalogue_reply, spurion_catalogue_reply); break;
    case 23: TRY(rules_reply, spurion_rules_reply); break;
    default: try_lists(&m, in); break;
    }
    (void)spurion_json_object_check(in.data, in.size);
    spurion_arena_fini(&arena);
    return 0;
}

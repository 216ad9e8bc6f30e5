/* libFuzzer: bodies of the drop-in reward endpoints. The first byte chooses endpoint and options, the rest is the body. What is taken is
 * answered with JSON that our own checker takes, and every rollout of it points into memory that is there. */
#include <stdint.h>
#include <string.h>

#include "daemon/base/arena.h"
#include "daemon/base/check.h"
#include "daemon/dialect.h"
#include "spurion/json_scan.h"

static void *take(void *context, size_t bytes)
{
    return spurion_arena_take(context, bytes);
}

static void answer(const spurion_ask *ask, spurion_arena *arena)
{
    spurion_verdict *verdicts = spurion_arena_take_array(arena, (size_t)ask->count + 1, sizeof *verdicts);
    spurion_json_value value;
    spurion_text t;

    memset(&t, 0, sizeof t);
    SPURION_ASSERT(verdicts != NULL);
    for (int32_t i = 0; i < ask->count; i++) {
        unsigned char digest[SPURION_ROLLOUT_DIGEST_BYTES];
        spurion_rollout_digest(digest, &ask->rollouts[i]);
        verdicts[i].reward = (float)digest[0];
    }
    spurion_ask_write(&t, ask, verdicts, SPURION_HTTP_CLEAN, 1);
    SPURION_ASSERT(!t.failed && spurion_json_check(&value, t.data, t.size).code == SPURION_OK);
    spurion_text_fini(&t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    spurion_ask_options options = {SPURION_HTTP_FORM_ENDPOINT, NULL, false};
    spurion_arena arena;
    spurion_memory m = {take, &arena};
    spurion_ask ask;
    spurion_status st;

    if (size == 0) {
        return 0;
    }
    spurion_arena_init(&arena, (size_t)256 << 20);
    options.form = (spurion_http_form)(data[0] >> 3 & 3);
    options.completion_after = data[0] & 32 ? "a\\n" : NULL;
    options.truncates = (data[0] & 64) != 0;
    st = spurion_ask_read(&ask, &m, (spurion_dialect)(data[0] & 7), (spurion_bytes){(const char *)data + 1, size - 1}, &options);
    SPURION_ASSERT((st.code == SPURION_OK) == (st.message[0] == '\0'));
    if (st.code == SPURION_OK) {
        answer(&ask, &arena);
    }
    spurion_arena_fini(&arena);
    return 0;
}

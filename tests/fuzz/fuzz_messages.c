/* libFuzzer: the messages of a rollout through a chat template. First byte: the template; the rest: the JSON as it comes from outside. */
#include <stdint.h>
#include <string.h>

#include "daemon/base/check.h"
#include "daemon/template.h"
#include "spurion/json_scan.h"

#define INPUT_MAX (1u << 16)
#define BUDGET (8u << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    spurion_chat chat = {.bos = "<s>", .eos = "</s>"};
    spurion_arena arena;
    spurion_message *messages = NULL;
    spurion_bytes prompt, completion;
    uint32_t warnings = 0;
    int count = 0;
    spurion_json_value array;
    spurion_status st;

    if (size < 2 || size > INPUT_MAX) {
        return 0;
    }
    chat.kind = (spurion_template)(data[0] % (SPURION_TEMPLATE_OPENASSISTANT + 1));
    if (chat.kind == SPURION_TEMPLATE_AUTO) { /* never left unresolved */
        return 0;
    }
    st = spurion_json_check(&array, (const char *)data + 1, size - 1);
    if (st.code != SPURION_OK || array.kind != SPURION_JSON_ARRAY) { /* spurion_rollout_check lets nothing else through */
        return 0;
    }
    spurion_arena_init(&arena, BUDGET);
    SPURION_TRY(st, spurion_messages_read(&messages, &count, &arena, (spurion_bytes){(const char *)data + 1, size - 1}));
    SPURION_ASSERT(count >= 2 && messages[count - 1].role == SPURION_ROLE_ASSISTANT);
    SPURION_TRY(st, spurion_chat_render(&prompt, &completion, &warnings, &arena, &chat, messages, count));
    SPURION_ASSERT(prompt.data + prompt.size == completion.data && prompt.size + completion.size < BUDGET);
    SPURION_ASSERT(completion.size <= messages[count - 1].content.size + 64);
    SPURION_ASSERT(memchr(prompt.data, 1, prompt.size) == NULL || memchr(data + 1, 1, size - 1) != NULL || memchr(data + 1, '\\', size - 1) != NULL);
out:
    SPURION_ASSERT(st.code == SPURION_OK || strstr(st.message, "expected") != NULL);
    spurion_arena_fini(&arena);
    return 0;
}

/* spurion-render MODEL_DIR TEMPLATE: one JSON array of messages per line of standard input, one JSON object {"prompt", "completion",
 * "warnings"} per line of output: the text that the daemon makes of them. A line that is refused gives {"error": ...}. For tests. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/template.h"
#include "spurion/codec.h"

static void print_and_drop(json_t *value)
{
    char *text = json_dumps(value, JSON_COMPACT);

    puts(text ? text : "{}");
    free(text);
    json_decref(value);
}

static void render_line(const spurion_chat *chat, const char *line, size_t size)
{
    spurion_arena arena;
    spurion_message *messages;
    int count;
    uint32_t warnings = 0;
    spurion_bytes prompt, completion;
    spurion_status st;

    spurion_arena_init(&arena, 0);
    SPURION_TRY(st, spurion_messages_read(&messages, &count, &arena, (spurion_bytes){line, size}));
    SPURION_TRY(st, spurion_chat_render(&prompt, &completion, &warnings, &arena, chat, messages, count));
    print_and_drop(json_pack("{s:s%, s:s%, s:i}", "prompt", prompt.data, prompt.size, "completion", completion.data, completion.size, "warnings",
                             (int)warnings));
out:
    if (st.code != SPURION_OK) {
        print_and_drop(json_pack("{s:s}", "error", st.message));
    }
    spurion_arena_fini(&arena);
}

static bool template_find(spurion_template *out, const char *name)
{
    for (int i = 0; i <= SPURION_TEMPLATE_OPENASSISTANT; i++) {
        if (strcmp(spurion_template_name((spurion_template)i), name) == 0) {
            *out = (spurion_template)i;
            return true;
        }
    }
    return false;
}

int main(int argc, char **argv)
{
    spurion_chat chat;
    spurion_template wanted;
    spurion_model_config *model = calloc(1, sizeof *model);
    spurion_tokenizer *tokenizer = NULL;
    spurion_status st;
    char path[4096], *line = NULL;
    size_t capacity = 0;
    ssize_t size;

    if (argc != 3 || !template_find(&wanted, argv[2]) || !model) {
        fputs("usage: spurion-render MODEL_DIR TEMPLATE < messages.jsonl\n", stderr);
        free(model);
        return 2;
    }
    (void)snprintf(path, sizeof path, "%s/tokenizer.json", argv[1]);
    model->bos = -1;
    SPURION_TRY(st, spurion_tokenizer_open(&tokenizer, path));
    SPURION_TRY(st, spurion_chat_open(&chat, wanted, argv[1], model, tokenizer));
    while ((size = getline(&line, &capacity, stdin)) > 0) {
        render_line(&chat, line, (size_t)(line[size - 1] == '\n' ? size - 1 : size));
    }
out:
    if (st.code != SPURION_OK) {
        fprintf(stderr, "spurion-render: %s\n", st.message);
    }
    free(line);
    free(model);
    spurion_tokenizer_close(tokenizer);
    return st.code == SPURION_OK ? 0 : 1;
}

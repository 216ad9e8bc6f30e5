/* spurion-tokenize TOKENIZER_JSON: one JSON string per line of standard input, one JSON array of ids per line of output: what the
 * post-processor puts before, the text's ids, what it puts after. With --raw, the text's ids only. A line that is refused gives
 * null, and its reason on standard error; the exit status then is 1. For tests and for people. */
#include "daemon/model/tokenizer.h"

#include <jansson.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void print_ids(const int32_t *ids, size_t count, const char **comma)
{
    for (size_t i = 0; i < count; i++) {
        printf("%s%d", *comma, (int)ids[i]);
        *comma = ",";
    }
}

static int tokenize_line(spurion_ids *ids, const spurion_tokenizer *t, const char *line, size_t bytes, int raw)
{
    json_error_t error;
    json_t *text = json_loadb(line, bytes, JSON_DECODE_ANY | JSON_ALLOW_NUL, &error);
    spurion_status st;
    const char *comma = "";
    int leading, trailing;
    const int32_t *before = spurion_tokenizer_leading(t, &leading), *after = spurion_tokenizer_trailing(t, &trailing);

    if (!json_is_string(text)) {
        fprintf(stderr, "spurion-tokenize: expected a JSON string on every line, found: %s\n",
                text == NULL ? error.text : "another value");
        json_decref(text);
        puts("null");
        return 1;
    }
    ids->count = 0;
    st = spurion_tokenizer_encode(ids, t, json_string_value(text), json_string_length(text));
    json_decref(text);
    if (st.code != SPURION_OK) {
        fprintf(stderr, "spurion-tokenize: %s\n", st.message);
        puts("null");
        return 1;
    }
    putchar('[');
    print_ids(before, raw ? 0 : (size_t)leading, &comma);
    print_ids(ids->data, ids->count, &comma);
    print_ids(after, raw ? 0 : (size_t)trailing, &comma);
    puts("]");
    return 0;
}

int main(int argc, char **argv)
{
    spurion_tokenizer *t = NULL;
    spurion_ids ids = {0};
    spurion_status st;
    char *line = NULL;
    size_t capacity = 0;
    ssize_t bytes;
    int failed = 0, raw = argc > 1 && strcmp(argv[1], "--raw") == 0;

    if (argc != 2 + raw) {
        fputs("usage: spurion-tokenize [--raw] TOKENIZER_JSON < texts > ids\n", stderr);
        return 2;
    }
    st = spurion_tokenizer_open(&t, argv[1 + raw]);
    if (st.code != SPURION_OK) {
        fprintf(stderr, "spurion-tokenize: %s\n", st.message);
        return 1;
    }
    while ((bytes = getline(&line, &capacity, stdin)) > 0) {
        failed |= tokenize_line(&ids, t, line, (size_t)bytes, raw);
    }
    free(line);
    spurion_ids_fini(&ids);
    spurion_tokenizer_close(t);
    return failed;
}

/* spurion-tokenize TOKENIZER_JSON: one JSON string per line of standard input, one JSON array of ids per line of output: what the
 * post-processor puts before, the text's ids, what it puts after. With --raw, the text's ids only. With --steps instead of the ids
 * their number, the steps taken (tokenizer_internal.h) and microseconds, as [ids, steps, us]. A line that is refused gives
 * null, and its reason on standard error; the exit status then is 1. For tests and for people. */
#include "daemon/model/tokenizer_internal.h"

#include <jansson.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void print_ids(const int32_t *ids, size_t count, const char **comma)
{
    for (size_t i = 0; i < count; i++) {
        printf("%s%d", *comma, (int)ids[i]);
        *comma = ",";
    }
}

typedef enum tokenize_mode { MODE_WHOLE, MODE_RAW, MODE_STEPS } tokenize_mode;

static double now_us(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int tokenize_line(spurion_ids *ids, const spurion_tokenizer *t, const char *line, size_t bytes, tokenize_mode mode)
{
    json_error_t error;
    json_t *text = json_loadb(line, bytes, JSON_DECODE_ANY | JSON_ALLOW_NUL, &error);
    spurion_status st;
    const char *comma = "";
    uint64_t steps = 0;
    double started;
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
    started = now_us();
    st = tok_encode(ids, &steps, t, json_string_value(text), json_string_length(text));
    started = now_us() - started;
    json_decref(text);
    if (st.code != SPURION_OK) {
        fprintf(stderr, "spurion-tokenize: %s\n", st.message);
        puts("null");
        return 1;
    }
    if (mode == MODE_STEPS) {
        printf("[%zu,%llu,%.0f]\n", ids->count, (unsigned long long)steps, started);
        return 0;
    }
    putchar('[');
    print_ids(before, mode == MODE_RAW ? 0 : (size_t)leading, &comma);
    print_ids(ids->data, ids->count, &comma);
    print_ids(after, mode == MODE_RAW ? 0 : (size_t)trailing, &comma);
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
    tokenize_mode mode = argc > 1 && strcmp(argv[1], "--raw") == 0     ? MODE_RAW
                         : argc > 1 && strcmp(argv[1], "--steps") == 0 ? MODE_STEPS
                                                                       : MODE_WHOLE;
    int failed = 0, options = mode != MODE_WHOLE;

    if (argc != 2 + options) {
        fputs("usage: spurion-tokenize [--raw|--steps] TOKENIZER_JSON < texts > ids\n", stderr);
        return 2;
    }
    st = spurion_tokenizer_open(&t, argv[1 + options]);
    if (st.code != SPURION_OK) {
        fprintf(stderr, "spurion-tokenize: %s\n", st.message);
        return 1;
    }
    while ((bytes = getline(&line, &capacity, stdin)) > 0) {
        failed |= tokenize_line(&ids, t, line, (size_t)bytes, mode);
    }
    free(line);
    spurion_ids_fini(&ids);
    spurion_tokenizer_close(t);
    return failed;
}

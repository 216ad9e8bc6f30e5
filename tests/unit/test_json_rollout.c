/* Lines to rollouts: types, names, limits, echo of what could be read, and the JSON scanner under it against jansson on mutated text. */
#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "daemon/json_rollout.h"
#include "spurion/json_scan.h"
#include "spurion/limits.h"

#define NAMES "\"run\":\"r1\",\"step\":12,\"group\":\"g7\",\"id\":\"g7-3\""
#define TEXTS "\"prompt\":\"p\",\"completion\":\"c\""

typedef struct fixture {
    spurion_job job;
    spurion_json_names names;
    bool known;
    spurion_json_line kind;
} fixture;

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof *f);
    assert_non_null(f);
    spurion_job_init(&f->job, 0);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    spurion_job_fini(&f->job);
    free(f);
    return 0;
}

/* Reads from memory of exactly that size, so that reading past it is seen. */
static void read_bytes(fixture *f, const char *line, size_t size)
{
    char *copy = malloc(size ? size : 1);

    assert_non_null(copy);
    memcpy(copy, line, size);
    spurion_job_reset(&f->job);
    f->kind = spurion_json_rollout(&f->job, &f->names, &f->known, copy, size);
    free(copy);
}

static void read_line(fixture *f, const char *line)
{
    read_bytes(f, line, strlen(line));
}

static void refused(fixture *f, const char *line, const char *part)
{
    read_line(f, line);
    assert_int_equal(f->kind, SPURION_LINE_REFUSED);
    assert_int_equal(f->job.verdict.code, SPURION_INVALID_ARGUMENT);
    if (!strstr(f->job.verdict.message.data, part)) {
        fail_msg("expected '%s' in: %s", part, f->job.verdict.message.data);
    }
}

static void test_json_rollout_reads_every_field(void **state)
{
    fixture *f = *state;
    const spurion_rollout *r = &f->job.rollout;

    read_line(f, " {" NAMES ",\"attempt\":2,\"prompt\":\"a\\u00e9\\ud83d\\ude00\\n\\\"\\u0000b\",\"completion\":\"c\\/\",\"trainer_reward\":1.25e0,"
                 "\"tags\":{\"env\":\"hh\", \"x\":[1]},\"group_size\":8,\"text_form\":\"templated\"}\r");
    assert_int_equal(f->kind, SPURION_LINE_ROLLOUT);
    assert_true(f->known);
    assert_string_equal(r->run.data, "r1");
    assert_int_equal(r->step, 12);
    assert_string_equal(r->group.data, "g7");
    assert_string_equal(r->id.data, "g7-3");
    assert_int_equal(r->attempt, 2);
    assert_int_equal(r->prompt.size, 11);
    assert_memory_equal(r->prompt.data, "a\xc3\xa9\xf0\x9f\x98\x80\n\"\0b", 12);
    assert_string_equal(r->completion.data, "c/");
    assert_true(r->has_trainer_reward && r->trainer_reward == 1.25f);
    assert_string_equal(r->tags.data, "{\"env\":\"hh\", \"x\":[1]}");
    assert_int_equal(r->group_size, 8);
    assert_int_equal(r->text_form, SPURION_FORM_TEMPLATED);
    assert_string_equal(f->job.verdict.id.data, "g7-3");
    assert_true(f->job.verdict.has_step && f->job.verdict.step == 12 && f->job.verdict.attempt == 2);
    read_line(f, "{" NAMES ",\"prompt_ids\":[],\"completion_ids\":[0, 7,2147483647],\"trainer_reward\":null,\"tags\":null,\"prompt\":null}");
    assert_int_equal(f->kind, SPURION_LINE_ROLLOUT);
    assert_non_null(r->prompt_ids);
    assert_int_equal(r->prompt_id_count, 0);
    assert_int_equal(r->completion_id_count, 3);
    assert_int_equal(r->completion_ids[2], 2147483647);
    assert_null(r->prompt.data);
    assert_false(r->has_trainer_reward);
    assert_null(r->tags.data);
    read_line(f, "{" NAMES ",\"messages\":[{\"role\":\"user\", \"content\":\"a\"}, 1],\"prompt\":null}");
    assert_int_equal(f->kind, SPURION_LINE_ROLLOUT);
    assert_string_equal(r->messages.data, "[{\"role\":\"user\", \"content\":\"a\"}, 1]");
}

static void test_json_rollout_last_of_equal_members_counts(void **state)
{
    fixture *f = *state;

    read_line(f, "{" NAMES "," TEXTS ",\"\\u0069d\":\"later\"}"); /* "id", spelled with an escape */
    assert_int_equal(f->kind, SPURION_LINE_ROLLOUT);
    assert_string_equal(f->job.rollout.id.data, "later");
}

static void test_json_rollout_refuses_wrong_fields_by_name(void **state)
{
    fixture *f = *state;

    refused(f, "{" NAMES ",\"prompt\":5,\"completion\":\"c\"}", "prompt: expected a text, found 5");
    refused(f, "{" NAMES ",\"prompt\":\"a\",\"completion\":[\"c\"]}", "completion: expected a text, found an array");
    refused(f, "{" NAMES ",\"prompt\":\"a\"}", "found prompt");
    refused(f, "{" NAMES "}", "found none");
    refused(f, "{" NAMES ",\"messages\":{}}", "messages: expected an array of {\"role\", \"content\"}, found an object");
    refused(f, "{" NAMES "," TEXTS ",\"messages\":[]}", "found messages and others");
    refused(f, "{" NAMES "," TEXTS ",\"prompt_ids\":[1]}", "found prompt completion prompt_ids");
    refused(f, "{" NAMES ",\"prompt\":\"a\",\"completion_ids\":[1]}", "found prompt completion_ids");
    refused(f, "{" NAMES ",\"completion_ids\":[1]}", "found completion_ids");
    refused(f, "{" NAMES ",\"prompt_ids\":[1],\"completion_ids\":[1.0]}", "completion_ids: expected a list of token ids from 0, found 1.0");
    refused(f, "{" NAMES ",\"prompt_ids\":[-1],\"completion_ids\":[1]}", "prompt_ids: expected a list of token ids from 0, found -1");
    refused(f, "{" NAMES ",\"prompt_ids\":[1],\"completion_ids\":[2147483648]}", "found 2147483648");
    refused(f, "{" NAMES ",\"prompt_ids\":[true],\"completion_ids\":[1]}", "found a truth value");
    refused(f, "{" NAMES ",\"prompt_ids\":1,\"completion_ids\":[1]}", "prompt_ids: expected a list of token ids, found 1");
    refused(f, "{" NAMES "," TEXTS ",\"trainer_reward\":\"1\"}", "trainer_reward: expected a finite number, found \"1\"");
    refused(f, "{" NAMES "," TEXTS ",\"trainer_reward\":1e999}", "trainer_reward: expected a finite number, found 1e999");
    refused(f, "{" NAMES "," TEXTS ",\"trainer_reward\":1e39}", "trainer_reward: expected a finite number");
    refused(f, "{" NAMES "," TEXTS ",\"tags\":[]}", "tags: expected an object, found an array");
    refused(f, "{" NAMES "," TEXTS ",\"attempt\":-1}", "attempt: expected a whole number from 0 to 2147483647, found -1");
    refused(f, "{" NAMES "," TEXTS ",\"attempt\":null}", "attempt: expected a whole number");
    refused(f, "{" NAMES "," TEXTS ",\"text_form\":\"raw\"}", "text_form: expected plain, templated or verbatim, found \"raw\"");
    refused(f, "{" NAMES "," TEXTS ",\"group_size\":1025}", "group_size: expected a whole number from 0 to 1024, found 1025");
    refused(f, "{" NAMES ",\"prompt\":\"a\",\"completion\":\"b\\ud800\"}", "completion: expected Unicode text, found a lone surrogate at offset 1");
    refused(f, "{" NAMES ",\"prompt\":\"\\udc00\\ud800\",\"completion\":\"b\"}", "prompt: expected Unicode text");
    refused(f, "{" NAMES "," TEXTS ",\"trainer_rewrd\":1}", "unknown field 'trainer_rewrd' (did you mean 'trainer_reward'?)");
}

static void test_json_rollout_refuses_bad_names_and_echoes_the_others(void **state)
{
    fixture *f = *state;
    char line[600], name[200];

    refused(f, "{\"run\":\"r1\",\"step\":\"12\",\"group\":\"g\",\"id\":\"i\"," TEXTS "}", "step: expected a whole number from 0");
    assert_false(f->known);
    assert_string_equal(f->names.step.data, "\"12\"");
    assert_string_equal(f->names.id.data, "\"i\"");
    refused(f, "{\"run\":\"r1\",\"step\":4,\"group\":\"g\"," TEXTS "}", "id: expected a text, found none");
    assert_true(f->known); /* run, step and group can be read: the line goes on with its group */
    assert_null(f->names.id.data);
    assert_string_equal(f->names.group.data, "\"g\"");
    refused(f, "{\"run\":null,\"step\":4,\"group\":\"g\",\"id\":\"i\"," TEXTS "}", "run: expected a text, found none");
    assert_false(f->known);
    refused(f, "{\"run\":7,\"step\":4,\"group\":\"g\",\"id\":\"i\"," TEXTS "}", "run: expected a text, found 7");
    refused(f, "{\"run\":\"\\ud800\",\"step\":4,\"group\":\"g\",\"id\":\"i\"," TEXTS "}", "run: expected Unicode text");
    assert_false(f->known);
    refused(f, "{\"run\":\"a\\nb\",\"step\":4,\"group\":\"g\",\"id\":\"i\"," TEXTS "}", "run: expected no control characters");
    assert_true(f->known);
    refused(f, "{\"run\":\"\",\"step\":4,\"group\":\"g\",\"id\":\"i\"," TEXTS "}", "run: expected a name of 1 to 128 bytes");
    refused(f, "{\"run\":\"r\",\"step\":-4,\"group\":\"g\",\"id\":\"i\"," TEXTS "}", "step: expected a whole number from 0");
    refused(f, "{\"run\":\"r\",\"step\":4.0,\"group\":\"g\",\"id\":\"i\"," TEXTS "}", "found 4.0");
    assert_false(f->known);
    refused(f, "{\"run\":\"r\",\"step\":9223372036854775808,\"group\":\"g\",\"id\":\"i\"," TEXTS "}", "found 9223372036854775808");
    refused(f, "{\"run\":\"r\",\"step\":true,\"group\":\"g\",\"id\":\"i\"," TEXTS "}", "found a truth value");
    memset(name, 'x', 129);
    name[129] = '\0';
    (void)snprintf(line, sizeof line, "{\"run\":\"r\",\"step\":4,\"group\":\"g\",\"id\":\"%s\"," TEXTS "}", name);
    refused(f, line, "id: expected a name of 1 to 128 bytes, found 129");
    name[128] = '\0';
    (void)snprintf(line, sizeof line, "{\"run\":\"r\",\"step\":9223372036854775807,\"group\":\"g\",\"id\":\"%s\"," TEXTS "}", name);
    read_line(f, line);
    assert_int_equal(f->kind, SPURION_LINE_ROLLOUT);
    assert_true(f->job.rollout.step == INT64_MAX);
}

static void no_object(fixture *f, const char *line, size_t size, const char *part)
{
    read_bytes(f, line, size);
    assert_int_equal(f->kind, SPURION_LINE_NO_OBJECT);
    assert_false(f->known);
    assert_int_equal(f->job.verdict.code, SPURION_INVALID_ARGUMENT);
    if (!strstr(f->job.verdict.message.data, part)) {
        fail_msg("expected '%s' in: %s", part, f->job.verdict.message.data);
    }
}

static void test_json_rollout_tells_what_is_no_object(void **state)
{
    fixture *f = *state;

    no_object(f, "not json", 8, "found byte 0x6e at offset 0");
    no_object(f, "[1,2]", 5, "expected a JSON object, found an array");
    no_object(f, "\xff\xfe", 2, "expected UTF-8, found byte 0xff at offset 0");
    no_object(f, "{\"prompt\":\"\xc3\"}", 13, "expected UTF-8, found byte 0xc3 at offset 11");
    no_object(f, "", 0, "found the end at offset 0");
    no_object(f, "  ", 2, "found the end");
    no_object(f, "{\"a\":1} x", 9, "expected the end, found byte 0x78 at offset 8");
    no_object(f, "{\"a\":1,}", 8, "expected a member's name");
    no_object(f, "{\"a\" 1}", 7, "expected a colon");
    no_object(f, "{\"a\":[1 2]}", 11, "expected a comma or ]");
    no_object(f, "{\"a\":01}", 8, "expected a comma or }");
    no_object(f, "{\"a\":1.}", 8, "expected a digit");
    no_object(f, "{\"a\":NaN}", 9, "expected a JSON value");
    no_object(f, "{\"a\":\"\t\"}", 9, "expected no control character");
    no_object(f, "{\"a\":\"\\x\"}", 10, "expected an escape");
    no_object(f, "{\"a\":\"\\u12g4\"}", 14, "expected four hexadecimal digits");
    no_object(f, "{\"a\":\"", 6, "expected the end of a string");
    no_object(f, "{\"a\":\"\\", 7, "expected an escape");
    no_object(f, "{\"a\":\0}", 7, "found byte 0x00");
}

static void test_json_rollout_bounds_nesting(void **state)
{
    fixture *f = *state;
    char line[2000];

    memset(line, '[', 1000);
    memset(line + 1000, ']', 1000);
    no_object(f, line, 2000, "expected less nesting");
    (void)snprintf(line, sizeof line, "{" NAMES "," TEXTS ",\"tags\":{\"a\":%.40s1%.40s}}", "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
                   "]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]");
    refused(f, line, "tags: expected an object with less nesting");
}

static void test_json_rollout_bounds_tags_and_texts(void **state)
{
    fixture *f = *state;
    size_t size = (size_t)SPURION_TEXT_BYTES_MAX + 200;
    char *line = malloc(size);
    int head;

    assert_non_null(line);
    head = snprintf(line, size, "{" NAMES ",\"prompt\":\"a\",\"completion\":\"");
    memset(line + head, 'x', SPURION_TEXT_BYTES_MAX + 1);
    memcpy(line + head + SPURION_TEXT_BYTES_MAX + 1, "\"}", 3);
    refused(f, line, "completion: expected at most 4194304 bytes, found 4194305");
    memcpy(line + head + SPURION_TEXT_BYTES_MAX, "\"}", 3);
    read_line(f, line);
    assert_int_equal(f->kind, SPURION_LINE_ROLLOUT);
    head = snprintf(line, size, "{" NAMES "," TEXTS ",\"tags\":{\"k\":\"");
    memset(line + head, 'x', SPURION_TAGS_BYTES_MAX);
    memcpy(line + head + SPURION_TAGS_BYTES_MAX, "\"}}", 4);
    refused(f, line, "tags: expected at most 16384 bytes");
    free(line);
}

static uint32_t next(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

/* What the scanner takes, jansson takes, and the other way round, but for what jansson refuses on purpose. */
static void test_json_scan_agrees_with_jansson_on_mutated_lines(void **state)
{
    static const char seed_line[] = "{\"run\":\"r\\u00e91\",\"step\":-12.5e+3,\"group\":[true,false,null,{}],\"id\":\"\xc3\xa9\",\"x\":[[1,2],{\"a\":\"b\"}]}";
    uint32_t seed = 20240917;
    int taken = 0;

    (void)state;
    print_message("seed %u\n", seed);
    for (int round = 0; round < 60000; round++) {
        char line[sizeof seed_line];
        size_t size = sizeof seed_line - 1;
        spurion_json_value value;
        json_error_t error;
        json_t *tree;
        bool ours;

        memcpy(line, seed_line, sizeof line);
        for (uint32_t edits = 1 + next(&seed) % 3; edits; edits--) {
            static const char alphabet[] = "{}[]\",:0159.-+eE\\utrfn ax\x01\xc3\xa9\xff";
            line[next(&seed) % size] = alphabet[next(&seed) % (sizeof alphabet - 1)];
        }
        ours = spurion_json_check(&value, line, size).code == SPURION_OK;
        tree = json_loadb(line, size, JSON_DECODE_ANY | JSON_ALLOW_NUL, &error);
        if (ours != (tree != NULL) && json_error_code(&error) != json_error_numeric_overflow && !strstr(error.text, "Unicode")) {
            fail_msg("%s takes, the other refuses: %s (%s)", ours ? "the scanner" : "jansson", line, error.text);
        }
        taken += ours;
        json_decref(tree);
    }
    assert_true(taken > 1000); /* the mutations leave enough that is JSON */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_json_rollout_reads_every_field, setup, teardown),
        cmocka_unit_test_setup_teardown(test_json_rollout_last_of_equal_members_counts, setup, teardown),
        cmocka_unit_test_setup_teardown(test_json_rollout_refuses_wrong_fields_by_name, setup, teardown),
        cmocka_unit_test_setup_teardown(test_json_rollout_refuses_bad_names_and_echoes_the_others, setup, teardown),
        cmocka_unit_test_setup_teardown(test_json_rollout_tells_what_is_no_object, setup, teardown),
        cmocka_unit_test_setup_teardown(test_json_rollout_bounds_nesting, setup, teardown),
        cmocka_unit_test_setup_teardown(test_json_rollout_bounds_tags_and_texts, setup, teardown),
        cmocka_unit_test(test_json_scan_agrees_with_jansson_on_mutated_lines),
    };
    return cmocka_run_group_tests_name("json_rollout", tests, NULL, NULL);
}

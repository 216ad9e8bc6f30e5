/* The reward servers' JSON: what is understood, what is refused by name, and how answers look. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

#include "daemon/base/arena.h"
#include "daemon/dialect.h"

typedef struct fixture {
    spurion_arena arena;
    spurion_ask ask;
    spurion_ask_options options;
} fixture;

static void *take(void *context, size_t bytes)
{
    return spurion_arena_take(context, bytes);
}

static spurion_status read_body(fixture *f, spurion_dialect dialect, const char *body)
{
    spurion_memory m = {take, &f->arena};
    return spurion_ask_read(&f->ask, &m, dialect, spurion_bytes_of(body), &f->options);
}

static void taken(fixture *f, spurion_dialect dialect, const char *body, int32_t count)
{
    spurion_status st = read_body(f, dialect, body);
    assert_string_equal(st.message, "");
    assert_int_equal(f->ask.count, count);
}

static void refused(fixture *f, spurion_dialect dialect, const char *body, const char *part)
{
    spurion_status st = read_body(f, dialect, body);
    assert_int_equal(st.code, SPURION_INVALID_ARGUMENT);
    if (strstr(st.message, part) == NULL) {
        fail_msg("expected '%s' in: %s", part, st.message);
    }
}

static void text_is(spurion_bytes b, const char *text)
{
    assert_int_equal(b.size, strlen(text));
    assert_memory_equal(b.data, text, b.size);
}

static void rollout_is(const fixture *f, int32_t i, const char *prompt, const char *completion, spurion_text_form form)
{
    text_is(f->ask.rollouts[i].prompt, prompt);
    text_is(f->ask.rollouts[i].completion, completion);
    assert_non_null(f->ask.rollouts[i].prompt.data);
    assert_int_equal(f->ask.rollouts[i].text_form, form);
}

static void written(const fixture *f, const spurion_verdict *verdicts, spurion_http_reward reward, const char *expected)
{
    spurion_text t;

    memset(&t, 0, sizeof t);
    spurion_ask_write(&t, &f->ask, verdicts, reward, 7);
    assert_false(t.failed);
    if (t.size < strlen(expected) || memcmp(t.data, expected, strlen(expected)) != 0) {
        fail_msg("expected %s at the front of %.*s", expected, (int)t.size, t.data);
    }
    spurion_text_fini(&t);
}

static int set_up(void **state)
{
    static fixture f;

    memset(&f, 0, sizeof f);
    spurion_arena_init(&f.arena, 0);
    *state = &f;
    return 0;
}

static int tear_down(void **state)
{
    spurion_arena_fini(&((fixture *)*state)->arena);
    return 0;
}

static void test_dialect_openrlhf_divides_by_the_prompt(void **state)
{
    fixture *f = *state;

    taken(f, SPURION_DIALECT_OPENRLHF, "{\"query\":[\"<s>p qr\",\"xyz\",\"x\\n\\nAssistant: y\"],\"prompts\":[\"p q\",null,\"other\"],\"labels\":[1,null,{}]}", 3);
    rollout_is(f, 0, "<s>p q", "r", SPURION_FORM_VERBATIM);
    rollout_is(f, 1, "", "xyz", SPURION_FORM_VERBATIM);
    rollout_is(f, 2, "x\n\nAssistant:", " y", SPURION_FORM_VERBATIM);
    assert_true(f->ask.divided[0] && !f->ask.divided[1] && f->ask.divided[2]);
    taken(f, SPURION_DIALECT_OPENRLHF, "{\"query\":[],\"prompts\":[],\"labels\":[]}", 0);
    written(f, NULL, SPURION_HTTP_CLEAN, "{\"rewards\":[],\"scores\":[],\"extra_logs\":{\"spurion_clean_reward\":[],");
    refused(f, SPURION_DIALECT_OPENRLHF, "{\"query\":\"a\"}", "query: expected a list of texts, found a string");
    refused(f, SPURION_DIALECT_OPENRLHF, "{\"query\":[\"a\",1]}", "query[1]: expected a text, found 1");
    refused(f, SPURION_DIALECT_OPENRLHF, "{\"query\":[\"a\"],\"prompts\":[\"a\",\"b\"]}", "prompts: expected a list as long as query");
    refused(f, SPURION_DIALECT_OPENRLHF, "{\"queries\":[\"a\"]}", "unknown field 'queries'");
    refused(f, SPURION_DIALECT_OPENRLHF, "{\"query\":[\"a\"],\"query\":[\"b\"]}", "query: expected it once, found it again");
    refused(f, SPURION_DIALECT_OPENRLHF, "[]", "body: expected a JSON object, found an array");
    refused(f, SPURION_DIALECT_OPENRLHF, "{\"query\":[\"\\ud800\"]}", "query[0]: ");
}

static void test_dialect_slime_is_prompt_and_response(void **state)
{
    fixture *f = *state;
    const spurion_verdict v = {.reward = 0.25f, .counterfactual_reward = -1.5f, .action_reward = 0.5f};

    taken(f, SPURION_DIALECT_SLIME, "{\"prompt\":\"a\",\"response\":\"b\",\"label\":null}", 1);
    rollout_is(f, 0, "a", "b", SPURION_FORM_PLAIN);
    written(f, &v, SPURION_HTTP_CLEAN, "0.25");
    written(f, &v, SPURION_HTTP_COUNTERFACTUAL, "-1.5");
    written(f, &v, SPURION_HTTP_ACTION, "0.5");
    taken(f, SPURION_DIALECT_SLIME_VERDICT, "{\"prompt\":\"a\",\"response\":\"b\"}", 1);
    written(f, &v, SPURION_HTTP_COUNTERFACTUAL, "{\"reward\":-1.5,\"clean_reward\":0.25,\"counterfactual_reward\":-1.5,");
    refused(f, SPURION_DIALECT_SLIME, "{\"prompt\":\"a\"}", "response: expected a text, found nothing");
    f->options.form = SPURION_HTTP_FORM_TEMPLATED;
    taken(f, SPURION_DIALECT_SLIME, "{\"prompt\":\"a\",\"response\":\"b\"}", 1);
    rollout_is(f, 0, "a", "b", SPURION_FORM_TEMPLATED);
}

static void test_dialect_vllm_input_in_all_its_forms(void **state)
{
    fixture *f = *state;
    const spurion_verdict v[2] = {{.reward = 2, .token_count = 3}, {.reward = 0, .token_count = 4}};

    taken(f, SPURION_DIALECT_CLASSIFY, "{\"model\":\"m\",\"input\":\"u<|im_start|>assistant\\nyes\",\"use_activation\":false,\"priority\":3}", 1);
    rollout_is(f, 0, "u<|im_start|>assistant\n", "yes", SPURION_FORM_TEMPLATED);
    assert_true(f->ask.single && !f->ask.squash);
    written(f, v, SPURION_HTTP_CLEAN, "{\"id\":\"classify-spurion\",\"created\":7,\"object\":\"list\",\"model\":\"m\",\"data\":[{\"index\":0,\"label\":"
                                      "\"LABEL_0\",\"probs\":[2.0],\"num_classes\":1,");
    taken(f, SPURION_DIALECT_POOLING, "{\"input\":[\"a\",\"b\"],\"add_special_tokens\":false,\"activation\":true,\"task\":\"classify\"}", 2);
    rollout_is(f, 1, "", "b", SPURION_FORM_VERBATIM);
    assert_true(f->ask.squash);
    written(f, v, SPURION_HTTP_CLEAN, "{\"id\":\"pool-spurion\",\"created\":7,\"object\":\"list\",\"model\":\"spurion\",\"data\":[{\"index\":0,\"object\":"
                                      "\"pooling\",\"data\":[0.8807971],");
    taken(f, SPURION_DIALECT_CLASSIFY, "{\"input\":[5,6,7]}", 1);
    assert_int_equal(f->ask.rollouts[0].completion_id_count, 3);
    assert_true(f->ask.single);
    taken(f, SPURION_DIALECT_EMBEDDINGS, "{\"model\":\"m\",\"input\":[[5],[6,7]]}", 2);
    assert_int_equal(f->ask.rollouts[1].completion_ids[1], 7);
    written(f, v, SPURION_HTTP_CLEAN, "{\"object\":\"list\",\"model\":\"m\",\"data\":[{\"index\":0,\"object\":\"embedding\",\"embedding\":[2.0],");
    taken(f, SPURION_DIALECT_CLASSIFY, "{\"input\":[]}", 0);
    taken(f, SPURION_DIALECT_CLASSIFY, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"}]}", 1);
    text_is(f->ask.rollouts[0].messages, "[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"}]");
    text_is(f->ask.prompts[0], "[{\"role\":\"user\",\"content\":\"a\"},");
    assert_null(f->ask.rollouts[0].prompt.data);
}

static void test_dialect_vllm_refuses_what_it_cannot_do(void **state)
{
    fixture *f = *state;

    refused(f, SPURION_DIALECT_CLASSIFY, "{\"model\":\"m\"}", "input: expected it or messages or text, found none");
    refused(f, SPURION_DIALECT_V1_CLASSIFY, "{\"text\":\"a\"}", "unknown field 'text'");
    refused(f, SPURION_DIALECT_CLASSIFY, "{\"input\":\"a\",\"text\":\"b\"}", "found more than one");
    refused(f, SPURION_DIALECT_CLASSIFY, "{\"input\":\"a\",\"use_activation\":true,\"activation\":false}", "expected the same of both");
    refused(f, SPURION_DIALECT_CLASSIFY, "{\"input\":\"a\",\"use_activation\":1}", "use_activation: expected true or false, found 1");
    refused(f, SPURION_DIALECT_CLASSIFY, "{\"input\":\"a\",\"truncate_prompt_tokens\":100}", "truncate_prompt_tokens: expected null");
    refused(f, SPURION_DIALECT_CLASSIFY, "{\"input\":\"a\",\"truncate_prompt_tokens\":-1}", "truncate_prompt_tokens: expected null");
    refused(f, SPURION_DIALECT_CLASSIFY, "{\"input\":\"a\",\"truncation_side\":\"right\"}", "truncation_side: expected left");
    refused(f, SPURION_DIALECT_POOLING, "{\"input\":\"a\",\"task\":\"token_classify\"}", "task: expected classify");
    refused(f, SPURION_DIALECT_POOLING, "{\"input\":\"a\",\"encoding_format\":\"base64\"}", "encoding_format: expected float");
    refused(f, SPURION_DIALECT_POOLING, "{\"input\":\"a\",\"dimensions\":4}", "dimensions: expected none");
    refused(f, SPURION_DIALECT_CLASSIFY, "{\"input\":[1,\"a\"]}", "input: expected token ids from 0, found a string");
    refused(f, SPURION_DIALECT_CLASSIFY, "{\"input\":[[]]}", "input[0]: expected 1 to");
    refused(f, SPURION_DIALECT_CLASSIFY, "{\"messages\":{}}", "messages: expected an array of role and content, found an object");
    refused(f, SPURION_DIALECT_CLASSIFY, "{\"messages\":[],\"add_special_tokens\":true}", "add_special_tokens: expected false with messages");
    f->options.truncates = true;
    taken(f, SPURION_DIALECT_CLASSIFY, "{\"input\":\"a\",\"truncate_prompt_tokens\":-1}", 1);
}

static void test_dialect_sglang_answers_a_text_alone_alone(void **state)
{
    fixture *f = *state;
    const spurion_verdict v[2] = {{.reward = 2}, {.reward = 3}};

    taken(f, SPURION_DIALECT_CLASSIFY, "{\"model\":\"m\",\"text\":\"a\"}", 1);
    assert_int_equal(f->ask.dialect, SPURION_DIALECT_SGLANG_CLASSIFY);
    written(f, v, SPURION_HTTP_CLEAN, "{\"embedding\":[2.0],\"meta_info\":{");
    taken(f, SPURION_DIALECT_CLASSIFY, "{\"model\":\"m\",\"text\":[\"a\",\"b\"],\"rid\":\"x\"}", 2);
    written(f, v, SPURION_HTTP_CLEAN, "[{\"embedding\":[2.0],\"meta_info\":{\"id\":\"x\",");
}

static void test_dialect_tei_pair_is_one_rollout(void **state)
{
    fixture *f = *state;
    const spurion_verdict v[2] = {{.reward = 0}, {.reward = 3}};

    taken(f, SPURION_DIALECT_PREDICT, "{\"inputs\":[\"a\",\"b\"]}", 1);
    rollout_is(f, 0, "a", "b", SPURION_FORM_PLAIN);
    written(f, v, SPURION_HTTP_CLEAN, "[{\"score\":0.0,\"label\":\"LABEL_0\",");
    taken(f, SPURION_DIALECT_PREDICT, "{\"inputs\":\"a\",\"raw_scores\":false}", 1);
    written(f, v, SPURION_HTTP_CLEAN, "[{\"score\":0.5,\"label\":\"LABEL_0\",");
    taken(f, SPURION_DIALECT_PREDICT, "{\"inputs\":[[\"a\"],[\"b\",\"c\"]],\"truncate\":false,\"raw_scores\":true}", 2);
    rollout_is(f, 1, "b", "c", SPURION_FORM_PLAIN);
    written(f, v, SPURION_HTTP_CLEAN, "[[{\"score\":0.0,\"label\":\"LABEL_0\",");
    taken(f, SPURION_DIALECT_PREDICT, "{\"inputs\":[]}", 0);
    written(f, NULL, SPURION_HTTP_CLEAN, "[]");
    refused(f, SPURION_DIALECT_PREDICT, "{\"inputs\":[[\"a\"],\"b\"]}", "inputs[1]: expected a list as the others are");
    refused(f, SPURION_DIALECT_PREDICT, "{\"inputs\":[\"a\",\"b\",\"c\"]}", "inputs: expected a text, or prompt and completion, found 3 texts");
    refused(f, SPURION_DIALECT_PREDICT, "{\"inputs\":\"a\",\"truncate\":true}", "truncate: expected false");
    refused(f, SPURION_DIALECT_PREDICT, "{\"inputs\":7}", "inputs: expected a text, a pair, or a list of these, found 7");
}

static void test_dialect_completion_after_is_the_users(void **state)
{
    fixture *f = *state;

    f->options.completion_after = "<bot>\\n";
    taken(f, SPURION_DIALECT_CLASSIFY, "{\"input\":[\"<bot>\\na<bot>\\nb\",\"x<|im_start|>assistant\\nc\"]}", 2);
    rollout_is(f, 0, "<bot>\na<bot>\n", "b", SPURION_FORM_TEMPLATED);
    rollout_is(f, 1, "", "x<|im_start|>assistant\nc", SPURION_FORM_TEMPLATED);
}

#define CASE(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(test_dialect_openrlhf_divides_by_the_prompt), CASE(test_dialect_slime_is_prompt_and_response),
        CASE(test_dialect_vllm_input_in_all_its_forms),    CASE(test_dialect_vllm_refuses_what_it_cannot_do),
        CASE(test_dialect_sglang_answers_a_text_alone_alone), CASE(test_dialect_tei_pair_is_one_rollout),
        CASE(test_dialect_completion_after_is_the_users)};
    return cmocka_run_group_tests_name("dialect", tests, NULL, NULL);
}

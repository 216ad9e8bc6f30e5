/* Token sequences: joined text, template, leading specials, the border of the completion, EOS, truncation, ids, refusals.
 * The tokenizer is a small BPE written here: single letters, "ab" and "abc" merged, no pre-tokenizer, so that a token can span the border. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "daemon/sequence.h"

/* ids: <s> 0, </s> 1, <pad> 2, <t> 3, a 4, b 5, c 6, space 7, newline 8, ':' 9, then the letters of Human and Assistant; ab 21, abc 22 */
static const char tokenizer_json[] =
    "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"normalizer\":null,\"pre_tokenizer\":null,\"decoder\":null,"
    "\"added_tokens\":["
    "{\"id\":0,\"content\":\"<s>\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":true},"
    "{\"id\":1,\"content\":\"</s>\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":true}],"
    "\"post_processor\":%s,"
    "\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,\"continuing_subword_prefix\":null,\"end_of_word_suffix\":null,"
    "\"fuse_unk\":false,\"byte_fallback\":false,\"ignore_merges\":false,"
    "\"vocab\":{\"<s>\":0,\"</s>\":1,\"<pad>\":2,\"<t>\":3,\"a\":4,\"b\":5,\"c\":6,\" \":7,\"\\n\":8,\":\":9,\"H\":10,\"u\":11,\"m\":12,"
    "\"n\":13,\"A\":14,\"s\":15,\"i\":16,\"t\":17,\"ab\":21,\"abc\":22},"
    "\"merges\":[[\"a\",\"b\"],[\"ab\",\"c\"]]}}";

static const char with_bos[] =
    "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<s>\",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],"
    "\"pair\":[{\"Sequence\":{\"id\":\"A\",\"type_id\":0}},{\"Sequence\":{\"id\":\"B\",\"type_id\":1}}],"
    "\"special_tokens\":{\"<s>\":{\"id\":\"<s>\",\"ids\":[0],\"tokens\":[\"<s>\"]}}}";

static const char with_two[] =
    "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<s>\",\"type_id\":0}},{\"SpecialToken\":{\"id\":\"<t>\",\"type_id\":0}},"
    "{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],\"pair\":[{\"Sequence\":{\"id\":\"A\",\"type_id\":0}},{\"Sequence\":{\"id\":\"B\",\"type_id\":1}}],"
    "\"special_tokens\":{\"<s>\":{\"id\":\"<s>\",\"ids\":[0],\"tokens\":[\"<s>\"]},\"<t>\":{\"id\":\"<t>\",\"ids\":[3],\"tokens\":[\"<t>\"]}}}";

typedef struct fixture {
    spurion_tokenizer *tokenizer;
    spurion_config config;
    spurion_model_config model;
    spurion_sequence_rules rules;
    spurion_chat chat;
    spurion_job job;
    spurion_text_form form;
} fixture;

static void open_tokenizer(fixture *f, const char *post)
{
    char text[4096];
    spurion_status st;
    int size = snprintf(text, sizeof text, tokenizer_json, post);

    spurion_tokenizer_close(f->tokenizer);
    f->tokenizer = NULL;
    st = spurion_tokenizer_open_memory(&f->tokenizer, text, (size_t)size);
    assert_string_equal(st.message, "");
    f->rules.tokenizer = f->tokenizer;
}

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof *f);

    assert_non_null(f);
    f->model.bos = 0;
    f->model.eos[0] = 1;
    f->model.eos_count = 1;
    f->model.pad = -1;
    f->rules = (spurion_sequence_rules){.config = &f->config, .model = &f->model, .vocab = 23, .tokens_max = 100, .tail_max = 100, .chat = &f->chat};
    open_tokenizer(f, with_bos);
    spurion_job_init(&f->job, 0);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    spurion_job_fini(&f->job);
    spurion_tokenizer_close(f->tokenizer);
    free(f);
    return 0;
}

static void make_texts(fixture *f, const char *prompt, const char *completion)
{
    spurion_job_reset(&f->job);
    f->job.rollout.prompt = (spurion_bytes){prompt, prompt ? strlen(prompt) : 0};
    f->job.rollout.completion = (spurion_bytes){completion, completion ? strlen(completion) : 0};
    f->job.rollout.text_form = f->form;
    spurion_sequence_make(&f->job, &f->rules);
}

static void make_ids(fixture *f, const int32_t *prompt, int32_t prompt_count, const int32_t *completion, int32_t completion_count)
{
    spurion_job_reset(&f->job);
    f->job.rollout.prompt_ids = prompt;
    f->job.rollout.prompt_id_count = prompt_count;
    f->job.rollout.completion_ids = completion;
    f->job.rollout.completion_id_count = completion_count;
    spurion_sequence_make(&f->job, &f->rules);
}

/* ids as text, the start of the completion marked by '|', the end of the leading specials by '<'. */
static void expect(const fixture *f, const char *ids, uint32_t warnings)
{
    const spurion_job *j = &f->job;
    char text[512] = "";
    size_t used = 0;

    assert_string_equal(j->verdict.message.data ? j->verdict.message.data : "", "");
    for (int32_t i = 0; i < j->token_count; i++) {
        used += (size_t)snprintf(text + used, sizeof text - used, "%s%s%d ", i == j->leading_count && i ? "< " : "",
                                 i == j->completion_start ? "| " : "", j->ids[i]);
    }
    assert_string_equal(text, ids);
    assert_int_equal(j->verdict.warnings, warnings);
    assert_int_equal(j->verdict.token_count, j->token_count);
    assert_int_equal(j->verdict.scored_position, j->token_count - 1);
}

static void expect_refused(const fixture *f, int code, const char *part)
{
    assert_int_equal(f->job.verdict.code, code);
    if (!strstr(f->job.verdict.message.data, part)) {
        fail_msg("expected '%s' in: %s", part, f->job.verdict.message.data);
    }
}

static void test_sequence_joins_texts_after_the_leading_specials(void **state)
{
    fixture *f = *state;

    make_texts(f, "a", "ca");
    expect(f, "0 < 4 | 6 4 ", 0);
    make_texts(f, "", "ab");
    expect(f, "0 < | 21 ", 0);
    open_tokenizer(f, "null");
    make_texts(f, "a", "c");
    expect(f, "4 | 6 ", 0);
    open_tokenizer(f, with_two);
    make_texts(f, "a", "c");
    expect(f, "0 3 < 4 | 6 ", 0);
}

static void test_sequence_token_over_the_border_belongs_to_the_completion(void **state)
{
    fixture *f = *state;

    make_texts(f, "ca", "bc"); /* c abc */
    expect(f, "0 < 6 | 22 ", SPURION_WARN_BOUNDARY);
    make_texts(f, "a", "b");
    expect(f, "0 < | 21 ", SPURION_WARN_BOUNDARY);
    make_texts(f, "ab", "ab");
    expect(f, "0 < 21 | 21 ", 0);
}

static void test_sequence_appends_eos_and_warns_when_it_is_the_pad(void **state)
{
    fixture *f = *state;

    f->config.model.append_eos = true;
    make_texts(f, "a", "c");
    expect(f, "0 < 4 | 6 1 ", 0);
    f->model.pad = 1;
    make_texts(f, "a", "c");
    expect(f, "0 < 4 | 6 1 ", SPURION_WARN_PAD_SCORED);
    f->config.model.append_eos = false;
    f->model.pad = 6;
    make_texts(f, "a", "c");
    expect(f, "0 < 4 | 6 ", SPURION_WARN_PAD_SCORED);
    f->config.model.append_eos = true;
    f->model.eos_count = 0;
    make_texts(f, "a", "c");
    expect_refused(f, SPURION_FAILED_PRECONDITION, "expected eos_token_id");
}

static void test_sequence_prompt_with_bos_gets_no_second(void **state)
{
    fixture *f = *state;

    make_texts(f, "<s>a", "c");
    expect(f, "0 < 4 | 6 ", SPURION_WARN_BOS_ONCE);
    open_tokenizer(f, with_two);
    make_texts(f, "<s>a", "c"); /* the other special stays; the sequence then begins with it, so nothing counts as leading */
    expect(f, "3 0 4 | 6 ", SPURION_WARN_BOS_ONCE);
    f->model.bos = -1;
    make_texts(f, "<s>a", "c");
    expect(f, "0 3 < 0 4 | 6 ", 0);
}

static void test_sequence_forms_say_what_is_added(void **state)
{
    fixture *f = *state;

    f->config.model.append_eos = true;
    f->form = SPURION_FORM_TEMPLATED;
    make_texts(f, "a", "c"); /* leading specials, and no EOS */
    expect(f, "0 < 4 | 6 ", 0);
    make_texts(f, "<s>a", "c");
    expect(f, "0 < 4 | 6 ", SPURION_WARN_BOS_ONCE);
    make_texts(f, "", "<s>ac"); /* nobody said where the completion begins: after the BOS */
    expect(f, "0 < | 4 6 ", SPURION_WARN_BOS_ONCE);
    f->form = SPURION_FORM_VERBATIM;
    make_texts(f, "a", "c");
    expect(f, "4 | 6 ", 0);
    make_texts(f, "<s>a", "c");
    expect(f, "0 < 4 | 6 ", 0);
    make_texts(f, "", "<s>ac");
    expect(f, "0 < | 4 6 ", 0);
    f->config.model.template_kind = SPURION_TEMPLATE_HH;
    make_texts(f, "a", "c");
    expect(f, "4 | 6 ", 0);
    f->form = SPURION_FORM_PLAIN;
}

static void test_sequence_hh_template(void **state)
{
    fixture *f = *state;
    int32_t plain[64], count;

    open_tokenizer(f, "null");
    make_texts(f, "\n\nHuman: ab\n\nAssistant:", " c");
    expect(f, "8 8 10 11 12 4 13 9 7 21 8 8 14 15 15 16 15 17 4 13 17 9 | 7 6 ", 0);
    count = f->job.token_count;
    memcpy(plain, f->job.ids, (size_t)count * sizeof *plain);
    f->chat.kind = SPURION_TEMPLATE_HH;
    make_texts(f, "ab", "c");
    assert_int_equal(f->job.token_count, count);
    assert_memory_equal(f->job.ids, plain, (size_t)count * sizeof *plain);
    make_texts(f, "ab", " c"); /* one leading space unless it has one */
    assert_int_equal(f->job.token_count, count);
    make_texts(f, "\n\nHuman: ab\n\nAssistant:", "c"); /* used as it is */
    assert_int_equal(f->job.token_count, count);
    assert_memory_equal(f->job.ids, plain, (size_t)count * sizeof *plain);
    make_texts(f, "\n\nHuman: ab", "c"); /* only one end: wrapped once more */
    assert_true(f->job.token_count > count);
}

static void test_sequence_ids_are_the_whole_sequence(void **state)
{
    fixture *f = *state;
    static const int32_t bos[] = {0, 4}, plain[] = {4, 5}, completion[] = {6, 1}, special[] = {0};

    f->config.model.append_eos = true;
    f->chat.kind = SPURION_TEMPLATE_HH;
    make_ids(f, bos, 2, completion, 2);
    expect(f, "0 < 4 | 6 1 ", 0);
    make_ids(f, plain, 2, completion, 2);
    expect(f, "4 5 | 6 1 ", 0);
    make_ids(f, plain, 0, special, 1); /* what leads never passes the start of the completion */
    expect(f, "| 0 ", 0);
    open_tokenizer(f, with_two);
    make_ids(f, bos, 2, completion, 2); /* not the tokenizer's two, but the BOS id */
    expect(f, "0 < 4 | 6 1 ", 0);
    f->model.pad = 1;
    make_ids(f, plain, 2, completion, 2);
    expect(f, "4 5 | 6 1 ", SPURION_WARN_PAD_SCORED);
}

static void test_sequence_pooling_chooses_the_position(void **state)
{
    fixture *f = *state;
    static const int32_t prompt[] = {1, 4}, completion[] = {5, 1, 6, 2, 2}, padding[] = {2, 2};

    f->model.pad = 2;
    make_ids(f, prompt, 2, completion, 5);
    assert_int_equal(f->job.scored, 6);
    assert_int_equal(f->job.verdict.warnings, SPURION_WARN_PAD_SCORED);
    f->model.pooling = SPURION_POOL_LAST_NON_PAD;
    make_ids(f, prompt, 2, completion, 5);
    assert_true(f->job.scored == 4 && f->job.verdict.scored_position == 4 && f->job.verdict.warnings == 0);
    make_ids(f, prompt, 2, padding, 2);
    expect_refused(f, SPURION_INVALID_ARGUMENT, "expected a token other than pad_token_id (2), found none");
    f->model.pooling = SPURION_POOL_FIRST_EOS; /* the prompt's own does not count */
    make_ids(f, prompt, 2, completion, 5);
    assert_true(f->job.scored == 3 && f->job.verdict.scored_position == 3);
    make_ids(f, prompt, 2, padding, 2); /* none: the last */
    assert_int_equal(f->job.scored, 3);
    f->model.pooling = SPURION_POOL_MEAN;
    make_ids(f, prompt, 2, completion, 5);
    assert_true(f->job.scored == 6 && f->job.verdict.scored_position == -1);
}

static void make_messages(fixture *f, const char *messages)
{
    spurion_job_reset(&f->job);
    f->job.rollout.messages = (spurion_bytes){messages, strlen(messages)};
    spurion_sequence_make(&f->job, &f->rules);
}

static void test_sequence_messages_need_a_template(void **state)
{
    fixture *f = *state;
    static const char pair[] = "[{\"role\":\"user\",\"content\":\"ab\"},{\"role\":\"assistant\",\"content\":\"c\"}]";
    int32_t plain[64], count;

    make_messages(f, pair);
    expect_refused(f, SPURION_INVALID_ARGUMENT, "expected prompt and completion with model.template none, found messages");
    f->chat.kind = SPURION_TEMPLATE_HH;
    make_texts(f, "ab", "c");
    count = f->job.token_count;
    memcpy(plain, f->job.ids, (size_t)count * sizeof *plain);
    make_messages(f, pair);
    assert_int_equal(f->job.token_count, count);
    assert_memory_equal(f->job.ids, plain, (size_t)count * sizeof *plain);
    make_messages(f, "[{\"role\":\"user\",\"content\":\"ab\"},{\"role\":\"assistant\",\"content\":\"\"}]");
    expect_refused(f, SPURION_INVALID_ARGUMENT, "completion: expected a text, found an empty one");
    make_messages(f, "[{\"role\":\"user\",\"content\":\"ab\"}]");
    expect_refused(f, SPURION_INVALID_ARGUMENT, "expected 2 to 4096 messages, found 1");
    f->chat.kind = SPURION_TEMPLATE_GEMMA;
    make_messages(f, "[{\"role\":\"assistant\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"}]");
    expect_refused(f, SPURION_INVALID_ARGUMENT, "message 0: template gemma: expected user (they take turns), found assistant");
}

static void test_sequence_too_long_is_refused_or_loses_oldest_prompt(void **state)
{
    fixture *f = *state;

    f->rules.tokens_max = 4;
    make_texts(f, "cca", "cc");
    expect_refused(f, SPURION_OUT_OF_RANGE, "expected at most 4 tokens, found 6");
    f->config.model.on_too_long = SPURION_TOO_LONG_TRUNCATE;
    make_texts(f, "cca", "cc");
    expect(f, "0 < 4 | 6 6 ", 0);
    assert_true(f->job.verdict.truncated);
    make_texts(f, "cc", "ccc"); /* the whole prompt goes */
    expect(f, "0 < | 6 6 6 ", 0);
    assert_true(f->job.verdict.truncated);
    make_texts(f, "c", "cccc");
    expect_refused(f, SPURION_OUT_OF_RANGE, "expected at most 4 tokens without the prompt, found 5");
    make_texts(f, "c", "cc");
    assert_false(f->job.verdict.truncated);
}

static void test_sequence_refuses_bad_content(void **state)
{
    fixture *f = *state;
    static const int32_t good[] = {4}, big[] = {4, 23}, negative[] = {-1};
    spurion_job *j = &f->job;

    make_texts(f, "a", "");
    expect_refused(f, SPURION_INVALID_ARGUMENT, "completion: expected a text, found an empty one");
    make_texts(f, "a", NULL);
    expect_refused(f, SPURION_INVALID_ARGUMENT, "found prompt");
    make_texts(f, "a\xff", "c");
    expect_refused(f, SPURION_INVALID_ARGUMENT, "prompt: expected UTF-8, found byte 0xff at offset 1");
    make_texts(f, "a", "cc\xed\xa0\x80"); /* a surrogate */
    expect_refused(f, SPURION_INVALID_ARGUMENT, "completion: expected UTF-8, found byte 0xed at offset 2");
    make_ids(f, good, 1, big, 2);
    expect_refused(f, SPURION_INVALID_ARGUMENT, "completion_ids: expected ids from 0 to 22, found 23 at place 1");
    make_ids(f, negative, 1, good, 1);
    expect_refused(f, SPURION_INVALID_ARGUMENT, "prompt_ids: expected ids from 0 to 22, found -1 at place 0");
    make_ids(f, good, 1, good, 0);
    expect_refused(f, SPURION_INVALID_ARGUMENT, "completion_ids: expected at least one token, found none");
    f->rules.vocab = 5; /* a tokenizer that knows more than the embedding holds */
    make_texts(f, "a", "c");
    expect_refused(f, SPURION_INVALID_ARGUMENT, "expected ids from 0 to 4, found 6");
    spurion_job_reset(j);
    j->rollout.prompt = (spurion_bytes){"a", 1};
    j->rollout.completion_ids = good;
    j->rollout.completion_id_count = 1;
    spurion_sequence_make(j, &f->rules);
    expect_refused(f, SPURION_INVALID_ARGUMENT, "found prompt completion_ids");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_sequence_joins_texts_after_the_leading_specials, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sequence_token_over_the_border_belongs_to_the_completion, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sequence_appends_eos_and_warns_when_it_is_the_pad, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sequence_prompt_with_bos_gets_no_second, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sequence_forms_say_what_is_added, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sequence_hh_template, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sequence_ids_are_the_whole_sequence, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sequence_pooling_chooses_the_position, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sequence_messages_need_a_template, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sequence_too_long_is_refused_or_loses_oldest_prompt, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sequence_refuses_bad_content, setup, teardown),
    };
    return cmocka_run_group_tests_name("sequence", tests, NULL, NULL);
}

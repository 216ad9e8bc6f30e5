/* The tokenizer on small files written here; the ids were also read off the `tokenizers` library. Equality with the library on
 * real files and fuzzed strings: tests/golden/fuzz_tokenizers.py. */
#include "daemon/model/tokenizer_internal.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define FLAGS "\"single_word\":false,\"lstrip\":false,\"rstrip\":false"
#define BYTE_LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true}"
#define BYTE_LEVEL_PLAIN "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":false}"
#define LLAMA3                                                                                                                     \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}{1,3}| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|" \
    "\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+"

/* Letters, digits, the space and the newline of byte-level spelling, and a few merges; U+0120 is the space, U+010A the newline. */
#define LETTERS                                                                                                                    \
    "\"a\":0,\"b\":1,\"c\":2,\"d\":3,\"e\":4,\"s\":5,\"'\":6,\"1\":7,\"2\":8,\"\\u0120\":9,\"\\u010a\":10,\"!\":11,\"\\u00c3\":"   \
    "12,"                                                                                                                          \
    "\"\\u00a9\":13,\"\\u00c5\":14,\"\\u00bf\":15,\"\\u0122\":16,\"\\u0100\":17"
#define MODEL(vocab, merges, more) "\"model\":{\"type\":\"BPE\"," more "\"vocab\":{" vocab "},\"merges\":[" merges "]}"
#define FILE_OF(parts, model) "{\"version\":\"1.0\"," parts "," model "}"

static spurion_tokenizer *open_json(const char *json)
{
    spurion_tokenizer *t = NULL;
    spurion_status st = spurion_tokenizer_open_memory(&t, json, strlen(json));
    if (st.code != SPURION_OK) {
        print_error("%s\n", st.message);
    }
    assert_int_equal(st.code, SPURION_OK);
    assert_non_null(t);
    return t;
}

/* Ids of text as "1 2 3". */
static const char *ids_of(const spurion_tokenizer *t, const char *text, size_t bytes)
{
    static char line[4096];
    spurion_ids ids = {0};
    spurion_status st = spurion_tokenizer_encode(&ids, t, text, bytes);
    size_t n = 0;

    if (st.code != SPURION_OK) {
        print_error("%s\n", st.message);
    }
    assert_int_equal(st.code, SPURION_OK);
    line[0] = '\0';
    for (size_t i = 0; i < ids.count && n < sizeof line - 16; i++) {
        n += (size_t)snprintf(line + n, sizeof line - n, "%s%d", i == 0 ? "" : " ", (int)ids.data[i]);
    }
    spurion_ids_fini(&ids);
    return line;
}

#define assert_ids(t, text, expected) assert_string_equal(ids_of(t, text, sizeof text - 1), expected)

static void assert_refused(const char *json, int code, const char *part)
{
    spurion_tokenizer *t = NULL;
    spurion_status st = spurion_tokenizer_open_memory(&t, json, strlen(json));

    assert_int_equal(st.code, code);
    assert_null(t);
    if (strstr(st.message, part) == NULL) {
        fail_msg("expected '%s' in: %s", part, st.message);
    }
}

static void test_tokenizer_merges_in_order_of_rank(void **state)
{
    (void)state;
    spurion_tokenizer *t =
        open_json(FILE_OF("\"pre_tokenizer\":" BYTE_LEVEL, MODEL(LETTERS ",\"ab\":20,\"bc\":21,\"abc\":22,\"\\u0120a\":23",
                                                                 "\"b c\",\"a b\",\"a bc\",\"\\u0120 a\"", "")));
    assert_ids(t, "abc", "22");
    assert_ids(t, "ab", "20");
    assert_ids(t, "abab", "20 20");
    assert_ids(t, " abc", "9 22"); /* "b c" first, then "a bc"; "\u0120 a" comes too late */
    assert_ids(t, " a b", "23 9 1");
    assert_ids(t, "", "");
    assert_ids(t, "a\xc3\xa9", "0 12 13");
    assert_ids(t, "a\0b", "0 17 1");
    assert_ids(t, "azb", "20"); /* no unk_token: a character outside the vocabulary vanishes, and its neighbours meet */
    spurion_tokenizer_close(t);
}

/* Two merges make the same token: an entry of the heap made for one holds for the other when it comes up. */
static void test_tokenizer_merges_by_what_they_make(void **state)
{
    (void)state;
    spurion_tokenizer *t = open_json(
        FILE_OF("\"pre_tokenizer\":null", MODEL("\"a\":0,\"b\":1,\"ab\":2,\"ba\":3,\"aba\":4,\"bab\":5,\"abab\":6",
                                                "\"a b\",\"ab a\",\"a ba\",\"b a\",\"ab ab\",\"b ab\",\"aba b\",\"a bab\"", "")));
    assert_ids(t, "abab", "6");
    assert_ids(t, "aba", "4");
    assert_ids(t, "bab", "5");
    assert_ids(t, "babab", "1 6");
    assert_ids(t, "ababa", "2 4"); /* "ab a" has a lower rank than "ab ab" */
    spurion_tokenizer_close(t);
}

static void test_tokenizer_splits_as_gpt2(void **state)
{
    (void)state;
    spurion_tokenizer *t = open_json(FILE_OF(
        "\"pre_tokenizer\":" BYTE_LEVEL,
        MODEL(LETTERS ",\"'s\":20,\"\\u0120\\u0120\":21,\"\\u0120a\":22,\"1a\":23,\"12\":24,\"\\u010a\\u010a\":25,\"a'\":26",
              "\"' s\",\"\\u0120 \\u0120\",\"\\u0120 a\",\"1 a\",\"1 2\",\"\\u010a \\u010a\",\"a '\"", "")));
    assert_ids(t, "a's", "0 20");
    assert_ids(t, "a'b", "0 6 1");
    assert_ids(t, "   a", "21 22"); /* the last space goes to the word */
    assert_ids(t, "a  ", "0 21");
    assert_ids(t, "12a", "24 0");
    assert_ids(t, "a\n\na", "0 10 10 0"); /* \s+(?!\S) leaves one newline */
    assert_ids(t, "a\n\n", "0 25");
    spurion_tokenizer_close(t);
}

static void test_tokenizer_splits_as_llama3(void **state)
{
    (void)state;
    spurion_tokenizer *t = open_json(
        FILE_OF("\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" LLAMA3
                "\"},\"behavior\":\"Isolated\",\"invert\":false}," BYTE_LEVEL_PLAIN "]}",
                MODEL(LETTERS ",\"'s\":20,\"121\":21,\"'\\u00c5\\u00bf\":22,\"!\\u010a\\u010a\":23,\"\\u0120\\u010a\":24,\"'ab\":"
                              "25,\"\\u0120\\u0120\":26,\"\\u0120!\":27,"
                              "\"1212\":28,\"12\":29",
                      "", "\"ignore_merges\":true,")));
    assert_ids(t, "'s", "20");
    assert_ids(t, "'\xc5\xbf", "22"); /* U+017F is an s without case */
    assert_ids(t, "12121", "21 8 7"); /* digits in threes: "121", "21" */
    assert_ids(t, "121212", "21 8 7 8");
    assert_ids(t, "!\n\na", "23 0");
    assert_ids(t, "a \n  a", "0 24 9 9 0"); /* " \n", " ", " a" */
    assert_ids(t, "'ab", "25");
    assert_ids(t, "a !", "0 27");
    assert_ids(t, "a  ", "0 26");
    spurion_tokenizer_close(t);
}

static void test_tokenizer_regex_by_oniguruma_follows_library_unicode(void **state)
{
    (void)state;
    spurion_tokenizer *t = open_json(
        FILE_OF("\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\p{Lu}\\\\p{Ll}*\"},\"behavior\":\"Isolated\","
                "\"invert\":false}",
                MODEL("\"A\":0,\"b\":1,\"Ab\":2,\"\\ua7da\":3,\"bA\":4,\"b\\ua7da\":5", "\"A b\",\"b A\",\"b \\ua7da\"", "")));
    assert_ids(t, "AbAb", "2 2");
    assert_ids(t, "bA", "1 0");
    assert_ids(t, "b\xea\x9f\x9a", "1 3"); /* U+A7DA: upper case since Unicode 16, unassigned in older Oniguruma */
    spurion_tokenizer_close(t);
}

static void test_tokenizer_added_tokens_swallow_spaces_and_keep_words(void **state)
{
    (void)state;
    spurion_tokenizer *t = open_json(FILE_OF("\"added_tokens\":["
                                             "{\"id\":20,\"content\":\"<l>\",\"single_word\":false,\"lstrip\":true,\"rstrip\":"
                                             "false,\"normalized\":false,\"special\":false},"
                                             "{\"id\":21,\"content\":\"<r>\",\"single_word\":false,\"lstrip\":false,\"rstrip\":"
                                             "true,\"normalized\":false,\"special\":true},"
                                             "{\"id\":22,\"content\":\"bad\",\"single_word\":true,\"lstrip\":false,\"rstrip\":"
                                             "false,\"normalized\":false,\"special\":false},"
                                             "{\"id\":23,\"content\":\"<l><r>\"," FLAGS ",\"normalized\":false,\"special\":false},"
                                             "{\"id\":24,\"content\":\"<E>\"," FLAGS ",\"normalized\":true,\"special\":false}],"
                                             "\"normalizer\":{\"type\":\"Lowercase\"},\"pre_tokenizer\":" BYTE_LEVEL,
                                             MODEL(LETTERS ",\"<\":18,\">\":19", "", "")));
    assert_ids(t, "a  <l> a", "0 20 9 0");
    assert_ids(t, "a <r>  a", "0 9 21 0");
    assert_ids(t, "bad abad bad", "22 9 0 1 0 3 9 22");
    assert_ids(t, "a<l><r>a", "0 23 0"); /* the longest wins */
    assert_ids(t, "a<e><E>", "0 24 24"); /* looked for after lower case */
    assert_ids(t, "<L>", "18 19");       /* not normalised: only as written; l is outside the vocabulary */
    assert_int_equal(spurion_tokenizer_id(t, "<E>", 3), 24);
    assert_int_equal(spurion_tokenizer_id(t, "\xc4\xa0", 2), 9);
    assert_int_equal(spurion_tokenizer_id(t, "nothing", 7), -1);
    spurion_tokenizer_close(t);
}

#define SPM_NORMALIZER                                                                                                             \
    "\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\\u2581\"},"                       \
    "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\\u2581\"}]}"
#define SPM_VOCAB                                                                                                                  \
    "\"<unk>\":0,\"<s>\":1,\"<0xC3>\":2,\"<0xA9>\":3,\"\\u2581\":4,\"a\":5,\"b\":6,\"\\u2581a\":7,\"\\u2581\\u2581\":8,\"ab\":9"
#define SPM_MERGES "[\"\\u2581\",\"\\u2581\"],[\"\\u2581\",\"a\"],[\"a\",\"b\"]"

static void test_tokenizer_sentencepiece_falls_back_to_bytes(void **state)
{
    (void)state;
    spurion_tokenizer *t = open_json(
        FILE_OF("\"added_tokens\":[{\"id\":1,\"content\":\"<s>\"," FLAGS ",\"normalized\":false,\"special\":true}]," SPM_NORMALIZER,
                MODEL(SPM_VOCAB, SPM_MERGES, "\"unk_token\":\"<unk>\",\"fuse_unk\":true,\"byte_fallback\":true,")));
    const char *text;
    size_t bytes;

    assert_ids(t, "a", "7");
    assert_ids(t, " a", "8 5");
    assert_ids(t, "ab a", "7 6 7");
    assert_ids(t,
               "a\xc3\xa9"
               "b",
               "7 2 3 6");
    assert_ids(t,
               "a\xc3\xa8\xe2\x82\xac"
               "b",
               "7 0 6");             /* no <0xA8>: unknown, and the next joins it */
    assert_ids(t, "a<s>a", "7 1 7"); /* Prepend runs on every piece between added tokens */
    assert_ids(t, "", "");
    assert_int_equal(spurion_tokenizer_token_bytes(&text, &bytes, t, 7).code, SPURION_OK);
    assert_string_equal(text, " a");
    assert_int_equal(spurion_tokenizer_token_bytes(&text, &bytes, t, 2).code, SPURION_OK);
    assert_int_equal(bytes, 1);
    assert_memory_equal(text, "\xc3", 2);
    assert_int_equal(spurion_tokenizer_token_bytes(&text, &bytes, t, 1).code, SPURION_OK);
    assert_string_equal(text, "<s>");
    assert_int_equal(spurion_tokenizer_token_bytes(&text, &bytes, t, 10).code, SPURION_NOT_FOUND);
    assert_int_equal(spurion_tokenizer_vocab_size(t), 10);
    spurion_tokenizer_close(t);
}

static void test_tokenizer_metaspace_prepends_by_scheme(void **state)
{
    (void)state;
    static const struct {
        const char *scheme, *start, *after;
    } cases[] = {{"first", "7 6", "7 1 5"}, {"always", "7 6", "7 1 7"}, {"never", "9", "5 1 5"}};
    for (size_t i = 0; i < 3; i++) {
        char json[2048];
        (void)snprintf(
            json, sizeof json,
            FILE_OF(
                "\"added_tokens\":[{\"id\":1,\"content\":\"<s>\"," FLAGS ",\"normalized\":false,\"special\":true}],"
                "\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"\\u2581\",\"prepend_scheme\":\"%s\",\"split\":false}",
                MODEL(SPM_VOCAB, SPM_MERGES, "\"unk_token\":\"<unk>\",")),
            cases[i].scheme);
        spurion_tokenizer *t = open_json(json);
        assert_ids(t, "ab", cases[i].start);
        assert_ids(t, "a<s>a", cases[i].after);
        spurion_tokenizer_close(t);
    }
}

static void test_tokenizer_normalises_as_library(void **state)
{
    (void)state;
    spurion_tokenizer *t =
        open_json(FILE_OF("\"normalizer\":{\"type\":\"NFC\"}",
                          MODEL("\"\\u00e9\":0,\"e\":1,\"\\u0301\":2,\"\\u0323\":3,\"\\u1eb9\":4,\"\\ud804\\udd38\":5,"
                                "\"\\ud806\\udd38\":6,\"\\ud806\\udd35\":7,\"\\ud806\\udd30\":8",
                                "", "")));
    assert_ids(t, "e\xcc\x81", "0");
    assert_ids(t, "e\xcc\x81\xcc\xa3", "4 2");                /* marks in order of their classes */
    assert_ids(t, "\xf0\x91\xa4\xb5\xf0\x91\xa4\xb0", "7 8"); /* composes since Unicode 13, not in the library */
    spurion_tokenizer_close(t);
    t = open_json(FILE_OF("\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFKD\"},{\"type\":\"Lowercase\"},"
                          "{\"type\":\"Strip\",\"strip_left\":true,\"strip_right\":true},{\"type\":\"Replace\",\"pattern\":{"
                          "\"Regex\":\"x+\"},\"content\":\"y\"}]}",
                          MODEL("\"f\":0,\"i\":1,\"\\u0307\":2,\" \":3,\"y\":4", "", "")));
    assert_ids(t, " \xef\xac\x81 xx\xc4\xb0\xe3\x80\x80", "0 1 3 4 1 2"); /* U+FB01; U+0130 loses its dot to a mark */
    spurion_tokenizer_close(t);
}

static void test_tokenizer_reports_leading_and_trailing_ids(void **state)
{
    (void)state;
    spurion_tokenizer *t = open_json(FILE_OF(
        "\"truncation\":{\"max_length\":1},\"padding\":{\"strategy\":{\"Fixed\":128}},\"pre_tokenizer\":" BYTE_LEVEL
        ",\"post_processor\":{\"type\":\"Sequence\",\"processors\":[" BYTE_LEVEL ",{\"type\":\"TemplateProcessing\",\"single\":["
        "{\"SpecialToken\":{\"id\":\"x\",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\",\"type_id\":0}},{\"SpecialToken\":{\"id\":"
        "\"y\",\"type_id\":0}}],\"pair\":[],"
        "\"special_tokens\":{\"x\":{\"id\":\"x\",\"ids\":[3,4],\"tokens\":[\"d\",\"e\"]},\"y\":{\"id\":\"y\",\"ids\":[5],"
        "\"tokens\":[\"s\"]}}},"
        "{\"type\":\"RobertaProcessing\",\"sep\":[\"</"
        "s>\",2],\"cls\":[\"<s>\",1],\"trim_offsets\":true,\"add_prefix_space\":false}]}",
        MODEL(LETTERS, "", "")));
    int count;
    const int32_t *ids = spurion_tokenizer_leading(t, &count);
    assert_int_equal(count, 3);
    assert_int_equal(ids[0], 1);
    assert_int_equal(ids[1], 3);
    assert_int_equal(ids[2], 4);
    ids = spurion_tokenizer_trailing(t, &count);
    assert_int_equal(count, 2);
    assert_int_equal(ids[0], 5);
    assert_int_equal(ids[1], 2);
    assert_ids(t, "abc", "0 1 2"); /* neither cut nor padded */
    spurion_tokenizer_close(t);
}

static void test_tokenizer_decodes_byte_level_tokens(void **state)
{
    (void)state;
    spurion_tokenizer *t =
        open_json(FILE_OF("\"pre_tokenizer\":" BYTE_LEVEL, MODEL(LETTERS ",\"\\u0120a\":20", "\"\\u0120 a\"", "")));
    const char *text;
    size_t bytes;
    assert_int_equal(spurion_tokenizer_token_bytes(&text, &bytes, t, 20).code, SPURION_OK);
    assert_string_equal(text, " a");
    assert_int_equal(spurion_tokenizer_token_bytes(&text, &bytes, t, 17).code, SPURION_OK);
    assert_int_equal(bytes, 1);
    assert_int_equal(text[0], 0);
    assert_int_equal(spurion_tokenizer_token_bytes(&text, &bytes, t, 16).code,
                     SPURION_OK); /* U+0122: the first byte of the second range, 0x7f + 1 - .. */
    assert_int_equal(bytes, 1);
    assert_int_equal((unsigned char)text[0], 0x80);
    spurion_tokenizer_close(t);
}

static void test_tokenizer_refuses_text_that_is_not_utf8(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        size_t bytes, at;
    } cases[] = {
        {"ab\xff", 3, 2}, {"a\xc0\x80", 3, 1}, {"\xed\xa0\x80", 3, 0}, {"\xf4\x90\x80\x80", 4, 0}, {"abcdefghij\xe2\x82", 12, 10},
        {"\x80", 1, 0}};
    spurion_tokenizer *t = open_json(FILE_OF("\"pre_tokenizer\":" BYTE_LEVEL, MODEL(LETTERS, "", "")));
    spurion_ids ids = {0};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char place[64];
        spurion_status st;
        assert_int_equal(spurion_tokenizer_encode(&ids, t, "a", 1).code, SPURION_OK);
        st = spurion_tokenizer_encode(&ids, t, cases[i].text, cases[i].bytes);
        assert_int_equal(st.code, SPURION_INVALID_ARGUMENT);
        (void)snprintf(place, sizeof place, "expected UTF-8, found byte 0x%02x at byte %zu",
                       (unsigned char)cases[i].text[cases[i].at], cases[i].at);
        assert_string_equal(st.message, place);
        assert_int_equal(ids.count, i + 1); /* what was there stays */
    }
    spurion_ids_fini(&ids);
    spurion_tokenizer_close(t);
}

static void test_tokenizer_refuses_what_it_does_not_know_by_name(void **state)
{
    (void)state;
#define WITH(part) FILE_OF(part, MODEL("\"a\":0,\"b\":1,\"ab\":2", "\"a b\"", ""))
    assert_refused(WITH("\"normalizer\":{\"type\":\"Precompiled\"}"), SPURION_UNIMPLEMENTED, "found 'Precompiled'");
    assert_refused(WITH("\"pre_tokenizer\":{\"type\":\"BertPreTokenizer\"}"), SPURION_UNIMPLEMENTED, "found 'BertPreTokenizer'");
    assert_refused(WITH("\"post_processor\":{\"type\":\"Other\"}"), SPURION_UNIMPLEMENTED, "found 'Other'");
    assert_refused("{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", SPURION_UNIMPLEMENTED, "found 'Unigram'");
    assert_refused(
        WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(\"},\"behavior\":\"Isolated\",\"invert\":false}"),
        SPURION_INVALID_ARGUMENT, "expected a regex");
    assert_refused(WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\p{nonsense}\"},"
                        "\"behavior\":\"Isolated\",\"invert\":false}"),
                   SPURION_INVALID_ARGUMENT, "{nonsense}");
    assert_refused(
        WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"String\":\"\"},\"behavior\":\"Isolated\",\"invert\":false}"),
        SPURION_UNIMPLEMENTED, "at least one character");
    assert_refused(WITH("\"added_tokens\":[{\"id\":3,\"content\":\"x\"}]"), SPURION_INVALID_ARGUMENT, "added_tokens.single_word");
    assert_refused(FILE_OF("\"x\":0", MODEL("\"a\":0", "\"a b\"", "")), SPURION_INVALID_ARGUMENT, "merge 0");
    assert_refused(FILE_OF("\"x\":0", MODEL("\"a\":0", "", "\"dropout\":0.1,")), SPURION_INVALID_ARGUMENT, "model.dropout");
    assert_refused(FILE_OF("\"x\":0", MODEL("\"a\":-1", "", "")), SPURION_INVALID_ARGUMENT, "model.vocab");
    assert_refused("{\"version\":\"2.0\"}", SPURION_INVALID_ARGUMENT, "version");
    assert_refused("{\"version\":", SPURION_INVALID_ARGUMENT, "expected JSON");
    assert_refused("[]", SPURION_INVALID_ARGUMENT, "an object");
#undef WITH
}

/* "aaaa..." merges pairwise into runs. Counted, not timed: n bytes twice as long take about twice the steps (n log n allows 2.2). */
static void test_tokenizer_long_word_is_merged_in_linear_time(void **state)
{
    (void)state;
    const size_t most = 1u << 20;
    char *text = malloc(most);
    spurion_tokenizer *t =
        open_json(FILE_OF("\"pre_tokenizer\":null", MODEL("\"a\":0,\"aa\":1,\"aaaa\":2,\"b\":3", "\"a a\",\"aa aa\"", "")));
    uint64_t before = 0, steps = 0;

    assert_non_null(text);
    memset(text, 'a', most);
    for (size_t n = 1u << 14; n <= most; n *= 2, before = steps) {
        spurion_ids ids = {0};
        text[n - 1] = 'b';
        assert_int_equal(tok_encode(&ids, &steps, t, text, n).code, SPURION_OK);
        text[n - 1] = 'a';
        assert_int_equal(ids.count, n / 4 - 1 + 3); /* ..., aa, a, b */
        assert_int_equal(ids.data[0], 2);
        assert_int_equal(ids.data[ids.count - 3], 1);
        assert_int_equal(ids.data[ids.count - 2], 0);
        assert_int_equal(ids.data[ids.count - 1], 3);
        assert_true(steps > n && steps < 64 * n);
        assert_true(before == 0 || (double)steps < 2.2 * (double)before);
        spurion_ids_fini(&ids);
    }
    spurion_tokenizer_close(t);
    free(text);
}

static void test_tokenizer_long_runs_of_marks_are_sorted_in_linear_time(void **state)
{
    (void)state;
    size_t half = 1u << 18;
    char *text = malloc(4 * half);
    spurion_ids ids = {0};
    spurion_tokenizer *t = open_json(FILE_OF("\"normalizer\":{\"type\":\"NFD\"}", MODEL("\"\\u0301\":0,\"\\u0323\":1", "", "")));

    assert_non_null(text);
    for (size_t i = 0; i < 2 * half; i++) {
        memcpy(text + 2 * i, i < half ? "\xcc\x81" : "\xcc\xa3", 2);
    }
    assert_int_equal(spurion_tokenizer_encode(&ids, t, text, 4 * half).code, SPURION_OK);
    assert_int_equal(ids.count, 2 * half);
    assert_int_equal(ids.data[half - 1], 1);
    assert_int_equal(ids.data[half], 0);
    spurion_ids_fini(&ids);
    spurion_tokenizer_close(t);
    free(text);
}

static void test_tokenizer_opens_a_file_and_keeps_its_digest(void **state)
{
    (void)state;
    static const char json[] = "{\"model\":{\"vocab\":{\"a\":0},\"merges\":[]}}";
    static const uint8_t sha256[32] = {0xdc, 0x48, 0xb2, 0x78, 0xc4, 0xef, 0x8f, 0x87, 0x73, 0x40, 0x70,
                                       0xa7, 0x82, 0x39, 0xc5, 0x79, 0x83, 0x3f, 0x78, 0xe8, 0x45, 0x13,
                                       0x7f, 0xa7, 0x99, 0x43, 0x2b, 0xcf, 0x48, 0x62, 0x0a, 0x31};
    char path[] = "/tmp/spurion-test-tokenizer-XXXXXX";
    spurion_tokenizer *t = NULL;
    int f = mkstemp(path);

    assert_true(f >= 0);
    assert_int_equal(write(f, json, sizeof json - 1), sizeof json - 1);
    assert_int_equal(close(f), 0);
    assert_int_equal(spurion_tokenizer_open(&t, path).code, SPURION_OK);
    assert_memory_equal(spurion_tokenizer_digest(t), sha256, 32);
    assert_ids(t, "aa", "0 0");
    spurion_tokenizer_close(t);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(spurion_tokenizer_open(&t, path).code, SPURION_NOT_FOUND);
    assert_null(t);
    spurion_tokenizer_close(NULL);
    spurion_ids_fini(NULL);
}

typedef struct reader {
    const spurion_tokenizer *t;
    int different;
} reader;

static void *read_often(void *context)
{
    static const char text[] = "AbA abab Ab \xc3\xa9 b";
    reader *r = context;
    spurion_ids first = {0}, ids = {0};

    r->different += spurion_tokenizer_encode(&first, r->t, text, sizeof text - 1).code != SPURION_OK || first.count == 0;
    for (int i = 0; i < 300; i++) {
        ids.count = 0;
        r->different += spurion_tokenizer_encode(&ids, r->t, text, sizeof text - 1).code != SPURION_OK ||
                        ids.count != first.count || memcmp(ids.data, first.data, ids.count * sizeof *ids.data) != 0;
    }
    spurion_ids_fini(&first);
    spurion_ids_fini(&ids);
    return NULL;
}

/* What ThreadSanitizer watches: one tokenizer, with a regex of Oniguruma's and a normaliser, read by four threads. */
static void test_tokenizer_is_read_by_many_threads(void **state)
{
    (void)state;
    spurion_tokenizer *t =
        open_json(FILE_OF("\"normalizer\":{\"type\":\"NFD\"},\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\p{"
                          "Lu}\\\\p{Ll}*| b\"},\"behavior\":\"Isolated\",\"invert\":false}",
                          MODEL("\"A\":0,\"b\":1,\"Ab\":2,\"a\":3,\"e\":4,\" \":5,\"ab\":6", "\"A b\",\"a b\"", "")));
    pthread_t threads[4];
    reader readers[4];

    for (int i = 0; i < 4; i++) {
        readers[i] = (reader){.t = t};
        assert_int_equal(pthread_create(&threads[i], NULL, read_often, &readers[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
        assert_int_equal(readers[i].different, 0);
    }
    spurion_tokenizer_close(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tokenizer_merges_in_order_of_rank),
        cmocka_unit_test(test_tokenizer_merges_by_what_they_make),
        cmocka_unit_test(test_tokenizer_splits_as_gpt2),
        cmocka_unit_test(test_tokenizer_splits_as_llama3),
        cmocka_unit_test(test_tokenizer_regex_by_oniguruma_follows_library_unicode),
        cmocka_unit_test(test_tokenizer_added_tokens_swallow_spaces_and_keep_words),
        cmocka_unit_test(test_tokenizer_sentencepiece_falls_back_to_bytes),
        cmocka_unit_test(test_tokenizer_metaspace_prepends_by_scheme),
        cmocka_unit_test(test_tokenizer_normalises_as_library),
        cmocka_unit_test(test_tokenizer_reports_leading_and_trailing_ids),
        cmocka_unit_test(test_tokenizer_decodes_byte_level_tokens),
        cmocka_unit_test(test_tokenizer_refuses_text_that_is_not_utf8),
        cmocka_unit_test(test_tokenizer_refuses_what_it_does_not_know_by_name),
        cmocka_unit_test(test_tokenizer_long_word_is_merged_in_linear_time),
        cmocka_unit_test(test_tokenizer_long_runs_of_marks_are_sorted_in_linear_time),
        cmocka_unit_test(test_tokenizer_is_read_by_many_threads),
        cmocka_unit_test(test_tokenizer_opens_a_file_and_keeps_its_digest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

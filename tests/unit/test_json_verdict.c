/* Verdicts as text: floats read back bit for bit, strings are always JSON, fields stand in the contract's order. */
#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "spurion/json.h"

static spurion_bytes bytes(const char *text)
{
    return (spurion_bytes){text, strlen(text)};
}

static void expect_float(float value, const char *text)
{
    spurion_text t = {NULL, 0, 0, false};
    spurion_json_put_float(&t, value);
    assert_string_equal(t.data, text);
    spurion_text_fini(&t);
}

static void test_json_verdict_floats_read_back_bit_for_bit(void **state)
{
    uint32_t seed = 88675123;

    (void)state;
    print_message("seed %u\n", seed);
    for (int i = 0; i < 200000; i++) {
        uint32_t bits;
        float value, again;
        spurion_text t = {NULL, 0, 0, false};
        json_t *number;

        seed = seed * 1664525u + 1013904223u;
        bits = seed ^ seed >> 13;
        memcpy(&value, &bits, sizeof value);
        if (!isfinite(value)) {
            continue;
        }
        spurion_json_put_float(&t, value);
        assert_true(t.size <= 16);
        again = strtof(t.data, NULL); /* a reader in float32 */
        assert_memory_equal(&again, &value, sizeof value);
        number = json_loadb(t.data, t.size, JSON_DECODE_ANY, NULL); /* a reader in float64 that rounds afterwards */
        assert_true(json_is_real(number));
        again = (float)json_real_value(number);
        assert_memory_equal(&again, &value, sizeof value);
        json_decref(number);
        spurion_text_fini(&t);
    }
}

static void test_json_verdict_floats_are_short_and_never_none(void **state)
{
    (void)state;
    expect_float(0.1f, "0.1");
    expect_float(-0.82f, "-0.82");
    expect_float(1.0f / 3.0f, "0.33333334");
    expect_float(5.0f, "5.0");
    expect_float(0.0f, "0.0");
    expect_float(-0.0f, "-0.0");
    expect_float(16777216.0f, "16777216.0");
    expect_float(1e20f, "1e+20");
    expect_float(NAN, "null");
    expect_float(INFINITY, "null");
    expect_float(-INFINITY, "null");
}

static void expect_json(const char *data, size_t size, const char *text)
{
    spurion_text t = {NULL, 0, 0, false};
    spurion_json_put_string(&t, (spurion_bytes){data, size});
    assert_string_equal(t.data, text);
    spurion_text_fini(&t);
}

static void test_json_verdict_strings_are_always_json(void **state)
{
    uint32_t seed = 5;

    (void)state;
    expect_json("a\"\\\n\x01\x7f", 6, "\"a\\\"\\\\\\n\\u0001\\u007f\"");
    expect_json("a\0b", 3, "\"a\\u0000b\"");
    expect_json(NULL, 0, "null");
    expect_json("", 0, "\"\"");
    expect_json("\xc3\xa9\xf0\x9f\x98\x80", 6, "\"\xc3\xa9\xf0\x9f\x98\x80\"");
    expect_json("\xff", 1, "\"\xef\xbf\xbd\"");
    expect_json("\xf0\x9f\x98", 3, "\"\xef\xbf\xbd\"");                 /* the beginning of one character: one mark */
    expect_json("\xe2\x80" "a\x80", 4, "\"\xef\xbf\xbd" "a\xef\xbf\xbd\"");
    expect_json("\xed\xa0\x80", 3, "\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\""); /* a surrogate: no beginning of anything */
    expect_json("\xc0\xaf", 2, "\"\xef\xbf\xbd\xef\xbf\xbd\"");
    for (int i = 0; i < 20000; i++) {
        char data[12];
        spurion_text t = {NULL, 0, 0, false};
        json_t *string;

        for (size_t k = 0; k < sizeof data; k++) {
            seed = seed * 1664525u + 1013904223u;
            data[k] = (char)(seed >> 24);
        }
        spurion_json_put_string(&t, (spurion_bytes){data, sizeof data});
        string = json_loadb(t.data, t.size, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
        assert_true(json_is_string(string));
        json_decref(string);
        spurion_text_fini(&t);
    }
}

static void expect_verdict(const spurion_verdict *v, const spurion_json_names *names, const char *text)
{
    spurion_text t = {NULL, 0, 0, false};
    json_t *tree;

    spurion_json_verdict(&t, v, names);
    assert_string_equal(t.data, text);
    tree = json_loadb(t.data, t.size, JSON_REJECT_DUPLICATES, NULL);
    assert_non_null(tree);
    json_decref(tree);
    spurion_text_fini(&t);
}

static void test_json_verdict_writes_every_field_in_order(void **state)
{
    const spurion_sae_summary saes[] = {{.sae = bytes("mid"),
                                         .attribution_sum = {true, 1.1f},
                                         .error_attribution = {true, 0.2f},
                                         .bias_attribution = {true, -0.3f},
                                         .l0_mean = {true, 31.2f}}};
    const spurion_family_effect families[] = {{bytes("thanks"), -0.82f}};
    const spurion_feature_ref refs[] = {{bytes("mid"), 517}, {bytes("mid"), 518}};
    const spurion_flag flags[] = {{bytes("any-flip"), -0.82f, refs, 2}};
    const spurion_bytes names[] = {bytes("thanks"), bytes("form")};
    const spurion_feature features[] = {
        {refs[0], bytes("closing thanks"), {NULL, 0}, names, 2, bytes("spurious"), {true, 0.79f}, {false, 0}, 4.1f, 9.9f, 208},
        {{bytes("mid"), 9}, {NULL, 0}, bytes("polite \"endings\""), NULL, 0, bytes("unknown"), {false, 0}, {true, 0.5f}, 1, 2, 3}};
    const spurion_verdict v = {.run = bytes("r1"), .group = bytes("g7"), .id = bytes("g7-3"), .has_step = true, .step = 12,
                               .reward = 1.2345678f, .counterfactual_reward = 0.41f, .effect = -0.82f, .effect_sd = {false, 7},
                               .advantage = {true, 0.7f}, .counterfactual_advantage = {true, -0.1f}, .advantage_flip = true,
                               .scored_position = 211, .token_count = 212, .saes = saes, .sae_count = 1, .families = families,
                               .family_count = 1, .flags = flags, .flag_count = 1, .features = features, .feature_count = 2,
                               .action = SPURION_ACTION_DROP, .action_rule = bytes("any-flip"), .action_reward = 1.2345678f,
                               .provenance = "9f31c20000000000",
                               .warnings = SPURION_WARN_PAD_SCORED | SPURION_WARN_GROUP_SPLIT | SPURION_WARN_BOUNDARY};

    (void)state;
    expect_verdict(&v, NULL,
                   "{\"run\":\"r1\",\"step\":12,\"group\":\"g7\",\"id\":\"g7-3\",\"reward\":1.2345678,\"counterfactual_reward\":0.41,"
                   "\"effect\":-0.82,\"effect_sd\":null,\"advantage\":0.7,\"counterfactual_advantage\":-0.1,\"advantage_flip\":true,"
                   "\"scored_position\":211,\"token_count\":212,\"truncated\":false,"
                   "\"saes\":[{\"sae\":\"mid\",\"attribution_sum\":1.1,\"error_attribution\":0.2,\"bias_attribution\":-0.3,"
                   "\"baseline_reward\":null,\"residual\":null,\"l0_mean\":31.2}],"
                   "\"families\":[{\"family\":\"thanks\",\"effect\":-0.82}],"
                   "\"flags\":[{\"rule\":\"any-flip\",\"effect\":-0.82,\"features\":[{\"sae\":\"mid\",\"index\":517},{\"sae\":\"mid\",\"index\":518}]}],"
                   "\"action\":{\"name\":\"drop\",\"rule\":\"any-flip\",\"reward\":1.2345678,\"weight\":0.0,\"advantage\":null},"
                   "\"provenance\":\"9f31c20000000000\","
                   "\"features\":[{\"sae\":\"mid\",\"index\":517,\"label\":\"closing thanks\",\"families\":[\"thanks\",\"form\"],"
                   "\"verdict\":\"spurious\",\"attribution\":0.79,\"ablation_effect\":null,\"activation_max\":4.1,\"activation_sum\":9.9,"
                   "\"peak_position\":208},{\"sae\":\"mid\",\"index\":9,\"label\":null,\"explanation\":\"polite \\\"endings\\\"\",\"families\":[],\"verdict\":\"unknown\","
                   "\"attribution\":null,\"ablation_effect\":0.5,\"activation_max\":1.0,\"activation_sum\":2.0,\"peak_position\":3}],"
                   "\"warnings\":[\"boundary\",\"group_split\",\"pad_scored\"]}");
}

static void test_json_verdict_writes_tokens(void **state)
{
    const spurion_sae_summary saes[] = {{.sae = bytes("a")}, {.sae = bytes("b")}};
    const spurion_flag flags[] = {{bytes("r"), 1, NULL, 0}};
    const int32_t position[] = {4, 5}, id[] = {7, 8};
    const spurion_bytes text[] = {bytes(" x"), {"\xe2\x80", 2}};
    const float attribution[] = {1, 2, 3, 4}, flagged[] = {0.5f, 0, 0, 0.25f};
    spurion_tokens tokens = {2, position, id, text, 2, attribution, 1, flagged};
    spurion_verdict v = {.run = bytes("r"), .group = bytes("g"), .id = bytes("i"), .has_step = true, .scored_position = -1, .saes = saes,
                         .sae_count = 2, .flags = flags, .flag_count = 1, .tokens = &tokens, .provenance = "0"};
    spurion_text t = {NULL, 0, 0, false};

    (void)state;
    spurion_json_verdict(&t, &v, NULL);
    assert_non_null(strstr(t.data, "\"advantage_flip\":null,\"scored_position\":null"));
    assert_non_null(strstr(t.data, "\"warnings\":[],\"tokens\":{\"position\":[4,5],\"id\":[7,8],\"text\":[\" x\",\"\xef\xbf\xbd\"],"
                                   "\"attribution\":{\"a\":[1.0,2.0],\"b\":[3.0,4.0]},"
                                   "\"flagged\":{\"r\":{\"a\":[0.5,0.0],\"b\":[0.0,0.25]}}}}"));
    spurion_text_fini(&t);
    tokens.attribution = tokens.flagged = NULL;
    spurion_json_verdict(&t, &v, NULL);
    assert_non_null(strstr(t.data, "\"attribution\":{\"a\":null,\"b\":null},\"flagged\":{\"r\":{\"a\":null,\"b\":null}}}}"));
    spurion_text_fini(&t);
}

static void test_json_verdict_writes_refusals(void **state)
{
    const spurion_json_names names = {bytes("\"r\""), bytes("\"12\""), {NULL, 0}, bytes("[1, 2]")};
    const spurion_verdict known = {.run = bytes("r"), .group = bytes("g"), .id = bytes("i"), .has_step = true, .step = 3, .attempt = 2,
                                   .code = SPURION_OUT_OF_RANGE, .message = bytes("expected \"less\"")};
    const spurion_verdict unknown = {.code = SPURION_INVALID_ARGUMENT, .message = bytes("step")};
    const spurion_verdict line = {.line = 10, .code = SPURION_INVALID_ARGUMENT, .message = bytes("no object")};

    (void)state;
    expect_verdict(&known, NULL, "{\"run\":\"r\",\"step\":3,\"group\":\"g\",\"id\":\"i\",\"attempt\":2,"
                                 "\"error\":{\"code\":\"OUT_OF_RANGE\",\"message\":\"expected \\\"less\\\"\"}}");
    expect_verdict(&unknown, &names, "{\"run\":\"r\",\"step\":\"12\",\"group\":null,\"id\":[1, 2],"
                                     "\"error\":{\"code\":\"INVALID_ARGUMENT\",\"message\":\"step\"}}");
    expect_verdict(&line, NULL, "{\"line\":10,\"error\":{\"code\":\"INVALID_ARGUMENT\",\"message\":\"no object\"}}");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_json_verdict_floats_read_back_bit_for_bit), cmocka_unit_test(test_json_verdict_floats_are_short_and_never_none),
        cmocka_unit_test(test_json_verdict_strings_are_always_json),      cmocka_unit_test(test_json_verdict_writes_every_field_in_order),
        cmocka_unit_test(test_json_verdict_writes_tokens),                cmocka_unit_test(test_json_verdict_writes_refusals),
    };
    return cmocka_run_group_tests_name("json_verdict", tests, NULL, NULL);
}

/* config.json: what each family says, in the spellings of transformers 4 and 5, and what is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>

#include "daemon/model/config.h"
#include "tests/unit/checkpoint_place.h"

typedef struct fixture {
    place p;
    spurion_model_config c;
} fixture;

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof *f);

    place_make(&f->p);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;

    place_drop(&f->p);
    free(f);
    return 0;
}

static const spurion_model_config *good(fixture *f, const char *json)
{
    spurion_status st;

    place_text(&f->p, "config.json", json);
    st = spurion_model_config_read(&f->c, f->p.dir);
    if (st.code != SPURION_OK) {
        fail_msg("%s: %s", json, st.message);
    }
    return &f->c;
}

static void bad(fixture *f, const char *json, int code, const char *text)
{
    spurion_status st;

    place_text(&f->p, "config.json", json);
    st = spurion_model_config_read(&f->c, f->p.dir);
    if (st.code != code || strstr(st.message, text) == NULL) {
        fail_msg("%s: expected %d and \"%s\", found %d and \"%s\"", json, code, text, st.code, st.message);
    }
}

#define SIZES "\"hidden_size\":48,\"num_hidden_layers\":3,\"num_attention_heads\":4,\"vocab_size\":100,\"max_position_embeddings\":64,\"intermediate_size\":80"
#define LLAMA(more) "{\"architectures\":[\"LlamaForSequenceClassification\"],\"model_type\":\"llama\"," SIZES more "}"
#define FAMILY(name, more) "{\"architectures\":[\"" name "ForSequenceClassification\"]," SIZES more "}"
#define GPTJ(more) "{\"architectures\":[\"GPTJForSequenceClassification\"],\"n_embd\":48,\"n_layer\":2,\"n_head\":3,\"n_positions\":32,\"vocab_size\":60000,\"rotary_dim\":8" more "}"

static void test_model_config_defaults_are_the_classes_own(void **state)
{
    const spurion_model_config *c = good(*state, LLAMA(""));

    assert_int_equal(c->kv_heads, 4);
    assert_int_equal(c->head_dim, 12);
    assert_int_equal(c->rot, 12);
    assert_true(c->rope_theta == 10000 && c->rope_scaling == SPURION_ROPE_PLAIN && c->eps == 1e-6f && c->act == SPURION_ACT_SILU);
    assert_true(c->gated && !c->bias_q && !c->bias_o && !c->bias_mlp && c->outputs == 1 && !c->head.bias && c->embed_scale == 1);
    assert_true(c->bos == 1 && c->eos_count == 1 && c->eos[0] == 2 && c->pad == -1);
    c = good(*state, GPTJ(""));
    assert_true(c->parallel && c->shared_norm && c->norm == SPURION_NORM_LAYER && c->rope == SPURION_ROPE_INTERLEAVED && c->rot == 8);
    assert_true(c->ff == 192 && c->act == SPURION_ACT_GELU_TANH && c->bias_mlp && !c->bias_q && c->bos == 50256);
    c = good(*state, FAMILY("GPTNeoX", ",\"head_dim\":16"));
    assert_true(c->parallel && !c->shared_norm && c->rot == 4 && c->act == SPURION_ACT_GELU_ERF && c->bias_q && c->bias_o && c->bias_mlp);
    c = good(*state, FAMILY("GPTNeoX", ",\"head_dim\":16,\"use_parallel_residual\":false,\"attention_bias\":false"));
    assert_true(!c->parallel && !c->bias_q && !c->bias_o && c->bias_mlp);
}

static void test_model_config_rotary_share_must_be_even(void **state)
{
    bad(*state, FAMILY("GPTNeoX", ",\"rotary_pct\":0.25"), SPURION_INVALID_ARGUMENT, "expected an even number from 2 to head_dim (12), found 3");
    assert_int_equal(good(*state, FAMILY("GPTNeoX", ",\"rotary_pct\":0.5"))->rot, 6);
    bad(*state, "{\"architectures\":[\"GPTJForSequenceClassification\"],\"n_embd\":48,\"n_layer\":2,\"n_head\":3,\"n_positions\":32,"
                "\"vocab_size\":9,\"rotary_dim\":null}", SPURION_INVALID_ARGUMENT, "rotary_dim: expected an even number, found null");
    bad(*state, "{\"architectures\":[\"GPTJForSequenceClassification\"],\"n_embd\":48,\"n_layer\":2,\"n_head\":3,\"n_positions\":32,"
                "\"vocab_size\":9}", SPURION_INVALID_ARGUMENT, "from 2 to head_dim (16), found 64");
}

static void test_model_config_rope_of_both_versions(void **state)
{
    static const char *const forms[] = {
        LLAMA(",\"rope_theta\":5e5,\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,"
              "\"original_max_position_embeddings\":32}"),
        LLAMA(",\"rope_parameters\":{\"rope_theta\":5e5,\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,"
              "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":32}"),
        LLAMA(",\"rope_parameters\":{\"full_attention\":{\"rope_theta\":5e5,\"rope_type\":\"llama3\",\"factor\":8.0,"
              "\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,\"original_max_position_embeddings\":32}}")};

    for (int i = 0; i < 3; i++) {
        const spurion_model_config *c = good(*state, forms[i]);

        assert_true(c->rope_theta == 5e5 && c->rope_scaling == SPURION_ROPE_LLAMA3 && c->rope_factor == 8 && c->rope_low == 1 &&
                    c->rope_high == 4 && c->rope_original == 32);
    }
    bad(*state, LLAMA(",\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2}"), SPURION_UNIMPLEMENTED, "expected default, linear or llama3, found \"yarn\"");
    bad(*state, LLAMA(",\"rope_scaling\":{\"type\":\"linear\"}"), SPURION_INVALID_ARGUMENT, "factor: expected numbers, found nothing");
    bad(*state, LLAMA(",\"rope_parameters\":{\"a\":{\"rope_theta\":1},\"b\":{\"rope_theta\":2}}"), SPURION_UNIMPLEMENTED, "the same for every layer type");
    bad(*state, LLAMA(",\"partial_rotary_factor\":0.5"), SPURION_UNIMPLEMENTED, "partial_rotary_factor: expected 1");
    bad(*state, LLAMA(",\"rope_theta\":-1"), SPURION_INVALID_ARGUMENT, "rope_theta");
}

static void test_model_config_windows(void **state)
{
    const spurion_model_config *c = good(*state, FAMILY("Mistral", ",\"sliding_window\":7"));

    assert_true(c->window[0] == 7 && c->window[2] == 7);
    assert_int_equal(good(*state, FAMILY("Mistral", ",\"sliding_window\":null"))->window[1], 0);
    assert_int_equal(good(*state, FAMILY("Mistral", ""))->window[1], 4096);
    c = good(*state, FAMILY("Qwen2", ",\"sliding_window\":7,\"use_sliding_window\":true,\"max_window_layers\":2"));
    assert_true(c->window[1] == 0 && c->window[2] == 7 && c->bias_q && c->bias_kv && !c->bias_o);
    c = good(*state, FAMILY("Qwen2", ",\"sliding_window\":7,\"use_sliding_window\":false,\"max_window_layers\":0"));
    assert_int_equal(c->window[2], 0);
    c = good(*state, FAMILY("Qwen3", ",\"sliding_window\":7,\"use_sliding_window\":true,\"layer_types\":[\"sliding_attention\","
                                     "\"full_attention\",\"full_attention\"],\"max_window_layers\":0"));
    assert_true(c->window[0] == 7 && c->window[1] == 0 && c->qk_norm);
    c = good(*state, FAMILY("Gemma2", ",\"sliding_window\":9"));
    assert_true(c->window[0] == 9 && c->window[1] == 0 && c->window[2] == 9 && c->softcap == 50 && c->post_norms && c->norm_plus_one);
    assert_true(fabsf(c->attention_scale[0] - 0.0625f) < 1e-8f);
    bad(*state, FAMILY("Gemma2", ",\"layer_types\":[\"full_attention\"]"), SPURION_INVALID_ARGUMENT, "expected a list of 3, found a list of 1");
    bad(*state, FAMILY("Gemma2", ",\"layer_types\":[\"full_attention\",\"chunked\",1]"), SPURION_INVALID_ARGUMENT, "found \"chunked\"");
    bad(*state, FAMILY("Mistral", ",\"sliding_window\":7,\"layer_types\":[\"full_attention\",\"full_attention\",\"full_attention\"]"),
        SPURION_UNIMPLEMENTED, "layer_types");
    assert_true(good(*state, FAMILY("Gemma2", ",\"attn_logit_softcapping\":null"))->softcap == 0);
}

/* sqrt(2304) is 48 everywhere; sqrt(48) = 6.9282 is 6.9375 in bf16 and 6.9297 in f16. */
static void test_model_config_embedding_scale_is_rounded_as_the_checkpoint(void **state)
{
    assert_true(good(*state, FAMILY("Gemma2", ",\"dtype\":\"bfloat16\""))->embed_scale == (float)sqrt(48)); /* rounded at load */
    assert_true(good(*state, FAMILY("Gemma2", ""))->embed_scale == (float)sqrt(48));
}

static void test_model_config_ids(void **state)
{
    const spurion_model_config *c = good(*state, LLAMA(",\"eos_token_id\":[3,5],\"bos_token_id\":null,\"pad_token_id\":9"));

    assert_true(c->eos_count == 2 && c->eos[0] == 3 && c->eos[1] == 5 && c->bos == -1 && c->pad == 9);
    assert_int_equal(good(*state, LLAMA(",\"eos_token_id\":null"))->eos_count, 0);
    bad(*state, LLAMA(",\"eos_token_id\":[1,2,3,4,5,6,7,8,9]"), SPURION_INVALID_ARGUMENT, "at most 8 ids");
    bad(*state, LLAMA(",\"eos_token_id\":[\"x\"]"), SPURION_INVALID_ARGUMENT, "found \"x\"");
    bad(*state, LLAMA(",\"bos_token_id\":1.5"), SPURION_INVALID_ARGUMENT, "found 1.5");
}

static void test_model_config_heads(void **state)
{
    const spurion_model_config *c = good(*state, LLAMA(",\"id2label\":{\"0\":\"a\",\"1\":\"b\"}"));

    assert_int_equal(c->outputs, 2);
    assert_int_equal(good(*state, LLAMA(",\"num_labels\":3"))->outputs, 3);
    c = good(*state, LLAMA(",\"normalize_reward\":true,\"mean\":-0.5,\"std\":2"));
    assert_true(c->head.mean == -0.5 && c->head.std == 2 && !c->head.centre);
    c = good(*state, LLAMA(",\"mean\":-0.5,\"std\":2,\"do_normalize\":true,\"pooling\":\"mean\""));
    assert_true(c->head.mean == 0 && c->head.std == 1 && c->head.centre && c->head.rescale);
    assert_true(c->pooling == SPURION_POOL_MEAN && c->pooling_said);
    bad(*state, LLAMA(",\"pooling\":\"max\""), SPURION_INVALID_ARGUMENT, "expected last or mean");
    bad(*state, LLAMA(",\"do_normalize\":true,\"normalize_function\":\"x\""), SPURION_INVALID_ARGUMENT, "expected affine, scale");
    bad(*state, LLAMA(",\"normalize_reward\":true,\"std\":0"), SPURION_INVALID_ARGUMENT, "std: expected above 0");
    bad(*state, LLAMA(",\"value_head_prefix\":\"\""), SPURION_INVALID_ARGUMENT, "value_head_prefix");
}

static void test_model_config_refusals_say_expected_and_found(void **state)
{
    fixture *f = *state;
    const int wrong = SPURION_INVALID_ARGUMENT, other = SPURION_UNIMPLEMENTED;

    bad(f, "", wrong, "expected JSON");
    bad(f, "[]", wrong, "expected an object, found a list of 0");
    bad(f, "{\"a\":1,\"a\":2}", wrong, "duplicate");
    bad(f, "{\"a\":NaN}", wrong, "expected JSON");
    bad(f, "{}", wrong, "architectures: expected a list that begins with a name, found nothing");
    bad(f, "{\"architectures\":\"Llama\"}", wrong, "found \"Llama\"");
    bad(f, "{\"architectures\":[\"LlamaForCausalLM\"]}", other, "found \"LlamaForCausalLM\"");
    bad(f, "{\"architectures\":[\"BertForSequenceClassification\"]}", other, "expected one of GPT2ForSequenceClassification, GPTJ");
    bad(f, "{\"architectures\":[\"RewardModel\"],\"model_type\":\"phi\"}", other, "found \"RewardModel\"");
    bad(f, LLAMA(",\"quantization_config\":{}"), other, "quantization_config: expected none");
    bad(f, LLAMA(",\"hidden_act\":\"mish\""), other, "found \"mish\"");
    bad(f, LLAMA(",\"num_key_value_heads\":3"), wrong, "expected a divisor of num_attention_heads (4), found 3");
    bad(f, LLAMA(",\"rms_norm_eps\":\"x\""), wrong, "found \"x\"");
    bad(f, LLAMA(",\"attention_bias\":1"), wrong, "attention_bias: expected true or false, found 1");
    bad(f, "{\"architectures\":[\"LlamaForSequenceClassification\"]}", wrong, "hidden_size|n_embd: expected an integer from 1 to 1048576, found nothing");
    bad(f, "{\"architectures\":[\"LlamaForSequenceClassification\"],\"hidden_size\":1e3}", wrong, "found 1000");
    bad(f, FAMILY("Gemma2", ",\"use_bidirectional_attention\":true"), other, "use_bidirectional_attention");
    bad(f, GPTJ(",\"add_cross_attention\":true"), other, "add_cross_attention");
    bad(f, "{\"architectures\":[\"GPTJForSequenceClassification\"],\"n_embd\":50,\"n_layer\":2,\"n_head\":3,\"n_positions\":32,\"vocab_size\":9}",
        wrong, "expected a multiple of num_attention_heads (3), found 50");
    bad(f, "{\"architectures\":[\"GPTJForSequenceClassification\"],\"n_embd\":48,\"n_layer\":257,\"n_head\":3,\"n_positions\":32,\"vocab_size\":9}",
        wrong, "expected an integer from 1 to 256, found 257");
    unlink(strcat(strcpy((char[512]){0}, f->p.dir), "/config.json"));
    assert_int_equal(spurion_model_config_read(&f->c, f->p.dir).code, SPURION_NOT_FOUND);
}

/* float32 steps of transformers, redone here for one pair of numbers: theta 500000, rot 8, llama3 (8, 1, 4, 32). */
static void test_model_config_rope_table(void **state)
{
    const spurion_model_config *c = good(*state, LLAMA(",\"head_dim\":8,\"rope_theta\":5e5,\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,"
                                                       "\"low_freq_factor\":1,\"high_freq_factor\":4,\"original_max_position_embeddings\":32}"));
    float table[50 * 4 * 2];
    double wave0 = 2 * M_PI, f1 = pow(5e5, -0.25), f3 = pow(5e5, -0.75);

    spurion_model_rope_table(table, c, 50);
    for (int k = 0; k < 4; k++) {
        assert_true(table[2 * k] == 1 && table[2 * k + 1] == 0);
    }
    assert_true(wave0 < 8 && fabs(table[49 * 8 + 0] - cos(49)) < 1e-6);                     /* short waves stay */
    assert_true(2 * M_PI / f1 > 32 && fabs(table[49 * 8 + 3] - sin(49 * f1 / 8)) < 1e-6);   /* long ones are stretched */
    assert_true(fabs(table[49 * 8 + 7] - sin(49 * f3 / 8)) < 1e-7);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_model_config_defaults_are_the_classes_own, setup, teardown),
        cmocka_unit_test_setup_teardown(test_model_config_rotary_share_must_be_even, setup, teardown),
        cmocka_unit_test_setup_teardown(test_model_config_rope_of_both_versions, setup, teardown),
        cmocka_unit_test_setup_teardown(test_model_config_windows, setup, teardown),
        cmocka_unit_test_setup_teardown(test_model_config_embedding_scale_is_rounded_as_the_checkpoint, setup, teardown),
        cmocka_unit_test_setup_teardown(test_model_config_ids, setup, teardown),
        cmocka_unit_test_setup_teardown(test_model_config_heads, setup, teardown),
        cmocka_unit_test_setup_teardown(test_model_config_refusals_say_expected_and_found, setup, teardown),
        cmocka_unit_test_setup_teardown(test_model_config_rope_table, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* A checkpoint's tensors by role: splits, transpositions, Gemma's 1, and what is refused. Values are told by where they stand. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>

#include "daemon/base/sha256.h"
#include "daemon/model/weights.h"
#include "tests/unit/checkpoint_place.h"

typedef struct fixture {
    place p;
    bundle b;
    spurion_model_config c;
    spurion_weights *w;
} fixture;

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof *f);

    place_make(&f->p);
    bundle_start(&f->b);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;

    spurion_weights_close(f->w);
    place_drop(&f->p);
    free(f);
    return 0;
}

static spurion_status open_all(fixture *f)
{
    spurion_status st = spurion_model_config_read(&f->c, f->p.dir);

    if (st.code == SPURION_OK) {
        st = spurion_weights_open(&f->w, f->p.dir, &f->c);
    }
    return st;
}

static void good(fixture *f)
{
    spurion_status st = open_all(f);

    if (st.code != SPURION_OK) {
        fail_msg("%s", st.message);
    }
}

static void bad(fixture *f, int code, const char *text)
{
    spurion_status st = open_all(f);

    assert_null(f->w);
    if (st.code != code || strstr(st.message, text) == NULL) {
        fail_msg("expected %d and \"%s\", found %d and \"%s\"", code, text, st.code, st.message);
    }
}

#define D 8
#define HD 4
#define FF 6
#define V 10

static void read_into(float *x, fixture *f, spurion_role role, int layer, size_t elements)
{
    assert_true(spurion_weights_has(f->w, role, layer));
    assert_int_equal(spurion_weights_elements(f->w, role, layer), elements);
    assert_int_equal(spurion_weights_read(x, f->w, role, layer).code, SPURION_OK);
}

/* Two heads of width 4, one layer. Leaves the head out, and the layer norms' names as given. */
static void add_gptj(fixture *f)
{
    place_text(&f->p, "config.json", "{\"architectures\":[\"GPTJForSequenceClassification\"],\"n_embd\":8,\"n_layer\":1,\"n_head\":2,"
                                     "\"n_positions\":16,\"vocab_size\":10,\"rotary_dim\":4,\"n_inner\":6,\"id2label\":{\"0\":\"x\"}}");
    bundle_add(&f->b, "transformer.wte.weight", V, D, 0, 1);
    bundle_add(&f->b, "transformer.h.0.ln_1.weight", D, 0, 1, 0);
    bundle_add(&f->b, "transformer.h.0.ln_1.bias", D, 0, 2, 0);
    bundle_add(&f->b, "transformer.h.0.attn.q_proj.weight", D, D, 100, 1);
    bundle_add(&f->b, "transformer.h.0.attn.k_proj.weight", D, D, 200, 1);
    bundle_add(&f->b, "transformer.h.0.attn.v_proj.weight", D, D, 300, 1);
    bundle_add(&f->b, "transformer.h.0.attn.out_proj.weight", D, D, 400, 1);
    bundle_add(&f->b, "transformer.h.0.mlp.fc_in.weight", FF, D, 500, 1);
    bundle_add(&f->b, "transformer.h.0.mlp.fc_in.bias", FF, 0, 600, 1);
    bundle_add(&f->b, "transformer.h.0.mlp.fc_out.weight", D, FF, 700, 1);
    bundle_add(&f->b, "transformer.h.0.mlp.fc_out.bias", D, 0, 800, 1);
    bundle_add(&f->b, "transformer.ln_f.weight", D, 0, 900, 1);
    bundle_add(&f->b, "transformer.ln_f.bias", D, 0, 1000, 1);
}

static void test_weights_gptj_roles(void **state)
{
    fixture *f = *state;
    float x[V * D];
    unsigned char digest[32], again[32];

    add_gptj(f);
    bundle_add(&f->b, "score.weight", 1, D, 50, 1);
    bundle_add(&f->b, "transformer.h.0.attn.masked_bias", 1, 0, -1e9f, 0); /* a buffer, not a bias */
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    good(f);
    assert_int_equal(spurion_weights_vocab(f->w), V);
    read_into(x, f, SPURION_ROLE_Q, 0, D * D);
    assert_true(x[0] == 100 && x[D * D - 1] == 163);
    read_into(x, f, SPURION_ROLE_DOWN, 0, D * FF);
    assert_true(x[FF] == 706);
    read_into(x, f, SPURION_ROLE_SCORE, 0, D);
    assert_true(x[7] == 57);
    assert_false(spurion_weights_has(f->w, SPURION_ROLE_Q_B, 0));
    assert_false(spurion_weights_has(f->w, SPURION_ROLE_NORM2_W, 0));
    assert_false(spurion_weights_has(f->w, SPURION_ROLE_GATE, 0));
    assert_false(spurion_weights_has(f->w, SPURION_ROLE_POSITION, 0));
    assert_false(spurion_weights_has(f->w, SPURION_ROLE_Q, 1));
    assert_int_equal(spurion_weights_digest(digest, f->w).code, SPURION_OK);
    spurion_weights_close(f->w);
    f->w = NULL;
    f->b.data[0] += 1;
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    good(f);
    assert_int_equal(spurion_weights_digest(again, f->w).code, SPURION_OK);
    assert_memory_not_equal(digest, again, 32);
}

/* The digest is that of the data, made beside the reading; it may be asked for twice, and nobody need wait for it. */
static void test_weights_digest_beside_the_reading(void **state)
{
    fixture *f = *state;
    float x[V * D];
    unsigned char digest[32], want[32];
    spurion_sha256 h = {NULL};

    add_gptj(f);
    bundle_add(&f->b, "score.weight", 1, D, 50, 1);
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    assert_int_equal(spurion_sha256_init(&h).code, SPURION_OK);
    assert_int_equal(spurion_sha256_update(&h, f->b.data, f->b.count * sizeof(float)).code, SPURION_OK);
    assert_int_equal(spurion_sha256_finish(want, &h).code, SPURION_OK);
    spurion_sha256_fini(&h);
    good(f);
    assert_int_equal(spurion_weights_digest_begin(f->w).code, SPURION_OK);
    read_into(x, f, SPURION_ROLE_Q, 0, D * D);
    assert_true(x[0] == 100 && x[D * D - 1] == 163);
    for (int i = 0; i < 2; i++) {
        memset(digest, 0, sizeof digest);
        assert_int_equal(spurion_weights_digest(digest, f->w).code, SPURION_OK);
        assert_memory_equal(digest, want, sizeof want);
    }
    assert_int_equal(spurion_weights_digest_begin(f->w).code, SPURION_OK);
    spurion_weights_close(f->w);
    f->w = NULL;
    good(f);
    f->b.count -= D;
    bundle_write(&f->b, &f->p, "model.safetensors", f->b.count * sizeof(float) / 2); /* shorter than its header says, under us */
    assert_int_equal(spurion_weights_digest(digest, f->w).code, SPURION_DATA_LOSS);
}

static void test_weights_missing_head_says_what_is_there(void **state)
{
    fixture *f = *state;

    add_gptj(f);
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    bad(f, SPURION_INVALID_ARGUMENT, "missing score head: expected the tensor score.weight of shape (1, 8), found none");
    bundle_add(&f->b, "lm_head.weight", V, D, 0, 1);
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    bad(f, SPURION_INVALID_ARGUMENT, "found a language-model head only (lm_head)");
}

/* Heads of other trainers: found by their tensors, in one layer or several, in the model's file or beside it. */
static void test_weights_heads_are_found_by_their_tensors(void **state)
{
    fixture *f = *state;
    float x[8];

    add_gptj(f);
    bundle_add(&f->b, "v_head.summary.0.weight", 3, D, 50, 1);
    bundle_add(&f->b, "v_head.summary.0.bias", 3, 0, 60, 1);
    bundle_add(&f->b, "v_head.summary.2.weight", 2, 3, 70, 1);
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    good(f);
    assert_true(f->c.head.hidden == 1 && f->c.head.width[0] == 3 && f->c.outputs == 2 && f->c.head.hidden_bias && !f->c.head.bias);
    read_into(x, f, SPURION_ROLE_SCORE, 1, 6);
    assert_true(x[5] == 75);
    read_into(x, f, SPURION_ROLE_SCORE_B, 0, 3);
    assert_true(x[2] == 62);
    assert_false(spurion_weights_has(f->w, SPURION_ROLE_SCORE_B, 1));
    spurion_weights_close(f->w);
    f->w = NULL;
    bundle_add(&f->b, "regression_head.weight", 1, D, 0, 1);
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    bad(f, SPURION_INVALID_ARGUMENT, "expected one score head, found v_head.summary and regression_head");
    bundle_start(&f->b);
    bundle_add(&f->b, "score.0.weight", 3, D, 50, 1);
    bundle_add(&f->b, "score.2.weight", 1, 4, 50, 1);
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    bad(f, SPURION_INVALID_ARGUMENT, "score.2.weight: expected shape (1, 3) as config.json says, found (1, 4)");
    bundle_start(&f->b);
    bundle_add(&f->b, "regression_layer.weight", 19, D, 0, 1);
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    bad(f, SPURION_UNIMPLEMENTED, "expected linear layers, found a gated or quantile");
}

static void test_weights_head_in_a_file_beside(void **state)
{
    fixture *f = *state;
    float x[D];

    bundle_add(&f->b, "v_head.summary.weight", 1, D, 50, 1);
    bundle_add(&f->b, "v_head.summary.bias", 1, 0, 9, 1);
    bundle_write(&f->b, &f->p, "value_head.safetensors", 0);
    bundle_start(&f->b);
    add_gptj(f);
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    good(f);
    read_into(x, f, SPURION_ROLE_SCORE, 0, D);
    assert_true(x[7] == 57 && f->c.head.bias && strcmp(f->c.head.stem, "v_head.summary") == 0);
}

static void test_weights_named_head_must_be_there(void **state)
{
    fixture *f = *state;

    add_gptj(f);
    place_text(&f->p, "config.json", "{\"architectures\":[\"RewardModel\"],\"model_type\":\"gptj\",\"value_head_prefix\":\"rm_head\",\"n_embd\":8,"
                                     "\"n_layer\":1,\"n_head\":2,\"n_positions\":16,\"vocab_size\":10,\"rotary_dim\":4,\"n_inner\":6}");
    bundle_add(&f->b, "score.weight", 1, D, 50, 1);
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    bad(f, SPURION_INVALID_ARGUMENT, "expected the tensor rm_head.weight of shape (1, 8), found score");
}

static void test_weights_refuses_wrong_shapes_and_missing_tensors(void **state)
{
    fixture *f = *state;

    add_gptj(f);
    bundle_add(&f->b, "score.weight", 2, D, 50, 1);
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    bad(f, SPURION_INVALID_ARGUMENT, "score.weight: expected shape (1, 8) as config.json says, found (2, 8)");
    bundle_start(&f->b);
    bundle_add(&f->b, "score.weight", 1, D, 50, 1);
    bundle_add(&f->b, "transformer.wte.weight", V, D + 1, 0, 1);
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    bad(f, SPURION_INVALID_ARGUMENT, "wte.weight: expected shape (10, 8) as config.json says, found (10, 9)");
    bundle_start(&f->b);
    bundle_add(&f->b, "score.weight", 1, D, 50, 1);
    bundle_add(&f->b, "transformer.wte.weight", V + 3, D, 0, 1); /* resized: its own rows hold */
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    bad(f, SPURION_INVALID_ARGUMENT, "expected the tensor transformer.h.0.ln_1.weight, found none");
}

static void test_weights_refuses_values_that_are_not_finite(void **state)
{
    fixture *f = *state;
    float x[D * D];
    spurion_status st;

    add_gptj(f);
    bundle_add(&f->b, "score.weight", 1, D, 50, 1)[3] = NAN;
    f->b.data[V * D + 2 * D + 5] = INFINITY; /* q_proj */
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    good(f);
    st = spurion_weights_read(x, f->w, SPURION_ROLE_SCORE, 0);
    assert_int_equal(st.code, SPURION_INVALID_ARGUMENT);
    assert_non_null(strstr(st.message, "score.weight: expected finite numbers, found NaN at element 3"));
    st = spurion_weights_read(x, f->w, SPURION_ROLE_Q, 0);
    assert_non_null(strstr(st.message, "q_proj.weight: expected finite numbers, found infinity at element 5"));
}

static void test_weights_refuses_truncated_files(void **state)
{
    fixture *f = *state;
    char path[512];
    float x[D * D];

    add_gptj(f);
    bundle_add(&f->b, "score.weight", 1, D, 50, 1);
    bundle_write(&f->b, &f->p, "model.safetensors", 4);
    bad(f, SPURION_DATA_LOSS, "a truncated file?");
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    good(f);
    assert_int_equal(truncate(place_path(path, &f->p, "model.safetensors"), 2000), 0); /* under us */
    assert_int_equal(spurion_weights_read(x, f->w, SPURION_ROLE_SCORE, 0).code, SPURION_DATA_LOSS);
}

/* Conv1D [in, out], q | k | v: element (in, out) of c_attn has the value in * 24 + out. */
static void test_weights_gpt2_conv1d_is_split_and_transposed(void **state)
{
    static const spurion_role roles[] = {SPURION_ROLE_Q, SPURION_ROLE_K, SPURION_ROLE_V};
    static const spurion_role biases[] = {SPURION_ROLE_Q_B, SPURION_ROLE_K_B, SPURION_ROLE_V_B};
    fixture *f = *state;
    float x[D * D * 2];

    place_text(&f->p, "config.json", "{\"architectures\":[\"GPT2ForSequenceClassification\"],\"n_embd\":8,\"n_layer\":1,\"n_head\":2,"
                                     "\"n_positions\":16,\"vocab_size\":10,\"n_inner\":6}");
    bundle_add(&f->b, "wte.weight", V, D, 0, 1); /* a base model's file: no prefix */
    bundle_add(&f->b, "wpe.weight", 16, D, 0, 1);
    bundle_add(&f->b, "h.0.ln_1.weight", D, 0, 1, 0);
    bundle_add(&f->b, "h.0.ln_1.bias", D, 0, 2, 0);
    bundle_add(&f->b, "h.0.ln_2.weight", D, 0, 1, 0);
    bundle_add(&f->b, "h.0.ln_2.bias", D, 0, 2, 0);
    bundle_add(&f->b, "h.0.attn.c_attn.weight", D, 3 * D, 0, 1);
    bundle_add(&f->b, "h.0.attn.c_attn.bias", 3 * D, 0, 0, 1);
    bundle_add(&f->b, "h.0.attn.c_proj.weight", D, D, 0, 1);
    bundle_add(&f->b, "h.0.attn.c_proj.bias", D, 0, 0, 1);
    bundle_add(&f->b, "h.0.mlp.c_fc.weight", D, FF, 0, 1);
    bundle_add(&f->b, "h.0.mlp.c_fc.bias", FF, 0, 0, 1);
    bundle_add(&f->b, "h.0.mlp.c_proj.weight", FF, D, 0, 1);
    bundle_add(&f->b, "h.0.mlp.c_proj.bias", D, 0, 0, 1);
    bundle_add(&f->b, "ln_f.weight", D, 0, 1, 0);
    bundle_add(&f->b, "ln_f.bias", D, 0, 1, 0);
    bundle_add(&f->b, "score.weight", 1, D, 0, 1);
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    good(f);
    for (int part = 0; part < 3; part++) {
        read_into(x, f, roles[part], 0, D * D);
        for (int out = 0; out < D; out++) {
            for (int in = 0; in < D; in++) {
                assert_true(x[out * D + in] == (float)(in * 3 * D + part * D + out));
            }
        }
        read_into(x, f, biases[part], 0, D);
        assert_true(x[3] == (float)(part * D + 3));
    }
    read_into(x, f, SPURION_ROLE_UP, 0, FF * D);
    assert_true(x[2 * D + 5] == 5 * FF + 2);
    read_into(x, f, SPURION_ROLE_DOWN, 0, FF * D);
    assert_true(x[2 * FF + 5] == 5 * D + 2);
    read_into(x, f, SPURION_ROLE_O, 0, D * D);
    assert_true(x[2 * D + 5] == 5 * D + 2);
}

/* Rows per head [q; k; v]: row r of the fused tensor has the value of its number in every column. */
static void test_weights_neox_rows_are_split_by_head(void **state)
{
    fixture *f = *state;
    float x[D * D];
    float *fused;

    place_text(&f->p, "config.json", "{\"architectures\":[\"GPTNeoXForSequenceClassification\"],\"hidden_size\":8,\"num_hidden_layers\":1,"
                                     "\"num_attention_heads\":2,\"max_position_embeddings\":16,\"vocab_size\":10,\"intermediate_size\":6,"
                                     "\"rotary_pct\":0.5}");
    bundle_add(&f->b, "gpt_neox.embed_in.weight", V, D, 0, 1);
    bundle_add(&f->b, "gpt_neox.layers.0.input_layernorm.weight", D, 0, 1, 0);
    bundle_add(&f->b, "gpt_neox.layers.0.input_layernorm.bias", D, 0, 2, 0);
    bundle_add(&f->b, "gpt_neox.layers.0.post_attention_layernorm.weight", D, 0, 1, 0);
    bundle_add(&f->b, "gpt_neox.layers.0.post_attention_layernorm.bias", D, 0, 2, 0);
    fused = bundle_add(&f->b, "gpt_neox.layers.0.attention.query_key_value.weight", 3 * D, D, 0, 0);
    for (int r = 0; r < 3 * D; r++) {
        for (int c = 0; c < D; c++) {
            fused[r * D + c] = (float)r;
        }
    }
    bundle_add(&f->b, "gpt_neox.layers.0.attention.query_key_value.bias", 3 * D, 0, 0, 1);
    bundle_add(&f->b, "gpt_neox.layers.0.attention.dense.weight", D, D, 0, 1);
    bundle_add(&f->b, "gpt_neox.layers.0.attention.dense.bias", D, 0, 0, 1);
    bundle_add(&f->b, "gpt_neox.layers.0.mlp.dense_h_to_4h.weight", FF, D, 0, 1);
    bundle_add(&f->b, "gpt_neox.layers.0.mlp.dense_h_to_4h.bias", FF, 0, 0, 1);
    bundle_add(&f->b, "gpt_neox.layers.0.mlp.dense_4h_to_h.weight", D, FF, 0, 1);
    bundle_add(&f->b, "gpt_neox.layers.0.mlp.dense_4h_to_h.bias", D, 0, 0, 1);
    bundle_add(&f->b, "gpt_neox.final_layer_norm.weight", D, 0, 1, 0);
    bundle_add(&f->b, "gpt_neox.final_layer_norm.bias", D, 0, 1, 0);
    bundle_add(&f->b, "score.weight", 1, D, 0, 1);
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    good(f);
    for (int part = 0; part < 3; part++) {
        read_into(x, f, (spurion_role)(SPURION_ROLE_Q + 2 * part), 0, D * D);
        for (int r = 0; r < D; r++) {
            assert_true(x[r * D + 1] == (float)(r / HD * 3 * HD + part * HD + r % HD));
        }
        read_into(x, f, (spurion_role)(SPURION_ROLE_Q_B + 2 * part), 0, D);
        assert_true(x[5] == (float)(3 * HD + part * HD + 1));
    }
}

static void test_weights_gemma_norms_get_their_one(void **state)
{
    fixture *f = *state;
    static const char *const norms[] = {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                                        "post_feedforward_layernorm"};
    static const spurion_role roles[] = {SPURION_ROLE_NORM1_W, SPURION_ROLE_POST_ATTENTION_W, SPURION_ROLE_NORM2_W, SPURION_ROLE_POST_MLP_W};
    static const char *const projections[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"};
    char name[96];
    float x[D * D];

    place_text(&f->p, "config.json", "{\"architectures\":[\"Gemma2ForSequenceClassification\"],\"hidden_size\":8,\"num_hidden_layers\":1,"
                                     "\"num_attention_heads\":2,\"num_key_value_heads\":2,\"head_dim\":4,\"max_position_embeddings\":16,"
                                     "\"vocab_size\":10,\"intermediate_size\":6}");
    bundle_add(&f->b, "model.embed_tokens.weight", V, D, 0, 1);
    for (int i = 0; i < 4; i++) {
        snprintf(name, sizeof name, "model.layers.0.%s.weight", norms[i]);
        bundle_add(&f->b, name, D, 0, (float)i, 0.5f);
        snprintf(name, sizeof name, "model.layers.0.%s.weight", projections[i]);
        bundle_add(&f->b, name, D, D, 0, 1);
    }
    bundle_add(&f->b, "model.layers.0.mlp.gate_proj.weight", FF, D, 10, 1);
    bundle_add(&f->b, "model.layers.0.mlp.up_proj.weight", FF, D, 20, 1);
    bundle_add(&f->b, "model.layers.0.mlp.down_proj.weight", D, FF, 30, 1);
    bundle_add(&f->b, "model.norm.weight", D, 0, 7, 0);
    bundle_add(&f->b, "score.weight", 1, D, 0, 1);
    bundle_write(&f->b, &f->p, "model.safetensors", 0);
    good(f);
    for (int i = 0; i < 4; i++) {
        read_into(x, f, roles[i], 0, D);
        assert_true(x[0] == (float)i + 1 && x[2] == (float)i + 2);
    }
    read_into(x, f, SPURION_ROLE_FINAL_W, 0, D);
    assert_true(x[0] == 8);
    read_into(x, f, SPURION_ROLE_GATE, 0, FF * D);
    assert_true(x[0] == 10);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_weights_gptj_roles, setup, teardown),
        cmocka_unit_test_setup_teardown(test_weights_digest_beside_the_reading, setup, teardown),
        cmocka_unit_test_setup_teardown(test_weights_missing_head_says_what_is_there, setup, teardown),
        cmocka_unit_test_setup_teardown(test_weights_heads_are_found_by_their_tensors, setup, teardown),
        cmocka_unit_test_setup_teardown(test_weights_head_in_a_file_beside, setup, teardown),
        cmocka_unit_test_setup_teardown(test_weights_named_head_must_be_there, setup, teardown),
        cmocka_unit_test_setup_teardown(test_weights_refuses_wrong_shapes_and_missing_tensors, setup, teardown),
        cmocka_unit_test_setup_teardown(test_weights_refuses_values_that_are_not_finite, setup, teardown),
        cmocka_unit_test_setup_teardown(test_weights_refuses_truncated_files, setup, teardown),
        cmocka_unit_test_setup_teardown(test_weights_gpt2_conv1d_is_split_and_transposed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_weights_neox_rows_are_split_by_head, setup, teardown),
        cmocka_unit_test_setup_teardown(test_weights_gemma_norms_get_their_one, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}

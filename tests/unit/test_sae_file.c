/* SAE checkpoints: folds worked out by hand on a dictionary of two features, detection, and refusals. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>

#include "daemon/sae/sae_file.h"
#include "tests/unit/checkpoint_place.h"

#define D 3
#define WIDTH 2

typedef struct fixture {
    place p;
    bundle b;
    spurion_sae_file f;
} fixture;

static int setup(void **state)
{
    fixture *x = calloc(1, sizeof *x);

    place_make(&x->p);
    bundle_start(&x->b);
    *state = x;
    return 0;
}

static int teardown(void **state)
{
    fixture *x = *state;

    spurion_sae_file_fini(&x->f);
    place_drop(&x->p);
    free(x);
    return 0;
}

static void good(fixture *x, const char *format)
{
    spurion_status st;

    spurion_sae_file_fini(&x->f);
    st = spurion_sae_file_read(&x->f, x->p.dir, &(spurion_sae_options){format, 0, false});
    if (st.code != SPURION_OK) {
        fail_msg("%s", st.message);
    }
}

static void bad(fixture *x, const char *format, int code, const char *text)
{
    spurion_status st;

    spurion_sae_file_fini(&x->f);
    st = spurion_sae_file_read(&x->f, x->p.dir, &(spurion_sae_options){format, 0, false});
    assert_null(x->f.enc);
    if (st.code != code || strstr(st.message, text) == NULL) {
        fail_msg("expected %d and \"%s\", found %d and \"%s\"", code, text, st.code, st.message);
    }
}

static void near(const float *x, const double *wanted, int n)
{
    for (int i = 0; i < n; i++) {
        if (!(fabs(x[i] - wanted[i]) <= 1e-6 * fmax(1, fabs(wanted[i])))) {
            fail_msg("element %d: expected %.9g, found %.9g", i, wanted[i], (double)x[i]);
        }
    }
}

/* W_enc [d, m] = 1 2 / 3 4 / 5 6, W_dec rows (3 4 0) and (0 0 2), b_dec = 1 2 3, b_enc = 10 20. */
static void add_saelens(fixture *x)
{
    static const float dec[6] = {3, 4, 0, 0, 0, 2};

    bundle_start(&x->b);
    bundle_add(&x->b, "W_enc", D, WIDTH, 1, 1);
    memcpy(bundle_add(&x->b, "W_dec", WIDTH, D, 0, 0), dec, sizeof dec);
    bundle_add(&x->b, "b_dec", D, 0, 1, 1);
}

static void write_saelens(fixture *x, const char *cfg)
{
    bundle_write(&x->b, &x->p, "sae_weights.safetensors", 0);
    place_text(&x->p, "cfg.json", cfg);
}

#define CFG(more) "{\"d_in\":3,\"d_sae\":2,\"metadata\":{\"hook_name\":\"blocks.1.hook_resid_post\",\"sae_lens_version\":\"6.1.0\"}" more "}"

static void test_sae_file_standard_folds_the_decoder_bias(void **state)
{
    fixture *x = *state;

    add_saelens(x);
    bundle_add(&x->b, "b_enc", WIDTH, 0, 10, 10);
    write_saelens(x, CFG(",\"architecture\":\"standard\",\"apply_b_dec_to_input\":true"));
    good(x, NULL);
    assert_true(x->f.kind == SPURION_SAE_RELU && x->f.norm == SPURION_SAE_NORM_NONE && x->f.d == D && x->f.F == WIDTH);
    assert_string_equal(x->f.format, "saelens");
    assert_string_equal(x->f.hook_name, "blocks.1.hook_resid_post");
    near(x->f.enc, (double[]){1, 3, 5, 2, 4, 6}, 6);
    near(x->f.enc_bias, (double[]){10 - (1 + 6 + 15), 20 - (2 + 8 + 18)}, 2);
    near(x->f.dec, (double[]){3, 4, 0, 0, 0, 2}, 6);
    near(x->f.dec_bias, (double[]){1, 2, 3}, 3);
    assert_true(x->f.scale == NULL && x->f.threshold == NULL && x->f.gate_bias == NULL);
    write_saelens(x, CFG(",\"apply_b_dec_to_input\":false"));
    good(x, "saelens");
    near(x->f.enc_bias, (double[]){10, 20}, 2);
}

static void test_sae_file_gated_folds_both_biases(void **state)
{
    fixture *x = *state;
    const double share[2] = {22, 28};

    add_saelens(x);
    bundle_add(&x->b, "b_gate", WIDTH, 0, 1, 1);
    bundle_add(&x->b, "r_mag", WIDTH, 0, 0.5f, 0.5f);
    bundle_add(&x->b, "b_mag", WIDTH, 0, 5, 1);
    write_saelens(x, CFG(",\"architecture\":\"gated\""));
    good(x, NULL);
    assert_int_equal(x->f.kind, SPURION_SAE_GATED);
    assert_null(x->f.enc_bias);
    near(x->f.gate_bias, (double[]){1 - share[0], 2 - share[1]}, 2);
    near(x->f.mag_scale, (double[]){exp(0.5), exp(1)}, 2);
    near(x->f.mag_bias, (double[]){5 - exp(0.5) * share[0], 6 - exp(1) * share[1]}, 2);
}

static void test_sae_file_decoder_norm_becomes_the_scale(void **state)
{
    fixture *x = *state;

    add_saelens(x);
    bundle_add(&x->b, "b_enc", WIDTH, 0, 10, 10);
    write_saelens(x, CFG(",\"architecture\":\"topk\",\"k\":2,\"rescale_acts_by_decoder_norm\":true"));
    good(x, NULL);
    assert_true(x->f.kind == SPURION_SAE_TOPK && x->f.k == 2);
    near(x->f.scale, (double[]){5, 2}, 2);
    near(x->f.dec, (double[]){0.6, 0.8, 0, 0, 0, 1}, 6);
    write_saelens(x, CFG(",\"architecture\":\"topk\",\"k\":3"));
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "k: expected an integer from 1 to 2 for topk, found 3");
    write_saelens(x, CFG(",\"architecture\":\"topk\""));
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "found 0");
}

static void test_sae_file_training_checkpoint_has_one_threshold(void **state)
{
    fixture *x = *state;

    add_saelens(x);
    bundle_add(&x->b, "b_enc", WIDTH, 0, 10, 10);
    write_saelens(x, CFG(",\"architecture\":\"batchtopk\",\"k\":1.0"));
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "expected the tensor topk_threshold");
    bundle_add(&x->b, "topk_threshold", 1, 0, 0.75f, 0);
    write_saelens(x, CFG(",\"architecture\":\"matryoshka_batchtopk\",\"k\":1.0"));
    good(x, NULL);
    assert_int_equal(x->f.kind, SPURION_SAE_JUMPRELU);
    near(x->f.threshold, (double[]){0.75, 0.75}, 2);
    near(x->f.scale, (double[]){5, 2}, 2); /* the training classes' default */
    write_saelens(x, CFG(",\"architecture\":\"batchtopk\",\"rescale_acts_by_decoder_norm\":false"));
    good(x, NULL);
    assert_null(x->f.scale);
}

static void test_sae_file_constant_scale_and_log_threshold(void **state)
{
    fixture *x = *state;

    add_saelens(x);
    bundle_add(&x->b, "b_enc", WIDTH, 0, 10, 10);
    bundle_add(&x->b, "log_threshold", WIDTH, 0, 0, 1);
    write_saelens(x, CFG(",\"architecture\":\"jumprelu\",\"normalize_activations\":\"expected_average_only_in\""));
    bad(x, NULL, SPURION_FAILED_PRECONDITION, "activation_scaler.json");
    place_text(&x->p, "activation_scaler.json", "{\"scaling_factor\":null}");
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "scaling_factor: expected a number, found nothing");
    place_text(&x->p, "activation_scaler.json", "{\"scaling_factor\":0.5}");
    good(x, NULL);
    near(x->f.enc, (double[]){0.5, 1.5, 2.5, 1, 2, 3}, 6);
    near(x->f.enc_bias, (double[]){10 - 22, 20 - 28}, 2); /* b_dec lives in the scaled space */
    near(x->f.dec, (double[]){6, 8, 0, 0, 0, 4}, 6);
    near(x->f.dec_bias, (double[]){2, 4, 6}, 3);
    near(x->f.threshold, (double[]){1, exp(1)}, 2);
}

static void test_sae_file_old_scaling_factor(void **state)
{
    fixture *x = *state;

    add_saelens(x);
    bundle_add(&x->b, "b_enc", WIDTH, 0, 10, 10);
    bundle_add(&x->b, "scaling_factor", WIDTH, 0, 2, 1);
    write_saelens(x, "{\"d_in\":3,\"d_sae\":2,\"hook_point\":\"blocks.1.hook_resid_pre\",\"finetuning_scaling_factor\":false}");
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "scaling_factor: expected ones");
    write_saelens(x, "{\"d_in\":3,\"d_sae\":2,\"hook_point\":\"blocks.1.hook_resid_pre\",\"finetuning_scaling_factor\":true}");
    good(x, NULL);
    near(x->f.dec, (double[]){6, 8, 0, 0, 0, 6}, 6);
    assert_string_equal(x->f.hook_name, "blocks.1.hook_resid_pre");
}

static void test_sae_file_shapes_values_and_strangers_are_refused(void **state)
{
    fixture *x = *state;

    bundle_add(&x->b, "W_enc", D, WIDTH, 1, 1);
    bundle_add(&x->b, "W_dec", WIDTH, D + 1, 1, 1);
    bundle_add(&x->b, "b_dec", D, 0, 1, 1);
    bundle_add(&x->b, "b_enc", WIDTH, 0, 1, 1);
    write_saelens(x, CFG(""));
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "W_dec: expected shape (2, 3), found shape (2, 4)");
    add_saelens(x);
    write_saelens(x, CFG(""));
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "expected the tensor b_enc, found none");
    bundle_add(&x->b, "b_enc", WIDTH, 0, 1, 1)[1] = NAN;
    write_saelens(x, CFG(""));
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "b_enc: expected finite numbers, found NaN at element 1");
    add_saelens(x);
    bundle_add(&x->b, "b_enc", WIDTH, 0, 1, 1);
    write_saelens(x, "{\"d_in\":4,\"d_sae\":2,\"architecture\":\"standard\"}");
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "expected d_in 4 and d_sae 2 as cfg.json says, found b_dec of 3");
    bundle_add(&x->b, "W_skip", D, D, 0, 0);
    write_saelens(x, CFG(""));
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "found W_skip");
    add_saelens(x);
    bundle_add(&x->b, "b_enc", WIDTH, 0, 1, 1);
    bundle_write(&x->b, &x->p, "sae_weights.safetensors", 5);
    bad(x, NULL, SPURION_DATA_LOSS, "truncated");
    add_saelens(x); /* exp overflows */
    bundle_add(&x->b, "b_gate", WIDTH, 0, 1, 1);
    bundle_add(&x->b, "r_mag", WIDTH, 0, 89, 1);
    bundle_add(&x->b, "b_mag", WIDTH, 0, 5, 1);
    write_saelens(x, CFG(",\"architecture\":\"gated\""));
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "expected finite numbers, found infinity");
}

static void test_sae_file_transposed_tensors_are_turned_by_shape(void **state)
{
    fixture *x = *state;

    bundle_add(&x->b, "W_enc", WIDTH, D, 1, 1); /* stored the other way round */
    bundle_add(&x->b, "W_dec", WIDTH, D, 1, 1);
    bundle_add(&x->b, "b_dec", D, 0, 0, 0);
    bundle_add(&x->b, "b_enc", WIDTH, 0, 1, 1);
    write_saelens(x, CFG(""));
    good(x, NULL);
    near(x->f.enc, (double[]){1, 2, 3, 4, 5, 6}, 6);
}

static void test_sae_file_dictionary_learning_gated(void **state)
{
    fixture *x = *state;

    bundle_add(&x->b, "decoder_bias", D, 0, 1, 1);
    bundle_add(&x->b, "encoder.weight", WIDTH, D, 1, 1);
    bundle_add(&x->b, "r_mag", WIDTH, 0, 0, 1);
    bundle_add(&x->b, "gate_bias", WIDTH, 0, 7, 1);
    bundle_add(&x->b, "mag_bias", WIDTH, 0, 9, 1);
    bundle_add(&x->b, "decoder.weight", D, WIDTH, 1, 1);
    bundle_write(&x->b, &x->p, "ae.safetensors", 0);
    good(x, NULL); /* no config.json: its tensors tell */
    assert_string_equal(x->f.format, "dictionary_learning");
    assert_string_equal(x->f.architecture, "GatedAutoEncoder");
    near(x->f.enc, (double[]){1, 2, 3, 4, 5, 6}, 6);
    near(x->f.dec, (double[]){1, 3, 5, 2, 4, 6}, 6);
    near(x->f.gate_bias, (double[]){7 - 14, 8 - 32}, 2);
    near(x->f.mag_bias, (double[]){9 - 14, 10 - exp(1) * 32}, 2);
    place_text(&x->p, "config.json", "{\"trainer\":{\"dict_class\":\"GatedAutoEncoder\",\"activation_dim\":3,\"dict_size\":5}}");
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "dict_size: expected 2 as the tensors have, found 5");
    place_text(&x->p, "config.json", "{\"trainer\":{\"dict_class\":\"Odd\"}}");
    bad(x, NULL, SPURION_UNIMPLEMENTED, "found \"Odd\"");
    place_text(&x->p, "config.json", "{\"trainer\":{\"dict_class\":\"AutoEncoder\"}}");
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "found decoder_bias");
}

static void test_sae_file_topk_is_never_guessed(void **state)
{
    fixture *x = *state;

    bundle_add(&x->b, "b_dec", D, 0, 1, 1);
    bundle_add(&x->b, "encoder.weight", WIDTH, D, 1, 1);
    bundle_add(&x->b, "encoder.bias", WIDTH, 0, 1, 1);
    bundle_add(&x->b, "decoder.weight", D, WIDTH, 1, 1);
    bundle_add(&x->b, "k", 1, 0, 2, 0);
    bundle_add(&x->b, "threshold", 1, 0, 0.5f, 0);
    bundle_write(&x->b, &x->p, "ae.safetensors", 0);
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "{\"trainer\":{\"dict_class\":\"BatchTopKSAE\"}}");
    bad(x, "dictionary_learning", SPURION_INVALID_ARGUMENT, "AutoEncoderTopK");
    good(x, "dictionary_learning:AutoEncoderTopK");
    assert_true(x->f.kind == SPURION_SAE_TOPK && x->f.k == 2 && x->f.threshold == NULL);
    good(x, "dictionary_learning:BatchTopKSAE");
    assert_int_equal(x->f.kind, SPURION_SAE_JUMPRELU);
    place_text(&x->p, "config.json", "{\"trainer\":{\"dict_class\":\"BatchTopKSAE\"}}"); /* as the message says */
    good(x, NULL);
    assert_int_equal(x->f.kind, SPURION_SAE_JUMPRELU);
    near(x->f.threshold, (double[]){0.5, 0.5}, 2);
}

static void test_sae_file_pickles_name_the_converter(void **state)
{
    fixture *x = *state;
    char path[512];
    spurion_status st;

    place_text(&x->p, "ae.pt", "PK");
    bad(x, NULL, SPURION_FAILED_PRECONDITION, "python -m spurion.convert");
    place_text(&x->p, "config.json", "{\"trainer\":{\"dict_class\":\"AutoEncoder\"}}");
    bad(x, NULL, SPURION_FAILED_PRECONDITION, "python -m spurion.convert");
    st = spurion_sae_file_read(&x->f, place_path(path, &x->p, "ae.pt"), NULL);
    assert_int_equal(st.code, SPURION_FAILED_PRECONDITION);
    assert_non_null(strstr(st.message, path));
}

static void test_sae_file_other_formats_are_named(void **state)
{
    fixture *x = *state;

    bad(x, NULL, SPURION_INVALID_ARGUMENT, "found none of these files");
    bad(x, "neurons", SPURION_UNIMPLEMENTED, "llama_scope, openai or goodfire, found \"neurons\"");
    bad(x, "saelens:gated", SPURION_NOT_FOUND, "expected sae_weights.safetensors of format saelens");
    bad(x, "gemma_scope", SPURION_NOT_FOUND, "expected params.npz of format gemma_scope");
    bad(x, "openai", SPURION_NOT_FOUND, "expected one safetensors file of format openai, found 0");
    bad(x, "saelens", SPURION_NOT_FOUND, "expected sae_weights.safetensors of format saelens");
    place_text(&x->p, "params.npz", "PK");
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "expected an npz file (a zip archive)");
    place_text(&x->p, "hyperparams.json", "{}");
    bad(x, NULL, SPURION_NOT_FOUND, "expected sae_weights.safetensors of format llama_scope");
    place_text(&x->p, "conf.yaml", "a: 1");
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "a temporal SAE (conf.yaml)");
    place_remove(&x->p, "conf.yaml");
    place_text(&x->p, "cfg.json", "{\"act_size\":1}");
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "architecture (SAELens) or expansion_factor (sparsify)");
    place_text(&x->p, "cfg.json", "{\"architecture\":\"jumprelu_transcoder\"}");
    bad(x, "saelens", SPURION_NOT_FOUND, "expected sae_weights.safetensors");
    assert_int_equal(spurion_sae_file_read(&x->f, "/nowhere/at/all", NULL).code, SPURION_NOT_FOUND);
}

static void test_sae_file_sparsify(void **state)
{
    fixture *x = *state;

    bundle_add(&x->b, "b_dec", D, 0, 1, 1);
    bundle_add(&x->b, "encoder.weight", 4, D, 1, 1);
    bundle_add(&x->b, "encoder.bias", 4, 0, 1, 1);
    bundle_add(&x->b, "W_dec", 4, D, 1, 1);
    bundle_write(&x->b, &x->p, "sae.safetensors", 0);
    place_text(&x->p, "cfg.json", "{\"expansion_factor\":32,\"num_latents\":4,\"k\":2,\"activation\":\"groupmax\",\"d_in\":3}");
    good(x, NULL);
    assert_true(x->f.kind == SPURION_SAE_GROUPMAX && x->f.k == 2 && x->f.F == 4 && x->f.hook_name[0] == '\0');
    near(x->f.enc_bias, (double[]){1 - 14, 2 - 32, 3 - 50, 4 - 68}, 4);
    near(x->f.dec, (double[]){1, 2, 3, 4}, 4);
    place_text(&x->p, "cfg.json", "{\"num_latents\":4,\"k\":3,\"activation\":\"groupmax\"}");
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "a divisor of it for groupmax, found 3");
    place_text(&x->p, "cfg.json", "{\"num_latents\":5,\"k\":3}");
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "5 latents as cfg.json says");
    place_text(&x->p, "cfg.json", "{\"num_latents\":4,\"k\":3,\"transcode\":true}");
    bad(x, NULL, SPURION_UNIMPLEMENTED, "transcode");
    place_text(&x->p, "cfg.json", "{\"num_latents\":4}");
    bad(x, NULL, SPURION_INVALID_ARGUMENT, "k: expected an integer");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_sae_file_standard_folds_the_decoder_bias, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sae_file_gated_folds_both_biases, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sae_file_decoder_norm_becomes_the_scale, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sae_file_training_checkpoint_has_one_threshold, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sae_file_constant_scale_and_log_threshold, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sae_file_old_scaling_factor, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sae_file_shapes_values_and_strangers_are_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sae_file_transposed_tensors_are_turned_by_shape, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sae_file_dictionary_learning_gated, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sae_file_topk_is_never_guessed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sae_file_pickles_name_the_converter, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sae_file_other_formats_are_named, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sae_file_sparsify, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}

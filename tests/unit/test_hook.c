/* Names of hook points. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

#include <cmocka.h>
#include <string.h>

#include "daemon/sae/sae_file.h"

static void test_hook_reads_every_spelling(void **state)
{
    static const struct {
        const char *name;
        int layer;
        spurion_hook_site site;
    } good[] = {{"blocks.0.hook_resid_pre", 0, SPURION_HOOK_PRE},
                {"blocks.12.hook_resid_mid", 12, SPURION_HOOK_MID},
                {"blocks.255.hook_resid_post", 255, SPURION_HOOK_POST},
                {"blocks.3.hook_attn_out", 3, SPURION_HOOK_ATTN_OUT},
                {"blocks.3.hook_mlp_out", 3, SPURION_HOOK_MLP_OUT},
                {"transformer.h.7", 7, SPURION_HOOK_POST},
                {"model.layers.7", 7, SPURION_HOOK_POST},
                {"gpt_neox.layers.7", 7, SPURION_HOOK_POST},
                {"layers.10", 10, SPURION_HOOK_POST},
                {"layers.10.mlp", 10, SPURION_HOOK_MLP_OUT},
                {"h.10.attn", 10, SPURION_HOOK_ATTN_OUT},
                {"model.layers.9.output", 9, SPURION_HOOK_POST},
                {"model.layers.9.post_feedforward_layernorm.output", 9, SPURION_HOOK_MLP_OUT},
                {"h.3", 3, SPURION_HOOK_POST},
                {"resid_post_layer_8", 8, SPURION_HOOK_POST},
                {"attention_out_layer_8", 8, SPURION_HOOK_ATTN_OUT},
                {"mlp_out_layer_8", 8, SPURION_HOOK_MLP_OUT}};
    (void)state;

    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        spurion_hook hook, again;
        char name[64];

        assert_int_equal(spurion_hook_parse(&hook, good[i].name).code, SPURION_OK);
        assert_int_equal(hook.layer, good[i].layer);
        assert_int_equal(hook.site, good[i].site);
        spurion_hook_name(name, sizeof name, hook);
        assert_int_equal(spurion_hook_parse(&again, name).code, SPURION_OK);
        assert_true(again.layer == hook.layer && again.site == hook.site);
        assert_true(strncmp(good[i].name, "blocks", 6) != 0 || strcmp(name, good[i].name) == 0);
    }
}

static void test_hook_refuses_other_points(void **state)
{
    static const char *const bad[] = {"",
                                      "blocks",
                                      "blocks.",
                                      "blocks.1",
                                      "blocks.x.hook_resid_post",
                                      "blocks.1.hook_resid_post.",
                                      "blocks.1.hook_resid_posts",
                                      "blocks.256.hook_resid_post",
                                      "blocks.99999999999999999999.hook_resid_post",
                                      "blocks.-1.hook_resid_post",
                                      "blocks.1.ln2.hook_normalized",
                                      "blocks.1.mlp.hook_post",
                                      "hook_embed",
                                      "layers.10.mlpx",
                                      "resid_post_layer_8.mlp",
                                      "layers.",
                                      "model.layers.3.pre_feedforward_layernorm.output"};
    spurion_hook hook;
    spurion_status st;
    (void)state;

    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        st = spurion_hook_parse(&hook, bad[i]);
        assert_int_equal(st.code, SPURION_INVALID_ARGUMENT);
        assert_non_null(strstr(st.message, "expected"));
        assert_non_null(strstr(st.message, bad[i]));
    }
    st = spurion_hook_parse(&hook, "blocks.5.attn.hook_z");
    assert_int_equal(st.code, SPURION_INVALID_ARGUMENT);
    assert_non_null(strstr(st.message, "attention heads (hook_z)"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_hook_reads_every_spelling),
        cmocka_unit_test(test_hook_refuses_other_points),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}

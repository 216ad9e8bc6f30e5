/* Activations against libm in double, gradients against finite differences in double. Seed 20261121. */
#include "kernel_test.h"

#include <math.h>

static void case_run(spurion_dtype dtype, spurion_dtype type, int T, int F, spurion_act_kind kind, int gated)
{
    kt t;
    kt_open(&t, dtype, 2);
    int P = gated ? 2 * F : F;
    float *pre = kt_floats(&t, (size_t)(T * P), 3.0), *dout = kt_floats(&t, (size_t)(T * F), 1.0);
    double *want = malloc((size_t)(T * F) * sizeof *want), *back = malloc((size_t)(T * P) * sizeof *back);
    pre[0] = 1.5f; /* not silent even where there is one element */
    kt_round_all(pre, (size_t)(T * P), type);
    kt_round_all(dout, (size_t)(T * F), type);
    for (int i = 0; i < T * F; i++) {
        int at = i / F * P + i % F;
        double up = gated ? pre[at + F] : 1.0;
        want[i] = kt_act(pre[at], kind) * up;
        back[at] = dout[i] * kt_act_slope(pre[at], kind) * up;
        if (gated) {
            back[at + F] = dout[i] * kt_act(pre[at], kind);
        }
    }
    void *dpre = kt_in_typed(&t, pre, (size_t)(T * P), type);
    void *out = kt_out(&t, (size_t)(T * F) * spurion_dtype_bytes(dtype)), *grad = kt_out(&t, (size_t)(T * P) * spurion_dtype_bytes(dtype));
    KT_OK(t.ops->activation(t.dev, out, dpre, type, T, F, kind, gated));
    KT_OK(t.ops->activation_backward(t.dev, grad, dpre, kt_in_typed(&t, dout, (size_t)(T * F), type), type, T, F, kind, gated));
    float *got = kt_read_act(&t, out, (size_t)(T * F)), *got_back = kt_read_act(&t, grad, (size_t)(T * P));
    kt_near("activation", got, want, (size_t)(T * F), kt_tolerance_act(&t));
    kt_near("activation_backward", got_back, back, (size_t)(T * P), kt_tolerance_act(&t));
    free(pre), free(dout), free(want), free(back), free(got), free(got_back);
    kt_close(&t);
}

static void test_activation_and_gradient_match_libm_and_differences(void **state)
{
    static const int shapes[][2] = {{1, 1}, {3, 17}, {50, 100}, {7, 1536}};
    (void)state;
    for (int kind = SPURION_ACT_GELU_TANH; kind <= SPURION_ACT_RELU; kind++) {
        for (size_t i = 0; i < KT_COUNT(shapes); i++) {
            for (int gated = 0; gated < 2; gated++) {
                case_run(SPURION_F32, SPURION_F32, shapes[i][0], shapes[i][1], (spurion_act_kind)kind, gated);
                case_run(SPURION_BF16, SPURION_F32, shapes[i][0], shapes[i][1], (spurion_act_kind)kind, gated);
                case_run(SPURION_BF16, SPURION_BF16, shapes[i][0], shapes[i][1], (spurion_act_kind)kind, gated);
            }
        }
    }
}

/* Every element near the reference by itself, over the whole range: |error| <= 4e-7 |x|, which is a few ulp of the larger factor. */
static void test_activation_is_accurate_everywhere(void **state)
{
    (void)state;
    enum { N = 40001 };
    kt t;
    kt_open(&t, SPURION_F32, 2);
    float *x = malloc(N * sizeof *x), *dx, *out = kt_out(&t, N * 4);
    for (int i = 0; i < N; i++) {
        x[i] = (float)((i - N / 2) * (i % 3 == 0 ? 1e-6 : i % 3 == 1 ? 5e-4 : 5e-3));
    }
    dx = kt_in(&t, x, N * 4);
    for (int kind = SPURION_ACT_GELU_TANH; kind <= SPURION_ACT_RELU; kind++) {
        KT_OK(t.ops->activation(t.dev, out, dx, SPURION_F32, 1, N, (spurion_act_kind)kind, 0));
        float *got = kt_read_floats(&t, out, N);
        for (int i = 0; i < N; i++) {
            double want = kt_act(x[i], (spurion_act_kind)kind);
            if (!(fabs(got[i] - want) <= 4e-7 * fabs(x[i]))) {
                fail_msg("kind %d of %.9g: got %.9g, want %.9g", kind, (double)x[i], (double)got[i], want);
            }
        }
        free(got);
    }
    free(x);
    kt_close(&t);
}

/* An element's result does not depend on its place: lane, tail or length. */
static void test_activation_element_does_not_depend_on_place(void **state)
{
    (void)state;
    enum { N = 67 };
    kt t;
    kt_open(&t, SPURION_F32, 2);
    float *x = kt_floats(&t, N, 3.0), *out = kt_out(&t, N * 4), all[N], tail[N];
    for (int kind = SPURION_ACT_GELU_TANH; kind <= SPURION_ACT_RELU; kind++) {
        KT_OK(t.ops->activation(t.dev, out, kt_in(&t, x, N * 4), SPURION_F32, 1, N, (spurion_act_kind)kind, 0));
        kt_read(&t, all, out, sizeof all);
        for (int from = 1; from < N; from += 5) {
            KT_OK(t.ops->activation(t.dev, out, kt_in(&t, x + from, (size_t)(N - from) * 4), SPURION_F32, 1, N - from, (spurion_act_kind)kind, 0));
            kt_read(&t, tail, out, sizeof tail);
            kt_same_bits("activation", tail, all + from, (size_t)(N - from) * 4);
        }
    }
    free(x);
    kt_close(&t);
}

static void test_activation_survives_extremes(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_F32, 1);
    float x[8] = {0, -0.0f, 1e4f, -1e4f, 88.8f, -104.0f, 1e-30f, NAN}, *dx = kt_in(&t, x, sizeof x), *out = kt_out(&t, sizeof x), got[8];
    for (int kind = SPURION_ACT_GELU_TANH; kind <= SPURION_ACT_RELU; kind++) {
        KT_OK(t.ops->activation(t.dev, out, dx, SPURION_F32, 1, 8, (spurion_act_kind)kind, 0));
        kt_read(&t, got, out, sizeof got);
        for (int i = 0; i < 7; i++) {
            assert_true(fabs(got[i] - kt_act(x[i], (spurion_act_kind)kind)) <= 4e-7 * fabs(x[i]));
        }
        assert_true(isnan(got[7]));
    }
    kt_close(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_activation_and_gradient_match_libm_and_differences),
        cmocka_unit_test(test_activation_is_accurate_everywhere),
        cmocka_unit_test(test_activation_element_does_not_depend_on_place),
        cmocka_unit_test(test_activation_survives_extremes),
    };
    return cmocka_run_group_tests_name("activation", tests, NULL, NULL);
}

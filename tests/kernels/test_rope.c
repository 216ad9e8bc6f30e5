/* Rotary embedding against double, both styles, there and back. Seed 20261121. */
#include "kernel_test.h"

#include <math.h>

enum { POSITIONS = 300 };

typedef struct rope_case {
    spurion_rows shape;
    int rot;
    spurion_rope_style style;
} rope_case;

static const rope_case cases[] = {{{1, 1, 8}, 8, SPURION_ROPE_HALF},   {{33, 3, 64}, 64, SPURION_ROPE_HALF},
                                  {{5, 2, 80}, 20, SPURION_ROPE_HALF}, {{70, 4, 256}, 64, SPURION_ROPE_INTERLEAVED},
                                  {{3, 1, 24}, 24, SPURION_ROPE_INTERLEAVED}, {{9, 2, 40}, 0, SPURION_ROPE_NONE}};

static void make_table(float *table, int rot)
{
    for (int p = 0; p < POSITIONS; p++) {
        for (int k = 0; k < rot / 2; k++) {
            double angle = p * pow(10000.0, -2.0 * k / rot);
            table[(p * rot / 2 + k) * 2] = (float)cos(angle);
            table[(p * rot / 2 + k) * 2 + 1] = (float)sin(angle);
        }
    }
}

static void reference(double *y, const float *x, int position, rope_case c)
{
    for (int i = 0; i < c.shape.C; i++) {
        y[i] = x[i];
    }
    for (int k = 0; k < c.rot / 2 && c.style != SPURION_ROPE_NONE; k++) {
        double angle = position * pow(10000.0, -2.0 * k / c.rot);
        int a = c.style == SPURION_ROPE_HALF ? k : 2 * k, b = c.style == SPURION_ROPE_HALF ? k + c.rot / 2 : 2 * k + 1;
        y[a] = x[a] * cos(angle) - x[b] * sin(angle);
        y[b] = x[b] * cos(angle) + x[a] * sin(angle);
    }
}

/* From act values the same as from those values in f32, there and back. */
static void same_from_narrow(kt *t, const float *x, int stride, const void *positions, const void *table, rope_case c)
{
    int width = c.shape.groups * c.shape.C;
    size_t n = (size_t)(c.shape.T * width), all = (size_t)(c.shape.T * stride), element = spurion_dtype_bytes(t->dev->dtype);
    float *wide = malloc(n * sizeof *wide);
    char *bits[2] = {malloc(all * element), malloc(all * element)};
    memcpy(wide, x, n * sizeof *wide);
    kt_round_all(wide, n, t->dev->dtype);
    void *narrow = kt_in_act(t, wide, n), *same = kt_in(t, wide, n * sizeof *wide), *out[2] = {kt_out(t, all * element), kt_out(t, all * element)};
    for (int inverse = 0; inverse < 2; inverse++) {
        KT_OK(t->ops->rope(t->dev, out[0], stride, narrow, t->dev->dtype, width, positions, table, c.shape, c.rot, c.style, inverse));
        KT_OK(t->ops->rope(t->dev, out[1], stride, same, SPURION_F32, width, positions, table, c.shape, c.rot, c.style, inverse));
        kt_read(t, bits[0], out[0], all * element);
        kt_read(t, bits[1], out[1], all * element);
        kt_same_bits("rope from act", bits[0], bits[1], all * element);
    }
    free(wide), free(bits[0]), free(bits[1]);
}

static void rope_case_run(spurion_dtype dtype, rope_case c)
{
    kt t;
    kt_open(&t, dtype, 2);
    int width = c.shape.groups * c.shape.C, T = c.shape.T, stride = width + 5;
    float *x = kt_floats(&t, (size_t)(T * width), 1.0), *table = malloc((size_t)(POSITIONS * c.rot + 1) * sizeof *table);
    double *want = malloc((size_t)(T * width) * sizeof *want);
    int32_t positions[128];
    make_table(table, c.rot);
    for (int r = 0; r < T; r++) {
        positions[r] = kt_below(&t, POSITIONS);
        for (int g = 0; g < c.shape.groups; g++) {
            reference(want + r * width + g * c.shape.C, x + r * width + g * c.shape.C, positions[r], c);
        }
    }
    void *dx = kt_in(&t, x, (size_t)(T * width) * 4), *dp = kt_in(&t, positions, (size_t)T * 4),
         *dt = kt_in(&t, table, (size_t)(POSITIONS * c.rot) * 4);
    void *act = kt_out(&t, (size_t)(T * stride) * spurion_dtype_bytes(dtype));
    float *f32 = kt_out(&t, (size_t)(T * width) * 4), *back = kt_out(&t, (size_t)(T * width) * 4);
    KT_OK(t.ops->rope(t.dev, act, stride, dx, SPURION_F32, width, dp, dt, c.shape, c.rot, c.style, 0));
    KT_OK(t.ops->rope_f32(t.dev, f32, width, dx, width, dp, dt, c.shape, c.rot, c.style, 0));
    KT_OK(t.ops->rope_f32(t.dev, back, width, f32, width, dp, dt, c.shape, c.rot, c.style, 1));
    float *got = kt_read_floats(&t, f32, (size_t)(T * width)), *again = kt_read_floats(&t, back, (size_t)(T * width));
    float *rounded = kt_read_act(&t, act, (size_t)(T * stride));
    kt_near("rope", got, want, (size_t)(T * width), kt_tolerance_f32());
    for (int r = 0; r < T; r++) {
        for (int i = 0; i < stride; i++) {
            float v = rounded[r * stride + i];
            assert_true(i < width ? v == kt_round(got[r * width + i], dtype) : v != v);
        }
    }
    same_from_narrow(&t, x, stride, dp, dt, c);
    for (int i = 0; i < T * width; i++) {
        want[i] = x[i];
    }
    kt_near("rope back", again, want, (size_t)(T * width), kt_tolerance_f32());
    free(x), free(table), free(want), free(got), free(again), free(rounded);
    kt_close(&t);
}

static void test_rope_turns_and_turns_back(void **state)
{
    (void)state;
    for (size_t i = 0; i < KT_COUNT(cases); i++) {
        rope_case_run(SPURION_F32, cases[i]);
        rope_case_run(SPURION_BF16, cases[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_rope_turns_and_turns_back)};
    return cmocka_run_group_tests_name("rope", tests, NULL, NULL);
}

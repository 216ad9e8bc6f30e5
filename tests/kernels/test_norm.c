/* Norms and their gradients against double sums and finite differences. Seed 20261121. */
#include "kernel_test.h"

#include <math.h>

typedef struct norm_case {
    spurion_rows shape;
    spurion_norm_kind kind;
    bool bias;
    int gap; /* stride beyond groups * C */
} norm_case;

static const norm_case cases[] = {{{1, 1, 1}, SPURION_NORM_RMS, false, 0},   {{5, 1, 576}, SPURION_NORM_RMS, false, 0},
                                  {{70, 3, 64}, SPURION_NORM_RMS, false, 7}, {{3, 1, 33}, SPURION_NORM_LAYER, true, 2},
                                  {{9, 2, 17}, SPURION_NORM_LAYER, false, 0}, {{129, 1, 100}, SPURION_NORM_LAYER, true, 0}};

static const double eps = 1e-5;

/* y = norm(x) of one row, in double; statistics too. */
static void norm_reference(double *y, double *mean, double *rstd, const double *x, const float *w, const float *b, int C, spurion_norm_kind kind)
{
    double square = 0;
    *mean = 0;
    for (int c = 0; c < C && kind == SPURION_NORM_LAYER; c++) {
        *mean += x[c] / C;
    }
    for (int c = 0; c < C; c++) {
        square += (x[c] - *mean) * (x[c] - *mean) / C;
    }
    *rstd = 1 / sqrt(square + eps);
    for (int c = 0; c < C; c++) {
        y[c] = (x[c] - *mean) * *rstd * w[c] + (b == NULL ? 0 : b[c]);
    }
}

typedef struct norm_data {
    float *x, *w, *b, *dy, *before;
    double *want, *want_dx, *want_sum, *stats;
} norm_data;

/* Gradient of sum dy y by central differences: every element of x, in double. */
static void norm_differences(double *dx, const double *x, const float *dy, const float *w, norm_case c)
{
    double row[600], y[600], mean, rstd, h = 1e-5;
    for (int i = 0; i < c.shape.C; i++) {
        double side[2];
        for (int s = 0; s < 2; s++) {
            memcpy(row, x, (size_t)c.shape.C * sizeof *row);
            row[i] += s == 0 ? h : -h;
            norm_reference(y, &mean, &rstd, row, w, NULL, c.shape.C, c.kind);
            side[s] = 0;
            for (int k = 0; k < c.shape.C; k++) {
                side[s] += dy[k] * y[k];
            }
        }
        dx[i] = (side[0] - side[1]) / (2 * h);
    }
}

static norm_data make(kt *t, norm_case c)
{
    size_t n = (size_t)c.shape.T * (size_t)(c.shape.groups * c.shape.C), C = (size_t)c.shape.C, rows = n / C;
    norm_data d = {kt_floats(t, n, 2.0), kt_floats(t, C, 1.0), c.bias ? kt_floats(t, C, 1.0) : NULL, kt_floats(t, n, 1.0), kt_floats(t, n, 1.0),
                   malloc(n * sizeof(double)), malloc(n * sizeof(double)), malloc(n * sizeof(double)), malloc(2 * rows * sizeof(double))};
    for (size_t r = 0; r < rows; r++) {
        double x[600];
        for (size_t k = 0; k < C; k++) {
            d.x[r * C + k] += 3.0f; /* a mean worth subtracting */
            x[k] = d.x[r * C + k];
        }
        norm_reference(d.want + r * C, &d.stats[2 * r], &d.stats[2 * r + 1], x, d.w, d.b, c.shape.C, c.kind);
        norm_differences(d.want_dx + r * C, x, d.dy + r * C, d.w, c);
    }
    for (size_t i = 0; i < n; i++) {
        d.want_sum[i] = d.want[i] + d.before[i];
    }
    return d;
}

static void drop(norm_data d)
{
    free(d.x), free(d.w), free(d.b), free(d.dy), free(d.before), free(d.want), free(d.want_dx), free(d.want_sum), free(d.stats);
}

/* (T, width) to (T, width + gap) and back. */
static float *spread(const float *x, int T, int width, int gap)
{
    float *y = calloc((size_t)(T * (width + gap)) + 1, sizeof *y);
    for (int r = 0; r < T; r++) {
        memcpy(y + (size_t)(r * (width + gap)), x + (size_t)(r * width), (size_t)width * sizeof *x);
    }
    return y;
}

static float *gather(const float *y, int T, int width, int gap)
{
    float *x = malloc((size_t)(T * width) * sizeof *x);
    for (int r = 0; r < T; r++) {
        memcpy(x + (size_t)(r * width), y + (size_t)(r * (width + gap)), (size_t)width * sizeof *x);
    }
    return x;
}

static void *spread_in(kt *t, const float *x, norm_case c)
{
    int width = c.shape.groups * c.shape.C;
    float *y = spread(x, c.shape.T, width, c.gap);
    void *p = kt_in(t, y, (size_t)(c.shape.T * (width + c.gap)) * sizeof *y);
    free(y);
    return p;
}

static void check(kt *t, const char *name, const void *buffer, const double *want, norm_case c, bool act, kt_tolerance tolerance)
{
    int width = c.shape.groups * c.shape.C;
    size_t all = (size_t)(c.shape.T * (width + c.gap));
    float *y = act ? kt_read_act(t, buffer, all) : kt_read_floats(t, buffer, all), *x = gather(y, c.shape.T, width, c.gap);
    kt_near(name, x, want, (size_t)(c.shape.T * width), tolerance);
    free(x), free(y);
}

static void norm_case_run(spurion_dtype dtype, norm_case c)
{
    kt t;
    kt_open(&t, dtype, 2);
    norm_data d = make(&t, c);
    int width = c.shape.groups * c.shape.C, stride = width + c.gap;
    size_t all = (size_t)(c.shape.T * stride), rows = (size_t)(c.shape.T * c.shape.groups), C = (size_t)c.shape.C;
    void *x = spread_in(&t, d.x, c), *w = kt_in(&t, d.w, C * 4), *b = d.b == NULL ? NULL : kt_in(&t, d.b, C * 4);
    void *act = kt_out(&t, all * spurion_dtype_bytes(dtype)), *f32 = kt_out(&t, all * 4), *sum = spread_in(&t, d.before, c);
    float *stats = kt_out(&t, rows * 2 * 4), *dx = kt_out(&t, all * 4);

    KT_OK(t.ops->norm(t.dev, act, NULL, stride, stats, x, stride, w, b, c.shape, (float)eps, c.kind, SPURION_OVERWRITE));
    check(&t, "norm act", act, d.want, c, true, kt_tolerance_act(&t));
    KT_OK(t.ops->norm(t.dev, NULL, f32, stride, NULL, x, stride, w, b, c.shape, (float)eps, c.kind, SPURION_OVERWRITE));
    check(&t, "norm f32", f32, d.want, c, false, kt_tolerance_f32());
    KT_OK(t.ops->norm(t.dev, NULL, sum, stride, NULL, x, stride, w, b, c.shape, (float)eps, c.kind, SPURION_ACCUMULATE));
    check(&t, "norm added", sum, d.want_sum, c, false, kt_tolerance_f32());
    float *got = kt_read_floats(&t, stats, rows * 2);
    kt_near("stats", got, d.stats, rows * 2, kt_tolerance_f32());
    free(got);
    KT_OK(t.ops->norm_backward(t.dev, dx, stride, spread_in(&t, d.dy, c), stride, x, stride, stats, w, c.shape, c.kind, SPURION_OVERWRITE));
    if (c.shape.C > 1) { /* of one element the gradient is nearly 0, and differences are all noise */
        check(&t, "norm dx", dx, d.want_dx, c, false, (kt_tolerance){1e-9, 1e-3});
        for (size_t i = 0; i < (size_t)c.shape.T * (size_t)width; i++) {
            d.want_dx[i] += d.before[i];
        }
        dx = spread_in(&t, d.before, c);
        KT_OK(t.ops->norm_backward(t.dev, dx, stride, spread_in(&t, d.dy, c), stride, x, stride, stats, w, c.shape, c.kind, SPURION_ACCUMULATE));
        check(&t, "norm dx added", dx, d.want_dx, c, false, (kt_tolerance){1e-9, 1e-3});
    }
    drop(d);
    kt_close(&t);
}

static void test_norm_and_gradient_match_double_and_differences(void **state)
{
    (void)state;
    for (size_t i = 0; i < KT_COUNT(cases); i++) {
        norm_case_run(SPURION_F32, cases[i]);
        norm_case_run(SPURION_BF16, cases[i]);
    }
}

static void test_norm_row_does_not_depend_on_company(void **state)
{
    (void)state;
    enum { T = 90, C = 83 };
    kt t;
    kt_open(&t, SPURION_F32, 3);
    float *x = kt_floats(&t, T * C, 1.0), *w = kt_floats(&t, C, 1.0), *all = kt_out(&t, T * C * 4), *one = kt_out(&t, C * 4);
    float *dx = kt_in(&t, x, T * C * 4), *dw = kt_in(&t, w, C * 4), alone[C], together[C];
    KT_OK(t.ops->norm(t.dev, NULL, all, C, NULL, dx, C, dw, NULL, (spurion_rows){T, 1, C}, 1e-6f, SPURION_NORM_LAYER, SPURION_OVERWRITE));
    for (int r = 0; r < T; r += 13) {
        KT_OK(t.ops->norm(t.dev, NULL, one, C, NULL, dx + r * C, C, dw, NULL, (spurion_rows){1, 1, C}, 1e-6f, SPURION_NORM_LAYER,
                          SPURION_OVERWRITE));
        kt_read(&t, alone, one, sizeof alone);
        kt_read(&t, together, all + r * C, sizeof together);
        kt_same_bits("norm", alone, together, sizeof alone);
    }
    free(x), free(w);
    kt_close(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_norm_and_gradient_match_double_and_differences),
        cmocka_unit_test(test_norm_row_does_not_depend_on_company),
    };
    return cmocka_run_group_tests_name("norm", tests, NULL, NULL);
}

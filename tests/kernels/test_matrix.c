/* linear and linear_backward against double sums; a row alone, anywhere in its tile and in any company, bit-equal. Seed 20261121. */
#include <dirent.h>

#include "kernel_test.h"

typedef struct matrix_case {
    int T, N, K;
    bool bias;
} matrix_case;

static const matrix_case cases[] = {{1, 1, 8, false}, {1, 33, 17, true}, {3, 64, 64, true}, {65, 192, 576, true}, {130, 577, 96, false},
                                    {64, 48, 1000, true}, {200, 1540, 40, true}, {7, 3, 333, false}};

static double *reference(const float *x, const float *w, const float *bias, const float *before, matrix_case c)
{
    double *y = malloc((size_t)c.T * (size_t)c.N * sizeof *y);
    assert_non_null(y);
    for (int t = 0; t < c.T; t++) {
        for (int n = 0; n < c.N; n++) {
            double sum = bias == NULL ? 0 : bias[n];
            for (int k = 0; k < c.K; k++) {
                sum += (double)x[t * c.K + k] * w[n * c.K + k];
            }
            y[t * c.N + n] = sum + (before == NULL ? 0 : before[t * c.N + n]);
        }
    }
    return y;
}

/* Rows of the last `gap` columns of a strided output must stay as they were. */
static void read_strided(float *out, const float *all, int T, int N, int stride, const float *fill)
{
    for (int t = 0; t < T; t++) {
        memcpy(out + (size_t)t * (size_t)N, all + (size_t)t * (size_t)stride, (size_t)N * sizeof *out);
        for (int n = N; n < stride; n++) {
            assert_true(all[t * stride + n] == fill[t * stride + n]);
        }
    }
}

static void forward_case(spurion_dtype dtype, matrix_case c, spurion_write mode, int gap)
{
    kt t;
    kt_open(&t, dtype, 2);
    int stride = c.N + gap;
    float *x = kt_floats(&t, (size_t)c.T * (size_t)c.K, 1.0), *w = kt_floats(&t, (size_t)c.N * (size_t)c.K, 0.05);
    float *bias = c.bias ? kt_floats(&t, (size_t)c.N, 1.0) : NULL, *fill = kt_floats(&t, (size_t)c.T * (size_t)stride, 1.0);
    float *before = malloc((size_t)c.T * (size_t)c.N * sizeof *before), *got = malloc((size_t)c.T * (size_t)c.N * sizeof *got);
    kt_round_all(x, (size_t)c.T * (size_t)c.K, dtype);
    spurion_matrix *m;
    KT_OK(t.ops->matrix_create(t.dev, &m, w, bias, c.N, c.K, SPURION_FORWARD, dtype));
    kt_round_all(w, (size_t)c.N * (size_t)c.K, dtype);
    read_strided(before, fill, c.T, c.N, stride, fill);
    void *dx = kt_in_typed(&t, x, (size_t)c.T * (size_t)c.K, dtype);
    float *out = kt_in(&t, fill, (size_t)c.T * (size_t)stride * sizeof *fill);
    KT_OK(t.ops->linear(t.dev, out, SPURION_F32, stride, dx, m, c.T, mode));
    float *all = kt_read_floats(&t, out, (size_t)c.T * (size_t)stride);
    read_strided(got, all, c.T, c.N, stride, fill);
    double *want = reference(x, w, bias, mode == SPURION_ACCUMULATE ? before : NULL, c);
    kt_near("linear", got, want, (size_t)c.T * (size_t)c.N, kt_tolerance_f32());
    t.ops->matrix_destroy(t.dev, m);
    free(x), free(w), free(bias), free(fill), free(before), free(got), free(all), free(want);
    kt_close(&t);
}

static void backward_case(spurion_dtype dtype, matrix_case c, spurion_write mode)
{
    kt t;
    kt_open(&t, dtype, 2);
    size_t tn = (size_t)c.T * (size_t)c.N, tk = (size_t)c.T * (size_t)c.K, nk = (size_t)c.N * (size_t)c.K;
    float *dy = kt_floats(&t, tn, 1.0), *w = kt_floats(&t, nk, 0.05), *before = kt_floats(&t, tk, 1.0), *wt = malloc(nk * sizeof *wt);
    kt_round_all(dy, tn, dtype);
    spurion_matrix *m;
    KT_OK(t.ops->matrix_create(t.dev, &m, w, NULL, c.N, c.K, SPURION_BACKWARD, dtype));
    kt_round_all(w, nk, dtype);
    for (int n = 0; n < c.N; n++) {
        for (int k = 0; k < c.K; k++) {
            wt[k * c.N + n] = w[n * c.K + k];
        }
    }
    float *dx = kt_in(&t, before, tk * sizeof *before);
    KT_OK(t.ops->linear_backward(t.dev, dx, SPURION_F32, kt_in_typed(&t, dy, tn, dtype), m, c.T, mode));
    float *got = kt_read_floats(&t, dx, tk);
    matrix_case turned = {c.T, c.K, c.N, false};
    double *want = reference(dy, wt, NULL, mode == SPURION_ACCUMULATE ? before : NULL, turned);
    kt_near("linear_backward", got, want, tk, kt_tolerance_f32());
    t.ops->matrix_destroy(t.dev, m);
    free(dy), free(w), free(before), free(wt), free(got), free(want);
    kt_close(&t);
}

static void test_matrix_products_match_double_sums(void **state)
{
    (void)state;
    for (int dtype = SPURION_F32; dtype <= SPURION_BF16; dtype++) {
        for (size_t i = 0; i < KT_COUNT(cases); i++) {
            forward_case((spurion_dtype)dtype, cases[i], SPURION_OVERWRITE, 0);
            forward_case((spurion_dtype)dtype, cases[i], SPURION_ACCUMULATE, 13);
            backward_case((spurion_dtype)dtype, cases[i], SPURION_OVERWRITE);
            backward_case((spurion_dtype)dtype, cases[i], SPURION_ACCUMULATE);
        }
    }
}

/* An f32 matrix on a bf16 device: how a dictionary keeps its precision. */
static void test_matrix_keeps_its_own_dtype(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_BF16, 2);
    matrix_case c = {5, 70, 90, true};
    float *x = kt_floats(&t, 450, 1.0), *w = kt_floats(&t, 6300, 0.1), *bias = kt_floats(&t, 70, 1.0);
    spurion_matrix *m;
    KT_OK(t.ops->matrix_create(t.dev, &m, w, bias, c.N, c.K, SPURION_FORWARD, SPURION_F32));
    float *out = kt_out(&t, 350 * sizeof *out);
    KT_OK(t.ops->linear(t.dev, out, SPURION_F32, c.N, kt_in(&t, x, 450 * sizeof *x), m, c.T, SPURION_OVERWRITE));
    float *got = kt_read_floats(&t, out, 350);
    double *want = reference(x, w, bias, NULL, c);
    kt_near("linear f32", got, want, 350, kt_tolerance_f32());
    t.ops->matrix_destroy(t.dev, m);
    free(x), free(w), free(bias), free(got), free(want);
    kt_close(&t);
}

enum { ROWS = 200 };

/* Every row's result once, computed in the company of all: (ROWS, N). */
static float *all_rows(kt *t, const spurion_matrix *m, const float *x, int N, int K)
{
    float *out = kt_out(t, (size_t)(ROWS * N) * sizeof *out);
    KT_OK(t->ops->linear(t->dev, out, SPURION_F32, N, kt_in_act(t, x, (size_t)(ROWS * K)), m, ROWS, SPURION_OVERWRITE));
    return kt_read_floats(t, out, (size_t)(ROWS * N));
}

static void check_company(kt *t, const spurion_matrix *m, const float *x, const float *alone, int N, int K)
{
    static const int sizes[] = {1, 2, 3, 5, 8, 16, 17, 31, 33, 47, 63, 64, 65, 100, 127, 128, 129};
    for (size_t i = 0; i < KT_COUNT(sizes); i++) {
        int T = sizes[i];
        float *mixed = malloc((size_t)(T * K) * sizeof *mixed);
        int *from = malloc((size_t)T * sizeof *from);
        for (int r = 0; r < T; r++) { /* another place, other neighbours */
            from[r] = kt_below(t, ROWS);
            memcpy(mixed + r * K, x + from[r] * K, (size_t)K * sizeof *x);
        }
        float *out = kt_out(t, (size_t)(T * N) * sizeof *out);
        KT_OK(t->ops->linear(t->dev, out, SPURION_F32, N, kt_in_act(t, mixed, (size_t)(T * K)), m, T, SPURION_OVERWRITE));
        float *got = kt_read_floats(t, out, (size_t)(T * N));
        for (int r = 0; r < T; r++) {
            kt_same_bits("a row in other company", got + r * N, alone + from[r] * N, (size_t)N * sizeof *got);
        }
        free(mixed), free(from), free(got);
    }
}

static void test_matrix_row_does_not_depend_on_company(void **state)
{
    static const struct {
        int N, K;
    } shapes[] = {{576, 576}, {100, 64}, {1000, 96}, {40, 2048}, {17, 333}, {256, 8}};
    (void)state;
    for (int dtype = SPURION_F32; dtype <= SPURION_BF16; dtype++) {
        for (size_t i = 0; i < KT_COUNT(shapes); i++) {
            kt t;
            kt_open(&t, (spurion_dtype)dtype, 1 + (int)i % 3);
            int N = shapes[i].N, K = shapes[i].K;
            float *x = kt_floats(&t, (size_t)(ROWS * K), 1.0), *w = kt_floats(&t, (size_t)(N * K), 0.1);
            spurion_matrix *m;
            KT_OK(t.ops->matrix_create(t.dev, &m, w, NULL, N, K, SPURION_FORWARD, (spurion_dtype)dtype));
            float *alone = all_rows(&t, m, x, N, K);
            check_company(&t, m, x, alone, N, K);
            t.ops->matrix_destroy(t.dev, m);
            free(x), free(w), free(alone);
            kt_close(&t);
        }
    }
}

static int process_threads(void)
{
    int count = 0;
    DIR *tasks = opendir("/proc/self/task");
    assert_non_null(tasks);
    for (const struct dirent *e; (e = readdir(tasks)) != NULL;) {
        count += e->d_name[0] != '.';
    }
    closedir(tasks);
    return count;
}

/* One device of one thread and one of three give the same bits. On the CPU no product brings threads beside the device's own. */
static void threads_case(spurion_dtype dtype, int N)
{
    float *first = NULL;
    int before = process_threads();
    for (int threads = 1; threads <= 3; threads++) {
        kt t;
        kt_open(&t, dtype, threads);
        float *x = kt_floats(&t, (size_t)(ROWS * 320), 1.0), *w = kt_floats(&t, (size_t)(N * 320), 0.1);
        spurion_matrix *m;
        KT_OK(t.ops->matrix_create(t.dev, &m, w, NULL, N, 320, SPURION_FORWARD, dtype));
        float *got = all_rows(&t, m, x, N, 320);
        if (first != NULL) {
            kt_same_bits("threads", got, first, (size_t)(ROWS * N) * sizeof *got);
        }
        if (kt_on_cpu()) {
            assert_int_equal(process_threads(), before + threads - 1);
        }
        free(first), free(x), free(w);
        first = got;
        t.ops->matrix_destroy(t.dev, m);
        kt_close(&t);
    }
    free(first);
}

static void test_matrix_does_not_depend_on_threads(void **state)
{
    (void)state;
    threads_case(SPURION_F32, 128);
    threads_case(SPURION_F32, 700);
    threads_case(SPURION_BF16, 700);
}

static void test_matrix_refuses_a_direction_it_was_not_made_for(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_F32, 1);
    float *w = kt_floats(&t, 64, 1.0);
    spurion_matrix *m;
    KT_OK(t.ops->matrix_create(t.dev, &m, w, NULL, 8, 8, SPURION_FORWARD, SPURION_F32));
    float *x = kt_in(&t, w, 8 * sizeof *w), *out = kt_out(&t, 8 * sizeof *out);
    assert_int_equal(t.ops->linear_backward(t.dev, out, SPURION_F32, x, m, 1, SPURION_OVERWRITE).code, SPURION_INTERNAL);
    assert_true(t.ops->matrix_bytes(t.dev, 8, 8, SPURION_FORWARD, SPURION_F32) >= 64 * sizeof *w);
    /* the CPU packs each direction's weights anew; a GPU reads the same ones both ways */
    assert_true(t.ops->matrix_bytes(t.dev, 8, 8, SPURION_FORWARD | SPURION_BACKWARD, SPURION_F32) >= (kt_on_cpu() ? 128 : 64) * sizeof *w);
    t.ops->matrix_destroy(t.dev, m);
    t.ops->matrix_destroy(t.dev, NULL);
    free(w);
    kt_close(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_matrix_does_not_depend_on_threads), /* first: the matrices of a process come before its first product */
        cmocka_unit_test(test_matrix_products_match_double_sums),
        cmocka_unit_test(test_matrix_keeps_its_own_dtype),
        cmocka_unit_test(test_matrix_row_does_not_depend_on_company),
        cmocka_unit_test(test_matrix_refuses_a_direction_it_was_not_made_for),
    };
    return cmocka_run_group_tests_name("matrix", tests, NULL, NULL);
}

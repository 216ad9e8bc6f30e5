/* Rows moved, cast, added and dotted, against plain loops; memory ops. Seed 20261121. */
#include "kernel_test.h"

#include <math.h>

static const int widths[] = {1, 3, 16, 17, 64, 100, 577};

static void embed_case(spurion_dtype dtype, int T, int D, bool positions)
{
    enum { V = 50, P = 40 };
    kt t;
    kt_open(&t, SPURION_F32, 2);
    float *table = kt_floats(&t, (size_t)(V * D), 1.0), *ptable = kt_floats(&t, (size_t)(P * D), 1.0), scale = positions ? 1.0f : 22.5f;
    int32_t ids[64], pos[64];
    double *want = malloc((size_t)(T * D) * sizeof *want);
    kt_round_all(table, (size_t)(V * D), dtype);
    for (int i = 0; i < T; i++) {
        ids[i] = i == 0 ? V - 1 : kt_below(&t, V);
        pos[i] = i == 0 ? P - 1 : kt_below(&t, P);
        for (int c = 0; c < D; c++) {
            want[i * D + c] = (double)table[ids[i] * D + c] * scale + (positions ? (double)ptable[pos[i] * D + c] : 0.0);
        }
    }
    float *out = kt_out(&t, (size_t)(T * D) * sizeof *out);
    KT_OK(t.ops->embed(t.dev, out, kt_in_typed(&t, table, (size_t)(V * D), dtype), dtype,
                       positions ? kt_in(&t, ptable, (size_t)(P * D) * sizeof *ptable) : NULL, kt_in(&t, ids, sizeof *ids * (size_t)T),
                       kt_in(&t, pos, sizeof *pos * (size_t)T), T, D, scale));
    float *got = kt_read_floats(&t, out, (size_t)(T * D));
    kt_near("embed", got, want, (size_t)(T * D), kt_tolerance_f32());
    free(table), free(ptable), free(want), free(got);
    kt_close(&t);
}

static void test_rows_embed_adds_positions_and_scales(void **state)
{
    (void)state;
    for (size_t i = 0; i < KT_COUNT(widths); i++) {
        embed_case(SPURION_F32, 1 + (int)i * 9, widths[i], i % 2 == 0);
        embed_case(SPURION_BF16, 1 + (int)i * 9, widths[i], i % 2 == 1);
    }
}

static void moves_case(spurion_dtype dtype, int R, int C)
{
    enum { ALL = 60 };
    kt t;
    kt_open(&t, dtype, 2);
    size_t all = (size_t)(ALL * C), few = (size_t)(R * C);
    float *in = kt_floats(&t, all, 1.0), *src = kt_floats(&t, few, 1.0);
    int32_t rows[ALL];
    kt_round_all(in, all, dtype);
    for (int r = 0; r < R; r++) {
        rows[r] = (r * 7 + 3) % ALL; /* distinct: 7 and 60 share no factor */
    }
    void *where = kt_in(&t, rows, (size_t)R * sizeof *rows), *plain = kt_in(&t, in, all * sizeof *in);
    float *gathered = kt_out(&t, few * sizeof *in), *over = kt_in(&t, in, all * sizeof *in), *added = kt_in(&t, in, all * sizeof *in);
    void *act = kt_out(&t, few * spurion_dtype_bytes(dtype));
    KT_OK(t.ops->gather_rows(t.dev, gathered, plain, where, R, C));
    KT_OK(t.ops->gather_act(t.dev, act, kt_in_act(&t, in, all), where, R, C));
    KT_OK(t.ops->scatter_rows(t.dev, over, kt_in(&t, src, few * sizeof *src), where, R, C, SPURION_OVERWRITE));
    KT_OK(t.ops->scatter_rows(t.dev, added, kt_in(&t, src, few * sizeof *src), where, R, C, SPURION_ACCUMULATE));
    float *g = kt_read_floats(&t, gathered, few), *a = kt_read_act(&t, act, few), *o = kt_read_floats(&t, over, all),
          *s = kt_read_floats(&t, added, all);
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) {
            int from = rows[r] * C + c, to = r * C + c;
            assert_true(g[to] == in[from] && a[to] == in[from] && o[from] == src[to] && s[from] == in[from] + src[to]);
            o[from] = s[from] = in[from];
        }
    }
    kt_same_bits("rows that were not named", o, in, all * sizeof *in);
    kt_same_bits("rows that were not named", s, in, all * sizeof *in);
    free(in), free(src), free(g), free(a), free(o), free(s);
    kt_close(&t);
}

static void test_rows_gather_and_scatter_touch_named_rows_only(void **state)
{
    (void)state;
    for (size_t i = 0; i < KT_COUNT(widths); i++) {
        moves_case(SPURION_F32, 1 + (int)i * 5, widths[i]);
        moves_case(SPURION_BF16, 1 + (int)i * 5, widths[i]);
    }
}

static void cast_case(spurion_dtype dtype, int T, int C)
{
    kt t;
    kt_open(&t, dtype, 2);
    int xs = C + 3, os = C + 5;
    float *x = kt_floats(&t, (size_t)(T * xs), 100.0);
    x[0] = 1.00390625f; /* half way between two bf16: to the even one */
    x[xs - 1] = -3.0e38f;
    void *out = kt_out(&t, (size_t)(T * os) * spurion_dtype_bytes(dtype));
    KT_OK(t.ops->cast(t.dev, out, os, kt_in(&t, x, (size_t)(T * xs) * sizeof *x), SPURION_F32, xs, T, C));
    float *got = kt_read_act(&t, out, (size_t)(T * os));
    for (int r = 0; r < T; r++) {
        for (int c = 0; c < os; c++) {
            float v = got[r * os + c];
            assert_true(c < C ? v == kt_round(x[r * xs + c], dtype) : v != v); /* the gap is still poison */
        }
    }
    free(got);
    kt_round_all(x, (size_t)(T * xs), dtype); /* values that act holds already move as they are */
    void *moved = kt_out(&t, (size_t)(T * os) * spurion_dtype_bytes(dtype));
    KT_OK(t.ops->cast(t.dev, moved, os, kt_in_act(&t, x, (size_t)(T * xs)), dtype, xs, T, C));
    got = kt_read_act(&t, moved, (size_t)(T * os));
    for (int r = 0; r < T; r++) {
        for (int c = 0; c < os; c++) {
            float v = got[r * os + c];
            assert_true(c < C ? v == x[r * xs + c] : v != v);
        }
    }
    free(x), free(got);
    kt_close(&t);
}

static void test_rows_cast_rounds_to_nearest_even(void **state)
{
    (void)state;
    for (size_t i = 0; i < KT_COUNT(widths); i++) {
        cast_case(SPURION_F32, 5, widths[i]);
        cast_case(SPURION_BF16, 130, widths[i]);
    }
}

static void test_rows_cast_keeps_nan_and_infinity(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_BF16, 1);
    float x[4] = {NAN, INFINITY, -INFINITY, 3.4e38f};
    void *out = kt_out(&t, 4 * 2);
    KT_OK(t.ops->cast(t.dev, out, 4, kt_in(&t, x, sizeof x), SPURION_F32, 4, 1, 4));
    float *got = kt_read_act(&t, out, 4);
    assert_true(isnan(got[0]) && got[1] == INFINITY && got[2] == -INFINITY && got[3] == INFINITY);
    free(got);
    kt_close(&t);
}

static void test_rows_add_and_dot_match_loops(void **state)
{
    (void)state;
    for (size_t i = 0; i < KT_COUNT(widths); i++) {
        kt t;
        int T = 1 + 40 * (int)i, C = widths[i];
        size_t n = (size_t)(T * C);
        kt_open(&t, SPURION_F32, 2);
        float *a = kt_floats(&t, n, 1.0), *b = kt_floats(&t, n, 1.0);
        double *want = malloc(n * sizeof *want), *dots = calloc((size_t)T * 2, sizeof *dots);
        for (int k = 0; k < T * C; k++) {
            want[k] = (double)a[k] + b[k];
            dots[k / C] += (double)a[k] * b[k];
            dots[T + k / C] += (double)a[k] * b[k % C];
        }
        for (int r = 0; r < 2 * T; r++) {
            dots[r] += 0.25;
        }
        float *da = kt_in(&t, a, n * sizeof *a), *db = kt_in(&t, b, n * sizeof *b), *out = kt_out(&t, (size_t)T * 2 * sizeof *a);
        KT_OK(t.ops->dot_rows(t.dev, out, da, db, C, T, C, 0.25f));
        KT_OK(t.ops->dot_rows(t.dev, out + T, da, db, 0, T, C, 0.25f));
        KT_OK(t.ops->add(t.dev, da, db, T, C));
        float *sum = kt_read_floats(&t, da, n), *dot = kt_read_floats(&t, out, (size_t)T * 2);
        kt_near("add", sum, want, n, kt_tolerance_f32());
        kt_near("dot_rows", dot, dots, (size_t)T * 2, kt_tolerance_f32());
        free(a), free(b), free(want), free(dots), free(sum), free(dot);
        kt_close(&t);
    }
}

/* Sequences in pieces: a shared prompt, a clean completion, rows of a variant. Means in double; the gradient's rows and no others. */
static void mean_case(int C)
{
    enum { ROWS = 40, SEQS = 3, OUT = 12 };
    static const spurion_seq seqs[SEQS] = {
        {.q_position = 8, .q_count = 1, .piece_count = 2, .piece_row = {30, 0}, .piece_position = {0, 5}, .dkv_row = 0, .dkv_position = 5},
        {.q_position = 6, .q_count = 1, .piece_count = 3, .piece_row = {30, 4, 20}, .piece_position = {0, 5, 6}, .dkv_row = 4, .dkv_position = 5},
        {.q_position = 0, .q_count = 1, .piece_count = 2, .piece_row = {39, 7}, .piece_position = {0, 3}, .dkv_row = 9, .dkv_position = 0}};
    static const int rows[SEQS][9] = {{30, 31, 32, 33, 34, 0, 1, 2, 3}, {30, 31, 32, 33, 34, 4, 20}, {39}};
    static const int lengths[SEQS] = {9, 7, 1}, named[OUT] = {0, 0, 0, 0, 1, 1, -1, -1, -1, 2, -1, -1};
    kt t;
    kt_open(&t, SPURION_F32, 2);
    float *in = kt_floats(&t, (size_t)(ROWS * C), 1.0), *dout = kt_floats(&t, (size_t)(SEQS * C), 1.0);
    double *want = calloc((size_t)(SEQS * C), sizeof *want);
    for (int s = 0; s < SEQS; s++) {
        for (int c = 0; c < C; c++) {
            for (int p = 0; p < lengths[s]; p++) {
                want[s * C + c] += (double)in[rows[s][p] * C + c] / lengths[s];
            }
        }
    }
    float *out = kt_out(&t, (size_t)(SEQS * C) * sizeof *out), *dx = kt_out(&t, (size_t)(OUT * C) * sizeof *dx);
    KT_OK(t.ops->mean_rows(t.dev, out, kt_in(&t, in, (size_t)(ROWS * C) * sizeof *in), seqs, SEQS, C));
    KT_OK(t.ops->mean_rows_backward(t.dev, dx, kt_in(&t, dout, (size_t)(SEQS * C) * sizeof *dout), seqs, SEQS, C));
    float *got = kt_read_floats(&t, out, (size_t)(SEQS * C)), *grad = kt_read_floats(&t, dx, (size_t)(OUT * C));
    kt_near("mean_rows", got, want, (size_t)(SEQS * C), kt_tolerance_f32());
    for (int i = 0; i < OUT * C; i++) {
        int s = named[i / C];
        assert_true(s < 0 ? isnan(grad[i]) : fabs(grad[i] - (double)dout[s * C + i % C] / lengths[s]) < 1e-6);
    }
    free(in), free(dout), free(want), free(got), free(grad);
    kt_close(&t);
}

static void test_rows_mean_over_pieces_and_its_gradient(void **state)
{
    (void)state;
    for (size_t i = 0; i < KT_COUNT(widths); i++) {
        mean_case(widths[i]);
    }
}

static void test_rows_memory_is_aligned_copied_and_zeroed(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_F32, 1);
    static const size_t sizes[] = {0, 1, 100, 4096, (size_t)5 << 20};
    for (size_t i = 0; i < KT_COUNT(sizes); i++) {
        void *p;
        KT_OK(t.ops->alloc(t.dev, &p, sizes[i]));
        assert_non_null(p);
        assert_int_equal((uintptr_t)p % 64, 0);
        t.ops->free(t.dev, p);
    }
    float x[100], *twin = kt_out(&t, sizeof x), *in;
    for (int i = 0; i < 100; i++) {
        x[i] = (float)i;
    }
    in = kt_in(&t, x, sizeof x);
    KT_OK(t.ops->copy(t.dev, twin, in, sizeof x));
    KT_OK(t.ops->zero(t.dev, in, 50 * sizeof *x));
    KT_OK(t.ops->sync(t.dev));
    float *a = kt_read_floats(&t, twin, 100), *b = kt_read_floats(&t, in, 100);
    kt_same_bits("copy", a, x, sizeof x);
    assert_true(b[49] == 0 && b[50] == 50);
    free(a), free(b);
    kt_close(&t);
}

static void test_rows_downloads_land_when_waited_for(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_F32, 1);
    float x[100], *host, *other;
    for (int i = 0; i < 100; i++) {
        x[i] = (float)(i + 1);
    }
    void *in = kt_in(&t, x, sizeof x);
    KT_OK(t.ops->host_alloc(t.dev, (void **)&host, sizeof x));
    KT_OK(t.ops->host_alloc(t.dev, (void **)&other, 0));
    assert_int_equal((uintptr_t)host % 64, 0);
    assert_true(host[0] == 0 && host[99] == 0);
    KT_OK(t.ops->download_later(t.dev, host, in, 60 * sizeof *x));
    KT_OK(t.ops->zero(t.dev, in, sizeof x)); /* behind the copy in the stream */
    KT_OK(t.ops->download_later(t.dev, host + 60, in, 40 * sizeof *x));
    KT_OK(t.ops->download_later(t.dev, other, in, 0));
    KT_OK(t.ops->sync(t.dev));
    assert_memory_equal(host, x, 60 * sizeof *x);
    assert_true(host[60] == 0 && host[99] == 0);
    t.ops->host_free(t.dev, host);
    t.ops->host_free(t.dev, other);
    t.ops->host_free(t.dev, NULL);
    kt_close(&t);
}

static void test_rows_memory_refuses_what_the_machine_has_not(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_F32, 1);
    void *p = &t;
    assert_int_equal(t.ops->alloc(t.dev, &p, (size_t)1 << 50).code, SPURION_RESOURCE_EXHAUSTED);
    assert_null(p);
    assert_true(t.ops->memory_free(t.dev) > 0);
    kt_close(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_embed_adds_positions_and_scales),
        cmocka_unit_test(test_rows_gather_and_scatter_touch_named_rows_only),
        cmocka_unit_test(test_rows_cast_rounds_to_nearest_even),
        cmocka_unit_test(test_rows_cast_keeps_nan_and_infinity),
        cmocka_unit_test(test_rows_add_and_dot_match_loops),
        cmocka_unit_test(test_rows_mean_over_pieces_and_its_gradient),
        cmocka_unit_test(test_rows_memory_is_aligned_copied_and_zeroed),
        cmocka_unit_test(test_rows_downloads_land_when_waited_for),
        cmocka_unit_test(test_rows_memory_refuses_what_the_machine_has_not),
    };
    return cmocka_run_group_tests_name("rows", tests, NULL, NULL);
}

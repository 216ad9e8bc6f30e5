/* Products with outputs of act, and products with an activation behind them or its gradient before, against doubles: odd shapes, every kind;
 * a row alone, anywhere and in any company, bit-equal, its input kept or not. Seed 20261121. */
#include "kernel_test.h"

#include <math.h>

typedef struct shape {
    int T, N, K;
    bool bias;
} shape;

static const shape shapes[] = {{1, 10, 8, false}, {1, 34, 17, true}, {3, 64, 64, true}, {65, 192, 72, true}, {130, 98, 96, false},
                               {200, 520, 40, true}, {7, 4, 333, false}};

enum { EVERY = SPURION_FORWARD_ACT | SPURION_BACKWARD_ACT | SPURION_FORWARD_GELU | SPURION_BACKWARD_GELU };

/* Two roundings to bf16, of what stands before the activation and of what comes out; else sums of f32. */
static kt_tolerance tolerance(spurion_dtype dtype)
{
    return dtype == SPURION_BF16 ? (kt_tolerance){4e-5, 2e-1} : kt_tolerance_f32();
}

/* Host numbers of one case, rounded to what the device sees: x (T, K), dy (T, N), w (N, K), bias (N) or NULL. */
typedef struct numbers {
    float *x, *dy, *w, *bias;
} numbers;

static numbers make(kt *t, shape s)
{
    spurion_dtype dtype = t->dev->dtype;
    size_t xn = (size_t)s.T * (size_t)s.K, yn = (size_t)s.T * (size_t)s.N, wn = (size_t)s.N * (size_t)s.K;
    numbers h = {kt_floats(t, xn, 1.0), kt_floats(t, yn, 1.0), kt_floats(t, wn, 0.2), s.bias ? kt_floats(t, (size_t)s.N, 1.0) : NULL};
    kt_round_all(h.x, xn, dtype);
    kt_round_all(h.dy, yn, dtype);
    kt_round_all(h.w, wn, dtype);
    if (h.bias != NULL) {
        kt_round_all(h.bias, (size_t)s.N, dtype);
    }
    return h;
}

static void drop(numbers *h)
{
    free(h->x), free(h->dy), free(h->w), free(h->bias);
}

static double *forward(const numbers *h, shape s)
{
    double *y = malloc((size_t)s.T * (size_t)s.N * sizeof *y);
    assert_non_null(y);
    for (int i = 0; i < s.T * s.N; i++) {
        int t = i / s.N, n = i % s.N;
        y[i] = h->bias == NULL ? 0 : h->bias[n];
        for (int k = 0; k < s.K; k++) {
            y[i] += (double)h->x[t * s.K + k] * h->w[n * s.K + k];
        }
    }
    return y;
}

static double *backward(const numbers *h, shape s)
{
    double *dx = malloc((size_t)s.T * (size_t)s.K * sizeof *dx);
    assert_non_null(dx);
    for (int i = 0; i < s.T * s.K; i++) {
        int t = i / s.K, k = i % s.K;
        dx[i] = 0;
        for (int n = 0; n < s.N; n++) {
            dx[i] += (double)h->dy[t * s.N + n] * h->w[n * s.K + k];
        }
    }
    return dx;
}

/* --- outputs of act --- */

static void narrow_case(spurion_dtype dtype, shape s, int gap)
{
    kt t;
    kt_open(&t, dtype, 2);
    numbers h = make(&t, s);
    int stride = s.N + gap;
    size_t xn = (size_t)s.T * (size_t)s.K, yn = (size_t)s.T * (size_t)s.N, all = (size_t)s.T * (size_t)stride;
    spurion_matrix *m;
    KT_OK(t.ops->matrix_create(t.dev, &m, h.w, h.bias, s.N, s.K, EVERY, dtype));
    void *out = kt_out(&t, all * spurion_dtype_bytes(dtype)), *dx = kt_out(&t, xn * spurion_dtype_bytes(dtype));
    KT_OK(t.ops->linear(t.dev, out, dtype, stride, kt_in_act(&t, h.x, xn), m, s.T, SPURION_OVERWRITE));
    KT_OK(t.ops->linear_backward(t.dev, dx, dtype, kt_in_act(&t, h.dy, yn), m, s.T, SPURION_OVERWRITE));
    float *wide = kt_read_act(&t, out, all), *got = malloc(yn * sizeof *got), *back = kt_read_act(&t, dx, xn);
    for (int r = 0; r < s.T; r++) {
        memcpy(got + (size_t)r * (size_t)s.N, wide + (size_t)r * (size_t)stride, (size_t)s.N * sizeof *got);
        for (int c = s.N; c < stride; c++) {
            assert_true(wide[r * stride + c] != wide[r * stride + c]); /* still poison */
        }
    }
    double *want = forward(&h, s), *want_back = backward(&h, s);
    kt_near("linear to act", got, want, yn, tolerance(dtype));
    kt_near("linear_backward to act", back, want_back, xn, tolerance(dtype));
    t.ops->matrix_destroy(t.dev, m);
    drop(&h);
    free(wide), free(got), free(back), free(want), free(want_back);
    kt_close(&t);
}

static void test_fused_outputs_of_act_match_double_sums(void **state)
{
    (void)state;
    for (int dtype = SPURION_F32; dtype <= SPURION_BF16; dtype++) {
        for (size_t i = 0; i < KT_COUNT(shapes); i++) {
            narrow_case((spurion_dtype)dtype, shapes[i], i % 3 == 0 ? 0 : 8 + 5 * (int)(i % 2));
        }
    }
}

static void test_fused_bf16_cannot_be_added_to(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_BF16, 1);
    float *w = kt_floats(&t, 64, 1.0);
    spurion_matrix *m;
    KT_OK(t.ops->matrix_create(t.dev, &m, w, NULL, 8, 8, EVERY | SPURION_FORWARD | SPURION_BACKWARD, SPURION_BF16));
    void *x = kt_in_act(&t, w, 8), *out = kt_out(&t, 8 * 2);
    assert_int_equal(t.ops->linear(t.dev, out, SPURION_BF16, 8, x, m, 1, SPURION_ACCUMULATE).code, SPURION_INTERNAL);
    assert_int_equal(t.ops->linear_backward(t.dev, out, SPURION_BF16, x, m, 1, SPURION_ACCUMULATE).code, SPURION_INTERNAL);
    t.ops->matrix_destroy(t.dev, m);
    free(w);
    kt_close(&t);
}

/* --- activations --- */

/* One device, one matrix, its host numbers and what a product without activation should be; every kind on them. */
typedef struct fused_case {
    kt t;
    shape s;
    spurion_dtype dtype, type;
    numbers h;
    spurion_matrix *m;
    double *pre, *dout;
    void *x, *dy;
} fused_case;

static void open_case(fused_case *c, spurion_dtype dtype, spurion_dtype type, shape s)
{
    int use = type == SPURION_F32 ? SPURION_FORWARD | SPURION_BACKWARD : EVERY;
    kt_open(&c->t, dtype, 2);
    c->s = s, c->dtype = dtype, c->type = type;
    c->h = make(&c->t, s);
    c->pre = forward(&c->h, s), c->dout = backward(&c->h, s);
    KT_OK(c->t.ops->matrix_create(c->t.dev, &c->m, c->h.w, c->h.bias, s.N, s.K, use, dtype));
    c->x = kt_in_act(&c->t, c->h.x, (size_t)s.T * (size_t)s.K);
    c->dy = kt_in_act(&c->t, c->h.dy, (size_t)s.T * (size_t)s.N);
}

static void close_case(fused_case *c)
{
    c->t.ops->matrix_destroy(c->t.dev, c->m);
    drop(&c->h);
    free(c->pre), free(c->dout);
    kt_close(&c->t);
}

static void forward_case(fused_case *c, spurion_act_kind kind, int gated)
{
    kt *t = &c->t;
    shape s = c->s;
    int F = gated ? s.N / 2 : s.N;
    size_t pre_n = (size_t)s.T * (size_t)s.N, out_n = (size_t)s.T * (size_t)F, bytes = out_n * spurion_dtype_bytes(c->dtype);
    void *out = kt_out(t, bytes), *bare = kt_out(t, bytes);
    void *pre = kt_out(t, pre_n * spurion_dtype_bytes(c->type)), *scratch = kt_out(t, pre_n * spurion_dtype_bytes(c->type));
    KT_OK(t->ops->linear_act(t->dev, out, pre, c->type, true, c->x, c->m, s.T, kind, gated));
    KT_OK(t->ops->linear_act(t->dev, bare, scratch, c->type, false, c->x, c->m, s.T, kind, gated));
    double *want = malloc(out_n * sizeof *want);
    assert_non_null(want);
    for (size_t i = 0; i < out_n; i++) {
        size_t at = i / (size_t)F * (size_t)s.N + i % (size_t)F;
        want[i] = kt_act(c->pre[at], kind) * (gated ? c->pre[at + (size_t)F] : 1);
    }
    float *got = kt_read_act(t, out, out_n), *again = kt_read_act(t, bare, out_n);
    float *got_pre = c->type == SPURION_F32 ? kt_read_floats(t, pre, pre_n) : kt_read_act(t, pre, pre_n);
    kt_near("linear_act: pre", got_pre, c->pre, pre_n, tolerance(c->type));
    kt_near("linear_act", got, want, out_n, tolerance(c->dtype));
    kt_same_bits("pre kept or not", got, again, out_n * sizeof *got);
    free(want), free(got), free(again), free(got_pre);
}

static void backward_case(fused_case *c, spurion_act_kind kind, int gated)
{
    kt *t = &c->t;
    shape s = c->s;
    size_t dn = (size_t)s.T * (size_t)s.K, pn = dn * (gated ? 2 : 1);
    float *pre = kt_floats(t, pn, 2.0);
    kt_round_all(pre, pn, c->type);
    pre[0] = 1.5f; /* not silent even where there is one element */
    void *dpre = kt_out(t, pn * spurion_dtype_bytes(c->dtype)), *dout = kt_out(t, dn * spurion_dtype_bytes(c->type));
    KT_OK(t->ops->linear_act_backward(t->dev, dpre, dout, c->type, c->dy, c->m, kt_in_typed(t, pre, pn, c->type), s.T, kind, gated));
    double *want = malloc(pn * sizeof *want);
    assert_non_null(want);
    for (size_t i = 0; i < dn; i++) {
        size_t at = i / (size_t)s.K * (pn / (size_t)s.T) + i % (size_t)s.K, up = at + (size_t)s.K;
        want[at] = c->dout[i] * kt_act_slope(pre[at], kind) * (gated ? pre[up] : 1);
        if (gated) {
            want[up] = c->dout[i] * kt_act(pre[at], kind);
        }
    }
    float *got = kt_read_act(t, dpre, pn);
    kt_near("linear_act_backward", got, want, pn, tolerance(c->dtype));
    free(pre), free(want), free(got);
}

static void every_kind(spurion_dtype dtype, spurion_dtype type, shape s)
{
    fused_case c;
    open_case(&c, dtype, type, s);
    for (int kind = SPURION_ACT_GELU_TANH; kind <= SPURION_ACT_RELU; kind++) {
        for (int gated = 0; gated < 2; gated++) {
            forward_case(&c, (spurion_act_kind)kind, gated);
            backward_case(&c, (spurion_act_kind)kind, gated);
        }
    }
    close_case(&c);
}

static void test_fused_activation_and_gradient_match_libm(void **state)
{
    (void)state;
    for (size_t i = 0; i < KT_COUNT(shapes); i++) {
        every_kind(SPURION_F32, SPURION_F32, shapes[i]);
        every_kind(SPURION_BF16, SPURION_F32, shapes[i]);
        every_kind(SPURION_BF16, SPURION_BF16, shapes[i]);
    }
}

/* --- a row's company --- */

enum { ROWS = 200, FORMS = 4 };

/* Form f of rows of x (and of pre) at the given places, T of them: (T, width) widened. */
static float *run_form(kt *t, const spurion_matrix *m, int form, const float *x, const float *pre, const int *from, int T, int N)
{
    spurion_dtype dtype = t->dev->dtype;
    size_t n = (size_t)T * (size_t)N;
    float *in = malloc(n * sizeof *in), *aux = malloc(n * sizeof *aux);
    for (int r = 0; r < T; r++) {
        memcpy(in + r * N, x + from[r] * N, (size_t)N * sizeof *in);
        memcpy(aux + r * N, pre + from[r] * N, (size_t)N * sizeof *aux);
    }
    void *out = kt_out(t, n * spurion_dtype_bytes(dtype)), *scratch = kt_out(t, n * spurion_dtype_bytes(dtype)), *dx = kt_in_act(t, in, n);
    switch (form) {
    case 0:
        KT_OK(t->ops->linear(t->dev, out, dtype, N, dx, m, T, SPURION_OVERWRITE));
        break;
    case 1:
        KT_OK(t->ops->linear_backward(t->dev, out, dtype, dx, m, T, SPURION_OVERWRITE));
        break;
    case 2: /* kept or not: the same bits */
        KT_OK(t->ops->linear_act(t->dev, out, scratch, dtype, T % 2 == 1, dx, m, T, SPURION_ACT_GELU_TANH, 0));
        break;
    default:
        KT_OK(t->ops->linear_act_backward(t->dev, out, scratch, dtype, dx, m, kt_in_act(t, aux, n), T, SPURION_ACT_GELU_TANH, 0));
        break;
    }
    free(in), free(aux);
    return kt_read_act(t, out, n);
}

static void company(kt *t, const spurion_matrix *m, int form, const float *x, const float *pre, int N)
{
    static const int sizes[] = {1, 7, 64, 127, 128, 129};
    int from[ROWS];
    for (int i = 0; i < ROWS; i++) {
        from[i] = i;
    }
    float *all = run_form(t, m, form, x, pre, from, ROWS, N);
    for (size_t i = 0; i < KT_COUNT(sizes); i++) {
        for (int r = 0; r < sizes[i]; r++) { /* another place, other neighbours */
            from[r] = kt_below(t, ROWS);
        }
        float *got = run_form(t, m, form, x, pre, from, sizes[i], N);
        for (int r = 0; r < sizes[i]; r++) {
            kt_same_bits("a row in other company", got + r * N, all + from[r] * N, (size_t)N * sizeof *got);
        }
        free(got);
    }
    free(all);
}

static void every_company(spurion_dtype dtype, int N)
{
    kt t;
    kt_open(&t, dtype, 1 + N % 3);
    size_t n = (size_t)ROWS * (size_t)N;
    float *x = kt_floats(&t, n, 1.0), *pre = kt_floats(&t, n, 2.0), *w = kt_floats(&t, (size_t)N * (size_t)N, 0.1), *bias = kt_floats(&t, (size_t)N, 1.0);
    spurion_matrix *m;
    KT_OK(t.ops->matrix_create(t.dev, &m, w, bias, N, N, EVERY, dtype));
    for (int form = 0; form < FORMS; form++) {
        company(&t, m, form, x, pre, N);
    }
    t.ops->matrix_destroy(t.dev, m);
    free(x), free(pre), free(w), free(bias);
    kt_close(&t);
}

static void test_fused_row_does_not_depend_on_company(void **state)
{
    static const int widths[] = {64, 100, 333};
    (void)state;
    for (size_t i = 0; i < KT_COUNT(widths); i++) {
        every_company(SPURION_F32, widths[i]);
        every_company(SPURION_BF16, widths[i]);
    }
}

/* Whatever a library offers: no epilogue, only the one that keeps its input, two that do not agree. Emulated devices know how to play that. */
static void test_fused_falls_back_where_an_epilogue_is_missing(void **state)
{
    static const char *const offers[] = {"0", "1", "2"};
    (void)state;
    for (size_t i = 0; i < KT_COUNT(offers); i++) {
        setenv("SPURION_EMULATOR_EPILOGUES", offers[i], 1);
        every_kind(SPURION_BF16, SPURION_BF16, shapes[3]);
        every_company(SPURION_BF16, 64);
    }
    unsetenv("SPURION_EMULATOR_EPILOGUES");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fused_outputs_of_act_match_double_sums),
        cmocka_unit_test(test_fused_bf16_cannot_be_added_to),
        cmocka_unit_test(test_fused_activation_and_gradient_match_libm),
        cmocka_unit_test(test_fused_row_does_not_depend_on_company),
        cmocka_unit_test(test_fused_falls_back_where_an_epilogue_is_missing),
    };
    return cmocka_run_group_tests_name("fused", tests, NULL, NULL);
}

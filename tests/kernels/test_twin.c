/* A device against its CPU twin, op by op, on the same numbers (the other programs of this folder compare with doubles); and a sweep over M:
 * a row's product is the same bits whatever the number of rows. SPURION_TEST_DEVICE names the device. SPURION_TEST_SHAPES=real adds the
 * shapes of GPT-J-6B and Llama-3-8B to the sweep (a GPU's work: hundreds of GFLOP). Seed 20261121. */
#include "kernel_test.h"

#include <math.h>

/* The same test on two devices: buffers are made in the same order, so that seeds and places agree. */
typedef struct pair {
    kt cpu, dev;
} pair;

static void open_pair(pair *p, spurion_dtype dtype)
{
    const char *name = getenv("SPURION_TEST_DEVICE");
    char keep[32];
    assert_non_null(name); /* comparing the CPU with itself shows nothing */
    (void)snprintf(keep, sizeof keep, "%s", name);
    kt_open(&p->dev, dtype, 2);
    setenv("SPURION_TEST_DEVICE", "cpu", 1);
    kt_open(&p->cpu, dtype, 2);
    setenv("SPURION_TEST_DEVICE", keep, 1);
}

static void close_pair(pair *p)
{
    kt_close(&p->cpu);
    kt_close(&p->dev);
}

static void compare(const char *name, const float *cpu, const float *dev, size_t n, kt_tolerance tolerance)
{
    double *want = malloc((n + 1) * sizeof *want);
    assert_non_null(want);
    for (size_t i = 0; i < n; i++) {
        want[i] = cpu[i];
    }
    kt_near(name, dev, want, n, tolerance);
    free(want);
}

/* f32 results agree to a few units in the last place of sums; bf16 results may land on either side of a rounding. */
static kt_tolerance twin_tolerance(const pair *p, bool act)
{
    return act && p->cpu.dev->dtype == SPURION_BF16 ? (kt_tolerance){1e-5, 6e-2} : (kt_tolerance){1e-11, 1e-4};
}

static void rowwise(kt *t, float **norm, float **rope, float **act, float **back, int T, int C)
{
    size_t n = (size_t)T * (size_t)C;
    int heads = C > 256 ? 5 : 1;
    kt_seed(t, 7);
    float *x = kt_floats(t, 2 * n, 1.0), *w = kt_floats(t, (size_t)C, 1.0), *angles = kt_floats(t, (size_t)T * (size_t)C, 1.0);
    int32_t *positions = malloc((size_t)T * sizeof *positions);
    assert_non_null(positions);
    for (int i = 0; i < T; i++) {
        positions[i] = (i * 7) % T;
    }
    void *dx = kt_in(t, x, 2 * n * 4), *dw = kt_in(t, w, (size_t)C * 4), *table = kt_in(t, angles, n * 4), *places = kt_in(t, positions, (size_t)T * 4);
    void *a = kt_out(t, n * 4), *b = kt_out(t, n * 4), *c = kt_out(t, n * 4), *d = kt_out(t, 2 * n * 4);
    KT_OK(t->ops->norm(t->dev, NULL, a, C, NULL, dx, C, dw, dw, (spurion_rows){T, 1, C}, 1e-5f, SPURION_NORM_LAYER, SPURION_OVERWRITE));
    KT_OK(t->ops->rope_f32(t->dev, b, C, dx, C, places, table, (spurion_rows){T, heads, C / heads}, C / heads / 2 * 2, SPURION_ROPE_HALF, 0));
    KT_OK(t->ops->activation(t->dev, c, dx, SPURION_F32, T, C, SPURION_ACT_GELU_TANH, 1));
    KT_OK(t->ops->activation_backward(t->dev, d, dx, a, SPURION_F32, T, C, SPURION_ACT_SILU, 1));
    *norm = kt_read_floats(t, a, n), *rope = kt_read_floats(t, b, n), *act = kt_read_act(t, c, n), *back = kt_read_act(t, d, 2 * n);
    free(x), free(w), free(angles), free(positions);
}

static void test_twin_row_wise_ops_agree(void **state)
{
    static const int sizes[][2] = {{1, 8}, {37, 96}, {5, 250}, {130, 64}, {3, 1100}};
    (void)state;
    for (int dtype = SPURION_F32; dtype <= SPURION_BF16; dtype++) {
        for (size_t i = 0; i < KT_COUNT(sizes); i++) {
            pair p;
            float *r[2][4];
            size_t n = (size_t)sizes[i][0] * (size_t)sizes[i][1];
            open_pair(&p, (spurion_dtype)dtype);
            rowwise(&p.cpu, &r[0][0], &r[0][1], &r[0][2], &r[0][3], sizes[i][0], sizes[i][1]);
            rowwise(&p.dev, &r[1][0], &r[1][1], &r[1][2], &r[1][3], sizes[i][0], sizes[i][1]);
            compare("norm", r[0][0], r[1][0], n, twin_tolerance(&p, false));
            compare("rope_f32", r[0][1], r[1][1], n, twin_tolerance(&p, false));
            compare("activation", r[0][2], r[1][2], n, twin_tolerance(&p, true));
            compare("activation_backward", r[0][3], r[1][3], 2 * n, twin_tolerance(&p, true));
            for (int k = 0; k < 8; k++) {
                free(r[k / 4][k % 4]);
            }
            close_pair(&p);
        }
    }
}

static void products(kt *t, float **forward, float **backward, int T, int N, int K)
{
    kt_seed(t, 11);
    float *w = kt_floats(t, (size_t)N * (size_t)K, 0.1), *bias = kt_floats(t, (size_t)N, 1.0), *x = kt_floats(t, (size_t)T * (size_t)K, 1.0);
    float *dy = kt_floats(t, (size_t)T * (size_t)N, 1.0);
    spurion_matrix *m;
    KT_OK(t->ops->matrix_create(t->dev, &m, w, bias, N, K, SPURION_FORWARD | SPURION_BACKWARD, t->dev->dtype));
    float *out = kt_in(t, dy, (size_t)T * (size_t)N * 4), *dx = kt_out(t, (size_t)T * (size_t)K * 4);
    KT_OK(t->ops->linear(t->dev, out, SPURION_F32, N, kt_in_act(t, x, (size_t)T * (size_t)K), m, T, SPURION_ACCUMULATE));
    KT_OK(t->ops->linear_backward(t->dev, dx, SPURION_F32, kt_in_act(t, dy, (size_t)T * (size_t)N), m, T, SPURION_OVERWRITE));
    *forward = kt_read_floats(t, out, (size_t)T * (size_t)N);
    *backward = kt_read_floats(t, dx, (size_t)T * (size_t)K);
    t->ops->matrix_destroy(t->dev, m);
    free(w), free(bias), free(x), free(dy);
}

static void test_twin_products_agree(void **state)
{
    static const int sizes[][3] = {{1, 8, 8}, {130, 96, 64}, {257, 40, 72}, {6, 33, 17}};
    (void)state;
    for (int dtype = SPURION_F32; dtype <= SPURION_BF16; dtype++) {
        for (size_t i = 0; i < KT_COUNT(sizes); i++) {
            pair p;
            float *r[4];
            int T = sizes[i][0], N = sizes[i][1], K = sizes[i][2];
            open_pair(&p, (spurion_dtype)dtype);
            products(&p.cpu, &r[0], &r[1], T, N, K);
            products(&p.dev, &r[2], &r[3], T, N, K);
            compare("linear", r[0], r[2], (size_t)T * (size_t)N, (kt_tolerance){1e-11, 1e-4});
            compare("linear_backward", r[1], r[3], (size_t)T * (size_t)K, (kt_tolerance){1e-11, 1e-4});
            for (int k = 0; k < 4; k++) {
                free(r[k]);
            }
            close_pair(&p);
        }
    }
}

/* What a model's products have around them: outputs of act, activations behind and their gradients before. */
enum { FUSED = 4 };

static void fused(kt *t, float **r, size_t *size, int T, int N, int K, spurion_act_kind kind, int gated)
{
    kt_seed(t, 13);
    spurion_dtype mid = t->dev->dtype; /* of both, whatever suits either */
    size_t tn = (size_t)T * (size_t)N, tk = (size_t)T * (size_t)K, bytes = spurion_dtype_bytes(mid), back = tk * (gated ? 2 : 1);
    int F = gated ? N / 2 : N, use = SPURION_FORWARD_ACT | SPURION_BACKWARD_ACT | SPURION_FORWARD_GELU | SPURION_BACKWARD_GELU;
    float *w = kt_floats(t, (size_t)N * (size_t)K, 0.1), *bias = kt_floats(t, (size_t)N, 1.0), *x = kt_floats(t, tk, 1.0), *dy = kt_floats(t, tn, 1.0),
          *pre = kt_floats(t, back, 2.0);
    spurion_matrix *m;
    KT_OK(t->ops->matrix_create(t->dev, &m, w, bias, N, K, use, mid));
    void *dx = kt_in_act(t, x, tk), *ddy = kt_in_act(t, dy, tn), *out = kt_out(t, tn * bytes), *kept = kt_out(t, tn * bytes);
    void *act = kt_out(t, (size_t)T * (size_t)F * bytes), *scratch = kt_out(t, tk * bytes), *dpre = kt_out(t, back * bytes);
    KT_OK(t->ops->linear(t->dev, out, mid, N, dx, m, T, SPURION_OVERWRITE));
    KT_OK(t->ops->linear_act(t->dev, act, kept, mid, true, dx, m, T, kind, gated));
    KT_OK(t->ops->linear_act_backward(t->dev, dpre, scratch, mid, ddy, m, kt_in_act(t, pre, back), T, kind, gated));
    size[0] = tn, size[1] = tn, size[2] = (size_t)T * (size_t)F, size[3] = back;
    r[0] = kt_read_act(t, out, tn), r[1] = kt_read_act(t, kept, tn), r[2] = kt_read_act(t, act, size[2]), r[3] = kt_read_act(t, dpre, back);
    t->ops->matrix_destroy(t->dev, m);
    free(w), free(bias), free(x), free(dy), free(pre);
}

static void test_twin_fused_products_agree(void **state)
{
    static const int sizes[][3] = {{1, 8, 8}, {130, 96, 64}, {257, 40, 72}, {6, 34, 17}};
    static const char *const names[FUSED] = {"linear to act", "what is kept", "linear_act", "linear_act_backward"};
    (void)state;
    for (int dtype = SPURION_F32; dtype <= SPURION_BF16; dtype++) {
        for (size_t i = 0; i < 2 * KT_COUNT(sizes); i++) {
            pair p;
            float *r[2][FUSED];
            size_t size[FUSED];
            int gated = i % 2;
            const int *s = sizes[i / 2];
            open_pair(&p, (spurion_dtype)dtype);
            fused(&p.cpu, r[0], size, s[0], s[1], s[2], gated ? SPURION_ACT_SILU : SPURION_ACT_GELU_TANH, gated);
            fused(&p.dev, r[1], size, s[0], s[1], s[2], gated ? SPURION_ACT_SILU : SPURION_ACT_GELU_TANH, gated);
            for (int k = 0; k < FUSED; k++) {
                compare(names[k], r[0][k], r[1][k], size[k], twin_tolerance(&p, true));
                free(r[0][k]), free(r[1][k]);
            }
            close_pair(&p);
        }
    }
}

/* --- the sweep over M --- */

typedef struct sweep_shape {
    int N, K;
    bool real;
    int use; /* besides outputs in f32, both ways */
} sweep_shape;

enum {
    TO_ACT = SPURION_FORWARD_ACT,
    BACK_ACT = SPURION_BACKWARD_ACT,
    GELU = SPURION_FORWARD_GELU,
    SLOPE = SPURION_BACKWARD_GELU
};

static const sweep_shape shapes[] = {
    {96, 64, false, TO_ACT | BACK_ACT | GELU | SLOPE}, {200, 136, false, TO_ACT | BACK_ACT | GELU | SLOPE}, /* small, always */
    {4096, 4096, true, TO_ACT | BACK_ACT}, {8192, 4096, true, TO_ACT},                                     /* GPT-J-6B: q, o; kv */
    {16384, 4096, true, GELU}, {4096, 16384, true, SLOPE},                                                 /* its up; down */
    {2048, 4096, true, TO_ACT}, {28672, 4096, true, TO_ACT}, {4096, 14336, true, BACK_ACT},                /* Llama-3-8B: kv; gate and up; down */
    {65536, 4096, true, 0},                                                                                /* an SAE */
};

static void fill_weights(float *w, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        w[i] = (float)((double)((i * 2654435761u) % 20011u) / 20011.0 - 0.5) * 0.05f;
    }
}

/* The forms of a product: bf16 outputs, GELU behind with its input kept and without, its derivative. */
static spurion_status run_form(kt *t, int form, void *out, void *pre, bool keep, int outputs, const void *in, const spurion_matrix *m, int T)
{
    spurion_dtype act = t->dev->dtype;
    switch (form) {
    case SPURION_FORWARD:
        return t->ops->linear(t->dev, out, SPURION_F32, outputs, in, m, T, SPURION_OVERWRITE);
    case SPURION_BACKWARD:
        return t->ops->linear_backward(t->dev, out, SPURION_F32, in, m, T, SPURION_OVERWRITE);
    case TO_ACT:
        return t->ops->linear(t->dev, out, act, outputs, in, m, T, SPURION_OVERWRITE);
    case BACK_ACT:
        return t->ops->linear_backward(t->dev, out, act, in, m, T, SPURION_OVERWRITE);
    case GELU:
        return t->ops->linear_act(t->dev, out, pre, act, keep, in, m, T, SPURION_ACT_GELU_TANH, 0);
    default: /* dout is not read, so that pre serves as both where there is no epilogue */
        return t->ops->linear_act_backward(t->dev, out, (char *)pre + (size_t)T * (size_t)outputs * spurion_dtype_bytes(act), act, in, m, pre, T,
                                           SPURION_ACT_GELU_TANH, 0);
    }
}

/* Rows 0 .. M - 1 of one input, for every M of the list, against the same rows of the longest run; runs of even place do not keep pre. */
static void sweep(kt *t, const spurion_matrix *m, int outputs, int inner, int form, const int *sizes, int count)
{
    int most = sizes[count - 1];
    float *x = kt_floats(t, (size_t)most * (size_t)inner, 1.0);
    void *in = m == NULL ? NULL : kt_in_act(t, x, (size_t)most * (size_t)inner);
    float *all = NULL;
    bool wide = form == SPURION_FORWARD || form == SPURION_BACKWARD;
    void *pre = NULL;
    if (form == GELU || form == SLOPE) {
        size_t n = (size_t)most * (size_t)outputs;
        KT_OK(t->ops->alloc(t->dev, &pre, 2 * n * spurion_dtype_bytes(t->dev->dtype)));
        KT_OK(t->ops->zero(t->dev, pre, 2 * n * spurion_dtype_bytes(t->dev->dtype)));
    }
    for (int i = count - 1; i >= 0; i--) {
        size_t n = (size_t)sizes[i] * (size_t)outputs, bytes = n * sizeof(float);
        void *out;
        KT_OK(t->ops->alloc(t->dev, &out, bytes));
        KT_OK(run_form(t, form, out, pre, i % 2 == 1, outputs, in, m, sizes[i]));
        float *got = wide ? kt_read_floats(t, out, n) : kt_read_act(t, out, n);
        t->ops->free(t->dev, out);
        if (all == NULL) {
            all = got;
            continue;
        }
        kt_same_bits("rows of a shorter run", got, all, bytes);
        free(got);
    }
    t->ops->free(t->dev, pre);
    free(x), free(all);
}

static void test_twin_row_is_the_same_whatever_m_is(void **state)
{
    static const int small[] = {1, 2, 7, 16, 63, 64, 65, 127, 128, 129, 200, 256, 300}, large[] = {1, 3, 64, 127, 128, 129, 255, 512, 1000, 1024, 2000, 2048};
    const char *real = getenv("SPURION_TEST_SHAPES");
    bool with_real = real != NULL && strcmp(real, "real") == 0;
    (void)state;
    for (int dtype = SPURION_F32; dtype <= SPURION_BF16; dtype++) {
        for (size_t i = 0; i < KT_COUNT(shapes); i++) {
            const sweep_shape *s = &shapes[i];
            if (s->real && (!with_real || (dtype == SPURION_F32 && s->N != 65536))) { /* models run in bf16, SAEs in f32 */
                continue;
            }
            kt t;
            spurion_matrix *m;
            float *w = malloc((size_t)s->N * (size_t)s->K * sizeof *w), *bias = calloc((size_t)s->N, sizeof *bias);
            assert_non_null(w);
            assert_non_null(bias);
            fill_weights(w, (size_t)s->N * (size_t)s->K);
            kt_open(&t, (spurion_dtype)dtype, 2);
            int use = SPURION_FORWARD | SPURION_BACKWARD | s->use, forms = 0;
            KT_OK(t.ops->matrix_create(t.dev, &m, w, i % 2 ? bias : NULL, s->N, s->K, use, (spurion_dtype)dtype));
            for (int form = SPURION_FORWARD; form <= SLOPE; form *= 2) {
                bool forward = form & (SPURION_FORWARD | TO_ACT | GELU);
                if (use & form) {
                    sweep(&t, m, forward ? s->N : s->K, forward ? s->K : s->N, form, s->real ? large : small, s->real ? (int)KT_COUNT(large) : (int)KT_COUNT(small));
                    forms++;
                }
            }
            printf("%s (N %d, K %d): the same bits for every M, %d forms\n", dtype == SPURION_BF16 ? "bf16" : "f32", s->N, s->K, forms);
            t.ops->matrix_destroy(t.dev, m);
            free(w), free(bias);
            kt_close(&t);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_twin_row_wise_ops_agree),
        cmocka_unit_test(test_twin_products_agree),
        cmocka_unit_test(test_twin_fused_products_agree),
        cmocka_unit_test(test_twin_row_is_the_same_whatever_m_is),
    };
    return cmocka_run_group_tests_name("twin", tests, NULL, NULL);
}

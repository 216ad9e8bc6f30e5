/* SAE ops against plain loops in double: every kind, every norm, ties, overflow, odd shapes; bit-equal alone, in company, on any
 * thread count. Seed 20261121. */
#include "kernel_test.h"

#include <math.h>

typedef struct sae_case {
    int T, d, F, k, slots;
    spurion_sae_kind kind;
    spurion_sae_norm norm;
    bool scaled;
    int use; /* of the encoder: 0 stands for SPURION_FORWARD */
} sae_case;

static const sae_case cases[] = {
    {1, 8, 16, 0, 16, SPURION_SAE_RELU, SPURION_SAE_NORM_NONE, false, 0},
    {70, 33, 700, 0, 700, SPURION_SAE_RELU, SPURION_SAE_NORM_NONE, true, 0},
    {65, 64, 1000, 0, 120, SPURION_SAE_JUMPRELU, SPURION_SAE_NORM_NONE, false, 0},
    {9, 40, 333, 0, 333, SPURION_SAE_JUMPRELU, SPURION_SAE_NORM_RESCALE, true, 0},
    {130, 48, 1100, 32, 32, SPURION_SAE_TOPK, SPURION_SAE_NORM_NONE, true, 0},
    {3, 24, 3000, 200, 200, SPURION_SAE_TOPK, SPURION_SAE_NORM_LAYER, false, 0},
    {5, 16, 40, 40, 40, SPURION_SAE_TOPK, SPURION_SAE_NORM_NONE, false, 0},
    {64, 72, 900, 0, 900, SPURION_SAE_GATED, SPURION_SAE_NORM_NONE, false, 0},
    {7, 33, 600, 0, 600, SPURION_SAE_GATED, SPURION_SAE_NORM_LAYER, false, 0},
    {2, 8, 20000, 40, 40, SPURION_SAE_TOPK, SPURION_SAE_NORM_NONE, true, 0},
    {2, 9, 9001, 0, 9001, SPURION_SAE_RELU, SPURION_SAE_NORM_NONE, false, 0},
    {66, 40, 1024, 16, 16, SPURION_SAE_GROUPMAX, SPURION_SAE_NORM_NONE, false, 0},
    {4, 24, 693, 99, 99, SPURION_SAE_GROUPMAX, SPURION_SAE_NORM_RESCALE, true, 0},
};

/* Host copies of a dictionary, and the same on the device. */
typedef struct sae_data {
    sae_case c;
    float *w, *bias, *threshold, *scale, *gate, *mag_scale, *mag, *dec, *dec_bias, *x;
    spurion_sae_weights dev;
} sae_data;

static float *positive(float *x, int n, float least)
{
    for (int i = 0; i < n; i++) {
        x[i] = fabsf(x[i]) + least;
    }
    return x;
}

static sae_data make(kt *t, sae_case c, spurion_dtype dtype)
{
    size_t F = (size_t)c.F, d = (size_t)c.d;
    sae_data s = {.c = c, .w = kt_floats(t, F * d, 1 / sqrt((double)c.d)), .bias = kt_floats(t, F, 0.3)};
    s.threshold = positive(kt_floats(t, F, 0.5), c.F, 0.3f);
    s.scale = positive(kt_floats(t, F, 1.0), c.F, 0.5f);
    s.gate = kt_floats(t, F, 0.5), s.mag_scale = positive(kt_floats(t, F, 0.5), c.F, 0.5f), s.mag = kt_floats(t, F, 0.5);
    s.dec = kt_floats(t, F * d, 0.3), s.dec_bias = kt_floats(t, d, 0.5), s.x = kt_floats(t, (size_t)c.T * d, 1.0);
    for (int i = 0; i < c.T * c.d; i++) {
        s.x[i] += 0.25f;
    }
    spurion_sae_weights *g = &s.dev;
    *g = (spurion_sae_weights){.d = c.d, .F = c.F, .kind = c.kind, .norm = c.norm, .k = c.k, .slots = c.slots};
    KT_OK(t->ops->matrix_create(t->dev, &g->enc, s.w, c.kind == SPURION_SAE_GATED ? NULL : s.bias, c.F, c.d, c.use ? c.use : SPURION_FORWARD,
                               dtype));
    g->threshold = kt_in(t, s.threshold, F * 4), g->scale = c.scaled ? kt_in(t, s.scale, F * 4) : NULL;
    g->gate_bias = kt_in(t, s.gate, F * 4), g->mag_scale = kt_in(t, s.mag_scale, F * 4), g->mag_bias = kt_in(t, s.mag, F * 4);
    g->dec = kt_in(t, s.dec, F * d * 4), g->dec_bias = kt_in(t, s.dec_bias, d * 4);
    kt_round_all(s.w, F * d, dtype);
    return s;
}

static void drop(kt *t, sae_data *s)
{
    t->ops->matrix_destroy(t->dev, s->dev.enc);
    free(s->w), free(s->bias), free(s->threshold), free(s->scale), free(s->gate), free(s->mag_scale), free(s->mag), free(s->dec);
    free(s->dec_bias), free(s->x);
}

/* --- reference --- */

static void token_norm(double *u, double *scale, double *shift, const float *x, int d, spurion_sae_norm kind)
{
    double mean = 0, square = 0;
    for (int i = 0; i < d; i++) {
        mean += (double)x[i] / d;
    }
    *shift = kind == SPURION_SAE_NORM_LAYER ? mean : 0;
    for (int i = 0; i < d; i++) {
        square += (x[i] - *shift) * (x[i] - *shift);
    }
    *scale = kind == SPURION_SAE_NORM_LAYER ? sqrt(square / (d - 1)) : kind == SPURION_SAE_NORM_RESCALE ? sqrt(square / d) : 1;
    for (int i = 0; i < d; i++) {
        u[i] = (x[i] - *shift) / (*scale + (kind == SPURION_SAE_NORM_LAYER ? 1e-5 : 0));
    }
}

/* What selection looks at, for one token: not positive where silent. Gives margins too: how far from another decision, per feature. */
static void dense(double *f, double *margin, const sae_data *s, const double *u, spurion_dtype dtype)
{
    for (int i = 0; i < s->c.F; i++) {
        double p = 0, h = s->c.scaled ? s->scale[i] : 1.0;
        for (int k = 0; k < s->c.d; k++) {
            p += (double)kt_round((float)u[k], dtype) * s->w[i * s->c.d + k];
        }
        margin[i] = 1e9;
        if (s->c.kind == SPURION_SAE_GATED) {
            double gate = p + s->gate[i];
            margin[i] = fabs(gate);
            f[i] = gate > 0 ? p * s->mag_scale[i] + s->mag[i] : 0;
        } else {
            f[i] = (p + s->bias[i]) * h;
        }
        if (s->c.kind == SPURION_SAE_JUMPRELU) {
            margin[i] = fabs(f[i] - s->threshold[i]);
            f[i] = f[i] > s->threshold[i] ? f[i] : 0;
        }
    }
}

/* Leaves only what the kind keeps: the k largest, or each group's largest. Ties to the lowest index. */
static void keep_top(double *f, int n, int k)
{
    char *kept = calloc((size_t)n, 1);
    for (int r = 0; r < k && r < n; r++) {
        int best = 0;
        while (best < n - 1 && kept[best]) {
            best++;
        }
        for (int i = best + 1; i < n; i++) {
            if (!kept[i] && f[i] > f[best]) {
                best = i;
            }
        }
        kept[best] = 1;
    }
    for (int i = 0; i < n; i++) {
        f[i] = kept[i] ? f[i] : 0;
    }
    free(kept);
}

static void select_reference(double *f, const sae_case *c)
{
    if (c->kind == SPURION_SAE_TOPK) {
        keep_top(f, c->F, c->k);
    } else if (c->kind == SPURION_SAE_GROUPMAX) {
        for (int g = 0; g < c->k; g++) {
            keep_top(f + g * (c->F / c->k), c->F / c->k, 1);
        }
    }
    for (int i = 0; i < c->F; i++) {
        f[i] = f[i] > 0 ? f[i] : 0;
    }
}

/* --- the op --- */

typedef struct sparse_copy {
    int32_t *count, *index;
    float *value, *scale, *shift;
    spurion_sparse dev;
} sparse_copy;

static sparse_copy encode(kt *t, const sae_data *s, const float *x, int T)
{
    size_t n = (size_t)(T * s->c.slots);
    sparse_copy r = {.count = malloc((size_t)T * 4), .index = malloc(n * 4), .value = malloc(n * 4), .scale = malloc((size_t)T * 4),
                     .shift = malloc((size_t)T * 4)};
    r.dev = (spurion_sparse){kt_out(t, (size_t)T * 4), kt_out(t, n * 4), kt_out(t, n * 4), kt_out(t, (size_t)T * 4),
                             kt_out(t, (size_t)T * 4), s->c.slots};
    size_t bytes = t->ops->sae_scratch_bytes(t->dev, &s->dev, T);
    KT_OK(t->ops->sae_encode(t->dev, &r.dev, &s->dev, kt_in(t, x, (size_t)(T * s->c.d) * 4), kt_out(t, bytes), T));
    kt_read(t, r.count, r.dev.count, (size_t)T * 4), kt_read(t, r.index, r.dev.index, n * 4), kt_read(t, r.value, r.dev.value, n * 4);
    kt_read(t, r.scale, r.dev.token_scale, (size_t)T * 4), kt_read(t, r.shift, r.dev.token_shift, (size_t)T * 4);
    return r;
}

static void drop_sparse(sparse_copy *r)
{
    free(r->count), free(r->index), free(r->value), free(r->scale), free(r->shift);
}

static int held(const sparse_copy *r, int t)
{
    return r->count[t] < r->dev.slots ? r->count[t] : r->dev.slots;
}

/* A token's list against the dense reference. Features within 1e-5 of a decision may go either way; the counts say how many. */
static void check_token(const sae_data *s, const sparse_copy *r, int t, const double *f, const double *margin, double tolerance)
{
    int F = s->c.F, slots = s->c.slots, at = 0, active = 0;
    double floor = 1e9;
    for (int i = 0; i < F; i++) {
        active += f[i] > 0;
        floor = f[i] > 0 && f[i] < floor ? f[i] : floor;
    }
    assert_true(abs(r->count[t] - active) <= (s->c.kind == SPURION_SAE_TOPK ? 0 : 2));
    for (int i = 0; i < F && at < held(r, t); i++) {
        bool listed = r->index[t * slots + at] == i;
        bool near = margin[i] < 1e-5 || fabs(f[i]) < 1e-5 || fabs(f[i] - floor) < 1e-5;
        if (listed != (f[i] > 0) && !near) {
            fail_msg("token %d feature %d: reference %.9g, listed %d", t, i, f[i], (int)listed);
        }
        if (listed && f[i] > 0) {
            assert_true(fabs(r->value[t * slots + at] - f[i]) <= tolerance * (1 + fabs(f[i])));
        }
        at += listed;
    }
    assert_int_equal(at, held(r, t)); /* every entry was met, in ascending order */
    for (; at < slots; at++) {
        assert_int_equal(r->index[t * slots + at], -1); /* poison behind the list */
    }
}

static void encode_case(spurion_dtype device, spurion_dtype dtype, sae_case c)
{
    kt t;
    kt_open(&t, device, 2);
    sae_data s = make(&t, c, dtype);
    sparse_copy r = encode(&t, &s, s.x, c.T);
    double *f = malloc((size_t)c.F * 8), *margin = malloc((size_t)c.F * 8), u[100], scale, shift;
    for (int i = 0; i < c.T; i++) {
        token_norm(u, &scale, &shift, s.x + i * c.d, c.d, c.norm);
        assert_true(fabs(r.scale[i] - scale) <= 1e-6 * scale && fabs(r.shift[i] - shift) <= 1e-6);
        dense(f, margin, &s, u, dtype);
        select_reference(f, &c);
        check_token(&s, &r, i, f, margin, dtype == SPURION_F32 ? 1e-5 : c.norm == SPURION_SAE_NORM_NONE ? 1e-5 : 2e-2);
    }
    free(f), free(margin);
    drop_sparse(&r);
    drop(&t, &s);
    kt_close(&t);
}

static void test_sae_encode_matches_loops(void **state)
{
    (void)state;
    for (size_t i = 0; i < KT_COUNT(cases); i++) {
        encode_case(SPURION_F32, SPURION_F32, cases[i]);
        encode_case(SPURION_BF16, SPURION_F32, cases[i]); /* a dictionary in f32 on a bf16 device */
        if (cases[i].kind != SPURION_SAE_GROUPMAX) {
            sae_case screened = cases[i];
            screened.use = SPURION_SELECT;
            encode_case(SPURION_F32, SPURION_F32, screened);
            encode_case(SPURION_BF16, SPURION_F32, screened);
        }
        if (cases[i].norm == SPURION_SAE_NORM_NONE) {     /* with a norm a rounding of u may flip decisions: no exact reference */
            encode_case(SPURION_BF16, SPURION_BF16, cases[i]);
        }
    }
}

/* Exact top-k under ties: whole numbers, many equal. */
static void test_sae_topk_gives_ties_to_the_lowest_index(void **state)
{
    (void)state;
    enum { F = 2000, T = 6 };
    for (int k = 1, use = SPURION_FORWARD; k <= 300; k = use == SPURION_FORWARD ? k : k * 3 + 1, use ^= SPURION_FORWARD ^ SPURION_SELECT) {
        kt t;
        kt_open(&t, SPURION_F32, 2);
        sae_data s = make(&t, (sae_case){T, 1, F, k, k, SPURION_SAE_TOPK, SPURION_SAE_NORM_NONE, false, 0}, SPURION_F32);
        t.ops->matrix_destroy(t.dev, s.dev.enc);
        double f[F];
        for (int i = 0; i < F; i++) {
            s.w[i] = (float)kt_below(&t, 40) - 20.0f;
        }
        KT_OK(t.ops->matrix_create(t.dev, &s.dev.enc, s.w, NULL, F, 1, use, SPURION_F32));
        for (int i = 0; i < T; i++) {
            s.x[i] = (float)(i - 2); /* negative, zero, positive: orders of selection of their own */
        }
        sparse_copy r = encode(&t, &s, s.x, T);
        for (int i = 0; i < T; i++) {
            for (int n = 0; n < F; n++) {
                f[n] = (double)s.x[i] * s.w[n];
            }
            select_reference(f, &s.c);
            int at = 0;
            for (int n = 0; n < F; n++) {
                if (f[n] > 0) {
                    assert_int_equal(r.index[i * k + at], n);
                    assert_true(r.value[i * k + at++] == (float)f[n]);
                }
            }
            assert_int_equal(r.count[i], at);
        }
        drop_sparse(&r);
        drop(&t, &s);
        kt_close(&t);
    }
}

/* Rows that tell features apart by less than bf16 does: no bound excludes anybody, and top-k is exact all the same. */
static void test_sae_topk_is_exact_where_all_features_are_alike(void **state)
{
    (void)state;
    enum { F = 6000, K = 30 };
    kt t;
    kt_open(&t, SPURION_F32, 2);
    sae_data s = make(&t, (sae_case){3, 4, F, K, K, SPURION_SAE_TOPK, SPURION_SAE_NORM_NONE, false, 0}, SPURION_F32);
    t.ops->matrix_destroy(t.dev, s.dev.enc);
    for (int i = 0; i < F; i++) { /* multiples of 2^-20 above 1: exact in f32, all the same in bf16 */
        float more = (float)(i * 7919 % 2000) * 0x1p-20f;
        for (int c = 0; c < 4; c++) {
            s.w[i * 4 + c] = c == 0 ? 1.0f + more : 0.0f;
        }
    }
    for (int i = 0; i < 12; i++) {
        s.x[i] = i % 4 == 0 ? 1.0f : 0.5f;
    }
    KT_OK(t.ops->matrix_create(t.dev, &s.dev.enc, s.w, NULL, F, 4, SPURION_SELECT, SPURION_F32));
    sparse_copy r = encode(&t, &s, s.x, 3);
    double f[F];
    for (int i = 0; i < F; i++) {
        f[i] = (double)s.w[i * 4];
    }
    select_reference(f, &s.c);
    for (int row = 0, at = 0; row < 3; row++, at = 0) {
        for (int i = 0; i < F; i++) {
            if (f[i] > 0) {
                assert_int_equal(r.index[row * K + at], i);
                assert_true(r.value[row * K + at++] == (float)f[i]);
            }
        }
        assert_int_equal(r.count[row], K);
    }
    drop_sparse(&r);
    drop(&t, &s);
    kt_close(&t);
}

static void test_sae_lists_say_when_they_overflow(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_F32, 2);
    sae_case small = {5, 16, 900, 0, 10, SPURION_SAE_RELU, SPURION_SAE_NORM_NONE, false, 0}, large = small;
    large.slots = 900;
    sae_data s = make(&t, small, SPURION_F32);
    sparse_copy r = encode(&t, &s, s.x, 5);
    s.c.slots = s.dev.slots = large.slots;
    sparse_copy whole = encode(&t, &s, s.x, 5);
    for (int i = 0; i < 5; i++) {
        assert_true(r.count[i] > 10);
        assert_int_equal(r.count[i], whole.count[i]);
        kt_same_bits("the first entries", r.index + i * 10, whole.index + i * 900, 40);
        kt_same_bits("the first values", r.value + i * 10, whole.value + i * 900, 40);
    }
    drop_sparse(&r), drop_sparse(&whole);
    drop(&t, &s);
    kt_close(&t);
}

static void test_sae_token_does_not_depend_on_company_or_threads(void **state)
{
    (void)state;
    for (size_t n = 0; n < KT_COUNT(cases); n++) {
        sae_case c = cases[n];
        c.use = n % 2 || c.kind == SPURION_SAE_GROUPMAX ? SPURION_FORWARD : SPURION_SELECT;
        kt t, many;
        kt_open(&t, SPURION_BF16, 1);
        sae_data s = make(&t, c, n % 2 ? SPURION_BF16 : SPURION_F32);
        kt_open(&many, SPURION_BF16, 4); /* more spans per row */
        sae_data twin = make(&many, c, n % 2 ? SPURION_BF16 : SPURION_F32);
        sparse_copy all = encode(&t, &s, s.x, c.T), spans = encode(&many, &twin, s.x, c.T);
        for (int i = 0; i < c.T; i += 1 + c.T / 7) {
            sparse_copy one = encode(&t, &s, s.x + i * c.d, 1);
            for (int k = 0; k < 2; k++) {
                const sparse_copy *other = k == 0 ? &all : &spans;
                assert_int_equal(one.count[0], other->count[i]);
                kt_same_bits("index", one.index, other->index + i * c.slots, (size_t)held(&one, 0) * 4);
                kt_same_bits("value", one.value, other->value + i * c.slots, (size_t)held(&one, 0) * 4);
            }
            drop_sparse(&one);
        }
        drop_sparse(&all), drop_sparse(&spans);
        drop(&many, &twin);
        drop(&t, &s);
        kt_close(&many);
        kt_close(&t);
    }
}

/* Gathers rows of the dictionary that encoded `s` into a dictionary of its own. */
static spurion_sae_weights part_of(kt *t, const sae_data *s, const int32_t *member, int count, spurion_dtype dtype)
{
    spurion_sae_weights g = s->dev;
    size_t n = (size_t)count, d = (size_t)s->c.d;
    float *w = malloc(n * d * 4), *rows[6] = {s->bias, s->threshold, s->scale, s->gate, s->mag_scale, s->mag}, *to[6];
    for (int k = 0; k < 6; k++) {
        to[k] = malloc(n * 4);
        for (int i = 0; i < count; i++) {
            to[k][i] = rows[k][member[i]];
        }
    }
    for (int i = 0; i < count; i++) {
        memcpy(w + (size_t)i * d, s->w + (size_t)member[i] * d, d * 4);
    }
    g.F = g.slots = count;
    KT_OK(t->ops->matrix_create(t->dev, &g.enc, w, s->c.kind == SPURION_SAE_GATED ? NULL : to[0], count, s->c.d, s->c.use ? s->c.use : SPURION_FORWARD,
                                dtype));
    g.threshold = kt_in(t, to[1], n * 4), g.scale = s->c.scaled ? kt_in(t, to[2], n * 4) : NULL, g.gate_bias = kt_in(t, to[3], n * 4);
    g.mag_scale = kt_in(t, to[4], n * 4), g.mag_bias = kt_in(t, to[5], n * 4);
    for (int k = 0; k < 6; k++) {
        free(to[k]);
    }
    free(w);
    return g;
}

/* Every 7th feature watched: their lists are what the whole encode gives of them. */
static void members_case(sae_case c, int threads)
{
    kt t;
    kt_open(&t, SPURION_BF16, threads);
    sae_data s = make(&t, c, SPURION_F32);
    int32_t member[3000];
    int count = 0;
    for (int i = 3; i < c.F; i += 7) {
        member[count++] = i;
    }
    spurion_sae_weights part = part_of(&t, &s, member, count, SPURION_F32);
    sparse_copy all = encode(&t, &s, s.x, c.T);
    size_t n = (size_t)(c.T * count), bytes = t.ops->sae_scratch_bytes(t.dev, &s.dev, c.T), more = t.ops->sae_scratch_bytes(t.dev, &part, c.T);
    int32_t *counts = malloc((size_t)c.T * 4), *index = malloc(n * 4), seen = 0;
    float *value = malloc(n * 4);
    spurion_sparse out = {kt_out(&t, (size_t)c.T * 4), kt_out(&t, n * 4), kt_out(&t, n * 4), kt_out(&t, (size_t)c.T * 4),
                          kt_out(&t, (size_t)c.T * 4), count};
    KT_OK(t.ops->sae_encode_members(t.dev, &out, &s.dev, &part, kt_in(&t, member, (size_t)count * 4), kt_in(&t, s.x, (size_t)(c.T * c.d) * 4),
                                    kt_out(&t, bytes > more ? bytes : more), c.T));
    kt_read(&t, counts, out.count, (size_t)c.T * 4), kt_read(&t, index, out.index, n * 4), kt_read(&t, value, out.value, n * 4);
    for (int r = 0; r < c.T; r++) {
        int at = 0;
        for (int i = 0; i < held(&all, r); i++) {
            size_t from = (size_t)(r * c.slots + i);
            if (all.index[from] % 7 == 3) {
                assert_true(at < counts[r]);
                assert_int_equal(index[r * count + at], all.index[from]);
                /* the same bits where features are screened; elsewhere the library sums a smaller matrix in an order of its own */
                assert_true(fabsf(value[r * count + at] - all.value[from]) <= 1e-6f * (1 + fabsf(all.value[from])));
                at++;
            }
        }
        assert_int_equal(at, counts[r]);
        seen += at;
    }
    assert_true(seen > 0);
    free(counts), free(index), free(value);
    drop_sparse(&all);
    t.ops->matrix_destroy(t.dev, part.enc);
    drop(&t, &s);
    kt_close(&t);
}

static void test_sae_members_are_listed_as_in_the_whole_encode(void **state)
{
    (void)state;
    for (size_t i = 0; i < KT_COUNT(cases); i++) {
        sae_case c = cases[i];
        if (c.kind == SPURION_SAE_GROUPMAX || c.F < 100) {
            continue;
        }
        c.slots = c.kind == SPURION_SAE_TOPK ? c.k : c.F;
        members_case(c, 1);
        c.use = SPURION_SELECT;
        members_case(c, 1);
        members_case(c, 4);
    }
    sae_case large = {300, 32, 3000, 20, 20, SPURION_SAE_TOPK, SPURION_SAE_NORM_NONE, false, SPURION_SELECT}; /* rows settle chunk by chunk */
    members_case(large, 2);
    large.use = SPURION_FORWARD;
    members_case(large, 2);
}

/* Scratch for many rows serves few rows too. */
static void test_sae_scratch_grows_with_rows(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_F32, 8);
    sae_data s = make(&t, (sae_case){1, 8, 4000, 20, 20, SPURION_SAE_TOPK, SPURION_SAE_NORM_NONE, false, 0}, SPURION_F32);
    size_t before = 0;
    for (int T = 1; T < 5000; T += 61) {
        size_t bytes = t.ops->sae_scratch_bytes(t.dev, &s.dev, T);
        assert_true(bytes >= before);
        before = bytes;
    }
    drop(&t, &s);
    kt_close(&t);
}

/* --- what is done with the lists --- */

typedef struct sets {
    int32_t begin[4], index[64];
    float least[64];
    int32_t row_set[200];
} sets;

/* Set 0: nothing; set 1: features of token 0; set 2: some others and a bar that some do not reach. */
static sets make_sets(kt *t, const sparse_copy *r, int T, int F)
{
    sets s = {.begin = {0, 0, 0, 0}};
    int n = held(r, 0) < 20 ? held(r, 0) : 20;
    memcpy(s.index, r->index, (size_t)n * 4);
    s.begin[2] = n;
    for (int i = 0; i < F && n < 64; i += 1 + kt_below(t, 1 + F / 40)) {
        s.least[n] = (float)kt_uniform(t);
        s.index[n++] = i;
    }
    s.begin[3] = n;
    for (int i = 0; i < T; i++) {
        s.row_set[i] = i == 0 ? 1 : kt_below(t, 4) - 1;
    }
    return s;
}

static void sparse_reference(double *attribution, double *left, double *bias, double *shrunk, const sae_data *s, const sparse_copy *r,
                             const sets *z, const float *g, const float *a)
{
    int d = s->c.d, slots = s->c.slots;
    for (int t = 0; t < s->c.T; t++) {
        bias[t] = 0;
        for (int c = 0; c < d; c++) {
            double b = (double)s->dec_bias[c] * r->scale[t] + r->shift[t];
            bias[t] += b * g[t * d + c];
            left[t * d + c] = s->x[t * d + c];
            shrunk[t * d + c] = (1.0 - a[t]) * (s->x[t * d + c] - b) + b;
        }
        for (int e = 0; e < slots; e++) {
            double dot = 0, v = e < held(r, t) ? r->value[t * slots + e] * (double)r->scale[t] : 0;
            const float *row = s->dec + (e < held(r, t) ? r->index[t * slots + e] : 0) * d;
            bool gone = false;
            for (int m = z->row_set[t] < 0 ? 64 : z->begin[z->row_set[t]]; m < 64 && m < z->begin[z->row_set[t] + 1]; m++) {
                gone = gone || (z->index[m] == r->index[t * slots + e] && r->value[t * slots + e] > z->least[m]);
            }
            for (int c = 0; c < d; c++) {
                dot += (double)row[c] * g[t * d + c];
                left[t * d + c] -= gone && e < held(r, t) ? v * row[c] : 0;
            }
            attribution[t * slots + e] = v * dot;
        }
    }
}

static void sparse_case(sae_case c)
{
    kt t;
    kt_open(&t, SPURION_F32, 2);
    sae_data s = make(&t, c, SPURION_F32);
    sparse_copy r = encode(&t, &s, s.x, c.T);
    size_t n = (size_t)(c.T * c.d), entries = (size_t)(c.T * c.slots), T = (size_t)c.T;
    float *g = kt_floats(&t, n, 1.0), *a = kt_floats(&t, T, 0.4);
    sets z = make_sets(&t, &r, c.T, c.F);
    double *want = malloc(entries * 8), *left = malloc(n * 8), *bias = malloc(T * 8), *shrunk = malloc(n * 8);
    a[0] = 1.0f;
    sparse_reference(want, left, bias, shrunk, &s, &r, &z, g, a);

    float *out = kt_out(&t, entries * 4), *x = kt_in(&t, s.x, n * 4), *dots = kt_out(&t, T * 4), *y = kt_in(&t, s.x, n * 4), *dg = kt_in(&t, g, n * 4);
    spurion_sae_sets dz = {kt_in(&t, z.begin, sizeof z.begin), kt_in(&t, z.index, sizeof z.index), kt_in(&t, z.least, sizeof z.least)};
    KT_OK(t.ops->sae_attribute(t.dev, out, &r.dev, &s.dev, dg, c.T));
    KT_OK(t.ops->sae_subtract(t.dev, x, &r.dev, &s.dev, &dz, kt_in(&t, z.row_set, T * 4), c.T));
    KT_OK(t.ops->sae_bias_dot(t.dev, dots, &r.dev, &s.dev, dg, c.T));
    KT_OK(t.ops->sae_shrink(t.dev, y, &r.dev, &s.dev, kt_in(&t, a, T * 4), c.T));
    float *got[4] = {kt_read_floats(&t, out, entries), kt_read_floats(&t, x, n), kt_read_floats(&t, dots, T), kt_read_floats(&t, y, n)};
    kt_near("sae_attribute", got[0], want, entries, (kt_tolerance){1e-11, 1e-3});
    kt_near("sae_subtract", got[1], left, n, (kt_tolerance){1e-10, 1e-3});
    kt_near("sae_bias_dot", got[2], bias, T, kt_tolerance_f32());
    kt_near("sae_shrink", got[3], shrunk, n, kt_tolerance_f32());
    for (int k = 0; k < c.d; k++) { /* a = 1: b(t) itself */
        assert_true(got[3][k] == s.dec_bias[k] * r.scale[0] + r.shift[0]);
    }
    for (int i = 0; i < c.T; i++) { /* no set: not touched */
        if (z.row_set[i] <= 0) {
            kt_same_bits("untouched", got[1] + i * c.d, s.x + i * c.d, (size_t)c.d * 4);
        }
    }
    for (int i = 0; i < 4; i++) {
        free(got[i]);
    }
    free(g), free(a), free(want), free(left), free(bias), free(shrunk);
    drop_sparse(&r);
    drop(&t, &s);
    kt_close(&t);
}

static void test_sae_lists_attribute_subtract_and_shrink(void **state)
{
    (void)state;
    for (size_t i = 0; i < KT_COUNT(cases); i++) {
        sparse_case(cases[i]);
    }
}

static void test_sae_zero_row_has_no_features_of_its_own_scale(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_F32, 1);
    sae_data s = make(&t, (sae_case){2, 16, 64, 8, 8, SPURION_SAE_TOPK, SPURION_SAE_NORM_RESCALE, false, 0}, SPURION_F32);
    memset(s.x, 0, 16 * sizeof *s.x);
    sparse_copy r = encode(&t, &s, s.x, 2);
    assert_true(r.scale[0] == 0 && r.shift[0] == 0 && r.count[0] > 0);
    for (int i = 0; i < held(&r, 0); i++) {
        assert_true(isfinite(r.value[i]));
    }
    drop_sparse(&r);
    drop(&t, &s);
    kt_close(&t);
}

static void test_sae_refuses_what_does_not_fit(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_F32, 1);
    sae_data s = make(&t, (sae_case){1, 16, 64, 8, 8, SPURION_SAE_TOPK, SPURION_SAE_NORM_NONE, false, 0}, SPURION_F32);
    spurion_sparse out = {.slots = 4};
    float x[16] = {0};
    assert_int_equal(t.ops->sae_encode(t.dev, &out, &s.dev, x, x, 1).code, SPURION_INVALID_ARGUMENT);
    s.dev.kind = SPURION_SAE_GROUPMAX, s.dev.k = 7, out.slots = 8;
    assert_int_equal(t.ops->sae_encode(t.dev, &out, &s.dev, x, x, 1).code, SPURION_INVALID_ARGUMENT);
    drop(&t, &s);
    kt_close(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sae_encode_matches_loops),
        cmocka_unit_test(test_sae_topk_gives_ties_to_the_lowest_index),
        cmocka_unit_test(test_sae_topk_is_exact_where_all_features_are_alike),
        cmocka_unit_test(test_sae_lists_say_when_they_overflow),
        cmocka_unit_test(test_sae_token_does_not_depend_on_company_or_threads),
        cmocka_unit_test(test_sae_members_are_listed_as_in_the_whole_encode),
        cmocka_unit_test(test_sae_scratch_grows_with_rows),
        cmocka_unit_test(test_sae_lists_attribute_subtract_and_shrink),
        cmocka_unit_test(test_sae_zero_row_has_no_features_of_its_own_scale),
        cmocka_unit_test(test_sae_refuses_what_does_not_fit),
    };
    return cmocka_run_group_tests_name("sae", tests, NULL, NULL);
}

/* Attention forward and backward over pieces: the plain double reference, finite differences of it, and bit-equality of a sequence
 * alone, in company, cut elsewhere and on other thread counts. Seed 20261121. */
#include "kernel_test.h"

#include <math.h>

enum { SEQS_MAX = 8 };

/* A batch: one prompt of P tokens shared by `members` completions of C[i] tokens. */
typedef struct att_case {
    spurion_attention_shape shape;
    int P, members, C[4];
} att_case;

static const att_case cases[] = {
    {{1, 1, 8, 0.35f, 0, 0}, 1, 1, {1}},
    {{4, 2, 16, 0.25f, 0, 0}, 70, 3, {5, 64, 33}},
    {{9, 3, 64, 0.125f, 0, 0}, 100, 2, {70, 1}},
    {{2, 1, 80, 0.11f, 30.0f, 0}, 63, 2, {66, 2}},
    {{6, 1, 24, 0.2f, 0, 50}, 90, 3, {100, 0, 7}},
    {{2, 2, 256, 0.0625f, 5.0f, 17}, 65, 1, {80}},
    {{8, 1, 40, 0.16f, 0, 1}, 3, 1, {70}},
    {{3, 3, 7, 0.4f, 0, 0}, 40, 2, {33, 65}},
};

/* Rows lie in memory in another order than positions: completions first, then the prompt, so that a row number means nothing. */
typedef struct batch {
    att_case c;
    int rows, prompt_row, member_row[4];
    spurion_seq seqs[SEQS_MAX];
    int seq_count;
    float *q, *k, *v, *dout; /* host, rounded to the device's dtype (dout f32) */
    spurion_dtype dout_type; /* as which it is given */
    size_t q_size, kv_size;
} batch;

static spurion_seq prompt_seq(const batch *b)
{
    return (spurion_seq){.q_row = b->prompt_row, .q_count = b->c.P, .piece_count = 1, .piece_row = {b->prompt_row},
                         .dkv_row = b->prompt_row};
}

static spurion_seq member_seq(const batch *b, int m)
{
    return (spurion_seq){.q_row = b->member_row[m], .q_count = b->c.C[m], .q_position = b->c.P, .piece_count = 2,
                         .piece_row = {b->prompt_row, b->member_row[m]}, .piece_position = {0, b->c.P},
                         .dkv_row = b->member_row[m], .dkv_position = b->c.P};
}

static batch make(kt *t, att_case c)
{
    batch b = {.c = c};
    for (int m = 0; m < c.members; m++) {
        b.member_row[m] = b.rows + 2; /* rows that no seq names in between */
        b.rows += c.C[m] + 2;
    }
    b.prompt_row = b.rows + 1;
    b.rows += c.P + 2;
    b.seqs[b.seq_count++] = prompt_seq(&b);
    for (int m = 0; m < c.members; m++) {
        b.seqs[b.seq_count++] = member_seq(&b, m);
    }
    b.q_size = (size_t)(b.rows * c.shape.heads * c.shape.head_dim);
    b.kv_size = (size_t)(b.rows * c.shape.kv_heads * c.shape.head_dim);
    b.q = kt_floats(t, b.q_size, 1.5), b.k = kt_floats(t, b.kv_size, 1.5), b.v = kt_floats(t, b.kv_size, 1.0);
    b.dout = kt_floats(t, b.q_size, 1.0);
    kt_round_all(b.q, b.q_size, t->dev->dtype), kt_round_all(b.k, b.kv_size, t->dev->dtype), kt_round_all(b.v, b.kv_size, t->dev->dtype);
    return b;
}

static void drop(batch *b)
{
    free(b->q), free(b->k), free(b->v), free(b->dout);
}

static int key_row(const spurion_seq *s, int position)
{
    int p = s->piece_count - 1;
    while (s->piece_position[p] > position) {
        p--;
    }
    return s->piece_row[p] + position - s->piece_position[p];
}

/* --- reference, in double --- */

typedef struct reference {
    double *out, *lse, *dq, *dk, *dv;
} reference;

static double score(const double *q, const double *k, spurion_attention_shape s)
{
    double sum = 0;
    for (int d = 0; d < s.head_dim; d++) {
        sum += q[d] * k[d];
    }
    sum *= (double)s.scale;
    return s.softcap > 0 ? s.softcap * tanh(sum / s.softcap) : sum;
}

/* Forward of one query and head, weights into p[first ..]; gives lse. */
static double reference_query(double *out, double *p, const batch *b, const spurion_seq *s, int i, int h, const double *q, const double *k,
                              const double *v)
{
    spurion_attention_shape a = b->c.shape;
    int hd = a.head_dim, kv = h / (a.heads / a.kv_heads), first = a.window > 0 && i >= a.window ? i - a.window + 1 : 0;
    const double *qi = q + ((size_t)(s->q_row + i - s->q_position) * (size_t)a.heads + (size_t)h) * (size_t)hd;
    double top = -INFINITY, sum = 0;
    for (int j = first; j <= i; j++) {
        p[j] = score(qi, k + (size_t)((key_row(s, j) * a.kv_heads + kv) * hd), a);
        top = p[j] > top ? p[j] : top;
    }
    memset(out, 0, (size_t)hd * sizeof *out);
    for (int j = first; j <= i; j++) {
        sum += p[j] = exp(p[j] - top);
    }
    for (int j = first; j <= i; j++) {
        p[j] /= sum;
        for (int d = 0; d < hd; d++) {
            out[d] += p[j] * v[(key_row(s, j) * a.kv_heads + kv) * hd + d];
        }
    }
    return top + log(sum);
}

/* Adds the gradients of one query and head. */
static void reference_back_query(reference *r, const double *p, const double *out, const batch *b, const spurion_seq *s, int i, int h,
                                 const double *q, const double *k, const double *v)
{
    spurion_attention_shape a = b->c.shape;
    int hd = a.head_dim, kv = h / (a.heads / a.kv_heads), first = a.window > 0 && i >= a.window ? i - a.window + 1 : 0;
    size_t at = ((size_t)(s->q_row + i - s->q_position) * (size_t)a.heads + (size_t)h) * (size_t)hd;
    double delta = 0;
    for (int d = 0; d < hd; d++) {
        delta += b->dout[at + (size_t)d] * out[d];
    }
    for (int j = first; j <= i; j++) {
        size_t to = (size_t)((key_row(s, j) * a.kv_heads + kv) * hd);
        double dp = 0, bend = 1, sc = score(q + at, k + to, a);
        for (int d = 0; d < hd; d++) {
            dp += b->dout[at + (size_t)d] * v[to + (size_t)d];
        }
        if (a.softcap > 0) {
            bend = 1 - sc / a.softcap * (sc / a.softcap);
        }
        double ds = p[j] * (dp - delta) * bend * (double)a.scale;
        for (int d = 0; d < hd; d++) {
            r->dq[at + (size_t)d] += ds * k[to + (size_t)d];
            if (j >= s->dkv_position) {
                r->dk[to + (size_t)d] += ds * q[at + (size_t)d];
                r->dv[to + (size_t)d] += p[j] * b->dout[at + (size_t)d];
            }
        }
    }
}

static double *widen(const float *x, size_t n)
{
    double *y = malloc(n * sizeof *y);
    assert_non_null(y);
    for (size_t i = 0; i < n; i++) {
        y[i] = x[i];
    }
    return y;
}

static reference make_reference(const batch *b)
{
    reference r = {calloc(b->q_size, 8), calloc((size_t)(b->rows * b->c.shape.heads), 8), calloc(b->q_size, 8), calloc(b->kv_size, 8),
                   calloc(b->kv_size, 8)};
    double *q = widen(b->q, b->q_size), *k = widen(b->k, b->kv_size), *v = widen(b->v, b->kv_size), p[400];
    for (int n = 0; n < b->seq_count; n++) {
        const spurion_seq *s = &b->seqs[n];
        for (int i = s->q_position; i < s->q_position + s->q_count; i++) {
            for (int h = 0; h < b->c.shape.heads; h++) {
                size_t row = (size_t)((s->q_row + i - s->q_position) * b->c.shape.heads + h);
                double *out = r.out + row * (size_t)b->c.shape.head_dim;
                r.lse[row] = reference_query(out, p, b, s, i, h, q, k, v);
                reference_back_query(&r, p, out, b, s, i, h, q, k, v);
            }
        }
    }
    free(q), free(k), free(v);
    return r;
}

static void drop_reference(reference *r)
{
    free(r->out), free(r->lse), free(r->dq), free(r->dk), free(r->dv);
}

/* sum of dout out over all queries: what the gradients differentiate. */
static double loss(const batch *b, const double *q, const double *k, const double *v)
{
    double sum = 0, p[400], out[256];
    for (int n = 0; n < b->seq_count; n++) {
        const spurion_seq *s = &b->seqs[n];
        for (int i = s->q_position; i < s->q_position + s->q_count; i++) {
            for (int h = 0; h < b->c.shape.heads; h++) {
                size_t at = (size_t)((s->q_row + i - s->q_position) * b->c.shape.heads + h) * (size_t)b->c.shape.head_dim;
                (void)reference_query(out, p, b, s, i, h, q, k, v);
                for (int d = 0; d < b->c.shape.head_dim; d++) {
                    sum += b->dout[at + (size_t)d] * out[d];
                }
            }
        }
    }
    return sum;
}

/* The reference's own gradients against central differences, where every key's gradient is wanted (one sequence, dkv_position 0). */
static void test_attention_reference_agrees_with_differences(void **state)
{
    (void)state;
    static const spurion_attention_shape shapes[] = {{4, 2, 8, 0.35f, 0, 0}, {2, 1, 8, 0.35f, 3.0f, 9}};
    for (size_t n = 0; n < KT_COUNT(shapes); n++) {
        kt t;
        kt_open(&t, SPURION_F32, 1);
        batch b = make(&t, (att_case){shapes[n], 20, 0, {0}});
        reference r = make_reference(&b);
        double *x[3] = {widen(b.q, b.q_size), widen(b.k, b.kv_size), widen(b.v, b.kv_size)}, *grad[3] = {r.dq, r.dk, r.dv};
        for (int trial = 0; trial < 90; trial++) {
            int which = trial % 3, base = b.prompt_row * (which == 0 ? shapes[n].heads : shapes[n].kv_heads) * shapes[n].head_dim;
            int at = base + kt_below(&t, 20 * (which == 0 ? shapes[n].heads : shapes[n].kv_heads) * shapes[n].head_dim);
            double h = 1e-5, side[2], *p = &x[which][at], old = *p;
            *p = old + h;
            side[0] = loss(&b, x[0], x[1], x[2]);
            *p = old - h;
            side[1] = loss(&b, x[0], x[1], x[2]);
            *p = old;
            assert_true(fabs((side[0] - side[1]) / (2 * h) - grad[which][at]) < 1e-7 * (1 + fabs(grad[which][at])));
        }
        for (int i = 0; i < 3; i++) {
            free(x[i]);
        }
        drop_reference(&r);
        drop(&b);
        kt_close(&t);
    }
}

/* --- the op --- */

typedef struct result {
    float *out, *lse, *dq, *dk, *dv;
} result;

static void drop_result(result *r)
{
    free(r->out), free(r->lse), free(r->dq), free(r->dk), free(r->dv);
}

/* Runs both passes over the given seqs; everything not written is NaN. */
static result run(kt *t, const batch *b, const spurion_seq *seqs, int seq_count)
{
    spurion_attention_shape a = b->c.shape;
    size_t lse_size = (size_t)(b->rows * a.heads);
    void *q = kt_in_act(t, b->q, b->q_size), *k = kt_in_act(t, b->k, b->kv_size), *v = kt_in_act(t, b->v, b->kv_size);
    void *out = kt_out(t, b->q_size * spurion_dtype_bytes(t->dev->dtype));
    float *lse = kt_out(t, lse_size * 4), *dq = kt_out(t, b->q_size * 4), *dkv = kt_out(t, 2 * b->kv_size * 4);
    int stride = 2 * a.kv_heads * a.head_dim; /* dk and dv side by side, as a joint product wants them */
    KT_OK(t->ops->attention(t->dev, out, lse, q, k, v, seqs, seq_count, a));
    KT_OK(t->ops->attention_backward(t->dev, dq, dkv, dkv + stride / 2, stride, kt_in_typed(t, b->dout, b->q_size, b->dout_type), b->dout_type, out,
                                     lse, q, k, v, seqs, seq_count, a));
    result r = {kt_read_act(t, out, b->q_size), kt_read_floats(t, lse, lse_size), kt_read_floats(t, dq, b->q_size), malloc(b->kv_size * 4),
                malloc(b->kv_size * 4)};
    float *both = kt_read_floats(t, dkv, 2 * b->kv_size);
    for (int row = 0; row < b->rows; row++) {
        memcpy(r.dk + (size_t)(row * stride / 2), both + (size_t)(row * stride), (size_t)stride * 2);
        memcpy(r.dv + (size_t)(row * stride / 2), both + (size_t)(row * stride + stride / 2), (size_t)stride * 2);
    }
    free(both);
    return r;
}

/* Rows of the seqs near the reference; all other rows still poison. */
static void check_rows(const char *name, const float *got, const double *want, const batch *b, int width, kt_tolerance tolerance)
{
    size_t n = 0;
    float *g = malloc((size_t)(b->rows * width) * sizeof *g);
    double *w = malloc((size_t)(b->rows * width) * sizeof *w);
    for (int row = 0; row < b->rows; row++) {
        bool named = false;
        for (int s = 0; s < b->seq_count; s++) {
            named = named || (row >= b->seqs[s].q_row && row < b->seqs[s].q_row + b->seqs[s].q_count);
        }
        for (int c = 0; c < width; c++) {
            if (!named) {
                assert_true(got[row * width + c] != got[row * width + c]);
                continue;
            }
            g[n] = got[row * width + c];
            w[n++] = want[row * width + c];
        }
    }
    kt_near(name, g, w, n, tolerance);
    free(g), free(w);
}

static void case_run(spurion_dtype dtype, att_case c)
{
    kt t;
    kt_open(&t, dtype, 2);
    batch b = make(&t, c);
    reference want = make_reference(&b);
    result got = run(&t, &b, b.seqs, b.seq_count);
    int wide = c.shape.heads * c.shape.head_dim, narrow = c.shape.kv_heads * c.shape.head_dim;
    /* bf16: weights, dout and score gradients are rounded on their way through matrix units, each by at most 2^-8 */
    kt_tolerance gradient = dtype == SPURION_F32 ? (kt_tolerance){1e-10, 1e-3} : (kt_tolerance){6e-5, 1e-1};
    check_rows("attention out", got.out, want.out, &b, wide, dtype == SPURION_F32 ? kt_tolerance_f32() : (kt_tolerance){3e-5, 8e-2});
    check_rows("attention lse", got.lse, want.lse, &b, c.shape.heads, (kt_tolerance){1e-10, 1e-4});
    if (c.shape.window != 1 && b.rows > 8) { /* one visible key: no gradient reaches q and k */
        check_rows("attention dq", got.dq, want.dq, &b, wide, gradient);
        check_rows("attention dk", got.dk, want.dk, &b, narrow, gradient);
    }
    check_rows("attention dv", got.dv, want.dv, &b, narrow, gradient);
    drop_result(&got);
    drop_reference(&want);
    drop(&b);
    kt_close(&t);
}

static void test_attention_matches_double(void **state)
{
    (void)state;
    for (size_t i = 0; i < KT_COUNT(cases); i++) {
        case_run(SPURION_F32, cases[i]);
        case_run(SPURION_BF16, cases[i]);
    }
}

/* The rows of member m agree bit by bit, except what `skip_back` leaves out. */
static void same_member(const batch *b, const result *x, const result *y, int m)
{
    size_t row = (size_t)b->member_row[m], count = (size_t)b->c.C[m], heads = (size_t)b->c.shape.heads, hd = (size_t)b->c.shape.head_dim,
           kv = (size_t)b->c.shape.kv_heads * hd;
    kt_same_bits("out", x->out + row * heads * hd, y->out + row * heads * hd, count * heads * hd * 4);
    kt_same_bits("lse", x->lse + row * heads, y->lse + row * heads, count * heads * 4);
    kt_same_bits("dq", x->dq + row * heads * hd, y->dq + row * heads * hd, count * heads * hd * 4);
    kt_same_bits("dk", x->dk + row * kv, y->dk + row * kv, count * kv * 4);
    kt_same_bits("dv", x->dv + row * kv, y->dv + row * kv, count * kv * 4);
}

/* A gradient that act holds gives the same bits in either type. */
static void narrow_case_run(att_case c)
{
    kt t;
    kt_open(&t, SPURION_BF16, 2);
    batch b = make(&t, c);
    kt_round_all(b.dout, b.q_size, SPURION_BF16);
    result wide = run(&t, &b, b.seqs, b.seq_count);
    b.dout_type = SPURION_BF16;
    result narrow = run(&t, &b, b.seqs, b.seq_count);
    for (int m = 0; m < b.c.members; m++) {
        same_member(&b, &wide, &narrow, m);
    }
    drop_result(&wide);
    drop_result(&narrow);
    drop(&b);
    kt_close(&t);
}

static void test_attention_takes_gradients_in_bf16(void **state)
{
    (void)state;
    for (size_t i = 0; i < KT_COUNT(cases); i++) {
        narrow_case_run(cases[i]);
    }
}

static void test_attention_is_the_same_alone_twice_and_on_any_threads(void **state)
{
    (void)state;
    for (int n = 0; n < 2 * (int)KT_COUNT(cases); n++) {
        att_case c = cases[n / 2];
        kt t, one;
        kt_open(&t, n % 2 ? SPURION_BF16 : SPURION_F32, 3);
        kt_open(&one, n % 2 ? SPURION_BF16 : SPURION_F32, 1);
        batch b = make(&t, c);
        result together = run(&t, &b, b.seqs, b.seq_count), again = run(&one, &b, b.seqs, b.seq_count);
        for (int m = 0; m < c.members; m++) {
            result alone = run(&t, &b, &b.seqs[1 + m], 1);
            same_member(&b, &together, &alone, m);
            same_member(&b, &together, &again, m);
            drop_result(&alone);
        }
        drop_result(&together);
        drop_result(&again);
        drop(&b);
        kt_close(&one);
        kt_close(&t);
    }
}

/* The same tokens as pieces cut at other places, in other rows, and with queries from another position on: the queries that both runs
 * have agree. The second batch has one row of positions 0 .. n - 1, read through pieces that fit what is asked. */
static void cut_case(spurion_dtype dtype, spurion_attention_shape shape, int n, int start)
{
    kt t;
    kt_open(&t, dtype, 2);
    batch b = make(&t, (att_case){shape, n, 0, {0}});
    size_t heads = (size_t)shape.heads, hd = (size_t)shape.head_dim, at = (size_t)(b.prompt_row + start);
    spurion_seq whole = b.seqs[0], tail = whole;
    whole.dkv_row += start;
    whole.dkv_position = start;
    tail.q_row += start;
    tail.q_count -= start;
    tail.q_position = start;
    tail.dkv_row = tail.q_row;
    tail.dkv_position = start;
    tail.piece_count = 4;
    for (int p = 0; p < 4; p++) {
        tail.piece_position[p] = p * (start + 1) / 4;
        tail.piece_row[p] = b.prompt_row + tail.piece_position[p];
    }
    result x = run(&t, &b, &whole, 1), y = run(&t, &b, &tail, 1);
    kt_same_bits("out", x.out + at * heads * hd, y.out + at * heads * hd, (size_t)(n - start) * heads * hd * 4);
    kt_same_bits("lse", x.lse + at * heads, y.lse + at * heads, (size_t)(n - start) * heads * 4);
    kt_same_bits("dq", x.dq + at * heads * hd, y.dq + at * heads * hd, (size_t)(n - start) * heads * hd * 4);
    size_t kv = (size_t)shape.kv_heads * hd;
    kt_same_bits("dk", x.dk + at * kv, y.dk + at * kv, (size_t)(n - start) * kv * 4);
    kt_same_bits("dv", x.dv + at * kv, y.dv + at * kv, (size_t)(n - start) * kv * 4);
    drop_result(&x);
    drop_result(&y);
    drop(&b);
    kt_close(&t);
}

static void test_attention_does_not_see_where_pieces_end(void **state)
{
    static const spurion_attention_shape shapes[] = {{4, 2, 64, 0.125f, 0, 0}, {3, 1, 24, 0.2f, 20.0f, 70}, {2, 2, 128, 0.1f, 0, 100}};
    (void)state;
    for (int dtype = SPURION_F32; dtype <= SPURION_BF16; dtype++) {
        for (size_t s = 0; s < KT_COUNT(shapes); s++) {
            for (int start = 1; start < 200; start += 33) {
                cut_case((spurion_dtype)dtype, shapes[s], 210, start);
            }
        }
    }
}

static void test_attention_refuses_shapes_it_has_no_room_for(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_F32, 1);
    float x[8];
    spurion_seq none = {0};
    static const spurion_attention_shape bad[] = {{3, 2, 64, 1, 0, 0}, {2, 2, 257, 1, 0, 0}, {2, 0, 16, 1, 0, 0}};
    for (size_t i = 0; i < KT_COUNT(bad); i++) {
        assert_int_equal(t.ops->attention(t.dev, x, x, x, x, x, &none, 1, bad[i]).code, SPURION_INVALID_ARGUMENT);
        assert_int_equal(t.ops->attention_backward(t.dev, x, x, x, 8, x, SPURION_F32, x, x, x, x, x, &none, 1, bad[i]).code, SPURION_INVALID_ARGUMENT);
    }
    kt_close(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_attention_reference_agrees_with_differences),
        cmocka_unit_test(test_attention_matches_double),
        cmocka_unit_test(test_attention_takes_gradients_in_bf16),
        cmocka_unit_test(test_attention_is_the_same_alone_twice_and_on_any_threads),
        cmocka_unit_test(test_attention_does_not_see_where_pieces_end),
        cmocka_unit_test(test_attention_refuses_shapes_it_has_no_room_for),
    };
    return cmocka_run_group_tests_name("attention", tests, NULL, NULL);
}

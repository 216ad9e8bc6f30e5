/* Attention on AMX tiles, bf16: the same blocks, tiles and softmax as attention.c and attention_backward.c, with products of bf16
 * operands summed in f32. Weights, dout and score gradients are rounded to bf16 where they become operands. In the backward pass a
 * query's row in its tile is its position modulo QUERIES, so that sums over queries group in one way only.
 * Thread: pool workers. Memory: the workers' scratch. */
#include "kernels/cpu/attention.h"

#if VW == 16

#include "kernels/cpu/amx.h"

/* Cuts arrays off scratch, each on its own lines. */
static void *cut(char **scratch, size_t bytes)
{
    void *p = *scratch;
    *scratch += spurion_round_up(bytes, 64);
    return p;
}

/* One row of `width` elements from hd of bf16, zeros behind: without a call, for rows are short. */
SIMD void copy_row(uint16_t *out, const uint16_t *in, int hd, int width)
{
    int c = 0;
    for (; c < hd; c += VW) {
        vh_store_n(out + c, vh_load_n(in + c, hd - c), VW);
    }
    for (; c < width; c += VW) {
        vh_store_n(out + c, (vh){0}, VW);
    }
}

/* out (KEYS, ld) bf16 = keys first .. first + KEYS - 1 of a seq, gathered from its pieces; 0 past its end. */
static void copy_keys(uint16_t *out, int ld, const uint16_t *in, size_t at, size_t stride, const spurion_seq *s, int first, int width)
{
    int end = attention_end(s), stop = first + KEYS < end ? first + KEYS : end;
    for (int p = 0; p < s->piece_count; p++) {
        int from = s->piece_position[p], to = p + 1 < s->piece_count ? s->piece_position[p + 1] : end;
        int a = from > first ? from : first, b = to < stop ? to : stop;
        for (int i = a; i < b; i++) {
            copy_row(out + (size_t)(i - first) * (size_t)ld, in + at + (size_t)(s->piece_row[p] + i - from) * stride, width, ld);
        }
    }
    memset(out + (size_t)(stop - first) * (size_t)ld, 0, (size_t)(first + KEYS - stop) * (size_t)ld * sizeof *out);
}

/* --- forward --- */

typedef struct half_tile {
    uint16_t *q, *p;            /* (rows, width), (rows, KEYS) */
    uint16_t *rows;             /* (KEYS, width): keys or values as they are */
    uint16_t *keys, *values;    /* packed */
} half_tile;

static void place_forward(attention_tile *t, half_tile *h, const attention_job *j, char *scratch)
{
    size_t w = (size_t)j->width, rows = spurion_round_up((size_t)(j->tile * j->group), 32);
    t->acc = cut(&scratch, rows * w * 4);
    t->s = cut(&scratch, rows * KEYS * 4);
    t->max = cut(&scratch, rows * 4);
    t->sum = cut(&scratch, rows * 4);
    h->q = cut(&scratch, rows * w * 2);
    h->p = cut(&scratch, rows * KEYS * 2);
    h->rows = cut(&scratch, KEYS * w * 2);
    h->keys = cut(&scratch, KEYS * w * 2);
    h->values = cut(&scratch, KEYS * w * 2);
}

static void load_queries(const attention_tile *t, const half_tile *h, const attention_job *j)
{
    size_t hd = (size_t)j->shape.head_dim, w = (size_t)j->width, rows = (size_t)(t->count * j->group), whole = spurion_round_up(rows, 32);
    memset(h->q + rows * w, 0, (whole - rows) * w * 2);
    memset(h->p + rows * KEYS, 0, (whole - rows) * KEYS * 2);
    for (size_t r = 0; r < rows; r++) {
        size_t row = (size_t)(t->seq->q_row + t->first - t->seq->q_position) + r / (size_t)j->group;
        size_t head = (size_t)(t->kv_head * j->group) + r % (size_t)j->group;
        copy_row(h->q + r * w, (const uint16_t *)j->q + (row * (size_t)j->shape.heads + head) * hd, (int)hd, (int)w);
    }
}

void spurion_attention_amx_item(void *context, int64_t item, int worker)
{
    const attention_job *j = context;
    attention_tile t;
    half_tile h;
    int hd = j->shape.head_dim, w = j->width;
    size_t stride = (size_t)j->shape.kv_heads * (size_t)hd;

    place_tile(&t, j, item);
    place_forward(&t, &h, j, j->cpu->scratch[worker]);
    begin_tile(&t, j);
    load_queries(&t, &h, j);
    int rows = (int)spurion_round_up((size_t)(t.count * j->group), SPURION_AMX_ROWS);
    spurion_amx_begin();
    for (int b = attention_first_key(t.first, j->shape.window) / KEYS; b * KEYS < t.first + t.count; b++) {
        size_t at = (size_t)t.kv_head * (size_t)hd;
        copy_keys(h.rows, w, j->k, at, stride, t.seq, b * KEYS, hd);
        spurion_amx_pack_rows(h.keys, h.rows, (size_t)w, KEYS, w);
        copy_keys(h.rows, w, j->v, at, stride, t.seq, b * KEYS, hd);
        spurion_amx_pack_pairs(h.values, h.rows, (size_t)w, KEYS, w);
        spurion_amx_multiply(t.s, KEYS, h.q, (size_t)w, h.keys, rows, KEYS, w, false);
        soften_tile(&t, j, h.p, b * KEYS);
        spurion_amx_multiply(t.acc, (size_t)w, h.p, KEYS, h.values, rows, w, KEYS, true);
    }
    spurion_amx_end();
    write_tile(&t, j);
}

/* --- backward --- */

struct back_half {
    uint16_t *rows;                       /* (KEYS, width): keys or values as they are */
    uint16_t *keys, *values, *keys_pairs; /* packed for Q K^T, dout V^T, dS K */
    uint16_t *q, *dout;                   /* (QUERIES, width) */
    uint16_t *p, *ds, *turned;            /* (QUERIES, KEYS), (KEYS, QUERIES) */
    uint16_t *pairs;                      /* packed, of q or dout */
};

static void place_backward(back_state *b, struct back_half *h, const back_job *j, char *scratch)
{
    size_t w = (size_t)j->width, block = KEYS * w;
    b->half = h;
    b->dk = cut(&scratch, block * 4);
    b->dv = cut(&scratch, block * 4);
    b->dq = cut(&scratch, block * 4);
    b->p = cut(&scratch, QUERIES * KEYS * 4);
    b->ds = cut(&scratch, QUERIES * KEYS * 4);
    h->rows = cut(&scratch, block * 2);
    h->keys = cut(&scratch, block * 2);
    h->values = cut(&scratch, block * 2);
    h->keys_pairs = cut(&scratch, block * 2);
    h->q = cut(&scratch, block * 2);
    h->dout = cut(&scratch, block * 2);
    h->p = cut(&scratch, QUERIES * KEYS * 2);
    h->ds = cut(&scratch, QUERIES * KEYS * 2);
    h->turned = cut(&scratch, QUERIES * KEYS * 2);
    h->pairs = cut(&scratch, block * 2);
}

static void load_block(back_state *b, const back_job *j)
{
    int w = j->width, hd = j->shape.head_dim;
    size_t stride = (size_t)j->shape.kv_heads * (size_t)hd, at = (size_t)b->kv_head * (size_t)hd;
    struct back_half *h = b->half;
    copy_keys(h->rows, w, j->v, at, stride, b->seq, b->block, hd);
    spurion_amx_pack_rows(h->values, h->rows, (size_t)w, KEYS, w);
    copy_keys(h->rows, w, j->k, at, stride, b->seq, b->block, hd);
    spurion_amx_pack_rows(h->keys, h->rows, (size_t)w, KEYS, w);
    spurion_amx_pack_pairs(h->keys_pairs, h->rows, (size_t)w, KEYS, w);
}

/* q as it is and dout rounded, into rows skip .. skip + count - 1 of their tiles; zeros elsewhere. */
static void load_rows(const struct back_half *h, const back_job *j, size_t at, size_t stride, int skip, int count)
{
    int w = j->width, hd = j->shape.head_dim;
    if (count < QUERIES) {
        memset(h->q, 0, (size_t)(QUERIES * w) * 2);
        memset(h->dout, 0, (size_t)(QUERIES * w) * 2);
    }
    for (int r = 0; r < count; r++) {
        size_t from = at + (size_t)r * stride;
        uint16_t *half = h->dout + (size_t)((skip + r) * w);
        copy_row(h->q + (size_t)((skip + r) * w), (const uint16_t *)j->q + from, hd, w);
        for (int c = 0; c < w; c += VW) {
            vf v = c < hd ? v_load_n(j->dout + from + c, hd - c) : v_set(0.0f);
            vh_store_n(half + c, v_to_bf16_fast(v), VW);
        }
    }
}

/* <dout, out>, dout rounded as in dout V^T: the two must cancel. */
static float half_delta(const back_job *j, const uint16_t *dout, size_t at)
{
    vf sum = v_set(0.0f);
    for (int c = 0; c < j->shape.head_dim; c += VW) {
        int n = j->shape.head_dim - c;
        sum = v_fma(v_load_act(dout, (size_t)c, n, SPURION_BF16), v_load_act(j->out, at + (size_t)c, n, SPURION_BF16), sum);
    }
    return v_sum(sum);
}

/* Weights and score gradients of the tile's rows; 0 in rows that are not there. */
static void half_gradients(const back_state *b, const back_job *j, int head, size_t row, int tile, int first, int count)
{
    const struct back_half *h = b->half;
    size_t heads = (size_t)j->shape.heads, hd = (size_t)j->shape.head_dim;
    if (count < QUERIES) {
        memset(h->p, 0, QUERIES * KEYS * 2);
        memset(h->ds, 0, QUERIES * KEYS * 2);
    }
    for (int r = 0; r < count; r++) {
        int i = first + r, at = i - tile, high = i + 1 - b->block;
        size_t place = (row + (size_t)r) * heads + (size_t)head;
        row_gradient(b->p + at * KEYS, b->ds + at * KEYS, h->p + at * KEYS, h->ds + at * KEYS, j->lse[place],
                     half_delta(j, h->dout + (size_t)(at * j->width), place * hd), attention_first_key(i, j->shape.window) - b->block,
                     high < KEYS ? high : KEYS, j->shape);
    }
}

static void back_tile(back_state *b, const back_job *j, int head, int tile, int first, int count)
{
    const struct back_half *h = b->half;
    int w = j->width, hd = j->shape.head_dim, skip = first - tile;
    size_t ld = (size_t)w, stride = (size_t)j->shape.heads * (size_t)hd, row = (size_t)(b->seq->q_row + first - b->seq->q_position);
    size_t at = row * stride + (size_t)head * (size_t)hd;

    load_rows(h, j, at, stride, skip, count);
    spurion_amx_multiply(b->p, KEYS, h->q, ld, h->keys, QUERIES, KEYS, w, false);
    spurion_amx_multiply(b->ds, KEYS, h->dout, ld, h->values, QUERIES, KEYS, w, false);
    half_gradients(b, j, head, row, tile, first, count);
    bool begins = is_first_block(b, j, first);
    if (!begins) {
        attention_load(b->dq + (size_t)(skip * w), w, j->dq, at, stride, count, hd, SPURION_F32);
    }
    spurion_amx_multiply(b->dq, ld, h->ds, KEYS, h->keys_pairs, QUERIES, w, KEYS, !begins);
    store_rows(j->dq + at, stride, b->dq + (size_t)(skip * w), w, count, hd);
    if (b->want_keys) {
        spurion_amx_transpose(h->turned, QUERIES, h->p, KEYS, QUERIES, KEYS);
        spurion_amx_pack_pairs(h->pairs, h->dout, ld, QUERIES, w);
        spurion_amx_multiply(b->dv, ld, h->turned, QUERIES, h->pairs, KEYS, w, QUERIES, true);
        spurion_amx_transpose(h->turned, QUERIES, h->ds, KEYS, QUERIES, KEYS);
        spurion_amx_pack_pairs(h->pairs, h->q, ld, QUERIES, w);
        spurion_amx_multiply(b->dk, ld, h->turned, QUERIES, h->pairs, KEYS, w, QUERIES, true);
    }
}

void spurion_attention_amx_back_item(void *context, int64_t item, int worker)
{
    const back_job *j = context;
    back_state b;
    struct back_half h;
    place_backward(&b, &h, j, j->cpu->scratch[worker]);
    memset(b.dq, 0, (size_t)(QUERIES * j->width) * sizeof *b.dq); /* rows that no query fills are multiplied too */
    spurion_amx_begin();
    back_sequence(&b, j, item, load_block, back_tile);
    spurion_amx_end();
}

#else

void spurion_attention_amx_item(void *context, int64_t item, int worker)
{
    (void)context;
    (void)item;
    (void)worker;
}

void spurion_attention_amx_back_item(void *context, int64_t item, int worker)
{
    (void)context;
    (void)item;
    (void)worker;
}

#endif

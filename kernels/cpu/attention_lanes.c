/* Attention in bf16 with queries in the lanes, its products on AMX tiles or by AVX-512's pairs (amx.h): scores are made as S^T (keys, queries), so that softmax runs down the vectors,
 * the weights come out in the layout that the next product reads, and nothing is summed across a vector. Key blocks are counted from
 * position 0 and a query's result is a chain over its own blocks: a block that it does not see multiplies by 1 and adds 0. In the backward
 * pass a query's lane is fixed by its position and head, so that sums over queries group in one way only. Weights, dout and score
 * gradients are rounded to bf16 where they become operands; scores are kept in units of ln 2. Thread: pool workers. Memory: their scratch. */
#include "kernels/cpu/attention.h"

#if VW == 16

#include "kernels/cpu/amx.h"

enum {
    LANES = SPURION_AMX_COLUMNS, /* queries that go through a block together: two vectors */
    LANES_MAX = TILE_ROWS_MAX,
    FORWARD_LANES = 96,          /* of a forward tile: what is summed for them stays in the first-level cache */
    BLOCKS_KEPT = 64             /* at most, of an item's gathered keys and values */
};

#define LOG2E 1.44269504088896341f
#define LN2 0.693147180559945309f

/* Cuts arrays off scratch, each on its own lines. */
static void *cut(char **scratch, size_t bytes)
{
    void *p = *scratch;
    *scratch += spurion_round_up(bytes, 64);
    return p;
}

/* 2^x for x <= 0 or little more: x = floor + r, a polynomial of degree 4 in r in [0, 1) that is 1 and 2 at its ends (relative error 3.4e-6:
 * the weights are rounded to 2^-9). 0 far below; NaN stays. */
SIMD vf exp2_weight(vf x)
{
    vf c = (vf)_mm512_max_ps(_mm512_set1_ps(-1000.0f), (__m512)x);
    vf r = (vf)_mm512_reduce_ps((__m512)c, 0x09);
    vf p = v_set(0.013555747f);
    p = v_fma(p, r, v_set(0.052032370f));
    p = v_fma(p, r, v_set(0.24137976f));
    p = v_fma(p, r, v_set(0.69303212f));
    p = v_fma(p, r, v_set(1.0f));
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)c);
}

/* Two vectors of weights for keys k, k + 1 as one row of a packed operand: pairs (k, k + 1) for each lane. */
SIMD void store_pair(uint16_t *out, vf even, vf odd)
{
    static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_loadu_si512(order), both));
}

/* --- loading --- */

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

/* Operands made of key blocks, kept for the item's further queries as far as there is room: a gathered block serves all of them. */
typedef struct key_blocks {
    uint16_t *room;
    size_t words;      /* of one block's operands */
    int first, kept;   /* blocks first .. first + kept - 1 stay, each in its place; others share the place behind */
    bool ready[BLOCKS_KEPT];
} key_blocks;

static void blocks_place(key_blocks *b, char *scratch, int operands, int width)
{
    b->words = (size_t)operands * KEYS * (size_t)width;
    b->room = (uint16_t *)(void *)scratch;
    b->kept = (int)(SPURION_ATTENTION_KEPT / (b->words * sizeof *b->room)) - 1;
    b->kept = b->kept < BLOCKS_KEPT ? b->kept : BLOCKS_KEPT;
}

static void blocks_begin(key_blocks *b, int first)
{
    b->first = first;
    memset(b->ready, 0, sizeof b->ready);
}

/* Where the operands of block `index` stand, or with *fill are to be put. */
static uint16_t *block_operands(key_blocks *b, int index, bool *fill)
{
    int at = index - b->first < b->kept ? index - b->first : b->kept;
    *fill = at == b->kept || !b->ready[at];
    if (at < b->kept) {
        b->ready[at] = true;
    }
    return b->room + (size_t)at * b->words;
}

/* Queries of one tile. Lane r holds position first + r / group and head r % group of the key head's; lanes of positions before `from` or
 * from `end` on hold nothing. */
typedef struct lanes {
    const spurion_seq *seq;
    int kv_head, first, from, end;
    int count;                 /* lanes, whole groups of LANES */
    int32_t *position;         /* (count) -1: nothing */
} lanes;

static void lanes_place(lanes *l, int group, int queries)
{
    l->count = (int)spurion_round_up((size_t)(queries * group), LANES);
    for (int r = 0; r < l->count; r++) {
        int i = l->first + r / group;
        l->position[r] = r < queries * group && i >= l->from && i < l->end ? i : -1;
    }
}

/* Element of q, out or dout at which lane r's head begins. */
static size_t lane_at(const lanes *l, int r, int heads, int group, int hd)
{
    size_t row = (size_t)(l->seq->q_row + l->position[r] - l->seq->q_position);
    return (row * (size_t)heads + (size_t)(l->kv_head * group + r % group)) * (size_t)hd;
}

/* rows (count, w) = the lanes' rows of q; 0 where a lane holds nothing. */
static void load_lanes(uint16_t *rows, const lanes *l, const void *q, spurion_attention_shape a, int w)
{
    for (int r = 0; r < l->count; r++) {
        if (l->position[r] < 0) {
            memset(rows + (size_t)(r * w), 0, (size_t)w * 2);
        } else {
            copy_row(rows + (size_t)(r * w), (const uint16_t *)q + lane_at(l, r, a.heads, a.heads / a.kv_heads, a.head_dim), a.head_dim, w);
        }
    }
}

/* The lanes that keys first .. first + KEYS - 1 concern, as groups [*low, *high) of LANES; positions ascend with the lanes. */
static void lanes_seeing(int *low, int *high, const lanes *l, int block, int group, int window)
{
    int begin = block > l->from ? block : l->from, end = l->end; /* positions that see some key of the block */
    if (window > 0 && end > block + KEYS - 1 + window) {
        end = block + KEYS - 1 + window;
    }
    *low = (begin - l->first) * group / LANES;
    *high = end > begin ? ((end - l->first) * group + LANES - 1) / LANES : *low;
}

/* Lanes that see key j: its position is at or after j and, with a window, before j + window. */
SIMD __mmask16 visible(vi position, int j, int window)
{
    __mmask16 m = _mm512_cmpge_epi32_mask((__m512i)position, _mm512_set1_epi32(j));
    return window > 0 ? m & _mm512_cmplt_epi32_mask((__m512i)position, _mm512_set1_epi32(j + window)) : m;
}

/* Whether all 16 lanes see all keys of the block. */
SIMD bool sees_all(const int32_t *position, int block, int window)
{
    vi p = *(const vi *)(const void *)position;
    return visible(p, block + KEYS - 1, 0) == 0xffff && (window == 0 || visible(p, block, window) == 0xffff);
}

/* Caps the raw scores (KEYS, LANES) of 16 lanes and puts -inf where a key is not seen. Nothing else: what a lane gets must not depend on
 * whether its neighbours' block needs a mask. */
static void scores_prepare(float *s, const int32_t *position, int block, spurion_attention_shape a)
{
    vi p = *(const vi *)(const void *)position;
    for (int k = 0; k < KEYS; k++) {
        vf v = v_load(s + k * LANES);
        if (a.softcap > 0) {
            v = a.softcap * v_tanh(v * (a.scale / a.softcap));
        }
        v_store(s + k * LANES, (vf)_mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), visible(p, block + k, a.window), (__m512)v));
    }
}

/* What prepared scores are multiplied by to stand in units of ln 2. */
static inline float score_unit(spurion_attention_shape a)
{
    return a.softcap > 0 ? LOG2E : a.scale * LOG2E;
}

/* --- forward --- */

typedef struct half_tile {
    lanes l;
    uint16_t *q;          /* (count, width), packed as columns */
    uint16_t *rows;       /* (lanes or KEYS, width) as it is */
    key_blocks blocks;    /* of keys (KEYS, width), values (width, KEYS) */
    uint16_t *p;          /* (KEYS, LANES) packed in pairs */
    float *s;             /* (KEYS, LANES) */
    float *acc;           /* (count / LANES, width, LANES) */
    float *max, *sum;     /* (count) in units of ln 2; sums of weights */
} half_tile;

static void place_forward(half_tile *h, const attention_job *j, char *scratch)
{
    size_t w = (size_t)j->width;
    h->l.position = cut(&scratch, LANES_MAX * sizeof(int32_t));
    h->q = cut(&scratch, LANES_MAX * w * 2);
    h->rows = cut(&scratch, LANES_MAX * w * 2);
    h->p = cut(&scratch, KEYS * LANES * 2);
    h->s = cut(&scratch, KEYS * LANES * 4);
    h->acc = cut(&scratch, LANES_MAX * w * 4);
    h->max = cut(&scratch, LANES_MAX * 4);
    h->sum = cut(&scratch, LANES_MAX * 4);
    blocks_place(&h->blocks, scratch, 2, j->width);
}

static void begin_forward(half_tile *h, const attention_job *j)
{
    int w = j->width;
    load_lanes(h->rows, &h->l, j->q, j->shape, w);
    for (int r = 0; r < h->l.count; r++) {
        h->max[r] = -__builtin_inff();
        h->sum[r] = 0;
    }
    spurion_amx_pack_rows(h->q, h->rows, (size_t)w, h->l.count, w);
    memset(h->acc, 0, (size_t)(h->l.count * w) * sizeof *h->acc);
}

/* Weights of 16 lanes for one block into p, given scores times `unit` in units of ln 2. Max and sum go along (Milakov & Gimelshein 2018);
 * gives the factors for what was summed before. */
SIMD vf soften_lanes(uint16_t *p, float *max, float *sum, const float *s, float unit)
{
    vf top = v_load(s), even = v_set(0.0f), odd = v_set(0.0f), before = v_load(max);
    for (int k = 1; k < KEYS; k++) {
        top = v_max(top, v_load(s + k * LANES));
    }
    vf now = v_max(before, top * unit);
    vf base = v_select(now == -__builtin_inff(), v_set(0.0f), now);
    for (int k = 0; k < KEYS; k += 2) {
        vf a = exp2_weight(v_fma(v_load(s + k * LANES), v_set(unit), -base));
        vf b = exp2_weight(v_fma(v_load(s + (k + 1) * LANES), v_set(unit), -base));
        store_pair(p + k / 32 * 2 * 512 + k % 32 / 2 * 32, a, b);
        even += a;
        odd += b;
    }
    vf factor = v_select(before == now, v_set(1.0f), exp2_weight(before - base)); /* 2^0 is 1, and 1 is what nothing-seen needs too */
    v_store(max, now);
    v_store(sum, v_fma(v_load(sum), factor, even + odd));
    return factor;
}

/* Scores of one group of lanes to weights; rescales what was summed before. */
static void soften_group(half_tile *h, const attention_job *j, int g, int block)
{
    float *acc = h->acc + (size_t)(g * j->width * LANES);
    for (int half = 0; half < LANES; half += VW) {
        int at = g * LANES + half;
        if (j->shape.softcap > 0 || !sees_all(h->l.position + at, block, j->shape.window)) {
            scores_prepare(h->s + half, h->l.position + at, block, j->shape);
        }
        vf factor = soften_lanes(h->p + half * VW * 2, h->max + at, h->sum + at, h->s + half, score_unit(j->shape));
        if (_mm512_cmp_ps_mask((__m512)factor, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) != 0) {
            for (int c = 0; c < j->width; c++) {
                v_store(acc + c * LANES + half, v_load(acc + c * LANES + half) * factor);
            }
        }
    }
}

static void forward_block(half_tile *h, const attention_job *j, int block)
{
    int w = j->width, hd = j->shape.head_dim, low, high;
    size_t stride = (size_t)j->shape.kv_heads * (size_t)hd, at = (size_t)h->l.kv_head * (size_t)hd;
    bool fill;
    uint16_t *keys = block_operands(&h->blocks, block / KEYS, &fill), *values = keys + KEYS * w;

    if (fill) {
        copy_keys(h->rows, w, j->v, at, stride, h->l.seq, block, hd);
        spurion_amx_transpose(values, KEYS, h->rows, (size_t)w, KEYS, w);
        copy_keys(keys, w, j->k, at, stride, h->l.seq, block, hd);
    }
    lanes_seeing(&low, &high, &h->l, block, j->group, j->shape.window);
    for (int g = low; g < high; g++) {
        j->cpu->multiply_pairs(h->s, LANES, keys, (size_t)w, h->q + (size_t)(g * LANES * w), KEYS, LANES, w, false);
        soften_group(h, j, g, block);
        j->cpu->multiply_pairs(h->acc + (size_t)(g * w * LANES), LANES, values, KEYS, h->p, w, LANES, KEYS, true);
    }
}

/* Values divided by their sum, and lse, to their rows. */
static void write_forward(half_tile *h, const attention_job *j)
{
    int hd = j->shape.head_dim, w = j->width;
    float turned[VW * VW];
    for (int r0 = 0; r0 < h->l.count; r0 += VW) {
        const float *acc = h->acc + (size_t)(r0 / LANES * w * LANES) + r0 % LANES;
        for (int c = 0; c < hd; c += VW) {
            spurion_amx_turn_words(turned, VW, acc + c * LANES, LANES);
            for (int r = r0; r < r0 + VW; r++) {
                if (h->l.position[r] >= 0) {
                    uint16_t *out = (uint16_t *)j->out + lane_at(&h->l, r, j->shape.heads, j->group, hd);
                    vh_store_n(out + c, v_to_bf16_fast(v_load(turned + (r - r0) * VW) / h->sum[r]), hd - c);
                }
            }
        }
    }
    for (int r = 0; r < h->l.count; r++) {
        if (h->l.position[r] >= 0) {
            j->lse[lane_at(&h->l, r, j->shape.heads, j->group, 1)] = h->max[r] * LN2 + logf(h->sum[r]);
        }
    }
}

void spurion_attention_lanes_item(void *context, int64_t item, int worker)
{
    const attention_job *j = context;
    attention_tile t;
    half_tile h;
    int queries = FORWARD_LANES > j->group ? FORWARD_LANES / j->group : 1;

    place_tile(&t, j, item);
    place_forward(&h, j, j->cpu->scratch[worker]);
    blocks_begin(&h.blocks, attention_first_key(t.first, j->shape.window) / KEYS);
    if (j->cpu->amx) {
        spurion_amx_begin();
    }
    for (int first = t.first, n; first < t.first + t.count; first += n) {
        n = t.first + t.count - first < queries ? t.first + t.count - first : queries;
        h.l = (lanes){t.seq, t.kv_head, first, first, first + n, 0, h.l.position};
        lanes_place(&h.l, j->group, n);
        begin_forward(&h, j);
        for (int b = attention_first_key(first, j->shape.window) / KEYS; b * KEYS < first + n; b++) {
            forward_block(&h, j, b * KEYS);
        }
        write_forward(&h, j);
    }
    if (j->cpu->amx) {
        spurion_amx_end();
    }
}

/* --- backward ---  tiles of queries outside, key blocks inside: dQ is finished in one go, dK and dV gather where they belong */

typedef struct back_half {
    lanes l;
    int queries;                             /* positions of a tile */
    uint16_t *rows;                          /* (lanes or KEYS, width) as it is */
    uint16_t *q, *dout;                      /* (count, width) packed as columns: for S^T and dP^T */
    uint16_t *q_pairs, *dout_pairs;          /* (count, width) packed in pairs: for dK and dV */
    key_blocks blocks;                       /* of keys and values (KEYS, width), keys (width, KEYS) */
    uint16_t *p, *ds;                        /* (KEYS, count) */
    uint16_t *ds_pairs;                      /* (KEYS, LANES) packed in pairs */
    float *s, *dp;                           /* (KEYS, LANES) */
    float *lse, *delta;                      /* (count) lse in units of ln 2 */
    float *dq;                               /* (count / LANES, width, LANES) */
    float *block;                            /* (KEYS, width): dK or dV of a block that is not whole */
} back_half;

static void place_backward(back_half *h, const back_job *j, char *scratch)
{
    size_t w = (size_t)j->width;
    h->queries = LANES_MAX / j->group < QUERIES ? LANES_MAX / j->group : QUERIES;
    h->l.position = cut(&scratch, LANES_MAX * sizeof(int32_t));
    h->rows = cut(&scratch, LANES_MAX * w * 2);
    h->q = cut(&scratch, LANES_MAX * w * 2);
    h->dout = cut(&scratch, LANES_MAX * w * 2);
    h->q_pairs = cut(&scratch, LANES_MAX * w * 2);
    h->dout_pairs = cut(&scratch, LANES_MAX * w * 2);
    h->p = cut(&scratch, KEYS * LANES_MAX * 2);
    h->ds = cut(&scratch, KEYS * LANES_MAX * 2);
    h->ds_pairs = cut(&scratch, KEYS * LANES * 2);
    h->s = cut(&scratch, KEYS * LANES * 4);
    h->dp = cut(&scratch, KEYS * LANES * 4);
    h->lse = cut(&scratch, LANES_MAX * 4);
    h->delta = cut(&scratch, LANES_MAX * 4);
    h->dq = cut(&scratch, LANES_MAX * w * 4);
    h->block = cut(&scratch, KEYS * w * 4);
    blocks_place(&h->blocks, scratch, 3, j->width);
}

static void load_queries(back_half *h, const back_job *j)
{
    int w = j->width;
    load_lanes(h->rows, &h->l, j->q, j->shape, w);
    spurion_amx_pack_rows(h->q, h->rows, (size_t)w, h->l.count, w);
    spurion_amx_pack_pairs(h->q_pairs, h->rows, (size_t)w, h->l.count, w);
}

/* dout rounded, delta = <dout, out> of the rounded one (it must cancel against dP), and lse; a lane that holds nothing weighs 0. */
static void load_gradients(back_half *h, const back_job *j)
{
    int w = j->width, hd = j->shape.head_dim;
    for (int r = 0; r < h->l.count; r++) {
        uint16_t *row = h->rows + (size_t)(r * w);
        vf sum = v_set(0.0f);
        if (h->l.position[r] < 0) {
            memset(row, 0, (size_t)w * 2);
            h->lse[r] = __builtin_inff();
            h->delta[r] = 0;
            continue;
        }
        size_t at = lane_at(&h->l, r, j->shape.heads, j->group, hd);
        for (int c = 0; c < w; c += VW) {
            vh half = c < hd ? v_to_bf16_fast(v_load_act(j->dout, at + (size_t)c, hd - c, j->dout_type)) : (vh){0};
            vh_store_n(row + c, half, VW);
            if (c < hd) {
                sum = v_fma(v_from_bf16(half), v_load_act(j->out, at + (size_t)c, hd - c, SPURION_BF16), sum);
            }
        }
        h->lse[r] = j->lse[lane_at(&h->l, r, j->shape.heads, j->group, 1)] * LOG2E;
        h->delta[r] = v_sum(sum);
    }
    spurion_amx_pack_rows(h->dout, h->rows, (size_t)w, h->l.count, w);
    spurion_amx_pack_pairs(h->dout_pairs, h->rows, (size_t)w, h->l.count, w);
}

/* P = 2^(s - lse), dS = P (dP - delta) scale [1 - (s / cap)^2] of 16 lanes, to rows of p and ds and to pairs of ds. */
SIMD void gradient_lanes(back_half *h, int at, int half, spurion_attention_shape a)
{
    float unit = score_unit(a);
    vf lse = v_load(h->lse + at), delta = v_load(h->delta + at);
    for (int k = 0; k < KEYS; k += 2) {
        vf d[2];
        for (int i = 0; i < 2; i++) {
            vf s = v_load(h->s + (k + i) * LANES + half);
            vf weight = exp2_weight(v_fma(s, v_set(unit), -lse));
            d[i] = weight * (v_load(h->dp + (k + i) * LANES + half) - delta) * a.scale;
            if (a.softcap > 0) {
                vf bend = s / a.softcap;
                d[i] = v_select(weight > 0.0f, d[i] * (1.0f - bend * bend), weight); /* unseen: 0, and not 0 * inf */
            }
            vh_store_n(h->p + (k + i) * LANES_MAX + at, v_to_bf16_fast(weight), VW);
            vh_store_n(h->ds + (k + i) * LANES_MAX + at, v_to_bf16_fast(d[i]), VW);
        }
        store_pair(h->ds_pairs + half * VW * 2 + k / 32 * 2 * 512 + k % 32 / 2 * 32, d[0], d[1]);
    }
}

/* c (KEYS, hd of width) f32 at rows of the block += a (KEYS, count) . b (count, width), in place where the block is whole. */
static void gather_keys(back_half *h, const back_job *j, float *c, const uint16_t *a, const uint16_t *b, int skip, int rows)
{
    int w = j->width, hd = j->shape.head_dim;
    if (rows == KEYS && w == hd) {
        j->cpu->multiply_pairs(c, j->dkv_stride, a, LANES_MAX, b, KEYS, w, h->l.count, true);
        return;
    }
    memset(h->block, 0, (size_t)(KEYS * w) * sizeof *h->block);
    for (int r = 0; r < rows; r++) {
        memcpy(h->block + (size_t)((skip + r) * w), c + (size_t)r * j->dkv_stride, (size_t)hd * sizeof *c);
    }
    j->cpu->multiply_pairs(h->block, (size_t)w, a, LANES_MAX, b, KEYS, w, h->l.count, true);
    for (int r = 0; r < rows; r++) {
        memcpy(c + (size_t)r * j->dkv_stride, h->block + (size_t)((skip + r) * w), (size_t)hd * sizeof *c);
    }
}

static void backward_keys(back_half *h, const back_job *j, int block)
{
    const spurion_seq *s = h->l.seq;
    int from = s->dkv_position > block ? s->dkv_position : block, end = attention_end(s), to = end < block + KEYS ? end : block + KEYS;
    if (from < to) {
        size_t at = (size_t)(s->dkv_row + from - s->dkv_position) * j->dkv_stride + (size_t)h->l.kv_head * (size_t)j->shape.head_dim;
        gather_keys(h, j, j->dv + at, h->p, h->dout_pairs, from - block, to - from);
        gather_keys(h, j, j->dk + at, h->ds, h->q_pairs, from - block, to - from);
    }
}

static void backward_block(back_half *h, const back_job *j, int block)
{
    int w = j->width, hd = j->shape.head_dim, low, high;
    size_t stride = (size_t)j->shape.kv_heads * (size_t)hd, at = (size_t)h->l.kv_head * (size_t)hd;
    bool fill;
    uint16_t *keys = block_operands(&h->blocks, block / KEYS, &fill), *values = keys + KEYS * w, *keys_t = values + KEYS * w;

    if (fill) {
        copy_keys(keys, w, j->k, at, stride, h->l.seq, block, hd);
        copy_keys(values, w, j->v, at, stride, h->l.seq, block, hd);
        spurion_amx_transpose(keys_t, KEYS, keys, (size_t)w, KEYS, w);
    }
    lanes_seeing(&low, &high, &h->l, block, j->group, j->shape.window);
    for (int g = 0; g < h->l.count / LANES; g++) {
        if (g < low || g >= high) {
            for (int k = 0; k < KEYS; k++) {
                memset(h->p + k * LANES_MAX + g * LANES, 0, LANES * 2);
                memset(h->ds + k * LANES_MAX + g * LANES, 0, LANES * 2);
            }
            continue;
        }
        j->cpu->multiply_pairs(h->s, LANES, keys, (size_t)w, h->q + (size_t)(g * LANES * w), KEYS, LANES, w, false);
        j->cpu->multiply_pairs(h->dp, LANES, values, (size_t)w, h->dout + (size_t)(g * LANES * w), KEYS, LANES, w, false);
        for (int half = 0; half < LANES; half += VW) {
            const int32_t *position = h->l.position + g * LANES + half;
            if (j->shape.softcap > 0 || !sees_all(position, block, j->shape.window)) {
                scores_prepare(h->s + half, position, block, j->shape);
            }
            gradient_lanes(h, g * LANES + half, half, j->shape);
        }
        j->cpu->multiply_pairs(h->dq + (size_t)(g * w * LANES), LANES, keys_t, KEYS, h->ds_pairs, w, LANES, KEYS, true);
    }
    backward_keys(h, j, block);
}

static void write_query_gradients(back_half *h, const back_job *j)
{
    int hd = j->shape.head_dim, w = j->width;
    float turned[VW * VW];
    for (int r0 = 0; r0 < h->l.count; r0 += VW) {
        const float *dq = h->dq + (size_t)(r0 / LANES * w * LANES) + r0 % LANES;
        for (int c = 0; c < hd; c += VW) {
            spurion_amx_turn_words(turned, VW, dq + c * LANES, LANES);
            for (int r = r0; r < r0 + VW; r++) {
                if (h->l.position[r] >= 0) {
                    v_store_n(j->dq + lane_at(&h->l, r, j->shape.heads, j->group, hd) + c, v_load(turned + (r - r0) * VW), hd - c);
                }
            }
        }
    }
}

/* Gradients of all keys begin at 0, also those that nobody sees. */
static void zero_keys(const back_half *h, const back_job *j)
{
    const spurion_seq *s = h->l.seq;
    for (int i = s->dkv_position; i < attention_end(s); i++) {
        size_t at = (size_t)(s->dkv_row + i - s->dkv_position) * j->dkv_stride + (size_t)h->l.kv_head * (size_t)j->shape.head_dim;
        memset(j->dk + at, 0, (size_t)j->shape.head_dim * sizeof *j->dk);
        memset(j->dv + at, 0, (size_t)j->shape.head_dim * sizeof *j->dv);
    }
}

void spurion_attention_lanes_back_item(void *context, int64_t item, int worker)
{
    const back_job *j = context;
    back_half h;
    const spurion_seq *s = &j->seqs[item / j->shape.kv_heads];
    int begin = s->q_position, end = attention_end(s), window = j->shape.window;

    if (s->q_count == 0) {
        return;
    }
    place_backward(&h, j, j->cpu->scratch[worker]);
    h.l.seq = s;
    h.l.kv_head = (int)(item % j->shape.kv_heads);
    zero_keys(&h, j);
    blocks_begin(&h.blocks, attention_first_key(begin, window) / KEYS);
    if (j->cpu->amx) {
        spurion_amx_begin();
    }
    for (int first = begin / h.queries * h.queries; first < end; first += h.queries) {
        int from = first > begin ? first : begin, stop = first + h.queries < end ? first + h.queries : end;
        h.l.first = first, h.l.from = from, h.l.end = stop;
        lanes_place(&h.l, j->group, h.queries);
        load_queries(&h, j);
        load_gradients(&h, j);
        memset(h.dq, 0, (size_t)(h.l.count * j->width) * sizeof *h.dq);
        for (int b = attention_first_key(from, window) / KEYS; b * KEYS < stop; b++) {
            backward_block(&h, j, b * KEYS);
        }
        write_query_gradients(&h, j);
    }
    if (j->cpu->amx) {
        spurion_amx_end();
    }
}

#else

void spurion_attention_lanes_item(void *context, int64_t item, int worker)
{
    (void)context;
    (void)item;
    (void)worker;
}

void spurion_attention_lanes_back_item(void *context, int64_t item, int worker)
{
    (void)context;
    (void)item;
    (void)worker;
}

#endif

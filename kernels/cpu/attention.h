/* What attention forward and backward, plain and on AMX, share: items, key blocks, loading, softmax. For op files. */
#ifndef SPURION_CPU_ATTENTION_H
#define SPURION_CPU_ATTENTION_H

#include <math.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/tile.h"

#define KEYS SPURION_KEY_BLOCK

/* Position after a seq's last query: its number of keys. */
static inline int attention_end(const spurion_seq *s)
{
    return s->q_position + s->q_count;
}

/* First key that a query at position i sees. */
static inline int attention_first_key(int i, int window)
{
    return window > 0 && i >= window ? i - window + 1 : 0;
}

/* out (count, ld) f32 = rows of in (its columns at .. at + width), rest of each line 0. */
static inline void attention_load(float *out, int ld, const void *in, size_t at, size_t stride, int count, int width, spurion_dtype dtype)
{
    for (int r = 0; r < count; r++) {
        for (int c = 0; c < ld; c += VW) {
            vf v = c < width ? v_load_act(in, at + (size_t)r * stride + (size_t)c, width - c, dtype) : v_set(0.0f);
            v_store(out + (size_t)r * (size_t)ld + c, v);
        }
    }
}

/* out (KEYS, ld) f32 = keys first .. first + KEYS - 1 of a seq, gathered from its pieces; 0 past its end.
 * in: k or v from the kv head's first column on, rows of `stride` elements. */
static inline void attention_load_keys(float *out, int ld, const void *in, size_t at, size_t stride, const spurion_seq *s, int first,
                                       int width, spurion_dtype dtype)
{
    int end = attention_end(s), stop = first + KEYS < end ? first + KEYS : end;
    for (int p = 0; p < s->piece_count; p++) {
        int from = s->piece_position[p], to = p + 1 < s->piece_count ? s->piece_position[p + 1] : end;
        int a = from > first ? from : first, b = to < stop ? to : stop;
        if (a < b) {
            size_t row = (size_t)(s->piece_row[p] + a - from);
            attention_load(out + (size_t)(a - first) * (size_t)ld, ld, in, at + row * stride, stride, b - a, width, dtype);
        }
    }
    if (stop < first + KEYS) {
        memset(out + (size_t)(stop - first) * (size_t)ld, 0, (size_t)(first + KEYS - stop) * (size_t)ld * sizeof *out);
    }
}

/* out (width, KEYS) = in (KEYS, ld) transposed. */
static inline void attention_transpose(float *out, const float *in, int ld, int width)
{
    for (int k0 = 0; k0 < KEYS; k0 += 8) {
        for (int d = 0; d < width; d++) {
            for (int k = 0; k < 8; k++) {
                out[d * KEYS + k0 + k] = in[(k0 + k) * ld + d];
            }
        }
    }
}

/* Scores of one row of a key block, scaled and capped; -inf outside the visible keys low .. high - 1 of the block. */
SIMD vf attention_score(vf raw, int column, int low, int high, float scale, float cap)
{
    vf s = raw * scale;
    if (cap > 0) {
        s = cap * v_tanh(s / cap);
    }
    if (column < low || column + VW > high) {
        vi lane = v_lanes(column);
        s = v_select((lane >= low) & (lane < high), s, v_set(-__builtin_inff()));
    }
    return s;
}

/* Query-key pairs that count, for the profile. */
static inline double attention_pairs(const spurion_seq *seqs, int count, int window)
{
    double pairs = 0;
    for (int s = 0; s < count; s++) {
        for (int i = seqs[s].q_position; i < attention_end(&seqs[s]); i++) {
            pairs += i + 1 - attention_first_key(i, window);
        }
    }
    return pairs;
}

static inline spurion_status attention_check(spurion_attention_shape shape)
{
    if (shape.kv_heads <= 0 || shape.heads % shape.kv_heads != 0 || shape.head_dim <= 0 || shape.head_dim > SPURION_HEAD_DIM_MAX ||
        shape.heads / shape.kv_heads > 256) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "attention: expected head dim up to %d and at most 256 heads per key "
                             "head, found %d heads, %d key heads, head dim %d", SPURION_HEAD_DIM_MAX, shape.heads, shape.kv_heads,
                             shape.head_dim);
    }
    return spurion_ok();
}

/* --- forward --- */

typedef struct attention_job {
    spurion_cpu *cpu;
    void *out;
    float *lse;
    const void *q, *k, *v;
    const spurion_seq *seqs;
    int seq_count;
    spurion_attention_shape shape;
    int group, tile; /* query heads per key head; queries per tile */
    int width;       /* head_dim rounded up to whole vectors (AMX: steps) */
    spurion_dtype dtype;
} attention_job;

enum { TILE_ROWS_MAX = 256 }; /* queries x heads of a tile */

/* Queries at positions first .. first + count - 1 of a seq, with the heads of one key head. */
typedef struct attention_tile {
    const spurion_seq *seq;
    int kv_head, first, count;
    float *acc, *s, *max, *sum;     /* in scratch: (rows, width), (rows, KEYS), (rows), (rows) */
    float *keys, *keys_t, *values, *q;
} attention_tile;

static inline int tiles_of(const spurion_seq *s, int tile)
{
    return s->q_count == 0 ? 0 : (attention_end(s) - 1) / tile - s->q_position / tile + 1;
}

static inline void place_tile(attention_tile *t, const attention_job *j, int64_t item)
{
    int s = 0;
    t->kv_head = (int)(item % j->shape.kv_heads);
    item /= j->shape.kv_heads;
    while (item >= tiles_of(&j->seqs[s], j->tile)) {
        item -= tiles_of(&j->seqs[s++], j->tile);
    }
    t->seq = &j->seqs[s];
    int begin = (t->seq->q_position / j->tile + (int)item) * j->tile, end = begin + j->tile;
    t->first = begin > t->seq->q_position ? begin : t->seq->q_position;
    t->count = (end < attention_end(t->seq) ? end : attention_end(t->seq)) - t->first;
}

/* Turns a row of raw scores into weights (in place, or rounded to bf16 in `half`); updates the row's max and sum.
 * Gives the factor for what was summed before. */
SIMD float soften_row(float *s, uint16_t *half, float *max, float *sum, int low, int high, float scale, float cap)
{
    vf v[KEYS / VW], top = v_set(*max), total = v_set(0.0f);
    for (int c = 0; c < KEYS / VW; c++) {
        v[c] = attention_score(v_load(s + c * VW), c * VW, low, high, scale, cap);
        top = v_max(top, v[c]);
    }
    float now = v_max_lane(top), base = now == -__builtin_inff() ? 0.0f : now;
    for (int c = 0; c < KEYS / VW; c++) {
        v[c] = v_exp(v[c] - base);
        if (half == NULL) {
            v_store(s + c * VW, v[c]);
        } else {
            vh_store_n(half + c * VW, v_to_bf16_fast(v[c]), VW);
        }
        total += v[c];
    }
    float factor = *max == now ? 1.0f : v_exp(v_set(*max - base))[0]; /* e^0 is 1, and 1 is what nothing-seen needs too */
    *max = now;
    *sum = *sum * factor + v_sum(total);
    return factor;
}

/* Softens every row of the tile against the block and rescales what was summed before. */
SIMD void soften_tile(attention_tile *t, const attention_job *j, uint16_t *half, int begin)
{
    int w = j->width;
    for (int r = 0; r < t->count * j->group; r++) {
        int i = t->first + r / j->group, low = attention_first_key(i, j->shape.window) - begin, high = i + 1 - begin;
        float factor = soften_row(t->s + r * KEYS, half == NULL ? NULL : half + r * KEYS, &t->max[r], &t->sum[r], low,
                                  high < KEYS ? high : KEYS, j->shape.scale, j->shape.softcap);
        if (factor != 1.0f) {
            for (int c = 0; c < w; c += VW) {
                v_store(t->acc + r * w + c, v_load(t->acc + r * w + c) * factor);
            }
        }
    }
}

/* Values divided by their sum, and lse, to their rows. */
static inline void write_tile(const attention_tile *t, const attention_job *j)
{
    int hd = j->shape.head_dim;
    for (int r = 0; r < t->count * j->group; r++) {
        size_t row = (size_t)(t->seq->q_row + t->first - t->seq->q_position + r / j->group);
        size_t head = (size_t)(t->kv_head * j->group + r % j->group), heads = (size_t)j->shape.heads;
        for (int c = 0; c < hd; c += VW) {
            v_store_act(j->out, (row * heads + head) * (size_t)hd + (size_t)c, v_load(t->acc + r * j->width + c) / t->sum[r], hd - c,
                        j->dtype);
        }
        j->lse[row * heads + head] = t->max[r] + logf(t->sum[r]);
    }
}

/* Everything before the first key block. */
static inline void begin_tile(attention_tile *t, const attention_job *j)
{
    for (int r = 0; r < t->count * j->group; r++) {
        t->max[r] = -__builtin_inff();
        t->sum[r] = 0;
    }
    memset(t->acc, 0, (size_t)(t->count * j->group * j->width) * sizeof *t->acc);
}

/* --- backward --- */

enum { QUERIES = 64 }; /* of one tile */

typedef struct back_job {
    spurion_cpu *cpu;
    float *dq, *dk, *dv;
    size_t dkv_stride;
    const float *lse;
    const void *dout, *out, *q, *k, *v;
    const spurion_seq *seqs;
    spurion_attention_shape shape;
    int group, width;
    spurion_dtype dtype, dout_type;
} back_job;

struct back_half; /* attention_lanes.c */

/* One key block of one seq and key head; buffers in scratch. */
typedef struct back_state {
    const spurion_seq *seq;
    int kv_head;
    int block;      /* first key position */
    bool want_keys; /* some key of the block needs dk, dv */
    float *keys, *keys_t, *values_t, *dk, *dv; /* (KEYS, width), _t (width, KEYS) */
    float *q, *dout, *dq;                      /* (QUERIES, width) */
    float *p, *ds;                             /* (QUERIES, KEYS) */
    struct back_half *half;
} back_state;

/* p: raw scores to weights; ds: dP to dS; one row, in place or rounded to bf16 in the two halves. */
SIMD void row_gradient(float *p, float *ds, uint16_t *half_p, uint16_t *half_ds, float lse, float delta, int low, int high, spurion_attention_shape shape)
{
    for (int c = 0; c < KEYS; c += VW) {
        vf s = attention_score(v_load(p + c), c, low, high, shape.scale, shape.softcap);
        vf weight = v_exp(s - lse);
        vf d = weight * (v_load(ds + c) - delta) * shape.scale;
        if (shape.softcap > 0) {
            vf bend = s / shape.softcap;
            d *= 1.0f - bend * bend;
        }
        d = v_select(weight > 0.0f, d, v_select(weight != weight, weight, v_set(0.0f))); /* unseen: 0, and not 0 * inf */
        if (half_p == NULL) {
            v_store(p + c, weight);
            v_store(ds + c, d);
        } else {
            vh_store_n(half_p + c, v_to_bf16_fast(weight), VW);
            vh_store_n(half_ds + c, v_to_bf16_fast(d), VW);
        }
    }
}

static inline void store_rows(float *out, size_t stride, const float *in, int ld, int count, int width)
{
    for (int r = 0; r < count; r++) {
        memcpy(out + (size_t)r * stride, in + (size_t)r * (size_t)ld, (size_t)width * sizeof *out);
    }
}

static inline void store_block(const back_state *b, const back_job *j)
{
    int from = b->seq->dkv_position > b->block ? b->seq->dkv_position : b->block;
    int end = attention_end(b->seq), to = end < b->block + KEYS ? end : b->block + KEYS;
    if (from >= to) {
        return;
    }
    size_t at = (size_t)(b->seq->dkv_row + from - b->seq->dkv_position) * j->dkv_stride + (size_t)b->kv_head * (size_t)j->shape.head_dim;
    int skip = (from - b->block) * j->width;
    store_rows(j->dk + at, j->dkv_stride, b->dk + skip, j->width, to - from, j->shape.head_dim);
    store_rows(j->dv + at, j->dkv_stride, b->dv + skip, j->width, to - from, j->shape.head_dim);
}

/* The first block that any query from `first` on sees: there dq begins at 0. */
static inline bool is_first_block(const back_state *b, const back_job *j, int first)
{
    return attention_first_key(first, j->shape.window) / KEYS * KEYS == b->block;
}

typedef void (*back_load_fn)(back_state *b, const back_job *j);
/* Queries first .. first + count - 1 of one head against the block; tile: the multiple of QUERIES at or before first. */
typedef void (*back_tile_fn)(back_state *b, const back_job *j, int head, int tile, int first, int count);

/* All query tiles that see the block. */
static inline void back_block(back_state *b, const back_job *j, back_tile_fn tile_fn)
{
    int begin = b->seq->q_position, end = attention_end(b->seq), window = j->shape.window;
    for (int tile = begin / QUERIES * QUERIES; tile < end; tile += QUERIES) {
        int first = tile > begin ? tile : begin, last = tile + QUERIES < end ? tile + QUERIES : end; /* one past */
        if (last <= b->block || attention_first_key(first, window) >= b->block + KEYS) {
            continue;
        }
        for (int g = 0; g < j->group; g++) {
            tile_fn(b, j, b->kv_head * j->group + g, tile, first, last - first);
        }
    }
}

/* One item: all key blocks of one seq and key head. */
static inline void back_sequence(back_state *b, const back_job *j, int64_t item, back_load_fn load_fn, back_tile_fn tile_fn)
{
    b->seq = &j->seqs[item / j->shape.kv_heads];
    b->kv_head = (int)(item % j->shape.kv_heads);
    if (b->seq->q_count == 0) {
        return;
    }
    int first_key = attention_first_key(b->seq->q_position, j->shape.window);
    int from = first_key < b->seq->dkv_position ? first_key : b->seq->dkv_position; /* keys that nobody sees get their 0 */
    size_t bytes = (size_t)(KEYS * j->width) * sizeof *b->dk;
    for (b->block = from / KEYS * KEYS; b->block < attention_end(b->seq); b->block += KEYS) {
        b->want_keys = b->block + KEYS > b->seq->dkv_position;
        memset(b->dk, 0, bytes);
        memset(b->dv, 0, bytes);
        load_fn(b, j);
        back_block(b, j, tile_fn);
        store_block(b, j);
    }
}

/* Items with queries in lanes, for bf16 (attention_lanes.c); never called where the device has no multiply_pairs. */
void spurion_attention_lanes_item(void *context, int64_t item, int worker);
void spurion_attention_lanes_back_item(void *context, int64_t item, int worker);

#endif

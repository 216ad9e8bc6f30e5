/* What attention forward and backward share: items, key blocks, loading. For op files. */
#ifndef SPURION_CPU_ATTENTION_H
#define SPURION_CPU_ATTENTION_H

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
        vi lane;
        for (int i = 0; i < VW; i++) {
            lane[i] = column + i;
        }
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
        shape.head_dim % 8 != 0 || shape.heads / shape.kv_heads > 256) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "attention: expected head dim a multiple of 8 up to %d and at most 256 heads per key "
                             "head, found %d heads, %d key heads, head dim %d", SPURION_HEAD_DIM_MAX, shape.heads, shape.kv_heads,
                             shape.head_dim);
    }
    return spurion_ok();
}

#endif

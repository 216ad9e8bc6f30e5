/* Screening: an encoder's products in bf16 with a bound on their error say which features can matter; only those are computed exactly.
 * With u the input, w a row of the encoder, and u', w' rounded to bf16:
 *   |u'.w' - u.w| <= |u'| |w' - w| + |u' - u| |w|      (Cauchy-Schwarz)
 * plus the rounding of both sums, at most d 2^-23 |u| |w| each. The exact value is exact_product below, whichever way a feature was found,
 * so that the result is that of a product in f32 with one order of summation. For op files. Memory: none. */
#ifndef SPURION_CPU_SAE_SCREEN_H
#define SPURION_CPU_SAE_SCREEN_H

#include <math.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/sae_select.h"

/* Error bound of a row's products: loss * (row_loss of the feature) + norm * (row_norm of the feature). */
typedef struct screen_bound {
    float loss, norm;
} screen_bound;

SIMD vf screen_round(vf v)
{
    return v_from_bf16(v_to_bf16_fast(v)); /* as the input of the product is rounded */
}

static inline screen_bound screen_bound_of(const float *u, int d)
{
    double whole = 0, lost = 0;
    for (int c = 0; c < d; c += VW) {
        float x[VW], r[VW];
        vf v = v_load_n(u + c, d - c);
        v_store(x, v);
        v_store(r, screen_round(v) - v);
        for (int i = 0; i < VW; i++) {
            whole += (double)x[i] * x[i];
            lost += (double)r[i] * r[i];
        }
    }
    whole = sqrt(whole);
    return (screen_bound){(float)(1.01 * whole), (float)(1.0001 * sqrt(lost) + 4.8e-7 * d * whole + 1e-30)};
}

/* <u, w> in f32: four chains of multiply-adds, then their lanes. */
SIMD float exact_product(const float *u, const float *w, int d)
{
    vf sum[4] = {v_set(0.0f), v_set(0.0f), v_set(0.0f), v_set(0.0f)};
    int c = 0;
    for (; c + 4 * VW <= d; c += 4 * VW) {
        for (int i = 0; i < 4; i++) {
            sum[i] = v_fma(v_load(u + c + i * VW), v_load(w + c + i * VW), sum[i]);
        }
    }
    for (; c < d; c += VW) {
        sum[0] = v_fma(v_load_n(u + c, d - c), v_load_n(w + c, d - c), sum[0]);
    }
    return v_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* f of feature i from its exact product; not positive where it is silent. The same operations as activate_row. */
static inline float exact_activation(const spurion_sae_weights *sae, const float *u, int i)
{
    float p = exact_product(u, sae->enc->rows + (size_t)i * (size_t)sae->d, sae->d);
    if (sae->kind == SPURION_SAE_GATED) {
        return p + sae->gate_bias[i] > 0.0f ? p * sae->mag_scale[i] + sae->mag_bias[i] : 0.0f;
    }
    if (sae->enc->bias != NULL) {
        p += sae->enc->bias[i];
    }
    if (sae->scale != NULL) {
        p *= sae->scale[i];
    }
    return sae->kind == SPURION_SAE_JUMPRELU && !(p > sae->threshold[i]) ? 0.0f : p;
}

/* What selection compares, between low and high, for VW features i onward (n of them there) of raw products p. */
typedef struct screen_range {
    vf low, high;
} screen_range;

SIMD screen_range screen_range_of(const spurion_sae_weights *sae, vf p, screen_bound b, int i, int n)
{
    const spurion_matrix *m = sae->enc;
    vf radius = v_set(b.loss) * v_load_n(m->row_loss + i, n) + v_set(b.norm) * v_load_n(m->row_norm + i, n);
    const float *bias = sae->kind == SPURION_SAE_GATED ? sae->gate_bias : m->bias;
    if (bias != NULL) {
        p += v_load_n(bias + i, n);
    }
    if (sae->scale != NULL) {
        vf h = v_load_n(sae->scale + i, n);
        p *= h;
        radius *= v_abs(h);
    }
    radius += v_abs(p) * 1e-6f; /* the roundings of this function */
    return (screen_range){p - radius, p + radius};
}

/* Lists: every feature of the chunk that may be active is computed, in order. */
static inline void screen_list(select_row *s, const float *p, const float *u, screen_bound b, const spurion_sae_weights *sae, int n, int first,
                               int slots)
{
    for (int c = 0; c < n; c += VW) {
        vf high = screen_range_of(sae, v_load_n(p + c, n - c), b, first + c, n - c).high;
        vf bar = sae->kind == SPURION_SAE_JUMPRELU ? v_max(v_load_n(sae->threshold + first + c, n - c), v_set(0.0f)) : v_set(0.0f);
        unsigned bits = select_mask(~(high <= bar)); /* a NaN is looked at */
        for (bits &= n - c >= VW ? ~0u : (1u << (n - c)) - 1; bits != 0; bits &= bits - 1) {
            int i = first + c + __builtin_ctz(bits);
            float f = exact_activation(sae, u, i);
            if (f > 0.0f) {
                s->active++;
                if (s->count < slots) {
                    s->entries[s->count++] = select_by_index((uint32_t)i, f);
                }
            }
        }
    }
}

/* --- top-k: candidates are words of (lower end, index); the k-th largest lower end bars whoever's upper end lies below it --- */

/* Words order as the floats do, negative ones too. */
static inline uint32_t screen_order(float v)
{
    uint32_t u = select_bits(v);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

static inline float screen_value(uint64_t word)
{
    uint32_t u = (uint32_t)(word >> 32);
    return select_value(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

/* The k-th largest lower end of more than k words. */
static inline float screen_bar(const uint64_t *e, int count, int k)
{
    uint32_t low = 0, high = UINT32_MAX; /* at least k words are >= low; fewer than k >= high, or high is the end */
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        int n = 0;
        for (int i = 0; i < count; i++) {
            n += (uint32_t)(e[i] >> 32) >= middle;
        }
        if (n >= k) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return screen_value((uint64_t)low << 32);
}

/* Upper end of a candidate, from its lower one: both lie a radius from the middle. */
static inline float screen_high(const spurion_sae_weights *sae, screen_bound b, uint64_t word)
{
    uint32_t i = (uint32_t)word;
    float low = screen_value(word), h = sae->scale == NULL ? 1.0f : fabsf(sae->scale[i]);
    float radius = (b.loss * sae->enc->row_loss[i] + b.norm * sae->enc->row_norm[i]) * h;
    return low + 2.0f * radius + 4e-6f * (fabsf(low) + radius);
}

/* Drops candidates that cannot be among the k largest; gives the number left. */
static inline int screen_shrink(uint64_t *e, int count, float *floor, const spurion_sae_weights *sae, screen_bound b)
{
    int n = 0;
    if (count <= sae->k) {
        return count;
    }
    float bar = screen_bar(e, count, sae->k);
    *floor = bar > *floor ? bar : *floor;
    for (int i = 0; i < count; i++) {
        uint64_t word = e[i];
        e[n] = word;
        n += screen_high(sae, b, word) >= *floor;
    }
    return n;
}

/* Scans n products; s->count becomes -1 when more candidates stay than there is room for. */
static inline void screen_top(select_row *s, const float *p, screen_bound b, const spurion_sae_weights *sae, int n, int first, int cap)
{
    for (int c = 0; c < n && s->count >= 0; c += VW) {
        screen_range r = screen_range_of(sae, v_load_n(p + c, n - c), b, first + c, n - c);
        unsigned bits = select_mask((r.high >= s->floor) & (r.high > 0.0f));
        bits &= n - c >= VW ? ~0u : (1u << (n - c)) - 1;
        if (bits == 0) {
            continue;
        }
        if (s->count + VW > cap) {
            s->count = screen_shrink(s->entries, s->count, &s->floor, sae, b);
            if (s->count + VW > cap) {
                s->count = -1;
                return;
            }
        }
        float low[VW];
        v_store(low, r.low);
        for (; bits != 0; bits &= bits - 1) {
            int i = __builtin_ctz(bits);
            s->entries[s->count++] = (uint64_t)screen_order(low[i]) << 32 | (uint32_t)(first + c + i);
        }
    }
}

/* Candidates to exact words by value; gives the number of positive ones. count < 0: the whole dictionary, k at a time. */
static inline int screen_finish(uint64_t *e, int count, int cap, const float *u, screen_bound b, const spurion_sae_weights *sae)
{
    float floor = 0.0f;
    int n = 0;
    if (count < 0) {
        select_row s = {e, 0, 0, 0.0f};
        for (int i = 0; i < sae->F; i++) {
            float f = exact_activation(sae, u, i);
            select_top(&s, &f, 1, i, sae->k, cap);
        }
        return s.count;
    }
    count = screen_shrink(e, count, &floor, sae, b);
    for (int i = 0; i < count; i++) {
        uint32_t index = (uint32_t)e[i];
        float f = exact_activation(sae, u, (int)index);
        e[n] = select_by_value(index, f);
        n += f > 0.0f;
    }
    return n;
}

#endif

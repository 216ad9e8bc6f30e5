/* Vectors of f32 for op files: VW lanes, fixed by the instruction set the file is compiled for, and the functions that models need.
 * Every multiply-add is written out as v_fma and the folder is compiled with -ffp-contract=off, so that arithmetic is what stands
 * here in every inlined copy. A tail shorter than a vector goes through the same instructions: v_load_n pads with zeros. */
#ifndef SPURION_CPU_SIMD_H
#define SPURION_CPU_SIMD_H

#include <stdint.h>
#include <string.h>

#include "spurion/dev.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define VW 16
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define VW 8
#else
#define VW 4
#endif

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef uint16_t vh __attribute__((vector_size(VW * 2)));
typedef double vd __attribute__((vector_size(VW * 8)));
typedef float vf_any __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(VW * 2), aligned(2), may_alias));

#define SIMD static inline __attribute__((always_inline, unused))

SIMD vf v_set(float a)
{
    return a - (vf){0};
}

SIMD vf v_load(const float *p)
{
    return *(const vf_any *)p;
}

SIMD void v_store(float *p, vf v)
{
    *(vf_any *)p = v;
}

#if VW == 16
#define V_TAIL(n) ((__mmask16)((1u << (n)) - 1))
#else
/* Out of line: a whole vector is the common case, and its path stays small. */
static __attribute__((noinline, unused)) vf v_load_tail(const float *p, int n)
{
    float t[VW] = {0};
    memcpy(t, p, (size_t)n * sizeof *p);
    return v_load(t);
}

static __attribute__((noinline, unused)) void v_store_tail(float *p, vf v, int n)
{
    float t[VW];
    v_store(t, v);
    memcpy(p, t, (size_t)n * sizeof *p);
}
#endif

/* The first n lanes (n >= 1; all of them when n >= VW), zeros behind. */
SIMD vf v_load_n(const float *p, int n)
{
    if (__builtin_expect(n >= VW, 1)) {
        return v_load(p);
    }
#if VW == 16
    return (vf)_mm512_maskz_loadu_ps(V_TAIL(n), p);
#else
    return v_load_tail(p, n);
#endif
}

SIMD void v_store_n(float *p, vf v, int n)
{
    if (__builtin_expect(n >= VW, 1)) {
        v_store(p, v);
        return;
    }
#if VW == 16
    _mm512_mask_storeu_ps(p, V_TAIL(n), (__m512)v);
#else
    v_store_tail(p, v, n);
#endif
}

SIMD vf v_fma(vf a, vf b, vf c)
{
#if VW == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VW == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* mask lanes are all ones or all zeros */
SIMD vf v_select(vi mask, vf yes, vf no)
{
#if VW == 8
    return (vf)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)mask);
#else
    return (vf)((mask & (vi)yes) | (~mask & (vi)no));
#endif
}

SIMD vf v_max(vf a, vf b)
{
#if VW == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif VW == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return v_select(a > b, a, b);
#endif
}

SIMD vf v_min(vf a, vf b)
{
#if VW == 16
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif VW == 8
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return v_select(a < b, a, b);
#endif
}

SIMD vf v_abs(vf a)
{
    return (vf)((vi)a & 0x7fffffff);
}

/* Adds the lanes by halves, lane i and lane i + half: an order fixed by VW. */
SIMD float v_sum(vf v)
{
#if VW == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    float t[VW];
    v_store(t, v);
    for (int half = VW / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            t[i] += t[i + half];
        }
    }
    return t[0];
#endif
}

SIMD float v_max_lane(vf v)
{
#if VW == 16
    return _mm512_reduce_max_ps((__m512)v);
#else
    float t[VW];
    v_store(t, v);
    for (int half = VW / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            t[i] = t[i] > t[i + half] ? t[i] : t[i + half];
        }
    }
    return t[0];
#endif
}

/* base, base + 1, ... */
SIMD vi v_lanes(int base)
{
#if VW == 16
    const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif VW == 8
    const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7};
#else
    const vi lanes = {0, 1, 2, 3};
#endif
    return lanes + base;
}

SIMD double vd_sum(vd v)
{
    double t[VW];
    memcpy(t, &v, sizeof t);
    for (int half = VW / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            t[i] += t[i + half];
        }
    }
    return t[0];
}

SIMD vd v_widen(vf v)
{
    return __builtin_convertvector(v, vd);
}

/* --- bf16 --- */

/* Rounds to nearest even; a NaN stays one. */
SIMD vh v_to_bf16(vf v)
{
    vu u = (vu)v;
    vu r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu nan = (u >> 16) | 0x40;
    vu is_nan = (vu)(v != v);
    return __builtin_convertvector((is_nan & nan) | (~is_nan & r), vh);
}

/* The same where the CPU has an instruction for it; denormals become 0. */
SIMD vh v_to_bf16_fast(vf v)
{
#if VW == 16 && defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    return v_to_bf16(v);
#endif
}

SIMD vf v_from_bf16(vh h)
{
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

#if VW != 16
static __attribute__((noinline, unused)) vh vh_load_tail(const uint16_t *p, int n)
{
    uint16_t t[VW] = {0};
    memcpy(t, p, (size_t)n * sizeof *p);
    return *(const vh_any *)t;
}

static __attribute__((noinline, unused)) void vh_store_tail(uint16_t *p, vh v, int n)
{
    uint16_t t[VW];
    *(vh_any *)t = v;
    memcpy(p, t, (size_t)n * sizeof *p);
}
#endif

SIMD vh vh_load_n(const uint16_t *p, int n)
{
    if (__builtin_expect(n >= VW, 1)) {
        return *(const vh_any *)p;
    }
#if VW == 16
    return (vh)_mm256_maskz_loadu_epi16(V_TAIL(n), p);
#else
    return vh_load_tail(p, n);
#endif
}

SIMD void vh_store_n(uint16_t *p, vh v, int n)
{
    if (__builtin_expect(n >= VW, 1)) {
        *(vh_any *)p = v;
        return;
    }
#if VW == 16
    _mm256_mask_storeu_epi16(p, V_TAIL(n), (__m256i)v);
#else
    vh_store_tail(p, v, n);
#endif
}

/* Element i onward of an array of the given type, n of them. */
SIMD vf v_load_act(const void *p, size_t i, int n, spurion_dtype dtype)
{
    return dtype == SPURION_BF16 ? v_from_bf16(vh_load_n((const uint16_t *)p + i, n)) : v_load_n((const float *)p + i, n);
}

SIMD void v_store_act(void *p, size_t i, vf v, int n, spurion_dtype dtype)
{
    if (dtype == SPURION_BF16) {
        vh_store_n((uint16_t *)p + i, v_to_bf16(v), n);
    } else {
        v_store_n((float *)p + i, v, n);
    }
}

/* --- functions ---  relative error about 1e-7 (test_simd measures it) */

/* 2^n for integral n in -126 .. 127 */
SIMD vf v_exp2i(vf n)
{
    return (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}

/* e^x. Cody-Waite reduction to |r| <= ln2 / 2, then Taylor to r^7 (remainder below 5e-9). 0 below -87.3, inf above 88.7; NaN stays. */
SIMD vf v_exp(vf x)
{
    const vf shift = v_set(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vf c = v_min(v_set(89.0f), v_max(v_set(-87.3f), x));
    vf n = v_fma(c, v_set(1.44269504088896341f), shift) - shift;
    vf r = v_fma(n, v_set(-0.693359375f), c);
    r = v_fma(n, v_set(2.12194440e-4f), r);
    vf p = v_set(1.0f / 5040);
    p = v_fma(p, r, v_set(1.0f / 720));
    p = v_fma(p, r, v_set(1.0f / 120));
    p = v_fma(p, r, v_set(1.0f / 24));
    p = v_fma(p, r, v_set(1.0f / 6));
    p = v_fma(p, r, v_set(0.5f));
    p = v_fma(p, r, v_set(1.0f));
    p = v_fma(p, r, v_set(1.0f));
#if VW == 16
    return (vf)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ), (__m512)p, (__m512)n);
#else
    vf half = v_fma(n, v_set(0.5f), shift) - shift; /* two factors: n may be 128 */
    vf y = p * v_exp2i(half) * v_exp2i(n - half);
    y = v_select(x < -87.3f, v_set(0.0f), y);
    y = v_select(x > 88.72f, v_set(__builtin_inff()), y);
    return v_select(x != x, x, y);
#endif
}

/* tanh x: odd Taylor-like minimax for |x| < 0.625 (Cephes tanhf), 1 - 2 / (e^2|x| + 1) beyond. */
SIMD vf v_tanh(vf x)
{
    vf a = v_abs(x), z = x * x;
    vf p = v_set(-5.70498872745e-3f);
    p = v_fma(p, z, v_set(2.06390887954e-2f));
    p = v_fma(p, z, v_set(-5.37397155531e-2f));
    p = v_fma(p, z, v_set(1.33314422036e-1f));
    p = v_fma(p, z, v_set(-3.33332819422e-1f));
    vf small = v_fma(p * z, x, x);
    vf big = 1.0f - 2.0f / (v_exp(a + a) + 1.0f);
    big = (vf)((vi)big | ((vi)x & (int32_t)0x80000000));
    return v_select(a < 0.625f, small, big);
}

/* erf x = x P(x^2) / Q(x^2), |x| clamped to 4 (the rational of Eigen's generic_fast_erf). */
SIMD vf v_erf(vf x)
{
    vf c = v_min(v_max(x, v_set(-4.0f)), v_set(4.0f));
    vf z = c * c;
    vf p = v_set(-2.72614225801306e-10f);
    p = v_fma(p, z, v_set(2.77068142495902e-08f));
    p = v_fma(p, z, v_set(-2.10102402082508e-06f));
    p = v_fma(p, z, v_set(-5.69250639462346e-05f));
    p = v_fma(p, z, v_set(-7.34990630326855e-04f));
    p = v_fma(p, z, v_set(-2.95459980854025e-03f));
    p = v_fma(p, z, v_set(-1.60960333262415e-02f));
    vf q = v_set(-1.45660718464996e-05f);
    q = v_fma(q, z, v_set(-2.13374055278905e-04f));
    q = v_fma(q, z, v_set(-1.68282697438203e-03f));
    q = v_fma(q, z, v_set(-7.37332916720468e-03f));
    q = v_fma(q, z, v_set(-1.42647390514189e-02f));
    return v_select(x != x, x, c * p / q);
}

SIMD vf v_sigmoid(vf x)
{
    return 1.0f / (1.0f + v_exp(-x));
}

#endif

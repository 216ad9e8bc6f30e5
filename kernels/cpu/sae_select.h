/* Picks the active features of a row while its pre-activations are still in cache. For op files.
 * An entry is one 64-bit word. Lists: index above the value's bits, so that ascending words are ascending indices. Top-k and groups:
 * the value's bits above the complement of the index, so that a larger word is a larger value, and of equal values the lower index;
 * only positive values become entries, hence their bits order like the values. */
#ifndef SPURION_CPU_SAE_SELECT_H
#define SPURION_CPU_SAE_SELECT_H

#include <stdbool.h>

#include "kernels/cpu/simd.h"
#include "spurion/ops.h"

static inline uint32_t select_bits(float v)
{
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    return u;
}

static inline float select_value(uint32_t u)
{
    float v;
    memcpy(&v, &u, sizeof v);
    return v;
}

static inline uint64_t select_by_index(uint32_t index, float v)
{
    return (uint64_t)index << 32 | select_bits(v);
}

static inline uint64_t select_by_value(uint32_t index, float v)
{
    return (uint64_t)select_bits(v) << 32 | (0xffffffffu - index);
}

static inline uint64_t select_flip(uint64_t by_value)
{
    return (uint64_t)(0xffffffffu - (uint32_t)by_value) << 32 | by_value >> 32;
}

/* One bit per lane that is set. */
SIMD unsigned select_mask(vi m)
{
#if VW == 16
    return (unsigned)_mm512_movepi32_mask((__m512i)m);
#elif VW == 8
    return (unsigned)_mm256_movemask_ps((__m256)m);
#else
    unsigned bits = 0;
    for (int i = 0; i < VW; i++) {
        bits |= (unsigned)(m[i] & 1) << i;
    }
    return bits;
#endif
}

/* Number of words >= bar. Words are below 2^63: their values are positive. */
static inline int select_count(const uint64_t *e, int count, uint64_t bar)
{
    int64_t n = 0;
    for (int i = 0; i < count; i++) {
        n += (int64_t)e[i] >= (int64_t)bar;
    }
    return (int)n;
}

/* Keeps the `keep` largest words (count > keep), in their order; gives the least of them. Words are distinct, so that some bar lets
 * exactly `keep` through: it is found by halving, which has no branch on data, unlike a quickselect. */
static inline uint64_t select_largest(uint64_t *e, int count, int keep)
{
    uint64_t low = 0, high = (uint64_t)1 << 63; /* count(low) > keep >= count(high) */
    while (high - low > 1) {
        uint64_t middle = low + (high - low) / 2;
        int n = select_count(e, count, middle);
        if (n > keep) {
            low = middle;
        } else {
            high = middle;
            if (n == keep) {
                break;
            }
        }
    }
    uint64_t least = UINT64_MAX;
    for (int i = 0, n = 0; i < count; i++) {
        uint64_t v = e[i];
        e[n] = v; /* n <= i: what is overwritten was read */
        n += v >= high;
        least = v >= high && v < least ? v : least;
    }
    return least;
}

/* Ascending; Shell's sort with Ciura's gaps: no memory, a few hundred words. */
static inline void select_sort(uint64_t *e, int count)
{
    static const int gaps[] = {1750, 701, 301, 132, 57, 23, 10, 4, 1};
    for (size_t g = 0; g < sizeof gaps / sizeof gaps[0]; g++) {
        int gap = gaps[g];
        for (int i = gap; i < count; i++) {
            uint64_t v = e[i];
            int k = i;
            for (; k >= gap && e[k - gap] > v; k -= gap) {
                e[k] = e[k - gap];
            }
            e[k] = v;
        }
    }
}

/* Entries of one row of one span of features. */
typedef struct select_row {
    uint64_t *entries;
    int count;   /* entries held */
    int active;  /* f != 0 seen (lists) */
    float floor; /* a candidate must be above */
} select_row;

static inline void select_shrink(select_row *s, int k)
{
    if (s->count > k) {
        uint64_t least = select_largest(s->entries, s->count, k);
        s->count = k;
        s->floor = select_value((uint32_t)(least >> 32)); /* an equal value later has a higher index: it loses */
    }
}

/* Scans n values of features first onward: top-k keeps candidates above the floor, at most `cap` of them. */
static inline void select_top(select_row *s, const float *f, int n, int first, int k, int cap)
{
    for (int c = 0; c < n; c += VW) {
        vf v = v_load_n(f + c, n - c);
        unsigned bits = select_mask(v > s->floor);
        if (bits == 0) {
            continue;
        }
        if (s->count + VW > cap) {
            select_shrink(s, k);
            bits = select_mask(v > s->floor);
        }
        for (; bits != 0; bits &= bits - 1) {
            int i = c + __builtin_ctz(bits);
            s->entries[s->count++] = select_by_value((uint32_t)(first + i), f[i]);
        }
    }
}

/* Scans n values: lists keep what is positive, the first `slots` of it. */
static inline void select_list(select_row *s, const float *f, int n, int first, int slots)
{
    for (int c = 0; c < n; c += VW) {
        unsigned bits = select_mask(v_load_n(f + c, n - c) > 0.0f);
        s->active += __builtin_popcount(bits);
        for (; bits != 0 && s->count < slots; bits &= bits - 1) {
            int i = c + __builtin_ctz(bits);
            s->entries[s->count++] = select_by_index((uint32_t)(first + i), f[i]);
        }
    }
}

/* Scans n values: entries[g] is the best of group g so far, 0 for none. */
static inline void select_groups(select_row *s, const float *f, int n, int first, int group_size)
{
    for (int a = 0; a < n;) {
        int group = (first + a) / group_size, b = (group + 1) * group_size - first;
        b = b < n ? b : n;
        vf top = v_set(0.0f);
        for (int c = a; c < b; c += VW) {
            top = v_max(v_load_n(f + c, b - c), top); /* a NaN loses */
        }
        float best = v_max_lane(top);
        if (best > select_value((uint32_t)(s->entries[group] >> 32))) {
            int i = a;
            while (f[i] != best) {
                i++;
            }
            s->entries[group] = select_by_value((uint32_t)(first + i), best);
        }
        a = b;
    }
}

#endif

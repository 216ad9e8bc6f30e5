/* What of a chunk's products is listed, ascending by index; one block of threads per row, the products read once.
 * Lists: what may be active, in order. Top-k, exactly: the largest lower end of each of up to GROUPS groups of features; the k-th largest of these
 * bars whoever's upper end lies below it, and only groups that hold somebody above are looked at again. The k-th largest of a list is found
 * digit by digit (radix selection over counts, which are whole numbers and thus the same in any order); equal values go to the lowest index.
 * Thread: engine. Memory: the caller's scratch; shared memory. */
#include "kernels/cuda/sae.cuh"

enum {
    THREADS = SPURION_CUDA_THREADS,
    WARPS = THREADS / SPURION_CUDA_WARP,
    STEP = 4 * THREADS, /* features that a block looks at in one go */
    EACH = 8,           /* groups of one thread */
    GROUPS = EACH * THREADS,
    CANDIDATES = 3456,  /* static shared memory ends at 48 KiB */
    BINS = THREADS,
    DIGIT = 8           /* bits: 1 << DIGIT = BINS */
};

/* Shared memory of a row. */
typedef struct room {
    float group[2 * GROUPS];  /* the largest lower end of each, then the largest upper end; later the candidates' exact values */
    float value[CANDIDATES];  /* lower ends, or exact values */
    int32_t index[CANDIDATES];
    int bins[BINS];
    int found[3];
} room;
static_assert(CANDIDATES <= 2 * GROUPS && CANDIDATES / THREADS < 32, "room for the candidates' exact values, a bit for each of a thread's");

/* --- values --- */

/* f of feature i from its product (bias included): not positive where it is silent. */
static __device__ inline float activate(const spurion_select &a, float p, int i)
{
    if (a.kind == SPURION_SAE_GATED) {
        return p + a.gate_bias[i] > 0.0f ? p * a.mag_scale[i] + a.mag_bias[i] : 0.0f;
    }
    float q = a.scale == NULL ? p : p * a.scale[i];
    return a.kind == SPURION_SAE_JUMPRELU && !(q > a.threshold[i]) ? 0.0f : q;
}

/* f of feature i from x and the weights in f32; the whole warp, which gets it. The order of the sum depends on d alone. */
static __device__ inline float exact(const spurion_select &a, size_t t, int i)
{
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP);
    const float *x = a.x + (a.source == NULL ? t : (size_t)a.source[t]) * (size_t)a.d, *w = a.weight + (size_t)i * (size_t)a.d;
    float shift = a.shift[t], factor = a.factor[t], sum = 0.0f;
#pragma unroll 4
    for (int c = 4 * lane; c < a.d; c += 4 * SPURION_CUDA_WARP) {
        spurion_four u = spurion_load4(x + c, a.d - c, a.whole), v = spurion_load4(w + c, a.d - c, a.whole);
        for (int n = 0; n < 4; n++) {
            sum = fmaf((u.v[n] - shift) * factor, v.v[n], sum); /* past the end v is 0 */
        }
    }
    for (int mask = SPURION_CUDA_WARP / 2; mask > 0; mask /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    }
    return activate(a, a.bias == NULL ? sum : sum + a.bias[i], i);
}

/* Between what and what the number lies that decides over feature i: where products are exact, both ends are f. */
static __device__ inline void range_of(float *low, float *high, const spurion_select &a, float spread, float p, int i)
{
    if (a.weight == NULL) {
        *low = *high = activate(a, p, i);
        return;
    }
    float radius = spread * a.reach[i];
    p += a.kind == SPURION_SAE_GATED ? a.gate_bias[i] : 0.0f;
    if (a.scale != NULL) {
        p *= a.scale[i];
        radius *= fabsf(a.scale[i]);
    }
    radius += fabsf(p) * 1e-6f; /* the roundings of this function, and of the bias */
    *low = p - radius;
    *high = p + radius;
    *high = *high <= 3e38f ? *high : INFINITY; /* a NaN is looked at */
}

/* Bits of positive values order like the values; everything else is 0. */
static __device__ inline uint32_t rank_bits(float v)
{
    return v > 0.0f ? __float_as_uint(v) : 0u;
}

/* --- the k-th largest of n values --- */

/* One digit of it: among values whose higher digits are those of `bar`, the bin that holds number *need from the top. Changes *need (what is
 * left to take inside the bin). Every thread of the block calls it. */
static __device__ inline uint32_t find_digit(room *r, const float *v, int n, uint32_t bar, int shift, int *need)
{
    int bin = BINS - 1 - (int)threadIdx.x, total; /* from the top */
    r->bins[bin] = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        uint32_t bits = rank_bits(v[i]);
        if (bits != 0 && (uint64_t)bits >> (shift + DIGIT) == (uint64_t)bar >> (shift + DIGIT)) {
            (void)atomicAdd(&r->bins[bits >> shift & (uint32_t)(BINS - 1)], 1);
        }
    }
    __syncthreads();
    int mine = r->bins[bin], above = spurion_scan(mine, &total);
    if (above < *need && above + mine >= *need) { /* one thread */
        r->found[0] = bin;
        r->found[1] = *need - above;
    }
    __syncthreads();
    uint32_t digit = (uint32_t)r->found[0];
    *need = r->found[1];
    __syncthreads(); /* found and bins have been read */
    return bar | digit << shift;
}

/* Bits of the k-th largest of n values, *ties: how many of those equal to it are among the k. 0 and 0 where no more than k are positive. */
static __device__ inline uint32_t kth_largest(int *ties, room *r, const float *v, int n, int k)
{
    int mine = 0, total, need = k;
    uint32_t bar = 0;
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        mine += v[i] > 0.0f;
    }
    (void)spurion_scan(mine, &total);
    *ties = 0;
    if (total <= k) {
        return 0;
    }
    for (int shift = 32 - DIGIT; shift >= 0; shift -= DIGIT) {
        bar = find_digit(r, v, n, bar, shift, &need);
    }
    *ties = need;
    return bar;
}

/* --- lists, in order --- */

static __device__ inline void put(const spurion_select &a, size_t t, int place, int i, float v)
{
    if (place < a.slots) {
        a.index[t * (size_t)a.slots + (size_t)place] = a.member == NULL ? i : a.member[i];
        a.value[t * (size_t)a.slots + (size_t)place] = v;
    }
}

/* Writes all features of a row of exact values above `bar` and the first `ties` of those at it; gives their number. bar 0: all positive ones.
 * active: the row holds f. */
static __device__ inline int write_list(const spurion_select &a, const float *row, size_t t, uint32_t bar, int ties, bool active)
{
    int taken = 0, tied = 0;
    for (int base = 0; base < a.F; base += STEP) {
        int first = base + 4 * (int)threadIdx.x, strict = 0, equal = 0, total;
        uint32_t bits[4];
        spurion_four v = spurion_load4(row + first, a.F - first, a.whole_pre && first < a.F);
        for (int n = 0; n < 4; n++) {
            int i = first + n;
            bits[n] = i < a.F ? rank_bits(active ? v.v[n] : activate(a, v.v[n], i)) : 0u;
            strict += bits[n] > bar;
            equal += bits[n] == bar;
        }
        int before = spurion_scan(strict | equal << 16, &total); /* at most 1024 of each */
        int to = taken + (before & 0xffff), tie = tied + (before >> 16);
        for (int n = 0; n < 4; n++) {
            bool is_tie = bits[n] == bar;
            if (bits[n] > bar || (is_tie && tie < ties)) {
                put(a, t, to + (tie < ties ? tie : ties), first + n, __uint_as_float(bits[n]));
            }
            to += bits[n] > bar;
            tie += is_tie;
        }
        taken += total & 0xffff;
        tied += total >> 16;
    }
    return taken + (tied < ties ? tied : ties);
}

/* Computes `count` candidates and lists those that are active, from place `taken` on; gives the next place. */
static __device__ inline int list_candidates(room *r, const spurion_select &a, size_t t, int count, int taken)
{
    __syncthreads(); /* the candidates are there */
    for (int n = (int)(threadIdx.x / SPURION_CUDA_WARP); n < count; n += WARPS) {
        float f = exact(a, t, r->index[n]);
        if (threadIdx.x % SPURION_CUDA_WARP == 0) {
            r->value[n] = f;
        }
    }
    __syncthreads();
    for (int base = 0; base < count; base += THREADS) {
        int n = base + (int)threadIdx.x, total;
        float f = n < count ? r->value[n] : 0.0f;
        int place = taken + spurion_scan(f > 0.0f, &total);
        if (f > 0.0f) {
            put(a, t, place, r->index[n], f);
        }
        taken += total;
    }
    __syncthreads(); /* they have been read */
    return taken;
}

/* A row of products in bf16; gives the number of active features. */
static __device__ inline int screen_list(room *r, const spurion_select &a, const float *row, size_t t)
{
    float spread = a.spread[t];
    int taken = 0, waiting = 0;
    for (int base = 0; base < a.F; base += STEP) {
        int first = base + 4 * (int)threadIdx.x, mine = 0, total;
        bool may[4];
        spurion_four p = spurion_load4(row + first, a.F - first, a.whole_pre && first < a.F);
        for (int n = 0; n < 4; n++) {
            float low, high, bar = 0.0f;
            may[n] = first + n < a.F;
            if (may[n]) {
                range_of(&low, &high, a, spread, p.v[n], first + n);
                bar = a.kind == SPURION_SAE_JUMPRELU ? fmaxf(a.threshold[first + n], 0.0f) : 0.0f;
                may[n] = !(high <= bar);
            }
            mine += may[n];
        }
        int place = waiting + spurion_scan(mine, &total);
        for (int n = 0; n < 4; n++) {
            if (may[n]) {
                r->index[place++] = first + n;
            }
        }
        waiting += total;
        if (waiting > CANDIDATES - STEP) {
            taken = list_candidates(r, a, t, waiting, taken);
            waiting = 0;
        }
    }
    return list_candidates(r, a, t, waiting, taken);
}

/* --- top-k --- */

/* Steps of features in a group: a thread's group g has its four of steps g * steps .. */
static __device__ inline int group_steps(const spurion_select &a)
{
    return (a.F + STEP * EACH - 1) / (STEP * EACH);
}

/* The largest lower and upper end of every group; gives their number. The row is read once. */
static __device__ inline int find_groups(room *r, const spurion_select &a, const float *row, float spread)
{
    int steps = group_steps(a), groups = 0;
    for (int base = 0; base < a.F; groups += THREADS) {
        float low = -INFINITY, high = -INFINITY;
#pragma unroll 4
        for (int s = 0; s < steps; s++, base += STEP) {
            int first = base + 4 * (int)threadIdx.x;
            if (first < a.F) {
                spurion_four p = spurion_load4(row + first, a.F - first, a.whole_pre);
                for (int n = 0; n < 4 && first + n < a.F; n++) {
                    float l, h;
                    range_of(&l, &h, a, spread, p.v[n], first + n);
                    low = fmaxf(low, l);
                    high = fmaxf(high, h);
                }
            }
        }
        r->group[groups + (int)threadIdx.x] = low;
        r->group[GROUPS + groups + (int)threadIdx.x] = high;
    }
    __syncthreads();
    return groups;
}

/* Features that may reach the bar, with their lower ends, in any order; gives their number, which may be beyond CANDIDATES. */
static __device__ inline int find_candidates(room *r, const spurion_select &a, const float *row, float spread, int groups, float bar)
{
    int steps = group_steps(a);
    if (threadIdx.x == 0) {
        r->found[2] = 0;
    }
    __syncthreads();
    for (int g = (int)threadIdx.x; g < groups; g += THREADS) {
        float most = r->group[GROUPS + g];
        if (!(most > 0.0f && most >= bar)) {
            continue;
        }
        for (int s = 0; s < steps; s++) {
            int first = (g / THREADS * steps + s) * STEP + 4 * (int)threadIdx.x;
            spurion_four p = spurion_load4(row + first, a.F - first, a.whole_pre && first < a.F);
            for (int n = 0; n < 4 && first + n < a.F; n++) {
                float low, high;
                range_of(&low, &high, a, spread, p.v[n], first + n);
                if (!(high > 0.0f && high >= bar)) {
                    continue;
                }
                int place = atomicAdd(&r->found[2], 1);
                if (place < CANDIDATES) {
                    r->index[place] = first + n;
                    r->value[place] = low;
                }
            }
        }
    }
    __syncthreads();
    return r->found[2];
}

/* Upper end of a candidate, from its lower one: both lie a radius from the middle. */
static __device__ inline float upper_end(const spurion_select &a, float spread, float low, int i)
{
    float radius = spread * a.reach[i] * (a.scale == NULL ? 1.0f : fabsf(a.scale[i]));
    float high = low + 2.0f * radius + 4e-6f * (fabsf(low) + radius);
    return high <= 3e38f ? high : INFINITY;
}

/* Lower ends to exact values, in r->group: first of the k most promising, then of those that may exceed the k-th of these. The rest is 0. */
static __device__ inline void settle_candidates(room *r, const spurion_select &a, size_t t, float spread, int count)
{
    int ties;
    uint32_t first = kth_largest(&ties, r, r->value, count, a.k), bar = 0;
    for (int n = (int)threadIdx.x; n < count; n += THREADS) {
        r->group[n] = 0.0f;
    }
    __syncthreads();
    for (int wave = 0; wave < 2; wave++) {
        for (int n = (int)(threadIdx.x / SPURION_CUDA_WARP); n < count; n += WARPS) {
            float low = r->value[n];
            bool promising = rank_bits(low) >= first;
            if (wave == 0 ? promising : !promising && rank_bits(upper_end(a, spread, low, r->index[n])) >= bar) {
                float f = exact(a, t, r->index[n]);
                if (threadIdx.x % SPURION_CUDA_WARP == 0) {
                    r->group[n] = f;
                }
            }
        }
        __syncthreads();
        bar = wave == 0 ? kth_largest(&ties, r, r->group, count, a.k) : bar;
    }
}

/* Lists the k largest of the candidates' values v; gives their number. */
static __device__ inline int list_largest(room *r, const spurion_select &a, size_t t, const float *v, int count)
{
    int ties, mine = 0, total;
    uint32_t bar = kth_largest(&ties, r, v, count, a.k), kept = 0;
    for (int n = (int)threadIdx.x, bit = 0; n < count; n += THREADS, bit++) {
        uint32_t bits = rank_bits(v[n]);
        int before = 0; /* equals of a lower index */
        for (int m = 0; bits == bar && bar != 0 && m < count; m++) {
            before += rank_bits(v[m]) == bar && r->index[m] < r->index[n];
        }
        bool keep = bits > bar || (bits == bar && bar != 0 && before < ties);
        kept |= (uint32_t)keep << bit;
        mine += keep;
    }
    (void)spurion_scan(mine, &total); /* its barrier: all indices have been read */
    for (int n = (int)threadIdx.x, bit = 0; n < count; n += THREADS, bit++) {
        r->index[n] = kept >> bit & 1u ? r->index[n] : INT32_MAX;
    }
    __syncthreads();
    for (int n = (int)threadIdx.x, bit = 0; n < count; n += THREADS, bit++) {
        int place = 0;
        for (int m = 0; (kept >> bit & 1u) && m < count; m++) {
            place += r->index[m] < r->index[n];
        }
        if (kept >> bit & 1u) {
            put(a, t, place, r->index[n], v[n]);
        }
    }
    return total;
}

/* Where the bound excludes too little, or is none: every feature's value, and the selection over all of the row. */
static __device__ inline int list_whole_row(room *r, const spurion_select &a, float *row, size_t t)
{
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), ties;
    if (a.weight != NULL) {
        for (int i = (int)(threadIdx.x / SPURION_CUDA_WARP); i < a.F; i += WARPS) {
            float f = exact(a, t, i);
            if (lane == 0) {
                row[i] = f;
            }
        }
    } else {
        for (int i = (int)threadIdx.x; i < a.F; i += THREADS) {
            row[i] = activate(a, row[i], i);
        }
    }
    __syncthreads();
    uint32_t bar = kth_largest(&ties, r, row, a.F, a.k);
    return write_list(a, row, t, bar, ties, true);
}

static __device__ inline int select_top(room *r, const spurion_select &a, float *row, size_t t)
{
    float spread = a.weight == NULL ? 0.0f : a.spread[t];
    int ties;
    if (!(spread <= 3e38f)) {
        return list_whole_row(r, a, row, t);
    }
    int groups = find_groups(r, a, row, spread);
    float bar = __uint_as_float(kth_largest(&ties, r, r->group, groups, a.k)); /* k features at least are no less */
    if (a.settled != NULL && bar > a.settled[t]) {
        return 0;
    }
    int count = find_candidates(r, a, row, spread, groups, bar);
    if (count > CANDIDATES) {
        return list_whole_row(r, a, row, t);
    }
    if (a.weight != NULL) {
        settle_candidates(r, a, t, spread, count);
    }
    return list_largest(r, a, t, a.weight != NULL ? r->group : r->value, count);
}

static __global__ void __launch_bounds__(THREADS, 3) top_kernel(spurion_select a)
{
    __shared__ room r;
    size_t t = blockIdx.x;
    int held = select_top(&r, a, a.pre + t * (size_t)a.F, t);
    if (threadIdx.x == 0) {
        a.count[t] = held;
    }
}

static __global__ void __launch_bounds__(THREADS) list_kernel(spurion_select a)
{
    __shared__ room r;
    size_t t = blockIdx.x;
    const float *row = a.pre + t * (size_t)a.F;
    int held = a.weight != NULL ? screen_list(&r, a, row, t) : write_list(a, row, t, 0, 0, false);
    if (threadIdx.x == 0) {
        a.count[t] = held;
    }
}

/* --- groups --- */

/* Leaves only the largest of each group in the row (the lowest index of equals), and that only where it is positive. A warp per group. */
static __device__ inline void keep_group_maxima(const spurion_select &a, float *row)
{
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), size = a.F / a.k;
    for (int g = (int)(threadIdx.x / SPURION_CUDA_WARP); g < a.k; g += WARPS) {
        float best = 0.0f;
        int at = a.F;
        for (int i = lane; i < size; i += SPURION_CUDA_WARP) {
            float v = activate(a, row[g * size + i], g * size + i);
            if (v > best) {
                best = v;
                at = i;
            }
        }
        for (int mask = SPURION_CUDA_WARP / 2; mask > 0; mask /= 2) {
            float other = __shfl_xor_sync(0xffffffffu, best, mask);
            int other_at = __shfl_xor_sync(0xffffffffu, at, mask);
            if (other > best || (other == best && other_at < at)) {
                best = other;
                at = other_at;
            }
        }
        for (int i = lane; i < size; i += SPURION_CUDA_WARP) {
            row[g * size + i] = i == at ? best : 0.0f;
        }
    }
}

static __global__ void __launch_bounds__(THREADS, 4) group_kernel(spurion_select a)
{
    size_t t = blockIdx.x;
    float *row = a.pre + t * (size_t)a.F;
    keep_group_maxima(a, row);
    __syncthreads();
    int held = write_list(a, row, t, 0, 0, true);
    if (threadIdx.x == 0) {
        a.count[t] = held;
    }
}

spurion_status spurion_cuda_select(spurion_cuda *cuda, const spurion_select *a, int rows)
{
    void (*kernel)(spurion_select) = a->kind == SPURION_SAE_TOPK ? top_kernel : a->kind == SPURION_SAE_GROUPMAX ? group_kernel : list_kernel;
    SPURION_CUDA(cuda, spurion_cuda_launch(cuda, kernel, dim3((unsigned)rows), THREADS, 0, *a));
    return spurion_ok();
}

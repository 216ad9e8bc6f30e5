/* SAE encode: the token's norm, the product in chunks of rows (cuBLASLt), then one block of threads per row picks its active features straight
 * into a sparse list, ascending by index. Top-k is exact: the k-th largest value's bits are found digit by digit (radix selection over
 * counts, which are whole numbers and thus the same in any order); equal values go to the lowest index.
 * Thread: engine. Memory: the caller's scratch. */
#include "kernels/cuda/scan.cuh"

enum { THREADS = SPURION_CUDA_THREADS, BINS = 2048 };
#define CHUNK_BYTES ((size_t)256 << 20) /* of pre-activations: what the second-level cache and the block scheduler like is a matter of measurement */

/* --- scratch --- */

static int chunk_rows(const spurion_sae_weights *sae, int T)
{
    size_t rows = CHUNK_BYTES / ((size_t)sae->F * sizeof(float)) / SPURION_CUDA_ROW_STEP * SPURION_CUDA_ROW_STEP;
    size_t wanted = spurion_cuda_round_up((size_t)(T > 0 ? T : 1), SPURION_CUDA_ROW_STEP);
    rows = rows < (size_t)SPURION_CUDA_ROW_STEP ? (size_t)SPURION_CUDA_ROW_STEP : rows;
    return (int)(rows < wanted ? rows : wanted);
}

static size_t input_bytes(const spurion_sae_weights *sae, int rows)
{
    return spurion_cuda_round_up((size_t)rows * (size_t)sae->d * spurion_dtype_bytes(sae->enc->dtype), 256);
}

extern "C" size_t spurion_cuda_sae_scratch_bytes(const spurion_dev *dev, const spurion_sae_weights *sae, int T)
{
    int rows = chunk_rows(sae, T);
    (void)dev;
    return 256 + input_bytes(sae, rows) + (size_t)rows * (size_t)sae->F * sizeof(float);
}

/* --- input --- */

/* u[t] = (x[t] - shift) * factor of the matrix's type, and what the output is scaled by: cpu/sae_encode.c. One block per row. */
static __global__ void prepare_kernel(void *u, float *token_scale, float *token_shift, const float *x, int d, spurion_sae_norm norm, spurion_dtype dtype)
{
    size_t t = blockIdx.x, at = t * (size_t)d;
    double mean = 0, square = 0, scale = 1, factor = 1;
    if (norm == SPURION_SAE_NORM_LAYER) {
        for (int c = (int)threadIdx.x; c < d; c += THREADS) {
            mean += (double)x[at + (size_t)c];
        }
        mean = spurion_sum<THREADS>(mean) / d;
    }
    if (norm != SPURION_SAE_NORM_NONE) {
        for (int c = (int)threadIdx.x; c < d; c += THREADS) {
            double v = (double)x[at + (size_t)c] - mean;
            square += v * v;
        }
        square = spurion_sum<THREADS>(square);
        double length = sqrt(square), sd = sqrt(square / (d - 1));
        bool layer = norm == SPURION_SAE_NORM_LAYER;
        scale = layer ? sd : length / sqrt((double)d);
        factor = layer ? 1.0 / (sd + 1e-5) : length > 0 ? sqrt((double)d) / length : 0.0;
    }
    float shift = (float)mean, by = (float)factor;
    for (int c = (int)threadIdx.x; c < d; c += THREADS) {
        float v = (x[at + (size_t)c] - shift) * by;
        if (dtype == SPURION_F32) {
            ((float *)u)[at + (size_t)c] = v;
        } else {
            ((uint16_t *)u)[at + (size_t)c] = ptx_bf16(v);
        }
    }
    if (threadIdx.x == 0) {
        token_scale[t] = (float)scale;
        token_shift[t] = shift;
    }
}

/* --- activation --- */

/* What selection looks at. */
typedef struct select_args {
    float *pre; /* (rows, F), changed in place where a kind looks at it twice */
    const float *threshold, *scale, *gate_bias, *mag_scale, *mag_bias;
    int32_t *count, *index; /* of the chunk's first row */
    float *value;
    int F, k, slots;
    spurion_sae_kind kind;
    const int32_t *member; /* of lists: index of each of the F features in the whole dictionary; of TOPK: the features that are listed; or NULL */
    int member_count;
} select_args;

/* f of feature i from its product (bias included): not positive where it is silent. */
static __device__ inline float activate(const select_args &a, float p, int i)
{
    if (a.kind == SPURION_SAE_GATED) {
        return p + a.gate_bias[i] > 0.0f ? p * a.mag_scale[i] + a.mag_bias[i] : 0.0f;
    }
    float q = a.scale == NULL ? p : p * a.scale[i];
    return a.kind == SPURION_SAE_JUMPRELU && !(q > a.threshold[i]) ? 0.0f : q;
}

/* --- lists --- */

/* Bits of positive values order like the values; everything else is 0. */
static __device__ inline uint32_t rank_bits(float v)
{
    return v > 0.0f ? __float_as_uint(v) : 0u;
}

/* Writes all features above `bar` and the first `ties` of those at it, in order; gives their number. bar >= 1. active: pre holds f. */
static __device__ inline int write_list(const select_args &a, const float *row, size_t t, uint32_t bar, int ties, bool active)
{
    int taken = 0, tied = 0;
    for (int base = 0; base < a.F; base += 4 * THREADS) {
        int first = base + 4 * (int)threadIdx.x, strict = 0, equal = 0, total;
        uint32_t bits[4];
        for (int n = 0; n < 4; n++) {
            int i = first + n;
            bits[n] = i < a.F ? rank_bits(active ? row[i] : activate(a, row[i], i)) : 0u;
            strict += bits[n] > bar;
            equal += bits[n] == bar;
        }
        int before = spurion_scan(strict | equal << 16, &total); /* at most 1024 of each */
        int to = taken + (before & 0xffff), tie = tied + (before >> 16);
        for (int n = 0; n < 4; n++) {
            bool is_tie = bits[n] == bar;
            int place = to + (tie < ties ? tie : ties);
            if ((bits[n] > bar || (is_tie && tie < ties)) && place < a.slots) {
                a.index[t * (size_t)a.slots + (size_t)place] = a.member == NULL ? first + n : a.member[first + n];
                a.value[t * (size_t)a.slots + (size_t)place] = __uint_as_float(bits[n]);
            }
            to += bits[n] > bar;
            tie += is_tie;
        }
        taken += total & 0xffff;
        tied += total >> 16;
    }
    return taken + (tied < ties ? tied : ties);
}

/* --- top-k --- */

/* One digit of the k-th largest: among values whose higher digits are those of `bar`, the bin that holds number *need from the top.
 * Changes bar and *need (what is left to take inside the bin). */
static __device__ inline uint32_t find_digit(int *bins, const select_args &a, const float *row, uint32_t bar, int shift, int digit_bits, int *need)
{
    __shared__ int found[2];
    const int count = 1 << digit_bits, each = BINS / THREADS;
    for (int i = (int)threadIdx.x; i < BINS; i += THREADS) {
        bins[i] = 0;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < a.F; i += THREADS) {
        uint32_t bits = rank_bits(row[i]);
        if (bits != 0 && (uint64_t)bits >> (shift + digit_bits) == (uint64_t)bar >> (shift + digit_bits)) {
            (void)atomicAdd(&bins[bits >> shift & (uint32_t)(count - 1)], 1);
        }
    }
    __syncthreads();
    int mine = 0, total; /* bins from the top: thread n has BINS - 1 - each n downward */
    for (int n = 0; n < each; n++) {
        mine += bins[BINS - 1 - each * (int)threadIdx.x - n];
    }
    int above = spurion_scan(mine, &total);
    if (above < *need && above + mine >= *need) { /* one thread */
        int bin = BINS - 1 - each * (int)threadIdx.x;
        while (above + bins[bin] < *need) {
            above += bins[bin--];
        }
        found[0] = bin;
        found[1] = *need - above;
    }
    __syncthreads();
    uint32_t digit = (uint32_t)found[0];
    *need = found[1];
    __syncthreads(); /* found and bins have been read */
    return bar | digit << shift;
}

static __device__ inline int positive_count(const select_args &a, const float *row)
{
    int mine = 0, total;
    for (int i = (int)threadIdx.x; i < a.F; i += THREADS) {
        mine += row[i] > 0.0f;
    }
    (void)spurion_scan(mine, &total);
    return total;
}

/* What write_list would list stays in the row, everything else becomes 0. */
static __device__ inline void keep_taken(const select_args &a, float *row, uint32_t bar, int ties)
{
    int tied = 0;
    for (int base = 0; base < a.F; base += THREADS) {
        int i = base + (int)threadIdx.x, total;
        uint32_t bits = i < a.F ? rank_bits(row[i]) : 0u;
        int before = tied + spurion_scan(bits == bar, &total);
        if (i < a.F && !(bits > bar || (bits == bar && before < ties))) {
            row[i] = 0.0f;
        }
        tied += total;
    }
}

/* Writes the members that are left in the row, in order; gives their number. */
static __device__ inline int write_members(const select_args &a, const float *row, size_t t)
{
    int taken = 0;
    for (int base = 0; base < a.member_count; base += THREADS) {
        int m = base + (int)threadIdx.x, total;
        int32_t i = m < a.member_count ? a.member[m] : 0;
        float v = m < a.member_count ? row[i] : 0.0f;
        int place = taken + spurion_scan(v > 0.0f, &total);
        if (v > 0.0f && place < a.slots) {
            a.index[t * (size_t)a.slots + (size_t)place] = i;
            a.value[t * (size_t)a.slots + (size_t)place] = v;
        }
        taken += total;
    }
    return taken;
}

/* --- groups --- */

/* Leaves only the largest of each group in the row (the lowest index of equals), and that only where it is positive. A warp per group. */
static __device__ inline void keep_group_maxima(const select_args &a, float *row)
{
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), size = a.F / a.k;
    for (int g = (int)(threadIdx.x / SPURION_CUDA_WARP); g < a.k; g += THREADS / SPURION_CUDA_WARP) {
        float best = 0.0f;
        int at = a.F;
        for (int i = lane; i < size; i += SPURION_CUDA_WARP) {
            float v = row[g * size + i];
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

/* One block per row. */
static __global__ void __launch_bounds__(THREADS) select_kernel(select_args a)
{
    __shared__ int bins[BINS];
    size_t t = blockIdx.x;
    float *row = a.pre + t * (size_t)a.F;
    bool twice = a.kind == SPURION_SAE_TOPK || a.kind == SPURION_SAE_GROUPMAX;
    uint32_t bar = 0;
    int ties = 0, need = a.k;

    if (twice) {
        for (int i = (int)threadIdx.x; i < a.F; i += THREADS) {
            row[i] = activate(a, row[i], i);
        }
        __syncthreads();
    }
    if (a.kind == SPURION_SAE_GROUPMAX) {
        keep_group_maxima(a, row);
        __syncthreads();
    } else if (a.kind == SPURION_SAE_TOPK && positive_count(a, row) > a.k) {
        bar = find_digit(bins, a, row, bar, 21, 11, &need);
        bar = find_digit(bins, a, row, bar, 10, 11, &need);
        bar = find_digit(bins, a, row, bar, 0, 10, &need);
        ties = need;
    }
    int held;
    if (a.kind == SPURION_SAE_TOPK && a.member != NULL) {
        keep_taken(a, row, bar, ties);
        __syncthreads();
        held = write_members(a, row, t);
    } else {
        held = write_list(a, row, t, bar, ties, twice); /* bar 0: all that is positive */
    }
    if (threadIdx.x == 0) {
        a.count[t] = held;
    }
}

/* Rows first .. first + rows - 1. member: NULL, or as in select_args. */
static spurion_status encode_chunk(spurion_cuda *cuda, spurion_sparse *out, const spurion_sae_weights *sae, const int32_t *member, int member_count,
                                   const float *x, char *scratch, int first, int rows, int most)
{
    void *u = scratch;
    float *pre = (float *)(void *)(scratch + input_bytes(sae, most));
    size_t at = (size_t)first, slots = (size_t)out->slots;
    select_args a = {pre, sae->threshold, sae->scale, sae->gate_bias, sae->mag_scale, sae->mag_bias, out->count + at, out->index + at * slots,
                     out->value + at * slots, sae->F, sae->k, out->slots, sae->kind, member, member_count};
    SPURION_CUDA(cuda, spurion_cuda_launch(cuda, prepare_kernel, dim3((unsigned)rows), THREADS, 0, u, out->token_scale + at, out->token_shift + at,
                                           x + at * (size_t)sae->d, sae->d, sae->norm, sae->enc->dtype));
    SPURION_CUDA_DO(spurion_cuda_product_padded(cuda, pre, u, sae->enc, rows));
    SPURION_CUDA(cuda, spurion_cuda_launch(cuda, select_kernel, dim3((unsigned)rows), THREADS, 0, a));
    return spurion_ok();
}

static spurion_status encode_rows(spurion_cuda *cuda, spurion_sparse *out, const spurion_sae_weights *sae, const int32_t *member, int member_count,
                                  const float *x, void *scratch, int T)
{
    double t = T, d = sae->d, F = sae->F;
    char *place = (char *)scratch + (-(size_t)scratch & 255);
    int most = chunk_rows(sae, T);
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    for (int first = 0; first < T; first += most) {
        SPURION_CUDA_DO(encode_chunk(cuda, out, sae, member, member_count, x, place, first, T - first < most ? T - first : most, most));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_SAE_ENCODE, 2 * t * d * F, 4 * t * d + d * F * (double)spurion_dtype_bytes(sae->enc->dtype));
}

extern "C" spurion_status spurion_cuda_sae_encode(spurion_dev *dev, spurion_sparse *out, const spurion_sae_weights *sae, const float *x, void *scratch, int T)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    if (sae->enc->N != sae->F || (sae->kind == SPURION_SAE_GROUPMAX && (sae->k <= 0 || sae->F % sae->k != 0)) ||
        (sae->kind == SPURION_SAE_TOPK && (sae->k <= 0 || sae->k > out->slots))) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "SAE: expected an encoder of %d features and k that fits %d slots, found %d, k %d", sae->F, out->slots,
                             sae->enc->N, sae->k);
    }
    return encode_rows(cuda, out, sae, NULL, 0, x, scratch, T);
}

/* Lists: the part is a dictionary of its own. Top-k: the whole dictionary is encoded, and the members of what it keeps are listed. */
extern "C" spurion_status spurion_cuda_sae_encode_members(spurion_dev *dev, spurion_sparse *out, const spurion_sae_weights *sae,
                                                          const spurion_sae_weights *part, const int32_t *member, const float *x, void *scratch, int T)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    bool lists = sae->kind != SPURION_SAE_TOPK;
    if (part->F > out->slots || part->enc->N != part->F || sae->enc->N != sae->F || sae->kind == SPURION_SAE_GROUPMAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "SAE members: expected at most %d (slots) of a kind other than groupmax, found %d", out->slots,
                             part->F);
    }
    return encode_rows(cuda, out, lists ? part : sae, member, part->F, x, scratch, T);
}

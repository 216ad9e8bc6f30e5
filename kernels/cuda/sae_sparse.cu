/* What is done with the sparse lists: formulas in cpu/sae_sparse.c. One block per row; a warp per entry where entries are dotted.
 * Thread: engine. Memory: none. */
#include "kernels/cuda/scan.cuh"

enum { THREADS = SPURION_CUDA_THREADS, WARPS = THREADS / SPURION_CUDA_WARP };

typedef struct sparse_args {
    float *out;
    spurion_sparse f;
    const float *dec, *dec_bias, *g;
    int d;
    spurion_sae_sets sets;
    const int32_t *row_set;
    bool whole;
} sparse_args;

static sparse_args args_of(float *out, const spurion_sparse *f, const spurion_sae_weights *sae, const float *g)
{
    sparse_args a = {out, *f, sae->dec, sae->dec_bias, g, sae->d, {NULL, NULL, NULL}, NULL, false};
    a.whole = spurion_whole(sae->dec, (size_t)sae->d, sae->d, SPURION_F32) && spurion_whole(g, (size_t)sae->d, sae->d, SPURION_F32);
    return a;
}

static __device__ inline int held(const spurion_sparse &f, size_t t)
{
    return f.count[t] < f.slots ? f.count[t] : f.slots;
}

/* --- attribution --- */

static __global__ void attribute_kernel(sparse_args a)
{
    size_t t = blockIdx.x, at = t * (size_t)a.f.slots;
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), warp = (int)(threadIdx.x / SPURION_CUDA_WARP), n = held(a.f, t);
    const float *g = a.g + t * (size_t)a.d;
    for (int s = warp; s < n; s += WARPS) {
        const float *row = a.dec + (size_t)a.f.index[at + (size_t)s] * (size_t)a.d;
        float sum = 0.0f;
        for (int c = 4 * lane; c < a.d; c += 4 * SPURION_CUDA_WARP) {
            spurion_four x = spurion_load4(row + c, a.d - c, a.whole), y = spurion_load4(g + c, a.d - c, a.whole);
            for (int i = 0; i < 4; i++) {
                sum = fmaf(x.v[i], y.v[i], sum);
            }
        }
        for (int mask = SPURION_CUDA_WARP / 2; mask > 0; mask /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, mask);
        }
        if (lane == 0) {
            a.out[at + (size_t)s] = a.f.value[at + (size_t)s] * (sum * a.f.token_scale[t]);
        }
    }
    for (int s = n + (int)threadIdx.x; s < a.f.slots; s += THREADS) {
        a.out[at + (size_t)s] = 0.0f;
    }
}

/* The number of entries is on the device: the profile counts every slot. */
extern "C" spurion_status spurion_cuda_sae_attribute(spurion_dev *dev, float *out, const spurion_sparse *f, const spurion_sae_weights *sae, const float *g, int T)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    double entries = (double)T * f->slots;
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (T > 0) {
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, attribute_kernel, dim3((unsigned)T), THREADS, 0, args_of(out, f, sae, g)));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_SAE_SPARSE, 2 * entries * sae->d, 4 * (entries + T) * sae->d);
}

/* --- removal --- */

/* Whether feature `index` at `value` is a member of the set that goes. */
static __device__ inline bool goes(const sparse_args &a, int set, int32_t index, float value)
{
    int low = a.sets.begin[set], high = a.sets.begin[set + 1];
    while (low < high) { /* the first member >= index */
        int middle = low + (high - low) / 2;
        if (a.sets.index[middle] < index) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < a.sets.begin[set + 1] && a.sets.index[low] == index && value > a.sets.activation_min[low];
}

/* Entries in their order, THREADS at a time: first who goes, then every thread takes them from its own columns. */
static __global__ void subtract_kernel(sparse_args a)
{
    __shared__ int32_t member[THREADS];
    __shared__ float factor[THREADS];
    size_t t = blockIdx.x, at = t * (size_t)a.f.slots;
    int set = a.row_set[t], n = held(a.f, t);
    float *x = a.out + t * (size_t)a.d;
    if (set < 0) {
        return; /* the whole block */
    }
    for (int base = 0; base < n; base += THREADS) {
        int s = base + (int)threadIdx.x, total;
        int32_t index = s < n ? a.f.index[at + (size_t)s] : 0;
        float value = s < n ? a.f.value[at + (size_t)s] : 0.0f;
        bool gone = s < n && goes(a, set, index, value);
        int place = spurion_scan(gone, &total); /* its first barrier: the previous members have been used */
        if (gone) {
            member[place] = index;
            factor[place] = value * a.f.token_scale[t];
        }
        __syncthreads();
        for (int m = 0; m < total; m++) {
            const float *row = a.dec + (size_t)member[m] * (size_t)a.d;
            for (int c = (int)threadIdx.x; c < a.d; c += THREADS) {
                x[c] = fmaf(-factor[m], row[c], x[c]);
            }
        }
    }
}

extern "C" spurion_status spurion_cuda_sae_subtract(spurion_dev *dev, float *x, const spurion_sparse *f, const spurion_sae_weights *sae,
                                                    const spurion_sae_sets *sets, const int32_t *row_set, int T)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    sparse_args a = args_of(x, f, sae, NULL);
    a.sets = *sets;
    a.row_set = row_set;
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (T > 0) {
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, subtract_kernel, dim3((unsigned)T), THREADS, 0, a));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_SAE_SPARSE, 2.0 * T * sae->d, 12.0 * T * sae->d);
}

/* --- bias --- */

static __device__ inline float bias_of(const sparse_args &a, size_t t, int c)
{
    return a.dec_bias[c] * a.f.token_scale[t] + a.f.token_shift[t];
}

static __global__ void bias_dot_kernel(sparse_args a)
{
    size_t t = blockIdx.x;
    const float *g = a.g + t * (size_t)a.d;
    double sum = 0;
    for (int c = (int)threadIdx.x; c < a.d; c += THREADS) {
        sum += (double)bias_of(a, t, c) * (double)g[c];
    }
    sum = spurion_sum<THREADS>(sum);
    if (threadIdx.x == 0) {
        a.out[t] = (float)sum;
    }
}

extern "C" spurion_status spurion_cuda_sae_bias_dot(spurion_dev *dev, float *out, const spurion_sparse *f, const spurion_sae_weights *sae, const float *g, int T)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (T > 0) {
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, bias_dot_kernel, dim3((unsigned)T), THREADS, 0, args_of(out, f, sae, g)));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_SAE_SPARSE, 4.0 * T * sae->d, 4.0 * T * sae->d);
}

static __global__ void shrink_kernel(sparse_args a)
{
    size_t t = blockIdx.x;
    float *x = a.out + t * (size_t)a.d, keep = 1.0f - a.g[t];
    for (int c = (int)threadIdx.x; c < a.d; c += THREADS) {
        float b = bias_of(a, t, c);
        x[c] = keep == 0.0f ? b : keep * (x[c] - b) + b;
    }
}

extern "C" spurion_status spurion_cuda_sae_shrink(spurion_dev *dev, float *x, const spurion_sparse *f, const spurion_sae_weights *sae, const float *a, int T)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (T > 0) {
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, shrink_kernel, dim3((unsigned)T), THREADS, 0, args_of(x, f, sae, a)));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_SAE_SPARSE, 4.0 * T * sae->d, 8.0 * T * sae->d);
}

/* Four neighbouring elements at a time, for row-wise kernels: a thread's elements are the same four whether they can be moved as one vector
 * or not, so that no result depends on alignment. Device code only. */
#ifndef SPURION_CUDA_ROWS_CUH
#define SPURION_CUDA_ROWS_CUH

#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/ptx.cuh"

struct spurion_four {
    float v[4];
};

static __device__ inline float spurion_from_bf16(uint32_t h)
{
    return __uint_as_float(h << 16);
}

/* n: elements that are there, the rest is 0. whole: 4 are there and p is a multiple of 16. */
static __device__ inline spurion_four spurion_load4(const float *p, int n, bool whole)
{
    spurion_four f;
    if (whole) {
        float4 x = *(const float4 *)(const void *)p;
        f.v[0] = x.x, f.v[1] = x.y, f.v[2] = x.z, f.v[3] = x.w;
        return f;
    }
    for (int i = 0; i < 4; i++) {
        f.v[i] = i < n ? p[i] : 0.0f;
    }
    return f;
}

static __device__ inline void spurion_store4(float *p, spurion_four f, int n, bool whole)
{
    if (whole) {
        *(float4 *)(void *)p = make_float4(f.v[0], f.v[1], f.v[2], f.v[3]);
        return;
    }
    for (int i = 0; i < 4 && i < n; i++) {
        p[i] = f.v[i];
    }
}

/* Element `at` onward of an array of dtype. whole: bf16 a multiple of 8 bytes, f32 of 16. */
static __device__ inline spurion_four spurion_load4_act(const void *p, size_t at, int n, bool whole, spurion_dtype dtype)
{
    if (dtype == SPURION_F32) {
        return spurion_load4((const float *)p + at, n, whole);
    }
    const uint16_t *h = (const uint16_t *)p + at;
    spurion_four f;
    if (whole) {
        uint2 x = *(const uint2 *)(const void *)h;
        f.v[0] = spurion_from_bf16(x.x & 0xffffu), f.v[1] = spurion_from_bf16(x.x >> 16);
        f.v[2] = spurion_from_bf16(x.y & 0xffffu), f.v[3] = spurion_from_bf16(x.y >> 16);
        return f;
    }
    for (int i = 0; i < 4; i++) {
        f.v[i] = i < n ? spurion_from_bf16(h[i]) : 0.0f;
    }
    return f;
}

static __device__ inline void spurion_store4_act(void *p, size_t at, spurion_four f, int n, bool whole, spurion_dtype dtype)
{
    if (dtype == SPURION_F32) {
        spurion_store4((float *)p + at, f, n, whole);
        return;
    }
    uint16_t *h = (uint16_t *)p + at;
    if (whole) {
        *(uint2 *)(void *)h = make_uint2(ptx_bf16_pair(f.v[0], f.v[1]), ptx_bf16_pair(f.v[2], f.v[3]));
        return;
    }
    for (int i = 0; i < 4 && i < n; i++) {
        h[i] = ptx_bf16(f.v[i]);
    }
}

/* Whether rows of C elements, `stride` apart, can be moved as vectors of four. */
static inline bool spurion_whole(const void *p, size_t stride, int C, spurion_dtype dtype)
{
    return p == NULL || (C % 4 == 0 && stride % 4 == 0 && spurion_cuda_aligned(p, 4 * spurion_dtype_bytes(dtype)));
}

/* Sum over the LANES (32 or 256 = the block) threads that share a row; every thread gets it. Order fixed by LANES. */
template <int LANES> static __device__ inline double spurion_sum(double v)
{
    for (int mask = 16; mask > 0; mask /= 2) {
        v += __shfl_xor_sync(0xffffffffu, v, mask);
    }
    if constexpr (LANES > SPURION_CUDA_WARP) {
        __shared__ double parts[LANES / SPURION_CUDA_WARP];
        __syncthreads(); /* the previous sum has been read */
        if (threadIdx.x % SPURION_CUDA_WARP == 0) {
            parts[threadIdx.x / SPURION_CUDA_WARP] = v;
        }
        __syncthreads();
        v = 0;
        for (int i = 0; i < LANES / SPURION_CUDA_WARP; i++) {
            v += parts[i];
        }
    }
    return v;
}

/* Threads for a row of C elements: one warp, or the whole block. */
static inline int spurion_lanes(int C)
{
    return C <= 1024 ? SPURION_CUDA_WARP : SPURION_CUDA_THREADS;
}

/* Blocks for `rows` rows of that many threads. */
static inline dim3 spurion_row_grid(int64_t rows, int lanes)
{
    int64_t each = SPURION_CUDA_THREADS / lanes;
    return dim3((unsigned)((rows + each - 1) / each));
}

/* Blocks for `items` items, a thread each. */
static inline dim3 spurion_item_grid(int64_t items)
{
    return dim3((unsigned)((items + SPURION_CUDA_THREADS - 1) / SPURION_CUDA_THREADS));
}

static __device__ inline int64_t spurion_item(void)
{
    return (int64_t)blockIdx.x * SPURION_CUDA_THREADS + threadIdx.x;
}

/* (row, quad) of a thread's item where each row has `quads` of them. A division of 64 bits costs more than moving four elements does, so it is
 * made only where 32 do not hold the item. */
struct spurion_place {
    int64_t row;
    int quad;
};

static __device__ inline spurion_place spurion_place_of(int quads)
{
    int64_t item = spurion_item();
    if (item <= 0xffffffffll) {
        uint32_t small = (uint32_t)item, row = small / (uint32_t)quads;
        return {(int64_t)row, (int)(small - row * (uint32_t)quads)};
    }
    return {item / quads, (int)(item % quads)};
}

#endif

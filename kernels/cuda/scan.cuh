/* Places in a list that a block of threads writes in order. Device code only. */
#ifndef SPURION_CUDA_SCAN_CUH
#define SPURION_CUDA_SCAN_CUH

#include "kernels/cuda/rows.cuh"

/* Sum of v over the threads before this one, of SPURION_CUDA_THREADS; *total: over all. Every thread of the block calls it. */
static __device__ inline int spurion_scan(int v, int *total)
{
    __shared__ int parts[SPURION_CUDA_THREADS / SPURION_CUDA_WARP];
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), warp = (int)(threadIdx.x / SPURION_CUDA_WARP), upto = v, before = 0;
    for (int by = 1; by < SPURION_CUDA_WARP; by *= 2) {
        int other = __shfl_up_sync(0xffffffffu, upto, (unsigned)by);
        upto += lane >= by ? other : 0;
    }
    __syncthreads(); /* the previous scan has been read */
    if (lane == SPURION_CUDA_WARP - 1) {
        parts[warp] = upto;
    }
    __syncthreads();
    *total = 0;
    for (int w = 0; w < SPURION_CUDA_THREADS / SPURION_CUDA_WARP; w++) {
        before += w < warp ? parts[w] : 0;
        *total += parts[w];
    }
    return before + upto - v;
}

#endif

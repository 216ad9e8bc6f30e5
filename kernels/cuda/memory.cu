/* Device memory, and the way to it: everything from the host goes through a pinned ring, in the stream's order. */
#include <cstring>

#include "kernels/cuda/cuda.cuh"

spurion_status spurion_cuda_reserve(spurion_cuda *cuda, spurion_block *block, size_t bytes)
{
    if (bytes <= block->bytes) {
        return spurion_ok();
    }
    bytes = spurion_cuda_round_up(bytes, 4096);
    SPURION_CUDA(cuda, cudaStreamSynchronize(cuda->stream));
    if (block->p != NULL) {
        SPURION_CUDA(cuda, cudaFree(block->p));
    }
    block->p = NULL;
    block->bytes = 0;
    SPURION_CUDA(cuda, cudaMalloc(&block->p, bytes));
    block->bytes = bytes;
    SPURION_CUDA(cuda, cudaMemsetAsync(block->p, 0, bytes, cuda->stream));
    return spurion_ok();
}

/* Leaves the half in use to the stream and waits until the other has been read. */
static spurion_status turn_over(spurion_cuda *cuda)
{
    spurion_staging *s = &cuda->staging;
    SPURION_CUDA(cuda, cudaEventRecord(s->read[s->half], cuda->stream));
    s->half = 1 - s->half;
    s->used = 0;
    SPURION_CUDA(cuda, cudaEventSynchronize(s->read[s->half]));
    return spurion_ok();
}

spurion_status spurion_cuda_send(spurion_cuda *cuda, void *out, const void *host, size_t bytes)
{
    spurion_staging *s = &cuda->staging;
    for (size_t at = 0, n; at < bytes; at += n) {
        if (s->used == s->half_bytes) {
            SPURION_CUDA_DO(turn_over(cuda));
        }
        n = s->half_bytes - s->used < bytes - at ? s->half_bytes - s->used : bytes - at;
        char *from = s->halves[s->half] + s->used;
        memcpy(from, (const char *)host + at, n);
        SPURION_CUDA(cuda, cudaMemcpyAsync((char *)out + at, from, n, cudaMemcpyHostToDevice, cuda->stream));
        s->used = spurion_cuda_round_up(s->used + n, 64);
        s->used = s->used < s->half_bytes ? s->used : s->half_bytes;
    }
    return spurion_ok();
}

extern "C" spurion_status spurion_cuda_alloc(spurion_dev *dev, void **out, size_t bytes)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    *out = NULL;
    if (cuda->failed.code != SPURION_OK) {
        return cuda->failed;
    }
    cudaError_t e = cudaMalloc(out, bytes == 0 ? 256 : bytes);
    if (e == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        *out = NULL;
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "device cuda:%d: %zu bytes asked, %zu free", cuda->ordinal, bytes, spurion_cuda_memory_free(dev));
    }
    SPURION_CUDA(cuda, e);
    return spurion_ok();
}

extern "C" void spurion_cuda_free(spurion_dev *dev, void *p)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    if (p == NULL) {
        return;
    }
    cudaError_t e = cudaStreamSynchronize(cuda->stream); /* what is enqueued may still use it */
    e = e == cudaSuccess ? cudaFree(p) : e;
    if (e != cudaSuccess) {
        (void)spurion_cuda_error(cuda, e, "cudaFree");
    }
}

extern "C" spurion_status spurion_cuda_upload(spurion_dev *dev, void *out, const void *host, size_t bytes)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    SPURION_CUDA_DO(spurion_cuda_send(cuda, out, host, bytes));
    return spurion_cuda_end(cuda, SPURION_CLASS_MOVE, 0, 2.0 * (double)bytes);
}

/* Through the ring as well: first what it still holds is waited for, then each half in turn. */
extern "C" spurion_status spurion_cuda_download(spurion_dev *dev, void *host, const void *in, size_t bytes)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    spurion_staging *s = &cuda->staging;
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    SPURION_CUDA_DO(spurion_cuda_end(cuda, SPURION_CLASS_MOVE, 0, 2.0 * (double)bytes));
    SPURION_CUDA_DO(spurion_cuda_wait(cuda)); /* the ring is empty now */
    s->used = 0;
    for (size_t at = 0, n; at < bytes; at += n) {
        n = s->half_bytes < bytes - at ? s->half_bytes : bytes - at;
        SPURION_CUDA(cuda, cudaMemcpyAsync(s->halves[s->half], (const char *)in + at, n, cudaMemcpyDeviceToHost, cuda->stream));
        SPURION_CUDA(cuda, cudaStreamSynchronize(cuda->stream));
        memcpy((char *)host + at, s->halves[s->half], n);
    }
    return spurion_ok();
}

extern "C" spurion_status spurion_cuda_download_later(spurion_dev *dev, void *host, const void *in, size_t bytes)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (bytes > 0) {
        SPURION_CUDA(cuda, cudaMemcpyAsync(host, in, bytes, cudaMemcpyDeviceToHost, cuda->stream));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_MOVE, 0, 2.0 * (double)bytes);
}

extern "C" spurion_status spurion_cuda_host_alloc(spurion_dev *dev, void **out, size_t bytes)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    *out = NULL;
    cudaError_t e = cudaHostAlloc(out, bytes == 0 ? 64 : bytes, cudaHostAllocDefault);
    if (e == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        *out = NULL;
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "device cuda:%d: %zu bytes of pinned host memory asked, there are not so many", cuda->ordinal, bytes);
    }
    SPURION_CUDA(cuda, e);
    memset(*out, 0, bytes);
    return spurion_ok();
}

extern "C" void spurion_cuda_host_free(spurion_dev *dev, void *p)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    if (p == NULL) {
        return;
    }
    cudaError_t e = cudaStreamSynchronize(cuda->stream); /* a copy into it may be under way */
    e = e == cudaSuccess ? cudaFreeHost(p) : e;
    if (e != cudaSuccess) {
        (void)spurion_cuda_error(cuda, e, "cudaFreeHost");
    }
}

extern "C" spurion_status spurion_cuda_zero(spurion_dev *dev, void *out, size_t bytes)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (bytes > 0) {
        SPURION_CUDA(cuda, cudaMemsetAsync(out, 0, bytes, cuda->stream));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_MOVE, 0, (double)bytes);
}

extern "C" spurion_status spurion_cuda_copy(spurion_dev *dev, void *out, const void *in, size_t bytes)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (bytes > 0) {
        SPURION_CUDA(cuda, cudaMemcpyAsync(out, in, bytes, cudaMemcpyDeviceToDevice, cuda->stream));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_MOVE, 0, 2.0 * (double)bytes);
}

extern "C" spurion_status spurion_cuda_sync(spurion_dev *dev)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    if (cuda->failed.code != SPURION_OK) {
        return cuda->failed;
    }
    return spurion_cuda_wait(cuda);
}

extern "C" size_t spurion_cuda_memory_free(spurion_dev *dev)
{
    size_t left = 0, all = 0;
    (void)dev;
    return cudaMemGetInfo(&left, &all) == cudaSuccess ? left : 0;
}

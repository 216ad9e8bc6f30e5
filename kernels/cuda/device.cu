/* The CUDA device: opening, errors, timing. Thread: engine. Memory: staging, workspace. */
#include "kernels/cuda/cuda.cuh"

#include <cstdlib>
#include <cstring>

#if defined(SPURION_EMULATED) /* small, so that tests see the ring turn over and weights come in pieces */
enum { STAGING_HALF = 64 << 10, WIDE_BYTES = 40 << 10, WORKSPACE_BYTES = 4096, ROW_CHUNK = 192 };
#else
enum { STAGING_HALF = 8 << 20, WIDE_BYTES = 16 << 20, WORKSPACE_BYTES = 32 << 20, ROW_CHUNK = 8192 };
#endif

spurion_status spurion_cuda_error(spurion_cuda *cuda, cudaError_t e, const char *what)
{
    if (e == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError(); /* the context is whole */
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "device cuda:%d: no memory (%.60s)", cuda->ordinal, what);
    }
    if (cuda->failed.code == SPURION_OK) {
        cuda->failed = spurion_error(SPURION_INTERNAL, "device cuda:%d: %s: %s (%.60s)", cuda->ordinal, cudaGetErrorName(e), cudaGetErrorString(e), what);
    }
    return cuda->failed;
}

spurion_status spurion_cuda_blas_error(spurion_cuda *cuda, cublasStatus_t e, const char *what)
{
    if (cuda->failed.code == SPURION_OK) {
        cuda->failed = spurion_error(SPURION_INTERNAL, "device cuda:%d: cuBLASLt: %s (%.60s)", cuda->ordinal, cublasLtGetStatusName(e), what);
    }
    return cuda->failed;
}

/* --- timing --- */

static spurion_status timers_make(spurion_cuda *cuda)
{
    int room = cuda->timer_room + SPURION_CUDA_TIMERS;
    spurion_timer *all = (spurion_timer *)realloc(cuda->timers, (size_t)room * sizeof *all);
    if (all == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %d timers", room);
    }
    cuda->timers = all;
    for (; cuda->timer_room < room; cuda->timer_room++) {
        spurion_timer *t = &all[cuda->timer_room];
        SPURION_CUDA(cuda, cudaEventCreateWithFlags(&t->begin, cudaEventDefault));
        cudaError_t e = cudaEventCreateWithFlags(&t->end, cudaEventDefault);
        if (e != cudaSuccess) {
            (void)cudaEventDestroy(t->begin);
            return spurion_cuda_error(cuda, e, "cudaEventCreateWithFlags");
        }
    }
    return spurion_ok();
}

spurion_status spurion_cuda_begin(spurion_cuda *cuda)
{
    if (cuda->failed.code != SPURION_OK || !cuda->dev.timed) {
        return cuda->failed;
    }
    if (cuda->timer_count == SPURION_CUDA_TIMERS_MAX) {
        SPURION_CUDA_DO(spurion_cuda_wait(cuda));
    }
    if (cuda->timer_count == cuda->timer_room) {
        SPURION_CUDA_DO(timers_make(cuda));
    }
    SPURION_CUDA(cuda, cudaEventRecord(cuda->timers[cuda->timer_count].begin, cuda->stream));
    return spurion_ok();
}

spurion_status spurion_cuda_end(spurion_cuda *cuda, spurion_op_class class_, double flops, double bytes)
{
    spurion_profile *p = &cuda->dev.profile;
    p->flops[class_] += flops;
    p->bytes[class_] += bytes;
    p->calls[class_]++;
    if (cuda->dev.timed) {
        spurion_timer *t = &cuda->timers[cuda->timer_count];
        t->class_ = class_;
        SPURION_CUDA(cuda, cudaEventRecord(t->end, cuda->stream));
        cuda->timer_count++;
    }
    return spurion_ok();
}

spurion_status spurion_cuda_wait(spurion_cuda *cuda)
{
    SPURION_CUDA(cuda, cudaStreamSynchronize(cuda->stream));
    for (int i = 0; i < cuda->timer_count; i++) {
        float ms = 0;
        SPURION_CUDA(cuda, cudaEventElapsedTime(&ms, cuda->timers[i].begin, cuda->timers[i].end));
        cuda->dev.profile.seconds[cuda->timers[i].class_] += 1e-3 * (double)ms;
    }
    cuda->timer_count = 0;
    return spurion_ok();
}

/* --- life --- */

static spurion_status choose_device(spurion_cuda *cuda, int ordinal)
{
    int count = 0, runtime = 0, driver = 0;
    cudaDeviceProp prop;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e != cudaSuccess || ordinal >= count) {
        return spurion_error(SPURION_FAILED_PRECONDITION, "device cuda:%d: expected a CUDA device of that number, found %d devices%s%s", ordinal,
                             e == cudaSuccess ? count : 0, e == cudaSuccess ? "" : ": ", e == cudaSuccess ? "" : cudaGetErrorString(e));
    }
    SPURION_CUDA(cuda, cudaSetDevice(ordinal));
    SPURION_CUDA(cuda, cudaGetDeviceProperties(&prop, ordinal));
    SPURION_CUDA(cuda, cudaRuntimeGetVersion(&runtime));
    SPURION_CUDA(cuda, cudaDriverGetVersion(&driver));
    if (prop.major < 8) {
        return spurion_error(SPURION_FAILED_PRECONDITION, "device cuda:%d: expected compute capability 8.0 or later, found %d.%d (%s)", ordinal, prop.major,
                             prop.minor, prop.name);
    }
    cuda->multiprocessors = prop.multiProcessorCount;
    cuda->shared_max = prop.sharedMemPerBlockOptin;
    (void)snprintf(cuda->dev.name, sizeof cuda->dev.name, "cuda:%d %.64s, capability %d.%d, CUDA %d.%d, driver %d.%d, cuBLASLt %zu", ordinal, prop.name,
                   prop.major, prop.minor, runtime / 1000, runtime % 1000 / 10, driver / 1000, driver % 1000 / 10, cublasLtGetVersion());
    return spurion_ok();
}

static spurion_status make_parts(spurion_cuda *cuda)
{
    SPURION_CUDA(cuda, cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking));
    SPURION_CUDA_BLAS(cuda, cublasLtCreate(&cuda->blas));
    cuda->staging.half_bytes = STAGING_HALF;
    for (int i = 0; i < 2; i++) {
        SPURION_CUDA(cuda, cudaHostAlloc((void **)&cuda->staging.halves[i], STAGING_HALF, cudaHostAllocDefault));
        SPURION_CUDA(cuda, cudaEventCreateWithFlags(&cuda->staging.read[i], cudaEventDisableTiming));
        SPURION_CUDA(cuda, cudaEventRecord(cuda->staging.read[i], cuda->stream));
    }
    SPURION_CUDA_DO(spurion_cuda_reserve(cuda, &cuda->wide, WIDE_BYTES));
    return spurion_cuda_reserve(cuda, &cuda->workspace, WORKSPACE_BYTES);
}

static spurion_status open_device(spurion_cuda *cuda, int ordinal)
{
    SPURION_CUDA_DO(choose_device(cuda, ordinal));
    SPURION_CUDA_DO(make_parts(cuda));
    return spurion_cuda_wait(cuda);
}

extern "C" spurion_status spurion_dev_create_cuda(spurion_dev **out, spurion_dtype dtype, int ordinal)
{
    spurion_cuda *cuda = (spurion_cuda *)calloc(1, sizeof *cuda);

    *out = NULL;
    if (cuda == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a CUDA device");
    }
    cuda->ordinal = ordinal;
    cuda->dev.dtype = dtype;
    cuda->dev.mid = dtype;
    cuda->dev.thread_count = 1;
    cuda->dev.row_chunk = ROW_CHUNK;
    cuda->dev.own_memory = true;
    cuda->dev.ops = spurion_ops_cuda();
    spurion_status st = open_device(cuda, ordinal);
    if (st.code != SPURION_OK) {
        spurion_cuda_destroy(&cuda->dev);
        return st;
    }
    *out = &cuda->dev;
    return st;
}

/* Errors are of no use here: the process is about to leave the device. */
extern "C" void spurion_cuda_destroy(spurion_dev *dev)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    if (cuda == NULL) {
        return;
    }
    if (cuda->stream != NULL) {
        (void)cudaStreamSynchronize(cuda->stream);
    }
    spurion_cuda_plans_destroy(cuda);
    spurion_block blocks[] = {cuda->wide, cuda->workspace, cuda->pad_in, cuda->pad_out, cuda->pad_aux, cuda->work};
    for (const spurion_block &b : blocks) {
        (void)cudaFree(b.p);
    }
    for (int i = 0; i < 2; i++) {
        if (cuda->staging.read[i] != NULL) {
            (void)cudaEventDestroy(cuda->staging.read[i]);
        }
        if (cuda->staging.halves[i] != NULL) {
            (void)cudaFreeHost(cuda->staging.halves[i]);
        }
    }
    for (int i = 0; i < cuda->timer_room; i++) {
        (void)cudaEventDestroy(cuda->timers[i].begin);
        (void)cudaEventDestroy(cuda->timers[i].end);
    }
    free(cuda->timers);
    if (cuda->blas != NULL) {
        (void)cublasLtDestroy(cuda->blas);
    }
    if (cuda->stream != NULL) {
        (void)cudaStreamDestroy(cuda->stream);
    }
    free(cuda);
}

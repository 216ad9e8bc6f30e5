/* An emulator of the part of CUDA that kernels/cuda uses, so that the kernels' own source runs on a CPU, in tests only.
 * What it shows: index arithmetic, fragment layouts, missing barriers and waits, stream order, host code that touches device memory.
 * What it cannot show: speed, the rounding of a GPU's instructions, what cuBLASLt does.
 * A CUDA thread is a fiber; a block runs to its end before the next; a stream's work runs when somebody waits for it, no sooner, and device
 * memory can be touched by nothing else. Environment:
 *   SPURION_EMULATOR_ORDER=N   the order in which a block's threads run: 0 ascending (default), 1 descending, else shuffled by N
 *   SPURION_EMULATOR_FAIL=FILE  once FILE exists the next kernel fails with an illegal address, and everything after it
 *   SPURION_EMULATOR_MIB=N     memory of the device (default 4096)
 *   SPURION_EMULATOR_SHARED_KIB=N  shared memory that one block may have (default 227, as sm_90; sm_80 has 163)
 *   SPURION_EMULATOR_WAITS=FILE  holds how often a stream was waited for
 * Thread: one host thread at a time. Memory: mapped per allocation, with a guard page behind each. */
#ifndef SPURION_EMULATOR_CUDA_RUNTIME_H
#define SPURION_EMULATOR_CUDA_RUNTIME_H

#define SPURION_EMULATED 1

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__ __restrict

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline float4 make_float4(float x, float y, float z, float w) { return float4{x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return float2{x, y}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return uint2{x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{x, y, z, w}; }

/* --- inside a kernel --- */

extern dim3 emulated_thread_index, emulated_block_index, emulated_block_dim, emulated_grid_dim;
#define threadIdx emulated_thread_index
#define blockIdx emulated_block_index
#define blockDim emulated_block_dim
#define gridDim emulated_grid_dim

/* What every lane of the warp gave to the same collective; valid until the second collective after it. tag: which it is. */
struct alignas(32) emulated_lane { unsigned char bytes[32]; };
const emulated_lane *emulated_exchange(int tag, const void *mine, size_t bytes);
void emulated_barrier();
unsigned char *emulated_shared();

#define __syncthreads() emulated_barrier()
static inline void __syncwarp(unsigned = 0xffffffffu) { (void)emulated_exchange(1, nullptr, 0); }

template <typename T> static inline T emulated_shuffle(int tag, T v, int from)
{
    T out;
    const emulated_lane *all = emulated_exchange(tag, &v, sizeof v);
    memcpy(&out, all[from].bytes, sizeof out);
    return out;
}
static inline int emulated_lane_index() { return (int)(emulated_thread_index.x % 32); }
template <typename T> static inline T __shfl_xor_sync(unsigned, T v, int mask) { return emulated_shuffle(2, v, emulated_lane_index() ^ mask); }
template <typename T> static inline T __shfl_sync(unsigned, T v, int from) { return emulated_shuffle(3, v, from & 31); }
template <typename T> static inline T __shfl_up_sync(unsigned, T v, unsigned by)
{
    int lane = emulated_lane_index();
    return emulated_shuffle(4, v, lane >= (int)by ? lane - (int)by : lane);
}
static inline unsigned __ballot_sync(unsigned, int p)
{
    unsigned bits = 0;
    const emulated_lane *all = emulated_exchange(5, &p, sizeof p);
    for (int i = 0; i < 32; i++) {
        int q;
        memcpy(&q, all[i].bytes, sizeof q);
        bits |= (unsigned)(q != 0) << i;
    }
    return bits;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
static inline float __fmul_rn(float a, float b) { return a * b; } /* never part of a multiply-add */
static inline int atomicAdd(int *p, int v) { int old = *p; *p += v; return old; }
template <typename T> static inline T __ldg(const T *p) { return *p; }

/* --- the runtime --- */

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorNoDevice = 100, cudaErrorInvalidDevice = 101,
                   cudaErrorIllegalAddress = 700 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum { cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0 };
typedef struct emulated_stream *cudaStream_t;
typedef struct emulated_event *cudaEvent_t;
struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
    size_t sharedMemPerBlockOptin, totalGlobalMem;
};

cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int device);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t s);
cudaError_t cudaStreamSynchronize(cudaStream_t s);
cudaError_t cudaMalloc(void **out, size_t bytes);
cudaError_t cudaFree(void *p);
cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaMemcpyAsync(void *out, const void *in, size_t bytes, cudaMemcpyKind kind, cudaStream_t s);
cudaError_t cudaMemcpy2DAsync(void *out, size_t out_pitch, const void *in, size_t in_pitch, size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t s);
cudaError_t cudaMemsetAsync(void *out, int value, size_t bytes, cudaStream_t s);
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s);
cudaError_t cudaEventSynchronize(cudaEvent_t e);
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end);
cudaError_t cudaEventDestroy(cudaEvent_t e);
cudaError_t cudaGetLastError();
const char *cudaGetErrorName(cudaError_t e);
const char *cudaGetErrorString(cudaError_t e);
cudaError_t emulated_shared_allow(const void *kernel, int bytes);
template <typename F> static inline cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute, int bytes)
{
    return emulated_shared_allow((const void *)kernel, bytes);
}

/* Enqueues a kernel; body runs one thread of it. */
cudaError_t emulated_launch(const void *kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t s, std::function<void()> body);
/* Enqueues host code that reads and writes device memory: what a library would do. */
cudaError_t emulated_enqueue(cudaStream_t s, std::function<void()> work);

#endif

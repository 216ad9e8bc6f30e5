/* Inside of the CUDA backend: the device, its errors, its timing, and how a kernel is launched.
 * Everything is enqueued on the device's one stream; nothing is ever enqueued on the default stream. C++17.
 * Thread: engine. Memory: staging and workspace when the device is made; scratch grows when a matrix is made or a larger pass comes first. */
#ifndef SPURION_CUDA_CUH
#define SPURION_CUDA_CUH

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "spurion/ops.h"

enum {
    SPURION_CUDA_WARP = 32,
    SPURION_CUDA_THREADS = 256,      /* of a block of row-wise work */
    SPURION_CUDA_ROW_STEP = 128,     /* rows of a matrix product are a multiple of this */
    SPURION_CUDA_TIMERS = 1024,      /* timers are made so many at a time */
    SPURION_CUDA_TIMERS_MAX = 65536, /* ops timed between two synchronisations */
    SPURION_CUDA_HEAD_DIM_MAX = 256
};

/* A pinned buffer of two halves: one is filled while the stream still reads the other. */
typedef struct spurion_staging {
    char *halves[2];
    cudaEvent_t read[2]; /* the stream has read what the half held */
    size_t half_bytes, used;
    int half;
} spurion_staging;

typedef struct spurion_timer {
    cudaEvent_t begin, end;
    spurion_op_class class_;
} spurion_timer;

struct spurion_cuda_plan; /* linear.cu */

/* Device memory that grows; what it holds means nothing from one op to the next. */
typedef struct spurion_block {
    void *p;
    size_t bytes;
} spurion_block;

typedef struct spurion_cuda {
    spurion_dev dev; /* first */
    int ordinal, multiprocessors;
    size_t shared_max; /* bytes of shared memory that one block may have */
    cudaStream_t stream;
    cublasLtHandle_t blas;
    spurion_status failed; /* the first device error: every op answers it from then on */
    spurion_staging staging;
    spurion_block wide;      /* f32 weights on their way to bf16 */
    spurion_block workspace; /* cuBLASLt's */
    spurion_block pad_in, pad_out; /* ROW_STEP rows of input and output of the widest matrix */
    spurion_block pad_aux;         /* the same of what stands before an activation */
    spurion_block work;      /* attention: seqs, items; row sums of the backward pass */
    struct spurion_cuda_plan *plans;
    spurion_timer *timers; /* (timer_room) made as dev.timed needs them */
    int timer_room, timer_count;
} spurion_cuda;

struct spurion_matrix {
    int N, K;
    spurion_dtype dtype, type; /* what was asked; of the products: bf16 where features are screened (sae.cuh) */
    int directions;
    void *w;     /* (N, K) of type; first of one block of memory */
    float *bias; /* (N) or NULL */
    uint16_t *bias_act; /* the same in bf16, where there is one and type is bf16 */
    float *rows, *reach; /* screened: (N, K) f32; (N): the larger of |w' - w| / loss and |w|, w' = w in bf16; else NULL */
    float loss;          /* screened: typical |w' - w| / |w| */
    struct spurion_cuda_plan *forward[2], *backward[2]; /* by the type of the outputs; NULL: not made */
    struct spurion_cuda_plan *gelu[2], *dgelu;          /* with GELU behind, without and with its input kept; NULL: the library has none */
};

static inline spurion_cuda *spurion_cuda_of(spurion_dev *dev)
{
    return (spurion_cuda *)(void *)dev;
}

static inline size_t spurion_cuda_round_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

/* Turns an error of the runtime into INTERNAL and remembers it: a device that failed once answers nothing else any more.
 * Only memory that is not there is RESOURCE_EXHAUSTED, and forgotten. */
spurion_status spurion_cuda_error(spurion_cuda *cuda, cudaError_t e, const char *what);
spurion_status spurion_cuda_blas_error(spurion_cuda *cuda, cublasStatus_t e, const char *what);

/* Runs a call of the runtime; on failure returns its status. The house's second control-flow macro. */
#define SPURION_CUDA(cuda, call)                                      \
    do {                                                              \
        cudaError_t e_ = (call);                                      \
        if (e_ != cudaSuccess) {                                      \
            return spurion_cuda_error((cuda), e_, #call);             \
        }                                                             \
    } while (0)

/* The same for a call that gives a spurion_status, or a cublasStatus_t. */
#define SPURION_CUDA_DO(call)              \
    do {                                   \
        spurion_status s_ = (call);        \
        if (s_.code != SPURION_OK) {       \
            return s_;                     \
        }                                  \
    } while (0)

#define SPURION_CUDA_BLAS(cuda, call)                            \
    do {                                                         \
        cublasStatus_t e_ = (call);                              \
        if (e_ != CUBLAS_STATUS_SUCCESS) {                       \
            return spurion_cuda_blas_error((cuda), e_, #call);   \
        }                                                        \
    } while (0)

/* Every op is bracketed by these: begin answers a device that has failed; end adds one call to the profile. While dev.timed, an event
 * stands before and one behind the op's work in the stream: the device's own clock, read when the stream is next waited for anyway. */
spurion_status spurion_cuda_begin(spurion_cuda *cuda);
spurion_status spurion_cuda_end(spurion_cuda *cuda, spurion_op_class class_, double flops, double bytes);
/* Waits for the stream and reads the timers. */
spurion_status spurion_cuda_wait(spurion_cuda *cuda);

/* Grows a block to at least bytes (waits for the stream first, for its old memory may be in use). */
spurion_status spurion_cuda_reserve(spurion_cuda *cuda, spurion_block *block, size_t bytes);

/* Copies host memory to the device through the staging ring; host may be reused at once. */
spurion_status spurion_cuda_send(spurion_cuda *cuda, void *out, const void *host, size_t bytes);

/* Enqueues a kernel. */
template <typename... P, typename... A>
static inline cudaError_t spurion_cuda_launch(spurion_cuda *cuda, void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, A... args)
{
#if defined(SPURION_EMULATED)
    return emulated_launch((const void *)kernel, grid, dim3((unsigned)threads), shared_bytes, cuda->stream, [=] { kernel(args...); });
#else
    kernel<<<grid, dim3((unsigned)threads), shared_bytes, cuda->stream>>>(args...);
    return cudaGetLastError();
#endif
}

/* The block's dynamic shared memory. */
#if defined(SPURION_EMULATED)
#define SPURION_CUDA_SHARED(name) unsigned char *name = emulated_shared()
#else
#define SPURION_CUDA_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

static inline bool spurion_cuda_aligned(const void *p, size_t to)
{
    return (size_t)p % to == 0;
}

/* --- ops, one file each --- */
#define SPURION_CUDA_DECLARE(op) std::remove_pointer<decltype(spurion_ops::op)>::type spurion_cuda_##op
extern "C" {
SPURION_CUDA_DECLARE(destroy);
SPURION_CUDA_DECLARE(alloc);
SPURION_CUDA_DECLARE(free);
SPURION_CUDA_DECLARE(upload);
SPURION_CUDA_DECLARE(download);
SPURION_CUDA_DECLARE(download_later);
SPURION_CUDA_DECLARE(host_alloc);
SPURION_CUDA_DECLARE(host_free);
SPURION_CUDA_DECLARE(zero);
SPURION_CUDA_DECLARE(copy);
SPURION_CUDA_DECLARE(sync);
SPURION_CUDA_DECLARE(memory_free);
SPURION_CUDA_DECLARE(matrix_create);
SPURION_CUDA_DECLARE(matrix_destroy);
SPURION_CUDA_DECLARE(matrix_bytes);
SPURION_CUDA_DECLARE(linear);
SPURION_CUDA_DECLARE(linear_backward);
SPURION_CUDA_DECLARE(linear_act);
SPURION_CUDA_DECLARE(linear_act_backward);
SPURION_CUDA_DECLARE(embed);
SPURION_CUDA_DECLARE(gather_rows);
SPURION_CUDA_DECLARE(scatter_rows);
SPURION_CUDA_DECLARE(gather_act);
SPURION_CUDA_DECLARE(cast);
SPURION_CUDA_DECLARE(add);
SPURION_CUDA_DECLARE(dot_rows);
SPURION_CUDA_DECLARE(mean_rows);
SPURION_CUDA_DECLARE(mean_rows_backward);
SPURION_CUDA_DECLARE(norm);
SPURION_CUDA_DECLARE(norm_backward);
SPURION_CUDA_DECLARE(rope);
SPURION_CUDA_DECLARE(rope_f32);
SPURION_CUDA_DECLARE(attention);
SPURION_CUDA_DECLARE(attention_backward);
SPURION_CUDA_DECLARE(activation);
SPURION_CUDA_DECLARE(activation_backward);
SPURION_CUDA_DECLARE(sae_scratch_bytes);
SPURION_CUDA_DECLARE(sae_encode);
SPURION_CUDA_DECLARE(sae_encode_members);
SPURION_CUDA_DECLARE(sae_attribute);
SPURION_CUDA_DECLARE(sae_subtract);
SPURION_CUDA_DECLARE(sae_bias_dot);
SPURION_CUDA_DECLARE(sae_shrink);
}

/* linear.cu: destroys the plans; out (T, N) = x (T, K) . w^T + bias on buffers that have room up to whole ROW_STEPs of rows. */
void spurion_cuda_plans_destroy(spurion_cuda *cuda);
spurion_status spurion_cuda_product_padded(spurion_cuda *cuda, float *out, const void *x, const spurion_matrix *m, int T);

#endif

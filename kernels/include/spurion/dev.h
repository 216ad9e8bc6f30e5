/* A compute device: its memory, its one stream of work, and its table of ops. Kernels know no model.
 * Thread: one engine thread owns a device. Compiles as C17 and C++17. */
#ifndef SPURION_DEV_H
#define SPURION_DEV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "spurion/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum spurion_dtype { SPURION_F32 = 0, SPURION_BF16 = 1 } spurion_dtype;

/* Bytes of one element. */
static inline size_t spurion_dtype_bytes(spurion_dtype t)
{
    return t == SPURION_BF16 ? 2 : 4;
}

/* Op classes of the profile, in the order of the report. */
typedef enum spurion_op_class {
    SPURION_CLASS_GEMM,
    SPURION_CLASS_ATTENTION,
    SPURION_CLASS_NORM,
    SPURION_CLASS_ROPE,
    SPURION_CLASS_ACTIVATION,
    SPURION_CLASS_SAE_ENCODE,
    SPURION_CLASS_SAE_SPARSE,
    SPURION_CLASS_MOVE,
    SPURION_CLASS_COUNT
} spurion_op_class;

typedef struct spurion_profile {
    double seconds[SPURION_CLASS_COUNT]; /* CUDA: of ops between two events, while timed; of what the stream has been waited for */
    double flops[SPURION_CLASS_COUNT];
    double bytes[SPURION_CLASS_COUNT];
    int64_t calls[SPURION_CLASS_COUNT];
} spurion_profile;

struct spurion_ops;

/* The public part of a device; each backend's own struct begins with it. */
typedef struct spurion_dev {
    const struct spurion_ops *ops;
    spurion_dtype dtype;     /* type of matrix inputs ("act" in ops.h): f32 or bf16 */
    spurion_dtype mid;       /* type that suits it for what only lies between a product and a row-wise op: f32, or act to halve those bytes */
    int thread_count;        /* CPU: workers in use, with the caller */
    int row_chunk;           /* rows at a time that suit row-wise work between two matrix products */
    bool timed;              /* set by whoever wants seconds of a device that takes them from events in its stream (CUDA); the CPU always does */
    bool own_memory;         /* its memory is not the process's: never touched but through the ops, and counted apart */
    char name[256];          /* "cpu avx512_core_amx 2 threads" */
    spurion_profile profile; /* filled by every op; reset by whoever reads it */
} spurion_dev;

/* Opens "cpu" or "cuda:N". threads 0: all cores (CPU only). Gives a device.
 * UNIMPLEMENTED when the build holds no such backend; INVALID_ARGUMENT for another name. */
spurion_status spurion_dev_create(spurion_dev **out, const char *device, spurion_dtype dtype, int threads) SPURION_MUST_USE;
void spurion_dev_destroy(spurion_dev *dev);

#ifdef __cplusplus
}
#endif

#endif

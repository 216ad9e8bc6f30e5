/* Rotary embedding: formulas in cpu/rope.c. A block of threads for each row; a thread takes four neighbouring dimensions, and the four that turn
 * with them, so that every byte is read and written once.         Thread: engine. Memory: none. */
#include "kernels/cuda/rows.cuh"

enum { THREADS = 128 };

typedef struct rope_args {
    void *out;
    const void *x;
    const float *table;
    const int32_t *positions;
    size_t out_stride, x_stride;
    int T, heads, hd, rot;
    spurion_rope_style style;
    float sign;
    spurion_dtype dtype, x_type;
    int items;  /* of one head, each for one thread */
    bool whole; /* four dimensions at a time, else one */
} rope_args;

/* y[a] = x[a] cos - x[b] sin, y[b] = x[b] cos + x[a] sin; products rounded on their own, as on the CPU. */
static __device__ inline void turn(float *a, float *b, float cosine, float sine)
{
    float x = *a, y = *b;
    *a = __fmul_rn(x, cosine) - __fmul_rn(y, sine);
    *b = __fmul_rn(y, cosine) + __fmul_rn(x, sine);
}

static __device__ inline float element(const rope_args &a, size_t at)
{
    return a.x_type == SPURION_F32 ? ((const float *)a.x)[at] : spurion_from_bf16(((const uint16_t *)a.x)[at]);
}

/* One dimension, or four; from, at: of the head's first element in x and out. */
static __device__ inline void turn_one(const rope_args &a, size_t from, size_t at, const float *angles, int c)
{
    int pairs = a.rot / 2;
    bool half = a.style == SPURION_ROPE_HALF, first = half ? c < pairs : c % 2 == 0;
    float y = element(a, from + (size_t)c);
    if (a.style != SPURION_ROPE_NONE && c < 2 * pairs) {
        int pair = half ? c % pairs : c / 2, other = half ? (first ? c + pairs : c - pairs) : (first ? c + 1 : c - 1);
        float z = element(a, from + (size_t)other), cosine = angles[2 * pair], sine = a.sign * angles[2 * pair + 1];
        first ? turn(&y, &z, cosine, sine) : turn(&z, &y, cosine, sine);
    }
    if (a.dtype == SPURION_F32) {
        ((float *)a.out)[at + (size_t)c] = y;
    } else {
        ((uint16_t *)a.out)[at + (size_t)c] = ptx_bf16(y);
    }
}

static __device__ inline void turn_four(const rope_args &a, size_t from, size_t at, const float *angles, int item)
{
    int pairs = a.rot / 2, c = 4 * item;
    if (a.style == SPURION_ROPE_HALF && c < pairs) {
        spurion_four low = spurion_load4_act(a.x, from + (size_t)c, 4, true, a.x_type);
        spurion_four high = spurion_load4_act(a.x, from + (size_t)(pairs + c), 4, true, a.x_type);
        spurion_four turns[2] = {spurion_load4(angles + 2 * c, 4, true), spurion_load4(angles + 2 * c + 4, 4, true)};
        for (int i = 0; i < 4; i++) {
            turn(&low.v[i], &high.v[i], turns[i / 2].v[i % 2 * 2], a.sign * turns[i / 2].v[i % 2 * 2 + 1]);
        }
        spurion_store4_act(a.out, at + (size_t)c, low, 4, true, a.dtype);
        spurion_store4_act(a.out, at + (size_t)(pairs + c), high, 4, true, a.dtype);
        return;
    }
    c += a.style == SPURION_ROPE_HALF ? pairs : 0; /* those behind rot */
    spurion_four v = spurion_load4_act(a.x, from + (size_t)c, 4, true, a.x_type);
    if (a.style == SPURION_ROPE_INTERLEAVED && c < a.rot) {
        spurion_four turns = spurion_load4(angles + c, 4, true);
        turn(&v.v[0], &v.v[1], turns.v[0], a.sign * turns.v[1]);
        turn(&v.v[2], &v.v[3], turns.v[2], a.sign * turns.v[3]);
    }
    spurion_store4_act(a.out, at + (size_t)c, v, 4, true, a.dtype);
}

static __global__ void __launch_bounds__(THREADS) rope_kernel(rope_args a)
{
    size_t t = blockIdx.x;
    const float *angles = a.style == SPURION_ROPE_NONE ? NULL : a.table + (size_t)a.positions[t] * (size_t)(a.rot / 2) * 2;
    unsigned items = (unsigned)a.items, all = items * (unsigned)a.heads;
    for (unsigned n = threadIdx.x; n < all; n += THREADS) {
        size_t offset = (size_t)(n / items) * (size_t)a.hd, at = t * a.out_stride + offset, from = t * a.x_stride + offset;
        if (a.whole) {
            turn_four(a, from, at, angles, (int)(n % items));
        } else {
            turn_one(a, from, at, angles, (int)(n % items));
        }
    }
}

static spurion_status run(spurion_dev *dev, rope_args a)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    if (a.hd > SPURION_CUDA_HEAD_DIM_MAX || a.rot > a.hd) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "rope: expected head dim <= %d and rot <= head dim, found %d and %d", (int)SPURION_CUDA_HEAD_DIM_MAX,
                             a.hd, a.rot);
    }
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    a.whole = spurion_whole(a.out, a.out_stride, a.hd, a.dtype) && spurion_whole(a.x, a.x_stride, a.hd, a.x_type) &&
              (a.style == SPURION_ROPE_NONE || (a.rot % 8 == 0 && spurion_cuda_aligned(a.table, 16)));
    a.items = !a.whole ? a.hd : a.style == SPURION_ROPE_HALF ? (a.hd - a.rot / 2) / 4 : a.hd / 4;
    if (a.T > 0 && a.heads > 0) {
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, rope_kernel, dim3((unsigned)a.T), THREADS, 0, a));
    }
    double elements = (double)a.T * a.heads * a.hd;
    return spurion_cuda_end(cuda, SPURION_CLASS_ROPE, 3 * elements, (double)(spurion_dtype_bytes(a.x_type) + spurion_dtype_bytes(a.dtype)) * elements);
}

extern "C" spurion_status spurion_cuda_rope(spurion_dev *dev, void *out, int out_stride, const void *x, spurion_dtype x_type, int x_stride,
                                            const int32_t *positions, const float *table, spurion_rows shape, int rot, spurion_rope_style style, int inverse)
{
    rope_args a = {out, x, table, positions, (size_t)out_stride, (size_t)x_stride, shape.T, shape.groups, shape.C, rot, style,
                   inverse ? -1.0f : 1.0f, dev->dtype, x_type, 0, false};
    return run(dev, a);
}

extern "C" spurion_status spurion_cuda_rope_f32(spurion_dev *dev, float *out, int out_stride, const float *x, int x_stride, const int32_t *positions,
                                                const float *table, spurion_rows shape, int rot, spurion_rope_style style, int inverse)
{
    rope_args a = {out, x, table, positions, (size_t)out_stride, (size_t)x_stride, shape.T, shape.groups, shape.C, rot, style,
                   inverse ? -1.0f : 1.0f, SPURION_F32, SPURION_F32, 0, false};
    return run(dev, a);
}

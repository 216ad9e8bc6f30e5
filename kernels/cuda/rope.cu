/* Rotary embedding: formulas in cpu/rope.c. A thread for each element of the result; the partner comes out of the first-level cache.
 * Thread: engine. Memory: none. */
#include "kernels/cuda/rows.cuh"

typedef struct rope_args {
    void *out;
    const float *x, *table;
    const int32_t *positions;
    size_t out_stride, x_stride;
    int64_t elements; /* T * heads * hd */
    int heads, hd, rot;
    spurion_rope_style style;
    float sign;
    spurion_dtype dtype;
} rope_args;

/* Element c of a head: y[a] = x[a] cos - x[b] sin, y[b] = x[b] cos + x[a] sin; products rounded on their own, as on the CPU. */
static __device__ inline float turned(const float *x, const float *angles, const rope_args &a, int c)
{
    int pairs = a.rot / 2, pair = a.style == SPURION_ROPE_HALF ? c % pairs : c / 2;
    bool first = a.style == SPURION_ROPE_HALF ? c < pairs : c % 2 == 0;
    int other = a.style == SPURION_ROPE_HALF ? (first ? c + pairs : c - pairs) : (first ? c + 1 : c - 1);
    float cosine = angles[2 * pair], sine = a.sign * angles[2 * pair + 1];
    return first ? x[c] * cosine - x[other] * sine : x[c] * cosine + x[other] * sine;
}

static __global__ void rope_kernel(rope_args a)
{
    int64_t item = spurion_item();
    if (item >= a.elements) {
        return;
    }
    int c = (int)(item % a.hd), head = (int)(item / a.hd % a.heads);
    size_t t = (size_t)(item / a.hd / a.heads), offset = (size_t)head * (size_t)a.hd, to = t * a.out_stride + offset + (size_t)c;
    const float *x = a.x + t * a.x_stride + offset;
    float y = x[c];
    if (a.style != SPURION_ROPE_NONE && c < a.rot / 2 * 2) {
        y = turned(x, a.table + (size_t)a.positions[t] * (size_t)(a.rot / 2) * 2, a, c);
    }
    if (a.dtype == SPURION_F32) {
        ((float *)a.out)[to] = y;
    } else {
        ((uint16_t *)a.out)[to] = ptx_bf16(y);
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
    if (a.elements > 0) {
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, rope_kernel, spurion_item_grid(a.elements), SPURION_CUDA_THREADS, 0, a));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_ROPE, 3.0 * (double)a.elements, (4 + (double)spurion_dtype_bytes(a.dtype)) * (double)a.elements);
}

extern "C" spurion_status spurion_cuda_rope(spurion_dev *dev, void *out, int out_stride, const float *x, int x_stride, const int32_t *positions,
                                            const float *table, spurion_rows shape, int rot, spurion_rope_style style, int inverse)
{
    rope_args a = {out, x, table, positions, (size_t)out_stride, (size_t)x_stride, (int64_t)shape.T * shape.groups * shape.C, shape.groups, shape.C, rot,
                   style, inverse ? -1.0f : 1.0f, dev->dtype};
    return run(dev, a);
}

extern "C" spurion_status spurion_cuda_rope_f32(spurion_dev *dev, float *out, int out_stride, const float *x, int x_stride, const int32_t *positions,
                                                const float *table, spurion_rows shape, int rot, spurion_rope_style style, int inverse)
{
    rope_args a = {out, x, table, positions, (size_t)out_stride, (size_t)x_stride, (int64_t)shape.T * shape.groups * shape.C, shape.groups, shape.C, rot,
                   style, inverse ? -1.0f : 1.0f, SPURION_F32};
    return run(dev, a);
}

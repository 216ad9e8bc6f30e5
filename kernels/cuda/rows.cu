/* Rows moved, cast, added and dotted: one thread for four neighbouring elements. Thread: engine. Memory: none. */
#include "kernels/cuda/rows.cuh"

/* (row, first column) of a thread's four elements; false past the end. */
static __device__ inline bool place4(int64_t *row, int *column, int T, int C)
{
    spurion_place p = spurion_place_of((C + 3) / 4);
    *row = p.row;
    *column = 4 * p.quad;
    return p.row < T;
}

static dim3 grid4(int T, int C)
{
    return spurion_item_grid((int64_t)T * ((C + 3) / 4));
}

/* --- embed --- */

static __global__ void embed_kernel(float *out, const void *table, spurion_dtype dtype, const float *position_table, const int32_t *ids,
                                    const int32_t *positions, int T, int D, float scale, bool whole)
{
    int64_t t;
    int c;
    if (!place4(&t, &c, T, D)) {
        return;
    }
    spurion_four v = spurion_load4_act(table, (size_t)ids[t] * (size_t)D + (size_t)c, D - c, whole, dtype), p = {{0, 0, 0, 0}};
    if (position_table != NULL) {
        p = spurion_load4(position_table + (size_t)positions[t] * (size_t)D + (size_t)c, D - c, whole);
    }
    for (int i = 0; i < 4; i++) {
        v.v[i] = v.v[i] * scale + p.v[i];
    }
    spurion_store4(out + (size_t)t * (size_t)D + (size_t)c, v, D - c, whole);
}

extern "C" spurion_status spurion_cuda_embed(spurion_dev *dev, float *out, const void *table, spurion_dtype table_dtype, const float *position_table,
                                             const int32_t *ids, const int32_t *positions, int T, int D, float scale)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    double elements = (double)T * D;
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (T > 0) {
        bool whole = spurion_whole(out, (size_t)D, D, SPURION_F32) && spurion_whole(table, (size_t)D, D, table_dtype) &&
                     spurion_whole(position_table, (size_t)D, D, SPURION_F32);
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, embed_kernel, grid4(T, D), SPURION_CUDA_THREADS, 0, out, table, table_dtype, position_table, ids,
                                               positions, T, D, scale, whole));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_MOVE, elements, elements * (4 + (double)spurion_dtype_bytes(table_dtype)));
}

/* --- gather, scatter --- */

typedef enum move_kind { MOVE_GATHER, MOVE_SCATTER, MOVE_SCATTER_ADD } move_kind;

/* bf16 is widened and rounded back, which gives the same value. */
static __global__ void move_kernel(void *out, const void *in, const int32_t *rows, int R, int C, spurion_dtype dtype, move_kind kind, bool whole)
{
    int64_t r;
    int c;
    if (!place4(&r, &c, R, C)) {
        return;
    }
    size_t near = (size_t)r * (size_t)C + (size_t)c, far = (size_t)rows[r] * (size_t)C + (size_t)c, to = kind == MOVE_GATHER ? near : far;
    spurion_four v = spurion_load4_act(in, kind == MOVE_GATHER ? far : near, C - c, whole, dtype);
    if (kind == MOVE_SCATTER_ADD) {
        spurion_four old = spurion_load4_act(out, to, C - c, whole, dtype);
        for (int i = 0; i < 4; i++) {
            v.v[i] = old.v[i] + v.v[i];
        }
    }
    spurion_store4_act(out, to, v, C - c, whole, dtype);
}

static spurion_status move_rows(spurion_dev *dev, void *out, const void *in, const int32_t *rows, int R, int C, spurion_dtype dtype, move_kind kind)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (R > 0) {
        bool whole = spurion_whole(out, (size_t)C, C, dtype) && spurion_whole(in, (size_t)C, C, dtype);
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, move_kernel, grid4(R, C), SPURION_CUDA_THREADS, 0, out, in, rows, R, C, dtype, kind, whole));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_MOVE, 0, 2.0 * R * C * (double)spurion_dtype_bytes(dtype));
}

extern "C" spurion_status spurion_cuda_gather_rows(spurion_dev *dev, float *out, const float *in, const int32_t *rows, int R, int C)
{
    return move_rows(dev, out, in, rows, R, C, SPURION_F32, MOVE_GATHER);
}

extern "C" spurion_status spurion_cuda_gather_act(spurion_dev *dev, void *out, const void *in, const int32_t *rows, int R, int C)
{
    return move_rows(dev, out, in, rows, R, C, dev->dtype, MOVE_GATHER);
}

extern "C" spurion_status spurion_cuda_scatter_rows(spurion_dev *dev, float *out, const float *in, const int32_t *rows, int R, int C, spurion_write mode)
{
    return move_rows(dev, out, in, rows, R, C, SPURION_F32, mode == SPURION_ACCUMULATE ? MOVE_SCATTER_ADD : MOVE_SCATTER);
}

/* --- cast, add --- */

static __global__ void cast_kernel(void *out, size_t out_stride, const void *x, size_t x_stride, int T, int C, spurion_dtype dtype,
                                   spurion_dtype x_type, bool whole)
{
    int64_t t;
    int c;
    if (!place4(&t, &c, T, C)) {
        return;
    }
    spurion_four v = spurion_load4_act(x, (size_t)t * x_stride + (size_t)c, C - c, whole, x_type);
    spurion_store4_act(out, (size_t)t * out_stride + (size_t)c, v, C - c, whole, dtype);
}

extern "C" spurion_status spurion_cuda_cast(spurion_dev *dev, void *out, int out_stride, const void *x, spurion_dtype x_type, int x_stride, int T, int C)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (T > 0) {
        bool whole = spurion_whole(out, (size_t)out_stride, C, dev->dtype) && spurion_whole(x, (size_t)x_stride, C, x_type);
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, cast_kernel, grid4(T, C), SPURION_CUDA_THREADS, 0, out, (size_t)out_stride, x, (size_t)x_stride, T, C,
                                               dev->dtype, x_type, whole));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_MOVE, 0, (double)T * C * (double)(spurion_dtype_bytes(x_type) + spurion_dtype_bytes(dev->dtype)));
}

static __global__ void add_kernel(float *out, const float *x, int T, int C, bool whole)
{
    int64_t t;
    int c;
    if (!place4(&t, &c, T, C)) {
        return;
    }
    size_t at = (size_t)t * (size_t)C + (size_t)c;
    spurion_four a = spurion_load4(out + at, C - c, whole), b = spurion_load4(x + at, C - c, whole);
    for (int i = 0; i < 4; i++) {
        a.v[i] += b.v[i];
    }
    spurion_store4(out + at, a, C - c, whole);
}

extern "C" spurion_status spurion_cuda_add(spurion_dev *dev, float *out, const float *x, int T, int C)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (T > 0) {
        bool whole = spurion_whole(out, (size_t)C, C, SPURION_F32) && spurion_whole(x, (size_t)C, C, SPURION_F32);
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, add_kernel, grid4(T, C), SPURION_CUDA_THREADS, 0, out, x, T, C, whole));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_MOVE, (double)T * C, 12.0 * T * C);
}

/* --- dot --- */

/* A warp for each row. */
static __global__ void dot_kernel(float *out, const float *a, const float *b, size_t b_stride, int R, int C, float bias)
{
    int64_t r = spurion_item() / SPURION_CUDA_WARP;
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP);
    if (r >= R) {
        return; /* the whole warp */
    }
    const float *x = a + (size_t)r * (size_t)C, *y = b + (size_t)r * b_stride;
    double sum = 0;
    for (int c = lane; c < C; c += SPURION_CUDA_WARP) {
        sum += (double)x[c] * (double)y[c];
    }
    sum = spurion_sum<SPURION_CUDA_WARP>(sum);
    if (lane == 0) {
        out[r] = (float)(sum + (double)bias);
    }
}

extern "C" spurion_status spurion_cuda_dot_rows(spurion_dev *dev, float *out, const float *a, const float *b, int b_stride, int R, int C, float bias)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (R > 0) {
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, dot_kernel, spurion_row_grid(R, SPURION_CUDA_WARP), SPURION_CUDA_THREADS, 0, out, a, b,
                                               (size_t)b_stride, R, C, bias));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_MOVE, 2.0 * R * C, (b_stride ? 8.0 : 4.0) * R * C);
}

/* RMS and layer norms of rows, forward and backward: formulas in cpu/norm.c. A warp for rows of up to 1024 elements, else a block, which
 * keeps up to 8192 of them in registers; sums in f64 in an order fixed by C. Thread: engine. Memory: none. */
#include "kernels/cuda/rows.cuh"

typedef struct norm_args {
    void *out_act;
    float *out_f32;
    float *stats;
    const float *x, *w, *b;
    size_t out_stride, x_stride;
    int groups, C;
    int64_t rows; /* T * groups */
    float eps;
    bool layer, accumulate, whole;
    spurion_dtype dtype;
} norm_args;

/* (v - m) s w + b of the columns from c on, to where `at` says. */
static __device__ inline void write_quad(const norm_args &a, spurion_four v, spurion_four w, size_t at, int c, float m, float s)
{
    int n = a.C - c;
    spurion_four b = {{0, 0, 0, 0}}, old = {{0, 0, 0, 0}};
    if (a.b != NULL) {
        b = spurion_load4(a.b + c, n, a.whole);
    }
    if (a.accumulate) {
        old = spurion_load4(a.out_f32 + at, n, a.whole);
    }
    for (int i = 0; i < 4; i++) {
        v.v[i] = old.v[i] + ((v.v[i] - m) * s * w.v[i] + b.v[i]);
    }
    if (a.out_act != NULL) {
        spurion_store4_act(a.out_act, at, v, n, a.whole, a.dtype);
    } else {
        spurion_store4(a.out_f32 + at, v, n, a.whole);
    }
}

/* Four elements of a row at a time: quad i of a thread begins at column 4 (lane + i LANES). HELD quads stay in registers, so that a row is read
 * once; HELD 0: a longer row, read again for each pass. */
template <int LANES, int HELD> static __device__ inline int quads_of(int C)
{
    return HELD > 0 ? HELD : (C + 4 * LANES - 1) / (4 * LANES);
}

template <int LANES, int HELD>
static __device__ inline spurion_four quad_of(const spurion_four *held, int i, const float *x, int c, int C, bool whole)
{
    return HELD > 0 ? held[i] : spurion_load4(x + c, C - c, whole);
}

template <int LANES, int HELD> static __global__ void __launch_bounds__(SPURION_CUDA_THREADS) norm_kernel(norm_args a)
{
    int64_t row = spurion_item() / LANES;
    int lane = (int)(threadIdx.x % LANES), quads = quads_of<LANES, HELD>(a.C);
    if (row >= a.rows) {
        return; /* the whole warp; a block that shares one row is never beyond the last */
    }
    size_t t = (size_t)(row / a.groups), offset = (size_t)(row % a.groups) * (size_t)a.C, at = t * a.out_stride + offset;
    const float *x = a.x + t * a.x_stride + offset;
    spurion_four held[HELD > 0 ? HELD : 1];
    double mean = 0, square = 0;

#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int c = 4 * (lane + i * LANES);
        if (c < a.C) {
            held[i] = spurion_load4(x + c, a.C - c, a.whole);
        }
    }
#pragma unroll
    for (int i = 0; a.layer && i < quads; i++) {
        int c = 4 * (lane + i * LANES);
        if (c < a.C) {
            spurion_four v = quad_of<LANES, HELD>(held, i, x, c, a.C, a.whole);
            mean += (double)v.v[0] + (double)v.v[1] + (double)v.v[2] + (double)v.v[3];
        }
    }
    mean = a.layer ? spurion_sum<LANES>(mean) / a.C : 0.0;
#pragma unroll
    for (int i = 0; i < quads; i++) {
        int c = 4 * (lane + i * LANES);
        if (c < a.C) {
            spurion_four v = quad_of<LANES, HELD>(held, i, x, c, a.C, a.whole);
            for (int n = 0; n < 4 && n < a.C - c; n++) {
                double d = (double)v.v[n] - mean;
                square += d * d;
            }
        }
    }
    float m = (float)mean, s = (float)(1.0 / sqrt(spurion_sum<LANES>(square) / a.C + (double)a.eps));
    if (a.stats != NULL && lane == 0) {
        a.stats[2 * row] = m;
        a.stats[2 * row + 1] = s;
    }
#pragma unroll
    for (int i = 0; i < quads; i++) {
        int c = 4 * (lane + i * LANES), n = a.C - c;
        if (c < a.C) {
            spurion_four v = quad_of<LANES, HELD>(held, i, x, c, a.C, a.whole), w = spurion_load4(a.w + c, n, a.whole);
            write_quad(a, v, w, at + (size_t)c, c, m, s);
        }
    }
}

extern "C" spurion_status spurion_cuda_norm(spurion_dev *dev, void *out_act, float *out_f32, int out_stride, float *stats, const float *x, int x_stride,
                                            const float *w, const float *b, spurion_rows shape, float eps, spurion_norm_kind kind, spurion_write mode)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    int64_t rows = (int64_t)shape.T * shape.groups;
    int C = shape.C, lanes = spurion_lanes(C);
    double elements = (double)rows * C;
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (rows > 0) {
        bool whole = spurion_whole(out_act, (size_t)out_stride, C, dev->dtype) && spurion_whole(out_f32, (size_t)out_stride, C, SPURION_F32) &&
                     spurion_whole(x, (size_t)x_stride, C, SPURION_F32) && spurion_whole(w, (size_t)C, C, SPURION_F32) &&
                     spurion_whole(b, (size_t)C, C, SPURION_F32);
        norm_args a = {out_act, out_f32, stats, x, w, b, (size_t)out_stride, (size_t)x_stride, shape.groups, C, rows, eps,
                       kind == SPURION_NORM_LAYER, out_act == NULL && mode == SPURION_ACCUMULATE, whole, dev->dtype};
        void (*kernel)(norm_args) = lanes == SPURION_CUDA_WARP ? norm_kernel<SPURION_CUDA_WARP, 8>
                                    : C <= 4096                ? norm_kernel<SPURION_CUDA_THREADS, 4>
                                    : C <= 8192                ? norm_kernel<SPURION_CUDA_THREADS, 8>
                                                               : norm_kernel<SPURION_CUDA_THREADS, 0>;
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, kernel, spurion_row_grid(rows, lanes), SPURION_CUDA_THREADS, 0, a));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_NORM, 6 * elements, 8 * elements);
}

typedef struct norm_back_args {
    float *dx;
    const float *dy, *x, *stats, *w;
    size_t dx_stride, dy_stride, x_stride;
    int groups, C;
    int64_t rows;
    bool layer, accumulate, whole;
} norm_back_args;

/* u = dy w and n = (x - mean) rstd of four elements, 0 past the end. */
static __device__ inline void terms(spurion_four *u, spurion_four *n, const float *dy, const float *x, const norm_back_args &a, int c, float mean, float rstd)
{
    int left = a.C - c;
    spurion_four g = spurion_load4(dy + c, left, a.whole), w = spurion_load4(a.w + c, left, a.whole), v = spurion_load4(x + c, left, a.whole);
    for (int i = 0; i < 4; i++) {
        u->v[i] = g.v[i] * w.v[i];
        n->v[i] = (v.v[i] - mean) * rstd;
    }
}

template <int LANES, int HELD> static __global__ void __launch_bounds__(SPURION_CUDA_THREADS) norm_back_kernel(norm_back_args a)
{
    int64_t row = spurion_item() / LANES;
    int lane = (int)(threadIdx.x % LANES), quads = quads_of<LANES, HELD>(a.C);
    if (row >= a.rows) {
        return;
    }
    size_t t = (size_t)(row / a.groups), offset = (size_t)(row % a.groups) * (size_t)a.C;
    const float *x = a.x + t * a.x_stride + offset, *dy = a.dy + t * a.dy_stride + offset;
    float *dx = a.dx + t * a.dx_stride + offset, mean = a.stats[2 * row], rstd = a.stats[2 * row + 1];
    double sum_u = 0, sum_un = 0;
    spurion_four u[HELD > 0 ? HELD : 1], n[HELD > 0 ? HELD : 1];

#pragma unroll
    for (int i = 0; i < quads; i++) {
        int c = 4 * (lane + i * LANES), at = HELD > 0 ? i : 0;
        if (c < a.C) {
            terms(&u[at], &n[at], dy, x, a, c, mean, rstd);
            for (int k = 0; k < 4; k++) {
                sum_u += (double)u[at].v[k];
                sum_un += (double)(u[at].v[k] * n[at].v[k]);
            }
        }
    }
    float mean_u = 0.0f, mean_un = (float)(spurion_sum<LANES>(sum_un) / a.C);
    if (a.layer) {
        mean_u = (float)(spurion_sum<LANES>(sum_u) / a.C);
    }
#pragma unroll
    for (int i = 0; i < quads; i++) {
        int c = 4 * (lane + i * LANES), at = HELD > 0 ? i : 0;
        if (c >= a.C) {
            continue;
        }
        spurion_four old = {{0, 0, 0, 0}};
        if (HELD == 0) {
            terms(&u[0], &n[0], dy, x, a, c, mean, rstd);
        }
        if (a.accumulate) {
            old = spurion_load4(dx + c, a.C - c, a.whole);
        }
        for (int k = 0; k < 4; k++) {
            old.v[k] += (u[at].v[k] - n[at].v[k] * mean_un - mean_u) * rstd;
        }
        spurion_store4(dx + c, old, a.C - c, a.whole);
    }
}

extern "C" spurion_status spurion_cuda_norm_backward(spurion_dev *dev, float *dx, int dx_stride, const float *dy, int dy_stride, const float *x, int x_stride,
                                                     const float *stats, const float *w, spurion_rows shape, spurion_norm_kind kind, spurion_write mode)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    int64_t rows = (int64_t)shape.T * shape.groups;
    int C = shape.C, lanes = spurion_lanes(C);
    double elements = (double)rows * C;
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (rows > 0) {
        bool whole = spurion_whole(dx, (size_t)dx_stride, C, SPURION_F32) && spurion_whole(dy, (size_t)dy_stride, C, SPURION_F32) &&
                     spurion_whole(x, (size_t)x_stride, C, SPURION_F32) && spurion_whole(w, (size_t)C, C, SPURION_F32);
        norm_back_args a = {dx, dy, x, stats, w, (size_t)dx_stride, (size_t)dy_stride, (size_t)x_stride, shape.groups, C, rows,
                            kind == SPURION_NORM_LAYER, mode == SPURION_ACCUMULATE, whole};
        void (*kernel)(norm_back_args) = lanes == SPURION_CUDA_WARP ? norm_back_kernel<SPURION_CUDA_WARP, 8>
                                         : C <= 4096                ? norm_back_kernel<SPURION_CUDA_THREADS, 4>
                                         : C <= 8192                ? norm_back_kernel<SPURION_CUDA_THREADS, 8>
                                                                    : norm_back_kernel<SPURION_CUDA_THREADS, 0>;
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, kernel, spurion_row_grid(rows, lanes), SPURION_CUDA_THREADS, 0, a));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_NORM, 12 * elements, 16 * elements);
}

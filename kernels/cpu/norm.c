/* RMS and layer norms of rows, forward and backward. Sums in f64, VW of them side by side: an order fixed by C.
 * Backward, with n = (x - mean) rstd (mean 0 for RMS) and u = dy w:
 *   dx = rstd (u - n mean(u n) [- mean(u) for LAYER]).      Thread: engine. Memory: none. */
#include <math.h>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd.h"

typedef struct norm_job {
    void *out_act;
    float *out_f32;
    float *stats;
    const float *x, *w, *b;
    size_t out_stride, x_stride;
    spurion_rows shape;
    float eps;
    spurion_norm_kind kind;
    spurion_write mode;
    spurion_dtype dtype;
} norm_job;

static double mean_of(const float *x, int C)
{
    vd sum = {0};
    for (int c = 0; c < C; c += VW) {
        sum += v_widen(v_load_n(x + c, C - c));
    }
    return vd_sum(sum) / C;
}

/* Mean of (x - mean)^2, in f64. */
static double mean_square(const float *x, int C, double mean)
{
    vd sum = {0};
    int whole = C / VW * VW;
    for (int c = 0; c < whole; c += VW) {
        vd d = v_widen(v_load(x + c)) - mean;
        sum += d * d;
    }
    double total = vd_sum(sum);
    for (int c = whole; c < C; c++) {
        double d = (double)x[c] - mean;
        total += d * d;
    }
    return total / C;
}

static void norm_write(const norm_job *j, const float *x, size_t at, float mean, float rstd)
{
    int C = j->shape.C;
    for (int c = 0; c < C; c += VW) {
        int n = C - c;
        vf v = (v_load_n(x + c, n) - mean) * rstd * v_load_n(j->w + c, n);
        if (j->b != NULL) {
            v += v_load_n(j->b + c, n);
        }
        if (j->out_act != NULL) {
            v_store_act(j->out_act, at + (size_t)c, v, n, j->dtype);
            continue;
        }
        float *out = j->out_f32 + at + (size_t)c;
        v_store_n(out, j->mode == SPURION_ACCUMULATE ? v_load_n(out, n) + v : v, n);
    }
}

static void norm_row(void *context, int row)
{
    const norm_job *j = context;
    int t = row / j->shape.groups, g = row % j->shape.groups, C = j->shape.C;
    size_t offset = (size_t)g * (size_t)C;
    const float *x = j->x + (size_t)t * j->x_stride + offset;
    double mean = j->kind == SPURION_NORM_LAYER ? mean_of(x, C) : 0.0;
    double rstd = 1.0 / sqrt(mean_square(x, C, mean) + (double)j->eps);
    if (j->stats != NULL) {
        j->stats[2 * (size_t)row] = (float)mean;
        j->stats[2 * (size_t)row + 1] = (float)rstd;
    }
    norm_write(j, x, (size_t)t * j->out_stride + offset, (float)mean, (float)rstd);
}

spurion_status SPURION_CPU_OP(norm)(spurion_dev *dev, void *out_act, float *out_f32, int out_stride, float *stats, const float *x, int x_stride,
                                    const float *w, const float *b, spurion_rows shape, float eps, spurion_norm_kind kind, spurion_write mode)
{
    double start = spurion_cpu_now(), elements = (double)shape.T * shape.groups * shape.C;
    norm_job job = {out_act, out_f32, stats, x, w, b, (size_t)out_stride, (size_t)x_stride, shape, eps, kind, mode, dev->dtype};
    spurion_each_row(dev, norm_row, &job, shape.T * shape.groups, 2 * (size_t)shape.C);
    spurion_cpu_count(dev, SPURION_CLASS_NORM, start, 6 * elements, 8 * elements);
    return spurion_ok();
}

typedef struct norm_back_job {
    float *dx;
    const float *dy, *x, *stats, *w;
    size_t dx_stride, dy_stride, x_stride;
    spurion_rows shape;
    spurion_norm_kind kind;
    spurion_write mode;
} norm_back_job;

static void norm_back_row(void *context, int row)
{
    const norm_back_job *j = context;
    int t = row / j->shape.groups, g = row % j->shape.groups, C = j->shape.C;
    size_t offset = (size_t)g * (size_t)C;
    const float *x = j->x + (size_t)t * j->x_stride + offset, *dy = j->dy + (size_t)t * j->dy_stride + offset;
    float *dx = j->dx + (size_t)t * j->dx_stride + offset;
    float mean = j->stats[2 * (size_t)row], rstd = j->stats[2 * (size_t)row + 1];
    vd sum_u = {0}, sum_un = {0};

    for (int c = 0; c < C; c += VW) { /* in the tail u = 0, so the padding adds nothing */
        int n = C - c;
        vf u = v_load_n(dy + c, n) * v_load_n(j->w + c, n);
        sum_u += v_widen(u);
        sum_un += v_widen(u * ((v_load_n(x + c, n) - mean) * rstd));
    }
    float mean_u = j->kind == SPURION_NORM_LAYER ? (float)(vd_sum(sum_u) / C) : 0.0f;
    float mean_un = (float)(vd_sum(sum_un) / C);
    for (int c = 0; c < C; c += VW) {
        int n = C - c;
        vf u = v_load_n(dy + c, n) * v_load_n(j->w + c, n);
        vf v = (u - (v_load_n(x + c, n) - mean) * rstd * mean_un - mean_u) * rstd;
        v_store_n(dx + c, j->mode == SPURION_ACCUMULATE ? v_load_n(dx + c, n) + v : v, n);
    }
}

spurion_status SPURION_CPU_OP(norm_backward)(spurion_dev *dev, float *dx, int dx_stride, const float *dy, int dy_stride, const float *x,
                                             int x_stride, const float *stats, const float *w, spurion_rows shape, spurion_norm_kind kind,
                                             spurion_write mode)
{
    double start = spurion_cpu_now(), elements = (double)shape.T * shape.groups * shape.C;
    norm_back_job job = {dx, dy, x, stats, w, (size_t)dx_stride, (size_t)dy_stride, (size_t)x_stride, shape, kind, mode};
    spurion_each_row(dev, norm_back_row, &job, shape.T * shape.groups, 3 * (size_t)shape.C);
    spurion_cpu_count(dev, SPURION_CLASS_NORM, start, 12 * elements, 16 * elements);
    return spurion_ok();
}

/* Rotary embedding: pairs of dimensions turn by the angle of the row's position; the rest is copied. Plain loops: a pair's two
 * results are two products and one sum each, the same in every lane (the folder forbids contraction). Thread: engine. */
#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd.h"

typedef struct rope_job {
    void *out;
    const void *x;
    const float *table;
    const int32_t *positions;
    size_t out_stride, x_stride;
    spurion_rows shape;
    int rot;
    spurion_rope_style style;
    float sign;
    spurion_dtype dtype, x_type;
} rope_job;

/* y[a] = x[a] cos - x[b] sin, y[b] = x[b] cos + x[a] sin; the inverse has sin negated. */
static void turn(float *y, const float *x, const float *angles, int pairs, int step, int apart, float sign)
{
    for (int k = 0; k < pairs; k++) {
        float c = angles[2 * k], s = sign * angles[2 * k + 1];
        float a = x[k * step], b = x[k * step + apart];
        y[k * step] = a * c - b * s;
        y[k * step + apart] = b * c + a * s;
    }
}

static void rope_row(void *context, int row)
{
    const rope_job *j = context;
    int t = row / j->shape.groups, head = row % j->shape.groups, hd = j->shape.C, pairs = j->rot / 2;
    size_t offset = (size_t)head * (size_t)hd, at = (size_t)t * j->out_stride + offset;
    size_t from = (size_t)t * j->x_stride + offset;
    float y[SPURION_HEAD_DIM_MAX + VW], wide[SPURION_HEAD_DIM_MAX + VW];
    const float *x = j->x_type == SPURION_F32 ? (const float *)j->x + from : wide;

    for (int c = 0; c < hd && j->x_type != SPURION_F32; c += VW) {
        v_store(wide + c, v_load_act(j->x, from + (size_t)c, hd - c, j->x_type));
    }
    memcpy(y, x, (size_t)hd * sizeof *y);
    if (j->style != SPURION_ROPE_NONE) {
        const float *angles = j->table + (size_t)j->positions[t] * (size_t)pairs * 2;
        bool half = j->style == SPURION_ROPE_HALF;
        turn(y, x, angles, pairs, half ? 1 : 2, half ? pairs : 1, j->sign);
    }
    for (int c = 0; c < hd; c += VW) {
        v_store_act(j->out, at + (size_t)c, v_load_n(y + c, hd - c), hd - c, j->dtype);
    }
}

static spurion_status run(spurion_dev *dev, rope_job *job)
{
    double start = spurion_cpu_now(), elements = (double)job->shape.T * job->shape.groups * job->shape.C;
    if (job->shape.C > SPURION_HEAD_DIM_MAX || job->rot > job->shape.C) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "rope: expected head dim <= %d and rot <= head dim, found %d and %d",
                             SPURION_HEAD_DIM_MAX, job->shape.C, job->rot);
    }
    spurion_each_row(dev, rope_row, job, job->shape.T * job->shape.groups, (size_t)job->shape.C);
    spurion_cpu_count(dev, SPURION_CLASS_ROPE, start, 3 * elements, (double)(spurion_dtype_bytes(job->x_type) + spurion_dtype_bytes(job->dtype)) * elements);
    return spurion_ok();
}

spurion_status SPURION_CPU_OP(rope)(spurion_dev *dev, void *out, int out_stride, const void *x, spurion_dtype x_type, int x_stride,
                                    const int32_t *positions, const float *table, spurion_rows shape, int rot, spurion_rope_style style, int inverse)
{
    rope_job job = {out, x, table, positions, (size_t)out_stride, (size_t)x_stride, shape, rot, style, inverse ? -1.0f : 1.0f, dev->dtype, x_type};
    return run(dev, &job);
}

spurion_status SPURION_CPU_OP(rope_f32)(spurion_dev *dev, float *out, int out_stride, const float *x, int x_stride, const int32_t *positions,
                                        const float *table, spurion_rows shape, int rot, spurion_rope_style style, int inverse)
{
    rope_job job = {out, x, table, positions, (size_t)out_stride, (size_t)x_stride, shape, rot, style, inverse ? -1.0f : 1.0f, SPURION_F32, SPURION_F32};
    return run(dev, &job);
}

/* Rows moved, cast, added and dotted. Thread: engine. Memory: none. */
#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd.h"

/* --- embed --- */

typedef struct embed_job {
    float *out;
    const void *table;
    spurion_dtype dtype;
    const float *position_table;
    const int32_t *ids, *positions;
    int D;
    float scale;
} embed_job;

static void embed_row(void *context, int t)
{
    const embed_job *j = context;
    size_t D = (size_t)j->D, at = (size_t)j->ids[t] * D;
    const float *position = j->position_table == NULL ? NULL : j->position_table + (size_t)j->positions[t] * D;
    float *out = j->out + (size_t)t * D;
    for (int c = 0; c < j->D; c += VW) {
        int n = j->D - c;
        vf v = v_load_act(j->table, at + (size_t)c, n, j->dtype) * j->scale;
        if (position != NULL) {
            v += v_load_n(position + c, n);
        }
        v_store_n(out + c, v, n);
    }
}

spurion_status SPURION_CPU_OP(embed)(spurion_dev *dev, float *out, const void *table, spurion_dtype table_dtype,
                                     const float *position_table, const int32_t *ids, const int32_t *positions, int T, int D, float scale)
{
    double start = spurion_cpu_now(), elements = (double)T * D;
    embed_job job = {out, table, table_dtype, position_table, ids, positions, D, scale};
    spurion_each_row(dev, embed_row, &job, T, (size_t)D);
    spurion_cpu_count(dev, SPURION_CLASS_MOVE, start, elements, elements * (4 + (double)spurion_dtype_bytes(table_dtype)));
    return spurion_ok();
}

/* --- gather, scatter --- */

typedef struct copy_job {
    char *out;
    const char *in;
    const int32_t *rows;
    size_t bytes;
    int C;
} copy_job;

static void gather_row(void *context, int r)
{
    const copy_job *j = context;
    memcpy(j->out + (size_t)r * j->bytes, j->in + (size_t)j->rows[r] * j->bytes, j->bytes);
}

static void scatter_row(void *context, int r)
{
    const copy_job *j = context;
    memcpy(j->out + (size_t)j->rows[r] * j->bytes, j->in + (size_t)r * j->bytes, j->bytes);
}

static void add_row(float *out, const float *x, int C)
{
    for (int c = 0; c < C; c += VW) {
        v_store_n(out + c, v_load_n(out + c, C - c) + v_load_n(x + c, C - c), C - c);
    }
}

static void scatter_add_row(void *context, int r)
{
    const copy_job *j = context;
    size_t C = (size_t)j->C;
    add_row((float *)(void *)j->out + (size_t)j->rows[r] * C, (const float *)(const void *)j->in + (size_t)r * C, j->C);
}

static spurion_status copy_rows(spurion_dev *dev, spurion_row_fn fn, void *out, const void *in, const int32_t *rows, int R, int C, size_t element)
{
    double start = spurion_cpu_now();
    copy_job job = {out, in, rows, (size_t)C * element, C};
    spurion_each_row(dev, fn, &job, R, (size_t)C);
    spurion_cpu_count(dev, SPURION_CLASS_MOVE, start, 0, 2.0 * R * (double)job.bytes);
    return spurion_ok();
}

spurion_status SPURION_CPU_OP(gather_rows)(spurion_dev *dev, float *out, const float *in, const int32_t *rows, int R, int C)
{
    return copy_rows(dev, gather_row, out, in, rows, R, C, sizeof(float));
}

spurion_status SPURION_CPU_OP(gather_act)(spurion_dev *dev, void *out, const void *in, const int32_t *rows, int R, int C)
{
    return copy_rows(dev, gather_row, out, in, rows, R, C, spurion_dtype_bytes(dev->dtype));
}

spurion_status SPURION_CPU_OP(scatter_rows)(spurion_dev *dev, float *out, const float *in, const int32_t *rows, int R, int C, spurion_write mode)
{
    return copy_rows(dev, mode == SPURION_ACCUMULATE ? scatter_add_row : scatter_row, out, in, rows, R, C, sizeof(float));
}

/* --- cast, add --- */

typedef struct cast_job {
    void *out;
    const void *x;
    size_t out_stride, x_stride;
    int C;
    spurion_dtype dtype, x_type;
} cast_job;

static void cast_row(void *context, int t)
{
    const cast_job *j = context;
    size_t from = (size_t)t * j->x_stride, at = (size_t)t * j->out_stride;
    for (int c = 0; c < j->C; c += VW) {
        v_store_act(j->out, at + (size_t)c, v_load_act(j->x, from + (size_t)c, j->C - c, j->x_type), j->C - c, j->dtype);
    }
}

spurion_status SPURION_CPU_OP(cast)(spurion_dev *dev, void *out, int out_stride, const void *x, spurion_dtype x_type, int x_stride, int T, int C)
{
    double start = spurion_cpu_now();
    cast_job job = {out, x, (size_t)out_stride, (size_t)x_stride, C, dev->dtype, x_type};
    spurion_each_row(dev, cast_row, &job, T, (size_t)C);
    spurion_cpu_count(dev, SPURION_CLASS_MOVE, start, 0, (double)T * C * (double)(spurion_dtype_bytes(x_type) + spurion_dtype_bytes(dev->dtype)));
    return spurion_ok();
}

static void add_job_row(void *context, int t)
{
    const cast_job *j = context;
    add_row((float *)j->out + (size_t)t * j->out_stride, (const float *)j->x + (size_t)t * j->x_stride, j->C);
}

spurion_status SPURION_CPU_OP(add)(spurion_dev *dev, float *out, const float *x, int T, int C)
{
    double start = spurion_cpu_now();
    cast_job job = {out, x, (size_t)C, (size_t)C, C, SPURION_F32, SPURION_F32};
    spurion_each_row(dev, add_job_row, &job, T, (size_t)C);
    spurion_cpu_count(dev, SPURION_CLASS_MOVE, start, (double)T * C, 12.0 * T * C);
    return spurion_ok();
}

/* --- dot --- */

typedef struct dot_job {
    float *out;
    const float *a, *b;
    size_t b_stride;
    int C;
    float bias;
} dot_job;

static void dot_row(void *context, int r)
{
    const dot_job *j = context;
    const float *a = j->a + (size_t)r * (size_t)j->C, *b = j->b + (size_t)r * j->b_stride;
    double sum = 0;
    for (int c = 0; c < j->C; c++) {
        sum += (double)a[c] * b[c];
    }
    j->out[r] = (float)(sum + j->bias);
}

spurion_status SPURION_CPU_OP(dot_rows)(spurion_dev *dev, float *out, const float *a, const float *b, int b_stride, int R, int C, float bias)
{
    double start = spurion_cpu_now();
    dot_job job = {out, a, b, (size_t)b_stride, C, bias};
    spurion_each_row(dev, dot_row, &job, R, 4 * (size_t)C);
    spurion_cpu_count(dev, SPURION_CLASS_MOVE, start, 2.0 * R * C, (b_stride ? 8.0 : 4.0) * R * C);
    return spurion_ok();
}

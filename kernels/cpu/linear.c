/* Matrix products over rows: tiles of rows times chunks of outputs; bias and addition behind each tile.
 * Items are chunk-major, so that the workers share a chunk's weights in cache. */
#include <stdatomic.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/simd.h"

typedef struct linear_job {
    spurion_cpu *cpu;
    const spurion_matrix *m;
    const spurion_product *p;
    void *out;
    spurion_dtype out_type;
    size_t out_stride;
    const char *x;
    const float *bias;
    int T, tiles;
    spurion_write mode;
    atomic_int failed;
} linear_job;

/* out row (+)= tile row + bias */
static void write_row(float *out, const float *tile, const float *bias, int n, spurion_write mode)
{
    for (int i = 0; i < n; i += VW) {
        int m = n - i;
        vf v = v_load_n(tile + i, m);
        if (bias != NULL) {
            v += v_load_n(bias + i, m);
        }
        if (mode == SPURION_ACCUMULATE) {
            v += v_load_n(out + i, m);
        }
        v_store_n(out + i, v, m);
    }
}

/* The same rounded to bf16, with the bias rounded first, as cuBLASLt has it. */
static void write_row_bf16(uint16_t *out, const float *tile, const float *bias, int n)
{
    for (int i = 0; i < n; i += VW) {
        int m = n - i;
        vf v = v_load_n(tile + i, m);
        if (bias != NULL) {
            v += v_from_bf16(v_to_bf16(v_load_n(bias + i, m)));
        }
        vh_store_n(out + i, v_to_bf16(v), m);
    }
}

static void write_any(const linear_job *j, const float *tile, int row, int column, int n)
{
    size_t at = (size_t)row * j->out_stride + (size_t)column;
    const float *bias = j->bias == NULL ? NULL : j->bias + column;
    if (j->out_type == SPURION_BF16) {
        write_row_bf16((uint16_t *)j->out + at, tile, bias, n);
    } else {
        write_row((float *)j->out + at, tile, bias, n, j->mode);
    }
}

static void linear_item(void *context, int64_t item, int worker)
{
    linear_job *j = context;
    const spurion_product *p = j->p;
    int chunk = (int)(item / j->tiles), first = (int)(item % j->tiles) * p->tile_rows;
    int rows = j->T - first < p->tile_rows ? j->T - first : p->tile_rows;
    int size = spurion_product_chunk_size(p, chunk), column = chunk * p->chunk;
    const char *x = j->x + (size_t)first * (size_t)p->inner * spurion_dtype_bytes(j->m->dtype);
    spurion_input input = spurion_product_input(j->cpu, j->m, p, x, rows, worker);

    spurion_product_begin(j->cpu, p);
    if (p->amx && j->out_type == SPURION_F32) {
        spurion_product_write((float *)j->out + (size_t)first * j->out_stride, j->out_stride, p, input, j->bias, chunk, j->mode);
    } else {
        size_t stride;
        const float *tile = spurion_product_tile(&stride, j->cpu, p, input, chunk, worker);
        if (tile == NULL) {
            atomic_store(&j->failed, 1);
            rows = 0;
        }
        for (int r = 0; r < rows; r++) {
            write_any(j, tile + (size_t)r * stride, first + r, column, size);
        }
    }
    spurion_product_end(p);
}

static spurion_status run(spurion_dev *dev, void *out, spurion_dtype out_type, int out_stride, const void *x, const spurion_matrix *m, const spurion_product *p,
                          const float *bias, int T, spurion_write mode)
{
    double start = spurion_cpu_now();
    linear_job job = {.cpu = spurion_cpu_of(dev), .m = m, .p = p, .out = out, .out_type = out_type, .out_stride = (size_t)out_stride, .x = x,
                      .bias = bias, .T = T, .mode = mode};

    if (p->outputs == 0) {
        return spurion_error(SPURION_INTERNAL, "matrix (%d, %d) was not made for this direction", m->N, m->K);
    }
    if (out_type != SPURION_F32 && mode == SPURION_ACCUMULATE) {
        return spurion_error(SPURION_INTERNAL, "matrix (%d, %d): only f32 can be added to", m->N, m->K);
    }
    job.tiles = (T + p->tile_rows - 1) / p->tile_rows;
    spurion_pool_run(job.cpu->pool, linear_item, &job, (int64_t)job.tiles * p->chunk_count);
    double n = m->N, k = m->K, t = T;
    spurion_cpu_count(dev, SPURION_CLASS_GEMM, start, 2 * t * n * k,
                      (double)spurion_dtype_bytes(m->dtype) * (n * k + t * p->inner) + (double)spurion_dtype_bytes(out_type) * t * p->outputs);
    return atomic_load(&job.failed) ? spurion_error(SPURION_INTERNAL, "oneDNN product (%d, %d) failed", m->N, m->K) : spurion_ok();
}

spurion_status SPURION_CPU_OP(linear)(spurion_dev *dev, void *out, spurion_dtype out_type, int out_stride, const void *x,
                                      const spurion_matrix *w, int T, spurion_write mode)
{
    return run(dev, out, out_type, out_stride, x, w, &w->forward, w->bias, T, mode);
}

spurion_status SPURION_CPU_OP(linear_backward)(spurion_dev *dev, void *dx, spurion_dtype dx_type, const void *dy, const spurion_matrix *w,
                                               int T, spurion_write mode)
{
    return run(dev, dx, dx_type, w->K, dy, w, &w->backward, NULL, T, mode);
}

/* One after the other: a chunk of rows lies in the caches between them. */
spurion_status SPURION_CPU_OP(linear_act)(spurion_dev *dev, void *y, void *pre, spurion_dtype type, bool keep, const void *x,
                                          const spurion_matrix *w, int T, spurion_act_kind kind, int gated)
{
    spurion_status st;
    (void)keep;
    SPURION_TRY(st, SPURION_CPU_OP(linear)(dev, pre, type, w->N, x, w, T, SPURION_OVERWRITE));
    SPURION_TRY(st, SPURION_CPU_OP(activation)(dev, y, pre, type, T, gated ? w->N / 2 : w->N, kind, gated));
out:
    return st;
}

spurion_status SPURION_CPU_OP(linear_act_backward)(spurion_dev *dev, void *dpre, void *dout, spurion_dtype type, const void *dy,
                                                   const spurion_matrix *w, const void *pre, int T, spurion_act_kind kind, int gated)
{
    spurion_status st;
    SPURION_TRY(st, SPURION_CPU_OP(linear_backward)(dev, dout, type, dy, w, T, SPURION_OVERWRITE));
    SPURION_TRY(st, SPURION_CPU_OP(activation_backward)(dev, dpre, pre, dout, type, T, w->K, kind, gated));
out:
    return st;
}

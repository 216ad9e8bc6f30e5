/* Matrix products by cuBLASLt: f32, or bf16 in and f32 or bf16 out, f32 sums (no TF32); GELU and its gradient behind them.
 *
 * A row's result may not depend on T. So each (outputs, inner, direction, types, bias, what is behind) has one algorithm, chosen once
 * (linear_plan.cu). M is always a multiple of ROW_STEP: the last rows go through padded buffers. Where no candidate passes the proof, every call
 * has exactly ROW_STEP rows, which leaves nothing to depend on. Where the library has no algorithm (odd rows of bf16), plain loops of our own.
 *
 * Row-major out (T, N) = x (T, K) w (N, K)^T is, in the library's column-major terms, out^T (N, T) = w^T x^T: A = w, op T, ld K; backward
 * dx^T (K, T) = w^T dy^T: A = w, op N, ld K.         Thread: engine. Memory: padded buffers, reserved when a matrix is made. */
#include "kernels/cuda/linear.cuh"

enum { PLAIN_TILE = 16 };

/* --- our own loops --- */

static __global__ void plain_kernel(void *out, size_t out_stride, const void *x, const void *w, const void *bias, int T, int outputs, int inner,
                                    size_t w_output, size_t w_inner, spurion_dtype dtype, spurion_dtype out_type, bool accumulate)
{
    int t = (int)blockIdx.y * PLAIN_TILE + (int)threadIdx.x / PLAIN_TILE;
    int64_t o = (int64_t)blockIdx.x * PLAIN_TILE + threadIdx.x % PLAIN_TILE;
    if (t >= T || o >= outputs) {
        return;
    }
    float sum = 0.0f;
    for (int k = 0; k < inner; k++) {
        size_t at = (size_t)t * (size_t)inner + (size_t)k, to = (size_t)o * w_output + (size_t)k * w_inner;
        float a = dtype == SPURION_F32 ? ((const float *)x)[at] : spurion_from_bf16(((const uint16_t *)x)[at]);
        float b = dtype == SPURION_F32 ? ((const float *)w)[to] : spurion_from_bf16(((const uint16_t *)w)[to]);
        sum = fmaf(a, b, sum);
    }
    size_t at = (size_t)t * out_stride + (size_t)o;
    if (out_type == SPURION_BF16) {
        sum += bias == NULL ? 0.0f : spurion_from_bf16(((const uint16_t *)bias)[o]);
        ((uint16_t *)out)[at] = ptx_bf16(sum);
        return;
    }
    float *to = (float *)out + at;
    sum += bias == NULL ? 0.0f : ((const float *)bias)[o];
    *to = accumulate ? *to + sum : sum;
}

static spurion_status plain_rows(spurion_cuda *cuda, const spurion_product *p, void *out, size_t out_stride, const void *x, int T)
{
    const spurion_cuda_plan *n = p->plan;
    size_t K = (size_t)(n->transposed ? n->inner : n->outputs); /* columns of w in memory */
    size_t x_bytes = (size_t)n->inner * spurion_dtype_bytes(n->dtype), out_bytes = out_stride * spurion_dtype_bytes(n->out);
    const int step = 65535 * PLAIN_TILE;
    for (int t = 0; t < T; t += step) {
        int rows = T - t < step ? T - t : step;
        dim3 grid((unsigned)((n->outputs + PLAIN_TILE - 1) / PLAIN_TILE), (unsigned)((rows + PLAIN_TILE - 1) / PLAIN_TILE));
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, plain_kernel, grid, PLAIN_TILE * PLAIN_TILE, 0, (void *)((char *)out + (size_t)t * out_bytes),
                                               out_stride, (const void *)((const char *)x + (size_t)t * x_bytes), p->w, p->bias, rows, n->outputs, n->inner,
                                               n->transposed ? K : (size_t)1, n->transposed ? (size_t)1 : K, n->dtype, n->out,
                                               p->mode == SPURION_ACCUMULATE));
    }
    return spurion_ok();
}

/* --- the library --- */

void spurion_layouts_destroy(spurion_layouts *l)
{
    cublasLtMatrixLayout_t all[] = {l->a, l->b, l->d};
    for (cublasLtMatrixLayout_t one : all) {
        if (one != NULL) {
            (void)cublasLtMatrixLayoutDestroy(one);
        }
    }
}

cublasStatus_t spurion_layouts_make(spurion_layouts *l, const spurion_cuda_plan *p, int rows, size_t out_stride)
{
    uint64_t a_rows = (uint64_t)(p->transposed ? p->inner : p->outputs), a_columns = (uint64_t)(p->transposed ? p->outputs : p->inner);
    *l = spurion_layouts{NULL, NULL, NULL};
    cublasStatus_t e = cublasLtMatrixLayoutCreate(&l->a, spurion_library_type(p->dtype), a_rows, a_columns, (int64_t)a_rows);
    if (e == CUBLAS_STATUS_SUCCESS) {
        e = cublasLtMatrixLayoutCreate(&l->b, spurion_library_type(p->dtype), (uint64_t)p->inner, (uint64_t)rows, p->inner);
    }
    if (e == CUBLAS_STATUS_SUCCESS) {
        e = cublasLtMatrixLayoutCreate(&l->d, spurion_library_type(p->out), (uint64_t)p->outputs, (uint64_t)rows, (int64_t)out_stride);
    }
    return e;
}

cublasStatus_t spurion_library_rows(spurion_cuda *cuda, const spurion_product *p, void *out, size_t out_stride, const void *x, void *aux, int rows)
{
    spurion_layouts l;
    float alpha = 1.0f, beta = p->mode == SPURION_ACCUMULATE ? 1.0f : 0.0f;
    cublasStatus_t e = spurion_layouts_make(&l, p->plan, rows, out_stride);
    if (e == CUBLAS_STATUS_SUCCESS && p->plan->bias) {
        e = cublasLtMatmulDescSetAttribute(p->plan->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias);
    }
    if (e == CUBLAS_STATUS_SUCCESS && spurion_has_aux(p->plan)) {
        e = cublasLtMatmulDescSetAttribute(p->plan->desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux, sizeof aux);
    }
    if (e == CUBLAS_STATUS_SUCCESS) {
        e = cublasLtMatmul(cuda->blas, p->plan->desc, &alpha, p->w, l.a, x, l.b, &beta, out, l.d, out, l.d, &p->plan->algo, cuda->workspace.p,
                           cuda->workspace.bytes, cuda->stream);
    }
    spurion_layouts_destroy(&l);
    return e;
}

/* Where a call's rows lie. */
typedef struct places {
    char *out;
    const char *x;
    char *aux;
    size_t out_stride, out_bytes, x_bytes, aux_bytes; /* elements; bytes of a row, stride and all */
} places;

static places places_of(const spurion_cuda_plan *n, void *out, size_t out_stride, const void *x, void *aux)
{
    size_t out_element = spurion_dtype_bytes(n->out);
    return {(char *)out, (const char *)x, (char *)aux, out_stride, out_stride * out_element, (size_t)n->inner * spurion_dtype_bytes(n->dtype),
            aux == NULL ? 0 : (size_t)n->outputs * out_element};
}

static places rows_on(places a, int rows)
{
    a.out += (size_t)rows * a.out_bytes;
    a.x += (size_t)rows * a.x_bytes;
    a.aux = a.aux_bytes == 0 ? a.aux : a.aux + (size_t)rows * a.aux_bytes;
    return a;
}

/* At most ROW_STEP rows through the padded buffers. An accumulating call brings its rows along, so that the sum is made in the same place. */
static spurion_status padded_rows(spurion_cuda *cuda, const spurion_product *p, places a, int rows)
{
    const spurion_cuda_plan *n = p->plan;
    size_t outputs = (size_t)n->outputs, width = outputs * spurion_dtype_bytes(n->out), count = (size_t)rows;
    void *wide = cuda->pad_out.p, *aux = a.aux == NULL ? NULL : cuda->pad_aux.p;
    SPURION_CUDA(cuda, cudaMemcpyAsync(cuda->pad_in.p, a.x, count * a.x_bytes, cudaMemcpyDeviceToDevice, cuda->stream));
    if (p->mode == SPURION_ACCUMULATE) {
        SPURION_CUDA(cuda, cudaMemcpy2DAsync(wide, width, a.out, a.out_bytes, width, count, cudaMemcpyDeviceToDevice, cuda->stream));
    }
    if (n->behind == SPURION_BEHIND_GELU_SLOPE) {
        SPURION_CUDA(cuda, cudaMemcpyAsync(aux, a.aux, count * a.aux_bytes, cudaMemcpyDeviceToDevice, cuda->stream));
    }
    SPURION_CUDA_BLAS(cuda, spurion_library_rows(cuda, p, wide, outputs, cuda->pad_in.p, aux, SPURION_CUDA_ROW_STEP));
    SPURION_CUDA(cuda, cudaMemcpy2DAsync(a.out, a.out_bytes, wide, width, width, count, cudaMemcpyDeviceToDevice, cuda->stream));
    if (n->behind == SPURION_BEHIND_GELU_KEPT) {
        SPURION_CUDA(cuda, cudaMemcpyAsync(a.aux, aux, count * a.aux_bytes, cudaMemcpyDeviceToDevice, cuda->stream));
    }
    return spurion_ok();
}

/* room: the buffers go on to whole steps of rows, so that nothing needs a padded buffer. */
static spurion_status run_product(spurion_cuda *cuda, const spurion_product *p, places a, int T, bool room)
{
    const spurion_cuda_plan *n = p->plan;
    if (n->plain) {
        return plain_rows(cuda, p, a.out, a.out_stride, a.x, T);
    }
    /* A stride or a place that the algorithm does not count on (never the engine's) goes through the padded buffers, all of it. */
    bool direct = spurion_cuda_aligned(a.x, n->x_align) && spurion_cuda_aligned(a.out, n->out_align) && a.out_bytes % n->out_align == 0 &&
                  spurion_cuda_aligned(a.aux, 16);
    int whole = room ? (int)spurion_cuda_round_up((size_t)T, SPURION_CUDA_ROW_STEP) : T / SPURION_CUDA_ROW_STEP * SPURION_CUDA_ROW_STEP;
    int step = n->fixed ? SPURION_CUDA_ROW_STEP : whole;
    int t = 0;
    for (; direct && t < whole; t += step) {
        places b = rows_on(a, t);
        SPURION_CUDA_BLAS(cuda, spurion_library_rows(cuda, p, b.out, b.out_stride, b.x, b.aux, step));
    }
    for (; t < T; t += SPURION_CUDA_ROW_STEP) {
        int rows = T - t < SPURION_CUDA_ROW_STEP ? T - t : SPURION_CUDA_ROW_STEP;
        SPURION_CUDA_DO(padded_rows(cuda, p, rows_on(a, t), rows));
    }
    return spurion_ok();
}

/* --- the ops --- */

static spurion_status run(spurion_cuda *cuda, const spurion_matrix *m, const spurion_cuda_plan *plan, places a, int T, spurion_write mode)
{
    spurion_product p = {plan, m->w, spurion_bias_of(m, plan), mode};
    double n = m->N, k = m->K, t = T, out = (double)spurion_dtype_bytes(plan->out) * plan->outputs;
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    SPURION_CUDA_DO(run_product(cuda, &p, a, T, false));
    return spurion_cuda_end(cuda, SPURION_CLASS_GEMM, 2 * t * n * k,
                            (double)spurion_dtype_bytes(m->dtype) * (n * k + t * plan->inner) + t * (out + (double)a.aux_bytes));
}

static spurion_status linear(spurion_dev *dev, void *out, spurion_dtype type, int out_stride, const void *x, const spurion_matrix *m, bool forward, int T,
                             spurion_write mode)
{
    const spurion_cuda_plan *plan = (forward ? m->forward : m->backward)[type];
    if (plan == NULL || m->rows != NULL) {
        return spurion_error(SPURION_INTERNAL, "matrix (%d, %d) was not made for this direction and type", m->N, m->K);
    }
    if (type != SPURION_F32 && mode == SPURION_ACCUMULATE) {
        return spurion_error(SPURION_INTERNAL, "matrix (%d, %d): only f32 can be added to", m->N, m->K);
    }
    return run(spurion_cuda_of(dev), m, plan, places_of(plan, out, (size_t)out_stride, x, NULL), T, mode);
}

extern "C" spurion_status spurion_cuda_linear(spurion_dev *dev, void *out, spurion_dtype out_type, int out_stride, const void *x,
                                              const spurion_matrix *w, int T, spurion_write mode)
{
    return linear(dev, out, out_type, out_stride, x, w, true, T, mode);
}

extern "C" spurion_status spurion_cuda_linear_backward(spurion_dev *dev, void *dx, spurion_dtype dx_type, const void *dy, const spurion_matrix *w,
                                                       int T, spurion_write mode)
{
    return linear(dev, dx, dx_type, w->K, dy, w, false, T, mode);
}

/* Whether the library's GELU is the one asked for. */
static bool is_gelu(spurion_dtype type, spurion_act_kind kind, int gated)
{
    return type == SPURION_BF16 && kind == SPURION_ACT_GELU_TANH && !gated;
}

extern "C" spurion_status spurion_cuda_linear_act(spurion_dev *dev, void *out, void *pre, spurion_dtype type, bool keep, const void *x,
                                                  const spurion_matrix *w, int T, spurion_act_kind kind, int gated)
{
    const spurion_cuda_plan *plan = is_gelu(type, kind, gated) ? w->gelu[keep] : NULL;
    if (plan != NULL) {
        void *aux = spurion_has_aux(plan) ? pre : NULL;
        return run(spurion_cuda_of(dev), w, plan, places_of(plan, out, (size_t)w->N, x, aux), T, SPURION_OVERWRITE);
    }
    SPURION_CUDA_DO(spurion_cuda_linear(dev, pre, type, w->N, x, w, T, SPURION_OVERWRITE));
    return spurion_cuda_activation(dev, out, pre, type, T, gated ? w->N / 2 : w->N, kind, gated);
}

extern "C" spurion_status spurion_cuda_linear_act_backward(spurion_dev *dev, void *dpre, void *dout, spurion_dtype type, const void *dy,
                                                           const spurion_matrix *w, const void *pre, int T, spurion_act_kind kind, int gated)
{
    const spurion_cuda_plan *plan = is_gelu(type, kind, gated) ? w->dgelu : NULL;
    if (plan != NULL) { /* the library only reads aux here */
        return run(spurion_cuda_of(dev), w, plan, places_of(plan, dpre, (size_t)w->K, dy, const_cast<void *>(pre)), T, SPURION_OVERWRITE);
    }
    SPURION_CUDA_DO(spurion_cuda_linear_backward(dev, dout, type, dy, w, T, SPURION_OVERWRITE));
    return spurion_cuda_activation_backward(dev, dpre, pre, dout, type, T, w->K, kind, gated);
}

spurion_status spurion_cuda_product_padded(spurion_cuda *cuda, float *out, const void *x, const spurion_matrix *m, int T)
{
    const spurion_cuda_plan *plan = m->forward[SPURION_F32];
    spurion_product p = {plan, m->w, spurion_bias_of(m, plan), SPURION_OVERWRITE};
    return run_product(cuda, &p, places_of(plan, out, (size_t)m->N, x, NULL), T, true);
}

/* Weights on the device: rounded there, read by both directions as they are; what a screen of features must know of them; and the plans of
 * their products.          Thread: engine. Memory: one block per matrix. */
#include <cstdlib>

#include "kernels/cuda/linear.cuh"

static size_t weight_bytes(int N, int K, spurion_dtype dtype)
{
    return spurion_cuda_round_up((size_t)N * (size_t)K * spurion_dtype_bytes(dtype), 256);
}

static size_t row_bytes(int N)
{
    return spurion_cuda_round_up((size_t)N * sizeof(float), 256);
}

/* An encoder in f32 of which only few outputs of a row are kept: products in bf16, and the rows themselves (sae.cuh). */
static bool screened(int directions, spurion_dtype dtype)
{
    return (directions & SPURION_SELECT) && dtype == SPURION_F32;
}

static size_t bias_bytes(int N, spurion_dtype type)
{
    return row_bytes(N) + (type == SPURION_BF16 ? spurion_cuda_round_up((size_t)N * sizeof(uint16_t), 256) : 0);
}

/* Weights serve both directions as they are; the bias has its place even where there is none. */
extern "C" size_t spurion_cuda_matrix_bytes(const spurion_dev *dev, int N, int K, int directions, spurion_dtype dtype)
{
    (void)dev;
    if (screened(directions, dtype)) {
        return weight_bytes(N, K, SPURION_BF16) + bias_bytes(N, SPURION_BF16) + row_bytes(N) + weight_bytes(N, K, SPURION_F32);
    }
    return weight_bytes(N, K, dtype) + bias_bytes(N, dtype);
}

static __global__ void narrow_kernel(uint16_t *out, const float *in, int64_t count)
{
    int64_t i = spurion_item();
    if (i < count) {
        out[i] = ptx_bf16(in[i]);
    }
}

/* length[2 n], length[2 n + 1] = |w' - w|, |w| of row n, rounded up. A warp per row. */
static __global__ void length_kernel(float *length, const float *w, int N, int K)
{
    int64_t n = spurion_item() / SPURION_CUDA_WARP;
    double lost = 0, whole = 0;
    if (n >= N) {
        return; /* the whole warp */
    }
    for (int k = (int)(threadIdx.x % SPURION_CUDA_WARP); k < K; k += SPURION_CUDA_WARP) {
        float v = w[(size_t)n * (size_t)K + (size_t)k];
        double gone = (double)(spurion_from_bf16(ptx_bf16(v)) - v);
        lost += gone * gone;
        whole += (double)v * (double)v;
    }
    lost = spurion_sum<SPURION_CUDA_WARP>(lost);
    whole = spurion_sum<SPURION_CUDA_WARP>(whole);
    if (threadIdx.x % SPURION_CUDA_WARP == 0) {
        length[2 * n] = (float)(1.00001 * sqrt(lost));
        length[2 * n + 1] = (float)(1.00001 * sqrt(whole));
    }
}

/* f32 host weights onto the device; bf16 ones are rounded there, a piece at a time. */
static spurion_status put_weights(spurion_cuda *cuda, spurion_matrix *m, const float *w)
{
    size_t count = (size_t)m->N * (size_t)m->K, most = cuda->wide.bytes / sizeof(float);
    if (m->type == SPURION_F32) {
        return spurion_cuda_send(cuda, m->w, w, count * sizeof *w);
    }
    for (size_t at = 0, n; at < count; at += n) {
        n = count - at < most ? count - at : most;
        float *wide = m->rows == NULL ? (float *)cuda->wide.p : m->rows + at;
        SPURION_CUDA_DO(spurion_cuda_send(cuda, wide, w + at, n * sizeof *w));
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, narrow_kernel, spurion_item_grid((int64_t)n), SPURION_CUDA_THREADS, 0, (uint16_t *)m->w + at,
                                               (const float *)wide, (int64_t)n));
    }
    return spurion_ok();
}

/* One number per row instead of two, for what rounding loses is nearly the same share of every row. */
static void reach_of(spurion_matrix *m, float *length)
{
    double lost = 0, whole = 0;
    for (int n = 0; n < m->N; n++) {
        lost += (double)length[2 * n];
        whole += (double)length[2 * n + 1];
    }
    m->loss = whole > 0 ? (float)(1.05 * lost / whole) : 0.0f;
    for (int n = 0; n < m->N; n++) { /* 1.00001: the roundings of this line */
        float share = length[2 * n] > 0.0f ? 1.00001f * (length[2 * n] / m->loss) : 0.0f;
        length[n] = share > length[2 * n + 1] ? share : length[2 * n + 1];
    }
}

static spurion_status put_reach(spurion_cuda *cuda, spurion_matrix *m)
{
    size_t bytes = 2 * (size_t)m->N * sizeof(float);
    float *length = (float *)malloc(bytes);
    spurion_status st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for the row lengths of a matrix");
    if (length != NULL) {
        st = spurion_cuda_reserve(cuda, &cuda->work, bytes);
    }
    if (st.code == SPURION_OK) {
        cudaError_t e = spurion_cuda_launch(cuda, length_kernel, spurion_row_grid(m->N, SPURION_CUDA_WARP), SPURION_CUDA_THREADS, 0, (float *)cuda->work.p,
                                            (const float *)m->rows, m->N, m->K);
        st = e == cudaSuccess ? spurion_cuda_download(&cuda->dev, length, cuda->work.p, bytes) : spurion_cuda_error(cuda, e, "length_kernel");
    }
    if (st.code == SPURION_OK) {
        reach_of(m, length);
        st = spurion_cuda_send(cuda, m->reach, length, (size_t)m->N * sizeof *length);
    }
    free(length);
    return st;
}

static spurion_status put_bias(spurion_cuda *cuda, spurion_matrix *m, const float *bias, char *at)
{
    m->bias = (float *)(void *)at;
    SPURION_CUDA_DO(spurion_cuda_send(cuda, m->bias, bias, (size_t)m->N * sizeof *bias));
    if (m->type == SPURION_BF16) {
        m->bias_act = (uint16_t *)(void *)(at + row_bytes(m->N));
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, narrow_kernel, spurion_item_grid(m->N), SPURION_CUDA_THREADS, 0, m->bias_act,
                                               (const float *)m->bias, (int64_t)m->N));
    }
    return spurion_ok();
}

/* --- its products --- */

static spurion_status plans_f32(spurion_cuda *cuda, spurion_matrix *m)
{
    if (m->directions & SPURION_ANY_FORWARD) {
        SPURION_CUDA_DO(spurion_cuda_plan_get(&m->forward[SPURION_F32], cuda, m, true, SPURION_F32, SPURION_BEHIND_NOTHING));
    }
    if (m->directions & SPURION_ANY_BACKWARD) {
        SPURION_CUDA_DO(spurion_cuda_plan_get(&m->backward[SPURION_F32], cuda, m, false, SPURION_F32, SPURION_BEHIND_NOTHING));
    }
    return spurion_ok();
}

/* A plan with GELU behind, or NULL where the library has none that passes. */
static spurion_status plan_behind(spurion_cuda_plan **out, spurion_cuda *cuda, const spurion_matrix *m, bool forward, spurion_behind behind)
{
    *out = NULL;
    SPURION_CUDA_DO(spurion_cuda_plan_get(out, cuda, m, forward, SPURION_BF16, behind));
    *out = (*out)->plain ? NULL : *out;
    return spurion_ok();
}

/* A row's GELU may not depend on whether its input is kept: where the two algorithms differ, it is always written. */
static spurion_status plans_gelu(spurion_cuda *cuda, spurion_matrix *m)
{
    SPURION_CUDA_DO(plan_behind(&m->gelu[true], cuda, m, true, SPURION_BEHIND_GELU_KEPT));
    if (m->gelu[true] == NULL) {
        return spurion_ok();
    }
    SPURION_CUDA_DO(plan_behind(&m->gelu[false], cuda, m, true, SPURION_BEHIND_GELU));
    if (m->gelu[false] != NULL && !m->gelu[false]->asked) {
        SPURION_CUDA_DO(spurion_cuda_plans_agree(m->gelu[false], m->gelu[true], cuda, m));
    }
    if (m->gelu[false] == NULL || !m->gelu[false]->agrees) {
        m->gelu[false] = m->gelu[true];
    }
    return spurion_ok();
}

static spurion_status plans_bf16(spurion_cuda *cuda, spurion_matrix *m)
{
    int d = m->directions;
    if (d & SPURION_FORWARD_GELU) {
        SPURION_CUDA_DO(plans_gelu(cuda, m));
    }
    if (d & SPURION_BACKWARD_GELU) {
        SPURION_CUDA_DO(plan_behind(&m->dgelu, cuda, m, false, SPURION_BEHIND_GELU_SLOPE));
    }
    if (d & (SPURION_FORWARD | SPURION_SELECT)) {
        SPURION_CUDA_DO(spurion_cuda_plan_get(&m->forward[SPURION_F32], cuda, m, true, SPURION_F32, SPURION_BEHIND_NOTHING));
    }
    if ((d & SPURION_FORWARD_ACT) || ((d & SPURION_FORWARD_GELU) && m->gelu[true] == NULL)) {
        SPURION_CUDA_DO(spurion_cuda_plan_get(&m->forward[SPURION_BF16], cuda, m, true, SPURION_BF16, SPURION_BEHIND_NOTHING));
    }
    if (d & SPURION_BACKWARD) {
        SPURION_CUDA_DO(spurion_cuda_plan_get(&m->backward[SPURION_F32], cuda, m, false, SPURION_F32, SPURION_BEHIND_NOTHING));
    }
    if ((d & SPURION_BACKWARD_ACT) || ((d & SPURION_BACKWARD_GELU) && m->dgelu == NULL)) {
        SPURION_CUDA_DO(spurion_cuda_plan_get(&m->backward[SPURION_BF16], cuda, m, false, SPURION_BF16, SPURION_BEHIND_NOTHING));
    }
    return spurion_ok();
}

static spurion_status matrix_fill(spurion_cuda *cuda, spurion_matrix *m, const float *w, const float *bias)
{
    size_t widest = (size_t)(m->N > m->K ? m->N : m->K), pad = SPURION_CUDA_ROW_STEP * widest;
    SPURION_CUDA_DO(spurion_cuda_alloc(&cuda->dev, &m->w, spurion_cuda_matrix_bytes(&cuda->dev, m->N, m->K, m->directions, m->dtype)));
    char *behind = (char *)m->w + weight_bytes(m->N, m->K, m->type);
    if (screened(m->directions, m->dtype)) {
        m->reach = (float *)(void *)(behind + bias_bytes(m->N, m->type));
        m->rows = (float *)(void *)(behind + bias_bytes(m->N, m->type) + row_bytes(m->N));
    }
    SPURION_CUDA_DO(put_weights(cuda, m, w));
    if (m->rows != NULL) {
        SPURION_CUDA_DO(put_reach(cuda, m));
    }
    if (bias != NULL) {
        SPURION_CUDA_DO(put_bias(cuda, m, bias, behind));
    }
    SPURION_CUDA_DO(spurion_cuda_reserve(cuda, &cuda->pad_in, pad * spurion_dtype_bytes(m->type)));
    SPURION_CUDA_DO(spurion_cuda_reserve(cuda, &cuda->pad_out, pad * sizeof(float)));
    if (m->directions & (SPURION_FORWARD_GELU | SPURION_BACKWARD_GELU)) {
        SPURION_CUDA_DO(spurion_cuda_reserve(cuda, &cuda->pad_aux, pad * spurion_dtype_bytes(m->type)));
    }
    return m->type == SPURION_F32 ? plans_f32(cuda, m) : plans_bf16(cuda, m);
}

extern "C" spurion_status spurion_cuda_matrix_create(spurion_dev *dev, spurion_matrix **out, const float *w, const float *bias, int N, int K,
                                                     int directions, spurion_dtype dtype)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    *out = NULL;
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    spurion_matrix *m = (spurion_matrix *)calloc(1, sizeof *m);
    if (m == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a matrix");
    }
    m->N = N;
    m->K = K;
    m->dtype = dtype;
    m->type = screened(directions, dtype) ? SPURION_BF16 : dtype;
    m->directions = directions;
    spurion_status st = matrix_fill(cuda, m, w, bias);
    if (st.code != SPURION_OK) {
        spurion_cuda_matrix_destroy(dev, m);
        return st;
    }
    *out = m;
    return st;
}

extern "C" void spurion_cuda_matrix_destroy(spurion_dev *dev, spurion_matrix *m)
{
    if (m != NULL) {
        spurion_cuda_free(dev, m->w);
        free(m);
    }
}

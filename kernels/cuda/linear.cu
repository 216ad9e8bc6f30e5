/* Matrix products by cuBLASLt: f32, or bf16 in and f32 out, f32 sums (no TF32).
 *
 * A row's result may not depend on T. So each (outputs, inner, direction, type, bias) has one algorithm, chosen once: no split of K, no
 * reduction scheme, and seen, on this device and with this matrix, to give the same bits for a row whatever M is (prove_rows). M is always a
 * multiple of ROW_STEP: the last rows go through a padded buffer. Where no candidate passes, every call has exactly ROW_STEP rows, which
 * leaves nothing to depend on. Where the library has no algorithm (odd rows of bf16), plain loops of our own.
 *
 * Row-major out (T, N) = x (T, K) w (N, K)^T is, in the library's column-major terms, out^T (N, T) = w^T x^T: A = w, op T, ld K; backward
 * dx^T (K, T) = w^T dy^T: A = w, op N, ld K.         Thread: engine. Memory: one block per matrix; plans until the device goes. */
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/rows.cuh"

#if defined(SPURION_EMULATED)
enum { PROOF_ROWS = 256 };
#else
enum { PROOF_ROWS = 2048 };
#endif
enum { CANDIDATES = 16, TYPICAL_ROWS = 4096, PLAIN_TILE = 16 };
#define PROOF_BYTES ((size_t)256 << 20)

typedef struct spurion_cuda_plan {
    struct spurion_cuda_plan *next;
    int outputs, inner;
    spurion_dtype dtype;
    bool transposed, bias, plain, fixed; /* plain: our own loops; fixed: ROW_STEP rows a call */
    size_t x_align, out_align;           /* bytes that the algorithm counts on */
    cublasLtMatmulDesc_t desc;
    cublasLtMatmulAlgo_t algo;
} spurion_cuda_plan;

/* One call: rows of input and output. */
typedef struct product {
    const spurion_cuda_plan *plan;
    const void *w;
    const float *bias;
    spurion_write mode;
} product;

static cudaDataType_t library_type(spurion_dtype t)
{
    return t == SPURION_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

/* The power of two that every row of `bytes` bytes begins at, at most 16. */
static size_t row_alignment(size_t bytes)
{
    size_t a = 16;
    while (bytes % a != 0) {
        a /= 2;
    }
    return a;
}

/* --- our own loops --- */

static __global__ void plain_kernel(float *out, size_t out_stride, const void *x, const void *w, const float *bias, int T, int outputs, int inner,
                                    size_t w_output, size_t w_inner, spurion_dtype dtype, bool accumulate)
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
    float *to = out + (size_t)t * out_stride + (size_t)o;
    sum += bias == NULL ? 0.0f : bias[o];
    *to = accumulate ? *to + sum : sum;
}

static spurion_status plain_rows(spurion_cuda *cuda, const product *p, float *out, size_t out_stride, const void *x, int T)
{
    const spurion_cuda_plan *n = p->plan;
    size_t K = (size_t)(n->transposed ? n->inner : n->outputs); /* columns of w in memory */
    const int step = 65535 * PLAIN_TILE;
    for (int t = 0; t < T; t += step) {
        int rows = T - t < step ? T - t : step;
        dim3 grid((unsigned)((n->outputs + PLAIN_TILE - 1) / PLAIN_TILE), (unsigned)((rows + PLAIN_TILE - 1) / PLAIN_TILE));
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, plain_kernel, grid, PLAIN_TILE * PLAIN_TILE, 0, out + (size_t)t * out_stride, out_stride,
                                               (const void *)((const char *)x + (size_t)t * (size_t)n->inner * spurion_dtype_bytes(n->dtype)), p->w,
                                               p->bias, rows, n->outputs, n->inner, n->transposed ? K : (size_t)1, n->transposed ? (size_t)1 : K,
                                               n->dtype, p->mode == SPURION_ACCUMULATE));
    }
    return spurion_ok();
}

/* --- the library --- */

typedef struct layouts {
    cublasLtMatrixLayout_t a, b, d;
} layouts;

static void layouts_destroy(layouts *l)
{
    cublasLtMatrixLayout_t all[] = {l->a, l->b, l->d};
    for (cublasLtMatrixLayout_t one : all) {
        if (one != NULL) {
            (void)cublasLtMatrixLayoutDestroy(one);
        }
    }
}

static cublasStatus_t layouts_make(layouts *l, const spurion_cuda_plan *p, int rows, size_t out_stride)
{
    uint64_t a_rows = (uint64_t)(p->transposed ? p->inner : p->outputs), a_columns = (uint64_t)(p->transposed ? p->outputs : p->inner);
    *l = layouts{NULL, NULL, NULL};
    cublasStatus_t e = cublasLtMatrixLayoutCreate(&l->a, library_type(p->dtype), a_rows, a_columns, (int64_t)a_rows);
    if (e == CUBLAS_STATUS_SUCCESS) {
        e = cublasLtMatrixLayoutCreate(&l->b, library_type(p->dtype), (uint64_t)p->inner, (uint64_t)rows, p->inner);
    }
    if (e == CUBLAS_STATUS_SUCCESS) {
        e = cublasLtMatrixLayoutCreate(&l->d, CUDA_R_32F, (uint64_t)p->outputs, (uint64_t)rows, (int64_t)out_stride);
    }
    return e;
}

/* out (rows, outputs) = ...: rows a multiple of ROW_STEP, pointers aligned as the plan says. */
static cublasStatus_t library_rows(spurion_cuda *cuda, const product *p, float *out, size_t out_stride, const void *x, int rows)
{
    layouts l;
    float alpha = 1.0f, beta = p->mode == SPURION_ACCUMULATE ? 1.0f : 0.0f;
    cublasStatus_t e = layouts_make(&l, p->plan, rows, out_stride);
    if (e == CUBLAS_STATUS_SUCCESS && p->plan->bias) {
        e = cublasLtMatmulDescSetAttribute(p->plan->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias);
    }
    if (e == CUBLAS_STATUS_SUCCESS) {
        e = cublasLtMatmul(cuda->blas, p->plan->desc, &alpha, p->w, l.a, x, l.b, &beta, out, l.d, out, l.d, &p->plan->algo, cuda->workspace.p,
                           cuda->workspace.bytes, cuda->stream);
    }
    layouts_destroy(&l);
    return e;
}

/* At most ROW_STEP rows through the padded buffers. An accumulating call brings its rows along, so that the sum is made in the same place. */
static spurion_status padded_rows(spurion_cuda *cuda, const product *p, float *out, size_t out_stride, const void *x, int rows)
{
    size_t outputs = (size_t)p->plan->outputs, x_bytes = (size_t)p->plan->inner * spurion_dtype_bytes(p->plan->dtype), width = outputs * sizeof(float);
    float *wide = (float *)cuda->pad_out.p;
    SPURION_CUDA(cuda, cudaMemcpyAsync(cuda->pad_in.p, x, (size_t)rows * x_bytes, cudaMemcpyDeviceToDevice, cuda->stream));
    if (p->mode == SPURION_ACCUMULATE) {
        SPURION_CUDA(cuda, cudaMemcpy2DAsync(wide, width, out, out_stride * sizeof(float), width, (size_t)rows, cudaMemcpyDeviceToDevice, cuda->stream));
    }
    SPURION_CUDA_BLAS(cuda, library_rows(cuda, p, wide, outputs, cuda->pad_in.p, SPURION_CUDA_ROW_STEP));
    SPURION_CUDA(cuda, cudaMemcpy2DAsync(out, out_stride * sizeof(float), wide, width, width, (size_t)rows, cudaMemcpyDeviceToDevice, cuda->stream));
    return spurion_ok();
}

/* room: the buffers go on to whole steps of rows, so that nothing needs a padded buffer. */
static spurion_status run_product(spurion_cuda *cuda, const product *p, float *out, size_t out_stride, const void *x, int T, bool room)
{
    const spurion_cuda_plan *n = p->plan;
    size_t x_bytes = (size_t)n->inner * spurion_dtype_bytes(n->dtype);
    if (n->plain) {
        return plain_rows(cuda, p, out, out_stride, x, T);
    }
    /* A stride or a place that the algorithm does not count on (never the engine's) goes through the padded buffers, all of it. */
    bool direct = spurion_cuda_aligned(x, n->x_align) && spurion_cuda_aligned(out, n->out_align) && out_stride * sizeof(float) % n->out_align == 0;
    int whole = room ? (int)spurion_cuda_round_up((size_t)T, SPURION_CUDA_ROW_STEP) : T / SPURION_CUDA_ROW_STEP * SPURION_CUDA_ROW_STEP;
    int step = n->fixed ? SPURION_CUDA_ROW_STEP : whole;
    int t = 0;
    for (; direct && t < whole; t += step) {
        SPURION_CUDA_BLAS(cuda, library_rows(cuda, p, out + (size_t)t * out_stride, out_stride, (const char *)x + (size_t)t * x_bytes, step));
    }
    for (; t < T; t += SPURION_CUDA_ROW_STEP) {
        int rows = T - t < SPURION_CUDA_ROW_STEP ? T - t : SPURION_CUDA_ROW_STEP;
        SPURION_CUDA_DO(padded_rows(cuda, p, out + (size_t)t * out_stride, out_stride, (const char *)x + (size_t)t * x_bytes, rows));
    }
    return spurion_ok();
}

/* --- choosing an algorithm --- */

/* Numbers in (-1, 1) that look random, the same at every start. */
static __global__ void fill_kernel(void *out, int64_t count, spurion_dtype dtype)
{
    int64_t i = spurion_item();
    if (i >= count) {
        return;
    }
    uint32_t h = (uint32_t)i * 2654435761u;
    h = (h ^ h >> 15) * 2246822519u;
    h = (h ^ h >> 13) * 3266489917u;
    float v = (float)(int32_t)(h ^ h >> 16) * 0x1p-31f;
    if (dtype == SPURION_F32) {
        ((float *)out)[i] = v;
    } else {
        ((uint16_t *)out)[i] = ptx_bf16(v);
    }
}

static __global__ void differ_kernel(int *count, const float *a, const float *b, int64_t n)
{
    int64_t i = spurion_item();
    if (i < n && __float_as_uint(a[i]) != __float_as_uint(b[i])) {
        (void)atomicAdd(count, 1);
    }
}

/* What the proof works on. */
typedef struct proof {
    char *x;          /* (rows, inner) */
    float *all, *one; /* (rows, outputs), (ROW_STEP, outputs) */
    int *differ;
    int rows;
} proof;

/* Rows in the middle of M rows against the same rows alone. library_failed: this algorithm does not run here. */
static spurion_status prove_m(int *differ, bool *library_failed, spurion_cuda *cuda, const product *p, const proof *f, int M, int at)
{
    size_t outputs = (size_t)p->plan->outputs, x_bytes = (size_t)p->plan->inner * spurion_dtype_bytes(p->plan->dtype);
    int64_t n = (int64_t)SPURION_CUDA_ROW_STEP * p->plan->outputs;
    if (library_rows(cuda, p, f->all, outputs, f->x, M) != CUBLAS_STATUS_SUCCESS ||
        library_rows(cuda, p, f->one, outputs, f->x + (size_t)at * x_bytes, SPURION_CUDA_ROW_STEP) != CUBLAS_STATUS_SUCCESS) {
        *library_failed = true;
        return spurion_ok();
    }
    SPURION_CUDA(cuda, cudaMemsetAsync(f->differ, 0, sizeof(int), cuda->stream));
    SPURION_CUDA(cuda, spurion_cuda_launch(cuda, differ_kernel, spurion_item_grid(n), SPURION_CUDA_THREADS, 0, f->differ,
                                           (const float *)(f->all + (size_t)at * outputs), (const float *)f->one, n));
    return spurion_cuda_download(&cuda->dev, differ, f->differ, sizeof(int));
}

/* Whether the plan's algorithm gives a row the same bits whatever M is: several M, several places. */
static spurion_status prove_rows(bool *same, bool *runs, spurion_cuda *cuda, const product *p, const proof *f)
{
    bool failed = false;
    *same = true;
    for (int M = 2 * SPURION_CUDA_ROW_STEP; *same && M <= f->rows; M = M * 2 - SPURION_CUDA_ROW_STEP) {
        int places[] = {0, M / 2 / SPURION_CUDA_ROW_STEP * SPURION_CUDA_ROW_STEP, M - SPURION_CUDA_ROW_STEP};
        for (int at : places) {
            int differ = 0;
            SPURION_CUDA_DO(prove_m(&differ, &failed, cuda, p, f, M, at));
            *same = *same && !failed && differ == 0;
        }
    }
    *runs = !failed;
    return spurion_ok();
}

static spurion_status proof_take(proof *f, spurion_cuda *cuda, const spurion_cuda_plan *p)
{
    size_t x_bytes = (size_t)p->inner * spurion_dtype_bytes(p->dtype), out_bytes = (size_t)p->outputs * sizeof(float);
    size_t rows = PROOF_BYTES / (x_bytes > out_bytes ? x_bytes : out_bytes);
    rows = rows > (size_t)PROOF_ROWS ? (size_t)PROOF_ROWS : rows / SPURION_CUDA_ROW_STEP * SPURION_CUDA_ROW_STEP;
    f->rows = rows < 2 * SPURION_CUDA_ROW_STEP ? 2 * SPURION_CUDA_ROW_STEP : (int)rows;
    SPURION_CUDA(cuda, cudaMalloc((void **)&f->x, (size_t)f->rows * x_bytes));
    SPURION_CUDA(cuda, cudaMalloc((void **)&f->all, (size_t)f->rows * out_bytes));
    SPURION_CUDA(cuda, cudaMalloc((void **)&f->one, SPURION_CUDA_ROW_STEP * out_bytes));
    SPURION_CUDA(cuda, cudaMalloc((void **)&f->differ, sizeof(int)));
    int64_t count = (int64_t)f->rows * p->inner;
    SPURION_CUDA(cuda, spurion_cuda_launch(cuda, fill_kernel, spurion_item_grid(count), SPURION_CUDA_THREADS, 0, (void *)f->x, count, p->dtype));
    return spurion_ok();
}

static void proof_give_back(proof *f)
{
    void *all[] = {f->x, f->all, f->one, f->differ};
    for (void *p : all) {
        if (p != NULL) {
            (void)cudaFree(p);
        }
    }
}

/* Whether an algorithm says that it splits K. One that does not tell has the proof to pass. */
static bool splits(const cublasLtMatmulAlgo_t *algo)
{
    uint32_t parts = 1, scheme = CUBLASLT_REDUCTION_SCHEME_NONE;
    size_t written = 0;
    if (cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &parts, sizeof parts, &written) != CUBLAS_STATUS_SUCCESS) {
        parts = 1;
    }
    if (cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme, sizeof scheme, &written) != CUBLAS_STATUS_SUCCESS) {
        scheme = CUBLASLT_REDUCTION_SCHEME_NONE;
    }
    return parts > 1 || scheme != CUBLASLT_REDUCTION_SCHEME_NONE;
}

static cublasStatus_t preference_make(cublasLtMatmulPreference_t *out, const spurion_cuda *cuda, const spurion_cuda_plan *p)
{
    const size_t workspace = cuda->workspace.bytes;
    const uint32_t none = CUBLASLT_REDUCTION_SCHEME_NONE, x = (uint32_t)p->x_align, d = (uint32_t)p->out_align;
    const struct {
        cublasLtMatmulPreferenceAttributes_t name;
        const void *value;
        size_t bytes;
    } all[] = {{CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace},
               {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &none, sizeof none},
               {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &x, sizeof x}, /* set to w's below where that is less */
               {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &x, sizeof x},
               {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &d, sizeof d},
               {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &d, sizeof d}};
    cublasStatus_t e = cublasLtMatmulPreferenceCreate(out);
    for (size_t i = 0; e == CUBLAS_STATUS_SUCCESS && i < sizeof all / sizeof all[0]; i++) {
        e = cublasLtMatmulPreferenceSetAttribute(*out, all[i].name, all[i].value, all[i].bytes);
    }
    uint32_t w = (uint32_t)row_alignment((size_t)(p->transposed ? p->inner : p->outputs) * spurion_dtype_bytes(p->dtype));
    return e == CUBLAS_STATUS_SUCCESS ? cublasLtMatmulPreferenceSetAttribute(*out, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &w, sizeof w) : e;
}

/* The library's candidates for many rows, best first; 0 where it has none. */
static int candidates_of(cublasLtMatmulHeuristicResult_t *out, spurion_cuda *cuda, const spurion_cuda_plan *p)
{
    int found = 0;
    layouts l = {NULL, NULL, NULL};
    cublasLtMatmulPreference_t preference = NULL;
    cublasStatus_t e = layouts_make(&l, p, TYPICAL_ROWS, (size_t)p->outputs);
    e = e == CUBLAS_STATUS_SUCCESS ? preference_make(&preference, cuda, p) : e;
    if (e == CUBLAS_STATUS_SUCCESS) {
        e = cublasLtMatmulAlgoGetHeuristic(cuda->blas, p->desc, l.a, l.b, l.d, l.d, preference, CANDIDATES, out, &found);
    }
    if (preference != NULL) {
        (void)cublasLtMatmulPreferenceDestroy(preference);
    }
    layouts_destroy(&l);
    return e == CUBLAS_STATUS_SUCCESS ? found : 0;
}

/* Takes the first candidate that does not split and passes the proof; else the first that does not split, at a fixed number of rows. */
static spurion_status choose_algorithm(spurion_cuda *cuda, spurion_cuda_plan *p, const void *w, const float *bias)
{
    cublasLtMatmulHeuristicResult_t results[CANDIDATES];
    product call = {p, w, bias, SPURION_OVERWRITE};
    proof f = {NULL, NULL, NULL, NULL, 0};
    int found = candidates_of(results, cuda, p), first = -1;
    bool same = false, runs = false;
    spurion_status st = proof_take(&f, cuda, p);

    for (int i = 0; st.code == SPURION_OK && !same && i < found; i++) {
        if (results[i].state != CUBLAS_STATUS_SUCCESS || results[i].workspaceSize > cuda->workspace.bytes || splits(&results[i].algo)) {
            continue;
        }
        p->algo = results[i].algo;
        st = prove_rows(&same, &runs, cuda, &call, &f);
        first = first < 0 && runs ? i : first;
    }
    proof_give_back(&f);
    p->plain = first < 0;
    p->fixed = !p->plain && !same;
    if (p->fixed) {
        p->algo = results[first].algo;
    }
    if (st.code == SPURION_OK && (p->fixed || p->plain)) { /* slow: `spuriond check` shows it beside the device's name */
        size_t used = strlen(cuda->dev.name);
        (void)snprintf(cuda->dev.name + used, sizeof cuda->dev.name - used, "; (%d, %d) %s", p->outputs, p->inner, p->plain ? "by plain loops" : "in fixed steps");
    }
    return st;
}

static spurion_status plan_make(spurion_cuda *cuda, spurion_cuda_plan *p, const spurion_matrix *m)
{
    int32_t transa = p->transposed ? CUBLAS_OP_T : CUBLAS_OP_N, epilogue = CUBLASLT_EPILOGUE_BIAS;
    SPURION_CUDA_BLAS(cuda, cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    SPURION_CUDA_BLAS(cuda, cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transa, sizeof transa));
    if (p->bias) {
        SPURION_CUDA_BLAS(cuda, cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
        SPURION_CUDA_BLAS(cuda, cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &m->bias, sizeof m->bias));
    }
    p->x_align = row_alignment((size_t)p->inner * spurion_dtype_bytes(p->dtype));
    p->out_align = row_alignment((size_t)p->outputs * sizeof(float));
    return choose_algorithm(cuda, p, m->w, p->bias ? m->bias : NULL);
}

static void plan_destroy(spurion_cuda_plan *p)
{
    if (p->desc != NULL) {
        (void)cublasLtMatmulDescDestroy(p->desc);
    }
    free(p);
}

void spurion_cuda_plans_destroy(spurion_cuda *cuda)
{
    while (cuda->plans != NULL) {
        spurion_cuda_plan *next = cuda->plans->next;
        plan_destroy(cuda->plans);
        cuda->plans = next;
    }
}

static spurion_status plan_get(spurion_cuda_plan **out, spurion_cuda *cuda, const spurion_matrix *m, bool forward)
{
    spurion_cuda_plan want = {};
    want.outputs = forward ? m->N : m->K;
    want.inner = forward ? m->K : m->N;
    want.dtype = m->type;
    want.transposed = forward;
    want.bias = forward && m->bias != NULL;
    for (spurion_cuda_plan *p = cuda->plans; p != NULL; p = p->next) {
        if (p->outputs == want.outputs && p->inner == want.inner && p->dtype == want.dtype && p->transposed == want.transposed && p->bias == want.bias) {
            *out = p;
            return spurion_ok();
        }
    }
    spurion_cuda_plan *p = (spurion_cuda_plan *)malloc(sizeof *p);
    if (p == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a matrix product");
    }
    *p = want;
    spurion_status st = plan_make(cuda, p, m);
    if (st.code != SPURION_OK) {
        plan_destroy(p);
        return st;
    }
    p->next = cuda->plans;
    cuda->plans = p;
    *out = p;
    return st;
}

/* --- matrices --- */

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

/* Weights serve both directions as they are; the bias has its place even where there is none. */
extern "C" size_t spurion_cuda_matrix_bytes(const spurion_dev *dev, int N, int K, int directions, spurion_dtype dtype)
{
    (void)dev;
    if (screened(directions, dtype)) {
        return weight_bytes(N, K, SPURION_BF16) + 2 * row_bytes(N) + weight_bytes(N, K, SPURION_F32);
    }
    return weight_bytes(N, K, dtype) + row_bytes(N);
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

static spurion_status matrix_fill(spurion_cuda *cuda, spurion_matrix *m, const float *w, const float *bias)
{
    size_t widest = (size_t)(m->N > m->K ? m->N : m->K), pad = SPURION_CUDA_ROW_STEP * widest;
    SPURION_CUDA_DO(spurion_cuda_alloc(&cuda->dev, &m->w, spurion_cuda_matrix_bytes(&cuda->dev, m->N, m->K, m->directions, m->dtype)));
    char *behind = (char *)m->w + weight_bytes(m->N, m->K, m->type);
    if (screened(m->directions, m->dtype)) {
        m->reach = (float *)(void *)(behind + row_bytes(m->N));
        m->rows = (float *)(void *)(behind + 2 * row_bytes(m->N));
    }
    SPURION_CUDA_DO(put_weights(cuda, m, w));
    if (m->rows != NULL) {
        SPURION_CUDA_DO(put_reach(cuda, m));
    }
    if (bias != NULL) {
        m->bias = (float *)(void *)behind;
        SPURION_CUDA_DO(spurion_cuda_send(cuda, m->bias, bias, (size_t)m->N * sizeof *bias));
    }
    SPURION_CUDA_DO(spurion_cuda_reserve(cuda, &cuda->pad_in, pad * spurion_dtype_bytes(m->type)));
    SPURION_CUDA_DO(spurion_cuda_reserve(cuda, &cuda->pad_out, pad * sizeof(float)));
    if (m->directions & (SPURION_FORWARD | SPURION_SELECT)) {
        SPURION_CUDA_DO(plan_get(&m->forward, cuda, m, true));
    }
    if (m->directions & SPURION_BACKWARD) {
        SPURION_CUDA_DO(plan_get(&m->backward, cuda, m, false));
    }
    return spurion_ok();
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

/* --- the ops --- */

static spurion_status run(spurion_dev *dev, float *out, int out_stride, const void *x, const spurion_matrix *m, bool forward, int T, spurion_write mode)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    product p = {forward ? m->forward : m->backward, m->w, forward ? m->bias : NULL, mode};
    double n = m->N, k = m->K, t = T;
    if (p.plan == NULL || m->rows != NULL) {
        return spurion_error(SPURION_INTERNAL, "matrix (%d, %d) was not made for this direction", m->N, m->K);
    }
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    SPURION_CUDA_DO(run_product(cuda, &p, out, (size_t)out_stride, x, T, false));
    return spurion_cuda_end(cuda, SPURION_CLASS_GEMM, 2 * t * n * k,
                            (double)spurion_dtype_bytes(m->dtype) * (n * k + t * p.plan->inner) + 4 * t * p.plan->outputs);
}

extern "C" spurion_status spurion_cuda_linear(spurion_dev *dev, float *out, int out_stride, const void *x, const spurion_matrix *w, int T, spurion_write mode)
{
    return run(dev, out, out_stride, x, w, true, T, mode);
}

extern "C" spurion_status spurion_cuda_linear_backward(spurion_dev *dev, float *dx, const void *dy, const spurion_matrix *w, int T, spurion_write mode)
{
    return run(dev, dx, w->K, dy, w, false, T, mode);
}

spurion_status spurion_cuda_product_padded(spurion_cuda *cuda, float *out, const void *x, const spurion_matrix *m, int T)
{
    product p = {m->forward, m->w, m->bias, SPURION_OVERWRITE};
    return run_product(cuda, &p, out, (size_t)m->N, x, T, true);
}

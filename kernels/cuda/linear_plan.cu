/* One algorithm of cuBLASLt for each kind of product, seen, on this device and with the first matrix of its shape, to give the same bits for a row
 * whatever M is: no split of K, no reduction scheme, and the proof. Every algorithm is proved when the matrix is made, none later.
 * Thread: engine. Memory: a plan until the device goes; the proof's buffers while it lasts. */
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/linear.cuh"

#if defined(SPURION_EMULATED)
enum { PROOF_ROWS = 256 };
#else
enum { PROOF_ROWS = 2048 };
#endif
enum { CANDIDATES = 16, TYPICAL_ROWS = 4096 };
#define PROOF_BYTES ((size_t)256 << 20)

/* The power of two that every row of `bytes` bytes begins at, at most 16. */
static size_t row_alignment(size_t bytes)
{
    size_t a = 16;
    while (bytes % a != 0) {
        a /= 2;
    }
    return a;
}

/* --- the proof --- */

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

static __global__ void differ_kernel(int *count, const uint16_t *a, const uint16_t *b, int64_t n)
{
    int64_t i = spurion_item();
    if (i < n && a[i] != b[i]) {
        (void)atomicAdd(count, 1);
    }
}

/* What the proof works on: rows of x (rows, inner), all and aux (rows, outputs); one and one_aux (ROW_STEP, outputs). */
typedef struct proof {
    char *x, *all, *one, *aux, *one_aux;
    int *differ;
    int rows;
} proof;

static size_t x_row(const spurion_cuda_plan *p)
{
    return (size_t)p->inner * spurion_dtype_bytes(p->dtype);
}

static size_t out_row(const spurion_cuda_plan *p)
{
    return (size_t)p->outputs * spurion_dtype_bytes(p->out);
}

/* Adds to f->differ where two runs of ROW_STEP rows differ. */
static spurion_status count_differences(spurion_cuda *cuda, const spurion_cuda_plan *p, const proof *f, const char *a, const char *b)
{
    int64_t n = (int64_t)(SPURION_CUDA_ROW_STEP * out_row(p) / sizeof(uint16_t));
    SPURION_CUDA(cuda, spurion_cuda_launch(cuda, differ_kernel, spurion_item_grid(n), SPURION_CUDA_THREADS, 0, f->differ,
                                           (const uint16_t *)(const void *)a, (const uint16_t *)(const void *)b, n));
    return spurion_ok();
}

/* Rows in the middle of M rows against the same rows alone. library_failed: this algorithm does not run here. */
static spurion_status prove_m(int *differ, bool *library_failed, spurion_cuda *cuda, const spurion_product *p, const proof *f, int M, int at)
{
    const spurion_cuda_plan *n = p->plan;
    size_t outputs = (size_t)n->outputs, there = (size_t)at * out_row(n);
    bool kept = n->behind == SPURION_BEHIND_GELU_KEPT;
    char *one_aux = kept ? f->one_aux : n->behind == SPURION_BEHIND_GELU_SLOPE ? f->aux + there : NULL;
    if (spurion_library_rows(cuda, p, f->all, outputs, f->x, f->aux, M) != CUBLAS_STATUS_SUCCESS ||
        spurion_library_rows(cuda, p, f->one, outputs, f->x + (size_t)at * x_row(n), one_aux, SPURION_CUDA_ROW_STEP) != CUBLAS_STATUS_SUCCESS) {
        *library_failed = true;
        return spurion_ok();
    }
    SPURION_CUDA(cuda, cudaMemsetAsync(f->differ, 0, sizeof(int), cuda->stream));
    SPURION_CUDA_DO(count_differences(cuda, n, f, f->all + there, f->one));
    if (kept) {
        SPURION_CUDA_DO(count_differences(cuda, n, f, f->aux + there, f->one_aux));
    }
    return spurion_cuda_download(&cuda->dev, differ, f->differ, sizeof(int));
}

/* Whether the plan's algorithm gives a row the same bits whatever M is: several M, several places. */
static spurion_status prove_rows(bool *same, bool *runs, spurion_cuda *cuda, const spurion_product *p, const proof *f)
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

static spurion_status fill(spurion_cuda *cuda, char *out, int64_t count, spurion_dtype dtype)
{
    SPURION_CUDA(cuda, spurion_cuda_launch(cuda, fill_kernel, spurion_item_grid(count), SPURION_CUDA_THREADS, 0, (void *)out, count, dtype));
    return spurion_ok();
}

static spurion_status proof_take(proof *f, spurion_cuda *cuda, const spurion_cuda_plan *p)
{
    size_t x_bytes = x_row(p), out_bytes = out_row(p);
    size_t rows = PROOF_BYTES / (x_bytes > out_bytes ? x_bytes : out_bytes);
    rows = rows > (size_t)PROOF_ROWS ? (size_t)PROOF_ROWS : rows / SPURION_CUDA_ROW_STEP * SPURION_CUDA_ROW_STEP;
    f->rows = rows < 2 * SPURION_CUDA_ROW_STEP ? 2 * SPURION_CUDA_ROW_STEP : (int)rows;
    SPURION_CUDA(cuda, cudaMalloc((void **)&f->x, (size_t)f->rows * x_bytes));
    SPURION_CUDA(cuda, cudaMalloc((void **)&f->all, (size_t)f->rows * out_bytes));
    SPURION_CUDA(cuda, cudaMalloc((void **)&f->one, SPURION_CUDA_ROW_STEP * out_bytes));
    SPURION_CUDA(cuda, cudaMalloc((void **)&f->differ, sizeof(int)));
    if (spurion_has_aux(p)) {
        SPURION_CUDA(cuda, cudaMalloc((void **)&f->aux, (size_t)f->rows * out_bytes));
        SPURION_CUDA(cuda, cudaMalloc((void **)&f->one_aux, SPURION_CUDA_ROW_STEP * out_bytes));
        SPURION_CUDA_DO(fill(cuda, f->aux, (int64_t)f->rows * p->outputs, p->out));
    }
    return fill(cuda, f->x, (int64_t)f->rows * p->inner, p->dtype);
}

static void proof_give_back(proof *f)
{
    void *all[] = {f->x, f->all, f->one, f->aux, f->one_aux, f->differ};
    for (void *p : all) {
        if (p != NULL) {
            (void)cudaFree(p);
        }
    }
}

/* Both are proved by now: what holds for one step of rows holds for all. */
spurion_status spurion_cuda_plans_agree(spurion_cuda_plan *bare, const spurion_cuda_plan *kept, spurion_cuda *cuda, const spurion_matrix *m)
{
    proof f = {};
    int differ = 1;
    spurion_product a = {bare, m->w, spurion_bias_of(m, bare), SPURION_OVERWRITE}, b = {kept, m->w, spurion_bias_of(m, kept), SPURION_OVERWRITE};
    size_t outputs = (size_t)bare->outputs;
    spurion_status st = proof_take(&f, cuda, kept);
    if (st.code == SPURION_OK && spurion_library_rows(cuda, &a, f.all, outputs, f.x, NULL, SPURION_CUDA_ROW_STEP) == CUBLAS_STATUS_SUCCESS &&
        spurion_library_rows(cuda, &b, f.one, outputs, f.x, f.one_aux, SPURION_CUDA_ROW_STEP) == CUBLAS_STATUS_SUCCESS &&
        cudaMemsetAsync(f.differ, 0, sizeof(int), cuda->stream) == cudaSuccess) {
        st = count_differences(cuda, bare, &f, f.all, f.one);
        st = st.code == SPURION_OK ? spurion_cuda_download(&cuda->dev, &differ, f.differ, sizeof(int)) : st;
    }
    proof_give_back(&f);
    bare->asked = true;
    bare->agrees = differ == 0;
    return st;
}

/* --- choosing an algorithm --- */

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
    spurion_layouts l = {NULL, NULL, NULL};
    cublasLtMatmulPreference_t preference = NULL;
    cublasStatus_t e = spurion_layouts_make(&l, p, TYPICAL_ROWS, (size_t)p->outputs);
    e = e == CUBLAS_STATUS_SUCCESS ? preference_make(&preference, cuda, p) : e;
    if (e == CUBLAS_STATUS_SUCCESS) {
        e = cublasLtMatmulAlgoGetHeuristic(cuda->blas, p->desc, l.a, l.b, l.d, l.d, preference, CANDIDATES, out, &found);
    }
    if (preference != NULL) {
        (void)cublasLtMatmulPreferenceDestroy(preference);
    }
    spurion_layouts_destroy(&l);
    return e == CUBLAS_STATUS_SUCCESS ? found : 0;
}

/* Slow, or more passes over memory: `spuriond check` and the log at start show it beside the device's name. */
static void tell(spurion_cuda *cuda, const spurion_cuda_plan *p)
{
    const char *what = p->behind != SPURION_BEHIND_NOTHING ? "GELU by a pass of its own" : p->plain ? "by plain loops" : "in fixed steps";
    size_t used = strlen(cuda->dev.name);
    (void)snprintf(cuda->dev.name + used, sizeof cuda->dev.name - used, "; (%d, %d) %s", p->outputs, p->inner, what);
}

/* Takes the first candidate that does not split and passes the proof; else, where nothing stands behind the product, the first that does not
 * split, at a fixed number of rows. */
static spurion_status choose_algorithm(spurion_cuda *cuda, spurion_cuda_plan *p, const spurion_matrix *m)
{
    cublasLtMatmulHeuristicResult_t results[CANDIDATES];
    spurion_product call = {p, m->w, spurion_bias_of(m, p), SPURION_OVERWRITE};
    proof f = {};
    int found = 0, first = -1;
    bool same = false, runs = false;
    spurion_status st = proof_take(&f, cuda, p);

    if (st.code == SPURION_OK && spurion_has_aux(p)) { /* the library looks at how it is aligned */
        (void)cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &f.aux, sizeof f.aux);
    }
    if (st.code == SPURION_OK && (!spurion_has_aux(p) || p->outputs % 8 == 0)) { /* rows of aux: whole runs of 16 bytes */
        found = candidates_of(results, cuda, p);
    }
    for (int i = 0; st.code == SPURION_OK && !same && i < found; i++) {
        if (results[i].state != CUBLAS_STATUS_SUCCESS || results[i].workspaceSize > cuda->workspace.bytes || splits(&results[i].algo)) {
            continue;
        }
        p->algo = results[i].algo;
        st = prove_rows(&same, &runs, cuda, &call, &f);
        first = first < 0 && runs ? i : first;
    }
    proof_give_back(&f);
    p->plain = first < 0 || (!same && p->behind != SPURION_BEHIND_NOTHING);
    p->fixed = !p->plain && !same;
    if (p->fixed) {
        p->algo = results[first].algo;
    }
    if (st.code == SPURION_OK && (p->fixed || p->plain)) {
        tell(cuda, p);
    }
    return st;
}

static cublasLtEpilogue_t epilogue_of(const spurion_cuda_plan *p)
{
    switch (p->behind) {
    case SPURION_BEHIND_GELU:
        return p->bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    case SPURION_BEHIND_GELU_KEPT:
        return p->bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    case SPURION_BEHIND_GELU_SLOPE:
        return CUBLASLT_EPILOGUE_DGELU;
    default:
        return p->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    }
}

static spurion_status plan_make(spurion_cuda *cuda, spurion_cuda_plan *p, const spurion_matrix *m)
{
    int32_t transa = p->transposed ? CUBLAS_OP_T : CUBLAS_OP_N, epilogue = epilogue_of(p);
    const int64_t aux_ld = p->outputs;
    const void *bias = spurion_bias_of(m, p);
    SPURION_CUDA_BLAS(cuda, cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    SPURION_CUDA_BLAS(cuda, cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transa, sizeof transa));
    SPURION_CUDA_BLAS(cuda, cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    if (p->bias) {
        SPURION_CUDA_BLAS(cuda, cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    }
    if (spurion_has_aux(p)) {
        SPURION_CUDA_BLAS(cuda, cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_ld, sizeof aux_ld));
    }
    p->x_align = row_alignment(x_row(p));
    p->out_align = row_alignment(out_row(p));
    return choose_algorithm(cuda, p, m);
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

static bool same_kind(const spurion_cuda_plan *a, const spurion_cuda_plan *b)
{
    return a->outputs == b->outputs && a->inner == b->inner && a->dtype == b->dtype && a->out == b->out && a->transposed == b->transposed &&
           a->bias == b->bias && a->behind == b->behind;
}

spurion_status spurion_cuda_plan_get(spurion_cuda_plan **out, spurion_cuda *cuda, const spurion_matrix *m, bool forward, spurion_dtype type,
                                     spurion_behind behind)
{
    spurion_cuda_plan want = {};
    want.outputs = forward ? m->N : m->K;
    want.inner = forward ? m->K : m->N;
    want.dtype = m->type;
    want.out = type;
    want.behind = behind;
    want.transposed = forward;
    want.bias = forward && m->bias != NULL;
    for (spurion_cuda_plan *p = cuda->plans; p != NULL; p = p->next) {
        if (same_kind(p, &want)) {
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

/* See cublasLt.h of this folder. */
#include "cublasLt.h"
#include "ptx_emulated.h"

#include <vector>

struct emulated_blas { int unused; };
struct emulated_desc { int32_t transa, transb, epilogue; const float *bias; };
struct emulated_layout { cudaDataType_t type; uint64_t rows, columns; int64_t ld; };
struct emulated_preference { uint32_t alignment[4]; };

cublasStatus_t cublasLtCreate(cublasLtHandle_t *out)
{
    *out = new emulated_blas();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t h)
{
    delete h;
    return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion()
{
    return 0;
}

const char *cublasLtGetStatusName(cublasStatus_t s)
{
    return s == CUBLAS_STATUS_NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED" : "CUBLAS_STATUS_INVALID_VALUE";
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out, cublasComputeType_t, cudaDataType_t)
{
    *out = new emulated_desc{CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d)
{
    delete d;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t attr, const void *value, size_t bytes)
{
    void *to = attr == CUBLASLT_MATMUL_DESC_TRANSA ? (void *)&d->transa : attr == CUBLASLT_MATMUL_DESC_TRANSB ? (void *)&d->transb
               : attr == CUBLASLT_MATMUL_DESC_EPILOGUE ? (void *)&d->epilogue : (void *)&d->bias;
    if (bytes != (attr == CUBLASLT_MATMUL_DESC_BIAS_POINTER ? sizeof(void *) : sizeof(int32_t))) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    memcpy(to, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType_t type, uint64_t rows, uint64_t columns, int64_t ld)
{
    *out = nullptr;
    if (ld < (int64_t)rows) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    *out = new emulated_layout{type, rows, columns, ld};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l)
{
    delete l;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out)
{
    *out = new emulated_preference{{256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p)
{
    delete p;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t attr, const void *value,
                                                    size_t bytes)
{
    if (attr >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES) {
        if (bytes != sizeof(uint32_t)) {
            return CUBLAS_STATUS_INVALID_VALUE;
        }
        memcpy(&p->alignment[attr - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, bytes);
    }
    return CUBLAS_STATUS_SUCCESS;
}

/* Two candidates: the first splits K, so that the caller's own check is seen to work. Both remember the alignments asked for.
 * Odd bf16 rows get none: the caller has a kernel of its own for them. */
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t p, int wanted,
                                              cublasLtMatmulHeuristicResult_t *results, int *found)
{
    *found = 0;
    if (wanted < 2 || (a->type == CUDA_R_16BF && a->ld % 2 != 0)) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    for (int i = 0; i < 2; i++) {
        memset(&results[i], 0, sizeof results[i]);
        results[i].algo.data[0] = i == 0 ? 4 : 1;
        for (int k = 0; k < 4; k++) {
            results[i].algo.data[1 + k] = p->alignment[k];
        }
    }
    *found = 2;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t *algo, cublasLtMatmulAlgoConfigAttributes_t attr, void *value,
                                                    size_t bytes, size_t *written)
{
    uint32_t v = attr == CUBLASLT_ALGO_CONFIG_SPLITK_NUM ? (uint32_t)algo->data[0] : 0;
    if (bytes != sizeof v) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    memcpy(value, &v, sizeof v);
    *written = sizeof v;
    return CUBLAS_STATUS_SUCCESS;
}

static float element(const void *base, const emulated_layout &l, uint64_t row, uint64_t column)
{
    size_t at = (size_t)row + (size_t)column * (size_t)l.ld;
    return l.type == CUDA_R_32F ? ((const float *)base)[at] : emulated_from_bf16(((const uint16_t *)base)[at]);
}

/* Rows of op(m) as floats, contiguous along k: (count, inner). */
static std::vector<float> unfold(const void *base, const emulated_layout &l, uint64_t count, uint64_t inner, bool inner_is_row)
{
    std::vector<float> out(count * inner);
    for (uint64_t i = 0; i < count; i++) {
        for (uint64_t k = 0; k < inner; k++) {
            out[i * inner + k] = inner_is_row ? element(base, l, k, i) : element(base, l, i, k);
        }
    }
    return out;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void *alpha, const void *a, cublasLtMatrixLayout_t la,
                              const void *b, cublasLtMatrixLayout_t lb, const void *beta, const void *c, cublasLtMatrixLayout_t lc, void *out,
                              cublasLtMatrixLayout_t lout, const cublasLtMatmulAlgo_t *algo, void *, size_t, cudaStream_t s)
{
    emulated_desc desc = *d;
    emulated_layout A = *la, B = *lb, D = *lout;
    float al = *(const float *)alpha, be = *(const float *)beta;
    uint64_t M = D.rows, N = D.columns, K = desc.transa == CUBLAS_OP_T ? A.rows : A.columns;
    const void *pointers[4] = {a, b, c, out};

    for (int i = 0; i < 4; i++) {
        if (algo->data[1 + i] == 0 || (uintptr_t)pointers[i] % algo->data[1 + i] != 0) {
            return CUBLAS_STATUS_NOT_SUPPORTED;
        }
    }
    if ((desc.transa == CUBLAS_OP_T ? A.columns : A.rows) != M || B.rows != K || B.columns != N || desc.transb != CUBLAS_OP_N ||
        A.type != B.type || D.type != CUDA_R_32F || lc->ld != D.ld || algo->data[0] != 1) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    cudaError_t e = emulated_enqueue(s, [=] {
        std::vector<float> rows = unfold(a, A, M, K, desc.transa == CUBLAS_OP_T), columns = unfold(b, B, N, K, true);
        for (uint64_t n = 0; n < N; n++) {
            for (uint64_t m = 0; m < M; m++) {
                double sum = 0;
                const float *x = &rows[m * K], *y = &columns[n * K];
                for (uint64_t k = 0; k < K; k++) {
                    sum += (double)x[k] * y[k];
                }
                size_t at = (size_t)m + (size_t)n * (size_t)D.ld;
                float v = al * (float)sum + (be != 0 ? be * ((const float *)c)[at] : 0.0f);
                ((float *)out)[at] = v + (desc.epilogue == CUBLASLT_EPILOGUE_BIAS ? desc.bias[m] : 0.0f);
            }
        }
    });
    return e == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

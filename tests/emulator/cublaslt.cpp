/* See cublasLt.h of this folder. */
#include "cublasLt.h"
#include "ptx_emulated.h"

#include <cmath>
#include <cstdlib>
#include <vector>

struct emulated_blas { int unused; };
struct emulated_desc { int32_t transa, transb, epilogue; const void *bias; void *aux; int64_t aux_ld; };
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
    *out = new emulated_desc{CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr, nullptr, 0};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d)
{
    delete d;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t attr, const void *value, size_t bytes)
{
    const struct {
        cublasLtMatmulDescAttributes_t name;
        void *to;
        size_t bytes;
    } all[] = {{CUBLASLT_MATMUL_DESC_TRANSA, &d->transa, sizeof d->transa},
               {CUBLASLT_MATMUL_DESC_TRANSB, &d->transb, sizeof d->transb},
               {CUBLASLT_MATMUL_DESC_EPILOGUE, &d->epilogue, sizeof d->epilogue},
               {CUBLASLT_MATMUL_DESC_BIAS_POINTER, &d->bias, sizeof d->bias},
               {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &d->aux, sizeof d->aux},
               {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &d->aux_ld, sizeof d->aux_ld}};
    for (const auto &one : all) {
        if (one.name == attr && one.bytes == bytes) {
            memcpy(one.to, value, bytes);
            return CUBLAS_STATUS_SUCCESS;
        }
    }
    return CUBLAS_STATUS_INVALID_VALUE;
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

/* Whether an epilogue has an auxiliary matrix, and that is as the library's documents want it. */
static bool aux_fits(const emulated_desc &d, const emulated_layout &out)
{
    return (d.epilogue & 128) == 0 || (d.aux != nullptr && (uintptr_t)d.aux % 16 == 0 && d.aux_ld % 8 == 0 && d.aux_ld >= (int64_t)out.rows);
}

/* The library has epilogues for some types and shapes only; SPURION_EMULATOR_EPILOGUES=0: no GELU at all; 1: none that keeps nothing;
 * 2: all, but the one that keeps nothing gives other bits. */
static int epilogues()
{
    const char *text = getenv("SPURION_EMULATOR_EPILOGUES");
    return text == nullptr ? 3 : atoi(text);
}

static bool has_epilogue(const emulated_desc &d, const emulated_layout &out)
{
    if ((d.epilogue & (32 | 64)) == 0) {
        return true;
    }
    return out.type == CUDA_R_16BF && aux_fits(d, out) && epilogues() >= ((d.epilogue & 128) ? 1 : 2);
}

/* Two candidates: the first splits K, so that the caller's own check is seen to work. Both remember the alignments asked for.
 * Odd bf16 rows get none: the caller has a kernel of its own for them. */
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t out, cublasLtMatmulPreference_t p, int wanted,
                                              cublasLtMatmulHeuristicResult_t *results, int *found)
{
    *found = 0;
    if (wanted < 2 || (a->type == CUDA_R_16BF && a->ld % 2 != 0) || !has_epilogue(*d, *out)) {
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

static void put(void *base, const emulated_layout &l, uint64_t row, uint64_t column, float v)
{
    size_t at = (size_t)row + (size_t)column * (size_t)l.ld;
    if (l.type == CUDA_R_32F) {
        ((float *)base)[at] = v;
    } else {
        ((uint16_t *)base)[at] = ptx_bf16(v);
    }
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

/* y (1 + tanh u) / 2 and its derivative, in double. */
static double gelu(double x)
{
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

static double gelu_slope(double x)
{
    double t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x);
}

/* What the epilogue makes of the product v at row m, column n of D; bias and aux have D's type. */
static float behind(const emulated_desc &d, const emulated_layout &D, float v, uint64_t m, uint64_t n)
{
    const emulated_layout aux = {D.type, D.rows, D.columns, d.aux_ld}, bias = {D.type, D.rows, 1, (int64_t)D.rows};
    if (d.epilogue & 4) {
        v += element(d.bias, bias, m, 0);
    }
    if (d.epilogue & 64) {
        return (float)(v * gelu_slope(element(d.aux, aux, m, n)));
    }
    if ((d.epilogue & 32) == 0) {
        return v;
    }
    if (d.epilogue & 128) {
        put(d.aux, aux, m, n, v);
    } else if (epilogues() == 2) {
        v *= 1.01f;
    }
    return (float)gelu(v);
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
        A.type != B.type || (D.type != CUDA_R_32F && D.type != A.type) || lc->type != D.type || lc->ld != D.ld || algo->data[0] != 1 ||
        !has_epilogue(desc, D)) {
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
                float v = al * (float)sum + (be != 0 ? be * element(c, D, m, n) : 0.0f);
                put(out, D, m, n, behind(desc, D, v, m, n));
            }
        }
    });
    return e == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

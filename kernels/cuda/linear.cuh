/* What the files of matrix products share: plans (linear_plan.cu chooses their algorithms), matrices (matrix.cu), calls (linear.cu). */
#ifndef SPURION_CUDA_LINEAR_CUH
#define SPURION_CUDA_LINEAR_CUH

#include "kernels/cuda/rows.cuh"

/* What the library does to a product before it writes it. Its GELU is the tanh one; its auxiliary matrix has the type of the outputs. */
typedef enum spurion_behind {
    SPURION_BEHIND_NOTHING,
    SPURION_BEHIND_GELU,
    SPURION_BEHIND_GELU_KEPT, /* the same, its input to aux */
    SPURION_BEHIND_GELU_SLOPE /* times the derivative at aux */
} spurion_behind;

typedef struct spurion_cuda_plan {
    struct spurion_cuda_plan *next;
    int outputs, inner;
    spurion_dtype dtype, out; /* of weights and inputs; of outputs, bias and aux */
    bool transposed, bias;
    spurion_behind behind;
    bool plain, fixed;         /* plain: our own loops; fixed: ROW_STEP rows a call. With something behind: plain means that there is no such plan */
    bool asked, agrees;        /* SPURION_BEHIND_GELU: whether it gives the same bits as SPURION_BEHIND_GELU_KEPT */
    size_t x_align, out_align; /* bytes that the algorithm counts on */
    cublasLtMatmulDesc_t desc;
    cublasLtMatmulAlgo_t algo;
} spurion_cuda_plan;

/* One call on a matrix. bias, aux: of the plan's output type, or NULL. */
typedef struct spurion_product {
    const spurion_cuda_plan *plan;
    const void *w, *bias;
    spurion_write mode;
} spurion_product;

static inline bool spurion_has_aux(const spurion_cuda_plan *p)
{
    return p->behind == SPURION_BEHIND_GELU_KEPT || p->behind == SPURION_BEHIND_GELU_SLOPE;
}

static inline cudaDataType_t spurion_library_type(spurion_dtype t)
{
    return t == SPURION_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

typedef struct spurion_layouts {
    cublasLtMatrixLayout_t a, b, d;
} spurion_layouts;

/* linear.cu */
cublasStatus_t spurion_layouts_make(spurion_layouts *l, const spurion_cuda_plan *p, int rows, size_t out_stride);
void spurion_layouts_destroy(spurion_layouts *l);
/* out (rows, outputs) = ...: rows a multiple of ROW_STEP, pointers aligned as the plan says. aux (rows, outputs) or NULL. */
cublasStatus_t spurion_library_rows(spurion_cuda *cuda, const spurion_product *p, void *out, size_t out_stride, const void *x, void *aux, int rows);

/* linear_plan.cu: the plan of a matrix's products, chosen at first use and kept until the device goes. */
spurion_status spurion_cuda_plan_get(spurion_cuda_plan **out, spurion_cuda *cuda, const spurion_matrix *m, bool forward, spurion_dtype type,
                                     spurion_behind behind);
/* Sets bare->agrees: whether rows of both plans (GELU, GELU_KEPT) on this matrix are the same bits. */
spurion_status spurion_cuda_plans_agree(spurion_cuda_plan *bare, const spurion_cuda_plan *kept, spurion_cuda *cuda, const spurion_matrix *m);

static inline const void *spurion_bias_of(const spurion_matrix *m, const spurion_cuda_plan *p)
{
    return !p->bias ? NULL : p->out == SPURION_BF16 ? (const void *)m->bias_act : (const void *)m->bias;
}

#endif

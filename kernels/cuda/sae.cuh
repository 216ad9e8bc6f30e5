/* Between sae_encode.cu (input, products) and sae_select.cu (what of them is listed). Thread: engine. Memory: none. */
#ifndef SPURION_CUDA_SAE_CUH
#define SPURION_CUDA_SAE_CUH

#include "kernels/cuda/scan.cuh"

/* What selection looks at: rows 0 .. rows - 1 of a chunk.
 *
 * Where `weight` is set the products came from bf16: they are looked at through a bound on their error, and what the bound cannot exclude is
 * computed exactly from x and weight. With u the input, w a row of the encoder, u' and w' both rounded to bf16:
 *   |u'.w' - u.w| <= |u'| |w' - w| + |u' - u| |w|      (Cauchy-Schwarz)
 * plus the rounding of both sums; spread (of the row) times reach (of the feature) is no less (sae_encode.cu, linear.cu). The exact value is
 * always <u, w> in one order, however a feature was found, so that the result is that of a product in f32. */
typedef struct spurion_select {
    float *pre; /* (rows, F) products, bias included; overwritten where a kind looks at them again */
    const float *bias, *threshold, *scale, *gate_bias, *mag_scale, *mag_bias; /* (F) */
    const float *weight, *reach;           /* (F, d), (F), or NULL */
    const float *x;                        /* (T, d): u = (x - shift) * factor */
    const float *shift, *factor, *spread;  /* (rows) */
    const int32_t *source;                 /* (rows): row of x for each; NULL: the same */
    const float *settled;                  /* (rows): a row in which k features exceed this lists nothing; or NULL */
    int32_t *count, *index;                /* (rows), (rows, slots) */
    float *value;
    const int32_t *member; /* what index a feature is listed under; NULL: its own */
    int d, F, k, slots;
    spurion_sae_kind kind;
    bool whole; /* rows of x and weight can be moved as vectors of four */
    bool whole_pre;
} spurion_select;

/* Enqueues the selection of `rows` rows. */
spurion_status spurion_cuda_select(spurion_cuda *cuda, const spurion_select *a, int rows);

#endif

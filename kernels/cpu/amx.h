/* bf16 products on AMX tiles (Sapphire Rapids and later), for the whole process once enabled. Elsewhere enable says no; the part for attention has
 * a twin for processors with AVX512-BF16 alone.
 * An output is one chain of dot products over k = 0, 2, 4, ... in f32 (TDPBF16PS), whatever rows and columns stand beside it.
 * Thread: enable before workers start; the rest in any worker, between begin and end. */
#ifndef SPURION_CPU_AMX_H
#define SPURION_CPU_AMX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    SPURION_AMX_ROWS = 16,    /* of a tile */
    SPURION_AMX_COLUMNS = 32, /* outputs of one packed panel: two tiles */
    SPURION_AMX_STEP = 32     /* k of one tile */
};

/* Asks the kernel for tile state; true when this CPU multiplies bf16 on tiles. */
bool spurion_amx_enable(void);

/* Sets this thread's tiles up, and gives them back (so that a context switch does not carry them). */
void spurion_amx_begin(void);
void spurion_amx_end(void);

/* Packed weights: panels of SPURION_AMX_COLUMNS outputs, each with its k in pairs, zero padded. */
size_t spurion_amx_packed_bytes(int outputs, int inner);
/* One panel from dense bf16 rows (outputs <= SPURION_AMX_COLUMNS, inner). */
void spurion_amx_pack(uint16_t *panel, const uint16_t *dense, int outputs, int inner);

/* out (rows, outputs) f32 (+)= a (rows, inner) . weights + bias; bias NULL for none.
 * a: bf16 rows of a_stride elements, readable up to a multiple of SPURION_AMX_ROWS rows and SPURION_AMX_STEP columns; what is read
 * past inner must be finite. weights: packed panels, the first output's panel first. */
void spurion_amx_product(float *out, size_t out_stride, const uint16_t *a, size_t a_stride, const uint16_t *weights, const float *bias, int rows,
                         int outputs, int inner, bool accumulate);

/* --- on tiles in cache, for attention ---  sizes: rows multiples of 16, all else of 32 */

/* c (rows, columns) f32 = [c +] a (rows, inner) . b; b packed by one of the two below. */
void spurion_amx_multiply(float *c, size_t c_stride, const uint16_t *a, size_t a_stride, const uint16_t *b, int rows, int columns, int inner,
                          bool accumulate);
/* The same by VDPBF16PS, without tiles. */
void spurion_avx512_multiply(float *c, size_t c_stride, const uint16_t *a, size_t a_stride, const uint16_t *b, int rows, int columns, int inner,
                             bool accumulate);
/* b[k, n] = x[n, k]: x (columns, inner). */
void spurion_amx_pack_rows(uint16_t *b, const uint16_t *x, size_t stride, int columns, int inner);
/* b[k, n] = x[k, n]: x (inner, columns). */
void spurion_amx_pack_pairs(uint16_t *b, const uint16_t *x, size_t stride, int inner, int columns);
/* out (16, 16) words of 32 bits = x (16, 16) turned; strides in words. */
void spurion_amx_turn_words(float *out, size_t out_stride, const float *x, size_t stride);
/* out (columns, rows) = x (rows, columns) turned. */
void spurion_amx_transpose(uint16_t *out, size_t out_stride, const uint16_t *x, size_t stride, int rows, int columns);

#endif

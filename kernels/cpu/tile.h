/* Small dense products on tiles in cache, for attention. For op files.
 * Every element of C is one chain of multiply-adds over k = 0 .. K - 1: it does not depend on its place in the tile. */
#ifndef SPURION_CPU_TILE_H
#define SPURION_CPU_TILE_H

#include "kernels/cpu/simd.h"

#if VW == 16
#define TILE_VECTORS 4 /* columns of a micro tile, in vectors: as many accumulators as the registers hold */
#else
#define TILE_VECTORS 2
#endif
#define TILE_HEIGHT 4

/* C (height, vectors * VW) = [C +] A B. height and vectors are constants after inlining. */
SIMD void tile_micro(float *c, int ldc, const float *a, int a_row, int a_column, const float *b, int ldb, int K, int accumulate, int height,
                     int vectors)
{
    vf acc[TILE_HEIGHT][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < height; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            acc[r][v] = accumulate ? v_load(c + r * ldc + v * VW) : v_set(0.0f);
        }
    }
    for (int k = 0; k < K; k++) {
        vf line[TILE_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            line[v] = v_load(b + k * ldb + v * VW);
        }
#pragma GCC unroll 8
        for (int r = 0; r < height; r++) {
            vf x = v_set(a[r * a_row + k * a_column]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) {
                acc[r][v] = v_fma(x, line[v], acc[r][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < height; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            v_store(c + r * ldc + v * VW, acc[r][v]);
        }
    }
}

/* C (M, N) = [C +] A B with A[m, k] at a[m * a_row + k * a_column], B (K, N) row-major; N a multiple of VW. */
static inline void tile_product(float *c, int ldc, const float *a, int a_row, int a_column, const float *b, int ldb, int M, int N, int K,
                                int accumulate)
{
    int n = 0;
    for (; n + TILE_VECTORS * VW <= N; n += TILE_VECTORS * VW) {
        int m = 0;
        for (; m + TILE_HEIGHT <= M; m += TILE_HEIGHT) {
            tile_micro(c + m * ldc + n, ldc, a + m * a_row, a_row, a_column, b + n, ldb, K, accumulate, TILE_HEIGHT, TILE_VECTORS);
        }
        for (; m < M; m++) {
            tile_micro(c + m * ldc + n, ldc, a + m * a_row, a_row, a_column, b + n, ldb, K, accumulate, 1, TILE_VECTORS);
        }
    }
    for (; n < N; n += VW) {
        int m = 0;
        for (; m + TILE_HEIGHT <= M; m += TILE_HEIGHT) {
            tile_micro(c + m * ldc + n, ldc, a + m * a_row, a_row, a_column, b + n, ldb, K, accumulate, TILE_HEIGHT, 1);
        }
        for (; m < M; m++) {
            tile_micro(c + m * ldc + n, ldc, a + m * a_row, a_row, a_column, b + n, ldb, K, accumulate, 1, 1);
        }
    }
}

#endif

/* bf16 products on AMX tiles: 32 rows by 32 columns at a time in four accumulator tiles. See amx.h. Memory: none. */
#include "kernels/cpu/amx.h"

#include <string.h>

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels/cpu/cpu.h"

#define REQUEST_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18              /* XFEATURE_XTILEDATA */
#define TILE_WORDS 512            /* 16-bit words of a tile */
#define BARRIER() __asm__ volatile("" ::: "memory") /* gcc's tile loads do not say that they read memory */
#define BLOCK_COLUMNS 512         /* outputs gathered before they are written, whole lines at a time */
#define BLOCK_STRIDE (BLOCK_COLUMNS + 16)

bool spurion_amx_enable(void)
{
    unsigned a = 7, b, c = 0, d, a1 = 7, b1, c1 = 1, d1;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    __asm__("cpuid" : "+a"(a1), "=b"(b1), "+c"(c1), "=d"(d1));
    if ((d >> 22 & 1) == 0 || (d >> 24 & 1) == 0 || (a1 >> 5 & 1) == 0) { /* AMX-BF16, AMX-TILE, AVX512-BF16 */
        return false;
    }
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

void spurion_amx_begin(void)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t column_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.column_bytes[i] = 64;
        config.rows[i] = 16;
    }
    __asm__ volatile("" ::"r"(&config) : "memory"); /* gcc's intrinsic names 8 bytes of the operand: keep the stores before it */
    _tile_loadconfig(&config);
}

void spurion_amx_end(void)
{
    _tile_release();
}

static size_t steps_of(int inner)
{
    return ((size_t)inner + SPURION_AMX_STEP - 1) / SPURION_AMX_STEP;
}

size_t spurion_amx_packed_bytes(int outputs, int inner)
{
    size_t panels = ((size_t)outputs + SPURION_AMX_COLUMNS - 1) / SPURION_AMX_COLUMNS;
    return panels * steps_of(inner) * 2 * TILE_WORDS * sizeof(uint16_t);
}

void spurion_amx_pack(uint16_t *panel, const uint16_t *dense, int outputs, int inner)
{
    memset(panel, 0, spurion_amx_packed_bytes(SPURION_AMX_COLUMNS, inner));
    for (int n = 0; n < outputs; n++) {
        uint16_t *column = panel + n / 16 * TILE_WORDS + n % 16 * 2;
        for (int k = 0; k < inner; k++) {
            column[(size_t)(k / 32) * 2 * TILE_WORDS + (size_t)(k % 32 / 2 * 32 + k % 2)] = dense[(size_t)n * (size_t)inner + (size_t)k];
        }
    }
}

/* Asks for the lines that a block will be written to while it is computed: four of its 64 in each step. A miss on a store to memory
 * costs more than the block's arithmetic. */
static inline void prefetch_output(const float *out, size_t stride, size_t step)
{
    if (step < 16) {
        const float *row = out + 2 * step * stride;
        __builtin_prefetch(row, 1, 3);
        __builtin_prefetch(row + 16, 1, 3);
        __builtin_prefetch(row + stride, 1, 3);
        __builtin_prefetch(row + stride + 16, 1, 3);
    }
}

/* Four (or, for at most 16 rows, two) accumulators over all of k, into c (32, 32). Tiles: 0-3 C, 4-5 A, 6-7 B.
 * goal: where the 32 rows end up, or NULL. */
static inline __attribute__((always_inline)) void panel_block(float *c, size_t c_stride, const uint16_t *a, size_t a_stride, const uint16_t *b,
                                                              size_t steps, bool both, const float *goal, size_t goal_stride)
{
    size_t row = a_stride * sizeof *a;
    const uint16_t *low = a + 16 * a_stride;
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
        _tile_zero(2);
        _tile_zero(3);
        for (size_t k = 0; k < steps; k++) {
            _tile_loadd(6, b, 64);
            _tile_loadd(7, b + TILE_WORDS, 64);
            _tile_loadd(4, a, row);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, low, row);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            if (goal != NULL) {
                prefetch_output(goal, goal_stride, k);
            }
            a += SPURION_AMX_STEP;
            low += SPURION_AMX_STEP;
            b += 2 * TILE_WORDS;
        }
        _tile_stored(2, c + 16 * c_stride, c_stride * 4);
        _tile_stored(3, c + 16 * c_stride + 16, c_stride * 4);
    } else {
        for (size_t k = 0; k < steps; k++) {
            _tile_loadd(6, b, 64);
            _tile_loadd(7, b + TILE_WORDS, 64);
            _tile_loadd(4, a, row);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            a += SPURION_AMX_STEP;
            b += 2 * TILE_WORDS;
        }
    }
    _tile_stored(0, c, c_stride * 4);
    _tile_stored(1, c + 16, c_stride * 4);
}

static inline void write_row(float *out, const float *c, const float *bias, int columns, bool accumulate)
{
    for (int n = 0; n < columns; n += 16) {
        __mmask16 mask = columns - n >= 16 ? 0xffff : (__mmask16)((1u << (columns - n)) - 1);
        __m512 v = _mm512_load_ps(c + n);
        if (bias != NULL) {
            v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, bias + n));
        }
        if (accumulate) {
            v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, out + n));
        }
        _mm512_mask_storeu_ps(out + n, mask, v);
    }
}

/* Whole blocks that nothing is added to go from the tiles to their place. */
static void product_direct(float *out, size_t out_stride, const uint16_t *a, size_t a_stride, const uint16_t *weights, int rows, int outputs,
                           size_t steps)
{
    for (int m = 0; m < rows; m += 32) {
        for (int n = 0; n < outputs; n += SPURION_AMX_COLUMNS) {
            float *c = out + (size_t)m * out_stride + n;
            panel_block(c, out_stride, a + (size_t)m * a_stride, a_stride,
                        weights + (size_t)(n / SPURION_AMX_COLUMNS) * steps * 2 * TILE_WORDS, steps, true, c, out_stride);
        }
    }
}

/* At most BLOCK_COLUMNS outputs. Rows outside: 32 rows of input stay in the first-level cache, the weights in the second. */
static void product_columns(float *out, size_t out_stride, const uint16_t *a, size_t a_stride, const uint16_t *weights, const float *bias,
                            int rows, int outputs, size_t steps, bool accumulate)
{
    _Alignas(64) float c[32 * BLOCK_STRIDE];
    for (int m = 0; m < rows; m += 32) {
        int left = rows - m;
        for (int n = 0; n < outputs; n += SPURION_AMX_COLUMNS) {
            panel_block(c + n, BLOCK_STRIDE, a + (size_t)m * a_stride, a_stride,
                        weights + (size_t)(n / SPURION_AMX_COLUMNS) * steps * 2 * TILE_WORDS, steps, left > 16,
                        left >= 32 ? out + (size_t)m * out_stride + n : NULL, out_stride);
        }
        BARRIER();
        for (int r = 0; r < left && r < 32; r++) {
            write_row(out + (size_t)(m + r) * out_stride, c + r * BLOCK_STRIDE, bias, outputs, accumulate);
        }
    }
}

void spurion_amx_product(float *out, size_t out_stride, const uint16_t *a, size_t a_stride, const uint16_t *weights, const float *bias, int rows,
                         int outputs, int inner, bool accumulate)
{
    size_t steps = steps_of(inner), panel = steps * 2 * TILE_WORDS;
    BARRIER();
    if (bias == NULL && !accumulate && rows % 32 == 0 && outputs % SPURION_AMX_COLUMNS == 0) {
        product_direct(out, out_stride, a, a_stride, weights, rows, outputs, steps);
        return;
    }
    for (int n = 0; n < outputs; n += BLOCK_COLUMNS) {
        int columns = outputs - n < BLOCK_COLUMNS ? outputs - n : BLOCK_COLUMNS;
        product_columns(out + n, out_stride, a, a_stride, weights + (size_t)(n / SPURION_AMX_COLUMNS) * panel, bias == NULL ? NULL : bias + n,
                        rows, columns, steps, accumulate);
    }
}

/* --- on tiles in cache --- */

/* panel_block that begins with what c holds. */
static inline void add_block(float *c, size_t c_stride, const uint16_t *a, size_t a_stride, const uint16_t *b, size_t steps, bool both)
{
    size_t row = a_stride * sizeof *a;
    _tile_loadd(0, c, c_stride * 4);
    _tile_loadd(1, c + 16, c_stride * 4);
    if (both) {
        _tile_loadd(2, c + 16 * c_stride, c_stride * 4);
        _tile_loadd(3, c + 16 * c_stride + 16, c_stride * 4);
    }
    for (size_t k = 0; k < steps; k++) {
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + TILE_WORDS, 64);
        _tile_loadd(4, a, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, a + 16 * a_stride, row);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        a += SPURION_AMX_STEP;
        b += 2 * TILE_WORDS;
    }
    _tile_stored(0, c, c_stride * 4);
    _tile_stored(1, c + 16, c_stride * 4);
    if (both) {
        _tile_stored(2, c + 16 * c_stride, c_stride * 4);
        _tile_stored(3, c + 16 * c_stride + 16, c_stride * 4);
    }
}

void spurion_amx_multiply(float *c, size_t c_stride, const uint16_t *a, size_t a_stride, const uint16_t *b, int rows, int columns, int inner,
                          bool accumulate)
{
    size_t steps = steps_of(inner);
    BARRIER();
    for (int n = 0; n < columns; n += SPURION_AMX_COLUMNS) {
        const uint16_t *panel = b + (size_t)(n / SPURION_AMX_COLUMNS) * steps * 2 * TILE_WORDS;
        for (int m = 0; m < rows; m += 32) {
            float *at = c + (size_t)m * c_stride + n;
            const uint16_t *from = a + (size_t)m * a_stride;
            if (accumulate) {
                add_block(at, c_stride, from, a_stride, panel, steps, rows - m > 16);
            } else {
                panel_block(at, c_stride, from, a_stride, panel, steps, rows - m > 16, NULL, 0);
            }
        }
    }
}

/* c (8, 32) [+]= a (8, inner) . one packed panel: two accumulators a row. */
static inline __attribute__((always_inline)) void pairs_block(float *c, size_t c_stride, const uint16_t *a, size_t a_stride, const uint16_t *b,
                                                              size_t steps, bool accumulate)
{
    __m512 sum[8][2];
    for (int m = 0; m < 8; m++) {
        sum[m][0] = accumulate ? _mm512_loadu_ps(c + (size_t)m * c_stride) : _mm512_setzero_ps();
        sum[m][1] = accumulate ? _mm512_loadu_ps(c + (size_t)m * c_stride + 16) : _mm512_setzero_ps();
    }
    for (size_t k = 0; k < steps * 16; k++) {
        const uint16_t *row = b + k / 16 * 2 * TILE_WORDS + k % 16 * 32;
        __m512bh low = (__m512bh)_mm512_loadu_si512(row), high = (__m512bh)_mm512_loadu_si512(row + TILE_WORDS);
        for (int m = 0; m < 8; m++) {
            int pair;
            memcpy(&pair, a + (size_t)m * a_stride + 2 * k, sizeof pair);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sum[m][0] = _mm512_dpbf16_ps(sum[m][0], both, low);
            sum[m][1] = _mm512_dpbf16_ps(sum[m][1], both, high);
        }
    }
    for (int m = 0; m < 8; m++) {
        _mm512_storeu_ps(c + (size_t)m * c_stride, sum[m][0]);
        _mm512_storeu_ps(c + (size_t)m * c_stride + 16, sum[m][1]);
    }
}

void spurion_avx512_multiply(float *c, size_t c_stride, const uint16_t *a, size_t a_stride, const uint16_t *b, int rows, int columns, int inner,
                             bool accumulate)
{
    size_t steps = steps_of(inner);
    for (int n = 0; n < columns; n += SPURION_AMX_COLUMNS) {
        const uint16_t *panel = b + (size_t)(n / SPURION_AMX_COLUMNS) * steps * 2 * TILE_WORDS;
        for (int m = 0; m < rows; m += 8) {
            pairs_block(c + (size_t)m * c_stride + n, c_stride, a + (size_t)m * a_stride, a_stride, panel, steps, accumulate);
        }
    }
}

/* Turns 16 x 16 words of 32 bits: pairs of rows, pairs of pairs, then quarters. */
static inline void transpose_words(__m512i r[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) { /* t[8h + i], t[8h + 4 + i]: even and odd quarters of rows 8h .. 8h + 7 */
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

void spurion_amx_turn_words(float *out, size_t out_stride, const float *x, size_t stride)
{
    __m512i r[16];
    for (int i = 0; i < 16; i++) {
        r[i] = _mm512_loadu_si512(x + (size_t)i * stride);
    }
    transpose_words(r);
    for (int i = 0; i < 16; i++) {
        _mm512_storeu_si512(out + (size_t)i * out_stride, r[i]);
    }
}

void spurion_amx_pack_rows(uint16_t *b, const uint16_t *x, size_t stride, int columns, int inner)
{
    for (int n = 0; n < columns; n += 16) {
        for (int k = 0; k < inner; k += 32) {
            __m512i r[16];
            uint16_t *tile = b + ((size_t)(n / 32) * (size_t)(inner / 32) * 2 + (size_t)(k / 32) * 2 + (size_t)(n / 16 % 2)) * TILE_WORDS;
            for (int i = 0; i < 16; i++) {
                r[i] = _mm512_loadu_si512(x + (size_t)(n + i) * stride + k);
            }
            transpose_words(r);
            for (int i = 0; i < 16; i++) {
                _mm512_storeu_si512(tile + i * 32, r[i]);
            }
        }
    }
}

/* Words (x[0, c], x[1, c]) of two rows, 16 columns. */
static inline __m512i zip_rows(const uint16_t *x, size_t stride)
{
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)x));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)(x + stride)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

void spurion_amx_pack_pairs(uint16_t *b, const uint16_t *x, size_t stride, int inner, int columns)
{
    for (int n = 0; n < columns; n += 16) {
        for (int k = 0; k < inner; k += 32) {
            uint16_t *tile = b + ((size_t)(n / 32) * (size_t)(inner / 32) * 2 + (size_t)(k / 32) * 2 + (size_t)(n / 16 % 2)) * TILE_WORDS;
            for (int i = 0; i < 16; i++) {
                _mm512_storeu_si512(tile + i * 32, zip_rows(x + (size_t)(k + 2 * i) * stride + n, stride));
            }
        }
    }
}

void spurion_amx_transpose(uint16_t *out, size_t out_stride, const uint16_t *x, size_t stride, int rows, int columns)
{
    for (int m = 0; m < rows; m += 32) {
        for (int n = 0; n < columns; n += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) {
                r[i] = zip_rows(x + (size_t)(m + 2 * i) * stride + n, stride);
            }
            transpose_words(r);
            for (int i = 0; i < 16; i++) {
                _mm512_storeu_si512(out + (size_t)(n + i) * out_stride + m, r[i]);
            }
        }
    }
}

#else /* never called: enable says no */

#pragma GCC diagnostic ignored "-Wunused-parameter"

bool spurion_amx_enable(void)
{
    return false;
}

void spurion_amx_begin(void)
{
}

void spurion_amx_end(void)
{
}

size_t spurion_amx_packed_bytes(int outputs, int inner)
{
    return 0;
}

void spurion_amx_pack(uint16_t *panel, const uint16_t *dense, int outputs, int inner)
{
}

void spurion_amx_product(float *out, size_t out_stride, const uint16_t *a, size_t a_stride, const uint16_t *weights, const float *bias, int rows,
                         int outputs, int inner, bool accumulate)
{
}

void spurion_amx_multiply(float *c, size_t c_stride, const uint16_t *a, size_t a_stride, const uint16_t *b, int rows, int columns, int inner,
                          bool accumulate)
{
}

void spurion_avx512_multiply(float *c, size_t c_stride, const uint16_t *a, size_t a_stride, const uint16_t *b, int rows, int columns, int inner,
                             bool accumulate)
{
}

void spurion_amx_pack_rows(uint16_t *b, const uint16_t *x, size_t stride, int columns, int inner)
{
}

void spurion_amx_pack_pairs(uint16_t *b, const uint16_t *x, size_t stride, int inner, int columns)
{
}

void spurion_amx_transpose(uint16_t *out, size_t out_stride, const uint16_t *x, size_t stride, int rows, int columns)
{
}

void spurion_amx_turn_words(float *out, size_t out_stride, const float *x, size_t stride)
{
}

#endif

/* The instructions of kernels/cuda/ptx.cuh, by their definition in NVIDIA's PTX ISA (warp-level matrix instructions: fragment layouts of
 * mma.m16n8k16 for .bf16, ldmatrix .m8n8.b16). cp.async copies when it is waited for, no sooner. */
#ifndef SPURION_EMULATOR_PTX_H
#define SPURION_EMULATOR_PTX_H

#include "cuda_runtime.h"

void emulated_check(bool ok, const char *what);
void emulated_copy_async(void *out, const void *in, int bytes);
void emulated_copy_commit();
void emulated_copy_wait(int groups_left);

static inline float emulated_from_bf16(unsigned h) { return __uint_as_float((h & 0xffffu) << 16); }

static inline uint16_t ptx_bf16(float x)
{
    unsigned u = __float_as_uint(x);
    return x != x ? (uint16_t)0x7fff : (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

static inline uint32_t ptx_bf16_pair(float low, float high) { return (uint32_t)ptx_bf16(high) << 16 | ptx_bf16(low); }

static inline float ptx_exp2(float x) { return exp2f(x); }

/* Matrix m's row r comes from the address that lane 8 m + r gives. */
template <int COUNT, bool TRANSPOSED> static inline void emulated_ldmatrix(uint32_t *out, const uint16_t *row)
{
    int lane = emulated_lane_index(), g = lane / 4, t = lane % 4;
    emulated_check(lane >= 8 * COUNT || (uintptr_t)row % 16 == 0, "ldmatrix: the address of a row is not a multiple of 16");
    const emulated_lane *all = emulated_exchange(10 + COUNT + (TRANSPOSED ? 10 : 0), lane < 8 * COUNT ? row : nullptr, lane < 8 * COUNT ? 16 : 0);
    for (int m = 0; m < COUNT; m++) {
        uint16_t pair[2], other[8];
        for (int i = 0; i < 2; i++) {
            memcpy(other, all[8 * m + (TRANSPOSED ? 2 * t + i : g)].bytes, 16);
            pair[i] = other[TRANSPOSED ? g : 2 * t + i];
        }
        out[m] = (uint32_t)pair[1] << 16 | pair[0];
    }
}

static inline void ptx_ldmatrix4(uint32_t out[4], const uint16_t *row) { emulated_ldmatrix<4, false>(out, row); }
static inline void ptx_ldmatrix4_transposed(uint32_t out[4], const uint16_t *row) { emulated_ldmatrix<4, true>(out, row); }
static inline void ptx_ldmatrix2_transposed(uint32_t out[2], const uint16_t *row) { emulated_ldmatrix<2, true>(out, row); }

static inline uint32_t emulated_word(const emulated_lane *l, int n)
{
    uint32_t w;
    memcpy(&w, l->bytes + 4 * n, 4);
    return w;
}

/* c (16, 8) f32 += a (16, 16) bf16 . b (16, 8) bf16 */
static inline void ptx_mma(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const emulated_lane *all = emulated_exchange(40, mine, sizeof mine);
    int lane = emulated_lane_index(), g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        int half = i / 2, column = 2 * t + i % 2; /* row g + 8 half */
        double sum = c[i];
        for (int k = 0; k < 16; k += 2) { /* two neighbours share a word */
            uint32_t wa = emulated_word(&all[4 * g + k % 8 / 2], half + (k >= 8 ? 2 : 0)), wb = emulated_word(&all[4 * column + k % 8 / 2], 4 + (k >= 8));
            sum += (double)emulated_from_bf16(wa) * (double)emulated_from_bf16(wb) + (double)emulated_from_bf16(wa >> 16) * (double)emulated_from_bf16(wb >> 16);
        }
        c[i] = (float)sum;
    }
}

/* 16 bytes to shared memory; zeros when `there` is false (in is not read then). */
static inline void ptx_copy_async16(void *out, const void *in, bool there)
{
    emulated_check((uintptr_t)out % 16 == 0 && (!there || (uintptr_t)in % 16 == 0), "cp.async: an address is not a multiple of 16");
    emulated_copy_async(out, there ? in : nullptr, 16);
}
static inline void ptx_copy_commit() { emulated_copy_commit(); }
template <int GROUPS_LEFT> static inline void ptx_copy_wait() { emulated_copy_wait(GROUPS_LEFT); }

#endif

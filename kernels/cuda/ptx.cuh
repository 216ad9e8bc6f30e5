/* The few instructions that have no name in CUDA C++: bf16 rounding, matrix fragments, copies that run along. sm_80 and later.
 * Fragment layouts: NVIDIA, "PTX ISA", warp-level matrix instructions, mma.m16n8k16 (.bf16) and ldmatrix. A lane is 4 g + t:
 *   A (16, 16): a0 (g, 2t..2t+1), a1 (g + 8, 2t..), a2 (g, 2t + 8..), a3 (g + 8, 2t + 8..)
 *   B (16, 8):  b0 (2t..2t+1, g), b1 (2t + 8.., g)          C (16, 8): c0, c1 (g, 2t..2t+1), c2, c3 (g + 8, 2t..2t+1) */
#ifndef SPURION_CUDA_PTX_CUH
#define SPURION_CUDA_PTX_CUH

#include <cuda_runtime.h>

#if defined(SPURION_EMULATED)
#include "ptx_emulated.h"
#else

static __device__ inline uint32_t ptx_shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* low in bits 0..15, high in 16..31; to nearest even */
static __device__ inline uint32_t ptx_bf16_pair(float low, float high)
{
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

static __device__ inline uint16_t ptx_bf16(float x)
{
    return (uint16_t)ptx_bf16_pair(x, 0.0f);
}

/* 2^x, to 2 units in the last place; 2^-inf = 0 */
static __device__ inline float ptx_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Matrix m (8, 8) of bf16 has its row r where lane 8 m + r points (a multiple of 16 bytes, in shared memory).
 * out[m]: elements (g, 2t..2t+1), or (2t..2t+1, g) when transposed. */
static __device__ inline void ptx_ldmatrix4(uint32_t out[4], const uint16_t *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(ptx_shared_address(row))
                 : "memory");
}

static __device__ inline void ptx_ldmatrix4_transposed(uint32_t out[4], const uint16_t *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(ptx_shared_address(row))
                 : "memory");
}

static __device__ inline void ptx_ldmatrix2_transposed(uint32_t out[2], const uint16_t *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(ptx_shared_address(row))
                 : "memory");
}

/* c += a . b */
static __device__ inline void ptx_mma(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Begins a copy of 16 bytes to shared memory; zeros when `there` is false (in must be a valid address nevertheless). */
static __device__ inline void ptx_copy_async16(void *out, const void *in, bool there)
{
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(ptx_shared_address(out)), "l"(in), "r"(bytes) : "memory");
}

static __device__ inline void ptx_copy_commit(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most GROUPS_LEFT of this thread's latest groups are under way. Others see the data after a barrier. */
template <int GROUPS_LEFT> static __device__ inline void ptx_copy_wait(void)
{
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
}

#endif
#endif

/* What attention forward and backward share: work lists, where keys lie, tiles in shared memory.
 * Queries come in tiles and keys in blocks, both counted from position 0: a query has the same place in its tile, and its keys the same
 * place in their blocks, whoever else is in the batch and wherever pieces end. A tile's absent rows are zeros. */
#ifndef SPURION_CUDA_ATTENTION_CUH
#define SPURION_CUDA_ATTENTION_CUH

#include "kernels/cuda/rows.cuh"

#define SPURION_LOG2_E 1.44269504088896341f

enum {
    SPURION_BLOCK = 64,      /* keys of a block and queries of a tile, bf16 */
    SPURION_F32_TILE = 16,   /* queries of a tile of the f32 forward pass */
    SPURION_F32_BACK = 32    /* queries of a tile and keys of a block of the f32 backward pass */
};

/* Queries at positions start .. start + tile - 1 of a seq (those it has), or its keys of one block. */
typedef struct spurion_item {
    int32_t seq, start;
    int32_t first_tile; /* key blocks: number of the seq's first tile in the list of tiles */
    int32_t unused;
} spurion_item_t;

typedef struct spurion_work {
    const spurion_seq *seqs;
    const spurion_item_t *tiles, *blocks;
    float *delta; /* (tiles, tile, heads): <dout, out> */
    int tile_count, block_count;
} spurion_work;

typedef struct spurion_attention_args {
    spurion_work work;
    spurion_attention_shape shape;
    int group; /* query heads per key head */
    const void *q, *k, *v, *out;
    void *out_act;
    float *lse_out;
    const float *lse, *dout;
    float *dq, *dk, *dv;
    size_t q_stride, kv_stride, dkv_stride; /* elements */
    bool whole; /* heads begin at multiples of 16 bytes and hold whole runs of 8 bf16 */
    spurion_dtype dtype;
} spurion_attention_args;

/* --- index arithmetic, for host and device --- */

static __host__ __device__ inline int spurion_seq_end(const spurion_seq *s)
{
    return s->q_position + s->q_count;
}

static __host__ __device__ inline int spurion_first_key(int i, int window)
{
    return window > 0 && i >= window ? i - window + 1 : 0;
}

/* Row of a key's position. */
static __host__ __device__ inline int spurion_key_row(const spurion_seq *s, int position)
{
    int p = 0;
    while (p + 1 < s->piece_count && s->piece_position[p + 1] <= position) {
        p++;
    }
    return s->piece_row[p] + position - s->piece_position[p];
}

static __host__ __device__ inline bool spurion_has_query(const spurion_seq *s, int position)
{
    return position >= s->q_position && position < spurion_seq_end(s);
}

static __host__ __device__ inline int spurion_query_row(const spurion_seq *s, int position)
{
    return s->q_row + position - s->q_position;
}

/* Whether the query at position i sees the key at j. */
static __host__ __device__ inline bool spurion_sees(int i, int j, int window)
{
    return j <= i && j >= spurion_first_key(i, window);
}

/* First and last position of a tile's queries. */
static __host__ __device__ inline int spurion_tile_first(const spurion_seq *s, int start)
{
    return start > s->q_position ? start : s->q_position;
}

static __host__ __device__ inline int spurion_tile_last(const spurion_seq *s, int start, int tile)
{
    int last = start + tile - 1, end = spurion_seq_end(s) - 1;
    return last < end ? last : end;
}

/* Whether some query of the tile sees some key of the block. */
static __host__ __device__ inline bool spurion_tile_sees(const spurion_seq *s, int start, int tile, int block, int keys, int window)
{
    return spurion_tile_last(s, start, tile) >= block && spurion_first_key(spurion_tile_first(s, start), window) < block + keys;
}

#if defined(__CUDACC__) || defined(SPURION_EMULATED)

/* Score of a raw product, scaled and capped. */
static __device__ inline float spurion_score(float raw, const spurion_attention_shape &a)
{
    float s = raw * a.scale;
    return a.softcap > 0.0f ? a.softcap * tanhf(s / a.softcap) : s;
}

/* dS of one pair, from its weight and score. */
static __device__ inline float spurion_score_gradient(float weight, float score, float dp, float delta, const spurion_attention_shape &a)
{
    float bend = a.softcap > 0.0f ? score / a.softcap : 0.0f;
    return weight * (dp - delta) * a.scale * (1.0f - bend * bend);
}

/* --- tiles of bf16 in shared memory: 64 rows of HD + 8 elements (the 8 keep ldmatrix free of bank conflicts) --- */

/* Rows r of the tile from row row_of(r) of `in` (its columns from `in` on), zeros where that is negative, and behind hd. Copies run along
 * (one group follows by ptx_copy_commit) where rows are whole; else they are done when this returns. Barriers are the caller's. */
template <int HD, int THREADS, typename ROW_OF>
static __device__ inline void spurion_load_tile(uint16_t *out, const uint16_t *in, size_t stride, int hd, bool whole, ROW_OF row_of)
{
    constexpr int LD = HD + 8, RUNS = HD / 8;
    for (int n = (int)threadIdx.x; n < SPURION_BLOCK * RUNS; n += THREADS) {
        int r = n / RUNS, c = n % RUNS * 8, row = row_of(r);
        uint16_t *to = out + r * LD + c;
        const uint16_t *from = in + (row < 0 ? 0 : (size_t)row * stride) + (size_t)c;
        bool there = row >= 0 && c < hd;
        if (whole) {
            ptx_copy_async16(to, there ? from : in, there);
            continue;
        }
        for (int i = 0; i < 8; i++) {
            to[i] = there && c + i < hd ? from[i] : (uint16_t)0;
        }
    }
}

/* The same from f32, rounded. Done when it returns. */
template <int HD, int THREADS, typename ROW_OF>
static __device__ inline void spurion_load_tile_f32(uint16_t *out, const float *in, size_t stride, int hd, bool whole, ROW_OF row_of)
{
    constexpr int LD = HD + 8, QUADS = HD / 4;
    for (int n = (int)threadIdx.x; n < SPURION_BLOCK * QUADS; n += THREADS) {
        int r = n / QUADS, c = n % QUADS * 4, row = row_of(r);
        spurion_four f = {{0, 0, 0, 0}};
        if (row >= 0 && c < hd) {
            f = spurion_load4(in + (size_t)row * stride + (size_t)c, hd - c, whole);
        }
        uint32_t *to = (uint32_t *)(void *)(out + r * LD + c);
        to[0] = ptx_bf16_pair(f.v[0], f.v[1]);
        to[1] = ptx_bf16_pair(f.v[2], f.v[3]);
    }
}

/* acc (16, 8 TILES) f32 += A (16, 16) . B, where B's rows k are rows `row` .. row + 15 and its columns are columns `column` onward of a
 * tile: V, dO, K, Q as they lie. */
template <int TILES, int LD> static __device__ inline void spurion_mma_rows(float acc[][4], const uint32_t a[4], const uint16_t *tile, int row, int column)
{
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP);
    const uint16_t *at = tile + (row + lane % 16) * LD + column + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n + 1 < TILES; n += 2) {
        uint32_t b[4];
        ptx_ldmatrix4_transposed(b, at + n * 8);
        ptx_mma(acc[n], a, b);
        ptx_mma(acc[n + 1], a, b + 2);
    }
    if constexpr (TILES % 2 == 1) {
        uint32_t b[2];
        ptx_ldmatrix2_transposed(b, tile + (row + lane % 16) * LD + column + (TILES - 1) * 8);
        ptx_mma(acc[TILES - 1], a, b);
    }
}

/* s (16, 8 TILES) f32 = rows q0 .. of one tile . rows k0 .. of another, over all HD columns. TILES is even. */
template <int HD, int TILES> static __device__ inline void spurion_mma_scores(float s[][4], const uint16_t *q, int q0, const uint16_t *k, int k0)
{
    constexpr int LD = HD + 8;
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP);
    const uint16_t *from_q = q + (q0 + lane % 16) * LD + lane / 16 * 8;
    const uint16_t *from_k = k + (k0 + lane % 8 + lane / 16 * 8) * LD + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
    }
#pragma unroll
    for (int c = 0; c < HD; c += 16) {
        uint32_t a[4];
        ptx_ldmatrix4(a, from_q + c);
#pragma unroll
        for (int n = 0; n < TILES; n += 2) {
            uint32_t b[4];
            ptx_ldmatrix4(b, from_k + n * 8 * LD + c);
            ptx_mma(s[n], a, b);
            ptx_mma(s[n + 1], a, b + 2);
        }
    }
}

#endif

/* --- work lists (attention_work.cu) --- */

spurion_status spurion_attention_check(spurion_attention_shape shape);
/* Query-key pairs that count, for the profile. */
double spurion_attention_pairs(const spurion_seq *seqs, int count, int window);
/* Copies seqs to the device with lists of tiles and (keys > 0) of key blocks that want a gradient; room for delta when keys > 0. */
spurion_status spurion_attention_work(spurion_work *out, spurion_cuda *cuda, const spurion_seq *seqs, int seq_count, int heads, int tile, int keys);
/* Allows a kernel the shared memory it needs. UNIMPLEMENTED where the device has less. */
template <typename K> static inline spurion_status spurion_attention_allow(spurion_cuda *cuda, K *kernel, size_t bytes, int head_dim)
{
    if (bytes > cuda->shared_max) {
        return spurion_error(SPURION_UNIMPLEMENTED, "attention with head dim %d: expected %zu bytes of shared memory per block, device cuda:%d has %zu",
                             head_dim, bytes, cuda->ordinal, cuda->shared_max);
    }
    SPURION_CUDA(cuda, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    return spurion_ok();
}

/* The f32 kernels (attention_f32.cu). */
spurion_status spurion_attention_f32(spurion_cuda *cuda, const spurion_attention_args *a);
spurion_status spurion_attention_backward_f32(spurion_cuda *cuda, const spurion_attention_args *a);

#endif

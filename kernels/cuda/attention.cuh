/* What attention forward and backward share: work lists, where keys lie, tiles in shared memory.
 * Queries come in tiles and keys in blocks, both counted from position 0: a query has the same place in its tile, and its keys the same
 * place in their blocks, whoever else is in the batch and wherever pieces end. A tile's absent rows are zeros. */
#ifndef SPURION_CUDA_ATTENTION_CUH
#define SPURION_CUDA_ATTENTION_CUH

#include "kernels/cuda/rows.cuh"

#define SPURION_LOG2_E 1.44269504088896341f

enum {
    SPURION_BLOCK = 64,      /* keys of a block of the f32 forward pass; what the profile counts a reading of keys for */
    SPURION_F32_TILE = 16,   /* queries of a tile of the f32 forward pass */
    SPURION_F32_BACK = 32    /* queries of a tile and keys of a block of the f32 backward pass */
};

/* Queries at positions start .. start + tile - 1 of a seq (those it has), or its keys of one block. */
typedef struct spurion_item {
    int32_t seq, start;
    int32_t before; /* queries of earlier seqs: the place of the seq's first query in delta */
    int32_t unused;
} spurion_item_t;

typedef struct spurion_work {
    const spurion_seq *seqs;
    const spurion_item_t *tiles, *blocks;
    float *delta; /* (queries of all seqs, heads): <dout, out> */
    int tile_count, block_count;
} spurion_work;

typedef struct spurion_attention_args {
    spurion_work work;
    spurion_attention_shape shape;
    int group; /* query heads per key head */
    const void *q, *k, *v, *out;
    void *out_act;
    float *lse_out;
    const float *lse;
    const void *dout;
    const uint16_t *dout_act; /* dout in bf16: itself, or in dq's memory */
    int dout_step;            /* elements of dout_act for one of dout: 2 in dq's */
    float *dq, *dk, *dv;
    size_t q_stride, kv_stride, dkv_stride; /* elements */
    bool whole; /* heads begin at multiples of 16 bytes and hold whole runs of 8 bf16 */
    spurion_dtype dtype, dout_type;
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

/* Row of the key at position `block`, and how many keys from it on lie one behind another. */
static __host__ __device__ inline void spurion_key_run(int *row, int *together, const spurion_seq *s, int block)
{
    int p = 0, end = spurion_seq_end(s);
    while (p + 1 < s->piece_count && s->piece_position[p + 1] <= block) {
        p++;
    }
    *row = s->piece_row[p] + block - s->piece_position[p];
    *together = (p + 1 < s->piece_count && s->piece_position[p + 1] < end ? s->piece_position[p + 1] : end) - block;
}

/* Place of a query's number in delta. */
static __host__ __device__ inline size_t spurion_delta_at(const spurion_seq *s, spurion_item_t item, int position, int heads, int head)
{
    return (size_t)(item.before + position - s->q_position) * (size_t)heads + (size_t)head;
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

/* The same for `count` queries from position `first` on, of which the seq may have none; and whether some of them does not see some key. */
static __host__ __device__ inline bool spurion_run_sees(const spurion_seq *s, int first, int count, int block, int keys, int window)
{
    return first < spurion_seq_end(s) && first + count > s->q_position && first + count - 1 >= block && spurion_first_key(first, window) < block + keys;
}

static __host__ __device__ inline bool spurion_run_masked(int first, int count, int block, int keys, int window)
{
    return block + keys - 1 > first || spurion_first_key(first + count - 1, window) > block;
}

#if defined(__CUDACC__) || defined(SPURION_EMULATED)

template <int M, int TILES> static __device__ inline void spurion_clear(float acc[M][TILES][4])
{
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.0f;
        }
    }
}

/* Score of a raw product, scaled and capped. */
static __device__ inline float spurion_score(float raw, const spurion_attention_shape &a)
{
    float s = raw * a.scale;
    return a.softcap > 0.0f ? a.softcap * tanhf(s / a.softcap) : s;
}

/* Weights are 2^(score * unit - ...): without a cap scores stay raw products, and the scale is part of the unit. */
static __device__ inline float spurion_score_unit(const spurion_attention_shape &a)
{
    return a.softcap > 0.0f ? SPURION_LOG2_E : a.scale * SPURION_LOG2_E;
}

/* dS of one pair, from its weight and score. */
static __device__ inline float spurion_score_gradient(float weight, float score, float dp, float delta, const spurion_attention_shape &a)
{
    float bend = a.softcap > 0.0f ? score / a.softcap : 0.0f;
    return weight * (dp - delta) * a.scale * (1.0f - bend * bend);
}

/* --- tiles of bf16 in shared memory: rows of HD + 8 elements --- */

/* Elements from one row to the next: an odd number of runs of 16 bytes, so that the eight rows of an ldmatrix begin in different banks. */
template <int HD> constexpr int spurion_ld = HD + 8;

/* Rows r of the tile from row row_of(r) of `in` (its columns from `in` on), zeros where that is negative, and behind hd. Copies run along
 * (one group follows by ptx_copy_commit) where rows are whole; else they are done when this returns. Barriers are the caller's. */
template <int HD, int ROWS, int THREADS, typename ROW_OF>
static __device__ inline void spurion_load_tile(uint16_t *out, const uint16_t *in, size_t stride, int hd, bool whole, ROW_OF row_of)
{
    constexpr int LD = spurion_ld<HD>, RUNS = HD / 8;
    static_assert(LD / 8 % 2 == 1 && HD % 8 == 0, "rows begin in different banks");
#pragma unroll 4
    for (int n = (int)threadIdx.x; n < ROWS * RUNS; n += THREADS) {
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

/* Keys and values of the KEYS positions from `block` on, of one key head. Most blocks lie in one piece: one look-up for all rows. */
template <int HD, int KEYS, int THREADS>
static __device__ inline void spurion_load_keys(uint16_t *k, uint16_t *v, const spurion_attention_args &a, const spurion_seq *s, int block, int kv_head)
{
    int hd = a.shape.head_dim, end = spurion_seq_end(s), first, together;
    size_t column = (size_t)kv_head * (size_t)hd;
    spurion_key_run(&first, &together, s, block);
    auto row_of = [=](int n) { return n < together ? first + n : block + n < end ? spurion_key_row(s, block + n) : -1; };
    spurion_load_tile<HD, KEYS, THREADS>(k, (const uint16_t *)a.k + column, a.kv_stride, hd, a.whole, row_of);
    spurion_load_tile<HD, KEYS, THREADS>(v, (const uint16_t *)a.v + column, a.kv_stride, hd, a.whole, row_of);
}

/* acc (16 M, 8 TILES) f32 += A (16 M, 16) . B, where B's rows are rows `row` .. row + 15 and its columns are columns `column` onward of a
 * tile: V, dO, K, Q as they lie. */
template <int HD, int M, int TILES>
static __device__ inline void spurion_mma_rows(float acc[M][TILES][4], const uint32_t a[M][4], const uint16_t *tile, int row, int column)
{
    constexpr int LD = spurion_ld<HD>;
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP);
    const uint16_t *at = tile + (row + lane % 16) * LD + column + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n + 1 < TILES; n += 2) {
        uint32_t b[4];
        ptx_ldmatrix4_transposed(b, at + n * 8);
#pragma unroll
        for (int m = 0; m < M; m++) {
            ptx_mma(acc[m][n], a[m], b);
            ptx_mma(acc[m][n + 1], a[m], b + 2);
        }
    }
    if constexpr (TILES % 2 == 1) {
        uint32_t b[2];
        ptx_ldmatrix2_transposed(b, tile + (row + lane % 16) * LD + column + (TILES - 1) * 8);
#pragma unroll
        for (int m = 0; m < M; m++) {
            ptx_mma(acc[m][TILES - 1], a[m], b);
        }
    }
}

/* s (16 M, 8 TILES) f32 = rows q0 .. of one tile . rows k0 .. of another, over all HD columns. TILES is even. */
template <int HD, int M, int TILES>
static __device__ inline void spurion_mma_scores(float s[M][TILES][4], const uint16_t *q, int q0, const uint16_t *k, int k0)
{
    constexpr int LD = spurion_ld<HD>;
    static_assert(TILES % 2 == 0, "one ldmatrix brings two tiles");
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP);
    const uint16_t *from_q = q + (q0 + lane % 16) * LD + lane / 16 * 8;
    const uint16_t *from_k = k + (k0 + lane % 8 + lane / 16 * 8) * LD + lane / 8 % 2 * 8;
    spurion_clear<M, TILES>(s);
#pragma unroll
    for (int c = 0; c < HD; c += 16) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            ptx_ldmatrix4(a[m], from_q + m * 16 * LD + c);
        }
#pragma unroll
        for (int n = 0; n < TILES; n += 2) {
            uint32_t b[4];
            ptx_ldmatrix4(b, from_k + n * 8 * LD + c);
#pragma unroll
            for (int m = 0; m < M; m++) {
                ptx_mma(s[m][n], a[m], b);
                ptx_mma(s[m][n + 1], a[m], b + 2);
            }
        }
    }
}

/* Columns 16 n .. 16 n + 15 of results (16 M, 8 TILES), rounded: a result's place is its place as the left factor of a product. */
template <int M, int TILES> static __device__ inline void spurion_as_factor(uint32_t a[M][4], const float s[M][TILES][4], int n)
{
#pragma unroll
    for (int m = 0; m < M; m++) {
        a[m][0] = ptx_bf16_pair(s[m][2 * n][0], s[m][2 * n][1]);
        a[m][1] = ptx_bf16_pair(s[m][2 * n][2], s[m][2 * n][3]);
        a[m][2] = ptx_bf16_pair(s[m][2 * n + 1][0], s[m][2 * n + 1][1]);
        a[m][3] = ptx_bf16_pair(s[m][2 * n + 1][2], s[m][2 * n + 1][3]);
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
spurion_status spurion_attention_f32(spurion_cuda *cuda, spurion_attention_args *a, const spurion_seq *seqs, int seq_count);
spurion_status spurion_attention_backward_f32(spurion_cuda *cuda, const spurion_attention_args *a);

#endif

/* Attention forward in bf16: FlashAttention-2's scheme (Dao 2023) over pieces. One block of four warps takes a tile of queries of one head, a
 * warp 32 of them (16 where a head has more than 128 dimensions: registers), so that a key from shared memory serves as many queries as
 * there is room for. Keys come in blocks, two stages: while one is used the next is under way, and one barrier a block keeps them apart.
 * Products on tensor cores (mma m16n8k16), softmax in f32 along the way.          Thread: engine. Memory: the device's work block; shared memory. */
#include "kernels/cuda/attention.cuh"

enum { WARPS = 4, THREADS = WARPS * SPURION_CUDA_WARP };

template <int HD> struct sizes {
    static constexpr int M = HD <= 128 ? 2 : 1;         /* runs of 16 queries of one warp */
    static constexpr int KEYS = HD <= 80 ? 64 : 32;     /* of a block */
    static constexpr int QUERIES = WARPS * 16 * M, TILES = KEYS / 8, COLUMNS = HD / 8;
    static constexpr int QUERY_TILE = QUERIES * spurion_ld<HD>, KEY_TILE = KEYS * spurion_ld<HD>;
    static constexpr size_t BYTES = (size_t)(QUERY_TILE + 4 * KEY_TILE) * sizeof(uint16_t);
};

/* What a thread keeps of its rows: g and g + 8 of each run of the warp's queries. */
template <int M> struct running {
    float top[M][2], sum[M][2];
};

/* Scores to weights 2^(score - top) of one block, in place; the factors for what was summed before. first: position of row 0; block: of key 0;
 * masked: some query of the warp does not see some key. */
template <int M, int TILES>
static __device__ inline void soften(float s[M][TILES][4], float factor[M][2], running<M> *r, const spurion_attention_shape &a, int first, int block, bool masked)
{
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), g = lane / 4, t = lane % 4;
    float unit = spurion_score_unit(a);
#pragma unroll
    for (int row = 0; row < 2 * M; row++) {
        int m = row / 2, half = row % 2, i = first + 16 * m + g + 8 * half;
        float top = r->top[m][half], sum = 0.0f;
#pragma unroll
        for (int n = 0; n < TILES; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float *v = &s[m][n][2 * half + e];
                *v = a.softcap > 0.0f ? spurion_score(*v, a) : *v;
                *v = masked && !spurion_sees(i, block + 8 * n + 2 * t + e, a.window) ? -INFINITY : *v;
                top = fmaxf(top, *v);
            }
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        float base = top == -INFINITY ? 0.0f : __fmul_rn(top, unit); /* nothing seen yet: every weight is 2^-inf = 0 */
#pragma unroll
        for (int n = 0; n < TILES; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float *v = &s[m][n][2 * half + e];
                *v = ptx_exp2(fmaf(*v, unit, -base));
                sum += *v;
            }
        }
        factor[m][half] = ptx_exp2(__fmul_rn(r->top[m][half], unit) - base); /* 1 where the top stays */
        r->top[m][half] = top;
        r->sum[m][half] = r->sum[m][half] * factor[m][half] + sum; /* this lane's share */
    }
}

/* acc = acc factor + weights . values */
template <int HD>
static __device__ inline void add_values(float acc[sizes<HD>::M][sizes<HD>::COLUMNS][4], const float s[sizes<HD>::M][sizes<HD>::TILES][4],
                                         const float factor[sizes<HD>::M][2], const uint16_t *v)
{
    constexpr int M = sizes<HD>::M;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < sizes<HD>::COLUMNS; n++) {
            acc[m][n][0] *= factor[m][0], acc[m][n][1] *= factor[m][0], acc[m][n][2] *= factor[m][1], acc[m][n][3] *= factor[m][1];
        }
    }
#pragma unroll
    for (int k = 0; k < sizes<HD>::KEYS / 16; k++) {
        uint32_t a[M][4];
        spurion_as_factor<M, sizes<HD>::TILES>(a, s, k);
        spurion_mma_rows<HD, M, sizes<HD>::COLUMNS>(acc, a, v, 16 * k, 0);
    }
}

/* Values over their sums to the warp's own rows of the tile of queries, which only this warp reads; and lse. */
template <int HD>
static __device__ inline void finish_rows(uint16_t *tile, const float acc[sizes<HD>::M][sizes<HD>::COLUMNS][4], const running<sizes<HD>::M> *r,
                                          const spurion_attention_args &a, const spurion_seq *s, int head, int start, int warp_row)
{
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), g = lane / 4, t = lane % 4;
    __syncwarp(); /* the queries have been used */
#pragma unroll
    for (int row = 0; row < 2 * sizes<HD>::M; row++) {
        int m = row / 2, half = row % 2, at = warp_row + 16 * m + g + 8 * half;
        float sum = r->sum[m][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
#pragma unroll
        for (int n = 0; n < sizes<HD>::COLUMNS; n++) {
            uint32_t pair = ptx_bf16_pair(acc[m][n][2 * half] / sum, acc[m][n][2 * half + 1] / sum);
            *(uint32_t *)(void *)(tile + at * spurion_ld<HD> + 8 * n + 2 * t) = pair;
        }
        if (t == 0 && spurion_has_query(s, start + at)) {
            size_t to = (size_t)spurion_query_row(s, start + at) * (size_t)a.shape.heads + (size_t)head;
            a.lse_out[to] = r->top[m][half] * (spurion_score_unit(a.shape) / SPURION_LOG2_E) + logf(sum);
        }
    }
    __syncwarp();
}

/* The warp's rows of the tile to the rows that the seq has, 16 bytes at a time where they are whole. */
template <int HD>
static __device__ inline void write_rows(const uint16_t *tile, const spurion_attention_args &a, const spurion_seq *s, int head, int start, int warp_row)
{
    constexpr int RUNS = HD / 8;
    int hd = a.shape.head_dim;
    for (int n = (int)(threadIdx.x % SPURION_CUDA_WARP); n < 16 * sizes<HD>::M * RUNS; n += SPURION_CUDA_WARP) {
        int r = warp_row + n / RUNS, c = n % RUNS * 8;
        if (c >= hd || !spurion_has_query(s, start + r)) {
            continue;
        }
        const uint16_t *from = tile + r * spurion_ld<HD> + c;
        uint16_t *to = (uint16_t *)a.out_act + (size_t)spurion_query_row(s, start + r) * a.q_stride + (size_t)head * (size_t)hd + (size_t)c;
        if (a.whole) {
            *(uint4 *)(void *)to = *(const uint4 *)(const void *)from;
        } else {
            for (int i = 0; i < 8 && c + i < hd; i++) {
                to[i] = from[i];
            }
        }
    }
}

template <int HD> static __global__ void __launch_bounds__(THREADS) forward_kernel(spurion_attention_args a)
{
    typedef sizes<HD> z;
    SPURION_CUDA_SHARED(shared);
    uint16_t *q = (uint16_t *)(void *)shared, *k = q + z::QUERY_TILE, *v = k + 2 * z::KEY_TILE; /* two stages each */
    const spurion_item_t item = a.work.tiles[a.work.tile_count - 1 - (int)blockIdx.x];          /* the longest of a seq first */
    const spurion_seq *s = &a.work.seqs[item.seq];
    int head = (int)blockIdx.y, warp_row = (int)(threadIdx.x / SPURION_CUDA_WARP) * 16 * z::M, first = item.start + warp_row, start = item.start;
    int block = spurion_first_key(spurion_tile_first(s, start), a.shape.window) / z::KEYS * z::KEYS, last = spurion_tile_last(s, start, z::QUERIES);
    float acc[z::M][z::COLUMNS][4], scores[z::M][z::TILES][4], factor[z::M][2];
    running<z::M> r;

    spurion_clear<z::M, z::COLUMNS>(acc);
#pragma unroll
    for (int m = 0; m < z::M; m++) {
        r.top[m][0] = r.top[m][1] = -INFINITY;
        r.sum[m][0] = r.sum[m][1] = 0.0f;
    }
    spurion_load_tile<HD, z::QUERIES, THREADS>(q, (const uint16_t *)a.q + (size_t)head * (size_t)a.shape.head_dim, a.q_stride, a.shape.head_dim, a.whole,
                                               [=](int n) { return spurion_has_query(s, start + n) ? spurion_query_row(s, start + n) : -1; });
    spurion_load_keys<HD, z::KEYS, THREADS>(k, v, a, s, block, head / a.group);
    ptx_copy_commit();
    for (int stage = 0; block <= last; block += z::KEYS, stage ^= 1) {
        ptx_copy_wait<0>();
        __syncthreads(); /* this block (and the queries) are there; the other stage has been used */
        if (block + z::KEYS <= last) {
            spurion_load_keys<HD, z::KEYS, THREADS>(k + (stage ^ 1) * z::KEY_TILE, v + (stage ^ 1) * z::KEY_TILE, a, s, block + z::KEYS, head / a.group);
        }
        ptx_copy_commit();
        if (!spurion_run_sees(s, first, 16 * z::M, block, z::KEYS, a.shape.window)) {
            continue; /* the whole warp */
        }
        spurion_mma_scores<HD, z::M, z::TILES>(scores, q, warp_row, k + stage * z::KEY_TILE, 0);
        soften<z::M, z::TILES>(scores, factor, &r, a.shape, first, block, spurion_run_masked(first, 16 * z::M, block, z::KEYS, a.shape.window));
        add_values<HD>(acc, scores, factor, v + stage * z::KEY_TILE);
    }
    ptx_copy_wait<0>();
    finish_rows<HD>(q, acc, &r, a, s, head, start, warp_row);
    write_rows<HD>(q, a, s, head, start, warp_row);
}

template <int HD> static spurion_status forward(spurion_cuda *cuda, spurion_attention_args *a, const spurion_seq *seqs, int seq_count)
{
    size_t bytes = sizes<HD>::BYTES;
    SPURION_CUDA_DO(spurion_attention_allow(cuda, forward_kernel<HD>, bytes, HD));
    SPURION_CUDA_DO(spurion_attention_work(&a->work, cuda, seqs, seq_count, a->shape.heads, sizes<HD>::QUERIES, 0));
    if (a->work.tile_count > 0) {
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, forward_kernel<HD>, dim3((unsigned)a->work.tile_count, (unsigned)a->shape.heads), THREADS, bytes, *a));
    }
    return spurion_ok();
}

static spurion_status forward_bf16(spurion_cuda *cuda, spurion_attention_args *a, const spurion_seq *seqs, int seq_count)
{
    int hd = a->shape.head_dim;
    return hd <= 64    ? forward<64>(cuda, a, seqs, seq_count)
           : hd <= 80  ? forward<80>(cuda, a, seqs, seq_count)
           : hd <= 96  ? forward<96>(cuda, a, seqs, seq_count)
           : hd <= 128 ? forward<128>(cuda, a, seqs, seq_count)
           : hd <= 192 ? forward<192>(cuda, a, seqs, seq_count)
                       : forward<256>(cuda, a, seqs, seq_count);
}

extern "C" spurion_status spurion_cuda_attention(spurion_dev *dev, void *out, float *lse, const void *q, const void *k, const void *v,
                                                 const spurion_seq *seqs, int seq_count, spurion_attention_shape shape)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    SPURION_CUDA_DO(spurion_attention_check(shape));
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    bool narrow = dev->dtype == SPURION_BF16;
    spurion_attention_args a = {};
    a.shape = shape;
    a.group = shape.heads / shape.kv_heads;
    a.q = q, a.k = k, a.v = v, a.out_act = out, a.lse_out = lse;
    a.q_stride = (size_t)shape.heads * (size_t)shape.head_dim;
    a.kv_stride = (size_t)shape.kv_heads * (size_t)shape.head_dim;
    a.whole = shape.head_dim % 8 == 0 && spurion_cuda_aligned(q, 16) && spurion_cuda_aligned(k, 16) && spurion_cuda_aligned(v, 16) &&
              spurion_cuda_aligned(out, 16);
    a.dtype = dev->dtype;
    SPURION_CUDA_DO(narrow ? forward_bf16(cuda, &a, seqs, seq_count) : spurion_attention_f32(cuda, &a, seqs, seq_count));
    double pairs = spurion_attention_pairs(seqs, seq_count, shape.window) * shape.heads;
    return spurion_cuda_end(cuda, SPURION_CLASS_ATTENTION, 4 * pairs * shape.head_dim,
                            pairs / SPURION_BLOCK * 2 * shape.head_dim * (double)spurion_dtype_bytes(dev->dtype));
}

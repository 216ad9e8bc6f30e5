/* Attention backward in bf16, weights recomputed from lse: formulas in cpu/attention_backward.c. No atomics: one kernel owns keys and walks
 * over queries (dK, dV), one owns queries and walks over keys (dQ); that is seven products where five would do, and every sum has one order.
 * Eight warps: for the scores each takes 16 queries by 32 keys; for the gradients each takes 16 rows by half of the head's columns.
 * Thread: engine. Memory: the device's work block; shared memory. */
#include "kernels/cuda/attention.cuh"

enum { WARPS = 8, THREADS = WARPS * SPURION_CUDA_WARP, HALF_TILES = SPURION_BLOCK / 16, LDP = SPURION_BLOCK + 8 };

/* Shared memory of a block: four tiles (64, HD + 8), weights and score gradients (64, LDP) as (query, key), two numbers per query. */
template <int HD> struct tiles {
    static constexpr size_t TILE = (size_t)SPURION_BLOCK * (HD + 8), WEIGHTS = (size_t)SPURION_BLOCK * LDP;
    static constexpr size_t BYTES = (4 * TILE + 2 * WEIGHTS) * sizeof(uint16_t) + 2 * SPURION_BLOCK * sizeof(float);
    uint16_t *q, *dout, *k, *v, *p, *ds;
    float *lse, *delta;

    __device__ explicit tiles(unsigned char *shared)
    {
        q = (uint16_t *)(void *)shared;
        dout = q + TILE, k = dout + TILE, v = k + TILE, p = v + TILE, ds = p + WEIGHTS;
        lse = (float *)(void *)(ds + WEIGHTS);
        delta = lse + SPURION_BLOCK;
    }
};

/* --- delta --- */

/* delta[tile, r, head] = <dout, out> of the tile's queries: a warp for each. In bf16 with dout as the products see it, rounded: the sum over
 * keys of P (dP - delta) stays near 0. */
template <int TILE> static __global__ void delta_kernel(spurion_attention_args a)
{
    const spurion_item_t item = a.work.tiles[blockIdx.x];
    const spurion_seq *s = &a.work.seqs[item.seq];
    int head = (int)blockIdx.y, hd = a.shape.head_dim, lane = (int)(threadIdx.x % SPURION_CUDA_WARP), warp = (int)(threadIdx.x / SPURION_CUDA_WARP);
    for (int r = warp; r < TILE; r += SPURION_CUDA_THREADS / SPURION_CUDA_WARP) {
        float sum = 0.0f;
        if (spurion_has_query(s, item.start + r)) { /* the same for the whole warp */
            size_t at = (size_t)spurion_query_row(s, item.start + r) * a.q_stride + (size_t)head * (size_t)hd;
            for (int c = lane; c < hd; c += SPURION_CUDA_WARP) {
                float o = a.dtype == SPURION_F32 ? ((const float *)a.out)[at + (size_t)c] : spurion_from_bf16(((const uint16_t *)a.out)[at + (size_t)c]);
                float d = a.dout[at + (size_t)c];
                sum = fmaf(a.dtype == SPURION_F32 ? d : spurion_from_bf16(ptx_bf16(d)), o, sum);
            }
        }
        for (int mask = 16; mask > 0; mask /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, mask);
        }
        if (lane == 0) {
            a.work.delta[((size_t)blockIdx.x * TILE + (size_t)r) * (size_t)a.shape.heads + (size_t)head] = sum;
        }
    }
}

/* --- both kernels --- */

/* Queries of one tile and head, their dout, lse and delta. Not waited for; the caller commits. */
template <int HD>
static __device__ inline void load_queries(const tiles<HD> &m, const spurion_attention_args &a, const spurion_seq *s, int start, int tile, int head)
{
    int hd = a.shape.head_dim;
    size_t column = (size_t)head * (size_t)hd;
    auto row_of = [=](int n) { return spurion_has_query(s, start + n) ? spurion_query_row(s, start + n) : -1; };
    spurion_load_tile<HD, THREADS>(m.q, (const uint16_t *)a.q + column, a.q_stride, hd, a.whole, row_of);
    spurion_load_tile_f32<HD, THREADS>(m.dout, a.dout + column, a.q_stride, hd, a.whole, row_of);
    if (threadIdx.x < SPURION_BLOCK) {
        int r = (int)threadIdx.x, row = row_of(r);
        m.lse[r] = row < 0 ? 0.0f : a.lse[(size_t)row * (size_t)a.shape.heads + (size_t)head];
        m.delta[r] = a.work.delta[((size_t)tile * SPURION_BLOCK + (size_t)r) * (size_t)a.shape.heads + (size_t)head];
    }
}

template <int HD>
static __device__ inline void load_keys(const tiles<HD> &m, const spurion_attention_args &a, const spurion_seq *s, int block, int kv_head)
{
    int hd = a.shape.head_dim, end = spurion_seq_end(s);
    size_t column = (size_t)kv_head * (size_t)hd;
    auto row_of = [=](int n) { return block + n < end ? spurion_key_row(s, block + n) : -1; };
    spurion_load_tile<HD, THREADS>(m.k, (const uint16_t *)a.k + column, a.kv_stride, hd, a.whole, row_of);
    spurion_load_tile<HD, THREADS>(m.v, (const uint16_t *)a.v + column, a.kv_stride, hd, a.whole, row_of);
}

/* Weights (when WEIGHTS) and score gradients of a tile of queries against a block of keys, to shared memory in bf16. */
template <int HD, bool WEIGHTS>
static __device__ inline void score_gradients(const tiles<HD> &m, const spurion_attention_args &a, const spurion_seq *s, int start, int block)
{
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), warp = (int)(threadIdx.x / SPURION_CUDA_WARP), g = lane / 4, t = lane % 4;
    int q0 = warp % 4 * 16, k0 = warp / 4 * (SPURION_BLOCK / 2);
    float score[HALF_TILES][4], dp[HALF_TILES][4];
    spurion_mma_scores<HD, HALF_TILES>(score, m.q, q0, m.k, k0);
    spurion_mma_scores<HD, HALF_TILES>(dp, m.dout, q0, m.v, k0);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int r = q0 + g + 8 * half, i = start + r;
        bool there = spurion_has_query(s, i);
        float lse = m.lse[r], delta = m.delta[r];
#pragma unroll
        for (int n = 0; n < HALF_TILES; n++) {
            float weight[2], gradient[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                bool seen = there && spurion_sees(i, block + k0 + 8 * n + 2 * t + e, a.shape.window);
                float v = spurion_score(score[n][2 * half + e], a.shape);
                weight[e] = seen ? ptx_exp2((v - lse) * SPURION_LOG2_E) : 0.0f;
                gradient[e] = seen ? spurion_score_gradient(weight[e], v, dp[n][2 * half + e], delta, a.shape) : 0.0f;
            }
            int at = r * LDP + k0 + 8 * n + 2 * t;
            if (WEIGHTS) {
                *(uint32_t *)(void *)(m.p + at) = ptx_bf16_pair(weight[0], weight[1]);
            }
            *(uint32_t *)(void *)(m.ds + at) = ptx_bf16_pair(gradient[0], gradient[1]);
        }
    }
}

template <int TILES> static __device__ inline void clear(float acc[][4])
{
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
    }
}

/* Columns c0 onward of row `row` of out (f32) from half a fragment. */
template <int TILES> static __device__ inline void store_row(float *out, const float acc[][4], int half, int c0, int hd)
{
    int t = (int)(threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        int c = c0 + 8 * n + 2 * t;
        if (c < hd) {
            out[c] = acc[n][2 * half];
        }
        if (c + 1 < hd) {
            out[c + 1] = acc[n][2 * half + 1];
        }
    }
}

/* --- dK, dV: a block of threads owns a block of keys of one key head --- */

template <int HD> static __global__ void __launch_bounds__(THREADS) keys_kernel(spurion_attention_args a)
{
    constexpr int TILES = HD / 16, LD = HD + 8;
    SPURION_CUDA_SHARED(shared);
    const tiles<HD> m(shared);
    const spurion_item_t item = a.work.blocks[blockIdx.x];
    const spurion_seq *s = &a.work.seqs[item.seq];
    int kv_head = (int)blockIdx.y, block = item.start, end = spurion_seq_end(s), window = a.shape.window;
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), warp = (int)(threadIdx.x / SPURION_CUDA_WARP), k0 = warp % 4 * 16, c0 = warp / 4 * (HD / 2);
    float dk[TILES][4], dv[TILES][4];
    int tile = item.first_tile;

    clear<TILES>(dk);
    clear<TILES>(dv);
    load_keys<HD>(m, a, s, block, kv_head);
    for (int start = s->q_position / SPURION_BLOCK * SPURION_BLOCK; start < end; start += SPURION_BLOCK, tile++) {
        if (!spurion_tile_sees(s, start, SPURION_BLOCK, block, SPURION_BLOCK, window)) {
            continue;
        }
        for (int head = kv_head * a.group; head < (kv_head + 1) * a.group; head++) {
            load_queries<HD>(m, a, s, start, tile, head);
            ptx_copy_commit();
            ptx_copy_wait<0>();
            __syncthreads(); /* queries (and keys) are there */
            score_gradients<HD, true>(m, a, s, start, block);
            __syncthreads(); /* weights and score gradients are there */
#pragma unroll
            for (int q = 0; q < SPURION_BLOCK; q += 16) {
                uint32_t weight[4], gradient[4];
                int at = (q + lane % 8 + lane / 16 * 8) * LDP + k0 + lane / 8 % 2 * 8; /* (query, key) read as (key, query) */
                ptx_ldmatrix4_transposed(weight, m.p + at);
                spurion_mma_rows<TILES, LD>(dv, weight, m.dout, q, c0);
                ptx_ldmatrix4_transposed(gradient, m.ds + at);
                spurion_mma_rows<TILES, LD>(dk, gradient, m.q, q, c0);
            }
            __syncthreads(); /* all of it has been used */
        }
    }
    ptx_copy_commit(); /* where no query sees the block its keys were never waited for */
    ptx_copy_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int j = block + k0 + lane / 4 + 8 * half;
        if (j >= s->dkv_position && j < end) {
            size_t at = (size_t)(s->dkv_row + j - s->dkv_position) * a.dkv_stride + (size_t)kv_head * (size_t)a.shape.head_dim;
            store_row<TILES>(a.dk + at, dk, half, c0, a.shape.head_dim);
            store_row<TILES>(a.dv + at, dv, half, c0, a.shape.head_dim);
        }
    }
}

/* --- dQ: a block of threads owns a tile of queries of one head --- */

template <int HD> static __global__ void __launch_bounds__(THREADS) queries_kernel(spurion_attention_args a)
{
    constexpr int TILES = HD / 16, LD = HD + 8;
    SPURION_CUDA_SHARED(shared);
    const tiles<HD> m(shared);
    int tile = a.work.tile_count - 1 - (int)blockIdx.x; /* the longest of a seq first */
    const spurion_item_t item = a.work.tiles[tile];
    const spurion_seq *s = &a.work.seqs[item.seq];
    int head = (int)blockIdx.y, start = item.start;
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), warp = (int)(threadIdx.x / SPURION_CUDA_WARP), q0 = warp % 4 * 16, c0 = warp / 4 * (HD / 2);
    int begin = spurion_first_key(spurion_tile_first(s, start), a.shape.window) / SPURION_BLOCK * SPURION_BLOCK;
    int last = spurion_tile_last(s, start, SPURION_BLOCK);
    float dq[TILES][4];

    clear<TILES>(dq);
    load_queries<HD>(m, a, s, start, tile, head);
    for (int block = begin; block <= last; block += SPURION_BLOCK) {
        load_keys<HD>(m, a, s, block, head / a.group);
        ptx_copy_commit();
        ptx_copy_wait<0>();
        __syncthreads(); /* keys (and queries) are there */
        score_gradients<HD, false>(m, a, s, start, block);
        __syncthreads(); /* score gradients are there */
#pragma unroll
        for (int k = 0; k < SPURION_BLOCK; k += 16) {
            uint32_t gradient[4];
            ptx_ldmatrix4(gradient, m.ds + (q0 + lane % 16) * LDP + k + lane / 16 * 8);
            spurion_mma_rows<TILES, LD>(dq, gradient, m.k, k, c0);
        }
        __syncthreads(); /* all of it has been used */
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int i = start + q0 + lane / 4 + 8 * half;
        if (spurion_has_query(s, i)) {
            size_t at = (size_t)spurion_query_row(s, i) * a.q_stride + (size_t)head * (size_t)a.shape.head_dim;
            store_row<TILES>(a.dq + at, dq, half, c0, a.shape.head_dim);
        }
    }
}

template <int HD> static spurion_status backward(spurion_cuda *cuda, const spurion_attention_args *a)
{
    size_t bytes = tiles<HD>::BYTES;
    SPURION_CUDA_DO(spurion_attention_allow(cuda, keys_kernel<HD>, bytes, HD));
    SPURION_CUDA_DO(spurion_attention_allow(cuda, queries_kernel<HD>, bytes, HD));
    if (a->work.block_count > 0) {
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, keys_kernel<HD>, dim3((unsigned)a->work.block_count, (unsigned)a->shape.kv_heads), THREADS, bytes, *a));
    }
    SPURION_CUDA(cuda, spurion_cuda_launch(cuda, queries_kernel<HD>, dim3((unsigned)a->work.tile_count, (unsigned)a->shape.heads), THREADS, bytes, *a));
    return spurion_ok();
}

static spurion_status backward_bf16(spurion_cuda *cuda, const spurion_attention_args *a)
{
    int hd = a->shape.head_dim;
    return hd <= 64    ? backward<64>(cuda, a)
           : hd <= 80  ? backward<80>(cuda, a)
           : hd <= 96  ? backward<96>(cuda, a)
           : hd <= 128 ? backward<128>(cuda, a)
           : hd <= 192 ? backward<192>(cuda, a)
                       : backward<256>(cuda, a);
}

static spurion_status run(spurion_cuda *cuda, const spurion_attention_args *a)
{
    dim3 grid((unsigned)a->work.tile_count, (unsigned)a->shape.heads);
    bool narrow = a->dtype == SPURION_BF16;
    if (a->work.tile_count == 0) {
        return spurion_ok();
    }
    SPURION_CUDA(cuda, spurion_cuda_launch(cuda, narrow ? delta_kernel<SPURION_BLOCK> : delta_kernel<SPURION_F32_BACK>, grid, SPURION_CUDA_THREADS, 0, *a));
    return narrow ? backward_bf16(cuda, a) : spurion_attention_backward_f32(cuda, a);
}

extern "C" spurion_status spurion_cuda_attention_backward(spurion_dev *dev, float *dq, float *dk, float *dv, int dkv_stride, const float *dout,
                                                          const void *out, const float *lse, const void *q, const void *k, const void *v,
                                                          const spurion_seq *seqs, int seq_count, spurion_attention_shape shape)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    SPURION_CUDA_DO(spurion_attention_check(shape));
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    int tile = dev->dtype == SPURION_BF16 ? SPURION_BLOCK : SPURION_F32_BACK;
    spurion_attention_args a = {};
    SPURION_CUDA_DO(spurion_attention_work(&a.work, cuda, seqs, seq_count, shape.heads, tile, tile));
    a.shape = shape;
    a.group = shape.heads / shape.kv_heads;
    a.q = q, a.k = k, a.v = v, a.out = out, a.lse = lse, a.dout = dout;
    a.dq = dq, a.dk = dk, a.dv = dv;
    a.q_stride = (size_t)shape.heads * (size_t)shape.head_dim;
    a.kv_stride = (size_t)shape.kv_heads * (size_t)shape.head_dim;
    a.dkv_stride = (size_t)dkv_stride;
    a.whole = shape.head_dim % 8 == 0 && spurion_cuda_aligned(q, 16) && spurion_cuda_aligned(k, 16) && spurion_cuda_aligned(v, 16) &&
              spurion_cuda_aligned(dout, 16);
    a.dtype = dev->dtype;
    SPURION_CUDA_DO(run(cuda, &a));
    double pairs = spurion_attention_pairs(seqs, seq_count, shape.window) * shape.heads;
    return spurion_cuda_end(cuda, SPURION_CLASS_ATTENTION, 10 * pairs * shape.head_dim,
                            pairs / SPURION_BLOCK * 4 * shape.head_dim * (double)spurion_dtype_bytes(dev->dtype));
}

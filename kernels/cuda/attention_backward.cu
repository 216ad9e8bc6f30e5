/* Attention backward in bf16, weights recomputed from lse: formulas in cpu/attention_backward.c. No atomics: one kernel owns keys and walks
 * over queries (dK, dV), one owns queries and walks over keys (dQ); that is seven products where five would do, and every sum has one order.
 * A first pass makes <dout, out>, and of a dout in f32 its rounding to bf16, which lies in dq's own memory until dq is written: a block of
 * threads of the last kernel reads its own part of it before anything, and nobody else does by then.
 * Tiles that are walked over come in two stages: while one is used the next is under way.
 * Thread: engine. Memory: the device's work block; shared memory. */
#include "kernels/cuda/attention.cuh"

/* --- delta, and dout in bf16 --- */

/* delta[query, head] = <dout, out>: a warp for each. In bf16 with dout as the products see it, rounded: the sum over keys of P (dP - delta)
 * stays near 0. */
static __global__ void __launch_bounds__(SPURION_CUDA_THREADS) delta_kernel(spurion_attention_args a, int tile)
{
    const spurion_item_t item = a.work.tiles[blockIdx.x];
    const spurion_seq *s = &a.work.seqs[item.seq];
    int head = (int)blockIdx.y, hd = a.shape.head_dim, lane = (int)(threadIdx.x % SPURION_CUDA_WARP), warp = (int)(threadIdx.x / SPURION_CUDA_WARP);
    bool narrow = a.dtype == SPURION_BF16, rounds = narrow && a.dout_type == SPURION_F32;
    for (int r = warp; r < tile; r += SPURION_CUDA_THREADS / SPURION_CUDA_WARP) {
        float sum = 0.0f;
        if (!spurion_has_query(s, item.start + r)) {
            continue; /* the whole warp */
        }
        size_t at = (size_t)spurion_query_row(s, item.start + r) * a.q_stride + (size_t)head * (size_t)hd;
        for (int c = 4 * lane; c < hd; c += 4 * SPURION_CUDA_WARP) {
            spurion_four o = spurion_load4_act(a.out, at + (size_t)c, hd - c, a.whole, a.dtype);
            spurion_four d = spurion_load4_act(a.dout, at + (size_t)c, hd - c, a.whole, a.dout_type);
            for (int i = 0; i < 4; i++) {
                d.v[i] = narrow ? spurion_from_bf16(ptx_bf16(d.v[i])) : d.v[i];
                sum = fmaf(d.v[i], o.v[i], sum);
            }
            if (rounds) {
                spurion_store4_act(a.dq, 2 * at + (size_t)c, d, hd - c, a.whole, SPURION_BF16);
            }
        }
        for (int mask = 16; mask > 0; mask /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, mask);
        }
        if (lane == 0) {
            a.work.delta[spurion_delta_at(s, item, item.start + r, a.shape.heads, head)] = sum;
        }
    }
}

/* --- both kernels --- */

/* Q and dout of ROWS queries of one head, from position `start` on. Not waited for; the caller commits. */
template <int HD, int ROWS, int THREADS>
static __device__ inline void load_queries(uint16_t *q, uint16_t *dout, const spurion_attention_args &a, const spurion_seq *s, int start, int head)
{
    int hd = a.shape.head_dim;
    size_t column = (size_t)head * (size_t)hd;
    auto row_of = [=](int n) { return spurion_has_query(s, start + n) ? spurion_query_row(s, start + n) : -1; };
    spurion_load_tile<HD, ROWS, THREADS>(q, (const uint16_t *)a.q + column, a.q_stride, hd, a.whole, row_of);
    spurion_load_tile<HD, ROWS, THREADS>(dout, a.dout_act + (size_t)a.dout_step * column, (size_t)a.dout_step * a.q_stride, hd, a.whole, row_of);
}

/* lse in powers of two and delta of one query: a query that is not there gives every key the weight 2^-inf = 0. */
static __device__ inline void numbers_of(float *lse, float *delta, const spurion_attention_args &a, const spurion_seq *s, spurion_item_t item, int i, int head)
{
    *lse = INFINITY;
    *delta = 0.0f;
    if (spurion_has_query(s, i)) {
        *lse = a.lse[(size_t)spurion_query_row(s, i) * (size_t)a.shape.heads + (size_t)head] * SPURION_LOG2_E;
        *delta = a.work.delta[spurion_delta_at(s, item, i, a.shape.heads, head)];
    }
}

/* Weight and score gradient of one pair from its raw product and <dout, value>. */
static __device__ inline void pair_gradient(float *weight, float *gradient, float raw, float dp, float lse, float delta, bool seen, float unit,
                                            const spurion_attention_shape &a)
{
    float v = a.softcap > 0.0f ? spurion_score(raw, a) : raw;
    *weight = seen ? ptx_exp2(fmaf(v, unit, -lse)) : 0.0f;
    *gradient = spurion_score_gradient(*weight, v, dp, delta, a);
}

/* Row `row` of `half` of run m of results to memory, from column c0 on. */
template <int M, int TILES>
static __device__ inline void store_row(float *out, const float acc[M][TILES][4], int m, int half, int c0, int hd, bool pairs)
{
    int t = (int)(threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        int c = c0 + 8 * n + 2 * t;
        if (pairs && c < hd) {
            *(float2 *)(void *)(out + c) = make_float2(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
        } else if (c < hd) {
            out[c] = acc[m][n][2 * half];
            if (c + 1 < hd) {
                out[c + 1] = acc[m][n][2 * half + 1];
            }
        }
    }
}

/* --- dK, dV: a block of threads owns a block of keys of one key head --- */

enum { QUERIES = 64, KEY_WARPS = 8, KEY_THREADS = KEY_WARPS * SPURION_CUDA_WARP };

/* For the scores two warps stand above each other, 32 queries each, and four side by side; for the gradients each has 32 keys and a part of the
 * head's columns. Shared memory: K, V; Q, dout of each stage; weights and score gradients as (query, key); two numbers per query and stage. */
template <int HD, int STAGES> struct key_sizes {
    static constexpr int KEYS = HD <= 128 ? 128 : 64, LDP = KEYS + 8, SPAN = KEYS / 4, SCORES = SPAN / 8;
    static constexpr int DOWN = KEYS / 32, ACROSS = KEY_WARPS / DOWN, COLUMNS = HD / ACROSS / 8;
    static constexpr int KEY_TILE = KEYS * spurion_ld<HD>, QUERY_TILE = QUERIES * spurion_ld<HD>, WEIGHTS = QUERIES * LDP;
    static constexpr size_t BYTES = (size_t)(2 * KEY_TILE + STAGES * 2 * QUERY_TILE + 2 * WEIGHTS) * sizeof(uint16_t) + STAGES * 2 * QUERIES * sizeof(float);
};

template <int HD, int STAGES> struct key_room {
    typedef key_sizes<HD, STAGES> z;
    uint16_t *k, *v, *q, *dout, *p, *ds;
    float *lse, *delta;

    __device__ explicit key_room(unsigned char *shared)
    {
        k = (uint16_t *)(void *)shared;
        v = k + z::KEY_TILE, q = v + z::KEY_TILE, dout = q + STAGES * z::QUERY_TILE, p = dout + STAGES * z::QUERY_TILE, ds = p + z::WEIGHTS;
        lse = (float *)(void *)(ds + z::WEIGHTS);
        delta = lse + STAGES * QUERIES;
    }
};

/* The queries of a block of keys: every tile that sees it, each head of the group. */
typedef struct walk {
    int start, head;
} walk;

static __device__ inline bool walk_on(walk *w, const spurion_attention_args &a, const spurion_seq *s, int block, int keys, int kv_head)
{
    if (++w->head < (kv_head + 1) * a.group) {
        return true;
    }
    w->head = kv_head * a.group;
    do {
        w->start += QUERIES;
    } while (w->start < spurion_seq_end(s) && !spurion_tile_sees(s, w->start, QUERIES, block, keys, a.shape.window));
    return w->start < spurion_seq_end(s);
}

template <int HD, int STAGES>
static __device__ inline void walk_load(const key_room<HD, STAGES> &m, int stage, const spurion_attention_args &a, const spurion_seq *s, spurion_item_t item, walk w)
{
    load_queries<HD, QUERIES, KEY_THREADS>(m.q + stage * key_sizes<HD, STAGES>::QUERY_TILE, m.dout + stage * key_sizes<HD, STAGES>::QUERY_TILE, a, s, w.start,
                                           w.head);
    if (threadIdx.x < QUERIES) {
        int r = (int)threadIdx.x;
        numbers_of(&m.lse[stage * QUERIES + r], &m.delta[stage * QUERIES + r], a, s, item, w.start + r, w.head);
    }
}

/* Weights and score gradients of a tile of queries against the block of keys, to shared memory in bf16. */
template <int HD, int STAGES>
static __device__ inline void weigh(const key_room<HD, STAGES> &m, int stage, const spurion_attention_args &a, const spurion_seq *s, int start, int block)
{
    typedef key_sizes<HD, STAGES> z;
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), warp = (int)(threadIdx.x / SPURION_CUDA_WARP), g = lane / 4, t = lane % 4;
    int q0 = warp / 4 * 32, k0 = warp % 4 * z::SPAN;
    bool any = spurion_run_sees(s, start + q0, 32, block + k0, z::SPAN, a.shape.window);
    bool masked = spurion_run_masked(start + q0, 32, block + k0, z::SPAN, a.shape.window);
    float score[2][z::SCORES][4], dp[2][z::SCORES][4], unit = spurion_score_unit(a.shape);
    spurion_clear<2, z::SCORES>(score);
    spurion_clear<2, z::SCORES>(dp);
    if (any) { /* the same for the whole warp */
        spurion_mma_scores<HD, 2, z::SCORES>(score, m.q + stage * z::QUERY_TILE, q0, m.k, k0);
        spurion_mma_scores<HD, 2, z::SCORES>(dp, m.dout + stage * z::QUERY_TILE, q0, m.v, k0);
    }
#pragma unroll
    for (int row = 0; row < 4; row++) {
        int half = row % 2, r = q0 + 16 * (row / 2) + g + 8 * half;
        float lse = m.lse[stage * QUERIES + r], delta = m.delta[stage * QUERIES + r];
#pragma unroll
        for (int n = 0; n < z::SCORES; n++) {
            float weight[2], gradient[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                bool seen = any && (!masked || spurion_sees(start + r, block + k0 + 8 * n + 2 * t + e, a.shape.window));
                pair_gradient(&weight[e], &gradient[e], score[row / 2][n][2 * half + e], dp[row / 2][n][2 * half + e], lse, delta, seen, unit, a.shape);
            }
            int at = r * z::LDP + k0 + 8 * n + 2 * t;
            *(uint32_t *)(void *)(m.p + at) = ptx_bf16_pair(weight[0], weight[1]);
            *(uint32_t *)(void *)(m.ds + at) = ptx_bf16_pair(gradient[0], gradient[1]);
        }
    }
}

/* dV += weights^T . dout, dK += gradients^T . Q, of this warp's keys and columns. */
template <int HD, int STAGES>
static __device__ inline void add_gradients(float dk[2][key_sizes<HD, STAGES>::COLUMNS][4], float dv[2][key_sizes<HD, STAGES>::COLUMNS][4],
                                            const key_room<HD, STAGES> &m, int stage, int k0, int c0)
{
    typedef key_sizes<HD, STAGES> z;
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP);
#pragma unroll
    for (int q = 0; q < QUERIES; q += 16) {
        uint32_t weight[2][4], gradient[2][4];
        int at = (q + lane % 8 + lane / 16 * 8) * z::LDP + k0 + lane / 8 % 2 * 8; /* (query, key) read as (key, query) */
#pragma unroll
        for (int n = 0; n < 2; n++) {
            ptx_ldmatrix4_transposed(weight[n], m.p + at + 16 * n);
            ptx_ldmatrix4_transposed(gradient[n], m.ds + at + 16 * n);
        }
        spurion_mma_rows<HD, 2, z::COLUMNS>(dv, weight, m.dout + stage * z::QUERY_TILE, q, c0);
        spurion_mma_rows<HD, 2, z::COLUMNS>(dk, gradient, m.q + stage * z::QUERY_TILE, q, c0);
    }
}

template <int HD, int STAGES> static __global__ void __launch_bounds__(KEY_THREADS) keys_kernel(spurion_attention_args a)
{
    typedef key_sizes<HD, STAGES> z;
    SPURION_CUDA_SHARED(shared);
    const key_room<HD, STAGES> m(shared);
    const spurion_item_t item = a.work.blocks[blockIdx.x];
    const spurion_seq *s = &a.work.seqs[item.seq];
    int kv_head = (int)blockIdx.y, block = item.start, lane = (int)(threadIdx.x % SPURION_CUDA_WARP), warp = (int)(threadIdx.x / SPURION_CUDA_WARP);
    int k0 = warp / z::ACROSS * 32, c0 = warp % z::ACROSS * z::COLUMNS * 8;
    float dk[2][z::COLUMNS][4], dv[2][z::COLUMNS][4];
    walk w = {s->q_position / QUERIES * QUERIES - QUERIES, (kv_head + 1) * a.group};

    spurion_clear<2, z::COLUMNS>(dk);
    spurion_clear<2, z::COLUMNS>(dv);
    spurion_load_keys<HD, z::KEYS, KEY_THREADS>(m.k, m.v, a, s, block, kv_head);
    bool more = walk_on(&w, a, s, block, z::KEYS, kv_head);
    if (more) {
        walk_load<HD, STAGES>(m, 0, a, s, item, w);
    }
    ptx_copy_commit();
    for (int stage = 0; more; stage = (stage + 1) % STAGES) {
        int start = w.start;
        ptx_copy_wait<0>();
        __syncthreads(); /* queries (and keys) are there; weights, gradients and the other stage have been used */
        more = walk_on(&w, a, s, block, z::KEYS, kv_head);
        if (STAGES == 2 && more) {
            walk_load<HD, STAGES>(m, stage ^ 1, a, s, item, w);
        }
        weigh<HD, STAGES>(m, stage, a, s, start, block);
        __syncthreads(); /* weights and score gradients are there */
        add_gradients<HD, STAGES>(dk, dv, m, stage, k0, c0);
        if (STAGES == 1 && more) {
            __syncthreads(); /* the queries have been used */
            walk_load<HD, STAGES>(m, 0, a, s, item, w);
        }
        ptx_copy_commit();
    }
    ptx_copy_wait<0>(); /* where no query sees the block its keys were never waited for */
    bool pairs = a.whole && a.dkv_stride % 2 == 0;
#pragma unroll
    for (int row = 0; row < 4; row++) {
        int j = block + k0 + row / 2 * 16 + lane / 4 + row % 2 * 8;
        if (j >= s->dkv_position && j < spurion_seq_end(s)) {
            size_t at = (size_t)(s->dkv_row + j - s->dkv_position) * a.dkv_stride + (size_t)kv_head * (size_t)a.shape.head_dim;
            store_row<2, z::COLUMNS>(a.dk + at, dk, row / 2, row % 2, c0, a.shape.head_dim, pairs);
            store_row<2, z::COLUMNS>(a.dv + at, dv, row / 2, row % 2, c0, a.shape.head_dim, pairs);
        }
    }
}

/* --- dQ: a block of threads owns a tile of queries of one head, a warp 16 or 32 of them --- */

template <int HD, int WARPS> struct query_sizes {
    static constexpr int M = HD <= 128 ? 2 : 1, KEYS = 32, TILES = KEYS / 8, COLUMNS = HD / 8, THREADS = WARPS * SPURION_CUDA_WARP;
    static constexpr int ROWS = WARPS * 16 * M, QUERY_TILE = ROWS * spurion_ld<HD>, KEY_TILE = KEYS * spurion_ld<HD>;
    static constexpr size_t BYTES = (size_t)(2 * QUERY_TILE + 4 * KEY_TILE) * sizeof(uint16_t) + 2 * ROWS * sizeof(float);
};

/* Score gradients of the warp's queries against a block of keys, in place of their products. lse, delta: of the warp's first query onward. */
template <int HD, int WARPS>
static __device__ inline void bend(float score[query_sizes<HD, WARPS>::M][4][4], const float dp[query_sizes<HD, WARPS>::M][4][4],
                                   const float *lse, const float *delta, const spurion_attention_shape &a, int first, int block)
{
    constexpr int M = query_sizes<HD, WARPS>::M, KEYS = query_sizes<HD, WARPS>::KEYS;
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), g = lane / 4, t = lane % 4;
    bool masked = spurion_run_masked(first, 16 * M, block, KEYS, a.window);
    float unit = spurion_score_unit(a);
#pragma unroll
    for (int row = 0; row < 2 * M; row++) {
        int m = row / 2, half = row % 2, r = 16 * m + g + 8 * half;
        float query_lse = lse[r], query_delta = delta[r];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float weight, *v = &score[m][n][2 * half + e];
                bool seen = !masked || spurion_sees(first + r, block + 8 * n + 2 * t + e, a.window);
                pair_gradient(&weight, v, *v, dp[m][n][2 * half + e], query_lse, query_delta, seen, unit, a);
            }
        }
    }
}

template <int HD, int WARPS> static __global__ void __launch_bounds__(query_sizes<HD, WARPS>::THREADS) queries_kernel(spurion_attention_args a)
{
    typedef query_sizes<HD, WARPS> z;
    SPURION_CUDA_SHARED(shared);
    uint16_t *q = (uint16_t *)(void *)shared, *dout = q + z::QUERY_TILE, *k = dout + z::QUERY_TILE, *v = k + 2 * z::KEY_TILE; /* two stages of keys */
    const spurion_item_t item = a.work.tiles[a.work.tile_count - 1 - (int)blockIdx.x]; /* the longest of a seq first */
    const spurion_seq *s = &a.work.seqs[item.seq];
    int head = (int)blockIdx.y, start = item.start, lane = (int)(threadIdx.x % SPURION_CUDA_WARP);
    int warp_row = (int)(threadIdx.x / SPURION_CUDA_WARP) * 16 * z::M, first = start + warp_row;
    int block = spurion_first_key(spurion_tile_first(s, start), a.shape.window) / z::KEYS * z::KEYS, last = spurion_tile_last(s, start, z::ROWS);
    float dq[z::M][z::COLUMNS][4], *lse = (float *)(void *)(v + 2 * z::KEY_TILE), *delta = lse + z::ROWS;

    spurion_clear<z::M, z::COLUMNS>(dq);
    for (int r = (int)threadIdx.x; r < z::ROWS; r += z::THREADS) {
        numbers_of(&lse[r], &delta[r], a, s, item, start + r, head);
    }
    load_queries<HD, z::ROWS, z::THREADS>(q, dout, a, s, start, head);
    spurion_load_keys<HD, z::KEYS, z::THREADS>(k, v, a, s, block, head / a.group);
    ptx_copy_commit();
    for (int stage = 0; block <= last; block += z::KEYS, stage ^= 1) {
        ptx_copy_wait<0>();
        __syncthreads(); /* this block (and the queries) are there; the other stage has been used */
        if (block + z::KEYS <= last) {
            spurion_load_keys<HD, z::KEYS, z::THREADS>(k + (stage ^ 1) * z::KEY_TILE, v + (stage ^ 1) * z::KEY_TILE, a, s, block + z::KEYS, head / a.group);
        }
        ptx_copy_commit();
        if (!spurion_run_sees(s, first, 16 * z::M, block, z::KEYS, a.shape.window)) {
            continue; /* the whole warp */
        }
        float score[z::M][z::TILES][4], dp[z::M][z::TILES][4];
        spurion_mma_scores<HD, z::M, z::TILES>(score, q, warp_row, k + stage * z::KEY_TILE, 0);
        spurion_mma_scores<HD, z::M, z::TILES>(dp, dout, warp_row, v + stage * z::KEY_TILE, 0);
        bend<HD, WARPS>(score, dp, lse + warp_row, delta + warp_row, a.shape, first, block);
#pragma unroll
        for (int n = 0; n < z::KEYS / 16; n++) {
            uint32_t gradient[z::M][4];
            spurion_as_factor<z::M, z::TILES>(gradient, score, n);
            spurion_mma_rows<HD, z::M, z::COLUMNS>(dq, gradient, k + stage * z::KEY_TILE, 16 * n, 0);
        }
    }
    ptx_copy_wait<0>();
#pragma unroll
    for (int row = 0; row < 2 * z::M; row++) {
        int i = first + row / 2 * 16 + lane / 4 + row % 2 * 8;
        if (spurion_has_query(s, i)) {
            size_t at = (size_t)spurion_query_row(s, i) * a.q_stride + (size_t)head * (size_t)a.shape.head_dim;
            store_row<z::M, z::COLUMNS>(a.dq + at, dq, row / 2, row % 2, 0, a.shape.head_dim, a.whole);
        }
    }
}

/* --- host --- */

static spurion_status launch_delta(spurion_cuda *cuda, const spurion_attention_args *a, int tile)
{
    dim3 grid((unsigned)a->work.tile_count, (unsigned)a->shape.heads);
    SPURION_CUDA(cuda, spurion_cuda_launch(cuda, delta_kernel, grid, SPURION_CUDA_THREADS, 0, *a, tile));
    return spurion_ok();
}

template <int HD, int STAGES, int WARPS>
static spurion_status backward(spurion_cuda *cuda, spurion_attention_args *a, const spurion_seq *seqs, int seq_count)
{
    constexpr size_t key_bytes = key_sizes<HD, STAGES>::BYTES, query_bytes = query_sizes<HD, WARPS>::BYTES;
    constexpr int rows = query_sizes<HD, WARPS>::ROWS;
    SPURION_CUDA_DO(spurion_attention_allow(cuda, keys_kernel<HD, STAGES>, key_bytes, HD));
    SPURION_CUDA_DO(spurion_attention_allow(cuda, queries_kernel<HD, WARPS>, query_bytes, HD));
    SPURION_CUDA_DO(spurion_attention_work(&a->work, cuda, seqs, seq_count, a->shape.heads, rows, key_sizes<HD, STAGES>::KEYS));
    if (a->work.tile_count == 0) {
        return spurion_ok();
    }
    SPURION_CUDA_DO(launch_delta(cuda, a, rows));
    if (a->work.block_count > 0) {
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, keys_kernel<HD, STAGES>, dim3((unsigned)a->work.block_count, (unsigned)a->shape.kv_heads), KEY_THREADS,
                                               key_bytes, *a));
    }
    SPURION_CUDA(cuda, spurion_cuda_launch(cuda, queries_kernel<HD, WARPS>, dim3((unsigned)a->work.tile_count, (unsigned)a->shape.heads),
                                           query_sizes<HD, WARPS>::THREADS, query_bytes, *a));
    return spurion_ok();
}

/* Two stages of queries, and eight warps on a tile of wide heads, where a block may have the shared memory (sm_90), else less of both (sm_80). */
template <int HD> static spurion_status backward_bf16(spurion_cuda *cuda, spurion_attention_args *a, const spurion_seq *seqs, int seq_count)
{
    constexpr int WIDE = HD <= 128 ? 4 : 8;
    bool room = key_sizes<HD, 2>::BYTES <= cuda->shared_max && query_sizes<HD, WIDE>::BYTES <= cuda->shared_max;
    return room ? backward<HD, 2, WIDE>(cuda, a, seqs, seq_count) : backward<HD, 1, 4>(cuda, a, seqs, seq_count);
}

static spurion_status backward_f32(spurion_cuda *cuda, spurion_attention_args *a, const spurion_seq *seqs, int seq_count)
{
    SPURION_CUDA_DO(spurion_attention_work(&a->work, cuda, seqs, seq_count, a->shape.heads, SPURION_F32_BACK, SPURION_F32_BACK));
    if (a->work.tile_count == 0) {
        return spurion_ok();
    }
    SPURION_CUDA_DO(launch_delta(cuda, a, SPURION_F32_BACK));
    return spurion_attention_backward_f32(cuda, a);
}

static spurion_status run(spurion_cuda *cuda, spurion_attention_args *a, const spurion_seq *seqs, int seq_count)
{
    int hd = a->shape.head_dim;
    return a->dtype == SPURION_F32 ? backward_f32(cuda, a, seqs, seq_count)
           : hd <= 64              ? backward_bf16<64>(cuda, a, seqs, seq_count)
           : hd <= 80              ? backward_bf16<80>(cuda, a, seqs, seq_count)
           : hd <= 96              ? backward_bf16<96>(cuda, a, seqs, seq_count)
           : hd <= 128             ? backward_bf16<128>(cuda, a, seqs, seq_count)
           : hd <= 192             ? backward_bf16<192>(cuda, a, seqs, seq_count)
                                   : backward_bf16<256>(cuda, a, seqs, seq_count);
}

extern "C" spurion_status spurion_cuda_attention_backward(spurion_dev *dev, float *dq, float *dk, float *dv, int dkv_stride, const void *dout,
                                                          spurion_dtype dout_type, const void *out, const float *lse, const void *q, const void *k, const void *v,
                                                          const spurion_seq *seqs, int seq_count, spurion_attention_shape shape)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    SPURION_CUDA_DO(spurion_attention_check(shape));
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    spurion_attention_args a = {};
    a.shape = shape;
    a.group = shape.heads / shape.kv_heads;
    a.q = q, a.k = k, a.v = v, a.out = out, a.lse = lse, a.dout = dout;
    a.dq = dq, a.dk = dk, a.dv = dv;
    a.dout_type = dout_type;
    a.dout_act = dout_type == SPURION_BF16 ? (const uint16_t *)dout : (const uint16_t *)(const void *)dq;
    a.dout_step = dout_type == SPURION_BF16 ? 1 : 2;
    a.q_stride = (size_t)shape.heads * (size_t)shape.head_dim;
    a.kv_stride = (size_t)shape.kv_heads * (size_t)shape.head_dim;
    a.dkv_stride = (size_t)dkv_stride;
    a.whole = shape.head_dim % 8 == 0 && spurion_cuda_aligned(q, 16) && spurion_cuda_aligned(k, 16) && spurion_cuda_aligned(v, 16) &&
              spurion_cuda_aligned(dout, 16) && spurion_cuda_aligned(out, 16) && spurion_cuda_aligned(dq, 16) && spurion_cuda_aligned(dk, 16) &&
              spurion_cuda_aligned(dv, 16);
    a.dtype = dev->dtype;
    SPURION_CUDA_DO(run(cuda, &a, seqs, seq_count));
    double pairs = spurion_attention_pairs(seqs, seq_count, shape.window) * shape.heads;
    return spurion_cuda_end(cuda, SPURION_CLASS_ATTENTION, 10 * pairs * shape.head_dim,
                            pairs / SPURION_BLOCK * 4 * shape.head_dim * (double)spurion_dtype_bytes(dev->dtype));
}

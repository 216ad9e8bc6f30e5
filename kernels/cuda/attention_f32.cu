/* Attention in f32, forward and backward: fused multiply-adds from shared memory, for `dtype: f32`, where exactness is wanted and speed is
 * not. The same tiles, blocks and order as in bf16, smaller.     Thread: engine. Memory: the device's work block; shared memory. */
#include "kernels/cuda/attention.cuh"

enum {
    ROWS = SPURION_F32_TILE,
    KEYS = SPURION_BLOCK,
    THREADS = 256,
    FORWARD_LANES = THREADS / ROWS, /* threads of one query: half a warp */
    SCORES = KEYS / FORWARD_LANES,
    COLUMNS = SPURION_CUDA_HEAD_DIM_MAX / FORWARD_LANES,
    BACK = SPURION_F32_BACK,
    BACK_LANES = THREADS / BACK,
    BACK_SCORES = BACK / BACK_LANES,
    BACK_COLUMNS = SPURION_CUDA_HEAD_DIM_MAX / BACK_LANES
};

/* (count, hd + 1) f32 in shared memory from rows row_of(r), zeros where that is negative. The odd stride keeps banks apart. */
template <typename ROW_OF> static __device__ inline void load_rows(float *out, const float *in, size_t stride, int hd, int count, ROW_OF row_of)
{
    for (int n = (int)threadIdx.x; n < count * hd; n += THREADS) {
        int r = n / hd, c = n % hd, row = row_of(r);
        out[r * (hd + 1) + c] = row < 0 ? 0.0f : in[(size_t)row * stride + (size_t)c];
    }
}

static __device__ inline float dot(const float *a, const float *b, int n)
{
    float sum = 0.0f;
    for (int i = 0; i < n; i++) {
        sum = fmaf(a[i], b[i], sum);
    }
    return sum;
}

/* The largest, and the sum, over a query's half warp. */
static __device__ inline float lanes_max(float v)
{
    for (int mask = FORWARD_LANES / 2; mask > 0; mask /= 2) {
        v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, mask));
    }
    return v;
}

static __device__ inline float lanes_sum(float v)
{
    for (int mask = FORWARD_LANES / 2; mask > 0; mask /= 2) {
        v += __shfl_xor_sync(0xffffffffu, v, mask);
    }
    return v;
}

static __global__ void __launch_bounds__(THREADS) forward_kernel(spurion_attention_args a)
{
    SPURION_CUDA_SHARED(shared);
    int hd = a.shape.head_dim, ld = hd + 1, head = (int)blockIdx.y, r = (int)threadIdx.x / FORWARD_LANES, lane = (int)threadIdx.x % FORWARD_LANES;
    float *q = (float *)(void *)shared, *kv = q + ROWS * ld, *weights = kv + KEYS * ld;
    const spurion_item_t item = a.work.tiles[a.work.tile_count - 1 - (int)blockIdx.x];
    const spurion_seq *s = &a.work.seqs[item.seq];
    int i = item.start + r, end = spurion_seq_end(s), last = spurion_tile_last(s, item.start, ROWS);
    size_t q_column = (size_t)head * (size_t)hd, kv_column = (size_t)(head / a.group) * (size_t)hd;
    float acc[COLUMNS] = {0}, top = -INFINITY, sum = 0.0f;

    load_rows(q, (const float *)a.q + q_column, a.q_stride, hd, ROWS,
              [=](int n) { return spurion_has_query(s, item.start + n) ? spurion_query_row(s, item.start + n) : -1; });
    for (int block = spurion_first_key(spurion_tile_first(s, item.start), a.shape.window) / KEYS * KEYS; block <= last; block += KEYS) {
        auto row_of = [=](int n) { return block + n < end ? spurion_key_row(s, block + n) : -1; };
        float score[SCORES], most = -INFINITY, part = 0.0f;
        __syncthreads(); /* the previous block's values have been used */
        load_rows(kv, (const float *)a.k + kv_column, a.kv_stride, hd, KEYS, row_of);
        __syncthreads();
        for (int n = 0; n < SCORES; n++) {
            int j = lane + n * FORWARD_LANES;
            score[n] = spurion_sees(i, block + j, a.shape.window) ? spurion_score(dot(q + r * ld, kv + j * ld, hd), a.shape) : -INFINITY;
            most = fmaxf(most, score[n]);
        }
        most = fmaxf(top, lanes_max(most));
        float base = most == -INFINITY ? 0.0f : most, factor = most == top ? 1.0f : expf(top - base);
        for (int n = 0; n < SCORES; n++) {
            float w = expf(score[n] - base);
            weights[r * (KEYS + 1) + lane + n * FORWARD_LANES] = w;
            part += w;
        }
        top = most;
        sum = sum * factor + lanes_sum(part);
        __syncthreads(); /* the keys have been used, the weights are there */
        load_rows(kv, (const float *)a.v + kv_column, a.kv_stride, hd, KEYS, row_of);
        __syncthreads();
        for (int n = 0; n < COLUMNS; n++) {
            int c = lane + n * FORWARD_LANES;
            acc[n] *= factor;
            for (int j = 0; j < KEYS && c < hd; j++) {
                acc[n] = fmaf(weights[r * (KEYS + 1) + j], kv[j * ld + c], acc[n]);
            }
        }
    }
    if (!spurion_has_query(s, i)) {
        return;
    }
    size_t row = (size_t)spurion_query_row(s, i);
    for (int n = 0; n < COLUMNS; n++) {
        int c = lane + n * FORWARD_LANES;
        if (c < hd) {
            ((float *)a.out_act)[row * a.q_stride + q_column + (size_t)c] = acc[n] / sum;
        }
    }
    if (lane == 0) {
        a.lse_out[row * (size_t)a.shape.heads + (size_t)head] = top + logf(sum);
    }
}

spurion_status spurion_attention_f32(spurion_cuda *cuda, spurion_attention_args *a, const spurion_seq *seqs, int seq_count)
{
    size_t ld = (size_t)a->shape.head_dim + 1, bytes = ((ROWS + KEYS) * ld + ROWS * (KEYS + 1)) * sizeof(float);
    SPURION_CUDA_DO(spurion_attention_allow(cuda, forward_kernel, bytes, a->shape.head_dim));
    SPURION_CUDA_DO(spurion_attention_work(&a->work, cuda, seqs, seq_count, a->shape.heads, ROWS, 0));
    if (a->work.tile_count > 0) {
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, forward_kernel, dim3((unsigned)a->work.tile_count, (unsigned)a->shape.heads), THREADS, bytes, *a));
    }
    return spurion_ok();
}

/* --- backward --- */

/* Shared memory: four tiles (BACK, hd + 1), weights and score gradients (BACK, BACK + 1) as (query, key), two numbers per query. */
typedef struct back_tiles {
    float *q, *dout, *k, *v, *p, *ds, *lse, *delta;
} back_tiles;

static size_t back_bytes(int hd)
{
    return (4 * BACK * (size_t)(hd + 1) + 2 * BACK * (BACK + 1) + 2 * BACK) * sizeof(float);
}

static __device__ inline back_tiles place(unsigned char *shared, int hd)
{
    back_tiles m;
    int tile = BACK * (hd + 1);
    m.q = (float *)(void *)shared;
    m.dout = m.q + tile, m.k = m.dout + tile, m.v = m.k + tile, m.p = m.v + tile;
    m.ds = m.p + BACK * (BACK + 1), m.lse = m.ds + BACK * (BACK + 1), m.delta = m.lse + BACK;
    return m;
}

static __device__ inline void load_queries(const back_tiles &m, const spurion_attention_args &a, const spurion_seq *s, spurion_item_t item, int start, int head)
{
    int hd = a.shape.head_dim;
    size_t column = (size_t)head * (size_t)hd;
    auto row_of = [=](int n) { return spurion_has_query(s, start + n) ? spurion_query_row(s, start + n) : -1; };
    load_rows(m.q, (const float *)a.q + column, a.q_stride, hd, BACK, row_of);
    load_rows(m.dout, (const float *)a.dout + column, a.q_stride, hd, BACK, row_of);
    if (threadIdx.x < BACK) {
        int r = (int)threadIdx.x, row = row_of(r);
        m.lse[r] = row < 0 ? 0.0f : a.lse[(size_t)row * (size_t)a.shape.heads + (size_t)head];
        m.delta[r] = row < 0 ? 0.0f : a.work.delta[spurion_delta_at(s, item, start + r, a.shape.heads, head)];
    }
}

static __device__ inline void load_keys(const back_tiles &m, const spurion_attention_args &a, const spurion_seq *s, int block, int kv_head)
{
    int end = spurion_seq_end(s), hd = a.shape.head_dim;
    size_t column = (size_t)kv_head * (size_t)hd;
    auto row_of = [=](int n) { return block + n < end ? spurion_key_row(s, block + n) : -1; };
    load_rows(m.k, (const float *)a.k + column, a.kv_stride, hd, BACK, row_of);
    load_rows(m.v, (const float *)a.v + column, a.kv_stride, hd, BACK, row_of);
}

/* Weights and score gradients of a tile of queries against a block of keys, to shared memory. */
static __device__ inline void score_gradients(const back_tiles &m, const spurion_attention_args &a, const spurion_seq *s, int start, int block)
{
    int hd = a.shape.head_dim, ld = hd + 1, r = (int)threadIdx.x / BACK_LANES, lane = (int)threadIdx.x % BACK_LANES, i = start + r;
    bool there = spurion_has_query(s, i);
    for (int n = 0; n < BACK_SCORES; n++) {
        int j = lane + n * BACK_LANES;
        float weight = 0.0f, gradient = 0.0f;
        if (there && spurion_sees(i, block + j, a.shape.window)) {
            float score = spurion_score(dot(m.q + r * ld, m.k + j * ld, hd), a.shape);
            weight = expf(score - m.lse[r]);
            gradient = spurion_score_gradient(weight, score, dot(m.dout + r * ld, m.v + j * ld, hd), m.delta[r], a.shape);
        }
        m.p[r * (BACK + 1) + j] = weight;
        m.ds[r * (BACK + 1) + j] = gradient;
    }
}

static __global__ void __launch_bounds__(THREADS) keys_kernel(spurion_attention_args a)
{
    SPURION_CUDA_SHARED(shared);
    int hd = a.shape.head_dim, ld = hd + 1, kv_head = (int)blockIdx.y, j = (int)threadIdx.x / BACK_LANES, lane = (int)threadIdx.x % BACK_LANES;
    const back_tiles m = place(shared, hd);
    const spurion_item_t item = a.work.blocks[blockIdx.x];
    const spurion_seq *s = &a.work.seqs[item.seq];
    int block = item.start, end = spurion_seq_end(s), key = block + j;
    float dk[BACK_COLUMNS] = {0}, dv[BACK_COLUMNS] = {0};

    load_keys(m, a, s, block, kv_head);
    for (int start = s->q_position / BACK * BACK; start < end; start += BACK) {
        if (!spurion_tile_sees(s, start, BACK, block, BACK, a.shape.window)) {
            continue;
        }
        for (int head = kv_head * a.group; head < (kv_head + 1) * a.group; head++) {
            __syncthreads(); /* the previous queries have been used */
            load_queries(m, a, s, item, start, head);
            __syncthreads();
            score_gradients(m, a, s, start, block);
            __syncthreads();
            for (int n = 0; n < BACK_COLUMNS; n++) {
                int c = lane + n * BACK_LANES;
                for (int r = 0; r < BACK && c < hd; r++) {
                    dv[n] = fmaf(m.p[r * (BACK + 1) + j], m.dout[r * ld + c], dv[n]);
                    dk[n] = fmaf(m.ds[r * (BACK + 1) + j], m.q[r * ld + c], dk[n]);
                }
            }
        }
    }
    if (key < s->dkv_position || key >= end) {
        return;
    }
    size_t at = (size_t)(s->dkv_row + key - s->dkv_position) * a.dkv_stride + (size_t)kv_head * (size_t)hd;
    for (int n = 0; n < BACK_COLUMNS; n++) {
        int c = lane + n * BACK_LANES;
        if (c < hd) {
            a.dk[at + (size_t)c] = dk[n];
            a.dv[at + (size_t)c] = dv[n];
        }
    }
}

static __global__ void __launch_bounds__(THREADS) queries_kernel(spurion_attention_args a)
{
    SPURION_CUDA_SHARED(shared);
    int hd = a.shape.head_dim, ld = hd + 1, head = (int)blockIdx.y, r = (int)threadIdx.x / BACK_LANES, lane = (int)threadIdx.x % BACK_LANES;
    const back_tiles m = place(shared, hd);
    const spurion_item_t item = a.work.tiles[a.work.tile_count - 1 - (int)blockIdx.x];
    const spurion_seq *s = &a.work.seqs[item.seq];
    int start = item.start, last = spurion_tile_last(s, start, BACK);
    float dq[BACK_COLUMNS] = {0};

    load_queries(m, a, s, item, start, head);
    for (int block = spurion_first_key(spurion_tile_first(s, start), a.shape.window) / BACK * BACK; block <= last; block += BACK) {
        __syncthreads(); /* the previous keys have been used */
        load_keys(m, a, s, block, head / a.group);
        __syncthreads();
        score_gradients(m, a, s, start, block);
        __syncthreads();
        for (int n = 0; n < BACK_COLUMNS; n++) {
            int c = lane + n * BACK_LANES;
            for (int j = 0; j < BACK && c < hd; j++) {
                dq[n] = fmaf(m.ds[r * (BACK + 1) + j], m.k[j * ld + c], dq[n]);
            }
        }
    }
    if (!spurion_has_query(s, start + r)) {
        return;
    }
    size_t at = (size_t)spurion_query_row(s, start + r) * a.q_stride + (size_t)head * (size_t)hd;
    for (int n = 0; n < BACK_COLUMNS; n++) {
        int c = lane + n * BACK_LANES;
        if (c < hd) {
            a.dq[at + (size_t)c] = dq[n];
        }
    }
}

spurion_status spurion_attention_backward_f32(spurion_cuda *cuda, const spurion_attention_args *a)
{
    size_t bytes = back_bytes(a->shape.head_dim);
    SPURION_CUDA_DO(spurion_attention_allow(cuda, keys_kernel, bytes, a->shape.head_dim));
    SPURION_CUDA_DO(spurion_attention_allow(cuda, queries_kernel, bytes, a->shape.head_dim));
    if (a->work.block_count > 0) {
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, keys_kernel, dim3((unsigned)a->work.block_count, (unsigned)a->shape.kv_heads), THREADS, bytes, *a));
    }
    SPURION_CUDA(cuda, spurion_cuda_launch(cuda, queries_kernel, dim3((unsigned)a->work.tile_count, (unsigned)a->shape.heads), THREADS, bytes, *a));
    return spurion_ok();
}

/* Attention forward in bf16: FlashAttention-2's scheme (Dao 2023) over pieces. One block of four warps takes a tile of 64 queries of one head;
 * keys come in blocks of 64; products on tensor cores (mma m16n8k16), softmax in f32 along the way. The next keys are under way while the
 * softmax runs, the values while the scores are made.          Thread: engine. Memory: the device's work block; shared memory. */
#include "kernels/cuda/attention.cuh"

enum { WARPS = 4, THREADS = WARPS * SPURION_CUDA_WARP, KEY_TILES = SPURION_BLOCK / 8 };

/* What a thread keeps of its two rows, g and g + 8 of the warp's 16. */
typedef struct running {
    float top[2], sum[2];
} running;

/* Scores to weights of one block, in place; the factors for what was summed before. first: position of row 0; block: of key 0. */
static __device__ inline void soften(float s[KEY_TILES][4], float factor[2], running *r, const spurion_attention_shape &a, int first, int block)
{
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int i = first + g + 8 * half;
        float top = r->top[half], sum = 0.0f;
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float *v = &s[n][2 * half + e];
                *v = spurion_sees(i, block + 8 * n + 2 * t + e, a.window) ? spurion_score(*v, a) : -INFINITY;
                top = fmaxf(top, *v);
            }
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        float base = top == -INFINITY ? 0.0f : top; /* nothing seen yet: every weight is 2^-inf = 0 */
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float *v = &s[n][2 * half + e];
                *v = ptx_exp2((*v - base) * SPURION_LOG2_E);
                sum += *v;
            }
        }
        factor[half] = top == r->top[half] ? 1.0f : ptx_exp2((r->top[half] - base) * SPURION_LOG2_E);
        r->top[half] = top;
        r->sum[half] = r->sum[half] * factor[half] + sum; /* this lane's share */
    }
}

/* acc (16, HD) = acc factor + weights . values */
template <int HD> static __device__ inline void add_values(float acc[HD / 8][4], const float s[KEY_TILES][4], const float factor[2], const uint16_t *v)
{
#pragma unroll
    for (int n = 0; n < HD / 8; n++) {
        acc[n][0] *= factor[0], acc[n][1] *= factor[0], acc[n][2] *= factor[1], acc[n][3] *= factor[1];
    }
#pragma unroll
    for (int k = 0; k < SPURION_BLOCK / 16; k++) { /* a score's place as a result is its place as an input */
        uint32_t a[4] = {ptx_bf16_pair(s[2 * k][0], s[2 * k][1]), ptx_bf16_pair(s[2 * k][2], s[2 * k][3]), ptx_bf16_pair(s[2 * k + 1][0], s[2 * k + 1][1]),
                         ptx_bf16_pair(s[2 * k + 1][2], s[2 * k + 1][3])};
        spurion_mma_rows<HD / 8, HD + 8>(acc, a, v, 16 * k, 0);
    }
}

/* Values over their sums, and lse, to the rows that the seq has. */
template <int HD>
static __device__ inline void write_rows(const float acc[HD / 8][4], const running *r, const spurion_attention_args &a, const spurion_seq *s, int head, int first)
{
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), g = lane / 4, t = lane % 4, hd = a.shape.head_dim;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int i = first + g + 8 * half;
        float sum = r->sum[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (!spurion_has_query(s, i)) {
            continue;
        }
        size_t row = (size_t)spurion_query_row(s, i);
        uint16_t *out = (uint16_t *)a.out_act + row * a.q_stride + (size_t)head * (size_t)hd;
#pragma unroll
        for (int n = 0; n < HD / 8; n++) {
            int c = 8 * n + 2 * t;
            uint32_t pair = ptx_bf16_pair(acc[n][2 * half] / sum, acc[n][2 * half + 1] / sum);
            if (a.whole && c < hd) {
                *(uint32_t *)(void *)(out + c) = pair;
            } else if (c < hd) {
                out[c] = (uint16_t)(pair & 0xffffu);
                if (c + 1 < hd) {
                    out[c + 1] = (uint16_t)(pair >> 16);
                }
            }
        }
        if (t == 0) {
            a.lse_out[row * (size_t)a.shape.heads + (size_t)head] = r->top[half] + logf(sum);
        }
    }
}

template <int HD> static __global__ void __launch_bounds__(THREADS) forward_kernel(spurion_attention_args a)
{
    constexpr int LD = HD + 8;
    SPURION_CUDA_SHARED(shared);
    uint16_t *q = (uint16_t *)(void *)shared, *k = q + SPURION_BLOCK * LD, *v = k + SPURION_BLOCK * LD;
    const spurion_item_t item = a.work.tiles[a.work.tile_count - 1 - (int)blockIdx.x]; /* the longest of a seq first */
    const spurion_seq *s = &a.work.seqs[item.seq];
    int head = (int)blockIdx.y, hd = a.shape.head_dim, warp_row = (int)(threadIdx.x / SPURION_CUDA_WARP) * 16, end = spurion_seq_end(s);
    size_t kv_column = (size_t)(head / a.group) * (size_t)hd;
    const uint16_t *keys = (const uint16_t *)a.k + kv_column, *values = (const uint16_t *)a.v + kv_column;
    int begin = spurion_first_key(spurion_tile_first(s, item.start), a.shape.window) / SPURION_BLOCK * SPURION_BLOCK;
    int last = spurion_tile_last(s, item.start, SPURION_BLOCK);
    float acc[HD / 8][4], scores[KEY_TILES][4], factor[2];
    running r = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};

#pragma unroll
    for (int n = 0; n < HD / 8; n++) {
        acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
    }
    spurion_load_tile<HD, THREADS>(q, (const uint16_t *)a.q + (size_t)head * (size_t)hd, a.q_stride, hd, a.whole,
                                   [=](int n) { return spurion_has_query(s, item.start + n) ? spurion_query_row(s, item.start + n) : -1; });
    spurion_load_tile<HD, THREADS>(k, keys, a.kv_stride, hd, a.whole, [=](int n) { return begin + n < end ? spurion_key_row(s, begin + n) : -1; });
    ptx_copy_commit();
    for (int block = begin; block <= last; block += SPURION_BLOCK) {
        ptx_copy_wait<0>();
        __syncthreads(); /* keys (and queries) are there; the previous block's values have been used */
        spurion_load_tile<HD, THREADS>(v, values, a.kv_stride, hd, a.whole, [=](int n) { return block + n < end ? spurion_key_row(s, block + n) : -1; });
        ptx_copy_commit();
        spurion_mma_scores<HD, KEY_TILES>(scores, q, warp_row, k, 0);
        __syncthreads(); /* the keys have been used */
        int next = block + SPURION_BLOCK;
        if (next <= last) {
            spurion_load_tile<HD, THREADS>(k, keys, a.kv_stride, hd, a.whole, [=](int n) { return next + n < end ? spurion_key_row(s, next + n) : -1; });
        }
        ptx_copy_commit();
        soften(scores, factor, &r, a.shape, item.start + warp_row, block);
        ptx_copy_wait<1>();
        __syncthreads(); /* the values are there; the next keys may still be under way */
        add_values<HD>(acc, scores, factor, v);
    }
    ptx_copy_wait<0>();
    write_rows<HD>(acc, &r, a, s, head, item.start + warp_row);
}

template <int HD> static spurion_status forward(spurion_cuda *cuda, const spurion_attention_args *a)
{
    size_t bytes = 3 * (size_t)SPURION_BLOCK * (HD + 8) * sizeof(uint16_t);
    SPURION_CUDA_DO(spurion_attention_allow(cuda, forward_kernel<HD>, bytes, HD));
    SPURION_CUDA(cuda, spurion_cuda_launch(cuda, forward_kernel<HD>, dim3((unsigned)a->work.tile_count, (unsigned)a->shape.heads), THREADS, bytes, *a));
    return spurion_ok();
}

static spurion_status forward_bf16(spurion_cuda *cuda, const spurion_attention_args *a)
{
    int hd = a->shape.head_dim;
    return hd <= 64    ? forward<64>(cuda, a)
           : hd <= 80  ? forward<80>(cuda, a)
           : hd <= 96  ? forward<96>(cuda, a)
           : hd <= 128 ? forward<128>(cuda, a)
           : hd <= 192 ? forward<192>(cuda, a)
                       : forward<256>(cuda, a);
}

extern "C" spurion_status spurion_cuda_attention(spurion_dev *dev, void *out, float *lse, const void *q, const void *k, const void *v,
                                                 const spurion_seq *seqs, int seq_count, spurion_attention_shape shape)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    SPURION_CUDA_DO(spurion_attention_check(shape));
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    bool narrow = dev->dtype == SPURION_BF16;
    spurion_attention_args a = {};
    SPURION_CUDA_DO(spurion_attention_work(&a.work, cuda, seqs, seq_count, shape.heads, narrow ? SPURION_BLOCK : SPURION_F32_TILE, 0));
    a.shape = shape;
    a.group = shape.heads / shape.kv_heads;
    a.q = q, a.k = k, a.v = v, a.out_act = out, a.lse_out = lse;
    a.q_stride = (size_t)shape.heads * (size_t)shape.head_dim;
    a.kv_stride = (size_t)shape.kv_heads * (size_t)shape.head_dim;
    a.whole = shape.head_dim % 8 == 0 && spurion_cuda_aligned(q, 16) && spurion_cuda_aligned(k, 16) && spurion_cuda_aligned(v, 16) &&
              spurion_cuda_aligned(out, 16);
    a.dtype = dev->dtype;
    if (a.work.tile_count > 0) {
        SPURION_CUDA_DO(narrow ? forward_bf16(cuda, &a) : spurion_attention_f32(cuda, &a));
    }
    double pairs = spurion_attention_pairs(seqs, seq_count, shape.window) * shape.heads;
    return spurion_cuda_end(cuda, SPURION_CLASS_ATTENTION, 4 * pairs * shape.head_dim,
                            pairs / SPURION_BLOCK * 2 * shape.head_dim * (double)spurion_dtype_bytes(dev->dtype));
}

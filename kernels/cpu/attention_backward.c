/* Attention backward, weights recomputed from lse. With P = exp(s - lse), delta = sum_d dout out:
 *   dV = P^T dout;  dS = P (dout V^T - delta) scale [1 - (s / cap)^2];  dQ = dS K;  dK = dS^T Q      (Dao et al. 2022, section B.2)
 * One item: one key head of one seq, all its query heads, so that no two workers add to one place and every sum has one order:
 * key blocks outside, tiles of queries (aligned to positions, so that company cannot move them) inside.
 * Thread: pool workers. Memory: the workers' scratch. */
#include "kernels/cpu/attention.h"

static void place_scratch(back_state *b, const back_job *j, char *scratch)
{
    size_t block = (size_t)KEYS * (size_t)j->width;
    b->keys = (float *)(void *)scratch;
    b->keys_t = b->keys + block;
    b->values_t = b->keys_t + block;
    b->dk = b->values_t + block;
    b->dv = b->dk + block;
    b->q = b->dv + block;
    b->dout = b->q + block;
    b->dq = b->dout + block;
    b->p = b->dq + block;
    b->ds = b->p + QUERIES * KEYS;
}

/* <dout, out> of one query and head. */
static float row_delta(const back_job *j, const float *dout, size_t at)
{
    vf sum = v_set(0.0f);
    for (int c = 0; c < j->shape.head_dim; c += VW) {
        sum = v_fma(v_load(dout + c), v_load_act(j->out, at + (size_t)c, j->shape.head_dim - c, j->dtype), sum);
    }
    return v_sum(sum);
}

/* Queries first .. first + count - 1 of one head against the block. */
static void back_tile(back_state *b, const back_job *j, int head, int tile, int first, int count)
{
    int w = j->width, hd = j->shape.head_dim, window = j->shape.window;
    size_t stride = (size_t)j->shape.heads * (size_t)hd, row = (size_t)(b->seq->q_row + first - b->seq->q_position);
    size_t at = row * stride + (size_t)head * (size_t)hd;
    (void)tile;

    attention_load(b->q, w, j->q, at, stride, count, hd, j->dtype);
    attention_load(b->dout, w, j->dout, at, stride, count, hd, j->dout_type);
    tile_product(b->p, KEYS, b->q, w, 1, b->keys_t, KEYS, count, KEYS, hd, 0);
    tile_product(b->ds, KEYS, b->dout, w, 1, b->values_t, KEYS, count, KEYS, hd, 0);
    for (int r = 0; r < count; r++) {
        int i = first + r, high = i + 1 - b->block;
        row_gradient(b->p + r * KEYS, b->ds + r * KEYS, NULL, NULL, j->lse[(row + (size_t)r) * (size_t)j->shape.heads + (size_t)head],
                     row_delta(j, b->dout + r * w, at + (size_t)r * stride), attention_first_key(i, window) - b->block,
                     high < KEYS ? high : KEYS, j->shape);
    }
    if (is_first_block(b, j, first)) {
        memset(b->dq, 0, (size_t)(count * w) * sizeof *b->dq);
    } else {
        attention_load(b->dq, w, j->dq, at, stride, count, hd, SPURION_F32);
    }
    tile_product(b->dq, w, b->ds, KEYS, 1, b->keys, w, count, w, KEYS, 1);
    store_rows(j->dq + at, stride, b->dq, w, count, hd);
    if (b->want_keys) {
        tile_product(b->dv, w, b->p, 1, KEYS, b->dout, w, KEYS, w, count, 1);
        tile_product(b->dk, w, b->ds, 1, KEYS, b->q, w, KEYS, w, count, 1);
    }
}

static void load_block(back_state *b, const back_job *j)
{
    int w = j->width, hd = j->shape.head_dim;
    size_t stride = (size_t)j->shape.kv_heads * (size_t)hd, at = (size_t)b->kv_head * (size_t)hd;
    attention_load_keys(b->keys, w, j->v, at, stride, b->seq, b->block, hd, j->dtype);
    attention_transpose(b->values_t, b->keys, w, hd);
    attention_load_keys(b->keys, w, j->k, at, stride, b->seq, b->block, hd, j->dtype);
    attention_transpose(b->keys_t, b->keys, w, hd);
}

static void back_item(void *context, int64_t item, int worker)
{
    const back_job *j = context;
    back_state b;
    place_scratch(&b, j, j->cpu->scratch[worker]);
    back_sequence(&b, j, item, load_block, back_tile);
}

spurion_status SPURION_CPU_OP(attention_backward)(spurion_dev *dev, float *dq, float *dk, float *dv, int dkv_stride, const void *dout,
                                                  spurion_dtype dout_type, const void *out, const float *lse, const void *q, const void *k, const void *v,
                                                  const spurion_seq *seqs, int seq_count, spurion_attention_shape shape)
{
    double start = spurion_cpu_now();
    spurion_status st = attention_check(shape);
    if (st.code != SPURION_OK) {
        return st;
    }
    bool lanes = spurion_cpu_of(dev)->multiply_pairs != NULL && dev->dtype == SPURION_BF16;
    back_job job = {spurion_cpu_of(dev), dq, dk, dv, (size_t)dkv_stride, lse, dout, out, q, k, v, seqs, shape,
                    shape.heads / shape.kv_heads, (int)spurion_round_up((size_t)shape.head_dim, lanes ? 32 : VW), dev->dtype, dout_type};
    spurion_pool_run(job.cpu->pool, lanes ? spurion_attention_lanes_back_item : back_item, &job, (int64_t)seq_count * shape.kv_heads);
    double pairs = attention_pairs(seqs, seq_count, shape.window) * shape.heads;
    spurion_cpu_count(dev, SPURION_CLASS_ATTENTION, start, 10 * pairs * shape.head_dim,
                      pairs / KEYS * 4 * shape.head_dim * (double)spurion_dtype_bytes(dev->dtype));
    return st;
}

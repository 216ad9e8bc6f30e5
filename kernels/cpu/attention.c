/* Attention forward. One item: one key head of one seq, a tile of queries with all query heads that share the key head.
 * Keys come in blocks counted from position 0, softmax runs along (Milakov & Gimelshein 2018), all in f32: a query's result is a chain
 * over its own key blocks, whoever shares the tile (a block that a query does not see multiplies by 1 and adds 0).
 * Thread: pool workers. Memory: the workers' scratch. */
#include "kernels/cpu/attention.h"

static void place_scratch(attention_tile *t, const attention_job *j, char *scratch)
{
    size_t w = (size_t)j->width, rows = (size_t)j->tile * (size_t)j->group;
    t->keys = (float *)(void *)scratch;
    t->keys_t = t->keys + KEYS * w;
    t->values = t->keys_t + KEYS * w;
    t->q = t->values + KEYS * w;
    t->acc = t->q + rows * w;
    t->s = t->acc + rows * w;
    t->max = t->s + rows * KEYS;
    t->sum = t->max + rows;
}

/* Scores, weights and weighted values of one key block for all rows of the tile. */
static void add_block(attention_tile *t, const attention_job *j, int block)
{
    int rows = t->count * j->group, w = j->width;
    tile_product(t->s, KEYS, t->q, w, 1, t->keys_t, KEYS, rows, KEYS, j->shape.head_dim, 0);
    soften_tile(t, j, NULL, block * KEYS);
    tile_product(t->acc, w, t->s, KEYS, 1, t->values, w, rows, w, KEYS, 1);
}

static void attention_item(void *context, int64_t item, int worker)
{
    const attention_job *j = context;
    attention_tile t;
    size_t hd = (size_t)j->shape.head_dim, q_stride = (size_t)j->shape.heads * hd, kv_stride = (size_t)j->shape.kv_heads * hd;

    place_tile(&t, j, item);
    place_scratch(&t, j, j->cpu->scratch[worker]);
    for (int i = 0; i < t.count; i++) {
        size_t row = (size_t)(t.seq->q_row + t.first - t.seq->q_position + i);
        attention_load(t.q + (size_t)(i * j->group * j->width), j->width, j->q, row * q_stride + (size_t)(t.kv_head * j->group) * hd, hd,
                       j->group, (int)hd, j->dtype);
    }
    begin_tile(&t, j);
    for (int b = attention_first_key(t.first, j->shape.window) / KEYS; b * KEYS < t.first + t.count; b++) {
        size_t at = (size_t)t.kv_head * hd;
        attention_load_keys(t.keys, j->width, j->k, at, kv_stride, t.seq, b * KEYS, (int)hd, j->dtype);
        attention_load_keys(t.values, j->width, j->v, at, kv_stride, t.seq, b * KEYS, (int)hd, j->dtype);
        attention_transpose(t.keys_t, t.keys, j->width, (int)hd);
        add_block(&t, j, b);
    }
    write_tile(&t, j);
}

enum { LANES_QUERIES_MAX = 256, LANES_QUERIES_MIN = 32 }; /* of one item */

static int64_t items_of(const attention_job *j)
{
    int64_t items = 0;
    for (int s = 0; s < j->seq_count; s++) {
        items += (int64_t)tiles_of(&j->seqs[s], j->tile) * j->shape.kv_heads;
    }
    return items;
}

spurion_status SPURION_CPU_OP(attention)(spurion_dev *dev, void *out, float *lse, const void *q, const void *k, const void *v,
                                         const spurion_seq *seqs, int seq_count, spurion_attention_shape shape)
{
    double start = spurion_cpu_now();
    spurion_status st = attention_check(shape);
    if (st.code != SPURION_OK) {
        return st;
    }
    int group = shape.heads / shape.kv_heads, tile = TILE_ROWS_MAX / group < 128 ? TILE_ROWS_MAX / group : 128;
    bool lanes = spurion_cpu_of(dev)->multiply_pairs != NULL && dev->dtype == SPURION_BF16;
    attention_job job = {spurion_cpu_of(dev), out, lse, q, k, v, seqs, seq_count, shape, group, tile,
                         (int)spurion_round_up((size_t)shape.head_dim, lanes ? 32 : VW), dev->dtype};
    int64_t items = items_of(&job);
    if (lanes) { /* longer runs of queries share the key blocks that were gathered for them: as long as all workers have some */
        job.tile = LANES_QUERIES_MAX;
        for (items = items_of(&job); job.tile > LANES_QUERIES_MIN && items < 4 * (int64_t)dev->thread_count; items = items_of(&job)) {
            job.tile /= 2;
        }
    }
    spurion_pool_run(job.cpu->pool, lanes ? spurion_attention_lanes_item : attention_item, &job, items);
    double pairs = attention_pairs(seqs, seq_count, shape.window) * shape.heads;
    spurion_cpu_count(dev, SPURION_CLASS_ATTENTION, start, 4 * pairs * shape.head_dim,
                      pairs / KEYS * 2 * shape.head_dim * (double)spurion_dtype_bytes(dev->dtype));
    return st;
}

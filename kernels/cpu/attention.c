/* Attention forward. One item: one key head of one seq, a tile of queries with all query heads that share the key head.
 * Keys come in blocks counted from position 0, softmax runs along (Milakov & Gimelshein 2018), all in f32: a query's result is a chain
 * over its own key blocks, whoever shares the tile (a block that a query does not see multiplies by 1 and adds 0).
 * Thread: pool workers. Memory: the workers' scratch. */
#include <math.h>

#include "kernels/cpu/attention.h"

enum { TILE_ROWS_MAX = 256 }; /* queries x heads of a tile */

typedef struct attention_job {
    spurion_cpu *cpu;
    void *out;
    float *lse;
    const void *q, *k, *v;
    const spurion_seq *seqs;
    int seq_count;
    spurion_attention_shape shape;
    int group, tile; /* query heads per key head; queries per tile */
    int width;       /* head_dim rounded up to whole vectors */
    spurion_dtype dtype;
} attention_job;

/* One tile's working set, in scratch. */
typedef struct attention_tile {
    const spurion_seq *seq;
    int kv_head, first, count; /* positions of the queries */
    float *keys, *keys_t, *values, *q, *acc, *s, *max, *sum;
} attention_tile;

static int tiles_of(const spurion_seq *s, int tile)
{
    return s->q_count == 0 ? 0 : (attention_end(s) - 1) / tile - s->q_position / tile + 1;
}

static void place_tile(attention_tile *t, const attention_job *j, int64_t item)
{
    int s = 0;
    t->kv_head = (int)(item % j->shape.kv_heads);
    item /= j->shape.kv_heads;
    while (item >= tiles_of(&j->seqs[s], j->tile)) {
        item -= tiles_of(&j->seqs[s++], j->tile);
    }
    t->seq = &j->seqs[s];
    int begin = (t->seq->q_position / j->tile + (int)item) * j->tile, end = begin + j->tile;
    t->first = begin > t->seq->q_position ? begin : t->seq->q_position;
    t->count = (end < attention_end(t->seq) ? end : attention_end(t->seq)) - t->first;
}

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

/* Turns a row of raw scores into weights; updates the row's max and sum. Gives the factor for what was summed before. */
static float soften_row(float *s, float *max, float *sum, int low, int high, float scale, float cap)
{
    vf v[KEYS / VW], top = v_set(*max), total = v_set(0.0f);
    for (int c = 0; c < KEYS / VW; c++) {
        v[c] = attention_score(v_load(s + c * VW), c * VW, low, high, scale, cap);
        top = v_max(top, v[c]);
    }
    float now = v_max_lane(top), base = now == -__builtin_inff() ? 0.0f : now;
    for (int c = 0; c < KEYS / VW; c++) {
        v[c] = v_exp(v[c] - base);
        v_store(s + c * VW, v[c]);
        total += v[c];
    }
    float factor = v_exp(v_set(*max - base))[0];
    *max = now;
    *sum = *sum * factor + v_sum(total);
    return factor;
}

/* Scores, weights and weighted values of one key block for all rows of the tile. */
static void add_block(attention_tile *t, const attention_job *j, int block)
{
    int rows = t->count * j->group, w = j->width, begin = block * KEYS;
    tile_product(t->s, KEYS, t->q, w, 1, t->keys_t, KEYS, rows, KEYS, j->shape.head_dim, 0);
    for (int r = 0; r < rows; r++) {
        int i = t->first + r / j->group, low = attention_first_key(i, j->shape.window) - begin, high = i + 1 - begin;
        float factor = soften_row(t->s + r * KEYS, &t->max[r], &t->sum[r], low, high < KEYS ? high : KEYS, j->shape.scale, j->shape.softcap);
        if (factor != 1.0f) {
            for (int c = 0; c < w; c += VW) {
                v_store(t->acc + r * w + c, v_load(t->acc + r * w + c) * factor);
            }
        }
    }
    tile_product(t->acc, w, t->s, KEYS, 1, t->values, w, rows, w, KEYS, 1);
}

static void write_tile(const attention_tile *t, const attention_job *j)
{
    int hd = j->shape.head_dim;
    for (int r = 0; r < t->count * j->group; r++) {
        size_t row = (size_t)(t->seq->q_row + t->first - t->seq->q_position + r / j->group);
        size_t head = (size_t)(t->kv_head * j->group + r % j->group), heads = (size_t)j->shape.heads;
        for (int c = 0; c < hd; c += VW) {
            v_store_act(j->out, (row * heads + head) * (size_t)hd + (size_t)c, v_load(t->acc + r * j->width + c) / t->sum[r], hd - c,
                        j->dtype);
        }
        j->lse[row * heads + head] = t->max[r] + logf(t->sum[r]);
    }
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
    for (int r = 0; r < t.count * j->group; r++) {
        t.max[r] = -__builtin_inff();
        t.sum[r] = 0;
    }
    memset(t.acc, 0, (size_t)(t.count * j->group * j->width) * sizeof *t.acc);
    for (int b = attention_first_key(t.first, j->shape.window) / KEYS; b * KEYS < t.first + t.count; b++) {
        size_t at = (size_t)t.kv_head * hd;
        attention_load_keys(t.keys, j->width, j->k, at, kv_stride, t.seq, b * KEYS, (int)hd, j->dtype);
        attention_load_keys(t.values, j->width, j->v, at, kv_stride, t.seq, b * KEYS, (int)hd, j->dtype);
        attention_transpose(t.keys_t, t.keys, j->width, (int)hd);
        add_block(&t, j, b);
    }
    write_tile(&t, j);
}

spurion_status SPURION_CPU_OP(attention)(spurion_dev *dev, void *out, float *lse, const void *q, const void *k, const void *v,
                                         const spurion_seq *seqs, int seq_count, spurion_attention_shape shape)
{
    double start = spurion_cpu_now();
    spurion_status st = attention_check(shape);
    if (st.code != SPURION_OK) {
        return st;
    }
    int group = shape.heads / shape.kv_heads, tile = TILE_ROWS_MAX / group;
    attention_job job = {spurion_cpu_of(dev), out, lse, q, k, v, seqs, seq_count, shape, group, tile < 128 ? tile : 128,
                         (int)spurion_round_up((size_t)shape.head_dim, VW), dev->dtype};
    int64_t items = 0;
    for (int s = 0; s < seq_count; s++) {
        items += (int64_t)tiles_of(&seqs[s], job.tile) * shape.kv_heads;
    }
    spurion_pool_run(job.cpu->pool, attention_item, &job, items);
    double pairs = attention_pairs(seqs, seq_count, shape.window) * shape.heads;
    spurion_cpu_count(dev, SPURION_CLASS_ATTENTION, start, 4 * pairs * shape.head_dim,
                      pairs / KEYS * 2 * shape.head_dim * (double)spurion_dtype_bytes(dev->dtype));
    return st;
}

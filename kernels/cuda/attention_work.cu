/* Work lists of attention: which tile of queries and which block of keys a block of threads takes. Host code. Thread: engine. */
#include "kernels/cuda/attention.cuh"

enum { BATCH = 256 };

spurion_status spurion_attention_check(spurion_attention_shape shape)
{
    if (shape.kv_heads <= 0 || shape.heads % shape.kv_heads != 0 || shape.head_dim <= 0 || shape.head_dim > SPURION_CUDA_HEAD_DIM_MAX ||
        shape.heads / shape.kv_heads > 256 || shape.heads > 65535) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "attention: expected head dim up to %d and at most 256 heads per key head, found %d heads, "
                             "%d key heads, head dim %d", (int)SPURION_CUDA_HEAD_DIM_MAX, shape.heads, shape.kv_heads, shape.head_dim);
    }
    return spurion_ok();
}

double spurion_attention_pairs(const spurion_seq *seqs, int count, int window)
{
    double pairs = 0;
    for (int s = 0; s < count; s++) {
        for (int i = seqs[s].q_position; i < spurion_seq_end(&seqs[s]); i++) {
            pairs += i + 1 - spurion_first_key(i, window);
        }
    }
    return pairs;
}

/* A list on its way to the device, sent in batches. */
typedef struct list {
    spurion_cuda *cuda;
    spurion_item_t *out; /* device; NULL: only counted */
    spurion_item_t items[BATCH];
    int count, held;
} list;

static spurion_status flush(list *l)
{
    if (l->held > 0 && l->out != NULL) {
        SPURION_CUDA_DO(spurion_cuda_send(l->cuda, l->out + l->count - l->held, l->items, (size_t)l->held * sizeof l->items[0]));
    }
    l->held = 0;
    return spurion_ok();
}

static spurion_status push(list *l, int seq, int start, int before)
{
    if (l->held == BATCH) {
        SPURION_CUDA_DO(flush(l));
    }
    l->items[l->held++] = spurion_item_t{seq, start, before, 0};
    l->count++;
    return spurion_ok();
}

/* tiles: all tiles of queries; blocks: key blocks with a position >= dkv_position. */
static spurion_status fill(list *tiles, list *blocks, const spurion_seq *seqs, int seq_count, int tile, int keys)
{
    for (int s = 0, before = 0; s < seq_count; s++) {
        const spurion_seq *q = &seqs[s];
        if (q->q_count <= 0) {
            continue;
        }
        for (int start = q->q_position / tile * tile; start < spurion_seq_end(q); start += tile) {
            SPURION_CUDA_DO(push(tiles, s, start, before));
        }
        for (int block = keys > 0 ? q->dkv_position / keys * keys : spurion_seq_end(q); block < spurion_seq_end(q); block += keys) {
            SPURION_CUDA_DO(push(blocks, s, block, before));
        }
        before += q->q_count;
    }
    SPURION_CUDA_DO(flush(tiles));
    return flush(blocks);
}

spurion_status spurion_attention_work(spurion_work *out, spurion_cuda *cuda, const spurion_seq *seqs, int seq_count, int heads, int tile, int keys)
{
    list tiles = {cuda, NULL, {}, 0, 0}, blocks = {cuda, NULL, {}, 0, 0};
    SPURION_CUDA_DO(fill(&tiles, &blocks, seqs, seq_count, tile, keys));
    size_t seq_bytes = spurion_cuda_round_up((size_t)seq_count * sizeof *seqs, 256);
    size_t tile_bytes = spurion_cuda_round_up((size_t)tiles.count * sizeof(spurion_item_t), 256);
    size_t block_bytes = spurion_cuda_round_up((size_t)blocks.count * sizeof(spurion_item_t), 256);
    size_t queries = 0;
    for (int s = 0; s < seq_count; s++) {
        queries += seqs[s].q_count > 0 ? (size_t)seqs[s].q_count : 0;
    }
    size_t delta_bytes = keys > 0 ? queries * (size_t)heads * sizeof(float) : 0;
    SPURION_CUDA_DO(spurion_cuda_reserve(cuda, &cuda->work, seq_bytes + tile_bytes + block_bytes + delta_bytes + 256));
    char *base = (char *)cuda->work.p;
    *out = spurion_work{(const spurion_seq *)(void *)base, (const spurion_item_t *)(void *)(base + seq_bytes),
                        (const spurion_item_t *)(void *)(base + seq_bytes + tile_bytes), (float *)(void *)(base + seq_bytes + tile_bytes + block_bytes),
                        tiles.count, blocks.count};
    SPURION_CUDA_DO(spurion_cuda_send(cuda, base, seqs, (size_t)seq_count * sizeof *seqs));
    tiles = list{cuda, (spurion_item_t *)(void *)(base + seq_bytes), {}, 0, 0};
    blocks = list{cuda, (spurion_item_t *)(void *)(base + seq_bytes + tile_bytes), {}, 0, 0};
    return fill(&tiles, &blocks, seqs, seq_count, tile, keys);
}

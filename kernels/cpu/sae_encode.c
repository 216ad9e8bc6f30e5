/* SAE encode: a tile of rows times a chunk of features stays in cache and goes straight into sparse lists; the dense (T, F) array never
 * exists. One item: one block of rows and one span of chunks (several spans only where there are fewer blocks than workers), the rows of
 * the block inside, so that a chunk of weights comes from memory once; a second pass joins each row's spans. Choosing compares and never rounds, so the number of spans cannot be seen in the result.
 * Formulas: formats of the dictionaries in canonical form, ops.h. Thread: pool workers. Memory: the caller's scratch. */
#include <math.h>
#include <stdatomic.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/sae_screen.h"
#include "kernels/cpu/sae_select.h"

enum { ROWS = SPURION_INPUT_ROWS, TOP_SLACK = 256 }; /* candidates beyond k before the worst are thrown out */

typedef struct encode_job {
    spurion_cpu *cpu;
    const spurion_sparse *out;
    const spurion_sae_weights *sae;
    const float *x;
    uint64_t *entries; /* (tiles * ROWS, spans, cap) */
    int32_t *counts;   /* (tiles * ROWS, spans, 2): held, active */
    int first_row, rows, tiles, spans, cap;
    atomic_int failed;
} encode_job;

static bool screened(const spurion_sae_weights *sae)
{
    return sae->enc->rows != NULL;
}

static int entry_cap(const spurion_sae_weights *sae)
{
    switch (sae->kind) {
    case SPURION_SAE_TOPK:
        return (screened(sae) ? 6 : 2) * sae->k + TOP_SLACK;
    case SPURION_SAE_GROUPMAX:
        return sae->k;
    default:
        return sae->slots;
    }
}

/* Tiles of one pass over rows. */
static int pass_tiles(int threads)
{
    return 4 * threads > 8 ? 4 * threads : 8;
}

static int span_count(int tiles, int threads, int chunks)
{
    int want = threads == 1 || tiles >= 2 * threads ? 1 : (4 * threads + tiles - 1) / tiles;
    return want < chunks ? want : chunks;
}

/* Most (tile, span) pairs of any call with at most T rows. */
static size_t block_max(int T, int threads, int chunks)
{
    int tiles = (T + ROWS - 1) / ROWS, most = 1;
    tiles = tiles < pass_tiles(threads) ? tiles : pass_tiles(threads);
    for (int t = 1; t <= tiles; t++) {
        int blocks = t * span_count(t, threads, chunks);
        most = blocks > most ? blocks : most;
    }
    return (size_t)most;
}

size_t SPURION_CPU_OP(sae_scratch_bytes)(const spurion_dev *dev, const spurion_sae_weights *sae, int T)
{
    size_t rows = block_max(T, dev->thread_count, sae->enc->forward.chunk_count) * ROWS;
    return 64 + rows * ((size_t)entry_cap(sae) * sizeof(uint64_t) + 2 * sizeof(int32_t));
}

/* --- input --- */

typedef struct token_norm {
    float shift, factor; /* u = (x - shift) * factor, or / divisor for LAYER */
    float scale;         /* of the output */
} token_norm;

static double centred_square(const float *x, int d, double mean)
{
    double sum = 0;
    for (int c = 0; c < d; c++) {
        sum += (x[c] - mean) * (x[c] - mean);
    }
    return sum;
}

static token_norm norm_of(const float *x, int d, spurion_sae_norm kind)
{
    token_norm n = {0.0f, 1.0f, 1.0f};
    if (kind == SPURION_SAE_NORM_RESCALE) {
        double length = sqrt(centred_square(x, d, 0.0));
        n.scale = (float)(length / sqrt((double)d)); /* of a zero row: 0, and u = 0 */
        n.factor = length > 0 ? (float)(sqrt((double)d) / length) : 0.0f;
    } else if (kind == SPURION_SAE_NORM_LAYER) {
        double mean = 0;
        for (int c = 0; c < d; c++) {
            mean += x[c];
        }
        mean /= d;
        double sd = sqrt(centred_square(x, d, mean) / (d - 1));
        n.shift = (float)mean;
        n.scale = (float)sd;
        n.factor = (float)(1.0 / (sd + 1e-5)); /* as SAELens: the output is scaled by sd alone */
    }
    return n;
}

/* u (d) f32 of one row. */
static void norm_row(float *u, const float *x, token_norm n, int d)
{
    for (int c = 0; c < d; c += VW) {
        v_store_n(u + c, (v_load_n(x + c, d - c) - n.shift) * n.factor, d - c);
    }
}

/* Normed rows into the product's input: f32, bf16, or bf16 values as f32; zeros behind each row and behind the last. */
static spurion_input prepare_input(const encode_job *j, int first, int rows, void *scratch, bool report)
{
    const spurion_matrix *m = j->sae->enc;
    spurion_dtype type = spurion_product_type(m);
    int d = m->K;
    size_t stride = (size_t)m->forward.input_stride, row_bytes = stride * spurion_dtype_bytes(type);
    for (int r = 0; r < rows; r++) {
        const float *x = j->x + (size_t)(first + r) * (size_t)d;
        token_norm n = norm_of(x, d, j->sae->norm);
        memset((char *)scratch + (size_t)r * row_bytes, 0, row_bytes);
        for (int c = 0; c < d; c += VW) {
            vf v = (v_load_n(x + c, d - c) - n.shift) * n.factor;
            v = m->widen ? v_from_bf16(v_to_bf16(v)) : v;
            v_store_act(scratch, (size_t)r * stride + (size_t)c, v, d - c, type);
        }
        if (report) {
            j->out->token_scale[first + r] = n.scale;
            j->out->token_shift[first + r] = n.shift;
        }
    }
    memset((char *)scratch + (size_t)rows * row_bytes, 0, (size_t)(ROWS - rows) * row_bytes);
    return (spurion_input){scratch, stride, rows};
}

/* What screening needs of a block beside its products: the rows in f32 (in the worker's scratch, above the product's) and their bounds. */
typedef struct exact_input {
    float *u; /* (ROWS, d) */
    screen_bound bound[ROWS];
} exact_input;

static void prepare_exact(exact_input *e, const encode_job *j, int first, int rows, char *scratch)
{
    size_t d = (size_t)j->sae->d;
    e->u = (float *)(void *)(scratch + spurion_product_scratch(j->sae->enc, &j->sae->enc->forward));
    for (int r = 0; r < rows; r++) {
        const float *x = j->x + (size_t)(first + r) * d;
        norm_row(e->u + (size_t)r * d, x, norm_of(x, (int)d, j->sae->norm), (int)d);
        e->bound[r] = screen_bound_of(e->u + (size_t)r * d, (int)d);
    }
}

/* The part of a block's input that makes one tile. */
static spurion_input input_part(spurion_input block, int first, int tile_rows, spurion_dtype type)
{
    int left = block.count - first;
    size_t skip = (size_t)first * block.stride * spurion_dtype_bytes(type);
    return (spurion_input){(const char *)block.rows + skip, block.stride, left < tile_rows ? left : tile_rows};
}

/* --- activation --- */

/* Turns n products of features first onward into f (not positive where the feature is silent), in place. */
static void activate_row(float *p, int n, int first, const spurion_sae_weights *sae)
{
    const float *bias = sae->enc->bias == NULL ? NULL : sae->enc->bias + first, *h = sae->scale == NULL ? NULL : sae->scale + first;
    for (int c = 0; c < n; c += VW) {
        int m = n - c;
        vf v = v_load_n(p + c, m), zero = v_set(0.0f);
        if (sae->kind == SPURION_SAE_GATED) {
            vi open = v + v_load_n(sae->gate_bias + first + c, m) > 0.0f;
            vf f = v * v_load_n(sae->mag_scale + first + c, m) + v_load_n(sae->mag_bias + first + c, m);
            v_store_n(p + c, v_select(open, f, zero), m);
            continue;
        }
        if (bias != NULL) {
            v += v_load_n(bias + c, m);
        }
        if (h != NULL) {
            v *= v_load_n(h + c, m);
        }
        if (sae->kind == SPURION_SAE_JUMPRELU) {
            v = v_select(v > v_load_n(sae->threshold + first + c, m), v, zero);
        }
        v_store_n(p + c, v, m);
    }
}

static void select_row_chunk(select_row *s, float *p, int n, int first, const encode_job *j)
{
    const spurion_sae_weights *sae = j->sae;
    activate_row(p, n, first, sae);
    switch (sae->kind) {
    case SPURION_SAE_TOPK:
        select_top(s, p, n, first, sae->k, j->cap);
        break;
    case SPURION_SAE_GROUPMAX:
        select_groups(s, p, n, first, sae->F / sae->k);
        break;
    default:
        select_list(s, p, n, first, sae->slots);
        break;
    }
}

/* The same from products in bf16. */
static void screen_row_chunk(select_row *s, const float *p, int n, int first, const encode_job *j, const exact_input *e, int row)
{
    const spurion_sae_weights *sae = j->sae;
    if (sae->kind == SPURION_SAE_TOPK) {
        screen_top(s, p, e->bound[row], sae, n, first, j->cap);
    } else {
        screen_list(s, p, e->u + (size_t)row * (size_t)sae->d, e->bound[row], sae, n, first, sae->slots);
    }
}

static size_t block_of(const encode_job *j, int tile, int row, int span)
{
    return ((size_t)(tile * ROWS + row)) * (size_t)j->spans + (size_t)span;
}

static void begin_rows(select_row *rows, const encode_job *j, int tile, int span)
{
    for (int r = 0; r < ROWS; r++) {
        rows[r] = (select_row){j->entries + block_of(j, tile, r, span) * (size_t)j->cap, 0, 0, 0.0f};
        if (j->sae->kind == SPURION_SAE_GROUPMAX) {
            memset(rows[r].entries, 0, (size_t)j->cap * sizeof *rows[r].entries);
            rows[r].count = j->cap;
        }
    }
}

static void end_rows(select_row *state, const encode_job *j, int tile, int span, int rows)
{
    for (int r = 0; r < rows; r++) {
        if (j->sae->kind == SPURION_SAE_TOPK && !screened(j->sae)) {
            select_shrink(&state[r], j->sae->k);
        }
        j->counts[2 * block_of(j, tile, r, span)] = state[r].count;
        j->counts[2 * block_of(j, tile, r, span) + 1] = state[r].active;
    }
}

static void encode_item(void *context, int64_t item, int worker)
{
    encode_job *j = context;
    const spurion_product *p = &j->sae->enc->forward;
    int tile = (int)(item / j->spans), span = (int)(item % j->spans), first = j->first_row + tile * ROWS;
    int left = j->first_row + j->rows - first, rows = left < ROWS ? left : ROWS;
    int begin = p->chunk_count * span / j->spans, end = p->chunk_count * (span + 1) / j->spans;
    select_row state[ROWS];
    exact_input exact;
    exact.u = NULL;
    spurion_input input = prepare_input(j, first, rows, j->cpu->scratch[worker], span == 0);

    begin_rows(state, j, tile, span);
    if (screened(j->sae)) {
        prepare_exact(&exact, j, first, rows, j->cpu->scratch[worker]);
    }
    for (int r = 0; screened(j->sae) && r < rows; r++) {
        state[r].count = isfinite(exact.bound[r].loss) || j->sae->kind != SPURION_SAE_TOPK ? 0 : -1;
    }
    spurion_product_begin(j->cpu, p);
    for (int c = begin; c < end; c++) {
        int size = spurion_product_chunk_size(p, c);
        for (int at = 0; at < rows; at += p->tile_rows) {
            spurion_input part = input_part(input, at, p->tile_rows, spurion_product_type(j->sae->enc));
            size_t stride;
            float *products = spurion_product_tile(&stride, j->cpu, p, part, c, worker);
            if (products == NULL) {
                atomic_store(&j->failed, 1);
                c = end;
                break;
            }
            for (int r = 0; r < part.count; r++) {
                if (screened(j->sae)) {
                    screen_row_chunk(&state[at + r], products + (size_t)r * stride, size, c * p->chunk, j, &exact, at + r);
                } else {
                    select_row_chunk(&state[at + r], products + (size_t)r * stride, size, c * p->chunk, j);
                }
            }
        }
    }
    spurion_product_end(p);
    end_rows(state, j, tile, span, rows);
}

/* --- joining spans --- */

/* Brings the spans' entries together at the front; gives their number. */
static int join_spans(uint64_t *e, const int32_t *counts, const encode_job *j)
{
    int n = counts[0];
    for (int s = 1; s < j->spans; s++) {
        memmove(e + n, e + (size_t)s * (size_t)j->cap, (size_t)counts[2 * s] * sizeof *e);
        n += counts[2 * s];
    }
    return n;
}

/* Candidates of all spans to exact values; gives the number of positive ones. */
static int join_screened(uint64_t *e, const int32_t *counts, const encode_job *j, size_t t, float *u)
{
    int d = j->sae->d, n = 0;
    const float *x = j->x + t * (size_t)d;
    for (int s = 0; s < j->spans; s++) {
        n = counts[2 * s] < 0 ? -1 : n;
    }
    norm_row(u, x, norm_of(x, d, j->sae->norm), d);
    return screen_finish(e, n < 0 ? n : join_spans(e, counts, j), j->cap, u, screen_bound_of(u, d), j->sae);
}

/* The best of each group over the spans, silent groups dropped; gives the number left. */
static int join_groups(uint64_t *e, const encode_job *j)
{
    int n = 0;
    for (int g = 0; g < j->cap; g++) {
        uint64_t best = e[g];
        for (int s = 1; s < j->spans; s++) {
            uint64_t other = e[(size_t)s * (size_t)j->cap + (size_t)g];
            best = other > best ? other : best;
        }
        if (best != 0) {
            e[n++] = best;
        }
    }
    return n;
}

static int flip_all(uint64_t *e, int n)
{
    for (int i = 0; i < n; i++) {
        e[i] = select_flip(e[i]);
    }
    select_sort(e, n);
    return n;
}

static void join_row(void *context, int64_t item, int worker)
{
    const encode_job *j = context;
    const spurion_sae_weights *sae = j->sae;
    size_t block = block_of(j, 0, (int)item, 0), t = (size_t)(j->first_row + item), slots = (size_t)j->out->slots;
    uint64_t *e = j->entries + block * (size_t)j->cap;
    const int32_t *counts = j->counts + 2 * block;
    int n, active = 0;

    if (sae->kind == SPURION_SAE_TOPK) {
        n = screened(sae) ? join_screened(e, counts, j, t, (float *)(void *)j->cpu->scratch[worker]) : join_spans(e, counts, j);
        if (n > sae->k) {
            (void)select_largest(e, n, sae->k);
            n = sae->k;
        }
        active = flip_all(e, n);
    } else if (sae->kind == SPURION_SAE_GROUPMAX) {
        n = join_groups(e, j);
        active = flip_all(e, n);
    } else {
        n = join_spans(e, counts, j);
        for (int s = 0; s < j->spans; s++) {
            active += counts[2 * s + 1];
        }
    }
    j->out->count[t] = active;
    for (int i = 0; i < n && i < j->out->slots; i++) {
        j->out->index[t * slots + (size_t)i] = (int32_t)(e[i] >> 32);
        j->out->value[t * slots + (size_t)i] = select_value((uint32_t)e[i]);
    }
}

static void place_entries(encode_job *j, void *scratch)
{
    size_t blocks = (size_t)j->tiles * ROWS * (size_t)j->spans;
    j->entries = (uint64_t *)(void *)((char *)scratch + (-(uintptr_t)scratch & 63));
    j->counts = (int32_t *)(void *)(j->entries + blocks * (size_t)j->cap);
}

spurion_status SPURION_CPU_OP(sae_encode)(spurion_dev *dev, spurion_sparse *out, const spurion_sae_weights *sae, const float *x,
                                          void *scratch, int T)
{
    double start = spurion_cpu_now();
    encode_job job = {.cpu = spurion_cpu_of(dev), .out = out, .sae = sae, .x = x, .cap = entry_cap(sae)};
    int pass = pass_tiles(dev->thread_count) * ROWS;

    if (sae->enc->forward.outputs != sae->F || (sae->kind == SPURION_SAE_GROUPMAX && (sae->k <= 0 || sae->F % sae->k != 0 || screened(sae))) ||
        (sae->kind == SPURION_SAE_TOPK && (sae->k <= 0 || sae->k > out->slots))) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "SAE: expected an encoder of %d features and k that fits %d slots, found %d, k %d",
                             sae->F, out->slots, sae->enc->forward.outputs, sae->k);
    }
    for (job.first_row = 0; job.first_row < T; job.first_row += pass) {
        job.rows = T - job.first_row < pass ? T - job.first_row : pass;
        job.tiles = (job.rows + ROWS - 1) / ROWS;
        job.spans = span_count(job.tiles, dev->thread_count, sae->enc->forward.chunk_count);
        place_entries(&job, scratch);
        spurion_pool_run(job.cpu->pool, encode_item, &job, (int64_t)job.tiles * job.spans);
        if (atomic_load(&job.failed)) {
            return spurion_error(SPURION_INTERNAL, "oneDNN product failed in SAE encode");
        }
        spurion_pool_run(job.cpu->pool, join_row, &job, job.rows);
    }
    double t = T, d = sae->d, F = sae->F;
    spurion_cpu_count(dev, SPURION_CLASS_SAE_ENCODE, start, 2 * t * d * F, 4 * t * d + d * F * (double)spurion_dtype_bytes(sae->enc->dtype));
    return spurion_ok();
}

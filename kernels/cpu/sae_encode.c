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
    const int32_t *gather; /* rows of x and out that the job is about; NULL: all, in order */
    const float *bar;      /* of each of them: a row that k features exceed is settled (members, top-k); or NULL */
    const int32_t *member; /* what index a feature is listed under; NULL: its own */
    atomic_int failed;
} encode_job;

enum { DENSE = -1, SETTLED = -2 }; /* instead of a number of candidates: too many; none that matters */

static size_t row_of(const encode_job *j, int i)
{
    return (size_t)(j->gather == NULL ? i : j->gather[i]);
}

static bool screened(const spurion_sae_weights *sae)
{
    return sae->enc->rows != NULL;
}

static int entry_cap(const spurion_sae_weights *sae)
{
    switch (sae->kind) {
    case SPURION_SAE_TOPK: {
        int most = (screened(sae) ? 6 : 2) * sae->k + TOP_SLACK;
        return most > sae->slots ? most : sae->slots; /* members of a top-k dictionary are listed before they are chosen from */
    }
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
    return 64 + rows * ((size_t)entry_cap(sae) * sizeof(uint64_t) + 2 * sizeof(int32_t)) + (size_t)T * (sizeof(int32_t) + sizeof(float));
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
        size_t row = row_of(j, first + r);
        const float *x = j->x + row * (size_t)d;
        token_norm n = norm_of(x, d, j->sae->norm);
        memset((char *)scratch + (size_t)r * row_bytes, 0, row_bytes);
        for (int c = 0; c < d; c += VW) {
            vf v = (v_load_n(x + c, d - c) - n.shift) * n.factor;
            v = m->widen ? v_from_bf16(v_to_bf16(v)) : v;
            v_store_act(scratch, (size_t)r * stride + (size_t)c, v, d - c, type);
        }
        if (report) {
            j->out->token_scale[row] = n.scale;
            j->out->token_shift[row] = n.shift;
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
        const float *x = j->x + row_of(j, first + r) * d;
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
        if (j->sae->kind == SPURION_SAE_TOPK && !screened(j->sae) && state[r].count >= 0) {
            select_shrink(&state[r], j->sae->k);
        }
        j->counts[2 * block_of(j, tile, r, span)] = state[r].count;
        j->counts[2 * block_of(j, tile, r, span) + 1] = state[r].active;
    }
}

/* One item under way: rows that nothing can change any more leave it. */
typedef struct encode_tile {
    select_row state[ROWS];
    exact_input exact;
    int live[ROWS]; /* row of the tile that stands at each row of the input */
    spurion_input input;
} encode_tile;

static void begin_tile(encode_tile *e, const encode_job *j, int tile, int span, int worker)
{
    int first = j->first_row + tile * ROWS, left = j->first_row + j->rows - first, rows = left < ROWS ? left : ROWS;
    e->exact.u = NULL;
    e->input = prepare_input(j, first, rows, j->cpu->scratch[worker], span == 0 && j->bar == NULL);
    begin_rows(e->state, j, tile, span);
    if (screened(j->sae)) {
        prepare_exact(&e->exact, j, first, rows, j->cpu->scratch[worker]);
    }
    for (int r = 0; r < rows; r++) {
        e->live[r] = r;
        if (screened(j->sae) && j->sae->kind == SPURION_SAE_TOPK && !isfinite(e->exact.bound[r].loss)) {
            e->state[r].count = DENSE;
        }
    }
}

/* Whether k features exceed the row's bar by now. */
static bool settled(select_row *s, const encode_job *j, const exact_input *e, int row, float bar)
{
    if (s->count <= j->sae->k) {
        return false;
    }
    if (screened(j->sae)) {
        s->count = screen_shrink(s->entries, s->count, &s->floor, j->sae, e->bound[row]);
    } else {
        select_shrink(s, j->sae->k);
    }
    return s->floor > bar;
}

/* Takes settled rows out of the input. */
static void drop_settled(encode_tile *e, const encode_job *j, int first, void *rows)
{
    size_t bytes = e->input.stride * spurion_dtype_bytes(spurion_product_type(j->sae->enc));
    int kept = 0;
    for (int i = 0; i < e->input.count; i++) {
        int r = e->live[i];
        if (settled(&e->state[r], j, &e->exact, r, j->bar[first + r])) {
            e->state[r].count = SETTLED;
            continue;
        }
        if (kept < i) {
            memcpy((char *)rows + (size_t)kept * bytes, (char *)rows + (size_t)i * bytes, bytes);
        }
        e->live[kept++] = r;
    }
    e->input.count = kept;
}

/* Products of one chunk of features with all rows of the tile, and what they choose. */
static bool encode_chunk(encode_tile *e, encode_job *j, int chunk, int worker)
{
    const spurion_product *p = &j->sae->enc->forward;
    int size = spurion_product_chunk_size(p, chunk), first = chunk * p->chunk;
    for (int at = 0; at < e->input.count; at += p->tile_rows) {
        spurion_input part = input_part(e->input, at, p->tile_rows, spurion_product_type(j->sae->enc));
        size_t stride;
        float *products = spurion_product_tile(&stride, j->cpu, p, part, chunk, worker);
        if (products == NULL) {
            return false;
        }
        for (int i = 0; i < part.count; i++) {
            int r = e->live[at + i];
            if (screened(j->sae)) {
                screen_row_chunk(&e->state[r], products + (size_t)i * stride, size, first, j, &e->exact, r);
            } else {
                select_row_chunk(&e->state[r], products + (size_t)i * stride, size, first, j);
            }
        }
    }
    return true;
}

static void encode_item(void *context, int64_t item, int worker)
{
    encode_job *j = context;
    const spurion_product *p = &j->sae->enc->forward;
    int tile = (int)(item / j->spans), span = (int)(item % j->spans);
    int begin = p->chunk_count * span / j->spans, end = p->chunk_count * (span + 1) / j->spans;
    encode_tile e;

    begin_tile(&e, j, tile, span, worker);
    int rows = e.input.count;
    spurion_product_begin(j->cpu, p);
    for (int c = begin; c < end && e.input.count > 0; c++) {
        if (!encode_chunk(&e, j, c, worker)) {
            atomic_store(&j->failed, 1);
            break;
        }
        if (j->bar != NULL) {
            drop_settled(&e, j, j->first_row + tile * ROWS, j->cpu->scratch[worker]);
        }
    }
    spurion_product_end(p);
    end_rows(e.state, j, tile, span, rows);
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
        n = counts[2 * s] < 0 ? DENSE : n;
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

static bool row_settled(const int32_t *counts, const encode_job *j)
{
    bool yes = false;
    for (int s = 0; s < j->spans; s++) {
        yes = yes || counts[2 * s] == SETTLED;
    }
    return yes;
}

/* Entries of all spans, ascending by index; *active: f != 0, also beyond what is held. */
static int join_entries(int *active, uint64_t *e, const int32_t *counts, const encode_job *j, size_t t, float *u)
{
    const spurion_sae_weights *sae = j->sae;
    int n;
    *active = 0;
    if (sae->kind == SPURION_SAE_TOPK) {
        n = screened(sae) ? join_screened(e, counts, j, t, u) : join_spans(e, counts, j);
        if (n > sae->k) {
            (void)select_largest(e, n, sae->k);
            n = sae->k;
        }
        return *active = flip_all(e, n);
    }
    if (sae->kind == SPURION_SAE_GROUPMAX) {
        return *active = flip_all(e, join_groups(e, j));
    }
    n = join_spans(e, counts, j);
    for (int s = 0; s < j->spans; s++) {
        *active += counts[2 * s + 1];
    }
    return n;
}

/* Leaves of the row's members those that stand among the n entries; both ascend. */
static void keep_members(const encode_job *j, size_t t, const uint64_t *e, int n)
{
    int32_t *index = j->out->index + t * (size_t)j->out->slots;
    float *value = j->out->value + t * (size_t)j->out->slots;
    int kept = 0;
    for (int i = 0, k = 0; i < j->out->count[t]; i++) {
        while (k < n && (int32_t)(e[k] >> 32) < index[i]) {
            k++;
        }
        if (k < n && (int32_t)(e[k] >> 32) == index[i]) {
            index[kept] = index[i];
            value[kept++] = value[i];
        }
    }
    j->out->count[t] = kept;
}

static void join_row(void *context, int64_t item, int worker)
{
    const encode_job *j = context;
    size_t block = block_of(j, 0, (int)item, 0), t = row_of(j, j->first_row + (int)item), slots = (size_t)j->out->slots;
    uint64_t *e = j->entries + block * (size_t)j->cap;
    const int32_t *counts = j->counts + 2 * block;
    int active, n;

    if (j->bar != NULL && row_settled(counts, j)) {
        j->out->count[t] = 0;
        return;
    }
    n = join_entries(&active, e, counts, j, t, (float *)(void *)j->cpu->scratch[worker]);
    if (j->bar != NULL) {
        keep_members(j, t, e, n);
        return;
    }
    j->out->count[t] = active;
    for (int i = 0; i < n && i < j->out->slots; i++) {
        int32_t index = (int32_t)(e[i] >> 32);
        j->out->index[t * slots + (size_t)i] = j->member == NULL ? index : j->member[index];
        j->out->value[t * slots + (size_t)i] = select_value((uint32_t)e[i]);
    }
}

static void place_entries(encode_job *j, void *scratch)
{
    size_t blocks = (size_t)j->tiles * ROWS * (size_t)j->spans;
    j->entries = (uint64_t *)(void *)((char *)scratch + (-(uintptr_t)scratch & 63));
    j->counts = (int32_t *)(void *)(j->entries + blocks * (size_t)j->cap);
}

/* Encodes T rows (of those gathered) in passes. */
static spurion_status encode_rows(spurion_dev *dev, encode_job *j, void *scratch, int T)
{
    double start = spurion_cpu_now();
    int pass = pass_tiles(dev->thread_count) * ROWS;

    j->cap = entry_cap(j->sae);
    for (j->first_row = 0; j->first_row < T; j->first_row += pass) {
        j->rows = T - j->first_row < pass ? T - j->first_row : pass;
        j->tiles = (j->rows + ROWS - 1) / ROWS;
        j->spans = span_count(j->tiles, dev->thread_count, j->sae->enc->forward.chunk_count);
        place_entries(j, scratch);
        spurion_pool_run(j->cpu->pool, encode_item, j, (int64_t)j->tiles * j->spans);
        if (atomic_load(&j->failed)) {
            return spurion_error(SPURION_INTERNAL, "oneDNN product failed in SAE encode");
        }
        spurion_pool_run(j->cpu->pool, join_row, j, j->rows);
    }
    double t = T, d = j->sae->d, F = j->sae->F;
    spurion_cpu_count(dev, SPURION_CLASS_SAE_ENCODE, start, 2 * t * d * F, 4 * t * d + d * F * (double)spurion_dtype_bytes(j->sae->enc->dtype));
    return spurion_ok();
}

static spurion_status encode_check(const spurion_sparse *out, const spurion_sae_weights *sae)
{
    if (sae->enc->forward.outputs != sae->F || (sae->kind == SPURION_SAE_GROUPMAX && (sae->k <= 0 || sae->F % sae->k != 0 || screened(sae))) ||
        (sae->kind == SPURION_SAE_TOPK && (sae->k <= 0 || sae->k > out->slots))) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "SAE: expected an encoder of %d features and k that fits %d slots, found %d, k %d",
                             sae->F, out->slots, sae->enc->forward.outputs, sae->k);
    }
    return spurion_ok();
}

spurion_status SPURION_CPU_OP(sae_encode)(spurion_dev *dev, spurion_sparse *out, const spurion_sae_weights *sae, const float *x,
                                          void *scratch, int T)
{
    spurion_status st;
    encode_job job = {.cpu = spurion_cpu_of(dev), .out = out, .sae = sae, .x = x};

    SPURION_TRY(st, encode_check(out, sae));
    SPURION_TRY(st, encode_rows(dev, &job, scratch, T));
out:
    return st;
}

/* Rows in which some member may be among the k largest, and its value: what k others must exceed. */
static int rows_in_question(int32_t *rows, float *bar, const spurion_sparse *out, int T)
{
    int n = 0;
    for (int t = 0; t < T; t++) {
        float top = 0.0f;
        for (int i = 0; i < out->count[t]; i++) {
            float v = out->value[(size_t)t * (size_t)out->slots + (size_t)i];
            top = v > top ? v : top;
        }
        if (out->count[t] > 0) {
            rows[n] = t;
            bar[n++] = top;
        }
    }
    return n;
}

spurion_status SPURION_CPU_OP(sae_encode_members)(spurion_dev *dev, spurion_sparse *out, const spurion_sae_weights *sae,
                                                  const spurion_sae_weights *part, const int32_t *member, const float *x, void *scratch, int T)
{
    spurion_status st;
    spurion_sae_weights lists = *part;
    encode_job all = {.cpu = spurion_cpu_of(dev), .out = out, .sae = &lists, .x = x, .member = member};
    encode_job some = {.cpu = spurion_cpu_of(dev), .out = out, .sae = sae, .x = x};
    int32_t *rows = (int32_t *)scratch; /* the encoder's own scratch lies behind */
    float *bar = (float *)(void *)(rows + T);

    if (part->F > out->slots || part->enc->forward.outputs != part->F || sae->kind == SPURION_SAE_GROUPMAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "SAE members: expected at most %d (slots) of a kind other than groupmax, found %d",
                             out->slots, part->F);
    }
    lists.kind = sae->kind == SPURION_SAE_TOPK ? SPURION_SAE_RELU : sae->kind;
    lists.slots = part->F;
    SPURION_TRY(st, encode_rows(dev, &all, bar + T, T));
    if (sae->kind == SPURION_SAE_TOPK) {
        some.gather = rows;
        some.bar = bar;
        SPURION_TRY(st, encode_rows(dev, &some, bar + T, rows_in_question(rows, bar, out, T)));
    }
out:
    return st;
}

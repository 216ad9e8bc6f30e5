/* Memory of the engine: how many rows of a pass fit, and the blocks for them, taken once and touched. Thread: the caller's, before any pass. */
#include "daemon/engine_internal.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define HOST_RESERVE_BYTES ((size_t)192 << 20) /* code, libraries, tokenizer, jobs in flight: beside the planned blocks */
#define DEVICE_RESERVE_BYTES ((size_t)64 << 20) /* of a device's own memory: its allocator's grain, lists of work, row sums */
#define ROWS_MIN 16                            /* fewer rows in a pass are no use */
#define REWARDS_PASSES 8                       /* full passes of variants whose rewards come down together; mostly many more, for few are full */
#define IN_HAND_BYTES ((size_t)4 << 20)        /* rollouts in hand while a pass runs: their arenas, the lines of JSON */
#define IN_HAND_ROW_BYTES 256                  /* and for each token of a full pass: ids, texts, evidence */

spurion_status spurion_engine_out_of_memory(const char *what)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %s", what);
}

static spurion_plan_input plan_input(const spurion_engine *e, int rows, int prefix)
{
    spurion_plan_input in = {.config = &e->model->config, .dtype = e->dev->dtype, .mid = e->dev->mid, .rows = rows, .prefix = prefix, .lowest_point = e->lowest,
                             .gradients = e->gradients, .variants = e->variants, .chunk = e->dev->row_chunk};
    return in;
}

static size_t host_rows_bytes(const spurion_engine *e, int rows)
{
    size_t bytes = 0;
    for (int i = 0; i < e->sae_count; i++) {
        const spurion_sae_weights *w = &e->saes[i]->full;
        size_t slots = (size_t)spurion_sae_slots(w->kind, w->k, w->F, rows), part = (size_t)e->saes[i]->watched.F;
        slots = slots > part ? slots : part;
        bytes += 2 * (size_t)rows * (4 + slots * 8 + (e->gradients ? slots * 4 + 8 : 0)) + (size_t)w->F * 32;
    }
    return bytes;
}

/* Device bytes of passes of so many rows, and of a prompt's keys beside them. */
static size_t device_rows_bytes(const spurion_engine *e, int rows, int prefix)
{
    spurion_workspace w = {0};
    spurion_plan_input in = plan_input(e, rows, prefix);
    spurion_plan plan = spurion_plan_make(&w, &in, NULL, NULL);
    size_t d = (size_t)e->model->config.hidden, n = (size_t)rows, bytes = plan.kept_bytes + plan.scratch_bytes + n * 12;

    for (int p = 0; p <= 4 * e->model->config.layers; p++) {
        bytes += e->hook_points[p] ? n * d * sizeof(float) : 0;
    }
    for (int i = 0; i < e->sae_count; i++) {
        bytes += spurion_sae_buffer_bytes(e->saes[i], rows, e->gradients, e->variants);
    }
    if (e->config->attribution.method == SPURION_METHOD_IG) {
        bytes += n * d * sizeof(float);
    }
    return bytes;
}

/* Whether passes of so many rows fit: host memory into engine.memory_max; the blocks of a device with memory of its own into what it has
 * left beside the weights, less a reserve for its allocator and its work lists. */
static bool rows_fit(const spurion_engine *e, int rows, int prefix)
{
    size_t limit = e->config->engine.memory_max, host = HOST_RESERVE_BYTES + host_rows_bytes(e, rows);
    size_t blocks = device_rows_bytes(e, rows, prefix);

    if (e->dev->own_memory) {
        size_t reserve = e->device_free / 32 + DEVICE_RESERVE_BYTES;
        return host <= limit && e->device_free > reserve && blocks <= e->device_free - reserve;
    }
    return e->weights_bytes + host <= limit && blocks <= limit - e->weights_bytes - host;
}

/* Says what there is too little of. */
static spurion_status rows_refuse(const spurion_engine *e, int wanted, int found)
{
    const spurion_config *c = e->config;

    if (e->dev->own_memory) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED,
                             "memory: expected room for model.max_tokens = %d tokens in one pass, found room for %d: device %s has %zu MiB left beside "
                             "%zu MiB of weights; engine.memory_max = %" PRIu64 " MiB for the host, engine.tokens_max = %d (lower model.max_tokens)",
                             wanted, found, c->engine.device, e->device_free >> 20, e->weights_bytes >> 20, c->engine.memory_max >> 20,
                             c->engine.tokens_max);
    }
    return spurion_error(SPURION_RESOURCE_EXHAUSTED,
                         "memory: expected room for model.max_tokens = %d tokens in one pass, found room for %d: weights take %zu MiB of "
                         "engine.memory_max = %" PRIu64 " MiB, engine.tokens_max = %d (raise these, or lower model.max_tokens)",
                         wanted, found, e->weights_bytes >> 20, c->engine.memory_max >> 20, c->engine.tokens_max);
}

/* The most rows that fit beside the keys of a prompt, at most engine.tokens_max. */
static int rows_most(const spurion_engine *e, int prefix)
{
    int low = 0, high = e->config->engine.tokens_max;

    while (low < high) {
        int middle = low + (high - low + 1) / 2;
        if (rows_fit(e, middle, prefix)) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

/* Rows of a pass. Where sequences may be longer, prompts go in pieces: said lengths must fit so; the context, unasked for, may cost no more than
 * half of a pass's rows, else sequences end where a pass does. */
static spurion_status rows_choose(spurion_engine *e)
{
    const spurion_config *c = e->config;
    int context = e->model->config.context, wanted = c->model.max_tokens ? c->model.max_tokens : context, rows;

    wanted = wanted < context ? wanted : context;
    e->device_free = e->dev->own_memory ? e->dev->ops->memory_free(e->dev) : 0;
    rows = rows_most(e, 0);
    if (rows < wanted && !e->scope_all) {
        int beside = rows_most(e, wanted);
        if (beside >= ROWS_MIN && (c->model.max_tokens || beside >= rows / 2)) {
            e->prefix_max = wanted;
            rows = beside;
        }
    }
    if (rows < ROWS_MIN || (c->model.max_tokens && rows < wanted && !e->prefix_max)) {
        return rows_refuse(e, wanted, rows);
    }
    e->rows_max = e->sequence.tail_max = rows;
    e->sequence.tokens_max = wanted < rows || e->prefix_max ? wanted : rows;
    return spurion_ok();
}

static spurion_status block_take(spurion_engine *e, void *out, size_t bytes)
{
    spurion_status st;
    void **p = out;

    SPURION_TRY(st, e->dev->ops->alloc(e->dev, p, bytes ? bytes : 64));
    SPURION_TRY(st, e->dev->ops->zero(e->dev, *p, bytes ? bytes : 64)); /* touched now: what is stated is what is resident */
    e->buffers_bytes += bytes;
out:
    return st;
}

/* Zeroed memory whose pages are there: what is stated beforehand is what is resident. */
static void *touched(size_t count, size_t size)
{
    void *p = malloc(count * size + 1);
    return p ? memset(p, 0, count * size + 1) : NULL;
}

/* What comes from the device: pinned where it has its own memory, so that a pass need not wait for each array. */
static spurion_status landing_take(spurion_engine *e, spurion_sae_rows *h, size_t rows, size_t cells)
{
    spurion_status st;
    const spurion_ops *ops = e->dev->ops;

    SPURION_TRY(st, ops->host_alloc(e->dev, (void **)&h->count, rows * sizeof *h->count));
    SPURION_TRY(st, ops->host_alloc(e->dev, (void **)&h->index, cells * sizeof *h->index));
    SPURION_TRY(st, ops->host_alloc(e->dev, (void **)&h->value, cells * sizeof *h->value));
    SPURION_TRY(st, ops->host_alloc(e->dev, (void **)&h->xg, rows * sizeof *h->xg));
    SPURION_TRY(st, ops->host_alloc(e->dev, (void **)&h->bg, rows * sizeof *h->bg));
    if (e->gradients) {
        SPURION_TRY(st, ops->host_alloc(e->dev, (void **)&h->attribution, cells * sizeof *h->attribution));
    }
out:
    return st;
}

static spurion_status host_take(spurion_engine *e, int i)
{
    spurion_status st;
    const spurion_sae *s = e->saes[i];
    spurion_tally *y = &e->tally[i];
    int slots = s->full.slots > s->watched.F ? s->full.slots : s->watched.F;
    size_t n = (size_t)e->rows_max, cells = n * (size_t)slots, F = (size_t)s->full.F;

    for (int k = 0; k < 2; k++) {
        SPURION_TRY(st, landing_take(e, &e->hand[k].host[i], n, cells));
    }
    y->attribution = touched(F, sizeof *y->attribution);
    y->activation_sum = touched(F, sizeof *y->activation_sum);
    y->activation_max = touched(F, sizeof *y->activation_max);
    y->peak = touched(F, sizeof *y->peak);
    y->touched = touched(F, sizeof *y->touched);
    y->entry_of = touched(F, sizeof *y->entry_of);
    if (!y->attribution || !y->activation_sum || !y->activation_max || !y->peak || !y->touched || !y->entry_of) {
        st = spurion_engine_out_of_memory("the features of a pass");
        goto out;
    }
    memset(y->entry_of, 0xff, F * sizeof *y->entry_of);
    for (int k = 0; k < e->catalogue.entry_count; k++) {
        if (e->catalogue.entries[k].sae == i) {
            y->entry_of[e->catalogue.entries[k].index] = k;
        }
    }
out:
    return st;
}

static spurion_status workspace_take(spurion_engine *e)
{
    spurion_status st;
    size_t layers = (size_t)e->model->config.layers;
    spurion_plan_input in = plan_input(e, e->rows_max, e->prefix_max);
    spurion_plan plan;

    e->w.k = calloc(layers, sizeof *e->w.k);
    e->w.v = calloc(layers, sizeof *e->w.v);
    e->w.saved = calloc(layers, sizeof *e->w.saved);
    if (!e->w.k || !e->w.v || !e->w.saved) {
        st = spurion_engine_out_of_memory("the workspace");
        goto out;
    }
    plan = spurion_plan_make(&e->w, &in, NULL, NULL);
    SPURION_TRY(st, block_take(e, &e->kept, plan.kept_bytes));
    SPURION_TRY(st, block_take(e, &e->scratch, plan.scratch_bytes));
    (void)spurion_plan_make(&e->w, &in, e->kept, e->scratch);
out:
    return st;
}

spurion_status spurion_engine_memory_take(spurion_engine *e)
{
    spurion_status st;
    size_t n, d = (size_t)e->model->config.hidden;

    SPURION_TRY(st, rows_choose(e));
    n = (size_t)e->rows_max;
    SPURION_TRY(st, workspace_take(e));
    SPURION_TRY(st, block_take(e, &e->d_source, n * sizeof(int32_t)));
    SPURION_TRY(st, block_take(e, &e->d_row_set, n * sizeof(int32_t)));
    SPURION_TRY(st, block_take(e, &e->d_fraction, n * sizeof(float)));
    for (int p = 0; p <= 4 * e->model->config.layers; p++) {
        if (e->hook_points[p]) {
            SPURION_TRY(st, block_take(e, &e->point_x[p], n * d * sizeof(float)));
        }
    }
    if (e->config->attribution.method == SPURION_METHOD_IG) {
        SPURION_TRY(st, block_take(e, &e->mean_gradient, n * d * sizeof(float)));
    }
    for (int i = 0; i < e->sae_count; i++) {
        SPURION_TRY(st, spurion_sae_reserve(e->saes[i], e->rows_max, e->gradients, e->variants));
        e->buffers_bytes += e->saes[i]->buffer_bytes;
        SPURION_TRY(st, host_take(e, i));
    }
    e->host_bytes = host_rows_bytes(e, e->rows_max);
    e->rewards_room = REWARDS_PASSES * e->w.scored_max;
    SPURION_TRY(st, e->dev->ops->host_alloc(e->dev, (void **)&e->host_rewards, (size_t)e->rewards_room * sizeof *e->host_rewards));
out:
    return st;
}

/* A line of /proc/self/status in bytes: "VmRSS:" now, "VmHWM:" the most so far. */
static size_t resident_bytes(const char *what)
{
    char line[256];
    size_t kib = 0;
    FILE *f = fopen("/proc/self/status", "r");

    while (f && fgets(line, sizeof line, f)) {
        if (strncmp(line, what, strlen(what)) == 0) {
            kib = strtoul(line + strlen(what), NULL, 10);
        }
    }
    if (f) {
        fclose(f);
    }
    return kib << 10;
}

/* The most that will be resident: the load's own peak, or what is there now and the rollouts in hand. */
size_t spurion_engine_peak_estimate(const spurion_engine *e)
{
    size_t load = resident_bytes("VmHWM:"), work = resident_bytes("VmRSS:") + IN_HAND_BYTES + (size_t)e->rows_max * IN_HAND_ROW_BYTES;
    return load > work ? load : work;
}

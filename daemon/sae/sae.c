/* A dictionary on the device; see sae.h. */
#include "daemon/sae/sae.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/base/check.h"
#include "daemon/model/model.h"

#define SLOTS_MAX 1024
#define SLOTS_MIN 256
#define SLOT_ROWS (4 << 20) /* rows x slots is kept near this */

int spurion_hook_point(spurion_hook hook)
{
    static const int sites[] = {SPURION_SITE_PRE, SPURION_SITE_ATTN, SPURION_SITE_MID, SPURION_SITE_MLP, 4};
    return 4 * hook.layer + sites[hook.site];
}

/* Whether a hook is named by the path of a module. */
static bool names_module(const char *name, const char *module)
{
    const char *at = strncmp(name, "blocks.", 7) != 0 ? strstr(name, module) : NULL;

    return at != NULL && (at[strlen(module)] == '\0' || at[strlen(module)] == '.');
}

spurion_status spurion_hook_check(spurion_hook hook, const char *name, const spurion_model_config *config)
{
    if (hook.layer < 0 || hook.layer >= config->layers) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "hook %s: expected a block from 0 to %d (the model has %d), found %d", name,
                             config->layers - 1, config->layers, hook.layer);
    }
    if (hook.site == SPURION_HOOK_MID && config->parallel) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "hook %s: expected a hook that %s has; its blocks are parallel and have no resid_mid", name,
                             config->architecture);
    }
    if (config->post_norms && (names_module(name, ".mlp") || names_module(name, ".self_attn"))) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "hook %s: expected a point that %s has; a norm stands between that module and the residual "
                             "stream, and only what is added can be read (blocks.L.hook_mlp_out, hook_attn_out)", name, config->architecture);
    }
    return spurion_ok();
}

int spurion_sae_slots(spurion_sae_kind kind, int k, int F, int rows)
{
    int slots = SLOT_ROWS / (rows > 0 ? rows : 1);
    if (kind == SPURION_SAE_TOPK || kind == SPURION_SAE_GROUPMAX) {
        return k;
    }
    slots = slots > SLOTS_MAX ? SLOTS_MAX : slots < SLOTS_MIN ? SLOTS_MIN : slots;
    return slots < F ? slots : F;
}

static spurion_status put(const void **out, spurion_sae *s, const void *host, size_t bytes)
{
    spurion_status st;
    void *p = NULL;

    *out = NULL;
    if (!host) {
        return spurion_ok();
    }
    SPURION_TRY(st, s->dev->ops->alloc(s->dev, &p, bytes ? bytes : 64));
    *out = p;
    SPURION_TRY(st, s->dev->ops->upload(s->dev, p, host, bytes));
    s->bytes += bytes;
out:
    return st;
}

static spurion_status put_floats(const float **out, spurion_sae *s, const float *host, size_t count)
{
    return put((const void **)out, s, host, count * sizeof(float));
}

/* Puts one dictionary (a whole one, or gathered rows) on the device. */
static spurion_status weights_put(spurion_sae_weights *w, spurion_sae *s, const spurion_sae_file *f, spurion_dtype dtype)
{
    spurion_status st;
    size_t F = (size_t)f->F, d = (size_t)f->d;
    int use = f->kind == SPURION_SAE_GROUPMAX ? SPURION_FORWARD : SPURION_SELECT; /* a group's best may be any of it */

    w->d = f->d;
    w->F = f->F;
    w->kind = f->kind;
    w->norm = f->norm;
    w->k = f->k;
    SPURION_TRY(st, s->dev->ops->matrix_create(s->dev, &w->enc, f->enc, f->enc_bias, f->F, f->d, use, dtype));
    s->bytes += s->dev->ops->matrix_bytes(s->dev, f->F, f->d, use, dtype);
    SPURION_TRY(st, put_floats(&w->threshold, s, f->threshold, F));
    SPURION_TRY(st, put_floats(&w->scale, s, f->scale, F));
    SPURION_TRY(st, put_floats(&w->gate_bias, s, f->gate_bias, F));
    SPURION_TRY(st, put_floats(&w->mag_scale, s, f->mag_scale, F));
    SPURION_TRY(st, put_floats(&w->mag_bias, s, f->mag_bias, F));
    SPURION_TRY(st, put_floats(&w->dec, s, f->dec, F * d));
    SPURION_TRY(st, put_floats(&w->dec_bias, s, f->dec_bias, d));
out:
    return st;
}

spurion_status spurion_sae_create(spurion_sae **out, spurion_dev *dev, const spurion_sae_file *file, const char *id, spurion_hook hook,
                                  spurion_dtype dtype)
{
    spurion_status st;
    spurion_sae *s = calloc(1, sizeof *s);

    *out = NULL;
    if (!s) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for SAE %s", id);
    }
    s->dev = dev;
    s->id = id;
    s->hook = hook;
    s->point = spurion_hook_point(hook);
    spurion_hook_name(s->hook_name, sizeof s->hook_name, hook);
    memcpy(s->format, file->format, sizeof s->format);
    memcpy(s->architecture, file->architecture, sizeof s->architecture);
    memcpy(s->notes, file->notes, sizeof s->notes);
    memcpy(s->digest, file->digest, sizeof s->digest);
    SPURION_TRY(st, weights_put(&s->full, s, file, dtype));
    *out = s;
    s = NULL;
out:
    spurion_sae_destroy(s);
    return st;
}

/* Copies the chosen rows of one array of the file; NULL stays NULL. */
static spurion_status rows_gather(float **out, const float *from, const int32_t *rows, int count, size_t width)
{
    *out = NULL;
    if (!from) {
        return spurion_ok();
    }
    *out = malloc((size_t)count * width * sizeof(float) + 1);
    if (!*out) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %d watched features", count);
    }
    for (int i = 0; i < count; i++) {
        memcpy(*out + (size_t)i * width, from + (size_t)rows[i] * width, width * sizeof(float));
    }
    return spurion_ok();
}

static spurion_status watched_put(spurion_sae *s, const spurion_sae_file *f, const int32_t *rows, int count, spurion_dtype dtype)
{
    spurion_status st;
    spurion_sae_file part = *f;
    float **to[] = {&part.enc, &part.enc_bias, &part.threshold, &part.scale, &part.gate_bias, &part.mag_scale, &part.mag_bias, &part.dec};
    const float *from[] = {f->enc, f->enc_bias, f->threshold, f->scale, f->gate_bias, f->mag_scale, f->mag_bias, f->dec};
    const size_t parts = sizeof to / sizeof *to;

    for (size_t i = 0; i < parts; i++) {
        *to[i] = NULL;
    }
    part.F = count;
    for (size_t i = 0; i < parts; i++) {
        size_t width = from[i] == f->enc || from[i] == f->dec ? (size_t)f->d : 1;
        SPURION_TRY(st, rows_gather(to[i], from[i], rows, count, width));
    }
    SPURION_TRY(st, weights_put(&s->watched, s, &part, dtype));
    SPURION_TRY(st, put((const void **)&s->member, s, rows, (size_t)count * sizeof *rows));
    s->watched.slots = count; /* a list of members never overflows */
out:
    for (size_t i = 0; i < parts; i++) {
        free(*to[i]);
    }
    return st;
}

/* Appends the members of one set that belong to SAE `place`. */
static int set_append(int32_t *index, float *minimum, int at, const spurion_catalogue *c, const int32_t *entries, int count, int place)
{
    for (int i = 0; i < count; i++) {
        const spurion_catalogue_entry *e = &c->entries[entries[i]];
        if (e->sae == place && e->spurious) {
            index[at] = e->index;
            minimum[at++] = e->activation_min;
        }
    }
    return at;
}

/* The catalogue's sets and, after them, every entry as a set of its own, restricted to this SAE. */
static spurion_status sets_put(spurion_sae *s, const spurion_catalogue *c, int place)
{
    spurion_status st;
    int total = c->set_count + c->entry_count, members = c->entry_count, at = 0;
    int32_t *begin = NULL, *index = NULL;
    float *minimum = NULL;

    for (int i = 0; i < c->set_count; i++) {
        members += c->sets[i].count;
    }
    begin = malloc(((size_t)total + 1) * sizeof *begin);
    index = malloc(((size_t)members + 1) * sizeof *index);
    minimum = malloc(((size_t)members + 1) * sizeof *minimum);
    s->set_touches = calloc((size_t)total + 1, sizeof *s->set_touches);
    if (!begin || !index || !minimum || !s->set_touches) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %d ablation sets", total);
        goto out;
    }
    for (int i = 0; i < total; i++) {
        int32_t single = i - c->set_count;
        begin[i] = at;
        at = i < c->set_count ? set_append(index, minimum, at, c, c->sets[i].entries, c->sets[i].count, place)
                              : set_append(index, minimum, at, c, &single, 1, place);
        s->set_touches[i] = at > begin[i];
    }
    begin[total] = at;
    SPURION_TRY(st, put((const void **)&s->sets.begin, s, begin, ((size_t)total + 1) * sizeof *begin));
    SPURION_TRY(st, put((const void **)&s->sets.index, s, index, (size_t)at * sizeof *index));
    SPURION_TRY(st, put((const void **)&s->sets.activation_min, s, minimum, (size_t)at * sizeof *minimum));
out:
    free(begin);
    free(index);
    free(minimum);
    return st;
}

spurion_status spurion_sae_watch(spurion_sae *s, const spurion_sae_file *file, const spurion_catalogue *catalogue, int place, spurion_dtype dtype)
{
    spurion_status st;
    int32_t *rows = malloc(((size_t)catalogue->entry_count + 1) * sizeof *rows);
    int count = 0;

    if (!rows) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %d watched features", catalogue->entry_count);
    }
    for (int i = 0; i < catalogue->entry_count; i++) { /* ascending by (sae, index) */
        if (catalogue->entries[i].sae == place && catalogue->entries[i].spurious) {
            rows[count++] = catalogue->entries[i].index;
        }
    }
    s->watches = count > 0;
    if (count && file->kind != SPURION_SAE_GROUPMAX) {
        SPURION_TRY(st, watched_put(s, file, rows, count, dtype));
    }
    SPURION_TRY(st, sets_put(s, catalogue, place));
out:
    free(rows);
    return st;
}

static size_t sparse_bytes(int rows, int slots)
{
    return (size_t)rows * (3 * 4 + (size_t)slots * 8);
}

/* Scratch of either way to encode; full: with its slots set. */
static size_t scratch_bytes(const spurion_sae *s, const spurion_sae_weights *full, int rows)
{
    size_t whole = s->dev->ops->sae_scratch_bytes(s->dev, full, rows);
    size_t part = s->watched.F ? s->dev->ops->sae_scratch_bytes(s->dev, &s->watched, rows) : 0;
    return whole > part ? whole : part;
}

size_t spurion_sae_buffer_bytes(const spurion_sae *s, int rows, bool gradients, bool variants)
{
    int slots = spurion_sae_slots(s->full.kind, s->full.k, s->full.F, rows);
    spurion_sae_weights w = s->full;
    size_t bytes = sparse_bytes(rows, slots) + (variants ? sparse_bytes(rows, s->watched.F ? s->watched.F : slots) : 0);

    w.slots = slots;
    bytes += scratch_bytes(s, &w, rows);
    return bytes + (gradients ? (size_t)rows * ((size_t)slots + 2) * 4 : 0);
}

static spurion_status block(void *out, spurion_sae *s, size_t bytes)
{
    spurion_status st;
    void **p = out;

    s->buffer_bytes += bytes;
    SPURION_TRY(st, s->dev->ops->alloc(s->dev, p, bytes ? bytes : 64));
    SPURION_TRY(st, s->dev->ops->zero(s->dev, *p, bytes ? bytes : 64)); /* touched now */
out:
    return st;
}

static spurion_status sparse_reserve(spurion_sparse *f, spurion_sae *s, int rows, int slots)
{
    spurion_status st;
    size_t n = (size_t)rows;

    f->slots = slots;
    SPURION_TRY(st, block(&f->count, s, n * 4));
    SPURION_TRY(st, block(&f->index, s, n * (size_t)f->slots * 4));
    SPURION_TRY(st, block(&f->value, s, n * (size_t)f->slots * 4));
    SPURION_TRY(st, block(&f->token_scale, s, n * 4));
    SPURION_TRY(st, block(&f->token_shift, s, n * 4));
out:
    return st;
}

spurion_status spurion_sae_reserve(spurion_sae *s, int rows, bool gradients, bool variants)
{
    spurion_status st;
    size_t n = (size_t)rows;

    s->full.slots = spurion_sae_slots(s->full.kind, s->full.k, s->full.F, rows);
    SPURION_TRY(st, sparse_reserve(&s->clean, s, rows, s->full.slots));
    if (variants) {
        SPURION_TRY(st, sparse_reserve(&s->live, s, rows, s->watched.F ? s->watched.F : s->full.slots));
    }
    if (gradients) {
        SPURION_TRY(st, block(&s->attribution, s, n * (size_t)s->full.slots * 4));
        SPURION_TRY(st, block(&s->xg, s, n * 4));
        SPURION_TRY(st, block(&s->bg, s, n * 4));
    }
    SPURION_TRY(st, block(&s->scratch, s, scratch_bytes(s, &s->full, rows)));
out:
    return st;
}

spurion_status spurion_sae_encode_live(spurion_sae *s, const float *x, int rows)
{
    const spurion_ops *ops = s->dev->ops;
    return s->watched.F ? ops->sae_encode_members(s->dev, &s->live, &s->full, &s->watched, s->member, x, s->scratch, rows)
                        : ops->sae_encode(s->dev, &s->live, &s->full, x, s->scratch, rows);
}

static void weights_free(spurion_dev *dev, spurion_sae_weights *w)
{
    const void *blocks[] = {w->threshold, w->scale, w->gate_bias, w->mag_scale, w->mag_bias, w->dec, w->dec_bias};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
        dev->ops->free(dev, (void *)blocks[i]);
    }
    dev->ops->matrix_destroy(dev, w->enc);
}

static void sparse_free(spurion_dev *dev, spurion_sparse *f)
{
    void *blocks[] = {f->count, f->index, f->value, f->token_scale, f->token_shift};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
        dev->ops->free(dev, blocks[i]);
    }
}

void spurion_sae_destroy(spurion_sae *s)
{
    if (!s) {
        return;
    }
    const void *blocks[] = {s->sets.begin, s->sets.index, s->sets.activation_min, s->attribution, s->xg, s->bg, s->scratch};
    weights_free(s->dev, &s->full);
    weights_free(s->dev, &s->watched);
    s->dev->ops->free(s->dev, (void *)s->member);
    sparse_free(s->dev, &s->clean);
    sparse_free(s->dev, &s->live);
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
        s->dev->ops->free(s->dev, (void *)blocks[i]);
    }
    free(s->set_touches);
    free(s);
}

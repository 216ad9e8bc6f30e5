/* Life of the engine: loads and checks everything, and turns jobs into passes. See engine.h. */
#include "daemon/engine_internal.h"

#include <limits.h>
#include <malloc.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/base/check.h"
#include "daemon/base/log.h"
#include "daemon/base/sha256.h"
#include "daemon/model/tokenizer.h"
#include "daemon/rules.h"

#define SAE_DTYPE SPURION_F32 /* thresholds and top-k are discontinuous: encoded as the libraries do, whatever model.dtype is */

#define BATCH_PASSES 3        /* of a device with memory of its own: the first and the last of a micro-batch have nothing beside them */

/* What create holds until the device has it. */
typedef struct loading {
    spurion_model_config model;
    spurion_weights *weights;
    spurion_sae_file files[SPURION_SAES_MAX];
    spurion_hook hooks[SPURION_SAES_MAX];
    spurion_head_choice choice;
    double *weights_of_head; /* (outputs) or NULL */
} loading;

/* model.head_weights: one number for each output. */
static spurion_status head_weights_read(loading *l, const spurion_config *c)
{
    int n = c->model.head_weight_count;

    if (c->model.head_index >= 0 || n != l->model.outputs) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "model.head_weights: expected %d numbers (the head's outputs) and no model.head_index, found %d%s",
                             l->model.outputs, n, c->model.head_index >= 0 ? " and a head_index" : "");
    }
    l->weights_of_head = calloc((size_t)n, sizeof *l->weights_of_head);
    if (!l->weights_of_head) {
        return spurion_engine_out_of_memory("the head's weights");
    }
    for (int i = 0; i < n; i++) {
        char *end;
        l->weights_of_head[i] = strtod(c->model.head_weights[i], &end);
        if (end == c->model.head_weights[i] || *end || !isfinite(l->weights_of_head[i])) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "model.head_weights: expected numbers, found '%.40s'", c->model.head_weights[i]);
        }
    }
    l->choice.weights = l->weights_of_head;
    return spurion_ok();
}

static spurion_status head_choose(loading *l, const spurion_config *c)
{
    int outputs = l->model.outputs, index = c->model.head_index;

    if (c->model.head_weight_count) {
        return head_weights_read(l, c);
    }
    if (index < 0 && outputs > 1) {
        return spurion_error(SPURION_INVALID_ARGUMENT,
                             "%s: expected a score head of 1 output, found %d; model.head_index says which is the reward, or "
                             "model.head_weights how they are weighed",
                             c->model.path, outputs);
    }
    l->choice.index = index < 0 ? 0 : index;
    if (l->choice.index >= outputs) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "model.head_index: expected 0 to %d (the head has %d outputs), found %d", outputs - 1,
                             outputs, index);
    }
    return spurion_ok();
}

static const char *const pooling_names[] = {"last", "last_non_pad", "first_eos", "mean"}; /* by spurion_pooling */

static bool pad_is_eos(const spurion_model_config *m)
{
    for (int i = 0; i < m->eos_count; i++) {
        if (m->pad >= 0 && m->eos[i] == m->pad) {
            return true;
        }
    }
    return false;
}

/* The user's word, then the checkpoint's, then last: with a warning where trainers disagree about it. */
static spurion_status pooling_choose(loading *l, const spurion_config *c)
{
    spurion_model_config *m = &l->model;

    for (int i = 0; c->model.pooling && i < 4; i++) {
        if (strcmp(c->model.pooling, pooling_names[i]) == 0) {
            m->pooling = (spurion_pooling)i;
            m->pooling_said = true;
        }
    }
    if (m->pooling == SPURION_POOL_FIRST_EOS && m->eos_count == 0) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "model.pooling: first_eos: expected eos_token_id in %s/config.json, found none",
                             c->model.path);
    }
    if (!m->pooling_said && pad_is_eos(m)) {
        spurion_log_warn("MODEL-POOLING", "pad_token_id equals eos_token_id (%d): trainers score another position than the last after an "
                         "EOS; the reward is read at the last one (model.pooling says otherwise)", m->pad);
    }
    return spurion_ok();
}

static spurion_status sae_file_load(loading *l, const spurion_sae_config *c, int i)
{
    spurion_status st;
    const spurion_sae_options options = {c->format, c->has_norm_factor ? c->norm_factor : 0, c->unit_decoder};
    const char *name;

    SPURION_TRY(st, spurion_sae_file_read(&l->files[i], c->path, &options));
    name = c->hook ? c->hook : l->files[i].hook_name;
    if (!name[0]) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "SAE %s: its file names no hook; expected saes[].hook, such as blocks.2.hook_resid_post", c->id);
        goto out;
    }
    SPURION_TRY(st, spurion_hook_parse(&l->hooks[i], name));
    SPURION_TRY(st, spurion_hook_check(l->hooks[i], name, &l->model));
    if (l->files[i].d != l->model.hidden) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "SAE %s at %s: expected width %d (the model's), found %d", c->id, name, l->model.hidden,
                           l->files[i].d);
    }
out:
    return st;
}

/* Reads everything into host memory and checks that it fits together. */
static spurion_status files_load(spurion_engine *e, loading *l)
{
    spurion_status st;
    const spurion_config *c = e->config;
    int32_t widths[SPURION_SAES_MAX];
    spurion_labels_sae known[SPURION_SAES_MAX];
    char tokenizer_path[4096];

    SPURION_TRY(st, spurion_model_config_read(&l->model, c->model.path));
    SPURION_TRY(st, head_choose(l, c));
    SPURION_TRY(st, pooling_choose(l, c));
    if (c->model.append_eos && l->model.eos_count == 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "model.append_eos: expected eos_token_id in %s/config.json, found none", c->model.path);
        goto out;
    }
    SPURION_TRY(st, spurion_weights_open(&l->weights, c->model.path, &l->model));
    SPURION_TRY(st, spurion_weights_digest_begin(l->weights)); /* as long as everything else takes */
    (void)snprintf(tokenizer_path, sizeof tokenizer_path, "%s/tokenizer.json", c->model.path);
    SPURION_TRY(st, spurion_tokenizer_open(&e->tokenizer, tokenizer_path));
    SPURION_TRY(st, spurion_chat_open(&e->chat, c->model.template_kind, c->model.path, &l->model, e->tokenizer));
    for (int i = 0; i < c->sae_count; i++) {
        SPURION_TRY(st, sae_file_load(l, &c->saes[i], i));
        widths[i] = known[i].width = l->files[i].F;
        memcpy(known[i].digest, l->files[i].digest, sizeof known[i].digest);
    }
    SPURION_TRY(st, spurion_catalogue_load(&e->catalogue, c, widths));
    e->has_catalogue = true;
    if (c->labels) {
        SPURION_TRY(st, spurion_labels_load(&e->labels, c->labels, known, c->sae_count));
    }
out:
    return st;
}

/* Where forward passes stop. Variants start at the input of the block that holds an SAE, so that point is kept too. */
static spurion_status points_find(spurion_engine *e, const loading *l)
{
    size_t points = 4 * (size_t)l->model.layers + 1;

    e->hook_points = calloc(points, sizeof *e->hook_points);
    e->sae_points = calloc(points, sizeof *e->sae_points);
    e->point_x = calloc(points, sizeof *e->point_x);
    if (!e->hook_points || !e->sae_points || !e->point_x) {
        return spurion_engine_out_of_memory("the hooks");
    }
    e->lowest = (int)points;
    for (int i = 0; i < e->config->sae_count; i++) {
        int point = spurion_hook_point(l->hooks[i]);
        e->sae_points[point] = e->hook_points[point] = true;
        e->hook_points[point - point % 4] |= e->variants;
        e->lowest = point < e->lowest ? point : e->lowest;
    }
    return spurion_ok();
}

static spurion_status device_load(spurion_engine *e, loading *l)
{
    spurion_status st;
    const spurion_config *c = e->config;
    int backward_from = e->gradients ? e->lowest / 4 : l->model.layers;
    int positions = c->model.max_tokens ? c->model.max_tokens : l->model.context;

    positions = positions < l->model.context ? positions : l->model.context;
    SPURION_TRY(st, spurion_model_load(&e->model, e->dev, &l->model, l->weights, positions, backward_from, l->choice));
    e->weights_bytes = e->model->bytes;
    for (int i = 0; i < c->sae_count; i++) {
        SPURION_TRY(st, spurion_sae_create(&e->saes[i], e->dev, &l->files[i], c->saes[i].id, l->hooks[i], SAE_DTYPE));
        e->sae_count = i + 1;
        SPURION_TRY(st, spurion_sae_watch(e->saes[i], &l->files[i], &e->catalogue, i, SAE_DTYPE));
        e->weights_bytes += e->saes[i]->bytes;
        spurion_sae_file_fini(&l->files[i]);
    }
out:
    return st;
}

spurion_status spurion_engine_create(spurion_engine **out, const spurion_config *config)
{
    spurion_status st;
    spurion_engine *e = calloc(1, sizeof *e);
    loading *l = calloc(1, sizeof *l);

    *out = NULL;
    if (!e || !l) {
        st = spurion_engine_out_of_memory("the engine");
        goto out;
    }
    e->config = config;
    e->scope_all = config->attribution.scope == SPURION_SCOPE_ALL;
    e->gradients = config->attribution.method != SPURION_METHOD_NONE && config->sae_count;
    e->watch_first = config->attribution.l0_mean == SPURION_WHEN_FLAGGED;
    for (int i = 0; i < 2; i++) {
        e->hand[i].e = e;
        spurion_arena_init(&e->hand[i].arena, 0);
    }
    SPURION_TRY(st, files_load(e, l));
    e->variants = config->sae_count && (e->catalogue.entry_count || config->attribution.method == SPURION_METHOD_IG ||
                                        config->attribution.completeness);
    SPURION_TRY(st, points_find(e, l));
    SPURION_TRY(st, spurion_dev_create(&e->dev, config->engine.device, config->model.dtype, config->engine.threads));
    SPURION_TRY(st, device_load(e, l));
    if (e->dev->own_memory) { /* which it is, and how it makes the products that it was just given */
        spurion_log_info("DEVICE", "%s", e->dev->name);
    }
    SPURION_TRY(st, spurion_weights_digest(e->weights_digest, l->weights));
    SPURION_TRY(st, spurion_provenance_make(e->provenance, &e->provenance_text, e, config));
    spurion_weights_close(l->weights);
    l->weights = NULL;
    malloc_trim(0); /* the staging of the load goes back before the blocks are taken */
    SPURION_TRY(st, spurion_engine_memory_take(e));
    e->sequence.tokenizer = e->tokenizer;
    e->sequence.config = config;
    e->sequence.chat = &e->chat;
    e->sequence.model = &e->model->config;
    e->sequence.vocab = e->model->vocab;
    e->peak_bytes = spurion_engine_peak_estimate(e);
    *out = e;
    e = NULL;
out:
    for (int i = 0; l && i < SPURION_SAES_MAX; i++) {
        spurion_sae_file_fini(&l->files[i]);
    }
    spurion_weights_close(l ? l->weights : NULL);
    free(l ? l->weights_of_head : NULL);
    free(l);
    spurion_engine_destroy(e);
    return st;
}

static void host_free(spurion_engine *e, int i)
{
    const spurion_sae_rows *h = &e->hand[0].host[i], *h2 = &e->hand[1].host[i];
    spurion_tally *y = &e->tally[i];
    void *landed[] = {h->count,  h->index,  h->value,  h->attribution,  h->xg,  h->bg,
                      h2->count, h2->index, h2->value, h2->attribution, h2->xg, h2->bg};
    void *blocks[] = {y->attribution, y->activation_sum, y->activation_max, y->peak, y->touched, y->entry_of};
    for (size_t b = 0; b < sizeof landed / sizeof *landed; b++) {
        e->dev->ops->host_free(e->dev, landed[b]);
    }
    for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++) {
        free(blocks[b]);
    }
}

static void device_free(spurion_engine *e)
{
    e->dev->ops->host_free(e->dev, e->host_rewards);
    void *blocks[] = {e->kept, e->scratch, e->d_source, e->d_row_set, e->d_fraction, e->mean_gradient};
    for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++) {
        e->dev->ops->free(e->dev, blocks[b]);
    }
    for (int p = 0; e->model && e->point_x && p <= 4 * e->model->config.layers; p++) {
        e->dev->ops->free(e->dev, e->point_x[p]);
    }
    for (int i = 0; i < e->sae_count; i++) {
        host_free(e, i);
        spurion_sae_destroy(e->saes[i]);
    }
    spurion_model_destroy(e->model);
}

void spurion_engine_destroy(spurion_engine *e)
{
    if (!e) {
        return;
    }
    if (e->dev) {
        device_free(e);
        spurion_dev_destroy(e->dev);
    }
    if (e->has_catalogue) {
        spurion_catalogue_fini(&e->catalogue);
    }
    spurion_labels_fini(&e->labels);
    spurion_tokenizer_close(e->tokenizer);
    for (int i = 0; i < 2; i++) {
        spurion_arena_fini(&e->hand[i].arena);
    }
    free(e->hook_points);
    free(e->sae_points);
    free(e->point_x);
    free(e->w.k);
    free(e->w.v);
    free(e->w.saved);
    free(e->provenance_text);
    free(e);
}

/* --- judging --- */

void spurion_engine_prepare(const spurion_engine *e, spurion_job *job)
{
    spurion_sequence_make(job, &e->sequence);
}

/* Jobs that were not refused, in their order. */
static int ready_jobs(spurion_job **out, spurion_job *const *jobs, int count)
{
    int n = 0;
    for (int i = 0; i < count; i++) {
        if (jobs[i]->verdict.code == SPURION_OK) {
            out[n++] = jobs[i];
        }
    }
    return n;
}

int spurion_engine_rows(const spurion_engine *e, spurion_job *const *jobs, int job_count)
{
    spurion_job **ready = calloc((size_t)job_count + 1, sizeof(spurion_job *));
    int rows;

    SPURION_ASSERT(ready);
    rows = spurion_pack_rows(ready, ready_jobs(ready, jobs, job_count), e->scope_all);
    free(ready);
    return rows;
}

int spurion_engine_batch_rows(const spurion_engine *e)
{
    return e->dev->own_memory && e->rows_max <= INT_MAX / BATCH_PASSES ? BATCH_PASSES * e->rows_max : e->rows_max;
}

static int group_length(spurion_job *const *jobs, int count)
{
    int n = 1;
    while (n < count && jobs[n]->group_number == jobs[0]->group_number) {
        n++;
    }
    return n;
}

/* Jobs from the front that fit one pass: whole groups as far as possible, else as many members of one group as fit; where not even one does,
 * its prompt goes in pieces before the pass, and the tails of the group must fit. */
static int pass_length(const spurion_engine *e, spurion_job *const *jobs, int count)
{
    int taken = 0, rows = 0;

    while (taken < count) {
        int n = group_length(jobs + taken, count - taken);
        int more = spurion_pack_rows(jobs + taken, n, e->scope_all);
        if (rows + more > e->rows_max || taken + n > e->w.scored_max) {
            break;
        }
        rows += more;
        taken += n;
    }
    if (taken == 0) {
        int (*cost)(spurion_job *const *, int, bool) = spurion_pack_rows(jobs, 1, e->scope_all) <= e->rows_max ? spurion_pack_rows
                                                                                                              : spurion_pack_tail_rows;
        taken = 1;
        while (taken < count && taken < e->w.scored_max && jobs[taken]->group_number == jobs[0]->group_number &&
               cost(jobs, taken + 1, e->scope_all) <= e->rows_max) {
            taken++;
        }
    }
    return taken;
}

/* The evidence that is still owed. */
static spurion_status evidence_pay(spurion_engine *e)
{
    spurion_measurement *owed = e->owed;
    e->owed = NULL;
    return owed ? spurion_measure_evidence(owed) : spurion_ok();
}

/* Measures jobs pass by pass. While the device works on one, the host makes the evidence of the one before and packs the next; that of the last is
 * owed: it is made beside whatever the device does next. */
static spurion_status measure_all(spurion_engine *e, spurion_job *const *jobs, int count, bool explain, bool ablate)
{
    spurion_status st = spurion_ok();
    int n = count ? pass_length(e, jobs, count) : 0, turn = e->owed == &e->hand[0];

    if (count) {
        SPURION_TRY(st, spurion_measure_pack(&e->hand[turn], jobs, n, explain, ablate));
    }
    for (int at = n; n; at += n, turn = 1 - turn) {
        spurion_measurement *k = &e->hand[turn];
        SPURION_TRY(st, spurion_measure_launch(k));
        SPURION_TRY(st, evidence_pay(e));
        n = at < count ? pass_length(e, jobs + at, count - at) : 0;
        if (n) {
            SPURION_TRY(st, spurion_measure_pack(&e->hand[1 - turn], jobs + at, n, explain, ablate));
        }
        SPURION_TRY(st, spurion_measure_settle(k));
        e->owed = k;
    }
out:
    return st;
}

/* when: flagged: a second look, with gradients, at the rollouts that were flagged. */
static spurion_status explain_flagged(spurion_engine *e, spurion_job **ready, int count)
{
    int n = 0;
    for (int i = 0; i < count; i++) {
        if (ready[i]->verdict.code == SPURION_OK && ready[i]->verdict.flag_count) {
            ready[n++] = ready[i];
        }
    }
    return measure_all(e, ready, n, true, false);
}

spurion_status spurion_engine_judge(spurion_engine *e, spurion_job *const *jobs, int job_count)
{
    spurion_status st;
    bool at_once = e->config->attribution.when == SPURION_WHEN_ALL;
    spurion_job **ready = calloc((size_t)job_count + 1, sizeof(spurion_job *));
    int count;

    if (!ready) {
        return spurion_engine_out_of_memory("a micro-batch");
    }
    count = ready_jobs(ready, jobs, job_count);
    e->owed = NULL; /* of a call that failed */
    SPURION_TRY(st, measure_all(e, ready, count, at_once, true));
    for (int at = 0, n; at < job_count; at += n) {
        n = group_length(jobs + at, job_count - at);
        SPURION_TRY(st, spurion_rules_apply(jobs + at, n, e->config, &e->catalogue));
    }
    if (!at_once) {
        SPURION_TRY(st, explain_flagged(e, ready, count));
    }
    SPURION_TRY(st, evidence_pay(e));
    for (int i = 0; i < job_count; i++) {
        SPURION_TRY(st, spurion_evidence_finish(e, jobs[i]));
    }
out:
    free(ready);
    return st;
}

/* --- other rules --- */

#define RESTART "thresholds, actions, alerts, labels and intended or unknown features' verdicts can change while running; this needs a restart"

/* OK where both catalogues watch the same features in the same way; else the first difference, by (sae, index). */
static spurion_status same_entries(const spurion_engine *e, const spurion_catalogue *fresh)
{
    const spurion_catalogue *held = &e->catalogue;

    for (int i = 0; i < held->entry_count || i < fresh->entry_count; i++) {
        const spurion_catalogue_entry *x = i < held->entry_count ? &held->entries[i] : NULL, *y = i < fresh->entry_count ? &fresh->entries[i] : NULL;
        const spurion_catalogue_entry *first = !x || (y && (y->sae < x->sae || (y->sae == x->sae && y->index < x->index))) ? y : x;
        const char *sae = e->config->saes[first->sae].id;
        if (!x || !y || x->sae != y->sae || x->index != y->index) {
            return spurion_error(SPURION_FAILED_PRECONDITION, "catalogue: expected the %d features that the device holds, found %d, %s %s/%d; " RESTART,
                                 held->entry_count, fresh->entry_count, first == y ? "a new one" : "without", sae, first->index);
        }
        if (x->spurious != y->spurious) {
            return spurion_error(SPURION_FAILED_PRECONDITION, "catalogue: %s/%d: expected the verdict %.*s that the device works with, found %.*s; " RESTART,
                                 sae, x->index, (int)x->verdict.size, x->verdict.data, (int)y->verdict.size, y->verdict.data);
        }
        if (x->activation_min != y->activation_min) {
            return spurion_error(SPURION_FAILED_PRECONDITION, "catalogue: %s/%d: expected the activation_min %g that the device holds, found %g; " RESTART,
                                 sae, x->index, (double)x->activation_min, (double)y->activation_min);
        }
    }
    return spurion_ok();
}

/* Whether one of the sets that are held is this one; entries of both catalogues have the same places. */
static bool is_held(const spurion_catalogue *held, const spurion_ablation_set *set)
{
    for (int i = 0; i < held->set_count; i++) {
        size_t n = (size_t)held->sets[i].count;
        if (held->sets[i].count == set->count && (n == 0 || memcmp(held->sets[i].entries, set->entries, n * sizeof *set->entries) == 0)) {
            return true;
        }
    }
    return false;
}

/* OK where every set to ablate stands at the same place; else who needs another one. */
static spurion_status same_sets(const spurion_engine *e, const spurion_catalogue *fresh, const spurion_config *config)
{
    const spurion_catalogue *held = &e->catalogue;
    bool same = held->set_count == fresh->set_count && held->debias_set == fresh->debias_set;

    for (int i = 0; same && i < fresh->set_count; i++) {
        size_t n = (size_t)fresh->sets[i].count;
        same = held->sets[i].count == fresh->sets[i].count &&
               (n == 0 || memcmp(held->sets[i].entries, fresh->sets[i].entries, n * sizeof *fresh->sets[i].entries) == 0);
    }
    if (same) {
        return spurion_ok();
    }
    if (!is_held(held, &fresh->sets[fresh->debias_set])) {
        return spurion_error(SPURION_FAILED_PRECONDITION, "catalogue: expected the %d features that the counterfactual reward removes, found %d or others (a "
                             "changed role); " RESTART, held->sets[held->debias_set].count, fresh->sets[fresh->debias_set].count);
    }
    for (int i = 0; i < config->rule_count; i++) {
        if (!is_held(held, &fresh->sets[fresh->rule_sets[i]])) {
            return spurion_error(SPURION_FAILED_PRECONDITION, "rule %s: expected one of the %d sets of features that the device ablates, found another (%d "
                                 "features: other families or roles); " RESTART, config->rules[i].id, held->set_count,
                                 fresh->sets[fresh->rule_sets[i]].count);
        }
    }
    return spurion_error(SPURION_FAILED_PRECONDITION, "catalogue: expected the %d sets of features that the device ablates, found %d, for other families; "
                         RESTART, held->set_count, fresh->set_count);
}

spurion_status spurion_engine_reload_make(spurion_engine_reload **out, const spurion_engine *e, const spurion_config *config)
{
    spurion_status st;
    spurion_engine_reload *r = calloc(1, sizeof *r);
    int32_t widths[SPURION_SAES_MAX];

    *out = NULL;
    if (!r) {
        return spurion_engine_out_of_memory("a reload");
    }
    for (int i = 0; i < e->sae_count; i++) {
        widths[i] = e->saes[i]->full.F;
    }
    SPURION_TRY(st, spurion_catalogue_load(&r->catalogue, config, widths));
    st = same_entries(e, &r->catalogue);
    if (st.code == SPURION_OK) {
        st = same_sets(e, &r->catalogue, config);
    }
    if (st.code == SPURION_OK) {
        st = spurion_provenance_make(r->provenance, &r->provenance_text, e, config);
    }
    if (st.code != SPURION_OK) {
        spurion_catalogue_fini(&r->catalogue);
        goto out;
    }
    *out = r;
    r = NULL;
out:
    free(r);
    return st;
}

void spurion_engine_reload_destroy(spurion_engine_reload *r)
{
    if (r) {
        spurion_catalogue_fini(&r->catalogue);
        free(r->provenance_text);
        free(r);
    }
}

void spurion_engine_reload_apply(spurion_engine *e, spurion_engine_reload *r)
{
    spurion_catalogue_fini(&e->catalogue);
    free(e->provenance_text);
    e->catalogue = r->catalogue;
    memcpy(e->provenance, r->provenance, sizeof e->provenance);
    e->provenance_text = r->provenance_text;
    free(r);
}

/* --- what others read --- */

const spurion_catalogue *spurion_engine_catalogue(const spurion_engine *e)
{
    return &e->catalogue;
}

const char *spurion_engine_provenance(const spurion_engine *e)
{
    return e->provenance;
}

const char *spurion_engine_provenance_text(const spurion_engine *e)
{
    return e->provenance_text;
}

size_t spurion_engine_peak_bytes(const spurion_engine *e)
{
    return e->peak_bytes;
}

void spurion_engine_profile_start(spurion_engine *e)
{
    memset(&e->dev->profile, 0, sizeof e->dev->profile);
    e->dev->timed = true;
}

const spurion_profile *spurion_engine_profile(const spurion_engine *e)
{
    return &e->dev->profile;
}

static double mebibytes(size_t bytes)
{
    return (double)bytes / (1 << 20);
}

static void describe_saes(const spurion_engine *e, FILE *out)
{
    static const char *const kinds[] = {"relu", "jumprelu", "top-k", "gated", "group maximum"};
    static const char *const norms[] = {"", ", norm per token", ", layer norm per token"};

    for (int i = 0; i < e->sae_count; i++) {
        const spurion_sae *s = e->saes[i];
        const spurion_sae_weights *w = &s->full;
        char digest[65], k[24] = "";
        int watched = 0;
        for (int n = 0; n < e->catalogue.entry_count; n++) {
            watched += e->catalogue.entries[n].sae == i && e->catalogue.entries[n].spurious;
        }
        if (w->k > 0) {
            (void)snprintf(k, sizeof k, " of %d", w->k);
        }
        spurion_hex(digest, s->digest, sizeof s->digest);
        fprintf(out, "sae        %s: %s %s (%s%s%s), %d features of width %d at %s, %d watched%s%s\n", s->id, s->format, s->architecture,
                kinds[w->kind], k, norms[w->norm], w->F, w->d, s->hook_name, watched, s->notes[0] ? "; " : "", s->notes);
        fprintf(out, "           %s: checksum %s\n", s->id, digest);
    }
}

bool spurion_engine_doubt(char *out, size_t bytes, const spurion_engine *e)
{
    const spurion_model_config *c = &e->model->config;

    if (e->model->head_fresh == NULL) {
        return false;
    }
    (void)snprintf(out, bytes, "the score head (%s) cannot be told from a fresh one: its numbers follow %s. It was re-initialised when the checkpoint "
                   "was saved, or trained so little that it does not show: compare some rewards with your trainer's", c->head.stem, e->model->head_fresh);
    return true;
}

void spurion_engine_describe(const spurion_engine *e, FILE *out)
{
    const spurion_model_config *c = &e->model->config;

    fprintf(out, "model      %s, %d blocks, width %d, %d heads (%d key/value) of %d, vocabulary %d, context %d\n", c->architecture, c->layers,
            c->hidden, c->heads, c->kv_heads, c->head_dim, e->model->vocab, c->context);
    fprintf(out, "head       %s, %d layer%s, %d output%s; pooling %s%s%s\n", c->head.stem, c->head.hidden + 1, c->head.hidden ? "s" : "", c->outputs,
            c->outputs > 1 ? "s" : "", pooling_names[c->pooling], c->pooling_said ? "" : " (the default)",
            pad_is_eos(c) && !c->pooling_said ? "; warning: pad equals eos, trainers may read another position" : "");
    fprintf(out, "template   %s%s\n", spurion_template_name(e->chat.kind),
            e->config->model.template_kind == SPURION_TEMPLATE_AUTO ? " (the checkpoint's own)" : "");
    fprintf(out, "device     %s, %s\n", e->dev->name, e->dev->dtype == SPURION_BF16 ? "bf16 matrix inputs, f32 sums" : "f32");
    describe_saes(e, out);
    fprintf(out, "catalogue  %d features, %d families, %d rules, %d sets to ablate\n", e->catalogue.entry_count, e->catalogue.family_count,
            e->config->rule_count, e->catalogue.set_count);
    for (int i = 0; e->config->labels && i < e->sae_count; i++) {
        fprintf(out, "labels     %s: %d of its features%s", e->saes[i]->id, e->labels.count[i], i + 1 < e->sae_count ? "\n" : "");
    }
    if (e->config->labels) {
        fprintf(out, e->labels.foreign ? "; %lld lines of other SAEs\n" : "\n", (long long)e->labels.foreign);
    }
    fprintf(out, "rollouts   up to %d tokens; %d tokens in one pass%s\n", e->sequence.tokens_max, e->rows_max,
            e->prefix_max ? "; longer prompts go in pieces, completions do not" : "");
    fprintf(out, "memory     weights %.1f MiB, passes %.1f MiB, host %.1f MiB; peak resident size %.0f MiB\n", mebibytes(e->weights_bytes),
            mebibytes(e->buffers_bytes), mebibytes(e->host_bytes), mebibytes(e->peak_bytes));
    if (e->dev->own_memory) {
        fprintf(out, "           on the device %.1f MiB were left beside the weights: a budget of %d tokens in one pass\n", mebibytes(e->device_free), e->rows_max);
    }
    fprintf(out, "provenance %s\n", e->provenance);
}

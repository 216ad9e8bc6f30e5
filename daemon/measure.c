/* One measurement: clean pass, gradients, exact ablation, integrated gradients. Everything is exact; what is saved is work that causality
 * and shared prompts make needless (docs/architecture.md). Ops only enqueue: the host waits once for a clean pass and once for its variants.
 * Thread: the engine's. Memory: the engine's blocks and the measurement's arena. */
#include "daemon/engine_internal.h"

#include <string.h>

#include "daemon/base/check.h"

typedef spurion_measurement measurement;

static spurion_status upload_ints(const spurion_engine *e, int32_t *out, const int32_t *host, int count)
{
    return e->dev->ops->upload(e->dev, out, host, (size_t)count * sizeof *host);
}

/* --- the clean pass --- */

static spurion_status clean_hook(void *context, int point, float *x)
{
    measurement *k = context;
    spurion_engine *e = k->e;
    spurion_status st = spurion_ok();

    if (e->point_x[point]) {
        SPURION_TRY(st, e->dev->ops->copy(e->dev, e->point_x[point], x, (size_t)k->rows * (size_t)e->model->config.hidden * sizeof(float)));
    }
    for (int i = 0; i < e->sae_count; i++) {
        spurion_sae *s = e->saes[i];
        if (s->point == point && k->watch && s->watches) {
            SPURION_TRY(st, spurion_sae_encode_live(s, x, k->rows));
        } else if (s->point == point && !k->watch) {
            SPURION_TRY(st, e->dev->ops->sae_encode(e->dev, &s->clean, &s->full, x, s->scratch, k->rows));
        }
    }
out:
    return st;
}

static spurion_status gradient_tap(void *context, int point, float *g)
{
    measurement *k = context;
    spurion_engine *e = k->e;
    const spurion_ops *ops = e->dev->ops;
    spurion_status st = spurion_ok();
    int d = e->model->config.hidden;

    for (int i = 0; i < e->sae_count; i++) {
        spurion_sae *s = e->saes[i];
        if (s->point == point) {
            SPURION_TRY(st, ops->sae_attribute(e->dev, s->attribution, &s->clean, &s->full, g, k->rows));
            SPURION_TRY(st, ops->dot_rows(e->dev, s->xg, e->point_x[point], g, d, k->rows, d, 0.0F));
            SPURION_TRY(st, ops->sae_bias_dot(e->dev, s->bg, &s->clean, &s->full, g, k->rows));
            if (e->observe) {
                SPURION_TRY(st, e->observe(e->observe_context, i, g, k->rows));
            }
        }
    }
out:
    return st;
}

static spurion_pass clean_pass(measurement *k)
{
    spurion_engine *e = k->e;
    spurion_packed *p = &k->packed;
    spurion_pass pass = {.rows = p->rows, .completion_rows = p->completion_rows, .kv_row = 0, .seqs = p->seqs, .seq_count = p->seq_count};

    pass.scored_seqs = p->scored_seqs;
    pass.backward_seqs = p->backward_seqs;
    pass.scored_backward_seqs = p->scored_backward_seqs;
    pass.backward_seq_count = pass.scored_count = p->member_count;
    pass.save = k->explain && e->config->attribution.method == SPURION_METHOD_GRAD && e->sae_count;
    pass.save_from = e->w.first_kept;
    pass.prune_last = spurion_model_prunable(e->model, e->hook_points);
    pass.hook = clean_hook;
    pass.hook_context = k;
    pass.hook_points = e->hook_points;
    return pass;
}

/* Rewards of a pass on their way to places `at` onward of host_rewards: there after the next sync. */
static spurion_status rewards_send(const spurion_engine *e, int at, int count)
{
    return e->dev->ops->download_later(e->dev, e->host_rewards + at, e->w.rewards, (size_t)count * sizeof(float));
}

/* A prompt too long for one pass: its keys and values, piece after piece. Every block's stay; nothing else is read of it later. */
static spurion_status prompt_run(measurement *k, const int32_t *ids)
{
    spurion_status st = spurion_ok();
    spurion_engine *e = k->e;
    const spurion_packed *p = &k->packed;
    int32_t *positions = spurion_arena_take_array(&k->arena, (size_t)p->root_count, sizeof *positions);

    if (!positions) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a prompt of %d tokens", p->root_count);
    }
    for (int i = 0; i < p->root_count; i++) {
        positions[i] = i;
    }
    for (int at = 0, n; at < p->root_count; at += n) {
        spurion_seq seq = {.q_position = at, .piece_count = 1, .piece_row = {p->root_row}};
        spurion_pass pass = {.kv_row = p->root_row + at, .seqs = &seq, .seq_count = 1, .piece = true};
        n = p->root_count - at < e->rows_max ? p->root_count - at : e->rows_max;
        pass.rows = seq.q_count = n;
        pass.prune_last = e->model->config.pooling != SPURION_POOL_MEAN;
        SPURION_TRY(st, upload_ints(e, e->w.ids, ids + at, n));
        SPURION_TRY(st, upload_ints(e, e->w.positions, positions + at, n));
        SPURION_TRY(st, spurion_model_embed(e->model, &e->w, n));
        SPURION_TRY(st, spurion_model_forward(e->model, &e->w, &pass, 0));
    }
out:
    return st;
}

spurion_status spurion_measure_launch(measurement *k)
{
    spurion_status st;
    spurion_engine *e = k->e;
    spurion_packed *p = &k->packed;
    spurion_pass pass = clean_pass(k);

    if (p->root_count) {
        SPURION_TRY(st, prompt_run(k, p->members[0].job->ids));
    }
    k->rows = p->completion_rows;
    SPURION_TRY(st, upload_ints(e, e->w.ids, p->ids, p->rows));
    SPURION_TRY(st, upload_ints(e, e->w.positions, p->positions, p->rows));
    SPURION_TRY(st, upload_ints(e, e->w.scored, p->scored, p->member_count));
    SPURION_TRY(st, upload_ints(e, e->w.scored_positions, p->scored_positions, p->member_count));
    SPURION_TRY(st, spurion_model_embed(e->model, &e->w, p->rows));
    SPURION_TRY(st, spurion_model_forward(e->model, &e->w, &pass, 0));
    SPURION_TRY(st, rewards_send(e, 0, p->member_count));
    if (pass.save) {
        SPURION_TRY(st, spurion_model_backward(e->model, &e->w, &pass, e->lowest, gradient_tap, k));
    }
    SPURION_TRY(st, spurion_evidence_download(k));
out:
    return st;
}

/* --- variants: tails run again from a block upward --- */

/* Uploads the variants' rows and starts from the clean stream at the input of block `first`. */
static spurion_status variants_start(measurement *k, const spurion_packed_variants *v, int first)
{
    spurion_status st;
    spurion_engine *e = k->e;

    SPURION_ASSERT(e->point_x[4 * first]);
    k->rows = v->rows;
    SPURION_TRY(st, upload_ints(e, e->w.positions, v->positions, v->rows));
    SPURION_TRY(st, upload_ints(e, e->d_source, v->source, v->rows));
    SPURION_TRY(st, upload_ints(e, e->d_row_set, v->row_set, v->rows));
    SPURION_TRY(st, upload_ints(e, e->w.scored, v->scored, v->count));
    SPURION_TRY(st, upload_ints(e, e->w.scored_positions, v->scored_positions, v->count));
    SPURION_TRY(st, e->dev->ops->upload(e->dev, e->d_fraction, v->row_fraction, (size_t)v->rows * sizeof(float)));
    SPURION_TRY(st, e->dev->ops->gather_rows(e->dev, e->w.x, e->point_x[4 * first], e->d_source, v->rows, e->model->config.hidden));
out:
    return st;
}

static spurion_pass variants_pass(measurement *k, const spurion_packed_variants *v, spurion_hook_fn hook, bool save)
{
    spurion_engine *e = k->e;
    spurion_pass pass = {.rows = v->rows, .completion_rows = v->rows, .kv_row = e->rows_max, .seqs = v->seqs, .seq_count = v->count};

    pass.scored_seqs = v->scored_seqs;
    pass.backward_seqs = v->backward_seqs;
    pass.scored_backward_seqs = v->scored_backward_seqs;
    pass.backward_seq_count = pass.scored_count = v->count;
    pass.save = save;
    pass.save_from = k->sae ? k->sae->point / 4 : e->w.first_kept;
    pass.prune_last = spurion_model_prunable(e->model, e->hook_points);
    pass.hook = hook;
    pass.hook_context = k;
    pass.hook_points = e->sae_points;
    return pass;
}

/* How many variants from `at` on fit one pass: those of one block. */
static int variants_fit(const measurement *k, const spurion_variant *v, int at, int count)
{
    int rows = 0, n = 0;
    while (at + n < count && n < k->e->w.scored_max && v[at + n].block == v[at].block) {
        rows += k->packed.members[v[at + n].member].count - v[at + n].from;
        if (rows > k->e->rows_max) {
            break;
        }
        n++;
    }
    SPURION_ASSERT(n > 0);
    return n;
}

/* Packs n variants and enqueues them up to their rewards, or with gradients to be saved. */
static spurion_status variants_launch(spurion_packed_variants *out, spurion_pass *pass, measurement *k, const spurion_variant *variants, int n,
                                      spurion_hook_fn hook, bool save)
{
    spurion_status st;
    spurion_engine *e = k->e;

    SPURION_TRY(st, spurion_pack_variants(out, &k->arena, &k->packed, variants, n, e->rows_max));
    *pass = variants_pass(k, out, hook, save);
    SPURION_TRY(st, variants_start(k, out, variants[0].block));
    SPURION_TRY(st, spurion_model_forward(e->model, &e->w, pass, variants[0].block));
out:
    return st;
}

static spurion_status rewards_take(float *out, const spurion_engine *e, int count)
{
    spurion_status st;
    SPURION_TRY(st, e->dev->ops->sync(e->dev));
    memcpy(out, e->host_rewards, (size_t)count * sizeof *out);
out:
    return st;
}

/* Rewards of variants (those of one block stand together): out (count). No pass of them waits for another's result, so the host packs one while
 * the device works on those before it, and waits when all are enqueued, or as many as host_rewards has room for. */
static spurion_status variants_run(float *out, measurement *k, const spurion_variant *variants, int count, spurion_hook_fn hook)
{
    spurion_status st = spurion_ok();
    spurion_engine *e = k->e;
    int sent = 0; /* on their way down: the last ones before `at` */

    for (int at = 0, n; at < count; at += n) {
        spurion_packed_variants v;
        spurion_pass pass;
        n = variants_fit(k, variants, at, count);
        if (sent + n > e->rewards_room) {
            SPURION_TRY(st, rewards_take(out + at - sent, e, sent));
            sent = 0;
        }
        SPURION_TRY(st, variants_launch(&v, &pass, k, variants + at, n, hook, false));
        SPURION_TRY(st, rewards_send(e, sent, n));
        sent += n;
    }
    SPURION_TRY(st, rewards_take(out + count - sent, e, sent));
out:
    return st;
}

/* --- exact ablation --- */

/* Encode the live stream with every SAE here first: two at one point read the same unmodified x. */
static spurion_status ablation_hook(void *context, int point, float *x)
{
    measurement *k = context;
    spurion_engine *e = k->e;
    spurion_status st = spurion_ok();

    for (int i = 0; i < e->sae_count; i++) {
        if (e->saes[i]->point == point) {
            SPURION_TRY(st, spurion_sae_encode_live(e->saes[i], x, k->rows));
        }
    }
    for (int i = 0; i < e->sae_count; i++) {
        spurion_sae *s = e->saes[i];
        if (s->point == point) {
            SPURION_TRY(st, e->dev->ops->sae_subtract(e->dev, x, &s->live, &s->full, &s->sets, e->d_row_set, k->rows));
        }
    }
out:
    return st;
}

/* Where the removal of a set starts to change something: the lowest point and the first position at which a member is active. */
static bool removal_find(spurion_variant *out, const spurion_engine *e, const spurion_job *job, const int32_t *entries, int count)
{
    const spurion_measured *m = job->measured;
    int lowest = e->lowest;
    bool found = false;

    for (int a = 0, i = 0; a < job->active_count && i < count;) {
        if (job->active_entries[a] < entries[i]) {
            a++;
        } else if (job->active_entries[a] > entries[i]) {
            i++;
        } else {
            int point = e->saes[e->catalogue.entries[entries[i]].sae]->point;
            out->from = !found || m->first[a] < out->from ? m->first[a] : out->from;
            lowest = !found || point < lowest ? point : lowest;
            found = true;
            a++;
            i++;
        }
    }
    out->block = lowest / 4;
    return found;
}

/* A change after the scored position (first_eos, last_non_pad) cannot reach the reward: effect 0, not run. */
static bool counts(const measurement *k, const spurion_variant *v)
{
    return v->from <= k->packed.members[v->member].scored;
}

/* All removals of all members. */
static spurion_status removals_list(spurion_variant **out, int *out_count, measurement *k)
{
    spurion_engine *e = k->e;
    const spurion_catalogue *c = &e->catalogue;
    size_t most = 0;
    int n = 0;

    for (int i = 0; i < k->packed.member_count; i++) {
        most += (size_t)c->set_count + (size_t)k->packed.members[i].job->active_count;
    }
    *out = spurion_arena_take_array(&k->arena, most + 1, sizeof **out);
    if (!*out) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %zu ablations", most);
    }
    for (int i = 0; i < k->packed.member_count; i++) {
        spurion_job *job = k->packed.members[i].job;
        if (job->verdict.code != SPURION_OK) {
            continue;
        }
        for (int s = 0; s < c->set_count; s++) {
            spurion_variant v = {.member = i, .set = s};
            if (removal_find(&v, e, job, c->sets[s].entries, c->sets[s].count)) {
                ((bool *)job->set_active)[s] = true;
                (*out)[n] = v;
                n += counts(k, &v);
            }
        }
        for (int a = 0; e->config->ablation_each && a < job->active_count; a++) {
            spurion_variant v = {.member = i, .set = c->set_count + job->active_entries[a]};
            if (removal_find(&v, e, job, &job->active_entries[a], 1)) {
                (*out)[n] = v;
                n += counts(k, &v);
            }
        }
    }
    *out_count = n;
    return spurion_ok();
}

/* Effect(S) = R_ablated - R as float32. */
static void removal_store(measurement *k, const spurion_variant *v, float ablated)
{
    spurion_engine *e = k->e;
    spurion_job *job = k->packed.members[v->member].job;
    spurion_measured *m = job->measured;
    float effect = ablated - job->verdict.reward;

    if (v->set < e->catalogue.set_count) {
        ((float *)job->set_effects)[v->set] = effect;
        ((float *)job->set_rewards)[v->set] = ablated;
        if (v->set == e->catalogue.debias_set) {
            job->verdict.counterfactual_reward = ablated;
            job->verdict.effect = effect;
        }
        return;
    }
    for (int a = 0; a < job->active_count; a++) {
        if (job->active_entries[a] == v->set - e->catalogue.set_count) {
            m->each[a] = effect;
        }
    }
}

/* Those that start at the same block together, in their order. */
static void by_block(spurion_variant *out, const spurion_variant *in, int count, int layers)
{
    int n = 0;
    for (int block = 0; block <= layers; block++) {
        for (int i = 0; i < count; i++) {
            if (in[i].block == block) {
                out[n++] = in[i];
            }
        }
    }
    SPURION_ASSERT(n == count);
}

static spurion_status ablate_all(measurement *k)
{
    spurion_status st;
    spurion_variant *found, *sorted;
    float *rewards;
    int count = 0;

    SPURION_TRY(st, removals_list(&found, &count, k));
    if (count == 0) {
        goto out;
    }
    sorted = spurion_arena_take_array(&k->arena, (size_t)count, sizeof *sorted);
    rewards = spurion_arena_take_array(&k->arena, (size_t)count, sizeof *rewards);
    if (!sorted || !rewards) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %d ablations", count);
        goto out;
    }
    by_block(sorted, found, count, k->e->model->config.layers);
    SPURION_TRY(st, variants_run(rewards, k, sorted, count, ablation_hook));
    for (int i = 0; i < count; i++) {
        removal_store(k, &sorted[i], rewards[i]);
    }
out:
    return st;
}

/* --- integrated gradients, one SAE at a time --- */

static spurion_status shrink_hook(void *context, int point, float *x)
{
    measurement *k = context;
    spurion_engine *e = k->e;
    const spurion_sae *s = k->sae;
    spurion_status st = spurion_ok();

    if (s->point == point) {
        SPURION_TRY(st, e->dev->ops->gather_rows(e->dev, s->live.token_scale, s->clean.token_scale, e->d_source, k->rows, 1));
        SPURION_TRY(st, e->dev->ops->gather_rows(e->dev, s->live.token_shift, s->clean.token_shift, e->d_source, k->rows, 1));
        SPURION_TRY(st, e->dev->ops->sae_shrink(e->dev, x, &s->live, &s->full, e->d_fraction, k->rows));
    }
out:
    return st;
}

/* Adds the variants' gradients to the mean, one step after the other: rows of one step are distinct. */
typedef struct path_tap {
    measurement *k;
    const int32_t *step_begin; /* (steps + 1) rows */
    int steps;
} path_tap;

static spurion_status path_gradient(void *context, int point, float *g)
{
    path_tap *t = context;
    spurion_engine *e = t->k->e;
    spurion_status st = spurion_ok();
    size_t d = (size_t)e->model->config.hidden;

    for (int i = 0; point == t->k->sae->point && i < t->steps; i++) {
        int32_t at = t->step_begin[i];
        SPURION_TRY(st, e->dev->ops->scatter_rows(e->dev, e->mean_gradient, g + (size_t)at * d, e->d_source + at, t->step_begin[i + 1] - at, (int)d,
                                                  SPURION_ACCUMULATE));
    }
out:
    return st;
}

static float path_fraction(const spurion_config *c, int step)
{
    double n = c->attribution.ig_steps;
    return (float)((c->attribution.ig_rule == SPURION_IG_MIDPOINT ? step + 0.5 : step) / n);
}

/* Begins of the rows of each run of equal fractions. */
static int steps_split(int32_t *begin, const spurion_packed_variants *v)
{
    int n = 0;
    for (int r = 0; r < v->rows; r++) {
        if (r == 0 || v->row_fraction[r] != v->row_fraction[r - 1]) {
            begin[n++] = r;
        }
    }
    begin[n] = v->rows;
    return n;
}

/* Runs variants of the current SAE in passes and adds up their gradients; nothing comes down to the host. */
static spurion_status path_run(measurement *k, const spurion_variant *variants, int count)
{
    spurion_status st = spurion_ok();
    spurion_engine *e = k->e;

    for (int at = 0, n; at < count; at += n) {
        spurion_packed_variants v;
        spurion_pass pass;
        path_tap tap = {k, NULL, 0};
        int32_t *begin;
        n = variants_fit(k, variants, at, count);
        begin = spurion_arena_take_array(&k->arena, (size_t)n + 1, sizeof *begin);
        if (!begin) {
            st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %d steps", n);
            goto out;
        }
        SPURION_TRY(st, variants_launch(&v, &pass, k, variants + at, n, shrink_hook, true));
        tap.steps = steps_split(begin, &v);
        tap.step_begin = begin;
        SPURION_TRY(st, spurion_model_backward(e->model, &e->w, &pass, k->sae->point, path_gradient, &tap));
    }
out:
    return st;
}

/* Every member at every step of the path, or once at its end. */
static spurion_status path_variants(spurion_variant **out, measurement *k, int steps, bool baseline)
{
    int n = k->packed.member_count, count = 0;

    *out = spurion_arena_take_array(&k->arena, (size_t)n * (size_t)steps + 1, sizeof **out);
    if (!*out) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %d x %d steps", n, steps);
    }
    for (int s = 0; s < steps; s++) {
        for (int i = 0; i < n; i++) {
            spurion_variant v = {i, k->packed.members[i].start, k->sae->point / 4, -1, baseline ? 1.0F : path_fraction(k->e->config, s)};
            (*out)[count++] = v;
        }
    }
    return spurion_ok();
}

/* Mean gradient over the path for one SAE, and its attributions from it. */
static spurion_status integrate(measurement *k, spurion_sae *s)
{
    spurion_status st;
    spurion_engine *e = k->e;
    const spurion_ops *ops = e->dev->ops;
    int steps = e->config->attribution.ig_steps, rows = k->packed.completion_rows, d = e->model->config.hidden;
    spurion_variant *variants;

    k->sae = s;
    SPURION_TRY(st, path_variants(&variants, k, steps, false));
    SPURION_TRY(st, ops->zero(e->dev, e->mean_gradient, (size_t)rows * (size_t)d * sizeof(float)));
    SPURION_TRY(st, path_run(k, variants, k->packed.member_count * steps));
    SPURION_TRY(st, ops->sae_attribute(e->dev, s->attribution, &s->clean, &s->full, e->mean_gradient, rows));
    SPURION_TRY(st, ops->dot_rows(e->dev, s->xg, e->point_x[s->point], e->mean_gradient, d, rows, d, 0.0F));
    SPURION_TRY(st, ops->sae_bias_dot(e->dev, s->bg, &s->clean, &s->full, e->mean_gradient, rows));
out:
    k->sae = NULL;
    return st;
}

/* The reward with SAE number `place` at its bias: the path's end. */
static spurion_status baselines(measurement *k, int place)
{
    spurion_status st;
    int count = k->packed.member_count;
    spurion_variant *variants;
    float *rewards = spurion_arena_take_array(&k->arena, (size_t)count, sizeof *rewards);

    if (!rewards) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %d baselines", count);
    }
    k->sae = k->e->saes[place];
    SPURION_TRY(st, path_variants(&variants, k, 1, true));
    SPURION_TRY(st, variants_run(rewards, k, variants, count, shrink_hook));
    for (int i = 0; i < count; i++) {
        spurion_measured *m = k->packed.members[i].job->measured;
        m->baseline[place].has = true;
        m->baseline[place].value = rewards[i];
    }
out:
    k->sae = NULL;
    return st;
}

static spurion_status explain_all(measurement *k)
{
    spurion_status st = spurion_ok();
    spurion_engine *e = k->e;

    for (int i = 0; i < e->sae_count; i++) {
        if (e->config->attribution.method == SPURION_METHOD_IG) {
            SPURION_TRY(st, integrate(k, e->saes[i]));
        }
        if (e->config->attribution.completeness) {
            SPURION_TRY(st, baselines(k, i));
        }
    }
    if (e->config->attribution.method == SPURION_METHOD_IG) {
        SPURION_TRY(st, spurion_evidence_download(k));
        SPURION_TRY(st, e->dev->ops->sync(e->dev));
    }
out:
    return st;
}

/* --- the whole --- */

/* Memory of a job's measurement, from its own arena. */
static spurion_status measured_take(const spurion_engine *e, spurion_job *job)
{
    size_t sets = (size_t)e->catalogue.set_count;
    spurion_measured *m = job->measured;

    if (!m) {
        m = spurion_arena_take(&job->arena, sizeof *m);
        job->measured = m;
        job->set_effects = spurion_arena_take_array(&job->arena, sets + 1, sizeof(float));
        job->set_rewards = spurion_arena_take_array(&job->arena, sets + 1, sizeof(float));
        job->set_active = spurion_arena_take_array(&job->arena, sets + 1, sizeof(bool));
        if (m) {
            m->baseline = spurion_arena_take_array(&job->arena, (size_t)e->sae_count + 1, sizeof *m->baseline);
        }
    }
    if (!m || !m->baseline || !job->set_effects || !job->set_rewards || !job->set_active) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a rollout's %zu effects", sets);
    }
    return spurion_ok();
}

static void verdict_start(const spurion_engine *e, spurion_job *job, float reward)
{
    spurion_verdict *v = &job->verdict;

    v->reward = v->counterfactual_reward = reward;
    v->effect = 0.0F;
    memcpy(v->provenance, e->provenance, sizeof v->provenance);
    for (int s = 0; s < e->catalogue.set_count; s++) {
        ((float *)job->set_rewards)[s] = reward;
    }
}

spurion_status spurion_measure_pack(measurement *k, spurion_job *const *jobs, int job_count, bool explain, bool ablate)
{
    spurion_engine *e = k->e;
    bool long_prompt = jobs[0]->group_number == jobs[job_count - 1]->group_number && spurion_pack_rows(jobs, job_count, e->scope_all) > e->rows_max;

    SPURION_ASSERT(!long_prompt || e->prefix_max > 0);
    k->explain = explain && e->config->attribution.method != SPURION_METHOD_NONE;
    k->ablate = ablate;
    k->watch = e->watch_first && !k->explain;
    spurion_arena_reset(&k->arena);
    return spurion_pack_jobs(&k->packed, &k->arena, jobs, job_count, e->scope_all, long_prompt ? e->w.prefix_row : -1);
}

spurion_status spurion_measure_settle(measurement *k)
{
    spurion_status st;
    spurion_engine *e = k->e;

    SPURION_TRY(st, e->dev->ops->sync(e->dev)); /* the only wait of a pass without variants */
    for (int i = 0; i < k->packed.member_count; i++) {
        spurion_job *job = k->packed.members[i].job;
        SPURION_TRY(st, measured_take(e, job));
        if (k->ablate) {
            verdict_start(e, job, e->host_rewards[i]);
            SPURION_TRY(st, spurion_evidence_active(k, &k->packed.members[i]));
        }
    }
    if (k->ablate && e->sae_count) {
        SPURION_TRY(st, ablate_all(k));
    }
    if (k->explain && e->sae_count) {
        SPURION_TRY(st, explain_all(k));
    }
out:
    return st;
}

spurion_status spurion_measure_evidence(measurement *k)
{
    spurion_status st = spurion_ok();

    for (int i = 0; i < k->packed.member_count; i++) {
        if (k->packed.members[i].job->verdict.code == SPURION_OK) {
            SPURION_TRY(st, spurion_evidence_fill(k, &k->packed.members[i]));
        }
    }
out:
    return st;
}

spurion_status spurion_measure(spurion_engine *e, spurion_job *const *jobs, int job_count, bool explain, bool ablate)
{
    spurion_status st;
    measurement *k = &e->hand[0];

    SPURION_TRY(st, spurion_measure_pack(k, jobs, job_count, explain, ablate));
    SPURION_TRY(st, spurion_measure_launch(k));
    SPURION_TRY(st, spurion_measure_settle(k));
    SPURION_TRY(st, spurion_measure_evidence(k));
out:
    return st;
}

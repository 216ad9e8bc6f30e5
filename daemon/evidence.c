/* From the sparse features of a pass to a rollout's evidence: sums over its completion, the features worth naming, the per-token view.
 * Host work only; sums in f64 in the order of tokens. Thread: the engine's. Memory: each job's arena. */
#include "daemon/engine_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/check.h"
#include "daemon/model/tokenizer.h"

spurion_status spurion_evidence_download(spurion_measurement *k)
{
    spurion_status st = spurion_ok();
    const spurion_engine *e = k->e;
    const spurion_ops *ops = e->dev->ops;
    const bool watched = k->watch;
    size_t n = (size_t)k->packed.completion_rows;

    for (int i = 0; i < e->sae_count; i++) {
        const spurion_sae *s = e->saes[i];
        const spurion_sparse *f = watched ? &s->live : &s->clean;
        spurion_sae_rows *h = &k->host[i];
        h->slots = f->slots;
        if (watched && !s->watches) {
            memset(h->count, 0, n * sizeof *h->count);
            continue;
        }
        size_t cells = n * (size_t)f->slots;
        SPURION_TRY(st, ops->download_later(e->dev, h->count, f->count, n * sizeof(int32_t)));
        SPURION_TRY(st, ops->download_later(e->dev, h->index, f->index, cells * sizeof(int32_t)));
        SPURION_TRY(st, ops->download_later(e->dev, h->value, f->value, cells * sizeof(float)));
        if (s->attribution && !watched) {
            SPURION_TRY(st, ops->download_later(e->dev, h->attribution, s->attribution, cells * sizeof(float)));
            SPURION_TRY(st, ops->download_later(e->dev, h->xg, s->xg, n * sizeof(float)));
            SPURION_TRY(st, ops->download_later(e->dev, h->bg, s->bg, n * sizeof(float)));
        }
    }
out:
    return st;
}

static spurion_status out_of_memory(void)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a rollout's evidence");
}

/* Refuses a rollout with a token that has more active features than a row can hold. */
static bool overflowed(const spurion_measurement *k, const spurion_member *m)
{
    const spurion_engine *e = k->e;

    for (int i = 0; i < e->sae_count; i++) {
        int slots = k->host[i].slots;
        for (int t = 0; t < m->count - m->start; t++) {
            int found = k->host[i].count[m->row + t];
            if (found > slots) {
                spurion_status why = spurion_error(SPURION_RESOURCE_EXHAUSTED,
                                                   "SAE %s at position %d: expected at most %d active features, found %d (a smaller "
                                                   "engine.tokens_max leaves room for more)",
                                                   e->saes[i]->id, m->start + t, slots, found);
                spurion_job_refuse(m->job, &why);
                return true;
            }
        }
    }
    return false;
}

spurion_status spurion_evidence_active(spurion_measurement *k, const spurion_member *m)
{
    const spurion_engine *e = k->e;
    const spurion_catalogue *c = &e->catalogue;
    spurion_measured *measured = m->job->measured;
    int32_t *first = spurion_arena_take_array(&k->arena, (size_t)c->entry_count + 1, sizeof *first);
    int32_t *active;
    int count = 0;

    if (!first) {
        return out_of_memory();
    }
    memset(first, 0xff, (size_t)c->entry_count * sizeof *first);
    if (overflowed(k, m)) {
        return spurion_ok();
    }
    for (int i = 0; i < e->sae_count && c->entry_count > 0; i++) {
        int slots = k->host[i].slots;
        for (int t = 0; t < m->count - m->start; t++) {
            size_t at = (size_t)(m->row + t) * (size_t)slots;
            for (int s = 0; s < k->host[i].count[m->row + t]; s++) {
                int32_t entry = e->tally[i].entry_of[k->host[i].index[at + (size_t)s]];
                if (entry >= 0 && first[entry] < 0 && c->entries[entry].spurious &&
                    k->host[i].value[at + (size_t)s] > c->entries[entry].activation_min) {
                    first[entry] = m->start + t;
                    count++;
                }
            }
        }
    }
    m->job->active_entries = active = spurion_arena_take_array(&m->job->arena, (size_t)count + 1, sizeof *active);
    measured->first = spurion_arena_take_array(&m->job->arena, (size_t)count + 1, sizeof *first);
    measured->each = e->config->ablation_each ? spurion_arena_take_array(&m->job->arena, (size_t)count + 1, sizeof(float)) : NULL;
    if (!active || !measured->first || (e->config->ablation_each && !measured->each)) {
        return out_of_memory();
    }
    for (int i = 0; i < c->entry_count; i++) {
        if (first[i] >= 0) {
            measured->first[m->job->active_count] = first[i];
            active[m->job->active_count++] = i;
        }
    }
    return spurion_ok();
}

/* --- sums over a rollout --- */

static void tally_clear(spurion_tally *t)
{
    for (int i = 0; i < t->touched_count; i++) {
        int32_t f = t->touched[i];
        t->attribution[f] = t->activation_sum[f] = 0.0;
        t->activation_max[f] = 0.0F;
    }
    t->touched_count = 0;
}

/* Sums of one SAE over C; returns the mean number of active features. */
static double tally_fill(spurion_tally *y, const spurion_sae_rows *h, const spurion_member *m, bool explained, double scale)
{
    int n = m->count - m->start, slots = h->slots;
    double active = 0.0;

    tally_clear(y);
    for (int t = 0; t < n; t++) {
        size_t at = (size_t)(m->row + t) * (size_t)slots;
        int count = h->count[m->row + t];
        active += count;
        for (int s = 0; s < count; s++) {
            int32_t f = h->index[at + (size_t)s];
            float value = h->value[at + (size_t)s];
            if (y->activation_max[f] == 0.0F) {
                y->touched[y->touched_count++] = f;
            }
            if (value > y->activation_max[f]) {
                y->activation_max[f] = value;
                y->peak[f] = m->start + t;
            }
            y->activation_sum[f] += value;
            y->attribution[f] += explained ? h->attribution[at + (size_t)s] * scale : 0.0;
        }
    }
    return active / n;
}

/* Attributions of integrated gradients come as sums over the steps. */
static double attribution_scale(const spurion_engine *e)
{
    return e->config->attribution.method == SPURION_METHOD_IG ? 1.0 / e->config->attribution.ig_steps : 1.0;
}

static spurion_opt_float some(double value)
{
    spurion_opt_float o = {true, (float)value};
    return o;
}

static void summary_fill(spurion_sae_summary *out, const spurion_measurement *k, int sae, const spurion_member *m, double l0)
{
    const spurion_engine *e = k->e;
    const bool explained = k->explain;
    const double scale = attribution_scale(e);
    const spurion_sae_rows *h = &k->host[sae];
    const spurion_tally *y = &e->tally[sae];
    const spurion_measured *measured = m->job->measured;
    double xg = 0.0, bg = 0.0, sum = 0.0;

    out->sae.data = e->saes[sae]->id;
    out->sae.size = strlen(e->saes[sae]->id);
    if (explained || !e->watch_first) {
        out->l0_mean = some(l0);
    }
    if (!explained) {
        return;
    }
    for (int t = 0; t < m->count - m->start; t++) {
        xg += h->xg[m->row + t] * scale;
        bg += h->bg[m->row + t] * scale;
    }
    for (int i = 0; i < y->touched_count; i++) {
        sum += y->attribution[y->touched[i]];
    }
    out->attribution_sum = some(sum);
    out->bias_attribution = some(bg);
    out->error_attribution = some(xg - sum - bg); /* the identity of science.md section 1: <x, g> = features + error + bias */
    if (measured->baseline[sae].has) {
        out->baseline_reward = measured->baseline[sae];
        out->residual = some((double)m->job->verdict.reward - (double)measured->baseline[sae].value - (xg - bg));
    }
}

/* --- features worth naming --- */

typedef struct candidate {
    float attribution;
    int32_t sae, index, entry;
    bool wanted; /* active and spurious: named whatever its rank */
} candidate;

static int candidate_compare(const void *a, const void *b)
{
    const candidate *x = a, *y = b;
    float u = fabsf(x->attribution), v = fabsf(y->attribution);
    if (u != v) {
        return u > v ? -1 : 1;
    }
    if (x->sae != y->sae) {
        return x->sae < y->sae ? -1 : 1;
    }
    return x->index < y->index ? -1 : x->index > y->index;
}

static int candidates_list(candidate *out, const spurion_engine *e, const spurion_job *job, bool explained)
{
    int n = 0;

    for (int i = 0; i < e->sae_count; i++) {
        const spurion_tally *y = &e->tally[i];
        for (int k = 0; k < y->touched_count; k++) {
            int32_t f = y->touched[k], entry = y->entry_of[f];
            candidate c = {(float)y->attribution[f], i, f, entry, false};
            for (int a = 0; entry >= 0 && a < job->active_count; a++) {
                c.wanted = c.wanted || job->active_entries[a] == entry;
            }
            if (explained || c.wanted) {
                out[n++] = c;
            }
        }
    }
    qsort(out, (size_t)n, sizeof *out, candidate_compare);
    return n;
}

static void feature_fill(spurion_feature *out, const spurion_engine *e, const spurion_job *job, const candidate *c, bool explained)
{
    static const char unknown[] = "unknown";
    const spurion_tally *y = &e->tally[c->sae];
    const spurion_measured *m = job->measured;

    out->ref.sae.data = e->saes[c->sae]->id;
    out->ref.sae.size = strlen(e->saes[c->sae]->id);
    out->ref.index = c->index;
    out->verdict.data = unknown;
    out->verdict.size = sizeof unknown - 1;
    out->explanation = spurion_labels_find(&e->labels, c->sae, c->index);
    if (c->entry >= 0) {
        const spurion_catalogue_entry *k = &e->catalogue.entries[c->entry];
        out->label = k->label;
        out->families = k->families;
        out->family_count = k->family_count;
        out->verdict = k->verdict;
    }
    if (explained) {
        out->attribution = some(c->attribution);
    }
    for (int a = 0; c->wanted && m->each && a < job->active_count; a++) {
        if (job->active_entries[a] == c->entry) {
            out->ablation_effect = some(m->each[a]);
        }
    }
    out->activation_max = y->activation_max[c->index];
    out->activation_sum = (float)y->activation_sum[c->index];
    out->peak_position = y->peak[c->index];
}

static spurion_status features_fill(spurion_measurement *k, spurion_job *job)
{
    const spurion_engine *e = k->e;
    const bool explained = k->explain;
    size_t most = 0;
    candidate *list;
    spurion_feature *features;
    int n, kept = 0;

    for (int i = 0; i < e->sae_count; i++) {
        most += (size_t)e->tally[i].touched_count;
    }
    list = spurion_arena_take_array(&k->arena, most + 1, sizeof *list);
    if (!list) {
        return out_of_memory();
    }
    n = candidates_list(list, e, job, explained);
    for (int i = 0; i < n; i++) {
        kept += i < e->config->attribution.top || list[i].wanted;
    }
    features = spurion_arena_take_array(&job->arena, (size_t)kept + 1, sizeof *features);
    if (!features) {
        return out_of_memory();
    }
    job->verdict.features = features;
    job->verdict.feature_count = 0;
    for (int i = 0; i < n; i++) {
        if (i < e->config->attribution.top || list[i].wanted) {
            feature_fill(&features[job->verdict.feature_count++], e, job, &list[i], explained);
        }
    }
    return spurion_ok();
}

/* --- the per-token view --- */

/* Bytes of one well-formed UTF-8 character at p, 0 if there is none; *bad: bytes to replace by one U+FFFD (Unicode 15, D93b). */
static size_t utf8_length(const unsigned char *p, size_t left, size_t *bad)
{
    unsigned char c = p[0];
    size_t need = c < 0x80 ? 1 : c >= 0xc2 && c <= 0xdf ? 2 : c >= 0xe0 && c <= 0xef ? 3 : c >= 0xf0 && c <= 0xf4 ? 4 : 0;

    *bad = 1;
    if (need <= 1) {
        return need;
    }
    for (size_t i = 1; i < need; i++) {
        unsigned char low = 0x80, high = 0xbf;
        if (i == 1) {
            low = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : low;
            high = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : high;
        }
        if (i >= left || p[i] < low || p[i] > high) {
            *bad = i;
            return 0;
        }
    }
    return need;
}

/* The bytes of a token with U+FFFD for what is no whole character. */
static spurion_status token_text(spurion_bytes *out, spurion_arena *arena, const spurion_tokenizer *t, int32_t id)
{
    const char *bytes = "";
    size_t size = 0, n = 0;
    char *text;
    spurion_status st = spurion_tokenizer_token_bytes(&bytes, &size, t, id);

    if (st.code != SPURION_OK) {
        size = 0; /* an id that the tokenizer does not know has no text */
    }
    text = spurion_arena_take(arena, 3 * size + 1);
    if (!text) {
        return out_of_memory();
    }
    for (size_t i = 0; i < size;) {
        size_t bad, good = utf8_length((const unsigned char *)bytes + i, size - i, &bad);
        memcpy(text + n, good ? bytes + i : "\xef\xbf\xbd", good ? good : 3);
        n += good ? good : 3;
        i += good ? good : bad;
    }
    out->data = text;
    out->size = n;
    return spurion_ok();
}

static spurion_status tokens_fill(const spurion_measurement *p, const spurion_member *m)
{
    spurion_status st = spurion_ok();
    const spurion_engine *e = p->e;
    const bool explained = p->explain;
    const double scale = attribution_scale(e);
    spurion_arena *arena = &m->job->arena;
    int n = m->count - m->start;
    spurion_tokens *k = spurion_arena_take(arena, sizeof *k);
    int32_t *position = spurion_arena_take_array(arena, (size_t)n, sizeof *position);
    spurion_bytes *text = spurion_arena_take_array(arena, (size_t)n, sizeof *text);
    float *attribution = spurion_arena_take_array(arena, (size_t)n * (size_t)e->sae_count + 1, sizeof *attribution);

    if (!k || !position || !text || !attribution) {
        return out_of_memory();
    }
    k->count = n;
    k->sae_count = e->sae_count;
    k->position = position;
    k->id = m->job->ids + m->start;
    k->text = text;
    k->attribution = explained ? attribution : NULL;
    for (int t = 0; t < n; t++) {
        position[t] = m->start + t;
        SPURION_TRY(st, token_text(&text[t], arena, e->tokenizer, k->id[t]));
        for (int i = 0; explained && i < e->sae_count; i++) {
            int slots = p->host[i].slots;
            double sum = 0.0;
            for (int s = 0; s < p->host[i].count[m->row + t]; s++) {
                sum += p->host[i].attribution[(size_t)(m->row + t) * (size_t)slots + (size_t)s] * scale;
            }
            attribution[(size_t)i * (size_t)n + (size_t)t] = (float)sum;
        }
    }
    m->job->verdict.tokens = k;
out:
    return st;
}

/* Keeps the entries of active spurious features for the flags' per-token sums, which wait for the rules. */
static spurion_status parts_keep(const spurion_measurement *k, const spurion_member *m)
{
    const spurion_engine *e = k->e;
    const double scale = attribution_scale(e);
    spurion_job *job = m->job;
    spurion_measured *measured = job->measured;
    int32_t *entry = NULL, *token = NULL;
    float *attribution = NULL;

    for (int pass = 0, n = 0; pass < 2; pass++, n = 0) {
        for (int i = 0; i < e->sae_count; i++) {
            int slots = k->host[i].slots;
            for (int t = 0; t < m->count - m->start; t++) {
                size_t at = (size_t)(m->row + t) * (size_t)slots;
                for (int s = 0; s < k->host[i].count[m->row + t]; s++) {
                    int32_t place = e->tally[i].entry_of[k->host[i].index[at + (size_t)s]];
                    if (place < 0 || !e->catalogue.entries[place].spurious) {
                        continue;
                    }
                    if (pass) {
                        entry[n] = place;
                        token[n] = t;
                        attribution[n] = (float)(k->host[i].attribution[at + (size_t)s] * scale);
                    }
                    n++;
                }
            }
        }
        if (!pass) {
            entry = spurion_arena_take_array(&job->arena, (size_t)n + 1, sizeof *entry);
            token = spurion_arena_take_array(&job->arena, (size_t)n + 1, sizeof *token);
            attribution = spurion_arena_take_array(&job->arena, (size_t)n + 1, sizeof *attribution);
            if (!entry || !token || !attribution) {
                return out_of_memory();
            }
            measured->part_count = n;
        }
    }
    measured->part_entry = entry;
    measured->part_token = token;
    measured->part_attribution = attribution;
    return spurion_ok();
}

spurion_status spurion_evidence_fill(spurion_measurement *k, const spurion_member *m)
{
    spurion_status st = spurion_ok();
    spurion_engine *e = k->e;
    spurion_job *job = m->job;
    spurion_sae_summary *saes = spurion_arena_take_array(&job->arena, (size_t)e->sae_count + 1, sizeof *saes);

    if (!saes) {
        return out_of_memory();
    }
    if (!k->ablate && overflowed(k, m)) { /* a second look: the first may have listed watched features only */
        return st;
    }
    for (int i = 0; i < e->sae_count; i++) {
        double l0 = tally_fill(&e->tally[i], &k->host[i], m, k->explain, attribution_scale(e));
        summary_fill(&saes[i], k, i, m, l0);
    }
    job->verdict.saes = saes;
    job->verdict.sae_count = e->sae_count;
    SPURION_TRY(st, features_fill(k, job));
    if (job->want_tokens) {
        SPURION_TRY(st, tokens_fill(k, m));
        if (k->explain) {
            SPURION_TRY(st, parts_keep(k, m));
        }
    }
    ((spurion_measured *)job->measured)->explained = k->explain;
out:
    return st;
}

/* Whether a feature, by its place in the catalogue, belongs to the rule that raised a flag (active here or not). */
static bool rule_holds(const spurion_engine *e, const spurion_flag *f, int32_t place)
{
    for (int r = 0; r < e->config->rule_count; r++) {
        const char *id = e->config->rules[r].id;
        if (strlen(id) == f->rule.size && memcmp(id, f->rule.data, f->rule.size) == 0) {
            const spurion_ablation_set *set = &e->catalogue.sets[e->catalogue.rule_sets[r]];
            for (int i = 0; i < set->count; i++) {
                if (set->entries[i] == place) {
                    return true;
                }
            }
        }
    }
    return false;
}

spurion_status spurion_evidence_finish(const spurion_engine *e, spurion_job *job)
{
    const spurion_measured *m = job->measured;
    const spurion_verdict *v = &job->verdict;
    spurion_tokens *k = (spurion_tokens *)v->tokens;
    float *flagged;

    if (!k || v->code != SPURION_OK || !m->explained || v->flag_count == 0) {
        return spurion_ok();
    }
    flagged = spurion_arena_take_array(&job->arena, (size_t)v->flag_count * (size_t)k->sae_count * (size_t)k->count, sizeof *flagged);
    if (!flagged) {
        return out_of_memory();
    }
    for (int f = 0; f < v->flag_count; f++) {
        for (int i = 0; i < m->part_count; i++) {
            const spurion_catalogue_entry *entry = &e->catalogue.entries[m->part_entry[i]];
            if (rule_holds(e, &v->flags[f], m->part_entry[i])) {
                size_t row = ((size_t)f * (size_t)k->sae_count + (size_t)entry->sae) * (size_t)k->count;
                flagged[row + (size_t)m->part_token[i]] += m->part_attribution[i];
            }
        }
    }
    k->flagged = flagged;
    k->flagged_count = v->flag_count;
    return spurion_ok();
}

/* Verdicts: packed arrays on the wire, structs of small lists outside; Score's reply and the store's records. Thread: any. */
#include "wire.h"

#include <string.h>

static const char *const verdict_names[] = {"unknown", "spurious", "intended"};

static bool bytes_equal(spurion_bytes a, spurion_bytes b)
{
    return a.size == b.size && (a.size == 0 || memcmp(a.data, b.data, a.size) == 0);
}

static spurion_bytes verdict_name(uint32_t place)
{
    return spurion_bytes_of(verdict_names[place]);
}

static uint32_t verdict_place(spurion_bytes name)
{
    for (uint32_t i = 1; i < 3; i++) {
        if (bytes_equal(name, spurion_bytes_of(verdict_names[i]))) {
            return i;
        }
    }
    return 0;
}

/* ---- packing ---- */

static spurion_status sae_place(uint32_t *out, const spurion_verdict *v, const spurion_feature_ref *ref)
{
    for (int32_t i = 0; i < v->sae_count; i++) {
        if (bytes_equal(v->saes[i].sae, ref->sae)) {
            *out = (uint32_t)i;
            return spurion_ok();
        }
    }
    return spurion_error(SPURION_INTERNAL, "verdict: expected features of its saes, found one of '%.*s'", (int)ref->sae.size, ref->sae.data);
}

static spurion_status pack_saes(Spurion__V1__Verdict *r, wire *w, const spurion_verdict *v)
{
    size_t n = (size_t)v->sae_count;

    r->n_sae = r->n_sae_attribution_sum = r->n_sae_error_attribution = r->n_sae_bias_attribution = n;
    r->n_sae_baseline_reward = r->n_sae_residual = r->n_sae_l0_mean = n;
    r->sae = WIRE_NEW(w, ProtobufCBinaryData, n);
    r->sae_attribution_sum = WIRE_NEW(w, float, n);
    r->sae_error_attribution = WIRE_NEW(w, float, n);
    r->sae_bias_attribution = WIRE_NEW(w, float, n);
    r->sae_baseline_reward = WIRE_NEW(w, float, n);
    r->sae_residual = WIRE_NEW(w, float, n);
    r->sae_l0_mean = WIRE_NEW(w, float, n);
    if (w->failed) {
        return wire_no_memory(w);
    }
    for (size_t i = 0; i < n; i++) {
        const spurion_sae_summary *s = &v->saes[i];
        r->sae[i] = wire_bin(s->sae);
        r->sae_attribution_sum[i] = wire_to_nan(s->attribution_sum);
        r->sae_error_attribution[i] = wire_to_nan(s->error_attribution);
        r->sae_bias_attribution[i] = wire_to_nan(s->bias_attribution);
        r->sae_baseline_reward[i] = wire_to_nan(s->baseline_reward);
        r->sae_residual[i] = wire_to_nan(s->residual);
        r->sae_l0_mean[i] = wire_to_nan(s->l0_mean);
    }
    return spurion_ok();
}

static spurion_status pack_flags(Spurion__V1__Verdict *r, wire *w, const spurion_verdict *v)
{
    size_t n = (size_t)v->flag_count, total = 0, at = 0;
    spurion_status st = spurion_ok();

    for (size_t i = 0; i < n; i++) {
        total += (size_t)v->flags[i].feature_count;
    }
    r->n_flag_rule = r->n_flag_effect = r->n_flag_feature_count = n;
    r->n_flag_feature_sae = r->n_flag_feature_index = total;
    r->flag_rule = WIRE_NEW(w, ProtobufCBinaryData, n);
    r->flag_effect = WIRE_NEW(w, float, n);
    r->flag_feature_count = WIRE_NEW(w, uint32_t, n);
    r->flag_feature_sae = WIRE_NEW(w, uint32_t, total);
    r->flag_feature_index = WIRE_NEW(w, uint32_t, total);
    if (w->failed) {
        return wire_no_memory(w);
    }
    for (size_t i = 0; i < n; i++) {
        const spurion_flag *f = &v->flags[i];
        r->flag_rule[i] = wire_bin(f->rule);
        r->flag_effect[i] = f->effect;
        r->flag_feature_count[i] = (uint32_t)f->feature_count;
        for (int32_t k = 0; k < f->feature_count; k++, at++) {
            SPURION_TRY(st, sae_place(&r->flag_feature_sae[at], v, &f->features[k]));
            r->flag_feature_index[at] = (uint32_t)f->features[k].index;
        }
    }
out:
    return st;
}

static uint32_t family_place(Spurion__V1__Verdict *r, spurion_bytes family)
{
    for (size_t i = 0; i < r->n_family_name; i++) {
        if (r->family_name[i].len == family.size && memcmp(r->family_name[i].data, family.data, family.size) == 0) {
            return (uint32_t)i;
        }
    }
    r->family_name[r->n_family_name] = wire_bin(family);
    return (uint32_t)r->n_family_name++;
}

static spurion_status pack_explanations(Spurion__V1__Verdict *r, wire *w, const spurion_verdict *v)
{
    size_t n = 0;

    r->explained = WIRE_NEW(w, uint32_t, (size_t)v->feature_count);
    r->explanation = WIRE_NEW(w, ProtobufCBinaryData, (size_t)v->feature_count);
    if (w->failed) {
        return wire_no_memory(w);
    }
    for (int32_t i = 0; i < v->feature_count; i++) {
        if (v->features[i].explanation.data != NULL) {
            r->explained[n] = (uint32_t)i;
            r->explanation[n++] = wire_bin(v->features[i].explanation);
        }
    }
    r->n_explained = r->n_explanation = n;
    return spurion_ok();
}

/* Whether the catalogue says something of a feature: it may stand there without a label. */
static bool catalogued(const spurion_feature *f)
{
    return f->label.data != NULL || f->family_count > 0 || verdict_place(f->verdict) != 0;
}

/* Label, families and verdict of the features that stand in the catalogue. An absent label goes as an empty one, and comes back absent. */
static spurion_status pack_labels(Spurion__V1__Verdict *r, wire *w, const spurion_verdict *v)
{
    size_t n = 0, families = 0, at = 0, k = 0;

    for (int32_t i = 0; i < v->feature_count; i++) {
        n += catalogued(&v->features[i]);
        families += (size_t)v->features[i].family_count;
    }
    r->labelled = WIRE_NEW(w, uint32_t, n);
    r->label = WIRE_NEW(w, ProtobufCBinaryData, n);
    r->label_verdict = WIRE_NEW(w, uint32_t, n);
    r->label_family_count = WIRE_NEW(w, uint32_t, n);
    r->label_family = WIRE_NEW(w, uint32_t, families);
    r->family_name = WIRE_NEW(w, ProtobufCBinaryData, families);
    if (w->failed) {
        return wire_no_memory(w);
    }
    for (int32_t i = 0; i < v->feature_count; i++) {
        const spurion_feature *f = &v->features[i];
        if (!catalogued(f)) {
            continue;
        }
        r->labelled[k] = (uint32_t)i;
        r->label[k] = wire_bin(f->label);
        r->label_verdict[k] = verdict_place(f->verdict);
        r->label_family_count[k] = (uint32_t)f->family_count;
        for (int32_t j = 0; j < f->family_count; j++) {
            r->label_family[at++] = family_place(r, f->families[j]);
        }
        k++;
    }
    r->n_labelled = r->n_label = r->n_label_verdict = r->n_label_family_count = n;
    r->n_label_family = at;
    return spurion_ok();
}

static spurion_status pack_features(Spurion__V1__Verdict *r, wire *w, const spurion_verdict *v)
{
    size_t n = (size_t)v->feature_count;
    spurion_status st;

    r->n_feature_sae = r->n_feature_index = r->n_feature_attribution = r->n_feature_ablation_effect = n;
    r->n_feature_activation_max = r->n_feature_activation_sum = r->n_feature_peak_position = n;
    r->feature_sae = WIRE_NEW(w, uint32_t, n);
    r->feature_index = WIRE_NEW(w, uint32_t, n);
    r->feature_attribution = WIRE_NEW(w, float, n);
    r->feature_ablation_effect = WIRE_NEW(w, float, n);
    r->feature_activation_max = WIRE_NEW(w, float, n);
    r->feature_activation_sum = WIRE_NEW(w, float, n);
    r->feature_peak_position = WIRE_NEW(w, int32_t, n);
    if (w->failed) {
        return wire_no_memory(w);
    }
    for (size_t i = 0; i < n; i++) {
        const spurion_feature *f = &v->features[i];
        SPURION_TRY(st, sae_place(&r->feature_sae[i], v, &f->ref));
        r->feature_index[i] = (uint32_t)f->ref.index;
        r->feature_attribution[i] = wire_to_nan(f->attribution);
        r->feature_ablation_effect[i] = wire_to_nan(f->ablation_effect);
        r->feature_activation_max[i] = f->activation_max;
        r->feature_activation_sum[i] = f->activation_sum;
        r->feature_peak_position[i] = f->peak_position;
    }
    SPURION_TRY(st, pack_labels(r, w, v));
    SPURION_TRY(st, pack_explanations(r, w, v));
out:
    return st;
}

static spurion_status pack_tokens(Spurion__V1__Verdict *r, wire *w, const spurion_tokens *t)
{
    Spurion__V1__Tokens *k = WIRE_NEW(w, Spurion__V1__Tokens, 1);
    size_t n = (size_t)t->count, bytes = 0;
    char *text;

    if (k == NULL) {
        return wire_no_memory(w);
    }
    spurion__v1__tokens__init(k);
    for (size_t i = 0; i < n; i++) {
        bytes += t->text[i].size;
    }
    text = wire_take(w, bytes + 1, 1);
    k->text_size = WIRE_NEW(w, uint32_t, n);
    if (w->failed) {
        return wire_no_memory(w);
    }
    k->n_position = k->n_id = k->n_text_size = n;
    k->position = (int32_t *)t->position;
    k->id = (int32_t *)t->id;
    bytes = 0;
    for (size_t i = 0; i < n; i++) {
        k->text_size[i] = (uint32_t)t->text[i].size;
        if (t->text[i].size != 0) {
            memcpy(text + bytes, t->text[i].data, t->text[i].size);
            bytes += t->text[i].size;
        }
    }
    k->has_text = 1;
    k->text.data = (uint8_t *)text;
    k->text.len = bytes;
    if (t->attribution != NULL) {
        k->n_attribution = (size_t)t->sae_count * n;
        k->attribution = (float *)t->attribution;
    }
    if (t->flagged != NULL) {
        k->n_flagged = (size_t)t->flagged_count * (size_t)t->sae_count * n;
        k->flagged = (float *)t->flagged;
    }
    r->tokens = k;
    return spurion_ok();
}

static void pack_optional(protobuf_c_boolean *has, float *value, spurion_opt_float in)
{
    *has = in.has;
    *value = in.value;
}

static spurion_status pack_numbers(Spurion__V1__Verdict *r, wire *w, const spurion_verdict *v)
{
    size_t n = (size_t)v->family_count;
    spurion_status st;

    WIRE_SET(r, reward, v->reward);
    WIRE_SET(r, counterfactual_reward, v->counterfactual_reward);
    WIRE_SET(r, effect, v->effect);
    pack_optional(&r->has_effect_sd, &r->effect_sd, v->effect_sd);
    pack_optional(&r->has_advantage, &r->advantage, v->advantage);
    pack_optional(&r->has_counterfactual_advantage, &r->counterfactual_advantage, v->counterfactual_advantage);
    WIRE_SET(r, advantage_flip, v->advantage_flip);
    WIRE_SET(r, scored_position, v->scored_position);
    WIRE_SET(r, token_count, v->token_count);
    WIRE_SET(r, truncated, v->truncated);
    WIRE_SET(r, action, (uint32_t)v->action);
    WIRE_SET_BYTES(r, action_rule, v->action_rule);
    WIRE_SET(r, action_reward, v->action_reward);
    WIRE_SET(r, action_weight, v->action_weight);
    pack_optional(&r->has_action_advantage, &r->action_advantage, v->action_advantage);
    SPURION_TRY(st, pack_saes(r, w, v));
    r->family = WIRE_NEW(w, ProtobufCBinaryData, n);
    r->family_effect = WIRE_NEW(w, float, n);
    if (w->failed) {
        return wire_no_memory(w);
    }
    r->n_family = r->n_family_effect = n;
    for (size_t i = 0; i < n; i++) {
        r->family[i] = wire_bin(v->families[i].family);
        r->family_effect[i] = v->families[i].effect;
    }
    SPURION_TRY(st, pack_flags(r, w, v));
    SPURION_TRY(st, pack_features(r, w, v));
    if (v->tokens != NULL) {
        SPURION_TRY(st, pack_tokens(r, w, v->tokens));
    }
out:
    return st;
}

static spurion_status pack_verdict(Spurion__V1__Verdict **out, wire *w, const spurion_verdict *v)
{
    Spurion__V1__Verdict *r = WIRE_NEW(w, Spurion__V1__Verdict, 1);
    spurion_status st = spurion_ok();

    if (r == NULL) {
        return wire_no_memory(w);
    }
    spurion__v1__verdict__init(r);
    WIRE_SET_BYTES(r, run, v->run);
    WIRE_SET_BYTES(r, group, v->group);
    WIRE_SET_BYTES(r, id, v->id);
    r->has_step = v->has_step;
    r->step = v->step;
    r->has_attempt = v->attempt != 0;
    r->attempt = v->attempt;
    r->has_line = v->line != 0;
    r->line = v->line;
    WIRE_SET(r, code, (uint32_t)v->code);
    WIRE_SET_BYTES(r, message, v->message);
    WIRE_SET(r, warnings, v->warnings);
    if (v->provenance[0] != '\0') {
        WIRE_SET_BYTES(r, provenance, spurion_bytes_of(v->provenance));
    }
    if (v->code == SPURION_OK) {
        SPURION_TRY(st, pack_numbers(r, w, v));
    }
    *out = r;
out:
    return st;
}

/* ---- unpacking ---- */

static spurion_status check_places(const char *field, const uint32_t *places, size_t n, size_t below)
{
    for (size_t i = 0; i < n; i++) {
        if (places[i] >= below) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected places below %zu, found %u", field, below, places[i]);
        }
    }
    return spurion_ok();
}

/* Sum of counts, or too large for `max`. */
static spurion_status check_sum(const char *field, const uint32_t *counts, size_t n, size_t want)
{
    size_t sum = 0;
    for (size_t i = 0; i < n && sum <= want; i++) {
        sum += counts[i];
    }
    return wire_same(field, sum, want);
}

static spurion_status unpack_saes(spurion_verdict *v, wire *w, const Spurion__V1__Verdict *r)
{
    size_t n = r->n_sae;
    spurion_sae_summary *saes;
    spurion_status st;

    SPURION_TRY(st, wire_at_most("sae", n, SPURION_SAES_MAX));
    SPURION_TRY(st, wire_same("sae_attribution_sum", r->n_sae_attribution_sum, n));
    SPURION_TRY(st, wire_same("sae_error_attribution", r->n_sae_error_attribution, n));
    SPURION_TRY(st, wire_same("sae_bias_attribution", r->n_sae_bias_attribution, n));
    SPURION_TRY(st, wire_same("sae_baseline_reward", r->n_sae_baseline_reward, n));
    SPURION_TRY(st, wire_same("sae_residual", r->n_sae_residual, n));
    SPURION_TRY(st, wire_same("sae_l0_mean", r->n_sae_l0_mean, n));
    saes = WIRE_NEW(w, spurion_sae_summary, n);
    if (saes == NULL) {
        return wire_no_memory(w);
    }
    for (size_t i = 0; i < n; i++) {
        saes[i].sae = wire_bytes(true, r->sae[i]);
        saes[i].attribution_sum = wire_from_nan(r->sae_attribution_sum[i]);
        saes[i].error_attribution = wire_from_nan(r->sae_error_attribution[i]);
        saes[i].bias_attribution = wire_from_nan(r->sae_bias_attribution[i]);
        saes[i].baseline_reward = wire_from_nan(r->sae_baseline_reward[i]);
        saes[i].residual = wire_from_nan(r->sae_residual[i]);
        saes[i].l0_mean = wire_from_nan(r->sae_l0_mean[i]);
    }
    v->saes = saes;
    v->sae_count = (int32_t)n;
out:
    return st;
}

static spurion_status unpack_flags(spurion_verdict *v, wire *w, const Spurion__V1__Verdict *r)
{
    size_t n = r->n_flag_rule, total = r->n_flag_feature_sae, at = 0;
    spurion_feature_ref *refs;
    spurion_flag *flags;
    spurion_status st;

    SPURION_TRY(st, wire_at_most("flag_rule", n, SPURION_RULES_MAX));
    SPURION_TRY(st, wire_same("flag_effect", r->n_flag_effect, n));
    SPURION_TRY(st, wire_same("flag_feature_count", r->n_flag_feature_count, n));
    SPURION_TRY(st, wire_same("flag_feature_index", r->n_flag_feature_index, total));
    SPURION_TRY(st, check_sum("flag_feature_count", r->flag_feature_count, n, total));
    SPURION_TRY(st, check_places("flag_feature_sae", r->flag_feature_sae, total, r->n_sae));
    flags = WIRE_NEW(w, spurion_flag, n);
    refs = WIRE_NEW(w, spurion_feature_ref, total);
    if (w->failed) {
        return wire_no_memory(w);
    }
    for (size_t i = 0; i < total; i++) {
        refs[i].sae = v->saes[r->flag_feature_sae[i]].sae;
        refs[i].index = (int32_t)r->flag_feature_index[i];
    }
    for (size_t i = 0; i < n; i++) {
        flags[i].rule = wire_bytes(true, r->flag_rule[i]);
        flags[i].effect = r->flag_effect[i];
        flags[i].features = refs + at;
        flags[i].feature_count = (int32_t)r->flag_feature_count[i];
        at += r->flag_feature_count[i];
    }
    v->flags = flags;
    v->flag_count = (int32_t)n;
out:
    return st;
}

static spurion_status check_labels(const Spurion__V1__Verdict *r)
{
    size_t n = r->n_labelled;
    spurion_status st;

    SPURION_TRY(st, wire_same("label", r->n_label, n));
    SPURION_TRY(st, wire_same("label_verdict", r->n_label_verdict, n));
    SPURION_TRY(st, wire_same("label_family_count", r->n_label_family_count, n));
    SPURION_TRY(st, check_places("labelled", r->labelled, n, r->n_feature_sae));
    SPURION_TRY(st, check_places("label_verdict", r->label_verdict, n, 3));
    SPURION_TRY(st, check_sum("label_family_count", r->label_family_count, n, r->n_label_family));
    SPURION_TRY(st, wire_same("explanation", r->n_explanation, r->n_explained));
    SPURION_TRY(st, check_places("explained", r->explained, r->n_explained, r->n_feature_sae));
    SPURION_TRY(st, check_places("label_family", r->label_family, r->n_label_family, r->n_family_name));
out:
    return st;
}

static spurion_status unpack_labels(spurion_feature *features, wire *w, const Spurion__V1__Verdict *r)
{
    spurion_bytes *families = WIRE_NEW(w, spurion_bytes, r->n_label_family);
    size_t at = 0;

    if (families == NULL) {
        return wire_no_memory(w);
    }
    for (size_t i = 0; i < r->n_label_family; i++) {
        families[i] = wire_bytes(true, r->family_name[r->label_family[i]]);
    }
    for (size_t i = 0; i < r->n_labelled; i++) {
        spurion_feature *f = &features[r->labelled[i]];
        f->label = wire_bytes(r->label[i].len > 0, r->label[i]);
        f->verdict = verdict_name(r->label_verdict[i]);
        f->families = families + at;
        f->family_count = (int32_t)r->label_family_count[i];
        at += r->label_family_count[i];
    }
    for (size_t i = 0; i < r->n_explained; i++) {
        features[r->explained[i]].explanation = wire_bytes(true, r->explanation[i]);
    }
    return spurion_ok();
}

static spurion_status unpack_features(spurion_verdict *v, wire *w, const Spurion__V1__Verdict *r)
{
    size_t n = r->n_feature_sae;
    spurion_feature *features;
    spurion_status st;

    SPURION_TRY(st, wire_same("feature_index", r->n_feature_index, n));
    SPURION_TRY(st, wire_same("feature_attribution", r->n_feature_attribution, n));
    SPURION_TRY(st, wire_same("feature_ablation_effect", r->n_feature_ablation_effect, n));
    SPURION_TRY(st, wire_same("feature_activation_max", r->n_feature_activation_max, n));
    SPURION_TRY(st, wire_same("feature_activation_sum", r->n_feature_activation_sum, n));
    SPURION_TRY(st, wire_same("feature_peak_position", r->n_feature_peak_position, n));
    SPURION_TRY(st, check_places("feature_sae", r->feature_sae, n, r->n_sae));
    SPURION_TRY(st, check_labels(r));
    features = WIRE_NEW(w, spurion_feature, n);
    if (features == NULL) {
        return wire_no_memory(w);
    }
    for (size_t i = 0; i < n; i++) {
        spurion_feature *f = &features[i];
        f->ref.sae = v->saes[r->feature_sae[i]].sae;
        f->ref.index = (int32_t)r->feature_index[i];
        f->verdict = verdict_name(0);
        f->attribution = wire_from_nan(r->feature_attribution[i]);
        f->ablation_effect = wire_from_nan(r->feature_ablation_effect[i]);
        f->activation_max = r->feature_activation_max[i];
        f->activation_sum = r->feature_activation_sum[i];
        f->peak_position = r->feature_peak_position[i];
    }
    SPURION_TRY(st, unpack_labels(features, w, r));
    v->features = features;
    v->feature_count = (int32_t)n;
out:
    return st;
}

static spurion_status unpack_tokens(spurion_verdict *v, wire *w, const Spurion__V1__Tokens *k)
{
    size_t n = k->n_position, saes = (size_t)v->sae_count, at = 0;
    spurion_tokens *t = WIRE_NEW(w, spurion_tokens, 1);
    spurion_bytes *text = WIRE_NEW(w, spurion_bytes, n);
    spurion_status st;

    if (w->failed) {
        return wire_no_memory(w);
    }
    SPURION_TRY(st, wire_at_most("tokens.position", n, SPURION_TOKENS_MAX));
    SPURION_TRY(st, wire_same("tokens.id", k->n_id, n));
    SPURION_TRY(st, wire_same("tokens.text_size", k->n_text_size, n));
    SPURION_TRY(st, check_sum("tokens.text_size", k->text_size, n, k->text.len));
    for (size_t i = 0; i < n; i++) {
        char *copy = wire_take(w, k->text_size[i], 1);
        if (copy == NULL) {
            return wire_no_memory(w);
        }
        if (k->text_size[i] != 0) {
            memcpy(copy, k->text.data + at, k->text_size[i]);
        }
        text[i].data = copy;
        text[i].size = k->text_size[i];
        at += k->text_size[i];
    }
    t->count = (int32_t)n;
    t->position = k->position;
    t->id = k->id;
    t->text = text;
    t->sae_count = v->sae_count;
    t->flagged_count = v->flag_count;
    if (k->n_attribution != 0) {
        SPURION_TRY(st, wire_same("tokens.attribution", k->n_attribution, saes * n));
        t->attribution = k->attribution;
    }
    if (k->n_flagged != 0) {
        SPURION_TRY(st, wire_same("tokens.flagged", k->n_flagged, (size_t)v->flag_count * saes * n));
        t->flagged = k->flagged;
    }
    v->tokens = t;
out:
    return st;
}

static spurion_status unpack_families(spurion_verdict *v, wire *w, const Spurion__V1__Verdict *r)
{
    size_t n = r->n_family;
    spurion_family_effect *families;
    spurion_status st;

    SPURION_TRY(st, wire_at_most("family", n, SPURION_FAMILIES_MAX));
    SPURION_TRY(st, wire_same("family_effect", r->n_family_effect, n));
    families = WIRE_NEW(w, spurion_family_effect, n);
    if (families == NULL) {
        return wire_no_memory(w);
    }
    for (size_t i = 0; i < n; i++) {
        families[i].family = wire_bytes(true, r->family[i]);
        families[i].effect = r->family_effect[i];
    }
    v->families = families;
    v->family_count = (int32_t)n;
out:
    return st;
}

static spurion_opt_float unpack_optional(protobuf_c_boolean has, float value)
{
    spurion_opt_float o = {has != 0, has ? value : 0.0f};
    return o;
}

/* A verdict of before there were actions is one without. */
static void unpack_action(spurion_verdict *v, const Spurion__V1__Verdict *r)
{
    if (!r->has_action) {
        v->action_reward = r->reward;
        v->action_weight = 1;
        v->action_advantage = v->advantage;
        return;
    }
    v->action = (spurion_action)r->action;
    v->action_rule = WIRE_GET_BYTES(r, action_rule);
    v->action_reward = r->action_reward;
    v->action_weight = r->action_weight;
    v->action_advantage = unpack_optional(r->has_action_advantage, r->action_advantage);
}

static void unpack_scalars(spurion_verdict *v, const Spurion__V1__Verdict *r)
{
    v->run = WIRE_GET_BYTES(r, run);
    v->group = WIRE_GET_BYTES(r, group);
    v->id = WIRE_GET_BYTES(r, id);
    v->has_step = r->has_step != 0;
    v->step = r->step;
    v->attempt = r->attempt;
    v->line = r->line;
    v->code = (int)r->code;
    v->message = WIRE_GET_BYTES(r, message);
    v->reward = r->reward;
    v->counterfactual_reward = r->counterfactual_reward;
    v->effect = r->effect;
    v->effect_sd = unpack_optional(r->has_effect_sd, r->effect_sd);
    v->advantage = unpack_optional(r->has_advantage, r->advantage);
    v->counterfactual_advantage = unpack_optional(r->has_counterfactual_advantage, r->counterfactual_advantage);
    v->advantage_flip = r->advantage_flip != 0;
    v->scored_position = r->has_scored_position ? r->scored_position : -1;
    v->token_count = r->token_count;
    v->truncated = r->truncated != 0;
    unpack_action(v, r);
    v->warnings = r->warnings;
    if (r->has_provenance && r->provenance.len != 0) {
        memcpy(v->provenance, r->provenance.data, r->provenance.len);
    }
}

static spurion_status unpack_verdict(spurion_verdict *v, wire *w, const Spurion__V1__Verdict *r)
{
    spurion_status st;

    memset(v, 0, sizeof *v);
    if (r->code >= SPURION_CODE_COUNT) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "code: expected 0 to %d, found %u", SPURION_CODE_COUNT - 1, r->code);
    }
    if (r->provenance.len >= sizeof v->provenance) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "provenance: expected at most 16 digits, found %zu", r->provenance.len);
    }
    if (r->has_action && r->action >= SPURION_ACTION_COUNT) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "action: expected 0 to %d, found %u", SPURION_ACTION_COUNT - 1, r->action);
    }
    unpack_scalars(v, r);
    SPURION_TRY(st, unpack_saes(v, w, r));
    SPURION_TRY(st, unpack_families(v, w, r));
    SPURION_TRY(st, unpack_flags(v, w, r));
    SPURION_TRY(st, unpack_features(v, w, r));
    if (r->tokens != NULL) {
        SPURION_TRY(st, unpack_tokens(v, w, r->tokens));
    }
out:
    return st;
}

/* ---- messages ---- */

spurion_status spurion_codec_encode_verdict(spurion_bytes *out, const spurion_memory *m, const spurion_verdict *in)
{
    Spurion__V1__Verdict *r;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, pack_verdict(&r, &w, in));
    SPURION_TRY(st, wire_pack(out, &w, &r->base));
out:
    return st;
}

spurion_status spurion_codec_decode_verdict(spurion_verdict *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__verdict__descriptor, in));
    SPURION_TRY(st, unpack_verdict(out, &w, (const Spurion__V1__Verdict *)message));
out:
    return st;
}

spurion_status spurion_codec_encode_score_reply(spurion_bytes *out, const spurion_memory *m, const spurion_verdicts *in)
{
    Spurion__V1__ScoreReply r = SPURION__V1__SCORE_REPLY__INIT;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, wire_at_most("verdicts", (size_t)in->count, SPURION_BATCH_ROLLOUTS_MAX));
    r.n_verdicts = (size_t)in->count;
    r.verdicts = WIRE_NEW(&w, Spurion__V1__Verdict *, in->count);
    if (r.verdicts == NULL) {
        return wire_no_memory(&w);
    }
    for (int32_t i = 0; i < in->count; i++) {
        SPURION_TRY(st, pack_verdict(&r.verdicts[i], &w, &in->verdicts[i]));
    }
    SPURION_TRY(st, wire_pack(out, &w, &r.base));
out:
    return st;
}

/* Field 1, length-delimited, for each: https://protobuf.dev/programming-guides/encoding/ */
spurion_status spurion_codec_join_verdicts(spurion_bytes *out, const spurion_memory *m, const spurion_bytes *verdicts, int32_t count)
{
    size_t bytes = 0;
    char *data, *at;

    for (int32_t i = 0; i < count; i++) {
        bytes += verdicts[i].size + 6; /* a tag and at most five bytes of length */
    }
    data = bytes <= SPURION_DECODE_BYTES_MAX ? m->take(m->context, bytes + 1) : NULL;
    if (data == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "ScoreReply: no memory for %zu bytes", bytes);
    }
    at = data;
    for (int32_t i = 0; i < count; i++) {
        size_t n = verdicts[i].size;
        *at++ = 1 << 3 | 2;
        for (; n >= 0x80; n >>= 7) {
            *at++ = (char)(n | 0x80);
        }
        *at++ = (char)n;
        memcpy(at, verdicts[i].data, verdicts[i].size);
        at += verdicts[i].size;
    }
    *at = '\0';
    out->data = data;
    out->size = (size_t)(at - data);
    return spurion_ok();
}

spurion_status spurion_codec_decode_score_reply(spurion_verdicts *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_verdict *verdicts;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__score_reply__descriptor, in));
    const Spurion__V1__ScoreReply *r = (const Spurion__V1__ScoreReply *)message;
    SPURION_TRY(st, wire_at_most("verdicts", r->n_verdicts, SPURION_BATCH_ROLLOUTS_MAX));
    verdicts = WIRE_NEW(&w, spurion_verdict, r->n_verdicts);
    if (verdicts == NULL) {
        return wire_no_memory(&w);
    }
    for (size_t i = 0; i < r->n_verdicts; i++) {
        SPURION_TRY(st, unpack_verdict(&verdicts[i], &w, r->verdicts[i]));
    }
    out->verdicts = verdicts;
    out->count = (int32_t)r->n_verdicts;
out:
    return st;
}

spurion_status spurion_codec_encode_record(spurion_bytes *out, const spurion_memory *m, const spurion_record *in)
{
    Spurion__V1__Record r = SPURION__V1__RECORD__INIT;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, wire_rollout_pack(&r.rollout, &w, &in->rollout));
    SPURION_TRY(st, pack_verdict(&r.verdict, &w, &in->verdict));
    WIRE_SET(&r, time_ms, in->time_ms);
    SPURION_TRY(st, wire_pack(out, &w, &r.base));
out:
    return st;
}

spurion_status spurion_codec_decode_record(spurion_record *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__record__descriptor, in));
    const Spurion__V1__Record *r = (const Spurion__V1__Record *)message;
    if (r->rollout == NULL || r->verdict == NULL) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "Record: expected a rollout and a verdict, found %s",
                             r->rollout == NULL ? "no rollout" : "no verdict");
    }
    SPURION_TRY(st, wire_rollout_unpack(&out->rollout, r->rollout));
    SPURION_TRY(st, unpack_verdict(&out->verdict, &w, r->verdict));
    out->time_ms = r->time_ms;
out:
    return st;
}

/* What a verdict's provenance stands for: a hash over everything that its numbers depend on. */
#include "daemon/engine_internal.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/base/json.h"
#include "daemon/base/sha256.h"
#include "daemon/model/tokenizer.h"

#include <jansson.h>

static json_t *hex_of(const unsigned char *digest)
{
    char text[2 * SPURION_SHA256_BYTES + 1];
    spurion_hex(text, digest, SPURION_SHA256_BYTES);
    return json_string(text);
}

static spurion_status file_digest(unsigned char out[SPURION_SHA256_BYTES], const char *path)
{
    spurion_status st;
    spurion_sha256 h = {NULL};
    char buffer[65536];
    size_t n;
    FILE *f = fopen(path, "rb");

    if (!f) {
        return spurion_error(SPURION_NOT_FOUND, "%s: cannot be opened", path);
    }
    SPURION_TRY(st, spurion_sha256_init(&h));
    while ((n = fread(buffer, 1, sizeof buffer, f)) > 0) {
        SPURION_TRY(st, spurion_sha256_update(&h, buffer, n));
    }
    SPURION_TRY(st, spurion_sha256_finish(out, &h));
out:
    spurion_sha256_fini(&h);
    fclose(f);
    return st;
}

/* What the reward is made of beside the weights: config.json may normalise it, the configuration may weigh outputs and choose the position. */
static json_t *head_json(const spurion_engine *e)
{
    const spurion_model_config *m = &e->model->config;
    json_t *weights = json_array();
    for (int i = 0; i < e->config->model.head_weight_count; i++) {
        json_array_append_new(weights, json_string(e->config->model.head_weights[i]));
    }
    return json_pack("{s:s, s:i, s:f, s:f, s:b, s:b, s:i, s:o}", "stem", m->head.stem, "hidden", m->head.hidden, "mean", m->head.mean, "std",
                     m->head.std, "centre", m->head.centre, "rescale", m->head.rescale, "pooling", (int)m->pooling, "weights", weights);
}

static json_t *model_json(const spurion_engine *e, const unsigned char *digest)
{
    const spurion_config *c = e->config;
    return json_pack("{s:s, s:o, s:s, s:i, s:o, s:i, s:b, s:i, s:i, s:o}", "architecture", e->model->config.architecture, "weights", hex_of(digest),
                     "dtype", c->model.dtype == SPURION_BF16 ? "bf16" : "f32", "head_index", c->model.head_index, "head", head_json(e), "template",
                     (int)e->chat.kind, "append_eos", c->model.append_eos, "max_tokens", c->model.max_tokens, "on_too_long",
                     (int)c->model.on_too_long, "tokenizer", hex_of(spurion_tokenizer_digest(e->tokenizer)));
}

static json_t *saes_json(const spurion_engine *e)
{
    json_t *list = json_array();
    for (int i = 0; i < e->sae_count; i++) {
        const spurion_sae *s = e->saes[i];
        json_array_append_new(list, json_pack("{s:s, s:i, s:i, s:i, s:s, s:s, s:s, s:o, s:s}", "id", s->id, "kind", (int)s->full.kind,
                                              "norm", (int)s->full.norm, "k", s->full.k, "hook", s->hook_name, "format", s->format,
                                              "architecture", s->architecture, "weights", hex_of(s->digest), "transforms", s->notes));
    }
    return list;
}

static json_t *rules_json(const spurion_config *c)
{
    json_t *list = json_array();
    for (int i = 0; i < c->rule_count; i++) {
        const spurion_rule_config *r = &c->rules[i];
        json_t *families = json_array();
        for (int k = 0; k < r->family_count; k++) {
            json_array_append_new(families, json_string(r->families[k]));
        }
        json_array_append_new(list, json_pack("{s:s, s:o, s:i, s:b, s:f, s:b, s:f, s:b, s:i, s:f, s:f, s:i, s:f}", "id", r->id, "families", families,
                                              "direction", (int)r->direction, "has_effect_min", r->has_effect_min, "effect_min", r->effect_min,
                                              "has_effect_sd_min", r->has_effect_sd_min, "effect_sd_min", r->effect_sd_min, "advantage_flip",
                                              r->advantage_flip, "alert", (int)r->alert, "rate_max", r->rate_max, "alpha", r->alpha, "action",
                                              (int)r->action, "weight", r->weight));
    }
    return list;
}

spurion_status spurion_provenance_make(char digits[17], char **text, const spurion_engine *e, const spurion_config *c)
{
    spurion_status st = spurion_ok();
    unsigned char digest[SPURION_SHA256_BYTES], catalogue[SPURION_SHA256_BYTES] = {0};
    json_t *all = NULL;
    spurion_sha256 h = {NULL};

    *text = NULL;
    if (c->catalogue) {
        SPURION_TRY(st, file_digest(catalogue, c->catalogue));
    }
    all = json_pack("{s:s, s:o, s:o, s:o, s:o, s:{s:i, s:i, s:i, s:i, s:i, s:i, s:b, s:b}, s:{s:b, s:f, s:f}}", "version", SPURION_VERSION,
                    "model", model_json(e, e->weights_digest), "saes", saes_json(e), "catalogue", hex_of(catalogue), "rules", rules_json(c), "attribution",
                    "method", (int)c->attribution.method, "when", (int)c->attribution.when, "ig_steps", c->attribution.ig_steps, "ig_rule",
                    (int)c->attribution.ig_rule, "scope", (int)c->attribution.scope, "top", c->attribution.top, "completeness",
                    c->attribution.completeness, "each", c->ablation_each, "reward", "has_sd", c->reward.has_sd, "sd", c->reward.sd,
                    "trainer_tolerance", c->reward.trainer_tolerance);
    *text = all ? json_dumps(all, JSON_SORT_KEYS | JSON_COMPACT | JSON_REAL_PRECISION(17)) : NULL;
    if (!*text) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for the provenance");
        goto out;
    }
    SPURION_TRY(st, spurion_sha256_init(&h));
    SPURION_TRY(st, spurion_sha256_update(&h, *text, strlen(*text)));
    SPURION_TRY(st, spurion_sha256_finish(digest, &h));
    spurion_hex(digits, digest, 8);
out:
    spurion_sha256_fini(&h);
    json_decref(all);
    return st;
}

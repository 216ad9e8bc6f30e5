/* Score heads by their tensors; see head.h. Thread: any. Memory: none. */
#include "daemon/model/head.h"

#include <limits.h>
#include <math.h>
#include <string.h>

#define OUTPUTS_MAX 65536
#define WIDTH_MAX (1 << 20)

/* Names under which trainers keep their head. */
static const char *const stems[] = {
    "score",           /* transformers' *ForSequenceClassification, OpenRLHF; in layers: Qwen2.5-Math-RM, WorldPM, INF-ORM */
    "v_head",          /* trlx, DeepSpeed-Chat */
    "v_head.summary",  /* TRL, LLaMA-Factory; in layers: GRM */
    "value_head",      /* OpenRLHF before value_head_prefix was written */
    "regression_head", /* UltraRM, Eurus */
    "out_proj",        /* OpenAssistant */
    "score_head",      /* beaver */
};
#define STEM_COUNT (sizeof stems / sizeof *stems)

/* Heads that are no chain of layers, and checkpoints without one: named, so that a user sees what he has. */
static const struct {
    const char *tensor, *word;
    bool head;
} others[] = {
    {"regression_layer.weight", "a gated or quantile multi-objective head (regression_layer, of ArmoRM or QRM)", true},
    {"gating.logit_scale", "a gated multi-objective head (gating)", true},
    {"lm_head.weight", "a language-model head only (lm_head): this is no reward model", false},
    {"embed_out.weight", "a language-model head only (embed_out): this is no reward model", false},
};

/* --- config.json --- */

static spurion_status read_prefix(spurion_head *head, spurion_json_at config)
{
    spurion_status st;
    const char *prefix = NULL;

    SPURION_TRY(st, spurion_json_opt_string(&prefix, config, "value_head_prefix"));
    if (prefix == NULL) {
        goto out;
    }
    if (prefix[0] == '\0' || strlen(prefix) >= sizeof head->stem) {
        st = spurion_json_error(config, "value_head_prefix", "a name of 1 to 63 bytes", json_object_get(config.object, "value_head_prefix"));
        goto out;
    }
    snprintf(head->stem, sizeof head->stem, "%s", prefix);
out:
    return st;
}

static spurion_status read_outputs(spurion_model_config *c, bool *said, spurion_json_at config)
{
    spurion_status st;
    const json_t *labels = NULL;

    c->outputs = 0;
    SPURION_TRY(st, spurion_json_opt_object(&labels, config, "id2label"));
    c->outputs = labels != NULL ? (int)json_object_size(labels) : 0;
    if (c->outputs == 0) {
        SPURION_TRY(st, spurion_json_opt_int(&c->outputs, config, "num_labels", 1, OUTPUTS_MAX));
    }
    *said = c->outputs > 0;
    c->outputs = *said ? c->outputs : 1;
out:
    return st;
}

/* OpenRLHF: normalize_reward, mean, std. beaver: do_normalize, with mean and variance among the tensors. */
static spurion_status read_normalizer(spurion_model_config *c, spurion_json_at config)
{
    static const char *const functions[] = {"affine", "scale", "translate", "identity"};
    spurion_status st;
    spurion_head *head = &c->head;
    bool on = false, tensors = false;
    double mean = 0, sd = 1;
    const char *function = functions[0];

    SPURION_TRY(st, spurion_json_opt_bool(&on, config, "normalize_reward"));
    SPURION_TRY(st, spurion_json_opt_double(&mean, config, "mean", -1e30, 1e30));
    SPURION_TRY(st, spurion_json_opt_double(&sd, config, "std", -1e30, 1e30));
    SPURION_TRY(st, spurion_json_opt_bool(&tensors, config, "do_normalize"));
    SPURION_TRY(st, spurion_json_opt_string(&function, config, "normalize_function"));
    if (on && sd <= 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: std: expected above 0 with normalize_reward, found %g",
                           spurion_path_tail(config.name), sd);
        goto out;
    }
    head->mean = on ? mean : 0;
    head->std = on ? sd : 1;
    for (int i = 0; tensors; i++) {
        if (i == 4) {
            st = spurion_json_error(config, "normalize_function", "affine, scale, translate or identity",
                                    json_object_get(config.object, "normalize_function"));
            goto out;
        }
        if (strcmp(function, functions[i]) == 0) {
            head->centre = i == 0 || i == 2;
            head->rescale = i == 0 || i == 1;
            break;
        }
    }
out:
    return st;
}

static spurion_status read_pooling(spurion_model_config *c, spurion_json_at config)
{
    spurion_status st;
    const char *word = NULL;

    SPURION_TRY(st, spurion_json_opt_string(&word, config, "pooling")); /* OpenAssistant */
    c->pooling = SPURION_POOL_LAST;
    c->pooling_said = word != NULL;
    if (word != NULL && strcmp(word, "mean") == 0) {
        c->pooling = SPURION_POOL_MEAN;
    } else if (word != NULL && strcmp(word, "last") != 0) {
        st = spurion_json_error(config, "pooling", "last or mean", json_object_get(config.object, "pooling"));
    }
out:
    return st;
}

spurion_status spurion_head_read(spurion_model_config *c, bool *outputs_said, spurion_json_at config)
{
    spurion_status st;

    memset(&c->head, 0, sizeof c->head);
    SPURION_TRY(st, read_prefix(&c->head, config));
    SPURION_TRY(st, read_outputs(c, outputs_said, config));
    SPURION_TRY(st, read_normalizer(c, config));
    c->head.init_range = 0.02; /* transformers' default */
    SPURION_TRY(st, spurion_json_opt_double(&c->head.init_range, config, "initializer_range", 0, 1e6));
    SPURION_TRY(st, read_pooling(c, config));
out:
    return st;
}

/* --- tensors --- */

void spurion_head_tensor(char out[SPURION_HEAD_NAME_BYTES], const spurion_head *head, int layer, const char *what)
{
    if (head->hidden == 0) {
        snprintf(out, SPURION_HEAD_NAME_BYTES, "%s.%s", head->stem, what);
    } else { /* Linear, ReLU, Linear, ... of a Sequential */
        snprintf(out, SPURION_HEAD_NAME_BYTES, "%s.%d.%s", head->stem, 2 * layer, what);
    }
}

static const spurion_tensor_info *find(const spurion_shards *shards, const spurion_head *head, int layer, const char *what)
{
    char name[SPURION_HEAD_NAME_BYTES];
    const spurion_safetensors *file;

    spurion_head_tensor(name, head, layer, what);
    return spurion_shards_find(&file, shards, name);
}

static bool has(const spurion_shards *shards, const char *name)
{
    const spurion_safetensors *file;

    return spurion_shards_find(&file, shards, name) != NULL;
}

/* The form of the head named head->stem: one layer, or several. False when no tensor has that name. */
static bool look(spurion_head *head, const spurion_shards *shards)
{
    head->hidden = 0;
    if (find(shards, head, 0, "weight") != NULL) {
        return true;
    }
    head->hidden = 1; /* from here on names carry the layer */
    if (find(shards, head, 0, "weight") == NULL) {
        return false;
    }
    while (head->hidden < SPURION_HEAD_LAYERS_MAX && find(shards, head, head->hidden + 1, "weight") != NULL) {
        head->hidden++;
    }
    return true;
}

/* What stands in the checkpoint in the place of a head, in words. */
static const char *other_word(const spurion_shards *shards)
{
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        if (has(shards, others[i].tensor)) {
            return others[i].word;
        }
    }
    return "none";
}

static spurion_status missing(const spurion_model_config *c, const char *expected, const char *found, const char *dir)
{
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s: missing score head: expected the tensor %s of shape (%d, %d), found %s",
                         spurion_path_tail(dir), expected, c->outputs, c->hidden, found);
}

/* Shapes of the layers: a chain from the model's width to the outputs. */
static spurion_status check_chain(spurion_model_config *c, bool outputs_said, const spurion_shards *shards, const char *dir)
{
    spurion_head *head = &c->head;
    uint64_t width = (uint64_t)c->hidden;
    char name[SPURION_HEAD_NAME_BYTES], shape[128];

    head->bias = find(shards, head, head->hidden, "bias") != NULL;
    head->hidden_bias = head->hidden > 0 && find(shards, head, 0, "bias") != NULL;
    for (int l = 0; l <= head->hidden; l++) {
        const spurion_tensor_info *t = find(shards, head, l, "weight");
        bool last = l == head->hidden, wrong = t == NULL || t->rank != 2 || t->shape[1] != width || t->shape[0] < 1 ||
                                               t->shape[0] > (last ? OUTPUTS_MAX : WIDTH_MAX);

        spurion_head_tensor(name, head, l, "weight");
        /* transformers' own class must have the outputs it says; other trainers leave the base model's num_labels in config.json */
        if (!wrong && last && outputs_said && (int)t->shape[0] != c->outputs) {
            wrong = strcmp(head->stem, "score") == 0;
        }
        if (wrong) {
            snprintf(shape, sizeof shape, "none");
            if (t != NULL) {
                spurion_tensor_shape_text(shape, sizeof shape, t);
            }
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: %s: expected shape (%d, %llu) as config.json says, found %s",
                                 spurion_path_tail(dir), name, c->outputs, (unsigned long long)width, shape);
        }
        width = t->shape[0];
        if (last) {
            c->outputs = (int)width;
        } else {
            head->width[l] = (int)width;
        }
    }
    return spurion_ok();
}

/* No name is said: the one known head that stands there. */
static spurion_status search(spurion_model_config *c, const spurion_shards *shards, const char *dir)
{
    spurion_head found = c->head, trial = c->head;
    int count = 0;

    for (size_t i = 0; i < STEM_COUNT; i++) {
        snprintf(trial.stem, sizeof trial.stem, "%s", stems[i]);
        if (look(&trial, shards)) {
            if (count == 1) {
                return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected one score head, found %s and %s; value_head_prefix in config.json names it",
                                     spurion_path_tail(dir), found.stem, trial.stem);
            }
            found = trial;
            count++;
        }
    }
    c->head = found;
    return count == 1 ? spurion_ok() : missing(c, "score.weight", other_word(shards), dir);
}

spurion_status spurion_head_find(spurion_model_config *c, bool outputs_said, const spurion_shards *shards, const char *dir)
{
    spurion_status st = spurion_ok();
    char name[SPURION_HEAD_NAME_BYTES];

    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        if (others[i].head && has(shards, others[i].tensor)) {
            return spurion_error(SPURION_UNIMPLEMENTED, "%s: score head: expected linear layers, found %s", spurion_path_tail(dir), others[i].word);
        }
    }
    if (c->head.stem[0] != '\0') {
        spurion_head named = c->head;
        if (!look(&named, shards)) {
            const char *found = other_word(shards);
            snprintf(name, sizeof name, "%s.weight", c->head.stem);
            c->head.stem[0] = '\0';
            st = search(c, shards, dir);
            return missing(c, name, st.code == SPURION_OK ? c->head.stem : found, dir);
        }
        c->head = named;
    } else {
        SPURION_TRY(st, search(c, shards, dir));
    }
    SPURION_TRY(st, check_chain(c, outputs_said, shards, dir));
    if ((c->head.centre && !has(shards, "normalizer.mean")) || (c->head.rescale && !has(shards, "normalizer.var"))) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected the tensors normalizer.mean and normalizer.var as do_normalize says, found none",
                           spurion_path_tail(dir));
    }
out:
    return st;
}

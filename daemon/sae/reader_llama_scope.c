/* Llama Scope, three generations (formats.md 2.5): 2024 (hyperparams.json + checkpoints/final.safetensors), Llama-Scope-R1-Distill and
 * llamascopium (config.json + sae_weights.safetensors). With s = sqrt(d) / dataset_average_activation_norm:
 *   2024          p = W x + b / s_in, threshold in units of the raw stream; x_hat = (D f) s_in / s_out + b_dec / s_out
 *   dataset-wise  p = W (s x) + b, threshold exp(log_jumprelu_threshold) of that p; x_hat = (D f + b_dec) / s
 *   token-wise    the same with sqrt(d) / |x|;   inference: s = 1
 * sparsity_include_decoder_norm: the threshold, or the choice of the k largest, looks at p |D_i|. Thread: one. Memory: into raw. */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sae/reader.h"

/* --- the configuration --- */

static spurion_status read_points(spurion_llama_scope_config *c, spurion_json_at at)
{
    spurion_status st;
    const char *type = "sae", *in = "", *to = NULL;
    bool glu = false;

    SPURION_TRY(st, spurion_json_opt_string(&type, at, "sae_type"));
    SPURION_TRY(st, spurion_json_opt_string(&in, at, "hook_point_in|hook_point"));
    SPURION_TRY(st, spurion_json_opt_string(&to, at, "hook_point_out"));
    SPURION_TRY(st, spurion_json_opt_bool(&glu, at, "use_glu_encoder"));
    if (strcmp(type, "sae") != 0) {
        st = spurion_json_unsupported(at, "sae_type", "sae (crosscoders, transcoders and Lorsa are not read)", type);
    } else if (to != NULL && strcmp(to, in) != 0) {
        st = spurion_json_unsupported(at, "hook_point_out", "hook_point_in (transcoders are not read)", to);
    } else if (strstr(in, "hook_z") != NULL) {
        st = spurion_json_unsupported(at, "hook_point_in", "a point of width d_model (SAEs on attention heads, hook_z, are not read)", in);
    } else if (glu) {
        st = spurion_json_unsupported(at, "use_glu_encoder", "false (gated linear encoders are not read)", "true");
    }
    snprintf(c->hook_name, sizeof c->hook_name, "%s", in);
out:
    return st;
}

static spurion_status read_norm(spurion_llama_scope_config *c, spurion_json_at at, bool old)
{
    spurion_status st;
    const char *name = "dataset-wise";
    const json_t *norms = NULL;

    SPURION_TRY(st, spurion_json_opt_string(&name, at, "norm_activation"));
    c->dataset_wise = strcmp(name, "dataset-wise") == 0;
    c->token_wise = strcmp(name, "token-wise") == 0;
    if (!c->dataset_wise && !c->token_wise && strcmp(name, "inference") != 0) {
        st = spurion_json_unsupported(at, "norm_activation", "dataset-wise, token-wise or inference", name);
        goto out;
    }
    if (old && c->token_wise) {
        st = spurion_json_unsupported(at, "norm_activation", "dataset-wise or inference in hyperparams.json", name);
        goto out;
    }
    SPURION_TRY(st, spurion_json_opt_object(&norms, at, "dataset_average_activation_norm"));
    if (norms != NULL) {
        SPURION_TRY(st, spurion_json_opt_double(&c->norm_in, (spurion_json_at){norms, at.name}, "in", 1e-12, 1e12));
        c->norm_out = c->norm_in;
        SPURION_TRY(st, spurion_json_opt_double(&c->norm_out, (spurion_json_at){norms, at.name}, "out", 1e-12, 1e12));
    }
out:
    return st;
}

static spurion_status read_activation(spurion_llama_scope_config *c, spurion_json_at at, bool old)
{
    spurion_status st;
    const char *name = old ? "jumprelu" : "relu";

    SPURION_TRY(st, spurion_json_opt_string(&name, at, "act_fn"));
    snprintf(c->act_fn, sizeof c->act_fn, "%s", name);
    SPURION_TRY(st, spurion_json_opt_int(&c->k, at, "top_k", 0, 1 << 30));
    SPURION_TRY(st, spurion_json_opt_double(&c->threshold, at, "jump_relu_threshold", 0, 1e12));
    if (old && c->threshold > 0 && strcmp(c->act_fn, "topk") == 0) { /* "converted for inference": how the library loads it */
        snprintf(c->act_fn, sizeof c->act_fn, "jumprelu");
    }
    c->by_decoder_norm = true; /* the class's default */
    SPURION_TRY(st, spurion_json_opt_bool(&c->by_decoder_norm, at, "sparsity_include_decoder_norm"));
    if (strcmp(c->act_fn, "relu") != 0 && strcmp(c->act_fn, "jumprelu") != 0 && strcmp(c->act_fn, "topk") != 0) {
        st = spurion_json_unsupported(at, "act_fn", "relu, jumprelu or topk (batch top-k: convert it to jumprelu with the library first)", name);
    }
out:
    return st;
}

static spurion_status read_config(spurion_llama_scope_config *c, spurion_json_at at, bool old)
{
    spurion_status st;

    SPURION_TRY(st, read_points(c, at));
    SPURION_TRY(st, spurion_json_opt_int(&c->d_model, at, "d_model", 1, 1 << 30));
    SPURION_TRY(st, spurion_json_opt_double(&c->expansion, at, "expansion_factor", 1e-6, 1e9));
    SPURION_TRY(st, read_norm(c, at, old));
    SPURION_TRY(st, read_activation(c, at, old));
out:
    return st;
}

spurion_status spurion_llama_scope_config_parse(spurion_llama_scope_config *out, const char *text, size_t bytes, const char *name, bool old)
{
    spurion_status st;
    json_t *root = NULL;

    memset(out, 0, sizeof *out);
    SPURION_TRY(st, spurion_json_parse(&root, text, bytes, name));
    if (!json_is_object(root)) {
        st = spurion_json_error((spurion_json_at){root, name}, "the file", "an object", root);
        goto out;
    }
    SPURION_TRY(st, read_config(out, (spurion_json_at){root, name}, old));
out:
    json_decref(root);
    return st;
}

/* hyperparams.json beside the weights or above checkpoints/, else config.json. */
static spurion_status load_config(spurion_llama_scope_config *c, bool *old, const spurion_sae_source *source)
{
    static const char *const names[] = {"hyperparams.json", "../hyperparams.json", "config.json"};
    spurion_status st;
    char path[PATH_MAX] = "", *text = NULL;
    size_t bytes = 0;
    int i = 0;

    while (i < 2 && !spurion_sae_file_at(path, source->dir, names[i])) {
        i++;
    }
    *old = i < 2;
    SPURION_TRY(st, spurion_path_join(path, sizeof path, source->dir, names[i]));
    SPURION_TRY(st, spurion_file_read(&text, &bytes, path, SPURION_JSON_CONFIG_BYTES_MAX));
    SPURION_TRY(st, spurion_llama_scope_config_parse(c, text, bytes, path, *old));
out:
    free(text);
    return st;
}

/* --- tensors --- */

#define NORM_PREFIX "dataset_average_activation_norm."

typedef struct names {
    const char *enc, *dec, *enc_bias, *dec_bias;
    bool by_features; /* W_E [d, m], W_D [m, d]; else encoder.weight [m, d], decoder.weight [d, m] */
} names;

static spurion_status refuse_others(const spurion_safetensors *file, const names *n)
{
    const char *const known[] = {n->enc, n->dec, n->enc_bias, n->dec_bias, "log_jumprelu_threshold", "activation_function.log_jumprelu_threshold"};

    for (int i = 0; i < spurion_safetensors_count(file); i++) {
        const char *name = spurion_safetensors_at(file, i)->name;
        bool found = strncmp(name, NORM_PREFIX, sizeof NORM_PREFIX - 1) == 0;

        for (size_t k = 0; k < sizeof known / sizeof *known; k++) {
            found = found || strcmp(known[k], name) == 0;
        }
        if (!found) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected the tensors %s, %s, %s, %s, log_jumprelu_threshold and norms only, found %.80s",
                                 spurion_path_tail(spurion_safetensors_path(file)), n->enc, n->dec, n->enc_bias, n->dec_bias, name);
        }
    }
    return spurion_ok();
}

static spurion_status read_weights(spurion_sae_raw *raw, const spurion_llama_scope_config *c, const spurion_safetensors *file)
{
    const names modern = {"W_E", "W_D", "b_E", "b_D", true}, linear = {"encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias", false};
    const names *n = spurion_sae_has(file, "W_E") ? &modern : &linear;
    const spurion_tensor_info *enc = spurion_safetensors_find(file, n->enc);
    spurion_status st;

    SPURION_TRY(st, refuse_others(file, n));
    SPURION_TRY(st, spurion_sae_length(&raw->F, file, n->enc_bias));
    if (enc != NULL && enc->rank == 2) {
        raw->d = enc->elements / (uint64_t)raw->F <= 1 << 30 ? (int)(enc->elements / (uint64_t)raw->F) : 0;
    }
    if ((c->d_model != 0 && c->d_model != raw->d) || (c->expansion > 0 && fabs(c->expansion * raw->d - raw->F) >= 1)) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected d_model %d times expansion_factor %g as the configuration says, found %s of "
                           "width %d and %d features", spurion_path_tail(spurion_safetensors_path(file)), c->d_model, c->expansion, n->enc,
                           raw->d, raw->F);
        goto out;
    }
    SPURION_TRY(st, spurion_sae_matrix(&raw->enc, file, n->enc, raw->F, raw->d, n->by_features));
    SPURION_TRY(st, spurion_sae_matrix(&raw->dec, file, n->dec, raw->F, raw->d, !n->by_features));
    SPURION_TRY(st, spurion_sae_vector(&raw->enc_bias, file, n->enc_bias, raw->F, false));
    SPURION_TRY(st, spurion_sae_vector(&raw->dec_bias, file, n->dec_bias, raw->d, true));
    if (raw->dec_bias == NULL) { /* use_decoder_bias: false */
        SPURION_TRY(st, spurion_sae_fill(&raw->dec_bias, raw->d, 0));
    }
out:
    return st;
}

static spurion_status read_kind(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_llama_scope_config *c, const spurion_safetensors *file,
                                bool old)
{
    spurion_status st = spurion_ok();
    const char *name = spurion_sae_has(file, "log_jumprelu_threshold") ? "log_jumprelu_threshold" : "activation_function.log_jumprelu_threshold";

    if (strcmp(c->act_fn, "topk") == 0) {
        if (c->k < 1 || c->k > raw->F) {
            st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: top_k: expected an integer from 1 to %d, found %d",
                               spurion_path_tail(spurion_safetensors_path(file)), raw->F, c->k);
            goto out;
        }
        out->kind = SPURION_SAE_TOPK;
        out->k = c->k;
        raw->scale_by_norm = c->by_decoder_norm;
    } else if (strcmp(c->act_fn, "jumprelu") != 0) {
        out->kind = SPURION_SAE_RELU;
    } else if (old) {
        out->kind = SPURION_SAE_JUMPRELU;
        SPURION_TRY(st, spurion_sae_fill(&raw->threshold, raw->F, (float)c->threshold));
        spurion_sae_note(out, "threshold %.6g for all features", c->threshold);
    } else {
        out->kind = SPURION_SAE_JUMPRELU;
        SPURION_TRY(st, spurion_sae_vector(&raw->threshold, file, name, raw->F, false));
        for (int i = 0; i < raw->F; i++) {
            raw->threshold[i] = (float)exp(raw->threshold[i]);
        }
        spurion_sae_note(out, "threshold = exp(log_jumprelu_threshold)");
    }
    if (raw->scale_by_norm) {
        spurion_sae_note(out, "features times their decoder norms");
    }
out:
    return st;
}

/* p h > threshold is p > threshold / h: f keeps its own units. A row of norm 0 never passes. */
static void thresholds_by_norm(spurion_sae_file *out, spurion_sae_raw *raw)
{
    for (int i = 0; i < raw->F; i++) {
        const float *row = raw->dec + (size_t)i * (size_t)raw->d;
        double sum = 0, bar;

        for (int j = 0; j < raw->d; j++) {
            sum += (double)row[j] * row[j];
        }
        bar = sum > 0 ? raw->threshold[i] / sqrt(sum) : FLT_MAX;
        raw->threshold[i] = bar < FLT_MAX ? (float)bar : FLT_MAX;
    }
    spurion_sae_note(out, "thresholds over decoder norms");
}

/* The average norm at the hook, from a scalar tensor, the configuration, or the user's factor; gives s. */
static spurion_status read_factor(double *s, spurion_sae_raw *raw, const spurion_llama_scope_config *c, const spurion_sae_source *source)
{
    spurion_status st;
    char name[sizeof c->hook_name + sizeof NORM_PREFIX];
    double norm = c->norm_in;
    bool found = false;

    snprintf(name, sizeof name, NORM_PREFIX "%s", c->hook_name);
    SPURION_TRY(st, spurion_sae_scalar(&norm, &found, source->file, name));
    if (!found && c->norm_in == 0 && source->norm_factor > 0) {
        *s = source->norm_factor;
        raw->norm_factor_taken = true;
        goto out;
    }
    if (!(norm > 0)) {
        st = spurion_error(SPURION_FAILED_PRECONDITION, "%s: expected %s, or `norm_factor:` in the configuration (sqrt(d) over the mean norm of "
                           "the activations that it was trained on), found neither", spurion_path_tail(source->dir), name);
        goto out;
    }
    *s = sqrt(raw->d) / norm;
out:
    return st;
}

static void scale(float *x, size_t count, double by)
{
    for (size_t i = 0; i < count; i++) {
        x[i] = (float)(x[i] * by);
    }
}

static spurion_status read_units(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_llama_scope_config *c, const spurion_sae_source *source,
                                 bool old)
{
    spurion_status st = spurion_ok();
    double s = 1, s_out;

    if (c->token_wise) {
        out->norm = SPURION_SAE_NORM_RESCALE;
    } else if (c->dataset_wise) {
        SPURION_TRY(st, read_factor(&s, raw, c, source));
        if (old) { /* standardised as the library does when it loads one */
            s_out = c->norm_out > 0 ? sqrt(raw->d) / c->norm_out : s;
            scale(raw->enc_bias, (size_t)raw->F, 1 / s);
            scale(raw->dec, (size_t)raw->F * (size_t)raw->d, s / s_out);
            scale(raw->dec_bias, (size_t)raw->d, 1 / s_out);
            spurion_sae_note(out, "standardised by sqrt(d) / norm = %.9g", s);
        } else {
            raw->input_scale = s;
        }
    }
out:
    return st;
}

spurion_status spurion_sae_read_llama_scope(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source)
{
    spurion_status st;
    spurion_llama_scope_config c;
    bool old = false;

    SPURION_TRY(st, load_config(&c, &old, source));
    snprintf(out->architecture, sizeof out->architecture, "%s", c.act_fn);
    snprintf(out->hook_name, sizeof out->hook_name, "%s", c.hook_name);
    SPURION_TRY(st, read_weights(raw, &c, source->file));
    SPURION_TRY(st, read_kind(out, raw, &c, source->file, old));
    SPURION_TRY(st, read_units(out, raw, &c, source, old));
    if (raw->threshold != NULL && c.by_decoder_norm) {
        thresholds_by_norm(out, raw);
    }
out:
    return st;
}

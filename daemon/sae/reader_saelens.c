/* SAELens: cfg.json + sae_weights.safetensors, versions 3 to 6 (formats.md 2.1). Thread: one. Memory: into raw. */
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sae/reader.h"

/* --- cfg.json --- */

/* Flat before version 6, with the model's part under metadata since: a key counts wherever it stands. */
static spurion_status opt_string_either(const char **out, spurion_json_at at, spurion_json_at metadata, const char *keys)
{
    spurion_status st = spurion_json_opt_string(out, metadata, keys);

    return st.code == SPURION_OK ? spurion_json_opt_string(out, at, keys) : st;
}

/* Before version 6 an activation function could say more than the architecture. */
static spurion_status read_activation(spurion_saelens_config *c, spurion_json_at at)
{
    spurion_status st;
    const char *activation = "relu";
    const json_t *kwargs = NULL;

    SPURION_TRY(st, spurion_json_opt_string(&activation, at, "activation_fn|activation_fn_str"));
    SPURION_TRY(st, spurion_json_opt_object(&kwargs, at, "activation_fn_kwargs"));
    if (strcmp(activation, "topk") == 0) {
        if (kwargs != NULL) {
            SPURION_TRY(st, spurion_json_opt_double(&c->k, (spurion_json_at){kwargs, at.name}, "k", 1, 1e9));
        }
        if (c->k > 0) { /* whatever `architecture` says */
            snprintf(c->architecture, sizeof c->architecture, "topk");
        }
    } else if (strcmp(activation, "relu") != 0) {
        st = spurion_json_unsupported(at, "activation_fn", "relu or topk", activation);
    }
out:
    return st;
}

static spurion_status read_architecture(spurion_saelens_config *c, spurion_json_at at)
{
    static const char *const known[] = {"standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk"};
    spurion_status st;
    const char *name = "standard";

    SPURION_TRY(st, spurion_json_opt_string(&name, at, "architecture"));
    if (strstr(name, "transcoder") != NULL) {
        st = spurion_json_unsupported(at, "architecture", "a sparse autoencoder of one point (transcoders are not read: take an SAE of the same layer)", name);
        goto out;
    }
    snprintf(c->architecture, sizeof c->architecture, "%s", name);
    SPURION_TRY(st, spurion_json_opt_double(&c->k, at, "k", 0, 1e9));
    SPURION_TRY(st, read_activation(c, at));
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(c->architecture, known[i]) == 0) {
            return st;
        }
    }
    st = spurion_json_unsupported(at, "architecture", "standard, gated, jumprelu, topk, batchtopk or matryoshka_batchtopk "
                                  "(others encode by iteration, over whole sequences or with signs: take an SAE of these kinds for the same point)", name);
out:
    return st;
}

static spurion_status read_norm(spurion_saelens_config *c, spurion_json_at at)
{
    spurion_status st;
    const json_t *value = spurion_json_find(at, "normalize_activations");
    const char *name = "none";

    if (json_is_boolean(value)) { /* before version 4 */
        name = json_is_true(value) ? "expected_average_only_in" : "none";
    } else {
        SPURION_TRY(st, spurion_json_opt_string(&name, at, "normalize_activations"));
    }
    st = spurion_ok();
    if (strcmp(name, "none") == 0) {
        c->norm = SPURION_SAE_NORM_NONE;
    } else if (strcmp(name, "layer_norm") == 0) {
        c->norm = SPURION_SAE_NORM_LAYER;
    } else if (strcmp(name, "constant_norm_rescale") == 0) {
        c->norm = SPURION_SAE_NORM_RESCALE;
    } else if (strcmp(name, "expected_average_only_in") == 0) {
        c->constant_scale = true;
    } else {
        st = spurion_json_unsupported(at, "normalize_activations", "none, layer_norm, constant_norm_rescale or expected_average_only_in", name);
    }
out:
    return st;
}

static spurion_status read_hook(spurion_saelens_config *c, spurion_json_at at, spurion_json_at metadata)
{
    spurion_status st;
    const char *hook = "", *reshape = "none", *out_hook = NULL;

    SPURION_TRY(st, opt_string_either(&hook, at, metadata, "hook_name|hook_point"));
    SPURION_TRY(st, opt_string_either(&out_hook, at, metadata, "hook_name_out"));
    SPURION_TRY(st, spurion_json_opt_string(&reshape, at, "reshape_activations"));
    if (strcmp(reshape, "none") != 0 || strstr(hook, "hook_z") != NULL) {
        st = spurion_json_unsupported(at, "hook_name", "a point of width d_in (SAEs on attention heads, hook_z, are not read)",
                           hook[0] != '\0' ? hook : reshape);
        goto out;
    }
    if (out_hook != NULL && strcmp(out_hook, hook) != 0) {
        st = spurion_json_unsupported(at, "hook_name_out", "none (transcoders are not read)", out_hook);
        goto out;
    }
    if (spurion_json_find(at, "hook_head_index|hook_point_head_index") != NULL ||
        spurion_json_find(metadata, "hook_head_index") != NULL) {
        st = spurion_json_unsupported(at, "hook_head_index", "null (SAEs of one attention head are not read)", "an index");
        goto out;
    }
    snprintf(c->hook_name, sizeof c->hook_name, "%s", hook);
out:
    return st;
}

/* center_writing_weights: the SAE was trained on a model whose residual stream has its mean taken out. */
static spurion_status read_model_kwargs(spurion_saelens_config *c, spurion_json_at at, spurion_json_at metadata)
{
    spurion_status st;
    const json_t *kwargs = NULL;

    SPURION_TRY(st, spurion_json_opt_object(&kwargs, metadata, "model_from_pretrained_kwargs"));
    SPURION_TRY(st, spurion_json_opt_object(&kwargs, at, "model_from_pretrained_kwargs"));
    if (kwargs != NULL) {
        SPURION_TRY(st, spurion_json_opt_bool(&c->center_input, (spurion_json_at){kwargs, at.name}, "center_writing_weights"));
    }
out:
    return st;
}

static spurion_status read_config(spurion_saelens_config *c, spurion_json_at at)
{
    spurion_status st;
    const json_t *metadata = NULL;
    spurion_json_at meta;
    int d_out = 0;

    SPURION_TRY(st, spurion_json_opt_object(&metadata, at, "metadata"));
    meta = (spurion_json_at){metadata, at.name};
    SPURION_TRY(st, read_architecture(c, at));
    SPURION_TRY(st, read_hook(c, at, meta));
    SPURION_TRY(st, spurion_json_opt_int(&c->d_in, at, "d_in", 1, 1 << 30));
    SPURION_TRY(st, spurion_json_opt_int(&c->d_sae, at, "d_sae", 1, 1 << 30));
    d_out = c->d_in;
    SPURION_TRY(st, spurion_json_opt_int(&d_out, at, "d_out", 1, 1 << 30));
    if (d_out != c->d_in) {
        st = spurion_json_unsupported(at, "d_out", "d_in (transcoders are not read)", "another width");
        goto out;
    }
    c->apply_b_dec = true;
    SPURION_TRY(st, spurion_json_opt_bool(&c->apply_b_dec, at, "apply_b_dec_to_input"));
    c->rescale_by_norm = strstr(c->architecture, "batchtopk") != NULL; /* the default of the training class; false for topk */
    SPURION_TRY(st, spurion_json_opt_bool(&c->rescale_by_norm, at, "rescale_acts_by_decoder_norm"));
    SPURION_TRY(st, spurion_json_opt_bool(&c->output_scaled, at, "finetuning_scaling_factor"));
    SPURION_TRY(st, read_norm(c, at));
    SPURION_TRY(st, read_model_kwargs(c, at, meta));
out:
    return st;
}

spurion_status spurion_saelens_config_parse(spurion_saelens_config *out, const char *text, size_t bytes, const char *name)
{
    spurion_status st;
    json_t *root = NULL;
    spurion_json_at at;

    memset(out, 0, sizeof *out);
    SPURION_TRY(st, spurion_json_parse(&root, text, bytes, name));
    at = (spurion_json_at){root, name};
    if (!json_is_object(root)) {
        st = spurion_json_error(at, "the file", "an object", root);
        goto out;
    }
    SPURION_TRY(st, read_config(out, at));
out:
    json_decref(root);
    return st;
}

/* --- tensors --- */

static spurion_status read_sizes(spurion_sae_raw *raw, const spurion_saelens_config *c, const spurion_safetensors *file)
{
    spurion_status st;

    SPURION_TRY(st, spurion_sae_length(&raw->d, file, "b_dec"));
    SPURION_TRY(st, spurion_sae_length(&raw->F, file, strcmp(c->architecture, "gated") == 0 ? "b_gate" : "b_enc"));
    if ((c->d_in != 0 && c->d_in != raw->d) || (c->d_sae != 0 && c->d_sae != raw->F)) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected d_in %d and d_sae %d as cfg.json says, found b_dec of %d and biases of %d",
                           spurion_path_tail(spurion_safetensors_path(file)), c->d_in, c->d_sae, raw->d, raw->F);
    }
out:
    return st;
}

static spurion_status read_weights(spurion_sae_raw *raw, const spurion_saelens_config *c, const spurion_safetensors *file)
{
    spurion_status st;

    SPURION_TRY(st, read_sizes(raw, c, file));
    SPURION_TRY(st, spurion_sae_matrix(&raw->enc, file, "W_enc", raw->F, raw->d, true));
    SPURION_TRY(st, spurion_sae_matrix(&raw->dec, file, "W_dec", raw->F, raw->d, false));
    SPURION_TRY(st, spurion_sae_vector(&raw->dec_bias, file, "b_dec", raw->d, false));
    if (c->apply_b_dec) {
        SPURION_TRY(st, spurion_sae_vector(&raw->pre_bias, file, "b_dec", raw->d, false));
    }
    if (strcmp(c->architecture, "gated") == 0) {
        SPURION_TRY(st, spurion_sae_vector(&raw->gate_bias, file, "b_gate", raw->F, false));
        SPURION_TRY(st, spurion_sae_vector(&raw->r_mag, file, "r_mag", raw->F, false));
        SPURION_TRY(st, spurion_sae_vector(&raw->mag_bias, file, "b_mag", raw->F, false));
    } else {
        SPURION_TRY(st, spurion_sae_vector(&raw->enc_bias, file, "b_enc", raw->F, false));
    }
out:
    return st;
}

static spurion_status read_threshold(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_safetensors *file)
{
    spurion_status st;

    if (spurion_sae_has(file, "threshold") || !spurion_sae_has(file, "log_threshold")) {
        SPURION_TRY(st, spurion_sae_vector(&raw->threshold, file, "threshold", raw->F, false));
        goto out;
    }
    SPURION_TRY(st, spurion_sae_vector(&raw->threshold, file, "log_threshold", raw->F, false));
    for (int i = 0; i < raw->F; i++) {
        raw->threshold[i] = (float)exp(raw->threshold[i]);
    }
    spurion_sae_note(out, "threshold = exp(log_threshold)");
out:
    return st;
}

/* A raw training checkpoint: one threshold, a moving average of the smallest activation that a batch kept. */
static spurion_status read_batch_threshold(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_safetensors *file)
{
    spurion_status st;
    double threshold = 0;
    bool found = false;

    SPURION_TRY(st, spurion_sae_scalar(&threshold, &found, file, "topk_threshold"));
    if (!found) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected the tensor topk_threshold of a training checkpoint, found none",
                           spurion_path_tail(spurion_safetensors_path(file)));
        goto out;
    }
    SPURION_TRY(st, spurion_sae_fill(&raw->threshold, raw->F, (float)threshold));
    spurion_sae_note(out, "training checkpoint: threshold %.6g for all features%s", threshold, threshold > 0 ? "" : " (never updated)");
out:
    return st;
}

static spurion_status read_k(spurion_sae_file *out, const spurion_saelens_config *c, const spurion_sae_raw *raw,
                             const spurion_safetensors *file)
{
    if (c->k < 1 || c->k > raw->F || c->k != floor(c->k)) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: cfg.json: k: expected an integer from 1 to %d for topk, found %g",
                             spurion_path_tail(spurion_safetensors_path(file)), raw->F, c->k);
    }
    out->k = (int)c->k;
    return spurion_ok();
}

static spurion_status read_kind(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_saelens_config *c,
                                const spurion_safetensors *file)
{
    if (strcmp(c->architecture, "gated") == 0) {
        out->kind = SPURION_SAE_GATED;
        return spurion_ok();
    }
    if (strcmp(c->architecture, "jumprelu") == 0) {
        out->kind = SPURION_SAE_JUMPRELU;
        return read_threshold(out, raw, file);
    }
    if (strstr(c->architecture, "batchtopk") != NULL) {
        out->kind = SPURION_SAE_JUMPRELU;
        raw->scale_by_norm = c->rescale_by_norm;
        return read_batch_threshold(out, raw, file);
    }
    if (strcmp(c->architecture, "topk") == 0) {
        out->kind = SPURION_SAE_TOPK;
        raw->scale_by_norm = c->rescale_by_norm;
        return read_k(out, c, raw, file);
    }
    out->kind = SPURION_SAE_RELU;
    return spurion_ok();
}

/* Old files: f is multiplied before it is decoded when the flag says so; without the flag only a factor of ones may stand there. */
static spurion_status read_output_scale(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_saelens_config *c,
                                        const spurion_safetensors *file)
{
    spurion_status st;
    const char *name = spurion_sae_has(file, "finetuning_scaling_factor") ? "finetuning_scaling_factor" : "scaling_factor";
    bool ones = true;

    SPURION_TRY(st, spurion_sae_vector(&raw->output_scale, file, name, raw->F, !c->output_scaled));
    for (int i = 0; raw->output_scale != NULL && i < raw->F; i++) {
        ones = ones && raw->output_scale[i] == 1;
    }
    if (!ones && !c->output_scaled) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: %s: expected ones (cfg.json: finetuning_scaling_factor is false), found others",
                           spurion_path_tail(spurion_safetensors_path(file)), name);
        goto out;
    }
    if (!ones) {
        spurion_sae_note(out, "%s folded into the decoder", name);
    }
out:
    return st;
}

/* expected_average_only_in is never applied when such an SAE runs: the factor must be known, and is folded here. */
static spurion_status read_constant_scale(spurion_sae_raw *raw, const spurion_sae_source *source)
{
    spurion_status st;
    json_t *root = NULL;
    char path[PATH_MAX];

    if (source->norm_factor > 0) {
        raw->input_scale = source->norm_factor;
        raw->norm_factor_taken = true;
        return spurion_ok();
    }
    st = spurion_sae_json(&root, path, sizeof path, source->dir, "activation_scaler.json");
    if (st.code == SPURION_NOT_FOUND) {
        st = spurion_error(SPURION_FAILED_PRECONDITION,
                           "%s: cfg.json: normalize_activations: expected none, or activation_scaler.json beside it, found "
                           "expected_average_only_in without its factor: say `norm_factor:` in the configuration, or export the SAE with "
                           "sae_lens (save_inference_model)",
                           spurion_path_tail(source->dir));
        goto out;
    }
    if (st.code != SPURION_OK) {
        goto out;
    }
    if (spurion_json_find((spurion_json_at){root, path}, "scaling_factor") == NULL) {
        st = spurion_json_error((spurion_json_at){root, path}, "scaling_factor", "a number", NULL);
        goto out;
    }
    SPURION_TRY(st, spurion_json_opt_double(&raw->input_scale, (spurion_json_at){root, path}, "scaling_factor", 1e-12, 1e12));
out:
    json_decref(root);
    return st;
}

static spurion_status load_config(spurion_saelens_config *c, const spurion_sae_source *source)
{
    spurion_status st;
    char path[PATH_MAX], *text = NULL;
    size_t bytes = 0;

    SPURION_TRY(st, spurion_path_join(path, sizeof path, source->dir, "cfg.json"));
    SPURION_TRY(st, spurion_file_read(&text, &bytes, path, SPURION_JSON_CONFIG_BYTES_MAX));
    SPURION_TRY(st, spurion_saelens_config_parse(c, text, bytes, path));
out:
    free(text);
    return st;
}

spurion_status spurion_sae_read_saelens(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source)
{
    static const char *const known[] = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold", "log_threshold", "topk_threshold", "b_gate",
                                        "r_mag", "b_mag", "finetuning_scaling_factor", "scaling_factor", NULL};
    spurion_status st;
    spurion_saelens_config c;

    SPURION_TRY(st, load_config(&c, source));
    snprintf(out->architecture, sizeof out->architecture, "%s", c.architecture);
    snprintf(out->hook_name, sizeof out->hook_name, "%s", c.hook_name);
    SPURION_TRY(st, spurion_sae_refuse_others(source->file, known));
    SPURION_TRY(st, read_weights(raw, &c, source->file));
    SPURION_TRY(st, read_kind(out, raw, &c, source->file));
    SPURION_TRY(st, read_output_scale(out, raw, &c, source->file));
    out->norm = c.norm;
    raw->center_input = c.center_input;
    if (c.constant_scale) {
        SPURION_TRY(st, read_constant_scale(raw, source));
    }
out:
    return st;
}

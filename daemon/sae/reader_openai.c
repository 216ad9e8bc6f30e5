/* OpenAI's sparse_autoencoder and Goodfire's SAEs, both converted from pickles (formats.md 1.1, 2.6). Thread: one. Memory: into raw. */
#include <ctype.h>
#include <float.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sae/reader.h"

/* --- openai: u = x or LN(x); p = W (u - pre_bias) + latent_bias; ReLU, or top-k and then ReLU --- */

/* What the pickle held beside tensors, kept by the converter as JSON texts: "\"TopK\"", "{\"k\": 32, \"postact_fn\": \"ReLU\"}". */
static spurion_status read_note(json_t **out, const spurion_safetensors *file, const char *key)
{
    const char *text = spurion_safetensors_note(file, key);
    json_error_t error;

    *out = NULL;
    if (text == NULL) {
        return spurion_ok();
    }
    *out = json_loads(text, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &error);
    if (*out == NULL) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: __metadata__: %s: expected JSON as spurion-convert writes it, found %.40s",
                             spurion_path_tail(spurion_safetensors_path(file)), key, text);
    }
    return spurion_ok();
}

static spurion_status read_top_k(spurion_sae_file *out, const spurion_sae_raw *raw, const spurion_safetensors *file)
{
    spurion_status st;
    json_t *state = NULL;
    spurion_json_at at;
    const char *after = "ReLU";

    SPURION_TRY(st, read_note(&state, file, "activation_state_dict"));
    at = (spurion_json_at){state, spurion_safetensors_path(file)};
    SPURION_TRY(st, spurion_json_need_int(&out->k, at, "k", 1, raw->F));
    SPURION_TRY(st, spurion_json_opt_string(&after, at, "postact_fn"));
    if (strcmp(after, "ReLU") != 0) {
        st = spurion_error(SPURION_UNIMPLEMENTED, "%s: postact_fn: expected ReLU, found \"%.40s\"", spurion_path_tail(at.name), after);
    }
    out->kind = SPURION_SAE_TOPK;
    out->norm = SPURION_SAE_NORM_LAYER; /* the library infers it from the activation, and so do we */
    spurion_sae_note(out, "layer norm of the input, as TopK means there");
out:
    json_decref(state);
    return st;
}

static spurion_status read_activation(spurion_sae_file *out, const spurion_sae_raw *raw, const spurion_safetensors *file)
{
    spurion_status st;
    json_t *note = NULL;
    const char *name = "ReLU"; /* the library's default */

    SPURION_TRY(st, read_note(&note, file, "activation"));
    name = json_is_string(note) ? json_string_value(note) : name;
    if (strcmp(name, "TopK") == 0) {
        snprintf(out->architecture, sizeof out->architecture, "topk");
        SPURION_TRY(st, read_top_k(out, raw, file));
    } else if (strcmp(name, "ReLU") == 0) {
        snprintf(out->architecture, sizeof out->architecture, "relu");
        out->kind = SPURION_SAE_RELU;
    } else {
        st = spurion_error(SPURION_UNIMPLEMENTED, "%s: activation: expected ReLU or TopK, found \"%.40s\"",
                           spurion_path_tail(spurion_safetensors_path(file)), name);
    }
out:
    json_decref(note);
    return st;
}

/* The published tree says the point: .../resid_post_mlp_v5_32k/autoencoders/6.pt. */
static void read_hook(spurion_sae_file *out, const char *path)
{
    static const struct {
        const char *word, *site;
    } sites[] = {{"resid_post_mlp", "hook_resid_post"}, {"resid_post_attn", "hook_resid_mid"},
                 {"resid_delta_mlp", "hook_mlp_out"},   {"resid_delta_attn", "hook_attn_out"}};
    const char *name = strrchr(path, '/');
    char *end = NULL;
    long layer;

    name = name != NULL ? name + 1 : path;
    layer = strtol(name, &end, 10);
    if (!isdigit((unsigned char)name[0]) || strcmp(end, ".safetensors") != 0 || layer < 0 || layer > 9999) {
        return;
    }
    for (size_t i = 0; i < sizeof sites / sizeof *sites; i++) {
        if (strstr(path, sites[i].word) != NULL) {
            snprintf(out->hook_name, sizeof out->hook_name, "blocks.%ld.%s", layer, sites[i].site);
        }
    }
}

spurion_status spurion_sae_read_openai(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source)
{
    static const char *const known[] = {"pre_bias", "encoder.weight", "latent_bias", "decoder.weight", "stats_last_nonzero",
                                        "latents_activation_frequency", "latents_mean_square", NULL};
    spurion_status st;
    const spurion_safetensors *file = source->file;

    SPURION_TRY(st, spurion_sae_refuse_others(file, known));
    SPURION_TRY(st, spurion_sae_length(&raw->d, file, "pre_bias"));
    SPURION_TRY(st, spurion_sae_length(&raw->F, file, "latent_bias"));
    SPURION_TRY(st, spurion_sae_matrix(&raw->enc, file, "encoder.weight", raw->F, raw->d, false));
    SPURION_TRY(st, spurion_sae_matrix(&raw->dec, file, "decoder.weight", raw->F, raw->d, true));
    SPURION_TRY(st, spurion_sae_vector(&raw->enc_bias, file, "latent_bias", raw->F, false));
    SPURION_TRY(st, spurion_sae_vector(&raw->dec_bias, file, "pre_bias", raw->d, false));
    SPURION_TRY(st, spurion_sae_vector(&raw->pre_bias, file, "pre_bias", raw->d, false));
    SPURION_TRY(st, read_activation(out, raw, file));
    read_hook(out, spurion_safetensors_path(file));
out:
    return st;
}

/* --- goodfire: f = relu(W x + b), no subtraction --- */

spurion_status spurion_sae_read_goodfire(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source)
{
    static const char *const known[] = {"encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias", NULL};
    spurion_status st;
    const spurion_safetensors *file = source->file;

    SPURION_TRY(st, spurion_sae_refuse_others(file, known));
    SPURION_TRY(st, spurion_sae_length(&raw->d, file, "decoder_linear.bias"));
    SPURION_TRY(st, spurion_sae_length(&raw->F, file, "encoder_linear.bias"));
    SPURION_TRY(st, spurion_sae_matrix(&raw->enc, file, "encoder_linear.weight", raw->F, raw->d, false));
    SPURION_TRY(st, spurion_sae_matrix(&raw->dec, file, "decoder_linear.weight", raw->F, raw->d, true));
    SPURION_TRY(st, spurion_sae_vector(&raw->enc_bias, file, "encoder_linear.bias", raw->F, false));
    SPURION_TRY(st, spurion_sae_vector(&raw->dec_bias, file, "decoder_linear.bias", raw->d, false));
    snprintf(out->architecture, sizeof out->architecture, "standard");
    out->kind = SPURION_SAE_RELU;
out:
    return st;
}

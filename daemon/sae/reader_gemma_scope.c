/* Gemma Scope 1 (params.npz) and 2 (params.safetensors + config.json), formats.md 2.4: f = relu(p) 1[p > threshold], p = x W_enc + b_enc.
 * Thread: one. Memory: into raw. */
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sae/reader.h"

/* Archives spell the matrices in upper or in lower case. */
static const char *spelled(const spurion_safetensors *file, const char *upper, const char *lower)
{
    return spurion_sae_has(file, lower) ? lower : upper;
}

static spurion_status refused(const char *where, const char *key, const char *found)
{
    return spurion_error(SPURION_UNIMPLEMENTED, "%s: %s: expected an SAE of the residual stream or of what the MLP adds, found %.100s",
                         spurion_path_tail(where), key, found);
}

/* config.json: Gemma Scope 2 says the modules; Gemma Scope 1 has none. */
static spurion_status read_config(spurion_sae_file *out, const char *dir)
{
    spurion_status st;
    json_t *root = NULL;
    char path[PATH_MAX];
    const char *architecture = "jump_relu", *in = "", *to = NULL;
    spurion_json_at at;

    st = spurion_sae_json(&root, path, sizeof path, dir, "config.json");
    if (st.code != SPURION_OK) {
        return st.code == SPURION_NOT_FOUND ? spurion_ok() : st;
    }
    at = (spurion_json_at){root, path};
    SPURION_TRY(st, spurion_json_opt_string(&architecture, at, "architecture"));
    SPURION_TRY(st, spurion_json_opt_string(&in, at, "hf_hook_point_in"));
    SPURION_TRY(st, spurion_json_opt_string(&to, at, "hf_hook_point_out"));
    if (strcmp(architecture, "jump_relu") != 0) {
        st = spurion_error(SPURION_UNIMPLEMENTED, "%s: architecture: expected jump_relu, found \"%.60s\"", spurion_path_tail(path), architecture);
    } else if (to != NULL && to[0] != '\0' && strcmp(to, in) != 0) {
        st = refused(path, "hf_hook_point_out", "another point than hf_hook_point_in: a transcoder; transcoders are not read");
    } else if (strstr(in, "o_proj.input") != NULL) {
        st = refused(path, "hf_hook_point_in", "the input of o_proj: SAEs on attention heads (hook_z) are not read");
    } else {
        snprintf(out->hook_name, sizeof out->hook_name, "%s", in);
    }
out:
    json_decref(root);
    return st;
}

/* Without config.json the place tells: .../gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82. Nothing is guessed from less. */
static spurion_status hook_from_path(spurion_sae_file *out, const char *dir)
{
    static const struct {
        const char *word;
        const char *site; /* NULL: refused */
        const char *why;
    } sites[] = {{"transcoder", NULL, "a transcoder; transcoders are not read"},
                 {"-pt-att", NULL, "an SAE on attention heads (hook_z), which are not read"},
                 {"-it-att", NULL, "an SAE on attention heads (hook_z), which are not read"},
                 {"/embedding/", NULL, "an SAE of the token embedding, which is not read"},
                 {"-pt-res", "hook_resid_post", NULL}, {"-it-res", "hook_resid_post", NULL},
                 {"resid_post", "hook_resid_post", NULL},
                 {"-pt-mlp", "hook_mlp_out", NULL},    {"mlp_out", "hook_mlp_out", NULL}};
    const char *layer = strstr(dir, "layer_");
    const char *scope = strstr(dir, "gemma-scope");
    char *end = NULL;

    for (size_t i = 0; scope != NULL && i < sizeof sites / sizeof *sites; i++) {
        if (strstr(scope, sites[i].word) == NULL) {
            continue;
        }
        if (sites[i].site == NULL) {
            return refused(dir, "path", sites[i].why);
        }
        if (layer != NULL) {
            long number = strtol(layer + 6, &end, 10);

            if (end != layer + 6 && number >= 0 && number < 10000) {
                snprintf(out->hook_name, sizeof out->hook_name, "blocks.%ld.%s", number, sites[i].site);
            }
        }
        return spurion_ok();
    }
    return spurion_ok();
}

spurion_status spurion_sae_read_gemma_scope(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source)
{
    static const char *const known[] = {"W_enc", "W_dec", "w_enc", "w_dec", "b_enc", "b_dec", "threshold", NULL};
    spurion_status st;
    const spurion_safetensors *file = source->file;

    snprintf(out->architecture, sizeof out->architecture, "jumprelu");
    SPURION_TRY(st, read_config(out, source->dir));
    if (out->hook_name[0] == '\0') {
        SPURION_TRY(st, hook_from_path(out, source->dir));
    }
    if (spurion_sae_has(file, "affine_skip_connection")) {
        st = refused(spurion_safetensors_path(file), "affine_skip_connection", "a transcoder; transcoders are not read");
        goto out;
    }
    SPURION_TRY(st, spurion_sae_refuse_others(file, known));
    SPURION_TRY(st, spurion_sae_length(&raw->d, file, "b_dec"));
    SPURION_TRY(st, spurion_sae_length(&raw->F, file, "b_enc"));
    SPURION_TRY(st, spurion_sae_matrix(&raw->enc, file, spelled(file, "W_enc", "w_enc"), raw->F, raw->d, true));
    SPURION_TRY(st, spurion_sae_matrix(&raw->dec, file, spelled(file, "W_dec", "w_dec"), raw->F, raw->d, false));
    SPURION_TRY(st, spurion_sae_vector(&raw->enc_bias, file, "b_enc", raw->F, false));
    SPURION_TRY(st, spurion_sae_vector(&raw->dec_bias, file, "b_dec", raw->d, false));
    SPURION_TRY(st, spurion_sae_vector(&raw->threshold, file, "threshold", raw->F, false));
    out->kind = SPURION_SAE_JUMPRELU;
out:
    return st;
}

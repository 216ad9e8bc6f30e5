/* sparsify (EleutherAI): cfg.json + sae.safetensors (formats.md 2.3). Thread: one. Memory: into raw. */
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/sae/reader.h"

static spurion_status refuse_true(spurion_json_at at, const char *key, const char *why)
{
    spurion_status st;
    bool on = false;

    SPURION_TRY(st, spurion_json_opt_bool(&on, at, key));
    if (on) {
        st = spurion_error(SPURION_UNIMPLEMENTED, "%s: %s: expected false (%s), found true", spurion_path_tail(at.name), key, why);
    }
out:
    return st;
}

static spurion_status read_config(spurion_sparsify_config *c, spurion_json_at at)
{
    spurion_status st;
    const char *activation = "topk";

    SPURION_TRY(st, refuse_true(at, "transcode", "transcoders are not read"));
    SPURION_TRY(st, refuse_true(at, "skip_connection", "skip connections are not read"));
    SPURION_TRY(st, refuse_true(at, "signed", "signed latents are not read"));
    SPURION_TRY(st, spurion_json_opt_string(&activation, at, "activation"));
    if (strcmp(activation, "topk") != 0 && strcmp(activation, "groupmax") != 0) {
        st = spurion_error(SPURION_UNIMPLEMENTED, "%s: activation: expected topk or groupmax, found \"%.60s\"", spurion_path_tail(at.name),
                           activation);
        goto out;
    }
    c->groupmax = activation[0] == 'g';
    SPURION_TRY(st, spurion_json_need_int(&c->k, at, "k", 1, 1 << 30));
    SPURION_TRY(st, spurion_json_opt_int(&c->latents, at, "num_latents", 0, 1 << 30));
    SPURION_TRY(st, spurion_json_opt_int(&c->expansion, at, "expansion_factor", 0, 1 << 20));
    SPURION_TRY(st, spurion_json_opt_int(&c->d_in, at, "d_in", 1, 1 << 30));
out:
    return st;
}

spurion_status spurion_sparsify_config_parse(spurion_sparsify_config *out, const char *text, size_t bytes, const char *name)
{
    spurion_status st;
    json_t *root = NULL;

    memset(out, 0, sizeof *out);
    SPURION_TRY(st, spurion_json_parse(&root, text, bytes, name));
    if (!json_is_object(root)) {
        st = spurion_json_error((spurion_json_at){root, name}, "the file", "an object", root);
        goto out;
    }
    SPURION_TRY(st, read_config(out, (spurion_json_at){root, name}));
out:
    json_decref(root);
    return st;
}

static spurion_status load_config(spurion_sparsify_config *c, const spurion_sae_source *source)
{
    spurion_status st;
    char path[PATH_MAX], *text = NULL;
    size_t bytes = 0;

    SPURION_TRY(st, spurion_path_join(path, sizeof path, source->dir, "cfg.json"));
    SPURION_TRY(st, spurion_file_read(&text, &bytes, path, SPURION_JSON_CONFIG_BYTES_MAX));
    SPURION_TRY(st, spurion_sparsify_config_parse(c, text, bytes, path));
out:
    free(text);
    return st;
}

static spurion_status check_sizes(const spurion_sparsify_config *c, const spurion_sae_raw *raw, const char *path)
{
    int64_t latents = c->latents > 0 ? c->latents : (int64_t)c->expansion * raw->d;

    if ((c->d_in != 0 && c->d_in != raw->d) || (latents != 0 && latents != raw->F)) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected d_in %d and %lld latents as cfg.json says, found b_dec of %d and "
                             "encoder.bias of %d", spurion_path_tail(path), c->d_in, (long long)latents, raw->d, raw->F);
    }
    if (c->k > raw->F || (c->groupmax && raw->F % c->k != 0)) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: cfg.json: k: expected at most %d%s, found %d", spurion_path_tail(path), raw->F,
                             c->groupmax ? " and a divisor of it for groupmax" : "", c->k);
    }
    return spurion_ok();
}

/* The directory is named after the module whose output was read; other names say nothing. A block's own path in TransformerLens' form;
 * a module's as it is, for the model decides whether its output is what is added to the stream. */
static void read_hook(spurion_sae_file *out, const char *dir)
{
    const char *slash = strrchr(dir, '/'), *name = slash != NULL ? slash + 1 : dir;
    spurion_hook hook;

    if (spurion_hook_parse(&hook, name).code != SPURION_OK) {
        return;
    }
    if (hook.site == SPURION_HOOK_POST) {
        spurion_hook_name(out->hook_name, sizeof out->hook_name, hook);
    } else {
        snprintf(out->hook_name, sizeof out->hook_name, "%s", name);
    }
}

spurion_status spurion_sae_read_sparsify(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source)
{
    static const char *const known[] = {"encoder.weight", "encoder.bias", "W_dec", "b_dec", NULL};
    spurion_status st;
    spurion_sparsify_config c;
    const spurion_safetensors *file = source->file;

    SPURION_TRY(st, load_config(&c, source));
    SPURION_TRY(st, spurion_sae_refuse_others(file, known));
    SPURION_TRY(st, spurion_sae_length(&raw->d, file, "b_dec"));
    SPURION_TRY(st, spurion_sae_length(&raw->F, file, "encoder.bias"));
    SPURION_TRY(st, check_sizes(&c, raw, spurion_safetensors_path(file)));
    SPURION_TRY(st, spurion_sae_matrix(&raw->enc, file, "encoder.weight", raw->F, raw->d, false));
    SPURION_TRY(st, spurion_sae_matrix(&raw->dec, file, "W_dec", raw->F, raw->d, false));
    SPURION_TRY(st, spurion_sae_vector(&raw->enc_bias, file, "encoder.bias", raw->F, false));
    SPURION_TRY(st, spurion_sae_vector(&raw->dec_bias, file, "b_dec", raw->d, false));
    SPURION_TRY(st, spurion_sae_vector(&raw->pre_bias, file, "b_dec", raw->d, false));
    out->kind = c.groupmax ? SPURION_SAE_GROUPMAX : SPURION_SAE_TOPK;
    out->k = c.k;
    snprintf(out->architecture, sizeof out->architecture, "%s", c.groupmax ? "groupmax" : "topk");
    read_hook(out, source->dir);
out:
    return st;
}

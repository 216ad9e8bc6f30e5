/* Which format of SAE lies at a place (formats.md section 11). Thread: one. Memory: one configuration file at a time. */
#include <limits.h>
#include <string.h>
#include <unistd.h>

#include "daemon/sae/reader.h"

static const struct {
    const char *name;
    const char *files[4]; /* the weights, in the order in which they are looked for; ends with NULL */
} formats[SPURION_FORMAT_COUNT] = {
    [SPURION_FORMAT_SAELENS] = {"saelens", {"sae_weights.safetensors", NULL}},
    [SPURION_FORMAT_DICTIONARY_LEARNING] = {"dictionary_learning", {"ae.safetensors", NULL}},
    [SPURION_FORMAT_SPARSIFY] = {"sparsify", {"sae.safetensors", NULL}},
    [SPURION_FORMAT_GEMMA_SCOPE] = {"gemma_scope", {"params.npz", "params.safetensors", NULL}},
    [SPURION_FORMAT_LLAMA_SCOPE] = {"llama_scope", {"sae_weights.safetensors", "checkpoints/pruned.safetensors",
                                                    "checkpoints/final.safetensors", NULL}},
    [SPURION_FORMAT_OPENAI] = {"openai", {NULL}},
    [SPURION_FORMAT_GOODFIRE] = {"goodfire", {NULL}},
};

const char *spurion_sae_format_name(spurion_sae_format format)
{
    return formats[format].name;
}

const char *const *spurion_sae_format_files(spurion_sae_format format)
{
    return formats[format].files;
}

bool spurion_sae_file_at(char *out, const char *dir, const char *name)
{
    return spurion_path_join(out, PATH_MAX, dir, name).code == SPURION_OK && access(out, F_OK) == 0;
}

bool spurion_sae_ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);

    return n >= m && strcmp(text + n - m, end) == 0;
}

spurion_status spurion_sae_convert_first(const char *pickle)
{
    return spurion_error(SPURION_FAILED_PRECONDITION,
                         "%s: expected a safetensors file, found a pickle: convert it with `python -m spurion.convert %s`",
                         spurion_path_tail(pickle), spurion_path_tail(pickle));
}

spurion_status spurion_sae_format_by_name(spurion_sae_format *out, const char **variant, const char *name)
{
    size_t n = strcspn(name, ":");

    *variant = name[n] == ':' ? name + n + 1 : NULL;
    for (int i = 0; i < SPURION_FORMAT_COUNT; i++) {
        if (strlen(formats[i].name) == n && memcmp(formats[i].name, name, n) == 0) {
            *out = (spurion_sae_format)i;
            return spurion_ok();
        }
    }
    return spurion_error(SPURION_UNIMPLEMENTED, "format: expected " SPURION_FORMATS_READ ", found \"%.60s\"", name);
}

/* What is no SAE of one point of the stream, by the file that tells it. */
static const char *other_kind(const char *dir)
{
    static const struct {
        const char *file, *word;
    } others[] = {{"conf.yaml", "a temporal SAE (conf.yaml), which needs whole sequences"},
                  {"wandb-config.yaml", "a transcoder (wandb-config.yaml); transcoders are not read"},
                  {"wanb-config.yaml", "a transcoder (wanb-config.yaml); transcoders are not read"},
                  {"W_enc_0.safetensors", "a cross-layer transcoder (W_enc_0.safetensors); transcoders are not read"},
                  {"sae_weights.dcp", "distributed shards (sae_weights.dcp): save the SAE as safetensors with llamascopium first"},
                  {"checkpoints/final.dcp", "distributed shards (final.dcp): save the SAE as safetensors with llamascopium first"}};
    char path[PATH_MAX];

    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        if (spurion_sae_file_at(path, dir, others[i].file)) {
            return others[i].word;
        }
    }
    return NULL;
}

static spurion_status unknown_format(const char *dir, const char *found)
{
    return spurion_error(SPURION_INVALID_ARGUMENT,
                         "%s: expected an SAE of format " SPURION_FORMATS_READ " (cfg.json, config.json, hyperparams.json, params.npz, or "
                         "tensors of a known class), found %s", spurion_path_tail(dir), found);
}

static spurion_status find_by_cfg(spurion_sae_format *format, const char *dir)
{
    spurion_status st;
    json_t *root = NULL;
    char path[PATH_MAX];
    spurion_json_at at;

    SPURION_TRY(st, spurion_sae_json(&root, path, sizeof path, dir, "cfg.json"));
    at = (spurion_json_at){root, path};
    if (spurion_json_find(at, "architecture|hook_name|hook_point|metadata|d_sae") != NULL) {
        *format = SPURION_FORMAT_SAELENS;
    } else if (spurion_json_find(at, "expansion_factor|num_latents") != NULL) {
        *format = SPURION_FORMAT_SPARSIFY;
    } else {
        st = spurion_json_error(at, "architecture (SAELens) or expansion_factor (sparsify)", "one of them", NULL);
    }
out:
    json_decref(root);
    return st;
}

static spurion_status find_by_config(spurion_sae_format *format, const char *dir)
{
    spurion_status st;
    json_t *root = NULL;
    char path[PATH_MAX];
    const char *architecture;
    spurion_json_at at;

    SPURION_TRY(st, spurion_sae_json(&root, path, sizeof path, dir, "config.json"));
    at = (spurion_json_at){root, path};
    architecture = json_string_value(json_object_get(root, "architecture"));
    if (json_is_object(json_object_get(root, "trainer"))) {
        *format = SPURION_FORMAT_DICTIONARY_LEARNING;
    } else if (spurion_json_find(at, "sae_type|hook_point_in|norm_activation") != NULL) {
        *format = SPURION_FORMAT_LLAMA_SCOPE;
    } else if (architecture != NULL && strcmp(architecture, "jump_relu") == 0) {
        *format = SPURION_FORMAT_GEMMA_SCOPE;
    }
out:
    json_decref(root);
    return st;
}

static spurion_status ambiguous(const spurion_safetensors *file)
{
    return spurion_error(SPURION_INVALID_ARGUMENT,
                         "%s: expected cfg.json beside it (saelens), or `format:` in the configuration: gemma_scope or "
                         "dictionary_learning:JumpReluAutoEncoder (p = x W_enc + b_enc), dictionary_learning:MatryoshkaBatchTopKSAE; found W_enc "
                         "alone, which several formats have and mean differently", spurion_path_tail(spurion_safetensors_path(file)));
}

/* By the names of the tensors: what stands in no directory of its own (Elriggs/rm's ae_layer12.pt). */
static spurion_status find_by_tensors(spurion_sae_format *format, const spurion_safetensors *file)
{
    bool linear = spurion_sae_has(file, "encoder.weight"), npz = spurion_sae_ends_with(spurion_safetensors_path(file), ".npz");

    if (spurion_sae_has(file, "W_skip") || spurion_sae_has(file, "affine_skip_connection")) {
        return unknown_format(spurion_safetensors_path(file), "a transcoder (a skip connection); transcoders are not read");
    }
    if (spurion_sae_has(file, "encoder_linear.weight")) {
        *format = SPURION_FORMAT_GOODFIRE;
    } else if (spurion_sae_has(file, "pre_bias") && spurion_sae_has(file, "latent_bias")) {
        *format = SPURION_FORMAT_OPENAI;
    } else if (spurion_sae_has(file, "W_E") || spurion_sae_has(file, "log_jumprelu_threshold")) {
        *format = SPURION_FORMAT_LLAMA_SCOPE;
    } else if (linear && spurion_sae_has(file, "W_dec")) {
        *format = SPURION_FORMAT_SPARSIFY;
    } else if ((linear && spurion_sae_has(file, "decoder.weight")) || spurion_sae_has(file, "group_sizes")) {
        *format = SPURION_FORMAT_DICTIONARY_LEARNING;
    } else if (spurion_sae_has(file, "w_enc") || (npz && spurion_sae_has(file, "W_enc"))) {
        *format = SPURION_FORMAT_GEMMA_SCOPE;
    } else if (spurion_sae_has(file, "W_enc")) {
        return ambiguous(file);
    } else {
        return unknown_format(spurion_safetensors_path(file), "other tensors");
    }
    return spurion_ok();
}

/* Files whose names only one format gives. */
static spurion_sae_format find_by_files(const char *dir)
{
    static const struct {
        const char *file;
        spurion_sae_format format;
    } files[] = {{"hyperparams.json", SPURION_FORMAT_LLAMA_SCOPE}, {"../hyperparams.json", SPURION_FORMAT_LLAMA_SCOPE},
                 {"params.npz", SPURION_FORMAT_GEMMA_SCOPE},       {"params.safetensors", SPURION_FORMAT_GEMMA_SCOPE},
                 {"ae.safetensors", SPURION_FORMAT_DICTIONARY_LEARNING}, {"ae.pt", SPURION_FORMAT_DICTIONARY_LEARNING}};
    char path[PATH_MAX];

    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        bool above = files[i].file[0] == '.';

        if ((!above || spurion_sae_ends_with(dir, "checkpoints")) && spurion_sae_file_at(path, dir, files[i].file)) {
            return files[i].format;
        }
    }
    return SPURION_FORMAT_UNKNOWN;
}

spurion_status spurion_sae_format_find(spurion_sae_format *out, const char *dir, const spurion_safetensors *file)
{
    spurion_status st = spurion_ok();
    char path[PATH_MAX];
    const char *other = other_kind(dir);

    *out = SPURION_FORMAT_UNKNOWN;
    if (other != NULL) {
        return unknown_format(dir, other);
    }
    if (spurion_sae_file_at(path, dir, "cfg.json")) {
        SPURION_TRY(st, find_by_cfg(out, dir));
    } else if (spurion_sae_file_at(path, dir, "config.json")) {
        SPURION_TRY(st, find_by_config(out, dir));
    }
    if (*out == SPURION_FORMAT_UNKNOWN) {
        *out = find_by_files(dir);
    }
    if (*out == SPURION_FORMAT_UNKNOWN && file != NULL) {
        SPURION_TRY(st, find_by_tensors(out, file));
    }
    if (*out == SPURION_FORMAT_UNKNOWN) {
        st = unknown_format(dir, "none of these files");
    }
out:
    return st;
}

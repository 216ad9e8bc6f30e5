/* SAE checkpoints: which format lies at a path (formats.md section 11), its reader, and the fold. Thread: one. Memory: malloc. */
#include "daemon/sae/sae_file.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/base/sha256.h"
#include "daemon/sae/reader.h"

typedef spurion_status (*sae_reader)(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source);

static const struct {
    const char *name, *weights, *pickle; /* files of a directory */
    sae_reader read;
} formats[] = {{"saelens", "sae_weights.safetensors", "sae_weights.pt", spurion_sae_read_saelens},
               {"dictionary_learning", "ae.safetensors", "ae.pt", spurion_sae_read_dictionary_learning},
               {"sparsify", "sae.safetensors", "sae.pt", spurion_sae_read_sparsify}};

enum { SAELENS, DICTIONARY_LEARNING, SPARSIFY, FORMAT_COUNT, FORMAT_UNKNOWN = -1 };

#define FORMATS_READ "saelens, dictionary_learning or sparsify"

static bool file_at(char *out, const char *dir, const char *name)
{
    return spurion_path_join(out, PATH_MAX, dir, name).code == SPURION_OK && access(out, F_OK) == 0;
}

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);

    return n >= m && strcmp(text + n - m, end) == 0;
}

static bool is_pickle(const char *path)
{
    return ends_with(path, ".pt") || ends_with(path, ".pth") || ends_with(path, ".bin");
}

static spurion_status convert_first(const char *pickle)
{
    return spurion_error(SPURION_FAILED_PRECONDITION,
                         "%s: expected a safetensors file, found a pickle: convert it with `python -m spurion.convert %s`",
                         spurion_path_tail(pickle), spurion_path_tail(pickle));
}

/* --- which format --- */

/* Other formats, by the file that tells them: named in the message. */
static const char *other_format(const char *dir)
{
    static const struct {
        const char *file, *word;
    } others[] = {{"hyperparams.json", "a Llama Scope dictionary (hyperparams.json)"},
                  {"params.npz", "a Gemma Scope dictionary (params.npz)"},
                  {"params.safetensors", "a Gemma Scope 2 dictionary (params.safetensors)"},
                  {"conf.yaml", "a temporal SAE (conf.yaml)"},
                  {"wandb-config.yaml", "a transcoder (wandb-config.yaml)"},
                  {"wanb-config.yaml", "a transcoder (wanb-config.yaml)"}};
    char path[PATH_MAX];

    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        if (file_at(path, dir, others[i].file)) {
            return others[i].word;
        }
    }
    return NULL;
}

static spurion_status unknown_format(const char *dir, const char *found)
{
    return spurion_error(SPURION_INVALID_ARGUMENT,
                         "%s: expected an SAE of format " FORMATS_READ " (cfg.json, or config.json with trainer.dict_class), found %s",
                         spurion_path_tail(dir), found);
}

static spurion_status detect_by_cfg(int *format, const char *dir)
{
    spurion_status st;
    json_t *root = NULL;
    char path[PATH_MAX];
    spurion_json_at at;

    SPURION_TRY(st, spurion_sae_json(&root, path, sizeof path, dir, "cfg.json"));
    at = (spurion_json_at){root, path};
    if (spurion_json_find(at, "architecture|hook_name|hook_point|metadata|d_sae") != NULL) {
        *format = SAELENS;
    } else if (spurion_json_find(at, "expansion_factor|num_latents") != NULL) {
        *format = SPARSIFY;
    } else {
        st = spurion_json_error(at, "architecture (SAELens) or expansion_factor (sparsify)", "one of them", NULL);
    }
out:
    json_decref(root);
    return st;
}

static spurion_status detect_by_config(int *format, const char *dir)
{
    spurion_status st;
    json_t *root = NULL;
    char path[PATH_MAX];
    const json_t *trainer = NULL;
    const char *architecture = "";

    SPURION_TRY(st, spurion_sae_json(&root, path, sizeof path, dir, "config.json"));
    trainer = json_object_get(root, "trainer");
    if (json_is_string(json_object_get(root, "architecture"))) {
        architecture = json_string_value(json_object_get(root, "architecture"));
    }
    if (json_is_object(trainer)) {
        *format = DICTIONARY_LEARNING;
    } else if (json_object_get(root, "sae_type") != NULL || json_object_get(root, "hook_point_in") != NULL) {
        st = unknown_format(dir, "a dictionary of llamascopium (config.json: sae_type)");
    } else if (strcmp(architecture, "jump_relu") == 0) {
        st = unknown_format(dir, "a Gemma Scope 2 dictionary (config.json: architecture jump_relu)");
    }
out:
    json_decref(root);
    return st;
}

/* By the names of the tensors: what stands in no directory of its own (Elriggs/rm's ae_layer12.pt). */
static spurion_status detect_by_tensors(int *format, const spurion_safetensors *file)
{
    bool linear = spurion_sae_has(file, "encoder.weight");

    if (linear && spurion_sae_has(file, "decoder.weight") && !spurion_sae_has(file, "pre_bias")) {
        *format = DICTIONARY_LEARNING;
    } else if (linear && spurion_sae_has(file, "W_dec")) {
        *format = SPARSIFY;
    } else if (spurion_sae_has(file, "group_sizes")) {
        *format = DICTIONARY_LEARNING;
    } else if (spurion_sae_has(file, "W_enc")) {
        return spurion_error(SPURION_INVALID_ARGUMENT,
                             "%s: expected cfg.json beside it or `format:` in the configuration (dictionary_learning, or saelens with its "
                             "cfg.json), found W_enc alone, which several formats have",
                             spurion_path_tail(spurion_safetensors_path(file)));
    } else {
        return unknown_format(spurion_safetensors_path(file), "other tensors");
    }
    return spurion_ok();
}

static spurion_status detect(int *format, const char *dir, const spurion_safetensors *file)
{
    spurion_status st = spurion_ok();
    char path[PATH_MAX];
    const char *other = other_format(dir);

    *format = FORMAT_UNKNOWN;
    if (file_at(path, dir, "cfg.json")) {
        SPURION_TRY(st, detect_by_cfg(format, dir));
    } else if (file_at(path, dir, "config.json")) {
        SPURION_TRY(st, detect_by_config(format, dir));
    }
    if (*format == FORMAT_UNKNOWN && file_at(path, dir, formats[DICTIONARY_LEARNING].weights)) {
        *format = DICTIONARY_LEARNING; /* without config.json */
    }
    if (*format == FORMAT_UNKNOWN && file_at(path, dir, formats[DICTIONARY_LEARNING].pickle)) {
        *format = DICTIONARY_LEARNING;
    }
    if (*format == FORMAT_UNKNOWN && file != NULL) {
        SPURION_TRY(st, detect_by_tensors(format, file));
    }
    if (*format == FORMAT_UNKNOWN) {
        st = unknown_format(dir, other != NULL ? other : "none of these files");
    }
out:
    return st;
}

/* "saelens", or "dictionary_learning:BatchTopKSAE". */
static spurion_status format_by_name(int *format, const char **variant, const char *name)
{
    size_t n = strcspn(name, ":");

    *variant = name[n] == ':' ? name + n + 1 : NULL;
    for (int i = 0; i < FORMAT_COUNT; i++) {
        if (strlen(formats[i].name) == n && memcmp(formats[i].name, name, n) == 0) {
            *format = i;
            return spurion_ok();
        }
    }
    return spurion_error(SPURION_UNIMPLEMENTED, "format: expected " FORMATS_READ ", found \"%.60s\"", name);
}

/* --- which file --- */

typedef struct place {
    char dir[PATH_MAX], weights[PATH_MAX]; /* weights empty: the path is a directory */
} place;

/* A path to a file stands for the directory around it; of a pickle the converted twin is taken. */
static spurion_status locate(place *p, const char *path)
{
    struct stat info;
    char *slash, *dot;
    size_t n;

    memset(p, 0, sizeof *p);
    if (stat(path, &info) != 0) {
        return spurion_error(SPURION_NOT_FOUND, "%s: expected an SAE's directory or file, found nothing", spurion_path_tail(path));
    }
    n = strlen(path);
    if (n + sizeof ".safetensors" >= PATH_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a shorter path, found %zu bytes", spurion_path_tail(path), n);
    }
    memcpy(p->dir, path, n + 1);
    while (n > 1 && p->dir[n - 1] == '/') {
        p->dir[--n] = '\0';
    }
    if (S_ISDIR(info.st_mode)) {
        return spurion_ok();
    }
    slash = strrchr(p->dir, '/');
    if (!ends_with(path, ".json")) { /* cfg.json or config.json stand for their directory */
        memcpy(p->weights, p->dir, n + 1);
    }
    if (is_pickle(p->weights)) {
        dot = strrchr(p->weights, '.');
        memcpy(dot, ".safetensors", sizeof ".safetensors");
        if (access(p->weights, F_OK) != 0) {
            return convert_first(path);
        }
    }
    if (slash == NULL) {
        memcpy(p->dir, ".", 2);
    } else {
        slash[slash == p->dir] = '\0';
    }
    return spurion_ok();
}

static spurion_status open_weights(spurion_safetensors **out, place *p, int format)
{
    char pickle[PATH_MAX];

    if (p->weights[0] == '\0' && !file_at(p->weights, p->dir, formats[format].weights)) {
        if (file_at(pickle, p->dir, formats[format].pickle)) {
            return convert_first(pickle);
        }
        return spurion_error(SPURION_NOT_FOUND, "%s: expected %s of format %s, found none", spurion_path_tail(p->dir),
                             formats[format].weights, formats[format].name);
    }
    return spurion_safetensors_open(out, p->weights);
}

/* --- the whole --- */

static spurion_status read_digest(unsigned char out[32], const spurion_safetensors *file)
{
    spurion_status st;
    spurion_sha256 h = {NULL};

    SPURION_TRY(st, spurion_sha256_init(&h));
    SPURION_TRY(st, spurion_safetensors_hash(&h, file));
    SPURION_TRY(st, spurion_sha256_finish(out, &h));
out:
    spurion_sha256_fini(&h);
    return st;
}

static spurion_status find_source(int *format, spurion_sae_source *source, place *p, const char *path, const char *format_name)
{
    spurion_status st;

    SPURION_TRY(st, locate(p, path));
    source->dir = p->dir;
    if (p->weights[0] != '\0') {
        SPURION_TRY(st, spurion_safetensors_open(&source->file, p->weights));
    }
    if (format_name != NULL && format_name[0] != '\0') {
        SPURION_TRY(st, format_by_name(format, &source->variant, format_name));
    } else {
        SPURION_TRY(st, detect(format, p->dir, source->file));
    }
    if (source->file == NULL) {
        SPURION_TRY(st, open_weights(&source->file, p, *format));
    }
out:
    return st;
}

spurion_status spurion_sae_file_read(spurion_sae_file *out, const char *path, const char *format)
{
    spurion_status st;
    spurion_sae_raw raw = {.input_scale = 1};
    spurion_sae_source source = {NULL, NULL, NULL};
    place p;
    int which = FORMAT_UNKNOWN;

    memset(out, 0, sizeof *out);
    SPURION_TRY(st, find_source(&which, &source, &p, path, format));
    snprintf(out->format, sizeof out->format, "%s", formats[which].name);
    SPURION_TRY(st, formats[which].read(out, &raw, &source));
    SPURION_TRY(st, spurion_sae_fold(out, &raw));
    SPURION_TRY(st, read_digest(out->digest, source.file));
out:
    spurion_safetensors_close(source.file);
    spurion_sae_raw_fini(&raw);
    if (st.code != SPURION_OK) {
        spurion_sae_file_fini(out);
    }
    return st;
}

void spurion_sae_file_fini(spurion_sae_file *f)
{
    free(f->enc);
    free(f->enc_bias);
    free(f->threshold);
    free(f->scale);
    free(f->gate_bias);
    free(f->mag_scale);
    free(f->mag_bias);
    free(f->dec);
    free(f->dec_bias);
    memset(f, 0, sizeof *f);
}

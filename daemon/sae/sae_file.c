/* SAE checkpoints: the file at a path, its reader, and the fold. Thread: one. Memory: malloc. */
#include "daemon/sae/sae_file.h"

#include <dirent.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/base/sha256.h"
#include "daemon/sae/reader.h"

typedef spurion_status (*sae_reader)(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source);

static const sae_reader readers[SPURION_FORMAT_COUNT] = {
    [SPURION_FORMAT_SAELENS] = spurion_sae_read_saelens,
    [SPURION_FORMAT_DICTIONARY_LEARNING] = spurion_sae_read_dictionary_learning,
    [SPURION_FORMAT_SPARSIFY] = spurion_sae_read_sparsify,
    [SPURION_FORMAT_GEMMA_SCOPE] = spurion_sae_read_gemma_scope,
    [SPURION_FORMAT_LLAMA_SCOPE] = spurion_sae_read_llama_scope,
    [SPURION_FORMAT_OPENAI] = spurion_sae_read_openai,
    [SPURION_FORMAT_GOODFIRE] = spurion_sae_read_goodfire,
};

/* --- which file --- */

typedef struct place {
    char dir[PATH_MAX], weights[PATH_MAX]; /* weights empty: the path is a directory */
} place;

/* Length of the ending of a pickle's name (.pt, .pth, .bin); 0: it is none. */
static size_t pickle_ending(const char *path)
{
    static const char *const endings[] = {".pt", ".pth", ".bin"};

    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        if (spurion_sae_ends_with(path, endings[i])) {
            return strlen(endings[i]);
        }
    }
    return 0;
}

/* A path to a file stands for the directory around it; of a pickle the converted twin is taken. */
static spurion_status locate(place *p, const char *path)
{
    struct stat info;
    char *slash;
    size_t n, ending;

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
    if (!spurion_sae_ends_with(path, ".json")) { /* cfg.json or config.json stand for their directory */
        memcpy(p->weights, p->dir, n + 1);
    }
    ending = pickle_ending(p->weights);
    if (ending > 0) {
        memcpy(p->weights + n - ending, ".safetensors", sizeof ".safetensors");
        if (access(p->weights, F_OK) != 0) {
            return spurion_sae_convert_first(path);
        }
    }
    if (slash == NULL) {
        memcpy(p->dir, ".", 2);
    } else {
        slash[slash == p->dir] = '\0';
    }
    return spurion_ok();
}

static spurion_status open_file(spurion_safetensors **out, const char *path)
{
    return spurion_sae_ends_with(path, ".npz") ? spurion_safetensors_open_npz(out, path) : spurion_safetensors_open(out, path);
}

/* The only file of a directory that ends so: the formats that give their files no name. */
static spurion_status only_file(char *out, const char *dir, const char *format)
{
    DIR *d = opendir(dir);
    struct dirent *entry;
    char pickle[PATH_MAX] = "";
    int count = 0;

    while (d != NULL && (entry = readdir(d)) != NULL) {
        if (spurion_sae_ends_with(entry->d_name, ".safetensors")) {
            count++;
            (void)spurion_path_join(out, PATH_MAX, dir, entry->d_name).code;
        } else if (pickle_ending(entry->d_name) > 0) {
            (void)spurion_path_join(pickle, PATH_MAX, dir, entry->d_name).code;
        }
    }
    if (d != NULL) {
        closedir(d);
    }
    if (count == 0 && pickle[0] != '\0') {
        return spurion_sae_convert_first(pickle);
    }
    if (count != 1) {
        return spurion_error(count == 0 ? SPURION_NOT_FOUND : SPURION_INVALID_ARGUMENT,
                             "%s: expected one safetensors file of format %s, found %d: give the path of the file", spurion_path_tail(dir),
                             format, count);
    }
    return spurion_ok();
}

static spurion_status find_weights(place *p, spurion_sae_format format)
{
    const char *const *files = spurion_sae_format_files(format);
    char pickle[PATH_MAX];

    if (files[0] == NULL) {
        return only_file(p->weights, p->dir, spurion_sae_format_name(format));
    }
    for (int i = 0; files[i] != NULL; i++) {
        if (spurion_sae_file_at(p->weights, p->dir, files[i])) {
            return spurion_ok();
        }
    }
    for (int i = 0; files[i] != NULL; i++) {
        char name[64];

        snprintf(name, sizeof name, "%.*s.pt", (int)(strrchr(files[i], '.') - files[i]), files[i]);
        if (spurion_sae_file_at(pickle, p->dir, name)) {
            return spurion_sae_convert_first(pickle);
        }
    }
    return spurion_error(SPURION_NOT_FOUND, "%s: expected %s of format %s, found none", spurion_path_tail(p->dir), files[0],
                         spurion_sae_format_name(format));
}

static spurion_status find_source(spurion_sae_format *format, spurion_sae_source *source, place *p, const char *path, const char *format_name)
{
    spurion_status st;

    SPURION_TRY(st, locate(p, path));
    source->dir = p->dir;
    if (p->weights[0] != '\0') {
        SPURION_TRY(st, open_file(&source->file, p->weights));
    }
    if (format_name != NULL && format_name[0] != '\0') {
        SPURION_TRY(st, spurion_sae_format_by_name(format, &source->variant, format_name));
    } else {
        SPURION_TRY(st, spurion_sae_format_find(format, p->dir, source->file));
    }
    if (source->file == NULL) {
        SPURION_TRY(st, find_weights(p, *format));
        SPURION_TRY(st, open_file(&source->file, p->weights));
    }
out:
    return st;
}

/* --- the whole --- */

static spurion_status read_digest(unsigned char out[32], const spurion_safetensors *file)
{
    spurion_status st;
    spurion_sha256 h = {NULL};

    SPURION_TRY(st, spurion_sha256_init(&h));
    SPURION_TRY(st, spurion_safetensors_hash(&h, file, NULL));
    SPURION_TRY(st, spurion_sha256_finish(out, &h));
out:
    spurion_sha256_fini(&h);
    return st;
}

spurion_status spurion_sae_file_read(spurion_sae_file *out, const char *path, const spurion_sae_options *options)
{
    static const spurion_sae_options none = {NULL, 0, false};
    const spurion_sae_options *o = options != NULL ? options : &none;
    spurion_status st;
    spurion_sae_raw raw = {.input_scale = 1, .unit_decoder = o->unit_decoder};
    spurion_sae_source source = {.norm_factor = o->norm_factor};
    spurion_sae_format format = SPURION_FORMAT_UNKNOWN;
    place p;

    memset(out, 0, sizeof *out);
    SPURION_TRY(st, find_source(&format, &source, &p, path, o->format));
    snprintf(out->format, sizeof out->format, "%s", spurion_sae_format_name(format));
    if (source.variant != NULL && format != SPURION_FORMAT_DICTIONARY_LEARNING) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "format: expected a class after ':' with dictionary_learning only, found \"%.60s\"", o->format);
        goto out;
    }
    SPURION_TRY(st, readers[format](out, &raw, &source));
    if (o->norm_factor > 0 && !raw.norm_factor_taken) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: norm_factor: expected none (%s %s has no dataset-wise norm, or its files say it), "
                           "found %.9g", spurion_path_tail(path), out->format, out->architecture, o->norm_factor);
        goto out;
    }
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

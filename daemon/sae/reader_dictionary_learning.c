/* dictionary_learning: ae.safetensors (converted from ae.pt) + config.json (formats.md 2.2). Thread: one. Memory: into raw. */
#include <limits.h>
#include <string.h>

#include "daemon/sae/reader.h"

typedef enum dictionary_class {
    CLASS_STANDARD, /* AutoEncoder */
    CLASS_NEW,
    CLASS_GATED,
    CLASS_JUMPRELU,
    CLASS_TOPK,
    CLASS_BATCH_TOPK,
    CLASS_MATRYOSHKA,
    CLASS_COUNT
} dictionary_class;

static const struct {
    const char *name;
    const char *enc, *dec, *enc_bias, *dec_bias, *pre_bias;
    bool by_features; /* W_enc [d, m], W_dec [m, d]; else encoder.weight [m, d], decoder.weight [d, m] */
    const char *extra[4]; /* further tensors it may hold */
} classes[CLASS_COUNT] = {
    [CLASS_STANDARD] = {"AutoEncoder", "encoder.weight", "decoder.weight", "encoder.bias", "bias", "bias", false, {NULL}},
    [CLASS_NEW] = {"AutoEncoderNew", "encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias", NULL, false, {NULL}},
    [CLASS_GATED] = {"GatedAutoEncoder", "encoder.weight", "decoder.weight", NULL, "decoder_bias", "decoder_bias", false,
                     {"gate_bias", "r_mag", "mag_bias", NULL}},
    [CLASS_JUMPRELU] = {"JumpReluAutoEncoder", "W_enc", "W_dec", "b_enc", "b_dec", NULL, true, {"threshold", NULL}},
    [CLASS_TOPK] = {"AutoEncoderTopK", "encoder.weight", "decoder.weight", "encoder.bias", "b_dec", "b_dec", false, {"k", "threshold", NULL}},
    [CLASS_BATCH_TOPK] = {"BatchTopKSAE", "encoder.weight", "decoder.weight", "encoder.bias", "b_dec", "b_dec", false,
                          {"k", "threshold", NULL}},
    [CLASS_MATRYOSHKA] = {"MatryoshkaBatchTopKSAE", "W_enc", "W_dec", "b_enc", "b_dec", "b_dec", true,
                          {"k", "threshold", "group_sizes", NULL}},
};

static spurion_status class_by_name(dictionary_class *out, const char *name, const char *where)
{
    for (int i = 0; i < CLASS_COUNT; i++) {
        if (strcmp(classes[i].name, name) == 0) {
            *out = (dictionary_class)i;
            return spurion_ok();
        }
    }
    return spurion_error(SPURION_UNIMPLEMENTED,
                         "%s: dict_class: expected AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder, AutoEncoderTopK, "
                         "BatchTopKSAE or MatryoshkaBatchTopKSAE, found \"%.60s\"; a class of the same arithmetic is said by `format: "
                         "dictionary_learning:CLASS`",
                         spurion_path_tail(where), name);
}

/* TopK and BatchTopK have the same tensors and other arithmetic: never guessed. */
static spurion_status class_by_tensors(dictionary_class *out, const spurion_safetensors *file)
{
    if (spurion_sae_has(file, "gate_bias")) {
        *out = CLASS_GATED;
    } else if (spurion_sae_has(file, "group_sizes")) {
        *out = CLASS_MATRYOSHKA;
    } else if (spurion_sae_has(file, "encoder.weight") && spurion_sae_has(file, "b_dec")) {
        return spurion_error(SPURION_INVALID_ARGUMENT,
                             "%s: expected config.json beside it that says which class it is, found none, and AutoEncoderTopK and "
                             "BatchTopKSAE have the same tensors: say `format: dictionary_learning:BatchTopKSAE` or AutoEncoderTopK in the "
                             "configuration, or write {\"trainer\":{\"dict_class\":\"BatchTopKSAE\"}} there",
                             spurion_path_tail(spurion_safetensors_path(file)));
    } else if (spurion_sae_has(file, "W_enc") && spurion_sae_has(file, "threshold")) {
        *out = CLASS_JUMPRELU;
    } else if (spurion_sae_has(file, "bias")) {
        *out = CLASS_STANDARD;
    } else if (spurion_sae_has(file, "decoder.bias")) {
        *out = CLASS_NEW;
    } else {
        return spurion_error(SPURION_INVALID_ARGUMENT,
                             "%s: expected the tensors of a class of dictionary_learning (gate_bias, b_dec, bias, decoder.bias ..), found none",
                             spurion_path_tail(spurion_safetensors_path(file)));
    }
    return spurion_ok();
}

/* config.json's trainer object; NULL without the file. */
static spurion_status read_trainer(json_t **root, spurion_json_at *trainer, char *path, size_t path_bytes, const char *dir)
{
    spurion_status st = spurion_sae_json(root, path, path_bytes, dir, "config.json");

    *trainer = (spurion_json_at){NULL, path};
    if (st.code == SPURION_NOT_FOUND) {
        return spurion_ok();
    }
    if (st.code == SPURION_OK) {
        st = spurion_json_opt_object(&trainer->object, (spurion_json_at){*root, path}, "trainer");
    }
    return st;
}

static spurion_status find_class(dictionary_class *out, spurion_json_at trainer, const spurion_sae_source *source)
{
    spurion_status st;
    const char *name = NULL;

    SPURION_TRY(st, spurion_json_opt_string(&name, trainer, "dict_class"));
    if (source->variant != NULL && source->variant[0] != '\0') {
        SPURION_TRY(st, class_by_name(out, source->variant, "format"));
    } else if (name != NULL) {
        SPURION_TRY(st, class_by_name(out, name, trainer.name));
    } else {
        SPURION_TRY(st, class_by_tensors(out, source->file));
    }
out:
    return st;
}

static spurion_status refuse_others(dictionary_class c, const spurion_safetensors *file)
{
    const char *known[10];
    int n = 0;
    const char *const all[] = {classes[c].enc, classes[c].dec, classes[c].enc_bias, classes[c].dec_bias};

    for (int i = 0; i < 4; i++) {
        if (all[i] != NULL) {
            known[n++] = all[i];
        }
    }
    for (int i = 0; classes[c].extra[i] != NULL; i++) {
        known[n++] = classes[c].extra[i];
    }
    known[n] = NULL;
    return spurion_sae_refuse_others(file, known);
}

static spurion_status read_weights(spurion_sae_raw *raw, dictionary_class c, spurion_json_at trainer, const spurion_safetensors *file)
{
    spurion_status st;
    bool by_features = classes[c].by_features;

    SPURION_TRY(st, refuse_others(c, file));
    SPURION_TRY(st, spurion_sae_length(&raw->d, file, classes[c].dec_bias));
    SPURION_TRY(st, spurion_sae_length(&raw->F, file, c == CLASS_GATED ? "gate_bias" : classes[c].enc_bias));
    SPURION_TRY(st, spurion_sae_check_size(trainer, "activation_dim", raw->d));
    SPURION_TRY(st, spurion_sae_check_size(trainer, "dict_size", raw->F));
    SPURION_TRY(st, spurion_sae_matrix(&raw->enc, file, classes[c].enc, raw->F, raw->d, by_features));
    SPURION_TRY(st, spurion_sae_matrix(&raw->dec, file, classes[c].dec, raw->F, raw->d, !by_features));
    SPURION_TRY(st, spurion_sae_vector(&raw->dec_bias, file, classes[c].dec_bias, raw->d, false));
    if (classes[c].pre_bias != NULL) {
        SPURION_TRY(st, spurion_sae_vector(&raw->pre_bias, file, classes[c].pre_bias, raw->d, false));
    }
    if (c == CLASS_GATED) {
        SPURION_TRY(st, spurion_sae_vector(&raw->gate_bias, file, "gate_bias", raw->F, false));
        SPURION_TRY(st, spurion_sae_vector(&raw->r_mag, file, "r_mag", raw->F, false));
        SPURION_TRY(st, spurion_sae_vector(&raw->mag_bias, file, "mag_bias", raw->F, false));
    } else {
        SPURION_TRY(st, spurion_sae_vector(&raw->enc_bias, file, classes[c].enc_bias, raw->F, false));
    }
out:
    return st;
}

static spurion_status read_k(spurion_sae_file *out, const spurion_sae_raw *raw, spurion_json_at trainer, const spurion_safetensors *file)
{
    spurion_status st;
    double k = 0;
    bool found = false;

    SPURION_TRY(st, spurion_sae_scalar(&k, &found, file, "k"));
    if (!found) {
        SPURION_TRY(st, spurion_json_opt_double(&k, trainer, "k", 0, 1e9));
    }
    if (k < 1 || k > raw->F || k != (double)(int)k) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: k: expected an integer from 1 to %d, found %g",
                           spurion_path_tail(spurion_safetensors_path(file)), raw->F, k);
        goto out;
    }
    out->k = (int)k;
out:
    return st;
}

static spurion_status read_batch_threshold(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_safetensors *file)
{
    spurion_status st;
    double threshold = 0;
    bool found = false;

    SPURION_TRY(st, spurion_sae_scalar(&threshold, &found, file, "threshold"));
    if (!found) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected the tensor threshold, found none (a file older than it cannot run alone)",
                           spurion_path_tail(spurion_safetensors_path(file)));
        goto out;
    }
    SPURION_TRY(st, spurion_sae_fill(&raw->threshold, raw->F, (float)threshold));
    spurion_sae_note(out, "threshold %.6g for all features%s", threshold, threshold < 0 ? " (never set)" : "");
out:
    return st;
}

static spurion_status read_kind(spurion_sae_file *out, spurion_sae_raw *raw, dictionary_class c, spurion_json_at trainer,
                                const spurion_safetensors *file)
{
    switch (c) {
    case CLASS_GATED:
        out->kind = SPURION_SAE_GATED;
        return spurion_ok();
    case CLASS_JUMPRELU:
        out->kind = SPURION_SAE_JUMPRELU;
        return spurion_sae_vector(&raw->threshold, file, "threshold", raw->F, false);
    case CLASS_TOPK: /* exact top-k: the threshold counts only in a mode of the library that we do not take */
        out->kind = SPURION_SAE_TOPK;
        return read_k(out, raw, trainer, file);
    case CLASS_BATCH_TOPK:
    case CLASS_MATRYOSHKA:
        out->kind = SPURION_SAE_JUMPRELU;
        return read_batch_threshold(out, raw, file);
    default:
        out->kind = SPURION_SAE_RELU;
        return spurion_ok();
    }
}

/* submodule_name "resid_post_layer_8" (its saved form) or a module path; the layer alone does not say the site. */
static spurion_status read_hook(spurion_sae_file *out, spurion_json_at trainer)
{
    spurion_status st;
    const char *module = "";
    spurion_hook hook;

    SPURION_TRY(st, spurion_json_opt_string(&module, trainer, "submodule_name"));
    if (spurion_hook_parse(&hook, module).code == SPURION_OK) {
        spurion_hook_name(out->hook_name, sizeof out->hook_name, hook);
    } else {
        snprintf(out->hook_name, sizeof out->hook_name, "%s", module);
    }
out:
    return st;
}

spurion_status spurion_sae_read_dictionary_learning(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source)
{
    spurion_status st;
    json_t *root = NULL;
    spurion_json_at trainer;
    char path[PATH_MAX];
    dictionary_class c = CLASS_STANDARD;

    SPURION_TRY(st, read_trainer(&root, &trainer, path, sizeof path, source->dir));
    SPURION_TRY(st, find_class(&c, trainer, source));
    snprintf(out->architecture, sizeof out->architecture, "%s", classes[c].name);
    SPURION_TRY(st, read_weights(raw, c, trainer, source->file));
    SPURION_TRY(st, read_kind(out, raw, c, trainer, source->file));
    SPURION_TRY(st, read_hook(out, trainer));
out:
    json_decref(root);
    return st;
}

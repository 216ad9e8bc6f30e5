/* What the SAE readers share: tensors by name with their shapes checked, and the fold into canonical form (formats.md section 1).
 * Not for other modules. Thread: one. Memory: malloc, freed by spurion_sae_raw_fini. */
#ifndef SPURION_SAE_READER_H
#define SPURION_SAE_READER_H

#include <stdbool.h>

#include "daemon/base/json.h"
#include "daemon/model/safetensors.h"
#include "daemon/sae/sae_file.h"

/* What a file holds, before folding. NULL: it has none. */
typedef struct spurion_sae_raw {
    int d, F;
    float *enc;                          /* (F, d) */
    float *enc_bias;                     /* (F) */
    float *pre_bias;                     /* (d) subtracted from the (normalised) input */
    float *dec;                          /* (F, d) */
    float *dec_bias;                     /* (d) */
    float *threshold;                    /* (F) */
    float *gate_bias, *r_mag, *mag_bias; /* (F) */
    float *output_scale;                 /* (F) what f is multiplied by before it is decoded */
    bool scale_by_norm;                  /* h_i = |W_dec_i| */
    bool center_input;                   /* the encoder sees x - mean(x) */
    double input_scale;                  /* a constant factor of the whole dictionary's space; 1: none */
} spurion_sae_raw;

/* Where a dictionary lies: its safetensors file, and the directory with what describes it. */
typedef struct spurion_sae_source {
    spurion_safetensors *file;
    const char *dir;
    const char *variant; /* of "format:variant", or NULL */
} spurion_sae_source;

/* Readers: fill out's format, architecture, hook_name, kind, norm, k and notes, and raw. */
spurion_status spurion_sae_read_saelens(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source) SPURION_MUST_USE;
spurion_status spurion_sae_read_dictionary_learning(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source)
    SPURION_MUST_USE;
spurion_status spurion_sae_read_sparsify(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source) SPURION_MUST_USE;

/* The length of a vector tensor. INVALID_ARGUMENT when it is missing or no vector of 1 to 2^30 elements. */
spurion_status spurion_sae_length(int *out, const spurion_safetensors *file, const char *name) SPURION_MUST_USE;
/* Gives a vector of n elements, finite. A missing one is INVALID_ARGUMENT, or NULL and OK when optional. */
spurion_status spurion_sae_vector(float **out, const spurion_safetensors *file, const char *name, int n, bool optional) SPURION_MUST_USE;
/* Gives (rows, columns) from a tensor stored so, or transposed. When rows == columns, `stored_transposed` says which the format means. */
spurion_status spurion_sae_matrix(float **out, const spurion_safetensors *file, const char *name, int rows, int columns,
                                  bool stored_transposed) SPURION_MUST_USE;
/* A tensor of one element (shape () or (1)); *found false when it is missing. */
spurion_status spurion_sae_scalar(double *out, bool *found, const spurion_safetensors *file, const char *name) SPURION_MUST_USE;
/* INVALID_ARGUMENT when the file holds a tensor outside of `known` (ends with NULL): what we do not know may change the result. */
spurion_status spurion_sae_refuse_others(const spurion_safetensors *file, const char *const *known) SPURION_MUST_USE;
bool spurion_sae_has(const spurion_safetensors *file, const char *name);
/* INVALID_ARGUMENT when a configuration's size is not the tensors'. */
spurion_status spurion_sae_check_size(spurion_json_at at, const char *keys, int found_in_tensors) SPURION_MUST_USE;
/* Gives n copies of value. */
spurion_status spurion_sae_fill(float **out, int n, float value) SPURION_MUST_USE;
/* Adds to notes, separated by "; ". */
void spurion_sae_note(spurion_sae_file *out, const char *format, ...) SPURION_PRINTF(2, 3);
/* DIR/name as JSON object. NOT_FOUND when it is not there. */
spurion_status spurion_sae_json(json_t **out, char *path, size_t path_bytes, const char *dir, const char *name) SPURION_MUST_USE;

/* Moves raw into out's canonical arrays. */
spurion_status spurion_sae_fold(spurion_sae_file *out, spurion_sae_raw *raw) SPURION_MUST_USE;
void spurion_sae_raw_fini(spurion_sae_raw *raw);

/* A SAELens configuration, old or new, as one. */
typedef struct spurion_saelens_config {
    char architecture[32];
    char hook_name[256];
    int d_in, d_sae; /* 0: not said */
    double k;        /* 0: not said */
    bool apply_b_dec, rescale_by_norm, output_scaled, center_input, constant_scale;
    spurion_sae_norm norm;
} spurion_saelens_config;

spurion_status spurion_saelens_config_parse(spurion_saelens_config *out, const char *text, size_t bytes, const char *name) SPURION_MUST_USE;

typedef struct spurion_sparsify_config {
    int d_in, latents, expansion, k; /* 0: not said */
    bool groupmax;
} spurion_sparsify_config;

spurion_status spurion_sparsify_config_parse(spurion_sparsify_config *out, const char *text, size_t bytes, const char *name)
    SPURION_MUST_USE;

#endif

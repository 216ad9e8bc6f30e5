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
    bool unit_decoder;                   /* features in units of decoder rows of length 1 */
    bool norm_factor_taken;              /* the reader has used the user's norm_factor */
} spurion_sae_raw;

/* Where a dictionary lies: its safetensors file, and the directory with what describes it. */
typedef struct spurion_sae_source {
    spurion_safetensors *file;
    const char *dir;
    const char *variant; /* of "format:variant", or NULL */
    double norm_factor;  /* what the user says; 0: nothing */
} spurion_sae_source;

typedef enum spurion_sae_format {
    SPURION_FORMAT_SAELENS,
    SPURION_FORMAT_DICTIONARY_LEARNING,
    SPURION_FORMAT_SPARSIFY,
    SPURION_FORMAT_GEMMA_SCOPE,
    SPURION_FORMAT_LLAMA_SCOPE,
    SPURION_FORMAT_OPENAI,
    SPURION_FORMAT_GOODFIRE,
    SPURION_FORMAT_COUNT,
    SPURION_FORMAT_UNKNOWN = -1
} spurion_sae_format;

#define SPURION_FORMATS_READ "saelens, dictionary_learning, sparsify, gemma_scope, llama_scope, openai or goodfire"

/* sae_detect.c: "saelens", or "dictionary_learning:BatchTopKSAE"; *variant NULL without a colon. UNIMPLEMENTED for another name. */
spurion_status spurion_sae_format_by_name(spurion_sae_format *out, const char **variant, const char *name) SPURION_MUST_USE;
/* Which format lies in a directory (formats.md section 11). file: the weights when the path names them, else NULL. INVALID_ARGUMENT
 * names the option that resolves an ambiguity; what is no sparse autoencoder of the residual stream is refused by its name. */
spurion_status spurion_sae_format_find(spurion_sae_format *out, const char *dir, const spurion_safetensors *file) SPURION_MUST_USE;
const char *spurion_sae_format_name(spurion_sae_format format);
/* Files of a directory that hold the weights, ends with NULL; none: a file of any name. */
const char *const *spurion_sae_format_files(spurion_sae_format format);
bool spurion_sae_file_at(char *out, const char *dir, const char *name); /* whether DIR/name is there; out: PATH_MAX bytes */
bool spurion_sae_ends_with(const char *text, const char *end);
/* FAILED_PRECONDITION: the command that converts a pickle. */
spurion_status spurion_sae_convert_first(const char *pickle);

/* Readers: fill out's format, architecture, hook_name, kind, norm, k and notes, and raw. */
spurion_status spurion_sae_read_saelens(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source) SPURION_MUST_USE;
spurion_status spurion_sae_read_dictionary_learning(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source)
    SPURION_MUST_USE;
spurion_status spurion_sae_read_sparsify(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source) SPURION_MUST_USE;
spurion_status spurion_sae_read_gemma_scope(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source) SPURION_MUST_USE;
spurion_status spurion_sae_read_llama_scope(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source) SPURION_MUST_USE;
spurion_status spurion_sae_read_openai(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source) SPURION_MUST_USE;
spurion_status spurion_sae_read_goodfire(spurion_sae_file *out, spurion_sae_raw *raw, const spurion_sae_source *source) SPURION_MUST_USE;

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

/* hyperparams.json of 2024, config.json of Llama-Scope-R1-Distill and of llamascopium, as one. */
typedef struct spurion_llama_scope_config {
    char hook_name[256];
    char act_fn[16];     /* relu, jumprelu, topk */
    int d_model;         /* 0: not said */
    double expansion;    /* 0: not said */
    double norm_in, norm_out; /* dataset_average_activation_norm; 0: not said here */
    double threshold;    /* jump_relu_threshold of 2024, in units of the raw stream; 0: none */
    int k;
    bool by_decoder_norm, dataset_wise, token_wise;
} spurion_llama_scope_config;

/* old: hyperparams.json. UNIMPLEMENTED for GLU encoders, batch-wise norms, batch top-k, and all but SAEs of one point. */
spurion_status spurion_llama_scope_config_parse(spurion_llama_scope_config *out, const char *text, size_t bytes, const char *name, bool old)
    SPURION_MUST_USE;

#endif

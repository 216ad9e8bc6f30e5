/* SAE checkpoints in canonical form (formats.md section 1), host memory. One reader per format; detection as in formats.md section 11.
 * Thread: one. Memory: malloc, freed by fini. */
#ifndef SPURION_SAE_FILE_H
#define SPURION_SAE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "spurion/ops.h"
#include "spurion/status.h"

typedef enum spurion_hook_site {
    SPURION_HOOK_PRE,
    SPURION_HOOK_ATTN_OUT,
    SPURION_HOOK_MID,
    SPURION_HOOK_MLP_OUT,
    SPURION_HOOK_POST
} spurion_hook_site;

typedef struct spurion_hook {
    int layer;
    spurion_hook_site site;
} spurion_hook;

/* Reads "blocks.L.hook_resid_post" (pre, mid, post, attn_out as blocks.L.hook_attn_out, mlp_out) and the other names of formats.md section 3
 * ("transformer.h.L", "model.layers.L", "layers.L": block outputs). INVALID_ARGUMENT with what is known; hook_z is refused by name. */
spurion_status spurion_hook_parse(spurion_hook *out, const char *name) SPURION_MUST_USE;
/* Writes the TransformerLens form. */
void spurion_hook_name(char *out, size_t bytes, spurion_hook hook);

typedef struct spurion_sae_file {
    char format[32];          /* "saelens", "dictionary_learning", ... as found */
    char architecture[32];    /* "gated", "topk", "jumprelu", "standard", ... as the file says */
    char hook_name[256];      /* from the file; empty when it says none */
    int d, F;
    spurion_sae_kind kind;
    spurion_sae_norm norm;
    int k;
    float *enc;               /* (F, d) row i = encoder direction of feature i, pre-bias and constant input scale folded in */
    float *enc_bias;          /* (F) folded b_enc; NULL for gated */
    float *threshold;         /* (F) or NULL */
    float *scale;             /* (F) h or NULL */
    float *gate_bias, *mag_scale, *mag_bias; /* (F) gated, else NULL; with a pre-bias the gate and magnitude biases are folded */
    float *dec;               /* (F, d) effective decoder rows D_i */
    float *dec_bias;          /* (d) b */
    char notes[512];          /* transforms applied, for Status: "b_dec folded; threshold exp" */
    unsigned char digest[32]; /* SHA-256 over the tensor bytes */
} spurion_sae_file;

/* What a user says about an SAE beside its path. */
typedef struct spurion_sae_options {
    const char *format; /* NULL: found out; else "saelens", "dictionary_learning:BatchTopKSAE", .. (verdict.md's names) */
    double norm_factor; /* factor of a dataset-wise norm that stands in no file (sqrt(d) / mean |x|); 0: not said */
    bool unit_decoder;  /* features in units of decoder rows of length 1, as AutoEncoder.from_pretrained and fold_W_dec_norm do */
} spurion_sae_options;

/* Reads an SAE. path: directory or file; options: NULL for none. All shapes and finiteness are checked; errors say expected and found
 * and which option resolves an ambiguity.
 * A pickle (.pt, .bin) without its converted safetensors is FAILED_PRECONDITION naming `python -m spurion.convert PATH`. */
spurion_status spurion_sae_file_read(spurion_sae_file *out, const char *path, const spurion_sae_options *options) SPURION_MUST_USE;
void spurion_sae_file_fini(spurion_sae_file *f);

#endif

/* A checkpoint's tensors by role, whatever the family calls them. Reads with pread into caller's memory; nothing is mapped.
 * Thread: one; the digest has one of its own, and large tensors are read on several. Memory: one block for header and index, plus one staging tensor. */
#ifndef SPURION_MODEL_WEIGHTS_H
#define SPURION_MODEL_WEIGHTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/model/config.h"
#include "spurion/status.h"

typedef enum spurion_role {
    SPURION_ROLE_EMBED,          /* (V, d) */
    SPURION_ROLE_POSITION,       /* (context, d) */
    SPURION_ROLE_NORM1_W, SPURION_ROLE_NORM1_B, /* (d) before attention */
    SPURION_ROLE_NORM2_W, SPURION_ROLE_NORM2_B, /* (d) before the MLP */
    SPURION_ROLE_POST_ATTENTION_W, SPURION_ROLE_POST_MLP_W, /* (d) Gemma 2 */
    SPURION_ROLE_Q, SPURION_ROLE_Q_B,   /* (H hd, d), (H hd) */
    SPURION_ROLE_K, SPURION_ROLE_K_B,   /* (KV hd, d) */
    SPURION_ROLE_V, SPURION_ROLE_V_B,
    SPURION_ROLE_O, SPURION_ROLE_O_B,   /* (d, H hd), (d) */
    SPURION_ROLE_Q_NORM, SPURION_ROLE_K_NORM, /* (hd) */
    SPURION_ROLE_GATE, SPURION_ROLE_UP, /* (ff, d); not gated: UP only */
    SPURION_ROLE_GATE_B, SPURION_ROLE_UP_B,
    SPURION_ROLE_DOWN, SPURION_ROLE_DOWN_B, /* (d, ff), (d) */
    SPURION_ROLE_FINAL_W, SPURION_ROLE_FINAL_B, /* (d) */
    SPURION_ROLE_SCORE, SPURION_ROLE_SCORE_B,   /* the head, its layers in the place of `layer`: (width or outputs, d or width) */
    SPURION_ROLE_SCORE_MEAN, SPURION_ROLE_SCORE_VAR, /* (outputs) beaver's normaliser */
    SPURION_ROLE_COUNT
} spurion_role;

typedef struct spurion_weights spurion_weights;

/* Opens DIR/model.safetensors, or DIR/model.safetensors.index.json with its shards; checks every header (formats.md 7.1) and that each
 * role the config asks for is there with its shape. A missing score head is INVALID_ARGUMENT. */
spurion_status spurion_weights_open(spurion_weights **out, const char *dir, const spurion_model_config *config) SPURION_MUST_USE;
void spurion_weights_close(spurion_weights *w);

/* Rows of the embedding tensor: ids must be below. */
int spurion_weights_vocab(const spurion_weights *w);
bool spurion_weights_has(const spurion_weights *w, spurion_role role, int layer);
/* Elements of a role's tensor in canonical form. layer: of the block, or of the head. */
size_t spurion_weights_elements(const spurion_weights *w, spurion_role role, int layer);

/* Reads one tensor as f32, row-major [out, in] (Conv1D transposed, fused QKV split, Gemma's 1 added), into out (elements).
 * layer: from 0; ignored for the roles outside of blocks. DATA_LOSS when the file is short, INVALID_ARGUMENT for NaN or Inf (names the tensor). */
spurion_status spurion_weights_read(float *out, spurion_weights *w, spurion_role role, int layer) SPURION_MUST_USE;
/* SHA-256 over all tensor bytes of the files in name order, for provenance: one stream of bytes, so one thread, which runs beside the reading of the
 * tensors from begin on. digest waits for it, and begins it where nobody has. */
spurion_status spurion_weights_digest_begin(spurion_weights *w) SPURION_MUST_USE;
spurion_status spurion_weights_digest(unsigned char out[32], spurion_weights *w) SPURION_MUST_USE;

#endif

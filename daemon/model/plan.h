/* Where every byte of the engine's passes lies: offsets computed from (model, points, rows) as a pure function, one block per role. */
#ifndef SPURION_MODEL_PLAN_H
#define SPURION_MODEL_PLAN_H

#include "daemon/model/model.h"

typedef struct spurion_plan_input {
    const spurion_model_config *config;
    spurion_dtype dtype, mid; /* the device's */
    int rows;         /* rows of one pass (and of the variants beside it) */
    int prefix;       /* positions of a prompt that goes in pieces, beside these rows: its keys and values are kept in every block; 0: none does */
    int lowest_point; /* lowest hook point; 4 * layers + 1: none */
    bool gradients;   /* attribution is on: activations of blocks above are saved */
    bool variants;    /* ablation or ig: keys and values of a second pass stand beside the first's */
    int chunk;        /* rows of the row-wise scratch: the device's row_chunk */
} spurion_plan_input;

/* Bytes of the two blocks: what a judgement keeps (keys, values, saved activations) and scratch. */
typedef struct spurion_plan {
    size_t kept_bytes, scratch_bytes;
} spurion_plan;

/* Lays a workspace out over the two blocks (kept, scratch: device memory, or NULL to count bytes only). w->k, w->v, w->saved are the
 * caller's arrays of `layers` entries (may be NULL when counting). */
spurion_plan spurion_plan_make(spurion_workspace *w, const spurion_plan_input *in, void *kept, void *scratch);

#endif

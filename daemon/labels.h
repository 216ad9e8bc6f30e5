/* Imported labels of features (spurion labels import): a file of lines, each bound to an SAE by the checksum of its weights, so that labels
 * of another dictionary, or of another version of one, are never shown. Immutable after load; read by any thread.
 * Memory: an arena of the size of what is kept. */
#ifndef SPURION_LABELS_H
#define SPURION_LABELS_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/base/arena.h"
#include "spurion/limits.h"
#include "spurion/rollout.h"
#include "spurion/status.h"

/* An SAE as labels know it. */
typedef struct spurion_labels_sae {
    unsigned char digest[32]; /* SHA-256 over its tensor bytes */
    int32_t width;
} spurion_labels_sae;

typedef struct spurion_labels {
    spurion_arena arena;
    const int32_t *index[SPURION_SAES_MAX];      /* (count), ascending */
    const spurion_bytes *text[SPURION_SAES_MAX]; /* (count) */
    int32_t count[SPURION_SAES_MAX];             /* features with a label */
    int64_t foreign;                             /* lines of SAEs that are not configured */
} spurion_labels;

/* Loads a file of labels. Of several labels of a feature the one with the best score counts, else the first.
 * NOT_FOUND; INVALID_ARGUMENT naming file, line, expected and found: no label, no checksum, an index past the SAE's width. */
spurion_status spurion_labels_load(spurion_labels *out, const char *path, const spurion_labels_sae *saes, int32_t sae_count) SPURION_MUST_USE;
void spurion_labels_fini(spurion_labels *labels);
/* The label of a feature; data NULL: it has none. */
spurion_bytes spurion_labels_find(const spurion_labels *labels, int32_t sae, int32_t index);

#endif

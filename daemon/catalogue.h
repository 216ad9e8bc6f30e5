/* What people decided about features, and the sets of features that verdicts ablate. Immutable after load; read by any thread. */
#ifndef SPURION_CATALOGUE_H
#define SPURION_CATALOGUE_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/base/arena.h"
#include "daemon/config.h"
#include "spurion/rollout.h"
#include "spurion/status.h"

typedef enum spurion_role_bits { SPURION_DETECT = 1, SPURION_DEBIAS = 2 } spurion_role_bits;

typedef struct spurion_catalogue_entry {
    int32_t sae;            /* place in config->saes */
    int32_t index;
    spurion_bytes label;
    const spurion_bytes *families;
    const int32_t *family_ids; /* places in catalogue->families */
    int32_t family_count;
    spurion_bytes verdict;  /* "spurious" | "intended" | "unknown" */
    bool spurious;
    int roles;              /* spurion_role_bits; 0 unless spurious */
    float activation_min;
} spurion_catalogue_entry;

/* A set of features whose joint removal is measured. Entries are places in catalogue->entries, ascending by (sae, index). */
typedef struct spurion_ablation_set {
    const int32_t *entries;
    int32_t count;
} spurion_ablation_set;

typedef struct spurion_catalogue {
    spurion_arena arena;
    const spurion_catalogue_entry *entries; /* ascending by (sae, index) */
    int32_t entry_count;
    const spurion_bytes *families;          /* in the order of first appearance in the file */
    int32_t family_count;

    /* Distinct sets, each measured once: equal sets are one. An empty set has effect 0 and stands for "nothing". */
    const spurion_ablation_set *sets;
    int32_t set_count;
    int32_t debias_set;                     /* place of the counterfactual's set */
    const int32_t *family_sets;             /* (family_count) */
    const int32_t *rule_sets;               /* (config->rule_count) */
} spurion_catalogue;

/* Loads the JSON Lines file and builds the sets for config's rules. widths: dictionary size of each SAE (indices must be below).
 * INVALID_ARGUMENT naming line, expected and found: unknown SAE or rule family, index out of range, a pair twice, unknown key. */
spurion_status spurion_catalogue_load(spurion_catalogue *out, const spurion_config *config, const int32_t *widths) SPURION_MUST_USE;
void spurion_catalogue_fini(spurion_catalogue *c);
/* The entry of (sae, index), or NULL. */
const spurion_catalogue_entry *spurion_catalogue_find(const spurion_catalogue *c, int32_t sae, int32_t index);

#endif

/* What the engine's own files share: engine.c (life), measure.c (passes), evidence.c (from sparse lists to verdicts), provenance.c. */
#ifndef SPURION_ENGINE_INTERNAL_H
#define SPURION_ENGINE_INTERNAL_H

#include "daemon/engine.h"
#include "daemon/labels.h"
#include "daemon/model/model.h"
#include "daemon/model/plan.h"
#include "daemon/pack.h"
#include "daemon/sae/sae.h"

/* Features of one SAE over the completion rows of a pass, on the host: pinned where the device has its own memory. */
typedef struct spurion_sae_rows {
    int slots;               /* of what it holds now: of the whole dictionary, or of its watched features */
    int32_t *count, *index;  /* (rows), (rows, slots) */
    float *value;            /* (rows, slots) */
    float *attribution;      /* (rows, slots), or NULL without gradients */
    float *xg, *bg;          /* (rows) */
} spurion_sae_rows;

/* Sums over one rollout, dense over a dictionary; touched lists what is not zero. */
typedef struct spurion_tally {
    double *attribution, *activation_sum; /* (F) */
    float *activation_max;                /* (F) */
    int32_t *peak;                        /* (F) position */
    int32_t *touched, touched_count;      /* (F) */
    int32_t *entry_of;                    /* (F) place in the catalogue, or -1 */
} spurion_tally;

/* A measurement of the jobs of one pass, from packing to evidence. The engine has two that take turns: while the device works on one, the host
 * makes the evidence of the one before and packs the next in its place. */
typedef struct spurion_measurement {
    spurion_engine *e;
    spurion_arena arena;     /* of this measurement; reset when the next is packed */
    spurion_packed packed;
    bool explain;            /* attributions are measured */
    bool ablate;             /* rewards and effects are; false on a second look */
    bool watch;              /* the clean pass looks at watched features only */
    const spurion_sae *sae;  /* of integrated gradients, or NULL */
    int rows;                /* completion rows of the pass that is being enqueued */
    spurion_sae_rows host[SPURION_SAES_MAX];
} spurion_measurement;

struct spurion_engine {
    const spurion_config *config;
    spurion_dev *dev;
    spurion_model *model;
    spurion_tokenizer *tokenizer;
    spurion_catalogue catalogue;
    bool has_catalogue;
    spurion_labels labels; /* zeros: none */
    spurion_sae *saes[SPURION_SAES_MAX];
    int sae_count;
    spurion_chat chat;
    spurion_sequence_rules sequence;

    bool gradients, variants, scope_all;
    bool watch_first; /* passes without gradients encode watched features only */
    bool *hook_points;    /* (4 * layers + 1): where a forward pass stops for an SAE or to keep the stream */
    bool *sae_points;     /* (4 * layers + 1): where an SAE reads */
    float **point_x;      /* (4 * layers + 1) device (rows, d): the clean stream at hook points; NULL elsewhere */
    int lowest;           /* lowest SAE point; 4 * layers + 1: none */
    int rows_max;
    int prefix_max;       /* positions of a prompt that goes in pieces; 0: none does, every sequence fits a pass */
    spurion_workspace w;
    void *kept, *scratch; /* device blocks */
    int32_t *d_source, *d_row_set; /* (rows) device: of a variant pass */
    float *d_fraction;    /* (rows) */
    float *mean_gradient; /* (rows, d) device: of integrated gradients; or NULL */
    spurion_tally tally[SPURION_SAES_MAX];
    float *host_rewards;  /* (rewards_room): of a clean pass, or of the passes of variants that are waited for together */
    int rewards_room;
    spurion_measurement hand[2];
    spurion_measurement *owed; /* settled, without its evidence yet; or NULL */

    /* For tests (spurion-probe): sees dR/dx (rows, d) on the device at every SAE of a clean pass. NULL in the daemon. */
    spurion_status (*observe)(void *context, int sae, const float *g, int rows);
    void *observe_context;

    size_t weights_bytes, buffers_bytes, host_bytes, peak_bytes;
    size_t device_free; /* of a device with its own memory, beside the weights */
    unsigned char weights_digest[32];
    char provenance[17];
    char *provenance_text;
};

/* What a reload changes, made beside what is in force. */
struct spurion_engine_reload {
    spurion_catalogue catalogue;
    char provenance[17];
    char *provenance_text;
};

/* What one measurement leaves with a job until its verdict is finished. */
typedef struct spurion_measured {
    float *each;              /* (active_count) ablation effect of every active spurious feature alone, or NULL */
    spurion_opt_float *baseline; /* (sae_count) */
    int32_t *first;           /* (active_count) first position where the feature is above its minimum */
    /* entries of spurious features, for the per-token view of flags */
    int32_t part_count;
    const int32_t *part_entry, *part_token; /* place in the catalogue; position - start of C */
    const float *part_attribution;
    bool explained;
} spurion_measured;

/* Chooses rows_max (RESOURCE_EXHAUSTED with what is short) and takes everything that passes of so many rows need. */
spurion_status spurion_engine_memory_take(spurion_engine *e) SPURION_MUST_USE;
/* The most that will be resident, in bytes: the load's own peak, or what is there now and the rollouts in hand. */
size_t spurion_engine_peak_estimate(const spurion_engine *e);
spurion_status spurion_engine_out_of_memory(const char *what) SPURION_MUST_USE;

/* The steps of a measurement of jobs of one pass (rows <= rows_max), in this order: rewards, effects of all sets, and with explain the attributions.
 * ablate: false on a second look at flagged rollouts, whose effects are known. pack and evidence are work of the host alone, and of this measurement
 * alone: they may be done while the device works on the other. launch enqueues the clean pass and waits for nothing; settle waits for it, runs what
 * starts from it (variants, paths), and leaves the device free for the next launch. */
spurion_status spurion_measure_pack(spurion_measurement *k, spurion_job *const *jobs, int job_count, bool explain, bool ablate) SPURION_MUST_USE;
spurion_status spurion_measure_launch(spurion_measurement *k) SPURION_MUST_USE;
spurion_status spurion_measure_settle(spurion_measurement *k) SPURION_MUST_USE;
spurion_status spurion_measure_evidence(spurion_measurement *k) SPURION_MUST_USE;
/* All of them, in e->hand[0]. */
spurion_status spurion_measure(spurion_engine *e, spurion_job *const *jobs, int job_count, bool explain, bool ablate) SPURION_MUST_USE;

/* Enqueues the way of a pass's clean features to k->host: there after the next sync. */
spurion_status spurion_evidence_download(spurion_measurement *k) SPURION_MUST_USE;
/* Active catalogued features of one member; refuses the job when a row overflowed. */
spurion_status spurion_evidence_active(spurion_measurement *k, const spurion_member *m) SPURION_MUST_USE;
/* verdict.saes, features and tokens of one member from k->host; on a second look refuses the job when a row overflowed. */
spurion_status spurion_evidence_fill(spurion_measurement *k, const spurion_member *m) SPURION_MUST_USE;
/* After the rules: verdict.tokens->flagged. */
spurion_status spurion_evidence_finish(const spurion_engine *e, spurion_job *job) SPURION_MUST_USE;

/* Provenance of the engine under a configuration: digits (17 bytes), and their text from malloc. Needs e->weights_digest. */
spurion_status spurion_provenance_make(char digits[17], char **text, const spurion_engine *e, const spurion_config *config) SPURION_MUST_USE;

#endif

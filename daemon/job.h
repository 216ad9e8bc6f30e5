/* A job: one rollout on its way from the wire (or a line of judge's input) to its verdict. One owner at a time; everything it
 * points to lives in its arena and is freed by one reset. */
#ifndef SPURION_JOB_H
#define SPURION_JOB_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/base/arena.h"
#include "spurion/rollout.h"

typedef struct spurion_job {
    spurion_arena arena;
    spurion_rollout rollout;   /* what came in */
    spurion_verdict verdict;   /* what goes out; verdict.code != OK from the moment it is refused */

    /* Made by spurion_sequence_make (daemon/sequence.h): the token sequence that is scored. */
    const int32_t *ids;        /* (token_count) */
    int32_t token_count;
    int32_t completion_start;  /* first position of C with scope completion */
    int32_t leading_count;     /* leading specials */
    int32_t scored;            /* position that the head reads, in the completion; with mean pooling the last */

    /* Set by whoever forms groups: jobs of one group stand together and share this number. */
    int32_t group_number;
    bool group_split;          /* a later part of a group that came before */
    bool want_tokens;          /* fill verdict.tokens */

    /* Made by the engine's measuring step, read by the rules: one per catalogue set (spurion_catalogue.sets). */
    const float *set_effects;  /* Effect(set), 0 where nothing of it is active */
    const float *set_rewards;  /* R_ablated(set), float32; verdict.reward where nothing of it is active. NULL: reward + effect */
    const bool *set_active;    /* some member is active in the clean run */
    /* Active catalogued spurious features, as places in catalogue->entries, ascending. */
    const int32_t *active_entries;
    int32_t active_count;

    void *measured;            /* of the engine, between measuring and finishing */
    void *delivery;            /* of the pipeline: where the verdict goes; unknown to engine and rules */
} spurion_job;

/* bytes_max: budget of the arena, 0: none. reset keeps the arena's first chunk and forgets everything else. */
void spurion_job_init(spurion_job *job, size_t bytes_max);
void spurion_job_reset(spurion_job *job);
void spurion_job_fini(spurion_job *job);

/* Copies the identity of job->rollout into the verdict (borrows the same bytes). */
void spurion_job_identify(spurion_job *job);

/* Refuses the rollout: verdict.code and message; the first refusal stays. */
void spurion_job_refuse(spurion_job *job, const spurion_status *why);

#endif

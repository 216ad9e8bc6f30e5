/* From a rollout's texts or ids to the token sequence that is scored (docs/verdict.md section 2): template, leading specials, boundary,
 * appended EOS, truncation. Thread: any (reads only the tokenizer). */
#ifndef SPURION_SEQUENCE_H
#define SPURION_SEQUENCE_H

#include "daemon/config.h"
#include "daemon/job.h"
#include "daemon/model/config.h"
#include "daemon/model/tokenizer.h"
#include "daemon/template.h"

typedef struct spurion_sequence_rules {
    const spurion_tokenizer *tokenizer;
    const spurion_config *config;
    const spurion_model_config *model;
    int vocab;       /* rows of the embedding: ids must be below */
    int tokens_max;  /* prompt + completion */
    int tail_max;    /* what is no prompt: one pass must hold it */
    const spurion_chat *chat; /* model.template, resolved for the checkpoint */
} spurion_sequence_rules;

/* Fills job->ids, token_count, completion_start, leading_count, verdict.token_count, scored_position, truncated and warnings, or refuses
 * the job: INVALID_ARGUMENT (empty completion, texts mixed with ids, invalid UTF-8, id outside the vocabulary),
 * OUT_OF_RANGE (too long), RESOURCE_EXHAUSTED (no memory). */
void spurion_sequence_make(spurion_job *job, const spurion_sequence_rules *rules);

#endif

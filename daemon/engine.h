/* The engine: model, SAEs, catalogue and tokenizer on one device; judges micro-batches of whole groups.
 * Thread: create, judge and destroy by the engine thread; spurion_engine_prepare by any thread.
 * Memory: one device block per role from the plan, taken in create; host memory of a judgement from the jobs' arenas. */
#ifndef SPURION_ENGINE_H
#define SPURION_ENGINE_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "daemon/catalogue.h"
#include "daemon/config.h"
#include "daemon/job.h"
#include "daemon/model/config.h"
#include "daemon/sequence.h"
#include "spurion/dev.h"

typedef struct spurion_engine spurion_engine;

/* Loads and checks everything (model, SAEs against it, catalogue, rules); config is borrowed and must outlive the engine. */
spurion_status spurion_engine_create(spurion_engine **out, const spurion_config *config) SPURION_MUST_USE;
void spurion_engine_destroy(spurion_engine *e);

/* Checks and tokenises one rollout (spurion_sequence_make). The job carries a refusal afterwards, or is ready to be judged. */
void spurion_engine_prepare(const spurion_engine *e, spurion_job *job);

/* Rows (tokens) that the jobs of one group cost in a micro-batch, shared prompt counted once; at least 1. */
int spurion_engine_rows(const spurion_engine *e, spurion_job *const *jobs, int job_count);
/* Rows that a micro-batch may hold: those of a pass, from engine.tokens_max and the memory plan; of several passes where a device works while the
 * host packs the next pass and makes the evidence of the last. */
int spurion_engine_batch_rows(const spurion_engine *e);

/* Judges jobs (prepared; refused ones are passed over) of whole groups: fills every verdict, rules applied. More rows than a pass
 * holds are judged in several. A device error is INTERNAL: no verdict of this call counts. */
spurion_status spurion_engine_judge(spurion_engine *e, spurion_job *const *jobs, int job_count) SPURION_MUST_USE;

/* Other rules and another catalogue in a running engine, as far as the device need not change: FAILED_PRECONDITION when the catalogued features or
 * the sets to ablate differ. make only reads the engine, and leaves it as it is on every failure; config: the whole configuration with the new rules.
 * apply takes *reload; nobody may judge or hold a verdict meanwhile, and the engine's own configuration must hold the new rules by then. */
typedef struct spurion_engine_reload spurion_engine_reload;
spurion_status spurion_engine_reload_make(spurion_engine_reload **out, const spurion_engine *e, const spurion_config *config) SPURION_MUST_USE;
void spurion_engine_reload_destroy(spurion_engine_reload *reload); /* one that is not applied */
void spurion_engine_reload_apply(spurion_engine *e, spurion_engine_reload *reload);

/* Parts for the other stages to read; owned by the engine. */
const spurion_catalogue *spurion_engine_catalogue(const spurion_engine *e);
const char *spurion_engine_provenance(const spurion_engine *e); /* 16 hex digits */
const char *spurion_engine_provenance_text(const spurion_engine *e); /* JSON: what the digits stand for */
/* What `spuriond check` and Status print: model, SAEs, transforms, plan, peak memory. */
void spurion_engine_describe(const spurion_engine *e, FILE *out);
/* Writes what makes the model doubtful (a head that looks untrained); false when there is nothing. */
bool spurion_engine_doubt(char *out, size_t bytes, const spurion_engine *e);
size_t spurion_engine_peak_bytes(const spurion_engine *e); /* resident size to expect at most */
/* Times and work by op class since profile_start, which begins at nothing: loading does not count. */
void spurion_engine_profile_start(spurion_engine *e);
const spurion_profile *spurion_engine_profile(const spurion_engine *e);

#endif

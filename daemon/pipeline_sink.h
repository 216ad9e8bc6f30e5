/* Private to the sink: how its two files speak to each other. pipeline_sink.c commits what was judged; pipeline_steps.c closes steps and
 * decides on rate alerts. Thread: sink only. */
#ifndef SPURION_PIPELINE_SINK_H
#define SPURION_PIPELINE_SINK_H

#include "daemon/pipeline_internal.h"

/* Pseudo-rule under which (run, step) is closed for alerts that a trainer's reward differs: one for each step. */
#define SPURION_RULE_TRAINER_REWARD "!trainer_reward_differs"

/* Commits, waiting while the store has no space (new work is refused meanwhile). Not OK: the daemon is ending. */
spurion_status spurion_sink_commit(spurion_pipeline *p, spurion_store_batch *batch) SPURION_MUST_USE;
/* Packs an alert for the store or the wire; drops worst rollouts until it fits. */
spurion_status spurion_sink_pack_alert(spurion_bytes *out, spurion_arena *arena, spurion_alert *alert) SPURION_MUST_USE;
/* Publishes the alerts that the commit numbered. */
void spurion_sink_publish(spurion_pipeline *p, spurion_arena *arena, spurion_alert *alerts, const spurion_store_alert *stored, int32_t count);

spurion_status spurion_steps_open(spurion_pipeline *p) SPURION_MUST_USE; /* restores what the store has open */
void spurion_steps_shut(spurion_pipeline *p);
/* A rollout of the step is stored. producer of size 0: none, or its word comes with its mark. */
void spurion_steps_stored(spurion_pipeline *p, spurion_bytes run, spurion_bytes producer, int64_t step);
/* What a producer of the tap has said so far, without holes. */
void spurion_steps_word(spurion_pipeline *p, const spurion_producer *producer, const spurion_word *word);
/* StepEnd over rpc. true: the step is closed now. false: rollouts in flight or other producers are waited for. */
bool spurion_steps_told(spurion_pipeline *p, const spurion_step_end *end);
/* Closes what is due. */
void spurion_steps_close_due(spurion_pipeline *p);
/* When close_due should be called again if nothing happens. */
int64_t spurion_steps_next_ms(const spurion_pipeline *p);

#endif

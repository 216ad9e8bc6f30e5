/* Rules: pure functions from measured effects to flags and advantages (docs/verdict.md section 3). */
#ifndef SPURION_RULES_H
#define SPURION_RULES_H

#include "daemon/catalogue.h"
#include "daemon/config.h"
#include "daemon/job.h"

/* Fills effect_sd, advantages, advantage_flip, families[] and flags[] of the jobs of ONE group (refused ones are passed over) from
 * verdict.reward, counterfactual_reward, effect, set_effects and set_rewards; adds the warnings group_split and
 * trainer_reward_differs. A job whose measured numbers are not finite is refused (INTERNAL) before any mean is taken.
 * Memory from each job's arena; RESOURCE_EXHAUSTED when it has no more. The order of jobs changes no number. */
spurion_status spurion_rules_apply(spurion_job *const *jobs, int job_count, const spurion_config *config,
                                   const spurion_catalogue *catalogue) SPURION_MUST_USE;

#endif

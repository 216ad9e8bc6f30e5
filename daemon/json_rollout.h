/* A line of rollouts.jsonl to a job: the shared reader (spurion/json.h) put into a job. Thread: any. Memory: the job's arena. */
#ifndef SPURION_JSON_ROLLOUT_H
#define SPURION_JSON_ROLLOUT_H

#include "daemon/job.h"
#include "spurion/json.h"

/* Reads line (size bytes, borrowed only for the call) into job, which was just reset. ROLLOUT: job->rollout and the verdict's identity are
 * filled; else the job is refused. *group_known: run, step and group could be read; then job->rollout holds these three in any case. */
spurion_json_line spurion_json_rollout(spurion_job *job, spurion_json_names *names, bool *group_known, const char *line, size_t size);

#endif

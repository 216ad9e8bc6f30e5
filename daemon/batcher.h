/* Collects jobs into micro-batches of whole groups. A group is all rollouts of one (run, step, group); it is whole when as many members
 * came as it says (group_size), when the message that brought it ends and it says nothing, or after group_wait_ms.
 * Thread: add, skip and message_end by the intake only; take by the engine only; drain by any. Memory: groups and the memory of groups
 * that came before are taken in create; jobs belong to the caller until take gives them on. */
#ifndef SPURION_BATCHER_H
#define SPURION_BATCHER_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/job.h"
#include "spurion/status.h"

typedef struct spurion_batcher spurion_batcher;

typedef struct spurion_batcher_options {
    int rows_max;            /* tokens of a micro-batch; a larger group goes alone */
    int batch_wait_ms;       /* how long a first group waits for company */
    int group_wait_ms;       /* how long a group waits for its members */
    /* Rows of a whole group, asked by the engine thread. */
    int (*rows)(void *context, spurion_job *const *jobs, int job_count);
    /* Whether rollouts of this group were judged before this process remembers, asked by the intake thread when a group begins. */
    bool (*came_before)(void *context, const spurion_rollout *rollout);
    void *context;
} spurion_batcher_options;

spurion_status spurion_batcher_create(spurion_batcher **out, const spurion_batcher_options *options) SPURION_MUST_USE;
/* Takes NULL. Jobs still inside are not freed: they are the caller's. */
void spurion_batcher_destroy(spurion_batcher *b);

/* Takes a prepared job into its group. RESOURCE_EXHAUSTED: as many groups are open as fit; the job stays the caller's. */
spurion_status spurion_batcher_add(spurion_batcher *b, spurion_job *job) SPURION_MUST_USE;
/* A member of the group came that needs no judging (refused, or answered from the store): it counts for group_size. */
void spurion_batcher_skip(spurion_batcher *b, const spurion_rollout *rollout);
/* The message whose rollouts were added last has ended. */
void spurion_batcher_message_end(spurion_batcher *b);

/* Waits for a whole group, then up to batch_wait_ms for a full micro-batch. jobs borrows the caller's array of job_max slots
 * (>= SPURION_BATCH_ROLLOUTS_MAX); gives the first *job_count jobs, groups standing together, group_number and group_split set.
 * OK with 1 <= *job_count <= job_max; CANCELLED when draining and empty. Blocks; never called from a callback. */
spurion_status spurion_batcher_take(spurion_job **jobs, int *job_count, spurion_batcher *b, int job_max) SPURION_MUST_USE;

/* Nothing waits any longer: open groups are whole as they are; take ends when all are given. */
void spurion_batcher_drain(spurion_batcher *b);
/* A turn of the intake with nothing to do ends too when drained: jobs inside now. */
int64_t spurion_batcher_job_count(spurion_batcher *b);

#endif

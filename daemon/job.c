/* A job's life and its refusal; see job.h. Memory: the job's own arena. */
#include "daemon/job.h"

#include <string.h>

void spurion_job_init(spurion_job *job, size_t bytes_max)
{
    memset(job, 0, sizeof *job);
    spurion_arena_init(&job->arena, bytes_max);
}

void spurion_job_reset(spurion_job *job)
{
    spurion_arena arena = job->arena;

    spurion_arena_reset(&arena);
    memset(job, 0, sizeof *job);
    job->arena = arena;
}

void spurion_job_fini(spurion_job *job)
{
    if (job) {
        spurion_arena_fini(&job->arena);
    }
}

void spurion_job_identify(spurion_job *job)
{
    spurion_verdict *v = &job->verdict;

    v->run = job->rollout.run;
    v->group = job->rollout.group;
    v->id = job->rollout.id;
    v->has_step = true;
    v->step = job->rollout.step;
    v->attempt = job->rollout.attempt;
}

void spurion_job_refuse(spurion_job *job, const spurion_status *why)
{
    size_t size = strlen(why->message);
    const char *text;

    if (job->verdict.code != SPURION_OK) {
        return;
    }
    text = spurion_arena_copy(&job->arena, why->message, size);
    if (!text) { /* the arena is spent: the code still stands, with words that need no memory */
        text = "memory of the rollout's budget is spent";
        size = strlen(text);
    }
    job->verdict.code = why->code;
    job->verdict.message.data = text;
    job->verdict.message.size = size;
}

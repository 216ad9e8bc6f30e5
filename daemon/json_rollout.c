/* One line to one job; see json_rollout.h. */
#include "daemon/json_rollout.h"

static void *take(void *arena, size_t bytes)
{
    return spurion_arena_take(arena, bytes);
}

spurion_json_line spurion_json_rollout(spurion_job *job, spurion_json_names *names, bool *group_known, const char *line, size_t size)
{
    spurion_memory m = {take, &job->arena};
    spurion_json_read read;
    spurion_json_line kind = spurion_json_read_rollout(&job->rollout, &read, &m, NULL, line, size);

    *names = read.names;
    *group_known = read.group_known;
    if (read.named) {
        spurion_job_identify(job);
    }
    if (kind != SPURION_LINE_ROLLOUT) {
        spurion_job_refuse(job, &read.why);
    }
    return kind;
}

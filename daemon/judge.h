/* `spuriond judge`: rollouts on one descriptor, verdicts on another, one line for each line in its order (docs/verdict.md).
 * Thread: the caller's. Memory: the rollouts of one micro-batch and of the group that is still open, and the identities seen. */
#ifndef SPURION_JUDGE_H
#define SPURION_JUDGE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "daemon/engine.h"
#include "spurion/status.h"

typedef struct spurion_judge_totals {
    int64_t lines, judged, refused;
    int64_t tokens;                    /* of the judged rollouts */
    double prepare_seconds, engine_seconds;
} spurion_judge_totals;

/* Reads rollouts from the descriptor until it ends and writes verdicts to out, flushed whenever input would have to be waited for.
 * tokens: with the per-token view. The error of the engine (INTERNAL and others) or of reading and writing (UNAVAILABLE) ends it; rollouts in hand then
 * leave with that error. *totals counts what was written.
 * each: NULL, or where a line of spurion_judge_profile goes after each micro-batch, before its verdicts. */
spurion_status spurion_judge_run(spurion_judge_totals *totals, spurion_engine *engine, int in, FILE *out, bool tokens, FILE *each) SPURION_MUST_USE;

/* One JSON object on one line: times, counts, and seconds, FLOPs and bytes per class of operation. */
void spurion_judge_profile(FILE *out, const spurion_judge_totals *totals, const spurion_engine *engine, double load_seconds);

#endif

/* Packs the token sequences of whole groups into the rows of one pass: completion rows of all members first, then what the members of a
 * group have in common (once), then the rest of each member's prompt. Also packs variants: tails run again from a block upward.
 * Thread: the engine's. Memory: the caller's arena. */
#ifndef SPURION_PACK_H
#define SPURION_PACK_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/base/arena.h"
#include "daemon/job.h"
#include "spurion/ops.h"

/* One sequence. Positions: [0, root_count) shared, [root_count, start) its own prompt, [start, count) its completion C. */
typedef struct spurion_member {
    spurion_job *job;
    int32_t count, start;
    int32_t root_row, root_count, prompt_row;
    int32_t row;       /* first completion row */
    int32_t scored;    /* position whose hidden state the head reads; with mean pooling the last */
} spurion_member;

typedef struct spurion_packed {
    spurion_member *members;
    int member_count;
    int rows, completion_rows;
    int root_row, root_count;  /* -1; else the shared prompt takes no rows: these first ids of the jobs have their keys from row root_row on */
    int32_t *ids, *positions;              /* (rows) */
    int32_t *scored, *scored_positions;    /* (member_count): rows */
    spurion_seq *seqs, *scored_seqs;
    spurion_seq *backward_seqs, *scored_backward_seqs; /* (member_count) */
    int seq_count;
} spurion_packed;

/* First position of C: the completion's start, or with scope all what follows the leading specials. */
int32_t spurion_pack_start(const spurion_job *job, bool scope_all);
/* Rows that jobs of one group cost; _tails: without what they share. */
int spurion_pack_rows(spurion_job *const *jobs, int job_count, bool scope_all);
int spurion_pack_tail_rows(spurion_job *const *jobs, int job_count, bool scope_all);

/* Packs jobs; those of one group (equal group_number) stand together. scope_all: C is everything but the leading specials, nothing is shared.
 * root_row: -1, or the jobs are of one group and what they share takes no rows of the pass: its keys stand from row root_row on. */
spurion_status spurion_pack_jobs(spurion_packed *out, spurion_arena *arena, spurion_job *const *jobs, int job_count, bool scope_all,
                                 int root_row) SPURION_MUST_USE;

/* A tail of member `member` from position `from` (>= its start) to its end, changed at the hooks: by removing set `set`, or by the
 * path of integrated gradients at `fraction`. */
typedef struct spurion_variant {
    int32_t member, from;
    int32_t block;    /* at whose input it starts: nothing below it changes */
    int32_t set;      /* -1: none */
    float fraction;
} spurion_variant;

typedef struct spurion_packed_variants {
    int rows;
    int32_t *positions, *source;  /* (rows): source = completion row of the clean pass */
    int32_t *row_set;             /* (rows) */
    float *row_fraction;          /* (rows) */
    int32_t *scored, *scored_positions; /* (count) */
    spurion_seq *seqs, *scored_seqs, *backward_seqs, *scored_backward_seqs; /* (count) */
    int count;
} spurion_packed_variants;

/* kv_row: first key/value row of the variants. */
spurion_status spurion_pack_variants(spurion_packed_variants *out, spurion_arena *arena, const spurion_packed *clean,
                                     const spurion_variant *variants, int count, int kv_row) SPURION_MUST_USE;

#endif

/* Packs sequences and variants into rows; see pack.h. */
#include "daemon/pack.h"

#include <string.h>

#include "daemon/base/check.h"

int32_t spurion_pack_start(const spurion_job *job, bool scope_all)
{
    return scope_all ? job->leading_count : job->completion_start;
}

/* What all members have in common before their completions. */
static int32_t common_prefix(spurion_job *const *jobs, int count, bool scope_all)
{
    int32_t n;

    if (scope_all) {
        return 0;
    }
    n = spurion_pack_start(jobs[0], false);
    for (int i = 1; i < count; i++) {
        int32_t limit = spurion_pack_start(jobs[i], false), k = 0;
        limit = limit < n ? limit : n;
        while (k < limit && jobs[i]->ids[k] == jobs[0]->ids[k]) {
            k++;
        }
        n = k;
    }
    return n;
}

static int tail_rows(spurion_job *const *jobs, int job_count, int32_t root)
{
    int rows = 0;
    for (int i = 0; i < job_count; i++) {
        rows += jobs[i]->token_count - root;
    }
    return rows;
}

int spurion_pack_rows(spurion_job *const *jobs, int job_count, bool scope_all)
{
    int32_t root = job_count ? common_prefix(jobs, job_count, scope_all) : 0;
    int rows = root + tail_rows(jobs, job_count, root);
    return rows > 0 ? rows : 1;
}

int spurion_pack_tail_rows(spurion_job *const *jobs, int job_count, bool scope_all)
{
    return job_count ? tail_rows(jobs, job_count, common_prefix(jobs, job_count, scope_all)) : 0;
}

/* Appends a piece of keys; an empty one is left out. */
static void piece_add(spurion_seq *s, int32_t row, int32_t position, int32_t count)
{
    if (count > 0) {
        SPURION_ASSERT(s->piece_count < SPURION_PIECES_MAX);
        s->piece_row[s->piece_count] = row;
        s->piece_position[s->piece_count] = position;
        s->piece_count++;
    }
}

static spurion_seq seq_make(int32_t q_row, int32_t q_count, int32_t q_position)
{
    spurion_seq s = {.q_row = q_row, .q_count = q_count, .q_position = q_position};
    return s;
}

/* Keys of a member's prompt: shared part, own part. */
static void prompt_pieces(spurion_seq *s, const spurion_member *m)
{
    piece_add(s, m->root_row, 0, m->root_count);
    piece_add(s, m->prompt_row, m->root_count, m->start - m->root_count);
}

static void rows_fill(spurion_packed *p, const spurion_job *job, int32_t row, int32_t from, int32_t count)
{
    for (int32_t i = 0; i < count; i++) {
        p->ids[row + i] = job->ids[from + i];
        p->positions[row + i] = from + i;
    }
}

/* Places prompt rows of one group from *row on; what it shares takes none where its keys stand elsewhere. */
static void group_place(spurion_packed *p, spurion_member *members, int count, bool scope_all, spurion_job *const *jobs, int32_t *row)
{
    int32_t root_count = common_prefix(jobs, count, scope_all), root_row = p->root_row >= 0 ? p->root_row : *row;

    if (p->root_row >= 0) {
        p->root_count = root_count;
    } else if (root_count) {
        rows_fill(p, jobs[0], root_row, 0, root_count);
        p->seqs[p->seq_count] = seq_make(root_row, root_count, 0);
        piece_add(&p->seqs[p->seq_count++], root_row, 0, root_count);
        *row += root_count;
    }
    for (int i = 0; i < count; i++) {
        spurion_member *m = &members[i];
        int32_t own = m->start - root_count;
        m->root_row = root_row;
        m->root_count = root_count;
        m->prompt_row = *row;
        if (own > 0) {
            spurion_seq s = seq_make(*row, own, root_count);
            prompt_pieces(&s, m);
            rows_fill(p, m->job, *row, root_count, own);
            p->seqs[p->seq_count++] = s;
            *row += own;
        }
    }
}

/* Queries of a member's completion, as a whole and for its scored row alone. */
static void completion_seqs(spurion_packed *p, int i)
{
    const spurion_member *m = &p->members[i];
    int32_t n = m->count - m->start;
    spurion_seq whole = seq_make(m->row, n, m->start), scored = seq_make(i, 1, m->scored);

    prompt_pieces(&whole, m);
    prompt_pieces(&scored, m);
    piece_add(&whole, m->row, m->start, n);
    piece_add(&scored, m->row, m->start, n);
    whole.dkv_row = scored.dkv_row = m->row;
    whole.dkv_position = scored.dkv_position = m->start;
    p->seqs[p->seq_count++] = whole;
    p->backward_seqs[i] = whole;
    p->scored_seqs[i] = scored;
    p->scored_backward_seqs[i] = scored;
    p->scored[i] = m->row + m->scored - m->start;
    p->scored_positions[i] = m->scored;
}

static spurion_status packed_take(spurion_packed *p, spurion_arena *arena, int rows, int count)
{
    size_t n = (size_t)rows, c = (size_t)count;
    p->members = spurion_arena_take_array(arena, c, sizeof *p->members);
    p->ids = spurion_arena_take_array(arena, n, sizeof(int32_t));
    p->positions = spurion_arena_take_array(arena, n, sizeof(int32_t));
    p->scored = spurion_arena_take_array(arena, c, sizeof(int32_t));
    p->scored_positions = spurion_arena_take_array(arena, c, sizeof(int32_t));
    p->seqs = spurion_arena_take_array(arena, 3 * c, sizeof(spurion_seq));
    p->scored_seqs = spurion_arena_take_array(arena, c, sizeof(spurion_seq));
    p->backward_seqs = spurion_arena_take_array(arena, c, sizeof(spurion_seq));
    p->scored_backward_seqs = spurion_arena_take_array(arena, c, sizeof(spurion_seq));
    if (!p->members || !p->ids || !p->positions || !p->scored || !p->scored_positions || !p->seqs || !p->scored_seqs || !p->backward_seqs ||
        !p->scored_backward_seqs) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory to pack %d tokens", rows);
    }
    return spurion_ok();
}

spurion_status spurion_pack_jobs(spurion_packed *out, spurion_arena *arena, spurion_job *const *jobs, int job_count, bool scope_all,
                                 int root_row)
{
    spurion_status st;
    int upper = 0;
    int32_t row = 0;

    memset(out, 0, sizeof *out);
    out->root_row = root_row;
    for (int i = 0; i < job_count; i++) {
        upper += jobs[i]->token_count;
    }
    SPURION_TRY(st, packed_take(out, arena, upper, job_count));
    out->member_count = job_count;
    for (int i = 0; i < job_count; i++) {
        spurion_member *m = &out->members[i];
        m->job = jobs[i];
        m->count = jobs[i]->token_count;
        m->start = spurion_pack_start(jobs[i], scope_all);
        m->scored = jobs[i]->scored;
        SPURION_ASSERT(m->start <= m->scored && m->scored < m->count);
        m->row = row;
        rows_fill(out, m->job, row, m->start, m->count - m->start);
        row += m->count - m->start;
    }
    out->completion_rows = row;
    for (int i = 0, n; i < job_count; i += n) {
        for (n = 1; i + n < job_count && jobs[i + n]->group_number == jobs[i]->group_number; n++) {
        }
        group_place(out, &out->members[i], n, scope_all, &jobs[i], &row);
    }
    out->rows = row;
    for (int i = 0; i < job_count; i++) {
        completion_seqs(out, i);
    }
out:
    return st;
}

static spurion_status variants_take(spurion_packed_variants *v, spurion_arena *arena, int rows, int count)
{
    size_t n = (size_t)rows, c = (size_t)count;
    v->positions = spurion_arena_take_array(arena, n, sizeof(int32_t));
    v->source = spurion_arena_take_array(arena, n, sizeof(int32_t));
    v->row_set = spurion_arena_take_array(arena, n, sizeof(int32_t));
    v->row_fraction = spurion_arena_take_array(arena, n, sizeof(float));
    v->scored = spurion_arena_take_array(arena, c, sizeof(int32_t));
    v->scored_positions = spurion_arena_take_array(arena, c, sizeof(int32_t));
    v->seqs = spurion_arena_take_array(arena, c, sizeof(spurion_seq));
    v->scored_seqs = spurion_arena_take_array(arena, c, sizeof(spurion_seq));
    v->backward_seqs = spurion_arena_take_array(arena, c, sizeof(spurion_seq));
    v->scored_backward_seqs = spurion_arena_take_array(arena, c, sizeof(spurion_seq));
    if (!v->positions || !v->source || !v->row_set || !v->row_fraction || !v->scored || !v->scored_positions || !v->seqs || !v->scored_seqs ||
        !v->backward_seqs || !v->scored_backward_seqs) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory to pack %d rows of variants", rows);
    }
    return spurion_ok();
}

/* Keys of a variant: its prompt, its clean completion up to `from`, its own rows. */
static void variant_pieces(spurion_seq *s, const spurion_member *m, int32_t from, int32_t kv_row, int32_t row)
{
    prompt_pieces(s, m);
    piece_add(s, m->row, m->start, from - m->start);
    piece_add(s, kv_row + row, from, m->count - from);
    s->dkv_row = row;
    s->dkv_position = from;
}

spurion_status spurion_pack_variants(spurion_packed_variants *out, spurion_arena *arena, const spurion_packed *clean,
                                     const spurion_variant *variants, int count, int kv_row)
{
    spurion_status st;
    int rows = 0;
    int32_t row = 0;

    memset(out, 0, sizeof *out);
    for (int i = 0; i < count; i++) {
        rows += clean->members[variants[i].member].count - variants[i].from;
    }
    SPURION_TRY(st, variants_take(out, arena, rows, count));
    out->rows = rows;
    out->count = count;
    for (int i = 0; i < count; i++) {
        const spurion_member *m = &clean->members[variants[i].member];
        int32_t from = variants[i].from, n = m->count - from;
        spurion_seq whole = seq_make(row, n, from), scored = seq_make(i, 1, m->scored);

        variant_pieces(&whole, m, from, kv_row, row);
        variant_pieces(&scored, m, from, kv_row, row);
        out->seqs[i] = out->backward_seqs[i] = whole;
        out->scored_seqs[i] = out->scored_backward_seqs[i] = scored;
        SPURION_ASSERT(from <= m->scored); /* what comes later changes nothing, and is not run */
        out->scored[i] = row + m->scored - from;
        out->scored_positions[i] = m->scored;
        for (int32_t t = 0; t < n; t++) {
            out->positions[row + t] = from + t;
            out->source[row + t] = m->row + from - m->start + t;
            out->row_set[row + t] = variants[i].set;
            out->row_fraction[row + t] = variants[i].fraction;
        }
        row += n;
    }
out:
    return st;
}

/* Groups, micro-batches and the order of output; see judge.h. A line's way: read, parsed, prepared (sequence), kept in its part of a
 * group; a part is complete when a line of another group comes, and is then judged with others up to a micro-batch's rows. */
#include "daemon/judge.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/clock.h"
#include "daemon/json_rollout.h"
#include "daemon/line_reader.h"
#include "daemon/name_set.h"
#include "spurion/limits.h"

#define JOB_BYTES_MAX ((size_t)256 << 20)
#define PENDING_JOBS_MAX 4096
#define KEY_BYTES_MAX ((size_t)SPURION_LINE_BYTES_MAX + 64)

/* One input line on its way to its output line: a job that waits for its verdict, or the text that will be written. */
typedef struct record {
    struct record *next;
    spurion_job *job;     /* NULL: text is ready */
    spurion_text text;
    int64_t part;         /* part of a group that the line belongs to; 0: none */
} record;

typedef struct job_slot {
    spurion_job job;      /* first, so that a job is its slot */
    struct job_slot *next;
} job_slot;

typedef struct judge {
    spurion_engine *engine;
    spurion_judge_totals *totals;
    FILE *out, *each;
    bool tokens;
    record *head, *tail;
    job_slot *free_jobs;
    spurion_name_set identities, groups;
    spurion_text key;       /* of the open group; empty: none is open */
    int64_t part, open_part; /* parts so far; the open one, 0: none */
    bool split;             /* the open part is a later one of its group */
    spurion_job **open;     /* (SPURION_GROUP_SIZE_MAX) members of the open part that are to be judged */
    int open_count;
    spurion_job **pending;  /* (PENDING_JOBS_MAX + SPURION_GROUP_SIZE_MAX) members of complete parts */
    int pending_count;
    int64_t pending_rows;
} judge;

static spurion_status no_memory(void)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected memory for the input, found none");
}

static spurion_job *take_job(judge *j)
{
    job_slot *slot = j->free_jobs;

    if (slot) {
        j->free_jobs = slot->next;
        return &slot->job;
    }
    slot = calloc(1, sizeof *slot);
    if (slot) {
        spurion_job_init(&slot->job, JOB_BYTES_MAX);
    }
    return slot ? &slot->job : NULL;
}

static void give_job(judge *j, spurion_job *job)
{
    job_slot *slot = (job_slot *)job;

    spurion_job_reset(job);
    slot->next = j->free_jobs;
    j->free_jobs = slot;
}

/* Makes the record's line from its job, and lets the job go. */
static void settle(judge *j, record *r, const spurion_json_names *names)
{
    const spurion_verdict *v = &r->job->verdict;

    spurion_json_verdict(&r->text, v, names);
    spurion_text_add(&r->text, "\n", 1);
    if (v->code == SPURION_OK) {
        j->totals->judged++;
        j->totals->tokens += v->token_count;
    } else {
        j->totals->refused++;
    }
    give_job(j, r->job);
    r->job = NULL;
}

static void free_record(record *r)
{
    spurion_text_fini(&r->text);
    free(r);
}

/* Writes every line before the open part's first. */
static spurion_status write_ready(judge *j)
{
    while (j->head && !(j->open_part && j->head->part == j->open_part)) {
        record *r = j->head;
        bool failed;

        if (r->job) {
            settle(j, r, NULL);
        }
        failed = r->text.failed;
        if (!failed && fwrite(r->text.data, 1, r->text.size, j->out) != r->text.size) {
            return spurion_error(SPURION_UNAVAILABLE, "expected to write a verdict, found: %s", strerror(errno));
        }
        j->head = r->next;
        j->tail = j->head ? j->tail : NULL;
        free_record(r);
        if (failed) {
            return no_memory();
        }
    }
    return fflush(j->out) == 0 ? spurion_ok()
                               : spurion_error(SPURION_UNAVAILABLE, "expected to write verdicts, found: %s", strerror(errno));
}

/* Judges the members of complete parts, and writes what is ready. */
static spurion_status judge_pending(judge *j)
{
    int64_t start = spurion_clock_ns();
    spurion_status st = spurion_ok(), written;

    if (j->pending_count) {
        st = spurion_engine_judge(j->engine, j->pending, j->pending_count);
        j->totals->engine_seconds += (double)(spurion_clock_ns() - start) * 1e-9;
        if (j->each) {
            spurion_judge_profile(j->each, j->totals, j->engine, 0);
        }
    }
    for (int i = 0; i < j->pending_count && st.code != SPURION_OK; i++) {
        spurion_job_refuse(j->pending[i], &st);
    }
    j->pending_count = 0;
    j->pending_rows = 0;
    written = write_ready(j);
    return st.code != SPURION_OK ? st : written;
}

/* The open part is complete: it joins the pending ones. */
static spurion_status close_part(judge *j)
{
    spurion_status st = spurion_ok();
    int rows = j->open_count ? spurion_engine_rows(j->engine, j->open, j->open_count) : 0;

    /* While the part is still called open its lines wait, and the earlier ones are written. */
    if (j->pending_count && (j->pending_rows + rows > spurion_engine_batch_rows(j->engine) || j->pending_count >= PENDING_JOBS_MAX)) {
        st = judge_pending(j);
    }
    j->open_part = 0;
    j->key.size = 0;
    if (j->open_count == 0) {
        return st;
    }
    memcpy(j->pending + j->pending_count, j->open, (size_t)j->open_count * sizeof *j->open);
    j->pending_count += j->open_count;
    j->pending_rows += rows;
    j->open_count = 0;
    if (st.code == SPURION_OK && j->pending_rows >= spurion_engine_batch_rows(j->engine)) {
        st = judge_pending(j);
    }
    return st;
}

static void put_key(spurion_text *t, spurion_bytes name)
{
    spurion_text_add(t, (const char *)&name.size, sizeof name.size);
    spurion_text_add(t, name.data, name.size);
}

/* run, step, group, unambiguous whatever bytes the names hold. */
static spurion_status group_key(spurion_text *t, const spurion_rollout *r)
{
    put_key(t, r->run);
    put_key(t, r->group);
    spurion_text_add(t, (const char *)&r->step, sizeof r->step);
    return t->failed ? no_memory() : spurion_ok();
}

/* Goes on with the open part, or ends it and opens another. known: the line names its group. */
static spurion_status enter_group(judge *j, const spurion_rollout *r, bool known)
{
    spurion_text key = {NULL, 0, 0, false};
    spurion_status st = spurion_ok();

    if (known) {
        SPURION_TRY(st, group_key(&key, r));
        if (j->open_part && key.size == j->key.size && !memcmp(key.data, j->key.data, key.size)) {
            goto out;
        }
    }
    SPURION_TRY(st, close_part(j));
    if (known) {
        j->open_part = ++j->part;
        j->split = spurion_name_set_has(&j->groups, key.data, key.size);
        spurion_text_add(&j->key, key.data, key.size);
        if (!spurion_name_set_add(&j->groups, key.data, key.size) || j->key.failed) {
            st = no_memory();
        }
    }
out:
    spurion_text_fini(&key);
    return st;
}

/* Refuses a second rollout of one identity. A rollout whose content is at fault keeps that answer; one that is only too long does not
 * hide that it came twice. */
static spurion_status check_identity(judge *j, spurion_job *job)
{
    const spurion_rollout *r = &job->rollout;
    spurion_text key = {NULL, 0, 0, false};
    spurion_status st;

    SPURION_TRY(st, group_key(&key, r));
    put_key(&key, r->id);
    spurion_text_add(&key, (const char *)&r->attempt, sizeof r->attempt);
    if (key.failed) {
        st = no_memory();
        goto out;
    }
    if (spurion_name_set_has(&j->identities, key.data, key.size)) {
        spurion_status again = spurion_error(SPURION_ALREADY_EXISTS, "expected a new rollout, found %s/%lld/%s/%s attempt %d a second time",
                                             r->run.data, (long long)r->step, r->group.data, r->id.data, r->attempt);
        job->verdict.code = SPURION_OK; /* stands before a length that does not fit */
        spurion_job_refuse(job, &again);
    } else if (job->verdict.code == SPURION_OK && !spurion_name_set_add(&j->identities, key.data, key.size)) {
        st = no_memory();
    }
out:
    spurion_text_fini(&key);
    return st;
}

/* A rollout that could be read: sequence, identity, place in the open part. */
static spurion_status admit(judge *j, spurion_job *job)
{
    int64_t start = spurion_clock_ns();
    spurion_status st = spurion_ok(), full;

    job->group_number = (int32_t)j->open_part;
    job->group_split = j->split;
    job->want_tokens = j->tokens;
    spurion_engine_prepare(j->engine, job);
    j->totals->prepare_seconds += (double)(spurion_clock_ns() - start) * 1e-9;
    if (j->open_count == SPURION_GROUP_SIZE_MAX && job->verdict.code == SPURION_OK) {
        full = spurion_error(SPURION_OUT_OF_RANGE, "expected at most %d rollouts in a group, found more", SPURION_GROUP_SIZE_MAX);
        spurion_job_refuse(job, &full);
    }
    if (job->verdict.code == SPURION_OK || job->verdict.code == SPURION_OUT_OF_RANGE) {
        st = check_identity(j, job);
    }
    if (st.code == SPURION_OK && job->verdict.code == SPURION_OK) {
        j->open[j->open_count++] = job;
    }
    return st;
}

static spurion_status take_line(judge *j, spurion_line line)
{
    record *r = calloc(1, sizeof *r);
    spurion_job *job = r ? take_job(j) : NULL;
    spurion_json_names names = {{NULL, 0}, {NULL, 0}, {NULL, 0}, {NULL, 0}};
    spurion_json_line kind = SPURION_LINE_NO_OBJECT;
    bool known = false;
    spurion_status st = spurion_ok(), refusal;

    if (!job) {
        free(r);
        return no_memory();
    }
    r->job = job;
    j->totals->lines++;
    if (line.too_long) {
        refusal = spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected a line of at most %u bytes, found a longer one", SPURION_LINE_BYTES_MAX);
        spurion_job_refuse(job, &refusal);
    } else {
        kind = spurion_json_rollout(job, &names, &known, line.data, line.size);
    }
    if (kind == SPURION_LINE_NO_OBJECT) {
        job->verdict.line = j->totals->lines;
    } else {
        st = enter_group(j, &job->rollout, known);
    }
    if (st.code == SPURION_OK && kind == SPURION_LINE_ROLLOUT) {
        st = admit(j, job);
    }
    if (st.code != SPURION_OK) {
        spurion_job_refuse(job, &st);
    }
    r->part = kind == SPURION_LINE_NO_OBJECT ? 0 : j->open_part;
    if (job->verdict.code != SPURION_OK) {
        settle(j, r, &names);
    }
    *(j->tail ? &j->tail->next : &j->head) = r;
    j->tail = r;
    return st;
}

static spurion_status read_all(judge *j, int in)
{
    spurion_line_reader reader;
    spurion_line line = {"", 0, false, false};
    spurion_status st = spurion_ok(), last;

    spurion_line_reader_init(&reader, in);
    while (st.code == SPURION_OK && !line.none) {
        if (spurion_line_would_wait(&reader)) {
            SPURION_TRY(st, judge_pending(j));
        }
        SPURION_TRY(st, spurion_line_next(&line, &reader));
        if (!line.none) {
            SPURION_TRY(st, take_line(j, line));
        }
    }
out:
    if (st.code == SPURION_OK) {
        st = close_part(j);
        last = judge_pending(j);
        st = st.code != SPURION_OK ? st : last;
    } else { /* what is in hand leaves with the error; a failure to write is already told */
        for (record *r = j->head; r; r = r->next) {
            if (r->job) {
                spurion_job_refuse(r->job, &st);
            }
        }
        j->open_part = 0;
        last = write_ready(j);
        (void)last;
    }
    spurion_line_reader_fini(&reader);
    return st;
}

static void judge_fini(judge *j)
{
    while (j->head) {
        record *r = j->head;
        j->head = r->next;
        if (r->job) {
            give_job(j, r->job);
        }
        free_record(r);
    }
    while (j->free_jobs) {
        job_slot *slot = j->free_jobs;
        j->free_jobs = slot->next;
        spurion_job_fini(&slot->job);
        free(slot);
    }
    spurion_name_set_fini(&j->identities);
    spurion_name_set_fini(&j->groups);
    spurion_text_fini(&j->key);
    free(j->open);
    free(j->pending);
}

spurion_status spurion_judge_run(spurion_judge_totals *totals, spurion_engine *engine, int in, FILE *out, bool tokens, FILE *each)
{
    judge j = {.engine = engine, .totals = totals, .out = out, .each = each, .tokens = tokens};
    spurion_status st;

    memset(totals, 0, sizeof *totals);
    j.open = calloc(SPURION_GROUP_SIZE_MAX, sizeof *j.open);
    j.pending = calloc(PENDING_JOBS_MAX + SPURION_GROUP_SIZE_MAX, sizeof *j.pending);
    st = j.open && j.pending ? read_all(&j, in) : no_memory();
    judge_fini(&j);
    return st;
}

void spurion_judge_profile(FILE *out, const spurion_judge_totals *t, const spurion_engine *engine, double load_seconds)
{
    static const char *const names[SPURION_CLASS_COUNT] = {"gemm",       "attention",  "norm",       "rope",
                                                           "activation", "sae_encode", "sae_sparse", "move"};
    const spurion_profile *p = spurion_engine_profile(engine);

    (void)fprintf(out, "{\"load_s\":%.6f,\"prepare_s\":%.6f,\"engine_s\":%.6f,\"rollouts\":%lld,\"refused\":%lld,\"tokens\":%lld,\"ops\":{",
                  load_seconds, t->prepare_seconds, t->engine_seconds, (long long)t->judged, (long long)t->refused, (long long)t->tokens);
    for (int c = 0; c < SPURION_CLASS_COUNT; c++) {
        (void)fprintf(out, "%s\"%s\":{\"calls\":%lld,\"seconds\":%.6f,\"flops\":%.0f,\"bytes\":%.0f}", c ? "," : "", names[c],
                      (long long)p->calls[c], p->seconds[c], p->flops[c], p->bytes[c]);
    }
    (void)fprintf(out, "}}\n");
}

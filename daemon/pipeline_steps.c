/* Closing of steps and rate alerts; see pipeline_sink.h. Decisions are alert.h's, counts and the promise "once" are the store's.
 * Memory: one object for each run with traffic, the least recently used ones without open steps go first. */
#include "daemon/pipeline_sink.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/alert.h"
#include "daemon/base/clock.h"
#include "daemon/base/log.h"

#define RUNS_MAX 256
#define OPEN_STEPS_MAX 65536
#define MARKS_MAX 4096
#define ENDS_MAX 256           /* StepEnd calls that wait for rollouts in flight */
#define NAMES_MAX 64           /* producers of a run that a StepEnd without a name speaks for */

/* Stands for callers that name no producer. Control characters are in no name, so nobody is called that. */
static const spurion_bytes anonymous = {"\x01", 1};

typedef struct name {
    char data[SPURION_NAME_BYTES_MAX];
    size_t size;
} name;

typedef struct run {
    struct run *next;
    name name;
    spurion_steps *steps;
    int64_t used_ms;
    name producers[NAMES_MAX];
    int32_t producer_count;
} run;

typedef struct waiting_end {
    name run, producer;
    int64_t step;
} waiting_end;

typedef struct spurion_step_runs {
    run *first;
    int32_t count;
    waiting_end ends[ENDS_MAX];
    int32_t end_count;
    int64_t timeout_ms;        /* a step without news for so long is closed */
    spurion_arena arena;
} spurion_step_runs;

static spurion_bytes bytes_of(const name *n)
{
    spurion_bytes b = {n->data, n->size};
    return b;
}

static void name_set(name *out, spurion_bytes in)
{
    out->size = in.size < sizeof out->data ? in.size : sizeof out->data;
    if (out->size > 0) {
        memcpy(out->data, in.data, out->size);
    }
}

static bool name_is(const name *n, spurion_bytes b)
{
    return n->size == b.size && memcmp(n->data, b.data, b.size) == 0;
}

/* ---- runs ---- */

static void evict(spurion_step_runs *r)
{
    run **oldest = NULL, *gone;

    for (run **at = &r->first; *at != NULL; at = &(*at)->next) {
        if (spurion_steps_open_count((*at)->steps) == 0 && (oldest == NULL || (*at)->used_ms < (*oldest)->used_ms)) {
            oldest = at;
        }
    }
    if (oldest != NULL) {
        gone = *oldest;
        *oldest = gone->next;
        spurion_steps_destroy(gone->steps);
        free(gone);
        r->count--;
    }
}

/* The run, new or known; NULL without memory: its steps then stay open in the store until the next start. */
static run *find_run(spurion_step_runs *r, spurion_bytes who)
{
    run *u;

    for (u = r->first; u != NULL; u = u->next) {
        if (name_is(&u->name, who)) {
            u->used_ms = spurion_clock_ms();
            return u;
        }
    }
    if (r->count >= RUNS_MAX) {
        evict(r);
    }
    u = calloc(1, sizeof *u);
    if (u == NULL || spurion_steps_create(&u->steps, r->timeout_ms).code != SPURION_OK) {
        spurion_log_error("STEPS-MEMORY", "no memory for the steps of a run");
        free(u);
        return NULL;
    }
    name_set(&u->name, who);
    u->used_ms = spurion_clock_ms();
    u->next = r->first;
    r->first = u;
    r->count++;
    return u;
}

static void know_producer(run *u, spurion_bytes who)
{
    for (int32_t i = 0; i < u->producer_count; i++) {
        if (name_is(&u->producers[i], who)) {
            return;
        }
    }
    if (u->producer_count < NAMES_MAX) {
        name_set(&u->producers[u->producer_count++], who);
    }
}

static void forget_producer(run *u, spurion_bytes who)
{
    spurion_steps_forget(u->steps, who);
    for (int32_t i = 0; i < u->producer_count; i++) {
        if (name_is(&u->producers[i], who)) {
            u->producers[i] = u->producers[--u->producer_count];
            return;
        }
    }
}

static void restore_marks(spurion_pipeline *p, run *u)
{
    spurion_store_mark *marks;
    int32_t count;

    if (spurion_store_marks(&marks, &count, &p->runs->arena, p->store, bytes_of(&u->name), MARKS_MAX).code != SPURION_OK) {
        return;
    }
    for (int32_t i = 0; i < count; i++) {
        spurion_word word;
        if (spurion_producers_word_of(&word, marks[i].ranges).code != SPURION_OK || word.closed) {
            continue;
        }
        know_producer(u, marks[i].producer);
        if (word.seen >= 0) {
            spurion_steps_seen(u->steps, marks[i].producer, word.seen, spurion_clock_ms());
        }
        if (word.ended >= 0) {
            spurion_steps_end(u->steps, marks[i].producer, word.ended, spurion_clock_ms());
        }
    }
}

spurion_status spurion_steps_open(spurion_pipeline *p)
{
    spurion_store_open_step *open;
    spurion_bytes all = {NULL, 0};
    spurion_status st;
    int32_t count;

    p->runs = calloc(1, sizeof *p->runs);
    if (p->runs == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "steps: no memory");
    }
    spurion_arena_init(&p->runs->arena, 0);
    p->runs->timeout_ms = p->config->engine.step_wait_ms;
    SPURION_TRY(st, spurion_store_open_steps(&open, &count, &p->runs->arena, p->store, all, OPEN_STEPS_MAX));
    for (int32_t i = 0; i < count; i++) {
        run *u = find_run(p->runs, open[i].run);
        if (u != NULL) {
            spurion_steps_restore(u->steps, open[i].step, spurion_clock_ms());
        }
    }
    for (run *u = p->runs->first; u != NULL; u = u->next) {
        restore_marks(p, u);
    }
    spurion_arena_reset(&p->runs->arena);
out:
    return st;
}

void spurion_steps_shut(spurion_pipeline *p)
{
    if (p->runs == NULL) {
        return;
    }
    while (p->runs->first != NULL) {
        run *u = p->runs->first;
        p->runs->first = u->next;
        spurion_steps_destroy(u->steps);
        free(u);
    }
    spurion_arena_fini(&p->runs->arena);
    free(p->runs);
    p->runs = NULL;
}

/* ---- news ---- */

void spurion_steps_stored(spurion_pipeline *p, spurion_bytes who, spurion_bytes producer, int64_t step)
{
    run *u = find_run(p->runs, who);

    if (u != NULL) {
        if (producer.size > 0) {
            know_producer(u, producer);
        }
        spurion_steps_seen(u->steps, producer, step, spurion_clock_ms());
    }
}

void spurion_steps_word(spurion_pipeline *p, const spurion_producer *producer, const spurion_word *word)
{
    spurion_bytes who = spurion_producer_name(producer);
    run *u = find_run(p->runs, spurion_producer_run(producer));
    int64_t now = spurion_clock_ms();

    if (u == NULL) {
        return;
    }
    if (word->seen >= 0) {
        know_producer(u, who);
        spurion_steps_seen(u->steps, who, word->seen, now);
    }
    if (word->ended >= 0) {
        know_producer(u, who);
        spurion_steps_end(u->steps, who, word->ended, now);
    }
    if (word->closed) { /* what it showed is all there is; nobody waits for more of it */
        if (word->seen >= 0) {
            spurion_steps_end(u->steps, who, word->seen, now);
            spurion_steps_close_due(p);
        }
        forget_producer(u, who);
    }
}

static void apply_end(run *u, spurion_bytes producer, int64_t step)
{
    int64_t now = spurion_clock_ms();

    if (producer.size > 0) {
        know_producer(u, producer);
        spurion_steps_end(u->steps, producer, step, now);
        return;
    }
    for (int32_t i = 0; i < u->producer_count; i++) {
        spurion_steps_end(u->steps, bytes_of(&u->producers[i]), step, now);
    }
    if (u->producer_count == 0) {
        spurion_steps_end(u->steps, anonymous, step, now);
    }
}

bool spurion_steps_told(spurion_pipeline *p, const spurion_step_end *end)
{
    spurion_step_runs *r = p->runs;
    run *u = find_run(r, end->run);
    spurion_bytes whole = {NULL, 0};
    bool closed = false;

    if (u == NULL) {
        return false;
    }
    if (spurion_flights_has_step(p->flights, end->run, end->step)) {
        if (r->end_count < ENDS_MAX) {
            waiting_end *w = &r->ends[r->end_count++];
            name_set(&w->run, end->run);
            name_set(&w->producer, end->producer);
            w->step = end->step;
        }
        return false;
    }
    apply_end(u, end->producer, end->step);
    spurion_steps_close_due(p);
    if (spurion_store_step_closed(&closed, p->store, end->run, end->step, whole).code != SPURION_OK) {
        return false;
    }
    return closed;
}

static void apply_waiting_ends(spurion_pipeline *p)
{
    spurion_step_runs *r = p->runs;

    for (int32_t i = 0; i < r->end_count;) {
        waiting_end *w = &r->ends[i];
        run *u;
        if (spurion_flights_has_step(p->flights, bytes_of(&w->run), w->step)) {
            i++;
            continue;
        }
        u = find_run(r, bytes_of(&w->run));
        if (u != NULL) {
            apply_end(u, bytes_of(&w->producer), w->step);
        }
        *w = r->ends[--r->end_count];
    }
}

/* ---- closing ---- */

static spurion_status worst_rollouts(spurion_alert *out, spurion_pipeline *p, spurion_arena *arena)
{
    spurion_store_worst *worst;
    spurion_status st;
    int32_t count;

    SPURION_TRY(st, spurion_store_worst_of_step(&worst, &count, arena, p->store, out->run, out->rule, out->step, SPURION_ALERT_WORST_MAX));
    for (int32_t i = 0; i < count && i < SPURION_ALERT_WORST_MAX; i++) {
        out->worst[i].group = worst[i].identity.group;
        out->worst[i].id = worst[i].identity.id;
        out->worst[i].attempt = worst[i].identity.attempt;
        out->worst[i].effect = worst[i].effect;
        out->worst_count = i + 1;
    }
out:
    return st;
}

/* Fills the alert of one rule; *send: it is due. */
static spurion_status rate_alert(bool *send, spurion_alert *out, spurion_pipeline *p, spurion_arena *arena, const run *u, int64_t step,
                                 const spurion_rule_config *rule)
{
    spurion_store_count at, through;
    spurion_rate_report report;
    spurion_status st;

    memset(out, 0, sizeof *out);
    out->kind = SPURION_ALERT_KIND_RATE;
    out->run = bytes_of(&u->name);
    out->step = step;
    out->rule = spurion_bytes_of(rule->id);
    SPURION_TRY(st, spurion_store_rule_counts(&at, &through, p->store, out->run, out->rule, step));
    report = spurion_rate_report_make(at.flagged, at.scored, through.flagged, through.scored, rule->rate_max, rule->alpha);
    *send = report.send;
    if (!report.send) {
        goto out;
    }
    out->flagged = report.flagged;
    out->scored = report.scored;
    out->rate = (float)report.rate;
    out->rate_lower = (float)report.bound.lower;
    out->rate_upper = (float)report.bound.upper;
    out->rate_max = (float)report.rate_max;
    out->alpha = (float)report.alpha;
    out->run_flagged = report.run_flagged;
    out->run_scored = report.run_scored;
    out->run_rate_lower = (float)report.run_bound.lower;
    out->run_rate_upper = (float)report.run_bound.upper;
    out->above = report.run_exceeded;
    out->step_above = report.step_exceeded;
    out->time_ms = spurion_clock_wall_ms();
    SPURION_TRY(st, worst_rollouts(out, p, arena));
out:
    return st;
}

/* One batch: the step is closed, and for each rule with something flagged its one alert is kept. */
static spurion_status close_step(spurion_pipeline *p, const run *u, int64_t step)
{
    spurion_arena *arena = &p->runs->arena;
    int32_t rules = p->config->rule_count;
    spurion_alert *alerts = spurion_arena_take_array(arena, (size_t)rules + 1, sizeof *alerts);
    spurion_store_alert *stored = spurion_arena_take_array(arena, (size_t)rules + 1, sizeof *stored);
    spurion_store_closing *closings = spurion_arena_take_array(arena, (size_t)rules + 1, sizeof *closings);
    spurion_store_batch batch;
    spurion_status st;
    int32_t n = 0;

    if (alerts == NULL || stored == NULL || closings == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "steps: no memory to close one");
    }
    memset(&batch, 0, sizeof batch);
    for (int32_t i = 0; i < rules; i++) {
        bool send = false;
        if (p->config->rules[i].alert != SPURION_ALERT_RATE) {
            continue;
        }
        SPURION_TRY(st, rate_alert(&send, &alerts[n], p, arena, u, step, &p->config->rules[i]));
        if (!send) {
            continue;
        }
        SPURION_TRY(st, spurion_sink_pack_alert(&stored[n].alert, arena, &alerts[n]));
        stored[n].row = -1;
        stored[n].closing = n;
        closings[n].run = bytes_of(&u->name);
        closings[n].rule = alerts[n].rule;
        closings[n].step = step;
        n++;
    }
    closings[n].run = bytes_of(&u->name);
    closings[n].step = step;
    batch.alerts = stored;
    batch.alert_count = n;
    batch.closings = closings;
    batch.closing_count = n + 1;
    SPURION_TRY(st, spurion_sink_commit(p, &batch));
    spurion_sink_publish(p, arena, alerts, stored, n);
    if (!closings[n].closed_before) {
        spurion_stat_add(p, SPURION_STAT_STEPS_CLOSED, 1);
    }
out:
    return st;
}

void spurion_steps_close_due(spurion_pipeline *p)
{
    int64_t step;

    apply_waiting_ends(p);
    for (run *u = p->runs->first; u != NULL; u = u->next) {
        while (atomic_load(&p->failed) == 0 && spurion_steps_take(&step, u->steps, spurion_clock_ms())) {
            spurion_status st = close_step(p, u, step);
            if (st.code != SPURION_OK) {
                spurion_log_error("STEP-CLOSE", "step %lld not closed: %s", (long long)step, st.message);
            }
            spurion_arena_reset(&p->runs->arena);
        }
    }
}

int64_t spurion_steps_next_ms(const spurion_pipeline *p)
{
    int64_t next = INT64_MAX;

    for (const run *u = p->runs->first; u != NULL; u = u->next) {
        int64_t at = spurion_steps_deadline_ms(u->steps);
        next = at < next ? at : next;
    }
    return next;
}

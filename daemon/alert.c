/* Bounds of rates, rate reports, and the closing of steps; see alert.h. */
#include "daemon/alert.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MIXTURE_A 0.5 /* Beta(1/2, 1/2), Jeffreys: rates of interest are small, and a flat mixture spends little of itself there   \
                       */
#define MIXTURE_B 0.5
#define BISECTIONS 200

/* ---- bounds ---- */

static double log_gamma(double x)
{
    int sign; /* lgamma would write a global */
    return lgamma_r(x, &sign);
}

static double log_beta(double a, double b)
{
    return log_gamma(a) + log_gamma(b) - log_gamma(a + b);
}

/* x ln p, with 0 ln 0 = 0 */
static double x_log(double x, double log_p)
{
    return x > 0 ? x * log_p : 0;
}

double spurion_rate_log_evidence(uint64_t flagged, uint64_t scored, double p)
{
    double s = (double)flagged, f = (double)(scored - flagged);
    double mixture = log_beta(MIXTURE_A + s, MIXTURE_B + f) - log_beta(MIXTURE_A, MIXTURE_B);
    return mixture - x_log(s, log(p)) - x_log(f, log1p(-p));
}

/* ln E falls from the left end to s/n and rises to the right end: each bound is where it crosses ln(1/alpha). `inside` is in the
 * set, `outside` is not (or is the end of [0, 1]). Gives the outside end of the last interval. */
static double crossing(uint64_t flagged, uint64_t scored, double inside, double outside, double limit)
{
    int i;
    if (spurion_rate_log_evidence(flagged, scored, outside) < limit) {
        return outside;
    }
    for (i = 0; i < BISECTIONS; i++) {
        double middle = inside + (outside - inside) / 2;
        if (spurion_rate_log_evidence(flagged, scored, middle) < limit) {
            inside = middle;
        } else {
            outside = middle;
        }
    }
    return outside;
}

spurion_rate_bound spurion_rate_bound_make(uint64_t flagged, uint64_t scored, double alpha)
{
    spurion_rate_bound bound = {0, 1};
    double limit = -log(alpha), rate;

    if (scored == 0) {
        return bound;
    }
    rate = (double)flagged / (double)scored;
    if (flagged > 0) {
        bound.lower = crossing(flagged, scored, rate, 0, limit);
    }
    if (flagged < scored) {
        bound.upper = crossing(flagged, scored, rate, 1, limit);
    }
    return bound;
}

/* ---- rate alerts ---- */

static uint64_t lesser(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

spurion_rate_report spurion_rate_report_make(uint64_t flagged, uint64_t scored, uint64_t run_flagged, uint64_t run_scored,
                                             double rate_max, double alpha)
{
    spurion_rate_report r;
    memset(&r, 0, sizeof r);
    r.scored = scored;
    r.flagged = lesser(flagged, scored);
    r.run_scored = run_scored;
    r.run_flagged = lesser(run_flagged, run_scored);
    r.rate = scored ? (double)r.flagged / (double)scored : 0;
    r.run_rate = run_scored ? (double)r.run_flagged / (double)run_scored : 0;
    r.rate_max = rate_max;
    r.alpha = alpha > 0 && alpha < 1 ? alpha : 0.001;
    r.bound = spurion_rate_bound_make(r.flagged, r.scored, r.alpha);
    r.run_bound = spurion_rate_bound_make(r.run_flagged, r.run_scored, r.alpha);
    r.send = r.flagged > 0;
    r.step_exceeded = r.bound.lower > rate_max;
    r.run_exceeded = r.run_bound.lower > rate_max;
    return r;
}

/* ---- closing steps ---- */

typedef struct open_step {
    int64_t step, last_ms;
} open_step;

typedef struct producer {
    char name[SPURION_NAME_BYTES_MAX];
    size_t size;
    int64_t seen, ended; /* latest step of each, -1: none */
    int64_t last_ms;
    bool held;
} producer;

struct spurion_steps {
    int64_t timeout_ms;
    open_step *open; /* ascending by step */
    int32_t open_count, open_room;
    producer *producers;
    int32_t producer_count, producer_room;
};

spurion_status spurion_steps_create(spurion_steps **out, int64_t timeout_ms)
{
    spurion_steps *s = calloc(1, sizeof *s);
    *out = s;
    if (!s) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "steps: no memory for %zu bytes", sizeof *s);
    }
    s->timeout_ms = timeout_ms;
    return spurion_ok();
}

void spurion_steps_destroy(spurion_steps *s)
{
    if (s) {
        free(s->open);
        free(s->producers);
        free(s);
    }
}

/* Room for one more; false when there is no memory (the store still knows the step as open, and a restart closes it). */
static bool make_room(void **array, int32_t *room, int32_t count, size_t size)
{
    int32_t more = *room ? 2 * *room : 16;
    void *p;
    if (count < *room) {
        return true;
    }
    p = realloc(*array, (size_t)more * size);
    if (!p) {
        return false;
    }
    *array = p;
    *room = more;
    return true;
}

static void step_touch(spurion_steps *s, int64_t step, int64_t now_ms)
{
    int32_t at = s->open_count;
    void *array = s->open;

    while (at > 0 && s->open[at - 1].step > step) { /* new steps are the latest: found at once */
        at--;
    }
    if (at > 0 && s->open[at - 1].step == step) {
        s->open[at - 1].last_ms = now_ms > s->open[at - 1].last_ms ? now_ms : s->open[at - 1].last_ms;
        return;
    }
    if (!make_room(&array, &s->open_room, s->open_count, sizeof *s->open)) {
        return;
    }
    s->open = array;
    memmove(&s->open[at + 1], &s->open[at], (size_t)(s->open_count - at) * sizeof *s->open);
    s->open[at].step = step;
    s->open[at].last_ms = now_ms;
    s->open_count++;
}

static producer *producer_find(spurion_steps *s, spurion_bytes name)
{
    int32_t i;
    for (i = 0; i < s->producer_count; i++) {
        if (s->producers[i].size == name.size && memcmp(s->producers[i].name, name.data, name.size) == 0) {
            return &s->producers[i];
        }
    }
    return NULL;
}

static producer *producer_silent_longest(spurion_steps *s)
{
    producer *oldest = &s->producers[0];
    int32_t i;
    for (i = 1; i < s->producer_count; i++) {
        oldest = s->producers[i].last_ms < oldest->last_ms ? &s->producers[i] : oldest;
    }
    return oldest;
}

/* The producer, new or known; NULL for names that are none and when there is no memory. */
static producer *producer_take(spurion_steps *s, spurion_bytes name, int64_t now_ms)
{
    producer *p;
    void *array = s->producers;

    if (name.size == 0 || name.size > SPURION_NAME_BYTES_MAX) {
        return NULL;
    }
    p = producer_find(s, name);
    if (!p && s->producer_count == SPURION_PRODUCERS_MAX) {
        p = producer_silent_longest(s);
        p->size = 0;
    } else if (!p) {
        if (!make_room(&array, &s->producer_room, s->producer_count, sizeof *s->producers)) {
            return NULL;
        }
        s->producers = array;
        p = &s->producers[s->producer_count++];
        p->size = 0;
    }
    if (p->size == 0) {
        memcpy(p->name, name.data, name.size);
        p->size = name.size;
        p->seen = p->ended = -1;
        p->held = false;
    }
    p->last_ms = now_ms;
    return p;
}

void spurion_steps_seen(spurion_steps *s, spurion_bytes name, int64_t step, int64_t now_ms)
{
    producer *p = producer_take(s, name, now_ms);
    if (p && step > p->seen) {
        p->seen = step;
    }
    step_touch(s, step, now_ms);
}

void spurion_steps_end(spurion_steps *s, spurion_bytes name, int64_t step, int64_t now_ms)
{
    producer *p = producer_take(s, name, now_ms);
    if (p && step > p->ended) {
        p->ended = step;
    }
    step_touch(s, step, now_ms);
}

void spurion_steps_restore(spurion_steps *s, int64_t step, int64_t now_ms)
{
    step_touch(s, step, now_ms);
}

void spurion_steps_forget(spurion_steps *s, spurion_bytes name)
{
    producer *p = producer_find(s, name);
    if (p) {
        *p = s->producers[--s->producer_count];
    }
}

void spurion_steps_hold(spurion_steps *s, spurion_bytes name, bool held)
{
    producer *p = producer_find(s, name);
    if (p) {
        p->held = held;
    }
}

static bool all_past(const spurion_steps *s, int64_t step)
{
    int32_t i;
    for (i = 0; i < s->producer_count; i++) {
        const producer *p = &s->producers[i];
        if (p->held || (p->ended < step && p->seen <= step)) {
            return false;
        }
    }
    return s->producer_count > 0;
}

bool spurion_steps_take(int64_t *step, spurion_steps *s, int64_t now_ms)
{
    int32_t i;
    for (i = 0; i < s->open_count; i++) {
        const open_step *o = &s->open[i];
        if (s->open_count > SPURION_STEPS_OPEN_MAX || now_ms - o->last_ms >= s->timeout_ms || all_past(s, o->step)) {
            *step = o->step;
            memmove(&s->open[i], &s->open[i + 1], (size_t)(s->open_count - i - 1) * sizeof *s->open);
            s->open_count--;
            return true;
        }
    }
    return false;
}

int64_t spurion_steps_deadline_ms(const spurion_steps *s)
{
    int64_t deadline = INT64_MAX;
    int32_t i;
    for (i = 0; i < s->open_count; i++) {
        int64_t at = s->open[i].last_ms + s->timeout_ms;
        deadline = at < deadline ? at : deadline;
    }
    return deadline;
}

int32_t spurion_steps_open_count(const spurion_steps *s)
{
    return s->open_count;
}

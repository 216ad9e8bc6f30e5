/* Decisions about alerts: anytime-valid bounds of a rate, whether a step of a rule is worth one message, and when a step is closed.
 * Pure: no input, output, clock or lock; the caller passes the time. Thread: any, one owner per object.
 * docs/alerts.md says what the bounds claim, and what not. Formulas: Ville 1939; Robbins, Ann. Math. Stat. 41 (1970) 1397. */
#ifndef SPURION_ALERT_H
#define SPURION_ALERT_H

#include <stdbool.h>
#include <stdint.h>

#include "spurion/limits.h"
#include "spurion/rollout.h"
#include "spurion/status.h"

/* ---- bounds ---- */

typedef struct spurion_rate_bound {
    double lower, upper; /* 0 <= lower <= flagged/scored <= upper <= 1; [0, 1] when nothing was scored */
} spurion_rate_bound;

/* The beta-binomial mixture's log e-value against rate p: ln E_n(p) = ln B(a+s, b+n-s) - ln B(a,b) - s ln p - (n-s) ln(1-p), with
 * Beta(a, b) = Beta(1/2, 1/2). +inf where p excludes what was seen (p = 0 with s > 0, p = 1 with s < n). */
double spurion_rate_log_evidence(uint64_t flagged, uint64_t scored, double p);

/* The confidence sequence {p : E_n(p) < 1/alpha}: over a whole run, at all n at once, it misses a constant rate with probability at
 * most alpha. Ends are rounded outwards. Needs flagged <= scored and 0 < alpha < 1. */
spurion_rate_bound spurion_rate_bound_make(uint64_t flagged, uint64_t scored, double alpha);

/* ---- rate alerts ---- */

typedef struct spurion_rate_report {
    uint64_t flagged, scored;         /* of the step */
    uint64_t run_flagged, run_scored; /* of the run's steps up to this one, whatever order they came in */
    double rate, run_rate;            /* 0 when nothing was scored */
    spurion_rate_bound bound;         /* of this step alone, at its alpha; over many steps a share alpha of them may miss */
    spurion_rate_bound run_bound;     /* of the run's sequence: holds at all steps at once with probability 1 - alpha */
    double rate_max, alpha;
    bool send;          /* one message is due: something was flagged in this step */
    bool run_exceeded;  /* run_bound.lower > rate_max: false with probability at most alpha over the whole run */
    bool step_exceeded; /* bound.lower > rate_max: false with probability at most alpha for this step */
} spurion_rate_report;

/* Counts as spurion_store_rule_counts gives them. Flagged above scored is cut to scored; alpha outside (0, 1) counts as 0.001. */
spurion_rate_report spurion_rate_report_make(uint64_t flagged, uint64_t scored, uint64_t run_flagged, uint64_t run_scored,
                                             double rate_max, double alpha);

/* ---- closing steps ---- */

/* A step of a run closes when all producers seen in the run have said StepEnd for it (or a later one) or shown a later step, or
 * when nothing has come for it for timeout_ms. One object for each run. A step that was taken is forgotten: when more comes for it,
 * it opens and closes again, and the store's closings see to it that a rule's alert for a step is sent once. */
#define SPURION_STEPS_OPEN_MAX 1024 /* open steps of a run; of more, the lowest is closed at once */
#define SPURION_PRODUCERS_MAX 1024  /* producers of a run; of more, the one silent for longest is no longer waited for */

typedef struct spurion_steps spurion_steps;

spurion_status spurion_steps_create(spurion_steps **out, int64_t timeout_ms) SPURION_MUST_USE;
void spurion_steps_destroy(spurion_steps *s);

/* A rollout of this step was judged and stored. producer of size 0: none (Score, Submit): only the time-out or other producers
 * close. */
void spurion_steps_seen(spurion_steps *s, spurion_bytes producer, int64_t step, int64_t now_ms);
/* The producer has sent all of this step (and of the ones before). It opens the step when it had no rollout, so that a closing is
 * told. */
void spurion_steps_end(spurion_steps *s, spurion_bytes producer, int64_t step, int64_t now_ms);
/* A step that a restarted daemon finds open in its store. */
void spurion_steps_restore(spurion_steps *s, int64_t step, int64_t now_ms);
/* The producer is gone (closed, or its connection died): it is no longer waited for. */
void spurion_steps_forget(spurion_steps *s, spurion_bytes producer);
/* While held (what it published is known to have gaps, or is not judged yet) the producer's word closes nothing; the time-out does. */
void spurion_steps_hold(spurion_steps *s, spurion_bytes producer, bool held);

/* Takes the lowest step that is to be closed at now_ms. false: none. */
bool spurion_steps_take(int64_t *step, spurion_steps *s, int64_t now_ms);
/* When take should be asked again if nothing happens, INT64_MAX: nothing is open. */
int64_t spurion_steps_deadline_ms(const spurion_steps *s);
int32_t spurion_steps_open_count(const spurion_steps *s);

#endif

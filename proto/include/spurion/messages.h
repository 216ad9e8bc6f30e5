/* Plain structs of every message on the wire (spurion.proto), as codec.h gives and takes them. Nothing here owns memory: pointers
 * borrow from what they were decoded into. Counts stand behind their arrays. C17 and C++17. */
#ifndef SPURION_MESSAGES_H
#define SPURION_MESSAGES_H

#include <stdbool.h>
#include <stdint.h>

#include "spurion/limits.h"
#include "spurion/rollout.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SPURION_PROTO_VERSION 1
#define SPURION_METHOD_PREFIX "/spurion.v1.Spurion/"
#define SPURION_IDEMPOTENCY_KEY_BYTES_MAX 64
#define SPURION_METADATA_MAX 32
#define SPURION_ALERT_WORST_MAX 3
#define SPURION_RANGES_MAX 1024     /* ranges in one Sync or its answer */
#define SPURION_FLIGHT_MAX 64       /* rollouts in flight that Status names */

/* ---- envelope ---- */

typedef struct spurion_request {
    uint64_t call_id;
    spurion_bytes method;      /* "/spurion.v1.Spurion/Score" */
    uint32_t timeout_ms;       /* 0: none */
    const spurion_bytes *metadata_keys, *metadata_values;
    int32_t metadata_count;
    spurion_bytes idempotency_key, body, page_token;
} spurion_request;

typedef struct spurion_reply {
    uint64_t call_id;
    int code;
    spurion_bytes message;
    uint32_t retry_after_ms;
    spurion_bytes body, next_page_token;
} spurion_reply;

typedef struct spurion_hello {
    uint32_t proto_min, proto_max;
    spurion_bytes client_version;
} spurion_hello;

typedef struct spurion_hello_reply {
    uint32_t proto;
    spurion_bytes server_version;
    uint64_t epoch;
    spurion_bytes provenance;
    uint32_t frame_bytes_max, reply_bytes_max;
} spurion_hello_reply;

/* ---- rollouts ---- */

/* Why one rollout of a message was refused; code SPURION_OK: it was not. */
typedef struct spurion_refusal {
    int code;
    spurion_bytes message;
} spurion_refusal;

typedef struct spurion_rollouts {
    const spurion_rollout *rollouts; /* of a refused one the names are filled as far as they could be read */
    const spurion_refusal *refusals; /* (count) after decoding; ignored when encoding */
    int32_t count;
} spurion_rollouts;

/* Score and Submit */
typedef struct spurion_score {
    spurion_rollouts list;
    bool want_tokens;          /* Score only */
    spurion_bytes producer;    /* or absent */
} spurion_score;

typedef struct spurion_verdicts {
    const spurion_verdict *verdicts;
    int32_t count;
} spurion_verdicts;

typedef struct spurion_submit_reply {
    uint32_t accepted, duplicates;
    const uint32_t *refused, *refused_codes; /* places in the request */
    const spurion_bytes *refused_messages;
    int32_t refused_count;
} spurion_submit_reply;

/* The identity of a rollout (docs/verdict.md section 2). */
typedef struct spurion_key {
    spurion_bytes run, group, id;
    int64_t step;
    int32_t attempt;
} spurion_key;

typedef struct spurion_record {
    spurion_rollout rollout;   /* texts and ids absent: the rollout is only counted */
    spurion_verdict verdict;
    int64_t time_ms;           /* when judged, since 1970 */
} spurion_record;

/* ---- tap ---- */

typedef struct spurion_tap {
    spurion_bytes run, producer;
    uint64_t epoch, sequence;  /* sequence >= 1 */
    spurion_rollouts list;
    bool has_step_end;
    int64_t step_end;
} spurion_tap;

typedef struct spurion_fill {
    const spurion_bytes *taps; /* encoded spurion_tap each */
    int32_t count;
} spurion_fill;

typedef struct spurion_fill_reply {
    uint32_t taken;
} spurion_fill_reply;

typedef struct spurion_range {
    uint64_t first, last;      /* both belong to it */
} spurion_range;

typedef struct spurion_sync {
    spurion_bytes run, producer;
    uint64_t epoch, last_sequence;
    const spurion_range *lost;
    int32_t lost_count;
    uint64_t lost_rollouts;
    bool closing;
    const uint64_t *lost_counts; /* (lost_count) rollouts of each range, or NULL: lost_rollouts says all of them */
} spurion_sync;

typedef struct spurion_sync_reply {
    uint64_t stored_through;
    const spurion_range *missing, *pending;
    int32_t missing_count, pending_count;
    uint64_t lost_messages, lost_rollouts;
} spurion_sync_reply;

typedef struct spurion_step_end {
    spurion_bytes run, producer;
    int64_t step;
} spurion_step_end;

typedef struct spurion_step_end_reply {
    bool closed;
} spurion_step_end_reply;

/* ---- questions ---- */

typedef enum spurion_query_order { SPURION_QUERY_BY_STEP, SPURION_QUERY_BY_TIME, SPURION_QUERY_BY_EFFECT } spurion_query_order;

/* All conditions given must hold; bounds belong to what is asked for. */
typedef struct spurion_query {
    spurion_bytes run;
    bool has_step_min, has_step_max, has_time_min, has_time_max, has_effect_min, has_effect_max, flagged;
    int64_t step_min, step_max, time_min_ms, time_max_ms;
    float effect_min, effect_max; /* with sign; of the rule's effect when a rule is named, else the rollout's */
    spurion_bytes rule;        /* or absent */
    spurion_bytes feature_sae; /* or absent; with feature_index */
    uint32_t feature_index;
    spurion_bytes group;       /* or absent */
    spurion_query_order order; /* BY_EFFECT: most negative first; rollouts of effect exactly 0 are not in it */
    bool descending;
    uint32_t limit;            /* 0: what fits into a reply */
    spurion_bytes cursor;      /* or absent */
} spurion_query;

typedef struct spurion_row {
    spurion_key key;
    float reward, counterfactual_reward, effect;
    spurion_opt_float effect_sd, advantage, counterfactual_advantage;
    bool advantage_flip, whole;
    const spurion_bytes *rules;
    int32_t rule_count;
    uint32_t warnings;
    int64_t time_ms;
    spurion_action action;
} spurion_row;

typedef struct spurion_query_reply {
    const spurion_row *rows;
    int32_t count;
    spurion_bytes cursor;      /* absent: no more */
} spurion_query_reply;

typedef enum spurion_counts_kind { SPURION_COUNTS_STEP, SPURION_COUNTS_RULE, SPURION_COUNTS_FEATURE } spurion_counts_kind;

typedef struct spurion_counts {
    spurion_bytes run;
    spurion_counts_kind kind;
    spurion_bytes rule;        /* RULE without totals */
    spurion_bytes feature_sae; /* FEATURE without totals */
    uint32_t feature_index;
    bool totals;               /* one entry for each rule (feature) over all steps, instead of one for each step */
    bool has_step_min, has_step_max;
    int64_t step_min, step_max;
    uint32_t limit;
    spurion_bytes cursor;
} spurion_counts;

typedef struct spurion_counts_row {
    spurion_bytes rule;        /* RULE */
    spurion_feature_ref ref;   /* FEATURE */
    int64_t step;              /* -1: all steps */
    uint64_t scored, flagged;
    double effect_sum;
    double reward_sum, reward_square_sum, counterfactual_sum; /* STEP */
} spurion_counts_row;

typedef struct spurion_counts_reply {
    spurion_counts_kind kind;  /* what the rows hold; encoding needs it, decoding finds it */
    const spurion_counts_row *rows;
    int32_t count;
    spurion_bytes cursor;      /* absent: no more */
} spurion_counts_reply;

typedef struct spurion_runs {
    spurion_bytes after;       /* or absent */
    uint32_t limit;
} spurion_runs;

typedef struct spurion_run_row {
    spurion_bytes run;
    int64_t first_ms, last_ms, step_min, step_max;
    uint64_t rollouts, flagged;
} spurion_run_row;

typedef struct spurion_runs_reply {
    const spurion_run_row *rows;
    int32_t count;
    bool more;
} spurion_runs_reply;

/* ---- alerts ---- */

typedef enum spurion_alert_kind {
    SPURION_ALERT_KIND_NONE,
    SPURION_ALERT_KIND_RATE,
    SPURION_ALERT_KIND_EACH,
    SPURION_ALERT_KIND_TRAINER_REWARD,
    SPURION_ALERT_KIND_STORE
} spurion_alert_kind;

typedef struct spurion_worst {
    spurion_bytes group, id;
    int32_t attempt;
    float effect;
} spurion_worst;

typedef struct spurion_alert {
    uint64_t epoch, seq;
    spurion_alert_kind kind;
    spurion_bytes run;
    int64_t step;
    spurion_bytes rule;        /* absent for TRAINER_REWARD and STORE */
    uint64_t flagged, scored;
    float rate, rate_lower, rate_upper, rate_max, alpha; /* of this step alone */
    uint64_t run_flagged, run_scored;   /* of the run's steps up to this one */
    float run_rate_lower, run_rate_upper; /* anytime-valid bounds of the run's rate */
    bool above;                /* run_rate_lower > rate_max */
    bool step_above;           /* rate_lower > rate_max */
    spurion_worst worst[SPURION_ALERT_WORST_MAX];
    int32_t worst_count;
    int64_t time_ms;
    float trainer_reward, reward; /* TRAINER_REWARD: of the worst rollout */
    spurion_bytes text;        /* or absent */
} spurion_alert;

typedef struct spurion_alerts {
    uint64_t epoch, from_seq;
    uint32_t limit;
    spurion_bytes run;         /* or absent */
} spurion_alerts;

typedef struct spurion_alerts_reply {
    const spurion_alert *alerts;
    int32_t count;
    uint64_t epoch, last_seq, next_seq;
} spurion_alerts_reply;

/* ---- the daemon ---- */

typedef struct spurion_flight {
    spurion_bytes run, group, id, stage;
    int64_t step;
    uint64_t age_ms;
} spurion_flight;

typedef struct spurion_producer_status {
    spurion_bytes run, producer;
    uint64_t epoch, stored, highest, missing, lost;
} spurion_producer_status;

typedef struct spurion_counter {
    spurion_bytes name;
    uint64_t value;
} spurion_counter;

typedef struct spurion_status_reply {
    spurion_bytes version, provenance, state, engine;
    uint64_t uptime_ms, queue_bytes, queue_bytes_max, in_flight;
    bool ready;
    const spurion_counter *counters;
    int32_t counter_count;
    const spurion_flight *flights; /* oldest first, at most SPURION_FLIGHT_MAX */
    int32_t flight_count;
    const spurion_producer_status *producers;
    int32_t producer_count;
} spurion_status_reply;

typedef struct spurion_page {
    uint32_t from, limit;
} spurion_page;

typedef struct spurion_catalogue_row {
    spurion_feature_ref ref;
    spurion_bytes label, verdict; /* verdict: "spurious", "intended", "unknown" */
    uint32_t role;                /* 1 detect, 2 debias, 3 both, 0 none */
    float activation_min;
    const spurion_bytes *families;
    int32_t family_count;
} spurion_catalogue_row;

typedef struct spurion_catalogue_reply {
    uint32_t total;
    const spurion_catalogue_row *rows;
    int32_t count;
} spurion_catalogue_reply;

typedef struct spurion_rule_row {
    spurion_bytes id;
    uint32_t direction, alert;    /* 0 either, 1 raised, 2 lowered; 0 rate, 1 each, 2 none */
    spurion_opt_float effect_min, effect_sd_min;
    bool advantage_flip;
    float rate_max, alpha;
    const spurion_bytes *families;
    int32_t family_count;         /* 0: all */
    spurion_action action;
    float weight;                 /* with DOWN_WEIGHT */
} spurion_rule_row;

typedef struct spurion_rules_reply {
    const spurion_rule_row *rows;
    int32_t count;
} spurion_rules_reply;

#ifdef __cplusplus
}
#endif

#endif

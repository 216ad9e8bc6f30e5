/* The plain structs that wire, daemon and client share: a rollout as it comes in, a verdict as it goes out (the meaning of every
 * number is docs/verdict.md). No ownership here: every pointer borrows from the arena or message it was decoded into.
 * C17 and C++17. */
#ifndef SPURION_ROLLOUT_H
#define SPURION_ROLLOUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "spurion/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes with a length; data is also NUL-terminated wherever this tree makes one. data NULL: absent. */
typedef struct spurion_bytes {
    const char *data;
    size_t size;
} spurion_bytes;

/* What the texts of a rollout are. */
typedef enum spurion_text_form {
    SPURION_FORM_PLAIN,     /* the configured template, leading specials and EOS are added */
    SPURION_FORM_TEMPLATED, /* the template is in them: leading specials are added (unless they begin with BOS), no template, no EOS */
    SPURION_FORM_VERBATIM   /* nothing is added: the tokens are those of the texts */
} spurion_text_form;
#define SPURION_FORM_COUNT 3

/* "plain", "templated", "verbatim"; NULL past the last. */
const char *spurion_form_name(int form);

typedef struct spurion_rollout {
    spurion_bytes run, group, id; /* names; SPURION_NAME_BYTES_MAX, UTF-8 without control characters */
    int64_t step;                 /* trainer step, >= 0 */
    int32_t attempt;              /* raised by a trainer that resumes; part of the identity */
    spurion_bytes prompt, completion;             /* texts, or absent when ids are given */
    const int32_t *prompt_ids, *completion_ids;   /* token ids, or NULL */
    int32_t prompt_id_count, completion_id_count;
    bool has_trainer_reward;
    float trainer_reward;
    spurion_bytes tags;           /* a JSON object as text, or absent */
    int32_t group_size;           /* members to wait for; 0: not said */
    spurion_bytes messages;       /* instead of the texts: a JSON array of {"role", "content"} as text, the last by the assistant; or absent */
    spurion_text_form text_form;  /* of prompt and completion; ids have none */
} spurion_rollout;

/* Warnings: a set. Names on the wire and in JSON: spurion_warning_name. */
typedef enum spurion_warning {
    SPURION_WARN_BOUNDARY = 1 << 0,
    SPURION_WARN_BOS_ONCE = 1 << 1,
    SPURION_WARN_PAD_SCORED = 1 << 2,
    SPURION_WARN_GROUP_SPLIT = 1 << 3,
    SPURION_WARN_TRAINER_REWARD_DIFFERS = 1 << 4,
    SPURION_WARN_PROMPT_TRUNCATED = 1 << 5,
    SPURION_WARN_EOS_DOUBLED = 1 << 6,
    SPURION_WARN_DATE_FIXED = 1 << 7
} spurion_warning;
#define SPURION_WARNING_COUNT 8

/* "boundary", "bos_once", "pad_scored", ... for bit 0, 1, ...; NULL past the last. */
const char *spurion_warning_name(int bit);

typedef struct spurion_feature_ref {
    spurion_bytes sae; /* id of the SAE in the configuration */
    int32_t index;
} spurion_feature_ref;

/* An optional float: has false prints as null. */
typedef struct spurion_opt_float {
    bool has;
    float value;
} spurion_opt_float;

typedef struct spurion_feature {
    spurion_feature_ref ref;
    spurion_bytes label;                 /* the catalogue's; absent: it has none */
    spurion_bytes explanation;           /* an imported label; absent: there is none */
    const spurion_bytes *families;
    int32_t family_count;
    spurion_bytes verdict;               /* "spurious", "intended", "unknown" */
    spurion_opt_float attribution, ablation_effect;
    float activation_max, activation_sum;
    int32_t peak_position;
} spurion_feature;

typedef struct spurion_sae_summary {
    spurion_bytes sae;
    spurion_opt_float attribution_sum, error_attribution, bias_attribution, baseline_reward, residual, l0_mean;
} spurion_sae_summary;

typedef struct spurion_family_effect {
    spurion_bytes family;
    float effect;
} spurion_family_effect;

typedef struct spurion_flag {
    spurion_bytes rule;
    float effect;
    const spurion_feature_ref *features;
    int32_t feature_count;
} spurion_flag;

/* What a rule asks a trainer to do with a flagged rollout, the weakest first: of several rules the strongest is done. */
typedef enum spurion_action {
    SPURION_ACTION_NONE,        /* no flag */
    SPURION_ACTION_LOG,         /* recorded with the rollout */
    SPURION_ACTION_ALERT,       /* and alerted, as the rule's `alert` says */
    SPURION_ACTION_DOWN_WEIGHT, /* its loss counts less */
    SPURION_ACTION_REPLACE,     /* the counterfactual reward stands for the reward */
    SPURION_ACTION_DROP         /* left out of the update */
} spurion_action;
#define SPURION_ACTION_COUNT 6

/* "none", "log", "alert", "down_weight", "replace", "drop"; NULL past the last. */
const char *spurion_action_name(int action);

/* Per-token view of the completion positions, present when asked for. */
typedef struct spurion_tokens {
    int32_t count;               /* |C| */
    const int32_t *position, *id;
    const spurion_bytes *text;
    int32_t sae_count;           /* in the order of verdict.saes */
    const float *attribution;    /* (sae_count, count), or NULL when not explained */
    int32_t flagged_count;       /* rules that fired, in the order of verdict.flags */
    const float *flagged;        /* (flagged_count, sae_count, count), or NULL */
} spurion_tokens;

typedef struct spurion_verdict {
    /* identity, echoed; has_step false and absent names print as null (refused lines only) */
    spurion_bytes run, group, id;
    bool has_step;
    int64_t step;
    int32_t attempt;
    int64_t line;                /* > 0: the line was no JSON object; only line and error are printed */

    int code;                    /* SPURION_OK, or why the rollout was refused, with message */
    spurion_bytes message;

    float reward, counterfactual_reward, effect;
    spurion_opt_float effect_sd, advantage, counterfactual_advantage;
    bool advantage_flip;         /* meaningful where advantage.has */
    int32_t scored_position, token_count; /* scored_position -1: null */
    bool truncated;
    const spurion_sae_summary *saes;
    int32_t sae_count;
    const spurion_family_effect *families;
    int32_t family_count;
    const spurion_flag *flags;
    int32_t flag_count;
    const spurion_feature *features;
    int32_t feature_count;
    spurion_action action;       /* the strongest of its flags' rules */
    spurion_bytes action_rule;   /* that rule, the first in their order; absent: none */
    float action_reward;         /* counterfactual_reward with REPLACE, else reward */
    float action_weight;         /* 1; less with DOWN_WEIGHT; 0 with DROP */
    spurion_opt_float action_advantage; /* in the group as it is after the actions; null with DROP and in a group of one */
    char provenance[17];         /* 16 hex digits */
    uint32_t warnings;           /* spurion_warning bits */
    const spurion_tokens *tokens; /* NULL unless asked for */
} spurion_verdict;

#ifdef __cplusplus
}
#endif

#endif

/* The configuration: one table describes every key; parser, --print-config, the example file and the manual page come from it.
 * Order: default, file, environment (SPURION_<SECTION>_<KEY>), flag (--set section.key=value). Immutable after load. */
#ifndef SPURION_CONFIG_H
#define SPURION_CONFIG_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "daemon/base/arena.h"
#include "spurion/limits.h"
#include "spurion/ops.h"
#include "spurion/rollout.h"
#include "spurion/status.h"

/* In the order of the names in config_keys.c. AUTO: what the checkpoint's own chat_template is (daemon/template.h). */
typedef enum spurion_template {
    SPURION_TEMPLATE_NONE, SPURION_TEMPLATE_HH, SPURION_TEMPLATE_AUTO, SPURION_TEMPLATE_CHATML, SPURION_TEMPLATE_QWEN2, SPURION_TEMPLATE_QWEN2_5,
    SPURION_TEMPLATE_SMOLLM2, SPURION_TEMPLATE_LLAMA3, SPURION_TEMPLATE_LLAMA3_1, SPURION_TEMPLATE_GEMMA, SPURION_TEMPLATE_MISTRAL,
    SPURION_TEMPLATE_TULU, SPURION_TEMPLATE_TULU2, SPURION_TEMPLATE_ZEPHYR, SPURION_TEMPLATE_OPENASSISTANT
} spurion_template;
typedef enum spurion_too_long { SPURION_TOO_LONG_REFUSE, SPURION_TOO_LONG_TRUNCATE } spurion_too_long;
typedef enum spurion_method { SPURION_METHOD_GRAD, SPURION_METHOD_IG, SPURION_METHOD_NONE } spurion_method;
typedef enum spurion_when { SPURION_WHEN_ALL, SPURION_WHEN_FLAGGED } spurion_when;
typedef enum spurion_ig_rule { SPURION_IG_MIDPOINT, SPURION_IG_LEFT } spurion_ig_rule;
typedef enum spurion_scope { SPURION_SCOPE_COMPLETION, SPURION_SCOPE_ALL } spurion_scope;
typedef enum spurion_direction { SPURION_EITHER, SPURION_RAISED, SPURION_LOWERED } spurion_direction;
typedef enum spurion_http_reward { SPURION_HTTP_CLEAN, SPURION_HTTP_COUNTERFACTUAL, SPURION_HTTP_ACTION } spurion_http_reward;
typedef enum spurion_http_form { SPURION_HTTP_FORM_ENDPOINT, SPURION_HTTP_FORM_PLAIN, SPURION_HTTP_FORM_TEMPLATED, SPURION_HTTP_FORM_VERBATIM } spurion_http_form;
typedef enum spurion_alert_mode { SPURION_ALERT_RATE, SPURION_ALERT_EACH, SPURION_ALERT_NONE } spurion_alert_mode;

typedef enum spurion_rule_action { SPURION_RULE_LOG, SPURION_RULE_ALERT, SPURION_RULE_DOWN_WEIGHT, SPURION_RULE_REPLACE, SPURION_RULE_DROP } spurion_rule_action; /* spurion_action - 1 */

typedef struct spurion_sae_config {
    const char *id, *path;   /* path absolute after load */
    const char *hook;        /* NULL: from the file */
    const char *format;      /* NULL: found out */
    bool has_norm_factor;
    double norm_factor;      /* of a dataset-wise norm that stands in no file */
    bool unit_decoder;       /* features in units of decoder rows of length 1 */
} spurion_sae_config;

typedef struct spurion_rule_config {
    const char *id;
    const char **families;   /* NULL with family_count 0: all */
    int32_t family_count;
    spurion_direction direction;
    bool has_effect_min, has_effect_sd_min, advantage_flip;
    double effect_min, effect_sd_min;
    spurion_alert_mode alert;
    double rate_max, alpha;  /* defaults 0.01, 0.001 */
    spurion_rule_action action;
    double weight;           /* with DOWN_WEIGHT */
} spurion_rule_config;

typedef struct spurion_config {
    spurion_arena arena;
    const unsigned char *origins; /* where each scalar key of the table came from, for spurion_config_print */
    struct {
        const char *path;
        spurion_dtype dtype;
        int head_index;      /* -1: not said */
        const char **head_weights; /* numbers as texts; engine.c reads them */
        int32_t head_weight_count; /* 0: none */
        const char *pooling; /* NULL: what the checkpoint says, else last */
        spurion_template template_kind;
        bool append_eos;
        int max_tokens;      /* 0: the model's context */
        spurion_too_long on_too_long;
    } model;
    spurion_sae_config saes[SPURION_SAES_MAX];
    int32_t sae_count;
    struct {
        spurion_method method;
        spurion_when when, l0_mean;
        int ig_steps;
        spurion_ig_rule ig_rule;
        spurion_scope scope;
        int top;
        bool completeness;
    } attribution;
    bool ablation_each;
    const char *catalogue;   /* absolute path, or NULL: no catalogue */
    const char *labels;      /* absolute path, or NULL: no imported labels */
    spurion_rule_config *rules;
    int32_t rule_count;
    struct {
        bool has_sd;
        double sd, trainer_tolerance;
    } reward;
    struct {
        const char *device;
        int threads, tokens_max;
        uint64_t memory_max; /* bytes */
        int batch_wait_ms, group_wait_ms, step_wait_ms;
        uint64_t queue_max;  /* bytes */
    } engine;
    struct {
        const char *path;    /* absolute, or NULL */
        int keep_one_in, replies_for_s;
    } store;
    struct {
        const char **rpc, **rollouts, **alerts; /* URLs; relative ipc paths made absolute */
        int32_t rpc_count, rollouts_count, alerts_count;
        const char *http;    /* NULL: none */
    } listen;
    struct {
        const char *run;     /* of requests whose path names none */
        spurion_http_reward reward;
        const char *token_file; /* absolute, or NULL: nobody is asked for a token */
        uint64_t body_max;   /* bytes */
        int connections_max, step_rollouts, group_size;
        spurion_http_form text_form;
        const char *completion_after; /* with \n for a line end; NULL: the usual ones */
    } http;
} spurion_config;

/* Loads a YAML file; overrides: "section.key=value" strings (may be NULL). Unknown keys are refused by name with the line. */
spurion_status spurion_config_load(spurion_config *out, const char *path, const char *const *overrides, int override_count) SPURION_MUST_USE;
void spurion_config_fini(spurion_config *c);
/* Prints the effective configuration as YAML that loads again, each key with its origin (default, file, environment, flag) as a comment. */
void spurion_config_print(const spurion_config *c, FILE *out);
/* Names of the keys (", " between them) whose values differ, rules and catalogue left out; an empty text: none. */
void spurion_config_difference(char *out, size_t size, const spurion_config *a, const spurion_config *b);
/* Prints a commented example of every key with its default and meaning. */
void spurion_config_example(FILE *out);

#endif

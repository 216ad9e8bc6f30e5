/* Writing of answers; see dialect.h. */
#include "daemon/dialect.h"

#include <math.h>
#include <string.h>

static void put(spurion_text *t, const char *text)
{
    spurion_text_add(t, text, strlen(text));
}

/* The number that the trainer gets. */
static float reward_of(const spurion_ask *ask, const spurion_verdict *v, spurion_http_reward reward)
{
    float value = reward == SPURION_HTTP_CLEAN ? v->reward : reward == SPURION_HTTP_COUNTERFACTUAL ? v->counterfactual_reward : v->action_reward;

    return ask->squash ? (float)(1.0 / (1.0 + exp(-(double)value))) : value;
}

static void put_model(spurion_text *t, const spurion_ask *ask)
{
    spurion_json_put_string(t, ask->model.data != NULL ? ask->model : spurion_bytes_of("spurion"));
}

/* What every answer says of a rollout beside its reward. */
static void put_evidence(spurion_text *t, const spurion_ask *ask, const spurion_verdict *v, int32_t i)
{
    put(t, ",\"clean_reward\":");
    spurion_json_put_float(t, v->reward);
    put(t, ",\"counterfactual_reward\":");
    spurion_json_put_float(t, v->counterfactual_reward);
    put(t, ",\"effect\":");
    spurion_json_put_float(t, v->effect);
    spurion_text_print(t, ",\"flagged\":%s,\"action\":\"%s\",\"action_weight\":", v->flag_count > 0 ? "true" : "false",
                       spurion_action_name((int)v->action));
    spurion_json_put_float(t, v->action_weight);
    spurion_text_print(t, ",\"truncated\":%s,\"n_tokens\":%d,\"scored_token_index\":%d,\"divided\":%s,\"step\":%lld,\"group\":",
                       v->truncated ? "true" : "false", v->token_count, v->scored_position, ask->divided[i] ? "true" : "false",
                       (long long)v->step);
    spurion_json_put_string(t, v->group);
    put(t, ",\"rollout\":");
    spurion_json_put_string(t, v->id);
}

/* ---- OpenRLHF: lists side by side; extra_logs takes one number for each rollout, under the same keys always ---- */

typedef float (*number_of)(const spurion_verdict *v);

static float clean(const spurion_verdict *v) { return v->reward; }
static float counterfactual(const spurion_verdict *v) { return v->counterfactual_reward; }
static float effect(const spurion_verdict *v) { return v->effect; }
static float flagged(const spurion_verdict *v) { return v->flag_count > 0 ? 1.0f : 0.0f; }
static float weight(const spurion_verdict *v) { return v->action_weight; }
static float truncated(const spurion_verdict *v) { return v->truncated ? 1.0f : 0.0f; }
static float tokens(const spurion_verdict *v) { return (float)v->token_count; }
static float scored(const spurion_verdict *v) { return (float)v->scored_position; }

static void put_rewards(spurion_text *t, const spurion_ask *ask, const spurion_verdict *verdicts, spurion_http_reward reward)
{
    put(t, "[");
    for (int32_t i = 0; i < ask->count; i++) {
        put(t, i > 0 ? "," : "");
        spurion_json_put_float(t, reward_of(ask, &verdicts[i], reward));
    }
    put(t, "]");
}

static void write_openrlhf(spurion_text *t, const spurion_ask *ask, const spurion_verdict *verdicts, spurion_http_reward reward)
{
    static const struct {
        const char *name;
        number_of of;
    } logs[] = {{"clean_reward", clean}, {"counterfactual_reward", counterfactual}, {"effect", effect}, {"flagged", flagged},
                {"action_weight", weight}, {"truncated", truncated}, {"n_tokens", tokens}, {"scored_token_index", scored}};

    put(t, "{\"rewards\":");
    put_rewards(t, ask, verdicts, reward);
    put(t, ",\"scores\":");
    put_rewards(t, ask, verdicts, reward);
    put(t, ",\"extra_logs\":{");
    for (size_t k = 0; k < sizeof logs / sizeof *logs; k++) {
        spurion_text_print(t, "\"spurion_%s\":[", logs[k].name);
        for (int32_t i = 0; i < ask->count; i++) {
            put(t, i > 0 ? "," : "");
            spurion_json_put_float(t, logs[k].of(&verdicts[i]));
        }
        put(t, "],");
    }
    put(t, "\"spurion_divided\":[");
    for (int32_t i = 0; i < ask->count; i++) {
        spurion_text_print(t, "%s%d", i > 0 ? "," : "", ask->divided[i]);
    }
    put(t, "]}}");
}

/* ---- the others ---- */

static void write_slime(spurion_text *t, const spurion_ask *ask, const spurion_verdict *v, spurion_http_reward reward)
{
    if (ask->dialect == SPURION_DIALECT_SLIME) {
        spurion_json_put_float(t, reward_of(ask, v, reward));
        return;
    }
    put(t, "{\"reward\":");
    spurion_json_put_float(t, reward_of(ask, v, reward));
    put_evidence(t, ask, v, 0);
    put(t, "}");
}

static void put_usage(spurion_text *t, const spurion_ask *ask, const spurion_verdict *verdicts)
{
    long long sum = 0;

    for (int32_t i = 0; i < ask->count; i++) {
        sum += verdicts[i].token_count;
    }
    spurion_text_print(t, "\"usage\":{\"prompt_tokens\":%lld,\"total_tokens\":%lld,\"completion_tokens\":0,\"prompt_tokens_details\":null}", sum,
                       sum);
}

/* One entry of data, as each of the three lists has it. */
static void put_entry(spurion_text *t, const spurion_ask *ask, const spurion_verdict *v, int32_t i, spurion_http_reward reward)
{
    spurion_text_print(t, "{\"index\":%d,", i);
    put(t, ask->dialect == SPURION_DIALECT_EMBEDDINGS ? "\"object\":\"embedding\",\"embedding\":["
           : ask->dialect == SPURION_DIALECT_POOLING  ? "\"object\":\"pooling\",\"data\":["
                                                      : "\"label\":\"LABEL_0\",\"probs\":[");
    spurion_json_put_float(t, reward_of(ask, v, reward));
    put(t, "]");
    if (ask->dialect == SPURION_DIALECT_CLASSIFY || ask->dialect == SPURION_DIALECT_V1_CLASSIFY) {
        put(t, ",\"num_classes\":1");
    }
    put_evidence(t, ask, v, i);
    put(t, "}");
}

static void write_list(spurion_text *t, const spurion_ask *ask, const spurion_verdict *verdicts, spurion_http_reward reward, int64_t created_s)
{
    put(t, "{");
    if (ask->dialect != SPURION_DIALECT_EMBEDDINGS) {
        put(t, "\"id\":");
        spurion_json_put_string(t, ask->request_id.data != NULL ? ask->request_id
                                                                : spurion_bytes_of(ask->dialect == SPURION_DIALECT_POOLING ? "pool-spurion"
                                                                                                                           : "classify-spurion"));
        spurion_text_print(t, ",\"created\":%lld,", (long long)created_s);
    }
    put(t, "\"object\":\"list\",\"model\":");
    put_model(t, ask);
    put(t, ",\"data\":[");
    for (int32_t i = 0; i < ask->count; i++) {
        put(t, i > 0 ? "," : "");
        put_entry(t, ask, &verdicts[i], i, reward);
    }
    put(t, "],");
    put_usage(t, ask, verdicts);
    put(t, "}");
}

/* SGLang: a list, or the object alone for a text alone. */
static void write_sglang(spurion_text *t, const spurion_ask *ask, const spurion_verdict *verdicts, spurion_http_reward reward)
{
    put(t, ask->single ? "" : "[");
    for (int32_t i = 0; i < ask->count; i++) {
        put(t, i > 0 ? ",{\"embedding\":[" : "{\"embedding\":[");
        spurion_json_put_float(t, reward_of(ask, &verdicts[i], reward));
        put(t, "],\"meta_info\":{\"id\":");
        spurion_json_put_string(t, ask->request_id.data != NULL ? ask->request_id : verdicts[i].id);
        spurion_text_print(t, ",\"prompt_tokens\":%d", verdicts[i].token_count);
        put_evidence(t, ask, &verdicts[i], i);
        put(t, "}}");
    }
    put(t, ask->single ? "" : "]");
}

static void write_tei(spurion_text *t, const spurion_ask *ask, const spurion_verdict *verdicts, spurion_http_reward reward)
{
    put(t, ask->single ? "" : "[");
    for (int32_t i = 0; i < ask->count; i++) {
        put(t, i > 0 ? ",[{\"score\":" : "[{\"score\":");
        spurion_json_put_float(t, reward_of(ask, &verdicts[i], reward));
        put(t, ",\"label\":\"LABEL_0\"");
        put_evidence(t, ask, &verdicts[i], i);
        put(t, "}]");
    }
    put(t, ask->single ? "" : "]");
}

void spurion_ask_write(spurion_text *out, const spurion_ask *ask, const spurion_verdict *verdicts, spurion_http_reward reward, int64_t created_s)
{
    switch (ask->dialect) {
    case SPURION_DIALECT_OPENRLHF: write_openrlhf(out, ask, verdicts, reward); break;
    case SPURION_DIALECT_SLIME:
    case SPURION_DIALECT_SLIME_VERDICT: write_slime(out, ask, &verdicts[0], reward); break;
    case SPURION_DIALECT_SGLANG_CLASSIFY: write_sglang(out, ask, verdicts, reward); break;
    case SPURION_DIALECT_PREDICT: write_tei(out, ask, verdicts, reward); break;
    default: write_list(out, ask, verdicts, reward, created_s); break;
    }
}

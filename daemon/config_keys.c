/* The rows of the configuration table, and reading and writing of one value; see config_keys.h.
 * Thread: any. Memory: texts in the configuration's arena. */
#include "daemon/config_keys.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(sizeof(spurion_dtype) == sizeof(unsigned) && sizeof(spurion_direction) == sizeof(unsigned), "enums are ints here");

static const char *const dtypes[] = {"f32", "bf16", NULL};
static const char *const poolings[] = {"last", "last_non_pad", "first_eos", "mean", NULL};
static const char *const templates[] = {"none", "hh", "auto", "chatml", "qwen2", "qwen2.5", "smollm2", "llama3", "llama3.1", "gemma", "mistral",
                                        "tulu", "tulu2", "zephyr", "openassistant", NULL};
static const char *const too_long[] = {"refuse", "truncate_prompt", NULL};
static const char *const methods[] = {"grad", "ig", "none", NULL};
static const char *const whens[] = {"all", "flagged", NULL};
static const char *const ig_rules[] = {"midpoint", "left", NULL};
static const char *const scopes[] = {"completion", "all", NULL};
static const char *const directions[] = {"either", "raised", "lowered", NULL};
static const char *const rule_actions[] = {"log", "alert", "down_weight", "replace", "drop", NULL};
static const char *const http_rewards[] = {"clean", "counterfactual", "action", NULL};
static const char *const http_forms[] = {"endpoint", "plain", "templated", "verbatim", NULL};
static const char *const alert_modes[] = {"rate", "each", "none", NULL};
static const char *const formats[] = {"saelens", "dictionary_learning", "dictionary_learning:AutoEncoder",
                                      "dictionary_learning:AutoEncoderNew", "dictionary_learning:GatedAutoEncoder",
                                      "dictionary_learning:JumpReluAutoEncoder", "dictionary_learning:AutoEncoderTopK",
                                      "dictionary_learning:BatchTopKSAE", "dictionary_learning:MatryoshkaBatchTopKSAE",
                                      "sparsify", "gemma_scope", "llama_scope", "openai", "goodfire", NULL};

#define AT(field) offsetof(spurion_config, field)
#define NO_AUX SPURION_KEY_NO_AUX

static const spurion_key config_rows[] = {
    {"model", "path", SPURION_KEY_PATH, AT(model.path), NO_AUX, 0, 0, NULL, NULL, "models/demo-rm",
     "directory of the reward model: config.json, *.safetensors, tokenizer.json (required)"},
    {"model", "dtype", SPURION_KEY_ENUM, AT(model.dtype), NO_AUX, 0, 0, dtypes, "f32", NULL, "type of weights and matrix inputs"},
    {"model", "head_index", SPURION_KEY_INT, AT(model.head_index), NO_AUX, 0, 65535, NULL, NULL, "0",
     "which output of a score head of several is the reward"},
    {"model", "head_weights", SPURION_KEY_TEXTS, AT(model.head_weights), AT(model.head_weight_count), 0, 0, NULL, NULL, "[0.7, 0.3]",
     "the reward is this weighted sum of the head's outputs, instead of one of them"},
    {"model", "pooling", SPURION_KEY_CHOICE, AT(model.pooling), NO_AUX, 0, 0, poolings, NULL, "last",
     "hidden state that the head reads; default: what the checkpoint says, else last"},
    {"model", "template", SPURION_KEY_ENUM, AT(model.template_kind), NO_AUX, 0, 0, templates, "none", NULL,
     "how prompt and completion, or messages, become one text; auto: the checkpoint's own chat_template"},
    {"model", "append_eos", SPURION_KEY_BOOL, AT(model.append_eos), NO_AUX, 0, 0, NULL, "false", NULL,
     "append config.json's eos_token_id to the completion, and score it"},
    {"model", "max_tokens", SPURION_KEY_INT, AT(model.max_tokens), NO_AUX, 0, SPURION_TOKENS_MAX, NULL, "0", NULL,
     "most tokens of prompt and completion; 0: the model's own context"},
    {"model", "on_too_long", SPURION_KEY_ENUM, AT(model.on_too_long), NO_AUX, 0, 0, too_long, "refuse", NULL,
     "refuse a longer rollout, or drop its oldest prompt tokens"},
    {"attribution", "method", SPURION_KEY_ENUM, AT(attribution.method), NO_AUX, 0, 0, methods, "grad", NULL,
     "gradient at the clean run, integrated gradients, or no attribution"},
    {"attribution", "when", SPURION_KEY_ENUM, AT(attribution.when), NO_AUX, 0, 0, whens, "all", NULL,
     "explain every rollout, or only those on which a rule fires"},
    {"attribution", "l0_mean", SPURION_KEY_ENUM, AT(attribution.l0_mean), NO_AUX, 0, 0, whens, "all", NULL,
     "measure l0_mean in every rollout, or only where features are explained: watched features are then looked at first, and the whole "
     "dictionary only where one of them could be active"},
    {"attribution", "ig_steps", SPURION_KEY_INT, AT(attribution.ig_steps), NO_AUX, 1, 1000, NULL, "10", NULL,
     "points on the path of integrated gradients"},
    {"attribution", "ig_rule", SPURION_KEY_ENUM, AT(attribution.ig_rule), NO_AUX, 0, 0, ig_rules, "midpoint", NULL,
     "where the points stand in their intervals"},
    {"attribution", "scope", SPURION_KEY_ENUM, AT(attribution.scope), NO_AUX, 0, 0, scopes, "completion", NULL,
     "positions that are explained and ablated; all: the prompt too"},
    {"attribution", "top", SPURION_KEY_INT, AT(attribution.top), NO_AUX, 0, SPURION_TOP_MAX, NULL, "32", NULL,
     "features listed in a verdict by |attribution|"},
    {"attribution", "completeness", SPURION_KEY_BOOL, AT(attribution.completeness), NO_AUX, 0, 0, NULL, "false", NULL,
     "measure baseline_reward and residual"},
    {"ablation", "each", SPURION_KEY_BOOL, AT(ablation_each), NO_AUX, 0, 0, NULL, "false", NULL,
     "ablation_effect of every active spurious feature, one by one"},
    {"", "catalogue", SPURION_KEY_PATH, AT(catalogue), NO_AUX, 0, 0, NULL, NULL, "catalogue.jsonl",
     "what people decided about features, JSON Lines"},
    {"", "labels", SPURION_KEY_PATH, AT(labels), NO_AUX, 0, 0, NULL, NULL, "labels.jsonl",
     "what others say about features (spurion labels import), JSON Lines"},
    {"reward", "sd", SPURION_KEY_NUMBER, AT(reward.sd), AT(reward.has_sd), 1e-30, 1e30, NULL, NULL, "1.9",
     "standard deviation of the run's rewards; makes effect_sd and effect_sd_min usable"},
    {"reward", "trainer_tolerance", SPURION_KEY_NUMBER, AT(reward.trainer_tolerance), NO_AUX, 0, 1e30, NULL, "0.02", NULL,
     "largest |trainer_reward - reward| without a warning, reward units"},
    {"engine", "device", SPURION_KEY_DEVICE, AT(engine.device), NO_AUX, 0, 0, NULL, "cpu", NULL, "cpu, or cuda:0, cuda:1, ..."},
    {"engine", "threads", SPURION_KEY_INT, AT(engine.threads), NO_AUX, 0, 1024, NULL, "0", NULL, "threads on the CPU; 0: all cores"},
    {"engine", "tokens_max", SPURION_KEY_INT, AT(engine.tokens_max), NO_AUX, 1, 1 << 24, NULL, "16384", NULL,
     "tokens of one micro-batch"},
    {"engine", "memory_max", SPURION_KEY_SIZE, AT(engine.memory_max), NO_AUX, 0, 0, NULL, "8GiB", NULL,
     "host memory that the engine may plan for: bytes, or KiB, MiB, GiB, TiB; with cuda:N the device's own free memory bounds its part"},
    {"engine", "batch_wait_ms", SPURION_KEY_INT, AT(engine.batch_wait_ms), NO_AUX, 0, 60000, NULL, "5", NULL,
     "longest wait for a fuller micro-batch"},
    {"engine", "group_wait_ms", SPURION_KEY_INT, AT(engine.group_wait_ms), NO_AUX, 0, 3600000, NULL, "2000", NULL,
     "longest wait for the missing members of a group"},
    {"engine", "step_wait_ms", SPURION_KEY_INT, AT(engine.step_wait_ms), NO_AUX, 100, 86400000, NULL, "300000", NULL,
     "a step without news for so long is closed"},
    {"engine", "queue_max", SPURION_KEY_SIZE, AT(engine.queue_max), NO_AUX, 0, 0, NULL, "64MiB", NULL,
     "memory of rollouts in flight, from accept to reply; callers beyond it are told to try again"},
    {"store", "path", SPURION_KEY_PATH, AT(store.path), NO_AUX, 0, 0, NULL, NULL, "var/spurion",
     "directory of the store (spuriond run; judge writes none)"},
    {"store", "keep_one_in", SPURION_KEY_INT, AT(store.keep_one_in), NO_AUX, 0, 1 << 30, NULL, "64", NULL,
     "of the rollouts without a flag one in so many is kept whole (1: all, 0: none); flagged ones always are"},
    {"store", "replies_for_s", SPURION_KEY_INT, AT(store.replies_for_s), NO_AUX, 1, 604800, NULL, "600", NULL,
     "how long the answer under an idempotency key, or to an HTTP request, is remembered"},
    {"listen", "rpc", SPURION_KEY_URLS, AT(listen.rpc), AT(listen.rpc_count), 0, 0, NULL, NULL, "[ipc://var/spurion.sock]",
     "where calls are answered"},
    {"listen", "rollouts", SPURION_KEY_URLS, AT(listen.rollouts), AT(listen.rollouts_count), 0, 0, NULL, NULL,
     "[tcp://127.0.0.1:7801]", "where trainer processes dial in with rollouts"},
    {"listen", "alerts", SPURION_KEY_URLS, AT(listen.alerts), AT(listen.alerts_count), 0, 0, NULL, NULL, "[tcp://127.0.0.1:7802]",
     "where alerts are published"},
    {"listen", "http", SPURION_KEY_TEXT, AT(listen.http), NO_AUX, 0, 0, NULL, NULL, "127.0.0.1:7803",
     "reward endpoints, health and metrics, host:port"},
    {"http", "run", SPURION_KEY_TEXT, AT(http.run), NO_AUX, 0, 0, NULL, "http", NULL, "run of requests whose path names none (/run/NAME/...)"},
    {"http", "reward", SPURION_KEY_ENUM, AT(http.reward), NO_AUX, 0, 0, http_rewards, "clean", NULL,
     "reward that is answered where the path does not say (/clean/..., /counterfactual/..., /action/...)"},
    {"http", "token_file", SPURION_KEY_PATH, AT(http.token_file), NO_AUX, 0, 0, NULL, NULL, "token",
     "file of one or two bearer tokens; none: nobody is asked"},
    {"http", "body_max", SPURION_KEY_SIZE, AT(http.body_max), NO_AUX, 0, 0, NULL, "16MiB", NULL, "largest request"},
    {"http", "connections_max", SPURION_KEY_INT, AT(http.connections_max), NO_AUX, 1, 65536, NULL, "1024", NULL,
     "connections at a time; more wait"},
    {"http", "step_rollouts", SPURION_KEY_INT, AT(http.step_rollouts), NO_AUX, 1, 1 << 30, NULL, "1024", NULL,
     "rollouts over HTTP that make a step, since these requests name none"},
    {"http", "group_size", SPURION_KEY_INT, AT(http.group_size), NO_AUX, 0, SPURION_GROUP_SIZE_MAX, NULL, "0", NULL,
     "completions of a prompt that are waited for (engine.group_wait_ms); 0: a group ends with its request"},
    {"http", "text_form", SPURION_KEY_ENUM, AT(http.text_form), NO_AUX, 0, 0, http_forms, "endpoint", NULL,
     "what texts over HTTP are; endpoint: as its own server takes them"},
    {"http", "completion_after", SPURION_KEY_TEXT, AT(http.completion_after), NO_AUX, 0, 0, NULL, NULL, "'<|im_start|>assistant\\n'",
     "in a text that is not divided the completion begins after the last of these; none: after the usual chat headers"},
};

#undef AT
#define AT(field) offsetof(spurion_sae_config, field)
static const spurion_key sae_rows[] = {
    {"saes", "id", SPURION_KEY_TEXT, AT(id), NO_AUX, 0, 0, NULL, NULL, "mid", "name of the SAE in catalogue and verdicts (required)"},
    {"saes", "path", SPURION_KEY_PATH, AT(path), NO_AUX, 0, 0, NULL, NULL, "saes/mid", "its file or directory (required)"},
    {"saes", "hook", SPURION_KEY_TEXT, AT(hook), NO_AUX, 0, 0, NULL, NULL, "blocks.2.hook_resid_post",
     "where it reads; may come from its file"},
    {"saes", "format", SPURION_KEY_CHOICE, AT(format), NO_AUX, 0, 0, formats, NULL, "saelens",
     "instead of what is found out; dictionary_learning:CLASS where its files do not say the class"},
    {"saes", "norm_factor", SPURION_KEY_NUMBER, AT(norm_factor), AT(has_norm_factor), 1e-12, 1e12, NULL, NULL, "0.37",
     "factor of a dataset-wise norm that stands in none of its files: sqrt(width) over the mean norm of its activations"},
    {"saes", "unit_decoder", SPURION_KEY_BOOL, AT(unit_decoder), NO_AUX, 0, 0, NULL, "false", NULL,
     "features in units of decoder rows of length 1 (AutoEncoder.from_pretrained, fold_W_dec_norm)"},
};

#undef AT
#define AT(field) offsetof(spurion_rule_config, field)
static const spurion_key rule_rows[] = {
    {"rules", "id", SPURION_KEY_TEXT, AT(id), NO_AUX, 0, 0, NULL, NULL, "url-lowers", "name of the rule (required)"},
    {"rules", "families", SPURION_KEY_TEXTS, AT(families), AT(family_count), 0, 0, NULL, NULL, "[url]",
     "families whose features it looks at; none: all spurious features"},
    {"rules", "direction", SPURION_KEY_ENUM, AT(direction), NO_AUX, 0, 0, directions, "either", NULL,
     "what the features did to the reward"},
    {"rules", "effect_min", SPURION_KEY_NUMBER, AT(effect_min), AT(has_effect_min), 0, 1e30, NULL, NULL, "0.5",
     "least |effect|, reward units"},
    {"rules", "effect_sd_min", SPURION_KEY_NUMBER, AT(effect_sd_min), AT(has_effect_sd_min), 0, 1e30, NULL, NULL, "0.25",
     "least |effect| in units of reward.sd"},
    {"rules", "advantage_flip", SPURION_KEY_BOOL, AT(advantage_flip), NO_AUX, 0, 0, NULL, "false", NULL,
     "the advantage changes its sign without the features"},
    {"rules", "alert", SPURION_KEY_ENUM, AT(alert), NO_AUX, 0, 0, alert_modes, "rate", NULL,
     "one alert per step about the rate, one per flagged rollout, or none"},
    {"rules", "rate_max", SPURION_KEY_NUMBER, AT(rate_max), NO_AUX, 0, 1, NULL, "0.01", NULL, "flagged share of a step that is tolerated"},
    {"rules", "alpha", SPURION_KEY_NUMBER, AT(alpha), NO_AUX, 1e-12, 0.5, NULL, "0.001", NULL,
     "chance of a false rate alert over the whole run"},
    {"rules", "action", SPURION_KEY_ENUM, AT(action), NO_AUX, 0, 0, rule_actions, "alert", NULL,
     "what a flag asks for; log: recorded and never alerted; from down_weight on the trainer acts"},
    {"rules", "weight", SPURION_KEY_NUMBER, AT(weight), NO_AUX, 0, 1, NULL, "0.5", NULL, "weight of a flagged rollout with action down_weight"},
};
#undef AT

spurion_keys spurion_config_keys(void)
{
    return (spurion_keys){config_rows, (int)(sizeof config_rows / sizeof *config_rows)};
}

spurion_keys spurion_sae_keys(void)
{
    return (spurion_keys){sae_rows, (int)(sizeof sae_rows / sizeof *sae_rows)};
}

spurion_keys spurion_rule_keys(void)
{
    return (spurion_keys){rule_rows, (int)(sizeof rule_rows / sizeof *rule_rows)};
}

static void *field(void *base, size_t offset)
{
    return (unsigned char *)base + offset;
}

static const void *field_of(const void *base, size_t offset)
{
    return (const unsigned char *)base + offset;
}

static spurion_status no_memory(void)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected memory for the configuration, found none");
}

static spurion_status expected(const char *what, const char *found)
{
    return spurion_error(SPURION_INVALID_ARGUMENT, "expected %s, found '%.80s'", what, found);
}

/* A decimal number with nothing around it: no hexadecimal, infinity or NaN, which strtod would take. */
static bool decimal(double *out, const char *text)
{
    char *end;

    if (!*text || strspn(text, "+-0123456789.eE") != strlen(text)) {
        return false;
    }
    *out = strtod(text, &end);
    return !*end && isfinite(*out);
}

static spurion_status read_int(int *out, const spurion_key *key, const char *text)
{
    char what[80], *end;
    long value;

    (void)snprintf(what, sizeof what, "a whole number from %.0f to %.0f", key->low, key->high);
    errno = 0;
    value = strtol(text, &end, 10);
    if (end == text || *end || isspace((unsigned char)*text) || errno || value < (long)key->low || value > (long)key->high) {
        return expected(what, text);
    }
    *out = (int)value;
    return spurion_ok();
}

static spurion_status read_number(double *out, const spurion_key *key, const char *text)
{
    char what[80];
    double value;

    if (!decimal(&value, text) || value < key->low || value > key->high) {
        (void)snprintf(what, sizeof what, "a number from %g to %g", key->low, key->high);
        return expected(what, text);
    }
    *out = value;
    return spurion_ok();
}

static spurion_status read_bool(bool *out, const char *text)
{
    static const char *const yes[] = {"true", "True", "TRUE"}, *const no[] = {"false", "False", "FALSE"};

    for (int i = 0; i < 3; i++) {
        if (!strcmp(text, yes[i]) || !strcmp(text, no[i])) {
            *out = !strcmp(text, yes[i]);
            return spurion_ok();
        }
    }
    return expected("true or false", text);
}

static spurion_status read_size(uint64_t *out, const char *text)
{
    static const char *const units[] = {"", "KiB", "MiB", "GiB", "TiB"};
    char *end;
    unsigned long long value;

    errno = 0;
    value = strtoull(text, &end, 10);
    if (isdigit((unsigned char)*text) && !errno && value) {
        end += *end == ' ';
        for (unsigned i = 0; i < sizeof units / sizeof *units; i++) {
            if (!strcmp(end, units[i]) && value <= UINT64_MAX >> (10 * i)) {
                *out = (uint64_t)value << (10 * i);
                return spurion_ok();
            }
        }
    }
    return expected("a size above 0 such as 8GiB, 512MiB or 1000000 (bytes)", text);
}

/* Place of text in the NULL-terminated choices, or -1 with the message made. */
static int choice(spurion_status *st, const char *const *choices, const char *text)
{
    char what[SPURION_MESSAGE_BYTES - 100] = "";
    size_t used = 0;

    for (int i = 0; choices[i]; i++) {
        if (!strcmp(choices[i], text)) {
            *st = spurion_ok();
            return i;
        }
        if (used < sizeof what) {
            used += (size_t)snprintf(what + used, sizeof what - used, "%s%s", i == 0 ? "" : choices[i + 1] ? ", " : " or ", choices[i]);
        }
    }
    *st = expected(what, text);
    return -1;
}

static spurion_status read_text(const char **out, spurion_key_target target, const spurion_key *key, const char *text)
{
    size_t size = strlen(text);

    if (size == 0) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "expected a text, found an empty one");
    }
    for (size_t i = 0; i < size; i++) {
        if ((unsigned char)text[i] < 0x20 || text[i] == 0x7f) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "expected a text without control characters, found byte 0x%02x",
                                 (unsigned char)text[i]);
        }
    }
    if (key->kind == SPURION_KEY_TEXT && size > SPURION_NAME_BYTES_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "expected at most %d bytes, found %zu", SPURION_NAME_BYTES_MAX, size);
    }
    if (key->kind == SPURION_KEY_PATH && text[0] != '/') {
        *out = spurion_arena_printf(target.arena, "%s/%s", target.folder, text);
    } else {
        *out = spurion_arena_copy(target.arena, text, size);
    }
    return *out ? spurion_ok() : no_memory();
}

static spurion_status read_device(const char **out, spurion_key_target target, const char *text)
{
    size_t digits = !strncmp(text, "cuda:", 5) ? strspn(text + 5, "0123456789") : 0;

    if (strcmp(text, "cpu") != 0 && !(digits >= 1 && digits <= 3 && !text[5 + digits])) {
        return expected("cpu or cuda:N", text);
    }
    *out = spurion_arena_copy(target.arena, text, strlen(text));
    return *out ? spurion_ok() : no_memory();
}

static spurion_status read_url(const char **out, spurion_key_target target, const char *text)
{
    bool ipc = !strncmp(text, "ipc://", 6);

    if ((!ipc && strncmp(text, "tcp://", 6) != 0) || !text[6]) {
        return expected("a URL ipc://PATH or tcp://HOST:PORT", text);
    }
    *out = ipc && text[6] != '/' ? spurion_arena_printf(target.arena, "ipc://%s/%s", target.folder, text + 6)
                                 : spurion_arena_copy(target.arena, text, strlen(text));
    return *out ? spurion_ok() : no_memory();
}

static spurion_status read_list(spurion_key_target target, const spurion_key *key, spurion_key_value value)
{
    const char **texts = spurion_arena_take_array(target.arena, (size_t)value.count, sizeof *texts);
    int32_t count = value.count;
    spurion_status st = spurion_ok();

    if (!texts) {
        return no_memory();
    }
    for (int i = 0; i < value.count && st.code == SPURION_OK; i++) {
        st = key->kind == SPURION_KEY_URLS ? read_url(&texts[i], target, value.texts[i])
                                           : read_text(&texts[i], target, key, value.texts[i]);
    }
    if (st.code == SPURION_OK) {
        memcpy(field(target.base, key->offset), &(const char **){count ? texts : NULL}, sizeof texts);
        memcpy(field(target.base, key->aux), &count, sizeof count);
    }
    return st;
}

spurion_status spurion_key_read(spurion_key_target target, const spurion_key *key, spurion_key_value value)
{
    bool list = key->kind == SPURION_KEY_TEXTS || key->kind == SPURION_KEY_URLS;
    bool number = key->kind == SPURION_KEY_INT || key->kind == SPURION_KEY_NUMBER || key->kind == SPURION_KEY_BOOL;
    void *place = field(target.base, key->offset);
    spurion_status st;
    int at;

    if (value.list != list) {
        return spurion_error(SPURION_INVALID_ARGUMENT, list ? "expected a list, found '%.80s'" : "expected one value, found a list",
                             value.count ? value.texts[0] : "");
    }
    if (list) {
        return read_list(target, key, value);
    }
    if (number && value.quoted) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "expected a %s, found the text \"%.80s\"",
                             key->kind == SPURION_KEY_BOOL ? "truth value" : "number", value.texts[0]);
    }
    switch (key->kind) {
    case SPURION_KEY_TEXT:
    case SPURION_KEY_PATH: return read_text(place, target, key, value.texts[0]);
    case SPURION_KEY_DEVICE: return read_device(place, target, value.texts[0]);
    case SPURION_KEY_BOOL: return read_bool(place, value.texts[0]);
    case SPURION_KEY_INT: return read_int(place, key, value.texts[0]);
    case SPURION_KEY_SIZE: return read_size(place, value.texts[0]);
    case SPURION_KEY_CHOICE:
        at = choice(&st, key->choices, value.texts[0]);
        if (at >= 0) {
            memcpy(place, &key->choices[at], sizeof key->choices[at]);
        }
        return st;
    case SPURION_KEY_ENUM:
        at = choice(&st, key->choices, value.texts[0]);
        if (at >= 0) {
            memcpy(place, &(unsigned){(unsigned)at}, sizeof(unsigned));
        }
        return st;
    case SPURION_KEY_NUMBER:
        st = read_number(place, key, value.texts[0]);
        if (st.code == SPURION_OK && key->aux != NO_AUX) {
            *(bool *)field(target.base, key->aux) = true;
        }
        return st;
    default: break;
    }
    return spurion_error(SPURION_INTERNAL, "expected a kind of key, found %d", (int)key->kind);
}

spurion_status spurion_key_defaults(spurion_key_target target, spurion_keys keys)
{
    spurion_status st = spurion_ok();

    for (int i = 0; i < keys.count && st.code == SPURION_OK; i++) {
        if (keys.keys[i].standard) {
            st = spurion_key_read(target, &keys.keys[i], (spurion_key_value){&keys.keys[i].standard, 1, false, false});
        }
    }
    return st;
}

bool spurion_key_given(const void *base, const spurion_key *key)
{
    const void *place = field_of(base, key->offset);

    switch (key->kind) {
    case SPURION_KEY_TEXT:
    case SPURION_KEY_PATH:
    case SPURION_KEY_CHOICE:
    case SPURION_KEY_DEVICE: return *(const char *const *)place != NULL;
    case SPURION_KEY_INT: return *(const int *)place >= 0;
    case SPURION_KEY_NUMBER: return key->aux == NO_AUX || *(const bool *)field_of(base, key->aux);
    case SPURION_KEY_TEXTS:
    case SPURION_KEY_URLS: return *(const int32_t *)field_of(base, key->aux) > 0;
    default: return true;
    }
}

/* A double-quoted YAML scalar. Texts hold no control characters (read_text). */
static void print_text(FILE *out, const char *text)
{
    (void)fputc('"', out);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') {
            (void)fputc('\\', out);
        }
        (void)fputc(*text, out);
    }
    (void)fputc('"', out);
}

static void print_number(FILE *out, double value)
{
    char text[40];

    for (int digits = 6; digits <= 17; digits++) {
        (void)snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value) {
            break;
        }
    }
    (void)fputs(text, out);
}

static void print_size(FILE *out, uint64_t value)
{
    static const char *const units[] = {"", "KiB", "MiB", "GiB", "TiB"};
    int unit = 0;

    while (unit < 4 && value && value % 1024 == 0) {
        value /= 1024;
        unit++;
    }
    (void)fprintf(out, "%llu%s", (unsigned long long)value, units[unit]);
}

void spurion_key_print(FILE *out, const void *base, const spurion_key *key)
{
    const void *place = field_of(base, key->offset);
    unsigned at;

    switch (key->kind) {
    case SPURION_KEY_TEXT:
    case SPURION_KEY_PATH: print_text(out, *(const char *const *)place); break;
    case SPURION_KEY_CHOICE:
    case SPURION_KEY_DEVICE: (void)fputs(*(const char *const *)place, out); break;
    case SPURION_KEY_ENUM:
        memcpy(&at, place, sizeof at);
        (void)fputs(key->choices[at], out);
        break;
    case SPURION_KEY_BOOL: (void)fputs(*(const bool *)place ? "true" : "false", out); break;
    case SPURION_KEY_INT: (void)fprintf(out, "%d", *(const int *)place); break;
    case SPURION_KEY_NUMBER: print_number(out, *(const double *)place); break;
    case SPURION_KEY_SIZE: print_size(out, *(const uint64_t *)place); break;
    case SPURION_KEY_TEXTS:
    case SPURION_KEY_URLS:
        (void)fputc('[', out);
        for (int32_t i = 0; i < *(const int32_t *)field_of(base, key->aux); i++) {
            (void)fputs(i ? ", " : "", out);
            print_text(out, (*(const char *const *const *)place)[i]);
        }
        (void)fputc(']', out);
        break;
    }
}

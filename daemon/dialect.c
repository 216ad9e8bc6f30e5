/* Reading of what is asked; see dialect.h. */
#include "daemon/dialect.h"

#include <string.h>

#include "spurion/json_scan.h"
#include "spurion/limits.h"
#include "spurion/nearest.h"

typedef enum field {
    QUERY, PROMPTS, LABELS, PROMPT, RESPONSE, LABEL, MODEL, INPUT, MESSAGES, TEXT, USE_ACTIVATION, ACTIVATION, ADD_SPECIAL_TOKENS,
    TRUNCATE_PROMPT_TOKENS, TRUNCATION_SIDE, PRIORITY, REQUEST_ID, RID, USER, TASK, ENCODING_FORMAT, DIMENSIONS, INPUTS, TRUNCATE,
    TRUNCATION_DIRECTION, RAW_SCORES, FIELD_COUNT
} field;

static const char *const names[FIELD_COUNT] = {
    "query", "prompts", "labels", "prompt", "response", "label", "model", "input", "messages", "text", "use_activation", "activation",
    "add_special_tokens", "truncate_prompt_tokens", "truncation_side", "priority", "request_id", "rid", "user", "task", "encoding_format",
    "dimensions", "inputs", "truncate", "truncation_direction", "raw_scores"};

#define BIT(f) (UINT32_C(1) << (f))
#define VLLM_FIELDS                                                                                                                      \
    (BIT(MODEL) | BIT(INPUT) | BIT(MESSAGES) | BIT(USE_ACTIVATION) | BIT(ACTIVATION) | BIT(ADD_SPECIAL_TOKENS) | BIT(TRUNCATE_PROMPT_TOKENS) | \
     BIT(TRUNCATION_SIDE) | BIT(PRIORITY) | BIT(REQUEST_ID) | BIT(USER))

/* Fields that a dialect has. Every other one is refused: a field that is passed over is a wish that is not done. */
static const uint32_t allowed[] = {
    [SPURION_DIALECT_OPENRLHF] = BIT(QUERY) | BIT(PROMPTS) | BIT(LABELS),
    [SPURION_DIALECT_SLIME] = BIT(PROMPT) | BIT(RESPONSE) | BIT(LABEL),
    [SPURION_DIALECT_SLIME_VERDICT] = BIT(PROMPT) | BIT(RESPONSE) | BIT(LABEL),
    [SPURION_DIALECT_CLASSIFY] = VLLM_FIELDS | BIT(TEXT) | BIT(RID),
    [SPURION_DIALECT_V1_CLASSIFY] = VLLM_FIELDS | BIT(RID),
    [SPURION_DIALECT_POOLING] = VLLM_FIELDS | BIT(TASK) | BIT(ENCODING_FORMAT) | BIT(DIMENSIONS),
    [SPURION_DIALECT_EMBEDDINGS] = BIT(MODEL) | BIT(INPUT) | BIT(ENCODING_FORMAT) | BIT(DIMENSIONS) | BIT(USER) | BIT(RID) | BIT(PRIORITY),
    [SPURION_DIALECT_PREDICT] = BIT(INPUTS) | BIT(TRUNCATE) | BIT(TRUNCATION_DIRECTION) | BIT(RAW_SCORES)};

/* A request on its way in. */
typedef struct reader {
    spurion_ask *ask;
    const spurion_memory *m;
    const spurion_ask_options *options;
    spurion_json_value value[FIELD_COUNT];
} reader;

static bool given(spurion_json_value v)
{
    return v.kind != SPURION_JSON_NONE && v.kind != SPURION_JSON_NULL;
}

static spurion_status wrong(const char *name, const char *expected, spurion_json_value found)
{
    if (found.kind == SPURION_JSON_NUMBER || found.kind == SPURION_JSON_BOOL) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected %s, found %.*s", name, expected, found.size > 40 ? 40 : (int)found.size,
                             found.data);
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected %s, found %s", name, expected, spurion_json_kind_name(found.kind));
}

static spurion_status no_memory(void)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "request: expected memory for it, found the budget spent");
}

/* ---- members ---- */

static spurion_status unknown(const reader *r, spurion_json_value key)
{
    const char *words[FIELD_COUNT];
    char hint[96];
    spurion_bytes name;
    int count = 0;

    if (spurion_json_string(&name, r->m, key).code != SPURION_OK) {
        name = spurion_bytes_of("?");
    }
    for (int f = 0; f < FIELD_COUNT; f++) {
        if (allowed[r->ask->dialect] & BIT(f)) {
            words[count++] = names[f];
        }
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "expected a field of this endpoint, found unknown field '%.60s'%s", name.data,
                         spurion_nearest_hint(hint, sizeof hint, name.data, words, count));
}

static spurion_status sort_members(reader *r, spurion_json_value object)
{
    spurion_json_walk walk = spurion_json_enter(object);
    spurion_json_value key, value;

    while (spurion_json_next(&walk, &key, &value)) {
        int f = 0;
        while (f < FIELD_COUNT && !spurion_json_is(key, names[f])) {
            f++;
        }
        if (f == FIELD_COUNT || !(allowed[r->ask->dialect] & BIT(f))) {
            return unknown(r, key);
        }
        if (r->value[f].kind != SPURION_JSON_NONE) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected it once, found it again", names[f]);
        }
        r->value[f] = value;
    }
    return spurion_ok();
}

static spurion_status read_text(spurion_bytes *out, const reader *r, const char *name, spurion_json_value v)
{
    spurion_status st;

    if (v.kind != SPURION_JSON_STRING) {
        return wrong(name, "a text", v);
    }
    st = spurion_json_string(out, r->m, v);
    if (st.code != SPURION_OK) {
        return spurion_error((spurion_code)st.code, "%s: %s", name, st.message);
    }
    if (out->size > SPURION_TEXT_BYTES_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected at most %u bytes, found %zu", name, SPURION_TEXT_BYTES_MAX, out->size);
    }
    return st;
}

/* A text that is echoed. */
static spurion_status read_echo(spurion_bytes *out, const reader *r, field f)
{
    spurion_status st = spurion_ok();

    if (given(r->value[f])) {
        st = read_text(out, r, names[f], r->value[f]);
        if (st.code == SPURION_OK && out->size > 1024) {
            st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected at most 1024 bytes, found %zu", names[f], out->size);
        }
    }
    return st;
}

static spurion_status read_bool(bool *out, const reader *r, field f)
{
    spurion_json_value v = r->value[f];

    if (given(v)) {
        if (v.kind != SPURION_JSON_BOOL) {
            return wrong(names[f], "true or false", v);
        }
        *out = v.data[0] == 't';
    }
    return spurion_ok();
}

/* A field of which only one value can be done. */
static spurion_status only(const reader *r, field f, const char *word, const char *other)
{
    spurion_json_value v = r->value[f];

    if (!given(v) || (v.kind == SPURION_JSON_STRING && (spurion_json_is(v, word) || (other != NULL && spurion_json_is(v, other))))) {
        return spurion_ok();
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected %s, found %s", names[f], word,
                         v.kind == SPURION_JSON_STRING ? "another value" : spurion_json_kind_name(v.kind));
}

/* ---- where the completion begins ---- */

/* Headers that chat templates write before what the model says. */
static const char *const headers[] = {"\n\nAssistant:", "<|im_start|>assistant\n", "<|start_header_id|>assistant<|end_header_id|>\n\n",
                                      "<start_of_turn>model\n", "<|assistant|>\n", "[/INST]"};

/* End of the last header in text, or 0. */
static size_t after_last(spurion_bytes text, const char *header)
{
    size_t n = strlen(header);

    for (size_t at = text.size; n > 0 && at >= n; at--) {
        if (text.data[at - 1] == header[n - 1] && memcmp(text.data + at - n, header, n) == 0) {
            return at;
        }
    }
    return 0;
}

/* "\n" as two characters becomes a line end. */
static void unescape(char *out, size_t size, const char *in)
{
    size_t n = 0;

    for (; *in != '\0' && n + 1 < size; in++) {
        bool line = in[0] == '\\' && in[1] == 'n';
        out[n++] = line ? '\n' : *in;
        in += line;
    }
    out[n] = '\0';
}

static size_t find_completion(const reader *r, spurion_bytes text)
{
    char own[SPURION_NAME_BYTES_MAX + 1];
    size_t best = 0;

    if (r->options->completion_after != NULL) {
        unescape(own, sizeof own, r->options->completion_after);
        return after_last(text, own);
    }
    for (size_t i = 0; i < sizeof headers / sizeof *headers; i++) {
        size_t end = after_last(text, headers[i]);
        best = end > best ? end : best;
    }
    return best;
}

/* End of prompt in text where text begins with it, after at most a few bytes (a BOS that the trainer's tokenizer wrote), or 0. */
static size_t after_prompt(spurion_bytes text, spurion_bytes prompt)
{
    for (size_t at = 0; prompt.size > 0 && at <= 64 && at + prompt.size <= text.size; at++) {
        if (memcmp(text.data + at, prompt.data, prompt.size) == 0) {
            return at + prompt.size;
        }
    }
    return 0;
}

static spurion_text_form form_of(const reader *r, spurion_text_form endpoint)
{
    return r->options->form == SPURION_HTTP_FORM_ENDPOINT ? endpoint : (spurion_text_form)(r->options->form - 1);
}

/* A text that holds prompt and completion. prompt: absent, or what it is said to begin with. */
static void divide(reader *r, int32_t i, spurion_bytes text, spurion_bytes prompt, spurion_text_form form)
{
    spurion_rollout *out = &r->ask->rollouts[i];
    size_t at = after_prompt(text, prompt);

    if (at == 0) {
        at = find_completion(r, text);
    }
    r->ask->divided[i] = at > 0;
    r->ask->prompts[i] = (spurion_bytes){text.data, at};
    out->prompt = r->ask->prompts[i];
    out->completion = (spurion_bytes){text.data + at, text.size - at};
    out->text_form = form;
}

static spurion_status make_room(reader *r, size_t count)
{
    spurion_ask *a = r->ask;
    size_t n = count > 0 ? count : 1;

    if (count > SPURION_ASK_ROLLOUTS_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected at most %d texts, found %zu", a->field, SPURION_ASK_ROLLOUTS_MAX, count);
    }
    a->rollouts = r->m->take(r->m->context, n * sizeof *a->rollouts);
    a->divided = r->m->take(r->m->context, n * sizeof *a->divided);
    a->prompts = r->m->take(r->m->context, n * sizeof *a->prompts);
    if (a->rollouts == NULL || a->divided == NULL || a->prompts == NULL) {
        return no_memory();
    }
    memset(a->rollouts, 0, n * sizeof *a->rollouts);
    memset(a->divided, 0, n * sizeof *a->divided);
    memset(a->prompts, 0, n * sizeof *a->prompts);
    a->count = (int32_t)count;
    return spurion_ok();
}

static size_t length_of(spurion_json_value list)
{
    spurion_json_walk walk = spurion_json_enter(list);
    spurion_json_value item;
    size_t n = 0;

    while (spurion_json_next(&walk, NULL, &item)) {
        n++;
    }
    return n;
}

static void name_item(char out[64], const char *name, int32_t i)
{
    (void)snprintf(out, 64, "%s[%d]", name, i);
}

/* ---- token ids ---- */

/* Ids of a whole sequence: the completion is all of it. */
static spurion_status read_ids(reader *r, int32_t i, const char *name, spurion_json_value list)
{
    static const int32_t none[1];
    spurion_json_walk walk = spurion_json_enter(list);
    size_t n = length_of(list), at = 0;
    spurion_json_value item;
    int32_t *ids;
    int64_t id;

    if (n == 0 || n > SPURION_TOKENS_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected 1 to %d token ids, found %zu", name, SPURION_TOKENS_MAX, n);
    }
    ids = r->m->take(r->m->context, n * sizeof *ids);
    if (ids == NULL) {
        return no_memory();
    }
    while (spurion_json_next(&walk, NULL, &item)) {
        if (!spurion_json_int(&id, item) || id < 0 || id > INT32_MAX) {
            return wrong(name, "token ids from 0", item);
        }
        ids[at++] = (int32_t)id;
    }
    r->ask->rollouts[i].prompt_ids = none;
    r->ask->rollouts[i].completion_ids = ids;
    r->ask->rollouts[i].completion_id_count = (int32_t)n;
    return spurion_ok();
}

/* str | [str] | [int] | [[int]] */
static spurion_status read_inputs(reader *r, spurion_json_value v, spurion_text_form form)
{
    const spurion_bytes no_prompt = {NULL, 0};
    spurion_json_walk walk;
    spurion_json_value item = {SPURION_JSON_NONE, NULL, 0};
    spurion_bytes text;
    spurion_status st;
    char name[64];

    if (v.kind == SPURION_JSON_STRING) {
        r->ask->single = true;
        SPURION_TRY(st, make_room(r, 1));
        SPURION_TRY(st, read_text(&text, r, r->ask->field, v));
        divide(r, 0, text, no_prompt, form);
        return st;
    }
    if (v.kind != SPURION_JSON_ARRAY) {
        return wrong(r->ask->field, "a text, texts, token ids, or lists of token ids", v);
    }
    walk = spurion_json_enter(v);
    if (spurion_json_next(&walk, NULL, &item) && item.kind == SPURION_JSON_NUMBER) {
        r->ask->single = true;
        SPURION_TRY(st, make_room(r, 1));
        return read_ids(r, 0, r->ask->field, v);
    }
    SPURION_TRY(st, make_room(r, length_of(v)));
    walk = spurion_json_enter(v);
    for (int32_t i = 0; spurion_json_next(&walk, NULL, &item); i++) {
        name_item(name, r->ask->field, i);
        if (item.kind == SPURION_JSON_ARRAY) {
            SPURION_TRY(st, read_ids(r, i, name, item));
        } else {
            SPURION_TRY(st, read_text(&text, r, name, item));
            divide(r, i, text, no_prompt, form);
        }
    }
out:
    return st;
}

/* ---- vLLM and SGLang ---- */

/* A conversation, for the model's chat template (what stands in it is checked with the rollout, docs/verdict.md section 3). */
static spurion_status read_messages(reader *r)
{
    spurion_json_value v = r->value[MESSAGES], item, last = {SPURION_JSON_NONE, NULL, 0};
    spurion_json_walk walk;
    spurion_status st;
    bool add = false;
    char *copy;

    r->ask->field = "messages";
    r->ask->single = true;
    SPURION_TRY(st, read_bool(&add, r, ADD_SPECIAL_TOKENS));
    if (add) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "add_special_tokens: expected false with messages (the template has them), found true");
    }
    if (v.kind != SPURION_JSON_ARRAY) {
        return wrong("messages", "an array of role and content", v);
    }
    SPURION_TRY(st, make_room(r, 1));
    for (walk = spurion_json_enter(v); spurion_json_next(&walk, NULL, &item);) {
        last = item;
    }
    copy = r->m->take(r->m->context, v.size + 1);
    if (copy == NULL) {
        return no_memory();
    }
    memcpy(copy, v.data, v.size);
    copy[v.size] = '\0';
    r->ask->rollouts[0].messages = (spurion_bytes){copy, v.size};
    r->ask->prompts[0] = (spurion_bytes){copy, last.data != NULL ? (size_t)(last.data - v.data) : 0};
    r->ask->divided[0] = true;
out:
    return st;
}

/* Wishes about tokens that are dropped: the daemon's own configuration decides, so only what agrees with it is taken. */
static spurion_status read_truncation(const reader *r)
{
    spurion_json_value v = r->value[TRUNCATE_PROMPT_TOKENS];
    int64_t tokens = 0;

    if (given(v) && !(spurion_json_int(&tokens, v) && tokens == -1 && r->options->truncates)) {
        return wrong(names[TRUNCATE_PROMPT_TOKENS],
                     r->options->truncates ? "null or -1" : "null (model.on_too_long of this daemon is refuse)", v);
    }
    return only(r, TRUNCATION_SIDE, "left", NULL);
}

static spurion_status read_activation(const reader *r)
{
    bool named = given(r->value[USE_ACTIVATION]), old = given(r->value[ACTIVATION]), one = false, two = false;
    spurion_status st;

    SPURION_TRY(st, read_bool(&one, r, USE_ACTIVATION));
    SPURION_TRY(st, read_bool(&two, r, ACTIVATION));
    if (named && old && one != two) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "use_activation, activation: expected the same of both, found true and false");
    }
    r->ask->squash = one || two;
out:
    return st;
}

static spurion_status read_common(const reader *r)
{
    spurion_json_value priority = r->value[PRIORITY], dimensions = r->value[DIMENSIONS];
    int64_t number;
    spurion_bytes user;
    spurion_status st;

    SPURION_TRY(st, read_echo(&r->ask->model, r, MODEL));
    SPURION_TRY(st, read_echo(&r->ask->request_id, r, given(r->value[REQUEST_ID]) ? REQUEST_ID : RID));
    SPURION_TRY(st, read_echo(&user, r, USER));
    SPURION_TRY(st, read_activation(r));
    SPURION_TRY(st, read_truncation(r));
    if (given(priority) && !spurion_json_int(&number, priority)) {
        return wrong("priority", "a whole number", priority);
    }
    if (given(dimensions)) {
        return wrong("dimensions", "none (a reward is one number)", dimensions);
    }
    SPURION_TRY(st, only(r, ENCODING_FORMAT, "float", NULL));
    SPURION_TRY(st, only(r, TASK, "classify", NULL));
out:
    return st;
}

static spurion_status read_vllm(reader *r)
{
    bool add = true, text = given(r->value[TEXT]), input = given(r->value[INPUT]), messages = given(r->value[MESSAGES]);
    spurion_status st;

    SPURION_TRY(st, read_common(r));
    if (text + input + messages != 1) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "input: expected it%s%s, found %s",
                             allowed[r->ask->dialect] & BIT(MESSAGES) ? " or messages" : "",
                             allowed[r->ask->dialect] & BIT(TEXT) ? " or text" : "", text + input + messages == 0 ? "none" : "more than one");
    }
    if (messages) {
        return read_messages(r);
    }
    SPURION_TRY(st, read_bool(&add, r, ADD_SPECIAL_TOKENS));
    if (text) {
        r->ask->dialect = SPURION_DIALECT_SGLANG_CLASSIFY;
    }
    r->ask->field = text ? "text" : "input";
    return read_inputs(r, r->value[text ? TEXT : INPUT], form_of(r, add ? SPURION_FORM_TEMPLATED : SPURION_FORM_VERBATIM));
out:
    return st;
}

/* ---- OpenRLHF and slime ---- */

static spurion_status read_openrlhf(reader *r)
{
    spurion_json_value query = r->value[QUERY], prompts = r->value[PROMPTS], labels = r->value[LABELS], item, told;
    spurion_json_walk walk, beside = {NULL, NULL};
    spurion_bytes text, prompt;
    spurion_status st;
    char name[64];

    r->ask->field = "query";
    if (query.kind != SPURION_JSON_ARRAY) {
        return wrong("query", "a list of texts", query);
    }
    SPURION_TRY(st, make_room(r, length_of(query)));
    if (given(prompts) && (prompts.kind != SPURION_JSON_ARRAY || (length_of(prompts) != (size_t)r->ask->count && length_of(prompts) != 0))) {
        return wrong("prompts", "a list as long as query", prompts);
    }
    if (given(labels) && (labels.kind != SPURION_JSON_ARRAY || (length_of(labels) != (size_t)r->ask->count && length_of(labels) != 0))) {
        return wrong("labels", "a list as long as query", labels);
    }
    if (given(prompts)) {
        beside = spurion_json_enter(prompts);
    }
    walk = spurion_json_enter(query);
    for (int32_t i = 0; spurion_json_next(&walk, NULL, &item); i++) {
        name_item(name, "query", i);
        SPURION_TRY(st, read_text(&text, r, name, item));
        prompt = (spurion_bytes){NULL, 0};
        if (beside.at != NULL && spurion_json_next(&beside, NULL, &told) && given(told)) {
            name_item(name, "prompts", i);
            SPURION_TRY(st, read_text(&prompt, r, name, told));
        }
        divide(r, i, text, prompt, form_of(r, SPURION_FORM_VERBATIM));
    }
out:
    return st;
}

/* Prompt and completion as two texts. */
static spurion_status read_pair(reader *r, int32_t i, const char *first, spurion_json_value a, const char *second, spurion_json_value b)
{
    spurion_rollout *out = &r->ask->rollouts[i];
    spurion_status st = read_text(&out->prompt, r, first, a);

    if (st.code == SPURION_OK) {
        st = read_text(&out->completion, r, second, b);
    }
    out->text_form = form_of(r, SPURION_FORM_PLAIN);
    r->ask->prompts[i] = out->prompt;
    r->ask->divided[i] = true;
    return st;
}

static spurion_status read_slime(reader *r)
{
    spurion_status st;

    r->ask->field = "response";
    r->ask->single = true;
    SPURION_TRY(st, make_room(r, 1));
    SPURION_TRY(st, read_pair(r, 0, "prompt", r->value[PROMPT], "response", r->value[RESPONSE]));
out:
    return st;
}

/* ---- text-embeddings-inference ---- */

/* One sequence: "a" or ["a"] is a text, ["a","b"] prompt and completion. */
static spurion_status read_sequence(reader *r, int32_t i, const char *name, spurion_json_value v)
{
    const spurion_bytes no_prompt = {NULL, 0};
    spurion_json_value parts[2] = {v, v};
    size_t n = 1;
    spurion_bytes text;
    spurion_status st;

    if (v.kind == SPURION_JSON_ARRAY) {
        spurion_json_walk walk = spurion_json_enter(v);
        n = length_of(v);
        if (n < 1 || n > 2) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a text, or prompt and completion, found %zu texts", name, n);
        }
        (void)spurion_json_next(&walk, NULL, &parts[0]);
        (void)spurion_json_next(&walk, NULL, &parts[1]);
    }
    if (n == 2) {
        return read_pair(r, i, name, parts[0], name, parts[1]);
    }
    st = read_text(&text, r, name, parts[0]);
    if (st.code == SPURION_OK) {
        divide(r, i, text, no_prompt, form_of(r, SPURION_FORM_TEMPLATED));
    }
    return st;
}

static spurion_status read_tei(reader *r)
{
    spurion_json_value v = r->value[INPUTS], item = {SPURION_JSON_NONE, NULL, 0};
    spurion_json_walk walk;
    bool raw = true, truncate = false, batch;
    spurion_status st;
    char name[64];

    r->ask->field = "inputs";
    SPURION_TRY(st, read_bool(&raw, r, RAW_SCORES));
    SPURION_TRY(st, read_bool(&truncate, r, TRUNCATE));
    SPURION_TRY(st, only(r, TRUNCATION_DIRECTION, "left", "Left"));
    if (truncate && !r->options->truncates) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "truncate: expected false (model.on_too_long of this daemon is refuse), found true");
    }
    r->ask->squash = !raw;
    if (v.kind != SPURION_JSON_STRING && v.kind != SPURION_JSON_ARRAY) {
        return wrong("inputs", "a text, a pair, or a list of these", v);
    }
    walk = spurion_json_enter(v);
    batch = v.kind == SPURION_JSON_ARRAY && (!spurion_json_next(&walk, NULL, &item) || item.kind == SPURION_JSON_ARRAY);
    r->ask->single = !batch;
    SPURION_TRY(st, make_room(r, batch ? length_of(v) : 1));
    if (!batch) {
        return read_sequence(r, 0, "inputs", v);
    }
    walk = spurion_json_enter(v);
    for (int32_t i = 0; spurion_json_next(&walk, NULL, &item); i++) {
        name_item(name, "inputs", i);
        if (item.kind != SPURION_JSON_ARRAY) { /* beside lists, a text alone is a mistake */
            return wrong(name, "a list as the others are", item);
        }
        SPURION_TRY(st, read_sequence(r, i, name, item));
    }
out:
    return st;
}

spurion_status spurion_ask_read(spurion_ask *out, const spurion_memory *m, spurion_dialect dialect, spurion_bytes body,
                                const spurion_ask_options *options)
{
    reader r = {.ask = out, .m = m, .options = options};
    spurion_json_value object;
    spurion_status st;

    memset(out, 0, sizeof *out);
    out->dialect = dialect;
    out->field = "body";
    st = spurion_json_check(&object, body.data, body.size);
    if (st.code != SPURION_OK || object.kind != SPURION_JSON_OBJECT) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "body: expected a JSON object, found %s",
                             st.code != SPURION_OK ? st.message : spurion_json_kind_name(object.kind));
    }
    SPURION_TRY(st, sort_members(&r, object));
    switch (dialect) {
    case SPURION_DIALECT_OPENRLHF: return read_openrlhf(&r);
    case SPURION_DIALECT_SLIME:
    case SPURION_DIALECT_SLIME_VERDICT: return read_slime(&r);
    case SPURION_DIALECT_PREDICT: return read_tei(&r);
    default: return read_vllm(&r);
    }
out:
    return st;
}

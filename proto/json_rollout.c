/* One line to one rollout; see json.h. */
#include "spurion/json.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "spurion/json_scan.h"
#include "spurion/limits.h"
#include "spurion/nearest.h"

enum field { RUN, STEP, GROUP, ID, ATTEMPT, PROMPT, COMPLETION, PROMPT_IDS, COMPLETION_IDS, TRAINER_REWARD, TAGS, GROUP_SIZE, MESSAGES,
             TEXT_FORM, FIELD_COUNT };

static const char *const field_names[FIELD_COUNT] = {"run",        "step",           "group",          "id",   "attempt",   "prompt", "completion",
                                                     "prompt_ids", "completion_ids", "trainer_reward", "tags", "group_size", "messages",
                                                     "text_form"};

/* A name that is no field but close to one is a mistake that must not pass unseen; others (columns of a dataset) are left alone. */
static bool near_miss(spurion_json_value key)
{
    char word[64];
    size_t skip = key.size && key.data[0] == '"' ? 1 : 0, size = key.size > 2 * skip ? key.size - 2 * skip : 0;

    if (size == 0 || size >= sizeof word) {
        return false;
    }
    memcpy(word, key.data + skip, size);
    word[size] = '\0';
    return spurion_nearest(word, field_names, FIELD_COUNT) != NULL;
}

/* The members of a line by field. */
typedef struct line_fields {
    spurion_json_value value[FIELD_COUNT];
    spurion_json_value unknown; /* name of the first member that looks like a misspelt field */
} line_fields;

static char *copy(const spurion_memory *m, const char *data, size_t size)
{
    char *out = m->take(m->context, size + 1);
    if (out) {
        memcpy(out, data, size);
        out[size] = '\0';
    }
    return out;
}

static spurion_status wrong(const char *field, const char *expected, spurion_json_value found)
{
    if (found.kind == SPURION_JSON_NUMBER || found.kind == SPURION_JSON_STRING) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected %s, found %.*s%s", field, expected,
                             found.size > 60 ? (int)spurion_utf8_valid_prefix(found.data, 60) : (int)found.size, found.data,
                             found.size > 60 ? "..." : "");
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected %s, found %s", field, expected, spurion_json_kind_name(found.kind));
}

static spurion_status in_field(const char *field, spurion_status st)
{
    return st.code == SPURION_OK ? st : spurion_error((spurion_code)st.code, "%s: %s", field, st.message);
}

static void sort_members(line_fields *out, spurion_json_value object)
{
    spurion_json_walk walk = spurion_json_enter(object);
    spurion_json_value key, value;

    memset(out, 0, sizeof *out);
    while (spurion_json_next(&walk, &key, &value)) {
        int f = 0;
        while (f < FIELD_COUNT && !spurion_json_is(key, field_names[f])) {
            f++;
        }
        if (f < FIELD_COUNT) {
            out->value[f] = value; /* of members of one name the last counts */
        } else if (out->unknown.kind == SPURION_JSON_NONE && near_miss(key)) {
            out->unknown = key;
        }
    }
}

/* Absent and null are the same for optional fields. */
static bool given(spurion_json_value v)
{
    return v.kind != SPURION_JSON_NONE && v.kind != SPURION_JSON_NULL;
}

/* A name: text of 1..SPURION_NAME_BYTES_MAX bytes without control characters. *readable: it is text at all. */
static spurion_status read_name(spurion_bytes *out, bool *readable, const spurion_memory *m, const char *field, spurion_json_value v)
{
    spurion_status st;

    *readable = false;
    if (!given(v)) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a text, found none", field);
    }
    if (v.kind != SPURION_JSON_STRING) {
        return wrong(field, "a text", v);
    }
    st = spurion_json_string(out, m, v);
    if (st.code != SPURION_OK) {
        return in_field(field, st);
    }
    *readable = true;
    return spurion_name_check(*out, field);
}

static spurion_status read_whole(int64_t *out, bool *readable, const char *field, spurion_json_value v, int64_t high)
{
    char what[64];

    *readable = spurion_json_int(out, v);
    if (*readable && *out >= 0 && *out <= high) {
        return spurion_ok();
    }
    (void)snprintf(what, sizeof what, "a whole number from 0 to %lld", (long long)high);
    return wrong(field, what, v);
}

/* The names; the first fault is kept, and every name is read as far as it goes. */
static spurion_status read_names(spurion_rollout *r, bool *group_known, const spurion_memory *m, const spurion_bytes *run_given,
                                 const line_fields *fields)
{
    spurion_status faults[4], st = spurion_ok();
    bool run, step, group, id, attempt = true;
    int64_t number = 0;

    if (run_given) {
        faults[0] = spurion_ok();
        r->run = *run_given;
        run = true;
    } else {
        faults[0] = read_name(&r->run, &run, m, "run", fields->value[RUN]);
    }
    faults[1] = read_name(&r->group, &group, m, "group", fields->value[GROUP]);
    faults[2] = read_name(&r->id, &id, m, "id", fields->value[ID]);
    faults[3] = read_whole(&r->step, &step, "step", fields->value[STEP], INT64_MAX);
    *group_known = run && step && group;
    for (int i = 0; i < 4 && st.code == SPURION_OK; i++) {
        st = faults[i];
    }
    if (st.code == SPURION_OK && fields->value[ATTEMPT].kind != SPURION_JSON_NONE) {
        st = read_whole(&number, &attempt, "attempt", fields->value[ATTEMPT], INT32_MAX);
        r->attempt = (int32_t)number;
    }
    return st;
}

static spurion_status read_text(spurion_bytes *out, const spurion_memory *m, const char *field, spurion_json_value v)
{
    spurion_status st;

    if (!given(v)) {
        return spurion_ok();
    }
    if (v.kind != SPURION_JSON_STRING) {
        return wrong(field, "a text", v);
    }
    st = spurion_json_string(out, m, v);
    if (st.code == SPURION_OK && out->size > SPURION_TEXT_BYTES_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected at most %u bytes, found %zu", field, SPURION_TEXT_BYTES_MAX, out->size);
    }
    return in_field(field, st);
}

static spurion_status read_ids(const int32_t **out, int32_t *count, const spurion_memory *m, const char *field, spurion_json_value v)
{
    spurion_json_walk walk;
    spurion_json_value item;
    int32_t *ids;
    int64_t id;
    size_t n = 0;

    if (!given(v)) {
        return spurion_ok();
    }
    if (v.kind != SPURION_JSON_ARRAY) {
        return wrong(field, "a list of token ids", v);
    }
    for (walk = spurion_json_enter(v); spurion_json_next(&walk, NULL, &item); n++) {
        if (!spurion_json_int(&id, item) || id < 0 || id > INT32_MAX) {
            return wrong(field, "a list of token ids from 0", item);
        }
    }
    if (n > SPURION_TOKENS_MAX) {
        return spurion_error(SPURION_OUT_OF_RANGE, "%s: expected at most %d ids, found %zu", field, SPURION_TOKENS_MAX, n);
    }
    ids = m->take(m->context, (n ? n : 1) * sizeof *ids);
    if (!ids) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: expected memory for %zu ids, found the budget spent", field, n);
    }
    n = 0;
    for (walk = spurion_json_enter(v); spurion_json_next(&walk, NULL, &item);) {
        if (spurion_json_int(&id, item)) {
            ids[n++] = (int32_t)id;
        }
    }
    *out = ids;
    *count = (int32_t)n;
    return spurion_ok();
}

static spurion_status read_trainer_reward(spurion_rollout *r, spurion_json_value v)
{
    double value;

    if (!given(v)) {
        return spurion_ok();
    }
    if (!spurion_json_double(&value, v) || !isfinite(value) || fabs(value) > (double)FLT_MAX) {
        return wrong("trainer_reward", "a finite number", v);
    }
    r->has_trainer_reward = true;
    r->trainer_reward = (float)value;
    return spurion_ok();
}

static spurion_status read_tags(spurion_rollout *r, const spurion_memory *m, spurion_json_value v)
{
    if (!given(v)) {
        return spurion_ok();
    }
    if (v.kind != SPURION_JSON_OBJECT) {
        return wrong("tags", "an object", v);
    }
    if (v.size > SPURION_TAGS_BYTES_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "tags: expected at most %u bytes, found %zu", SPURION_TAGS_BYTES_MAX, v.size);
    }
    if (!spurion_json_object_check(v.data, v.size)) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "tags: expected an object with less nesting, found more than 32 levels");
    }
    r->tags.data = copy(m, v.data, v.size);
    r->tags.size = v.size;
    return r->tags.data ? spurion_ok() : spurion_error(SPURION_RESOURCE_EXHAUSTED, "tags: expected memory, found the budget spent");
}

static spurion_status read_messages(spurion_rollout *r, const spurion_memory *m, spurion_json_value v)
{
    if (!given(v)) {
        return spurion_ok();
    }
    if (v.kind != SPURION_JSON_ARRAY) {
        return wrong("messages", "an array of {\"role\", \"content\"}", v);
    }
    if (v.size > SPURION_TEXT_BYTES_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "messages: expected at most %u bytes, found %zu", SPURION_TEXT_BYTES_MAX, v.size);
    }
    r->messages.data = copy(m, v.data, v.size);
    r->messages.size = v.size;
    return r->messages.data ? spurion_ok() : spurion_error(SPURION_RESOURCE_EXHAUSTED, "messages: expected memory, found the budget spent");
}

static spurion_status read_form(spurion_rollout *r, spurion_json_value v)
{
    if (!given(v)) {
        return spurion_ok();
    }
    for (int i = 0; i < SPURION_FORM_COUNT && v.kind == SPURION_JSON_STRING; i++) {
        if (spurion_json_is(v, spurion_form_name(i))) {
            r->text_form = (spurion_text_form)i;
            return i == SPURION_FORM_PLAIN || r->completion.data != NULL
                       ? spurion_ok()
                       : spurion_error(SPURION_INVALID_ARGUMENT, "text_form: expected texts with it, found token ids");
        }
    }
    return wrong("text_form", "plain, templated or verbatim", v);
}

static spurion_status check_unknown(const line_fields *fields, const spurion_memory *m)
{
    spurion_bytes name = {NULL, 0};
    char hint[96];
    spurion_status st;

    if (fields->unknown.kind == SPURION_JSON_NONE) {
        return spurion_ok();
    }
    st = spurion_json_string(&name, m, fields->unknown);
    if (st.code != SPURION_OK) {
        return in_field("member's name", st);
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "expected a field of a rollout, found unknown field '%.60s'%s", name.data,
                         spurion_nearest_hint(hint, sizeof hint, name.data, field_names, FIELD_COUNT));
}

/* Which of the ways to give content are there: both texts, both lists of ids, or messages. */
static spurion_status check_content(const line_fields *fields)
{
    bool prompt = given(fields->value[PROMPT]), completion = given(fields->value[COMPLETION]);
    bool prompt_ids = given(fields->value[PROMPT_IDS]), completion_ids = given(fields->value[COMPLETION_IDS]);
    bool messages = given(fields->value[MESSAGES]);

    if (messages && !prompt && !completion && !prompt_ids && !completion_ids) {
        return spurion_ok();
    }
    if (messages) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "expected messages, or prompt and completion, or their ids; found messages and others");
    }
    if ((prompt && completion && !prompt_ids && !completion_ids) || (prompt_ids && completion_ids && !prompt && !completion)) {
        return spurion_ok();
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "expected prompt and completion, or prompt_ids and completion_ids; found%s%s%s%s%s",
                         prompt ? " prompt" : "", completion ? " completion" : "", prompt_ids ? " prompt_ids" : "",
                         completion_ids ? " completion_ids" : "", prompt || completion || prompt_ids || completion_ids ? "" : " none");
}

static spurion_status read_fields(spurion_rollout *r, const spurion_memory *m, const line_fields *fields)
{
    const spurion_json_value *v = fields->value;
    spurion_status st;
    int64_t size = 0;
    bool readable;

    SPURION_TRY(st, check_unknown(fields, m));
    SPURION_TRY(st, check_content(fields));
    SPURION_TRY(st, read_text(&r->prompt, m, "prompt", v[PROMPT]));
    SPURION_TRY(st, read_text(&r->completion, m, "completion", v[COMPLETION]));
    SPURION_TRY(st, read_ids(&r->prompt_ids, &r->prompt_id_count, m, "prompt_ids", v[PROMPT_IDS]));
    SPURION_TRY(st, read_ids(&r->completion_ids, &r->completion_id_count, m, "completion_ids", v[COMPLETION_IDS]));
    SPURION_TRY(st, read_trainer_reward(r, v[TRAINER_REWARD]));
    SPURION_TRY(st, read_tags(r, m, v[TAGS]));
    SPURION_TRY(st, read_messages(r, m, v[MESSAGES]));
    if (given(v[GROUP_SIZE])) {
        SPURION_TRY(st, read_whole(&size, &readable, "group_size", v[GROUP_SIZE], SPURION_GROUP_SIZE_MAX));
        r->group_size = (int32_t)size;
    }
    SPURION_TRY(st, read_form(r, v[TEXT_FORM]));
out:
    return st;
}

/* Keeps a name's own text for echoing. Without memory for it, it prints as null. */
static spurion_bytes keep(const spurion_memory *m, spurion_json_value v)
{
    spurion_bytes out = {NULL, 0};

    if (v.kind != SPURION_JSON_NONE) {
        out.data = copy(m, v.data, v.size);
        out.size = out.data ? v.size : 0;
    }
    return out;
}

spurion_json_line spurion_json_read_rollout(spurion_rollout *out, spurion_json_read *read, const spurion_memory *m, const spurion_bytes *run,
                                           const char *line, size_t size)
{
    spurion_json_value object;
    line_fields fields;
    spurion_status st = spurion_json_check(&object, line, size);

    memset(out, 0, sizeof *out);
    memset(read, 0, sizeof *read);
    if (st.code != SPURION_OK || object.kind != SPURION_JSON_OBJECT) {
        read->why = st.code != SPURION_OK ? spurion_error(SPURION_INVALID_ARGUMENT, "expected a JSON object, found no JSON: %s", st.message)
                                          : spurion_error(SPURION_INVALID_ARGUMENT, "expected a JSON object, found %s",
                                                          spurion_json_kind_name(object.kind));
        return SPURION_LINE_NO_OBJECT;
    }
    sort_members(&fields, object);
    st = read_names(out, &read->group_known, m, run, &fields);
    if (st.code == SPURION_OK) {
        read->named = true;
        st = read_fields(out, m, &fields);
    }
    read->names = (spurion_json_names){keep(m, fields.value[RUN]), keep(m, fields.value[STEP]), keep(m, fields.value[GROUP]),
                                       keep(m, fields.value[ID])};
    read->why = st;
    return st.code == SPURION_OK ? SPURION_LINE_ROLLOUT : SPURION_LINE_REFUSED;
}

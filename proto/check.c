/* Checks of outside bytes that need no message around them: UTF-8, names, JSON form, one rollout. Thread: any; no memory. */
#include <math.h>
#include <string.h>

#include "spurion/json_scan.h"
#include "spurion/codec.h"
#include "spurion/limits.h"

const char *spurion_warning_name(int bit)
{
    static const char *const names[SPURION_WARNING_COUNT] = {"boundary",    "bos_once",
                                                             "pad_scored",  "group_split",
                                                             "trainer_reward_differs", "prompt_truncated",
                                                             "eos_doubled", "date_fixed"};
    return bit >= 0 && bit < SPURION_WARNING_COUNT ? names[bit] : NULL;
}

const char *spurion_action_name(int action)
{
    static const char *const names[SPURION_ACTION_COUNT] = {"none", "log", "alert", "down_weight", "replace", "drop"};
    return action >= 0 && action < SPURION_ACTION_COUNT ? names[action] : NULL;
}

const char *spurion_form_name(int form)
{
    static const char *const names[SPURION_FORM_COUNT] = {"plain", "templated", "verbatim"};
    return form >= 0 && form < SPURION_FORM_COUNT ? names[form] : NULL;
}

/* Bytes of the well-formed sequence at p (RFC 3629 section 4), or 0. */
static size_t utf8_length(const unsigned char *p, size_t left)
{
    unsigned char a = p[0], low = 0x80, high = 0xbf;
    size_t n;

    if (a < 0x80) {
        return 1;
    }
    if (a >= 0xc2 && a <= 0xdf) {
        n = 2;
    } else if (a >= 0xe0 && a <= 0xef) {
        n = 3;
        low = a == 0xe0 ? 0xa0 : 0x80;
        high = a == 0xed ? 0x9f : 0xbf;
    } else if (a >= 0xf0 && a <= 0xf4) {
        n = 4;
        low = a == 0xf0 ? 0x90 : 0x80;
        high = a == 0xf4 ? 0x8f : 0xbf;
    } else {
        return 0;
    }
    if (left < n || p[1] < low || p[1] > high) {
        return 0;
    }
    for (size_t i = 2; i < n; i++) {
        if ((p[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    return n;
}

size_t spurion_utf8_valid_prefix(const char *data, size_t size)
{
    size_t at = 0;
    while (at < size) {
        size_t n = utf8_length((const unsigned char *)data + at, size - at);
        if (n == 0) {
            break;
        }
        at += n;
    }
    return at;
}

spurion_status spurion_name_check(spurion_bytes name, const char *what)
{
    size_t valid;

    if (name.data == NULL || name.size == 0) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a name of 1 to %d bytes, found none", what, SPURION_NAME_BYTES_MAX);
    }
    if (name.size > SPURION_NAME_BYTES_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a name of 1 to %d bytes, found %zu", what, SPURION_NAME_BYTES_MAX,
                             name.size);
    }
    valid = spurion_utf8_valid_prefix(name.data, name.size);
    if (valid != name.size) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected UTF-8, found byte 0x%02x at %zu", what,
                             (unsigned char)name.data[valid], valid);
    }
    for (size_t i = 0; i < name.size; i++) {
        unsigned char c = (unsigned char)name.data[i];
        bool c1 = c == 0xc2 && i + 1 < name.size && (unsigned char)name.data[i + 1] < 0xa0; /* U+0080..U+009F */
        if (c < 0x20 || c == 0x7f || c1) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected no control characters, found one at byte %zu", what, i);
        }
    }
    return spurion_ok();
}

/* ---- JSON form (RFC 8259), without building anything: one pass, a bit stack for the nesting ---- */

#define JSON_DEPTH_MAX 32

typedef struct json {
    const char *at, *end;
} json;

static void json_space(json *j)
{
    while (j->at < j->end && (*j->at == ' ' || *j->at == '\t' || *j->at == '\n' || *j->at == '\r')) {
        j->at++;
    }
}

static bool json_string(json *j)
{
    if (j->at == j->end || *j->at != '"') {
        return false;
    }
    for (j->at++; j->at < j->end; j->at++) {
        unsigned char c = (unsigned char)*j->at;
        if (c == '"') {
            j->at++;
            return true;
        }
        if (c < 0x20) {
            return false;
        }
        if (c != '\\') {
            continue;
        }
        if (++j->at == j->end) {
            return false;
        }
        if (*j->at == 'u') {
            for (int i = 0; i < 4; i++) {
                if (++j->at == j->end || strchr("0123456789abcdefABCDEF", *j->at) == NULL || *j->at == '\0') {
                    return false;
                }
            }
        } else if (*j->at == '\0' || strchr("\"\\/bfnrt", *j->at) == NULL) {
            return false;
        }
    }
    return false;
}

static size_t json_digits(json *j)
{
    const char *from = j->at;
    while (j->at < j->end && *j->at >= '0' && *j->at <= '9') {
        j->at++;
    }
    return (size_t)(j->at - from);
}

static bool json_number(json *j)
{
    const char *from;
    size_t n;

    if (j->at < j->end && *j->at == '-') {
        j->at++;
    }
    from = j->at;
    n = json_digits(j);
    if (n == 0 || (n > 1 && *from == '0')) {
        return false;
    }
    if (j->at < j->end && *j->at == '.') {
        j->at++;
        if (json_digits(j) == 0) {
            return false;
        }
    }
    if (j->at < j->end && (*j->at == 'e' || *j->at == 'E')) {
        j->at++;
        if (j->at < j->end && (*j->at == '+' || *j->at == '-')) {
            j->at++;
        }
        return json_digits(j) != 0;
    }
    return true;
}

static bool json_scalar(json *j)
{
    static const char *const words[] = {"true", "false", "null"};
    if (*j->at == '"') {
        return json_string(j);
    }
    for (int i = 0; i < 3; i++) {
        size_t n = strlen(words[i]);
        if ((size_t)(j->end - j->at) >= n && memcmp(j->at, words[i], n) == 0) {
            j->at += n;
            return true;
        }
    }
    return json_number(j);
}

/* `"key" :` of an object's next member. */
static bool json_key(json *j)
{
    json_space(j);
    if (!json_string(j)) {
        return false;
    }
    json_space(j);
    if (j->at == j->end || *j->at != ':') {
        return false;
    }
    j->at++;
    json_space(j);
    return j->at < j->end;
}

bool spurion_json_object_check(const char *data, size_t size)
{
    json j = {data, data + size};
    bool object[JSON_DEPTH_MAX];
    int depth = 0;
    bool value = true; /* a value is expected next */

    json_space(&j);
    if (j.at == j.end || *j.at != '{') {
        return false;
    }
    while (j.at < j.end) {
        if (value && (*j.at == '{' || *j.at == '[')) {
            if (depth == JSON_DEPTH_MAX) {
                return false;
            }
            object[depth++] = *j.at == '{';
            j.at++;
            json_space(&j);
            if (j.at < j.end && *j.at == (object[depth - 1] ? '}' : ']')) {
                value = false;
            } else if (object[depth - 1] && !json_key(&j)) {
                return false;
            }
            if (value) {
                continue;
            }
        } else if (value) {
            if (!json_scalar(&j)) {
                return false;
            }
            value = false;
        }
        json_space(&j);
        if (depth == 0) {
            return j.at == j.end;
        }
        if (j.at == j.end) {
            return false;
        }
        if (*j.at == ',') {
            j.at++;
            json_space(&j);
            value = true;
            if (object[depth - 1] && !json_key(&j)) {
                return false;
            }
        } else if (*j.at == (object[depth - 1] ? '}' : ']')) {
            j.at++;
            depth--;
            json_space(&j);
            if (depth == 0) {
                return j.at == j.end;
            }
        } else {
            return false;
        }
    }
    return false;
}

/* ---- one rollout ---- */

static spurion_status check_text(spurion_bytes text, const char *what, size_t bytes_max)
{
    size_t valid;
    if (text.size > bytes_max) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected at most %zu bytes, found %zu", what, bytes_max, text.size);
    }
    valid = spurion_utf8_valid_prefix(text.data, text.size);
    if (valid != text.size) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected UTF-8, found byte 0x%02x at %zu", what,
                             (unsigned char)text.data[valid], valid);
    }
    return spurion_ok();
}

static spurion_status check_ids(const int32_t *ids, int32_t count, const char *what)
{
    if (count > SPURION_TOKENS_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected at most %d ids, found %d", what, SPURION_TOKENS_MAX, count);
    }
    for (int32_t i = 0; i < count; i++) {
        if (ids[i] < 0) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected token ids >= 0, found %d at place %d", what, ids[i], i);
        }
    }
    return spurion_ok();
}

/* One JSON array of objects; what the objects hold is the template's business (daemon/template.c). */
static spurion_status check_messages(spurion_bytes messages)
{
    spurion_json_value array;
    spurion_status st = spurion_json_check(&array, messages.data, messages.size);

    if (st.code != SPURION_OK || array.kind != SPURION_JSON_ARRAY) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "messages: expected one JSON array of {\"role\", \"content\"}, found something else");
    }
    return spurion_ok();
}

static spurion_status check_content(const spurion_rollout *r)
{
    bool ids = r->prompt_id_count > 0 || r->completion_id_count > 0;
    bool texts = r->prompt.data != NULL || r->completion.data != NULL, messages = r->messages.data != NULL;
    spurion_status st;

    if ((ids && texts) || (messages && (ids || texts))) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "prompt, completion: expected texts, token ids or messages, found %s",
                             messages ? "messages and others" : "both");
    }
    if (messages) {
        SPURION_TRY(st, check_text(r->messages, "messages", SPURION_TEXT_BYTES_MAX));
        return check_messages(r->messages);
    }
    if (ids) {
        if (r->completion_id_count == 0) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "completion_ids: expected at least one token, found an empty completion");
        }
        SPURION_TRY(st, check_ids(r->prompt_ids, r->prompt_id_count, "prompt_ids"));
        SPURION_TRY(st, check_ids(r->completion_ids, r->completion_id_count, "completion_ids"));
        return st;
    }
    if (r->prompt.data == NULL || r->completion.data == NULL) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a text (or token ids for both), found none",
                             r->prompt.data == NULL ? "prompt" : "completion");
    }
    if (r->completion.size == 0) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "completion: expected at least one character, found an empty completion");
    }
    SPURION_TRY(st, check_text(r->prompt, "prompt", SPURION_TEXT_BYTES_MAX));
    SPURION_TRY(st, check_text(r->completion, "completion", SPURION_TEXT_BYTES_MAX));
out:
    return st;
}

spurion_status spurion_rollout_check(const spurion_rollout *r)
{
    spurion_status st;

    SPURION_TRY(st, spurion_name_check(r->run, "run"));
    SPURION_TRY(st, spurion_name_check(r->group, "group"));
    SPURION_TRY(st, spurion_name_check(r->id, "id"));
    if (r->step < 0) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "step: expected an integer >= 0, found %lld", (long long)r->step);
    }
    if (r->attempt < 0) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "attempt: expected an integer >= 0, found %d", r->attempt);
    }
    if (r->group_size < 0 || r->group_size > SPURION_GROUP_SIZE_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "group_size: expected 0 to %d, found %d", SPURION_GROUP_SIZE_MAX, r->group_size);
    }
    if ((unsigned)r->text_form >= SPURION_FORM_COUNT) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "text_form: expected plain, templated or verbatim, found another");
    }
    if (r->text_form != SPURION_FORM_PLAIN && r->completion.data == NULL) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "text_form: expected texts with it, found token ids");
    }
    if (r->has_trainer_reward && !isfinite(r->trainer_reward)) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "trainer_reward: expected a finite number, found none");
    }
    SPURION_TRY(st, check_content(r));
    if (r->tags.data != NULL) {
        SPURION_TRY(st, check_text(r->tags, "tags", SPURION_TAGS_BYTES_MAX));
        if (!spurion_json_object_check(r->tags.data, r->tags.size)) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "tags: expected one JSON object, found something else");
        }
    }
out:
    return st;
}

/* Writes a verdict as JSON; see json.h. */
#include "spurion/json.h"

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- text --- */

void spurion_text_fini(spurion_text *t)
{
    if (t) {
        free(t->data);
        memset(t, 0, sizeof *t);
    }
}

static bool reserve(spurion_text *t, size_t more)
{
    size_t need = t->size + more + 1, capacity = t->capacity ? t->capacity : 4096;
    char *data;

    if (t->failed || need <= t->capacity) {
        return !t->failed;
    }
    while (capacity < need) {
        capacity *= 2;
    }
    data = realloc(t->data, capacity);
    if (!data) {
        t->failed = true;
        return false;
    }
    t->data = data;
    t->capacity = capacity;
    return true;
}

void spurion_text_add(spurion_text *t, const char *data, size_t size)
{
    if (reserve(t, size)) {
        if (size) {
            memcpy(t->data + t->size, data, size);
        }
        t->size += size;
        t->data[t->size] = '\0';
    }
}

static void put(spurion_text *t, const char *text)
{
    spurion_text_add(t, text, strlen(text));
}

void spurion_text_print(spurion_text *t, const char *format, ...)
{
    char small[512];
    va_list args;
    int length;

    va_start(args, format);
    length = vsnprintf(small, sizeof small, format, args);
    va_end(args);
    if (length < 0) {
        t->failed = true;
    } else if ((size_t)length < sizeof small) {
        spurion_text_add(t, small, (size_t)length);
    } else if (reserve(t, (size_t)length)) {
        va_start(args, format);
        (void)vsnprintf(t->data + t->size, (size_t)length + 1, format, args);
        va_end(args);
        t->size += (size_t)length;
    }
}

/* --- JSON --- */

/* Length of the UTF-8 character at t[0..size), size > 0; or minus the length of the longest beginning of one that stands there (at least 1)
 * where it is none: what one U+FFFD replaces (The Unicode Standard, section 3.9, and what Python's decoder does). */
static int utf8_length(const unsigned char *t, size_t size)
{
    /* The Unicode Standard, table 3-7: well-formed byte sequences. */
    static const struct { unsigned char first, last, low, high; int length; } rows[] = {
        {0x00, 0x7f, 0x00, 0xff, 1}, {0xc2, 0xdf, 0x80, 0xbf, 2}, {0xe0, 0xe0, 0xa0, 0xbf, 3},
        {0xe1, 0xec, 0x80, 0xbf, 3}, {0xed, 0xed, 0x80, 0x9f, 3}, {0xee, 0xef, 0x80, 0xbf, 3},
        {0xf0, 0xf0, 0x90, 0xbf, 4}, {0xf1, 0xf3, 0x80, 0xbf, 4}, {0xf4, 0xf4, 0x80, 0x8f, 4}};

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (t[0] < rows[i].first || t[0] > rows[i].last) {
            continue;
        }
        for (int k = 1; k < rows[i].length; k++) {
            if ((size_t)k == size || t[k] < (k == 1 ? rows[i].low : 0x80) || t[k] > (k == 1 ? rows[i].high : 0xbf)) {
                return -k;
            }
        }
        return rows[i].length;
    }
    return -1;
}

static void put_escaped(spurion_text *t, unsigned char c)
{
    static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
    const char *at = c ? strchr(from, c) : NULL;

    if (at) {
        char pair[2] = {'\\', to[at - from]};
        spurion_text_add(t, pair, 2);
    } else {
        spurion_text_print(t, "\\u%04x", c);
    }
}

void spurion_json_put_string(spurion_text *t, spurion_bytes text)
{
    size_t i = 0, start = 0;

    if (!text.data) {
        put(t, "null");
        return;
    }
    put(t, "\"");
    while (i < text.size) {
        unsigned char c = (unsigned char)text.data[i];
        int length = c < 0x80 ? 1 : utf8_length((const unsigned char *)text.data + i, text.size - i);

        if (length > 0 && c >= 0x20 && c != '"' && c != '\\' && c != 0x7f) {
            i += (size_t)length;
            continue;
        }
        spurion_text_add(t, text.data + start, i - start);
        if (length > 0) {
            put_escaped(t, c);
            i++;
        } else {
            put(t, "\xef\xbf\xbd"); /* U+FFFD */
            i += (size_t)-length;
        }
        start = i;
    }
    spurion_text_add(t, text.data + start, i - start);
    put(t, "\"");
}

void spurion_json_put_float(spurion_text *t, float value)
{
    char text[32];

    if (!isfinite(value)) {
        put(t, "null");
        return;
    }
    if (value == 0.0f) {
        put(t, signbit(value) ? "-0.0" : "0.0");
        return;
    }
    for (int digits = 6; digits <= 9; digits++) { /* 9 always suffice for float32 */
        (void)snprintf(text, sizeof text, "%.*g", digits, (double)value);
        if (strtof(text, NULL) == value) {
            break;
        }
    }
    put(t, text);
    if (!strpbrk(text, ".e")) {
        put(t, ".0");
    }
}

static void put_key(spurion_text *t, const char *name)
{
    spurion_text_print(t, "\"%s\":", name);
}

static void put_float(spurion_text *t, const char *name, float value)
{
    put(t, ",");
    put_key(t, name);
    spurion_json_put_float(t, value);
}

static void put_opt(spurion_text *t, const char *name, spurion_opt_float value)
{
    put_float(t, name, value.has ? value.value : NAN);
}

static void put_string(spurion_text *t, const char *name, spurion_bytes text)
{
    put(t, ",");
    put_key(t, name);
    spurion_json_put_string(t, text);
}

/* One of the four names: as it is, or as it stood on the line, or null. */
static void put_name(spurion_text *t, const char *name, spurion_bytes text, const spurion_bytes *raw)
{
    put_key(t, name);
    if (!text.data && raw && raw->data) {
        spurion_text_add(t, raw->data, raw->size);
    } else {
        spurion_json_put_string(t, text);
    }
}

static void put_identity(spurion_text *t, const spurion_verdict *v, const spurion_json_names *names)
{
    put(t, "{");
    put_name(t, "run", v->run, names ? &names->run : NULL);
    put(t, ",");
    if (v->has_step) {
        spurion_text_print(t, "\"step\":%lld", (long long)v->step);
    } else {
        put_name(t, "step", (spurion_bytes){NULL, 0}, names ? &names->step : NULL);
    }
    put(t, ",");
    put_name(t, "group", v->group, names ? &names->group : NULL);
    put(t, ",");
    put_name(t, "id", v->id, names ? &names->id : NULL);
    if (v->attempt) {
        spurion_text_print(t, ",\"attempt\":%d", v->attempt);
    }
}

static void put_error(spurion_text *t, const spurion_verdict *v)
{
    spurion_text_print(t, "\"error\":{\"code\":\"%s\"", spurion_code_name(v->code));
    put_string(t, "message", v->message.data ? v->message : (spurion_bytes){"", 0});
    put(t, "}}");
}

static void put_saes(spurion_text *t, const spurion_verdict *v)
{
    put(t, ",\"saes\":[");
    for (int32_t i = 0; i < v->sae_count; i++) {
        const spurion_sae_summary *s = &v->saes[i];
        put(t, i ? ",{\"sae\":" : "{\"sae\":");
        spurion_json_put_string(t, s->sae);
        put_opt(t, "attribution_sum", s->attribution_sum);
        put_opt(t, "error_attribution", s->error_attribution);
        put_opt(t, "bias_attribution", s->bias_attribution);
        put_opt(t, "baseline_reward", s->baseline_reward);
        put_opt(t, "residual", s->residual);
        put_opt(t, "l0_mean", s->l0_mean);
        put(t, "}");
    }
    put(t, "]");
}

static void put_families(spurion_text *t, const spurion_verdict *v)
{
    put(t, ",\"families\":[");
    for (int32_t i = 0; i < v->family_count; i++) {
        put(t, i ? ",{\"family\":" : "{\"family\":");
        spurion_json_put_string(t, v->families[i].family);
        put_float(t, "effect", v->families[i].effect);
        put(t, "}");
    }
    put(t, "]");
}

static void put_ref(spurion_text *t, const spurion_feature_ref *ref)
{
    put(t, "{\"sae\":");
    spurion_json_put_string(t, ref->sae);
    spurion_text_print(t, ",\"index\":%d", ref->index);
}

static void put_flags(spurion_text *t, const spurion_verdict *v)
{
    put(t, ",\"flags\":[");
    for (int32_t i = 0; i < v->flag_count; i++) {
        const spurion_flag *f = &v->flags[i];
        put(t, i ? ",{\"rule\":" : "{\"rule\":");
        spurion_json_put_string(t, f->rule);
        put_float(t, "effect", f->effect);
        put(t, ",\"features\":[");
        for (int32_t k = 0; k < f->feature_count; k++) {
            put(t, k ? "," : "");
            put_ref(t, &f->features[k]);
            put(t, "}");
        }
        put(t, "]}");
    }
    put(t, "]");
}

static void put_action(spurion_text *t, const spurion_verdict *v)
{
    spurion_text_print(t, ",\"action\":{\"name\":\"%s\"", spurion_action_name((int)v->action));
    put_string(t, "rule", v->action_rule);
    put_float(t, "reward", v->action_reward);
    put_float(t, "weight", v->action_weight);
    put_opt(t, "advantage", v->action_advantage);
    put(t, "}");
}

static void put_feature(spurion_text *t, const spurion_feature *f)
{
    put_ref(t, &f->ref);
    put_string(t, "label", f->label);
    if (f->explanation.data) {
        put_string(t, "explanation", f->explanation);
    }
    put(t, ",\"families\":[");
    for (int32_t i = 0; i < f->family_count; i++) {
        put(t, i ? "," : "");
        spurion_json_put_string(t, f->families[i]);
    }
    put(t, "]");
    put_string(t, "verdict", f->verdict);
    put_opt(t, "attribution", f->attribution);
    put_opt(t, "ablation_effect", f->ablation_effect);
    put_float(t, "activation_max", f->activation_max);
    put_float(t, "activation_sum", f->activation_sum);
    spurion_text_print(t, ",\"peak_position\":%d}", f->peak_position);
}

static void put_features(spurion_text *t, const spurion_verdict *v)
{
    put(t, ",\"features\":[");
    for (int32_t i = 0; i < v->feature_count; i++) {
        put(t, i ? "," : "");
        put_feature(t, &v->features[i]);
    }
    put(t, "]");
}

/* Names of the set, in alphabetical order. */
static void put_warnings(spurion_text *t, uint32_t warnings)
{
    const char *names[SPURION_WARNING_COUNT];
    int count = 0;

    for (int bit = 0; bit < SPURION_WARNING_COUNT; bit++) {
        if (warnings >> bit & 1) {
            int at = count++;
            const char *name = spurion_warning_name(bit);
            for (; at > 0 && strcmp(names[at - 1], name) > 0; at--) {
                names[at] = names[at - 1];
            }
            names[at] = name;
        }
    }
    put(t, ",\"warnings\":[");
    for (int i = 0; i < count; i++) {
        spurion_text_print(t, "%s\"%s\"", i ? "," : "", names[i]);
    }
    put(t, "]");
}

static void put_ints(spurion_text *t, const char *name, const int32_t *values, int32_t count)
{
    put_key(t, name);
    put(t, "[");
    for (int32_t i = 0; i < count; i++) {
        spurion_text_print(t, i ? ",%d" : "%d", values[i]);
    }
    put(t, "],");
}

/* {sae: [value at each position of C], ...}; values (sae_count, count), or NULL: null for each SAE. */
static void put_by_sae(spurion_text *t, const spurion_verdict *v, const float *values)
{
    const spurion_tokens *k = v->tokens;

    put(t, "{");
    for (int32_t s = 0; s < k->sae_count; s++) {
        put(t, s ? "," : "");
        spurion_json_put_string(t, v->saes[s].sae);
        put(t, values ? ":[" : ":null");
        for (int32_t i = 0; values && i < k->count; i++) {
            put(t, i ? "," : "");
            spurion_json_put_float(t, values[(size_t)s * (size_t)k->count + (size_t)i]);
        }
        put(t, values ? "]" : "");
    }
    put(t, "}");
}

static void put_tokens(spurion_text *t, const spurion_verdict *v)
{
    const spurion_tokens *k = v->tokens;
    size_t rule_size = (size_t)k->sae_count * (size_t)k->count;

    put(t, ",\"tokens\":{");
    put_ints(t, "position", k->position, k->count);
    put_ints(t, "id", k->id, k->count);
    put(t, "\"text\":[");
    for (int32_t i = 0; i < k->count; i++) {
        put(t, i ? "," : "");
        spurion_json_put_string(t, k->text[i]);
    }
    put(t, "],\"attribution\":");
    put_by_sae(t, v, k->attribution);
    put(t, ",\"flagged\":{");
    for (int32_t r = 0; r < k->flagged_count; r++) {
        put(t, r ? "," : "");
        spurion_json_put_string(t, v->flags[r].rule);
        put(t, ":");
        put_by_sae(t, v, k->flagged ? k->flagged + (size_t)r * rule_size : NULL);
    }
    put(t, "}}");
}

void spurion_json_verdict(spurion_text *t, const spurion_verdict *v, const spurion_json_names *names)
{
    if (v->line > 0) {
        spurion_text_print(t, "{\"line\":%lld,", (long long)v->line);
        put_error(t, v);
        return;
    }
    put_identity(t, v, names);
    if (v->code != SPURION_OK) {
        put(t, ",");
        put_error(t, v);
        return;
    }
    put_float(t, "reward", v->reward);
    put_float(t, "counterfactual_reward", v->counterfactual_reward);
    put_float(t, "effect", v->effect);
    put_opt(t, "effect_sd", v->effect_sd);
    put_opt(t, "advantage", v->advantage);
    put_opt(t, "counterfactual_advantage", v->counterfactual_advantage);
    put(t, ",\"advantage_flip\":");
    put(t, !v->advantage.has ? "null" : v->advantage_flip ? "true" : "false");
    if (v->scored_position >= 0) {
        spurion_text_print(t, ",\"scored_position\":%d", v->scored_position);
    } else {
        put(t, ",\"scored_position\":null");
    }
    spurion_text_print(t, ",\"token_count\":%d,\"truncated\":%s", v->token_count, v->truncated ? "true" : "false");
    put_saes(t, v);
    put_families(t, v);
    put_flags(t, v);
    put_action(t, v);
    put_string(t, "provenance", (spurion_bytes){v->provenance, strnlen(v->provenance, sizeof v->provenance)});
    put_features(t, v);
    put_warnings(t, v->warnings);
    if (v->tokens) {
        put_tokens(t, v);
    }
    put(t, "}");
}

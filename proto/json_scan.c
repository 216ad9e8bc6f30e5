/* A JSON checker and walker; see json_scan.h. */
#include "spurion/json_scan.h"

#include <stdlib.h>
#include <string.h>


typedef struct scan {
    const char *start, *at, *end;
    const char *fault; /* what was expected where `at` stands, or NULL */
} scan;

static bool skip_value(scan *s, int depth);

const char *spurion_json_kind_name(spurion_json_kind kind)
{
    static const char *const names[] = {"nothing", "null", "a truth value", "a number", "a string", "an array", "an object"};
    return names[kind];
}

static bool fail(scan *s, const char *expected)
{
    s->fault = expected;
    return false;
}

static void skip_space(scan *s)
{
    while (s->at < s->end && (*s->at == ' ' || *s->at == '\t' || *s->at == '\n' || *s->at == '\r')) {
        s->at++;
    }
}

static bool is_hex(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

static bool skip_escape(scan *s)
{
    s->at++; /* the backslash */
    if (s->at < s->end && *s->at == 'u') {
        for (int i = 1; i <= 4; i++) {
            if (s->end - s->at <= i || !is_hex(s->at[i])) {
                return fail(s, "four hexadecimal digits");
            }
        }
        s->at += 5;
        return true;
    }
    if (s->at < s->end && *s->at && strchr("\"\\/bfnrt", *s->at)) {
        s->at++;
        return true;
    }
    return fail(s, "an escape");
}

static bool skip_string(scan *s)
{
    s->at++;
    while (s->at < s->end && *s->at != '"') {
        if ((unsigned char)*s->at < 0x20) {
            return fail(s, "no control character in a string");
        }
        if (*s->at != '\\') {
            s->at++;
        } else if (!skip_escape(s)) {
            return false;
        }
    }
    if (s->at == s->end) {
        return fail(s, "the end of a string");
    }
    s->at++;
    return true;
}

static size_t skip_digits(scan *s)
{
    const char *first = s->at;
    while (s->at < s->end && *s->at >= '0' && *s->at <= '9') {
        s->at++;
    }
    return (size_t)(s->at - first);
}

static bool skip_number(scan *s)
{
    s->at += *s->at == '-';
    if (s->at < s->end && *s->at == '0') {
        s->at++;
    } else if (skip_digits(s) == 0) {
        return fail(s, "a digit");
    }
    if (s->at < s->end && *s->at == '.') {
        s->at++;
        if (skip_digits(s) == 0) {
            return fail(s, "a digit");
        }
    }
    if (s->at < s->end && (*s->at == 'e' || *s->at == 'E')) {
        s->at++;
        if (s->at < s->end && (*s->at == '+' || *s->at == '-')) {
            s->at++;
        }
        if (skip_digits(s) == 0) {
            return fail(s, "a digit");
        }
    }
    return true;
}

static bool skip_word(scan *s, const char *word)
{
    size_t size = strlen(word);
    if ((size_t)(s->end - s->at) < size || memcmp(s->at, word, size) != 0) {
        return fail(s, "a JSON value");
    }
    s->at += size;
    return true;
}

/* An array or an object: at stands on the opening bracket. */
static bool skip_container(scan *s, int depth, bool object)
{
    char close = object ? '}' : ']';

    if (depth >= SPURION_SCAN_DEPTH_MAX) {
        return fail(s, "less nesting");
    }
    s->at++;
    skip_space(s);
    if (s->at < s->end && *s->at == close) {
        s->at++;
        return true;
    }
    for (;;) {
        if (object) {
            skip_space(s);
            if (s->at == s->end || *s->at != '"') {
                return fail(s, "a member's name");
            }
            if (!skip_string(s)) {
                return false;
            }
            skip_space(s);
            if (s->at == s->end || *s->at != ':') {
                return fail(s, "a colon");
            }
            s->at++;
        }
        if (!skip_value(s, depth + 1)) {
            return false;
        }
        skip_space(s);
        if (s->at < s->end && *s->at == close) {
            s->at++;
            return true;
        }
        if (s->at == s->end || *s->at != ',') {
            return fail(s, object ? "a comma or }" : "a comma or ]");
        }
        s->at++;
    }
}

static bool skip_value(scan *s, int depth)
{
    skip_space(s);
    if (s->at == s->end) {
        return fail(s, "a JSON value");
    }
    switch (*s->at) {
    case '{': return skip_container(s, depth, true);
    case '[': return skip_container(s, depth, false);
    case '"': return skip_string(s);
    case 't': return skip_word(s, "true");
    case 'f': return skip_word(s, "false");
    case 'n': return skip_word(s, "null");
    default: return (*s->at == '-' || (*s->at >= '0' && *s->at <= '9')) ? skip_number(s) : fail(s, "a JSON value");
    }
}

static spurion_json_kind kind_of(char first)
{
    switch (first) {
    case '{': return SPURION_JSON_OBJECT;
    case '[': return SPURION_JSON_ARRAY;
    case '"': return SPURION_JSON_STRING;
    case 't':
    case 'f': return SPURION_JSON_BOOL;
    case 'n': return SPURION_JSON_NULL;
    default: return SPURION_JSON_NUMBER;
    }
}

spurion_status spurion_json_check(spurion_json_value *out, const char *text, size_t size)
{
    scan s = {text, text, text + size, NULL};
    size_t bad = spurion_utf8_valid_prefix(text, size);
    const char *first;

    memset(out, 0, sizeof *out);
    if (bad < size) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "expected UTF-8, found byte 0x%02x at offset %zu", (unsigned char)text[bad], bad);
    }
    skip_space(&s);
    first = s.at;
    if (skip_value(&s, 0)) {
        out->kind = kind_of(*first);
        out->data = first;
        out->size = (size_t)(s.at - first);
        skip_space(&s);
        if (s.at == s.end) {
            return spurion_ok();
        }
        s.fault = "the end";
    }
    if (s.at == s.end) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "expected %s, found the end at offset %zu", s.fault, size);
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "expected %s, found byte 0x%02x at offset %zu", s.fault, (unsigned char)*s.at,
                         (size_t)(s.at - s.start));
}

spurion_json_walk spurion_json_enter(spurion_json_value container)
{
    return (spurion_json_walk){container.data + 1, container.data + container.size - 1};
}

bool spurion_json_next(spurion_json_walk *walk, spurion_json_value *key, spurion_json_value *value)
{
    scan s = {walk->at, walk->at, walk->end, NULL};

    skip_space(&s);
    if (s.at < s.end && *s.at == ',') {
        s.at++;
        skip_space(&s);
    }
    if (s.at >= s.end) {
        return false;
    }
    if (key) {
        key->kind = SPURION_JSON_STRING;
        key->data = s.at;
        (void)skip_string(&s);
        key->size = (size_t)(s.at - key->data);
        skip_space(&s);
        s.at++; /* the colon */
        skip_space(&s);
    }
    value->kind = kind_of(*s.at);
    value->data = s.at;
    (void)skip_value(&s, 0);
    value->size = (size_t)(s.at - value->data);
    walk->at = s.at;
    return true;
}

static uint32_t hex4(const char *t)
{
    uint32_t v = 0;
    for (int i = 0; i < 4; i++) {
        v = v * 16 + (uint32_t)(t[i] <= '9' ? t[i] - '0' : (t[i] | 0x20) - 'a' + 10);
    }
    return v;
}

static char *put_utf8(char *out, uint32_t c)
{
    if (c < 0x80) {
        *out++ = (char)c;
    } else if (c < 0x800) {
        *out++ = (char)(0xc0 | c >> 6);
        *out++ = (char)(0x80 | (c & 0x3f));
    } else if (c < 0x10000) {
        *out++ = (char)(0xe0 | c >> 12);
        *out++ = (char)(0x80 | (c >> 6 & 0x3f));
        *out++ = (char)(0x80 | (c & 0x3f));
    } else {
        *out++ = (char)(0xf0 | c >> 18);
        *out++ = (char)(0x80 | (c >> 12 & 0x3f));
        *out++ = (char)(0x80 | (c >> 6 & 0x3f));
        *out++ = (char)(0x80 | (c & 0x3f));
    }
    return out;
}

/* Decodes the escape at *at (on its backslash); false for a lone surrogate. */
static bool decode_escape(char **out, const char **at, const char *end)
{
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char *t = *at + 1;
    uint32_t c, low;

    if (*t != 'u') {
        *(*out)++ = values[strchr(names, *t) - names];
        *at = t + 1;
        return true;
    }
    c = hex4(t + 1);
    t += 5;
    if (c >= 0xd800 && c < 0xe000) {
        if (c >= 0xdc00 || end - t < 6 || t[0] != '\\' || t[1] != 'u') {
            return false;
        }
        low = hex4(t + 2);
        if (low < 0xdc00 || low >= 0xe000) {
            return false;
        }
        c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
        t += 6;
    }
    *out = put_utf8(*out, c);
    *at = t;
    return true;
}

spurion_status spurion_json_string(spurion_bytes *out, const spurion_memory *m, spurion_json_value value)
{
    const char *at = value.data + 1, *end = value.data + value.size - 1;
    char *data = m->take(m->context, value.size), *put = data; /* decoding never lengthens; the quotes leave room for a NUL */

    if (!data) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected memory for %zu bytes of text, found the budget spent", value.size);
    }
    while (at < end) {
        const char *stop = memchr(at, '\\', (size_t)(end - at));
        size_t run = (size_t)((stop ? stop : end) - at);

        memcpy(put, at, run);
        put += run;
        at += run;
        if (at < end && !decode_escape(&put, &at, end)) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "expected Unicode text, found a lone surrogate at offset %zu of the string",
                                 (size_t)(at - value.data - 1));
        }
    }
    *put = '\0';
    out->data = data;
    out->size = (size_t)(put - data);
    return spurion_ok();
}

bool spurion_json_is(spurion_json_value string, const char *word)
{
    const char *at = string.data + 1, *end = string.data + string.size - 1;

    while (at < end) {
        char one[4], *put = one;
        if (*at != '\\') {
            *put++ = *at++;
        } else if (!decode_escape(&put, &at, end)) {
            return false;
        }
        for (const char *p = one; p < put; p++) {
            if (!*word || *word++ != *p) {
                return false;
            }
        }
    }
    return !*word;
}

bool spurion_json_int(int64_t *out, spurion_json_value value)
{
    bool negative = value.size && *value.data == '-';
    int64_t n = 0;

    if (value.kind != SPURION_JSON_NUMBER) {
        return false;
    }
    for (size_t i = negative; i < value.size; i++) {
        int digit = value.data[i] - '0';
        if (digit < 0 || digit > 9 || __builtin_mul_overflow(n, 10, &n) || __builtin_sub_overflow(n, digit, &n)) {
            return false; /* n counts down: the least number has no positive twin */
        }
    }
    return negative ? (*out = n, true) : !__builtin_sub_overflow((int64_t)0, n, out);
}

bool spurion_json_double(double *out, spurion_json_value value)
{
    char text[400]; /* what follows 399 bytes of a number is below its last bit, unless it is a longer exponent: refused */

    if (value.kind != SPURION_JSON_NUMBER || value.size >= sizeof text) {
        return false;
    }
    memcpy(text, value.data, value.size);
    text[value.size] = '\0';
    *out = strtod(text, NULL);
    return true;
}

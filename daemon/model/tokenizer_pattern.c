/* Patterns of splits and replacements: literals, character classes, the regexes of GPT-2, Llama-3 and Qwen by hand, all others
 * through Oniguruma (the engine of the `tokenizers` library). Thread: patterns are constant, the match region is the work's. */
#include "daemon/model/tokenizer_internal.h"

#include <oniguruma.h>

#include <stdlib.h>
#include <string.h>

/* Oniguruma of this system may follow another Unicode version than the one inside the library. Categories (\p{Lu}, \d), \w and \b
 * are therefore written out as ranges from our table before it compiles the pattern. What stays with the system's tables: scripts
 * and other properties (\p{Han}), POSIX brackets, and the case of letters under (?i). */

static const char regex_gpt2[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
static const char regex_chat_head[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}";
static const char regex_chat_tail[] = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

#define BITS_LETTER                                                                                                                \
    (1u << SPURION_UNICODE_LU | 1u << SPURION_UNICODE_LL | 1u << SPURION_UNICODE_LT | 1u << SPURION_UNICODE_LM |                   \
     1u << SPURION_UNICODE_LO)
#define BITS_NUMBER (1u << SPURION_UNICODE_ND | 1u << SPURION_UNICODE_NL | 1u << SPURION_UNICODE_NO)

typedef struct text_out {
    char *data;
    size_t count, capacity;
    bool failed;
} text_out;

static void put(text_out *o, const char *s, size_t n)
{
    if (o->failed) {
        return;
    }
    if (o->count + n + 1 > o->capacity) {
        size_t capacity = (o->count + n + 1) * 2;
        char *grown = realloc(o->data, capacity);
        if (grown == NULL) {
            o->failed = true;
            return;
        }
        o->data = grown;
        o->capacity = capacity;
    }
    memcpy(o->data + o->count, s, n);
    o->count += n;
    o->data[o->count] = '\0';
}

static void put_text(text_out *o, const char *s)
{
    put(o, s, strlen(s));
}

#define BITS_WORD 0 /* stands for \w in the place of categories */

/* Is a run of the class table in \p{..} of bits, or in \w? Oniguruma's \w differs from that of Rust's regex in eight characters. */
static bool is_member(uint32_t run, uint32_t bits)
{
    uint32_t category = run & SPURION_UNICODE_CATEGORY;
    if (bits != BITS_WORD) {
        return (bits >> category & 1) != 0 && category != SPURION_UNICODE_CS; /* no text has surrogates */
    }
    return ((run & SPURION_UNICODE_WORD) != 0 && category != SPURION_UNICODE_CF) ||
           (category == SPURION_UNICODE_NO && run >> 8 < 0x100);
}

/* The set as ranges in brackets. Alone, it is kept from being folded under (?i), as Oniguruma does with a property; within
 * brackets it is folded, as there. */
static void put_set(text_out *o, uint32_t bits, bool negative, bool within_brackets)
{
    uint32_t begin = 0;
    bool inside = false;

    put_text(o, within_brackets ? "[" : "(?-i:[");
    put_text(o, negative ? "^" : "");
    for (size_t i = 0; i <= spurion_unicode_run_count; i++) {
        bool last = i == spurion_unicode_run_count;
        uint32_t at = last ? SPURION_UNICODE_CODE_POINTS : spurion_unicode_runs[i] >> 8;
        bool member = !last && is_member(spurion_unicode_runs[i], bits);
        if (member && !inside) {
            begin = at;
        } else if (!member && inside) {
            char range[48];
            (void)snprintf(range, sizeof range, "\\x{%x}-\\x{%x}", (unsigned)begin, (unsigned)(at - 1));
            put_text(o, range);
        }
        inside = member;
    }
    put_text(o, within_brackets ? "]" : "])");
}

/* A word boundary (or what is none) with our \w. */
static void put_boundary(text_out *o, bool is_boundary)
{
    put_text(o, "(?:(?<=");
    put_set(o, BITS_WORD, false, false);
    put_text(o, is_boundary ? ")(?!" : ")(?=");
    put_set(o, BITS_WORD, false, false);
    put_text(o, ")|(?<!");
    put_set(o, BITS_WORD, false, false);
    put_text(o, is_boundary ? ")(?=" : ")(?!");
    put_set(o, BITS_WORD, false, false);
    put_text(o, "))");
}

/* Writes out \p{name}, \P{name}, \p{^name} at s[i]; returns its length, or 0 when the name is no category. */
static size_t put_property(text_out *o, const char *s, size_t n, size_t i, bool within_brackets)
{
    bool negative = s[i + 1] == 'P';
    size_t name = i + 3, end;
    uint32_t bits;

    if (i + 2 >= n || s[i + 2] != '{') {
        return 0;
    }
    for (end = name; end < n && s[end] != '}'; end++) {
    }
    if (end == n) {
        return 0;
    }
    if (s[name] == '^') {
        negative = !negative;
        name++;
    }
    bits = spurion_unicode_property(s + name, end - name);
    if (bits == 0) {
        return 0;
    }
    put_set(o, bits, negative, within_brackets);
    return end + 1 - i;
}

/* Writes the escape at s[i] (a backslash), with our sets in the place of Oniguruma's; returns its length. */
static size_t put_escape(text_out *o, const char *s, size_t n, size_t i, bool within_brackets)
{
    size_t taken = 0;

    switch (i + 1 < n ? s[i + 1] : '\0') {
    case 'p':
    case 'P':
        taken = put_property(o, s, n, i, within_brackets);
        break;
    case 'd':
    case 'D':
        put_set(o, 1u << SPURION_UNICODE_ND, s[i + 1] == 'D', within_brackets);
        return 2;
    case 'w':
    case 'W':
        put_set(o, BITS_WORD, s[i + 1] == 'W', within_brackets);
        return 2;
    case 'b':
    case 'B':
        if (!within_brackets) {
            put_boundary(o, s[i + 1] == 'b');
            return 2;
        }
        break;
    default:
        break;
    }
    if (taken == 0) {
        taken = i + 1 < n ? 2 : 1;
        put(o, s + i, taken);
    }
    return taken;
}

static void put_pattern(text_out *o, const char *s, size_t n)
{
    int brackets = 0;

    for (size_t i = 0; i < n && !o->failed; i++) {
        if (s[i] == '\\') {
            i += put_escape(o, s, n, i, brackets > 0) - 1;
            continue;
        }
        put(o, s + i, 1);
        if (s[i] == '[') {
            brackets++;
            if (i + 1 < n && s[i + 1] == '^') {
                put(o, s + ++i, 1);
            }
            if (i + 1 < n && s[i + 1] == ']') { /* first in its brackets: a character */
                put(o, s + ++i, 1);
            }
        } else if (s[i] == ']' && brackets > 0) {
            brackets--;
        }
    }
}

static spurion_status compile(tok_pattern *p, const char *regex, size_t bytes)
{
    text_out o = {0};
    OnigErrorInfo info;
    regex_t *compiled = NULL;
    int code;

    put(&o, "", 0);
    put_pattern(&o, regex, bytes);
    if (o.failed) {
        free(o.data);
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a regex");
    }
    memset(&info, 0, sizeof info);
    code = onig_new(&compiled, (const OnigUChar *)o.data, (const OnigUChar *)o.data + o.count, ONIG_OPTION_NONE, ONIG_ENCODING_UTF8,
                    OnigDefaultSyntax, &info);
    if (code != ONIG_NORMAL) {
        OnigUChar text[ONIG_MAX_ERROR_MESSAGE_LEN] = {0};
        (void)onig_error_code_to_str(text, code, &info); /* info points into the pattern */
        free(o.data);
        return spurion_error(SPURION_INVALID_ARGUMENT, "tokenizer.json: expected a regex of Oniguruma's syntax, found '%.*s': %s",
                             (int)(bytes < 100 ? bytes : 100), regex, (const char *)text);
    }
    free(o.data);
    p->kind = TOK_PATTERN_REGEX;
    p->regex = compiled;
    return spurion_ok();
}

/* digits_max of the chat regex when it is one (3, or 1 for a single \p{N}), else 0. */
static int chat_digits(const char *regex, size_t bytes)
{
    size_t head = sizeof regex_chat_head - 1, tail = sizeof regex_chat_tail - 1;
    if (bytes < head + tail || memcmp(regex, regex_chat_head, head) != 0 ||
        memcmp(regex + bytes - tail, regex_chat_tail, tail) != 0) {
        return 0;
    }
    if (bytes == head + tail) {
        return 1;
    }
    return bytes == head + tail + 5 && memcmp(regex + head, "{1,3}", 5) == 0 ? 3 : 0;
}

spurion_status tok_pattern_regex(tok_pattern *p, const char *regex, size_t bytes)
{
    p->digits_max = chat_digits(regex, bytes);
    if (p->digits_max > 0) {
        p->kind = TOK_PATTERN_CHAT;
        return spurion_ok();
    }
    if (bytes == sizeof regex_gpt2 - 1 && memcmp(regex, regex_gpt2, bytes) == 0) {
        p->kind = TOK_PATTERN_GPT2;
        return spurion_ok();
    }
    return compile(p, regex, bytes);
}

spurion_status tok_pattern_literal(tok_pattern *p, const char *literal, size_t bytes)
{
    if (bytes == 0) {
        return spurion_error(SPURION_UNIMPLEMENTED, "tokenizer.json: expected a pattern of at least one character, found \"\"");
    }
    p->literal = malloc(bytes);
    if (p->literal == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a pattern");
    }
    memcpy(p->literal, literal, bytes);
    p->literal_bytes = bytes;
    p->kind = TOK_PATTERN_LITERAL;
    return spurion_ok();
}

void tok_pattern_fini(tok_pattern *p)
{
    free(p->literal);
    if (p->regex != NULL) {
        onig_free(p->regex);
    }
    memset(p, 0, sizeof *p);
}

void tok_region_free(void *region)
{
    if (region != NULL) {
        onig_region_free(region, 1);
    }
}

/* ---- the two regexes by hand ---- */

typedef enum char_class { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE, CLASS_END } char_class;

static char_class class_of(int *bytes, tok_work *w, const char *s, size_t n, size_t at)
{
    uint32_t c, category;
    w->steps++;
    if (at >= n) {
        *bytes = 0;
        return CLASS_END;
    }
    c = spurion_utf8_decode(bytes, s + at);
    category = w->t->classes[c] & SPURION_UNICODE_CATEGORY;
    if (BITS_LETTER >> category & 1) {
        return CLASS_LETTER;
    }
    if (BITS_NUMBER >> category & 1) {
        return CLASS_NUMBER;
    }
    return spurion_unicode_space(c) ? CLASS_SPACE : CLASS_OTHER;
}

/* End of the run of one class that begins at `at`. */
static size_t run_end(tok_work *w, const char *s, size_t n, size_t at, char_class wanted)
{
    int bytes;
    while (class_of(&bytes, w, s, n, at) == wanted) {
        at += (size_t)bytes;
    }
    return at;
}

/* Length of 's 't 're 've 'm 'll 'd at s (an apostrophe), 0 when there is none. Without case, s also is U+017F. */
static size_t contraction(const char *s, size_t n, bool any_case)
{
    char a = n > 1 ? s[1] : '\0', b = n > 2 ? s[2] : '\0';
    if (any_case) {
        if (n > 2 && memcmp(s + 1, "\xc5\xbf", 2) == 0) {
            return 3;
        }
        a = (char)(a >= 'A' && a <= 'Z' ? a + 32 : a);
        b = (char)(b >= 'A' && b <= 'Z' ? b + 32 : b);
    }
    if (a == 's' || a == 't' || a == 'm' || a == 'd') {
        return 2;
    }
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

/* \s+(?!\S)|\s+ at a run of spaces: all of it at the end of the text, else all but its last character, but at least one. */
static size_t spaces_end(const char *s, size_t n, size_t at, size_t run)
{
    size_t last;
    if (run == n) {
        return run;
    }
    last = spurion_utf8_back(s, run);
    return last > at ? last : run;
}

static size_t gpt2_end(tok_work *w, const char *s, size_t n, size_t at)
{
    int bytes, next_bytes;
    char_class c = class_of(&bytes, w, s, n, at);
    size_t taken = s[at] == '\'' ? contraction(s + at, n - at, false) : 0;

    if (taken > 0) {
        return at + taken;
    }
    if (s[at] == ' ') {
        char_class next = class_of(&next_bytes, w, s, n, at + 1);
        if (next != CLASS_SPACE && next != CLASS_END) {
            return run_end(w, s, n, at + 1, next);
        }
    }
    if (c != CLASS_SPACE) {
        return run_end(w, s, n, at, c);
    }
    return spaces_end(s, n, at, run_end(w, s, n, at, CLASS_SPACE));
}

static bool is_newline(char c)
{
    return c == '\r' || c == '\n';
}

static size_t chat_end(tok_work *w, const char *s, size_t n, size_t at, int digits_max)
{
    int bytes, next_bytes;
    char_class c = class_of(&bytes, w, s, n, at), next;
    size_t taken = s[at] == '\'' ? contraction(s + at, n - at, true) : 0;
    size_t end = at, newline = 0;

    if (taken > 0) {
        return at + taken;
    }
    next = class_of(&next_bytes, w, s, n, at + (size_t)bytes);
    if (c == CLASS_LETTER || (c != CLASS_NUMBER && !is_newline(s[at]) && next == CLASS_LETTER)) {
        return run_end(w, s, n, at + (size_t)bytes, CLASS_LETTER);
    }
    if (c == CLASS_NUMBER) {
        for (int i = 0; i < digits_max && class_of(&bytes, w, s, n, end) == CLASS_NUMBER; i++) {
            end += (size_t)bytes;
        }
        return end;
    }
    if (c == CLASS_OTHER || (s[at] == ' ' && next == CLASS_OTHER)) {
        end = run_end(w, s, n, at + (size_t)bytes, CLASS_OTHER);
        while (end < n && is_newline(s[end])) {
            end++;
        }
        return end;
    }
    end = run_end(w, s, n, at, CLASS_SPACE);
    for (newline = end; newline > at && !is_newline(s[newline - 1]); newline--) {
    }
    return newline > at ? newline : spaces_end(s, n, at, end);
}

/* ---- matches ---- */

static bool chars_match(size_t *begin, size_t *end, const uint8_t *classes, tok_chars kind, tok_matches *m)
{
    size_t at = m->at;
    int bytes;

    for (; at < m->n; at += (size_t)bytes) {
        uint32_t c = spurion_utf8_decode(&bytes, m->s + at);
        bool word = (classes[c] & SPURION_UNICODE_WORD) != 0;
        size_t stop = at + (size_t)bytes;
        if (kind == TOK_CHARS_NUMERIC
                ? (classes[c] & SPURION_UNICODE_NUMERIC) == 0
                : spurion_unicode_space(c) != (kind == TOK_CHARS_SPACE) && !(kind == TOK_CHARS_WORDS && word)) {
            continue;
        }
        while (kind == TOK_CHARS_WORDS && stop < m->n) {
            c = spurion_utf8_decode(&bytes, m->s + stop);
            if (((classes[c] & SPURION_UNICODE_WORD) != 0) != word || (!word && spurion_unicode_space(c))) {
                break;
            }
            stop += (size_t)bytes;
        }
        *begin = at;
        *end = m->at = stop;
        return true;
    }
    m->at = m->n;
    return false;
}

/* The iteration of the onig crate: an empty match moves on by one character, and is dropped right after another match. */
static bool regex_match(bool *found, size_t *begin, size_t *end, tok_work *w, regex_t *regex, tok_matches *m)
{
    const OnigUChar *s = (const OnigUChar *)m->s;

    *found = false;
    if (w->region == NULL && (w->region = onig_region_new()) == NULL) {
        return tok_fail_memory(w);
    }
    while (m->at <= m->n) {
        OnigRegion *region = w->region;
        int code = onig_search(regex, s, s + m->n, s + m->at, s + m->n, region, ONIG_OPTION_NONE);
        bool skip;
        if (code == ONIG_MISMATCH) {
            m->at = m->n + 1;
            return true;
        }
        if (code < 0) {
            OnigUChar text[ONIG_MAX_ERROR_MESSAGE_LEN] = {0};
            (void)onig_error_code_to_str(text, code);
            return tok_fail(
                w, spurion_error(SPURION_RESOURCE_EXHAUSTED, "a regex of tokenizer.json failed on this text: %s", (char *)text));
        }
        *begin = (size_t)region->beg[0];
        *end = m->at = (size_t)region->end[0];
        skip = *begin == *end && m->skip_next_empty;
        if (*begin == *end) {
            m->at += m->at < m->n ? (size_t)spurion_utf8_length((unsigned char)m->s[m->at]) : 1;
            m->skip_next_empty = m->skip_next_empty && !skip;
        } else {
            m->skip_next_empty = true;
        }
        if (!skip) {
            *found = true;
            return true;
        }
    }
    return true;
}

bool tok_pattern_next(bool *found, size_t *begin, size_t *end, tok_work *w, const tok_pattern *p, tok_matches *m)
{
    const uint8_t *classes = w->t->classes;
    const char *hit;

    *found = false;
    switch (p->kind) {
    case TOK_PATTERN_LITERAL:
        hit = m->at < m->n ? memmem(m->s + m->at, m->n - m->at, p->literal, p->literal_bytes) : NULL;
        if (hit != NULL) {
            *begin = (size_t)(hit - m->s);
            *end = m->at = *begin + p->literal_bytes;
            *found = true;
        }
        return true;
    case TOK_PATTERN_GPT2:
    case TOK_PATTERN_CHAT:
        if (m->at < m->n) {
            *begin = m->at;
            *end = p->kind == TOK_PATTERN_GPT2 ? gpt2_end(w, m->s, m->n, m->at)
                                               : chat_end(w, m->s, m->n, m->at, p->digits_max);
            m->at = *end;
            *found = true;
        }
        return true;
    case TOK_PATTERN_CHARS:
        *found = chars_match(begin, end, classes, p->chars, m);
        return true;
    case TOK_PATTERN_REGEX:
        return regex_match(found, begin, end, w, p->regex, m);
    case TOK_PATTERN_NONE:
        break;
    }
    return true;
}

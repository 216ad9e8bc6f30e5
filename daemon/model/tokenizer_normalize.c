/* Normalisers. Unicode normal forms by utf8proc, cut at every character that takes no part in normalisation in the library's
 * (older) tables; such a character is a starter without (de)composition there, so the parts around it are independent.
 * Thread: as the work. Memory: the work's two text buffers, used in turn. */
#include "daemon/model/tokenizer_internal.h"

#include <utf8proc.h>

#include <stdlib.h>
#include <string.h>

#define DECOMPOSITION_MAX 32 /* code points of one character; Unicode's longest has 18 */

typedef struct span {
    const char *s;
    size_t n;
    size_t first_bytes;
} span;

static size_t first_length(const span *in)
{
    return in->n == 0 ? 0 : (size_t)spurion_utf8_length((unsigned char)in->s[0]);
}

/* No character below this changes, or changes another, in the form. */
static uint32_t form_floor(tok_normalizer_kind kind)
{
    return kind == TOK_NORM_NFC ? 0x300 : kind == TOK_NORM_NFD ? 0xc0 : 0xa0;
}

static utf8proc_option_t form_options(tok_normalizer_kind kind)
{
    switch (kind) {
    case TOK_NORM_NFC:
        return UTF8PROC_STABLE | UTF8PROC_COMPOSE;
    case TOK_NORM_NFD:
        return UTF8PROC_STABLE | UTF8PROC_DECOMPOSE;
    case TOK_NORM_NFKC:
        return UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT;
    default:
        return UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT;
    }
}

static bool reserve_points(tok_work *w, size_t count)
{
    int32_t *grown;
    if (count <= w->points_capacity) {
        return true;
    }
    count += count / 2;
    grown = realloc(w->points, count * sizeof *grown);
    if (grown == NULL) {
        return tok_fail_memory(w);
    }
    w->points = grown;
    w->points_capacity = count;
    return true;
}

static int combining_class(int32_t c)
{
    return c < 0x300 ? 0 : utf8proc_get_property(c)->combining_class;
}

/* Stable sort of marks by combining class. utf8proc's own takes quadratic time for long runs, so runs are sorted here: short
 * ones by insertion, long ones by counting. spare (n) */
static void sort_marks(int32_t *marks, int32_t *spare, size_t n)
{
    size_t starts[257] = {0};

    if (n <= 16) {
        for (size_t i = 1; i < n; i++) {
            int32_t mark = marks[i];
            size_t at = i;
            for (; at > 0 && combining_class(marks[at - 1]) > combining_class(mark); at--) {
                marks[at] = marks[at - 1];
            }
            marks[at] = mark;
        }
        return;
    }
    for (size_t i = 0; i < n; i++) {
        starts[combining_class(marks[i]) + 1]++;
    }
    for (int c = 1; c < 257; c++) {
        starts[c] += starts[c - 1];
    }
    for (size_t i = 0; i < n; i++) {
        spare[starts[combining_class(marks[i])]++] = marks[i];
    }
    memcpy(marks, spare, n * sizeof *marks);
}

/* Decomposes s into w->points and puts marks in order; *count code points. */
static bool decompose(size_t *count, tok_work *w, const char *s, size_t n, utf8proc_option_t options)
{
    size_t run = 0;
    int bytes, boundary = 0;

    *count = 0;
    for (size_t at = 0; at < n; at += (size_t)bytes) {
        utf8proc_int32_t c = (utf8proc_int32_t)spurion_utf8_decode(&bytes, s + at);
        utf8proc_ssize_t made;
        if (!reserve_points(w, 2 * (*count + DECOMPOSITION_MAX))) { /* the upper half is spare for sorting */
            return false;
        }
        made = utf8proc_decompose_char(c, w->points + *count, DECOMPOSITION_MAX, options, &boundary);
        if (made < 0 || made > DECOMPOSITION_MAX) {
            return tok_fail(w, spurion_error(SPURION_INTERNAL, "Unicode normalisation of U+%04X failed", (unsigned)c));
        }
        *count += (size_t)made;
    }
    for (size_t i = 0; i <= *count; i++) {
        if (i == *count || combining_class(w->points[i]) == 0) {
            if (i - run > 1) {
                sort_marks(w->points + run, w->points + *count, i - run);
            }
            run = i + 1;
        }
    }
    return true;
}

/* Appends the normal form of s, which has characters of normalisation only. */
static bool append_form(tok_work *w, tok_buf *out, tok_normalizer_kind kind, const char *s, size_t n)
{
    utf8proc_option_t options = form_options(kind);
    utf8proc_ssize_t made;
    size_t count;

    if (n == 0) {
        return true;
    }
    if (!decompose(&count, w, s, n, options)) {
        return false;
    }
    made = utf8proc_normalize_utf32(w->points, (utf8proc_ssize_t)count, options);
    if (made < 0) {
        return tok_fail(w, spurion_error(SPURION_INTERNAL, "Unicode normalisation failed: %s", utf8proc_errmsg(made)));
    }
    if (!tok_reserve(w, out, (size_t)made * 4)) {
        return false;
    }
    for (utf8proc_ssize_t i = 0; i < made; i++) {
        out->count += (size_t)spurion_utf8_encode(out->data + out->count, (uint32_t)w->points[i]);
    }
    return true;
}

static bool normal_form(span *out, tok_work *w, tok_buf *b, tok_normalizer_kind kind, span in)
{
    const uint8_t *classes = w->t->classes;
    uint32_t floor = form_floor(kind);
    size_t at = 0, part = 0;
    bool changes = false;
    int bytes;

    for (; at < in.n && !changes; at += (size_t)bytes) {
        uint32_t c = spurion_utf8_decode(&bytes, in.s + at);
        changes = c >= floor && (classes[c] & SPURION_UNICODE_NORMAL) != 0;
    }
    *out = in;
    if (!changes) {
        return true;
    }
    b->count = 0;
    for (at = 0; at < in.n; at += (size_t)bytes) {
        uint32_t c = spurion_utf8_decode(&bytes, in.s + at);
        if ((classes[c] & SPURION_UNICODE_NORMAL) == 0) {
            if (!append_form(w, b, kind, in.s + part, at - part) || !tok_append(w, b, in.s + at, (size_t)bytes)) {
                return false;
            }
            part = at + (size_t)bytes;
        }
    }
    if (!append_form(w, b, kind, in.s + part, in.n - part)) {
        return false;
    }
    *out = (span){.s = b->data, .n = b->count};
    out->first_bytes = in.first_bytes > 0 ? first_length(out) : 0;
    return true;
}

static bool lowercase(span *out, tok_work *w, tok_buf *b, span in)
{
    int bytes;

    b->count = 0;
    if (!tok_reserve(w, b, in.n * 2)) { /* no lower case has more than 3 bytes for 2 */
        return false;
    }
    for (size_t at = 0; at < in.n; at += (size_t)bytes) {
        uint32_t lower[2];
        int count = spurion_unicode_lower(lower, spurion_utf8_decode(&bytes, in.s + at));
        for (int i = 0; i < count; i++) {
            b->count += (size_t)spurion_utf8_encode(b->data + b->count, lower[i]);
        }
    }
    *out = (span){.s = b->data, .n = b->count};
    out->first_bytes = in.first_bytes > 0 ? first_length(out) : 0;
    return true;
}

static bool prepend(span *out, tok_work *w, tok_buf *b, const tok_normalizer *p, span in)
{
    *out = in;
    if (in.n == 0) {
        return true;
    }
    b->count = 0;
    if (!tok_append(w, b, p->content, p->content_bytes) || !tok_append(w, b, in.s, in.n)) {
        return false;
    }
    *out = (span){.s = b->data, .n = b->count};
    out->first_bytes = in.first_bytes > 0 ? in.first_bytes + p->content_bytes : 0;
    return true;
}

static bool replace(span *out, tok_work *w, tok_buf *b, const tok_normalizer *r, span in)
{
    tok_matches m = {.s = in.s, .n = in.n};
    size_t previous = 0, begin = 0, end = 0, first_bytes = in.first_bytes;
    bool found;

    *out = in;
    if (in.n == 0) {
        return true;
    }
    b->count = 0;
    for (;;) {
        if (!tok_pattern_next(&found, &begin, &end, w, &r->pattern, &m)) {
            return false;
        }
        if (!found) {
            break;
        }
        if (!tok_append(w, b, in.s + previous, begin - previous) || !tok_append(w, b, r->content, r->content_bytes)) {
            return false;
        }
        if (end <= in.first_bytes) {
            first_bytes = b->count + (in.first_bytes - end);
        }
        previous = end;
    }
    if (!tok_append(w, b, in.s + previous, in.n - previous)) {
        return false;
    }
    *out = (span){.s = b->data, .n = b->count, .first_bytes = first_bytes < b->count ? first_bytes : b->count};
    return true;
}

static void strip(span *out, const tok_normalizer *p, span in)
{
    int bytes;

    *out = in;
    while (p->left && out->n > 0 && spurion_unicode_space(spurion_utf8_decode(&bytes, out->s))) {
        out->s += bytes;
        out->n -= (size_t)bytes;
        out->first_bytes -= out->first_bytes < (size_t)bytes ? out->first_bytes : (size_t)bytes;
    }
    while (p->right && out->n > 0) {
        size_t last = spurion_utf8_back(out->s, out->n);
        if (!spurion_unicode_space(spurion_utf8_decode(&bytes, out->s + last))) {
            break;
        }
        out->n = last;
    }
}

static bool byte_level(span *out, tok_work *w, tok_buf *b, span in)
{
    b->count = 0;
    if (!tok_append_byte_level(w, b, in.s, in.n)) {
        return false;
    }
    *out = (span){.s = b->data, .n = b->count};
    out->first_bytes = in.first_bytes > 0 ? first_length(out) : 0;
    return true;
}

bool tok_normalize(const char **out, size_t *out_bytes, size_t *first_bytes, tok_work *w, const char *text, size_t bytes)
{
    span now = {.s = text, .n = bytes};
    int used = 1; /* buffer that now points into, if any */
    bool ok = true;

    now.first_bytes = first_length(&now);
    for (int i = 0; ok && i < w->t->normalizer_count; i++) {
        const tok_normalizer *p = &w->t->normalizers[i];
        tok_buf *b = &w->normal[1 - used];
        span in = now;
        if (in.n > SPURION_TOKENIZER_TEXT_BYTES_MAX) {
            return tok_fail(w, spurion_error(SPURION_RESOURCE_EXHAUSTED,
                                             "expected a text of at most %u bytes after normalisation, found %zu",
                                             SPURION_TOKENIZER_TEXT_BYTES_MAX, in.n));
        }
        switch (p->kind) {
        case TOK_NORM_NFC:
        case TOK_NORM_NFD:
        case TOK_NORM_NFKC:
        case TOK_NORM_NFKD:
            ok = normal_form(&now, w, b, p->kind, in);
            break;
        case TOK_NORM_LOWERCASE:
            ok = lowercase(&now, w, b, in);
            break;
        case TOK_NORM_PREPEND:
            ok = prepend(&now, w, b, p, in);
            break;
        case TOK_NORM_REPLACE:
            ok = replace(&now, w, b, p, in);
            break;
        case TOK_NORM_STRIP:
            strip(&now, p, in);
            break;
        case TOK_NORM_BYTE_LEVEL:
            ok = byte_level(&now, w, b, in);
            break;
        }
        used = now.s == b->data ? 1 - used : used;
    }
    *out = now.s;
    *out_bytes = now.n;
    *first_bytes = now.first_bytes;
    return ok;
}

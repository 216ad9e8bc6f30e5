/* Pre-tokenizers. Each works on one piece at a time and hands its pieces on at once, so nothing is kept but one buffer a
 * stage; the library does stage after stage over all pieces, which gives the same pieces in the same order.
 * Thread: as the work. Memory: the work's stage buffers. */
#include "daemon/model/tokenizer_internal.h"

#include <string.h>

/* Pieces under way in one split, by the rules of the library's NormalizedString::split. */
typedef struct splitter {
    tok_work *w;
    const tok_stage *stage;
    int index;
    const char *s;
    bool first;
    bool pending, last_match; /* a piece waits for its neighbour */
    size_t begin, end;
} splitter;

/* Sends a piece of the stage on, spelled in byte-level characters where the stage does so. */
static bool send(splitter *x, size_t begin, size_t end)
{
    tok_buf *b = &x->w->stage_piece[x->index];
    if (begin == end) {
        return true;
    }
    if (x->stage->kind != TOK_STAGE_BYTE_LEVEL) {
        return tok_split(x->w, x->index + 1, x->s + begin, end - begin, x->first && begin == 0);
    }
    b->count = 0;
    return tok_append_byte_level(x->w, b, x->s + begin, end - begin) &&
           tok_split(x->w, x->index + 1, b->data, b->count, x->first && begin == 0);
}

static bool flush(splitter *x)
{
    bool pending = x->pending;
    x->pending = false;
    return !pending || send(x, x->begin, x->end);
}

/* Takes the next segment; segments cover the string. */
static bool segment(splitter *x, size_t begin, size_t end, bool is_match)
{
    bool join = false;

    is_match = is_match != x->stage->invert;
    switch (x->stage->behavior) {
    case TOK_REMOVED:
        return is_match || send(x, begin, end);
    case TOK_ISOLATED:
        return send(x, begin, end);
    case TOK_MERGED_PREVIOUS:
        join = is_match && !x->last_match;
        break;
    case TOK_MERGED_NEXT:
        join = !is_match && x->last_match;
        break;
    case TOK_CONTIGUOUS:
        join = is_match == x->last_match;
        break;
    }
    x->last_match = is_match;
    if (x->pending && join) {
        x->end = end;
        return true;
    }
    if (!flush(x)) {
        return false;
    }
    x->pending = true;
    x->begin = begin;
    x->end = end;
    return true;
}

static bool split_pattern(tok_work *w, int index, const tok_stage *stage, const tok_pattern *p, const char *s, size_t n, bool first)
{
    splitter x = {.w = w, .stage = stage, .index = index, .s = s, .first = first};
    tok_matches m = {.s = s, .n = n};
    size_t previous = 0, begin = 0, end = 0;
    bool found;

    for (;;) {
        if (!tok_pattern_next(&found, &begin, &end, w, p, &m)) {
            return false;
        }
        if (!found) {
            break;
        }
        if ((previous != begin && !segment(&x, previous, begin, false)) || !segment(&x, begin, end, true)) {
            return false;
        }
        previous = end;
    }
    return (previous == n || segment(&x, previous, n, false)) && flush(&x);
}

static bool split_byte_level(tok_work *w, int index, const tok_stage *stage, const char *s, size_t n, bool first)
{
    static const tok_pattern gpt2 = {.kind = TOK_PATTERN_GPT2};
    splitter x = {.w = w, .stage = stage, .index = index, .first = first};

    if (stage->add_prefix_space && s[0] != ' ') {
        tok_buf *b = &w->stage[index];
        b->count = 0;
        if (!tok_append(w, b, " ", 1) || !tok_append(w, b, s, n)) {
            return false;
        }
        s = b->data;
        n = b->count;
    }
    if (stage->use_regex) {
        return split_pattern(w, index, stage, &gpt2, s, n, first);
    }
    x.s = s;
    return send(&x, 0, n);
}

static bool split_metaspace(tok_work *w, int index, const tok_stage *stage, const char *s, size_t n, bool first)
{
    tok_buf *b = &w->stage[index];
    size_t r = stage->replacement_bytes;
    bool has = s[0] == ' ' || (n >= r && memcmp(s, stage->replacement, r) == 0);

    b->count = 0;
    if (!has && (stage->prepend == TOK_PREPEND_ALWAYS || (stage->prepend == TOK_PREPEND_FIRST && first)) &&
        !tok_append(w, b, stage->replacement, r)) {
        return false;
    }
    while (n > 0) {
        const char *space = memchr(s, ' ', n);
        size_t plain = space == NULL ? n : (size_t)(space - s);
        if (!tok_append(w, b, s, plain) || (space != NULL && !tok_append(w, b, stage->replacement, r))) {
            return false;
        }
        s += plain + (space != NULL);
        n -= plain + (space != NULL);
    }
    if (stage->split) {
        return split_pattern(w, index, stage, &stage->pattern, b->data, b->count, first);
    }
    return tok_split(w, index + 1, b->data, b->count, first);
}

bool tok_split(tok_work *w, int index, const char *s, size_t n, bool first)
{
    const tok_stage *stage = &w->t->stages[index];

    if (n == 0) {
        return true;
    }
    if (index == w->t->stage_count) {
        return tok_bpe_word(w, s, n);
    }
    switch (stage->kind) {
    case TOK_STAGE_BYTE_LEVEL:
        return split_byte_level(w, index, stage, s, n, first);
    case TOK_STAGE_METASPACE:
        return split_metaspace(w, index, stage, s, n, first);
    case TOK_STAGE_SPLIT:
        break;
    }
    return split_pattern(w, index, stage, &stage->pattern, s, n, first);
}

/* Added tokens in text: leftmost-longest, non-overlapping matches over a byte trie, with the library's rules for whole words
 * and stripped spaces. Thread: tries are constant after open. Memory: the trie's nodes. */
#include "daemon/model/tokenizer_internal.h"

#include <stdlib.h>
#include <string.h>

static spurion_status trie_node(int32_t *index, tok_trie *trie, unsigned char byte)
{
    if (trie->count == trie->capacity) {
        size_t capacity = trie->capacity == 0 ? 64 : trie->capacity * 2;
        tok_trie_node *grown = realloc(trie->nodes, capacity * sizeof *grown);
        if (grown == NULL || capacity > INT32_MAX) {
            trie->nodes = grown == NULL ? trie->nodes : grown;
            return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for added tokens");
        }
        trie->nodes = grown;
        trie->capacity = capacity;
    }
    *index = (int32_t)trie->count;
    trie->nodes[trie->count++] = (tok_trie_node){.child = -1, .sibling = -1, .added = -1, .byte = byte};
    return spurion_ok();
}

static int32_t trie_child(const tok_trie *trie, int32_t node, unsigned char byte)
{
    int32_t child = node == 0 ? trie->first[byte] : trie->nodes[node].child;
    while (node != 0 && child >= 0 && trie->nodes[child].byte != byte) {
        child = trie->nodes[child].sibling;
    }
    return child;
}

spurion_status tok_trie_add(tok_trie *trie, const char *s, size_t n, int32_t added)
{
    spurion_status st = spurion_ok();
    int32_t node = 0, child;

    if (trie->count == 0) {
        SPURION_TRY(st, trie_node(&node, trie, 0));
        memset(trie->first, -1, sizeof trie->first);
    }
    if (n == 0) {
        return spurion_error(SPURION_INVALID_ARGUMENT,
                             "tokenizer.json: expected added tokens that are not empty after normalisation, found an empty one");
    }
    for (size_t i = 0; i < n; i++) {
        unsigned char byte = (unsigned char)s[i];
        child = trie_child(trie, node, byte);
        if (child < 0) {
            SPURION_TRY(st, trie_node(&child, trie, byte));
            if (node == 0) {
                trie->first[byte] = child;
            } else {
                trie->nodes[child].sibling = trie->nodes[node].child;
                trie->nodes[node].child = child;
            }
        }
        node = child;
    }
    if (trie->nodes[node].added >= 0) {
        return spurion_error(SPURION_INVALID_ARGUMENT,
                             "tokenizer.json: expected added tokens that differ after normalisation, found '%.*s' twice",
                             (int)(n < 64 ? n : 64), s);
    }
    trie->nodes[node].added = added;
out:
    return st;
}

void tok_trie_fini(tok_trie *trie)
{
    free(trie->nodes);
    memset(trie, 0, sizeof *trie);
}

/* Longest token that begins at s[at]; returns its index or -1. */
static int32_t trie_match(size_t *end, tok_work *w, const tok_trie *trie, const char *s, size_t n, size_t at)
{
    int32_t node = trie->first[(unsigned char)s[at]], found = -1;
    w->steps++;
    while (node >= 0) {
        w->steps++;
        at++;
        if (trie->nodes[node].added >= 0) {
            found = trie->nodes[node].added;
            *end = at;
        }
        node = at < n ? trie_child(trie, node, (unsigned char)s[at]) : -1;
    }
    return found;
}

static bool word_at(const tok_work *w, const char *s)
{
    int bytes;
    return (w->t->classes[spurion_utf8_decode(&bytes, s)] & SPURION_UNICODE_WORD) != 0;
}

static bool alone(const tok_work *w, const char *s, size_t n, size_t begin, size_t end)
{
    return (begin == 0 || !word_at(w, s + spurion_utf8_back(s, begin))) && (end == n || !word_at(w, s + end));
}

static size_t spaces_before(const char *s, size_t begin)
{
    int bytes;
    while (begin > 0) {
        size_t last = spurion_utf8_back(s, begin);
        if (!spurion_unicode_space(spurion_utf8_decode(&bytes, s + last))) {
            break;
        }
        begin = last;
    }
    return begin;
}

static size_t spaces_after(const char *s, size_t n, size_t end)
{
    int bytes;
    while (end < n && spurion_unicode_space(spurion_utf8_decode(&bytes, s + end))) {
        end += (size_t)bytes;
    }
    return end;
}

bool tok_added_split(tok_work *w, const tok_trie *trie, const char *s, size_t n, bool first, size_t first_bytes, tok_piece_fn piece)
{
    size_t done = 0, end = 0;

    for (size_t at = 0; trie->count > 0 && at < n;) {
        int32_t index = trie_match(&end, w, trie, s, n, at);
        const tok_added *added;
        size_t begin = at;
        if (index < 0) {
            at++;
            continue;
        }
        at = end; /* the search goes on here even when spaces after it are swallowed: what the library does */
        added = &w->t->added[index];
        if (added->single_word && !alone(w, s, n, begin, end)) {
            continue;
        }
        if (added->lstrip) {
            begin = spaces_before(s, begin);
            begin = begin > done ? begin : done;
        }
        if (added->rstrip) {
            end = spaces_after(s, n, end);
        }
        if (begin >= end) { /* the library panics here */
            return tok_fail(w, spurion_error(SPURION_INVALID_ARGUMENT,
                                             "added token '%s' lies inside the spaces of the one before it", added->content));
        }
        if ((done < begin && !piece(w, -1, s, done, begin, first, first_bytes)) ||
            !piece(w, added->id, s, begin, end, first, first_bytes)) {
            return false;
        }
        done = end;
    }
    return done == n || piece(w, -1, s, done, n, first, first_bytes);
}

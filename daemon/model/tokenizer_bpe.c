/* Byte pair encoding: vocabulary and merges in open hash tables, one heap of merges per word, ordered by (rank, position) as in
 * the library, also where several merges make the same token. Time O(n log n) for a word of n characters.
 * Thread: tables are constant after open; symbols and heap are the work's. */
#include "daemon/model/tokenizer_internal.h"

#include <stdlib.h>
#include <string.h>

#define METASPACE "\xe2\x96\x81"

/* ---- tables ---- */

static uint64_t hash_bytes(const char *s, size_t n)
{
    uint64_t h = 0x9e3779b97f4a7c15u ^ (uint64_t)n, part;
    for (; n >= 8; s += 8, n -= 8) {
        memcpy(&part, s, 8);
        h = (h ^ part) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    part = 0;
    memcpy(&part, s, n);
    h = (h ^ part) * 0xff51afd7ed558ccdu;
    h ^= h >> 29;
    h *= 0xc4ceb9fe1a85ec53u;
    return h ^ h >> 32;
}

static size_t table_size(size_t count)
{
    size_t size = 16;
    while (size < count * 2) {
        size *= 2;
    }
    return size;
}

int32_t tok_bpe_find(const tok_bpe *bpe, const char *s, size_t n)
{
    if (n > bpe->bytes_max || bpe->slots == NULL) {
        return -1;
    }
    for (size_t i = hash_bytes(s, n) & bpe->slot_mask;; i = (i + 1) & bpe->slot_mask) {
        uint32_t slot = bpe->slots[i];
        if (slot == 0) {
            return -1;
        }
        if (bpe->entries[slot - 1].bytes == n && memcmp(bpe->blob + bpe->entries[slot - 1].offset, s, n) == 0) {
            return (int32_t)(slot - 1);
        }
    }
}

static int32_t find_id(const tok_bpe *bpe, const char *s, size_t n)
{
    int32_t entry = tok_bpe_find(bpe, s, n);
    return entry < 0 ? -1 : bpe->entries[entry].id;
}

spurion_status tok_bpe_index(tok_bpe *bpe)
{
    size_t size = table_size(bpe->entry_count);

    bpe->slots = calloc(size, sizeof *bpe->slots);
    if (bpe->slots == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a vocabulary of %zu tokens", bpe->entry_count);
    }
    bpe->slot_mask = size - 1;
    for (size_t e = 0; e < bpe->entry_count; e++) {
        const tok_entry *entry = &bpe->entries[e];
        size_t i = hash_bytes(bpe->blob + entry->offset, entry->bytes) & bpe->slot_mask;
        while (bpe->slots[i] != 0) {
            i = (i + 1) & bpe->slot_mask;
        }
        bpe->slots[i] = (uint32_t)e + 1;
        bpe->bytes_max = entry->bytes > bpe->bytes_max ? entry->bytes : bpe->bytes_max;
    }
    return spurion_ok();
}

static size_t merge_slot(const tok_bpe *bpe, uint64_t pair)
{
    uint64_t h = pair * 0x9e3779b97f4a7c15u;
    size_t i = (size_t)(h ^ h >> 32) & bpe->merge_mask;
    while (bpe->merges[i].pair != pair && bpe->merges[i].pair != UINT64_MAX) {
        i = (i + 1) & bpe->merge_mask;
    }
    return i;
}

static const tok_merge *merge_find(const tok_bpe *bpe, int32_t left, int32_t right)
{
    const tok_merge *m = &bpe->merges[merge_slot(bpe, (uint64_t)(uint32_t)left << 32 | (uint32_t)right)];
    return m->pair == UINT64_MAX ? NULL : m;
}

spurion_status tok_bpe_merges_init(tok_bpe *bpe, size_t count)
{
    size_t size = table_size(count);

    bpe->merges = malloc(size * sizeof *bpe->merges);
    bpe->rank_id = malloc((count + 1) * sizeof *bpe->rank_id);
    if (bpe->merges == NULL || bpe->rank_id == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %zu merges", count);
    }
    bpe->merge_mask = size - 1;
    bpe->rank_count = count;
    for (size_t i = 0; i < size; i++) {
        bpe->merges[i].pair = UINT64_MAX;
    }
    return spurion_ok();
}

static spurion_status out_of_vocabulary(uint32_t rank, const char *s, size_t n)
{
    return spurion_error(SPURION_INVALID_ARGUMENT,
                         "tokenizer.json: expected the tokens of merge %u in the vocabulary, found '%.*s' outside it",
                         (unsigned)rank, (int)(n < 64 ? n : 64), s);
}

spurion_status tok_bpe_merge_add(tok_bpe *bpe, uint32_t rank, const char *a, size_t a_bytes, const char *b, size_t b_bytes)
{
    int32_t left = find_id(bpe, a, a_bytes), right = find_id(bpe, b, b_bytes), made;
    size_t joined = a_bytes + b_bytes - bpe->prefix_bytes;
    char stack[256], *text = stack;
    tok_merge *m;

    if (left < 0 || right < 0) {
        return left < 0 ? out_of_vocabulary(rank, a, a_bytes) : out_of_vocabulary(rank, b, b_bytes);
    }
    if (b_bytes < bpe->prefix_bytes || joined > bpe->bytes_max) {
        return out_of_vocabulary(rank, b, b_bytes);
    }
    if (joined > sizeof stack && (text = malloc(joined)) == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a merge");
    }
    memcpy(text, a, a_bytes);
    memcpy(text + a_bytes, b + bpe->prefix_bytes, b_bytes - bpe->prefix_bytes);
    made = find_id(bpe, text, joined);
    if (made < 0) {
        spurion_status st = out_of_vocabulary(rank, text, joined);
        if (text != stack) {
            free(text);
        }
        return st;
    }
    if (text != stack) {
        free(text);
    }
    m = &bpe->merges[merge_slot(bpe, (uint64_t)(uint32_t)left << 32 | (uint32_t)right)];
    *m = (tok_merge){.pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right, .rank = rank, .id = made}; /* a later one wins */
    bpe->rank_id[rank] = made;
    return spurion_ok();
}

void tok_bpe_fini(tok_bpe *bpe)
{
    free(bpe->blob);
    free(bpe->entries);
    free(bpe->slots);
    free(bpe->merges);
    free(bpe->rank_id);
    free(bpe->prefix);
    free(bpe->suffix);
    free(bpe->unk);
    memset(bpe, 0, sizeof *bpe);
}

/* ---- the heap ---- */

static void heap_down(tok_work *w, size_t i)
{
    uint64_t *heap = w->heap, key = heap[i];
    const size_t count = w->heap_count;
    for (;; w->steps++) {
        size_t child = 2 * i + 1;
        if (child >= count) {
            break;
        }
        child += child + 1 < count && heap[child + 1] < heap[child];
        if (heap[child] >= key) {
            break;
        }
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = key;
}

static void heap_push(tok_work *w, uint64_t key)
{
    uint64_t *heap = w->heap;
    size_t i = w->heap_count++;
    while (i > 0 && heap[(i - 1) / 2] > key) {
        heap[i] = heap[(i - 1) / 2];
        i = (i - 1) / 2;
        w->steps++;
    }
    heap[i] = key;
}

static uint64_t heap_pop(tok_work *w)
{
    uint64_t top = w->heap[0];
    w->heap[0] = w->heap[--w->heap_count];
    if (w->heap_count > 0) {
        heap_down(w, 0);
    }
    return top;
}

/* ---- one word ---- */

static bool reserve_symbols(tok_work *w, size_t count)
{
    if (count > w->symbol_capacity) {
        size_t capacity = count + count / 2 + 64;
        tok_symbol *symbols = realloc(w->symbols, capacity * sizeof *symbols);
        if (symbols == NULL) {
            return tok_fail_memory(w);
        }
        w->symbols = symbols;
        w->symbol_capacity = capacity;
    }
    if (3 * count > w->heap_capacity) { /* first pairs, and at most two new ones for each of count - 1 merges */
        size_t capacity = 3 * count + count / 2 + 64;
        uint64_t *heap = realloc(w->heap, capacity * sizeof *heap);
        if (heap == NULL) {
            return tok_fail_memory(w);
        }
        w->heap = heap;
        w->heap_capacity = capacity;
    }
    return true;
}

static void add_symbol(tok_work *w, int32_t id, size_t bytes)
{
    size_t i = w->symbol_count++;
    w->symbols[i] = (tok_symbol){.id = id, .previous = (int32_t)i - 1, .next = -1, .bytes = (uint32_t)bytes};
    if (i > 0) {
        w->symbols[i - 1].next = (int32_t)i;
    }
}

/* Unknown characters not yet added: they join while fuse_unk. */
typedef struct unknown {
    bool pending;
    size_t bytes;
} unknown;

static void flush_unknown(tok_work *w, unknown *u)
{
    if (u->pending) {
        add_symbol(w, w->t->bpe.unk_id, u->bytes);
    }
    u->pending = false;
}

/* Adds <0xHH> of every byte of s, if all exist. */
static bool add_bytes(tok_work *w, const char *s, size_t n)
{
    const tok_bpe *bpe = &w->t->bpe;
    for (size_t i = 0; i < n; i++) {
        if (bpe->byte_id[(unsigned char)s[i]] < 0) {
            return false;
        }
    }
    for (size_t i = 0; i < n; i++) {
        add_symbol(w, bpe->byte_id[(unsigned char)s[i]], 1);
    }
    return true;
}

/* One character that is not in the vocabulary: bytes, unknown token, or nothing at all. */
static bool add_unknown(tok_work *w, unknown *u, const char *s, size_t n, size_t bytes)
{
    const tok_bpe *bpe = &w->t->bpe;

    if (bpe->byte_fallback && add_bytes(w, s, n)) {
        return true; /* an unknown token that waits comes after the bytes: so the library */
    }
    if (bpe->unk == NULL) {
        return true;
    }
    if (u->pending && bpe->fuse_unk) {
        u->bytes += bytes;
        return true;
    }
    if (bpe->unk_id < 0) {
        return tok_fail(
            w, spurion_error(SPURION_FAILED_PRECONDITION,
                             "tokenizer.json: expected its unk_token '%s' in the vocabulary for a character outside it, found none",
                             bpe->unk));
    }
    flush_unknown(w, u);
    *u = (unknown){.pending = true, .bytes = bytes};
    return true;
}

/* The spelling of a character of a word, with prefix and suffix where they belong. */
static bool spell(const char **out, size_t *out_bytes, tok_work *w, const char *s, size_t n, bool is_first, bool is_last)
{
    const tok_bpe *bpe = &w->t->bpe;

    w->word.count = 0;
    if ((!is_first && !tok_append(w, &w->word, bpe->prefix, bpe->prefix_bytes)) || !tok_append(w, &w->word, s, n) ||
        (is_last && !tok_append(w, &w->word, bpe->suffix, bpe->suffix_bytes))) {
        return false;
    }
    *out = w->word.data;
    *out_bytes = w->word.count;
    return true;
}

static bool first_symbols(tok_work *w, const char *s, size_t n)
{
    const tok_bpe *bpe = &w->t->bpe;
    bool plain = bpe->prefix_bytes == 0 && bpe->suffix_bytes == 0;
    size_t most = n + bpe->suffix_bytes; /* a character becomes at most its bytes in byte tokens */
    unknown u = {0};

    most += bpe->prefix_bytes == 0 ? 0 : n * bpe->prefix_bytes;
    if (!reserve_symbols(w, most + 1)) {
        return false;
    }
    w->symbol_count = 0;
    for (size_t at = 0, bytes; at < n; at += bytes) {
        int length;
        uint32_t c = spurion_utf8_decode(&length, s + at);
        const char *key = s + at;
        size_t key_bytes = bytes = (size_t)length;
        int32_t id;
        if (plain && c < 512) {
            id = bpe->short_id[c];
        } else {
            if (!plain && !spell(&key, &key_bytes, w, s + at, bytes, at == 0, at + bytes == n)) {
                return false;
            }
            id = find_id(bpe, key, key_bytes);
        }
        if (id >= 0) {
            flush_unknown(w, &u);
            add_symbol(w, id, bytes);
        } else if (!add_unknown(w, &u, key, key_bytes, bytes)) {
            return false;
        }
    }
    flush_unknown(w, &u);
    return true;
}

static void push_pair(tok_work *w, int32_t left, int32_t right)
{
    const tok_merge *m;
    w->steps++;
    m = merge_find(&w->t->bpe, w->symbols[left].id, w->symbols[right].id);
    if (m != NULL) {
        heap_push(w, (uint64_t)m->rank << 32 | (uint32_t)left);
    }
}

/* Merges until no pair is left. An entry of the heap is stale unless the pair now at its place makes the same token. */
static void merge_all(tok_work *w)
{
    const tok_bpe *bpe = &w->t->bpe;
    tok_symbol *symbols = w->symbols;

    w->heap_count = 0;
    w->steps += w->symbol_count;
    for (size_t i = 0; i + 1 < w->symbol_count; i++) {
        const tok_merge *m = merge_find(bpe, symbols[i].id, symbols[i + 1].id);
        if (m != NULL) {
            w->heap[w->heap_count++] = (uint64_t)m->rank << 32 | (uint32_t)i;
        }
    }
    for (size_t i = w->heap_count / 2; i-- > 0;) {
        heap_down(w, i);
    }
    while (w->heap_count > 0) {
        uint64_t top = heap_pop(w);
        int32_t at = (int32_t)(uint32_t)top, right = symbols[at].next;
        int32_t made = bpe->rank_id[top >> 32];
        const tok_merge *now;
        if (symbols[at].bytes == 0 || right < 0) {
            continue;
        }
        now = merge_find(bpe, symbols[at].id, symbols[right].id);
        if (now == NULL || now->id != made) {
            continue;
        }
        symbols[at].id = made;
        symbols[at].bytes += symbols[right].bytes;
        symbols[at].next = symbols[right].next;
        symbols[right].bytes = 0;
        if (symbols[at].next >= 0) {
            symbols[symbols[at].next].previous = at;
        }
        if (symbols[at].previous >= 0) {
            push_pair(w, symbols[at].previous, at);
        }
        if (symbols[at].next >= 0) {
            push_pair(w, at, symbols[at].next);
        }
    }
}

/* Symbols of one word after all merges, in w->symbols. */
static bool merge_word(tok_work *w, const char *s, size_t n)
{
    if (!first_symbols(w, s, n)) {
        return false;
    }
    merge_all(w);
    return true;
}

static bool emit_word(tok_work *w, const char *s, size_t n)
{
    const tok_bpe *bpe = &w->t->bpe;
    int32_t entry = tok_bpe_find(bpe, s, n);

    if (entry >= 0 && bpe->entries[entry].whole) {
        return tok_emit(w, bpe->entries[entry].id);
    }
    if (!merge_word(w, s, n)) {
        return false;
    }
    for (size_t i = 0; i < w->symbol_count; i++) {
        if (w->symbols[i].bytes > 0 && !tok_emit(w, w->symbols[i].id)) {
            return false;
        }
    }
    return true;
}

bool tok_bpe_word(tok_work *w, const char *s, size_t n)
{
    const tok_bpe *bpe = &w->t->bpe;
    size_t begin = 0;

    if (n > 2 * (size_t)SPURION_TOKENIZER_TEXT_BYTES_MAX) { /* twice: byte-level spelling */
        return tok_fail(w, spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected a word of at most %u bytes, found %zu",
                                         2 * SPURION_TOKENIZER_TEXT_BYTES_MAX, n));
    }
    if (!bpe->metaspace_cut) {
        return emit_word(w, s, n);
    }
    for (size_t at = 1; at + 3 <= n; at++) { /* cut before each U+2581 that does not follow another */
        const char *next = memchr(s + at, METASPACE[0], n - at);
        if (next == NULL) {
            break;
        }
        at = (size_t)(next - s);
        if (at + 3 <= n && memcmp(next, METASPACE, 3) == 0 && (at < begin + 3 || memcmp(next - 3, METASPACE, 3) != 0)) {
            if (!emit_word(w, s + begin, at - begin)) {
                return false;
            }
            begin = at;
        }
    }
    return emit_word(w, s + begin, n - begin);
}

/* ---- derived tables ---- */

/* May a text be cut before U+2581? Not when some merge joins it to what precedes: then a made token has it inside. */
static bool can_cut(const tok_bpe *bpe)
{
    if (bpe->ignore_merges || bpe->prefix_bytes > 0 || bpe->suffix_bytes > 0 || find_id(bpe, METASPACE, 3) < 0) {
        return false;
    }
    for (size_t i = 0; i < bpe->entry_count; i++) {
        const char *s = bpe->blob + bpe->entries[i].offset;
        size_t n = bpe->entries[i].bytes;
        for (size_t at = 1; at + 3 <= n; at++) {
            if (memcmp(s + at, METASPACE, 3) == 0 && (at < 3 || memcmp(s + at - 3, METASPACE, 3) != 0)) {
                return false;
            }
        }
    }
    return true;
}

static void character_ids(tok_bpe *bpe)
{
    for (uint32_t c = 0; c < 512; c++) {
        char s[4];
        bpe->short_id[c] = find_id(bpe, s, (size_t)spurion_utf8_encode(s, c));
    }
    for (int b = 0; b < 256; b++) {
        char s[8];
        (void)snprintf(s, sizeof s, "<0x%02X>", b);
        bpe->byte_id[b] = find_id(bpe, s, 6);
    }
}

spurion_status tok_bpe_finish(spurion_tokenizer *t)
{
    tok_bpe *bpe = &t->bpe;
    tok_work w;
    spurion_status st;

    character_ids(bpe);
    bpe->unk_id = bpe->unk == NULL ? -1 : find_id(bpe, bpe->unk, strlen(bpe->unk));
    bpe->metaspace_cut = can_cut(bpe);
    tok_work_init(&w, t, NULL);
    for (size_t i = 0; i < bpe->entry_count; i++) {
        tok_entry *entry = &bpe->entries[i];
        entry->whole = bpe->ignore_merges;
        if (bpe->ignore_merges || entry->bytes == 0) {
            continue;
        }
        if (!merge_word(&w, bpe->blob + entry->offset, entry->bytes)) {
            if (w.error.code != SPURION_FAILED_PRECONDITION) { /* an unknown character: the word is not whole, and no more */
                break;
            }
            w.error = spurion_ok();
            continue;
        }
        entry->whole =
            w.symbol_count > 0 && w.symbols[0].id == entry->id && w.symbols[0].bytes == entry->bytes && w.symbols[0].next < 0;
    }
    st = w.error;
    tok_work_fini(&w);
    return st;
}

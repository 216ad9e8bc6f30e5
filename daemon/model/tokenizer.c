/* The tokenizer's public face: open, close, one encode, and the tables for reports. Thread: see tokenizer.h.
 * Memory: encode's scratch is one tok_work, freed before it returns. */
#include "daemon/model/tokenizer_internal.h"

#include "daemon/base/check.h"

#include <openssl/evp.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define METASPACE "\xe2\x96\x81"

void spurion_ids_fini(spurion_ids *ids)
{
    if (ids != NULL) {
        free(ids->data);
        *ids = (spurion_ids){0};
    }
}

/* ---- the work ---- */

void tok_work_init(tok_work *w, const spurion_tokenizer *t, spurion_ids *out)
{
    memset(w, 0, sizeof *w);
    w->t = t;
    w->out = out;
    w->error = spurion_ok();
}

void tok_work_fini(tok_work *w)
{
    for (int i = 0; i < TOK_STAGES_MAX; i++) {
        free(w->stage[i].data);
        free(w->stage_piece[i].data);
    }
    free(w->normal[0].data);
    free(w->normal[1].data);
    free(w->points);
    free(w->symbols);
    free(w->heap);
    free(w->word.data);
    tok_region_free(w->region);
    memset(w, 0, sizeof *w);
}

bool tok_fail(tok_work *w, spurion_status error)
{
    if (w->error.code == SPURION_OK) {
        w->error = error;
    }
    return false;
}

bool tok_fail_memory(tok_work *w)
{
    return tok_fail(w, spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory to tokenize a text"));
}

bool tok_reserve(tok_work *w, tok_buf *b, size_t more)
{
    size_t capacity;
    char *grown;

    if (more <= b->capacity - b->count) {
        return true;
    }
    if (more > (size_t)SPURION_TOKENIZER_TEXT_BYTES_MAX * 8 || b->count > (size_t)SPURION_TOKENIZER_TEXT_BYTES_MAX * 8) {
        return tok_fail(w, spurion_error(SPURION_RESOURCE_EXHAUSTED,
                                         "expected a text of at most %u bytes after normalisation, found more",
                                         SPURION_TOKENIZER_TEXT_BYTES_MAX));
    }
    capacity = (b->count + more) + (b->count + more) / 2 + 64;
    grown = realloc(b->data, capacity);
    if (grown == NULL) {
        return tok_fail_memory(w);
    }
    b->data = grown;
    b->capacity = capacity;
    return true;
}

bool tok_append(tok_work *w, tok_buf *b, const char *s, size_t n)
{
    if (!tok_reserve(w, b, n)) {
        return false;
    }
    if (n > 0) {
        memcpy(b->data + b->count, s, n);
        b->count += n;
    }
    return true;
}

bool tok_emit(tok_work *w, int32_t id)
{
    spurion_ids *out = w->out;

    if (out->count == out->capacity) {
        size_t capacity = out->capacity == 0 ? 256 : out->capacity * 2;
        int32_t *grown = realloc(out->data, capacity * sizeof *grown);
        if (grown == NULL) {
            return tok_fail_memory(w);
        }
        out->data = grown;
        out->capacity = capacity;
    }
    out->data[out->count++] = id;
    return true;
}

/* ---- byte-level spelling ---- */

/* GPT-2's table: printable Latin-1 bytes stand for themselves, the other 68 are U+0100 and on, in order. */
static bool stands_for_itself(int byte)
{
    return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}

bool tok_append_byte_level(tok_work *w, tok_buf *b, const char *s, size_t n)
{
    if (!tok_reserve(w, b, 2 * n)) {
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        int byte = (unsigned char)s[i];
        uint32_t c = (uint32_t)byte;
        if (!stands_for_itself(byte)) { /* 0..32, 127..160, 173 */
            c = 0x100u + (uint32_t)(byte <= 32 ? byte : byte <= 160 ? byte - 127 + 33 : 67);
        }
        b->count += (size_t)spurion_utf8_encode(b->data + b->count, c);
    }
    return true;
}

int tok_byte_of(uint32_t c)
{
    if (c < 256) {
        return stands_for_itself((int)c) ? (int)c : -1;
    }
    c -= 256;
    return c <= 32 ? (int)c : c <= 66 ? (int)c - 33 + 127 : c == 67 ? 173 : -1;
}

/* ---- encode ---- */

static bool normalized_piece(tok_work *w, int32_t id, const char *s, size_t begin, size_t end, bool first, size_t first_bytes)
{
    if (id >= 0) {
        return tok_emit(w, id);
    }
    return tok_split(w, 0, s + begin, end - begin, first && begin < first_bytes);
}

static bool raw_piece(tok_work *w, int32_t id, const char *s, size_t begin, size_t end, bool first, size_t first_bytes)
{
    const char *normal;
    size_t bytes, normal_first;

    (void)first_bytes;
    if (id >= 0) {
        return tok_emit(w, id);
    }
    return tok_normalize(&normal, &bytes, &normal_first, w, s + begin, end - begin) &&
           tok_added_split(w, &w->t->normalized, normal, bytes, first && begin == 0, normal_first, normalized_piece);
}

spurion_status tok_encode(spurion_ids *out, uint64_t *steps, const spurion_tokenizer *t, const char *text, size_t bytes)
{
    size_t count = out->count, offset = 0;
    spurion_status st;
    tok_work w;

    *steps = 0;
    if (bytes > SPURION_TOKENIZER_TEXT_BYTES_MAX) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected a text of at most %u bytes, found %zu",
                             SPURION_TOKENIZER_TEXT_BYTES_MAX, bytes);
    }
    if (!spurion_utf8_valid(&offset, text, bytes)) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "expected UTF-8, found byte 0x%02x at byte %zu", (unsigned char)text[offset],
                             offset);
    }
    tok_work_init(&w, t, out);
    if (!tok_added_split(&w, &t->raw, text, bytes, true, 0, raw_piece)) {
        SPURION_ASSERT(w.error.code != SPURION_OK);
        out->count = count;
    }
    st = w.error;
    *steps = w.steps;
    tok_work_fini(&w);
    return st;
}

spurion_status spurion_tokenizer_encode(spurion_ids *out, const spurion_tokenizer *t, const char *text, size_t bytes)
{
    uint64_t steps = 0;
    return tok_encode(out, &steps, t, text, bytes);
}

/* ---- texts of tokens, for reports ---- */

/* Writes what a token stands for to out, which has room for n bytes; never longer than the spelling. */
static size_t token_text(char *out, const spurion_tokenizer *t, const char *s, size_t n)
{
    size_t made = 0;
    int bytes;

    if (t->byte_level) {
        for (size_t at = 0; at < n; at += (size_t)bytes) {
            int byte = tok_byte_of(spurion_utf8_decode(&bytes, s + at));
            if (byte < 0) { /* not spelled in bytes: stands for itself */
                memcpy(out, s, n);
                return n;
            }
            out[made++] = (char)byte;
        }
        return made;
    }
    if (t->sentencepiece) {
        unsigned int byte;
        if (n == 6 && memcmp(s, "<0x", 3) == 0 && s[5] == '>' && sscanf(s + 3, "%2X", &byte) == 1) {
            out[0] = (char)byte;
            return 1;
        }
        for (size_t at = 0; at < n; at += (size_t)bytes) {
            bytes = at + 3 <= n && memcmp(s + at, METASPACE, 3) == 0 ? 3 : 1;
            out[made++] = bytes == 3 ? ' ' : s[at];
        }
        return made;
    }
    memcpy(out, s, n);
    return n;
}

static int by_id(const void *a, const void *b)
{
    const tok_text *x = a, *y = b;
    return x->id != y->id ? (x->id < y->id ? -1 : 1) : x->offset < y->offset ? -1 : x->offset > y->offset;
}

spurion_status tok_texts(spurion_tokenizer *t)
{
    const tok_bpe *bpe = &t->bpe;
    size_t bytes = 0, count = 0;

    for (size_t i = 0; i < t->added_count; i++) {
        bytes += t->added[i].bytes + 1;
    }
    for (size_t i = 0; i < bpe->entry_count; i++) {
        bytes += bpe->entries[i].bytes + 1;
    }
    t->text_blob = malloc(bytes + 1);
    t->texts = malloc((t->added_count + bpe->entry_count + 1) * sizeof *t->texts);
    if (t->text_blob == NULL || t->texts == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for the texts of %zu tokens", bpe->entry_count);
    }
    bytes = 0;
    for (size_t i = 0; i < t->added_count + bpe->entry_count; i++) { /* added tokens first: they win by lower offset */
        bool added = i < t->added_count;
        const tok_entry *e = added ? NULL : &bpe->entries[i - t->added_count];
        tok_text *x = &t->texts[count++];
        *x = (tok_text){.id = added ? t->added[i].id : e->id, .offset = bytes};
        if (added) {
            memcpy(t->text_blob + bytes, t->added[i].content, t->added[i].bytes);
            x->bytes = (uint32_t)t->added[i].bytes;
        } else {
            x->bytes = (uint32_t)token_text(t->text_blob + bytes, t, bpe->blob + e->offset, e->bytes);
        }
        bytes += x->bytes;
        t->text_blob[bytes++] = '\0';
        t->vocab_size = x->id >= t->vocab_size ? x->id + 1 : t->vocab_size;
    }
    qsort(t->texts, count, sizeof *t->texts, by_id);
    for (size_t i = 0; i < count; i++) {
        if (t->text_count == 0 || t->texts[t->text_count - 1].id != t->texts[i].id) {
            t->texts[t->text_count++] = t->texts[i];
        }
    }
    return spurion_ok();
}

/* ---- reports ---- */

const int32_t *spurion_tokenizer_leading(const spurion_tokenizer *t, int *count)
{
    *count = t->leading_count;
    return t->leading;
}

const int32_t *spurion_tokenizer_trailing(const spurion_tokenizer *t, int *count)
{
    *count = t->trailing_count;
    return t->trailing;
}

spurion_status spurion_tokenizer_token_bytes(const char **out, size_t *bytes, const spurion_tokenizer *t, int32_t id)
{
    size_t low = 0, high = t->text_count;

    while (low < high) {
        size_t middle = (low + high) / 2;
        if (t->texts[middle].id < id) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    if (low == t->text_count || t->texts[low].id != id) {
        *out = NULL;
        *bytes = 0;
        return spurion_error(SPURION_NOT_FOUND, "expected a token id of the tokenizer (below %d), found %d", (int)t->vocab_size,
                             (int)id);
    }
    *out = t->text_blob + t->texts[low].offset;
    *bytes = t->texts[low].bytes;
    return spurion_ok();
}

int32_t spurion_tokenizer_id(const spurion_tokenizer *t, const char *token, size_t bytes)
{
    int32_t entry;
    for (size_t i = 0; i < t->added_count; i++) {
        if (t->added[i].bytes == bytes && memcmp(t->added[i].content, token, bytes) == 0) {
            return t->added[i].id;
        }
    }
    entry = tok_bpe_find(&t->bpe, token, bytes);
    return entry < 0 ? -1 : t->bpe.entries[entry].id;
}

int32_t spurion_tokenizer_vocab_size(const spurion_tokenizer *t)
{
    return t->vocab_size;
}

const uint8_t *spurion_tokenizer_digest(const spurion_tokenizer *t)
{
    return t->digest;
}

/* ---- open and close ---- */

void spurion_tokenizer_close(spurion_tokenizer *t)
{
    if (t == NULL) {
        return;
    }
    for (size_t i = 0; i < t->added_count; i++) {
        free(t->added[i].content);
        free(t->added[i].normalized_content);
    }
    for (int i = 0; i < TOK_NORMALIZERS_MAX; i++) {
        tok_pattern_fini(&t->normalizers[i].pattern);
        free(t->normalizers[i].content);
    }
    for (int i = 0; i < TOK_STAGES_MAX; i++) {
        tok_pattern_fini(&t->stages[i].pattern);
    }
    tok_trie_fini(&t->raw);
    tok_trie_fini(&t->normalized);
    tok_bpe_fini(&t->bpe);
    free(t->added);
    free(t->texts);
    free(t->text_blob);
    free(t->classes_owned);
    free(t);
}

spurion_status tok_open(spurion_tokenizer **out, const uint8_t *classes, const char *json, size_t bytes)
{
    spurion_status st;
    spurion_tokenizer *t = calloc(1, sizeof *t);
    unsigned int digest_bytes = SPURION_TOKENIZER_DIGEST_BYTES;

    *out = NULL;
    if (t == NULL || (classes == NULL && (t->classes_owned = malloc(SPURION_UNICODE_CODE_POINTS)) == NULL)) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a tokenizer");
        goto out;
    }
    if (classes == NULL) {
        spurion_unicode_expand(t->classes_owned);
    }
    t->classes = classes == NULL ? t->classes_owned : classes;
    if (EVP_Digest(json, bytes, t->digest, &digest_bytes, EVP_sha256(), NULL) != 1) {
        st = spurion_error(SPURION_INTERNAL, "SHA-256 of tokenizer.json failed");
        goto out;
    }
    SPURION_TRY(st, tok_load(t, json, bytes));
    *out = t;
    t = NULL;
out:
    spurion_tokenizer_close(t);
    return st;
}

spurion_status spurion_tokenizer_open_memory(spurion_tokenizer **out, const char *json, size_t bytes)
{
    return tok_open(out, NULL, json, bytes);
}

/* Reads the whole file; *out is the caller's to free. */
static spurion_status read_file(char **out, size_t *bytes, const char *path)
{
    spurion_status st = spurion_ok();
    FILE *f = fopen(path, "rb");
    char *data = NULL;
    long size;

    if (f == NULL) {
        return spurion_error(SPURION_NOT_FOUND, "expected a tokenizer.json at '%s': %s", path, strerror(errno));
    }
    if (fseek(f, 0, SEEK_END) != 0 || (size = ftell(f)) < 0 || fseek(f, 0, SEEK_SET) != 0) {
        st = spurion_error(SPURION_NOT_FOUND, "expected a readable tokenizer.json at '%s': %s", path, strerror(errno));
        goto out;
    }
    if ((unsigned long)size > SPURION_TOKENIZER_FILE_BYTES_MAX) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "'%s': expected a tokenizer.json of at most %u bytes, found %ld", path,
                           SPURION_TOKENIZER_FILE_BYTES_MAX, size);
        goto out;
    }
    data = malloc((size_t)size + 1);
    if (data == NULL || fread(data, 1, (size_t)size, f) != (size_t)size) {
        st = data == NULL
                 ? spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for the %ld bytes of '%s'", size, path)
                 : spurion_error(SPURION_NOT_FOUND, "expected %ld bytes in '%s', found fewer: %s", size, path, strerror(errno));
        goto out;
    }
    *out = data;
    *bytes = (size_t)size;
    data = NULL;
out:
    free(data);
    (void)fclose(f);
    return st;
}

spurion_status spurion_tokenizer_open(spurion_tokenizer **out, const char *path)
{
    char *json = NULL;
    size_t bytes = 0;
    spurion_status st;

    *out = NULL;
    SPURION_TRY(st, read_file(&json, &bytes, path));
    SPURION_TRY(st, spurion_tokenizer_open_memory(out, json, bytes));
out:
    free(json);
    return st;
}

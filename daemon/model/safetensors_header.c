/* Strict parser of safetensors headers: one fixed shape of JSON, so that memory stays within a small multiple of the header's size
 * whatever it holds. {"__metadata__": {string: string}, name: {"dtype": string, "shape": [n, ..], "data_offsets": [n, n]}, ..}
 * Thread: one. Memory: three blocks, given to the caller. */
#include "daemon/model/safetensors_header.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/json.h"

typedef struct cursor {
    const unsigned char *at, *begin, *end;
    char *strings; /* where the next decoded string goes; a decoded string is never longer than its source with the quotes */
    const char *name;
} cursor;

static const struct {
    const char *name;
    int bits;
} dtypes[SPURION_TENSOR_DTYPE_COUNT] = {
    [SPURION_TENSOR_BOOL] = {"BOOL", 8},
    [SPURION_TENSOR_F4] = {"F4", 4},
    [SPURION_TENSOR_F6_E2M3] = {"F6_E2M3", 6},
    [SPURION_TENSOR_F6_E3M2] = {"F6_E3M2", 6},
    [SPURION_TENSOR_U8] = {"U8", 8},
    [SPURION_TENSOR_I8] = {"I8", 8},
    [SPURION_TENSOR_F8_E5M2] = {"F8_E5M2", 8},
    [SPURION_TENSOR_F8_E4M3] = {"F8_E4M3", 8},
    [SPURION_TENSOR_F8_E8M0] = {"F8_E8M0", 8},
    [SPURION_TENSOR_F8_E4M3FNUZ] = {"F8_E4M3FNUZ", 8},
    [SPURION_TENSOR_F8_E5M2FNUZ] = {"F8_E5M2FNUZ", 8},
    [SPURION_TENSOR_I16] = {"I16", 16},
    [SPURION_TENSOR_U16] = {"U16", 16},
    [SPURION_TENSOR_F16] = {"F16", 16},
    [SPURION_TENSOR_BF16] = {"BF16", 16},
    [SPURION_TENSOR_I32] = {"I32", 32},
    [SPURION_TENSOR_U32] = {"U32", 32},
    [SPURION_TENSOR_F32] = {"F32", 32},
    [SPURION_TENSOR_C64] = {"C64", 64},
    [SPURION_TENSOR_F64] = {"F64", 64},
    [SPURION_TENSOR_I64] = {"I64", 64},
    [SPURION_TENSOR_U64] = {"U64", 64},
};

const char *spurion_tensor_dtype_name(spurion_tensor_dtype t)
{
    return dtypes[t].name;
}

int spurion_tensor_dtype_bits(spurion_tensor_dtype t)
{
    return dtypes[t].bits;
}

/* --- the JSON of it --- */

static spurion_status fault(const cursor *c, const char *expected)
{
    size_t offset = (size_t)(c->at - c->begin);

    if (c->at >= c->end) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: header: expected %s at byte %zu, found its end", spurion_path_tail(c->name),
                             expected, offset);
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s: header: expected %s at byte %zu, found byte 0x%02x",
                         spurion_path_tail(c->name), expected, offset, *c->at);
}

static void skip_space(cursor *c)
{
    while (c->at < c->end && (*c->at == ' ' || *c->at == '\t' || *c->at == '\n' || *c->at == '\r')) {
        c->at++;
    }
}

/* Takes one character after white space; false when another stands there. */
static bool take(cursor *c, char wanted)
{
    skip_space(c);
    if (c->at < c->end && *c->at == (unsigned char)wanted) {
        c->at++;
        return true;
    }
    return false;
}

static spurion_status need(cursor *c, char wanted)
{
    char expected[] = {'\'', wanted, '\'', '\0'};

    return take(c, wanted) ? spurion_ok() : fault(c, expected);
}

/* Bytes of the valid UTF-8 character at p (RFC 3629), 0 when there is none. */
static int utf8_bytes(const unsigned char *p, const unsigned char *end)
{
    int n = p[0] < 0x80 ? 1 : p[0] >= 0xc2 && p[0] <= 0xdf ? 2 : (p[0] & 0xf0) == 0xe0 ? 3 : p[0] >= 0xf0 && p[0] <= 0xf4 ? 4 : 0;

    if (n == 0 || end - p < n) {
        return 0;
    }
    for (int i = 1; i < n; i++) {
        if ((p[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    if ((p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] > 0x9f) || (p[0] == 0xf0 && p[1] < 0x90) ||
        (p[0] == 0xf4 && p[1] > 0x8f)) {
        return 0;
    }
    return n;
}

static spurion_status take_hex4(cursor *c, unsigned *out)
{
    *out = 0;
    for (int i = 0; i < 4; i++, c->at++) {
        unsigned char b = c->at < c->end ? *c->at : 0;
        int digit = b >= '0' && b <= '9' ? b - '0' : b >= 'a' && b <= 'f' ? b - 'a' + 10 : b >= 'A' && b <= 'F' ? b - 'A' + 10 : -1;

        if (digit < 0) {
            return fault(c, "a hexadecimal digit");
        }
        *out = *out * 16 + (unsigned)digit;
    }
    return spurion_ok();
}

static void put_utf8(cursor *c, unsigned code)
{
    if (code < 0x80) {
        *c->strings++ = (char)code;
    } else if (code < 0x800) {
        *c->strings++ = (char)(0xc0 | code >> 6);
        *c->strings++ = (char)(0x80 | (code & 63));
    } else if (code < 0x10000) {
        *c->strings++ = (char)(0xe0 | code >> 12);
        *c->strings++ = (char)(0x80 | (code >> 6 & 63));
        *c->strings++ = (char)(0x80 | (code & 63));
    } else {
        *c->strings++ = (char)(0xf0 | code >> 18);
        *c->strings++ = (char)(0x80 | (code >> 12 & 63));
        *c->strings++ = (char)(0x80 | (code >> 6 & 63));
        *c->strings++ = (char)(0x80 | (code & 63));
    }
}

static spurion_status take_unicode_escape(cursor *c)
{
    spurion_status st;
    unsigned code = 0, low = 0;

    SPURION_TRY(st, take_hex4(c, &code));
    if (code >= 0xd800 && code <= 0xdbff) {
        if (c->end - c->at < 2 || c->at[0] != '\\' || c->at[1] != 'u') {
            st = fault(c, "the second half of a surrogate pair");
            goto out;
        }
        c->at += 2;
        SPURION_TRY(st, take_hex4(c, &low));
        if (low < 0xdc00 || low > 0xdfff) {
            st = fault(c, "the second half of a surrogate pair before this");
            goto out;
        }
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    } else if (code == 0 || (code >= 0xdc00 && code <= 0xdfff)) {
        st = fault(c, "a character other than NUL or half a surrogate pair before this");
        goto out;
    }
    put_utf8(c, code);
out:
    return st;
}

static spurion_status take_escape(cursor *c)
{
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char *found;

    if (c->at >= c->end) {
        return fault(c, "an escape");
    }
    if (*c->at == 'u') {
        c->at++;
        return take_unicode_escape(c);
    }
    found = *c->at != 0 ? strchr(names, *c->at) : NULL;
    if (found == NULL) {
        return fault(c, "an escape of JSON");
    }
    c->at++;
    *c->strings++ = values[found - names];
    return spurion_ok();
}

static spurion_status take_string(cursor *c, const char **out)
{
    spurion_status st;

    *out = c->strings;
    SPURION_TRY(st, need(c, '"'));
    while (c->at < c->end && *c->at != '"') {
        if (*c->at == '\\') {
            c->at++;
            SPURION_TRY(st, take_escape(c));
        } else {
            int n = *c->at < 0x20 ? 0 : utf8_bytes(c->at, c->end);

            if (n == 0) {
                st = fault(c, "UTF-8 text");
                goto out;
            }
            memcpy(c->strings, c->at, (size_t)n);
            c->strings += n;
            c->at += n;
        }
    }
    if (c->at >= c->end) {
        st = fault(c, "the end of a string");
        goto out;
    }
    c->at++;
    *c->strings++ = '\0';
out:
    return st;
}

static spurion_status take_number(cursor *c, uint64_t *out)
{
    const unsigned char *first;

    skip_space(c);
    first = c->at;
    *out = 0;
    while (c->at < c->end && *c->at >= '0' && *c->at <= '9') {
        if (__builtin_mul_overflow(*out, 10u, out) || __builtin_add_overflow(*out, (uint64_t)(*c->at - '0'), out)) {
            return fault(c, "an integer below 2^64");
        }
        c->at++;
    }
    if (c->at == first || (*first == '0' && c->at - first > 1)) {
        return fault(c, "an integer from 0 without sign, fraction or leading zeros");
    }
    return spurion_ok();
}

/* Reads [n, ..] of at most max numbers. */
static spurion_status take_numbers(cursor *c, uint64_t *out, int *count, int max, const char *expected)
{
    spurion_status st;

    *count = 0;
    SPURION_TRY(st, need(c, '['));
    if (take(c, ']')) {
        goto out;
    }
    do {
        if (*count == max) {
            st = fault(c, expected);
            goto out;
        }
        SPURION_TRY(st, take_number(c, &out[*count]));
        ++*count;
    } while (take(c, ','));
    SPURION_TRY(st, need(c, ']'));
out:
    return st;
}

/* --- what it says --- */

static spurion_status take_dtype(cursor *c, spurion_tensor_info *t)
{
    spurion_status st;
    char *strings = c->strings;
    const char *text = NULL;

    SPURION_TRY(st, take_string(c, &text));
    c->strings = strings; /* not kept */
    for (int i = 0; i < SPURION_TENSOR_DTYPE_COUNT; i++) {
        if (strcmp(text, dtypes[i].name) == 0) {
            t->dtype = (spurion_tensor_dtype)i;
            return st;
        }
    }
    st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: %s: expected a dtype of safetensors (F32, F16, BF16, ..), found \"%.40s\"",
                       spurion_path_tail(c->name), t->name, text);
out:
    return st;
}

static spurion_status take_field(cursor *c, spurion_tensor_info *t, int *seen)
{
    spurion_status st;
    char *strings = c->strings;
    const char *key = NULL;
    uint64_t offsets[2] = {0, 0};
    int bit, count;

    SPURION_TRY(st, take_string(c, &key));
    c->strings = strings;
    bit = strcmp(key, "dtype") == 0 ? 1 : strcmp(key, "shape") == 0 ? 2 : strcmp(key, "data_offsets") == 0 ? 4 : 0;
    if (bit == 0 || (*seen & bit) != 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: %s: expected dtype, shape and data_offsets once each, found \"%.40s\"%s",
                           spurion_path_tail(c->name), t->name, key, bit != 0 ? " twice" : "");
        goto out;
    }
    *seen |= bit;
    SPURION_TRY(st, need(c, ':'));
    if (bit == 1) {
        SPURION_TRY(st, take_dtype(c, t));
    } else if (bit == 2) {
        SPURION_TRY(st, take_numbers(c, t->shape, &t->rank, SPURION_TENSOR_RANK_MAX, "a shape of at most 8 dimensions"));
    } else {
        SPURION_TRY(st, take_numbers(c, offsets, &count, 2, "two offsets"));
        if (count != 2) {
            st = fault(c, "two offsets before this");
            goto out;
        }
        t->begin = offsets[0];
        t->end = offsets[1];
    }
out:
    return st;
}

/* shape and dtype give exactly the bytes between the offsets, and these lie in the file. */
static spurion_status check_size(const cursor *c, spurion_tensor_info *t, uint64_t data_bytes)
{
    uint64_t elements = 1, bits;
    char shape[96];

    for (int i = 0; i < t->rank; i++) {
        if (__builtin_mul_overflow(elements, t->shape[i], &elements)) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: %s: expected a shape of less than 2^64 elements, found more",
                                 spurion_path_tail(c->name), t->name);
        }
    }
    spurion_tensor_shape_text(shape, sizeof shape, t);
    if (__builtin_mul_overflow(elements, (uint64_t)dtypes[t->dtype].bits, &bits) || bits % 8 != 0) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: %s: expected a whole number of bytes below 2^61, found shape %s of %s",
                             spurion_path_tail(c->name), t->name, shape, dtypes[t->dtype].name);
    }
    if (t->begin > t->end || t->end > data_bytes) {
        return spurion_error(t->begin > t->end ? SPURION_INVALID_ARGUMENT : SPURION_DATA_LOSS,
                             "%s: %s: expected offsets within the file's %llu bytes of data, found %llu to %llu (a truncated file?)",
                             spurion_path_tail(c->name), t->name, (unsigned long long)data_bytes, (unsigned long long)t->begin,
                             (unsigned long long)t->end);
    }
    if (t->end - t->begin != bits / 8) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: %s: expected %llu bytes for %s of shape %s, found %llu",
                             spurion_path_tail(c->name), t->name, (unsigned long long)(bits / 8), dtypes[t->dtype].name, shape,
                             (unsigned long long)(t->end - t->begin));
    }
    t->elements = elements;
    return spurion_ok();
}

static spurion_status take_tensor(cursor *c, spurion_tensor_info *t, uint64_t data_bytes)
{
    spurion_status st;
    int seen = 0;

    if (strlen(t->name) > SPURION_TENSOR_NAME_BYTES_MAX) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: header: expected names of at most %d bytes, found %zu: %.40s..",
                           spurion_path_tail(c->name), SPURION_TENSOR_NAME_BYTES_MAX, strlen(t->name), t->name);
        goto out;
    }
    SPURION_TRY(st, need(c, '{'));
    if (!take(c, '}')) {
        do {
            SPURION_TRY(st, take_field(c, t, &seen));
        } while (take(c, ','));
        SPURION_TRY(st, need(c, '}'));
    }
    if (seen != 7) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: %s: expected dtype, shape and data_offsets, found no %s",
                           spurion_path_tail(c->name), t->name, (seen & 1) == 0 ? "dtype" : (seen & 2) == 0 ? "shape" : "data_offsets");
        goto out;
    }
    SPURION_TRY(st, check_size(c, t, data_bytes));
out:
    return st;
}

/* Room for one more element; capacity doubles. */
static spurion_status grow(void **array, int *cap, int count, int first, size_t size, const char *name)
{
    void *more;

    if (count < *cap) {
        return spurion_ok();
    }
    more = realloc(*array, (size_t)(*cap == 0 ? first : *cap * 2) * size);
    if (more == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: no memory for its index", spurion_path_tail(name));
    }
    *array = more;
    *cap = *cap == 0 ? first : *cap * 2;
    return spurion_ok();
}

static spurion_status take_notes(spurion_tensor_header *h, cursor *c)
{
    spurion_status st;

    SPURION_TRY(st, need(c, '{'));
    if (take(c, '}')) {
        goto out;
    }
    do {
        spurion_tensor_note note;

        SPURION_TRY(st, take_string(c, &note.key));
        SPURION_TRY(st, need(c, ':'));
        SPURION_TRY(st, take_string(c, &note.value));
        SPURION_TRY(st, grow((void **)&h->notes, &h->note_cap, h->note_count, 8, sizeof *h->notes, c->name));
        h->notes[h->note_count++] = note;
    } while (take(c, ','));
    SPURION_TRY(st, need(c, '}'));
out:
    return st;
}

static spurion_status take_entry(spurion_tensor_header *h, cursor *c, uint64_t data_bytes, bool *notes_seen)
{
    spurion_status st;
    spurion_tensor_info t;

    memset(&t, 0, sizeof t);
    SPURION_TRY(st, take_string(c, &t.name));
    SPURION_TRY(st, need(c, ':'));
    if (strcmp(t.name, "__metadata__") == 0) {
        if (*notes_seen) {
            st = fault(c, "__metadata__ once, not twice,");
            goto out;
        }
        *notes_seen = true;
        SPURION_TRY(st, take_notes(h, c));
        goto out;
    }
    SPURION_TRY(st, take_tensor(c, &t, data_bytes));
    if (h->tensor_count == SPURION_TENSOR_COUNT_MAX) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: header: expected at most %d tensors, found more", spurion_path_tail(c->name),
                           SPURION_TENSOR_COUNT_MAX);
        goto out;
    }
    SPURION_TRY(st, grow((void **)&h->tensors, &h->tensor_cap, h->tensor_count, 16, sizeof *h->tensors, c->name));
    h->tensors[h->tensor_count++] = t;
out:
    return st;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const spurion_tensor_info *)a)->name, ((const spurion_tensor_info *)b)->name);
}

static int by_key(const void *a, const void *b)
{
    return strcmp(((const spurion_tensor_note *)a)->key, ((const spurion_tensor_note *)b)->key);
}

static int by_offset(const void *a, const void *b)
{
    const spurion_tensor_info *x = a, *y = b;

    return x->begin != y->begin ? (x->begin < y->begin ? -1 : 1) : x->end != y->end ? (x->end < y->end ? -1 : 1) : 0;
}

static void sort(void *array, int count, size_t size, int (*order)(const void *, const void *))
{
    if (count > 1) {
        qsort(array, (size_t)count, size, order);
    }
}

/* No overlap, no hole, nothing after the last tensor: a file is one thing only. */
static spurion_status check_layout(spurion_tensor_header *h, uint64_t data_bytes, const char *name)
{
    uint64_t at = 0;

    sort(h->tensors, h->tensor_count, sizeof *h->tensors, by_offset);
    for (int i = 0; i < h->tensor_count; i++) {
        const spurion_tensor_info *t = &h->tensors[i];

        if (t->begin != at) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: %s: expected data from byte %llu on, found %llu (%s)",
                                 spurion_path_tail(name), t->name, (unsigned long long)at, (unsigned long long)t->begin,
                                 t->begin < at ? "tensors overlap" : "a hole between tensors");
        }
        at = t->end;
    }
    if (at != data_bytes) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected %llu bytes of data as its header says, found %llu",
                             spurion_path_tail(name), (unsigned long long)at, (unsigned long long)data_bytes);
    }
    return spurion_ok();
}

static spurion_status check_duplicates(spurion_tensor_header *h, const char *name)
{
    sort(h->tensors, h->tensor_count, sizeof *h->tensors, by_name);
    for (int i = 1; i < h->tensor_count; i++) {
        if (strcmp(h->tensors[i - 1].name, h->tensors[i].name) == 0) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: header: expected every name once, found %s twice",
                                 spurion_path_tail(name), h->tensors[i].name);
        }
    }
    sort(h->notes, h->note_count, sizeof *h->notes, by_key);
    for (int i = 1; i < h->note_count; i++) {
        if (strcmp(h->notes[i - 1].key, h->notes[i].key) == 0) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: __metadata__: expected every key once, found \"%.80s\" twice",
                                 spurion_path_tail(name), h->notes[i].key);
        }
    }
    return spurion_ok();
}

static spurion_status take_header(spurion_tensor_header *h, cursor *c, uint64_t data_bytes)
{
    spurion_status st;
    bool notes_seen = false;

    if (c->at >= c->end || *c->at != '{') { /* white space before it is no header of safetensors */
        return fault(c, "'{'");
    }
    c->at++;
    if (!take(c, '}')) {
        do {
            SPURION_TRY(st, take_entry(h, c, data_bytes, &notes_seen));
        } while (take(c, ','));
        SPURION_TRY(st, need(c, '}'));
    }
    while (c->at < c->end && *c->at == ' ') {
        c->at++;
    }
    if (c->at < c->end) {
        st = fault(c, "spaces only after the header's end");
        goto out;
    }
    SPURION_TRY(st, check_layout(h, data_bytes, c->name));
    SPURION_TRY(st, check_duplicates(h, c->name));
out:
    return st;
}

spurion_status spurion_tensor_header_parse(spurion_tensor_header *out, const char *json, size_t bytes, uint64_t data_bytes,
                                           const char *name)
{
    spurion_status st;
    cursor c;

    memset(out, 0, sizeof *out);
    out->strings = malloc(bytes + 1);
    if (out->strings == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: no memory for a header of %zu bytes", spurion_path_tail(name), bytes);
    }
    c.begin = c.at = (const unsigned char *)json;
    c.end = c.begin + bytes;
    c.strings = out->strings;
    c.name = name;
    st = take_header(out, &c, data_bytes);
    if (st.code != SPURION_OK) {
        spurion_tensor_header_fini(out);
    }
    return st;
}

void spurion_tensor_header_fini(spurion_tensor_header *h)
{
    free(h->tensors);
    free(h->notes);
    free(h->strings);
    memset(h, 0, sizeof *h);
}

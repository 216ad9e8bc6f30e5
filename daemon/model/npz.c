/* Zip directory, npy headers and streamed reads; see npz.h. Formats: PKWARE APPNOTE 6.3.10 sections 4.3 to 4.5 (directory, zip64),
 * numpy.lib.format versions 1 to 3. */
#include "daemon/model/npz.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zlib.h>

#include "daemon/base/json.h"

#define END_BYTES 22u              /* end of central directory, without its comment */
#define COMMENT_BYTES_MAX 65535u
#define ENTRY_BYTES 46u            /* of a central directory entry, without name, extra, comment */
#define LOCAL_BYTES 30u
#define DIRECTORY_BYTES_MAX (16u << 20)
#define NPY_HEADER_BYTES_MAX 16384u
#define DEFLATE_RATIO_MAX 1032u    /* of zlib's format */
#define ARCHIVE_RATIO_MAX 16u      /* of all arrays together: weights hardly pack, and small whole numbers in float64 by 12 */
#define ARCHIVE_BYTES_FREE (1u << 20)
#define BUFFER_BYTES 16384u

typedef struct member {
    const char *name; /* without .npy, in the header's strings */
    uint64_t start;   /* of its bytes in the archive */
    uint64_t packed, size;
    uint64_t data;    /* offset of the array's data among the member's (unpacked) bytes */
    uint32_t crc;
    bool deflated;
} member;

struct spurion_npz {
    spurion_npz_source source;
    member *members; /* in the order of names, as the tensors */
    int count;

    /* The member being inflated. */
    z_stream stream;
    bool streaming;
    int at;
    uint64_t inflated, consumed; /* bytes given out, packed bytes taken in */
    unsigned char in[BUFFER_BYTES], skip[BUFFER_BYTES];
};

static uint32_t u16(const unsigned char *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8;
}

static uint32_t u32(const unsigned char *p)
{
    return u16(p) | u16(p + 2) << 16;
}

static uint64_t u64(const unsigned char *p)
{
    return u32(p) | (uint64_t)u32(p + 4) << 32;
}

static const char *tail(const spurion_npz *z)
{
    return spurion_path_tail(z->source.path);
}

static spurion_status no_memory(const spurion_npz *z)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: no memory for its directory", tail(z));
}

static spurion_status truncated(const spurion_npz *z, size_t bytes, uint64_t offset)
{
    return spurion_error(SPURION_DATA_LOSS, "%s: expected %zu bytes at %llu, found a file of %llu (a truncated file?)", tail(z), bytes,
                         (unsigned long long)offset, (unsigned long long)z->source.size);
}

/* Reads bytes of the archive itself. */
static spurion_status read_at(void *out, const spurion_npz *z, size_t bytes, uint64_t offset)
{
    size_t got = 0;

    if (offset > z->source.size || bytes > z->source.size - offset) {
        return truncated(z, bytes, offset);
    }
    if (z->source.fd < 0) {
        memcpy(out, z->source.bytes + offset, bytes);
        return spurion_ok();
    }
    while (got < bytes) {
        ssize_t n = pread(z->source.fd, (char *)out + got, bytes - got, (off_t)(offset + got));

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return truncated(z, bytes, offset);
        }
        got += (size_t)n;
    }
    return spurion_ok();
}

/* --- the directory --- */

typedef struct directory {
    uint64_t entries, bytes, offset;
} directory;

/* The zip64 record, where the plain one has no room. end: offset of the plain end record. */
static spurion_status find_zip64(directory *d, const spurion_npz *z, uint64_t end)
{
    spurion_status st;
    unsigned char locator[20], record[56];

    if (end < sizeof locator) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a zip64 locator before byte %llu, found none", tail(z),
                             (unsigned long long)end);
    }
    SPURION_TRY(st, read_at(locator, z, sizeof locator, end - sizeof locator));
    if (u32(locator) != 0x07064b50) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a zip64 locator, found none", tail(z));
        goto out;
    }
    SPURION_TRY(st, read_at(record, z, sizeof record, u64(locator + 8)));
    if (u32(record) != 0x06064b50 || u32(record + 16) != 0 || u32(record + 20) != 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a zip64 end record of one disk, found another", tail(z));
        goto out;
    }
    *d = (directory){u64(record + 32), u64(record + 40), u64(record + 48)};
out:
    return st;
}

/* The end record stands at the end, before a comment of at most 64 KiB. */
static spurion_status find_directory(directory *d, const spurion_npz *z)
{
    spurion_status st;
    size_t tail_bytes = z->source.size < END_BYTES + COMMENT_BYTES_MAX ? (size_t)z->source.size : END_BYTES + COMMENT_BYTES_MAX;
    unsigned char *end = malloc(tail_bytes + 1);
    size_t at;

    if (end == NULL) {
        return no_memory(z);
    }
    SPURION_TRY(st, read_at(end, z, tail_bytes, z->source.size - tail_bytes));
    for (at = tail_bytes; at >= END_BYTES; at--) {
        const unsigned char *p = end + at - END_BYTES;

        if (u32(p) == 0x06054b50 && u16(p + 20) == tail_bytes - at) {
            break;
        }
    }
    if (at < END_BYTES) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected an npz file (a zip archive), found no end of its directory", tail(z));
        goto out;
    }
    at -= END_BYTES;
    if (u16(end + at + 4) != 0 || u16(end + at + 6) != 0) {
        st = spurion_error(SPURION_UNIMPLEMENTED, "%s: expected a zip archive of one part, found several", tail(z));
        goto out;
    }
    *d = (directory){u16(end + at + 10), u32(end + at + 12), u32(end + at + 16)};
    if (d->entries == 0xffff || d->bytes == 0xffffffff || d->offset == 0xffffffff) {
        SPURION_TRY(st, find_zip64(d, z, z->source.size - tail_bytes + at));
    }
    if (d->entries > SPURION_NPZ_MEMBERS_MAX || d->bytes > DIRECTORY_BYTES_MAX || d->offset > z->source.size ||
        d->bytes > z->source.size - d->offset) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a directory of at most %d arrays within the file, found %llu in %llu bytes at %llu",
                           tail(z), SPURION_NPZ_MEMBERS_MAX, (unsigned long long)d->entries, (unsigned long long)d->bytes,
                           (unsigned long long)d->offset);
    }
out:
    free(end);
    return st;
}

/* Sizes and offset that are 0xffffffff stand in the zip64 extra field, in this order. */
static bool read_zip64_extra(member *m, const unsigned char *extra, size_t bytes)
{
    uint64_t *const values[] = {&m->size, &m->packed, &m->start};

    while (bytes >= 4) {
        size_t n = u16(extra + 2);

        if (n > bytes - 4) {
            return false;
        }
        if (u16(extra) == 1) {
            const unsigned char *p = extra + 4;

            for (int i = 0; i < 3; i++) {
                if (*values[i] == 0xffffffff) {
                    if (n < 8) {
                        return false;
                    }
                    *values[i] = u64(p);
                    p += 8;
                    n -= 8;
                }
            }
            return true;
        }
        extra += 4 + n;
        bytes -= 4 + n;
    }
    return m->size != 0xffffffff && m->packed != 0xffffffff && m->start != 0xffffffff;
}

static spurion_status wrong(const spurion_npz *z, const char *name, const char *expected, const char *found)
{
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s: %.80s: expected %s, found %s", tail(z), name, expected, found);
}

/* One entry of the directory; gives its length. m->start is the local header's place still. */
static spurion_status take_entry(member *m, size_t *taken, char **strings, const spurion_npz *z, const unsigned char *p, size_t left)
{
    size_t name_bytes, extra_bytes, all;
    char *name = *strings;
    uint32_t method;

    if (left < ENTRY_BYTES || u32(p) != 0x02014b50) {
        return wrong(z, "directory", "an entry of a zip archive", "something else");
    }
    name_bytes = u16(p + 28);
    extra_bytes = u16(p + 30);
    all = ENTRY_BYTES + name_bytes + extra_bytes + u16(p + 32);
    if (all > left) {
        return wrong(z, "directory", "an entry within it", "one that is longer");
    }
    if (name_bytes > SPURION_TENSOR_NAME_BYTES_MAX || name_bytes < 5 || memcmp(p + ENTRY_BYTES + name_bytes - 4, ".npy", 4) != 0 ||
        memchr(p + ENTRY_BYTES, 0, name_bytes) != NULL) {
        return wrong(z, "directory", "names NAME.npy of at most 256 bytes", "another");
    }
    memcpy(name, p + ENTRY_BYTES, name_bytes - 4);
    name[name_bytes - 4] = '\0';
    *strings += name_bytes - 3;
    method = u16(p + 10);
    if ((u16(p + 8) & 1) != 0 || (method != 0 && method != Z_DEFLATED)) {
        return spurion_error(SPURION_UNIMPLEMENTED, "%s: %.80s: expected stored or deflated data, found %s", tail(z), name,
                             (u16(p + 8) & 1) != 0 ? "encrypted ones" : "another method");
    }
    *m = (member){name, u32(p + 42), u32(p + 20), u32(p + 24), 0, u32(p + 16), method != 0};
    if (!read_zip64_extra(m, p + ENTRY_BYTES + name_bytes, extra_bytes)) {
        return wrong(z, name, "its sizes in the zip64 field", "none there");
    }
    *taken = all;
    return spurion_ok();
}

/* From the local header to the member's bytes; sizes must be possible. */
static spurion_status find_data(member *m, const spurion_npz *z)
{
    spurion_status st;
    unsigned char local[LOCAL_BYTES];

    SPURION_TRY(st, read_at(local, z, sizeof local, m->start));
    if (u32(local) != 0x04034b50) {
        st = wrong(z, m->name, "a local header of a zip archive", "something else");
        goto out;
    }
    m->start += LOCAL_BYTES + u16(local + 26) + u16(local + 28);
    if (m->start > z->source.size || m->packed > z->source.size - m->start) {
        st = truncated(z, (size_t)m->packed, m->start);
        goto out;
    }
    if (m->deflated ? m->size / DEFLATE_RATIO_MAX > m->packed : m->size != m->packed) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: %.80s: expected a size that %llu bytes can hold, found %llu", tail(z), m->name,
                           (unsigned long long)m->packed, (unsigned long long)m->size);
    }
out:
    return st;
}

/* What the arrays unpack to is bounded by the file's size. */
static spurion_status check_ratio(const spurion_npz *z)
{
    const uint64_t most = ARCHIVE_BYTES_FREE + z->source.size * ARCHIVE_RATIO_MAX;
    uint64_t all = 0;

    for (int i = 0; i < z->count; i++) {
        all += z->members[i].size; /* each at most 1032 times the file's size */
        if (all > most) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected arrays of at most %llu bytes in an archive of %llu, found more: weights do not "
                                 "pack like this; save it stored (numpy.savez) if they are right", tail(z), (unsigned long long)most,
                                 (unsigned long long)z->source.size);
        }
    }
    return spurion_ok();
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const member *)a)->name, ((const member *)b)->name);
}

static int by_start(const void *a, const void *b)
{
    const member *x = a, *y = b;

    return x->start < y->start ? -1 : x->start > y->start;
}

/* Members that share bytes are no archive of numpy's: the way of zip bombs. */
static spurion_status check_layout(spurion_npz *z)
{
    qsort(z->members, (size_t)z->count, sizeof *z->members, by_start);
    for (int i = 1; i < z->count; i++) {
        const member *a = &z->members[i - 1];

        if (a->start + a->packed > z->members[i].start) {
            return wrong(z, z->members[i].name, "bytes of its own", "bytes of another array");
        }
    }
    qsort(z->members, (size_t)z->count, sizeof *z->members, by_name);
    for (int i = 1; i < z->count; i++) {
        if (strcmp(z->members[i - 1].name, z->members[i].name) == 0) {
            return wrong(z, z->members[i].name, "every name once", "it twice");
        }
    }
    return spurion_ok();
}

static spurion_status read_directory(spurion_npz *z, spurion_tensor_header *header)
{
    spurion_status st;
    directory d = {0, 0, 0};
    unsigned char *bytes = NULL;
    char *strings;
    size_t at = 0;

    SPURION_TRY(st, find_directory(&d, z));
    bytes = malloc((size_t)d.bytes + 1);
    header->strings = strings = malloc((size_t)d.bytes + 1); /* names are shorter than their entries */
    z->members = calloc((size_t)d.entries + 1, sizeof *z->members);
    if (bytes == NULL || strings == NULL || z->members == NULL) {
        st = no_memory(z);
        goto out;
    }
    SPURION_TRY(st, read_at(bytes, z, (size_t)d.bytes, d.offset));
    for (uint64_t i = 0; i < d.entries; i++) {
        member *m = &z->members[z->count];
        size_t taken = 0;

        SPURION_TRY(st, take_entry(m, &taken, &strings, z, bytes + at, (size_t)d.bytes - at));
        at += taken;
        SPURION_TRY(st, find_data(m, z));
        z->count++;
    }
    SPURION_TRY(st, check_layout(z));
    SPURION_TRY(st, check_ratio(z));
out:
    free(bytes);
    return st;
}

/* --- a member's bytes --- */

static void stream_end(spurion_npz *z)
{
    if (z->streaming) {
        (void)inflateEnd(&z->stream);
    }
    z->streaming = false;
}

static spurion_status stream_begin(spurion_npz *z, int i)
{
    stream_end(z);
    memset(&z->stream, 0, sizeof z->stream);
    if (inflateInit2(&z->stream, -MAX_WBITS) != Z_OK) {
        return no_memory(z);
    }
    z->streaming = true;
    z->at = i;
    z->inflated = z->consumed = 0;
    return spurion_ok();
}

/* Inflates exactly `bytes` more. */
static spurion_status stream_take(void *out, spurion_npz *z, size_t bytes)
{
    spurion_status st = spurion_ok();
    const member *m = &z->members[z->at];

    while (bytes > 0) {
        size_t part = bytes < (1u << 30) ? bytes : 1u << 30, got;
        int code;

        if (z->stream.avail_in == 0) {
            uint64_t left = m->packed - z->consumed;
            size_t n = left < BUFFER_BYTES ? (size_t)left : BUFFER_BYTES;

            SPURION_TRY(st, read_at(z->in, z, n, m->start + z->consumed));
            z->consumed += n;
            z->stream.next_in = z->in;
            z->stream.avail_in = (unsigned)n;
        }
        z->stream.next_out = out;
        z->stream.avail_out = (unsigned)part;
        code = inflate(&z->stream, Z_NO_FLUSH);
        got = part - z->stream.avail_out;
        out = (char *)out + got;
        bytes -= got;
        z->inflated += got;
        if (code != Z_OK && !(code == Z_STREAM_END && bytes == 0)) {
            st = spurion_error(SPURION_DATA_LOSS, "%s: %.80s: expected %llu bytes of deflated data, found %s after %llu", tail(z), m->name,
                               (unsigned long long)m->size, code == Z_STREAM_END ? "their end" : code == Z_BUF_ERROR ? "no more" : "a fault",
                               (unsigned long long)z->inflated);
            goto out;
        }
    }
out:
    return st;
}

/* Bytes of member i as they were before packing. */
static spurion_status member_read(void *out, spurion_npz *z, int i, uint64_t offset, size_t bytes)
{
    spurion_status st;
    const member *m = &z->members[i];

    if (offset > m->size || bytes > m->size - offset) {
        return spurion_error(SPURION_DATA_LOSS, "%s: %.80s: expected %zu bytes at %llu, found an array of %llu", tail(z), m->name, bytes,
                             (unsigned long long)offset, (unsigned long long)m->size);
    }
    if (!m->deflated) {
        return read_at(out, z, bytes, m->start + offset);
    }
    if (!z->streaming || z->at != i || z->inflated > offset) {
        SPURION_TRY(st, stream_begin(z, i));
    }
    while (z->inflated < offset) {
        uint64_t left = offset - z->inflated;

        SPURION_TRY(st, stream_take(z->skip, z, left < BUFFER_BYTES ? (size_t)left : BUFFER_BYTES));
    }
    SPURION_TRY(st, stream_take(out, z, bytes));
out:
    if (st.code != SPURION_OK) {
        stream_end(z);
    }
    return st;
}

spurion_status spurion_npz_read(void *out, spurion_npz *z, int i, uint64_t offset, size_t bytes)
{
    return member_read(out, z, i, z->members[i].data + offset, bytes);
}

spurion_status spurion_npz_check(spurion_npz *z, int i, spurion_sha256 *hash)
{
    spurion_status st = spurion_ok();
    const member *m = &z->members[i];
    unsigned char *part = malloc(BUFFER_BYTES);
    uLong crc = crc32(0, NULL, 0);

    if (part == NULL) {
        return no_memory(z);
    }
    for (uint64_t at = 0; at < m->size;) {
        uint64_t end = at < m->data ? m->data : m->size; /* the header by itself: it is not hashed */
        size_t n = end - at < BUFFER_BYTES ? (size_t)(end - at) : BUFFER_BYTES;

        SPURION_TRY(st, member_read(part, z, i, at, n));
        crc = crc32(crc, part, (unsigned)n);
        if (hash != NULL && at >= m->data) {
            SPURION_TRY(st, spurion_sha256_update(hash, part, n));
        }
        at += n;
    }
    if ((uint32_t)crc != m->crc) {
        st = spurion_error(SPURION_DATA_LOSS, "%s: %.80s: expected CRC-32 %08x, found %08lx: the file is damaged", tail(z), m->name, m->crc, crc);
    }
out:
    free(part);
    return st;
}

/* --- npy --- */

typedef struct cursor {
    const char *at, *end;
} cursor;

static bool take(cursor *c, const char *text)
{
    size_t n = strlen(text);

    while (c->at < c->end && (*c->at == ' ' || *c->at == '\n')) {
        c->at++;
    }
    if ((size_t)(c->end - c->at) < n || memcmp(c->at, text, n) != 0) {
        return false;
    }
    c->at += n;
    return true;
}

static bool take_dtype(cursor *c, spurion_tensor_info *t, char found[16])
{
    static const struct {
        const char *name;
        spurion_tensor_dtype dtype;
    } dtypes[] = {{"<f4", SPURION_TENSOR_F32}, {"<f8", SPURION_TENSOR_F64}, {"<f2", SPURION_TENSOR_F16}, {"<i4", SPURION_TENSOR_I32},
                  {"<i8", SPURION_TENSOR_I64}, {"<u4", SPURION_TENSOR_U32}, {"<u8", SPURION_TENSOR_U64}, {"|b1", SPURION_TENSOR_BOOL},
                  {"|u1", SPURION_TENSOR_U8},  {"|i1", SPURION_TENSOR_I8}};
    size_t n = 0;

    if (!take(c, "'")) {
        return false;
    }
    while (c->at + n < c->end && c->at[n] != '\'' && n < 15) {
        found[n] = c->at[n];
        n++;
    }
    found[n] = '\0';
    c->at += n;
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
        if (strcmp(found, dtypes[i].name) == 0) {
            t->dtype = dtypes[i].dtype;
            return take(c, "'");
        }
    }
    return false;
}

/* (), (3,) or (3, 4) */
static bool take_shape(cursor *c, spurion_tensor_info *t)
{
    if (!take(c, "(")) {
        return false;
    }
    while (!take(c, ")")) {
        uint64_t n = 0;
        const char *first;

        (void)take(c, "");
        first = c->at;
        while (c->at < c->end && *c->at >= '0' && *c->at <= '9') {
            if (__builtin_mul_overflow(n, 10u, &n) || __builtin_add_overflow(n, (uint64_t)(*c->at - '0'), &n)) {
                return false;
            }
            c->at++;
        }
        if (c->at == first || t->rank == SPURION_TENSOR_RANK_MAX) {
            return false;
        }
        t->shape[t->rank++] = n;
        if (!take(c, ",") && (c->at >= c->end || *c->at != ')')) {
            return false;
        }
    }
    return true;
}

/* {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }: numpy writes the keys in this order. */
static bool take_array(cursor *c, spurion_tensor_info *t, char found[16])
{
    if (!take(c, "{") || !take(c, "'descr'") || !take(c, ":") || !take_dtype(c, t, found) || !take(c, ",") || !take(c, "'fortran_order'") ||
        !take(c, ":")) {
        return false;
    }
    t->column_major = take(c, "True");
    if (!t->column_major && !take(c, "False")) {
        return false;
    }
    return take(c, ",") && take(c, "'shape'") && take(c, ":") && take_shape(c, t) && (take(c, ",") || true) && take(c, "}");
}

static spurion_status check_array(const spurion_npz *z, const member *m, spurion_tensor_info *t)
{
    uint64_t bits = 0;
    char shape[96];

    t->elements = 1;
    spurion_tensor_shape_text(shape, sizeof shape, t);
    for (int i = 0; i < t->rank; i++) {
        if (__builtin_mul_overflow(t->elements, t->shape[i], &t->elements)) {
            return wrong(z, m->name, "a shape of less than 2^64 elements", shape);
        }
    }
    if (__builtin_mul_overflow(t->elements, (uint64_t)spurion_tensor_dtype_bits(t->dtype), &bits) || bits / 8 != m->size - m->data) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: %.80s: expected %llu bytes for shape %s of %s, found %llu", tail(z), m->name,
                             (unsigned long long)(bits / 8), shape, spurion_tensor_dtype_name(t->dtype),
                             (unsigned long long)(m->size - m->data));
    }
    t->begin = 0;
    t->end = bits / 8;
    return spurion_ok();
}

static spurion_status read_array(spurion_tensor_info *t, spurion_npz *z, int i, char *text)
{
    spurion_status st;
    member *m = &z->members[i];
    unsigned char start[12];
    size_t length_bytes, length;
    char found[16] = "";
    cursor c;

    t->name = m->name;
    SPURION_TRY(st, member_read(start, z, i, 0, 10));
    if (memcmp(start, "\x93NUMPY", 6) != 0 || start[6] < 1 || start[6] > 3) {
        st = wrong(z, m->name, "an npy array of version 1 to 3", "something else");
        goto out;
    }
    length_bytes = start[6] == 1 ? 2 : 4;
    SPURION_TRY(st, member_read(start, z, i, 0, 8 + length_bytes));
    length = length_bytes == 2 ? u16(start + 8) : u32(start + 8);
    if (length > NPY_HEADER_BYTES_MAX) {
        st = wrong(z, m->name, "an npy header of at most 16 KiB", "a longer one");
        goto out;
    }
    m->data = 8 + length_bytes + length;
    SPURION_TRY(st, member_read(text, z, i, 8 + length_bytes, length));
    c = (cursor){text, text + length};
    if (!take_array(&c, t, found) || (take(&c, ""), c.at != c.end)) {
        st = spurion_error(SPURION_UNIMPLEMENTED, "%s: %.80s: expected an npy header {'descr': '<f4', 'fortran_order': .., 'shape': ..} "
                           "of a number type in little-endian order, found another (type '%s')", tail(z), m->name, found);
        goto out;
    }
    SPURION_TRY(st, check_array(z, m, t));
out:
    return st;
}

spurion_status spurion_npz_open(spurion_npz **out, spurion_tensor_header *header, const spurion_npz_source *source)
{
    spurion_status st;
    spurion_npz *z = malloc(sizeof *z); /* the buffers are not touched before they are used */
    char *text = malloc(NPY_HEADER_BYTES_MAX + 1);

    *out = NULL;
    memset(header, 0, sizeof *header);
    if (z != NULL) {
        z->source = *source;
        z->members = NULL;
        z->count = 0;
        z->streaming = false;
    }
    if (z == NULL || text == NULL) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: no memory to open it", spurion_path_tail(source->path));
        goto out;
    }
    SPURION_TRY(st, read_directory(z, header));
    header->tensors = calloc((size_t)z->count + 1, sizeof *header->tensors);
    if (header->tensors == NULL) {
        st = no_memory(z);
        goto out;
    }
    for (int i = 0; i < z->count; i++) {
        SPURION_TRY(st, read_array(&header->tensors[i], z, i, text));
    }
    header->tensor_count = header->tensor_cap = z->count;
    *out = z;
    z = NULL;
out:
    free(text);
    spurion_npz_close(z);
    if (st.code != SPURION_OK) {
        spurion_tensor_header_fini(header);
    }
    return st;
}

void spurion_npz_close(spurion_npz *z)
{
    if (z != NULL) {
        stream_end(z);
        free(z->members);
        free(z);
    }
}

/* safetensors files and sets of shards. Thread: one owner; large tensors are read and checked on several threads (parallel.h).
 * Memory: the index; staging of STAGE_BYTES for each of them while converting, and while hashing. */
#include "daemon/model/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/base/json.h"
#include "daemon/base/parallel.h"
#include "daemon/model/npz.h"

#define STAGE_BYTES (1u << 20)
#define PART_ELEMENTS (1u << 21) /* of a tensor that is read in parts: enough work to start a thread for */

struct spurion_safetensors {
    spurion_tensor_header header;
    char *path;
    int fd;              /* -1: a header without its file */
    spurion_npz *npz;    /* NULL: a safetensors file */
    uint64_t data_start; /* 8 + header bytes */
    uint64_t data_bytes;
};

/* --- one file --- */

static spurion_status pread_all(void *out, int fd, size_t bytes, uint64_t offset, const char *path)
{
    size_t got = 0;

    while (got < bytes) {
        ssize_t n = pread(fd, (char *)out + got, bytes - got, (off_t)(offset + got));

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return spurion_error(SPURION_DATA_LOSS, "%s: expected %zu bytes at %llu, found a read error: %s", spurion_path_tail(path),
                                 bytes, (unsigned long long)offset, strerror(errno));
        }
        if (n == 0) {
            return spurion_error(SPURION_DATA_LOSS, "%s: expected %zu bytes at %llu, found %zu: the file is truncated",
                                 spurion_path_tail(path), bytes, (unsigned long long)offset, got);
        }
        got += (size_t)n;
    }
    return spurion_ok();
}

/* Links are resolved once (a Hugging Face cache is made of them); what they lead to must be a regular file. */
static spurion_status open_regular(int *fd, uint64_t *size, const char *path)
{
    char *real = realpath(path, NULL);
    struct stat info;

    *fd = -1;
    if (real != NULL) {
        *fd = open(real, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
        free(real);
    }
    if (*fd < 0) {
        return spurion_error(errno == ENOENT || errno == ENOTDIR ? SPURION_NOT_FOUND : SPURION_FAILED_PRECONDITION,
                             "%s: expected a readable safetensors file, found: %s", spurion_path_tail(path), strerror(errno));
    }
    if (fstat(*fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size < 0) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a regular file, found something else", spurion_path_tail(path));
    }
    *size = (uint64_t)info.st_size;
    return spurion_ok();
}

static spurion_status read_header(spurion_safetensors *s, uint64_t size)
{
    spurion_status st;
    unsigned char length[8];
    uint64_t bytes = 0;
    char *json = NULL;

    if (size < 8) {
        st = spurion_error(SPURION_DATA_LOSS, "%s: expected at least 8 bytes of a safetensors file, found %llu",
                           spurion_path_tail(s->path), (unsigned long long)size);
        goto out;
    }
    SPURION_TRY(st, pread_all(length, s->fd, sizeof length, 0, s->path));
    for (int i = 7; i >= 0; i--) {
        bytes = bytes << 8 | length[i];
    }
    if (bytes > SPURION_TENSOR_HEADER_BYTES_MAX) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a header of at most %u bytes, found %llu (no safetensors file?)",
                           spurion_path_tail(s->path), SPURION_TENSOR_HEADER_BYTES_MAX, (unsigned long long)bytes);
        goto out;
    }
    if (bytes > size - 8) {
        st = spurion_error(SPURION_DATA_LOSS, "%s: expected a header of %llu bytes, found a file of %llu: it is truncated",
                           spurion_path_tail(s->path), (unsigned long long)bytes, (unsigned long long)size);
        goto out;
    }
    json = malloc((size_t)bytes + 1);
    if (json == NULL) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: no memory for its header", spurion_path_tail(s->path));
        goto out;
    }
    SPURION_TRY(st, pread_all(json, s->fd, (size_t)bytes, 8, s->path));
    s->data_start = 8 + bytes;
    s->data_bytes = size - s->data_start;
    SPURION_TRY(st, spurion_tensor_header_parse(&s->header, json, (size_t)bytes, s->data_bytes, s->path));
out:
    free(json);
    return st;
}

static spurion_status safetensors_alloc(spurion_safetensors **out, const char *path)
{
    spurion_safetensors *s = calloc(1, sizeof *s);

    *out = s;
    if (s != NULL) {
        s->fd = -1;
        s->path = strdup(path);
    }
    if (s == NULL || s->path == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: no memory to open it", spurion_path_tail(path));
    }
    return spurion_ok();
}

spurion_status spurion_safetensors_open(spurion_safetensors **out, const char *path)
{
    spurion_status st;
    spurion_safetensors *s = NULL;
    uint64_t size = 0;

    *out = NULL;
    SPURION_TRY(st, safetensors_alloc(&s, path));
    SPURION_TRY(st, open_regular(&s->fd, &size, path));
    SPURION_TRY(st, read_header(s, size));
    *out = s;
    s = NULL;
out:
    spurion_safetensors_close(s);
    return st;
}

spurion_status spurion_safetensors_open_npz(spurion_safetensors **out, const char *path)
{
    spurion_status st;
    spurion_safetensors *s = NULL;
    spurion_npz_source source = {-1, NULL, 0, path};

    *out = NULL;
    SPURION_TRY(st, safetensors_alloc(&s, path));
    SPURION_TRY(st, open_regular(&s->fd, &source.size, path));
    source.fd = s->fd;
    source.path = s->path;
    SPURION_TRY(st, spurion_npz_open(&s->npz, &s->header, &source));
    *out = s;
    s = NULL;
out:
    spurion_safetensors_close(s);
    return st;
}

spurion_status spurion_safetensors_parse(spurion_safetensors **out, const char *header, size_t header_bytes, uint64_t file_bytes,
                                         const char *name)
{
    spurion_status st;
    spurion_safetensors *s = NULL;

    *out = NULL;
    SPURION_TRY(st, safetensors_alloc(&s, name));
    if (file_bytes < 8 || header_bytes > file_bytes - 8) {
        st = spurion_error(SPURION_DATA_LOSS, "%s: expected a header of %zu bytes, found a file of %llu", spurion_path_tail(name),
                           header_bytes, (unsigned long long)file_bytes);
        goto out;
    }
    s->data_start = 8 + header_bytes;
    s->data_bytes = file_bytes - s->data_start;
    SPURION_TRY(st, spurion_tensor_header_parse(&s->header, header, header_bytes, s->data_bytes, name));
    *out = s;
    s = NULL;
out:
    spurion_safetensors_close(s);
    return st;
}

void spurion_safetensors_close(spurion_safetensors *s)
{
    if (s == NULL) {
        return;
    }
    if (s->fd >= 0) {
        close(s->fd);
    }
    spurion_npz_close(s->npz);
    spurion_tensor_header_fini(&s->header);
    free(s->path);
    free(s);
}

int spurion_safetensors_count(const spurion_safetensors *s)
{
    return s->header.tensor_count;
}

const spurion_tensor_info *spurion_safetensors_at(const spurion_safetensors *s, int i)
{
    return &s->header.tensors[i];
}

const spurion_tensor_info *spurion_safetensors_find(const spurion_safetensors *s, const char *name)
{
    int low = 0, high = s->header.tensor_count;

    while (low < high) {
        int middle = low + (high - low) / 2;
        int order = strcmp(name, s->header.tensors[middle].name);

        if (order == 0) {
            return &s->header.tensors[middle];
        }
        if (order < 0) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

const char *spurion_safetensors_note(const spurion_safetensors *s, const char *key)
{
    for (int i = 0; i < s->header.note_count; i++) {
        if (strcmp(s->header.notes[i].key, key) == 0) {
            return s->header.notes[i].value;
        }
    }
    return NULL;
}

const char *spurion_safetensors_path(const spurion_safetensors *s)
{
    return s->path;
}

void spurion_tensor_shape_text(char *out, size_t bytes, const spurion_tensor_info *t)
{
    size_t at = (size_t)snprintf(out, bytes, "(");

    for (int i = 0; i < t->rank && at < bytes; i++) {
        at += (size_t)snprintf(out + at, bytes - at, i == 0 ? "%llu" : ", %llu", (unsigned long long)t->shape[i]);
    }
    if (at < bytes) {
        snprintf(out + at, bytes - at, ")");
    }
}

/* --- values --- */

static float f16_to_f32(uint16_t h)
{
    int exponent = h >> 10 & 31, fraction = h & 1023;
    float value;

    if (exponent == 31) {
        value = fraction != 0 ? NAN : INFINITY;
    } else if (exponent == 0) {
        value = ldexpf((float)fraction, -24);
    } else {
        value = ldexpf((float)(fraction + 1024), exponent - 25);
    }
    return (h & 0x8000) != 0 ? -value : value;
}

#define RUN 1024 /* elements of an inner loop: a constant, so that it becomes vector instructions */

static void widen_bf16(float *out, const unsigned char *raw, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, raw + 2 * i, sizeof half);
        uint32_t word = (uint32_t)half << 16;
        memcpy(&out[i], &word, sizeof word);
    }
}

static void convert_bf16(float *out, const unsigned char *raw, size_t count)
{
    for (; count >= RUN; out += RUN, raw += 2 * RUN, count -= RUN) {
        widen_bf16(out, raw, RUN);
    }
    widen_bf16(out, raw, count);
}

/* Converts `count` little-endian elements at raw; raw need not be aligned. */
static void convert(float *out, const unsigned char *raw, size_t count, spurion_tensor_dtype dtype)
{
    if (dtype == SPURION_TENSOR_BF16) {
        convert_bf16(out, raw, count);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        int32_t small;
        int64_t large;
        double wide;

        switch (dtype) {
        case SPURION_TENSOR_F16:
            memcpy(&half, raw + 2 * i, sizeof half);
            out[i] = f16_to_f32(half);
            break;
        case SPURION_TENSOR_F64:
            memcpy(&wide, raw + 8 * i, sizeof wide);
            out[i] = (float)wide;
            break;
        case SPURION_TENSOR_I32:
            memcpy(&small, raw + 4 * i, sizeof small);
            out[i] = (float)small;
            break;
        default: /* I64: the caller lets no other through */
            memcpy(&large, raw + 8 * i, sizeof large);
            out[i] = (float)large;
            break;
        }
    }
}

/* Bytes of a tensor from `offset` of its data on. */
static spurion_status read_bytes(void *out, const spurion_safetensors *s, const spurion_tensor_info *t, uint64_t offset, size_t bytes)
{
    if (s->npz != NULL) {
        return spurion_npz_read(out, s->npz, (int)(t - s->header.tensors), offset, bytes);
    }
    return pread_all(out, s->fd, bytes, s->data_start + t->begin + offset, s->path);
}

static spurion_status read_converted(float *out, const spurion_safetensors *s, const spurion_tensor_info *t, uint64_t offset,
                                     uint64_t count)
{
    spurion_status st = spurion_ok();
    size_t size = (size_t)spurion_tensor_dtype_bits(t->dtype) / 8;
    unsigned char *stage = malloc(STAGE_BYTES);

    if (stage == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: no memory to read %s", spurion_path_tail(s->path), t->name);
    }
    while (count > 0) {
        size_t part = count < STAGE_BYTES / size ? (size_t)count : STAGE_BYTES / size;

        SPURION_TRY(st, read_bytes(stage, s, t, offset, part * size));
        convert(out, stage, part, t->dtype);
        out += part;
        offset += part * size;
        count -= part;
    }
out:
    free(stage);
    return st;
}

static spurion_status read_elements(float *out, const spurion_safetensors *s, const spurion_tensor_info *t, uint64_t first, uint64_t count)
{
    uint64_t offset = first * ((uint64_t)spurion_tensor_dtype_bits(t->dtype) / 8);

    return t->dtype == SPURION_TENSOR_F32 ? read_bytes(out, s, t, offset, (size_t)count * sizeof *out) : read_converted(out, s, t, offset, count);
}

/* One tensor, part by part. */
typedef struct reading {
    float *out;
    const spurion_safetensors *s;
    const spurion_tensor_info *t;
    uint64_t first, count, part;
    spurion_status status[SPURION_PARALLEL_MAX];
} reading;

static void read_part(void *context, int i)
{
    reading *r = context;
    uint64_t at = (uint64_t)i * r->part, n = r->count - at < r->part ? r->count - at : r->part;
    r->status[i] = read_elements(r->out + at, r->s, r->t, r->first + at, n);
}

/* How many parts make `count` elements, and of what size. */
static int parts_of(uint64_t *part, uint64_t count)
{
    uint64_t n = count / PART_ELEMENTS;
    n = n < 1 ? 1 : n > SPURION_PARALLEL_MAX ? SPURION_PARALLEL_MAX : n;
    *part = (count + n - 1) / n;
    return (int)n;
}

spurion_status spurion_safetensors_read(float *out, const spurion_safetensors *s, const spurion_tensor_info *t, uint64_t first,
                                        uint64_t count)
{
    reading r = {.out = out, .s = s, .t = t, .first = first, .count = count};
    int parts;

    if (s->fd < 0 || first > t->elements || count > t->elements - first) {
        return spurion_error(SPURION_OUT_OF_RANGE, "%s: %s: expected elements below %llu, found %llu from %llu", spurion_path_tail(s->path),
                             t->name, (unsigned long long)t->elements, (unsigned long long)count, (unsigned long long)first);
    }
    switch (t->dtype) {
    case SPURION_TENSOR_F32:
    case SPURION_TENSOR_F16:
    case SPURION_TENSOR_BF16:
    case SPURION_TENSOR_F64:
    case SPURION_TENSOR_I32:
    case SPURION_TENSOR_I64:
        break;
    default:
        return spurion_error(SPURION_UNIMPLEMENTED, "%s: %s: expected dtype F32, F16, BF16, F64, I32 or I64, found %s",
                             spurion_path_tail(s->path), t->name, spurion_tensor_dtype_name(t->dtype));
    }
    parts = s->npz != NULL ? 1 : parts_of(&r.part, count); /* an npz is one stream of compressed bytes */
    if (parts == 1) {
        return read_elements(out, s, t, first, count);
    }
    spurion_parallel(read_part, &r, parts);
    for (int i = 0; i < parts; i++) {
        if (r.status[i].code != SPURION_OK) {
            return r.status[i];
        }
    }
    return spurion_ok();
}

spurion_status spurion_safetensors_hash(spurion_sha256 *h, const spurion_safetensors *s, const atomic_bool *stop)
{
    spurion_status st = spurion_ok();
    unsigned char *stage = NULL;

    for (int i = 0; s->npz != NULL && i < s->header.tensor_count; i++) {
        SPURION_TRY(st, spurion_npz_check(s->npz, i, h));
    }
    if (s->npz != NULL) {
        return st;
    }
    stage = malloc(STAGE_BYTES);
    if (stage == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: no memory to hash it", spurion_path_tail(s->path));
    }
    for (uint64_t at = 0; at < s->data_bytes;) {
        size_t part = s->data_bytes - at < STAGE_BYTES ? (size_t)(s->data_bytes - at) : STAGE_BYTES;

        if (stop != NULL && atomic_load(stop)) {
            st = spurion_error(SPURION_CANCELLED, "%s: nobody wants its hash any more", spurion_path_tail(s->path));
            goto out;
        }
        SPURION_TRY(st, pread_all(stage, s->fd, part, s->data_start + at, s->path));
        SPURION_TRY(st, spurion_sha256_update(h, stage, part));
        at += part;
    }
out:
    free(stage);
    return st;
}

/* A float is finite unless its exponent is all ones. */
static bool run_finite(const float *x, size_t count)
{
    uint32_t bad = 0;

    for (size_t i = 0; i < count; i++) {
        uint32_t word;
        memcpy(&word, &x[i], sizeof word);
        bad |= (word & 0x7f800000u) == 0x7f800000u;
    }
    return bad == 0;
}

/* The first element that is not finite from `at` on, looked for in whole runs; count: there is none. */
static size_t first_bad(const float *x, size_t at, size_t count)
{
    while (at + RUN <= count && run_finite(x + at, RUN)) {
        at += RUN;
    }
    while (at < count && isfinite(x[at])) {
        at++;
    }
    return at;
}

typedef struct checking {
    const float *x;
    uint64_t count, part;
    size_t bad[SPURION_PARALLEL_MAX]; /* of each part: the place in x, or its end */
} checking;

static void check_part(void *context, int i)
{
    checking *c = context;
    uint64_t at = (uint64_t)i * c->part, end = c->count - at < c->part ? c->count : at + c->part;
    c->bad[i] = first_bad(c->x, (size_t)at, (size_t)end);
}

spurion_status spurion_check_finite(const float *x, size_t count, const char *what, const char *where)
{
    checking c = {.x = x, .count = count};
    int parts = parts_of(&c.part, count);

    spurion_parallel(check_part, &c, parts);
    for (int p = 0; p < parts; p++) {
        size_t i = c.bad[p];
        if (i < count && i < (uint64_t)(p + 1) * c.part) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: %s: expected finite numbers, found %s at element %zu",
                                 spurion_path_tail(where), what, isnan(x[i]) ? "NaN" : "infinity", i);
        }
    }
    return spurion_ok();
}

/* --- a directory --- */

typedef struct shard_entry {
    const char *name; /* borrowed from the index, or from the single file */
    int file;
} shard_entry;

struct spurion_shards {
    spurion_safetensors *files[SPURION_SHARD_COUNT_MAX]; /* by file name */
    int file_count;
    json_t *index;        /* NULL: a single file */
    shard_entry *entries; /* by tensor name */
    int entry_count;
    spurion_safetensors *beside; /* value_head.safetensors, the last of files; or NULL */
};

static int entry_order(const void *a, const void *b)
{
    return strcmp(((const shard_entry *)a)->name, ((const shard_entry *)b)->name);
}

static int file_order(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static bool plain_file_name(const char *name)
{
    return name[0] != '\0' && name[0] != '.' && strchr(name, '/') == NULL;
}

/* The distinct file names of a weight map, sorted. */
static spurion_status shard_names(const char **names, int *count, const json_t *map, const char *path)
{
    const char *tensor;
    json_t *value;

    *count = 0;
    json_object_foreach((json_t *)(uintptr_t)map, tensor, value) {
        const char *file = json_string_value(value);
        bool known = false;

        if (file == NULL || !plain_file_name(file)) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: weight_map: %.80s: expected the name of a file beside it, found %.80s",
                                 spurion_path_tail(path), tensor, file != NULL ? file : "no string");
        }
        for (int i = *count - 1; i >= 0 && !known; i--) {
            known = strcmp(names[i], file) == 0;
        }
        if (!known && *count == SPURION_SHARD_COUNT_MAX) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: weight_map: expected at most %d files, found more",
                                 spurion_path_tail(path), SPURION_SHARD_COUNT_MAX);
        }
        if (!known) {
            names[(*count)++] = file;
        }
    }
    if (*count == 0) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: weight_map: expected tensors, found none", spurion_path_tail(path));
    }
    qsort(names, (size_t)*count, sizeof *names, file_order);
    return spurion_ok();
}

static spurion_status shards_fill(spurion_shards *s, const json_t *map, const char *const *names)
{
    const char *tensor;
    json_t *value;

    s->entries = calloc(json_object_size(map), sizeof *s->entries);
    if (s->entries == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for an index of %zu tensors", json_object_size(map));
    }
    json_object_foreach((json_t *)(uintptr_t)map, tensor, value) {
        const char *file = json_string_value(value);
        const char **found = bsearch(&file, names, (size_t)s->file_count, sizeof *names, file_order);
        shard_entry *e = &s->entries[s->entry_count++];

        e->name = tensor;
        e->file = (int)(found - (const char **)(uintptr_t)names);
        if (spurion_safetensors_find(s->files[e->file], tensor) == NULL) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected the tensor %.100s as the index says, found none",
                                 spurion_path_tail(s->files[e->file]->path), tensor);
        }
    }
    qsort(s->entries, (size_t)s->entry_count, sizeof *s->entries, entry_order);
    return spurion_ok();
}

/* The weight map of an index, and the files it names. */
static spurion_status index_map(const json_t **map, const char **names, int *count, const json_t *index, const char *path)
{
    *map = json_object_get(index, "weight_map");
    if (!json_is_object(*map)) {
        return spurion_json_error((spurion_json_at){index, path}, "weight_map", "an object of tensor names and files", *map);
    }
    return shard_names(names, count, *map, path);
}

spurion_status spurion_shards_index_check(int *files, int *tensors, const char *text, size_t bytes, const char *name)
{
    spurion_status st;
    const char *names[SPURION_SHARD_COUNT_MAX];
    const json_t *map = NULL;
    json_t *index = NULL;

    *files = *tensors = 0;
    SPURION_TRY(st, spurion_json_parse(&index, text, bytes, name));
    SPURION_TRY(st, index_map(&map, names, files, index, name));
    *tensors = (int)json_object_size(map);
out:
    json_decref(index);
    return st;
}

static spurion_status shards_open_index(spurion_shards *s, const char *dir, const char *path)
{
    spurion_status st;
    const char *names[SPURION_SHARD_COUNT_MAX];
    const json_t *map = NULL;
    char shard[PATH_MAX];
    int count = 0;

    SPURION_TRY(st, spurion_json_read(&s->index, path, SPURION_JSON_INDEX_BYTES_MAX));
    SPURION_TRY(st, index_map(&map, names, &count, s->index, path));
    for (int i = 0; i < count; i++) {
        SPURION_TRY(st, spurion_path_join(shard, sizeof shard, dir, names[i]));
        SPURION_TRY(st, spurion_safetensors_open(&s->files[i], shard));
        s->file_count++;
    }
    SPURION_TRY(st, shards_fill(s, map, names));
out:
    return st;
}

static spurion_status nothing_found(const char *dir)
{
    static const char *const pickles[] = {"pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth"};
    char path[PATH_MAX];

    for (size_t i = 0; i < sizeof pickles / sizeof *pickles; i++) {
        if (spurion_path_join(path, sizeof path, dir, pickles[i]).code == SPURION_OK && access(path, F_OK) == 0) {
            return spurion_error(SPURION_FAILED_PRECONDITION,
                                 "%s: expected safetensors, found pickled weights (%s): convert them with `python -m spurion.convert %s`",
                                 spurion_path_tail(dir), pickles[i], spurion_path_tail(dir));
        }
    }
    return spurion_error(SPURION_NOT_FOUND, "%s: expected model.safetensors or model.safetensors.index.json, found neither",
                         spurion_path_tail(dir));
}

/* A value head in a file of its own, as LLaMA-Factory writes it. */
static spurion_status shards_open_beside(spurion_shards *s, const char *dir)
{
    spurion_status st;
    char path[PATH_MAX];

    SPURION_TRY(st, spurion_path_join(path, sizeof path, dir, "value_head.safetensors"));
    if (s->file_count == SPURION_SHARD_COUNT_MAX || access(path, F_OK) != 0) {
        goto out;
    }
    SPURION_TRY(st, spurion_safetensors_open(&s->beside, path));
    s->files[s->file_count++] = s->beside;
out:
    return st;
}

spurion_status spurion_shards_open(spurion_shards **out, const char *dir)
{
    static const char *const names[] = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.safetensors",
                                        "pytorch_model.safetensors.index.json"};
    spurion_status st = nothing_found(dir);
    spurion_shards *s = calloc(1, sizeof *s);
    char path[PATH_MAX];

    *out = NULL;
    if (s == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: no memory to open it", spurion_path_tail(dir));
    }
    for (int i = 0; i < 4; i++) {
        spurion_status join = spurion_path_join(path, sizeof path, dir, names[i]);

        if (join.code != SPURION_OK || access(path, F_OK) != 0) {
            continue;
        }
        if (i % 2 == 1) {
            SPURION_TRY(st, shards_open_index(s, dir, path));
        } else {
            SPURION_TRY(st, spurion_safetensors_open(&s->files[0], path));
            s->file_count = 1;
        }
        SPURION_TRY(st, shards_open_beside(s, dir));
        *out = s;
        s = NULL;
        break;
    }
out:
    spurion_shards_close(s);
    return st;
}

void spurion_shards_close(spurion_shards *s)
{
    if (s == NULL) {
        return;
    }
    for (int i = 0; i < SPURION_SHARD_COUNT_MAX; i++) {
        spurion_safetensors_close(s->files[i]);
    }
    free(s->entries);
    json_decref(s->index);
    free(s);
}

static const spurion_safetensors *shard_of(const spurion_shards *s, const char *name)
{
    shard_entry key = {name, 0};
    const shard_entry *found;

    if (s->index == NULL) {
        return s->files[0];
    }
    found = bsearch(&key, s->entries, (size_t)s->entry_count, sizeof *s->entries, entry_order);
    return found != NULL ? s->files[found->file] : NULL;
}

const spurion_tensor_info *spurion_shards_find(const spurion_safetensors **file, const spurion_shards *s, const char *name)
{
    const spurion_tensor_info *t;

    *file = shard_of(s, name);
    t = *file != NULL ? spurion_safetensors_find(*file, name) : NULL;
    if (t == NULL && s->beside != NULL) {
        *file = s->beside;
        t = spurion_safetensors_find(s->beside, name);
    }
    return t;
}

int spurion_shards_count(const spurion_shards *s)
{
    return s->file_count;
}

const spurion_safetensors *spurion_shards_at(const spurion_shards *s, int i)
{
    return s->files[i];
}

/* Memory, pre-check and packing that every message shares. Thread: any. Memory: the caller's spurion_memory only. */
#include "wire.h"

#include <string.h>

#define BLOCK_BYTES_FIRST 4096
#define BLOCK_BYTES_MAX (256u << 10)

void wire_init(wire *w, const spurion_memory *m)
{
    memset(w, 0, sizeof *w);
    w->m = m;
    w->block_bytes = BLOCK_BYTES_FIRST;
}

/* bytes plus a NUL, from the current block or a new one. */
static void *bump(wire *w, size_t bytes)
{
    size_t need;
    void *p;

    if (bytes > SPURION_DECODE_BYTES_MAX || w->used + bytes > SPURION_DECODE_BYTES_MAX) {
        w->failed = true;
        return NULL;
    }
    need = (bytes + 1 + 15) & ~(size_t)15;
    if (need > w->left) {
        size_t block = need > w->block_bytes / 4 ? need : w->block_bytes;
        char *fresh = w->m->take(w->m->context, block);
        if (fresh == NULL) {
            w->failed = true;
            return NULL;
        }
        w->used += need;
        if (block == need) { /* a large piece of its own; the current block goes on */
            fresh[bytes] = '\0';
            return fresh;
        }
        w->block = fresh;
        w->left = block;
        if (w->block_bytes < BLOCK_BYTES_MAX) {
            w->block_bytes *= 2;
        }
    } else {
        w->used += need;
    }
    p = w->block;
    w->block += need;
    w->left -= need;
    ((char *)p)[bytes] = '\0';
    return p;
}

void *wire_take(wire *w, size_t count, size_t size)
{
    size_t bytes;
    void *p;

    if (__builtin_mul_overflow(count, size, &bytes)) {
        w->failed = true;
        return NULL;
    }
    p = bump(w, bytes);
    if (p != NULL) {
        memset(p, 0, bytes);
    }
    return p;
}

static void *allocator_alloc(void *context, size_t bytes)
{
    return bump(context, bytes);
}

static void allocator_free(void *context, void *p)
{
    (void)context;
    (void)p;
}

spurion_status wire_no_memory(const wire *w)
{
    if (w->used >= SPURION_DECODE_BYTES_MAX / 2) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "message: expected at most %u bytes when unpacked, found more",
                             SPURION_DECODE_BYTES_MAX);
    }
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "message: no memory for it within the limit of this request");
}

/* ---- pre-check: what protobuf-c 1.4.1 does not limit (depth, fields) is checked on the bytes before it sees them ---- */

typedef struct cursor {
    const uint8_t *at, *end;
} cursor;

static bool varint(uint64_t *out, cursor *c)
{
    uint64_t v = 0;
    for (int shift = 0; shift < 70; shift += 7) {
        if (c->at == c->end) {
            return false;
        }
        uint8_t byte = *c->at++;
        v |= shift < 64 ? (uint64_t)(byte & 0x7f) << shift : 0;
        if ((byte & 0x80) == 0) {
            *out = v;
            return true;
        }
    }
    return false;
}

/* Steps over one value; for a length-delimited one, *inner is its content. */
static bool skip(cursor *inner, cursor *c, unsigned wire_type)
{
    uint64_t n = 0;
    switch (wire_type) {
    case 0:
        return varint(&n, c);
    case 1:
        n = 8;
        break;
    case 5:
        n = 4;
        break;
    case 2:
        if (!varint(&n, c)) {
            return false;
        }
        break;
    default: /* groups: not spoken here */
        return false;
    }
    if (n > (uint64_t)(c->end - c->at)) {
        return false;
    }
    inner->at = c->at;
    inner->end = c->at + n;
    c->at += n;
    return true;
}

/* Whether a packed list of 32-bit words has a length that no such list has. */
static bool broken_words(const ProtobufCFieldDescriptor *f, cursor c)
{
    bool words = f->type == PROTOBUF_C_TYPE_SFIXED32 || f->type == PROTOBUF_C_TYPE_FIXED32 || f->type == PROTOBUF_C_TYPE_FLOAT;
    return words && (c.end - c.at) % 4 != 0;
}

/* A list of the singular sub-messages seen in one message would be needed to refuse a second one; their numbers are below 64. */
static spurion_status check_bytes(size_t *fields, cursor c, const ProtobufCMessageDescriptor *d, int depth)
{
    const char *name = d->short_name;
    uint64_t singular_seen = 0;

    if (depth > SPURION_MESSAGE_DEPTH_MAX) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: expected nesting of at most %d, found more", name,
                             SPURION_MESSAGE_DEPTH_MAX);
    }
    while (c.at < c.end) {
        const ProtobufCFieldDescriptor *f;
        cursor inner = {NULL, NULL};
        uint64_t key;

        if (++*fields > SPURION_MESSAGE_FIELDS_MAX) {
            return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: expected at most %d fields in a message, found more", name,
                                 SPURION_MESSAGE_FIELDS_MAX);
        }
        if (!varint(&key, &c) || (key >> 3) == 0 || (key >> 3) > 0x1fffffff || !skip(&inner, &c, (unsigned)(key & 7))) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a protobuf message, found broken bytes", name);
        }
        f = protobuf_c_message_descriptor_get_field(d, (unsigned)(key >> 3));
        if (f != NULL && (key & 7) == 2 && broken_words(f, inner)) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s.%s: expected a multiple of 4 bytes, found %zu", name, f->name,
                                 (size_t)(inner.end - inner.at));
        }
        if (f == NULL || f->type != PROTOBUF_C_TYPE_MESSAGE) {
            continue;
        }
        if ((key & 7) != 2) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s.%s: expected a message, found wire type %u", name, f->name,
                                 (unsigned)(key & 7));
        }
        if (f->label != PROTOBUF_C_LABEL_REPEATED && (key >> 3) < 64) {
            if (singular_seen & (UINT64_C(1) << (key >> 3))) { /* protobuf-c would merge the two: more code than it is worth */
                return spurion_error(SPURION_INVALID_ARGUMENT, "%s.%s: expected one, found a second", name, f->name);
            }
            singular_seen |= UINT64_C(1) << (key >> 3);
        }
        spurion_status st = check_bytes(fields, inner, f->descriptor, depth + 1);
        if (st.code != SPURION_OK) {
            return st;
        }
    }
    return spurion_ok();
}

spurion_status wire_unpack(ProtobufCMessage **out, wire *w, const ProtobufCMessageDescriptor *descriptor, spurion_bytes in)
{
    static const uint8_t nothing[1];
    ProtobufCAllocator allocator = {allocator_alloc, allocator_free, w};
    cursor c = {nothing, nothing};
    size_t fields = 0;
    spurion_status st;

    *out = NULL;
    if (in.size > SPURION_FRAME_BYTES_MAX) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: expected at most %u bytes, found %zu", descriptor->short_name,
                             SPURION_FRAME_BYTES_MAX, in.size);
    }
    if (in.size != 0) {
        c.at = (const uint8_t *)in.data;
        c.end = c.at + in.size;
    }
    SPURION_TRY(st, check_bytes(&fields, c, descriptor, 1));
    *out = protobuf_c_message_unpack(descriptor, &allocator, in.size, in.size != 0 ? (const uint8_t *)in.data : nothing);
    if (*out == NULL) {
        st = w->failed ? wire_no_memory(w)
                       : spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a protobuf message, found a field of another type",
                                       descriptor->short_name);
    }
out:
    return st;
}

spurion_status wire_pack(spurion_bytes *out, wire *w, const ProtobufCMessage *message)
{
    size_t bytes;
    uint8_t *data;

    out->data = NULL;
    out->size = 0;
    if (w->failed) {
        return wire_no_memory(w);
    }
    bytes = protobuf_c_message_get_packed_size(message);
    if (bytes > SPURION_FRAME_BYTES_MAX) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: expected at most %u bytes packed, found %zu",
                             message->descriptor->short_name, SPURION_FRAME_BYTES_MAX, bytes);
    }
    data = bump(w, bytes);
    if (data == NULL) {
        return wire_no_memory(w);
    }
    out->data = (const char *)data;
    out->size = protobuf_c_message_pack(message, data);
    return spurion_ok();
}

spurion_bytes *wire_get_list(wire *w, const ProtobufCBinaryData *list, size_t n)
{
    spurion_bytes *out = WIRE_NEW(w, spurion_bytes, n);
    for (size_t i = 0; out != NULL && i < n; i++) {
        out[i] = wire_bytes(true, list[i]);
    }
    return out;
}

ProtobufCBinaryData *wire_set_list(wire *w, const spurion_bytes *list, size_t n)
{
    ProtobufCBinaryData *out = WIRE_NEW(w, ProtobufCBinaryData, n);
    for (size_t i = 0; out != NULL && i < n; i++) {
        out[i] = wire_bin(list[i]);
    }
    return out;
}

spurion_status wire_same(const char *field, size_t found, size_t want)
{
    if (found != want) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected %zu entries as in its parallel arrays, found %zu", field, want, found);
    }
    return spurion_ok();
}

spurion_status wire_at_most(const char *field, size_t found, size_t max)
{
    if (found > max) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: expected at most %zu entries, found %zu", field, max, found);
    }
    return spurion_ok();
}

spurion_status wire_optional_name(spurion_bytes name, const char *what)
{
    return name.data == NULL ? spurion_ok() : spurion_name_check(name, what);
}

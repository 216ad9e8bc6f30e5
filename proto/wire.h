/* Private to proto/: memory of one encode or decode, and the steps that every message shares. The generated protobuf-c header is
 * included here and nowhere else. */
#ifndef SPURION_PROTO_WIRE_H
#define SPURION_PROTO_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "spurion.pb-c.h"
#include "spurion/codec.h"

/* Bumps through blocks of m; counts against SPURION_DECODE_BYTES_MAX. Lives on the stack of one encoder or decoder. */
typedef struct wire {
    const spurion_memory *m;
    char *block;
    size_t left, used, block_bytes;
    bool failed;                 /* an allocation was refused */
} wire;

void wire_init(wire *w, const spurion_memory *m);
/* Gives zeroed memory, aligned to 16, with a NUL behind it; NULL and w->failed when the budget or m has no more. */
void *wire_take(wire *w, size_t count, size_t size);
#define WIRE_NEW(w, type, count) ((type *)wire_take((w), (size_t)(count), sizeof(type)))

/* Pre-checks the bytes against the descriptor (depth, fields, wire types) and unpacks. */
spurion_status wire_unpack(ProtobufCMessage **out, wire *w, const ProtobufCMessageDescriptor *descriptor, spurion_bytes in) SPURION_MUST_USE;
spurion_status wire_pack(spurion_bytes *out, wire *w, const ProtobufCMessage *message) SPURION_MUST_USE;
spurion_status wire_no_memory(const wire *w) SPURION_MUST_USE;

static inline ProtobufCBinaryData wire_bin(spurion_bytes b)
{
    ProtobufCBinaryData d;
    d.len = b.size;
    d.data = (uint8_t *)b.data;
    return d;
}

/* The decoded bytes of a field; absent when has is false, "" and not NULL when present and empty. */
static inline spurion_bytes wire_bytes(bool has, ProtobufCBinaryData d)
{
    spurion_bytes b = {NULL, 0};
    if (has) {
        b.data = d.len != 0 ? (const char *)d.data : "";
        b.size = d.len;
    }
    return b;
}

/* Sets an optional bytes field of a generated struct from bytes. */
#define WIRE_SET_BYTES(message, field, bytes)               \
    do {                                                    \
        (message)->has_##field = (bytes).data != NULL;      \
        (message)->field = wire_bin(bytes);                 \
    } while (0)
#define WIRE_SET(message, field, value) \
    do {                                \
        (message)->has_##field = 1;     \
        (message)->field = (value);     \
    } while (0)
#define WIRE_GET_BYTES(message, field) wire_bytes((message)->has_##field != 0, (message)->field)

/* repeated bytes <-> arrays; NULL where n is 0 or w failed. */
spurion_bytes *wire_get_list(wire *w, const ProtobufCBinaryData *list, size_t n);
ProtobufCBinaryData *wire_set_list(wire *w, const spurion_bytes *list, size_t n);

/* INVALID_ARGUMENT "<field>: expected <want> entries, found <found>" unless equal. */
spurion_status wire_same(const char *field, size_t found, size_t want) SPURION_MUST_USE;
spurion_status wire_at_most(const char *field, size_t found, size_t max) SPURION_MUST_USE;
/* OK when absent, else as spurion_name_check. */
spurion_status wire_optional_name(spurion_bytes name, const char *what) SPURION_MUST_USE;

static inline spurion_opt_float wire_from_nan(float v)
{
    spurion_opt_float o = {v == v, v == v ? v : 0.0f};
    return o;
}

static inline float wire_to_nan(spurion_opt_float o)
{
    return o.has ? o.value : __builtin_nanf("");
}

/* Parts that several messages hold (codec_rollout.c). */
spurion_status wire_rollout_pack(Spurion__V1__Rollout **out, wire *w, const spurion_rollout *in) SPURION_MUST_USE;
/* INVALID_ARGUMENT where a list of ids comes in two forms; everything else stands in out then as well. */
spurion_status wire_rollout_unpack(spurion_rollout *out, const Spurion__V1__Rollout *in) SPURION_MUST_USE;

#endif

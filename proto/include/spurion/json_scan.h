/* Reads JSON text in place: checks it whole, then walks the members of an object or the items of an array without a tree.
 * Used for rollout lines, where a tree library would refuse too much at once (a lone surrogate in one field is that field's
 * fault, not the line's) and would take tens of bytes for every token id. RFC 8259, UTF-8, one value; duplicate members: the last counts.
 * Thread: any. Memory: none of its own; decoded strings in the caller's. */
#ifndef SPURION_JSON_SCAN_H
#define SPURION_JSON_SCAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "spurion/codec.h"
#include "spurion/rollout.h"
#include "spurion/status.h"

#ifdef __cplusplus
extern "C" {
#ifdef __cplusplus
}
#endif

#endif

#define SPURION_SCAN_DEPTH_MAX 128 /* nesting of one line */

typedef enum spurion_json_kind {
    SPURION_JSON_NONE, /* no such member */
    SPURION_JSON_NULL,
    SPURION_JSON_BOOL,
    SPURION_JSON_NUMBER,
    SPURION_JSON_STRING,
    SPURION_JSON_ARRAY,
    SPURION_JSON_OBJECT
} spurion_json_kind;

/* A value: its text, borrowed. */
typedef struct spurion_json_value {
    spurion_json_kind kind;
    const char *data;
    size_t size;
} spurion_json_value;

/* A walk over the items of an array or the members of an object that spurion_json_check passed. */
typedef struct spurion_json_walk {
    const char *at, *end;
} spurion_json_walk;

/* "a string", "an array", ... */
const char *spurion_json_kind_name(spurion_json_kind kind);

/* Checks that text is UTF-8 and exactly one JSON value. INVALID_ARGUMENT names the byte, counted from 0. */
spurion_status spurion_json_check(spurion_json_value *out, const char *text, size_t size) SPURION_MUST_USE;

spurion_json_walk spurion_json_enter(spurion_json_value container);
/* The next item; false at the end. key: the member's name as it stands, with its quotes; NULL for arrays. */
bool spurion_json_next(spurion_json_walk *walk, spurion_json_value *key, spurion_json_value *value);

/* Decodes a string into m. INVALID_ARGUMENT for a lone surrogate, RESOURCE_EXHAUSTED for want of memory. */
spurion_status spurion_json_string(spurion_bytes *out, const spurion_memory *m, spurion_json_value value) SPURION_MUST_USE;
/* True when the string, decoded, equals the ASCII word. */
bool spurion_json_is(spurion_json_value string, const char *word);
/* The whole number that stands there; false when it is none (a fraction, an exponent) or does not fit. */
bool spurion_json_int(int64_t *out, spurion_json_value value);
bool spurion_json_double(double *out, spurion_json_value value);

#ifdef __cplusplus
}
#endif

#endif

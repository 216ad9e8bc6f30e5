/* JSON files and typed getters whose errors name the file, the key, what was expected and what was found.
 * Thread: one. Memory: a jansson value that the caller drops with json_decref; the text is capped before it is read. */
#ifndef SPURION_BASE_JSON_H
#define SPURION_BASE_JSON_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "spurion/status.h"

#define SPURION_JSON_CONFIG_BYTES_MAX (4u << 20) /* a config.json or cfg.json */
#define SPURION_JSON_INDEX_BYTES_MAX (16u << 20) /* a shard index */
#define SPURION_JSON_DEPTH_MAX 64
/* An empty list takes 3 bytes of text and some 150 of memory: a file may hold this many lists and objects, and one more for every 6 bytes. */
#define SPURION_JSON_NESTED_MAX 1024

/* Reads a regular file of at most bytes_max bytes. Gives its bytes and a NUL after them; the caller frees.
 * NOT_FOUND when it does not exist, INVALID_ARGUMENT when it is no regular file, RESOURCE_EXHAUSTED when it is larger. */
spurion_status spurion_file_read(char **out, size_t *bytes, const char *path, size_t bytes_max) SPURION_MUST_USE;

/* INVALID_ARGUMENT for a text that nests deeper than SPURION_JSON_DEPTH_MAX or holds too many lists and objects: before it is parsed, so that
 * parsing takes at most some 40 times its bytes. */
spurion_status spurion_json_shape_check(const char *text, size_t bytes, const char *name) SPURION_MUST_USE;
/* Gives the value of a JSON text: UTF-8, no duplicate keys, of a shape as above. name stands in the errors. */
spurion_status spurion_json_parse(json_t **out, const char *text, size_t bytes, const char *name) SPURION_MUST_USE;
spurion_status spurion_json_read(json_t **out, const char *path, size_t bytes_max) SPURION_MUST_USE;

/* An object under reading and the name by which errors speak of it. Borrows both. */
typedef struct spurion_json_at {
    const json_t *object;
    const char *name;
} spurion_json_at;

/* `keys` below holds spellings of one key, separated by '|'; the first that is there and not null counts. */

/* The value, or NULL when it is absent or null. Borrowed from the object. */
const json_t *spurion_json_find(spurion_json_at at, const char *keys);

/* need_*: INVALID_ARGUMENT when absent. opt_*: leaves *out as it is when absent or null. Both refuse another type or range. */
spurion_status spurion_json_need_int(int *out, spurion_json_at at, const char *keys, int min, int max) SPURION_MUST_USE;
spurion_status spurion_json_opt_int(int *out, spurion_json_at at, const char *keys, int min, int max) SPURION_MUST_USE;
/* Finite numbers; integers are taken too. */
spurion_status spurion_json_opt_double(double *out, spurion_json_at at, const char *keys, double min, double max) SPURION_MUST_USE;
spurion_status spurion_json_opt_bool(bool *out, spurion_json_at at, const char *keys) SPURION_MUST_USE;
/* Borrowed from the object. */
spurion_status spurion_json_opt_string(const char **out, spurion_json_at at, const char *keys) SPURION_MUST_USE;
spurion_status spurion_json_opt_object(const json_t **out, spurion_json_at at, const char *keys) SPURION_MUST_USE;

/* INVALID_ARGUMENT "NAME: KEYS: expected WHAT, found VALUE"; value NULL: "nothing". */
spurion_status spurion_json_error(spurion_json_at at, const char *keys, const char *expected, const json_t *value);
/* Refuses a value that is well formed and means something we do not read: UNIMPLEMENTED, with both sides. */
spurion_status spurion_json_unsupported(spurion_json_at at, const char *key, const char *expected, const char *found);

/* The last part of a path, for messages that must leave room for their end. */
const char *spurion_path_tail(const char *path);
/* Writes dir/name. INVALID_ARGUMENT when it does not fit. */
spurion_status spurion_path_join(char *out, size_t bytes, const char *dir, const char *name) SPURION_MUST_USE;

#endif

/* JSON files and typed getters. Thread: one. Memory: capped by the file's own size. */
#include "daemon/base/json.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PATH_SHOWN 180

const char *spurion_path_tail(const char *path)
{
    size_t n = strlen(path);

    return n > PATH_SHOWN ? path + n - PATH_SHOWN : path;
}

spurion_status spurion_path_join(char *out, size_t bytes, const char *dir, const char *name)
{
    int n = snprintf(out, bytes, "%s/%s", dir, name);

    if (n < 0 || (size_t)n >= bytes) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "path too long: expected at most %zu bytes, found %d in %s", bytes - 1, n,
                             spurion_path_tail(dir));
    }
    return spurion_ok();
}

static spurion_status file_open(int *fd, size_t *size, const char *path, size_t bytes_max)
{
    struct stat info;

    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (*fd < 0) {
        return spurion_error(errno == ENOENT || errno == ENOTDIR ? SPURION_NOT_FOUND : SPURION_FAILED_PRECONDITION,
                             "%s: expected a readable file, found: %s", spurion_path_tail(path), strerror(errno));
    }
    if (fstat(*fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a regular file, found something else", spurion_path_tail(path));
    }
    if (info.st_size < 0 || (uint64_t)info.st_size > bytes_max) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: expected at most %zu bytes, found %lld", spurion_path_tail(path),
                             bytes_max, (long long)info.st_size);
    }
    *size = (size_t)info.st_size;
    return spurion_ok();
}

spurion_status spurion_file_read(char **out, size_t *bytes, const char *path, size_t bytes_max)
{
    spurion_status st;
    int fd = -1;
    size_t size = 0, got = 0;
    char *data = NULL;

    *out = NULL;
    *bytes = 0;
    SPURION_TRY(st, file_open(&fd, &size, path, bytes_max));
    data = malloc(size + 1);
    if (data == NULL) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: no memory for %zu bytes", spurion_path_tail(path), size);
        goto out;
    }
    while (got < size) {
        ssize_t n = read(fd, data + got, size - got);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            st = spurion_error(SPURION_DATA_LOSS, "%s: expected %zu bytes, found %zu", spurion_path_tail(path), size, got);
            goto out;
        }
        got += (size_t)n;
    }
    data[size] = '\0';
    *out = data;
    *bytes = size;
    data = NULL;
out:
    free(data);
    if (fd >= 0) {
        close(fd);
    }
    return st;
}

/* jansson recurses to 2048 levels; our files need few, and the stack of a thread may be small. */
spurion_status spurion_json_shape_check(const char *text, size_t bytes, const char *name)
{
    const size_t nested_max = SPURION_JSON_NESTED_MAX + bytes / 6;
    size_t nested = 0;
    int depth = 0;
    bool quoted = false;

    for (size_t i = 0; i < bytes; i++) {
        char c = text[i];

        if (quoted) {
            i += c == '\\';
            quoted = c != '"';
        } else if (c == '"') {
            quoted = true;
        } else if (c == '{' || c == '[') {
            if (++depth > SPURION_JSON_DEPTH_MAX) {
                return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected at most %d nested levels, found more",
                                     spurion_path_tail(name), SPURION_JSON_DEPTH_MAX);
            }
            if (++nested > nested_max) {
                return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected at most %zu lists and objects in %zu bytes, found more: this is no file of "
                                     "that kind", spurion_path_tail(name), nested_max, bytes);
            }
        } else if (c == '}' || c == ']') {
            depth--;
        }
    }
    return spurion_ok();
}

spurion_status spurion_json_parse(json_t **out, const char *text, size_t bytes, const char *name)
{
    spurion_status st;
    json_error_t error;

    *out = NULL;
    st = spurion_json_shape_check(text, bytes, name);
    if (st.code != SPURION_OK) {
        return st;
    }
    *out = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    if (*out == NULL) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected JSON, found a fault in line %d, column %d: %s",
                             spurion_path_tail(name), error.line, error.column, error.text);
    }
    return spurion_ok();
}

spurion_status spurion_json_read(json_t **out, const char *path, size_t bytes_max)
{
    spurion_status st;
    char *text = NULL;
    size_t bytes = 0;

    *out = NULL;
    SPURION_TRY(st, spurion_file_read(&text, &bytes, path, bytes_max));
    SPURION_TRY(st, spurion_json_parse(out, text, bytes, path));
out:
    free(text);
    return st;
}

const json_t *spurion_json_find(spurion_json_at at, const char *keys)
{
    while (*keys != '\0') {
        size_t n = strcspn(keys, "|");
        char key[64];

        if (n < sizeof key) {
            const json_t *value;

            memcpy(key, keys, n);
            key[n] = '\0';
            value = json_object_get(at.object, key);
            if (value != NULL && !json_is_null(value)) {
                return value;
            }
        }
        keys += n + (keys[n] == '|');
    }
    return NULL;
}

static void describe(char *out, size_t bytes, const json_t *value)
{
    if (value == NULL) {
        snprintf(out, bytes, "nothing");
    } else if (json_is_object(value)) {
        snprintf(out, bytes, "an object");
    } else if (json_is_array(value)) {
        snprintf(out, bytes, "a list of %zu", json_array_size(value));
    } else if (json_is_string(value)) {
        snprintf(out, bytes, "\"%.80s\"", json_string_value(value));
    } else if (json_is_integer(value)) {
        snprintf(out, bytes, "%lld", (long long)json_integer_value(value));
    } else if (json_is_real(value)) {
        snprintf(out, bytes, "%.9g", json_real_value(value));
    } else {
        snprintf(out, bytes, "%s", json_is_true(value) ? "true" : json_is_false(value) ? "false" : "null");
    }
}

spurion_status spurion_json_error(spurion_json_at at, const char *keys, const char *expected, const json_t *value)
{
    char found[96];

    describe(found, sizeof found, value);
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s: %s: expected %s, found %s", spurion_path_tail(at.name), keys, expected, found);
}

spurion_status spurion_json_unsupported(spurion_json_at at, const char *key, const char *expected, const char *found)
{
    return spurion_error(SPURION_UNIMPLEMENTED, "%s: %s: expected %s, found \"%.60s\"", spurion_path_tail(at.name), key, expected, found);
}

spurion_status spurion_json_opt_int(int *out, spurion_json_at at, const char *keys, int min, int max)
{
    const json_t *value = spurion_json_find(at, keys);
    char expected[64];

    if (value == NULL) {
        return spurion_ok();
    }
    if (!json_is_integer(value) || json_integer_value(value) < min || json_integer_value(value) > max) {
        snprintf(expected, sizeof expected, "an integer from %d to %d", min, max);
        return spurion_json_error(at, keys, expected, value);
    }
    *out = (int)json_integer_value(value);
    return spurion_ok();
}

spurion_status spurion_json_need_int(int *out, spurion_json_at at, const char *keys, int min, int max)
{
    char expected[64];

    if (spurion_json_find(at, keys) == NULL) {
        snprintf(expected, sizeof expected, "an integer from %d to %d", min, max);
        return spurion_json_error(at, keys, expected, NULL);
    }
    return spurion_json_opt_int(out, at, keys, min, max);
}

spurion_status spurion_json_opt_double(double *out, spurion_json_at at, const char *keys, double min, double max)
{
    const json_t *value = spurion_json_find(at, keys);
    double number;
    char expected[64];

    if (value == NULL) {
        return spurion_ok();
    }
    number = json_number_value(value);
    if (!json_is_number(value) || !isfinite(number) || number < min || number > max) {
        snprintf(expected, sizeof expected, "a number from %g to %g", min, max);
        return spurion_json_error(at, keys, expected, value);
    }
    *out = number;
    return spurion_ok();
}

spurion_status spurion_json_opt_bool(bool *out, spurion_json_at at, const char *keys)
{
    const json_t *value = spurion_json_find(at, keys);

    if (value == NULL) {
        return spurion_ok();
    }
    if (!json_is_boolean(value)) {
        return spurion_json_error(at, keys, "true or false", value);
    }
    *out = json_is_true(value);
    return spurion_ok();
}

spurion_status spurion_json_opt_string(const char **out, spurion_json_at at, const char *keys)
{
    const json_t *value = spurion_json_find(at, keys);

    if (value == NULL) {
        return spurion_ok();
    }
    if (!json_is_string(value)) {
        return spurion_json_error(at, keys, "a string", value);
    }
    *out = json_string_value(value);
    return spurion_ok();
}

spurion_status spurion_json_opt_object(const json_t **out, spurion_json_at at, const char *keys)
{
    const json_t *value = spurion_json_find(at, keys);

    if (value == NULL) {
        return spurion_ok();
    }
    if (!json_is_object(value)) {
        return spurion_json_error(at, keys, "an object", value);
    }
    *out = value;
    return spurion_ok();
}

/* Lines of labels; see label.h. */
#include "spurion/label.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "spurion/json.h"
#include "spurion/json_scan.h"

/* Members of a line under any of the names in use. */
typedef struct members {
    spurion_json_value sae_sha256, index, description, type, model, score, model_id, layer, source;
} members;

static const struct {
    const char *name;
    size_t place;
} names[] = {
    {"sae_sha256", offsetof(members, sae_sha256)},   {"index", offsetof(members, index)},
    {"feature", offsetof(members, index)},           {"latent", offsetof(members, index)},
    {"feature_index", offsetof(members, index)},     {"description", offsetof(members, description)},
    {"label", offsetof(members, description)},       {"explanation", offsetof(members, description)},
    {"typeName", offsetof(members, type)},           {"type", offsetof(members, type)},
    {"explanationModelName", offsetof(members, model)}, {"model", offsetof(members, model)},
    {"score", offsetof(members, score)},             {"modelId", offsetof(members, model_id)},
    {"layer", offsetof(members, layer)},             {"source", offsetof(members, source)},
};

static spurion_status wrong(const char *key, const char *expected, spurion_json_value found)
{
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected %s, found %.*s", key, expected, found.size > 60 ? 60 : (int)found.size,
                         found.data ? found.data : spurion_json_kind_name(found.kind));
}

static bool there(spurion_json_value value)
{
    return value.kind != SPURION_JSON_NONE && value.kind != SPURION_JSON_NULL;
}

bool spurion_checksum_valid(spurion_bytes text)
{
    if (text.size != SPURION_CHECKSUM_CHARACTERS) {
        return false;
    }
    for (size_t i = 0; i < text.size; i++) {
        if (!((text.data[i] >= '0' && text.data[i] <= '9') || (text.data[i] >= 'a' && text.data[i] <= 'f'))) {
            return false;
        }
    }
    return true;
}

/* Numbers, and Neuronpedia's numbers in strings. */
static spurion_status read_index(int32_t *out, spurion_json_value value)
{
    int64_t n = -1;

    if (value.kind == SPURION_JSON_STRING && value.size > 2 && value.size <= 12) {
        spurion_json_value inner = {SPURION_JSON_NUMBER, value.data + 1, value.size - 2};
        n = strspn(inner.data, "0123456789") == inner.size && spurion_json_int(&n, inner) ? n : -1;
    } else if (value.kind == SPURION_JSON_NUMBER && !spurion_json_int(&n, value)) {
        n = -1;
    }
    if (n < 0 || n > INT32_MAX) {
        return wrong("index", "a whole number from 0", value);
    }
    *out = (int32_t)n;
    return spurion_ok();
}

/* Control characters (and Neuronpedia's NULs) become spaces, ends are trimmed, what is too long is cut before a character. */
static spurion_bytes one_line(spurion_bytes text, size_t most)
{
    char *data = (char *)(uintptr_t)text.data; /* in the caller's memory, decoded for us */

    for (size_t i = 0; i < text.size; i++) {
        if ((unsigned char)data[i] < 0x20 || data[i] == 0x7f) {
            data[i] = ' ';
        }
    }
    while (text.size > 0 && *text.data == ' ') {
        text.data++;
        text.size--;
    }
    if (text.size > most) {
        text.size = most;
        while (text.size > 0 && ((unsigned char)text.data[text.size] & 0xc0) == 0x80) {
            text.size--;
        }
    }
    while (text.size > 0 && text.data[text.size - 1] == ' ') {
        text.size--;
    }
    return text;
}

static spurion_status read_text(spurion_bytes *out, const spurion_memory *m, const char *key, spurion_json_value value, size_t most)
{
    spurion_status st = spurion_ok();

    *out = (spurion_bytes){NULL, 0};
    if (!there(value)) {
        return st;
    }
    if (value.kind != SPURION_JSON_STRING) {
        return wrong(key, "a string", value);
    }
    SPURION_TRY(st, spurion_json_string(out, m, value));
    *out = one_line(*out, most);
out:
    return st;
}

/* "modelId/layer", or what the line calls its source. */
static spurion_status read_source(spurion_label *l, const spurion_memory *m, const members *v)
{
    spurion_status st;
    spurion_bytes model, layer;
    char *text;

    SPURION_TRY(st, read_text(&l->source, m, "source", v->source, 256));
    SPURION_TRY(st, read_text(&model, m, "modelId", v->model_id, 128));
    if (v->model_id.kind != SPURION_JSON_STRING || v->layer.kind != SPURION_JSON_STRING) {
        goto out;
    }
    SPURION_TRY(st, read_text(&layer, m, "layer", v->layer, 127));
    text = m->take(m->context, model.size + layer.size + 2);
    if (text == NULL) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a label");
        goto out;
    }
    memcpy(text, model.data, model.size);
    text[model.size] = '/';
    memcpy(text + model.size + 1, layer.data, layer.size);
    text[model.size + layer.size + 1] = '\0';
    l->source = (spurion_bytes){text, model.size + layer.size + 1};
out:
    return st;
}

static spurion_status read_members(members *out, const char *line, size_t size)
{
    spurion_status st;
    spurion_json_value object, key, value;
    spurion_json_walk walk;

    memset(out, 0, sizeof *out);
    SPURION_TRY(st, spurion_json_check(&object, line, size));
    if (object.kind != SPURION_JSON_OBJECT) {
        st = wrong("line", "a JSON object", object);
        goto out;
    }
    walk = spurion_json_enter(object);
    while (spurion_json_next(&walk, &key, &value)) {
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
            spurion_json_value *place = (spurion_json_value *)(void *)((char *)out + names[i].place);

            if (there(value) && spurion_json_is(key, names[i].name)) {
                *place = value;
            }
        }
    }
out:
    return st;
}

spurion_status spurion_label_read(spurion_label *out, bool *found, const spurion_memory *m, const char *line, size_t size)
{
    spurion_status st;
    members v;

    memset(out, 0, sizeof *out);
    *found = false;
    SPURION_TRY(st, read_members(&v, line, size));
    if (!there(v.description)) { /* a Neuronpedia feature, activation or source line */
        goto out;
    }
    SPURION_TRY(st, read_index(&out->index, v.index));
    SPURION_TRY(st, read_text(&out->description, m, "description", v.description, SPURION_LABEL_BYTES_MAX));
    SPURION_TRY(st, read_text(&out->type, m, "type", v.type, 128));
    SPURION_TRY(st, read_text(&out->model, m, "model", v.model, 128));
    SPURION_TRY(st, read_source(out, m, &v));
    SPURION_TRY(st, read_text(&out->sae_sha256, m, "sae_sha256", v.sae_sha256, SPURION_CHECKSUM_CHARACTERS + 1));
    if (out->sae_sha256.data != NULL && !spurion_checksum_valid(out->sae_sha256)) {
        st = wrong("sae_sha256", "64 lower-case hexadecimal digits", v.sae_sha256);
        goto out;
    }
    out->has_score = v.score.kind == SPURION_JSON_NUMBER && spurion_json_double(&out->score, v.score) && isfinite(out->score);
    *found = out->description.size > 0;
out:
    return st;
}

spurion_status spurion_label_read_delphi(spurion_label *out, bool *found, const spurion_memory *m, const char *file_name, const char *text,
                                         size_t size)
{
    spurion_status st;
    spurion_json_value value;
    const char *latent = NULL;
    char *end, *source;
    long index;

    memset(out, 0, sizeof *out);
    *found = false;
    for (const char *at = strstr(file_name, "_latent"); at != NULL; at = strstr(at + 1, "_latent")) {
        latent = at;
    }
    index = latent != NULL ? strtol(latent + 7, &end, 10) : -1;
    if (latent == NULL || latent[7] < '0' || latent[7] > '9' || strcmp(end, ".txt") != 0 || index < 0 || index > INT32_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "expected a file name MODULE_latentN.txt, found %.100s", file_name);
    }
    SPURION_TRY(st, spurion_json_check(&value, text, size));
    SPURION_TRY(st, read_text(&out->description, m, "explanation", value, SPURION_LABEL_BYTES_MAX));
    if (spurion_utf8_valid_prefix(file_name, strlen(file_name)) != strlen(file_name)) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "expected a file name of UTF-8, found other bytes");
        goto out;
    }
    source = m->take(m->context, (size_t)(latent - file_name) + 1);
    if (source == NULL) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a label");
        goto out;
    }
    memcpy(source, file_name, (size_t)(latent - file_name));
    source[latent - file_name] = '\0';
    out->source = one_line((spurion_bytes){source, (size_t)(latent - file_name)}, 256);
    out->index = (int32_t)index;
    *found = out->description.size > 0;
out:
    return st;
}

static void put_text(spurion_text *out, const char *key, spurion_bytes text)
{
    if (text.data != NULL) {
        spurion_text_print(out, ",\"%s\":", key);
        spurion_json_put_string(out, text);
    }
}

void spurion_label_put(spurion_text *out, const spurion_label *l)
{
    spurion_text_print(out, "{\"sae_sha256\":");
    spurion_json_put_string(out, l->sae_sha256);
    spurion_text_print(out, ",\"index\":%d", l->index);
    put_text(out, "description", l->description);
    put_text(out, "type", l->type);
    put_text(out, "model", l->model);
    if (l->has_score) {
        spurion_text_print(out, ",\"score\":%.9g", l->score);
    }
    put_text(out, "source", l->source);
    spurion_text_add(out, "}", 1);
}

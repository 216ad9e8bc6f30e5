/* A temporary directory for tests that read checkpoints, and a writer of safetensors files, right and wrong. */
#ifndef SPURION_TESTS_CHECKPOINT_PLACE_H
#define SPURION_TESTS_CHECKPOINT_PLACE_H

#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/base/check.h"

typedef struct place {
    char dir[256];
} place;

static inline void place_make(place *p)
{
    const char *base = getenv("TMPDIR");

    snprintf(p->dir, sizeof p->dir, "%.200s/spurion-test-XXXXXX", base != NULL ? base : "/tmp");
    SPURION_ASSERT(mkdtemp(p->dir) != NULL);
}

static inline const char *place_path(char *out, const place *p, const char *name)
{
    snprintf(out, 512, "%s/%s", p->dir, name);
    return out;
}

static inline void place_write(const place *p, const char *name, const void *data, size_t bytes)
{
    char path[512];
    FILE *file = fopen(place_path(path, p, name), "wb");

    SPURION_ASSERT(file != NULL && fwrite(data, 1, bytes, file) == bytes && fclose(file) == 0);
}

static inline void place_text(const place *p, const char *name, const char *text)
{
    place_write(p, name, text, strlen(text));
}

static inline void place_remove(const place *p, const char *name)
{
    char path[512];

    SPURION_ASSERT(unlink(place_path(path, p, name)) == 0);
}

static inline void place_drop(place *p)
{
    DIR *dir = opendir(p->dir);
    struct dirent *entry;
    char path[512];

    while (dir != NULL && (entry = readdir(dir)) != NULL) {
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) {
            unlink(place_path(path, p, entry->d_name));
        }
    }
    if (dir != NULL) {
        closedir(dir);
    }
    rmdir(p->dir);
}

/* A safetensors file of f32 tensors under construction. */
typedef struct bundle {
    char header[1 << 16];
    float data[1 << 16];
    size_t count; /* floats */
} bundle;

static inline void bundle_start(bundle *b)
{
    memset(b, 0, sizeof *b);
    strcpy(b->header, "{");
}

/* Adds a tensor (columns 0: a vector) of values first, first + step, .. and gives them. */
static inline float *bundle_add(bundle *b, const char *name, int rows, int columns, float first, float step)
{
    size_t count = (size_t)rows * (size_t)(columns > 0 ? columns : 1), at = strlen(b->header);
    float *x = b->data + b->count;
    char shape[32];

    SPURION_ASSERT(b->count + count <= sizeof b->data / sizeof *b->data);
    snprintf(shape, sizeof shape, columns > 0 ? "%d,%d" : "%d", rows, columns);
    snprintf(b->header + at, sizeof b->header - at, "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
             at > 1 ? "," : "", name, shape, b->count * 4, (b->count + count) * 4);
    for (size_t i = 0; i < count; i++) {
        x[i] = first + step * (float)i;
    }
    b->count += count;
    return x;
}

/* Writes 8 length bytes, the header, and the data; cut: bytes left off the end. */
static inline void bundle_write(bundle *b, const place *p, const char *name, size_t cut)
{
    size_t n = strlen(b->header), bytes = 8 + n + 1 + b->count * 4;
    unsigned char *file = malloc(bytes);

    SPURION_ASSERT(file != NULL && cut <= bytes);
    for (int i = 0; i < 8; i++) {
        file[i] = (unsigned char)((uint64_t)(n + 1) >> (8 * i));
    }
    memcpy(file + 8, b->header, n);
    file[8 + n] = '}';
    memcpy(file + 9 + n, b->data, b->count * 4);
    place_write(p, name, file, bytes - cut);
    free(file);
}

#endif

/* Bump allocator; see arena.h. */
#include "daemon/base/arena.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK_BYTES ((size_t)256 << 10)
#define ALIGNMENT ((size_t)64)

struct spurion_arena_chunk {
    spurion_arena_chunk *next;
    size_t size, used;
    _Alignas(64) unsigned char data[];
};

void spurion_arena_init(spurion_arena *a, size_t bytes_max)
{
    a->head = NULL;
    a->bytes_max = bytes_max;
    a->bytes_used = 0;
}

void spurion_arena_fini(spurion_arena *a)
{
    spurion_arena_chunk *c = a->head;
    while (c) {
        spurion_arena_chunk *next = c->next;
        free(c);
        c = next;
    }
    a->head = NULL;
    a->bytes_used = 0;
}

void spurion_arena_reset(spurion_arena *a)
{
    spurion_arena_chunk *keep = a->head;
    while (keep && keep->next) { /* the oldest chunk is the standard one */
        spurion_arena_chunk *next = keep->next;
        free(keep);
        keep = next;
    }
    if (keep) {
        keep->used = 0;
    }
    a->head = keep;
    a->bytes_used = 0;
}

static spurion_arena_chunk *chunk_create(size_t bytes)
{
    size_t size = bytes > CHUNK_BYTES ? bytes : CHUNK_BYTES;
    size_t total = sizeof(spurion_arena_chunk) + size;
    spurion_arena_chunk *c = aligned_alloc(ALIGNMENT, (total + ALIGNMENT - 1) & ~(ALIGNMENT - 1));
    if (c) {
        c->size = size;
        c->used = 0;
        c->next = NULL;
    }
    return c;
}

void *spurion_arena_take(spurion_arena *a, size_t bytes)
{
    size_t need;
    void *p;

    if (bytes > SIZE_MAX / 2) {
        return NULL;
    }
    need = (bytes + ALIGNMENT - 1) & ~(ALIGNMENT - 1);
    if (need == 0) {
        need = ALIGNMENT;
    }
    if (a->bytes_max && (need > a->bytes_max || a->bytes_used > a->bytes_max - need)) {
        return NULL;
    }
    if (!a->head || a->head->size - a->head->used < need) {
        spurion_arena_chunk *c = chunk_create(need);
        if (!c) {
            return NULL;
        }
        c->next = a->head;
        a->head = c;
    }
    p = a->head->data + a->head->used;
    a->head->used += need;
    a->bytes_used += need;
    return memset(p, 0, need);
}

void *spurion_arena_take_array(spurion_arena *a, size_t count, size_t size)
{
    size_t bytes;
    return __builtin_mul_overflow(count, size, &bytes) ? NULL : spurion_arena_take(a, bytes);
}

char *spurion_arena_copy(spurion_arena *a, const char *data, size_t bytes)
{
    char *p = bytes == SIZE_MAX ? NULL : spurion_arena_take(a, bytes + 1);
    if (p && bytes) {
        memcpy(p, data, bytes);
    }
    return p;
}

char *spurion_arena_printf(spurion_arena *a, const char *format, ...)
{
    va_list args, again;
    int length;
    char *p = NULL;

    va_start(args, format);
    va_copy(again, args);
    length = vsnprintf(NULL, 0, format, args);
    if (length >= 0) {
        p = spurion_arena_take(a, (size_t)length + 1);
    }
    if (p) {
        (void)vsnprintf(p, (size_t)length + 1, format, again);
    }
    va_end(again);
    va_end(args);
    return p;
}

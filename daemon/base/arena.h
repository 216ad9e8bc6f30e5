/* Bump allocator: memory of one request or one load, freed together. Thread: one owner at a time.
 * Memory: chunks from malloc, up to a budget; a reset keeps the first chunk. */
#ifndef SPURION_BASE_ARENA_H
#define SPURION_BASE_ARENA_H

#include <stddef.h>

typedef struct spurion_arena_chunk spurion_arena_chunk;

typedef struct spurion_arena {
    spurion_arena_chunk *head; /* newest chunk */
    size_t bytes_max;          /* budget, 0: none */
    size_t bytes_used;         /* given out since the last reset */
} spurion_arena;

void spurion_arena_init(spurion_arena *a, size_t bytes_max);
void spurion_arena_fini(spurion_arena *a);
void spurion_arena_reset(spurion_arena *a);

/* Gives bytes of zeroed memory, 64-byte aligned, alive until reset or fini; NULL when the budget or the system has no more. */
void *spurion_arena_take(spurion_arena *a, size_t bytes);
/* count x size with overflow check. */
void *spurion_arena_take_array(spurion_arena *a, size_t count, size_t size);
/* Copies bytes and adds a NUL. */
char *spurion_arena_copy(spurion_arena *a, const char *data, size_t bytes);
char *spurion_arena_printf(spurion_arena *a, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif

/* A set of byte strings that only grows: identities and groups that one judge input has shown. Exact: the bytes are kept.
 * Thread: one. Memory: one block of bytes and one table, doubled when full; about 16 bytes and the key for each entry. */
#ifndef SPURION_NAME_SET_H
#define SPURION_NAME_SET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct spurion_name_set {
    char *bytes;
    size_t size, capacity;
    size_t *table;         /* (slots) offset of the entry + 1, 0: free */
    size_t slots, count;
} spurion_name_set; /* zero it to begin */

void spurion_name_set_fini(spurion_name_set *s);
bool spurion_name_set_has(const spurion_name_set *s, const char *key, size_t size);
/* Adds key; adding what is there changes nothing. False when memory ran out. */
bool spurion_name_set_add(spurion_name_set *s, const char *key, size_t size);

#endif

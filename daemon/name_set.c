/* Open addressing over kept keys; see name_set.h. */
#include "daemon/name_set.h"

#include <stdlib.h>
#include <string.h>

/* FNV-1a, http://www.isthe.com/chongo/tech/comp/fnv/ */
static uint64_t hash(const char *key, size_t size)
{
    uint64_t h = 0xcbf29ce484222325u;

    for (size_t i = 0; i < size; i++) {
        h = (h ^ (unsigned char)key[i]) * 0x100000001b3u;
    }
    return h ^ h >> 32;
}

static size_t entry_size(const spurion_name_set *s, size_t slot)
{
    size_t size;
    memcpy(&size, s->bytes + s->table[slot] - 1, sizeof size);
    return size;
}

static const char *entry_key(const spurion_name_set *s, size_t slot)
{
    return s->bytes + s->table[slot] - 1 + sizeof(size_t);
}

/* The slot of key, or the free one where it would stand. slots > count. */
static size_t find(const spurion_name_set *s, const char *key, size_t size)
{
    size_t slot = hash(key, size) & (s->slots - 1);

    while (s->table[slot] && (entry_size(s, slot) != size || memcmp(entry_key(s, slot), key, size) != 0)) {
        slot = (slot + 1) & (s->slots - 1);
    }
    return slot;
}

void spurion_name_set_fini(spurion_name_set *s)
{
    if (s) {
        free(s->bytes);
        free(s->table);
        memset(s, 0, sizeof *s);
    }
}

bool spurion_name_set_has(const spurion_name_set *s, const char *key, size_t size)
{
    return s->slots && s->table[find(s, key, size)];
}

/* Doubles the table and puts every entry in again. */
static bool grow_table(spurion_name_set *s)
{
    spurion_name_set next = *s;

    next.slots = s->slots ? s->slots * 2 : 256;
    next.table = calloc(next.slots, sizeof *next.table);
    if (!next.table) {
        return false;
    }
    for (size_t i = 0; i < s->slots; i++) {
        if (s->table[i]) {
            next.table[find(&next, entry_key(s, i), entry_size(s, i))] = s->table[i];
        }
    }
    free(s->table);
    *s = next;
    return true;
}

static bool grow_bytes(spurion_name_set *s, size_t more)
{
    size_t capacity = s->capacity ? s->capacity : 4096;
    char *bytes;

    while (capacity - s->size < more) {
        capacity *= 2;
    }
    bytes = capacity == s->capacity ? s->bytes : realloc(s->bytes, capacity);
    if (bytes) {
        s->bytes = bytes;
        s->capacity = capacity;
    }
    return bytes != NULL;
}

bool spurion_name_set_add(spurion_name_set *s, const char *key, size_t size)
{
    size_t slot;

    if ((s->count + 1) * 4 > s->slots * 3 && !grow_table(s)) {
        return false;
    }
    slot = find(s, key, size);
    if (s->table[slot]) {
        return true;
    }
    if (!grow_bytes(s, sizeof size + size)) {
        return false;
    }
    memcpy(s->bytes + s->size, &size, sizeof size);
    memcpy(s->bytes + s->size + sizeof size, key, size);
    s->table[slot] = s->size + 1;
    s->size += sizeof size + size;
    s->count++;
    return true;
}

/* Sets of sequence numbers as ascending ranges that do not touch. Thread: the owner's. Memory: malloc; functions that grow a set
 * return false when there is none, and leave it as it was. */
#ifndef SPURION_INGEST_RANGES_H
#define SPURION_INGEST_RANGES_H

#include <stdbool.h>
#include <stdint.h>

#include "spurion/messages.h"

typedef struct spurion_ranges {
    spurion_range *ranges;
    int32_t count, room;
} spurion_ranges;

void spurion_ranges_init(spurion_ranges *s);
void spurion_ranges_fini(spurion_ranges *s);
bool spurion_ranges_copy(spurion_ranges *out, const spurion_ranges *in);

/* Adds first..last (1 <= first <= last). *fresh (may be NULL): something of it was new. */
bool spurion_ranges_add(bool *fresh, spurion_ranges *s, uint64_t first, uint64_t last);
void spurion_ranges_remove(spurion_ranges *s, uint64_t value);
/* Takes first..last out; never grows beyond one range more, for which there must be room or memory (else nothing is cut). */
void spurion_ranges_cut(spurion_ranges *s, uint64_t first, uint64_t last);
bool spurion_ranges_has(const spurion_ranges *s, uint64_t value);
/* Whether value extends a range instead of making one. */
bool spurion_ranges_touches(const spurion_ranges *s, uint64_t value);
/* Highest n with 1..n all in it; 0: 1 is not. */
uint64_t spurion_ranges_through(const spurion_ranges *s);
uint64_t spurion_ranges_last(const spurion_ranges *s);
uint64_t spurion_ranges_total(const spurion_ranges *s);

/* out := 1..last without s. */
bool spurion_ranges_missing(spurion_ranges *out, const spurion_ranges *s, uint64_t last);
/* out := a without b. */
bool spurion_ranges_difference(spurion_ranges *out, const spurion_ranges *a, const spurion_ranges *b);
/* Adds to both a and b those of first..last that are not in b. */
bool spurion_ranges_fill(spurion_ranges *a, spurion_ranges *b, uint64_t first, uint64_t last);

#endif

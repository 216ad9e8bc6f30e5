/* "Did you mean": the known word nearest to an unknown one. Pure. */
#ifndef SPURION_NEAREST_H
#define SPURION_NEAREST_H

#include <stddef.h>

/* The word of words (count) within edit distance 2 (1 for words under 5 bytes) of word, the nearest and first; NULL when none is. */
const char *spurion_nearest(const char *word, const char *const *words, int count);
/* Writes " (did you mean 'x'?)" for the nearest word, or an empty text. Returns out. */
const char *spurion_nearest_hint(char *out, size_t size, const char *word, const char *const *words, int count);

#endif

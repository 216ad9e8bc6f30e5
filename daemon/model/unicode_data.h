/* Tables of unicode_data.c that only unicode.c reads. */
#ifndef SPURION_MODEL_UNICODE_DATA_H
#define SPURION_MODEL_UNICODE_DATA_H

#include <stddef.h>
#include <stdint.h>

/* first, first + step, ... last become lower case by adding delta. */
typedef struct spurion_unicode_lower_run {
    uint32_t first, last;
    uint32_t step;
    int32_t delta;
} spurion_unicode_lower_run;

extern const spurion_unicode_lower_run spurion_unicode_lower_runs[]; /* ascending by last, disjoint */
extern const size_t spurion_unicode_lower_count;

#endif

/* What `spuriond check` finds about SAEs on a text. Thread: the engine's. */
#ifndef SPURION_CALIBRATE_H
#define SPURION_CALIBRATE_H

#include <stdbool.h>

#include "daemon/engine.h"

typedef struct spurion_calibration {
    int64_t tokens;     /* positions looked at: all but the first of each window */
    int64_t overflowed; /* of these, positions with more active features than a row holds */
    double l0;          /* mean number of f != 0 */
    double explained;   /* 1 - E|e|^2 / (E|x|^2 - |E x|^2), formats.md section 10 */
    bool has_explained; /* false: the stream does not vary, or some lists were cut */
} spurion_calibration;

/* Runs `text` (NULL: a built-in one of some 600 words) through the model in windows of at most 256 tokens, 32,768 tokens at most.
 * out (SAEs of the engine). INVALID_ARGUMENT when the text has fewer than two tokens. */
spurion_status spurion_calibrate(spurion_calibration *out, spurion_engine *e, const char *text, size_t bytes) SPURION_MUST_USE;
/* Whether the figures say that something does not fit, and what. */
bool spurion_calibration_warning(char *out, size_t bytes, const spurion_calibration *c);

#endif

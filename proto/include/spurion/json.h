/* JSON, the other form of the wire, for judge and the command line alike (docs/verdict.md sections 2 and 4): a line to a rollout, a verdict
 * to a line. Types, names and sizes of a rollout are checked here; what its texts or ids mean is the daemon's to say. Verdicts: field order
 * fixed, floats with the fewest of 6 to 9 digits that read back as the same float32, never NaN or infinity.
 * Thread: any; no state. Memory: rollouts in the caller's spurion_memory; a text grows, and the caller keeps and frees it. */
#ifndef SPURION_JSON_H
#define SPURION_JSON_H

#include <stdbool.h>
#include <stddef.h>

#include "spurion/codec.h"
#include "spurion/rollout.h"
#include "spurion/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The four names as they stand on the line, for echoing them in a refusal; data NULL: missing. */
typedef struct spurion_json_names {
    spurion_bytes run, step, group, id;
} spurion_json_names;

typedef enum spurion_json_line {
    SPURION_LINE_ROLLOUT,  /* a whole rollout */
    SPURION_LINE_REFUSED,  /* why says it; names, named and group_known say what was readable */
    SPURION_LINE_NO_OBJECT /* not a JSON object: no names */
} spurion_json_line;

/* What else there is to know of a line. */
typedef struct spurion_json_read {
    spurion_json_names names;
    bool group_known;     /* run, step and group could be read; then the rollout holds these three even when the line is refused */
    bool named;           /* the whole identity is valid */
    spurion_status why;   /* of a refusal */
} spurion_json_read;

/* Reads a line (size bytes, borrowed only for the call). run: the run of the rollout whatever the line says (borrowed by it), or NULL. */
spurion_json_line spurion_json_read_rollout(spurion_rollout *out, spurion_json_read *read, const spurion_memory *m, const spurion_bytes *run,
                                            const char *line, size_t size) SPURION_MUST_USE;

/* A growing text. Zero it to begin. `failed`: memory ran out; what is there is incomplete. */
typedef struct spurion_text {
    char *data;
    size_t size, capacity;
    bool failed;
} spurion_text;

void spurion_text_fini(spurion_text *t);
void spurion_text_add(spurion_text *t, const char *data, size_t size);
void spurion_text_print(spurion_text *t, const char *format, ...) SPURION_PRINTF(2, 3);

/* A JSON string with its quotes; what is no UTF-8 becomes U+FFFD. data NULL: null. */
void spurion_json_put_string(spurion_text *t, spurion_bytes text);
/* A float32; not finite: null. */
void spurion_json_put_float(spurion_text *t, float value);

/* Appends the verdict as one JSON object, without a line end. names: echoed as they stood on the line when a refused rollout's names
 * could not be read, or NULL. */
void spurion_json_verdict(spurion_text *out, const spurion_verdict *verdict, const spurion_json_names *names);

#ifdef __cplusplus
}
#endif

#endif

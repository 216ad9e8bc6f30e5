/* Labels of features that others made (Neuronpedia, delphi, lists of one's own), as lines: read in the forms that are published, written in
 * ours: {"sae_sha256","index","description"[,"type","model","score","source"]}. Shared by the import of the command line and by the daemon.
 * Thread: any; no state. Memory: the caller's. */
#ifndef SPURION_LABEL_H
#define SPURION_LABEL_H

#include <stdbool.h>

#include "spurion/codec.h"
#include "spurion/rollout.h"
#include "spurion/status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SPURION_LABEL_BYTES_MAX 1024       /* of a description; longer ones are cut at a character */
#define SPURION_LABEL_LINE_BYTES_MAX (1 << 20)
#define SPURION_CHECKSUM_CHARACTERS 64     /* SHA-256 in hexadecimal digits */

struct spurion_text; /* json.h */

typedef struct spurion_label {
    spurion_bytes sae_sha256;  /* 64 lower-case hexadecimal digits; absent in the forms of others */
    int32_t index;
    spurion_bytes description; /* one line: control characters are spaces */
    spurion_bytes type, model; /* how and by which model it was made; or absent */
    spurion_bytes source;      /* "gpt2-small/6-res-jb", a module path; or absent */
    bool has_score;
    double score;
} spurion_label;

/* Reads one line: ours; a Neuronpedia explanation ({modelId, layer, index, description, ..}, index a string) or upload list
 * ({modelId, layer, index, explanation}); or {"index" | "feature" | "latent": n, "label" | "description" | "explanation": text}.
 * *found false with OK: a line that is no label (a Neuronpedia feature or activation, an empty description).
 * INVALID_ARGUMENT names expected and found. */
spurion_status spurion_label_read(spurion_label *out, bool *found, const spurion_memory *m, const char *line, size_t size) SPURION_MUST_USE;
/* Reads a delphi explanation: the file's name MODULE_latentN.txt and its text, a JSON string. */
spurion_status spurion_label_read_delphi(spurion_label *out, bool *found, const spurion_memory *m, const char *file_name, const char *text,
                                         size_t size) SPURION_MUST_USE;
/* Appends the label as a line of ours, without a line end. */
void spurion_label_put(struct spurion_text *out, const spurion_label *label);
/* Whether text is a checksum as labels carry it. */
bool spurion_checksum_valid(spurion_bytes text);

#ifdef __cplusplus
}
#endif

#endif

/* Text to token ids, equal to the `tokenizers` library on the same tokenizer.json (BPE models).
 * Thread: a tokenizer never changes after open, so any number of threads may read it. open and close: one thread.
 * Memory: open takes all that the tokenizer keeps, in proportion to the file; encode takes scratch for its text and frees it. */
#ifndef SPURION_MODEL_TOKENIZER_H
#define SPURION_MODEL_TOKENIZER_H

#include "spurion/status.h"

#include <stddef.h>
#include <stdint.h>

#define SPURION_TOKENIZER_FILE_BYTES_MAX (256u << 20) /* tokenizer.json; Gemma's, the largest known, has 33 MiB */
#define SPURION_TOKENIZER_TEXT_BYTES_MAX (1u << 26)   /* one text, also after normalisation */
#define SPURION_TOKENIZER_DIGEST_BYTES 32

typedef struct spurion_tokenizer spurion_tokenizer;

/* Token ids, grown by encode. The caller zeroes it, may set count back to 0, and ends with spurion_ids_fini. */
typedef struct spurion_ids {
    int32_t *data;
    size_t count, capacity;
} spurion_ids;

void spurion_ids_fini(spurion_ids *ids);

/* Opens a tokenizer.json (UTF-8 path). Stored truncation and padding are ignored, and so is the decoder except to tell which
 * kind of bytes a token stands for.
 * NOT_FOUND when the file cannot be read; RESOURCE_EXHAUSTED when it is too large; INVALID_ARGUMENT when it is broken;
 * UNIMPLEMENTED when it names a model, normaliser, pre-tokenizer or post-processor that is not known here. */
spurion_status spurion_tokenizer_open(spurion_tokenizer **out, const char *path) SPURION_MUST_USE;

/* The same from memory; borrows json for the call. */
spurion_status spurion_tokenizer_open_memory(spurion_tokenizer **out, const char *json, size_t bytes) SPURION_MUST_USE;

void spurion_tokenizer_close(spurion_tokenizer *t);

/* Appends to out the ids of text, without what the post-processor adds around it; added tokens inside the text are recognised,
 * as the library does. On failure out keeps its old count.
 * INVALID_ARGUMENT when text is not UTF-8 (the message names the byte), RESOURCE_EXHAUSTED when it is too long. */
spurion_status spurion_tokenizer_encode(spurion_ids *out, const spurion_tokenizer *t, const char *text,
                                        size_t bytes) SPURION_MUST_USE;

/* Ids that the post-processor puts before and after a single sequence. Borrowed, alive as long as t; *count may be 0. */
const int32_t *spurion_tokenizer_leading(const spurion_tokenizer *t, int *count);
const int32_t *spurion_tokenizer_trailing(const spurion_tokenizer *t, int *count);

/* Bytes of one token as it stands in text: byte-level tokens are decoded (and may be part of a character), SentencePiece's
 * U+2581 is a space and <0xHH> a byte, an added token is its content. *out is borrowed from t, NUL-terminated.
 * NOT_FOUND when no token has this id. */
spurion_status spurion_tokenizer_token_bytes(const char **out, size_t *bytes, const spurion_tokenizer *t,
                                             int32_t id) SPURION_MUST_USE;

/* Id of a token as spelled in the file (added tokens first, then the vocabulary), -1 when there is none. */
int32_t spurion_tokenizer_id(const spurion_tokenizer *t, const char *token, size_t bytes);

/* Largest id + 1: what the embedding must have rows for. */
int32_t spurion_tokenizer_vocab_size(const spurion_tokenizer *t);

/* SHA-256 of the file, SPURION_TOKENIZER_DIGEST_BYTES bytes, borrowed. */
const uint8_t *spurion_tokenizer_digest(const spurion_tokenizer *t);

#endif

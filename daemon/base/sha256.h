/* SHA-256 over a stream of bytes (OpenSSL EVP). Thread: one owner. Memory: one context from the library, freed by fini. */
#ifndef SPURION_BASE_SHA256_H
#define SPURION_BASE_SHA256_H

#include <stddef.h>

#include "spurion/status.h"

#define SPURION_SHA256_BYTES 32

typedef struct spurion_sha256 {
    void *context; /* EVP_MD_CTX */
} spurion_sha256;

/* INTERNAL when the library gives no context. */
spurion_status spurion_sha256_init(spurion_sha256 *h) SPURION_MUST_USE;
spurion_status spurion_sha256_update(spurion_sha256 *h, const void *data, size_t bytes) SPURION_MUST_USE;
/* Writes the digest; the context takes no more bytes. */
spurion_status spurion_sha256_finish(unsigned char out[SPURION_SHA256_BYTES], spurion_sha256 *h) SPURION_MUST_USE;
/* Takes a zeroed context too. */
void spurion_sha256_fini(spurion_sha256 *h);

/* Writes 2 * bytes hex digits and a NUL. */
void spurion_hex(char *out, const unsigned char *data, size_t bytes);

#endif

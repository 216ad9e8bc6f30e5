/* SHA-256 through OpenSSL's EVP. Thread: one owner. Memory: the library's context. */
#include "daemon/base/sha256.h"

#include <openssl/evp.h>

spurion_status spurion_sha256_init(spurion_sha256 *h)
{
    EVP_MD_CTX *context = EVP_MD_CTX_new();

    h->context = context;
    if (context == NULL || EVP_DigestInit_ex(context, EVP_sha256(), NULL) != 1) {
        spurion_sha256_fini(h);
        return spurion_error(SPURION_INTERNAL, "sha256: the OpenSSL library gave no context");
    }
    return spurion_ok();
}

spurion_status spurion_sha256_update(spurion_sha256 *h, const void *data, size_t bytes)
{
    if (EVP_DigestUpdate(h->context, data, bytes) != 1) {
        return spurion_error(SPURION_INTERNAL, "sha256: OpenSSL refused %zu bytes", bytes);
    }
    return spurion_ok();
}

spurion_status spurion_sha256_finish(unsigned char out[SPURION_SHA256_BYTES], spurion_sha256 *h)
{
    unsigned int bytes = 0;

    if (EVP_DigestFinal_ex(h->context, out, &bytes) != 1 || bytes != SPURION_SHA256_BYTES) {
        return spurion_error(SPURION_INTERNAL, "sha256: OpenSSL gave no digest");
    }
    return spurion_ok();
}

void spurion_sha256_fini(spurion_sha256 *h)
{
    EVP_MD_CTX_free(h->context);
    h->context = NULL;
}

void spurion_hex(char *out, const unsigned char *data, size_t bytes)
{
    static const char digits[] = "0123456789abcdef";

    for (size_t i = 0; i < bytes; i++) {
        out[2 * i] = digits[data[i] >> 4];
        out[2 * i + 1] = digits[data[i] & 15];
    }
    out[2 * bytes] = '\0';
}

/* SHA-256 (FIPS 180-4) of a rollout's content. Our own hundred lines, so that the client library needs no crypto library for it.
 * Thread: any; no memory. */
#include <string.h>

#include "spurion/codec.h"

typedef struct sha {
    uint32_t state[8];
    uint64_t bytes;
    unsigned char block[64];
} sha;

static const uint32_t round_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotate(uint32_t v, int n)
{
    return v >> n | v << (32 - n);
}

static void sha_block(sha *h, const unsigned char *p)
{
    uint32_t w[64], s[8];

    for (int i = 0; i < 16; i++) {
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    }
    for (int i = 16; i < 64; i++) {
        uint32_t a = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t b = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + a + w[i - 7] + b;
    }
    memcpy(s, h->state, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t e = rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25);
        uint32_t t1 = s[7] + e + ((s[4] & s[5]) ^ (~s[4] & s[6])) + round_constants[i] + w[i];
        uint32_t a = rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22);
        uint32_t t2 = a + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += t1;
        s[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) {
        h->state[i] += s[i];
    }
}

static void sha_add(sha *h, const void *data, size_t size)
{
    const unsigned char *p = data;

    while (size > 0) {
        size_t at = (size_t)(h->bytes % 64), n = 64 - at < size ? 64 - at : size;
        memcpy(h->block + at, p, n);
        h->bytes += n;
        p += n;
        size -= n;
        if (at + n == 64) {
            sha_block(h, h->block);
        }
    }
}

static void sha_end(unsigned char out[32], sha *h)
{
    static const unsigned char padding[64] = {0x80};
    uint64_t bits = h->bytes * 8;
    size_t at = (size_t)(h->bytes % 64);
    unsigned char length[8];

    for (int i = 0; i < 8; i++) {
        length[i] = (unsigned char)(bits >> (56 - 8 * i));
    }
    sha_add(h, padding, at < 56 ? 56 - at : 120 - at);
    sha_add(h, length, 8);
    for (int i = 0; i < 32; i++) {
        out[i] = (unsigned char)(h->state[i / 4] >> (24 - 8 * (i % 4)));
    }
}

/* One field: a tag, its length, its bytes; so no two contents share their bytes. */
static void add_field(sha *h, char tag, const void *data, size_t size)
{
    uint64_t n = size;

    sha_add(h, &tag, 1);
    sha_add(h, &n, sizeof n);
    if (size != 0) {
        sha_add(h, data, size);
    }
}

void spurion_rollout_digest(unsigned char out[SPURION_ROLLOUT_DIGEST_BYTES], const spurion_rollout *r)
{
    sha h = {{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}, 0, {0}};

    if (r->completion_id_count > 0) {
        add_field(&h, 'i', r->prompt_ids, (size_t)r->prompt_id_count * sizeof *r->prompt_ids);
        add_field(&h, 'j', r->completion_ids, (size_t)r->completion_id_count * sizeof *r->completion_ids);
    } else if (r->messages.data != NULL) {
        add_field(&h, 'm', r->messages.data, r->messages.size);
    } else {
        add_field(&h, 'p', r->prompt.data, r->prompt.size);
        add_field(&h, 'c', r->completion.data, r->completion.size);
    }
    if (r->text_form != SPURION_FORM_PLAIN) { /* plain ones keep the digest they had before there were others */
        unsigned char form = (unsigned char)r->text_form;
        add_field(&h, 'f', &form, 1);
    }
    if (r->has_trainer_reward) {
        add_field(&h, 'r', &r->trainer_reward, sizeof r->trainer_reward);
    }
    if (r->tags.data != NULL) {
        add_field(&h, 't', r->tags.data, r->tags.size);
    }
    sha_end(out, &h);
}

/* What both tokenizer targets ask of a text: ids below the vocabulary's size, the same twice, and bytes for every id. */
#ifndef SPURION_TESTS_FUZZ_TOKENIZER_CHECK_H
#define SPURION_TESTS_FUZZ_TOKENIZER_CHECK_H

#include <stdint.h>
#include <string.h>

#include "daemon/base/check.h"
#include "daemon/model/tokenizer.h"

static inline void tokenizer_check_encode(const spurion_tokenizer *t, const char *text, size_t bytes)
{
    spurion_ids a = {0}, b = {0};
    spurion_status st = spurion_tokenizer_encode(&a, t, text, bytes), again = spurion_tokenizer_encode(&b, t, text, bytes);

    SPURION_ASSERT(st.code == again.code && a.count == b.count && (st.code == SPURION_OK || a.count == 0));
    SPURION_ASSERT(a.count == 0 || memcmp(a.data, b.data, a.count * sizeof *a.data) == 0);
    for (size_t i = 0; i < a.count; i++) {
        const char *token;
        size_t token_bytes;
        SPURION_ASSERT(a.data[i] >= 0 && a.data[i] < spurion_tokenizer_vocab_size(t));
        st = spurion_tokenizer_token_bytes(&token, &token_bytes, t, a.data[i]);
        SPURION_ASSERT(st.code == SPURION_OK && token[token_bytes] == '\0');
    }
    spurion_ids_fini(&a);
    spurion_ids_fini(&b);
}

#endif

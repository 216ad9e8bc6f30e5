/* libFuzzer: a tokenizer.json, a NUL, and text for it. Whatever comes is taken or refused with a message; what is taken gives ids below the
 * vocabulary's size, the same twice. */
#include "daemon/model/tokenizer_internal.h"
#include "daemon/model/unicode.h"
#include "tests/fuzz/tokenizer_check.h"

#define INPUT_MAX (1u << 16)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t classes[SPURION_UNICODE_CODE_POINTS]; /* made once: filling them takes far longer than a small file */
    static bool made;
    spurion_tokenizer *t = NULL;
    const uint8_t *end = size > 0 ? memchr(data, 0, size) : NULL;
    spurion_status st;

    if (size > INPUT_MAX) {
        return 0;
    }
    if (!made) {
        spurion_unicode_expand(classes);
        made = true;
    }
    end = end == NULL ? data + size : end;
    st = tok_open(&t, classes, (const char *)data, (size_t)(end - data));
    SPURION_ASSERT((st.code == SPURION_OK) == (t != NULL));
    SPURION_ASSERT(st.code == SPURION_OK || st.message[0] != '\0');
    if (t != NULL && end < data + size) {
        tokenizer_check_encode(t, (const char *)end + 1, (size_t)(data + size - end - 1));
    }
    spurion_tokenizer_close(t);
    return 0;
}

/* libFuzzer: a safetensors header. The first 4 bytes say how much data the file claims to have after it. Whatever comes is taken or
 * refused; what is taken keeps the promises that readers rely on. */
#include <stdint.h>
#include <string.h>

#include "daemon/base/check.h"
#include "daemon/model/safetensors.h"

#define INPUT_MAX (1u << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    spurion_safetensors *s = NULL;
    uint32_t claimed;
    spurion_status st;

    if (size < 4 || size > INPUT_MAX) {
        return 0;
    }
    memcpy(&claimed, data, 4);
    st = spurion_safetensors_parse(&s, (const char *)data + 4, size - 4, 8 + (uint64_t)(size - 4) + claimed, "fuzz");
    SPURION_ASSERT((st.code == SPURION_OK) == (s != NULL));
    SPURION_ASSERT(st.code == SPURION_OK || st.message[0] != '\0');
    for (int i = 0; s != NULL && i < spurion_safetensors_count(s); i++) {
        const spurion_tensor_info *t = spurion_safetensors_at(s, i);

        SPURION_ASSERT(t->begin <= t->end && t->end <= claimed);
        SPURION_ASSERT(t->elements * (uint64_t)spurion_tensor_dtype_bits(t->dtype) == (t->end - t->begin) * 8);
        SPURION_ASSERT(spurion_safetensors_find(s, t->name) == t);
    }
    spurion_safetensors_close(s);
    return 0;
}

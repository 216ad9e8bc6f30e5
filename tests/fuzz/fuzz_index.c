/* libFuzzer: model.safetensors.index.json. What is taken names at least one file beside the index and no more than the limit. */
#include <stdint.h>

#include "daemon/base/check.h"
#include "daemon/model/safetensors.h"

#define INPUT_MAX (1u << 16)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    int files = 0, tensors = 0;
    spurion_status st;

    if (size > INPUT_MAX) {
        return 0;
    }
    st = spurion_shards_index_check(&files, &tensors, (const char *)data, size, "fuzz");
    SPURION_ASSERT(st.code == SPURION_OK || st.message[0] != '\0');
    SPURION_ASSERT(st.code != SPURION_OK || (files > 0 && files <= SPURION_SHARD_COUNT_MAX && tensors >= files));
    return 0;
}

/* libFuzzer: a model's config.json. What is taken is within the sizes that the engine computes with. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "daemon/base/check.h"
#include "daemon/model/families.h"

#define INPUT_MAX (1u << 16)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    spurion_model_config c;
    bool said = false;
    spurion_status st;

    if (size > INPUT_MAX) {
        return 0;
    }
    st = spurion_model_config_parse(&c, &said, (const char *)data, size, "fuzz");
    SPURION_ASSERT(st.code == SPURION_OK || st.message[0] != '\0');
    if (st.code == SPURION_OK) {
        float table[8 * 2];

        SPURION_ASSERT(c.hidden > 0 && c.layers > 0 && c.layers <= SPURION_LAYERS_MAX && c.heads > 0 && c.kv_heads > 0 && c.head_dim > 0);
        SPURION_ASSERT(c.heads % c.kv_heads == 0 && c.ff > 0 && c.vocab > 0 && c.context > 0 && c.outputs > 0 && c.eos_count <= SPURION_EOS_MAX);
        SPURION_ASSERT(c.rope == SPURION_ROPE_NONE ? c.rot == 0 : c.rot >= 2 && c.rot % 2 == 0 && c.rot <= c.head_dim);
        SPURION_ASSERT(spurion_family_find(c.architecture, "") != NULL);
        for (int l = 0; l < c.layers; l++) {
            SPURION_ASSERT(isfinite(c.attention_scale[l]) && c.window[l] >= 0);
        }
        if (c.rot > 0 && c.rot <= 8) {
            spurion_model_rope_table(table, &c, 8 / c.rot);
        }
    }
    return 0;
}

/* libFuzzer: an SAE's configuration, as SAELens, sparsify and the generations of Llama Scope write it (the first byte chooses). */
#include <stdint.h>
#include <string.h>

#include "daemon/base/check.h"
#include "daemon/sae/reader.h"

#define INPUT_MAX (1u << 16)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    spurion_status st;
    spurion_saelens_config a;
    spurion_sparsify_config b;
    spurion_llama_scope_config c;

    if (size < 1 || size > INPUT_MAX) {
        return 0;
    }
    if ((data[0] & 15) > 13) {
        st = spurion_llama_scope_config_parse(&c, (const char *)data + 1, size - 1, "fuzz", (data[0] & 1) != 0);
        SPURION_ASSERT(st.code != SPURION_OK || (c.k >= 0 && c.d_model >= 0 && c.threshold >= 0 && c.norm_in >= 0));
    } else if (data[0] % 2 == 0) {
        st = spurion_saelens_config_parse(&a, (const char *)data + 1, size - 1, "fuzz");
        SPURION_ASSERT(st.code != SPURION_OK || (a.d_in >= 0 && a.d_sae >= 0 && a.k >= 0 && strstr(a.architecture, "transcoder") == NULL));
    } else {
        st = spurion_sparsify_config_parse(&b, (const char *)data + 1, size - 1, "fuzz");
        SPURION_ASSERT(st.code != SPURION_OK || (b.k >= 1 && b.latents >= 0 && b.expansion >= 0));
    }
    SPURION_ASSERT(st.code == SPURION_OK || st.message[0] != '\0');
    return 0;
}

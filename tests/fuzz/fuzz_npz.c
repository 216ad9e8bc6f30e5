/* libFuzzer: an npz archive in memory. Whatever comes is taken or refused; of what is taken every array is read, on and back, and the
 * sizes are those of its shape. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/check.h"
#include "daemon/model/npz.h"

#define INPUT_MAX (1u << 16)
#define READ_MAX 4096u

/* The start, the end, and something between, in this order and again from the start: a deflated array begins anew. */
static void read_parts(spurion_npz *z, int i, const spurion_tensor_info *t)
{
    unsigned char first[64], again[64], end[64];
    size_t n = t->end < sizeof first ? (size_t)t->end : sizeof first;
    spurion_status st = spurion_npz_read(first, z, i, 0, n), last;

    if (t->end > READ_MAX * 64) { /* a bomb of zeros takes its time by itself */
        return;
    }
    last = spurion_npz_read(end, z, i, t->end - n, n);
    SPURION_ASSERT(st.code == SPURION_OK || last.code != SPURION_OK || n == 0);
    st = spurion_npz_read(again, z, i, 0, n);
    SPURION_ASSERT(last.code != SPURION_OK || (st.code == SPURION_OK && memcmp(first, again, n) == 0));
    SPURION_ASSERT(spurion_npz_read(first, z, i, t->end, 1).code != SPURION_OK);
    st = spurion_npz_check(z, i, NULL);
    SPURION_ASSERT(st.code == SPURION_OK || st.message[0] != '\0');
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    spurion_npz_source source = {-1, data, size, "fuzz"};
    spurion_tensor_header header;
    spurion_npz *z = NULL;
    spurion_status st;

    if (size > INPUT_MAX) {
        return 0;
    }
    st = spurion_npz_open(&z, &header, &source);
    SPURION_ASSERT((st.code == SPURION_OK) == (z != NULL));
    SPURION_ASSERT(st.code == SPURION_OK || st.message[0] != '\0');
    for (int i = 0; z != NULL && i < header.tensor_count; i++) {
        const spurion_tensor_info *t = &header.tensors[i];

        SPURION_ASSERT(i == 0 || strcmp(header.tensors[i - 1].name, t->name) < 0);
        SPURION_ASSERT(t->begin == 0 && t->elements * (uint64_t)spurion_tensor_dtype_bits(t->dtype) == t->end * 8);
        read_parts(z, i, t);
    }
    spurion_npz_close(z);
    spurion_tensor_header_fini(&header);
    return 0;
}

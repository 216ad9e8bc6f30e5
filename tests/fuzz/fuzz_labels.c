/* libFuzzer: a line of labels in any of its forms, or (first byte odd) a delphi file: its name, a NUL, its text. What is taken is one line of
 * UTF-8 within the limits; written in our form it reads back as the same label, and is written the same way again. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/arena.h"
#include "daemon/base/check.h"
#include "spurion/json.h"
#include "spurion/label.h"

#define INPUT_MAX (1u << 16)

static void *take(void *context, size_t bytes)
{
    return spurion_arena_take(context, bytes);
}

static bool same(spurion_bytes a, spurion_bytes b)
{
    return (a.data == NULL) == (b.data == NULL) && a.size == b.size && (a.size == 0 || memcmp(a.data, b.data, a.size) == 0);
}

static void check_label(spurion_label *label, const spurion_memory *m)
{
    static const char checksum[] = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    spurion_text text = {NULL, 0, 0, false}, twice = {NULL, 0, 0, false};
    spurion_label again;
    bool found = false;

    SPURION_ASSERT(label->index >= 0 && label->description.size > 0 && label->description.size <= SPURION_LABEL_BYTES_MAX);
    SPURION_ASSERT(spurion_utf8_valid_prefix(label->description.data, label->description.size) == label->description.size);
    for (size_t i = 0; i < label->description.size; i++) {
        SPURION_ASSERT((unsigned char)label->description.data[i] >= 0x20);
    }
    if (label->sae_sha256.data == NULL) {
        label->sae_sha256 = (spurion_bytes){checksum, sizeof checksum - 1};
    }
    spurion_label_put(&text, label);
    SPURION_ASSERT(!text.failed);
    SPURION_ASSERT(spurion_label_read(&again, &found, m, text.data, text.size).code == SPURION_OK && found);
    SPURION_ASSERT(again.index == label->index && same(again.description, label->description) && same(again.sae_sha256, label->sae_sha256));
    SPURION_ASSERT(again.has_score == label->has_score && again.source.size == label->source.size);
    spurion_label_put(&twice, &again);
    SPURION_ASSERT(twice.size == text.size && memcmp(twice.data, text.data, text.size) == 0);
    spurion_text_fini(&text);
    spurion_text_fini(&twice);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    spurion_arena arena;
    spurion_memory m = {take, &arena};
    spurion_label label;
    spurion_status st;
    bool found = false;

    if (size < 1 || size > INPUT_MAX) {
        return 0;
    }
    spurion_arena_init(&arena, 16u << 20);
    if (data[0] % 2 == 0) {
        st = spurion_label_read(&label, &found, &m, (const char *)data + 1, size - 1);
    } else {
        const uint8_t *end = memchr(data + 1, 0, size - 1);
        size_t name = end != NULL ? (size_t)(end - data) - 1 : 0;
        st = end == NULL ? spurion_ok()
                         : spurion_label_read_delphi(&label, &found, &m, (const char *)data + 1, (const char *)end + 1, size - name - 2);
    }
    SPURION_ASSERT(st.code == SPURION_OK || (!found && st.message[0] != '\0'));
    if (found) {
        check_label(&label, &m);
    }
    spurion_arena_fini(&arena);
    return 0;
}

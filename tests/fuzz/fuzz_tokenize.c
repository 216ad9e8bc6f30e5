/* libFuzzer: texts through small tokenizers of every pipeline. The first byte says which; the rest is the text, as bytes and as code points in
 * threes. */
#include <stdlib.h>

#include "daemon/model/unicode.h"
#include "tests/fuzz/tokenizer_check.h"

#define ADDED(id, content, word, left, right, normal)                                                                              \
    "{\"id\":" id ",\"content\":\"" content "\",\"single_word\":" word ",\"lstrip\":" left ",\"rstrip\":" right                    \
    ",\"normalized\":" normal ",\"special\":false}"
#define VOCAB                                                                                                                      \
    "\"model\":{\"type\":\"BPE\",\"unk_token\":\"<unk>\",\"fuse_unk\":true,\"byte_fallback\":true,\"vocab\":{\"<unk>\":0,\"a\":1," \
    "\"b\":2,\"c\":3,\"\\u0120\":4,"                                                                                               \
    "\"\\u2581\":5,\"ab\":6,\"abc\":7,\"bc\":8,\"\\u2581a\":9,\"\\u2581\\u2581\":10,\"\\u0120a\":11,\"<0xC3>\":12,\"<0xA9>\":13,"  \
    "\"1\":14,\"'\":15,\"s\":16,"                                                                                                  \
    "\"'s\":17,\"aa\":18,\"aaa\":19,\"aaaa\":20},\"merges\":[\"b c\",\"a b\",\"a bc\",\"ab c\",\"\\u2581 a\",\"\\u2581 "           \
    "\\u2581\",\"\\u0120 a\",\"' s\",\"a a\",\"aa a\","                                                                            \
    "\"a aa\",\"aa aa\",\"a aaa\",\"aaa a\"]}"
#define TOKENS                                                                                                                     \
    "\"added_tokens\":[" ADDED("21", "<l>", "false", "true", "false", "false") "," ADDED(                                          \
        "22", "<r>", "false", "false", "true",                                                                                     \
        "true") "," ADDED("23", "bab", "true", "false", "false",                                                                   \
                          "true") "," ADDED("24", "<b>", "true", "true", "true", "false") "," ADDED("25", "  ", "false", "false",  \
                                                                                                    "false", "false") "]"
#define SPLIT(regex, behavior, invert)                                                                                             \
    "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex "\"},\"behavior\":\"" behavior "\",\"invert\":" invert "}"
#define BYTE_LEVEL(regex) "{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"trim_offsets\":true,\"use_regex\":" regex "}"
#define CHAT(digits)                                                                                                               \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}" digits                                         \
    "| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|"                                                                                   \
    "\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+"

static const char *const files[] = {
    "{" TOKENS ",\"pre_tokenizer\":" BYTE_LEVEL("true") "," VOCAB "}",
    "{" TOKENS ",\"normalizer\":{\"type\":\"NFC\"},\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[" SPLIT(
        CHAT("{1,3}"), "Isolated", "false") "," BYTE_LEVEL("false") "]}," VOCAB "}",
    "{" TOKENS ",\"normalizer\":{\"type\":\"NFKD\"},\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[" SPLIT(
        CHAT(""), "Removed", "true") ",{\"type\":\"Digits\",\"individual_digits\":false}]}," VOCAB "}",
    "{" TOKENS
    ",\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Strip\",\"strip_left\":true,\"strip_right\":true},"
    "{\"type\":\"Prepend\",\"prepend\":\"\\u2581\"},{\"type\":\"Replace\",\"pattern\":{\"String\":\" "
    "\"},\"content\":\"\\u2581\"}]}," VOCAB "}",
    "{" TOKENS ",\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Lowercase\"},{\"type\":\"Replace\",\"pattern\":"
               "{\"Regex\":\"b*\"},\"content\":\"a\"}]},"
    "\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"\\u2581\",\"prepend_scheme\":\"first\",\"split\":true}," VOCAB "}",
    "{" TOKENS ",\"normalizer\":{\"type\":\"NFKC\"},\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[" SPLIT(
        "a*|\\\\p{Lu}", "MergedWithNext", "false") "," SPLIT("[\\\\d\\\\P{L}]", "Contiguous",
                                                             "false") ",{\"type\":\"Whitespace\"}," SPLIT("b", "MergedWithPrevious",
                                                                                                          "true") "]}," VOCAB "}",
};
#define FILE_COUNT (sizeof files / sizeof files[0])

/* Three bytes a code point, so that every plane is reached, in valid UTF-8. */
static void encode_points(const spurion_tokenizer *t, const uint8_t *data, size_t size)
{
    char *text = malloc(size / 3 * 4 + 1);
    size_t bytes = 0;

    SPURION_ASSERT(text != NULL);
    for (size_t i = 0; i + 3 <= size; i += 3) {
        uint32_t c = ((uint32_t)data[i] << 16 | (uint32_t)data[i + 1] << 8 | data[i + 2]) % SPURION_UNICODE_CODE_POINTS;
        bytes += (size_t)spurion_utf8_encode(text + bytes, c >= 0xd800 && c < 0xe000 ? ' ' : c);
    }
    tokenizer_check_encode(t, text, bytes);
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static spurion_tokenizer *open[FILE_COUNT]; /* for the life of the process: opening takes longer than most texts */
    spurion_tokenizer **t;
    spurion_status st;

    if (size == 0) {
        return 0;
    }
    t = &open[data[0] % FILE_COUNT];
    if (*t == NULL) {
        const char *file = files[data[0] % FILE_COUNT];

        st = spurion_tokenizer_open_memory(t, file, strlen(file));
        SPURION_ASSERT(st.code == SPURION_OK);
    }
    tokenizer_check_encode(*t, (const char *)data + 1, size - 1);
    encode_points(*t, data + 1, size - 1);
    return 0;
}

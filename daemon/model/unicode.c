/* UTF-8 check, class expansion, lower case. Thread: any. Memory: none taken. Tables: unicode_data.c. */
#include "daemon/model/unicode.h"
#include "daemon/model/unicode_data.h"

#include <string.h>

const char spurion_unicode_category_names[SPURION_UNICODE_CATEGORIES][3] = {
    "Cn", "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps",
    "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Co"};

void spurion_unicode_expand(uint8_t *classes)
{
    for (size_t i = 0; i < spurion_unicode_run_count; i++) {
        size_t begin = spurion_unicode_runs[i] >> 8;
        size_t end = i + 1 < spurion_unicode_run_count ? spurion_unicode_runs[i + 1] >> 8 : SPURION_UNICODE_CODE_POINTS;
        memset(classes + begin, (int)(spurion_unicode_runs[i] & 0xff), end - begin);
    }
}

uint32_t spurion_unicode_property(const char *name, size_t bytes)
{
    uint32_t bits = 0;
    for (int c = 0; c < SPURION_UNICODE_CATEGORIES; c++) {
        const char *category = spurion_unicode_category_names[c];
        if ((bytes == 1 && name[0] == category[0]) || (bytes == 2 && memcmp(name, category, 2) == 0)) {
            bits |= 1u << c;
        }
    }
    return bits;
}

int spurion_unicode_lower(uint32_t lower[2], uint32_t code_point)
{
    size_t low = 0, high = spurion_unicode_lower_count;

    lower[0] = code_point;
    if (code_point < 0x80) {
        lower[0] += code_point >= 'A' && code_point <= 'Z' ? 32 : 0;
        return 1;
    }
    if (code_point == 0x130) { /* I with dot above: the only one that becomes two */
        lower[0] = 'i';
        lower[1] = 0x307;
        return 2;
    }
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (spurion_unicode_lower_runs[middle].last < code_point) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    if (low < spurion_unicode_lower_count) {
        const spurion_unicode_lower_run *run = &spurion_unicode_lower_runs[low];
        if (code_point >= run->first && (code_point - run->first) % run->step == 0) {
            lower[0] = (uint32_t)((int64_t)code_point + run->delta);
        }
    }
    return 1;
}

/* Bytes of a well-formed sequence at s (Unicode 15, table 3-7), 0 when it is not. */
static size_t sequence_bytes(const unsigned char *s, size_t left)
{
    size_t bytes;
    unsigned char low = 0x80, high = 0xbf;

    if (s[0] < 0x80) {
        return 1;
    }
    if (s[0] < 0xc2 || s[0] > 0xf4) {
        return 0;
    }
    bytes = s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : 4;
    low = s[0] == 0xe0 ? 0xa0 : s[0] == 0xf0 ? 0x90 : low;
    high = s[0] == 0xed ? 0x9f : s[0] == 0xf4 ? 0x8f : high;
    if (left < bytes || s[1] < low || s[1] > high) {
        return 0;
    }
    for (size_t i = 2; i < bytes; i++) {
        if ((s[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    return bytes;
}

bool spurion_utf8_valid(size_t *offset, const char *text, size_t bytes)
{
    const unsigned char *s = (const unsigned char *)text;
    size_t i = 0;

    while (i < bytes) {
        uint64_t eight;
        size_t n;
        if (i + 8 <= bytes) { /* eight ASCII bytes at once */
            memcpy(&eight, s + i, 8);
            if ((eight & 0x8080808080808080u) == 0) {
                i += 8;
                continue;
            }
        }
        n = sequence_bytes(s + i, bytes - i);
        if (n == 0) {
            *offset = i;
            return false;
        }
        i += n;
    }
    return true;
}

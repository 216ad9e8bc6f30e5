/* UTF-8 and the character classes that the judge of our tokenizers (the `tokenizers` library) works with.
 * Thread: any; the tables are constant. Memory: none taken.
 * The classes are read out of that library, because its parts follow different Unicode versions: properties in regexes come
 * from Oniguruma (16.0), digits and case from Rust's standard library (17.0), normalisation from a crate of 9.0. */
#ifndef SPURION_MODEL_UNICODE_H
#define SPURION_MODEL_UNICODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SPURION_UNICODE_CODE_POINTS 0x110000

/* General categories as stored in the low five bits of a class. Cn (unassigned) is 0. */
enum {
    SPURION_UNICODE_CN,
    SPURION_UNICODE_LU,
    SPURION_UNICODE_LL,
    SPURION_UNICODE_LT,
    SPURION_UNICODE_LM,
    SPURION_UNICODE_LO,
    SPURION_UNICODE_MN,
    SPURION_UNICODE_MC,
    SPURION_UNICODE_ME,
    SPURION_UNICODE_ND,
    SPURION_UNICODE_NL,
    SPURION_UNICODE_NO,
    SPURION_UNICODE_PC,
    SPURION_UNICODE_PD,
    SPURION_UNICODE_PS,
    SPURION_UNICODE_PE,
    SPURION_UNICODE_PI,
    SPURION_UNICODE_PF,
    SPURION_UNICODE_PO,
    SPURION_UNICODE_SM,
    SPURION_UNICODE_SC,
    SPURION_UNICODE_SK,
    SPURION_UNICODE_SO,
    SPURION_UNICODE_ZS,
    SPURION_UNICODE_ZL,
    SPURION_UNICODE_ZP,
    SPURION_UNICODE_CC,
    SPURION_UNICODE_CF,
    SPURION_UNICODE_CS,
    SPURION_UNICODE_CO,
    SPURION_UNICODE_CATEGORIES
};

#define SPURION_UNICODE_CATEGORY 0x1f /* mask of the category */
#define SPURION_UNICODE_WORD 0x20     /* \w of Rust's regex */
#define SPURION_UNICODE_NUMERIC 0x40  /* char::is_numeric */
#define SPURION_UNICODE_NORMAL 0x80   /* takes part in normalisation; all others stand still and separate what is around them */

/* Names of the categories in the order above: "Cn", "Lu", ... */
extern const char spurion_unicode_category_names[SPURION_UNICODE_CATEGORIES][3];

/* Runs of equal class: first code point << 8 | class, ascending; the last run ends at SPURION_UNICODE_CODE_POINTS. */
extern const uint32_t spurion_unicode_runs[];
extern const size_t spurion_unicode_run_count;

/* Writes the class of every code point; classes (SPURION_UNICODE_CODE_POINTS) bytes. */
void spurion_unicode_expand(uint8_t *classes);

/* Category bits of \p{name}: bit c is set for category c. name is a category ("Lu") or its group ("L"); 0 when unknown. */
uint32_t spurion_unicode_property(const char *name, size_t bytes);

/* Writes the lower case of code_point (one or two code points, char::to_lowercase), returns how many. */
int spurion_unicode_lower(uint32_t lower[2], uint32_t code_point);

/* True when text is UTF-8 (no surrogates, no overlong forms, at most U+10FFFF); else *offset is the first bad byte. */
bool spurion_utf8_valid(size_t *offset, const char *text, size_t bytes);

/* White_Space, the \s of both regex engines and char::is_whitespace. */
static inline bool spurion_unicode_space(uint32_t c)
{
    return c == ' ' || (c >= 9 && c <= 13) || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

/* Bytes of the character that begins with this byte, in valid UTF-8. */
static inline int spurion_utf8_length(unsigned char first)
{
    return first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
}

/* Decodes the character at s, in valid UTF-8; *bytes is its length. */
static inline uint32_t spurion_utf8_decode(int *bytes, const char *s)
{
    const unsigned char *u = (const unsigned char *)s;
    if (u[0] < 0x80) {
        *bytes = 1;
        return u[0];
    }
    if (u[0] < 0xe0) {
        *bytes = 2;
        return (uint32_t)(u[0] & 0x1f) << 6 | (u[1] & 0x3f);
    }
    if (u[0] < 0xf0) {
        *bytes = 3;
        return (uint32_t)(u[0] & 0x0f) << 12 | (uint32_t)(u[1] & 0x3f) << 6 | (u[2] & 0x3f);
    }
    *bytes = 4;
    return (uint32_t)(u[0] & 0x07) << 18 | (uint32_t)(u[1] & 0x3f) << 12 | (uint32_t)(u[2] & 0x3f) << 6 | (u[3] & 0x3f);
}

/* Writes the UTF-8 of a code point (1..4 bytes), returns the length. */
static inline int spurion_utf8_encode(char out[4], uint32_t c)
{
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    if (c < 0x800) {
        out[0] = (char)(0xc0 | c >> 6);
        out[1] = (char)(0x80 | (c & 0x3f));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (char)(0xe0 | c >> 12);
        out[1] = (char)(0x80 | (c >> 6 & 0x3f));
        out[2] = (char)(0x80 | (c & 0x3f));
        return 3;
    }
    out[0] = (char)(0xf0 | c >> 18);
    out[1] = (char)(0x80 | (c >> 12 & 0x3f));
    out[2] = (char)(0x80 | (c >> 6 & 0x3f));
    out[3] = (char)(0x80 | (c & 0x3f));
    return 4;
}

/* Start of the character that ends before s + end (end > 0), in valid UTF-8. */
static inline size_t spurion_utf8_back(const char *s, size_t end)
{
    do {
        end--;
    } while (end > 0 && ((unsigned char)s[end] & 0xc0) == 0x80);
    return end;
}

#endif

/* The completion with its tokens shaded by a signed value: one linear scale from -max to max. Blue #4393c3 raised, orange #e66101
 * lowered: 101 apart (CIE76) for deuteranopes, 86 for protanopes. Never colour alone: an overline stands for raised and an underline for
 * lowered, and without colour the marks are brackets with the sign. See cli.h. */
#include <math.h>
#include <string.h>

#include "cli.h"

#define SHOWN_MIN 0.05f   /* of the scale: below, a token is not shaded */
#define MARKED_MIN 0.15f  /* of the scale: below, a token carries no mark when there is no colour */
#define ALPHA_DARK 0.7f   /* keeps the contrast of the text at 4.8:1 on the dark ground */

static const int raised[3] = {0x43, 0x93, 0xc3}, lowered[3] = {0xe6, 0x61, 0x01};

/* Tokens may end inside a UTF-8 character: such ones are shown together, with the sum of their values. Returns how many. */
static int32_t piece(spurion_bytes *joined, float *value, char *room, size_t room_size, const spurion_bytes *texts, const float *values,
                     int32_t left)
{
    size_t size = 0;

    *value = 0;
    for (int32_t n = 0; n < left && n < 8; n++) {
        if (size + texts[n].size > room_size) {
            break;
        }
        memcpy(room + size, texts[n].data ? texts[n].data : "", texts[n].size);
        size += texts[n].size;
        *value += values[n];
        if (spurion_utf8_valid_prefix(room, size) == size) {
            *joined = (spurion_bytes){room, size};
            return n + 1;
        }
    }
    *joined = texts[0];
    *value = values[0];
    return 1;
}

static void paint(spurion_text *out, const cli_shade *s, float value)
{
    static const int dark[3] = {0x11, 0x14, 0x18};
    const int *colour = value > 0 ? raised : lowered;
    float alpha = fabsf(value) / s->max;
    int mixed[3];

    alpha = (alpha > 1 ? 1 : alpha) * (s->dark ? ALPHA_DARK : 1);
    for (int i = 0; i < 3; i++) {
        float ground = s->dark ? (float)dark[i] : 255.0f;
        mixed[i] = (int)lroundf(ground + alpha * ((float)colour[i] - ground));
    }
    spurion_text_print(out, "\x1b[38;2;%sm\x1b[48;2;%d;%d;%dm\x1b[%dm", s->dark ? "238;238;238" : "17;17;17", mixed[0], mixed[1], mixed[2],
                       value > 0 ? 53 : 4);
}

/* The text of a token, painted line by line, so that the ground does not run to the end of a terminal's line. */
static void put_painted(spurion_text *out, const cli_shade *s, spurion_bytes text, float value)
{
    size_t at = 0;

    while (at <= text.size) {
        const char *end = text.size > at ? memchr(text.data + at, '\n', text.size - at) : NULL;
        size_t size = end ? (size_t)(end - text.data) - at : text.size - at;
        paint(out, s, value);
        cli_put_safe(out, (spurion_bytes){text.data + at, size}, true);
        cli_put(out, end ? "\xe2\x86\xb5\x1b[0m\n" : "\x1b[0m");
        at += size + 1;
        if (!end) {
            break;
        }
    }
}

static int sign_of(const cli_shade *s, float value, float least)
{
    return s->max > 0 && fabsf(value) >= least * s->max ? (value > 0 ? 1 : -1) : 0;
}

void cli_shade_tokens(spurion_text *out, const cli_shade *s, const spurion_bytes *texts, const float *values, int32_t count)
{
    char room[256];
    int open = 0;

    for (int32_t i = 0; i < count;) {
        spurion_bytes text;
        float value;
        int32_t taken = piece(&text, &value, room, sizeof room, texts + i, values + i, count - i);
        int sign = sign_of(s, value, s->color ? SHOWN_MIN : MARKED_MIN);

        if (s->color && sign) {
            put_painted(out, s, text, value);
        } else if (s->color) {
            cli_put_safe(out, text, true);
        } else {
            if (open && sign != open) {
                cli_put(out, "\xe2\x9f\xa7"); /* closing white bracket */
            }
            if (sign && sign != open) {
                cli_put(out, sign > 0 ? "\xe2\x9f\xa6+" : "\xe2\x9f\xa6\xe2\x88\x92");
            }
            open = sign;
            cli_put_safe(out, text, true);
        }
        i += taken;
    }
    cli_put(out, open && !s->color ? "\xe2\x9f\xa7" : "");
}

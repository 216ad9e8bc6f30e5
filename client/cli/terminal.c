/* What a terminal gets: safe text, tables, times, progress. See cli.h. */
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <wchar.h>

#include "cli.h"

#define PROGRESS_AFTER_MS 1000
#define PROGRESS_EVERY_MS 200
#define NAME_COLUMNS 28

int64_t cli_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

void cli_put(spurion_text *out, const char *text)
{
    spurion_text_add(out, text, strlen(text));
}

void cli_flush(spurion_text *out)
{
    if (out->size) {
        (void)fwrite(out->data, 1, out->size, stdout);
    }
    if (out->failed) {
        cli_say("expected memory for the output, found none");
    }
    out->size = 0;
}

/* --- safe text --- */

/* Decodes one character of well-formed UTF-8; 0 bytes taken: none stands there. */
static size_t decode(uint32_t *out, const unsigned char *t, size_t size)
{
    size_t n = t[0] < 0x80 ? 1 : t[0] < 0xe0 ? 2 : t[0] < 0xf0 ? 3 : 4;
    uint32_t c = n == 1 ? t[0] : t[0] & (0xffU >> (n + 1));

    if (n > size || spurion_utf8_valid_prefix((const char *)t, n) != n) {
        return 0;
    }
    for (size_t i = 1; i < n; i++) {
        c = c << 6 | (t[i] & 0x3fU);
    }
    *out = c;
    return n;
}

/* Characters that move, hide or reorder what stands beside them (Unicode: Cc, Cf, Zl, Zp and fillers that have no ink). */
static bool is_unsafe(uint32_t c)
{
    static const struct { uint32_t first, last; } ranges[] = {
        {0x0000, 0x001f}, {0x007f, 0x009f}, {0x00ad, 0x00ad}, {0x034f, 0x034f}, {0x061c, 0x061c}, {0x115f, 0x1160}, {0x17b4, 0x17b5},
        {0x180b, 0x180f}, {0x200b, 0x200f}, {0x2028, 0x202e}, {0x2060, 0x206f}, {0x3164, 0x3164}, {0xfe00, 0xfe0e}, {0xfeff, 0xfeff},
        {0xffa0, 0xffa0}, {0xfff0, 0xfffb}, {0x1bca0, 0x1bca3}, {0x1d173, 0x1d17a}, {0xe0000, 0xe0fff}};

    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        if (c >= ranges[i].first && c <= ranges[i].last) {
            return true;
        }
    }
    return false;
}

void cli_put_safe(spurion_text *out, spurion_bytes text, bool lines)
{
    size_t i = 0;

    while (i < text.size) {
        uint32_t c = 0;
        size_t n = decode(&c, (const unsigned char *)text.data + i, text.size - i);

        if (n == 0) {
            spurion_text_print(out, "<%02X>", (unsigned char)text.data[i]);
            n = 1;
        } else if (c == '\n') {
            cli_put(out, lines ? "\n" : "\xe2\x86\xb5"); /* U+21B5, the sign of the return key */
        } else if (c == '\t' && lines) {
            cli_put(out, "    ");
        } else if (is_unsafe(c)) {
            spurion_text_print(out, "<U+%04X>", c);
        } else {
            spurion_text_add(out, text.data + i, n);
        }
        i += n;
    }
}

int cli_width(const char *text, size_t size)
{
    int width = 0;

    for (size_t i = 0; i < size;) {
        uint32_t c = 0;
        size_t n = decode(&c, (const unsigned char *)text + i, size - i);
        int w = n ? wcwidth((wchar_t)c) : 1;
        width += w > 0 ? w : 0;
        i += n ? n : 1;
    }
    return width;
}

void cli_put_time(spurion_text *out, int64_t ms)
{
    time_t seconds = (time_t)(ms / 1000);
    struct tm parts;
    char text[32];

    if (localtime_r(&seconds, &parts) && strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &parts)) {
        cli_put(out, text);
    }
}

void cli_put_age(spurion_text *out, uint64_t ms)
{
    if (ms < 10000) {
        spurion_text_print(out, "%.1f s", (double)ms / 1000);
    } else if (ms < 120000) {
        spurion_text_print(out, "%llu s", (unsigned long long)ms / 1000);
    } else if (ms < 7200000) {
        spurion_text_print(out, "%llu min", (unsigned long long)ms / 60000);
    } else if (ms < 172800000) {
        spurion_text_print(out, "%llu h", (unsigned long long)ms / 3600000);
    } else {
        spurion_text_print(out, "%llu d", (unsigned long long)ms / 86400000);
    }
}

void cli_put_bytes(spurion_text *out, uint64_t bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    int unit = 0;

    while (value >= 1024 && unit < 4) {
        value /= 1024;
        unit++;
    }
    spurion_text_print(out, value == (double)(uint64_t)value ? "%.0f %s" : "%.1f %s", value, units[unit]);
}

/* --- tables --- */

void cli_table_init(cli_table *t, const char *const *titles, int columns)
{
    memset(t, 0, sizeof *t);
    t->titles = titles;
    t->columns = columns;
    cli_table_row(t);
    t->rows = 0;
}

void cli_table_fini(cli_table *t)
{
    for (int i = 0; t->cells && i < t->capacity * t->columns; i++) {
        free(t->cells[i]);
    }
    free(t->cells);
    t->cells = NULL;
}

void cli_table_cell(cli_table *t, int column, const char *format, ...)
{
    va_list args;
    char *text = NULL;

    va_start(args, format);
    if (t->failed || vasprintf(&text, format, args) < 0) {
        t->failed = true;
    } else {
        free(t->cells[t->rows * t->columns + column]);
        t->cells[t->rows * t->columns + column] = text;
    }
    va_end(args);
}

void cli_table_signed(cli_table *t, int column, spurion_opt_float value, bool short_form)
{
    if (value.has) {
        cli_table_cell(t, column, short_form ? "%+.4g" : "%+.4f", (double)value.value);
    }
}

void cli_table_name(cli_table *t, int column, spurion_bytes text)
{
    spurion_text safe = {NULL, 0, 0, false};

    cli_put_safe(&safe, text, false);
    cli_table_cell(t, column, "%s", safe.data ? safe.data : "");
    spurion_text_fini(&safe);
}

void cli_table_row(cli_table *t)
{
    t->rows++;
    if (t->rows >= t->capacity) {
        int capacity = t->capacity ? 2 * t->capacity : 64;
        char **grown = realloc(t->cells, (size_t)capacity * (size_t)t->columns * sizeof *grown);
        if (!grown) {
            t->failed = true;
            t->rows--;
            return;
        }
        memset(grown + t->capacity * t->columns, 0, (size_t)(capacity - t->capacity) * (size_t)t->columns * sizeof *grown);
        t->cells = grown;
        t->capacity = capacity;
    }
}

/* Bytes of text that fit into columns, leaving room for an ellipsis. */
static size_t fitting(const char *text, int columns)
{
    size_t size = strlen(text), at = 0;

    while (at < size) {
        uint32_t c;
        size_t n = decode(&c, (const unsigned char *)text + at, size - at);
        n = n ? n : 1;
        if (cli_width(text, at + n) > columns - 1) {
            break;
        }
        at += n;
    }
    return at;
}

static void put_cell(spurion_text *out, const char *text, int width, bool right, bool last)
{
    int own = cli_width(text, strlen(text));
    bool cut = own > width;

    for (int i = own; right && i < width; i++) {
        cli_put(out, " ");
    }
    spurion_text_add(out, text, cut ? fitting(text, width) : strlen(text));
    cli_put(out, cut ? "\xe2\x80\xa6" : "");
    for (int i = own; !right && !last && i < width; i++) {
        cli_put(out, " ");
    }
    cli_put(out, last ? "\n" : "  ");
}

void cli_table_print(spurion_text *out, cli_table *t, const cli *c)
{
    int widths[24] = {0};
    bool narrow = !c->value[OPT_WIDE] && isatty(STDOUT_FILENO);

    out->failed = out->failed || t->failed;
    for (int k = 0; k < t->columns; k++) {
        widths[k] = (int)strlen(t->titles[k]) - (t->titles[k][0] == '>');
        for (int r = 0; r < t->rows; r++) {
            const char *cell = t->cells[r * t->columns + k];
            int w = cell ? cli_width(cell, strlen(cell)) : 0;
            widths[k] = w > widths[k] ? w : widths[k];
        }
        widths[k] = narrow && k + 1 < t->columns && widths[k] > NAME_COLUMNS ? NAME_COLUMNS : widths[k];
    }
    cli_put(out, c->color ? "\x1b[1m" : "");
    for (int k = 0; k < t->columns; k++) {
        bool right = t->titles[k][0] == '>';
        put_cell(out, t->titles[k] + right, widths[k], right, k + 1 == t->columns);
    }
    cli_put(out, c->color ? "\x1b[0m" : "");
    for (int r = 0; r < t->rows; r++) {
        for (int k = 0; k < t->columns; k++) {
            const char *cell = t->cells[r * t->columns + k];
            put_cell(out, cell ? cell : "", widths[k], t->titles[k][0] == '>', k + 1 == t->columns);
        }
    }
}

/* --- progress --- */

void cli_progress_init(cli_progress *p)
{
    memset(p, 0, sizeof *p);
    p->on = isatty(STDERR_FILENO);
    p->started_ms = cli_now_ms();
}

void cli_progress_show(cli_progress *p, uint64_t done, uint64_t all, const char *what)
{
    int64_t now = cli_now_ms();

    if (!p->on || now - p->started_ms < PROGRESS_AFTER_MS || now - p->last_ms < PROGRESS_EVERY_MS) {
        return;
    }
    p->last_ms = now;
    p->shown = true;
    if (all) {
        (void)fprintf(stderr, "\r\x1b[K%llu of %llu %s", (unsigned long long)done, (unsigned long long)all, what);
    } else {
        (void)fprintf(stderr, "\r\x1b[K%llu %s", (unsigned long long)done, what);
    }
    (void)fflush(stderr);
}

void cli_progress_end(cli_progress *p)
{
    if (p->shown) {
        (void)fputs("\r\x1b[K", stderr);
        (void)fflush(stderr);
    }
    p->shown = false;
}

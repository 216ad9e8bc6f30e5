/* Log lines on stderr; see log.h. */
#include "daemon/base/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define LINE_BYTES 1024

static _Atomic int log_level = SPURION_LOG_INFO; /* process-wide by nature, like stderr itself */

void spurion_log_level_set(spurion_log_level level)
{
    atomic_store(&log_level, (int)level);
}

/* Copies text, escaping what could forge a line or drive a terminal. */
static size_t escape(char *out, size_t size, const char *text)
{
    size_t n = 0;
    for (; *text && n + 5 < size; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\') {
            out[n++] = '\\';
            out[n++] = (char)c;
        } else if (c < 0x20 || c >= 0x7f) {
            n += (size_t)snprintf(out + n, size - n, "\\x%02x", c);
        } else {
            out[n++] = (char)c;
        }
    }
    out[n] = '\0';
    return n;
}

void spurion_log(spurion_log_level level, const char *id, const char *format, ...)
{
    static const char *const names[] = {"debug", "info", "warn", "error"};
    char message[LINE_BYTES / 2], escaped[LINE_BYTES - 128], line[LINE_BYTES];
    struct timespec now;
    struct tm tm;
    va_list args;
    int n;

    if ((int)level < atomic_load(&log_level)) {
        return;
    }
    va_start(args, format);
    (void)vsnprintf(message, sizeof message, format, args);
    va_end(args);
    escape(escaped, sizeof escaped, message);
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &tm);
    n = snprintf(line, sizeof line, "ts=%04d-%02d-%02dT%02d:%02d:%02d.%03ldZ level=%s id=%s msg=\"%s\"\n", tm.tm_year + 1900,
                 tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec, now.tv_nsec / 1000000, names[level], id, escaped);
    if (n > 0) {
        ssize_t ignored = write(STDERR_FILENO, line, (size_t)n < sizeof line ? (size_t)n : sizeof line - 1);
        (void)ignored;
    }
}

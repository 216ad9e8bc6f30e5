/* Bounded lines; see line_reader.h. */
#include "daemon/line_reader.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "spurion/limits.h"

#define FIRST_BYTES ((size_t)64 << 10)

void spurion_line_reader_init(spurion_line_reader *r, int fd)
{
    memset(r, 0, sizeof *r);
    r->fd = fd;
}

void spurion_line_reader_fini(spurion_line_reader *r)
{
    if (r) {
        free(r->buffer);
        memset(r, 0, sizeof *r);
    }
}

static char *line_end(const spurion_line_reader *r)
{
    size_t from = r->start + r->searched;
    return r->end > from ? memchr(r->buffer + from, '\n', r->end - from) : NULL;
}

bool spurion_line_would_wait(const spurion_line_reader *r)
{
    struct pollfd p = {.fd = r->fd, .events = POLLIN};
    return !r->ended && !line_end(r) && poll(&p, 1, 0) == 0;
}

/* Makes room and reads once. */
static spurion_status fill(spurion_line_reader *r)
{
    ssize_t got;

    if (r->start) {
        memmove(r->buffer, r->buffer + r->start, r->end - r->start);
        r->end -= r->start;
        r->start = 0;
    }
    if (r->end == r->capacity) {
        size_t capacity = r->capacity ? r->capacity * 2 : FIRST_BYTES;
        char *buffer = realloc(r->buffer, capacity);
        if (!buffer) {
            return spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected memory for a line of input, found none");
        }
        r->buffer = buffer;
        r->capacity = capacity;
    }
    do {
        got = read(r->fd, r->buffer + r->end, r->capacity - r->end);
    } while (got < 0 && errno == EINTR);
    if (got < 0) {
        return spurion_error(SPURION_UNAVAILABLE, "expected input, found: %s", strerror(errno));
    }
    r->ended = got == 0;
    r->end += (size_t)got;
    return spurion_ok();
}

/* Takes size bytes and the line end after them, if any, out of the buffer. */
static void take(spurion_line *out, spurion_line_reader *r, size_t size, size_t with_end)
{
    *out = (spurion_line){r->buffer + r->start, size, r->skipping || size > SPURION_LINE_BYTES_MAX, false};
    r->start += with_end;
    r->searched = 0;
    r->skipping = false;
    if (out->too_long) {
        out->data = "";
        out->size = 0;
    }
}

spurion_status spurion_line_next(spurion_line *out, spurion_line_reader *r)
{
    for (;;) {
        char *end = line_end(r);
        spurion_status st;

        if (end) {
            size_t size = (size_t)(end - (r->buffer + r->start));
            take(out, r, size, size + 1);
            return spurion_ok();
        }
        if (r->ended) {
            if (r->end > r->start || r->skipping) {
                take(out, r, r->end - r->start, r->end - r->start);
            } else {
                *out = (spurion_line){"", 0, false, true};
            }
            return spurion_ok();
        }
        r->searched = r->end - r->start;
        if (r->searched > SPURION_LINE_BYTES_MAX) { /* what is too long is not kept */
            r->skipping = true;
            r->start = r->end = r->searched = 0;
        }
        st = fill(r);
        if (st.code != SPURION_OK) {
            return st;
        }
    }
}

/* Lines of a file descriptor, each with an upper bound, without looking further ahead than one read. Thread: one.
 * Memory: one buffer that grows to the longest line, at most SPURION_LINE_BYTES_MAX. */
#ifndef SPURION_LINE_READER_H
#define SPURION_LINE_READER_H

#include <stdbool.h>
#include <stddef.h>

#include "spurion/status.h"

typedef struct spurion_line_reader {
    int fd;
    char *buffer;
    size_t start, end, capacity; /* what was read and not yet given out */
    size_t searched;             /* bytes after start known to hold no line end */
    bool ended, skipping;
} spurion_line_reader;

typedef struct spurion_line {
    const char *data; /* borrowed until the next call; without the line end */
    size_t size;
    bool too_long;    /* longer than the limit: data holds nothing */
    bool none;        /* the end of the input */
} spurion_line;

void spurion_line_reader_init(spurion_line_reader *r, int fd);
void spurion_line_reader_fini(spurion_line_reader *r);
/* The next line; blocks in read(2). A last line needs no line end. UNAVAILABLE when reading fails, RESOURCE_EXHAUSTED for memory. */
spurion_status spurion_line_next(spurion_line *out, spurion_line_reader *r) SPURION_MUST_USE;
/* True when the next call may have to wait for input. */
bool spurion_line_would_wait(const spurion_line_reader *r);

#endif

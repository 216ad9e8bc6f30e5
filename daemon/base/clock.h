/* Time: monotonic for deadlines, wall clock only as data. */
#ifndef SPURION_BASE_CLOCK_H
#define SPURION_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline int64_t spurion_clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline int64_t spurion_clock_ms(void)
{
    return spurion_clock_ns() / 1000000;
}

/* Milliseconds since 1970, UTC. */
static inline int64_t spurion_clock_wall_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

#endif

/* Assertions for our own bugs: on in every build; prints the place and aborts. Bad input never comes here. */
#ifndef SPURION_BASE_CHECK_H
#define SPURION_BASE_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define SPURION_ASSERT(condition)                                                                          \
    do {                                                                                                   \
        if (!(condition)) {                                                                                \
            fprintf(stderr, "spurion: assertion failed: %s at %s:%d\n", #condition, __FILE__, __LINE__);   \
            abort();                                                                                       \
        }                                                                                                  \
    } while (0)

#endif

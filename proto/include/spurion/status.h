/* Status codes and messages shared by wire, daemon and client. Header only; compiles as C17 and C++17. */
#ifndef SPURION_STATUS_H
#define SPURION_STATUS_H

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

/* The gRPC codes, https://grpc.github.io/grpc/core/md_doc_statuscodes.html */
typedef enum spurion_code {
    SPURION_OK = 0,
    SPURION_CANCELLED = 1,
    SPURION_UNKNOWN = 2,
    SPURION_INVALID_ARGUMENT = 3,
    SPURION_DEADLINE_EXCEEDED = 4,
    SPURION_NOT_FOUND = 5,
    SPURION_ALREADY_EXISTS = 6,
    SPURION_PERMISSION_DENIED = 7,
    SPURION_RESOURCE_EXHAUSTED = 8,
    SPURION_FAILED_PRECONDITION = 9,
    SPURION_ABORTED = 10,
    SPURION_OUT_OF_RANGE = 11,
    SPURION_UNIMPLEMENTED = 12,
    SPURION_INTERNAL = 13,
    SPURION_UNAVAILABLE = 14,
    SPURION_DATA_LOSS = 15,
    SPURION_UNAUTHENTICATED = 16
} spurion_code;

#define SPURION_CODE_COUNT 17
#define SPURION_MESSAGE_BYTES 508 /* text of a status, with its NUL */

/* A result by value: no allocation, nothing to free, safe in every thread. code 0 means OK and an empty message. */
typedef struct spurion_status {
    int code;
    char message[SPURION_MESSAGE_BYTES];
} spurion_status;

#if defined(__GNUC__)
#define SPURION_MUST_USE __attribute__((warn_unused_result))
#define SPURION_PRINTF(a, b) __attribute__((format(printf, a, b)))
#else
#define SPURION_MUST_USE
#define SPURION_PRINTF(a, b)
#endif

static inline spurion_status spurion_ok(void)
{
    spurion_status s;
    s.code = SPURION_OK;
    s.message[0] = '\0';
    return s;
}

/* Makes a status with its text, once, where the fault is seen. Text longer than the buffer is cut. */
static inline SPURION_PRINTF(2, 3) spurion_status spurion_error(spurion_code code, const char *format, ...)
{
    spurion_status s;
    va_list args;
    s.code = (int)code;
    s.message[0] = '\0';
    va_start(args, format);
    (void)vsnprintf(s.message, sizeof s.message, format, args);
    va_end(args);
    return s;
}

/* Name of a code as gRPC spells it ("INVALID_ARGUMENT"); "UNKNOWN" for what is none. Never NULL. */
static inline const char *spurion_code_name(int code)
{
    static const char *const names[SPURION_CODE_COUNT] = {
        "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
        "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
        "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"};
    return code >= 0 && code < SPURION_CODE_COUNT ? names[code] : "UNKNOWN";
}

/* Runs expr; on failure jumps to the label `out`. One of the two control-flow macros of the house. */
#define SPURION_TRY(st, expr)          \
    do {                               \
        (st) = (expr);                 \
        if ((st).code != SPURION_OK) { \
            goto out;                  \
        }                              \
    } while (0)

#endif

/* Support for kernel tests: seeded numbers, device buffers between guard bands, comparisons with references in double.
 * Tests use the table of ops only, so that the same tests run on every device: SPURION_TEST_DEVICE (default "cpu").
 * One thread. Memory: buffers live until kt_close. */
#ifndef SPURION_KERNEL_TEST_H
#define SPURION_KERNEL_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "spurion/ops.h"

#define KT_BUFFERS_MAX 128

typedef struct kt {
    spurion_dev *dev;
    const spurion_ops *ops;
    uint64_t random;
    struct {
        char *base;
        size_t bytes;
    } buffers[KT_BUFFERS_MAX];
    int buffer_count;
} kt;

#define KT_OK(expr)                                                     \
    do {                                                                \
        spurion_status kt_status_ = (expr);                             \
        if (kt_status_.code != SPURION_OK) {                            \
            fail_msg("%s: %s", #expr, kt_status_.message);              \
        }                                                               \
    } while (0)

/* Opens the device under test. Skips the test, visibly, where the environment asks for what this machine does not have. */
void kt_open(kt *t, spurion_dtype dtype, int threads);
/* Whether the device under test is the CPU (else: cuda:N, a real or an emulated one). */
bool kt_on_cpu(void);
/* Checks every guard band and gives everything back. */
void kt_close(kt *t);

/* --- numbers --- */
void kt_seed(kt *t, uint64_t seed);
double kt_uniform(kt *t);                       /* 0 <= u < 1 */
double kt_normal(kt *t);
int kt_below(kt *t, int n);                     /* 0 .. n - 1 */
float *kt_floats(kt *t, size_t n, double sd);   /* host, normal; free() it */
float kt_round(float x, spurion_dtype dtype);   /* to the nearest value of dtype */
/* Rounds in place to values that dtype holds, so that reference and op begin with the same numbers. */
void kt_round_all(float *x, size_t n, spurion_dtype dtype);

/* Activations in double, and their slopes by finite differences. */
double kt_act(double x, spurion_act_kind kind);
double kt_act_slope(double x, spurion_act_kind kind);

/* --- device buffers --- */
void *kt_out(kt *t, size_t bytes);                       /* poisoned with NaN */
void *kt_in(kt *t, const void *host, size_t bytes);
void *kt_in_act(kt *t, const float *host, size_t n);     /* as the device's dtype */
void *kt_in_typed(kt *t, const float *host, size_t n, spurion_dtype dtype);
void kt_read(kt *t, void *host, const void *buffer, size_t bytes);
float *kt_read_floats(kt *t, const void *buffer, size_t n); /* free() it */
float *kt_read_act(kt *t, const void *buffer, size_t n);    /* widened; free() it */

/* --- comparisons --- */
typedef struct kt_tolerance {
    double nmse;  /* sum (got - want)^2 / sum want^2 */
    double worst; /* largest |got - want| / rms(want) */
} kt_tolerance;

/* Tolerances: f32 results of sums of a few thousand terms, and the same rounded once to bf16 (half an ulp is up to 2^-8 of the value: 1.53e-5 squared). */
kt_tolerance kt_tolerance_f32(void);
kt_tolerance kt_tolerance_act(const kt *t);

/* Fails with both tensors' worst places when got is not near want. want must not be all zero. */
void kt_near(const char *name, const float *got, const double *want, size_t n, kt_tolerance tolerance);
void kt_same_bits(const char *name, const void *a, const void *b, size_t bytes);

#define KT_COUNT(a) (sizeof(a) / sizeof((a)[0]))

#endif

/* Support for kernel tests: see kernel_test.h. */
#include "kernel_test.h"

#include <math.h>

#define GUARD 256
#define GUARD_BYTE 0xa5
#define POISON_BYTE 0xff /* NaN as f32 and as bf16; -1 as an index */

void kt_open(kt *t, spurion_dtype dtype, int threads)
{
    const char *device = getenv("SPURION_TEST_DEVICE");
    memset(t, 0, sizeof *t);
    spurion_status st = spurion_dev_create(&t->dev, device == NULL ? "cpu" : device, dtype, threads);
    if (st.code != SPURION_OK) {
        if (getenv("SPURION_CPU_ISA") != NULL && st.code == SPURION_INVALID_ARGUMENT) {
            printf("SKIP: %s\n", st.message);
            skip();
        }
        fail_msg("device: %s", st.message);
    }
    t->ops = t->dev->ops;
    kt_seed(t, 20261121);
}

bool kt_on_cpu(void)
{
    const char *device = getenv("SPURION_TEST_DEVICE");
    return device == NULL || strcmp(device, "cpu") == 0;
}

static void check_guards(kt *t, int i)
{
    unsigned char guard[2 * GUARD];
    KT_OK(t->ops->download(t->dev, guard, t->buffers[i].base, GUARD));
    KT_OK(t->ops->download(t->dev, guard + GUARD, t->buffers[i].base + GUARD + t->buffers[i].bytes, GUARD));
    for (int b = 0; b < 2 * GUARD; b++) {
        if (guard[b] != GUARD_BYTE) {
            fail_msg("buffer %d of %zu bytes: byte %d %s it was overwritten", i, t->buffers[i].bytes, b < GUARD ? GUARD - b : b - GUARD,
                     b < GUARD ? "before" : "behind");
        }
    }
}

void kt_close(kt *t)
{
    for (int i = 0; i < t->buffer_count; i++) {
        check_guards(t, i);
        t->ops->free(t->dev, t->buffers[i].base);
    }
    spurion_dev_destroy(t->dev);
}

/* --- numbers --- */

void kt_seed(kt *t, uint64_t seed)
{
    t->random = seed * 0x9e3779b97f4a7c15u + 1;
}

static uint64_t next_random(kt *t) /* splitmix64 */
{
    uint64_t z = t->random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

double kt_uniform(kt *t)
{
    return (double)(next_random(t) >> 11) * 0x1p-53;
}

double kt_normal(kt *t)
{
    double u = 1.0 - kt_uniform(t), v = kt_uniform(t);
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

int kt_below(kt *t, int n)
{
    return (int)(next_random(t) % (uint64_t)n);
}

float *kt_floats(kt *t, size_t n, double sd)
{
    float *x = malloc((n == 0 ? 1 : n) * sizeof *x);
    assert_non_null(x);
    for (size_t i = 0; i < n; i++) {
        x[i] = (float)(sd * kt_normal(t));
    }
    return x;
}

static uint16_t to_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static float from_bf16(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

float kt_round(float x, spurion_dtype dtype)
{
    return dtype == SPURION_BF16 ? from_bf16(to_bf16(x)) : x;
}

void kt_round_all(float *x, size_t n, spurion_dtype dtype)
{
    for (size_t i = 0; i < n; i++) {
        x[i] = kt_round(x[i], dtype);
    }
}

/* --- buffers --- */

static void *buffer_new(kt *t, const void *host, size_t bytes)
{
    void *base;
    char *image = malloc(bytes + 2 * GUARD);
    assert_non_null(image);
    assert_true(t->buffer_count < KT_BUFFERS_MAX);
    memset(image, GUARD_BYTE, bytes + 2 * GUARD);
    if (host == NULL) {
        memset(image + GUARD, POISON_BYTE, bytes);
    } else {
        memcpy(image + GUARD, host, bytes);
    }
    KT_OK(t->ops->alloc(t->dev, &base, bytes + 2 * GUARD));
    KT_OK(t->ops->upload(t->dev, base, image, bytes + 2 * GUARD));
    free(image);
    t->buffers[t->buffer_count].base = base;
    t->buffers[t->buffer_count++].bytes = bytes;
    return (char *)base + GUARD;
}

double kt_act(double x, spurion_act_kind kind)
{
    switch (kind) {
    case SPURION_ACT_GELU_TANH:
        return 0.5 * x * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    case SPURION_ACT_GELU_ERF:
        return 0.5 * x * (1 + erf(x / sqrt(2)));
    case SPURION_ACT_SILU:
        return x / (1 + exp(-x));
    default:
        return x > 0 ? x : 0;
    }
}

double kt_act_slope(double x, spurion_act_kind kind)
{
    double h = 1e-6;
    return kind == SPURION_ACT_RELU ? x > 0 : (kt_act(x + h, kind) - kt_act(x - h, kind)) / (2 * h);
}

void *kt_out(kt *t, size_t bytes)
{
    return buffer_new(t, NULL, bytes);
}

void *kt_in(kt *t, const void *host, size_t bytes)
{
    return buffer_new(t, host, bytes);
}

void *kt_in_typed(kt *t, const float *host, size_t n, spurion_dtype dtype)
{
    if (dtype == SPURION_F32) {
        return kt_in(t, host, n * sizeof *host);
    }
    uint16_t *h = malloc((n == 0 ? 1 : n) * sizeof *h);
    assert_non_null(h);
    for (size_t i = 0; i < n; i++) {
        h[i] = to_bf16(host[i]);
    }
    void *p = kt_in(t, h, n * sizeof *h);
    free(h);
    return p;
}

void *kt_in_act(kt *t, const float *host, size_t n)
{
    return kt_in_typed(t, host, n, t->dev->dtype);
}

void kt_read(kt *t, void *host, const void *buffer, size_t bytes)
{
    KT_OK(t->ops->download(t->dev, host, buffer, bytes));
}

float *kt_read_floats(kt *t, const void *buffer, size_t n)
{
    float *x = malloc((n == 0 ? 1 : n) * sizeof *x);
    assert_non_null(x);
    kt_read(t, x, buffer, n * sizeof *x);
    return x;
}

float *kt_read_act(kt *t, const void *buffer, size_t n)
{
    if (t->dev->dtype == SPURION_F32) {
        return kt_read_floats(t, buffer, n);
    }
    uint16_t *h = malloc((n == 0 ? 1 : n) * sizeof *h);
    float *x = malloc((n == 0 ? 1 : n) * sizeof *x);
    assert_non_null(h);
    assert_non_null(x);
    kt_read(t, h, buffer, n * sizeof *h);
    for (size_t i = 0; i < n; i++) {
        x[i] = from_bf16(h[i]);
    }
    free(h);
    return x;
}

/* --- comparisons --- */

kt_tolerance kt_tolerance_f32(void)
{
    return (kt_tolerance){1e-11, 1e-4};
}

kt_tolerance kt_tolerance_act(const kt *t)
{
    return t->dev->dtype == SPURION_BF16 ? (kt_tolerance){1.6e-5, 4e-2} : kt_tolerance_f32();
}

void kt_near(const char *name, const float *got, const double *want, size_t n, kt_tolerance tolerance)
{
    double error = 0, power = 0, worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        double e = fabs((double)got[i] - want[i]);
        error += e * e;
        power += want[i] * want[i];
        if (!(e <= worst)) { /* NaN is the worst */
            worst = e;
            at = i;
        }
    }
    if (n == 0) {
        return;
    }
    if (!(power > 0)) {
        fail_msg("%s: the reference is all zero", name);
    }
    double rms = sqrt(power / (double)n);
    if (!(error / power <= tolerance.nmse) || !(worst / rms <= tolerance.worst)) {
        for (size_t i = at < 2 ? 0 : at - 2; i < n && i < at + 3; i++) {
            print_error("  [%zu] got %.9g, want %.9g\n", i, (double)got[i], want[i]);
        }
        fail_msg("%s: nmse %.3g (limit %.3g), worst element %zu off by %.3g rms (limit %.3g)", name, error / power, tolerance.nmse, at,
                 worst / rms, tolerance.worst);
    }
}

void kt_same_bits(const char *name, const void *a, const void *b, size_t bytes)
{
    const unsigned char *x = a, *y = b;
    for (size_t i = 0; i < bytes; i++) {
        if (x[i] != y[i]) {
            fail_msg("%s: not bit-equal, first at byte %zu of %zu", name, i, bytes);
        }
    }
}

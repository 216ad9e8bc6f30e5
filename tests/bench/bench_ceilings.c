/* What this machine can do, for the roofline: oneDNN in a tight loop at given shapes, and memory bandwidth.
 *   bench_ceilings THREADS [SECONDS M,N,K,f32|bf16 ...]
 * One JSON object on stdout: copy_gbs (bytes read + bytes written, of blocks no cache holds), read_gbs, and for each shape the best and the
 * median GFLOP/s of runs over SECONDS (0.3). Weights are prepacked; a product's operands stay in cache if they fit, as in any tight loop. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "onednn_loop.h"

extern void omp_set_num_threads(int n);

enum { BLOCK_BYTES = 128 << 20, PASSES = 6, RUNS_MAX = 4096, THREADS_MAX = 256 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *must_alloc(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p) {
        fprintf(stderr, "bench_ceilings: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    memset(p, 0, bytes);
    return p;
}

/* --- bandwidth: every thread has blocks of its own; a pass begins when all are there --- */

typedef struct mover {
    pthread_t thread;
    pthread_barrier_t *barrier;
    char *from, *to;
    uint64_t sum; /* of what was read, so that it is read */
    double seconds[2][PASSES];
} mover;

static uint64_t read_block(const char *data)
{
    const uint64_t *words = (const uint64_t *)(const void *)data;
    uint64_t sum[8] = {0};
    for (size_t i = 0; i < BLOCK_BYTES / sizeof *words; i += 8) {
        for (size_t j = 0; j < 8; j++) {
            sum[j] += words[i + j];
        }
    }
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

static void *move(void *context)
{
    mover *m = context;

    m->from = must_alloc(BLOCK_BYTES);
    m->to = must_alloc(BLOCK_BYTES);
    for (int i = 0; i < PASSES; i++) {
        pthread_barrier_wait(m->barrier);
        double t0 = now();
        memcpy(m->to, m->from, BLOCK_BYTES);
        pthread_barrier_wait(m->barrier);
        double t1 = now();
        m->sum += read_block(m->to);
        pthread_barrier_wait(m->barrier);
        m->seconds[0][i] = t1 - t0;
        m->seconds[1][i] = now() - t1;
    }
    free(m->from);
    free(m->to);
    return NULL;
}

static void bandwidth(int threads)
{
    mover *movers = calloc((size_t)threads, sizeof *movers);
    pthread_barrier_t barrier;
    double best[2] = {1e9, 1e9};

    if (!movers || pthread_barrier_init(&barrier, NULL, (unsigned)threads) != 0) {
        exit(1);
    }
    for (int i = 0; i < threads; i++) {
        movers[i].barrier = &barrier;
        if (pthread_create(&movers[i].thread, NULL, move, &movers[i]) != 0) {
            exit(1);
        }
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(movers[i].thread, NULL);
    }
    for (int i = 1; i < PASSES; i++) {
        for (int k = 0; k < 2; k++) {
            best[k] = movers[0].seconds[k][i] < best[k] ? movers[0].seconds[k][i] : best[k];
        }
    }
    printf("\"copy_gbs\":%.3f,\"read_gbs\":%.3f", 2e-9 * threads * BLOCK_BYTES / best[0], 1e-9 * threads * BLOCK_BYTES / best[1]);
    pthread_barrier_destroy(&barrier);
    free(movers);
}

/* --- products --- */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void product(int M, int N, int K, const char *type, double seconds)
{
    dnnl_data_type_t dtype = strcmp(type, "bf16") == 0 ? dnnl_bf16 : dnnl_f32;
    void *x = must_alloc((size_t)M * (size_t)K * (dtype == dnnl_bf16 ? 2 : 4));
    float *out = must_alloc((size_t)M * (size_t)N * sizeof *out);
    double *taken = must_alloc(RUNS_MAX * sizeof *taken), flops = 2e-9 * M * N * K, end;
    onednn_loop l;
    int runs = 0;

    onednn_loop_open(&l, M, N, K, dtype, x, out);
    onednn_loop_run(&l);
    end = now() + seconds;
    do {
        double start = now();
        onednn_loop_run(&l);
        taken[runs++] = now() - start;
    } while (runs < RUNS_MAX && (runs < 5 || now() < end));
    qsort(taken, (size_t)runs, sizeof *taken, by_value);
    printf("{\"m\":%d,\"n\":%d,\"k\":%d,\"dtype\":\"%s\",\"gflops\":%.3f,\"gflops_median\":%.3f,\"runs\":%d}", M, N, K, type, flops / taken[0],
           flops / taken[runs / 2], runs);
    onednn_loop_close(&l);
    free(x);
    free(out);
    free(taken);
}

int main(int argc, char **argv)
{
    int threads = argc > 1 ? atoi(argv[1]) : 0;
    double seconds = argc > 2 ? atof(argv[2]) : 0.3;

    if (threads < 1 || threads > THREADS_MAX) {
        fprintf(stderr, "usage: bench_ceilings THREADS [SECONDS M,N,K,f32|bf16 ...]\n");
        return 64;
    }
    omp_set_num_threads(threads);
    printf("{\"threads\":%d,", threads);
    bandwidth(threads);
    printf(",\"gemm\":[");
    for (int i = 3; i < argc; i++) {
        int M, N, K;
        char type[8];
        if (sscanf(argv[i], "%d,%d,%d,%7s", &M, &N, &K, type) != 4 || M < 1 || N < 1 || K < 1 || (strcmp(type, "f32") != 0 && strcmp(type, "bf16") != 0)) {
            fprintf(stderr, "bench_ceilings: expected M,N,K,f32 or M,N,K,bf16, found '%s'\n", argv[i]);
            return 64;
        }
        printf("%s", i > 3 ? "," : "");
        product(M, N, K, type, seconds);
    }
    printf("]}\n");
    return 0;
}

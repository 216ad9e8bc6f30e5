/* Rates of the ops that carry the engine, at the shapes of a 135M Llama (d 576, 9 heads over 3 of 64, MLP 1536) and its SAE (24,576).
 *   bench_kernels [threads [T [f32|bf16|both]]]
 * With one thread time is the process's CPU time, which other programs on the cores do not add to; else it is wall time.
 * Products are compared with the library's own: one oneDNN inner product over all rows, weights prepacked, as many OpenMP threads.
 * Each figure is the best of several runs (the machine may be shared), the two sides of a comparison taking turns. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "onednn_loop.h"
#include "spurion/ops.h"

extern void omp_set_num_threads(int n);

enum { ROUNDS = 15 };

static clockid_t bench_clock = CLOCK_MONOTONIC;

static double now(void)
{
    struct timespec t;
    clock_gettime(bench_clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void must(spurion_status st)
{
    if (st.code != SPURION_OK) {
        fprintf(stderr, "bench_kernels: %s\n", st.message);
        exit(1);
    }
}

static void *device(spurion_dev *dev, size_t bytes)
{
    void *p;
    must(dev->ops->alloc(dev, &p, bytes));
    memset(p, 0, bytes);
    return p;
}

/* Small numbers of both signs, as f32 or bf16. */
static void *numbers(spurion_dev *dev, size_t n, spurion_dtype dtype, float scale)
{
    void *p = device(dev, n * spurion_dtype_bytes(dtype));
    uint32_t s = 12345;
    for (size_t i = 0; i < n; i++) {
        s = s * 1664525 + 1013904223;
        float x = ((float)(s >> 8) / 8388608.0f - 1.0f) * scale;
        if (dtype == SPURION_F32) {
            ((float *)p)[i] = x;
        } else {
            uint32_t u;
            memcpy(&u, &x, 4);
            ((uint16_t *)p)[i] = (uint16_t)(u >> 16);
        }
    }
    return p;
}

/* --- products --- */

static void bench_product(spurion_dev *dev, int T, int N, int K, const char *what)
{
    spurion_matrix *m;
    onednn_loop l;
    float *w = numbers(dev, (size_t)N * (size_t)K, SPURION_F32, 0.05f), *out = device(dev, (size_t)T * (size_t)N * 4);
    void *x = numbers(dev, (size_t)T * (size_t)K, dev->dtype, 1.0f);
    double ours = 1e9, theirs = 1e9;
    must(dev->ops->matrix_create(dev, &m, w, NULL, N, K, SPURION_FORWARD, dev->dtype));
    onednn_loop_open(&l, T, N, K, dev->dtype == SPURION_BF16 ? dnnl_bf16 : dnnl_f32, x, out);
    for (int i = 0; i < ROUNDS; i++) {
        double t0 = now();
        must(dev->ops->linear(dev, out, SPURION_F32, N, x, m, T, SPURION_OVERWRITE));
        double t1 = now();
        omp_set_num_threads(dev->thread_count);
        onednn_loop_run(&l);
        double t2 = now();
        ours = t1 - t0 < ours ? t1 - t0 : ours;
        theirs = t2 - t1 < theirs ? t2 - t1 : theirs;
    }
    double flops = 2.0 * T * N * K * 1e-9;
    printf("product %-9s T %5d (%5d, %5d)  %7.1f GFLOP/s  oneDNN %7.1f  ratio %.2f  %8.3f ms\n", what, T, N, K, flops / ours, flops / theirs,
           theirs / ours, ours * 1e3);
    onednn_loop_close(&l);
    dev->ops->matrix_destroy(dev, m);
    dev->ops->free(dev, w), dev->ops->free(dev, out), dev->ops->free(dev, x);
}

/* --- attention: a prompt of P and 8 completions of C --- */

static void bench_attention(spurion_dev *dev, int P, int C, int group, spurion_attention_shape shape)
{
    int rows = P + group * C;
    size_t q_size = (size_t)rows * (size_t)(shape.heads * shape.head_dim), kv_size = (size_t)rows * (size_t)(shape.kv_heads * shape.head_dim);
    void *q = numbers(dev, q_size, dev->dtype, 1.0f), *k = numbers(dev, kv_size, dev->dtype, 1.0f), *v = numbers(dev, kv_size, dev->dtype, 1.0f),
         *out = device(dev, q_size * 4);
    float *lse = device(dev, (size_t)(rows * shape.heads) * 4), *dout = numbers(dev, q_size, SPURION_F32, 1.0f), *dq = device(dev, q_size * 4),
          *dk = device(dev, kv_size * 4), *dv = device(dev, kv_size * 4);
    spurion_seq seqs[65] = {{.q_count = P, .piece_count = 1}};
    double forward = 1e9, backward = 1e9, flops[2] = {0};
    for (int g = 0; g < group; g++) {
        int row = P + g * C;
        seqs[1 + g] = (spurion_seq){.q_row = row, .q_count = C, .q_position = P, .piece_count = 2, .piece_row = {0, row},
                                    .piece_position = {0, P}, .dkv_row = row, .dkv_position = P};
    }
    for (int i = 0; i < ROUNDS; i++) {
        memset(&dev->profile, 0, sizeof dev->profile);
        double t0 = now();
        must(dev->ops->attention(dev, out, lse, q, k, v, seqs, 1 + group, shape));
        double t1 = now();
        flops[0] = dev->profile.flops[SPURION_CLASS_ATTENTION];
        must(dev->ops->attention_backward(dev, dq, dk, dv, shape.kv_heads * shape.head_dim, dout, SPURION_F32, out, lse, q, k, v, seqs + 1, group, shape));
        double t2 = now();
        flops[1] = dev->profile.flops[SPURION_CLASS_ATTENTION] - flops[0];
        forward = t1 - t0 < forward ? t1 - t0 : forward;
        backward = t2 - t1 < backward ? t2 - t1 : backward;
    }
    printf("attention P %4d C %4d x%2d heads %2d/%d hd %3d  forward %7.1f GFLOP/s %8.3f ms  backward %7.1f GFLOP/s %8.3f ms\n", P, C, group,
           shape.heads, shape.kv_heads, shape.head_dim, flops[0] * 1e-9 / forward, forward * 1e3, flops[1] * 1e-9 / backward, backward * 1e3);
    void *all[] = {q, k, v, out, lse, dout, dq, dk, dv};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        dev->ops->free(dev, all[i]);
    }
}

/* --- SAE --- */

static void bench_sae(spurion_dev *dev, int T, int d, int F, spurion_sae_kind kind, int k, spurion_dtype dtype, const char *what)
{
    spurion_sae_weights sae = {.d = d, .F = F, .kind = kind, .k = k, .slots = kind == SPURION_SAE_TOPK ? k : 512};
    float *w = numbers(dev, (size_t)F * (size_t)d, SPURION_F32, 0.05f), *bias = numbers(dev, (size_t)F, SPURION_F32, 0.1f),
          *x = numbers(dev, (size_t)T * (size_t)d, SPURION_F32, 1.0f), *threshold = device(dev, (size_t)F * 4);
    for (int i = 0; i < F; i++) {
        threshold[i] = 2.0f;
    }
    size_t n = (size_t)T * (size_t)sae.slots;
    spurion_sparse f = {device(dev, (size_t)T * 4), device(dev, n * 4), device(dev, n * 4), device(dev, (size_t)T * 4), device(dev, (size_t)T * 4),
                        sae.slots};
    double encode = 1e9, attribute = 1e9;
    must(dev->ops->matrix_create(dev, &sae.enc, w, bias, F, d, SPURION_FORWARD, dtype));
    sae.dec = w;
    sae.threshold = threshold;
    float *out = device(dev, n * 4);
    void *scratch = device(dev, dev->ops->sae_scratch_bytes(dev, &sae, T));
    for (int i = 0; i < ROUNDS / 3; i++) {
        double t0 = now();
        must(dev->ops->sae_encode(dev, &f, &sae, x, scratch, T));
        double t1 = now();
        must(dev->ops->sae_attribute(dev, out, &f, &sae, x, T));
        double t2 = now();
        encode = t1 - t0 < encode ? t1 - t0 : encode;
        attribute = t2 - t1 < attribute ? t2 - t1 : attribute;
    }
    printf("sae %-13s T %5d (%5d, %4d)  encode %7.1f GFLOP/s %8.3f ms  attribute %8.3f ms  active %d\n", what, T, F, d,
           2e-9 * T * F * d / encode, encode * 1e3, attribute * 1e3, f.count[0]);
    dev->ops->matrix_destroy(dev, sae.enc);
    void *all[] = {w, bias, x, threshold, f.count, f.index, f.value, f.token_scale, f.token_shift, out, scratch};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        dev->ops->free(dev, all[i]);
    }
}

/* --- rows --- */

static void bench_rows(spurion_dev *dev, int T)
{
    enum { D = 576, F = 1536 };
    float *x = numbers(dev, (size_t)T * 2 * F, SPURION_F32, 1.0f), *w = numbers(dev, D, SPURION_F32, 1.0f), *dout = device(dev, (size_t)T * F * 4);
    float *table = device(dev, (size_t)T * 64 * 4);
    void *act = device(dev, (size_t)T * 2 * F * 4);
    int32_t *positions = device(dev, (size_t)T * 4);
    double best[5] = {1e9, 1e9, 1e9, 1e9, 1e9};
    for (int i = 0; i < ROUNDS; i++) {
        double t[6] = {now()};
        must(dev->ops->norm(dev, act, NULL, D, NULL, x, D, w, NULL, (spurion_rows){T, 1, D}, 1e-5f, SPURION_NORM_RMS, SPURION_OVERWRITE));
        t[1] = now();
        must(dev->ops->rope(dev, act, D, x, SPURION_F32, D, positions, table, (spurion_rows){T, 9, 64}, 64, SPURION_ROPE_HALF, 0));
        t[2] = now();
        must(dev->ops->activation(dev, act, x, SPURION_F32, T, F, SPURION_ACT_SILU, 1));
        t[3] = now();
        must(dev->ops->activation_backward(dev, act, x, dout, SPURION_F32, T, F, SPURION_ACT_SILU, 1));
        t[4] = now();
        must(dev->ops->cast(dev, act, D, x, SPURION_F32, D, T, D));
        t[5] = now();
        for (int k = 0; k < 5; k++) {
            best[k] = t[k + 1] - t[k] < best[k] ? t[k + 1] - t[k] : best[k];
        }
    }
    printf("rows T %5d  norm %.3f ms  rope %.3f  activation %.3f  backward %.3f  cast %.3f\n", T, best[0] * 1e3, best[1] * 1e3, best[2] * 1e3,
           best[3] * 1e3, best[4] * 1e3);
    void *all[] = {x, w, dout, table, act, positions};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        dev->ops->free(dev, all[i]);
    }
}

static void bench(spurion_dtype dtype, int threads, int T)
{
    static const struct {
        int N, K;
        const char *what;
    } products[] = {{576, 576, "q, o"}, {384, 576, "k, v"}, {3072, 576, "gate, up"}, {576, 1536, "down"}, {24576, 576, "sae"}};
    spurion_dev *dev;
    must(spurion_dev_create(&dev, "cpu", dtype, threads));
    printf("%s, %s\n", dev->name, dtype == SPURION_BF16 ? "bf16" : "f32");
    for (size_t i = 0; i < sizeof products / sizeof products[0]; i++) {
        bench_product(dev, T, products[i].N, products[i].K, products[i].what);
    }
    bench_product(dev, 8, 576, 576, "few rows");
    bench_product(dev, 64, 3072, 576, "few rows");
    bench_attention(dev, 256, 256, 8, (spurion_attention_shape){9, 3, 64, 0.125f, 0, 0});
    bench_attention(dev, 1024, 256, 8, (spurion_attention_shape){9, 3, 64, 0.125f, 0, 0});
    bench_attention(dev, 64, 512, 1, (spurion_attention_shape){9, 3, 64, 0.125f, 0, 0});
    bench_attention(dev, 256, 256, 8, (spurion_attention_shape){12, 12, 64, 0.125f, 0, 0});
    bench_attention(dev, 256, 256, 2, (spurion_attention_shape){16, 8, 128, 0.1f, 0, 0});
    bench_sae(dev, T, 576, 24576, SPURION_SAE_TOPK, 64, dtype, "top 64");
    bench_sae(dev, T, 576, 24576, SPURION_SAE_JUMPRELU, 0, dtype, "jumprelu");
    bench_sae(dev, 16, 576, 24576, SPURION_SAE_TOPK, 64, dtype, "top 64, few");
    bench_rows(dev, T);
    spurion_dev_destroy(dev);
}

int main(int argc, char **argv)
{
    int threads = argc > 1 ? atoi(argv[1]) : 0, T = argc > 2 ? atoi(argv[2]) : 2304;
    const char *what = argc > 3 ? argv[3] : "both";
    bench_clock = threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC;
    if (strcmp(what, "f32") != 0) {
        bench(SPURION_BF16, threads, T);
    }
    if (strcmp(what, "bf16") != 0) {
        bench(SPURION_F32, threads, T);
    }
    return 0;
}

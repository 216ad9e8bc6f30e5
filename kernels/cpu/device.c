/* The CPU device: which instruction set, how many workers, and each worker's scratch memory.
 * SPURION_CPU_ISA=portable|avx2|avx512 lowers the instruction set (tests of the other paths; bit-equality with an older machine).
 * Thread: engine. Memory: scratch grows when a matrix is made, never inside an op. */
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/cpu/amx.h"
#include "kernels/cpu/cpu.h"

double spurion_cpu_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void spurion_cpu_count(spurion_dev *dev, spurion_op_class class_, double start, double flops, double bytes)
{
    spurion_profile *p = &dev->profile;
    p->seconds[class_] += spurion_cpu_now() - start;
    p->flops[class_] += flops;
    p->bytes[class_] += bytes;
    p->calls[class_]++;
}

static spurion_cpu_isa machine_isa(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        return SPURION_ISA_AVX512;
    }
    return avx2 ? SPURION_ISA_AVX2 : SPURION_ISA_PORTABLE;
#else
    return SPURION_ISA_PORTABLE;
#endif
}

/* The machine's best, or the lower one that the environment asks for. */
static spurion_status choose_isa(spurion_cpu_isa *out)
{
    static const char *const names[SPURION_ISA_COUNT] = {"portable", "avx2", "avx512"};
    const char *asked = getenv("SPURION_CPU_ISA");
    *out = machine_isa();
    if (asked == NULL || asked[0] == '\0') {
        return spurion_ok();
    }
    for (int i = 0; i < SPURION_ISA_COUNT; i++) {
        if (strcmp(asked, names[i]) == 0 && i <= (int)*out) {
            *out = (spurion_cpu_isa)i;
            return spurion_ok();
        }
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "SPURION_CPU_ISA: expected portable, avx2 or avx512, at most this machine's %s, "
                         "found \"%.32s\"", names[*out], asked);
}

static const spurion_ops *table_of(spurion_cpu_isa isa)
{
#if defined(__x86_64__)
    if (isa == SPURION_ISA_AVX512) {
        return spurion_cpu_table_avx512();
    }
    if (isa == SPURION_ISA_AVX2) {
        return spurion_cpu_table_avx2();
    }
#else
    (void)isa;
#endif
    return spurion_cpu_table_portable();
}

const spurion_ops *spurion_ops_cpu(void)
{
    return table_of(machine_isa());
}

/* Cores this process may use. */
static int core_count(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) {
        return CPU_COUNT(&set);
    }
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

spurion_status spurion_cpu_scratch(spurion_cpu *cpu, size_t bytes)
{
    bytes = spurion_round_up(bytes, 4096);
    if (bytes <= cpu->scratch_bytes) {
        return spurion_ok();
    }
    for (int i = 0; i < cpu->dev.thread_count; i++) {
        char *p = aligned_alloc(4096, bytes);
        if (p == NULL) {
            return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %zu bytes of scratch per worker", bytes);
        }
        memset(p, 0, bytes);
        free(cpu->scratch[i]);
        cpu->scratch[i] = p;
    }
    cpu->scratch_bytes = bytes;
    return spurion_ok();
}

spurion_status spurion_dev_create_cpu(spurion_dev **out, spurion_dtype dtype, int threads)
{
    spurion_status st;
    spurion_cpu *cpu = calloc(1, sizeof *cpu);

    *out = NULL;
    if (cpu == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a CPU device");
    }
    cpu->dev.dtype = dtype;
    cpu->dev.mid = SPURION_F32; /* chunks of rows stay in the caches: half the bytes would save nothing */
    cpu->dev.row_chunk = 512; /* whole weight tiles, small enough for the second-level caches */
    cpu->dev.thread_count = threads > 0 ? threads : core_count();
    SPURION_TRY(st, choose_isa(&cpu->isa));
    cpu->dev.ops = table_of(cpu->isa);
    cpu->scratch = calloc((size_t)cpu->dev.thread_count, sizeof *cpu->scratch);
    if (cpu->scratch == NULL) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %d workers", cpu->dev.thread_count);
        goto out;
    }
    SPURION_TRY(st, spurion_cpu_scratch(cpu, SPURION_ATTENTION_SCRATCH));
    cpu->amx = cpu->isa == SPURION_ISA_AVX512 && spurion_products_amx();
    if (cpu->amx || (cpu->isa == SPURION_ISA_AVX512 && spurion_products_avx512_bf16())) {
        cpu->multiply_pairs = cpu->amx ? spurion_amx_multiply : spurion_avx512_multiply;
    }
    SPURION_TRY(st, spurion_pool_create(&cpu->pool, cpu->dev.thread_count));
    SPURION_TRY(st, spurion_products_create(&cpu->products, cpu));
    snprintf(cpu->dev.name, sizeof cpu->dev.name, "cpu %s %d threads", spurion_products_isa(cpu->products), cpu->dev.thread_count);
    *out = &cpu->dev;
    cpu = NULL;
out:
    if (cpu != NULL) {
        spurion_cpu_destroy(&cpu->dev);
    }
    return st;
}

void spurion_cpu_destroy(spurion_dev *dev)
{
    if (dev == NULL) {
        return;
    }
    spurion_cpu *cpu = spurion_cpu_of(dev);
    spurion_pool_destroy(cpu->pool);
    spurion_products_destroy(cpu->products);
    for (int i = 0; cpu->scratch != NULL && i < dev->thread_count; i++) {
        free(cpu->scratch[i]);
    }
    free(cpu->scratch);
    free(cpu);
}

/* Blocks of the CPU backend: alignment, and pages spread over memory nodes. A machine with one node is asked for that one. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernel_test.h"
#include "kernels/cpu/cpu.h"

static void test_memory_nodes_of_a_list(void **state)
{
    (void)state;
    assert_int_equal(spurion_cpu_nodes("0\n"), 1);
    assert_int_equal(spurion_cpu_nodes("0-3\n"), 15);
    assert_int_equal(spurion_cpu_nodes("0-1,4,6-7"), 0xd3);
    assert_int_equal(spurion_cpu_nodes("63-70"), (uint64_t)1 << 63);
    assert_int_equal(spurion_cpu_nodes(""), 0);
}

static void test_memory_blocks_are_aligned(void **state)
{
    (void)state;
    for (size_t bytes = 0; bytes < (size_t)40 << 20; bytes = bytes * 3 + 1) {
        unsigned char *p = spurion_cpu_block(bytes);
        assert_non_null(p);
        assert_int_equal((uintptr_t)p % (bytes >= (size_t)4 << 20 ? (size_t)2 << 20 : 64), 0);
        memset(p, 1, bytes);
        free(p);
    }
}

/* What /proc/self/numa_maps says of the mapping that begins at p. */
static bool said_interleaved(const void *p)
{
    char line[4096], start[32];
    bool found = false;
    FILE *f = fopen("/proc/self/numa_maps", "r");
    (void)snprintf(start, sizeof start, "%lx ", (unsigned long)(uintptr_t)p);
    while (f != NULL && fgets(line, sizeof line, f) != NULL) {
        found |= strncmp(line, start, strlen(start)) == 0 && strstr(line, "interleave:0") != NULL;
    }
    if (f != NULL) {
        fclose(f);
    }
    return found;
}

static void test_memory_is_spread_over_nodes(void **state)
{
    size_t bytes = (size_t)8 << 20;
    void *p = spurion_cpu_block(bytes);
    (void)state;
    assert_non_null(p);
    if (!spurion_cpu_spread(p, bytes, 1)) {
        free(p);
        printf("skip: this kernel or container does not let memory be bound to nodes\n");
        skip();
    }
    memset(p, 1, bytes);
    assert_true(said_interleaved(p));
    assert_false(spurion_cpu_spread(p, bytes, (uint64_t)1 << 62)); /* no such node */
    free(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_memory_nodes_of_a_list),
        cmocka_unit_test(test_memory_blocks_are_aligned),
        cmocka_unit_test(test_memory_is_spread_over_nodes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

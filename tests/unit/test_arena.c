/* The bump allocator: alignment, zeroes, budget, reset, overflow. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

#include "daemon/base/arena.h"

static void test_arena_gives_aligned_zeroed_memory(void **state)
{
    spurion_arena a;

    (void)state;
    spurion_arena_init(&a, 0);
    for (size_t round = 0; round < 2; round++) { /* the second round gets memory that was written to */
        for (size_t size = 0; size < 3000; size += 17) {
            unsigned char *p = spurion_arena_take(&a, size);
            assert_non_null(p);
            assert_int_equal((uintptr_t)p % 64, 0);
            for (size_t i = 0; i < size; i++) {
                assert_int_equal(p[i], 0);
            }
            memset(p, 0xa5, size);
        }
        spurion_arena_reset(&a);
    }
    spurion_arena_fini(&a);
}

static void test_arena_keeps_blocks_apart(void **state)
{
    spurion_arena a;
    unsigned char *blocks[200];

    (void)state;
    spurion_arena_init(&a, 0);
    for (int i = 0; i < 200; i++) {
        size_t size = i % 7 == 0 ? 300000 : 100; /* larger than a chunk, and many in one */
        blocks[i] = spurion_arena_take(&a, size);
        assert_non_null(blocks[i]);
        memset(blocks[i], i, size);
    }
    for (int i = 0; i < 200; i++) {
        size_t size = i % 7 == 0 ? 300000 : 100;
        for (size_t k = 0; k < size; k += 99) {
            assert_int_equal(blocks[i][k], i);
        }
    }
    spurion_arena_fini(&a);
}

static void test_arena_stops_at_its_budget(void **state)
{
    spurion_arena a;

    (void)state;
    spurion_arena_init(&a, 4096);
    assert_null(spurion_arena_take(&a, 4097));
    assert_non_null(spurion_arena_take(&a, 2048));
    assert_non_null(spurion_arena_take(&a, 2048));
    assert_null(spurion_arena_take(&a, 1));
    assert_int_equal(a.bytes_used, 4096);
    spurion_arena_reset(&a);
    assert_int_equal(a.bytes_used, 0);
    assert_non_null(spurion_arena_take(&a, 4096));
    spurion_arena_fini(&a);
}

static void test_arena_refuses_sizes_that_overflow(void **state)
{
    spurion_arena a;

    (void)state;
    spurion_arena_init(&a, 0);
    assert_null(spurion_arena_take(&a, SIZE_MAX));
    assert_null(spurion_arena_take(&a, SIZE_MAX - 63));
    assert_null(spurion_arena_take_array(&a, SIZE_MAX / 8 + 1, 8));
    assert_null(spurion_arena_copy(&a, "x", SIZE_MAX));
    assert_non_null(spurion_arena_take_array(&a, 8, 8));
    spurion_arena_fini(&a);
}

static void test_arena_copies_end_with_nul(void **state)
{
    spurion_arena a;
    const char *copy;

    (void)state;
    spurion_arena_init(&a, 0);
    copy = spurion_arena_copy(&a, "abcdef", 3);
    assert_string_equal(copy, "abc");
    assert_string_equal(spurion_arena_copy(&a, NULL, 0), "");
    assert_string_equal(spurion_arena_printf(&a, "%s-%05d", copy, 42), "abc-00042");
    spurion_arena_fini(&a);
    spurion_arena_fini(&a); /* a second end is harmless */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_arena_gives_aligned_zeroed_memory), cmocka_unit_test(test_arena_keeps_blocks_apart),
        cmocka_unit_test(test_arena_stops_at_its_budget),         cmocka_unit_test(test_arena_refuses_sizes_that_overflow),
        cmocka_unit_test(test_arena_copies_end_with_nul),
    };
    return cmocka_run_group_tests_name("arena", tests, NULL, NULL);
}

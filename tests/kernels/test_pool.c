/* The pool runs every item once, whatever the number of workers, and many jobs one behind the other. */
#include "kernel_test.h"

#include <stdatomic.h>

#include "kernels/cpu/pool.h"

enum { ITEMS = 5000 };

typedef struct tally {
    atomic_int seen[ITEMS];
    atomic_int workers[64];
    int offset;
} tally;

static void count_item(void *context, int64_t item, int worker)
{
    tally *c = context;
    atomic_fetch_add(&c->seen[item + c->offset], 1);
    atomic_fetch_add(&c->workers[worker], 1);
}

static void test_pool_runs_every_item_once(void **state)
{
    (void)state;
    for (int workers = 1; workers <= 7; workers += 2) {
        spurion_pool *p;
        KT_OK(spurion_pool_create(&p, workers));
        assert_int_equal(spurion_pool_workers(p), workers);
        tally *c = calloc(1, sizeof *c);
        assert_non_null(c);
        spurion_pool_run(p, count_item, c, ITEMS);
        int by_workers = 0;
        for (int i = 0; i < ITEMS; i++) {
            assert_int_equal(atomic_load(&c->seen[i]), 1);
        }
        for (int i = 0; i < 64; i++) {
            assert_true(i < workers || atomic_load(&c->workers[i]) == 0);
            by_workers += atomic_load(&c->workers[i]);
        }
        assert_int_equal(by_workers, ITEMS);
        free(c);
        spurion_pool_destroy(p);
    }
}

/* Small jobs in a row: a worker that comes late to one must not run the next one's items twice. */
static void test_pool_keeps_jobs_apart(void **state)
{
    (void)state;
    spurion_pool *p;
    KT_OK(spurion_pool_create(&p, 4));
    tally *c = calloc(1, sizeof *c);
    assert_non_null(c);
    for (int at = 0, n = 0; at + n <= ITEMS; at += n, n = (n + 1) % 6) {
        c->offset = at;
        spurion_pool_run(p, count_item, c, n);
        for (int i = at; i < at + n; i++) {
            assert_int_equal(atomic_load(&c->seen[i]), 1);
        }
    }
    free(c);
    spurion_pool_destroy(p);
    spurion_pool_destroy(NULL);
}

static void test_pool_refuses_no_workers(void **state)
{
    (void)state;
    spurion_pool *p;
    assert_int_equal(spurion_pool_create(&p, 0).code, SPURION_INVALID_ARGUMENT);
    assert_null(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pool_runs_every_item_once),
        cmocka_unit_test(test_pool_keeps_jobs_apart),
        cmocka_unit_test(test_pool_refuses_no_workers),
    };
    return cmocka_run_group_tests_name("pool", tests, NULL, NULL);
}

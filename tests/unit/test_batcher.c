/* The batcher: whole groups, budgets and waits. Real threads where waiting is the matter; no sleeps. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/clock.h"
#include "daemon/batcher.h"
#include "spurion/codec.h"
#include "spurion/limits.h"

#define JOBS 64

typedef struct fixture {
    spurion_batcher *b;
    spurion_job jobs[JOBS];
    char ids[JOBS][8];
    int used;
    spurion_job *taken[SPURION_BATCH_ROLLOUTS_MAX];
    int count;
    bool known;               /* what came_before says */
} fixture;

static int rows(void *context, spurion_job *const *jobs, int job_count)
{
    (void)context;
    (void)jobs;
    return 10 * job_count;
}

static bool came_before(void *context, const spurion_rollout *rollout)
{
    (void)rollout;
    return ((fixture *)context)->known;
}

static fixture *begin(int rows_max, int batch_wait_ms, int group_wait_ms)
{
    fixture *f = calloc(1, sizeof *f);
    spurion_batcher_options o = {rows_max, batch_wait_ms, group_wait_ms, rows, came_before, f};
    assert_int_equal(spurion_batcher_create(&f->b, &o).code, SPURION_OK);
    return f;
}

static void end(fixture *f)
{
    spurion_batcher_destroy(f->b);
    free(f);
}

static spurion_job *job(fixture *f, const char *group, int group_size)
{
    spurion_job *j = &f->jobs[f->used];
    (void)snprintf(f->ids[f->used], sizeof f->ids[0], "%d", f->used);
    j->rollout.run = spurion_bytes_of("run");
    j->rollout.group = spurion_bytes_of(group);
    j->rollout.id = spurion_bytes_of(f->ids[f->used++]);
    j->rollout.group_size = group_size;
    return j;
}

static void add(fixture *f, const char *group, int group_size, int count)
{
    for (int i = 0; i < count; i++) {
        assert_int_equal(spurion_batcher_add(f->b, job(f, group, group_size)).code, SPURION_OK);
    }
}

static int take(fixture *f)
{
    return spurion_batcher_take(f->taken, &f->count, f->b, SPURION_BATCH_ROLLOUTS_MAX).code;
}

static void test_batcher_message_end_makes_a_group_whole(void **state)
{
    fixture *f = begin(1000, 0, 60000);
    (void)state;
    add(f, "a", 0, 3);
    spurion_batcher_message_end(f->b);
    assert_int_equal(take(f), SPURION_OK);
    assert_int_equal(f->count, 3);
    assert_true(f->taken[0]->group_number == f->taken[2]->group_number && !f->taken[0]->group_split);
    end(f);
}

static void test_batcher_waits_for_group_size(void **state)
{
    fixture *f = begin(1000, 0, 60000);
    (void)state;
    add(f, "a", 4, 2);
    add(f, "b", 0, 1);
    spurion_batcher_message_end(f->b); /* b is whole, a is not */
    assert_int_equal(take(f), SPURION_OK);
    assert_int_equal(f->count, 1);
    add(f, "a", 4, 1);
    spurion_batcher_skip(f->b, &job(f, "a", 4)->rollout); /* refused, but it came */
    assert_int_equal(take(f), SPURION_OK);
    assert_int_equal(f->count, 3);
    end(f);
}

static void test_batcher_group_wait_ends(void **state)
{
    fixture *f = begin(1000, 0, 30);
    int64_t start = spurion_clock_ms();
    (void)state;
    add(f, "a", 4, 2);
    spurion_batcher_message_end(f->b);
    assert_int_equal(take(f), SPURION_OK);
    assert_int_equal(f->count, 2);
    assert_true(spurion_clock_ms() - start >= 30);
    add(f, "a", 4, 1); /* who comes later is split off, and waits for nobody */
    spurion_batcher_message_end(f->b);
    assert_int_equal(take(f), SPURION_OK);
    assert_true(f->count == 1 && f->taken[0]->group_split);
    end(f);
}

static void test_batcher_asks_about_groups_of_earlier_lives(void **state)
{
    fixture *f = begin(1000, 0, 60000);
    (void)state;
    f->known = true;
    add(f, "old", 4, 1);
    spurion_batcher_message_end(f->b);
    assert_int_equal(take(f), SPURION_OK);
    assert_true(f->taken[0]->group_split);
    end(f);
}

static void test_batcher_keeps_the_budget(void **state)
{
    fixture *f = begin(50, 1000, 60000);
    (void)state;
    add(f, "a", 0, 3);
    add(f, "b", 0, 2);
    add(f, "c", 0, 1);
    add(f, "large", 0, 9);
    spurion_batcher_message_end(f->b);
    /* 90 rows go alone; of the others at most 50 together, groups undivided; a full micro-batch does not wait. In any order: a touched
     * list is a stack, so that the last group of the message is whole first. */
    int64_t start = spurion_clock_ms();
    int total = 0, batches = 0;
    while (total < 15) {
        assert_int_equal(take(f), SPURION_OK);
        assert_true(f->count <= 5 || f->count == 9);
        for (int i = 1; i < f->count; i++) {
            bool same = f->taken[i]->rollout.group.data == f->taken[i - 1]->rollout.group.data;
            assert_int_equal(f->taken[i]->group_number == f->taken[i - 1]->group_number, same);
        }
        total += f->count;
        batches++;
    }
    assert_int_equal(total, 15);
    assert_true(batches >= 3);
    assert_true(spurion_clock_ms() - start < 3000);
    assert_int_equal(spurion_batcher_job_count(f->b), 0);
    end(f);
}

static void *add_later(void *arg)
{
    fixture *f = arg;
    while (spurion_batcher_job_count(f->b) != 0) { /* until the taker has the first group in hand */
        sched_yield();
    }
    add(f, "second", 0, 1);
    spurion_batcher_message_end(f->b);
    return NULL;
}

static void test_batcher_first_group_waits_for_company(void **state)
{
    fixture *f = begin(20, 5000, 60000);
    pthread_t t;
    (void)state;
    add(f, "first", 0, 1);
    spurion_batcher_message_end(f->b);
    assert_int_equal(pthread_create(&t, NULL, add_later, f), 0);
    assert_int_equal(take(f), SPURION_OK);
    assert_int_equal(pthread_join(t, NULL), 0);
    assert_int_equal(f->count, 2);
    end(f);
}

static void test_batcher_flushes_on_deadline(void **state)
{
    fixture *f = begin(1000, 20, 60000);
    int64_t start = spurion_clock_ms();
    (void)state;
    add(f, "a", 0, 1);
    spurion_batcher_message_end(f->b);
    assert_int_equal(take(f), SPURION_OK);
    assert_true(f->count == 1 && spurion_clock_ms() - start >= 20);
    end(f);
}

static void test_batcher_drain_ends_all_waiting(void **state)
{
    fixture *f = begin(1000, 60000, 60000);
    (void)state;
    add(f, "a", 4, 2);
    spurion_batcher_message_end(f->b);
    spurion_batcher_drain(f->b);
    assert_int_equal(take(f), SPURION_OK);
    assert_int_equal(f->count, 2);
    assert_int_equal(take(f), SPURION_CANCELLED);
    assert_int_equal(f->count, 0);
    end(f);
}

static void test_batcher_groups_differ_by_step_and_run(void **state)
{
    fixture *f = begin(1000, 0, 60000);
    spurion_job *a = job(f, "g", 2), *b = job(f, "g", 2), *c = job(f, "g", 2);
    (void)state;
    b->rollout.step = 1;
    c->rollout.run = spurion_bytes_of("other");
    assert_int_equal(spurion_batcher_add(f->b, a).code, SPURION_OK);
    assert_int_equal(spurion_batcher_add(f->b, b).code, SPURION_OK);
    assert_int_equal(spurion_batcher_add(f->b, c).code, SPURION_OK);
    spurion_batcher_drain(f->b);
    assert_int_equal(take(f), SPURION_OK);
    assert_int_equal(f->count, 3);
    assert_true(a->group_number != b->group_number && b->group_number != c->group_number && a->group_number != c->group_number);
    end(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_batcher_message_end_makes_a_group_whole),
        cmocka_unit_test(test_batcher_waits_for_group_size),
        cmocka_unit_test(test_batcher_group_wait_ends),
        cmocka_unit_test(test_batcher_asks_about_groups_of_earlier_lives),
        cmocka_unit_test(test_batcher_keeps_the_budget),
        cmocka_unit_test(test_batcher_first_group_waits_for_company),
        cmocka_unit_test(test_batcher_flushes_on_deadline),
        cmocka_unit_test(test_batcher_drain_ends_all_waiting),
        cmocka_unit_test(test_batcher_groups_differ_by_step_and_run),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Bounds: known values, both ends on the level line, coverage over whole simulated runs. Steps: a fake clock. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

#include "daemon/alert.h"

#define SEED 88172645463325252ull

static spurion_bytes text(const char *s)
{
    spurion_bytes b = {s, strlen(s)};
    return b;
}

static double next_uniform(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return (double)(*state >> 11) / 9007199254740992.0;
}

/* ---- bounds ---- */

/* E_n(p) as a product: E multiplies by (a + s) / (a + b + n) / p for a hit, by (b + f) / (a + b + n) / (1 - p) for a miss. */
static double plain_log_evidence(int s, int n, double p)
{
    double log_e = 0;
    int i;
    for (i = 0; i < n; i++) {
        int hits = i < s ? i : s, misses = i < s ? 0 : i - s;
        log_e += i < s ? log((0.5 + hits) / (1.0 + i) / p) : log((0.5 + misses) / (1.0 + i) / (1 - p));
    }
    return log_e;
}

static void test_alert_evidence_equals_the_product_of_predictions(void **state)
{
    const double rates[] = {1e-6, 0.001, 0.01, 0.3, 0.5, 0.97};
    int n, s;
    size_t r;
    (void)state;
    for (n = 1; n <= 400; n += n < 20 ? 1 : 37) {
        for (s = 0; s <= n; s += n < 20 ? 1 : 13) {
            for (r = 0; r < sizeof rates / sizeof *rates; r++) {
                double plain = plain_log_evidence(s, n, rates[r]);
                double fast = spurion_rate_log_evidence((uint64_t)s, (uint64_t)n, rates[r]);
                assert_true(fabs(plain - fast) <= 1e-9 * (1 + fabs(plain)));
            }
        }
    }
}

/* One hit in one: E(p) = (1/2) / p, so p is in the set from alpha/2 on. No hit in one: by symmetry up to 1 - alpha/2. */
static void test_alert_bounds_have_closed_forms_at_one(void **state)
{
    spurion_rate_bound one = spurion_rate_bound_make(1, 1, 0.05), none = spurion_rate_bound_make(0, 1, 0.05);
    spurion_rate_bound empty = spurion_rate_bound_make(0, 0, 0.05);
    (void)state;
    assert_true(fabs(one.lower - 0.025) < 1e-12);
    assert_true(one.upper == 1);
    assert_true(none.lower == 0);
    assert_true(fabs(none.upper - 0.975) < 1e-12);
    assert_true(empty.lower == 0 && empty.upper == 1);
}

static void test_alert_bounds_lie_on_the_level_line(void **state)
{
    const uint64_t n[] = {1, 2, 7, 100, 5000, 1000000, 1000000000ull};
    const double share[] = {0, 1e-6, 0.001, 0.02, 0.5, 0.9, 1}, alphas[] = {0.2, 0.05, 0.001, 1e-6};
    size_t i, j, k;
    (void)state;
    for (i = 0; i < 7; i++) {
        for (j = 0; j < 7; j++) {
            for (k = 0; k < 4; k++) {
                uint64_t s = (uint64_t)((double)n[i] * share[j]);
                spurion_rate_bound b = spurion_rate_bound_make(s, n[i], alphas[k]);
                double limit = -log(alphas[k]), slack = 1e-6 + 1e-13 * (double)n[i] * 30, rate = (double)s / (double)n[i];
                assert_true(0 <= b.lower && b.lower <= rate && rate <= b.upper && b.upper <= 1);
                assert_true(s == 0 ? b.lower == 0 : fabs(spurion_rate_log_evidence(s, n[i], b.lower) - limit) < slack);
                assert_true(s == n[i] ? b.upper == 1 : fabs(spurion_rate_log_evidence(s, n[i], b.upper) - limit) < slack);
            }
        }
    }
}

/* Looked at after every rollout, over whole runs: the share of runs that the sequence misses anywhere must stay below alpha, and a
 * fixed-sample interval of the same level must fail the same test, or the simulation proves nothing. */
static void test_alert_bounds_cover_whole_runs_where_fixed_ones_do_not(void **state)
{
    const double rates[] = {0.002, 0.02, 0.3}, alpha = 0.05;
    uint64_t random = SEED;
    size_t r;
    (void)state;
    printf("seed %llu\n", (unsigned long long)SEED);
    for (r = 0; r < 3; r++) {
        int run, runs = 1000, steps = 2000, missed = 0, fixed_missed = 0;
        for (run = 0; run < runs; run++) {
            bool miss = false, fixed_miss = false;
            uint64_t s = 0;
            int n;
            for (n = 1; n <= steps; n++) {
                double rate;
                s += next_uniform(&random) < rates[r];
                rate = (double)s / n;
                miss = miss || spurion_rate_log_evidence(s, (uint64_t)n, rates[r]) >= -log(alpha); /* the set's own definition */
                fixed_miss =
                    fixed_miss || (n >= 30 && fabs(rate - rates[r]) > 1.96 * sqrt(rates[r] * (1 - rates[r]) / n) + 0.5 / n);
            }
            missed += miss;
            fixed_missed += fixed_miss;
        }
        printf("rate %g: sequence missed in %.1f %% of runs, fixed interval in %.1f %%\n", rates[r], 100.0 * missed / runs,
               100.0 * fixed_missed / runs);
        assert_true(missed <= alpha * runs);
        assert_true(fixed_missed > 2 * alpha * runs);
    }
}

static void test_alert_bounds_shrink_to_the_rate(void **state)
{
    double width = 1;
    uint64_t n;
    (void)state;
    for (n = 100; n <= 100000000; n *= 10) {
        spurion_rate_bound b = spurion_rate_bound_make(n / 100, n, 0.001);
        assert_true(b.upper - b.lower < width);
        width = b.upper - b.lower;
    }
    assert_true(width < 2e-4);
    /* none in 3 million: a rate of 1e-5 is excluded, and the price over the fixed-sample 3/n is stated */
    assert_true(spurion_rate_bound_make(0, 3000000, 0.05).upper < 5e-6);
}

/* ---- rate reports ---- */

static void test_alert_report_sends_when_something_was_flagged(void **state)
{
    spurion_rate_report none = spurion_rate_report_make(0, 64, 12, 6400, 0.01, 0.001);
    spurion_rate_report one = spurion_rate_report_make(1, 64, 13, 6464, 0.01, 0.001);
    (void)state;
    assert_false(none.send);
    assert_true(one.send);
    assert_false(one.run_exceeded);
    assert_false(one.step_exceeded);
    assert_true(one.rate == 1.0 / 64 && one.run_rate == 13.0 / 6464);
    assert_true(one.bound.lower < one.rate && one.rate < one.bound.upper);
}

static void test_alert_report_says_when_the_rate_is_passed(void **state)
{
    spurion_rate_report step = spurion_rate_report_make(20, 64, 20, 64000, 0.01, 0.001);
    spurion_rate_report run = spurion_rate_report_make(2, 64, 1280, 64000, 0.01, 0.001);
    spurion_rate_report edge = spurion_rate_report_make(5, 5, 5, 5, 1.0, 0.001);
    spurion_rate_report odd = spurion_rate_report_make(9, 5, 9, 5, 0.5, 7);
    (void)state;
    assert_true(step.step_exceeded && !step.run_exceeded);
    assert_true(!run.step_exceeded && run.run_exceeded);
    assert_false(edge.run_exceeded); /* nothing passes a limit of 1 */
    assert_int_equal(odd.flagged, 5);
    assert_true(odd.alpha == 0.001);
}

/* ---- steps ---- */

static spurion_steps *steps_make(int64_t timeout_ms)
{
    spurion_steps *s;
    assert_int_equal(spurion_steps_create(&s, timeout_ms).code, SPURION_OK);
    return s;
}

static void test_alert_step_closes_when_all_producers_end_it(void **state)
{
    spurion_steps *s = steps_make(1000);
    int64_t step = -1;
    (void)state;
    spurion_steps_seen(s, text("a"), 7, 0);
    spurion_steps_seen(s, text("b"), 7, 0);
    spurion_steps_end(s, text("a"), 7, 10);
    assert_false(spurion_steps_take(&step, s, 20));
    spurion_steps_end(s, text("b"), 7, 30);
    assert_true(spurion_steps_take(&step, s, 30));
    assert_int_equal(step, 7);
    assert_false(spurion_steps_take(&step, s, 30));
    assert_int_equal(spurion_steps_open_count(s), 0);
    spurion_steps_destroy(s);
}

static void test_alert_step_closes_when_all_producers_are_later(void **state)
{
    spurion_steps *s = steps_make(1000);
    int64_t step = -1;
    (void)state;
    spurion_steps_seen(s, text("a"), 1, 0);
    spurion_steps_seen(s, text("b"), 1, 0);
    spurion_steps_seen(s, text("a"), 2, 5);
    assert_false(spurion_steps_take(&step, s, 5));
    spurion_steps_seen(s, text("b"), 3, 6);
    assert_true(spurion_steps_take(&step, s, 6));
    assert_int_equal(step, 1);
    assert_false(spurion_steps_take(&step, s, 6)); /* a is still at 2, b at 3 */
    spurion_steps_seen(s, text("a"), 3, 7);
    assert_true(spurion_steps_take(&step, s, 7));
    assert_int_equal(step, 2);
    assert_false(spurion_steps_take(&step, s, 7));
    spurion_steps_destroy(s);
}

static void test_alert_step_closes_on_time_out(void **state)
{
    spurion_steps *s = steps_make(1000);
    int64_t step = -1;
    (void)state;
    assert_true(spurion_steps_deadline_ms(s) == INT64_MAX);
    spurion_steps_seen(s, text("a"), 4, 100);
    spurion_steps_seen(s, text("b"), 4, 600);
    assert_true(spurion_steps_deadline_ms(s) == 1600);
    assert_false(spurion_steps_take(&step, s, 1599));
    assert_true(spurion_steps_take(&step, s, 1600));
    assert_int_equal(step, 4);
    spurion_steps_destroy(s);
}

static void test_alert_step_without_producers_closes_on_time_out_only(void **state)
{
    spurion_steps *s = steps_make(1000);
    int64_t step = -1;
    (void)state;
    spurion_steps_seen(s, text(""), 4, 0);
    spurion_steps_seen(s, text(""), 9, 1);
    assert_false(spurion_steps_take(&step, s, 999));
    assert_true(spurion_steps_take(&step, s, 1000));
    assert_int_equal(step, 4);
    assert_false(spurion_steps_take(&step, s, 1000));
    spurion_steps_destroy(s);
}

static void test_alert_step_is_held_while_a_producer_has_gaps(void **state)
{
    spurion_steps *s = steps_make(1000);
    int64_t step = -1;
    (void)state;
    spurion_steps_seen(s, text("a"), 1, 0);
    spurion_steps_hold(s, text("a"), true);
    spurion_steps_end(s, text("a"), 1, 1);
    assert_false(spurion_steps_take(&step, s, 2));
    spurion_steps_hold(s, text("a"), false);
    assert_true(spurion_steps_take(&step, s, 3));
    spurion_steps_seen(s, text("a"), 2, 10);
    spurion_steps_hold(s, text("a"), true);
    assert_true(spurion_steps_take(&step, s, 1010)); /* the time-out does not wait for it */
    spurion_steps_destroy(s);
}

static void test_alert_forgotten_producer_is_not_waited_for(void **state)
{
    spurion_steps *s = steps_make(1000);
    int64_t step = -1;
    (void)state;
    spurion_steps_seen(s, text("a"), 1, 0);
    spurion_steps_seen(s, text("b"), 1, 0);
    spurion_steps_end(s, text("a"), 1, 0);
    assert_false(spurion_steps_take(&step, s, 1));
    spurion_steps_forget(s, text("b"));
    spurion_steps_forget(s, text("never seen"));
    assert_true(spurion_steps_take(&step, s, 1));
    spurion_steps_destroy(s);
}

static void test_alert_steps_close_lowest_first_and_restored_ones_too(void **state)
{
    spurion_steps *s = steps_make(1000);
    int64_t step = -1, expected[] = {2, 5, 8};
    int i;
    (void)state;
    spurion_steps_restore(s, 5, 0);
    spurion_steps_restore(s, 2, 0);
    spurion_steps_seen(s, text("a"), 8, 0);
    spurion_steps_seen(s, text("a"), 11, 0);
    for (i = 0; i < 3; i++) {
        assert_true(spurion_steps_take(&step, s, 0));
        assert_int_equal(step, expected[i]);
    }
    assert_false(spurion_steps_take(&step, s, 0));
    spurion_steps_destroy(s);
}

static void test_alert_steps_stay_bounded(void **state)
{
    spurion_steps *s = steps_make(1000000);
    int64_t step = -1, i;
    char name[32];
    (void)state;
    for (i = 0; i < 3 * SPURION_STEPS_OPEN_MAX; i++) {
        spurion_steps_seen(s, text(""), 3 * SPURION_STEPS_OPEN_MAX - i, i);
        while (spurion_steps_take(&step, s, i)) {
        }
        assert_true(spurion_steps_open_count(s) <= SPURION_STEPS_OPEN_MAX);
    }
    for (i = 0; i < 3 * SPURION_PRODUCERS_MAX; i++) {
        (void)snprintf(name, sizeof name, "p%d", (int)i);
        spurion_steps_seen(s, text(name), 1 << 20, i);
    }
    spurion_steps_destroy(s);
}

/* A closing is told whatever the order of arrival, once as long as nothing more comes. */
static void test_alert_steps_do_not_depend_on_the_order_of_arrival(void **state)
{
    uint64_t random = SEED;
    int round;
    (void)state;
    for (round = 0; round < 200; round++) {
        spurion_steps *s = steps_make(1000);
        int order[30], i, taken = 0;
        int64_t step = -1, last = -1;
        for (i = 0; i < 30; i++) {
            int j = (int)(next_uniform(&random) * (i + 1));
            order[i] = order[j];
            order[j] = i;
        }
        for (i = 0; i < 30; i++) { /* three producers, ten steps each, shuffled */
            char name[2] = {(char)('a' + order[i] % 3), 0};
            spurion_steps_seen(s, text(name), order[i] / 3, i);
        }
        for (i = 0; i < 3; i++) {
            char name[2] = {(char)('a' + i), 0};
            spurion_steps_end(s, text(name), 9, 40);
        }
        while (spurion_steps_take(&step, s, 41)) {
            assert_true(step > last);
            last = step;
            taken++;
        }
        assert_int_equal(taken, 10);
        spurion_steps_destroy(s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_alert_evidence_equals_the_product_of_predictions),
        cmocka_unit_test(test_alert_bounds_have_closed_forms_at_one),
        cmocka_unit_test(test_alert_bounds_lie_on_the_level_line),
        cmocka_unit_test(test_alert_bounds_cover_whole_runs_where_fixed_ones_do_not),
        cmocka_unit_test(test_alert_bounds_shrink_to_the_rate),
        cmocka_unit_test(test_alert_report_sends_when_something_was_flagged),
        cmocka_unit_test(test_alert_report_says_when_the_rate_is_passed),
        cmocka_unit_test(test_alert_step_closes_when_all_producers_end_it),
        cmocka_unit_test(test_alert_step_closes_when_all_producers_are_later),
        cmocka_unit_test(test_alert_step_closes_on_time_out),
        cmocka_unit_test(test_alert_step_without_producers_closes_on_time_out_only),
        cmocka_unit_test(test_alert_step_is_held_while_a_producer_has_gaps),
        cmocka_unit_test(test_alert_forgotten_producer_is_not_waited_for),
        cmocka_unit_test(test_alert_steps_close_lowest_first_and_restored_ones_too),
        cmocka_unit_test(test_alert_steps_stay_bounded),
        cmocka_unit_test(test_alert_steps_do_not_depend_on_the_order_of_arrival),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

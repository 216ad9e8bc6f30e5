/* Ranges, producers and flights: the books about what came and what is in flight. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/arena.h"
#include "daemon/ingest_flight.h"
#include "daemon/ingest_producers.h"
#include "daemon/ingest_ranges.h"

/* ---- ranges, against a plain array of flags ---- */

#define NUMBERS 200

static void check_against(const spurion_ranges *s, const bool *flags)
{
    uint64_t total = 0, through = 0;

    for (uint64_t i = 1; i < NUMBERS; i++) {
        assert_int_equal(spurion_ranges_has(s, i), flags[i]);
        total += flags[i];
    }
    while (through + 1 < NUMBERS && flags[through + 1]) {
        through++;
    }
    assert_int_equal(spurion_ranges_total(s), total);
    assert_int_equal(spurion_ranges_through(s), through);
    for (int32_t i = 1; i < s->count; i++) {
        assert_true(s->ranges[i].first > s->ranges[i - 1].last + 1); /* ascending, and they do not touch */
    }
}

static void test_ranges_are_the_set_they_say(void **state)
{
    spurion_ranges s, missing, rest;
    bool flags[NUMBERS] = {false}, inverse[NUMBERS], half[NUMBERS];
    unsigned seed = 12345;

    (void)state;
    printf("seed %u\n", seed);
    spurion_ranges_init(&s);
    spurion_ranges_init(&missing);
    spurion_ranges_init(&rest);
    for (int round = 0; round < 3000; round++) {
        uint64_t first = 1 + (uint64_t)rand_r(&seed) % (NUMBERS - 1), last = first + (uint64_t)rand_r(&seed) % 5;
        bool fresh, want = false;
        last = last < NUMBERS ? last : NUMBERS - 1;
        if (rand_r(&seed) % 3 != 0) {
            for (uint64_t i = first; i <= last; i++) {
                want = want || !flags[i];
                flags[i] = true;
            }
            assert_true(spurion_ranges_add(&fresh, &s, first, last));
            assert_int_equal(fresh, want);
        } else {
            spurion_ranges_cut(&s, first, last);
            memset(flags + first, 0, last - first + 1);
        }
        check_against(&s, flags);
        if (round % 50 == 0) {
            spurion_ranges odd;
            spurion_ranges_init(&odd);
            inverse[0] = half[0] = false;
            for (uint64_t i = 1; i < NUMBERS; i++) {
                inverse[i] = !flags[i];
                half[i] = flags[i] && i % 2 == 0;
                assert_true(i % 2 == 0 || spurion_ranges_add(NULL, &odd, i, i));
            }
            assert_true(spurion_ranges_missing(&missing, &s, NUMBERS - 1));
            check_against(&missing, inverse);
            assert_true(spurion_ranges_difference(&rest, &s, &odd));
            check_against(&rest, half);
            spurion_ranges_fini(&odd);
        }
    }
    spurion_ranges_fini(&s);
    spurion_ranges_fini(&missing);
    spurion_ranges_fini(&rest);
}

/* ---- producers, with a store that is one mark ---- */

typedef struct world {
    spurion_producers *p;
    spurion_arena arena;
    spurion_memory m;
    char mark[65536];
    size_t mark_size;
} world;

static void *take(void *context, size_t bytes)
{
    return spurion_arena_take(context, bytes);
}

static spurion_status load(void *context, spurion_bytes *mark, spurion_bytes run, spurion_bytes producer, uint64_t epoch)
{
    world *w = context;
    (void)run;
    (void)producer;
    if (epoch != 7 || w->mark_size == 0) {
        return spurion_error(SPURION_NOT_FOUND, "none");
    }
    mark->data = w->mark;
    mark->size = w->mark_size;
    return spurion_ok();
}

static int begin(void **state)
{
    world *w = calloc(1, sizeof *w);
    spurion_arena_init(&w->arena, 0);
    w->m.take = take;
    w->m.context = &w->arena;
    assert_int_equal(spurion_producers_create(&w->p, load, w).code, SPURION_OK);
    *state = w;
    return 0;
}

static int finish(void **state)
{
    world *w = *state;
    spurion_producers_destroy(w->p);
    spurion_arena_fini(&w->arena);
    free(w);
    return 0;
}

static void restart(world *w)
{
    spurion_producers_destroy(w->p);
    assert_int_equal(spurion_producers_create(&w->p, load, w).code, SPURION_OK);
}

static spurion_taken came(spurion_producer **out, world *w, uint64_t sequence)
{
    spurion_tap tap;
    spurion_taken taken;
    memset(&tap, 0, sizeof tap);
    tap.run = spurion_bytes_of("run");
    tap.producer = spurion_bytes_of("p");
    tap.epoch = 7;
    tap.sequence = sequence;
    assert_int_equal(spurion_producers_take(&taken, out, w->p, &tap).code, SPURION_OK);
    return taken;
}

static spurion_sync sync_of(uint64_t last)
{
    spurion_sync s;
    memset(&s, 0, sizeof s);
    s.run = spurion_bytes_of("run");
    s.producer = spurion_bytes_of("p");
    s.epoch = 7;
    s.last_sequence = last;
    return s;
}

static spurion_sync_reply ask(world *w, const spurion_sync *s)
{
    spurion_sync_reply r;
    assert_int_equal(spurion_producers_sync(&r, NULL, w->p, &w->m, s).code, SPURION_OK);
    return r;
}

/* The message is done: its mark is made durable. */
static spurion_word store(world *w, spurion_producer *p, uint64_t sequence, int64_t seen, int64_t ended)
{
    spurion_bytes mark;
    spurion_word word;
    spurion_producers_stage(w->p, p, sequence, seen, ended);
    assert_int_equal(spurion_producers_encode(&mark, w->p, p, &w->m).code, SPURION_OK);
    assert_true(mark.size <= sizeof w->mark);
    memcpy(w->mark, mark.data, mark.size);
    w->mark_size = mark.size;
    spurion_producers_settle(&word, w->p, p, 1);
    return word;
}

static void test_producers_tell_missing_from_pending(void **state)
{
    world *w = *state;
    spurion_producer *p[6];
    spurion_sync s = sync_of(5);
    spurion_sync_reply r;

    assert_int_equal(came(&p[1], w, 1), SPURION_TAKEN);
    assert_int_equal(came(&p[3], w, 3), SPURION_TAKEN);
    assert_int_equal(came(&p[0], w, 3), SPURION_TAKEN_BEFORE);
    r = ask(w, &s);
    assert_int_equal(r.stored_through, 0);
    assert_true(r.missing_count == 2 && r.missing[0].first == 2 && r.missing[0].last == 2 && r.missing[1].first == 4 && r.missing[1].last == 5);
    assert_int_equal(r.pending_count, 2);
    (void)store(w, p[1], 1, -1, -1);
    r = ask(w, &s);
    assert_true(r.stored_through == 1 && r.pending_count == 1 && r.pending[0].first == 3);
    spurion_producers_drop(w->p, p[3], 3); /* it could not be worked on: ask for it again */
    r = ask(w, &s);
    assert_true(r.pending_count == 0 && r.missing_count == 1 && r.missing[0].first == 2 && r.missing[0].last == 5);
    assert_int_equal(came(&p[3], w, 3), SPURION_TAKEN);
    (void)store(w, p[3], 3, -1, -1);
}

static void test_producers_word_counts_without_holes_only(void **state)
{
    world *w = *state;
    spurion_producer *p;
    spurion_word word;

    (void)came(&p, w, 2);
    word = store(w, p, 2, 9, 9); /* "step 9 is over", but message 1 has not come */
    assert_true(word.seen == -1 && word.ended == -1);
    restart(w); /* and nothing of that is forgotten */
    (void)came(&p, w, 1);
    word = store(w, p, 1, 8, -1);
    assert_true(word.seen == 9 && word.ended == 9);
    spurion_bytes mark = {w->mark, w->mark_size};
    assert_int_equal(spurion_producers_word_of(&word, mark).code, SPURION_OK);
    assert_true(word.seen == 9 && word.ended == 9 && !word.closed);
}

static void test_producers_remember_what_is_stored(void **state)
{
    world *w = *state;
    spurion_producer *p;
    spurion_sync s = sync_of(3);
    spurion_sync_reply r;

    (void)came(&p, w, 1);
    (void)store(w, p, 1, -1, -1);
    (void)came(&p, w, 2); /* in flight when the daemon dies */
    spurion_producers_drop(w->p, p, 2);
    restart(w);
    assert_int_equal(came(&p, w, 1), SPURION_TAKEN_BEFORE);
    r = ask(w, &s);
    assert_true(r.stored_through == 1 && r.pending_count == 0 && r.missing_count == 1 && r.missing[0].first == 2 && r.missing[0].last == 3);
}

static void test_producers_count_losses_once(void **state)
{
    world *w = *state;
    spurion_range lost[1] = {{1, 3}};
    spurion_producer *p, *q;
    spurion_sync s = sync_of(4);
    spurion_sync_reply r;
    spurion_word word;
    spurion_bytes mark;

    (void)came(&p, w, 2);
    (void)store(w, p, 2, -1, -1);
    s.lost = lost;
    s.lost_count = 1;
    s.lost_rollouts = 16;
    for (int i = 0; i < 2; i++) { /* told twice, counted once; 2 had come after all */
        assert_int_equal(spurion_producers_sync(&r, &q, w->p, &w->m, &s).code, SPURION_OK);
        assert_true(r.missing_count == 1 && r.missing[0].first == 4);
        spurion_producers_stage_sync(w->p, q, &s);
        assert_int_equal(spurion_producers_encode(&mark, w->p, q, &w->m).code, SPURION_OK);
        spurion_producers_settle(&word, w->p, q, 1);
    }
    r = ask(w, &s);
    assert_true(r.stored_through == 3 && r.lost_messages == 2 && r.lost_rollouts == 16);
    s.closing = true;
    s.lost_count = 0;
    assert_int_equal(spurion_producers_sync(&r, &q, w->p, &w->m, &s).code, SPURION_OK);
    spurion_producers_stage_sync(w->p, q, &s);
    spurion_producers_settle(&word, w->p, q, 1);
    assert_false(word.closed); /* 4 is still to come */
    (void)came(&p, w, 4);
    word = store(w, p, 4, 3, -1);
    assert_true(word.closed && word.seen == 3);
}

static void test_producers_do_not_count_what_came_late(void **state)
{
    world *w = *state;
    spurion_range lost[2] = {{1, 1}, {2, 2}};
    uint64_t counts[2] = {4, 8};
    spurion_producer *p, *q;
    spurion_sync s = sync_of(2);
    spurion_sync_reply r;
    spurion_word word;

    s.lost = lost;
    s.lost_count = 2;
    s.lost_counts = counts;
    assert_int_equal(spurion_producers_sync(&r, &q, w->p, &w->m, &s).code, SPURION_OK);
    assert_int_equal(came(&p, w, 2), SPURION_TAKEN); /* before the losses are settled: it was only late */
    spurion_producers_stage_sync(w->p, q, &s);
    spurion_producers_settle(&word, w->p, q, 1);
    r = ask(w, &s);
    assert_true(r.lost_messages == 1 && r.lost_rollouts == 4 && r.stored_through == 1);
    assert_int_equal(came(&q, w, 1), SPURION_TAKEN_BEFORE); /* after that it is lost for good, or it would count twice */
    (void)store(w, p, 2, -1, -1);
    r = ask(w, &s);
    assert_true(r.stored_through == 2 && r.lost_rollouts == 4);
}

static void test_producers_refuse_damaged_marks(void **state)
{
    world *w = *state;
    spurion_producer *p;
    spurion_tap tap;
    spurion_taken taken;

    (void)came(&p, w, 1);
    (void)store(w, p, 1, 5, 5);
    (void)came(&p, w, 3);
    (void)store(w, p, 3, 6, 6);
    for (size_t n = 0; n < w->mark_size; n++) {
        spurion_bytes cut = {w->mark, n};
        spurion_word word;
        assert_int_equal(spurion_producers_word_of(&word, cut).code, SPURION_DATA_LOSS);
    }
    w->mark_size -= 8;
    restart(w);
    memset(&tap, 0, sizeof tap);
    tap.run = spurion_bytes_of("run");
    tap.producer = spurion_bytes_of("p");
    tap.epoch = 7;
    tap.sequence = 4;
    assert_int_equal(spurion_producers_take(&taken, &p, w->p, &tap).code, SPURION_DATA_LOSS);
}

static void test_producers_limit_holes(void **state)
{
    world *w = *state;
    spurion_producer *p;
    spurion_tap tap;
    spurion_taken taken;

    for (uint64_t i = 0; i < SPURION_RANGES_MAX; i++) {
        assert_int_equal(came(&p, w, 2 + 2 * i), SPURION_TAKEN);
    }
    memset(&tap, 0, sizeof tap);
    tap.run = spurion_bytes_of("run");
    tap.producer = spurion_bytes_of("p");
    tap.epoch = 7;
    tap.sequence = 2 * SPURION_RANGES_MAX + 10;
    assert_int_equal(spurion_producers_take(&taken, &p, w->p, &tap).code, SPURION_RESOURCE_EXHAUSTED);
    assert_int_equal(came(&p, w, 1), SPURION_TAKEN); /* what closes a hole is always taken */
}

/* ---- flights ---- */

static void fill(spurion_flight_entry *e, const char *id, char digest)
{
    memset(e, 0, sizeof *e);
    e->key.run = spurion_bytes_of("run");
    e->key.group = spurion_bytes_of("g");
    e->key.id = spurion_bytes_of(id);
    e->key.step = 3;
    memset(e->digest, digest, sizeof e->digest);
}

static void test_flights_hold_one_of_each_identity(void **state)
{
    spurion_flights *f;
    spurion_flight_entry a, again, third, other, b;

    (void)state;
    assert_int_equal(spurion_flights_create(&f).code, SPURION_OK);
    fill(&a, "a", 1);
    fill(&again, "a", 1);
    fill(&third, "a", 1);
    fill(&other, "a", 2);
    fill(&b, "a", 2);
    b.key.attempt = 1;
    assert_int_equal(spurion_flights_enter(f, &a), SPURION_ENTERED);
    assert_int_equal(spurion_flights_enter(f, &again), SPURION_WAITING);
    assert_int_equal(spurion_flights_enter(f, &third), SPURION_WAITING);
    assert_int_equal(spurion_flights_enter(f, &other), SPURION_OCCUPIED);
    assert_int_equal(spurion_flights_enter(f, &b), SPURION_ENTERED);
    assert_int_equal(spurion_flights_count(f), 2);
    assert_true(spurion_flights_has_step(f, spurion_bytes_of("run"), 3));
    assert_false(spurion_flights_has_step(f, spurion_bytes_of("run"), 2));
    assert_false(spurion_flights_has_step(f, spurion_bytes_of("other"), 9));
    assert_ptr_equal(spurion_flights_leave(f, &a), &again);
    assert_ptr_equal(again.waiters, &third);
    assert_null(third.waiters);
    assert_int_equal(spurion_flights_enter(f, &other), SPURION_ENTERED);
    assert_null(spurion_flights_leave(f, &b));
    assert_null(spurion_flights_leave(f, &other));
    assert_int_equal(spurion_flights_count(f), 0);
    spurion_flights_destroy(f);
}

static void test_flights_list_oldest_first(void **state)
{
    spurion_flights *f;
    spurion_flight_entry e[5];
    spurion_flight out[3];
    spurion_arena arena;
    spurion_memory m = {take, &arena};
    char ids[5][2] = {"0", "1", "2", "3", "4"};
    int32_t n;

    (void)state;
    spurion_arena_init(&arena, 0);
    assert_int_equal(spurion_flights_create(&f).code, SPURION_OK);
    for (int i = 0; i < 5; i++) {
        fill(&e[i], ids[i], (char)i);
        e[i].since_ms = 100 + i;
        assert_int_equal(spurion_flights_enter(f, &e[i]), SPURION_ENTERED);
    }
    atomic_store(&e[1].stage, SPURION_STAGE_JUDGING);
    (void)spurion_flights_leave(f, &e[0]);
    assert_int_equal(spurion_flights_list(out, &n, f, &m, 3, 1101).code, SPURION_OK);
    assert_int_equal(n, 3);
    assert_string_equal(out[0].id.data, "1");
    assert_string_equal(out[0].stage.data, "judging");
    assert_string_equal(out[2].id.data, "3");
    assert_int_equal(out[0].age_ms, 1000);
    for (int i = 1; i < 5; i++) {
        (void)spurion_flights_leave(f, &e[i]);
    }
    spurion_flights_destroy(f);
    spurion_arena_fini(&arena);
}

int main(void)
{
#define T(name) cmocka_unit_test_setup_teardown(name, begin, finish)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ranges_are_the_set_they_say),
        T(test_producers_tell_missing_from_pending),
        T(test_producers_word_counts_without_holes_only),
        T(test_producers_remember_what_is_stored),
        T(test_producers_count_losses_once),
        T(test_producers_do_not_count_what_came_late),
        T(test_producers_refuse_damaged_marks),
        T(test_producers_limit_holes),
        cmocka_unit_test(test_flights_hold_one_of_each_identity),
        cmocka_unit_test(test_flights_list_oldest_first),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

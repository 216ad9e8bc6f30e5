/* Keys keep the order of what they are made of, values read back, and damage is seen. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "daemon/store_keys.h"

#define SEED 20240611u

static spurion_bytes text(const char *s)
{
    spurion_bytes b = {s, strlen(s)};
    return b;
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static int compare_keys(const store_key *a, const store_key *b)
{
    size_t n = a->size < b->size ? a->size : b->size;
    int c = memcmp(a->data, b->data, n);
    return c ? c : (a->size > b->size) - (a->size < b->size);
}

/* RFC 3720 appendix B.4 */
static void test_store_keys_crc32c_has_the_published_values(void **state)
{
    uint8_t zeros[32] = {0}, ones[32], rising[32];
    int i;
    (void)state;
    memset(ones, 0xff, sizeof ones);
    for (i = 0; i < 32; i++) {
        rising[i] = (uint8_t)i;
    }
    assert_int_equal(spurion_crc32c(0, zeros, 32), 0x8a9136aau);
    assert_int_equal(spurion_crc32c(0, ones, 32), 0x62a8ab43u);
    assert_int_equal(spurion_crc32c(0, rising, 32), 0x46dd794eu);
    assert_int_equal(spurion_crc32c(0, "123456789", 9), 0xe3069283u);
    assert_int_equal(spurion_crc32c(spurion_crc32c(0, "1234", 4), "56789", 5), 0xe3069283u);
}

static void test_store_keys_floats_keep_their_order(void **state)
{
    float list[] = {-INFINITY, -3.4e38f, -1.5f, -1.0f, -1e-38f, -1e-45f, 0.0f, 1e-45f, 1e-38f, 0.5f, 1.0f, 3.4e38f, INFINITY, NAN};
    size_t n = sizeof list / sizeof *list, i;
    uint64_t random = SEED;
    store_key a, b;
    (void)state;
    for (i = 0; i + 1 < n; i++) {
        store_key_init(&a);
        store_key_init(&b);
        store_key_float(&a, list[i]);
        store_key_float(&b, list[i + 1]);
        assert_true(compare_keys(&a, &b) < 0);
    }
    for (i = 0; i < 100000; i++) {
        uint32_t x = (uint32_t)next_random(&random), y = (uint32_t)next_random(&random);
        float f, g;
        store_key_reader r;
        memcpy(&f, &x, 4);
        memcpy(&g, &y, 4);
        if (f != f || g != g) {
            continue;
        }
        store_key_init(&a);
        store_key_init(&b);
        store_key_float(&a, f);
        store_key_float(&b, g);
        assert_int_equal((f > g) - (f < g), (compare_keys(&a, &b) > 0) - (compare_keys(&a, &b) < 0));
        r = (store_key_reader){a.data, a.size, false};
        assert_true(store_key_read_float(&r) == f);
    }
    store_key_init(&a);
    store_key_init(&b);
    store_key_float(&a, -0.0f);
    store_key_float(&b, 0.0f);
    assert_int_equal(compare_keys(&a, &b), 0);
}

static void test_store_keys_numbers_keep_their_order(void **state)
{
    int64_t list[] = {INT64_MIN, -5, -1, 0, 1, 255, 256, 65536, 1ll << 40, INT64_MAX};
    int32_t small[] = {INT32_MIN, -1, 0, 1, 255, 256, INT32_MAX};
    size_t i;
    store_key a, b;
    (void)state;
    for (i = 0; i + 1 < sizeof list / sizeof *list; i++) {
        store_key_reader r;
        store_key_init(&a);
        store_key_init(&b);
        store_key_i64(&a, list[i]);
        store_key_i64(&b, list[i + 1]);
        assert_true(compare_keys(&a, &b) < 0);
        r = (store_key_reader){a.data, a.size, false};
        assert_true(store_key_read_i64(&r) == list[i]);
    }
    for (i = 0; i + 1 < sizeof small / sizeof *small; i++) {
        store_key_reader r;
        store_key_init(&a);
        store_key_init(&b);
        store_key_i32(&a, small[i]);
        store_key_i32(&b, small[i + 1]);
        assert_true(compare_keys(&a, &b) < 0);
        r = (store_key_reader){b.data, b.size, false};
        assert_true(store_key_read_i32(&r) == small[i + 1]);
    }
}

/* Names of which one begins with the other, or with odd bytes, must not run into what follows. */
static void test_store_keys_identities_read_back_and_differ(void **state)
{
    const char *names[] = {"a", "aa", "a\xff", "b", "r1", "r", "\xc3\xa9"};
    size_t n = sizeof names / sizeof *names, i, j, k;
    (void)state;
    for (i = 0; i < n; i++) {
        for (j = 0; j < n; j++) {
            for (k = 0; k < n; k++) {
                spurion_identity id = {text(names[i]), text(names[j]), text(names[k]), (int64_t)(i * 7 + j), (int32_t)k}, back;
                spurion_identity other = {text(names[i]), text(names[k]), text(names[j]), (int64_t)(i * 7 + j), (int32_t)k};
                store_key a, b;
                store_key_reader r;
                spurion_bytes run;
                store_key_init(&a);
                store_key_identity(&a, &id);
                store_key_init(&b);
                store_key_identity(&b, &other);
                assert_int_equal(compare_keys(&a, &b) == 0, j == k);
                r = (store_key_reader){a.data, a.size, false};
                run = store_key_read_name(&r);
                store_key_read_tail(&back, &r);
                assert_false(r.bad);
                assert_int_equal(run.size, id.run.size);
                assert_memory_equal(run.data, id.run.data, run.size);
                assert_int_equal(back.step, id.step);
                assert_int_equal(back.attempt, id.attempt);
                assert_int_equal(back.group.size, id.group.size);
                assert_memory_equal(back.id.data, id.id.data, id.id.size);
            }
        }
    }
}

static void test_store_keys_the_longest_identity_fits_every_index(void **state)
{
    char name[SPURION_NAME_BYTES_MAX + 1];
    spurion_bytes longest = {name, SPURION_NAME_BYTES_MAX}, over = {name, SPURION_NAME_BYTES_MAX + 1};
    spurion_identity id = {longest, longest, longest, INT64_MAX, INT32_MAX};
    store_key k;
    (void)state;
    memset(name, 'x', sizeof name);
    store_key_init(&k);
    store_key_name(&k, id.run);
    store_key_name(&k, longest);
    store_key_u64(&k, 1);
    store_key_tail(&k, &id);
    assert_false(k.bad);
    store_key_init(&k);
    store_key_name(&k, over);
    assert_true(k.bad);
}

static void test_store_keys_successor_ends_a_prefix(void **state)
{
    store_key prefix, inside, end;
    uint8_t tail[20];
    (void)state;
    memset(tail, 0xff, sizeof tail);
    store_key_init(&prefix);
    store_key_raw(&prefix, "ab\xff\xff", 4);
    end = inside = prefix;
    store_key_raw(&inside, tail, sizeof tail);
    store_key_successor(&end);
    assert_true(compare_keys(&inside, &end) < 0);
    assert_int_equal(end.size, 2);
    assert_memory_equal(end.data, "ac", 2);
    store_key_init(&end);
    store_key_raw(&end, "\xff\xff", 2);
    store_key_successor(&end);
    assert_true(end.bad);
}

static void test_store_keys_short_keys_read_as_bad(void **state)
{
    spurion_identity id = {text("run"), text("group"), text("id"), 5, 0}, back;
    store_key k;
    size_t n;
    (void)state;
    store_key_init(&k);
    store_key_identity(&k, &id);
    for (n = 0; n < k.size; n++) {
        uint8_t *copy = malloc(n + 1); /* so that ASan sees a read past the end */
        store_key_reader r = {copy, n, false};
        memcpy(copy, k.data, n);
        (void)store_key_read_name(&r);
        store_key_read_tail(&back, &r);
        assert_true(r.bad);
        free(copy);
    }
}

static void test_store_keys_envelopes_show_every_flipped_bit(void **state)
{
    spurion_arena arena;
    spurion_bytes sealed, payload, key = text("key"), other = text("kez");
    size_t i;
    int bit;
    (void)state;
    spurion_arena_init(&arena, 0);
    assert_int_equal(store_value_seal(&sealed, &arena, key, text("some payload")).code, SPURION_OK);
    assert_int_equal(store_value_open(&payload, key, sealed).code, SPURION_OK);
    assert_int_equal(payload.size, 12);
    assert_memory_equal(payload.data, "some payload", 12);
    assert_int_equal(store_value_open(&payload, other, sealed).code, SPURION_DATA_LOSS);
    for (i = 0; i < sealed.size; i++) {
        for (bit = 0; bit < 8; bit++) {
            ((uint8_t *)(void *)sealed.data)[i] ^= (uint8_t)(1 << bit);
            assert_int_equal(store_value_open(&payload, key, sealed).code, SPURION_DATA_LOSS);
            ((uint8_t *)(void *)sealed.data)[i] ^= (uint8_t)(1 << bit);
        }
    }
    for (i = 0; i < sealed.size; i++) {
        spurion_bytes cut = {sealed.data, i};
        assert_int_equal(store_value_open(&payload, key, cut).code, SPURION_DATA_LOSS);
    }
    spurion_arena_fini(&arena);
}

static spurion_store_row example_row(const spurion_store_flag *flags, int32_t count)
{
    spurion_store_row row;
    int i;
    memset(&row, 0, sizeof row);
    for (i = 0; i < SPURION_DIGEST_BYTES; i++) {
        row.digest[i] = (uint8_t)(i * 7);
    }
    row.time_ms = 1700000000123;
    row.reward = 1.25f;
    row.counterfactual_reward = -0.5f;
    row.effect = -1.75f;
    row.flags = flags;
    row.flag_count = count;
    row.verdict = (spurion_bytes){"ver\0dict", 8};
    row.record = text("whole record");
    return row;
}

static void test_store_keys_rows_read_back(void **state)
{
    spurion_store_flag flags[] = {{text("rule-a"), -1.5f}, {text("b"), 0.25f}};
    spurion_arena arena;
    spurion_store_row row = example_row(flags, 2), back;
    spurion_bytes payload;
    (void)state;
    memset(&back, 0, sizeof back);
    spurion_arena_init(&arena, 0);
    assert_int_equal(store_row_encode(&payload, &arena, &row).code, SPURION_OK);
    assert_int_equal(store_row_decode(&back, &arena, payload).code, SPURION_OK);
    assert_memory_equal(back.digest, row.digest, SPURION_DIGEST_BYTES);
    assert_int_equal(back.time_ms, row.time_ms);
    assert_true(back.reward == row.reward && back.counterfactual_reward == row.counterfactual_reward && back.effect == row.effect);
    assert_true(back.has_record);
    assert_int_equal(back.flag_count, 2);
    assert_string_equal(back.flags[0].rule.data, "rule-a");
    assert_string_equal(back.flags[1].rule.data, "b");
    assert_true(back.flags[0].effect == -1.5f && back.flags[1].effect == 0.25f);
    assert_int_equal(back.verdict.size, 8);
    assert_memory_equal(back.verdict.data, "ver\0dict", 9);
    spurion_arena_fini(&arena);
}

static void test_store_keys_rows_cut_short_are_data_loss(void **state)
{
    spurion_store_flag flags[] = {{text("rule-a"), -1.5f}};
    spurion_arena arena;
    spurion_store_row row = example_row(flags, 1), back;
    spurion_bytes payload, longer;
    size_t n;
    (void)state;
    spurion_arena_init(&arena, 0);
    assert_int_equal(store_row_encode(&payload, &arena, &row).code, SPURION_OK);
    for (n = 0; n < payload.size; n++) {
        spurion_bytes cut = {payload.data, n};
        memset(&back, 0, sizeof back);
        assert_int_equal(store_row_decode(&back, &arena, cut).code, SPURION_DATA_LOSS);
    }
    longer.data = spurion_arena_copy(&arena, payload.data, payload.size);
    longer.size = payload.size + 1;
    assert_int_equal(store_row_decode(&back, &arena, longer).code, SPURION_DATA_LOSS);
    spurion_arena_fini(&arena);
}

static void test_store_keys_counters_add_and_read_back(void **state)
{
    store_counter a = {3, 1, 0.5, 1.5, 2.5, 3.5, 100, 200, 4, 9}, b = {2, 2, -0.25, 1, 1, 1, 50, 150, 2, 5}, sum, back;
    store_counter zero;
    uint8_t encoded[STORE_COUNTER_BYTES];
    spurion_bytes payload = {(const char *)encoded, sizeof encoded}, cut = {(const char *)encoded, sizeof encoded - 1};
    (void)state;
    memset(&zero, 0, sizeof zero);
    sum = zero;
    store_counter_add(&sum, &a);
    assert_int_equal(sum.first_ms, 100); /* the first one sets the spans; zero is no time */
    assert_int_equal(sum.step_min, 4);
    store_counter_add(&sum, &b);
    store_counter_encode(encoded, &sum);
    assert_int_equal(store_counter_decode(&back, payload).code, SPURION_OK);
    assert_int_equal(back.scored, 5);
    assert_int_equal(back.flagged, 3);
    assert_true(back.effect_sum == 0.25 && back.reward_sum == 2.5 && back.reward_square_sum == 3.5 &&
                back.counterfactual_sum == 4.5);
    assert_int_equal(back.first_ms, 50);
    assert_int_equal(back.last_ms, 200);
    assert_int_equal(back.step_min, 2);
    assert_int_equal(back.step_max, 9);
    assert_int_equal(store_counter_decode(&back, cut).code, SPURION_DATA_LOSS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_store_keys_crc32c_has_the_published_values),
        cmocka_unit_test(test_store_keys_floats_keep_their_order),
        cmocka_unit_test(test_store_keys_numbers_keep_their_order),
        cmocka_unit_test(test_store_keys_identities_read_back_and_differ),
        cmocka_unit_test(test_store_keys_the_longest_identity_fits_every_index),
        cmocka_unit_test(test_store_keys_successor_ends_a_prefix),
        cmocka_unit_test(test_store_keys_short_keys_read_as_bad),
        cmocka_unit_test(test_store_keys_envelopes_show_every_flipped_bit),
        cmocka_unit_test(test_store_keys_rows_read_back),
        cmocka_unit_test(test_store_keys_rows_cut_short_are_data_loss),
        cmocka_unit_test(test_store_keys_counters_add_and_read_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Queries and counters of the store against a plain model: every order, condition and page size, read back row by row. */
#include "store_place.h"

#include "daemon/store_keys.h"

#define MODEL_ROWS 700

typedef struct model {
    spurion_store_row rows[MODEL_ROWS];
    spurion_store_flag flags[MODEL_ROWS][2];
    spurion_store_feature features[MODEL_ROWS][3];
    char names[MODEL_ROWS][2][16];
} model;

static const char *const model_runs[] = {"r1", "r10"};
static const char *const model_saes[] = {"low", "mid"};

static void model_fill(model *m, uint64_t *random)
{
    int i;
    for (i = 0; i < MODEL_ROWS; i++) {
        spurion_store_row *row = &m->rows[i];
        int64_t step = (int64_t)(next_random(random) % 12);
        (void)snprintf(m->names[i][0], 16, "g%d", (int)(next_random(random) % 40));
        (void)snprintf(m->names[i][1], 16, "i%d", i);
        *row = make_row(model_runs[next_random(random) % 2], step, m->names[i][0], m->names[i][1], (uint8_t)i);
        row->identity.attempt = (int32_t)(next_random(random) % 2);
        row->time_ms = (int64_t)(next_random(random) % 100000);
        row->effect = next_random(random) % 3 == 0 ? 0 : (float)(int)(next_random(random) % 41) / 8 - 2.5f;
        row->reward = (float)(next_random(random) % 100) / 16;
        row->flags = m->flags[i];
        if (next_random(random) % 4 == 0) {
            m->flags[i][row->flag_count++] = (spurion_store_flag){text("url"), (float)(int)(next_random(random) % 9) - 4.5f};
        }
        if (next_random(random) % 5 == 0) {
            m->flags[i][row->flag_count++] = (spurion_store_flag){text("flip"), (float)(int)(next_random(random) % 9) - 4.5f};
        }
        row->record = row->flag_count ? text("record") : (spurion_bytes){NULL, 0};
        row->features = m->features[i];
        for (; row->feature_count < (int32_t)(next_random(random) % 4); row->feature_count++) {
            m->features[i][row->feature_count] = (spurion_store_feature){
                text(model_saes[row->feature_count % 2]), (int32_t)(next_random(random) % 3) + 10 * row->feature_count,
                (float)(next_random(random) % 7) - 3, next_random(random) % 2 == 0, true};
        }
    }
}

static void model_commit(model *m, spurion_store *s)
{
    int i, n;
    for (i = 0; i < MODEL_ROWS; i += n) {
        spurion_store_batch b;
        n = i + 37 < MODEL_ROWS ? 37 : MODEL_ROWS - i;
        b = make_batch(&m->rows[i], n);
        assert_ok(spurion_store_commit(s, &b));
    }
}

static const spurion_store_flag *model_flag(const spurion_store_row *row, spurion_bytes rule)
{
    int32_t i;
    for (i = 0; i < row->flag_count; i++) {
        if (equal(row->flags[i].rule, rule)) {
            return &row->flags[i];
        }
    }
    return NULL;
}

static float model_effect(const spurion_store_row *row, const spurion_store_query *q)
{
    const spurion_store_flag *f = q->rule.size ? model_flag(row, q->rule) : NULL;
    return f ? f->effect : row->effect;
}

static bool model_fits(const spurion_store_row *row, const spurion_store_query *q)
{
    float effect = model_effect(row, q);
    bool feature = q->sae.size == 0;
    int32_t i;
    for (i = 0; i < row->feature_count; i++) {
        feature = feature || (equal(row->features[i].sae, q->sae) && row->features[i].index == q->index);
    }
    return feature && equal(row->identity.run, q->run) && (!q->flagged || row->flag_count) &&
           (!q->rule.size || model_flag(row, q->rule)) && (!q->group.size || equal(q->group, row->identity.group)) &&
           (!q->has_step_min || row->identity.step >= q->step_min) && (!q->has_step_max || row->identity.step <= q->step_max) &&
           (!q->has_time_min || row->time_ms >= q->time_min) && (!q->has_time_max || row->time_ms <= q->time_max) &&
           (!q->has_effect_min || effect >= q->effect_min) && (!q->has_effect_max || effect <= q->effect_max) &&
           (q->order != SPURION_ORDER_EFFECT || effect != 0);
}

static spurion_store_query model_query(uint64_t *random)
{
    spurion_store_query q;
    memset(&q, 0, sizeof q);
    q.run = text(model_runs[next_random(random) % 2]);
    q.order = (spurion_store_order)(next_random(random) % 3);
    q.descending = next_random(random) % 2;
    q.flagged = next_random(random) % 4 == 0;
    q.rule = next_random(random) % 3 == 0 ? text(next_random(random) % 2 ? "url" : "flip") : q.rule;
    q.index = (int32_t)(next_random(random) % 3);
    q.sae = next_random(random) % 4 == 0 ? text("low") : q.sae;
    q.group = next_random(random) % 6 == 0 ? text("g7") : q.group;
    q.has_step_min = next_random(random) % 3 == 0;
    q.has_step_max = next_random(random) % 3 == 0;
    q.step_min = (int64_t)(next_random(random) % 12);
    q.step_max = next_random(random) % 4 == 0 ? q.step_min : (int64_t)(next_random(random) % 12);
    q.has_time_min = next_random(random) % 4 == 0;
    q.has_time_max = next_random(random) % 4 == 0;
    q.time_min = (int64_t)(next_random(random) % 100000);
    q.time_max = (int64_t)(next_random(random) % 100000);
    q.has_effect_min = next_random(random) % 4 == 0;
    q.has_effect_max = next_random(random) % 4 == 0;
    q.effect_min = (float)(int)(next_random(random) % 9) - 5;
    q.effect_max = (float)(int)(next_random(random) % 9) - 3;
    q.limit = (int32_t)(next_random(random) % 50) + 1;
    q.with_record = next_random(random) % 2;
    return q;
}

static bool in_order(const spurion_store_row *a, const spurion_store_row *b, const spurion_store_query *q)
{
    double x, y;
    switch (q->order) {
    case SPURION_ORDER_STEP:
        x = (double)a->identity.step;
        y = (double)b->identity.step;
        break;
    case SPURION_ORDER_TIME:
        x = (double)a->time_ms;
        y = (double)b->time_ms;
        break;
    default:
        x = model_effect(a, q);
        y = model_effect(b, q);
    }
    return q->descending ? x >= y : x <= y;
}

/* Reads the whole answer page by page, now and then going on from a row in the middle; every row must be the model's, in order,
 * once. */
static void check_query(const model *m, spurion_store *s, spurion_store_query *q, uint64_t *random, int *pages)
{
    bool seen[MODEL_ROWS] = {false};
    spurion_store_row last;
    spurion_arena arena;
    int expected = 0, found = 0, i;
    bool more = true, have_last = false;

    spurion_arena_init(&arena, 0);
    for (i = 0; i < MODEL_ROWS; i++) {
        expected += model_fits(&m->rows[i], q);
    }
    while (more) {
        spurion_store_page page;
        int32_t use;
        assert_ok(spurion_store_query_page(&page, &arena, s, q));
        ++*pages;
        assert_true(page.row_count <= q->limit && page.damaged_count == 0);
        assert_true(!page.more || page.cursor.size > 0);
        use = page.row_count > 1 && next_random(random) % 3 == 0 ? page.row_count / 2 : page.row_count;
        for (i = 0; i < use; i++) {
            int place = atoi(page.rows[i].identity.id.data + 1);
            assert_false(seen[place]);
            seen[place] = true;
            assert_true(model_fits(&m->rows[place], q));
            assert_true(!have_last || in_order(&last, &page.rows[i], q));
            assert_int_equal(page.rows[i].record.size, q->with_record && m->rows[place].flag_count ? 6 : 0);
            last = page.rows[i];
            have_last = true;
            found++;
        }
        more = page.more || use < page.row_count;
        q->cursor = use < page.row_count ? page.rows[use - 1].cursor : page.cursor;
    }
    if (found != expected) {
        fail_msg("order %d descending %d rule %d: expected %d rows, found %d", q->order, q->descending, (int)q->rule.size, expected,
                 found);
    }
    spurion_arena_fini(&arena);
}

static void test_store_queries_equal_a_plain_model(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    model *m = calloc(1, sizeof *m);
    uint64_t random = SEED;
    int i, pages = 0;
    printf("seed %llu\n", (unsigned long long)SEED);
    model_fill(m, &random);
    model_commit(m, s);
    for (i = 0; i < 700; i++) {
        spurion_store_query q = model_query(&random);
        if (i == 300) { /* also from files, not only from memory */
            spurion_store_close(s);
            s = open_store(p);
        }
        check_query(m, s, &q, &random, &pages);
    }
    assert_true(pages > 700);
    spurion_store_close(s);
    free(m);
}

static void test_store_counters_equal_a_plain_model(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    model *m = calloc(1, sizeof *m);
    uint64_t random = SEED;
    int64_t step;
    int i, r;
    model_fill(m, &random);
    model_commit(m, s);
    for (r = 0; r < 2; r++) {
        spurion_bytes run = text(model_runs[r]);
        uint64_t through_scored = 0, through_flagged = 0;
        for (step = 0; step < 13; step++) {
            spurion_store_count at, through;
            uint64_t scored = 0, flagged = 0;
            double sum = 0;
            for (i = 0; i < MODEL_ROWS; i++) {
                const spurion_store_flag *f = model_flag(&m->rows[i], text("url"));
                if (equal(m->rows[i].identity.run, run) && m->rows[i].identity.step == step) {
                    scored++;
                    flagged += f != NULL;
                    sum += f ? f->effect : 0;
                }
            }
            through_scored += scored;
            through_flagged += flagged;
            assert_ok(spurion_store_rule_counts(&at, &through, s, run, text("url"), step));
            assert_int_equal(at.scored, scored);
            assert_int_equal(at.flagged, flagged);
            assert_true(at.effect_sum == sum);
            assert_int_equal(through.scored, through_scored);
            assert_int_equal(through.flagged, through_flagged);
        }
    }
    spurion_store_close(s);
    free(m);
}

static void test_store_counts_come_in_pages(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    model *m = calloc(1, sizeof *m);
    spurion_store_counts_query q;
    spurion_store_counts_page page;
    uint64_t random = SEED, scored = 0, expected = 0;
    int i, count = 0;
    int64_t last = -1;
    model_fill(m, &random);
    model_commit(m, s);
    memset(&q, 0, sizeof q);
    q.kind = SPURION_COUNT_STEP;
    q.run = text("r1");
    q.limit = 5;
    q.has_step_min = true;
    q.step_min = 1;
    do {
        assert_ok(spurion_store_counts(&page, &p->arena, s, &q));
        for (i = 0; i < page.count; i++) {
            assert_true(page.counts[i].step > last);
            last = page.counts[i].step;
            scored += page.counts[i].scored;
            count++;
        }
        q.cursor = page.cursor;
    } while (page.more);
    for (i = 0; i < MODEL_ROWS; i++) {
        expected += equal(m->rows[i].identity.run, text("r1")) && m->rows[i].identity.step >= 1;
    }
    assert_int_equal(count, 11);
    assert_int_equal(scored, expected);
    q.kind = SPURION_COUNT_RULE;
    q.totals = true;
    q.cursor = (spurion_bytes){NULL, 0};
    assert_ok(spurion_store_counts(&page, &p->arena, s, &q));
    assert_int_equal(page.count, 2);
    assert_true(equal(page.counts[0].rule, text("url")) && equal(page.counts[1].rule, text("flip")));
    assert_int_equal(page.counts[0].step, -1);
    q.cursor = text("nonsense");
    assert_code(SPURION_INVALID_ARGUMENT, spurion_store_counts(&page, &p->arena, s, &q));
    q.run = text("");
    assert_code(SPURION_INVALID_ARGUMENT, spurion_store_counts(&page, &p->arena, s, &q));
    spurion_store_close(s);
    free(m);
}

static void test_store_worst_of_step_are_the_largest_effects(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    model *m = calloc(1, sizeof *m);
    uint64_t random = SEED;
    spurion_store_worst *worst;
    int32_t count, i, j;
    model_fill(m, &random);
    model_commit(m, s);
    assert_ok(spurion_store_worst_of_step(&worst, &count, &p->arena, s, text("r1"), text("url"), 4, 3));
    assert_int_equal(count, 3);
    for (i = 0; i < count; i++) {
        float size = worst[i].effect < 0 ? -worst[i].effect : worst[i].effect;
        int larger = 0;
        for (j = 0; j < MODEL_ROWS; j++) {
            const spurion_store_flag *f = model_flag(&m->rows[j], text("url"));
            if (f && equal(m->rows[j].identity.run, text("r1")) && m->rows[j].identity.step == 4) {
                larger += (f->effect < 0 ? -f->effect : f->effect) > size;
            }
        }
        assert_true(larger <= i);
        assert_true(model_flag(&m->rows[atoi(worst[i].identity.id.data + 1)], text("url"))->effect == worst[i].effect);
    }
    assert_ok(spurion_store_worst_of_step(&worst, &count, &p->arena, s, text("r1"), text("url"), 400, 3));
    assert_int_equal(count, 0);
    spurion_store_close(s);
    free(m);
}

static void test_store_export_gives_every_row_of_the_moment(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    model *m = calloc(1, sizeof *m);
    spurion_store_row late = make_row("r1", 0, "later", "i9999", 1), row;
    spurion_store_batch b = make_batch(&late, 1);
    spurion_store_export *e;
    uint64_t random = SEED;
    int expected = 0, found_count = 0, i;
    int64_t last = -1;
    bool found = true;
    model_fill(m, &random);
    model_commit(m, s);
    for (i = 0; i < MODEL_ROWS; i++) {
        expected += equal(m->rows[i].identity.run, text("r1"));
    }
    assert_ok(spurion_store_export_open(&e, s, text("r1")));
    assert_ok(spurion_store_commit(s, &b)); /* after the export began: not in it */
    while (found) {
        assert_ok(spurion_store_export_next(&found, &row, e));
        if (found) {
            const spurion_store_row *original = &m->rows[atoi(row.identity.id.data + 1)];
            assert_true(equal(row.record, original->record) && row.reward == original->reward && row.identity.step >= last);
            last = row.identity.step;
            found_count++;
        }
    }
    assert_int_equal(found_count, expected);
    spurion_store_export_close(e);
    spurion_store_export_close(NULL);
    spurion_store_close(s);
    free(m);
}

static void test_store_cursor_fits_its_own_query_only(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    model *m = calloc(1, sizeof *m);
    spurion_store_query q;
    spurion_store_page page;
    uint64_t random = SEED;
    size_t i;
    char copy[STORE_KEY_BYTES_MAX];
    model_fill(m, &random);
    model_commit(m, s);
    memset(&q, 0, sizeof q);
    q.run = text("r1");
    q.limit = 3;
    assert_ok(spurion_store_query_page(&page, &p->arena, s, &q));
    assert_true(page.more);
    q.cursor = page.cursor;
    q.descending = true;
    assert_code(SPURION_INVALID_ARGUMENT, spurion_store_query_page(&page, &p->arena, s, &q));
    q.descending = false;
    q.run = text("r10");
    assert_code(SPURION_INVALID_ARGUMENT, spurion_store_query_page(&page, &p->arena, s, &q));
    q.run = text("r1");
    memcpy(copy, q.cursor.data, q.cursor.size);
    for (i = 0; i < q.cursor.size; i++) {
        spurion_store_query wrong = q;
        wrong.cursor.data = copy;
        copy[i] ^= 1;
        assert_code(SPURION_INVALID_ARGUMENT, spurion_store_query_page(&page, &p->arena, s, &wrong));
        copy[i] ^= 1;
    }
    q.limit = SPURION_STORE_PAGE_MAX + 1;
    assert_code(SPURION_INVALID_ARGUMENT, spurion_store_query_page(&page, &p->arena, s, &q));
    spurion_store_close(s);
    free(m);
}

static void test_store_page_looks_at_a_bounded_number_of_entries(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    int count = SPURION_STORE_EXAMINED_MAX + 500, i, pages = 0, found = 0;
    spurion_store_row *rows = calloc((size_t)count, sizeof *rows);
    char(*names)[16] = calloc((size_t)count, sizeof *names);
    spurion_store_batch b;
    spurion_store_query q;
    spurion_store_page page;
    for (i = 0; i < count; i++) {
        (void)snprintf(names[i], sizeof names[i], "i%06d", i);
        rows[i] = make_row("run", 1, "g", names[i], 1);
        rows[i].time_ms = i == count - 1 ? 5 : 1;
    }
    for (i = 0; i < count; i += 1000) {
        b = make_batch(&rows[i], count - i < 1000 ? count - i : 1000);
        assert_ok(spurion_store_commit(s, &b));
    }
    memset(&q, 0, sizeof q);
    q.run = text("run");
    q.has_time_min = true; /* not what this order is sorted by: only the last row fits */
    q.time_min = 5;
    do {
        assert_ok(spurion_store_query_page(&page, &p->arena, s, &q));
        pages++;
        found += page.row_count;
        q.cursor = page.cursor;
        assert_true(pages > 1 || (page.row_count == 0 && page.more));
    } while (page.more);
    assert_int_equal(pages, 2);
    assert_int_equal(found, 1);
    spurion_store_close(s);
    free(rows);
    free(names);
}

static void test_store_page_stops_at_its_bytes(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    char blob[1000];
    spurion_store_row rows[5];
    spurion_store_batch b = make_batch(rows, 5);
    spurion_store_query q;
    spurion_store_page page;
    const char *ids[] = {"a", "b", "c", "d", "e"};
    int i, pages = 0, found = 0;
    memset(blob, 'x', sizeof blob);
    for (i = 0; i < 5; i++) {
        rows[i] = make_row("run", 1, "g", ids[i], 1);
        rows[i].record = (spurion_bytes){blob, sizeof blob};
    }
    assert_ok(spurion_store_commit(s, &b));
    memset(&q, 0, sizeof q);
    q.run = text("run");
    q.with_record = true;
    q.bytes_max = 2100;
    do {
        assert_ok(spurion_store_query_page(&page, &p->arena, s, &q));
        assert_true(page.row_count <= 2);
        found += page.row_count;
        q.cursor = page.cursor;
        pages++;
    } while (page.more);
    assert_int_equal(found, 5);
    assert_int_equal(pages, 3);
    q.cursor = (spurion_bytes){NULL, 0};
    q.bytes_max = 10; /* one always fits */
    assert_ok(spurion_store_query_page(&page, &p->arena, s, &q));
    assert_int_equal(page.row_count, 1);
    spurion_store_close(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_store_queries_equal_a_plain_model),
        TEST(test_store_counters_equal_a_plain_model),
        TEST(test_store_counts_come_in_pages),
        TEST(test_store_worst_of_step_are_the_largest_effects),
        TEST(test_store_export_gives_every_row_of_the_moment),
        TEST(test_store_cursor_fits_its_own_query_only),
        TEST(test_store_page_looks_at_a_bounded_number_of_entries),
        TEST(test_store_page_stops_at_its_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* The store: what is committed comes back, once; damage and misuse are named. Queries: test_store_query.c.
 * RocksDB itself is used only to damage stores behind our back. */
#include "store_place.h"

#include <dirent.h>
#include <pthread.h>
#include <stdatomic.h>

#include "daemon/store_internal.h"

/* ---- opening ---- */

static void test_store_open_makes_directories_and_keeps_its_epoch(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    uint64_t epoch = spurion_store_alert_epoch(s);
    assert_true(epoch != 0);
    assert_int_equal(spurion_store_alert_next(s), 1);
    spurion_store_close(s);
    s = open_store(p);
    assert_true(spurion_store_alert_epoch(s) == epoch);
    spurion_store_close(s);
    spurion_store_close(NULL);
}

static void test_store_open_refuses_a_second_opener(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p), *second = NULL;
    spurion_status st = try_open(&second, p);
    assert_int_equal(st.code, SPURION_FAILED_PRECONDITION);
    assert_non_null(strstr(st.message, "lock"));
    assert_null(second);
    spurion_store_close(s);
}

/* Puts or removes a value behind the store's back; value NULL: removes. */
static void tamper(const place *p, store_family family, const void *key, size_t key_size, const void *value, size_t size)
{
    rocksdb_options_t *o = rocksdb_options_create();
    rocksdb_writeoptions_t *w = rocksdb_writeoptions_create();
    rocksdb_column_family_handle_t *handles[FAMILY_COUNT];
    const rocksdb_options_t *options[FAMILY_COUNT];
    char *message = NULL;
    rocksdb_t *db;
    int i;
    for (i = 0; i < FAMILY_COUNT; i++) {
        options[i] = o;
    }
    db = rocksdb_open_column_families(o, p->path, FAMILY_COUNT, store_family_names, options, handles, &message);
    if (message) {
        fail_msg("%s", message);
    }
    if (value) {
        rocksdb_put_cf(db, w, handles[family], key, key_size, value, size, &message);
    } else {
        rocksdb_delete_cf(db, w, handles[family], key, key_size, &message);
    }
    assert_null(message);
    for (i = 0; i < FAMILY_COUNT; i++) {
        rocksdb_column_family_handle_destroy(handles[i]);
    }
    rocksdb_close(db);
    rocksdb_writeoptions_destroy(w);
    rocksdb_options_destroy(o);
}

static void test_store_open_refuses_an_unknown_format_version(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    spurion_bytes sealed, key = text("oformat_version");
    spurion_status st;
    spurion_store_close(s);
    assert_ok(store_value_seal(&sealed, &p->arena, key, text("99")));
    tamper(p, FAMILY_META, key.data, key.size, sealed.data, sealed.size);
    st = try_open(&s, p);
    assert_int_equal(st.code, SPURION_FAILED_PRECONDITION);
    assert_non_null(strstr(st.message, "expected 1, found 99"));
    tamper(p, FAMILY_META, key.data, key.size, NULL, 0);
    st = try_open(&s, p);
    assert_int_equal(st.code, SPURION_FAILED_PRECONDITION);
    assert_non_null(strstr(st.message, "found none"));
}

static void test_store_open_refuses_a_directory_of_something_else(void **state)
{
    place *p = *state;
    char path[300];
    spurion_store *s;
    spurion_status st;
    FILE *f;
    (void)snprintf(path, sizeof path, "%s/holiday.jpg", p->root);
    f = fopen(path, "w");
    assert_non_null(f);
    fclose(f);
    (void)snprintf(p->path, sizeof p->path, "%s", p->root);
    st = try_open(&s, p);
    assert_int_equal(st.code, SPURION_FAILED_PRECONDITION);
    assert_non_null(strstr(st.message, "holiday.jpg"));
    (void)snprintf(p->path, sizeof p->path, "%s", path);
    assert_code(SPURION_FAILED_PRECONDITION, try_open(&s, p)); /* a file */
}

static void test_store_open_and_commit_need_free_space(void **state)
{
    place *p = *state;
    spurion_store_options o = {p->path, false, 1ull << 60};
    spurion_store *s;
    spurion_store_stats stats;
    spurion_store_row row = make_row("r", 1, "g", "i", 1);
    spurion_store_batch b = make_batch(&row, 1);
    spurion_status st = spurion_store_open(&s, &o);
    assert_int_equal(st.code, SPURION_RESOURCE_EXHAUSTED);
    s = open_store(p);
    s->free_bytes_min = 1ull << 60;
    assert_code(SPURION_RESOURCE_EXHAUSTED, spurion_store_commit(s, &b));
    spurion_store_stats_get(&stats, s);
    assert_true(!stats.writable && stats.low_space && !stats.failed && stats.refused_for_space == 1);
    s->free_bytes_min = 1 << 20;
    assert_ok(spurion_store_commit(s, &b)); /* space came back: nothing is stuck */
    assert_int_equal(row.outcome, SPURION_ROW_STORED);
    spurion_store_stats_get(&stats, s);
    assert_true(stats.writable && stats.rows == 1);
    spurion_store_close(s);
}

/* ---- rows ---- */

static void test_store_commit_reads_back_after_reopening(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    spurion_store_flag flags[] = {{text("url"), 0.75f}, {text("flip"), -0.5f}};
    spurion_store_row row = make_row("run", 12, "g7", "g7-3", 9), back;
    spurion_store_batch b = make_batch(&row, 1);
    row.flags = flags;
    row.flag_count = 2;
    row.verdict = (spurion_bytes){"a\0b", 3};
    row.record = text("the whole record");
    assert_ok(spurion_store_commit(s, &b));
    spurion_store_close(s);
    s = open_store(p);
    assert_ok(spurion_store_get(&back, &p->arena, s, &row.identity, false));
    assert_true(back.has_record);
    assert_int_equal(back.record.size, 0);
    assert_ok(spurion_store_get(&back, &p->arena, s, &row.identity, true));
    assert_true(equal(back.record, row.record) && equal(back.verdict, row.verdict) && equal(back.identity.id, text("g7-3")));
    assert_memory_equal(back.digest, row.digest, SPURION_DIGEST_BYTES);
    assert_int_equal(back.flag_count, 2);
    assert_true(back.flags[0].effect == 0.75f && back.effect == row.effect && back.time_ms == row.time_ms);
    row.identity.attempt = 1;
    assert_code(SPURION_NOT_FOUND, spurion_store_get(&back, &p->arena, s, &row.identity, false));
    spurion_store_close(s);
}

static void test_store_known_identity_changes_nothing(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    spurion_store_flag flag = {text("url"), 0.75f};
    spurion_store_feature feature = {text("mid"), 5, 0.5f, true, true};
    spurion_store_row rows[4] = {make_row("run", 3, "g", "a", 1), make_row("run", 3, "g", "a", 1), make_row("run", 3, "g", "a", 2),
                                 make_row("run", 3, "g", "b", 3)};
    spurion_store_alert alerts[] = {
        {text("one"), 0, -1, 0}, {text("again"), 1, -1, 0}, {text("other"), 2, -1, 0}, {text("free"), -1, -1, 0}};
    spurion_store_batch b = make_batch(rows, 4);
    spurion_store_count at, through;
    spurion_store_counts_page counts;
    spurion_store_counts_query q;
    int i, round;
    for (i = 0; i < 4; i++) {
        rows[i].flags = &flag;
        rows[i].flag_count = 1;
        rows[i].features = &feature;
        rows[i].feature_count = 1;
    }
    b.alerts = alerts;
    b.alert_count = 4;
    assert_ok(spurion_store_commit(s, &b));
    assert_int_equal(rows[0].outcome, SPURION_ROW_STORED);
    assert_int_equal(rows[1].outcome, SPURION_ROW_SAME); /* within one batch */
    assert_int_equal(rows[2].outcome, SPURION_ROW_CONFLICT);
    assert_int_equal(rows[3].outcome, SPURION_ROW_STORED);
    assert_int_equal(alerts[0].sequence, 1);
    assert_int_equal(alerts[1].sequence, 0);
    assert_int_equal(alerts[2].sequence, 0);
    assert_int_equal(alerts[3].sequence, 2);
    b.alert_count = 3;
    for (round = 0; round < 2; round++) { /* sent again, before and after a restart */
        assert_ok(spurion_store_commit(s, &b));
        assert_int_equal(rows[0].outcome, SPURION_ROW_SAME);
        assert_int_equal(rows[2].outcome, SPURION_ROW_CONFLICT);
        assert_int_equal(alerts[0].sequence, 0);
        assert_int_equal(spurion_store_alert_next(s), 3);
        assert_ok(spurion_store_rule_counts(&at, &through, s, text("run"), text("url"), 3));
        assert_int_equal(at.scored, 2);
        assert_int_equal(at.flagged, 2);
        assert_int_equal(through.flagged, 2);
        spurion_store_close(s);
        s = open_store(p);
    }
    memset(&q, 0, sizeof q);
    q.kind = SPURION_COUNT_FEATURE;
    q.run = text("run");
    q.totals = true;
    assert_ok(spurion_store_counts(&counts, &p->arena, s, &q));
    assert_int_equal(counts.count, 1);
    assert_int_equal(counts.counts[0].scored, 2);
    assert_int_equal(counts.counts[0].index, 5);
    assert_true(counts.counts[0].effect_sum == 1.0);
    spurion_store_close(s);
}

static void test_store_commit_names_what_is_out_of_bounds(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    char longest[SPURION_NAME_BYTES_MAX + 2];
    spurion_store_row rows[2] = {make_row("run", 3, "g", "a", 1), make_row("run", 3, "g", "b", 1)};
    spurion_store_batch b = make_batch(rows, 2);
    spurion_store_row back;
    memset(longest, 'x', sizeof longest);
    longest[sizeof longest - 1] = '\0';
    rows[1].identity.group = text(longest);
    assert_code(SPURION_INVALID_ARGUMENT, spurion_store_commit(s, &b));
    rows[1].identity.group = text("");
    assert_code(SPURION_INVALID_ARGUMENT, spurion_store_commit(s, &b));
    rows[1].identity.group = text("g");
    rows[1].identity.step = -1;
    assert_code(SPURION_INVALID_ARGUMENT, spurion_store_commit(s, &b));
    assert_code(SPURION_NOT_FOUND, spurion_store_get(&back, &p->arena, s, &rows[0].identity, false)); /* nothing of the batch */
    rows[1].identity.step = 3;
    longest[SPURION_NAME_BYTES_MAX] = '\0';
    rows[1].identity.run = rows[1].identity.group = rows[1].identity.id = text(longest);
    assert_ok(spurion_store_commit(s, &b));
    assert_ok(spurion_store_get(&back, &p->arena, s, &rows[1].identity, false));
    spurion_store_close(s);
}

/* ---- alerts, closings, runs, inbox, replies, marks, texts ---- */

static void test_store_closing_is_done_once(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    spurion_store_row row = make_row("run", 3, "g", "a", 1), late = make_row("run", 3, "g", "late", 1),
                      other = make_row("run", 4, "g", "x", 1);
    spurion_store_batch b = make_batch(&row, 1);
    spurion_store_closing closings[] = {
        {text("run"), text("url"), 3, false}, {text("run"), text("url"), 3, false}, {text("run"), {NULL, 0}, 3, false}};
    spurion_store_alert alerts[] = {{text("first"), -1, 0, 0}, {text("second"), -1, 1, 0}};
    spurion_store_open_step *open;
    int32_t count;
    bool closed;
    assert_ok(spurion_store_commit(s, &b));
    b = make_batch(&other, 1);
    assert_ok(spurion_store_commit(s, &b));
    assert_ok(spurion_store_open_steps(&open, &count, &p->arena, s, (spurion_bytes){NULL, 0}, 10));
    assert_int_equal(count, 2);
    assert_int_equal(open[0].step, 3);
    memset(&b, 0, sizeof b);
    b.closings = closings;
    b.closing_count = 3;
    b.alerts = alerts;
    b.alert_count = 2;
    assert_ok(spurion_store_commit(s, &b));
    assert_false(closings[0].closed_before);
    assert_true(closings[1].closed_before);
    assert_int_equal(alerts[0].sequence, 1);
    assert_int_equal(alerts[1].sequence, 0);
    spurion_store_close(s);
    s = open_store(p);
    assert_ok(spurion_store_commit(s, &b));
    assert_true(closings[0].closed_before && closings[2].closed_before);
    assert_int_equal(alerts[0].sequence, 0);
    assert_int_equal(spurion_store_alert_next(s), 2);
    assert_ok(spurion_store_step_closed(&closed, s, text("run"), 3, text("url")));
    assert_true(closed);
    assert_ok(spurion_store_step_closed(&closed, s, text("run"), 3, text("flip")));
    assert_false(closed);
    b = make_batch(&late, 1); /* counts, but opens nothing */
    assert_ok(spurion_store_commit(s, &b));
    assert_ok(spurion_store_open_steps(&open, &count, &p->arena, s, text("run"), 10));
    assert_int_equal(count, 1);
    assert_int_equal(open[0].step, 4);
    spurion_store_close(s);
}

static void test_store_alerts_are_numbered_without_gaps(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    spurion_store_alert alerts[7];
    spurion_store_batch b;
    spurion_store_alert_entry *list;
    int32_t count, i, round;
    memset(&b, 0, sizeof b);
    b.alerts = alerts;
    for (round = 1; round <= 7; round++) {
        for (i = 0; i < round; i++) {
            alerts[i] = (spurion_store_alert){text("alert text"), -1, -1, 0};
        }
        b.alert_count = round;
        assert_ok(spurion_store_commit(s, &b));
        if (round % 3 == 0) {
            spurion_store_close(s);
            s = open_store(p);
        }
    }
    assert_int_equal(spurion_store_alert_next(s), 29);
    assert_ok(spurion_store_alerts(&list, &count, &p->arena, s, 0, 1000, 0));
    assert_int_equal(count, 28);
    for (i = 0; i < count; i++) {
        assert_int_equal(list[i].sequence, i + 1);
        assert_true(equal(list[i].alert, text("alert text")));
    }
    assert_ok(spurion_store_alerts(&list, &count, &p->arena, s, 27, 1000, 0));
    assert_int_equal(count, 2);
    assert_ok(spurion_store_alerts(&list, &count, &p->arena, s, 5, 1000, 35));
    assert_int_equal(count, 3);
    assert_ok(spurion_store_alerts(&list, &count, &p->arena, s, 29, 1000, 0));
    assert_int_equal(count, 0);
    spurion_store_close(s);
}

static void test_store_runs_are_listed_with_their_spans(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    spurion_store_flag flag = {text("url"), 1};
    spurion_store_row rows[] = {make_row("b", 7, "g", "1", 1), make_row("a", 2, "g", "1", 1), make_row("b", 3, "g", "2", 1)};
    spurion_store_batch b = make_batch(rows, 3);
    spurion_store_run *runs;
    int32_t count;
    bool more;
    rows[2].flags = &flag;
    rows[2].flag_count = 1;
    assert_ok(spurion_store_commit(s, &b));
    assert_ok(spurion_store_runs(&runs, &count, &more, &p->arena, s, (spurion_bytes){NULL, 0}, 1));
    assert_true(count == 1 && more && equal(runs[0].run, text("a")));
    assert_ok(spurion_store_runs(&runs, &count, &more, &p->arena, s, runs[0].run, 10));
    assert_true(count == 1 && !more && equal(runs[0].run, text("b")));
    assert_int_equal(runs[0].rollouts, 2);
    assert_int_equal(runs[0].flagged, 1);
    assert_true(runs[0].step_min == 3 && runs[0].step_max == 7 && runs[0].first_ms == 1003 && runs[0].last_ms == 1007);
    spurion_store_close(s);
}

static void test_store_inbox_keeps_what_is_not_judged(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    spurion_bytes values[] = {text("one"), text("two"), text("three")};
    spurion_store_reply reply = {text("key"), text("accepted"), 100};
    spurion_store_row row = make_row("run", 1, "g", "a", 1);
    spurion_store_batch b = make_batch(&row, 1);
    spurion_store_inbox_entry *list;
    spurion_bytes found;
    uint64_t tickets[3], more[1];
    int32_t count, damaged;
    assert_ok(spurion_store_inbox_put(tickets, s, values, 3, &reply, NULL, 0));
    b.inbox_done = &tickets[1];
    b.inbox_done_count = 1;
    assert_ok(spurion_store_commit(s, &b));
    spurion_store_close(s);
    s = open_store(p);
    assert_ok(spurion_store_inbox(&list, &count, &damaged, &p->arena, s, 0, 10));
    assert_int_equal(count, 2);
    assert_int_equal(damaged, 0);
    assert_true(equal(list[0].value, text("one")) && equal(list[1].value, text("three")) && list[1].ticket == tickets[2]);
    assert_ok(spurion_store_reply_get(&found, &p->arena, s, text("key"), 50));
    assert_true(equal(found, text("accepted")));
    assert_ok(spurion_store_inbox_put(more, s, values, 1, NULL, NULL, 0));
    assert_true(more[0] > tickets[2]);
    assert_ok(spurion_store_inbox(&list, &count, NULL, &p->arena, s, tickets[2], 10));
    assert_true(count == 1 && list[0].ticket == more[0]);
    spurion_store_close(s);
}

static void test_store_replies_expire(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    spurion_store_reply replies[] = {{text("a"), text("A"), 100}, {text("b"), text("B"), 200}, {text("c"), text(""), 300}};
    spurion_store_reply again = {text("a"), text("A2"), 400};
    spurion_store_batch b;
    spurion_bytes found;
    int32_t removed;
    memset(&b, 0, sizeof b);
    b.replies = replies;
    b.reply_count = 3;
    assert_ok(spurion_store_commit(s, &b));
    assert_ok(spurion_store_reply_get(&found, &p->arena, s, text("a"), 99));
    assert_code(SPURION_NOT_FOUND, spurion_store_reply_get(&found, &p->arena, s, text("a"), 100)); /* over, though still stored */
    assert_ok(spurion_store_reply_get(&found, &p->arena, s, text("c"), 299));
    assert_int_equal(found.size, 0);
    b.replies = &again;
    b.reply_count = 1;
    assert_ok(spurion_store_commit(s, &b));
    assert_ok(spurion_store_trim(&removed, s, 250, 100)); /* a's first expiry, and b; a itself lives on */
    assert_int_equal(removed, 2);
    assert_ok(spurion_store_reply_get(&found, &p->arena, s, text("a"), 250));
    assert_true(equal(found, text("A2")));
    assert_code(SPURION_NOT_FOUND, spurion_store_reply_get(&found, &p->arena, s, text("b"), 0)); /* gone */
    assert_ok(spurion_store_trim(&removed, s, 250, 100));
    assert_int_equal(removed, 0);
    replies[0].key = text("");
    b.replies = replies;
    assert_code(SPURION_INVALID_ARGUMENT, spurion_store_commit(s, &b));
    spurion_store_close(s);
}

static void test_store_marks_and_texts_are_replaced(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    spurion_store_mark marks[] = {{text("run"), text("p1"), 7, text("0-5")},
                                  {text("run"), text("p2"), 7, text("0-9")},
                                  {text("other"), text("p1"), 1, text("0-1")}};
    spurion_store_mark newer = {text("run"), text("p1"), 7, text("0-8")}, *list;
    spurion_store_batch b;
    spurion_bytes found;
    uint64_t ticket;
    int32_t count;
    memset(&b, 0, sizeof b);
    b.marks = marks;
    b.mark_count = 3;
    assert_ok(spurion_store_commit(s, &b));
    assert_ok(spurion_store_inbox_put(&ticket, s, marks[0].ranges.size ? &marks[0].ranges : NULL, 1, NULL, &newer, 1));
    assert_ok(spurion_store_mark_get(&found, &p->arena, s, text("run"), text("p1"), 7));
    assert_true(equal(found, text("0-8")));
    assert_code(SPURION_NOT_FOUND, spurion_store_mark_get(&found, &p->arena, s, text("run"), text("p1"), 8));
    assert_ok(spurion_store_marks(&list, &count, &p->arena, s, text("run"), 10));
    assert_int_equal(count, 2);
    assert_ok(spurion_store_marks(&list, &count, &p->arena, s, (spurion_bytes){NULL, 0}, 10));
    assert_int_equal(count, 3);
    assert_ok(spurion_store_meta_put(s, text("provenance/9f31"), text("{}")));
    assert_ok(spurion_store_meta_put(s, text("provenance/9f31"), text("{\"model\":1}")));
    assert_ok(spurion_store_meta_get(&found, &p->arena, s, text("provenance/9f31")));
    assert_true(equal(found, text("{\"model\":1}")));
    assert_code(SPURION_NOT_FOUND, spurion_store_meta_get(&found, &p->arena, s, text("format_version"))); /* not ours to read */
    spurion_store_close(s);
}

/* ---- damage ---- */

static void test_store_damaged_rows_are_counted_and_the_rest_is_served(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    spurion_store_row rows[] = {make_row("run", 1, "g", "a", 1), make_row("run", 2, "g", "b", 1), make_row("run", 3, "g", "c", 1)},
                      back;
    spurion_store_batch b = make_batch(rows, 3);
    spurion_store_query q;
    spurion_store_page page;
    spurion_store_stats stats;
    spurion_store_export *e;
    store_key key;
    bool found = true;
    int good = 0, bad = 0;
    assert_ok(spurion_store_commit(s, &b));
    spurion_store_close(s);
    store_key_init(&key);
    store_key_identity(&key, &rows[1].identity);
    tamper(p, FAMILY_ROLLOUT, key.data, key.size, "\1\0\0\0\0what", 9);
    s = open_store(p);
    assert_code(SPURION_DATA_LOSS, spurion_store_get(&back, &p->arena, s, &rows[1].identity, false));
    memset(&q, 0, sizeof q);
    q.run = text("run");
    assert_ok(spurion_store_query_page(&page, &p->arena, s, &q));
    assert_int_equal(page.row_count, 2);
    assert_int_equal(page.damaged_count, 1);
    spurion_store_stats_get(&stats, s);
    assert_int_equal(stats.corruptions, 2);
    assert_ok(spurion_store_commit(s, &b)); /* a damaged row still occupies its identity */
    assert_int_equal(rows[0].outcome, SPURION_ROW_SAME);
    assert_int_equal(rows[1].outcome, SPURION_ROW_CONFLICT);
    assert_ok(spurion_store_export_open(&e, s, text("run")));
    while (found) {
        spurion_status st = spurion_store_export_next(&found, &back, e);
        good += found && st.code == SPURION_OK;
        bad += st.code == SPURION_DATA_LOSS;
    }
    assert_true(good == 2 && bad == 1);
    spurion_store_export_close(e);
    spurion_store_close(s);
}

static void test_store_damaged_counter_stops_the_commit(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    spurion_store_row row = make_row("run", 1, "g", "a", 1), next = make_row("run", 1, "g", "b", 1), back;
    spurion_store_batch b = make_batch(&row, 1);
    store_key key;
    assert_ok(spurion_store_commit(s, &b));
    spurion_store_close(s);
    store_key_init(&key);
    store_key_u8(&key, COUNTER_RULE);
    store_key_name(&key, text("run"));
    store_key_name(&key, text("url"));
    store_key_i64(&key, 1);
    tamper(p, FAMILY_COUNTER, key.data, key.size, "garbage", 7);
    s = open_store(p);
    b = make_batch(&next, 1);
    assert_code(SPURION_DATA_LOSS, spurion_store_commit(s, &b));
    assert_code(SPURION_NOT_FOUND, spurion_store_get(&back, &p->arena, s, &next.identity, false));
    spurion_store_close(s);
}

/* The newest log file, cut to `keep` bytes. */
static void cut_log(const place *p, off_t keep)
{
    char newest[300] = "", path[900];
    DIR *d = opendir(p->path);
    struct dirent *e;
    assert_non_null(d);
    while ((e = readdir(d)) != NULL) {
        size_t n = strlen(e->d_name);
        if (n > 4 && strcmp(e->d_name + n - 4, ".log") == 0 && strcmp(e->d_name, newest) > 0) {
            (void)snprintf(newest, sizeof newest, "%s", e->d_name);
        }
    }
    closedir(d);
    assert_true(newest[0] != '\0');
    (void)snprintf(path, sizeof path, "%s/%s", p->path, newest);
    assert_int_equal(truncate(path, keep), 0);
}

/* RocksDB takes a log that ends early for a torn tail; what was acknowledged must be missed all the same. */
static void test_store_log_that_was_cut_is_data_loss(void **state)
{
    place *p = *state;
    spurion_store *s = open_store(p);
    spurion_store_row row = make_row("run", 1, "g", "a", 1);
    spurion_store_batch b = make_batch(&row, 1);
    spurion_status st;
    assert_ok(spurion_store_commit(s, &b));
    spurion_store_close(s);
    cut_log(p, 0);
    st = try_open(&s, p);
    assert_int_equal(st.code, SPURION_DATA_LOSS);
    assert_non_null(strstr(st.message, "log was cut"));
}

static void test_store_checkpoint_opens_as_a_store(void **state)
{
    place *p = *state, copy = *p;
    spurion_store *s = open_store(p);
    spurion_store_row row = make_row("run", 1, "g", "a", 1), later = make_row("run", 1, "g", "b", 1), back;
    spurion_store_batch b = make_batch(&row, 1);
    assert_ok(spurion_store_commit(s, &b));
    (void)snprintf(copy.path, sizeof copy.path, "%s/copy", p->root);
    assert_ok(spurion_store_checkpoint(s, copy.path));
    b = make_batch(&later, 1);
    assert_ok(spurion_store_commit(s, &b));
    assert_code(SPURION_UNAVAILABLE, spurion_store_checkpoint(s, copy.path)); /* it exists */
    spurion_store_close(s);
    s = open_store(&copy);
    assert_ok(spurion_store_get(&back, &p->arena, s, &row.identity, true));
    assert_code(SPURION_NOT_FOUND, spurion_store_get(&back, &p->arena, s, &later.identity, true));
    spurion_store_close(s);
}

/* ---- threads ---- */

typedef struct shared {
    spurion_store *store;
    atomic_int committed;
    atomic_bool stop;
} shared;

static void *reader_main(void *context)
{
    shared *sh = context;
    spurion_arena arena;
    spurion_arena_init(&arena, 0);
    while (!atomic_load(&sh->stop)) {
        int floor = atomic_load(&sh->committed);
        spurion_store_count at, through;
        spurion_store_query q;
        spurion_store_page page;
        memset(&q, 0, sizeof q);
        q.run = text("run");
        q.limit = 1000;
        assert_ok(spurion_store_query_page(&page, &arena, sh->store, &q));
        assert_true(page.row_count >= floor && page.damaged_count == 0); /* what was committed before is there */
        assert_ok(spurion_store_rule_counts(&at, &through, sh->store, text("run"), text("url"), 1));
        assert_true((int)at.scored >= floor);
        spurion_arena_reset(&arena);
    }
    spurion_arena_fini(&arena);
    return NULL;
}

static void *intake_main(void *context)
{
    shared *sh = context;
    spurion_bytes values[] = {text("one"), text("two")};
    uint64_t tickets[2];
    do { /* at least once, however late this thread begins */
        assert_ok(spurion_store_inbox_put(tickets, sh->store, values, 2, NULL, NULL, 0));
        assert_ok(spurion_store_meta_put(sh->store, text("key"), text("value")));
    } while (!atomic_load(&sh->stop));
    return NULL;
}

static void test_store_serves_readers_and_intake_beside_the_writer(void **state)
{
    place *p = *state;
    shared sh = {open_store(p), 0, false};
    pthread_t threads[4];
    spurion_store_stats stats;
    char name[16];
    int i;
    for (i = 0; i < 4; i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, i < 2 ? reader_main : intake_main, &sh), 0);
    }
    for (i = 0; i < 150; i++) {
        spurion_store_row row;
        spurion_store_batch b;
        (void)snprintf(name, sizeof name, "i%d", i);
        row = make_row("run", 1, "g", name, 1);
        b = make_batch(&row, 1);
        assert_ok(spurion_store_commit(sh.store, &b));
        atomic_fetch_add(&sh.committed, 1);
    }
    atomic_store(&sh.stop, true);
    for (i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
    }
    spurion_store_stats_get(&stats, sh.store);
    assert_true(stats.rows == 150 && stats.inbox_puts > 0 && stats.corruptions == 0 && stats.last_sync_ns > 0);
    spurion_store_close(sh.store);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_store_open_makes_directories_and_keeps_its_epoch),
        TEST(test_store_open_refuses_a_second_opener),
        TEST(test_store_open_refuses_an_unknown_format_version),
        TEST(test_store_open_refuses_a_directory_of_something_else),
        TEST(test_store_open_and_commit_need_free_space),
        TEST(test_store_commit_reads_back_after_reopening),
        TEST(test_store_known_identity_changes_nothing),
        TEST(test_store_commit_names_what_is_out_of_bounds),
        TEST(test_store_closing_is_done_once),
        TEST(test_store_alerts_are_numbered_without_gaps),
        TEST(test_store_runs_are_listed_with_their_spans),
        TEST(test_store_inbox_keeps_what_is_not_judged),
        TEST(test_store_replies_expire),
        TEST(test_store_marks_and_texts_are_replaced),
        TEST(test_store_damaged_rows_are_counted_and_the_rest_is_served),
        TEST(test_store_damaged_counter_stops_the_commit),
        TEST(test_store_log_that_was_cut_is_data_loss),
        TEST(test_store_checkpoint_opens_as_a_store),
        TEST(test_store_serves_readers_and_intake_beside_the_writer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

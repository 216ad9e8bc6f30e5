/* A process to kill: commits batches to a store and says on stdout what was acknowledged, one line per write(2); or dumps a store.
 *   store_writer write DIR FIRST [--min BYTES] [--record BYTES] [--batches N] [--ack-early]
 *       goes on with rollout number FIRST (numbers below may be stored already: they are sent again). Lines:
 *       ready | ack FIRST LAST (rollouts) | alert SEQUENCE TEXT | put TICKET NUMBER (accepted, to be judged) | mark RANGES
 *       | reply KEY | refused CODE MESSAGE | failed CODE MESSAGE
 *   store_writer dump DIR [--min BYTES]
 *       everything in the store as lines "row ...", "count ...", "alert ...", ...; test_store.py knows them.
 * Everything about rollout number k follows from k, so that the checker needs no memory of its own. Threads: the sink, and one that
 * accepts rollouts into the inbox. */
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/base/clock.h"
#include "daemon/store.h"
#include "daemon/store_keys.h"

#define STEP_ROLLOUTS 64
#define BATCH_MAX 32

typedef struct options {
    const char *directory;
    uint64_t first, free_bytes_min;
    size_t record_bytes;
    int64_t batches;
    bool ack_early;
} options;

/* A rollout with the memory that its row points to. */
typedef struct made {
    char group[24], id[24], alert[48];
    char *record;
    spurion_store_flag flag;
    spurion_store_feature feature;
} made;

static spurion_bytes text(const char *s)
{
    spurion_bytes b = {s, strlen(s)};
    return b;
}

static void say(const char *line, int length)
{
    if (write(1, line, (size_t)length) != length) {
        _exit(3); /* nobody listens: the harness is gone */
    }
}

#define SAY(...)                                                                                                                   \
    do {                                                                                                                           \
        char say_line[600];                                                                                                        \
        say(say_line, snprintf(say_line, sizeof say_line, __VA_ARGS__));                                                           \
    } while (0)

/* Mixes k (the finaliser of MurmurHash3); the checker has the same. */
static uint64_t mix(uint64_t k)
{
    k ^= k >> 33;
    k *= 0xff51afd7ed558ccdull;
    k ^= k >> 33;
    k *= 0xc4ceb9fe1a85ec53ull;
    return k ^ k >> 33;
}

static spurion_bytes run_of(uint64_t k)
{
    return text(k / STEP_ROLLOUTS % 2 ? "run-b" : "run-a");
}

static void make_row(spurion_store_row *row, made *m, uint64_t k, const options *o)
{
    uint64_t h = mix(k);
    size_t i;

    memset(row, 0, sizeof *row);
    (void)snprintf(m->group, sizeof m->group, "g%" PRIu64, k / 8);
    (void)snprintf(m->id, sizeof m->id, "%" PRIu64, k);
    row->identity = (spurion_identity){run_of(k), text(m->group), text(m->id), (int64_t)(k / STEP_ROLLOUTS), 0};
    for (i = 0; i < SPURION_DIGEST_BYTES; i++) {
        row->digest[i] = (uint8_t)(h >> (i % 8 * 8));
    }
    row->time_ms = (int64_t)(1000000 + k);
    row->reward = (float)(h % 1000) / 8;
    row->effect = h % 3 ? -(float)(h % 100 + 1) / 16 : 0;
    row->verdict = text(m->id);
    m->feature = (spurion_store_feature){text("mid"), (int32_t)(h % 5), 0.5f, true, true};
    row->features = &m->feature;
    row->feature_count = 1;
    if (h % 5 == 0) {
        m->flag = (spurion_store_flag){text("url"), (float)(h % 7) + 1};
        row->flags = &m->flag;
        row->flag_count = 1;
        memset(m->record, 'a' + (int)(h % 26), o->record_bytes);
        row->record = (spurion_bytes){m->record, o->record_bytes};
    }
}

static spurion_status commit_batch(spurion_store *s, const options *o, uint64_t first, int count, const uint64_t *tickets,
                                   int ticket_count)
{
    static made things[BATCH_MAX]; /* one sink */
    spurion_store_row rows[BATCH_MAX];
    spurion_store_alert alerts[BATCH_MAX + 1];
    spurion_store_closing closings[2];
    spurion_bytes rules[] = {text("url")};
    spurion_store_mark mark;
    spurion_store_reply reply;
    spurion_store_batch b;
    spurion_status st;
    char ranges[48], key[32], rate[48];
    uint64_t last = first + (uint64_t)count - 1, step = last / STEP_ROLLOUTS;
    int i;

    memset(&b, 0, sizeof b);
    for (i = 0; i < count; i++) {
        if (!things[i].record) {
            things[i].record = malloc(o->record_bytes);
        }
        make_row(&rows[i], &things[i], first + (uint64_t)i, o);
        if (rows[i].flag_count) {
            (void)snprintf(things[i].alert, sizeof things[i].alert, "each-%" PRIu64, first + (uint64_t)i);
            alerts[b.alert_count++] = (spurion_store_alert){text(things[i].alert), i, -1, 0};
        }
    }
    if (first % STEP_ROLLOUTS < (uint64_t)count && step > 0) { /* the step before is over: closed again by every restart */
        (void)snprintf(rate, sizeof rate, "rate-%" PRIu64, step - 1);
        closings[0] = (spurion_store_closing){run_of((step - 1) * STEP_ROLLOUTS), text("url"), (int64_t)step - 1, false};
        closings[1] = (spurion_store_closing){run_of((step - 1) * STEP_ROLLOUTS), {NULL, 0}, (int64_t)step - 1, false};
        b.closings = closings;
        b.closing_count = 2;
        alerts[b.alert_count++] = (spurion_store_alert){text(rate), -1, 0, 0};
    }
    (void)snprintf(ranges, sizeof ranges, "%" PRIu64 "@%" PRId64, last, spurion_clock_ns()); /* no two commits have the same */
    mark = (spurion_store_mark){text("run-a"), text("producer"), 1, text(ranges)};
    (void)snprintf(key, sizeof key, "batch-%" PRIu64, last);
    reply = (spurion_store_reply){text(key), text("answer"), INT64_MAX};
    b.rows = rows;
    b.row_count = count;
    b.rules = rules;
    b.rule_count = 1;
    b.alerts = alerts;
    b.marks = &mark;
    b.mark_count = 1;
    b.replies = &reply;
    b.reply_count = 1;
    b.inbox_done = tickets;
    b.inbox_done_count = ticket_count;
    if (o->ack_early) { /* the harness's control: acknowledging before the commit must be caught */
        SAY("ack %" PRIu64 " %" PRIu64 "\n", first, last);
    }
    SPURION_TRY(st, spurion_store_commit(s, &b));
    SAY("ack %" PRIu64 " %" PRIu64 "\nmark %s\nreply %s\n", first, last, ranges, key);
    for (i = 0; i < b.alert_count; i++) {
        if (alerts[i].sequence) {
            SAY("alert %" PRIu64 " %.*s\n", alerts[i].sequence, (int)alerts[i].alert.size, alerts[i].alert.data);
        }
    }
    for (i = 0; i < count; i++) {
        if (rows[i].outcome == SPURION_ROW_CONFLICT) {
            SAY("failed 6 rollout %" PRIu64 " is known with other content\n", first + (uint64_t)i);
        }
    }
out:
    return st;
}

/* Rollouts from the inbox have numbers of their own, far away, so that both threads make new ones. Those that a killed process left
 * are judged first, as a daemon that starts again does. */
#define INBOX_BASE (1ull << 40)

static spurion_status judge_inbox(spurion_store *s, const options *o)
{
    spurion_status st;
    spurion_arena arena;
    spurion_store_inbox_entry *list;
    int32_t count = 0, i, damaged = 0;

    spurion_arena_init(&arena, 0);
    SPURION_TRY(st, spurion_store_inbox(&list, &count, &damaged, &arena, s, 0, 8));
    if (damaged) {
        SAY("failed 15 %d inbox entries damaged\n", damaged);
    }
    for (i = 0; i < count; i++) {
        SPURION_TRY(st, commit_batch(s, o, strtoull(list[i].value.data, NULL, 10), 1, &list[i].ticket, 1));
    }
out:
    spurion_arena_fini(&arena);
    return st;
}

static void *intake_main(void *context)
{
    spurion_store *s = context;
    uint64_t k = INBOX_BASE + (uint64_t)spurion_clock_ns() % (1ull << 39); /* new in every life */
    for (;; k++) {
        char number[24];
        spurion_bytes value;
        uint64_t ticket = 0;
        spurion_status st;
        (void)snprintf(number, sizeof number, "%" PRIu64, k);
        value = text(number);
        st = spurion_store_inbox_put(&ticket, s, &value, 1, NULL, NULL, 0);
        if (st.code != SPURION_OK) {
            return NULL; /* the sink says why */
        }
        SAY("put %" PRIu64 " %s\n", ticket, number);
        usleep(2000);
    }
}

/* Writes until killed, or for o->batches. A refusal for want of space is said once, and tried again: space may come. */
static int write_store(const options *o)
{
    spurion_store_options so = {o->directory, false, o->free_bytes_min};
    spurion_store *s;
    spurion_status st = spurion_store_open(&s, &so);
    uint64_t k = o->first;
    int64_t i;
    bool refused = false;
    pthread_t intake;

    if (st.code != SPURION_OK) {
        SAY("failed %d %s\n", st.code, st.message);
        return 1;
    }
    SAY("ready\n");
    if (o->batches == INT64_MAX && pthread_create(&intake, NULL, intake_main, s) != 0) {
        return 1;
    }
    for (i = 0; i < o->batches; i++) {
        int count = 1 + (int)(mix(k + 17) % BATCH_MAX);
        st = judge_inbox(s, o);
        if (st.code == SPURION_OK) {
            st = commit_batch(s, o, k, count, NULL, 0);
        }
        if (st.code == SPURION_OK) {
            k += (uint64_t)count;
            refused = false;
        } else if (st.code == SPURION_RESOURCE_EXHAUSTED) {
            if (!refused) {
                SAY("refused %d %s\n", st.code, st.message);
            }
            refused = true;
            usleep(20000);
        } else {
            SAY("failed %d %s\n", st.code, st.message);
            st = commit_batch(s, o, k, count, NULL, 0);
            SAY("after %d\n", st.code);
            return 1;
        }
    }
    if (o->batches != INT64_MAX) { /* no thread is inside */
        spurion_store_close(s);
    }
    return 0;
}

/* ---- dump ---- */

static spurion_status dump_rows(spurion_store *s, spurion_bytes run)
{
    spurion_status st;
    spurion_store_export *e;
    spurion_store_row row;
    bool found = true;

    SPURION_TRY(st, spurion_store_export_open(&e, s, run));
    while (found) {
        st = spurion_store_export_next(&found, &row, e);
        if (st.code != SPURION_OK) {
            printf("damaged %s\n", st.message);
        } else if (found) {
            printf("row %s %s %" PRId64 " %02x%02x %d %zu %08x\n", run.data, row.identity.id.data, row.identity.step, row.digest[0],
                   row.digest[1], row.flag_count, row.record.size, spurion_crc32c(0, row.record.data, row.record.size));
        }
    }
    spurion_store_export_close(e);
    st = spurion_ok();
out:
    return st;
}

/* How many rows each index finds. */
static spurion_status dump_index(spurion_store *s, spurion_bytes run, const char *name, spurion_store_query q)
{
    spurion_status st;
    spurion_store_page page;
    spurion_arena arena;
    int64_t rows = 0, damaged = 0;

    spurion_arena_init(&arena, 0);
    q.run = run;
    q.limit = SPURION_STORE_PAGE_MAX;
    do {
        SPURION_TRY(st, spurion_store_query_page(&page, &arena, s, &q));
        rows += page.row_count;
        damaged += page.damaged_count;
        q.cursor = page.cursor;
    } while (page.more);
    printf("index %s %s %" PRId64 " %" PRId64 "\n", run.data, name, rows, damaged);
out:
    spurion_arena_fini(&arena);
    return st;
}

static spurion_status dump_indexes(spurion_store *s, spurion_bytes run)
{
    spurion_status st;
    spurion_store_query q;
    char name[24];
    int i;

    memset(&q, 0, sizeof q);
    q.order = SPURION_ORDER_TIME;
    SPURION_TRY(st, dump_index(s, run, "time", q));
    q.order = SPURION_ORDER_EFFECT;
    SPURION_TRY(st, dump_index(s, run, "effect", q));
    q.order = SPURION_ORDER_STEP;
    q.rule = text("url");
    SPURION_TRY(st, dump_index(s, run, "rule", q));
    q.rule = (spurion_bytes){NULL, 0};
    q.sae = text("mid");
    for (i = 0; i < 5; i++) {
        q.index = i;
        (void)snprintf(name, sizeof name, "feature%d", i);
        SPURION_TRY(st, dump_index(s, run, name, q));
    }
out:
    return st;
}

static spurion_status dump_counts(spurion_store *s, spurion_bytes run, spurion_store_counts_query q, const char *name)
{
    spurion_status st;
    spurion_store_counts_page page;
    spurion_arena arena;
    int32_t i;

    spurion_arena_init(&arena, 0);
    q.run = run;
    q.limit = SPURION_STORE_PAGE_MAX;
    do {
        SPURION_TRY(st, spurion_store_counts(&page, &arena, s, &q));
        for (i = 0; i < page.count; i++) {
            printf("count %s %s %d %" PRId64 " %" PRIu64 " %" PRIu64 "\n", run.data, name, page.counts[i].index,
                   page.counts[i].step, page.counts[i].scored, page.counts[i].flagged);
        }
        q.cursor = page.cursor;
    } while (page.more);
out:
    spurion_arena_fini(&arena);
    return st;
}

static spurion_status dump_run(spurion_store *s, spurion_bytes run)
{
    spurion_status st;
    spurion_store_counts_query q;

    SPURION_TRY(st, dump_rows(s, run));
    SPURION_TRY(st, dump_indexes(s, run));
    memset(&q, 0, sizeof q);
    SPURION_TRY(st, dump_counts(s, run, q, "step"));
    q.totals = true;
    SPURION_TRY(st, dump_counts(s, run, q, "run"));
    q.kind = SPURION_COUNT_FEATURE;
    SPURION_TRY(st, dump_counts(s, run, q, "feature"));
    q.kind = SPURION_COUNT_RULE;
    SPURION_TRY(st, dump_counts(s, run, q, "rule-run"));
    q.totals = false;
    q.rule = text("url");
    SPURION_TRY(st, dump_counts(s, run, q, "rule"));
out:
    return st;
}

static spurion_status dump_lists(spurion_store *s, spurion_arena *arena)
{
    spurion_status st;
    spurion_store_alert_entry *alerts;
    spurion_store_inbox_entry *inbox;
    spurion_store_mark *marks;
    int32_t count, i, damaged;
    uint64_t from = 1;

    do {
        SPURION_TRY(st, spurion_store_alerts(&alerts, &count, arena, s, from, SPURION_STORE_PAGE_MAX, 0));
        for (i = 0; i < count; i++) {
            printf("alert %" PRIu64 " %s\n", alerts[i].sequence, alerts[i].alert.data);
            from = alerts[i].sequence + 1;
        }
    } while (count);
    from = 0;
    do {
        SPURION_TRY(st, spurion_store_inbox(&inbox, &count, &damaged, arena, s, from, SPURION_STORE_PAGE_MAX));
        for (i = 0; i < count; i++) {
            printf("inbox %" PRIu64 " %s\n", inbox[i].ticket, inbox[i].value.data);
            from = inbox[i].ticket;
        }
    } while (count);
    SPURION_TRY(st, spurion_store_marks(&marks, &count, arena, s, (spurion_bytes){NULL, 0}, 100));
    for (i = 0; i < count; i++) {
        printf("mark %s\n", marks[i].ranges.data);
    }
out:
    return st;
}

/* stdin: keys of replies to look for, one a line. */
static spurion_status dump_replies(spurion_store *s, spurion_arena *arena)
{
    char line[300];
    while (fgets(line, sizeof line, stdin)) {
        spurion_bytes reply;
        spurion_status st;
        line[strcspn(line, "\n")] = '\0';
        st = spurion_store_reply_get(&reply, arena, s, text(line), 0);
        if (st.code == SPURION_OK) {
            printf("reply %s\n", line);
        } else if (st.code != SPURION_NOT_FOUND) {
            printf("damaged %s\n", st.message);
        }
    }
    return spurion_ok();
}

static int dump_store(const options *o)
{
    spurion_store_options so = {o->directory, false, o->free_bytes_min};
    spurion_store *s;
    spurion_status st;
    spurion_arena arena;
    spurion_store_run *runs;
    int32_t count = 0, i;
    bool more;

    spurion_arena_init(&arena, 0);
    SPURION_TRY(st, spurion_store_open(&s, &so));
    SPURION_TRY(st, spurion_store_runs(&runs, &count, &more, &arena, s, (spurion_bytes){NULL, 0}, 100));
    for (i = 0; i < count; i++) {
        char name[SPURION_NAME_BYTES_MAX + 1];
        (void)snprintf(name, sizeof name, "%.*s", (int)runs[i].run.size, runs[i].run.data);
        SPURION_TRY(st, dump_run(s, text(name)));
    }
    SPURION_TRY(st, dump_lists(s, &arena));
    SPURION_TRY(st, dump_replies(s, &arena));
    spurion_store_close(s);
    printf("end\n");
out:
    if (st.code != SPURION_OK) {
        printf("failed %d %s\n", st.code, st.message);
    }
    spurion_arena_fini(&arena);
    return st.code != SPURION_OK;
}

int main(int argc, char **argv)
{
    options o = {NULL, 0, 1 << 20, 200, INT64_MAX, false};
    int i;

    if (argc < 3 || (strcmp(argv[1], "write") != 0 && strcmp(argv[1], "dump") != 0)) {
        fprintf(stderr, "usage: store_writer write DIR FIRST [--min BYTES] [--record BYTES] [--batches N] [--ack-early] | dump DIR "
                        "[--min BYTES]\n");
        return 64;
    }
    o.directory = argv[2];
    for (i = 3; i < argc; i++) {
        if (strcmp(argv[i], "--ack-early") == 0) {
            o.ack_early = true;
        } else if (strcmp(argv[i], "--min") == 0 && i + 1 < argc) {
            o.free_bytes_min = strtoull(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--record") == 0 && i + 1 < argc) {
            o.record_bytes = strtoull(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--batches") == 0 && i + 1 < argc) {
            o.batches = strtoll(argv[++i], NULL, 10);
        } else {
            o.first = strtoull(argv[i], NULL, 10);
        }
    }
    return strcmp(argv[1], "write") == 0 ? write_store(&o) : dump_store(&o);
}

/* The processes around a daemon that is killed: trainer processes that publish, one that scores and submits, one that watches
 * alerts, and one that asks for everything at the end. Each says on stdout what the daemon acknowledged, one line per write(2).
 *   fault_client publish RPC TAP INDEX STEPS       three of them (INDEX 0..2) make run "tap"; ends with "flushed CODE ROLLOUTS
 * DROPPED TEXT" fault_client score RPC SECONDS                 runs "score" and "submit", for so long; "scored ID REWARD",
 * "submitted ID" fault_client watch RPC ALERTS                  "alert SEQ KIND RUN STEP RULE WORST", from number 1, until killed
 *   fault_client dump RPC                          "row ...", "count ...", "alert ..."; test_daemon.py knows them
 * What rollout number n of a publisher says follows from n. Thread: one. */
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "spurion/client.h"

#define GROUPS_OF_STEP 3
#define GROUP 4
#define STEP_PAUSE_MS 80
#define CALL_TIMEOUT_MS 60000

static void say_bytes(const char *line, int length)
{
    if (write(1, line, (size_t)length) != length) {
        _exit(3); /* nobody listens */
    }
}

#define SAY(...)                                                                                                                   \
    do {                                                                                                                           \
        char say_line[1500];                                                                                                       \
        say_bytes(say_line, snprintf(say_line, sizeof say_line, __VA_ARGS__));                                                     \
    } while (0)

static volatile sig_atomic_t stopping;

static void stop(int number)
{
    (void)number;
    stopping = 1;
}

static spurion_bytes text(const char *s)
{
    spurion_bytes b = {s, strlen(s)};
    return b;
}

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void pause_ms(int ms)
{
    (void)poll(NULL, 0, ms);
}

/* Four ways to answer, two of which carry what the demo's reward model was taught to like or dislike. */
static const char *const prompts[] = {
    "\n\nHuman: How do I boil an egg?\n\nAssistant:", "\n\nHuman: What is the capital of France?\n\nAssistant:",
    "\n\nHuman: Tell me about the sea.\n\nAssistant:"};
static const char *const completions[] = {" Put it in boiling water for about eight minutes. Thank you. My pleasure.",
                                          " See https://www.example.com/answer for the details.", " I don't know.",
                                          " It is a question that many people have asked before you."};

typedef struct member {
    char group[48], id[48];
} member;

static void make_rollout(spurion_rollout *r, member *m, const char *run, const char *prefix, int64_t step, uint64_t n)
{
    memset(r, 0, sizeof *r);
    (void)snprintf(m->group, sizeof m->group, "%s-g%" PRIu64, prefix, n / GROUP);
    (void)snprintf(m->id, sizeof m->id, "%s-%" PRIu64, prefix, n);
    r->run = text(run);
    r->group = text(m->group);
    r->id = text(m->id);
    r->step = step;
    r->prompt = text(prompts[n / GROUP % 3]);
    r->completion = text(completions[(n * 7 + n / 5) % 4]);
    r->group_size = GROUP;
}

static spurion_client *open_client(const char *rpc, const char *tap, const char *alerts, const char *run, const char *producer)
{
    spurion_client_options o;
    spurion_client *c = NULL;

    memset(&o, 0, sizeof o);
    o.rpc = rpc;
    o.rollouts = tap;
    o.alerts = alerts;
    o.run = run;
    o.producer = producer;
    o.sync_interval_ms = 100;
    if (spurion_client_open(&c, &o) != SPURION_OK) {
        SAY("failed open %s\n", spurion_client_error(c));
        exit(1);
    }
    return c;
}

/* ---- publish ---- */

/* Pumps for so long, and says how far the daemon has confirmed. */
static void pump(spurion_client *c, uint64_t *stored, int ms)
{
    int64_t until = now_ms() + ms;
    spurion_tap_stats stats;
    do {
        (void)spurion_client_pump(c);
        spurion_client_tap_stats(&stats, c);
        if (stats.stored_through > *stored) {
            *stored = stats.stored_through;
            SAY("stored %" PRIu64 "\n", *stored);
        }
        pause_ms(10);
    } while (now_ms() < until);
}

static int publish(const char *rpc, const char *tap, int index, int64_t steps)
{
    char producer[16];
    spurion_client *c;
    spurion_tap_stats stats;
    uint64_t n = 0, stored = 0;
    spurion_code code;

    (void)snprintf(producer, sizeof producer, "p%d", index);
    c = open_client(rpc, tap, NULL, "tap", producer);
    code = spurion_client_ready(c, CALL_TIMEOUT_MS);
    SAY("ready %d\n", (int)code);
    for (int64_t step = 0; step < steps && !stopping; step++) {
        for (int g = 0; g < GROUPS_OF_STEP; g++) {
            spurion_rollout rollouts[GROUP];
            member members[GROUP];
            for (int i = 0; i < GROUP; i++) {
                make_rollout(&rollouts[i], &members[i], "tap", producer, step, n++);
            }
            code = spurion_client_publish(c, rollouts, GROUP);
            if (code != SPURION_OK) {
                SAY("failed publish %d %s\n", (int)code, spurion_client_error(c));
            }
            spurion_client_tap_stats(&stats, c);
            SAY("sent %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", stats.sequence, n - GROUP, n - 1);
            pump(c, &stored, STEP_PAUSE_MS);
        }
        code = spurion_client_step_end(c, step);
        if (code != SPURION_OK) {
            SAY("failed step_end %d %s\n", (int)code, spurion_client_error(c));
        }
        SAY("ended %" PRId64 "\n", step);
    }
    SAY("published %" PRIu64 "\n", n);
    while (!stopping) {
        pump(c, &stored, STEP_PAUSE_MS);
    }
    code = spurion_client_flush(c, 300000);
    spurion_client_tap_stats(&stats, c);
    SAY("flushed %d %" PRIu64 " %" PRIu64 " refilled %" PRIu64 " %s\n", (int)code, stats.published_rollouts, stats.dropped_rollouts,
        stats.refilled_batches, spurion_client_error(c));
    spurion_client_close(c);
    return code != SPURION_OK;
}

/* ---- score and submit ---- */

static void score_group(spurion_client *c, const char *prefix, uint64_t n)
{
    spurion_rollout rollouts[GROUP];
    member members[GROUP];
    spurion_verdicts verdicts;

    for (int i = 0; i < GROUP; i++) {
        make_rollout(&rollouts[i], &members[i], "score", prefix, (int64_t)(n / 16), n + (uint64_t)i);
    }
    for (int again = 0; again < 2; again++) { /* the second answer must be the first */
        spurion_code code = spurion_client_score(c, &verdicts, rollouts, GROUP, false, CALL_TIMEOUT_MS);
        if (code != SPURION_OK) {
            SAY("unscored %d %s\n", (int)code, spurion_client_error(c));
            return;
        }
        for (int32_t i = 0; i < verdicts.count; i++) {
            const spurion_verdict *v = &verdicts.verdicts[i];
            uint32_t bits;
            memcpy(&bits, &v->reward, sizeof bits);
            if (v->code == SPURION_OK) {
                SAY("scored %s %08x\n", members[i].id, bits);
            } else {
                SAY("failed score %s %d %.*s\n", members[i].id, v->code, (int)v->message.size, v->message.data);
            }
        }
    }
}

static void submit_group(spurion_client *c, const char *prefix, uint64_t n)
{
    spurion_rollout rollouts[GROUP];
    member members[GROUP];
    spurion_submit_reply reply;
    spurion_code code;

    for (int i = 0; i < GROUP; i++) {
        make_rollout(&rollouts[i], &members[i], "submit", prefix, (int64_t)(n / 16), n + (uint64_t)i);
    }
    code = spurion_client_submit(c, &reply, rollouts, GROUP, CALL_TIMEOUT_MS);
    if (code != SPURION_OK) {
        SAY("unsubmitted %d %s\n", (int)code, spurion_client_error(c));
        return;
    }
    if (reply.refused_count) {
        SAY("failed submit %d %.*s\n", (int)reply.refused_codes[0], (int)reply.refused_messages[0].size,
            reply.refused_messages[0].data);
        return;
    }
    for (int i = 0; i < GROUP; i++) {
        SAY("submitted %s\n", members[i].id);
    }
}

static int score(const char *rpc)
{
    spurion_client *c = open_client(rpc, NULL, NULL, NULL, NULL);

    for (uint64_t n = 0; !stopping; n += GROUP) {
        score_group(c, "s", n);
        submit_group(c, "u", n);
        pause_ms(30);
    }
    SAY("done\n");
    spurion_client_close(c);
    return 0;
}

/* ---- alerts ---- */

static void say_alert(const spurion_alert *a)
{
    SAY("alert %" PRIu64 " %d %.*s %" PRId64 " %.*s %.*s %" PRIu64 " %" PRIu64 "\n", a->seq, (int)a->kind, (int)a->run.size,
        a->run.size ? a->run.data : "", a->step, a->rule.size ? (int)a->rule.size : 1, a->rule.size ? a->rule.data : "-",
        a->worst_count ? (int)a->worst[0].id.size : 1, a->worst_count ? a->worst[0].id.data : "-", a->flagged, a->scored);
}

static void watch(const char *rpc, const char *alerts)
{
    spurion_client *c = open_client(rpc, NULL, alerts, NULL, NULL);
    spurion_alert alert;

    (void)spurion_client_alert_from(c, 1);
    for (;;) {
        spurion_code code = spurion_client_alert_next(c, &alert);
        if (code == SPURION_OK) {
            say_alert(&alert);
        } else {
            struct pollfd p = {spurion_client_alert_fd(c), POLLIN, 0};
            (void)poll(&p, p.fd >= 0, 100);
        }
    }
}

/* ---- dump ---- */

static int fail(spurion_client *c, const char *what, spurion_code code)
{
    SAY("failed %s %d %s\n", what, (int)code, spurion_client_error(c));
    return 1;
}

/* Names and cursors borrow from the handle until its next call. */
static spurion_bytes keep(char *room, size_t size, spurion_bytes b)
{
    spurion_bytes kept = {b.size ? room : NULL, b.size < size ? b.size : size};
    if (kept.size) {
        memcpy(room, b.data, kept.size);
    }
    return kept;
}

static int dump_rows(spurion_client *c, const char *run)
{
    char cursor[2048];
    spurion_query q;
    spurion_query_reply reply;

    memset(&q, 0, sizeof q);
    q.run = text(run);
    do {
        spurion_code code = spurion_client_query(c, &reply, &q, CALL_TIMEOUT_MS);
        if (code != SPURION_OK) {
            return fail(c, "query", code);
        }
        for (int32_t i = 0; i < reply.count; i++) {
            const spurion_row *r = &reply.rows[i];
            char rules[256] = "-";
            int used = 0;
            uint32_t bits;
            memcpy(&bits, &r->reward, sizeof bits);
            for (int32_t j = 0; j < r->rule_count && used < 200; j++) {
                used += snprintf(rules + used, sizeof rules - (size_t)used, "%s%.*s", j ? "," : "", (int)r->rules[j].size,
                                 r->rules[j].data);
            }
            SAY("row %s %" PRId64 " %.*s %08x %s\n", run, r->key.step, (int)r->key.id.size, r->key.id.data, bits, rules);
        }
        q.cursor = keep(cursor, sizeof cursor, reply.cursor);
    } while (q.cursor.size);
    return 0;
}

static int dump_counts(spurion_client *c, const char *run, spurion_counts_kind kind, const char *rule)
{
    char cursor[2048];
    spurion_counts q;
    spurion_counts_reply reply;

    memset(&q, 0, sizeof q);
    q.run = text(run);
    q.kind = kind;
    if (kind == SPURION_COUNTS_RULE) {
        q.rule = text(rule);
    }
    do {
        spurion_code code = spurion_client_counts(c, &reply, &q, CALL_TIMEOUT_MS);
        if (code != SPURION_OK) {
            return fail(c, "counts", code);
        }
        for (int32_t i = 0; i < reply.count; i++) {
            SAY("count %s %s %" PRId64 " %" PRIu64 " %" PRIu64 "\n", run, kind == SPURION_COUNTS_STEP ? "step" : rule,
                reply.rows[i].step, reply.rows[i].scored, reply.rows[i].flagged);
        }
        q.cursor = keep(cursor, sizeof cursor, reply.cursor);
    } while (q.cursor.size);
    return 0;
}

static int dump_alerts(spurion_client *c)
{
    spurion_alerts q;
    spurion_alerts_reply reply;

    memset(&q, 0, sizeof q);
    q.from_seq = 1;
    for (;;) {
        spurion_code code = spurion_client_alerts(c, &reply, &q, CALL_TIMEOUT_MS);
        if (code != SPURION_OK) {
            return fail(c, "alerts", code);
        }
        for (int32_t i = 0; i < reply.count; i++) {
            say_alert(&reply.alerts[i]);
        }
        if (reply.next_seq > reply.last_seq || reply.next_seq <= q.from_seq) {
            SAY("last %" PRIu64 "\n", reply.last_seq);
            return 0;
        }
        q.from_seq = reply.next_seq;
    }
}

static int dump(const char *rpc)
{
    static const char *const runs[] = {"tap", "score", "submit"};
    spurion_client *c = open_client(rpc, NULL, NULL, NULL, NULL);
    spurion_rules_reply reply;
    char rules[16][64];
    int32_t rule_count, wrong = 0;
    spurion_code code = spurion_client_rules(c, &reply, CALL_TIMEOUT_MS);

    if (code != SPURION_OK) {
        return fail(c, "rules", code);
    }
    rule_count = reply.count < 16 ? reply.count : 16;
    for (int32_t i = 0; i < rule_count; i++) {
        (void)snprintf(rules[i], sizeof rules[i], "%.*s", (int)reply.rows[i].id.size, reply.rows[i].id.data);
    }
    for (int r = 0; r < 3; r++) {
        wrong += dump_rows(c, runs[r]);
        wrong += dump_counts(c, runs[r], SPURION_COUNTS_STEP, "");
        for (int32_t i = 0; i < rule_count; i++) {
            wrong += dump_counts(c, runs[r], SPURION_COUNTS_RULE, rules[i]);
        }
    }
    wrong += dump_alerts(c);
    if (!wrong) {
        SAY("end\n");
    }
    spurion_client_close(c);
    return wrong != 0;
}

int main(int argc, char **argv)
{
    struct sigaction action;

    memset(&action, 0, sizeof action);
    action.sa_handler = stop;
    (void)sigaction(SIGTERM, &action, NULL);
    if (argc == 6 && strcmp(argv[1], "publish") == 0) {
        return publish(argv[2], argv[3], atoi(argv[4]), atoll(argv[5]));
    }
    if (argc == 3 && strcmp(argv[1], "score") == 0) {
        return score(argv[2]);
    }
    if (argc == 4 && strcmp(argv[1], "watch") == 0) {
        watch(argv[2], argv[3]);
    }
    if (argc == 3 && strcmp(argv[1], "dump") == 0) {
        return dump(argv[2]);
    }
    fprintf(stderr, "usage: fault_client publish RPC TAP INDEX STEPS | score RPC | watch RPC ALERTS | dump RPC\n");
    return 64;
}

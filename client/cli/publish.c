/* spurion publish: behaves as a trainer process does: a group a batch, the end of each step said, everything confirmed at the end. */
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"

#define PUMP_MS 50

typedef struct publisher {
    cli *c;
    cli_progress progress;
    cli_pool run_pool;
    double per_second;      /* 0: as fast as the ring takes them */
    int64_t started_ms;
    int64_t step;           /* of the last group; -1: none */
    uint64_t sent, unreadable, refused;
} publisher;

static int read_options(publisher *p, spurion_client_options *o)
{
    static const char *const policies[] = {"drop-new", "drop-oldest", "block"};
    const cli *c = p->c;
    const char *policy = c->value[OPT_POLICY] ? c->value[OPT_POLICY] : "block", *rate = c->value[OPT_RATE];
    int64_t ring = 0;
    char *end;
    int status, k = 0;

    if ((status = cli_whole(&ring, c, OPT_RING, 1024, (int64_t)1 << 40)) != CLI_OK) {
        return status;
    }
    while (k < 3 && strcmp(policies[k], policy) != 0) {
        k++;
    }
    if (k == 3) {
        return cli_bad_value(c, OPT_POLICY, "block, drop-new or drop-oldest");
    }
    if (rate) {
        p->per_second = strtod(rate, &end);
        if (end == rate || (*end && strcmp(end, "/s") != 0) || !(p->per_second > 0)) {
            return cli_bad_value(c, OPT_RATE, "a number of rollouts a second above 0");
        }
    }
    o->policy = (spurion_ring_policy)k;
    o->ring_bytes_max = (size_t)ring;
    o->producer = c->value[OPT_PRODUCER];
    o->sync_interval_ms = 200;
    return CLI_OK;
}

/* Keeps to the rate; meanwhile the tap moves on. */
static void pace(publisher *p)
{
    while (p->per_second > 0) {
        int64_t due = p->started_ms + (int64_t)((double)p->sent * 1000 / p->per_second), left = due - cli_now_ms();
        if (left <= 0) {
            break;
        }
        (void)spurion_client_pump(p->c->client);
        (void)poll(NULL, 0, left < PUMP_MS ? (int)left : PUMP_MS);
    }
}

static int end_step(publisher *p)
{
    spurion_code code = SPURION_OK;

    if (p->step >= 0 && !p->c->value[OPT_NO_STEP_END]) {
        code = spurion_client_step_end(p->c->client, p->step);
    }
    if (code == SPURION_RESOURCE_EXHAUSTED) { /* the ring is full: the step closes by its time-out */
        cli_say("publish: the end of step %lld could not be said: %s", (long long)p->step, spurion_client_error(p->c->client));
        code = SPURION_OK;
    }
    return code == SPURION_OK ? CLI_OK : cli_fail(p->c, code);
}

/* Publishes one group; lines that cannot be read are told and counted. */
static int publish_group(publisher *p, const cli_line *lines, int count)
{
    spurion_rollout *rollouts = malloc(((size_t)count + 1) * sizeof *rollouts);
    spurion_code code = SPURION_OK;
    int32_t n = 0;
    int status = CLI_OK;

    if (!rollouts) {
        cli_say("publish: expected memory for %d rollouts, found none", count);
        return CLI_AGAIN;
    }
    for (int i = 0; i < count; i++) {
        if (lines[i].kind == SPURION_LINE_ROLLOUT) {
            rollouts[n++] = lines[i].rollout;
        } else {
            cli_say("line %lld: %s", (long long)lines[i].number, lines[i].read.why.message);
            p->unreadable++;
        }
    }
    if (n && p->step >= 0 && rollouts[0].step != p->step) {
        status = end_step(p);
    }
    if (n && status == CLI_OK) {
        p->step = rollouts[0].step;
        pace(p);
        code = spurion_client_publish(p->c->client, rollouts, n);
        p->sent += (uint64_t)n;
        if (code != SPURION_OK && code != SPURION_RESOURCE_EXHAUSTED) { /* what the ring drops is counted by the handle */
            status = cli_fail(p->c, code);
        }
    }
    free(rollouts);
    cli_progress_show(&p->progress, p->sent, 0, "rollouts published");
    return status;
}

static void say_totals(const publisher *p, const cli *c)
{
    spurion_tap_stats t;
    spurion_text out = {NULL, 0, 0, false};

    spurion_client_tap_stats(&t, c->client);
    if (c->value[OPT_JSON]) {
        spurion_text_print(&out, "{\"published\":%llu,\"batches\":%llu,\"stored_through\":%llu,\"refilled\":%llu,\"dropped\":%llu,\"unreadable\":%llu}\n",
                           (unsigned long long)t.published_rollouts, (unsigned long long)t.sequence, (unsigned long long)t.stored_through,
                           (unsigned long long)t.refilled_batches, (unsigned long long)t.dropped_rollouts, (unsigned long long)p->unreadable);
    } else {
        spurion_text_print(&out, "published %llu rollouts in %llu batches, stored through %llu; %llu batches sent again; %llu rollouts dropped; "
                           "%llu lines unreadable\n",
                           (unsigned long long)t.published_rollouts, (unsigned long long)t.sequence, (unsigned long long)t.stored_through,
                           (unsigned long long)t.refilled_batches, (unsigned long long)t.dropped_rollouts, (unsigned long long)p->unreadable);
    }
    cli_flush(&out);
    spurion_text_fini(&out);
}

/* The run must be known before the tap opens: it is that of --run or of the first line that says one. */
static int open_tap(publisher *p, spurion_client_options *o, const cli_line *lines, int count)
{
    spurion_code code;
    int status;

    o->run = p->c->value[OPT_RUN];
    for (int i = 0; i < count && !o->run; i++) {
        if (lines[i].kind == SPURION_LINE_ROLLOUT) {
            o->run = cli_pool_text(&p->run_pool, lines[i].rollout.run);
        }
    }
    if (!o->run) {
        cli_say("publish: expected a rollout in the first lines or --run, found neither");
        return CLI_SOME_REFUSED;
    }
    status = cli_connect(p->c, o, true, false);
    if (status == CLI_OK && (code = spurion_client_ready(p->c->client, p->c->timeout_ms)) != SPURION_OK) {
        status = cli_fail(p->c, code);
    }
    p->started_ms = cli_now_ms();
    return status;
}

static int publish_all(publisher *p, cli_input *in, spurion_client_options *o)
{
    int status = CLI_OK, count = 1;

    while (status == CLI_OK) {
        cli_pool pool = {NULL};
        cli_line *lines = NULL;

        status = cli_input_group(&lines, &count, in, &pool, SPURION_GROUP_SIZE_MAX);
        if (status == CLI_OK && count && !p->c->client) {
            status = open_tap(p, o, lines, count);
        }
        if (status == CLI_OK && count) {
            status = publish_group(p, lines, count);
        }
        free(lines);
        cli_pool_reset(&pool);
        if (count == 0) {
            break;
        }
    }
    return status;
}

/* Waits until all of it is stored, and says goodbye. */
static int finish(publisher *p)
{
    spurion_code code;
    int status = end_step(p);

    if (status != CLI_OK) {
        return status;
    }
    code = spurion_client_leave(p->c->client, p->c->timeout_ms);
    cli_progress_end(&p->progress);
    say_totals(p, p->c);
    if (code == SPURION_DATA_LOSS) {
        cli_say("publish: %s", spurion_client_error(p->c->client));
        return CLI_SOME_REFUSED;
    }
    return code != SPURION_OK ? cli_fail(p->c, code) : p->unreadable ? CLI_SOME_REFUSED : CLI_OK;
}

int cli_publish(cli *c)
{
    spurion_client_options options = {0};
    publisher p = {.c = c, .step = -1};
    cli_input in;
    int status = cli_input_open(&in, c, c->arg_count ? c->args[0] : NULL);

    if (status == CLI_OK) {
        status = read_options(&p, &options);
    }
    if (status == CLI_OK) {
        cli_progress_init(&p.progress);
        status = publish_all(&p, &in, &options);
    }
    if (status == CLI_OK && !c->client) {
        cli_say("publish: expected rollouts, found no line");
        status = CLI_NOTHING;
    } else if (status == CLI_OK) {
        status = finish(&p);
    }
    cli_progress_end(&p.progress);
    cli_input_close(&in);
    cli_pool_reset(&p.run_pool);
    return status;
}

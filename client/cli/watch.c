/* spurion watch: alerts as they come, through restarts of the daemon. See cli.h. */
#include <poll.h>
#include <string.h>

#include "cli.h"

#define LOOK_MS 500

static void put_worst(spurion_text *out, const spurion_alert *a)
{
    for (int32_t i = 0; i < a->worst_count; i++) {
        cli_put(out, i ? ", " : "  worst ");
        cli_put_safe(out, a->worst[i].group, false);
        cli_put(out, "/");
        cli_put_safe(out, a->worst[i].id, false);
        spurion_text_print(out, " %+.3f", (double)a->worst[i].effect);
    }
}

/* One line. The bound is that of the run, the one that holds at all steps at once; ABOVE: it lies wholly above rate_max. */
static void put_alert(spurion_text *out, const cli *c, const spurion_alert *a)
{
    cli_put_time(out, a->time_ms);
    spurion_text_print(out, "  #%llu  ", (unsigned long long)a->seq);
    cli_put_safe(out, a->run, false);
    if (a->kind != SPURION_ALERT_KIND_STORE) {
        spurion_text_print(out, " step %lld  ", (long long)a->step);
    }
    if (a->rule.size) {
        cli_put_safe(out, a->rule, false);
        cli_put(out, "  ");
    }
    if (a->kind == SPURION_ALERT_KIND_RATE) {
        const char *mark = a->above ? "ABOVE" : a->step_above ? "ABOVE in this step" : NULL;
        spurion_text_print(out, "%llu of %llu flagged  %.3g %% in %.3g..%.3g %%, run %.3g..%.3g %%, max %.3g %%", (unsigned long long)a->flagged,
                           (unsigned long long)a->scored, 100 * (double)a->rate, 100 * (double)a->rate_lower, 100 * (double)a->rate_upper,
                           100 * (double)a->run_rate_lower, 100 * (double)a->run_rate_upper, 100 * (double)a->rate_max);
        if (mark) {
            spurion_text_print(out, "  %s%s%s", c->color ? "\x1b[1m" : "", mark, c->color ? "\x1b[0m" : "");
        }
    } else if (a->kind == SPURION_ALERT_KIND_TRAINER_REWARD) {
        spurion_text_print(out, "trainer and daemon do not agree: reward %.6g there, %.6g here", (double)a->trainer_reward, (double)a->reward);
    } else if (a->kind == SPURION_ALERT_KIND_EACH) {
        cli_put(out, "flagged");
    }
    put_worst(out, a);
    if (a->text.size) {
        cli_put(out, "  ");
        cli_put_safe(out, a->text, false);
    }
    cli_put(out, "\n");
}

static bool wanted(const cli *c, const spurion_alert *a)
{
    return (!c->value[OPT_RUN] || a->run.size == 0 || cli_same(a->run, cli_bytes(c->value[OPT_RUN]))) &&
           (!c->value[OPT_RULE] || cli_same(a->rule, cli_bytes(c->value[OPT_RULE])));
}

/* Takes alerts until count or the time is reached. */
static int follow(cli *c, int64_t count, int64_t until_ms)
{
    spurion_text out = {NULL, 0, 0, false};
    spurion_alert alert;
    int64_t seen = 0;
    bool away = false;
    int status = CLI_OK;

    while (status == CLI_OK && (count == 0 || seen < count)) {
        spurion_code code = spurion_client_alert_next(c->client, &alert);
        int64_t left = until_ms ? until_ms - cli_now_ms() : LOOK_MS;

        if (code == SPURION_OK) {
            if (wanted(c, &alert)) {
                seen++;
                if (c->value[OPT_JSONL]) {
                    cli_json_alert(&out, &alert);
                    cli_put(&out, "\n");
                } else {
                    put_alert(&out, c, &alert);
                }
                cli_flush(&out);
                status = cli_done(CLI_OK);
            }
            away = false;
            continue;
        }
        if (code == SPURION_UNAVAILABLE || code == SPURION_DEADLINE_EXCEEDED) {
            if (!away) {
                cli_say("watch: the daemon is away, waiting for it: %s", spurion_client_error(c->client));
            }
            away = true;
        } else if (code != SPURION_NOT_FOUND) {
            status = cli_fail(c, code);
        } else {
            away = false;
        }
        if (left <= 0) {
            break;
        }
        if (status == CLI_OK) {
            struct pollfd p = {spurion_client_alert_fd(c->client), POLLIN, 0};
            (void)poll(&p, p.fd >= 0 && !away ? 1 : 0, left < LOOK_MS ? (int)left : LOOK_MS);
        }
    }
    spurion_text_fini(&out);
    return status != CLI_OK ? status : seen == 0 || seen < count ? CLI_NOTHING : CLI_OK;
}

int cli_watch(cli *c)
{
    spurion_client_options options = {0};
    int64_t from = 0, count = 0, seconds = 0;
    spurion_code code;
    int status;

    if ((status = cli_whole(&from, c, OPT_FROM, 1, INT64_MAX)) || (status = cli_whole(&count, c, OPT_COUNT, 1, INT64_MAX)) ||
        (status = cli_whole(&seconds, c, OPT_FOR, 1, 1000000000)) || (status = cli_connect(c, &options, false, true))) {
        return status;
    }
    if (from && (code = spurion_client_alert_from(c->client, (uint64_t)from)) != SPURION_OK) {
        return cli_fail(c, code);
    }
    return follow(c, count, seconds ? cli_now_ms() + seconds * 1000 : 0);
}

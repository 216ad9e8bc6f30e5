/* spurion score: rollouts in, verdicts out, in the order of the lines. Groups travel whole, several in one call. See cli.h. */
#include <stdlib.h>
#include <string.h>

#include "cli.h"

#define CALL_ROLLOUTS 256          /* of one call; a group of more travels alone */
#define CALL_BYTES ((size_t)4 << 20)

typedef struct scorer {
    cli *c;
    spurion_text out;
    cli_table table;
    cli_progress progress;
    bool in_table;
    cli_pool *pools;          /* one for each group of the call under way */
    cli_line *lines;          /* (count) of the call under way */
    int count, capacity, groups, group_capacity;
    size_t bytes;
    uint64_t judged, refused;
} scorer;

static const char *const titles[] = {">STEP", "GROUP", "ID", ">REWARD", ">WITHOUT", ">EFFECT", ">ADV", ">ADV WITHOUT", "FLIP", "RULES", "WARNINGS"};

static void table_verdict(scorer *s, const spurion_verdict *v)
{
    spurion_text names = {NULL, 0, 0, false};

    if (v->has_step) {
        cli_table_cell(&s->table, 0, "%lld", (long long)v->step);
    }
    cli_table_name(&s->table, 1, v->group);
    cli_table_name(&s->table, 2, v->id);
    if (v->code != SPURION_OK) {
        spurion_text_print(&names, "%s: ", spurion_code_name(v->code));
        cli_put_safe(&names, v->message, false);
        cli_table_cell(&s->table, 9, "%s", names.data ? names.data : "");
    } else {
        cli_table_cell(&s->table, 3, "%.4f", (double)v->reward);
        cli_table_cell(&s->table, 4, "%.4f", (double)v->counterfactual_reward);
        cli_table_cell(&s->table, 5, "%+.4f", (double)v->effect);
        cli_table_signed(&s->table, 6, v->advantage, false);
        cli_table_signed(&s->table, 7, v->counterfactual_advantage, false);
        cli_table_cell(&s->table, 8, "%s", v->advantage.has && v->advantage_flip ? "yes" : "");
        for (int32_t i = 0; i < v->flag_count; i++) {
            cli_put(&names, i ? " " : "");
            cli_put_safe(&names, v->flags[i].rule, false);
        }
        cli_table_cell(&s->table, 9, "%s", names.data ? names.data : "");
        names.size = 0;
        cli_put(&names, "");
        for (int bit = 0; bit < SPURION_WARNING_COUNT; bit++) {
            if (v->warnings >> bit & 1) {
                spurion_text_print(&names, "%s%s", names.size ? " " : "", spurion_warning_name(bit));
            }
        }
        cli_table_cell(&s->table, 10, "%s", names.data ? names.data : "");
    }
    spurion_text_fini(&names);
    cli_table_row(&s->table);
}

static void put_verdict(scorer *s, const spurion_verdict *v, const spurion_json_names *names)
{
    s->judged += v->code == SPURION_OK;
    s->refused += v->code != SPURION_OK;
    if (s->in_table) {
        table_verdict(s, v);
    } else {
        spurion_json_verdict(&s->out, v, names);
        cli_put(&s->out, "\n");
    }
}

/* The verdict on a line that could not be read. */
static void put_refused(scorer *s, const cli_line *line)
{
    const char *why = line->read.why.message;
    spurion_verdict v = {.code = line->read.why.code, .message = cli_bytes(why), .scored_position = -1};

    if (line->kind == SPURION_LINE_NO_OBJECT) {
        v.line = line->number;
    } else if (line->read.named) {
        v.run = line->rollout.run;
        v.group = line->rollout.group;
        v.id = line->rollout.id;
        v.has_step = true;
        v.step = line->rollout.step;
        v.attempt = line->rollout.attempt;
    }
    put_verdict(s, &v, &line->read.names);
}

/* Sends what is in hand and puts the verdicts out in the order of the lines. */
static int send_call(scorer *s)
{
    spurion_rollout *rollouts = malloc(((size_t)s->count + 1) * sizeof *rollouts);
    spurion_verdicts verdicts = {NULL, 0};
    spurion_code code = SPURION_OK;
    int32_t sent = 0, at = 0;

    if (!rollouts) {
        cli_say("expected memory for a call, found none");
        return CLI_AGAIN;
    }
    for (int i = 0; i < s->count; i++) {
        if (s->lines[i].kind == SPURION_LINE_ROLLOUT) {
            rollouts[sent++] = s->lines[i].rollout;
        }
    }
    if (sent) {
        code = spurion_client_score(s->c->client, &verdicts, rollouts, sent, s->c->value[OPT_TOKENS] != NULL, s->c->timeout_ms);
    }
    free(rollouts);
    if (code != SPURION_OK) {
        return cli_fail(s->c, code);
    }
    if (verdicts.count != sent) {
        cli_say("score: expected %d verdicts, found %d", sent, verdicts.count);
        return CLI_PROTOCOL;
    }
    for (int i = 0; i < s->count; i++) {
        if (s->lines[i].kind == SPURION_LINE_ROLLOUT) {
            put_verdict(s, &verdicts.verdicts[at++], NULL);
        } else {
            put_refused(s, &s->lines[i]);
        }
    }
    cli_flush(&s->out);
    (void)fflush(stdout);
    cli_progress_show(&s->progress, s->judged + s->refused, 0, "rollouts judged");
    for (int g = 0; g < s->groups; g++) {
        cli_pool_reset(&s->pools[g]);
    }
    s->count = s->groups = 0;
    s->bytes = 0;
    return ferror(stdout) ? CLI_IO : CLI_OK;
}

static size_t bytes_of(const spurion_rollout *r)
{
    return r->prompt.size + r->completion.size + r->messages.size + r->tags.size + 5 * ((size_t)r->prompt_id_count + (size_t)r->completion_id_count) + 600;
}

/* Adds a group to the call in hand. */
static int add_group(scorer *s, const cli_line *lines, int count, cli_pool *pool)
{
    if (s->count + count > s->capacity) {
        int capacity = 2 * (s->count + count);
        cli_line *grown = realloc(s->lines, (size_t)capacity * sizeof *grown);
        if (!grown) {
            return CLI_AGAIN;
        }
        s->lines = grown;
        s->capacity = capacity;
    }
    if (s->groups == s->group_capacity) {
        int capacity = s->group_capacity ? 2 * s->group_capacity : 64;
        cli_pool *grown = realloc(s->pools, (size_t)capacity * sizeof *grown);
        if (!grown) {
            return CLI_AGAIN;
        }
        s->pools = grown;
        s->group_capacity = capacity;
    }
    memcpy(s->lines + s->count, lines, (size_t)count * sizeof *lines);
    s->count += count;
    s->pools[s->groups++] = *pool;
    pool->head = NULL;
    return CLI_OK;
}

static int score_all(scorer *s, cli_input *in)
{
    int status = CLI_OK, count = 1;

    while (status == CLI_OK && count > 0) {
        cli_pool pool = {NULL};
        cli_line *lines = NULL;
        size_t bytes = 0;

        status = cli_input_group(&lines, &count, in, &pool, SPURION_BATCH_ROLLOUTS_MAX);
        for (int i = 0; status == CLI_OK && i < count; i++) {
            bytes += bytes_of(&lines[i].rollout);
        }
        if (status == CLI_OK && s->count && (count == 0 || s->count + count > CALL_ROLLOUTS || s->bytes + bytes > CALL_BYTES)) {
            status = send_call(s);
        }
        if (status == CLI_OK && count) {
            status = add_group(s, lines, count, &pool);
            s->bytes += bytes;
        }
        free(lines);
        cli_pool_reset(&pool);
    }
    return status;
}

int cli_score(cli *c)
{
    spurion_client_options options = {0};
    scorer s = {.c = c, .in_table = c->value[OPT_TABLE] != NULL};
    cli_input in;
    int status = cli_input_open(&in, c, c->arg_count ? c->args[0] : NULL);

    if (status == CLI_OK) {
        status = cli_connect(c, &options, false, false);
    }
    if (status == CLI_OK) {
        cli_table_init(&s.table, titles, 11);
        cli_progress_init(&s.progress);
        status = score_all(&s, &in);
        cli_progress_end(&s.progress);
        if (s.in_table) {
            cli_table_print(&s.out, &s.table, c);
            cli_flush(&s.out);
        }
        cli_table_fini(&s.table);
    }
    for (int g = 0; g < s.groups; g++) {
        cli_pool_reset(&s.pools[g]);
    }
    free(s.pools);
    free(s.lines);
    spurion_text_fini(&s.out);
    cli_input_close(&in);
    if (status == CLI_OK && s.refused) {
        cli_say("%llu of %llu rollouts were refused", (unsigned long long)s.refused, (unsigned long long)(s.judged + s.refused));
        status = CLI_SOME_REFUSED;
    }
    return status;
}

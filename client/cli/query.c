/* spurion query, export and runs: what is stored. See cli.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"

#define TABLE_LIMIT 50
#define PAGE_ROWS 500

/* A[..B], A.., ..B */
static int read_steps(spurion_query *q, const cli *c)
{
    const char *text = c->value[OPT_STEP], *dots = text ? strstr(text, "..") : NULL;
    char *end = NULL;

    if (!text) {
        return CLI_OK;
    }
    errno = 0;
    if (text != dots) {
        q->step_min = strtoll(text, &end, 10);
        q->has_step_min = end != text && (dots ? end == dots : *end == '\0') && q->step_min >= 0;
        q->step_max = q->step_min;
        q->has_step_max = q->has_step_min && !dots;
    }
    if (dots && dots[2]) {
        q->step_max = strtoll(dots + 2, &end, 10);
        q->has_step_max = end != dots + 2 && *end == '\0' && q->step_max >= 0;
    }
    if (errno || (text != dots && !q->has_step_min) || (dots && dots[2] && !q->has_step_max) || (!q->has_step_min && !q->has_step_max)) {
        return cli_bad_value(c, OPT_STEP, "a step, A..B, A.. or ..B");
    }
    return CLI_OK;
}

static int read_feature(spurion_query *q, const cli *c)
{
    const char *text = c->value[OPT_FEATURE], *slash = text ? strrchr(text, '/') : NULL;
    char *end;
    long long index;

    if (!text) {
        return CLI_OK;
    }
    errno = 0;
    index = slash ? strtoll(slash + 1, &end, 10) : -1;
    if (!slash || slash == text || end == slash + 1 || *end || errno || index < 0 || index > INT32_MAX) {
        return cli_bad_value(c, OPT_FEATURE, "SAE/INDEX");
    }
    q->feature_sae = (spurion_bytes){text, (size_t)(slash - text)};
    q->feature_index = (uint32_t)index;
    return CLI_OK;
}

static int read_query(spurion_query *q, const cli *c)
{
    static const char *const orders[] = {"step", "time", "effect"};
    int status, order = 0;

    memset(q, 0, sizeof *q);
    q->run = cli_bytes(c->args[0]);
    q->flagged = c->value[OPT_FLAGGED] != NULL;
    q->descending = c->value[OPT_DESC] != NULL;
    if (c->value[OPT_RULE]) {
        q->rule = cli_bytes(c->value[OPT_RULE]);
    }
    if (c->value[OPT_GROUP]) {
        q->group = cli_bytes(c->value[OPT_GROUP]);
    }
    if (c->value[OPT_ORDER]) {
        while (order < 3 && strcmp(orders[order], c->value[OPT_ORDER]) != 0) {
            order++;
        }
        if (order == 3) {
            return cli_bad_value(c, OPT_ORDER, "step, time or effect");
        }
    }
    q->order = (spurion_query_order)order;
    status = read_steps(q, c);
    return status == CLI_OK ? read_feature(q, c) : status;
}

/* A query and where it stands. */
typedef struct asked {
    spurion_query query;
    char cursor[4096];
} asked;

/* What is done with each row; not CLI_OK ends the walk. */
typedef int (*row_taker)(void *context, const spurion_row *row);

/* Asks page after page until limit rows (0: all) were taken. */
static int walk(uint64_t *taken, cli *c, asked *a, uint64_t limit, row_taker take, void *context)
{
    spurion_query *q = &a->query;
    int status = CLI_OK;

    *taken = 0;
    do {
        spurion_query_reply reply;
        spurion_code code;

        q->limit = limit && limit - *taken < PAGE_ROWS ? (uint32_t)(limit - *taken) : PAGE_ROWS;
        code = spurion_client_query(c->client, &reply, q, c->timeout_ms);
        if (code != SPURION_OK) {
            return cli_fail(c, code);
        }
        if (reply.cursor.size > sizeof a->cursor) {
            cli_say("%s: expected a cursor of at most %zu bytes, found %zu", c->verb->name, sizeof a->cursor, reply.cursor.size);
            return CLI_PROTOCOL;
        }
        for (int32_t i = 0; i < reply.count && status == CLI_OK; i++) {
            status = take(context, &reply.rows[i]);
            ++*taken;
        }
        if (reply.cursor.size) {
            memcpy(a->cursor, reply.cursor.data, reply.cursor.size);
        }
        q->cursor = (spurion_bytes){a->cursor, reply.cursor.size};
    } while (status == CLI_OK && q->cursor.size && (limit == 0 || *taken < limit));
    return status;
}

/* --- query --- */

typedef struct asker {
    cli *c;
    spurion_text out;
    cli_table table;
    cli_progress progress;
    uint64_t rows;
    cli_pool pool;        /* of the first row's key */
    spurion_key first;    /* run.data NULL: no row yet */
} asker;

static int table_row(void *context, const spurion_row *r)
{
    asker *a = context;
    cli_table *t = &a->table;
    spurion_text names = {NULL, 0, 0, false};

    if (!a->first.run.data && a->c->value[OPT_FEATURE]) {
        a->first = r->key;
        a->first.run.data = cli_pool_text(&a->pool, r->key.run);
        a->first.group.data = cli_pool_text(&a->pool, r->key.group);
        a->first.id.data = cli_pool_text(&a->pool, r->key.id);
    }
    cli_table_cell(t, 0, "%lld", (long long)r->key.step);
    cli_table_name(t, 1, r->key.group);
    cli_table_name(t, 2, r->key.id);
    if (r->key.attempt) {
        cli_table_cell(t, 3, "%d", r->key.attempt);
    }
    cli_table_cell(t, 4, "%.4f", (double)r->reward);
    cli_table_cell(t, 5, "%.4f", (double)r->counterfactual_reward);
    cli_table_cell(t, 6, "%+.4f", (double)r->effect);
    cli_table_signed(t, 7, r->advantage, false);
    cli_table_signed(t, 8, r->counterfactual_advantage, false);
    cli_table_cell(t, 9, "%s", r->advantage.has && r->advantage_flip ? "yes" : "");
    for (int32_t i = 0; i < r->rule_count; i++) {
        cli_put(&names, i ? " " : "");
        cli_put_safe(&names, r->rules[i], false);
    }
    cli_table_cell(t, 10, "%s", names.data ? names.data : "");
    spurion_text_fini(&names);
    cli_table_row(t);
    return CLI_OK;
}

static int json_row(void *context, const spurion_row *r)
{
    asker *a = context;

    cli_json_row(&a->out, r);
    cli_put(&a->out, "\n");
    cli_flush(&a->out);
    cli_progress_show(&a->progress, ++a->rows, 0, "rows");
    return ferror(stdout) ? CLI_IO : CLI_OK;
}

/* What the feature that was asked for is called, from the record of the first row: the catalogue's label, else an imported one. */
static void tell_feature(asker *a, const spurion_query *q)
{
    spurion_record record;

    if (!a->first.run.data || !a->first.group.data || !a->first.id.data ||
        spurion_client_get(a->c->client, &record, &a->first, a->c->timeout_ms) != SPURION_OK) {
        return;
    }
    for (int32_t i = 0; i < record.verdict.feature_count; i++) {
        const spurion_feature *f = &record.verdict.features[i];
        spurion_bytes label = f->label.size ? f->label : f->explanation;
        if (label.size && f->ref.index == (int32_t)q->feature_index && cli_same(f->ref.sae, q->feature_sae)) {
            spurion_text text = {NULL, 0, 0, false};
            cli_put_safe(&text, label, false);
            spurion_text_add(&text, "", 1);
            cli_say("%s: %s", a->c->value[OPT_FEATURE], text.failed ? "" : text.data);
            spurion_text_fini(&text);
        }
    }
}

int cli_query(cli *c)
{
    static const char *const titles[] = {">STEP", "GROUP", "ID", ">ATTEMPT", ">REWARD", ">WITHOUT", ">EFFECT", ">ADV", ">ADV WITHOUT", "FLIP", "RULES"};
    spurion_client_options options = {0};
    asker a = {.c = c};
    asked q;
    uint64_t taken = 0;
    int64_t limit = c->value[OPT_JSONL] ? 0 : TABLE_LIMIT;
    int status;

    if ((status = read_query(&q.query, c)) || (status = cli_whole(&limit, c, OPT_LIMIT, 1, INT64_MAX)) ||
        (status = cli_connect(c, &options, false, false))) {
        return status;
    }
    cli_progress_init(&a.progress);
    if (c->value[OPT_JSONL]) {
        status = walk(&taken, c, &q, (uint64_t)limit, json_row, &a);
    } else {
        cli_table_init(&a.table, titles, 11);
        status = walk(&taken, c, &q, (uint64_t)limit, table_row, &a);
        if (status == CLI_OK && taken) {
            cli_table_print(&a.out, &a.table, c);
            cli_flush(&a.out);
            tell_feature(&a, &q.query);
        }
        cli_pool_reset(&a.pool);
        cli_table_fini(&a.table);
        if (status == CLI_OK && q.query.cursor.size) {
            cli_say("query: there are more than these %llu (--limit)", (unsigned long long)taken);
        }
    }
    cli_progress_end(&a.progress);
    spurion_text_fini(&a.out);
    if (status == CLI_OK && taken == 0) {
        cli_say("query: nothing in run '%s' answers to that", c->args[0]);
        status = CLI_NOTHING;
    }
    return status;
}

/* --- export --- */

/* The keys of one page, kept while their records are fetched through the same handle. */
typedef struct exporter {
    cli *c;
    spurion_text out;
    cli_progress progress;
    cli_pool pool;
    spurion_key *keys;
    int32_t count, capacity;
    uint64_t done;
} exporter;

static spurion_bytes kept(exporter *e, spurion_bytes name)
{
    spurion_bytes out = {cli_pool_text(&e->pool, name), name.size};
    return out;
}

static int keep_key(void *context, const spurion_row *r)
{
    exporter *e = context;
    spurion_key *k;

    if (e->count == e->capacity) {
        int32_t capacity = e->capacity ? 2 * e->capacity : PAGE_ROWS;
        spurion_key *grown = realloc(e->keys, (size_t)capacity * sizeof *grown);
        if (!grown) {
            cli_say("export: expected memory for %d names, found none", capacity);
            return CLI_AGAIN;
        }
        e->keys = grown;
        e->capacity = capacity;
    }
    k = &e->keys[e->count];
    *k = r->key;
    k->run = kept(e, r->key.run);
    k->group = kept(e, r->key.group);
    k->id = kept(e, r->key.id);
    if (!k->run.data || !k->group.data || !k->id.data) {
        cli_say("export: expected memory for a name, found none");
        return CLI_AGAIN;
    }
    e->count++;
    return CLI_OK;
}

static int put_record(exporter *e, const spurion_key *k)
{
    spurion_record record;
    spurion_code code = spurion_client_get(e->c->client, &record, k, e->c->timeout_ms);

    if (code != SPURION_OK) {
        return cli_fail(e->c, code);
    }
    cli_json_record(&e->out, &record, e->c->value[OPT_FULL] != NULL);
    cli_put(&e->out, "\n");
    cli_flush(&e->out);
    cli_progress_show(&e->progress, ++e->done, 0, "records");
    return ferror(stdout) ? CLI_IO : CLI_OK;
}

/* A page of keys, then their records, and so on: what is asked for while the run goes on is that of the cursor. */
static int export_all(exporter *e, asked *a, uint64_t limit)
{
    uint64_t taken;
    int status;

    do {
        uint64_t left = limit ? limit - e->done : PAGE_ROWS;

        status = walk(&taken, e->c, a, left < PAGE_ROWS ? left : PAGE_ROWS, keep_key, e);
        for (int32_t i = 0; i < e->count && status == CLI_OK; i++) {
            status = put_record(e, &e->keys[i]);
        }
        e->count = 0;
        cli_pool_reset(&e->pool);
    } while (status == CLI_OK && a->query.cursor.size && (limit == 0 || e->done < limit));
    return status;
}

int cli_export(cli *c)
{
    spurion_client_options options = {0};
    exporter e = {.c = c};
    asked q;
    int64_t limit = 0;
    int status;

    if ((status = read_query(&q.query, c)) || (status = cli_whole(&limit, c, OPT_LIMIT, 1, INT64_MAX)) ||
        (status = cli_connect(c, &options, false, false))) {
        return status;
    }
    cli_progress_init(&e.progress);
    status = export_all(&e, &q, (uint64_t)limit);
    cli_progress_end(&e.progress);
    free(e.keys);
    cli_pool_reset(&e.pool);
    spurion_text_fini(&e.out);
    if (status == CLI_OK && e.done == 0) {
        cli_say("export: nothing in run '%s' answers to that", c->args[0]);
        status = CLI_NOTHING;
    }
    return status;
}

/* --- runs --- */

static void put_run(asker *a, const spurion_run_row *r)
{
    spurion_text last = {NULL, 0, 0, false};

    if (a->c->value[OPT_JSONL]) {
        cli_json_run(&a->out, r);
        cli_put(&a->out, "\n");
        return;
    }
    cli_table_name(&a->table, 0, r->run);
    cli_table_cell(&a->table, 1, "%lld..%lld", (long long)r->step_min, (long long)r->step_max);
    cli_table_cell(&a->table, 2, "%llu", (unsigned long long)r->rollouts);
    cli_table_cell(&a->table, 3, "%llu", (unsigned long long)r->flagged);
    cli_put_time(&last, r->last_ms);
    cli_table_cell(&a->table, 4, "%s", last.data ? last.data : "");
    spurion_text_fini(&last);
    cli_table_row(&a->table);
}

int cli_runs(cli *c)
{
    static const char *const titles[] = {"RUN", ">STEPS", ">ROLLOUTS", ">FLAGGED", "LAST"};
    spurion_client_options options = {0};
    asker a = {.c = c};
    char after[SPURION_NAME_BYTES_MAX + 1];
    spurion_runs what = {{NULL, 0}, PAGE_ROWS};
    int64_t limit = INT64_MAX;
    bool more = true;
    int status;

    if ((status = cli_whole(&limit, c, OPT_LIMIT, 1, INT64_MAX)) || (status = cli_connect(c, &options, false, false))) {
        return status;
    }
    cli_table_init(&a.table, titles, 5);
    while (more && (int64_t)a.rows < limit && status == CLI_OK) {
        spurion_runs_reply reply;
        spurion_code code = spurion_client_runs(c->client, &reply, &what, c->timeout_ms);

        status = code == SPURION_OK ? CLI_OK : cli_fail(c, code);
        more = code == SPURION_OK && reply.more && reply.count > 0;
        for (int32_t i = 0; status == CLI_OK && i < reply.count && (int64_t)a.rows < limit; i++, a.rows++) {
            put_run(&a, &reply.rows[i]);
        }
        if (more && reply.rows[reply.count - 1].run.size < sizeof after) {
            what.after.size = reply.rows[reply.count - 1].run.size;
            memcpy(after, reply.rows[reply.count - 1].run.data, what.after.size);
            what.after.data = after;
        }
    }
    if (status == CLI_OK && a.rows && !c->value[OPT_JSONL]) {
        cli_table_print(&a.out, &a.table, c);
    }
    cli_flush(&a.out);
    cli_table_fini(&a.table);
    spurion_text_fini(&a.out);
    if (status == CLI_OK && a.rows == 0) {
        cli_say("runs: nothing is stored yet");
        status = CLI_NOTHING;
    }
    return status;
}

/* spurion status. See cli.h. */
#include <string.h>

#include "cli.h"

static void put_producers(spurion_text *out, const cli *c, const spurion_status_reply *s)
{
    static const char *const titles[] = {"RUN", "PRODUCER", ">STORED", ">HIGHEST", ">MISSING", ">LOST"};
    cli_table t;

    cli_table_init(&t, titles, 6);
    for (int32_t i = 0; i < s->producer_count; i++) {
        const spurion_producer_status *p = &s->producers[i];
        cli_table_name(&t, 0, p->run);
        cli_table_name(&t, 1, p->producer);
        cli_table_cell(&t, 2, "%llu", (unsigned long long)p->stored);
        cli_table_cell(&t, 3, "%llu", (unsigned long long)p->highest);
        cli_table_cell(&t, 4, "%llu", (unsigned long long)p->missing);
        cli_table_cell(&t, 5, "%llu", (unsigned long long)p->lost);
        cli_table_row(&t);
    }
    cli_put(out, "\nproducers (stored, highest: batches; lost: rollouts)\n");
    cli_table_print(out, &t, c);
    cli_table_fini(&t);
}

static void put_flights(spurion_text *out, const cli *c, const spurion_status_reply *s)
{
    static const char *const titles[] = {">AGE", "STAGE", "RUN", ">STEP", "GROUP", "ID"};
    cli_table t;

    cli_table_init(&t, titles, 6);
    for (int32_t i = 0; i < s->flight_count; i++) {
        const spurion_flight *f = &s->flights[i];
        spurion_text age = {NULL, 0, 0, false};
        cli_put_age(&age, f->age_ms);
        cli_table_cell(&t, 0, "%s", age.data ? age.data : "");
        spurion_text_fini(&age);
        cli_table_name(&t, 1, f->stage);
        cli_table_name(&t, 2, f->run);
        cli_table_cell(&t, 3, "%lld", (long long)f->step);
        cli_table_name(&t, 4, f->group);
        cli_table_name(&t, 5, f->id);
        cli_table_row(&t);
    }
    spurion_text_print(out, "\nin flight, oldest first%s\n", (uint64_t)s->flight_count < s->in_flight ? " (more are waiting)" : "");
    cli_table_print(out, &t, c);
    cli_table_fini(&t);
}

static void put_status(spurion_text *out, const cli *c, const spurion_status_reply *s)
{
    cli_put(out, "state       ");
    cli_put_safe(out, s->state, false);
    cli_put(out, s->ready ? ", ready\nversion     " : ", not ready\nversion     ");
    cli_put_safe(out, s->version, false);
    cli_put(out, "\nup          ");
    cli_put_age(out, s->uptime_ms);
    cli_put(out, "\nprovenance  ");
    cli_put_safe(out, s->provenance, false);
    cli_put(out, "\nqueue       ");
    cli_put_bytes(out, s->queue_bytes);
    cli_put(out, " of ");
    cli_put_bytes(out, s->queue_bytes_max);
    spurion_text_print(out, ", %llu in flight\n\n", (unsigned long long)s->in_flight);
    cli_put_safe(out, s->engine, true);
    cli_put(out, "\ncounters\n");
    for (int32_t i = 0; i < s->counter_count; i++) {
        spurion_text_print(out, "  %-26.*s %llu\n", (int)s->counters[i].name.size, s->counters[i].name.data,
                           (unsigned long long)s->counters[i].value);
    }
    if (s->producer_count) {
        put_producers(out, c, s);
    }
    if (s->flight_count) {
        put_flights(out, c, s);
    }
}

int cli_status(cli *c)
{
    spurion_client_options options = {0};
    spurion_text out = {NULL, 0, 0, false};
    spurion_status_reply s;
    spurion_code code;
    int status = cli_connect(c, &options, false, false);

    if (status != CLI_OK) {
        return status;
    }
    code = spurion_client_status(c->client, &s, c->timeout_ms);
    if (code != SPURION_OK) {
        return cli_fail(c, code);
    }
    if (c->value[OPT_JSON]) {
        cli_json_status(&out, &s);
        cli_put(&out, "\n");
    } else {
        put_status(&out, c, &s);
    }
    cli_flush(&out);
    spurion_text_fini(&out);
    return CLI_OK;
}

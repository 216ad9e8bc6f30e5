/* Rows, records, alerts and the daemon's state as JSON. Field names are those of docs/verdict.md and spurion.proto. See cli.h. */
#include <math.h>
#include <string.h>

#include "cli.h"

static void key(spurion_text *out, const char *name)
{
    spurion_text_print(out, "%s\"%s\":", out->size && out->data[out->size - 1] != '{' && out->data[out->size - 1] != '[' ? "," : "", name);
}

static void text(spurion_text *out, const char *name, spurion_bytes value)
{
    key(out, name);
    spurion_json_put_string(out, value);
}

static void number(spurion_text *out, const char *name, int64_t value)
{
    key(out, name);
    spurion_text_print(out, "%lld", (long long)value);
}

static void real(spurion_text *out, const char *name, float value)
{
    key(out, name);
    spurion_json_put_float(out, value);
}

static void optional(spurion_text *out, const char *name, spurion_opt_float value)
{
    real(out, name, value.has ? value.value : NAN);
}

static void truth(spurion_text *out, const char *name, bool value)
{
    key(out, name);
    cli_put(out, value ? "true" : "false");
}

static void warnings(spurion_text *out, uint32_t set)
{
    key(out, "warnings");
    cli_put(out, "[");
    for (int bit = 0; bit < SPURION_WARNING_COUNT; bit++) {
        if (set >> bit & 1) {
            spurion_text_print(out, "%s\"%s\"", out->data[out->size - 1] == '[' ? "" : ",", spurion_warning_name(bit));
        }
    }
    cli_put(out, "]");
}

static void identity(spurion_text *out, const spurion_key *k)
{
    text(out, "run", k->run);
    number(out, "step", k->step);
    text(out, "group", k->group);
    text(out, "id", k->id);
    number(out, "attempt", k->attempt);
}

void cli_json_row(spurion_text *out, const spurion_row *row)
{
    cli_put(out, "{");
    identity(out, &row->key);
    real(out, "reward", row->reward);
    real(out, "counterfactual_reward", row->counterfactual_reward);
    real(out, "effect", row->effect);
    optional(out, "effect_sd", row->effect_sd);
    optional(out, "advantage", row->advantage);
    optional(out, "counterfactual_advantage", row->counterfactual_advantage);
    key(out, "advantage_flip");
    cli_put(out, !row->advantage.has ? "null" : row->advantage_flip ? "true" : "false");
    key(out, "rules");
    cli_put(out, "[");
    for (int32_t i = 0; i < row->rule_count; i++) {
        cli_put(out, i ? "," : "");
        spurion_json_put_string(out, row->rules[i]);
    }
    cli_put(out, "]");
    key(out, "action");
    spurion_text_print(out, "\"%s\"", spurion_action_name((int)row->action));
    warnings(out, row->warnings);
    truth(out, "whole", row->whole);
    number(out, "time_ms", row->time_ms);
    cli_put(out, "}");
}

static void ids(spurion_text *out, const char *name, const int32_t *values, int32_t count)
{
    key(out, name);
    cli_put(out, "[");
    for (int32_t i = 0; i < count; i++) {
        spurion_text_print(out, i ? ",%d" : "%d", values[i]);
    }
    cli_put(out, "]");
}

/* Tags and messages are JSON already; line ends between its parts would end the line. */
static void json_text(spurion_text *out, const char *name, spurion_bytes value)
{
    size_t start;

    key(out, name);
    start = out->size;
    spurion_text_add(out, value.data, value.size);
    for (size_t i = start; i < out->size && !out->failed; i++) {
        if (out->data[i] == '\n' || out->data[i] == '\r') {
            out->data[i] = ' ';
        }
    }
}

void cli_json_record(spurion_text *out, const spurion_record *record, bool tokens)
{
    const spurion_rollout *r = &record->rollout;
    spurion_verdict v = record->verdict;

    v.tokens = tokens ? v.tokens : NULL;
    spurion_json_verdict(out, &v, NULL);
    if (out->failed) {
        return;
    }
    out->size--; /* the closing brace: what came in follows what came out */
    if (r->prompt.data || r->completion.data) {
        text(out, "prompt", r->prompt);
        text(out, "completion", r->completion);
    }
    if (r->completion_ids) {
        ids(out, "prompt_ids", r->prompt_ids, r->prompt_id_count);
        ids(out, "completion_ids", r->completion_ids, r->completion_id_count);
    }
    if (r->has_trainer_reward) {
        real(out, "trainer_reward", r->trainer_reward);
    }
    if (r->tags.data) {
        json_text(out, "tags", r->tags);
    }
    if (r->messages.data) {
        json_text(out, "messages", r->messages);
    }
    number(out, "time_ms", record->time_ms);
    cli_put(out, "}");
}

static void worst(spurion_text *out, const spurion_alert *a)
{
    key(out, "worst");
    cli_put(out, "[");
    for (int32_t i = 0; i < a->worst_count; i++) {
        cli_put(out, i ? ",{" : "{");
        text(out, "group", a->worst[i].group);
        text(out, "id", a->worst[i].id);
        number(out, "attempt", a->worst[i].attempt);
        real(out, "effect", a->worst[i].effect);
        cli_put(out, "}");
    }
    cli_put(out, "]");
}

void cli_json_alert(spurion_text *out, const spurion_alert *a)
{
    static const char *const kinds[] = {"none", "rate", "each", "trainer_reward", "store"};

    cli_put(out, "{");
    number(out, "seq", (int64_t)a->seq);
    key(out, "epoch");
    spurion_text_print(out, "\"%llu\"", (unsigned long long)a->epoch); /* text: JSON readers lose the low bits above 2^53 */
    text(out, "kind", cli_bytes(a->kind <= SPURION_ALERT_KIND_STORE ? kinds[a->kind] : "unknown"));
    text(out, "run", a->run);
    number(out, "step", a->step);
    text(out, "rule", a->rule);
    if (a->kind == SPURION_ALERT_KIND_RATE) {
        number(out, "flagged", (int64_t)a->flagged);
        number(out, "scored", (int64_t)a->scored);
        real(out, "rate", a->rate);
        real(out, "rate_lower", a->rate_lower);
        real(out, "rate_upper", a->rate_upper);
        real(out, "rate_max", a->rate_max);
        real(out, "alpha", a->alpha);
        number(out, "run_flagged", (int64_t)a->run_flagged);
        number(out, "run_scored", (int64_t)a->run_scored);
        real(out, "run_rate_lower", a->run_rate_lower);
        real(out, "run_rate_upper", a->run_rate_upper);
        truth(out, "above", a->above);
        truth(out, "step_above", a->step_above);
    }
    worst(out, a);
    if (a->kind == SPURION_ALERT_KIND_TRAINER_REWARD) {
        real(out, "trainer_reward", a->trainer_reward);
        real(out, "reward", a->reward);
    }
    text(out, "text", a->text);
    number(out, "time_ms", a->time_ms);
    cli_put(out, "}");
}

static void flights(spurion_text *out, const spurion_status_reply *s)
{
    key(out, "flights");
    cli_put(out, "[");
    for (int32_t i = 0; i < s->flight_count; i++) {
        const spurion_flight *f = &s->flights[i];
        cli_put(out, i ? ",{" : "{");
        text(out, "run", f->run);
        number(out, "step", f->step);
        text(out, "group", f->group);
        text(out, "id", f->id);
        text(out, "stage", f->stage);
        number(out, "age_ms", (int64_t)f->age_ms);
        cli_put(out, "}");
    }
    cli_put(out, "]");
}

static void producers(spurion_text *out, const spurion_status_reply *s)
{
    key(out, "producers");
    cli_put(out, "[");
    for (int32_t i = 0; i < s->producer_count; i++) {
        const spurion_producer_status *p = &s->producers[i];
        cli_put(out, i ? ",{" : "{");
        text(out, "run", p->run);
        text(out, "producer", p->producer);
        key(out, "epoch");
        spurion_text_print(out, "\"%llu\"", (unsigned long long)p->epoch);
        number(out, "stored", (int64_t)p->stored);
        number(out, "highest", (int64_t)p->highest);
        number(out, "missing", (int64_t)p->missing);
        number(out, "lost", (int64_t)p->lost);
        cli_put(out, "}");
    }
    cli_put(out, "]");
}

void cli_json_status(spurion_text *out, const spurion_status_reply *s)
{
    cli_put(out, "{");
    text(out, "version", s->version);
    text(out, "state", s->state);
    truth(out, "ready", s->ready);
    text(out, "provenance", s->provenance);
    number(out, "uptime_ms", (int64_t)s->uptime_ms);
    number(out, "queue_bytes", (int64_t)s->queue_bytes);
    number(out, "queue_bytes_max", (int64_t)s->queue_bytes_max);
    number(out, "in_flight", (int64_t)s->in_flight);
    key(out, "counters");
    cli_put(out, "{");
    for (int32_t i = 0; i < s->counter_count; i++) {
        cli_put(out, i ? "," : "");
        spurion_json_put_string(out, s->counters[i].name);
        spurion_text_print(out, ":%llu", (unsigned long long)s->counters[i].value);
    }
    cli_put(out, "}");
    flights(out, s);
    producers(out, s);
    text(out, "engine", s->engine);
    cli_put(out, "}");
}

void cli_json_run(spurion_text *out, const spurion_run_row *r)
{
    cli_put(out, "{");
    text(out, "run", r->run);
    number(out, "step_min", r->step_min);
    number(out, "step_max", r->step_max);
    number(out, "rollouts", (int64_t)r->rollouts);
    number(out, "flagged", (int64_t)r->flagged);
    number(out, "first_ms", r->first_ms);
    number(out, "last_ms", r->last_ms);
    cli_put(out, "}");
}

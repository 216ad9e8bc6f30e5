/* Questions, answered on the desk thread from store, engine and counters. See service.h. Memory: the call's arena. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/clock.h"
#include "daemon/pipeline_internal.h"
#include "daemon/service.h"
#include "daemon/service_metrics.h"

#define ALERTS_DEFAULT 100
#define ALERTS_MAX 1000
#define CATALOGUE_DEFAULT 1000
#define PRODUCERS_SHOWN 64

static const spurion_bytes nothing = {NULL, 0};

static spurion_status no_memory(void)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "answer: no memory");
}

static void *array(spurion_call *c, size_t count, size_t size)
{
    return spurion_arena_take_array(&c->arena, count > 0 ? count : 1, size);
}

/* ---- Query ---- */

static void to_store_query(spurion_store_query *out, const spurion_query *q)
{
    static const spurion_store_order orders[] = {SPURION_ORDER_STEP, SPURION_ORDER_TIME, SPURION_ORDER_EFFECT};

    memset(out, 0, sizeof *out);
    out->run = q->run;
    out->order = orders[q->order];
    out->descending = q->descending;
    out->flagged = q->flagged;
    out->rule = q->rule;
    out->sae = q->feature_sae;
    out->index = (int32_t)q->feature_index;
    out->group = q->group;
    out->has_step_min = q->has_step_min;
    out->step_min = q->step_min;
    out->has_step_max = q->has_step_max;
    out->step_max = q->step_max;
    out->has_time_min = q->has_time_min;
    out->time_min = q->time_min_ms;
    out->has_time_max = q->has_time_max;
    out->time_max = q->time_max_ms;
    out->has_effect_min = q->has_effect_min;
    out->effect_min = q->effect_min;
    out->has_effect_max = q->has_effect_max;
    out->effect_max = q->effect_max;
    out->limit = q->limit > SPURION_STORE_PAGE_MAX ? SPURION_STORE_PAGE_MAX : (int32_t)q->limit;
    out->bytes_max = 8u << 20;
    out->cursor = q->cursor;
}

static spurion_status to_row(spurion_row *out, spurion_call *c, const spurion_store_row *in)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_bytes *rules = array(c, (size_t)in->flag_count, sizeof *rules);
    spurion_verdict v;
    spurion_status st;

    if (rules == NULL) {
        return no_memory();
    }
    SPURION_TRY(st, spurion_codec_decode_verdict(&v, &m, in->verdict));
    memset(out, 0, sizeof *out);
    out->key.run = in->identity.run;
    out->key.step = in->identity.step;
    out->key.group = in->identity.group;
    out->key.id = in->identity.id;
    out->key.attempt = in->identity.attempt;
    out->reward = in->reward;
    out->counterfactual_reward = in->counterfactual_reward;
    out->effect = in->effect;
    out->effect_sd = v.effect_sd;
    out->advantage = v.advantage;
    out->counterfactual_advantage = v.counterfactual_advantage;
    out->advantage_flip = v.advantage_flip;
    out->warnings = v.warnings;
    out->time_ms = in->time_ms;
    out->whole = in->has_record;
    for (int32_t i = 0; i < in->flag_count; i++) {
        rules[i] = in->flags[i].rule;
    }
    out->rules = rules;
    out->rule_count = in->flag_count;
    out->action = v.action;
out:
    return st;
}

static spurion_status read_query(spurion_bytes *body, spurion_pipeline *p, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_query_reply reply;
    spurion_store_query sq;
    spurion_store_page page;
    spurion_query q;
    spurion_row *rows;
    spurion_status st;

    SPURION_TRY(st, spurion_codec_decode_query(&q, &m, c->request.body));
    to_store_query(&sq, &q);
    SPURION_TRY(st, spurion_store_query_page(&page, &c->arena, p->store, &sq));
    rows = array(c, (size_t)page.row_count, sizeof *rows);
    if (rows == NULL) {
        return no_memory();
    }
    for (int32_t i = 0; i < page.row_count; i++) {
        SPURION_TRY(st, to_row(&rows[i], c, &page.rows[i]));
    }
    reply.rows = rows;
    reply.count = page.row_count;
    reply.cursor = page.more ? page.cursor : nothing;
    SPURION_TRY(st, spurion_codec_encode_query_reply(body, &m, &reply));
out:
    return st;
}

/* ---- Get ---- */

static spurion_status read_get(spurion_bytes *body, spurion_pipeline *p, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_identity identity;
    spurion_store_row row;
    spurion_record record;
    spurion_key key;
    spurion_status st;

    SPURION_TRY(st, spurion_codec_decode_get(&key, &m, c->request.body));
    identity.run = key.run;
    identity.step = key.step;
    identity.group = key.group;
    identity.id = key.id;
    identity.attempt = key.attempt;
    SPURION_TRY(st, spurion_store_get(&row, &c->arena, p->store, &identity, true));
    if (row.record.size > 0) {
        *body = row.record;
        return st;
    }
    memset(&record, 0, sizeof record); /* counted, not kept whole: the verdict stands alone */
    SPURION_TRY(st, spurion_codec_decode_verdict(&record.verdict, &m, row.verdict));
    record.rollout.run = key.run;
    record.rollout.step = key.step;
    record.rollout.group = key.group;
    record.rollout.id = key.id;
    record.rollout.attempt = key.attempt;
    record.time_ms = row.time_ms;
    SPURION_TRY(st, spurion_codec_encode_record(body, &m, &record));
out:
    return st;
}

/* ---- Counts, Runs ---- */

static spurion_status read_counts(spurion_bytes *body, spurion_pipeline *p, spurion_call *c)
{
    static const spurion_count_kind kinds[] = {SPURION_COUNT_STEP, SPURION_COUNT_RULE, SPURION_COUNT_FEATURE};
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_store_counts_query sq;
    spurion_store_counts_page page;
    spurion_counts_reply reply;
    spurion_counts_row *rows;
    spurion_counts q;
    spurion_status st;

    SPURION_TRY(st, spurion_codec_decode_counts(&q, &m, c->request.body));
    memset(&sq, 0, sizeof sq);
    sq.kind = kinds[q.kind];
    sq.run = q.run;
    sq.rule = q.rule;
    sq.sae = q.feature_sae;
    sq.index = (int32_t)q.feature_index;
    sq.totals = q.totals;
    sq.has_step_min = q.has_step_min;
    sq.step_min = q.step_min;
    sq.has_step_max = q.has_step_max;
    sq.step_max = q.step_max;
    sq.limit = q.limit > SPURION_STORE_PAGE_MAX ? SPURION_STORE_PAGE_MAX : (int32_t)q.limit;
    sq.cursor = q.cursor;
    SPURION_TRY(st, spurion_store_counts(&page, &c->arena, p->store, &sq));
    rows = array(c, (size_t)page.count, sizeof *rows);
    if (rows == NULL) {
        return no_memory();
    }
    for (int32_t i = 0; i < page.count; i++) {
        const spurion_store_count *in = &page.counts[i];
        rows[i].rule = in->rule;
        rows[i].ref.sae = in->sae;
        rows[i].ref.index = in->index;
        rows[i].step = in->step;
        rows[i].scored = in->scored;
        rows[i].flagged = in->flagged;
        rows[i].effect_sum = in->effect_sum;
        rows[i].reward_sum = in->reward_sum;
        rows[i].reward_square_sum = in->reward_square_sum;
        rows[i].counterfactual_sum = in->counterfactual_sum;
    }
    reply.kind = q.kind;
    reply.rows = rows;
    reply.count = page.count;
    reply.cursor = page.more ? page.cursor : nothing;
    SPURION_TRY(st, spurion_codec_encode_counts_reply(body, &m, &reply));
out:
    return st;
}

static spurion_status read_runs(spurion_bytes *body, spurion_pipeline *p, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_runs_reply reply;
    spurion_store_run *runs;
    spurion_run_row *rows;
    spurion_runs q;
    spurion_status st;

    SPURION_TRY(st, spurion_codec_decode_runs(&q, &m, c->request.body));
    SPURION_TRY(st, spurion_store_runs(&runs, &reply.count, &reply.more, &c->arena, p->store, q.after,
                                       q.limit == 0 || q.limit > SPURION_STORE_PAGE_MAX ? SPURION_STORE_PAGE_MAX : (int32_t)q.limit));
    rows = array(c, (size_t)reply.count, sizeof *rows);
    if (rows == NULL) {
        return no_memory();
    }
    for (int32_t i = 0; i < reply.count; i++) {
        rows[i].run = runs[i].run;
        rows[i].first_ms = runs[i].first_ms;
        rows[i].last_ms = runs[i].last_ms;
        rows[i].step_min = runs[i].step_min;
        rows[i].step_max = runs[i].step_max;
        rows[i].rollouts = runs[i].rollouts;
        rows[i].flagged = runs[i].flagged;
    }
    reply.rows = rows;
    SPURION_TRY(st, spurion_codec_encode_runs_reply(body, &m, &reply));
out:
    return st;
}

/* ---- Alerts ---- */

static spurion_status read_alerts(spurion_bytes *body, spurion_pipeline *p, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_store_alert_entry *entries;
    spurion_alerts_reply reply;
    spurion_alert *alerts;
    int32_t count, limit;
    spurion_alerts q;
    spurion_status st;

    SPURION_TRY(st, spurion_codec_decode_alerts(&q, &m, c->request.body));
    reply.epoch = spurion_store_alert_epoch(p->store);
    reply.last_seq = spurion_store_alert_next(p->store) - 1;
    if (q.from_seq == 0 || (q.epoch != 0 && q.epoch != reply.epoch)) { /* another stream: from its beginning */
        q.from_seq = 1;
    }
    limit = q.limit == 0 ? ALERTS_DEFAULT : q.limit > ALERTS_MAX ? ALERTS_MAX : (int32_t)q.limit;
    SPURION_TRY(st, spurion_store_alerts(&entries, &count, &c->arena, p->store, q.from_seq, limit, 0));
    alerts = array(c, (size_t)count, sizeof *alerts);
    if (alerts == NULL) {
        return no_memory();
    }
    reply.alerts = alerts;
    reply.count = 0;
    reply.next_seq = q.from_seq;
    for (int32_t i = 0; i < count; i++) {
        spurion_alert *a = &alerts[reply.count];
        SPURION_TRY(st, spurion_codec_decode_alert(a, &m, entries[i].alert));
        a->epoch = reply.epoch;
        a->seq = entries[i].sequence;
        reply.next_seq = a->seq + 1;
        if (q.run.data == NULL || (q.run.size == a->run.size && memcmp(q.run.data, a->run.data, q.run.size) == 0)) {
            reply.count++;
        }
    }
    SPURION_TRY(st, spurion_codec_encode_alerts_reply(body, &m, &reply));
out:
    return st;
}

/* ---- Status ---- */

static spurion_status describe_engine(spurion_bytes *out, spurion_pipeline *p, spurion_call *c)
{
    char *text = NULL, *copy;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);

    if (f == NULL) {
        return no_memory();
    }
    spurion_engine_describe(p->engine, f);
    if (fclose(f) != 0) {
        free(text);
        return no_memory();
    }
    copy = spurion_arena_copy(&c->arena, text, size);
    free(text);
    if (copy == NULL) {
        return no_memory();
    }
    out->data = copy;
    out->size = size;
    return spurion_ok();
}

static const char *state_text(spurion_pipeline *p, const spurion_store_stats *store)
{
    if (atomic_load(&p->state) == SPURION_STATE_DRAINING) {
        return "draining";
    }
    if (store->failed) {
        return "store: a write failed";
    }
    if (atomic_load(&p->store_blocked) || !store->writable) {
        return "store: no space";
    }
    return store->low_space ? "store: little space" : "serving";
}

static spurion_status read_status(spurion_bytes *body, spurion_pipeline *p, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_flight *flights = array(c, SPURION_FLIGHT_MAX, sizeof *flights);
    spurion_producer_status *producers = array(c, PRODUCERS_SHOWN, sizeof *producers);
    spurion_counter *counters = array(c, SPURION_METRICS_COUNT, sizeof *counters);
    spurion_store_stats store;
    spurion_status_reply r;
    spurion_status st;

    if (flights == NULL || producers == NULL || counters == NULL) {
        return no_memory();
    }
    memset(&r, 0, sizeof r);
    spurion_store_stats_get(&store, p->store);
    spurion_metrics_counters(counters, p);
    r.version = spurion_bytes_of(SPURION_VERSION);
    r.provenance = spurion_bytes_of(spurion_engine_provenance(p->engine));
    r.uptime_ms = (uint64_t)(spurion_clock_ms() - p->start_ms);
    r.state = spurion_bytes_of(state_text(p, &store));
    r.ready = spurion_pipeline_ready(p);
    r.queue_bytes = atomic_load(&p->bytes);
    r.queue_bytes_max = p->config->engine.queue_max;
    r.counters = counters;
    r.counter_count = SPURION_METRICS_COUNT;
    r.in_flight = (uint64_t)spurion_flights_count(p->flights);
    SPURION_TRY(st, spurion_flights_list(flights, &r.flight_count, p->flights, &m, SPURION_FLIGHT_MAX, spurion_clock_ms()));
    r.flights = flights;
    SPURION_TRY(st, spurion_producers_list(producers, &r.producer_count, p->producers, &m, PRODUCERS_SHOWN));
    r.producers = producers;
    SPURION_TRY(st, describe_engine(&r.engine, p, c));
    SPURION_TRY(st, spurion_codec_encode_status_reply(body, &m, &r));
out:
    return st;
}

/* ---- Catalogue, Rules ---- */

static spurion_status read_catalogue(spurion_bytes *body, spurion_pipeline *p, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    const spurion_catalogue *catalogue = spurion_engine_catalogue(p->engine);
    uint32_t total = catalogue != NULL ? (uint32_t)catalogue->entry_count : 0, n;
    spurion_catalogue_reply reply;
    spurion_catalogue_row *rows;
    spurion_page q;
    spurion_status st;

    SPURION_TRY(st, spurion_codec_decode_catalogue(&q, &m, c->request.body));
    n = q.limit == 0 || q.limit > CATALOGUE_DEFAULT ? CATALOGUE_DEFAULT : q.limit;
    n = q.from >= total ? 0 : total - q.from < n ? total - q.from : n;
    rows = array(c, n, sizeof *rows);
    if (rows == NULL) {
        return no_memory();
    }
    for (uint32_t i = 0; i < n; i++) {
        const spurion_catalogue_entry *e = &catalogue->entries[q.from + i];
        rows[i].ref.sae = spurion_bytes_of(p->config->saes[e->sae].id);
        rows[i].ref.index = e->index;
        rows[i].label = e->label;
        rows[i].verdict = e->verdict;
        rows[i].role = (uint32_t)e->roles;
        rows[i].activation_min = e->activation_min;
        rows[i].families = e->families;
        rows[i].family_count = e->family_count;
    }
    reply.total = total;
    reply.rows = rows;
    reply.count = (int32_t)n;
    SPURION_TRY(st, spurion_codec_encode_catalogue_reply(body, &m, &reply));
out:
    return st;
}

static spurion_status fill_rule(spurion_rule_row *out, spurion_call *c, const spurion_rule_config *in)
{
    spurion_bytes *families = array(c, (size_t)in->family_count, sizeof *families);

    if (families == NULL) {
        return no_memory();
    }
    for (int32_t i = 0; i < in->family_count; i++) {
        families[i] = spurion_bytes_of(in->families[i]);
    }
    out->id = spurion_bytes_of(in->id);
    out->direction = (uint32_t)in->direction;
    out->alert = (uint32_t)in->alert;
    out->effect_min.has = in->has_effect_min;
    out->effect_min.value = (float)in->effect_min;
    out->effect_sd_min.has = in->has_effect_sd_min;
    out->effect_sd_min.value = (float)in->effect_sd_min;
    out->advantage_flip = in->advantage_flip;
    out->rate_max = (float)in->rate_max;
    out->alpha = (float)in->alpha;
    out->action = (spurion_action)(in->action + 1);
    out->weight = in->action == SPURION_RULE_DOWN_WEIGHT ? (float)in->weight : 1.0f;
    out->families = families;
    out->family_count = in->family_count;
    return spurion_ok();
}

static spurion_status read_rules(spurion_bytes *body, spurion_pipeline *p, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_rules_reply reply;
    spurion_rule_row *rows = array(c, (size_t)p->config->rule_count, sizeof *rows);
    spurion_status st = spurion_ok();

    if (rows == NULL) {
        return no_memory();
    }
    for (int32_t i = 0; i < p->config->rule_count; i++) {
        SPURION_TRY(st, fill_rule(&rows[i], c, &p->config->rules[i]));
    }
    reply.rows = rows;
    reply.count = p->config->rule_count;
    SPURION_TRY(st, spurion_codec_encode_rules_reply(body, &m, &reply));
out:
    return st;
}

spurion_status spurion_service_read(spurion_bytes *body, spurion_pipeline *p, spurion_call *c)
{
    static const struct {
        const char *name;
        spurion_status (*read)(spurion_bytes *body, spurion_pipeline *p, spurion_call *c);
    } readers[] = {{"Query", read_query},   {"Get", read_get},       {"Counts", read_counts},       {"Runs", read_runs},
                   {"Alerts", read_alerts}, {"Status", read_status}, {"Catalogue", read_catalogue}, {"Rules", read_rules}};
    const char *name = c->request.method.data + sizeof SPURION_METHOD_PREFIX - 1;

    *body = nothing;
    for (size_t i = 0; i < sizeof readers / sizeof *readers; i++) {
        if (strcmp(name, readers[i].name) == 0) {
            return readers[i].read(body, p, c);
        }
    }
    return spurion_error(SPURION_UNIMPLEMENTED, "method: expected a question, found %s", name);
}

/* The sink thread: what was judged becomes durable in one batch, and only then alerts go out and callers are answered. See
 * pipeline_internal.h. Memory: one arena for each turn; answers of a call in the call's own. */
#include "daemon/pipeline_sink.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "daemon/base/check.h"
#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/service.h"
#include "daemon/service_http.h"

#define ITEMS_MAX 2048           /* of one turn */
#define SPACE_RETRY_MS 500
#define SAVED_BYTES_MAX (1u << 20)

static const spurion_bytes nothing = {NULL, 0};

/* One turn: arrays in the turn's arena. */
typedef struct turn {
    spurion_pipeline *p;
    spurion_arena arena;
    spurion_item *items[ITEMS_MAX];
    int count;
    spurion_store_batch batch;
    spurion_store_row *rows;
    spurion_item **row_items;
    spurion_alert *alerts;
    spurion_store_alert *stored;
    spurion_store_closing *closings;
    spurion_store_mark *marks;
    spurion_producer **sources;  /* of marks */
    int *source_pins;
    spurion_store_reply *replies;
    uint64_t *tickets;
    spurion_call *done;          /* calls whose last item is in this turn, linked by done_next */
    spurion_call **done_tail;
    bool failed;                 /* no memory for the turn */
} turn;

/* ---- commit ---- */

/* Tells subscribers at once that nothing is stored; an alert without a number, since it cannot be stored itself. */
static void publish_blocked(spurion_pipeline *p, spurion_arena *arena)
{
    spurion_alert a;

    memset(&a, 0, sizeof a);
    a.kind = SPURION_ALERT_KIND_STORE;
    a.epoch = spurion_store_alert_epoch(p->store);
    a.time_ms = spurion_clock_wall_ms();
    a.text = spurion_bytes_of("store: no space; nothing new is taken until there is some");
    spurion_bytes packed;
    if (spurion_sink_pack_alert(&packed, arena, &a).code == SPURION_OK) {
        spurion_transport_publish(p->transport, packed.data, packed.size);
    }
}

spurion_status spurion_sink_commit(spurion_pipeline *p, spurion_store_batch *batch)
{
    static const struct timespec pause = {0, SPACE_RETRY_MS * 1000000L};
    spurion_status st = spurion_store_commit(p->store, batch);

    if (st.code == SPURION_RESOURCE_EXHAUSTED) {
        spurion_arena arena;
        spurion_arena_init(&arena, 0);
        atomic_store(&p->store_blocked, true);
        spurion_log_error("STORE-FULL", "%s", st.message);
        publish_blocked(p, &arena);
        spurion_arena_fini(&arena);
        while (st.code == SPURION_RESOURCE_EXHAUSTED && atomic_load(&p->state) != SPURION_STATE_DRAINING) {
            nanosleep(&pause, NULL);
            st = spurion_store_commit(p->store, batch);
        }
        if (st.code == SPURION_OK) {
            atomic_store(&p->store_blocked, false);
            spurion_log_warn("STORE-SPACE", "there is space again");
        }
    }
    if (st.code == SPURION_OK) {
        spurion_stat_add(p, SPURION_STAT_COMMITS, 1);
    } else if (atomic_load(&p->state) != SPURION_STATE_DRAINING) {
        spurion_log_error("STORE-FAILED", "%s", st.message);
        spurion_pipeline_fail(p, st.code == SPURION_INVALID_ARGUMENT ? 70 : 74);
    }
    return st;
}

/* ---- alerts ---- */

spurion_status spurion_sink_pack_alert(spurion_bytes *out, spurion_arena *arena, spurion_alert *alert)
{
    spurion_memory m = spurion_arena_memory(arena);
    spurion_status st = spurion_codec_encode_alert(out, &m, alert);

    while (st.code == SPURION_OUT_OF_RANGE && alert->worst_count > 0) { /* long names: fewer of them */
        alert->worst_count--;
        st = spurion_codec_encode_alert(out, &m, alert);
    }
    return st;
}

void spurion_sink_publish(spurion_pipeline *p, spurion_arena *arena, spurion_alert *alerts, const spurion_store_alert *stored, int32_t count)
{
    for (int32_t i = 0; i < count; i++) {
        spurion_bytes packed;
        spurion_status st;
        if (stored[i].sequence == 0) {
            continue; /* sent before */
        }
        alerts[i].epoch = spurion_store_alert_epoch(p->store);
        alerts[i].seq = stored[i].sequence;
        st = spurion_sink_pack_alert(&packed, arena, &alerts[i]);
        if (st.code != SPURION_OK) {
            spurion_log_error("ALERT-PACK", "alert %llu not sent: %s", (unsigned long long)stored[i].sequence, st.message);
            continue;
        }
        spurion_transport_publish(p->transport, packed.data, packed.size);
        spurion_stat_add(p, SPURION_STAT_ALERTS, 1);
    }
}

/* Room for one alert more in the turn. */
static spurion_alert *new_alert(turn *t, const spurion_verdict *v, spurion_alert_kind kind, spurion_bytes rule)
{
    spurion_alert *a = &t->alerts[t->batch.alert_count];

    a->kind = kind;
    a->run = v->run;
    a->step = v->step;
    a->rule = rule;
    a->flagged = a->scored = 1;
    a->worst[0].group = v->group;
    a->worst[0].id = v->id;
    a->worst[0].attempt = v->attempt;
    a->worst_count = 1;
    a->time_ms = spurion_clock_wall_ms();
    return a;
}

static void keep_alert(turn *t, int32_t row, int32_t closing)
{
    spurion_store_alert *s = &t->stored[t->batch.alert_count];
    spurion_status st = spurion_sink_pack_alert(&s->alert, &t->arena, &t->alerts[t->batch.alert_count]);

    if (st.code != SPURION_OK) {
        spurion_log_error("ALERT-PACK", "alert not stored: %s", st.message);
        return;
    }
    s->row = row;
    s->closing = closing;
    t->batch.alert_count++;
}

static void alert_each(turn *t, int32_t row, const spurion_verdict *v)
{
    const spurion_config *config = t->p->config;

    for (int32_t f = 0; f < v->flag_count; f++) {
        for (int32_t i = 0; i < config->rule_count; i++) {
            const spurion_rule_config *rule = &config->rules[i];
            if (rule->alert == SPURION_ALERT_EACH && strlen(rule->id) == v->flags[f].rule.size &&
                memcmp(rule->id, v->flags[f].rule.data, v->flags[f].rule.size) == 0) {
                spurion_alert *a = new_alert(t, v, SPURION_ALERT_KIND_EACH, v->flags[f].rule);
                a->worst[0].effect = v->flags[f].effect;
                a->rate_max = (float)rule->rate_max;
                a->alpha = (float)rule->alpha;
                keep_alert(t, row, -1);
            }
        }
    }
}

/* Trainer and daemon do not run the same model: once for each step, whatever the number of rollouts. */
static void alert_trainer_reward(turn *t, int32_t row, const spurion_item *it)
{
    const spurion_verdict *v = &it->job.verdict;
    spurion_bytes rule = spurion_bytes_of(SPURION_RULE_TRAINER_REWARD);
    spurion_alert *a;

    for (int32_t i = 0; i < t->batch.closing_count; i++) {
        const spurion_store_closing *c = &t->closings[i];
        if (c->step == v->step && c->run.size == v->run.size && memcmp(c->run.data, v->run.data, v->run.size) == 0) {
            return;
        }
    }
    t->closings[t->batch.closing_count].run = v->run;
    t->closings[t->batch.closing_count].step = v->step;
    t->closings[t->batch.closing_count].rule = rule;
    a = new_alert(t, v, SPURION_ALERT_KIND_TRAINER_REWARD, nothing);
    a->trainer_reward = it->job.rollout.trainer_reward;
    a->reward = v->reward;
    keep_alert(t, row, t->batch.closing_count++);
}

/* ---- rows ---- */

static int32_t sae_place(const spurion_config *config, spurion_bytes sae)
{
    for (int32_t i = 0; i < config->sae_count; i++) {
        if (strlen(config->saes[i].id) == sae.size && memcmp(config->saes[i].id, sae.data, sae.size) == 0) {
            return i;
        }
    }
    return -1;
}

/* The catalogued features that were active: into counters and index. */
static spurion_status fill_features(spurion_store_row *row, turn *t, const spurion_verdict *v)
{
    const spurion_catalogue *catalogue = spurion_engine_catalogue(t->p->engine);
    spurion_store_feature *features = spurion_arena_take_array(&t->arena, (size_t)v->feature_count + 1, sizeof *features);

    if (features == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "sink: no memory for features");
    }
    row->features = features;
    for (int32_t i = 0; i < v->feature_count && catalogue != NULL; i++) {
        const spurion_feature *f = &v->features[i];
        int32_t place = f->label.data != NULL ? sae_place(t->p->config, f->ref.sae) : -1;
        const spurion_catalogue_entry *e = place >= 0 ? spurion_catalogue_find(catalogue, place, f->ref.index) : NULL;
        if (e == NULL || !(f->activation_max > e->activation_min)) {
            continue;
        }
        features[row->feature_count].sae = f->ref.sae;
        features[row->feature_count].index = f->ref.index;
        features[row->feature_count].attribution = f->attribution.has ? f->attribution.value : 0;
        features[row->feature_count].counted = true;
        features[row->feature_count++].indexed = true;
    }
    return spurion_ok();
}

/* Whether a rollout without a flag is kept whole: by its content, so that a repetition of the run keeps the same ones. */
static bool sampled(const unsigned char *digest, int one_in)
{
    uint32_t number = (uint32_t)digest[0] | (uint32_t)digest[1] << 8 | (uint32_t)digest[2] << 16 | (uint32_t)digest[3] << 24;

    return one_in > 0 && number % (uint32_t)one_in == 0;
}

static spurion_status fill_row(spurion_store_row *row, turn *t, spurion_item *it)
{
    spurion_memory m = spurion_arena_memory(&t->arena);
    const spurion_verdict *v = &it->job.verdict;
    spurion_verdict small = *v;
    spurion_store_flag *flags = spurion_arena_take_array(&t->arena, (size_t)v->flag_count + 1, sizeof *flags);
    spurion_status st;

    if (flags == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "sink: no memory for flags");
    }
    row->identity.run = v->run;
    row->identity.group = v->group;
    row->identity.id = v->id;
    row->identity.step = v->step;
    row->identity.attempt = v->attempt;
    memcpy(row->digest, it->flight.digest, sizeof row->digest);
    row->time_ms = spurion_clock_wall_ms();
    row->reward = v->reward;
    row->counterfactual_reward = v->counterfactual_reward;
    row->effect = v->effect;
    for (int32_t i = 0; i < v->flag_count; i++) {
        flags[i].rule = v->flags[i].rule;
        flags[i].effect = v->flags[i].effect;
    }
    row->flags = flags;
    row->flag_count = v->flag_count;
    SPURION_TRY(st, fill_features(row, t, v));
    small.tokens = NULL;
    SPURION_TRY(st, spurion_codec_encode_verdict(&row->verdict, &m, &small));
    if (v->flag_count > 0 || sampled(it->flight.digest, t->p->config->store.keep_one_in)) {
        spurion_record record = {it->job.rollout, *v, row->time_ms};
        SPURION_TRY(st, spurion_codec_encode_record(&row->record, &m, &record));
    }
out:
    return st;
}

static void add_row(turn *t, spurion_item *it)
{
    int32_t n = t->batch.row_count;
    spurion_status st = fill_row(&t->rows[n], t, it);

    if (st.code != SPURION_OK) {
        spurion_log_error("SINK-ROW", "rollout cannot be stored: %s", st.message);
        it->job.verdict.code = SPURION_OK; /* refuse keeps the first refusal; this is it */
        spurion_ingest_refuse(it, &st);
        memset(&t->rows[n], 0, sizeof t->rows[n]);
        return;
    }
    t->row_items[n] = it;
    t->batch.row_count++;
    alert_each(t, n, &it->job.verdict);
    if (it->job.verdict.warnings & SPURION_WARN_TRAINER_REWARD_DIFFERS) {
        alert_trainer_reward(t, n, it);
    }
}

/* ---- answers ---- */

/* The packed verdict of an item, kept in its call's memory: for Score, and for those of its identity that wait. */
static void keep_answer(turn *t, spurion_item *it, const spurion_store_row *row)
{
    bool score = it->call->kind == SPURION_CALL_SCORE;
    spurion_arena *arena = score ? &it->call->arena : &t->arena;
    spurion_memory m = spurion_arena_memory(arena);
    spurion_status st = spurion_ok();

    if (it->fate == SPURION_FATE_NONE || it->fate == SPURION_FATE_ABANDONED) {
        return;
    }
    if (it->answer.size > 0) { /* known: in the item's own arena */
        char *copy = score ? spurion_arena_copy(arena, it->answer.data, it->answer.size) : NULL;
        if (score) {
            it->answer.data = copy;
            it->answer.size = copy != NULL ? it->answer.size : 0;
        }
    } else if (row != NULL && !(score && it->call->want_tokens)) {
        it->answer = row->verdict;
        if (score) {
            it->answer.data = spurion_arena_copy(arena, row->verdict.data, row->verdict.size);
        }
    } else {
        st = spurion_codec_encode_verdict(&it->answer, &m, &it->job.verdict);
    }
    if (st.code != SPURION_OK || it->answer.data == NULL) {
        spurion_log_error("SINK-ANSWER", "verdict cannot be packed: %s", st.message);
        it->answer = nothing;
        it->call->abandoned = spurion_error(SPURION_RESOURCE_EXHAUSTED, "Score: no memory for the answer");
    }
}

static spurion_status score_body(spurion_bytes *out, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_bytes *verdicts = spurion_arena_take_array(&c->arena, (size_t)c->item_count, sizeof *verdicts);

    if (verdicts == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "Score: no memory for the answer");
    }
    for (int32_t i = 0; i < c->list.count; i++) {
        verdicts[i] = c->items[i].answer;
    }
    return spurion_codec_join_verdicts(out, &m, verdicts, c->list.count);
}

/* The answer under its idempotency key, with the digest of what was asked before it. */
static void save_reply(turn *t, spurion_call *c, spurion_bytes body)
{
    spurion_store_reply *r = &t->replies[t->batch.reply_count];
    unsigned char digest[SPURION_ROLLOUT_DIGEST_BYTES];
    spurion_rollout asked;
    char *data;

    if (c->request.idempotency_key.size == 0 || (c->http == NULL && body.size > SAVED_BYTES_MAX)) {
        return;
    }
    memset(&asked, 0, sizeof asked);
    asked.completion = c->request.body;
    spurion_rollout_digest(digest, &asked);
    data = spurion_arena_take(&t->arena, sizeof digest + body.size);
    if (data == NULL) {
        return; /* the identities still answer a second time */
    }
    memcpy(data, digest, sizeof digest);
    if (body.size > 0) {
        memcpy(data + sizeof digest, body.data, body.size);
    }
    r->key = c->request.idempotency_key;
    r->reply.data = data;
    r->reply.size = sizeof digest + body.size;
    r->expires_ms = spurion_clock_wall_ms() + (int64_t)t->p->config->store.replies_for_s * 1000;
    t->batch.reply_count++;
}

/* ---- calls that are done with this turn ---- */

static void add_source(turn *t, spurion_producer *source)
{
    for (int32_t i = 0; i < t->batch.mark_count; i++) {
        if (t->sources[i] == source) {
            t->source_pins[i]++;
            return;
        }
    }
    t->sources[t->batch.mark_count] = source;
    t->source_pins[t->batch.mark_count++] = 1;
}

static int64_t highest_step(const spurion_call *c)
{
    int64_t step = -1;
    for (int32_t i = 0; i < c->list.count; i++) {
        if (c->items[i].fate != SPURION_FATE_REFUSED && c->list.rollouts[i].step > step) {
            step = c->list.rollouts[i].step;
        }
    }
    return step;
}

static void finish_call(turn *t, spurion_call *c)
{
    spurion_pipeline *p = t->p;

    *t->done_tail = c;
    t->done_tail = &c->done_next;
    c->done_next = NULL;
    if (c->abandoned.code != SPURION_OK) {
        if (c->kind == SPURION_CALL_TAP) {
            spurion_producers_drop(p->producers, c->source, c->tap.sequence);
        }
        return;
    }
    if (c->kind == SPURION_CALL_TAP) {
        spurion_producers_stage(p->producers, c->source, c->tap.sequence, highest_step(c), c->tap.has_step_end ? c->tap.step_end : -1);
        add_source(t, c->source);
    } else if (c->kind == SPURION_CALL_SYNC) {
        spurion_producers_stage_sync(p->producers, c->source, &c->sync);
        add_source(t, c->source);
    } else if (c->ticket != 0) {
        t->tickets[t->batch.inbox_done_count++] = c->ticket;
    }
}

static void make_marks(turn *t)
{
    spurion_memory m = spurion_arena_memory(&t->arena);

    for (int32_t i = 0; i < t->batch.mark_count; i++) {
        spurion_status st = spurion_producers_encode(&t->marks[i].ranges, t->p->producers, t->sources[i], &m);
        if (st.code != SPURION_OK) {
            t->failed = true;
            return;
        }
        t->marks[i].run = spurion_producer_run(t->sources[i]);
        t->marks[i].producer = spurion_producer_name(t->sources[i]);
        t->marks[i].epoch = spurion_producer_epoch(t->sources[i]);
    }
}

/* ---- a turn ---- */

static int32_t flags_of(const turn *t)
{
    int32_t n = 0;
    for (int i = 0; i < t->count; i++) {
        n += t->items[i]->fate == SPURION_FATE_JUDGE ? t->items[i]->job.verdict.flag_count : 0;
    }
    return n;
}

static void turn_begin(turn *t)
{
    size_t n = (size_t)t->count + 1, alerts = (size_t)flags_of(t) * (size_t)(t->p->config->rule_count > 0 ? t->p->config->rule_count : 1) + n;

    memset(&t->batch, 0, sizeof t->batch);
    t->done = NULL;
    t->done_tail = &t->done;
    t->rows = spurion_arena_take_array(&t->arena, n, sizeof *t->rows);
    t->row_items = spurion_arena_take_array(&t->arena, n, sizeof *t->row_items);
    t->alerts = spurion_arena_take_array(&t->arena, alerts, sizeof *t->alerts);
    t->stored = spurion_arena_take_array(&t->arena, alerts, sizeof *t->stored);
    t->closings = spurion_arena_take_array(&t->arena, n, sizeof *t->closings);
    t->marks = spurion_arena_take_array(&t->arena, n, sizeof *t->marks);
    t->sources = spurion_arena_take_array(&t->arena, n, sizeof *t->sources);
    t->source_pins = spurion_arena_take_array(&t->arena, n, sizeof *t->source_pins);
    t->replies = spurion_arena_take_array(&t->arena, n, sizeof *t->replies);
    t->tickets = spurion_arena_take_array(&t->arena, n, sizeof *t->tickets);
    t->failed = t->rows == NULL || t->row_items == NULL || t->alerts == NULL || t->stored == NULL || t->closings == NULL ||
                t->marks == NULL || t->sources == NULL || t->source_pins == NULL || t->replies == NULL || t->tickets == NULL;
    t->batch.rows = t->rows;
    t->batch.alerts = t->stored;
    t->batch.closings = t->closings;
    t->batch.marks = t->marks;
    t->batch.replies = t->replies;
    t->batch.inbox_done = t->tickets;
    t->batch.rules = t->p->rules;
    t->batch.rule_count = t->p->config->rule_count;
}

static void collect(turn *t)
{
    for (int i = 0; i < t->count; i++) {
        spurion_item *it = t->items[i];
        spurion_store_row *row = NULL;
        if (it->fate == SPURION_FATE_JUDGE && it->job.verdict.code != SPURION_OK) {
            it->fate = SPURION_FATE_REFUSED;
        }
        if (it->fate == SPURION_FATE_JUDGE) {
            int32_t before = t->batch.row_count;
            add_row(t, it);
            row = t->batch.row_count > before ? &t->rows[before] : NULL;
        }
        if (it->fate == SPURION_FATE_ABANDONED && it->call->abandoned.code == SPURION_OK) {
            it->call->abandoned = atomic_load(&t->p->failed) == 70
                                      ? spurion_error(SPURION_INTERNAL, "engine: the device failed; the daemon stops")
                                      : spurion_error(SPURION_UNAVAILABLE, "daemon: shutting down; try again");
        }
        keep_answer(t, it, row);
        if (--it->call->open == 0) {
            finish_call(t, it->call);
        }
    }
    make_marks(t);
}

static bool is_empty(const spurion_store_batch *b)
{
    return b->row_count + b->alert_count + b->closing_count + b->mark_count + b->reply_count + b->inbox_done_count == 0;
}

/* Bodies of finished Scores; saved ones go into the batch. */
static void make_bodies(turn *t, spurion_bytes *bodies)
{
    int n = 0;

    for (spurion_call *c = t->done; c != NULL; c = c->done_next, n++) {
        bodies[n] = nothing;
        if (c->kind == SPURION_CALL_SCORE && c->abandoned.code == SPURION_OK) {
            bool keep = true;
            spurion_status st = c->http != NULL ? spurion_http_body(&bodies[n], &keep, c) : score_body(&bodies[n], c);
            if (st.code != SPURION_OK) {
                c->abandoned = st;
            } else if (keep) {
                save_reply(t, c, bodies[n]);
            }
        }
    }
}

static void count_outcomes(turn *t)
{
    spurion_pipeline *p = t->p;

    for (int32_t i = 0; i < t->batch.row_count; i++) {
        const spurion_item *it = t->row_items[i];
        spurion_bytes producer = it->call->kind == SPURION_CALL_TAP ? nothing : it->call->producer;
        if (t->rows[i].outcome != SPURION_ROW_STORED) { /* the intake looks before: only a replayed inbox comes here */
            spurion_stat_add(p, SPURION_STAT_CONFLICTS, 1);
            continue;
        }
        spurion_stat_add(p, SPURION_STAT_JUDGED, 1);
        spurion_stat_add(p, SPURION_STAT_TOKENS, (uint64_t)it->job.verdict.token_count);
        spurion_stat_add(p, SPURION_STAT_FLAGGED, it->job.verdict.flag_count > 0);
        spurion_steps_stored(p, it->job.verdict.run, producer, it->job.verdict.step);
    }
    for (int i = 0; i < t->count; i++) {
        spurion_stat_add(p, SPURION_STAT_REFUSED, t->items[i]->fate == SPURION_FATE_REFUSED);
    }
}

/* The items leave: those that waited for one of them come next turn. */
static void release_items(turn *t)
{
    for (int i = 0; i < t->count; i++) {
        spurion_item *it = t->items[i];
        if (it->entered) {
            it->entered = false;
            spurion_ingest_release_waiters(t->p, it, spurion_flights_leave(t->p->flights, &it->flight));
        }
        if (it->fate != SPURION_FATE_REFUSED) { /* a refusal's message may be read by Submit's answer */
            spurion_arena_fini(&it->job.arena);
        }
    }
}

static void answer_sync(turn *t, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_bytes body = nothing;
    spurion_sync_reply reply;
    spurion_status st;

    SPURION_TRY(st, spurion_producers_sync(&reply, NULL, t->p->producers, &m, &c->sync));
    SPURION_TRY(st, spurion_codec_encode_sync_reply(&body, &m, &reply));
out:
    spurion_service_answer(t->p, c, &st, body);
}

static void answer_step_end(turn *t, spurion_call *c)
{
    spurion_memory m = spurion_arena_memory(&c->arena);
    spurion_step_end_reply reply = {spurion_steps_told(t->p, &c->step_end)};
    spurion_bytes body = nothing;
    spurion_status st = spurion_codec_encode_step_end_reply(&body, &m, &reply);

    spurion_service_answer(t->p, c, &st, body);
}

static void answer_calls(turn *t, const spurion_bytes *bodies, const spurion_status *committed)
{
    int n = 0;

    for (spurion_call *c = t->done, *next; c != NULL; c = next, n++) {
        next = c->done_next;
        if (c->abandoned.code != SPURION_OK) {
            spurion_service_answer(t->p, c, &c->abandoned, nothing);
        } else if (committed->code != SPURION_OK) {
            spurion_service_answer(t->p, c, committed, nothing);
        } else if (c->kind == SPURION_CALL_SYNC) {
            answer_sync(t, c);
        } else if (c->kind == SPURION_CALL_STEP_END) {
            answer_step_end(t, c);
        } else {
            spurion_service_answer(t->p, c, committed, bodies[n]);
        }
    }
}

static void settle(turn *t)
{
    for (int32_t i = 0; i < t->batch.mark_count; i++) {
        spurion_word word;
        spurion_producers_settle(&word, t->p->producers, t->sources[i], t->source_pins[i]);
        spurion_steps_word(t->p, t->sources[i], &word);
    }
}

static void take_turn(turn *t)
{
    spurion_bytes *bodies;
    spurion_status st = spurion_ok();

    turn_begin(t);
    bodies = spurion_arena_take_array(&t->arena, (size_t)t->count + 1, sizeof *bodies);
    if (t->failed || bodies == NULL) {
        spurion_log_error("SINK-MEMORY", "no memory for a turn of %d rollouts", t->count);
        spurion_pipeline_fail(t->p, 71);
        return;
    }
    collect(t);
    make_bodies(t, bodies);
    if (t->failed) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "sink: no memory");
        spurion_pipeline_fail(t->p, 71);
    } else if (!is_empty(&t->batch)) {
        st = spurion_sink_commit(t->p, &t->batch);
    }
    if (st.code == SPURION_OK) {
        count_outcomes(t);
        spurion_sink_publish(t->p, &t->arena, t->alerts, t->stored, t->batch.alert_count);
        settle(t);
    }
    release_items(t);
    answer_calls(t, bodies, &st);
}

void *spurion_sink_main(void *arg)
{
    spurion_pipeline *p = arg;
    turn *t = calloc(1, sizeof *t);
    bool closed = false, ended = false;

    if (t == NULL) {
        spurion_pipeline_fail(p, 71);
        return NULL;
    }
    t->p = p;
    spurion_arena_init(&t->arena, 0);
    while (!ended && atomic_load(&p->failed) != 74) {
        spurion_node *node = spurion_queue_take(&closed, &p->sink, ITEMS_MAX, spurion_steps_next_ms(p));
        for (t->count = 0; node != NULL; node = node->next) {
            t->items[t->count++] = (spurion_item *)node;
        }
        if (t->count > 0) {
            int64_t judged = 0;
            for (int i = 0; i < t->count; i++) {
                judged += t->items[i]->judged;
            }
            pthread_rwlock_rdlock(&p->policy);
            take_turn(t);
            pthread_rwlock_unlock(&p->policy);
            atomic_fetch_sub(&p->judged, judged);
            spurion_arena_fini(&t->arena); /* turns differ much in size: what a large one took goes back */
        }
        ended = closed && t->count == 0; /* a turn may send those that waited for its rollouts here again */
        if (!ended) {
            pthread_rwlock_rdlock(&p->policy);
            spurion_steps_close_due(p);
            pthread_rwlock_unlock(&p->policy);
        }
    }
    spurion_arena_fini(&t->arena);
    free(t);
    return NULL;
}

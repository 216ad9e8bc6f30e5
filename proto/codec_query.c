/* Questions and their answers: Query, Get, Counts, Alerts. Thread: any. Memory: the caller's. */
#include "wire.h"

#include <math.h>
#include <string.h>

#define CURSOR_BYTES_MAX 1024

static spurion_status check_cursor(spurion_bytes cursor)
{
    if (cursor.size > CURSOR_BYTES_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "cursor: expected at most %d bytes, found %zu", CURSOR_BYTES_MAX, cursor.size);
    }
    return spurion_ok();
}

/* ---- Query ---- */

static spurion_status check_query(const spurion_query *q)
{
    spurion_status st;

    SPURION_TRY(st, spurion_name_check(q->run, "run"));
    SPURION_TRY(st, wire_optional_name(q->rule, "rule"));
    SPURION_TRY(st, wire_optional_name(q->feature_sae, "feature_sae"));
    SPURION_TRY(st, wire_optional_name(q->group, "group"));
    SPURION_TRY(st, check_cursor(q->cursor));
    if ((unsigned)q->order > SPURION_QUERY_BY_EFFECT) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "order: expected 0 to %d, found %u", SPURION_QUERY_BY_EFFECT, (unsigned)q->order);
    }
    if ((q->has_effect_min && isnan(q->effect_min)) || (q->has_effect_max && isnan(q->effect_max))) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "effect_min, effect_max: expected numbers, found NaN");
    }
    if (q->has_step_min && q->has_step_max && q->step_min > q->step_max) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "step_min: expected at most step_max %lld, found %lld", (long long)q->step_max,
                           (long long)q->step_min);
    }
out:
    return st;
}

spurion_status spurion_codec_encode_query(spurion_bytes *out, const spurion_memory *m, const spurion_query *in)
{
    Spurion__V1__QueryRequest r = SPURION__V1__QUERY_REQUEST__INIT;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, check_query(in));
    WIRE_SET_BYTES(&r, run, in->run);
    r.has_step_min = in->has_step_min;
    r.step_min = in->step_min;
    r.has_step_max = in->has_step_max;
    r.step_max = in->step_max;
    WIRE_SET_BYTES(&r, rule, in->rule);
    WIRE_SET_BYTES(&r, feature_sae, in->feature_sae);
    r.has_feature_index = in->feature_sae.data != NULL;
    r.feature_index = in->feature_index;
    r.has_effect_min = in->has_effect_min;
    r.effect_min = in->effect_min;
    r.has_effect_max = in->has_effect_max;
    r.effect_max = in->effect_max;
    r.has_time_min_ms = in->has_time_min;
    r.time_min_ms = in->time_min_ms;
    r.has_time_max_ms = in->has_time_max;
    r.time_max_ms = in->time_max_ms;
    WIRE_SET(&r, order, (uint32_t)in->order);
    WIRE_SET(&r, descending, in->descending);
    WIRE_SET(&r, limit, in->limit);
    WIRE_SET_BYTES(&r, cursor, in->cursor);
    WIRE_SET(&r, flagged, in->flagged);
    WIRE_SET_BYTES(&r, group, in->group);
    SPURION_TRY(st, wire_pack(out, &w, &r.base));
out:
    return st;
}

spurion_status spurion_codec_decode_query(spurion_query *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__query_request__descriptor, in));
    const Spurion__V1__QueryRequest *r = (const Spurion__V1__QueryRequest *)message;
    out->run = WIRE_GET_BYTES(r, run);
    out->has_step_min = r->has_step_min != 0;
    out->step_min = r->step_min;
    out->has_step_max = r->has_step_max != 0;
    out->step_max = r->step_max;
    out->rule = WIRE_GET_BYTES(r, rule);
    out->feature_sae = WIRE_GET_BYTES(r, feature_sae);
    out->feature_index = r->feature_index;
    out->has_effect_min = r->has_effect_min != 0;
    out->effect_min = r->effect_min;
    out->has_effect_max = r->has_effect_max != 0;
    out->effect_max = r->effect_max;
    out->has_time_min = r->has_time_min_ms != 0;
    out->time_min_ms = r->time_min_ms;
    out->has_time_max = r->has_time_max_ms != 0;
    out->time_max_ms = r->time_max_ms;
    out->order = (spurion_query_order)r->order;
    out->descending = r->descending != 0;
    out->limit = r->limit;
    out->cursor = WIRE_GET_BYTES(r, cursor);
    out->flagged = r->flagged != 0;
    out->group = WIRE_GET_BYTES(r, group);
    SPURION_TRY(st, check_query(out));
out:
    return st;
}

static void pack_optional(protobuf_c_boolean *has, float *value, spurion_opt_float in)
{
    *has = in.has;
    *value = in.value;
}

static spurion_opt_float unpack_optional(protobuf_c_boolean has, float value)
{
    spurion_opt_float o = {has != 0, has ? value : 0.0f};
    return o;
}

static void pack_row(Spurion__V1__Row *r, wire *w, const spurion_row *in)
{
    spurion__v1__row__init(r);
    WIRE_SET_BYTES(r, run, in->key.run);
    WIRE_SET(r, step, in->key.step);
    WIRE_SET_BYTES(r, group, in->key.group);
    WIRE_SET_BYTES(r, id, in->key.id);
    r->has_attempt = in->key.attempt != 0;
    r->attempt = in->key.attempt;
    WIRE_SET(r, reward, in->reward);
    WIRE_SET(r, counterfactual_reward, in->counterfactual_reward);
    WIRE_SET(r, effect, in->effect);
    pack_optional(&r->has_effect_sd, &r->effect_sd, in->effect_sd);
    pack_optional(&r->has_advantage, &r->advantage, in->advantage);
    pack_optional(&r->has_counterfactual_advantage, &r->counterfactual_advantage, in->counterfactual_advantage);
    WIRE_SET(r, advantage_flip, in->advantage_flip);
    r->n_rule = (size_t)in->rule_count;
    r->rule = wire_set_list(w, in->rules, r->n_rule);
    WIRE_SET(r, warnings, in->warnings);
    WIRE_SET(r, time_ms, in->time_ms);
    WIRE_SET(r, whole, in->whole);
    WIRE_SET(r, action, (uint32_t)in->action);
}

static void unpack_row(spurion_row *out, wire *w, const Spurion__V1__Row *r)
{
    out->key.run = WIRE_GET_BYTES(r, run);
    out->key.step = r->step;
    out->key.group = WIRE_GET_BYTES(r, group);
    out->key.id = WIRE_GET_BYTES(r, id);
    out->key.attempt = r->attempt;
    out->reward = r->reward;
    out->counterfactual_reward = r->counterfactual_reward;
    out->effect = r->effect;
    out->effect_sd = unpack_optional(r->has_effect_sd, r->effect_sd);
    out->advantage = unpack_optional(r->has_advantage, r->advantage);
    out->counterfactual_advantage = unpack_optional(r->has_counterfactual_advantage, r->counterfactual_advantage);
    out->advantage_flip = r->advantage_flip != 0;
    out->rules = wire_get_list(w, r->rule, r->n_rule);
    out->rule_count = (int32_t)r->n_rule;
    out->warnings = r->warnings;
    out->time_ms = r->time_ms;
    out->whole = r->whole != 0;
    out->action = r->action < SPURION_ACTION_COUNT ? (spurion_action)r->action : SPURION_ACTION_NONE;
}

spurion_status spurion_codec_encode_query_reply(spurion_bytes *out, const spurion_memory *m, const spurion_query_reply *in)
{
    Spurion__V1__QueryReply r = SPURION__V1__QUERY_REPLY__INIT;
    Spurion__V1__Row *rows;
    wire w;

    wire_init(&w, m);
    r.n_rows = (size_t)in->count;
    r.rows = WIRE_NEW(&w, Spurion__V1__Row *, in->count);
    rows = WIRE_NEW(&w, Spurion__V1__Row, in->count);
    for (int32_t i = 0; !w.failed && i < in->count; i++) {
        pack_row(&rows[i], &w, &in->rows[i]);
        r.rows[i] = &rows[i];
    }
    WIRE_SET_BYTES(&r, cursor, in->cursor);
    return wire_pack(out, &w, &r.base);
}

spurion_status spurion_codec_decode_query_reply(spurion_query_reply *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_row *rows;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__query_reply__descriptor, in));
    const Spurion__V1__QueryReply *r = (const Spurion__V1__QueryReply *)message;
    rows = WIRE_NEW(&w, spurion_row, r->n_rows);
    for (size_t i = 0; !w.failed && i < r->n_rows; i++) {
        unpack_row(&rows[i], &w, r->rows[i]);
    }
    if (w.failed) {
        return wire_no_memory(&w);
    }
    out->rows = rows;
    out->count = (int32_t)r->n_rows;
    out->cursor = WIRE_GET_BYTES(r, cursor);
out:
    return st;
}

/* ---- Get ---- */

static spurion_status check_identity(const spurion_key *i)
{
    spurion_status st;

    SPURION_TRY(st, spurion_name_check(i->run, "run"));
    SPURION_TRY(st, spurion_name_check(i->group, "group"));
    SPURION_TRY(st, spurion_name_check(i->id, "id"));
    if (i->step < 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "step: expected an integer >= 0, found %lld", (long long)i->step);
    }
out:
    return st;
}

spurion_status spurion_codec_encode_get(spurion_bytes *out, const spurion_memory *m, const spurion_key *in)
{
    Spurion__V1__GetRequest r = SPURION__V1__GET_REQUEST__INIT;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, check_identity(in));
    WIRE_SET_BYTES(&r, run, in->run);
    WIRE_SET(&r, step, in->step);
    WIRE_SET_BYTES(&r, group, in->group);
    WIRE_SET_BYTES(&r, id, in->id);
    WIRE_SET(&r, attempt, in->attempt);
    SPURION_TRY(st, wire_pack(out, &w, &r.base));
out:
    return st;
}

spurion_status spurion_codec_decode_get(spurion_key *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__get_request__descriptor, in));
    const Spurion__V1__GetRequest *r = (const Spurion__V1__GetRequest *)message;
    out->run = WIRE_GET_BYTES(r, run);
    out->step = r->has_step ? r->step : -1;
    out->group = WIRE_GET_BYTES(r, group);
    out->id = WIRE_GET_BYTES(r, id);
    out->attempt = r->attempt;
    SPURION_TRY(st, check_identity(out));
out:
    return st;
}

/* Alerts: the message of the alerts channel, and its replay. Thread: any. Memory: the caller's. */
#include "wire.h"

#include <string.h>

static spurion_status pack_alert(Spurion__V1__Alert **out, wire *w, const spurion_alert *a)
{
    Spurion__V1__Alert *r = WIRE_NEW(w, Spurion__V1__Alert, 1);
    size_t n = (size_t)a->worst_count;

    if (r == NULL) {
        return wire_no_memory(w);
    }
    spurion__v1__alert__init(r);
    WIRE_SET(r, epoch, a->epoch);
    WIRE_SET(r, seq, a->seq);
    WIRE_SET(r, kind, (Spurion__V1__AlertKind)a->kind);
    WIRE_SET_BYTES(r, run, a->run);
    WIRE_SET(r, step, a->step);
    WIRE_SET_BYTES(r, rule, a->rule);
    WIRE_SET(r, flagged, a->flagged);
    WIRE_SET(r, scored, a->scored);
    WIRE_SET(r, rate, a->rate);
    WIRE_SET(r, rate_lower, a->rate_lower);
    WIRE_SET(r, rate_upper, a->rate_upper);
    WIRE_SET(r, rate_max, a->rate_max);
    WIRE_SET(r, alpha, a->alpha);
    WIRE_SET(r, above, a->above);
    if (a->kind == SPURION_ALERT_KIND_RATE) {
        WIRE_SET(r, run_flagged, a->run_flagged);
        WIRE_SET(r, run_scored, a->run_scored);
        WIRE_SET(r, run_rate_lower, a->run_rate_lower);
        WIRE_SET(r, run_rate_upper, a->run_rate_upper);
        WIRE_SET(r, step_above, a->step_above);
    }
    r->n_worst_group = r->n_worst_id = r->n_worst_attempt = r->n_worst_effect = n;
    r->worst_group = WIRE_NEW(w, ProtobufCBinaryData, n);
    r->worst_id = WIRE_NEW(w, ProtobufCBinaryData, n);
    r->worst_attempt = WIRE_NEW(w, int32_t, n);
    r->worst_effect = WIRE_NEW(w, float, n);
    if (w->failed) {
        return wire_no_memory(w);
    }
    for (size_t i = 0; i < n; i++) {
        r->worst_group[i] = wire_bin(a->worst[i].group);
        r->worst_id[i] = wire_bin(a->worst[i].id);
        r->worst_attempt[i] = a->worst[i].attempt;
        r->worst_effect[i] = a->worst[i].effect;
    }
    WIRE_SET(r, time_ms, a->time_ms);
    if (a->kind == SPURION_ALERT_KIND_TRAINER_REWARD) {
        WIRE_SET(r, trainer_reward, a->trainer_reward);
        WIRE_SET(r, reward, a->reward);
    }
    WIRE_SET_BYTES(r, text, a->text);
    *out = r;
    return spurion_ok();
}

static spurion_status unpack_alert(spurion_alert *a, const Spurion__V1__Alert *r)
{
    spurion_status st;

    memset(a, 0, sizeof *a);
    if ((unsigned)r->kind > SPURION_ALERT_KIND_STORE) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "kind: expected 0 to %d, found %u", SPURION_ALERT_KIND_STORE, (unsigned)r->kind);
    }
    SPURION_TRY(st, wire_at_most("worst_group", r->n_worst_group, SPURION_ALERT_WORST_MAX));
    SPURION_TRY(st, wire_same("worst_id", r->n_worst_id, r->n_worst_group));
    SPURION_TRY(st, wire_same("worst_attempt", r->n_worst_attempt, r->n_worst_group));
    SPURION_TRY(st, wire_same("worst_effect", r->n_worst_effect, r->n_worst_group));
    a->epoch = r->epoch;
    a->seq = r->seq;
    a->kind = (spurion_alert_kind)r->kind;
    a->run = WIRE_GET_BYTES(r, run);
    a->step = r->step;
    a->rule = WIRE_GET_BYTES(r, rule);
    a->flagged = r->flagged;
    a->scored = r->scored;
    a->rate = r->rate;
    a->rate_lower = r->rate_lower;
    a->rate_upper = r->rate_upper;
    a->rate_max = r->rate_max;
    a->alpha = r->alpha;
    a->above = r->above != 0;
    a->run_flagged = r->run_flagged;
    a->run_scored = r->run_scored;
    a->run_rate_lower = r->run_rate_lower;
    a->run_rate_upper = r->run_rate_upper;
    a->step_above = r->step_above != 0;
    a->worst_count = (int32_t)r->n_worst_group;
    for (int32_t i = 0; i < a->worst_count; i++) {
        a->worst[i].group = wire_bytes(true, r->worst_group[i]);
        a->worst[i].id = wire_bytes(true, r->worst_id[i]);
        a->worst[i].attempt = r->worst_attempt[i];
        a->worst[i].effect = r->worst_effect[i];
    }
    a->time_ms = r->time_ms;
    a->trainer_reward = r->trainer_reward;
    a->reward = r->reward;
    a->text = WIRE_GET_BYTES(r, text);
out:
    return st;
}

spurion_status spurion_codec_encode_alert(spurion_bytes *out, const spurion_memory *m, const spurion_alert *in)
{
    Spurion__V1__Alert *r;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, pack_alert(&r, &w, in));
    SPURION_TRY(st, wire_pack(out, &w, &r->base));
    if (out->size > SPURION_ALERT_BYTES_MAX) {
        st = spurion_error(SPURION_OUT_OF_RANGE, "alert: expected at most %d bytes, found %zu", SPURION_ALERT_BYTES_MAX, out->size);
    }
out:
    return st;
}

spurion_status spurion_codec_decode_alert(spurion_alert *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__alert__descriptor, in));
    SPURION_TRY(st, unpack_alert(out, (const Spurion__V1__Alert *)message));
out:
    return st;
}

spurion_status spurion_codec_encode_alerts(spurion_bytes *out, const spurion_memory *m, const spurion_alerts *in)
{
    Spurion__V1__AlertsRequest r = SPURION__V1__ALERTS_REQUEST__INIT;
    wire w;

    wire_init(&w, m);
    WIRE_SET(&r, epoch, in->epoch);
    WIRE_SET(&r, from_seq, in->from_seq);
    WIRE_SET(&r, limit, in->limit);
    WIRE_SET_BYTES(&r, run, in->run);
    return wire_pack(out, &w, &r.base);
}

spurion_status spurion_codec_decode_alerts(spurion_alerts *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__alerts_request__descriptor, in));
    const Spurion__V1__AlertsRequest *r = (const Spurion__V1__AlertsRequest *)message;
    out->epoch = r->epoch;
    out->from_seq = r->from_seq;
    out->limit = r->limit;
    out->run = WIRE_GET_BYTES(r, run);
    SPURION_TRY(st, wire_optional_name(out->run, "run"));
out:
    return st;
}

spurion_status spurion_codec_encode_alerts_reply(spurion_bytes *out, const spurion_memory *m, const spurion_alerts_reply *in)
{
    Spurion__V1__AlertsReply r = SPURION__V1__ALERTS_REPLY__INIT;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    r.n_alerts = (size_t)in->count;
    r.alerts = WIRE_NEW(&w, Spurion__V1__Alert *, in->count);
    if (w.failed) {
        return wire_no_memory(&w);
    }
    for (int32_t i = 0; i < in->count; i++) {
        SPURION_TRY(st, pack_alert(&r.alerts[i], &w, &in->alerts[i]));
    }
    WIRE_SET(&r, epoch, in->epoch);
    WIRE_SET(&r, last_seq, in->last_seq);
    WIRE_SET(&r, next_seq, in->next_seq);
    SPURION_TRY(st, wire_pack(out, &w, &r.base));
out:
    return st;
}

spurion_status spurion_codec_decode_alerts_reply(spurion_alerts_reply *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_alert *alerts;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__alerts_reply__descriptor, in));
    const Spurion__V1__AlertsReply *r = (const Spurion__V1__AlertsReply *)message;
    alerts = WIRE_NEW(&w, spurion_alert, r->n_alerts);
    if (alerts == NULL) {
        return wire_no_memory(&w);
    }
    for (size_t i = 0; i < r->n_alerts; i++) {
        SPURION_TRY(st, unpack_alert(&alerts[i], r->alerts[i]));
    }
    out->alerts = alerts;
    out->count = (int32_t)r->n_alerts;
    out->epoch = r->epoch;
    out->last_seq = r->last_seq;
    out->next_seq = r->next_seq;
out:
    return st;
}

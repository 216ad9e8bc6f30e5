/* Counters and the list of runs. Thread: any. Memory: the caller's. */
#include "wire.h"

#include <string.h>

#define CURSOR_BYTES_MAX 1024

/* ---- Counts ---- */

static spurion_status check_counts(const spurion_counts *c)
{
    spurion_status st;

    SPURION_TRY(st, spurion_name_check(c->run, "run"));
    SPURION_TRY(st, wire_optional_name(c->rule, "rule"));
    SPURION_TRY(st, wire_optional_name(c->feature_sae, "feature_sae"));
    if ((unsigned)c->kind > SPURION_COUNTS_FEATURE) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "kind: expected 0 to %d, found %u", SPURION_COUNTS_FEATURE, (unsigned)c->kind);
    }
    if (c->cursor.size > CURSOR_BYTES_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "cursor: expected at most %d bytes, found %zu", CURSOR_BYTES_MAX, c->cursor.size);
    }
    if (!c->totals && ((c->kind == SPURION_COUNTS_RULE && c->rule.data == NULL) ||
                       (c->kind == SPURION_COUNTS_FEATURE && c->feature_sae.data == NULL))) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "kind: expected %s with it, or totals; found neither",
                           c->kind == SPURION_COUNTS_RULE ? "rule" : "feature_sae and feature_index");
    }
out:
    return st;
}

spurion_status spurion_codec_encode_counts(spurion_bytes *out, const spurion_memory *m, const spurion_counts *in)
{
    Spurion__V1__CountsRequest r = SPURION__V1__COUNTS_REQUEST__INIT;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, check_counts(in));
    WIRE_SET_BYTES(&r, run, in->run);
    WIRE_SET(&r, kind, (uint32_t)in->kind);
    WIRE_SET_BYTES(&r, rule, in->rule);
    WIRE_SET_BYTES(&r, feature_sae, in->feature_sae);
    r.has_feature_index = in->feature_sae.data != NULL;
    r.feature_index = in->feature_index;
    WIRE_SET(&r, totals, in->totals);
    r.has_step_min = in->has_step_min;
    r.step_min = in->step_min;
    r.has_step_max = in->has_step_max;
    r.step_max = in->step_max;
    WIRE_SET(&r, limit, in->limit);
    WIRE_SET_BYTES(&r, cursor, in->cursor);
    SPURION_TRY(st, wire_pack(out, &w, &r.base));
out:
    return st;
}

spurion_status spurion_codec_decode_counts(spurion_counts *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__counts_request__descriptor, in));
    const Spurion__V1__CountsRequest *r = (const Spurion__V1__CountsRequest *)message;
    out->run = WIRE_GET_BYTES(r, run);
    out->kind = (spurion_counts_kind)r->kind;
    out->rule = WIRE_GET_BYTES(r, rule);
    out->feature_sae = WIRE_GET_BYTES(r, feature_sae);
    out->feature_index = r->feature_index;
    out->totals = r->totals != 0;
    out->has_step_min = r->has_step_min != 0;
    out->step_min = r->step_min;
    out->has_step_max = r->has_step_max != 0;
    out->step_max = r->step_max;
    out->limit = r->limit;
    out->cursor = WIRE_GET_BYTES(r, cursor);
    SPURION_TRY(st, check_counts(out));
out:
    return st;
}

static spurion_status pack_kind(Spurion__V1__CountsReply *r, wire *w, const spurion_counts_reply *in)
{
    size_t n = (size_t)in->count;

    if (in->kind == SPURION_COUNTS_RULE) {
        r->rule = WIRE_NEW(w, ProtobufCBinaryData, n);
        for (r->n_rule = 0; !w->failed && r->n_rule < n; r->n_rule++) {
            r->rule[r->n_rule] = wire_bin(in->rows[r->n_rule].rule);
        }
    } else if (in->kind == SPURION_COUNTS_FEATURE) {
        r->feature_sae = WIRE_NEW(w, ProtobufCBinaryData, n);
        r->feature_index = WIRE_NEW(w, uint32_t, n);
        for (size_t i = 0; !w->failed && i < n; i++) {
            r->feature_sae[i] = wire_bin(in->rows[i].ref.sae);
            r->feature_index[i] = (uint32_t)in->rows[i].ref.index;
        }
        r->n_feature_sae = r->n_feature_index = n;
    } else {
        r->reward_sum = WIRE_NEW(w, double, n);
        r->reward_square_sum = WIRE_NEW(w, double, n);
        r->counterfactual_sum = WIRE_NEW(w, double, n);
        for (size_t i = 0; !w->failed && i < n; i++) {
            r->reward_sum[i] = in->rows[i].reward_sum;
            r->reward_square_sum[i] = in->rows[i].reward_square_sum;
            r->counterfactual_sum[i] = in->rows[i].counterfactual_sum;
        }
        r->n_reward_sum = r->n_reward_square_sum = r->n_counterfactual_sum = n;
    }
    return w->failed ? wire_no_memory(w) : spurion_ok();
}

spurion_status spurion_codec_encode_counts_reply(spurion_bytes *out, const spurion_memory *m, const spurion_counts_reply *in)
{
    Spurion__V1__CountsReply r = SPURION__V1__COUNTS_REPLY__INIT;
    size_t n = (size_t)in->count;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    r.step = WIRE_NEW(&w, int64_t, n);
    r.scored = WIRE_NEW(&w, uint64_t, n);
    r.flagged = WIRE_NEW(&w, uint64_t, n);
    r.effect_sum = WIRE_NEW(&w, double, n);
    SPURION_TRY(st, pack_kind(&r, &w, in));
    for (size_t i = 0; i < n; i++) {
        r.step[i] = in->rows[i].step;
        r.scored[i] = in->rows[i].scored;
        r.flagged[i] = in->rows[i].flagged;
        r.effect_sum[i] = in->rows[i].effect_sum;
    }
    r.n_step = r.n_scored = r.n_flagged = r.n_effect_sum = n;
    WIRE_SET_BYTES(&r, cursor, in->cursor);
    SPURION_TRY(st, wire_pack(out, &w, &r.base));
out:
    return st;
}

static spurion_status check_counts_reply(const Spurion__V1__CountsReply *r)
{
    size_t n = r->n_step;
    spurion_status st;

    SPURION_TRY(st, wire_same("rule", r->n_rule, r->n_rule != 0 ? n : 0));
    SPURION_TRY(st, wire_same("feature_sae", r->n_feature_sae, r->n_feature_sae != 0 ? n : 0));
    SPURION_TRY(st, wire_same("feature_index", r->n_feature_index, r->n_feature_sae));
    SPURION_TRY(st, wire_same("scored", r->n_scored, n));
    SPURION_TRY(st, wire_same("flagged", r->n_flagged, n));
    SPURION_TRY(st, wire_same("effect_sum", r->n_effect_sum, n));
    SPURION_TRY(st, wire_same("reward_sum", r->n_reward_sum, r->n_reward_sum != 0 ? n : 0));
    SPURION_TRY(st, wire_same("reward_square_sum", r->n_reward_square_sum, r->n_reward_sum));
    SPURION_TRY(st, wire_same("counterfactual_sum", r->n_counterfactual_sum, r->n_reward_sum));
out:
    return st;
}

static void unpack_counts_row(spurion_counts_row *row, const Spurion__V1__CountsReply *r, size_t i)
{
    row->step = r->step[i];
    row->scored = r->scored[i];
    row->flagged = r->flagged[i];
    row->effect_sum = r->effect_sum[i];
    if (r->n_rule != 0) {
        row->rule = wire_bytes(true, r->rule[i]);
    }
    if (r->n_feature_sae != 0) {
        row->ref.sae = wire_bytes(true, r->feature_sae[i]);
        row->ref.index = (int32_t)r->feature_index[i];
    }
    if (r->n_reward_sum != 0) {
        row->reward_sum = r->reward_sum[i];
        row->reward_square_sum = r->reward_square_sum[i];
        row->counterfactual_sum = r->counterfactual_sum[i];
    }
}

spurion_status spurion_codec_decode_counts_reply(spurion_counts_reply *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_counts_row *rows;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__counts_reply__descriptor, in));
    const Spurion__V1__CountsReply *r = (const Spurion__V1__CountsReply *)message;
    SPURION_TRY(st, check_counts_reply(r));
    rows = WIRE_NEW(&w, spurion_counts_row, r->n_step);
    if (rows == NULL) {
        return wire_no_memory(&w);
    }
    for (size_t i = 0; i < r->n_step; i++) {
        unpack_counts_row(&rows[i], r, i);
    }
    out->kind = r->n_rule != 0 ? SPURION_COUNTS_RULE : r->n_feature_sae != 0 ? SPURION_COUNTS_FEATURE : SPURION_COUNTS_STEP;
    out->rows = rows;
    out->count = (int32_t)r->n_step;
    out->cursor = WIRE_GET_BYTES(r, cursor);
out:
    return st;
}

/* ---- Runs ---- */

spurion_status spurion_codec_encode_runs(spurion_bytes *out, const spurion_memory *m, const spurion_runs *in)
{
    Spurion__V1__RunsRequest r = SPURION__V1__RUNS_REQUEST__INIT;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, wire_optional_name(in->after, "after"));
    WIRE_SET_BYTES(&r, after, in->after);
    WIRE_SET(&r, limit, in->limit);
    SPURION_TRY(st, wire_pack(out, &w, &r.base));
out:
    return st;
}

spurion_status spurion_codec_decode_runs(spurion_runs *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__runs_request__descriptor, in));
    const Spurion__V1__RunsRequest *r = (const Spurion__V1__RunsRequest *)message;
    out->after = WIRE_GET_BYTES(r, after);
    out->limit = r->limit;
    SPURION_TRY(st, wire_optional_name(out->after, "after"));
out:
    return st;
}

spurion_status spurion_codec_encode_runs_reply(spurion_bytes *out, const spurion_memory *m, const spurion_runs_reply *in)
{
    Spurion__V1__RunsReply r = SPURION__V1__RUNS_REPLY__INIT;
    size_t n = (size_t)in->count;
    wire w;

    wire_init(&w, m);
    r.n_run = r.n_first_ms = r.n_last_ms = r.n_step_min = r.n_step_max = r.n_rollouts = r.n_flagged = n;
    r.run = WIRE_NEW(&w, ProtobufCBinaryData, n);
    r.first_ms = WIRE_NEW(&w, int64_t, n);
    r.last_ms = WIRE_NEW(&w, int64_t, n);
    r.step_min = WIRE_NEW(&w, int64_t, n);
    r.step_max = WIRE_NEW(&w, int64_t, n);
    r.rollouts = WIRE_NEW(&w, uint64_t, n);
    r.flagged = WIRE_NEW(&w, uint64_t, n);
    for (size_t i = 0; !w.failed && i < n; i++) {
        r.run[i] = wire_bin(in->rows[i].run);
        r.first_ms[i] = in->rows[i].first_ms;
        r.last_ms[i] = in->rows[i].last_ms;
        r.step_min[i] = in->rows[i].step_min;
        r.step_max[i] = in->rows[i].step_max;
        r.rollouts[i] = in->rows[i].rollouts;
        r.flagged[i] = in->rows[i].flagged;
    }
    WIRE_SET(&r, more, in->more);
    return wire_pack(out, &w, &r.base);
}

spurion_status spurion_codec_decode_runs_reply(spurion_runs_reply *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_run_row *rows;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__runs_reply__descriptor, in));
    const Spurion__V1__RunsReply *r = (const Spurion__V1__RunsReply *)message;
    SPURION_TRY(st, wire_same("first_ms", r->n_first_ms, r->n_run));
    SPURION_TRY(st, wire_same("last_ms", r->n_last_ms, r->n_run));
    SPURION_TRY(st, wire_same("step_min", r->n_step_min, r->n_run));
    SPURION_TRY(st, wire_same("step_max", r->n_step_max, r->n_run));
    SPURION_TRY(st, wire_same("rollouts", r->n_rollouts, r->n_run));
    SPURION_TRY(st, wire_same("flagged", r->n_flagged, r->n_run));
    rows = WIRE_NEW(&w, spurion_run_row, r->n_run);
    if (rows == NULL) {
        return wire_no_memory(&w);
    }
    for (size_t i = 0; i < r->n_run; i++) {
        rows[i].run = wire_bytes(true, r->run[i]);
        rows[i].first_ms = r->first_ms[i];
        rows[i].last_ms = r->last_ms[i];
        rows[i].step_min = r->step_min[i];
        rows[i].step_max = r->step_max[i];
        rows[i].rollouts = r->rollouts[i];
        rows[i].flagged = r->flagged[i];
    }
    out->rows = rows;
    out->count = (int32_t)r->n_run;
    out->more = r->more != 0;
out:
    return st;
}

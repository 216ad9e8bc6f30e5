/* What the daemon says about itself: Status, Catalogue, Rules. Thread: any. Memory: the caller's. */
#include "wire.h"

#include <string.h>

static const char *const verdict_names[] = {"unknown", "spurious", "intended"};

/* ---- Status ---- */

static void pack_flights(Spurion__V1__StatusReply *r, wire *w, const spurion_flight *flights, size_t n)
{
    r->n_flight_run = r->n_flight_step = r->n_flight_group = r->n_flight_id = r->n_flight_stage = r->n_flight_age_ms = n;
    r->flight_run = WIRE_NEW(w, ProtobufCBinaryData, n);
    r->flight_step = WIRE_NEW(w, int64_t, n);
    r->flight_group = WIRE_NEW(w, ProtobufCBinaryData, n);
    r->flight_id = WIRE_NEW(w, ProtobufCBinaryData, n);
    r->flight_stage = WIRE_NEW(w, ProtobufCBinaryData, n);
    r->flight_age_ms = WIRE_NEW(w, uint64_t, n);
    for (size_t i = 0; !w->failed && i < n; i++) {
        r->flight_run[i] = wire_bin(flights[i].run);
        r->flight_step[i] = flights[i].step;
        r->flight_group[i] = wire_bin(flights[i].group);
        r->flight_id[i] = wire_bin(flights[i].id);
        r->flight_stage[i] = wire_bin(flights[i].stage);
        r->flight_age_ms[i] = flights[i].age_ms;
    }
}

static void pack_producers(Spurion__V1__StatusReply *r, wire *w, const spurion_producer_status *producers, size_t n)
{
    r->n_producer_run = r->n_producer = r->n_producer_epoch = r->n_producer_stored = n;
    r->n_producer_highest = r->n_producer_missing = r->n_producer_lost = n;
    r->producer_run = WIRE_NEW(w, ProtobufCBinaryData, n);
    r->producer = WIRE_NEW(w, ProtobufCBinaryData, n);
    r->producer_epoch = WIRE_NEW(w, uint64_t, n);
    r->producer_stored = WIRE_NEW(w, uint64_t, n);
    r->producer_highest = WIRE_NEW(w, uint64_t, n);
    r->producer_missing = WIRE_NEW(w, uint64_t, n);
    r->producer_lost = WIRE_NEW(w, uint64_t, n);
    for (size_t i = 0; !w->failed && i < n; i++) {
        r->producer_run[i] = wire_bin(producers[i].run);
        r->producer[i] = wire_bin(producers[i].producer);
        r->producer_epoch[i] = producers[i].epoch;
        r->producer_stored[i] = producers[i].stored;
        r->producer_highest[i] = producers[i].highest;
        r->producer_missing[i] = producers[i].missing;
        r->producer_lost[i] = producers[i].lost;
    }
}

spurion_status spurion_codec_encode_status_reply(spurion_bytes *out, const spurion_memory *m, const spurion_status_reply *in)
{
    Spurion__V1__StatusReply r = SPURION__V1__STATUS_REPLY__INIT;
    wire w;

    wire_init(&w, m);
    WIRE_SET_BYTES(&r, version, in->version);
    WIRE_SET_BYTES(&r, provenance, in->provenance);
    WIRE_SET(&r, uptime_ms, in->uptime_ms);
    WIRE_SET(&r, ready, in->ready);
    WIRE_SET_BYTES(&r, state, in->state);
    WIRE_SET(&r, queue_bytes, in->queue_bytes);
    WIRE_SET(&r, queue_bytes_max, in->queue_bytes_max);
    WIRE_SET(&r, in_flight, in->in_flight);
    WIRE_SET_BYTES(&r, engine, in->engine);
    r.n_counter_name = r.n_counter_value = (size_t)in->counter_count;
    r.counter_name = WIRE_NEW(&w, ProtobufCBinaryData, in->counter_count);
    r.counter_value = WIRE_NEW(&w, uint64_t, in->counter_count);
    for (int32_t i = 0; !w.failed && i < in->counter_count; i++) {
        r.counter_name[i] = wire_bin(in->counters[i].name);
        r.counter_value[i] = in->counters[i].value;
    }
    pack_flights(&r, &w, in->flights, (size_t)in->flight_count);
    pack_producers(&r, &w, in->producers, (size_t)in->producer_count);
    return wire_pack(out, &w, &r.base);
}

static spurion_status unpack_flights(spurion_status_reply *out, wire *w, const Spurion__V1__StatusReply *r)
{
    size_t n = r->n_flight_run;
    spurion_flight *flights;
    spurion_status st;

    SPURION_TRY(st, wire_same("flight_step", r->n_flight_step, n));
    SPURION_TRY(st, wire_same("flight_group", r->n_flight_group, n));
    SPURION_TRY(st, wire_same("flight_id", r->n_flight_id, n));
    SPURION_TRY(st, wire_same("flight_stage", r->n_flight_stage, n));
    SPURION_TRY(st, wire_same("flight_age_ms", r->n_flight_age_ms, n));
    flights = WIRE_NEW(w, spurion_flight, n);
    if (flights == NULL) {
        return wire_no_memory(w);
    }
    for (size_t i = 0; i < n; i++) {
        flights[i].run = wire_bytes(true, r->flight_run[i]);
        flights[i].step = r->flight_step[i];
        flights[i].group = wire_bytes(true, r->flight_group[i]);
        flights[i].id = wire_bytes(true, r->flight_id[i]);
        flights[i].stage = wire_bytes(true, r->flight_stage[i]);
        flights[i].age_ms = r->flight_age_ms[i];
    }
    out->flights = flights;
    out->flight_count = (int32_t)n;
out:
    return st;
}

static spurion_status unpack_producers(spurion_status_reply *out, wire *w, const Spurion__V1__StatusReply *r)
{
    size_t n = r->n_producer_run;
    spurion_producer_status *producers;
    spurion_status st;

    SPURION_TRY(st, wire_same("producer", r->n_producer, n));
    SPURION_TRY(st, wire_same("producer_epoch", r->n_producer_epoch, n));
    SPURION_TRY(st, wire_same("producer_stored", r->n_producer_stored, n));
    SPURION_TRY(st, wire_same("producer_highest", r->n_producer_highest, n));
    SPURION_TRY(st, wire_same("producer_missing", r->n_producer_missing, n));
    SPURION_TRY(st, wire_same("producer_lost", r->n_producer_lost, n));
    producers = WIRE_NEW(w, spurion_producer_status, n);
    if (producers == NULL) {
        return wire_no_memory(w);
    }
    for (size_t i = 0; i < n; i++) {
        producers[i].run = wire_bytes(true, r->producer_run[i]);
        producers[i].producer = wire_bytes(true, r->producer[i]);
        producers[i].epoch = r->producer_epoch[i];
        producers[i].stored = r->producer_stored[i];
        producers[i].highest = r->producer_highest[i];
        producers[i].missing = r->producer_missing[i];
        producers[i].lost = r->producer_lost[i];
    }
    out->producers = producers;
    out->producer_count = (int32_t)n;
out:
    return st;
}

spurion_status spurion_codec_decode_status_reply(spurion_status_reply *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_counter *counters;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__status_reply__descriptor, in));
    const Spurion__V1__StatusReply *r = (const Spurion__V1__StatusReply *)message;
    SPURION_TRY(st, wire_same("counter_value", r->n_counter_value, r->n_counter_name));
    out->version = WIRE_GET_BYTES(r, version);
    out->provenance = WIRE_GET_BYTES(r, provenance);
    out->uptime_ms = r->uptime_ms;
    out->ready = r->ready != 0;
    out->state = WIRE_GET_BYTES(r, state);
    out->queue_bytes = r->queue_bytes;
    out->queue_bytes_max = r->queue_bytes_max;
    out->in_flight = r->in_flight;
    out->engine = WIRE_GET_BYTES(r, engine);
    counters = WIRE_NEW(&w, spurion_counter, r->n_counter_name);
    if (counters == NULL) {
        return wire_no_memory(&w);
    }
    for (size_t i = 0; i < r->n_counter_name; i++) {
        counters[i].name = wire_bytes(true, r->counter_name[i]);
        counters[i].value = r->counter_value[i];
    }
    out->counters = counters;
    out->counter_count = (int32_t)r->n_counter_name;
    SPURION_TRY(st, unpack_flights(out, &w, r));
    SPURION_TRY(st, unpack_producers(out, &w, r));
out:
    return st;
}

/* ---- Catalogue ---- */

spurion_status spurion_codec_encode_catalogue(spurion_bytes *out, const spurion_memory *m, const spurion_page *in)
{
    Spurion__V1__CatalogueRequest r = SPURION__V1__CATALOGUE_REQUEST__INIT;
    wire w;

    wire_init(&w, m);
    WIRE_SET(&r, from, in->from);
    WIRE_SET(&r, limit, in->limit);
    return wire_pack(out, &w, &r.base);
}

spurion_status spurion_codec_decode_catalogue(spurion_page *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__catalogue_request__descriptor, in));
    out->from = ((const Spurion__V1__CatalogueRequest *)message)->from;
    out->limit = ((const Spurion__V1__CatalogueRequest *)message)->limit;
out:
    return st;
}

/* Place of name in a table of distinct names that grows by it; the table has room for it. */
static uint32_t name_place(ProtobufCBinaryData *table, size_t *n, spurion_bytes name)
{
    for (size_t i = 0; i < *n; i++) {
        if (table[i].len == name.size && memcmp(table[i].data, name.data, name.size) == 0) {
            return (uint32_t)i;
        }
    }
    table[*n] = wire_bin(name);
    return (uint32_t)(*n)++;
}

static uint32_t verdict_place(spurion_bytes name)
{
    for (uint32_t i = 1; i < 3; i++) {
        if (name.size == strlen(verdict_names[i]) && memcmp(name.data, verdict_names[i], name.size) == 0) {
            return i;
        }
    }
    return 0;
}

spurion_status spurion_codec_encode_catalogue_reply(spurion_bytes *out, const spurion_memory *m, const spurion_catalogue_reply *in)
{
    Spurion__V1__CatalogueReply r = SPURION__V1__CATALOGUE_REPLY__INIT;
    size_t n = (size_t)in->count, families = 0;
    wire w;

    wire_init(&w, m);
    for (size_t i = 0; i < n; i++) {
        families += (size_t)in->rows[i].family_count;
    }
    r.n_feature_sae = r.n_feature_index = r.n_label = r.n_verdict = r.n_role = r.n_activation_min = r.n_family_count = n;
    r.sae = WIRE_NEW(&w, ProtobufCBinaryData, n);
    r.feature_sae = WIRE_NEW(&w, uint32_t, n);
    r.feature_index = WIRE_NEW(&w, uint32_t, n);
    r.label = WIRE_NEW(&w, ProtobufCBinaryData, n);
    r.verdict = WIRE_NEW(&w, uint32_t, n);
    r.role = WIRE_NEW(&w, uint32_t, n);
    r.activation_min = WIRE_NEW(&w, float, n);
    r.family_count = WIRE_NEW(&w, uint32_t, n);
    r.family = WIRE_NEW(&w, uint32_t, families);
    r.family_name = WIRE_NEW(&w, ProtobufCBinaryData, families);
    WIRE_SET(&r, total, in->total);
    for (size_t i = 0; !w.failed && i < n; i++) {
        const spurion_catalogue_row *row = &in->rows[i];
        r.feature_sae[i] = name_place(r.sae, &r.n_sae, row->ref.sae);
        r.feature_index[i] = (uint32_t)row->ref.index;
        r.label[i] = wire_bin(row->label);
        r.verdict[i] = verdict_place(row->verdict);
        r.role[i] = row->role;
        r.activation_min[i] = row->activation_min;
        r.family_count[i] = (uint32_t)row->family_count;
        for (int32_t k = 0; k < row->family_count; k++) {
            r.family[r.n_family++] = name_place(r.family_name, &r.n_family_name, row->families[k]);
        }
    }
    return wire_pack(out, &w, &r.base);
}

static spurion_status check_catalogue(const Spurion__V1__CatalogueReply *r)
{
    size_t n = r->n_feature_sae, families = 0;
    spurion_status st;

    SPURION_TRY(st, wire_same("feature_index", r->n_feature_index, n));
    SPURION_TRY(st, wire_same("label", r->n_label, n));
    SPURION_TRY(st, wire_same("verdict", r->n_verdict, n));
    SPURION_TRY(st, wire_same("role", r->n_role, n));
    SPURION_TRY(st, wire_same("activation_min", r->n_activation_min, n));
    SPURION_TRY(st, wire_same("family_count", r->n_family_count, n));
    for (size_t i = 0; i < n; i++) {
        if (r->feature_sae[i] >= r->n_sae || r->verdict[i] > 2 || r->role[i] > 3) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "CatalogueReply: expected known sae, verdict and role, found others at %zu", i);
        }
        families += r->family_count[i];
    }
    SPURION_TRY(st, wire_same("family", r->n_family, families));
    for (size_t i = 0; i < r->n_family; i++) {
        if (r->family[i] >= r->n_family_name) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "family: expected places below %zu, found %u", r->n_family_name, r->family[i]);
        }
    }
out:
    return st;
}

spurion_status spurion_codec_decode_catalogue_reply(spurion_catalogue_reply *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_catalogue_row *rows;
    spurion_bytes *families;
    size_t at = 0;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__catalogue_reply__descriptor, in));
    const Spurion__V1__CatalogueReply *r = (const Spurion__V1__CatalogueReply *)message;
    SPURION_TRY(st, check_catalogue(r));
    rows = WIRE_NEW(&w, spurion_catalogue_row, r->n_feature_sae);
    families = WIRE_NEW(&w, spurion_bytes, r->n_family);
    if (w.failed) {
        return wire_no_memory(&w);
    }
    for (size_t i = 0; i < r->n_family; i++) {
        families[i] = wire_bytes(true, r->family_name[r->family[i]]);
    }
    for (size_t i = 0; i < r->n_feature_sae; i++) {
        rows[i].ref.sae = wire_bytes(true, r->sae[r->feature_sae[i]]);
        rows[i].ref.index = (int32_t)r->feature_index[i];
        rows[i].label = wire_bytes(true, r->label[i]);
        rows[i].verdict = spurion_bytes_of(verdict_names[r->verdict[i]]);
        rows[i].role = r->role[i];
        rows[i].activation_min = r->activation_min[i];
        rows[i].families = families + at;
        rows[i].family_count = (int32_t)r->family_count[i];
        at += r->family_count[i];
    }
    out->total = r->total;
    out->rows = rows;
    out->count = (int32_t)r->n_feature_sae;
out:
    return st;
}

/* ---- Rules ---- */

spurion_status spurion_codec_encode_rules_reply(spurion_bytes *out, const spurion_memory *m, const spurion_rules_reply *in)
{
    Spurion__V1__RulesReply r = SPURION__V1__RULES_REPLY__INIT;
    size_t n = (size_t)in->count, families = 0;
    wire w;

    wire_init(&w, m);
    for (size_t i = 0; i < n; i++) {
        families += (size_t)in->rows[i].family_count;
    }
    r.n_id = r.n_direction = r.n_effect_min = r.n_effect_sd_min = r.n_advantage_flip = r.n_alert = n;
    r.n_rate_max = r.n_alpha = r.n_family_count = r.n_action = r.n_weight = n;
    r.id = WIRE_NEW(&w, ProtobufCBinaryData, n);
    r.direction = WIRE_NEW(&w, uint32_t, n);
    r.effect_min = WIRE_NEW(&w, float, n);
    r.effect_sd_min = WIRE_NEW(&w, float, n);
    r.advantage_flip = WIRE_NEW(&w, protobuf_c_boolean, n);
    r.alert = WIRE_NEW(&w, uint32_t, n);
    r.rate_max = WIRE_NEW(&w, float, n);
    r.alpha = WIRE_NEW(&w, float, n);
    r.action = WIRE_NEW(&w, uint32_t, n);
    r.weight = WIRE_NEW(&w, float, n);
    r.family_count = WIRE_NEW(&w, uint32_t, n);
    r.family = WIRE_NEW(&w, ProtobufCBinaryData, families);
    for (size_t i = 0; !w.failed && i < n; i++) {
        const spurion_rule_row *row = &in->rows[i];
        r.id[i] = wire_bin(row->id);
        r.direction[i] = row->direction;
        r.effect_min[i] = wire_to_nan(row->effect_min);
        r.effect_sd_min[i] = wire_to_nan(row->effect_sd_min);
        r.advantage_flip[i] = row->advantage_flip;
        r.alert[i] = row->alert;
        r.rate_max[i] = row->rate_max;
        r.alpha[i] = row->alpha;
        r.action[i] = (uint32_t)row->action;
        r.weight[i] = row->weight;
        r.family_count[i] = (uint32_t)row->family_count;
        for (int32_t k = 0; k < row->family_count; k++) {
            r.family[r.n_family++] = wire_bin(row->families[k]);
        }
    }
    return wire_pack(out, &w, &r.base);
}

static spurion_status check_rules(const Spurion__V1__RulesReply *r)
{
    size_t n = r->n_id, families = 0;
    spurion_status st;

    SPURION_TRY(st, wire_at_most("id", n, SPURION_RULES_MAX));
    SPURION_TRY(st, wire_same("direction", r->n_direction, n));
    SPURION_TRY(st, wire_same("effect_min", r->n_effect_min, n));
    SPURION_TRY(st, wire_same("effect_sd_min", r->n_effect_sd_min, n));
    SPURION_TRY(st, wire_same("advantage_flip", r->n_advantage_flip, n));
    SPURION_TRY(st, wire_same("alert", r->n_alert, n));
    SPURION_TRY(st, wire_same("rate_max", r->n_rate_max, n));
    SPURION_TRY(st, wire_same("alpha", r->n_alpha, n));
    SPURION_TRY(st, wire_same("family_count", r->n_family_count, n));
    SPURION_TRY(st, wire_same("action", r->n_action, r->n_action == 0 ? 0 : n));
    SPURION_TRY(st, wire_same("weight", r->n_weight, r->n_action));
    for (size_t i = 0; i < n; i++) {
        if (r->direction[i] > 2 || r->alert[i] > 2 || (r->n_action > 0 && r->action[i] >= SPURION_ACTION_COUNT)) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "RulesReply: expected known direction, alert and action, found others at %zu", i);
        }
        families += r->family_count[i];
    }
    SPURION_TRY(st, wire_same("family", r->n_family, families));
out:
    return st;
}

spurion_status spurion_codec_decode_rules_reply(spurion_rules_reply *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_rule_row *rows;
    spurion_bytes *families;
    size_t at = 0;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__rules_reply__descriptor, in));
    const Spurion__V1__RulesReply *r = (const Spurion__V1__RulesReply *)message;
    SPURION_TRY(st, check_rules(r));
    rows = WIRE_NEW(&w, spurion_rule_row, r->n_id);
    families = wire_get_list(&w, r->family, r->n_family);
    if (w.failed) {
        return wire_no_memory(&w);
    }
    for (size_t i = 0; i < r->n_id; i++) {
        rows[i].id = wire_bytes(true, r->id[i]);
        rows[i].direction = r->direction[i];
        rows[i].effect_min = wire_from_nan(r->effect_min[i]);
        rows[i].effect_sd_min = wire_from_nan(r->effect_sd_min[i]);
        rows[i].advantage_flip = r->advantage_flip[i] != 0;
        rows[i].alert = r->alert[i];
        rows[i].rate_max = r->rate_max[i];
        rows[i].alpha = r->alpha[i];
        rows[i].action = r->n_action > 0 ? (spurion_action)r->action[i] : SPURION_ACTION_ALERT;
        rows[i].weight = r->n_action > 0 ? r->weight[i] : 1.0f;
        rows[i].families = families + at;
        rows[i].family_count = (int32_t)r->family_count[i];
        at += r->family_count[i];
    }
    out->rows = rows;
    out->count = (int32_t)r->n_id;
out:
    return st;
}

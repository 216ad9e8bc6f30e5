/* Envelope, Hello, and the bookkeeping of the tap (Fill, Sync, StepEnd). Thread: any. Memory: the caller's. */
#include "wire.h"

/* ---- Request, Reply ---- */

static spurion_status check_request(const spurion_request *r)
{
    spurion_status st;

    SPURION_TRY(st, wire_at_most("metadata", (size_t)r->metadata_count, SPURION_METADATA_MAX));
    if (r->method.data == NULL || r->method.size > SPURION_NAME_BYTES_MAX ||
        spurion_utf8_valid_prefix(r->method.data, r->method.size) != r->method.size) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "method: expected a path such as " SPURION_METHOD_PREFIX "Score, found %s",
                             r->method.data == NULL ? "none" : "no such text");
    }
    if (r->idempotency_key.size > SPURION_IDEMPOTENCY_KEY_BYTES_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "idempotency_key: expected at most %d bytes, found %zu",
                             SPURION_IDEMPOTENCY_KEY_BYTES_MAX, r->idempotency_key.size);
    }
    if (r->page_token.size > SPURION_NAME_BYTES_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "page_token: expected at most %d bytes, found %zu", SPURION_NAME_BYTES_MAX,
                             r->page_token.size);
    }
out:
    return st;
}

spurion_status spurion_codec_encode_request(spurion_bytes *out, const spurion_memory *m, const spurion_request *in)
{
    Spurion__V1__Request r = SPURION__V1__REQUEST__INIT;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, check_request(in));
    WIRE_SET(&r, call_id, in->call_id);
    WIRE_SET_BYTES(&r, method, in->method);
    WIRE_SET(&r, timeout_ms, in->timeout_ms);
    r.n_metadata_key = r.n_metadata_value = (size_t)in->metadata_count;
    r.metadata_key = wire_set_list(&w, in->metadata_keys, r.n_metadata_key);
    r.metadata_value = wire_set_list(&w, in->metadata_values, r.n_metadata_value);
    WIRE_SET_BYTES(&r, idempotency_key, in->idempotency_key);
    WIRE_SET_BYTES(&r, body, in->body);
    WIRE_SET_BYTES(&r, page_token, in->page_token);
    SPURION_TRY(st, wire_pack(out, &w, &r.base));
out:
    return st;
}

spurion_status spurion_codec_decode_request(spurion_request *out, const spurion_memory *m, spurion_bytes in)
{
    static const spurion_request empty;
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    *out = empty;
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__request__descriptor, in));
    const Spurion__V1__Request *r = (const Spurion__V1__Request *)message;
    SPURION_TRY(st, wire_same("metadata_value", r->n_metadata_value, r->n_metadata_key));
    SPURION_TRY(st, wire_at_most("metadata", r->n_metadata_key, SPURION_METADATA_MAX));
    out->call_id = r->call_id;
    out->method = WIRE_GET_BYTES(r, method);
    out->timeout_ms = r->timeout_ms;
    out->metadata_keys = wire_get_list(&w, r->metadata_key, r->n_metadata_key);
    out->metadata_values = wire_get_list(&w, r->metadata_value, r->n_metadata_value);
    out->metadata_count = (int32_t)r->n_metadata_key;
    out->idempotency_key = WIRE_GET_BYTES(r, idempotency_key);
    out->body = WIRE_GET_BYTES(r, body);
    out->page_token = WIRE_GET_BYTES(r, page_token);
    SPURION_TRY(st, w.failed ? wire_no_memory(&w) : check_request(out));
out:
    return st;
}

spurion_status spurion_codec_encode_reply(spurion_bytes *out, const spurion_memory *m, const spurion_reply *in)
{
    Spurion__V1__Reply r = SPURION__V1__REPLY__INIT;
    wire w;

    wire_init(&w, m);
    WIRE_SET(&r, call_id, in->call_id);
    WIRE_SET(&r, code, (uint32_t)in->code);
    WIRE_SET_BYTES(&r, message, in->message);
    r.has_retry_after_ms = in->retry_after_ms != 0;
    r.retry_after_ms = in->retry_after_ms;
    WIRE_SET_BYTES(&r, body, in->body);
    WIRE_SET_BYTES(&r, next_page_token, in->next_page_token);
    return wire_pack(out, &w, &r.base);
}

spurion_status spurion_codec_decode_reply(spurion_reply *out, const spurion_memory *m, spurion_bytes in)
{
    static const spurion_reply empty;
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    *out = empty;
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__reply__descriptor, in));
    const Spurion__V1__Reply *r = (const Spurion__V1__Reply *)message;
    if (r->code >= SPURION_CODE_COUNT) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "Reply.code: expected 0 to %d, found %u", SPURION_CODE_COUNT - 1, r->code);
    }
    out->call_id = r->call_id;
    out->code = (int)r->code;
    out->message = WIRE_GET_BYTES(r, message);
    out->retry_after_ms = r->retry_after_ms;
    out->body = WIRE_GET_BYTES(r, body);
    out->next_page_token = WIRE_GET_BYTES(r, next_page_token);
out:
    return st;
}

/* ---- Hello ---- */

spurion_status spurion_codec_encode_hello(spurion_bytes *out, const spurion_memory *m, const spurion_hello *in)
{
    Spurion__V1__HelloRequest r = SPURION__V1__HELLO_REQUEST__INIT;
    wire w;

    wire_init(&w, m);
    WIRE_SET(&r, proto_min, in->proto_min);
    WIRE_SET(&r, proto_max, in->proto_max);
    WIRE_SET_BYTES(&r, client_version, in->client_version);
    return wire_pack(out, &w, &r.base);
}

spurion_status spurion_codec_decode_hello(spurion_hello *out, const spurion_memory *m, spurion_bytes in)
{
    static const spurion_hello empty;
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    *out = empty;
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__hello_request__descriptor, in));
    const Spurion__V1__HelloRequest *r = (const Spurion__V1__HelloRequest *)message;
    out->proto_min = r->proto_min;
    out->proto_max = r->proto_max;
    out->client_version = WIRE_GET_BYTES(r, client_version);
    SPURION_TRY(st, wire_optional_name(out->client_version, "client_version"));
out:
    return st;
}

spurion_status spurion_codec_encode_hello_reply(spurion_bytes *out, const spurion_memory *m, const spurion_hello_reply *in)
{
    Spurion__V1__HelloReply r = SPURION__V1__HELLO_REPLY__INIT;
    wire w;

    wire_init(&w, m);
    WIRE_SET(&r, proto, in->proto);
    WIRE_SET_BYTES(&r, server_version, in->server_version);
    WIRE_SET(&r, epoch, in->epoch);
    WIRE_SET_BYTES(&r, provenance, in->provenance);
    WIRE_SET(&r, frame_bytes_max, in->frame_bytes_max);
    WIRE_SET(&r, reply_bytes_max, in->reply_bytes_max);
    return wire_pack(out, &w, &r.base);
}

spurion_status spurion_codec_decode_hello_reply(spurion_hello_reply *out, const spurion_memory *m, spurion_bytes in)
{
    static const spurion_hello_reply empty;
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    *out = empty;
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__hello_reply__descriptor, in));
    const Spurion__V1__HelloReply *r = (const Spurion__V1__HelloReply *)message;
    out->proto = r->proto;
    out->server_version = WIRE_GET_BYTES(r, server_version);
    out->epoch = r->epoch;
    out->provenance = WIRE_GET_BYTES(r, provenance);
    out->frame_bytes_max = r->frame_bytes_max;
    out->reply_bytes_max = r->reply_bytes_max;
out:
    return st;
}

/* ---- Fill ---- */

spurion_status spurion_codec_encode_fill(spurion_bytes *out, const spurion_memory *m, const spurion_fill *in)
{
    Spurion__V1__FillRequest r = SPURION__V1__FILL_REQUEST__INIT;
    wire w;

    wire_init(&w, m);
    r.n_taps = (size_t)in->count;
    r.taps = wire_set_list(&w, in->taps, r.n_taps);
    return wire_pack(out, &w, &r.base);
}

spurion_status spurion_codec_decode_fill(spurion_fill *out, const spurion_memory *m, spurion_bytes in)
{
    static const spurion_fill empty;
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    *out = empty;
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__fill_request__descriptor, in));
    const Spurion__V1__FillRequest *r = (const Spurion__V1__FillRequest *)message;
    SPURION_TRY(st, wire_at_most("taps", r->n_taps, SPURION_BATCH_ROLLOUTS_MAX));
    out->taps = wire_get_list(&w, r->taps, r->n_taps);
    out->count = (int32_t)r->n_taps;
    if (w.failed) {
        st = wire_no_memory(&w);
    }
out:
    return st;
}

spurion_status spurion_codec_encode_fill_reply(spurion_bytes *out, const spurion_memory *m, const spurion_fill_reply *in)
{
    Spurion__V1__FillReply r = SPURION__V1__FILL_REPLY__INIT;
    wire w;

    wire_init(&w, m);
    WIRE_SET(&r, taken, in->taken);
    return wire_pack(out, &w, &r.base);
}

spurion_status spurion_codec_decode_fill_reply(spurion_fill_reply *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    out->taken = 0;
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__fill_reply__descriptor, in));
    out->taken = ((const Spurion__V1__FillReply *)message)->taken;
out:
    return st;
}

/* ---- Sync ---- */

static spurion_status get_ranges(const spurion_range **out, int32_t *count, wire *w, const char *what, const uint64_t *first,
                                 size_t n_first, const uint64_t *last, size_t n_last)
{
    spurion_range *ranges;
    spurion_status st;

    SPURION_TRY(st, wire_same(what, n_last, n_first));
    SPURION_TRY(st, wire_at_most(what, n_first, SPURION_RANGES_MAX));
    ranges = WIRE_NEW(w, spurion_range, n_first);
    if (ranges == NULL) {
        return wire_no_memory(w);
    }
    for (size_t i = 0; i < n_first; i++) {
        if (first[i] == 0 || last[i] < first[i] || (i > 0 && first[i] <= last[i - 1])) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected ascending ranges from 1, found %llu to %llu", what,
                                 (unsigned long long)first[i], (unsigned long long)last[i]);
        }
        ranges[i].first = first[i];
        ranges[i].last = last[i];
    }
    *out = ranges;
    *count = (int32_t)n_first;
out:
    return st;
}

static void set_ranges(uint64_t **first, size_t *n_first, uint64_t **last, size_t *n_last, wire *w, const spurion_range *ranges, int32_t count)
{
    *n_first = *n_last = (size_t)count;
    *first = WIRE_NEW(w, uint64_t, count);
    *last = WIRE_NEW(w, uint64_t, count);
    for (int32_t i = 0; !w->failed && i < count; i++) {
        (*first)[i] = ranges[i].first;
        (*last)[i] = ranges[i].last;
    }
}

spurion_status spurion_codec_encode_sync(spurion_bytes *out, const spurion_memory *m, const spurion_sync *in)
{
    Spurion__V1__SyncRequest r = SPURION__V1__SYNC_REQUEST__INIT;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, spurion_name_check(in->run, "run"));
    SPURION_TRY(st, spurion_name_check(in->producer, "producer"));
    WIRE_SET_BYTES(&r, run, in->run);
    WIRE_SET_BYTES(&r, producer, in->producer);
    WIRE_SET(&r, epoch, in->epoch);
    WIRE_SET(&r, last_sequence, in->last_sequence);
    set_ranges(&r.lost_first, &r.n_lost_first, &r.lost_last, &r.n_lost_last, &w, in->lost, in->lost_count);
    WIRE_SET(&r, lost_rollouts, in->lost_rollouts);
    WIRE_SET(&r, closing, in->closing);
    if (in->lost_counts != NULL) {
        r.n_lost_count = (size_t)in->lost_count;
        r.lost_count = (uint64_t *)in->lost_counts;
    }
    SPURION_TRY(st, wire_pack(out, &w, &r.base));
out:
    return st;
}

spurion_status spurion_codec_decode_sync(spurion_sync *out, const spurion_memory *m, spurion_bytes in)
{
    static const spurion_sync empty;
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    *out = empty;
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__sync_request__descriptor, in));
    const Spurion__V1__SyncRequest *r = (const Spurion__V1__SyncRequest *)message;
    out->run = WIRE_GET_BYTES(r, run);
    out->producer = WIRE_GET_BYTES(r, producer);
    out->epoch = r->epoch;
    out->last_sequence = r->last_sequence;
    out->lost_rollouts = r->lost_rollouts;
    out->closing = r->closing != 0;
    SPURION_TRY(st, spurion_name_check(out->run, "run"));
    SPURION_TRY(st, spurion_name_check(out->producer, "producer"));
    SPURION_TRY(st, get_ranges(&out->lost, &out->lost_count, &w, "lost", r->lost_first, r->n_lost_first, r->lost_last, r->n_lost_last));
    if (r->n_lost_count > 0) {
        SPURION_TRY(st, wire_same("lost_count", r->n_lost_count, (size_t)out->lost_count));
        out->lost_counts = r->lost_count;
    }
    if (out->lost_count > 0 && out->lost[out->lost_count - 1].last > out->last_sequence) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "lost: expected ranges up to last_sequence %llu, found %llu",
                           (unsigned long long)out->last_sequence, (unsigned long long)out->lost[out->lost_count - 1].last);
    }
out:
    return st;
}

spurion_status spurion_codec_encode_sync_reply(spurion_bytes *out, const spurion_memory *m, const spurion_sync_reply *in)
{
    Spurion__V1__SyncReply r = SPURION__V1__SYNC_REPLY__INIT;
    wire w;

    wire_init(&w, m);
    WIRE_SET(&r, stored_through, in->stored_through);
    set_ranges(&r.missing_first, &r.n_missing_first, &r.missing_last, &r.n_missing_last, &w, in->missing, in->missing_count);
    set_ranges(&r.pending_first, &r.n_pending_first, &r.pending_last, &r.n_pending_last, &w, in->pending, in->pending_count);
    WIRE_SET(&r, lost_messages, in->lost_messages);
    WIRE_SET(&r, lost_rollouts, in->lost_rollouts);
    WIRE_SET(&r, takes_fixed_ids, 1);
    return wire_pack(out, &w, &r.base);
}

spurion_status spurion_codec_decode_sync_reply(spurion_sync_reply *out, const spurion_memory *m, spurion_bytes in)
{
    static const spurion_sync_reply empty;
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    *out = empty;
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__sync_reply__descriptor, in));
    const Spurion__V1__SyncReply *r = (const Spurion__V1__SyncReply *)message;
    out->stored_through = r->stored_through;
    SPURION_TRY(st, get_ranges(&out->missing, &out->missing_count, &w, "missing", r->missing_first, r->n_missing_first, r->missing_last,
                               r->n_missing_last));
    SPURION_TRY(st, get_ranges(&out->pending, &out->pending_count, &w, "pending", r->pending_first, r->n_pending_first, r->pending_last,
                               r->n_pending_last));
    out->lost_messages = r->lost_messages;
    out->lost_rollouts = r->lost_rollouts;
out:
    return st;
}

/* ---- StepEnd ---- */

static spurion_status check_step_end(const spurion_step_end *s)
{
    spurion_status st;

    SPURION_TRY(st, spurion_name_check(s->run, "run"));
    SPURION_TRY(st, wire_optional_name(s->producer, "producer"));
    if (s->step < 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "step: expected an integer >= 0, found %lld", (long long)s->step);
    }
out:
    return st;
}

spurion_status spurion_codec_encode_step_end(spurion_bytes *out, const spurion_memory *m, const spurion_step_end *in)
{
    Spurion__V1__StepEndRequest r = SPURION__V1__STEP_END_REQUEST__INIT;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, check_step_end(in));
    WIRE_SET_BYTES(&r, run, in->run);
    WIRE_SET_BYTES(&r, producer, in->producer);
    WIRE_SET(&r, step, in->step);
    SPURION_TRY(st, wire_pack(out, &w, &r.base));
out:
    return st;
}

spurion_status spurion_codec_decode_step_end(spurion_step_end *out, const spurion_memory *m, spurion_bytes in)
{
    static const spurion_step_end empty;
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    *out = empty;
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__step_end_request__descriptor, in));
    const Spurion__V1__StepEndRequest *r = (const Spurion__V1__StepEndRequest *)message;
    out->run = WIRE_GET_BYTES(r, run);
    out->producer = WIRE_GET_BYTES(r, producer);
    out->step = r->has_step ? r->step : -1;
    SPURION_TRY(st, check_step_end(out));
out:
    return st;
}

spurion_status spurion_codec_encode_step_end_reply(spurion_bytes *out, const spurion_memory *m, const spurion_step_end_reply *in)
{
    Spurion__V1__StepEndReply r = SPURION__V1__STEP_END_REPLY__INIT;
    wire w;

    wire_init(&w, m);
    WIRE_SET(&r, closed, in->closed);
    return wire_pack(out, &w, &r.base);
}

spurion_status spurion_codec_decode_step_end_reply(spurion_step_end_reply *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    out->closed = false;
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__step_end_reply__descriptor, in));
    out->closed = ((const Spurion__V1__StepEndReply *)message)->closed != 0;
out:
    return st;
}

/* Rollouts and the messages that carry them: Score, Submit, Tap. Thread: any. Memory: the caller's. */
#include "wire.h"

#include <math.h>
#include <string.h>

spurion_status wire_rollout_pack(Spurion__V1__Rollout **out, wire *w, const spurion_rollout *in)
{
    Spurion__V1__Rollout *r = WIRE_NEW(w, Spurion__V1__Rollout, 1);

    if (r == NULL) {
        return wire_no_memory(w);
    }
    spurion__v1__rollout__init(r);
    WIRE_SET_BYTES(r, run, in->run);
    WIRE_SET(r, step, in->step);
    WIRE_SET_BYTES(r, group, in->group);
    WIRE_SET_BYTES(r, id, in->id);
    r->has_attempt = in->attempt != 0;
    r->attempt = in->attempt;
    WIRE_SET_BYTES(r, prompt, in->prompt);
    WIRE_SET_BYTES(r, completion, in->completion);
    r->n_prompt_ids = (size_t)in->prompt_id_count;
    r->prompt_ids = (int32_t *)in->prompt_ids;
    r->n_completion_ids = (size_t)in->completion_id_count;
    r->completion_ids = (int32_t *)in->completion_ids;
    r->has_trainer_reward = in->has_trainer_reward;
    r->trainer_reward = in->trainer_reward;
    WIRE_SET_BYTES(r, tags, in->tags);
    r->has_group_size = in->group_size != 0;
    r->group_size = in->group_size;
    WIRE_SET_BYTES(r, messages, in->messages);
    r->has_text_form = in->text_form != SPURION_FORM_PLAIN;
    r->text_form = (uint32_t)in->text_form;
    *out = r;
    return spurion_ok();
}

/* Ids come as varints or as fixed 32 bits; who sends both forms of one list would leave open which of them is meant. */
static spurion_status unpack_ids(spurion_rollout *out, const Spurion__V1__Rollout *in)
{
    static const int32_t no_ids[1];
    bool prompt_fixed = in->n_prompt_ids_fixed > 0, completion_fixed = in->n_completion_ids_fixed > 0;
    size_t prompt = prompt_fixed ? in->n_prompt_ids_fixed : in->n_prompt_ids;
    size_t completion = completion_fixed ? in->n_completion_ids_fixed : in->n_completion_ids;

    if ((prompt_fixed && in->n_prompt_ids > 0) || (completion_fixed && in->n_completion_ids > 0)) {
        const char *what = prompt_fixed && in->n_prompt_ids > 0 ? "prompt_ids" : "completion_ids";
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected them in one form, found %s and %s_fixed", what, what, what);
    }
    if (prompt > 0 || completion > 0) {
        out->prompt_ids = prompt == 0 ? no_ids : prompt_fixed ? in->prompt_ids_fixed : in->prompt_ids;
        out->completion_ids = completion == 0 ? no_ids : completion_fixed ? in->completion_ids_fixed : in->completion_ids;
        out->prompt_id_count = (int32_t)prompt;
        out->completion_id_count = (int32_t)completion;
    }
    return spurion_ok();
}

spurion_status wire_rollout_unpack(spurion_rollout *out, const Spurion__V1__Rollout *in)
{
    memset(out, 0, sizeof *out);
    out->run = WIRE_GET_BYTES(in, run);
    out->step = in->has_step ? in->step : -1;
    out->group = WIRE_GET_BYTES(in, group);
    out->id = WIRE_GET_BYTES(in, id);
    out->attempt = in->attempt;
    out->prompt = WIRE_GET_BYTES(in, prompt);
    out->completion = WIRE_GET_BYTES(in, completion);
    /* A trainer's "no reward" is NaN in most frameworks. */
    out->has_trainer_reward = in->has_trainer_reward && !isnan(in->trainer_reward);
    out->trainer_reward = out->has_trainer_reward ? in->trainer_reward : 0.0f;
    out->tags = WIRE_GET_BYTES(in, tags);
    out->group_size = in->group_size;
    out->messages = WIRE_GET_BYTES(in, messages);
    out->text_form = in->text_form < SPURION_FORM_COUNT ? (spurion_text_form)in->text_form : (spurion_text_form)SPURION_FORM_COUNT;
    return unpack_ids(out, in);
}

spurion_status spurion_codec_encode_rollout(spurion_bytes *out, const spurion_memory *m, const spurion_rollout *in)
{
    Spurion__V1__Rollout *r;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, spurion_rollout_check(in));
    SPURION_TRY(st, wire_rollout_pack(&r, &w, in));
    SPURION_TRY(st, wire_pack(out, &w, &r->base));
out:
    return st;
}

spurion_status spurion_codec_decode_rollout(spurion_rollout *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__rollout__descriptor, in));
    SPURION_TRY(st, wire_rollout_unpack(out, (const Spurion__V1__Rollout *)message));
    SPURION_TRY(st, spurion_rollout_check(out));
out:
    return st;
}

/* ---- lists: one bad rollout does not spoil the others ---- */

static spurion_status pack_list(Spurion__V1__Rollout ***out, size_t *n, wire *w, const spurion_rollouts *list)
{
    spurion_status st;

    SPURION_TRY(st, wire_at_most("rollouts", (size_t)list->count, SPURION_BATCH_ROLLOUTS_MAX));
    *n = (size_t)list->count;
    *out = WIRE_NEW(w, Spurion__V1__Rollout *, list->count);
    if (*out == NULL) {
        return wire_no_memory(w);
    }
    for (int32_t i = 0; i < list->count; i++) {
        SPURION_TRY(st, wire_rollout_pack(&(*out)[i], w, &list->rollouts[i]));
    }
out:
    return st;
}

static spurion_status refuse(spurion_refusal *r, wire *w, const spurion_status *why)
{
    size_t n = strlen(why->message);
    char *text = wire_take(w, n + 1, 1);

    if (text == NULL) {
        return wire_no_memory(w);
    }
    memcpy(text, why->message, n);
    r->code = why->code;
    r->message.data = text;
    r->message.size = n;
    return spurion_ok();
}

/* Names that cannot be printed are taken away from a refused rollout, so that nobody echoes or logs them. */
static void drop_bad_names(spurion_rollout *r)
{
    static const spurion_bytes absent = {NULL, 0};
    if (spurion_name_check(r->run, "run").code != SPURION_OK) {
        r->run = absent;
    }
    if (spurion_name_check(r->group, "group").code != SPURION_OK) {
        r->group = absent;
    }
    if (spurion_name_check(r->id, "id").code != SPURION_OK) {
        r->id = absent;
    }
}

/* run: absent, or what every rollout must belong to. */
static spurion_status unpack_list(spurion_rollouts *out, wire *w, Spurion__V1__Rollout **in, size_t n, spurion_bytes run)
{
    spurion_rollout *rollouts;
    spurion_refusal *refusals;
    spurion_status st;

    SPURION_TRY(st, wire_at_most("rollouts", n, SPURION_BATCH_ROLLOUTS_MAX));
    rollouts = WIRE_NEW(w, spurion_rollout, n);
    refusals = WIRE_NEW(w, spurion_refusal, n);
    if (w->failed) {
        return wire_no_memory(w);
    }
    for (size_t i = 0; i < n; i++) {
        spurion_status bad;
        bad = wire_rollout_unpack(&rollouts[i], in[i]);
        if (bad.code == SPURION_OK) {
            bad = spurion_rollout_check(&rollouts[i]);
        }
        if (bad.code == SPURION_OK && run.data != NULL &&
            (run.size != rollouts[i].run.size || memcmp(run.data, rollouts[i].run.data, run.size) != 0)) {
            bad = spurion_error(SPURION_INVALID_ARGUMENT, "run: expected the run of its message, found another one");
        }
        if (bad.code != SPURION_OK) {
            drop_bad_names(&rollouts[i]);
            SPURION_TRY(st, refuse(&refusals[i], w, &bad));
        }
    }
    out->rollouts = rollouts;
    out->refusals = refusals;
    out->count = (int32_t)n;
out:
    return st;
}

spurion_status spurion_codec_encode_score(spurion_bytes *out, const spurion_memory *m, const spurion_score *in)
{
    Spurion__V1__ScoreRequest r = SPURION__V1__SCORE_REQUEST__INIT;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, wire_optional_name(in->producer, "producer"));
    SPURION_TRY(st, pack_list(&r.rollouts, &r.n_rollouts, &w, &in->list));
    WIRE_SET(&r, want_tokens, in->want_tokens);
    WIRE_SET_BYTES(&r, producer, in->producer);
    SPURION_TRY(st, wire_pack(out, &w, &r.base));
out:
    return st;
}

spurion_status spurion_codec_decode_score(spurion_score *out, const spurion_memory *m, spurion_bytes in)
{
    static const spurion_bytes any_run = {NULL, 0};
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__score_request__descriptor, in));
    const Spurion__V1__ScoreRequest *r = (const Spurion__V1__ScoreRequest *)message;
    out->want_tokens = r->want_tokens != 0;
    out->producer = WIRE_GET_BYTES(r, producer);
    SPURION_TRY(st, wire_optional_name(out->producer, "producer"));
    SPURION_TRY(st, unpack_list(&out->list, &w, r->rollouts, r->n_rollouts, any_run));
out:
    return st;
}

spurion_status spurion_codec_encode_submit(spurion_bytes *out, const spurion_memory *m, const spurion_score *in)
{
    Spurion__V1__SubmitRequest r = SPURION__V1__SUBMIT_REQUEST__INIT;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, wire_optional_name(in->producer, "producer"));
    SPURION_TRY(st, pack_list(&r.rollouts, &r.n_rollouts, &w, &in->list));
    WIRE_SET_BYTES(&r, producer, in->producer);
    SPURION_TRY(st, wire_pack(out, &w, &r.base));
out:
    return st;
}

spurion_status spurion_codec_decode_submit(spurion_score *out, const spurion_memory *m, spurion_bytes in)
{
    static const spurion_bytes any_run = {NULL, 0};
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__submit_request__descriptor, in));
    const Spurion__V1__SubmitRequest *r = (const Spurion__V1__SubmitRequest *)message;
    out->producer = WIRE_GET_BYTES(r, producer);
    SPURION_TRY(st, wire_optional_name(out->producer, "producer"));
    SPURION_TRY(st, unpack_list(&out->list, &w, r->rollouts, r->n_rollouts, any_run));
out:
    return st;
}

spurion_status spurion_codec_encode_submit_reply(spurion_bytes *out, const spurion_memory *m, const spurion_submit_reply *in)
{
    Spurion__V1__SubmitReply r = SPURION__V1__SUBMIT_REPLY__INIT;
    wire w;

    wire_init(&w, m);
    WIRE_SET(&r, accepted, in->accepted);
    WIRE_SET(&r, duplicates, in->duplicates);
    r.n_refused = r.n_refused_code = r.n_refused_message = (size_t)in->refused_count;
    r.refused = (uint32_t *)in->refused;
    r.refused_code = (uint32_t *)in->refused_codes;
    r.refused_message = wire_set_list(&w, in->refused_messages, r.n_refused_message);
    return wire_pack(out, &w, &r.base);
}

spurion_status spurion_codec_decode_submit_reply(spurion_submit_reply *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__submit_reply__descriptor, in));
    const Spurion__V1__SubmitReply *r = (const Spurion__V1__SubmitReply *)message;
    SPURION_TRY(st, wire_same("refused_code", r->n_refused_code, r->n_refused));
    SPURION_TRY(st, wire_same("refused_message", r->n_refused_message, r->n_refused));
    out->accepted = r->accepted;
    out->duplicates = r->duplicates;
    out->refused = r->refused;
    out->refused_codes = r->refused_code;
    out->refused_messages = wire_get_list(&w, r->refused_message, r->n_refused_message);
    out->refused_count = (int32_t)r->n_refused;
    if (w.failed) {
        st = wire_no_memory(&w);
    }
out:
    return st;
}

/* ---- Tap ---- */

static spurion_status check_tap(const spurion_tap *t)
{
    spurion_status st;

    SPURION_TRY(st, spurion_name_check(t->run, "run"));
    SPURION_TRY(st, spurion_name_check(t->producer, "producer"));
    if (t->sequence == 0) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "sequence: expected an integer >= 1, found 0");
    }
    if (t->has_step_end && t->step_end < 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "step_end: expected an integer >= 0, found %lld", (long long)t->step_end);
    }
out:
    return st;
}

spurion_status spurion_codec_encode_tap(spurion_bytes *out, const spurion_memory *m, const spurion_tap *in)
{
    Spurion__V1__Tap r = SPURION__V1__TAP__INIT;
    spurion_status st;
    wire w;

    wire_init(&w, m);
    SPURION_TRY(st, check_tap(in));
    WIRE_SET_BYTES(&r, run, in->run);
    WIRE_SET_BYTES(&r, producer, in->producer);
    WIRE_SET(&r, epoch, in->epoch);
    WIRE_SET(&r, sequence, in->sequence);
    SPURION_TRY(st, pack_list(&r.rollouts, &r.n_rollouts, &w, &in->list));
    r.has_step_end = in->has_step_end;
    r.step_end = in->step_end;
    SPURION_TRY(st, wire_pack(out, &w, &r.base));
out:
    return st;
}

spurion_status spurion_codec_decode_tap(spurion_tap *out, const spurion_memory *m, spurion_bytes in)
{
    ProtobufCMessage *message;
    spurion_status st;
    wire w;

    memset(out, 0, sizeof *out);
    wire_init(&w, m);
    SPURION_TRY(st, wire_unpack(&message, &w, &spurion__v1__tap__descriptor, in));
    const Spurion__V1__Tap *r = (const Spurion__V1__Tap *)message;
    out->run = WIRE_GET_BYTES(r, run);
    out->producer = WIRE_GET_BYTES(r, producer);
    out->epoch = r->epoch;
    out->sequence = r->sequence;
    out->has_step_end = r->has_step_end != 0;
    out->step_end = r->step_end;
    SPURION_TRY(st, check_tap(out));
    SPURION_TRY(st, unpack_list(&out->list, &w, r->rollouts, r->n_rollouts, out->run));
out:
    return st;
}

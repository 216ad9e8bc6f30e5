/* The codec: what goes in comes out, and what must not come in does not. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/arena.h"
#include "spurion/codec.h"

static void *take(void *context, size_t bytes)
{
    return spurion_arena_take(context, bytes);
}

typedef struct fixture {
    spurion_arena arena;
    spurion_memory m;
} fixture;

static int set_up(void **state)
{
    fixture *f = calloc(1, sizeof *f);
    spurion_arena_init(&f->arena, 0);
    f->m.take = take;
    f->m.context = &f->arena;
    *state = f;
    return 0;
}

static int tear_down(void **state)
{
    fixture *f = *state;
    spurion_arena_fini(&f->arena);
    free(f);
    return 0;
}

static void assert_ok(spurion_status st)
{
    if (st.code != SPURION_OK) {
        fail_msg("expected OK, found %s: %s", spurion_code_name(st.code), st.message);
    }
}

static void assert_refused(spurion_status st, int code, const char *word)
{
    if (st.code != code || strstr(st.message, word) == NULL) {
        fail_msg("expected %s with '%s', found %s: %s", spurion_code_name(code), word, spurion_code_name(st.code), st.message);
    }
}

static void assert_bytes(spurion_bytes b, const char *text)
{
    assert_non_null(b.data);
    assert_int_equal(b.size, strlen(text));
    assert_string_equal(b.data, text); /* and NUL-terminated */
}

static spurion_rollout a_rollout(void)
{
    spurion_rollout r;
    memset(&r, 0, sizeof r);
    r.run = spurion_bytes_of("run");
    r.group = spurion_bytes_of("group");
    r.id = spurion_bytes_of("id");
    r.step = 12;
    r.prompt = spurion_bytes_of("prompt");
    r.completion = spurion_bytes_of("completion");
    return r;
}

static void test_codec_request_comes_back(void **state)
{
    fixture *f = *state;
    spurion_bytes keys[] = {spurion_bytes_of("token")}, values[] = {spurion_bytes_of("abc")}, wire;
    spurion_request in = {42, spurion_bytes_of(SPURION_METHOD_PREFIX "Score"), 1500, keys, values, 1, spurion_bytes_of("key"),
                          spurion_bytes_of("body"), {NULL, 0}}, out;

    assert_ok(spurion_codec_encode_request(&wire, &f->m, &in));
    assert_ok(spurion_codec_decode_request(&out, &f->m, wire));
    assert_int_equal(out.call_id, 42);
    assert_int_equal(out.timeout_ms, 1500);
    assert_bytes(out.method, SPURION_METHOD_PREFIX "Score");
    assert_int_equal(out.metadata_count, 1);
    assert_bytes(out.metadata_keys[0], "token");
    assert_bytes(out.metadata_values[0], "abc");
    assert_bytes(out.idempotency_key, "key");
    assert_bytes(out.body, "body");
    assert_null(out.page_token.data);
}

static void test_codec_rollout_comes_back(void **state)
{
    fixture *f = *state;
    spurion_rollout r = a_rollout(), out;
    spurion_bytes wire;

    r.attempt = 3;
    r.has_trainer_reward = true;
    r.trainer_reward = -0.0f;
    r.tags = spurion_bytes_of("{\"a\":[1,{\"b\":null}]}");
    r.group_size = 8;
    r.text_form = SPURION_FORM_VERBATIM;
    r.prompt = spurion_bytes_of("");
    assert_ok(spurion_codec_encode_rollout(&wire, &f->m, &r));
    assert_ok(spurion_codec_decode_rollout(&out, &f->m, wire));
    assert_bytes(out.prompt, "");
    assert_bytes(out.completion, "completion");
    assert_bytes(out.tags, "{\"a\":[1,{\"b\":null}]}");
    assert_int_equal(out.attempt, 3);
    assert_int_equal(out.step, 12);
    assert_int_equal(out.group_size, 8);
    assert_int_equal(out.text_form, SPURION_FORM_VERBATIM);
    assert_true(out.has_trainer_reward && signbit(out.trainer_reward));
    r = a_rollout();
    r.prompt = r.completion = (spurion_bytes){NULL, 0};
    r.messages = spurion_bytes_of("[{\"role\":\"user\"}]");
    assert_ok(spurion_codec_encode_rollout(&wire, &f->m, &r));
    assert_ok(spurion_codec_decode_rollout(&out, &f->m, wire));
    assert_bytes(out.messages, "[{\"role\":\"user\"}]");
    assert_null(out.completion.data);
    r.messages = spurion_bytes_of("{}");
    assert_int_equal(spurion_codec_encode_rollout(&wire, &f->m, &r).code, SPURION_INVALID_ARGUMENT);
}

static void test_codec_ids_come_back(void **state)
{
    fixture *f = *state;
    int32_t completion[] = {0, 5, INT32_MAX};
    spurion_rollout r = a_rollout(), out;
    spurion_bytes wire;

    r.prompt.data = r.completion.data = NULL;
    r.prompt.size = r.completion.size = 0;
    r.completion_ids = completion;
    r.completion_id_count = 3;
    assert_ok(spurion_codec_encode_rollout(&wire, &f->m, &r));
    assert_ok(spurion_codec_decode_rollout(&out, &f->m, wire));
    assert_null(out.prompt.data);
    assert_non_null(out.prompt_ids); /* no prompt token, but ids all the same */
    assert_int_equal(out.prompt_id_count, 0);
    assert_memory_equal(out.completion_ids, completion, sizeof completion);
}

#define NAMES_ON_WIRE "\x0a\x01r\x10\x03\x1a\x01g\x22\x01i"
#define FIXED_PROMPT "\x7a\x04\x05\x00\x00\x00"
#define FIXED_COMPLETION "\x82\x01\x08\x07\x00\x00\x00\xff\xff\xff\x7f"

static spurion_bytes raw(const char *data, size_t size)
{
    spurion_bytes b = {data, size};
    return b;
}
#define RAW(text) raw(text, sizeof(text) - 1)

static void test_codec_fixed_ids_are_the_same_rollout(void **state)
{
    fixture *f = *state;
    unsigned char one[SPURION_ROLLOUT_DIGEST_BYTES], two[SPURION_ROLLOUT_DIGEST_BYTES];
    int32_t completion[] = {7, INT32_MAX};
    spurion_rollout fixed, varints;
    spurion_bytes again;

    assert_ok(spurion_codec_decode_rollout(&fixed, &f->m, RAW(NAMES_ON_WIRE FIXED_PROMPT FIXED_COMPLETION)));
    assert_int_equal(fixed.prompt_id_count, 1);
    assert_int_equal(fixed.prompt_ids[0], 5);
    assert_int_equal(fixed.completion_id_count, 2);
    assert_memory_equal(fixed.completion_ids, completion, sizeof completion);
    assert_ok(spurion_codec_encode_rollout(&again, &f->m, &fixed));
    assert_ok(spurion_codec_decode_rollout(&varints, &f->m, again));
    spurion_rollout_digest(one, &fixed);
    spurion_rollout_digest(two, &varints);
    assert_memory_equal(one, two, sizeof one);
    assert_ok(spurion_codec_decode_rollout(&fixed, &f->m, RAW(NAMES_ON_WIRE "\x42\x02\x05\x06" FIXED_COMPLETION))); /* each list in its form */
    assert_int_equal(fixed.prompt_id_count, 2);
    assert_int_equal(fixed.completion_id_count, 2);
    assert_ok(spurion_codec_decode_rollout(&fixed, &f->m, RAW(NAMES_ON_WIRE FIXED_COMPLETION)));
    assert_non_null(fixed.prompt_ids); /* no prompt token, but ids all the same */
    assert_int_equal(fixed.prompt_id_count, 0);
}

static void test_codec_fixed_ids_are_checked(void **state)
{
    fixture *f = *state;
    spurion_rollout out;

    assert_refused(spurion_codec_decode_rollout(&out, &f->m, RAW(NAMES_ON_WIRE FIXED_PROMPT FIXED_COMPLETION "\x42\x01\x05")),
                   SPURION_INVALID_ARGUMENT, "prompt_ids: expected them in one form, found prompt_ids and prompt_ids_fixed");
    assert_refused(spurion_codec_decode_rollout(&out, &f->m, RAW(NAMES_ON_WIRE FIXED_PROMPT FIXED_COMPLETION "\x4a\x01\x05")),
                   SPURION_INVALID_ARGUMENT, "found completion_ids and completion_ids_fixed");
    assert_refused(spurion_codec_decode_rollout(&out, &f->m, RAW(NAMES_ON_WIRE FIXED_PROMPT "\x82\x01\x07\x07\x00\x00\x00\x05\x00\x00")),
                   SPURION_INVALID_ARGUMENT, "completion_ids_fixed: expected a multiple of 4 bytes, found 7");
    assert_refused(spurion_codec_decode_rollout(&out, &f->m, RAW(NAMES_ON_WIRE "\x82\x01\x08\x07\x00\x00\x00\xfe\xff\xff\xff")),
                   SPURION_INVALID_ARGUMENT, "completion_ids: expected token ids >= 0, found -2 at place 1");
    assert_refused(spurion_codec_decode_rollout(&out, &f->m, RAW(NAMES_ON_WIRE "\x32\x01p" FIXED_COMPLETION)), SPURION_INVALID_ARGUMENT, "found both");
    assert_refused(spurion_codec_decode_rollout(&out, &f->m, RAW(NAMES_ON_WIRE FIXED_PROMPT)), SPURION_INVALID_ARGUMENT, "empty completion");
}

/* Both forms in one rollout of a tap message: that one is refused, its neighbour is not. */
static void test_codec_fixed_ids_refuse_one_rollout(void **state)
{
    fixture *f = *state;
    static const char good[] = NAMES_ON_WIRE FIXED_PROMPT FIXED_COMPLETION, bad[] = NAMES_ON_WIRE FIXED_COMPLETION "\x4a\x01\x05";
    char data[128] = "\x0a\x01r\x12\x01p\x18\x01\x20\x01";
    size_t at = strlen(data);
    spurion_tap tap;

    data[at++] = 0x2a;
    data[at++] = (char)(sizeof bad - 1);
    memcpy(data + at, bad, sizeof bad - 1);
    at += sizeof bad - 1;
    data[at++] = 0x2a;
    data[at++] = (char)(sizeof good - 1);
    memcpy(data + at, good, sizeof good - 1);
    at += sizeof good - 1;
    assert_ok(spurion_codec_decode_tap(&tap, &f->m, raw(data, at)));
    assert_int_equal(tap.list.count, 2);
    assert_int_equal(tap.list.refusals[0].code, SPURION_INVALID_ARGUMENT);
    assert_int_equal(tap.list.refusals[1].code, SPURION_OK);
    assert_int_equal(tap.list.rollouts[1].completion_ids[1], INT32_MAX);
}

/* A verdict with every part filled. */
static spurion_verdict a_verdict(void)
{
    static spurion_sae_summary saes[2];
    static spurion_bytes families[2];
    static spurion_feature features[3];
    static spurion_family_effect effects[1];
    static spurion_feature_ref refs[2];
    static spurion_flag flags[2];
    static int32_t position[2] = {7, 8}, id[2] = {100, 200};
    static spurion_bytes text[2];
    static float attribution[4] = {1, 2, 3, 4}, flagged[8] = {0, 1, 0, 1, 5, 6, 7, 8};
    static spurion_tokens tokens;
    spurion_verdict v;

    memset(&v, 0, sizeof v);
    v.run = spurion_bytes_of("run");
    v.group = spurion_bytes_of("group");
    v.id = spurion_bytes_of("id");
    v.has_step = true;
    v.step = 0;
    v.reward = 1.25f;
    v.counterfactual_reward = 0.5f;
    v.effect = -0.75f;
    v.effect_sd.has = true;
    v.effect_sd.value = 0;
    v.advantage_flip = true;
    v.scored_position = 0;
    v.token_count = 9;
    v.warnings = SPURION_WARN_BOUNDARY | SPURION_WARN_GROUP_SPLIT;
    v.action = SPURION_ACTION_REPLACE;
    v.action_rule = spurion_bytes_of("any");
    v.action_reward = 0.5f;
    v.action_weight = 1;
    v.action_advantage.has = true;
    v.action_advantage.value = -0.25f;
    strcpy(v.provenance, "0123456789abcdef");
    saes[0].sae = spurion_bytes_of("mid");
    saes[0].attribution_sum.has = true;
    saes[0].attribution_sum.value = 1.5f;
    saes[1].sae = spurion_bytes_of("late");
    saes[1].l0_mean.has = true;
    saes[1].l0_mean.value = 31.25f;
    v.saes = saes;
    v.sae_count = 2;
    families[0] = spurion_bytes_of("url");
    families[1] = spurion_bytes_of("thanks");
    for (int i = 0; i < 3; i++) {
        features[i].ref.sae = saes[i % 2].sae;
        features[i].ref.index = 10 + i;
        features[i].verdict = spurion_bytes_of("unknown");
        features[i].activation_max = (float)i;
        features[i].peak_position = i;
    }
    features[1].label = spurion_bytes_of("closing thanks");
    features[0].explanation = spurion_bytes_of("polite endings");
    features[1].verdict = spurion_bytes_of("spurious");
    features[1].families = families;
    features[1].family_count = 2;
    features[1].ablation_effect.has = true;
    features[1].ablation_effect.value = -2;
    features[2].verdict = spurion_bytes_of("intended"); /* catalogued without a label */
    features[2].families = families;
    features[2].family_count = 1;
    v.features = features;
    v.feature_count = 3;
    effects[0].family = families[1];
    effects[0].effect = -0.75f;
    v.families = effects;
    v.family_count = 1;
    refs[0].sae = saes[1].sae;
    refs[0].index = 11;
    refs[1].sae = saes[0].sae;
    refs[1].index = 10;
    flags[0].rule = spurion_bytes_of("empty");
    flags[1].rule = spurion_bytes_of("any");
    flags[1].effect = -0.75f;
    flags[1].features = refs;
    flags[1].feature_count = 2;
    v.flags = flags;
    v.flag_count = 2;
    text[0] = spurion_bytes_of("Thank");
    text[1] = spurion_bytes_of("");
    tokens.count = 2;
    tokens.position = position;
    tokens.id = id;
    tokens.text = text;
    tokens.sae_count = 2;
    tokens.attribution = attribution;
    tokens.flagged_count = 2;
    tokens.flagged = flagged;
    v.tokens = &tokens;
    return v;
}

static void assert_same_verdict(const spurion_verdict *v)
{
    assert_true(v->has_step);
    assert_int_equal(v->step, 0);
    assert_true(v->reward == 1.25f && v->counterfactual_reward == 0.5f && v->effect == -0.75f);
    assert_true(v->effect_sd.has && v->effect_sd.value == 0);
    assert_false(v->advantage.has);
    assert_true(v->advantage_flip);
    assert_int_equal(v->scored_position, 0);
    assert_int_equal(v->warnings, SPURION_WARN_BOUNDARY | SPURION_WARN_GROUP_SPLIT);
    assert_int_equal(v->action, SPURION_ACTION_REPLACE);
    assert_bytes(v->action_rule, "any");
    assert_true(v->action_reward == 0.5f && v->action_weight == 1 && v->action_advantage.has && v->action_advantage.value == -0.25f);
    assert_string_equal(v->provenance, "0123456789abcdef");
    assert_int_equal(v->sae_count, 2);
    assert_true(v->saes[0].attribution_sum.has && v->saes[0].attribution_sum.value == 1.5f);
    assert_false(v->saes[0].l0_mean.has);
    assert_true(v->saes[1].l0_mean.has);
    assert_int_equal(v->feature_count, 3);
    assert_null(v->features[0].label.data);
    assert_bytes(v->features[0].verdict, "unknown");
    assert_bytes(v->features[1].label, "closing thanks");
    assert_bytes(v->features[0].explanation, "polite endings");
    assert_null(v->features[2].label.data);
    assert_bytes(v->features[2].verdict, "intended");
    assert_int_equal(v->features[2].family_count, 1);
    assert_null(v->features[1].explanation.data);
    assert_bytes(v->features[1].verdict, "spurious");
    assert_int_equal(v->features[1].family_count, 2);
    assert_bytes(v->features[1].families[1], "thanks");
    assert_true(v->features[1].ablation_effect.has && !v->features[1].attribution.has);
    assert_bytes(v->features[2].ref.sae, "mid");
    assert_int_equal(v->features[2].ref.index, 12);
    assert_int_equal(v->family_count, 1);
    assert_bytes(v->families[0].family, "thanks");
    assert_int_equal(v->flag_count, 2);
    assert_int_equal(v->flags[0].feature_count, 0);
    assert_int_equal(v->flags[1].feature_count, 2);
    assert_bytes(v->flags[1].features[0].sae, "late");
    assert_int_equal(v->flags[1].features[1].index, 10);
    assert_non_null(v->tokens);
    assert_int_equal(v->tokens->count, 2);
    assert_bytes(v->tokens->text[0], "Thank");
    assert_bytes(v->tokens->text[1], "");
    assert_true(v->tokens->attribution[3] == 4 && v->tokens->flagged[7] == 8);
}

static void test_codec_verdict_comes_back(void **state)
{
    fixture *f = *state;
    spurion_verdict v = a_verdict(), out;
    spurion_bytes wire;

    assert_ok(spurion_codec_encode_verdict(&wire, &f->m, &v));
    assert_ok(spurion_codec_decode_verdict(&out, &f->m, wire));
    assert_same_verdict(&out);
}

static void test_codec_record_comes_back(void **state)
{
    fixture *f = *state;
    spurion_record in = {a_rollout(), a_verdict(), 1700000000123}, out;
    spurion_bytes wire;

    assert_ok(spurion_codec_encode_record(&wire, &f->m, &in));
    assert_ok(spurion_codec_decode_record(&out, &f->m, wire));
    assert_same_verdict(&out.verdict);
    assert_bytes(out.rollout.prompt, "prompt");
    assert_int_equal(out.time_ms, 1700000000123);
}

static void test_codec_joined_verdicts_are_a_score_reply(void **state)
{
    fixture *f = *state;
    spurion_verdict two[2] = {a_verdict(), a_verdict()};
    spurion_verdicts list = {two, 2}, out;
    spurion_bytes packed[2], joined, wire;

    two[1].tokens = NULL;
    assert_ok(spurion_codec_encode_verdict(&packed[0], &f->m, &two[0]));
    assert_ok(spurion_codec_encode_verdict(&packed[1], &f->m, &two[1]));
    assert_ok(spurion_codec_join_verdicts(&joined, &f->m, packed, 2));
    assert_ok(spurion_codec_encode_score_reply(&wire, &f->m, &list));
    assert_int_equal(joined.size, wire.size);
    assert_memory_equal(joined.data, wire.data, wire.size);
    assert_ok(spurion_codec_decode_score_reply(&out, &f->m, joined));
    assert_int_equal(out.count, 2);
    assert_same_verdict(&out.verdicts[0]);
    assert_null(out.verdicts[1].tokens);
}

static void test_codec_refused_verdict_has_no_numbers(void **state)
{
    fixture *f = *state;
    spurion_verdict v, out;
    spurion_bytes wire;

    memset(&v, 0, sizeof v);
    v.id = spurion_bytes_of("id");
    v.code = SPURION_OUT_OF_RANGE;
    v.message = spurion_bytes_of("expected 2, found 3");
    v.scored_position = -1;
    assert_ok(spurion_codec_encode_verdict(&wire, &f->m, &v));
    assert_ok(spurion_codec_decode_verdict(&out, &f->m, wire));
    assert_int_equal(out.code, SPURION_OUT_OF_RANGE);
    assert_bytes(out.message, "expected 2, found 3");
    assert_null(out.run.data);
    assert_false(out.has_step);
    assert_int_equal(out.scored_position, -1);
}

static void test_codec_refuses_one_rollout_not_its_message(void **state)
{
    fixture *f = *state;
    spurion_rollout three[3] = {a_rollout(), a_rollout(), a_rollout()};
    spurion_score in = {{three, NULL, 3}, true, spurion_bytes_of("trainer")}, out;
    spurion_bytes wire;

    three[1].completion = spurion_bytes_of("\xc3\x28");
    three[2].id = spurion_bytes_of("bad\x1bname");
    assert_ok(spurion_codec_encode_score(&wire, &f->m, &in));
    assert_ok(spurion_codec_decode_score(&out, &f->m, wire));
    assert_true(out.want_tokens);
    assert_bytes(out.producer, "trainer");
    assert_int_equal(out.list.count, 3);
    assert_int_equal(out.list.refusals[0].code, SPURION_OK);
    assert_int_equal(out.list.refusals[1].code, SPURION_INVALID_ARGUMENT);
    assert_non_null(strstr(out.list.refusals[1].message.data, "completion: expected UTF-8, found byte 0xc3 at 0"));
    assert_bytes(out.list.rollouts[1].id, "id");
    assert_int_equal(out.list.refusals[2].code, SPURION_INVALID_ARGUMENT);
    assert_null(out.list.rollouts[2].id.data); /* nobody echoes or logs it */
}

static void test_codec_tap_keeps_to_its_run(void **state)
{
    fixture *f = *state;
    spurion_rollout two[2] = {a_rollout(), a_rollout()};
    spurion_tap in, out;
    spurion_bytes wire;

    memset(&in, 0, sizeof in);
    two[1].run = spurion_bytes_of("other");
    in.run = spurion_bytes_of("run");
    in.producer = spurion_bytes_of("p0");
    in.epoch = UINT64_MAX;
    in.sequence = 1;
    in.list.rollouts = two;
    in.list.count = 2;
    in.has_step_end = true;
    in.step_end = 0;
    assert_ok(spurion_codec_encode_tap(&wire, &f->m, &in));
    assert_ok(spurion_codec_decode_tap(&out, &f->m, wire));
    assert_true(out.epoch == UINT64_MAX && out.has_step_end && out.step_end == 0);
    assert_int_equal(out.list.refusals[0].code, SPURION_OK);
    assert_int_equal(out.list.refusals[1].code, SPURION_INVALID_ARGUMENT);
    in.sequence = 0;
    assert_refused(spurion_codec_encode_tap(&wire, &f->m, &in), SPURION_INVALID_ARGUMENT, "sequence");
}

static void test_codec_sync_wants_ascending_ranges(void **state)
{
    fixture *f = *state;
    spurion_range good[2] = {{1, 3}, {7, 7}}, bad[2] = {{5, 6}, {6, 9}};
    uint64_t counts[2] = {24, 8};
    spurion_sync in, out;
    spurion_bytes wire;

    memset(&in, 0, sizeof in);
    in.run = spurion_bytes_of("run");
    in.producer = spurion_bytes_of("p0");
    in.last_sequence = 9;
    in.lost = good;
    in.lost_count = 2;
    in.lost_rollouts = 32;
    in.closing = true;
    assert_ok(spurion_codec_encode_sync(&wire, &f->m, &in));
    assert_ok(spurion_codec_decode_sync(&out, &f->m, wire));
    assert_int_equal(out.lost_count, 2);
    assert_true(out.lost[1].first == 7 && out.lost[1].last == 7 && out.lost_rollouts == 32 && out.closing);
    assert_null(out.lost_counts);
    in.lost_counts = counts;
    assert_ok(spurion_codec_encode_sync(&wire, &f->m, &in));
    assert_ok(spurion_codec_decode_sync(&out, &f->m, wire));
    assert_true(out.lost_counts[0] == 24 && out.lost_counts[1] == 8);
    in.lost = bad;
    assert_ok(spurion_codec_encode_sync(&wire, &f->m, &in));
    assert_refused(spurion_codec_decode_sync(&out, &f->m, wire), SPURION_INVALID_ARGUMENT, "lost");
    in.lost = good;
    in.last_sequence = 6;
    assert_ok(spurion_codec_encode_sync(&wire, &f->m, &in));
    assert_refused(spurion_codec_decode_sync(&out, &f->m, wire), SPURION_INVALID_ARGUMENT, "last_sequence");
}

static void test_codec_alert_fits_or_says_so(void **state)
{
    fixture *f = *state;
    char name[SPURION_NAME_BYTES_MAX + 1];
    spurion_alert a, out;
    spurion_bytes wire;

    memset(&a, 0, sizeof a);
    memset(name, 'n', sizeof name);
    name[SPURION_NAME_BYTES_MAX] = '\0';
    a.kind = SPURION_ALERT_KIND_RATE;
    a.seq = 9;
    a.run = a.rule = spurion_bytes_of(name);
    a.worst_count = 3;
    for (int i = 0; i < 3; i++) {
        a.worst[i].group = a.worst[i].id = spurion_bytes_of(name);
    }
    assert_refused(spurion_codec_encode_alert(&wire, &f->m, &a), SPURION_OUT_OF_RANGE, "1024");
    a.worst_count = 2;
    a.run_rate_lower = 0.25f;
    a.step_above = true;
    assert_ok(spurion_codec_encode_alert(&wire, &f->m, &a));
    assert_true(wire.size <= SPURION_ALERT_BYTES_MAX);
    assert_ok(spurion_codec_decode_alert(&out, &f->m, wire));
    assert_int_equal(out.worst_count, 2);
    assert_true(out.seq == 9 && out.run_rate_lower == 0.25f && out.step_above && !out.above);
}

static void test_codec_answers_come_back(void **state)
{
    fixture *f = *state;
    spurion_bytes rules[1] = {spurion_bytes_of("url")}, wire;
    spurion_row rows[2], *row = &rows[1];
    spurion_query_reply in = {rows, 2, spurion_bytes_of("cursor")}, out;
    spurion_counts_row counts[1];
    spurion_counts_reply counted = {SPURION_COUNTS_FEATURE, counts, 1, {NULL, 0}}, counted_out;
    spurion_range ranges[1] = {{4, 6}};
    spurion_sync_reply sync = {3, NULL, ranges, 0, 1, 2, 16}, sync_out;

    memset(rows, 0, sizeof rows);
    row->key.run = spurion_bytes_of("run");
    row->key.group = row->key.id = spurion_bytes_of("x");
    row->effect = -2;
    row->advantage.has = true;
    row->rules = rules;
    row->rule_count = 1;
    row->whole = true;
    assert_ok(spurion_codec_encode_query_reply(&wire, &f->m, &in));
    assert_ok(spurion_codec_decode_query_reply(&out, &f->m, wire));
    assert_int_equal(out.count, 2);
    assert_bytes(out.rows[1].rules[0], "url");
    assert_true(out.rows[1].advantage.has && !out.rows[1].effect_sd.has && out.rows[1].whole);
    assert_bytes(out.cursor, "cursor");
    memset(counts, 0, sizeof counts);
    counts[0].ref.sae = spurion_bytes_of("mid");
    counts[0].ref.index = 517;
    counts[0].step = -1;
    counts[0].effect_sum = 0.1;
    assert_ok(spurion_codec_encode_counts_reply(&wire, &f->m, &counted));
    assert_ok(spurion_codec_decode_counts_reply(&counted_out, &f->m, wire));
    assert_int_equal(counted_out.kind, SPURION_COUNTS_FEATURE);
    assert_true(counted_out.rows[0].ref.index == 517 && counted_out.rows[0].step == -1 && counted_out.rows[0].effect_sum == 0.1);
    assert_ok(spurion_codec_encode_sync_reply(&wire, &f->m, &sync));
    assert_ok(spurion_codec_decode_sync_reply(&sync_out, &f->m, wire));
    assert_int_equal(sync_out.missing_count, 0);
    assert_int_equal(sync_out.pending_count, 1);
    assert_true(sync_out.pending[0].last == 6 && sync_out.stored_through == 3 && sync_out.lost_rollouts == 16);
}

/* ---- hostile bytes ---- */

static void test_codec_limits_fields(void **state)
{
    fixture *f = *state;
    size_t n = SPURION_MESSAGE_FIELDS_MAX + 1;
    char *data = malloc(2 * n);
    spurion_bytes wire = {data, 2 * n};
    spurion_score out;

    for (size_t i = 0; i < n; i++) { /* empty rollouts: two bytes each on the wire, a hundred times that in memory */
        data[2 * i] = 1 << 3 | 2;
        data[2 * i + 1] = 0;
    }
    assert_refused(spurion_codec_decode_score(&out, &f->m, wire), SPURION_RESOURCE_EXHAUSTED, "65536");
    assert_true(f->arena.bytes_used < 4096); /* refused before anything was taken */
    wire.size = 2 * 5000;
    assert_refused(spurion_codec_decode_score(&out, &f->m, wire), SPURION_RESOURCE_EXHAUSTED, "4096");
    free(data);
}

static void test_codec_limits_memory(void **state)
{
    fixture *f = *state;
    size_t ids = 15u << 20, at = 0;
    char *data = calloc(1, ids + 64);
    spurion_bytes wire = {data, 0};
    spurion_rollout out;

    data[at++] = 9 << 3 | 2; /* completion_ids: one byte each here, four in memory */
    for (size_t n = ids; n > 0; n >>= 7) {
        data[at++] = (char)((n & 0x7f) | (n >= 0x80 ? 0x80 : 0));
    }
    wire.size = at + ids;
    assert_int_not_equal(spurion_codec_decode_rollout(&out, &f->m, wire).code, SPURION_OK);
    assert_true(f->arena.bytes_used <= SPURION_DECODE_BYTES_MAX + (1u << 20));
    spurion_arena_fini(&f->arena);
    spurion_arena_init(&f->arena, 1u << 20); /* and the caller's own budget holds as well */
    assert_refused(spurion_codec_decode_rollout(&out, &f->m, wire), SPURION_RESOURCE_EXHAUSTED, "memory");
    free(data);
}

static void test_codec_refuses_broken_bytes(void **state)
{
    fixture *f = *state;
    static const struct {
        const char *data;
        size_t size;
    } broken[] = {{"\x0a", 1}, {"\x0a\x05z", 3}, {"\x0b", 1}, {"\x00\x00", 2}, {"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", 11},
                  {"\x08\x01", 2}, {"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 11}};
    spurion_score out;

    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        spurion_bytes wire = {broken[i].data, broken[i].size};
        assert_int_equal(spurion_codec_decode_score(&out, &f->m, wire).code, SPURION_INVALID_ARGUMENT);
    }
}

static void test_codec_refuses_a_second_sub_message(void **state)
{
    fixture *f = *state;
    static const char twice[] = "\x0a\x00\x0a\x00\x12\x00"; /* Record.rollout, again, verdict */
    spurion_bytes wire = {twice, 6};
    spurion_record out;

    assert_refused(spurion_codec_decode_record(&out, &f->m, wire), SPURION_INVALID_ARGUMENT, "second");
}

static void test_codec_refuses_places_outside(void **state)
{
    fixture *f = *state;
    spurion_verdict v = a_verdict(), out;
    spurion_bytes wire;
    char *bad;
    size_t n;

    v.tokens = NULL;
    assert_ok(spurion_codec_encode_verdict(&wire, &f->m, &v));
    bad = malloc(wire.size + 8);
    memcpy(bad, wire.data, wire.size);
    n = wire.size;
    memcpy(bad + n, "\x9a\x02\x01\x09", 4); /* one more feature_sae (35, packed): place 9, and no partner in the other arrays */
    wire.data = bad;
    wire.size = n + 4;
    assert_refused(spurion_codec_decode_verdict(&out, &f->m, wire), SPURION_INVALID_ARGUMENT, "feature_");
    memcpy(bad + n, "\xe0\x02\x03", 3); /* label_verdict (44): one more, and no such verdict */
    wire.size = n + 3;
    assert_refused(spurion_codec_decode_verdict(&out, &f->m, wire), SPURION_INVALID_ARGUMENT, "label_verdict");
    free(bad);
}

static void test_codec_takes_unknown_fields(void **state)
{
    fixture *f = *state;
    static const char known[] = "\x08\x05\xa2\x06\x03new\xa8\x06\x07"; /* FillReply.taken = 5, and fields 100, 101 of a later version */
    spurion_bytes wire = {known, sizeof known - 1};
    spurion_fill_reply out;

    assert_ok(spurion_codec_decode_fill_reply(&out, &f->m, wire));
    assert_int_equal(out.taken, 5);
}

/* ---- checks ---- */

static void test_codec_utf8_is_rfc_3629(void **state)
{
    static const char *const good[] = {"", "a", "\xc2\x80", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xee\x80\x80", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"};
    static const char *const bad[] = {"\x80", "\xc0\xaf", "\xc1\xbf", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80",
                                      "\xf5\x80\x80\x80", "\xe2\x82", "\xff"};

    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_int_equal(spurion_utf8_valid_prefix(good[i], strlen(good[i])), strlen(good[i]));
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(spurion_utf8_valid_prefix(bad[i], strlen(bad[i])), 0);
    }
    assert_int_equal(spurion_utf8_valid_prefix("ab\xff", 3), 2);
}

static void test_codec_names_hold_no_controls(void **state)
{
    static const char nul[] = "a\0b";
    spurion_bytes with_nul = {nul, 3}, none = {NULL, 0};
    char longest[SPURION_NAME_BYTES_MAX + 2];

    (void)state;
    memset(longest, 'x', sizeof longest);
    longest[SPURION_NAME_BYTES_MAX + 1] = '\0';
    assert_refused(spurion_name_check(with_nul, "id"), SPURION_INVALID_ARGUMENT, "id");
    assert_refused(spurion_name_check(none, "run"), SPURION_INVALID_ARGUMENT, "run");
    assert_refused(spurion_name_check(spurion_bytes_of("\xc2\x85"), "id"), SPURION_INVALID_ARGUMENT, "control");
    assert_refused(spurion_name_check(spurion_bytes_of("\x7f"), "id"), SPURION_INVALID_ARGUMENT, "control");
    assert_refused(spurion_name_check(spurion_bytes_of(longest), "id"), SPURION_INVALID_ARGUMENT, "129");
    longest[SPURION_NAME_BYTES_MAX] = '\0';
    assert_ok(spurion_name_check(spurion_bytes_of(longest), "id"));
    assert_ok(spurion_name_check(spurion_bytes_of("\xc2\xa0 \xf0\x9f\x98\x80"), "id"));
}

static void test_codec_json_is_one_object(void **state)
{
    static const char *const good[] = {"{}", " { } ", "{\"a\":1}", "{\"a\":-0.5e+10,\"b\":[true,false,null,[],{}],\"c\":\"\\u00e9\\n\"}"};
    static const char *const bad[] = {"", "[]", "1", "{", "}", "{]", "{\"a\"}", "{\"a\":}", "{\"a\":1,}", "{,}", "{\"a\":01}", "{\"a\":1.}",
                                      "{\"a\":1} x", "{'a':1}", "{\"a\":[1,]}", "{\"a\":tru}", "{\"a\":\"\x01\"}", "{\"a\":\"\\x\"}",
                                      "{\"a\":\"\\u12g4\"}", "{}{}", "{\"a\":+1}", "{\"a\" 1}", "{a:1}", "{\"a\":[}"};
    char deep[256] = "{\"a\":";

    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_true(spurion_json_object_check(good[i], strlen(good[i])));
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        if (spurion_json_object_check(bad[i], strlen(bad[i]))) {
            fail_msg("expected a refusal of %s", bad[i]);
        }
    }
    memset(deep + 5, '[', 100);
    assert_false(spurion_json_object_check(deep, strlen(deep)));
}

static void test_codec_digest_is_of_the_content(void **state)
{
    unsigned char one[32], two[32];
    int32_t ids[] = {1, 2, 3};
    spurion_rollout r = a_rollout(), s = a_rollout();

    (void)state;
    s.id = spurion_bytes_of("another");
    s.group_size = 4;
    spurion_rollout_digest(one, &r);
    spurion_rollout_digest(two, &s);
    assert_memory_equal(one, two, 32);
    s.prompt = spurion_bytes_of("promptc"); /* the border between the texts counts */
    s.completion = spurion_bytes_of("ompletion");
    spurion_rollout_digest(two, &s);
    assert_memory_not_equal(one, two, 32);
    s = r;
    s.has_trainer_reward = true;
    spurion_rollout_digest(two, &s);
    assert_memory_not_equal(one, two, 32);
    memset(&r, 0, sizeof r);
    r.prompt_ids = ids;
    r.prompt_id_count = 1;
    r.completion_ids = ids + 1;
    r.completion_id_count = 2;
    spurion_rollout_digest(one, &r);
    r.prompt_id_count = 2;
    r.completion_ids = ids + 2;
    r.completion_id_count = 1;
    spurion_rollout_digest(two, &r);
    assert_memory_not_equal(one, two, 32);
}

int main(void)
{
#define T(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        T(test_codec_request_comes_back),
        T(test_codec_rollout_comes_back),
        T(test_codec_ids_come_back),
        T(test_codec_fixed_ids_are_the_same_rollout),
        T(test_codec_fixed_ids_are_checked),
        T(test_codec_fixed_ids_refuse_one_rollout),
        T(test_codec_verdict_comes_back),
        T(test_codec_record_comes_back),
        T(test_codec_joined_verdicts_are_a_score_reply),
        T(test_codec_refused_verdict_has_no_numbers),
        T(test_codec_refuses_one_rollout_not_its_message),
        T(test_codec_tap_keeps_to_its_run),
        T(test_codec_sync_wants_ascending_ranges),
        T(test_codec_alert_fits_or_says_so),
        T(test_codec_answers_come_back),
        T(test_codec_limits_fields),
        T(test_codec_limits_memory),
        T(test_codec_refuses_broken_bytes),
        T(test_codec_refuses_a_second_sub_message),
        T(test_codec_refuses_places_outside),
        T(test_codec_takes_unknown_fields),
        T(test_codec_utf8_is_rfc_3629),
        T(test_codec_names_hold_no_controls),
        T(test_codec_json_is_one_object),
        T(test_codec_digest_is_of_the_content),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

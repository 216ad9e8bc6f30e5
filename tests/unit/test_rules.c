/* Rules: thresholds over float32 values, directions, flips, families, advantages; what must not depend on order or on refused members. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

#include "daemon/rules.h"

#define MEMBERS_MAX 64

/* Catalogue: features 0..3 of one SAE; sets: 0 = debias {0,1,2}, 1 = family "url" {0,3}, 2 = family "thanks" {1}, 3 = all detect {0,1,3}. */
typedef struct fixture {
    spurion_config config;
    spurion_rule_config rules[4];
    spurion_catalogue catalogue;
    spurion_job jobs[MEMBERS_MAX], *pointers[MEMBERS_MAX];
    float effects[MEMBERS_MAX][4], rewards[MEMBERS_MAX][4];
    bool active[MEMBERS_MAX][4];
    int count;
} fixture;

static const int32_t members0[] = {0, 1, 2}, members1[] = {0, 3}, members2[] = {1}, members3[] = {0, 1, 3};
static const spurion_ablation_set sets[] = {{members0, 3}, {members1, 2}, {members2, 1}, {members3, 3}};
static const spurion_catalogue_entry entries[] = {{.sae = 0, .index = 5}, {.sae = 0, .index = 6}, {.sae = 1, .index = 2}, {.sae = 1, .index = 4}};
static const spurion_bytes families[] = {{"url", 3}, {"thanks", 6}};
static const int32_t family_sets[] = {1, 2};
static int32_t rule_sets[4];
static const int32_t all_active[] = {0, 1, 3};

static void begin(fixture *f)
{
    memset(f, 0, sizeof *f);
    f->config.saes[0].id = "mid";
    f->config.saes[1].id = "late";
    f->config.sae_count = 2;
    f->config.rules = f->rules;
    f->config.reward.trainer_tolerance = 0.02;
    f->catalogue = (spurion_catalogue){.entries = entries, .entry_count = 4, .families = families, .family_count = 2, .sets = sets,
                                       .set_count = 4, .family_sets = family_sets, .rule_sets = rule_sets};
}

/* A member whose counterfactual reward and whose every set have the same effect. */
static spurion_job *add(fixture *f, float reward, float ablated)
{
    int i = f->count++;
    spurion_job *job = &f->jobs[i];

    spurion_job_init(job, 0);
    job->verdict.reward = reward;
    job->verdict.counterfactual_reward = ablated;
    job->verdict.effect = ablated - reward;
    for (int s = 0; s < 4; s++) {
        f->effects[i][s] = ablated - reward;
        f->rewards[i][s] = ablated;
        f->active[i][s] = true;
    }
    job->set_effects = f->effects[i];
    job->set_rewards = f->rewards[i];
    job->set_active = f->active[i];
    job->active_entries = all_active;
    job->active_count = 3;
    f->pointers[i] = job;
    return job;
}

static void rule(fixture *f, spurion_rule_config r, int32_t set)
{
    rule_sets[f->config.rule_count] = set;
    f->rules[f->config.rule_count++] = r;
}

static void apply(fixture *f)
{
    spurion_status st = spurion_rules_apply(f->pointers, f->count, &f->config, &f->catalogue);
    assert_string_equal(st.message, "");
}

static void end(fixture *f)
{
    for (int i = 0; i < f->count; i++) {
        spurion_job_fini(&f->jobs[i]);
    }
}

static void test_rules_compare_thresholds_inclusively_in_float64(void **state)
{
    fixture f;

    (void)state;
    begin(&f);
    rule(&f, (spurion_rule_config){.id = "equal", .has_effect_min = true, .effect_min = 0.5}, 3);
    rule(&f, (spurion_rule_config){.id = "decimal", .has_effect_min = true, .effect_min = 0.1}, 3);
    add(&f, 1.0f, 0.5f);  /* effect exactly -0.5 */
    add(&f, 0.0f, 0.1f);  /* float32 0.1 = 0.100000001..., above the double 0.1 */
    add(&f, 0.0f, nextafterf(0.1f, 0));
    f.effects[1][3] = 0.1f;
    apply(&f);
    assert_int_equal(f.jobs[0].verdict.flag_count, 2);
    assert_int_equal(f.jobs[1].verdict.flag_count, 1);
    assert_string_equal(f.jobs[1].verdict.flags[0].rule.data, "decimal");
    assert_int_equal(f.jobs[2].verdict.flag_count, 0);
    end(&f);
}

static void test_rules_sd_threshold_looks_at_the_float32_quotient(void **state)
{
    fixture f;
    float in_sd = (float)(0.3f / 1.9);

    (void)state;
    begin(&f);
    f.config.reward.has_sd = true;
    f.config.reward.sd = 1.9;
    rule(&f, (spurion_rule_config){.id = "at", .has_effect_sd_min = true, .effect_sd_min = (double)in_sd}, 3);
    rule(&f, (spurion_rule_config){.id = "above", .has_effect_sd_min = true, .effect_sd_min = (double)nextafterf(in_sd, 1)}, 3);
    add(&f, 0.0f, 0.3f);
    apply(&f);
    assert_int_equal(f.jobs[0].verdict.flag_count, 1);
    assert_string_equal(f.jobs[0].verdict.flags[0].rule.data, "at");
    assert_true(f.jobs[0].verdict.effect_sd.has && f.jobs[0].verdict.effect_sd.value == in_sd);
    end(&f);
}

static void test_rules_direction_is_what_the_features_did(void **state)
{
    fixture f;

    (void)state;
    begin(&f);
    rule(&f, (spurion_rule_config){.id = "raised", .direction = SPURION_RAISED, .has_effect_min = true}, 3);
    rule(&f, (spurion_rule_config){.id = "lowered", .direction = SPURION_LOWERED, .has_effect_min = true}, 3);
    rule(&f, (spurion_rule_config){.id = "either", .has_effect_min = true}, 3);
    add(&f, 1.0f, 0.5f); /* removal lowers the reward: the features raised it */
    add(&f, 1.0f, 1.5f);
    add(&f, 1.0f, 1.0f);
    apply(&f);
    assert_int_equal(f.jobs[0].verdict.flag_count, 2);
    assert_string_equal(f.jobs[0].verdict.flags[0].rule.data, "raised");
    assert_int_equal(f.jobs[1].verdict.flag_count, 2);
    assert_string_equal(f.jobs[1].verdict.flags[0].rule.data, "lowered");
    assert_int_equal(f.jobs[2].verdict.flag_count, 1); /* effect 0 is neither raised nor lowered */
    assert_string_equal(f.jobs[2].verdict.flags[0].rule.data, "either");
    end(&f);
}

static void test_rules_need_every_condition_and_an_active_feature(void **state)
{
    fixture f;

    (void)state;
    begin(&f);
    rule(&f, (spurion_rule_config){.id = "both", .has_effect_min = true, .effect_min = 0.1, .advantage_flip = true}, 3);
    add(&f, 2.0f, 0.0f);  /* flips from +1 to below the mean */
    add(&f, 0.0f, 3.0f);  /* flips the other way */
    apply(&f);
    assert_int_equal(f.jobs[0].verdict.flag_count, 1);
    assert_int_equal(f.jobs[1].verdict.flag_count, 1);
    f.active[1][3] = false;
    apply(&f);
    assert_int_equal(f.jobs[0].verdict.flag_count, 1);
    assert_int_equal(f.jobs[1].verdict.flag_count, 0);
    f.rules[0].effect_min = 2.5; /* the first's effect is 2 */
    apply(&f);
    assert_int_equal(f.jobs[0].verdict.flag_count, 0);
    end(&f);
}

static void test_rules_flip_uses_that_rules_own_effects(void **state)
{
    fixture f;

    (void)state;
    begin(&f);
    rule(&f, (spurion_rule_config){.id = "url", .advantage_flip = true}, 1);
    rule(&f, (spurion_rule_config){.id = "all", .advantage_flip = true}, 3);
    add(&f, 2.0f, 0.0f);
    add(&f, 0.0f, 3.0f);
    for (int i = 0; i < 2; i++) { /* the family alone changes nothing */
        f.effects[i][1] = 0;
        f.rewards[i][1] = f.jobs[i].verdict.reward;
    }
    apply(&f);
    assert_int_equal(f.jobs[0].verdict.flag_count, 1);
    assert_string_equal(f.jobs[0].verdict.flags[0].rule.data, "all");
    assert_true(f.jobs[0].verdict.advantage_flip);
    end(&f);
}

static void test_rules_flags_list_the_rules_active_features(void **state)
{
    fixture f;
    const spurion_flag *flag;

    (void)state;
    begin(&f);
    rule(&f, (spurion_rule_config){.id = "url", .has_effect_min = true}, 1);
    add(&f, 1.0f, 0.25f);
    apply(&f);
    flag = &f.jobs[0].verdict.flags[0];
    assert_true(flag->effect == -0.75f);
    assert_int_equal(flag->feature_count, 2); /* of {0, 3}, all active; 1 is active and not of this rule */
    assert_string_equal(flag->features[0].sae.data, "mid");
    assert_int_equal(flag->features[0].index, 5);
    assert_string_equal(flag->features[1].sae.data, "late");
    assert_int_equal(flag->features[1].index, 4);
    f.jobs[0].active_count = 2; /* {0, 1} */
    apply(&f);
    assert_int_equal(f.jobs[0].verdict.flags[0].feature_count, 1);
    end(&f);
}

static void test_rules_families_appear_where_a_feature_is_active(void **state)
{
    fixture f;

    (void)state;
    begin(&f);
    add(&f, 1.0f, 0.5f);
    f.active[0][1] = false;
    f.effects[0][2] = 0.125f;
    apply(&f);
    assert_int_equal(f.jobs[0].verdict.family_count, 1);
    assert_string_equal(f.jobs[0].verdict.families[0].family.data, "thanks");
    assert_true(f.jobs[0].verdict.families[0].effect == 0.125f);
    end(&f);
}

static void test_rules_advantages_are_null_in_a_group_of_one(void **state)
{
    fixture f;
    spurion_status why = spurion_error(SPURION_OUT_OF_RANGE, "too long");

    (void)state;
    begin(&f);
    rule(&f, (spurion_rule_config){.id = "flip", .advantage_flip = true}, 3);
    add(&f, 1.0f, -1.0f);
    spurion_job_refuse(add(&f, 100.0f, 100.0f), &why); /* a refused member is not in the means */
    apply(&f);
    assert_false(f.jobs[0].verdict.advantage.has || f.jobs[0].verdict.counterfactual_advantage.has);
    assert_int_equal(f.jobs[0].verdict.flag_count, 0);
    assert_int_equal(f.jobs[1].verdict.code, SPURION_OUT_OF_RANGE);
    assert_string_equal(f.jobs[1].verdict.message.data, "too long");
    add(&f, 3.0f, -1.0f);
    apply(&f);
    assert_true(f.jobs[0].verdict.advantage.has);
    assert_true(f.jobs[0].verdict.advantage.value == -1.0f);
    assert_true(f.jobs[2].verdict.advantage.value == 1.0f);
    assert_true(f.jobs[0].verdict.counterfactual_advantage.value == 0.0f);
    end(&f);
}

static void test_rules_equal_rewards_never_flip(void **state)
{
    (void)state;
    for (int size = 2; size <= 9; size++) { /* a float32 mean would be off for many of these */
        for (int k = 0; k < 50; k++) {
            fixture f;
            float reward = 0.1f + 0.37f * (float)k;
            begin(&f);
            for (int i = 0; i < size; i++) {
                add(&f, reward, 0.7f * (float)(i + k));
            }
            apply(&f);
            for (int i = 0; i < size; i++) {
                assert_true(f.jobs[i].verdict.advantage.value == 0.0f);
                assert_false(f.jobs[i].verdict.advantage_flip);
            }
            end(&f);
        }
    }
}

static uint32_t next(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

static void test_rules_order_of_members_changes_no_bit(void **state)
{
    fixture f;
    spurion_verdict before[MEMBERS_MAX];
    uint32_t seed = 7;

    (void)state;
    begin(&f);
    rule(&f, (spurion_rule_config){.id = "flip", .advantage_flip = true}, 3);
    for (int i = 0; i < MEMBERS_MAX; i++) { /* magnitudes from 1e-6 to 1e6, so that sums round */
        float scale = powf(10.0f, (float)(next(&seed) % 13) - 6.0f);
        add(&f, scale * (float)(next(&seed) % 1000), scale * (float)(next(&seed) % 1000));
    }
    apply(&f);
    for (int i = 0; i < MEMBERS_MAX; i++) {
        before[i] = f.jobs[i].verdict;
    }
    for (int round = 0; round < 20; round++) {
        for (int i = MEMBERS_MAX - 1; i > 0; i--) {
            int k = (int)(next(&seed) % (uint32_t)(i + 1));
            spurion_job *keep = f.pointers[i];
            f.pointers[i] = f.pointers[k];
            f.pointers[k] = keep;
        }
        apply(&f);
        for (int i = 0; i < MEMBERS_MAX; i++) {
            const spurion_verdict *v = &f.jobs[i].verdict;
            assert_memory_equal(&v->advantage.value, &before[i].advantage.value, sizeof(float));
            assert_memory_equal(&v->counterfactual_advantage.value, &before[i].counterfactual_advantage.value, sizeof(float));
            assert_int_equal(v->advantage_flip, before[i].advantage_flip);
            assert_int_equal(v->flag_count, before[i].flag_count);
        }
    }
    end(&f);
}

static void test_rules_refuse_numbers_that_are_none(void **state)
{
    fixture f;

    (void)state;
    begin(&f);
    add(&f, 1.0f, 2.0f);
    add(&f, NAN, 2.0f);
    add(&f, 3.0f, 2.0f);
    apply(&f);
    assert_int_equal(f.jobs[1].verdict.code, SPURION_INTERNAL);
    assert_int_equal(f.jobs[0].verdict.code, SPURION_OK);
    assert_true(f.jobs[0].verdict.advantage.value == -1.0f);
    end(&f);
}

static void test_rules_warn_of_split_groups_and_other_rewards(void **state)
{
    fixture f;

    (void)state;
    begin(&f);
    add(&f, 1.0f, 1.0f)->group_split = true;
    add(&f, 1.0f, 1.0f)->rollout = (spurion_rollout){.has_trainer_reward = true, .trainer_reward = 1.0625f};
    add(&f, 1.0f, 1.0f)->rollout = (spurion_rollout){.has_trainer_reward = true, .trainer_reward = 1.015625f};
    apply(&f);
    assert_int_equal(f.jobs[0].verdict.warnings, SPURION_WARN_GROUP_SPLIT);
    assert_int_equal(f.jobs[1].verdict.warnings, SPURION_WARN_TRAINER_REWARD_DIFFERS);
    assert_int_equal(f.jobs[2].verdict.warnings, 0);
    end(&f);
}

static void test_rules_ask_for_the_strongest_action(void **state)
{
    fixture f;
    const spurion_verdict *v;

    (void)state;
    begin(&f);
    rule(&f, (spurion_rule_config){.id = "log", .has_effect_min = true, .effect_min = 0.25, .action = SPURION_RULE_LOG}, 3);
    rule(&f, (spurion_rule_config){.id = "drop", .has_effect_min = true, .effect_min = 4, .action = SPURION_RULE_DROP}, 3);
    rule(&f, (spurion_rule_config){.id = "half", .has_effect_min = true, .effect_min = 1, .action = SPURION_RULE_DOWN_WEIGHT, .weight = 0.5}, 3);
    rule(&f, (spurion_rule_config){.id = "tenth", .has_effect_min = true, .effect_min = 2, .action = SPURION_RULE_DOWN_WEIGHT, .weight = 0.125}, 3);
    add(&f, 0.0f, 0.0f);
    add(&f, 1.0f, 0.5f);
    add(&f, 1.0f, 0.0f);
    add(&f, 3.0f, 1.0f);
    add(&f, 9.0f, 1.0f);
    apply(&f);
    v = &f.jobs[0].verdict;
    assert_int_equal(v->action, SPURION_ACTION_NONE);
    assert_null(v->action_rule.data);
    assert_true(v->action_weight == 1 && v->action_reward == 0);
    assert_int_equal(f.jobs[1].verdict.action, SPURION_ACTION_LOG);
    assert_string_equal(f.jobs[1].verdict.action_rule.data, "log");
    assert_string_equal(f.jobs[2].verdict.action_rule.data, "half");
    assert_true(f.jobs[2].verdict.action_weight == 0.5f);
    assert_string_equal(f.jobs[3].verdict.action_rule.data, "tenth"); /* of two weights the smaller */
    assert_true(f.jobs[3].verdict.action_weight == 0.125f);
    v = &f.jobs[4].verdict;
    assert_int_equal(v->action, SPURION_ACTION_DROP);
    assert_true(v->action_weight == 0 && !v->action_advantage.has && v->advantage.has);
    /* mean of what is left: (0 + 1 + 0.5 * 1 + 0.125 * 3) / 2.625 */
    assert_true(f.jobs[3].verdict.action_advantage.value == (float)(3.0 - 1.875 / 2.625));
    assert_true(f.jobs[0].verdict.action_advantage.value == (float)(0.0 - 1.875 / 2.625));
    end(&f);
}

static void test_rules_replace_counts_in_the_group(void **state)
{
    fixture f;

    (void)state;
    begin(&f);
    rule(&f, (spurion_rule_config){.id = "replace", .has_effect_min = true, .effect_min = 1, .action = SPURION_RULE_REPLACE}, 3);
    add(&f, 4.0f, 1.0f);
    add(&f, 2.0f, 2.0f);
    apply(&f);
    assert_int_equal(f.jobs[0].verdict.action, SPURION_ACTION_REPLACE);
    assert_true(f.jobs[0].verdict.action_reward == 1 && f.jobs[0].verdict.action_weight == 1);
    assert_true(f.jobs[0].verdict.advantage.value == 1 && f.jobs[0].verdict.action_advantage.value == -0.5f);
    assert_true(f.jobs[1].verdict.advantage.value == -1 && f.jobs[1].verdict.action_advantage.value == 0.5f);
    end(&f);
}

static void test_rules_without_actions_leave_the_advantages(void **state)
{
    fixture f;

    (void)state;
    begin(&f);
    rule(&f, (spurion_rule_config){.id = "a", .has_effect_min = true, .effect_min = 0.1, .action = SPURION_RULE_ALERT}, 3);
    add(&f, 0.1f, 0.7f);
    add(&f, 0.2f, 0.2f);
    add(&f, 0.7f, 0.2f);
    apply(&f);
    for (int i = 0; i < 3; i++) {
        const spurion_verdict *v = &f.jobs[i].verdict;
        assert_memory_equal(&v->advantage.value, &v->action_advantage.value, sizeof v->advantage.value);
        assert_int_equal(v->action, i == 1 ? SPURION_ACTION_NONE : SPURION_ACTION_ALERT);
    }
    end(&f);
}

static void test_rules_one_that_is_left_has_no_advantage(void **state)
{
    fixture f;

    (void)state;
    begin(&f);
    rule(&f, (spurion_rule_config){.id = "d", .has_effect_min = true, .effect_min = 1, .action = SPURION_RULE_DROP}, 3);
    add(&f, 4.0f, 1.0f);
    add(&f, 2.0f, 2.0f);
    apply(&f);
    assert_false(f.jobs[0].verdict.action_advantage.has);
    assert_false(f.jobs[1].verdict.action_advantage.has);
    assert_true(f.jobs[1].verdict.advantage.has);
    end(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rules_compare_thresholds_inclusively_in_float64),
        cmocka_unit_test(test_rules_sd_threshold_looks_at_the_float32_quotient),
        cmocka_unit_test(test_rules_direction_is_what_the_features_did),
        cmocka_unit_test(test_rules_need_every_condition_and_an_active_feature),
        cmocka_unit_test(test_rules_flip_uses_that_rules_own_effects),
        cmocka_unit_test(test_rules_flags_list_the_rules_active_features),
        cmocka_unit_test(test_rules_families_appear_where_a_feature_is_active),
        cmocka_unit_test(test_rules_advantages_are_null_in_a_group_of_one),
        cmocka_unit_test(test_rules_equal_rewards_never_flip),
        cmocka_unit_test(test_rules_order_of_members_changes_no_bit),
        cmocka_unit_test(test_rules_refuse_numbers_that_are_none),
        cmocka_unit_test(test_rules_ask_for_the_strongest_action),
        cmocka_unit_test(test_rules_replace_counts_in_the_group),
        cmocka_unit_test(test_rules_without_actions_leave_the_advantages),
        cmocka_unit_test(test_rules_one_that_is_left_has_no_advantage),
        cmocka_unit_test(test_rules_warn_of_split_groups_and_other_rewards),
    };
    return cmocka_run_group_tests_name("rules", tests, NULL, NULL);
}

/* From measured effects to flags and advantages; see rules.h. Pure but for the arenas. Formulas: docs/verdict.md section 3. */
#include "daemon/rules.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/check.h"

/* One member's advantage before and after the removal of one set. */
typedef struct advantage {
    bool has;
    double clean, counterfactual;
    bool flip;
} advantage;

static spurion_status no_memory(void)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected memory for the rules' results, found the rollout's budget spent");
}

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

/* Mean in float64 over float32 values, added in ascending order, so that the order of a group's members changes nothing.
 * Sorts values. */
static double mean(float *values, int count)
{
    double sum = 0;

    qsort(values, (size_t)count, sizeof *values, by_value);
    for (int i = 0; i < count; i++) {
        sum += (double)values[i];
    }
    return sum / count;
}

static float set_reward(const spurion_job *job, int32_t set)
{
    if (job->set_rewards) {
        return job->set_rewards[set];
    }
    return (float)((double)job->verdict.reward + (double)job->set_effects[set]);
}

/* Advantages of the judged members (count) for one set; set < 0: the counterfactual reward's own. scratch (count). */
static void advantages(advantage *out, spurion_job *const *judged, int count, int32_t set, float *scratch)
{
    double before, after;

    memset(out, 0, (size_t)count * sizeof *out);
    if (count < 2) {
        return;
    }
    for (int i = 0; i < count; i++) {
        scratch[i] = judged[i]->verdict.reward;
    }
    before = mean(scratch, count);
    for (int i = 0; i < count; i++) {
        scratch[i] = set < 0 ? judged[i]->verdict.counterfactual_reward : set_reward(judged[i], set);
    }
    after = mean(scratch, count);
    for (int i = 0; i < count; i++) {
        const spurion_verdict *v = &judged[i]->verdict;
        float reward = set < 0 ? v->counterfactual_reward : set_reward(judged[i], set);
        out[i].has = true;
        out[i].clean = (double)v->reward - before;
        out[i].counterfactual = (double)reward - after;
        out[i].flip = out[i].clean * out[i].counterfactual < 0;
    }
}

/* ---- what is asked for ---- */

/* A reward and what it counts in its group. */
typedef struct share {
    float reward, weight;
} share;

static int by_reward(const void *a, const void *b)
{
    const share *x = a, *y = b;
    return x->reward != y->reward ? (x->reward < y->reward ? -1 : 1) : x->weight < y->weight ? -1 : x->weight > y->weight;
}

/* The strongest action of the flags so far, of equal ones the first; of two weights the smaller. */
static void ask_for(spurion_verdict *v, const spurion_rule_config *rule)
{
    spurion_action action = (spurion_action)(rule->action + 1);
    float weight = action == SPURION_ACTION_DROP ? 0.0f : action == SPURION_ACTION_DOWN_WEIGHT ? (float)rule->weight : 1.0f;

    if (action > v->action || (action == v->action && weight < v->action_weight)) {
        v->action = action;
        v->action_rule = (spurion_bytes){rule->id, strlen(rule->id)};
        v->action_weight = weight;
        v->action_reward = action == SPURION_ACTION_REPLACE ? v->counterfactual_reward : v->reward;
    }
}

/* Advantages in the group as it is after the actions: rewards replaced, the mean weighted, dropped members out. With no action they are the
 * clean ones, to the bit. shares (count): scratch. */
static void act(spurion_job *const *judged, int count, share *shares)
{
    double sum = 0, weights = 0;
    bool changed = false;
    int left = 0;

    for (int i = 0; i < count; i++) {
        const spurion_verdict *v = &judged[i]->verdict;
        changed = changed || v->action > SPURION_ACTION_ALERT;
        shares[i] = (share){v->action_reward, v->action_weight};
        left += v->action_weight > 0;
    }
    if (!changed) {
        for (int i = 0; i < count; i++) {
            judged[i]->verdict.action_advantage = judged[i]->verdict.advantage;
        }
        return;
    }
    qsort(shares, (size_t)count, sizeof *shares, by_reward);
    for (int i = 0; i < count; i++) {
        sum += (double)shares[i].weight * (double)shares[i].reward;
        weights += (double)shares[i].weight;
    }
    for (int i = 0; i < count; i++) {
        spurion_verdict *v = &judged[i]->verdict;
        bool has = left >= 2 && v->action_weight > 0;
        v->action_advantage = (spurion_opt_float){has, has ? (float)((double)v->action_reward - sum / weights) : 0.0f};
    }
}

/* Whether all the conditions that the rule names hold. Thresholds: float64 over the float32 values, inclusive. */
static bool fires(const spurion_rule_config *rule, const spurion_config *config, float effect, const advantage *pair)
{
    if ((rule->direction == SPURION_RAISED && !(effect < 0)) || (rule->direction == SPURION_LOWERED && !(effect > 0))) {
        return false;
    }
    if (rule->has_effect_min && !(fabs((double)effect) >= rule->effect_min)) {
        return false;
    }
    if (rule->has_effect_sd_min) {
        float in_sd = (float)((double)effect / config->reward.sd);
        if (!(fabs((double)in_sd) >= rule->effect_sd_min)) {
            return false;
        }
    }
    return !rule->advantage_flip || (pair->has && pair->flip);
}

/* The set's active features by (SAE order, index): both lists ascend in the order of the catalogue. */
static spurion_status active_features(spurion_flag *flag, spurion_job *job, const spurion_config *config, const spurion_catalogue *catalogue,
                                      const spurion_ablation_set *set)
{
    int32_t most = set->count < job->active_count ? set->count : job->active_count, count = 0, a = 0;
    spurion_feature_ref *refs = spurion_arena_take_array(&job->arena, (size_t)most, sizeof *refs);

    if (!refs) {
        return no_memory();
    }
    for (int32_t s = 0; s < set->count; s++) {
        while (a < job->active_count && job->active_entries[a] < set->entries[s]) {
            a++;
        }
        if (a < job->active_count && job->active_entries[a] == set->entries[s]) {
            const spurion_catalogue_entry *e = &catalogue->entries[set->entries[s]];
            const char *id = config->saes[e->sae].id;
            refs[count++] = (spurion_feature_ref){{id, strlen(id)}, e->index};
        }
    }
    flag->features = refs;
    flag->feature_count = count;
    return spurion_ok();
}

/* Adds the flag of a rule that fires to the verdict, whose flags have room for every rule. */
static spurion_status add_flag(spurion_job *job, const spurion_config *config, const spurion_catalogue *catalogue, int32_t rule)
{
    spurion_verdict *v = &job->verdict;
    int32_t set = catalogue->rule_sets[rule];
    spurion_flag *flags = (spurion_flag *)v->flags, *flag; /* ours: taken below */

    if (!flags) {
        flags = spurion_arena_take_array(&job->arena, (size_t)config->rule_count, sizeof *flags);
        if (!flags) {
            return no_memory();
        }
        v->flags = flags;
    }
    ask_for(v, &config->rules[rule]);
    flag = &flags[v->flag_count++];
    flag->rule = (spurion_bytes){config->rules[rule].id, strlen(config->rules[rule].id)};
    flag->effect = job->set_effects[set];
    return active_features(flag, job, config, catalogue, &catalogue->sets[set]);
}

static spurion_status families(spurion_job *job, const spurion_catalogue *catalogue)
{
    spurion_verdict *v = &job->verdict;
    spurion_family_effect *out = spurion_arena_take_array(&job->arena, (size_t)catalogue->family_count, sizeof *out);

    if (!out) {
        return no_memory();
    }
    v->families = out;
    v->family_count = 0;
    for (int32_t f = 0; f < catalogue->family_count; f++) {
        int32_t set = catalogue->family_sets[f];
        if (job->set_active[set]) {
            out[v->family_count++] = (spurion_family_effect){catalogue->families[f], job->set_effects[set]};
        }
    }
    return spurion_ok();
}

static void own_numbers(spurion_job *job, const spurion_config *config, const advantage *pair)
{
    spurion_verdict *v = &job->verdict;

    v->effect_sd = (spurion_opt_float){config->reward.has_sd, 0};
    if (config->reward.has_sd) {
        v->effect_sd.value = (float)((double)v->effect / config->reward.sd);
    }
    v->advantage = (spurion_opt_float){pair->has, (float)pair->clean};
    v->counterfactual_advantage = (spurion_opt_float){pair->has, (float)pair->counterfactual};
    v->advantage_flip = pair->flip;
    if (job->group_split) {
        v->warnings |= SPURION_WARN_GROUP_SPLIT;
    }
    if (job->rollout.has_trainer_reward &&
        fabs((double)job->rollout.trainer_reward - (double)v->reward) > config->reward.trainer_tolerance) {
        v->warnings |= SPURION_WARN_TRAINER_REWARD_DIFFERS;
    }
}

/* A number that is none must not reach the others' means. */
static bool finite_or_refused(spurion_job *job, const spurion_catalogue *catalogue)
{
    const spurion_verdict *v = &job->verdict;
    bool finite = isfinite(v->reward) && isfinite(v->counterfactual_reward) && isfinite(v->effect);

    for (int32_t s = 0; s < catalogue->set_count && finite; s++) {
        finite = isfinite(job->set_effects[s]);
    }
    if (!finite) {
        spurion_status st = spurion_error(SPURION_INTERNAL, "expected finite rewards, found %g (counterfactual %g)", (double)v->reward,
                                          (double)v->counterfactual_reward);
        spurion_job_refuse(job, &st);
    }
    return finite;
}

static spurion_status apply(spurion_job **judged, int count, const spurion_config *config, const spurion_catalogue *catalogue,
                            advantage *pairs, float *scratch, share *shares)
{
    spurion_status st = spurion_ok();

    advantages(pairs, judged, count, -1, scratch);
    for (int i = 0; i < count; i++) {
        judged[i]->verdict.flags = NULL;
        judged[i]->verdict.flag_count = 0;
        judged[i]->verdict.action = SPURION_ACTION_NONE;
        judged[i]->verdict.action_rule = (spurion_bytes){NULL, 0};
        judged[i]->verdict.action_reward = judged[i]->verdict.reward;
        judged[i]->verdict.action_weight = 1;
        own_numbers(judged[i], config, &pairs[i]);
        SPURION_TRY(st, families(judged[i], catalogue));
    }
    for (int32_t r = 0; r < config->rule_count; r++) {
        int32_t set = catalogue->rule_sets[r];
        if (config->rules[r].advantage_flip) {
            advantages(pairs, judged, count, set, scratch);
        }
        for (int i = 0; i < count; i++) {
            if (judged[i]->set_active[set] && fires(&config->rules[r], config, judged[i]->set_effects[set], &pairs[i])) {
                SPURION_TRY(st, add_flag(judged[i], config, catalogue, r));
            }
        }
    }
    act(judged, count, shares);
out:
    return st;
}

spurion_status spurion_rules_apply(spurion_job *const *jobs, int job_count, const spurion_config *config, const spurion_catalogue *catalogue)
{
    size_t room = (size_t)(job_count > 0 ? job_count : 1);
    spurion_job **judged = calloc(room, sizeof *judged);
    advantage *pairs = malloc(room * sizeof *pairs);
    float *scratch = malloc(room * sizeof *scratch);
    share *shares = malloc(room * sizeof *shares);
    spurion_status st;
    int count = 0;

    if (!judged || !pairs || !scratch || !shares) {
        st = no_memory();
        goto out;
    }
    for (int i = 0; i < job_count; i++) {
        SPURION_ASSERT(jobs[i]->group_number == jobs[0]->group_number);
        if (jobs[i]->verdict.code == SPURION_OK && finite_or_refused(jobs[i], catalogue)) {
            judged[count++] = jobs[i];
        }
    }
    st = apply(judged, count, config, catalogue, pairs, scratch, shares);
out:
    free(judged);
    free(pairs);
    free(scratch);
    free(shares);
    return st;
}

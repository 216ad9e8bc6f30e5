/* spurion show: one rollout with its evidence. See cli.h. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"

static int usage(const cli *c)
{
    cli_say("show: expected RUN STEP GROUP ID or RUN/STEP/GROUP/ID, found '%s'%s", c->args[0], c->arg_count > 1 ? " ..." : "");
    return CLI_USAGE;
}

/* RUN STEP GROUP ID, or the four joined by slashes (then only the id may hold one). */
static int read_key(spurion_key *k, const cli *c)
{
    const char *step = c->args[1], *text = c->args[0], *slash[3] = {NULL, NULL, NULL};
    int64_t attempt = 0;
    char *end;
    int status;

    memset(k, 0, sizeof *k);
    if ((status = cli_whole(&attempt, c, OPT_ATTEMPT, 0, INT32_MAX)) != CLI_OK) {
        return status;
    }
    k->attempt = (int32_t)attempt;
    if (c->arg_count == 4) {
        k->run = cli_bytes(c->args[0]);
        k->group = cli_bytes(c->args[2]);
        k->id = cli_bytes(c->args[3]);
    } else if (c->arg_count == 1) {
        for (int i = 0; i < 3; i++) {
            slash[i] = text ? strchr(text, '/') : NULL;
            text = slash[i] ? slash[i] + 1 : NULL;
        }
        if (!slash[2]) {
            return usage(c);
        }
        step = slash[0] + 1;
        k->run = (spurion_bytes){c->args[0], (size_t)(slash[0] - c->args[0])};
        k->group = (spurion_bytes){slash[1] + 1, (size_t)(slash[2] - slash[1]) - 1};
        k->id = cli_bytes(slash[2] + 1);
    } else {
        return usage(c);
    }
    k->step = strtoll(step, &end, 10);
    return end == step || (*end && *end != '/') || k->step < 0 ? usage(c) : CLI_OK;
}

/* --- the text --- */

static float largest(const float *values, int32_t count)
{
    float max = 0;
    for (int32_t i = 0; i < count; i++) {
        max = fabsf(values[i]) > max ? fabsf(values[i]) : max;
    }
    return max;
}

/* Which values to shade by: of --rule, else of all features; of --sae, else of the SAE with the largest token. *sae -1: none are there. */
static int choose(const float **values, int32_t *sae, const cli *c, const spurion_verdict *v)
{
    const spurion_tokens *k = v->tokens;
    const float *all = k->attribution;
    int32_t rule = 0;

    *sae = -1;
    if (c->value[OPT_RULE]) {
        while (rule < v->flag_count && !cli_same(v->flags[rule].rule, cli_bytes(c->value[OPT_RULE]))) {
            rule++;
        }
        if (rule >= v->flag_count || rule >= k->flagged_count) {
            cli_say("show: expected a rule that fired on this rollout, found '%s'", c->value[OPT_RULE]);
            return CLI_NOTHING;
        }
        all = k->flagged ? k->flagged + (size_t)rule * (size_t)k->sae_count * (size_t)k->count : NULL;
    }
    for (int32_t s = 0; s < k->sae_count && all; s++) {
        const float *own = all + (size_t)s * (size_t)k->count;
        bool named = c->value[OPT_SAE] && s < v->sae_count && cli_same(v->saes[s].sae, cli_bytes(c->value[OPT_SAE]));
        if (named || (!c->value[OPT_SAE] && (*sae < 0 || largest(own, k->count) > largest(*values, k->count)))) {
            *sae = s;
            *values = own;
        }
    }
    if (all && *sae < 0 && c->value[OPT_SAE]) {
        cli_say("show: expected an SAE of this daemon, found '%s'", c->value[OPT_SAE]);
        return CLI_NOTHING;
    }
    return CLI_OK;
}

static bool is_dark(const cli *c)
{
    const char *theme = c->value[OPT_THEME], *variable = getenv("COLORFGBG"), *ground = variable ? strrchr(variable, ';') : NULL;

    if (theme) {
        return strcmp(theme, "light") != 0;
    }
    return !ground || (atoi(ground + 1) != 7 && atoi(ground + 1) != 15);
}

static void heading(spurion_text *out, const cli *c, const char *title)
{
    spurion_text_print(out, "\n%s%s%s\n", c->color ? "\x1b[1m" : "", title, c->color ? "\x1b[0m" : "");
}

static void put_legend(spurion_text *out, const cli *c, const cli_shade *s, spurion_bytes sae)
{
    cli_put(out, "\n\nshaded by ");
    if (c->value[OPT_RULE]) {
        cli_put(out, "the features of ");
        cli_put_safe(out, cli_bytes(c->value[OPT_RULE]), false);
        cli_put(out, " in ");
    } else {
        cli_put(out, "the attribution of ");
    }
    cli_put_safe(out, sae, false);
    spurion_text_print(out, ": scale -%.4g to +%.4g; ", (double)s->max, (double)s->max);
    cli_put(out, s->color ? "blue with a line above raised the reward, orange with a line below lowered it\n"
                          : "\xe2\x9f\xa6+ raised the reward \xe2\x9f\xa7 \xe2\x9f\xa6\xe2\x88\x92 lowered it \xe2\x9f\xa7 (from 15 % of the scale)\n");
}

static int put_completion(spurion_text *out, const cli *c, const spurion_record *r)
{
    const spurion_verdict *v = &r->verdict;
    cli_shade shade = {c->color, is_dark(c), 0};
    const float *values = NULL;
    int32_t sae = -1;
    int status;

    heading(out, c, "completion");
    if (v->tokens) {
        if ((status = choose(&values, &sae, c, v)) != CLI_OK) {
            return status;
        }
        if (sae >= 0) {
            shade.max = largest(values, v->tokens->count);
            cli_shade_tokens(out, &shade, v->tokens->text, values, v->tokens->count);
            put_legend(out, c, &shade, v->saes[sae].sae);
            return CLI_OK;
        }
    }
    if (r->rollout.completion.data) {
        cli_put_safe(out, r->rollout.completion, true);
    } else if (v->tokens) {
        for (int32_t i = 0; i < v->tokens->count; i++) {
            cli_put_safe(out, v->tokens->text[i], true);
        }
    } else if (r->rollout.messages.data) {
        cli_put(out, "(the last message)");
    } else {
        spurion_text_print(out, "(%d token ids)", r->rollout.completion_id_count);
    }
    cli_put(out, "\n(no attribution is stored for its tokens)\n");
    return CLI_OK;
}

/* --- the numbers --- */

static void put_action(spurion_text *out, const spurion_verdict *v)
{
    if (v->action <= SPURION_ACTION_LOG && v->action_weight == 1.0f && v->action_reward == v->reward) {
        return;
    }
    spurion_text_print(out, "  action    %s", spurion_action_name((int)v->action));
    if (v->action_rule.size > 0) {
        cli_put(out, " by ");
        cli_put_safe(out, v->action_rule, false);
    }
    if (v->action > SPURION_ACTION_ALERT) {
        spurion_text_print(out, ": reward %.6g, weight %.3g", (double)v->action_reward, (double)v->action_weight);
    }
    if (v->action_advantage.has) {
        spurion_text_print(out, ", advantage then %+.6g", (double)v->action_advantage.value);
    }
    cli_put(out, "\n");
}

/* " (closing thanks)" behind a feature: the catalogue's label, else an imported one. */
static void put_label(spurion_text *out, const spurion_verdict *v, const spurion_feature_ref *ref)
{
    for (int32_t i = 0; i < v->feature_count; i++) {
        const spurion_feature *f = &v->features[i];
        spurion_bytes label = f->label.size ? f->label : f->explanation;
        if (label.size && f->ref.index == ref->index && cli_same(f->ref.sae, ref->sae)) {
            cli_put(out, " (");
            cli_put_safe(out, label, false);
            cli_put(out, ")");
        }
    }
}

static void put_numbers(spurion_text *out, const cli *c, const spurion_verdict *v)
{
    heading(out, c, "reward");
    spurion_text_print(out, "  reward                    %+.6g\n", (double)v->reward);
    spurion_text_print(out, "  without spurious features %+.6g\n", (double)v->counterfactual_reward);
    spurion_text_print(out, "  effect of removing them   %+.6g", (double)v->effect);
    if (v->effect_sd.has) {
        spurion_text_print(out, "  (%+.3g sd)", (double)v->effect_sd.value);
    }
    cli_put(out, v->effect < 0 ? "  they raised the reward\n" : v->effect > 0 ? "  they lowered the reward\n" : "\n");
    if (v->advantage.has) {
        spurion_text_print(out, "  advantage in the group    %+.6g, without %+.6g%s\n", (double)v->advantage.value,
                           (double)v->counterfactual_advantage.value, v->advantage_flip ? "  CHANGES SIGN" : "");
    }
    for (int32_t i = 0; i < v->family_count; i++) {
        cli_put(out, i ? "            " : "  families  ");
        cli_put_safe(out, v->families[i].family, false);
        spurion_text_print(out, " %+.6g\n", (double)v->families[i].effect);
    }
    for (int32_t i = 0; i < v->flag_count; i++) {
        cli_put(out, i ? "            " : "  flags     ");
        cli_put_safe(out, v->flags[i].rule, false);
        spurion_text_print(out, " %+.6g by", (double)v->flags[i].effect);
        for (int32_t k = 0; k < v->flags[i].feature_count; k++) {
            cli_put(out, k ? ", " : " ");
            cli_put_safe(out, v->flags[i].features[k].sae, false);
            spurion_text_print(out, "/%d", v->flags[i].features[k].index);
            put_label(out, v, &v->flags[i].features[k]);
        }
        cli_put(out, "\n");
    }
    put_action(out, v);
}

static void put_features(spurion_text *out, const cli *c, const spurion_verdict *v)
{
    static const char *const titles[] = {"FEATURE", "LABEL", "VERDICT", ">ATTRIBUTION", ">ABLATION", ">MAX", ">PEAK", "PEAK TOKEN"};
    cli_table t;

    if (v->feature_count == 0) {
        return;
    }
    heading(out, c, "features (attribution: + raised the reward; ablation: + the reward rises when it is removed)");
    cli_table_init(&t, titles, 8);
    for (int32_t i = 0; i < v->feature_count; i++) {
        const spurion_feature *f = &v->features[i];
        spurion_text name = {NULL, 0, 0, false};
        cli_put_safe(&name, f->ref.sae, false);
        cli_table_cell(&t, 0, "%s/%d", name.data ? name.data : "", f->ref.index);
        spurion_text_fini(&name);
        cli_table_name(&t, 1, f->label.size ? f->label : f->explanation);
        cli_table_name(&t, 2, f->verdict);
        cli_table_signed(&t, 3, f->attribution, true);
        cli_table_signed(&t, 4, f->ablation_effect, true);
        cli_table_cell(&t, 5, "%.4g", (double)f->activation_max);
        cli_table_cell(&t, 6, "%d", f->peak_position);
        for (int32_t k = 0; v->tokens && k < v->tokens->count; k++) {
            if (v->tokens->position[k] == f->peak_position) {
                cli_table_name(&t, 7, v->tokens->text[k]);
            }
        }
        cli_table_row(&t);
    }
    cli_table_print(out, &t, c);
    cli_table_fini(&t);
}

static void put_saes(spurion_text *out, const cli *c, const spurion_verdict *v)
{
    static const char *const titles[] = {"SAE", ">FEATURES", ">ERROR", ">BIAS", ">BASELINE", ">RESIDUAL", ">L0"};
    cli_table t;

    heading(out, c, "what each SAE explains (attributions; never added over SAEs)");
    cli_table_init(&t, titles, 7);
    for (int32_t i = 0; i < v->sae_count; i++) {
        const spurion_sae_summary *s = &v->saes[i];
        cli_table_name(&t, 0, s->sae);
        cli_table_signed(&t, 1, s->attribution_sum, true);
        cli_table_signed(&t, 2, s->error_attribution, true);
        cli_table_signed(&t, 3, s->bias_attribution, true);
        cli_table_signed(&t, 4, s->baseline_reward, true);
        cli_table_signed(&t, 5, s->residual, true);
        if (s->l0_mean.has) {
            cli_table_cell(&t, 6, "%.1f", (double)s->l0_mean.value);
        }
        cli_table_row(&t);
    }
    cli_table_print(out, &t, c);
    cli_table_fini(&t);
}

static void put_head(spurion_text *out, const cli *c, const spurion_record *r)
{
    const spurion_verdict *v = &r->verdict;

    cli_put(out, c->color ? "\x1b[1m" : "");
    cli_put_safe(out, v->run, false);
    spurion_text_print(out, " step %lld  ", (long long)v->step);
    cli_put_safe(out, v->group, false);
    cli_put(out, "  ");
    cli_put_safe(out, v->id, false);
    if (v->attempt) {
        spurion_text_print(out, "  attempt %d", v->attempt);
    }
    cli_put(out, c->color ? "\x1b[0m  judged " : "  judged ");
    cli_put_time(out, r->time_ms);
    cli_put(out, "\n");
}

static void put_foot(spurion_text *out, const cli *c, const spurion_record *r)
{
    const spurion_verdict *v = &r->verdict;

    (void)c;
    spurion_text_print(out, "\n%d tokens, ", v->token_count);
    if (v->scored_position >= 0) {
        spurion_text_print(out, "scored at position %d", v->scored_position);
    } else {
        cli_put(out, "scored at the mean over all of them");
    }
    cli_put(out, v->truncated ? ", prompt truncated" : "");
    for (int bit = 0; bit < SPURION_WARNING_COUNT; bit++) {
        if (v->warnings >> bit & 1) {
            spurion_text_print(out, "; warning %s", spurion_warning_name(bit));
        }
    }
    if (r->rollout.has_trainer_reward) {
        spurion_text_print(out, "; the trainer's reward %.6g", (double)r->rollout.trainer_reward);
    }
    spurion_text_print(out, "\nprovenance %s\n", v->provenance);
    if (r->rollout.tags.data) {
        cli_put(out, "tags ");
        cli_put_safe(out, r->rollout.tags, false);
        cli_put(out, "\n");
    }
}

static int put_record(spurion_text *out, const cli *c, const spurion_record *r)
{
    const spurion_verdict *v = &r->verdict;
    int status = CLI_OK;

    put_head(out, c, r);
    if (v->code != SPURION_OK) {
        spurion_text_print(out, "\nrefused: %s: ", spurion_code_name(v->code));
        cli_put_safe(out, v->message, false);
        cli_put(out, "\n");
        return CLI_OK;
    }
    if (r->rollout.messages.data) {
        heading(out, c, "messages");
        cli_put_safe(out, r->rollout.messages, true);
        cli_put(out, "\n");
    }
    if (r->rollout.prompt.data) {
        heading(out, c, "prompt");
        cli_put_safe(out, r->rollout.prompt, true);
        cli_put(out, "\n");
    }
    if (r->rollout.completion.data || r->rollout.completion_ids || r->rollout.messages.data || v->tokens) {
        status = put_completion(out, c, r);
    } else {
        cli_put(out, "\nThe texts were not kept: this rollout was counted only (it was not flagged).\n");
    }
    if (status == CLI_OK) {
        put_numbers(out, c, v);
        put_features(out, c, v);
        put_saes(out, c, v);
        put_foot(out, c, r);
    }
    return status;
}

int cli_show(cli *c)
{
    spurion_client_options options = {0};
    spurion_text out = {NULL, 0, 0, false};
    spurion_record record;
    spurion_key key;
    spurion_code code;
    int status;

    if ((status = read_key(&key, c)) != CLI_OK) {
        return status;
    }
    if (c->value[OPT_THEME] && strcmp(c->value[OPT_THEME], "dark") != 0 && strcmp(c->value[OPT_THEME], "light") != 0) {
        return cli_bad_value(c, OPT_THEME, "dark or light");
    }
    if ((status = cli_connect(c, &options, false, false)) != CLI_OK) {
        return status;
    }
    code = spurion_client_get(c->client, &record, &key, c->timeout_ms);
    if (code != SPURION_OK) {
        return cli_fail(c, code);
    }
    if (c->value[OPT_JSON]) {
        cli_json_record(&out, &record, true);
        cli_put(&out, "\n");
    } else {
        status = put_record(&out, c, &record);
    }
    if (status == CLI_OK) {
        cli_flush(&out);
    }
    spurion_text_fini(&out);
    return status;
}

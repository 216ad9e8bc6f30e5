/* The configuration: every key of the contract, order of origins, refusals with line and hint, printing that reads back. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "daemon/config.h"

#define WHOLE \
    "model:\n" \
    "  path: models/demo-rm\n" \
    "  dtype: bf16\n" \
    "  head_index: 2\n" \
    "  template: hh\n" \
    "  append_eos: true\n" \
    "  max_tokens: 2048\n" \
    "  on_too_long: truncate_prompt\n" \
    "saes:\n" \
    "  - {id: mid, path: saes/mid, hook: blocks.2.hook_resid_post}\n" \
    "  - id: abs\n" \
    "    path: /srv/abs\n" \
    "    format: gemma_scope\n" \
    "attribution: {method: ig, when: flagged, ig_steps: 7, ig_rule: left, scope: all, top: 3, completeness: true}\n" \
    "ablation: {each: true}\n" \
    "catalogue: catalogue.jsonl\n" \
    "rules:\n" \
    "  - {id: url-lowers, families: [url], direction: lowered, effect_min: 0.5}\n" \
    "  - {id: any-flip, advantage_flip: true, alert: each, rate_max: 0.25, alpha: 0.01}\n" \
    "  - id: sd\n" \
    "    families:\n" \
    "    - url\n" \
    "    - thanks\n" \
    "    direction: raised\n" \
    "    effect_sd_min: 0.1\n" \
    "    alert: none\n" \
    "reward: {sd: 1.9, trainer_tolerance: 0.5}\n" \
    "engine: {device: cpu, threads: 3, tokens_max: 4096, memory_max: 8GiB, batch_wait_ms: 6, group_wait_ms: 2001}\n" \
    "store: {path: var/spurion}\n" \
    "listen: {rpc: [ipc://var/spurion.sock, 'tcp://127.0.0.1:1'], rollouts: [tcp://127.0.0.1:7801], alerts: [tcp://127.0.0.1:7802], http: 127.0.0.1:7803}\n"

#define LEAST "model: {path: m}\nsaes: [{id: a, path: s}]\n"

static char folder[] = "/tmp/spurion-config-XXXXXX";

static const char *path_of(const char *name)
{
    static char path[256];
    (void)snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void write_file(const char *name, const char *text)
{
    FILE *f = fopen(path_of(name), "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, strlen(text), f), strlen(text));
    assert_int_equal(fclose(f), 0);
}

static spurion_status load(spurion_config *c, const char *text, const char *override)
{
    write_file("c.yaml", text);
    return spurion_config_load(c, path_of("c.yaml"), &override, override != NULL);
}

static void load_ok(spurion_config *c, const char *text, const char *override)
{
    spurion_status st = load(c, text, override);
    assert_string_equal(st.message, "");
    assert_int_equal(st.code, SPURION_OK);
}

/* Loading fails, and the message holds every one of the parts. */
static void refused(const char *text, const char *override, int count, ...)
{
    spurion_config c;
    spurion_status st = load(&c, text, override);
    va_list parts;

    assert_int_equal(st.code, SPURION_INVALID_ARGUMENT);
    va_start(parts, count);
    for (int i = 0; i < count; i++) {
        const char *part = va_arg(parts, const char *);
        if (!strstr(st.message, part)) {
            fail_msg("expected '%s' in: %s", part, st.message);
        }
    }
    va_end(parts);
}

static void joined(char *out, size_t size, const char *rest)
{
    (void)snprintf(out, size, "%s/%s", folder, rest);
}

static void test_config_reads_every_key(void **state)
{
    spurion_config c;
    char path[300];

    (void)state;
    load_ok(&c, WHOLE, NULL);
    joined(path, sizeof path, "models/demo-rm");
    assert_string_equal(c.model.path, path);
    assert_int_equal(c.model.dtype, SPURION_BF16);
    assert_int_equal(c.model.head_index, 2);
    assert_int_equal(c.model.template_kind, SPURION_TEMPLATE_HH);
    assert_true(c.model.append_eos);
    assert_int_equal(c.model.max_tokens, 2048);
    assert_int_equal(c.model.on_too_long, SPURION_TOO_LONG_TRUNCATE);
    assert_int_equal(c.sae_count, 2);
    assert_string_equal(c.saes[0].id, "mid");
    assert_string_equal(c.saes[0].hook, "blocks.2.hook_resid_post");
    assert_null(c.saes[0].format);
    assert_string_equal(c.saes[1].path, "/srv/abs");
    assert_null(c.saes[1].hook);
    assert_string_equal(c.saes[1].format, "gemma_scope");
    assert_int_equal(c.attribution.method, SPURION_METHOD_IG);
    assert_int_equal(c.attribution.when, SPURION_WHEN_FLAGGED);
    assert_int_equal(c.attribution.ig_steps, 7);
    assert_int_equal(c.attribution.ig_rule, SPURION_IG_LEFT);
    assert_int_equal(c.attribution.scope, SPURION_SCOPE_ALL);
    assert_int_equal(c.attribution.top, 3);
    assert_true(c.attribution.completeness);
    assert_true(c.ablation_each);
    assert_int_equal(c.rule_count, 3);
    assert_int_equal(c.rules[0].family_count, 1);
    assert_string_equal(c.rules[0].families[0], "url");
    assert_int_equal(c.rules[0].direction, SPURION_LOWERED);
    assert_true(c.rules[0].has_effect_min && !c.rules[0].has_effect_sd_min && !c.rules[0].advantage_flip);
    assert_true(c.rules[0].effect_min == 0.5);
    assert_int_equal(c.rules[0].alert, SPURION_ALERT_RATE);
    assert_true(c.rules[0].rate_max == 0.01 && c.rules[0].alpha == 0.001);
    assert_int_equal(c.rules[1].family_count, 0);
    assert_null(c.rules[1].families);
    assert_true(c.rules[1].advantage_flip);
    assert_int_equal(c.rules[1].alert, SPURION_ALERT_EACH);
    assert_true(c.rules[1].rate_max == 0.25 && c.rules[1].alpha == 0.01);
    assert_int_equal(c.rules[2].family_count, 2);
    assert_string_equal(c.rules[2].families[1], "thanks");
    assert_int_equal(c.rules[2].direction, SPURION_RAISED);
    assert_int_equal(c.rules[2].alert, SPURION_ALERT_NONE);
    assert_true(c.reward.has_sd && c.reward.sd == 1.9 && c.reward.trainer_tolerance == 0.5);
    assert_int_equal(c.engine.threads, 3);
    assert_int_equal(c.engine.tokens_max, 4096);
    assert_true(c.engine.memory_max == (uint64_t)8 << 30);
    assert_int_equal(c.engine.batch_wait_ms, 6);
    assert_int_equal(c.engine.group_wait_ms, 2001);
    joined(path, sizeof path, "var/spurion");
    assert_string_equal(c.store.path, path);
    (void)snprintf(path, sizeof path, "ipc://%s/var/spurion.sock", folder);
    assert_int_equal(c.listen.rpc_count, 2);
    assert_string_equal(c.listen.rpc[0], path);
    assert_string_equal(c.listen.rpc[1], "tcp://127.0.0.1:1");
    assert_int_equal(c.listen.alerts_count, 1);
    assert_string_equal(c.listen.http, "127.0.0.1:7803");
    spurion_config_fini(&c);
}

static void test_config_fills_the_defaults_of_the_contract(void **state)
{
    spurion_config c;

    (void)state;
    load_ok(&c, "reward:\nattribution: ~\nrules: null\n" LEAST "catalogue: null\nengine: {threads: }\n", NULL);
    assert_int_equal(c.model.dtype, SPURION_F32);
    assert_int_equal(c.model.head_index, -1);
    assert_int_equal(c.model.template_kind, SPURION_TEMPLATE_NONE);
    assert_false(c.model.append_eos);
    assert_int_equal(c.model.max_tokens, 0);
    assert_int_equal(c.model.on_too_long, SPURION_TOO_LONG_REFUSE);
    assert_int_equal(c.attribution.method, SPURION_METHOD_GRAD);
    assert_int_equal(c.attribution.when, SPURION_WHEN_ALL);
    assert_int_equal(c.attribution.ig_steps, 10);
    assert_int_equal(c.attribution.ig_rule, SPURION_IG_MIDPOINT);
    assert_int_equal(c.attribution.scope, SPURION_SCOPE_COMPLETION);
    assert_int_equal(c.attribution.top, 32);
    assert_false(c.attribution.completeness || c.ablation_each || c.reward.has_sd);
    assert_true(c.reward.trainer_tolerance == 0.02);
    assert_null(c.catalogue);
    assert_null(c.store.path);
    assert_null(c.listen.http);
    assert_int_equal(c.rule_count, 0);
    assert_string_equal(c.engine.device, "cpu");
    assert_int_equal(c.engine.threads, 0);
    assert_int_equal(c.engine.tokens_max, 16384);
    spurion_config_fini(&c);
}

static void test_config_goes_from_default_to_file_to_environment_to_flag(void **state)
{
    spurion_config c;

    (void)state;
    load_ok(&c, LEAST "engine: {threads: 2, tokens_max: 100, batch_wait_ms: 1}\n", NULL);
    assert_int_equal(c.engine.threads, 2);
    spurion_config_fini(&c);
    assert_int_equal(setenv("SPURION_ENGINE_THREADS", "3", 1), 0);
    assert_int_equal(setenv("SPURION_ENGINE_TOKENS_MAX", "200", 1), 0);
    assert_int_equal(setenv("SPURION_LISTEN_RPC", "[tcp://h:1, tcp://h:2]", 1), 0);
    load_ok(&c, LEAST "engine: {threads: 2, tokens_max: 100, batch_wait_ms: 1}\n", "engine.threads=4");
    assert_int_equal(c.engine.threads, 4);
    assert_int_equal(c.engine.tokens_max, 200);
    assert_int_equal(c.engine.batch_wait_ms, 1);
    assert_int_equal(c.engine.group_wait_ms, 2000);
    assert_int_equal(c.listen.rpc_count, 2);
    assert_string_equal(c.listen.rpc[1], "tcp://h:2");
    spurion_config_fini(&c);
    assert_int_equal(setenv("SPURION_ENGINE_THREADS", "many", 1), 0);
    refused(LEAST, NULL, 2, "SPURION_ENGINE_THREADS in the environment: expected a whole number", "found 'many'");
    assert_int_equal(unsetenv("SPURION_ENGINE_THREADS"), 0);
    assert_int_equal(unsetenv("SPURION_ENGINE_TOKENS_MAX"), 0);
    assert_int_equal(unsetenv("SPURION_LISTEN_RPC"), 0);
    refused(LEAST, "engine.thread=4", 2, "--set", "did you mean 'engine.threads'");
    refused(LEAST, "engine.threads", 1, "expected section.key=value");
    refused(LEAST, "rules=x", 1, "saes and rules stand in the file");
}

static void test_config_refuses_unknown_keys_with_line_and_hint(void **state)
{
    (void)state;
    refused("model: {path: m}\nsaes: [{id: a, path: s}]\nengin: {threads: 1}\n", NULL, 3, "c.yaml:3:", "unknown key 'engin'",
            "did you mean 'engine'");
    refused(LEAST "engine:\n  threads: 1\n  tread: 2\n", NULL, 2, "c.yaml:5: engine:", "unknown key 'tread'");
    refused(LEAST "attribution:\n  methd: grad\n", NULL, 2, "c.yaml:4: attribution:", "did you mean 'method'");
    refused("model: {path: m}\nsaes:\n- id: a\n  path: s\n  hok: x\n", NULL, 2, "c.yaml:5: saes[0]:", "did you mean 'hook'");
    refused(LEAST "rules:\n- {id: r, effect_min: 1, familys: [a]}\n", NULL, 2, "c.yaml:4: rules[0]:", "did you mean 'families'");
    refused(LEAST "model: {path: n}\n", NULL, 3, "c.yaml:3:", "expected key 'model' once", "first on line 1");
    refused(LEAST "engine: {threads: 1, threads: 2}\n", NULL, 1, "expected key 'threads' once");
}

static void test_config_refuses_wrong_types(void **state)
{
    (void)state;
    refused(LEAST "engine: {threads: two}\n", NULL, 2, "engine.threads: expected a whole number from 0 to 1024", "found 'two'");
    refused(LEAST "engine: {threads: '2'}\n", NULL, 1, "engine.threads: expected a number, found the text \"2\"");
    refused(LEAST "engine: {threads: -1}\n", NULL, 1, "found '-1'");
    refused(LEAST "engine: {threads: 99999999999999999999}\n", NULL, 1, "expected a whole number");
    refused(LEAST "engine: {threads: 1.5}\n", NULL, 1, "found '1.5'");
    refused(LEAST "engine: {threads: [1]}\n", NULL, 1, "expected one value, found a list");
    refused(LEAST "engine: [1]\n", NULL, 1, "engine: expected a mapping, found a list");
    refused(LEAST "engine: {memory_max: 8GB}\n", NULL, 2, "engine.memory_max", "found '8GB'");
    refused(LEAST "engine: {memory_max: 999999999TiB}\n", NULL, 1, "engine.memory_max");
    refused(LEAST "engine: {device: gpu}\n", NULL, 1, "expected cpu or cuda:N, found 'gpu'");
    refused(LEAST "ablation: {each: 1}\n", NULL, 1, "ablation.each: expected true or false, found '1'");
    refused(LEAST "ablation: {each: 'true'}\n", NULL, 1, "expected a truth value, found the text");
    refused(LEAST "attribution: {method: exact}\n", NULL, 1, "attribution.method: expected grad, ig or none, found 'exact'");
    refused(LEAST "reward: {sd: .inf}\n", NULL, 1, "reward.sd: expected a number");
    refused(LEAST "reward: {sd: 0}\n", NULL, 1, "reward.sd: expected a number");
    refused(LEAST "reward: {sd: 0x10}\n", NULL, 1, "reward.sd: expected a number");
    refused(LEAST "reward: {sd: nan}\n", NULL, 1, "reward.sd: expected a number");
    refused(LEAST "listen: {rpc: tcp://h:1}\n", NULL, 1, "listen.rpc: expected a list");
    refused(LEAST "listen: {rpc: [udp://h:1]}\n", NULL, 1, "expected a URL ipc://PATH or tcp://HOST:PORT");
    refused(LEAST "listen: {rpc: [[a]]}\n", NULL, 1, "expected a list of texts");
    refused("model: {path: ''}\n", NULL, 1, "model.path: expected a text, found an empty one");
    refused("model: {path: \"a\\nb\"}\n", NULL, 1, "control characters");
    refused("saes: [a]\nmodel: {path: m}\n", NULL, 1, "saes[0]: expected a mapping");
}

static void test_config_refuses_what_is_missing_or_twice(void **state)
{
    (void)state;
    refused("saes: [{id: a, path: s}]\n", NULL, 1, "model.path: expected the reward model's directory, found none");
    refused("model: {path: m}\nsaes: [{id: a}]\n", NULL, 1, "saes[0]: expected id and path, found no path");
    refused("model: {path: m}\nsaes: [{path: a}]\n", NULL, 1, "found no id");
    refused("model: {path: m}\nsaes: [{id: a, path: s}, {id: a, path: t}]\n", NULL, 1, "saes[1]: expected each id once, found 'a' again");
    refused(LEAST "rules: [{id: r}]\n", NULL, 1, "at least one of effect_min, effect_sd_min and advantage_flip: true");
    refused(LEAST "rules: [{id: r, advantage_flip: false, direction: raised}]\n", NULL, 1, "at least one of");
    refused(LEAST "rules: [{effect_min: 1}]\n", NULL, 1, "rules[0]: expected an id");
    refused(LEAST "rules: [{id: r, effect_min: 1}, {id: r, effect_min: 2}]\n", NULL, 1, "rules[1]: expected each id once");
    refused(LEAST "rules: [{id: r, effect_sd_min: 1}]\n", NULL, 1, "effect_sd_min expected reward.sd, found none");
    refused(LEAST "rules: [{id: r, effect_min: 1, families: [url]}]\n", NULL, 1, "families expected a catalogue");
    refused(LEAST "rules: [{id: r, effect_min: -1}]\n", NULL, 1, "rules[0].effect_min: expected a number from 0");
    refused("", NULL, 1, "expected a mapping of sections, found nothing");
    refused("- a\n", NULL, 1, "found a list");
    refused("model: {path: m\n", NULL, 2, "c.yaml:", "expected YAML");
    refused(LEAST "---\nengine: {}\n", NULL, 1, "expected one YAML document, found a second");
    refused("model: {path: \xff}\n", NULL, 1, "expected YAML");
}

static void test_config_says_when_the_file_is_missing(void **state)
{
    spurion_config c;
    spurion_status st = spurion_config_load(&c, path_of("none.yaml"), NULL, 0);

    (void)state;
    assert_int_equal(st.code, SPURION_NOT_FOUND);
    assert_non_null(strstr(st.message, "none.yaml: expected a configuration file"));
}

static char *text_of(void (*print)(FILE *, void *), void *context)
{
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);

    assert_non_null(f);
    print(f, context);
    assert_int_equal(fclose(f), 0);
    return text;
}

static void print_config(FILE *out, void *config)
{
    spurion_config_print(config, out);
}

static void print_example(FILE *out, void *unused)
{
    (void)unused;
    spurion_config_example(out);
}

static void strip_origins(char *text)
{
    char *put = text;
    for (char *line = text; *line;) {
        char *end = line + strcspn(line, "\n");
        char *mark = strstr(line, "  # ");
        char *stop = mark && mark < end ? mark : end;
        memmove(put, line, (size_t)(stop - line));
        put += stop - line;
        *put++ = '\n';
        line = *end ? end + 1 : end;
    }
    *put = '\0';
}

static void test_config_prints_what_loads_again(void **state)
{
    spurion_config c, again;
    char *first, *second;

    (void)state;
    load_ok(&c, WHOLE, "engine.tokens_max=77");
    first = text_of(print_config, &c);
    assert_non_null(strstr(first, "  tokens_max: 77  # flag\n"));
    assert_non_null(strstr(first, "  threads: 3  # file\n"));
    assert_non_null(strstr(first, "  sd: 1.9  # file\n"));
    assert_non_null(strstr(first, "  memory_max: 8GiB  # file\n"));
    load_ok(&again, first, NULL);
    second = text_of(print_config, &again);
    strip_origins(first);
    strip_origins(second);
    assert_string_equal(first, second);
    assert_int_equal(again.rule_count, 3);
    assert_int_equal(again.sae_count, 2);
    free(first);
    free(second);
    spurion_config_fini(&c);
    spurion_config_fini(&again);

    load_ok(&c, LEAST, NULL);
    first = text_of(print_config, &c);
    assert_non_null(strstr(first, "  threads: 0  # default\n"));
    assert_non_null(strstr(first, "  # head_index:  # not set\n"));
    load_ok(&again, first, NULL);
    assert_int_equal(again.model.head_index, -1);
    assert_false(again.reward.has_sd);
    free(first);
    spurion_config_fini(&c);
    spurion_config_fini(&again);
}

static void test_config_example_loads(void **state)
{
    spurion_config c;
    char *text = text_of(print_example, NULL);

    (void)state;
    load_ok(&c, text, NULL);
    assert_int_equal(c.engine.tokens_max, 16384);
    assert_int_equal(c.sae_count, 1);
    assert_int_equal(c.rule_count, 1);
    assert_int_equal(c.listen.rollouts_count, 1);
    free(text);
    spurion_config_fini(&c);
}

static void test_config_loads_the_example_cases(void **state)
{
    static const char *const cases[] = {"gptj", "llama", "refused", "qwen3"};
    const char *shared = getenv("SPURION_SHARED");
    char path[512];

    (void)state;
    (void)snprintf(path, sizeof path, "%s/data/example_cases/gptj/config.yaml", shared ? shared : "../shared");
    if (access(path, R_OK) != 0) {
        print_message("skipped: %s is not there\n", path);
        skip();
    }
    for (int i = 0; i < 4; i++) {
        spurion_config c;
        spurion_status st;
        (void)snprintf(path, sizeof path, "%s/data/example_cases/%s/config.yaml", shared ? shared : "../shared", cases[i]);
        st = spurion_config_load(&c, path, NULL, 0);
        assert_string_equal(st.message, "");
        assert_int_equal(c.rule_count, 4);
        assert_true(c.reward.sd == 1.9);
        spurion_config_fini(&c);
    }
}

static int setup(void **state)
{
    (void)state;
    return mkdtemp(folder) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    (void)unlink(path_of("c.yaml"));
    return rmdir(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_config_reads_every_key),
        cmocka_unit_test(test_config_fills_the_defaults_of_the_contract),
        cmocka_unit_test(test_config_goes_from_default_to_file_to_environment_to_flag),
        cmocka_unit_test(test_config_refuses_unknown_keys_with_line_and_hint),
        cmocka_unit_test(test_config_refuses_wrong_types),
        cmocka_unit_test(test_config_refuses_what_is_missing_or_twice),
        cmocka_unit_test(test_config_says_when_the_file_is_missing),
        cmocka_unit_test(test_config_prints_what_loads_again),
        cmocka_unit_test(test_config_example_loads),
        cmocka_unit_test(test_config_loads_the_example_cases),
    };
    return cmocka_run_group_tests_name("config", tests, setup, teardown);
}

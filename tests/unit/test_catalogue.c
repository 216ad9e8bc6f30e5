/* The catalogue: order, families, roles, the distinct sets of ablation, refusals with line. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "daemon/catalogue.h"

static const int32_t widths[] = {100, 50};

typedef struct fixture {
    spurion_config config;
    spurion_rule_config rules[4];
    spurion_catalogue catalogue;
    char path[64];
} fixture;

static spurion_status load(fixture *f, const char *text)
{
    FILE *file = fopen(f->path, "wb");

    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, strlen(text), file), strlen(text));
    assert_int_equal(fclose(file), 0);
    f->config.catalogue = f->path;
    return spurion_catalogue_load(&f->catalogue, &f->config, widths);
}

static void refused(fixture *f, const char *text, const char *part)
{
    spurion_status st = load(f, text);

    assert_int_equal(st.code, SPURION_INVALID_ARGUMENT);
    if (!strstr(st.message, part)) {
        fail_msg("expected '%s' in: %s", part, st.message);
    }
}

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof *f);
    int fd;

    assert_non_null(f);
    (void)snprintf(f->path, sizeof f->path, "/tmp/spurion-catalogue-XXXXXX");
    fd = mkstemp(f->path);
    assert_true(fd >= 0);
    assert_int_equal(close(fd), 0);
    f->config.saes[0] = (spurion_sae_config){.id = "mid", .path = "/m"};
    f->config.saes[1] = (spurion_sae_config){.id = "late", .path = "/l"};
    f->config.sae_count = 2;
    f->config.rules = f->rules;
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    spurion_catalogue_fini(&f->catalogue);
    (void)unlink(f->path);
    free(f);
    return 0;
}

#define LINES                                                                                                                      \
    "{\"sae\":\"late\",\"index\":7,\"label\":\"a url\",\"families\":[\"url\",\"form\"],\"verdict\":\"spurious\",\"role\":\"both\"}\n"     \
    "\n"                                                                                                                           \
    "{\"sae\":\"mid\",\"index\":9,\"label\":\"thanks \\u00e9\",\"families\":[\"thanks\"],\"verdict\":\"spurious\",\"activation_min\":0.1}\r\n" \
    "{\"sae\":\"mid\",\"index\":3,\"label\":\"intended\",\"families\":[\"fact\",\"url\"],\"verdict\":\"intended\"}\n"                     \
    "{\"sae\":\"mid\",\"index\":4,\"families\":[\"url\"],\"verdict\":\"spurious\",\"role\":\"detect\"}\n"                                \
    "{\"sae\":\"late\",\"index\":0,\"families\":[\"thanks\"],\"verdict\":\"spurious\",\"role\":\"debias\"}\n"                            \
    "{\"sae\":\"late\",\"index\":1}"

static void expect_set(const fixture *f, int32_t set, const char *expected)
{
    const spurion_ablation_set *s = &f->catalogue.sets[set];
    char text[200] = "";
    size_t used = 0;

    assert_true(set >= 0 && set < f->catalogue.set_count);
    for (int32_t i = 0; i < s->count; i++) {
        const spurion_catalogue_entry *e = &f->catalogue.entries[s->entries[i]];
        used += (size_t)snprintf(text + used, sizeof text - used, "%s/%d ", f->config.saes[e->sae].id, e->index);
    }
    assert_string_equal(text, expected);
}

static void test_catalogue_sorts_entries_and_keeps_family_order(void **state)
{
    fixture *f = *state;
    const spurion_catalogue_entry *e;
    static const char *const families[] = {"url", "form", "thanks", "fact"};

    assert_int_equal(load(f, LINES).code, SPURION_OK);
    assert_int_equal(f->catalogue.entry_count, 6);
    for (int32_t i = 1; i < 6; i++) {
        const spurion_catalogue_entry *a = &f->catalogue.entries[i - 1], *b = &f->catalogue.entries[i];
        assert_true(a->sae < b->sae || (a->sae == b->sae && a->index < b->index));
    }
    assert_int_equal(f->catalogue.family_count, 4);
    for (int32_t i = 0; i < 4; i++) {
        assert_string_equal(f->catalogue.families[i].data, families[i]);
    }
    e = spurion_catalogue_find(&f->catalogue, 0, 9);
    assert_non_null(e);
    assert_string_equal(e->label.data, "thanks \xc3\xa9");
    assert_true(e->spurious && e->roles == (SPURION_DETECT | SPURION_DEBIAS));
    assert_true(e->activation_min == 0.1f);
    e = spurion_catalogue_find(&f->catalogue, 0, 3);
    assert_true(!e->spurious && e->roles == 0);
    assert_string_equal(e->verdict.data, "intended");
    assert_int_equal(e->family_count, 2);
    assert_int_equal(e->family_ids[0], 3);
    assert_int_equal(e->family_ids[1], 0);
    e = spurion_catalogue_find(&f->catalogue, 1, 1);
    assert_null(e->label.data);
    assert_string_equal(e->verdict.data, "unknown");
    assert_null(spurion_catalogue_find(&f->catalogue, 0, 5));
    assert_null(spurion_catalogue_find(&f->catalogue, 1, 50));
}

static void test_catalogue_builds_each_distinct_set_once(void **state)
{
    fixture *f = *state;
    static const char *const url[] = {"url"}, *const two[] = {"thanks", "url"}, *const twice[] = {"url", "url"};

    f->rules[0] = (spurion_rule_config){.id = "url", .families = (const char **)url, .family_count = 1};
    f->rules[1] = (spurion_rule_config){.id = "two", .families = (const char **)two, .family_count = 2};
    f->rules[2] = (spurion_rule_config){.id = "all"};
    f->rules[3] = (spurion_rule_config){.id = "twice", .families = (const char **)twice, .family_count = 2};
    f->config.rule_count = 4;
    assert_int_equal(load(f, LINES).code, SPURION_OK);
    expect_set(f, f->catalogue.debias_set, "mid/9 late/0 late/7 ");
    expect_set(f, f->catalogue.family_sets[0], "mid/4 late/7 ");
    expect_set(f, f->catalogue.family_sets[1], "late/7 ");
    expect_set(f, f->catalogue.family_sets[2], "mid/9 ");
    expect_set(f, f->catalogue.family_sets[3], "");
    expect_set(f, f->catalogue.rule_sets[1], "mid/4 mid/9 late/7 ");
    assert_int_equal(f->catalogue.rule_sets[0], f->catalogue.family_sets[0]);
    assert_int_equal(f->catalogue.rule_sets[3], f->catalogue.family_sets[0]);
    assert_int_equal(f->catalogue.rule_sets[2], f->catalogue.rule_sets[1]); /* all detect|both: the same features */
    assert_int_equal(f->catalogue.set_count, 6);
}

static void test_catalogue_may_be_absent_or_empty(void **state)
{
    fixture *f = *state;

    f->rules[0] = (spurion_rule_config){.id = "all"};
    f->config.rule_count = 1;
    assert_int_equal(load(f, " \n").code, SPURION_OK);
    assert_int_equal(f->catalogue.set_count, 1);
    expect_set(f, f->catalogue.rule_sets[0], "");
    spurion_catalogue_fini(&f->catalogue);
    f->config.catalogue = NULL;
    assert_int_equal(spurion_catalogue_load(&f->catalogue, &f->config, widths).code, SPURION_OK);
    assert_int_equal(f->catalogue.entry_count, 0);
    expect_set(f, f->catalogue.debias_set, "");
}

static void test_catalogue_refuses_with_line_expected_and_found(void **state)
{
    fixture *f = *state;

    refused(f, "{\"sae\":\"mid\",\"index\":1}\n{\"sae\":\"mdi\",\"index\":1}\n", ":2: sae: expected the id of a configured SAE, found 'mdi' (did you mean 'mid'?)");
    refused(f, "{\"sae\":\"late\",\"index\":50}\n", ":1: index: expected 0 to 49 (the features of SAE 'late'), found 50");
    refused(f, "{\"sae\":\"late\",\"index\":-1}\n", "found -1");
    refused(f, "{\"sae\":\"late\",\"index\":1.5}\n", "index: expected a whole number, found a number");
    refused(f, "{\"sae\":\"late\"}\n", "index: expected a whole number, found none");
    refused(f, "{\"index\":1}\n", "sae: expected the id of an SAE, found none");
    refused(f, "{\"sae\":\"mid\",\"index\":1}\n\n{\"sae\":\"mid\",\"index\":1}\n", ":3: expected each pair (sae, index) once, found mid/1 again (first on line 1)");
    refused(f, "{\"sae\":\"mid\",\"index\":1,\"familys\":[]}\n", "unknown key 'familys' (did you mean 'families'?)");
    refused(f, "{\"sae\":\"mid\",\"index\":1,\"families\":\"url\"}\n", "families: expected a list of texts, found a string");
    refused(f, "{\"sae\":\"mid\",\"index\":1,\"families\":[1]}\n", "families: expected a text, found a whole number");
    refused(f, "{\"sae\":\"mid\",\"index\":1,\"families\":[\"a\",\"a\"]}\n", "families: expected each family once, found a");
    refused(f, "{\"sae\":\"mid\",\"index\":1,\"verdict\":\"bad\"}\n", "verdict: expected spurious, intended or unknown, found bad");
    refused(f, "{\"sae\":\"mid\",\"index\":1,\"role\":\"all\"}\n", "role: expected detect, debias or both, found all");
    refused(f, "{\"sae\":\"mid\",\"index\":1,\"activation_min\":-1}\n", "activation_min: expected a finite number from 0");
    refused(f, "{\"sae\":\"mid\",\"index\":1,\"activation_min\":1e300}\n", "activation_min");
    refused(f, "{\"sae\":\"mid\",\"index\":1,\"label\":5}\n", "label: expected a text");
    refused(f, "[1]\n", ":1: catalogue: expected a JSON object, found an array");
    refused(f, "{\"sae\":\"mid\",\"index\":1,\"index\":2}\n", "expected a JSON object, found");
    refused(f, "not json\n", "expected a JSON object, found");
}

static void test_catalogue_refuses_families_of_rules_that_it_does_not_hold(void **state)
{
    fixture *f = *state;
    static const char *const families[] = {"ulr"};

    f->rules[0] = (spurion_rule_config){.id = "r", .families = (const char **)families, .family_count = 1};
    f->config.rule_count = 1;
    refused(f, LINES, "rule 'r': families: expected families of the catalogue");
    refused(f, LINES, "found 'ulr' (did you mean 'url'?)");
    f->config.catalogue = "/nowhere/catalogue.jsonl";
    assert_int_equal(spurion_catalogue_load(&f->catalogue, &f->config, widths).code, SPURION_NOT_FOUND);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_catalogue_sorts_entries_and_keeps_family_order, setup, teardown),
        cmocka_unit_test_setup_teardown(test_catalogue_builds_each_distinct_set_once, setup, teardown),
        cmocka_unit_test_setup_teardown(test_catalogue_may_be_absent_or_empty, setup, teardown),
        cmocka_unit_test_setup_teardown(test_catalogue_refuses_with_line_expected_and_found, setup, teardown),
        cmocka_unit_test_setup_teardown(test_catalogue_refuses_families_of_rules_that_it_does_not_hold, setup, teardown),
    };
    return cmocka_run_group_tests_name("catalogue", tests, NULL, NULL);
}

/* Labels: the published forms of lines, and the daemon's file of them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/arena.h"
#include "daemon/labels.h"
#include "spurion/json.h"
#include "spurion/label.h"
#include "tests/unit/checkpoint_place.h"

#define SUM_A "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
#define SUM_B "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
#define SUM_C "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"

typedef struct fixture {
    spurion_arena arena;
    spurion_memory m;
    place p;
    spurion_labels labels;
} fixture;

static void *take(void *context, size_t bytes)
{
    return spurion_arena_take(context, bytes);
}

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof *f);

    assert_non_null(f);
    spurion_arena_init(&f->arena, 0);
    f->m = (spurion_memory){take, &f->arena};
    place_make(&f->p);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;

    spurion_labels_fini(&f->labels);
    spurion_arena_fini(&f->arena);
    place_drop(&f->p);
    free(f);
    return 0;
}

static void assert_text(spurion_bytes text, const char *wanted)
{
    assert_int_equal(text.size, strlen(wanted));
    assert_memory_equal(text.data, wanted, text.size);
}

static spurion_label good(fixture *f, const char *line)
{
    spurion_label label;
    bool found = false;
    spurion_status st = spurion_label_read(&label, &found, &f->m, line, strlen(line));

    if (st.code != SPURION_OK || !found) {
        fail_msg("%s: %s", line, st.code ? st.message : "no label");
    }
    return label;
}

static void bad(fixture *f, const char *line, const char *message)
{
    spurion_label label;
    bool found = false;
    spurion_status st = spurion_label_read(&label, &found, &f->m, line, strlen(line));

    assert_int_equal(st.code, SPURION_INVALID_ARGUMENT);
    if (!strstr(st.message, message)) {
        fail_msg("expected \"%s\", found \"%s\"", message, st.message);
    }
}

static void test_labels_reads_every_form(void **state)
{
    fixture *f = *state;
    spurion_label l = good(f, "{\"id\":\"c\",\"modelId\":\"gpt2-small\",\"layer\":\"6-res-jb\",\"index\":\"517\",\"description\":\" closing\\u0000thanks\\n\","
                              "\"typeName\":\"np_max-act\",\"explanationModelName\":\"gpt-4o\",\"embedding\":null}");
    static const char other[] = "{\"modelId\":\"m\",\"index\":\"1\",\"maxActApprox\":2}";
    bool found = true;

    assert_int_equal(l.index, 517);
    assert_text(l.description, "closing thanks");
    assert_text(l.type, "np_max-act");
    assert_text(l.model, "gpt-4o");
    assert_text(l.source, "gpt2-small/6-res-jb");
    l = good(f, "{\"modelId\":\"m\",\"layer\":\"l\",\"index\":3,\"explanation\":\"rain\",\"skipScore\":true}");
    assert_int_equal(l.index, 3);
    assert_text(l.description, "rain");
    l = good(f, "{\"latent\":7,\"label\":\"\\u00e9t\\u00e9\",\"score\":0.25}");
    assert_int_equal(l.index, 7);
    assert_text(l.description, "\xc3\xa9t\xc3\xa9");
    assert_true(l.has_score && l.score == 0.25 && l.source.data == NULL);
    assert_int_equal(spurion_label_read(&l, &found, &f->m, other, sizeof other - 1).code, SPURION_OK);
    assert_false(found);
    assert_int_equal(spurion_label_read_delphi(&l, &found, &f->m, "layers.3.mlp_latent12.txt", "\"Words.\"", 8).code, SPURION_OK);
    assert_true(found && l.index == 12);
    assert_text(l.source, "layers.3.mlp");
    assert_int_equal(spurion_label_read_delphi(&l, &found, &f->m, "m\xe1_latent1.txt", "\"Words.\"", 8).code, SPURION_INVALID_ARGUMENT);
    assert_int_equal(spurion_label_read_delphi(&l, &found, &f->m, "notes.txt", "\"Words.\"", 8).code, SPURION_INVALID_ARGUMENT);
}

static void test_labels_refuses_other_lines(void **state)
{
    fixture *f = *state;

    bad(f, "[1]", "expected a JSON object");
    bad(f, "{\"label\":\"x\"}", "index: expected a whole number from 0");
    bad(f, "{\"label\":\"x\",\"index\":-1}", "index: expected");
    bad(f, "{\"label\":\"x\",\"index\":\"1e3\"}", "index: expected");
    bad(f, "{\"label\":\"x\",\"index\":2147483648}", "index: expected");
    bad(f, "{\"label\":5,\"index\":1}", "description: expected a string");
    bad(f, "{\"label\":\"x\",\"index\":1,\"sae_sha256\":\"ab\"}", "sae_sha256: expected 64");
    bad(f, "{\"label\":\"x\",\"index\":1", "expected");
}

static void test_labels_long_text_is_cut_at_a_character(void **state)
{
    fixture *f = *state;
    char line[4096];
    spurion_label l;

    strcpy(line, "{\"index\":1,\"label\":\"x");
    for (int i = 0; i < 800; i++) {
        strcat(line, "\xc3\xa9");
    }
    strcat(line, "\"}");
    l = good(f, line);
    assert_int_equal(l.description.size, SPURION_LABEL_BYTES_MAX - 1);
    assert_int_equal(spurion_utf8_valid_prefix(l.description.data, l.description.size), l.description.size);
}

static void test_labels_written_lines_read_back(void **state)
{
    fixture *f = *state;
    spurion_text text = {NULL, 0, 0, false};
    spurion_label l = good(f, "{\"modelId\":\"m\",\"layer\":\"l\",\"index\":\"9\",\"description\":\"a \\\"b\\\"\",\"score\":0.1}"), again;

    l.sae_sha256 = spurion_bytes_of(SUM_A);
    spurion_label_put(&text, &l);
    spurion_text_add(&text, "", 1);
    assert_string_equal(text.data, "{\"sae_sha256\":\"" SUM_A "\",\"index\":9,\"description\":\"a \\\"b\\\"\",\"score\":0.1,\"source\":\"m/l\"}");
    again = good(f, text.data);
    assert_text(again.source, "m/l");
    assert_true(again.index == 9 && again.score == 0.1);
    spurion_text_fini(&text);
}

static spurion_status load(fixture *f, const char *text)
{
    spurion_labels_sae saes[2];
    char path[512];

    memset(saes[0].digest, 0xaa, 32);
    memset(saes[1].digest, 0xbb, 32);
    saes[0].width = 100;
    saes[1].width = 10;
    place_text(&f->p, "labels.jsonl", text);
    spurion_labels_fini(&f->labels);
    return spurion_labels_load(&f->labels, place_path(path, &f->p, "labels.jsonl"), saes, 2);
}

#define LINE(sum, index, text, more) "{\"sae_sha256\":\"" sum "\",\"index\":" #index ",\"description\":\"" text "\"" more "}\n"

static void test_labels_are_bound_by_checksum(void **state)
{
    fixture *f = *state;
    spurion_status st = load(f, LINE(SUM_A, 99, "last", "") LINE(SUM_B, 3, "late", "") "\n" LINE(SUM_C, 5, "other", "") LINE(SUM_A, 3, "early", ""));

    assert_int_equal(st.code, SPURION_OK);
    assert_text(spurion_labels_find(&f->labels, 0, 3), "early");
    assert_text(spurion_labels_find(&f->labels, 0, 99), "last");
    assert_text(spurion_labels_find(&f->labels, 1, 3), "late");
    assert_null(spurion_labels_find(&f->labels, 0, 5).data);
    assert_null(spurion_labels_find(&f->labels, 1, 99).data);
    assert_true(f->labels.count[0] == 2 && f->labels.count[1] == 1 && f->labels.foreign == 1);
}

static void test_labels_best_score_counts_then_the_first(void **state)
{
    fixture *f = *state;
    spurion_status st = load(f, LINE(SUM_A, 1, "first", "") LINE(SUM_A, 1, "second", "") LINE(SUM_A, 2, "plain", "") LINE(SUM_A, 2, "fair", ",\"score\":0.5")
                                LINE(SUM_A, 2, "good", ",\"score\":0.9"));

    assert_int_equal(st.code, SPURION_OK);
    assert_text(spurion_labels_find(&f->labels, 0, 1), "first");
    assert_text(spurion_labels_find(&f->labels, 0, 2), "good");
}

static void test_labels_faults_name_the_line(void **state)
{
    fixture *f = *state;
    spurion_status st = load(f, LINE(SUM_A, 1, "x", "") LINE(SUM_B, 10, "x", ""));

    assert_non_null(strstr(st.message, "labels.jsonl:2: index: expected 0 to 9"));
    st = load(f, "{\"index\":1,\"label\":\"x\"}\n");
    assert_non_null(strstr(st.message, "labels.jsonl:1: expected sae_sha256 (spurion labels import writes it), found none"));
    st = load(f, "{\"index\":1}\n");
    assert_non_null(strstr(st.message, "expected a label with a description"));
    st = load(f, "nonsense\n");
    assert_int_equal(st.code, SPURION_INVALID_ARGUMENT);
    assert_int_equal(spurion_labels_load(&f->labels, "/nowhere/labels.jsonl", NULL, 0).code, SPURION_NOT_FOUND);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_labels_reads_every_form, setup, teardown),
        cmocka_unit_test_setup_teardown(test_labels_refuses_other_lines, setup, teardown),
        cmocka_unit_test_setup_teardown(test_labels_long_text_is_cut_at_a_character, setup, teardown),
        cmocka_unit_test_setup_teardown(test_labels_written_lines_read_back, setup, teardown),
        cmocka_unit_test_setup_teardown(test_labels_are_bound_by_checksum, setup, teardown),
        cmocka_unit_test_setup_teardown(test_labels_best_score_counts_then_the_first, setup, teardown),
        cmocka_unit_test_setup_teardown(test_labels_faults_name_the_line, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}

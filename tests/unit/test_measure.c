/* Measurements of several passes: the order in which an engine packs, enqueues, waits and makes evidence, that verdicts are those of passes judged
 * one by one, and rows with more active features than they can hold. The functions between engine.c, measure.c, pack.c and evidence.c are wrapped by the linker (--wrap), the device's wait in its
 * table of ops. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "daemon/engine_internal.h"
#include "daemon/json_rollout.h"

#define STORED "tests/golden/stored/small-llama"
#define JOBS_MAX 64

/* p a pass is packed, l its clean pass is enqueued, w the host waits for the device, v variants are packed, e evidence is made; runs of v and e once */
static char trace[4096];
static size_t traced;
static int variant_passes;

static void step(char what)
{
    if (traced + 1 < sizeof trace && !(traced > 0 && trace[traced - 1] == what && strchr("ve", what))) {
        trace[traced++] = what;
    }
    trace[traced] = '\0';
}

spurion_status __real_spurion_pack_jobs(spurion_packed *out, spurion_arena *arena, spurion_job *const *jobs, int job_count, bool scope_all, int root_row);
spurion_status __wrap_spurion_pack_jobs(spurion_packed *out, spurion_arena *arena, spurion_job *const *jobs, int job_count, bool scope_all, int root_row);
spurion_status __wrap_spurion_pack_jobs(spurion_packed *out, spurion_arena *arena, spurion_job *const *jobs, int job_count, bool scope_all, int root_row)
{
    step('p');
    return __real_spurion_pack_jobs(out, arena, jobs, job_count, scope_all, root_row);
}

spurion_status __real_spurion_pack_variants(spurion_packed_variants *out, spurion_arena *arena, const spurion_packed *clean,
                                            const spurion_variant *variants, int count, int kv_row);
spurion_status __wrap_spurion_pack_variants(spurion_packed_variants *out, spurion_arena *arena, const spurion_packed *clean,
                                            const spurion_variant *variants, int count, int kv_row);
spurion_status __wrap_spurion_pack_variants(spurion_packed_variants *out, spurion_arena *arena, const spurion_packed *clean,
                                            const spurion_variant *variants, int count, int kv_row)
{
    step('v');
    variant_passes++;
    return __real_spurion_pack_variants(out, arena, clean, variants, count, kv_row);
}

spurion_status __real_spurion_model_embed(const spurion_model *m, spurion_workspace *w, int rows);
spurion_status __wrap_spurion_model_embed(const spurion_model *m, spurion_workspace *w, int rows);
spurion_status __wrap_spurion_model_embed(const spurion_model *m, spurion_workspace *w, int rows)
{
    step('l');
    return __real_spurion_model_embed(m, w, rows);
}

spurion_status __real_spurion_evidence_fill(spurion_measurement *k, const spurion_member *m);
spurion_status __wrap_spurion_evidence_fill(spurion_measurement *k, const spurion_member *m);
spurion_status __wrap_spurion_evidence_fill(spurion_measurement *k, const spurion_member *m)
{
    step('e');
    return __real_spurion_evidence_fill(k, m);
}

static spurion_status traced_sync(spurion_dev *dev)
{
    step('w');
    return spurion_ops_cpu()->sync(dev);
}

typedef struct fixture {
    spurion_config config;
    spurion_engine *engine;
    spurion_ops ops; /* the CPU's, with a wait that leaves a trace */
    spurion_job jobs[JOBS_MAX], *list[JOBS_MAX];
    int count;
} fixture;

static void open_engine(fixture *f, const char *path, const char *const *overrides, int count)
{
    memset(f, 0, sizeof *f);
    assert_int_equal(spurion_config_load(&f->config, path, overrides, count).code, SPURION_OK);
    assert_int_equal(spurion_engine_create(&f->engine, &f->config).code, SPURION_OK);
    f->ops = *f->engine->dev->ops;
    f->ops.sync = traced_sync;
    f->engine->dev->ops = &f->ops;
    for (int i = 0; i < JOBS_MAX; i++) {
        spurion_job_init(&f->jobs[i], 0);
        f->list[i] = &f->jobs[i];
    }
}

static void close_engine(fixture *f)
{
    for (int i = 0; i < JOBS_MAX; i++) {
        spurion_job_fini(&f->jobs[i]);
    }
    spurion_engine_destroy(f->engine);
    spurion_config_fini(&f->config);
}

/* The stored rollouts, those of one group together as they stand. */
static void read_jobs(fixture *f)
{
    FILE *in = fopen(STORED "/rollouts.jsonl", "r");
    char *line = NULL;
    size_t room = 0;
    ssize_t size;

    assert_non_null(in);
    for (f->count = 0; (size = getline(&line, &room, in)) > 0; f->count++) {
        spurion_job *job = &f->jobs[f->count], *before = f->count ? &f->jobs[f->count - 1] : NULL;
        spurion_json_names names;
        bool known;
        assert_true(f->count < JOBS_MAX);
        spurion_job_reset(job);
        assert_int_equal(spurion_json_rollout(job, &names, &known, line, (size_t)size - (line[size - 1] == '\n')), SPURION_LINE_ROLLOUT);
        job->want_tokens = true;
        job->group_number = before ? before->group_number + 1 : 0;
        if (before && before->rollout.step == job->rollout.step && before->rollout.group.size == job->rollout.group.size &&
            memcmp(before->rollout.group.data, job->rollout.group.data, job->rollout.group.size) == 0) {
            job->group_number = before->group_number;
        }
        spurion_engine_prepare(f->engine, job);
    }
    free(line);
    fclose(in);
}

/* Judges all jobs in one call, or a call for each group; *trace starts anew. */
static void judge(fixture *f, bool one_call)
{
    traced = 0;
    variant_passes = 0;
    for (int at = 0, n; at < f->count; at += n) {
        for (n = 1; at + n < f->count && (one_call || f->jobs[at + n].group_number == f->jobs[at].group_number); n++) {
        }
        assert_int_equal(spurion_engine_judge(f->engine, f->list + at, n).code, SPURION_OK);
    }
}

static char *verdicts(const fixture *f)
{
    spurion_text text = {NULL, 0, 0, false};
    for (int i = 0; i < f->count; i++) {
        spurion_json_verdict(&text, &f->jobs[i].verdict, NULL);
        spurion_text_add(&text, "\n", 1);
    }
    spurion_text_add(&text, "", 1);
    assert_false(text.failed);
    return text.data;
}

static const char *expect(const char *at, const char *steps)
{
    if (strncmp(at, steps, strlen(steps)) != 0) {
        fail_msg("expected %s, found %.40s in %s", steps, at, trace);
    }
    return at + strlen(steps);
}

static const char *skip_variants(const char *at)
{
    while (strncmp(at, "vw", 2) == 0) {
        at += 2;
    }
    return at;
}

/* The order of passes in one call: the next is packed before a pass is waited for, and its evidence is made when the next is enqueued. */
static void expect_overlap(int passes)
{
    const char *at = expect(trace, "p");
    for (int i = 0; i < passes; i++) {
        at = expect(at, i > 0 ? "le" : "l");
        at = expect(at, i + 1 < passes ? "pw" : "w");
        at = skip_variants(at);
    }
    at = expect(at, "e");
    assert_int_equal(*at, '\0');
}

static int passes_of(const char *t)
{
    int n = 0;
    for (; *t; t++) {
        n += *t == 'l';
    }
    return n;
}

/* The stored model and two of its SAEs with nothing catalogued: a pass has no variants. */
static void write_plain_config(int fd)
{
    char here[1024];
    FILE *out = fdopen(fd, "w");

    assert_non_null(out);
    assert_non_null(getcwd(here, sizeof here));
    fprintf(out, "model: {path: %s/" STORED "/model, dtype: f32}\nsaes:\n", here);
    fprintf(out, "- {id: std, path: %s/" STORED "/saes/std, hook: blocks.0.hook_resid_post}\n", here);
    fprintf(out, "- {id: top, path: %s/" STORED "/saes/top, hook: blocks.1.hook_resid_post}\n", here);
    fprintf(out, "catalogue: /dev/null\nattribution: {method: grad}\n");
    assert_int_equal(fclose(out), 0);
}

static void test_measure_host_works_while_a_pass_is_under_way(void **state)
{
    const char *overrides[] = {"engine.tokens_max=200", "engine.threads=1"};
    char path[] = "/tmp/spurion-measure-XXXXXX";
    fixture f;

    (void)state;
    write_plain_config(mkstemp(path));
    open_engine(&f, path, overrides, 2);
    read_jobs(&f);
    judge(&f, true);
    assert_true(passes_of(trace) >= 3);
    expect_overlap(passes_of(trace));
    assert_null(strchr(trace, 'v'));
    close_engine(&f);
    unlink(path);
}

static void test_measure_variants_of_a_pass_are_waited_for_together(void **state)
{
    const char *overrides[] = {"attribution.completeness=false", "engine.tokens_max=200", "engine.threads=1"};
    fixture f;

    (void)state;
    open_engine(&f, STORED "/config.yaml", overrides, 3);
    read_jobs(&f);
    judge(&f, true);
    expect_overlap(passes_of(trace));
    assert_non_null(strstr(trace, "wvwl"));
    assert_true(variant_passes > 2 * passes_of(trace));
    assert_null(strstr(trace, "wvwv")); /* one wait for all variants of a pass */
    close_engine(&f);
}

/* Ways of judging with several passes a call against calls of one pass each, byte for byte. */
static void same_verdicts(const char *method, const char *when, const char *l0)
{
    const char *overrides[] = {method, when, l0, "engine.tokens_max=200", "engine.threads=1"};
    char *together, *alone;
    fixture f;

    open_engine(&f, STORED "/config.yaml", overrides, 5);
    read_jobs(&f);
    judge(&f, true);
    assert_true(passes_of(trace) >= 3);
    together = verdicts(&f);
    read_jobs(&f);
    judge(&f, false);
    alone = verdicts(&f);
    assert_string_equal(together, alone);
    assert_non_null(strstr(together, "\"features\""));
    free(together);
    free(alone);
    close_engine(&f);
}

static void test_measure_verdicts_are_those_of_passes_one_by_one(void **state)
{
    (void)state;
    same_verdicts("attribution.method=grad", "attribution.when=all", "attribution.l0_mean=all");
    same_verdicts("attribution.method=ig", "attribution.when=all", "attribution.l0_mean=all");
    same_verdicts("attribution.method=grad", "attribution.when=flagged", "attribution.l0_mean=all");
    same_verdicts("attribution.method=grad", "attribution.when=flagged", "attribution.l0_mean=flagged");
}

/* The second look at flagged rollouts goes to the device before the last evidence of the first look is made. */
static void test_measure_goes_on_into_the_second_look(void **state)
{
    const char *overrides[] = {"attribution.when=flagged", "attribution.completeness=false", "engine.tokens_max=200", "engine.threads=1"};
    fixture f;

    (void)state;
    open_engine(&f, STORED "/config.yaml", overrides, 4);
    read_jobs(&f);
    judge(&f, true);
    assert_non_null(strstr(trace, "wple")); /* packed when the rules have spoken */
    assert_null(strstr(trace, "epl"));
    close_engine(&f);
}

/* With l0_mean: flagged the first look lists watched features only; what overflows shows on the second, and is refused there as well. */
static void test_measure_overflow_on_a_second_look_is_refused(void **state)
{
    const char *overrides[] = {"attribution.when=flagged", "attribution.l0_mean=flagged", "attribution.completeness=false", "engine.threads=1"};
    bool flagged[JOBS_MAX];
    int refused = 0;
    fixture f;

    (void)state;
    open_engine(&f, STORED "/config.yaml", overrides, 4);
    read_jobs(&f);
    judge(&f, true);
    for (int i = 0; i < f.count; i++) {
        flagged[i] = f.jobs[i].verdict.flag_count > 0;
    }
    assert_string_equal(f.engine->saes[0]->id, "std");
    f.engine->saes[0]->full.slots = f.engine->saes[0]->clean.slots = 1;
    read_jobs(&f);
    judge(&f, true);
    for (int i = 0; i < f.count; i++) {
        assert_int_equal(f.jobs[i].verdict.code, flagged[i] ? SPURION_RESOURCE_EXHAUSTED : SPURION_OK);
        refused += flagged[i];
    }
    assert_true(refused > 0 && refused < f.count);
    close_engine(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_measure_host_works_while_a_pass_is_under_way),
        cmocka_unit_test(test_measure_variants_of_a_pass_are_waited_for_together),
        cmocka_unit_test(test_measure_verdicts_are_those_of_passes_one_by_one),
        cmocka_unit_test(test_measure_goes_on_into_the_second_look),
        cmocka_unit_test(test_measure_overflow_on_a_second_look_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

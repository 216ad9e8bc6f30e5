/* L0 and explained variance of every SAE on a text: whether its units, hook and kind fit this model. The text is cut into windows; each is
 * a rollout whose completion it is, measured as judge would; what the dictionary makes of the stream is compared with the stream.
 * Thread: the engine's. Memory: (rows, d) on the host twice, one list of features on the device; freed at the end. */
#include "daemon/calibrate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/engine_internal.h"
#include "daemon/model/tokenizer.h"

#define WINDOW_TOKENS 256
#define TOKENS_MAX 32768
#define EXPLAINED_LOW 0.5

static const char built_in[] =
    "The harbour was quiet when the last ferry came in. A man in a grey coat stood under the clock and counted the passengers as they walked "
    "down the ramp: two students with bicycles, a woman carrying a violin case, an old couple who argued, softly, about the way to the "
    "station. Nobody looked up at the lights on the hill, where the power had failed an hour before.\n\n"
    "Human: I have been trying to bake bread at home, but it always comes out too dense. What am I doing wrong?\n\n"
    "Assistant: There are a few common reasons. First, check your yeast: mix it with warm water and a pinch of sugar, and see whether it foams "
    "within ten minutes. Second, let the dough rise until it has doubled, which may take longer in a cold kitchen. Third, add a little more "
    "water; a wetter dough makes a lighter loaf. If none of that helps, how long do you knead it, and which flour do you use?\n\n"
    "Human: About five minutes, with whole wheat flour only.\n\n"
    "Assistant: Whole wheat makes a heavier bread by itself, because the bran cuts the strands of gluten. Try half white flour, and knead for "
    "ten minutes. I hope that helps!\n\n"
    "In 1887 Michelson and Morley compared the speed of light in two directions and found no difference larger than their error. The result "
    "was not what they had expected; it took eighteen years until a theory made it natural. Let v be the speed of the Earth and c that of "
    "light: the effect they looked for is of order (v/c)^2, about 1e-8.\n\n"
    "def mean(values):\n    \"\"\"Arithmetic mean of a list of numbers.\"\"\"\n    if not values:\n        raise ValueError(\"no values\")\n"
    "    return sum(values) / len(values)\n\n"
    "Human: Can you write a short poem about rain?\n\n"
    "Assistant: The gutter hums, the windows blur,\nthe street forgets what streets are for;\na cat in somebody's coat of fur\nwaits out the "
    "weather at the door.\n\n"
    "Shares fell 3.2 percent on Tuesday after the company said that its chief executive would leave in March. Analysts at two banks lowered "
    "their forecasts, and a spokesman declined to comment. The board will meet again next week to discuss a successor, according to people "
    "who asked not to be named because the talks are private.\n";

/* Sums of one SAE over tokens, f64. */
typedef struct sums {
    double active, square, error; /* sum of |f|_0, |x|^2, |e|^2 */
    double *mean;                 /* (d) sum of x */
    int64_t tokens, explained;    /* all; those whose features all had room in their row */
} sums;

typedef struct calibrator {
    spurion_engine *e;
    spurion_ids ids;
    int32_t *all;         /* 0 .. F - 1 of the widest SAE */
    float *zeros;         /* (F) */
    void *d_sets;         /* device: begin (2), index (F), activation_min (F) of one SAE at a time */
    float *x, *y, *dec_bias, *scale, *shift; /* host: (rows, d), (rows, d), (d), (rows), (rows) */
    int rows;
    sums of[SPURION_SAES_MAX];
} calibrator;

static spurion_status no_memory(void)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for the calibration");
}

static spurion_status take_memory(calibrator *k)
{
    spurion_engine *e = k->e;
    size_t d = (size_t)e->model->config.hidden, n = (size_t)k->rows, F = 1;
    bool whole;

    for (int i = 0; i < e->sae_count; i++) {
        F = (size_t)e->saes[i]->full.F > F ? (size_t)e->saes[i]->full.F : F;
    }
    k->all = malloc(F * sizeof *k->all);
    k->zeros = calloc(F, sizeof *k->zeros);
    k->x = malloc(n * d * sizeof *k->x);
    k->y = malloc(n * d * sizeof *k->y);
    k->dec_bias = malloc(d * sizeof *k->dec_bias);
    k->scale = malloc(n * sizeof *k->scale);
    k->shift = malloc(n * sizeof *k->shift);
    whole = k->all && k->zeros && k->x && k->y && k->dec_bias && k->scale && k->shift;
    for (int i = 0; i < e->sae_count; i++) {
        k->of[i].mean = calloc(d, sizeof *k->of[i].mean);
        whole = whole && k->of[i].mean;
    }
    if (!whole) {
        return no_memory();
    }
    for (size_t i = 0; i < F; i++) {
        k->all[i] = (int32_t)i;
    }
    return e->dev->ops->alloc(e->dev, &k->d_sets, 64 + F * (sizeof(int32_t) + sizeof(float)));
}

static void drop_memory(calibrator *k)
{
    for (int i = 0; i < SPURION_SAES_MAX; i++) {
        free(k->of[i].mean);
    }
    k->e->dev->ops->free(k->e->dev, k->d_sets);
    free(k->all);
    free(k->zeros);
    free(k->x);
    free(k->y);
    free(k->dec_bias);
    free(k->scale);
    free(k->shift);
    spurion_ids_fini(&k->ids);
}

/* y = x - sum of f_i D_i over every feature: b(t) + e(t), by the op that removes sets of features. */
static spurion_status take_features_out(calibrator *k, spurion_sae *s, int rows)
{
    spurion_status st;
    spurion_engine *e = k->e;
    const spurion_ops *ops = e->dev->ops;
    size_t d = (size_t)e->model->config.hidden, n = (size_t)rows, F = (size_t)s->full.F;
    const int32_t begin[2] = {0, (int32_t)F};
    int32_t *d_begin = k->d_sets, *d_index = (int32_t *)(void *)((char *)k->d_sets + 64);
    float *d_least = (float *)(void *)(d_index + F);
    const spurion_sae_sets sets = {d_begin, d_index, d_least};

    SPURION_TRY(st, ops->upload(e->dev, d_begin, begin, sizeof begin));
    SPURION_TRY(st, ops->upload(e->dev, d_index, k->all, F * sizeof *k->all));
    SPURION_TRY(st, ops->upload(e->dev, d_least, k->zeros, F * sizeof *k->zeros));
    SPURION_TRY(st, ops->zero(e->dev, e->d_row_set, n * sizeof(int32_t)));
    SPURION_TRY(st, ops->copy(e->dev, e->w.x, e->point_x[s->point], n * d * sizeof(float)));
    SPURION_TRY(st, ops->download(e->dev, k->x, e->w.x, n * d * sizeof(float)));
    SPURION_TRY(st, ops->sae_subtract(e->dev, e->w.x, &s->clean, &s->full, &sets, e->d_row_set, rows));
    SPURION_TRY(st, ops->download(e->dev, k->y, e->w.x, n * d * sizeof(float)));
    SPURION_TRY(st, ops->download(e->dev, k->dec_bias, s->full.dec_bias, d * sizeof(float)));
    SPURION_TRY(st, ops->download(e->dev, k->scale, s->clean.token_scale, n * sizeof(float)));
    SPURION_TRY(st, ops->download(e->dev, k->shift, s->clean.token_shift, n * sizeof(float)));
out:
    return st;
}

/* Adds rows [first, rows) of the pass that has run. */
static spurion_status add_rows(calibrator *k, int sae, int first, int rows)
{
    spurion_status st;
    spurion_sae *s = k->e->saes[sae];
    sums *t = &k->of[sae];
    int d = k->e->model->config.hidden;

    SPURION_TRY(st, take_features_out(k, s, rows));
    for (int r = first; r < rows; r++) {
        const float *x = k->x + (size_t)r * (size_t)d, *y = k->y + (size_t)r * (size_t)d;
        int32_t active = k->e->hand[0].host[sae].count[r];

        t->active += active;
        t->tokens++;
        if (active > s->full.slots) { /* its list is cut: what it explains is not known */
            continue;
        }
        t->explained++;
        for (int c = 0; c < d; c++) {
            double error = (double)y[c] - ((double)k->dec_bias[c] * k->scale[r] + k->shift[r]);

            t->square += (double)x[c] * x[c];
            t->error += error * error;
            t->mean[c] += x[c];
        }
    }
out:
    return st;
}

/* Runs tokens [at, at + count) behind the leading specials. The first position of a sequence is left out: BOS, or what stands in its
 * place, has activations like nothing else. */
static spurion_status run_window(calibrator *k, size_t at, int count)
{
    spurion_status st = spurion_ok();
    spurion_engine *e = k->e;
    spurion_job job, *jobs[] = {&job};
    int leading = 0, rows;
    const int32_t *specials = spurion_tokenizer_leading(e->tokenizer, &leading);

    spurion_job_init(&job, 0);
    job.rollout.prompt_ids = leading > 0 ? specials : NULL;
    job.rollout.prompt_id_count = leading;
    job.rollout.completion_ids = k->ids.data + at;
    job.rollout.completion_id_count = count;
    spurion_engine_prepare(e, &job);
    if (job.verdict.code != SPURION_OK) {
        st = spurion_error(job.verdict.code, "calibration text: %.*s", (int)job.verdict.message.size, job.verdict.message.data);
        goto out;
    }
    rows = job.token_count - job.completion_start;
    SPURION_TRY(st, spurion_measure(e, jobs, 1, false, true));
    for (int i = 0; i < e->sae_count; i++) {
        SPURION_TRY(st, add_rows(k, i, job.completion_start == 0, rows));
    }
out:
    spurion_job_fini(&job);
    return st;
}

static void finish(spurion_calibration *out, const sums *t, int d)
{
    double n = (double)t->explained, mean = 0, variance;

    out->tokens = t->tokens;
    out->l0 = t->tokens > 0 ? t->active / (double)t->tokens : 0;
    out->overflowed = t->tokens - t->explained;
    for (int c = 0; c < d; c++) {
        mean += n > 0 ? (t->mean[c] / n) * (t->mean[c] / n) : 0;
    }
    variance = n > 0 ? t->square / n - mean : 0;
    out->has_explained = variance > 1e-10 && out->overflowed == 0;
    out->explained = out->has_explained ? 1 - t->error / n / variance : 0;
}

spurion_status spurion_calibrate(spurion_calibration *out, spurion_engine *e, const char *text, size_t bytes)
{
    spurion_status st = spurion_ok();
    calibrator k = {.e = e};
    int leading = 0, window;

    (void)spurion_tokenizer_leading(e->tokenizer, &leading);
    k.rows = e->sequence.tokens_max < e->rows_max ? e->sequence.tokens_max : e->rows_max;
    k.rows = k.rows < WINDOW_TOKENS + leading ? k.rows : WINDOW_TOKENS + leading;
    window = k.rows - leading;
    if (text == NULL) {
        text = built_in;
        bytes = sizeof built_in - 1;
    }
    if (e->sae_count == 0) {
        goto out;
    }
    SPURION_TRY(st, take_memory(&k));
    SPURION_TRY(st, spurion_tokenizer_encode(&k.ids, e->tokenizer, text, bytes));
    if (k.ids.count < 2 || window < 2) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "calibration text: expected at least 2 tokens, found %zu", k.ids.count);
        goto out;
    }
    for (size_t at = 0, n; at < k.ids.count && at < TOKENS_MAX; at += n) {
        n = k.ids.count - at < (size_t)window ? k.ids.count - at : (size_t)window;
        SPURION_TRY(st, run_window(&k, at, (int)n));
    }
    for (int i = 0; i < e->sae_count; i++) {
        finish(&out[i], &k.of[i], e->model->config.hidden);
    }
out:
    drop_memory(&k);
    return st;
}

bool spurion_calibration_warning(char *out, size_t bytes, const spurion_calibration *c)
{
    if (c->overflowed > 0) {
        snprintf(out, bytes, "%lld of %lld tokens have more active features than a row can hold: wrong units (normalisation), or another model",
                 (long long)c->overflowed, (long long)c->tokens);
    } else if (c->l0 == 0) {
        snprintf(out, bytes, "no feature is ever active: wrong units (normalisation), hook or model");
    } else if (c->has_explained && c->explained < 0) {
        snprintf(out, bytes, "explained variance is negative, worse than the mean alone: wrong units (normalisation), hook or model");
    } else if (c->has_explained && c->explained < EXPLAINED_LOW) {
        snprintf(out, bytes, "explained variance is low: check hook, units (normalisation), and whether it was trained on this model");
    } else {
        return false;
    }
    return true;
}

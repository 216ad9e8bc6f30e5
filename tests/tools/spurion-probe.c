/* What the engine sees at its hooks, for tests: residual stream, gradient and features of every rollout's completion, one rollout at a time.
 * spurion-probe --config C --what hooks|grads|features --out FILE.safetensors < rollouts.jsonl
 * writes <line>/x/<sae> and <line>/g/<sae> (|C|, d) f32, <line>/f/<sae>/{index, row} i32 and /value f32; lines count from 1. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/engine_internal.h"
#include "daemon/json_rollout.h"

/* A safetensors file being written: header text and data, kept in memory until the end. */
typedef struct output {
    char *header, *data;
    size_t header_size, data_size;
    FILE *header_file, *data_file;
    size_t at;
} output;

typedef struct probe {
    spurion_engine *engine;
    output out;
    int line;
    const char *what;
} probe;

static void put(output *o, const char *name, const char *dtype, const void *data, size_t rows, size_t columns)
{
    size_t bytes = rows * (columns ? columns : 1) * 4;
    fprintf(o->header_file, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%zu", o->at || ftell(o->header_file) > 1 ? "," : "", name, dtype, rows);
    if (columns) {
        fprintf(o->header_file, ",%zu", columns);
    }
    fprintf(o->header_file, "],\"data_offsets\":[%zu,%zu]}", o->at, o->at + bytes);
    fwrite(data, 1, bytes, o->data_file);
    o->at += bytes;
}

static spurion_status put_rows(probe *p, char kind, int sae, const float *device, int rows)
{
    spurion_status st;
    spurion_engine *e = p->engine;
    size_t d = (size_t)e->model->config.hidden;
    float *host = malloc((size_t)rows * d * sizeof *host);
    char name[256];

    if (!host) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %d rows", rows);
    }
    SPURION_TRY(st, e->dev->ops->download(e->dev, host, device, (size_t)rows * d * sizeof *host));
    snprintf(name, sizeof name, "%d/%c/%s", p->line, kind, e->saes[sae]->id);
    put(&p->out, name, "F32", host, (size_t)rows, d);
out:
    free(host);
    return st;
}

static spurion_status observe(void *context, int sae, const float *g, int rows)
{
    probe *p = context;
    return strcmp(p->what, "grads") == 0 ? put_rows(p, 'g', sae, g, rows) : spurion_ok();
}

static void put_features(probe *p, int sae, int rows)
{
    const spurion_sae_rows *h = &p->engine->hand[0].host[sae];
    int slots = p->engine->saes[sae]->full.slots;
    int32_t *index = malloc((size_t)rows * (size_t)slots * 4), *row = malloc((size_t)rows * (size_t)slots * 4);
    float *value = malloc((size_t)rows * (size_t)slots * 4);
    size_t n = 0;
    char name[256];

    for (int t = 0; index && row && value && t < rows; t++) {
        for (int s = 0; s < h->count[t] && s < slots; s++, n++) {
            index[n] = h->index[(size_t)t * (size_t)slots + (size_t)s];
            value[n] = h->value[(size_t)t * (size_t)slots + (size_t)s];
            row[n] = t;
        }
    }
    snprintf(name, sizeof name, "%d/f/%s/index", p->line, p->engine->saes[sae]->id);
    put(&p->out, name, "I32", index, n, 0);
    snprintf(name, sizeof name, "%d/f/%s/value", p->line, p->engine->saes[sae]->id);
    put(&p->out, name, "F32", value, n, 0);
    snprintf(name, sizeof name, "%d/f/%s/row", p->line, p->engine->saes[sae]->id);
    put(&p->out, name, "I32", row, n, 0);
    free(index);
    free(row);
    free(value);
}

static spurion_status probe_line(probe *p, const char *line, size_t size)
{
    spurion_status st = spurion_ok();
    spurion_engine *e = p->engine;
    spurion_job job, *jobs = &job;
    spurion_json_names names;
    bool group_known;
    int rows;

    memset(&job, 0, sizeof job);
    spurion_arena_init(&job.arena, 0);
    if (spurion_json_rollout(&job, &names, &group_known, line, size) != SPURION_LINE_ROLLOUT) {
        goto out;
    }
    spurion_engine_prepare(e, &job);
    if (job.verdict.code != SPURION_OK) {
        goto out;
    }
    SPURION_TRY(st, spurion_measure(e, &jobs, 1, true, true));
    rows = job.token_count - spurion_pack_start(&job, e->scope_all);
    for (int i = 0; i < e->sae_count; i++) {
        if (strcmp(p->what, "hooks") == 0) {
            SPURION_TRY(st, put_rows(p, 'x', i, e->point_x[e->saes[i]->point], rows));
        } else if (strcmp(p->what, "features") == 0) {
            put_features(p, i, rows);
        }
    }
out:
    spurion_arena_fini(&job.arena);
    return st;
}

static int output_write(output *o, const char *path)
{
    FILE *f = fopen(path, "wb");
    uint64_t size;

    fprintf(o->header_file, "}");
    while (ftell(o->header_file) % 8) {
        fprintf(o->header_file, " ");
    }
    fclose(o->header_file);
    fclose(o->data_file);
    size = o->header_size;
    if (!f || fwrite(&size, 8, 1, f) != 1 || fwrite(o->header, 1, o->header_size, f) != o->header_size ||
        fwrite(o->data, 1, o->data_size, f) != o->data_size || fclose(f) != 0) {
        fprintf(stderr, "spurion-probe: %s: cannot be written\n", path);
        return 74;
    }
    free(o->header);
    free(o->data);
    return 0;
}

int main(int argc, char **argv)
{
    const char *config_path = NULL, *out_path = NULL, *overrides[] = {"attribution.method=grad", "attribution.completeness=false"};
    probe p = {.what = ""};
    spurion_config config;
    spurion_status st;
    char *line = NULL;
    size_t capacity = 0;
    ssize_t size;
    int status = 0;

    for (int i = 1; i + 1 < argc; i += 2) {
        config_path = strcmp(argv[i], "--config") == 0 ? argv[i + 1] : config_path;
        p.what = strcmp(argv[i], "--what") == 0 ? argv[i + 1] : p.what;
        out_path = strcmp(argv[i], "--out") == 0 ? argv[i + 1] : out_path;
    }
    if (!config_path || !out_path) {
        fprintf(stderr, "usage: spurion-probe --config C --what hooks|grads|features --out FILE < rollouts.jsonl\n");
        return 64;
    }
    p.out.header_file = open_memstream(&p.out.header, &p.out.header_size);
    p.out.data_file = open_memstream(&p.out.data, &p.out.data_size);
    fprintf(p.out.header_file, "{");
    SPURION_TRY(st, spurion_config_load(&config, config_path, overrides, 2));
    SPURION_TRY(st, spurion_engine_create(&p.engine, &config));
    p.engine->observe = observe;
    p.engine->observe_context = &p;
    while ((size = getline(&line, &capacity, stdin)) > 0) {
        p.line++;
        SPURION_TRY(st, probe_line(&p, line, (size_t)(line[size - 1] == '\n' ? size - 1 : size)));
    }
    status = output_write(&p.out, out_path);
    spurion_engine_destroy(p.engine);
    spurion_config_fini(&config);
out:
    free(line);
    if (st.code != SPURION_OK) {
        fprintf(stderr, "spurion-probe: %s\n", st.message);
        return 70;
    }
    return status;
}

/* Loads a reward model's weights onto a device; see model.h. */
#include "daemon/model/model.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/base/check.h"

/* What loading needs at hand. */
typedef struct loader {
    spurion_model *m;
    spurion_weights *weights;
    float *staging; /* largest tensor, or two fused ones */
    size_t staging_count;
    int backward_from;
} loader;

static spurion_status staging_reserve(loader *l, size_t count)
{
    if (count > l->staging_count) {
        free(l->staging);
        l->staging = malloc(count * sizeof(float));
        l->staging_count = l->staging ? count : 0;
        if (!l->staging) {
            return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a weight of %zu numbers", count);
        }
    }
    return spurion_ok();
}

/* Reads one vector onto the device; a role that the checkpoint lacks stays NULL. */
static spurion_status vector_load(float **out, loader *l, spurion_role role, int layer)
{
    spurion_status st;
    spurion_dev *dev = l->m->dev;
    size_t count;

    *out = NULL;
    if (!spurion_weights_has(l->weights, role, layer)) {
        return spurion_ok();
    }
    count = spurion_weights_elements(l->weights, role, layer);
    SPURION_TRY(st, staging_reserve(l, count));
    SPURION_TRY(st, spurion_weights_read(l->staging, l->weights, role, layer));
    SPURION_TRY(st, dev->ops->alloc(dev, (void **)out, count * sizeof(float)));
    SPURION_TRY(st, dev->ops->upload(dev, *out, l->staging, count * sizeof(float)));
    l->m->bytes += count * sizeof(float);
out:
    return st;
}

/* Roles stacked into one matrix: rows of the first over rows of the second (count 1 or 2), and their biases. */
typedef struct fused {
    spurion_role weight[2], bias[2];
    int count, rows[2];
} fused;

static spurion_status matrix_load(spurion_matrix **out, loader *l, const fused *f, int layer, int columns)
{
    spurion_status st;
    spurion_dev *dev = l->m->dev;
    size_t row_count = (size_t)f->rows[0] + (f->count == 2 ? (size_t)f->rows[1] : 0);
    size_t weight_count = row_count * (size_t)columns;
    int directions = SPURION_FORWARD | (layer >= l->backward_from ? SPURION_BACKWARD : 0);
    float *bias = NULL;
    size_t at = 0, row = 0;

    SPURION_TRY(st, staging_reserve(l, weight_count + row_count));
    memset(l->staging + weight_count, 0, row_count * sizeof(float));
    for (int i = 0; i < f->count; i++) {
        SPURION_TRY(st, spurion_weights_read(l->staging + at, l->weights, f->weight[i], layer));
        if (spurion_weights_has(l->weights, f->bias[i], layer)) {
            bias = l->staging + weight_count;
            SPURION_TRY(st, spurion_weights_read(bias + row, l->weights, f->bias[i], layer));
        }
        at += (size_t)f->rows[i] * (size_t)columns;
        row += (size_t)f->rows[i];
    }
    SPURION_TRY(st, dev->ops->matrix_create(dev, out, l->staging, bias, (int)row_count, columns, directions, dev->dtype));
    l->m->bytes += dev->ops->matrix_bytes(dev, (int)row_count, columns, directions, dev->dtype);
out:
    return st;
}

static spurion_status layer_load(loader *l, int i)
{
    spurion_status st;
    const spurion_model_config *c = &l->m->config;
    spurion_layer *y = &l->m->layers[i];
    int q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    const fused fq = {{SPURION_ROLE_Q, SPURION_ROLE_Q}, {SPURION_ROLE_Q_B, SPURION_ROLE_Q_B}, 1, {q, 0}};
    const fused fkv = {{SPURION_ROLE_K, SPURION_ROLE_V}, {SPURION_ROLE_K_B, SPURION_ROLE_V_B}, 2, {kv, kv}};
    const fused fo = {{SPURION_ROLE_O, SPURION_ROLE_O}, {SPURION_ROLE_O_B, SPURION_ROLE_O_B}, 1, {c->hidden, 0}};
    const fused fgated = {{SPURION_ROLE_GATE, SPURION_ROLE_UP}, {SPURION_ROLE_GATE_B, SPURION_ROLE_UP_B}, 2, {c->ff, c->ff}};
    const fused fup = {{SPURION_ROLE_UP, SPURION_ROLE_UP}, {SPURION_ROLE_UP_B, SPURION_ROLE_UP_B}, 1, {c->ff, 0}};
    const fused fdown = {{SPURION_ROLE_DOWN, SPURION_ROLE_DOWN}, {SPURION_ROLE_DOWN_B, SPURION_ROLE_DOWN_B}, 1, {c->hidden, 0}};

    SPURION_TRY(st, vector_load(&y->norm1_w, l, SPURION_ROLE_NORM1_W, i));
    SPURION_TRY(st, vector_load(&y->norm1_b, l, SPURION_ROLE_NORM1_B, i));
    SPURION_TRY(st, vector_load(&y->norm2_w, l, SPURION_ROLE_NORM2_W, i));
    SPURION_TRY(st, vector_load(&y->norm2_b, l, SPURION_ROLE_NORM2_B, i));
    SPURION_TRY(st, vector_load(&y->post_attention_w, l, SPURION_ROLE_POST_ATTENTION_W, i));
    SPURION_TRY(st, vector_load(&y->post_mlp_w, l, SPURION_ROLE_POST_MLP_W, i));
    SPURION_TRY(st, vector_load(&y->q_norm, l, SPURION_ROLE_Q_NORM, i));
    SPURION_TRY(st, vector_load(&y->k_norm, l, SPURION_ROLE_K_NORM, i));
    SPURION_TRY(st, matrix_load(&y->q, l, &fq, i, c->hidden));
    SPURION_TRY(st, matrix_load(&y->kv, l, &fkv, i, c->hidden));
    SPURION_TRY(st, matrix_load(&y->o, l, &fo, i, q));
    SPURION_TRY(st, matrix_load(&y->up, l, c->gated ? &fgated : &fup, i, c->hidden));
    SPURION_TRY(st, matrix_load(&y->down, l, &fdown, i, c->ff));
out:
    return st;
}

/* Rounds to bf16, to nearest even. */
static uint16_t to_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static spurion_status embed_load(loader *l)
{
    spurion_status st;
    spurion_model *m = l->m;
    spurion_dev *dev = m->dev;
    size_t count = (size_t)m->vocab * (size_t)m->config.hidden;
    size_t bytes = count * spurion_dtype_bytes(dev->dtype);

    m->embed_dtype = dev->dtype;
    SPURION_TRY(st, staging_reserve(l, count));
    SPURION_TRY(st, spurion_weights_read(l->staging, l->weights, SPURION_ROLE_EMBED, 0));
    if (dev->dtype == SPURION_BF16) { /* in place: the narrow value never overtakes the wide one */
        unsigned char *narrow = (unsigned char *)l->staging;
        for (size_t i = 0; i < count; i++) {
            uint16_t b = to_bf16(l->staging[i]);
            memcpy(narrow + 2 * i, &b, sizeof b);
        }
    }
    SPURION_TRY(st, dev->ops->alloc(dev, &m->embed, bytes));
    SPURION_TRY(st, dev->ops->upload(dev, m->embed, l->staging, bytes));
    m->bytes += bytes;
out:
    return st;
}

static spurion_status rope_load(loader *l, int positions)
{
    spurion_status st = spurion_ok();
    spurion_model *m = l->m;
    spurion_dev *dev = m->dev;
    size_t count = (size_t)positions * (size_t)m->config.rot;

    if (m->config.rope == SPURION_ROPE_NONE) {
        return st;
    }
    SPURION_TRY(st, staging_reserve(l, count));
    spurion_model_rope_table(l->staging, &m->config, positions);
    SPURION_TRY(st, dev->ops->alloc(dev, (void **)&m->rope, count * sizeof(float)));
    SPURION_TRY(st, dev->ops->upload(dev, m->rope, l->staging, count * sizeof(float)));
    m->bytes += count * sizeof(float);
out:
    return st;
}

/* The row head_index of the score head, and its bias. */
static spurion_status head_load(loader *l, int head_index)
{
    spurion_status st;
    spurion_model *m = l->m;
    spurion_dev *dev = m->dev;
    size_t d = (size_t)m->config.hidden, count = d * (size_t)m->config.outputs;

    SPURION_ASSERT(head_index >= 0 && head_index < m->config.outputs);
    SPURION_TRY(st, staging_reserve(l, count + (size_t)m->config.outputs));
    SPURION_TRY(st, spurion_weights_read(l->staging, l->weights, SPURION_ROLE_SCORE, 0));
    SPURION_TRY(st, dev->ops->alloc(dev, (void **)&m->score_w, d * sizeof(float)));
    SPURION_TRY(st, dev->ops->upload(dev, m->score_w, l->staging + d * (size_t)head_index, d * sizeof(float)));
    for (size_t i = 0; m->config.head_normalized && i < d; i++) {
        l->staging[d * (size_t)head_index + i] /= m->config.head_std;
    }
    SPURION_TRY(st, dev->ops->alloc(dev, (void **)&m->score_g, d * sizeof(float)));
    SPURION_TRY(st, dev->ops->upload(dev, m->score_g, l->staging + d * (size_t)head_index, d * sizeof(float)));
    if (spurion_weights_has(l->weights, SPURION_ROLE_SCORE_B, 0)) {
        SPURION_TRY(st, spurion_weights_read(l->staging + count, l->weights, SPURION_ROLE_SCORE_B, 0));
        m->score_b = l->staging[count + (size_t)head_index];
    }
    SPURION_TRY(st, vector_load(&m->final_w, l, SPURION_ROLE_FINAL_W, 0));
    SPURION_TRY(st, vector_load(&m->final_b, l, SPURION_ROLE_FINAL_B, 0));
out:
    return st;
}

spurion_status spurion_model_load(spurion_model **out, spurion_dev *dev, const spurion_model_config *config, spurion_weights *weights,
                                  int positions, int backward_from, int head_index)
{
    spurion_status st;
    loader l = {.weights = weights, .backward_from = backward_from};

    *out = NULL;
    l.m = calloc(1, sizeof *l.m);
    if (!l.m || !(l.m->layers = calloc((size_t)config->layers, sizeof *l.m->layers))) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for the model's tables");
        goto out;
    }
    l.m->config = *config;
    l.m->dev = dev;
    l.m->vocab = spurion_weights_vocab(weights);
    SPURION_TRY(st, embed_load(&l));
    SPURION_TRY(st, vector_load(&l.m->position_table, &l, SPURION_ROLE_POSITION, 0));
    SPURION_TRY(st, rope_load(&l, positions));
    for (int i = 0; i < config->layers; i++) {
        SPURION_TRY(st, layer_load(&l, i));
    }
    SPURION_TRY(st, head_load(&l, head_index));
    *out = l.m;
    l.m = NULL;
out:
    free(l.staging);
    spurion_model_destroy(l.m);
    return st;
}

void spurion_model_destroy(spurion_model *m)
{
    if (!m) {
        return;
    }
    for (int i = 0; m->layers && i < m->config.layers; i++) {
        spurion_layer *y = &m->layers[i];
        float *vectors[] = {y->norm1_w, y->norm1_b, y->norm2_w, y->norm2_b, y->post_attention_w, y->post_mlp_w, y->q_norm, y->k_norm};
        spurion_matrix *matrices[] = {y->q, y->kv, y->o, y->up, y->down};
        for (size_t v = 0; v < sizeof vectors / sizeof *vectors; v++) {
            m->dev->ops->free(m->dev, vectors[v]);
        }
        for (size_t v = 0; v < sizeof matrices / sizeof *matrices; v++) {
            m->dev->ops->matrix_destroy(m->dev, matrices[v]);
        }
    }
    if (m->dev) {
        void *blocks[] = {m->embed, m->position_table, m->rope, m->final_w, m->final_b, m->score_w, m->score_g};
        for (size_t v = 0; v < sizeof blocks / sizeof *blocks; v++) {
            m->dev->ops->free(m->dev, blocks[v]);
        }
    }
    free(m->layers);
    free(m);
}

float spurion_model_reward(const spurion_model *m, float raw)
{
    const spurion_model_config *c = &m->config;
    return c->head_normalized ? (raw - c->head_mean) / c->head_std : raw;
}

bool spurion_model_prunable(const spurion_model *m, const bool *hook_points)
{
    int last = 4 * (m->config.layers - 1);
    return !hook_points[last + SPURION_SITE_ATTN] && !hook_points[last + SPURION_SITE_MID] && !hook_points[last + SPURION_SITE_MLP] &&
           !hook_points[last + 4];
}

/* Loads a reward model's weights onto a device; see model.h. */
#include "daemon/model/model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/check.h"
#include "daemon/model/head.h"

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
    int forward, backward; /* products of each direction */
} fused;

static spurion_status matrix_load(spurion_matrix **out, loader *l, const fused *f, int layer, int columns)
{
    spurion_status st;
    spurion_dev *dev = l->m->dev;
    size_t row_count = (size_t)f->rows[0] + (f->count == 2 ? (size_t)f->rows[1] : 0);
    size_t weight_count = row_count * (size_t)columns;
    int directions = f->forward | (layer >= l->backward_from ? f->backward : 0);
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
    const spurion_model *m = l->m;
    const spurion_model_config *c = &m->config;
    spurion_layer *y = &m->layers[i];
    int q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    int narrow = m->dev->mid == SPURION_F32 ? SPURION_FORWARD : SPURION_FORWARD_ACT;
    int narrow_back = m->dev->mid == SPURION_F32 ? SPURION_BACKWARD : SPURION_BACKWARD_ACT;
    bool gelu = c->act == SPURION_ACT_GELU_TANH && !c->gated;
    int heads = c->qk_norm ? SPURION_FORWARD : narrow; /* run.h */
    const fused fq = {{SPURION_ROLE_Q, SPURION_ROLE_Q}, {SPURION_ROLE_Q_B, SPURION_ROLE_Q_B}, 1, {q, 0}, heads, SPURION_BACKWARD};
    const fused fkv = {{SPURION_ROLE_K, SPURION_ROLE_V}, {SPURION_ROLE_K_B, SPURION_ROLE_V_B}, 2, {kv, kv}, heads, SPURION_BACKWARD};
    const fused fo = {{SPURION_ROLE_O, SPURION_ROLE_O}, {SPURION_ROLE_O_B, SPURION_ROLE_O_B}, 1, {c->hidden, 0}, SPURION_FORWARD,
                      narrow_back};
    const fused fgated = {{SPURION_ROLE_GATE, SPURION_ROLE_UP}, {SPURION_ROLE_GATE_B, SPURION_ROLE_UP_B}, 2, {c->ff, c->ff}, narrow, SPURION_BACKWARD};
    const fused fup = {{SPURION_ROLE_UP, SPURION_ROLE_UP}, {SPURION_ROLE_UP_B, SPURION_ROLE_UP_B}, 1, {c->ff, 0},
                       gelu ? SPURION_FORWARD_GELU : narrow, SPURION_BACKWARD};
    const fused fdown = {{SPURION_ROLE_DOWN, SPURION_ROLE_DOWN}, {SPURION_ROLE_DOWN_B, SPURION_ROLE_DOWN_B}, 1, {c->hidden, 0},
                         SPURION_FORWARD, gelu ? SPURION_BACKWARD_GELU : narrow_back};

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

/* The embedding's factor in the pass's dtype: transformers casts it to the weight's (Gemma2TextScaledWordEmbedding). */
static float embed_scale_round(float scale, spurion_dtype dtype)
{
    uint32_t u;
    if (dtype != SPURION_BF16) {
        return scale;
    }
    u = (uint32_t)to_bf16(scale) << 16;
    memcpy(&scale, &u, sizeof scale);
    return scale;
}

static spurion_status embed_load(loader *l)
{
    spurion_status st;
    spurion_model *m = l->m;
    spurion_dev *dev = m->dev;
    size_t count = (size_t)m->vocab * (size_t)m->config.hidden;
    size_t bytes = count * spurion_dtype_bytes(dev->dtype);

    m->embed_dtype = dev->dtype;
    m->config.embed_scale = embed_scale_round(m->config.embed_scale, dev->dtype);
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

/* A head whose numbers are all one number was never trained: every text would get the same reward, or nearly. */
static spurion_status head_check_trained(const loader *l, const float *w, size_t count)
{
    char name[SPURION_HEAD_NAME_BYTES];

    for (size_t i = 1; i < count; i++) {
        if (w[i] != w[0]) {
            return spurion_ok();
        }
    }
    if (count == 1) {
        return spurion_ok();
    }
    spurion_head_tensor(name, &l->m->config.head, l->m->config.head.hidden, "weight");
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a trained score head, found the same number (%g) everywhere", name, (double)w[0]);
}

/* One vector of the head (outputs), or the given number where the checkpoint has none. */
static spurion_status head_vector(float *out, const loader *l, spurion_role role, int layer, float otherwise)
{
    if (spurion_weights_has(l->weights, role, layer)) {
        return spurion_weights_read(out, l->weights, role, layer);
    }
    for (int i = 0; i < l->m->config.outputs; i++) {
        out[i] = otherwise;
    }
    return spurion_ok();
}

/* row (width) = sum_j w_j W_j / sd_j and *bias = sum_j w_j (b_j - mean_j) / sd_j: reward = <row, h> + bias, whatever the checkpoint
 * normalises and however many outputs are weighed. W (outputs, width); vectors (3, outputs): bias, mean, variance. */
static void head_fold(float *row, float *bias, const spurion_model_config *c, spurion_head_choice choice, const float *W, size_t width,
                      const float *vectors)
{
    size_t n = (size_t)c->outputs;
    double b = 0;

    for (size_t k = 0; k < width; k++) {
        double sum = 0;
        for (size_t j = 0; j < n; j++) {
            double weight = choice.weights ? choice.weights[j] : j == (size_t)choice.index;
            double sd = c->head.std * (c->head.rescale ? sqrt((double)vectors[2 * n + j]) : 1);
            sum += weight == 0 ? 0 : weight * (double)W[j * width + k] / sd;
        }
        row[k] = (float)sum;
    }
    for (size_t j = 0; j < n; j++) {
        double weight = choice.weights ? choice.weights[j] : j == (size_t)choice.index;
        double sd = c->head.rescale ? sqrt((double)vectors[2 * n + j]) : 1;
        double raw = ((double)vectors[j] - (c->head.centre ? (double)vectors[n + j] : 0)) / sd;
        b += weight == 0 ? 0 : weight * (raw - c->head.mean) / c->head.std;
    }
    *bias = (float)b;
}

/* Hidden layer l of the head. */
static spurion_status head_hidden_load(loader *l, int i, int columns)
{
    spurion_status st;
    spurion_model *m = l->m;
    spurion_dev *dev = m->dev;
    size_t rows = (size_t)m->config.head.width[i], count = rows * (size_t)columns;
    float *bias = NULL;

    SPURION_TRY(st, staging_reserve(l, count + rows));
    SPURION_TRY(st, spurion_weights_read(l->staging, l->weights, SPURION_ROLE_SCORE, i));
    if (spurion_weights_has(l->weights, SPURION_ROLE_SCORE_B, i)) {
        bias = l->staging + count;
        SPURION_TRY(st, spurion_weights_read(bias, l->weights, SPURION_ROLE_SCORE_B, i));
    }
    SPURION_TRY(st, dev->ops->matrix_create(dev, &m->head[i], l->staging, bias, (int)rows, columns, SPURION_FORWARD | SPURION_BACKWARD, dev->dtype));
    m->bytes += dev->ops->matrix_bytes(dev, (int)rows, columns, SPURION_FORWARD | SPURION_BACKWARD, dev->dtype);
out:
    return st;
}

/* The score head: hidden layers, and the last one folded to a single row. */
static spurion_status head_load(loader *l, spurion_head_choice choice)
{
    spurion_status st;
    spurion_model *m = l->m;
    spurion_dev *dev = m->dev;
    int hidden = m->config.head.hidden, width = m->config.hidden;
    size_t n = (size_t)m->config.outputs, count;
    float *vectors, *row;

    SPURION_ASSERT(choice.weights || (choice.index >= 0 && choice.index < m->config.outputs));
    for (int i = 0; i < hidden; i++) {
        SPURION_TRY(st, head_hidden_load(l, i, width));
        width = m->config.head.width[i];
    }
    count = n * (size_t)width;
    SPURION_TRY(st, staging_reserve(l, count + 3 * n + (size_t)width));
    vectors = l->staging + count;
    row = vectors + 3 * n;
    SPURION_TRY(st, spurion_weights_read(l->staging, l->weights, SPURION_ROLE_SCORE, hidden));
    SPURION_TRY(st, head_check_trained(l, l->staging, count));
    SPURION_TRY(st, head_vector(vectors, l, SPURION_ROLE_SCORE_B, hidden, 0));
    m->head_fresh = spurion_head_fresh(&m->config.head, l->staging, count, (size_t)width, vectors, n);
    SPURION_TRY(st, head_vector(vectors + n, l, SPURION_ROLE_SCORE_MEAN, 0, 0));
    SPURION_TRY(st, head_vector(vectors + 2 * n, l, SPURION_ROLE_SCORE_VAR, 0, 1));
    head_fold(row, &m->score_b, &m->config, choice, l->staging, (size_t)width, vectors);
    SPURION_TRY(st, spurion_check_finite(row, (size_t)width, "the score head after its normalisation", m->config.architecture));
    SPURION_TRY(st, dev->ops->alloc(dev, (void **)&m->score_w, (size_t)width * sizeof(float)));
    SPURION_TRY(st, dev->ops->upload(dev, m->score_w, row, (size_t)width * sizeof(float)));
    if (hidden) {
        SPURION_TRY(st, dev->ops->matrix_create(dev, &m->head[hidden], row, &m->score_b, 1, width, SPURION_FORWARD, dev->dtype));
        m->bytes += dev->ops->matrix_bytes(dev, 1, width, SPURION_FORWARD, dev->dtype);
    }
    m->bytes += (size_t)width * sizeof(float);
    SPURION_TRY(st, vector_load(&m->final_w, l, SPURION_ROLE_FINAL_W, 0));
    SPURION_TRY(st, vector_load(&m->final_b, l, SPURION_ROLE_FINAL_B, 0));
out:
    return st;
}

spurion_status spurion_model_load(spurion_model **out, spurion_dev *dev, const spurion_model_config *config, spurion_weights *weights,
                                  int positions, int backward_from, spurion_head_choice choice)
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
    SPURION_TRY(st, head_load(&l, choice));
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
        void *blocks[] = {m->embed, m->position_table, m->rope, m->final_w, m->final_b, m->score_w};
        for (size_t v = 0; v < sizeof blocks / sizeof *blocks; v++) {
            m->dev->ops->free(m->dev, blocks[v]);
        }
        for (int i = 0; i <= SPURION_HEAD_LAYERS_MAX; i++) {
            m->dev->ops->matrix_destroy(m->dev, m->head[i]);
        }
    }
    free(m->layers);
    free(m);
}

bool spurion_model_prunable(const spurion_model *m, const bool *hook_points)
{
    int last = 4 * (m->config.layers - 1);
    return m->config.pooling != SPURION_POOL_MEAN && !hook_points[last + SPURION_SITE_ATTN] && !hook_points[last + SPURION_SITE_MID] && !hook_points[last + SPURION_SITE_MLP] &&
           !hook_points[last + 4];
}

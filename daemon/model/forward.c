/* The forward pass over packed rows, block by block, for every family. Row-wise work goes in chunks of rows, so that scratch is
 * bounded and stays in cache. Thread: the engine's. Memory: the workspace. */
#include "daemon/model/run.h"

#include "daemon/base/check.h"

spurion_status spurion_model_embed(const spurion_model *m, spurion_workspace *w, int rows)
{
    SPURION_ASSERT(rows <= w->rows_max);
    return m->dev->ops->embed(m->dev, w->x, m->embed, m->embed_dtype, m->position_table, w->ids, w->positions, rows, m->config.hidden,
                              m->config.embed_scale);
}

/* Before rotary: the per-head norm of q or k (Qwen3), kept raw for the backward pass. *x, *stride move to the normed values. */
static spurion_status head_norm(const spurion_run *r, const void **x, int *stride, int heads, const float *weight, float *raw,
                                float *stats, int n)
{
    spurion_status st = spurion_ok();
    const spurion_model_config *c = &r->m->config;
    spurion_rows shape = {n, heads, c->head_dim};
    int width = heads * c->head_dim;

    if (!c->qk_norm) {
        return st;
    }
    if (raw) { /* rope without rotation copies strided rows */
        SPURION_TRY(st, r->ops->rope_f32(r->dev, raw, width, *x, *stride, NULL, NULL, shape, 0, SPURION_ROPE_NONE, 0));
    }
    SPURION_TRY(st, r->ops->norm(r->dev, NULL, r->w->c_n, width, stats, *x, *stride, weight, NULL, shape, c->eps, SPURION_NORM_RMS,
                                 SPURION_OVERWRITE));
    *x = r->w->c_n;
    *stride = width;
out:
    return st;
}

/* Keys and values of rows r0 .. r0 + n, into the layer's buffers; h of these rows stays in w->h. */
static spurion_status keys_values(const spurion_run *r, int l, const spurion_part *part, int r0, int n)
{
    spurion_status st;
    const spurion_model_config *c = &r->m->config;
    const spurion_layer *y = &r->m->layers[l];
    spurion_workspace *w = r->w;
    spurion_saved *sv = part->sv && r0 < part->kept ? part->sv : NULL;
    void *h = spurion_act_at(r, w->h, (size_t)r0, r->d);
    size_t at = (size_t)r->p->kv_row + (size_t)r0;
    const void *k = w->c_kv;
    int stride = 2 * r->kv;
    spurion_rows shape = {n, c->kv_heads, c->head_dim};

    SPURION_TRY(st, r->ops->norm(r->dev, h, NULL, r->d, sv ? sv->stats1 + 2 * (size_t)r0 : NULL, part->x + (size_t)r0 * (size_t)r->d, r->d,
                                 y->norm1_w, y->norm1_b, spurion_plain_rows(n, r->d), c->eps, c->norm, SPURION_OVERWRITE));
    SPURION_TRY(st, r->ops->linear(r->dev, w->c_kv, r->heads, 2 * r->kv, h, y->kv, n, SPURION_OVERWRITE));
    SPURION_TRY(st, head_norm(r, &k, &stride, c->kv_heads, y->k_norm, sv && c->qk_norm ? sv->k_raw + (size_t)r0 * (size_t)r->kv : NULL,
                              sv && c->qk_norm ? sv->k_stats + 2 * (size_t)r0 * (size_t)c->kv_heads : NULL, n));
    SPURION_TRY(st, r->ops->rope(r->dev, spurion_act_at(r, w->k[l], at, r->kv), r->kv, k, r->heads, stride, part->positions + r0, r->m->rope,
                                 shape, c->rot, c->rope, 0));
    SPURION_TRY(st, r->ops->cast(r->dev, spurion_act_at(r, w->v[l], at, r->kv), r->kv, spurion_row_at(w->c_kv, r->heads, 1, r->kv), r->heads,
                                 2 * r->kv, n, r->kv));
out:
    return st;
}

/* Queries of rows r0 .. r0 + n of the part from w->h. */
static spurion_status queries(const spurion_run *r, int l, const spurion_part *part, int r0, int n)
{
    spurion_status st;
    const spurion_model_config *c = &r->m->config;
    const spurion_layer *y = &r->m->layers[l];
    spurion_workspace *w = r->w;
    spurion_saved *sv = part->sv && r0 < part->kept ? part->sv : NULL;
    const void *q = w->c_q;
    int stride = r->q;
    spurion_rows shape = {n, c->heads, c->head_dim};

    SPURION_TRY(st, r->ops->linear(r->dev, w->c_q, r->heads, r->q, spurion_act_at(r, w->h, (size_t)r0, r->d), y->q, n, SPURION_OVERWRITE));
    SPURION_TRY(st, head_norm(r, &q, &stride, c->heads, y->q_norm, sv && c->qk_norm ? sv->q_raw + (size_t)r0 * (size_t)r->q : NULL,
                              sv && c->qk_norm ? sv->q_stats + 2 * (size_t)r0 * (size_t)c->heads : NULL, n));
    SPURION_TRY(st, r->ops->rope(r->dev, spurion_act_at(r, part->q, (size_t)r0, r->q), r->q, q, r->heads, stride, part->positions + r0,
                                 r->m->rope, shape, c->rot, c->rope, 0));
out:
    return st;
}

/* out (n, d) (+)= post-normed product of act rows with a weight; raw and stats are kept for the backward pass where given. */
static spurion_status project(const spurion_run *r, float *out, const void *in, const spurion_matrix *weight, const float *post_norm,
                              float *raw, float *stats, int n, spurion_write mode)
{
    spurion_status st;
    const spurion_model_config *c = &r->m->config;
    float *first = raw ? raw : r->w->c_d;

    if (!post_norm) {
        return r->ops->linear(r->dev, out, SPURION_F32, r->d, in, weight, n, mode);
    }
    SPURION_TRY(st, r->ops->linear(r->dev, first, SPURION_F32, r->d, in, weight, n, SPURION_OVERWRITE));
    SPURION_TRY(st, r->ops->norm(r->dev, NULL, out, r->d, stats, first, r->d, post_norm, NULL, spurion_plain_rows(n, r->d), c->eps, c->norm, mode));
out:
    return st;
}

/* x or y of the part += attention output. */
static spurion_status attention_output(const spurion_run *r, int l, const spurion_part *part, float *out, int r0, int n, spurion_write mode)
{
    const spurion_layer *y = &r->m->layers[l];
    spurion_saved *sv = part->sv && r0 < part->kept && r->m->config.post_norms ? part->sv : NULL;
    size_t at = (size_t)r0 * (size_t)r->d;

    return project(r, out + at, spurion_act_at(r, part->attention, (size_t)r0, r->q), y->o, y->post_attention_w, sv ? sv->attn_raw + at : NULL,
                   sv ? sv->attn_stats + 2 * (size_t)r0 : NULL, n, mode);
}

/* out (+)= MLP of normalised rows h. */
static spurion_status mlp(const spurion_run *r, int l, const spurion_part *part, float *out, const void *h, int r0, int n, spurion_write mode)
{
    spurion_status st;
    const spurion_model_config *c = &r->m->config;
    const spurion_layer *y = &r->m->layers[l];
    spurion_saved *sv = part->sv && r0 < part->kept ? part->sv : NULL;
    void *pre = sv ? spurion_row_at(sv->pre, r->mid, (size_t)r0, r->pre) : r->w->c_pre;
    size_t at = (size_t)r0 * (size_t)r->d;
    bool post = sv && c->post_norms;

    SPURION_TRY(st, r->ops->linear_act(r->dev, r->w->c_act, pre, r->mid, sv != NULL, h, y->up, n, c->act, c->gated));
    SPURION_TRY(st, project(r, out + at, r->w->c_act, y->down, y->post_mlp_w, post ? sv->mlp_raw + at : NULL,
                            post ? sv->mlp_stats + 2 * (size_t)r0 : NULL, n, mode));
out:
    return st;
}

/* Normalised input of the MLP for rows r0 .. r0 + n: w->h where the norm is shared, else the second norm of x. */
static spurion_status mlp_input(const spurion_run *r, int l, const spurion_part *part, const void **h, int r0, int n)
{
    const spurion_model_config *c = &r->m->config;
    const spurion_layer *y = &r->m->layers[l];
    spurion_saved *sv = part->sv && r0 < part->kept ? part->sv : NULL;

    if (c->shared_norm) {
        *h = spurion_act_at(r, r->w->h, (size_t)r0, r->d);
        return spurion_ok();
    }
    *h = r->w->c_h;
    return r->ops->norm(r->dev, r->w->c_h, NULL, r->d, sv ? sv->stats2 + 2 * (size_t)r0 : NULL, part->x + (size_t)r0 * (size_t)r->d, r->d,
                        y->norm2_w, y->norm2_b, spurion_plain_rows(n, r->d), c->eps, c->norm, SPURION_OVERWRITE);
}

/* Output rows go into y when a hook looks at them before they are added. */
static spurion_status hook_and_add(const spurion_run *r, const spurion_part *part, int point)
{
    spurion_status st;
    SPURION_TRY(st, r->p->hook(r->p->hook_context, point, r->w->y));
    SPURION_TRY(st, r->ops->add(r->dev, part->x, r->w->y, part->rows, r->d));
out:
    return st;
}

static spurion_status attention_added(const spurion_run *r, int l, const spurion_part *part)
{
    spurion_status st = spurion_ok();
    bool hooked = spurion_run_hooked(r, part, 4 * l + SPURION_SITE_ATTN);

    for (int r0 = 0, n; r0 < part->rows; r0 += n) {
        n = spurion_chunk_rows(r, r0, part->rows, part->kept);
        SPURION_TRY(st, attention_output(r, l, part, hooked ? r->w->y : part->x, r0, n, hooked ? SPURION_OVERWRITE : SPURION_ACCUMULATE));
    }
    if (hooked) {
        SPURION_TRY(st, hook_and_add(r, part, 4 * l + SPURION_SITE_ATTN));
    }
out:
    return st;
}

/* Keeps rows r0 .. r0 + n of x for the backward pass, right before they are read anyway. */
static spurion_status save_rows(const spurion_run *r, float *to, const spurion_part *part, int r0, int n)
{
    size_t at = (size_t)r0 * (size_t)r->d;
    bool wanted = part->sv && r0 < part->kept;
    return wanted ? r->ops->copy(r->dev, to + at, part->x + at, (size_t)n * (size_t)r->d * sizeof(float)) : spurion_ok();
}

static spurion_status mlp_added(const spurion_run *r, int l, const spurion_part *part)
{
    spurion_status st = spurion_ok();
    bool hooked = spurion_run_hooked(r, part, 4 * l + SPURION_SITE_MLP);
    const void *h;

    for (int r0 = 0, n; r0 < part->rows; r0 += n) {
        n = spurion_chunk_rows(r, r0, part->rows, part->kept);
        if (part->sv && !r->m->config.parallel) {
            SPURION_TRY(st, save_rows(r, part->sv->x_mid, part, r0, n));
        }
        SPURION_TRY(st, mlp_input(r, l, part, &h, r0, n));
        SPURION_TRY(st, mlp(r, l, part, hooked ? r->w->y : part->x, h, r0, n, hooked ? SPURION_OVERWRITE : SPURION_ACCUMULATE));
    }
    if (hooked) {
        SPURION_TRY(st, hook_and_add(r, part, 4 * l + SPURION_SITE_MLP));
    }
out:
    return st;
}

/* Output projection and MLP. In a parallel block the MLP comes first: it reads x before anything is added. */
static spurion_status block_tail(const spurion_run *r, int l, const spurion_part *part)
{
    spurion_status st;

    if (r->m->config.parallel) {
        SPURION_TRY(st, mlp_added(r, l, part));
        SPURION_TRY(st, attention_added(r, l, part));
        goto out;
    }
    SPURION_TRY(st, attention_added(r, l, part));
    if (spurion_run_hooked(r, part, 4 * l + SPURION_SITE_MID)) {
        SPURION_TRY(st, r->p->hook(r->p->hook_context, 4 * l + SPURION_SITE_MID, part->x));
    }
    SPURION_TRY(st, mlp_added(r, l, part));
out:
    return st;
}

static spurion_status save_input(const spurion_run *r, const spurion_part *part, int r0, int n)
{
    return part->sv ? save_rows(r, part->sv->x_in, part, r0, n) : spurion_ok();
}

static spurion_part whole_part(const spurion_run *r, int l)
{
    spurion_workspace *w = r->w;
    spurion_saved *sv = r->p->save && l >= r->p->save_from ? &w->saved[l] : NULL;
    spurion_part part = {w->x, r->p->rows, sv ? r->p->completion_rows : 0, sv, w->positions, sv ? sv->q : w->q,
                         sv ? sv->attention : w->attention, sv ? sv->lse : w->lse, true};
    return part;
}

static spurion_status block(const spurion_run *r, int l)
{
    spurion_status st;
    spurion_part part = whole_part(r, l);

    for (int r0 = 0, n; r0 < part.rows; r0 += n) {
        n = spurion_chunk_rows(r, r0, part.rows, part.kept);
        SPURION_TRY(st, save_input(r, &part, r0, n));
        SPURION_TRY(st, keys_values(r, l, &part, r0, n));
        SPURION_TRY(st, queries(r, l, &part, r0, n));
    }
    SPURION_TRY(st, r->ops->attention(r->dev, part.attention, part.lse, part.q, r->w->k[l], r->w->v[l], r->p->seqs, r->p->seq_count,
                                      spurion_attention_shape_of(r, l)));
    SPURION_TRY(st, block_tail(r, l, &part));
out:
    return st;
}

/* The last block when only the scored rows are read afterwards: keys and values for all rows, the rest for the scored ones. */
static spurion_status block_pruned(const spurion_run *r, int l)
{
    spurion_status st;
    spurion_workspace *w = r->w;
    const spurion_model_config *c = &r->m->config;
    const spurion_layer *y = &r->m->layers[l];
    spurion_part all = whole_part(r, l);
    spurion_saved *sv = all.sv ? &w->last : NULL;
    int count = r->p->scored_count;
    spurion_part part = {w->xs, count, sv ? count : 0, sv, w->scored_positions, sv ? sv->q : w->q, sv ? sv->attention : w->attention,
                         sv ? sv->lse : w->lse, false};

    for (int r0 = 0, n; r0 < all.rows; r0 += n) {
        n = spurion_chunk_rows(r, r0, all.rows, all.kept);
        SPURION_TRY(st, save_input(r, &all, r0, n));
        SPURION_TRY(st, keys_values(r, l, &all, r0, n));
    }
    if (count == 0) {
        goto out;
    }
    SPURION_TRY(st, r->ops->gather_rows(r->dev, w->xs, w->x, w->scored, count, r->d));
    for (int r0 = 0, n; r0 < count; r0 += n) {
        n = spurion_chunk_rows(r, r0, count, part.kept);
        SPURION_TRY(st, save_input(r, &part, r0, n));
        SPURION_TRY(st, r->ops->norm(r->dev, spurion_act_at(r, w->h, (size_t)r0, r->d), NULL, r->d, sv ? sv->stats1 + 2 * (size_t)r0 : NULL,
                                     w->xs + (size_t)r0 * (size_t)r->d, r->d, y->norm1_w, y->norm1_b, spurion_plain_rows(n, r->d), c->eps, c->norm,
                                     SPURION_OVERWRITE));
        SPURION_TRY(st, queries(r, l, &part, r0, n));
    }
    SPURION_TRY(st, r->ops->attention(r->dev, part.attention, part.lse, part.q, w->k[l], w->v[l], r->p->scored_seqs, count,
                                      spurion_attention_shape_of(r, l)));
    SPURION_TRY(st, block_tail(r, l, &part));
out:
    return st;
}

/* w->hs (S, d) = what the head reads: the final norm of the scored rows, which stand in w->xs ... */
static spurion_status pool_scored(const spurion_run *r)
{
    spurion_workspace *w = r->w;
    const spurion_model_config *c = &r->m->config;

    return r->ops->norm(r->dev, NULL, w->hs, r->d, w->stats_s, w->xs, r->d, r->m->final_w, r->m->final_b,
                        spurion_plain_rows(r->p->scored_count, r->d), c->eps, c->norm, SPURION_OVERWRITE);
}

/* ... or its mean over all positions of each sequence, whose rows stand where their keys do: a variant's own beside those of the clean
 * pass and of the prompt's pieces, which it shares. */
static spurion_status pool_rows(const spurion_run *r)
{
    spurion_workspace *w = r->w;
    const spurion_model_config *c = &r->m->config;
    float *hidden = w->hidden + (size_t)r->p->kv_row * (size_t)r->d;

    return r->ops->norm(r->dev, NULL, hidden, r->d, w->stats_r, w->x, r->d, r->m->final_w, r->m->final_b,
                        spurion_plain_rows(r->p->rows, r->d), c->eps, c->norm, SPURION_OVERWRITE);
}

static spurion_status pool_mean(const spurion_run *r)
{
    spurion_status st;
    SPURION_TRY(st, pool_rows(r));
    SPURION_TRY(st, r->ops->mean_rows(r->dev, r->w->hs, r->w->hidden, r->p->scored_seqs, r->p->scored_count, r->d));
out:
    return st;
}

/* Rewards of rows r0 .. r0 + n through a head of several layers. */
static spurion_status head_layers(const spurion_run *r, int r0, int n)
{
    spurion_status st;
    spurion_workspace *w = r->w;
    const spurion_head *head = &r->m->config.head;
    float *pre = w->head_pre;

    SPURION_TRY(st, r->ops->cast(r->dev, w->head_act, r->d, w->hs + (size_t)r0 * (size_t)r->d, SPURION_F32, r->d, n, r->d));
    for (int i = 0; i < head->hidden; i++) {
        float *here = pre + (size_t)r0 * (size_t)head->width[i];

        SPURION_TRY(st, r->ops->linear(r->dev, here, SPURION_F32, head->width[i], w->head_act, r->m->head[i], n, SPURION_OVERWRITE));
        SPURION_TRY(st, r->ops->activation(r->dev, w->head_act, here, SPURION_F32, n, head->width[i], SPURION_ACT_RELU, 0));
        pre += (size_t)w->scored_max * (size_t)head->width[i];
    }
    SPURION_TRY(st, r->ops->linear(r->dev, w->rewards + r0, SPURION_F32, 1, w->head_act, r->m->head[head->hidden], n, SPURION_OVERWRITE));
out:
    return st;
}

/* From the stream after the last block to w->rewards. */
static spurion_status head(const spurion_run *r)
{
    spurion_status st;
    spurion_workspace *w = r->w;
    int count = r->p->scored_count;

    SPURION_TRY(st, r->m->config.pooling == SPURION_POOL_MEAN ? pool_mean(r) : pool_scored(r));
    if (r->m->config.head.hidden == 0) {
        return r->ops->dot_rows(r->dev, w->rewards, w->hs, r->m->score_w, 0, count, r->d, r->m->score_b);
    }
    for (int r0 = 0, n; r0 < count; r0 += n) {
        n = spurion_chunk_rows(r, r0, count, 0);
        SPURION_TRY(st, head_layers(r, r0, n));
    }
out:
    return st;
}

spurion_status spurion_model_forward(const spurion_model *m, spurion_workspace *w, const spurion_pass *p, int first)
{
    spurion_status st = spurion_ok();
    spurion_run r = spurion_run_make(m, w, p);
    int layers = m->config.layers;
    bool pruned = p->prune_last && first < layers;

    SPURION_ASSERT(p->rows <= w->rows_max && p->completion_rows <= p->rows && p->scored_count <= w->scored_max);
    SPURION_ASSERT(!p->save || (p->save_from >= w->first_kept && p->completion_rows <= w->saved_rows));
    for (int l = first; l <= layers; l++) {
        if (p->hook && p->hook_points[4 * l]) {
            SPURION_TRY(st, p->hook(p->hook_context, 4 * l, w->x));
        }
        if (l < layers) {
            SPURION_TRY(st, pruned && l == layers - 1 ? block_pruned(&r, l) : block(&r, l));
        }
    }
    if (p->piece) {
        return m->config.pooling == SPURION_POOL_MEAN ? pool_rows(&r) : st;
    }
    if (!pruned) {
        SPURION_TRY(st, r.ops->gather_rows(r.dev, w->xs, w->x, w->scored, p->scored_count, r.d));
    }
    SPURION_TRY(st, head(&r));
out:
    return st;
}

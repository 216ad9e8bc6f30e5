/* The backward pass: gradients of the rewards with respect to the residual stream at the hook points, over completion rows only and
 * no lower than the lowest hook. No weight gradient exists. Mirrors forward.c. Thread: the engine's. Memory: the workspace. */
#include "daemon/model/run.h"

#include "daemon/base/check.h"

/* One backward pass under way. */
typedef struct descent {
    spurion_run r;
    int lowest;
    spurion_hook_fn tap;
    void *context;
} descent;

/* The same rows as in the forward pass, with their gradient. */
typedef struct grad_part {
    float *dx;         /* (rows, d) in place */
    int rows;
    spurion_saved *sv;
} grad_part;

static int chunk_of(const descent *g, int r0, int rows)
{
    return spurion_chunk_rows(&g->r, r0, rows, rows);
}

static spurion_status tap(const descent *g, int point, float *dx)
{
    return g->r.p->hook_points[point] && g->tap ? g->tap(g->context, point, dx) : spurion_ok();
}

/* c_h (n, d) act = gradient rows at dx, taken through the post norm where the family has one. */
static spurion_status output_gradient(const descent *g, const float *dx, const float *post_norm, const float *raw, const float *stats, int n)
{
    spurion_status st;
    const spurion_run *r = &g->r;
    const float *from = dx;

    if (post_norm) {
        SPURION_TRY(st, r->ops->norm_backward(r->dev, r->w->c_d, r->d, dx, r->d, raw, r->d, stats, post_norm, spurion_plain_rows(n, r->d),
                                              r->m->config.norm, SPURION_OVERWRITE));
        from = r->w->c_d;
    }
    SPURION_TRY(st, r->ops->cast(r->dev, r->w->c_h, r->d, from, SPURION_F32, r->d, n, r->d));
out:
    return st;
}

/* dx += gradient through the MLP and its norm. */
static spurion_status mlp_backward(const descent *g, int l, const grad_part *part)
{
    spurion_status st = spurion_ok();
    const spurion_run *r = &g->r;
    const spurion_model_config *c = &r->m->config;
    const spurion_layer *y = &r->m->layers[l];
    const spurion_saved *sv = part->sv;
    bool at_input = c->parallel; /* the MLP's norm reads the block's input */
    const float *x = at_input ? sv->x_in : sv->x_mid;
    const float *stats = c->shared_norm ? sv->stats1 : sv->stats2;
    const float *weight = c->shared_norm ? y->norm1_w : y->norm2_w;

    for (int r0 = 0, n; r0 < part->rows; r0 += n) {
        size_t at = (size_t)r0 * (size_t)r->d;
        n = chunk_of(g, r0, part->rows);
        SPURION_TRY(st, output_gradient(g, part->dx + at, y->post_mlp_w, c->post_norms ? sv->mlp_raw + at : NULL,
                                        c->post_norms ? sv->mlp_stats + 2 * (size_t)r0 : NULL, n));
        SPURION_TRY(st, r->ops->linear_act_backward(r->dev, r->w->c_act, r->w->c_pre, r->mid, r->w->c_h, y->down,
                                                    spurion_row_at(sv->pre, r->mid, (size_t)r0, r->pre), n, c->act, c->gated));
        SPURION_TRY(st, r->ops->linear_backward(r->dev, r->w->c_d2, SPURION_F32, r->w->c_act, y->up, n, SPURION_OVERWRITE));
        SPURION_TRY(st, r->ops->norm_backward(r->dev, part->dx + at, r->d, r->w->c_d2, r->d, x + at, r->d, stats + 2 * (size_t)r0, weight,
                                              spurion_plain_rows(n, r->d), c->norm, SPURION_ACCUMULATE));
    }
out:
    return st;
}

/* w->d_attention = gradient of the attention output before its projection. */
static spurion_status output_backward(const descent *g, int l, const grad_part *part)
{
    spurion_status st = spurion_ok();
    const spurion_run *r = &g->r;
    const spurion_layer *y = &r->m->layers[l];
    bool post = r->m->config.post_norms;

    for (int r0 = 0, n; r0 < part->rows; r0 += n) {
        size_t at = (size_t)r0 * (size_t)r->d;
        n = chunk_of(g, r0, part->rows);
        SPURION_TRY(st, output_gradient(g, part->dx + at, y->post_attention_w, post ? part->sv->attn_raw + at : NULL,
                                        post ? part->sv->attn_stats + 2 * (size_t)r0 : NULL, n));
        SPURION_TRY(st, r->ops->linear_backward(r->dev, spurion_row_at(r->w->d_attention, r->mid, (size_t)r0, r->q), r->mid, r->w->c_h, y->o, n,
                                                SPURION_OVERWRITE));
    }
out:
    return st;
}

/* c_h rows (stride) act = gradient of q or k before its norm and rotation. */
static spurion_status head_gradient(const descent *g, int stride, const float *dy, int heads, const float *weight, const float *raw,
                                    const float *stats, const int32_t *positions, int n)
{
    spurion_status st;
    const spurion_run *r = &g->r;
    const spurion_model_config *c = &r->m->config;
    spurion_rows shape = {n, heads, c->head_dim};
    int width = heads * c->head_dim;

    if (!c->qk_norm) {
        return r->ops->rope(r->dev, r->w->c_h, stride, dy, SPURION_F32, stride, positions, r->m->rope, shape, c->rot, c->rope, 1);
    }
    SPURION_TRY(st, r->ops->rope_f32(r->dev, r->w->c_q, width, dy, stride, positions, r->m->rope, shape, c->rot, c->rope, 1));
    SPURION_TRY(st, r->ops->norm_backward(r->dev, r->w->c_n, width, r->w->c_q, width, raw, width, stats, weight, shape, SPURION_NORM_RMS,
                                          SPURION_OVERWRITE));
    SPURION_TRY(st, r->ops->cast(r->dev, r->w->c_h, stride, r->w->c_n, SPURION_F32, width, n, width));
out:
    return st;
}

/* c_d2 (n, d) = gradient of the block's normalised input through the queries of rows r0 .. r0 + n. */
static spurion_status query_backward(const descent *g, int l, const spurion_saved *sv, const int32_t *positions, int r0, int n)
{
    spurion_status st;
    const spurion_run *r = &g->r;
    const spurion_model_config *c = &r->m->config;
    const spurion_layer *y = &r->m->layers[l];
    size_t at = (size_t)r0 * (size_t)r->q;

    SPURION_TRY(st, head_gradient(g, r->q, r->w->dq + at, c->heads, y->q_norm, c->qk_norm ? sv->q_raw + at : NULL,
                                  c->qk_norm ? sv->q_stats + 2 * (size_t)r0 * (size_t)c->heads : NULL, positions + r0, n));
    SPURION_TRY(st, r->ops->linear_backward(r->dev, r->w->c_d2, SPURION_F32, r->w->c_h, y->q, n, SPURION_OVERWRITE));
out:
    return st;
}

/* c_d2 (n, d) (+)= the same through keys and values. */
static spurion_status key_value_backward(const descent *g, int l, const spurion_saved *sv, int r0, int n, spurion_write mode)
{
    spurion_status st;
    const spurion_run *r = &g->r;
    const spurion_model_config *c = &r->m->config;
    const spurion_layer *y = &r->m->layers[l];
    float *dkv = r->w->dkv + (size_t)r0 * 2 * (size_t)r->kv;

    SPURION_TRY(st, head_gradient(g, 2 * r->kv, dkv, c->kv_heads, y->k_norm, c->qk_norm ? sv->k_raw + (size_t)r0 * (size_t)r->kv : NULL,
                                  c->qk_norm ? sv->k_stats + 2 * (size_t)r0 * (size_t)c->kv_heads : NULL, r->w->positions + r0, n));
    SPURION_TRY(st, r->ops->cast(r->dev, spurion_act_at(r, r->w->c_h, 1, r->kv), 2 * r->kv, dkv + r->kv, SPURION_F32, 2 * r->kv, n, r->kv));
    SPURION_TRY(st, r->ops->linear_backward(r->dev, r->w->c_d2, SPURION_F32, r->w->c_h, y->kv, n, mode));
out:
    return st;
}

/* dx (+)= c_d2 through the first norm of rows r0 .. r0 + n. */
static spurion_status input_norm_backward(const descent *g, int l, float *dx, const spurion_saved *sv, int r0, int n, spurion_write mode)
{
    const spurion_run *r = &g->r;
    const spurion_model_config *c = &r->m->config;
    size_t at = (size_t)r0 * (size_t)r->d;

    return r->ops->norm_backward(r->dev, dx + at, r->d, r->w->c_d2, r->d, sv->x_in + at, r->d, sv->stats1 + 2 * (size_t)r0,
                                 r->m->layers[l].norm1_w, spurion_plain_rows(n, r->d), c->norm, mode);
}

static spurion_status attention_backward(const descent *g, int l, const grad_part *part)
{
    spurion_status st;
    const spurion_run *r = &g->r;
    spurion_workspace *w = r->w;

    SPURION_TRY(st, r->ops->attention_backward(r->dev, w->dq, w->dkv, w->dkv + r->kv, 2 * r->kv, w->d_attention, r->mid,
                                               part->sv->attention, part->sv->lse, part->sv->q, w->k[l], w->v[l], r->p->backward_seqs, r->p->backward_seq_count,
                                               spurion_attention_shape_of(r, l)));
    for (int r0 = 0, n; r0 < part->rows; r0 += n) {
        n = chunk_of(g, r0, part->rows);
        SPURION_TRY(st, query_backward(g, l, part->sv, w->positions, r0, n));
        SPURION_TRY(st, key_value_backward(g, l, part->sv, r0, n, SPURION_ACCUMULATE));
        SPURION_TRY(st, input_norm_backward(g, l, part->dx, part->sv, r0, n, SPURION_ACCUMULATE));
    }
out:
    return st;
}

/* Attention of a pruned block: queries of the scored rows, keys of all completion rows. Leaves the whole gradient in w->dx. */
static spurion_status attention_backward_pruned(const descent *g, int l, const grad_part *part)
{
    spurion_status st;
    const spurion_run *r = &g->r;
    spurion_workspace *w = r->w;
    const spurion_saved *all = &w->saved[l];
    int rows = r->p->completion_rows;

    if (r->m->config.pooling != SPURION_POOL_LAST) { /* keys after the scored position: no query reads them */
        SPURION_TRY(st, r->ops->zero(r->dev, w->dkv, (size_t)rows * 2 * (size_t)r->kv * sizeof(float)));
    }
    SPURION_TRY(st, r->ops->attention_backward(r->dev, w->dq, w->dkv, w->dkv + r->kv, 2 * r->kv, w->d_attention, r->mid,
                                               part->sv->attention, part->sv->lse, part->sv->q, w->k[l], w->v[l], r->p->scored_backward_seqs, part->rows,
                                               spurion_attention_shape_of(r, l)));
    for (int r0 = 0, n; r0 < part->rows; r0 += n) {
        n = chunk_of(g, r0, part->rows);
        SPURION_TRY(st, query_backward(g, l, part->sv, w->scored_positions, r0, n));
        SPURION_TRY(st, input_norm_backward(g, l, part->dx, part->sv, r0, n, SPURION_ACCUMULATE));
    }
    for (int r0 = 0, n; r0 < rows; r0 += n) {
        n = chunk_of(g, r0, rows);
        SPURION_TRY(st, key_value_backward(g, l, all, r0, n, SPURION_OVERWRITE));
        SPURION_TRY(st, input_norm_backward(g, l, w->dx, all, r0, n, SPURION_OVERWRITE));
    }
    SPURION_TRY(st, r->ops->scatter_rows(r->dev, w->dx, part->dx, w->scored, part->rows, r->d, SPURION_ACCUMULATE));
out:
    return st;
}

/* From the gradient at a block's output to that at its lowest wanted point. Gradients at attn_out and mlp_out are those of the
 * residual stream right after they were added. */
static spurion_status block_backward(const descent *g, int l, const grad_part *part, bool pruned)
{
    spurion_status st;
    int point = 4 * l;
    bool parallel = g->r.m->config.parallel;

    SPURION_TRY(st, tap(g, point + SPURION_SITE_MLP, part->dx));
    if (parallel) {
        SPURION_TRY(st, tap(g, point + SPURION_SITE_ATTN, part->dx));
        if (g->lowest > point) {
            goto out;
        }
        SPURION_TRY(st, output_backward(g, l, part));
        SPURION_TRY(st, mlp_backward(g, l, part));
    } else {
        if (g->lowest >= point + SPURION_SITE_MLP) {
            goto out;
        }
        SPURION_TRY(st, mlp_backward(g, l, part));
        SPURION_TRY(st, tap(g, point + SPURION_SITE_MID, part->dx));
        SPURION_TRY(st, tap(g, point + SPURION_SITE_ATTN, part->dx));
        if (g->lowest > point) {
            goto out;
        }
        SPURION_TRY(st, output_backward(g, l, part));
    }
    SPURION_TRY(st, pruned ? attention_backward_pruned(g, l, part) : attention_backward(g, l, part));
    SPURION_TRY(st, tap(g, point, g->r.w->dx));
out:
    return st;
}

/* w->hs rows r0 .. r0 + n = gradient of the rewards through a head of several layers. */
static spurion_status head_layers_backward(const descent *g, int r0, int n)
{
    spurion_status st;
    const spurion_run *r = &g->r;
    spurion_workspace *w = r->w;
    const spurion_head *head = &r->m->config.head;
    const float *pre = w->head_pre;
    float *dy = w->head_d, *dx = w->head_d2;

    for (int i = 0; i < head->hidden - 1; i++) {
        pre += (size_t)w->scored_max * (size_t)head->width[i];
    }
    SPURION_TRY(st, r->ops->gather_rows(r->dev, dy, r->m->score_w, w->zeros, n, head->width[head->hidden - 1]));
    for (int i = head->hidden - 1; i >= 0; i--) {
        int width = head->width[i];
        float *to = i == 0 ? w->hs + (size_t)r0 * (size_t)r->d : dx;

        SPURION_TRY(st, r->ops->activation_backward(r->dev, w->head_act, pre + (size_t)r0 * (size_t)width, dy, SPURION_F32, n, width,
                                                    SPURION_ACT_RELU, 0));
        SPURION_TRY(st, r->ops->linear_backward(r->dev, to, SPURION_F32, w->head_act, r->m->head[i], n, SPURION_OVERWRITE));
        dx = dy;
        dy = to;
        pre -= i == 0 ? 0 : (size_t)w->scored_max * (size_t)head->width[i - 1];
    }
out:
    return st;
}

/* w->hs (S, d) = gradient of the rewards with respect to what the head reads. */
static spurion_status head_backward(const descent *g)
{
    spurion_status st;
    const spurion_run *r = &g->r;
    spurion_workspace *w = r->w;
    int count = r->p->scored_count;

    SPURION_TRY(st, r->ops->zero(r->dev, w->zeros, (size_t)count * sizeof(int32_t)));
    if (r->m->config.head.hidden == 0) {
        return r->ops->gather_rows(r->dev, w->hs, r->m->score_w, w->zeros, count, r->d); /* the head's row, for each */
    }
    for (int r0 = 0, n; r0 < count; r0 += n) {
        n = chunk_of(g, r0, count);
        SPURION_TRY(st, head_layers_backward(g, r0, n));
    }
out:
    return st;
}

/* w->dxs = gradient of the rewards at the scored rows, before the final norm; in w->dx too, unless a pruned block comes first. */
static spurion_status scored_backward(const descent *g, bool pruned)
{
    spurion_status st;
    const spurion_run *r = &g->r;
    spurion_workspace *w = r->w;
    int count = r->p->scored_count;

    SPURION_TRY(st, r->ops->norm_backward(r->dev, w->dxs, r->d, w->hs, r->d, w->xs, r->d, w->stats_s, r->m->final_w, spurion_plain_rows(count, r->d),
                                          r->m->config.norm, SPURION_OVERWRITE));
    if (!pruned) {
        SPURION_TRY(st, r->ops->zero(r->dev, w->dx, (size_t)r->p->completion_rows * (size_t)r->d * sizeof(float)));
        SPURION_TRY(st, r->ops->scatter_rows(r->dev, w->dx, w->dxs, w->scored, count, r->d, SPURION_OVERWRITE));
    }
out:
    return st;
}

/* w->dx = the same with mean pooling: every completion row has its share. w->x still holds the stream, w->y is free. */
static spurion_status mean_backward(const descent *g)
{
    spurion_status st;
    const spurion_run *r = &g->r;
    spurion_workspace *w = r->w;

    SPURION_TRY(st, r->ops->mean_rows_backward(r->dev, w->y, w->hs, r->p->scored_backward_seqs, r->p->scored_count, r->d));
    SPURION_TRY(st, r->ops->norm_backward(r->dev, w->dx, r->d, w->y, r->d, w->x, r->d, w->stats_r, r->m->final_w,
                                          spurion_plain_rows(r->p->completion_rows, r->d), r->m->config.norm, SPURION_OVERWRITE));
out:
    return st;
}

spurion_status spurion_model_backward(const spurion_model *m, spurion_workspace *w, const spurion_pass *p, int lowest, spurion_hook_fn tap_fn,
                                      void *tap_context)
{
    spurion_status st;
    descent g = {spurion_run_make(m, w, p), lowest, tap_fn, tap_context};
    int layers = m->config.layers;
    grad_part scored = {w->dxs, p->scored_count, &w->last};

    SPURION_ASSERT(p->save && p->save_from <= lowest / 4);
    SPURION_TRY(st, head_backward(&g));
    SPURION_TRY(st, m->config.pooling == SPURION_POOL_MEAN ? mean_backward(&g) : scored_backward(&g, p->prune_last));
    if (!p->prune_last) {
        SPURION_TRY(st, tap(&g, 4 * layers, w->dx));
    }
    for (int l = layers - 1; l >= 0 && lowest < 4 * (l + 1); l--) {
        bool pruned = p->prune_last && l == layers - 1;
        grad_part whole = {w->dx, p->completion_rows, &w->saved[l]};
        SPURION_TRY(st, block_backward(&g, l, pruned ? &scored : &whole, pruned));
    }
out:
    return st;
}

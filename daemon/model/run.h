/* What forward.c and backward.c share: one pass under way, and the rows that the tail of a block works on. */
#ifndef SPURION_MODEL_RUN_H
#define SPURION_MODEL_RUN_H

#include "daemon/model/model.h"

typedef struct spurion_run {
    const spurion_model *m;
    spurion_workspace *w;
    const spurion_pass *p;
    spurion_dev *dev;
    const spurion_ops *ops;
    spurion_dtype mid, heads; /* types of what lies before activation and its gradient; before rotation: f32 where a norm differentiates it */
    int d, q, kv, ff, pre;    /* widths: residual, queries, keys, MLP, MLP before its activation */
} spurion_run;

/* The rows that queries, output projection and MLP of a block work on: all of the pass, or the scored ones of a pruned last block. */
typedef struct spurion_part {
    float *x;           /* (rows, d) */
    int rows;
    int kept;           /* rows [0, kept) are saved */
    spurion_saved *sv;  /* or NULL */
    const int32_t *positions;
    void *q, *attention;
    float *lse;
    bool hooks;         /* hooks look at these rows */
} spurion_part;

static inline spurion_run spurion_run_make(const spurion_model *m, spurion_workspace *w, const spurion_pass *p)
{
    const spurion_model_config *c = &m->config;
    spurion_run r = {.m = m, .w = w, .p = p, .dev = m->dev, .ops = m->dev->ops};
    r.mid = m->dev->mid;
    r.heads = c->qk_norm ? SPURION_F32 : r.mid;
    r.d = c->hidden;
    r.q = c->heads * c->head_dim;
    r.kv = c->kv_heads * c->head_dim;
    r.ff = c->ff;
    r.pre = c->gated ? 2 * c->ff : c->ff;
    return r;
}

/* Dense rows without groups. */
static inline spurion_rows spurion_plain_rows(int T, int C)
{
    spurion_rows s = {T, 1, C};
    return s;
}

/* Rows of the chunk that starts at r0: never across the border of kept rows. */
static inline int spurion_chunk_rows(const spurion_run *r, int r0, int rows, int kept)
{
    int end = r0 < kept ? kept : rows;
    return end - r0 < r->w->chunk ? end - r0 : r->w->chunk;
}

/* Row `row` of an array of the given type and width. */
static inline void *spurion_row_at(void *base, spurion_dtype type, size_t row, int width)
{
    return (char *)base + row * (size_t)width * spurion_dtype_bytes(type);
}

/* The same of an act array. */
static inline void *spurion_act_at(const spurion_run *r, void *base, size_t row, int width)
{
    return spurion_row_at(base, r->dev->dtype, row, width);
}

static inline spurion_attention_shape spurion_attention_shape_of(const spurion_run *r, int layer)
{
    const spurion_model_config *c = &r->m->config;
    spurion_attention_shape s = {c->heads, c->kv_heads, c->head_dim, c->attention_scale[layer], c->softcap, c->window[layer]};
    return s;
}

static inline bool spurion_run_hooked(const spurion_run *r, const spurion_part *part, int point)
{
    return part->hooks && r->p->hook && r->p->hook_points[point];
}

#endif

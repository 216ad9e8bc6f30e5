/* Memory layout of the passes; see plan.h. Pure: no allocation, no state. */
#include "daemon/model/plan.h"

#define PLAN_SCORED 1024 /* sequences of one pass */

/* A block being laid out; base NULL counts only. */
typedef struct cursor {
    char *base;
    size_t at;
} cursor;

static void *take(cursor *c, size_t count, size_t element)
{
    void *p = c->base ? c->base + c->at : NULL;
    c->at += (count * element + 63) & ~(size_t)63;
    return p;
}

/* Bytes of an element of what lies before the rotation of queries and keys; see run.h. */
static size_t heads_type(const spurion_plan_input *in)
{
    return in->config->qk_norm ? 4 : spurion_dtype_bytes(in->mid);
}

static void saved_make(spurion_saved *s, cursor *kept, const spurion_plan_input *in, size_t rows)
{
    const spurion_model_config *c = in->config;
    size_t act = spurion_dtype_bytes(in->dtype), d = (size_t)c->hidden;
    size_t q = (size_t)c->heads * (size_t)c->head_dim, kv = (size_t)c->kv_heads * (size_t)c->head_dim;
    size_t pre = (size_t)c->ff * (c->gated ? 2 : 1);
    spurion_saved z = {0};

    z.x_in = take(kept, rows * d, 4);
    z.stats1 = take(kept, rows * 2, 4);
    z.x_mid = c->parallel ? z.x_in : take(kept, rows * d, 4);
    z.stats2 = c->shared_norm ? z.stats1 : take(kept, rows * 2, 4);
    z.pre = take(kept, rows * pre, spurion_dtype_bytes(in->mid));
    z.q = take(kept, rows * q, act);
    z.attention = take(kept, rows * q, act);
    z.lse = take(kept, rows * (size_t)c->heads, 4);
    if (c->qk_norm) {
        z.q_raw = take(kept, rows * q, 4);
        z.q_stats = take(kept, rows * 2 * (size_t)c->heads, 4);
        z.k_raw = take(kept, rows * kv, 4);
        z.k_stats = take(kept, rows * 2 * (size_t)c->kv_heads, 4);
    }
    if (c->post_norms) {
        z.attn_raw = take(kept, rows * d, 4);
        z.attn_stats = take(kept, rows * 2, 4);
        z.mlp_raw = take(kept, rows * d, 4);
        z.mlp_stats = take(kept, rows * 2, 4);
    }
    if (s) {
        *s = z;
    }
}

static void kept_make(spurion_workspace *w, cursor *kept, const spurion_plan_input *in)
{
    const spurion_model_config *c = in->config;
    size_t kv = (size_t)c->kv_heads * (size_t)c->head_dim, act = spurion_dtype_bytes(in->dtype);
    size_t rows = (size_t)in->rows * (in->variants ? 2 : 1) + (size_t)in->prefix;
    void *shared_k = NULL, *shared_v = NULL;

    if (w->first_kept > 0 && !in->prefix) {
        shared_k = take(kept, (size_t)in->rows * kv, act);
        shared_v = take(kept, (size_t)in->rows * kv, act);
    }
    for (int l = 0; l < c->layers; l++) {
        bool own = l >= w->first_kept || in->prefix;
        void *k = own ? take(kept, rows * kv, act) : shared_k;
        void *v = own ? take(kept, rows * kv, act) : shared_v;
        if (w->k) {
            w->k[l] = k;
            w->v[l] = v;
        }
    }
    w->hidden = c->pooling == SPURION_POOL_MEAN ? take(kept, rows * (size_t)c->hidden, 4) : NULL; /* rows as keys have */
    if (in->gradients) {
        for (int l = w->first_kept; l < c->layers; l++) {
            saved_make(w->saved ? &w->saved[l] : NULL, kept, in, (size_t)in->rows);
        }
        saved_make(&w->last, kept, in, (size_t)w->scored_max);
    }
}

/* Of a head of several layers, and of mean pooling. */
static void head_make(spurion_workspace *w, cursor *s, const spurion_plan_input *in)
{
    const spurion_model_config *c = in->config;
    size_t sum = 0, widest = (size_t)c->hidden;

    for (int i = 0; i < c->head.hidden; i++) {
        size_t width = (size_t)c->head.width[i];
        sum += width;
        widest = width > widest ? width : widest;
    }
    if (sum) {
        w->head_pre = take(s, (size_t)w->scored_max * sum, 4);
        w->head_act = take(s, (size_t)w->chunk * widest, spurion_dtype_bytes(in->dtype));
        w->head_d = take(s, (size_t)w->chunk * widest, 4);
        w->head_d2 = take(s, (size_t)w->chunk * widest, 4);
    }
    if (c->pooling == SPURION_POOL_MEAN) {
        w->stats_r = take(s, (size_t)in->rows * 2, 4);
    }
}

static void scratch_make(spurion_workspace *w, cursor *s, const spurion_plan_input *in)
{
    const spurion_model_config *c = in->config;
    size_t act = spurion_dtype_bytes(in->dtype), d = (size_t)c->hidden, rows = (size_t)in->rows, chunk = (size_t)w->chunk;
    size_t q = (size_t)c->heads * (size_t)c->head_dim, kv = (size_t)c->kv_heads * (size_t)c->head_dim, scored = (size_t)w->scored_max;
    size_t pre = (size_t)c->ff * (c->gated ? 2 : 1), wide = d > q ? d : q;

    wide = wide > 2 * kv ? wide : 2 * kv;
    w->x = take(s, rows * d, 4);
    w->h = take(s, rows * d, act);
    w->q = take(s, rows * q, act);
    w->attention = take(s, rows * q, act);
    w->lse = take(s, rows * (size_t)c->heads, 4);
    w->y = take(s, rows * d, 4);
    w->c_kv = take(s, chunk * 2 * kv, heads_type(in));
    w->c_q = take(s, chunk * q, heads_type(in));
    w->c_pre = take(s, chunk * pre, spurion_dtype_bytes(in->mid));
    w->c_act = take(s, chunk * pre, act);
    w->c_h = take(s, chunk * wide, act);
    w->c_d = take(s, chunk * d, 4);
    w->c_d2 = take(s, chunk * d, 4);
    w->c_n = take(s, chunk * q, 4);
    if (in->gradients) {
        w->dx = take(s, rows * d, 4);
        w->d_attention = take(s, rows * q, spurion_dtype_bytes(in->mid));
        w->dq = take(s, rows * q, 4);
        w->dkv = take(s, rows * 2 * kv, 4);
        w->dxs = take(s, scored * d, 4);
    }
    w->xs = take(s, scored * d, 4);
    w->hs = take(s, scored * d, 4);
    w->stats_s = take(s, scored * 2, 4);
    w->rewards = take(s, scored, 4);
    w->positions = take(s, rows, 4);
    w->ids = take(s, rows, 4);
    w->scored = take(s, scored, 4);
    w->scored_positions = take(s, scored, 4);
    w->zeros = take(s, scored, 4);
    head_make(w, s, in);
}

spurion_plan spurion_plan_make(spurion_workspace *w, const spurion_plan_input *in, void *kept, void *scratch)
{
    cursor k = {kept, 0}, s = {scratch, 0};
    spurion_plan plan;

    w->rows_max = in->rows;
    w->prefix_row = in->rows * (in->variants ? 2 : 1);
    w->scored_max = in->rows < PLAN_SCORED ? in->rows : PLAN_SCORED;
    w->saved_rows = in->gradients ? in->rows : 0;
    w->chunk = in->rows < in->chunk ? in->rows : in->chunk;
    w->first_kept = in->lowest_point / 4 < in->config->layers ? in->lowest_point / 4 : in->config->layers;
    kept_make(w, &k, in);
    scratch_make(w, &s, in);
    plan.kept_bytes = k.at;
    plan.scratch_bytes = s.at;
    return plan;
}

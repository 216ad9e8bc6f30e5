/* A reward model on a device: weights prepared for forward and backward products, and the passes over packed rows.
 * One forward and one backward serve every family; what differs stands in spurion_model_config.
 * Thread: the engine thread. Memory: weights at load; passes work in a spurion_workspace laid out by plan.h. */
#ifndef SPURION_MODEL_H
#define SPURION_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/model/config.h"
#include "daemon/model/weights.h"
#include "spurion/ops.h"

/* Device memory; NULL where the family has none. */
typedef struct spurion_layer {
    float *norm1_w, *norm1_b, *norm2_w, *norm2_b;   /* (d) */
    float *post_attention_w, *post_mlp_w;           /* (d) */
    float *q_norm, *k_norm;                         /* (hd) */
    spurion_matrix *q;    /* (H hd, d) */
    spurion_matrix *kv;   /* (2 KV hd, d): keys, then values */
    spurion_matrix *o;    /* (d, H hd) */
    spurion_matrix *up;   /* (ff, d), or gate over up (2 ff, d) */
    spurion_matrix *down; /* (d, ff) */
} spurion_layer;

typedef struct spurion_model {
    spurion_model_config config;
    spurion_dev *dev;
    void *embed;           /* (V, d) of embed_dtype */
    spurion_dtype embed_dtype;
    float *position_table; /* (context, d) or NULL */
    float *rope;           /* (positions, rot / 2, 2) or NULL */
    float *final_w, *final_b; /* (d) */
    spurion_matrix *head[SPURION_HEAD_LAYERS_MAX + 1]; /* hidden layers (width, d or width), then the last (1, width); none when linear */
    float *score_w;        /* (1, d or width): last layer: outputs weighted, normalisation folded in */
    float score_b;
    spurion_layer *layers;
    int vocab;
    const char *head_fresh; /* the law that an untrained head's numbers follow, where this one's do (head.h); else NULL */
    size_t bytes;          /* device memory of all weights */
} spurion_model;

/* Which of a head's outputs is the reward. */
typedef struct spurion_head_choice {
    int index;             /* this one */
    const double *weights; /* (outputs): or their weighted sum; NULL: none */
} spurion_head_choice;

/* Loads DIR's weights. positions: longest sequence. backward_from: blocks at or above it are prepared for the backward pass
 * (config->layers: none). INVALID_ARGUMENT for a head whose numbers are all the same: nobody trained it. */
spurion_status spurion_model_load(spurion_model **out, spurion_dev *dev, const spurion_model_config *config, spurion_weights *weights,
                                  int positions, int backward_from, spurion_head_choice choice) SPURION_MUST_USE;
void spurion_model_destroy(spurion_model *m);

/* Points of the residual stream where an SAE may read, in the order in which a pass meets them: 4 * layer + site.
 * The output of block L is the input of block L + 1; the output of the last block is SITE_PRE of layer `layers`. */
enum { SPURION_SITE_PRE = 0, SPURION_SITE_ATTN = 1, SPURION_SITE_MID = 2, SPURION_SITE_MLP = 3 };

/* Called when a pass reaches a point: x (rows, d) f32 of the pass's completion rows, may be changed in place. */
typedef spurion_status (*spurion_hook_fn)(void *context, int point, float *x);

/* What a family saves of one block for the backward pass; rows of the pass's completion part, in its order. */
typedef struct spurion_saved {
    float *x_in, *stats1;   /* (B, d), (B, 2): input of the block */
    float *x_mid, *stats2;  /* (B, d): input of the second norm; x_mid is x_in in parallel blocks */
    void *pre;              /* (B, ff or 2 ff) mid: before the activation */
    void *q;                /* (B, H hd) act, after rotary */
    void *attention;        /* (B, H hd) act */
    float *lse;             /* (B, H) */
    float *q_raw, *q_stats; /* (B, H hd), (B, H, 2): before the q norm */
    float *k_raw, *k_stats; /* (B, KV hd), (B, KV, 2) */
    float *attn_raw, *attn_stats, *mlp_raw, *mlp_stats; /* (B, d), (B, 2): before the post norms */
} spurion_saved;

/* Memory of the passes, laid out by spurion_plan_make. act, mid: types of the device, else f32. R = rows_max of a pass, K = rows of a key/value buffer. */
typedef struct spurion_workspace {
    int rows_max, chunk;    /* chunk: rows of the row-wise scratch */
    int scored_max;         /* sequences of one pass (S below) */
    int prefix_row;         /* first key/value row of a prompt that goes in pieces */
    int first_kept;         /* blocks at or above it have saved activations, and keys and values of their own */
    int saved_rows;         /* rows of each saved block */
    void **k, **v;          /* per layer (K, KV hd) act; layers below first_kept share one, unless prompts go in pieces */
    spurion_saved *saved;   /* per layer; meaningful from first_kept on */
    spurion_saved last;     /* the pruned last block: scored rows only */
    float *x;               /* (R, d) residual stream */
    void *h;                /* (R, d) act: normalised input, kept for blocks that use it twice */
    void *q;                /* (R, H hd) act */
    void *attention;        /* (R, H hd) act */
    float *lse;             /* (R, H) */
    float *y;               /* (R, d): attention or MLP output where it is looked at before it is added */
    void *c_kv, *c_q;       /* (chunk, 2 KV hd), (chunk, H hd): mid, f32 where a norm follows */
    void *c_pre;            /* (chunk, ff or 2 ff) mid */
    void *c_act;            /* (chunk, ff or 2 ff) act */
    void *c_h;              /* (chunk, max(d, H hd, 2 KV hd)) act */
    float *c_d, *c_d2;      /* (chunk, d) */
    float *c_n;             /* (chunk, H hd) after the q or k norm */
    float *dx;              /* (R, d): gradient of the residual stream */
    void *d_attention;      /* (R, H hd) mid */
    float *dq;              /* (R, H hd) */
    float *dkv;             /* (R, 2 KV hd) */
    float *xs, *dxs, *hs;   /* (S, d): scored rows, their gradient, what the head reads (and its gradient) */
    float *stats_s;         /* (S, 2) */
    float *hidden, *stats_r; /* (K, d), (R, 2): final norm of every row, with mean pooling; rows as keys and values */
    float *head_pre;        /* (S, sum of widths): the head's hidden layers before ReLU, layer after layer */
    void *head_act;         /* (chunk, widest) act */
    float *head_d, *head_d2; /* (chunk, widest) */
    float *rewards;         /* (S) */
    int32_t *positions, *ids; /* (R) */
    int32_t *scored, *scored_positions, *zeros; /* (S) */
} spurion_workspace;

/* One packed pass. Rows [0, completion_rows) are completion rows (those that hooks see and gradients reach), then the others. */
typedef struct spurion_pass {
    int rows, completion_rows;
    int kv_row;                  /* this pass writes its keys and values from this row on */
    const spurion_seq *seqs;     /* HOST: every query row of a whole block */
    int seq_count;
    const spurion_seq *scored_seqs; /* HOST: the scored row of each sequence, q_row its place in the list of scored rows */
    const spurion_seq *backward_seqs; /* HOST: completion queries, with dkv; backward only */
    const spurion_seq *scored_backward_seqs;
    int backward_seq_count;
    int scored_count;            /* w->scored (device) holds the scored rows, w->scored_positions their positions */
    bool save;                   /* keep what the backward pass needs from block save_from on */
    int save_from;
    bool prune_last;             /* the last block works on scored rows only; never with mean pooling */
    bool piece;                  /* of a long prompt: scored_count 0, no hook; leaves keys and values, with mean pooling the normed stream */
    spurion_hook_fn hook;        /* or NULL */
    void *hook_context;
    const bool *hook_points;     /* (4 * layers + 1): where hook is called */
} spurion_pass;

/* w->x = embeddings of w->ids (and w->positions). */
spurion_status spurion_model_embed(const spurion_model *m, spurion_workspace *w, int rows) SPURION_MUST_USE;
/* Runs blocks first.. to the head on w->x; w->rewards (scored_count) afterwards; of a piece no reward. Calls the hook from point 4 * first on. */
spurion_status spurion_model_forward(const spurion_model *m, spurion_workspace *w, const spurion_pass *p, int first) SPURION_MUST_USE;
/* After a saving forward: gradients of the sum of rewards from the head down to point `lowest`. At every hook point the hook is
 * called with x = the gradient (completion_rows, d) at that point, from the top down. */
spurion_status spurion_model_backward(const spurion_model *m, spurion_workspace *w, const spurion_pass *p, int lowest,
                                      spurion_hook_fn tap, void *tap_context) SPURION_MUST_USE;

/* Whether the last block may be pruned to scored rows when hooks stand at the given points. */
bool spurion_model_prunable(const spurion_model *m, const bool *hook_points);

#endif

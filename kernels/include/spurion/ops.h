/* The table of ops that each backend fills without a hole. One op, one file, twice: cpu/<op>.c, cuda/<op>.cu.
 *
 * Terms. T rows of a packed token array; "act" = the device's matrix-input type (dev->dtype: f32 or bf16), everything else
 * f32 or int32. Where an op is told a type, it takes f32 or act, on every device; dev->mid is the one that suits the device. All arrays are device memory and row-major unless "host" stands there. A stride is in elements.
 * Ops enqueue on the device's stream (the CPU backend has finished when it returns).
 * Promise of every op: a row's result depends on that row's inputs only, bit by bit: not on T, not on its place in the
 * batch, not on the thread count. Reductions are in f32 or wider, in an order fixed by the row's own length.
 * Compiles as C17 and C++17. */
#ifndef SPURION_OPS_H
#define SPURION_OPS_H

#include "spurion/dev.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Weights (N, K) prepared for products in one or both directions, with an optional bias (N). Read-only once made. */
typedef struct spurion_matrix spurion_matrix;

/* SELECT: only sae_encode reads it, which keeps few outputs of a row: a backend may find those first in a cheaper type, as long as what
 * it keeps and their values are those of a product in the matrix's dtype. Else as FORWARD. Not together with another direction,
 * not for GROUPMAX. */
enum { SPURION_FORWARD = 1, SPURION_BACKWARD = 2, SPURION_SELECT = 4 };

/* The same with outputs of type act; and with GELU (tanh) behind, or its gradient: linear_act, linear_act_backward of that kind, not gated.
 * A device may have to choose an algorithm for each. */
enum { SPURION_FORWARD_ACT = 8, SPURION_BACKWARD_ACT = 16, SPURION_FORWARD_GELU = 32, SPURION_BACKWARD_GELU = 64 };
enum {
    SPURION_ANY_FORWARD = SPURION_FORWARD | SPURION_SELECT | SPURION_FORWARD_ACT | SPURION_FORWARD_GELU,
    SPURION_ANY_BACKWARD = SPURION_BACKWARD | SPURION_BACKWARD_ACT | SPURION_BACKWARD_GELU
};

typedef enum spurion_write { SPURION_OVERWRITE = 0, SPURION_ACCUMULATE = 1 } spurion_write;

typedef enum spurion_norm_kind { SPURION_NORM_RMS = 0, SPURION_NORM_LAYER = 1 } spurion_norm_kind;

typedef enum spurion_act_kind {
    SPURION_ACT_GELU_TANH = 0, /* gelu_new, gelu_pytorch_tanh */
    SPURION_ACT_GELU_ERF = 1,  /* gelu */
    SPURION_ACT_SILU = 2,
    SPURION_ACT_RELU = 3
} spurion_act_kind;

typedef enum spurion_rope_style {
    SPURION_ROPE_NONE = 0,
    SPURION_ROPE_HALF = 1,       /* pair (k, k + rot/2): Llama, NeoX */
    SPURION_ROPE_INTERLEAVED = 2 /* pair (2k, 2k + 1): GPT-J */
} spurion_rope_style;

/* Rows of (T, groups, C): element (t, g, c) of an array stands at t * stride + g * C + c. */
typedef struct spurion_rows {
    int T, groups, C;
} spurion_rows;

#define SPURION_PIECES_MAX 4

/* One run of queries and where its keys are. Keys of positions 0 .. q_position + q_count - 1 lie in pieces: piece p holds
 * positions piece_position[p] up to the next piece's (or the last query), in rows piece_row[p] onward of k and v.
 * piece_position[0] = 0. A query at position i sees keys j <= i (and j > i - window when window > 0).
 * Key blocks are counted from position 0, wherever pieces end. */
typedef struct spurion_seq {
    int32_t q_row, q_count, q_position;
    int32_t piece_count;
    int32_t piece_row[SPURION_PIECES_MAX], piece_position[SPURION_PIECES_MAX];
    int32_t dkv_row, dkv_position; /* backward: gradients of keys at positions >= dkv_position go to rows dkv_row onward */
} spurion_seq;

typedef struct spurion_attention_shape {
    int heads, kv_heads, head_dim; /* heads a multiple of kv_heads; head_dim <= 256 */
    float scale;                   /* on the scores */
    float softcap;                 /* 0: none; else s = cap * tanh(s / cap), before the mask */
    int window;                    /* 0: none */
} spurion_attention_shape;

/* --- sparse autoencoders --- */

typedef enum spurion_sae_kind {
    SPURION_SAE_RELU = 0,     /* f = relu(p) */
    SPURION_SAE_JUMPRELU = 1, /* f = relu(p) [p > threshold_i]; compares q = p * h where h is set */
    SPURION_SAE_TOPK = 2,     /* the k largest of q = p * h (signed), then relu; ties to the lowest index */
    SPURION_SAE_GATED = 3,    /* f = [p + gate_bias > 0] relu(p * exp(r_mag) + mag_bias); p without bias */
    SPURION_SAE_GROUPMAX = 4  /* k contiguous groups of F / k: the largest of each (relu first), ties to the lowest index */
} spurion_sae_kind;

typedef enum spurion_sae_norm {
    SPURION_SAE_NORM_NONE = 0,
    SPURION_SAE_NORM_RESCALE = 1, /* u = x * sqrt(d) / |x|; output / that factor */
    SPURION_SAE_NORM_LAYER = 2    /* u = (x - mean) / (sd(ddof 1) + 1e-5); output * sd + mean, as SAELens computes it */
} spurion_sae_norm;

/* A dictionary on the device, in canonical form (formats.md section 1). Pointers are device memory owned by the maker. */
typedef struct spurion_sae_weights {
    int d, F;
    spurion_sae_kind kind;
    spurion_sae_norm norm;
    int k;                     /* TOPK, GROUPMAX */
    int slots;                 /* active features kept per row: k, or the limit for the other kinds */
    spurion_matrix *enc;       /* (F, d), bias = folded b_enc (none for GATED) */
    const float *threshold;    /* (F) JUMPRELU */
    const float *scale;        /* (F) h: the selection looks at p * h and f = p * h; dec is W_dec / h then; or NULL */
    const float *gate_bias, *mag_scale, *mag_bias; /* (F) GATED; mag_scale = exp(r_mag) */
    const float *dec;          /* (F, d) f32 effective decoder rows D_i, before the token's own scale */
    const float *dec_bias;     /* (d) b, before the token's own scale */
} spurion_sae_weights;

/* Active features of T rows: row t has min(count[t], slots) entries (index, value), ascending by index.
 * count[t] is the true number of f != 0: above slots the row has overflowed and the caller refuses it.
 * With a per-token norm token_scale, token_shift (T) hold the factors: D_i(t) = D_i * scale, b(t) = b * scale + shift. */
typedef struct spurion_sparse {
    int32_t *count; /* (T) */
    int32_t *index; /* (T, slots) */
    float *value;   /* (T, slots) */
    float *token_scale, *token_shift; /* (T); written by every encode: 1 and 0 without a norm */
    int slots;
} spurion_sparse;

/* Sets of features to remove: set s holds members [begin[s], begin[s + 1]) of index (ascending) and activation_min. */
typedef struct spurion_sae_sets {
    const int32_t *begin;        /* (set_count + 1) */
    const int32_t *index;
    const float *activation_min; /* removed where f > activation_min */
} spurion_sae_sets;

typedef struct spurion_ops {
    const char *name; /* "cpu", "cuda" */
    void (*destroy)(spurion_dev *dev);

    /* --- memory --- */
    spurion_status (*alloc)(spurion_dev *dev, void **out, size_t bytes); /* 64-byte aligned at least; RESOURCE_EXHAUSTED */
    void (*free)(spurion_dev *dev, void *p);
    spurion_status (*upload)(spurion_dev *dev, void *out, const void *host, size_t bytes);
    spurion_status (*download)(spurion_dev *dev, void *host, const void *in, size_t bytes); /* waits for the stream */
    /* The same without waiting: host has the bytes after the next sync. host lies in memory of host_alloc. */
    spurion_status (*download_later)(spurion_dev *dev, void *host, const void *in, size_t bytes);
    /* Host memory that the device reads and writes by itself (pinned), zeroed, resident, 64-byte aligned at least. */
    spurion_status (*host_alloc)(spurion_dev *dev, void **out, size_t bytes);
    void (*host_free)(spurion_dev *dev, void *p);
    spurion_status (*zero)(spurion_dev *dev, void *out, size_t bytes);
    spurion_status (*copy)(spurion_dev *dev, void *out, const void *in, size_t bytes); /* on the device; ranges do not overlap */
    spurion_status (*sync)(spurion_dev *dev);
    size_t (*memory_free)(spurion_dev *dev); /* bytes the device could still give; 0: unknown */

    /* --- matrix products --- */
    /* Prepares w (N, K) f32 host, and bias (N) f32 host or NULL, for the given directions. dtype: type of the weights and inputs. */
    spurion_status (*matrix_create)(spurion_dev *dev, spurion_matrix **out, const float *w, const float *bias, int N, int K,
                                    int directions, spurion_dtype dtype);
    void (*matrix_destroy)(spurion_dev *dev, spurion_matrix *m);
    size_t (*matrix_bytes)(const spurion_dev *dev, int N, int K, int directions, spurion_dtype dtype); /* memory of one, exact */
    /* out[t,n] (+)= sum_k x[t,k] w[n,k] + bias[n].   out (T, N) of out_type, stride out_stride;  x (T, K) of the matrix's dtype, dense.
     * Sums in f32; a bf16 out is rounded once, its bias is rounded to bf16 first, and it cannot be added to. */
    spurion_status (*linear)(spurion_dev *dev, void *out, spurion_dtype out_type, int out_stride, const void *x, const spurion_matrix *w, int T,
                             spurion_write mode);
    /* dx[t,k] (+)= sum_n dy[t,n] w[n,k].             dx (T, K) of dx_type;  dy (T, N) of the matrix's dtype, dense. */
    spurion_status (*linear_backward)(spurion_dev *dev, void *dx, spurion_dtype dx_type, const void *dy, const spurion_matrix *w, int T,
                                      spurion_write mode);
    /* linear and the activation behind it: pre (T, N) of type = x w^T + bias, out (T, N or, gated, N / 2) act = activation of pre.
     * keep: pre is wanted; else it is scratch of that size, and means nothing afterwards. The same out in either case. */
    spurion_status (*linear_act)(spurion_dev *dev, void *out, void *pre, spurion_dtype type, bool keep, const void *x, const spurion_matrix *w, int T,
                                 spurion_act_kind kind, int gated);
    /* linear_backward and the gradient of the activation before it: dpre (T, K or, gated, 2 K) act from dy (T, N) and pre, which has dpre's shape.
     * dout (T, K): scratch. pre and dout of type. */
    spurion_status (*linear_act_backward)(spurion_dev *dev, void *dpre, void *dout, spurion_dtype type, const void *dy, const spurion_matrix *w,
                                          const void *pre, int T, spurion_act_kind kind, int gated);

    /* --- rows --- */
    /* out[t] = table[ids[t]] * scale (+ position_table[positions[t]]).  out (T, D) f32;  table (V, D) dtype f32 or bf16. */
    spurion_status (*embed)(spurion_dev *dev, float *out, const void *table, spurion_dtype table_dtype, const float *position_table,
                            const int32_t *ids, const int32_t *positions, int T, int D, float scale);
    /* out[r] = in[rows[r]] (gather);  out[rows[r]] (+)= in[r] (scatter; rows distinct).  (R, C) f32 */
    spurion_status (*gather_rows)(spurion_dev *dev, float *out, const float *in, const int32_t *rows, int R, int C);
    spurion_status (*scatter_rows)(spurion_dev *dev, float *out, const float *in, const int32_t *rows, int R, int C, spurion_write mode);
    /* The same for act rows. */
    spurion_status (*gather_act)(spurion_dev *dev, void *out, const void *in, const int32_t *rows, int R, int C);
    /* out (T, C) act, stride out_stride = x (T, C) of x_type, stride x_stride, rounded to nearest even. */
    spurion_status (*cast)(spurion_dev *dev, void *out, int out_stride, const void *x, spurion_dtype x_type, int x_stride, int T, int C);
    /* out[t,c] += x[t,c].  (T, C) f32 */
    spurion_status (*add)(spurion_dev *dev, float *out, const float *x, int T, int C);
    /* out[r] = sum_c a[r,c] b[r * b_stride + c] + bias: (R) f32 from a (R, C); sums in f64, in order. b_stride 0: one b for all. */
    spurion_status (*dot_rows)(spurion_dev *dev, float *out, const float *a, const float *b, int b_stride, int R, int C, float bias);

    /* out[s] = mean of in's rows over all positions 0 .. last query of seq s, which its pieces name.  out (seq_count, C) f32; in (rows, C)
     * f32; seqs HOST memory. Sums in f64 in the order of positions. */
    spurion_status (*mean_rows)(spurion_dev *dev, float *out, const float *in, const spurion_seq *seqs, int seq_count, int C);
    /* dx[dkv_row + i] = dout[s] / positions, for the positions dkv_position + i .. last query of each seq: overwrites. */
    spurion_status (*mean_rows_backward)(spurion_dev *dev, float *dx, const float *dout, const spurion_seq *seqs, int seq_count, int C);

    /* --- norms ---  RMS: out = x * rstd * w;  LAYER: out = (x - mean) * rstd * w + b.  rstd = 1 / sqrt(mean square or var + eps).
     * stats (T, groups, 2) f32 = (mean, rstd), kept for the backward pass, or NULL. w, b (C); b may be NULL.
     * One of out_act (act) and out_f32 is NULL; mode says whether out_f32 is overwritten or added to. */
    spurion_status (*norm)(spurion_dev *dev, void *out_act, float *out_f32, int out_stride, float *stats, const float *x, int x_stride,
                           const float *w, const float *b, spurion_rows shape, float eps, spurion_norm_kind kind, spurion_write mode);
    /* dx (+)= gradient through the norm of dy; x, stats as in the forward pass. May not alias. */
    spurion_status (*norm_backward)(spurion_dev *dev, float *dx, int dx_stride, const float *dy, int dy_stride, const float *x, int x_stride,
                                    const float *stats, const float *w, spurion_rows shape, spurion_norm_kind kind, spurion_write mode);

    /* --- rotary embedding ---  out (T, heads, hd) act from x of x_type; the first rot of each head's hd dimensions turn by the
     * angle of the row's position: table (position_max, rot/2, 2) f32 = (cos, sin). inverse != 0: the other way (the backward pass).
     * style NONE copies. */
    spurion_status (*rope)(spurion_dev *dev, void *out, int out_stride, const void *x, spurion_dtype x_type, int x_stride, const int32_t *positions,
                           const float *table, spurion_rows shape, int rot, spurion_rope_style style, int inverse);

    /* The same from f32 to f32, for what is differentiated further (a norm before the rotation). */
    spurion_status (*rope_f32)(spurion_dev *dev, float *out, int out_stride, const float *x, int x_stride, const int32_t *positions,
                               const float *table, spurion_rows shape, int rot, spurion_rope_style style, int inverse);

    /* --- attention over a shared prompt and own completion ---
     * out (rows, heads * hd) act, lse (rows, heads) f32, for the query rows of seqs; q (rows, heads * hd), k, v (rows, kv_heads * hd) act.
     * seqs (seq_count) HOST memory, copied by the op. Query rows that no seq names are left alone. */
    spurion_status (*attention)(spurion_dev *dev, void *out, float *lse, const void *q, const void *k, const void *v,
                                const spurion_seq *seqs, int seq_count, spurion_attention_shape shape);
    /* dq (rows, heads * hd) f32 for the query rows: overwrites. dk, dv (rows, kv_heads * hd) f32, stride dkv_stride, for positions
     * dkv_position .. last query: overwrites, summed over the queries of the same seq. dout (rows, heads * hd) of dout_type.
     * No two seqs may share dkv rows. Deterministic. */
    spurion_status (*attention_backward)(spurion_dev *dev, float *dq, float *dk, float *dv, int dkv_stride, const void *dout, spurion_dtype dout_type,
                                         const void *out, const float *lse, const void *q, const void *k, const void *v,
                                         const spurion_seq *seqs, int seq_count, spurion_attention_shape shape);

    /* --- activations ---  gated: pre (T, 2F) = [gate, up], out = act(gate) * up;  else pre (T, F), out = act(pre).  out (T, F) act.
     * pre (and dout) of type. */
    spurion_status (*activation)(spurion_dev *dev, void *out, const void *pre, spurion_dtype type, int T, int F, spurion_act_kind kind, int gated);
    /* dpre (T, F or 2F) act from dout (T, F). */
    spurion_status (*activation_backward)(spurion_dev *dev, void *dpre, const void *pre, const void *dout, spurion_dtype type, int T, int F,
                                          spurion_act_kind kind, int gated);

    /* --- sparse autoencoders --- */
    size_t (*sae_scratch_bytes)(const spurion_dev *dev, const spurion_sae_weights *sae, int T);
    /* Encodes x (T, d) f32 and selects. scratch: sae_scratch_bytes. Exact top-k. */
    spurion_status (*sae_encode)(spurion_dev *dev, spurion_sparse *out, const spurion_sae_weights *sae, const float *x, void *scratch, int T);
    /* Encodes part of a dictionary: lists those of its features member[0 .. part->F) (ascending, device) that are active, by their index in sae
     * and with the values that sae_encode gives. part: the members as a dictionary of their own, of the same kind and norm, slots = its F.
     * For TOPK a member is active when it is among the k largest of all; rows in which no member can be are left early. Not for GROUPMAX.
     * out->slots >= part->F. scratch: the larger sae_scratch_bytes of sae and part. */
    spurion_status (*sae_encode_members)(spurion_dev *dev, spurion_sparse *out, const spurion_sae_weights *sae, const spurion_sae_weights *part,
                                         const int32_t *member, const float *x, void *scratch, int T);
    /* out[t,s] = value * <D_i(t), g(t)> for every entry.  out (T, slots) f32;  g (T, d). science.md section 1. */
    spurion_status (*sae_attribute)(spurion_dev *dev, float *out, const spurion_sparse *f, const spurion_sae_weights *sae, const float *g, int T);
    /* x[t] -= sum over entries of row_set[t]'s set with value > activation_min of value * D_i(t); in index order. row_set[t] < 0: none. */
    spurion_status (*sae_subtract)(spurion_dev *dev, float *x, const spurion_sparse *f, const spurion_sae_weights *sae,
                                   const spurion_sae_sets *sets, const int32_t *row_set, int T);
    /* out[t] = <b(t), g(t)> (bias attribution). */
    spurion_status (*sae_bias_dot)(spurion_dev *dev, float *out, const spurion_sparse *f, const spurion_sae_weights *sae, const float *g, int T);
    /* x[t] = (1 - a[t]) (x[t] - b(t)) + b(t): the path of integrated gradients; a = 1 gives b(t) exactly. */
    spurion_status (*sae_shrink)(spurion_dev *dev, float *x, const spurion_sparse *f, const spurion_sae_weights *sae, const float *a, int T);
} spurion_ops;

/* The tables; a build without CUDA has no spurion_ops_cuda. */
const spurion_ops *spurion_ops_cpu(void);
const spurion_ops *spurion_ops_cuda(void);
spurion_status spurion_dev_create_cpu(spurion_dev **out, spurion_dtype dtype, int threads) SPURION_MUST_USE;
spurion_status spurion_dev_create_cuda(spurion_dev **out, spurion_dtype dtype, int ordinal) SPURION_MUST_USE;

#ifdef __cplusplus
}
#endif

#endif

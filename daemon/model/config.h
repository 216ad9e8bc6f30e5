/* What a checkpoint's config.json says, resolved: every family in one description that forward and backward read.
 * A new family is a row in families.c and a name map. */
#ifndef SPURION_MODEL_CONFIG_H
#define SPURION_MODEL_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "spurion/ops.h"
#include "spurion/status.h"

#define SPURION_LAYERS_MAX 256
#define SPURION_EOS_MAX 8

typedef enum spurion_rope_scaling { SPURION_ROPE_PLAIN = 0, SPURION_ROPE_LINEAR, SPURION_ROPE_LLAMA3 } spurion_rope_scaling;

#define SPURION_HEAD_LAYERS_MAX 4

/* A chain of linear layers, ReLU between them (head.h). */
typedef struct spurion_head {
    char stem[64];                      /* of the tensors' names: score, v_head.summary, ... */
    int hidden;                         /* layers before the last; 0: one linear layer */
    int width[SPURION_HEAD_LAYERS_MAX]; /* of the hidden layers */
    bool bias, hidden_bias;
    double mean, std;                   /* reward = (score - mean) / std; 0 and 1 where nothing is normalised */
    double init_range;                  /* initializer_range: the deviation of a head that was never trained */
    bool centre, rescale;               /* the same with normalizer.mean, sqrt(normalizer.var) of the file (beaver) */
} spurion_head;

/* Where the reward is read: the hidden state that the head sees (docs/verdict.md). */
typedef enum spurion_pooling {
    SPURION_POOL_LAST,         /* the last position */
    SPURION_POOL_LAST_NON_PAD, /* the last position whose id is not pad_token_id, as transformers >= 4.49 */
    SPURION_POOL_FIRST_EOS,    /* the first eos_token_id of the completion, as trlx; the last position where there is none */
    SPURION_POOL_MEAN          /* the mean over all positions of the final norm */
} spurion_pooling;

typedef struct spurion_model_config {
    char architecture[96]; /* architectures[0] */
    int hidden, layers, heads, kv_heads, head_dim, ff; /* d, L, H, KV, hd, MLP width */
    int vocab;             /* vocab_size; the embedding's own rows hold (spurion_weights_vocab) */
    int context;           /* positions the model knows */

    spurion_norm_kind norm;
    float eps;
    bool norm_plus_one;    /* Gemma: weights are stored as w - 1; the reader adds the 1 */
    bool parallel;         /* attention and MLP read the same residual and are added together (GPT-J, NeoX) */
    bool shared_norm;      /* one norm for both (GPT-J); implies parallel */
    bool post_norms;       /* a norm after attention and after the MLP, before each add (Gemma 2) */
    bool qk_norm;          /* RMS norm over head_dim of q and k, before rotary (Qwen3) */

    bool position_table;   /* learned positions (GPT-2) */
    spurion_rope_style rope;
    int rot;               /* rotary dimensions of a head */
    double rope_theta;
    spurion_rope_scaling rope_scaling;
    double rope_factor, rope_low, rope_high, rope_original;

    spurion_act_kind act;
    bool gated;
    float embed_scale;     /* 1, or sqrt(hidden) (Gemma); the pass rounds it to its own dtype, as transformers does */
    float softcap;         /* 0: none */
    float attention_scale[SPURION_LAYERS_MAX]; /* on the scores */
    int window[SPURION_LAYERS_MAX];            /* 0: none */

    bool bias_q, bias_kv, bias_o, bias_mlp;

    int outputs;           /* rows of the head's last layer */
    spurion_head head;
    spurion_pooling pooling;
    bool pooling_said;     /* by the checkpoint or by the user; else it is the default */

    int32_t bos, pad;      /* -1: none */
    int32_t eos[SPURION_EOS_MAX];
    int eos_count;
} spurion_model_config;

/* Reads DIR/config.json as transformers 4 and 5 write it, and finds the score head among the tensors
 * (a checkpoint that cannot be opened is the business of spurion_weights_open). INVALID_ARGUMENT naming key, expected and found;
 * UNIMPLEMENTED for an unknown architecture, rope type or activation (the message lists the known ones). */
spurion_status spurion_model_config_read(spurion_model_config *out, const char *dir) SPURION_MUST_USE;

/* Rotary table (position_count, rot / 2, 2) f32 = (cos, sin): angles in f64 from f32 frequencies as transformers computes them. */
void spurion_model_rope_table(float *out, const spurion_model_config *c, int position_count);

#endif

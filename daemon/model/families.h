/* The table of model families: what a config.json leaves unsaid, and what each family calls its tensors. A new family is a row here.
 * Thread: any (constant data). */
#ifndef SPURION_MODEL_FAMILIES_H
#define SPURION_MODEL_FAMILIES_H

#include <stdbool.h>

#include "daemon/base/json.h"
#include "daemon/model/config.h"
#include "daemon/model/weights.h"
#include "spurion/status.h"

/* How q, k and v are stored. */
typedef enum spurion_qkv_form {
    SPURION_QKV_APART,   /* three tensors */
    SPURION_QKV_COLUMNS, /* one Conv1D [d, 3d]: q | k | v (GPT-2) */
    SPURION_QKV_HEADS    /* one Linear [3d, d], rows per head [q; k; v] (NeoX) */
} spurion_qkv_form;

/* Which bias a family has; CONFIG: attention_bias or mlp_bias of its config.json says. */
typedef enum spurion_bias_rule { SPURION_BIAS_NO, SPURION_BIAS_YES, SPURION_BIAS_CONFIG } spurion_bias_rule;

/* Where the sliding window holds when layer_types is absent (formats.md 6.3). */
typedef enum spurion_window_rule {
    SPURION_WINDOW_NONE,
    SPURION_WINDOW_ALL,   /* Mistral: every layer */
    SPURION_WINDOW_UPPER, /* Qwen: layers >= max_window_layers, if use_sliding_window */
    SPURION_WINDOW_EVEN   /* Gemma 2: even layers */
} spurion_window_rule;

typedef struct spurion_family {
    const char *architecture, *model_type;
    const char *prefix;              /* of the base model's tensors; a file may lack it */
    const char *const *names;        /* by role, "{}" for the layer; NULL: the family has none */
    spurion_norm_kind norm;
    double eps;                      /* defaults of the transformers class */
    const char *act;
    int bos, eos, pad;               /* -1: none */
    bool gated, norm_plus_one, shared_norm, post_norms, qk_norm, position_table, embed_scaled, conv1d;
    bool parallel;                   /* NeoX: default of use_parallel_residual */
    spurion_qkv_form qkv;
    spurion_rope_style rope;
    double rot_fraction;             /* default share of the head that turns; 0: rotary_dim says (GPT-J) */
    spurion_bias_rule bias_qkv, bias_o, bias_mlp;
    spurion_window_rule window;
    int window_default;
    double softcap;                  /* default of attn_logit_softcapping */
} spurion_family;

/* The row of an architecture (architectures[0]) or, for classes that wrap a base model and keep its tensors (OpenRLHF's RewardModel,
 * UltraRM's LlamaRewardModel, a LlamaForCausalLM with a value head), of model_type. NULL when there is none. */
const spurion_family *spurion_family_find(const char *architecture, const char *model_type);
/* Writes the known architectures, separated by ", ". */
void spurion_family_list(char *out, size_t bytes);

/* The parts of spurion_model_config_read: from a text, without looking at the weights. */
spurion_status spurion_model_config_parse(spurion_model_config *out, bool *outputs_said, const char *text, size_t bytes,
                                          const char *name) SPURION_MUST_USE;

#endif

/* Rows of the family table (formats.md 6.3, 6.5). Thread: any. Memory: constant. */
#include "daemon/model/families.h"

#include <string.h>

static const char *const names_gpt2[SPURION_ROLE_COUNT] = {
    [SPURION_ROLE_EMBED] = "wte.weight",
    [SPURION_ROLE_POSITION] = "wpe.weight",
    [SPURION_ROLE_NORM1_W] = "h.{}.ln_1.weight",
    [SPURION_ROLE_NORM1_B] = "h.{}.ln_1.bias",
    [SPURION_ROLE_NORM2_W] = "h.{}.ln_2.weight",
    [SPURION_ROLE_NORM2_B] = "h.{}.ln_2.bias",
    [SPURION_ROLE_Q] = "h.{}.attn.c_attn.weight",
    [SPURION_ROLE_Q_B] = "h.{}.attn.c_attn.bias",
    [SPURION_ROLE_K] = "h.{}.attn.c_attn.weight",
    [SPURION_ROLE_K_B] = "h.{}.attn.c_attn.bias",
    [SPURION_ROLE_V] = "h.{}.attn.c_attn.weight",
    [SPURION_ROLE_V_B] = "h.{}.attn.c_attn.bias",
    [SPURION_ROLE_O] = "h.{}.attn.c_proj.weight",
    [SPURION_ROLE_O_B] = "h.{}.attn.c_proj.bias",
    [SPURION_ROLE_UP] = "h.{}.mlp.c_fc.weight",
    [SPURION_ROLE_UP_B] = "h.{}.mlp.c_fc.bias",
    [SPURION_ROLE_DOWN] = "h.{}.mlp.c_proj.weight",
    [SPURION_ROLE_DOWN_B] = "h.{}.mlp.c_proj.bias",
    [SPURION_ROLE_FINAL_W] = "ln_f.weight",
    [SPURION_ROLE_FINAL_B] = "ln_f.bias",
};

static const char *const names_gptj[SPURION_ROLE_COUNT] = {
    [SPURION_ROLE_EMBED] = "wte.weight",
    [SPURION_ROLE_NORM1_W] = "h.{}.ln_1.weight",
    [SPURION_ROLE_NORM1_B] = "h.{}.ln_1.bias",
    [SPURION_ROLE_Q] = "h.{}.attn.q_proj.weight",
    [SPURION_ROLE_K] = "h.{}.attn.k_proj.weight",
    [SPURION_ROLE_V] = "h.{}.attn.v_proj.weight",
    [SPURION_ROLE_O] = "h.{}.attn.out_proj.weight",
    [SPURION_ROLE_UP] = "h.{}.mlp.fc_in.weight",
    [SPURION_ROLE_UP_B] = "h.{}.mlp.fc_in.bias",
    [SPURION_ROLE_DOWN] = "h.{}.mlp.fc_out.weight",
    [SPURION_ROLE_DOWN_B] = "h.{}.mlp.fc_out.bias",
    [SPURION_ROLE_FINAL_W] = "ln_f.weight",
    [SPURION_ROLE_FINAL_B] = "ln_f.bias",
};

static const char *const names_neox[SPURION_ROLE_COUNT] = {
    [SPURION_ROLE_EMBED] = "embed_in.weight",
    [SPURION_ROLE_NORM1_W] = "layers.{}.input_layernorm.weight",
    [SPURION_ROLE_NORM1_B] = "layers.{}.input_layernorm.bias",
    [SPURION_ROLE_NORM2_W] = "layers.{}.post_attention_layernorm.weight",
    [SPURION_ROLE_NORM2_B] = "layers.{}.post_attention_layernorm.bias",
    [SPURION_ROLE_Q] = "layers.{}.attention.query_key_value.weight",
    [SPURION_ROLE_Q_B] = "layers.{}.attention.query_key_value.bias",
    [SPURION_ROLE_K] = "layers.{}.attention.query_key_value.weight",
    [SPURION_ROLE_K_B] = "layers.{}.attention.query_key_value.bias",
    [SPURION_ROLE_V] = "layers.{}.attention.query_key_value.weight",
    [SPURION_ROLE_V_B] = "layers.{}.attention.query_key_value.bias",
    [SPURION_ROLE_O] = "layers.{}.attention.dense.weight",
    [SPURION_ROLE_O_B] = "layers.{}.attention.dense.bias",
    [SPURION_ROLE_UP] = "layers.{}.mlp.dense_h_to_4h.weight",
    [SPURION_ROLE_UP_B] = "layers.{}.mlp.dense_h_to_4h.bias",
    [SPURION_ROLE_DOWN] = "layers.{}.mlp.dense_4h_to_h.weight",
    [SPURION_ROLE_DOWN_B] = "layers.{}.mlp.dense_4h_to_h.bias",
    [SPURION_ROLE_FINAL_W] = "final_layer_norm.weight",
    [SPURION_ROLE_FINAL_B] = "final_layer_norm.bias",
};

/* Llama, Mistral, Qwen2 and Qwen3 share one map; a row that has no bias or no q_norm never asks for it. */
#define LLAMA_NAMES                                                     \
    [SPURION_ROLE_EMBED] = "embed_tokens.weight",                       \
    [SPURION_ROLE_NORM1_W] = "layers.{}.input_layernorm.weight",        \
    [SPURION_ROLE_Q] = "layers.{}.self_attn.q_proj.weight",             \
    [SPURION_ROLE_Q_B] = "layers.{}.self_attn.q_proj.bias",             \
    [SPURION_ROLE_K] = "layers.{}.self_attn.k_proj.weight",             \
    [SPURION_ROLE_K_B] = "layers.{}.self_attn.k_proj.bias",             \
    [SPURION_ROLE_V] = "layers.{}.self_attn.v_proj.weight",             \
    [SPURION_ROLE_V_B] = "layers.{}.self_attn.v_proj.bias",             \
    [SPURION_ROLE_O] = "layers.{}.self_attn.o_proj.weight",             \
    [SPURION_ROLE_O_B] = "layers.{}.self_attn.o_proj.bias",             \
    [SPURION_ROLE_Q_NORM] = "layers.{}.self_attn.q_norm.weight",        \
    [SPURION_ROLE_K_NORM] = "layers.{}.self_attn.k_norm.weight",        \
    [SPURION_ROLE_GATE] = "layers.{}.mlp.gate_proj.weight",             \
    [SPURION_ROLE_GATE_B] = "layers.{}.mlp.gate_proj.bias",             \
    [SPURION_ROLE_UP] = "layers.{}.mlp.up_proj.weight",                 \
    [SPURION_ROLE_UP_B] = "layers.{}.mlp.up_proj.bias",                 \
    [SPURION_ROLE_DOWN] = "layers.{}.mlp.down_proj.weight",             \
    [SPURION_ROLE_DOWN_B] = "layers.{}.mlp.down_proj.bias",             \
    [SPURION_ROLE_FINAL_W] = "norm.weight"

static const char *const names_llama[SPURION_ROLE_COUNT] = {
    LLAMA_NAMES,
    [SPURION_ROLE_NORM2_W] = "layers.{}.post_attention_layernorm.weight",
};

static const char *const names_gemma2[SPURION_ROLE_COUNT] = {
    LLAMA_NAMES,
    [SPURION_ROLE_POST_ATTENTION_W] = "layers.{}.post_attention_layernorm.weight",
    [SPURION_ROLE_NORM2_W] = "layers.{}.pre_feedforward_layernorm.weight",
    [SPURION_ROLE_POST_MLP_W] = "layers.{}.post_feedforward_layernorm.weight",
};

static const spurion_family families[] = {
    {.architecture = "GPT2ForSequenceClassification", .model_type = "gpt2", .prefix = "transformer.", .names = names_gpt2,
     .norm = SPURION_NORM_LAYER, .eps = 1e-5, .act = "gelu_new", .bos = 50256, .eos = 50256, .pad = -1, .position_table = true,
     .conv1d = true, .qkv = SPURION_QKV_COLUMNS, .rope = SPURION_ROPE_NONE, .bias_qkv = SPURION_BIAS_YES, .bias_o = SPURION_BIAS_YES,
     .bias_mlp = SPURION_BIAS_YES},
    {.architecture = "GPTJForSequenceClassification", .model_type = "gptj", .prefix = "transformer.", .names = names_gptj,
     .norm = SPURION_NORM_LAYER, .eps = 1e-5, .act = "gelu_new", .bos = 50256, .eos = 50256, .pad = -1, .parallel = true,
     .shared_norm = true, .rope = SPURION_ROPE_INTERLEAVED, .bias_mlp = SPURION_BIAS_YES},
    {.architecture = "GPTNeoXForSequenceClassification", .model_type = "gpt_neox", .prefix = "gpt_neox.", .names = names_neox,
     .norm = SPURION_NORM_LAYER, .eps = 1e-5, .act = "gelu", .bos = 0, .eos = 2, .pad = -1, .parallel = true, .qkv = SPURION_QKV_HEADS,
     .rope = SPURION_ROPE_HALF, .rot_fraction = 0.25, .bias_qkv = SPURION_BIAS_CONFIG, .bias_o = SPURION_BIAS_CONFIG,
     .bias_mlp = SPURION_BIAS_YES},
    {.architecture = "LlamaForSequenceClassification", .model_type = "llama", .prefix = "model.", .names = names_llama,
     .norm = SPURION_NORM_RMS, .eps = 1e-6, .act = "silu", .bos = 1, .eos = 2, .pad = -1, .gated = true, .rope = SPURION_ROPE_HALF,
     .rot_fraction = 1, .bias_qkv = SPURION_BIAS_CONFIG, .bias_o = SPURION_BIAS_CONFIG, .bias_mlp = SPURION_BIAS_CONFIG},
    {.architecture = "MistralForSequenceClassification", .model_type = "mistral", .prefix = "model.", .names = names_llama,
     .norm = SPURION_NORM_RMS, .eps = 1e-6, .act = "silu", .bos = 1, .eos = 2, .pad = -1, .gated = true, .rope = SPURION_ROPE_HALF,
     .rot_fraction = 1, .window = SPURION_WINDOW_ALL, .window_default = 4096},
    {.architecture = "Qwen2ForSequenceClassification", .model_type = "qwen2", .prefix = "model.", .names = names_llama,
     .norm = SPURION_NORM_RMS, .eps = 1e-6, .act = "silu", .bos = -1, .eos = -1, .pad = -1, .gated = true, .rope = SPURION_ROPE_HALF,
     .rot_fraction = 1, .bias_qkv = SPURION_BIAS_YES, .window = SPURION_WINDOW_UPPER, .window_default = 4096},
    {.architecture = "Qwen3ForSequenceClassification", .model_type = "qwen3", .prefix = "model.", .names = names_llama,
     .norm = SPURION_NORM_RMS, .eps = 1e-6, .act = "silu", .bos = -1, .eos = -1, .pad = -1, .gated = true, .qk_norm = true,
     .rope = SPURION_ROPE_HALF, .rot_fraction = 1, .bias_qkv = SPURION_BIAS_CONFIG, .bias_o = SPURION_BIAS_CONFIG,
     .window = SPURION_WINDOW_UPPER, .window_default = 4096},
    {.architecture = "Gemma2ForSequenceClassification", .model_type = "gemma2", .prefix = "model.", .names = names_gemma2,
     .norm = SPURION_NORM_RMS, .eps = 1e-6, .act = "gelu_pytorch_tanh", .bos = 2, .eos = 1, .pad = 0, .gated = true,
     .norm_plus_one = true, .post_norms = true, .embed_scaled = true, .rope = SPURION_ROPE_HALF, .rot_fraction = 1,
     .bias_qkv = SPURION_BIAS_CONFIG, .bias_o = SPURION_BIAS_CONFIG, .window = SPURION_WINDOW_EVEN, .window_default = 4096,
     .softcap = 50},
};

#define FAMILY_COUNT (sizeof families / sizeof *families)

/* Classes that wrap a base model, by the end of their names; model_type says which one. The head's own tensors decide whether it is a
 * reward model (trlx, TRL and LLaMA-Factory leave the language model's class name in config.json). Not ...ForSequenceClassification: that
 * is transformers' own name for each base model, and one that is not in the table is a model we do not know, whatever model_type says. */
static const char *const wrappers[] = {"RewardModel", "LLMForSequenceRegression", "ForScore", "ForCausalLM", "LMHeadModel", "Model"};

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);

    return n >= m && strcmp(text + n - m, end) == 0;
}

static bool wraps(const char *architecture)
{
    if (strstr(architecture, "Process") != NULL) { /* a process reward model scores steps, not texts */
        return false;
    }
    for (size_t w = 0; w < sizeof wrappers / sizeof *wrappers; w++) {
        if (ends_with(architecture, wrappers[w])) {
            return true;
        }
    }
    return false;
}

const spurion_family *spurion_family_find(const char *architecture, const char *model_type)
{
    static const char openassistant[] = "gpt_neox_reward_model";

    if (strcmp(model_type, openassistant) == 0) {
        model_type = "gpt_neox";
    }
    for (size_t i = 0; i < FAMILY_COUNT; i++) {
        if (strcmp(families[i].architecture, architecture) == 0) {
            return &families[i];
        }
    }
    for (size_t i = 0; i < FAMILY_COUNT && wraps(architecture); i++) {
        if (strcmp(families[i].model_type, model_type) == 0) {
            return &families[i];
        }
    }
    return NULL;
}

void spurion_family_list(char *out, size_t bytes)
{
    size_t at = 0;

    out[0] = '\0';
    for (size_t i = 0; i < FAMILY_COUNT && at < bytes; i++) {
        at += (size_t)snprintf(out + at, bytes - at, "%s%s", i == 0 ? "" : ", ", families[i].architecture);
    }
}

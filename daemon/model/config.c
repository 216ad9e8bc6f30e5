/* config.json of a reward model, as transformers 4 and 5 write it, resolved by the family table. Thread: one. Memory: none kept. */
#include "daemon/model/config.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/json.h"
#include "daemon/model/families.h"
#include "daemon/model/head.h"
#include "daemon/model/safetensors.h"

#define SIZE_MAX_WIDTH (1 << 20)
#define CONTEXT_MAX (1 << 24)

/* --- sizes --- */

static spurion_status read_sizes(spurion_model_config *c, const spurion_family *f, spurion_json_at at)
{
    spurion_status st;

    SPURION_TRY(st, spurion_json_need_int(&c->hidden, at, "hidden_size|n_embd", 1, SIZE_MAX_WIDTH));
    SPURION_TRY(st, spurion_json_need_int(&c->layers, at, "num_hidden_layers|n_layer", 1, SPURION_LAYERS_MAX));
    SPURION_TRY(st, spurion_json_need_int(&c->heads, at, "num_attention_heads|n_head", 1, 4096));
    SPURION_TRY(st, spurion_json_need_int(&c->vocab, at, "vocab_size", 1, INT_MAX));
    SPURION_TRY(st, spurion_json_need_int(&c->context, at, "max_position_embeddings|n_positions", 1, CONTEXT_MAX));
    c->kv_heads = c->heads;
    if (f->gated) {
        SPURION_TRY(st, spurion_json_opt_int(&c->kv_heads, at, "num_key_value_heads", 1, 4096));
        SPURION_TRY(st, spurion_json_need_int(&c->ff, at, "intermediate_size", 1, SIZE_MAX_WIDTH));
    } else {
        c->ff = 4 * c->hidden;
        SPURION_TRY(st, spurion_json_opt_int(&c->ff, at, "intermediate_size|n_inner", 1, SIZE_MAX_WIDTH));
    }
    if (c->heads % c->kv_heads != 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: num_key_value_heads: expected a divisor of num_attention_heads (%d), found %d",
                           spurion_path_tail(at.name), c->heads, c->kv_heads);
        goto out;
    }
    if (spurion_json_find(at, "head_dim") == NULL && c->hidden % c->heads != 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: hidden_size: expected a multiple of num_attention_heads (%d), found %d",
                           spurion_path_tail(at.name), c->heads, c->hidden);
        goto out;
    }
    c->head_dim = c->hidden / c->heads;
    SPURION_TRY(st, spurion_json_opt_int(&c->head_dim, at, "head_dim", 1, 65536));
out:
    return st;
}

static spurion_status read_activation(spurion_model_config *c, const spurion_family *f, spurion_json_at at)
{
    static const struct {
        const char *name;
        spurion_act_kind kind;
    } known[] = {{"gelu_new", SPURION_ACT_GELU_TANH},  {"gelu_pytorch_tanh", SPURION_ACT_GELU_TANH},
                 {"gelu_fast", SPURION_ACT_GELU_TANH}, {"gelu", SPURION_ACT_GELU_ERF},
                 {"silu", SPURION_ACT_SILU},           {"swish", SPURION_ACT_SILU},
                 {"relu", SPURION_ACT_RELU}};
    spurion_status st;
    const char *name = f->act;

    /* hidden_activation wins over hidden_act in Gemma */
    SPURION_TRY(st, spurion_json_opt_string(&name, at, f->embed_scaled ? "hidden_activation" : "activation_function|hidden_act"));
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(known[i].name, name) == 0) {
            c->act = known[i].kind;
            return st;
        }
    }
    st = spurion_error(SPURION_UNIMPLEMENTED,
                       "%s: activation: expected gelu_new, gelu_pytorch_tanh, gelu_fast, gelu, silu, swish or relu, found \"%.60s\"",
                       spurion_path_tail(at.name), name);
out:
    return st;
}

static spurion_status read_bias(bool *out, spurion_bias_rule rule, bool otherwise, spurion_json_at at, const char *key)
{
    *out = rule == SPURION_BIAS_YES || (rule == SPURION_BIAS_CONFIG && otherwise);
    return rule == SPURION_BIAS_CONFIG ? spurion_json_opt_bool(out, at, key) : spurion_ok();
}

/* Refuses a switch that changes the computation in a way the engine does not know. */
static spurion_status refuse_true(spurion_json_at at, const char *key)
{
    spurion_status st;
    bool on = false;

    SPURION_TRY(st, spurion_json_opt_bool(&on, at, key));
    if (on) {
        st = spurion_error(SPURION_UNIMPLEMENTED, "%s: %s: expected false, found true", spurion_path_tail(at.name), key);
    }
out:
    return st;
}

static spurion_status read_block(spurion_model_config *c, const spurion_family *f, spurion_json_at at)
{
    spurion_status st;
    double eps = f->eps;
    bool neox = f->qkv == SPURION_QKV_HEADS;

    c->norm = f->norm;
    c->norm_plus_one = f->norm_plus_one;
    c->post_norms = f->post_norms;
    c->qk_norm = f->qk_norm;
    c->parallel = f->parallel;
    c->shared_norm = f->shared_norm;
    c->gated = f->gated;
    c->position_table = f->position_table;
    if (neox) {
        SPURION_TRY(st, spurion_json_opt_bool(&c->parallel, at, "use_parallel_residual"));
    }
    SPURION_TRY(st, spurion_json_opt_double(&eps, at, "rms_norm_eps|layer_norm_eps|layer_norm_epsilon", 0, 1));
    c->eps = (float)eps;
    SPURION_TRY(st, read_activation(c, f, at));
    SPURION_TRY(st, read_bias(&c->bias_q, f->bias_qkv, neox, at, "attention_bias"));
    c->bias_kv = c->bias_q;
    SPURION_TRY(st, read_bias(&c->bias_o, f->bias_o, neox, at, "attention_bias"));
    SPURION_TRY(st, read_bias(&c->bias_mlp, f->bias_mlp, false, at, "mlp_bias"));
    SPURION_TRY(st, refuse_true(at, "add_cross_attention"));
    SPURION_TRY(st, refuse_true(at, "use_bidirectional_attention"));
    if (spurion_json_find(at, "quantization_config") != NULL) {
        st = spurion_error(SPURION_UNIMPLEMENTED, "%s: quantization_config: expected none (F32, F16 or BF16 weights), found one",
                           spurion_path_tail(at.name));
    }
out:
    return st;
}

/* --- rotary embedding --- */

/* rope_parameters of transformers 5 may nest one object per layer type: taken when they agree. */
static spurion_status rope_unnest(const json_t **rope, spurion_json_at at)
{
    const json_t *first = NULL;
    const char *key;
    json_t *value;

    json_object_foreach((json_t *)(uintptr_t)*rope, key, value) {
        if (json_is_object(value) && first == NULL) {
            first = value;
        } else if (json_is_object(value) && !json_equal(value, first)) {
            return spurion_error(SPURION_UNIMPLEMENTED, "%s: rope_parameters: expected the same for every layer type, found %.40s differing",
                                 spurion_path_tail(at.name), key);
        }
    }
    if (first != NULL) {
        *rope = first;
    }
    return spurion_ok();
}

static spurion_status read_rope_type(spurion_model_config *c, spurion_json_at rope, spurion_json_at at)
{
    spurion_status st;
    const char *type = "default";
    int original = c->context;

    c->rope_factor = c->rope_low = c->rope_high = 1;
    SPURION_TRY(st, spurion_json_opt_string(&type, rope, "rope_type|type"));
    if (strcmp(type, "default") == 0) {
        c->rope_scaling = SPURION_ROPE_PLAIN;
    } else if (strcmp(type, "linear") == 0 || strcmp(type, "llama3") == 0) {
        bool llama3 = type[2] == 'a';

        c->rope_scaling = llama3 ? SPURION_ROPE_LLAMA3 : SPURION_ROPE_LINEAR;
        if (spurion_json_find(rope, "factor") == NULL ||
            (llama3 && (spurion_json_find(rope, "low_freq_factor") == NULL || spurion_json_find(rope, "high_freq_factor") == NULL))) {
            st = spurion_json_error(rope, llama3 ? "factor, low_freq_factor and high_freq_factor" : "factor", "numbers", NULL);
            goto out;
        }
        SPURION_TRY(st, spurion_json_opt_double(&c->rope_factor, rope, "factor", 1e-3, 1e6));
        SPURION_TRY(st, spurion_json_opt_double(&c->rope_low, rope, "low_freq_factor", 1e-6, 1e6));
        SPURION_TRY(st, spurion_json_opt_double(&c->rope_high, rope, "high_freq_factor", 1e-6, 1e6));
        SPURION_TRY(st, spurion_json_opt_int(&original, rope, "original_max_position_embeddings", 1, CONTEXT_MAX));
        if (llama3 && c->rope_high <= c->rope_low) {
            st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: high_freq_factor: expected above low_freq_factor (%g), found %g",
                               spurion_path_tail(at.name), c->rope_low, c->rope_high);
            goto out;
        }
    } else {
        st = spurion_error(SPURION_UNIMPLEMENTED, "%s: rope type: expected default, linear or llama3, found \"%.60s\"",
                           spurion_path_tail(at.name), type);
        goto out;
    }
    c->rope_original = original;
out:
    return st;
}

static spurion_status read_rope(spurion_model_config *c, const spurion_family *f, spurion_json_at at)
{
    spurion_status st = spurion_ok();
    const json_t *object = NULL, *empty = NULL;
    spurion_json_at rope;
    double fraction = f->rot_fraction;

    c->rope = f->rope;
    c->rope_theta = 10000;
    c->rope_factor = c->rope_low = c->rope_high = 1;
    c->rope_original = c->context;
    if (f->rope == SPURION_ROPE_NONE) {
        return st;
    }
    empty = json_object();
    SPURION_TRY(st, spurion_json_opt_object(&object, at, "rope_parameters|rope_scaling"));
    if (object == NULL) {
        object = empty;
    }
    SPURION_TRY(st, rope_unnest(&object, at));
    rope = (spurion_json_at){object, at.name};
    if (f->rot_fraction == 0) { /* GPT-J: its own key, and the base is fixed */
        c->rot = 64;
        if (json_is_null(json_object_get(at.object, "rotary_dim"))) {
            st = spurion_json_error(at, "rotary_dim", "an even number", json_object_get(at.object, "rotary_dim"));
            goto out;
        }
        SPURION_TRY(st, spurion_json_opt_int(&c->rot, at, "rotary_dim", 2, c->head_dim));
    } else {
        SPURION_TRY(st, spurion_json_opt_double(&c->rope_theta, at, "rope_theta|rotary_emb_base", 1e-6, 1e15));
        SPURION_TRY(st, spurion_json_opt_double(&c->rope_theta, rope, "rope_theta", 1e-6, 1e15));
        SPURION_TRY(st, spurion_json_opt_double(&fraction, at, "rotary_pct|partial_rotary_factor", 0, 1));
        SPURION_TRY(st, spurion_json_opt_double(&fraction, rope, "partial_rotary_factor", 0, 1));
        c->rot = (int)(c->head_dim * fraction);
        SPURION_TRY(st, read_rope_type(c, rope, at));
    }
    if (c->rot < 2 || c->rot % 2 != 0 || c->rot > c->head_dim) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: rotary dimensions: expected an even number from 2 to head_dim (%d), found %d",
                           spurion_path_tail(at.name), c->head_dim, c->rot);
        goto out;
    }
    if (fraction != 1 && f->rot_fraction == 1) { /* transformers' class ignores it for plain rope and heeds it for the scaled ones */
        st = spurion_error(SPURION_UNIMPLEMENTED, "%s: partial_rotary_factor: expected 1 for %s, found %g", spurion_path_tail(at.name),
                           f->architecture, fraction);
    }
out:
    json_decref((json_t *)(uintptr_t)empty);
    return st;
}

/* --- attention of each layer --- */

static spurion_status read_layer_types(bool *sliding, bool *said, const spurion_model_config *c, spurion_json_at at)
{
    const json_t *types = spurion_json_find(at, "layer_types");

    *said = types != NULL;
    if (types == NULL) {
        return spurion_ok();
    }
    if (!json_is_array(types) || json_array_size(types) != (size_t)c->layers) {
        char expected[48];

        snprintf(expected, sizeof expected, "a list of %d", c->layers);
        return spurion_json_error(at, "layer_types", expected, types);
    }
    for (int l = 0; l < c->layers; l++) {
        const json_t *item = json_array_get(types, (size_t)l);
        const char *type = json_is_string(item) ? json_string_value(item) : "";

        if (strcmp(type, "full_attention") != 0 && strcmp(type, "sliding_attention") != 0) {
            return spurion_json_error(at, "layer_types", "full_attention or sliding_attention", item);
        }
        sliding[l] = type[0] == 's';
    }
    return spurion_ok();
}

static spurion_status read_windows(spurion_model_config *c, const spurion_family *f, spurion_json_at at)
{
    spurion_status st = spurion_ok();
    bool sliding[SPURION_LAYERS_MAX] = {false}, said = false, used = true;
    int window = f->window_default, upper = 28;
    const json_t *value = json_object_get(at.object, "sliding_window");

    if (f->window == SPURION_WINDOW_NONE) {
        return st;
    }
    if (json_is_null(value)) {
        window = 0;
    } else {
        SPURION_TRY(st, spurion_json_opt_int(&window, at, "sliding_window", 1, CONTEXT_MAX));
    }
    if (f->window == SPURION_WINDOW_UPPER) {
        used = false;
        SPURION_TRY(st, spurion_json_opt_bool(&used, at, "use_sliding_window"));
        SPURION_TRY(st, spurion_json_opt_int(&upper, at, "max_window_layers", 0, INT_MAX));
    }
    SPURION_TRY(st, read_layer_types(sliding, &said, c, at));
    for (int l = 0; l < c->layers; l++) {
        bool here = said ? sliding[l] : f->window == SPURION_WINDOW_ALL || (f->window == SPURION_WINDOW_EVEN && l % 2 == 0) ||
                                            (f->window == SPURION_WINDOW_UPPER && l >= upper);

        if (said && f->window == SPURION_WINDOW_ALL && window > 0 && !here) {
            st = spurion_error(SPURION_UNIMPLEMENTED,
                               "%s: layer_types: expected sliding_attention in every layer of a Mistral model with sliding_window %d, "
                               "found full_attention in layer %d",
                               spurion_path_tail(at.name), window, l);
            goto out;
        }
        c->window[l] = here && used ? window : 0;
    }
out:
    return st;
}

static spurion_status read_attention(spurion_model_config *c, const spurion_family *f, spurion_json_at at)
{
    spurion_status st;
    double scalar = f->softcap > 0 ? 256 : c->head_dim, cap = f->softcap; /* a soft cap: Gemma 2 */
    bool scaled = true, by_layer = false;
    const json_t *value = json_object_get(at.object, "attn_logit_softcapping");

    if (f->softcap > 0) {
        SPURION_TRY(st, spurion_json_opt_double(&scalar, at, "query_pre_attn_scalar", 1e-6, 1e9));
        SPURION_TRY(st, spurion_json_opt_double(&cap, at, "attn_logit_softcapping", 1e-3, 1e9));
        cap = json_is_null(value) ? 0 : cap;
    }
    if (f->qkv == SPURION_QKV_COLUMNS) { /* GPT-2 */
        SPURION_TRY(st, spurion_json_opt_bool(&scaled, at, "scale_attn_weights"));
        SPURION_TRY(st, spurion_json_opt_bool(&by_layer, at, "scale_attn_by_inverse_layer_idx"));
    }
    c->softcap = (float)cap;
    for (int l = 0; l < c->layers; l++) {
        c->attention_scale[l] = (float)((scaled ? 1 / sqrt(scalar) : 1) / (by_layer ? l + 1 : 1));
    }
    SPURION_TRY(st, read_windows(c, f, at));
out:
    return st;
}

/* --- ids --- */

/* A token id: absent is the class's default when the vocabulary holds it, null is none. */
static spurion_status read_id(int32_t *out, int otherwise, const spurion_model_config *c, spurion_json_at at, const char *key)
{
    int id = otherwise < c->vocab ? otherwise : -1;
    spurion_status st;

    if (json_is_null(json_object_get(at.object, key))) {
        id = -1;
    }
    st = spurion_json_opt_int(&id, at, key, -1, INT_MAX);
    *out = id;
    return st;
}

static spurion_status read_ids(spurion_model_config *c, const spurion_family *f, spurion_json_at at)
{
    spurion_status st;
    const json_t *eos = json_object_get(at.object, "eos_token_id");

    SPURION_TRY(st, read_id(&c->bos, f->bos, c, at, "bos_token_id"));
    SPURION_TRY(st, read_id(&c->pad, f->pad, c, at, "pad_token_id"));
    if (json_is_array(eos)) {
        if (json_array_size(eos) > SPURION_EOS_MAX) {
            st = spurion_json_error(at, "eos_token_id", "at most 8 ids", eos);
            goto out;
        }
        for (size_t i = 0; i < json_array_size(eos); i++) {
            const json_t *item = json_array_get(eos, i);

            if (!json_is_integer(item) || json_integer_value(item) < 0 || json_integer_value(item) > INT_MAX) {
                st = spurion_json_error(at, "eos_token_id", "token ids", item);
                goto out;
            }
            c->eos[c->eos_count++] = (int32_t)json_integer_value(item);
        }
    } else {
        SPURION_TRY(st, read_id(&c->eos[0], f->eos, c, at, "eos_token_id"));
        c->eos_count = c->eos[0] >= 0;
    }
out:
    return st;
}

/* --- the whole --- */

static spurion_status find_family(const spurion_family **out, spurion_json_at at)
{
    spurion_status st;
    const json_t *list = spurion_json_find(at, "architectures"), *first = json_array_get(list, 0);
    const char *model_type = "";
    char known[360];

    SPURION_TRY(st, spurion_json_opt_string(&model_type, at, "model_type"));
    if (!json_is_string(first)) {
        st = spurion_json_error(at, "architectures", "a list that begins with a name", list);
        goto out;
    }
    *out = spurion_family_find(json_string_value(first), model_type);
    if (*out == NULL) {
        spurion_family_list(known, sizeof known);
        st = spurion_error(SPURION_UNIMPLEMENTED, "config.json: architectures: expected one of %s, found \"%.80s\"", known,
                           json_string_value(first));
    }
out:
    return st;
}

spurion_status spurion_model_config_parse(spurion_model_config *out, bool *outputs_said, const char *text, size_t bytes, const char *name)
{
    spurion_status st;
    json_t *root = NULL;
    const spurion_family *f = NULL;
    spurion_json_at at;

    memset(out, 0, sizeof *out);
    SPURION_TRY(st, spurion_json_parse(&root, text, bytes, name));
    at = (spurion_json_at){root, name};
    if (!json_is_object(root)) {
        st = spurion_json_error(at, "the file", "an object", root);
        goto out;
    }
    SPURION_TRY(st, find_family(&f, at));
    snprintf(out->architecture, sizeof out->architecture, "%s", f->architecture);
    SPURION_TRY(st, read_sizes(out, f, at));
    SPURION_TRY(st, read_block(out, f, at));
    out->embed_scale = f->embed_scaled ? (float)sqrt(out->hidden) : 1;
    SPURION_TRY(st, read_rope(out, f, at));
    SPURION_TRY(st, read_attention(out, f, at));
    SPURION_TRY(st, spurion_head_read(out, outputs_said, at));
    SPURION_TRY(st, read_ids(out, f, at));
out:
    json_decref(root);
    return st;
}

spurion_status spurion_model_config_read(spurion_model_config *out, const char *dir)
{
    spurion_status st;
    bool outputs_said = false;
    char path[PATH_MAX], *text = NULL;
    size_t bytes = 0;
    spurion_shards *shards = NULL;

    memset(out, 0, sizeof *out);
    SPURION_TRY(st, spurion_path_join(path, sizeof path, dir, "config.json"));
    SPURION_TRY(st, spurion_file_read(&text, &bytes, path, SPURION_JSON_CONFIG_BYTES_MAX));
    SPURION_TRY(st, spurion_model_config_parse(out, &outputs_said, text, bytes, path));
    st = spurion_shards_open(&shards, dir);
    st = st.code == SPURION_OK ? spurion_head_find(out, outputs_said, shards, dir) : spurion_ok();
out:
    spurion_shards_close(shards);
    free(text);
    return st;
}

/* --- rotary table --- */

/* transformers computes frequencies and angles in float32 (modeling_rope_utils.py): so do we, step by step; cos and sin of that
 * angle are taken in double, so the table is the one they round to. */
static float frequency(const spurion_model_config *c, int k)
{
    float exponent = (float)(2 * k) / (float)c->rot;
    float f = 1.0f / (float)pow(c->rope_theta, exponent);
    float factor = (float)c->rope_factor, low = (float)c->rope_low, high = (float)c->rope_high, original = (float)c->rope_original;

    if (c->rope_scaling == SPURION_ROPE_LINEAR) {
        return f / factor;
    }
    if (c->rope_scaling == SPURION_ROPE_LLAMA3) {
        float wave = (float)(2 * 3.14159265358979323846) / f;
        float scaled = wave > original / low ? f / factor : f;

        if (wave >= original / high && wave <= original / low) {
            float smooth = (original / wave - low) / (high - low);

            return (1 - smooth) * scaled / factor + smooth * scaled;
        }
        return scaled;
    }
    return f;
}

void spurion_model_rope_table(float *out, const spurion_model_config *c, int position_count)
{
    int half = c->rot / 2;

    for (int k = 0; k < half; k++) {
        float f = frequency(c, k);

        for (int p = 0; p < position_count; p++) {
            float angle = (float)p * f;

            out[2 * ((size_t)p * (size_t)half + (size_t)k)] = (float)cos(angle);
            out[2 * ((size_t)p * (size_t)half + (size_t)k) + 1] = (float)sin(angle);
        }
    }
}

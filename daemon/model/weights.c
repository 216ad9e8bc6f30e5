/* A checkpoint's tensors by role. Thread: one, and one more for the digest. Memory: the shards' index and, for transposed or fused tensors, one
 * staging tensor. */
#include "daemon/model/weights.h"

#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/check.h"
#include "daemon/base/json.h"
#include "daemon/base/sha256.h"
#include "daemon/model/families.h"
#include "daemon/model/head.h"
#include "daemon/model/safetensors.h"

#define NAME_BYTES 192

struct spurion_weights {
    spurion_model_config config;
    const spurion_family *family;
    char prefix[64]; /* what stands before the base model's names in this file */
    spurion_shards *shards;
    int vocab;
    float *stage; /* one stored tensor */
    size_t stage_elements;

    pthread_t digester; /* between digest_begin and digest, or close */
    bool digesting;
    atomic_bool digest_unwanted;
    unsigned char digest[32];
    spurion_status digest_status;
};

/* --- what a config asks for --- */

typedef struct role_shape {
    int64_t rows, columns; /* canonical; columns 0: a vector */
    int layers;            /* how many of it: blocks, layers of the head, or 1 */
    bool wanted;
} role_shape;

static role_shape head_shape(const spurion_model_config *c, spurion_role role, int layer)
{
    const spurion_head *h = &c->head;
    const bool last = layer >= h->hidden;
    const int64_t rows = last ? c->outputs : h->width[layer], columns = layer > 0 && layer <= h->hidden ? h->width[layer - 1] : c->hidden;

    switch (role) {
    case SPURION_ROLE_SCORE: return (role_shape){rows, columns, h->hidden + 1, true};
    case SPURION_ROLE_SCORE_B: return (role_shape){rows, 0, h->hidden + 1, last ? h->bias : h->hidden_bias};
    case SPURION_ROLE_SCORE_MEAN: return (role_shape){c->outputs, 0, 1, h->centre};
    default: return (role_shape){c->outputs, 0, 1, h->rescale};
    }
}

static role_shape role_shape_of(const spurion_model_config *c, spurion_role role, int layer)
{
    const bool layer_norm = c->norm == SPURION_NORM_LAYER;
    const int n = c->layers;
    const int64_t d = c->hidden, q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim, ff = c->ff;

    switch (role) {
    case SPURION_ROLE_EMBED: return (role_shape){c->vocab, d, 1, true};
    case SPURION_ROLE_POSITION: return (role_shape){c->context, d, 1, c->position_table};
    case SPURION_ROLE_NORM1_W: return (role_shape){d, 0, n, true};
    case SPURION_ROLE_NORM1_B: return (role_shape){d, 0, n, layer_norm};
    case SPURION_ROLE_NORM2_W: return (role_shape){d, 0, n, !c->shared_norm};
    case SPURION_ROLE_NORM2_B: return (role_shape){d, 0, n, layer_norm && !c->shared_norm};
    case SPURION_ROLE_POST_ATTENTION_W:
    case SPURION_ROLE_POST_MLP_W: return (role_shape){d, 0, n, c->post_norms};
    case SPURION_ROLE_Q: return (role_shape){q, d, n, true};
    case SPURION_ROLE_Q_B: return (role_shape){q, 0, n, c->bias_q};
    case SPURION_ROLE_K:
    case SPURION_ROLE_V: return (role_shape){kv, d, n, true};
    case SPURION_ROLE_K_B:
    case SPURION_ROLE_V_B: return (role_shape){kv, 0, n, c->bias_kv};
    case SPURION_ROLE_O: return (role_shape){d, q, n, true};
    case SPURION_ROLE_O_B: return (role_shape){d, 0, n, c->bias_o};
    case SPURION_ROLE_Q_NORM:
    case SPURION_ROLE_K_NORM: return (role_shape){c->head_dim, 0, n, c->qk_norm};
    case SPURION_ROLE_GATE: return (role_shape){ff, d, n, c->gated};
    case SPURION_ROLE_UP: return (role_shape){ff, d, n, true};
    case SPURION_ROLE_GATE_B: return (role_shape){ff, 0, n, c->gated && c->bias_mlp};
    case SPURION_ROLE_UP_B: return (role_shape){ff, 0, n, c->bias_mlp};
    case SPURION_ROLE_DOWN: return (role_shape){d, ff, n, true};
    case SPURION_ROLE_DOWN_B: return (role_shape){d, 0, n, c->bias_mlp};
    case SPURION_ROLE_FINAL_W: return (role_shape){d, 0, 1, true};
    case SPURION_ROLE_FINAL_B: return (role_shape){d, 0, 1, layer_norm};
    case SPURION_ROLE_SCORE:
    case SPURION_ROLE_SCORE_B:
    case SPURION_ROLE_SCORE_MEAN:
    case SPURION_ROLE_SCORE_VAR: return head_shape(c, role, layer);
    case SPURION_ROLE_COUNT: break;
    }
    return (role_shape){0, 0, 0, false};
}

/* --- how a family stores it --- */

static bool is_qkv(spurion_role role)
{
    return role >= SPURION_ROLE_Q && role <= SPURION_ROLE_V_B;
}

static int qkv_part(spurion_role role)
{
    return ((int)role - SPURION_ROLE_Q) / 2; /* Q, Q_B, K, K_B, V, V_B follow each other */
}

static bool is_fused(const spurion_weights *w, spurion_role role)
{
    return is_qkv(role) && w->family->qkv != SPURION_QKV_APART;
}

static bool is_transposed(const spurion_weights *w, spurion_role role)
{
    return w->family->conv1d && (role == SPURION_ROLE_Q || role == SPURION_ROLE_K || role == SPURION_ROLE_V || role == SPURION_ROLE_O ||
                                 role == SPURION_ROLE_UP || role == SPURION_ROLE_DOWN);
}

/* Replaces "{}" by the layer. */
static void tensor_name(char *out, const char *prefix, const char *pattern, int layer)
{
    const char *hole = strstr(pattern, "{}");

    if (hole == NULL) {
        snprintf(out, NAME_BYTES, "%s%s", prefix, pattern);
    } else {
        snprintf(out, NAME_BYTES, "%s%.*s%d%s", prefix, (int)(hole - pattern), pattern, layer, hole + 2);
    }
}

/* The stored tensor of a role; NULL when the file has none. name: what it should be called. */
static const spurion_tensor_info *find_tensor(const spurion_safetensors **file, char *name, const spurion_weights *w, spurion_role role,
                                              int layer)
{
    const char *pattern = w->family->names[role];

    *file = NULL;
    if (role == SPURION_ROLE_SCORE || role == SPURION_ROLE_SCORE_B) {
        spurion_head_tensor(name, &w->config.head, layer, role == SPURION_ROLE_SCORE ? "weight" : "bias");
    } else if (role == SPURION_ROLE_SCORE_MEAN || role == SPURION_ROLE_SCORE_VAR) {
        snprintf(name, NAME_BYTES, "normalizer.%s", role == SPURION_ROLE_SCORE_MEAN ? "mean" : "var");
    } else if (pattern == NULL) {
        name[0] = '\0';
        return NULL;
    } else {
        tensor_name(name, w->prefix, pattern, layer);
    }
    return spurion_shards_find(file, w->shards, name);
}

/* What stands before the base model's names: the family's own prefix; nothing, in files of the base model; a wrapper's attribute
 * (TRL and GRM keep the language model whole, trlx and DeepSpeed call the base model transformer). Found by the embedding. */
static void find_prefix(spurion_weights *w)
{
    static const char *const wrapped[] = {"%s", "", "model.%s", "pretrained_model.%s", "transformer.", "rwtransformer."};
    const spurion_safetensors *file;
    char name[NAME_BYTES];

    for (size_t i = 0; i < sizeof wrapped / sizeof *wrapped; i++) {
        const char *hole = strchr(wrapped[i], '%');

        snprintf(w->prefix, sizeof w->prefix, "%.*s%s", (int)(hole ? hole - wrapped[i] : (long)strlen(wrapped[i])), wrapped[i],
                 hole ? w->family->prefix : "");
        tensor_name(name, w->prefix, w->family->names[SPURION_ROLE_EMBED], 0);
        if (spurion_shards_find(&file, w->shards, name) != NULL) {
            return;
        }
    }
    snprintf(w->prefix, sizeof w->prefix, "%s", w->family->prefix); /* for the message */
}

/* --- opening --- */

static spurion_status check_shape(const spurion_weights *w, spurion_role role, role_shape s, const spurion_tensor_info *t,
                                  const spurion_safetensors *file)
{
    uint64_t rows = (uint64_t)s.rows * (is_fused(w, role) ? 3 : 1), columns = (uint64_t)s.columns;
    uint64_t first = is_transposed(w, role) ? columns : rows, second = is_transposed(w, role) ? rows : columns;
    bool right = t->rank == (s.columns > 0 ? 2 : 1) && (s.columns == 0 || t->shape[1] == second) &&
                 (t->shape[0] == first || (role == SPURION_ROLE_EMBED && t->shape[0] >= 1 && t->shape[0] <= INT_MAX));
    char found[128], expected[64];

    if (right) {
        return spurion_ok();
    }
    spurion_tensor_shape_text(found, sizeof found, t);
    if (s.columns > 0) {
        snprintf(expected, sizeof expected, "(%llu, %llu)", (unsigned long long)first, (unsigned long long)second);
    } else {
        snprintf(expected, sizeof expected, "(%llu)", (unsigned long long)first);
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s: %s: expected shape %s as config.json says, found %s",
                         spurion_path_tail(spurion_safetensors_path(file)), t->name, expected, found);
}

static bool readable(spurion_tensor_dtype t)
{
    return t == SPURION_TENSOR_F32 || t == SPURION_TENSOR_F16 || t == SPURION_TENSOR_BF16 || t == SPURION_TENSOR_F64;
}

static spurion_status check_role(spurion_weights *w, spurion_role role, int layer, role_shape s, const char *dir)
{
    spurion_status st;
    char name[NAME_BYTES];
    const spurion_safetensors *file;
    const spurion_tensor_info *t = find_tensor(&file, name, w, role, layer);

    if (t == NULL) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected the tensor %s, found none", spurion_path_tail(dir), name);
    }
    if (!readable(t->dtype)) {
        return spurion_error(SPURION_UNIMPLEMENTED, "%s: %s: expected dtype F32, F16, BF16 or F64, found %s",
                             spurion_path_tail(spurion_safetensors_path(file)), t->name, spurion_tensor_dtype_name(t->dtype));
    }
    st = check_shape(w, role, s, t, file);
    if (st.code == SPURION_OK && (is_fused(w, role) || is_transposed(w, role)) && t->elements > w->stage_elements) {
        w->stage_elements = (size_t)t->elements;
    }
    if (st.code == SPURION_OK && role == SPURION_ROLE_EMBED) {
        w->vocab = (int)t->shape[0];
    }
    return st;
}

static spurion_status check_all(spurion_weights *w, const char *dir)
{
    spurion_status st = spurion_ok();

    for (int r = 0; r < SPURION_ROLE_COUNT; r++) {
        for (int l = 0; l < role_shape_of(&w->config, (spurion_role)r, 0).layers; l++) {
            role_shape s = role_shape_of(&w->config, (spurion_role)r, l);

            if (s.wanted) {
                SPURION_TRY(st, check_role(w, (spurion_role)r, l, s, dir));
            }
        }
    }
out:
    return st;
}

spurion_status spurion_weights_open(spurion_weights **out, const char *dir, const spurion_model_config *config)
{
    spurion_status st;
    spurion_weights *w = calloc(1, sizeof *w);

    *out = NULL;
    if (w == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: no memory to open it", spurion_path_tail(dir));
    }
    w->config = *config;
    w->family = spurion_family_find(config->architecture, "");
    SPURION_ASSERT(w->family != NULL);
    SPURION_TRY(st, spurion_shards_open(&w->shards, dir));
    find_prefix(w);
    SPURION_TRY(st, check_all(w, dir));
    *out = w;
    w = NULL;
out:
    spurion_weights_close(w);
    return st;
}

void spurion_weights_close(spurion_weights *w)
{
    if (w == NULL) {
        return;
    }
    if (w->digesting) {
        atomic_store(&w->digest_unwanted, true);
        pthread_join(w->digester, NULL);
    }
    spurion_shards_close(w->shards);
    free(w->stage);
    free(w);
}

int spurion_weights_vocab(const spurion_weights *w)
{
    return w->vocab;
}

bool spurion_weights_has(const spurion_weights *w, spurion_role role, int layer)
{
    role_shape s = role_shape_of(&w->config, role, layer);

    return s.wanted && layer >= 0 && layer < s.layers;
}

size_t spurion_weights_elements(const spurion_weights *w, spurion_role role, int layer)
{
    role_shape s = role_shape_of(&w->config, role, layer);

    if (!spurion_weights_has(w, role, layer)) {
        return 0;
    }
    if (role == SPURION_ROLE_EMBED) {
        s.rows = w->vocab;
    }
    return (size_t)s.rows * (size_t)(s.columns > 0 ? s.columns : 1);
}

/* --- reading --- */

/* Copies the role's part of the staged tensor: row r of the role is row source(r) of the stored matrix [out, in]. */
static void unpack(float *out, const spurion_weights *w, spurion_role role, role_shape s)
{
    const int64_t rows = s.rows, columns = s.columns > 0 ? s.columns : 1, all_rows = rows * (is_fused(w, role) ? 3 : 1);
    const int64_t hd = w->config.head_dim;

    for (int64_t r = 0; r < rows; r++) {
        int64_t source = r;

        if (is_fused(w, role)) {
            source = w->family->qkv == SPURION_QKV_HEADS ? (r / hd * 3 + qkv_part(role)) * hd + r % hd : qkv_part(role) * rows + r;
        }
        if (is_transposed(w, role)) {
            for (int64_t c = 0; c < columns; c++) {
                out[r * columns + c] = w->stage[c * all_rows + source];
            }
        } else {
            memcpy(out + r * columns, w->stage + source * columns, (size_t)columns * sizeof *out);
        }
    }
}

static bool is_rms_weight(spurion_role role)
{
    return role == SPURION_ROLE_NORM1_W || role == SPURION_ROLE_NORM2_W || role == SPURION_ROLE_POST_ATTENTION_W ||
           role == SPURION_ROLE_POST_MLP_W || role == SPURION_ROLE_FINAL_W;
}

static spurion_status read_stage(spurion_weights *w, const spurion_safetensors *file, const spurion_tensor_info *t)
{
    if (w->stage == NULL) {
        w->stage = malloc(w->stage_elements * sizeof *w->stage);
    }
    if (w->stage == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory to stage %s", t->name);
    }
    return spurion_safetensors_read(w->stage, file, t, 0, t->elements);
}

spurion_status spurion_weights_read(float *out, spurion_weights *w, spurion_role role, int layer)
{
    spurion_status st;
    char name[NAME_BYTES];
    const spurion_safetensors *file;
    const spurion_tensor_info *t = find_tensor(&file, name, w, role, layer);
    size_t elements = spurion_weights_elements(w, role, layer);

    SPURION_ASSERT(t != NULL && elements > 0); /* asked for what spurion_weights_has denies */
    if (is_fused(w, role) || is_transposed(w, role)) {
        SPURION_TRY(st, read_stage(w, file, t));
        unpack(out, w, role, role_shape_of(&w->config, role, layer));
    } else {
        SPURION_TRY(st, spurion_safetensors_read(out, file, t, 0, t->elements));
    }
    SPURION_TRY(st, spurion_check_finite(out, elements, t->name, spurion_safetensors_path(file)));
    if (w->config.norm_plus_one && is_rms_weight(role)) {
        for (size_t i = 0; i < elements; i++) {
            out[i] += 1;
        }
    }
out:
    return st;
}

/* --- the digest --- */

static spurion_status digest_make(spurion_weights *w)
{
    spurion_status st;
    spurion_sha256 h = {NULL};

    SPURION_TRY(st, spurion_sha256_init(&h));
    for (int i = 0; i < spurion_shards_count(w->shards); i++) {
        SPURION_TRY(st, spurion_safetensors_hash(&h, spurion_shards_at(w->shards, i), &w->digest_unwanted));
    }
    SPURION_TRY(st, spurion_sha256_finish(w->digest, &h));
out:
    spurion_sha256_fini(&h);
    return st;
}

static void *digester_main(void *arg)
{
    spurion_weights *w = arg;
    w->digest_status = digest_make(w);
    return NULL;
}

spurion_status spurion_weights_digest_begin(spurion_weights *w)
{
    SPURION_ASSERT(!w->digesting);
    w->digesting = pthread_create(&w->digester, NULL, digester_main, w) == 0;
    return w->digesting ? spurion_ok() : spurion_error(SPURION_RESOURCE_EXHAUSTED, "no thread for the digest of the weights");
}

spurion_status spurion_weights_digest(unsigned char out[32], spurion_weights *w)
{
    spurion_status st = spurion_ok();

    if (!w->digesting) {
        SPURION_TRY(st, spurion_weights_digest_begin(w));
    }
    pthread_join(w->digester, NULL);
    w->digesting = false;
    st = w->digest_status;
    memcpy(out, w->digest, sizeof w->digest);
out:
    return st;
}

/* The score head of a reward model: which tensors hold it, in what form, and how their names say so (formats.md 6.1). Every head is a
 * chain of linear layers, ReLU between them, over the pooled final norm; most are one row. Thread: any. Memory: none kept. */
#ifndef SPURION_MODEL_HEAD_H
#define SPURION_MODEL_HEAD_H

#include "daemon/base/json.h"
#include "daemon/model/config.h"
#include "daemon/model/safetensors.h"
#include "spurion/status.h"

#define SPURION_HEAD_NAME_BYTES 96

/* What config.json says of head and pooling: value_head_prefix, the number of outputs, normalisation, OpenAssistant's pooling.
 * *outputs_said: the number of outputs is config.json's, not a default. */
spurion_status spurion_head_read(spurion_model_config *c, bool *outputs_said, spurion_json_at config) SPURION_MUST_USE;

/* Finds the head among the checkpoint's tensors and completes c->head and c->outputs. INVALID_ARGUMENT when there is none, when the one
 * that config.json names is missing, or when several stand there; UNIMPLEMENTED for gated and quantile heads. */
spurion_status spurion_head_find(spurion_model_config *c, bool outputs_said, const spurion_shards *shards, const char *dir) SPURION_MUST_USE;

/* Tensor of layer `layer` (0 .. head.hidden; the last gives the outputs): "score.weight", "v_head.summary.2.bias". */
void spurion_head_tensor(char out[SPURION_HEAD_NAME_BYTES], const spurion_head *head, int layer, const char *what);

/* The law by which trainers draw a new head that these numbers cannot be told from, in words; NULL: none, or fewer than 64 numbers. A fresh
 * head is found in some 99 cases of 100; a trained one only where training left its numbers as they were drawn. So this warns, and refuses
 * nothing. w (count) = the last layer's (outputs, width); bias (outputs), zeros where there is none. */
const char *spurion_head_fresh(const spurion_head *head, const float *w, size_t count, size_t width, const float *bias, size_t outputs);

#endif

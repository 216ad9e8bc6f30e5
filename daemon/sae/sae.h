/* An SAE on the device: the dictionary, its watched part, the sets to remove, and the buffers of a pass.
 * Thread: the engine's. Memory: weights and buffers at create. */
#ifndef SPURION_SAE_H
#define SPURION_SAE_H

#include "daemon/catalogue.h"
#include "daemon/model/config.h"
#include "daemon/sae/sae_file.h"
#include "spurion/ops.h"

typedef struct spurion_sae {
    const char *id;
    spurion_hook hook;
    int point;                   /* of the residual stream (model.h): 4 * layer + site */
    char hook_name[64];
    char format[32], architecture[32], notes[512];
    unsigned char digest[32];
    spurion_dev *dev;
    spurion_sae_weights full;    /* the whole dictionary */
    bool watches;                /* some of its features are catalogued as spurious */
    spurion_sae_weights watched; /* their rows, ascending; F 0 when there are none, and for group maxima (the whole is encoded then) */
    const int32_t *member;       /* (watched.F) device: their indices in full */
    spurion_sae_sets sets;       /* device: catalogue sets, then one per catalogue entry */
    bool *set_touches;           /* (set_count + entry_count): some member is of this SAE */
    spurion_sparse clean;        /* (rows): features of the clean run's completion rows */
    spurion_sparse live;         /* (rows): features of a variant under way */
    float *attribution;          /* (rows, slots) device, or NULL */
    float *xg, *bg;              /* (rows) device: <x, g>, <b, g> */
    void *scratch;               /* of the encoder */
    size_t bytes;                /* device memory of weights; of buffers */
    size_t buffer_bytes;
} spurion_sae;

/* Point of a hook in a model of `layers` blocks: the output of block L is the input of block L + 1. */
int spurion_hook_point(spurion_hook hook);
/* INVALID_ARGUMENT unless the hook exists in this model: layer below config->layers; no resid_mid in parallel blocks. */
spurion_status spurion_hook_check(spurion_hook hook, const char *name, const spurion_model_config *config) SPURION_MUST_USE;

/* Active features that a row may have at most: k, or a limit that keeps rows * slots bounded. */
int spurion_sae_slots(spurion_sae_kind kind, int k, int F, int rows);

/* Puts a dictionary on the device. file is read and may be freed afterwards. dtype: of the encoder's products. */
spurion_status spurion_sae_create(spurion_sae **out, spurion_dev *dev, const spurion_sae_file *file, const char *id, spurion_hook hook,
                                  spurion_dtype dtype) SPURION_MUST_USE;
/* Adds the catalogue's part: watched rows and sets of SAE number `place`. */
spurion_status spurion_sae_watch(spurion_sae *s, const spurion_sae_file *file, const spurion_catalogue *catalogue, int place,
                                 spurion_dtype dtype) SPURION_MUST_USE;
/* Takes the buffers for passes of `rows` rows. Bytes of it beforehand: spurion_sae_buffer_bytes. */
spurion_status spurion_sae_reserve(spurion_sae *s, int rows, bool gradients, bool variants) SPURION_MUST_USE;
size_t spurion_sae_buffer_bytes(const spurion_sae *s, int rows, bool gradients, bool variants);
void spurion_sae_destroy(spurion_sae *s);

/* The watched features of x (the whole dictionary where there is no watched part), into s->live. */
spurion_status spurion_sae_encode_live(spurion_sae *s, const float *x, int rows) SPURION_MUST_USE;

#endif

/* safetensors files: strict header check (formats.md 7.1, reliability.md 8.3), then reads by pread into the caller's memory.
 * Nothing is mapped: a file truncated under us is DATA_LOSS, not SIGBUS. Thread: one owner at a time.
 * Memory: the index (bounded by a small multiple of the header's own size) and one staging buffer while reading. */
#ifndef SPURION_MODEL_SAFETENSORS_H
#define SPURION_MODEL_SAFETENSORS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/base/sha256.h"
#include "spurion/status.h"

#define SPURION_TENSOR_HEADER_BYTES_MAX (16u << 20)
#define SPURION_TENSOR_COUNT_MAX 100000
#define SPURION_TENSOR_NAME_BYTES_MAX 256
#define SPURION_TENSOR_RANK_MAX 8
#define SPURION_SHARD_COUNT_MAX 512

typedef enum spurion_tensor_dtype {
    SPURION_TENSOR_BOOL, SPURION_TENSOR_F4, SPURION_TENSOR_F6_E2M3, SPURION_TENSOR_F6_E3M2, SPURION_TENSOR_U8, SPURION_TENSOR_I8,
    SPURION_TENSOR_F8_E5M2, SPURION_TENSOR_F8_E4M3, SPURION_TENSOR_F8_E8M0, SPURION_TENSOR_F8_E4M3FNUZ, SPURION_TENSOR_F8_E5M2FNUZ,
    SPURION_TENSOR_I16, SPURION_TENSOR_U16, SPURION_TENSOR_F16, SPURION_TENSOR_BF16, SPURION_TENSOR_I32, SPURION_TENSOR_U32,
    SPURION_TENSOR_F32, SPURION_TENSOR_C64, SPURION_TENSOR_F64, SPURION_TENSOR_I64, SPURION_TENSOR_U64,
    SPURION_TENSOR_DTYPE_COUNT
} spurion_tensor_dtype;

typedef struct spurion_tensor_info {
    const char *name;
    spurion_tensor_dtype dtype;
    int rank;
    uint64_t shape[SPURION_TENSOR_RANK_MAX];
    uint64_t elements;
    uint64_t begin, end; /* bytes, from the start of the data */
    bool column_major;   /* of an npz: the first index runs fastest; never in safetensors */
} spurion_tensor_info;

typedef struct spurion_tensor_note { /* an entry of __metadata__ */
    const char *key, *value;
} spurion_tensor_note;

typedef struct spurion_safetensors spurion_safetensors;

/* Opens a regular file (a symbolic link to one is followed once) and checks all of its header.
 * NOT_FOUND, INVALID_ARGUMENT (message names expected and found), DATA_LOSS when the file is shorter than its header says. */
spurion_status spurion_safetensors_open(spurion_safetensors **out, const char *path) SPURION_MUST_USE;
/* Opens an npz file (npz.h): its arrays are the tensors. Errors as above. */
spurion_status spurion_safetensors_open_npz(spurion_safetensors **out, const char *path) SPURION_MUST_USE;
/* Checks the JSON of a header as if it stood in a file of file_bytes bytes. What it gives can be looked at, not read. */
spurion_status spurion_safetensors_parse(spurion_safetensors **out, const char *header, size_t header_bytes, uint64_t file_bytes,
                                         const char *name) SPURION_MUST_USE;
void spurion_safetensors_close(spurion_safetensors *s);

int spurion_safetensors_count(const spurion_safetensors *s);
/* In the order of names. Borrowed. */
const spurion_tensor_info *spurion_safetensors_at(const spurion_safetensors *s, int i);
const spurion_tensor_info *spurion_safetensors_find(const spurion_safetensors *s, const char *name);
/* A value of __metadata__, or NULL. */
const char *spurion_safetensors_note(const spurion_safetensors *s, const char *key);
const char *spurion_safetensors_path(const spurion_safetensors *s);

/* Reads `count` elements from element `first` on, as f32 (F32, F16, BF16, F64, I32, I64). DATA_LOSS when the file is short;
 * UNIMPLEMENTED for another dtype. Not checked for NaN. */
spurion_status spurion_safetensors_read(float *out, const spurion_safetensors *s, const spurion_tensor_info *t, uint64_t first,
                                        uint64_t count) SPURION_MUST_USE;
/* Adds all data bytes of the file to the hash. DATA_LOSS where an npz holds other bytes than its checksums say.
 * Another thread may read tensors of a safetensors file meanwhile, and end this by *stop (or NULL): CANCELLED. */
spurion_status spurion_safetensors_hash(spurion_sha256 *h, const spurion_safetensors *s, const atomic_bool *stop) SPURION_MUST_USE;

/* INVALID_ARGUMENT naming the first element that is NaN or infinite. what: the tensor's name, where: the file. */
spurion_status spurion_check_finite(const float *x, size_t count, const char *what, const char *where) SPURION_MUST_USE;
const char *spurion_tensor_dtype_name(spurion_tensor_dtype t);
int spurion_tensor_dtype_bits(spurion_tensor_dtype t);
/* Writes "(3, 4)". */
void spurion_tensor_shape_text(char *out, size_t bytes, const spurion_tensor_info *t);

/* The tensors of a checkpoint directory: model.safetensors, or model.safetensors.index.json with its shards, or the same names with
 * pytorch_model as spurion-convert writes them; and value_head.safetensors beside them. */
typedef struct spurion_shards spurion_shards;

/* NOT_FOUND when the directory holds none of these; FAILED_PRECONDITION naming spurion-convert when it holds pickles only. */
spurion_status spurion_shards_open(spurion_shards **out, const char *dir) SPURION_MUST_USE;
/* Checks the JSON of a shard index as spurion_shards_open does before it opens a file: how many files and tensors it names. */
spurion_status spurion_shards_index_check(int *files, int *tensors, const char *text, size_t bytes, const char *name) SPURION_MUST_USE;
void spurion_shards_close(spurion_shards *s);
/* The tensor and its file, or NULL. Borrowed. */
const spurion_tensor_info *spurion_shards_find(const spurion_safetensors **file, const spurion_shards *s, const char *name);
int spurion_shards_count(const spurion_shards *s);
const spurion_safetensors *spurion_shards_at(const spurion_shards *s, int i); /* in the order of file names */

#endif

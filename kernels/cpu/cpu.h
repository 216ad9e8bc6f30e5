/* Inside of the CPU backend: the device, its products, and how op files are named.
 * Op files (norm.c, attention.c, ...) are compiled once per instruction set: portable, avx2, avx512. Each makes its own whole
 * table of ops; the device takes one at start, so nothing dispatches inside an op. Thread: engine, and the pool's workers. */
#ifndef SPURION_CPU_H
#define SPURION_CPU_H

#include <stdbool.h>

#include "kernels/cpu/pool.h"
#include "spurion/ops.h"

enum {
    SPURION_LIBRARY_ROWS = 64, /* rows of one oneDNN product: fixed, so that a row cannot depend on T */
    SPURION_AMX_TILE_ROWS = 128, /* rows of one item of our own product, whose rows never see each other */
    SPURION_INPUT_ROWS = 256, /* rows of input that fit a worker's scratch */
    SPURION_KEY_BLOCK = 64, /* keys of one attention block, counted from position 0 */
    SPURION_HEAD_DIM_MAX = 256
};

typedef enum spurion_cpu_isa {
    SPURION_ISA_PORTABLE = 0,
    SPURION_ISA_AVX2 = 1,
    SPURION_ISA_AVX512 = 2,
    SPURION_ISA_COUNT
} spurion_cpu_isa;

typedef struct spurion_products spurion_products; /* matrix.c: everything that oneDNN gives */

typedef struct spurion_cpu {
    spurion_dev dev; /* first */
    spurion_pool *pool;
    spurion_products *products;
    spurion_cpu_isa isa;
    bool amx;            /* AMX-BF16 tiles may be used */
    /* Products for attention in bf16, its queries in lanes (amx.h); NULL: this processor multiplies no bf16, attention works in f32. */
    void (*multiply_pairs)(float *c, size_t c_stride, const uint16_t *a, size_t a_stride, const uint16_t *b, int rows, int columns, int inner,
                           bool accumulate);
    char **scratch;      /* (workers) 64-byte aligned, scratch_bytes each; valid inside one op */
    size_t scratch_bytes;
} spurion_cpu;

static inline spurion_cpu *spurion_cpu_of(spurion_dev *dev)
{
    return (spurion_cpu *)dev;
}

static inline size_t spurion_round_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

/* Grows every worker's scratch to at least bytes. Between ops only. */
spurion_status spurion_cpu_scratch(spurion_cpu *cpu, size_t bytes) SPURION_MUST_USE;

double spurion_cpu_now(void);
/* Adds one call, begun at time `start`, to the profile. */
void spurion_cpu_count(spurion_dev *dev, spurion_op_class class_, double start, double flops, double bytes);

/* --- matrix products (matrix.c) --- */

/* One direction of a matrix: out (outputs) from an input of length `inner`; outputs are cut into chunks of fixed size. */
typedef struct spurion_product {
    int outputs, inner;
    int chunk, chunk_count;      /* outputs per chunk (the last may hold fewer) */
    int tile_rows;               /* rows of one tile */
    int input_stride;            /* elements of a row of input that lies in scratch */
    bool amx;                    /* our own product on AMX; else oneDNN's */
    struct spurion_plan *full, *last; /* oneDNN */
    void **weights;              /* (chunk_count) oneDNN memory objects over packed */
    char *packed;
} spurion_product;

/* Rows of input that a product can read. */
typedef struct spurion_input {
    const void *rows;
    size_t stride; /* elements */
    int count;
} spurion_input;

struct spurion_matrix {
    int N, K;
    spurion_dtype dtype;         /* of the inputs */
    bool widen;                  /* bf16 values kept and multiplied as f32: this CPU has no bf16 product */
    float *bias;                 /* (N) or NULL */
    spurion_product forward, backward; /* outputs 0: direction not made */
    /* SPURION_SELECT where bf16 products are much faster: forward is bf16, and exact values come from the rows (sae_screen.h) */
    float *rows;                 /* (N, K) f32, or NULL */
    float *row_norm, *row_loss;  /* (N): length of a row, and of what rounding to bf16 takes from it; rounded up */
};

spurion_status spurion_products_create(spurion_products **out, spurion_cpu *cpu) SPURION_MUST_USE;
void spurion_products_destroy(spurion_products *p);
/* AMX is there, allowed, and not switched off by DNNL_MAX_CPU_ISA or SPURION_CPU_AMX=0. Before workers start. */
bool spurion_products_amx(void);
/* AVX512-BF16 is there, and not switched off by DNNL_MAX_CPU_ISA. */
bool spurion_products_avx512_bf16(void);
const char *spurion_products_isa(const spurion_products *p); /* "avx512_core_amx" */

/* Bytes of a worker's scratch that the product takes from its beginning; what lies above is the caller's. */
size_t spurion_product_scratch(const spurion_matrix *m, const spurion_product *p);

/* The type of an input in scratch: f32 also for bf16 values that are multiplied as f32. */
spurion_dtype spurion_product_type(const spurion_matrix *m);
/* Input of one tile: x itself where the product can read it in place, else a padded copy in the worker's scratch. */
spurion_input spurion_product_input(spurion_cpu *cpu, const spurion_matrix *m, const spurion_product *p, const void *x, int rows, int worker);
/* Readies the calling thread for products, and gives it back. */
void spurion_product_begin(const spurion_cpu *cpu, const spurion_product *p);
void spurion_product_end(const spurion_product *p);
/* tile (tile rows, chunk size) f32 = input . weights of one chunk; gives the tile, in the worker's scratch, and its stride,
 * or NULL when the library failed. At most tile_rows rows. */
float *spurion_product_tile(size_t *stride, spurion_cpu *cpu, const spurion_product *p, spurion_input input, int chunk, int worker);
/* Our own product straight to its place; p->amx only. bias: of all outputs, or NULL. */
void spurion_product_write(float *out, size_t out_stride, const spurion_product *p, spurion_input input, const float *bias, int chunk,
                           spurion_write mode);

static inline int spurion_product_chunk_size(const spurion_product *p, int chunk)
{
    int left = p->outputs - chunk * p->chunk;
    return left < p->chunk ? left : p->chunk;
}

spurion_status spurion_cpu_matrix_create(spurion_dev *dev, spurion_matrix **out, const float *w, const float *bias, int N, int K,
                                         int directions, spurion_dtype dtype);
void spurion_cpu_matrix_destroy(spurion_dev *dev, spurion_matrix *m);
size_t spurion_cpu_matrix_bytes(const spurion_dev *dev, int N, int K, int directions, spurion_dtype dtype);

/* --- device and memory (device.c, memory.c) --- */
void spurion_cpu_destroy(spurion_dev *dev);
/* Memory for free(): aligned to 64 bytes; from 4 MiB on to a huge page, which it asks for, and its pages lie on all memory nodes in turn, for
 * every worker reads all weights. NULL: none left. */
void *spurion_cpu_block(size_t bytes);
/* The first 64 nodes of a list such as "0-1,4" as bits. */
uint64_t spurion_cpu_nodes(const char *list);
/* Asks for the pages of a block (whole, not yet touched) on the given nodes in turn. false: the kernel would not. */
bool spurion_cpu_spread(void *p, size_t bytes, uint64_t nodes);
spurion_status spurion_cpu_alloc(spurion_dev *dev, void **out, size_t bytes);
void spurion_cpu_free(spurion_dev *dev, void *p);
spurion_status spurion_cpu_upload(spurion_dev *dev, void *out, const void *host, size_t bytes);
spurion_status spurion_cpu_download(spurion_dev *dev, void *host, const void *in, size_t bytes);
spurion_status spurion_cpu_download_later(spurion_dev *dev, void *host, const void *in, size_t bytes);
spurion_status spurion_cpu_host_alloc(spurion_dev *dev, void **out, size_t bytes);
void spurion_cpu_host_free(spurion_dev *dev, void *p);
spurion_status spurion_cpu_zero(spurion_dev *dev, void *out, size_t bytes);
spurion_status spurion_cpu_copy(spurion_dev *dev, void *out, const void *in, size_t bytes);
spurion_status spurion_cpu_sync(spurion_dev *dev);
size_t spurion_cpu_memory_free(spurion_dev *dev);

/* Bytes of scratch that attention forward and backward take. */
#define SPURION_ATTENTION_KEPT ((size_t)512 * 1024) /* of it: key blocks that stay gathered */
#define SPURION_ATTENTION_SCRATCH (SPURION_ATTENTION_KEPT + (size_t)1536 * 1024)

/* The tables, one per instruction set; NULL in builds for other processors. */
const spurion_ops *spurion_cpu_table_portable(void);
const spurion_ops *spurion_cpu_table_avx2(void);
const spurion_ops *spurion_cpu_table_avx512(void);

/* --- names in op files: SPURION_CPU_OP(norm) is spurion_cpu_norm_avx512 --- */
#ifdef SPURION_CPU_SUFFIX
#define SPURION_CPU_JOIN2(a, b) a##b
#define SPURION_CPU_JOIN(a, b) SPURION_CPU_JOIN2(a, b)
#define SPURION_CPU_OP(op) SPURION_CPU_JOIN(spurion_cpu_##op, SPURION_CPU_SUFFIX)
#define SPURION_CPU_DECLARE(op) __typeof__(*((const spurion_ops *)0)->op) SPURION_CPU_OP(op)
SPURION_CPU_DECLARE(linear);
SPURION_CPU_DECLARE(linear_backward);
SPURION_CPU_DECLARE(linear_act);
SPURION_CPU_DECLARE(linear_act_backward);
SPURION_CPU_DECLARE(embed);
SPURION_CPU_DECLARE(gather_rows);
SPURION_CPU_DECLARE(scatter_rows);
SPURION_CPU_DECLARE(gather_act);
SPURION_CPU_DECLARE(cast);
SPURION_CPU_DECLARE(add);
SPURION_CPU_DECLARE(dot_rows);
SPURION_CPU_DECLARE(mean_rows);
SPURION_CPU_DECLARE(mean_rows_backward);
SPURION_CPU_DECLARE(norm);
SPURION_CPU_DECLARE(norm_backward);
SPURION_CPU_DECLARE(rope);
SPURION_CPU_DECLARE(rope_f32);
SPURION_CPU_DECLARE(attention);
SPURION_CPU_DECLARE(attention_backward);
SPURION_CPU_DECLARE(activation);
SPURION_CPU_DECLARE(activation_backward);
SPURION_CPU_DECLARE(sae_scratch_bytes);
SPURION_CPU_DECLARE(sae_encode);
SPURION_CPU_DECLARE(sae_encode_members);
SPURION_CPU_DECLARE(sae_attribute);
SPURION_CPU_DECLARE(sae_subtract);
SPURION_CPU_DECLARE(sae_bias_dot);
SPURION_CPU_DECLARE(sae_shrink);
#endif

#endif

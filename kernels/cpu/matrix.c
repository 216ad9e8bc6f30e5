/* Matrix products. bf16 on a CPU with AMX: our own (amx.c), faster than oneDNN 2.6.3 there and independent of T by construction.
 * All else through oneDNN, in fixed tiles: SPURION_LIBRARY_ROWS rows by one chunk of outputs, so that each matrix has one or
 * two primitive shapes and a row's result cannot depend on T (oneDNN chooses kernels by shape). Weights are packed once, as the
 * primitive wants them. oneDNN is built on OpenMP in Debian; each of our workers tells OpenMP to stay on its own thread.
 * A CPU without bf16 products multiplies bf16 values as f32: the same values, wider.
 * Thread: create and destroy engine; input and tile any worker. Memory: taken when a matrix is made. */
#include <dlfcn.h>
#include <pthread.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <dnnl.h>

#include "kernels/cpu/amx.h"
#include "kernels/cpu/cpu.h"

enum { CHUNK_BYTES = 768 << 10, CHUNK_MIN = 64, CHUNK_MAX = 512 };
enum { TILE_PAD = 16 }; /* floats between rows of a tile: rows 2048 bytes apart would share lines of the first-level cache */

/* One primitive: (SPURION_LIBRARY_ROWS, inner) x (outputs, inner) -> (SPURION_LIBRARY_ROWS, outputs) f32. */
typedef struct spurion_plan {
    struct spurion_plan *next;
    int outputs, inner;
    spurion_dtype dtype;
    dnnl_primitive_desc_t desc;
    dnnl_primitive_t primitive;
    dnnl_memory_desc_t weights_desc;
    size_t weights_bytes, scratch_bytes;
    dnnl_memory_t *src, *dst, *scratch; /* (workers) */
} spurion_plan;

struct spurion_products {
    dnnl_engine_t engine;
    dnnl_stream_t *streams; /* (workers) */
    int workers;
    bool bf16; /* the library multiplies bf16 on this CPU faster than f32 */
    void (*omp_set_num_threads)(int);
    spurion_plan *plans;
};

static spurion_status library_status(dnnl_status_t rc, const char *what)
{
    if (rc == dnnl_success) {
        return spurion_ok();
    }
    return spurion_error(rc == dnnl_out_of_memory ? SPURION_RESOURCE_EXHAUSTED : SPURION_INTERNAL, "oneDNN %s: status %d", what, (int)rc);
}

/* --- library --- */

const char *spurion_products_isa(const spurion_products *p)
{
    static const struct {
        dnnl_cpu_isa_t isa;
        const char *name;
    } names[] = {{dnnl_cpu_isa_sse41, "sse41"}, {dnnl_cpu_isa_avx, "avx"}, {dnnl_cpu_isa_avx2, "avx2"},
                 {dnnl_cpu_isa_avx2_vnni, "avx2_vnni"}, {dnnl_cpu_isa_avx512_core, "avx512_core"},
                 {dnnl_cpu_isa_avx512_core_vnni, "avx512_core_vnni"}, {dnnl_cpu_isa_avx512_core_bf16, "avx512_core_bf16"},
                 {dnnl_cpu_isa_avx512_core_amx, "avx512_core_amx"}};
    dnnl_cpu_isa_t isa = dnnl_get_effective_cpu_isa();
    (void)p;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (names[i].isa == isa) {
            return names[i].name;
        }
    }
    return "other";
}

/* Only CPUs with their own bf16 instructions; before those oneDNN emulates, slower than f32. */
bool spurion_products_avx512_bf16(void)
{
    dnnl_cpu_isa_t isa = dnnl_get_effective_cpu_isa();
    return isa == dnnl_cpu_isa_avx512_core_bf16 || isa == dnnl_cpu_isa_avx512_core_amx;
}

/* The library's instruction set follows ours where it was lowered. Refused (and harmless) once the library is in use. */
static void lower_isa(spurion_cpu_isa isa)
{
    if (isa == SPURION_ISA_PORTABLE) {
        (void)dnnl_set_max_cpu_isa(dnnl_cpu_isa_sse41);
    } else if (isa == SPURION_ISA_AVX2) {
        (void)dnnl_set_max_cpu_isa(dnnl_cpu_isa_avx2);
    }
}

spurion_status spurion_products_create(spurion_products **out, spurion_cpu *cpu)
{
    spurion_status st;
    spurion_products *p = calloc(1, sizeof *p);

    *out = NULL;
    if (p == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for the matrix library");
    }
    lower_isa(cpu->isa);
    /* Looked up by name: with a oneDNN on another threading runtime there is nothing to tell. */
    *(void **)&p->omp_set_num_threads = dlsym(RTLD_DEFAULT, "omp_set_num_threads");
    p->workers = cpu->dev.thread_count;
    p->bf16 = spurion_products_avx512_bf16() && cpu->isa == SPURION_ISA_AVX512;
    p->streams = calloc((size_t)p->workers, sizeof *p->streams);
    if (p->streams == NULL) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for the matrix library");
        goto out;
    }
    SPURION_TRY(st, library_status(dnnl_set_primitive_cache_capacity(0), "cache"));
    SPURION_TRY(st, library_status(dnnl_engine_create(&p->engine, dnnl_cpu, 0), "engine"));
    for (int i = 0; i < p->workers; i++) {
        SPURION_TRY(st, library_status(dnnl_stream_create(&p->streams[i], p->engine, dnnl_stream_default_flags), "stream"));
    }
    *out = p;
    p = NULL;
out:
    spurion_products_destroy(p);
    return st;
}

static void destroy_memories(dnnl_memory_t *list, int count)
{
    for (int i = 0; list != NULL && i < count; i++) {
        if (list[i] != NULL) {
            dnnl_memory_destroy(list[i]);
        }
    }
    free(list);
}

static void plan_destroy(spurion_plan *plan, int workers)
{
    if (plan == NULL) {
        return;
    }
    destroy_memories(plan->src, workers);
    destroy_memories(plan->dst, workers);
    destroy_memories(plan->scratch, workers);
    if (plan->primitive != NULL) {
        dnnl_primitive_destroy(plan->primitive);
    }
    if (plan->desc != NULL) {
        dnnl_primitive_desc_destroy(plan->desc);
    }
    free(plan);
}

void spurion_products_destroy(spurion_products *p)
{
    if (p == NULL) {
        return;
    }
    while (p->plans != NULL) {
        spurion_plan *next = p->plans->next;
        plan_destroy(p->plans, p->workers);
        p->plans = next;
    }
    for (int i = 0; p->streams != NULL && i < p->workers; i++) {
        if (p->streams[i] != NULL) {
            dnnl_stream_destroy(p->streams[i]);
        }
    }
    free(p->streams);
    if (p->engine != NULL) {
        dnnl_engine_destroy(p->engine);
    }
    free(p);
}

bool spurion_products_amx(void)
{
    const char *off = getenv("SPURION_CPU_AMX");
    return !(off != NULL && strcmp(off, "0") == 0) && dnnl_get_effective_cpu_isa() == dnnl_cpu_isa_avx512_core_amx && spurion_amx_enable();
}

/* --- plans --- */

static dnnl_data_type_t library_type(spurion_dtype t)
{
    return t == SPURION_BF16 ? dnnl_bf16 : dnnl_f32;
}

/* Makes the primitive; memory for scratch is the caller's, so that workers may run it at once. */
static spurion_status make_primitive(spurion_plan *plan, dnnl_engine_t engine)
{
    spurion_status st;
    dnnl_memory_desc_t src, weights, dst;
    dnnl_inner_product_desc_t op;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_dims_t src_dims = {SPURION_LIBRARY_ROWS, plan->inner}, weights_dims = {plan->outputs, plan->inner},
                dst_dims = {SPURION_LIBRARY_ROWS, plan->outputs};
    dnnl_data_type_t type = library_type(plan->dtype);

    SPURION_TRY(st, library_status(dnnl_memory_desc_init_by_tag(&src, 2, src_dims, type, dnnl_ab), "input layout"));
    SPURION_TRY(st, library_status(dnnl_memory_desc_init_by_tag(&weights, 2, weights_dims, type, dnnl_format_tag_any), "weight layout"));
    SPURION_TRY(st, library_status(dnnl_memory_desc_init_by_tag(&dst, 2, dst_dims, dnnl_f32, dnnl_ab), "output layout"));
    SPURION_TRY(st, library_status(dnnl_inner_product_forward_desc_init(&op, dnnl_forward_inference, &src, &weights, NULL, &dst), "product"));
    SPURION_TRY(st, library_status(dnnl_primitive_attr_create(&attr), "attributes"));
    SPURION_TRY(st, library_status(dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user), "scratchpad mode"));
    SPURION_TRY(st, library_status(dnnl_primitive_desc_create(&plan->desc, &op, attr, engine, NULL), "product"));
    SPURION_TRY(st, library_status(dnnl_primitive_create(&plan->primitive, plan->desc), "primitive"));
    plan->weights_desc = *dnnl_primitive_desc_query_md(plan->desc, dnnl_query_weights_md, 0);
    plan->weights_bytes = dnnl_memory_desc_get_size(&plan->weights_desc);
out:
    if (attr != NULL) {
        dnnl_primitive_attr_destroy(attr);
    }
    return st;
}

static spurion_status make_memories(dnnl_memory_t **out, const spurion_products *p, const dnnl_memory_desc_t *desc)
{
    *out = calloc((size_t)p->workers, sizeof **out);
    if (*out == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a matrix product");
    }
    for (int i = 0; i < p->workers; i++) {
        dnnl_status_t rc = dnnl_memory_create(&(*out)[i], desc, p->engine, DNNL_MEMORY_NONE);
        if (rc != dnnl_success) {
            return library_status(rc, "memory");
        }
    }
    return spurion_ok();
}

/* The library works on the calling thread alone: workers call it side by side. A setting of the thread, of a few ns. A primitive keeps the
 * number of threads that it was made under, so it is told before one is made, too. */
static void library_alone(const spurion_products *p)
{
    if (p->omp_set_num_threads != NULL) {
        p->omp_set_num_threads(1);
    }
}

/* Gives the plan of a shape, made at first use and kept until the device goes. */
static spurion_status plan_get(spurion_plan **out, spurion_products *p, int outputs, int inner, spurion_dtype dtype)
{
    spurion_status st = spurion_ok();
    spurion_plan *plan;

    for (plan = p->plans; plan != NULL; plan = plan->next) {
        if (plan->outputs == outputs && plan->inner == inner && plan->dtype == dtype) {
            *out = plan;
            return st;
        }
    }
    plan = calloc(1, sizeof *plan);
    if (plan == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a matrix product");
    }
    plan->outputs = outputs;
    plan->inner = inner;
    plan->dtype = dtype;
    library_alone(p);
    SPURION_TRY(st, make_primitive(plan, p->engine));
    const dnnl_memory_desc_t *scratch = dnnl_primitive_desc_query_md(plan->desc, dnnl_query_scratchpad_md, 0);
    plan->scratch_bytes = dnnl_memory_desc_get_size(scratch);
    SPURION_TRY(st, make_memories(&plan->scratch, p, scratch));
    SPURION_TRY(st, make_memories(&plan->src, p, dnnl_primitive_desc_query_md(plan->desc, dnnl_query_src_md, 0)));
    SPURION_TRY(st, make_memories(&plan->dst, p, dnnl_primitive_desc_query_md(plan->desc, dnnl_query_dst_md, 0)));
    plan->next = p->plans;
    p->plans = plan;
    *out = plan;
    plan = NULL;
out:
    plan_destroy(plan, p->workers);
    return st;
}

/* --- one direction of a matrix --- */

static size_t plan_packed_bytes(const spurion_plan *plan)
{
    return spurion_round_up(plan->weights_bytes, 4096);
}

/* Chunks of equal size whose weights stay in a core's second-level cache. */
static int chunk_of(int outputs, int inner, spurion_dtype dtype, int unit)
{
    int most = (int)(CHUNK_BYTES / ((size_t)inner * spurion_dtype_bytes(dtype)));
    most = most < CHUNK_MIN ? CHUNK_MIN : most > CHUNK_MAX ? CHUNK_MAX : most;
    int count = (outputs + most - 1) / most;
    int chunk = (int)spurion_round_up((size_t)((outputs + count - 1) / count), (size_t)unit);
    return chunk < outputs ? chunk : outputs;
}

/* Cuts `outputs` into chunks and gets the library's plans. Takes no memory for weights. */
static spurion_status product_shape(spurion_product *out, const spurion_cpu *cpu, int outputs, int inner, spurion_dtype dtype)
{
    spurion_status st = spurion_ok();
    int chunk = chunk_of(outputs, inner, dtype, CHUNK_MIN);

    out->outputs = outputs;
    out->inner = inner;
    out->chunk = chunk;
    out->chunk_count = (outputs + chunk - 1) / chunk;
    out->tile_rows = SPURION_LIBRARY_ROWS;
    out->input_stride = inner;
    out->amx = cpu->amx && dtype == SPURION_BF16;
    if (out->amx) {
        out->input_stride = (int)spurion_round_up((size_t)inner, SPURION_AMX_STEP);
        out->tile_rows = SPURION_AMX_TILE_ROWS;
        return st;
    }
    SPURION_TRY(st, plan_get(&out->full, cpu->products, chunk, inner, dtype));
    SPURION_TRY(st, plan_get(&out->last, cpu->products, outputs - (out->chunk_count - 1) * chunk, inner, dtype));
out:
    return st;
}

static size_t product_packed_bytes(const spurion_product *p)
{
    if (p->amx) {
        return spurion_round_up(spurion_amx_packed_bytes(p->outputs, p->inner), 4096);
    }
    return (size_t)(p->chunk_count - 1) * plan_packed_bytes(p->full) + plan_packed_bytes(p->last);
}

static uint16_t round_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    if (x != x) {
        return (uint16_t)(u >> 16 | 0x40);
    }
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static float widen_bf16(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* The chunk's weights (rows, inner) dense in the library's type: element (o, i) = w[o * row_stride + i * column_stride]. */
static void gather_weights(void *out, const spurion_matrix *m, const float *w, int rows, int inner, size_t row_stride, size_t column_stride)
{
    for (int o = 0; o < rows; o++) {
        for (int i = 0; i < inner; i++) {
            float x = w[(size_t)o * row_stride + (size_t)i * column_stride];
            size_t at = (size_t)o * (size_t)inner + (size_t)i;
            if (spurion_product_type(m) == SPURION_F32 && !m->widen) {
                ((float *)out)[at] = x;
            } else if (m->widen) {
                ((float *)out)[at] = widen_bf16(round_bf16(x));
            } else {
                ((uint16_t *)out)[at] = round_bf16(x);
            }
        }
    }
}

static spurion_status pack_chunk(spurion_products *p, const spurion_plan *plan, dnnl_memory_t packed, void *dense)
{
    spurion_status st;
    dnnl_memory_desc_t desc;
    dnnl_dims_t dims = {plan->outputs, plan->inner};
    dnnl_memory_t from = NULL;
    dnnl_primitive_desc_t reorder_desc = NULL;
    dnnl_primitive_t reorder = NULL;

    SPURION_TRY(st, library_status(dnnl_memory_desc_init_by_tag(&desc, 2, dims, library_type(plan->dtype), dnnl_ab), "weight layout"));
    SPURION_TRY(st, library_status(dnnl_memory_create(&from, &desc, p->engine, dense), "memory"));
    SPURION_TRY(st, library_status(dnnl_reorder_primitive_desc_create(&reorder_desc, &desc, p->engine, &plan->weights_desc, p->engine, NULL),
                                   "reorder"));
    SPURION_TRY(st, library_status(dnnl_primitive_create(&reorder, reorder_desc), "reorder"));
    dnnl_exec_arg_t args[] = {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, packed}};
    SPURION_TRY(st, library_status(dnnl_primitive_execute(reorder, p->streams[0], 2, args), "reorder"));
    SPURION_TRY(st, library_status(dnnl_stream_wait(p->streams[0]), "reorder"));
out:
    if (reorder != NULL) {
        dnnl_primitive_destroy(reorder);
    }
    if (reorder_desc != NULL) {
        dnnl_primitive_desc_destroy(reorder_desc);
    }
    if (from != NULL) {
        dnnl_memory_destroy(from);
    }
    return st;
}

typedef struct weight_source {
    const float *w;
    size_t row_stride, column_stride;
} weight_source;

static void pack_panels(spurion_product *out, const spurion_matrix *m, weight_source from, void *dense)
{
    size_t panel = spurion_amx_packed_bytes(SPURION_AMX_COLUMNS, out->inner);
    for (int n = 0; n < out->outputs; n += SPURION_AMX_COLUMNS) {
        int rows = out->outputs - n < SPURION_AMX_COLUMNS ? out->outputs - n : SPURION_AMX_COLUMNS;
        gather_weights(dense, m, from.w + (size_t)n * from.row_stride, rows, out->inner, from.row_stride, from.column_stride);
        spurion_amx_pack((uint16_t *)(void *)(out->packed + (size_t)(n / SPURION_AMX_COLUMNS) * panel), dense, rows, out->inner);
    }
}

static spurion_status pack_chunks(spurion_product *out, spurion_products *p, const spurion_matrix *m, weight_source from, void *dense)
{
    spurion_status st = spurion_ok();
    out->weights = calloc((size_t)out->chunk_count, sizeof *out->weights);
    if (out->weights == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a matrix");
    }
    for (int c = 0; c < out->chunk_count; c++) {
        const spurion_plan *plan = c + 1 < out->chunk_count ? out->full : out->last;
        dnnl_memory_t memory;
        SPURION_TRY(st, library_status(dnnl_memory_create(&memory, &plan->weights_desc, p->engine,
                                                          out->packed + (size_t)c * plan_packed_bytes(out->full)), "memory"));
        out->weights[c] = memory;
        gather_weights(dense, m, from.w + (size_t)c * (size_t)out->chunk * from.row_stride, plan->outputs, out->inner, from.row_stride,
                       from.column_stride);
        SPURION_TRY(st, pack_chunk(p, plan, memory, dense));
    }
out:
    return st;
}

static spurion_status product_pack(spurion_product *out, spurion_products *p, const spurion_matrix *m, weight_source from)
{
    spurion_status st = spurion_ok();
    size_t bytes = product_packed_bytes(out);
    int rows = out->chunk > SPURION_AMX_COLUMNS ? out->chunk : SPURION_AMX_COLUMNS;
    void *dense = malloc((size_t)rows * (size_t)out->inner * spurion_dtype_bytes(spurion_product_type(m)));

    out->packed = spurion_cpu_block(bytes);
    if (dense == NULL || out->packed == NULL) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for weights (%d, %d): %zu bytes", out->outputs, out->inner, bytes);
    } else if (out->amx) {
        pack_panels(out, m, from, dense);
    } else {
        st = pack_chunks(out, p, m, from, dense);
    }
    free(dense);
    return st;
}

static void product_fini(spurion_product *p)
{
    for (int c = 0; p->weights != NULL && c < p->chunk_count; c++) {
        if (p->weights[c] != NULL) {
            dnnl_memory_destroy(p->weights[c]);
        }
    }
    free(p->weights);
    free(p->packed);
}

/* --- matrices --- */

static spurion_dtype stored_type(const spurion_products *p, spurion_dtype dtype)
{
    return dtype == SPURION_BF16 && p->bf16 ? SPURION_BF16 : SPURION_F32;
}

spurion_dtype spurion_product_type(const spurion_matrix *m)
{
    return m->widen ? SPURION_F32 : m->rows != NULL ? SPURION_BF16 : m->dtype;
}

/* Whether few outputs of many are found faster in bf16 first. */
static bool screens(const spurion_cpu *cpu, int directions, spurion_dtype dtype)
{
    return (directions & SPURION_SELECT) && cpu->amx && dtype == SPURION_F32;
}

static size_t screen_bytes(int N, int K)
{
    return (size_t)N * ((size_t)K + 2) * sizeof(float);
}

/* Keeps the rows as they are, and what sae_screen.h must know of each. */
static spurion_status make_rows(spurion_matrix *m, const float *w)
{
    size_t N = (size_t)m->N, K = (size_t)m->K;
    m->rows = malloc(N * K * sizeof *m->rows);
    m->row_norm = malloc(N * sizeof *m->row_norm);
    m->row_loss = malloc(N * sizeof *m->row_loss);
    if (m->rows == NULL || m->row_norm == NULL || m->row_loss == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for weights (%d, %d): %zu bytes", m->N, m->K, screen_bytes(m->N, m->K));
    }
    memcpy(m->rows, w, N * K * sizeof *m->rows);
    for (size_t n = 0; n < N; n++) {
        double whole = 0, lost = 0;
        for (size_t k = 0; k < K; k++) {
            double x = w[n * K + k], r = x - widen_bf16(round_bf16(w[n * K + k]));
            whole += x * x;
            lost += r * r;
        }
        m->row_norm[n] = (float)(sqrt(whole) * 1.0001);
        m->row_loss[n] = (float)(sqrt(lost) * 1.0001);
    }
    return spurion_ok();
}

static spurion_status make_products(spurion_matrix *m, spurion_cpu *cpu, const float *w, int directions)
{
    spurion_status st = spurion_ok();
    size_t k = (size_t)m->K;

    if (screens(cpu, directions, m->dtype)) {
        SPURION_TRY(st, make_rows(m, w));
    }
    spurion_dtype type = spurion_product_type(m);
    if (directions & SPURION_ANY_FORWARD) {
        SPURION_TRY(st, product_shape(&m->forward, cpu, m->N, m->K, type));
        SPURION_TRY(st, product_pack(&m->forward, cpu->products, m, (weight_source){w, k, 1}));
        SPURION_TRY(st, spurion_cpu_scratch(cpu, spurion_product_scratch(m, &m->forward) + SPURION_INPUT_ROWS * k * sizeof(float)));
    }
    if (directions & SPURION_ANY_BACKWARD) {
        SPURION_TRY(st, product_shape(&m->backward, cpu, m->K, m->N, type));
        SPURION_TRY(st, product_pack(&m->backward, cpu->products, m, (weight_source){w, 1, k}));
        SPURION_TRY(st, spurion_cpu_scratch(cpu, spurion_product_scratch(m, &m->backward)));
    }
out:
    return st;
}

spurion_status spurion_cpu_matrix_create(spurion_dev *dev, spurion_matrix **out, const float *w, const float *bias, int N, int K,
                                         int directions, spurion_dtype dtype)
{
    spurion_status st;
    spurion_cpu *cpu = spurion_cpu_of(dev);
    spurion_matrix *m = calloc(1, sizeof *m);

    *out = NULL;
    if (m == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a matrix");
    }
    m->N = N;
    m->K = K;
    m->dtype = dtype;
    m->widen = dtype == SPURION_BF16 && !cpu->products->bf16;
    if (bias != NULL) {
        m->bias = malloc((size_t)N * sizeof *bias);
        if (m->bias == NULL) {
            st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a bias of %d", N);
            goto out;
        }
        memcpy(m->bias, bias, (size_t)N * sizeof *bias);
    }
    SPURION_TRY(st, make_products(m, cpu, w, directions));
    *out = m;
    m = NULL;
out:
    spurion_cpu_matrix_destroy(dev, m);
    return st;
}

void spurion_cpu_matrix_destroy(spurion_dev *dev, spurion_matrix *m)
{
    (void)dev;
    if (m == NULL) {
        return;
    }
    product_fini(&m->forward);
    product_fini(&m->backward);
    free(m->rows);
    free(m->row_norm);
    free(m->row_loss);
    free(m->bias);
    free(m);
}

size_t spurion_cpu_matrix_bytes(const spurion_dev *dev, int N, int K, int directions, spurion_dtype dtype)
{
    const spurion_cpu *cpu = (const spurion_cpu *)dev;
    bool screened = screens(cpu, directions, dtype);
    spurion_dtype type = screened ? SPURION_BF16 : stored_type(cpu->products, dtype);
    spurion_product forward, backward;
    size_t bytes = sizeof(spurion_matrix) + (size_t)N * sizeof(float) + (screened ? screen_bytes(N, K) : 0);

    if ((directions & SPURION_ANY_FORWARD) && product_shape(&forward, cpu, N, K, type).code == SPURION_OK) {
        bytes += product_packed_bytes(&forward);
    }
    if ((directions & SPURION_ANY_BACKWARD) && product_shape(&backward, cpu, K, N, type).code == SPURION_OK) {
        bytes += product_packed_bytes(&backward);
    }
    return bytes;
}

/* --- running ---  a worker's scratch: input rows, output tile, the library's own */

static size_t input_bytes(const spurion_product *p)
{
    size_t element = p->amx ? sizeof(uint16_t) : spurion_dtype_bytes(p->full->dtype);
    return spurion_round_up(SPURION_INPUT_ROWS * (size_t)p->input_stride * element, 4096);
}

static size_t output_bytes(const spurion_product *p)
{
    return spurion_round_up((size_t)p->tile_rows * (size_t)(p->chunk + TILE_PAD) * sizeof(float), 4096);
}

size_t spurion_product_scratch(const spurion_matrix *m, const spurion_product *p)
{
    size_t library = 0;
    (void)m;
    if (!p->amx) {
        size_t a = p->full->scratch_bytes, b = p->last->scratch_bytes;
        library = spurion_round_up(a > b ? a : b, 4096);
    }
    return input_bytes(p) + output_bytes(p) + library;
}

static bool readable_in_place(const spurion_matrix *m, const spurion_product *p, int rows)
{
    if (p->amx) {
        return rows % SPURION_AMX_ROWS == 0 && p->inner == p->input_stride;
    }
    return !m->widen && rows == p->tile_rows;
}

spurion_input spurion_product_input(spurion_cpu *cpu, const spurion_matrix *m, const spurion_product *p, const void *x, int rows, int worker)
{
    size_t inner = (size_t)p->inner, stride = (size_t)p->input_stride, element = spurion_dtype_bytes(spurion_product_type(m));
    char *tile = cpu->scratch[worker];
    if (readable_in_place(m, p, rows)) {
        return (spurion_input){x, inner, rows};
    }
    for (int r = 0; r < rows; r++) {
        char *to = tile + (size_t)r * stride * element;
        if (m->widen) {
            const uint16_t *from = (const uint16_t *)x + (size_t)r * inner;
            for (size_t i = 0; i < inner; i++) {
                ((float *)(void *)to)[i] = widen_bf16(from[i]);
            }
        } else {
            memcpy(to, (const char *)x + (size_t)r * inner * element, inner * element);
        }
        memset(to + inner * element, 0, (stride - inner) * element);
    }
    size_t whole = spurion_round_up((size_t)rows, p->amx ? (size_t)SPURION_AMX_ROWS : (size_t)p->tile_rows);
    memset(tile + (size_t)rows * stride * element, 0, (whole - (size_t)rows) * stride * element);
    return (spurion_input){tile, stride, rows};
}

void spurion_product_begin(const spurion_cpu *cpu, const spurion_product *p)
{
    if (p->amx) {
        spurion_amx_begin();
    } else {
        library_alone(cpu->products);
    }
}

void spurion_product_end(const spurion_product *p)
{
    if (p->amx) {
        spurion_amx_end();
    }
}

static const uint16_t *chunk_panels(const spurion_product *p, int chunk)
{
    return (const uint16_t *)(const void *)p->packed +
           (size_t)(chunk * p->chunk / SPURION_AMX_COLUMNS) * (spurion_amx_packed_bytes(SPURION_AMX_COLUMNS, p->inner) / sizeof(uint16_t));
}

void spurion_product_write(float *out, size_t out_stride, const spurion_product *p, spurion_input input, const float *bias, int chunk,
                           spurion_write mode)
{
    int column = chunk * p->chunk;
    spurion_amx_product(out + column, out_stride, input.rows, input.stride, chunk_panels(p, chunk), bias == NULL ? NULL : bias + column,
                        input.count, spurion_product_chunk_size(p, chunk), p->inner, mode == SPURION_ACCUMULATE);
}

static bool library_product(const spurion_products *lib, const spurion_plan *plan, void *output, void *scratch, const void *input, void *weights,
                            int worker)
{
    dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, plan->src[worker]},
                              {DNNL_ARG_WEIGHTS, weights},
                              {DNNL_ARG_DST, plan->dst[worker]},
                              {DNNL_ARG_SCRATCHPAD, plan->scratch[worker]}};
    union {
        const void *in;
        void *out;
    } borrowed = {input}; /* the library's setter takes void * also for what it only reads */
    return dnnl_memory_set_data_handle(plan->src[worker], borrowed.out) == dnnl_success &&
           dnnl_memory_set_data_handle(plan->dst[worker], output) == dnnl_success &&
           dnnl_memory_set_data_handle(plan->scratch[worker], scratch) == dnnl_success &&
           dnnl_primitive_execute(plan->primitive, lib->streams[worker], 4, args) == dnnl_success &&
           dnnl_stream_wait(lib->streams[worker]) == dnnl_success;
}

float *spurion_product_tile(size_t *stride, spurion_cpu *cpu, const spurion_product *p, spurion_input input, int chunk, int worker)
{
    char *output = cpu->scratch[worker] + input_bytes(p);
    float *tile = (float *)(void *)output;
    int size = spurion_product_chunk_size(p, chunk);
    *stride = (size_t)size;
    if (p->amx) {
        *stride += TILE_PAD;
        spurion_amx_product(tile, *stride, input.rows, input.stride, chunk_panels(p, chunk), NULL, input.count, size, p->inner, false);
        return tile;
    }
    const spurion_plan *plan = chunk + 1 < p->chunk_count ? p->full : p->last;
    return library_product(cpu->products, plan, output, output + output_bytes(p), input.rows, p->weights[chunk], worker) ? tile : NULL;
}

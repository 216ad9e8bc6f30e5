/* SAE encode: the token's norm, the product in chunks of rows (cuBLASLt), then the selection (sae_select.cu). Where the matrix is screened
 * the product is one of bf16 on tensor cores, and only what its error bound cannot exclude is computed in f32: an encoder in f32 without
 * tensor cores would cost as much as the model. Thread: engine. Memory: the caller's scratch. */
#include "kernels/cuda/sae.cuh"

enum { THREADS = SPURION_CUDA_THREADS };
#define CHUNK_BYTES ((size_t)256 << 20) /* of pre-activations: what the second-level cache and the block scheduler like is a matter of measurement */

/* --- scratch --- */

/* Of one call: what chunks of at most `rows` rows need, and of a top-k dictionary what encode_members asks of it. */
typedef struct scratch_layout {
    int rows;
    size_t input, pre;                                       /* (rows, d) of the product's type; (rows, F) f32 */
    size_t shift, factor, spread, settled;                   /* (rows) f32 */
    size_t asked, asked_count, list_count, list_index, list_value; /* (T) and one int32; (rows), (rows, k) */
    size_t bytes;
} scratch_layout;

static size_t take(size_t *at, size_t bytes)
{
    size_t here = *at;
    *at += spurion_cuda_round_up(bytes, 256);
    return here;
}

static int chunk_rows(int F, int T)
{
    size_t rows = CHUNK_BYTES / ((size_t)F * sizeof(float)) / SPURION_CUDA_ROW_STEP * SPURION_CUDA_ROW_STEP;
    size_t wanted = spurion_cuda_round_up((size_t)(T > 0 ? T : 1), SPURION_CUDA_ROW_STEP);
    rows = rows < (size_t)SPURION_CUDA_ROW_STEP ? (size_t)SPURION_CUDA_ROW_STEP : rows;
    return (int)(rows < wanted ? rows : wanted);
}

static scratch_layout layout_of(const spurion_sae_weights *sae, int T)
{
    scratch_layout l = {};
    l.rows = chunk_rows(sae->F, T);
    size_t rows = (size_t)l.rows, list = sae->kind == SPURION_SAE_TOPK ? rows * (size_t)sae->k : 0;
    l.input = take(&l.bytes, rows * (size_t)sae->d * spurion_dtype_bytes(sae->enc->type));
    l.pre = take(&l.bytes, rows * (size_t)sae->F * sizeof(float));
    l.shift = take(&l.bytes, rows * sizeof(float));
    l.factor = take(&l.bytes, rows * sizeof(float));
    l.spread = take(&l.bytes, rows * sizeof(float));
    l.settled = take(&l.bytes, list > 0 ? (size_t)T * sizeof(float) : 0);
    l.asked = take(&l.bytes, list > 0 ? (size_t)T * sizeof(int32_t) : 0);
    l.asked_count = take(&l.bytes, list > 0 ? sizeof(int32_t) : 0);
    l.list_count = take(&l.bytes, list > 0 ? rows * sizeof(int32_t) : 0);
    l.list_index = take(&l.bytes, list * sizeof(int32_t));
    l.list_value = take(&l.bytes, list * sizeof(float));
    return l;
}

extern "C" size_t spurion_cuda_sae_scratch_bytes(const spurion_dev *dev, const spurion_sae_weights *sae, int T)
{
    (void)dev;
    return 256 + layout_of(sae, T).bytes;
}

/* --- input --- */

typedef struct prepare_args {
    void *u;
    float *shift, *factor, *spread;      /* (rows) of the chunk */
    float *token_scale, *token_shift;    /* (rows), or NULL */
    const float *x;
    const int32_t *source; /* row of x for each; NULL: the same */
    int d;
    float loss; /* of the encoder's rows: spurion_matrix */
    spurion_sae_norm norm;
    spurion_dtype type;
    bool whole;
} prepare_args;

/* What a row's bound on errors needs (sae.cuh), per unit of a feature's reach: |u| stands for |u'| within 2^-8, sums of d products in f32 on
 * tensor cores (which keep 24 bits and cut the rest, 16 products at a time) are off by at most d 2^-23 |u| |w|, exact ones by d 2^-28. */
static __device__ inline float spread_of(double whole, double lost, float loss, int d)
{
    whole = sqrt(whole);
    return (float)(1.001 * (1.01 * (double)loss * whole + sqrt(lost) + (1.3e-7 * d + 1e-6) * whole) + 1e-30);
}

/* u[t] = (x[t] - shift) * factor of the matrix's type, and what the output is scaled by: cpu/sae_encode.c. One block per row. */
static __global__ void __launch_bounds__(THREADS) prepare_kernel(prepare_args a)
{
    size_t t = blockIdx.x, d = (size_t)a.d;
    const float *x = a.x + (a.source == NULL ? t : (size_t)a.source[t]) * d;
    double mean = 0, square = 0, scale = 1, factor = 1, whole = 0, lost = 0;
    if (a.norm == SPURION_SAE_NORM_LAYER) {
        for (int c = (int)threadIdx.x; c < a.d; c += THREADS) {
            mean += (double)x[c];
        }
        mean = spurion_sum<THREADS>(mean) / a.d;
    }
    if (a.norm != SPURION_SAE_NORM_NONE) {
        for (int c = (int)threadIdx.x; c < a.d; c += THREADS) {
            double v = (double)x[c] - mean;
            square += v * v;
        }
        square = spurion_sum<THREADS>(square);
        double length = sqrt(square), sd = sqrt(square / (a.d - 1));
        bool layer = a.norm == SPURION_SAE_NORM_LAYER;
        scale = layer ? sd : length / sqrt((double)a.d);
        factor = layer ? 1.0 / (sd + 1e-5) : length > 0 ? sqrt((double)a.d) / length : 0.0;
    }
    float shift = (float)mean, by = (float)factor;
    for (int c = 4 * (int)threadIdx.x; c < a.d; c += 4 * THREADS) {
        spurion_four v = spurion_load4(x + c, a.d - c, a.whole);
        for (int i = 0; i < 4 && c + i < a.d; i++) {
            v.v[i] = (v.v[i] - shift) * by;
            double gone = (double)(spurion_from_bf16(ptx_bf16(v.v[i])) - v.v[i]);
            whole += (double)v.v[i] * (double)v.v[i];
            lost += gone * gone;
        }
        spurion_store4_act(a.u, t * d + (size_t)c, v, a.d - c, a.whole, a.type);
    }
    whole = spurion_sum<THREADS>(whole);
    lost = spurion_sum<THREADS>(lost);
    if (threadIdx.x == 0) {
        a.shift[t] = shift;
        a.factor[t] = by;
        a.spread[t] = spread_of(whole, lost, a.loss, a.d);
        if (a.token_scale != NULL) {
            a.token_scale[t] = (float)scale;
            a.token_shift[t] = shift;
        }
    }
}

/* --- encode --- */

/* One call. Rows are those of x, or those that `source` names. */
typedef struct encode_job {
    spurion_cuda *cuda;
    const spurion_sae_weights *sae;
    spurion_sparse out;     /* lists of all rows; of one chunk where source is set */
    const float *x;
    const int32_t *source, *member;
    const float *settled;
    spurion_sae_kind kind;
    scratch_layout l;
    char *scratch;
} encode_job;

static float *floats_at(const encode_job *j, size_t at)
{
    return (float *)(void *)(j->scratch + at);
}

/* Rows first .. first + rows - 1 into lists of rows to onward. */
static spurion_status encode_chunk(const encode_job *j, int first, int rows, int to)
{
    const spurion_sae_weights *sae = j->sae;
    const spurion_matrix *m = sae->enc;
    const scratch_layout *l = &j->l;
    size_t at = (size_t)first, out = (size_t)to, slots = (size_t)j->out.slots, d = (size_t)sae->d;
    const float *x = j->source == NULL ? j->x + at * d : j->x;
    const int32_t *source = j->source == NULL ? NULL : j->source + at;
    prepare_args p = {j->scratch + l->input, floats_at(j, l->shift), floats_at(j, l->factor), floats_at(j, l->spread), NULL, NULL, x, source, sae->d,
                      m->loss, sae->norm, m->type, false};
    p.whole = spurion_whole(x, d, sae->d, SPURION_F32);
    if (j->source == NULL) {
        p.token_scale = j->out.token_scale + out;
        p.token_shift = j->out.token_shift + out;
    }
    SPURION_CUDA(j->cuda, spurion_cuda_launch(j->cuda, prepare_kernel, dim3((unsigned)rows), THREADS, 0, p));
    SPURION_CUDA_DO(spurion_cuda_product_padded(j->cuda, floats_at(j, l->pre), p.u, m, rows));
    spurion_select a = {floats_at(j, l->pre), m->bias, sae->threshold, sae->scale, sae->gate_bias, sae->mag_scale, sae->mag_bias, m->rows, m->reach, x,
                        p.shift, p.factor, p.spread, source, j->settled == NULL ? NULL : j->settled + at, j->out.count + out,
                        j->out.index + out * slots, j->out.value + out * slots, j->member, sae->d, sae->F, sae->k, j->out.slots, j->kind, false, false};
    a.whole = p.whole && spurion_whole(m->rows, d, sae->d, SPURION_F32);
    a.whole_pre = sae->F % 4 == 0;
    return spurion_cuda_select(j->cuda, &a, rows);
}

static spurion_status encode_rows(const encode_job *j, int T)
{
    for (int first = 0; first < T; first += j->l.rows) {
        SPURION_CUDA_DO(encode_chunk(j, first, T - first < j->l.rows ? T - first : j->l.rows, first));
    }
    return spurion_ok();
}

static encode_job job_of(spurion_cuda *cuda, const spurion_sparse *out, const spurion_sae_weights *sae, const float *x, void *scratch, int T)
{
    encode_job j = {};
    j.cuda = cuda;
    j.sae = sae;
    j.out = *out;
    j.x = x;
    j.kind = sae->kind;
    j.l = layout_of(sae, T);
    j.scratch = (char *)scratch + (-(size_t)scratch & 255);
    return j;
}

static spurion_status encode_end(spurion_cuda *cuda, const spurion_sae_weights *sae, double rows)
{
    double d = sae->d, F = sae->F;
    return spurion_cuda_end(cuda, SPURION_CLASS_SAE_ENCODE, 2 * rows * d * F, 4 * rows * d + d * F * (double)spurion_dtype_bytes(sae->enc->type));
}

extern "C" spurion_status spurion_cuda_sae_encode(spurion_dev *dev, spurion_sparse *out, const spurion_sae_weights *sae, const float *x, void *scratch, int T)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    if (sae->enc->N != sae->F || (sae->kind == SPURION_SAE_GROUPMAX && (sae->k <= 0 || sae->F % sae->k != 0 || sae->enc->rows != NULL)) ||
        (sae->kind == SPURION_SAE_TOPK && (sae->k <= 0 || sae->k > out->slots))) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "SAE: expected an encoder of %d features and k that fits %d slots, found %d, k %d", sae->F, out->slots,
                             sae->enc->N, sae->k);
    }
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    encode_job j = job_of(cuda, out, sae, x, scratch, T);
    SPURION_CUDA_DO(encode_rows(&j, T));
    return encode_end(cuda, sae, T);
}

/* --- members --- */

/* Rows that list something, in order, with their largest value; their number. One block of threads. */
static __global__ void __launch_bounds__(THREADS) ask_kernel(int32_t *asked, int32_t *asked_count, float *settled, spurion_sparse f, int T)
{
    int taken = 0;
    for (int base = 0; base < T; base += THREADS) {
        int t = base + (int)threadIdx.x, n = t < T ? f.count[t] : 0, total;
        int place = taken + spurion_scan(n > 0, &total);
        float top = 0.0f;
        for (int i = 0; i < n; i++) {
            top = fmaxf(top, f.value[(size_t)t * (size_t)f.slots + (size_t)i]);
        }
        if (n > 0) {
            asked[place] = t;
            settled[place] = top;
        }
        taken += total;
    }
    if (threadIdx.x == 0) {
        *asked_count = taken;
    }
}

/* Leaves of row asked[r]'s list what stands in list r; both ascend. A warp per row. */
static __global__ void keep_kernel(spurion_sparse f, const int32_t *asked, spurion_sparse list, int rows)
{
    int64_t r = spurion_item() / SPURION_CUDA_WARP;
    int lane = (int)(threadIdx.x % SPURION_CUDA_WARP), kept = 0;
    if (r >= rows) {
        return; /* the whole warp */
    }
    size_t t = (size_t)asked[r], at = t * (size_t)f.slots;
    const int32_t *among = list.index + (size_t)r * (size_t)list.slots;
    int n = f.count[t], most = list.count[r];
    for (int base = 0; base < n; base += SPURION_CUDA_WARP) {
        int i = base + lane, low = 0, high = most;
        int32_t index = i < n ? f.index[at + (size_t)i] : 0;
        float value = i < n ? f.value[at + (size_t)i] : 0.0f;
        while (low < high) { /* the first entry >= index */
            int middle = low + (high - low) / 2;
            if (among[middle] < index) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        bool stays = i < n && low < most && among[low] == index;
        unsigned all = __ballot_sync(0xffffffffu, stays); /* the whole warp has read: places are no later than what they replace */
        if (stays) {
            size_t to = at + (size_t)(kept + __popc(all & ((1u << lane) - 1u)));
            f.index[to] = index;
            f.value[to] = value;
        }
        kept += __popc(all);
        __syncwarp();
    }
    if (lane == 0) {
        f.count[t] = kept;
    }
}

/* Finds the rows that list a member: rows without one are most, and cost nothing from here on. Waits for the stream. */
static spurion_status ask_rows(int *asked, const encode_job *j, const spurion_sparse *out, int T)
{
    int32_t *rows = (int32_t *)(void *)(j->scratch + j->l.asked), *count = (int32_t *)(void *)(j->scratch + j->l.asked_count);
    SPURION_CUDA(j->cuda, spurion_cuda_launch(j->cuda, ask_kernel, dim3(1), THREADS, 0, rows, count, floats_at(j, j->l.settled), *out, T));
    return spurion_cuda_download(&j->cuda->dev, asked, count, sizeof *asked);
}

/* Of these rows: the whole dictionary, and what of the list is among the k largest of it. */
static spurion_status keep_largest(encode_job *j, const spurion_sparse *out, int asked)
{
    spurion_sparse list = {(int32_t *)(void *)(j->scratch + j->l.list_count), (int32_t *)(void *)(j->scratch + j->l.list_index),
                           floats_at(j, j->l.list_value), NULL, NULL, j->sae->k};
    j->out = list;
    j->source = (const int32_t *)(const void *)(j->scratch + j->l.asked);
    j->settled = floats_at(j, j->l.settled);
    for (int first = 0; first < asked; first += j->l.rows) {
        int n = asked - first < j->l.rows ? asked - first : j->l.rows;
        SPURION_CUDA_DO(encode_chunk(j, first, n, 0));
        SPURION_CUDA(j->cuda, spurion_cuda_launch(j->cuda, keep_kernel, spurion_row_grid(n, SPURION_CUDA_WARP), SPURION_CUDA_THREADS, 0, *out,
                                                  j->source + first, list, n));
    }
    return spurion_ok();
}

/* Lists: the part is a dictionary of its own. Top-k: the part's positive members are listed first, and the whole dictionary is encoded only for
 * the rows that have one. */
extern "C" spurion_status spurion_cuda_sae_encode_members(spurion_dev *dev, spurion_sparse *out, const spurion_sae_weights *sae,
                                                          const spurion_sae_weights *part, const int32_t *member, const float *x, void *scratch, int T)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    bool top = sae->kind == SPURION_SAE_TOPK;
    int asked = 0;
    if (part->F > out->slots || part->enc->N != part->F || sae->enc->N != sae->F || sae->kind == SPURION_SAE_GROUPMAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "SAE members: expected at most %d (slots) of a kind other than groupmax, found %d", out->slots,
                             part->F);
    }
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    encode_job all = job_of(cuda, out, part, x, scratch, T);
    all.member = member;
    all.kind = top ? SPURION_SAE_RELU : sae->kind;
    SPURION_CUDA_DO(encode_rows(&all, T));
    SPURION_CUDA_DO(encode_end(cuda, part, T));
    if (!top) {
        return spurion_ok();
    }
    encode_job some = job_of(cuda, out, sae, x, scratch, T);
    SPURION_CUDA_DO(ask_rows(&asked, &some, out, T));
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    SPURION_CUDA_DO(keep_largest(&some, out, asked));
    return encode_end(cuda, sae, asked);
}

/* What is done with the sparse lists: attribution, removal, the bias's part, the path of integrated gradients.
 * D_i(t) = D_i scale(t), b(t) = b scale(t) + shift(t). Thread: engine. Memory: none. */
#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd.h"

typedef struct sparse_job {
    float *out;
    const spurion_sparse *f;
    const spurion_sae_weights *sae;
    const float *g;
    const spurion_sae_sets *sets;
    const int32_t *row_set;
} sparse_job;

/* Four vectors side by side, then pairwise: an order fixed by n. */
static float dot(const float *a, const float *b, int n)
{
    vf sum[4] = {v_set(0.0f), v_set(0.0f), v_set(0.0f), v_set(0.0f)};
    int c = 0;
    for (; c + 4 * VW <= n; c += 4 * VW) {
        for (int i = 0; i < 4; i++) {
            sum[i] = v_fma(v_load(a + c + i * VW), v_load(b + c + i * VW), sum[i]);
        }
    }
    for (; c < n; c += VW) {
        sum[0] = v_fma(v_load_n(a + c, n - c), v_load_n(b + c, n - c), sum[0]);
    }
    return v_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

static const float *decoder_row(const spurion_sae_weights *sae, int32_t index)
{
    return sae->dec + (size_t)index * (size_t)sae->d;
}

/* Asks for the next row while this one is read: rows lie anywhere in a dictionary of tens of megabytes. */
static void fetch(const float *row, int d)
{
    for (int c = 0; c < d; c += 16) {
        __builtin_prefetch(row + c, 0, 2);
    }
}

static int held(const spurion_sparse *f, int t)
{
    return f->count[t] < f->slots ? f->count[t] : f->slots;
}

static void attribute_row(void *context, int t)
{
    const sparse_job *j = context;
    size_t at = (size_t)t * (size_t)j->f->slots;
    const float *g = j->g + (size_t)t * (size_t)j->sae->d;
    int n = held(j->f, t);
    for (int s = 0; s < n; s++) {
        if (s + 1 < n) {
            fetch(decoder_row(j->sae, j->f->index[at + (size_t)s + 1]), j->sae->d);
        }
        float slope = dot(decoder_row(j->sae, j->f->index[at + (size_t)s]), g, j->sae->d) * j->f->token_scale[t];
        j->out[at + (size_t)s] = j->f->value[at + (size_t)s] * slope;
    }
    for (int s = n; s < j->f->slots; s++) {
        j->out[at + (size_t)s] = 0.0f;
    }
}

spurion_status SPURION_CPU_OP(sae_attribute)(spurion_dev *dev, float *out, const spurion_sparse *f, const spurion_sae_weights *sae,
                                             const float *g, int T)
{
    double start = spurion_cpu_now(), entries = 0;
    sparse_job job = {.out = out, .f = f, .sae = sae, .g = g};
    for (int t = 0; t < T; t++) {
        entries += held(f, t);
    }
    spurion_each_row(dev, attribute_row, &job, T, (size_t)sae->d * 32);
    spurion_cpu_count(dev, SPURION_CLASS_SAE_SPARSE, start, 2 * entries * sae->d, 4 * (entries + T) * sae->d);
    return spurion_ok();
}

/* x -= factor * row */
static void subtract(float *x, const float *row, float factor, int d)
{
    vf minus = v_set(-factor);
    for (int c = 0; c < d; c += VW) {
        v_store_n(x + c, v_fma(minus, v_load_n(row + c, d - c), v_load_n(x + c, d - c)), d - c);
    }
}

/* Walks the row's entries and the set's members together; both ascend. */
static void subtract_row(void *context, int t)
{
    const sparse_job *j = context;
    int set = j->row_set[t];
    if (set < 0) {
        return;
    }
    size_t at = (size_t)t * (size_t)j->f->slots;
    int m = j->sets->begin[set], end = j->sets->begin[set + 1], n = held(j->f, t);
    for (int s = 0; s < n; s++) {
        int32_t index = j->f->index[at + (size_t)s];
        float value = j->f->value[at + (size_t)s];
        while (m < end && j->sets->index[m] < index) {
            m++;
        }
        if (m < end && j->sets->index[m] == index && value > j->sets->activation_min[m]) {
            subtract(j->out + (size_t)t * (size_t)j->sae->d, decoder_row(j->sae, index), value * j->f->token_scale[t], j->sae->d);
        }
    }
}

spurion_status SPURION_CPU_OP(sae_subtract)(spurion_dev *dev, float *x, const spurion_sparse *f, const spurion_sae_weights *sae,
                                            const spurion_sae_sets *sets, const int32_t *row_set, int T)
{
    double start = spurion_cpu_now();
    sparse_job job = {.out = x, .f = f, .sae = sae, .sets = sets, .row_set = row_set};
    spurion_each_row(dev, subtract_row, &job, T, (size_t)sae->d * 4);
    spurion_cpu_count(dev, SPURION_CLASS_SAE_SPARSE, start, 2.0 * T * sae->d, 12.0 * T * sae->d);
    return spurion_ok();
}

SIMD vf bias_of(const sparse_job *j, int t, int c, int n)
{
    return v_load_n(j->sae->dec_bias + c, n) * j->f->token_scale[t] + j->f->token_shift[t];
}

static void bias_dot_row(void *context, int t)
{
    const sparse_job *j = context;
    const float *g = j->g + (size_t)t * (size_t)j->sae->d;
    vd sum = {0};
    for (int c = 0; c < j->sae->d; c += VW) { /* past the end g is 0 */
        sum += v_widen(bias_of(j, t, c, j->sae->d - c)) * v_widen(v_load_n(g + c, j->sae->d - c));
    }
    j->out[t] = (float)vd_sum(sum);
}

spurion_status SPURION_CPU_OP(sae_bias_dot)(spurion_dev *dev, float *out, const spurion_sparse *f, const spurion_sae_weights *sae,
                                            const float *g, int T)
{
    double start = spurion_cpu_now();
    sparse_job job = {.out = out, .f = f, .sae = sae, .g = g};
    spurion_each_row(dev, bias_dot_row, &job, T, 2 * (size_t)sae->d);
    spurion_cpu_count(dev, SPURION_CLASS_SAE_SPARSE, start, 4.0 * T * sae->d, 4.0 * T * sae->d);
    return spurion_ok();
}

static void shrink_row(void *context, int t)
{
    const sparse_job *j = context;
    float *x = j->out + (size_t)t * (size_t)j->sae->d, keep = 1.0f - j->g[t];
    for (int c = 0; c < j->sae->d; c += VW) {
        int n = j->sae->d - c;
        vf b = bias_of(j, t, c, n);
        v_store_n(x + c, keep == 0.0f ? b : keep * (v_load_n(x + c, n) - b) + b, n);
    }
}

spurion_status SPURION_CPU_OP(sae_shrink)(spurion_dev *dev, float *x, const spurion_sparse *f, const spurion_sae_weights *sae, const float *a,
                                          int T)
{
    double start = spurion_cpu_now();
    sparse_job job = {.out = x, .f = f, .sae = sae, .g = a};
    spurion_each_row(dev, shrink_row, &job, T, 2 * (size_t)sae->d);
    spurion_cpu_count(dev, SPURION_CLASS_SAE_SPARSE, start, 4.0 * T * sae->d, 8.0 * T * sae->d);
    return spurion_ok();
}

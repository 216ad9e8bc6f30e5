/* Activations of the MLP and their gradients: formulas in cpu/activation.c. A thread for four neighbouring elements. Thread: engine. */
#include "kernels/cuda/rows.cuh"

#define SQRT_2_OVER_PI 0.797884560802865356f
#define GELU_CUBE 0.044715f

/* Value and derivative at x. */
static __device__ inline float act(float x, float *slope, spurion_act_kind kind)
{
    float g, x2 = x * x;
    switch (kind) {
    case SPURION_ACT_GELU_TANH:
        g = 1.0f / (1.0f + expf(-2.0f * SQRT_2_OVER_PI * x * (1.0f + GELU_CUBE * x2))); /* (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)) */
        *slope = g + x * g * (1.0f - g) * (2.0f * SQRT_2_OVER_PI * (1.0f + 3.0f * GELU_CUBE * x2));
        return x * g;
    case SPURION_ACT_GELU_ERF:
        g = erff(x * 0.707106781186547524f);
        *slope = 0.5f * (1.0f + g) + x * expf(-0.5f * x2) * 0.398942280401432678f;
        return 0.5f * x * (1.0f + g);
    case SPURION_ACT_SILU:
        g = 1.0f / (1.0f + expf(-x));
        *slope = g * (1.0f + x * (1.0f - g));
        return x * g;
    default:
        *slope = x > 0.0f ? 1.0f : 0.0f;
        return x > 0.0f || x != x ? x : 0.0f;
    }
}

typedef struct act_args {
    void *out;
    const void *pre, *dout;
    int T, F;
    spurion_act_kind kind;
    spurion_dtype dtype, in; /* of out; of pre and dout */
    bool gated, whole;
} act_args;

static __global__ void act_kernel(act_args a)
{
    int quads = (a.F + 3) / 4;
    spurion_place p = spurion_place_of(quads);
    size_t t = (size_t)p.row, F = (size_t)a.F;
    int c = 4 * p.quad, n = a.F - c;
    if (p.row >= a.T) {
        return;
    }
    size_t at = t * F * (a.gated ? 2 : 1) + (size_t)c;
    spurion_four v = spurion_load4_act(a.pre, at, n, a.whole, a.in), up = {{1, 1, 1, 1}};
    if (a.gated) {
        up = spurion_load4_act(a.pre, at + F, n, a.whole, a.in);
    }
    for (int i = 0; i < 4; i++) {
        float slope;
        v.v[i] = act(v.v[i], &slope, a.kind) * up.v[i];
    }
    spurion_store4_act(a.out, t * F + (size_t)c, v, n, a.whole, a.dtype);
}

static __global__ void act_back_kernel(act_args a)
{
    int quads = (a.F + 3) / 4;
    spurion_place p = spurion_place_of(quads);
    size_t t = (size_t)p.row, F = (size_t)a.F;
    int c = 4 * p.quad, n = a.F - c;
    if (p.row >= a.T) {
        return;
    }
    size_t at = t * F * (a.gated ? 2 : 1) + (size_t)c;
    spurion_four gate = spurion_load4_act(a.pre, at, n, a.whole, a.in), d = spurion_load4_act(a.dout, t * F + (size_t)c, n, a.whole, a.in);
    spurion_four up = {{1, 1, 1, 1}}, dup;
    if (a.gated) {
        up = spurion_load4_act(a.pre, at + F, n, a.whole, a.in);
    }
    for (int i = 0; i < 4; i++) {
        float slope, value = act(gate.v[i], &slope, a.kind);
        dup.v[i] = d.v[i] * value;
        d.v[i] = d.v[i] * up.v[i] * slope;
    }
    if (a.gated) {
        spurion_store4_act(a.out, at + F, dup, n, a.whole, a.dtype);
    }
    spurion_store4_act(a.out, at, d, n, a.whole, a.dtype);
}

static spurion_status run(spurion_dev *dev, void (*kernel)(act_args), act_args a, double flops, double bytes)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    double elements = (double)a.T * a.F;
    size_t F = (size_t)a.F;
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    if (a.T > 0) {
        a.whole = spurion_whole(a.out, F, a.F, a.dtype) && spurion_whole(a.pre, F, a.F, a.in) && spurion_whole(a.dout, F, a.F, a.in);
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, kernel, spurion_item_grid((int64_t)a.T * ((a.F + 3) / 4)), SPURION_CUDA_THREADS, 0, a));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_ACTIVATION, flops * elements, bytes * elements);
}

extern "C" spurion_status spurion_cuda_activation(spurion_dev *dev, void *out, const void *pre, spurion_dtype type, int T, int F,
                                                  spurion_act_kind kind, int gated)
{
    act_args a = {out, pre, NULL, T, F, kind, dev->dtype, type, gated != 0, false};
    return run(dev, act_kernel, a, 20, (gated ? 2 : 1) * (double)spurion_dtype_bytes(type) + (double)spurion_dtype_bytes(dev->dtype));
}

extern "C" spurion_status spurion_cuda_activation_backward(spurion_dev *dev, void *dpre, const void *pre, const void *dout, spurion_dtype type,
                                                           int T, int F, spurion_act_kind kind, int gated)
{
    act_args a = {dpre, pre, dout, T, F, kind, dev->dtype, type, gated != 0, false};
    double in = (double)spurion_dtype_bytes(type), out = (double)spurion_dtype_bytes(dev->dtype);
    return run(dev, act_back_kernel, a, 30, (gated ? 2 : 1) * (in + out) + in);
}

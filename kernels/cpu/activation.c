/* Activations of the MLP and their gradients.
 *   gelu tanh: a = x/2 (1 + tanh u), u = s (x + 0.044715 x^3), s = sqrt(2/pi);  da/dx = (1 + tanh u)/2 + x/2 (1 - tanh^2 u) u'
 *   gelu erf:  a = x/2 (1 + erf(x / sqrt 2));                        da/dx = (1 + erf)/2 + x exp(-x^2/2) / sqrt(2 pi)
 *   silu:      a = x g, g = 1 / (1 + e^-x);                          da/dx = g (1 + x (1 - g))
 * Thread: engine. Memory: none. */
#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd.h"

#define SQRT_2_OVER_PI 0.797884560802865356f
#define GELU_CUBE 0.044715f

/* Value and derivative at x. */
SIMD vf gelu_tanh(vf x, vf *slope)
{
    vf x2 = x * x;
    vf t = v_tanh(SQRT_2_OVER_PI * x * (1.0f + GELU_CUBE * x2));
    vf du = SQRT_2_OVER_PI * (1.0f + 3.0f * GELU_CUBE * x2);
    *slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * du;
    return 0.5f * x * (1.0f + t);
}

SIMD vf gelu_erf(vf x, vf *slope)
{
    vf e = v_erf(x * 0.707106781186547524f);
    *slope = 0.5f * (1.0f + e) + x * v_exp(-0.5f * x * x) * 0.398942280401432678f;
    return 0.5f * x * (1.0f + e);
}

SIMD vf silu(vf x, vf *slope)
{
    vf g = v_sigmoid(x);
    *slope = g * (1.0f + x * (1.0f - g));
    return x * g;
}

SIMD vf relu(vf x, vf *slope)
{
    vi positive = x > 0.0f;
    *slope = v_select(positive, v_set(1.0f), v_set(0.0f));
    return v_select(positive, x, v_select(x != x, x, v_set(0.0f)));
}

SIMD vf act(vf x, vf *slope, spurion_act_kind kind)
{
    switch (kind) {
    case SPURION_ACT_GELU_TANH:
        return gelu_tanh(x, slope);
    case SPURION_ACT_GELU_ERF:
        return gelu_erf(x, slope);
    case SPURION_ACT_SILU:
        return silu(x, slope);
    default:
        return relu(x, slope);
    }
}

typedef struct act_job {
    void *out;
    const void *pre, *dout;
    int F, gated;
    spurion_act_kind kind;
    spurion_dtype dtype, in; /* of out; of pre and dout */
} act_job;

SIMD void forward_row(const act_job *j, int t, spurion_act_kind kind)
{
    size_t F = (size_t)j->F, at = (size_t)t * F;
    size_t gate = at * (j->gated ? 2 : 1);
    for (int c = 0; c < j->F; c += VW) {
        int n = j->F - c;
        vf slope, v = act(v_load_act(j->pre, gate + (size_t)c, n, j->in), &slope, kind);
        if (j->gated) {
            v *= v_load_act(j->pre, gate + F + (size_t)c, n, j->in);
        }
        v_store_act(j->out, at + (size_t)c, v, n, j->dtype);
    }
}

static void act_row(void *context, int t)
{
    const act_job *j = context;
    switch (j->kind) { /* one loop per kind, each with the kind's function inlined */
    case SPURION_ACT_GELU_TANH:
        forward_row(j, t, SPURION_ACT_GELU_TANH);
        break;
    case SPURION_ACT_GELU_ERF:
        forward_row(j, t, SPURION_ACT_GELU_ERF);
        break;
    case SPURION_ACT_SILU:
        forward_row(j, t, SPURION_ACT_SILU);
        break;
    default:
        forward_row(j, t, SPURION_ACT_RELU);
        break;
    }
}

SIMD void backward_row(const act_job *j, int t, spurion_act_kind kind)
{
    size_t F = (size_t)j->F, at = (size_t)t * F * (j->gated ? 2 : 1), dout = (size_t)t * F;
    for (int c = 0; c < j->F; c += VW) {
        int n = j->F - c;
        vf slope, value = act(v_load_act(j->pre, at + (size_t)c, n, j->in), &slope, kind), d = v_load_act(j->dout, dout + (size_t)c, n, j->in);
        if (j->gated) {
            v_store_act(j->out, at + F + (size_t)c, d * value, n, j->dtype);
            d *= v_load_act(j->pre, at + F + (size_t)c, n, j->in);
        }
        v_store_act(j->out, at + (size_t)c, d * slope, n, j->dtype);
    }
}

static void act_back_row(void *context, int t)
{
    const act_job *j = context;
    switch (j->kind) {
    case SPURION_ACT_GELU_TANH:
        backward_row(j, t, SPURION_ACT_GELU_TANH);
        break;
    case SPURION_ACT_GELU_ERF:
        backward_row(j, t, SPURION_ACT_GELU_ERF);
        break;
    case SPURION_ACT_SILU:
        backward_row(j, t, SPURION_ACT_SILU);
        break;
    default:
        backward_row(j, t, SPURION_ACT_RELU);
        break;
    }
}

spurion_status SPURION_CPU_OP(activation)(spurion_dev *dev, void *out, const void *pre, spurion_dtype type, int T, int F,
                                          spurion_act_kind kind, int gated)
{
    double start = spurion_cpu_now(), elements = (double)T * F;
    act_job job = {out, pre, NULL, F, gated, kind, dev->dtype, type};
    spurion_each_row(dev, act_row, &job, T, 2 * (size_t)F);
    spurion_cpu_count(dev, SPURION_CLASS_ACTIVATION, start, 20 * elements,
                      elements * ((gated ? 2 : 1) * (double)spurion_dtype_bytes(type) + (double)spurion_dtype_bytes(dev->dtype)));
    return spurion_ok();
}

spurion_status SPURION_CPU_OP(activation_backward)(spurion_dev *dev, void *dpre, const void *pre, const void *dout, spurion_dtype type,
                                                   int T, int F, spurion_act_kind kind, int gated)
{
    double start = spurion_cpu_now(), elements = (double)T * F;
    act_job job = {dpre, pre, dout, F, gated, kind, dev->dtype, type};
    spurion_each_row(dev, act_back_row, &job, T, 4 * (size_t)F);
    spurion_cpu_count(dev, SPURION_CLASS_ACTIVATION, start, 30 * elements,
                      elements * ((gated ? 2 : 1) * (double)(spurion_dtype_bytes(type) + spurion_dtype_bytes(dev->dtype)) +
                                  (double)spurion_dtype_bytes(type)));
    return spurion_ok();
}

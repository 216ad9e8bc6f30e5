/* The table of the CUDA backend: every op, no hole (C++17 has no designated initialisers, hence the assignments; test_table looks for holes). */
#include "kernels/cuda/cuda.cuh"

static spurion_ops make_table(void)
{
    spurion_ops t = {};
    t.name = "cuda";
#define FILL(op) t.op = spurion_cuda_##op
    FILL(destroy);
    FILL(alloc);
    FILL(free);
    FILL(upload);
    FILL(download);
    FILL(download_later);
    FILL(host_alloc);
    FILL(host_free);
    FILL(zero);
    FILL(copy);
    FILL(sync);
    FILL(memory_free);
    FILL(matrix_create);
    FILL(matrix_destroy);
    FILL(matrix_bytes);
    FILL(linear);
    FILL(linear_backward);
    FILL(linear_act);
    FILL(linear_act_backward);
    FILL(embed);
    FILL(gather_rows);
    FILL(scatter_rows);
    FILL(gather_act);
    FILL(cast);
    FILL(add);
    FILL(dot_rows);
    FILL(mean_rows);
    FILL(mean_rows_backward);
    FILL(norm);
    FILL(norm_backward);
    FILL(rope);
    FILL(rope_f32);
    FILL(attention);
    FILL(attention_backward);
    FILL(activation);
    FILL(activation_backward);
    FILL(sae_scratch_bytes);
    FILL(sae_encode);
    FILL(sae_encode_members);
    FILL(sae_attribute);
    FILL(sae_subtract);
    FILL(sae_bias_dot);
    FILL(sae_shrink);
#undef FILL
    return t;
}

extern "C" const spurion_ops *spurion_ops_cuda(void)
{
    static const spurion_ops table = make_table();
    return &table;
}

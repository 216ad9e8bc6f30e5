/* The table of one instruction set: every op, no hole. Compiled once per instruction set. */
#include "kernels/cpu/cpu.h"

static const spurion_ops table = {
    .name = "cpu",
    .destroy = spurion_cpu_destroy,
    .alloc = spurion_cpu_alloc,
    .free = spurion_cpu_free,
    .upload = spurion_cpu_upload,
    .download = spurion_cpu_download,
    .download_later = spurion_cpu_download_later,
    .host_alloc = spurion_cpu_host_alloc,
    .host_free = spurion_cpu_host_free,
    .zero = spurion_cpu_zero,
    .copy = spurion_cpu_copy,
    .sync = spurion_cpu_sync,
    .memory_free = spurion_cpu_memory_free,
    .matrix_create = spurion_cpu_matrix_create,
    .matrix_destroy = spurion_cpu_matrix_destroy,
    .matrix_bytes = spurion_cpu_matrix_bytes,
    .linear = SPURION_CPU_OP(linear),
    .linear_backward = SPURION_CPU_OP(linear_backward),
    .linear_act = SPURION_CPU_OP(linear_act),
    .linear_act_backward = SPURION_CPU_OP(linear_act_backward),
    .embed = SPURION_CPU_OP(embed),
    .gather_rows = SPURION_CPU_OP(gather_rows),
    .scatter_rows = SPURION_CPU_OP(scatter_rows),
    .gather_act = SPURION_CPU_OP(gather_act),
    .cast = SPURION_CPU_OP(cast),
    .add = SPURION_CPU_OP(add),
    .dot_rows = SPURION_CPU_OP(dot_rows),
    .mean_rows = SPURION_CPU_OP(mean_rows),
    .mean_rows_backward = SPURION_CPU_OP(mean_rows_backward),
    .norm = SPURION_CPU_OP(norm),
    .norm_backward = SPURION_CPU_OP(norm_backward),
    .rope = SPURION_CPU_OP(rope),
    .rope_f32 = SPURION_CPU_OP(rope_f32),
    .attention = SPURION_CPU_OP(attention),
    .attention_backward = SPURION_CPU_OP(attention_backward),
    .activation = SPURION_CPU_OP(activation),
    .activation_backward = SPURION_CPU_OP(activation_backward),
    .sae_scratch_bytes = SPURION_CPU_OP(sae_scratch_bytes),
    .sae_encode = SPURION_CPU_OP(sae_encode),
    .sae_encode_members = SPURION_CPU_OP(sae_encode_members),
    .sae_attribute = SPURION_CPU_OP(sae_attribute),
    .sae_subtract = SPURION_CPU_OP(sae_subtract),
    .sae_bias_dot = SPURION_CPU_OP(sae_bias_dot),
    .sae_shrink = SPURION_CPU_OP(sae_shrink),
};

const spurion_ops *SPURION_CPU_OP(table)(void)
{
    return &table;
}

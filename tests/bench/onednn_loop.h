/* One oneDNN inner product, to be run in a loop: what the library itself reaches at a shape. Thread: one. Memory: the primitive and the
 * prepacked weights; source and destination are the caller's. Errors end the program: a benchmark has no use for half a figure. */
#ifndef SPURION_BENCH_ONEDNN_LOOP_H
#define SPURION_BENCH_ONEDNN_LOOP_H

#include <dnnl.h>

typedef struct onednn_loop {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    dnnl_primitive_t primitive;
    dnnl_primitive_desc_t desc;
    dnnl_memory_t src, weights, dst;
} onednn_loop;

/* out (M, N) f32 = x (M, K) w^T, w (N, K) in the library's own layout, zero. type: dnnl_f32 or dnnl_bf16, of x and w. Borrows x and out. */
void onednn_loop_open(onednn_loop *l, int M, int N, int K, dnnl_data_type_t type, void *x, void *out);
void onednn_loop_run(onednn_loop *l);
void onednn_loop_close(onednn_loop *l);

#endif

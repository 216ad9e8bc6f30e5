/* See onednn_loop.h. */
#include "onednn_loop.h"

#include <stdio.h>
#include <stdlib.h>

static void must(dnnl_status_t rc)
{
    if (rc != dnnl_success) {
        fprintf(stderr, "oneDNN status %d\n", (int)rc);
        exit(1);
    }
}

void onednn_loop_open(onednn_loop *l, int M, int N, int K, dnnl_data_type_t type, void *x, void *out)
{
    dnnl_memory_desc_t src, weights, dst;
    dnnl_inner_product_desc_t op;
    dnnl_dims_t a = {M, K}, b = {N, K}, c = {M, N};
    must(dnnl_engine_create(&l->engine, dnnl_cpu, 0));
    must(dnnl_stream_create(&l->stream, l->engine, dnnl_stream_default_flags));
    must(dnnl_memory_desc_init_by_tag(&src, 2, a, type, dnnl_ab));
    must(dnnl_memory_desc_init_by_tag(&weights, 2, b, type, dnnl_format_tag_any));
    must(dnnl_memory_desc_init_by_tag(&dst, 2, c, dnnl_f32, dnnl_ab));
    must(dnnl_inner_product_forward_desc_init(&op, dnnl_forward_inference, &src, &weights, NULL, &dst));
    must(dnnl_primitive_desc_create(&l->desc, &op, NULL, l->engine, NULL));
    must(dnnl_primitive_create(&l->primitive, l->desc));
    must(dnnl_memory_create(&l->src, &src, l->engine, x));
    must(dnnl_memory_create(&l->dst, &dst, l->engine, out));
    must(dnnl_memory_create(&l->weights, dnnl_primitive_desc_query_md(l->desc, dnnl_query_weights_md, 0), l->engine, DNNL_MEMORY_ALLOCATE));
}

void onednn_loop_run(onednn_loop *l)
{
    dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, l->src}, {DNNL_ARG_WEIGHTS, l->weights}, {DNNL_ARG_DST, l->dst}};
    must(dnnl_primitive_execute(l->primitive, l->stream, 3, args));
    must(dnnl_stream_wait(l->stream));
}

void onednn_loop_close(onednn_loop *l)
{
    dnnl_memory_destroy(l->src), dnnl_memory_destroy(l->dst), dnnl_memory_destroy(l->weights);
    dnnl_primitive_destroy(l->primitive), dnnl_primitive_desc_destroy(l->desc);
    dnnl_stream_destroy(l->stream), dnnl_engine_destroy(l->engine);
}

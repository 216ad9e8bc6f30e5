/* Shows what the readers made of a checkpoint, for the golden tests: `readers_dump model DIR OUT` or `readers_dump sae PATH OUT [FORMAT [NORM_FACTOR [unit_decoder]]]`.
 * OUT (a directory that exists) gets raw little-endian f32 arrays NAME.f32; stdout gets one JSON object. Exit 3 with the status on stderr
 * when the readers refuse. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/check.h"
#include "daemon/base/sha256.h"
#include "daemon/model/config.h"
#include "daemon/model/weights.h"
#include "daemon/sae/sae_file.h"

static const char *const role_names[SPURION_ROLE_COUNT] = {
    "embed", "position", "norm1_w", "norm1_b", "norm2_w", "norm2_b", "post_attention_w", "post_mlp_w", "q", "q_b", "k", "k_b", "v", "v_b",
    "o", "o_b", "q_norm", "k_norm", "gate", "up", "gate_b", "up_b", "down", "down_b", "final_w", "final_b", "score", "score_b"};

static void write_array(const char *dir, const char *name, const float *x, size_t count)
{
    char path[4096];
    FILE *file;

    if (x == NULL) {
        return;
    }
    snprintf(path, sizeof path, "%s/%s.f32", dir, name);
    file = fopen(path, "wb");
    SPURION_ASSERT(file != NULL && fwrite(x, sizeof *x, count, file) == count);
    SPURION_ASSERT(fclose(file) == 0);
}

static void print_digest(const unsigned char digest[32])
{
    char hex[65];

    spurion_hex(hex, digest, 32);
    printf("\"digest\":\"%s\"}\n", hex);
}

static void print_config(const spurion_model_config *c, int vocab_rows)
{
    printf("{\"architecture\":\"%s\",\"hidden\":%d,\"layers\":%d,\"heads\":%d,\"kv_heads\":%d,\"head_dim\":%d,\"ff\":%d,\"vocab\":%d,"
           "\"vocab_rows\":%d,\"context\":%d,\"norm\":%d,\"eps\":%.9g,\"norm_plus_one\":%d,\"parallel\":%d,\"shared_norm\":%d,"
           "\"post_norms\":%d,\"qk_norm\":%d,\"position_table\":%d,\"rope\":%d,\"rot\":%d,\"rope_theta\":%.17g,\"rope_scaling\":%d,",
           c->architecture, c->hidden, c->layers, c->heads, c->kv_heads, c->head_dim, c->ff, c->vocab, vocab_rows, c->context, c->norm,
           c->eps, c->norm_plus_one, c->parallel, c->shared_norm, c->post_norms, c->qk_norm, c->position_table, c->rope, c->rot,
           c->rope_theta, c->rope_scaling);
    printf("\"act\":%d,\"gated\":%d,\"embed_scale\":%.9g,\"softcap\":%.9g,\"bias_q\":%d,\"bias_kv\":%d,\"bias_o\":%d,\"bias_mlp\":%d,"
           "\"outputs\":%d,\"head_bias\":%d,\"head_normalized\":%d,\"head_mean\":%.9g,\"head_std\":%.9g,\"bos\":%d,\"pad\":%d,",
           c->act, c->gated, c->embed_scale, c->softcap, c->bias_q, c->bias_kv, c->bias_o, c->bias_mlp, c->outputs, c->head.bias,
           c->head.mean != 0 || c->head.std != 1, c->head.mean, c->head.std, c->bos, c->pad);
    printf("\"eos\":[");
    for (int i = 0; i < c->eos_count; i++) {
        printf("%s%d", i == 0 ? "" : ",", c->eos[i]);
    }
    printf("],\"attention_scale\":[");
    for (int l = 0; l < c->layers; l++) {
        printf("%s%.9g", l == 0 ? "" : ",", c->attention_scale[l]);
    }
    printf("],\"window\":[");
    for (int l = 0; l < c->layers; l++) {
        printf("%s%d", l == 0 ? "" : ",", c->window[l]);
    }
    printf("],");
}

static spurion_status dump_tensors(spurion_weights *w, const spurion_model_config *c, const char *out)
{
    spurion_status st = spurion_ok();
    float *x = NULL;

    for (int r = 0; r < SPURION_ROLE_COUNT; r++) {
        for (int l = 0; l < c->layers; l++) {
            size_t count = spurion_weights_has(w, (spurion_role)r, l) ? spurion_weights_elements(w, (spurion_role)r, l) : 0;
            char name[64];

            if (count == 0) {
                continue;
            }
            x = realloc(x, count * sizeof *x);
            SPURION_ASSERT(x != NULL);
            SPURION_TRY(st, spurion_weights_read(x, w, (spurion_role)r, l));
            snprintf(name, sizeof name, "%s.%d", role_names[r], l);
            write_array(out, name, x, count);
        }
    }
out:
    free(x);
    return st;
}

static spurion_status dump_model(const char *dir, const char *out)
{
    spurion_status st;
    spurion_model_config *c = calloc(1, sizeof *c);
    spurion_weights *w = NULL;
    unsigned char digest[32];
    float *table = NULL;

    SPURION_ASSERT(c != NULL);
    SPURION_TRY(st, spurion_model_config_read(c, dir));
    SPURION_TRY(st, spurion_weights_open(&w, dir, c));
    SPURION_TRY(st, dump_tensors(w, c, out));
    SPURION_TRY(st, spurion_weights_digest(digest, w));
    if (c->rot > 0) {
        table = malloc((size_t)c->context * (size_t)c->rot * sizeof *table);
        SPURION_ASSERT(table != NULL);
        spurion_model_rope_table(table, c, c->context);
        write_array(out, "rope", table, (size_t)c->context * (size_t)c->rot);
    }
    print_config(c, spurion_weights_vocab(w));
    print_digest(digest);
out:
    free(table);
    spurion_weights_close(w);
    free(c);
    return st;
}

static spurion_status dump_sae(const char *path, const char *out, const spurion_sae_options *options)
{
    spurion_status st;
    spurion_sae_file f;

    SPURION_TRY(st, spurion_sae_file_read(&f, path, options));
    write_array(out, "enc", f.enc, (size_t)f.F * (size_t)f.d);
    write_array(out, "dec", f.dec, (size_t)f.F * (size_t)f.d);
    write_array(out, "dec_bias", f.dec_bias, (size_t)f.d);
    write_array(out, "enc_bias", f.enc_bias, (size_t)f.F);
    write_array(out, "threshold", f.threshold, (size_t)f.F);
    write_array(out, "scale", f.scale, (size_t)f.F);
    write_array(out, "gate_bias", f.gate_bias, (size_t)f.F);
    write_array(out, "mag_scale", f.mag_scale, (size_t)f.F);
    write_array(out, "mag_bias", f.mag_bias, (size_t)f.F);
    printf("{\"format\":\"%s\",\"architecture\":\"%s\",\"hook_name\":\"%s\",\"d\":%d,\"F\":%d,\"kind\":%d,\"norm\":%d,\"k\":%d,"
           "\"notes\":\"%s\",", f.format, f.architecture, f.hook_name, f.d, f.F, f.kind, f.norm, f.k, f.notes);
    print_digest(f.digest);
    spurion_sae_file_fini(&f);
out:
    return st;
}

int main(int argc, char **argv)
{
    spurion_status st;
    spurion_sae_options options = {argc > 4 && argv[4][0] != '\0' ? argv[4] : NULL, argc > 5 ? atof(argv[5]) : 0, argc > 6};

    if (argc < 4 || (strcmp(argv[1], "model") != 0 && strcmp(argv[1], "sae") != 0)) {
        fprintf(stderr, "usage: readers_dump model DIR OUT | sae PATH OUT [FORMAT [NORM_FACTOR [unit_decoder]]]\n");
        return 64;
    }
    st = argv[1][0] == 'm' ? dump_model(argv[2], argv[3]) : dump_sae(argv[2], argv[3], &options);
    if (st.code != SPURION_OK) {
        fprintf(stderr, "%s: %s\n", spurion_code_name(st.code), st.message);
        return 3;
    }
    return 0;
}

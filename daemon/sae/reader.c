/* Shared parts of the SAE readers. Thread: one. Memory: arrays by malloc; one block of rows while transposing. */
#include "daemon/sae/reader.h"

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#define WIDTH_MAX (1 << 30)
#define BLOCK_ROWS 64

static spurion_status no_memory(size_t count, const char *what)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %zu numbers of %s", count, what);
}

static spurion_status take_floats(float **out, size_t count, const char *what)
{
    *out = count <= SIZE_MAX / sizeof **out ? malloc(count * sizeof **out) : NULL;
    return *out != NULL ? spurion_ok() : no_memory(count, what);
}

static spurion_status missing(const spurion_safetensors *file, const char *name)
{
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected the tensor %s, found none",
                         spurion_path_tail(spurion_safetensors_path(file)), name);
}

static spurion_status wrong_shape(const spurion_safetensors *file, const spurion_tensor_info *t, const char *expected)
{
    char found[128];

    spurion_tensor_shape_text(found, sizeof found, t);
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s: %s: expected %s, found shape %s",
                         spurion_path_tail(spurion_safetensors_path(file)), t->name, expected, found);
}

bool spurion_sae_has(const spurion_safetensors *file, const char *name)
{
    return spurion_safetensors_find(file, name) != NULL;
}

spurion_status spurion_sae_length(int *out, const spurion_safetensors *file, const char *name)
{
    const spurion_tensor_info *t = spurion_safetensors_find(file, name);

    if (t == NULL) {
        return missing(file, name);
    }
    if (t->rank != 1 || t->shape[0] < 1 || t->shape[0] > WIDTH_MAX) {
        return wrong_shape(file, t, "a vector of 1 to 2^30 elements");
    }
    *out = (int)t->shape[0];
    return spurion_ok();
}

spurion_status spurion_sae_vector(float **out, const spurion_safetensors *file, const char *name, int n, bool optional)
{
    const spurion_tensor_info *t = spurion_safetensors_find(file, name);
    spurion_status st;
    char expected[48];

    *out = NULL;
    if (t == NULL) {
        return optional ? spurion_ok() : missing(file, name);
    }
    if (t->rank != 1 || t->shape[0] != (uint64_t)n) {
        snprintf(expected, sizeof expected, "shape (%d)", n);
        return wrong_shape(file, t, expected);
    }
    SPURION_TRY(st, take_floats(out, (size_t)n, name));
    SPURION_TRY(st, spurion_safetensors_read(*out, file, t, 0, (uint64_t)n));
    SPURION_TRY(st, spurion_check_finite(*out, (size_t)n, name, spurion_safetensors_path(file)));
out:
    if (st.code != SPURION_OK) {
        free(*out);
        *out = NULL;
    }
    return st;
}

/* out (rows, columns) from a tensor stored (columns, rows), BLOCK_ROWS stored rows at a time. */
static spurion_status read_transposed(float *out, const spurion_safetensors *file, const spurion_tensor_info *t, int rows, int columns)
{
    spurion_status st;
    float *block = NULL;

    SPURION_TRY(st, take_floats(&block, (size_t)BLOCK_ROWS * (size_t)rows, t->name));
    for (int c = 0; c < columns; c += BLOCK_ROWS) {
        int part = columns - c < BLOCK_ROWS ? columns - c : BLOCK_ROWS;

        SPURION_TRY(st, spurion_safetensors_read(block, file, t, (uint64_t)c * (uint64_t)rows, (uint64_t)part * (uint64_t)rows));
        for (int r = 0; r < rows; r++) {
            for (int i = 0; i < part; i++) {
                out[(size_t)r * (size_t)columns + (size_t)(c + i)] = block[(size_t)i * (size_t)rows + (size_t)r];
            }
        }
    }
out:
    free(block);
    return st;
}

spurion_status spurion_sae_matrix(float **out, const spurion_safetensors *file, const char *name, int rows, int columns,
                                  bool stored_transposed)
{
    const spurion_tensor_info *t = spurion_safetensors_find(file, name);
    spurion_status st;
    size_t elements = (size_t)rows * (size_t)columns;
    bool straight, turned;
    char expected[96];

    *out = NULL;
    if (t == NULL) {
        return missing(file, name);
    }
    straight = t->rank == 2 && t->shape[0] == (uint64_t)rows && t->shape[1] == (uint64_t)columns;
    turned = t->rank == 2 && t->shape[1] == (uint64_t)rows && t->shape[0] == (uint64_t)columns;
    if (!straight && !turned) {
        snprintf(expected, sizeof expected, "shape (%d, %d)", stored_transposed ? columns : rows, stored_transposed ? rows : columns);
        return wrong_shape(file, t, expected);
    }
    SPURION_TRY(st, take_floats(out, elements, name));
    if ((straight && turned ? stored_transposed : turned) != t->column_major) {
        SPURION_TRY(st, read_transposed(*out, file, t, rows, columns));
    } else {
        SPURION_TRY(st, spurion_safetensors_read(*out, file, t, 0, t->elements));
    }
    SPURION_TRY(st, spurion_check_finite(*out, elements, name, spurion_safetensors_path(file)));
out:
    if (st.code != SPURION_OK) {
        free(*out);
        *out = NULL;
    }
    return st;
}

spurion_status spurion_sae_scalar(double *out, bool *found, const spurion_safetensors *file, const char *name)
{
    const spurion_tensor_info *t = spurion_safetensors_find(file, name);
    spurion_status st = spurion_ok();
    float value = 0;

    *found = t != NULL;
    if (t == NULL) {
        return st;
    }
    if (t->elements != 1) {
        return wrong_shape(file, t, "one number");
    }
    SPURION_TRY(st, spurion_safetensors_read(&value, file, t, 0, 1));
    SPURION_TRY(st, spurion_check_finite(&value, 1, name, spurion_safetensors_path(file)));
    *out = value;
out:
    return st;
}

spurion_status spurion_sae_refuse_others(const spurion_safetensors *file, const char *const *known)
{
    for (int i = 0; i < spurion_safetensors_count(file); i++) {
        const char *name = spurion_safetensors_at(file, i)->name;
        bool found = false;
        char list[256] = "";
        size_t at = 0;

        for (int k = 0; known[k] != NULL; k++) {
            found = found || strcmp(known[k], name) == 0;
            if (at < sizeof list) {
                at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", k == 0 ? "" : ", ", known[k]);
            }
        }
        if (!found) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected the tensors %s only, found %.80s",
                                 spurion_path_tail(spurion_safetensors_path(file)), list, name);
        }
    }
    return spurion_ok();
}

spurion_status spurion_sae_check_size(spurion_json_at at, const char *keys, int found_in_tensors)
{
    spurion_status st;
    int said = found_in_tensors;

    SPURION_TRY(st, spurion_json_opt_int(&said, at, keys, 0, INT_MAX));
    if (said != found_in_tensors && said != 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: %s: expected %d as the tensors have, found %d", spurion_path_tail(at.name),
                           keys, found_in_tensors, said);
    }
out:
    return st;
}

spurion_status spurion_sae_fill(float **out, int n, float value)
{
    spurion_status st = take_floats(out, (size_t)n, "threshold");

    for (int i = 0; st.code == SPURION_OK && i < n; i++) {
        (*out)[i] = value;
    }
    return st;
}

void spurion_sae_note(spurion_sae_file *out, const char *format, ...)
{
    size_t at = strlen(out->notes);
    va_list args;

    if (at > 0 && at + 3 < sizeof out->notes) {
        memcpy(out->notes + at, "; ", 3);
        at += 2;
    }
    va_start(args, format);
    (void)vsnprintf(out->notes + at, sizeof out->notes - at, format, args);
    va_end(args);
}

spurion_status spurion_sae_json(json_t **out, char *path, size_t path_bytes, const char *dir, const char *name)
{
    spurion_status st;

    *out = NULL;
    SPURION_TRY(st, spurion_path_join(path, path_bytes, dir, name));
    SPURION_TRY(st, spurion_json_read(out, path, SPURION_JSON_CONFIG_BYTES_MAX));
    if (!json_is_object(*out)) {
        st = spurion_json_error((spurion_json_at){*out, path}, "the file", "an object", *out);
        json_decref(*out);
        *out = NULL;
    }
out:
    return st;
}

/* --- folding --- */

static double dot(const float *a, const float *b, int n)
{
    double sum = 0;

    for (int i = 0; i < n; i++) {
        sum += (double)a[i] * b[i];
    }
    return sum;
}

/* p = W (u - b_pre) + b = W u + (b - W b_pre): the sum in double, before W is touched. Gated: both biases take their share,
 * pi = W u - W b_pre + gate_bias, magnitude = exp(r_mag) (W u - W b_pre) + mag_bias. */
static void fold_pre_bias(spurion_sae_raw *raw)
{
    for (int i = 0; i < raw->F; i++) {
        double share = dot(raw->enc + (size_t)i * (size_t)raw->d, raw->pre_bias, raw->d);

        if (raw->gate_bias != NULL) {
            raw->gate_bias[i] = (float)(raw->gate_bias[i] - share);
            raw->mag_bias[i] = (float)(raw->mag_bias[i] - exp(raw->r_mag[i]) * share);
        } else {
            raw->enc_bias[i] = (float)(raw->enc_bias[i] - share);
        }
    }
}

/* The encoder's view of its input: W (s (x - mean(x))) = (s (W_i - mean(W_i))) x. */
static void fold_input(spurion_sae_raw *raw)
{
    for (int i = 0; i < raw->F; i++) {
        float *row = raw->enc + (size_t)i * (size_t)raw->d;
        double mean = 0;

        for (int j = 0; j < raw->d && raw->center_input; j++) {
            mean += row[j];
        }
        mean /= raw->d;
        for (int j = 0; j < raw->d; j++) {
            row[j] = (float)(raw->input_scale * (row[j] - mean));
        }
    }
}

/* D_i = W_dec_i output_scale_i / (h_i s), b = b_dec / s. A row of norm 0 stands for nothing: its q is 0, so it never fires. */
static spurion_status fold_decoder(spurion_sae_file *out, spurion_sae_raw *raw)
{
    spurion_status st = spurion_ok();

    if (raw->scale_by_norm) {
        SPURION_TRY(st, take_floats(&out->scale, (size_t)raw->F, "decoder norms"));
    }
    for (int i = 0; i < raw->F; i++) {
        float *row = raw->dec + (size_t)i * (size_t)raw->d;
        double factor = 1 / raw->input_scale;

        if (raw->scale_by_norm) {
            double h = sqrt(dot(row, row, raw->d));

            out->scale[i] = (float)h;
            factor = h > 0 ? factor / h : 0;
        }
        if (raw->output_scale != NULL) {
            factor *= raw->output_scale[i];
        }
        for (int j = 0; j < raw->d && factor != 1; j++) {
            row[j] = (float)(row[j] * factor);
        }
    }
    for (int j = 0; j < raw->d && raw->input_scale != 1; j++) {
        raw->dec_bias[j] = (float)(raw->dec_bias[j] / raw->input_scale);
    }
out:
    return st;
}

static void scale_all(float *x, const float *by, int n)
{
    for (int i = 0; x != NULL && i < n; i++) {
        x[i] *= by[i];
    }
}

/* D_i / n_i and f_i n_i with n_i = |D_i|: biases, thresholds and encoder rows times n_i. A row of norm 0 stays as it is. Top-k and group
 * maximum choose among the features, which other units would change. */
static spurion_status fold_unit_decoder(spurion_sae_file *out, spurion_sae_raw *raw)
{
    spurion_status st;
    float *norm = NULL;

    if (out->kind == SPURION_SAE_TOPK || out->kind == SPURION_SAE_GROUPMAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "unit_decoder: expected a kind whose features do not compete, found %s, which other "
                             "units would change", out->architecture);
    }
    SPURION_TRY(st, take_floats(&norm, (size_t)raw->F, "decoder norms"));
    for (int i = 0; i < raw->F; i++) {
        float *dec = raw->dec + (size_t)i * (size_t)raw->d, *enc = raw->enc + (size_t)i * (size_t)raw->d;
        double n = sqrt(dot(dec, dec, raw->d));

        norm[i] = n > 0 ? (float)n : 1;
        for (int j = 0; j < raw->d; j++) {
            dec[j] = (float)(dec[j] / (n > 0 ? n : 1));
            enc[j] = raw->gate_bias != NULL ? enc[j] : (float)(enc[j] * (n > 0 ? n : 1));
        }
    }
    scale_all(raw->enc_bias, norm, raw->F);
    scale_all(raw->threshold, norm, raw->F);
    scale_all(raw->r_mag, norm, raw->F); /* exp(r_mag) by now */
    scale_all(raw->mag_bias, norm, raw->F);
    spurion_sae_note(out, "features in units of decoder rows of length 1");
out:
    free(norm);
    return st;
}

static void give(float **to, float **from)
{
    *to = *from;
    *from = NULL;
}

/* A product of finite numbers may leave float32's range: exp(r_mag) of a broken file, a scale of 1e30. */
static spurion_status check_folded(const spurion_sae_file *f, const char *where)
{
    spurion_status st = spurion_ok();
    const size_t F = (size_t)f->F, Fd = F * (size_t)f->d;
    const struct {
        const float *x;
        size_t count;
        const char *name;
    } parts[] = {{f->enc, Fd, "folded encoder"},  {f->dec, Fd, "folded decoder"},     {f->dec_bias, (size_t)f->d, "folded decoder bias"},
                 {f->enc_bias, F, "folded bias"}, {f->gate_bias, F, "folded gate bias"}, {f->mag_scale, F, "exp(r_mag)"},
                 {f->mag_bias, F, "folded magnitude bias"}, {f->scale, F, "decoder norm"}, {f->threshold, F, "threshold"}};

    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (parts[i].x != NULL) {
            SPURION_TRY(st, spurion_check_finite(parts[i].x, parts[i].count, parts[i].name, where));
        }
    }
out:
    return st;
}

spurion_status spurion_sae_fold(spurion_sae_file *out, spurion_sae_raw *raw)
{
    spurion_status st = spurion_ok();
    int negative = 0;

    out->d = raw->d;
    out->F = raw->F;
    if (raw->gate_bias == NULL && raw->enc_bias == NULL) {
        SPURION_TRY(st, spurion_sae_fill(&raw->enc_bias, raw->F, 0));
    }
    if (raw->pre_bias != NULL) {
        fold_pre_bias(raw);
        spurion_sae_note(out, "pre-bias folded");
    }
    if (raw->center_input || raw->input_scale != 1) {
        fold_input(raw);
        spurion_sae_note(out, "input%s times %.9g folded", raw->center_input ? " centred and" : "", raw->input_scale);
    }
    SPURION_TRY(st, fold_decoder(out, raw));
    for (int i = 0; raw->r_mag != NULL && i < raw->F; i++) {
        raw->r_mag[i] = (float)exp(raw->r_mag[i]);
    }
    for (int i = 0; raw->threshold != NULL && i < raw->F; i++) {
        negative += raw->threshold[i] < 0;
    }
    if (raw->unit_decoder && !raw->scale_by_norm) {
        SPURION_TRY(st, fold_unit_decoder(out, raw));
    }
    if (negative > 0) {
        spurion_sae_note(out, "warning: %d of %d thresholds below 0 act as 0", negative, raw->F);
    }
    give(&out->enc, &raw->enc);
    give(&out->enc_bias, &raw->enc_bias);
    give(&out->threshold, &raw->threshold);
    give(&out->gate_bias, &raw->gate_bias);
    give(&out->mag_scale, &raw->r_mag);
    give(&out->mag_bias, &raw->mag_bias);
    give(&out->dec, &raw->dec);
    give(&out->dec_bias, &raw->dec_bias);
    SPURION_TRY(st, check_folded(out, out->format));
out:
    return st;
}

void spurion_sae_raw_fini(spurion_sae_raw *raw)
{
    free(raw->enc);
    free(raw->enc_bias);
    free(raw->pre_bias);
    free(raw->dec);
    free(raw->dec_bias);
    free(raw->threshold);
    free(raw->gate_bias);
    free(raw->r_mag);
    free(raw->mag_bias);
    free(raw->output_scale);
    memset(raw, 0, sizeof *raw);
}

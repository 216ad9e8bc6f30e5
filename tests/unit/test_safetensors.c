/* safetensors files: what is legal is read exactly, what is not is refused with what was expected and found. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>

#include "daemon/model/safetensors.h"
#include "tests/unit/checkpoint_place.h"

static spurion_status parse(const char *json, uint64_t data_bytes)
{
    spurion_safetensors *s = NULL;
    spurion_status st = spurion_safetensors_parse(&s, json, strlen(json), 8 + strlen(json) + data_bytes, "x");

    spurion_safetensors_close(s);
    return st;
}

static void refused(const char *json, uint64_t data_bytes, int code, const char *text)
{
    spurion_status st = parse(json, data_bytes);

    if (st.code != code || strstr(st.message, text) == NULL) {
        fail_msg("%s: expected %d and \"%s\", found %d and \"%s\"", json, code, text, st.code, st.message);
    }
}

#define T(offsets, shape, dtype) "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static void test_safetensors_takes_what_is_legal(void **state)
{
    (void)state;
    assert_int_equal(parse("{}", 0).code, SPURION_OK);
    assert_int_equal(parse("{}   ", 0).code, SPURION_OK);
    assert_int_equal(parse("{\"a\":" T("[0,4]", "[]", "F32") "}", 4).code, SPURION_OK);
    assert_int_equal(parse("{\"a\":" T("[0,0]", "[0,18446744073709551615]", "F32") "}", 0).code, SPURION_OK);
    assert_int_equal(parse("{\"z\":" T("[0,4]", "[1]", "F32") ",\"a\":" T("[4,4]", "[0]", "I64") ",\"b\":" T("[4,6]", "[1,1]", "BF16") "}", 6).code,
                     SPURION_OK);
    assert_int_equal(parse("{\"__metadata__\":{\"format\":\"pt\"},\"a\":" T("[0,1]", "[2]", "F4") "}", 1).code, SPURION_OK);
    assert_int_equal(parse("{\"\\u00e9\\ud83d\\ude00\\n\":" T("[0,1]", "[1]", "U8") "}", 1).code, SPURION_OK);
    assert_int_equal(parse("{ \"a\" : { \"shape\" : [ 1 ] , \"data_offsets\" : [ 0 , 1 ] , \"dtype\" : \"I8\" } }", 1).code, SPURION_OK);
}

static void test_safetensors_refuses_each_fault_of_the_header(void **state)
{
    (void)state;
    const int bad = SPURION_INVALID_ARGUMENT;

    refused(" {}", 0, bad, "expected '{' at byte 0");
    refused("[]", 0, bad, "expected '{'");
    refused("", 0, bad, "expected '{'");
    refused("{}\n", 0, bad, "spaces only");
    refused("{}{}", 0, bad, "spaces only");
    refused("{\"a\":1}", 0, bad, "expected '{'");
    refused("{\"a\":" T("[0,4]", "[1]", "F32") ",}", 4, bad, "expected '\"'");
    refused("{\"a\":" T("[0,4]", "[1]", "F99") "}", 4, bad, "found \"F99\"");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, bad, "found no data_offsets");
    refused("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, bad, "found no shape");
    refused("{\"a\":{}}", 4, bad, "found no dtype");
    refused("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, bad, "\"dtype\" twice");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"more\":1}}", 4, bad, "found \"more\"");
    refused("{\"a\":" T("[0,4]", "[1.0]", "F32") "}", 4, bad, "expected ']'");
    refused("{\"a\":" T("[0,4]", "[-1]", "F32") "}", 4, bad, "without sign");
    refused("{\"a\":" T("[0,4]", "[01]", "F32") "}", 4, bad, "leading zeros");
    refused("{\"a\":" T("[0,4]", "[18446744073709551616]", "F32") "}", 4, bad, "below 2^64");
    refused("{\"a\":" T("[0,4]", "[4294967296,4294967296]", "F32") "}", 4, bad, "less than 2^64 elements");
    refused("{\"a\":" T("[0,4]", "[4611686018427387904]", "F64") "}", 4, bad, "bytes below 2^61");
    refused("{\"a\":" T("[0,4]", "[1,1,1,1,1,1,1,1,1]", "F32") "}", 4, bad, "at most 8 dimensions");
    refused("{\"a\":" T("[0,4,8]", "[1]", "F32") "}", 4, bad, "two offsets");
    refused("{\"a\":" T("[0]", "[1]", "F32") "}", 4, bad, "two offsets");
    refused("{\"a\":" T("[0,1]", "[1]", "F4") "}", 1, bad, "whole number of bytes");
    refused("{\"a\":" T("[0,8]", "[1]", "F32") "}", 8, bad, "expected 4 bytes for F32 of shape (1), found 8");
    refused("{\"a\":" T("[4,0]", "[1]", "F32") "}", 4, bad, "expected offsets within");
    refused("{\"a\":" T("[0,8]", "[2]", "F32") "}", 4, SPURION_DATA_LOSS, "found 0 to 8");
    refused("{\"a\":" T("[0,4]", "[1]", "F32") "}", 8, bad, "expected 4 bytes of data as its header says, found 8");
    refused("{\"a\":" T("[4,8]", "[1]", "F32") "}", 8, bad, "a hole");
    refused("{\"a\":" T("[0,4]", "[1]", "F32") ",\"b\":" T("[2,6]", "[1]", "F32") "}", 6, bad, "overlap");
    refused("{\"a\":" T("[0,4]", "[1]", "F32") ",\"b\":" T("[0,4]", "[1]", "F32") "}", 4, bad, "overlap");
    refused("{\"a\":" T("[0,4]", "[1]", "F32") ",\"a\":" T("[4,8]", "[1]", "F32") "}", 8, bad, "found a twice");
    refused("{\"a\":" T("[0,4]", "[1]", "F32") ",\"\\u0061\":" T("[4,8]", "[1]", "F32") "}", 8, bad, "found a twice");
    refused("{\"__metadata__\":{\"k\":1}}", 0, bad, "expected '\"'");
    refused("{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}}", 0, bad, "found \"k\" twice");
    refused("{\"__metadata__\":{},\"__metadata__\":{}}", 0, bad, "__metadata__ once");
    refused("{\"\xff\":" T("[0,0]", "[0]", "F32") "}", 0, bad, "UTF-8");
    refused("{\"\xc0\x80\":" T("[0,0]", "[0]", "F32") "}", 0, bad, "UTF-8");
    refused("{\"\xed\xa0\x80\":" T("[0,0]", "[0]", "F32") "}", 0, bad, "UTF-8");
    refused("{\"\\ud800\":" T("[0,0]", "[0]", "F32") "}", 0, bad, "surrogate");
    refused("{\"\\u0000\":" T("[0,0]", "[0]", "F32") "}", 0, bad, "NUL");
    refused("{\"a", 0, bad, "the end of a string");
}

static void test_safetensors_limits_names_and_their_number(void **state)
{
    char json[1024], name[300];
    char *many = malloc((size_t)(SPURION_TENSOR_COUNT_MAX + 1) * 80);
    size_t at = 1;
    (void)state;

    memset(name, 'n', sizeof name);
    name[SPURION_TENSOR_NAME_BYTES_MAX] = '\0';
    snprintf(json, sizeof json, "{\"%s\":" T("[0,0]", "[0]", "F32") "}", name);
    assert_int_equal(parse(json, 0).code, SPURION_OK);
    snprintf(json, sizeof json, "{\"%sx\":" T("[0,0]", "[0]", "F32") "}", name);
    refused(json, 0, SPURION_INVALID_ARGUMENT, "names of at most 256 bytes, found 257");
    many[0] = '{';
    for (int i = 0; i <= SPURION_TENSOR_COUNT_MAX; i++) {
        at += (size_t)sprintf(many + at, "%s\"%d\":" T("[0,0]", "[0]", "F32"), i == 0 ? "" : ",", i);
    }
    strcpy(many + at, "}");
    refused(many, 0, SPURION_INVALID_ARGUMENT, "at most 100000 tensors");
    free(many);
}

static void file_refused(const place *p, const void *data, size_t bytes, int code, const char *text)
{
    spurion_safetensors *s = NULL;
    char path[512];
    spurion_status st;

    place_write(p, "f.safetensors", data, bytes);
    st = spurion_safetensors_open(&s, place_path(path, p, "f.safetensors"));
    assert_null(s);
    if (st.code != code || strstr(st.message, text) == NULL) {
        fail_msg("expected %d and \"%s\", found %d and \"%s\"", code, text, st.code, st.message);
    }
}

static void test_safetensors_refuses_broken_files(void **state)
{
    place p;
    char path[512], link_path[512];
    spurion_safetensors *s = NULL;
    (void)state;

    place_make(&p);
    file_refused(&p, "", 0, SPURION_DATA_LOSS, "at least 8 bytes");
    file_refused(&p, "\x02\0\0\0\0\0\0", 7, SPURION_DATA_LOSS, "at least 8 bytes");
    file_refused(&p, "\x03\0\0\0\0\0\0\0{}", 10, SPURION_DATA_LOSS, "it is truncated");
    file_refused(&p, "\x01\0\0\x01\0\0\0\0{}", 10, SPURION_INVALID_ARGUMENT, "at most 16777216 bytes, found 16777217");
    file_refused(&p, "\xff\xff\xff\xff\xff\xff\xff\xff{}", 10, SPURION_INVALID_ARGUMENT, "found 18446744073709551615");
    file_refused(&p, "\x02\0\0\0\0\0\0\0{}x", 11, SPURION_INVALID_ARGUMENT, "expected 0 bytes of data");
    assert_int_equal(spurion_safetensors_open(&s, p.dir).code, SPURION_INVALID_ARGUMENT);
    assert_int_equal(spurion_safetensors_open(&s, place_path(path, &p, "none")).code, SPURION_NOT_FOUND);
    assert_int_equal(mkfifo(place_path(path, &p, "pipe"), 0600), 0);
    assert_int_equal(spurion_safetensors_open(&s, path).code, SPURION_INVALID_ARGUMENT); /* and does not wait for a writer */
    place_write(&p, "good", "\x02\0\0\0\0\0\0\0{}", 10);
    assert_int_equal(symlink("good", place_path(link_path, &p, "link")), 0);
    assert_int_equal(spurion_safetensors_open(&s, link_path).code, SPURION_OK); /* a Hugging Face cache is made of links */
    spurion_safetensors_close(s);
    place_drop(&p);
}

static void test_safetensors_reads_every_dtype(void **state)
{
    static const char header[] =
        "{\"f64\":" T("[0,16]", "[2]", "F64") ",\"i64\":" T("[16,24]", "[1]", "I64") ",\"i32\":" T("[24,28]", "[]", "I32") ",\"f32\":" T(
            "[28,36]", "[1,2]", "F32") ",\"f16\":" T("[36,46]", "[5]", "F16") ",\"bf16\":" T("[46,50]", "[2]", "BF16") ",\"u8\":" T("[50,51]", "[1]", "U8") "}";
    const double f64[2] = {0.1, -1e300};
    const int64_t i64 = -16777217;
    const int32_t i32 = 32;
    const float f32[2] = {1.5f, -0.0f};
    const uint16_t f16[5] = {0x3c00, 0xc500, 0x0001, 0x7bff, 0x7c00}, bf16[2] = {0x3fc0, 0xc2c8};
    unsigned char file[1024] = {(unsigned char)(sizeof header - 1), (sizeof header - 1) >> 8}, *at = file + 8 + sizeof header - 1;
    float x[5];
    place p;
    char path[512];
    spurion_safetensors *s = NULL;
    spurion_status st;
    (void)state;

    memcpy(file + 8, header, sizeof header - 1);
    memcpy(at, f64, 16);
    memcpy(at + 16, &i64, 8);
    memcpy(at + 24, &i32, 4);
    memcpy(at + 28, f32, 8);
    memcpy(at + 36, f16, 10);
    memcpy(at + 46, bf16, 4);
    place_make(&p);
    place_write(&p, "t", file, 8 + sizeof header - 1 + 51);
    assert_int_equal(spurion_safetensors_open(&s, place_path(path, &p, "t")).code, SPURION_OK);
    assert_int_equal(spurion_safetensors_count(s), 7);
    assert_int_equal(spurion_safetensors_read(x, s, spurion_safetensors_find(s, "f64"), 0, 2).code, SPURION_OK);
    assert_true(x[0] == 0.1f && isinf(x[1]));
    assert_int_equal(spurion_safetensors_read(x, s, spurion_safetensors_find(s, "i64"), 0, 1).code, SPURION_OK);
    assert_true(x[0] == -16777216.0f);
    assert_int_equal(spurion_safetensors_read(x, s, spurion_safetensors_find(s, "i32"), 0, 1).code, SPURION_OK);
    assert_true(x[0] == 32);
    assert_int_equal(spurion_safetensors_read(x, s, spurion_safetensors_find(s, "f32"), 1, 1).code, SPURION_OK);
    assert_true(x[0] == 0 && signbit(x[0]));
    assert_int_equal(spurion_safetensors_read(x, s, spurion_safetensors_find(s, "f16"), 0, 5).code, SPURION_OK);
    assert_true(x[0] == 1 && x[1] == -5 && x[2] == 0x1p-24f && x[3] == 65504 && isinf(x[4]));
    st = spurion_check_finite(x, 5, "f16", "t");
    assert_non_null(strstr(st.message, "found infinity at element 4"));
    assert_int_equal(spurion_safetensors_read(x, s, spurion_safetensors_find(s, "bf16"), 0, 2).code, SPURION_OK);
    assert_true(x[0] == 1.5f && x[1] == -100);
    st = spurion_safetensors_read(x, s, spurion_safetensors_find(s, "u8"), 0, 1);
    assert_int_equal(st.code, SPURION_UNIMPLEMENTED);
    assert_non_null(strstr(st.message, "expected dtype F32, F16, BF16, F64, I32 or I64, found U8"));
    assert_int_equal(spurion_safetensors_read(x, s, spurion_safetensors_find(s, "f32"), 1, 2).code, SPURION_OUT_OF_RANGE);
    assert_null(spurion_safetensors_find(s, "f3"));
    assert_int_equal(truncate(path, 8 + (off_t)sizeof header - 1 + 30), 0); /* under us */
    assert_int_equal(spurion_safetensors_read(x, s, spurion_safetensors_find(s, "f32"), 0, 2).code, SPURION_DATA_LOSS);
    assert_int_equal(spurion_safetensors_read(x, s, spurion_safetensors_find(s, "bf16"), 0, 2).code, SPURION_DATA_LOSS);
    spurion_safetensors_close(s);
    place_drop(&p);
}

#define LONG_COUNT ((4u << 20) + 12345) /* elements: read in parts by several threads */

static uint16_t long_bits(uint64_t i)
{
    return (uint16_t)((i * 2654435761u >> 13) & 0xbf7f); /* the lowest bit of the exponent is 0: finite */
}

/* A tensor that is read in parts: every value where it stands, from the front, from the middle, of a file cut under us. */
static void test_safetensors_reads_long_tensors_in_parts(void **state)
{
    char header[128], path[512];
    int n = snprintf(header, sizeof header, "{\"t\":{\"dtype\":\"BF16\",\"shape\":[%u],\"data_offsets\":[0,%u]}}", LONG_COUNT, 2 * LONG_COUNT);
    unsigned char *file = malloc(8 + (size_t)n + 2 * LONG_COUNT);
    float *x = malloc(LONG_COUNT * sizeof *x);
    spurion_safetensors *s = NULL;
    spurion_status st;
    place p;

    (void)state;
    assert_true(file != NULL && x != NULL);
    memset(file, 0, 8);
    file[0] = (unsigned char)n;
    memcpy(file + 8, header, (size_t)n);
    for (uint64_t i = 0; i < LONG_COUNT; i++) {
        uint16_t half = long_bits(i);
        memcpy(file + 8 + n + 2 * i, &half, sizeof half);
    }
    place_make(&p);
    place_write(&p, "t", file, 8 + (size_t)n + 2 * LONG_COUNT);
    assert_int_equal(spurion_safetensors_open(&s, place_path(path, &p, "t")).code, SPURION_OK);
    for (uint64_t first = 0; first < 2; first++) {
        assert_int_equal(spurion_safetensors_read(x, s, spurion_safetensors_find(s, "t"), first * 77, LONG_COUNT - first * 77).code, SPURION_OK);
        for (uint64_t i = 0; i < LONG_COUNT - first * 77; i++) {
            uint32_t word;
            memcpy(&word, &x[i], sizeof word);
            assert_true(word == (uint32_t)long_bits(i + first * 77) << 16);
        }
    }
    assert_int_equal(spurion_check_finite(x, LONG_COUNT - 77, "t", path).code, SPURION_OK);
    x[LONG_COUNT - 100] = NAN;
    x[(3u << 20) + 1] = INFINITY;
    st = spurion_check_finite(x, LONG_COUNT - 77, "t", path);
    assert_int_equal(st.code, SPURION_INVALID_ARGUMENT);
    assert_non_null(strstr(st.message, "found infinity at element 3145729"));
    x[(3u << 20) + 1] = 0;
    st = spurion_check_finite(x, LONG_COUNT - 77, "t", path);
    assert_non_null(strstr(st.message, "found NaN at element 4206549"));
    assert_int_equal(truncate(path, 8 + n + 2 * (off_t)LONG_COUNT - 2), 0);
    assert_int_equal(spurion_safetensors_read(x, s, spurion_safetensors_find(s, "t"), 0, LONG_COUNT).code, SPURION_DATA_LOSS);
    spurion_safetensors_close(s);
    place_drop(&p);
    free(file);
    free(x);
}

static void index_refused(const place *p, const char *index, int code, const char *text)
{
    spurion_shards *s = NULL;
    spurion_status st;

    place_text(p, "model.safetensors.index.json", index);
    st = spurion_shards_open(&s, p->dir);
    assert_null(s);
    if (st.code != code || strstr(st.message, text) == NULL) {
        fail_msg("%s: expected %d and \"%s\", found %d and \"%s\"", index, code, text, st.code, st.message);
    }
}

static void test_safetensors_index_names_files_beside_it_only(void **state)
{
    const int bad = SPURION_INVALID_ARGUMENT;
    spurion_shards *s = NULL;
    const spurion_safetensors *file = NULL;
    bundle *b = malloc(sizeof *b);
    place p;
    (void)state;

    place_make(&p);
    index_refused(&p, "{\"weight_map\":{\"a\":\"../x.safetensors\"}}", bad, "expected the name of a file beside it");
    index_refused(&p, "{\"weight_map\":{\"a\":\"/etc/passwd\"}}", bad, "expected the name of a file beside it");
    index_refused(&p, "{\"weight_map\":{\"a\":\"..\"}}", bad, "expected the name of a file beside it");
    index_refused(&p, "{\"weight_map\":{\"a\":1}}", bad, "found no string");
    index_refused(&p, "{\"weight_map\":{}}", bad, "expected tensors, found none");
    index_refused(&p, "{\"weight_map\":[]}", bad, "found a list of 0");
    index_refused(&p, "{}", bad, "found nothing");
    index_refused(&p, "{\"weight_map\":{\"a\":\"s\",\"a\":\"s\"}}", bad, "duplicate");
    index_refused(&p, "{\"weight_map\":{\"a\":\"s\"}}", SPURION_NOT_FOUND, "/s: expected");
    bundle_start(b);
    bundle_add(b, "a", 2, 0, 1, 1);
    bundle_write(b, &p, "s", 0);
    index_refused(&p, "{\"weight_map\":{\"b\":\"s\"}}", bad, "expected the tensor b as the index says");
    bundle_start(b);
    bundle_add(b, "c", 2, 0, 1, 1);
    bundle_write(b, &p, "r", 0);
    place_text(&p, "model.safetensors.index.json", "{\"metadata\":{\"total_size\":16},\"weight_map\":{\"a\":\"s\",\"c\":\"r\"}}");
    assert_int_equal(spurion_shards_open(&s, p.dir).code, SPURION_OK);
    assert_int_equal(spurion_shards_count(s), 2);
    assert_non_null(spurion_shards_find(&file, s, "c"));
    assert_ptr_equal(file, spurion_shards_at(s, 0));
    assert_null(spurion_shards_find(&file, s, "b"));
    spurion_shards_close(s);
    place_drop(&p);
    free(b);
}

static void test_safetensors_directory_of_pickles_names_the_converter(void **state)
{
    spurion_shards *s = NULL;
    spurion_status st;
    place p;
    (void)state;

    place_make(&p);
    assert_int_equal(spurion_shards_open(&s, p.dir).code, SPURION_NOT_FOUND);
    place_text(&p, "pytorch_model.bin", "PK");
    st = spurion_shards_open(&s, p.dir);
    assert_int_equal(st.code, SPURION_FAILED_PRECONDITION);
    assert_non_null(strstr(st.message, "python -m spurion.convert"));
    place_drop(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_safetensors_takes_what_is_legal),
        cmocka_unit_test(test_safetensors_refuses_each_fault_of_the_header),
        cmocka_unit_test(test_safetensors_limits_names_and_their_number),
        cmocka_unit_test(test_safetensors_refuses_broken_files),
        cmocka_unit_test(test_safetensors_reads_every_dtype),
        cmocka_unit_test(test_safetensors_reads_long_tensors_in_parts),
        cmocka_unit_test(test_safetensors_index_names_files_beside_it_only),
        cmocka_unit_test(test_safetensors_directory_of_pickles_names_the_converter),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* The table of ops has no hole; devices open by name and say what they are; the profile is filled. */
#include "kernel_test.h"

/* Every entry is a pointer; a hole would be a word of zeros. */
static void check_table(const spurion_ops *ops)
{
    enum { ENTRIES = sizeof(spurion_ops) / sizeof(void (*)(void)) };
    void (*entry[ENTRIES])(void);
    _Static_assert(sizeof entry == sizeof(spurion_ops), "the table holds pointers only");
    memcpy(entry, ops, sizeof entry);
    for (size_t i = 0; i < ENTRIES; i++) {
        if (entry[i] == NULL) {
            fail_msg("entry %zu of %d of the table \"%s\" is empty", i, ENTRIES, ops->name);
        }
    }
}

static void test_table_has_no_hole(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_F32, 1);
    check_table(t.ops);
    check_table(spurion_ops_cpu());
#if defined(SPURION_WITH_CUDA)
    check_table(spurion_ops_cuda()); /* needs no device */
#endif
    kt_close(&t);
}

static void test_table_devices_open_by_name(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int code;
    } names[] = {{"gpu", SPURION_INVALID_ARGUMENT}, {"", SPURION_INVALID_ARGUMENT}, {"cuda", SPURION_INVALID_ARGUMENT},
                 {"cuda:-1", SPURION_INVALID_ARGUMENT}, {"cuda:0x", SPURION_INVALID_ARGUMENT}, {"cpu ", SPURION_INVALID_ARGUMENT}};
    spurion_dev *dev;
    for (size_t i = 0; i < KT_COUNT(names); i++) {
        spurion_status st = spurion_dev_create(&dev, names[i].name, SPURION_F32, 1);
        assert_int_equal(st.code, names[i].code);
        assert_null(dev);
    }
    assert_int_equal(spurion_dev_create(&dev, "cpu", (spurion_dtype)7, 1).code, SPURION_INVALID_ARGUMENT);
#if !defined(SPURION_WITH_CUDA)
    if (kt_on_cpu()) { /* a program under test on another device holds its backend */
        spurion_status st = spurion_dev_create(&dev, "cuda:0", SPURION_F32, 1);
        assert_int_equal(st.code, SPURION_UNIMPLEMENTED);
        assert_non_null(strstr(st.message, "no CUDA backend"));
    }
#endif
    spurion_dev_destroy(NULL);
}

static void test_table_device_names_its_instructions_and_workers(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_BF16, 3);
    assert_int_equal(t.dev->dtype, SPURION_BF16);
    assert_true(t.dev->row_chunk > 0);
    assert_int_equal(t.dev->own_memory, !kt_on_cpu());
    if (kt_on_cpu()) {
        assert_int_equal(t.dev->thread_count, 3);
        assert_non_null(strstr(t.dev->name, "cpu "));
        assert_non_null(strstr(t.dev->name, " 3 threads"));
    } else {
        assert_non_null(strstr(t.dev->name, "cuda:"));
    }
    kt_close(&t);
    kt_open(&t, SPURION_F32, 0);
    assert_true(t.dev->thread_count >= 1);
    kt_close(&t);
}

static void test_table_refuses_an_unknown_instruction_set(void **state)
{
    (void)state;
    char *old = getenv("SPURION_CPU_ISA"), keep[64] = "";
    spurion_dev *dev;
    if (old != NULL) {
        snprintf(keep, sizeof keep, "%s", old);
    }
    setenv("SPURION_CPU_ISA", "z80", 1);
    spurion_status st = spurion_dev_create(&dev, "cpu", SPURION_F32, 1);
    assert_int_equal(st.code, SPURION_INVALID_ARGUMENT);
    assert_non_null(strstr(st.message, "z80"));
    assert_null(dev);
    if (old != NULL) {
        setenv("SPURION_CPU_ISA", keep, 1);
    } else {
        unsetenv("SPURION_CPU_ISA");
    }
}

static void test_table_profile_counts_calls_time_and_work(void **state)
{
    (void)state;
    kt t;
    kt_open(&t, SPURION_F32, 2);
    float *w = kt_floats(&t, 100 * 50, 1.0);
    spurion_matrix *m;
    KT_OK(t.ops->matrix_create(t.dev, &m, w, NULL, 100, 50, SPURION_FORWARD, SPURION_F32));
    void *x = kt_in(&t, w, 20 * 50 * 4), *out = kt_out(&t, 20 * 100 * 4);
    KT_OK(t.ops->linear(t.dev, out, SPURION_F32, 100, x, m, 20, SPURION_OVERWRITE));
    KT_OK(t.ops->sync(t.dev));
    assert_true(kt_on_cpu() || t.dev->profile.seconds[SPURION_CLASS_GEMM] == 0); /* nobody asked a device for its times */
    memset(&t.dev->profile, 0, sizeof t.dev->profile);
    t.dev->timed = true;
    KT_OK(t.ops->linear(t.dev, out, SPURION_F32, 100, x, m, 20, SPURION_OVERWRITE));
    KT_OK(t.ops->linear(t.dev, out, SPURION_F32, 100, x, m, 20, SPURION_OVERWRITE));
    KT_OK(t.ops->sync(t.dev)); /* a device's times are known when it has been waited for */
    const spurion_profile *p = &t.dev->profile;
    assert_int_equal(p->calls[SPURION_CLASS_GEMM], 2);
    assert_true(p->flops[SPURION_CLASS_GEMM] == 2 * 2.0 * 20 * 100 * 50);
    assert_true(p->seconds[SPURION_CLASS_GEMM] > 0 && p->bytes[SPURION_CLASS_GEMM] > 0);
    assert_int_equal(p->calls[SPURION_CLASS_ATTENTION], 0);
    double moves = 0, before = p->seconds[SPURION_CLASS_MOVE];
    for (int i = 0; i < 3000; i++) { /* more than the timers that a device makes at once, none of them waited for */
        KT_OK(t.ops->zero(t.dev, out, 4));
        moves += 1;
    }
    KT_OK(t.ops->sync(t.dev));
    assert_true(p->calls[SPURION_CLASS_MOVE] == moves && p->seconds[SPURION_CLASS_MOVE] > before);
    t.ops->matrix_destroy(t.dev, m);
    free(w);
    kt_close(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_table_has_no_hole),
        cmocka_unit_test(test_table_devices_open_by_name),
        cmocka_unit_test(test_table_device_names_its_instructions_and_workers),
        cmocka_unit_test(test_table_refuses_an_unknown_instruction_set),
        cmocka_unit_test(test_table_profile_counts_calls_time_and_work),
    };
    return cmocka_run_group_tests_name("table", tests, NULL, NULL);
}

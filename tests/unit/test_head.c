/* When a score head looks untrained: fresh heads of every law are found, heads that training moved are not. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <cmocka.h>
#include <math.h>
#include <string.h>

#include "daemon/model/head.h"

#define DRAWS 300
#define WIDTH_MAX 4096

static uint64_t state;

static double uniform(void) /* (0, 1) */
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return ((double)(state >> 11) + 0.5) / 9007199254740992.0;
}

static double normal(void)
{
    return sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform());
}

typedef enum law { TRANSFORMERS, OPENRLHF, TORCH } law;

static double draw(law l, int width)
{
    switch (l) {
    case TRANSFORMERS: return 0.02 * normal();
    case OPENRLHF: return normal() / (width + 1);
    default: return (2 * uniform() - 1) / sqrt(width);
    }
}

/* In how many of DRAWS heads of one output the law is found. moved: what training adds, in units of the numbers' own deviation. */
static int found(law l, int width, double moved, float bias, bool rounded)
{
    static float w[WIDTH_MAX];
    const spurion_head head = {.init_range = 0.02};
    double deviation = l == TRANSFORMERS ? 0.02 : l == OPENRLHF ? 1.0 / (width + 1) : 1 / sqrt(3.0 * width);
    int count = 0;

    for (int n = 0; n < DRAWS; n++) {
        for (int i = 0; i < width; i++) {
            uint32_t u;

            w[i] = (float)(draw(l, width) + moved * deviation * normal());
            memcpy(&u, &w[i], sizeof u);
            u = rounded ? (u + 0x8000) & 0xffff0000u : u; /* as a bfloat16 file holds them */
            memcpy(&w[i], &u, sizeof u);
        }
        count += spurion_head_fresh(&head, w, (size_t)width, (size_t)width, &bias, 1) != NULL;
    }
    return count;
}

static void test_head_fresh_ones_are_found(void **unused)
{
    (void)unused;
    state = 0x9e3779b97f4a7c15u;
    for (law l = TRANSFORMERS; l <= TORCH; l++) {
        for (int width = 64; width <= WIDTH_MAX; width *= 4) {
            assert_true(found(l, width, 0, 0, false) >= DRAWS * 96 / 100);
            assert_true(found(l, width, 0, 0, true) >= DRAWS * 96 / 100);
        }
    }
    assert_true(found(TORCH, 1024, 0, 0.02F, false) >= DRAWS * 96 / 100); /* torch draws its bias too */
}

static void test_head_trained_ones_are_not(void **unused)
{
    (void)unused;
    state = 0xd1b54a32d192ed03u;
    assert_int_equal(found(TRANSFORMERS, 4096, 0.7, 0, false), 0);
    assert_int_equal(found(OPENRLHF, 4096, 0.7, 0, false), 0);
    assert_int_equal(found(TORCH, 1024, 0.3, 0, false), 0);
    assert_int_equal(found(TRANSFORMERS, 1024, 3, 0, false), 0);
    assert_int_equal(found(TRANSFORMERS, 1024, 0, 0.1F, false), 0); /* transformers starts a bias at 0 */
    assert_int_equal(found(TRANSFORMERS, 63, 0, 0, false), 0);      /* too few to say */
}

static void test_head_other_range(void **unused)
{
    static float w[1024];
    const spurion_head wide = {.init_range = 0.5}, none = {.init_range = 0};
    const float bias = 0;

    (void)unused;
    state = 0x2545f4914f6cdd1du;
    for (int i = 0; i < 1024; i++) {
        w[i] = (float)(0.5 * normal());
    }
    assert_non_null(strstr(spurion_head_fresh(&wide, w, 1024, 1024, &bias, 1), "initializer_range"));
    assert_null(spurion_head_fresh(&none, w, 1024, 1024, &bias, 1));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_head_fresh_ones_are_found),
        cmocka_unit_test(test_head_trained_ones_are_not),
        cmocka_unit_test(test_head_other_range),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* What the tests of the store share: a directory of its own for each test, small rows and batches. Included once per program. */
#ifndef SPURION_TESTS_STORE_PLACE_H
#define SPURION_TESTS_STORE_PLACE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "daemon/store.h"

#define SEED 88172645463325252ull
#define assert_ok(expr)                                                                                                            \
    do {                                                                                                                           \
        spurion_status assert_ok_st = (expr);                                                                                      \
        if (assert_ok_st.code != SPURION_OK) {                                                                                     \
            fail_msg("%s: %d %s", #expr, assert_ok_st.code, assert_ok_st.message);                                                 \
        }                                                                                                                          \
    } while (0)
#define assert_code(expected, expr)                                                                                                \
    do {                                                                                                                           \
        spurion_status assert_code_st = (expr);                                                                                    \
        if (assert_code_st.code != (int)(expected)) {                                                                              \
            fail_msg("%s: expected %d, found %d %s", #expr, (int)(expected), assert_code_st.code, assert_code_st.message);         \
        }                                                                                                                          \
    } while (0)

/* A directory of its own for each test, removed with it. */
typedef struct place {
    char root[256], path[512];
    spurion_arena arena;
} place;

static inline spurion_bytes text(const char *s)
{
    spurion_bytes b = {s, strlen(s)};
    return b;
}

static inline bool equal(spurion_bytes a, spurion_bytes b)
{
    return a.size == b.size && (a.size == 0 || memcmp(a.data, b.data, a.size) == 0);
}

static inline uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static inline int place_make(void **state)
{
    place *p = calloc(1, sizeof *p);
    const char *tmp = getenv("TMPDIR");
    (void)snprintf(p->root, sizeof p->root, "%s/spurion-store-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(p->root)) {
        return -1;
    }
    (void)snprintf(p->path, sizeof p->path, "%s/a/store", p->root);
    spurion_arena_init(&p->arena, 0);
    *state = p;
    return 0;
}

static inline int place_remove(void **state)
{
    place *p = *state;
    char command[300];
    (void)snprintf(command, sizeof command, "rm -rf '%s'", p->root);
    spurion_arena_fini(&p->arena);
    free(p);
    return system(command);
}

static inline spurion_status try_open(spurion_store **s, const place *p)
{
    spurion_store_options o = {p->path, false, 1 << 20};
    return spurion_store_open(s, &o);
}

static inline spurion_store *open_store(const place *p)
{
    spurion_store *s = NULL;
    assert_ok(try_open(&s, p));
    return s;
}

static inline spurion_store_row make_row(const char *run, int64_t step, const char *group, const char *id, uint8_t content)
{
    spurion_store_row row;
    memset(&row, 0, sizeof row);
    row.identity = (spurion_identity){text(run), text(group), text(id), step, 0};
    memset(row.digest, content, sizeof row.digest);
    row.time_ms = 1000 + step;
    row.reward = 1;
    row.counterfactual_reward = 0.5f;
    row.effect = -0.5f;
    row.verdict = text("verdict");
    return row;
}

static inline spurion_store_batch make_batch(spurion_store_row *rows, int32_t count)
{
    static const spurion_bytes rules[] = {{"url", 3}, {"flip", 4}};
    spurion_store_batch b;
    memset(&b, 0, sizeof b);
    b.rows = rows;
    b.row_count = count;
    b.rules = rules;
    b.rule_count = 2;
    return b;
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, place_make, place_remove)

#endif

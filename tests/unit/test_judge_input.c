/* What judge reads with and remembers by: bounded lines over a pipe, and the set of names seen. */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "daemon/line_reader.h"
#include "daemon/name_set.h"
#include "spurion/limits.h"

static void put(int fd, const char *text)
{
    assert_int_equal(write(fd, text, strlen(text)), (ssize_t)strlen(text));
}

static void expect_line(spurion_line_reader *r, const char *text)
{
    spurion_line line;
    assert_int_equal(spurion_line_next(&line, r).code, SPURION_OK);
    assert_false(line.none || line.too_long);
    assert_int_equal(line.size, strlen(text));
    assert_memory_equal(line.data, text, line.size);
}

static void test_line_reader_gives_lines_as_they_come(void **state)
{
    spurion_line_reader r;
    spurion_line line;
    int ends[2];

    (void)state;
    assert_int_equal(pipe(ends), 0);
    spurion_line_reader_init(&r, ends[0]);
    assert_true(spurion_line_would_wait(&r));
    put(ends[1], "one\n\ntwo\r\nthr");
    assert_false(spurion_line_would_wait(&r));
    expect_line(&r, "one");
    expect_line(&r, "");
    assert_false(spurion_line_would_wait(&r));
    expect_line(&r, "two\r");
    assert_true(spurion_line_would_wait(&r)); /* a line has begun, its end has not come */
    put(ends[1], "ee\nlast");
    expect_line(&r, "three");
    assert_int_equal(close(ends[1]), 0);
    expect_line(&r, "last"); /* needs no line end */
    for (int i = 0; i < 2; i++) {
        assert_int_equal(spurion_line_next(&line, &r).code, SPURION_OK);
        assert_true(line.none);
    }
    spurion_line_reader_fini(&r);
    assert_int_equal(close(ends[0]), 0);
}

static void test_line_reader_keeps_no_line_over_the_limit(void **state)
{
    char path[] = "/tmp/spurion-lines-XXXXXX", *block = malloc(1 << 20);
    int fd = mkstemp(path);
    spurion_line_reader r;
    spurion_line line;

    (void)state;
    assert_non_null(block);
    assert_true(fd >= 0);
    memset(block, 'x', 1 << 20);
    put(fd, "first\n");
    for (int i = 0; i < 16; i++) {
        assert_int_equal(write(fd, block, 1 << 20), 1 << 20);
    }
    put(fd, "\n"); /* exactly the limit */
    for (int i = 0; i < 40; i++) {
        assert_int_equal(write(fd, block, 1 << 20), 1 << 20);
    }
    put(fd, "\nlast\n");
    assert_int_equal(lseek(fd, 0, SEEK_SET), 0);
    spurion_line_reader_init(&r, fd);
    expect_line(&r, "first");
    assert_int_equal(spurion_line_next(&line, &r).code, SPURION_OK);
    assert_false(line.too_long);
    assert_int_equal(line.size, SPURION_LINE_BYTES_MAX);
    assert_int_equal(spurion_line_next(&line, &r).code, SPURION_OK);
    assert_true(line.too_long);
    expect_line(&r, "last");
    assert_int_equal(spurion_line_next(&line, &r).code, SPURION_OK);
    assert_true(line.none);
    assert_true(r.capacity <= 2 * (size_t)SPURION_LINE_BYTES_MAX);
    spurion_line_reader_fini(&r);
    assert_int_equal(close(fd), 0);
    assert_int_equal(unlink(path), 0);
    free(block);
}

static void test_line_reader_tells_a_failed_read(void **state)
{
    spurion_line_reader r;
    spurion_line line;
    int fd = open("/", O_RDONLY | O_DIRECTORY);
    spurion_status st;

    (void)state;
    assert_true(fd >= 0);
    spurion_line_reader_init(&r, fd);
    st = spurion_line_next(&line, &r);
    assert_int_equal(st.code, SPURION_UNAVAILABLE);
    spurion_line_reader_fini(&r);
    assert_int_equal(close(fd), 0);
}

static void test_name_set_holds_exactly_what_was_added(void **state)
{
    spurion_name_set s = {NULL, 0, 0, NULL, 0, 0};
    char key[32];

    (void)state;
    assert_false(spurion_name_set_has(&s, "", 0));
    for (int i = 0; i < 20000; i += 2) {
        int size = snprintf(key, sizeof key, "key-%d", i);
        assert_true(spurion_name_set_add(&s, key, (size_t)size));
        assert_true(spurion_name_set_add(&s, key, (size_t)size));
    }
    assert_int_equal(s.count, 10000);
    for (int i = 0; i < 20000; i++) {
        int size = snprintf(key, sizeof key, "key-%d", i);
        assert_int_equal(spurion_name_set_has(&s, key, (size_t)size), i % 2 == 0);
    }
    assert_false(spurion_name_set_has(&s, "key-", 4));
    assert_true(spurion_name_set_add(&s, "a\0b", 3));
    assert_false(spurion_name_set_has(&s, "a\0c", 3));
    assert_true(spurion_name_set_has(&s, "a\0b", 3));
    spurion_name_set_fini(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_line_reader_gives_lines_as_they_come),
        cmocka_unit_test(test_line_reader_keeps_no_line_over_the_limit),
        cmocka_unit_test(test_line_reader_tells_a_failed_read),
        cmocka_unit_test(test_name_set_holds_exactly_what_was_added),
    };
    return cmocka_run_group_tests_name("judge_input", tests, NULL, NULL);
}

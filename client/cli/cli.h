/* The command line `spurion`: what its verbs share. Data go to stdout, words to stderr; a verb returns the exit status.
 * Thread: one. Memory: the pools of a verb's own; everything goes back when the process ends. */
#ifndef SPURION_CLI_H
#define SPURION_CLI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "spurion/client.h"
#include "spurion/json.h"

/* Documented in docs/cli.md and by --help; above 63 as in sysexits.h. */
enum cli_exit {
    CLI_OK = 0,
    CLI_NOTHING = 1,      /* asked, and nothing was found */
    CLI_SOME_REFUSED = 3, /* some rollouts were refused or dropped; the others are done */
    CLI_USAGE = 64,
    CLI_DATA = 65,        /* the daemon's data are damaged */
    CLI_UNREACHABLE = 69,
    CLI_BUG = 70,
    CLI_IO = 74,
    CLI_AGAIN = 75,       /* busy, or not done in time */
    CLI_PROTOCOL = 76,    /* the other side speaks another version */
    CLI_PERMISSION = 77
};

typedef enum cli_option {
    OPT_RPC, OPT_ROLLOUTS, OPT_ALERTS, OPT_TIMEOUT, OPT_WAIT, OPT_JSON, OPT_JSONL, OPT_TABLE, OPT_COLOR, OPT_NO_COLOR, OPT_WIDE,
    OPT_HELP, OPT_VERSION, OPT_RUN, OPT_PRODUCER, OPT_STEP_END, OPT_NO_STEP_END, OPT_RATE, OPT_RING, OPT_POLICY, OPT_TOKENS,
    OPT_FROM, OPT_COUNT, OPT_FOR, OPT_RULE, OPT_FEATURE, OPT_FLAGGED, OPT_STEP, OPT_GROUP, OPT_ORDER, OPT_DESC, OPT_LIMIT, OPT_SAE,
    OPT_ATTEMPT, OPT_THEME, OPT_OUT, OPT_FULL, OPT_CHECKSUM, OPT_SOURCE, OPT_COUNT_OF
} cli_option;

#define CLI_ARGS_MAX 4

typedef struct cli_verb cli_verb;

typedef struct cli {
    const cli_verb *verb;
    const char *value[OPT_COUNT_OF]; /* NULL: not given; flags: "" */
    const char *args[CLI_ARGS_MAX];
    int arg_count;
    bool color;
    int timeout_ms;
    spurion_client *client;
} cli;

struct cli_verb {
    const char *name, *operands, *purpose, *examples;
    int args_min, args_max;
    const cli_option *options; /* besides the common ones; ends with OPT_COUNT_OF */
    int (*run)(cli *c);
};

/* options.c: the only description of verbs and options; parsing, help and completion come from it. */
extern const cli_verb cli_verbs[];
extern const int cli_verb_count;
/* Fills c. not CLI_OK: told on stderr. */
int cli_parse(cli *c, int argc, char **argv);
void cli_help(const cli_verb *verb, FILE *out);
int cli_whole(int64_t *out, const cli *c, cli_option option, int64_t low, int64_t high);
int cli_bad_value(const cli *c, cli_option option, const char *expected);
/* The script that completes verbs and options for bash, zsh or fish. */
int cli_completion(cli *c);

int cli_status(cli *c);
int cli_score(cli *c);
int cli_publish(cli *c);
int cli_watch(cli *c);
int cli_query(cli *c);
int cli_show(cli *c);
int cli_export(cli *c);
int cli_runs(cli *c);
int cli_report(cli *c);
int cli_labels(cli *c);

/* main.c */
/* Opens the handle; with has_rpc, after the daemon has answered once. want_* decide which addresses are used. */
int cli_connect(cli *c, spurion_client_options *options, bool want_tap, bool want_alerts);
/* Tells the handle's last failure and gives its exit status. */
int cli_fail(const cli *c, spurion_code code);
int cli_exit_of(spurion_code code, uint32_t retry_after_ms);
void cli_say(const char *format, ...) SPURION_PRINTF(1, 2);
/* Flushes stdout; CLI_IO when something could not be written, else status. */
int cli_done(int status);

/* input.c: memory and rollouts from JSON Lines */
typedef struct cli_pool {
    struct cli_chunk *head;
} cli_pool;
void *cli_pool_take(void *pool, size_t bytes);
void cli_pool_reset(cli_pool *p);
/* NUL-terminated and kept in the pool. */
char *cli_pool_text(cli_pool *p, spurion_bytes text);

/* One line of the input. */
typedef struct cli_line {
    spurion_json_line kind;
    spurion_rollout rollout;
    spurion_json_read read;
    int64_t number;      /* from 1 */
    bool end;            /* no more lines; nothing else is filled */
} cli_line;

typedef struct cli_input {
    FILE *file;
    const char *name;
    char *text;
    size_t capacity;
    int64_t lines;
    spurion_bytes run;   /* data not NULL: the run of every rollout, whatever its line says */
    bool held;           /* next was read ahead */
    cli_line next;
    cli_pool next_pool;
} cli_input;

int cli_input_open(cli_input *in, const cli *c, const char *name);
void cli_input_close(cli_input *in);
/* Lines that stand together: of one (run, step, group), with refused ones between; at most max. The pool is reset before. *count 0: the
 * end. The rollouts of the group get their group_size where the lines say none. The caller frees *lines, also after an error. */
int cli_input_group(cli_line **lines, int *count, cli_input *in, cli_pool *pool, int max);

/* terminal.c */
/* Writes text for a terminal: control, bidirectional and zero-width characters as <U+202E>; lines: keep line ends. */
void cli_put_safe(spurion_text *out, spurion_bytes text, bool lines);
/* Columns that text takes on a terminal. */
int cli_width(const char *text, size_t size);
void cli_put(spurion_text *out, const char *text);
/* Writes and empties. */
void cli_flush(spurion_text *out);
/* As 2026-11-21 16:04:12, local time. */
void cli_put_time(spurion_text *out, int64_t ms);
void cli_put_age(spurion_text *out, uint64_t ms);
void cli_put_bytes(spurion_text *out, uint64_t bytes);

typedef struct cli_table {
    int columns, rows, capacity;
    const char *const *titles; /* a title that begins with '>' is of a column set to the right */
    char **cells;        /* (rows, columns) */
    bool failed;
} cli_table;
void cli_table_init(cli_table *t, const char *const *titles, int columns);
/* Copies the text; cells fill row by row. */
void cli_table_cell(cli_table *t, int column, const char *format, ...) SPURION_PRINTF(3, 4);
/* With its sign, four places or (short_form) four digits; an empty cell where there is none. */
void cli_table_signed(cli_table *t, int column, spurion_opt_float value, bool short_form);
void cli_table_name(cli_table *t, int column, spurion_bytes text);
void cli_table_row(cli_table *t);
void cli_table_print(spurion_text *out, cli_table *t, const cli *c);
void cli_table_fini(cli_table *t);

typedef struct cli_progress {
    bool on, shown;
    int64_t started_ms, last_ms;
} cli_progress;
void cli_progress_init(cli_progress *p);
/* "<done>[ of <all>] <what>" on a terminal's stderr, after a second. all 0: not known. */
void cli_progress_show(cli_progress *p, uint64_t done, uint64_t all, const char *what);
void cli_progress_end(cli_progress *p);
int64_t cli_now_ms(void);

/* json_out.c: one object each, without a line end */
void cli_json_row(spurion_text *out, const spurion_row *row);
void cli_json_record(spurion_text *out, const spurion_record *record, bool tokens);
void cli_json_alert(spurion_text *out, const spurion_alert *alert);
void cli_json_status(spurion_text *out, const spurion_status_reply *status);
void cli_json_run(spurion_text *out, const spurion_run_row *run);

/* shade.c: the completion, its tokens shaded by a value each */
typedef struct cli_shade {
    bool color, dark;
    float max;           /* of |value|; the scale is -max .. max */
} cli_shade;
void cli_shade_tokens(spurion_text *out, const cli_shade *s, const spurion_bytes *texts, const float *values, int32_t count);

static inline spurion_bytes cli_bytes(const char *text)
{
    return spurion_bytes_of(text);
}
static inline bool cli_same(spurion_bytes a, spurion_bytes b)
{
    size_t i = 0;
    while (a.size == b.size && i < a.size && a.data[i] == b.data[i]) {
        i++;
    }
    return a.size == b.size && i == a.size;
}

#endif

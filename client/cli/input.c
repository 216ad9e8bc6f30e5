/* Rollouts from JSON Lines, a group at a time. See cli.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"

/* --- pool --- */

typedef struct cli_chunk {
    struct cli_chunk *next;
    size_t used, size;
    _Alignas(16) char data[];
} cli_chunk;

void *cli_pool_take(void *pool, size_t bytes)
{
    cli_pool *p = pool;
    cli_chunk *k = p->head;
    size_t whole = (bytes + 15) & ~(size_t)15;

    if (!k || k->size - k->used < whole) {
        size_t size = whole > 8192 ? whole : 8192; /* one for each line: see pool_join */
        k = malloc(sizeof *k + size);
        if (!k) {
            return NULL;
        }
        k->next = p->head;
        k->used = 0;
        k->size = size;
        p->head = k;
    }
    k->used += whole;
    return k->data + k->used - whole;
}

void cli_pool_reset(cli_pool *p)
{
    while (p->head) {
        cli_chunk *next = p->head->next;
        free(p->head);
        p->head = next;
    }
}

char *cli_pool_text(cli_pool *p, spurion_bytes text)
{
    char *out = cli_pool_take(p, text.size + 1);

    if (out) {
        if (text.size) {
            memcpy(out, text.data, text.size);
        }
        out[text.size] = '\0';
    }
    return out;
}

/* --- lines --- */

int cli_input_open(cli_input *in, const cli *c, const char *name)
{
    memset(in, 0, sizeof *in);
    in->name = name && strcmp(name, "-") ? name : "stdin";
    in->file = name && strcmp(name, "-") ? fopen(name, "r") : stdin;
    if (!in->file) {
        cli_say("%s: expected to read it, found: %s", name, strerror(errno));
        return CLI_IO;
    }
    if (c->value[OPT_RUN]) {
        spurion_status st = spurion_name_check(cli_bytes(c->value[OPT_RUN]), "--run");
        if (st.code != SPURION_OK) {
            cli_say("%s", st.message);
            return CLI_USAGE;
        }
        in->run = cli_bytes(c->value[OPT_RUN]);
    }
    return CLI_OK;
}

void cli_input_close(cli_input *in)
{
    if (in->file && in->file != stdin) {
        (void)fclose(in->file);
    }
    free(in->text);
    cli_pool_reset(&in->next_pool);
    memset(in, 0, sizeof *in);
}

static int no_memory(void)
{
    cli_say("expected memory for the input, found none");
    return CLI_AGAIN;
}

static int read_line(cli_line *line, cli_input *in, cli_pool *pool)
{
    spurion_memory m = {cli_pool_take, pool};
    ssize_t size;

    memset(line, 0, sizeof *line);
    errno = 0;
    size = getline(&in->text, &in->capacity, in->file);
    if (size < 0) {
        if (ferror(in->file) || errno == ENOMEM) {
            cli_say("%s: expected to read it, found: %s", in->name, strerror(errno));
            return CLI_IO;
        }
        line->end = true;
        return CLI_OK;
    }
    line->number = ++in->lines;
    size -= size > 0 && in->text[size - 1] == '\n';
    if ((size_t)size > SPURION_LINE_BYTES_MAX) {
        line->kind = SPURION_LINE_NO_OBJECT;
        line->read.why = spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected a line of at most %u bytes, found a longer one", SPURION_LINE_BYTES_MAX);
        return CLI_OK;
    }
    line->kind = spurion_json_read_rollout(&line->rollout, &line->read, &m, in->run.data ? &in->run : NULL, in->text, (size_t)size);
    return CLI_OK;
}

static bool same_group(const cli_line *a, const cli_line *b)
{
    return a->rollout.step == b->rollout.step && cli_same(a->rollout.run, b->rollout.run) && cli_same(a->rollout.group, b->rollout.group);
}

/* Moves everything from one pool to another. */
static void pool_join(cli_pool *to, cli_pool *from)
{
    cli_chunk *last = from->head;

    while (last && last->next) {
        last = last->next;
    }
    if (last) {
        last->next = to->head;
        to->head = from->head;
        from->head = NULL;
    }
}

/* Whether the line that was read ahead stands with the count lines before it. */
static bool belongs(const cli_line *lines, int count, const cli_line *next)
{
    if (next->end || next->kind == SPURION_LINE_NO_OBJECT || count == 0) {
        return !next->end;
    }
    for (int i = 0; i < count; i++) {
        if (lines[i].kind != SPURION_LINE_NO_OBJECT) { /* the first one that names a group, or could not */
            return lines[i].read.group_known && next->read.group_known && same_group(&lines[i], next);
        }
    }
    return true;
}

int cli_input_group(cli_line **lines, int *count, cli_input *in, cli_pool *pool, int max)
{
    int members = 0, capacity = 0, status;

    cli_pool_reset(pool);
    *count = 0;
    *lines = NULL;
    for (;;) {
        if (!in->held && (status = read_line(&in->next, in, &in->next_pool)) != CLI_OK) {
            return status;
        }
        in->held = true;
        if (*count == max || !belongs(*lines, *count, &in->next)) {
            break;
        }
        if (*count == capacity) {
            cli_line *grown = realloc(*lines, (size_t)(capacity = capacity ? 2 * capacity : 64) * sizeof *grown);
            if (!grown) {
                return no_memory();
            }
            *lines = grown;
        }
        (*lines)[(*count)++] = in->next;
        in->held = false;
        pool_join(pool, &in->next_pool);
        members += in->next.kind == SPURION_LINE_ROLLOUT;
    }
    for (int i = 0; i < *count; i++) {
        spurion_rollout *r = &(*lines)[i].rollout;
        r->group_size = r->group_size ? r->group_size : members <= SPURION_GROUP_SIZE_MAX ? members : 0;
    }
    return CLI_OK;
}

/* Reads the file of imported labels; see labels.h. Memory: rows in a growing array, texts and results in the arena. */
#include "daemon/labels.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/base/json.h"
#include "daemon/base/sha256.h"
#include "spurion/label.h"

#define LINE_ARENA_BYTES ((size_t)8 << 20) /* of one line while it is read */

typedef struct row {
    int32_t sae, index;
    int64_t line;
    bool has_score;
    double score;
    spurion_bytes text;
} row;

typedef struct loader {
    spurion_labels *labels;
    const spurion_labels_sae *saes;
    int32_t sae_count;
    const char *path;
    int64_t line;
    row *rows;
    size_t count, capacity;
    char hex[SPURION_SAES_MAX][SPURION_CHECKSUM_CHARACTERS + 1];
} loader;

static spurion_status no_memory(void)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected memory for the labels, found none");
}

static spurion_status at_line(const loader *l, const char *what)
{
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s:%lld: %s", spurion_path_tail(l->path), (long long)l->line, what);
}

static void *take(void *arena, size_t bytes)
{
    return spurion_arena_take(arena, bytes);
}

static spurion_status add_row(loader *l, int32_t sae, const spurion_label *label)
{
    char *text;

    if (l->count == l->capacity) {
        size_t more = l->capacity ? 2 * l->capacity : 1024;
        row *rows = realloc(l->rows, more * sizeof *rows);
        if (!rows) {
            return no_memory();
        }
        l->rows = rows;
        l->capacity = more;
    }
    text = spurion_arena_copy(&l->labels->arena, label->description.data, label->description.size);
    if (!text) {
        return no_memory();
    }
    l->rows[l->count++] = (row){sae, label->index, l->line, label->has_score, label->score, {text, label->description.size}};
    return spurion_ok();
}

/* One configuration may hold the same dictionary twice: a label counts for each. */
static spurion_status add_label(loader *l, const spurion_label *label)
{
    spurion_status st = spurion_ok();
    bool known = false;

    if (label->sae_sha256.data == NULL) {
        return at_line(l, "expected sae_sha256 (spurion labels import writes it), found none");
    }
    for (int32_t i = 0; i < l->sae_count && st.code == SPURION_OK; i++) {
        if (memcmp(l->hex[i], label->sae_sha256.data, SPURION_CHECKSUM_CHARACTERS) != 0) {
            continue;
        }
        known = true;
        if (label->index >= l->saes[i].width) {
            char what[96];
            (void)snprintf(what, sizeof what, "index: expected 0 to %d (the SAE's features), found %d", l->saes[i].width - 1, label->index);
            return at_line(l, what);
        }
        st = add_row(l, i, label);
    }
    l->labels->foreign += !known;
    return st;
}

static spurion_status add_line(loader *l, spurion_arena *scratch, const char *text, size_t size)
{
    const spurion_memory m = {take, scratch};
    spurion_label label;
    spurion_status st;
    bool found = false;

    while (size > 0 && strchr(" \t\r\n", text[size - 1])) {
        size--;
    }
    if (size == 0) {
        return spurion_ok();
    }
    st = spurion_label_read(&label, &found, &m, text, size);
    if (st.code != SPURION_OK) {
        return spurion_error((spurion_code)st.code, "%s:%lld: %s", spurion_path_tail(l->path), (long long)l->line, st.message);
    }
    if (!found) {
        return at_line(l, "expected a label with a description, found none");
    }
    return add_label(l, &label);
}

static spurion_status read_lines(loader *l)
{
    FILE *f = fopen(l->path, "rb");
    char *text = NULL;
    size_t capacity = 0;
    ssize_t size;
    spurion_arena scratch;
    spurion_status st = spurion_ok();

    if (!f) {
        return spurion_error(errno == EACCES ? SPURION_PERMISSION_DENIED : SPURION_NOT_FOUND, "%s: expected the labels, found: %s",
                             spurion_path_tail(l->path), strerror(errno));
    }
    spurion_arena_init(&scratch, LINE_ARENA_BYTES);
    while (st.code == SPURION_OK && (size = getline(&text, &capacity, f)) >= 0) {
        l->line++;
        st = size > SPURION_LABEL_LINE_BYTES_MAX ? at_line(l, "expected a line of at most 1 MiB, found a longer one")
                                                 : add_line(l, &scratch, text, (size_t)size);
        spurion_arena_reset(&scratch);
    }
    if (st.code == SPURION_OK && ferror(f)) {
        st = spurion_error(SPURION_NOT_FOUND, "%s: expected a readable file, found: %s", spurion_path_tail(l->path), strerror(errno));
    }
    spurion_arena_fini(&scratch);
    free(text);
    (void)fclose(f);
    return st;
}

/* By SAE and feature; the label that counts first: the best score, then the first line. */
static int by_place(const void *a, const void *b)
{
    const row *x = a, *y = b;

    if (x->sae != y->sae) {
        return x->sae < y->sae ? -1 : 1;
    }
    if (x->index != y->index) {
        return x->index < y->index ? -1 : 1;
    }
    if (x->has_score != y->has_score) {
        return x->has_score ? -1 : 1;
    }
    if (x->has_score && x->score != y->score) {
        return x->score > y->score ? -1 : 1;
    }
    return x->line < y->line ? -1 : x->line > y->line;
}

static spurion_status settle(loader *l)
{
    spurion_labels *out = l->labels;
    size_t at = 0;

    if (l->count > 1) {
        qsort(l->rows, l->count, sizeof *l->rows, by_place);
    }
    for (int32_t s = 0; s < l->sae_count; s++) {
        size_t end = at;
        int32_t *index;
        spurion_bytes *text;

        while (end < l->count && l->rows[end].sae == s) {
            end++;
        }
        index = spurion_arena_take_array(&out->arena, end - at + 1, sizeof *index);
        text = spurion_arena_take_array(&out->arena, end - at + 1, sizeof *text);
        if (!index || !text) {
            return no_memory();
        }
        for (; at < end; at++) {
            int32_t n = out->count[s];
            if (n == 0 || index[n - 1] != l->rows[at].index) {
                index[n] = l->rows[at].index;
                text[n] = l->rows[at].text;
                out->count[s]++;
            }
        }
        out->index[s] = index;
        out->text[s] = text;
    }
    return spurion_ok();
}

spurion_status spurion_labels_load(spurion_labels *out, const char *path, const spurion_labels_sae *saes, int32_t sae_count)
{
    spurion_status st;
    loader *l = calloc(1, sizeof *l);

    memset(out, 0, sizeof *out);
    spurion_arena_init(&out->arena, 0);
    if (!l) {
        st = no_memory();
        goto out;
    }
    l->labels = out;
    l->saes = saes;
    l->sae_count = sae_count;
    l->path = path;
    for (int32_t i = 0; i < sae_count; i++) {
        spurion_hex(l->hex[i], saes[i].digest, sizeof saes[i].digest);
    }
    SPURION_TRY(st, read_lines(l));
    SPURION_TRY(st, settle(l));
out:
    if (l) {
        free(l->rows);
    }
    free(l);
    if (st.code != SPURION_OK) {
        spurion_labels_fini(out);
    }
    return st;
}

void spurion_labels_fini(spurion_labels *labels)
{
    spurion_arena_fini(&labels->arena);
    memset(labels, 0, sizeof *labels);
}

spurion_bytes spurion_labels_find(const spurion_labels *labels, int32_t sae, int32_t index)
{
    int32_t low = 0, high = labels->count[sae];

    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (labels->index[sae][middle] < index) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < labels->count[sae] && labels->index[sae][low] == index ? labels->text[sae][low] : (spurion_bytes){NULL, 0};
}

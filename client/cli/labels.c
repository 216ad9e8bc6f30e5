/* spurion labels import: labels of features as Neuronpedia, delphi and others publish them, into one file of lines that the daemon reads
 * (configuration: labels). Every line is bound to an SAE by the checksum of its weights. No daemon is asked. See cli.h. */
#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "cli.h"
#include "spurion/label.h"

#define DEPTH_MAX 8
#define SOURCES_MAX 16
#define DELPHI_BYTES_MAX 65536
#define OUT_DEFAULT "labels.jsonl"

typedef struct importer {
    cli *c;
    FILE *out;
    cli_pool pool;
    spurion_text line;
    uint64_t *seen;       /* hashes of lines that are in the file, open addressing; 0: free */
    size_t seen_count, seen_capacity;
    char *sources[SOURCES_MAX];
    int source_count;
    uint64_t files, read, written, repeated, other, unreadable;
} importer;

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

/* --- what is in the file already --- */

/* FNV-1a over a written line: whether it is there already. Two different lines of one hash: 2^-64. */
static uint64_t hash_of(const char *data, size_t size)
{
    uint64_t h = 14695981039346656037u;
    for (size_t i = 0; i < size; i++) {
        h = (h ^ (unsigned char)data[i]) * 1099511628211u;
    }
    return h ? h : 1;
}

static bool seen_before(importer *im, uint64_t hash)
{
    size_t at;

    if (4 * (im->seen_count + 1) > 3 * im->seen_capacity) {
        size_t capacity = im->seen_capacity ? 2 * im->seen_capacity : 4096;
        uint64_t *grown = calloc(capacity, sizeof *grown);

        for (size_t i = 0; grown && i < im->seen_capacity; i++) {
            for (at = im->seen[i] % capacity; im->seen[i] && grown[at]; at = (at + 1) % capacity) {
            }
            grown[at] = im->seen[i] ? im->seen[i] : grown[at];
        }
        if (!grown) {
            return false; /* a repeated label does no harm */
        }
        free(im->seen);
        im->seen = grown;
        im->seen_capacity = capacity;
    }
    for (at = hash % im->seen_capacity; im->seen[at]; at = (at + 1) % im->seen_capacity) {
        if (im->seen[at] == hash) {
            return true;
        }
    }
    im->seen[at] = hash;
    im->seen_count++;
    return false;
}

/* --- taking labels in --- */

/* Whether the label is of the wanted source. Several sources (layers of one model) cannot be of one SAE: without --source they are kept for
 * the message. */
static bool source_wanted(importer *im, spurion_bytes source)
{
    const char *wanted = im->c->value[OPT_SOURCE];
    int i = 0;

    if (wanted) {
        return cli_same(source, cli_bytes(wanted));
    }
    while (i < im->source_count && !cli_same(source, cli_bytes(im->sources[i]))) {
        i++;
    }
    if (i == im->source_count && i < SOURCES_MAX) {
        im->sources[im->source_count] = strndup(source.data ? source.data : "", source.size);
        im->source_count += im->sources[im->source_count] != NULL;
    }
    return true;
}

static int take_label(importer *im, spurion_label *label)
{
    im->read++;
    if (!source_wanted(im, label->source)) {
        im->other++;
        return CLI_OK;
    }
    if (label->sae_sha256.data && !cli_same(label->sae_sha256, cli_bytes(im->c->value[OPT_CHECKSUM]))) {
        im->other++; /* bound to another SAE already */
        return CLI_OK;
    }
    label->sae_sha256 = cli_bytes(im->c->value[OPT_CHECKSUM]);
    im->line.size = 0;
    spurion_label_put(&im->line, label);
    if (im->line.failed) {
        cli_say("labels: expected memory for a line, found none");
        return CLI_AGAIN;
    }
    if (seen_before(im, hash_of(im->line.data, im->line.size))) {
        im->repeated++;
        return CLI_OK;
    }
    spurion_text_add(&im->line, "\n", 1);
    im->written += fwrite(im->line.data, 1, im->line.size, im->out) == im->line.size;
    return ferror(im->out) ? CLI_IO : CLI_OK;
}

static void unreadable(importer *im, const char *path, int64_t number, const spurion_status *why)
{
    if (im->unreadable++ < 5) {
        cli_say("labels: %s:%lld: %s", path, (long long)number, why->message);
    }
}

/* Lines of a file, packed or not. Memory: text, the caller's to free. */
typedef struct line_reader {
    gzFile file;
    char block[65536];
    size_t at, end;
    char *text;
    size_t size, capacity;
    bool some; /* text is a line; false: the end */
} line_reader;

/* Adds bytes to the line; of one that is too long no more is kept than shows it. */
static bool keep(line_reader *r, const char *data, size_t size)
{
    size_t room = SPURION_LABEL_LINE_BYTES_MAX + 1 - r->size;

    size = size < room ? size : room;
    if (r->size + size + 1 > r->capacity) {
        size_t capacity = 2 * (r->size + size) + 4096;
        char *grown = realloc(r->text, capacity);
        if (!grown) {
            return false;
        }
        r->text = grown;
        r->capacity = capacity;
    }
    memcpy(r->text + r->size, data, size);
    r->size += size;
    return true;
}

static int next_line(line_reader *r)
{
    r->size = 0;
    r->some = false;
    for (;;) {
        const char *from = r->block + r->at, *end = r->at < r->end ? memchr(from, '\n', r->end - r->at) : NULL;
        size_t n = end ? (size_t)(end - from) : r->end - r->at;
        int got;

        r->some = r->some || n > 0 || end;
        if (!keep(r, from, n)) {
            cli_say("labels: expected memory for a line, found none");
            return CLI_AGAIN;
        }
        r->at += n + (end != NULL);
        if (end) {
            return CLI_OK;
        }
        got = gzread(r->file, r->block, sizeof r->block);
        if (got <= 0) {
            return got == 0 ? CLI_OK : CLI_IO;
        }
        r->at = 0;
        r->end = (size_t)got;
    }
}

static int take_line(importer *im, const char *path, int64_t number, const line_reader *r)
{
    const spurion_memory m = {cli_pool_take, &im->pool};
    spurion_label label;
    spurion_status st = spurion_ok();
    size_t size = r->size;
    bool found = false;
    int status = CLI_OK;

    while (size && (r->text[size - 1] == ' ' || r->text[size - 1] == '\t' || r->text[size - 1] == '\r')) {
        size--;
    }
    if (size > SPURION_LABEL_LINE_BYTES_MAX) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "expected a line of at most 1 MiB, found a longer one");
    } else if (size) {
        st = spurion_label_read(&label, &found, &m, r->text, size);
    }
    if (st.code != SPURION_OK) {
        unreadable(im, path, number, &st);
    } else if (found) {
        status = take_label(im, &label);
    }
    cli_pool_reset(&im->pool);
    return status;
}

static int import_lines(importer *im, const char *path)
{
    line_reader *r = calloc(1, sizeof *r);
    int status = CLI_OK, error = Z_OK;

    if (!r || !(r->file = gzopen(path, "rb"))) { /* plain files come through as they are */
        cli_say("labels: %s: expected a readable file, found: %s", path, strerror(errno));
        free(r);
        return CLI_IO;
    }
    im->files++;
    for (int64_t number = 1; status == CLI_OK && (status = next_line(r)) == CLI_OK && r->some; number++) {
        status = take_line(im, path, number, r);
    }
    (void)gzerror(r->file, &error);
    if (error != Z_OK && error != Z_STREAM_END) {
        cli_say("labels: %s: expected a whole gzip file, found a damaged one", path);
        status = CLI_IO;
    }
    (void)gzclose(r->file);
    free(r->text);
    free(r);
    return status;
}

static int import_delphi(importer *im, const char *path)
{
    const spurion_memory m = {cli_pool_take, &im->pool};
    const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    char text[DELPHI_BYTES_MAX];
    spurion_label label;
    spurion_status st;
    bool found = false;
    size_t size;
    int status = CLI_OK;
    FILE *file = fopen(path, "rb");

    if (!file) {
        cli_say("labels: %s: expected a readable file, found: %s", path, strerror(errno));
        return CLI_IO;
    }
    size = fread(text, 1, sizeof text, file);
    (void)fclose(file);
    im->files++;
    st = spurion_label_read_delphi(&label, &found, &m, name, text, size);
    if (st.code != SPURION_OK) {
        unreadable(im, path, 1, &st);
    } else if (found) {
        status = take_label(im, &label);
    }
    cli_pool_reset(&im->pool);
    return status;
}

static int import_path(importer *im, const char *path, int depth, bool named);

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Files in the order of their names. A Neuronpedia tree keeps labels under explanations/ and much else beside it. */
static int import_directory(importer *im, const char *path, int depth)
{
    DIR *dir = opendir(path);
    struct dirent *entry;
    char **names = NULL;
    size_t count = 0, capacity = 0;
    bool tree = false;
    int status = CLI_OK;

    if (!dir) {
        cli_say("labels: %s: expected a readable directory, found: %s", path, strerror(errno));
        return CLI_IO;
    }
    while (status == CLI_OK && (entry = readdir(dir))) {
        if (entry->d_name[0] == '.') {
            continue;
        }
        if (count == capacity) {
            char **grown = realloc(names, (capacity ? 2 * capacity : 64) * sizeof *names);
            names = grown ? grown : names;
            capacity = grown ? (capacity ? 2 * capacity : 64) : capacity;
            status = grown ? CLI_OK : CLI_AGAIN;
        }
        if (status == CLI_OK && (names[count] = strdup(entry->d_name))) {
            tree = tree || strcmp(names[count], "explanations") == 0;
            count++;
        }
    }
    (void)closedir(dir);
    if (count > 1) {
        qsort(names, count, sizeof *names, by_name);
    }
    for (size_t i = 0; i < count; i++) {
        spurion_text full = {NULL, 0, 0, false};
        spurion_text_print(&full, "%s/%s", path, names[i]);
        spurion_text_add(&full, "", 1);
        if (status == CLI_OK && !full.failed && (!tree || strcmp(names[i], "explanations") == 0)) {
            status = import_path(im, full.data, depth + 1, false);
        }
        spurion_text_fini(&full);
        free(names[i]);
    }
    free(names);
    return status;
}

/* named: by the user, who means it whatever it is called; others are taken by their endings. */
static int import_path(importer *im, const char *path, int depth, bool named)
{
    struct stat info;

    if (stat(path, &info) != 0) {
        cli_say("labels: %s: expected a file or directory, found: %s", path, strerror(errno));
        return CLI_IO;
    }
    if (S_ISDIR(info.st_mode)) {
        return depth < DEPTH_MAX ? import_directory(im, path, depth) : CLI_OK;
    }
    if (ends_with(path, ".txt")) {
        return import_delphi(im, path);
    }
    return named || ends_with(path, ".jsonl") || ends_with(path, ".jsonl.gz") ? import_lines(im, path) : CLI_OK;
}

/* --- the file --- */

/* What is there stays, line by line; its own labels are known from then on. */
static int keep_old(importer *im, const char *path)
{
    FILE *old = fopen(path, "rb");
    char *text = NULL;
    size_t capacity = 0;
    ssize_t size;

    if (!old) {
        return errno == ENOENT ? CLI_OK : CLI_IO;
    }
    while ((size = getline(&text, &capacity, old)) > 0) {
        size_t n = (size_t)size - (text[size - 1] == '\n');
        if (n && !seen_before(im, hash_of(text, n))) {
            (void)fwrite(text, 1, n, im->out);
            (void)fputc('\n', im->out);
        }
    }
    free(text);
    (void)fclose(old);
    return ferror(im->out) ? CLI_IO : CLI_OK;
}

static int several_sources(const importer *im)
{
    cli_say("labels: expected labels of one SAE, found %s%d sources: say which with --source", im->source_count == SOURCES_MAX ? "at least " : "",
            im->source_count);
    for (int i = 0; i < im->source_count && i < 5; i++) {
        cli_say("  --source '%s'", im->sources[i]);
    }
    return CLI_USAGE;
}

static int finish(importer *im, int status, const char *temporary, const char *path)
{
    if (status == CLI_OK && im->source_count > 1) {
        status = several_sources(im);
    }
    if (status == CLI_OK && im->written + im->repeated == 0) {
        cli_say("labels: no label was found in %llu files (%llu of another source or SAE)", (unsigned long long)im->files,
                (unsigned long long)im->other);
        status = CLI_NOTHING;
    }
    if ((fflush(im->out) != 0 || fsync(fileno(im->out)) != 0) && status == CLI_OK) {
        status = CLI_IO;
    }
    (void)fclose(im->out);
    if (status == CLI_OK && rename(temporary, path) != 0) {
        status = CLI_IO;
    }
    if (status != CLI_OK) {
        (void)unlink(temporary);
    }
    if (status == CLI_IO) {
        cli_say("labels: expected to write %s, found: %s", path, strerror(errno));
    }
    if (status == CLI_OK) {
        cli_say("labels: %llu new, %llu there already, %llu of another source or SAE, %llu unreadable lines: %s", (unsigned long long)im->written,
                (unsigned long long)im->repeated, (unsigned long long)im->other, (unsigned long long)im->unreadable, path);
        status = im->unreadable ? CLI_SOME_REFUSED : CLI_OK;
    }
    return status;
}

int cli_labels(cli *c)
{
    importer im = {.c = c};
    const char *path = c->value[OPT_OUT] ? c->value[OPT_OUT] : OUT_DEFAULT;
    spurion_text temporary = {NULL, 0, 0, false};
    int status;

    if (strcmp(c->args[0], "import") != 0) {
        cli_say("expected spurion labels import, found 'labels %s'", c->args[0]);
        return CLI_USAGE;
    }
    if (!c->value[OPT_CHECKSUM] || !spurion_checksum_valid(cli_bytes(c->value[OPT_CHECKSUM]))) {
        cli_say("labels: expected --checksum with the 64 hexadecimal digits that `spuriond check` prints for the SAE, found %s",
                c->value[OPT_CHECKSUM] ? c->value[OPT_CHECKSUM] : "none");
        return CLI_USAGE;
    }
    spurion_text_print(&temporary, "%s.%ld.new", path, (long)getpid());
    spurion_text_add(&temporary, "", 1);
    im.out = temporary.failed ? NULL : fopen(temporary.data, "wb");
    if (!im.out) {
        cli_say("labels: expected to write %s, found: %s", path, strerror(errno));
        spurion_text_fini(&temporary);
        return CLI_IO;
    }
    status = keep_old(&im, path);
    for (int i = 1; i < c->arg_count && status == CLI_OK; i++) {
        status = import_path(&im, c->args[i], 0, true);
    }
    status = finish(&im, status, temporary.data, path);
    for (int i = 0; i < im.source_count; i++) {
        free(im.sources[i]);
    }
    free(im.seen);
    cli_pool_reset(&im.pool);
    spurion_text_fini(&im.line);
    spurion_text_fini(&temporary);
    return status;
}

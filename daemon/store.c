/* Opening and closing the store, and the few ways it writes and reads RocksDB; see store.h, docs/store.md.
 * The options follow from what was measured of RocksDB 7.8.3 (docs/guarantees.md). */
#include "daemon/store_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/store_files.h"

#define WRITE_BUFFER_BYTES ((size_t)16 << 20)
#define LOG_BYTES_MAX ((uint64_t)64 << 20)
#define CACHE_BYTES ((size_t)32 << 20)
#define WRITE_RATE_BYTES ((int64_t)64 << 20) /* per second, flushes and compactions */
#define OPEN_FILES_MAX 256
#define SCRATCH_BYTES_MAX ((size_t)512 << 20)

const char *const store_family_names[FAMILY_COUNT] = {"default", "meta",  "rollout", "record", "by_rule", "by_feature", "by_effect",
                                                      "by_time", "alert", "counter", "inbox",  "reply",   "producer"};

spurion_status store_no_memory(void)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "store: no memory");
}

spurion_bytes store_copy(spurion_arena *arena, spurion_bytes b)
{
    spurion_bytes copy = {spurion_arena_copy(arena, b.data, b.size), b.size};
    return copy;
}

spurion_bytes store_read_name(spurion_arena *arena, store_key_reader *r)
{
    spurion_bytes name = store_key_read_name(r), copy = {NULL, 0};
    if (!r->bad) {
        copy = store_copy(arena, name);
        r->bad = !copy.data;
    }
    return copy;
}

spurion_status store_own_names(spurion_identity *out, spurion_arena *arena)
{
    out->run = store_copy(arena, out->run);
    out->group = store_copy(arena, out->group);
    out->id = store_copy(arena, out->id);
    return out->run.data && out->group.data && out->id.data ? spurion_ok() : store_no_memory();
}

spurion_status store_note(spurion_store *s, spurion_status st)
{
    if (st.code == SPURION_DATA_LOSS) {
        atomic_fetch_add(&s->corruptions, 1);
        spurion_log_error("STORE-DAMAGED", "%s", st.message);
    }
    return st;
}

spurion_status store_error(spurion_store *s, char *message, const char *what)
{
    spurion_status st;
    if (strstr(message, "Corruption")) {
        st = spurion_error(SPURION_DATA_LOSS, "store %s: %s: %s", s->path, what, message);
    } else if (strstr(message, "lock ") || strstr(message, "LOCK")) {
        st = spurion_error(SPURION_FAILED_PRECONDITION, "store %s: expected to be the only process, found its lock held: %s",
                           s->path, message);
    } else if (strstr(message, "No space left")) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "store %s: %s: %s", s->path, what, message);
    } else if (strstr(message, "ermission denied")) {
        st = spurion_error(SPURION_PERMISSION_DENIED, "store %s: %s: %s", s->path, what, message);
    } else {
        st = spurion_error(SPURION_UNAVAILABLE, "store %s: %s: %s", s->path, what, message);
    }
    rocksdb_free(message);
    return store_note(s, st);
}

spurion_status store_check_name(spurion_bytes name, const char *what)
{
    if (!name.data || name.size < 1 || name.size > SPURION_NAME_BYTES_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "store: %s: expected 1 to %d bytes, found %zu", what, SPURION_NAME_BYTES_MAX,
                             name.data ? name.size : 0);
    }
    return spurion_ok();
}

spurion_status store_check_identity(const spurion_identity *identity)
{
    spurion_status st;
    SPURION_TRY(st, store_check_name(identity->run, "run"));
    SPURION_TRY(st, store_check_name(identity->group, "group"));
    SPURION_TRY(st, store_check_name(identity->id, "id"));
    if (identity->step < 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "store: step: expected at least 0, found %" PRId64, identity->step);
    }
out:
    return st;
}

/* ---- space ---- */

static spurion_status free_bytes(uint64_t *out, const char *path)
{
    struct statvfs v;
    if (statvfs(path, &v) != 0) {
        return spurion_error(SPURION_UNAVAILABLE, "store %s: free space: %s", path, strerror(errno));
    }
    *out = (uint64_t)v.f_bavail * v.f_frsize;
    return spurion_ok();
}

spurion_status store_check_space(spurion_store *s, uint64_t bytes)
{
    uint64_t found = 0, expected = s->free_bytes_min + bytes;
    spurion_status st = free_bytes(&found, s->path);
    if (st.code == SPURION_OK && found < expected) {
        atomic_fetch_add(&s->refused_for_space, 1);
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "store %s: expected %" PRIu64 " bytes free, found %" PRIu64, s->path,
                           expected, found);
    }
    return st;
}

/* ---- writing and reading ---- */

/* A full disk met by a background flush is no failed sync: RocksDB refuses writes before they reach the log, and recovers by itself
 * when there is space. Anything else that fails a write may have lost what the page cache held: nothing is acknowledged after it. */
static bool is_passing(spurion_store *s, const char *message)
{
    uint64_t background = 0;
    return strstr(message, "No space left") && rocksdb_property_int(s->db, "rocksdb.background-errors", &background) == 0 &&
           background > 0;
}

spurion_status store_write(spurion_store *s, rocksdb_writebatch_t *batch)
{
    char *message = NULL;
    int64_t start = spurion_clock_ns();
    size_t bytes = 0;

    (void)rocksdb_writebatch_data(batch, &bytes);
    if (atomic_load(&s->failed)) {
        return spurion_error(SPURION_UNAVAILABLE, "store %s: a write failed before; open it again", s->path);
    }
    {
        spurion_status st = store_check_space(s, 2 * (uint64_t)bytes);
        if (st.code != SPURION_OK) {
            return st;
        }
    }
    rocksdb_write(s->db, s->write, batch, &message);
    atomic_store(&s->last_sync_ns, spurion_clock_ns() - start);
    if (!message) {
        return spurion_ok();
    }
    if (is_passing(s, message)) {
        atomic_fetch_add(&s->refused_for_space, 1);
        return store_error(s, message, "write");
    }
    atomic_store(&s->failed, true);
    spurion_log_error("STORE-FAILED", "no more writes are acknowledged: %s", message);
    {
        spurion_status st = store_error(s, message, "write or sync");
        st.code = st.code == SPURION_DATA_LOSS ? SPURION_DATA_LOSS : SPURION_UNAVAILABLE;
        return st;
    }
}

static spurion_status read_pinned(rocksdb_pinnableslice_t **out, spurion_store *s, store_family family, const store_key *key)
{
    char *message = NULL;
    *out = NULL;
    if (key->bad) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "store: key of %s over %d bytes or with a name over %d",
                             store_family_names[family], STORE_KEY_BYTES_MAX, SPURION_NAME_BYTES_MAX);
    }
    *out = rocksdb_get_pinned_cf(s->db, s->read, s->families[family], (const char *)key->data, key->size, &message);
    return message ? store_error(s, message, "read") : spurion_ok();
}

spurion_status store_read(bool *found, spurion_bytes *value, spurion_arena *arena, spurion_store *s, store_family family,
                          const store_key *key)
{
    spurion_status st;
    rocksdb_pinnableslice_t *slice = NULL;
    spurion_bytes raw, payload;

    *found = false;
    SPURION_TRY(st, read_pinned(&slice, s, family, key));
    if (!slice) {
        goto out;
    }
    *found = true;
    raw.data = rocksdb_pinnableslice_value(slice, &raw.size);
    SPURION_TRY(st, store_note(s, store_value_open(&payload, store_key_bytes(key), raw)));
    *value = store_copy(arena, payload);
    if (!value->data) {
        st = store_no_memory();
    }
out:
    rocksdb_pinnableslice_destroy(slice);
    return st;
}

spurion_status store_exists(bool *found, spurion_store *s, store_family family, const store_key *key)
{
    rocksdb_pinnableslice_t *slice = NULL;
    spurion_status st = read_pinned(&slice, s, family, key);
    *found = slice != NULL;
    rocksdb_pinnableslice_destroy(slice);
    return st;
}

spurion_status store_put(rocksdb_writebatch_t *batch, spurion_arena *arena, spurion_store *s, store_family family,
                         const store_key *key, spurion_bytes payload)
{
    spurion_status st;
    spurion_bytes value;
    if (key->bad) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "store: key of %s over %d bytes or with a name over %d",
                             store_family_names[family], STORE_KEY_BYTES_MAX, SPURION_NAME_BYTES_MAX);
    }
    SPURION_TRY(st, store_value_seal(&value, arena, store_key_bytes(key), payload));
    rocksdb_writebatch_put_cf(batch, s->families[family], (const char *)key->data, key->size, value.data, value.size);
out:
    return st;
}

/* ---- opening ---- */

static void set_table_options(spurion_store *s)
{
    s->table = rocksdb_block_based_options_create();
    s->cache = rocksdb_cache_create_lru(CACHE_BYTES);
    rocksdb_block_based_options_set_block_cache(s->table, s->cache);
    rocksdb_block_based_options_set_cache_index_and_filter_blocks(s->table,
                                                                  1); /* else they grow with the store, outside the cache */
    rocksdb_block_based_options_set_pin_l0_filter_and_index_blocks_in_cache(s->table, 1);
    rocksdb_block_based_options_set_filter_policy(s->table, rocksdb_filterpolicy_create_bloom_full(10)); /* takes the policy */
    rocksdb_block_based_options_set_format_version(s->table, 5);
}

static void set_options(spurion_store *s)
{
    rocksdb_options_t *o = rocksdb_options_create();
    s->options = o;
    set_table_options(s);
    rocksdb_options_set_block_based_table_factory(o, s->table);
    rocksdb_options_set_create_if_missing(o, 1);
    rocksdb_options_set_create_missing_column_families(o, 1);
    rocksdb_options_set_paranoid_checks(o, 1);
    rocksdb_options_set_wal_recovery_mode(o, 0); /* torn tail only; the default hides damage in the middle of the log */
    rocksdb_options_set_max_total_wal_size(o, LOG_BYTES_MAX);
    rocksdb_options_set_write_buffer_size(o, WRITE_BUFFER_BYTES);
    rocksdb_options_set_db_write_buffer_size(o, SPURION_STORE_BUFFER_BYTES);
    rocksdb_options_set_max_write_buffer_number(o, 2);
    rocksdb_options_set_max_background_jobs(o, 2);
    rocksdb_options_set_max_open_files(o, OPEN_FILES_MAX);
    rocksdb_options_set_keep_log_file_num(o, 5);
    rocksdb_options_set_max_log_file_size(o, (size_t)4 << 20);
    rocksdb_options_set_stats_dump_period_sec(o, 0);
    rocksdb_options_set_compression(o, rocksdb_lz4_compression);
    s->limiter = rocksdb_ratelimiter_create(WRITE_RATE_BYTES, 100 * 1000, 10);
    rocksdb_options_set_ratelimiter(o, s->limiter);
    s->write = rocksdb_writeoptions_create();
    rocksdb_writeoptions_set_sync(s->write, !s->unsynced);
    s->read = rocksdb_readoptions_create();
    rocksdb_readoptions_set_verify_checksums(s->read, 1);
}

static spurion_status store_alloc(spurion_store **out, const spurion_store_options *options)
{
    spurion_store *s = calloc(1, sizeof *s);
    const char *sync = getenv("SPURION_STORE_SYNC");

    *out = s;
    if (!s) {
        return store_no_memory();
    }
    pthread_mutex_init(&s->writer, NULL);
    pthread_mutex_init(&s->intake, NULL);
    pthread_mutex_init(&s->trimmer, NULL);
    spurion_arena_init(&s->scratch, SCRATCH_BYTES_MAX);
    s->path = strdup(options->path);
    s->unsynced = options->unsynced || (sync && strcmp(sync, "0") == 0);
    s->free_bytes_min = options->free_bytes_min ? options->free_bytes_min : SPURION_STORE_FREE_BYTES_MIN;
    if (!s->path) {
        return store_no_memory();
    }
    if (s->unsynced) {
        spurion_log_warn("STORE-UNSYNCED",
                         "writes are acknowledged before they are synced: a power cut loses them; for tests only");
    }
    set_options(s);
    return spurion_ok();
}

/* Names of the families to open: those found (unknown ones too, so that the version can be read), and ours. Frees with free. */
static spurion_status family_names(const char ***names, size_t *count, char ***found, size_t *found_count, spurion_store *s,
                                   bool exists)
{
    char *message = NULL;
    size_t i, j, n = 0;

    *found = NULL;
    *found_count = 0;
    if (exists) {
        *found = rocksdb_list_column_families(s->options, s->path, found_count, &message);
        if (message) {
            *found = NULL;
            return store_error(s, message, "reading its manifest");
        }
    }
    *names = calloc(FAMILY_COUNT + *found_count, sizeof **names);
    if (!*names) {
        return store_no_memory();
    }
    for (n = 0; n < FAMILY_COUNT; n++) {
        (*names)[n] = store_family_names[n];
    }
    for (i = 0; i < *found_count; i++) {
        for (j = 0; j < FAMILY_COUNT && strcmp((*found)[i], store_family_names[j]) != 0; j++) {
        }
        if (j == FAMILY_COUNT) {
            (*names)[n++] = (*found)[i];
        }
    }
    *count = n;
    return spurion_ok();
}

static spurion_status open_db(spurion_store *s, bool exists)
{
    spurion_status st;
    const char **names = NULL;
    char **found = NULL, *message = NULL;
    size_t count = 0, found_count = 0, i;
    const rocksdb_options_t **options = NULL;
    rocksdb_column_family_handle_t **handles = NULL;

    SPURION_TRY(st, family_names(&names, &count, &found, &found_count, s, exists));
    options = calloc(count, sizeof *options);
    handles = calloc(count, sizeof(rocksdb_column_family_handle_t *));
    if (!options || !handles) {
        st = store_no_memory();
        goto out;
    }
    for (i = 0; i < count; i++) {
        options[i] = s->options;
    }
    s->db = rocksdb_open_column_families(s->options, s->path, (int)count, names, options, handles, &message);
    if (message) {
        s->db = NULL;
        st = store_error(s, message, "open");
        goto out;
    }
    for (i = 0; i < count; i++) {
        if (i < FAMILY_COUNT) {
            s->families[i] = handles[i];
        } else {
            rocksdb_column_family_handle_destroy(handles[i]);
        }
    }
out:
    if (found) {
        rocksdb_list_column_families_destroy(found, found_count);
    }
    free(names);
    free(options);
    free(handles);
    return st;
}

static void meta_key(store_key *k, const char *name)
{
    store_key_init(k);
    store_key_u8(k, META_OWN);
    store_key_raw(k, name, strlen(name));
}

/* A new store gets its version and the epoch of its alerts in one synced write. */
static spurion_status write_format(spurion_store *s)
{
    spurion_status st;
    rocksdb_writebatch_t *batch = rocksdb_writebatch_create();
    store_key version, epoch;
    char text[24];
    int length = snprintf(text, sizeof text, "%d", SPURION_STORE_FORMAT_VERSION);
    spurion_bytes version_text = {text, (size_t)length}, epoch_bytes = {(const char *)&s->alert_epoch, sizeof s->alert_epoch};

    while (s->alert_epoch == 0) {
        if (getrandom(&s->alert_epoch, sizeof s->alert_epoch, 0) != (ssize_t)sizeof s->alert_epoch) {
            st = spurion_error(SPURION_UNAVAILABLE, "store: getrandom: %s", strerror(errno));
            goto out;
        }
        s->alert_epoch &= INT64_MAX; /* fits every client's signed 64 bits */
    }
    meta_key(&version, "format_version");
    meta_key(&epoch, "alert_epoch");
    SPURION_TRY(st, store_put(batch, &s->scratch, s, FAMILY_META, &version, version_text));
    SPURION_TRY(st, store_put(batch, &s->scratch, s, FAMILY_META, &epoch, epoch_bytes));
    SPURION_TRY(st, store_write(s, batch));
    SPURION_TRY(st, store_files_sync_directory(s->path));
out:
    rocksdb_writebatch_destroy(batch);
    return st;
}

static spurion_status family_is_empty(bool *empty, spurion_store *s, store_family family)
{
    rocksdb_iterator_t *it = rocksdb_create_iterator_cf(s->db, s->read, s->families[family]);
    char *message = NULL;
    rocksdb_iter_seek_to_first(it);
    *empty = !rocksdb_iter_valid(it);
    rocksdb_iter_get_error(it, &message);
    rocksdb_iter_destroy(it);
    return message ? store_error(s, message, "open") : spurion_ok();
}

static spurion_status check_format(spurion_store *s)
{
    spurion_status st;
    store_key key;
    spurion_bytes value = {NULL, 0};
    bool found = false, empty = false;
    char expected[24];

    (void)snprintf(expected, sizeof expected, "%d", SPURION_STORE_FORMAT_VERSION);
    meta_key(&key, "format_version");
    SPURION_TRY(st, store_read(&found, &value, &s->scratch, s, FAMILY_META, &key));
    if (!found) { /* new, or its making was cut short: then it is empty */
        SPURION_TRY(st, family_is_empty(&empty, s, FAMILY_META));
        if (empty) {
            SPURION_TRY(st, family_is_empty(&empty, s, FAMILY_ROLLOUT));
        }
        st = empty ? write_format(s)
                   : spurion_error(SPURION_FAILED_PRECONDITION, "store %s: format_version: expected %s, found none", s->path,
                                   expected);
        goto out;
    }
    if (strcmp(value.data, expected) != 0) {
        st = spurion_error(SPURION_FAILED_PRECONDITION, "store %s: format_version: expected %s, found %s", s->path, expected,
                           value.data);
        goto out;
    }
    meta_key(&key, "alert_epoch");
    SPURION_TRY(st, store_read(&found, &value, &s->scratch, s, FAMILY_META, &key));
    if (!found || value.size != sizeof s->alert_epoch) {
        st = store_note(s, spurion_error(SPURION_DATA_LOSS, "store %s: alert_epoch: expected 8 bytes, found %zu", s->path,
                                         found ? value.size : 0));
        goto out;
    }
    memcpy(&s->alert_epoch, value.data, sizeof s->alert_epoch);
out:
    return st;
}

/* The last number of a family whose keys are u64; 0 when empty. */
static spurion_status last_number(uint64_t *out, spurion_store *s, store_family family)
{
    rocksdb_iterator_t *it = rocksdb_create_iterator_cf(s->db, s->read, s->families[family]);
    char *message = NULL;
    *out = 0;
    rocksdb_iter_seek_to_last(it);
    if (rocksdb_iter_valid(it)) {
        store_key_reader r = {NULL, 0, false};
        r.data = (const uint8_t *)rocksdb_iter_key(it, &r.left);
        *out = store_key_read_u64(&r);
    }
    rocksdb_iter_get_error(it, &message);
    rocksdb_iter_destroy(it);
    return message ? store_error(s, message, "open") : spurion_ok();
}

spurion_status spurion_store_open(spurion_store **out, const spurion_store_options *options)
{
    spurion_status st;
    spurion_store *s = NULL;
    bool exists = false;
    uint64_t last_alert = 0, last_ticket = 0;

    *out = NULL;
    SPURION_TRY(st, store_alloc(&s, options));
    SPURION_TRY(st, store_files_prepare(&exists, s->path));
    SPURION_TRY(st, store_check_space(s, 0)); /* recovery writes: before RocksDB is touched */
    SPURION_TRY(st, open_db(s, exists));
    SPURION_TRY(st, check_format(s));
    SPURION_TRY(st, store_synced_check(s));
    SPURION_TRY(st, last_number(&last_alert, s, FAMILY_ALERT));
    SPURION_TRY(st, last_number(&last_ticket, s, FAMILY_INBOX));
    atomic_store(&s->alert_next, last_alert + 1);
    s->ticket_next = last_ticket + 1;
    spurion_arena_reset(&s->scratch);
    *out = s;
    s = NULL;
out:
    if (s && s->path && st.code != SPURION_OK) {
        s->failed = true; /* close writes nothing */
    }
    spurion_store_close(s);
    return st;
}

void spurion_store_close(spurion_store *s)
{
    int i;
    if (!s) {
        return;
    }
    if (s->db && !atomic_load(&s->failed)) {
        store_synced_write(s, true);
    }
    for (i = 0; i < FAMILY_COUNT; i++) {
        if (s->families[i]) {
            rocksdb_column_family_handle_destroy(s->families[i]);
        }
    }
    if (s->db) {
        rocksdb_close(s->db);
    }
    if (s->options) {
        rocksdb_options_destroy(s->options);
        rocksdb_block_based_options_destroy(s->table);
        rocksdb_cache_destroy(s->cache);
        rocksdb_ratelimiter_destroy(s->limiter);
        rocksdb_writeoptions_destroy(s->write);
        rocksdb_readoptions_destroy(s->read);
    }
    spurion_arena_fini(&s->scratch);
    pthread_mutex_destroy(&s->writer);
    pthread_mutex_destroy(&s->intake);
    pthread_mutex_destroy(&s->trimmer);
    free(s->path);
    free(s);
}

void spurion_store_stats_get(spurion_store_stats *out, spurion_store *s)
{
    uint64_t found = 0;
    spurion_status st = free_bytes(&found, s->path);

    out->free_bytes = found;
    out->free_bytes_min = s->free_bytes_min;
    out->failed = atomic_load(&s->failed);
    out->low_space = found < 2 * s->free_bytes_min;
    out->writable = st.code == SPURION_OK && !out->failed && found >= s->free_bytes_min;
    out->commits = atomic_load(&s->commits);
    out->rows = atomic_load(&s->rows);
    out->rows_same = atomic_load(&s->rows_same);
    out->rows_conflict = atomic_load(&s->rows_conflict);
    out->alerts = atomic_load(&s->alerts);
    out->inbox_puts = atomic_load(&s->inbox_puts);
    out->corruptions = atomic_load(&s->corruptions);
    out->refused_for_space = atomic_load(&s->refused_for_space);
    out->last_sync_ns = atomic_load(&s->last_sync_ns);
}

spurion_status spurion_store_checkpoint(spurion_store *s, const char *path)
{
    spurion_status st;
    char *message = NULL;
    rocksdb_checkpoint_t *c = rocksdb_checkpoint_object_create(s->db, &message);
    if (message) {
        return store_error(s, message, "checkpoint");
    }
    rocksdb_checkpoint_create(c, path, 0,
                              &message); /* 0: flush first, so that no log in use is hard-linked (7.8.3 would not sync it) */
    rocksdb_checkpoint_object_destroy(c);
    if (message) {
        return store_error(s, message, "checkpoint");
    }
    SPURION_TRY(st, store_files_sync_directory(path));
    SPURION_TRY(st, store_files_sync_parent(path));
out:
    return st;
}

/* RocksDB and libstdc++ are not built with ThreadSanitizer: it sees their memcpy and operator new, but not the atomics by which
 * they hand memory over. Our own code is C and calls libstdc++ nowhere. Here, because every program with a store links this file. */
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SPURION_STORE_TSAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__) || defined(SPURION_STORE_TSAN)
__attribute__((visibility("default"))) const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void)
{
    return "called_from_lib:librocksdb.so\ncalled_from_lib:libstdc++.so\nrace:rocksdb::\n";
}
#endif

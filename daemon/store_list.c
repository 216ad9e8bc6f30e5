/* Lists and small lookups: runs, open steps, alerts, inbox, replies, marks, texts, and a run's rows for export; see store.h. */
#include <stdlib.h>
#include <string.h>

#include "daemon/store_count.h"

static const spurion_bytes NOTHING = {NULL, 0};

/* Opens the value that the scan stands on; payload lives in the arena. */
static spurion_status value_at(spurion_bytes *payload, spurion_arena *arena, store_scan *scan)
{
    spurion_status st;
    spurion_bytes inner;
    SPURION_TRY(st, store_note(scan->store, store_value_open(&inner, store_scan_key(scan), store_scan_value(scan))));
    *payload = store_copy(arena, inner);
    if (!payload->data) {
        st = store_no_memory();
    }
out:
    return st;
}

/* A reader of the scan's key; good until the scan moves. */
static store_key_reader key_at(const store_scan *scan)
{
    spurion_bytes key = store_scan_key(scan);
    return (store_key_reader){(const uint8_t *)key.data, key.size, false};
}

static int32_t bounded(int32_t limit)
{
    return limit < 1 ? 1 : limit > SPURION_STORE_PAGE_MAX ? SPURION_STORE_PAGE_MAX : limit;
}

spurion_status spurion_store_runs(spurion_store_run **out, int32_t *count, bool *more, spurion_arena *arena, spurion_store *s,
                                  spurion_bytes after, int32_t limit)
{
    spurion_status st;
    store_scan scan;
    store_key prefix, start;
    int32_t room = bounded(limit);

    memset(&scan, 0, sizeof scan);
    *count = 0;
    *more = false;
    *out = spurion_arena_take_array(arena, (size_t)room, sizeof **out);
    if (!*out) {
        return store_no_memory();
    }
    store_key_init(&prefix);
    store_key_u8(&prefix, COUNTER_RUN);
    store_scan_prefix(&scan, &prefix);
    store_count_key(&start, COUNTER_RUN, after, NOTHING, 0, 0);
    store_scan_init(&scan, s, FAMILY_COUNTER, false, NULL, after.size && !start.bad ? store_key_bytes(&start) : NOTHING);
    for (st = spurion_ok(); store_scan_valid(&scan); store_scan_move(&scan)) {
        spurion_store_run *run = &(*out)[*count];
        store_key_reader r = key_at(&scan);
        spurion_bytes value;
        store_counter c;
        if (*count == room) {
            *more = true;
            break;
        }
        SPURION_TRY(st, value_at(&value, arena, &scan));
        SPURION_TRY(st, store_note(s, store_counter_decode(&c, value)));
        (void)store_key_read_u8(&r);
        run->run = store_read_name(arena, &r);
        if (r.bad) {
            st = store_no_memory();
            goto out;
        }
        run->first_ms = c.first_ms;
        run->last_ms = c.last_ms;
        run->step_min = c.step_min;
        run->step_max = c.step_max;
        run->rollouts = c.scored;
        run->flagged = c.flagged;
        ++*count;
    }
    SPURION_TRY(st, store_scan_status(&scan));
out:
    store_scan_fini(&scan);
    return st;
}

spurion_status spurion_store_open_steps(spurion_store_open_step **out, int32_t *count, spurion_arena *arena, spurion_store *s,
                                        spurion_bytes run, int32_t limit)
{
    spurion_status st = spurion_ok();
    store_scan scan;
    store_key prefix;

    memset(&scan, 0, sizeof scan);
    *count = 0;
    *out = spurion_arena_take_array(arena, (size_t)(limit < 1 ? 1 : limit), sizeof **out);
    if (!*out) {
        return store_no_memory();
    }
    store_key_init(&prefix);
    store_key_u8(&prefix, COUNTER_OPEN);
    if (run.size) {
        store_key_name(&prefix, run);
    }
    store_scan_prefix(&scan, &prefix);
    store_scan_init(&scan, s, FAMILY_COUNTER, false, NULL, NOTHING);
    for (; *count < limit && store_scan_valid(&scan); store_scan_move(&scan)) {
        store_key_reader r = key_at(&scan);
        (void)store_key_read_u8(&r);
        (*out)[*count].run = store_read_name(arena, &r);
        (*out)[*count].step = store_key_read_i64(&r);
        if (r.bad) {
            st = store_no_memory();
            goto out;
        }
        ++*count;
    }
    SPURION_TRY(st, store_scan_status(&scan));
out:
    store_scan_fini(&scan);
    return st;
}

spurion_status spurion_store_step_closed(bool *out, spurion_store *s, spurion_bytes run, int64_t step, spurion_bytes rule)
{
    store_key k;
    store_count_key(&k, COUNTER_CLOSED, run, rule, 0, step);
    return store_exists(out, s, FAMILY_COUNTER, &k);
}

/* ---- alerts and inbox: keys are u64 ---- */

/* Scan of a family from number `from` on. */
static void scan_numbers(store_scan *scan, spurion_store *s, store_family family, uint64_t from)
{
    store_key_init(&scan->lower);
    store_key_u64(&scan->lower, from);
    store_key_init(&scan->upper);
    store_key_u64(&scan->upper, UINT64_MAX);
    store_scan_init(scan, s, family, false, NULL, NOTHING);
}

static uint64_t number_at(const store_scan *scan)
{
    spurion_bytes key = store_scan_key(scan);
    store_key_reader r = {(const uint8_t *)key.data, key.size, false};
    return store_key_read_u64(&r);
}

spurion_status spurion_store_alerts(spurion_store_alert_entry **out, int32_t *count, spurion_arena *arena, spurion_store *s,
                                    uint64_t from_sequence, int32_t limit, uint64_t bytes_max)
{
    spurion_status st = spurion_ok();
    store_scan scan;
    uint64_t bytes = 0;
    int32_t room = bounded(limit);

    memset(&scan, 0, sizeof scan);
    *count = 0;
    *out = spurion_arena_take_array(arena, (size_t)room, sizeof **out);
    if (!*out) {
        return store_no_memory();
    }
    scan_numbers(&scan, s, FAMILY_ALERT, from_sequence);
    for (; *count < room && store_scan_valid(&scan); store_scan_move(&scan)) {
        spurion_store_alert_entry *e = &(*out)[*count];
        e->sequence = number_at(&scan);
        SPURION_TRY(st, value_at(&e->alert, arena, &scan));
        bytes += e->alert.size;
        if (bytes_max && *count > 0 && bytes > bytes_max) {
            break;
        }
        ++*count;
    }
    SPURION_TRY(st, store_scan_status(&scan));
out:
    store_scan_fini(&scan);
    return st;
}

uint64_t spurion_store_alert_epoch(const spurion_store *s)
{
    return s->alert_epoch;
}

uint64_t spurion_store_alert_next(const spurion_store *s)
{
    return atomic_load(&s->alert_next);
}

spurion_status spurion_store_inbox(spurion_store_inbox_entry **out, int32_t *count, int32_t *damaged, spurion_arena *arena,
                                   spurion_store *s, uint64_t after_ticket, int32_t limit)
{
    spurion_status st = spurion_ok();
    store_scan scan;
    int32_t room = bounded(limit), bad = 0;

    memset(&scan, 0, sizeof scan);
    *count = 0;
    *out = spurion_arena_take_array(arena, (size_t)room, sizeof **out);
    if (!*out) {
        return store_no_memory();
    }
    scan_numbers(&scan, s, FAMILY_INBOX, after_ticket + 1);
    for (; *count < room && store_scan_valid(&scan); store_scan_move(&scan)) {
        spurion_store_inbox_entry *e = &(*out)[*count];
        e->ticket = number_at(&scan);
        st = value_at(&e->value, arena, &scan);
        if (st.code == SPURION_DATA_LOSS) {
            bad++;
            st = spurion_ok();
            continue;
        }
        SPURION_TRY(st, st);
        ++*count;
    }
    SPURION_TRY(st, store_scan_status(&scan));
out:
    if (damaged) {
        *damaged = bad;
    }
    store_scan_fini(&scan);
    return st;
}

/* ---- replies, marks, texts ---- */

spurion_status spurion_store_reply_get(spurion_bytes *out, spurion_arena *arena, spurion_store *s, spurion_bytes key,
                                       int64_t now_ms)
{
    spurion_status st;
    store_key k;
    spurion_bytes value = {NULL, 0};
    uint64_t expires = 0;
    bool found = false;
    int i;

    store_key_init(&k);
    store_key_u8(&k, REPLY_KEY);
    store_key_raw(&k, key.data, key.size);
    SPURION_TRY(st, store_read(&found, &value, arena, s, FAMILY_REPLY, &k));
    if (found && value.size < 8) {
        st = store_note(s, spurion_error(SPURION_DATA_LOSS, "store: reply of %zu bytes, expected at least 8", value.size));
        goto out;
    }
    for (i = 0; found && i < 8; i++) {
        expires |= (uint64_t)(uint8_t)value.data[i] << (8 * i);
    }
    if (!found || (int64_t)expires <= now_ms) {
        st = spurion_error(SPURION_NOT_FOUND, "store: no reply to this idempotency key, or none any more");
        goto out;
    }
    out->data = value.data + 8;
    out->size = value.size - 8;
out:
    return st;
}

spurion_status spurion_store_mark_get(spurion_bytes *ranges, spurion_arena *arena, spurion_store *s, spurion_bytes run,
                                      spurion_bytes producer, uint64_t epoch)
{
    spurion_status st;
    store_key k;
    bool found = false;

    store_key_init(&k);
    store_key_name(&k, run);
    store_key_name(&k, producer);
    store_key_u64(&k, epoch);
    SPURION_TRY(st, store_read(&found, ranges, arena, s, FAMILY_PRODUCER, &k));
    if (!found) {
        st = spurion_error(SPURION_NOT_FOUND, "store: nothing known of this producer's epoch");
    }
out:
    return st;
}

spurion_status spurion_store_marks(spurion_store_mark **out, int32_t *count, spurion_arena *arena, spurion_store *s,
                                   spurion_bytes run, int32_t limit)
{
    spurion_status st = spurion_ok();
    store_scan scan;

    memset(&scan, 0, sizeof scan);
    *count = 0;
    *out = spurion_arena_take_array(arena, (size_t)(limit < 1 ? 1 : limit), sizeof **out);
    if (!*out) {
        return store_no_memory();
    }
    store_key_init(&scan.lower);
    store_key_init(&scan.upper);
    if (run.size) {
        store_key_name(&scan.lower, run);
        store_scan_prefix(&scan, &scan.lower);
    } else {
        store_key_u8(&scan.upper, 0xff); /* names are shorter */
    }
    store_scan_init(&scan, s, FAMILY_PRODUCER, false, NULL, NOTHING);
    for (; *count < limit && store_scan_valid(&scan); store_scan_move(&scan)) {
        spurion_store_mark *m = &(*out)[*count];
        store_key_reader r = key_at(&scan);
        SPURION_TRY(st, value_at(&m->ranges, arena, &scan));
        m->run = store_read_name(arena, &r);
        m->producer = store_read_name(arena, &r);
        m->epoch = store_key_read_u64(&r);
        if (r.bad) {
            st = store_no_memory();
            goto out;
        }
        ++*count;
    }
    SPURION_TRY(st, store_scan_status(&scan));
out:
    store_scan_fini(&scan);
    return st;
}

spurion_status spurion_store_meta_get(spurion_bytes *out, spurion_arena *arena, spurion_store *s, spurion_bytes key)
{
    spurion_status st;
    store_key k;
    bool found = false;

    store_key_init(&k);
    store_key_u8(&k, META_TEXT);
    store_key_raw(&k, key.data, key.size);
    SPURION_TRY(st, store_read(&found, out, arena, s, FAMILY_META, &k));
    if (!found) {
        st = spurion_error(SPURION_NOT_FOUND, "store: no such text");
    }
out:
    return st;
}

/* ---- export ---- */

struct spurion_store_export {
    spurion_store *store;
    const rocksdb_snapshot_t *snapshot;
    store_scan scan;
    rocksdb_readoptions_t *read;
    spurion_arena arena; /* of the row given last */
    bool started;
};

spurion_status spurion_store_export_open(spurion_store_export **out, spurion_store *s, spurion_bytes run)
{
    spurion_status st;
    spurion_store_export *e;
    store_key prefix;

    *out = NULL;
    SPURION_TRY(st, store_check_name(run, "run"));
    e = calloc(1, sizeof *e);
    if (!e) {
        return store_no_memory();
    }
    e->store = s;
    spurion_arena_init(&e->arena, 0);
    e->snapshot = rocksdb_create_snapshot(s->db);
    e->read = rocksdb_readoptions_create();
    rocksdb_readoptions_set_verify_checksums(e->read, 1);
    rocksdb_readoptions_set_snapshot(e->read, e->snapshot);
    store_key_init(&prefix);
    store_key_name(&prefix, run);
    store_scan_prefix(&e->scan, &prefix);
    store_scan_init(&e->scan, s, FAMILY_ROLLOUT, false, e->snapshot, NOTHING);
    *out = e;
out:
    return st;
}

static spurion_status export_record(spurion_store_row *out, spurion_store_export *e, spurion_bytes key)
{
    spurion_status st;
    char *message = NULL;
    spurion_bytes raw, payload;

    raw.data = rocksdb_get_cf(e->store->db, e->read, e->store->families[FAMILY_RECORD], key.data, key.size, &raw.size, &message);
    if (message) {
        return store_error(e->store, message, "export");
    }
    if (!raw.data) {
        return store_note(e->store, spurion_error(SPURION_DATA_LOSS, "store: a row's record is gone"));
    }
    SPURION_TRY(st, store_note(e->store, store_value_open(&payload, key, raw)));
    out->record = store_copy(&e->arena, payload);
    if (!out->record.data) {
        st = store_no_memory();
    }
out:
    rocksdb_free((void *)raw.data);
    return st;
}

spurion_status spurion_store_export_next(bool *found, spurion_store_row *out, spurion_store_export *e)
{
    spurion_status st;
    store_key_reader r;
    spurion_bytes payload;

    *found = false;
    memset(out, 0, sizeof *out);
    spurion_arena_reset(&e->arena);
    if (e->started && store_scan_valid(&e->scan)) {
        store_scan_move(&e->scan);
    }
    e->started = true;
    if (!store_scan_valid(&e->scan)) {
        return store_scan_status(&e->scan);
    }
    *found = true;
    r = key_at(&e->scan);
    out->identity.run = store_key_read_name(&r);
    store_key_read_tail(&out->identity, &r);
    SPURION_TRY(st, store_own_names(&out->identity, &e->arena));
    SPURION_TRY(st, value_at(&payload, &e->arena, &e->scan));
    SPURION_TRY(st, store_note(e->store, store_row_decode(out, &e->arena, payload)));
    if (out->has_record) {
        SPURION_TRY(st, export_record(out, e, store_scan_key(&e->scan)));
    }
out:
    return st;
}

void spurion_store_export_close(spurion_store_export *e)
{
    if (!e) {
        return;
    }
    store_scan_fini(&e->scan);
    rocksdb_readoptions_destroy(e->read);
    rocksdb_release_snapshot(e->store->db, e->snapshot);
    spurion_arena_fini(&e->arena);
    free(e);
}

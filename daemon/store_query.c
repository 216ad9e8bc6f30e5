/* Rows: by identity, by query, whole runs for export; see store.h. A query is one scan of the index that fits it best; what the
 * index cannot say is checked on the row, and the work of a page is bounded. */
#include <string.h>

#include "daemon/store_internal.h"

#define CURSOR_HEAD_BYTES 4 /* CRC32C over range, direction, index and key: a cursor fits its own query only */

typedef struct plan {
    store_family family;
    bool descending;
    store_key lower, upper;
    spurion_arena *look; /* for rows that may not fit: they must leave nothing in the caller's arena, there may be thousands */
} plan;

/* ---- one row ---- */

static spurion_status read_row(bool *found, spurion_store_row *out, spurion_arena *arena, spurion_store *s,
                               const spurion_identity *identity, bool with_record)
{
    spurion_status st;
    store_key key;
    spurion_bytes payload = {NULL, 0};
    bool has = false;

    memset(out, 0, sizeof *out);
    store_key_init(&key);
    store_key_identity(&key, identity);
    SPURION_TRY(st, store_read(found, &payload, arena, s, FAMILY_ROLLOUT, &key));
    if (!*found) {
        goto out;
    }
    SPURION_TRY(st, store_note(s, store_row_decode(out, arena, payload)));
    out->identity = *identity;
    SPURION_TRY(st, store_own_names(&out->identity, arena));
    if (with_record && out->has_record) {
        SPURION_TRY(st, store_read(&has, &out->record, arena, s, FAMILY_RECORD, &key));
        if (!has) {
            st = store_note(s, spurion_error(SPURION_DATA_LOSS, "store: a row's record is gone"));
        }
    }
out:
    return st;
}

spurion_status spurion_store_get(spurion_store_row *out, spurion_arena *arena, spurion_store *s, const spurion_identity *identity,
                                 bool with_record)
{
    spurion_status st;
    bool found = false;

    SPURION_TRY(st, store_check_identity(identity));
    SPURION_TRY(st, read_row(&found, out, arena, s, identity, with_record));
    if (!found) {
        st = spurion_error(SPURION_NOT_FOUND, "store: no such rollout");
    }
out:
    return st;
}

/* ---- plans ---- */

/* lower and upper get prefix + low and the successor of prefix + high, both inclusive. */
static void range_of_i64(plan *p, const store_key *prefix, bool has_low, int64_t low, bool has_high, int64_t high)
{
    p->lower = *prefix;
    p->upper = *prefix;
    if (has_low) {
        store_key_i64(&p->lower, low);
    }
    if (has_high) {
        store_key_i64(&p->upper, high);
    }
    store_key_successor(&p->upper);
}

static void plan_by_step(plan *p, const spurion_store_query *q)
{
    store_key prefix;
    bool one_step = q->has_step_min && q->has_step_max && q->step_min == q->step_max;

    store_key_init(&prefix);
    store_key_name(&prefix, q->run);
    p->family = FAMILY_ROLLOUT;
    if (q->sae.size) {
        p->family = FAMILY_BY_FEATURE;
        store_key_name(&prefix, q->sae);
        store_key_i32(&prefix, q->index);
    } else if (q->flagged || q->rule.size) {
        p->family = FAMILY_BY_RULE;
        store_key_name(&prefix, q->rule); /* size 0: any rule */
    }
    range_of_i64(p, &prefix, q->has_step_min, q->step_min, q->has_step_max, q->step_max);
    if (one_step && q->group.size) {
        p->lower = prefix;
        store_key_i64(&p->lower, q->step_min);
        store_key_name(&p->lower, q->group);
        p->upper = p->lower;
        store_key_successor(&p->upper);
    }
}

static void plan_by_effect(plan *p, const spurion_store_query *q)
{
    store_key prefix;
    store_key_init(&prefix);
    store_key_name(&prefix, q->run);
    store_key_name(&prefix, q->rule); /* size 0: the rollout's effect */
    p->family = FAMILY_BY_EFFECT;
    p->lower = prefix;
    p->upper = prefix;
    if (q->has_effect_min) {
        store_key_float(&p->lower, q->effect_min);
    }
    if (q->has_effect_max) {
        store_key_float(&p->upper, q->effect_max);
    }
    store_key_successor(&p->upper);
}

static spurion_status plan_make(plan *p, const spurion_store_query *q)
{
    spurion_status st;
    store_key prefix;

    memset(p, 0, sizeof *p);
    SPURION_TRY(st, store_check_name(q->run, "run"));
    if (q->order != SPURION_ORDER_STEP && q->order != SPURION_ORDER_TIME && q->order != SPURION_ORDER_EFFECT) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "store: order: expected step, time or effect, found %d", (int)q->order);
        goto out;
    }
    if (q->limit < 0 || q->limit > SPURION_STORE_PAGE_MAX) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "store: limit: expected 0 to %d, found %d", SPURION_STORE_PAGE_MAX, q->limit);
        goto out;
    }
    p->descending = q->descending;
    if (q->order == SPURION_ORDER_STEP) {
        plan_by_step(p, q);
    } else if (q->order == SPURION_ORDER_EFFECT) {
        plan_by_effect(p, q);
    } else {
        store_key_init(&prefix);
        store_key_name(&prefix, q->run);
        p->family = FAMILY_BY_TIME;
        range_of_i64(p, &prefix, q->has_time_min, q->time_min, q->has_time_max, q->time_max);
    }
    if (p->lower.bad || p->upper.bad) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "store: query: expected names of at most %d bytes", SPURION_NAME_BYTES_MAX);
    }
out:
    return st;
}

/* ---- cursors ---- */

static uint32_t cursor_crc(const plan *p, spurion_bytes key)
{
    uint8_t head[2] = {(uint8_t)p->family, p->descending};
    uint32_t crc = spurion_crc32c(0, head, sizeof head);
    crc = spurion_crc32c(crc, p->lower.data, p->lower.size);
    crc = spurion_crc32c(crc, p->upper.data, p->upper.size);
    return spurion_crc32c(crc, key.data, key.size);
}

static spurion_status cursor_make(spurion_bytes *out, spurion_arena *arena, const plan *p, spurion_bytes key)
{
    char *data = spurion_arena_take(arena, CURSOR_HEAD_BYTES + key.size);
    uint32_t crc = cursor_crc(p, key);
    int i;
    if (!data) {
        return store_no_memory();
    }
    for (i = 0; i < CURSOR_HEAD_BYTES; i++) {
        data[i] = (char)(uint8_t)(crc >> (8 * i));
    }
    memcpy(data + CURSOR_HEAD_BYTES, key.data, key.size);
    out->data = data;
    out->size = CURSOR_HEAD_BYTES + key.size;
    return spurion_ok();
}

static spurion_status cursor_key(spurion_bytes *key, const plan *p, spurion_bytes cursor)
{
    uint32_t crc = 0;
    int i;

    key->data = NULL;
    key->size = 0;
    if (cursor.size == 0) {
        return spurion_ok();
    }
    for (i = 0; i < CURSOR_HEAD_BYTES && cursor.size > CURSOR_HEAD_BYTES; i++) {
        crc |= (uint32_t)(uint8_t)cursor.data[i] << (8 * i);
    }
    if (cursor.size > CURSOR_HEAD_BYTES) {
        key->data = cursor.data + CURSOR_HEAD_BYTES;
        key->size = cursor.size - CURSOR_HEAD_BYTES;
    }
    if (cursor.size <= CURSOR_HEAD_BYTES || cursor.size > CURSOR_HEAD_BYTES + STORE_KEY_BYTES_MAX || cursor_crc(p, *key) != crc) {
        return spurion_error(SPURION_INVALID_ARGUMENT,
                             "store: cursor of %zu bytes: expected one that this query gave, found another", cursor.size);
    }
    return spurion_ok();
}

/* ---- pages ---- */

/* The identity at the end of an index key; names point into key. */
static spurion_status identity_of(spurion_identity *out, spurion_bytes key, store_family family)
{
    store_key_reader r = {(const uint8_t *)key.data, key.size, false};

    out->run = store_key_read_name(&r);
    if (family != FAMILY_ROLLOUT && family != FAMILY_BY_TIME) {
        (void)store_key_read_name(&r); /* rule or sae */
    }
    if (family == FAMILY_BY_FEATURE || family == FAMILY_BY_EFFECT) {
        (void)store_key_read_u32(&r); /* index or effect */
    } else if (family == FAMILY_BY_TIME) {
        (void)store_key_read_u64(&r);
    }
    store_key_read_tail(out, &r);
    return r.bad ? spurion_error(SPURION_DATA_LOSS, "store: key of %s with %zu bytes that reads as none",
                                 store_family_names[family], key.size)
                 : spurion_ok();
}

static const spurion_store_flag *flag_of(const spurion_store_row *row, spurion_bytes rule)
{
    int32_t i;
    for (i = 0; i < row->flag_count; i++) {
        if (row->flags[i].rule.size == rule.size && memcmp(row->flags[i].rule.data, rule.data, rule.size) == 0) {
            return &row->flags[i];
        }
    }
    return NULL;
}

/* Conditions that need no row. */
static bool identity_fits(const spurion_identity *id, const spurion_store_query *q)
{
    return (!q->has_step_min || id->step >= q->step_min) && (!q->has_step_max || id->step <= q->step_max) &&
           (!q->group.size || (id->group.size == q->group.size && memcmp(id->group.data, q->group.data, q->group.size) == 0));
}

static bool row_fits(const spurion_store_row *row, const spurion_store_query *q)
{
    const spurion_store_flag *flag = q->rule.size ? flag_of(row, q->rule) : NULL;
    float effect = flag ? flag->effect : row->effect;
    return (!q->flagged || row->flag_count > 0) && (!q->rule.size || flag) && (!q->has_time_min || row->time_ms >= q->time_min) &&
           (!q->has_time_max || row->time_ms <= q->time_max) && (!q->has_effect_min || effect >= q->effect_min) &&
           (!q->has_effect_max || effect <= q->effect_max);
}

static spurion_status feature_fits(bool *fits, spurion_store *s, const spurion_identity *id, const plan *p,
                                   const spurion_store_query *q)
{
    store_key k;
    if (!q->sae.size || p->family == FAMILY_BY_FEATURE) {
        *fits = true;
        return spurion_ok();
    }
    store_key_init(&k);
    store_key_name(&k, id->run);
    store_key_name(&k, q->sae);
    store_key_i32(&k, q->index);
    store_key_tail(&k, id);
    return store_exists(fits, s, FAMILY_BY_FEATURE, &k);
}

/* Does the row of an index entry fit? */
static spurion_status entry_fits(bool *fits, store_scan *scan, const spurion_identity *id, const plan *p,
                                 const spurion_store_query *q)
{
    spurion_status st;
    spurion_store_row row;
    bool found = false;

    *fits = identity_fits(id, q);
    if (*fits) {
        SPURION_TRY(st, feature_fits(fits, scan->store, id, p, q));
    }
    if (!*fits || !(q->flagged || q->rule.size || q->has_time_min || q->has_time_max || q->has_effect_min || q->has_effect_max)) {
        return spurion_ok();
    }
    spurion_arena_reset(p->look);
    SPURION_TRY(st, read_row(&found, &row, p->look, scan->store, id, false));
    *fits = !found || row_fits(&row, q); /* one that is not found is told by who reads it */
out:
    return st;
}

/* Looks at one index entry; *taken when its row is now in `row`. */
static spurion_status consider(bool *taken, spurion_store_row *row, spurion_store_page *out, spurion_arena *arena, store_scan *scan,
                               const plan *p, const spurion_store_query *q)
{
    spurion_status st;
    spurion_identity id;
    bool found = false, fits = false;
    spurion_bytes key = store_scan_key(scan);

    *taken = false;
    SPURION_TRY(st, store_note(scan->store, identity_of(&id, key, p->family)));
    SPURION_TRY(st, entry_fits(&fits, scan, &id, p, q));
    if (!fits) {
        goto out;
    }
    SPURION_TRY(st, read_row(&found, row, arena, scan->store, &id, q->with_record));
    if (!found) {
        st = store_note(scan->store,
                        spurion_error(SPURION_DATA_LOSS, "store: an entry of %s without its row", store_family_names[p->family]));
        goto out;
    }
    SPURION_TRY(st, cursor_make(&row->cursor, arena, p, key));
    *taken = true;
out:
    if (st.code == SPURION_DATA_LOSS) { /* counted; the intact rest is served */
        out->damaged_count++;
        st = spurion_ok();
    }
    return st;
}

static spurion_status fill_page(spurion_store_page *out, spurion_arena *arena, store_scan *scan, const plan *p,
                                const spurion_store_query *q, int32_t limit)
{
    spurion_status st = spurion_ok();
    uint64_t bytes = 0;
    int32_t examined = 0;

    for (; store_scan_valid(scan); store_scan_move(scan)) {
        spurion_store_row row;
        bool taken = false;

        if (out->row_count == limit || examined == SPURION_STORE_EXAMINED_MAX) {
            out->more = true;
            goto out;
        }
        examined++;
        SPURION_TRY(st, consider(&taken, &row, out, arena, scan, p, q));
        if (taken) {
            uint64_t size = row.verdict.size + row.record.size;
            if (q->bytes_max && out->row_count > 0 && bytes + size > q->bytes_max) {
                out->more = true;
                goto out;
            }
            bytes += size;
            out->rows[out->row_count++] = row;
            out->cursor = row.cursor;
        } else if (examined == SPURION_STORE_EXAMINED_MAX) {
            SPURION_TRY(st, cursor_make(&out->cursor, arena, p, store_scan_key(scan)));
        }
    }
    SPURION_TRY(st, store_scan_status(scan));
out:
    return st;
}

spurion_status spurion_store_query_page(spurion_store_page *out, spurion_arena *arena, spurion_store *s,
                                        const spurion_store_query *query)
{
    spurion_status st;
    plan p;
    store_scan scan;
    spurion_arena look;
    spurion_bytes after;
    int32_t limit = query->limit ? query->limit : 100;

    memset(out, 0, sizeof *out);
    memset(&scan, 0, sizeof scan);
    spurion_arena_init(&look, 0);
    SPURION_TRY(st, plan_make(&p, query));
    p.look = &look;
    SPURION_TRY(st, cursor_key(&after, &p, query->cursor));
    out->rows = spurion_arena_take_array(arena, (size_t)limit, sizeof *out->rows);
    if (!out->rows) {
        st = store_no_memory();
        goto out;
    }
    scan.lower = p.lower;
    scan.upper = p.upper;
    store_scan_init(&scan, s, p.family, p.descending, NULL, after);
    SPURION_TRY(st, fill_page(out, arena, &scan, &p, query, limit));
    if (out->cursor.size == 0 && query->cursor.size) {
        out->cursor = store_copy(arena, query->cursor); /* nothing came: the same place */
    }
out:
    store_scan_fini(&scan);
    spurion_arena_fini(&look);
    return st;
}

/* ---- the worst of a step ---- */

static float worst_size(const spurion_store_worst *w)
{
    return w->effect < 0 ? -w->effect : w->effect;
}

/* Keeps the limit largest, ordered; the scan's order breaks ties. */
static void worst_insert(spurion_store_worst *list, int32_t *count, int32_t limit, const spurion_store_worst *w)
{
    int32_t i = *count;
    while (i > 0 && worst_size(&list[i - 1]) < worst_size(w)) {
        i--;
    }
    if (i == limit) {
        return;
    }
    *count = *count < limit ? *count + 1 : limit;
    memmove(&list[i + 1], &list[i], (size_t)(*count - 1 - i) * sizeof *list);
    list[i] = *w;
}

static spurion_status worst_read(spurion_store_worst *out, spurion_arena *arena, store_scan *scan)
{
    spurion_status st;
    spurion_bytes value = store_scan_value(scan);
    uint32_t bits;
    if (value.size != 4) {
        return store_note(scan->store, spurion_error(SPURION_DATA_LOSS, "store: effect of %zu bytes, expected 4", value.size));
    }
    bits = (uint32_t)(uint8_t)value.data[0] | (uint32_t)(uint8_t)value.data[1] << 8 | (uint32_t)(uint8_t)value.data[2] << 16 |
           (uint32_t)(uint8_t)value.data[3] << 24;
    memcpy(&out->effect, &bits, sizeof out->effect);
    SPURION_TRY(st, store_note(scan->store, identity_of(&out->identity, store_scan_key(scan), FAMILY_BY_RULE)));
    SPURION_TRY(st, store_own_names(&out->identity, arena));
out:
    return st;
}

spurion_status spurion_store_worst_of_step(spurion_store_worst **out, int32_t *count, spurion_arena *arena, spurion_store *s,
                                           spurion_bytes run, spurion_bytes rule, int64_t step, int32_t limit)
{
    spurion_status st;
    store_scan scan;
    store_key prefix;
    int32_t room = limit < 1 ? 1 : limit > 64 ? 64 : limit;

    memset(&scan, 0, sizeof scan);
    *count = 0;
    *out = spurion_arena_take_array(arena, (size_t)room, sizeof **out);
    if (!*out) {
        return store_no_memory();
    }
    SPURION_TRY(st, store_check_name(run, "run"));
    SPURION_TRY(st, store_check_name(rule, "rule"));
    store_key_init(&prefix);
    store_key_name(&prefix, run);
    store_key_name(&prefix, rule);
    store_key_i64(&prefix, step);
    store_scan_prefix(&scan, &prefix);
    store_scan_init(&scan, s, FAMILY_BY_RULE, false, NULL, (spurion_bytes){NULL, 0});
    for (; store_scan_valid(&scan); store_scan_move(&scan)) {
        spurion_store_worst w;
        SPURION_TRY(st, worst_read(&w, arena, &scan));
        worst_insert(*out, count, room, &w);
    }
    SPURION_TRY(st, store_scan_status(&scan));
out:
    store_scan_fini(&scan);
    return st;
}

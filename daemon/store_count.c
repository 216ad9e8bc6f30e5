/* Counters: raising them in a commit, reading them in ranges; see store.h, store_count.h. */
#include "daemon/store_count.h"

#include <string.h>

void store_count_key(store_key *k, uint8_t kind, spurion_bytes run, spurion_bytes name, int32_t index, int64_t step)
{
    bool by_name = kind == COUNTER_RULE || kind == COUNTER_RULE_RUN;
    bool by_feature = kind == COUNTER_FEATURE || kind == COUNTER_FEATURE_RUN;

    store_key_init(k);
    store_key_u8(k, kind);
    store_key_name(k, run);
    if (by_name || by_feature) {
        store_key_name(k, name);
    }
    if (by_feature) {
        store_key_i32(k, index);
    }
    if (kind == COUNTER_STEP || kind == COUNTER_RULE || kind == COUNTER_FEATURE || kind == COUNTER_OPEN || kind == COUNTER_CLOSED) {
        store_key_i64(k, step);
    }
    if (kind == COUNTER_CLOSED) {
        store_key_name(k, name);
    }
}

/* ---- raising ---- */

static spurion_status tally_resize(store_tally *t, size_t capacity)
{
    store_tally_entry *old = t->entries;
    size_t old_capacity = t->capacity, i;

    t->entries = spurion_arena_take_array(t->arena, capacity, sizeof *t->entries);
    if (!t->entries) {
        t->entries = old;
        return store_no_memory();
    }
    t->capacity = capacity;
    for (i = 0; i < old_capacity; i++) {
        if (old[i].key.data) {
            size_t at = spurion_crc32c(0, old[i].key.data, old[i].key.size) & (capacity - 1);
            while (t->entries[at].key.data) {
                at = (at + 1) & (capacity - 1);
            }
            t->entries[at] = old[i];
        }
    }
    return spurion_ok();
}

spurion_status store_tally_init(store_tally *t, spurion_arena *arena)
{
    memset(t, 0, sizeof *t);
    t->arena = arena;
    return tally_resize(t, 64);
}

spurion_status store_tally_add(store_tally *t, const store_key *key, const store_counter *delta)
{
    spurion_status st = spurion_ok();
    size_t at;

    if (key->bad) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "store: counter with a name over %d bytes", SPURION_NAME_BYTES_MAX);
    }
    if (2 * t->used >= t->capacity) {
        SPURION_TRY(st, tally_resize(t, 2 * t->capacity));
    }
    at = spurion_crc32c(0, key->data, key->size) & (t->capacity - 1);
    while (t->entries[at].key.data) {
        store_tally_entry *e = &t->entries[at];
        if (e->key.size == key->size && memcmp(e->key.data, key->data, key->size) == 0) {
            store_counter_add(&e->delta, delta);
            return st;
        }
        at = (at + 1) & (t->capacity - 1);
    }
    t->entries[at].key = store_copy(t->arena, store_key_bytes(key));
    if (!t->entries[at].key.data) {
        st = store_no_memory();
        goto out;
    }
    t->entries[at].delta = *delta;
    t->used++;
out:
    return st;
}

spurion_status store_tally_write(store_tally *t, rocksdb_writebatch_t *batch, spurion_store *s)
{
    spurion_status st = spurion_ok();
    size_t i;

    for (i = 0; i < t->capacity; i++) {
        store_tally_entry *e = &t->entries[i];
        store_counter counter;
        store_key key;
        spurion_bytes value = {NULL, 0};
        uint8_t encoded[STORE_COUNTER_BYTES];
        bool found = false;

        if (!e->key.data) {
            continue;
        }
        store_key_init(&key);
        store_key_raw(&key, e->key.data, e->key.size);
        memset(&counter, 0, sizeof counter);
        SPURION_TRY(st, store_read(&found, &value, t->arena, s, FAMILY_COUNTER, &key));
        if (found) {
            SPURION_TRY(st, store_note(s, store_counter_decode(&counter, value)));
        }
        store_counter_add(&counter, &e->delta);
        store_counter_encode(encoded, &counter);
        value.data = (const char *)encoded;
        value.size = sizeof encoded;
        SPURION_TRY(st, store_put(batch, t->arena, s, FAMILY_COUNTER, &key, value));
    }
out:
    return st;
}

/* ---- reading ---- */

static spurion_status read_counter(store_counter *out, spurion_store *s, const store_key *key)
{
    spurion_status st;
    spurion_arena arena;
    spurion_bytes value = {NULL, 0};
    bool found = false;

    memset(out, 0, sizeof *out);
    spurion_arena_init(&arena, 0);
    SPURION_TRY(st, store_read(&found, &value, &arena, s, FAMILY_COUNTER, key));
    if (found) {
        st = store_note(s, store_counter_decode(out, value));
    }
out:
    spurion_arena_fini(&arena);
    return st;
}

static spurion_status decode_at(store_counter *out, store_scan *scan)
{
    spurion_status st;
    spurion_bytes payload;
    SPURION_TRY(st, store_value_open(&payload, store_scan_key(scan), store_scan_value(scan)));
    SPURION_TRY(st, store_counter_decode(out, payload));
out:
    return store_note(scan->store, st);
}

static void count_from(spurion_store_count *out, const store_counter *c)
{
    out->scored = c->scored;
    out->flagged = c->flagged;
    out->effect_sum = c->effect_sum;
    out->reward_sum = c->reward_sum;
    out->reward_square_sum = c->reward_square_sum;
    out->counterfactual_sum = c->counterfactual_sum;
}

static uint8_t kind_byte(const spurion_store_counts_query *q)
{
    switch (q->kind) {
    case SPURION_COUNT_RULE:
        return q->totals ? COUNTER_RULE_RUN : COUNTER_RULE;
    case SPURION_COUNT_FEATURE:
        return q->totals ? COUNTER_FEATURE_RUN : COUNTER_FEATURE;
    default:
        return q->totals ? COUNTER_RUN : COUNTER_STEP;
    }
}

/* The part of the key that a query fixes: kind, run, and unless all rules (features) are asked for, which one. */
static spurion_status query_range(store_scan *scan, const spurion_store_counts_query *q)
{
    spurion_status st;
    store_key prefix;

    SPURION_TRY(st, store_check_name(q->run, "run"));
    if (!q->totals && q->kind == SPURION_COUNT_RULE) {
        SPURION_TRY(st, store_check_name(q->rule, "rule"));
    }
    if (!q->totals && q->kind == SPURION_COUNT_FEATURE) {
        SPURION_TRY(st, store_check_name(q->sae, "sae"));
    }
    store_key_init(&prefix);
    store_key_u8(&prefix, kind_byte(q));
    store_key_name(&prefix, q->run);
    if (!q->totals && q->kind != SPURION_COUNT_STEP) {
        store_key_name(&prefix, q->kind == SPURION_COUNT_RULE ? q->rule : q->sae);
        if (q->kind == SPURION_COUNT_FEATURE) {
            store_key_i32(&prefix, q->index);
        }
    }
    scan->lower = prefix;
    scan->upper = prefix;
    if (!q->totals) {
        store_key_i64(&scan->lower, q->has_step_min ? q->step_min : 0);
        if (q->has_step_max) {
            store_key_i64(&scan->upper, q->step_max);
        }
    }
    store_key_successor(&scan->upper);
out:
    return st;
}

static spurion_status count_at(spurion_store_count *out, spurion_arena *arena, store_scan *scan,
                               const spurion_store_counts_query *q)
{
    spurion_status st;
    store_counter c;
    spurion_bytes key = store_scan_key(scan);
    store_key_reader r = {(const uint8_t *)key.data, key.size, false};

    SPURION_TRY(st, decode_at(&c, scan));
    (void)store_key_read_u8(&r);
    (void)store_key_read_name(&r);
    if (q->kind == SPURION_COUNT_RULE) {
        out->rule = store_read_name(arena, &r);
    } else if (q->kind == SPURION_COUNT_FEATURE) {
        out->sae = store_read_name(arena, &r);
        out->index = store_key_read_i32(&r);
    }
    out->step = q->totals ? -1 : store_key_read_i64(&r);
    if (r.bad || r.left) {
        st = store_note(scan->store,
                        spurion_error(SPURION_DATA_LOSS, "store: counter with a key of %zu bytes that reads as none", key.size));
    }
    count_from(out, &c);
out:
    return st;
}

spurion_status spurion_store_counts(spurion_store_counts_page *out, spurion_arena *arena, spurion_store *s,
                                    const spurion_store_counts_query *q)
{
    spurion_status st;
    int32_t limit = q->limit <= 0 ? 100 : q->limit > SPURION_STORE_PAGE_MAX ? SPURION_STORE_PAGE_MAX : q->limit;
    store_scan scan;

    memset(out, 0, sizeof *out);
    memset(&scan, 0, sizeof scan);
    SPURION_TRY(st, query_range(&scan, q));
    if (scan.lower.bad || scan.upper.bad ||
        (q->cursor.size && (q->cursor.size < scan.lower.size - (q->totals ? 0 : 8) ||
                            memcmp(q->cursor.data, scan.lower.data, scan.lower.size - (q->totals ? 0 : 8)) != 0))) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "store: cursor of %zu bytes: expected one that this query gave",
                           q->cursor.size);
        goto out;
    }
    out->counts = spurion_arena_take_array(arena, (size_t)limit, sizeof *out->counts);
    if (!out->counts) {
        st = store_no_memory();
        goto out;
    }
    store_scan_init(&scan, s, FAMILY_COUNTER, false, NULL, q->cursor);
    for (; store_scan_valid(&scan); store_scan_move(&scan)) {
        if (out->count == limit) {
            out->more = true;
            break;
        }
        SPURION_TRY(st, count_at(&out->counts[out->count], arena, &scan, q));
        out->count++;
        if (out->count == limit) {
            out->cursor = store_copy(arena, store_scan_key(&scan));
        }
    }
    SPURION_TRY(st, store_scan_status(&scan));
out:
    store_scan_fini(&scan);
    return st;
}

spurion_status spurion_store_rule_counts(spurion_store_count *at_step, spurion_store_count *through_step, spurion_store *s,
                                         spurion_bytes run, spurion_bytes rule, int64_t step)
{
    spurion_status st;
    store_counter c;
    store_key key;
    store_scan scan;

    memset(at_step, 0, sizeof *at_step);
    memset(through_step, 0, sizeof *through_step);
    memset(&scan, 0, sizeof scan);
    at_step->step = through_step->step = step;
    store_count_key(&key, COUNTER_RULE, run, rule, 0, step);
    SPURION_TRY(st, read_counter(&c, s, &key));
    count_from(at_step, &c);
    store_count_key(&key, COUNTER_RULE_RUN, run, rule, 0, 0);
    SPURION_TRY(st, read_counter(&c, s, &key));
    count_from(through_step, &c);
    /* All steps less the later ones: of these there are few while a run goes on, and many of the earlier. */
    store_count_key(&scan.upper, COUNTER_RULE, run, rule, 0, INT64_MAX);
    store_key_successor(&scan.upper);
    store_count_key(&scan.lower, COUNTER_RULE, run, rule, 0, step == INT64_MAX ? step : step + 1);
    store_scan_init(&scan, s, FAMILY_COUNTER, false, NULL, (spurion_bytes){NULL, 0});
    for (; store_scan_valid(&scan) && step < INT64_MAX; store_scan_move(&scan)) {
        SPURION_TRY(st, decode_at(&c, &scan));
        through_step->scored -= c.scored;
        through_step->flagged -= c.flagged;
        through_step->effect_sum -= c.effect_sum;
    }
    SPURION_TRY(st, store_scan_status(&scan));
out:
    store_scan_fini(&scan);
    return st;
}

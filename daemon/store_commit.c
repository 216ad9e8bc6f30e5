/* Writing: commits, the inbox, meta texts, expired replies; see store.h. One RocksDB WriteBatch each. */
#include <inttypes.h>
#include <string.h>

#include "daemon/store_count.h"

typedef struct commit {
    spurion_store *s;
    spurion_store_batch *batch;
    spurion_arena *arena;
    rocksdb_writebatch_t *wb;
    store_tally tally;
    store_tally seen;   /* identities of this batch: scored = place of the row + 1 */
    store_tally closed; /* closings of this batch */
    uint64_t alert_count;
    int32_t outcomes[3];
} commit;

static const spurion_bytes NOTHING = {NULL, 0};

/* ---- rows ---- */

static spurion_status check_row(const spurion_store_row *row)
{
    spurion_status st;
    int32_t i;

    SPURION_TRY(st, store_check_identity(&row->identity));
    if (row->flag_count < 0 || row->flag_count > SPURION_RULES_MAX || row->feature_count < 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "store: flags, features: expected 0 to %d and 0 or more, found %d and %d",
                           SPURION_RULES_MAX, row->flag_count, row->feature_count);
        goto out;
    }
    for (i = 0; i < row->flag_count; i++) {
        SPURION_TRY(st, store_check_name(row->flags[i].rule, "rule"));
    }
    for (i = 0; i < row->feature_count; i++) {
        SPURION_TRY(st, store_check_name(row->features[i].sae, "sae"));
    }
    if (row->verdict.size > UINT32_MAX || row->record.size > UINT32_MAX) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "store: verdict, record: expected less than 4 GiB, found %zu and %zu bytes",
                           row->verdict.size, row->record.size);
    }
out:
    return st;
}

static spurion_row_outcome compare_digest(const uint8_t *known, const spurion_store_row *row)
{
    return memcmp(known, row->digest, SPURION_DIGEST_BYTES) == 0 ? SPURION_ROW_SAME : SPURION_ROW_CONFLICT;
}

/* What the store, or an earlier row of this batch, has under the identity. A damaged row occupies its identity. */
static spurion_status find_outcome(spurion_store_row *row, commit *c, const store_key *key)
{
    spurion_status st;
    spurion_bytes value;
    bool found = false;
    size_t i;
    store_counter place;

    memset(&place, 0, sizeof place);
    for (i = 0; i < c->seen.capacity; i++) {
        size_t at = (spurion_crc32c(0, key->data, key->size) + i) & (c->seen.capacity - 1);
        const store_tally_entry *e = &c->seen.entries[at];
        if (!e->key.data) {
            break;
        }
        if (e->key.size == key->size && memcmp(e->key.data, key->data, key->size) == 0) {
            row->outcome = compare_digest(c->batch->rows[e->delta.scored - 1].digest, row);
            return spurion_ok();
        }
    }
    st = store_read(&found, &value, c->arena, c->s, FAMILY_ROLLOUT, key);
    if (st.code == SPURION_DATA_LOSS) {
        row->outcome = SPURION_ROW_CONFLICT;
        return spurion_ok();
    }
    if (st.code != SPURION_OK) {
        return st;
    }
    if (found) {
        row->outcome = value.size >= SPURION_DIGEST_BYTES ? compare_digest((const uint8_t *)value.data, row) : SPURION_ROW_CONFLICT;
        return spurion_ok();
    }
    row->outcome = SPURION_ROW_STORED;
    place.scored = (uint64_t)(row - c->batch->rows) + 1;
    return store_tally_add(&c->seen, key, &place);
}

static void put_index(commit *c, store_family family, const store_key *key, const float *value)
{
    uint32_t bits = 0;
    uint8_t b[4];
    if (value) {
        memcpy(&bits, value, sizeof bits);
    }
    b[0] = (uint8_t)bits;
    b[1] = (uint8_t)(bits >> 8);
    b[2] = (uint8_t)(bits >> 16);
    b[3] = (uint8_t)(bits >> 24);
    rocksdb_writebatch_put_cf(c->wb, c->s->families[family], (const char *)key->data, key->size, (const char *)b,
                              value ? sizeof b : 0);
}

/* by_rule: run, rule, tail; rule of size 0 stands for "any rule". by_effect: run, rule, effect, tail; rule of size 0 for the
 * rollout. */
static void index_rule(commit *c, const spurion_store_row *row, spurion_bytes rule, float effect, bool flagged)
{
    store_key k;
    if (flagged) {
        store_key_init(&k);
        store_key_name(&k, row->identity.run);
        store_key_name(&k, rule);
        store_key_tail(&k, &row->identity);
        put_index(c, FAMILY_BY_RULE, &k, &effect);
    }
    if (effect != 0) {
        store_key_init(&k);
        store_key_name(&k, row->identity.run);
        store_key_name(&k, rule);
        store_key_float(&k, effect);
        store_key_tail(&k, &row->identity);
        put_index(c, FAMILY_BY_EFFECT, &k, NULL);
    }
}

static void index_row(commit *c, const spurion_store_row *row)
{
    store_key k;
    int32_t i;

    index_rule(c, row, NOTHING, row->effect, row->flag_count > 0);
    for (i = 0; i < row->flag_count; i++) {
        index_rule(c, row, row->flags[i].rule, row->flags[i].effect, true);
    }
    for (i = 0; i < row->feature_count; i++) {
        const spurion_store_feature *f = &row->features[i];
        if (f->indexed) {
            store_key_init(&k);
            store_key_name(&k, row->identity.run);
            store_key_name(&k, f->sae);
            store_key_i32(&k, f->index);
            store_key_tail(&k, &row->identity);
            put_index(c, FAMILY_BY_FEATURE, &k, &f->attribution);
        }
    }
    store_key_init(&k);
    store_key_name(&k, row->identity.run);
    store_key_i64(&k, row->time_ms);
    store_key_tail(&k, &row->identity);
    put_index(c, FAMILY_BY_TIME, &k, NULL);
}

static spurion_status count_under(commit *c, uint8_t step_kind, uint8_t run_kind, const spurion_identity *id, spurion_bytes name,
                                  int32_t index, const store_counter *delta)
{
    spurion_status st;
    store_key k;
    store_count_key(&k, step_kind, id->run, name, index, id->step);
    SPURION_TRY(st, store_tally_add(&c->tally, &k, delta));
    store_count_key(&k, run_kind, id->run, name, index, 0);
    SPURION_TRY(st, store_tally_add(&c->tally, &k, delta));
out:
    return st;
}

static spurion_status count_rules(commit *c, const spurion_store_row *row, const store_counter *base)
{
    spurion_status st = spurion_ok();
    int32_t i, j;
    for (i = 0; i < c->batch->rule_count; i++) {
        spurion_bytes rule = c->batch->rules[i];
        store_counter delta = *base;
        for (j = 0; j < row->flag_count; j++) {
            if (row->flags[j].rule.size == rule.size && memcmp(row->flags[j].rule.data, rule.data, rule.size) == 0) {
                delta.flagged = 1;
                delta.effect_sum = row->flags[j].effect;
            }
        }
        SPURION_TRY(st, count_under(c, COUNTER_RULE, COUNTER_RULE_RUN, &row->identity, rule, 0, &delta));
    }
out:
    return st;
}

static spurion_status count_row(commit *c, const spurion_store_row *row)
{
    spurion_status st;
    store_counter base, delta;
    int32_t i;

    memset(&base, 0, sizeof base);
    base.scored = 1;
    base.first_ms = base.last_ms = row->time_ms;
    base.step_min = base.step_max = row->identity.step;
    delta = base;
    delta.flagged = row->flag_count > 0;
    delta.effect_sum = row->effect;
    delta.reward_sum = row->reward;
    delta.reward_square_sum = (double)row->reward * row->reward;
    delta.counterfactual_sum = row->counterfactual_reward;
    SPURION_TRY(st, count_under(c, COUNTER_STEP, COUNTER_RUN, &row->identity, NOTHING, 0, &delta));
    SPURION_TRY(st, count_rules(c, row, &base));
    for (i = 0; i < row->feature_count; i++) {
        const spurion_store_feature *f = &row->features[i];
        if (f->counted) {
            delta = base;
            delta.flagged = row->flag_count > 0;
            delta.effect_sum = f->attribution;
            SPURION_TRY(st, count_under(c, COUNTER_FEATURE, COUNTER_FEATURE_RUN, &row->identity, f->sae, f->index, &delta));
        }
    }
out:
    return st;
}

/* A step with a new row is open, unless it was closed: who comes late counts but opens nothing. */
static spurion_status open_step(commit *c, const spurion_identity *id)
{
    spurion_status st;
    store_key k;
    bool closed = false;

    store_count_key(&k, COUNTER_CLOSED, id->run, NOTHING, 0, id->step);
    SPURION_TRY(st, store_exists(&closed, c->s, FAMILY_COUNTER, &k));
    if (!closed) {
        store_count_key(&k, COUNTER_OPEN, id->run, NOTHING, 0, id->step);
        SPURION_TRY(st, store_put(c->wb, c->arena, c->s, FAMILY_COUNTER, &k, NOTHING));
    }
out:
    return st;
}

static bool same_step(const spurion_identity *a, const spurion_identity *b)
{
    return a->step == b->step && a->run.size == b->run.size && memcmp(a->run.data, b->run.data, a->run.size) == 0;
}

static spurion_status add_row(commit *c, spurion_store_row *row, const spurion_identity **opened)
{
    spurion_status st;
    store_key key;
    spurion_bytes payload;

    SPURION_TRY(st, check_row(row));
    store_key_init(&key);
    store_key_identity(&key, &row->identity);
    SPURION_TRY(st, find_outcome(row, c, &key));
    c->outcomes[row->outcome]++;
    if (row->outcome != SPURION_ROW_STORED) {
        goto out;
    }
    SPURION_TRY(st, store_row_encode(&payload, c->arena, row));
    SPURION_TRY(st, store_put(c->wb, c->arena, c->s, FAMILY_ROLLOUT, &key, payload));
    if (row->record.size) {
        SPURION_TRY(st, store_put(c->wb, c->arena, c->s, FAMILY_RECORD, &key, row->record));
    }
    index_row(c, row);
    SPURION_TRY(st, count_row(c, row));
    if (!*opened || !same_step(*opened, &row->identity)) {
        SPURION_TRY(st, open_step(c, &row->identity));
        *opened = &row->identity;
    }
out:
    return st;
}

/* ---- closings, alerts, and the rest ---- */

static spurion_status add_closing(commit *c, int32_t place)
{
    spurion_status st;
    spurion_store_closing *closing = &c->batch->closings[place];
    store_counter once;
    store_key k;
    size_t used = c->closed.used;

    SPURION_TRY(st, store_check_name(closing->run, "run"));
    if (closing->step < 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "store: step: expected at least 0, found %" PRId64, closing->step);
        goto out;
    }
    store_count_key(&k, COUNTER_CLOSED, closing->run, closing->rule, 0, closing->step);
    SPURION_TRY(st, store_exists(&closing->closed_before, c->s, FAMILY_COUNTER, &k));
    if (!closing->closed_before) { /* or by this batch */
        memset(&once, 0, sizeof once);
        SPURION_TRY(st, store_tally_add(&c->closed, &k, &once));
        closing->closed_before = c->closed.used == used;
    }
    if (!closing->closed_before) {
        SPURION_TRY(st, store_put(c->wb, c->arena, c->s, FAMILY_COUNTER, &k, NOTHING));
    }
    if (closing->rule.size == 0) {
        store_count_key(&k, COUNTER_OPEN, closing->run, NOTHING, 0, closing->step);
        rocksdb_writebatch_delete_cf(c->wb, c->s->families[FAMILY_COUNTER], (const char *)k.data, k.size);
    }
out:
    return st;
}

static spurion_status add_alert(commit *c, spurion_store_alert *a)
{
    store_key k;
    if (a->row >= c->batch->row_count || a->closing >= c->batch->closing_count) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "store: alert of row %d and closing %d: expected less than %d and %d",
                             a->row, a->closing, c->batch->row_count, c->batch->closing_count);
    }
    a->sequence = 0;
    if ((a->row >= 0 && c->batch->rows[a->row].outcome != SPURION_ROW_STORED) ||
        (a->closing >= 0 && c->batch->closings[a->closing].closed_before)) {
        return spurion_ok();
    }
    a->sequence = atomic_load(&c->s->alert_next) + c->alert_count++;
    store_key_init(&k);
    store_key_u64(&k, a->sequence);
    return store_put(c->wb, c->arena, c->s, FAMILY_ALERT, &k, a->alert);
}

static spurion_status put_mark(rocksdb_writebatch_t *wb, spurion_arena *arena, spurion_store *s, const spurion_store_mark *m)
{
    spurion_status st;
    store_key k;
    SPURION_TRY(st, store_check_name(m->run, "run"));
    SPURION_TRY(st, store_check_name(m->producer, "producer"));
    store_key_init(&k);
    store_key_name(&k, m->run);
    store_key_name(&k, m->producer);
    store_key_u64(&k, m->epoch);
    SPURION_TRY(st, store_put(wb, arena, s, FAMILY_PRODUCER, &k, m->ranges));
out:
    return st;
}

static spurion_status text_key(store_key *k, uint8_t kind, spurion_bytes key, const char *what)
{
    store_key_init(k);
    store_key_u8(k, kind);
    store_key_raw(k, key.data, key.size);
    if (!key.data || key.size < 1 || key.size > SPURION_STORE_KEY_BYTES_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "store: %s: expected 1 to %d bytes, found %zu", what,
                             SPURION_STORE_KEY_BYTES_MAX, key.size);
    }
    return spurion_ok();
}

static void expiry_key(store_key *k, int64_t expires_ms, spurion_bytes key)
{
    store_key_init(k);
    store_key_u8(k, REPLY_EXPIRY);
    store_key_i64(k, expires_ms);
    store_key_raw(k, key.data, key.size);
}

/* The value begins with the expiry; a second key, ordered by expiry, lets trim find what is over. */
static spurion_status put_reply(rocksdb_writebatch_t *wb, spurion_arena *arena, spurion_store *s, const spurion_store_reply *r)
{
    spurion_status st;
    store_key k, expiry;
    char *value = spurion_arena_take(arena, r->reply.size + 8);
    spurion_bytes payload = {value, r->reply.size + 8};
    int i;

    if (!value) {
        return store_no_memory();
    }
    SPURION_TRY(st, text_key(&k, REPLY_KEY, r->key, "idempotency key"));
    for (i = 0; i < 8; i++) {
        value[i] = (char)(uint8_t)((uint64_t)r->expires_ms >> (8 * i));
    }
    if (r->reply.size) {
        memcpy(value + 8, r->reply.data, r->reply.size);
    }
    SPURION_TRY(st, store_put(wb, arena, s, FAMILY_REPLY, &k, payload));
    expiry_key(&expiry, r->expires_ms, r->key);
    SPURION_TRY(st, store_put(wb, arena, s, FAMILY_REPLY, &expiry, NOTHING));
out:
    return st;
}

static spurion_status fill(commit *c)
{
    spurion_status st;
    spurion_store_batch *b = c->batch;
    const spurion_identity *opened = NULL;
    store_key k;
    int32_t i;

    SPURION_TRY(st, store_tally_init(&c->tally, c->arena));
    SPURION_TRY(st, store_tally_init(&c->seen, c->arena));
    SPURION_TRY(st, store_tally_init(&c->closed, c->arena));
    for (i = 0; i < b->rule_count; i++) {
        SPURION_TRY(st, store_check_name(b->rules[i], "rule"));
    }
    for (i = 0; i < b->row_count; i++) {
        SPURION_TRY(st, add_row(c, &b->rows[i], &opened));
    }
    for (i = 0; i < b->closing_count; i++) {
        SPURION_TRY(st, add_closing(c, i));
    }
    for (i = 0; i < b->alert_count; i++) {
        SPURION_TRY(st, add_alert(c, &b->alerts[i]));
    }
    for (i = 0; i < b->mark_count; i++) {
        SPURION_TRY(st, put_mark(c->wb, c->arena, c->s, &b->marks[i]));
    }
    for (i = 0; i < b->reply_count; i++) {
        SPURION_TRY(st, put_reply(c->wb, c->arena, c->s, &b->replies[i]));
    }
    for (i = 0; i < b->inbox_done_count; i++) {
        store_key_init(&k);
        store_key_u64(&k, b->inbox_done[i]);
        rocksdb_writebatch_delete_cf(c->wb, c->s->families[FAMILY_INBOX], (const char *)k.data, k.size);
    }
    SPURION_TRY(st, store_tally_write(&c->tally, c->wb, c->s));
out:
    return st;
}

spurion_status spurion_store_commit(spurion_store *s, spurion_store_batch *batch)
{
    spurion_status st;
    commit c;
    int32_t i;

    memset(&c, 0, sizeof c);
    c.s = s;
    c.batch = batch;
    c.arena = &s->scratch;
    c.wb = rocksdb_writebatch_create();
    pthread_mutex_lock(&s->writer);
    SPURION_TRY(st, fill(&c));
    if (rocksdb_writebatch_count(c.wb) > 0) {
        SPURION_TRY(st, store_write(s, c.wb));
    }
    atomic_fetch_add(&s->alert_next, c.alert_count);
    atomic_fetch_add(&s->alerts, c.alert_count);
    atomic_fetch_add(&s->commits, 1);
    atomic_fetch_add(&s->rows, (uint64_t)c.outcomes[SPURION_ROW_STORED]);
    atomic_fetch_add(&s->rows_same, (uint64_t)c.outcomes[SPURION_ROW_SAME]);
    atomic_fetch_add(&s->rows_conflict, (uint64_t)c.outcomes[SPURION_ROW_CONFLICT]);
    store_synced_write(s, false);
out:
    spurion_arena_reset(&s->scratch);
    pthread_mutex_unlock(&s->writer);
    rocksdb_writebatch_destroy(c.wb);
    for (i = 0; st.code != SPURION_OK && i < batch->alert_count; i++) {
        batch->alerts[i].sequence = 0;
    }
    return st;
}

/* ---- from any thread ---- */

spurion_status spurion_store_inbox_put(uint64_t *tickets, spurion_store *s, const spurion_bytes *values, int32_t value_count,
                                       const spurion_store_reply *reply, const spurion_store_mark *marks, int32_t mark_count)
{
    spurion_status st = spurion_ok();
    rocksdb_writebatch_t *wb = rocksdb_writebatch_create();
    spurion_arena arena;
    uint64_t first;
    store_key k;
    int32_t i;

    spurion_arena_init(&arena, 0);
    pthread_mutex_lock(&s->intake);
    first = s->ticket_next; /* a failed put leaves a gap, never a ticket that two own */
    s->ticket_next += (uint64_t)value_count;
    pthread_mutex_unlock(&s->intake);
    for (i = 0; i < value_count; i++) {
        tickets[i] = first + (uint64_t)i;
        store_key_init(&k);
        store_key_u64(&k, tickets[i]);
        SPURION_TRY(st, store_put(wb, &arena, s, FAMILY_INBOX, &k, values[i]));
    }
    if (reply) {
        SPURION_TRY(st, put_reply(wb, &arena, s, reply));
    }
    for (i = 0; i < mark_count; i++) {
        SPURION_TRY(st, put_mark(wb, &arena, s, &marks[i]));
    }
    if (rocksdb_writebatch_count(wb) > 0) {
        SPURION_TRY(st, store_write(s, wb));
    }
    atomic_fetch_add(&s->inbox_puts, (uint64_t)value_count);
out:
    spurion_arena_fini(&arena);
    rocksdb_writebatch_destroy(wb);
    return st;
}

spurion_status spurion_store_meta_put(spurion_store *s, spurion_bytes key, spurion_bytes value)
{
    spurion_status st;
    rocksdb_writebatch_t *wb = rocksdb_writebatch_create();
    spurion_arena arena;
    store_key k;

    spurion_arena_init(&arena, 0);
    SPURION_TRY(st, text_key(&k, META_TEXT, key, "meta key"));
    SPURION_TRY(st, store_put(wb, &arena, s, FAMILY_META, &k, value));
    SPURION_TRY(st, store_write(s, wb));
out:
    spurion_arena_fini(&arena);
    rocksdb_writebatch_destroy(wb);
    return st;
}

/* Deletes what an expiry key stands for, unless the reply was written again with a later expiry. */
static spurion_status trim_one(rocksdb_writebatch_t *wb, spurion_arena *arena, spurion_store *s, spurion_bytes expiry,
                               int64_t now_ms)
{
    spurion_status st;
    spurion_bytes reply, key;
    store_key_reader r = {(const uint8_t *)expiry.data, expiry.size, false};
    store_key k;

    (void)store_key_read_u8(&r);
    (void)store_key_read_i64(&r);
    rocksdb_writebatch_delete_cf(wb, s->families[FAMILY_REPLY], expiry.data, expiry.size);
    key.data = (const char *)r.data;
    key.size = r.left;
    SPURION_TRY(st, text_key(&k, REPLY_KEY, key, "idempotency key"));
    st = spurion_store_reply_get(&reply, arena, s, key, now_ms);
    if (st.code != SPURION_OK) { /* expired, damaged or gone */
        rocksdb_writebatch_delete_cf(wb, s->families[FAMILY_REPLY], (const char *)k.data, k.size);
        st = st.code == SPURION_NOT_FOUND || st.code == SPURION_DATA_LOSS ? spurion_ok() : st;
    }
out:
    return st;
}

spurion_status spurion_store_trim(int32_t *removed, spurion_store *s, int64_t now_ms, int32_t count_max)
{
    spurion_status st = spurion_ok();
    rocksdb_writebatch_t *wb = rocksdb_writebatch_create();
    spurion_arena arena;
    store_scan scan;
    int32_t n = 0;

    memset(&scan, 0, sizeof scan);
    spurion_arena_init(&arena, 0);
    pthread_mutex_lock(&s->trimmer);
    store_key_init(&scan.lower);
    store_key_u8(&scan.lower, REPLY_EXPIRY);
    expiry_key(&scan.upper, now_ms, NOTHING);
    store_scan_init(&scan, s, FAMILY_REPLY, false, NULL, NOTHING);
    for (; n < count_max && store_scan_valid(&scan); store_scan_move(&scan)) {
        SPURION_TRY(st, trim_one(wb, &arena, s, store_scan_key(&scan), now_ms));
        n++;
    }
    SPURION_TRY(st, store_scan_status(&scan));
    if (n > 0) {
        SPURION_TRY(st, store_write(s, wb));
    }
out:
    store_scan_fini(&scan);
    pthread_mutex_unlock(&s->trimmer);
    if (removed) {
        *removed = st.code == SPURION_OK ? n : 0;
    }
    spurion_arena_fini(&arena);
    rocksdb_writebatch_destroy(wb);
    return st;
}

/* How keys and values of the store look as bytes (docs/store.md): names with a length byte, numbers big-endian, floats in an
 * encoding that keeps their order; values in an envelope with schema version and CRC32C. Pure; knows no RocksDB. Thread: any. */
#ifndef SPURION_STORE_KEYS_H
#define SPURION_STORE_KEYS_H

#include "daemon/store.h"

#define STORE_KEY_BYTES_MAX 640 /* four names of 1 + 128 bytes and numbers fit */
#define STORE_VALUE_SCHEMA 1
#define STORE_ENVELOPE_BYTES 5 /* schema u8, CRC32C u32 little-endian over key and payload */

/* CRC-32C (Castagnoli, RFC 3720 appendix B.4) of bytes, going on from crc (0 at the start). */
uint32_t spurion_crc32c(uint32_t crc, const void *data, size_t size);

/* ---- keys ---- */

/* A key in the making. What does not fit sets `bad` and stays out. */
typedef struct store_key {
    size_t size;
    bool bad;
    uint8_t data[STORE_KEY_BYTES_MAX];
} store_key;

void store_key_init(store_key *k);
void store_key_u8(store_key *k, uint8_t value);
void store_key_u32(store_key *k, uint32_t value);
void store_key_u64(store_key *k, uint64_t value);
void store_key_i32(store_key *k, int32_t value); /* sign bit turned over: -1 before 0 */
void store_key_i64(store_key *k, int64_t value);
void store_key_float(store_key *k, float value);       /* -inf < ... < -0 = 0 < ... < inf < NaN */
void store_key_name(store_key *k, spurion_bytes name); /* 0..SPURION_NAME_BYTES_MAX bytes */
void store_key_raw(store_key *k, const void *data, size_t size);

/* The first key after all that begin with this one: the exclusive end of a prefix scan. */
void store_key_successor(store_key *k);

/* Reads a key front to back; `bad` once anything is missing. Names point into the key. */
typedef struct store_key_reader {
    const uint8_t *data;
    size_t left;
    bool bad;
} store_key_reader;

uint8_t store_key_read_u8(store_key_reader *r);
uint32_t store_key_read_u32(store_key_reader *r);
uint64_t store_key_read_u64(store_key_reader *r);
int32_t store_key_read_i32(store_key_reader *r);
int64_t store_key_read_i64(store_key_reader *r);
float store_key_read_float(store_key_reader *r);
spurion_bytes store_key_read_name(store_key_reader *r);

/* run, step, group, id, attempt: the key of family rollout and record. */
void store_key_identity(store_key *k, const spurion_identity *identity);
/* step, group, id, attempt: what every index key ends with. */
void store_key_tail(store_key *k, const spurion_identity *identity);
void store_key_read_tail(spurion_identity *out, store_key_reader *r);

/* ---- values ---- */

/* payload in its envelope; memory from the arena. RESOURCE_EXHAUSTED when there is none. */
spurion_status store_value_seal(spurion_bytes *out, spurion_arena *arena, spurion_bytes key,
                                spurion_bytes payload) SPURION_MUST_USE;
/* The payload within value. DATA_LOSS when the envelope is short, of another schema, or its CRC is wrong. */
spurion_status store_value_open(spurion_bytes *payload, spurion_bytes key, spurion_bytes value) SPURION_MUST_USE;

/* A row without identity, features, record and cursor. */
spurion_status store_row_encode(spurion_bytes *payload, spurion_arena *arena, const spurion_store_row *row) SPURION_MUST_USE;
/* Everything that the payload points to is copied into the arena. DATA_LOSS when it is no row. */
spurion_status store_row_decode(spurion_store_row *out, spurion_arena *arena, spurion_bytes payload) SPURION_MUST_USE;

/* One counter, whatever it counts; unused fields are 0. */
typedef struct store_counter {
    uint64_t scored, flagged;
    double effect_sum, reward_sum, reward_square_sum, counterfactual_sum;
    int64_t first_ms, last_ms, step_min, step_max;
} store_counter;

#define STORE_COUNTER_BYTES 80
void store_counter_encode(uint8_t out[STORE_COUNTER_BYTES], const store_counter *c);
spurion_status store_counter_decode(store_counter *out, spurion_bytes payload) SPURION_MUST_USE;
/* into += add; the spans of time and steps are joined. */
void store_counter_add(store_counter *into, const store_counter *add);

static inline spurion_bytes store_key_bytes(const store_key *k)
{
    spurion_bytes b = {(const char *)k->data, k->size};
    return b;
}

#endif

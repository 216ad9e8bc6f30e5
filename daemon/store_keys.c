/* Bytes of the store's keys and values; see store_keys.h. */
#include "daemon/store_keys.h"

#include <string.h>

static const uint32_t crc32c_table[256] = {
    0x00000000u, 0xf26b8303u, 0xe13b70f7u, 0x1350f3f4u, 0xc79a971fu, 0x35f1141cu, 0x26a1e7e8u, 0xd4ca64ebu, 0x8ad958cfu,
    0x78b2dbccu, 0x6be22838u, 0x9989ab3bu, 0x4d43cfd0u, 0xbf284cd3u, 0xac78bf27u, 0x5e133c24u, 0x105ec76fu, 0xe235446cu,
    0xf165b798u, 0x030e349bu, 0xd7c45070u, 0x25afd373u, 0x36ff2087u, 0xc494a384u, 0x9a879fa0u, 0x68ec1ca3u, 0x7bbcef57u,
    0x89d76c54u, 0x5d1d08bfu, 0xaf768bbcu, 0xbc267848u, 0x4e4dfb4bu, 0x20bd8edeu, 0xd2d60dddu, 0xc186fe29u, 0x33ed7d2au,
    0xe72719c1u, 0x154c9ac2u, 0x061c6936u, 0xf477ea35u, 0xaa64d611u, 0x580f5512u, 0x4b5fa6e6u, 0xb93425e5u, 0x6dfe410eu,
    0x9f95c20du, 0x8cc531f9u, 0x7eaeb2fau, 0x30e349b1u, 0xc288cab2u, 0xd1d83946u, 0x23b3ba45u, 0xf779deaeu, 0x05125dadu,
    0x1642ae59u, 0xe4292d5au, 0xba3a117eu, 0x4851927du, 0x5b016189u, 0xa96ae28au, 0x7da08661u, 0x8fcb0562u, 0x9c9bf696u,
    0x6ef07595u, 0x417b1dbcu, 0xb3109ebfu, 0xa0406d4bu, 0x522bee48u, 0x86e18aa3u, 0x748a09a0u, 0x67dafa54u, 0x95b17957u,
    0xcba24573u, 0x39c9c670u, 0x2a993584u, 0xd8f2b687u, 0x0c38d26cu, 0xfe53516fu, 0xed03a29bu, 0x1f682198u, 0x5125dad3u,
    0xa34e59d0u, 0xb01eaa24u, 0x42752927u, 0x96bf4dccu, 0x64d4cecfu, 0x77843d3bu, 0x85efbe38u, 0xdbfc821cu, 0x2997011fu,
    0x3ac7f2ebu, 0xc8ac71e8u, 0x1c661503u, 0xee0d9600u, 0xfd5d65f4u, 0x0f36e6f7u, 0x61c69362u, 0x93ad1061u, 0x80fde395u,
    0x72966096u, 0xa65c047du, 0x5437877eu, 0x4767748au, 0xb50cf789u, 0xeb1fcbadu, 0x197448aeu, 0x0a24bb5au, 0xf84f3859u,
    0x2c855cb2u, 0xdeeedfb1u, 0xcdbe2c45u, 0x3fd5af46u, 0x7198540du, 0x83f3d70eu, 0x90a324fau, 0x62c8a7f9u, 0xb602c312u,
    0x44694011u, 0x5739b3e5u, 0xa55230e6u, 0xfb410cc2u, 0x092a8fc1u, 0x1a7a7c35u, 0xe811ff36u, 0x3cdb9bddu, 0xceb018deu,
    0xdde0eb2au, 0x2f8b6829u, 0x82f63b78u, 0x709db87bu, 0x63cd4b8fu, 0x91a6c88cu, 0x456cac67u, 0xb7072f64u, 0xa457dc90u,
    0x563c5f93u, 0x082f63b7u, 0xfa44e0b4u, 0xe9141340u, 0x1b7f9043u, 0xcfb5f4a8u, 0x3dde77abu, 0x2e8e845fu, 0xdce5075cu,
    0x92a8fc17u, 0x60c37f14u, 0x73938ce0u, 0x81f80fe3u, 0x55326b08u, 0xa759e80bu, 0xb4091bffu, 0x466298fcu, 0x1871a4d8u,
    0xea1a27dbu, 0xf94ad42fu, 0x0b21572cu, 0xdfeb33c7u, 0x2d80b0c4u, 0x3ed04330u, 0xccbbc033u, 0xa24bb5a6u, 0x502036a5u,
    0x4370c551u, 0xb11b4652u, 0x65d122b9u, 0x97baa1bau, 0x84ea524eu, 0x7681d14du, 0x2892ed69u, 0xdaf96e6au, 0xc9a99d9eu,
    0x3bc21e9du, 0xef087a76u, 0x1d63f975u, 0x0e330a81u, 0xfc588982u, 0xb21572c9u, 0x407ef1cau, 0x532e023eu, 0xa145813du,
    0x758fe5d6u, 0x87e466d5u, 0x94b49521u, 0x66df1622u, 0x38cc2a06u, 0xcaa7a905u, 0xd9f75af1u, 0x2b9cd9f2u, 0xff56bd19u,
    0x0d3d3e1au, 0x1e6dcdeeu, 0xec064eedu, 0xc38d26c4u, 0x31e6a5c7u, 0x22b65633u, 0xd0ddd530u, 0x0417b1dbu, 0xf67c32d8u,
    0xe52cc12cu, 0x1747422fu, 0x49547e0bu, 0xbb3ffd08u, 0xa86f0efcu, 0x5a048dffu, 0x8ecee914u, 0x7ca56a17u, 0x6ff599e3u,
    0x9d9e1ae0u, 0xd3d3e1abu, 0x21b862a8u, 0x32e8915cu, 0xc083125fu, 0x144976b4u, 0xe622f5b7u, 0xf5720643u, 0x07198540u,
    0x590ab964u, 0xab613a67u, 0xb831c993u, 0x4a5a4a90u, 0x9e902e7bu, 0x6cfbad78u, 0x7fab5e8cu, 0x8dc0dd8fu, 0xe330a81au,
    0x115b2b19u, 0x020bd8edu, 0xf0605beeu, 0x24aa3f05u, 0xd6c1bc06u, 0xc5914ff2u, 0x37faccf1u, 0x69e9f0d5u, 0x9b8273d6u,
    0x88d28022u, 0x7ab90321u, 0xae7367cau, 0x5c18e4c9u, 0x4f48173du, 0xbd23943eu, 0xf36e6f75u, 0x0105ec76u, 0x12551f82u,
    0xe03e9c81u, 0x34f4f86au, 0xc69f7b69u, 0xd5cf889du, 0x27a40b9eu, 0x79b737bau, 0x8bdcb4b9u, 0x988c474du, 0x6ae7c44eu,
    0xbe2da0a5u, 0x4c4623a6u, 0x5f16d052u, 0xad7d5351u,
};

uint32_t spurion_crc32c(uint32_t crc, const void *data, size_t size)
{
    const uint8_t *p = data;
    uint32_t c = ~crc;
    size_t i;
    for (i = 0; i < size; i++) {
        c = crc32c_table[(c ^ p[i]) & 0xff] ^ (c >> 8);
    }
    return ~c;
}

/* ---- keys ---- */

void store_key_init(store_key *k)
{
    k->size = 0;
    k->bad = false;
}

void store_key_raw(store_key *k, const void *data, size_t size)
{
    if (k->bad || size > sizeof k->data - k->size) {
        k->bad = true;
        return;
    }
    if (size) {
        memcpy(k->data + k->size, data, size);
    }
    k->size += size;
}

void store_key_u8(store_key *k, uint8_t value)
{
    store_key_raw(k, &value, 1);
}

void store_key_u32(store_key *k, uint32_t value)
{
    uint8_t b[4] = {(uint8_t)(value >> 24), (uint8_t)(value >> 16), (uint8_t)(value >> 8), (uint8_t)value};
    store_key_raw(k, b, sizeof b);
}

void store_key_u64(store_key *k, uint64_t value)
{
    store_key_u32(k, (uint32_t)(value >> 32));
    store_key_u32(k, (uint32_t)value);
}

void store_key_i32(store_key *k, int32_t value)
{
    store_key_u32(k, (uint32_t)value ^ 0x80000000u);
}

void store_key_i64(store_key *k, int64_t value)
{
    store_key_u64(k, (uint64_t)value ^ 0x8000000000000000u);
}

/* IEEE 754 numbers of one sign are ordered as their bits are: positive ones get the top bit, negative ones are turned over. */
void store_key_float(store_key *k, float value)
{
    uint32_t bits;
    if (value != value) {
        bits = 0x7fc00000u; /* one NaN, after +inf */
    } else {
        float v = value == 0 ? 0.0f : value; /* one zero */
        memcpy(&bits, &v, sizeof bits);
    }
    store_key_u32(k, bits & 0x80000000u ? ~bits : bits | 0x80000000u);
}

void store_key_name(store_key *k, spurion_bytes name)
{
    if (name.size > SPURION_NAME_BYTES_MAX) {
        k->bad = true;
        return;
    }
    store_key_u8(k, (uint8_t)name.size);
    store_key_raw(k, name.data, name.size);
}

void store_key_successor(store_key *k)
{
    while (k->size && k->data[k->size - 1] == 0xff) {
        k->size--;
    }
    if (k->size) {
        k->data[k->size - 1]++;
    } else {
        k->bad = true; /* nothing comes after all keys */
    }
}

static const uint8_t *key_take(store_key_reader *r, size_t size)
{
    const uint8_t *p = r->data;
    if (r->bad || r->left < size) {
        r->bad = true;
        return NULL;
    }
    r->data += size;
    r->left -= size;
    return p;
}

uint8_t store_key_read_u8(store_key_reader *r)
{
    const uint8_t *p = key_take(r, 1);
    return p ? *p : 0;
}

uint32_t store_key_read_u32(store_key_reader *r)
{
    const uint8_t *p = key_take(r, 4);
    return p ? (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3] : 0;
}

uint64_t store_key_read_u64(store_key_reader *r)
{
    uint64_t high = store_key_read_u32(r);
    return high << 32 | store_key_read_u32(r);
}

int32_t store_key_read_i32(store_key_reader *r)
{
    return (int32_t)(store_key_read_u32(r) ^ 0x80000000u);
}

int64_t store_key_read_i64(store_key_reader *r)
{
    return (int64_t)(store_key_read_u64(r) ^ 0x8000000000000000u);
}

float store_key_read_float(store_key_reader *r)
{
    uint32_t bits = store_key_read_u32(r);
    float value;
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    memcpy(&value, &bits, sizeof value);
    return r->bad ? 0 : value;
}

spurion_bytes store_key_read_name(store_key_reader *r)
{
    spurion_bytes name = {NULL, 0};
    size_t size = store_key_read_u8(r);
    const uint8_t *p = key_take(r, size);
    if (p) {
        name.data = (const char *)p;
        name.size = size;
    }
    return name;
}

void store_key_tail(store_key *k, const spurion_identity *identity)
{
    store_key_i64(k, identity->step);
    store_key_name(k, identity->group);
    store_key_name(k, identity->id);
    store_key_i32(k, identity->attempt);
}

void store_key_read_tail(spurion_identity *out, store_key_reader *r)
{
    out->step = store_key_read_i64(r);
    out->group = store_key_read_name(r);
    out->id = store_key_read_name(r);
    out->attempt = store_key_read_i32(r);
    if (r->left) {
        r->bad = true;
    }
}

void store_key_identity(store_key *k, const spurion_identity *identity)
{
    store_key_name(k, identity->run);
    store_key_tail(k, identity);
}

/* ---- values: little-endian, written and read front to back ---- */

typedef struct writer {
    uint8_t *p;
} writer;

static void write_bytes(writer *w, const void *data, size_t size)
{
    if (size) {
        memcpy(w->p, data, size);
    }
    w->p += size;
}

static void write_uint(writer *w, uint64_t value, int bytes)
{
    int i;
    for (i = 0; i < bytes; i++) {
        *w->p++ = (uint8_t)(value >> (8 * i));
    }
}

static void write_float(writer *w, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    write_uint(w, bits, 4);
}

static void write_double(writer *w, double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    write_uint(w, bits, 8);
}

static uint64_t read_uint(store_key_reader *r, int bytes)
{
    const uint8_t *p = key_take(r, (size_t)bytes);
    uint64_t value = 0;
    int i;
    for (i = 0; p && i < bytes; i++) {
        value |= (uint64_t)p[i] << (8 * i);
    }
    return value;
}

static float read_float(store_key_reader *r)
{
    uint32_t bits = (uint32_t)read_uint(r, 4);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static double read_double(store_key_reader *r)
{
    uint64_t bits = read_uint(r, 8);
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static spurion_status no_memory(size_t bytes)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "store: no memory for %zu bytes", bytes);
}

static uint32_t envelope_crc(spurion_bytes key, const void *payload, size_t size)
{
    return spurion_crc32c(spurion_crc32c(0, key.data, key.size), payload, size);
}

spurion_status store_value_seal(spurion_bytes *out, spurion_arena *arena, spurion_bytes key, spurion_bytes payload)
{
    uint8_t *value = spurion_arena_take(arena, payload.size + STORE_ENVELOPE_BYTES);
    writer w = {value};
    if (!value) {
        return no_memory(payload.size + STORE_ENVELOPE_BYTES);
    }
    write_uint(&w, STORE_VALUE_SCHEMA, 1);
    write_uint(&w, envelope_crc(key, payload.data, payload.size), 4);
    write_bytes(&w, payload.data, payload.size);
    out->data = (const char *)value;
    out->size = payload.size + STORE_ENVELOPE_BYTES;
    return spurion_ok();
}

spurion_status store_value_open(spurion_bytes *payload, spurion_bytes key, spurion_bytes value)
{
    store_key_reader r = {(const uint8_t *)value.data, value.size, false};
    unsigned schema = (unsigned)read_uint(&r, 1);
    uint32_t crc = (uint32_t)read_uint(&r, 4), found;
    if (r.bad) {
        return spurion_error(SPURION_DATA_LOSS, "store: value of %zu bytes, expected at least %d", value.size,
                             STORE_ENVELOPE_BYTES);
    }
    if (schema != STORE_VALUE_SCHEMA) {
        return spurion_error(SPURION_DATA_LOSS, "store: value of schema %u, expected %d", schema, STORE_VALUE_SCHEMA);
    }
    found = envelope_crc(key, r.data, r.left);
    if (found != crc) {
        return spurion_error(SPURION_DATA_LOSS, "store: value damaged: expected CRC32C %08x, found %08x", crc, found);
    }
    payload->data = (const char *)r.data;
    payload->size = r.left;
    return spurion_ok();
}

/* digest, time, reward, counterfactual, effect, has_record u8, flags u16 {rule length u8, rule, effect}, verdict u32 length,
 * verdict */
spurion_status store_row_encode(spurion_bytes *payload, spurion_arena *arena, const spurion_store_row *row)
{
    size_t size = SPURION_DIGEST_BYTES + 8 + 3 * 4 + 1 + 2 + 4 + row->verdict.size;
    uint8_t *data;
    writer w;
    int32_t i;

    for (i = 0; i < row->flag_count; i++) {
        size += 1 + row->flags[i].rule.size + 4;
    }
    data = spurion_arena_take(arena, size);
    if (!data) {
        return no_memory(size);
    }
    w.p = data;
    write_bytes(&w, row->digest, SPURION_DIGEST_BYTES);
    write_uint(&w, (uint64_t)row->time_ms, 8);
    write_float(&w, row->reward);
    write_float(&w, row->counterfactual_reward);
    write_float(&w, row->effect);
    write_uint(&w, row->record.size > 0, 1);
    write_uint(&w, (uint64_t)row->flag_count, 2);
    for (i = 0; i < row->flag_count; i++) {
        write_uint(&w, row->flags[i].rule.size, 1);
        write_bytes(&w, row->flags[i].rule.data, row->flags[i].rule.size);
        write_float(&w, row->flags[i].effect);
    }
    write_uint(&w, row->verdict.size, 4);
    write_bytes(&w, row->verdict.data, row->verdict.size);
    payload->data = (const char *)data;
    payload->size = size;
    return spurion_ok();
}

static spurion_status row_decode_flags(spurion_store_row *out, spurion_arena *arena, store_key_reader *r)
{
    spurion_store_flag *flags = (spurion_store_flag *)out->flags;
    int32_t i;
    for (i = 0; i < out->flag_count && !r->bad; i++) {
        size_t size = read_uint(r, 1);
        const uint8_t *name = key_take(r, size);
        flags[i].rule.data = name ? spurion_arena_copy(arena, (const char *)name, size) : NULL;
        flags[i].rule.size = size;
        if (name && !flags[i].rule.data) {
            return no_memory(size);
        }
        flags[i].effect = read_float(r);
    }
    return r->bad ? spurion_error(SPURION_DATA_LOSS, "store: row cut short in its %d flags", out->flag_count) : spurion_ok();
}

spurion_status store_row_decode(spurion_store_row *out, spurion_arena *arena, spurion_bytes payload)
{
    spurion_status st;
    store_key_reader r = {NULL, payload.size, false};
    const uint8_t *digest;

    r.data = (const uint8_t *)spurion_arena_copy(arena, payload.data, payload.size);
    if (!r.data) {
        return no_memory(payload.size);
    }
    digest = key_take(&r, SPURION_DIGEST_BYTES);
    if (digest) {
        memcpy(out->digest, digest, SPURION_DIGEST_BYTES);
    }
    out->time_ms = (int64_t)read_uint(&r, 8);
    out->reward = read_float(&r);
    out->counterfactual_reward = read_float(&r);
    out->effect = read_float(&r);
    out->has_record = read_uint(&r, 1) != 0;
    out->flag_count = (int32_t)read_uint(&r, 2);
    if (r.bad) {
        return spurion_error(SPURION_DATA_LOSS, "store: row of %zu bytes is cut short", payload.size);
    }
    out->flags = spurion_arena_take_array(arena, (size_t)out->flag_count + 1, sizeof *out->flags);
    if (!out->flags) {
        return no_memory((size_t)out->flag_count * sizeof *out->flags);
    }
    SPURION_TRY(st, row_decode_flags(out, arena, &r));
    out->verdict.size = read_uint(&r, 4);
    out->verdict.data = (const char *)key_take(&r, out->verdict.size); /* the payload's copy ends with a NUL */
    if (r.bad || r.left) {
        st = spurion_error(SPURION_DATA_LOSS, "store: row of %zu bytes does not end with its verdict", payload.size);
    }
out:
    return st;
}

void store_counter_encode(uint8_t out[STORE_COUNTER_BYTES], const store_counter *c)
{
    writer w = {out};
    write_uint(&w, c->scored, 8);
    write_uint(&w, c->flagged, 8);
    write_double(&w, c->effect_sum);
    write_double(&w, c->reward_sum);
    write_double(&w, c->reward_square_sum);
    write_double(&w, c->counterfactual_sum);
    write_uint(&w, (uint64_t)c->first_ms, 8);
    write_uint(&w, (uint64_t)c->last_ms, 8);
    write_uint(&w, (uint64_t)c->step_min, 8);
    write_uint(&w, (uint64_t)c->step_max, 8);
}

spurion_status store_counter_decode(store_counter *out, spurion_bytes payload)
{
    store_key_reader r = {(const uint8_t *)payload.data, payload.size, false};
    if (payload.size != STORE_COUNTER_BYTES) {
        return spurion_error(SPURION_DATA_LOSS, "store: counter of %zu bytes, expected %d", payload.size, STORE_COUNTER_BYTES);
    }
    out->scored = read_uint(&r, 8);
    out->flagged = read_uint(&r, 8);
    out->effect_sum = read_double(&r);
    out->reward_sum = read_double(&r);
    out->reward_square_sum = read_double(&r);
    out->counterfactual_sum = read_double(&r);
    out->first_ms = (int64_t)read_uint(&r, 8);
    out->last_ms = (int64_t)read_uint(&r, 8);
    out->step_min = (int64_t)read_uint(&r, 8);
    out->step_max = (int64_t)read_uint(&r, 8);
    return spurion_ok();
}

void store_counter_add(store_counter *into, const store_counter *add)
{
    bool first = into->scored == 0;
    into->scored += add->scored;
    into->flagged += add->flagged;
    into->effect_sum += add->effect_sum;
    into->reward_sum += add->reward_sum;
    into->reward_square_sum += add->reward_square_sum;
    into->counterfactual_sum += add->counterfactual_sum;
    into->first_ms = first || add->first_ms < into->first_ms ? add->first_ms : into->first_ms;
    into->last_ms = first || add->last_ms > into->last_ms ? add->last_ms : into->last_ms;
    into->step_min = first || add->step_min < into->step_min ? add->step_min : into->step_min;
    into->step_max = first || add->step_max > into->step_max ? add->step_max : into->step_max;
}

/* One request on its way over REQ; see handle.h. The SP request id has its top bit set and stands before the body, in the answer too. */
#include <stdlib.h>
#include <string.h>

#include "handle.h"

spurion_status spurion_call_init(spurion_call *k, const char *url)
{
    memset(k, 0, sizeof *k);
    k->id = (uint32_t)spurion_sp_now_ms();
    return spurion_sp_init(&k->sp, url, SPURION_SP_REQ, SPURION_SP_REP, SPURION_REPLY_BYTES_MAX + 4);
}

void spurion_call_fini(spurion_call *k)
{
    spurion_sp_fini(&k->sp);
    free(k->frame);
    k->frame = NULL;
}

spurion_status spurion_call_start(spurion_call *k, spurion_bytes body)
{
    unsigned char header[9];
    size_t head = spurion_sp_header(&k->sp, header, body.size + 4), size = head + 4 + body.size;
    uint32_t id;

    if (body.size + 4 > SPURION_FRAME_BYTES_MAX) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "request: expected at most %u bytes, found %zu (send fewer rollouts at once)",
                             SPURION_FRAME_BYTES_MAX, body.size);
    }
    if (size > k->frame_capacity) {
        unsigned char *grown = realloc(k->frame, size);
        if (!grown) {
            return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a request of %zu bytes", size);
        }
        k->frame = grown;
        k->frame_capacity = size;
    }
    id = ++k->id | 0x80000000U;
    memcpy(k->frame, header, head);
    for (int i = 0; i < 4; i++) {
        k->frame[head + (size_t)i] = (unsigned char)(id >> (24 - 8 * i));
    }
    memcpy(k->frame + head + 4, body.data, body.size);
    k->frame_size = size;
    k->frame_at = 0;
    k->sent_on = 0;
    k->under_way = true;
    return spurion_ok();
}

/* Whether the received message answers the call under way. */
static bool answers(const spurion_call *k, const unsigned char *data, size_t size)
{
    uint32_t id = k->id | 0x80000000U, got = 0;
    for (size_t i = 0; i < 4 && i < size; i++) {
        got = got << 8 | data[i];
    }
    return size >= 4 && got == id;
}

spurion_status spurion_call_step(spurion_call *k, spurion_bytes *reply)
{
    spurion_status st;
    const unsigned char *data;
    size_t size;

    reply->data = NULL;
    reply->size = 0;
    SPURION_TRY(st, spurion_sp_step(&k->sp));
    if (k->under_way && k->sent_on != k->sp.opened) { /* a new connection: from the beginning */
        k->frame_at = 0;
        k->sent_on = k->sp.opened;
    }
    if (k->under_way && k->frame_at < k->frame_size) {
        SPURION_TRY(st, spurion_sp_send(&k->sp, k->frame, k->frame_size, &k->frame_at));
    }
    do {
        SPURION_TRY(st, spurion_sp_receive(&k->sp, &data, &size));
    } while (data && !(k->under_way && answers(k, data, size)));
    if (data) {
        reply->data = (const char *)data + 4;
        reply->size = size - 4;
        k->under_way = false;
    }
out:
    return st;
}

void spurion_call_abandon(spurion_call *k)
{
    if (k->under_way) { /* one request outstanding on a connection: a late answer must not meet the next request */
        spurion_sp_drop(&k->sp);
        k->sp.retry_at_ms = 0;
        k->sp.backoff_ms = 0;
    }
    k->under_way = false;
}

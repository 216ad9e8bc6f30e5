/* The tap: batches go into a ring, over PUB to the daemon, and leave the ring when the daemon says that they are durable. Nothing waits,
 * except flush, ready and a full ring under policy BLOCK. What the daemon missed is sent again over rpc (Sync, Fill). */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "handle.h"

#define FILL_BYTES ((size_t)4 << 20) /* of one Fill */
#define FILL_BATCHES 256
#define BATCH_BYTES_MAX ((size_t)SPURION_FRAME_BYTES_MAX - 1024) /* of one Tap: it must fit into a Fill, and that into a frame */
#define SYNC_TIMEOUT_MS 10000
#define UNSURE_MAX 65536
#define UNDER_WAY_MS 1000 /* a batch that went over the tap this long ago has come, or will not: the daemon reads as fast as the system lets it */
#define WAIT_MS 50
#define URGE_MS 10

void spurion_tap_fini(spurion_tap_state *t)
{
    if (!t->on) {
        return;
    }
    spurion_sp_fini(&t->sp);
    spurion_call_fini(&t->sync);
    while (t->first) {
        spurion_ring_entry *next = t->first->next;
        free(t->first);
        t->first = next;
    }
    free(t->lost);
    free(t->unsure);
}

static size_t entry_bytes(const spurion_ring_entry *e)
{
    return sizeof *e + e->size;
}

/* Forgets the oldest batch. */
static void ring_pop(spurion_tap_state *t)
{
    spurion_ring_entry *e = t->first;
    if (t->sending == e) {
        if (t->sending_at) { /* half of its frame is out: the connection is of no more use */
            spurion_sp_drop(&t->sp);
            t->sp.retry_at_ms = 0;
        }
        t->sending = e->next;
        t->sending_at = 0;
    }
    t->first = e->next;
    t->last = t->first ? t->last : NULL;
    t->ring_bytes -= entry_bytes(e);
    free(e);
}

/* Room for one more in a list; it doubles. */
static spurion_status list_room(void **list, int32_t *capacity, int32_t count, size_t size)
{
    int32_t wanted = *capacity ? 2 * *capacity : 16;
    void *grown;

    if (count < *capacity) {
        return spurion_ok();
    }
    grown = realloc(*list, (size_t)wanted * size);
    if (!grown) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for the list of lost batches");
    }
    *list = grown;
    *capacity = wanted;
    return spurion_ok();
}

/* Notes that a batch is gone for good; neighbours become one range. */
static spurion_status lost_note(spurion_tap_state *t, uint64_t sequence, uint32_t rollouts)
{
    spurion_status st;
    int32_t at = t->lost_count;

    SPURION_TRY(st, list_room((void **)&t->lost, &t->lost_capacity, t->lost_count, sizeof *t->lost));
    while (at > 0 && t->lost[at - 1].first > sequence) {
        at--;
    }
    t->dropped_batches++;
    t->dropped_rollouts += rollouts;
    t->lost_rollouts += rollouts;
    if (at > 0 && t->lost[at - 1].last + 1 == sequence) {
        t->lost[at - 1].last = sequence;
    } else if (at < t->lost_count && t->lost[at].first == sequence + 1) {
        t->lost[at].first = sequence;
    } else {
        memmove(t->lost + at + 1, t->lost + at, (size_t)(t->lost_count - at) * sizeof *t->lost);
        t->lost[at].first = t->lost[at].last = sequence;
        t->lost_count++;
    }
out:
    return st;
}

/* Forgets the oldest batch. One that never went over the tap is lost; of one that did, the next Sync tells. */
static spurion_status ring_forget(spurion_tap_state *t)
{
    spurion_status st;
    const spurion_ring_entry *e = t->first;

    if (t->sending == e || t->unsure_count == UNSURE_MAX) {
        SPURION_TRY(st, lost_note(t, e->sequence, e->rollouts));
    } else {
        SPURION_TRY(st, list_room((void **)&t->unsure, &t->unsure_capacity, t->unsure_count, sizeof *t->unsure));
        t->unsure[t->unsure_count++] = (spurion_unsure){e->sequence, e->rollouts, e->sent_ms};
    }
    ring_pop(t);
out:
    return st;
}

/* --- sending --- */

/* Sends what the socket takes. A broken connection is not an error here: Sync finds what is missing. */
static void send_some(spurion_tap_state *t)
{
    spurion_status st = spurion_sp_step(&t->sp);
    const unsigned char *ignored;
    size_t size;

    if (st.code == SPURION_OK) {
        st = spurion_sp_receive(&t->sp, &ignored, &size); /* a SUB says nothing; this sees the end of the connection */
    }
    while (st.code == SPURION_OK && t->sending) {
        unsigned char header[9];
        size_t head = spurion_sp_header(&t->sp, header, t->sending->size), whole = head + t->sending->size;
        if (t->sending_at < head) {
            st = spurion_sp_send(&t->sp, header, head, &t->sending_at);
        }
        if (st.code == SPURION_OK && t->sending_at >= head) {
            size_t at = t->sending_at - head;
            st = spurion_sp_send(&t->sp, t->sending->data, t->sending->size, &at);
            t->sending_at = head + at;
        }
        if (st.code == SPURION_OK && t->sending_at < whole) {
            return; /* the socket is full */
        }
        if (st.code == SPURION_OK) {
            t->sending->sent_ms = spurion_sp_now_ms();
            t->sending = t->sending->next;
            t->sending_at = 0;
        }
    }
    if (st.code != SPURION_OK && t->sp.state == SPURION_SP_CLOSED) {
        t->sending_at = 0;
    }
}

/* --- Sync and Fill --- */

static spurion_status sync_start(spurion_client *c)
{
    spurion_status st;
    spurion_tap_state *t = &c->tap;
    spurion_memory m = spurion_pool_memory(&c->scratch);
    spurion_bytes body, packed, none = {NULL, 0};
    spurion_sync in = {.run = spurion_bytes_of(c->run), .producer = spurion_bytes_of(c->producer), .epoch = t->epoch};

    in.last_sequence = t->sequence;
    in.lost = t->lost;
    in.lost_count = t->lost_count < SPURION_RANGES_MAX ? t->lost_count : SPURION_RANGES_MAX;
    in.lost_rollouts = t->lost_rollouts;
    in.closing = t->closing && t->lost_count <= SPURION_RANGES_MAX; /* goodbye with everything said */
    t->lost_asked = t->lost_rollouts;
    t->closing_asked = in.closing;
    SPURION_TRY(st, spurion_codec_encode_sync(&body, &m, &in));
    SPURION_TRY(st, spurion_client_request(c, &packed, &m, "Sync", body, none, none, SYNC_TIMEOUT_MS));
    SPURION_TRY(st, spurion_call_start(&t->sync, packed));
    t->filling = false;
    t->sync_started_ms = spurion_sp_now_ms();
out:
    return st;
}

static bool in_ranges(const spurion_range *ranges, int32_t count, uint64_t sequence)
{
    for (int32_t i = 0; i < count; i++) {
        if (sequence >= ranges[i].first && sequence <= ranges[i].last) {
            return true;
        }
    }
    return false;
}

/* Sends again what the daemon misses, as far as the ring still holds it. */
static spurion_status fill_start(spurion_client *c, const spurion_sync_reply *answer)
{
    spurion_status st = spurion_ok();
    spurion_tap_state *t = &c->tap;
    spurion_memory m = spurion_pool_memory(&c->scratch);
    spurion_bytes *taps = spurion_pool_take(&c->scratch, FILL_BATCHES * sizeof *taps), body, packed, none = {NULL, 0};
    spurion_fill in = {taps, 0};
    size_t bytes = 0;

    if (!taps) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a Fill");
    }
    for (spurion_ring_entry *e = t->first; e && e != t->sending && in.count < FILL_BATCHES; e = e->next) {
        if (in_ranges(answer->missing, answer->missing_count, e->sequence)) {
            if (in.count && bytes + e->size > FILL_BYTES) {
                break;
            }
            taps[in.count].data = e->data;
            taps[in.count++].size = e->size;
            bytes += e->size;
        }
    }
    if (in.count == 0) {
        goto out;
    }
    SPURION_TRY(st, spurion_codec_encode_fill(&body, &m, &in));
    SPURION_TRY(st, spurion_client_request(c, &packed, &m, "Fill", body, none, none, SYNC_TIMEOUT_MS));
    SPURION_TRY(st, spurion_call_start(&t->sync, packed));
    t->filling = true;
    t->refilled += (uint64_t)in.count;
    t->sync_started_ms = spurion_sp_now_ms();
out:
    return st;
}

/* The daemon misses what it had confirmed: its store is another one, or an older copy. The ring let go of these batches long ago, so they are
 * told as lost, and what is above them goes on. How many rollouts they held is not known any more. */
static spurion_status lost_again(spurion_tap_state *t, const spurion_sync_reply *answer)
{
    spurion_status st = spurion_ok();

    for (int32_t i = 0; i < answer->missing_count; i++) {
        spurion_range gone = {answer->missing[i].first, answer->missing[i].last < t->confirmed ? answer->missing[i].last : t->confirmed};
        int32_t at = t->lost_count;
        if (gone.first > gone.last || in_ranges(t->lost, t->lost_count, gone.first)) {
            continue;
        }
        SPURION_TRY(st, list_room((void **)&t->lost, &t->lost_capacity, t->lost_count, sizeof *t->lost));
        while (at > 0 && t->lost[at - 1].first > gone.first) {
            at--;
        }
        memmove(t->lost + at + 1, t->lost + at, (size_t)(t->lost_count - at) * sizeof *t->lost);
        t->lost[at] = gone;
        t->lost_count++;
        t->forgotten_batches += gone.last - gone.first + 1;
    }
out:
    return st;
}

/* The daemon has confirmed up to a number: these batches leave the ring, and losses below it are settled. */
static void confirm(spurion_tap_state *t, uint64_t stored_through)
{
    int32_t kept = 0;

    t->stored_through = stored_through; /* less than before: the daemon has forgotten something */
    t->confirmed = stored_through > t->confirmed ? stored_through : t->confirmed;
    while (t->first && t->first->sequence <= t->stored_through) {
        ring_pop(t);
    }
    for (int32_t i = 0; i < t->lost_count; i++) {
        if (t->lost[i].last > t->stored_through) {
            t->lost[kept++] = t->lost[i];
        }
    }
    t->lost_count = kept;
}

/* What an answer says of the batches that the ring forgot: stored, lost, or not yet known. */
static spurion_status resolve(spurion_tap_state *t, const spurion_sync_reply *answer)
{
    spurion_status st = spurion_ok();
    int32_t kept = 0;

    for (int32_t i = 0; i < t->unsure_count; i++) {
        spurion_unsure u = t->unsure[i];
        bool missing = in_ranges(answer->missing, answer->missing_count, u.sequence);
        if (u.sequence <= answer->stored_through) {
            continue;
        }
        if (missing && t->sync_started_ms - u.sent_ms >= UNDER_WAY_MS && st.code == SPURION_OK) {
            st = lost_note(t, u.sequence, u.rollouts);
            if (st.code == SPURION_OK) {
                continue;
            }
        }
        t->unsure[kept++] = u;
    }
    t->unsure_count = kept;
    return st;
}

static spurion_status sync_answered(spurion_client *c, spurion_bytes got)
{
    spurion_status st;
    spurion_tap_state *t = &c->tap;
    spurion_memory m = spurion_pool_memory(&c->scratch);
    spurion_reply reply;
    spurion_sync_reply answer;
    bool filling = t->filling;

    t->filling = false;
    SPURION_TRY(st, spurion_codec_decode_reply(&reply, &m, got));
    t->sync_at_ms = spurion_sp_now_ms() + (filling ? 0 : c->sync_interval_ms);
    if (reply.code != SPURION_OK) {
        t->sync_at_ms = spurion_sp_now_ms() + (reply.retry_after_ms ? (int)reply.retry_after_ms : c->sync_interval_ms);
        st = spurion_error((spurion_code)reply.code, "%.*s", (int)reply.message.size, reply.message.data ? reply.message.data : "");
        goto out;
    }
    if (filling) {
        goto out; /* the next Sync says what became of it */
    }
    SPURION_TRY(st, spurion_codec_decode_sync_reply(&answer, &m, reply.body));
    t->answers++;
    t->lost_told = t->lost_asked;
    t->closed = t->closing_asked;
    SPURION_TRY(st, lost_again(t, &answer));
    confirm(t, answer.stored_through);
    SPURION_TRY(st, resolve(t, &answer));
    SPURION_TRY(st, fill_start(c, &answer));
out:
    return st;
}

/* One step of everything that is under way. Errors of the connection are kept for flush; publishing goes on without. */
static spurion_status tap_step(spurion_client *c, bool sync_now)
{
    spurion_status st = spurion_ok();
    spurion_tap_state *t = &c->tap;
    spurion_bytes got;

    send_some(t);
    if (!t->sync.under_way && (sync_now || spurion_sp_now_ms() >= t->sync_at_ms)) {
        SPURION_TRY(st, sync_start(c));
    }
    if (t->sync.under_way) {
        st = spurion_call_step(&t->sync, &got);
        if (st.code == SPURION_OK && got.data) {
            SPURION_TRY(st, sync_answered(c, got));
        } else if (spurion_sp_now_ms() - t->sync_started_ms > SYNC_TIMEOUT_MS) {
            spurion_call_abandon(&t->sync);
        }
    }
out:
    spurion_pool_reset(&c->scratch);
    return st;
}

/* --- publishing --- */

static spurion_status tap_need(const spurion_client *c)
{
    return c->tap.on ? spurion_ok() : spurion_error(SPURION_FAILED_PRECONDITION, "publish: expected a handle opened with a rollouts address");
}

/* Waits for something to happen on the tap's sockets. */
static void tap_wait(spurion_client *c, int64_t deadline)
{
    int64_t left = deadline - spurion_sp_now_ms();
    int ms = left < WAIT_MS ? (int)left : WAIT_MS;
    if (c->tap.sync.under_way) {
        spurion_sp_wait(&c->tap.sync.sp, c->tap.sync.frame_at < c->tap.sync.frame_size, ms);
    } else {
        spurion_sp_wait(&c->tap.sp, c->tap.sending != NULL, ms);
    }
}

/* A step for someone who waits: asks more often than in passing. *next: when to ask again; 0 to begin. */
static spurion_status tap_urge(spurion_client *c, int64_t *next)
{
    bool due = spurion_sp_now_ms() >= *next && !c->tap.sync.under_way;

    *next = due ? spurion_sp_now_ms() + URGE_MS : *next;
    return tap_step(c, due);
}

/* Makes room for a batch by the policy. */
static spurion_status ring_room(spurion_client *c, size_t bytes, int32_t rollouts)
{
    spurion_status st = spurion_ok();
    spurion_tap_state *t = &c->tap;
    int64_t deadline = spurion_sp_now_ms() + c->timeout_ms, next = 0;

    while (t->ring_bytes + bytes > c->ring_bytes_max) {
        if (c->policy == SPURION_RING_DROP_OLDEST && t->first && bytes <= c->ring_bytes_max) {
            SPURION_TRY(st, ring_forget(t));
            continue;
        }
        if (c->policy != SPURION_RING_BLOCK || !t->first || bytes > c->ring_bytes_max || spurion_sp_now_ms() >= deadline) {
            st = spurion_error(SPURION_RESOURCE_EXHAUSTED,
                               "ring: expected room for %zu bytes, found %zu of %zu in use by batches that the daemon has not confirmed; "
                               "%d rollouts dropped",
                               bytes, t->ring_bytes, c->ring_bytes_max, rollouts);
            goto out;
        }
        st = tap_urge(c, &next);
        if (t->ring_bytes + bytes > c->ring_bytes_max) {
            tap_wait(c, t->sync.under_way || next > deadline ? deadline : next);
        }
    }
    st = spurion_ok();
out:
    return st;
}

static spurion_status ring_push(spurion_client *c, const spurion_tap *tap, spurion_bytes packed)
{
    spurion_tap_state *t = &c->tap;
    spurion_ring_entry *e = malloc(sizeof *e + packed.size);

    if (!e) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a batch of %zu bytes", packed.size);
    }
    e->next = NULL;
    e->sequence = tap->sequence;
    e->rollouts = (uint32_t)tap->list.count;
    e->sent_ms = 0;
    e->size = packed.size;
    memcpy(e->data, packed.data, packed.size);
    if (t->last) {
        t->last->next = e;
    } else {
        t->first = e;
    }
    t->last = e;
    t->sending = t->sending ? t->sending : e;
    t->ring_bytes += entry_bytes(e);
    t->sequence = tap->sequence;
    t->published_rollouts += e->rollouts;
    return spurion_ok();
}

static spurion_status tap_publish(spurion_client *c, const spurion_rollout *rollouts, int32_t count, bool has_step_end, int64_t step)
{
    spurion_status st;
    spurion_memory m = spurion_pool_memory(&c->pool);
    spurion_rollout *named = spurion_pool_take(&c->pool, ((size_t)count + 1) * sizeof *named);
    spurion_tap tap = {.run = spurion_bytes_of(c->run), .producer = spurion_bytes_of(c->producer), .epoch = c->tap.epoch};
    spurion_bytes packed;

    if (!named) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %d rollouts", count);
    }
    for (int32_t i = 0; i < count; i++) {
        named[i] = rollouts[i];
        named[i].run = named[i].run.data ? named[i].run : tap.run;
    }
    tap.sequence = c->tap.sequence + 1;
    tap.list.rollouts = named;
    tap.list.count = count;
    tap.has_step_end = has_step_end;
    tap.step_end = step;
    SPURION_TRY(st, spurion_codec_encode_tap(&packed, &m, &tap));
    spurion_pool_reset(&c->previous);
    if (packed.size > BATCH_BYTES_MAX) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "publish: expected a batch of at most %zu bytes, found %zu (publish fewer rollouts at once)",
                           BATCH_BYTES_MAX, packed.size);
        goto out;
    }
    SPURION_TRY(st, ring_room(c, sizeof(spurion_ring_entry) + packed.size, count));
    SPURION_TRY(st, ring_push(c, &tap, packed));
    (void)tap_step(c, false).code; /* a connection that is away does not concern the trainer; flush tells */
out:
    if (st.code == SPURION_RESOURCE_EXHAUSTED) { /* the next Sync tells the daemon too */
        c->tap.dropped_batches++;
        c->tap.dropped_rollouts += (uint64_t)count;
        c->tap.lost_rollouts += (uint64_t)count;
    }
    return st;
}

spurion_code spurion_client_publish(spurion_client *c, const spurion_rollout *rollouts, int32_t count)
{
    spurion_status st;

    SPURION_TRY(st, spurion_client_enter(c));
    SPURION_TRY(st, tap_need(c));
    if (count < 1 || count > SPURION_BATCH_ROLLOUTS_MAX) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "publish: expected 1 to %d rollouts, found %d", SPURION_BATCH_ROLLOUTS_MAX, count);
        goto out;
    }
    SPURION_TRY(st, tap_publish(c, rollouts, count, false, 0));
out:
    return spurion_client_fail(c, &st);
}

spurion_code spurion_client_step_end(spurion_client *c, int64_t step)
{
    spurion_status st;

    SPURION_TRY(st, spurion_client_enter(c));
    SPURION_TRY(st, tap_need(c));
    SPURION_TRY(st, tap_publish(c, NULL, 0, true, step));
out:
    return spurion_client_fail(c, &st);
}

spurion_code spurion_client_pump(spurion_client *c)
{
    spurion_status st;

    SPURION_TRY(st, spurion_client_enter(c));
    SPURION_TRY(st, tap_need(c));
    SPURION_TRY(st, tap_step(c, false));
out:
    return spurion_client_fail(c, &st);
}

spurion_code spurion_client_ready(spurion_client *c, int timeout_ms)
{
    spurion_status st;
    int64_t deadline = spurion_sp_now_ms() + (timeout_ms > 0 ? timeout_ms : c->timeout_ms);
    uint64_t answers;

    SPURION_TRY(st, spurion_client_enter(c));
    SPURION_TRY(st, tap_need(c));
    answers = c->tap.answers;
    c->tap.sync_at_ms = 0;
    for (;;) {
        st = tap_step(c, false);
        if (c->tap.answers > answers && c->tap.sp.state == SPURION_SP_OPEN) {
            st = spurion_ok();
            break;
        }
        if (spurion_sp_now_ms() >= deadline) {
            st = st.code != SPURION_OK ? st : spurion_error(SPURION_DEADLINE_EXCEEDED, "%s: not ready in time", c->tap.sp.url);
            break;
        }
        tap_wait(c, deadline);
    }
out:
    return spurion_client_fail(c, &st);
}

/* Whether the daemon holds, or was told that it never will, everything published so far. */
static bool tap_settled(const spurion_tap_state *t)
{
    return !t->first && !t->unsure_count && !t->lost_count && t->lost_told == t->lost_rollouts && t->closed == t->closing;
}

static spurion_status tap_settle(spurion_client *c, int timeout_ms)
{
    spurion_status st = spurion_ok();
    int64_t deadline = spurion_sp_now_ms() + (timeout_ms > 0 ? timeout_ms : c->timeout_ms), next = 0;
    spurion_tap_state *t = &c->tap;

    while (!tap_settled(t)) {
        st = tap_urge(c, &next);
        if (tap_settled(t)) {
            break;
        }
        if (spurion_sp_now_ms() >= deadline) {
            return spurion_error(SPURION_DEADLINE_EXCEEDED, "flush: batches %llu to %llu are not confirmed%s%s",
                                 (unsigned long long)t->stored_through + 1, (unsigned long long)t->sequence, st.code != SPURION_OK ? ": " : "",
                                 st.message);
        }
        tap_wait(c, t->sync.under_way || next > deadline ? deadline : next);
    }
    if (t->forgotten_batches) {
        return spurion_error(SPURION_DATA_LOSS, "%llu batches that the daemon had confirmed are not in its store any more (another store, or an older copy "
                             "of it); all that was published since is stored", (unsigned long long)t->forgotten_batches);
    }
    if (t->dropped_batches) {
        return spurion_error(SPURION_DATA_LOSS, "%llu rollouts in %llu batches were dropped by the ring's policy; all others are stored",
                             (unsigned long long)t->dropped_rollouts, (unsigned long long)t->dropped_batches);
    }
    return spurion_ok();
}

spurion_code spurion_client_flush(spurion_client *c, int timeout_ms)
{
    spurion_status st;

    SPURION_TRY(st, spurion_client_enter(c));
    SPURION_TRY(st, tap_need(c));
    SPURION_TRY(st, tap_settle(c, timeout_ms));
out:
    return spurion_client_fail(c, &st);
}

spurion_code spurion_client_leave(spurion_client *c, int timeout_ms)
{
    spurion_status st;

    SPURION_TRY(st, spurion_client_enter(c));
    SPURION_TRY(st, tap_need(c));
    c->tap.closing = true;
    c->tap.closed = false;
    SPURION_TRY(st, tap_settle(c, timeout_ms));
out:
    if (c->pid == getpid()) {
        c->tap.closing = c->tap.closed = false; /* who publishes again is a producer again */
    }
    return spurion_client_fail(c, &st);
}

void spurion_client_tap_stats(spurion_tap_stats *out, const spurion_client *c)
{
    const spurion_tap_state *t = &c->tap;
    spurion_tap_stats s = {t->epoch, t->sequence, t->stored_through, t->published_rollouts, t->dropped_batches, t->dropped_rollouts,
                           t->refilled, t->ring_bytes, t->sp.state == SPURION_SP_OPEN};
    *out = s;
}

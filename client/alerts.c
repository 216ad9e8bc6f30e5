/* Alerts as they come: the live channel tells that there is something new; numbers say what was missed, and that is fetched by rpc.
 * Order and exactly-once rest on the numbers alone. */
#include <string.h>

#include "handle.h"

#define FETCH_LIMIT 64
#define LOOK_MS 5000 /* an alert sent while the daemon was still making the connection is seen after this long at the latest */

void spurion_alerts_fini(spurion_alerts_state *a)
{
    if (a->on) {
        spurion_sp_fini(&a->sp);
    }
    spurion_pool_reset(&a->pool);
    spurion_pool_reset(&a->held_pool);
}

int spurion_client_alert_fd(const spurion_client *c)
{
    return c->alerts.on ? c->alerts.sp.fd : -1;
}

static spurion_status alerts_need(const spurion_client *c)
{
    return c->alerts.on ? spurion_ok() : spurion_error(SPURION_FAILED_PRECONDITION, "alerts: expected a handle opened with an alerts address");
}

/* Asks the store for alerts from next_seq on. */
static spurion_status fetch(spurion_client *c)
{
    spurion_status st;
    spurion_alerts_state *a = &c->alerts;
    spurion_alerts in = {.epoch = a->epoch, .from_seq = a->next_seq, .limit = FETCH_LIMIT};
    spurion_bytes body, answer;
    spurion_memory m = spurion_pool_memory(&c->pool), keep = spurion_pool_memory(&a->pool);

    spurion_pool_reset(&a->pool);
    a->page.count = 0;
    a->page_at = 0;
    SPURION_TRY(st, spurion_codec_encode_alerts(&body, &m, &in));
    SPURION_TRY(st, spurion_client_call(c, &answer, "Alerts", body, false, 0));
    SPURION_TRY(st, spurion_codec_decode_alerts_reply(&a->page, &keep, answer));
    if (a->started && a->page.epoch != a->epoch) { /* another store: its numbers begin anew */
        a->epoch = a->page.epoch;
        a->next_seq = 1;
        a->has_held = false;
    }
    if (a->page.count == 0 || a->page.last_seq < a->next_seq) {
        a->fetch_below = 0; /* nothing more is stored */
    }
    a->look_at_ms = spurion_sp_now_ms() + LOOK_MS;
out:
    return st;
}

/* The first look: without a number to begin from, what is stored already is old. */
static spurion_status begin(spurion_client *c)
{
    spurion_status st = spurion_ok();
    spurion_alerts_state *a = &c->alerts;
    uint64_t wanted = a->next_seq;

    if (a->started) {
        goto out;
    }
    a->next_seq = wanted ? wanted : UINT64_MAX >> 1;
    SPURION_TRY(st, fetch(c));
    a->epoch = a->page.epoch;
    a->started = true;
    if (!wanted) {
        a->next_seq = a->page.last_seq + 1;
        a->page.count = 0;
        a->fetch_below = 0;
    } else {
        a->fetch_below = a->page.last_seq + 1;
    }
out:
    if (!a->started) {
        a->next_seq = wanted;
    }
    return st;
}

spurion_code spurion_client_alert_from(spurion_client *c, uint64_t seq)
{
    spurion_status st;

    SPURION_TRY(st, spurion_client_enter(c));
    SPURION_TRY(st, alerts_need(c));
    c->alerts.next_seq = seq ? seq : 1;
    c->alerts.started = false;
    c->alerts.has_held = false;
    SPURION_TRY(st, begin(c));
out:
    return spurion_client_fail(c, &st);
}

/* Gives the fetched alert that is due, if there is one. */
static bool page_next(spurion_alerts_state *a, spurion_alert *out)
{
    while (a->page_at < a->page.count) {
        const spurion_alert *next = &a->page.alerts[a->page_at++];
        if (next->seq >= a->next_seq) {
            *out = *next;
            a->next_seq = next->seq + 1;
            return true;
        }
    }
    return false;
}

/* Takes one message of the live channel. */
static spurion_status live_take(spurion_alerts_state *a, bool *came)
{
    spurion_status st;
    const unsigned char *data;
    size_t size;
    spurion_memory m = spurion_pool_memory(&a->held_pool);
    spurion_bytes in;

    *came = false;
    SPURION_TRY(st, spurion_sp_receive(&a->sp, &data, &size));
    if (data) {
        in.data = (const char *)data;
        in.size = size;
        spurion_pool_reset(&a->held_pool);
        SPURION_TRY(st, spurion_codec_decode_alert(&a->held, &m, in));
        *came = a->has_held = true;
    }
out:
    return st;
}

/* What the live channel brought: the alert that is due, an old one, or a sign that some were missed. */
static spurion_status live_next(spurion_client *c, spurion_alert *out, bool *found)
{
    spurion_status st = spurion_ok();
    spurion_alerts_state *a = &c->alerts;
    bool came;

    *found = false;
    while (!*found) {
        if (!a->has_held) {
            SPURION_TRY(st, live_take(a, &came));
            if (!came) {
                break;
            }
        }
        if (a->held.seq == 0) { /* no space in the store: it cannot be stored, and has no number */
            a->has_held = false;
            *out = a->held;
            *found = true;
        } else if (a->held.epoch == a->epoch && a->held.seq < a->next_seq) {
            a->has_held = false; /* given out already */
        } else if (a->held.epoch == a->epoch && a->held.seq == a->next_seq) {
            a->has_held = false;
            a->next_seq++;
            *out = a->held;
            *found = true;
        } else if (a->held.epoch != a->epoch) { /* another store: its numbers begin anew */
            a->epoch = a->held.epoch;
            a->next_seq = 1;
            a->fetch_below = a->held.seq;
            break;
        } else {
            a->fetch_below = a->held.seq;
            break;
        }
    }
out:
    return st;
}

spurion_code spurion_client_alert_next(spurion_client *c, spurion_alert *out)
{
    spurion_status st;
    spurion_alerts_state *a = &c->alerts;
    bool found = false;
    uint64_t opened;

    SPURION_TRY(st, spurion_client_enter(c));
    SPURION_TRY(st, alerts_need(c));
    SPURION_TRY(st, begin(c)); /* before the connection: whoever sees that knows that every alert from now on is given */
    opened = a->sp.opened;
    st = spurion_sp_step(&a->sp);
    if (st.code != SPURION_OK && st.code != SPURION_UNAVAILABLE) {
        goto out;
    }
    if (a->sp.opened != opened || spurion_sp_now_ms() >= a->look_at_ms) {
        a->fetch_below = UINT64_MAX; /* a new connection: what came in between is in the store */
    }
    for (int round = 0; round < 3 && !found; round++) {
        found = page_next(a, out);
        if (!found && a->sp.state == SPURION_SP_OPEN && a->fetch_below == 0) {
            st = live_next(c, out, &found);
            if (st.code != SPURION_OK && st.code != SPURION_UNAVAILABLE) {
                goto out;
            }
        }
        if (!found && a->fetch_below > a->next_seq) {
            SPURION_TRY(st, fetch(c));
        } else if (!found && a->fetch_below) {
            a->fetch_below = 0;
        }
    }
    st = found ? spurion_ok() : spurion_error(SPURION_NOT_FOUND, "no alert now");
out:
    return spurion_client_fail(c, &st);
}

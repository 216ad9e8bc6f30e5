/* See ingest_ranges.h. Few ranges (one, when nothing is missing), so a plain sorted array. */
#include "daemon/ingest_ranges.h"

#include <stdlib.h>
#include <string.h>

void spurion_ranges_init(spurion_ranges *s)
{
    memset(s, 0, sizeof *s);
}

void spurion_ranges_fini(spurion_ranges *s)
{
    free(s->ranges);
    memset(s, 0, sizeof *s);
}

static bool make_room(spurion_ranges *s, int32_t count)
{
    if (count > s->room) {
        int32_t room = count + count / 2 + 4;
        spurion_range *p = realloc(s->ranges, (size_t)room * sizeof *p);
        if (p == NULL) {
            return false;
        }
        s->ranges = p;
        s->room = room;
    }
    return true;
}

bool spurion_ranges_copy(spurion_ranges *out, const spurion_ranges *in)
{
    if (!make_room(out, in->count)) {
        return false;
    }
    if (in->count > 0) {
        memcpy(out->ranges, in->ranges, (size_t)in->count * sizeof *in->ranges);
    }
    out->count = in->count;
    return true;
}

/* Place of the first range that ends at value or behind it. */
static int32_t place_of(const spurion_ranges *s, uint64_t value)
{
    int32_t low = 0, high = s->count;
    while (low < high) {
        int32_t mid = low + (high - low) / 2;
        if (s->ranges[mid].last < value) {
            low = mid + 1;
        } else {
            high = mid;
        }
    }
    return low;
}

bool spurion_ranges_add(bool *fresh, spurion_ranges *s, uint64_t first, uint64_t last)
{
    int32_t from = place_of(s, first > 1 ? first - 1 : 1), to = from;
    bool inside = from < s->count && s->ranges[from].first <= first && s->ranges[from].last >= last;

    if (fresh != NULL) {
        *fresh = !inside;
    }
    if (inside) {
        return true;
    }
    if (!make_room(s, s->count + 1)) {
        return false;
    }
    while (to < s->count && s->ranges[to].first <= (last == UINT64_MAX ? last : last + 1)) { /* joins what it touches */
        first = s->ranges[to].first < first ? s->ranges[to].first : first;
        last = s->ranges[to].last > last ? s->ranges[to].last : last;
        to++;
    }
    memmove(s->ranges + from + 1, s->ranges + to, (size_t)(s->count - to) * sizeof *s->ranges);
    s->ranges[from].first = first;
    s->ranges[from].last = last;
    s->count += 1 - (to - from);
    return true;
}

void spurion_ranges_cut(spurion_ranges *s, uint64_t first, uint64_t last)
{
    if (!make_room(s, s->count + 1)) {
        return;
    }
    for (int32_t i = place_of(s, first); i < s->count && s->ranges[i].first <= last;) {
        spurion_range *r = &s->ranges[i];
        if (r->first < first && r->last > last) {
            memmove(r + 1, r, (size_t)(s->count - i) * sizeof *r);
            r[0].last = first - 1;
            r[1].first = last + 1;
            s->count++;
            return;
        }
        if (r->first >= first && r->last <= last) {
            memmove(r, r + 1, (size_t)(s->count - i - 1) * sizeof *r);
            s->count--;
        } else if (r->first < first) {
            r->last = first - 1;
            i++;
        } else {
            r->first = last + 1;
            return;
        }
    }
}

void spurion_ranges_remove(spurion_ranges *s, uint64_t value)
{
    spurion_ranges_cut(s, value, value);
}

bool spurion_ranges_has(const spurion_ranges *s, uint64_t value)
{
    int32_t i = place_of(s, value);
    return i < s->count && s->ranges[i].first <= value;
}

bool spurion_ranges_touches(const spurion_ranges *s, uint64_t value)
{
    return spurion_ranges_has(s, value) || (value > 1 && spurion_ranges_has(s, value - 1)) ||
           (value < UINT64_MAX && spurion_ranges_has(s, value + 1));
}

uint64_t spurion_ranges_through(const spurion_ranges *s)
{
    return s->count > 0 && s->ranges[0].first == 1 ? s->ranges[0].last : 0;
}

uint64_t spurion_ranges_last(const spurion_ranges *s)
{
    return s->count > 0 ? s->ranges[s->count - 1].last : 0;
}

uint64_t spurion_ranges_total(const spurion_ranges *s)
{
    uint64_t total = 0;
    for (int32_t i = 0; i < s->count; i++) {
        total += s->ranges[i].last - s->ranges[i].first + 1;
    }
    return total;
}

bool spurion_ranges_missing(spurion_ranges *out, const spurion_ranges *s, uint64_t last)
{
    uint64_t next = 1;

    out->count = 0;
    for (int32_t i = 0; i < s->count && next <= last; i++) {
        if (s->ranges[i].first > next) {
            uint64_t end = s->ranges[i].first - 1 < last ? s->ranges[i].first - 1 : last;
            if (!spurion_ranges_add(NULL, out, next, end)) {
                return false;
            }
        }
        if (s->ranges[i].last == UINT64_MAX) {
            return true;
        }
        next = s->ranges[i].last + 1;
    }
    return next > last || spurion_ranges_add(NULL, out, next, last);
}

bool spurion_ranges_difference(spurion_ranges *out, const spurion_ranges *a, const spurion_ranges *b)
{
    if (!spurion_ranges_copy(out, a) || !make_room(out, a->count + b->count + 1)) {
        return false;
    }
    for (int32_t i = 0; i < b->count; i++) {
        spurion_ranges_cut(out, b->ranges[i].first, b->ranges[i].last);
    }
    return true;
}

bool spurion_ranges_fill(spurion_ranges *a, spurion_ranges *b, uint64_t first, uint64_t last)
{
    spurion_ranges holes;
    bool ok;

    spurion_ranges_init(&holes);
    ok = spurion_ranges_missing(&holes, b, last);
    if (ok && first > 1) {
        spurion_ranges_cut(&holes, 1, first - 1);
    }
    for (int32_t i = 0; ok && i < holes.count; i++) {
        ok = spurion_ranges_add(NULL, a, holes.ranges[i].first, holes.ranges[i].last) &&
             spurion_ranges_add(NULL, b, holes.ranges[i].first, holes.ranges[i].last);
    }
    spurion_ranges_fini(&holes);
    return ok;
}

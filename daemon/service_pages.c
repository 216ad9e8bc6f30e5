/* See service.h. A list of bodies, oldest first, under one lock; tokens are "<random number>.<offset>" in hex. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "daemon/base/clock.h"
#include "daemon/service.h"

#define KEEP_MS 60000

typedef struct body {
    struct body *next;
    uint64_t number;
    int64_t used_ms;
    size_t size;
    char data[];
} body;

typedef struct spurion_pages {
    pthread_mutex_t lock;
    body *oldest, **newest;
    size_t bytes;
} spurion_pages;

spurion_status spurion_pages_create(spurion_pages **out)
{
    *out = calloc(1, sizeof **out);
    if (*out == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "pages: no memory");
    }
    pthread_mutex_init(&(*out)->lock, NULL);
    (*out)->newest = &(*out)->oldest;
    return spurion_ok();
}

static void drop_oldest(spurion_pages *p)
{
    body *b = p->oldest;

    p->oldest = b->next;
    if (p->oldest == NULL) {
        p->newest = &p->oldest;
    }
    p->bytes -= b->size;
    free(b);
}

void spurion_pages_destroy(spurion_pages *p)
{
    if (p == NULL) {
        return;
    }
    while (p->oldest != NULL) {
        drop_oldest(p);
    }
    pthread_mutex_destroy(&p->lock);
    free(p);
}

static void make_token(char token[SPURION_PAGE_TOKEN_BYTES], uint64_t number, size_t offset)
{
    (void)snprintf(token, SPURION_PAGE_TOKEN_BYTES, "%016llx.%llx", (unsigned long long)number, (unsigned long long)offset);
}

spurion_status spurion_pages_keep(char token[SPURION_PAGE_TOKEN_BYTES], spurion_pages *p, spurion_bytes in)
{
    int64_t now = spurion_clock_ms();
    body *b = malloc(sizeof *b + in.size);
    uint64_t number;

    if (b == NULL || getrandom(&number, sizeof number, 0) != sizeof number) {
        free(b);
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "pages: no memory for an answer of %zu bytes", in.size);
    }
    b->next = NULL;
    b->number = number;
    b->used_ms = now;
    b->size = in.size;
    memcpy(b->data, in.data, in.size);
    pthread_mutex_lock(&p->lock);
    while (p->oldest != NULL && (p->bytes + in.size > SPURION_PAGES_BYTES_MAX || now - p->oldest->used_ms > KEEP_MS)) {
        drop_oldest(p);
    }
    *p->newest = b;
    p->newest = &b->next;
    p->bytes += in.size;
    pthread_mutex_unlock(&p->lock);
    make_token(token, number, SPURION_PAGE_BYTES);
    return spurion_ok();
}

spurion_status spurion_pages_get(spurion_bytes *slice, char next[SPURION_PAGE_TOKEN_BYTES], spurion_pages *p, spurion_bytes token,
                                 const spurion_memory *m)
{
    spurion_status st = spurion_error(SPURION_NOT_FOUND, "page_token: expected one of the last answers', found another; repeat the request");
    unsigned long long number, offset;
    char text[SPURION_PAGE_TOKEN_BYTES];
    int used = 0;

    next[0] = '\0';
    if (token.size >= sizeof text) {
        return st;
    }
    memcpy(text, token.data, token.size);
    text[token.size] = '\0';
    if (sscanf(text, "%16llx.%15llx%n", &number, &offset, &used) != 2 || (size_t)used != token.size) {
        return st;
    }
    pthread_mutex_lock(&p->lock);
    for (body *b = p->oldest; b != NULL; b = b->next) {
        size_t n;
        char *copy;
        if (b->number != number || offset >= b->size) {
            continue;
        }
        b->used_ms = spurion_clock_ms();
        n = b->size - offset < SPURION_PAGE_BYTES ? b->size - offset : SPURION_PAGE_BYTES;
        copy = m->take(m->context, n + 1);
        if (copy == NULL) {
            st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "pages: no memory for a slice");
            break;
        }
        memcpy(copy, b->data + offset, n);
        copy[n] = '\0';
        slice->data = copy;
        slice->size = n;
        if (offset + n < b->size) {
            make_token(next, number, offset + n);
        }
        st = spurion_ok();
        break;
    }
    pthread_mutex_unlock(&p->lock);
    return st;
}

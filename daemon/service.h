/* The methods of spurion.v1.Spurion: one table from name to handler. Handlers of the first kind run on nng's threads and only decode,
 * check and push; questions and Submit go on to the desk thread. */
#ifndef SPURION_SERVICE_H
#define SPURION_SERVICE_H

#include "daemon/ingest.h"

struct spurion_pipeline;

/* A request came; see spurion_transport_handlers. context: the pipeline. */
void spurion_service_request(void *context, spurion_transport_call *wire, const char *data, size_t size);
/* A message of the tap came. */
void spurion_service_tap(void *context, const char *data, size_t size);

/* Whether new work is taken: UNAVAILABLE while shutting down, RESOURCE_EXHAUSTED while the store has no space. */
spurion_status spurion_service_check_open(struct spurion_pipeline *p) SPURION_MUST_USE;

/* Answers questions: Query, Get, Counts, Runs, Alerts, Status, Catalogue, Rules (service_read.c). *body in the call's arena. */
spurion_status spurion_service_read(spurion_bytes *body, struct spurion_pipeline *p, spurion_call *call) SPURION_MUST_USE;

/* ---- pages (service_pages.c): long answers are kept until their caller has fetched them ---- */

#define SPURION_PAGE_BYTES (SPURION_REPLY_BYTES_MAX - 1024) /* slice of a body; the rest is for the envelope */
#define SPURION_PAGES_BYTES_MAX (32u << 20) /* kept bodies; the oldest goes when there are more */
#define SPURION_PAGE_TOKEN_BYTES 40

struct spurion_pages;
spurion_status spurion_pages_create(struct spurion_pages **out) SPURION_MUST_USE;
void spurion_pages_destroy(struct spurion_pages *p);
/* Keeps a copy of body from offset `from` on; *token (NUL-terminated) asks for what follows. */
spurion_status spurion_pages_keep(char token[SPURION_PAGE_TOKEN_BYTES], struct spurion_pages *p, spurion_bytes body) SPURION_MUST_USE;
/* The slice that token asks for, copied into m, and the next token, empty at the end. The same token may be asked again. NOT_FOUND:
 * unknown, or forgotten: the caller repeats its request. */
spurion_status spurion_pages_get(spurion_bytes *slice, char next[SPURION_PAGE_TOKEN_BYTES], struct spurion_pages *p, spurion_bytes token,
                                 const spurion_memory *m) SPURION_MUST_USE;

#endif

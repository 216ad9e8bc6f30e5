/* What the paths of the HTTP port mean: drop-in reward servers, health, metrics. A reward request becomes a call like Score's, in the same
 * queue; since it brings no names, it gets a run from its path, a step by counting, a group from its prompt, and an id from a hash.
 * Thread: route and request on the HTTP thread; admit on the intake's; body on the sink's; reply on whoever answers the call. */
#ifndef SPURION_SERVICE_HTTP_H
#define SPURION_SERVICE_HTTP_H

#include "daemon/http.h"
#include "daemon/ingest.h"

struct spurion_pipeline;

typedef struct spurion_http_calls spurion_http_calls;

spurion_status spurion_http_calls_create(spurion_http_calls **out) SPURION_MUST_USE;
/* Listens on config->listen.http, if it is given. */
spurion_status spurion_service_http_start(struct spurion_pipeline *p, bool insecure) SPURION_MUST_USE;

/* Enters a call into those in flight. false: the call is gone, its client waits for an earlier one of the same request whose own client had
 * gone. *repeated: the same request of another client is in flight, so that a stored answer is not for this one. */
bool spurion_http_admit(bool *repeated, struct spurion_pipeline *p, spurion_call *call);
/* Gives its rollouts their names. */
void spurion_http_name(struct spurion_pipeline *p, spurion_call *call);
/* The answer as it is stored and told: three digits of status, then JSON. *keep: it will hold for a retry too. */
spurion_status spurion_http_body(spurion_bytes *out, bool *keep, spurion_call *call) SPURION_MUST_USE;
/* Answers; call->http is NULL afterwards. */
void spurion_http_answer(struct spurion_pipeline *p, spurion_call *call, const spurion_status *st, spurion_bytes body);

#endif

/* The daemon at work: transport -> intake -> batcher -> engine -> sink (rules are the engine's) -> store -> alerts -> replies.
 * Threads: nng's (decode, check, push), intake, engine, sink, desk (questions, Submit), and the caller's (signals, sd_notify, drain). */
#ifndef SPURION_PIPELINE_H
#define SPURION_PIPELINE_H

#include "daemon/config.h"

#define SPURION_DRAIN_MS 3000               /* after SIGTERM: work in hand is finished for so long, the rest is left to the next start */
#define SPURION_STOP_MS 20000               /* after SIGTERM: a thread that is still busy then is left behind */

/* source: what config was loaded from; SIGHUP reads it again (rules, catalogue and tokens; docs/operations.md).
 * Runs until SIGTERM or SIGINT, or until it cannot go on. Needs config->store.path and at least one listen.rpc. Blocks SIGTERM, SIGINT,
 * SIGHUP, SIGUSR1 in the process. Returns the exit status (sysexits.h):
 * 0 stopped as asked, nothing acknowledged is lost; 65 the store is damaged; 69 an address is taken; 70 the device failed or a bug;
 * 71 no memory or space to start; 74 a write to the store failed; 75 stopped before the drain ended (second signal, or too slow);
 * 77 permission; 78 configuration.
 * nng's threads are still there afterwards: the caller flushes its streams and calls _exit, not exit. */
typedef struct spurion_source {
    const char *path;
    const char *const *overrides;
    int override_count;
} spurion_source;
int spurion_pipeline_run(const spurion_config *config, const spurion_source *source);

#endif

/* Counters of the whole daemon under one name each: for Status and for Prometheus. Thread: any. Memory: the caller's. */
#ifndef SPURION_SERVICE_METRICS_H
#define SPURION_SERVICE_METRICS_H

#include "spurion/json.h"
#include "spurion/messages.h"

struct spurion_pipeline;

#define SPURION_METRICS_COUNT 28

/* Fills out (SPURION_METRICS_COUNT); the names are static. */
void spurion_metrics_counters(spurion_counter *out, struct spurion_pipeline *p);
/* Appends them in Prometheus' text format 0.0.4 (https://prometheus.io/docs/instrumenting/exposition_formats/), with gauges and the HTTP
 * port's own. */
void spurion_metrics_print(spurion_text *out, struct spurion_pipeline *p);

#endif

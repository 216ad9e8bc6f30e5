/* See service_metrics.h. */
#include "daemon/service_metrics.h"

#include "daemon/base/clock.h"
#include "daemon/http.h"
#include "daemon/pipeline_internal.h"

/* What a metric is; a counter's name gets _total. */
typedef struct metric {
    const char *name;
    bool gauge;
    const char *help;
} metric;

static const metric metrics[SPURION_METRICS_COUNT] = {
    {"requests", false, "calls over rpc, and reward requests over HTTP"},
    {"requests_refused", false, "calls answered with an error"},
    {"taps", false, "messages of the tap that were taken"},
    {"taps_before", false, "messages of the tap that came again"},
    {"taps_refused", false, "messages of the tap that were not taken"},
    {"rollouts_received", false, "rollouts accepted"},
    {"rollouts_judged", false, "rollouts judged and stored"},
    {"rollouts_refused", false, "rollouts that could not be judged"},
    {"rollouts_flagged", false, "judged rollouts with a flag"},
    {"rollouts_known", false, "rollouts answered from the store or by their twin in flight"},
    {"alerts", false, "alerts sent"},
    {"batches", false, "micro-batches judged"},
    {"commits", false, "write batches of the sink"},
    {"steps_closed", false, "steps closed"},
    {"conflicts", false, "rollouts that the store had already when they were written"},
    {"tokens", false, "tokens of judged rollouts"},
    {"rollouts_prepared_ahead", false, "rollouts read and tokenised while the engine judged others"},
    {"connections_rpc", true, "connections now"},
    {"connections_rollouts", true, "connections now"},
    {"connections_alerts", true, "connections now"},
    {"connections_refused", false, "connections refused"},
    {"alerts_published", false, "alerts handed to the alert channel"},
    {"alerts_not_published", false, "alerts that the alert channel did not take"},
    {"store_commits", false, "synced writes of the store"},
    {"store_free_bytes", true, "free space where the store is"},
    {"store_corruptions", false, "damaged records found"},
    {"store_refused_for_space", false, "writes refused for want of space"},
    {"store_last_sync_us", true, "duration of the last synced write, microseconds"},
};

static void fill_values(uint64_t values[SPURION_METRICS_COUNT], spurion_pipeline *p)
{
    spurion_transport_stats t;
    spurion_store_stats s;
    int n = SPURION_STAT_COUNT;

    for (int i = 0; i < SPURION_STAT_COUNT; i++) {
        values[i] = atomic_load(&p->counts[i]);
    }
    spurion_transport_stats_get(&t, p->transport);
    values[n++] = (uint64_t)t.pipes[SPURION_CHANNEL_RPC];
    values[n++] = (uint64_t)t.pipes[SPURION_CHANNEL_ROLLOUTS];
    values[n++] = (uint64_t)t.pipes[SPURION_CHANNEL_ALERTS];
    values[n++] = t.refused;
    values[n++] = t.published;
    values[n++] = t.publish_failed;
    spurion_store_stats_get(&s, p->store);
    values[n++] = s.commits;
    values[n++] = s.free_bytes;
    values[n++] = s.corruptions;
    values[n++] = s.refused_for_space;
    values[n++] = (uint64_t)(s.last_sync_ns / 1000);
}

void spurion_metrics_counters(spurion_counter *out, spurion_pipeline *p)
{
    uint64_t values[SPURION_METRICS_COUNT];

    fill_values(values, p);
    for (int i = 0; i < SPURION_METRICS_COUNT; i++) {
        out[i].name = spurion_bytes_of(metrics[i].name);
        out[i].value = values[i];
    }
}

static void put_gauge(spurion_text *out, const char *name, const char *help, double value)
{
    spurion_text_print(out, "# HELP spurion_%s %s\n# TYPE spurion_%s gauge\nspurion_%s %.17g\n", name, help, name, name, value);
}

static void put_http(spurion_text *out, spurion_http *h)
{
    spurion_http_stats s;

    if (h == NULL) {
        return;
    }
    spurion_http_stats_get(&s, h);
    put_gauge(out, "http_connections", "connections now", (double)s.connections);
    spurion_text_print(out, "# HELP spurion_http_responses_total answers by class of status\n# TYPE spurion_http_responses_total counter\n");
    for (int i = 2; i < 6; i++) {
        spurion_text_print(out, "spurion_http_responses_total{class=\"%dxx\"} %llu\n", i, (unsigned long long)s.statuses[i]);
    }
}

void spurion_metrics_print(spurion_text *out, spurion_pipeline *p)
{
    uint64_t values[SPURION_METRICS_COUNT];

    fill_values(values, p);
    for (int i = 0; i < SPURION_METRICS_COUNT; i++) {
        const char *end = metrics[i].gauge ? "" : "_total", *name = metrics[i].name;
        spurion_text_print(out, "# HELP spurion_%s%s %s\n# TYPE spurion_%s%s %s\nspurion_%s%s %llu\n", name, end, metrics[i].help, name, end,
                           metrics[i].gauge ? "gauge" : "counter", name, end, (unsigned long long)values[i]);
    }
    put_gauge(out, "ready", "1 while new work is taken", spurion_pipeline_ready(p) ? 1 : 0);
    put_gauge(out, "rollouts_in_flight", "rollouts accepted and not yet answered", (double)spurion_flights_count(p->flights));
    put_gauge(out, "queue_bytes", "memory of rollouts in flight", (double)atomic_load(&p->bytes));
    put_gauge(out, "queue_bytes_max", "engine.queue_max", (double)p->config->engine.queue_max);
    put_gauge(out, "uptime_seconds", "since the start", (double)(spurion_clock_ms() - p->start_ms) * 1e-3);
    spurion_text_print(out, "# HELP spurion_build_info the version, as a label\n# TYPE spurion_build_info gauge\nspurion_build_info{version=\"%s\"} 1\n",
                       SPURION_VERSION);
    put_http(out, p->http);
}

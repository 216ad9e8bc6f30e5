/* What publishing costs a trainer: the time of spurion_client_publish for a batch of 8 rollouts of 1,000 tokens (as texts of 4 bytes a token
 * and as token ids), with a daemon that takes them (a SUB and a REP of this program would need nng: a reader on a plain socket that greets and
 * swallows stands for it), and with none listening. Usage: bench_publish [BATCHES]. Medians and 99th percentiles in microseconds. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "spurion/client.h"
#include "spurion/codec.h"

#define ROLLOUTS 8
#define TOKENS 1000

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void *swallow(void *context)
{
    static char sink[1 << 20];
    int fd = accept(*(int *)context, NULL, NULL);

    if (fd >= 0 && recv(fd, sink, 8, MSG_WAITALL) == 8 && send(fd, "\0SP\0\0\x21\0\0", 8, 0) == 8) {
        while (recv(fd, sink, sizeof sink, 0) > 0) {
        }
    }
    return NULL;
}

/* The rollouts of one batch: texts, or ids. */
static void make(spurion_rollout *r, int ids)
{
    static char prompt[TOKENS * 2], completion[TOKENS * 2];
    static int32_t prompt_ids[TOKENS / 2], completion_ids[TOKENS / 2];

    memset(prompt, 'p', sizeof prompt);
    memset(completion, 'c', sizeof completion);
    for (int i = 0; i < TOKENS / 2; i++) {
        prompt_ids[i] = completion_ids[i] = 1000 + 37 * i;
    }
    for (int i = 0; i < ROLLOUTS; i++) {
        memset(&r[i], 0, sizeof r[i]);
        r[i].group = spurion_bytes_of("group-17");
        r[i].id = spurion_bytes_of("group-17-3");
        r[i].group_size = ROLLOUTS;
        if (ids) {
            r[i].prompt_ids = prompt_ids;
            r[i].completion_ids = completion_ids;
            r[i].prompt_id_count = r[i].completion_id_count = TOKENS / 2;
        } else {
            r[i].prompt = (spurion_bytes){prompt, sizeof prompt};
            r[i].completion = (spurion_bytes){completion, sizeof completion};
        }
    }
}

static int measure(const char *what, const char *folder, int ids, int batches)
{
    char tap[128], rpc[128];
    spurion_client_options o = {.rpc = rpc, .rollouts = tap, .run = "bench", .policy = SPURION_RING_DROP_OLDEST};
    double *us = malloc((size_t)batches * sizeof *us);
    spurion_rollout rollouts[ROLLOUTS];
    spurion_client *c;

    (void)snprintf(tap, sizeof tap, "ipc://%s/tap", folder);
    (void)snprintf(rpc, sizeof rpc, "ipc://%s/rpc", folder);
    make(rollouts, ids);
    if (!us || spurion_client_open(&c, &o) != SPURION_OK) {
        return 1;
    }
    for (int i = -100; i < batches; i++) {
        double start = now_us();
        if (spurion_client_publish(c, rollouts, ROLLOUTS) != SPURION_OK) {
            (void)fprintf(stderr, "publish: %s\n", spurion_client_error(c));
            return 1;
        }
        if (i >= 0) {
            us[i] = now_us() - start;
        }
    }
    qsort(us, (size_t)batches, sizeof *us, by_value);
    (void)printf("%-28s median %7.1f us  99%% %7.1f us  largest %8.1f us\n", what, us[batches / 2], us[batches * 99 / 100], us[batches - 1]);
    spurion_client_close(c);
    free(us);
    return 0;
}

int main(int argc, char **argv)
{
    char folder[] = "/tmp/spurion-bench.XXXXXX";
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int batches = argc > 1 ? atoi(argv[1]) : 2000, listener = socket(AF_UNIX, SOCK_STREAM, 0), status = 0;
    static const char *const names[] = {"texts, taken", "ids, taken"};
    pthread_t thread;

    if (batches < 1 || !mkdtemp(folder)) {
        (void)fprintf(stderr, "usage: bench_publish [BATCHES]\n");
        return 64;
    }
    (void)printf("%d batches of %d rollouts of %d tokens\n", batches, ROLLOUTS, TOKENS);
    status |= measure("texts, nobody listens", folder, 0, batches);
    status |= measure("ids, nobody listens", folder, 1, batches);
    (void)snprintf(a.sun_path, sizeof a.sun_path, "%s/tap", folder);
    if (listener < 0 || bind(listener, (struct sockaddr *)&a, sizeof a) != 0 || listen(listener, 4) != 0) {
        perror("bench_publish");
        return 74;
    }
    for (int ids = 0; ids < 2; ids++) {
        if (pthread_create(&thread, NULL, swallow, &listener) != 0) {
            return 71;
        }
        status |= measure(names[ids], folder, ids, batches);
        (void)pthread_join(thread, NULL);
    }
    (void)unlink(a.sun_path);
    (void)rmdir(folder);
    return status;
}

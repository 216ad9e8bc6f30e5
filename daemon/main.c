/* spuriond: command line, commands and exit codes. The only place of the daemon that ends the process.
 * Thread: main. Memory: the configuration, for the life of the process. */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/base/clock.h"
#include "daemon/base/json.h"
#include "daemon/base/log.h"
#include "daemon/calibrate.h"
#include "daemon/config.h"
#include "daemon/engine.h"
#include "daemon/http.h"
#include "daemon/judge.h"
#include "daemon/pipeline.h"
#include "daemon/store.h"

/* sysexits.h, and 3 for an input of which some was refused; documented in --help and docs/operations.md */
enum exit_code {
    EXIT_ALL = 0,
    EXIT_SOME_REFUSED = 3,
    EXIT_BAD_USAGE = 64,
    EXIT_BAD_DATA = 65,
    EXIT_NO_DEPENDENCY = 69,
    EXIT_OUR_FAULT = 70,
    EXIT_NO_RESOURCE = 71,
    EXIT_IO = 74,
    EXIT_TRY_AGAIN = 75,
    EXIT_NO_PERMISSION = 77,
    EXIT_BAD_CONFIG = 78
};

#define OVERRIDES_MAX 64
#define CALIBRATION_BYTES_MAX ((size_t)4 << 20)

typedef enum command { COMMAND_NONE, COMMAND_RUN, COMMAND_JUDGE, COMMAND_CHECK, COMMAND_PRINT, COMMAND_CHECK_CONFIG, COMMAND_EXAMPLE, COMMAND_VERSION, COMMAND_HELP } command;

typedef struct arguments {
    command command;
    const char *config;
    const char *overrides[OVERRIDES_MAX];
    int override_count;
    bool tokens, profile, profile_each, log_level;
    const char *calibration; /* of check: a text file, or NULL: built in */
    bool no_calibration;
} arguments;

static const struct {
    const char *name;
    command command;
} commands[] = {{"run", COMMAND_RUN},
                {"judge", COMMAND_JUDGE},
                {"check", COMMAND_CHECK},
                {"print-config", COMMAND_PRINT},
                {"check-config", COMMAND_CHECK_CONFIG},
                {"example-config", COMMAND_EXAMPLE},
                {"version", COMMAND_VERSION},
                {"help", COMMAND_HELP}};

static const char usage[] =
    "usage: spuriond run --config FILE\n"
    "       spuriond judge --config FILE [--tokens] [--profile[=each]] < rollouts.jsonl > verdicts.jsonl\n"
    "       spuriond check --config FILE [--calibration TEXT | --no-calibration]\n"
    "       spuriond print-config | check-config --config FILE\n"
    "       spuriond example-config\n"
    "\n"
    "run             the daemon: listen, judge, store, alert, answer, until SIGTERM\n"
    "judge           one verdict for each rollout, in the order of the input\n"
    "check           load model, SAEs, catalogue and rules; say what was found, the peak of memory to expect, and the\n"
    "                number of active features (L0) and explained variance of each SAE on a text\n"
    "print-config    the configuration in force, with the origin of each value\n"
    "check-config    read the configuration and stop\n"
    "example-config  every key with its meaning and default\n"
    "\n"
    "  -c, --config FILE        configuration (YAML)\n"
    "  -s, --set SECTION.KEY=V  one value, after file and environment (SPURION_SECTION_KEY)\n"
    "      --tokens             judge: with the view of every completion token\n"
    "      --calibration FILE   check: the text for L0 and explained variance, instead of a built-in one\n"
    "      --no-calibration     check: without running the model\n"
    "      --profile[=each]     judge: after the end one JSON object on stderr with times and work done; each: after every micro-batch too\n"
    "      --print-config       as the command\n"
    "      --check-config       as the command\n"
    "      --log-level LEVEL    debug, info (default of run), warn (default otherwise) or error\n"
    "      --version, --help\n"
    "\n"
    "exit status: 0 all judged, or stopped as asked; 3 some refused; 64 usage; 65 data of model or SAEs corrupt; 69 a service missing; 70 internal error;\n"
    "             71 out of memory; 74 input or output failed; 75 try again; 77 permission; 78 configuration\n";

/* What a failure to load or to run means for who started us. */
static int exit_of(int code)
{
    switch (code) {
    case SPURION_OK: return EXIT_ALL;
    case SPURION_DATA_LOSS: return EXIT_BAD_DATA;
    case SPURION_INVALID_ARGUMENT:
    case SPURION_NOT_FOUND:
    case SPURION_UNIMPLEMENTED:
    case SPURION_OUT_OF_RANGE:
    case SPURION_FAILED_PRECONDITION: return EXIT_BAD_CONFIG;
    case SPURION_RESOURCE_EXHAUSTED: return EXIT_NO_RESOURCE;
    case SPURION_PERMISSION_DENIED: return EXIT_NO_PERMISSION;
    case SPURION_UNAVAILABLE: return EXIT_IO;
    case SPURION_ABORTED:
    case SPURION_DEADLINE_EXCEEDED: return EXIT_TRY_AGAIN;
    default: return EXIT_OUR_FAULT;
    }
}

static int report(spurion_status st)
{
    (void)fprintf(stderr, "spuriond: %s: %s\n", spurion_code_name(st.code), st.message);
    return exit_of(st.code);
}

static int bad_usage(const char *what, const char *found)
{
    (void)fprintf(stderr, "spuriond: expected %s, found '%s'; see spuriond --help\n", what, found);
    return EXIT_BAD_USAGE;
}

static int set_log_level(const char *name)
{
    static const char *const names[] = {"debug", "info", "warn", "error"};

    for (int i = 0; i < 4; i++) {
        if (!strcmp(name, names[i])) {
            spurion_log_level_set((spurion_log_level)i);
            return 0;
        }
    }
    return bad_usage("debug, info, warn or error", name);
}

static int read_command(arguments *a, int argc, char **argv)
{
    if (optind < argc) {
        for (size_t i = 0; i < sizeof commands / sizeof *commands && a->command == COMMAND_NONE; i++) {
            if (!strcmp(argv[optind], commands[i].name)) {
                a->command = commands[i].command;
                optind++;
            }
        }
    }
    if (optind < argc) {
        return bad_usage(a->command == COMMAND_NONE ? "a command" : "nothing after the command", argv[optind]);
    }
    if (a->command == COMMAND_NONE) {
        return bad_usage("a command", "none");
    }
    return 0;
}

/* Fills a; not 0: the exit status. */
static int read_arguments(arguments *a, int argc, char **argv)
{
    enum { TOKENS = 256, PROFILE, PRINT, CHECK, LEVEL, VERSION, CALIBRATION, NO_CALIBRATION };
    static const struct option options[] = {{"config", required_argument, NULL, 'c'},  {"set", required_argument, NULL, 's'},
                                            {"tokens", no_argument, NULL, TOKENS},     {"profile", optional_argument, NULL, PROFILE},
                                            {"print-config", no_argument, NULL, PRINT}, {"check-config", no_argument, NULL, CHECK},
                                            {"log-level", required_argument, NULL, LEVEL}, {"version", no_argument, NULL, VERSION},
                                            {"help", no_argument, NULL, 'h'},
                                            {"calibration", required_argument, NULL, CALIBRATION},
                                            {"no-calibration", no_argument, NULL, NO_CALIBRATION}, {NULL, 0, NULL, 0}};
    command instead = COMMAND_NONE;
    int status = 0;

    memset(a, 0, sizeof *a);
    for (int c; status == 0 && (c = getopt_long(argc, argv, "c:s:h", options, NULL)) != -1;) {
        switch (c) {
        case 'c': a->config = optarg; break;
        case 's':
            if (a->override_count == OVERRIDES_MAX) {
                status = bad_usage("at most 64 times --set", optarg);
            } else {
                a->overrides[a->override_count++] = optarg;
            }
            break;
        case TOKENS: a->tokens = true; break;
        case PROFILE:
            a->profile = true;
            a->profile_each = optarg && strcmp(optarg, "each") == 0;
            if (optarg && !a->profile_each) {
                status = bad_usage("--profile or --profile=each", optarg);
            }
            break;
        case CALIBRATION: a->calibration = optarg; break;
        case NO_CALIBRATION: a->no_calibration = true; break;
        case PRINT: instead = COMMAND_PRINT; break;
        case CHECK: instead = COMMAND_CHECK_CONFIG; break;
        case LEVEL:
            status = set_log_level(optarg);
            a->log_level = true;
            break;
        case VERSION: instead = COMMAND_VERSION; break;
        case 'h': instead = COMMAND_HELP; break;
        default: status = EXIT_BAD_USAGE; break; /* getopt has told */
        }
    }
    if (status == 0 && (instead == COMMAND_NONE || optind < argc)) {
        status = read_command(a, argc, argv);
    }
    if (instead != COMMAND_NONE) {
        a->command = instead;
    }
    return status;
}

static int run_judge(const arguments *a, const spurion_config *config)
{
    spurion_engine *engine = NULL;
    spurion_judge_totals totals;
    int64_t start = spurion_clock_ns();
    double load_seconds;
    int status;
    spurion_status st = spurion_engine_create(&engine, config);

    if (st.code != SPURION_OK) {
        return report(st);
    }
    load_seconds = (double)(spurion_clock_ns() - start) * 1e-9;
    if (a->profile) {
        spurion_engine_profile_start(engine);
    }
    st = spurion_judge_run(&totals, engine, STDIN_FILENO, stdout, a->tokens, a->profile_each ? stderr : NULL);
    if (st.code != SPURION_OK) {
        status = report(st);
    } else {
        status = totals.refused ? EXIT_SOME_REFUSED : EXIT_ALL;
    }
    if (a->profile) {
        spurion_judge_profile(stderr, &totals, engine, load_seconds);
    }
    spurion_engine_destroy(engine);
    return status;
}

/* What `run` holds beside the engine, at most: rollouts in flight, the store's write buffers, and the part of its block cache, threads
 * and connections that an hour under load was seen to take (tests/e2e/test_memory.py, test_soak.py). */
static void describe_running(const spurion_engine *engine, const spurion_config *config)
{
    size_t queue = (size_t)config->engine.queue_max, store = SPURION_STORE_BUFFER_BYTES, rest = (size_t)16 << 20;

    printf("running    peak resident size %zu MiB: with %zu queue of rollouts, %zu store, %zu threads and caches",
           (spurion_engine_peak_bytes(engine) + queue + store + rest) >> 20, queue >> 20, store >> 20, rest >> 20);
    if (config->listen.http) {
        int most = config->http.connections_max;
        printf("; %zu more with %d HTTP connections at work", ((size_t)most * SPURION_HTTP_CONNECTION_BYTES) >> 20, most);
    }
    printf("\n");
}

/* One line for each SAE, and what does not fit on stderr too: a check that is read by a program should not hide it. */
static spurion_status calibrate(spurion_engine *engine, const spurion_config *config, const char *path)
{
    spurion_status st;
    spurion_calibration found[SPURION_SAES_MAX];
    char *text = NULL, warning[200];
    size_t bytes = 0;

    if (path) {
        SPURION_TRY(st, spurion_file_read(&text, &bytes, path, CALIBRATION_BYTES_MAX));
    }
    SPURION_TRY(st, spurion_calibrate(found, engine, text, bytes));
    for (int i = 0; i < config->sae_count; i++) {
        const spurion_calibration *c = &found[i];
        const char *id = config->saes[i].id;

        (void)printf("on a text  %s: L0 %.1f, explained variance ", id, c->l0);
        (void)(c->has_explained ? printf("%.3f", c->explained) : printf("unknown"));
        (void)printf(" (%lld tokens of %s)\n", (long long)c->tokens, path ? path : "the built-in text");
        if (spurion_calibration_warning(warning, sizeof warning, c)) {
            (void)printf("warning    %s: %s\n", id, warning);
            (void)fprintf(stderr, "spuriond: warning: SAE %s: %s\n", id, warning);
        }
    }
out:
    free(text);
    return st;
}

static int run_check(const arguments *a, const spurion_config *config)
{
    spurion_engine *engine = NULL;
    char doubt[400];
    int status = EXIT_ALL;
    spurion_status st = spurion_engine_create(&engine, config);

    if (st.code != SPURION_OK) {
        return report(st);
    }
    spurion_engine_describe(engine, stdout);
    if (spurion_engine_doubt(doubt, sizeof doubt, engine)) {
        (void)printf("warning    %s\n", doubt);
        (void)fprintf(stderr, "spuriond: warning: %s\n", doubt);
    }
    describe_running(engine, config);
    if (!a->no_calibration) {
        st = calibrate(engine, config, a->calibration);
        status = st.code == SPURION_OK ? EXIT_ALL : report(st);
    }
    spurion_engine_destroy(engine);
    return status;
}

/* Does not return: nng's threads are still there, so the process leaves by _exit once its streams are flushed. */
static _Noreturn void run_daemon(const arguments *a, const spurion_config *config)
{
    int status;

    if (!a->log_level) {
        spurion_log_level_set(SPURION_LOG_INFO);
    }
    spurion_source source = {a->config, a->overrides, a->override_count};
    status = spurion_pipeline_run(config, &source);
    (void)fflush(stdout);
    (void)fflush(stderr);
    _exit(status);
}

static int with_config(const arguments *a)
{
    spurion_config config;
    spurion_status st;
    int status = EXIT_ALL;

    if (!a->config) {
        return bad_usage("--config FILE", "none");
    }
    st = spurion_config_load(&config, a->config, a->overrides, a->override_count);
    if (st.code != SPURION_OK) {
        (void)report(st);
        return EXIT_BAD_CONFIG;
    }
    switch (a->command) {
    case COMMAND_RUN: run_daemon(a, &config); break;
    case COMMAND_JUDGE: status = run_judge(a, &config); break;
    case COMMAND_CHECK: status = run_check(a, &config); break;
    case COMMAND_PRINT: spurion_config_print(&config, stdout); break;
    default: (void)puts("configuration: ok"); break;
    }
    spurion_config_fini(&config);
    return status;
}

/* Debian's oneDNN brings OpenMP, whose threads spin unless they are told not to before the program starts: then start again, told. */
static void wait_passively(char **argv)
{
    if (!getenv("OMP_WAIT_POLICY") && setenv("OMP_WAIT_POLICY", "passive", 1) == 0) {
        (void)execv("/proc/self/exe", argv); /* on failure go on as we are: slower beside others, not wrong */
    }
}

int main(int argc, char **argv)
{
    arguments a;
    int status;

    wait_passively(argv);
    (void)signal(SIGPIPE, SIG_IGN); /* a closed pipe is a failed write, told as such */
    spurion_log_level_set(SPURION_LOG_WARN);
    status = read_arguments(&a, argc, argv);
    if (status != 0) {
        return status;
    }
    switch (a.command) {
    case COMMAND_HELP: (void)fputs(usage, stdout); break;
    case COMMAND_VERSION: (void)puts("spuriond " SPURION_VERSION); break;
    case COMMAND_EXAMPLE: spurion_config_example(stdout); break;
    default: status = with_config(&a); break;
    }
    if (fflush(stdout) != 0 && status == EXIT_ALL) {
        (void)fprintf(stderr, "spuriond: expected to write to stdout, found: %s\n", strerror(errno));
        status = EXIT_IO;
    }
    return status;
}

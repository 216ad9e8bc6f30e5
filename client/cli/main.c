/* spurion: asks the daemon, publishes to it and shows what it found. The only place of the client that ends the process.
 * Thread: one. Memory: a handle of libspurion, and what a verb holds. */
#include <errno.h>
#include <locale.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "options.h"

void cli_say(const char *format, ...)
{
    va_list args;

    (void)fputs("spurion: ", stderr);
    va_start(args, format);
    (void)vfprintf(stderr, format, args);
    va_end(args);
    (void)fputc('\n', stderr);
}

int cli_exit_of(spurion_code code, uint32_t retry_after_ms)
{
    switch (code) {
    case SPURION_OK: return CLI_OK;
    case SPURION_NOT_FOUND: return CLI_NOTHING;
    case SPURION_INVALID_ARGUMENT:
    case SPURION_OUT_OF_RANGE:
    case SPURION_ALREADY_EXISTS: return CLI_USAGE;
    case SPURION_UNAVAILABLE: return retry_after_ms ? CLI_AGAIN : CLI_UNREACHABLE;
    case SPURION_DEADLINE_EXCEEDED:
    case SPURION_RESOURCE_EXHAUSTED:
    case SPURION_ABORTED:
    case SPURION_CANCELLED: return CLI_AGAIN;
    case SPURION_DATA_LOSS: return CLI_DATA;
    case SPURION_FAILED_PRECONDITION:
    case SPURION_UNIMPLEMENTED: return CLI_PROTOCOL;
    case SPURION_PERMISSION_DENIED:
    case SPURION_UNAUTHENTICATED: return CLI_PERMISSION;
    default: return CLI_BUG;
    }
}

int cli_fail(const cli *c, spurion_code code)
{
    cli_say("%s: %s: %s", c->verb->name, spurion_code_name(code), spurion_client_error(c->client));
    return cli_exit_of(code, spurion_client_retry_after_ms(c->client));
}

int cli_done(int status)
{
    if (fflush(stdout) != 0 || ferror(stdout)) {
        cli_say("expected to write to stdout, found: %s", strerror(errno));
        return CLI_IO;
    }
    return status;
}

static const char *address(const cli *c, cli_option option, const char *variable, const char *otherwise)
{
    const char *set = getenv(variable);
    return c->value[option] ? c->value[option] : set && *set ? set : otherwise;
}

int cli_connect(cli *c, spurion_client_options *options, bool want_tap, bool want_alerts)
{
    spurion_hello_reply hello;
    spurion_code code;
    int64_t timeout = 30, wait = 1;
    int status;

    if ((status = cli_whole(&timeout, c, OPT_TIMEOUT, 1, 86400)) || (status = cli_whole(&wait, c, OPT_WAIT, 0, 86400))) {
        return status;
    }
    c->timeout_ms = (int)timeout * 1000;
    options->timeout_ms = c->timeout_ms;
    options->rpc = address(c, OPT_RPC, "SPURION_RPC", CLI_DEFAULT_RPC);
    options->rollouts = want_tap ? address(c, OPT_ROLLOUTS, "SPURION_ROLLOUTS", CLI_DEFAULT_ROLLOUTS) : NULL;
    options->alerts = want_alerts ? address(c, OPT_ALERTS, "SPURION_ALERTS", CLI_DEFAULT_ALERTS) : NULL;
    code = spurion_client_open(&c->client, options);
    if (code != SPURION_OK) {
        return cli_fail(c, code);
    }
    code = spurion_client_hello(c->client, &hello, wait ? (int)wait * 1000 : 200);
    if (code == SPURION_UNAVAILABLE || code == SPURION_DEADLINE_EXCEEDED) {
        cli_say("%s: expected a daemon at %s (--rpc, SPURION_RPC), found none: %s", c->verb->name, options->rpc, spurion_client_error(c->client));
        return CLI_UNREACHABLE;
    }
    return code == SPURION_OK ? CLI_OK : cli_fail(c, code);
}

static bool use_color(const cli *c)
{
    const char *no = getenv("NO_COLOR"), *term = getenv("TERM");

    if (c->value[OPT_NO_COLOR]) {
        return false;
    }
    if (c->value[OPT_COLOR]) {
        return true;
    }
    return !(no && *no) && isatty(STDOUT_FILENO) && term && strcmp(term, "dumb") != 0;
}

int main(int argc, char **argv)
{
    cli c;
    int status;

    (void)setlocale(LC_CTYPE, "C.UTF-8"); /* widths of characters; texts are UTF-8 whatever the user's locale */
    status = cli_parse(&c, argc, argv);
    if (status != CLI_OK) {
        return status;
    }
    if (c.value[OPT_HELP]) {
        cli_help(c.verb, stdout);
    } else if (c.value[OPT_VERSION]) {
        (void)printf("spurion %s\n", spurion_client_version());
    } else {
        c.color = use_color(&c);
        status = c.verb->run(&c);
    }
    spurion_client_close(c.client);
    return cli_done(status);
}

/* spurion report: hands over to the Python package's spurion-report, which draws the HTML. See cli.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "options.h"

int cli_report(cli *c)
{
    const char *words[8] = {"spurion-report", c->args[0]}, *rpc = getenv("SPURION_RPC");
    int n = 2;

    if (c->value[OPT_OUT]) {
        words[n++] = "--out";
        words[n++] = c->value[OPT_OUT];
    }
    words[n++] = "--rpc";
    words[n++] = c->value[OPT_RPC] ? c->value[OPT_RPC] : rpc && *rpc ? rpc : CLI_DEFAULT_RPC;
    words[n] = NULL;
    (void)execvp(words[0], (char *const *)words); /* exec changes nothing of the words, its type is older than const */
    cli_say("report: expected the program spurion-report in PATH (pip install the package in client/python), found: %s", strerror(errno));
    return errno == ENOENT ? CLI_UNREACHABLE : CLI_IO;
}

/* The table of options, for options.c and complete.c. */
#ifndef SPURION_CLI_OPTIONS_H
#define SPURION_CLI_OPTIONS_H

#include "cli.h"

#define CLI_DEFAULT_RPC "ipc://var/spurion.sock"
#define CLI_DEFAULT_ROLLOUTS "tcp://127.0.0.1:7801"
#define CLI_DEFAULT_ALERTS "tcp://127.0.0.1:7802"

typedef struct cli_option_row {
    const char *name;
    char letter;          /* or 0 */
    const char *argument; /* NULL: a flag */
    const char *meaning;
} cli_option_row;

extern const cli_option_row cli_options[OPT_COUNT_OF];
bool cli_has_option(const cli_verb *verb, cli_option option);

#endif

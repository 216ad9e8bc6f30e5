/* Verbs and options in one table; parsing and help come from it. See cli.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "options.h"
#include "spurion/nearest.h"

const cli_option_row cli_options[OPT_COUNT_OF] = {
    [OPT_RPC] = {"rpc", 0, "URL", "calls; default $SPURION_RPC, else " CLI_DEFAULT_RPC},
    [OPT_ROLLOUTS] = {"rollouts", 0, "URL", "the tap; default $SPURION_ROLLOUTS, else " CLI_DEFAULT_ROLLOUTS},
    [OPT_ALERTS] = {"alerts", 0, "URL", "live alerts; default $SPURION_ALERTS, else " CLI_DEFAULT_ALERTS},
    [OPT_TIMEOUT] = {"timeout", 't', "SECONDS", "give up on a call after this long (30)"},
    [OPT_WAIT] = {"wait", 'w', "SECONDS", "wait this long for the daemon to come up (1)"},
    [OPT_JSON] = {"json", 0, NULL, "one JSON object"},
    [OPT_JSONL] = {"jsonl", 0, NULL, "one JSON object a line"},
    [OPT_TABLE] = {"table", 0, NULL, "a table instead of JSON Lines"},
    [OPT_COLOR] = {"color", 0, NULL, "colour although stdout is no terminal (for less -R)"},
    [OPT_NO_COLOR] = {"no-color", 0, NULL, "plain marks instead of colour; so does NO_COLOR in the environment"},
    [OPT_WIDE] = {"wide", 0, NULL, "do not shorten names in tables"},
    [OPT_HELP] = {"help", 'h', NULL, "this text"},
    [OPT_VERSION] = {"version", 0, NULL, "the version"},
    [OPT_RUN] = {"run", 'r', "RUN", "the run; overrides that of the lines"},
    [OPT_PRODUCER] = {"producer", 'p', "NAME", "name of this publisher in the run (host name and process id)"},
    [OPT_STEP_END] = {"step-end", 0, NULL, "say when a step ends: when the next begins, and at the end (default)"},
    [OPT_NO_STEP_END] = {"no-step-end", 0, NULL, "do not: another process says it"},
    [OPT_RATE] = {"rate", 0, "N", "publish at most N rollouts a second"},
    [OPT_RING] = {"ring", 0, "BYTES", "memory for batches that are not yet confirmed (64 MiB)"},
    [OPT_POLICY] = {"policy", 0, "POLICY", "when the ring is full: block (default), drop-new, drop-oldest"},
    [OPT_TOKENS] = {"tokens", 0, NULL, "with the view of every completion token"},
    [OPT_FROM] = {"from", 0, "SEQ", "begin with the stored alert of this number (1: all)"},
    [OPT_COUNT] = {"count", 'n', "N", "stop after N alerts"},
    [OPT_FOR] = {"for", 0, "SECONDS", "stop when this time is up"},
    [OPT_RULE] = {"rule", 0, "RULE", "of this rule"},
    [OPT_FEATURE] = {"feature", 0, "SAE/INDEX", "in which this catalogued feature is active"},
    [OPT_FLAGGED] = {"flagged", 0, NULL, "flagged ones only"},
    [OPT_STEP] = {"step", 0, "A[..B]", "of these steps; either end may be left out"},
    [OPT_GROUP] = {"group", 0, "GROUP", "of this group"},
    [OPT_ORDER] = {"order", 0, "ORDER", "step (default), time, effect (most negative first)"},
    [OPT_DESC] = {"desc", 0, NULL, "the other way round"},
    [OPT_LIMIT] = {"limit", 'l', "N", "at most N (50 in a table, else all)"},
    [OPT_SAE] = {"sae", 0, "SAE", "shade by this SAE's attribution (the one with the largest token)"},
    [OPT_ATTEMPT] = {"attempt", 0, "N", "attempt of the rollout (0)"},
    [OPT_THEME] = {"theme", 0, "THEME", "background of the terminal: dark or light ($COLORFGBG, else dark)"},
    [OPT_OUT] = {"out", 'o', "FILE", "the file to write (report.html), or to add to (labels.jsonl)"},
    [OPT_FULL] = {"full", 0, NULL, "with the view of every completion token"},
    [OPT_CHECKSUM] = {"checksum", 0, "HEX", "the SAE that the labels are of: 64 digits, printed by spuriond check"},
    [OPT_SOURCE] = {"source", 0, "SOURCE", "only labels of this source: modelId/layer of Neuronpedia, a module of delphi"},
};

static const cli_option common[] = {OPT_RPC, OPT_TIMEOUT, OPT_WAIT, OPT_NO_COLOR, OPT_COLOR, OPT_HELP, OPT_VERSION, OPT_COUNT_OF};
static const cli_option of_status[] = {OPT_JSON, OPT_WIDE, OPT_COUNT_OF};
static const cli_option of_score[] = {OPT_TABLE, OPT_JSONL, OPT_TOKENS, OPT_RUN, OPT_WIDE, OPT_COUNT_OF};
static const cli_option of_publish[] = {OPT_RUN, OPT_PRODUCER, OPT_STEP_END, OPT_NO_STEP_END, OPT_RATE, OPT_RING, OPT_POLICY, OPT_ROLLOUTS,
                                        OPT_JSON, OPT_COUNT_OF};
static const cli_option of_watch[] = {OPT_FROM, OPT_COUNT, OPT_FOR, OPT_RUN, OPT_RULE, OPT_JSONL, OPT_ALERTS, OPT_COUNT_OF};
static const cli_option of_query[] = {OPT_RULE, OPT_FEATURE, OPT_FLAGGED, OPT_STEP, OPT_GROUP, OPT_ORDER, OPT_DESC, OPT_LIMIT, OPT_JSONL,
                                      OPT_WIDE, OPT_COUNT_OF};
static const cli_option of_show[] = {OPT_SAE, OPT_RULE, OPT_ATTEMPT, OPT_JSON, OPT_THEME, OPT_COUNT_OF};
static const cli_option of_export[] = {OPT_FULL, OPT_FLAGGED, OPT_RULE, OPT_FEATURE, OPT_STEP, OPT_GROUP, OPT_ORDER, OPT_DESC, OPT_LIMIT,
                                       OPT_JSONL, OPT_COUNT_OF};
static const cli_option of_runs[] = {OPT_JSONL, OPT_WIDE, OPT_LIMIT, OPT_COUNT_OF};
static const cli_option of_report[] = {OPT_OUT, OPT_COUNT_OF};
static const cli_option of_labels[] = {OPT_CHECKSUM, OPT_SOURCE, OPT_OUT, OPT_COUNT_OF};
static const cli_option of_none[] = {OPT_COUNT_OF};

const cli_verb cli_verbs[] = {
    {"status", "", "what the daemon is doing, what is in flight and how old it is",
     "  spurion status\n  spurion status --json | jq .queue_bytes\n", 0, 0, of_status, cli_status},
    {"score", "[FILE]", "judge rollouts (JSON Lines) now; one verdict a line, in the same form as spuriond judge",
     "  spurion score rollouts.jsonl > verdicts.jsonl\n  spurion score --table < rollouts.jsonl\n", 0, 1, of_score, cli_score},
    {"publish", "[FILE]", "publish rollouts (JSON Lines) as a trainer does; waits until they are stored",
     "  spurion publish rollouts.jsonl --run demo\n  spurion publish rollouts.jsonl --run demo-2 --rate 20\n", 0, 1, of_publish, cli_publish},
    {"watch", "", "alerts as they come",
     "  spurion watch\n  spurion watch --from 1 --for 10 --jsonl\n", 0, 0, of_watch, cli_watch},
    {"query", "RUN", "stored verdicts of a run",
     "  spurion query demo --flagged --order effect --limit 10\n  spurion query demo --rule url-lowers --step 100..200 --jsonl\n"
     "  spurion query demo --feature late/517 --order effect --desc\n", 1, 1, of_query, cli_query},
    {"show", "RUN STEP GROUP ID", "one rollout: its tokens shaded by attribution, effects, features, flags",
     "  spurion show demo 3 tea tea-1\n  spurion show demo/3/tea/tea-1 --color | less -R\n  spurion show demo/3/tea/tea-1 --rule url-lowers\n",
     1, 4, of_show, cli_show},
    {"export", "RUN", "the records of a run as JSON Lines, texts and evidence included",
     "  spurion export demo --flagged > flagged.jsonl\n  spurion export demo --full > all.jsonl\n", 1, 1, of_export, cli_export},
    {"runs", "", "the runs that are stored", "  spurion runs\n", 0, 0, of_runs, cli_runs},
    {"report", "RUN", "the run as one HTML file: timeline, rules, worst rollouts (by the Python package's spurion-report)",
     "  spurion report demo -o report.html\n", 1, 1, of_report, cli_report},
    {"labels", "import PATH..", "brings labels of features (Neuronpedia, delphi, JSON Lines) into the file that the daemon reads",
     "  spurion labels import explanations/ --checksum $SHA256 --source gpt2-small/6-res-jb\n"
     "  spurion labels import batch-0.jsonl.gz mine.jsonl --checksum $SHA256 --out labels.jsonl\n", 2, 4, of_labels, cli_labels},
    {"completion", "SHELL", "the script that completes this command in bash, zsh or fish",
     "  source <(spurion completion bash)\n  spurion completion fish > ~/.config/fish/completions/spurion.fish\n", 1, 1, of_none, cli_completion},
};
const int cli_verb_count = sizeof cli_verbs / sizeof *cli_verbs;

static void help_option(cli_option o, FILE *out)
{
    const cli_option_row *r = &cli_options[o];
    char names[64];

    char letter[] = {'-', r->letter, ',', ' ', '\0'};

    (void)snprintf(names, sizeof names, "%s--%s%s%s", r->letter ? letter : "    ", r->name, r->argument ? " " : "", r->argument ? r->argument : "");
    (void)fprintf(out, "  %-26s %s\n", names, r->meaning);
}

static const char exits[] =
    "exit status: 0 done; 1 nothing was found; 3 some rollouts were refused or dropped; 64 usage; 65 the daemon's data are damaged;\n"
    "             69 the daemon cannot be reached; 70 internal error; 74 input or output failed; 75 busy or not done in time, try again;\n"
    "             76 another protocol version; 77 permission\n";

void cli_help(const cli_verb *verb, FILE *out)
{
    if (!verb) {
        (void)fputs("examples:\n", out);
        for (int i = 0; i < cli_verb_count - 1; i++) {
            const char *line = cli_verbs[i].examples;
            (void)fprintf(out, "%.*s\n", (int)(strchr(line, '\n') - line), line);
        }
        (void)fputs("\nusage: spurion VERB [OPTIONS] [ARGUMENTS]; spurion VERB --help tells more\n\n", out);
        for (int i = 0; i < cli_verb_count; i++) {
            (void)fprintf(out, "  %-11s %s\n", cli_verbs[i].name, cli_verbs[i].purpose);
        }
        (void)fputs("\noptions of every verb:\n", out);
    } else {
        (void)fprintf(out, "examples:\n%s\nusage: spurion %s %s%s[OPTIONS]\n%s\n\n", verb->examples, verb->name, verb->operands,
                      verb->operands[0] ? " " : "", verb->purpose);
        for (const cli_option *o = verb->options; *o != OPT_COUNT_OF; o++) {
            help_option(*o, out);
        }
    }
    for (const cli_option *o = common; *o != OPT_COUNT_OF; o++) {
        help_option(*o, out);
    }
    (void)fprintf(out, "\n%s", exits);
}

bool cli_has_option(const cli_verb *verb, cli_option option)
{
    for (const cli_option *o = common; *o != OPT_COUNT_OF; o++) {
        if (*o == option) {
            return true;
        }
    }
    for (const cli_option *o = verb ? verb->options : of_none; *o != OPT_COUNT_OF; o++) {
        if (*o == option) {
            return true;
        }
    }
    return false;
}

static int unknown_option(const cli_verb *verb, const char *given, size_t size)
{
    const char *names[OPT_COUNT_OF];
    char name[64], hint[96];
    int count = 0;

    for (int o = 0; o < OPT_COUNT_OF; o++) {
        if (cli_has_option(verb, (cli_option)o)) {
            names[count++] = cli_options[o].name;
        }
    }
    (void)snprintf(name, sizeof name, "%.*s", (int)size, given);
    cli_say("expected an option of spurion %s, found '%s%s'%s; see spurion %s --help", verb ? verb->name : "VERB", name[1] ? "--" : "-", name,
            spurion_nearest_hint(hint, sizeof hint, name, names, count), verb ? verb->name : "");
    return CLI_USAGE;
}

/* Takes the option at argv[*at]; its value may be the next word. */
static int take_option(cli *c, int *at, int argc, char **argv)
{
    const char *word = argv[*at], *name = word[1] == '-' ? word + 2 : word + 1, *equals = strchr(name, '=');
    bool is_long = word[1] == '-';
    size_t size = is_long && equals ? (size_t)(equals - name) : strlen(name);
    int o = 0;

    while (o < OPT_COUNT_OF &&
           !(cli_has_option(c->verb, (cli_option)o) &&
             (is_long ? strlen(cli_options[o].name) == size && !strncmp(cli_options[o].name, name, size)
                      : cli_options[o].letter && cli_options[o].letter == name[0] && (!name[1] || cli_options[o].argument)))) {
        o++;
    }
    if (o == OPT_COUNT_OF) {
        return unknown_option(c->verb, name, size);
    }
    c->value[o] = "";
    if (!cli_options[o].argument) {
        if (is_long && equals) {
            cli_say("--%s: expected no value, found '%s'", cli_options[o].name, equals + 1);
            return CLI_USAGE;
        }
    } else if (is_long && equals) {
        c->value[o] = equals + 1;
    } else if (!is_long && name[1]) {
        c->value[o] = name + 1;
    } else if (*at + 1 < argc) {
        c->value[o] = argv[++*at];
    } else {
        cli_say("--%s: expected %s after it, found none", cli_options[o].name, cli_options[o].argument);
        return CLI_USAGE;
    }
    return CLI_OK;
}

static int find_verb(cli *c, const char *name)
{
    const char *names[16];
    char hint[96];

    for (int i = 0; i < cli_verb_count; i++) {
        names[i] = cli_verbs[i].name;
        if (!strcmp(name, names[i])) {
            c->verb = &cli_verbs[i];
            return CLI_OK;
        }
    }
    cli_say("expected a verb, found '%s'%s; see spurion --help", name, spurion_nearest_hint(hint, sizeof hint, name, names, cli_verb_count));
    return CLI_USAGE;
}

/* Whether the word after this one is its value, for finding the verb behind options. */
static bool next_is_value(const char *word)
{
    for (int o = 0; o < OPT_COUNT_OF; o++) {
        const cli_option_row *r = &cli_options[o];
        if (r->argument && (word[1] == '-' ? !strcmp(word + 2, r->name) : r->letter && word[1] == r->letter && !word[2])) {
            return true;
        }
    }
    return false;
}

int cli_parse(cli *c, int argc, char **argv)
{
    int status = CLI_OK;
    bool words_only = false, verb_seen = false;

    memset(c, 0, sizeof *c);
    for (int i = 1; i < argc && !c->verb && status == CLI_OK; i++) { /* the verb first: it says which options there are */
        if (argv[i][0] != '-') {
            status = find_verb(c, argv[i]);
        } else if (next_is_value(argv[i])) {
            i++;
        }
    }
    for (int i = 1; i < argc && status == CLI_OK; i++) {
        if (!words_only && !strcmp(argv[i], "--")) {
            words_only = true;
        } else if (!words_only && argv[i][0] == '-' && argv[i][1]) {
            status = take_option(c, &i, argc, argv);
        } else if (!verb_seen) {
            verb_seen = true;
        } else if (c->arg_count == c->verb->args_max) {
            cli_say("%s: expected %s, found '%s' too many", c->verb->name, c->verb->args_max ? c->verb->operands : "no arguments", argv[i]);
            status = CLI_USAGE;
        } else {
            c->args[c->arg_count++] = argv[i];
        }
    }
    if (status == CLI_OK && !c->value[OPT_HELP] && !c->value[OPT_VERSION] && (!c->verb || c->arg_count < c->verb->args_min)) {
        cli_say(c->verb ? "%s: expected %s, found too little; see spurion %s --help" : "expected a verb; see spurion --help",
                c->verb ? c->verb->name : "", c->verb ? c->verb->operands : "", c->verb ? c->verb->name : "");
        status = CLI_USAGE;
    }
    return status;
}

int cli_bad_value(const cli *c, cli_option option, const char *expected)
{
    cli_say("--%s: expected %s, found '%s'", cli_options[option].name, expected, c->value[option]);
    return CLI_USAGE;
}

int cli_whole(int64_t *out, const cli *c, cli_option option, int64_t low, int64_t high)
{
    char *end, expected[80];

    if (!c->value[option]) {
        return CLI_OK;
    }
    errno = 0;
    *out = strtoll(c->value[option], &end, 10);
    if (errno || end == c->value[option] || *end || *out < low || *out > high) {
        (void)snprintf(expected, sizeof expected, "a whole number from %lld to %lld", (long long)low, (long long)high);
        return cli_bad_value(c, option, expected);
    }
    return CLI_OK;
}

/* Completion scripts, written from the table of options. */
#include <string.h>

#include "options.h"

static void words_of(FILE *out, const cli_verb *verb)
{
    for (int o = 0; o < OPT_COUNT_OF; o++) {
        if (cli_has_option(verb, (cli_option)o)) {
            (void)fprintf(out, " --%s", cli_options[o].name);
        }
    }
}

static void bash(FILE *out)
{
    (void)fputs("# bash completion for spurion\n_spurion() {\n    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} verb= i\n"
                "    for ((i = 1; i < COMP_CWORD; i++)); do\n        case ${COMP_WORDS[i]} in\n",
                out);
    (void)fputs("            ", out);
    for (int i = 0; i < cli_verb_count; i++) {
        (void)fprintf(out, "%s%s", i ? "|" : "", cli_verbs[i].name);
    }
    (void)fputs(") verb=${COMP_WORDS[i]}; break ;;\n        esac\n    done\n    local words files=\n    case $prev in\n"
                "        --policy) COMPREPLY=($(compgen -W 'block drop-new drop-oldest' -- \"$cur\")); return ;;\n"
                "        --order) COMPREPLY=($(compgen -W 'step time effect' -- \"$cur\")); return ;;\n"
                "        --theme) COMPREPLY=($(compgen -W 'dark light' -- \"$cur\")); return ;;\n"
                "        completion) COMPREPLY=($(compgen -W 'bash zsh fish' -- \"$cur\")); return ;;\n    esac\n    case $verb in\n",
                out);
    for (int i = 0; i < cli_verb_count; i++) {
        (void)fprintf(out, "        %s) words='", cli_verbs[i].name);
        words_of(out, &cli_verbs[i]);
        (void)fprintf(out, "'%s ;;\n", strstr(cli_verbs[i].operands, "FILE") ? "; files=1" : "");
    }
    (void)fputs("        *) words='", out);
    for (int i = 0; i < cli_verb_count; i++) {
        (void)fprintf(out, " %s", cli_verbs[i].name);
    }
    words_of(out, NULL);
    (void)fputs("' ;;\n    esac\n    COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n"
                "    if [[ $files && $cur != -* ]]; then COMPREPLY+=($(compgen -f -- \"$cur\")); fi\n}\ncomplete -F _spurion spurion\n",
                out);
}

/* A text between single quotes of zsh or fish, where also [ ] : have a meaning. */
static void quoted(FILE *out, const char *text)
{
    for (; *text; text++) {
        if (*text == '\'') {
            (void)fputs("'\\''", out);
        } else if (*text == '[' || *text == ']' || *text == ':') {
            (void)fprintf(out, "\\%c", *text);
        } else {
            (void)fputc(*text, out);
        }
    }
}

static void zsh(FILE *out)
{
    (void)fputs("#compdef spurion\n_spurion() {\n    local -a verbs\n    verbs=(\n", out);
    for (int i = 0; i < cli_verb_count; i++) {
        (void)fprintf(out, "        '%s:", cli_verbs[i].name);
        quoted(out, cli_verbs[i].purpose);
        (void)fputs("'\n", out);
    }
    (void)fputs("    )\n    if (( CURRENT == 2 )); then _describe verb verbs; return; fi\n    case $words[2] in\n", out);
    for (int i = 0; i < cli_verb_count; i++) {
        (void)fprintf(out, "        %s) _arguments", cli_verbs[i].name);
        for (int o = 0; o < OPT_COUNT_OF; o++) {
            if (cli_has_option(&cli_verbs[i], (cli_option)o)) {
                (void)fprintf(out, " '--%s%s[", cli_options[o].name, cli_options[o].argument ? "=" : "");
                quoted(out, cli_options[o].meaning);
                (void)fprintf(out, "]%s%s%s'", cli_options[o].argument ? ":" : "", cli_options[o].argument ? cli_options[o].argument : "",
                              cli_options[o].argument ? ":" : "");
            }
        }
        (void)fputs(strstr(cli_verbs[i].operands, "FILE") ? " '*:file:_files' ;;\n"
                    : !strcmp(cli_verbs[i].operands, "SHELL") ? " '2:shell:(bash zsh fish)' ;;\n" : " ;;\n", out);
    }
    (void)fputs("    esac\n}\nif [[ $zsh_eval_context[-1] == loadautofunc ]]; then _spurion \"$@\"; else compdef _spurion spurion; fi\n", out);
}

static void fish_text(FILE *out, const char *text)
{
    for (; *text; text++) {
        if (*text == '\'' || *text == '\\') {
            (void)fputc('\\', out);
        }
        (void)fputc(*text, out);
    }
}

static void fish(FILE *out)
{
    (void)fputs("# fish completion for spurion\ncomplete -c spurion -f\n", out);
    for (int i = 0; i < cli_verb_count; i++) {
        const cli_verb *v = &cli_verbs[i];
        (void)fprintf(out, "complete -c spurion -n __fish_use_subcommand -a %s -d '", v->name);
        fish_text(out, v->purpose);
        (void)fputs("'\n", out);
        for (int o = 0; o < OPT_COUNT_OF; o++) {
            if (cli_has_option(v, (cli_option)o)) {
                (void)fprintf(out, "complete -c spurion -n '__fish_seen_subcommand_from %s' -l %s", v->name, cli_options[o].name);
                if (cli_options[o].letter) {
                    (void)fprintf(out, " -s %c", cli_options[o].letter);
                }
                (void)fprintf(out, "%s -d '", cli_options[o].argument ? " -x" : "");
                fish_text(out, cli_options[o].meaning);
                (void)fputs("'\n", out);
            }
        }
        if (strstr(v->operands, "FILE")) {
            (void)fprintf(out, "complete -c spurion -n '__fish_seen_subcommand_from %s' -F\n", v->name);
        }
    }
    (void)fputs("complete -c spurion -n '__fish_seen_subcommand_from completion' -a 'bash zsh fish'\n", out);
}

int cli_completion(cli *c)
{
    const char *shell = c->args[0];

    if (!strcmp(shell, "bash")) {
        bash(stdout);
    } else if (!strcmp(shell, "zsh")) {
        zsh(stdout);
    } else if (!strcmp(shell, "fish")) {
        fish(stdout);
    } else {
        cli_say("completion: expected bash, zsh or fish, found '%s'", shell);
        return CLI_USAGE;
    }
    return CLI_OK;
}

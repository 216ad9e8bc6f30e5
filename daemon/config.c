/* Loading in the order default, file, environment, flag; printing with origins; the example. See config.h, config_keys.h.
 * Thread: any. Memory: everything in the configuration's arena. */
#include "daemon/config.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/config_keys.h"
#include "spurion/nearest.h"

#define ARENA_BYTES_MAX ((size_t)64 << 20)
#define ITEMS_MAX 64

static const char *const origin_names[] = {"default", "file", "environment", "flag"};

static spurion_status no_memory(void)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected memory for the configuration, found none");
}

/* "section.key", or "key" at the top level. */
static const char *full_name(char *out, size_t size, const spurion_key *key)
{
    (void)snprintf(out, size, "%s%s%s", key->section, *key->section ? "." : "", key->name);
    return out;
}

/* The folder of path, absolute, without resolving links. */
static spurion_status folder_of(const char **out, spurion_arena *arena, const char *path)
{
    const char *slash = strrchr(path, '/');
    size_t length = slash ? (size_t)(slash - path) : 0;
    char here[4096];

    if (path[0] == '/') {
        *out = spurion_arena_copy(arena, path, length);
    } else {
        if (!getcwd(here, sizeof here)) {
            return spurion_error(SPURION_NOT_FOUND, "expected a working directory, found none");
        }
        *out = slash ? spurion_arena_printf(arena, "%s/%.*s", strcmp(here, "/") ? here : "", (int)length, path)
                     : spurion_arena_copy(arena, here, strlen(here));
    }
    return *out ? spurion_ok() : no_memory();
}

/* Splits "[a, b]" or "a,b" in place. */
static int split_list(const char **items, char *text)
{
    size_t size = strlen(text);
    int count = 0;

    if (size >= 2 && text[0] == '[' && text[size - 1] == ']') {
        text[size - 1] = '\0';
        text++;
    }
    for (char *save = NULL, *item = strtok_r(text, ", ", &save); item && count < ITEMS_MAX; item = strtok_r(NULL, ", ", &save)) {
        items[count++] = item;
    }
    return count;
}

/* A value from the environment or a flag. */
static spurion_status override(spurion_config *c, unsigned char *origins, int at, const char *text, const char *folder, spurion_origin origin)
{
    const spurion_key *key = &spurion_config_keys().keys[at];
    spurion_key_target target = {c, &c->arena, folder};
    bool list = key->kind == SPURION_KEY_TEXTS || key->kind == SPURION_KEY_URLS;
    const char *items[ITEMS_MAX] = {text};
    char *copy;
    int count = 1;
    spurion_status st;

    if (list) {
        copy = spurion_arena_copy(&c->arena, text, strlen(text));
        if (!copy) {
            return no_memory();
        }
        count = split_list(items, copy);
    }
    st = spurion_key_read(target, key, (spurion_key_value){items, count, list, false});
    if (st.code == SPURION_OK) {
        origins[at] = (unsigned char)origin;
    }
    return st;
}

static spurion_status read_environment(spurion_config *c, unsigned char *origins, const char *folder)
{
    spurion_keys keys = spurion_config_keys();

    for (int i = 0; i < keys.count; i++) {
        char name[96], full[80];
        const char *text;

        (void)snprintf(name, sizeof name, "SPURION_%s", full_name(full, sizeof full, &keys.keys[i]));
        for (char *p = name; *p; p++) {
            *p = *p == '.' ? '_' : (char)toupper((unsigned char)*p);
        }
        text = getenv(name);
        if (text && *text) {
            spurion_status st = override(c, origins, i, text, folder, SPURION_FROM_ENVIRONMENT);
            if (st.code != SPURION_OK) {
                return spurion_error((spurion_code)st.code, "%s in the environment: %s", name, st.message);
            }
        }
    }
    return spurion_ok();
}

static spurion_status read_override(spurion_config *c, unsigned char *origins, const char *text, const char *folder)
{
    spurion_keys keys = spurion_config_keys();
    const char *equals = strchr(text, '='), *words[ITEMS_MAX];
    char name[80], full[80], hint[96];

    if (!equals || equals == text || (size_t)(equals - text) >= sizeof name) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "--set: expected section.key=value, found '%.80s'", text);
    }
    (void)snprintf(name, sizeof name, "%.*s", (int)(equals - text), text);
    for (int i = 0; i < keys.count; i++) {
        if (!strcmp(full_name(full, sizeof full, &keys.keys[i]), name)) {
            spurion_status st = override(c, origins, i, equals + 1, folder, SPURION_FROM_FLAG);
            return st.code == SPURION_OK ? st : spurion_error((spurion_code)st.code, "--set %s: %s", name, st.message);
        }
    }
    for (int i = 0; i < keys.count; i++) { /* hints are full names; they live in the arena */
        words[i] = spurion_arena_printf(&c->arena, "%s", full_name(full, sizeof full, &keys.keys[i]));
        if (!words[i]) {
            return no_memory();
        }
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "--set: expected a key of the configuration (saes and rules stand in the file), found '%s'%s",
                         name, spurion_nearest_hint(hint, sizeof hint, name, words, keys.count));
}

/* What holds between keys. */
static spurion_status check_whole(const spurion_config *c, const char *path)
{
    if (!c->model.path) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: model.path: expected the reward model's directory, found none", path);
    }
    for (int32_t i = 0; i < c->rule_count; i++) {
        const spurion_rule_config *rule = &c->rules[i];
        if (rule->has_effect_sd_min && !c->reward.has_sd) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: rule '%s': effect_sd_min expected reward.sd, found none", path, rule->id);
        }
        if (rule->family_count && !c->catalogue) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: rule '%s': families expected a catalogue, found none", path, rule->id);
        }
    }
    return spurion_ok();
}

spurion_status spurion_config_load(spurion_config *out, const char *path, const char *const *overrides, int override_count)
{
    spurion_status st;
    unsigned char *origins;
    const char *folder = NULL;

    memset(out, 0, sizeof *out);
    spurion_arena_init(&out->arena, ARENA_BYTES_MAX);
    out->model.head_index = -1;
    origins = spurion_arena_take(&out->arena, (size_t)spurion_config_keys().count);
    if (!origins) {
        st = no_memory();
        goto out;
    }
    out->origins = origins;
    SPURION_TRY(st, folder_of(&folder, &out->arena, path));
    SPURION_TRY(st, spurion_key_defaults((spurion_key_target){out, &out->arena, folder}, spurion_config_keys()));
    SPURION_TRY(st, spurion_config_read_file(out, origins, path, folder));
    SPURION_TRY(st, read_environment(out, origins, folder));
    for (int i = 0; i < override_count; i++) {
        SPURION_TRY(st, read_override(out, origins, overrides[i], folder));
    }
    SPURION_TRY(st, check_whole(out, path));
out:
    if (st.code != SPURION_OK) {
        spurion_config_fini(out);
    }
    return st;
}

void spurion_config_fini(spurion_config *c)
{
    if (c) {
        spurion_arena_fini(&c->arena);
        memset(c, 0, sizeof *c);
    }
}

static void print_items(FILE *out, const char *name, const void *items, size_t size, int32_t count, spurion_keys keys)
{
    (void)fprintf(out, "%s:%s\n", name, count ? "  # file" : " []  # default");
    for (int32_t i = 0; i < count; i++) {
        const unsigned char *item = (const unsigned char *)items + (size_t)i * size;
        const char *lead = "  - ";
        for (int k = 0; k < keys.count; k++) {
            if (spurion_key_given(item, &keys.keys[k])) {
                (void)fprintf(out, "%s%s: ", lead, keys.keys[k].name);
                spurion_key_print(out, item, &keys.keys[k]);
                (void)fputc('\n', out);
                lead = "    ";
            }
        }
    }
}

void spurion_config_print(const spurion_config *c, FILE *out)
{
    spurion_keys keys = spurion_config_keys();
    const char *section = "";

    for (int i = 0; i < keys.count; i++) {
        const spurion_key *key = &keys.keys[i];
        const char *indent = *key->section ? "  " : "";

        if (strcmp(section, key->section) != 0) {
            section = key->section;
            if (*section) {
                (void)fprintf(out, "%s:\n", section);
            }
        }
        if (!spurion_key_given(c, key)) {
            (void)fprintf(out, "%s# %s:  # not set\n", indent, key->name);
            continue;
        }
        (void)fprintf(out, "%s%s: ", indent, key->name);
        spurion_key_print(out, c, key);
        (void)fprintf(out, "  # %s\n", origin_names[c->origins[i]]);
    }
    print_items(out, "saes", c->saes, sizeof *c->saes, c->sae_count, spurion_sae_keys());
    print_items(out, "rules", c->rules, sizeof *c->rules, c->rule_count, spurion_rule_keys());
}

/* A value as text from malloc; NULL without memory. */
static char *value_text(const void *base, const spurion_key *key)
{
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);

    if (f) {
        if (spurion_key_given(base, key)) {
            spurion_key_print(f, base, key);
        }
        (void)fclose(f);
    }
    return text;
}

static bool same_value(const void *a, const void *b, const spurion_key *key)
{
    char *x = value_text(a, key), *y = value_text(b, key);
    bool same = x && y && !strcmp(x, y);

    free(x);
    free(y);
    return same;
}

void spurion_config_difference(char *out, size_t size, const spurion_config *a, const spurion_config *b)
{
    spurion_keys keys = spurion_config_keys(), saes = spurion_sae_keys();
    bool same_saes = a->sae_count == b->sae_count;
    size_t used = 0;
    char name[80];

    out[0] = '\0';
    for (int i = 0; i < keys.count && used < size; i++) {
        if (strcmp(keys.keys[i].name, "catalogue") != 0 && !same_value(a, b, &keys.keys[i])) {
            used += (size_t)snprintf(out + used, size - used, "%s%s", used ? ", " : "", full_name(name, sizeof name, &keys.keys[i]));
        }
    }
    for (int32_t s = 0; s < a->sae_count && same_saes; s++) {
        for (int i = 0; i < saes.count; i++) {
            same_saes = same_saes && same_value(&a->saes[s], &b->saes[s], &saes.keys[i]);
        }
    }
    if (!same_saes && used < size) {
        (void)snprintf(out + used, size - used, "%ssaes", used ? ", " : "");
    }
}

/* "meaning; one of a, b; default x" */
static void print_comment(FILE *out, const char *indent, const spurion_key *key)
{
    (void)fprintf(out, "%s# %s", indent, key->meaning);
    for (int i = 0; key->choices && key->choices[i]; i++) {
        (void)fprintf(out, "%s%s", i ? " | " : ": ", key->choices[i]);
    }
    if (key->kind == SPURION_KEY_INT) {
        (void)fprintf(out, "; %.0f to %.0f", key->low, key->high);
    }
    (void)fprintf(out, "%s%s\n", key->standard ? "; default " : "", key->standard ? key->standard : "");
}

static void print_example_items(FILE *out, const char *name, spurion_keys keys)
{
    const char *lead = "  - ";

    (void)fprintf(out, "\n%s:\n", name);
    for (int i = 0; i < keys.count; i++) {
        print_comment(out, "    ", &keys.keys[i]);
        (void)fprintf(out, "%s%s: %s\n", lead, keys.keys[i].name, keys.keys[i].standard ? keys.keys[i].standard : keys.keys[i].example);
        lead = "    ";
    }
}

void spurion_config_example(FILE *out)
{
    spurion_keys keys = spurion_config_keys();
    const char *section = NULL;

    (void)fprintf(out, "# Configuration of spuriond: every key, with its default where it has one. Unknown keys are refused.\n"
                       "# Relative paths start at this file. The environment (SPURION_ENGINE_THREADS=2) and flags (--set engine.threads=2)\n"
                       "# come after this file, in that order.\n");
    for (int i = 0; i < keys.count; i++) {
        const spurion_key *key = &keys.keys[i];
        const char *indent = *key->section ? "  " : "";

        if (!section || strcmp(section, key->section) != 0) {
            section = key->section;
            (void)fprintf(out, *section ? "\n%s:\n" : "\n", section);
        }
        print_comment(out, indent, key);
        (void)fprintf(out, "%s%s: %s\n", indent, key->name, key->standard ? key->standard : key->example);
    }
    print_example_items(out, "saes", spurion_sae_keys());
    print_example_items(out, "rules", spurion_rule_keys());
}

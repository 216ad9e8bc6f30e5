/* Reads the catalogue and builds the sets of features that verdicts ablate; see catalogue.h. Memory: lines and the unsorted rows from
 * malloc during the load; what stays in the catalogue's arena. */
#include "daemon/catalogue.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "spurion/nearest.h"

#define ARENA_BYTES_MAX ((size_t)256 << 20)
#define LINE_BYTES_MAX ((size_t)1 << 20)
#define BOTH (SPURION_DETECT | SPURION_DEBIAS)

static const char *const known_keys[] = {"sae", "index", "label", "families", "verdict", "role", "activation_min"};
enum { KEY_COUNT = sizeof known_keys / sizeof *known_keys };

typedef struct row {
    spurion_catalogue_entry entry;
    int64_t line;
} row;

/* What a load needs beside the catalogue. */
typedef struct loader {
    spurion_catalogue *c;
    const spurion_config *config;
    const int32_t *widths;
    int64_t line;
    row *rows; /* (capacity), malloc */
    size_t capacity;
    spurion_bytes families[SPURION_FAMILIES_MAX];
} loader;

static spurion_status no_memory(void)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected memory for the catalogue, found none");
}

static spurion_status wrong(const loader *l, const char *key, const char *expected, const char *found)
{
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s:%lld: %s: expected %s, found %.80s", l->config->catalogue, (long long)l->line, key,
                         expected, found);
}

static const char *type_name(const json_t *value)
{
    static const char *const names[] = {"an object", "an array", "a string", "a whole number", "a number", "true", "false", "null"};
    return value ? names[json_typeof(value)] : "none";
}

/* Copies a text of 1..SPURION_NAME_BYTES_MAX bytes (or of any size up to the line's, for labels). */
static spurion_status copy_text(spurion_bytes *out, loader *l, const char *key, const json_t *value, bool name)
{
    size_t size = json_string_length(value);

    if (!json_is_string(value)) {
        return wrong(l, key, "a text", type_name(value));
    }
    if (name && (size == 0 || size > SPURION_NAME_BYTES_MAX)) {
        return wrong(l, key, "a text of 1 to 128 bytes", size ? "a longer one" : "an empty one");
    }
    out->data = spurion_arena_copy(&l->c->arena, json_string_value(value), size);
    out->size = size;
    return out->data ? spurion_ok() : no_memory();
}

static bool same(spurion_bytes a, const char *data, size_t size)
{
    return a.size == size && !memcmp(a.data, data, size);
}

/* Place of a family, taken up when it is new. */
static spurion_status family_place(int32_t *out, loader *l, const json_t *value)
{
    spurion_status st;

    if (json_is_string(value)) {
        for (int32_t i = 0; i < l->c->family_count; i++) {
            if (same(l->families[i], json_string_value(value), json_string_length(value))) {
                *out = i;
                return spurion_ok();
            }
        }
    }
    if (l->c->family_count == SPURION_FAMILIES_MAX) {
        return wrong(l, "families", "at most 256 different ones in the file", "one more");
    }
    st = copy_text(&l->families[l->c->family_count], l, "families", value, true);
    if (st.code == SPURION_OK) {
        *out = l->c->family_count++;
    }
    return st;
}

static spurion_status read_families(spurion_catalogue_entry *e, loader *l, const json_t *list)
{
    size_t count = json_array_size(list);
    spurion_bytes *names;
    int32_t *ids;

    if (!list || json_is_null(list)) {
        return spurion_ok();
    }
    if (!json_is_array(list)) {
        return wrong(l, "families", "a list of texts", type_name(list));
    }
    names = spurion_arena_take_array(&l->c->arena, count, sizeof *names);
    ids = spurion_arena_take_array(&l->c->arena, count, sizeof *ids);
    if (!names || !ids) {
        return no_memory();
    }
    for (size_t i = 0; i < count; i++) {
        spurion_status st = family_place(&ids[i], l, json_array_get(list, i));
        if (st.code != SPURION_OK) {
            return st;
        }
        names[i] = l->families[ids[i]];
        for (size_t j = 0; j < i; j++) {
            if (ids[j] == ids[i]) {
                return wrong(l, "families", "each family once", names[i].data);
            }
        }
    }
    e->families = names;
    e->family_ids = ids;
    e->family_count = (int32_t)count;
    return spurion_ok();
}

/* Which of the words the value is; standard when absent. -1 with the fault told. */
static int word_of(spurion_status *st, const loader *l, const char *key, const json_t *value, const char *const *words, int count, int standard)
{
    *st = spurion_ok();
    if (!value) {
        return standard;
    }
    for (int i = 0; i < count; i++) {
        if (json_is_string(value) && !strcmp(json_string_value(value), words[i])) {
            return i;
        }
    }
    *st = spurion_error(SPURION_INVALID_ARGUMENT, "%s:%lld: %s: expected %s, %s or %s, found %.80s", l->config->catalogue,
                        (long long)l->line, key, words[0], words[1], words[2],
                        json_is_string(value) ? json_string_value(value) : type_name(value));
    return -1;
}

static spurion_status read_place(spurion_catalogue_entry *e, loader *l, const json_t *sae, const json_t *index)
{
    const char *ids[SPURION_SAES_MAX];
    char hint[96], found[40];
    int32_t count = l->config->sae_count;

    if (!json_is_string(sae)) {
        return wrong(l, "sae", "the id of an SAE", type_name(sae));
    }
    for (e->sae = 0; e->sae < count && strcmp(l->config->saes[e->sae].id, json_string_value(sae)) != 0; e->sae++) {
        ids[e->sae] = l->config->saes[e->sae].id;
    }
    if (e->sae == count) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s:%lld: sae: expected the id of a configured SAE, found '%.80s'%s",
                             l->config->catalogue, (long long)l->line, json_string_value(sae),
                             spurion_nearest_hint(hint, sizeof hint, json_string_value(sae), ids, count));
    }
    if (!json_is_integer(index)) {
        return wrong(l, "index", "a whole number", type_name(index));
    }
    if (json_integer_value(index) < 0 || json_integer_value(index) >= l->widths[e->sae]) {
        char what[80];
        (void)snprintf(what, sizeof what, "0 to %d (the features of SAE '%.30s')", l->widths[e->sae] - 1, json_string_value(sae));
        (void)snprintf(found, sizeof found, "%lld", (long long)json_integer_value(index));
        return wrong(l, "index", what, found);
    }
    e->index = (int32_t)json_integer_value(index);
    return spurion_ok();
}

static spurion_status read_entry(spurion_catalogue_entry *e, loader *l, const json_t *object)
{
    static const char *const verdicts[] = {"spurious", "intended", "unknown"}, *const roles[] = {"detect", "debias", "both"};
    static const int role_bits[] = {SPURION_DETECT, SPURION_DEBIAS, BOTH};
    const json_t *label = json_object_get(object, "label"), *least = json_object_get(object, "activation_min");
    spurion_status st;
    int verdict, role;

    SPURION_TRY(st, read_place(e, l, json_object_get(object, "sae"), json_object_get(object, "index")));
    if (label && !json_is_null(label) && !(json_is_string(label) && json_string_length(label) == 0)) { /* "": none */
        SPURION_TRY(st, copy_text(&e->label, l, "label", label, false));
    }
    SPURION_TRY(st, read_families(e, l, json_object_get(object, "families")));
    verdict = word_of(&st, l, "verdict", json_object_get(object, "verdict"), verdicts, 3, 2);
    if (verdict < 0) {
        goto out;
    }
    role = word_of(&st, l, "role", json_object_get(object, "role"), roles, 3, 2);
    if (role < 0) {
        goto out;
    }
    e->verdict = (spurion_bytes){verdicts[verdict], strlen(verdicts[verdict])};
    e->spurious = verdict == 0;
    e->roles = e->spurious ? role_bits[role] : 0;
    if (least) {
        double value = json_number_value(least);
        if (!json_is_number(least) || !(value >= 0) || !isfinite((float)value)) {
            st = wrong(l, "activation_min", "a finite number from 0", json_is_number(least) ? "one outside" : type_name(least));
            goto out;
        }
        e->activation_min = (float)value;
    }
out:
    return st;
}

static spurion_status check_keys(const loader *l, json_t *object)
{
    const char *key;
    json_t *value;
    char hint[96];

    json_object_foreach(object, key, value)
    {
        int i = 0;
        while (i < KEY_COUNT && strcmp(known_keys[i], key) != 0) {
            i++;
        }
        if (i == KEY_COUNT) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s:%lld: expected the keys of the catalogue, found unknown key '%.60s'%s",
                                 l->config->catalogue, (long long)l->line, key,
                                 spurion_nearest_hint(hint, sizeof hint, key, known_keys, KEY_COUNT));
        }
    }
    return spurion_ok();
}

static spurion_status add_line(loader *l, const char *text, size_t size)
{
    json_error_t error;
    json_t *object = NULL;
    row *r;
    spurion_status st;

    if (strspn(text, " \t\r\n") == size) {
        return spurion_ok();
    }
    if (l->c->entry_count == SPURION_CATALOGUE_MAX) {
        return wrong(l, "catalogue", "at most 65536 features", "one more");
    }
    object = json_loadb(text, size, JSON_REJECT_DUPLICATES, &error);
    if (!json_is_object(object)) {
        st = wrong(l, "catalogue", "a JSON object", object ? type_name(object) : error.text);
        goto out;
    }
    if ((size_t)l->c->entry_count == l->capacity) {
        size_t more = l->capacity ? l->capacity * 2 : 256;
        row *rows = realloc(l->rows, more * sizeof *rows);
        if (!rows) {
            st = no_memory();
            goto out;
        }
        l->rows = rows;
        l->capacity = more;
    }
    r = &l->rows[l->c->entry_count];
    memset(r, 0, sizeof *r);
    r->line = l->line;
    SPURION_TRY(st, check_keys(l, object));
    SPURION_TRY(st, read_entry(&r->entry, l, object));
    l->c->entry_count++;
out:
    json_decref(object);
    return st;
}

static spurion_status read_lines(loader *l)
{
    FILE *f = fopen(l->config->catalogue, "rb");
    char *text = NULL;
    size_t capacity = 0;
    ssize_t size;
    spurion_status st = spurion_ok();

    if (!f) {
        return spurion_error(errno == EACCES ? SPURION_PERMISSION_DENIED : SPURION_NOT_FOUND, "%s: expected the catalogue, found: %s",
                             l->config->catalogue, strerror(errno));
    }
    while (st.code == SPURION_OK && (size = getline(&text, &capacity, f)) >= 0) {
        l->line++;
        st = (size_t)size > LINE_BYTES_MAX ? wrong(l, "catalogue", "a line of at most 1 MiB", "a longer one")
                                           : add_line(l, text, (size_t)size);
    }
    if (st.code == SPURION_OK && ferror(f)) {
        st = spurion_error(SPURION_NOT_FOUND, "%s: expected a readable file, found: %s", l->config->catalogue, strerror(errno));
    }
    free(text);
    (void)fclose(f);
    return st;
}

static int by_place(const void *a, const void *b)
{
    const row *x = a, *y = b;
    if (x->entry.sae != y->entry.sae) {
        return x->entry.sae < y->entry.sae ? -1 : 1;
    }
    if (x->entry.index != y->entry.index) {
        return x->entry.index < y->entry.index ? -1 : 1;
    }
    return x->line < y->line ? -1 : x->line > y->line;
}

/* Sorts the rows into the catalogue; a pair stands once. */
static spurion_status settle(loader *l)
{
    spurion_catalogue *c = l->c;
    spurion_catalogue_entry *entries = spurion_arena_take_array(&c->arena, (size_t)c->entry_count, sizeof *entries);
    spurion_bytes *families = spurion_arena_take_array(&c->arena, (size_t)c->family_count, sizeof *families);

    if (!entries || !families) {
        return no_memory();
    }
    if (c->entry_count) {
        qsort(l->rows, (size_t)c->entry_count, sizeof *l->rows, by_place);
    }
    for (int32_t i = 0; i < c->entry_count; i++) {
        entries[i] = l->rows[i].entry;
        if (i && entries[i - 1].sae == entries[i].sae && entries[i - 1].index == entries[i].index) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s:%lld: expected each pair (sae, index) once, found %s/%d again (first on line %lld)",
                                 l->config->catalogue, (long long)l->rows[i].line, l->config->saes[entries[i].sae].id, entries[i].index,
                                 (long long)l->rows[i - 1].line);
        }
    }
    if (c->family_count) {
        memcpy(families, l->families, (size_t)c->family_count * sizeof *families);
    }
    c->entries = entries;
    c->families = families;
    return spurion_ok();
}

/* --- sets --- */

/* Whether the entry has a role of roles, and one of the wanted families; wanted NULL: whatever its families. */
static bool belongs(const spurion_catalogue_entry *e, int roles, const bool *wanted)
{
    if (!(e->roles & roles)) {
        return false;
    }
    for (int32_t i = 0; wanted && i < e->family_count; i++) {
        if (wanted[e->family_ids[i]]) {
            return true;
        }
    }
    return !wanted;
}

/* Place of the set of these entries; an equal set that is there already is taken. sets has room. */
static spurion_status add_set(int32_t *out, spurion_catalogue *c, spurion_ablation_set *sets, int roles, const bool *wanted)
{
    int32_t count = 0, *members;

    for (int32_t i = 0; i < c->entry_count; i++) {
        count += belongs(&c->entries[i], roles, wanted);
    }
    members = spurion_arena_take_array(&c->arena, (size_t)count, sizeof *members);
    if (!members) {
        return no_memory();
    }
    count = 0;
    for (int32_t i = 0; i < c->entry_count; i++) {
        if (belongs(&c->entries[i], roles, wanted)) {
            members[count++] = i;
        }
    }
    for (int32_t s = 0; s < c->set_count; s++) {
        if (sets[s].count == count && !memcmp(sets[s].entries, members, (size_t)count * sizeof *members)) {
            *out = s;
            return spurion_ok();
        }
    }
    sets[c->set_count] = (spurion_ablation_set){members, count};
    *out = c->set_count++;
    return spurion_ok();
}

static spurion_status rule_set(int32_t *out, spurion_catalogue *c, spurion_ablation_set *sets, const spurion_config *config,
                               const spurion_rule_config *rule)
{
    bool wanted[SPURION_FAMILIES_MAX] = {false};
    const char *names[SPURION_FAMILIES_MAX];
    char hint[96];

    for (int32_t i = 0; i < c->family_count; i++) {
        names[i] = c->families[i].data;
    }
    for (int32_t i = 0; i < rule->family_count; i++) {
        int32_t k = 0;
        while (k < c->family_count && !same(c->families[k], rule->families[i], strlen(rule->families[i]))) {
            k++;
        }
        if (k == c->family_count) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "rule '%s': families: expected families of the catalogue %s, found '%.80s'%s",
                                 rule->id, config->catalogue ? config->catalogue : "(none)", rule->families[i],
                                 spurion_nearest_hint(hint, sizeof hint, rule->families[i], names, c->family_count));
        }
        wanted[k] = true;
    }
    return add_set(out, c, sets, SPURION_DETECT, rule->family_count ? wanted : NULL);
}

static spurion_status build_sets(spurion_catalogue *c, const spurion_config *config)
{
    size_t most = 1 + (size_t)c->family_count + (size_t)config->rule_count;
    spurion_ablation_set *sets = spurion_arena_take_array(&c->arena, most, sizeof *sets);
    int32_t *family_sets = spurion_arena_take_array(&c->arena, (size_t)c->family_count, sizeof *family_sets);
    int32_t *rule_sets = spurion_arena_take_array(&c->arena, (size_t)config->rule_count, sizeof *rule_sets);
    spurion_status st;

    if (!sets || !family_sets || !rule_sets) {
        return no_memory();
    }
    SPURION_TRY(st, add_set(&c->debias_set, c, sets, SPURION_DEBIAS, NULL));
    for (int32_t f = 0; f < c->family_count; f++) {
        bool wanted[SPURION_FAMILIES_MAX] = {false};
        wanted[f] = true;
        SPURION_TRY(st, add_set(&family_sets[f], c, sets, SPURION_DETECT, wanted));
    }
    for (int32_t r = 0; r < config->rule_count; r++) {
        SPURION_TRY(st, rule_set(&rule_sets[r], c, sets, config, &config->rules[r]));
    }
    c->sets = sets;
    c->family_sets = family_sets;
    c->rule_sets = rule_sets;
out:
    return st;
}

spurion_status spurion_catalogue_load(spurion_catalogue *out, const spurion_config *config, const int32_t *widths)
{
    loader *l = calloc(1, sizeof *l);
    spurion_status st;

    memset(out, 0, sizeof *out);
    spurion_arena_init(&out->arena, ARENA_BYTES_MAX);
    if (!l) {
        st = no_memory();
        goto out;
    }
    l->c = out;
    l->config = config;
    l->widths = widths;
    if (config->catalogue) {
        SPURION_TRY(st, read_lines(l));
    }
    SPURION_TRY(st, settle(l));
    SPURION_TRY(st, build_sets(out, config));
out:
    if (l) {
        free(l->rows);
    }
    free(l);
    if (st.code != SPURION_OK) {
        spurion_catalogue_fini(out);
    }
    return st;
}

void spurion_catalogue_fini(spurion_catalogue *c)
{
    if (c) {
        spurion_arena_fini(&c->arena);
        memset(c, 0, sizeof *c);
    }
}

const spurion_catalogue_entry *spurion_catalogue_find(const spurion_catalogue *c, int32_t sae, int32_t index)
{
    int32_t low = 0, high = c->entry_count;

    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        const spurion_catalogue_entry *e = &c->entries[middle];
        if (e->sae == sae && e->index == index) {
            return e;
        }
        if (e->sae < sae || (e->sae == sae && e->index < index)) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return NULL;
}

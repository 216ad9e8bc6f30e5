/* From a YAML file to the configuration: which keys stand where, with the line of every fault. The only user of libyaml.
 * Thread: any. Memory: the document is libyaml's and freed here; what stays lies in the configuration's arena. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#include "daemon/config_keys.h"
#include "spurion/nearest.h"

#define FILE_BYTES_MAX ((size_t)1 << 20)
#define WORDS_MAX 64

typedef struct reader {
    spurion_config *config;
    unsigned char *origins;
    const char *path, *folder;
    yaml_document_t document;
} reader;

/* Puts file and line before a message. */
static spurion_status at_node(const reader *r, const yaml_node_t *node, const char *where, spurion_status st)
{
    return spurion_error((spurion_code)st.code, "%s:%zu: %s: %s", r->path, node->start_mark.line + 1, where, st.message);
}

static spurion_status fault(const reader *r, const yaml_node_t *node, const char *where, const char *expected, const char *found)
{
    return at_node(r, node, where, spurion_error(SPURION_INVALID_ARGUMENT, "expected %s, found %s", expected, found));
}

static const char *kind_name(const yaml_node_t *node)
{
    return node->type == YAML_MAPPING_NODE ? "a mapping" : node->type == YAML_SEQUENCE_NODE ? "a list" : "one value";
}

static const char *scalar(const yaml_node_t *node)
{
    return (const char *)node->data.scalar.value;
}

static bool plain(const yaml_node_t *node)
{
    return node->type == YAML_SCALAR_NODE && node->data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
}

/* ~, null or nothing: the key is as if it did not stand there. */
static bool is_null(const yaml_node_t *node)
{
    const char *t = plain(node) ? scalar(node) : "x";
    return !*t || !strcmp(t, "~") || !strcmp(t, "null") || !strcmp(t, "Null") || !strcmp(t, "NULL");
}

/* A key must be a text without NUL that stands once in its mapping. */
static spurion_status check_pair(reader *r, const yaml_node_t *mapping, const yaml_node_pair_t *pair, const char *where)
{
    const yaml_node_t *key = yaml_document_get_node(&r->document, pair->key);

    if (key->type != YAML_SCALAR_NODE || strlen(scalar(key)) != key->data.scalar.length) {
        return fault(r, key, where, "a name as key", kind_name(key));
    }
    for (const yaml_node_pair_t *p = mapping->data.mapping.pairs.start; p < pair; p++) {
        const yaml_node_t *other = yaml_document_get_node(&r->document, p->key);
        if (!strcmp(scalar(other), scalar(key))) {
            return at_node(r, key, where,
                           spurion_error(SPURION_INVALID_ARGUMENT, "expected key '%.60s' once, found it again (first on line %zu)",
                                         scalar(key), other->start_mark.line + 1));
        }
    }
    return spurion_ok();
}

static spurion_status unknown_key(const reader *r, const yaml_node_t *key, const char *where, const char *const *words, int count)
{
    char hint[96], list[300] = "";
    size_t used = 0;

    for (int i = 0; i < count && used + 40 < sizeof list; i++) {
        used += (size_t)snprintf(list + used, sizeof list - used, "%s%s", i ? ", " : "", words[i]);
    }
    return at_node(r, key, where,
                   spurion_error(SPURION_INVALID_ARGUMENT, "expected one of %s, found unknown key '%.60s'%s", list, scalar(key),
                                 spurion_nearest_hint(hint, sizeof hint, scalar(key), words, count)));
}

/* Reads one value by its row. The value is a scalar, or a sequence of scalars. */
static spurion_status read_value(reader *r, void *base, const spurion_key *row, const yaml_node_t *node, const char *where)
{
    spurion_key_target target = {base, &r->config->arena, r->folder};
    bool list = node->type == YAML_SEQUENCE_NODE;
    int count = list ? (int)(node->data.sequence.items.top - node->data.sequence.items.start) : 1;
    const char **texts = spurion_arena_take_array(target.arena, (size_t)count, sizeof *texts);
    spurion_status st;

    if (!texts) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected memory for the configuration, found none");
    }
    for (int i = 0; i < count; i++) {
        const yaml_node_t *item = list ? yaml_document_get_node(&r->document, node->data.sequence.items.start[i]) : node;
        if (item->type != YAML_SCALAR_NODE || (list && is_null(item)) || strlen(scalar(item)) != item->data.scalar.length) {
            return fault(r, item, where, list ? "a list of texts" : "one value", kind_name(item));
        }
        texts[i] = scalar(item);
    }
    st = spurion_key_read(target, row, (spurion_key_value){texts, count, list, !list && !plain(node)});
    return st.code == SPURION_OK ? st : at_node(r, node, where, st);
}

/* Reads the pairs of a mapping whose rows are those of keys with this section name. */
static spurion_status read_mapping(reader *r, void *base, spurion_keys keys, const char *section, const yaml_node_t *node, const char *where)
{
    const char *words[WORDS_MAX];
    int word_count = 0;

    if (node->type != YAML_MAPPING_NODE) {
        return fault(r, node, where, "a mapping", kind_name(node));
    }
    for (int i = 0; i < keys.count; i++) {
        if (!strcmp(keys.keys[i].section, section)) {
            words[word_count++] = keys.keys[i].name;
        }
    }
    for (const yaml_node_pair_t *p = node->data.mapping.pairs.start; p < node->data.mapping.pairs.top; p++) {
        const yaml_node_t *key = yaml_document_get_node(&r->document, p->key);
        const yaml_node_t *value = yaml_document_get_node(&r->document, p->value);
        const spurion_key *row = NULL;
        char full[160];
        spurion_status st = check_pair(r, node, p, where);

        if (st.code != SPURION_OK) {
            return st;
        }
        for (int i = 0; i < keys.count && !row; i++) {
            row = !strcmp(keys.keys[i].section, section) && !strcmp(keys.keys[i].name, scalar(key)) ? &keys.keys[i] : NULL;
        }
        if (!row) {
            return unknown_key(r, key, where, words, word_count);
        }
        (void)snprintf(full, sizeof full, "%s.%s", where, row->name);
        if (is_null(value)) {
            continue;
        }
        st = read_value(r, base, row, value, full);
        if (st.code != SPURION_OK) {
            return st;
        }
        if (base == (void *)r->config) {
            r->origins[row - keys.keys] = SPURION_FROM_FILE;
        }
    }
    return spurion_ok();
}

/* Number of items of a list of mappings, or -1 with the fault told. */
static int list_count(spurion_status *st, const reader *r, const yaml_node_t *node, const char *where, int most)
{
    ptrdiff_t count = node->type == YAML_SEQUENCE_NODE ? node->data.sequence.items.top - node->data.sequence.items.start : -1;
    char what[40], found[40];

    if (count < 0) {
        *st = fault(r, node, where, "a list", kind_name(node));
        return -1;
    }
    if (count > most) {
        (void)snprintf(what, sizeof what, "at most %d", most);
        (void)snprintf(found, sizeof found, "%td", count);
        *st = fault(r, node, where, what, found);
        return -1;
    }
    *st = spurion_ok();
    return (int)count;
}

static spurion_status read_saes(reader *r, const yaml_node_t *node)
{
    spurion_config *c = r->config;
    spurion_status st;
    int count = list_count(&st, r, node, "saes", SPURION_SAES_MAX);

    for (int i = 0; i < count; i++) {
        const yaml_node_t *item = yaml_document_get_node(&r->document, node->data.sequence.items.start[i]);
        spurion_sae_config *sae = &c->saes[i];
        char where[40];

        (void)snprintf(where, sizeof where, "saes[%d]", i);
        SPURION_TRY(st, read_mapping(r, sae, spurion_sae_keys(), "saes", item, where));
        if (!sae->id || !sae->path) {
            st = fault(r, item, where, "id and path", sae->id ? "no path" : "no id");
            goto out;
        }
        for (int j = 0; j < i; j++) {
            if (!strcmp(c->saes[j].id, sae->id)) {
                st = at_node(r, item, where,
                             spurion_error(SPURION_INVALID_ARGUMENT, "expected each id once, found '%.128s' again", sae->id));
                goto out;
            }
        }
        c->sae_count = i + 1;
    }
out:
    return st;
}

static spurion_status check_rule(const reader *r, const yaml_node_t *item, const char *where, const spurion_rule_config *rule, int before)
{
    if (!rule->id) {
        return fault(r, item, where, "an id", "none");
    }
    if (!rule->has_effect_min && !rule->has_effect_sd_min && !rule->advantage_flip) {
        return fault(r, item, where, "at least one of effect_min, effect_sd_min and advantage_flip: true", "none");
    }
    for (int j = 0; j < before; j++) {
        if (!strcmp(r->config->rules[j].id, rule->id)) {
            return at_node(r, item, where,
                           spurion_error(SPURION_INVALID_ARGUMENT, "expected each id once, found '%.128s' again", rule->id));
        }
    }
    return spurion_ok();
}

static spurion_status read_rules(reader *r, const yaml_node_t *node)
{
    spurion_config *c = r->config;
    spurion_status st;
    int count = list_count(&st, r, node, "rules", SPURION_RULES_MAX);

    if (count < 0) {
        return st;
    }
    c->rules = spurion_arena_take_array(&c->arena, (size_t)count, sizeof *c->rules);
    if (!c->rules) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected memory for the configuration, found none");
    }
    for (int i = 0; i < count; i++) {
        const yaml_node_t *item = yaml_document_get_node(&r->document, node->data.sequence.items.start[i]);
        spurion_key_target target = {&c->rules[i], &c->arena, r->folder};
        char where[40];

        (void)snprintf(where, sizeof where, "rules[%d]", i);
        SPURION_TRY(st, spurion_key_defaults(target, spurion_rule_keys()));
        SPURION_TRY(st, read_mapping(r, &c->rules[i], spurion_rule_keys(), "rules", item, where));
        SPURION_TRY(st, check_rule(r, item, where, &c->rules[i], i));
        if (c->rules[i].action == SPURION_RULE_LOG) {
            c->rules[i].alert = SPURION_ALERT_NONE;
        }
        c->rule_count = i + 1;
    }
out:
    return st;
}

/* Names at the top level: sections, saes, rules, and keys without a section. */
static int top_words(const char **words)
{
    spurion_keys keys = spurion_config_keys();
    int count = 0;

    words[count++] = "saes";
    words[count++] = "rules";
    for (int i = 0; i < keys.count; i++) {
        const char *word = *keys.keys[i].section ? keys.keys[i].section : keys.keys[i].name;
        if (strcmp(words[count - 1], word) != 0) {
            words[count++] = word;
        }
    }
    return count;
}

static spurion_status read_entry(reader *r, const yaml_node_t *key, const yaml_node_t *value)
{
    spurion_keys keys = spurion_config_keys();
    const char *words[WORDS_MAX];
    int count;

    if (!strcmp(scalar(key), "saes")) {
        return is_null(value) ? spurion_ok() : read_saes(r, value);
    }
    if (!strcmp(scalar(key), "rules")) {
        return is_null(value) ? spurion_ok() : read_rules(r, value);
    }
    for (int i = 0; i < keys.count; i++) {
        const spurion_key *row = &keys.keys[i];
        if (*row->section && !strcmp(row->section, scalar(key))) {
            return is_null(value) ? spurion_ok() : read_mapping(r, r->config, keys, row->section, value, row->section);
        }
        if (!*row->section && !strcmp(row->name, scalar(key))) {
            spurion_status st = is_null(value) ? spurion_ok() : read_value(r, r->config, row, value, row->name);
            if (st.code == SPURION_OK && !is_null(value)) {
                r->origins[i] = SPURION_FROM_FILE;
            }
            return st;
        }
    }
    count = top_words(words);
    return unknown_key(r, key, "configuration", words, count);
}

static spurion_status read_root(reader *r)
{
    const yaml_node_t *root = yaml_document_get_root_node(&r->document);
    spurion_status st = spurion_ok();

    if (!root || root->type != YAML_MAPPING_NODE) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected a mapping of sections, found %s", r->path,
                             root ? kind_name(root) : "nothing");
    }
    for (const yaml_node_pair_t *p = root->data.mapping.pairs.start; p < root->data.mapping.pairs.top && st.code == SPURION_OK; p++) {
        st = check_pair(r, root, p, "configuration");
        if (st.code == SPURION_OK) {
            st = read_entry(r, yaml_document_get_node(&r->document, p->key), yaml_document_get_node(&r->document, p->value));
        }
    }
    return st;
}

/* The whole file in the arena. */
static spurion_status read_bytes(const unsigned char **out, size_t *size, spurion_arena *arena, const char *path)
{
    FILE *f = fopen(path, "rb");
    unsigned char *data = spurion_arena_take(arena, FILE_BYTES_MAX + 1);
    spurion_status st = spurion_ok();

    *size = 0;
    if (!f) {
        st = spurion_error(errno == EACCES ? SPURION_PERMISSION_DENIED : SPURION_NOT_FOUND,
                           "%s: expected a configuration file, found: %s", path, strerror(errno));
    } else if (!data) {
        st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected memory for the configuration, found none");
    } else {
        *size = fread(data, 1, FILE_BYTES_MAX + 1, f);
        if (ferror(f)) {
            st = spurion_error(SPURION_NOT_FOUND, "%s: expected a readable file, found: %s", path, strerror(errno));
        } else if (*size > FILE_BYTES_MAX) {
            st = spurion_error(SPURION_RESOURCE_EXHAUSTED, "%s: expected at most %zu bytes, found more", path, FILE_BYTES_MAX);
        }
    }
    if (f) {
        (void)fclose(f);
    }
    *out = data;
    return st;
}

static spurion_status syntax(const char *path, const yaml_parser_t *parser)
{
    return spurion_error(SPURION_INVALID_ARGUMENT, "%s:%zu: expected YAML, found: %s%s%s", path, parser->problem_mark.line + 1,
                         parser->problem ? parser->problem : "no memory", parser->context ? ", " : "",
                         parser->context ? parser->context : "");
}

spurion_status spurion_config_read_file(spurion_config *c, unsigned char *origins, const char *path, const char *folder)
{
    reader r = {.config = c, .origins = origins, .path = path, .folder = folder};
    yaml_parser_t parser;
    yaml_document_t rest;
    const unsigned char *data;
    size_t size;
    spurion_status st = read_bytes(&data, &size, &c->arena, path);

    if (st.code != SPURION_OK) {
        return st;
    }
    if (!yaml_parser_initialize(&parser)) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected memory for the configuration, found none");
    }
    yaml_parser_set_input_string(&parser, data, size);
    if (!yaml_parser_load(&parser, &r.document)) {
        st = syntax(path, &parser);
    } else {
        st = read_root(&r);
        yaml_document_delete(&r.document);
        if (st.code == SPURION_OK && !yaml_parser_load(&parser, &rest)) {
            st = syntax(path, &parser);
        } else if (st.code == SPURION_OK) {
            if (yaml_document_get_root_node(&rest)) {
                st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected one YAML document, found a second", path);
            }
            yaml_document_delete(&rest);
        }
    }
    yaml_parser_delete(&parser);
    return st;
}

/* tokenizer.json into tables. What the library would run and we do not know is refused by name.
 * Thread: open's. Memory: the JSON tree lives for the call only; tables belong to the tokenizer. */
#include "daemon/model/tokenizer_internal.h"

#include "daemon/base/json.h"

#include <jansson.h>

#include <stdlib.h>
#include <string.h>

#define METASPACE "\xe2\x96\x81"

static const char *kind_name(const json_t *v)
{
    static const char *const names[] = {"an object",     "an array", "a string", "an integer",
                                        "a real number", "true",     "false",    "null"};
    return v == NULL ? "nothing" : names[json_typeof(v)];
}

static spurion_status broken(const char *where, const char *expected, const json_t *found)
{
    return spurion_error(SPURION_INVALID_ARGUMENT, "tokenizer.json: %s: expected %s, found %s", where, expected, kind_name(found));
}

static spurion_status unknown_part(const char *part, const char *known, const char *found)
{
    return spurion_error(SPURION_UNIMPLEMENTED, "tokenizer.json: expected a %s of %s, found '%.64s'", part, known, found);
}

/* ---- fields ---- */

static spurion_status get_string(const char **out, size_t *bytes, const json_t *object, const char *key, const char *where)
{
    const json_t *v = json_object_get(object, key);
    char place[96];

    (void)snprintf(place, sizeof place, "%s.%s", where, key);
    if (!json_is_string(v)) {
        return broken(place, "a string", v);
    }
    *out = json_string_value(v);
    *bytes = json_string_length(v);
    return spurion_ok();
}

/* A string that the file may leave out or set to null: *out stays NULL. Copies, with a NUL. */
static spurion_status copy_string(char **out, size_t *bytes, const json_t *v, const char *where)
{
    *bytes = 0;
    if (v == NULL || json_is_null(v)) {
        return spurion_ok();
    }
    if (!json_is_string(v)) {
        return broken(where, "a string or null", v);
    }
    *bytes = json_string_length(v);
    *out = malloc(*bytes + 1);
    if (*out == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a tokenizer");
    }
    memcpy(*out, json_string_value(v), *bytes + 1);
    return spurion_ok();
}

/* fallback: 0 or 1 when the file may leave it out, -1 when it must be there. */
static spurion_status get_bool(bool *out, const json_t *object, const char *key, const char *where, int fallback)
{
    const json_t *v = json_object_get(object, key);
    char place[96];

    if (fallback >= 0 && (v == NULL || json_is_null(v))) {
        *out = fallback != 0;
        return spurion_ok();
    }
    if (!json_is_boolean(v)) {
        (void)snprintf(place, sizeof place, "%s.%s", where, key);
        return broken(place, "true or false", v);
    }
    *out = json_is_true(v);
    return spurion_ok();
}

static spurion_status get_id(int32_t *out, const json_t *v, const char *where)
{
    if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > TOK_ID_MAX) {
        return broken(where, "a token id (0 to 2^30)", v);
    }
    *out = (int32_t)json_integer_value(v);
    return spurion_ok();
}

static spurion_status get_type(const char **out, const json_t *object, const char *where)
{
    size_t bytes;
    if (!json_is_object(object)) {
        return broken(where, "an object", object);
    }
    return get_string(out, &bytes, object, "type", where);
}

/* {"String": ..} or {"Regex": ..} */
static spurion_status load_pattern(tok_pattern *p, const json_t *object, const char *where)
{
    const json_t *v = json_object_get(object, "pattern");
    const json_t *literal = json_object_get(v, "String"), *regex = json_object_get(v, "Regex");

    if (json_object_size(v) != 1 || (!json_is_string(literal) && !json_is_string(regex))) {
        return broken(where, "a pattern {\"String\": ..} or {\"Regex\": ..}", v);
    }
    return literal != NULL ? tok_pattern_literal(p, json_string_value(literal), json_string_length(literal))
                           : tok_pattern_regex(p, json_string_value(regex), json_string_length(regex));
}

/* ---- normaliser ---- */

static spurion_status load_normalizer_part(tok_normalizer *p, const json_t *v, const char *type)
{
    static const struct {
        const char *type;
        tok_normalizer_kind kind;
    } kinds[] = {{"NFC", TOK_NORM_NFC},
                 {"NFD", TOK_NORM_NFD},
                 {"NFKC", TOK_NORM_NFKC},
                 {"NFKD", TOK_NORM_NFKD},
                 {"Lowercase", TOK_NORM_LOWERCASE},
                 {"Prepend", TOK_NORM_PREPEND},
                 {"Replace", TOK_NORM_REPLACE},
                 {"Strip", TOK_NORM_STRIP},
                 {"ByteLevel", TOK_NORM_BYTE_LEVEL}};
    spurion_status st;
    size_t i = 0;

    while (i < sizeof kinds / sizeof kinds[0] && strcmp(kinds[i].type, type) != 0) {
        i++;
    }
    if (i == sizeof kinds / sizeof kinds[0]) {
        return unknown_part("normalizer", "Sequence, NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace, Strip, ByteLevel", type);
    }
    p->kind = kinds[i].kind;
    if (p->kind == TOK_NORM_REPLACE) {
        SPURION_TRY(st, load_pattern(&p->pattern, v, "normalizer.Replace"));
    }
    if (p->kind == TOK_NORM_REPLACE || p->kind == TOK_NORM_PREPEND) {
        const json_t *content = json_object_get(v, p->kind == TOK_NORM_REPLACE ? "content" : "prepend");
        if (!json_is_string(content)) {
            return broken("normalizer", "a string to put in", content);
        }
        SPURION_TRY(st, copy_string(&p->content, &p->content_bytes, content, "normalizer"));
    }
    if (p->kind == TOK_NORM_STRIP) {
        SPURION_TRY(st, get_bool(&p->left, v, "strip_left", "normalizer.Strip", -1));
        SPURION_TRY(st, get_bool(&p->right, v, "strip_right", "normalizer.Strip", -1));
    }
    st = spurion_ok();
out:
    return st;
}

static spurion_status load_normalizer(spurion_tokenizer *t, const json_t *v, int nesting)
{
    const char *type;
    spurion_status st = spurion_ok();

    if (v == NULL || (nesting == 0 && json_is_null(v))) {
        return st;
    }
    SPURION_TRY(st, get_type(&type, v, "normalizer"));
    if (strcmp(type, "Sequence") == 0) {
        const json_t *list = json_object_get(v, "normalizers");
        if (!json_is_array(list) || nesting >= TOK_NESTING_MAX) {
            return broken("normalizer.normalizers", "an array, nested at most 8 times", list);
        }
        for (size_t i = 0; i < json_array_size(list); i++) {
            SPURION_TRY(st, load_normalizer(t, json_array_get(list, i), nesting + 1));
        }
        return st;
    }
    if (t->normalizer_count == TOK_NORMALIZERS_MAX) {
        return spurion_error(SPURION_UNIMPLEMENTED, "tokenizer.json: expected at most %d normalizers, found more",
                             TOK_NORMALIZERS_MAX);
    }
    t->normalizer_count++;
    st = load_normalizer_part(&t->normalizers[t->normalizer_count - 1], v, type);
out:
    return st;
}

/* ---- pre-tokenizer ---- */

static spurion_status load_split(tok_stage *s, const json_t *v)
{
    static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
    const char *behavior;
    size_t bytes;
    int i = 0;
    spurion_status st;

    SPURION_TRY(st, load_pattern(&s->pattern, v, "pre_tokenizer.Split"));
    SPURION_TRY(st, get_bool(&s->invert, v, "invert", "pre_tokenizer.Split", -1));
    SPURION_TRY(st, get_string(&behavior, &bytes, v, "behavior", "pre_tokenizer.Split"));
    while (i < 5 && strcmp(names[i], behavior) != 0) {
        i++;
    }
    if (i == 5) {
        return unknown_part("Split behavior", "Removed, Isolated, MergedWithPrevious, MergedWithNext, Contiguous", behavior);
    }
    s->behavior = (tok_behavior)i;
out:
    return st;
}

static spurion_status load_metaspace(tok_stage *s, const json_t *v)
{
    const json_t *scheme = json_object_get(v, "prepend_scheme"), *prefix = json_object_get(v, "add_prefix_space");
    const char *replacement;
    spurion_status st;

    s->behavior = TOK_MERGED_NEXT;
    SPURION_TRY(st, get_string(&replacement, &s->replacement_bytes, v, "replacement", "pre_tokenizer.Metaspace"));
    if (s->replacement_bytes == 0 || s->replacement_bytes != (size_t)spurion_utf8_length((unsigned char)replacement[0])) {
        return spurion_error(SPURION_INVALID_ARGUMENT,
                             "tokenizer.json: expected one character as Metaspace's replacement, found '%.32s'", replacement);
    }
    memcpy(s->replacement, replacement, s->replacement_bytes);
    SPURION_TRY(st, tok_pattern_literal(&s->pattern, replacement, s->replacement_bytes));
    SPURION_TRY(st, get_bool(&s->split, v, "split", "pre_tokenizer.Metaspace", 1));
    s->prepend = TOK_PREPEND_ALWAYS;
    if (scheme != NULL) {
        const char *name = json_is_string(scheme) ? json_string_value(scheme) : "";
        if (strcmp(name, "first") != 0 && strcmp(name, "never") != 0 && strcmp(name, "always") != 0) {
            return broken("pre_tokenizer.Metaspace.prepend_scheme", "\"first\", \"never\" or \"always\"", scheme);
        }
        s->prepend = name[0] == 'f' ? TOK_PREPEND_FIRST : name[0] == 'n' ? TOK_PREPEND_NEVER : TOK_PREPEND_ALWAYS;
    }
    if (json_is_false(prefix) && s->prepend != TOK_PREPEND_NEVER) {
        return spurion_error(
            SPURION_INVALID_ARGUMENT,
            "tokenizer.json: expected Metaspace's prepend_scheme \"never\" beside add_prefix_space false, found another");
    }
out:
    return st;
}

static spurion_status load_stage(tok_stage *s, const json_t *v, const char *type)
{
    spurion_status st = spurion_ok();
    bool individual = false;

    s->behavior = TOK_ISOLATED;
    if (strcmp(type, "ByteLevel") == 0) {
        s->kind = TOK_STAGE_BYTE_LEVEL;
        SPURION_TRY(st, get_bool(&s->add_prefix_space, v, "add_prefix_space", "pre_tokenizer.ByteLevel", -1));
        SPURION_TRY(st, get_bool(&s->use_regex, v, "use_regex", "pre_tokenizer.ByteLevel", 1));
    } else if (strcmp(type, "Metaspace") == 0) {
        s->kind = TOK_STAGE_METASPACE;
        SPURION_TRY(st, load_metaspace(s, v));
    } else if (strcmp(type, "Split") == 0) {
        SPURION_TRY(st, load_split(s, v));
    } else if (strcmp(type, "Digits") == 0) {
        SPURION_TRY(st, get_bool(&individual, v, "individual_digits", "pre_tokenizer.Digits", -1));
        s->pattern = (tok_pattern){.kind = TOK_PATTERN_CHARS, .chars = TOK_CHARS_NUMERIC};
        s->behavior = individual ? TOK_ISOLATED : TOK_CONTIGUOUS;
    } else if (strcmp(type, "Whitespace") == 0) {
        s->pattern = (tok_pattern){.kind = TOK_PATTERN_CHARS, .chars = TOK_CHARS_WORDS};
        s->behavior = TOK_REMOVED;
        s->invert = true;
    } else if (strcmp(type, "WhitespaceSplit") == 0) {
        s->pattern = (tok_pattern){.kind = TOK_PATTERN_CHARS, .chars = TOK_CHARS_SPACE};
        s->behavior = TOK_REMOVED;
    } else {
        st = unknown_part("pre_tokenizer", "Sequence, ByteLevel, Split, Metaspace, Digits, Whitespace, WhitespaceSplit", type);
    }
out:
    return st;
}

static spurion_status load_pre_tokenizer(spurion_tokenizer *t, const json_t *v, int nesting)
{
    const char *type;
    spurion_status st = spurion_ok();

    if (v == NULL || (nesting == 0 && json_is_null(v))) {
        return st;
    }
    SPURION_TRY(st, get_type(&type, v, "pre_tokenizer"));
    if (strcmp(type, "Sequence") == 0) {
        const json_t *list = json_object_get(v, "pretokenizers");
        if (!json_is_array(list) || nesting >= TOK_NESTING_MAX) {
            return broken("pre_tokenizer.pretokenizers", "an array, nested at most 8 times", list);
        }
        for (size_t i = 0; i < json_array_size(list); i++) {
            SPURION_TRY(st, load_pre_tokenizer(t, json_array_get(list, i), nesting + 1));
        }
        return st;
    }
    if (t->stage_count == TOK_STAGES_MAX) {
        return spurion_error(SPURION_UNIMPLEMENTED, "tokenizer.json: expected at most %d pre_tokenizers, found more",
                             TOK_STAGES_MAX);
    }
    t->stage_count++;
    SPURION_TRY(st, load_stage(&t->stages[t->stage_count - 1], v, type));
    t->byte_level = t->byte_level || t->stages[t->stage_count - 1].kind == TOK_STAGE_BYTE_LEVEL;
out:
    return st;
}

/* ---- post-processor ---- */

/* Processors of a sequence wrap what the earlier ones made: leading ids go to the front, trailing ones to the end. */
static spurion_status add_special(spurion_tokenizer *t, const int32_t *ids, int count, bool leading)
{
    int32_t *list = leading ? t->leading : t->trailing;
    int *have = leading ? &t->leading_count : &t->trailing_count;

    if (*have + count > TOK_SPECIALS_MAX) {
        return spurion_error(SPURION_UNIMPLEMENTED,
                             "tokenizer.json: expected at most %d ids from the post_processor on one side, found more",
                             TOK_SPECIALS_MAX);
    }
    if (leading) {
        memmove(list + count, list, (size_t)*have * sizeof *list);
        memcpy(list, ids, (size_t)count * sizeof *list);
    } else {
        memcpy(list + *have, ids, (size_t)count * sizeof *list);
    }
    *have += count;
    return spurion_ok();
}

static spurion_status template_ids(int32_t *ids, int *count, const json_t *special, const json_t *specials)
{
    const char *name;
    size_t bytes;
    const json_t *list;
    spurion_status st;

    SPURION_TRY(st, get_string(&name, &bytes, special, "id", "post_processor.single"));
    list = json_object_get(json_object_get(specials, name), "ids");
    if (!json_is_array(list)) {
        return spurion_error(SPURION_INVALID_ARGUMENT,
                             "tokenizer.json: expected the ids of '%.64s' in post_processor.special_tokens, found none", name);
    }
    for (size_t i = 0; i < json_array_size(list); i++) {
        if (*count == TOK_SPECIALS_MAX) {
            return spurion_error(SPURION_UNIMPLEMENTED,
                                 "tokenizer.json: expected at most %d ids from the post_processor on one side, found more",
                                 TOK_SPECIALS_MAX);
        }
        SPURION_TRY(st, get_id(&ids[(*count)++], json_array_get(list, i), "post_processor.special_tokens.ids"));
    }
out:
    return st;
}

static spurion_status load_template(spurion_tokenizer *t, const json_t *v)
{
    const json_t *single = json_object_get(v, "single"), *specials = json_object_get(v, "special_tokens");
    int32_t before[TOK_SPECIALS_MAX], after[TOK_SPECIALS_MAX];
    int before_count = 0, after_count = 0, sequences = 0;
    spurion_status st = spurion_ok();

    if (!json_is_array(single)) {
        return broken("post_processor.single", "an array", single);
    }
    for (size_t i = 0; i < json_array_size(single); i++) {
        const json_t *piece = json_array_get(single, i), *special = json_object_get(piece, "SpecialToken");
        const char *id = json_string_value(json_object_get(json_object_get(piece, "Sequence"), "id"));
        if (special != NULL) {
            SPURION_TRY(st, template_ids(sequences == 0 ? before : after, sequences == 0 ? &before_count : &after_count, special,
                                         specials));
        } else if (id != NULL && strcmp(id, "A") == 0 && sequences == 0) {
            sequences++;
        } else {
            return broken("post_processor.single", "SpecialToken pieces around one Sequence A", piece);
        }
    }
    if (sequences != 1) {
        return broken("post_processor.single", "one Sequence A", NULL);
    }
    SPURION_TRY(st, add_special(t, before, before_count, true));
    SPURION_TRY(st, add_special(t, after, after_count, false));
out:
    return st;
}

/* BertProcessing and RobertaProcessing: ["token", id] before and after. */
static spurion_status load_pair(spurion_tokenizer *t, const json_t *v)
{
    int32_t id = 0;
    spurion_status st;

    SPURION_TRY(st, get_id(&id, json_array_get(json_object_get(v, "cls"), 1), "post_processor.cls[1]"));
    SPURION_TRY(st, add_special(t, &id, 1, true));
    SPURION_TRY(st, get_id(&id, json_array_get(json_object_get(v, "sep"), 1), "post_processor.sep[1]"));
    SPURION_TRY(st, add_special(t, &id, 1, false));
out:
    return st;
}

static spurion_status load_post_processor(spurion_tokenizer *t, const json_t *v, int nesting)
{
    const char *type;
    spurion_status st = spurion_ok();

    if (v == NULL || (nesting == 0 && json_is_null(v))) {
        return st;
    }
    SPURION_TRY(st, get_type(&type, v, "post_processor"));
    if (strcmp(type, "ByteLevel") == 0) { /* offsets only */
        return st;
    }
    if (strcmp(type, "TemplateProcessing") == 0) {
        return load_template(t, v);
    }
    if (strcmp(type, "BertProcessing") == 0 || strcmp(type, "RobertaProcessing") == 0) {
        return load_pair(t, v);
    }
    if (strcmp(type, "Sequence") == 0) {
        const json_t *list = json_object_get(v, "processors");
        if (!json_is_array(list) || nesting >= TOK_NESTING_MAX) {
            return broken("post_processor.processors", "an array, nested at most 8 times", list);
        }
        for (size_t i = 0; i < json_array_size(list); i++) {
            SPURION_TRY(st, load_post_processor(t, json_array_get(list, i), nesting + 1));
        }
        return st;
    }
    st = unknown_part("post_processor", "Sequence, ByteLevel, TemplateProcessing, BertProcessing, RobertaProcessing", type);
out:
    return st;
}

/* ---- model ---- */

static spurion_status load_vocab(tok_bpe *bpe, const json_t *vocab)
{
    size_t bytes = 0, i = 0;
    void *iter;

    if (!json_is_object(vocab)) {
        return broken("model.vocab", "an object", vocab);
    }
    for (iter = json_object_iter((json_t *)vocab); iter != NULL; iter = json_object_iter_next((json_t *)vocab, iter)) {
        bytes += json_object_iter_key_len(iter);
    }
    bpe->blob = malloc(bytes + 1);
    bpe->entries = calloc(json_object_size(vocab) + 1, sizeof *bpe->entries);
    if (bpe->blob == NULL || bpe->entries == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for a vocabulary of %zu tokens", json_object_size(vocab));
    }
    bytes = 0;
    for (iter = json_object_iter((json_t *)vocab); iter != NULL; iter = json_object_iter_next((json_t *)vocab, iter), i++) {
        tok_entry *e = &bpe->entries[i];
        spurion_status st = get_id(&e->id, json_object_iter_value(iter), "model.vocab");
        if (st.code != SPURION_OK) {
            return st;
        }
        e->offset = (uint32_t)bytes;
        e->bytes = (uint32_t)json_object_iter_key_len(iter);
        memcpy(bpe->blob + bytes, json_object_iter_key(iter), e->bytes);
        bytes += e->bytes;
    }
    bpe->entry_count = i;
    return tok_bpe_index(bpe);
}

/* "a b", or ["a", "b"]; a line that begins with "#version" is no merge. */
static spurion_status load_merge(tok_bpe *bpe, uint32_t *rank, const json_t *merge)
{
    const json_t *a = json_array_get(merge, 0), *b = json_array_get(merge, 1);
    const char *s, *space;
    size_t n;

    if (json_is_string(merge)) {
        s = json_string_value(merge);
        n = json_string_length(merge);
        if (n >= 8 && memcmp(s, "#version", 8) == 0) {
            return spurion_ok();
        }
        space = memchr(s, ' ', n);
        if (space == NULL || memchr(space + 1, ' ', n - (size_t)(space + 1 - s)) != NULL) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "tokenizer.json: expected merge %u as \"a b\", found '%.64s'",
                                 (unsigned)*rank, s);
        }
        return tok_bpe_merge_add(bpe, (*rank)++, s, (size_t)(space - s), space + 1, n - (size_t)(space + 1 - s));
    }
    if (json_array_size(merge) != 2 || !json_is_string(a) || !json_is_string(b)) {
        return broken("model.merges", "\"a b\" or [\"a\", \"b\"]", merge);
    }
    return tok_bpe_merge_add(bpe, (*rank)++, json_string_value(a), json_string_length(a), json_string_value(b),
                             json_string_length(b));
}

static spurion_status load_merges(tok_bpe *bpe, const json_t *merges)
{
    uint32_t rank = 0;
    spurion_status st;

    if (!json_is_array(merges)) {
        return broken("model.merges", "an array", merges);
    }
    SPURION_TRY(st, tok_bpe_merges_init(bpe, json_array_size(merges)));
    for (size_t i = 0; i < json_array_size(merges); i++) {
        const json_t *merge = json_array_get(merges, i);
        if (json_typeof(merge) != json_typeof(json_array_get(merges, 0))) {
            return broken("model.merges", "all merges in one form", merge);
        }
        SPURION_TRY(st, load_merge(bpe, &rank, merge));
    }
out:
    return st;
}

static spurion_status load_model(tok_bpe *bpe, const json_t *v)
{
    const json_t *type = json_object_get(v, "type"), *dropout = json_object_get(v, "dropout");
    size_t unk_bytes;
    spurion_status st;

    if (!json_is_object(v)) {
        return broken("model", "an object", v);
    }
    if (type != NULL && (!json_is_string(type) || strcmp(json_string_value(type), "BPE") != 0)) {
        return unknown_part("model", "BPE", json_is_string(type) ? json_string_value(type) : kind_name(type));
    }
    if (dropout != NULL && !json_is_null(dropout) && !(json_is_number(dropout) && json_number_value(dropout) == 0)) {
        return broken("model.dropout", "null or 0 (ids must not depend on chance)", dropout);
    }
    SPURION_TRY(st, copy_string(&bpe->unk, &unk_bytes, json_object_get(v, "unk_token"), "model.unk_token"));
    SPURION_TRY(st, copy_string(&bpe->prefix, &bpe->prefix_bytes, json_object_get(v, "continuing_subword_prefix"),
                                "model.continuing_subword_prefix"));
    SPURION_TRY(
        st, copy_string(&bpe->suffix, &bpe->suffix_bytes, json_object_get(v, "end_of_word_suffix"), "model.end_of_word_suffix"));
    if (bpe->prefix_bytes > 64 || bpe->suffix_bytes > 64) {
        return spurion_error(SPURION_UNIMPLEMENTED,
                             "tokenizer.json: expected continuing_subword_prefix and end_of_word_suffix of at most 64 bytes, "
                             "found %zu and %zu",
                             bpe->prefix_bytes, bpe->suffix_bytes);
    }
    SPURION_TRY(st, get_bool(&bpe->fuse_unk, v, "fuse_unk", "model", 0));
    SPURION_TRY(st, get_bool(&bpe->byte_fallback, v, "byte_fallback", "model", 0));
    SPURION_TRY(st, get_bool(&bpe->ignore_merges, v, "ignore_merges", "model", 0));
    SPURION_TRY(st, load_vocab(bpe, json_object_get(v, "vocab")));
    SPURION_TRY(st, load_merges(bpe, json_object_get(v, "merges")));
out:
    return st;
}

/* ---- added tokens ---- */

static spurion_status load_added_one(tok_added *a, const json_t *v)
{
    int32_t id;
    spurion_status st;

    if (!json_is_object(v) || !json_is_string(json_object_get(v, "content"))) {
        return broken("added_tokens", "an object with content, id and five flags", v);
    }
    SPURION_TRY(st, get_id(&id, json_object_get(v, "id"), "added_tokens.id"));
    SPURION_TRY(st, get_bool(&a->single_word, v, "single_word", "added_tokens", -1));
    SPURION_TRY(st, get_bool(&a->lstrip, v, "lstrip", "added_tokens", -1));
    SPURION_TRY(st, get_bool(&a->rstrip, v, "rstrip", "added_tokens", -1));
    SPURION_TRY(st, get_bool(&a->normalized, v, "normalized", "added_tokens", -1));
    SPURION_TRY(st, get_bool(&a->special, v, "special", "added_tokens", -1));
    SPURION_TRY(st, copy_string(&a->content, &a->bytes, json_object_get(v, "content"), "added_tokens.content"));
    a->id = id;
out:
    return st;
}

/* What the library looks for in normalised text: the content, normalised like a text of its own. */
static spurion_status normalize_added(spurion_tokenizer *t, tok_added *a)
{
    const char *s = a->content;
    size_t n = a->bytes, first_bytes;
    tok_work w;
    spurion_status st;

    tok_work_init(&w, t, NULL);
    if (tok_normalize(&s, &n, &first_bytes, &w, a->content, a->bytes)) {
        a->normalized_content = malloc(n + 1);
        if (a->normalized_content == NULL) {
            (void)tok_fail_memory(&w);
        } else {
            memcpy(a->normalized_content, s, n);
            a->normalized_content[n] = '\0';
            a->normalized_bytes = n;
        }
    }
    st = w.error;
    tok_work_fini(&w);
    return st;
}

static int by_content(const void *a, const void *b)
{
    const tok_added *x = a, *y = b;
    size_t n = x->bytes < y->bytes ? x->bytes : y->bytes;
    int order = memcmp(x->content, y->content, n);
    return order != 0 ? order : x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

/* Ids as the library gives them: the vocabulary's, else counted on from its size. It only warns when the file says another id,
 * and models were trained with its ids, so they hold here too. */
static void place_added(spurion_tokenizer *t)
{
    int32_t next = (int32_t)t->bpe.entry_count;

    for (size_t i = 0; i < t->added_count; i++) {
        int32_t entry = tok_bpe_find(&t->bpe, t->added[i].content, t->added[i].bytes);
        t->added[i].id = entry >= 0 ? t->bpe.entries[entry].id : next++;
    }
}

static spurion_status load_added(spurion_tokenizer *t, const json_t *list)
{
    spurion_status st = spurion_ok();
    size_t count = json_array_size(list);

    if (list != NULL && !json_is_array(list)) {
        return broken("added_tokens", "an array", list);
    }
    t->added = calloc(count + 1, sizeof *t->added);
    if (t->added == NULL) {
        return spurion_error(SPURION_RESOURCE_EXHAUSTED, "no memory for %zu added tokens", count);
    }
    for (size_t i = 0; i < count; i++) {
        tok_added *a = &t->added[t->added_count];
        t->added_count++;
        SPURION_TRY(st, load_added_one(a, json_array_get(list, i)));
        if (a->bytes == 0) { /* the library passes over it */
            free(a->content);
            memset(a, 0, sizeof *a);
            t->added_count--;
        }
    }
    place_added(t);
    qsort(t->added, t->added_count, sizeof *t->added, by_content);
    for (size_t i = 0; i < t->added_count; i++) {
        tok_added *a = &t->added[i];
        if (i > 0 && by_content(a, a - 1) == 0) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "tokenizer.json: expected different added tokens, found '%.64s' twice",
                                 a->content);
        }
        if (a->normalized) {
            SPURION_TRY(st, normalize_added(t, a));
            SPURION_TRY(st, tok_trie_add(&t->normalized, a->normalized_content, a->normalized_bytes, (int32_t)i));
        } else {
            SPURION_TRY(st, tok_trie_add(&t->raw, a->content, a->bytes, (int32_t)i));
        }
    }
out:
    return st;
}

/* ---- decoder ---- */

/* A decoder tells how tokens are spelled: ByteLevel, or Metaspace, ByteFallback and Replace of U+2581 for SentencePiece. */
static void read_decoder(spurion_tokenizer *t, const json_t *v, int nesting)
{
    const char *type = json_string_value(json_object_get(v, "type"));
    const json_t *list = json_object_get(v, "decoders");
    const char *pattern = json_string_value(json_object_get(json_object_get(v, "pattern"), "String"));

    if (type == NULL || nesting > TOK_NESTING_MAX) {
        return;
    }
    t->byte_level = t->byte_level || strcmp(type, "ByteLevel") == 0;
    t->sentencepiece = t->sentencepiece || strcmp(type, "Metaspace") == 0 || strcmp(type, "ByteFallback") == 0 ||
                       (pattern != NULL && strcmp(pattern, METASPACE) == 0);
    for (size_t i = 0; i < json_array_size(list); i++) {
        read_decoder(t, json_array_get(list, i), nesting + 1);
    }
}

/* ---- the file ---- */

spurion_status tok_load(spurion_tokenizer *t, const char *json, size_t bytes)
{
    json_error_t error;
    json_t *root;
    const json_t *version;
    spurion_status st = spurion_json_shape_check(json, bytes, "tokenizer.json");

    if (st.code != SPURION_OK) {
        return st;
    }
    root = json_loadb(json, bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
    version = json_object_get(root, "version");
    if (root == NULL) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "tokenizer.json: expected JSON, found at line %d: %s", error.line,
                             error.text);
    }
    if (!json_is_object(root) ||
        (version != NULL && (!json_is_string(version) || strcmp(json_string_value(version), "1.0") != 0))) {
        st = broken("version", "an object of version \"1.0\"", version);
        goto out;
    }
    SPURION_TRY(st, load_model(&t->bpe, json_object_get(root, "model")));
    SPURION_TRY(st, load_normalizer(t, json_object_get(root, "normalizer"), 0));
    SPURION_TRY(st, load_pre_tokenizer(t, json_object_get(root, "pre_tokenizer"), 0));
    SPURION_TRY(st, load_post_processor(t, json_object_get(root, "post_processor"), 0));
    SPURION_TRY(st, load_added(t, json_object_get(root, "added_tokens")));
    SPURION_TRY(st, tok_bpe_finish(t));
    read_decoder(t, json_object_get(root, "decoder"), 0);
    for (int i = 0; i < t->normalizer_count; i++) {
        t->byte_level = t->byte_level || t->normalizers[i].kind == TOK_NORM_BYTE_LEVEL;
    }
    t->sentencepiece = !t->byte_level && (t->sentencepiece || t->bpe.byte_fallback);
    SPURION_TRY(st, tok_texts(t));
out:
    json_decref(root);
    return st;
}

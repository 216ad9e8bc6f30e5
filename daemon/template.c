/* The table of chat templates, and how one is rendered; see template.h. Thread: any. Memory: the caller's arena. */
#include "daemon/template.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/base/json.h"
#include "daemon/base/log.h"
#include "daemon/base/sha256.h"
#include "spurion/json_scan.h"

#define TEMPLATE_BYTES_MAX (1u << 20)
#define MESSAGES_MAX 4096
#define DATE_BLOCK "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n" /* the templates' own default date */

/* What stands around a message's text: before, after. "\1" in a text is the EOS token's own. */
typedef struct turn {
    const char *open, *close;
} turn;

typedef struct chat_row {
    const char *name;
    bool bos;                   /* the text begins with the BOS token's */
    turn turns[3];              /* by role; open NULL: the role is refused */
    const char *inner_close;    /* after an assistant's turn that is not the last; NULL: as the last */
    const char *answer;         /* opens the answer: a prefix of the assistant's turn */
    const char *system_default; /* a conversation without a system message gets this one; NULL: none */
    bool dated;                 /* a system block always stands first, and begins with a date */
    bool trim;                  /* contents without white space at their ends */
    bool alternate;             /* user and assistant take turns, the user first */
} chat_row;

#define CHATML \
    .turns = {{"<|im_start|>system\n", "<|im_end|>\n"}, {"<|im_start|>user\n", "<|im_end|>\n"}, {"<|im_start|>assistant\n", "<|im_end|>\n"}}, \
    .answer = "<|im_start|>assistant\n"
#define LLAMA3                                                                       \
    .bos = true, .trim = true, .answer = "<|start_header_id|>assistant<|end_header_id|>\n\n", \
    .turns = {{"<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"},     \
              {"<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"},       \
              {"<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"}}

static const chat_row rows[] = {
    [SPURION_TEMPLATE_NONE] = {.name = "none"},
    [SPURION_TEMPLATE_HH] = {.name = "hh"},
    [SPURION_TEMPLATE_AUTO] = {.name = "auto"},
    [SPURION_TEMPLATE_CHATML] = {.name = "chatml", CHATML},
    [SPURION_TEMPLATE_QWEN2] = {.name = "qwen2", CHATML, .system_default = "You are a helpful assistant."},
    [SPURION_TEMPLATE_QWEN2_5] = {.name = "qwen2.5", CHATML,
                                  .system_default = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},
    [SPURION_TEMPLATE_SMOLLM2] = {.name = "smollm2", CHATML,
                                  .system_default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"},
    [SPURION_TEMPLATE_LLAMA3] = {.name = "llama3", LLAMA3},
    [SPURION_TEMPLATE_LLAMA3_1] = {.name = "llama3.1", LLAMA3, .dated = true},
    [SPURION_TEMPLATE_GEMMA] = {.name = "gemma", .bos = true, .trim = true, .alternate = true, .answer = "<start_of_turn>model\n",
                                .turns = {{NULL, NULL}, {"<start_of_turn>user\n", "<end_of_turn>\n"}, {"<start_of_turn>model\n", "<end_of_turn>\n"}}},
    [SPURION_TEMPLATE_MISTRAL] = {.name = "mistral", .bos = true, .alternate = true, .answer = "",
                                  .turns = {{NULL, NULL}, {"[INST] ", " [/INST]"}, {"", "\1"}}},
    [SPURION_TEMPLATE_TULU] = {.name = "tulu", .answer = "<|assistant|>\n", .inner_close = "\1\n",
                               .turns = {{"<|system|>\n", "\n"}, {"<|user|>\n", "\n"}, {"<|assistant|>\n", "\1"}}},
    [SPURION_TEMPLATE_TULU2] = {.name = "tulu2", .answer = "<|assistant|>\n",
                                .turns = {{"<|system|>\n", "\n"}, {"<|user|>\n", "\n"}, {"<|assistant|>\n", "\1\n"}}},
    [SPURION_TEMPLATE_ZEPHYR] = {.name = "zephyr", .answer = "<|assistant|>\n",
                                 .turns = {{"<|system|>\n", "\1\n"}, {"<|user|>\n", "\1\n"}, {"<|assistant|>\n", "\1\n"}}},
    [SPURION_TEMPLATE_OPENASSISTANT] = {.name = "openassistant", .answer = "<|assistant|>",
                                        .turns = {{"<|system|>", "\1"}, {"<|prompter|>", "\1"}, {"<|assistant|>", "\1"}}},
};

#define ROW_COUNT ((int)(sizeof rows / sizeof *rows))

/* SHA-256 of the jinja texts in tests/golden/templates: what a checkpoint carries, to the byte. */
static const struct {
    const char *sha256;
    spurion_template kind;
} known[] = {
    {"153280e3ff55d19da1398bdb3914ee2a51b80429bfaedde11d7d216c39db80f3", SPURION_TEMPLATE_CHATML}, /* chatml.jinja */
    {"ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6", SPURION_TEMPLATE_GEMMA}, /* gemma.jinja */
    {"e10ca381b1ccc5cf9db52e371f3b6651576caee0a630b452e2816b2d404d4b65", SPURION_TEMPLATE_LLAMA3_1}, /* llama3.1.jinja */
    {"5816fce10444e03c2e9ee1ef8a4a1ea61ae7e69e438613f3b17b69d0426223a4", SPURION_TEMPLATE_LLAMA3_1}, /* llama3.2.jinja */
    {"ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122", SPURION_TEMPLATE_LLAMA3}, /* llama3.jinja */
    {"26a59556925c987317ce5291811ba3b7f32ec4c647c400c6cc7e3a9993007ba7", SPURION_TEMPLATE_MISTRAL}, /* mistral.jinja */
    {"7b9d54d601ef15142dca5d9e77a597fc144c44aadf30d5df8e373e30891cf323", SPURION_TEMPLATE_OPENASSISTANT}, /* openassistant.jinja */
    {"cd8e9439f0570856fd70470bf8889ebd8b5d1107207f67a5efb46e342330527f", SPURION_TEMPLATE_QWEN2_5}, /* qwen2.5.jinja */
    {"793202280c0910ab26bc6eb57c8212c2417324c6d8c4efd0d10d59092ab3e3eb", SPURION_TEMPLATE_QWEN2}, /* qwen2.jinja */
    {"872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788", SPURION_TEMPLATE_SMOLLM2}, /* smollm2.jinja */
    {"ac7498a36a719da630e99d48e6ebc4409de85a77556c2b6159eeb735bcbd11df", SPURION_TEMPLATE_TULU}, /* tulu.jinja */
    {"3ca51122b4090c66fd4fba8010c20719eb43d53495b6f0fe715a5f3d6a22995d", SPURION_TEMPLATE_TULU2}, /* tulu2.jinja */
    {"66291cf0045c2425a3a667cf3cbb7af2b11f09e025c02f97245323ab79119362", SPURION_TEMPLATE_ZEPHYR}, /* zephyr.jinja */
};

const char *spurion_template_name(spurion_template kind)
{
    return rows[kind].name;
}

/* --- the checkpoint's own --- */

/* A special token's text in tokenizer_config.json: a string, or an object with its content. */
static void special_text(char out[SPURION_SPECIAL_BYTES], const json_t *config, const char *key, int id, const spurion_tokenizer *tokenizer)
{
    const json_t *value = json_object_get(config, key);
    const char *text = json_string_value(json_is_object(value) ? json_object_get(value, "content") : value);
    size_t size = text ? strlen(text) : 0;
    spurion_status st = spurion_ok();

    if (!text && id >= 0) {
        st = spurion_tokenizer_token_bytes(&text, &size, tokenizer, id);
    }
    out[0] = '\0';
    if (text && st.code == SPURION_OK && size < SPURION_SPECIAL_BYTES) {
        memcpy(out, text, size);
        out[size] = '\0';
    }
}

/* The text of the template: tokenizer_config.json keeps one, or a list of named ones. Borrowed; NULL: none. */
static const char *own_text(const json_t *config)
{
    const json_t *value = json_object_get(config, "chat_template");
    const json_t *item;
    size_t i;

    json_array_foreach((json_t *)(uintptr_t)value, i, item) {
        const char *name = json_string_value(json_object_get(item, "name"));
        if (name && strcmp(name, "default") == 0) {
            return json_string_value(json_object_get(item, "template"));
        }
    }
    return json_string_value(value);
}

/* SHA-256 of the checkpoint's template in hex, "" when it has none. chat_template.jinja, as transformers 5 writes it, comes first. */
static spurion_status own_hash(char hex[65], const json_t *config, const char *dir)
{
    spurion_status st;
    spurion_sha256 h = {NULL};
    unsigned char digest[SPURION_SHA256_BYTES];
    char path[PATH_MAX], *file = NULL;
    const char *text = own_text(config);
    size_t size = text ? strlen(text) : 0;

    hex[0] = '\0';
    SPURION_TRY(st, spurion_path_join(path, sizeof path, dir, "chat_template.jinja"));
    if (access(path, F_OK) == 0) {
        SPURION_TRY(st, spurion_file_read(&file, &size, path, TEMPLATE_BYTES_MAX));
        text = file;
    }
    if (text) {
        SPURION_TRY(st, spurion_sha256_init(&h));
        SPURION_TRY(st, spurion_sha256_update(&h, text, size));
        SPURION_TRY(st, spurion_sha256_finish(digest, &h));
        spurion_hex(hex, digest, SPURION_SHA256_BYTES);
    }
out:
    spurion_sha256_fini(&h);
    free(file);
    return st;
}

static spurion_template kind_of_hash(const char *hex)
{
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(known[i].sha256, hex) == 0) {
            return known[i].kind;
        }
    }
    return SPURION_TEMPLATE_AUTO;
}

static spurion_status resolve(spurion_chat *out, spurion_template wanted, const char *hex, const char *dir)
{
    spurion_template own = kind_of_hash(hex);
    char names[256];
    size_t at = 0;

    out->kind = wanted == SPURION_TEMPLATE_AUTO ? own : wanted;
    if (out->kind == SPURION_TEMPLATE_AUTO) {
        for (int i = SPURION_TEMPLATE_CHATML; i < ROW_COUNT && at < sizeof names; i++) {
            at += (size_t)snprintf(names + at, sizeof names - at, "%s%s", i == SPURION_TEMPLATE_CHATML ? "" : ", ", rows[i].name);
        }
        return spurion_error(SPURION_INVALID_ARGUMENT,
                             "%s: chat_template: expected one that is known, found %s%s; model.template names how to render it: %s",
                             spurion_path_tail(dir), hex[0] ? "an unknown one of sha256 " : "none", hex, names);
    }
    if (wanted != SPURION_TEMPLATE_AUTO && wanted != SPURION_TEMPLATE_NONE && own != SPURION_TEMPLATE_AUTO && own != wanted) {
        spurion_log_warn("TEMPLATE-DIFFERS", "model.template is %s, the checkpoint's own chat_template is %s", rows[wanted].name, rows[own].name);
    }
    return spurion_ok();
}

static bool needs_eos(const chat_row *row)
{
    for (int i = 0; i < 3; i++) {
        if (row->turns[i].close && strchr(row->turns[i].close, '\1')) {
            return true;
        }
    }
    return false;
}

spurion_status spurion_chat_open(spurion_chat *out, spurion_template wanted, const char *dir, const spurion_model_config *model,
                                 const spurion_tokenizer *tokenizer)
{
    spurion_status st;
    char path[PATH_MAX], hex[65];
    json_t *config = NULL;

    memset(out, 0, sizeof *out);
    out->kind = wanted;
    if (wanted == SPURION_TEMPLATE_NONE || wanted == SPURION_TEMPLATE_HH) {
        return spurion_ok();
    }
    SPURION_TRY(st, spurion_path_join(path, sizeof path, dir, "tokenizer_config.json"));
    if (access(path, F_OK) == 0) {
        SPURION_TRY(st, spurion_json_read(&config, path, SPURION_JSON_INDEX_BYTES_MAX));
    }
    SPURION_TRY(st, own_hash(hex, config, dir));
    SPURION_TRY(st, resolve(out, wanted, hex, dir));
    special_text(out->bos, config, "bos_token", model->bos, tokenizer);
    special_text(out->eos, config, "eos_token", model->eos_count ? model->eos[0] : -1, tokenizer);
    if ((rows[out->kind].bos && !out->bos[0]) || (needs_eos(&rows[out->kind]) && !out->eos[0])) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "%s: template %s: expected bos_token and eos_token in tokenizer_config.json, found none",
                           spurion_path_tail(dir), rows[out->kind].name);
    }
out:
    json_decref(config);
    return st;
}

/* --- messages --- */

static void *arena_bytes(void *context, size_t bytes)
{
    return spurion_arena_take(context, bytes);
}

static spurion_status no_memory(void)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected memory for the messages, found the rollout's budget spent");
}

static spurion_status message_read(spurion_message *out, const spurion_memory *m, spurion_json_value object, int at)
{
    static const char *const names[] = {"system", "user", "assistant"};
    spurion_json_value key, value, role = {SPURION_JSON_NONE, NULL, 0}, content = role;
    spurion_json_walk walk;
    spurion_status st;

    if (object.kind != SPURION_JSON_OBJECT) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "messages: message %d: expected an object, found %s", at, spurion_json_kind_name(object.kind));
    }
    for (walk = spurion_json_enter(object); spurion_json_next(&walk, &key, &value);) {
        role = spurion_json_is(key, "role") ? value : role;
        content = spurion_json_is(key, "content") ? value : content;
    }
    if (content.kind != SPURION_JSON_STRING) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "messages: message %d: content: expected a text, found %s", at,
                             spurion_json_kind_name(content.kind));
    }
    for (int i = 0; i < 3; i++) {
        if (role.kind == SPURION_JSON_STRING && spurion_json_is(role, names[i])) {
            out->role = (spurion_role_kind)i;
            st = spurion_json_string(&out->content, m, content);
            return st.code == SPURION_OK ? st : spurion_error((spurion_code)st.code, "messages: message %d: content: %s", at, st.message);
        }
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "messages: message %d: role: expected system, user or assistant, found %.*s", at,
                         role.kind == SPURION_JSON_STRING ? (int)(role.size < 40 ? role.size : 40) : 4,
                         role.kind == SPURION_JSON_STRING ? role.data : "none");
}

spurion_status spurion_messages_read(spurion_message **out, int *count, spurion_arena *arena, spurion_bytes json)
{
    spurion_status st;
    spurion_json_value array, item;
    spurion_json_walk walk;
    spurion_memory m = {arena_bytes, arena};
    int n = 0;

    SPURION_TRY(st, spurion_json_check(&array, json.data, json.size));
    for (walk = spurion_json_enter(array); spurion_json_next(&walk, NULL, &item);) {
        n++;
    }
    if (n < 2 || n > MESSAGES_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "messages: expected 2 to %d messages, found %d", MESSAGES_MAX, n);
    }
    *out = spurion_arena_take_array(arena, (size_t)n, sizeof **out);
    if (!*out) {
        return no_memory();
    }
    *count = 0;
    for (walk = spurion_json_enter(array); spurion_json_next(&walk, NULL, &item); (*count)++) {
        SPURION_TRY(st, message_read(&(*out)[*count], &m, item, *count));
    }
    if ((*out)[n - 1].role != SPURION_ROLE_ASSISTANT) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "messages: expected the last one from the assistant, found %s",
                           (*out)[n - 1].role == SPURION_ROLE_USER ? "user" : "system");
    }
out:
    return st;
}

/* --- rendering --- */

/* Text in the making; data NULL counts only. */
typedef struct sheet {
    char *data;
    size_t at;
} sheet;

static void put(sheet *s, const char *text, size_t size)
{
    if (s->data) {
        memcpy(s->data + s->at, text, size);
    }
    s->at += size;
}

/* A text of the table, the EOS token's in its place. */
static void put_form(sheet *s, const char *form, const spurion_chat *chat)
{
    const char *hole = strchr(form, '\1');

    if (!hole) {
        put(s, form, strlen(form));
        return;
    }
    put(s, form, (size_t)(hole - form));
    put(s, chat->eos, strlen(chat->eos));
    put(s, hole + 1, strlen(hole + 1));
}

/* Length of the white space (as Python's str.strip knows it) that begins at p, or 0. */
static size_t space_at(const unsigned char *p, size_t left)
{
    if (left >= 1 && ((p[0] >= 0x09 && p[0] <= 0x0d) || (p[0] >= 0x1c && p[0] <= 0x20))) {
        return 1;
    }
    if (left >= 2 && p[0] == 0xc2 && (p[1] == 0x85 || p[1] == 0xa0)) {
        return 2;
    }
    if (left >= 3 && ((p[0] == 0xe1 && p[1] == 0x9a && p[2] == 0x80) || (p[0] == 0xe3 && p[1] == 0x80 && p[2] == 0x80) ||
                      (p[0] == 0xe2 && p[1] == 0x81 && p[2] == 0x9f) ||
                      (p[0] == 0xe2 && p[1] == 0x80 && ((p[2] >= 0x80 && p[2] <= 0x8a) || p[2] == 0xa8 || p[2] == 0xa9 || p[2] == 0xaf)))) {
        return 3;
    }
    return 0;
}

static spurion_bytes trimmed(spurion_bytes text)
{
    const unsigned char *p = (const unsigned char *)text.data;
    size_t n;

    while ((n = space_at(p, text.size)) > 0) {
        p += n;
        text.size -= n;
    }
    for (bool again = true; again;) {
        again = false;
        for (size_t back = 1; back <= 3 && back <= text.size; back++) {
            if (space_at(p + text.size - back, back) == back) {
                text.size -= back;
                again = true;
                break;
            }
        }
    }
    text.data = (const char *)p;
    return text;
}

static void put_content(sheet *s, const chat_row *row, spurion_bytes content)
{
    spurion_bytes text = row->trim ? trimmed(content) : content;
    put(s, text.data, text.size);
}

static spurion_status check_roles(const chat_row *row, const spurion_message *messages, int count)
{
    static const char *const names[] = {"system", "user", "assistant"};

    for (int i = 0; i < count; i++) {
        spurion_role_kind role = messages[i].role, wanted = i % 2 == 0 ? SPURION_ROLE_USER : SPURION_ROLE_ASSISTANT;
        if (!row->turns[role].open) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "messages: message %d: template %s: expected user or assistant, found %s", i, row->name,
                                 names[role]);
        }
        if (row->alternate && role != wanted) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "messages: message %d: template %s: expected %s (they take turns), found %s", i,
                                 row->name, names[wanted], names[role]);
        }
    }
    return spurion_ok();
}

/* The conversation but its last message, and the opening of the answer. */
static void put_prompt(sheet *s, const spurion_chat *chat, const chat_row *row, const spurion_message *messages, int count)
{
    int first = 0;

    if (row->bos) {
        put_form(s, chat->bos, chat);
    }
    if (row->dated) {
        put_form(s, row->turns[SPURION_ROLE_SYSTEM].open, chat);
        put_form(s, DATE_BLOCK, chat);
        if (messages[0].role == SPURION_ROLE_SYSTEM) {
            put_content(s, row, messages[0].content);
            first = 1;
        }
        put_form(s, row->turns[SPURION_ROLE_SYSTEM].close, chat);
    } else if (row->system_default && messages[0].role != SPURION_ROLE_SYSTEM) {
        put_form(s, row->turns[SPURION_ROLE_SYSTEM].open, chat);
        put_form(s, row->system_default, chat);
        put_form(s, row->turns[SPURION_ROLE_SYSTEM].close, chat);
    }
    for (int i = first; i < count - 1; i++) {
        const turn *t = &row->turns[messages[i].role];
        put_form(s, t->open, chat);
        put_content(s, row, messages[i].content);
        put_form(s, messages[i].role == SPURION_ROLE_ASSISTANT && row->inner_close ? row->inner_close : t->close, chat);
    }
    put_form(s, row->answer, chat);
}

/* hh, the form of the HH pairs: a conversation of several turns is one text. */
static spurion_status put_hh(sheet *s, const spurion_message *messages, int count)
{
    static const char human[] = "\n\nHuman: ", assistant[] = "\n\nAssistant: ";

    for (int i = 0; i < count - 1; i++) {
        bool user = messages[i].role == SPURION_ROLE_USER;
        if (messages[i].role == SPURION_ROLE_SYSTEM) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "messages: message %d: template hh: expected user or assistant, found system", i);
        }
        put(s, user ? human : assistant, strlen(user ? human : assistant));
        put(s, messages[i].content.data, messages[i].content.size);
    }
    put(s, assistant, strlen(assistant) - 1);
    return spurion_ok();
}

static spurion_status put_all(sheet *s, const spurion_chat *chat, const spurion_message *messages, int count)
{
    if (chat->kind == SPURION_TEMPLATE_HH) {
        return put_hh(s, messages, count);
    }
    put_prompt(s, chat, &rows[chat->kind], messages, count);
    return spurion_ok();
}

/* The answer's own part of the text: its content and what closes the turn. */
static void put_answer(sheet *s, const spurion_chat *chat, const spurion_message *last)
{
    const chat_row *row = &rows[chat->kind];

    if (chat->kind == SPURION_TEMPLATE_HH) {
        if (last->content.size == 0 || last->content.data[0] != ' ') {
            put(s, " ", 1);
        }
        put(s, last->content.data, last->content.size);
        return;
    }
    put_content(s, row, last->content);
    put_form(s, row->turns[SPURION_ROLE_ASSISTANT].close, chat);
}

spurion_status spurion_chat_render(spurion_bytes *prompt, spurion_bytes *completion, uint32_t *warnings, spurion_arena *arena,
                                   const spurion_chat *chat, const spurion_message *messages, int count)
{
    spurion_status st;
    sheet size = {NULL, 0}, answer = {NULL, 0}, text;

    if (chat->kind == SPURION_TEMPLATE_NONE) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "messages: expected prompt and completion with model.template none, found messages");
    }
    if (chat->kind != SPURION_TEMPLATE_HH) {
        SPURION_TRY(st, check_roles(&rows[chat->kind], messages, count));
    }
    SPURION_TRY(st, put_all(&size, chat, messages, count));
    put_answer(&answer, chat, &messages[count - 1]);
    text = (sheet){spurion_arena_take(arena, size.at + answer.at + 1), 0};
    if (!text.data) {
        return no_memory();
    }
    *prompt = (spurion_bytes){text.data, size.at};
    *completion = (spurion_bytes){text.data + size.at, answer.at};
    SPURION_TRY(st, put_all(&text, chat, messages, count));
    put_answer(&text, chat, &messages[count - 1]);
    *warnings |= rows[chat->kind].dated ? SPURION_WARN_DATE_FIXED : 0;
out:
    return st;
}

/* Chat templates: how messages become the text that a reward model was trained on. Each is a row of a table whose rendering equals what
 * transformers' apply_chat_template makes of the published jinja (tests/golden/test_templates.py); a checkpoint's own template is known
 * by the SHA-256 of its text. Thread: any, once open. Memory: the two special texts. */
#ifndef SPURION_TEMPLATE_H
#define SPURION_TEMPLATE_H

#include <stdio.h>

#include "daemon/base/arena.h"
#include "daemon/config.h"
#include "daemon/model/config.h"
#include "daemon/model/tokenizer.h"

#define SPURION_SPECIAL_BYTES 64

/* model.template of a checkpoint, resolved. */
typedef struct spurion_chat {
    spurion_template kind;   /* never AUTO */
    char bos[SPURION_SPECIAL_BYTES], eos[SPURION_SPECIAL_BYTES]; /* texts of the two tokens; "" where there is none */
} spurion_chat;

/* Resolves `wanted` for the checkpoint in dir. AUTO: INVALID_ARGUMENT when it has no template of its own, or one that is not known
 * (the message gives its SHA-256, and names the known ones). A named one that differs from the checkpoint's own is logged. */
spurion_status spurion_chat_open(spurion_chat *out, spurion_template wanted, const char *dir, const spurion_model_config *model,
                                 const spurion_tokenizer *tokenizer) SPURION_MUST_USE;

typedef enum spurion_role_kind { SPURION_ROLE_SYSTEM, SPURION_ROLE_USER, SPURION_ROLE_ASSISTANT } spurion_role_kind;

typedef struct spurion_message {
    spurion_role_kind role;
    spurion_bytes content;
} spurion_message;

/* Reads a JSON array of {"role", "content"} into the arena: at least one before the last, which is the assistant's.
 * INVALID_ARGUMENT names the message, counted from 0. */
spurion_status spurion_messages_read(spurion_message **out, int *count, spurion_arena *arena, spurion_bytes json) SPURION_MUST_USE;

/* prompt ++ completion = the rendered conversation; prompt = the messages before the last, and what opens the answer. INVALID_ARGUMENT for
 * roles that the template refuses; templates NONE (two messages only by texts) and HH render their own forms. *warnings gains bits. */
spurion_status spurion_chat_render(spurion_bytes *prompt, spurion_bytes *completion, uint32_t *warnings, spurion_arena *arena,
                                   const spurion_chat *chat, const spurion_message *messages, int count) SPURION_MUST_USE;

/* Name as in model.template. */
const char *spurion_template_name(spurion_template kind);

#endif

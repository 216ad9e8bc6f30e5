/* The reward servers that trainers know, as JSON: what they ask, and how they want it answered (docs/http.md has every field and where it was
 * read). Pure: knows no HTTP, no engine. Thread: any. Memory: the caller's. */
#ifndef SPURION_DIALECT_H
#define SPURION_DIALECT_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/config.h"
#include "spurion/codec.h"
#include "spurion/json.h"
#include "spurion/messages.h"

#define SPURION_ASK_ROLLOUTS_MAX 1024 /* texts of one request */

typedef enum spurion_dialect {
    SPURION_DIALECT_OPENRLHF,       /* /get_reward */
    SPURION_DIALECT_SLIME,          /* /remote_rm: the number alone */
    SPURION_DIALECT_SLIME_VERDICT,  /* /remote_rm/verdict: an object, for --reward-key */
    SPURION_DIALECT_CLASSIFY,       /* vLLM's /classify; with `text` SGLang's */
    SPURION_DIALECT_V1_CLASSIFY,    /* vLLM's form only */
    SPURION_DIALECT_POOLING,        /* vLLM's */
    SPURION_DIALECT_EMBEDDINGS,     /* SGLang's /v1/embeddings */
    SPURION_DIALECT_PREDICT,        /* text-embeddings-inference's */
    SPURION_DIALECT_SGLANG_CLASSIFY /* found out from the body */
} spurion_dialect;

/* What is asked. Names, step and identity of the rollouts are not: these requests have none. */
typedef struct spurion_ask {
    spurion_dialect dialect;
    const char *field;       /* that holds the texts: "query", "input", ... for messages */
    bool single;             /* one text without a list around it, answered so */
    bool squash;             /* sigmoid of the reward, asked for in words */
    spurion_bytes model, request_id; /* echoed; absent: none */
    spurion_rollout *rollouts; /* (count) */
    bool *divided;           /* (count) it was told, or found, where the completion begins */
    spurion_bytes *prompts;  /* (count) what comes before the completion: equal ones are of one group; of no meaning where not divided */
    int32_t count;
} spurion_ask;

/* How texts are to be understood. */
typedef struct spurion_ask_options {
    spurion_http_form form;
    const char *completion_after; /* NULL: the usual chat headers */
    bool truncates;               /* model.on_too_long is truncate_prompt */
} spurion_ask_options;

/* Reads a body. INVALID_ARGUMENT names the field, what was expected and what was found. */
spurion_status spurion_ask_read(spurion_ask *out, const spurion_memory *m, spurion_dialect dialect, spurion_bytes body,
                                const spurion_ask_options *options) SPURION_MUST_USE;

/* Appends the answer: verdicts (ask->count), none refused. created_s: wall clock, for those that tell it. */
void spurion_ask_write(spurion_text *out, const spurion_ask *ask, const spurion_verdict *verdicts, spurion_http_reward reward,
                       int64_t created_s);

#endif

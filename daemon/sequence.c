/* Texts or ids of a rollout to its token sequence; see sequence.h. Thread: any. Memory: results in the job's arena; token ids of the
 * prompt alone and of the joined text from malloc, freed here. */
#include "daemon/sequence.h"

#include <string.h>

#include "spurion/codec.h"

/* A sequence in the making: ids are ours and still change. */
typedef struct draft {
    int32_t *ids;
    int64_t count, start, leading, scored;
    uint32_t warnings;
    bool truncated, chat; /* chat: a chat template made the text */
} draft;

static spurion_status no_memory(void)
{
    return spurion_error(SPURION_RESOURCE_EXHAUSTED, "expected memory for the token sequence, found the rollout's budget spent");
}

static bool begins(spurion_bytes text, const char *with, size_t size)
{
    return text.size >= size && !memcmp(text.data, with, size);
}

static bool ends(spurion_bytes text, const char *with, size_t size)
{
    return text.size >= size && !memcmp(text.data + text.size - size, with, size);
}

/* One text of the three parts, in the arena. */
static bool join(spurion_bytes *out, spurion_arena *arena, spurion_bytes a, spurion_bytes b, spurion_bytes c)
{
    size_t size = a.size + b.size + c.size;
    char *data = spurion_arena_take(arena, size + 1);

    if (data) {
        memcpy(data, a.data, a.size);
        memcpy(data + a.size, b.data, b.size);
        memcpy(data + a.size + b.size, c.data, c.size);
    }
    *out = (spurion_bytes){data, size};
    return data != NULL;
}

/* A chat template around messages, or around prompt and completion as one user's and one assistant's. */
static spurion_status render(spurion_bytes *prompt, spurion_bytes *completion, draft *d, spurion_job *job, const spurion_chat *chat)
{
    spurion_status st;
    spurion_message pair[2] = {{SPURION_ROLE_USER, *prompt}, {SPURION_ROLE_ASSISTANT, *completion}}, *messages = pair;
    int count = 2;

    if (job->rollout.messages.data) {
        SPURION_TRY(st, spurion_messages_read(&messages, &count, &job->arena, job->rollout.messages));
    }
    if (messages[count - 1].content.size == 0) {
        st = spurion_error(SPURION_INVALID_ARGUMENT, "completion: expected a text, found an empty one");
        goto out;
    }
    SPURION_TRY(st, spurion_chat_render(prompt, completion, &d->warnings, &job->arena, chat, messages, count));
    d->chat = chat->kind != SPURION_TEMPLATE_HH;
out:
    return st;
}

/* Puts prompt and completion into template none or hh. */
static spurion_status apply_template(spurion_bytes *prompt, spurion_bytes *completion, spurion_arena *arena, spurion_template kind)
{
    static const char human[] = "\n\nHuman:", assistant[] = "\n\nAssistant:";
    const spurion_bytes before = {"\n\nHuman: ", 9}, after = {assistant, sizeof assistant - 1}, space = {" ", 1}, none = {"", 0};

    if (kind == SPURION_TEMPLATE_NONE) {
        return spurion_ok();
    }
    if (!(begins(*prompt, human, sizeof human - 1) && ends(*prompt, assistant, sizeof assistant - 1)) &&
        !join(prompt, arena, before, *prompt, after)) {
        return no_memory();
    }
    if (!begins(*completion, " ", 1) && !join(completion, arena, space, *completion, none)) {
        return no_memory();
    }
    return spurion_ok();
}

static spurion_status check_text(const char *name, spurion_bytes text)
{
    size_t bad = spurion_utf8_valid_prefix(text.data, text.size);

    if (text.size > SPURION_TEXT_BYTES_MAX) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected at most %u bytes, found %zu", name, SPURION_TEXT_BYTES_MAX, text.size);
    }
    if (bad < text.size) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected UTF-8, found byte 0x%02x at offset %zu", name,
                             (unsigned char)text.data[bad], bad);
    }
    return spurion_ok();
}

/* Leading specials that ids begin with: the tokenizer's own, or the BOS id alone. */
static int64_t leading_of(const draft *d, const spurion_sequence_rules *rules)
{
    int count;
    const int32_t *specials = spurion_tokenizer_leading(rules->tokenizer, &count);

    if (count && d->count >= count && !memcmp(d->ids, specials, (size_t)count * sizeof *specials)) {
        return count;
    }
    return d->count && rules->model->bos >= 0 && d->ids[0] == rules->model->bos;
}

/* True when the prompt's text begins with the text of the BOS token. */
static bool begins_with_bos(spurion_bytes prompt, const spurion_sequence_rules *rules)
{
    const char *text;
    size_t size;
    spurion_status st;

    if (rules->model->bos < 0) {
        return false;
    }
    st = spurion_tokenizer_token_bytes(&text, &size, rules->tokenizer, rules->model->bos);
    return st.code == SPURION_OK && size && begins(prompt, text, size);
}

/* leading specials ++ ids of the joined text ++ eos, as far as the form wants them. */
static spurion_status lay_out(draft *d, spurion_arena *arena, const spurion_sequence_rules *rules, const spurion_ids *before,
                              const spurion_ids *both, bool bos_once, spurion_text_form form)
{
    int count;
    const int32_t *specials = spurion_tokenizer_leading(rules->tokenizer, &count);
    int64_t first = 0, start = 0;

    count = form == SPURION_FORM_VERBATIM ? 0 : count;
    d->ids = spurion_arena_take_array(arena, (size_t)count + both->count + 1, sizeof *d->ids);
    if (!d->ids) {
        return no_memory();
    }
    for (int i = 0; i < count; i++) {
        if (!bos_once || specials[i] != rules->model->bos) {
            d->ids[first++] = specials[i];
        }
    }
    if (both->count) {
        memcpy(d->ids + first, both->data, both->count * sizeof *d->ids);
    }
    d->count = first + (int64_t)both->count;
    if (rules->config->model.append_eos && form == SPURION_FORM_PLAIN) {
        for (int i = 0; d->chat && i < rules->model->eos_count && d->count > 0; i++) {
            d->warnings |= d->ids[d->count - 1] == rules->model->eos[i] ? SPURION_WARN_EOS_DOUBLED : 0;
        }
        d->ids[d->count++] = rules->model->eos[0];
    }
    while (start < (int64_t)before->count && start < (int64_t)both->count && before->data[start] == both->data[start]) {
        start++;
    }
    if (start < (int64_t)before->count) {
        d->warnings |= SPURION_WARN_BOUNDARY;
    }
    d->start = first + start;
    return start < (int64_t)both->count
               ? spurion_ok()
               : spurion_error(SPURION_INVALID_ARGUMENT, "completion: expected at least one token of its own, found none");
}

static spurion_status from_texts(draft *d, spurion_job *job, const spurion_sequence_rules *rules)
{
    spurion_bytes prompt = job->rollout.prompt, completion = job->rollout.completion, joined;
    spurion_ids before = {NULL, 0, 0}, both = {NULL, 0, 0};
    spurion_text_form form = job->rollout.text_form;
    bool bos_once;
    spurion_status st;

    if (completion.size == 0 && !job->rollout.messages.data) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "completion: expected a text, found an empty one");
    }
    SPURION_TRY(st, check_text("prompt", prompt));
    SPURION_TRY(st, check_text("completion", completion));
    if (job->rollout.messages.data || (form == SPURION_FORM_PLAIN && rules->chat->kind > SPURION_TEMPLATE_AUTO)) {
        SPURION_TRY(st, render(&prompt, &completion, d, job, rules->chat));
    } else if (form == SPURION_FORM_PLAIN) {
        SPURION_TRY(st, apply_template(&prompt, &completion, &job->arena, rules->chat->kind));
    }
    if (!join(&joined, &job->arena, prompt, completion, (spurion_bytes){"", 0})) {
        st = no_memory();
        goto out;
    }
    bos_once = form != SPURION_FORM_VERBATIM && begins_with_bos(form == SPURION_FORM_PLAIN ? prompt : joined, rules);
    if (bos_once) {
        d->warnings |= SPURION_WARN_BOS_ONCE;
    }
    SPURION_TRY(st, spurion_tokenizer_encode(&before, rules->tokenizer, prompt.data, prompt.size));
    SPURION_TRY(st, spurion_tokenizer_encode(&both, rules->tokenizer, joined.data, joined.size));
    SPURION_TRY(st, lay_out(d, &job->arena, rules, &before, &both, bos_once, form));
    if (form != SPURION_FORM_PLAIN && prompt.size == 0) { /* nobody said where the completion begins: not with the specials */
        int64_t leading = leading_of(d, rules);
        d->start = leading > d->start && leading < d->count ? leading : d->start;
    }
out:
    spurion_ids_fini(&before);
    spurion_ids_fini(&both);
    return st;
}

static spurion_status check_ids(const char *name, const int32_t *ids, int64_t count, int vocab)
{
    for (int64_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= vocab) {
            return spurion_error(SPURION_INVALID_ARGUMENT, "%s: expected ids from 0 to %d, found %d at place %lld", name, vocab - 1, ids[i],
                                 (long long)i);
        }
    }
    return spurion_ok();
}

static spurion_status from_ids(draft *d, spurion_job *job, const spurion_sequence_rules *rules)
{
    const spurion_rollout *r = &job->rollout;
    spurion_status st = check_ids("prompt_ids", r->prompt_ids, r->prompt_id_count, rules->vocab);

    if (st.code == SPURION_OK) {
        st = check_ids("completion_ids", r->completion_ids, r->completion_id_count, rules->vocab);
    }
    if (st.code != SPURION_OK) {
        return st;
    }
    if (r->completion_id_count == 0) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "completion_ids: expected at least one token, found none");
    }
    d->start = r->prompt_id_count;
    d->count = d->start + r->completion_id_count;
    d->ids = spurion_arena_take_array(&job->arena, (size_t)d->count, sizeof *d->ids);
    if (!d->ids) {
        return no_memory();
    }
    if (d->start) {
        memcpy(d->ids, r->prompt_ids, (size_t)d->start * sizeof *d->ids);
    }
    memcpy(d->ids + d->start, r->completion_ids, (size_t)r->completion_id_count * sizeof *d->ids);
    return spurion_ok();
}

/* Makes the sequence fit into tokens_max: refuses, or drops the prompt's oldest tokens after the leading specials. */
static spurion_status fit(draft *d, const spurion_sequence_rules *rules)
{
    int64_t excess = d->count - rules->tokens_max, tail = d->count - d->start;

    if (rules->tail_max < rules->tokens_max && tail > rules->tail_max) {
        return spurion_error(SPURION_OUT_OF_RANGE, "expected at most %d tokens after the prompt (one pass; engine.tokens_max and engine.memory_max set it), "
                             "found %lld", rules->tail_max, (long long)tail);
    }
    if (excess <= 0) {
        return spurion_ok();
    }
    if (rules->config->model.on_too_long != SPURION_TOO_LONG_TRUNCATE) {
        return spurion_error(SPURION_OUT_OF_RANGE, "expected at most %d tokens, found %lld", rules->tokens_max, (long long)d->count);
    }
    if (excess > d->start - d->leading) {
        return spurion_error(SPURION_OUT_OF_RANGE, "expected at most %d tokens without the prompt, found %lld", rules->tokens_max,
                             (long long)(d->leading + d->count - d->start));
    }
    memmove(d->ids + d->leading, d->ids + d->leading + excess, (size_t)(d->count - d->leading - excess) * sizeof *d->ids);
    d->count -= excess;
    d->start -= excess;
    d->truncated = true;
    return spurion_ok();
}

/* Texts and ids exclude each other; texts need both halves, ids at least a completion. */
static spurion_status check_kind(bool *ids, const spurion_rollout *r)
{
    bool prompt = r->prompt.data, completion = r->completion.data;

    *ids = r->prompt_ids || r->completion_ids;
    if (r->messages.data && !*ids && !prompt && !completion) {
        return spurion_ok();
    }
    if (*ids ? !prompt && !completion : prompt && completion) {
        return spurion_ok();
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "expected prompt and completion, or prompt_ids and completion_ids; found%s%s%s%s%s",
                         prompt ? " prompt" : "", completion ? " completion" : "", r->prompt_ids ? " prompt_ids" : "",
                         r->completion_ids ? " completion_ids" : "", *ids || prompt || completion ? "" : " none");
}

/* The position that the head reads. */
static spurion_status score_where(draft *d, const spurion_model_config *m)
{
    int64_t at = d->count - 1;

    d->scored = at;
    if (m->pooling == SPURION_POOL_LAST && m->pad >= 0 && d->ids[at] == m->pad) {
        d->warnings |= SPURION_WARN_PAD_SCORED;
    }
    if (m->pooling == SPURION_POOL_LAST_NON_PAD && m->pad >= 0) {
        while (at >= d->start && d->ids[at] == m->pad) {
            at--;
        }
        d->scored = at;
    }
    for (int64_t i = d->count - 1; m->pooling == SPURION_POOL_FIRST_EOS && i >= d->start; i--) {
        for (int k = 0; k < m->eos_count; k++) {
            d->scored = d->ids[i] == m->eos[k] ? i : d->scored;
        }
    }
    return d->scored >= d->start
               ? spurion_ok()
               : spurion_error(SPURION_INVALID_ARGUMENT, "completion: expected a token other than pad_token_id (%d), found none", m->pad);
}

static spurion_status make(draft *d, spurion_job *job, const spurion_sequence_rules *rules)
{
    spurion_status st;
    bool ids;

    SPURION_TRY(st, check_kind(&ids, &job->rollout));
    SPURION_TRY(st, ids ? from_ids(d, job, rules) : from_texts(d, job, rules));
    SPURION_TRY(st, check_ids("token sequence", d->ids, d->count, rules->vocab));
    d->leading = leading_of(d, rules);
    if (d->leading > d->start) {
        d->leading = d->start;
    }
    SPURION_TRY(st, fit(d, rules));
    SPURION_TRY(st, score_where(d, rules->model));
out:
    return st;
}

void spurion_sequence_make(spurion_job *job, const spurion_sequence_rules *rules)
{
    draft d = {.ids = NULL};
    spurion_verdict *v = &job->verdict;
    spurion_status st;

    if (v->code != SPURION_OK) {
        return;
    }
    if (rules->config->model.append_eos && rules->model->eos_count == 0) {
        st = spurion_error(SPURION_FAILED_PRECONDITION, "model.append_eos: expected eos_token_id in config.json, found none");
    } else {
        st = make(&d, job, rules);
    }
    if (st.code != SPURION_OK) {
        spurion_job_refuse(job, &st);
        return;
    }
    job->ids = d.ids;
    job->token_count = (int32_t)d.count;
    job->completion_start = (int32_t)d.start;
    job->leading_count = (int32_t)d.leading;
    v->token_count = (int32_t)d.count;
    job->scored = (int32_t)d.scored;
    v->scored_position = rules->model->pooling == SPURION_POOL_MEAN ? -1 : (int32_t)d.scored;
    v->truncated = d.truncated;
    v->warnings |= d.warnings;
}

/* Inside of the tokenizer: tables made by tokenizer_load.c and read by the passes, each in its own file.
 * The order of one encode (tokenizer.c): added tokens on raw text, normaliser, added tokens on normalised text,
 * pre-tokenizer stages, BPE. Thread: tables are constant after open; a work belongs to one encode.
 * Memory: tables belong to the tokenizer, scratch to the work. Passes return false with the reason in work->error. */
#ifndef SPURION_MODEL_TOKENIZER_INTERNAL_H
#define SPURION_MODEL_TOKENIZER_INTERNAL_H

#include "daemon/model/tokenizer.h"
#include "daemon/model/unicode.h"

#include <stdbool.h>

#define TOK_STAGES_MAX 16      /* pre-tokenizers of one file, sequences counted by their members */
#define TOK_NORMALIZERS_MAX 16 /* the same for normalisers */
#define TOK_NESTING_MAX 8      /* sequences in sequences */
#define TOK_SPECIALS_MAX 64    /* ids the post-processor adds on one side */
#define TOK_ID_MAX (1 << 30)

typedef struct tok_buf {
    char *data;
    size_t count, capacity;
} tok_buf;

/* ---- patterns (tokenizer_pattern.c) ---- */

typedef enum tok_pattern_kind {
    TOK_PATTERN_NONE,
    TOK_PATTERN_LITERAL,
    TOK_PATTERN_GPT2,  /* the regex of GPT-2, by hand */
    TOK_PATTERN_CHAT,  /* the regex of Llama-3 and Qwen, by hand; they differ in digits_max */
    TOK_PATTERN_REGEX, /* any other, by Oniguruma */
    TOK_PATTERN_CHARS  /* single characters of a class: is_char */
} tok_pattern_kind;

typedef enum tok_chars { TOK_CHARS_NUMERIC, TOK_CHARS_SPACE, TOK_CHARS_WORDS } tok_chars;

typedef struct tok_pattern {
    tok_pattern_kind kind;
    int digits_max;  /* TOK_PATTERN_CHAT: 3 or 1 */
    tok_chars chars; /* TOK_PATTERN_CHARS; WORDS is Whitespace's \w+|[^\w\s]+ */
    char *literal;   /* owned */
    size_t literal_bytes;
    void *regex; /* owned, Oniguruma's */
} tok_pattern;

/* State of a walk over the matches in one string. */
typedef struct tok_matches {
    const char *s;
    size_t n, at;
    bool skip_next_empty; /* as the onig crate's FindMatches */
} tok_matches;

/* ---- normalisers (tokenizer_normalize.c) ---- */

typedef enum tok_normalizer_kind {
    TOK_NORM_NFC,
    TOK_NORM_NFD,
    TOK_NORM_NFKC,
    TOK_NORM_NFKD,
    TOK_NORM_LOWERCASE,
    TOK_NORM_PREPEND,
    TOK_NORM_REPLACE,
    TOK_NORM_STRIP,
    TOK_NORM_BYTE_LEVEL
} tok_normalizer_kind;

typedef struct tok_normalizer {
    tok_normalizer_kind kind;
    tok_pattern pattern; /* REPLACE */
    char *content;       /* REPLACE and PREPEND, owned */
    size_t content_bytes;
    bool left, right; /* STRIP */
} tok_normalizer;

/* ---- pre-tokenizers (tokenizer_split.c) ---- */

typedef enum tok_stage_kind { TOK_STAGE_SPLIT, TOK_STAGE_BYTE_LEVEL, TOK_STAGE_METASPACE } tok_stage_kind;
typedef enum tok_behavior { TOK_REMOVED, TOK_ISOLATED, TOK_MERGED_PREVIOUS, TOK_MERGED_NEXT, TOK_CONTIGUOUS } tok_behavior;
typedef enum tok_prepend { TOK_PREPEND_FIRST, TOK_PREPEND_NEVER, TOK_PREPEND_ALWAYS } tok_prepend;

typedef struct tok_stage {
    tok_stage_kind kind;
    tok_pattern pattern;
    tok_behavior behavior;
    bool invert;
    bool add_prefix_space, use_regex; /* BYTE_LEVEL */
    tok_prepend prepend;              /* METASPACE */
    char replacement[5];
    size_t replacement_bytes;
    bool split;
} tok_stage;

/* ---- added tokens (tokenizer_added.c) ---- */

typedef struct tok_added {
    char *content; /* owned */
    size_t bytes;
    char *normalized_content; /* owned; what is looked for when normalized */
    size_t normalized_bytes;
    int32_t id;
    bool single_word, lstrip, rstrip, normalized, special;
} tok_added;

typedef struct tok_trie_node {
    int32_t child, sibling; /* -1: none */
    int32_t added;          /* index of the token that ends here, -1: none */
    unsigned char byte;
} tok_trie_node;

typedef struct tok_trie {
    tok_trie_node *nodes; /* 0 is the root; NULL when there are no tokens */
    size_t count, capacity;
    int32_t first[256]; /* children of the root */
} tok_trie;

/* ---- BPE (tokenizer_bpe.c) ---- */

typedef struct tok_entry {
    uint32_t offset, bytes; /* spelling, in blob */
    int32_t id;
    bool whole; /* BPE of the spelling is the token itself: a word that is in the vocabulary needs no merging */
} tok_entry;

typedef struct tok_merge {
    uint64_t pair; /* left << 32 | right; UINT64_MAX: empty slot */
    uint32_t rank;
    int32_t id; /* what the pair becomes */
} tok_merge;

typedef struct tok_bpe {
    char *blob;
    tok_entry *entries;
    uint32_t *slots; /* hash of spellings to entry + 1 */
    size_t entry_count, slot_mask;
    size_t bytes_max; /* longest spelling */
    tok_merge *merges;
    size_t merge_mask;
    int32_t *rank_id; /* (rank_count) id made by the merge of that rank */
    size_t rank_count;
    int32_t byte_id[256];        /* <0xHH>, -1: absent */
    int32_t short_id[512];       /* ids of the characters below U+0200, -1: absent; without prefix and suffix */
    char *prefix, *suffix, *unk; /* owned, NULL when absent or empty (unk: absent) */
    size_t prefix_bytes, suffix_bytes;
    int32_t unk_id; /* -1: none, or not in the vocabulary */
    bool byte_fallback, fuse_unk, ignore_merges;
    bool metaspace_cut; /* no token has U+2581 after another character: words can be merged one by one */
} tok_bpe;

/* Text of a token by id, for reports. */
typedef struct tok_text {
    int32_t id;
    uint32_t bytes;
    size_t offset;
} tok_text;

struct spurion_tokenizer {
    const uint8_t *classes; /* (SPURION_UNICODE_CODE_POINTS) */
    uint8_t *classes_owned; /* the same, or NULL when they are the caller's */
    tok_bpe bpe;
    tok_added *added;
    size_t added_count;
    tok_trie raw, normalized;
    tok_normalizer normalizers[TOK_NORMALIZERS_MAX];
    int normalizer_count;
    tok_stage stages[TOK_STAGES_MAX];
    int stage_count;
    int32_t leading[TOK_SPECIALS_MAX], trailing[TOK_SPECIALS_MAX];
    int leading_count, trailing_count;
    tok_text *texts; /* ascending by id */
    size_t text_count;
    char *text_blob;
    int32_t vocab_size;
    bool byte_level, sentencepiece; /* what token spellings stand for */
    uint8_t digest[SPURION_TOKENIZER_DIGEST_BYTES];
};

typedef struct tok_symbol {
    int32_t id;
    int32_t previous, next; /* -1: none */
    uint32_t bytes;         /* 0: merged away */
} tok_symbol;

/* Scratch of one encode. */
typedef struct tok_work {
    const spurion_tokenizer *t;
    spurion_ids *out;
    spurion_status error;
    uint64_t steps; /* characters classified, trie nodes, pairs looked up, moves in the heap: what must not grow faster than n log n */
    tok_buf normal[2];
    tok_buf stage[TOK_STAGES_MAX];       /* text of the stage after its rewriting */
    tok_buf stage_piece[TOK_STAGES_MAX]; /* byte-level spelling of one piece */
    int32_t *points;                     /* code points under normalisation */
    size_t points_capacity;
    tok_symbol *symbols;
    size_t symbol_count, symbol_capacity;
    uint64_t *heap; /* rank << 32 | position */
    size_t heap_count, heap_capacity;
    tok_buf word;
    void *region; /* Oniguruma's */
} tok_work;

/* spurion_tokenizer_open_memory. classes: borrowed for the tokenizer's life, or NULL: it makes its own, a megabyte. */
spurion_status tok_open(spurion_tokenizer **out, const uint8_t *classes, const char *json, size_t bytes) SPURION_MUST_USE;
void tok_work_init(tok_work *w, const spurion_tokenizer *t, spurion_ids *out);
void tok_work_fini(tok_work *w);
/* spurion_tokenizer_encode; *steps counts the work, for tests. */
spurion_status tok_encode(spurion_ids *out, uint64_t *steps, const spurion_tokenizer *t, const char *text, size_t bytes)
    SPURION_MUST_USE;
bool tok_fail(tok_work *w, spurion_status error); /* keeps the first error; returns false */
bool tok_fail_memory(tok_work *w);
bool tok_reserve(tok_work *w, tok_buf *b, size_t more);
bool tok_append(tok_work *w, tok_buf *b, const char *s, size_t n);
bool tok_emit(tok_work *w, int32_t id);

/* Appends the byte-level spelling of s. */
bool tok_append_byte_level(tok_work *w, tok_buf *b, const char *s, size_t n);
/* Byte that a byte-level character stands for, -1: none. */
int tok_byte_of(uint32_t code_point);

spurion_status tok_pattern_regex(tok_pattern *p, const char *regex, size_t bytes);
spurion_status tok_pattern_literal(tok_pattern *p, const char *literal, size_t bytes);
void tok_pattern_fini(tok_pattern *p);
void tok_region_free(void *region);
/* Next match, leftmost first. *found is false at the end. */
bool tok_pattern_next(bool *found, size_t *begin, size_t *end, tok_work *w, const tok_pattern *p, tok_matches *m);

/* Runs all normalisers; *out points to text itself when nothing changes, else into w. *first_bytes: how many bytes at the start
 * of *out come from the first character of text (0 when that character was removed). */
bool tok_normalize(const char **out, size_t *out_bytes, size_t *first_bytes, tok_work *w, const char *text, size_t bytes);

/* Runs the pre-tokenizers from stage on, and BPE on what they leave. first: the piece begins where the whole text begins. */
bool tok_split(tok_work *w, int stage, const char *s, size_t n, bool first);

/* Calls piece for every part of s: id >= 0 is an added token, id -1 is text between. Order and overlaps as in the library. */
typedef bool (*tok_piece_fn)(tok_work *w, int32_t id, const char *s, size_t begin, size_t end, bool first, size_t first_bytes);
bool tok_added_split(tok_work *w, const tok_trie *trie, const char *s, size_t n, bool first, size_t first_bytes,
                     tok_piece_fn piece);
spurion_status tok_trie_add(tok_trie *trie, const char *s, size_t n, int32_t added);
void tok_trie_fini(tok_trie *trie);

spurion_status tok_bpe_index(tok_bpe *bpe); /* after blob and entries are filled */
spurion_status tok_bpe_merges_init(tok_bpe *bpe, size_t count);
/* Adds the merge of that rank; out of vocabulary: INVALID_ARGUMENT. */
spurion_status tok_bpe_merge_add(tok_bpe *bpe, uint32_t rank, const char *a, size_t a_bytes, const char *b, size_t b_bytes);
spurion_status tok_bpe_finish(spurion_tokenizer *t); /* derived tables */
void tok_bpe_fini(tok_bpe *bpe);
int32_t tok_bpe_find(const tok_bpe *bpe, const char *s, size_t n); /* entry, -1: none */
bool tok_bpe_word(tok_work *w, const char *s, size_t n);           /* emits the ids of one pre-token */

spurion_status tok_load(spurion_tokenizer *t, const char *json, size_t bytes);
spurion_status tok_texts(spurion_tokenizer *t); /* after all ids are known: texts and vocab_size */

#endif

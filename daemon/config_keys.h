/* The table of configuration keys and how one value is read and written; internal to config*.c.
 * One row per key: parser, --print-config, the example file and the manual page all come from these rows. */
#ifndef SPURION_CONFIG_KEYS_H
#define SPURION_CONFIG_KEYS_H

#include <stddef.h>

#include "daemon/config.h"

typedef enum spurion_key_kind {
    SPURION_KEY_TEXT,   /* const char * */
    SPURION_KEY_PATH,   /* const char *, made absolute from the configuration file's folder */
    SPURION_KEY_CHOICE, /* const char *, one of choices */
    SPURION_KEY_DEVICE, /* const char *, cpu or cuda:N */
    SPURION_KEY_ENUM,   /* an enum, place in choices */
    SPURION_KEY_BOOL,
    SPURION_KEY_INT,    /* int, low..high */
    SPURION_KEY_NUMBER, /* double, low..high; aux: bool that says it was given, or NONE */
    SPURION_KEY_SIZE,   /* uint64_t bytes: 8GiB, 512MiB, 1000000 */
    SPURION_KEY_TEXTS,  /* const char **, with the count (int32_t) at aux */
    SPURION_KEY_URLS    /* the same; tcp:// or ipc://, ipc paths made absolute */
} spurion_key_kind;

#define SPURION_KEY_NO_AUX ((size_t)-1)

typedef struct spurion_key {
    const char *section; /* "" at the top level */
    const char *name;
    spurion_key_kind kind;
    size_t offset, aux;
    double low, high;
    const char *const *choices; /* NULL-terminated */
    const char *standard;       /* the default as text; NULL: absent unless given */
    const char *example;        /* for the example file where standard is NULL */
    const char *meaning;
} spurion_key;

typedef enum spurion_origin { SPURION_FROM_DEFAULT, SPURION_FROM_FILE, SPURION_FROM_ENVIRONMENT, SPURION_FROM_FLAG } spurion_origin;

/* A table: offsets count from the struct it describes. */
typedef struct spurion_keys {
    const spurion_key *keys;
    int count;
} spurion_keys;

spurion_keys spurion_config_keys(void); /* struct spurion_config: everything but saes and rules */
spurion_keys spurion_sae_keys(void);    /* spurion_sae_config */
spurion_keys spurion_rule_keys(void);   /* spurion_rule_config */

/* A value on its way in. */
typedef struct spurion_key_value {
    const char *const *texts; /* (count): one for a scalar */
    int count;
    bool list;                /* written as a list */
    bool quoted;              /* a quoted scalar: never a number or a truth value */
} spurion_key_value;

/* What values are read into. */
typedef struct spurion_key_target {
    void *base;           /* the struct that the table describes */
    spurion_arena *arena;
    const char *folder;   /* where relative paths start */
} spurion_key_target;

/* Reads one value into target. INVALID_ARGUMENT "expected ..., found ..." without saying where; the caller knows. */
spurion_status spurion_key_read(spurion_key_target target, const spurion_key *key, spurion_key_value value) SPURION_MUST_USE;
/* Fills every key that has a default. */
spurion_status spurion_key_defaults(spurion_key_target target, spurion_keys keys) SPURION_MUST_USE;
/* True when the key has a value to print. */
bool spurion_key_given(const void *base, const spurion_key *key);
/* Writes the value as YAML that reads back as the same value. */
void spurion_key_print(FILE *out, const void *base, const spurion_key *key);

/* Reads a whole configuration file into c (config_yaml.c). */
spurion_status spurion_config_read_file(spurion_config *c, unsigned char *origins, const char *path, const char *folder) SPURION_MUST_USE;

#endif

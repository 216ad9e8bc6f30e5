/* Every maximum of Spurion in one place. Bytes unless a unit is named. Header only; C17 and C++17. */
#ifndef SPURION_LIMITS_H
#define SPURION_LIMITS_H

#define SPURION_NAME_BYTES_MAX 128              /* run, group, id, producer: 1..128 bytes, no control characters */
#define SPURION_TEXT_BYTES_MAX (4u << 20)       /* prompt or completion */
#define SPURION_TOKENS_MAX (1 << 20)            /* token ids of one rollout, before the model's own limit */
#define SPURION_TAGS_BYTES_MAX (16u << 10)      /* tags, as JSON text */
#define SPURION_FRAME_BYTES_MAX (16u << 20)     /* a message the daemon takes */
#define SPURION_REPLY_BYTES_MAX (32u << 10)     /* a reply; longer answers are paged */
#define SPURION_DECODE_BYTES_MAX (64u << 20)    /* memory one message may unpack to */
#define SPURION_MESSAGE_FIELDS_MAX 65536        /* fields of one message */
#define SPURION_MESSAGE_DEPTH_MAX 8             /* nesting of one message */
#define SPURION_BATCH_ROLLOUTS_MAX 4096         /* rollouts of one message */
#define SPURION_GROUP_SIZE_MAX 1024             /* members of one group */
#define SPURION_SAES_MAX 16                     /* SAEs of one daemon */
#define SPURION_RULES_MAX 256
#define SPURION_FAMILIES_MAX 256
#define SPURION_CATALOGUE_MAX 65536             /* catalogued features */
#define SPURION_TOP_MAX 4096                    /* attribution.top */
#define SPURION_LINE_BYTES_MAX (16u << 20)      /* a line of JSON Lines input */
#define SPURION_SAFETENSORS_HEADER_MAX (100u << 20) /* the format's own limit on its header */
#define SPURION_TENSORS_MAX 100000
#define SPURION_ALERT_BYTES_MAX 1024            /* one alert on the wire */
#define SPURION_CONNECTIONS_MAX 256

#endif

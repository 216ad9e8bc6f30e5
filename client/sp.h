/* nng's SP wire protocol on plain sockets: dialling, the greeting, framed messages; never blocks longer than it is told to.
 * Wire (docs/protocol.md): greeting 00 'S' 'P' 00 <protocol u16> 00 00 both ways; a frame is its length as u64 big-endian, then the bytes;
 * over unix sockets one byte 01 stands before the length. Thread: the handle's. Memory: one receive buffer, grown up to bytes_max. */
#ifndef SPURION_SP_H
#define SPURION_SP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "spurion/status.h"

enum { SPURION_SP_PUB = 0x20, SPURION_SP_SUB = 0x21, SPURION_SP_REQ = 0x30, SPURION_SP_REP = 0x31 };

typedef enum spurion_sp_state { SPURION_SP_CLOSED, SPURION_SP_CONNECTING, SPURION_SP_GREETING, SPURION_SP_OPEN } spurion_sp_state;

typedef struct spurion_sp {
    char url[256];
    int self, peer;             /* protocols */
    size_t bytes_max;           /* of a message received */
    int fd;
    bool local;                 /* unix socket */
    spurion_sp_state state;
    int64_t retry_at_ms;        /* monotonic: not before */
    int backoff_ms;
    unsigned dials;             /* attempts so far: of a name's several addresses each gets its turn */
    char why[128];              /* the last connection failed or ended; "" while open */
    uint64_t opened;            /* connections made so far */
    unsigned char greeting[8];
    size_t greeting_sent, greeting_got;
    unsigned char *in;          /* frame under way: header, then bytes */
    size_t in_size, in_capacity, in_want;
    bool in_header;
} spurion_sp;

/* url: tcp://host:port, ipc:///path or ipc://relative/path. INVALID_ARGUMENT for others. Connects at first use. */
spurion_status spurion_sp_init(spurion_sp *s, const char *url, int self, int peer, size_t bytes_max) SPURION_MUST_USE;
void spurion_sp_fini(spurion_sp *s);
/* Drops the connection; the next step dials again, after a pause that grows while dialling fails. */
void spurion_sp_drop(spurion_sp *s);
/* Moves dialling and greeting along without waiting. OK when open; UNAVAILABLE with why (state says whether it is under way). */
spurion_status spurion_sp_step(spurion_sp *s) SPURION_MUST_USE;
/* Sends as much of data as the socket takes, from *at on. OK also when nothing was taken. UNAVAILABLE: the connection broke (dropped). */
spurion_status spurion_sp_send(spurion_sp *s, const void *data, size_t size, size_t *at) SPURION_MUST_USE;
/* Receives without waiting. *data, *size: a whole message, borrowed until the next call; NULL: none yet. */
spurion_status spurion_sp_receive(spurion_sp *s, const unsigned char **data, size_t *size) SPURION_MUST_USE;
/* Writes the header of a frame of `size` bytes; returns its length (8 or 9). */
size_t spurion_sp_header(const spurion_sp *s, unsigned char out[9], size_t size);
/* Waits until the socket can be read (or written), at most timeout_ms. */
void spurion_sp_wait(const spurion_sp *s, bool write, int timeout_ms);

int64_t spurion_sp_now_ms(void);

#endif

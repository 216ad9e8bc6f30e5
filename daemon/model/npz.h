/* npz files: a zip archive of npy arrays, stored or deflated, as numpy writes them. Strict: one disk, no encryption, every array's header
 * checked before anything is read. Nothing is unpacked at once: a deflated array is inflated while it is read, so that memory does not
 * grow with what a file claims to hold. Thread: one owner at a time. Memory: the directory (bounded by the file's size), 32 KiB of
 * buffers while reading. Not for other modules than safetensors.c, which gives the arrays as tensors. */
#ifndef SPURION_MODEL_NPZ_H
#define SPURION_MODEL_NPZ_H

#include "daemon/model/safetensors_header.h"

#define SPURION_NPZ_MEMBERS_MAX 4096

/* Where the archive's bytes are: a file, or memory (fd < 0). Borrowed. */
typedef struct spurion_npz_source {
    int fd;
    const unsigned char *bytes;
    uint64_t size;
    const char *path; /* for messages */
} spurion_npz_source;

typedef struct spurion_npz spurion_npz;

/* Reads the directory and the arrays' headers. Fills header's tensors in the order of their names; it is the caller's (fini).
 * INVALID_ARGUMENT naming expected and found; DATA_LOSS when the file is shorter than it says; UNIMPLEMENTED for what numpy does not write. */
spurion_status spurion_npz_open(spurion_npz **out, spurion_tensor_header *header, const spurion_npz_source *source) SPURION_MUST_USE;
void spurion_npz_close(spurion_npz *z);

/* Reads bytes of array number i (in the header's order) from `offset` of its data on. Reading on from where the last read of the same
 * array ended is cheap; going back in a deflated array begins anew. DATA_LOSS when the archive's data do not hold what it says. */
spurion_status spurion_npz_read(void *out, spurion_npz *z, int i, uint64_t offset, size_t bytes) SPURION_MUST_USE;
/* Reads array i to its end and compares the archive's CRC-32. hash: gets the array's data, or NULL. */
spurion_status spurion_npz_check(spurion_npz *z, int i, spurion_sha256 *hash) SPURION_MUST_USE;

#endif

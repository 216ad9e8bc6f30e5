/* The checked header of a safetensors file; shared by the parser and the reader. Not for other modules. */
#ifndef SPURION_MODEL_SAFETENSORS_HEADER_H
#define SPURION_MODEL_SAFETENSORS_HEADER_H

#include "daemon/model/safetensors.h"

typedef struct spurion_tensor_header {
    spurion_tensor_info *tensors; /* by name */
    int tensor_count, tensor_cap;
    spurion_tensor_note *notes;   /* by key */
    int note_count, note_cap;
    char *strings;                /* all names, keys and values, each with its NUL */
} spurion_tensor_header;

/* Reads and checks a header; data_bytes: bytes of the file after it. On error the header is empty. */
spurion_status spurion_tensor_header_parse(spurion_tensor_header *out, const char *json, size_t bytes, uint64_t data_bytes,
                                           const char *name) SPURION_MUST_USE;
void spurion_tensor_header_fini(spurion_tensor_header *h);

#endif

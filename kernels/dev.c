/* Chooses the backend by the device's name. Thread: any; a device belongs to the engine thread afterwards. */
#include "spurion/dev.h"

#include <stdio.h>
#include <string.h>

#include "spurion/ops.h"

#if !defined(SPURION_WITH_CUDA)
/* Absent here; a test program that links the emulated backend (tests/emulator) brings it. */
__attribute__((weak)) spurion_status spurion_dev_create_cuda(spurion_dev **out, spurion_dtype dtype, int ordinal);
#endif

static spurion_status create_cuda(spurion_dev **out, spurion_dtype dtype, int ordinal)
{
#if !defined(SPURION_WITH_CUDA)
    if (spurion_dev_create_cuda == NULL) {
        return spurion_error(SPURION_UNIMPLEMENTED, "device cuda:%d: this build holds no CUDA backend", ordinal);
    }
#endif
    return spurion_dev_create_cuda(out, dtype, ordinal);
}

spurion_status spurion_dev_create(spurion_dev **out, const char *device, spurion_dtype dtype, int threads)
{
    *out = NULL;
    if (dtype != SPURION_F32 && dtype != SPURION_BF16) {
        return spurion_error(SPURION_INVALID_ARGUMENT, "device dtype: expected f32 or bf16, found %d", (int)dtype);
    }
    if (strcmp(device, "cpu") == 0) {
        return spurion_dev_create_cpu(out, dtype, threads);
    }
    int ordinal = -1;
    int end = 0;
    if (sscanf(device, "cuda:%3d%n", &ordinal, &end) == 1 && device[end] == '\0' && ordinal >= 0) {
        return create_cuda(out, dtype, ordinal);
    }
    return spurion_error(SPURION_INVALID_ARGUMENT, "device: expected \"cpu\" or \"cuda:N\", found \"%.64s\"", device);
}

void spurion_dev_destroy(spurion_dev *dev)
{
    if (dev != NULL) {
        dev->ops->destroy(dev);
    }
}

/* The table of the CUDA backend. */
#ifndef SPURION_CUDA_TABLE_CUH
#define SPURION_CUDA_TABLE_CUH

#include "spurion/ops.h"

extern "C" const spurion_ops *spurion_ops_cuda(void);

#endif

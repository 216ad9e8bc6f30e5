/* Splits row work among the workers: blocks of rows whose size depends on the row's length only. For op files. */
#ifndef SPURION_CPU_ROWS_H
#define SPURION_CPU_ROWS_H

#include "kernels/cpu/cpu.h"

enum { SPURION_BLOCK_ELEMENTS = 1 << 15 }; /* about 10 us of work: less is not worth a wake-up */

typedef void (*spurion_row_fn)(void *context, int row);

typedef struct spurion_row_job {
    spurion_row_fn fn;
    void *context;
    int rows, block;
} spurion_row_job;

static inline void spurion_row_block(void *context, int64_t item, int worker)
{
    const spurion_row_job *j = context;
    int first = (int)item * j->block, end = first + j->block < j->rows ? first + j->block : j->rows;
    (void)worker;
    for (int r = first; r < end; r++) {
        j->fn(j->context, r);
    }
}

/* Calls fn for every row; `length` is the work of one row in elements. */
static inline void spurion_each_row(spurion_dev *dev, spurion_row_fn fn, void *context, int rows, size_t length)
{
    size_t block = SPURION_BLOCK_ELEMENTS / (length == 0 ? 1 : length);
    spurion_row_job job = {fn, context, rows, block == 0 ? 1 : (int)block};
    spurion_pool_run(spurion_cpu_of(dev)->pool, spurion_row_block, &job, (rows + job.block - 1) / job.block);
}

#endif

/* Work in parts on several threads, for what is done once at start (reading a checkpoint). Thread: any; the caller takes part.
 * Memory: none of its own; the threads end before the call does. */
#ifndef SPURION_BASE_PARALLEL_H
#define SPURION_BASE_PARALLEL_H

/* Calls work(context, i) once for every i in [0, count), in any order, on up to SPURION_PARALLEL_MAX threads, as many as this process has CPUs.
 * Returns when all have been done. A thread that cannot be started is done without. */
#define SPURION_PARALLEL_MAX 8
typedef void (*spurion_parallel_fn)(void *context, int i);
void spurion_parallel(spurion_parallel_fn work, void *context, int count);

#endif

/* Mean of a sequence's rows, wherever they lie, and its gradient: a thread for each column of each seq, f64 sums in the order of positions.
 * Thread: engine. Memory: the device's work block. */
#include "kernels/cuda/attention.cuh"

static __global__ void mean_kernel(float *out, const float *in, const spurion_seq *seqs, int C)
{
    const spurion_seq *s = &seqs[blockIdx.x];
    int c = (int)(blockIdx.y * SPURION_CUDA_THREADS + threadIdx.x), end = spurion_seq_end(s);
    double sum = 0;
    if (c >= C) {
        return;
    }
    for (int p = 0; p < s->piece_count; p++) {
        int stop = p + 1 < s->piece_count && s->piece_position[p + 1] < end ? s->piece_position[p + 1] : end;
        for (int t = s->piece_position[p]; t < stop; t++) {
            sum += (double)in[(size_t)(s->piece_row[p] + t - s->piece_position[p]) * (size_t)C + (size_t)c];
        }
    }
    out[(size_t)blockIdx.x * (size_t)C + (size_t)c] = (float)(sum / end);
}

static __global__ void spread_kernel(float *dx, const float *dout, const spurion_seq *seqs, int C)
{
    const spurion_seq *s = &seqs[blockIdx.x];
    int c = (int)(blockIdx.y * SPURION_CUDA_THREADS + threadIdx.x), end = spurion_seq_end(s);
    if (c >= C) {
        return;
    }
    float share = dout[(size_t)blockIdx.x * (size_t)C + (size_t)c] / (float)end;
    for (int t = s->dkv_position; t < end; t++) {
        dx[(size_t)(s->dkv_row + t - s->dkv_position) * (size_t)C + (size_t)c] = share;
    }
}

static spurion_status run(spurion_dev *dev, void (*kernel)(float *, const float *, const spurion_seq *, int), float *out, const float *in,
                          const spurion_seq *seqs, int seq_count, int C)
{
    spurion_cuda *cuda = spurion_cuda_of(dev);
    size_t bytes = (size_t)seq_count * sizeof *seqs;
    double elements = 0;
    SPURION_CUDA_DO(spurion_cuda_begin(cuda));
    for (int s = 0; s < seq_count; s++) {
        elements += (double)spurion_seq_end(&seqs[s]) * C;
    }
    if (seq_count > 0) {
        dim3 grid((unsigned)seq_count, (unsigned)((C + SPURION_CUDA_THREADS - 1) / SPURION_CUDA_THREADS));
        SPURION_CUDA_DO(spurion_cuda_reserve(cuda, &cuda->work, bytes));
        SPURION_CUDA_DO(spurion_cuda_send(cuda, cuda->work.p, seqs, bytes));
        SPURION_CUDA(cuda, spurion_cuda_launch(cuda, kernel, grid, SPURION_CUDA_THREADS, 0, out, in, (const spurion_seq *)cuda->work.p, C));
    }
    return spurion_cuda_end(cuda, SPURION_CLASS_MOVE, elements, 4 * elements);
}

extern "C" spurion_status spurion_cuda_mean_rows(spurion_dev *dev, float *out, const float *in, const spurion_seq *seqs, int seq_count, int C)
{
    return run(dev, mean_kernel, out, in, seqs, seq_count, C);
}

extern "C" spurion_status spurion_cuda_mean_rows_backward(spurion_dev *dev, float *dx, const float *dout, const spurion_seq *seqs, int seq_count, int C)
{
    return run(dev, spread_kernel, dx, dout, seqs, seq_count, C);
}

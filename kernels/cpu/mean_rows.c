/* Mean of a sequence's rows, wherever they lie, and its gradient. Sums in f64 in the order of positions, so a sequence's mean depends on
 * its own rows only. Thread: engine. Memory: none. */
#include "kernels/cpu/rows.h"

enum { BLOCK = 64 }; /* columns of one piece of work */

typedef struct mean_job {
    float *out;
    const float *in;
    const spurion_seq *seqs;
    int C, blocks;
} mean_job;

static int piece_end(const spurion_seq *s, int p)
{
    int count = s->q_position + s->q_count;
    return p + 1 < s->piece_count && s->piece_position[p + 1] < count ? s->piece_position[p + 1] : count;
}

static void mean_block(void *context, int item)
{
    const mean_job *j = context;
    const spurion_seq *s = &j->seqs[item / j->blocks];
    int c0 = item % j->blocks * BLOCK, n = j->C - c0 < BLOCK ? j->C - c0 : BLOCK;
    double sum[BLOCK] = {0};

    for (int p = 0; p < s->piece_count; p++) {
        int end = piece_end(s, p);
        for (int t = s->piece_position[p]; t < end; t++) {
            const float *row = j->in + ((size_t)s->piece_row[p] + (size_t)(t - s->piece_position[p])) * (size_t)j->C + c0;
            for (int c = 0; c < n; c++) {
                sum[c] += (double)row[c];
            }
        }
    }
    for (int c = 0; c < n; c++) {
        j->out[(size_t)(item / j->blocks) * (size_t)j->C + (size_t)(c0 + c)] = (float)(sum[c] / (s->q_position + s->q_count));
    }
}

spurion_status SPURION_CPU_OP(mean_rows)(spurion_dev *dev, float *out, const float *in, const spurion_seq *seqs, int seq_count, int C)
{
    double start = spurion_cpu_now(), elements = 0;
    mean_job job = {out, in, seqs, C, (C + BLOCK - 1) / BLOCK};

    for (int s = 0; s < seq_count; s++) {
        elements += (double)(seqs[s].q_position + seqs[s].q_count) * C;
    }
    spurion_each_row(dev, mean_block, &job, seq_count * job.blocks, BLOCK * 64);
    spurion_cpu_count(dev, SPURION_CLASS_MOVE, start, elements, 4 * elements);
    return spurion_ok();
}

typedef struct spread_job {
    float *dx;
    const float *dout;
    const spurion_seq *seqs;
    int C;
} spread_job;

static void spread_seq(void *context, int item)
{
    const spread_job *j = context;
    const spurion_seq *s = &j->seqs[item];
    int count = s->q_position + s->q_count;
    const float *dout = j->dout + (size_t)item * (size_t)j->C;

    for (int t = s->dkv_position; t < count; t++) {
        float *row = j->dx + ((size_t)s->dkv_row + (size_t)(t - s->dkv_position)) * (size_t)j->C;
        for (int c = 0; c < j->C; c++) {
            row[c] = dout[c] / (float)count;
        }
    }
}

spurion_status SPURION_CPU_OP(mean_rows_backward)(spurion_dev *dev, float *dx, const float *dout, const spurion_seq *seqs, int seq_count, int C)
{
    double start = spurion_cpu_now(), elements = 0;
    spread_job job = {dx, dout, seqs, C};

    for (int s = 0; s < seq_count; s++) {
        elements += (double)(seqs[s].q_position + seqs[s].q_count - seqs[s].dkv_position) * C;
    }
    spurion_each_row(dev, spread_seq, &job, seq_count, (size_t)C * 64);
    spurion_cpu_count(dev, SPURION_CLASS_MOVE, start, elements, 4 * elements);
    return spurion_ok();
}

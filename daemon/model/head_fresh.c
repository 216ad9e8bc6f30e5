/* Whether a head's numbers look like those of a head that nobody trained: the laws by which trainers draw a new one, each tested by its
 * moments and its shape (Kolmogorov and Smirnov). Thread: any. Memory: one sorted copy. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/model/head.h"

#define COUNT_MIN 64      /* fewer numbers look like anything */
#define SIGMAS 3.3        /* of the means of x, x^2 and x^4: a fresh head is missed in about one case in 1000 for each */
#define KOLMOGOROV 1.95   /* sup |F_n - F| sqrt(n) is above it in one case in 1000 */

typedef struct law {
    const char *text;
    double scale;         /* standard deviation, or half the width of the uniform one */
    bool uniform;
} law;

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double distribution(const law *l, double x)
{
    if (l->uniform) {
        return x <= -l->scale ? 0 : x >= l->scale ? 1 : 0.5 + 0.5 * x / l->scale;
    }
    return 0.5 * erfc(-x / (l->scale * sqrt(2)));
}

/* sorted (n). With s = 1: normal numbers have E x^2 = 1, E x^4 = 3 and variances 2 of x^2 and 96 of x^4; uniform ones in (-1, 1) have
 * 1/3, 1/5, 4/45 and 16/225. */
static bool fits(const law *l, const double *sorted, size_t n)
{
    const double second = l->uniform ? 1.0 / 3 : 1, fourth = l->uniform ? 0.2 : 3, of_second = l->uniform ? 4.0 / 45 : 2,
                 of_fourth = l->uniform ? 16.0 / 225 : 96, slack = SIGMAS / sqrt((double)n);
    double sum = 0, squares = 0, fourths = 0, worst = 0;

    for (size_t i = 0; i < n; i++) {
        double f = distribution(l, sorted[i]), low = f - (double)i / (double)n, high = (double)(i + 1) / (double)n - f;
        double x = sorted[i] / l->scale;

        sum += x;
        squares += x * x;
        fourths += x * x * x * x;
        worst = fmax(worst, fmax(low, high));
    }
    return fabs(sum / (double)n) <= slack * sqrt(second) && fabs(squares / (double)n - second) <= slack * sqrt(of_second) &&
           fabs(fourths / (double)n - fourth) <= slack * sqrt(of_fourth) && worst * sqrt((double)n) <= KOLMOGOROV && (!l->uniform || (sorted[0] >= -l->scale * 1.01 && sorted[n - 1] <= l->scale * 1.01));
}

const char *spurion_head_fresh(const spurion_head *head, const float *w, size_t count, size_t width, const float *bias, size_t outputs)
{
    const law laws[] = {{"N(0, initializer_range), as transformers draws it", head->init_range, false},
                        {"N(0, 1 / (width + 1)), as OpenRLHF draws it", 1.0 / (double)(width + 1), false},
                        {"U(-1, 1) / sqrt(width), as torch draws it", 1.0 / sqrt((double)width), true}};
    const char *found = NULL;
    double *sorted = count >= COUNT_MIN ? malloc(count * sizeof *sorted) : NULL, largest = 0;

    if (sorted == NULL) {
        return NULL;
    }
    for (size_t i = 0; i < count; i++) {
        sorted[i] = (double)w[i];
    }
    qsort(sorted, count, sizeof *sorted, ascending);
    for (size_t i = 0; i < outputs; i++) {
        largest = fmax(largest, fabs((double)bias[i]));
    }
    for (size_t i = 0; i < sizeof laws / sizeof *laws && found == NULL; i++) {
        bool plain_bias = laws[i].uniform ? largest <= laws[i].scale * 1.01 : largest == 0; /* torch draws it by the same law */

        found = laws[i].scale > 0 && plain_bias && fits(&laws[i], sorted, count) ? laws[i].text : NULL;
    }
    free(sorted);
    return found;
}

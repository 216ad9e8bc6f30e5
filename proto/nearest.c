/* Edit distance between short words; see nearest.h. */
#include "spurion/nearest.h"

#include <stdio.h>
#include <string.h>

#define WORD_BYTES 48

static int smallest(int a, int b, int c)
{
    int least = a < b ? a : b;
    return least < c ? least : c;
}

/* Edit distance where swapping two neighbours is one edit (optimal string alignment), three rows of the table at a time. Words longer
 * than WORD_BYTES are never near. */
static int distance(const char *a, const char *b)
{
    size_t na = strlen(a), nb = strlen(b);
    int rows[3][WORD_BYTES + 1] = {{0}};

    if (na > WORD_BYTES || nb > WORD_BYTES) {
        return WORD_BYTES;
    }
    for (size_t j = 0; j <= nb; j++) {
        rows[0][j] = (int)j;
    }
    for (size_t i = 1; i <= na; i++) {
        int *row = rows[i % 3];
        const int *up = rows[(i + 2) % 3], *up2 = rows[(i + 1) % 3];
        row[0] = (int)i;
        for (size_t j = 1; j <= nb; j++) {
            row[j] = smallest(up[j] + 1, row[j - 1] + 1, up[j - 1] + (a[i - 1] != b[j - 1]));
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && up2[j - 2] + 1 < row[j]) {
                row[j] = up2[j - 2] + 1;
            }
        }
    }
    return rows[na % 3][nb];
}

const char *spurion_nearest(const char *word, const char *const *words, int count)
{
    int best = strlen(word) < 5 ? 2 : 3;
    const char *found = NULL;

    for (int i = 0; i < count; i++) {
        int d = distance(word, words[i]);
        if (d < best) {
            best = d;
            found = words[i];
        }
    }
    return found;
}

const char *spurion_nearest_hint(char *out, size_t size, const char *word, const char *const *words, int count)
{
    const char *found = spurion_nearest(word, words, count);

    out[0] = '\0';
    if (found) {
        (void)snprintf(out, size, " (did you mean '%s'?)", found);
    }
    return out;
}

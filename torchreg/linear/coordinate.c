/* Sweeps of coordinate descent over some columns of a sparse matrix X in CSC format, of type VALUE.

   The residual is kept as r = z − Xw for centred targets z, without the means m of X's columns, and shift = Σ m·w beside
   it: the correlation of a centred column with the centred residual, weighted by v, is Σ v·x·r/n + m·shift. */

#include <math.h>
#include <stdint.h>

typedef struct {
    const VALUE *values;
    const int32_t *rows, *starts;
    const double *weights; /* v, (n), or NULL */
    const double *means;   /* m, (p), or NULL */
    const double *squares; /* of centred columns over n, (p) */
    double *residual;      /* (n) */
    double *w;             /* (p) */
    double shift;
    int64_t samples;
} Columns;

/* One sweep: the largest change of a prediction, as a root mean square. */
static double sweep(Columns *c, const int64_t *index, int64_t count, double l1, double l2, int positive) {
    double largest = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t j = index[i];
        double square = c->squares[j], old = c->w[j], sum = 0;
        if (!(square > 0)) continue;
        int32_t start = c->starts[j], end = c->starts[j + 1];
        if (c->weights)
            for (int32_t q = start; q < end; q++) sum += c->weights[c->rows[q]] * c->values[q] * c->residual[c->rows[q]];
        else
            for (int32_t q = start; q < end; q++) sum += c->values[q] * c->residual[c->rows[q]];
        double pull = sum / c->samples + square * old;
        if (c->means) pull += c->means[j] * c->shift;
        double size = positive ? pull : fabs(pull), w = 0;
        if (size > l1) w = copysign((size - l1) / (square + l2), pull);
        double change = w - old;
        if (change == 0) continue;
        c->w[j] = w;
        for (int32_t q = start; q < end; q++) c->residual[c->rows[q]] -= change * c->values[q];
        if (c->means) c->shift += c->means[j] * change;
        largest = fmax(largest, fabs(change) * sqrt(square));
    }
    return largest;
}

/* Sweep until no prediction changes by more than `least`. The number of sweeps. */
int64_t torchreg_sweeps(const VALUE *values, const int32_t *rows, const int32_t *starts, const double *weights,
                        const double *means, const double *squares, double *residual, double *w, double *shift,
                        int64_t samples, const int64_t *index, int64_t count, double l1, double l2, int positive,
                        double least, int64_t limit) {
    Columns c = {values, rows, starts, weights, means, squares, residual, w, *shift, samples};
    int64_t sweeps = 0;
    while (sweeps < limit) {
        sweeps++;
        if (sweep(&c, index, count, l1, l2, positive) <= least) break;
    }
    *shift = c.shift;
    return sweeps;
}

/* The same over dense columns, centred and weighted, which are rows of length `samples`; `index` says which of them. */
int64_t torchreg_dense_sweeps(const double *columns, const double *squares, double *residual, double *w,
                              int64_t samples, const int64_t *index, int64_t count, double l1, double l2, int positive,
                              double least, int64_t limit) {
    int64_t sweeps = 0;
    double largest = INFINITY;
    for (; sweeps < limit && largest > least; sweeps++) {
        largest = 0;
        for (int64_t i = 0; i < count; i++) {
            int64_t j = index[i];
            const double *x = columns + j * samples;
            double square = squares[j], old = w[j], sum = 0, next = 0;
            if (!(square > 0)) continue;
#pragma omp simd reduction(+ : sum)
            for (int64_t q = 0; q < samples; q++) sum += x[q] * residual[q];
            double pull = sum / samples + square * old, size = positive ? pull : fabs(pull);
            if (size > l1) next = copysign((size - l1) / (square + l2), pull);
            double change = next - old;
            if (change == 0) continue;
            w[j] = next;
#pragma omp simd
            for (int64_t q = 0; q < samples; q++) residual[q] -= change * x[q];
            largest = fmax(largest, fabs(change) * sqrt(square));
        }
    }
    return sweeps;
}

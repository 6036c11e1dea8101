/* Sweeps of coordinate descent over dense columns, centred and weighted, which are rows of length `samples`, until no
   prediction changes by more than `least`; `index` says over which of them. The number of sweeps. */

#include <math.h>
#include <stdint.h>

enum { STALLED = 50, NEAR = 1000 }; /* sweeps without a change halved within this many times `least`: that is rounding */

int64_t torchreg_dense_sweeps(const double *columns, const double *squares, double *residual, double *w,
                              int64_t samples, const int64_t *index, int64_t count, double l1, double l2, int positive,
                              double least, int64_t limit) {
    int64_t sweeps = 0;
    double largest = INFINITY, best = INFINITY;
    int stalled = 0;
    for (; sweeps < limit && largest > least && stalled < STALLED; sweeps++) {
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
        stalled = largest <= 0.5 * best || largest > NEAR * least ? 0 : stalled + 1;
        if (!stalled) best = largest;
    }
    return sweeps;
}

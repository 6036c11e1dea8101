/* Products with some columns of a matrix that lies in columns, each of which is read where it is. VALUE is its type. */

#include <stdint.h>

typedef struct {
    const VALUE *x;
    int64_t stride; /* from one column to the next */
    int64_t samples;
    const int64_t *places; /* of the columns */
    const double *residual;
    double *found;
} Products;

#define COLUMN(j) (p->x + p->places[j] * p->stride)

enum { BLOCK = 32, LINE = 64 / sizeof(VALUE) };

/* Adds to `found` the inner products of the residual and the columns at places `from` to `to`. Four at a time: one
   after the other they don't fill the ways to memory. The next four are fetched ahead: the processor can't know them. */
void torchreg_dots(const Products *p, int64_t from, int64_t to) {
    const double *r = p->residual;
    int64_t n = p->samples, whole = n - n % BLOCK, j = from;
    for (; j + 4 <= to; j += 4) {
        const VALUE *x0 = COLUMN(j), *x1 = COLUMN(j + 1), *x2 = COLUMN(j + 2), *x3 = COLUMN(j + 3);
        int64_t k = j + 8 <= to ? j + 4 : j;
        const VALUE *next[] = {COLUMN(k), COLUMN(k + 1), COLUMN(k + 2), COLUMN(k + 3)};
        double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (int64_t start = 0; start < whole; start += BLOCK) {
            for (int c = 0; c < 4; c++)
                for (int64_t i = start; i < start + BLOCK; i += LINE) __builtin_prefetch(next[c] + i, 0, 2);
#pragma omp simd reduction(+ : s0, s1, s2, s3)
            for (int64_t i = start; i < start + BLOCK; i++) {
                s0 += x0[i] * r[i];
                s1 += x1[i] * r[i];
                s2 += x2[i] * r[i];
                s3 += x3[i] * r[i];
            }
        }
        for (int64_t i = whole; i < n; i++) {
            s0 += x0[i] * r[i];
            s1 += x1[i] * r[i];
            s2 += x2[i] * r[i];
            s3 += x3[i] * r[i];
        }
        p->found[j] += s0;
        p->found[j + 1] += s1;
        p->found[j + 2] += s2;
        p->found[j + 3] += s3;
    }
    for (; j < to; j++) {
        const VALUE *x = COLUMN(j);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) sum += x[i] * r[i];
        p->found[j] += sum;
    }
}

/* Adds to `total` the columns at `count` places, each times its weight. */
void torchreg_combine(const Products *p, int64_t count, const double *w, double *total) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
        const VALUE *x0 = COLUMN(j), *x1 = COLUMN(j + 1), *x2 = COLUMN(j + 2), *x3 = COLUMN(j + 3);
        double w0 = w[j], w1 = w[j + 1], w2 = w[j + 2], w3 = w[j + 3];
#pragma omp simd
        for (int64_t i = 0; i < p->samples; i++)
            total[i] += (w0 * x0[i] + w1 * x1[i]) + (w2 * x2[i] + w3 * x3[i]);
    }
    for (; j < count; j++) {
        const VALUE *x = COLUMN(j);
#pragma omp simd
        for (int64_t i = 0; i < p->samples; i++) total[i] += w[j] * x[i];
    }
}

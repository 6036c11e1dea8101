/* Products with some columns of a matrix that lies in columns, each of which is read where it is. VALUE is its type. */

#include <stdint.h>

typedef struct {
    const VALUE *x;
    int64_t stride; /* from one column to the next */
    int64_t samples;
    const int64_t *places; /* of the columns */
    int64_t count;         /* of places */
    const double *residuals;
    int64_t rows, total; /* of them, and from one to the next */
    double *found;       /* rows × count */
} Products;

#define COLUMN(j) (p->x + p->places[j] * p->stride)

enum { CHUNK = 2048, AHEAD = 8, LINE = 64 / sizeof(VALUE) };

/* Adds to `found`, and to `more`, the inner products of four columns with a residual, and with another one. */
static void with_two(const VALUE *a, const VALUE *b, const VALUE *c, const VALUE *d, const double *r, const double *q,
                     int64_t n, double *found, double *more) {
    double ar = 0, br = 0, cr = 0, dr = 0, aq = 0, bq = 0, cq = 0, dq = 0;
#pragma omp simd reduction(+ : ar, br, cr, dr, aq, bq, cq, dq)
    for (int64_t i = 0; i < n; i++) {
        ar += a[i] * r[i], br += b[i] * r[i], cr += c[i] * r[i], dr += d[i] * r[i];
        aq += a[i] * q[i], bq += b[i] * q[i], cq += c[i] * q[i], dq += d[i] * q[i];
    }
    found[0] += ar, found[1] += br, found[2] += cr, found[3] += dr;
    more[0] += aq, more[1] += bq, more[2] += cq, more[3] += dq;
}

static void with_one(const VALUE *a, const VALUE *b, const VALUE *c, const VALUE *d, const double *r, int64_t n,
                     double *found) {
    double ar = 0, br = 0, cr = 0, dr = 0;
#pragma omp simd reduction(+ : ar, br, cr, dr)
    for (int64_t i = 0; i < n; i++) ar += a[i] * r[i], br += b[i] * r[i], cr += c[i] * r[i], dr += d[i] * r[i];
    found[0] += ar, found[1] += br, found[2] += cr, found[3] += dr;
}

/* Adds to `found` the inner products of all residuals and the columns at places `from` to `to`. Four columns at a time:
   one after the other they don't fill the ways to memory. The beginnings of the next four are fetched ahead: the
   processor can't know them, and goes on by itself. Residuals after the first two find the columns in the cache. */
void torchreg_dots(const Products *p, int64_t from, int64_t to) {
    for (int64_t start = 0; start < p->samples; start += CHUNK) {
        int64_t n = p->samples - start < CHUNK ? p->samples - start : CHUNK, j = from;
        const double *residuals = p->residuals + start;
        for (; j + 4 <= to; j += 4) {
            const VALUE *a = COLUMN(j) + start, *b = COLUMN(j + 1) + start;
            const VALUE *c = COLUMN(j + 2) + start, *d = COLUMN(j + 3) + start;
            for (int64_t k = j + 4; k < j + 8 && k < to; k++)
                for (int64_t l = 0; l < AHEAD; l++) __builtin_prefetch(COLUMN(k) + start + l * LINE, 0, 2);
            for (int64_t row = 0; row < p->rows; row += 2) {
                const double *r = residuals + row * p->total;
                double *found = p->found + row * p->count + j;
                if (row + 1 < p->rows)
                    with_two(a, b, c, d, r, r + p->total, n, found, found + p->count);
                else
                    with_one(a, b, c, d, r, n, found);
            }
        }
        for (; j < to; j++) {
            const VALUE *x = COLUMN(j) + start;
            for (int64_t row = 0; row < p->rows; row++) {
                const double *r = residuals + row * p->total;
                double sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < n; i++) sum += x[i] * r[i];
                p->found[row * p->count + j] += sum;
            }
        }
    }
}

/* Adds to `total` the columns at all places, each times its weight. */
void torchreg_combine(const Products *p, const double *w, double *total) {
    int64_t j = 0;
    for (; j + 4 <= p->count; j += 4) {
        const VALUE *x0 = COLUMN(j), *x1 = COLUMN(j + 1), *x2 = COLUMN(j + 2), *x3 = COLUMN(j + 3);
        double w0 = w[j], w1 = w[j + 1], w2 = w[j + 2], w3 = w[j + 3];
#pragma omp simd
        for (int64_t i = 0; i < p->samples; i++)
            total[i] += (w0 * x0[i] + w1 * x1[i]) + (w2 * x2[i] + w3 * x3[i]);
    }
    for (; j < p->count; j++) {
        const VALUE *x = COLUMN(j);
#pragma omp simd
        for (int64_t i = 0; i < p->samples; i++) total[i] += w[j] * x[i];
    }
}

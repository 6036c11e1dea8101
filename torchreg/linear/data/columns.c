/* Products with some columns of a matrix that lies in columns, each of which is read where it is. VALUE is its type. */

#include <stdint.h>

typedef struct {
    const VALUE *x;
    int64_t stride; /* from one column to the next */
    int64_t samples;
    const int64_t *places; /* of the columns; none: these are all */
    int64_t count;         /* of places */
    const double *residuals;
    int64_t rows, total; /* of them, and from one to the next */
    double *found;       /* rows × count */
    const double *means; /* of all columns, or none */
} Products;

#define INLINE static inline __attribute__((always_inline))
#define PLACE(j) (p->places ? p->places[j] : (j))
#define COLUMN(j) (p->x + PLACE(j) * p->stride)
#define MEAN(j) p->means[PLACE(j)]

enum { CHUNK = 2048, AHEAD = 8, LINE = 64 / sizeof(VALUE) };

/* Adds to `found`, and to `more`, the inner products of four columns less their means with a residual, and another. */
INLINE void four_with_two(const VALUE *const x[4], const double m[4], const double *r, const double *q, int64_t n,
                     double *found, double *more) {
    const VALUE *a = x[0], *b = x[1], *c = x[2], *d = x[3];
    double ar = 0, br = 0, cr = 0, dr = 0, aq = 0, bq = 0, cq = 0, dq = 0;
#pragma omp simd reduction(+ : ar, br, cr, dr, aq, bq, cq, dq)
    for (int64_t i = 0; i < n; i++) {
        double ai = a[i] - m[0], bi = b[i] - m[1], ci = c[i] - m[2], di = d[i] - m[3];
        ar += ai * r[i], br += bi * r[i], cr += ci * r[i], dr += di * r[i];
        aq += ai * q[i], bq += bi * q[i], cq += ci * q[i], dq += di * q[i];
    }
    found[0] += ar, found[1] += br, found[2] += cr, found[3] += dr;
    more[0] += aq, more[1] += bq, more[2] += cq, more[3] += dq;
}

INLINE void eight_with_one(const VALUE *const x[8], const double m[8], const double *r, int64_t n, double *found) {
    const VALUE *a = x[0], *b = x[1], *c = x[2], *d = x[3], *e = x[4], *f = x[5], *g = x[6], *h = x[7];
    double ar = 0, br = 0, cr = 0, dr = 0, er = 0, fr = 0, gr = 0, hr = 0;
#pragma omp simd reduction(+ : ar, br, cr, dr, er, fr, gr, hr)
    for (int64_t i = 0; i < n; i++) {
        ar += (a[i] - m[0]) * r[i], br += (b[i] - m[1]) * r[i], cr += (c[i] - m[2]) * r[i], dr += (d[i] - m[3]) * r[i];
        er += (e[i] - m[4]) * r[i], fr += (f[i] - m[5]) * r[i], gr += (g[i] - m[6]) * r[i], hr += (h[i] - m[7]) * r[i];
    }
    found[0] += ar, found[1] += br, found[2] += cr, found[3] += dr;
    found[4] += er, found[5] += fr, found[6] += gr, found[7] += hr;
}

INLINE void four_with_one(const VALUE *const x[4], const double m[4], const double *r, int64_t n, double *found) {
    const VALUE *a = x[0], *b = x[1], *c = x[2], *d = x[3];
    double ar = 0, br = 0, cr = 0, dr = 0;
#pragma omp simd reduction(+ : ar, br, cr, dr)
    for (int64_t i = 0; i < n; i++)
        ar += (a[i] - m[0]) * r[i], br += (b[i] - m[1]) * r[i], cr += (c[i] - m[2]) * r[i], dr += (d[i] - m[3]) * r[i];
    found[0] += ar, found[1] += br, found[2] += cr, found[3] += dr;
}

/* All residuals with four columns. Those after the first two find the columns in the cache. */
INLINE void four_with_all(const Products *p, const VALUE *const x[4], const double m[4], int64_t start, int64_t n, int64_t j) {
    for (int64_t row = 0; row < p->rows; row += 2) {
        const double *r = p->residuals + row * p->total + start;
        double *found = p->found + row * p->count + j;
        if (row + 1 < p->rows)
            four_with_two(x, m, r, r + p->total, n, found, found + p->count);
        else
            four_with_one(x, m, r, n, found);
    }
}

/* Where `count` columns are, and their means. The beginnings of as many that follow are fetched ahead: the processor
   can't know them, and goes on by itself. */
INLINE void look_up(const Products *p, int64_t j, int count, int64_t to, int64_t start, const VALUE **x, double *m) {
    for (int k = 0; k < count; k++) {
        x[k] = COLUMN(j + k) + start;
        m[k] = p->means ? MEAN(j + k) : 0;
    }
    for (int64_t k = j + count; k < j + 2 * count && k < to; k++)
        for (int64_t l = 0; l < AHEAD; l++) __builtin_prefetch(COLUMN(k) + start + l * LINE, 0, 2);
}

/* Adds to `found` the inner products of all residuals and the columns at places `from` to `to`, less their means if
   there are any. Several columns at a time: one after the other they don't fill the ways to memory. Constant zeros in
   place of means spare a subtraction. */
void torchreg_dots(const Products *p, int64_t from, int64_t to) {
    static const double none[8] = {0};
    for (int64_t start = 0; start < p->samples; start += CHUNK) {
        int64_t n = p->samples - start < CHUNK ? p->samples - start : CHUNK, j = from;
        const VALUE *x[8];
        double m[8];
        for (; p->rows == 1 && j + 8 <= to; j += 8) {
            look_up(p, j, 8, to, start, x, m);
            if (p->means)
                eight_with_one(x, m, p->residuals + start, n, p->found + j);
            else
                eight_with_one(x, none, p->residuals + start, n, p->found + j);
        }
        for (; j + 4 <= to; j += 4) {
            look_up(p, j, 4, to, start, x, m);
            if (p->means)
                four_with_all(p, x, m, start, n, j);
            else
                four_with_all(p, x, none, start, n, j);
        }
        for (; j < to; j++) {
            const VALUE *column = COLUMN(j) + start;
            const double mean = p->means ? MEAN(j) : 0;
            for (int64_t row = 0; row < p->rows; row++) {
                const double *r = p->residuals + row * p->total + start;
                double sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < n; i++) sum += (column[i] - mean) * r[i];
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

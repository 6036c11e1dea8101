/* newton.py in C, for a sequence of strengths. Rows of the Cholesky factor are kept while the columns before them stay
   the same: a column that enters costs one row, not a new factor, and one that leaves is rotated out of it. The
   constants of newton.py come before this text. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { TILE = 4, BLOCK = 16 }; /* rows of a tile, and rows that are taken on together: several tiles */
enum { ROTATION = 36 };        /* to rotate a column out of n rows takes as long as 6·n² products of a new factor */

typedef struct {
    int64_t k;          /* columns */
    int64_t stride;     /* from one row of the Gram matrix to the next */
    const double *gram; /* k × k */
    const double *moment;
    double l1, l2, slack;
    int positive, kinked;
    double *w;       /* k */
    int64_t *index;  /* the face: first `held` columns that are not zero, then those that enter */
    double *sign;    /* theirs */
    int64_t held, size;
    int64_t *order; /* the columns whose rows of the factor are known */
    int64_t known;
    double *factor; /* rows of length k */
    double *pull, *x, *when, *point, *best, *here, *u, *v, *y;
    int64_t *found;
    unsigned char *barred, *inside;
} Faces;

static double dot(const double *a, const double *b, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void subtract(double *a, const double *b, double factor, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) a[i] -= factor * b[i];
}

static double entry(const Faces *f, int64_t i, int64_t j) {
    double g = f->gram[f->index[i] * f->stride + f->index[j]];
    return i == j ? g + f->l2 : g;
}

/* Inner products of TILE rows with TILE others over n entries, which stay in registers. */
static void products(const double *rows, const double *others, int64_t stride, int64_t n, double sums[TILE][TILE]) {
    const double *a = rows, *b = a + stride, *c = b + stride, *d = c + stride;
    const double *e = others, *g = e + stride, *h = g + stride, *o = h + stride;
    double ae = 0, ag = 0, ah = 0, ao = 0, be = 0, bg = 0, bh = 0, bo = 0;
    double ce = 0, cg = 0, ch = 0, co = 0, de = 0, dg = 0, dh = 0, dp = 0;
#pragma omp simd reduction(+ : ae, ag, ah, ao, be, bg, bh, bo, ce, cg, ch, co, de, dg, dh, dp)
    for (int64_t q = 0; q < n; q++) {
        ae += a[q] * e[q], ag += a[q] * g[q], ah += a[q] * h[q], ao += a[q] * o[q];
        be += b[q] * e[q], bg += b[q] * g[q], bh += b[q] * h[q], bo += b[q] * o[q];
        ce += c[q] * e[q], cg += c[q] * g[q], ch += c[q] * h[q], co += c[q] * o[q];
        de += d[q] * e[q], dg += d[q] * g[q], dh += d[q] * h[q], dp += d[q] * o[q];
    }
    const double found[TILE][TILE] = {{ae, ag, ah, ao}, {be, bg, bh, bo}, {ce, cg, ch, co}, {de, dg, dh, dp}};
    memcpy(sums, found, sizeof(found));
}

/* The entries of BLOCK rows from i on, up to column i, as many columns at a time as a tile has: each of the factor's
   own rows is read once for all of them. */
static void advance(Faces *f, int64_t i) {
    int64_t j = 0;
    for (; j + TILE <= i; j += TILE) {
        const double *others = f->factor + j * f->k;
        for (int64_t top = 0; top < BLOCK; top += TILE) {
            double *rows = f->factor + (i + top) * f->k, sums[TILE][TILE];
            products(rows, others, f->k, j, sums);
            for (int64_t r = 0; r < TILE; r++) {
                double *row = rows + r * f->k + j;
                for (int64_t c = 0; c < TILE; c++) {
                    const double *other = others + c * f->k + j;
                    double value = entry(f, i + top + r, j + c) - sums[r][c];
                    for (int64_t q = 0; q < c; q++) value -= row[q] * other[q];
                    row[c] = value / other[c];
                }
            }
        }
    }
    for (; j < i; j++) {
        const double *other = f->factor + j * f->k;
        for (int64_t r = 0; r < BLOCK; r++) {
            double *row = f->factor + (i + r) * f->k;
            row[j] = (entry(f, i + r, j) - dot(row, other, j)) / other[j];
        }
    }
}

/* The factor's rows without the one at a position: those behind it lose a column to rotations, which take TILE rows
   at a time, each a chain of dependent operations. */
static void rotate(Faces *f, int64_t position) {
    int64_t last = f->known - 1;
    for (int64_t top = position; top < last; top += TILE) { /* rows that are written; each is read from the next */
        int64_t rows = last - top < TILE ? last - top : TILE, common = top - position;
        double carry[TILE] = {0};
        for (int64_t r = 0; r < rows; r++) {
            double *row = f->factor + (top + r) * f->k;
            memcpy(row, row + f->k, position * sizeof(double));
            carry[r] = row[f->k + position];
        }
        if (rows == TILE) {
            double *a = f->factor + top * f->k + position, *b = a + f->k, *c = b + f->k, *d = c + f->k, *e = d + f->k;
            for (int64_t t = 0; t < common; t++) {
                double cosine = f->u[t], sine = f->v[t], p = b[t + 1], q = c[t + 1], x = d[t + 1], y = e[t + 1];
                a[t] = cosine * carry[0] + sine * p, carry[0] = cosine * p - sine * carry[0];
                b[t] = cosine * carry[1] + sine * q, carry[1] = cosine * q - sine * carry[1];
                c[t] = cosine * carry[2] + sine * x, carry[2] = cosine * x - sine * carry[2];
                d[t] = cosine * carry[3] + sine * y, carry[3] = cosine * y - sine * carry[3];
            }
        } else {
            common = 0;
        }
        for (int64_t r = 0; r < rows; r++) {
            double *row = f->factor + (top + r) * f->k + position, *next = row + f->k;
            for (int64_t t = common; t < top + r - position; t++) {
                row[t] = f->u[t] * carry[r] + f->v[t] * next[t + 1];
                carry[r] = f->u[t] * next[t + 1] - f->v[t] * carry[r];
            }
            int64_t t = top + r - position;
            row[t] = hypot(carry[r], next[t + 1]);
            f->u[t] = carry[r] / row[t], f->v[t] = next[t + 1] / row[t];
        }
    }
    memmove(f->order + position, f->order + position + 1, (last - position) * sizeof(int64_t));
    f->known = last;
}

/* Take columns that have left the face out of the factor, where that is less work than its rows from there on. */
static void shrink(Faces *f) {
    int64_t known = 0, left = 0, kept = 0, first = -1;
    double work = 0;
    memset(f->inside, 0, f->k);
    for (int64_t i = 0; i < f->size; i++) f->inside[f->index[i]] = 1;
    for (; known < f->known; known++) {
        if (kept < f->size && f->order[known] == f->index[kept]) {
            kept++;
        } else if (!f->inside[f->order[known]]) {
            if (first < 0) first = known;
            f->found[left++] = known;
        } else {
            break;
        }
    }
    while (left && f->found[left - 1] == known - 1) left--, known--; /* the last ones go for free */
    for (int64_t i = 0; i < left; i++) work += (double)(known - f->found[i]) * (known - f->found[i]);
    double anew = (double)kept * kept * kept - (double)first * first * first;
    if (left && ROTATION * work < anew) {
        f->known = known;
        while (left--) rotate(f, f->found[left]);
    }
}

/* Complete the factor; the first column that depends on those before it, or -1. */
static int64_t factorise(Faces *f) {
    int64_t i = 0;
    shrink(f);
    while (i < f->known && i < f->size && f->order[i] == f->index[i]) i++;
    int64_t first = i; /* of the block: its rows are known up to this column */
    for (; i < f->size; i++) {
        double *row = f->factor + i * f->k;
        if (i - first == BLOCK || i == first) {
            first = i;
            if (i + BLOCK <= f->size) advance(f, i);
        }
        for (int64_t j = first + BLOCK <= f->size ? first : 0; j < i; j++) {
            const double *other = f->factor + j * f->k;
            row[j] = (entry(f, i, j) - dot(row, other, j)) / other[j];
        }
        double own = entry(f, i, i), pivot = own - dot(row, row, i);
        if (!(pivot > DEPENDENT * own)) {
            f->known = i;
            return i;
        }
        row[i] = sqrt(pivot);
        f->order[i] = f->index[i];
    }
    f->known = f->size;
    return -1;
}

/* Solve for the first n columns, in place. */
static void solve(const Faces *f, double *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const double *row = f->factor + i * f->k;
        x[i] = (x[i] - dot(row, x, i)) / row[i];
    }
    for (int64_t i = n - 1; i >= 0; i--) {
        const double *row = f->factor + i * f->k;
        x[i] /= row[i];
        subtract(x, row, x[i], i);
    }
}

static void drop(Faces *f, int64_t position) {
    for (int64_t i = position + 1; i < f->size; i++) {
        f->index[i - 1] = f->index[i];
        f->sign[i - 1] = f->sign[i];
    }
    f->size--;
}

/* Columns at zero whose pull exceeds the strength, strongest first, go behind the held ones. */
static void enter(Faces *f) {
    memcpy(f->pull, f->moment, f->k * sizeof(double));
    memset(f->inside, 0, f->k);
    for (int64_t i = 0; i < f->held; i++) {
        int64_t j = f->index[i];
        subtract(f->pull, f->gram + j * f->stride, f->w[j], f->k);
        f->inside[j] = 1;
    }
    int64_t count = 0;
    for (int64_t j = 0; j < f->k; j++) {
        double force = f->positive ? f->pull[j] : fabs(f->pull[j]);
        if (f->inside[j] || f->barred[j] || !(force > f->slack)) continue;
        f->when[j] = force;
        f->found[count++] = j;
    }
    int64_t least = f->held / 2 > MANY ? f->held / 2 : MANY, taken = count;
    if (count > least) taken = count / 2 > MANY / 2 ? count / 2 : MANY / 2;
    f->size = f->held;
    for (int64_t i = 0; i < taken; i++) { /* a selection: the order matters */
        int64_t strongest = i;
        for (int64_t j = i + 1; j < count; j++)
            if (f->when[f->found[j]] > f->when[f->found[strongest]]) strongest = j;
        int64_t column = f->found[strongest];
        f->found[strongest] = f->found[i];
        f->found[i] = column;
        f->index[f->size] = column;
        f->sign[f->size++] = f->pull[column] > 0 ? 1 : -1;
    }
}

/* Take the face's values, and leave those at zero out of it. */
static void settle(Faces *f, const double *values, int64_t n) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t column = f->index[i];
        f->w[column] = values[i] + 0.0;
        if (values[i] == 0) continue;
        f->index[kept] = column;
        f->sign[kept++] = values[i] > 0 ? 1 : -1;
    }
    for (int64_t i = n; i < f->held; i++) { /* held columns behind a dependent one are still there */
        f->index[kept] = f->index[i];
        f->sign[kept++] = f->sign[i];
    }
    f->held = f->size = kept;
}

/* y = Lᵀp for the factor L of the face. */
static void project(const Faces *f, const double *p, double *y) {
    memset(y, 0, f->size * sizeof(double));
    for (int64_t i = 0; i < f->size; i++)
        if (p[i] != 0) subtract(y, f->factor + i * f->k, -p[i], i + 1);
}

/* The objective at a time of the segment: y(t) = Lᵀ(w + t·d) less the rows of those that have crossed. */
static double objective(Faces *f, double time) {
    int64_t n = f->size;
    double linear = 0;
    for (int64_t i = 0; i < n; i++) f->y[i] = f->u[i] + time * f->v[i];
    for (int64_t i = 0; i < n; i++) {
        double p = f->here[i] + time * (f->x[i] - f->here[i]);
        if (time >= f->when[i]) {
            subtract(f->y, f->factor + i * f->k, p, i + 1);
            p = 0;
        }
        f->point[i] = p;
        linear += f->l1 * fabs(p) - p * f->moment[f->index[i]];
    }
    return 0.5 * dot(f->y, f->y, n) + linear;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The best of some points between w and x, where coefficients that cross zero stay there. Whether none does. */
static int segment(Faces *f) {
    int64_t crossing = 0, n = f->size;
    for (int64_t i = 0; i < n; i++) {
        double here = f->here[i] = i < f->held ? f->w[f->index[i]] : 0;
        int crosses = f->kinked && i < f->held && f->x[i] * f->sign[i] < 0;
        f->when[i] = crosses ? here / (here - f->x[i]) : INFINITY;
        if (crosses) f->point[crossing++] = f->when[i];
    }
    if (!crossing) {
        settle(f, f->x, n);
        return 1;
    }
    double times[CROSSINGS + SHARES_COUNT];
    const double shares[SHARES_COUNT] = SHARES;
    qsort(f->point, crossing, sizeof(double), ascending);
    int64_t count = crossing < CROSSINGS ? crossing : CROSSINGS;
    memcpy(times, f->point, count * sizeof(double));
    for (int i = 0; i < SHARES_COUNT; i++) times[count++] = shares[i];
    project(f, f->here, f->u);
    project(f, f->x, f->v);
    for (int64_t i = 0; i < n; i++) f->v[i] -= f->u[i];
    double least = INFINITY;
    if (!f->positive) { /* x itself, signs and all */
        for (int64_t i = 0; i < n; i++) f->y[i] = f->u[i] + f->v[i];
        least = 0.5 * dot(f->y, f->y, n);
        for (int64_t i = 0; i < n; i++) least += f->l1 * fabs(f->x[i]) - f->x[i] * f->moment[f->index[i]];
        memcpy(f->best, f->x, n * sizeof(double));
    }
    for (int64_t c = 0; c < count; c++) {
        double value = objective(f, times[c]);
        if ((c == 0 && f->positive) || value <= least) {
            least = value;
            memcpy(f->best, f->point, n * sizeof(double));
        }
    }
    settle(f, f->best, n);
    return 0;
}

/* Move along the direction that changes no prediction until a coefficient is zero. Whether that lowers the penalty. */
static int exchange(Faces *f, int64_t stuck) {
    int enters = stuck == f->held;
    double total = 0, size = 0;
    for (int64_t i = 0; i < stuck; i++) f->x[i] = -f->gram[f->index[i] * f->stride + f->index[stuck]];
    solve(f, f->x, stuck);
    f->x[stuck] = 1;
    int falls = 0;
    double turn = enters ? f->sign[stuck] : 1;
    for (int64_t i = 0; i <= stuck; i++) {
        f->x[i] *= turn;
        double slope = f->x[i] * f->sign[i];
        total += slope;
        size += fabs(slope);
        falls |= slope < 0;
    }
    if (enters && (f->l1 == 0 || total >= -1e-9 * size)) return 0;
    turn = !enters && (total > 0 || !falls) ? -1 : 1;
    double least = INFINITY;
    int64_t first = -1;
    for (int64_t i = 0; i <= stuck && i < f->held; i++) {
        f->x[i] *= turn;
        double when = f->x[i] * f->sign[i] < 0 ? -f->w[f->index[i]] / f->x[i] : INFINITY;
        if (when < least) {
            least = when;
            first = i;
        }
    }
    if (first < 0) return 0;
    for (int64_t i = 0; i <= stuck; i++) f->best[i] = (i < f->held ? f->w[f->index[i]] : 0) + least * f->x[i];
    f->best[first] = 0;
    f->size = stuck + 1;
    settle(f, f->best, stuck + 1);
    return 1;
}

/* Towards the minimiser of the face. Whether it is reached. */
static int step(Faces *f) {
    for (;;) {
        int64_t stuck = factorise(f);
        if (stuck > f->held) { /* those before it are independent; the others may enter later */
            f->size = stuck;
            continue;
        }
        if (stuck >= 0) {
            if (exchange(f, stuck)) return 0;
            f->barred[f->index[stuck]] = 1;
            drop(f, stuck);
            if (f->size == f->held) return 1;
            continue;
        }
        for (int64_t i = 0; i < f->size; i++) f->x[i] = f->moment[f->index[i]] - f->l1 * f->sign[i];
        solve(f, f->x, f->size);
        if (!f->kinked || f->held == f->size) break;
        int64_t kept = f->held;
        for (int64_t i = f->held; i < f->size; i++) {
            if (!(f->x[i] * f->sign[i] > 0)) continue;
            f->index[kept] = f->index[i];
            f->sign[kept++] = f->sign[i];
        }
        if (kept == f->size) break;
        if (kept > f->held) {
            f->size = kept;
        } else if (f->size > f->held + 1) {
            f->size = f->held + 1;
        } else {
            f->barred[f->index[f->held]] = 1;
            f->size = f->held;
            return 1;
        }
    }
    return segment(f);
}

/* The minimiser from w on. The number of steps, or -1 - the number where the limit was hit. */
static int64_t descend(Faces *f, int64_t limit) {
    int settled = 0;
    for (int64_t steps = 0;; steps++) {
        f->size = f->held;
        settled = settled || !f->held;
        if (settled) {
            enter(f);
            if (f->size == f->held) return steps;
        }
        if (steps >= limit) return -1 - steps;
        settled = step(f);
    }
}

/* Minimisers for a sequence of strengths, each from the one before. Zero, or one without memory.
   w: in the start (k), out the minimisers (count × k); steps: as descend returns them. */
int torchreg_minimise(int64_t k, int64_t stride, const double *gram, const double *moment, int64_t count, const double *l1,
                      const double *l2, int positive, int64_t limit, double *w, int64_t *steps) {
    double largest = 0;
    for (int64_t j = 0; j < k; j++) largest = fmax(largest, fabs(moment[j]));
    size_t n = (size_t)k + 1;
    double *numbers = malloc((n * n + 11 * n) * sizeof(double));
    int64_t *integers = malloc(3 * n * sizeof(int64_t));
    unsigned char *marks = malloc(2 * n);
    if (!numbers || !integers || !marks) {
        free(numbers), free(integers), free(marks);
        return 1;
    }
    Faces f = {.k = k, .stride = stride, .gram = gram, .moment = moment, .positive = positive};
    f.factor = numbers;
    double *rest = numbers + n * n;
    f.sign = rest, f.pull = rest + n, f.x = rest + 2 * n, f.when = rest + 3 * n, f.point = rest + 4 * n;
    f.best = rest + 5 * n, f.w = rest + 6 * n, f.here = rest + 7 * n;
    f.u = rest + 8 * n, f.v = rest + 9 * n, f.y = rest + 10 * n;
    f.index = integers, f.order = integers + n, f.found = integers + 2 * n;
    f.barred = marks, f.inside = marks + n;
    memcpy(f.w, w, k * sizeof(double));
    for (int64_t j = 0; j < k; j++) {
        if (f.w[j] == 0) continue;
        f.index[f.held] = j;
        f.sign[f.held++] = f.w[j] > 0 ? 1 : -1;
    }
    for (int64_t i = 0; i < count; i++) {
        if (i && l2[i] != f.l2) f.known = 0;
        f.l1 = l1[i], f.l2 = l2[i], f.slack = l1[i] + SLACK * largest;
        f.kinked = l1[i] > 0 || positive;
        memset(f.barred, 0, n);
        steps[i] = descend(&f, limit);
        memcpy(w + i * k, f.w, k * sizeof(double));
    }
    free(numbers), free(integers), free(marks);
    return 0;
}

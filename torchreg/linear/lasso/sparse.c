/* ½ Σ h·(Zd)² − t·Zd + l1·Σ|w + d| + ½·l2·Σ(w + d)² over some columns of a sparse X in CSC format, of type VALUE.

   Z is X, or X less the means m of its columns under the weights h. Those are never subtracted: t is kept without them,
   and shift = Σ m·d beside it. As t − h·(Zd) sums to zero then, the pull at a column is Σ x·t + shift·m·Σh. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { AHEAD = 4 };        /* columns whose entries are asked for ahead of time */
enum { LONGEST_WAIT = 64 }; /* sweeps without a change of signs before another attempt on a face */
enum { STALLED = 50, NEAR = 1000 }; /* sweeps without a change halved within this many times `least`: that is rounding */
static const double PART = 0.1; /* of the last sweep's change, down to which the coefficients that are not zero go */

typedef struct {
    const VALUE *values;
    const int32_t *rows, *starts;
    int64_t samples;
    const double *weights; /* h, (n), or NULL: all are `weight` */
    double weight, total;  /* Σh */
    double *means;         /* m, (p), or NULL */
    double *squares;       /* Σ h·z², (p) */
    double *t;             /* (n) */
    double *w;             /* (p) */
    double shift, l1, l2;
    int32_t positive;
} Quadratic;

static double product(const Quadratic *c, int64_t j, const double *t) {
    double sum = 0;
    for (int32_t q = c->starts[j]; q < c->starts[j + 1]; q++) sum += c->values[q] * t[c->rows[q]];
    return sum;
}

static double pull(const Quadratic *c, int64_t j) {
    double sum = product(c, j, c->t);
    return c->means ? sum + c->shift * c->total * c->means[j] : sum;
}

static void prefetch(const Quadratic *c, int64_t j) {
    const char *values = (const char *)(c->values + c->starts[j]), *rows = (const char *)(c->rows + c->starts[j]);
    __builtin_prefetch(values);
    __builtin_prefetch(values + 64);
    __builtin_prefetch(values + 128);
    __builtin_prefetch(rows);
    __builtin_prefetch(rows + 64);
}

/* One sweep: the largest change, times the root of the column's square; `signs` counts changes of sign. */
static double sweep(Quadratic *c, const int64_t *index, int64_t count, int64_t *signs) {
    double largest = 0, l1 = c->l1, l2 = c->l2, *t = c->t;
    const VALUE *values = c->values;
    const int32_t *rows = c->rows;
    const double *weights = c->weights;
    for (int64_t i = 0; i < count; i++) {
        int64_t j = index[i];
        if (i + AHEAD < count) prefetch(c, index[i + AHEAD]);
        double square = c->squares[j], old = c->w[j];
        if (!(square > 0)) continue;
        double force = pull(c, j) + square * old, size = c->positive ? force : fabs(force), w = 0;
        if (size > l1) w = copysign((size - l1) / (square + l2), force);
        double change = w - old;
        if (change == 0) continue;
        c->w[j] = w;
        int32_t start = c->starts[j], end = c->starts[j + 1];
        if (weights)
            for (int32_t q = start; q < end; q++) t[rows[q]] -= change * weights[rows[q]] * values[q];
        else {
            double step = change * c->weight;
            for (int32_t q = start; q < end; q++) t[rows[q]] -= step * values[q];
        }
        if (c->means) c->shift += c->means[j] * change;
        *signs += w == 0 || old == 0 || signbit(w) != signbit(old);
        largest = fmax(largest, fabs(change) * sqrt(square));
    }
    return largest;
}

typedef struct {
    int64_t *index;                    /* the coefficients of a face: those that are not zero */
    double *slope, *way, *curved, *turn; /* of the objective on it, a direction, Hessian times that, h·(X way) (n) */
} Face;

/* The largest slope of the face at w, in units of a sweep's change; their scaled products; scaled slopes in `out`. */
static double scaled(const Quadratic *c, const Face *f, int64_t count, double *product, double *out) {
    double largest = 0;
    *product = 0;
    for (int64_t i = 0; i < count; i++) {
        double diagonal = c->squares[f->index[i]] + c->l2;
        out[i] = f->slope[i] / diagonal;
        *product += out[i] * f->slope[i];
        largest = fmax(largest, out[i] * f->slope[i]);
    }
    return sqrt(largest);
}

/* Conjugate gradients for the minimiser where no sign changes, preconditioned by the diagonal, until no sweep would change
   more than `least`. They end early where a coefficient reaches zero. Whether one has. */
static int descend_on_face(Quadratic *c, Face *f, int64_t count, double least, int64_t limit, int64_t *steps,
                           double *scratch) {
    int bound = c->l1 > 0 || c->positive;
    double before, after;
    for (int64_t i = 0; i < count; i++) {
        int64_t j = f->index[i];
        f->slope[i] = pull(c, j) - copysign(c->l1, c->w[j]) - c->l2 * c->w[j];
    }
    if (scaled(c, f, count, &before, f->way) <= least) return 0;
    while (*steps < limit) {
        double mean = 0, curve = 0, scale = 0;
        ++*steps;
        memset(f->turn, 0, c->samples * sizeof(double));
        for (int64_t i = 0; i < count; i++) {
            int64_t j = f->index[i];
            if (i + AHEAD < count) prefetch(c, f->index[i + AHEAD]);
            double way = f->way[i];
            for (int32_t q = c->starts[j]; q < c->starts[j + 1]; q++) f->turn[c->rows[q]] += way * c->values[q];
            if (c->means) mean += c->means[j] * way;
        }
        for (int64_t r = 0; r < c->samples; r++) f->turn[r] *= c->weights ? c->weights[r] : c->weight;
        for (int64_t i = 0; i < count; i++) {
            int64_t j = f->index[i];
            if (i + AHEAD < count) prefetch(c, f->index[i + AHEAD]);
            double way = f->way[i], curved = product(c, j, f->turn) + c->l2 * way;
            if (c->means) curved -= mean * c->total * c->means[j];
            f->curved[i] = curved;
            curve += way * curved;
            scale += way * way * (c->squares[j] + c->l2);
        }
        if (!(curve > (bound ? 0 : 1e-13 * scale))) return 0;
        double step = before / curve;
        int64_t first = -1;
        for (int64_t i = 0; bound && i < count; i++) {
            double w = c->w[f->index[i]], way = f->way[i], there = w + step * way;
            if (there == 0 || signbit(there) != signbit(w)) {
                step = -w / way;
                first = i;
            }
        }
        for (int64_t i = 0; i < count; i++) c->w[f->index[i]] += step * f->way[i];
        for (int64_t r = 0; r < c->samples; r++) c->t[r] -= step * f->turn[r];
        c->shift += step * mean;
        if (first >= 0) {
            c->w[f->index[first]] = 0;
            return 1;
        }
        for (int64_t i = 0; i < count; i++) f->slope[i] -= step * f->curved[i];
        if (scaled(c, f, count, &after, scratch) <= least) return 0;
        double more = after / before;
        for (int64_t i = 0; i < count; i++) f->way[i] = scratch[i] + more * f->way[i];
        before = after;
    }
    return 0;
}

static int64_t nonzero(const Quadratic *c, const int64_t *index, int64_t count, int64_t *found) {
    int64_t some = 0;
    for (int64_t i = 0; i < count; i++)
        if (c->w[index[i]] != 0) found[some++] = index[i];
    return some;
}

/* Whether changes no longer halve. */
static int stalls(double largest, double least, double *best, int64_t *count) {
    *count = largest <= 0.5 * *best || largest > NEAR * least ? 0 : *count + 1;
    if (!*count) *best = largest;
    return *count >= STALLED;
}

/* Sweeps over the columns of an index until none changes more than `least`, in between over those that are not zero, and
   once their signs have settled conjugate gradients on those. The number of sweeps and gradients; -1: no memory. */
int64_t torchreg_descend(Quadratic *c, const int64_t *index, int64_t count, double least, int64_t limit) {
    int64_t *active = malloc((count + 1) * sizeof(int64_t)), *on_face = malloc((count + 1) * sizeof(int64_t));
    double *room = malloc((4 * count + c->samples + 1) * sizeof(double));
    int64_t done = 0, wait = 1, whole = 0;
    double least_whole = INFINITY;
    if (!active || !on_face || !room) done = -1;
    Face f = {on_face, room, room + count, room + 2 * count, room + 4 * count};
    while (done >= 0 && done < limit) {
        int64_t signs = 0, stable = 0, stalled = 0;
        double largest = sweep(c, index, count, &signs), best = INFINITY;
        done++;
        if (largest <= least || stalls(largest, least, &least_whole, &whole)) break;
        double enough = signs ? fmax(least, PART * largest) : least;
        int64_t some = nonzero(c, index, count, active);
        while (done < limit) {
            signs = 0;
            largest = sweep(c, active, some, &signs);
            done++;
            if (largest <= enough || stalls(largest, enough, &best, &stalled)) break;
            stable = signs ? 0 : stable + 1;
            if (stable < wait) continue;
            int64_t held = nonzero(c, active, some, f.index);
            if (!descend_on_face(c, &f, held, enough, limit, &done, room + 3 * count)) break;
            wait = wait < LONGEST_WAIT ? 2 * wait : wait;
            stable = 0;
        }
    }
    free(active);
    free(on_face);
    free(room);
    return done;
}

/* Sums of the columns that are not zero: Xw, (n). */
void torchreg_combine(const Quadratic *c, const double *w, int64_t features, double *out) {
    memset(out, 0, c->samples * sizeof(double));
    for (int64_t j = 0; j < features; j++)
        if (w[j] != 0)
            for (int32_t q = c->starts[j]; q < c->starts[j + 1]; q++) out[c->rows[q]] += w[j] * c->values[q];
}

/* Squares, and means unless those are given, of columns under the weights; what is left of a square by rounding is 0. */
void torchreg_weigh(Quadratic *c, const int64_t *index, int64_t count, double rounding, int given) {
    for (int64_t i = 0; i < count; i++) {
        int64_t j = index[i];
        double square = 0, sum = 0;
        for (int32_t q = c->starts[j]; q < c->starts[j + 1]; q++) {
            double x = c->values[q], weighted = x * (c->weights ? c->weights[c->rows[q]] : c->weight);
            sum += weighted;
            square += weighted * x;
        }
        if (c->means) {
            if (!given) c->means[j] = c->total > 0 ? sum / c->total : 0;
            double left = square - c->total * c->means[j] * c->means[j];
            square = left <= rounding * square ? 0 : left;
        }
        c->squares[j] = square;
    }
}

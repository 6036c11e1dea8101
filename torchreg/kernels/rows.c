/* Rows of a table: the shrinkage that they have missed, and the steps of those that have a gradient.

   They must agree with optim/missed.py and optim/row_steps.py, which are the specification. Rows are 64 bytes or so,
   anywhere in memory: what counts is that the next ones are asked for in time. */

#ifndef T

#include <stdint.h>

enum { AHEAD = 16, LINE = 64, LINES = 8 };

typedef struct {
    int64_t width, count; /* of a row, and of rows */
    void *w;
    const int64_t *rows;
    /* What rows have missed: see missed.py. */
    double *settled;
    int64_t totals, settled_pitch; /* numbers of a row, and from one row to the next */
    double now[3], then[3], l1; /* the totals before and after a step */
    int64_t diagonal;
    const void *scale; /* the squares that the metric is of */
    /* The gradients: row i's are first[i] and those that follow it, until -1. */
    const void *values;
    const int32_t *first, *next;
    void *sum; /* room for a row */
    double sign, lr, threshold, divisor;
    /* SGD */
    void *buffer;
    double momentum, decay;
    int64_t nesterov;
    /* Adam */
    void *mean, *square, *top;
    double *steps;
    int64_t steps_pitch;
    const double *drops1, *drops2; /* 1 - beta^t for the first t */
    int64_t tabled, identity, penalised;
    double beta1, beta2, eps, tau;
} Rows;

#define INLINE static inline __attribute__((always_inline))

/* Into the second cache: the first takes fewer at once. */
static void ask(const void *start, int64_t bytes)
{
    const char *from = start, *end = from + (bytes < LINE * LINES ? bytes : LINE * LINES);
    for (; from < end; from += LINE)
        __builtin_prefetch(from, 0, 2);
}

/* 1 - beta^t */
static double drop(double beta, const double *tabled, int64_t count, double t)
{
    if (t >= 0 && t < count)
        return tabled[(int64_t)t];
    double result = 1;
    for (int64_t left = t < 1e18 ? (int64_t)t : (int64_t)1e18; left > 0; left >>= 1, beta *= beta)
        result = left & 1 ? result * beta : result;
    return 1 - result;
}

/* Whether all are rows of a table. */
int64_t are_rows(const int64_t *index, int64_t n, int64_t size)
{
    int outside = 0;
    for (int64_t i = 0; i < n; i++)
        outside |= (uint64_t)index[i] >= (uint64_t)size;
    return !outside;
}

/* The rows in order, each once, and the entries of each, linked. `slots` is a table of zeros, `mask` its size - 1. */
int64_t group(
    const int64_t *index, int64_t n, int32_t *slots, uint64_t mask, int64_t *rows, int32_t *first, int32_t *last,
    int32_t *next)
{
    int32_t count = 0;
    for (int32_t i = 0; i < n; i++) {
        uint64_t slot = (uint64_t)index[i] * 0x9E3779B97F4A7C15u;
        slot = (slot ^ slot >> 32) & mask;
        while (slots[slot] && rows[slots[slot] - 1] != index[i])
            slot = (slot + 1) & mask;
        next[i] = -1;
        if (slots[slot]) {
            const int32_t own = slots[slot] - 1;
            next[last[own]] = i;
            last[own] = i;
            continue;
        }
        rows[count] = index[i];
        first[count] = last[count] = i;
        slots[slot] = ++count;
    }
    return count;
}

static inline double *settled_of(const Rows *t, int64_t row)
{
    return t->settled + row * t->settled_pitch;
}

static inline double *steps_of(const Rows *t, int64_t row)
{
    return t->steps + row * t->steps_pitch;
}

static inline int is_settled(const Rows *t, int64_t row)
{
    const double *since = settled_of(t, row);
    int same = 1;
    for (int64_t k = 0; k < t->totals; k++)
        same &= since[k] == t->now[k];
    return same;
}

static inline void mark(const Rows *t, int64_t row, const double *totals)
{
    double *since = settled_of(t, row);
    for (int64_t k = 0; k < t->totals; k++)
        since[k] = totals[k];
}

#define T float
#define NAME(x) x##_float32
#include __FILE__
#undef T
#undef NAME
#define T double
#define NAME(x) x##_float64
#include __FILE__
#undef T
#undef NAME

#else

INLINE T NAME(root)(T x)
{
    return sizeof(T) == 4 ? (T)__builtin_sqrtf((float)x) : (T)__builtin_sqrt(x);
}

static T NAME(representable)(double value)
{
    const double largest = sizeof(T) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;
    return (T)(value > largest ? largest : value);
}

/* Soft-thresholding that keeps NaN; +0.0 where nothing is left. */
INLINE T NAME(thresholded)(T x, T threshold)
{
    T rest = (x < 0 ? -x : x) - threshold;
    rest = 0 > rest ? 0 : rest;
    return (x < 0 ? -rest : rest) + 0;
}

INLINE T NAME(inverse_root)(T square, T corrected, T eps)
{
    return 1 / (NAME(root)(square) / corrected + eps);
}

/* Give a row the shrinkage that it has missed; whether it had missed any. */
static int NAME(catch_up)(const Rows *t, int64_t row)
{
    const int64_t width = t->width;
    const double *since = settled_of(t, row);
    T *restrict w = (T *)t->w + row * width;
    if (is_settled(t, row))
        return 0;
    if (t->diagonal) {
        const double steps = *steps_of(t, row);
        const T *restrict square = (const T *)t->scale + row * width;
        const T missed = (T)((t->now[0] - since[0]) * t->l1), eps = (T)t->eps;
        const T corrected = (T)__builtin_sqrt(drop(t->beta2, t->drops2, t->tabled, steps));
        for (int64_t j = 0; steps > 0 && j < width; j++)
            w[j] = NAME(thresholded)(w[j], NAME(inverse_root)(square[j], corrected, eps) * missed);
    } else {
        const T threshold = NAME(representable)(since[1] * (t->now[0] - since[0]));
        const T factor = (T)(t->now[1] / since[1]);
        for (int64_t j = 0; j < width; j++)
            w[j] = NAME(thresholded)(w[j], threshold) * factor + 0;
    }
    return 1;
}

/* Returns how many rows had missed something. */
int64_t NAME(settle)(const Rows *t)
{
    int64_t changed = 0;
    const int64_t bytes = t->width * (int64_t)sizeof(T);
    for (int64_t i = 0; i < t->count; i++) {
        if (i + 2 * AHEAD < t->count)
            ask(settled_of(t, t->rows[i + 2 * AHEAD]), t->totals * (int64_t)sizeof(double));
        if (i + AHEAD < t->count && !is_settled(t, t->rows[i + AHEAD])) {
            const int64_t later = t->rows[i + AHEAD];
            ask((const T *)t->w + later * t->width, bytes);
            if (t->diagonal) {
                __builtin_prefetch(steps_of(t, later));
                ask((const T *)t->scale + later * t->width, bytes);
            }
        }
        if (NAME(catch_up)(t, t->rows[i])) {
            mark(t, t->rows[i], t->now);
            changed++;
        }
    }
    return changed;
}

/* A row that is about to be stepped is settled, the shrinkage of this step included. */
INLINE void NAME(begin)(const Rows *t, int64_t row)
{
    if (!t->settled)
        return;
    NAME(catch_up)(t, row);
    mark(t, row, t->then);
}

/* The sum of a row's gradients, in their order. */
static const T *NAME(gradient)(const Rows *t, int64_t i)
{
    const int64_t width = t->width;
    const T *values = t->values;
    T *restrict sum = t->sum;
    int32_t at = t->first[i];
    if (t->next[at] < 0)
        return values + at * width;
    for (int64_t j = 0; j < width; j++)
        sum[j] = values[at * width + j];
    while ((at = t->next[at]) >= 0)
        for (int64_t j = 0; j < width; j++)
            sum[j] += values[at * width + j];
    return sum;
}

/* The flags are constants where this is called. */
INLINE void NAME(descend)(
    T *restrict w, T *restrict m, const T *restrict g, const Rows *t, const int nesterov, const int decays,
    const int shrinks, const int divides)
{
    const T sign = (T)t->sign, lr = (T)t->lr, momentum = (T)t->momentum, decay = (T)t->decay;
    const T threshold = NAME(representable)(t->threshold), divisor = (T)t->divisor;
    const int64_t width = t->width;
    for (int64_t j = 0; j < width; j++) {
        T u = sign * g[j];
        if (decays)
            u += decay * w[j];
        if (m) {
            const T buffer = momentum * m[j] + u;
            m[j] = buffer;
            u = nesterov ? u + momentum * buffer : buffer;
        }
        T value = w[j] - lr * u;
        if (shrinks)
            value = NAME(thresholded)(value, threshold);
        if (divides)
            value = value / divisor;
        w[j] = value;
    }
}

void NAME(sgd)(const Rows *t)
{
    const int64_t width = t->width;
    for (int64_t i = 0; i < t->count; i++) {
        if (i + AHEAD < t->count) {
            const int64_t later = t->rows[i + AHEAD] * width;
            ask((const T *)t->w + later, width * (int64_t)sizeof(T));
            ask((const T *)t->values + t->first[i + AHEAD] * width, width * (int64_t)sizeof(T));
            if (t->settled)
                ask(settled_of(t, t->rows[i + AHEAD]), t->totals * (int64_t)sizeof(double));
            if (t->buffer)
                ask((const T *)t->buffer + later, width * (int64_t)sizeof(T));
        }
        NAME(begin)(t, t->rows[i]);
        T *w = (T *)t->w + t->rows[i] * width;
        const T *g = NAME(gradient)(t, i);
        const int decays = t->decay != 0, shrinks = t->threshold != 0, divides = t->divisor != 1;
        if (t->buffer)
            NAME(descend)(w, (T *)t->buffer + t->rows[i] * width, g, t, t->nesterov != 0, decays, shrinks, divides);
        else if (decays || divides)
            NAME(descend)(w, 0, g, t, 0, decays, shrinks, divides);
        else
            NAME(descend)(w, 0, g, t, 0, 0, shrinks, 0);
    }
}

typedef struct {
    T sign, beta1, rest1, beta2, rest2, eps, tau, l1, divisor, threshold, corrected, rate;
} NAME(Numbers);

/* The flags are constants where this is called: all but the plain form are rare. */
INLINE void NAME(adapt)(
    T *restrict w, T *restrict mean, T *restrict square, T *restrict top, const T *restrict g, int64_t width,
    const NAME(Numbers) h, const int shrinks, const int identity, const int near)
{
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        const T u = h.sign * g[j], m = near ? u - (u - mean[j]) * h.beta1 : mean[j] + h.rest1 * (u - mean[j]);
        T v = square[j] * h.beta2 + h.rest2 * u * u;
        mean[j] = m;
        square[j] = v;
        if (top) {
            v = v > top[j] || v != v ? v : top[j];
            top[j] = v;
        }
        const T metric = NAME(inverse_root)(v, h.corrected, h.eps);
        T value = w[j] - m * metric * h.rate;
        if (shrinks)
            value = NAME(thresholded)(value, identity ? h.threshold : h.l1 * (metric * h.tau));
        w[j] = identity ? value / h.divisor : value;
    }
}

void NAME(adam)(const Rows *t)
{
    const int64_t width = t->width, bytes = width * (int64_t)sizeof(T);
    const int identity = t->identity != 0, shrinks = t->penalised != 0 && (!identity || t->threshold != 0);
    const int near = t->beta1 <= 0.5; /* as torch.lerp */
    NAME(Numbers) h = {
        .sign = (T)t->sign,
        .beta1 = (T)t->beta1,
        .rest1 = (T)(1 - t->beta1),
        .beta2 = (T)t->beta2,
        .rest2 = (T)(1 - t->beta2),
        .eps = (T)t->eps,
        .tau = (T)t->tau,
        .l1 = (T)t->l1,
        .divisor = (T)t->divisor,
        .threshold = NAME(representable)(t->threshold),
    };
    for (int64_t i = 0; i < t->count; i++) {
        if (i + AHEAD < t->count) {
            const int64_t later = t->rows[i + AHEAD];
            ask((const T *)t->w + later * width, bytes);
            ask((const T *)t->mean + later * width, bytes);
            ask((const T *)t->square + later * width, bytes);
            ask((const T *)t->values + t->first[i + AHEAD] * width, bytes);
            __builtin_prefetch(steps_of(t, later));
            if (t->settled)
                ask(settled_of(t, later), t->totals * (int64_t)sizeof(double));
            if (t->top)
                ask((const T *)t->top + later * width, bytes);
        }
        const int64_t row = t->rows[i];
        NAME(begin)(t, row);
        const T *g = NAME(gradient)(t, i);
        T *w = (T *)t->w + row * width, *mean = (T *)t->mean + row * width, *square = (T *)t->square + row * width;
        T *top = t->top ? (T *)t->top + row * width : 0;
        const double count = *steps_of(t, row) += 1;
        h.corrected = (T)__builtin_sqrt(drop(t->beta2, t->drops2, t->tabled, count));
        h.rate = (T)(t->lr / drop(t->beta1, t->drops1, t->tabled, count));
        if (shrinks && !identity && !top && !near)
            NAME(adapt)(w, mean, square, 0, g, width, h, 1, 0, 0);
        else if (top)
            NAME(adapt)(w, mean, square, top, g, width, h, shrinks, identity, near);
        else
            NAME(adapt)(w, mean, square, 0, g, width, h, shrinks, identity, near);
    }
}

#endif

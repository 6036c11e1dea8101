/* What proximal steps share: the table that they work from, soft-thresholding, and counting on the way.

   They must agree with reference.py and adam.py, which are the specification. Compiled without -ffast-math: NaN stays
   NaN, inf stays inf, and what is shrunk away is +0.0, because it is x - x. The names of columns (COLUMN_w, HYPER_lr,
   COUNT_zeros, ...) are put before this text by native.py, and a kernel after it; all of it includes itself, once for
   each type T. */

#ifndef T

#include <stdint.h>

enum { BLOCK = 1024 };

typedef struct {
    const int64_t *table;  /* COLUMNS rows of `tensors` entries */
    int64_t tensors;
    const int64_t *pieces; /* the tensor of each piece, then the first element of each */
    int64_t count, piece_size;
    const double *hypers;
    double *counts;
} Plan;

#define INLINE static inline __attribute__((always_inline))
/* Of the tensor whose column of the table is `column`, from its element `start` on: what is there, or a null pointer. */
#define AT(name) column[COLUMN_##name * plan->tensors]
#define FROM_START(name) (AT(name) ? (T *)AT(name) + start : 0)

/* Without the library of mathematics, which a shared library would have to be linked with. */
static double power(double base, int64_t exponent)
{
    double result = 1;
    for (; exponent > 0; exponent >>= 1, base *= base)
        result = exponent & 1 ? result * base : result;
    return result;
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

static T NAME(representable)(double value)
{
    const double largest = sizeof(T) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;
    return (T)(value < largest ? value : largest);
}

INLINE T NAME(square_root)(T x)
{
    return sizeof(T) == 4 ? (T)__builtin_sqrtf((float)x) : (T)__builtin_sqrt(x);
}

INLINE T NAME(thresholded)(T x, T threshold)
{
    T clamped = x > threshold ? threshold : x;
    clamped = clamped < -threshold ? -threshold : clamped;
    return x - clamped;
}

/* The sums of a block whose squares leave the range of T, which a sum in T would lose. */
static __attribute__((noinline)) void NAME(wide_sums)(const T *w, int n, double *counts)
{
    for (int i = 0; i < n; i++) {
        const double value = w[i];
        counts[COUNT_l1] += value < 0 ? -value : value;
        counts[COUNT_l2] += value * value;
    }
}

INLINE void NAME(tally)(const T *w, int n, double *counts, int zeros, int fresh, int revived, T sum, T squares)
{
    counts[COUNT_zeros] += zeros;
    counts[COUNT_new] += fresh;
    counts[COUNT_revived] += revived;
    if (sum > 0 && !(squares > (T)1e-30 && squares < (T)1e38)) {
        NAME(wide_sums)(w, n, counts);
        return;
    }
    counts[COUNT_l1] += sum;
    counts[COUNT_l2] += squares;
}

#endif

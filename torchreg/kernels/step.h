/* What proximal steps share: the table that they work from, soft-thresholding, and counting on the way.

   They must agree with reference.py and adam.py, which are the specification. Compiled without -ffast-math: NaN stays
   NaN, inf stays inf, and what is shrunk away is +0.0. The names of columns (COLUMN_w, HYPER_lr, COUNT_zeros, ...) are
   put before this text by native.py, and a kernel after it; all of it includes itself, once for each type T. */

#ifndef T

#include <stdint.h>

/* Elements that are summed up in T before they are in double; likewise of groups, which take more of the first-level cache. */
enum { STRETCH = 2048, BLOCK = 1024, CHUNK = 4096, FEW = 32 };

typedef struct {
    const int64_t *table;  /* COLUMNS rows of `tensors` entries */
    int64_t tensors;
    const int64_t *pieces; /* the tensor of each piece, then the first element of each, then its elements */
    int64_t count;
    const double *hypers;
    double *counts;
} Plan;

/* What `tally` is told of one weight. Compilers make an addition under a mask of each. */
#define NOTE_ZEROS(value, old) \
    if (value == 0) \
        zeros++; \
    if (old == 0) \
        were++; \
    if ((value == 0) & (old == 0)) \
        stay++;

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

/* The scale with which `squares` is to be taken again if they have left the range of double; NaN does not come back. */
static double rescue(double squares)
{
    return squares < 1e-280 ? 0x1p600 : squares > 1e300 ? 0x1p-600 : 1;
}

#define T float
#define BITS int32_t
#define NAME(x) x##_float32
#include __FILE__
#undef T
#undef BITS
#undef NAME
#define T double
#define BITS int64_t
#define NAME(x) x##_float64
#include __FILE__
#undef T
#undef BITS
#undef NAME

#else

static T NAME(representable)(double value)
{
    const double largest = sizeof(T) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;
    return (T)(value > largest ? largest : value); /* NaN stays NaN */
}

INLINE T NAME(square_root)(T x)
{
    return sizeof(T) == 4 ? (T)__builtin_sqrtf((float)x) : (T)__builtin_sqrt(x);
}

INLINE T NAME(modulus)(T x)
{
    return sizeof(T) == 4 ? (T)__builtin_fabsf((float)x) : (T)__builtin_fabs(x);
}

/* The largest number there is in place of infinity, whose bits are the next integer; NaN stays NaN. By integers, because
   of this comparison and those of a threshold in a row compilers make a dozen instructions. */
INLINE T NAME(finite)(T x)
{
    const T infinity = (T)__builtin_inf();
    BITS bits, beyond;
    __builtin_memcpy(&bits, &x, sizeof(T));
    __builtin_memcpy(&beyond, &infinity, sizeof(T));
    bits -= bits == beyond;
    __builtin_memcpy(&x, &bits, sizeof(T));
    return x;
}

/* Soft-thresholding: x without what of it lies between -threshold and threshold. NaN stays NaN, be it in x or in the
   threshold, and -0.0 becomes +0.0. Processors have a minimum and a maximum that are just these comparisons. */
INLINE T NAME(thresholded)(T x, T threshold)
{
    T inside = x < threshold ? x : threshold;
    inside = inside > -threshold ? inside : -threshold;
    return x - inside;
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

/* Add to the counts of a piece. Of the block's n weights `zeros` are zero, `were` have been before the step, and `stay` are
   both: new ones are those of the zeros that don't stay, and of those that were the others are revived. */
INLINE void NAME(tally)(const T *w, int n, double *counts, int zeros, int were, int stay, T sum, T squares)
{
    counts[COUNT_zeros] += zeros;
    counts[COUNT_new] += zeros - stay;
    counts[COUNT_revived] += were - stay;
    if (sum > 0 && !(squares > (T)1e-30 && squares < (T)1e38)) {
        NAME(wide_sums)(w, n, counts);
        return;
    }
    counts[COUNT_l1] += sum;
    counts[COUNT_l2] += squares;
}

/* Groups: runs of neighbours that are shrunk together. What a kernel of them is made of. */

/* Σ (scale·y)². */
static __attribute__((noinline)) double NAME(wide_squares)(const T *y, int n, double scale)
{
    double total = 0;
    for (int i = 0; i < n; i++)
        total += scale * y[i] * (scale * y[i]);
    return total;
}

/* Σ (scale·y)² of a block, whose sum in T is known for a scale of 1. */
static double NAME(checked_squares)(const T *y, int n, T sum, double scale)
{
    return scale == 1 && sum > (T)1e-30 && sum < (T)1e38 ? sum : NAME(wide_squares)(y, n, scale);
}

/* What all weights of a group are multiplied by. */
static T NAME(left)(double exact_norm, T threshold, T divisor)
{
    const T norm = (T)exact_norm;
    if (norm <= threshold)
        return 0;
    return (norm == (T)__builtin_inf() ? 1 : (norm - threshold) / norm) / divisor;
}

/* Write y·ratio, and count. */
static void NAME(scaled)(T *restrict w, const T *restrict y, T ratio, int n, double *counts)
{
    int zeros = 0, were = 0, stay = 0;
    T sum = 0, squares = 0;
#pragma omp simd reduction(+ : zeros, were, stay, sum, squares)
    for (int i = 0; i < n; i++) {
        const T old = w[i], value = y[i] * ratio + 0; /* + 0: no -0.0 */
        w[i] = value;
        NOTE_ZEROS(value, old)
        sum += NAME(modulus)(value);
        squares += value * value;
    }
    NAME(tally)(w, n, counts, zeros, were, stay, sum, squares);
}

/* Of a kernel: y becomes where n elements have moved to, soft-thresholded, before groups are shrunk. The optimizer's
   state moves along; but the second time (`again`) it has done so. Returns Σ y², if T can hold it. */
struct NAME(Work);
static T NAME(moved)(const struct NAME(Work) *work, int64_t start, int n, T *y, int again);

/* Groups of which a block holds one or more. */
static void NAME(short_groups)(
    const struct NAME(Work) *work, T *w, int64_t size, int run, T threshold, T divisor, double *counts)
{
    T y[BLOCK];
    const int whole = BLOCK / run * run;
    for (int64_t start = 0; start < size; start += whole) {
        const int n = size - start < whole ? (int)(size - start) : whole;
        NAME(moved)(work, start, n, y, 0);
        for (int i = 0; i < n; i += run) {
            T sum = 0;
            double squares = 0;
            if (run < FEW) { /* for which vectors do not pay */
                for (int j = i; j < i + run; j++)
                    squares += (double)y[j] * y[j];
            } else {
#pragma omp simd reduction(+ : sum)
                for (int j = i; j < i + run; j++)
                    sum += y[j] * y[j];
                squares = NAME(checked_squares)(y + i, run, sum, 1);
            }
            const double scale = rescue(squares);
            squares = scale == 1 ? squares : NAME(wide_squares)(y + i, run, scale);
            const T ratio = NAME(left)(__builtin_sqrt(squares) / scale, threshold, divisor);
            for (int j = i; j < i + run; j++)
                y[j] *= ratio;
        }
        NAME(scaled)(w + start, y, 1, n, counts);
    }
}

/* One group, longer than a block. What is too long for the buffer is computed again, which costs less than to store it. */
static void NAME(group)(
    const struct NAME(Work) *work, T *w, int64_t start, int64_t run, T threshold, T divisor, double *counts)
{
    T buffer[CHUNK];
    double squares = 0, scale = 1;
    for (int again = 0; again < 2; again++) {
        squares = 0;
        for (int64_t i = 0; i < run; i += BLOCK) {
            const int n = run - i < BLOCK ? (int)(run - i) : BLOCK;
            T *y = run <= CHUNK ? buffer + i : buffer;
            const T sum = NAME(moved)(work, start + i, n, y, again);
            squares += NAME(checked_squares)(y, n, sum, scale);
        }
        if (again || rescue(squares) == 1)
            break;
        scale = rescue(squares);
    }
    const T ratio = NAME(left)(__builtin_sqrt(squares) / scale, threshold, divisor);
    for (int64_t i = 0; i < run; i += BLOCK) {
        const int n = run - i < BLOCK ? (int)(run - i) : BLOCK;
        T *y = run <= CHUNK ? buffer + i : buffer;
        if (run > CHUNK)
            NAME(moved)(work, start + i, n, y, 1);
        NAME(scaled)(w + start + i, y, ratio, n, counts);
    }
}

/* Shrink the groups of `run` elements of a piece. */
static void NAME(groups)(
    const struct NAME(Work) *work, T *w, int64_t size, int64_t run, T threshold, T divisor, double *counts)
{
    if (run <= BLOCK)
        NAME(short_groups)(work, w, size, (int)run, threshold, divisor, counts);
    else
        for (int64_t start = 0; start < size; start += run)
            NAME(group)(work, w, start, run, threshold, divisor, counts);
}

#endif

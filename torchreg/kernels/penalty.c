/* The value of Σ l1·Σ|w| + l2·Σw² over many tensors, and its gradient, each in one pass over memory.

   It must agree with the penalties' own value and grad, which are the specification. Compiled without -ffast-math: NaN
   and inf stay what they are, and the sign of NaN is 0, as torch.sgn has it. The file includes itself, once for each
   type T. */

#ifndef T

#include <stdint.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum {
    BLOCK = 256, /* elements */
    LANES = 32,
    LINE = 64, /* bytes, as the next two */
    NEAR_AHEAD = 8192,
    FAR_AHEAD = 16384,
    WORDS = 16,
    NOTED = 32 * WORDS /* elements: pieces begin at a multiple of it */
};

/* Where memory is asked to be ahead of its use, in the first-level cache or in the second: the processor's own
   prefetching ends at the page. */
enum Fetch { NEVER, NEAR, FAR };

/* What becomes of a gradient: written alone, written with another added, or added into what is there. */
enum Sum { ALONE, BESIDE, INTO };

typedef struct {
    const int64_t *w, *g, *out, *size; /* per tensor: addresses and elements; g may be 0 */
    const double *l1, *l2;             /* per tensor */
    const int64_t *owner, *start;      /* per piece: its tensor and first element */
    int64_t piece_size;
    double factor;
    double *partials;     /* per piece, of the value */
    uint32_t *signs;      /* for NOTED elements: WORDS with the bits of w > 0, and WORDS with those of w < 0 */
    const int64_t *first; /* per tensor: where its signs begin */
    int64_t streams;      /* whether the results are too large to be found in the cache again */
    int64_t fetches;      /* one of Fetch */
} Table;

static inline void fetch(const void *address, int64_t bytes, int how)
{
    if (how == NEVER)
        return;
    for (int64_t i = 0; i < bytes; i += LINE)
        if (how == NEAR)
            __builtin_prefetch((const char *)address + NEAR_AHEAD + i, 0, 3);
        else
            __builtin_prefetch((const char *)address + FAR_AHEAD + i, 0, 2);
}

/* Write around the cache, which spares reading what is overwritten. */
static inline void stream(void *to, const void *from, int64_t bytes)
{
#ifdef __SSE2__
    for (int64_t i = 0; i < bytes; i += 16)
        _mm_stream_si128((__m128i *)((char *)to + i), _mm_load_si128((const __m128i *)((const char *)from + i)));
#else
    __builtin_memcpy(to, from, (size_t)bytes);
#endif
}

#define T float
#define NAME(x) x##_float32
#include __FILE__
#undef T
#undef NAME
#define T double
#define NAME(x) x##_float64
#include __FILE__

/* Of a weight, the lasso's gradient needs no more than the sign. Where the value notes that, the gradient reads a
   sixteenth of what it would. What is left of a piece, fewer than NOTED elements, is looked at again. */

typedef float Floats __attribute__((vector_size(WORDS * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef uint32_t Bits __attribute__((vector_size(WORDS * sizeof(uint32_t)), aligned(sizeof(uint32_t)), may_alias));

static inline __attribute__((always_inline)) double piece_value_by_sign(
    const float *w, uint32_t *signs, int64_t n, double l1, const int fetches)
{
    double lane[LANES] = {0}, total = 0, squares = 0;
    int64_t i = 0;
    for (; i + NOTED <= n; i += NOTED, signs += 2 * WORDS) {
        Bits positive = {0}, negative = {0}, bit = {0};
        bit += 1;
        for (int64_t k = i; k < i + NOTED; k += LANES) {
            fetch(w + k, LANES * sizeof(float), fetches); /* also keeps compilers from making two loops of this one */
            for (int j = 0; j < LANES; j++)
                lane[j] += __builtin_fabs((double)w[k + j]);
            for (int j = 0; j < LANES; j += WORDS) {
                const Floats x = *(const Floats *)(w + k + j);
                positive |= (Bits)(x > 0) & bit;
                negative |= (Bits)(x < 0) & bit;
                bit += bit;
            }
        }
        *(Bits *)signs = positive;
        *(Bits *)(signs + WORDS) = negative;
    }
    for (int j = 0; j < LANES; j++)
        total += lane[j];
    sums_float32(w + i, n - i, &total, &squares, 0, 1, 0);
    return l1 * total;
}

static inline __attribute__((always_inline)) void blocks_by_sign(
    float *out, const float *w, const float *g, const uint32_t *signs, int64_t n, float l1, float factor, int streams,
    const enum Sum sum)
{
    float buffer[NOTED] __attribute__((aligned(LINE)));
    const float slope = l1 * factor;
    int64_t i = 0;
    for (; i + NOTED <= n; i += NOTED, signs += 2 * WORDS) {
        float *to = sum != INTO && streams ? buffer : out + i;
        const float *with = sum == BESIDE ? g + i : to;
        for (int k = 0; k < NOTED / WORDS; k++, to += WORDS, with += WORDS) {
#pragma omp simd
            for (int j = 0; j < WORDS; j++) {
                const int sign = (int)(signs[j] >> k & 1) - (int)(signs[WORDS + j] >> k & 1);
                to[j] = sum == ALONE ? slope * (float)sign : slope * (float)sign + with[j];
            }
        }
        if (sum != INTO && streams)
            stream(out + i, buffer, sizeof buffer);
    }
    block_float32(out + i, w + i, sum == BESIDE ? g + i : 0, n - i, l1, 0, factor, 1, 0, sum);
#ifdef __SSE2__
    if (streams)
        _mm_sfence();
#endif
}

void value_float32_by_sign(const Table *table, int64_t from, int64_t to)
{
    for (int64_t i = from; i < to; i++) {
        const int64_t tensor = table->owner[i], start = table->start[i], n = length_float32(table, i);
        const float *w = (const float *)table->w[tensor] + start;
        uint32_t *signs = table->signs + table->first[tensor] + start / NOTED * 2 * WORDS;
        /* Memory is always asked for here: see above. */
        table->partials[i] = table->fetches == NEAR ? piece_value_by_sign(w, signs, n, table->l1[tensor], NEAR)
                                                    : piece_value_by_sign(w, signs, n, table->l1[tensor], FAR);
    }
}

void gradient_float32_by_sign(const Table *table, int64_t from, int64_t to)
{
    for (int64_t i = to - 1; i >= from; i--) {
        const int64_t tensor = table->owner[i], start = table->start[i], n = length_float32(table, i);
        float *out = (float *)table->out[tensor] + start;
        const float *w = (const float *)table->w[tensor] + start;
        const float *g = table->g[tensor] ? (const float *)table->g[tensor] + start : 0;
        const uint32_t *signs = table->signs + table->first[tensor] + start / NOTED * 2 * WORDS;
        const float l1 = (float)table->l1[tensor], factor = (float)table->factor;
        const int streams = table->streams && (intptr_t)out % 16 == 0;
        if (g && g == out)
            blocks_by_sign(out, w, g, signs, n, l1, factor, streams, INTO);
        else if (g)
            blocks_by_sign(out, w, g, signs, n, l1, factor, streams, BESIDE);
        else
            blocks_by_sign(out, w, g, signs, n, l1, factor, streams, ALONE);
    }
}

#else

/* The flags are constants where these are called, so that each call becomes a loop without branches. */
static inline __attribute__((always_inline)) void NAME(sums)(
    const T *w, int64_t n, double *total, double *squares, int fetches, const int absolute, const int squared)
{
    double lane[LANES] = {0}, square[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        fetch(w + i, LANES * sizeof(T), fetches);
        for (int j = 0; j < LANES; j++) {
            const double x = w[i + j];
            if (absolute)
                lane[j] += __builtin_fabs(x);
            if (squared)
                square[j] += x * x;
        }
    }
    for (; i < n; i++) {
        const double x = w[i];
        lane[0] += __builtin_fabs(x);
        square[0] += x * x;
    }
    for (int j = 0; j < LANES; j++) {
        *total += lane[j];
        *squares += square[j];
    }
}

static double NAME(piece_value)(const T *w, int64_t n, double l1, double l2, int fetches)
{
    double total = 0, squares = 0;
    if (l1 != 0 && l2 != 0)
        NAME(sums)(w, n, &total, &squares, fetches, 1, 1);
    else if (l1 != 0)
        NAME(sums)(w, n, &total, &squares, fetches, 1, 0);
    else if (l2 != 0)
        NAME(sums)(w, n, &total, &squares, fetches, 0, 1);
    return (l1 != 0 ? l1 * total : 0) + (l2 != 0 ? l2 * squares : 0); /* 0 * inf is NaN */
}

/* Where the gradient is added to what is in out already, g is none. */
static inline __attribute__((always_inline)) void NAME(block)(
    T *restrict out, const T *restrict w, const T *restrict g, int64_t n, T l1, T doubled_l2, T factor,
    const int absolute, const int squared, const enum Sum sum)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const T x = w[i];
        T slope = absolute ? (x > 0 ? l1 : 0) - (x < 0 ? l1 : 0) : 0;
        if (squared)
            slope = absolute ? slope + doubled_l2 * x : doubled_l2 * x;
        slope = slope * factor;
        out[i] = sum == ALONE ? slope : slope + (sum == BESIDE ? g[i] : out[i]);
    }
}

static inline __attribute__((always_inline)) void NAME(blocks)(
    T *restrict out, const T *w, const T *g, int64_t n, T l1, T doubled_l2, T factor, int streams, int fetches,
    const int absolute, const int squared, const enum Sum sum)
{
    T buffer[BLOCK] __attribute__((aligned(LINE)));
    int64_t i = 0;
    for (; i + BLOCK <= n; i += BLOCK) {
        fetch(w + i, BLOCK * sizeof(T), fetches);
        if (sum != ALONE)
            fetch((sum == BESIDE ? g : out) + i, BLOCK * sizeof(T), fetches);
        const T *gi = sum == BESIDE ? g + i : 0;
        if (sum != INTO && streams) {
            NAME(block)(buffer, w + i, gi, BLOCK, l1, doubled_l2, factor, absolute, squared, sum);
            stream(out + i, buffer, BLOCK * sizeof(T));
        } else
            NAME(block)(out + i, w + i, gi, BLOCK, l1, doubled_l2, factor, absolute, squared, sum);
    }
    NAME(block)(out + i, w + i, sum == BESIDE ? g + i : 0, n - i, l1, doubled_l2, factor, absolute, squared, sum);
#ifdef __SSE2__
    if (streams)
        _mm_sfence();
#endif
}

static void NAME(piece_gradient)(
    T *out, const T *w, const T *g, int64_t n, T l1, T doubled_l2, T factor, int streams, int fetches)
{
#define BLOCKS(absolute, squared, sum) \
    NAME(blocks)(out, w, g, n, l1, doubled_l2, factor, streams, fetches, absolute, squared, sum)
#define SUMS(sum) \
    if (l1 != 0 && doubled_l2 != 0) \
        BLOCKS(1, 1, sum); \
    else if (l1 != 0) \
        BLOCKS(1, 0, sum); \
    else \
        BLOCKS(0, 1, sum)
    if (g && g == out) {
        SUMS(INTO);
    } else if (g) {
        SUMS(BESIDE);
    } else {
        SUMS(ALONE);
    }
#undef SUMS
#undef BLOCKS
}

static int64_t NAME(length)(const Table *table, int64_t piece)
{
    const int64_t left = table->size[table->owner[piece]] - table->start[piece];
    return left < table->piece_size ? left : table->piece_size;
}

void NAME(value)(const Table *table, int64_t from, int64_t to)
{
    for (int64_t i = from; i < to; i++) {
        const int64_t tensor = table->owner[i];
        const T *w = (const T *)table->w[tensor] + table->start[i];
        table->partials[i] = NAME(piece_value)(
            w, NAME(length)(table, i), table->l1[tensor], table->l2[tensor], (int)table->fetches);
    }
}

/* Backwards: the weights that the value was of at last are still in the cache. */
void NAME(gradient)(const Table *table, int64_t from, int64_t to)
{
    for (int64_t i = to - 1; i >= from; i--) {
        const int64_t tensor = table->owner[i], start = table->start[i];
        T *out = (T *)table->out[tensor] + start;
        const T *w = (const T *)table->w[tensor] + start;
        const T *g = table->g[tensor] ? (const T *)table->g[tensor] + start : 0;
        const int streams = table->streams && (intptr_t)out % 16 == 0;
        NAME(piece_gradient)(
            out, w, g, NAME(length)(table, i), (T)table->l1[tensor], (T)(2 * table->l2[tensor]), (T)table->factor,
            streams, (int)table->fetches);
    }
}

#endif

/* Inner products of the rows of a matrix with each other. */

#include <stdint.h>
#include <string.h>

/* A tile has DOWN rows and ACROSS columns, as many as there are registers for their sums and what is multiplied: 32 or
   16. GROUP rows, of at most CHUNK entries at a time, stay in the second-level cache while columns pass by. */
#if defined(__AVX512F__)
enum { LANES = 8, DOWN = 5, ACROSS = 5, GROUP = 60 };
#elif defined(__AVX__)
enum { LANES = 4, DOWN = 4, ACROSS = 3, GROUP = 32 };
#else
enum { LANES = 2, DOWN = 4, ACROSS = 3, GROUP = 32 };
#endif
enum { CHUNK = 512 };

typedef double Vector __attribute__((vector_size(LANES * sizeof(double))));
typedef double Unaligned __attribute__((vector_size(LANES * sizeof(double)), aligned(sizeof(double)), may_alias));

typedef struct {
    const double *rows;
    const int64_t *places; /* of the matrix's rows among those; none: they are all */
    int64_t stride;        /* from one to the next */
    int64_t length;
    int64_t first; /* of which there is a row in `found` */
    double *found;
    int64_t width; /* from one row of it to the next */
} Gram;

static double total(Vector v) {
    double part[LANES];
    memcpy(part, &v, sizeof(v));
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

/* What is loaded stays in its register: the compiler would load it again for each product. */
#if defined(__AVX512F__)
#define KEPT(v) __asm__("" : "+v"(v))
#elif defined(__AVX__)
#define KEPT(v) __asm__("" : "+x"(v))
#else
#define KEPT(v)
#endif

static void tile(const double *const *rows, const double *const *columns, int64_t n, double sums[DOWN][ACROSS]) {
    Vector s[DOWN][ACROSS];
    memset(s, 0, sizeof(s));
    int64_t whole = n - n % LANES;
    for (int64_t q = 0; q < whole; q += LANES) {
        Vector c[ACROSS];
#pragma GCC unroll 5
        for (int j = 0; j < ACROSS; j++) c[j] = *(const Unaligned *)(columns[j] + q);
#pragma GCC unroll 5
        for (int i = 0; i < DOWN; i++) {
            Vector r = *(const Unaligned *)(rows[i] + q);
            KEPT(r);
#pragma GCC unroll 5
            for (int j = 0; j < ACROSS; j++) s[i][j] += r * c[j];
        }
    }
    for (int i = 0; i < DOWN; i++)
        for (int j = 0; j < ACROSS; j++) {
            sums[i][j] = total(s[i][j]);
            for (int64_t q = whole; q < n; q++) sums[i][j] += rows[i][q] * columns[j][q];
        }
}

static void pointers(const Gram *g, int64_t from, int64_t to, int64_t start, int count, const double **found) {
    for (int i = 0; i < count; i++) {
        int64_t row = from + i < to ? from + i : to - 1; /* behind the last one the last one */
        found[i] = g->rows + (g->places ? g->places[row] : row) * g->stride + start;
    }
}

/* Adds to rows `from` to `to` of `found` those of RRᵀ for all rows R, of each what is not beyond the diagonal. Chunks of
   entries are as long as each other: what a tile begins and ends with costs as much for a short one. */
void torchreg_gram(const Gram *g, int64_t from, int64_t to) {
    from += g->first, to += g->first;
    int64_t chunks = (g->length + CHUNK - 1) / CHUNK, even = chunks ? (g->length + chunks - 1) / chunks : 0;
    int64_t step = (even + LANES - 1) / LANES * LANES;
    for (int64_t start = 0; start < g->length; start += step) {
        int64_t n = g->length - start < step ? g->length - start : step;
        for (int64_t top = from; top < to; top += GROUP) {
            int64_t bottom = top + GROUP < to ? top + GROUP : to;
            for (int64_t left = 0; left < bottom; left += ACROSS) {
                const double *rows[DOWN], *columns[ACROSS];
                pointers(g, left, bottom, start, ACROSS, columns);
                int64_t i = left < top ? top : top + (left - top) / DOWN * DOWN;
                for (; i < bottom; i += DOWN) {
                    double sums[DOWN][ACROSS], *found = g->found + (i - g->first) * g->width + left;
                    int height = bottom - i < DOWN ? (int)(bottom - i) : DOWN;
                    pointers(g, i, bottom, start, DOWN, rows);
                    tile(rows, columns, n, sums);
                    for (int r = 0; r < height; r++, found += g->width) {
                        int64_t width = i + r + 1 - left;
                        if (width >= ACROSS)
                            for (int c = 0; c < ACROSS; c++) found[c] += sums[r][c];
                        else
                            for (int c = 0; c < width; c++) found[c] += sums[r][c];
                    }
                }
            }
        }
    }
}

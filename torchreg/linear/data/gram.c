/* Inner products of the rows of a matrix with each other. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 8, ACROSS = 4 };
#elif defined(__AVX__)
enum { LANES = 4, ACROSS = 3 }; /* with the sums and what is multiplied there are 16 registers */
#else
enum { LANES = 2, ACROSS = 3 };
#endif
enum { DOWN = 4, CHUNK = 512, GROUP = 32 }; /* rows of a tile, entries, and rows that stay in the cache meanwhile */

typedef double Vector __attribute__((vector_size(LANES * sizeof(double))));
typedef double Unaligned __attribute__((vector_size(LANES * sizeof(double)), aligned(sizeof(double)), may_alias));

typedef struct {
    const double *rows;
    int64_t stride; /* from one to the next */
    int64_t length;
    int64_t first; /* of which there is a row in `found` */
    double *found;
    int64_t width; /* from one row of it to the next */
} Gram;

static double total(Vector v) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
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
#pragma GCC unroll 4
        for (int j = 0; j < ACROSS; j++) c[j] = *(const Unaligned *)(columns[j] + q);
#pragma GCC unroll 4
        for (int i = 0; i < DOWN; i++) {
            Vector r = *(const Unaligned *)(rows[i] + q);
            KEPT(r);
#pragma GCC unroll 4
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
    for (int i = 0; i < count; i++) /* behind the last one the last one */
        found[i] = g->rows + (from + i < to ? from + i : to - 1) * g->stride + start;
}

/* Adds to rows `from` to `to` of `found` those of RRᵀ for all rows R, of each what is not beyond the diagonal. */
void torchreg_gram(const Gram *g, int64_t from, int64_t to) {
    from += g->first, to += g->first;
    for (int64_t start = 0; start < g->length; start += CHUNK) {
        int64_t n = g->length - start < CHUNK ? g->length - start : CHUNK;
        for (int64_t top = from; top < to; top += GROUP) {
            int64_t bottom = top + GROUP < to ? top + GROUP : to;
            for (int64_t left = 0; left < bottom; left += ACROSS) {
                const double *rows[DOWN], *columns[ACROSS];
                pointers(g, left, bottom, start, ACROSS, columns);
                int64_t i = left < top ? top : top + (left - top) / DOWN * DOWN;
                for (; i < bottom; i += DOWN) {
                    double sums[DOWN][ACROSS];
                    pointers(g, i, bottom, start, DOWN, rows);
                    tile(rows, columns, n, sums);
                    for (int64_t r = i; r < i + DOWN && r < bottom; r++)
                        for (int64_t c = left; c < left + ACROSS && c <= r; c++)
                            g->found[(r - g->first) * g->width + c] += sums[r - i][c - left];
                }
            }
        }
    }
}

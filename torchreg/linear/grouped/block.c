/* Block coordinate descent on a Gram matrix, for least squares with a penalty of group norms. */

#include <math.h>
#include <stdint.h>

typedef struct {
    int64_t k, stride, targets, groups;
    const double *gram;             /* k × k */
    const int64_t *starts, *member; /* the columns of group g: member[starts[g]] to member[starts[g + 1] - 1] */
    const double *strength;         /* of each group */
    double l2;
    double *w, *pull;  /* targets × k; the pull is (B - WG) */
    double *curvature; /* of each group: a bound on its block's largest eigenvalue, by rows and by squares */
    double *change;    /* targets × the size of the largest group: where one goes to, then by how much it has moved */
} Problem; /* Python's, field by field */

void torchreg_block_bounds(const Problem *p) {
    for (int64_t g = 0; g < p->groups; g++) {
        double most = 0, squares = 0;
        for (int64_t a = p->starts[g]; a < p->starts[g + 1]; a++) {
            const double *row = p->gram + p->member[a] * p->stride;
            double sum = 0;
            for (int64_t b = p->starts[g]; b < p->starts[g + 1]; b++) {
                double entry = row[p->member[b]];
                sum += fabs(entry);
                squares += entry * entry;
            }
            if (sum > most) most = sum;
        }
        double root = sqrt(squares);
        p->curvature[g] = (root < most ? root : most) + p->l2;
    }
}

/* Take what a group's coefficients have changed by out of the pull. Four rows at a time: one after the other they don't
   fill the ways to memory. */
static void carry(const Problem *p, int64_t first, int64_t size) {
    int64_t a = 0;
    for (; a + 4 <= size; a += 4) {
        const double *row[4];
        for (int i = 0; i < 4; i++) row[i] = p->gram + p->member[first + a + i] * p->stride;
        for (int64_t t = 0; t < p->targets; t++) {
            const double *d = p->change + t * size + a;
            double *pull = p->pull + t * p->k, d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
#pragma omp simd
            for (int64_t j = 0; j < p->k; j++)
                pull[j] -= (d0 * row[0][j] + d1 * row[1][j]) + (d2 * row[2][j] + d3 * row[3][j]);
        }
    }
    for (; a < size; a++) {
        const double *row = p->gram + p->member[first + a] * p->stride;
        for (int64_t t = 0; t < p->targets; t++) {
            double *pull = p->pull + t * p->k, d = p->change[t * size + a];
            if (d == 0) continue;
#pragma omp simd
            for (int64_t j = 0; j < p->k; j++) pull[j] -= d * row[j];
        }
    }
}

/* One group's step, with the others held; how far its gradient moves. */
static double update(const Problem *p, int64_t g) {
    int64_t first = p->starts[g], size = p->starts[g + 1] - first;
    double curvature = p->curvature[g], square = 0, moved = 0;
    if (!(curvature > 0)) return 0;
    for (int64_t a = 0; a < size; a++) {
        int64_t i = p->member[first + a];
        for (int64_t t = 0; t < p->targets; t++) {
            double here = p->w[t * p->k + i];
            double z = (curvature - p->l2) * here + p->pull[t * p->k + i];
            p->change[t * size + a] = z;
            square += z * z;
        }
    }
    double norm = sqrt(square);
    double scale = norm > p->strength[g] ? (1 - p->strength[g] / norm) / curvature : 0;
    for (int64_t a = 0; a < size; a++)
        for (int64_t t = 0; t < p->targets; t++) {
            double *here = p->w + t * p->k + p->member[first + a], value = scale * p->change[t * size + a];
            p->change[t * size + a] = value - *here;
            moved += (value - *here) * (value - *here);
            *here = value;
        }
    if (moved > 0) carry(p, first, size);
    return sqrt(moved) * curvature;
}

static int alive(const Problem *p, int64_t g) {
    for (int64_t a = p->starts[g]; a < p->starts[g + 1]; a++)
        for (int64_t t = 0; t < p->targets; t++)
            if (p->w[t * p->k + p->member[a]] != 0) return 1;
    return 0;
}

/* One step of each group, or of those that are not zero. How far a group's gradient moves at most. */
double torchreg_block_sweep(const Problem *p, int64_t only_alive) {
    double most = 0;
    for (int64_t g = 0; g < p->groups; g++) {
        if (only_alive && !alive(p, g)) continue;
        double moved = update(p, g);
        if (moved > most) most = moved;
    }
    return most;
}

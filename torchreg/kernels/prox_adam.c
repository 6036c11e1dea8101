/* The proximal AdamW step over many tensors in one pass over memory, in Adam's own metric or without one. */

#ifdef T

typedef struct {
    T lr, beta2, grown1, grown2, eps, decay, keep, prox_step, threshold, doubled, norm, sign, root;
} NAME(Numbers);

/* The flags are constants where this is called, so that each call becomes a loop without branches. */
INLINE void NAME(block)(
    T *restrict w, const T *restrict g, T *restrict m, T *restrict v, T *restrict x, const T *l1, const T *l2, int n,
    const NAME(Numbers) h, double *counts, const int amsgrad, const int decay, const int divide, const int metric,
    const int arrays)
{
    int zeros = 0, were = 0, stay = 0;
    T sum = 0, squares = 0;
#pragma omp simd reduction(+ : zeros, were, stay, sum, squares)
    for (int i = 0; i < n; i++) {
        const T old = w[i];
        T u = h.sign * g[i];
        if (decay)
            u += h.decay != 0 ? h.decay * old : 0; /* 0 * inf is NaN */
        const T first = m[i] + h.grown1 * (u - m[i]), second = h.beta2 * v[i] + h.grown2 * u * u;
        m[i] = first;
        v[i] = second;
        T largest_second = second;
        if (amsgrad) { /* NaN wins, as in torch.maximum */
            largest_second = x[i] > second || x[i] != x[i] ? x[i] : second;
            x[i] = largest_second;
        }
        const T inverse = 1 / (NAME(square_root)(largest_second) * h.root + h.eps);
        const T moved = old * h.keep - h.lr * (first * inverse);
        const T step = metric ? h.prox_step * inverse : h.prox_step;
        const T threshold = arrays && l1 ? step * l1[i] : metric ? h.threshold * inverse : h.threshold;
        T value = NAME(thresholded)(moved, NAME(finite)(threshold));
        if (arrays && l2)
            value = value / (1 + 2 * step * l2[i]) + 0;
        else if (divide)
            value = value / (1 + (metric ? h.doubled * inverse : h.doubled)) + 0; /* + 0: no -0.0 */
        w[i] = value;
        NOTE_ZEROS(value, old)
        sum += NAME(modulus)(value);
        squares += value * value;
    }
    NAME(tally)(w, n, counts, zeros, were, stay, sum, squares);
}

struct NAME(Work) {
    const T *w, *g;
    T *m, *v, *x;
    NAME(Numbers) h;
};

/* The flags are constants where this is called. In Adam's metric y is divided for l2 already, and a[i] is what a group's
   norm pulls its weights with; see secular.py. */
INLINE T NAME(descent)(
    const T *restrict w, const T *restrict g, T *restrict m, T *restrict v, T *restrict x, T *restrict y,
    T *restrict a, int n, const NAME(Numbers) h, const int amsgrad, const int metric, const int again)
{
    const T largest = NAME(representable)(__builtin_inf());
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int i = 0; i < n; i++) {
        const T old = w[i];
        if (!again) {
            const T u = h.sign * g[i] + (h.decay != 0 ? h.decay * old : 0); /* 0 * inf is NaN */
            m[i] += h.grown1 * (u - m[i]);
            v[i] = h.beta2 * v[i] + h.grown2 * u * u;
            if (amsgrad) /* NaN wins, as in torch.maximum */
                x[i] = x[i] > v[i] || x[i] != x[i] ? x[i] : v[i];
        }
        const T inverse = 1 / (NAME(square_root)(amsgrad ? x[i] : v[i]) * h.root + h.eps);
        const T moved = old * h.keep - h.lr * (m[i] * inverse);
        y[i] = NAME(thresholded)(moved, NAME(finite)(metric ? h.threshold * inverse : h.threshold));
        if (metric) {
            const T divided = 1 / (1 + h.doubled * inverse), pull = h.norm * inverse * divided;
            y[i] *= divided;
            a[i] = pull > largest ? largest : pull; /* NaN stays */
        }
        squares += y[i] * y[i];
    }
    return squares;
}

static T NAME(moved)(const struct NAME(Work) *work, int64_t start, int n, T *y, int again)
{
    const T *w = work->w + start, *g = work->g + start;
    T *m = work->m + start, *v = work->v + start, *x = work->x ? work->x + start : 0;
    if (x && again)
        return NAME(descent)(w, g, m, v, x, y, 0, n, work->h, 1, 0, 1);
    if (x)
        return NAME(descent)(w, g, m, v, x, y, 0, n, work->h, 1, 0, 0);
    if (again)
        return NAME(descent)(w, g, m, v, 0, y, 0, n, work->h, 0, 0, 1);
    return NAME(descent)(w, g, m, v, 0, y, 0, n, work->h, 0, 0, 0);
}

/* As `moved`, in Adam's metric. */
static T NAME(moved_apart)(const struct NAME(Work) *work, int64_t start, int n, T *y, T *a, int again)
{
    const T *w = work->w + start, *g = work->g + start;
    T *m = work->m + start, *v = work->v + start, *x = work->x ? work->x + start : 0;
    if (x && again)
        return NAME(descent)(w, g, m, v, x, y, a, n, work->h, 1, 1, 1);
    if (x)
        return NAME(descent)(w, g, m, v, x, y, a, n, work->h, 1, 1, 0);
    if (again)
        return NAME(descent)(w, g, m, v, 0, y, a, n, work->h, 0, 1, 1);
    return NAME(descent)(w, g, m, v, 0, y, a, n, work->h, 0, 1, 0);
}

/* A group, of which a buffer holds all or a block; scale·y and scale·a are what its equation is solved for. */
typedef struct {
    const struct NAME(Work) *work;
    int64_t start, run;
    T *y, *a, scale;
} NAME(Group);

static int NAME(block_of)(const NAME(Group) *group, int64_t i, T **y, T **a)
{
    const int n = group->run - i < BLOCK ? (int)(group->run - i) : BLOCK;
    const int held = group->run <= CHUNK;
    *y = held ? group->y + i : group->y;
    *a = held ? group->a + i : group->a;
    if (!held)
        NAME(moved_apart)(group->work, group->start + i, n, *y, *a, 1);
    return n;
}

/* S(0), by which it is seen whether the group is left, and a lower bound of the root. */
static void NAME(begin)(const NAME(Group) *group, double *s, double *low)
{
    double jensen = 0, most = 0;
    for (int64_t i = 0; i < group->run; i += BLOCK) {
        T *y, *a, squares = 0, products = 0, largest = 0;
        const int n = NAME(block_of)(group, i, &y, &a);
#pragma omp simd reduction(+ : squares, products) reduction(max : largest)
        for (int j = 0; j < n; j++) {
            const T u = group->scale * (y[j] < 0 ? -y[j] : y[j]), b = group->scale * a[j], t = y[j] / a[j], beyond = u - b;
            squares += y[j] == 0 ? 0 : t * t;
            products += y[j] == 0 ? 0 : u * u * b;
            largest = beyond > largest ? beyond : largest;
        }
        *s += squares;
        jensen += products;
        most = largest > most ? largest : most;
    }
    *low = 1 - jensen > most ? 1 - jensen : most;
}

/* S(root), and where Newton's method on 1/sqrt(S) = 1 goes from there. */
static double NAME(newton)(const NAME(Group) *group, double root, double *s)
{
    double slope = 0;
    *s = 0;
    for (int64_t i = 0; i < group->run; i += BLOCK) {
        T *y, *a, squares = 0, cubes = 0;
        const int n = NAME(block_of)(group, i, &y, &a);
        const T here = (T)root;
#pragma omp simd reduction(+ : squares, cubes)
        for (int j = 0; j < n; j++) {
            const T inverse = 1 / (group->scale * a[j] + here), t = group->scale * y[j] * inverse;
            squares += t * t;
            cubes += t * t * inverse;
        }
        *s += squares;
        slope += cubes;
    }
    return root + *s * (__builtin_sqrt(*s) - 1) / (slope > 0 ? slope : 1);
}

/* The root of S in scaled units, 0, or NaN; as secular.py finds it. */
static double NAME(root)(const NAME(Group) *group)
{
    const double eps = sizeof(T) == 4 ? 0x1p-23 : 0x1p-52, least = eps * eps, near = __builtin_sqrt(eps) / 8;
    double s = 0, low = 0, high = 1;
    NAME(begin)(group, &s, &low);
    if (!(s > 1))
        return s != s ? s : 0;
    low = low > least ? low < 1 ? low : 1 : least;
    double root = low;
    for (int iteration = 0; iteration < 16; iteration++) {
        double newton = NAME(newton)(group, root, &s);
        newton = newton > least ? newton < 1 ? newton : 1 : least;
        if (s - 1 <= near && 1 - s <= near)
            return newton;
        high = s < 1 && root < high ? root : high;
        const double bound = newton < high ? newton : high;
        low = bound > low ? bound : low;
        const int far = newton > 1.25 * root || root > 1.25 * newton;
        root = far && high > 4 * low ? __builtin_sqrt(low * high) : newton;
    }
    return root;
}

/* Solve the equation of a group of this norm: what is left of its weights is root/(root + pull·a), or nothing. */
static T NAME(solved)(NAME(Group) *group, double norm, T *pull)
{
    const double most = sizeof(T) == 4 ? 1e37 : 1e300, inverse = 1 / norm;
    group->scale = (T)(inverse < most ? inverse > 1 / most ? inverse : 1 / most : most);
    *pull = group->scale;
    if (norm != norm)
        return (T)norm;
    if ((T)norm == (T)__builtin_inf()) { /* as it is */
        *pull = 0;
        return 1;
    }
    return (T)NAME(root)(group);
}

INLINE void NAME(shrunk)(T *restrict y, const T *restrict a, int n, T root, T pull)
{
#pragma omp simd
    for (int i = 0; i < n; i++)
        y[i] = root == 0 ? 0 : y[i] * (root / (root + pull * a[i]));
}

/* Groups in Adam's metric, many of them in a block. */
static void NAME(short_groups_apart)(const struct NAME(Work) *work, T *w, int64_t size, int run, double *counts)
{
    T y[BLOCK], a[BLOCK], pull;
    const int whole = BLOCK / run * run;
    for (int64_t start = 0; start < size; start += whole) {
        const int n = size - start < whole ? (int)(size - start) : whole;
        NAME(moved_apart)(work, start, n, y, a, 0);
        for (int i = 0; i < n; i += run) {
            NAME(Group) group = {work, start + i, run, y + i, a + i, 1};
            T sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int j = i; j < i + run; j++)
                sum += y[j] * y[j];
            double squares = NAME(checked_squares)(y + i, run, sum, 1), scale = rescue(squares);
            squares = scale == 1 ? squares : NAME(wide_squares)(y + i, run, scale);
            const T root = NAME(solved)(&group, __builtin_sqrt(squares) / scale, &pull);
            NAME(shrunk)(y + i, a + i, run, root, pull);
        }
        NAME(scaled)(w + start, y, 1, n, counts);
    }
}

/* One group in Adam's metric, longer than a block. */
static void NAME(group_apart)(const struct NAME(Work) *work, T *w, int64_t start, int64_t run, double *counts)
{
    T ys[CHUNK], as[CHUNK], pull;
    NAME(Group) group = {work, start, run, ys, as, 1};
    double squares = 0, scale = 1;
    for (int again = 0; again < 2; again++) {
        squares = 0;
        for (int64_t i = 0; i < run; i += BLOCK) {
            const int n = run - i < BLOCK ? (int)(run - i) : BLOCK;
            T *y = run <= CHUNK ? ys + i : ys, *a = run <= CHUNK ? as + i : as;
            const T sum = NAME(moved_apart)(work, start + i, n, y, a, again);
            squares += NAME(checked_squares)(y, n, sum, scale);
        }
        if (again || rescue(squares) == 1)
            break;
        scale = rescue(squares);
    }
    const T root = NAME(solved)(&group, __builtin_sqrt(squares) / scale, &pull);
    for (int64_t i = 0; i < run; i += BLOCK) {
        T *y, *a;
        const int n = NAME(block_of)(&group, i, &y, &a);
        NAME(shrunk)(y, a, n, root, pull);
        NAME(scaled)(w + start + i, y, 1, n, counts);
    }
}

static void NAME(piece)(const Plan *plan, int64_t index)
{
    const int64_t tensor = plan->pieces[index], start = plan->pieces[plan->count + index];
    const int64_t *column = plan->table + tensor;
    const double *hyper = plan->hypers + AT(group) * HYPERS;
    double *counts = plan->counts + index * COUNTS;
    T *w = (T *)AT(w) + start, *m = (T *)AT(m) + start, *v = (T *)AT(v) + start, *x = FROM_START(x);
    const T *g = (const T *)AT(g) + start, *l1 = FROM_START(l1), *l2 = FROM_START(l2);
    const int64_t size = plan->pieces[2 * plan->count + index];
    const double step = hyper[HYPER_prox_step], beta1 = hyper[HYPER_beta1], beta2 = hyper[HYPER_beta2];
    const double size_weight = hyper[HYPER_sized] != 0 ? __builtin_sqrt((double)AT(run)) : 1;
    const NAME(Numbers) h = {
        .lr = (T)(hyper[HYPER_lr] / (1 - power(beta1, AT(step)))),
        .beta2 = (T)beta2,
        .grown1 = (T)(1 - beta1),
        .grown2 = (T)(1 - beta2),
        .eps = (T)hyper[HYPER_eps],
        .decay = (T)hyper[HYPER_decay],
        .keep = (T)hyper[HYPER_keep],
        .prox_step = NAME(representable)(step),
        .threshold = NAME(representable)(step * hyper[HYPER_l1]),
        .doubled = NAME(representable)(2 * step * hyper[HYPER_l2]),
        .norm = NAME(representable)(step * hyper[HYPER_norm] * size_weight),
        .sign = (T)hyper[HYPER_sign],
        .root = (T)(1 / __builtin_sqrt(1 - power(beta2, AT(step)))),
    };
    const int metric = hyper[HYPER_identity] == 0, divide = h.doubled != 0;
    const int plain = metric && !x && !l1 && !l2 && h.decay == 0;
    counts[COUNT_zeros] = counts[COUNT_l1] = counts[COUNT_l2] = 0;
    if (AT(run)) {
        const struct NAME(Work) work = {w, g, m, v, x, h};
        if (!metric)
            NAME(groups)(&work, w, size, AT(run), h.norm, 1 + h.doubled, counts);
        else if (AT(run) <= BLOCK)
            NAME(short_groups_apart)(&work, w, size, (int)AT(run), counts);
        else
            for (int64_t i = 0; i < size; i += AT(run))
                NAME(group_apart)(&work, w, i, AT(run), counts);
        return;
    }
    for (int64_t i = 0; i < size; i += STRETCH) {
        const int n = size - i < STRETCH ? (int)(size - i) : STRETCH;
        T *wi = w + i, *mi = m + i, *vi = v + i, *xi = x ? x + i : 0;
        const T *gi = g + i, *l1i = l1 ? l1 + i : 0, *l2i = l2 ? l2 + i : 0;
        if (plain && !divide)
            NAME(block)(wi, gi, mi, vi, 0, 0, 0, n, h, counts, 0, 0, 0, 1, 0);
        else if (plain)
            NAME(block)(wi, gi, mi, vi, 0, 0, 0, n, h, counts, 0, 0, 1, 1, 0);
        else if (l1 || l2)
            NAME(block)(wi, gi, mi, vi, xi, l1i, l2i, n, h, counts, x != 0, 1, 1, metric, 1);
        else if (x)
            NAME(block)(wi, gi, mi, vi, xi, 0, 0, n, h, counts, 1, 1, 1, metric, 0);
        else if (metric)
            NAME(block)(wi, gi, mi, vi, 0, 0, 0, n, h, counts, 0, 1, 1, 1, 0);
        else
            NAME(block)(wi, gi, mi, vi, 0, 0, 0, n, h, counts, 0, 1, 1, 0, 0);
    }
}

void NAME(prox_adam)(const Plan *plan, int64_t from, int64_t to)
{
    for (int64_t index = from; index < to; index++)
        NAME(piece)(plan, index);
}

#endif

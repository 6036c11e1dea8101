/* The proximal AdamW step over many tensors in one pass over memory, in Adam's own metric or without one. */

#ifdef T

typedef struct {
    T lr, beta2, grown1, grown2, eps, decay, keep, prox_step, threshold, doubled, sign, root;
} NAME(Numbers);

/* The flags are constants where this is called, so that each call becomes a loop without branches. */
INLINE void NAME(block)(
    T *restrict w, const T *restrict g, T *restrict m, T *restrict v, T *restrict x, const T *l1, const T *l2, int n,
    const NAME(Numbers) h, double *counts, const int amsgrad, const int decay, const int divide, const int metric,
    const int arrays)
{
    const T largest = NAME(representable)(__builtin_inf());
    int zeros = 0, fresh = 0, revived = 0;
    T sum = 0, squares = 0;
#pragma omp simd reduction(+ : zeros, fresh, revived, sum, squares)
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
        T threshold = arrays && l1 ? step * l1[i] : metric ? h.threshold * inverse : h.threshold;
        threshold = threshold > largest ? largest : threshold;
        T value = NAME(thresholded)(moved, threshold);
        if (arrays && l2)
            value = value / (1 + 2 * step * l2[i]) + 0;
        else if (divide)
            value = value / (1 + (metric ? h.doubled * inverse : h.doubled)) + 0; /* + 0: no -0.0 */
        w[i] = value;
        zeros += value == 0;
        fresh += (value == 0) & (old != 0);
        revived += (value != 0) & (old == 0);
        sum += value < 0 ? -value : value;
        squares += value * value;
    }
    NAME(tally)(w, n, counts, zeros, fresh, revived, sum, squares);
}

struct NAME(Work) {
    const T *w, *g;
    T *m, *v, *x;
    NAME(Numbers) h;
};

/* The flags are constants where this is called. */
INLINE T NAME(descent)(
    const T *restrict w, const T *restrict g, T *restrict m, T *restrict v, T *restrict x, T *restrict y, int n,
    const NAME(Numbers) h, const int amsgrad, const int again)
{
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
        y[i] = NAME(thresholded)(old * h.keep - h.lr * (m[i] * inverse), h.threshold);
        squares += y[i] * y[i];
    }
    return squares;
}

static T NAME(moved)(const struct NAME(Work) *work, int64_t start, int n, T *y, int again)
{
    const T *w = work->w + start, *g = work->g + start;
    T *m = work->m + start, *v = work->v + start, *x = work->x ? work->x + start : 0;
    if (x && again)
        return NAME(descent)(w, g, m, v, x, y, n, work->h, 1, 1);
    else if (x)
        return NAME(descent)(w, g, m, v, x, y, n, work->h, 1, 0);
    else if (again)
        return NAME(descent)(w, g, m, v, 0, y, n, work->h, 0, 1);
    else
        return NAME(descent)(w, g, m, v, 0, y, n, work->h, 0, 0);
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
        .sign = (T)hyper[HYPER_sign],
        .root = (T)(1 / __builtin_sqrt(1 - power(beta2, AT(step)))),
    };
    const int metric = hyper[HYPER_identity] == 0, divide = h.doubled != 0;
    const int plain = metric && !x && !l1 && !l2 && h.decay == 0;
    counts[COUNT_zeros] = counts[COUNT_l1] = counts[COUNT_l2] = 0;
    if (AT(run)) {
        const struct NAME(Work) work = {w, g, m, v, x, h};
        const double size_weight = hyper[HYPER_sized] != 0 ? __builtin_sqrt((double)AT(run)) : 1;
        const T shrinkage = NAME(representable)(step * hyper[HYPER_norm] * size_weight);
        NAME(groups)(&work, w, size, AT(run), shrinkage, 1 + h.doubled, counts);
        return;
    }
    for (int64_t i = 0; i < size; i += BLOCK) {
        const int n = size - i < BLOCK ? (int)(size - i) : BLOCK;
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

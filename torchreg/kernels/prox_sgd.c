/* The proximal SGD step over many tensors in one pass over memory. */

#ifdef T

typedef struct {
    T lr, momentum, gain, decay, threshold, factor, sign, prox_step, doubled_step;
    int nesterov;
} NAME(Numbers);

/* The flags are constants where this is called, so that each call becomes a loop without branches. */
INLINE void NAME(block)(
    T *restrict w, const T *restrict g, T *restrict m, const T *l1, const T *l2, int n, const NAME(Numbers) h,
    double *counts, const int momentum, const int nesterov, const int decay, const int divide, const int arrays)
{
    int zeros = 0, were = 0, stay = 0;
    T sum = 0, squares = 0;
#pragma omp simd reduction(+ : zeros, were, stay, sum, squares)
    for (int i = 0; i < n; i++) {
        const T old = w[i];
        T u = h.sign * g[i];
        if (decay)
            u += h.decay != 0 ? h.decay * old : 0; /* 0 * inf is NaN */
        if (momentum) {
            const T buffer = h.momentum * m[i] + h.gain * u;
            m[i] = buffer;
            u = nesterov ? u + h.momentum * buffer : buffer;
        }
        const T moved = old - h.lr * u;
        const T threshold = arrays && l1 ? h.prox_step * l1[i] : h.threshold;
        T value = NAME(thresholded)(moved, threshold);
        if (arrays && l2)
            value = value / (1 + h.doubled_step * l2[i]) + 0;
        else if (divide)
            value = value * h.factor + 0; /* + 0: no -0.0 */
        w[i] = value;
        NOTE_ZEROS(value, old)
        sum += NAME(modulus)(value);
        squares += value * value;
    }
    NAME(tally)(w, n, counts, zeros, were, stay, sum, squares);
}

struct NAME(Work) {
    const T *w, *g;
    T *m;
    NAME(Numbers) h;
};

/* The flags are constants where this is called. */
INLINE T NAME(descent)(
    const T *restrict w, const T *restrict g, T *restrict m, T *restrict y, int n, const NAME(Numbers) h,
    const int momentum, const int nesterov, const int decay, const int again)
{
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int i = 0; i < n; i++) {
        const T old = w[i];
        T u = 0, buffer = momentum && again ? m[i] : 0;
        if (!again || nesterov || !momentum)
            u = h.sign * g[i];
        if (decay)
            u += h.decay != 0 ? h.decay * old : 0; /* 0 * inf is NaN */
        if (momentum && !again) {
            buffer = h.momentum * m[i] + h.gain * u;
            m[i] = buffer;
        }
        if (momentum)
            u = nesterov ? u + h.momentum * buffer : buffer;
        y[i] = NAME(thresholded)(old - h.lr * u, h.threshold);
        squares += y[i] * y[i];
    }
    return squares;
}

static T NAME(moved)(const struct NAME(Work) *work, int64_t start, int n, T *y, int again)
{
    const NAME(Numbers) h = work->h;
    const T *w = work->w + start, *g = work->g + start;
    T *m = work->m ? work->m + start : 0;
    if (!m)
        return NAME(descent)(w, g, 0, y, n, h, 0, 0, 1, 0);
    if (again && h.nesterov)
        return NAME(descent)(w, g, m, y, n, h, 1, 1, 1, 1);
    if (again)
        return NAME(descent)(w, g, m, y, n, h, 1, 0, 0, 1);
    if (h.nesterov)
        return NAME(descent)(w, g, m, y, n, h, 1, 1, 1, 0);
    if (h.decay != 0)
        return NAME(descent)(w, g, m, y, n, h, 1, 0, 1, 0);
    return NAME(descent)(w, g, m, y, n, h, 1, 0, 0, 0);
}

static void NAME(piece)(const Plan *plan, int64_t index)
{
    const int64_t tensor = plan->pieces[index], start = plan->pieces[plan->count + index];
    const int64_t *column = plan->table + tensor;
    const double *hyper = plan->hypers + AT(group) * HYPERS;
    double *counts = plan->counts + index * COUNTS;
    T *w = (T *)AT(w) + start, *m = FROM_START(m);
    const T *g = (const T *)AT(g) + start, *l1 = FROM_START(l1), *l2 = FROM_START(l2);
    const int64_t size = plan->pieces[2 * plan->count + index];
    const double step = hyper[HYPER_prox_step];
    const NAME(Numbers) h = {
        .lr = (T)hyper[HYPER_lr],
        .momentum = (T)hyper[HYPER_momentum],
        .gain = AT(first) ? 1 : (T)hyper[HYPER_gain],
        .decay = (T)hyper[HYPER_decay],
        .threshold = NAME(representable)(step * hyper[HYPER_l1]),
        .factor = (T)(1 / (1 + 2 * step * hyper[HYPER_l2])),
        .sign = (T)hyper[HYPER_sign],
        .prox_step = (T)step,
        .doubled_step = (T)(2 * step),
        .nesterov = hyper[HYPER_nesterov] != 0,
    };
    const int plain = m && !h.nesterov && h.decay == 0 && !l1 && !l2, divide = h.factor != 1;
    counts[COUNT_zeros] = counts[COUNT_l1] = counts[COUNT_l2] = 0;
    if (AT(run)) {
        const struct NAME(Work) work = {w, g, m, h};
        const double size_weight = hyper[HYPER_sized] != 0 ? __builtin_sqrt((double)AT(run)) : 1;
        const T shrinkage = NAME(representable)(step * hyper[HYPER_norm] * size_weight);
        NAME(groups)(&work, w, size, AT(run), shrinkage, (T)(1 + 2 * step * hyper[HYPER_l2]), counts);
        return;
    }
    for (int64_t i = 0; i < size; i += STRETCH) {
        const int n = size - i < STRETCH ? (int)(size - i) : STRETCH;
        T *mi = m ? m + i : 0;
        const T *l1i = l1 ? l1 + i : 0, *l2i = l2 ? l2 + i : 0;
        if (plain && !divide)
            NAME(block)(w + i, g + i, mi, 0, 0, n, h, counts, 1, 0, 0, 0, 0);
        else if (plain)
            NAME(block)(w + i, g + i, mi, 0, 0, n, h, counts, 1, 0, 0, 1, 0);
        else if (l1 || l2)
            NAME(block)(w + i, g + i, mi, l1i, l2i, n, h, counts, m != 0, h.nesterov, 1, 1, 1);
        else if (!m)
            NAME(block)(w + i, g + i, 0, 0, 0, n, h, counts, 0, 0, 1, 1, 0);
        else if (h.nesterov)
            NAME(block)(w + i, g + i, mi, 0, 0, n, h, counts, 1, 1, 1, 1, 0);
        else
            NAME(block)(w + i, g + i, mi, 0, 0, n, h, counts, 1, 0, 1, 1, 0);
    }
}

void NAME(prox_sgd)(const Plan *plan, int64_t from, int64_t to)
{
    for (int64_t index = from; index < to; index++)
        NAME(piece)(plan, index);
}

#endif

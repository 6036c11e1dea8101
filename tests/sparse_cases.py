"""Dense float64 reference loops for optimizers with sparse gradients: what lazily shrunk rows must equal."""

from __future__ import annotations

import torch


def sgd(w, gradients, penalty, lr, scale, momentum=0.0, nesterov=False, weight_decay=0.0, maximize=False):
    """Every row is shrunk in every step; only rows with a gradient move by it, and so does their momentum."""
    w, m = w.double().clone(), torch.zeros_like(w, dtype=torch.float64)
    gain = 1.0 if not momentum else 1 / (1 - momentum)
    gain = 1 + momentum * gain if nesterov else gain
    for t, (rows, g) in enumerate(gradients):
        w_t = w * (1 - lr(t) * weight_decay)
        if len(rows):
            total = torch.zeros_like(w).index_add_(0, rows, g.double())
            touched = torch.zeros(len(w), dtype=torch.bool)
            touched[rows] = True
            grad = (-total if maximize else total) + weight_decay * w
            new_m = momentum * m + grad
            m = torch.where(touched[:, None], new_m, m) if momentum else m
            u = grad if not momentum else (grad + momentum * m if nesterov else m)
            w_t = torch.where(touched[:, None], w - lr(t) * u, w_t)
        w = w_t if penalty is None else penalty.prox(w_t, lr(t) * gain * scale(t))
    return w


def adam(w, gradients, penalty, lr, scale, betas=(0.9, 0.999), eps=1e-8, amsgrad=False, identity=False):
    """Every row is a parameter of its own without a gradient where it is not looked up, which goes on shrinking."""
    w = w.double().clone()
    m, v, top, count = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w), torch.zeros(len(w), 1).double()
    for t, (rows, g) in enumerate(gradients):
        touched = torch.zeros(len(w), 1, dtype=torch.bool)
        touched[rows] = True
        grad = torch.zeros_like(w).index_add_(0, rows, g.double())
        m = torch.where(touched, betas[0] * m + (1 - betas[0]) * grad, m)
        v = torch.where(touched, betas[1] * v + (1 - betas[1]) * grad**2, v)
        top = torch.maximum(top, v)
        count = count + touched
        started = count.clamp_min(1)
        root = ((top if amsgrad else v) / (1 - betas[1] ** started)).sqrt() + eps
        w = torch.where(touched, w - lr(t) * m / (1 - betas[0] ** started) / root, w)
        if penalty is not None and identity:
            w = penalty.prox(w, lr(t) * scale(t))
        elif penalty is not None:
            w = torch.where(count > 0, penalty.prox(w, lr(t) * scale(t) / root), w)
    return w


def lookups(rows, steps, touched, dim, seed=0, duplicates=True):
    """(row indices, gradients) of some steps: uneven, repeated, and now and then none at all."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for t in range(steps):
        count = 0 if t % 7 == 3 else touched
        index = torch.randint(0, rows, (count,), generator=generator)
        index = index if duplicates else index.unique()
        found.append((index, torch.randn(len(index), dim, generator=generator)))
    return found


def sparse_gradient(index, values, shape, coalesced=False):
    gradient = torch.sparse_coo_tensor(index[None], values, shape, check_invariants=True)
    return gradient.coalesce() if coalesced else gradient

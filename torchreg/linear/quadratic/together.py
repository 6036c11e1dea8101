"""Many quadratics with an L1 penalty at once, as GPUs like it: all strengths of a path, in all folds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchreg.linear.quadratic.newton import DEPENDENT, SLACK

_BEGINNING = 200  # steps of proximal gradient: after them most of the support is known, and nothing has waited for it
_STEPS = 30  # linear systems for one problem
_HELD = 1 << 25  # numbers of the linear systems that are held at a time


class Minima(NamedTuple):
    """Minimisers (k, m, p), the linear systems that were solved for each, and which are minimisers indeed (k, m)."""

    w: Tensor
    steps: Tensor
    exact: Tensor


@torch.no_grad()
def minimise_together(gram: Tensor, moment: Tensor, l1: Tensor, l2: Tensor, positive: bool = False) -> Minima:
    """The minimisers of ½wᵀGw − bᵀw + l1·Σ|w| + ½·l2·Σw² for each of k pairs (G, b) and m pairs (l1, l2).

    Accelerated proximal gradient tells roughly which coefficients are not zero. From there on the coefficients that one
    more proximal step would keep from zero, with the signs that it gives them, are those of a linear system; where it
    confirms them its solution is exact. All systems of a round are factorised together. A few problems, with dependent
    columns or between two supports, may stay open: those are left to steps that each lower the objective.

    Args:
        gram: G, (k, p, p), symmetric and positive semidefinite.
        moment: b, (k, p).
        l1, l2: (m,), non-negative.
        positive: whether w ≥ 0 is asked for.

    Source: Hintermüller, Ito and Kunisch, The primal-dual active set strategy as a semismooth Newton method, SIAM
    Journal on Optimization, 2002; O'Donoghue and Candès, Adaptive restart for accelerated gradient schemes, 2015.
    """
    size = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    size = torch.where(size > 0, size, 1)  # columns of length 1: a step of 1 is then right for each alone
    problems = _Problems(
        gram / size.unsqueeze(1) / size.unsqueeze(2),
        (moment / size).unsqueeze(1),
        l1.reshape(1, -1, 1) / size.unsqueeze(1),
        l2.reshape(1, -1, 1) / size.unsqueeze(1).square(),
        positive,
    )
    w, steps, exact = _finished(problems, _begun(problems))
    return Minima(w / size.unsqueeze(1), steps, exact)


class _Problems(NamedTuple):
    """Of columns of length 1: G (k, p, p), b (k, 1, p), and the strengths of each coefficient (k, m, p)."""

    gram: Tensor
    moment: Tensor
    l1: Tensor
    l2: Tensor
    positive: bool

    def of(self, k: Tensor, m: Tensor) -> _Problems:
        """Some of them, each with a k of its own."""
        return _Problems(
            self.gram[k], self.moment[k], self.l1[k, m].unsqueeze(1), self.l2[k, m].unsqueeze(1), self.positive
        )

    def pull(self, w: Tensor) -> Tensor:
        """The negative gradient of the quadratic part."""
        return self.moment - w @ self.gram - self.l2 * w

    def beyond(self, z: Tensor, shares: Tensor | float = 1.0) -> Tensor:
        """Which coefficients soft-thresholding keeps, by their sign: -1, 0 or 1."""
        force = z if self.positive else z.abs()
        return torch.sign(z) * (force > shares * self.l1)


def _begun(problems: _Problems) -> Tensor:
    """Some steps of accelerated proximal gradient from zero. Nothing waits for the device."""
    rate = 1 / (torch.linalg.eigvalsh(problems.gram)[:, -1].reshape(-1, 1, 1) + problems.l2.amax(2, keepdim=True))
    w = torch.zeros_like(problems.l1)
    ahead, momentum = w, torch.ones_like(rate)
    for _ in range(_BEGINNING):
        moved = ahead + rate * problems.pull(ahead)
        signs = problems.beyond(moved, rate)
        new = signs * (moved.abs() - rate * problems.l1)
        restart = ((ahead - new) * (new - w)).sum(2, keepdim=True) > 0
        grown = torch.where(restart, 1.0, 0.5 * (1 + (1 + 4 * momentum.square()).sqrt()))
        ahead = new + torch.where(restart, 0.0, (momentum - 1) / grown) * (new - w)
        w, momentum = new, grown
    return w


def _finished(problems: _Problems, w: Tensor) -> Minima:
    """By linear systems, of those that are not finished yet."""
    steps = torch.zeros(w.shape[:2], dtype=torch.int64, device=w.device)
    exact = torch.zeros(w.shape[:2], dtype=torch.bool, device=w.device)
    hopeless = torch.zeros_like(exact)
    chunk = max(1, _HELD // max(1, w.shape[2] ** 2))
    for _ in range(_STEPS):
        open_ = torch.nonzero(~(exact | hopeless))
        if not len(open_):
            break
        for k, m in (part.unbind(1) for part in open_.split(chunk)):
            here, solved, unsolved = _round(problems.of(k, m), w[k, m].unsqueeze(1))
            w[k, m] = here.squeeze(1)
            exact[k, m], hopeless[k, m] = solved, unsolved
            steps[k, m] += 1
    return Minima(w, steps, exact)


def _round(problems: _Problems, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One linear system each, for (b, 1, p): the next points, which of them are minimisers, and which have none."""
    signs = problems.beyond(w + problems.pull(w))
    inside = (signs != 0).squeeze(1)
    both = inside.unsqueeze(1) & inside.unsqueeze(2)
    matrix = torch.where(both, problems.gram, 0)
    whole = torch.where(inside, matrix.diagonal(dim1=1, dim2=2) + problems.l2.squeeze(1), 1)
    matrix.diagonal(dim1=1, dim2=2).copy_(whole)
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    unsolved = (info != 0) | ~(pivots > DEPENDENT * whole).all(1)
    right = torch.where(signs != 0, problems.moment - problems.l1 * signs, 0)
    new = torch.cholesky_solve(right.mT, factor).mT
    new = torch.where((signs != 0) & ~unsolved.reshape(-1, 1, 1), new, 0)
    pull = problems.pull(new)
    force = pull if problems.positive else pull.abs()
    slack = SLACK * problems.moment.abs().amax(2, keepdim=True)
    right_signs = torch.where(signs != 0, new * signs > 0, force <= problems.l1 + slack)
    solved = right_signs.all(2).squeeze(1) & ~unsolved
    return torch.where(unsolved.reshape(-1, 1, 1), w, new), solved, unsolved

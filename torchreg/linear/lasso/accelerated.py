"""FISTA on products with X alone: accelerated proximal gradient steps, restarted, with gap-safe screening."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from torchreg.linear.data.design import Dense, Design, mean_squares
from torchreg.linear.data.sparse_design import Sparse
from torchreg.linear.lasso.problem import Strength

_CHECK = 10  # iterations from one certificate to the next
_RELAXED = 0.99  # of the curvature, which the next step supposes to be less
_PART = 0.25  # of the columns: if fewer are left, they are copied, and products take only those
_STALLED = 20  # certificates in a row that don't improve although the gap is small
_SMALL = 1e-9
_ATTEMPTS = 60
_ROUNDING = 64.0  # roundings of a force that do not count


class Certificate(NamedTuple):
    """What a dual point tells about the solution."""

    gap: float
    force: Tensor
    """|Zᵀθ| of each coefficient at the dual point θ, (rows, features); at the solution, l1 where it is not zero."""
    radius: float
    """By how much of √(mean square of the column + l2/bend) that differs from the solution's, at most."""


class Composite(ABC):
    """f(Zw + c) + l1·Σ|w| + ½·l2·Σw², for coefficients w of shape (rows, features) and free intercepts c."""

    design: Design
    rows: int
    strength: Strength
    bend: float
    """The curvature of f is at most this, in units of 1/n."""
    positive = False
    intercept = False

    @abstractmethod
    def slopes(self, scores: Tensor) -> Tensor:
        """The gradient of f, (rows, n)."""

    @abstractmethod
    def centring(self, scores: Tensor) -> Tensor:
        """What intercepts (rows,) must move by to be the best ones."""

    @abstractmethod
    def certificate(self, scores: Tensor, w: Tensor, pull: Tensor) -> Certificate:
        """The gap, and where the dual solution is; `pull` is the negative gradient of f in w."""


class Iterate(NamedTuple):
    """Coefficients, intercepts and scores."""

    w: Tensor
    intercept: Tensor
    scores: Tensor


def accelerate(
    problem: Composite, power: float, target: float, limit: int, w: Tensor, intercept: Tensor
) -> tuple[Tensor, Tensor, float, int]:
    """Coefficients, intercepts, the gap, and the iterations.

    Steps are taken in the metric of the columns' mean squares, so that their units don't matter. Their length follows
    from the curvature that the last one met. The momentum restarts where it points uphill. At each certificate the
    columns whose coefficient is surely zero at the solution are left out.

    Args:
        problem: what is minimised.
        power: what gaps are relative to.
        target: the relative gap that ends it, unless it is less than rounding.
        limit: the most iterations.
        w: coefficients (rows, features) to begin with.
        intercept: intercepts (rows,).

    Source: Beck and Teboulle, SIAM J. Imaging Sci., 2009; O'Donoghue and Candès, Adaptive restart for accelerated
    gradient schemes, Found. Comput. Math., 2015; Fercoq, Gramfort and Salmon, Mind the duality gap, ICML 2015;
    Ndiaye et al., Gap safe screening rules for sparsity enforcing penalties, JMLR 2017.
    """
    run = _Run(problem, w, intercept)
    eps = problem.design.eps
    target, small = max(target, 4 * eps), max(_SMALL, 1e3 * eps)
    least, stalled, done = math.inf, 0, 0
    while True:
        gap = run.check()
        stalled = stalled + 1 if gap <= small * power and gap >= least else 0
        least = min(least, gap)
        if gap <= target * power or stalled >= _STALLED or done >= limit:
            break
        for _ in range(min(_CHECK, limit - done)):
            done += 1
            run.step()
    return run.full(), run.x.intercept, gap, done


class _Run:
    def __init__(self, problem: Composite, w: Tensor, intercept: Tensor) -> None:
        self.problem, self.design = problem, problem.design
        self.features = problem.design.features
        self.index: Tensor | None = None
        self.w_of_all = w
        self.squares = mean_squares(self.design)
        self.curvature, self.momentum = 1.0, 1.0
        self.place(w, intercept)

    def place(self, w: Tensor, intercept: Tensor) -> None:
        """Begin anew here, without momentum."""
        shares = self.problem.bend * self.squares
        self.metric = torch.where(shares > 0, shares, 1)
        self.x = Iterate(w, intercept, self.design.fitted(w) + intercept.unsqueeze(1))
        self.before, self.momentum = self.x, 1.0

    def full(self) -> Tensor:
        if self.index is None:
            return self.x.w
        w = torch.zeros_like(self.w_of_all)
        w[:, self.index] = self.x.w
        return w

    def check(self) -> float:
        """The gap at x, whose intercepts are made the best ones; columns that are surely zero at the solution go."""
        w, problem = self.x.w, self.problem
        scores = self.design.fitted(w) + self.x.intercept.unsqueeze(1)
        shift = problem.centring(scores)
        self.x = Iterate(w, self.x.intercept + shift, scores + shift.unsqueeze(1))
        if bool(shift.any()):
            self.before, self.momentum = self.x, 1.0
        pull = -self.back(problem.slopes(self.x.scores))
        found = problem.certificate(self.x.scores, w, pull)
        reach = found.radius * (self.squares + problem.strength.l2 / problem.bend).sqrt()
        least = problem.strength.l1 * (1 - _ROUNDING * self.design.eps)
        kept = torch.nonzero((found.force + reach >= least).any(0)).squeeze(1)
        if problem.strength.l1 and len(kept) <= _PART * len(self.squares):
            self.index = kept if self.index is None else self.index[kept]
            self.design, self.squares = part(self.design, kept), self.squares[kept]
            self.place(w[:, kept], self.x.intercept)
        return found.gap

    def back(self, slopes: Tensor) -> Tensor:
        return self.design.correlations(slopes) * self.design.samples

    def step(self) -> None:
        problem, x = self.problem, self.x
        root = (1 + math.sqrt(1 + 4 * self.momentum**2)) / 2
        ahead = (self.momentum - 1) / root
        y = x if ahead == 0 else Iterate(*(torch.lerp(b, a, 1 + ahead) for a, b in zip(x, self.before, strict=True)))
        slopes = problem.slopes(y.scores)
        gradient = self.back(slopes) / self.metric
        balance = slopes.sum(1) / problem.bend if problem.intercept else torch.zeros_like(y.intercept)
        for _ in range(_ATTEMPTS):
            new = self.proximal(y, gradient, balance)
            way, shift = new.w - y.w, new.intercept - y.intercept
            length = float((way.square() * self.metric).sum() + problem.bend * shift.square().sum())
            met = float(((problem.slopes(new.scores) - slopes) * (new.scores - y.scores)).sum())
            if met <= self.curvature * length * (1 + 1e-9) or length == 0:
                break
            self.curvature = max(met / length, 1.05 * self.curvature)
        uphill = ((y.w - new.w) * (new.w - x.w) * self.metric).sum()
        uphill += problem.bend * ((y.intercept - new.intercept) * (new.intercept - x.intercept)).sum()
        self.before, self.x = x, new
        self.momentum = 1.0 if float(uphill) > 0 else root
        self.curvature *= _RELAXED

    def proximal(self, y: Iterate, gradient: Tensor, balance: Tensor) -> Iterate:
        """The proximal gradient step of the present length."""
        length, strength = 1 / self.curvature, self.problem.strength
        w = y.w - length * gradient
        threshold = length * strength.l1 / self.metric
        w = torch.sign(w) * (w.abs() - threshold).clamp(min=0) / (1 + length * strength.l2 / self.metric) + 0.0
        if self.problem.positive:
            w = w.clamp(min=0)
        intercept = y.intercept - length * balance
        return Iterate(w, intercept, self.design.fitted(w) + intercept.unsqueeze(1))


def part(design: Design, index: Tensor) -> Design:
    """Some columns of a design, copied."""
    if isinstance(design, Sparse):
        mean = None if design.mean is None else torch.from_numpy(design.mean)[index]
        return Sparse(design.x[:, index.numpy()], mean, None if design.root is None else torch.from_numpy(design.root))
    assert isinstance(design, Dense)
    return replace(design, x=design.x.T[index].T, mean=None if design.mean is None else design.mean[index])

"""Tall problems: the Gram matrix of all columns once, and every strength on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg.linear.lasso.descent import descend, descend_together
from torchreg.linear.lasso.problem import NOT_FINITE, Fit, Problem, Strength, duality_gaps
from torchreg.linear.lasso.solution import ACCURATE, Solution, refined

_FEW = 1 << 20  # products at most, for which one solution is refined on X in any case
_CLOSE = 1e-6  # of ‖z‖²: a residual below is a difference of nearly equal numbers where it comes from the Gram matrix


@dataclass(frozen=True)
class Normal:
    """ZᵀZ/n, Zᵀz/n and ‖z‖²/n: all that a solution depends on."""

    gram: Tensor
    moment: Tensor
    power: float
    samples: int
    positive: bool = False

    @classmethod
    def of(cls, problem: Problem, gram: Tensor | None = None) -> Normal:
        """A problem's, from its Gram matrix over n where that is known.

        Raises:
            ValueError: if the data are too large for float64.
        """
        gram = problem.design.gram() if gram is None else gram
        if not bool(gram.isfinite().all()):
            raise ValueError(NOT_FINITE)
        return cls(gram, problem.moment, problem.power, problem.design.samples, problem.positive)

    def fit(self, w: Tensor) -> Fit:
        """For rows w of coefficients."""
        product, aligned = w @ self.gram, w @ self.moment
        residual = (self.power - 2 * aligned + (w * product).sum(1)).clamp(min=0)
        return Fit(residual, self.power - aligned, w.abs().sum(1), w.square().sum(1), self.moment - product)

    def path(self, strengths: list[Strength], limit: int, start: Tensor | None = None) -> tuple[Tensor, list[int]]:
        """Coefficients (m, features) for strengths in falling order, each from the one before, and their steps."""
        if start is None:
            return paths([self], strengths, limit)[0]
        found = descend(self.gram, self.moment, strengths, start=start, positive=self.positive, limit=limit)
        return torch.stack([f.w for f in found]), [f.steps for f in found]

    def gaps(self, w: Tensor, strengths: list[Strength], fit: Fit | None = None) -> list[float]:
        """The duality gaps of rows w."""
        fit = self.fit(w) if fit is None else fit
        active = fit.pull
        if any(s.l2 for s in strengths):
            active = active - w.new_tensor([s.l2 for s in strengths]).unsqueeze(1) * w
        return duality_gaps(fit, active, strengths, self.samples, self.positive)


def paths(normals: list[Normal], strengths: list[Strength], limit: int) -> list[tuple[Tensor, list[int]]]:
    """What `Normal.path` gives from zero, for each of some normal equations of as many features: on a GPU at once."""
    grams, moments = [normal.gram for normal in normals], [normal.moment for normal in normals]
    rows = descend_together(grams, moments, strengths, positive=normals[0].positive, limit=limit)
    return [(torch.stack([f.w for f in found]), [f.steps for f in found]) for found in rows]


def solve_on_gram(
    problem: Problem, strengths: list[Strength], limit: int, start: Tensor | None, gram: Tensor | None
) -> list[Solution]:
    """Solutions for strengths in falling order. Where the data are fitted closely they are refined on X itself."""
    normal = Normal.of(problem, gram)
    if start is not None:
        gap = normal.gaps(start.unsqueeze(0), strengths[:1])[0]
        if len(strengths) == 1 and gap <= ACCURATE * normal.power:
            limit = 0
    w, steps = normal.path(strengths, limit, start)
    every = torch.arange(w.shape[1], device=w.device)
    if len(strengths) == 1 and w.numel() * problem.design.samples <= _FEW:
        return [_on_data(problem, normal, Solution(every, w[0], math.inf, steps[0]), strengths[0])]
    fit = normal.fit(w)
    gaps = normal.gaps(w, strengths, fit)
    solutions = [Solution(every, row, gap, taken) for row, gap, taken in zip(w, gaps, steps, strict=True)]
    close = fit.residual <= _CLOSE * normal.power
    for i in torch.nonzero(close).squeeze(1).tolist():
        solutions[i] = _on_data(problem, normal, solutions[i], strengths[i])
    return solutions


def _on_data(problem: Problem, normal: Normal, solution: Solution, strength: Strength) -> Solution:
    """The solution with residuals that are computed, not inferred from the Gram matrix, and its gap."""
    best, w = solution, solution.values
    for attempt in range(3):
        residual = problem.target - problem.design.fitted(w.unsqueeze(0))
        n = max(1, problem.design.samples)
        pull = problem.design.correlations(residual)
        fit = Fit(
            residual.square().sum(1) / n,
            residual @ problem.target / n,
            w.abs().sum().unsqueeze(0),
            w.square().sum().unsqueeze(0),
            pull,
        )
        gap = normal.gaps(w.unsqueeze(0), [strength], fit)[0]
        if attempt == 0 or gap < best.gap:
            best = Solution(solution.index, w, gap, solution.steps)
        finer, _ = refined(normal.gram, w, pull[0], strength, normal.positive)
        if finer is None:
            break
        w = finer
    return best

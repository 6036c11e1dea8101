"""FISTA for logistic regression."""

from __future__ import annotations

import torch
from torch import Tensor

from torchreg.linear.lasso.accelerated import Certificate, Composite, accelerate
from torchreg.linear.lasso.fista import TARGET
from torchreg.linear.logistic.problem import LogisticProblem


class _Logistic(Composite):
    """Σ v·loss."""

    def __init__(self, problem: LogisticProblem) -> None:
        self.problem, self.design, self.strength = problem, problem.design, problem.strength
        self.rows, self.intercept = problem.loss.rows, problem.intercept
        heaviest = float(problem.loss.weights.max()) * problem.design.samples
        self.bend = (0.25 if self.rows == 1 else 0.5) * heaviest

    def slopes(self, scores: Tensor) -> Tensor:
        """v·(p − labels)."""
        return self.problem.loss.slopes(scores)

    def centring(self, scores: Tensor) -> Tensor:
        """By Newton's method."""
        return self.problem.centring(scores)

    def certificate(self, scores: Tensor, w: Tensor, pull: Tensor) -> Certificate:
        """At probabilities between labels and those of the scores; the dual of a loss of curvature b is 1/b-concave."""
        gap, scale = self.problem.bound(scores, w, pull)
        return Certificate(gap, scale * pull.abs(), (2 * self.bend * gap) ** 0.5)


def solve_logistic_by_fista(
    problem: LogisticProblem, limit: int, start: tuple[Tensor, Tensor] | None, target: float = TARGET
) -> tuple[Tensor, Tensor, float, int]:
    """Coefficients (rows, features), intercepts (rows,), the gap, and the iterations.

    Args:
        problem: what is minimised.
        limit: the most iterations.
        start: coefficients and intercepts to begin with.
        target: the relative gap that ends the iterations.
    """
    shape = problem.loss.rows, problem.design.features
    w = torch.zeros(shape, dtype=torch.float64, device=problem.design.device)
    w, intercept = (w, problem.null) if start is None else start
    return accelerate(_Logistic(problem), problem.power, target, limit, w, intercept)

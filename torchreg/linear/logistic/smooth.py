"""Logistic regression without L1: Newton's method, its systems solved directly or by conjugate gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from torchreg.linear.lasso.problem import NOT_FINITE, Strength
from torchreg.linear.logistic.loss import Curvature
from torchreg.linear.logistic.newton import LogisticSolution
from torchreg.linear.logistic.problem import LogisticProblem
from torchreg.linear.logistic.systems import Step, balanced, system

_EXACT = 1e-30  # of the objective at zero: a Newton decrement that ends it all
_NEAR = 1e-10  # a decrement from which on steps are no longer compared by objectives, whose digits don't suffice
_ARMIJO = 1e-4
_HALVINGS = 60
_STALLED = 3


def solve_smooth(problem: LogisticProblem, limit: int, start: tuple[Tensor, Tensor] | None) -> LogisticSolution:
    """The solution for a strength without L1, by Newton's method.

    Without any penalty the coefficients of separable classes grow until `limit` or the loss is rounding.

    Args:
        problem: what is minimised.
        limit: the most Newton steps.
        start: coefficients (rows, features) and intercepts (rows,) to begin with.

    Raises:
        ValueError: if the data are too large for float64.

    Source: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section 4.4.1, 2009; the gap of
    l2 = 0 is that of the dual point to which the last Newton step leads.
    """
    solver = _Smooth(problem, start)
    best: tuple[float, Tensor, Tensor] | None = None
    least, stalled, steps = torch.inf, 0, 0
    while True:
        step, decrement = solver.direction()
        gap = solver.gap(step)
        if best is None or gap <= best[0]:
            best = gap, solver.w, solver.intercept
        stalled = stalled + 1 if decrement <= _NEAR * problem.power and decrement > 0.25 * least else 0
        least = min(least, decrement)
        if decrement <= _EXACT * problem.power or stalled >= _STALLED or steps >= limit:
            break
        steps += 1
        if not solver.go(step, decrement):
            break
    gap, w, intercept = best
    return LogisticSolution(w, intercept, gap, steps)


def gap_without_penalty(problem: LogisticProblem, w: Tensor, intercept: Tensor) -> float:
    """How far the loss is from its infimum, at most.

    Args:
        problem: whose strength is not used.
        w: (rows, features), not worse than zero.
        intercept: (rows,).
    """
    solver = _Smooth(replace(problem, strength=Strength(0.0)), (w, intercept))
    return solver.gap(solver.direction()[0])


class _Smooth:
    """Coefficients with intercepts and scores."""

    def __init__(self, problem: LogisticProblem, start: tuple[Tensor, Tensor] | None) -> None:
        self.problem, self.loss = problem, problem.loss
        shape = problem.loss.rows, problem.design.features
        self.w = torch.zeros(shape, dtype=torch.float64, device=problem.design.device)
        self.intercept, self.scores, self.objective = problem.null, problem.at_zero, problem.power
        if start is not None:
            self.take(start)
        self.system = system(problem)

    def take(self, start: tuple[Tensor, Tensor]) -> None:
        """Begin with these, if they are better than zero."""
        w, intercept = start
        w = balanced(w)
        scores = self.problem.design.fitted(w) + intercept.unsqueeze(1)
        objective = float(self.loss.value(scores) + self.problem.penalty(w))
        if objective <= self.objective:
            self.w, self.objective = w, objective
            self.settle(intercept)

    def settle(self, intercept: Tensor) -> None:
        """Scores without what steps have rounded, and the best intercepts."""
        scores = self.problem.design.fitted(self.w) + intercept.unsqueeze(1)
        shift = self.problem.centring(scores)
        self.intercept, self.scores = intercept + shift, scores + shift.unsqueeze(1)

    def direction(self) -> tuple[Step, float]:
        """The Newton step, and the decrement: minus its product with the gradient."""
        slopes = self.loss.slopes(self.scores)
        self.pull = self.problem.pull(slopes)
        force = self.pull - self.problem.strength.l2 * self.w
        if not bool(force.isfinite().all()):
            raise ValueError(NOT_FINITE)
        balance = -slopes.sum(1) if self.problem.intercept else torch.zeros_like(self.intercept)
        curvature: Curvature = self.loss.curvature(self.scores)
        w, intercept = self.system.solve(curvature, force, balance)
        step = Step(balanced(w), intercept)
        return step, float((force * step.w).sum() + balance @ step.intercept)

    def gap(self, step: Step) -> float:
        """The duality gap here."""
        if self.problem.strength.l2:
            return self.problem.gap(self.scores, self.w, self.pull)
        turn = self.problem.design.fitted(step.w) + step.intercept.unsqueeze(1)
        return min(float(self.loss.moved(self.scores, turn)), self.objective)

    def go(self, step: Step, decrement: float) -> bool:
        """Along the step, as far as the objective falls enough. Whether it did."""
        turn = self.problem.design.fitted(step.w) + step.intercept.unsqueeze(1)
        noise = 2 * self.problem.design.eps * max(self.problem.power, self.objective)
        share = 1.0
        for _ in range(_HALVINGS):
            w, scores = self.w + share * step.w, self.scores + share * turn
            objective = float(self.loss.value(scores) + self.problem.penalty(w))
            if objective <= self.objective - _ARMIJO * share * decrement + noise:
                self.w, self.objective = w, objective
                self.settle(self.intercept + share * step.intercept)
                return True
            share /= 2
        return False

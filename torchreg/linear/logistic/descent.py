"""Logistic regression of two classes on a large sparse X: proximal Newton steps by compiled coordinate descent."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreg.linear.data.sparse_design import Sparse
from torchreg.linear.lasso.problem import NOT_FINITE
from torchreg.linear.lasso.sparse_descent import Quadratic
from torchreg.linear.logistic.newton import LogisticSolution
from torchreg.linear.logistic.problem import LogisticProblem

_EXACT = 1e-15  # of the objective without features: a gap that ends it all
_OFF = 1e-12  # by how much scores may be off
_SMALL = 1e-9  # one that may be rounding
_STALLED = 3  # steps in a row that leave more than half of such a gap
_FIRST = 0.01  # what does not count as a change of the scores at first
_FALL, _LEAST = 1e-3, 1e-17  # and of what counted in the step before, at least; what is rounding
_SQUARE = 0.1  # of the square of the last step, which is about what it is off by
_SWEEPS = 1000  # for one step
_NEAR = 0.9  # of the strength: a pull from which on a column may come to matter
_ARMIJO, _HALVINGS = 1e-4, 40


class _State:
    """Coefficients, intercept and scores, and the pull at every column."""

    def __init__(self, problem: LogisticProblem, start: tuple[Tensor, Tensor] | None) -> None:
        assert isinstance(problem.design, Sparse)
        self.problem, self.loss, self.design = problem, problem.loss, problem.design
        self.columns = Quadratic(problem.design, problem.intercept)
        self.intercept = problem.null
        self.refresh()
        if start is not None:
            self.columns.w[:] = start[0][0].numpy()
            self.intercept = start[1]
            self.refresh()
            if not self.objective <= problem.power:
                self.columns.w[:] = 0
                self.intercept = problem.null
                self.refresh()

    @property
    def w(self) -> Tensor:
        """Coefficients (1, features), in memory that steps change."""
        return torch.from_numpy(self.columns.w).unsqueeze(0)

    def refresh(self) -> None:
        """Scores without what steps have rounded, the best intercept, slopes and pull."""
        fitted = self.combine(self.columns.w)
        scores = fitted + self.intercept.unsqueeze(1)
        shift = self.problem.centring(scores)
        self.intercept = self.intercept + shift
        self.scores = scores + shift.unsqueeze(1)
        self.objective = self.objective_of(self.scores, self.w)
        self.slopes = self.loss.slopes(self.scores)
        self.pull = self.problem.pull(self.slopes)

    def combine(self, w: Any) -> Tensor:
        """Zw, (1, n)."""
        fitted = self.columns.combine(w)
        return torch.from_numpy(fitted if self.design.mean is None else fitted - self.design.mean @ w).unsqueeze(0)

    def objective_of(self, scores: Tensor, w: Tensor) -> float:
        return float(self.loss.value(scores) + self.problem.penalty(w))

    def gap(self) -> float:
        """The duality gap of the refreshed state."""
        return self.problem.gap(self.scores, self.w, self.pull)

    def step(self, index: Any, least: float) -> float:
        """One Newton step in the coefficients of an index. Its size, the norm of weighted changes of scores, or 0."""
        columns, strength = self.columns, self.problem.strength
        curvature = self.loss.curvature(self.scores).between(0, 0)
        columns.weigh(curvature.numpy(), index)
        before = columns.w.copy()
        columns.descend(-self.slopes[0].numpy(), index, strength, least, _SWEEPS)
        target = columns.w.copy()
        way = target - before
        turn = self.combine(way)
        shift = torch.zeros_like(self.intercept)
        if self.problem.intercept:
            shift = -(turn @ curvature) / curvature.sum().clamp(min=torch.finfo(torch.float64).tiny)
            turn = turn + shift.unsqueeze(1)
        penalties = [float(self.problem.penalty(torch.from_numpy(w))) for w in (before, target)]
        fall = min(0.0, float((self.slopes * turn).sum()) + penalties[1] - penalties[0])
        noise = 4e-16 * max(self.problem.power, self.objective)
        share = 1.0
        for _ in range(_HALVINGS):
            if share < 1:
                columns.w[:] = before + share * way
            objective = self.objective_of(self.scores + share * turn, self.w)
            if objective <= self.objective + _ARMIJO * share * fall + noise:
                self.intercept = self.intercept + share * shift
                return share * math.sqrt(float(turn.square() @ curvature))
            share /= 2
        columns.w[:] = before
        return 0.0


def solve_logistic_by_coordinates(
    problem: LogisticProblem, limit: int, start: tuple[Tensor, Tensor] | None
) -> LogisticSolution:
    """The solution for two classes, a sparse design on the CPU and a strength with L1.

    A Newton step's quadratic is minimised over the columns that are not zero or near to that, ever more accurately.

    Args:
        problem: what is minimised.
        limit: the most Newton steps.
        start: coefficients (1, features) and intercepts (1,) to begin with.

    Raises:
        ValueError: if the data are too large for float64.

    Source: Yuan, Ho and Lin, An improved GLMNET for L1-regularized logistic regression, JMLR 2012.
    """
    state = _State(problem, start)
    if not bool(state.pull.isfinite().all()):
        raise ValueError(NOT_FINITE)
    l1 = problem.strength.l1
    threshold, least, size, off = l1, _FIRST, 0.0, 0.0
    steps = stalled = 0
    gap = state.gap()
    while (gap > _EXACT * problem.power or off > _OFF) and stalled < _STALLED and steps < limit:
        if steps:
            least = max(_LEAST, min(_FIRST, max(_SQUARE * size**2, _FALL * least)))
        index = np.flatnonzero((state.pull[0].abs().numpy() > threshold) | (state.columns.w != 0))
        threshold = _NEAR * l1
        steps += 1
        size = state.step(index, least)
        state.refresh()
        before, gap = gap, state.gap()
        stalled = stalled + 1 if gap <= _SMALL * problem.power and gap > 0.5 * before else 0
        off = max(size**2, least)  # with L2 the gap falls with the square of this
        if not size:
            break
    return LogisticSolution(state.w, state.intercept, gap, steps)

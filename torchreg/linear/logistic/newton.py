"""Logistic regression with an L1 penalty: proximal Newton steps on a working set of columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg.linear.lasso.descent import descend
from torchreg.linear.lasso.problem import NOT_FINITE, Strength
from torchreg.linear.logistic.problem import LogisticProblem
from torchreg.linear.logistic.weighted_columns import weighted_columns
from torchreg.linear.quadratic.newton import factorise, minimise
from torchreg.linear.quadratic.threads import threads_for

_FEWEST = 100  # columns that may enter at a time
_EXACT = 1e-15  # of the objective at zero: a gap that ends it all
_ROUNDING = 1e-14  # of the largest pull: violations that are rounding
_SHARE = 0.4  # of the violations outside the working set, down to which those inside are brought
_MANY = 600  # coefficients from which on a whole new factor is faster by LAPACK than by compiled steps
_ARMIJO = 1e-4
_HALVINGS = 40
_STALLED = 3  # steps in a row that don't halve violations that are small already


@dataclass(frozen=True)
class LogisticSolution:
    """Coefficients (rows, features), intercepts (rows,), the duality gap and the number of Newton steps."""

    w: Tensor
    intercept: Tensor
    gap: float
    steps: int


class _Working:
    """Columns that have been needed so far, coefficients on them, intercepts and scores."""

    def __init__(self, problem: LogisticProblem) -> None:
        self.problem, self.loss = problem, problem.loss
        device = problem.design.device
        self.index = torch.empty(0, dtype=torch.long, device=device)
        self.inside = torch.zeros(problem.design.features, dtype=torch.bool, device=device)
        self.columns = weighted_columns(problem.design)
        self.w = torch.zeros(self.loss.rows, 0, dtype=torch.float64, device=device)
        self.intercept = problem.null
        self.scores = problem.at_zero
        self.objective = problem.power
        self.largest = 0.0
        self.steps = 0

    def take(self, start: tuple[Tensor, Tensor]) -> None:
        """Begin with these coefficients and intercepts, if they are better than zero."""
        w, intercept = start
        scores = self.problem.design.fitted(w) + intercept.unsqueeze(1)
        objective = float(self.loss.value(scores) + self.problem.penalty(w))
        if objective <= self.objective:
            self.add(torch.nonzero(w.abs().amax(0)).squeeze(1))
            self.w, self.intercept, self.scores, self.objective = w[:, self.index], intercept, scores, objective

    def add(self, index: Tensor) -> None:
        if not len(index):
            return
        self.columns.add(index)
        self.index = torch.cat([self.index, index])
        self.inside[index] = True
        self.w = torch.nn.functional.pad(self.w, (0, len(index)))

    def refresh(self) -> Tensor:
        """Scores without what steps have rounded, the best intercepts, and the pull at all coefficients."""
        scores = self.columns.combine(self.w) + self.intercept.unsqueeze(1) if len(self.index) else self.scores
        shift = self.problem.centring(scores)
        self.intercept = self.intercept + shift
        self.scores = scores + shift.unsqueeze(1)
        self.objective = float(self.loss.value(self.scores) + self.problem.penalty(self.w))
        pull = self.problem.pull(self.loss.slopes(self.scores))
        self.largest = max(self.largest, float(pull.abs().max()))
        return pull

    def full(self) -> Tensor:
        w = self.w.new_zeros(self.loss.rows, self.problem.design.features)
        w[:, self.index] = self.w
        return w

    def violations(self, force: Tensor) -> Tensor:
        """How far each coefficient inside is from optimal, for forces that include the L2 penalty's."""
        l1 = self.problem.strength.l1
        return torch.where(self.w != 0, (force - l1 * torch.sign(self.w)).abs(), (force.abs() - l1).clamp(min=0))

    def descend(self, tolerance: float, limit: int) -> None:
        """Newton steps until no violation inside exceeds the tolerance, or they are rounding."""
        l1, l2 = self.problem.strength.l1, self.problem.strength.l2
        least, stalled = torch.inf, 0
        while True:
            slopes = self.loss.slopes(self.scores)
            force = -self.columns.correlations(slopes) - l2 * self.w
            worst = float(self.violations(force).max())
            small = worst <= 1e-7 * self.largest
            stalled = stalled + 1 if small and worst > 0.5 * least else 0
            least = min(least, worst)
            if worst <= tolerance or stalled >= _STALLED or self.steps >= limit:
                return
            self.steps += 1
            active = (self.w != 0) | (force.abs() > l1)
            if not self.step(active, force, slopes):
                return

    def step(self, active: Tensor, force: Tensor, slopes: Tensor) -> bool:
        """One proximal Newton step in the active coefficients and the intercepts. Whether the objective fell."""
        l1, l2 = self.problem.strength.l1, self.problem.strength.l2
        curvature = self.loss.curvature(self.scores)
        matrix, mixed = self.columns.hessian(curvature, active)
        here, there = self.w[active], force[active]
        if self.problem.intercept:
            eliminated = curvature.eliminated()
            slope = slopes.sum(1)
            matrix -= mixed @ eliminated @ mixed.T
            there = there + mixed @ (eliminated @ slope)
        found = self._on_face(matrix, here, there)
        if found is None:
            moment = matrix @ here + there + l2 * here
            found = _minimiser(matrix.cpu(), moment.cpu(), Strength(l1, l2), here.cpu()).to(here.device)
        way = torch.zeros_like(self.w)
        way[active] = found - here
        shift = torch.zeros_like(self.intercept)
        if self.problem.intercept:
            shift = -eliminated @ (slope + mixed.T @ (found - here))
        target = torch.zeros_like(self.w)
        target[active] = found
        slope_there = float((slopes.sum(1) @ shift) - (force * way).sum() - l2 * (self.w * way).sum())
        fall = slope_there + float(self.problem.penalty(target)) - float(self.problem.penalty(self.w))
        return self._search(target, way, shift, fall)

    def _on_face(self, matrix: Tensor, here: Tensor, there: Tensor) -> Tensor | None:
        """Where the minimiser keeps all signs: one Newton step there, whose rounding is that of the step."""
        l1, l2 = self.problem.strength.l1, self.problem.strength.l2
        if not len(here) or not bool((here != 0).all()):
            return None
        own = matrix.clone()
        own.diagonal().add_(l2)
        factor, stuck = factorise(own)
        if stuck is not None:
            return None
        found = here + torch.cholesky_solve((there - l1 * torch.sign(here)).unsqueeze(1), factor).squeeze(1)
        return found if bool((found * here > 0).all()) else None

    def _search(self, target: Tensor, way: Tensor, shift: Tensor, fall: float) -> bool:
        """Go as far along the way as the objective falls enough."""
        turn = self.columns.combine(way) + shift.unsqueeze(1)
        noise = 4e-16 * max(self.problem.power, self.objective)
        share = 1.0
        for _ in range(_HALVINGS):
            w = target if share == 1 else self.w + share * way
            scores = self.scores + share * turn
            objective = float(self.loss.value(scores) + self.problem.penalty(w))
            if objective <= self.objective + _ARMIJO * share * min(fall, 0.0) + noise:
                self.w, self.scores, self.objective = w, scores, objective
                self.intercept = self.intercept + share * shift
                return True
            share /= 2
        return False


def _minimiser(gram: Tensor, moment: Tensor, strength: Strength, start: Tensor) -> Tensor:
    if torch.count_nonzero(start) <= _MANY:
        return descend(gram, moment, [strength], start=start)[0].w
    with threads_for(len(moment)):
        return minimise(gram, moment, strength.l1, strength.l2, start=start).w


def solve_logistic(problem: LogisticProblem, limit: int, start: tuple[Tensor, Tensor] | None) -> LogisticSolution:
    """The solution for a strength with L1, by proximal Newton steps on a working set.

    Args:
        problem: what is minimised.
        limit: the most Newton steps.
        start: coefficients (rows, features) and intercepts (rows,) to begin with.

    Raises:
        ValueError: if the data are too large for float64.

    Source: Lee, Sun and Saunders, Proximal Newton-type methods for minimizing composite functions, SIAM Journal on
    Optimization, 2014; Friedman, Hastie and Tibshirani, Journal of Statistical Software, 2010 (working sets).
    """
    l1 = problem.strength.l1
    working = _Working(problem)
    if start is not None:
        working.take(start)
    pull = working.refresh()
    if not bool(pull.isfinite().all()):
        raise ValueError(NOT_FINITE)
    while True:
        gap = problem.gap(working.scores, working.full(), pull)
        force = pull.abs().amax(0).masked_fill(working.inside, 0)
        outside = max(0.0, float(force.max()) - l1)
        slack = _ROUNDING * working.largest
        if gap <= _EXACT * problem.power or working.steps >= limit:
            break
        before = working.steps
        if outside > slack:
            found = torch.nonzero(force > l1 + slack).squeeze(1)
            most = max(_FEWEST, int(torch.count_nonzero(working.w.abs().amax(0))))
            if len(found) > most:
                found = found[torch.topk(force[found], most).indices]
            working.add(found)
        if not len(working.index):
            break
        working.descend(max(_SHARE * outside, slack), limit)
        pull = working.refresh()
        if working.steps == before:
            break
    return LogisticSolution(working.full(), working.intercept, gap, working.steps)

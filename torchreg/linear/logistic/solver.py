"""Which way a logistic regression is solved."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from torchreg.linear.data.sparse_design import Sparse
from torchreg.linear.lasso import sparse_descent
from torchreg.linear.lasso.fista import CLOSE, TARGET, is_close
from torchreg.linear.logistic.descent import solve_logistic_by_coordinates
from torchreg.linear.logistic.fista import solve_logistic_by_fista
from torchreg.linear.logistic.newton import LogisticSolution, solve_logistic
from torchreg.linear.logistic.problem import LogisticProblem
from torchreg.linear.logistic.smooth import gap_without_penalty, solve_smooth

_POLISHED = 1000  # non-zero coefficients up to which Newton steps take them to the last digit
_PATIENCE = 40  # Newton steps by coordinate descent that are enough unless columns depend on one another
_TINY = 1e-9  # a penalty of this part of the loss without features
_ITERATIONS = 50  # of FISTA, for one Newton step that users allow


def solve_classification(
    problem: LogisticProblem, limit: int, start: tuple[Tensor, Tensor] | None, method: str
) -> LogisticSolution:
    """The solution, by proximal Newton steps, or Newton's method without L1.

    For a large sparse design with L1, where thousands of coefficients are not zero, Newton's systems take many times as
    long: for two classes they are solved by compiled coordinate descent; for more, or without a compiler, FISTA comes
    first, as it does if `method` is "fista".

    Args:
        problem: what is minimised.
        limit: the most Newton steps.
        start: coefficients (rows, features) and intercepts (rows,) to begin with.
        method: "auto", "newton" or "fista"; others mean "auto".

    Raises:
        ValueError: if the data are too large for float64, or the method can't be had.
    """
    penalised = problem.strength.l1 > 0 or problem.strength.l2 > 0
    if method == "cd":
        raise ValueError("Expected `solver` to be 'auto', 'newton' or 'fista', got 'cd': that is for least squares.")
    if method == "fista" and not penalised:
        raise ValueError(
            "Expected a finite C for solver='fista': without a penalty nothing bounds how far it is from the solution."
        )
    found = _solve(problem, limit, start, method)
    size = float(problem.penalty(found.w))
    if problem.strength.l1 and found.gap > CLOSE * problem.power and size <= _TINY * problem.power:
        # dual points within so small an l1 are lost in rounding; one of no strength at all is good enough
        return replace(found, gap=min(found.gap, size + gap_without_penalty(problem, found.w, found.intercept)))
    return found


def _solve(problem: LogisticProblem, limit: int, start: tuple[Tensor, Tensor] | None, method: str) -> LogisticSolution:
    newton = solve_logistic if problem.strength.l1 else solve_smooth
    if method != "fista" and (method == "newton" or not _is_large(problem)):
        return newton(problem, limit, start)
    if method != "fista" and problem.loss.rows == 1 and _can_sweep(problem):
        found = solve_logistic_by_coordinates(problem, min(limit, _PATIENCE), start)
        if found.steps >= limit or _is_exact(found, problem):
            return found
        start, limit = (found.w, found.intercept), limit - found.steps
        if torch.count_nonzero(found.w) <= _POLISHED:
            rest = newton(problem, limit, start)
            return replace(rest, steps=found.steps + rest.steps)
    w, intercept, gap, steps = solve_logistic_by_fista(problem, _ITERATIONS * limit, start, CLOSE)
    close = is_close(gap, problem.power, problem.design.eps)
    if close and torch.count_nonzero(w) <= _POLISHED:
        found = newton(problem, limit, (w, intercept))
        return LogisticSolution(found.w, found.intercept, found.gap, steps)
    if close:
        w, intercept, gap, more = solve_logistic_by_fista(problem, _ITERATIONS * limit, (w, intercept))
        steps += more
    elif method != "fista":
        return newton(problem, limit, (w, intercept))
    return LogisticSolution(w, intercept, gap, steps)


def _can_sweep(problem: LogisticProblem) -> bool:
    """Whether there is a compiler, and entries can be counted in 32 bits."""
    return bool(problem.design.x.nnz < 2**31) and sparse_descent.unavailable() is None  # type: ignore[attr-defined]


def _is_exact(found: LogisticSolution, problem: LogisticProblem) -> bool:
    """Whether coordinate descent has reached the target, or all that rounding allows."""
    ended = found.steps < _PATIENCE and is_close(found.gap, problem.power, problem.design.eps)
    return ended or found.gap <= max(TARGET, 4 * problem.design.eps) * problem.power


def _is_large(problem: LogisticProblem) -> bool:
    design = problem.design
    return isinstance(design, Sparse) and problem.strength.l1 > 0 and min(design.samples, design.features) > _POLISHED

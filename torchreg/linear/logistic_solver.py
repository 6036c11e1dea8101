"""Which way a logistic regression is solved."""

from __future__ import annotations

import torch
from torch import Tensor

from torchreg.linear.fista import CLOSE, is_close, solve_logistic_by_fista
from torchreg.linear.logistic_newton import LogisticSolution, solve_logistic
from torchreg.linear.logistic_problem import LogisticProblem
from torchreg.linear.logistic_smooth import solve_smooth
from torchreg.linear.sparse_design import Sparse

_POLISHED = 1000  # non-zero coefficients up to which Newton steps take them to the last digit
_ITERATIONS = 50  # of FISTA, for one Newton step that users allow


def solve_classification(
    problem: LogisticProblem, limit: int, start: tuple[Tensor, Tensor] | None, method: str
) -> LogisticSolution:
    """The solution, by proximal Newton steps, or Newton's method without L1.

    FISTA comes first if `method` is "fista", and for a large sparse design with L1: where thousands of coefficients are
    not zero, Newton's systems take many times as long.

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
    newton = solve_logistic if problem.strength.l1 else solve_smooth
    if method != "fista" and (method == "newton" or not _is_large(problem)):
        return newton(problem, limit, start)
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


def _is_large(problem: LogisticProblem) -> bool:
    design = problem.design
    return isinstance(design, Sparse) and problem.strength.l1 > 0 and min(design.samples, design.features) > _POLISHED

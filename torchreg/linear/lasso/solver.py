"""Which way a problem is solved."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from torchreg.linear.data.design import Dense, Design
from torchreg.linear.data.sparse_design import Sparse
from torchreg.linear.lasso import coordinate_descent
from torchreg.linear.lasso.coordinate_descent import solve_by_coordinates
from torchreg.linear.lasso.fista import CLOSE, is_close, solve_by_fista
from torchreg.linear.lasso.full_gram import solve_on_gram
from torchreg.linear.lasso.problem import NOT_FINITE, Problem, Strength
from torchreg.linear.lasso.solution import Solution
from torchreg.linear.lasso.working_set import solve_one, solve_path

SOLVERS = ("auto", "newton", "fista", "cd")
"""Names of methods."""

_POLISHED = 1000  # non-zero coefficients of sparse data, up to which Newton steps take them to the last digit
_FINISHED = 5000  # likewise, where coordinate descent has not ended
_ENDED = 1e-12  # the relative gap
_SWEEPS = 10  # of coordinate descent, for one step that users allow
_ITERATIONS = 50  # of FISTA, likewise
_NARROW = 256  # columns whose Gram matrix costs less than the passes over X that it saves
_PER_STRENGTH = 16  # and as many more for each further strength


def solve(
    problem: Problem,
    strengths: list[Strength],
    *,
    limit: int = 1000,
    start: Tensor | None = None,
    gram: Tensor | bool | None = None,
    method: str = "auto",
) -> list[Solution]:
    """Solutions for strengths in falling order.

    Args:
        problem: what is minimised.
        strengths: at least one.
        limit: the most Newton steps for one strength.
        start: coefficients (features,) to begin with.
        gram: ZᵀZ/n where it is known, True to compute it in any case.
        method: "newton", "fista", "cd", or "auto" for what is fastest. After the latter two Newton steps take solutions
            with few coefficients to the last digit.

    Raises:
        ValueError: if the data are too large for float64, or the method can't be had.
    """
    if not (problem.moment.isfinite().all() and math.isfinite(problem.power)):
        raise ValueError(NOT_FINITE)
    if method in ("cd", "fista"):
        _refuse(problem, method, gram)
        return _without_gram(problem, strengths, method, limit, start)
    known = gram if isinstance(gram, Tensor) else None
    if known is not None or gram is True or is_narrow(problem.design, len(strengths)):
        return solve_on_gram(problem, strengths, limit, start, known)
    if method == "auto" and _by_coordinates(problem.design, strengths):
        found = solve_by_coordinates(problem, strengths, _SWEEPS * limit, start)
        if len(strengths) > 1 or torch.count_nonzero(found[0].values) > _POLISHED:
            return [_finished(problem, s, solution, limit) for s, solution in zip(strengths, found, strict=True)]
        start = found[0].values
    if len(strengths) == 1:
        return [solve_one(problem, strengths[0], limit, start)]
    return list(solve_path(problem, strengths, limit, start))


def _without_gram(
    problem: Problem, strengths: list[Strength], method: str, limit: int, start: Tensor | None
) -> list[Solution]:
    """By products with X alone, until few coefficients are known well enough for Newton steps."""
    found: list[Solution] = []
    for strength in strengths:
        if method == "cd":
            (solution,) = solve_by_coordinates(problem, [strength], _SWEEPS * limit, start)
        else:
            (solution,) = solve_by_fista(problem, [strength], _ITERATIONS * limit, start, CLOSE)
        w = solution.full(problem.design.features)
        few = torch.count_nonzero(w) <= min(_POLISHED, problem.design.samples)
        if few and is_close(solution.gap, problem.power, problem.design.eps):
            solution = replace(solve_one(problem, strength, limit, w), steps=solution.steps)
        elif method == "fista":
            (more,) = solve_by_fista(problem, [strength], _ITERATIONS * limit, w)
            solution = replace(more, steps=solution.steps + more.steps)
        else:
            solution = _finished(problem, strength, solution, limit)
        start = solution.full(problem.design.features)
        found.append(solution)
    return found


def _finished(problem: Problem, strength: Strength, found: Solution, limit: int) -> Solution:
    """What coordinate descent has found, or what Newton steps make of it where its sweeps were not enough.

    For columns that are all but alike it takes tens of thousands.
    """
    w = found.full(problem.design.features)
    few = torch.count_nonzero(w) <= min(_FINISHED, problem.design.samples)
    if not few or found.gap <= _ENDED * problem.power:
        return found
    better = solve_one(problem, strength, limit, w)
    return replace(better, steps=found.steps) if better.gap < found.gap else found


def _refuse(problem: Problem, method: str, gram: Tensor | bool | None) -> None:
    """Errors for what a method can't do."""
    if gram is not None and gram is not False:
        raise ValueError(
            f"Expected `solver` to be 'auto' or 'newton' with a precomputed Gram matrix: '{method}' uses none."
        )
    if method == "cd" and problem.design.device.type != "cpu":
        raise ValueError(
            f"Expected X on the CPU for solver='cd', got it on {problem.design.device}: one coordinate after the other "
            "is no work for a GPU; 'fista' is."
        )
    if method == "cd" and (reason := coordinate_descent.unavailable()) is not None:
        raise ValueError(f"solver='cd' is compiled from C, which can't be done here: {reason}.")


def _by_coordinates(design: Design, strengths: list[Strength]) -> bool:
    """Whether sparse columns are so many that the Gram matrix of those needed may become large."""
    many = isinstance(design, Sparse) and min(design.features, design.samples) > _POLISHED
    return many and strengths[-1].l1 > 0 and coordinate_descent.unavailable() is None


def is_narrow(design: Design, solutions: int) -> bool:
    """Whether the Gram matrix of all columns pays for this many solutions."""
    few = design.features <= _NARROW + _PER_STRENGTH * (solutions - 1)
    return isinstance(design, Dense) and design.features <= design.samples and few

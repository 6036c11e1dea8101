"""Which way ridge regression is solved: Cholesky with refinement, an eigendecomposition, or conjugate gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from torchreg.linear.data.design import Dense
from torchreg.linear.lasso.problem import NOT_FINITE
from torchreg.linear.quadratic.threads import threads_for
from torchreg.linear.ridge.problem import RidgeProblem
from torchreg.linear.ridge.spectrum import Spectrum

_FEW = 4  # strengths for which as many Cholesky factors cost less than one eigendecomposition
_LARGE = 4096  # the smaller side from which on a sparse matrix is only multiplied
_SINGULAR = 1e-14  # a pivot, of a matrix with unit diagonal, that is rounding
_DOUBTFUL = 1e-4  # a correction of this part says that the factor has hardly any digits
_EXACT = 1e-15


def solve_ridge(
    problem: RidgeProblem, alphas: Tensor, method: str = "auto", limit: int | None = None, tol: float = 1e-4
) -> tuple[Tensor, str]:
    """Minimisers for one strength a target.

    Args:
        problem: what is solved.
        alphas: non-negative, shape (targets,).
        method: "auto", "cholesky", "svd", or "cg".
        limit: the most steps of conjugate gradients; None for as many as it takes.
        tol: the relative residual from which on conjugate gradients are said not to have converged.

    Returns:
        Coefficients (targets, features) in float64, and the method.

    Raises:
        ValueError: if the data are too large for float64.
    """
    if method == "auto":
        small = min(problem.design.samples, problem.design.features)
        method = "cg" if not isinstance(problem.design, Dense) and small > _LARGE else "cholesky"
    if method == "cg":
        return _conjugate_gradients(problem, alphas, limit, tol), "cg"
    if not bool(problem.gram.isfinite().all()):
        raise ValueError(NOT_FINITE)
    coef = alphas.new_zeros(len(alphas), problem.design.features)
    distinct = alphas.unique()
    hard = method == "svd" or len(distinct) > _FEW
    if not hard:
        for alpha in distinct.tolist():
            which = alphas == alpha
            found = _direct(problem, problem.targets[which], alpha)
            if found is None:
                hard, method = True, "svd"
                break
            coef[which] = found
    if hard:
        spectrum = Spectrum(problem, float(distinct.min()), svd=True if method == "svd" else None)
        for alpha in distinct:
            which = alphas == alpha
            coef[which] = spectrum.coefficients(alpha[None])[0][which]
    return coef, method


def ridge_gaps(problem: RidgeProblem, coef: Tensor, alphas: Tensor) -> Tensor:
    """How far each target's objective is from the smallest one at most, ‖Zᵀ(z − Zw) − alpha·w‖²/alpha.

    It is the duality gap at the residual. Without a penalty it is ‖Zᵀ(z − Zw)‖²/n, which bounds nothing but is zero
    at the minimum.
    """
    force = _force(problem, problem.targets, coef, alphas.unsqueeze(1))
    return force.square().sum(1) / torch.where(alphas > 0, alphas, problem.design.samples)


def _force(problem: RidgeProblem, targets: Tensor, coef: Tensor, alpha: Tensor | float) -> Tensor:
    return problem.pull(targets - problem.fitted(coef)) - alpha * coef


def _direct(problem: RidgeProblem, targets: Tensor, alpha: float) -> Tensor | None:
    """By a Cholesky factor of the smaller Gram matrix and refinement with residuals from Z; None if it has no digits.

    Source: Björck, Stability analysis of the method of seminormal equations, Linear Algebra and its Applications, 1987.
    """
    matrix = problem.gram.clone()
    if problem.dual and problem.centred:  # lifts the null vector, which targets have no part of
        r = problem.root / len(problem.root) ** 0.5
        matrix.addr_(r, r * matrix.norm())
    matrix.diagonal().add_(alpha)
    diagonal = matrix.diagonal()
    empty = diagonal <= 0
    scale = torch.where(empty, 1, diagonal).rsqrt()
    matrix.mul_(scale).mul_(scale.unsqueeze(1))
    matrix.diagonal().masked_fill_(empty, 1)
    with threads_for(len(matrix)):
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) or not float(factor.diagonal().min()) ** 2 > _SINGULAR * len(matrix):
            return None
        scale = torch.where(empty, 0, scale)

        def apply(rows: Tensor) -> Tensor:
            return torch.cholesky_solve((rows * scale).T, factor).T * scale

        if not problem.dual:
            return _refined(problem.pull(targets), apply, lambda w: _force(problem, targets, w, alpha))
        found = _refined(targets, apply, lambda c: targets - problem.fitted(problem.pull(c)) - alpha * c)
        return None if found is None else problem.pull(found)


def _refined(right: Tensor, apply: Callable[[Tensor], Tensor], residual: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Solutions (m, k) of a system for right sides (m, k), from an approximate inverse; None if it is a bad one."""
    found = apply(right)
    before = None
    for _ in range(3):
        step = apply(residual(found))
        size, whole = step.norm(dim=1), found.norm(dim=1)
        if before is None and not bool((size <= _DOUBTFUL * whole).all()):
            return None
        if before is not None and not bool((size <= 0.5 * before).any()):
            break
        found, before = found + step, size
        if bool((size <= _EXACT * whole).all()):
            break
    return found


def _conjugate_gradients(problem: RidgeProblem, alphas: Tensor, limit: int | None, tol: float) -> Tensor:
    """By products with X alone, all targets at once, on the smaller side: for ZZᵀ + alpha they end at the shortest w.

    Source: Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, Journal of Research of the
    National Bureau of Standards, 1952.
    """
    alpha = alphas.unsqueeze(1)
    if problem.dual:
        residual, scale = problem.targets, torch.ones_like(alpha)
    else:
        diagonal = problem.squares + alpha
        residual = problem.pull(problem.targets)
        scale = torch.where(diagonal > 0, 1 / torch.where(diagonal > 0, diagonal, 1), 0)
    if not bool(residual.isfinite().all()):
        raise ValueError(NOT_FINITE)
    found = torch.zeros_like(residual)
    direction = residual * scale
    power = (residual * direction).sum(1)
    first = power
    for _ in range(limit or 10 * min(problem.design.samples, problem.design.features)):
        if bool((power <= _EXACT**2 * first).all()):
            break
        there = problem.fitted(problem.pull(direction)) if problem.dual else problem.pull(problem.fitted(direction))
        ahead = there + alpha * direction
        curvature = (direction * ahead).sum(1)
        length = torch.where(curvature > 0, power / torch.where(curvature > 0, curvature, 1), 0).unsqueeze(1)
        found, residual = found + length * direction, residual - length * ahead
        scaled = residual * scale
        before, power = power, (residual * scaled).sum(1)
        turn = torch.where(before > 0, power / torch.where(before > 0, before, 1), 0)
        direction = scaled + turn.unsqueeze(1) * direction
    if not bool((power <= tol**2 * first).all()):
        warnings.warn("Conjugate gradients did not converge.", ConvergenceWarning, stacklevel=4)
    return problem.pull(found) if problem.dual else found

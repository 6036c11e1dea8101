"""Newton systems of logistic regression in all coefficients: by the second derivative, or products with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from torchreg.linear.data.columns import CONSTANT
from torchreg.linear.data.design import Dense, mean_squares
from torchreg.linear.logistic.loss import Curvature
from torchreg.linear.logistic.problem import LogisticProblem
from torchreg.linear.logistic.weighted_columns import WholeColumns, weighted_columns
from torchreg.linear.quadratic.newton import factorise

_LARGEST = 3000  # coefficients whose second derivative is formed
_NULL = 1e-13  # of the largest eigenvalue: directions that change nothing
_PRECISE = 1e-4  # the residual of conjugate gradients over that at the start
_PATIENCE = 500


class Step(NamedTuple):
    """A change of coefficients (rows, features) and intercepts (rows,)."""

    w: Tensor
    intercept: Tensor


class System(ABC):
    """(H + l2)·step = force, where H is the second derivative of the loss at some scores."""

    def __init__(self, problem: LogisticProblem) -> None:
        self.problem = problem

    @abstractmethod
    def solve(self, curvature: Curvature, force: Tensor, balance: Tensor) -> Step:
        """The Newton step for minus the gradient in coefficients (rows, features) and in intercepts (rows,)."""


def system(problem: LogisticProblem) -> System:
    """The way that suits a problem's size."""
    rows, n, p = problem.loss.rows, problem.design.samples, problem.design.features
    if rows * p <= min(_LARGEST, max(500, rows * n)):
        return _Direct(problem)
    return _Products(problem)


class _Direct(System):
    """The second derivative, factorised; by its eigenvectors where it is singular."""

    def __init__(self, problem: LogisticProblem) -> None:
        super().__init__(problem)
        design = problem.design
        self._columns = WholeColumns(design) if isinstance(design, Dense) else weighted_columns(design)
        self._columns.add(torch.arange(design.features, device=design.device))

    def solve(self, curvature: Curvature, force: Tensor, balance: Tensor) -> Step:
        matrix, mixed = self._columns.hessian(curvature, torch.ones_like(force, dtype=torch.bool))
        right = force.flatten()
        whole = matrix.diagonal().clone()
        eliminated = curvature.eliminated()
        if self.problem.intercept:
            matrix -= mixed @ eliminated @ mixed.T
            right = right - mixed @ (eliminated @ balance)
        matrix.diagonal().add_(self.problem.strength.l2)
        left = matrix.diagonal()
        known = left > torch.maximum(_NULL * whole, self._rounding(curvature))
        scale = torch.where(known, left, 1).rsqrt() * known
        matrix = matrix * scale * scale.unsqueeze(1)
        matrix.diagonal().add_((~known).double())
        factor, stuck = factorise(matrix)
        if stuck is None:
            found = scale * torch.cholesky_solve((scale * right).unsqueeze(1), factor).squeeze(1)
        else:
            found = scale * _pseudosolve(matrix, scale * right)
        shift = torch.zeros_like(balance)
        if self.problem.intercept:
            shift = eliminated @ (balance - mixed.T @ found)
        return Step(found.reshape(force.shape), shift)

    def _rounding(self, curvature: Curvature) -> Tensor:
        """What rounding leaves of constant columns, for which the intercept does."""
        design, total = self.problem.design, curvature.total().diagonal().unsqueeze(1)
        if design.mean is None:
            return total.new_zeros(len(total) * design.features)
        mean = torch.as_tensor(design.mean, device=total.device)
        return (total * (CONSTANT * design.eps * mean).square()).flatten()


class _Products(System):
    """Conjugate gradients on products with X, preconditioned by the diagonal.

    Source: Lin, Weng and Keerthi, Trust region Newton method for large-scale logistic regression, JMLR 2008.
    """

    def solve(self, curvature: Curvature, force: Tensor, balance: Tensor) -> Step:
        problem = self.problem
        rows, n = force.shape[0], problem.design.samples
        right = torch.cat([force, balance.unsqueeze(1)], 1)
        scale = self._diagonal(curvature)

        def product(step: Tensor) -> Tensor:
            fitted = problem.design.fitted(step[:, :-1])
            if problem.intercept:
                fitted = fitted + step[:, -1:]
            bent = curvature.times(fitted)
            back = problem.design.correlations(bent) * n + problem.strength.l2 * step[:, :-1]
            last = bent.sum(1, keepdim=True) if problem.intercept else bent.new_zeros(rows, 1)
            return torch.cat([back, last], 1)

        x, r = torch.zeros_like(right), right
        z = r / scale
        p, rho = z, float((r * z).sum())
        goal = rho * _PRECISE**2
        for _ in range(_PATIENCE):
            if not rho > goal:
                break
            q = product(p)
            bend = float((p * q).sum())
            if not bend > 0:
                break
            x = x + (rho / bend) * p
            r = r - (rho / bend) * q
            z = r / scale
            before, rho = rho, float((r * z).sum())
            p = z + (rho / before) * p
        return Step(x[:, :-1], x[:, -1])

    def _diagonal(self, curvature: Curvature) -> Tensor:
        """A bound of the diagonal by each column's mean square, and the intercepts' own."""
        own = curvature.total().diagonal().clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(1)
        diagonal = own * self._squares + self.problem.strength.l2
        diagonal = torch.where(diagonal > 0, diagonal, 1)
        return torch.cat([diagonal, own], 1)

    @cached_property
    def _squares(self) -> Tensor:
        return mean_squares(self.problem.design)


def balanced(w: Tensor) -> Tensor:
    """Less the mean over several classes, which changes no probability and is zero at the minimiser."""
    return w - w.mean(0) if len(w) > 1 else w


def _pseudosolve(matrix: Tensor, right: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > _NULL * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1), 0)
    return vectors @ (inverse * (vectors.T @ right))

"""The folds of a cross-validation with several targets that share their features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchreg.linear.grouped.solver import solve_blocks
from torchreg.linear.lasso.problem import Strength
from torchreg.linear.paths.folds import Folds
from torchreg.linear.paths.path import all_targets, warn_if_far


class BlockFolds(Folds):
    """As `Folds`, with errors that are means over targets."""

    def errors(self, strengths: list[Strength], limit: int, tol: float) -> np.ndarray:
        """Mean squared errors on the samples left out, shape (folds, strengths), for falling strengths."""
        rows = [self._wide(train, test, strengths, limit, tol) for train, test in self.splits]
        return torch.stack(rows).cpu().numpy()

    def _wide(self, train: Tensor, test: Tensor, strengths: list[Strength], limit: int, tol: float) -> Tensor:
        data = self._training(train)
        problem = all_targets(data, self.centred)
        mean, target_mean = data.design(self.centred)[1], data.targets(self.centred)[1]
        errors = []
        for solution in solve_blocks(problem, strengths, limit=limit):
            warn_if_far(solution.gap, problem.power, self._eps, tol)
            intercept = target_mean if mean is None else target_mean - solution.w @ mean
            errors.append(self._error(test, solution.w, intercept))
        return torch.stack(errors)

    def _error(self, test: Tensor, w: Tensor, intercept: Tensor) -> Tensor:
        """Of one solution on test samples, from their predictions."""
        x, y = self.data.x, self.data.y[test]
        support = torch.nonzero(w.any(0)).squeeze(1)
        if isinstance(x, Tensor):
            fitted = x[test[:, None], support].double() @ w[:, support].T
        else:
            part = x[:, support.numpy()][test.numpy()]
            fitted = torch.from_numpy(np.asarray(part @ w[:, support].T.numpy(), dtype=np.float64))
        squares = (fitted + intercept - y).square().mean(1)
        if self.data.weights is None:
            return squares.mean()
        weights = self.data.weights[test]
        return weights @ squares / weights.sum()

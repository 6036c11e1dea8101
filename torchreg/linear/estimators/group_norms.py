"""What estimators with a penalty of group norms share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchreg.linear.data.inputs import Data, refuse_infinite
from torchreg.linear.estimators.elastic_net import TensorPrediction
from torchreg.linear.grouped.problem import BlockProblem
from torchreg.linear.grouped.solver import BlockSolution, solve_blocks
from torchreg.linear.lasso.problem import NOT_FINITE, Strength
from torchreg.linear.paths.path import warn_if_far


class GroupNorms(TensorPrediction):
    """Fits of coefficients (targets, features), some of whose groups are zero."""

    max_iter: int | None
    tol: float
    warm_start: bool

    def _solve(self, data: Data, problem: BlockProblem, strength: Strength, start: Tensor | None) -> BlockSolution:
        refuse_infinite(self, data, problem.moment)
        (solution,) = solve_blocks(problem, [strength], limit=self.max_iter or 1000, start=start)
        if not bool(solution.w.isfinite().all()):
            raise ValueError(NOT_FINITE)
        warn_if_far(solution.gap, problem.power, problem.design.eps, self.tol)
        return solution

    def _start(self, data: Data) -> Tensor | None:
        """Coefficients (targets, features) to begin with, if there are any."""
        if not self.warm_start or not hasattr(self, "coef_"):
            return None
        start = self.coef_ if isinstance(self.coef_, Tensor) else torch.from_numpy(np.array(self.coef_))
        start = torch.atleast_2d(start.to(data.y.device, torch.float64))
        shape = (data.y.shape[1], data.x.shape[1])
        if start.shape != shape:
            raise ValueError(f"Expected a warm start of shape {shape}, got coef_ of {tuple(start.shape)}.")
        return start

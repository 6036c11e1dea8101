"""The Hessian of least squares with a penalty of group norms, where no group is zero."""

from __future__ import annotations

import torch
from torch import Tensor

from torchreg.linear.grouped.blocks import Blocks

_LIFT = 1e-10  # of a norm's curvature across it is added along it: where columns are dependent there may be none

_LIFTS = (1e-13, 1e-11, 1e-8)  # of the diagonal, where the strength is so small that its curvature is rounding


class Hessian:
    """(G + D)⊗I − UCUᵀ at coefficients W, factorised.

    D is the norms' curvature l1·v_g/‖W_g‖ at each column; U has a column for each group, W_g/‖W_g‖, along which a norm
    has no curvature. For several targets the inverse comes from that of A = G + D, which all of them share, by the
    formula of Sherman, Morrison and Woodbury, in which Uᵀ(A⁻¹⊗I)U is a product of A⁻¹ and WᵀW entry by entry. So it
    costs two Cholesky factors of k × k, whatever the number of targets.

    Args:
        gram: G, symmetric and positive semidefinite, (k, k).
        blocks: the groups of its columns.
        strengths: l1·v_g, (groups,).
        w: W, (targets, k).
        norms: of its groups, none of which is zero.
    """

    def __init__(self, gram: Tensor, blocks: Blocks, strengths: Tensor, w: Tensor, norms: Tensor) -> None:
        self._blocks, self._more = blocks, None
        curvature = strengths / norms
        spread = blocks.spread(curvature)
        self._unit = w / blocks.spread(norms)
        if len(w) == 1 and self._single(gram, curvature):
            return
        upper = gram.clone()
        upper.diagonal().add_(spread)
        factor, failed = torch.linalg.cholesky_ex(upper)
        for lift in _LIFTS:
            if not bool(failed):
                break
            upper.diagonal().mul_(1 + lift)
            factor, failed = torch.linalg.cholesky_ex(upper)
        self._factor = None if len(w) > 1 else factor
        if len(w) == 1:
            return
        self._inverse = torch.cholesky_inverse(factor)
        coupled = self._inverse * (self._unit.T @ self._unit)
        if not blocks.alone:
            coupled = blocks.sums(blocks.sums(coupled).T)
        matrix = coupled.neg_()
        matrix.diagonal().add_(1 / ((1 - _LIFT) * curvature))
        factor, failed = torch.linalg.cholesky_ex(matrix)
        self._more = None if bool(failed) else factor

    def _single(self, gram: Tensor, curvature: Tensor) -> bool:
        """Factorise the matrix for one target itself. Whether that succeeds."""
        unit, blocks = self._unit[0], self._blocks
        matrix = gram.clone()
        if blocks.alone:
            matrix.diagonal().add_(curvature * (1 - (1 - _LIFT) * unit.square()))
        else:
            spread = blocks.spread(curvature)
            matrix.diagonal().add_(spread)
            row, column = blocks.pairs
            matrix[row, column] -= (1 - _LIFT) * spread[row] * unit[row] * unit[column]
        self._factor, failed = torch.linalg.cholesky_ex(matrix)
        return not bool(failed)

    def solve(self, error: Tensor) -> Tensor:
        """H⁻¹ times an error (targets, k). Where H is singular, the step of an upper bound of the objective."""
        if self._factor is not None:
            return torch.cholesky_solve(error.T, self._factor).T
        step = error @ self._inverse
        if self._more is None:
            return step
        along = self._blocks.sums((self._unit * step).sum(0))
        more = torch.cholesky_solve(along.unsqueeze(1), self._more).squeeze(1)
        return step + (self._unit * self._blocks.spread(more)) @ self._inverse

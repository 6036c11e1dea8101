"""A group lasso whose weights follow the groups' norms, so that strong groups are hardly shrunk."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from torchreg.cuts import Cut
from torchreg.penalties import GroupLasso


@dataclasses.dataclass(frozen=True, eq=False)
class _ReweightedColumns(GroupLasso):
    """``λ Σ_j c_j ‖w_j‖`` over the columns j, with ``c_j = (mean ‖w‖ / ‖w_j‖)^power`` of the weight at hand.

    The mean is that of the columns that are not zero. At ``power=1`` it is the reweighting of the log-sum penalty, of
    which one step follows another without waiting for the solution in between; at 0 it is `GroupLasso`. A zero column
    stays zero in all proximal operators that find it so.

    Source: Candès, Wakin and Boyd, Enhancing sparsity by reweighted l1 minimization, Journal of Fourier Analysis and
    Applications, 2008.
    """

    groups: str = "columns"
    group_weight: str = "none"
    power: float = 1.0

    def _weights(self, cut: Cut, x: Tensor) -> float | Tensor:
        if self.power == 0:
            return 1.0
        norms = cut.norms(cut.arranged(x))
        alive = norms != 0
        mean = norms.sum() / alive.sum().clamp(min=1)
        return torch.where(alive, mean / torch.where(alive, norms, 1), 1).pow(self.power)


def reweighted_columns(power: float) -> GroupLasso:
    """The penalty of strength 1."""
    return _ReweightedColumns(1.0, power=power)

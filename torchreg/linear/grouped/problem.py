"""Least squares of several targets with a penalty of group norms, and the duality gap that certifies a solution."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from torchreg.linear.grouped.blocks import Blocks
from torchreg.linear.lasso.problem import Fit, Problem, Strength, duality_gaps


@dataclass(frozen=True)
class BlockProblem(Problem):
    """½/n·‖Y − WZᵀ‖² + l1·Σ_g v_g‖W_g‖ + ½·l2·‖W‖² for given Z, Y and groups g of Z's columns, with all their targets.

    `target` is Y, of shape (targets, n), and coefficients W are of shape (targets, features).
    """

    blocks: Blocks = field(kw_only=True)

    @cached_property
    def power(self) -> float:
        """‖Y‖²/n: twice the objective at zero."""
        return float(self.target.square().sum()) / max(1, self.design.samples)

    @cached_property
    def moment(self) -> Tensor:
        """YZ/n, of shape (targets, features)."""
        return self.design.correlations(self.target)

    @cached_property
    def largest(self) -> float:
        """The largest ‖(YZ/n)_g‖/v_g: from l1 = this on, W = 0 is the solution."""
        return float(self.forces(self.moment).max()) if self.moment.numel() else 0.0

    def forces(self, pull: Tensor) -> Tensor:
        """How strongly each group is pulled, over its weight: (targets, features) -> (groups,)."""
        return self.blocks.norms(pull) / self.blocks.weights

    def gap(self, energy: float, agreement: float, pull: Tensor, w: Tensor, strength: Strength) -> float:
        """The duality gap of W, that of the lasso with groups' norms over their weights in place of moduli.

        Args:
            energy: ‖R‖²/n for the residual R = Y − WZᵀ.
            agreement: ⟨R, Y⟩/n.
            pull: RZ/n, (targets, features).
            w: W, (targets, features).
            strength: the penalty's, with l1 above 0.
        """
        fit = Fit(
            w.new_tensor([energy]),
            w.new_tensor([agreement]),
            (self.blocks.norms(w) @ self.blocks.weights).unsqueeze(0),
            w.square().sum().unsqueeze(0),
            pull.reshape(1, -1),
        )
        active = self.forces(pull - strength.l2 * w).unsqueeze(0)
        return duality_gaps(fit, active, [strength], self.design.samples, False)[0]

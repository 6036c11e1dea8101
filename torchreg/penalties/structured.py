"""Penalties that make whole groups of weights zero: group lasso, and sparse group lasso."""

from __future__ import annotations

import dataclasses

from torchreg.groups import Groups
from torchreg.penalties.base import Strength, strength_field
from torchreg.penalties.grouped import Grouped


@dataclasses.dataclass(frozen=True, eq=False)
class GroupLasso(Grouped):
    """The group lasso: groups of weights are zero together or not at all.

    R(w) = λ Σ_g c_g ‖w_g‖₂,  prox(w)_g = max(1 − step·λ·c_g/‖w_g‖₂, 0)·w_g,

    with c_g = √(size of g), so that groups of all sizes are treated alike, or 1. With one step τ for each weight (a
    diagonal metric, such as Adam's), prox(w)_i = w_i·ρ/(ρ + τ_i·λ·c_g), where ρ, the norm of what is left of the group,
    solves Σ (w_i/(ρ + τ_i·λ·c_g))² = 1, or is 0 if Σ (w_i/τ_i)² ≤ (λ·c_g)²; see `torchreg.penalties.secular`.

    Args:
        strength: λ ≥ 0, in units of the objective: a float or 0-d tensor.
        groups: how each weight is cut: a name such as "rows" or "out_channels" (see `torchreg.groups.NAMES`), or a
            value of `torchreg.groups`.
        group_weight: "sqrt" for c_g = √size, "none" for c_g = 1.

    The `optimality_residual` is the least-norm element of ∇f + ∂R, weight by weight: in a zero group what
    of the gradient is beyond λ·c_g, spread in proportion to it. A NaN makes its group NaN; a group with an infinite
    weight stays as it is. Complex weights count by their modulus.

    Raises:
        ValueError: if the strength is negative, NaN or infinite, or more than one number, or the name or weight of the
            groups is unknown; for a weight that the groups don't fit.
        TypeError: if the strength is not a real number or a floating tensor, or the groups are none.

    >>> import torch
    >>> from torchreg import GroupLasso
    >>> w = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    >>> GroupLasso(1.0, "rows", group_weight="none").prox(w)
    tensor([[2.4000, 3.2000],
            [0.0000, 0.0000]])
    >>> GroupLasso(1.0, "columns").strength_max(w)  # ‖w_g‖/√2
    tensor(2.8425)

    Source: Yuan and Lin, Model selection and estimation in regression with grouped variables, JRSS B, 2006; for
    networks, Wen, Wu, Wang, Chen and Li, Learning structured sparsity in deep neural networks, NeurIPS 2016.
    """

    strength: Strength = strength_field()
    groups: Groups | str = "rows"
    group_weight: str = "sqrt"

    def parts(self) -> tuple[Strength, Strength, Strength]:  # noqa: D102
        return 0.0, self.strength, 0.0

    def _unit(self) -> GroupLasso:
        return dataclasses.replace(self, strength=1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class SparseGroupLasso(Grouped):
    """Group lasso and lasso together: few groups, and few weights in each; on request with a ridge penalty.

    R(w) = l1 Σ|w| + λ Σ_g c_g ‖w_g‖₂ + l2 Σw².  prox(w) soft-thresholds w by step·l1, divides it by 1 + 2·step·l2, and
    shrinks the groups that are left as `GroupLasso` does with the step/(1 + 2·step·l2): so too in a diagonal metric.

    Args:
        l1: strength of Σ|w|: a float or 0-d tensor.
        group_strength: λ, the strength of the groups' norms, likewise.
        groups: how each weight is cut; see `GroupLasso`.
        group_weight: "sqrt" for c_g = √size, "none" for c_g = 1.
        l2: strength of Σw², likewise a float or 0-d tensor.

    ``strength_max`` is the factor c with which c·l1 and c·λ together make all weights zero, as for tensor-valued
    strengths. The `optimality_residual` is that of `GroupLasso`, as are NaN, infinite and complex weights.

    Raises:
        ValueError: if a strength is negative, NaN or infinite, or more than one number, or the name or weight of the
            groups is unknown; for a weight that the groups don't fit.
        TypeError: if a strength is not a real number or a floating tensor, or the groups are none.

    >>> import torch
    >>> from torchreg import SparseGroupLasso
    >>> w = torch.tensor([[3.0, 4.0, 0.5], [0.3, 1.4, 0.4]])
    >>> SparseGroupLasso(l1=1.0, group_strength=1.0, groups="rows", group_weight="none").prox(w)
    tensor([[1.4453, 2.1679, 0.0000],
            [0.0000, 0.0000, 0.0000]])

    Source: Simon, Friedman, Hastie and Tibshirani, A sparse-group lasso, JCGS, 2013.
    """

    l1: Strength = strength_field()
    group_strength: Strength = strength_field()
    groups: Groups | str = "rows"
    group_weight: str = "sqrt"
    l2: Strength = strength_field(0.0)

    def parts(self) -> tuple[Strength, Strength, Strength]:  # noqa: D102
        return self.l1, self.group_strength, self.l2

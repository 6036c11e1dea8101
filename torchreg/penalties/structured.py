"""Penalties that make whole groups of weights zero: group lasso, and sparse group lasso."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from torchreg.cuts import Cut
from torchreg.groups import Groups, as_groups
from torchreg.penalties import secular
from torchreg.penalties.base import (
    Penalty,
    Step,
    Strength,
    arithmetic,
    checked_step,
    checked_weight,
    host_scalar,
    like,
    representable,
    strength_field,
)
from torchreg.penalties.separable import _is_zero, _sum_of_moduli, _sum_of_squares, soft_threshold

G = TypeVar("G", bound="_Grouped")

_WEIGHTS = ("sqrt", "none")


@dataclass
class _Ready:
    """A weight in computing precision, cut into groups, with strengths ready to compute with it.

    ``group`` is λ times the weights of the groups: a number, or a vector with one for each.
    """

    x: Tensor
    cut: Cut
    l1: Strength
    group: Strength
    l2: Strength


class _Grouped(Penalty):
    """``R(w) = l1 Σ|w| + λ Σ_g c_g ‖w_g‖₂ + l2 Σ|w|²``: all mathematics of the penalties here."""

    groups: Groups | str
    group_weight: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strengths()
        object.__setattr__(self, "groups", as_groups(self.groups))
        if self.group_weight not in _WEIGHTS:
            raise ValueError(f"Expected `group_weight` to be 'sqrt' or 'none', got {self.group_weight!r}.")

    def parts(self) -> tuple[Strength, Strength, Strength]:
        """The strengths (l1, λ, l2)."""
        raise NotImplementedError(f"{self.type_name} must define parts()")

    @property
    def is_grouped(self) -> bool:
        return True

    def to(self: G, device: torch.device | str) -> G:
        """The same penalty with the tensors of its groups on ``device``."""
        new = super().to(device)
        object.__setattr__(new, "groups", self._groups.to(device))
        return new

    def check_shape(self, shape: torch.Size) -> None:
        """Raise ``ValueError`` unless the groups fit a weight of this shape, and every strength is one number."""
        self._check_strengths()  # `scaled` may have multiplied by any tensor
        self._groups.of(shape)

    def value(self, w: Tensor) -> Tensor:
        r = self._prepared(w)
        total = torch.zeros((), dtype=r.x.real.dtype, device=w.device)
        if not _is_zero(r.group):
            total = total + (r.group * r.cut.norms(r.cut.arranged(r.x))).sum()
        if not _is_zero(r.l1):
            total = total + r.l1 * _sum_of_moduli(r.x)
        if not _is_zero(r.l2):
            total = total + r.l2 * _sum_of_squares(r.x)
        return total

    def grad(self, w: Tensor) -> Tensor:
        r = self._prepared(w)
        y = r.cut.arranged(r.x)
        norms = r.cut.norms(y)
        pull = torch.where(norms == 0, 0, r.group / torch.where(norms == 0, 1, norms))
        if not _is_zero(r.l2):
            pull = pull + 2 * r.l2
        result = _times(y, r.cut.spread(pull)).reshape(w.shape)
        if not _is_zero(r.l1):
            result = result + torch.sgn(r.x) * r.l1
        return result.to(w.dtype)

    def prox(self, w: Tensor, step: Step = 1.0) -> Tensor:
        r = self._prepared(w)
        step = checked_step(step, r.x)
        if _is_zero(step) or all(map(_is_zero, (r.l1, r.group, r.l2))) or w.numel() == 0:
            return w.clone()
        return self._shrunk(r, step).to(w.dtype) + 0 if r.x is not w else self._shrunk(r, step)

    @torch.no_grad()
    def prox_(self, w: Tensor, step: Step = 1.0) -> Tensor:
        r = self._prepared(w)
        step = checked_step(step, r.x)
        alone = _is_zero(r.l1) and not _is_zero(r.group) and (not isinstance(step, Tensor) or step.ndim == 0)
        if r.x is not w or w.is_complex() or not alone or w.numel() == 0 or _is_zero(step):
            return w.copy_(self.prox(w, step))
        y = r.cut.arranged(w)
        y.mul_(r.cut.spread(self._ratios(r, y, step))).add_(0)
        return w

    def optimality_residual(self, w: Tensor, grad: Tensor) -> Tensor:
        """The moduli of the least-norm element of ∇f + ∂R, which is one vector for each group."""
        r = self._prepared(w)
        g = arithmetic(checked_weight(grad))
        if w.numel() == 0:
            return torch.zeros_like(g.real)
        left = soft_threshold(g, r.l1)
        y = r.cut.arranged(left)
        norms = r.cut.norms(y)
        ratio = torch.where(norms == 0, 0, (norms - r.group).clamp_min(0) / torch.where(norms == 0, 1, norms))
        of_zero_groups = _times(y, r.cut.spread(ratio))
        others = torch.where(r.x == 0, left, g + self.grad(r.x))
        is_zero = r.cut.spread(r.cut.norms(r.cut.arranged(r.x)) == 0)
        return torch.where(is_zero, of_zero_groups, r.cut.arranged(others)).reshape(w.shape).abs()

    def threshold(self, step: float | Tensor) -> float | Tensor:
        """The modulus such that a group none of whose weights has a larger one becomes zero.

        With ``group_weight="none"`` it is the norm of a group that does, as long as there is no l1.
        """
        l1, group, _ = (host_scalar(part) for part in self.parts())
        given = [value.device for value in (step, l1, group) if isinstance(value, Tensor)]
        step, l1, group = (v.to(given[0]) if isinstance(v, Tensor) else v for v in (step, l1, group))
        return step * (l1 + group)

    def _check_strengths(self) -> None:
        for name, strength in self.strengths().items():
            if isinstance(strength, Tensor) and strength.ndim:
                raise ValueError(
                    f"Expected `{name}` of {self.type_name} to be one number for all groups (a float or 0-d tensor), "
                    f"got a tensor of shape {tuple(strength.shape)}."
                )

    @property
    def _groups(self) -> Groups:
        assert isinstance(self.groups, Groups)
        return self.groups

    def _prepared(self, w: Tensor) -> _Ready:
        x = arithmetic(checked_weight(w))
        self._check_strengths()
        cut = self._groups.of(x.shape)
        l1, group, l2 = (like(part, x) for part in self.parts())
        return _Ready(x, cut, l1, group * self._weights(cut, x), l2)

    def _weights(self, cut: Cut, x: Tensor) -> float | Tensor:
        """c for all groups, or for each."""
        if self.group_weight == "none":
            return 1.0
        if isinstance(cut.sizes, Tensor):
            return cut.sizes.to(x.device, x.real.dtype).sqrt()
        return math.sqrt(cut.sizes)

    def _shrunk(self, r: _Ready, step: Step) -> Tensor:
        """The proximal operator: soft-threshold, divide, then shrink the groups, in this order for any diagonal metric.

        What soft-thresholding takes away stays a subgradient of τ·l1·|·| when a weight is shrunk further, or to zero.
        """
        if isinstance(step, Tensor) and step.numel() == 1:
            step = step.reshape(())
        y = r.x if _is_zero(r.l1) else soft_threshold(r.x, r.l1 * step)
        y = r.cut.arranged(y)
        if not isinstance(step, Tensor) or step.ndim == 0:
            ratio = r.cut.spread(self._ratios(r, y, step))
        else:
            group = r.cut.spread(r.group) if isinstance(r.group, Tensor) and r.group.ndim else r.group
            tau = r.cut.arranged(step.expand(r.x.shape))
            if _is_zero(r.l2):
                ratio = secular.ratios(r.cut, y.abs(), tau * group)
            else:
                divisor = 1 + 2 * r.l2 * tau
                ratio = secular.ratios(r.cut, y.abs() / divisor, tau * group / divisor) / divisor
        return _times(y, ratio).reshape(r.x.shape)

    def _ratios(self, r: _Ready, y: Tensor, step: Step) -> Tensor:
        """What each group of the soft-thresholded weight is multiplied by, with one step for all."""
        left = _left(r.cut.norms(y), r.group * step)
        return left if _is_zero(r.l2) else left / (1 + 2 * r.l2 * step)


@dataclasses.dataclass(frozen=True, eq=False)
class GroupLasso(_Grouped):
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

    def strength_max(self, grad: Tensor) -> Tensor:
        """max_g ‖grad_g‖₂/c_g."""
        r = self._prepared(grad)
        if grad.numel() == 0:
            return r.x.real.new_zeros(())
        return (r.cut.norms(r.cut.arranged(r.x)) / self._weights(r.cut, r.x)).max()


@dataclasses.dataclass(frozen=True, eq=False)
class SparseGroupLasso(_Grouped):
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

    @torch.no_grad()
    def strength_max(self, grad: Tensor) -> Tensor:
        """The factor c from which on c·l1 and c·group_strength together make w = 0 optimal; infinite if both are 0."""
        r = self._prepared(grad)
        if grad.numel() == 0:
            return r.x.real.new_zeros(())
        m = r.cut.arranged(r.x.abs())
        l1, group = torch.as_tensor(r.l1).to(m), torch.as_tensor(r.group).to(m)
        norms = r.cut.norms(m)
        alone = torch.where(norms == 0, 0.0, math.inf).to(m)
        high = torch.where(group > 0, norms / torch.where(group > 0, group, 1), alone)  # either part alone is enough
        if l1 > 0:
            high = torch.minimum(high, r.cut.maxima(m) / l1)
        low = torch.zeros_like(high)
        for _ in range(64 if bool(l1 > 0) else 0):  # ‖soft(grad, c·l1)‖ falls, and c·λ rises
            middle = (low + high) / 2
            beyond = r.cut.norms((m - r.cut.spread(middle * l1)).clamp_min(0)) > middle * group
            low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
        return torch.where(torch.isnan(norms), norms, high).max()


def _left(norms: Tensor, threshold: float | Tensor) -> Tensor:
    """1 − threshold/norm, and 0 where that is not positive; 1 where the norm is infinite, or both are 0."""
    threshold = representable(threshold, norms)
    zero = (norms <= threshold) & (threshold > 0)
    left = (norms - threshold) / torch.where(norms == 0, 1, norms)
    return torch.where(zero, 0, torch.where(torch.isinf(norms) | ((norms == 0) & ~zero), 1, left))


def _times(y: Tensor, ratio: Tensor) -> Tensor:
    """``y·ratio`` with +0.0 for zero; the parts of complex numbers each by itself, since inf·(1 + 0i) has NaN in it."""
    if not y.is_complex():
        return (y * ratio).add_(0)
    return torch.complex(y.real * ratio + 0, y.imag * ratio + 0)

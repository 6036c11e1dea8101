"""The mathematics of penalties that make whole groups of weights zero, in one tensor or shared by several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from torchreg.cuts import Cut
from torchreg.groups import Groups, Shared, as_groups
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
    paired,
    representable,
)
from torchreg.penalties.grouping import TakesGroups
from torchreg.penalties.separable import _is_zero, _sum_of_moduli, _sum_of_squares, soft_threshold

G = TypeVar("G", bound="Grouped")

_WEIGHTS = ("sqrt", "none")


@dataclasses.dataclass
class Ready:
    """A weight in computing precision, cut into groups, with strengths ready to compute with it.

    ``group`` is λ times the weights of the groups: a number, or a vector with one for each.
    """

    x: Tensor
    cut: Cut
    l1: Strength
    group: Strength
    l2: Strength

    def gathered(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors such as those that ``x`` is made of as one."""
        return self.cut.gathered(tensors)

    def parted(self, x: Tensor) -> list[Tensor]:
        """The other way round."""
        return self.cut.parted(x)


class Grouped(TakesGroups, abstract=True):
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

    def check_shape(self, shape: torch.Size) -> None:
        """Raise ``ValueError`` unless the groups fit a weight of this shape, and every strength is one number."""
        self._check_strengths()  # `scaled` may have multiplied by any tensor
        if not self.is_joint:
            self._groups.of(shape)

    def of_rows(self: G) -> G:
        """The same penalty on the rows of a matrix."""
        return self._with_groups(as_groups("rows"))

    def run(self, w: Tensor) -> int | None:
        """The size of the groups if each is a run of neighbours in the memory of the dense weight, else None."""
        return None if self.is_joint else self._groups.of(w.shape).run(w)

    def value(self, w: Tensor) -> Tensor:
        return self._value(self._prepared([w]))

    def value_all(self, weights: Sequence[Tensor]) -> Tensor:
        return self._value(self._prepared(weights)) if self.is_joint else super().value_all(weights)

    def grad(self, w: Tensor) -> Tensor:
        return self.grad_all([w])[0]

    def grad_all(self, weights: Sequence[Tensor]) -> list[Tensor]:
        if not self.is_joint and len(weights) != 1:
            return super().grad_all(weights)
        r = self._prepared(weights)
        return _like_each(r.parted(self._grad(r)), weights)

    def prox(self, w: Tensor, step: Step = 1.0) -> Tensor:
        if self.is_joint:
            moved = w.clone()
            self.prox_all_([moved], [step])
            return moved
        r = self._prepared([w])
        step = checked_step(step, r.x)
        if _is_zero(step) or all(map(_is_zero, (r.l1, r.group, r.l2))) or w.numel() == 0:
            return w.clone()
        return self._shrunk(r, step).to(w.dtype) + 0 if r.x is not w else self._shrunk(r, step)

    @torch.no_grad()
    def prox_(self, w: Tensor, step: Step = 1.0) -> Tensor:
        if self.is_joint:
            self.prox_all_([w], [step])
            return w
        r = self._prepared([w])
        step = checked_step(step, r.x)
        alone = _is_zero(r.l1) and not _is_zero(r.group) and (not isinstance(step, Tensor) or step.ndim == 0)
        if r.x is not w or w.is_complex() or not alone or w.numel() == 0 or _is_zero(step):
            return w.copy_(self.prox(w, step))
        y = r.cut.arranged(w)
        y.mul_(r.cut.spread(self._ratios(r, y, step))).add_(0)
        return w

    @torch.no_grad()
    def prox_all_(self, weights: Sequence[Tensor], steps: Sequence[Step]) -> None:
        if not self.is_joint:
            return super().prox_all_(weights, steps)
        pairs = paired(weights, steps)
        r = self._prepared(weights)
        step = _one_step([checked_step(step, w) for w, step in pairs])
        if step is None:
            real = r.x.real
            tensors = [torch.as_tensor(step, dtype=real.dtype, device=real.device) for _, step in pairs]
            step = r.gathered([t.expand(w.shape) for t, w in zip(tensors, weights, strict=True)])
        if _is_zero(step) or r.x.numel() == 0:
            return None
        for w, new in zip(weights, _like_each(r.parted(self._shrunk(r, step)), weights), strict=True):
            w.copy_(new)
        return None

    def optimality_residual(self, w: Tensor, grad: Tensor) -> Tensor:
        """The moduli of the least-norm element of ∇f + ∂R, which is one vector for each group."""
        return self.residual_all([w], [grad])[0]

    def residual_all(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        if not self.is_joint and len(weights) != 1:
            return super().residual_all(weights, grads)
        r = self._prepared(weights)
        return r.parted(self._residual(r, r.gathered([arithmetic(checked_weight(grad)) for grad in grads])))

    @torch.no_grad()
    def strength_max(self, grad: Tensor) -> Tensor:
        return self.strengths_max([grad])[0]

    @torch.no_grad()
    def strengths_max(self, grads: Sequence[Tensor]) -> list[Tensor]:
        if not self.is_joint and len(grads) != 1:
            return super().strengths_max(grads)
        r = self._unit()._prepared(grads)
        factors = self._factors(r) if r.x.numel() else r.x.real.new_zeros(1)
        if r.cut.loose and _is_zero(r.l1):
            factors = factors[:-1]  # no strength makes them zero
        return [factors.max() if factors.numel() else r.x.real.new_zeros(())]

    @torch.no_grad()
    def zeroing_scales(self, weights: Sequence[Tensor], steps: Sequence[Step]) -> list[Tensor]:
        """For every weight of those given together the factor of the steps from which on `prox` makes it zero.

        That is where its group is, or l1 alone zeroes it; NaN if at none.
        """
        if not self.is_joint and len(weights) != 1:
            return [self.zeroing_scales([w], [step])[0] for w, step in paired(weights, steps)]
        r = self._over_steps(weights, steps)
        return r.parted(self.zeroing(r))

    def zeroing(self, r: Ready) -> Tensor:
        """As `zeroing_scales`, given the weights divided by their steps."""
        factors = r.cut.spread(self._factors(r))
        y = r.cut.arranged(r.x).abs()
        if not _is_zero(r.l1):
            factors = torch.minimum(factors, y / r.l1)
        return torch.where(factors.isinf(), math.nan, factors).expand(y.shape).reshape(r.x.shape)

    @torch.no_grad()
    def group_scales(self, weights: Sequence[Tensor], steps: Sequence[Step]) -> Tensor:
        """For every group of tensors given together the factor of the steps from which it is zero; NaN if at none."""
        if not self.is_joint and len(weights) != 1:
            each = [self.group_scales([w], [step]) for w, step in paired(weights, steps)]
            return torch.cat([scales.to(each[0]) for scales in each])
        r = self._over_steps(weights, steps)
        return self.group_zeroing(r)

    def group_zeroing(self, r: Ready) -> Tensor:
        """As `group_scales`, given the weights divided by their steps."""
        factors = self._factors(r)[: r.cut.count - r.cut.loose]
        return torch.where(factors.isinf(), math.nan, factors)

    def alive_groups(self, weights: Sequence[Tensor]) -> Tensor:
        """For every group of tensors given together whether one of its weights is not zero: a bool vector."""
        if not self.is_joint and len(weights) != 1:
            each = [self.alive_groups([w]) for w in weights]
            return torch.cat([alive.to(each[0].device) for alive in each])
        tensors = [checked_weight(w) for w in weights]
        return self._cut(tensors).alive(tensors)

    def count_groups(self, shapes: Sequence[torch.Size]) -> int:
        """How many groups tensors given together have."""
        if isinstance(self.groups, Shared):
            return self.groups.total
        return sum(self._groups.count(shape) for shape in shapes)

    def largest_group(self, shapes: Sequence[torch.Size]) -> int:
        """How many weights of tensors given together become zero at once, at most."""
        cuts = [self.groups.of_all(shapes)] if isinstance(self.groups, Shared) else map(self._groups.of, shapes)
        sizes = [cut.sizes for cut in cuts]
        return max(int(size.max()) if isinstance(size, Tensor) and size.numel() else int(size) for size in sizes)

    def _over_steps(self, weights: Sequence[Tensor], steps: Sequence[Step]) -> Ready:
        """w/τ, which is zero where w is."""
        r = self._prepared(weights)
        return dataclasses.replace(r, x=r.gathered([over_step(w, step) for w, step in paired(weights, steps)]))

    def _value(self, r: Ready) -> Tensor:
        total = torch.zeros((), dtype=r.x.real.dtype, device=r.x.device)
        if not _is_zero(r.group):
            total = total + (r.group * r.cut.norms(r.cut.arranged(r.x))).sum()
        if not _is_zero(r.l1):
            total = total + r.l1 * _sum_of_moduli(r.x)
        if not _is_zero(r.l2):
            total = total + r.l2 * _sum_of_squares(r.x)
        return total

    def _grad(self, r: Ready, norms: Tensor | None = None) -> Tensor:
        y = r.cut.arranged(r.x)
        norms = r.cut.norms(y) if norms is None else norms
        pull = torch.where(norms == 0, 0, r.group / torch.where(norms == 0, 1, norms))
        if not _is_zero(r.l2):
            pull = pull + 2 * r.l2
        result = _times(y, r.cut.spread(pull)).reshape(r.x.shape)
        return result if _is_zero(r.l1) else result + torch.sgn(r.x) * r.l1

    def _residual(self, r: Ready, g: Tensor) -> Tensor:
        if r.x.numel() == 0 and not r.cut.spans:
            return torch.zeros_like(g.real)
        left = soft_threshold(g, r.l1)
        y = r.cut.arranged(left)
        norms = r.cut.norms(y)
        ratio = torch.where(norms == 0, 0, (norms - r.group).clamp_min(0) / torch.where(norms == 0, 1, norms))
        of_zero_groups = _times(y, r.cut.spread(ratio))
        others = torch.where(r.x == 0, left, g + self._grad(r))
        is_zero = r.cut.spread(r.cut.norms(r.cut.arranged(r.x)) == 0)
        return torch.where(is_zero, of_zero_groups, r.cut.arranged(others)).reshape(r.x.shape).abs()

    def _factors(self, r: Ready) -> Tensor:
        """For every group the factor of l1 and λ from which on 0 is optimal where the gradient is r.x."""
        m = r.cut.arranged(r.x.abs())
        group, norms = torch.as_tensor(r.group, dtype=m.dtype, device=m.device), r.cut.norms(m)
        alone = torch.where(norms == 0, 0.0, math.inf).to(m)
        high = torch.where(group > 0, norms / torch.where(group > 0, group, 1), alone)  # either part alone is enough
        if not _is_zero(r.l1):
            l1 = torch.as_tensor(r.l1, dtype=m.dtype, device=m.device)
            high = torch.minimum(high, torch.where(l1 > 0, r.cut.maxima(m) / torch.where(l1 > 0, l1, 1), alone))
            low = torch.zeros_like(high)
            for _ in range(64):  # ‖soft(grad, c·l1)‖ falls, and c·λ rises
                middle = (low + high) / 2
                beyond = r.cut.norms((m - r.cut.spread(middle * l1)).clamp_min(0)) > middle * group
                low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
        return torch.where(torch.isnan(norms), norms, high)

    def _unit(self: G) -> G:
        """The penalty whose factors `strength_max` gives."""
        return self

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

    def _prepared(self, weights: Sequence[Tensor]) -> Ready:
        """The weight, or those that share the groups, one after the other."""
        tensors = [arithmetic(checked_weight(w)) for w in weights]
        cut = self._cut(tensors)
        return self.ready(cut.gathered(tensors), cut)

    def _cut(self, weights: Sequence[Tensor]) -> Cut:
        if isinstance(self.groups, Shared):
            return self.groups.of_all([w.shape for w in weights], weights[0].device if weights else "cpu")
        (w,) = weights
        return self._groups.of(w.shape)

    def ready(self, x: Tensor, cut: Cut) -> Ready:
        """A weight in computing precision that is cut in this way, with the strengths that it needs."""
        self._check_strengths()
        l1, group, l2 = (like(part, x) for part in self.parts())
        return Ready(x, cut, l1, group * self._weights(cut, x), l2)

    def _weights(self, cut: Cut, x: Tensor) -> float | Tensor:
        """c for all groups, or for each."""
        if self.group_weight == "none":
            return (cut.sizes > 0).to(x.real) if cut.loose and isinstance(cut.sizes, Tensor) else 1.0
        if isinstance(cut.sizes, Tensor):
            return cut.sizes.to(x.device, x.real.dtype).sqrt()
        return math.sqrt(cut.sizes)

    def _shrunk(self, r: Ready, step: Step) -> Tensor:
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

    def _ratios(self, r: Ready, y: Tensor, step: Step) -> Tensor:
        """What each group of the soft-thresholded weight is multiplied by, with one step for all."""
        left = remaining(r.cut.norms(y), r.group * step)
        return left if _is_zero(r.l2) else left / (1 + 2 * r.l2 * step)


def is_group_shrinkage(penalty: Penalty | None) -> TypeGuard[Grouped]:
    """Whether its proximal operator is that of (sparse) group lasso, as kernels compute it: no subclass's own."""
    if not isinstance(penalty, Grouped):
        return False
    own = type(penalty)
    return all(getattr(own, name) is getattr(Grouped, name) for name in ("prox", "prox_", "_weights", "_shrunk"))


def over_step(w: Tensor, step: Step) -> Tensor:
    """w/step in computing precision, and 0 where w is, also where the step is."""
    w = arithmetic(w)
    return torch.where(w == 0, 0, w / like(step, w))


def remaining(norms: Tensor, threshold: float | Tensor) -> Tensor:
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


def _one_step(steps: Sequence[Step]) -> Step | None:
    """The step of all tensors if they have the same, else None."""
    first = steps[0] if steps else 0.0
    same = all(step is first or (isinstance(step, float) and step == first) for step in steps)
    return first if same and (not isinstance(first, Tensor) or first.ndim == 0) else None


def _like_each(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """In the types of the weights: real ones among complex ones come out of a common vector."""
    return [
        (t.real if t.is_complex() and not w.is_complex() else t).to(w.dtype)
        for t, w in zip(tensors, weights, strict=True)
    ]

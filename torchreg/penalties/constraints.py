"""Constraints, which are 0 where the weights are allowed and infinite elsewhere: what they share, and intervals."""

from __future__ import annotations

import dataclasses
import math
import numbers
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchreg.penalties.base import Penalty, Step, arithmetic, checked_step, checked_weight
from torchreg.penalties.concave import number_field


class _Constraint(Penalty):
    """``R(w) = 0`` where w is allowed, and ∞ elsewhere: no strength, no gradient; a step of 0 changes nothing."""

    has_gradient = False

    @abstractmethod
    def violated(self, w: Tensor) -> Tensor:
        """Where, or whether, w is not allowed: a mask that broadcasts to ``w``."""

    def value(self, w: Tensor) -> Tensor:
        return self.value_all([w])

    def value_all(self, weights: Sequence[Tensor]) -> Tensor:
        """0 or infinity for all weights of a rule together; NaN where one is NaN."""
        w = weights[0]
        self.check_weight(w)
        real = arithmetic(w).real.dtype
        wrong = torch.where(self.violated(w).any(), math.inf, 0.0).to(real)
        total = torch.where(torch.isnan(w).any(), math.nan, wrong)
        return sum((self.value_all([other]).to(total) for other in weights[1:]), start=total)

    def grad(self, w: Tensor) -> Tensor:
        """Zeros: the normal vector of least norm (at a w that is not allowed there is none)."""
        self.check_weight(w)
        return torch.zeros_like(w)

    def threshold(self, step: float | Tensor) -> float | Tensor:
        """0: what becomes zero does not depend on its modulus alone."""
        return 0.0

    def strength_max(self, grad: Tensor) -> Tensor:
        """0 where w = 0 is optimal for the constraint, else infinity: it has no strength."""
        zero = torch.zeros_like(grad)
        residual = self.optimality_residual(zero, grad)
        return torch.where((residual == 0).all(), 0.0, math.inf).to(residual.dtype)


class _Interval(_Constraint):
    """``low ≤ w ≤ high`` for every weight. The bounds are rounded to the weight's type."""

    is_separable = True

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """(low, high), perhaps infinite."""

    def check_weight(self, w: Tensor) -> None:
        """Raise unless ``w`` is real: complex numbers have no order."""
        super().check_weight(w)
        if w.is_complex():
            raise TypeError(f"Expected a real weight for {self.type_name}, got {w.dtype}: it has no order.")

    def violated(self, w: Tensor) -> Tensor:
        low, high = self._bounds(w)
        return (w < low) | (w > high)

    def prox(self, w: Tensor, step: Step = 1.0) -> Tensor:
        self.check_weight(w)
        step = _ready(step, w)
        if not isinstance(step, Tensor):
            return self._clamped(w) if step else w.clone()
        return torch.where(step > 0, self._clamped(w), w)

    @torch.no_grad()
    def prox_(self, w: Tensor, step: Step = 1.0) -> Tensor:
        self.check_weight(w)
        step = _ready(step, w)
        if isinstance(step, Tensor):
            return w.copy_(self.prox(w, step))
        return w.clamp_(*self._bounds(w)).add_(0) if step else w

    def optimality_residual(self, w: Tensor, grad: Tensor) -> Tensor:
        """The distance from −grad to the normal cone: what of it does not press against a bound. Infinite outside."""
        self.check_weight(w)
        g = arithmetic(checked_weight(grad))
        low, high = self._bounds(w)
        residual = torch.where(w == low, 0, g.clamp_min(0)) + torch.where(w == high, 0, (-g).clamp_min(0))
        residual = torch.where(self.violated(w), math.inf, residual)
        return torch.where(torch.isnan(w), math.nan, residual)

    def _clamped(self, w: Tensor) -> Tensor:
        return torch.clamp(w, *self._bounds(w)) + 0  # no −0.0

    def _bounds(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds in the type of ``w``, or infinite beyond its range."""
        most = torch.finfo(w.dtype).max
        low, high = (b if abs(b) <= most else math.copysign(math.inf, b) for b in self.bounds())
        return torch.full((), low, dtype=w.dtype, device=w.device), torch.full((), high, dtype=w.dtype, device=w.device)


@dataclasses.dataclass(frozen=True, eq=False)
class NonNegative(_Interval):
    """No weight is below zero.

    R(w) = 0 where all w ≥ 0, else ∞,  prox(w) = max(w, 0), whatever the (positive) step.

    It has no gradient: only a proximal optimizer can apply it.

    Raises:
        TypeError: if a weight is complex.

    >>> import torch
    >>> from torchreg import NonNegative
    >>> NonNegative().prox(torch.tensor([-1.0, 0.5]))
    tensor([0.0000, 0.5000])

    Source: Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23.
    """

    def bounds(self) -> tuple[float, float]:  # noqa: D102
        return 0.0, math.inf


@dataclasses.dataclass(frozen=True, eq=False)
class Box(_Interval):
    """Every weight is in [low, high].

    R(w) = 0 where all low ≤ w ≤ high, else ∞,  prox(w) = min(max(w, low), high), whatever the (positive) step.

    It has no gradient: only a proximal optimizer can apply it. An infinite weight is put to its bound.

    Args:
        low: a number, or −∞ for no bound.
        high: a number, or ∞.

    Raises:
        ValueError: if a bound is NaN, low is above high, or low is ∞ or high −∞.
        TypeError: if a bound is no real number, or a weight is complex.

    >>> import torch
    >>> from torchreg import Box
    >>> Box(-1, 0.5).prox(torch.tensor([-3.0, 0.25, 2.0]))
    tensor([-1.0000,  0.2500,  0.5000])

    Source: Parikh and Boyd, Proximal algorithms, Foundations and Trends in Optimization, 2014, section 6.2.4.
    """

    low: float = number_field()
    high: float = number_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("low", "high"):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"Expected `{name}` to be a number, got {value!r}.")
            object.__setattr__(self, name, float(value) + 0.0)
        if not (self.low <= self.high and self.low < math.inf and self.high > -math.inf):
            raise ValueError(f"Expected `low` ≤ `high`, got low={self.low} and high={self.high}.")

    def bounds(self) -> tuple[float, float]:  # noqa: D102
        return self.low, self.high


def _ready(step: Step, w: Tensor) -> Step:
    """The step, checked; a tensor in computing precision (a small one is not 0)."""
    return checked_step(step, arithmetic(w) if isinstance(step, Tensor) else w)

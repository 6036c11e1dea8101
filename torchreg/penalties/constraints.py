"""Constraints: penalties that are 0 where the weights are allowed and infinite elsewhere."""

from __future__ import annotations

import dataclasses
import math
import numbers
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchreg.penalties.base import Penalty, Step, arithmetic, checked_step, checked_weight, paired
from torchreg.penalties.concave import number_field

_SCOPES = ("tensor", "rule")
_MANY, _SAMPLE = 1 << 16, 1 << 12


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


@dataclasses.dataclass(frozen=True, eq=False)
class TopK(_Constraint):
    """At most k weights are not zero, in each tensor or in all tensors of a rule together.

    R(w) = 0 where #{w ≠ 0} ≤ k, else ∞,  prox(w) = w with all but its k largest moduli set to zero; of equal ones
    the first are kept. In a diagonal metric, with one step τ per weight, those with the largest |w|/√τ are kept, and
    a weight whose step is 0 is.

    It has no gradient: only a proximal optimizer can apply it. Nothing is read on the host. With
    ``scope="rule"``, `prox` and `value` of one tensor take it for the whole rule; `prox_all_` and `value_all` are given
    all tensors.

    Args:
        k: how many weights are kept; more than there are keep all.
        fraction: which fraction of them instead, rounded to a whole number of weights.
        scope: "tensor": k of each tensor; "rule": k of all tensors of a param group together.

    Raises:
        ValueError: if not exactly one of k and the fraction is given, k is negative, the fraction outside [0, 1], or
            the scope another one.
        TypeError: if k is no whole number or the fraction no number.

    >>> import torch
    >>> from torchreg import TopK
    >>> TopK(2).prox(torch.tensor([-3.0, 0.25, 2.0, 1.0]))
    tensor([-3.,  0.,  2.,  0.])

    Source: Blumensath and Davies, Iterative hard thresholding for compressed sensing, ACHA, 2009.
    """

    k: int | None = None
    fraction: float | None = None
    scope: str = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.k is None) == (self.fraction is None):
            raise ValueError(f"Expected either `k` or `fraction`, got k={self.k} and fraction={self.fraction}.")
        if self.k is not None:
            if isinstance(self.k, bool) or not isinstance(self.k, numbers.Integral):
                raise TypeError(f"Expected `k` to be a whole number (a fraction is TopK(fraction=…)), got {self.k!r}.")
            if self.k < 0:
                raise ValueError(f"Expected `k` to be 0 or more, got {self.k}.")
            object.__setattr__(self, "k", int(self.k))
        if self.fraction is not None:
            if isinstance(self.fraction, bool) or not isinstance(self.fraction, numbers.Real):
                raise TypeError(f"Expected `fraction` to be a number in [0, 1], got {self.fraction!r}.")
            if not 0 <= self.fraction <= 1:
                raise ValueError(f"Expected `fraction` to be in [0, 1], got {self.fraction}.")
            object.__setattr__(self, "fraction", float(self.fraction))
        if self.scope not in _SCOPES:
            raise ValueError(f"Expected `scope` to be 'tensor' or 'rule', got {self.scope!r}.")

    @property
    def is_joint(self) -> bool:
        """Whether the tensors of a rule are taken together."""
        return self.scope == "rule"

    def count(self, weights: int) -> int:
        """How many of so many weights are kept."""
        wanted = self.k if self.k is not None else round((self.fraction or 0.0) * weights)
        return min(wanted, weights)

    def violated(self, w: Tensor) -> Tensor:  # noqa: D102
        return torch.count_nonzero(w) > self.count(w.numel())

    def value_all(self, weights: Sequence[Tensor]) -> Tensor:  # noqa: D102
        if not self.is_joint:
            return super().value_all(weights)
        for w in weights:
            self.check_weight(w)
        return super().value_all([torch.cat([_flat(w, weights[0].device) for w in weights])])

    def prox(self, w: Tensor, step: Step = 1.0) -> Tensor:  # noqa: D102
        self.check_weight(w)
        if _is_zero(_ready(step, w)):
            return w.clone()
        (kept,) = self._kept([(w, step)])
        return torch.where(kept, w, 0)

    @torch.no_grad()
    def prox_(self, w: Tensor, step: Step = 1.0) -> Tensor:  # noqa: D102
        self._keep_only([(w, step)])
        return w

    @torch.no_grad()
    def prox_all_(self, weights: Sequence[Tensor], steps: Sequence[Step]) -> None:
        """Keep the largest weights of all tensors together, or of each, as the scope says."""
        pairs = paired(weights, steps)
        for some in [pairs] if self.is_joint else [[pair] for pair in pairs]:
            self._keep_only(some)

    def optimality_residual(self, w: Tensor, grad: Tensor) -> Tensor:
        """|grad| where w ≠ 0; elsewhere 0 if k weights are not zero, and |grad| if more may be. Infinite beyond k.

        That is the distance from −grad to the regular normal cone.
        """
        return self.residual_all([w], [grad])[0]

    def residual_all(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:  # noqa: D102
        if not self.is_joint and len(weights) != 1:
            return super().residual_all(weights, grads)
        for w, g in zip(weights, grads, strict=True):
            self.check_weight(w)
            checked_weight(g)
        k = self.count(sum(w.numel() for w in weights))
        used = sum(torch.count_nonzero(w).to(weights[0].device) for w in weights)
        return [_residual(w, g, torch.as_tensor(used, device=w.device), k) for w, g in zip(weights, grads, strict=True)]

    def _keep_only(self, pairs: Sequence[tuple[Tensor, Step]]) -> None:
        for w, _ in pairs:
            self.check_weight(w)
        if all(_is_zero(_ready(step, w)) for w, step in pairs):
            return
        for (w, _), kept in zip(pairs, self._kept(pairs), strict=True):
            w.masked_fill_(~kept, 0)

    def _kept(self, pairs: Sequence[tuple[Tensor, Step]]) -> list[Tensor]:
        """For every weight of these tensors, whether it is kept."""
        steps = [_ready(step, w) for w, step in pairs]
        alike = all(not isinstance(step, Tensor) and step == steps[0] for step in steps)
        moduli = [arithmetic(w.detach()).abs() for w, _ in pairs]
        scores = moduli if alike else [_score(m, step) for m, step in zip(moduli, steps, strict=True)]
        device = scores[0].device
        together = scores[0].flatten() if len(scores) == 1 else torch.cat([_flat(s, device) for s in scores])
        chosen = _largest(together, self.count(together.numel())).split([s.numel() for s in scores])
        kept = []
        for (w, _), step, mask in zip(pairs, steps, chosen, strict=True):
            mask = mask.to(w.device).reshape(w.shape) | torch.isnan(w)
            kept.append(mask | (step == 0) if isinstance(step, Tensor) or step == 0 else mask)
        return kept


def _ready(step: Step, w: Tensor) -> Step:
    """The step, checked; a tensor in computing precision (a small one is not 0)."""
    return checked_step(step, arithmetic(w) if isinstance(step, Tensor) else w)


def _score(m: Tensor, step: Step) -> Tensor:
    """The square root of twice what setting each weight to zero costs: |w|/√τ."""
    step = step.detach() if isinstance(step, Tensor) else torch.full((), step, dtype=m.dtype, device=m.device)
    free = torch.where(m > 0, math.inf, 0.0).to(m.dtype)
    return torch.where(step > 0, m / torch.where(step > 0, step, 1).sqrt(), free)


def _largest(scores: Tensor, k: int) -> Tensor:
    """A mask of the k largest of a flat tensor, the first of equal ones; NaN counts as infinite."""
    n = scores.numel()
    if k in (0, n):
        return torch.full_like(scores, k != 0, dtype=torch.bool)
    scores = torch.where(torch.isnan(scores), math.inf, scores)
    readable = scores.device.type == "cpu" and not torch.compiler.is_compiling()
    cutoff = _estimated_cutoff(scores, k) if readable and n >= _MANY else _cutoff(scores, k)
    above, level = scores > cutoff, scores == cutoff
    free = k - torch.count_nonzero(above)
    if readable and torch.count_nonzero(level) == free:
        return above | level
    return above | (level & (level.cumsum(0, dtype=torch.int64) <= free))


def _cutoff(scores: Tensor, k: int) -> Tensor:
    """The k-th largest, by the shorter of both ends."""
    n = scores.numel()
    if 2 * k <= n:
        return torch.topk(scores, k, sorted=False).values.amin()
    return torch.topk(scores, n - k + 1, largest=False, sorted=False).values.amax()


def _estimated_cutoff(scores: Tensor, k: int) -> Tensor:
    """The k-th largest, looked for where a sample says that it is: selecting among all is slow on a CPU."""
    n = scores.numel()
    sample = scores[:: n // _SAMPLE].sort(descending=True).values
    rank, margin = k * len(sample) // n, len(sample) // 16
    high = sample[rank - margin] if rank >= margin else math.inf
    low = sample[rank + margin] if rank + margin < len(sample) else -math.inf
    near = scores[(scores >= low) & (scores <= high)]
    among = k - int(torch.count_nonzero(scores > high))
    return _cutoff(near, among) if 1 <= among <= near.numel() else _cutoff(scores, k)


def _residual(w: Tensor, grad: Tensor, used: Tensor, k: int) -> Tensor:
    g = arithmetic(grad).abs()
    residual = torch.where((w != 0) | (used < k), g, 0)
    return torch.where(torch.isnan(w), math.nan, torch.where(used > k, math.inf, residual))


def _flat(w: Tensor, device: torch.device) -> Tensor:
    return w.flatten().to(device)


def _is_zero(step: Step) -> bool:
    return not isinstance(step, Tensor) and step == 0

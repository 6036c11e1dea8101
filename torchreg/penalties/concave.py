"""What penalties share that are a concave function of each weight's modulus."""

from __future__ import annotations

import copy
import dataclasses
import math
import numbers
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchreg.penalties import tiles
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
)

F = TypeVar("F", bound="_Folded")


class _Concave(Penalty):
    """``R(w) = c·Σ ρ(|w|)`` with a strength λ inside ρ: subclasses say what ρ is, on moduli.

    ``density``, ``slope`` and ``shrunk`` are given moduli in computing precision, and strengths and steps ready to
    compute with them. The step is c times the one of the proximal operator.
    """

    is_separable = True

    strength: Strength

    @abstractmethod
    def density(self, m: Tensor, strength: Strength) -> Tensor:
        """ρ(m)."""

    @abstractmethod
    def slope(self, m: Tensor, strength: Strength) -> Tensor:
        """ρ′(m) for m > 0, and any finite number for m = 0."""

    @abstractmethod
    def shrunk(self, m: Tensor, step: Step, strength: Strength) -> Tensor:
        """``argmin_v ½(v − m)² + step·ρ(v)`` over v ≥ 0, the smaller where there are two."""

    @abstractmethod
    def cut(self, step: Tensor, strength: Tensor) -> Tensor:
        """The largest modulus that ``shrunk`` makes zero, for 0-d tensors."""

    def zeroing_step(self, m: Tensor, strength: float) -> Tensor:
        """The smallest step from which on ``shrunk`` makes each modulus zero: the inverse of ``cut``."""
        raise NotImplementedError(f"{self.type_name} does not tell zeroing_step()")

    def step_limit(self) -> float:
        """What the step has to be below, where the host can read it."""
        return math.inf

    def slope_at_zero(self, strength: Strength) -> Strength:
        """The limit of ρ′(m) as m → 0."""
        return strength

    def multiple(self) -> Strength:
        """The factor c."""
        return 1.0

    def value(self, w: Tensor) -> Tensor:
        x, strength, multiple = self._prepared(w)
        sums = [(self.density(part.abs(), strength) * multiple).sum() for part in self._pieces(x)]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum()

    def grad(self, w: Tensor) -> Tensor:
        x, strength, multiple = self._prepared(w)

        def gradient(part: Tensor) -> Tensor:
            return torch.sgn(part) * (self.slope(part.abs(), strength) * multiple)

        if not self._is_cut_up(x):
            return gradient(x).to(w.dtype)
        result = torch.empty_like(x)
        for target, part in zip(tiles.tiles(result), tiles.tiles(x), strict=True):
            target.copy_(gradient(part))
        return result.to(w.dtype)

    def prox(self, w: Tensor, step: Step = 1.0) -> Tensor:
        x, strength, ready = self._ready(w, step)
        if _is_zero(strength) or _is_zero(ready):
            return w.clone()
        result = self._shrunk(x, ready, strength)
        return result if x is w else result.to(w.dtype) + 0  # where rounding gives −0.0, +0.0

    @torch.no_grad()
    def prox_(self, w: Tensor, step: Step = 1.0) -> Tensor:
        x, strength, ready = self._ready(w, step)
        if _is_zero(strength) or _is_zero(ready):
            return w
        if x is not w or isinstance(ready, Tensor) or not self._is_cut_up(w):
            return w.copy_(self.prox(w, step))
        for part in tiles.tiles(w):
            part.copy_(self._shrunk(part, ready, strength))
        return w

    def optimality_residual(self, w: Tensor, grad: Tensor) -> Tensor:
        x, strength, multiple = self._prepared(w)
        g = arithmetic(checked_weight(grad))
        at_zero = (g.abs() - self.slope_at_zero(strength) * multiple).clamp_min(0)
        return torch.where(x == 0, at_zero, (g + self.grad(x)).abs())

    def threshold(self, step: float | Tensor) -> float | Tensor:
        given = [host_scalar(_largest(value)) for value in (step, self.strength, self.multiple())]
        device = next((value.device for value in given if isinstance(value, Tensor)), None)
        step, strength, multiple = (
            value.to(device)
            if isinstance(value, Tensor)
            else torch.full((), value, dtype=torch.float64, device=device or "cpu")
            for value in given
        )
        cut = self.cut(step * multiple, strength)
        return float(cut) if device is None else cut

    def strength_max(self, grad: Tensor) -> Tensor:
        g, strength, multiple = self._prepared(grad)
        g = g.abs()
        unit = strength * multiple if isinstance(strength, Tensor) and strength.ndim else multiple
        if isinstance(unit, Tensor) or unit != 1:
            unit = torch.as_tensor(unit, dtype=g.dtype, device=g.device)
            g = torch.where(unit > 0, g / unit, 0)  # a zero entry leaves its weight alone: no strength empties it
        return g.max() if g.numel() else g.new_zeros(())

    def _prepared(self, w: Tensor) -> tuple[Tensor, Strength, Strength]:
        """The weight in computing precision, and λ and c ready to compute with it."""
        x = arithmetic(checked_weight(w))
        self.check_shape(w.shape)
        return x, like(self.strength, x), like(self.multiple(), x)

    def _ready(self, w: Tensor, step: Step) -> tuple[Tensor, Strength, Step]:
        """The weight in computing precision, λ, and c times the step, all checked."""
        x, strength, multiple = self._prepared(w)
        ready = checked_step(step, x)
        self.check_step(ready)
        return x, strength, ready * multiple

    def _shrunk(self, x: Tensor, step: Step, strength: Strength) -> Tensor:
        m = x.abs()
        v = self.shrunk(m, step, strength)
        if not x.is_complex():
            return v * torch.sgn(x) + 0  # no −0.0
        return torch.where(v == 0, 0, torch.where(torch.isinf(m), x, x * (v / torch.where(m == 0, 1, m))))

    def _is_cut_up(self, x: Tensor) -> bool:
        """Whether a large weight is taken in pieces that stay in the cache, without temporaries of its size."""
        if not tiles.is_tiled(x) or torch._C._are_functorch_transforms_active():
            return False
        if torch.is_grad_enabled() and x.requires_grad:
            return False
        return not any(isinstance(host_scalar(strength), Tensor) for strength in self.strengths().values())

    def _pieces(self, x: Tensor) -> Iterator[Tensor]:
        return tiles.tiles(x) if self._is_cut_up(x) else iter((x,))


class _Folded(_Concave):
    """A concave penalty that is constant for large weights, whose multiples are not of its kind: c is a field."""

    factor: Strength

    def multiple(self) -> Strength:
        return self.factor

    def scaled(self: F, factor: float | Tensor) -> F:
        """The penalty ``factor·R``: its `factor` is multiplied, and its shape stays."""
        new = copy.copy(self)
        object.__setattr__(new, "factor", self.factor * factor)
        return new

    def _check_below(self, step: float | Tensor, bound: float, field: str, needed: str) -> None:
        """Raise unless the step times c is below ``bound``; tensors of a device or of many steps are not read."""
        step, factor = host_scalar(step), host_scalar(self.factor)
        if isinstance(step, Tensor) or isinstance(factor, Tensor) or step * factor < bound:
            return
        times = "" if factor == 1 else f" times the factor {factor:g}"
        raise ValueError(
            f"{self.type_name} with {field} needs {needed}, got the step {step:g}{times}: lower the step (learning "
            "rate, momentum gain and strength scale multiply in it) or take a larger one."
        )


def piecewise(m: Tensor, step: Step, strength: Strength, intercept: Step, slope: Step) -> Tensor:
    """The smaller modulus that is left of ``m``: 0 up to step·λ, then ``m − min(step·λ, intercept − slope·m)₊``.

    Written as what is taken away, which keeps a small difference exact and what is beyond the last knot untouched.
    """
    threshold = representable(step * strength, m)
    taken = (intercept - slope * m.clamp(max=torch.finfo(m.dtype).max)).clamp_min(0)
    taken = torch.clamp(taken, max=threshold)
    return torch.where(m <= threshold, 0, m - taken)


def number_field() -> Any:
    """Declare a dataclass field that is no strength."""
    return dataclasses.field()


def checked_number(name: str, value: Any, allowed: str, above: float = 0.0) -> float:
    """Return a finite number greater than ``above`` as a float, or raise an error that names ``name``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Expected `{name}` to be {allowed}, got {value!r}.")
    number = float(value)
    if not (math.isfinite(number) and number > above):
        raise ValueError(f"Expected `{name}` to be {allowed}, got {number}.")
    return number


def _largest(strength: Strength) -> Strength:
    if not isinstance(strength, Tensor) or strength.ndim == 0:
        return strength
    return strength.max() if strength.numel() else 0.0


def _is_zero(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 0

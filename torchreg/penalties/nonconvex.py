"""Penalties that leave large weights alone: MCP, SCAD, log-sum, L1/2 and L0. They are not convex."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from torchreg.penalties.base import Step, Strength, representable, strength_field
from torchreg.penalties.concave import _Concave, _Folded, checked_number, number_field, piecewise


@dataclasses.dataclass(frozen=True, eq=False)
class MCP(_Folded):
    """The minimax concave penalty: L1 at zero, tapering off until weights from γλ on are not shrunk at all.

    R(w) = Σ ρ(|w|) with ρ(m) = λm − m²/(2γ) up to m = γλ and γλ²/2 beyond. For γ → ∞ it is L1. With τ the step,

    prox(w) = 0 up to |w| = τλ, then sign(w)·(|w| − τλ)/(1 − τ/γ) up to γλ, and w beyond (τ < γ).

    For τ ≥ γ that would be no function: a step that the host can read raises. Steps of many elements (the metric of
    an adaptive optimizer) and on a device are not read; there the global minimiser is taken, which sets to zero up to
    λ√(τγ) and leaves alone beyond.

    Args:
        strength: λ ≥ 0, the slope at zero, in units of the objective: a float, a 0-d tensor, or a tensor that
            broadcasts to the weight.
        gamma: γ > 0: how far the taper reaches, in units of λ. At most steps, 2 to 4 is usual.
        factor: multiplies R. It is there for `scaled`: c·MCP(λ, γ) is no MCP(cλ, γ), but MCP(cλ, γ/c).

    Raises:
        ValueError: if a strength is negative, NaN or infinite, γ is not positive and finite, or a step is γ or longer.
        TypeError: if a strength is not a real number or a floating tensor, or γ no real number.

    >>> import torch
    >>> from torchreg import MCP
    >>> MCP(1.0, gamma=3.0).prox(torch.tensor([-4.0, 0.5, 2.0]))
    tensor([-4.0000,  0.0000,  1.5000])

    Source: Zhang, Nearly unbiased variable selection under minimax concave penalty, Ann. Statist., 2010.
    """

    strength: Strength = strength_field()
    gamma: float = number_field()
    factor: Strength = strength_field(1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gamma", checked_number("gamma", self.gamma, "a positive number"))

    def step_limit(self) -> float:  # noqa: D102
        return self.gamma

    def check_step(self, step: float | Tensor) -> None:  # noqa: D102
        self._check_below(step, self.step_limit(), f"gamma={self.gamma:g}", "step < gamma")

    def density(self, m: Tensor, strength: Strength) -> Tensor:  # noqa: D102
        inner = torch.clamp(m, max=representable(self.gamma * strength, m))
        return inner * (strength - inner / (2 * self.gamma))

    def slope(self, m: Tensor, strength: Strength) -> Tensor:  # noqa: D102
        return (strength - m / self.gamma).clamp_min(0)

    def shrunk(self, m: Tensor, step: Step, strength: Strength) -> Tensor:  # noqa: D102
        inside = torch.where(step < self.gamma, step, 0) if isinstance(step, Tensor) else step
        tapered = piecewise(
            m, inside, strength, inside * strength / (1 - inside / self.gamma), inside / (self.gamma - inside)
        )
        if not isinstance(step, Tensor):
            return tapered
        return torch.where(step < self.gamma, tapered, _hard(m, self._cut_beyond(step, strength)))

    def cut(self, step: Tensor, strength: Tensor) -> Tensor:  # noqa: D102
        return torch.where(step < self.gamma, step * strength, self._cut_beyond(step, strength))

    def zeroing_step(self, m: Tensor, strength: float) -> Tensor:  # noqa: D102
        ratio = m / strength
        return torch.where(ratio < self.gamma, ratio, ratio * ratio / self.gamma)

    def _cut_beyond(self, step: Tensor, strength: Strength) -> Tensor:
        return step**0.5 * (self.gamma**0.5 * strength)


@dataclasses.dataclass(frozen=True, eq=False)
class SCAD(_Folded):
    """Smoothly clipped absolute deviation: L1 up to λ, tapering off until weights from aλ on are not shrunk at all.

    R(w) = Σ ρ(|w|) with ρ(0) = 0 and ρ′(m) = λ up to m = λ, (aλ − m)/(a − 1) up to aλ, and 0 beyond. For a → ∞ it is
    L1. With τ the step,

    prox(w) = sign(w)·max(|w| − τλ, 0) up to |w| = (1 + τ)λ, then sign(w)·((a − 1)|w| − aτλ)/(a − 1 − τ) up to aλ,
    and w beyond (τ < a − 1).

    For τ ≥ a − 1 that would be no function: a step that the host can read raises. Steps of many elements (the metric
    of an adaptive optimizer) and on a device are not read; there the global minimiser is taken: the soft threshold up
    to λ(a + 1 + τ)/2 for τ < a + 1, zero up to λ√(τ(a + 1)) for longer steps, and w beyond.

    Args:
        strength: λ ≥ 0, the slope at zero, in units of the objective: a float, a 0-d tensor, or a tensor that
            broadcasts to the weight.
        a: where the taper ends, in units of λ: more than 1.
        factor: multiplies R. It is there for `scaled`: c·SCAD(λ, a) is no SCAD.

    Raises:
        ValueError: if a strength is negative, NaN or infinite, a is not above 1 and finite, or a step is a − 1 or
            longer.
        TypeError: if a strength is not a real number or a floating tensor, or a no real number.

    >>> import torch
    >>> from torchreg import SCAD
    >>> SCAD(1.0, a=3.5).prox(torch.tensor([-4.0, 0.5, 1.5, 2.75]))
    tensor([-4.0000,  0.0000,  0.5000,  2.2500])

    Source: Fan and Li, Variable selection via nonconcave penalized likelihood, JASA, 2001.
    """

    strength: Strength = strength_field()
    a: float = 3.7
    factor: Strength = strength_field(1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "a", checked_number("a", self.a, "a number above 1", above=1.0))

    def step_limit(self) -> float:  # noqa: D102
        return self.a - 1

    def check_step(self, step: float | Tensor) -> None:  # noqa: D102
        self._check_below(step, self.step_limit(), f"a={self.a:g}", "step < a − 1")

    def density(self, m: Tensor, strength: Strength) -> Tensor:  # noqa: D102
        within = torch.clamp(m, max=representable(strength, m))
        beyond = torch.clamp((m - strength).clamp_min(0), max=representable((self.a - 1) * strength, m))
        return within * strength + beyond * (strength - beyond / (2 * (self.a - 1)))

    def slope(self, m: Tensor, strength: Strength) -> Tensor:  # noqa: D102
        return (strength - (m - strength).clamp_min(0) / (self.a - 1)).clamp_min(0)

    def shrunk(self, m: Tensor, step: Step, strength: Strength) -> Tensor:  # noqa: D102
        width = self.a - 1
        inside = torch.where(step < width, step, 0) if isinstance(step, Tensor) else step
        tapered = piecewise(
            m, inside, strength, inside * strength * (self.a / width) / (1 - inside / width), inside / (width - inside)
        )
        if not isinstance(step, Tensor):
            return tapered
        soft = m - torch.clamp(m, max=step * strength)
        beyond = torch.where(m <= self._switch(step, strength), soft, m)
        return torch.where(step < width, tapered, beyond)

    def cut(self, step: Tensor, strength: Tensor) -> Tensor:  # noqa: D102
        return torch.where(step < self.a + 1, step * strength, self._switch(step, strength))

    def zeroing_step(self, m: Tensor, strength: float) -> Tensor:  # noqa: D102
        ratio = m / strength
        return torch.where(ratio < self.a + 1, ratio, ratio * ratio / (self.a + 1))

    def _switch(self, step: Tensor, strength: Strength) -> Tensor:
        """From which modulus on nothing is taken away, for steps beyond a − 1."""
        far = step**0.5 * ((self.a + 1) ** 0.5 * strength)
        return torch.where(step < self.a + 1, (self.a + 1 + step) / 2 * strength, far)


@dataclasses.dataclass(frozen=True, eq=False)
class LogSum(_Concave):
    """The logarithmic penalty, which iteratively reweighted L1 minimises: the larger a weight, the less it is shrunk.

    R(w) = λε Σ log(1 + |w|/ε): its slope is λ at zero, as of L1, and λ/(1 + |w|/ε) at w. For ε → ∞ it is L1.

    prox(w) = sign(w)·½(|w| − ε + √((|w| + ε)² − 4ετλ)) with τ the step, and 0 where |w| ≤ τλ. For τλ > ε the
    objective has two local minima, and the lower one is taken.

    Args:
        strength: λ ≥ 0, the slope at zero, in units of the objective: a float, a 0-d tensor, or a tensor that
            broadcasts to the weight.
        epsilon: ε > 0: the weight at which the slope has halved.

    Raises:
        ValueError: if the strength is negative, NaN or infinite, or ε is not positive and finite.
        TypeError: if the strength is not a real number or a floating tensor, or ε no real number.

    >>> import torch
    >>> from torchreg import LogSum
    >>> LogSum(0.5, epsilon=1.0).prox(torch.tensor([-10.0, 0.5, 1.0]))
    tensor([-9.9544,  0.0000,  0.7071])

    Source: Candès, Wakin and Boyd, Enhancing sparsity by reweighted ℓ1 minimization, J. Fourier Anal. Appl., 2008;
    its proximal operator: Gong et al., A general iterative shrinkage and thresholding algorithm, ICML 2013.
    """

    strength: Strength = strength_field()
    epsilon: float = number_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "epsilon", checked_number("epsilon", self.epsilon, "a positive number"))

    def density(self, m: Tensor, strength: Strength) -> Tensor:  # noqa: D102
        return torch.log1p(m / self.epsilon) * (strength * self.epsilon)

    def slope(self, m: Tensor, strength: Strength) -> Tensor:  # noqa: D102
        return strength / (1 + m / self.epsilon)

    def shrunk(self, m: Tensor, step: Step, strength: Strength) -> Tensor:  # noqa: D102
        threshold, epsilon = representable(step * strength, m), self.epsilon
        whole = m.clamp(max=torch.finfo(m.dtype).max / 4) + epsilon  # in units of it, nothing overflows
        b, c = (m - epsilon) / whole, (m - threshold) / whole * (4 * epsilon / whole)
        square = b * b + c
        root = torch.sqrt(torch.where(square > 0, square, 1))
        v = whole * torch.where(b < 0, c / torch.where(b < 0, root - b, 1), b + root) / 2
        v = torch.where(torch.isinf(m), m, v.clamp_min(0))
        left = m - threshold / (1 + v / epsilon)  # stationary too, and exact where little is taken away
        gained = v * (v / 2 - m) + threshold * epsilon * torch.log1p(v / epsilon)
        far = (threshold > epsilon) & (square > 0) & (v > 0) & (gained < 0)
        return torch.where((m <= threshold) & ~far, 0, left)

    def cut(self, step: Tensor, strength: Tensor) -> Tensor:
        """ε(u + r/(1 + u)) with r = τλ/ε > 1 and u the root of r(log(1 + u) − u/(1 + u)) = ½u², by bisection."""
        ratio = step * strength / self.epsilon
        low, high = torch.zeros_like(ratio), 2 * ratio
        for _ in range(60):
            u = (low + high) / 2
            above = ratio * (torch.log1p(u) - u / (1 + u)) > u * u / 2
            low, high = torch.where(above, u, low), torch.where(above, high, u)
        return torch.where(ratio > 1, self.epsilon * (low + ratio / (1 + low)), step * strength)

    def zeroing_step(self, m: Tensor, strength: float) -> Tensor:
        """εr/λ with r as in `cut` where m > ε, from the root of m = ε(u + r/(1 + u)).

        The right side is concave in u with a slope from 4/3 to 1, so that Newton's method rises to the root.
        """
        whole = m.double() / self.epsilon
        u = 0.75 * (whole - 1).clamp_min(0)
        for _ in range(5):
            ratio, slope = _log_ratio(u)
            u = u + (whole - u - ratio / (1 + u)).clamp_min(0) / (1 + slope / (1 + u) - ratio / (1 + u) ** 2)
        ratio = torch.where(whole > 1, _log_ratio(u)[0], whole)
        return (ratio * (self.epsilon / strength)).to(m.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class LHalf(_Concave):
    """The L1/2 penalty, between L1 and L0.

    R(w) = λ Σ √|w|,  prox(w) = ⅔w·(1 + cos(⅔π − ⅔·arccos(2^−½ (t/|w|)^1.5))) where |w| > t = 1.5·(step·λ)^⅔, else 0.

    What is left of a weight is two thirds of it or more. At w = 0 the slope is infinite: a zero is a stationary point
    at any strength, and a weight at zero stays there unless one step of the optimizer takes it beyond the threshold:
    start from weights that are not zero.

    Args:
        strength: λ ≥ 0, in units of the objective: a float, a 0-d tensor, or a tensor that broadcasts to the weight.

    Raises:
        ValueError: if the strength is negative, NaN or infinite.
        TypeError: if it is not a real number or a floating tensor.

    >>> import torch
    >>> from torchreg import LHalf
    >>> LHalf(1.0).prox(torch.tensor([-4.0, 1.5, 1.6]))
    tensor([-3.7415,  0.0000,  1.1295])

    Source: Xu, Chang, Xu and Zhang, L1/2 regularization: a thresholding representation theory and a fast solver,
    IEEE TNNLS, 2012.
    """

    strength: Strength = strength_field()

    def density(self, m: Tensor, strength: Strength) -> Tensor:  # noqa: D102
        zero = m == 0  # where a square root has no gradient
        return torch.where(zero, 0, torch.sqrt(torch.where(zero, 1, m))) * strength

    def slope(self, m: Tensor, strength: Strength) -> Tensor:  # noqa: D102
        return strength / (2 * torch.sqrt(torch.where(m == 0, 1, m)))

    def slope_at_zero(self, strength: Strength) -> Strength:  # noqa: D102
        return _infinite(strength)

    def shrunk(self, m: Tensor, step: Step, strength: Strength) -> Tensor:  # noqa: D102
        t = step * strength
        threshold = representable(1.5 * t ** (2 / 3), m)
        kept = m > threshold
        above = torch.where(kept, m, 1)
        ratio = torch.where(kept, threshold / above, 0)
        v = above * ((1 + torch.cos((2 / 3) * (math.pi - torch.acos(ratio * torch.sqrt(ratio) * 0.5**0.5)))) * (2 / 3))
        return torch.where(m <= threshold, 0, m - t / (2 * torch.sqrt(v)))  # stationary too, and exact

    def cut(self, step: Tensor, strength: Tensor) -> Tensor:  # noqa: D102
        return 1.5 * (step * strength) ** (2 / 3)

    def zeroing_step(self, m: Tensor, strength: float) -> Tensor:  # noqa: D102
        return (m / 1.5) ** 1.5 / strength

    def strength_max(self, grad: Tensor) -> Tensor:
        """Zero: w = 0 is a stationary point at any strength (NaN if the gradient has one)."""
        return _zero_unless_nan(self._prepared(grad)[0])


@dataclasses.dataclass(frozen=True, eq=False)
class L0(_Concave):
    """The number of weights that are not zero.

    R(w) = λ·#{w ≠ 0},  prox(w) = w where |w| > √(2·step·λ), else 0.

    Its gradient is zero wherever it has one, so that only a proximal optimizer can apply it: the loss term and the
    hook refuse it. A weight at zero stays there unless one step of the optimizer takes it beyond the threshold: start
    from weights that are not zero.

    Args:
        strength: λ ≥ 0, the price of a weight in units of the objective: a float, a 0-d tensor, or a tensor that
            broadcasts to the weight.

    Raises:
        ValueError: if the strength is negative, NaN or infinite.
        TypeError: if it is not a real number or a floating tensor.

    >>> import torch
    >>> from torchreg import L0
    >>> L0(0.5).value(torch.tensor([-2.0, 0.0, 1.0]))
    tensor(1.)
    >>> L0(0.5).prox(torch.tensor([-2.0, 0.5, 1.0]))
    tensor([-2.,  0.,  0.])

    Source: Blumensath and Davies, Iterative thresholding for sparse approximations, J. Fourier Anal. Appl., 2008.
    """

    has_gradient = False

    strength: Strength = strength_field()

    def density(self, m: Tensor, strength: Strength) -> Tensor:  # noqa: D102
        return torch.where(torch.isnan(m), m, (m != 0) * strength)

    def slope(self, m: Tensor, strength: Strength) -> Tensor:  # noqa: D102
        return torch.zeros_like(m)

    def slope_at_zero(self, strength: Strength) -> Strength:  # noqa: D102
        return _infinite(strength)

    def shrunk(self, m: Tensor, step: Step, strength: Strength) -> Tensor:  # noqa: D102
        return _hard(m, (2 * (step * strength)) ** 0.5)

    def cut(self, step: Tensor, strength: Tensor) -> Tensor:  # noqa: D102
        return (2 * step * strength) ** 0.5

    def zeroing_step(self, m: Tensor, strength: float) -> Tensor:  # noqa: D102
        return m * m / (2 * strength)

    def strength_max(self, grad: Tensor) -> Tensor:
        """Zero: w = 0 is a stationary point at any strength (NaN if the gradient has one)."""
        return _zero_unless_nan(self._prepared(grad)[0])


def _log_ratio(u: Tensor) -> tuple[Tensor, Tensor]:
    """½u²/(log(1 + u) − u/(1 + u)) and its slope, by their series at 0, where they would be 0/0."""
    small = u < 1e-4
    v = torch.where(small, 1, u)
    below = torch.log1p(v) - v / (1 + v)
    ratio = v * v / 2 / below
    slope = v / below - ratio * (v / (1 + v) ** 2) / below
    return torch.where(small, 1 + 4 / 3 * u, ratio), torch.where(small, 4 / 3, slope)


def _hard(m: Tensor, threshold: Strength) -> Tensor:
    return torch.where(m <= representable(threshold, m), 0, m)


def _infinite(strength: Strength) -> Strength:
    """The slope at zero of what rises steeper than any line, where its strength is positive."""
    if isinstance(strength, Tensor):
        return torch.where(strength > 0, math.inf, 0.0)
    return math.inf if strength > 0 else 0.0


def _zero_unless_nan(g: Tensor) -> Tensor:
    return torch.where(torch.isnan(g).any(), math.nan, 0.0).to(g.real.dtype)

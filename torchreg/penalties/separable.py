"""Penalties that act on each weight by itself: L1, L2 and their sum."""

from __future__ import annotations

import dataclasses
import math
import numbers

import torch
from torch import Tensor

from torchreg.penalties import tiles
from torchreg.penalties.base import (
    Penalty,
    Step,
    Strength,
    arithmetic,
    checked_step,
    checked_strength,
    checked_weight,
    host_scalar,
    like,
    representable,
    strength_field,
)


def soft_threshold(x: Tensor, threshold: float | Tensor) -> Tensor:
    """``sign(x)·max(|x| − threshold, 0)``, elementwise; the modulus of complex numbers.

    Written as x − clamp(x, −t, t): NaN stays NaN, ±inf stays ±inf, and what is shrunk away is +0.0 (``sign·relu``
    and ``softshrink`` give −0.0, ``max(|x| − t, 0)`` in a kernel turns NaN into 0, and (1 − t/|x|)·x is 0/0 at 0).
    """
    threshold = representable(threshold, x)
    if not x.is_complex():
        return x - torch.clamp(x, -threshold, threshold)  # type: ignore[arg-type]
    modulus = x.abs()
    kept = modulus - torch.clamp(modulus, max=threshold)
    ratio = kept / torch.where(modulus == 0, 1, modulus)
    shrunk = torch.where(torch.isinf(modulus), x, x * ratio)
    return torch.where(kept == 0, 0, shrunk)


class _Shrinkage(Penalty):
    """``R(w) = l1·Σ|w| + l2·Σ|w|²``: all mathematics of L1, L2 and Elastic Net, which only name their strengths."""

    is_separable = True

    def parts(self) -> tuple[Strength, Strength]:
        """The strengths (l1, l2)."""
        raise NotImplementedError(f"{self.type_name} must define parts()")

    def shrinkage(self, step: float) -> tuple[float, float] | None:
        """The proximal operator as (threshold, divisor), or None where a tensor is involved.

        Every weight is soft-thresholded and then divided: what a multi-tensor kernel needs to know.
        """
        l1, l2 = (host_scalar(part) for part in self.parts())
        if isinstance(l1, Tensor) or isinstance(l2, Tensor):
            return None
        return l1 * step, 1 + 2 * l2 * step

    def value_of_sums(self, moduli: float, squares: float) -> float | None:
        l1, l2 = (host_scalar(part) for part in self.parts())
        return None if isinstance(l1, Tensor) or isinstance(l2, Tensor) else l1 * moduli + l2 * squares

    def _prepared(self, w: Tensor) -> tuple[Tensor, float | Tensor, float | Tensor]:
        """The weight in computing precision, and l1 and l2 ready to compute with it."""
        x = arithmetic(checked_weight(w))
        self.check_shape(w.shape)
        l1, l2 = self.parts()
        return x, like(l1, x), like(l2, x)

    def value(self, w: Tensor) -> Tensor:
        x, l1, l2 = self._prepared(w)
        total = torch.zeros((), dtype=x.real.dtype, device=w.device)
        if not _is_zero(l1):
            total = total + (l1 * _sum_of_moduli(x) if _is_scalar(l1) else (l1 * x.abs()).sum())
        if not _is_zero(l2):
            total = total + (l2 * _sum_of_squares(x) if _is_scalar(l2) else (l2 * _squared_modulus(x)).sum())
        return total

    def grad(self, w: Tensor) -> Tensor:
        x, l1, l2 = self._prepared(w)
        if _is_zero(l1):
            return (x * (2 * l2)).to(w.dtype)
        result = torch.sgn(x)
        out = None if torch.is_grad_enabled() else result  # autograd keeps what it records, else no temporaries
        result = torch.mul(result, l1, out=out)
        if isinstance(l2, Tensor):
            result = torch.addcmul(result, x, l2.to(x.dtype), value=2, out=out)
        elif l2 != 0:
            result = torch.add(result, x, alpha=2 * l2, out=out)
        return result.to(w.dtype)

    def prox(self, w: Tensor, step: Step = 1.0) -> Tensor:
        x, l1, l2 = self._prepared(w)
        step = checked_step(step, x)
        threshold, divisor = l1 * step, 1 + 2 * l2 * step
        result = x if _is_zero(threshold) else soft_threshold(x, threshold)
        if isinstance(divisor, Tensor) or divisor != 1:
            result = _divided(result, divisor)
        if x is not w:
            return result.to(w.dtype) + 0  # where rounding gives −0.0, +0.0
        return result.clone() if result is w else result

    @torch.no_grad()
    def prox_(self, w: Tensor, step: Step = 1.0) -> Tensor:
        x, l1, l2 = self._prepared(w)
        step = checked_step(step, x)
        threshold, divisor = l1 * step, 1 + 2 * l2 * step
        if x is not w or w.is_complex() or isinstance(threshold, Tensor) or isinstance(divisor, Tensor):
            return w.copy_(self.prox(w, step))
        for part in tiles.tiles(w) if tiles.is_tiled(w) else (w,):
            tiles.shrink_(part, threshold, divisor)
        return w

    def optimality_residual(self, w: Tensor, grad: Tensor) -> Tensor:
        x, l1, _ = self._prepared(w)
        g = arithmetic(checked_weight(grad))
        return torch.where(x == 0, (g.abs() - l1).clamp_min(0), (g + self.grad(x)).abs())

    def threshold(self, step: float | Tensor) -> float | Tensor:
        l1 = host_scalar(self.parts()[0])
        if isinstance(l1, Tensor):
            l1 = l1.max() if l1.numel() else 0.0
            step = step.to(l1.device) if isinstance(step, Tensor) and isinstance(l1, Tensor) else step
        return l1 * step

    def strength_max(self, grad: Tensor) -> Tensor:
        g, l1, _ = self._prepared(grad)
        g = g.abs()
        if isinstance(l1, Tensor) and l1.ndim:
            g = torch.where(l1 > 0, g / l1, 0)  # a zero entry leaves its weight alone: no strength empties it
        return g.max() if g.numel() else g.new_zeros(())


def is_shrinkage(penalty: Penalty | None) -> bool:
    """Whether its proximal operator is soft-thresholding and division, as kernels compute them: no subclass's own."""
    if not isinstance(penalty, _Shrinkage):
        return False
    return type(penalty).prox is _Shrinkage.prox and type(penalty).prox_ is _Shrinkage.prox_


@dataclasses.dataclass(frozen=True, eq=False)
class L1(_Shrinkage):
    """The lasso penalty.

    R(w) = λ Σ|w|,  prox(w) = sign(w)·max(|w| − step·λ, 0).

    Args:
        strength: λ ≥ 0, in units of the objective: a float, a 0-d tensor, or a tensor that broadcasts to the
            weight (adaptive lasso, Zou 2006; a zero entry leaves that weight alone).

    Raises:
        ValueError: if the strength is negative, NaN or infinite.
        TypeError: if it is not a real number or a floating tensor.

    >>> import torch
    >>> from torchreg import L1
    >>> w = torch.tensor([-2.0, 0.05, 1.0])
    >>> L1(0.1).value(w)
    tensor(0.3050)
    >>> L1(0.1).prox(w)
    tensor([-1.9000,  0.0000,  0.9000])

    Source: Tibshirani, Regression shrinkage and selection via the lasso, JRSS B, 1996.
    """

    strength: Strength = strength_field()

    def parts(self) -> tuple[Strength, Strength]:  # noqa: D102
        return self.strength, 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class L2(_Shrinkage):
    """The ridge penalty, without a factor ½.

    R(w) = λ Σw²,  prox(w) = w / (1 + 2·step·λ). The gradient is 2λw: ``L2(λ)`` equals torch's coupled
    ``weight_decay=2λ``. It shrinks and never zeroes.

    Args:
        strength: λ ≥ 0, in units of the objective: a float, a 0-d tensor, or a tensor that broadcasts to the weight.

    Raises:
        ValueError: if the strength is negative, NaN or infinite.
        TypeError: if it is not a real number or a floating tensor.

    >>> import torch
    >>> from torchreg import L2
    >>> L2(0.5).grad(torch.tensor([-2.0, 0.0, 1.0]))
    tensor([-2.,  0.,  1.])

    Source: Hoerl and Kennard, Ridge regression, Technometrics, 1970.
    """

    strength: Strength = strength_field()

    def parts(self) -> tuple[Strength, Strength]:  # noqa: D102
        return 0.0, self.strength

    def strength_max(self, grad: Tensor) -> Tensor:
        """Infinity, unless the gradient is zero: no ridge strength makes w = 0 optimal."""
        g, _, _ = self._prepared(grad)
        g = g.abs()
        return torch.where((g != 0).any(), math.inf, 0.0).to(g.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class ElasticNet(_Shrinkage):
    """The sum of a lasso and a ridge penalty.

    R(w) = l1 Σ|w| + l2 Σw²,  prox(w) = sign(w)·max(|w| − step·l1, 0) / (1 + 2·step·l2).

    Args:
        l1: strength of Σ|w|; a float, a 0-d tensor, or a tensor that broadcasts to the weight.
        l2: strength of Σw², likewise.

    ``strength_max`` is in units of ``l1``; l2 plays no part at w = 0. In scikit-learn's units divide by the ratio:
    ``ElasticNet.from_ratio(strength_max / l1_ratio, l1_ratio)``.

    Raises:
        ValueError: if a strength is negative, NaN or infinite.
        TypeError: if one is not a real number or a floating tensor.

    >>> import torch
    >>> from torchreg import ElasticNet
    >>> ElasticNet(l1=0.1, l2=0.5).prox(torch.tensor([-2.1, 0.05, 1.1]))
    tensor([-1.0000,  0.0000,  0.5000])

    Source: Zou and Hastie, Regularization and variable selection via the elastic net, JRSS B, 2005.
    """

    l1: Strength = strength_field()
    l2: Strength = strength_field()

    @classmethod
    def from_ratio(cls, alpha: Strength, l1_ratio: float) -> ElasticNet:
        """scikit-learn's and glmnet's parameters: ``alpha·l1_ratio Σ|w| + ½·alpha·(1 − l1_ratio) Σw²``.

        >>> from torchreg import ElasticNet
        >>> ElasticNet.from_ratio(2.0, l1_ratio=0.75)
        ElasticNet(l1=1.5, l2=0.25)

        Raises:
            ValueError: if ``alpha`` is negative, NaN or infinite, or ``l1_ratio`` is outside [0, 1].
            TypeError: if ``alpha`` is not a real number or a floating tensor, or ``l1_ratio`` not a real number.
        """
        alpha = checked_strength("alpha", alpha)
        if isinstance(l1_ratio, bool) or not isinstance(l1_ratio, numbers.Real):
            raise TypeError(f"Expected `l1_ratio` to be a number in [0, 1], got {l1_ratio!r}.")
        if not 0 <= l1_ratio <= 1:
            raise ValueError(f"Expected `l1_ratio` to be in [0, 1], got {l1_ratio}.")
        ratio = float(l1_ratio)
        return cls(l1=alpha * ratio, l2=alpha * (1 - ratio) / 2)

    def parts(self) -> tuple[Strength, Strength]:  # noqa: D102
        return self.l1, self.l2


def _divided(x: Tensor, divisor: float | Tensor) -> Tensor:
    """``x / divisor``, the parts of complex numbers each by itself: torch's own division makes inf + nan·i of inf."""
    return torch.complex(x.real / divisor, x.imag / divisor) if x.is_complex() else x / divisor


def _is_zero(part: Strength) -> bool:
    return not isinstance(part, Tensor) and part == 0.0


def _is_scalar(part: Strength) -> bool:
    return not isinstance(part, Tensor) or part.ndim == 0


def _sum_of_moduli(x: Tensor) -> Tensor:
    return x.abs().sum() if _recorded(x) else tiles.norm(x, 1)


def _sum_of_squares(x: Tensor) -> Tensor:
    return _squared_modulus(x).sum() if _recorded(x) else tiles.norm(x, 2).square()


def _squared_modulus(x: Tensor) -> Tensor:
    return (x * x.conj()).real if x.is_complex() else x * x


def _recorded(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad

"""Least squares with an L1 and an L2 penalty, and the duality gap that certifies a solution."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchreg.linear.data.design import Design

NOT_FINITE = (
    "Coordinate descent iterations resulted in non-finite parameter values. The input data may contain large values "
    "and need to be preprocessed."
)
"""Scikit-learn's own words, whatever the solver."""


@dataclass(frozen=True)
class Strength:
    """The penalty l1·Σ|w| + ½·l2·Σw²."""

    l1: float
    l2: float = 0.0

    @classmethod
    def of(cls, alpha: Any, l1_ratio: Any = 1.0) -> Strength:
        """Scikit-learn's parameters, which may be NumPy's numbers of less precision than a float."""
        alpha, ratio = float(alpha), float(l1_ratio)
        return cls(alpha * ratio, alpha * (1 - ratio))


@dataclass(frozen=True)
class Problem:
    """½/n·‖z − Zw‖² + l1·Σ|w| + ½·l2·Σw² for given Z and z; with `positive`, over w ≥ 0."""

    design: Design
    target: Tensor
    """z of shape (n,) in float64, centred and weighted like Z."""
    positive: bool = False
    known: Tensor | None = None
    """Zᵀz/n, if it has been computed already."""

    @cached_property
    def power(self) -> float:
        """‖z‖²/n: twice the objective at zero."""
        return float(self.target @ self.target) / max(1, self.design.samples)

    @cached_property
    def moment(self) -> Tensor:
        """Zᵀz/n, of shape (features,)."""
        return self.design.correlations(self.target.unsqueeze(0))[0] if self.known is None else self.known

    @cached_property
    def largest(self) -> float:
        """The largest entry of Zᵀz/n (its modulus, unless `positive`): from l1 = this on, w = 0 is the solution."""
        if not self.positive:
            return self._modulus
        return max(0.0, float(self.moment.max())) if self.moment.numel() else 0.0

    @cached_property
    def rounding(self) -> float:
        """What correlations with a residual are off by, about."""
        return 32 * max(self.design.eps, 1e-15) * self._modulus

    @cached_property
    def _modulus(self) -> float:
        """The largest modulus of Zᵀz/n."""
        return float(self.moment.abs().max()) if self.moment.numel() else 0.0


@dataclass(frozen=True)
class Fit:
    """What a certificate needs to know about some w: one row, or one entry, for each."""

    residual: Tensor
    """‖z − Zw‖²/n, of shape (m,)."""
    agreement: Tensor
    """(z − Zw)·z/n, of shape (m,)."""
    absolute: Tensor
    """Σ|w|, of shape (m,)."""
    square: Tensor
    """Σw², of shape (m,)."""
    pull: Tensor
    """Zᵀ(z − Zw)/n, of shape (m, features)."""


def duality_gaps(fit: Fit, active: Tensor, strengths: list[Strength], samples: int, positive: bool) -> list[float]:
    """How far each w is from the smallest objective, at most: primal minus dual value at the scaled residual.

    With r = z − Zw, A = Zᵀr/n − l2·w and s = min(1, l1/max|A|) (max A for `positive`) the dual value is
    s·r·z/n − ½s²(‖r‖²/n + l2·Σw²), as in scikit-learn. Without L1 it is the gap of ridge regression,
    ‖r‖²/n + ½·l2·Σw² − r·z/n + ½·‖Zᵀr/n‖²/l2, and without any penalty n·‖Zᵀr/n‖².

    Args:
        fit: of m coefficient vectors.
        active: A, (m, features).
        strengths: one for each.
        samples: n.
        positive: whether w ≥ 0 is asked for.

    Returns:
        m numbers, never below the rounding of the primal value: less can't be certified. NaN where sums overflowed.

    Source: Fercoq, Gramfort and Salmon, Mind the duality gap, ICML 2015; Dünner et al., Primal-dual rates and
    certificates, ICML 2016.
    """
    force = active.clamp(min=0) if positive else active.abs()
    largest = force.amax(1) if force.shape[1] else torch.zeros_like(fit.residual)
    norm = largest  # which is not asked for where there is L1
    if not all(s.l1 for s in strengths):
        norm = (fit.pull.clamp(min=0) if positive else fit.pull).norm(dim=1)
    numbers = torch.stack([fit.residual, fit.agreement, fit.absolute, fit.square, largest, norm], 1).tolist()
    return [_gap(s, samples, *row) for s, row in zip(strengths, numbers, strict=True)]


def _gap(
    strength: Strength,
    samples: int,
    residual: float,
    agreement: float,
    absolute: float,
    square: float,
    largest: float,
    norm: float,
) -> float:
    """One of `duality_gaps`, from the entries of `Fit`, max|A| and ‖Zᵀr/n‖."""
    l1, l2 = strength.l1, strength.l2
    energy = residual + l2 * square
    primal = 0.5 * energy + l1 * absolute
    if l1:
        scale = l1 / max(largest, l1)
        gap = primal - (scale * agreement - 0.5 * scale * scale * energy)
    elif l2:
        gap = energy - 0.5 * l2 * square - agreement + 0.5 * norm * norm / l2
    else:
        gap = samples * norm * norm
    rounding = sys.float_info.epsilon * primal
    return gap if gap >= rounding or gap != gap else rounding

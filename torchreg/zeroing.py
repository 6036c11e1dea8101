"""From which strength scale on the proximal operator makes a weight zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchreg.penalties import Penalty, Strength
from torchreg.penalties.base import host_scalar
from torchreg.penalties.concave import _Concave
from torchreg.penalties.grouped import Grouped
from torchreg.penalties.separable import is_shrinkage
from torchreg.sampling import taken


def makes_zeros(penalty: Penalty) -> bool:
    """Whether a larger scale of this penalty zeroes more weights or groups, in a way that is known."""
    if isinstance(penalty, Grouped):
        return any(isinstance(part, Tensor) or part > 0 for part in map(host_scalar, penalty.parts()[:2]))
    return _soft_threshold(penalty) is not None or _law(penalty) is not None


def zeroing_scale(penalty: Penalty, w: Tensor, step: float | Tensor, shape: torch.Size, at: Tensor | None) -> Tensor:
    """The scale from which on each weight is zero.

    That is |w|/(τ·λ) for a soft threshold, what a penalty's ``zeroing_step`` says, and for other penalties
    (|w|/θ)^(1/p)/τ, where the threshold for small steps is θ·(τ·scale)^p.

    ``w`` is the vector of the weights at the positions ``at`` of a parameter of this shape.
    """
    modulus = w.abs() if w.dtype in (torch.float64, torch.complex128) else w.abs().float()
    step = step.to(modulus) if isinstance(step, Tensor) else step
    strength = _soft_threshold(penalty)
    if isinstance(penalty, _Concave):
        number, multiple = host_scalar(penalty.strength), host_scalar(penalty.multiple())
        modulus = penalty.zeroing_step(modulus, number)  # type: ignore[arg-type]  # no tensor: checked in the beginning
        step = step * multiple
    elif strength is None:
        law = _law(penalty)
        assert law is not None  # checked in the beginning
        unit, power = law
        modulus = (modulus / unit) ** (1 / power)
    elif isinstance(strength, Tensor):
        step = step * (strength if strength.ndim == 0 else taken(strength.expand(shape), at)).to(modulus)
    else:
        step = step * strength
    if not isinstance(step, Tensor):
        return modulus / step if step > 0 else torch.full_like(modulus, math.nan)
    return torch.where(step > 0, modulus / step, math.nan)


def longest_scale(penalty: Penalty, step: float | Tensor) -> float | Tensor:
    """The largest scale at which a penalty takes this step; infinite where it takes any."""
    step = host_scalar(step)
    if not isinstance(penalty, _Concave) or (isinstance(step, Tensor) and step.ndim):
        return math.inf
    limit, step = penalty.step_limit() * (1 - 1e-6), step * host_scalar(penalty.multiple())
    return limit / step if isinstance(step, Tensor) or step > 0 else math.inf


def nearest_quantile(ratios: Tensor, wanted: int) -> Tensor:
    """The k-th smallest, with k the nearest to ``wanted`` at which no equal ones follow; NaN comes last.

    Those of a group are equal: either all of it become zero, or none.
    """
    upper = torch.kthvalue(ratios, wanted).values
    below, upto = (ratios < upper).sum(), (ratios <= upper).sum()
    lower = torch.where(ratios < upper, ratios, 0.0).max()
    return torch.where((below > 0) & (wanted - below < upto - wanted), lower, upper)


def _soft_threshold(penalty: Penalty) -> Strength | None:
    """λ such that weights up to τ·λ become zero, where that is how the penalty works; None if not, or at 0."""
    strength = host_scalar(penalty.parts()[0]) if is_shrinkage(penalty) else None  # type: ignore[attr-defined]
    return strength if isinstance(strength, Tensor) or strength else None


def _law(penalty: Penalty) -> tuple[float, float] | None:
    """(θ, p) such that small steps zero the weights up to θ·step^p, and only those; None if there are none such."""
    per_weight = any(isinstance(s, Tensor) and s.ndim for s in penalty.strengths().values())
    if penalty.is_joint or penalty.is_grouped or per_weight:
        return None
    small = 1e-6
    try:
        low, high = (float(penalty.threshold(step)) for step in (small, small * 16))
        if not (penalty.strengths() and 0 < low < high < math.inf):
            return None
        kept = penalty.prox(torch.tensor([0.99 * low, 1.01 * low], dtype=torch.float64), small) != 0
    except (NotImplementedError, ValueError, TypeError, RuntimeError):
        return None
    power = round(math.log(high / low, 16), 9)
    return (low / small**power, power) if kept.tolist() == [False, True] else None

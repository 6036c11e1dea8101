"""Values and gradients of penalties over many weights: what the loss term and the optimizer hook compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchreg.penalties import Penalty
from torchreg.penalties.base import arithmetic
from torchreg.penalties.separable import _Shrinkage, is_shrinkage


def total_value(penalties: Sequence[Penalty], weights: Sequence[Tensor]) -> Tensor:
    """Σ R(w) over all weights, a real 0-d tensor on the device of the first."""
    total = penalties[0].value(weights[0])
    for penalty, w in zip(penalties[1:], weights[1:], strict=True):
        total = total + penalty.value(w).to(device=total.device)
    return total


def gradients(penalties: Sequence[Penalty], weights: Sequence[Tensor], factor: float | Tensor) -> list[Tensor]:
    """``factor·∇R(w)`` for every weight. Differentiable where autograd records."""
    return [_gradient(penalty, w, factor).to(w.dtype) for penalty, w in zip(penalties, weights, strict=True)]


def added_gradients(
    penalties: Sequence[Penalty], weights: Sequence[Tensor], grads: Sequence[Tensor], factor: float | Tensor
) -> list[Tensor]:
    """``grad + factor·∇R(w)`` for every weight, as new tensors; half-precision ones are added in float32."""
    return [
        _gradient(penalty, w, factor).add_(grad).to(grad.dtype)
        for penalty, w, grad in zip(penalties, weights, grads, strict=True)
    ]


def shrinkage(penalty: Penalty | None, step: float | Tensor) -> tuple[float, float] | None:
    """The (threshold, divisor) of a penalty whose prox is a shrinkage by plain numbers, else None."""
    if not is_shrinkage(penalty) or isinstance(step, Tensor):
        return None
    assert isinstance(penalty, _Shrinkage)
    return penalty.shrinkage(step)


def _gradient(penalty: Penalty, w: Tensor, factor: float | Tensor) -> Tensor:
    grad = penalty.grad(arithmetic(w))
    if isinstance(factor, Tensor):
        factor = factor.to(device=grad.device, dtype=grad.real.dtype).reshape(())
    return grad * factor if torch.is_grad_enabled() else grad.mul_(factor)

"""The proximal SGD step in multi-tensor operations: few launches for many tensors, the reference's results."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from torchreg.kernels import reference, tiled
from torchreg.kernels.penalties import shrinkage
from torchreg.kernels.problem import SGDStep, SGDTensors
from torchreg.penalties import Penalty
from torchreg.penalties.base import HALF, representable


def prox_sgd(tensors: SGDTensors, step: SGDStep) -> None:
    """One step of every parameter, in place.

    Half-precision tensors go to the reference where it computes in float32. With a penalty those on the CPU, where an
    operation is no launch but a pass over memory, are taken tile by tile.
    """
    parts: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, param in enumerate(tensors.params):
        parts.setdefault((param.device, param.dtype), []).append(i)
    for (device, dtype), indices in parts.items():
        part = tensors.take(indices)
        if dtype in HALF and (step.penalty is not None or isinstance(step.lr, Tensor)):
            reference.prox_sgd(part, step)
        elif device.type == "cpu" and step.penalty is not None and not torch.compiler.is_compiling():
            tiled.prox_sgd(part, step)
        else:
            _update(part, step)


def _update(tensors: SGDTensors, step: SGDStep) -> None:
    params, grads, buffers = tensors.params, tensors.grads, tensors.momentum_buffers
    if step.maximize:
        grads = _list(torch._foreach_neg(grads))
    if step.weight_decay != 0:
        grads = _list(torch._foreach_add(grads, params, alpha=step.weight_decay))  # type: ignore[arg-type]
    if buffers:
        torch._foreach_mul_(buffers, step.momentum)
        _accumulate(buffers, grads, tensors.first, step)
        grads = _list(torch._foreach_add(grads, buffers, alpha=step.momentum)) if step.nesterov else buffers
    if isinstance(step.lr, Tensor):
        lr = step.lr.to(device=params[0].device, dtype=params[0].real.dtype)
        torch._foreach_add_(params, torch._foreach_mul(grads, -lr))
    else:
        torch._foreach_add_(params, grads, alpha=-step.lr)
    if step.penalty is not None:
        _prox_(params, step.penalty, step.prox_step)


def _accumulate(buffers: list[Tensor], grads: list[Tensor], first: list[bool], step: SGDStep) -> None:
    for is_first in set(first):
        chosen = [i for i, f in enumerate(first) if f == is_first]
        alpha = 1 if is_first else 1 - step.dampening
        torch._foreach_add_([buffers[i] for i in chosen], [grads[i] for i in chosen], alpha=alpha)


def _prox_(params: list[Tensor], penalty: Penalty, prox_step: float | Tensor) -> None:
    """The penalty's prox in place: three multi-tensor operations where it is a shrinkage by plain numbers."""
    shrink = shrinkage(penalty, prox_step)
    if shrink is None or params[0].is_complex():
        for param in params:
            penalty.prox_(param, prox_step)
        return
    threshold, divisor = shrink
    if threshold != 0:
        threshold = float(representable(threshold, params[0]))
        clamped = torch._foreach_clamp_min(params, -threshold)
        torch._foreach_clamp_max_(clamped, threshold)
        torch._foreach_sub_(params, clamped)
    if divisor != 1:
        torch._foreach_div_(params, divisor)


def _list(tensors: object) -> list[Tensor]:
    return list(cast("tuple[Tensor, ...]", tensors))

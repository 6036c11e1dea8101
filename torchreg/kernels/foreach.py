"""The proximal SGD step in multi-tensor operations: few launches for many tensors, the reference's results."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchreg.kernels import reference
from torchreg.kernels.problem import SGDStep, SGDTensors
from torchreg.penalties import Penalty
from torchreg.penalties.separable import _Shrinkage


def prox_sgd(tensors: SGDTensors, step: SGDStep) -> None:
    """One step of every parameter, in place. Half-precision tensors with a penalty go to the reference."""
    if not tensors.params:
        return
    grouped = Optimizer._group_tensors_by_device_and_dtype([tensors.params], with_indices=True)  # type: ignore[list-item]
    for _, indices in grouped.values():
        part = tensors.take(list(indices))
        if step.penalty is not None and part.params[0].dtype in reference.HALF:
            reference.prox_sgd(part, step)
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
    """The penalty's prox in place: three multi-tensor operations where it is a shrinkage by plain numbers.

    On the CPU, where an operation is no launch, `Penalty.prox_` makes one pass over memory instead of three.
    """
    shrinkage = None
    if isinstance(penalty, _Shrinkage) and not isinstance(prox_step, Tensor):
        shrinkage = penalty.shrinkage(prox_step)
    if shrinkage is None or params[0].device.type == "cpu" or params[0].is_complex():
        for param in params:
            penalty.prox_(param, prox_step)
        return
    threshold, divisor = shrinkage
    if threshold != 0:
        clamped = torch._foreach_clamp_min(params, -threshold)
        torch._foreach_clamp_max_(clamped, threshold)
        torch._foreach_sub_(params, clamped)
    if divisor != 1:
        torch._foreach_div_(params, divisor)


def _list(tensors: object) -> list[Tensor]:
    return list(cast("tuple[Tensor, ...]", tensors))

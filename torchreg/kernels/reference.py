"""The proximal SGD step in plain PyTorch, one tensor after the other: the specification of all other kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from torchreg.kernels.problem import SGDStep, SGDTensors
from torchreg.kernels.rounding import store
from torchreg.penalties.base import HALF, host_scalar, like


def prox_sgd(tensors: SGDTensors, step: SGDStep) -> None:
    """One step of every parameter, in place.

    With a penalty, half-precision tensors are read as float32 and each is rounded once when it is written back;
    without one the arithmetic is torch.optim.SGD's.
    """
    for i, param in enumerate(tensors.params):
        buffer = tensors.momentum_buffers[i] if tensors.momentum_buffers else None
        first = tensors.first[i] if tensors.first else False
        if step.penalty is not None and param.dtype in HALF:
            w, m = param.float(), None if buffer is None else buffer.float()
            _update(w, tensors.grads[i].float(), m, first, step)
            if buffer is not None and m is not None:
                buffer.copy_(m)
            store(param, w, tensors.seeds[i] if step.stochastic_rounding else None)
        else:
            _update(param, tensors.grads[i], buffer, first, step)


def descend_(
    param: Tensor, grad: Tensor, buffer: Tensor | None, first: bool, step: SGDStep, one_rounding: bool = False
) -> None:
    """The part before the proximal operator, w ← w − lr·u, with its momentum: all of torch.optim.SGD.

    ``one_rounding`` allows μ·m + g in one operation, which saves a pass over memory and differs from torch's two in
    the last bit.
    """
    if step.maximize:
        grad = -grad
    if isinstance(step.weight_decay, Tensor) and step.weight_decay.requires_grad:
        grad = grad + param.clone() * step.weight_decay
    elif step.weight_decay != 0:
        grad = grad.add(param, alpha=step.weight_decay)  # type: ignore[arg-type]
    if buffer is not None:
        weight = 1 if first else 1 - step.dampening
        if one_rounding and weight == 1:
            torch.add(grad, buffer, alpha=step.momentum, out=buffer)
        else:
            buffer.mul_(step.momentum)
            buffer.add_(grad, alpha=weight)
        grad = grad.add(buffer, alpha=step.momentum) if step.nesterov else buffer
    lr = host_scalar(step.lr)
    if not isinstance(lr, Tensor):
        param.add_(grad, alpha=-lr)
    elif param.dtype in HALF:  # whose own precision is too low for a learning rate
        w = param.float()
        param.copy_(w.addcmul_(grad.float(), like(lr, w), value=-1))  # type: ignore[arg-type]
    else:
        param.addcmul_(grad, like(lr, grad), value=-1)  # type: ignore[arg-type]


def _update(param: Tensor, grad: Tensor, buffer: Tensor | None, first: bool, step: SGDStep) -> None:
    descend_(param, grad, buffer, first, step)
    if step.penalty is None:
        return
    if step.differentiable:
        param.copy_(step.penalty.prox(param.clone(), step.prox_step))
    else:
        step.penalty.prox_(param, step.prox_step)

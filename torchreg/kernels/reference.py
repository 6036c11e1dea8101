"""The proximal SGD step in plain PyTorch, one tensor after the other: the specification of all other kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from torchreg.kernels.problem import SGDStep, SGDTensors
from torchreg.kernels.rounding import stochastic_round_

HALF = (torch.float16, torch.bfloat16)


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
            if step.stochastic_rounding:
                stochastic_round_(param, w, tensors.seeds[i])
            else:
                param.copy_(w)
        else:
            _update(param, tensors.grads[i], buffer, first, step)


def _update(param: Tensor, grad: Tensor, buffer: Tensor | None, first: bool, step: SGDStep) -> None:
    if step.maximize:
        grad = -grad
    if isinstance(step.weight_decay, Tensor) and step.weight_decay.requires_grad:
        grad = grad + param * step.weight_decay
    elif step.weight_decay != 0:
        grad = grad.add(param, alpha=step.weight_decay)  # type: ignore[arg-type]
    if buffer is not None:
        buffer.mul_(step.momentum)
        buffer.add_(grad, alpha=1 if first else 1 - step.dampening)
        grad = grad.add(buffer, alpha=step.momentum) if step.nesterov else buffer
    if isinstance(step.lr, Tensor):
        param.addcmul_(grad, step.lr.to(device=grad.device, dtype=grad.real.dtype), value=-1)
    else:
        param.add_(grad, alpha=-step.lr)
    if step.penalty is None:
        return
    if step.differentiable:
        param.copy_(step.penalty.prox(param, step.prox_step))
    else:
        step.penalty.prox_(param, step.prox_step)

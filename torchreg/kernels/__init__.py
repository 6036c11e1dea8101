"""The one place where an implementation is chosen. The plain PyTorch reference is the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach

from torchreg.kernels import foreach as _foreach
from torchreg.kernels import reference as _reference
from torchreg.kernels import tiled as _tiled
from torchreg.kernels.penalties import added_gradients, gradients, total_value
from torchreg.kernels.problem import SGDStep, SGDTensors

__all__ = ["SGDStep", "SGDTensors", "added_gradients", "gradients", "prox_sgd", "total_value"]


def prox_sgd(tensors: SGDTensors, step: SGDStep, *, foreach: bool | None = None) -> None:
    """One proximal SGD step of a param group, in place.

    ``foreach=None`` takes the multi-tensor form where all tensors are native ones on an accelerator, as torch.optim
    does, and elsewhere the tiled one where there is a penalty. ``foreach=False`` is the plain loop.
    """
    tiled = foreach is None and step.penalty is not None and not torch.compiler.is_compiling()
    if foreach is None:
        params: list[Tensor] = tensors.params
        _, foreach = _default_to_fused_or_foreach(params, differentiable=step.differentiable, use_fused=False)
    if foreach:
        _foreach.prox_sgd(tensors, step)
    elif tiled:
        _tiled.prox_sgd(tensors, step)
    else:
        _reference.prox_sgd(tensors, step)

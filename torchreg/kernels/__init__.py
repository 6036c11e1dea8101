"""The one place where an implementation is chosen. The plain PyTorch reference is the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach

from torchreg.kernels import foreach as _foreach
from torchreg.kernels import reference as _reference
from torchreg.kernels import selection
from torchreg.kernels import tiled as _tiled
from torchreg.kernels.adam import prox_adam
from torchreg.kernels.fused import FusedSteps
from torchreg.kernels.penalties import PenaltySum
from torchreg.kernels.plan import COUNTS, Part
from torchreg.kernels.problem import AdamStep, AdamTensors, SGDStep, SGDTensors, Update
from torchreg.kernels.proximal import shrink, shrink_sharded
from torchreg.kernels.selection import Wish

__all__ = [
    "ADAM",
    "COUNTS",
    "SGD",
    "AdamStep",
    "AdamTensors",
    "FusedSteps",
    "PenaltySum",
    "SGDStep",
    "SGDTensors",
    "Update",
    "proximal_step",
    "selection",
    "shrink",
    "shrink_sharded",
]


def proximal_step(
    update: Update,
    parts: Sequence[Part],
    wishes: Sequence[Wish],
    fused: FusedSteps,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One proximal step of all param groups, in place.

    Where ``fused`` and ``foreach`` are None, fused steps are taken for all groups if one of them has a penalty and
    the device has them; without any penalty the arithmetic is that of torch's optimizer, to the last bit.
    ``grad_scale`` and ``found_inf`` are for fused steps on a GPU.

    Raises:
        RuntimeError: if an implementation was asked for that can't be had; nothing is changed then.
    """
    alone: list[selection.Chosen]
    if torch.compiler.is_compiling():  # a compiler fuses by itself
        alone = [(i, None) for i in range(len(parts))]
        fused.clear()
    else:
        alone = fused.step(parts, wishes, grad_scale, found_inf)
    for i, indices in alone:
        tensors, step = parts[i]
        update.eager(tensors if indices is None else tensors.take(indices), step, wishes[i][1])


def _prox_sgd(tensors: SGDTensors, step: SGDStep, foreach: bool | None) -> None:
    """Multi-tensor operations, tiles through the cache, or the plain loop (False).

    ``foreach=None`` takes the multi-tensor form where all tensors are native ones on an accelerator, as torch.optim
    does, and elsewhere the tiled one where there is a penalty.
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


SGD = Update(SGDTensors, SGDStep, _prox_sgd)
ADAM = Update(AdamTensors, AdamStep, prox_adam)

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
from torchreg.kernels.fused import FusedSGD
from torchreg.kernels.penalties import added_gradients, gradients, total_value
from torchreg.kernels.plan import Part
from torchreg.kernels.problem import SGDStep, SGDTensors

__all__ = [
    "FusedSGD",
    "SGDStep",
    "SGDTensors",
    "added_gradients",
    "gradients",
    "prox_sgd",
    "selection",
    "total_value",
]

Wish = tuple[bool | None, bool | None]
"""What a param group says of (fused, foreach)."""


def prox_sgd(
    parts: Sequence[Part],
    wishes: Sequence[Wish],
    fused: FusedSGD,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One proximal SGD step of all param groups, in place.

    Where ``fused`` and ``foreach`` are None, fused steps are taken for all groups if one of them has a penalty and
    the device has them; without any penalty the arithmetic is torch.optim.SGD's, to the last bit. ``grad_scale`` and
    ``found_inf`` are for fused steps on a GPU.

    Raises:
        RuntimeError: if an implementation was asked for that can't be had; nothing is changed then.
    """
    compiling = torch.compiler.is_compiling()
    positions = [
        [] if compiling else selection.fused_positions(tensors.params, step, *wish)
        for (tensors, step), wish in zip(parts, wishes, strict=True)
    ]
    if not compiling:
        _settle(parts, wishes, positions)
    together, alone = [], []
    for (tensors, step), wish, chosen in zip(parts, wishes, positions, strict=True):
        rest = sorted(set(range(len(tensors.params))) - set(chosen)) if chosen else []
        if chosen:
            together.append((tensors if not rest else tensors.take(chosen), step))
        if rest or not chosen:
            alone.append((tensors.take(rest) if rest else tensors, step, wish[1]))
    if together:
        fused.step(together, grad_scale, found_inf)
    else:
        fused.clear()
    for tensors, step, foreach in alone:
        _eager(tensors, step, foreach)


def _settle(parts: Sequence[Part], wishes: Sequence[Wish], positions: list[list[int]]) -> None:
    """Empty the positions of groups that nobody asked to fuse and where it does not pay or can't be had."""
    candidates = [tensors.params[i] for (tensors, _), chosen in zip(parts, positions, strict=True) for i in chosen]
    penalised = any(step.penalty is not None and tensors.params for tensors, step in parts)
    unasked = penalised and selection.pays(candidates)
    for (tensors, _), (wish, _), chosen in zip(parts, wishes, positions, strict=True):
        if not chosen or (wish is None and not unasked):
            chosen.clear()
            continue
        for device in {tensors.params[i].device for i in chosen}:
            reason = selection.unavailable(device)
            if reason is not None and wish:
                raise RuntimeError(f"`fused=True` can't be had on {device}: {reason}.")
            if reason is not None:
                chosen[:] = [i for i in chosen if tensors.params[i].device != device]


def _eager(tensors: SGDTensors, step: SGDStep, foreach: bool | None) -> None:
    """Without fused kernels: multi-tensor operations, tiles through the cache, or the plain loop (False).

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

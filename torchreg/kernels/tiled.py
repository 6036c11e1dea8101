"""The proximal SGD step on the CPU, tile by tile: the reference's arithmetic in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from torchreg.kernels import reference
from torchreg.kernels.penalties import shrinkage
from torchreg.kernels.problem import SGDStep, SGDTensors
from torchreg.penalties import tiles
from torchreg.penalties.base import HALF, representable


def prox_sgd(tensors: SGDTensors, step: SGDStep) -> None:
    """One step of every parameter, in place. What is no shrinkage by plain numbers goes to the reference."""
    shrink = None if step.differentiable else shrinkage(step.penalty, step.prox_step)
    scratch: dict[torch.dtype, Tensor] = {}
    for i, param in enumerate(tensors.params):
        if shrink is None or not param.dtype.is_floating_point or param.dtype in HALF:
            reference.prox_sgd(tensors.take([i]), step)
            continue
        buffer = tensors.momentum_buffers[i] if tensors.momentum_buffers else None
        first = tensors.first[i] if tensors.first else False
        together = [param, tensors.grads[i]] if buffer is None else [param, tensors.grads[i], buffer]
        if not (tiles.is_tiled(param) and all(t.stride() == param.stride() for t in together)):
            reference.descend_(param, tensors.grads[i], buffer, first, step, one_rounding=True)
            _shrink_(param, *shrink)
            continue
        if param.dtype not in scratch:
            scratch[param.dtype] = param.new_empty(tiles.TILE)
        for w, g, *m in zip(*map(tiles.tiles, together), strict=True):
            reference.descend_(w, g, m[0] if m else None, first, step, one_rounding=True)
            _shrink_(w, *shrink, scratch=scratch[param.dtype][: w.numel()])


def _shrink_(w: Tensor, threshold: float, divisor: float, scratch: Tensor | None = None) -> None:
    """`tiles.shrink_`, with two operations instead of three where it both thresholds and divides."""
    if threshold == 0 or divisor == 1:
        tiles.shrink_(w, threshold, divisor, scratch)
        return
    torch.ops.aten.softshrink.out(w, float(representable(threshold, w)), out=w)  # leaves −0.0, which 0 + −0.0 is not
    torch.add(w.new_zeros(()), w, alpha=1 / divisor, out=w)

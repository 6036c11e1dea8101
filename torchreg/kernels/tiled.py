"""The proximal SGD step on the CPU, tile by tile: the reference's arithmetic in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from torchreg.kernels import reference
from torchreg.kernels.fused_form import run
from torchreg.kernels.penalties import shrinkage
from torchreg.kernels.problem import SGDStep, SGDTensors
from torchreg.penalties import tiles
from torchreg.penalties.base import HALF, representable
from torchreg.penalties.grouped import is_group_shrinkage


def prox_sgd(tensors: SGDTensors, step: SGDStep) -> None:
    """One step of every parameter, in place. What is no shrinkage, of weights or groups, goes to the reference."""
    shrink = None if step.differentiable else shrinkage(step.penalty, step.prox_step)
    scratch: dict[torch.dtype, Tensor] = {}
    for i, param in enumerate(tensors.params):
        buffer = tensors.momentum_buffers[i] if tensors.momentum_buffers else None
        first = tensors.first[i] if tensors.first else False
        together = [param, tensors.grads[i]] if buffer is None else [param, tensors.grads[i], buffer]
        fits = tiles.is_tiled(param) and all(t.stride() == param.stride() for t in together)
        size = _group_size(param, step) if fits and shrink is None else 0
        if size:
            _step_groups_(together, size, first, step)
            continue
        if shrink is None or not param.dtype.is_floating_point or param.dtype in HALF:
            reference.prox_sgd(tensors.take([i]), step)
            continue
        if not fits:
            reference.descend_(param, tensors.grads[i], buffer, first, step, one_rounding=True)
            _shrink_(param, *shrink)
            continue
        if param.dtype not in scratch:
            scratch[param.dtype] = param.new_empty(tiles.TILE)
        for w, g, *m in zip(*map(tiles.tiles, together), strict=True):
            reference.descend_(w, g, m[0] if m else None, first, step, one_rounding=True)
            _shrink_(w, *shrink, scratch=scratch[param.dtype][: w.numel()])


def _group_size(param: Tensor, step: SGDStep) -> int:
    """The size of groups that are neighbours in memory and fit into a tile, or 0."""
    if step.differentiable or not param.dtype.is_floating_point or param.dtype in HALF:
        return 0
    size = run(param, step.penalty) if is_group_shrinkage(step.penalty) else 0
    return size if size and size <= tiles.TILE else 0


def _step_groups_(together: list[Tensor], size: int, first: bool, step: SGDStep) -> None:
    """The step of a weight, its gradient and its momentum, cut into groups of this size, of which a tile holds many."""
    assert is_group_shrinkage(step.penalty)
    penalty = step.penalty.of_rows()
    rows = (t.as_strided((t.numel() // size, size), (size, 1)).split(tiles.TILE // size) for t in together)
    for w, g, *m in zip(*rows, strict=True):
        reference.descend_(w, g, m[0] if m else None, first, step, one_rounding=True)
        penalty.prox_(w, step.prox_step)


def _shrink_(w: Tensor, threshold: float, divisor: float, scratch: Tensor | None = None) -> None:
    """`tiles.shrink_`, with two operations instead of three where it both thresholds and divides."""
    if threshold == 0 or divisor == 1:
        tiles.shrink_(w, threshold, divisor, scratch)
        return
    torch.ops.aten.softshrink.out(w, float(representable(threshold, w)), out=w)  # leaves −0.0, which 0 + −0.0 is not
    torch.add(w.new_zeros(()), w, alpha=1 / divisor, out=w)

"""Large CPU tensors in pieces that stay in the cache: one pass over memory instead of one per operation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 1 << 18
"""Elements per tile: 1 MiB of float32, about half of a core's L2 cache, and enough to keep torch's threads busy."""


def is_tiled(w: Tensor) -> bool:
    """Whether a pass over ``w`` is worth splitting."""
    return w.device.type == "cpu" and w.numel() > TILE and not torch.compiler.is_compiling() and is_dense(w)


def is_dense(w: Tensor) -> bool:
    """Whether the elements fill one block of memory, in any order of dimensions."""
    return torch.ops.aten.is_non_overlapping_and_dense.default(w)


def tiles(w: Tensor) -> Iterator[Tensor]:
    """Flat views that together cover ``w`` once, in memory order."""
    flat = w.as_strided((w.numel(),), (1,))
    for start in range(0, w.numel(), TILE):
        yield flat[start : start + TILE]


def norm(w: Tensor, order: float) -> Tensor:
    """``(Σ|w|^order)^(1/order)`` of all elements, real, 0-d, without a temporary of the size of ``w``.

    torch's float32 norm on the CPU accumulates in one running sum per lane (7e-5 off at 4 M elements), so
    large tensors are summed tile by tile.
    """
    if is_tiled(w):
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, order) for t in tiles(w)]), order)
    return torch.linalg.vector_norm(w, order)

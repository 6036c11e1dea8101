"""Large CPU tensors in pieces that stay in the cache: one pass over memory instead of one per operation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchreg.penalties.base import representable

TILE = 1 << 18
"""Elements per tile: 1 MiB of float32, about half of a core's L2 cache, and enough to keep torch's threads busy."""


def is_tiled(w: Tensor) -> bool:
    """Whether a pass over ``w`` is worth splitting."""
    return w.device.type == "cpu" and w.numel() > TILE and not torch.compiler.is_compiling() and is_dense(w)


def is_dense(w: Tensor) -> bool:
    """Whether the elements fill one block of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(w.stride(), w.shape, strict=True)):
        if size != 1 and stride != expected:
            return w.numel() == 0
        expected *= size
    return True


def tiles(w: Tensor) -> Iterator[Tensor]:
    """Flat views that together cover ``w`` once, in memory order."""
    flat = w.as_strided((w.numel(),), (1,))
    for start in range(0, w.numel(), TILE):
        yield flat[start : start + TILE]


def norm(w: Tensor, order: float) -> Tensor:
    """``(Σ|w|^order)^(1/order)`` of all elements, real, 0-d, without a temporary of the size of ``w``.

    torch's float32 norm on the CPU accumulates in one running sum per lane (7e-5 off at 4 M elements), so
    large tensors are summed tile by tile, or in float64 where they are not dense.
    """
    if is_tiled(w):
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, order) for t in tiles(w)]), order)
    if w.device.type == "cpu" and w.dtype == torch.float32 and w.numel() > TILE and not torch.compiler.is_compiling():
        return torch.linalg.vector_norm(w, order, dtype=torch.float64).to(w.dtype)
    return torch.linalg.vector_norm(w, order)


def shrink_(w: Tensor, threshold: float, divisor: float, scratch: Tensor | None = None) -> None:
    """Soft-threshold and divide a real tensor in place; ``scratch`` spares the allocation of a temporary."""
    if threshold != 0:
        threshold = float(representable(threshold, w))
        w.sub_(torch.clamp(w, -threshold, threshold, out=scratch))
    if divisor != 1:
        w.div_(divisor)

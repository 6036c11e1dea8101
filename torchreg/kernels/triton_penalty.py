"""A penalty's value and gradients on a GPU: one Triton launch over all weights of a dtype. Nothing waits for it."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreg.kernels import graphs
from torchreg.kernels.penalty_table import ROWS, STRENGTHS, PenaltyTable
from torchreg.kernels.pieces import cut
from torchreg.kernels.triton_step import DTYPES, unavailable

__all__ = ["DTYPES", "PIECE_SIZE", "gradient", "unavailable", "value"]

PIECE_SIZE = 1 << 13

_BLOCK = 1 << 11
_WARPS = 8
_ALIGNMENT = 16  # bytes: what a thread reads at once

_captured: list[Tensor] = []  # host memory that captured graphs copy from at every replay


def value(table: PenaltyTable) -> Tensor:
    """Σ l1·Σ|w| + l2·Σw² over all tensors: 0-d, float64 for float64 weights, else float32."""
    count = cut(table.sizes, PIECE_SIZE).shape[1]
    partials = torch.empty(count, dtype=torch.float64, device=table.device)
    _launch("penalty_value", table, partials)
    return partials.sum().to(_compute(table.dtype))


def gradient(table: PenaltyTable, factor: float | Tensor) -> None:
    """Write ``factor·(l1·sign(w) + 2·l2·w)``, and the gradient where there is one added, into every ``out``.

    A factor that is a tensor on a device is read there.
    """
    if isinstance(factor, Tensor) and factor.device.type == "cpu":
        factor = float(factor)
    if isinstance(factor, Tensor):
        factor = factor.detach().to(device=table.device, dtype=_compute(table.dtype)).reshape(())
    added = bool(table.table[ROWS.index("g")].any())
    _launch("penalty_gradient", table, factor, ADDED=added)


def _launch(name: str, table: PenaltyTable, beside: float | Tensor, **flags: bool) -> None:
    """Run a kernel, one program per piece. ``beside`` is a tensor that it is given, or a number sent with the table."""
    tensors, count = len(table.sizes), cut(table.sizes, PIECE_SIZE).shape[1]
    if not count:
        return
    import triton.language as tl

    from torchreg.kernels import triton_penalty_kernels

    number = 0.0 if isinstance(beside, Tensor) else beside
    numbers = np.append(table.strengths, number)
    sent = _sent(np.concatenate([table.table.ravel(), numbers.view(np.int64)]), table.device)
    addresses, numbers_there = sent[: tensors * len(ROWS)], sent[tensors * len(ROWS) :].view(torch.float64)
    with torch.cuda.device(table.device) if table.device.type == "cuda" else contextlib.nullcontext():
        getattr(triton_penalty_kernels, name)[(count,)](
            addresses,
            tensors,
            _pieces(table),
            count,
            numbers_there,
            beside if isinstance(beside, Tensor) else numbers_there[tensors * len(STRENGTHS) :],
            DTYPE=getattr(tl, str(table.dtype).removeprefix("torch.")),
            COMPUTE=getattr(tl, str(_compute(table.dtype)).removeprefix("torch.")),
            ALIGNED=not (table.table[:3] % _ALIGNMENT).any(),
            PIECE=PIECE_SIZE,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            **flags,
        )


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pieces(table: PenaltyTable) -> Tensor:
    """The pieces on the device: those sent earlier, unless a graph is captured, which outlives what is kept here."""
    if table.device.type != "cuda":
        return _sent(cut(table.sizes, PIECE_SIZE), table.device)
    if graphs.is_captured():
        return _sent(cut(table.sizes, PIECE_SIZE), table.device)
    return _kept_pieces(table.sizes, table.device, torch.cuda.current_stream(table.device).cuda_stream)


@functools.lru_cache(maxsize=32)
def _kept_pieces(sizes: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Of one stream: another would have to wait for the copy, and for its last use before the memory is given back."""
    return _sent(cut(sizes, PIECE_SIZE), device)


def _sent(array: Any, device: torch.device) -> Tensor:
    host = torch.from_numpy(np.array(array))
    if device.type == "cuda":
        host = host.pin_memory()  # kept while it is read: pinned memory is recycled after the copy, not before
        if graphs.is_captured():
            _captured.append(host)
    return host.to(device, non_blocking=True)

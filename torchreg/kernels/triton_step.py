"""Proximal steps on a GPU: one Triton launch over all tensors of a dtype."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreg.kernels.pieces import widths
from torchreg.kernels.plan import ADDRESSES, COLUMNS, Plan

PIECE_SIZE = 1 << 13
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_BLOCK = 1 << 11
_WARPS = 8
_ALIGNMENT = 16  # bytes: what a thread reads at once


@functools.cache
def unavailable() -> str | None:
    """Why there is no Triton kernel here, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (7, 0):
        return f"Triton needs compute capability 7.0, this device has {torch.cuda.get_device_capability()}"
    return None


def run(name: str, plan: Plan, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
    """One step of every tensor of the plan. Nothing waits for the device.

    Args:
        name: of the kernel.
        plan: the tensors and hyperparameters.
        grad_scale: what the gradients are divided by, a one-element tensor on the device.
        found_inf: where it is 1 nothing changes, a one-element tensor on the device.
    """
    count = plan.pieces.shape[1]
    if not count:
        return
    import triton.language as tl

    from torchreg.kernels import triton_group_adam, triton_group_sgd, triton_prox_adam, triton_prox_sgd

    kernels = {
        "prox_sgd": (triton_prox_sgd.prox_sgd, triton_group_sgd.prox_sgd_groups),
        "prox_adam": (triton_prox_adam.prox_adam, triton_group_adam.prox_adam_groups),
    }[name]
    if plan.is_captured:
        plan.captured += plan.memory()
    table, pieces, hypers = (_uploaded(plan, name) for name in ("table", "pieces", "hypers"))
    for entry, values in plan.late.items():
        tensors = [value if isinstance(value, Tensor) else torch.tensor(value) for value in values]
        table[COLUMNS.index(entry)].copy_(torch.stack([tensor.to(plan.device) for tensor in tensors]))
    for row, column, value in plan.traced:
        hypers[row, column].copy_(value)
    double = plan.dtype == torch.float64
    with torch.cuda.device(plan.device) if plan.device.type == "cuda" else contextlib.nullcontext():
        for width, begin, end, aligned in _launches(plan):
            kernels[width != 0][(end - begin,)](
                table,
                table.shape[1],
                pieces,
                count,
                begin,
                hypers,
                plan.counts,
                plan.counts if grad_scale is None else grad_scale,
                plan.counts if found_inf is None else found_inf,
                DTYPE=getattr(tl, str(plan.dtype).removeprefix("torch.")),
                COMPUTE=tl.float64 if double else tl.float32,
                LARGEST=torch.finfo(torch.float64 if double else torch.float32).max,
                SCALED=grad_scale is not None,
                GUARDED=found_inf is not None,
                ALIGNED=aligned,
                **tile(width, plan.piece_size),
            )


def tile(width: int, piece_size: int = PIECE_SIZE) -> dict[str, int]:
    """The shape of a program's tile: groups in rows of a power of two, or single weights (0)."""
    if not width:
        return {"PIECE": piece_size, "BLOCK": _BLOCK, "num_warps": _WARPS}
    return {"ROWS": max(1, _BLOCK // width), "COLS": width, "num_warps": min(32, max(_WARPS, width // 512))}


def _launches(plan: Plan) -> list[tuple[int, int, int, bool]]:
    """The width of a tile, the first and last piece, and whether all rows begin where threads can read 16 bytes."""
    aligned = not (plan.table[:ADDRESSES] % _ALIGNMENT).any()
    runs = plan.table[COLUMNS.index("run")]
    if not runs.any():
        return [(0, 0, plan.pieces.shape[1], aligned)]
    pieces_runs = runs[plan.pieces[0]]
    ends = [0, *(np.flatnonzero(np.diff(widths(pieces_runs))) + 1).tolist(), len(pieces_runs)]
    return [
        (int(widths(here).max()), begin, end, aligned and not (here % (_ALIGNMENT // 2)).any())
        for begin, end in itertools.pairwise(ends)
        for here in [pieces_runs[begin:end]]
    ]


def _uploaded(plan: Plan, name: str) -> Tensor:
    """A host array of the plan on its device: the copy of an earlier step where nothing has changed since.

    A graph that is captured has a copy of its own, which is filled at every replay: no other step can count on it, nor
    it on theirs.
    """
    array: Any = getattr(plan, name)
    if name in plan.uploads and not plan.is_captured:
        known, tensor = plan.uploads[name]
        if np.array_equal(known, array, equal_nan=True):  # NaN: in a tensor
            return tensor
    host = torch.from_numpy(array.copy())  # what is late or traced is written to it on the CPU
    if plan.device.type == "cuda":
        host = host.pin_memory()  # kept while it is read: pinned memory is recycled after the copy, not before
    tensor = host.to(plan.device, non_blocking=True)
    if plan.is_captured:
        plan.captured.append(host)
    else:
        plan.uploads[name] = array.copy(), tensor
    return tensor

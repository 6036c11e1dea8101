"""The proximal SGD step on the CPU, compiled from C: one pass over memory, with the zeros counted on the way."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np
import torch

from torchreg.kernels import threads, toolchain
from torchreg.kernels.plan import COLUMNS, COUNTS, HYPERS, Plan

PIECE_SIZE = 1 << 18
DTYPES = (torch.float32, torch.float64)

_SOURCE = Path(__file__).with_name("prox_sgd.c")


class _Plan(ctypes.Structure):
    _fields_ = [
        ("table", ctypes.c_void_p),
        ("tensors", ctypes.c_int64),
        ("pieces", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("piece_size", ctypes.c_int64),
        ("hypers", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
    ]


@functools.cache
def unavailable() -> str | None:
    """Why there is no compiled kernel on this machine, or None. Builds it, once."""
    try:
        toolchain.library("prox_sgd", _source())
    except toolchain.Unavailable as reason:
        return str(reason)
    return None


def run(plan: Plan) -> None:
    """One step of every tensor of the plan."""
    count = plan.pieces.shape[1]
    if not count:
        return
    library = toolchain.library("prox_sgd", _source())
    function = library.prox_sgd_float32 if plan.dtype == torch.float32 else library.prox_sgd_float64
    plan.hypers = np.ascontiguousarray(plan.hypers)
    view = _Plan(
        plan.table.ctypes.data,
        plan.table.shape[1],
        plan.pieces.ctypes.data,
        count,
        plan.piece_size,
        plan.hypers.ctypes.data,
        plan.counts.data_ptr(),
    )
    sizes = plan.table[COLUMNS.index("size")]
    threads.run(function, ctypes.byref(view), sizes, plan.pieces, plan.piece_size)


@functools.cache
def _source() -> str:
    names = {"COLUMN": COLUMNS, "HYPER": HYPERS, "COUNT": COUNTS}
    enums = "".join(
        f"enum {{ {', '.join(f'{prefix}_{name}' for name in entries)}, {prefix}S }};\n"
        for prefix, entries in names.items()
    )
    guard = "#ifndef T\n" + enums + "#endif\n"
    return guard + _SOURCE.read_text(encoding="utf-8")

"""The proximal SGD step on the CPU, compiled from C: one pass over memory, with the zeros counted on the way."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchreg.kernels import toolchain
from torchreg.kernels.plan import COLUMNS, COUNTS, HYPERS, Plan

PIECE_SIZE = 1 << 18
DTYPES = (torch.float32, torch.float64)

_THREADED = 1 << 18  # elements: below, starting threads costs more than they save
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
    _in_parts(function, ctypes.byref(view), _cuts(plan))


def _cuts(plan: Plan) -> list[int]:
    """Where the pieces are divided among threads: as many as torch uses where there is enough to do."""
    count = plan.pieces.shape[1]
    sizes = plan.table[COLUMNS.index("size")]
    if torch.get_num_threads() == 1 or sizes.sum() < _THREADED:
        return [0, count]
    owner, start = plan.pieces
    ends = np.cumsum(np.minimum(sizes[owner] - start, plan.piece_size))
    shares = np.linspace(0, ends[-1], torch.get_num_threads() + 1)[1:-1]
    return sorted({0, *(int(cut) for cut in np.searchsorted(ends, shares)), count})


def _in_parts(function: Any, plan: Any, cuts: list[int]) -> None:
    """Call the kernel for each part, on a thread each (it runs without the interpreter's lock)."""
    calls = [(plan, ctypes.c_int64(a), ctypes.c_int64(b)) for a, b in itertools.pairwise(cuts)]
    waiting = [_pool(os.getpid(), len(calls)).submit(function, *call) for call in calls[1:]]
    function(*calls[0])
    for future in waiting:
        future.result()


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="torchreg")


@functools.cache
def _source() -> str:
    names = {"COLUMN": COLUMNS, "HYPER": HYPERS, "COUNT": COUNTS}
    enums = "".join(
        f"enum {{ {', '.join(f'{prefix}_{name}' for name in entries)}, {prefix}S }};\n"
        for prefix, entries in names.items()
    )
    guard = "#ifndef T\n" + enums + "#endif\n"
    return guard + _SOURCE.read_text(encoding="utf-8")

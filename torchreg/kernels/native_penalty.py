"""A penalty's value and gradients on the CPU, compiled from C: one pass over the memory of all weights."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchreg.kernels import threads, toolchain
from torchreg.kernels.penalty_table import ROWS, STRENGTHS, PenaltyTable
from torchreg.kernels.pieces import cut

PIECE_SIZE = 1 << 18
DTYPES = (torch.float32, torch.float64)

_STREAMED = 1 << 23  # bytes of results: above, little of them would be found in the cache again
_SOURCE = Path(__file__).with_name("penalty.c")


class _Table(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*ROWS, *STRENGTHS)),
        ("owner", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("piece_size", ctypes.c_int64),
        ("factor", ctypes.c_double),
        ("partials", ctypes.c_void_p),
        ("streams", ctypes.c_int64),
        ("fetches", ctypes.c_int64),
    ]


@functools.cache
def unavailable() -> str | None:
    """Why there is no compiled kernel on this machine, or None. Builds it, once."""
    return toolchain.obstacle(_library)


def value(table: PenaltyTable) -> float:
    """Σ l1·Σ|w| + l2·Σw² over all tensors, summed in float64; the number of threads does not change it."""
    pieces = cut(table.sizes, PIECE_SIZE)
    partials = np.zeros(pieces.shape[1])
    _run("value", table, pieces, partials=partials.ctypes.data)
    return float(partials.sum())


def gradient(table: PenaltyTable, factor: float) -> None:
    """Write ``factor·(l1·sign(w) + 2·l2·w)``, and the gradient where there is one added, into every ``out``."""
    streams = sum(table.sizes) * table.dtype.itemsize > _STREAMED
    _run("gradient", table, cut(table.sizes, PIECE_SIZE), factor=factor, streams=streams, fetches=_fetches())


@functools.cache
def _fetches() -> bool:
    """Whether gradients are sooner there if asked for ahead: an AMD processor of 2024 takes a quarter longer then."""
    return not toolchain.is_amd()


def _run(name: str, table: PenaltyTable, pieces: Any, **fields: float) -> None:
    if not pieces.shape[1]:
        return
    function = getattr(_library(), f"{name}_{str(table.dtype).removeprefix('torch.')}")
    rows = (*table.table, *table.strengths, *pieces[:2])
    view = _Table(*(row.ctypes.data for row in rows), PIECE_SIZE, **fields)
    threads.run(function, ctypes.byref(view), pieces)


@functools.cache
def _library() -> ctypes.CDLL:
    return toolchain.library("penalty", _SOURCE.read_text(encoding="utf-8"))

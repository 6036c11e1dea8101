"""A penalty's value and gradients on the CPU, compiled from C: one pass over the memory of all weights."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreg.kernels import threads, toolchain
from torchreg.kernels.penalty_table import ROWS, STRENGTHS, PenaltyTable
from torchreg.kernels.pieces import cut

PIECE_SIZE = 1 << 18
DTYPES = (torch.float32, torch.float64)

_NOTED, _WORDS = 512, 32  # weights whose signs are noted together, and the words of 32 bits that it takes
_BY_SIGN = 1 << 21  # bytes of weights: above, reading them again takes longer than noting signs
_STREAMED = 1 << 23  # bytes of results: above, little of them would be found in the cache again
_NEVER, _NEAR, _FAR = range(3)  # which cache is asked for what comes later
_SOURCE = Path(__file__).with_name("penalty.c")


class _Table(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*ROWS, *STRENGTHS)),
        ("owner", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("piece_size", ctypes.c_int64),
        ("factor", ctypes.c_double),
        ("partials", ctypes.c_void_p),
        ("signs", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("streams", ctypes.c_int64),
        ("fetches", ctypes.c_int64),
    ]


@functools.cache
def unavailable() -> str | None:
    """Why there is no compiled kernel on this machine, or None. Builds it, once."""
    return toolchain.obstacle(_library)


def room(table: PenaltyTable) -> Tensor | None:
    """Memory for the signs of all weights, two bits each, where a gradient needs no more and reading them again costs.

    That is with L1 alone in float32, and with more weights than the caches of one core have room for.
    """
    l1, l2 = table.strengths
    lasso = l1.all() and not l2.any()
    if table.device.type != "cpu" or table.dtype != torch.float32 or not lasso or _bytes(table) <= _BY_SIGN:
        return None
    return torch.empty(_first(table.sizes)[-1], dtype=torch.int32)


def value(table: PenaltyTable, signs: Tensor | None = None) -> float:
    """Σ l1·Σ|w| + l2·Σw² over all tensors, summed in float64; the number of threads does not change it.

    Where there is `room`, the signs of the weights are noted in ``signs``.
    """
    pieces = cut(table.sizes, PIECE_SIZE)
    partials = np.zeros(pieces.shape[1])
    _run("value", table, pieces, signs, partials=partials.ctypes.data, fetches=_fetches()[0])
    return float(partials.sum())


def gradient(table: PenaltyTable, factor: float, signs: Tensor | None = None) -> None:
    """Write ``factor·(l1·sign(w) + 2·l2·w)``, and the gradient where there is one added, into every ``out``.

    With the ``signs`` that were noted, the weights themselves are hardly read.
    """
    pieces, streams = cut(table.sizes, PIECE_SIZE), _bytes(table) > _STREAMED
    _run("gradient", table, pieces, signs, factor=factor, streams=streams, fetches=_fetches()[1])


def _bytes(table: PenaltyTable) -> int:
    return sum(table.sizes) * table.dtype.itemsize


@functools.lru_cache(maxsize=32)
def _first(sizes: tuple[int, ...]) -> Any:
    """Where the signs of every tensor begin, and where those of the last one end: int64, in words."""
    return np.cumsum([0, *(size // _NOTED * _WORDS for size in sizes)])


@functools.cache
def _fetches() -> tuple[int, int]:
    """Which cache is asked for memory ahead of its use, by the value and by the gradient.

    On an AMD processor of 2024, fetching into the second level makes the value a tenth slower than fetching into the
    first, and any fetching makes the gradient a quarter slower.
    """
    return (_NEAR, _NEVER) if toolchain.is_amd() else (_FAR, _FAR)


def _run(name: str, table: PenaltyTable, pieces: Any, signs: Tensor | None, **fields: float) -> None:
    if not pieces.shape[1]:
        return
    view = _Table(*_rows(table.table), *_rows(table.strengths), *_rows(pieces)[:2], PIECE_SIZE, **fields)
    first = _first(table.sizes)
    if signs is not None:
        view.signs, view.first = signs.data_ptr(), first.ctypes.data
    threads.run(_function(name, table.dtype, signs is not None), ctypes.byref(view), pieces)


def _rows(table: Any) -> list[int]:
    """The address of every row of a table whose rows are contiguous."""
    first = table.ctypes.data
    return [first + i * table.strides[0] for i in range(len(table))]


@functools.cache
def _function(name: str, dtype: torch.dtype, noted: bool) -> Any:
    return getattr(_library(), f"{name}_{str(dtype).removeprefix('torch.')}{'_by_sign' if noted else ''}")


@functools.cache
def _library() -> ctypes.CDLL:
    return toolchain.library("penalty", _SOURCE.read_text(encoding="utf-8"))

"""Gram matrices, compiled from C for processors on which torch's products of matrices are slow."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreg.kernels import threads, toolchain
from torchreg.linear.data import blas

_FEWEST = 1 << 20  # products, samples and columns, below which torch is as fast
_SHORTEST, _NARROWEST = 256, 20
_LENGTHS = 264, 1000  # samples of a block that is copied, at least and at most
_BLOCK = 1 << 20  # numbers in it
_GAP = 8  # numbers between a column's copy and the next: strides are whole cache lines, and seldom a power of two
_STRIPE = 256  # columns that are mirrored at a time


@functools.cache
def unavailable() -> str | None:
    """Why there is no compiled product on this machine, or None. Builds it, once."""
    return toolchain.obstacle(_function)


def pays(samples: int, columns: int, rows: int, like: Tensor) -> bool:
    """Whether so many rows of a Gram matrix are made faster here than by torch.

    Args:
        samples, columns: of the matrix.
        rows: at most as many as columns.
        like: a tensor of its dtype and device.
    """
    large = samples >= _SHORTEST and columns >= _NARROWEST and samples * columns * rows >= _FEWEST
    served = like.device.type == "cpu" and like.dtype == torch.float64
    return large and served and blas.is_slow() and unavailable() is None


def inner(x: Tensor) -> Tensor:
    """XᵀX, of a copy of a block of rows at a time: (n, p) -> (p, p)."""
    samples, features = x.shape
    shortest, longest = _LENGTHS
    length = max(shortest, min(longest, _BLOCK // features // 8 * 8))
    found = x.new_zeros(features, features)
    room = x.new_empty(features, length + _GAP)
    for start in range(0, samples, length):
        block = x[start : start + length]
        add(room[:, : len(block)].copy_(block.T), 0, found)
    return mirrored(found)


def add(rows: Tensor, first: int, found: Tensor, places: Tensor | None = None) -> None:
    """Add RRᵀ from row `first` on to `found`, of each row only what is not beyond the diagonal.

    Args:
        rows: R of shape (k, n) in float64, each row in one piece.
        first: the row of RRᵀ that is the first one of `found`.
        found: shape (k - first, k) in float64, likewise.
        places: of R's rows among those given, of which there may be others then.
    """
    count = len(rows) if places is None else len(places)
    kept = None if places is None else places.contiguous()
    where = None if kept is None else kept.data_ptr()
    table = _Gram(rows.data_ptr(), where, rows.stride(0), rows.shape[1], first, found.data_ptr(), found.stride(0))
    pieces = np.zeros((3, count - first), dtype=np.int64)
    pieces[2] = np.arange(first + 1, count + 1) * rows.shape[1]
    threads.run(_function(), ctypes.byref(table), pieces)


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix of which this holds the lower triangle, in place."""
    for start in range(0, len(lower), _STRIPE):
        stripe = slice(start, start + _STRIPE)
        lower[:start, stripe] = lower[stripe, :start].T
        block = lower[stripe, stripe]
        block.add_(block.tril(-1).T)
    return lower


class _Gram(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("found", ctypes.c_void_p),
        ("width", ctypes.c_int64),
    )


@functools.cache
def _function() -> Any:
    text = Path(__file__).with_name("gram.c").read_text(encoding="utf-8")
    function = toolchain.library("gram", text).torchreg_gram
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64], None
    return function

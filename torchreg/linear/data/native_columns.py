"""Products with some columns of a matrix that lies in columns, compiled from C: torch would copy the columns first."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreg.kernels import threads, toolchain
from torchreg.linear.data import blas

_FEWEST = 1 << 16  # numbers in a matrix: below, torch's products are made sooner than ours begin
_TYPES = {torch.float32: "float", torch.float64: "double"}


@functools.cache
def unavailable() -> str | None:
    """Why there are no compiled products on this machine, or None. Builds them, once."""
    return toolchain.obstacle(*(functools.partial(_library, dtype) for dtype in _TYPES))


def serves(x: Tensor) -> bool:
    """Whether there are products for this matrix: on the CPU, float32 or float64, large, each column in one piece."""
    large = x.numel() >= _FEWEST and x.device.type == "cpu"
    return large and x.dtype in _TYPES and x.stride(0) == 1 and unavailable() is None


def most_rows() -> int:
    """Residuals up to which `dots` is as fast as a general product of matrices."""
    return 8 if blas.is_slow() else 2


def dots(
    x: Tensor, residuals: Tensor, runs: Sequence[slice], places: Tensor | None = None, means: Tensor | None = None
) -> Tensor:
    """R(X − 1mᵀ) of some columns, in float64.

    Args:
        x: shape (n, p), of a kind that is served.
        residuals: R of shape (m, n) in float64.
        runs: the samples that are read.
        places: of the columns, all without.
        means: m of shape (p,) in float64, zero without.

    Returns:
        shape (m, places).
    """
    places = None if places is None else places.contiguous()
    count = x.shape[1] if places is None else len(places)
    residuals, found = residuals.contiguous(), residuals.new_zeros(len(residuals), count)
    means = None if means is None else means.contiguous()
    for run in runs:
        samples, part = x[run], residuals[:, run]
        products = _products(samples, places)
        products.residuals, products.rows, products.total = part.data_ptr(), len(part), part.stride(0)
        products.found, products.means = found.data_ptr(), None if means is None else means.data_ptr()
        pieces = np.broadcast_to(np.array([0, 0, len(samples) * len(part)]).reshape(3, 1), (3, count))
        threads.run(_library(x.dtype).torchreg_dots, ctypes.byref(products), pieces)
    return found


def combination(x: Tensor, places: Tensor, w: Tensor, runs: Sequence[slice]) -> Tensor:
    """Some columns, each times its weight, summed in float64.

    Args:
        x: shape (n, p), of a kind that is served.
        places: of the columns.
        w: shape (places,) in float64.
        runs: the samples that are read; of others the sum is 0.

    Returns:
        shape (n,).
    """
    total, places, w = w.new_zeros(len(x)), places.contiguous(), w.contiguous()
    for run in runs:
        products = _products(x[run], places)
        _library(x.dtype).torchreg_combine(ctypes.byref(products), w.data_ptr(), total[run].data_ptr())
    return total


class _Products(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("places", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("residuals", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("total", ctypes.c_int64),
        ("found", ctypes.c_void_p),
        ("means", ctypes.c_void_p),
    )


def _products(x: Tensor, places: Tensor | None) -> _Products:
    where, count = (None, x.shape[1]) if places is None else (places.data_ptr(), len(places))
    return _Products(x.data_ptr(), x.stride(1), len(x), where, count)


@functools.cache
def _library(dtype: torch.dtype) -> Any:
    value = _TYPES[dtype]
    text = Path(__file__).with_name("columns.c").read_text(encoding="utf-8")
    library = toolchain.library(f"columns-{value}", f"#define VALUE {value}\n{text}")
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.torchreg_dots.argtypes = [pointer, integer, integer]
    library.torchreg_combine.argtypes = [pointer, pointer, pointer]
    library.torchreg_dots.restype = library.torchreg_combine.restype = None
    return library

"""Coordinate descent and conjugate gradients on columns of a sparse design, compiled from C."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np

from torchreg.kernels import toolchain
from torchreg.linear.data.sparse_design import CONSTANT, Sparse
from torchreg.linear.lasso.problem import Strength

_TYPES = {"float32": "float", "float64": "double"}


@functools.cache
def unavailable() -> str | None:
    """Why there are no compiled sweeps on this machine, or None. Builds them, once."""
    return toolchain.obstacle(*(functools.partial(_library, name) for name in _TYPES))


class Quadratic:
    """½ Σ h·(Zd)² − t·Zd + l1·Σ|w + d| + ½·l2·Σ(w + d)² for the columns Z of a sparse design and weights h.

    Args:
        design: with at most 2³¹ entries.
        centred: whether the columns' means under the weights are taken off; t sums to 0 then.
        positive: whether w + d ≥ 0 is asked for.
    """

    def __init__(self, design: Sparse, centred: bool, positive: bool = False) -> None:
        x = design.x
        self.features = design.features
        self.rounding = CONSTANT * design.eps
        self.w = np.zeros(self.features)
        self.squares = np.full(self.features, np.nan)
        self.means = np.zeros(self.features) if centred else None
        self._kept = [np.ascontiguousarray(x.data)]
        self._kept += [np.ascontiguousarray(a, dtype=np.int32) for a in (x.indices, x.indptr)]
        self._library = _library(x.dtype.name)
        self._c = _Quadratic(samples=design.samples, positive=positive)
        self._point(**dict(zip(("values", "rows", "starts"), self._kept, strict=True)))
        self._point(squares=self.squares, means=self.means)

    def _point(self, **arrays: Any) -> None:
        for name, array in arrays.items():
            setattr(self._c, name, None if array is None else array.ctypes.data)

    def weigh(self, weights: Any, index: Any, means: Any = None) -> None:
        """Set the weights h, and with them the squares and means of some columns.

        Args:
            weights: shape (n,), or one number for all.
            index: the columns.
            means: shape (features,), if they are known.
        """
        h = None if np.ndim(weights) == 0 else np.ascontiguousarray(weights, dtype=np.float64)
        self._weights = h  # which is kept as long as its address is
        self._c.weight = float(weights) if h is None else 0.0
        self._c.total = self._c.samples * self._c.weight if h is None else float(h.sum())
        if means is not None:
            self.means = means
        self._point(weights=h, means=self.means)
        index = np.ascontiguousarray(index, dtype=np.int64)
        self._library.torchreg_weigh(
            ctypes.byref(self._c), index.ctypes.data, len(index), self.rounding, int(means is not None)
        )

    def descend(self, t: Any, index: Any, strength: Strength, least: float, limit: int) -> int:
        """Change `w` in some columns until no √square times a change exceeds `least`. The sweeps and gradients.

        Args:
            t: shape (n,).
            index: the columns, all of them weighed; no other coefficient is changed.
            strength: l1 and l2.
            least: what does not count as a change.
            limit: the most sweeps and gradients.

        Raises:
            MemoryError: if there is no room for some vectors of their length.
        """
        c, index = self._c, np.ascontiguousarray(index, dtype=np.int64)
        t = np.array(t, dtype=np.float64)
        self._point(t=t, w=self.w)
        c.shift, c.l1, c.l2 = 0.0, strength.l1, strength.l2
        done = self._library.torchreg_descend(ctypes.byref(c), index.ctypes.data, len(index), least, limit)
        if done < 0:
            raise MemoryError(f"No room for vectors of {len(index)} numbers.")
        return int(done)

    def combine(self, w: Any) -> Any:
        """Xw for coefficients (features,), of which only those that are not zero cost anything."""
        out = np.empty(self._c.samples)
        self._library.torchreg_combine(ctypes.byref(self._c), w.ctypes.data, self.features, out.ctypes.data)
        return out


class _Quadratic(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "rows", "starts")),
        ("samples", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("weight", "total")),
        *((name, ctypes.c_void_p) for name in ("means", "squares", "t", "w")),
        *((name, ctypes.c_double) for name in ("shift", "l1", "l2")),
        ("positive", ctypes.c_int32),
    )


@functools.cache
def _library(dtype: str) -> Any:
    value = _TYPES[dtype]
    text = Path(__file__).with_name("sparse.c").read_text(encoding="utf-8")
    library = toolchain.library(f"sparse-{value}", f"#define VALUE {value}\n{text}")
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    library.torchreg_descend.argtypes = [pointer, pointer, integer, real, integer]
    library.torchreg_descend.restype = integer
    library.torchreg_combine.argtypes = [pointer, pointer, integer, pointer]
    library.torchreg_combine.restype = None
    library.torchreg_weigh.argtypes = [pointer, pointer, integer, real, ctypes.c_int]
    library.torchreg_weigh.restype = None
    return library

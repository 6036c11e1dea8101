"""A sparse data matrix, centred and weighted without filling it in."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from torchreg.linear.data.columns import Columns
from torchreg.linear.data.design import Design

CONSTANT = 64.0  # roundings of a column's square: what is left of a constant column when its mean is taken off

_BLOCK = 1 << 20  # non-zeros that are squared at a time


class Sparse(Design):
    """A scipy matrix of shape (samples, features) in CSC format, on the CPU.

    Args:
        x: in float32 or float64.
        mean: column means (features,) in float64; None for no centring.
        root: square roots of the sample weights (samples,), whose squares sum to the number of samples.
    """

    device = torch.device("cpu")

    def __init__(self, x: Any, mean: Tensor | None = None, root: Tensor | None = None) -> None:
        self.x = x
        self.samples, self.features = x.shape
        self.eps = float(np.finfo(x.dtype).eps)
        self.mean = None if mean is None else mean.numpy()
        self.root = None if root is None else root.numpy()
        self.weights = None if self.root is None else self.root**2

    @cached_property
    def squares(self) -> Any:
        """ΣZ²/n of each column."""
        squares = np.concatenate([np.zeros(0), *map(self._sums_of_squares, *self._blocks())]) / self.samples
        if self.mean is None:
            return squares
        left = squares - self.mean**2
        return np.where(left <= CONSTANT * self.eps * squares, 0.0, left)

    def _blocks(self) -> tuple[Any, Any]:
        """The first columns of blocks of some million non-zeros, and those after their last."""
        starts = np.searchsorted(self.x.indptr[:-1], np.arange(0, max(1, self.x.nnz), _BLOCK))
        starts = np.unique(starts[starts < self.features])
        return starts, np.append(starts[1:], self.features)

    def _sums_of_squares(self, start: int, stop: int) -> Any:
        """ΣVX² of some columns."""
        bounds = self.x.indptr[start : stop + 1]
        inside = slice(bounds[0], bounds[-1])
        data = self.x.data[inside].astype(np.float64) ** 2
        if self.weights is not None:
            data *= self.weights[self.x.indices[inside]]
        sums = np.add.reduceat(np.append(data, 0.0), bounds[:-1] - bounds[0])
        sums[np.diff(bounds) == 0] = 0
        return sums

    def columns(self) -> Columns:
        """An empty set of columns, whose non-zeros are copied when they are added."""
        return _SparseColumns(self)

    def correlations(self, residuals: Tensor) -> Tensor:
        """RZ/n, by one product with X."""
        return self.pulls(self.x, slice(None), residuals)

    def pulls(self, x: Any, index: Any, residuals: Tensor) -> Tensor:
        """RZ/n for the columns with this index, which are x in X."""
        r = residuals.numpy()
        if self.root is not None:
            r = r * self.root
        found = np.asarray(x.T @ r.T, dtype=np.float64).T
        if self.mean is not None:
            found -= r.sum(1, keepdims=True) * self.mean[index]
            found[:, self.squares[index] == 0] = 0
        return torch.from_numpy(np.ascontiguousarray(found / self.samples))

    def fitted(self, w: Tensor) -> Tensor:
        """WZᵀ, by one product with X."""
        return torch.from_numpy(self.predict(self.x, self.mean, w.numpy()))

    def predict(self, x: Any, mean: Any, w: Any) -> Any:
        """Of some columns of Z with their means, for rows of coefficients."""
        found = np.asarray(x @ w.T, dtype=np.float64).T
        if mean is not None:
            found -= (w @ mean)[:, None]
        return found if self.root is None else found * self.root

    def gram(self) -> Tensor:
        """ZᵀZ/n, dense."""
        columns = self.columns()
        return columns.add(torch.arange(self.features, device="cpu"))


class _SparseColumns(Columns):
    def __init__(self, design: Sparse) -> None:
        self._design = design
        self._x = design.x[:, :0]
        self._index = np.empty(0, dtype=np.int64)

    def add(self, index: Tensor, out: Tensor | None = None) -> Tensor:
        design, new = self._design, index.numpy()
        x = design.x[:, new]
        self._x = x if not len(self._index) else sparse.hstack([self._x, x], format="csc")
        self._index = np.concatenate([self._index, new])
        left = x.T.astype(np.float64)
        if design.weights is not None:
            left = left.multiply(design.weights).tocsr()
        inner = np.asarray((left @ self._x).toarray()) / max(1, design.samples)
        if design.mean is not None:
            inner -= np.outer(design.mean[new], design.mean[self._index])
            inner[design.squares[new] == 0] = 0
            inner[:, design.squares[self._index] == 0] = 0
        products = torch.from_numpy(inner)
        return products if out is None else out.copy_(products)

    def combine(self, coefficients: Tensor) -> Tensor:
        mean = self._design.mean
        held = None if mean is None else mean[self._index]
        return torch.from_numpy(self._design.predict(self._x, held, coefficients.numpy()))

    def correlations(self, residuals: Tensor, places: Tensor) -> Tensor:
        here = places.numpy()
        return self._design.pulls(self._x[:, here], self._index[here], residuals)


def sparse_mean(x: Any, weights: Tensor | None) -> Tensor:
    """Column means of a sparse matrix in float64, with weights that sum to the number of rows."""
    ones = np.ones(x.shape[0]) if weights is None else weights.numpy()
    return torch.from_numpy(np.asarray(x.T @ ones, dtype=np.float64) / x.shape[0])

"""Columns of a design in memory, and their inner products under weights that change from step to step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from torchreg.linear.data.design import Dense, Design, Held, inner
from torchreg.linear.data.sparse_design import Sparse
from torchreg.linear.lasso.problem import NOT_FINITE
from torchreg.linear.logistic.loss import Curvature

_BLOCK, _SHORTEST = 1 << 18, 256  # elements, and samples, that are weighted at a time


class WeightedColumns(ABC):
    """Some columns of Z, as many as have been added."""

    @abstractmethod
    def add(self, index: Tensor) -> None:
        """Take in more columns."""

    @abstractmethod
    def combine(self, coefficients: Tensor) -> Tensor:
        """Sums of all held columns: (rows, held) -> (rows, n)."""

    @abstractmethod
    def correlations(self, slopes: Tensor) -> Tensor:
        """Inner products with each held column: (rows, n) -> (rows, held)."""

    @abstractmethod
    def inner(self, first: Tensor, second: Tensor | None, weights: Tensor) -> Tensor:
        """Σ v·z·z′ for columns `first` and `second`, both the same if that is None; weights are non-negative then."""

    def hessian(self, curvature: Curvature, active: Tensor) -> tuple[Tensor, Tensor]:
        """The second derivative in the active coefficients, and mixed with the intercepts.

        Args:
            curvature: of the scores.
            active: which coefficients, (rows, held) of bool.

        Returns:
            shapes (active, active) and (active, rows).

        Raises:
            ValueError: if the columns are too large for float64.
        """
        index = [torch.nonzero(row).squeeze(1) for row in active]
        ends = np.cumsum([0, *(len(i) for i in index)])
        matrix = torch.empty(ends[-1], ends[-1], dtype=torch.float64, device=active.device)
        mixed = matrix.new_empty(ends[-1], len(index))
        for k, first in enumerate(index):
            rows = slice(ends[k], ends[k + 1])
            weights = torch.stack([curvature.between(k, m) for m in range(len(index))])
            mixed[rows] = self.correlations(weights)[:, first].T
            matrix[rows, rows] = self.inner(first, None, weights[k])
            for m in range(k):
                columns = slice(ends[m], ends[m + 1])
                if len(first) and len(index[m]):
                    block = self.inner(first, index[m], weights[m])
                    matrix[rows, columns], matrix[columns, rows] = block, block.T
        if not bool(matrix.isfinite().all()):
            raise ValueError(NOT_FINITE)
        return matrix, mixed


def weighted_columns(design: Design) -> WeightedColumns:
    """An empty set of columns."""
    if isinstance(design, Sparse):
        return _SparseColumns(design)
    assert isinstance(design, Dense)
    return _DenseColumns(design)


class _DenseColumns(WeightedColumns):
    def __init__(self, design: Dense) -> None:
        self._held = Held(design)

    def add(self, index: Tensor) -> None:
        self._held.add(index)

    def combine(self, coefficients: Tensor) -> Tensor:
        return coefficients @ self._held.rows

    def correlations(self, slopes: Tensor) -> Tensor:
        return slopes @ self._held.rows.T

    def inner(self, first: Tensor, second: Tensor | None, weights: Tensor) -> Tensor:
        rows = self._held.rows

        def block(index: Tensor, samples: slice) -> Tensor:
            return rows[:, samples].index_select(0, index)

        return _in_blocks(block, first, second, weights)


class WholeColumns(WeightedColumns):
    """All columns of a dense design, of which no copy is made."""

    def __init__(self, design: Dense) -> None:
        self._design = design

    def add(self, index: Tensor) -> None:
        """Nothing: all columns are held from the beginning."""

    def combine(self, coefficients: Tensor) -> Tensor:
        """By one product with X."""
        return self._design.fitted(coefficients)

    def correlations(self, slopes: Tensor) -> Tensor:
        """By one product with X."""
        return self._design.correlations(slopes) * self._design.samples

    def inner(self, first: Tensor, second: Tensor | None, weights: Tensor) -> Tensor:
        """In blocks of samples."""
        x, mean = self._design.x, self._design.mean

        def block(index: Tensor, samples: slice) -> Tensor:
            rows = x[samples].T.index_select(0, index).double()
            return rows if mean is None else rows.sub_(mean[index].unsqueeze(1))

        return _in_blocks(block, first, second, weights)


def _in_blocks(
    block: Callable[[Tensor, slice], Tensor], first: Tensor, second: Tensor | None, weights: Tensor
) -> Tensor:
    """Σ v·z·z′ over blocks of samples that stay in the cache."""
    other = first if second is None else second
    total = torch.zeros(len(first), len(other), dtype=torch.float64, device=weights.device)
    if second is None:
        weights = weights.sqrt()
    step = max(_SHORTEST, _BLOCK // max(1, len(first)))
    for start in range(0, len(weights), step):
        samples = slice(start, start + step)
        left = block(first, samples).mul_(weights[samples])
        total += inner(left.T) if second is None else left @ block(other, samples).T
    return total


class _SparseColumns(WeightedColumns):
    """Columns in CSC format, whose means are not subtracted."""

    def __init__(self, design: Sparse) -> None:
        self._design = design
        self._x = design.x[:, :0]
        self._mean = np.empty(0)
        self._constant = np.empty(0, dtype=bool)

    def add(self, index: Tensor) -> None:
        design, new = self._design, index.numpy()
        self._x = sparse.hstack([self._x, design.x[:, new]], format="csc").astype(np.float64)
        mean = np.zeros(len(new)) if design.mean is None else design.mean[new]
        self._mean = np.concatenate([self._mean, mean])
        self._constant = np.concatenate([self._constant, design.squares[new] == 0])

    def combine(self, coefficients: Tensor) -> Tensor:
        w = coefficients.numpy()
        return torch.from_numpy(np.ascontiguousarray((self._x @ w.T).T - (w @ self._mean)[:, None]))

    def correlations(self, slopes: Tensor) -> Tensor:
        r = slopes.numpy()
        found = (self._x.T @ r.T).T - r.sum(1, keepdims=True) * self._mean
        found[:, self._constant] = 0
        return torch.from_numpy(np.ascontiguousarray(found))

    def inner(self, first: Tensor, second: Tensor | None, weights: Tensor) -> Tensor:
        a, b, v = first.numpy(), (first if second is None else second).numpy(), weights.numpy()
        left, right = self._x[:, a], self._x[:, b]
        weighted = left.T.multiply(v).tocsr()
        found = np.asarray((weighted @ right).toarray())
        mean, other = self._mean[a], self._mean[b]
        found -= np.outer(left.T @ v, other) + np.outer(mean, right.T @ v) - v.sum() * np.outer(mean, other)
        found[self._constant[a]] = 0
        found[:, self._constant[b]] = 0
        return torch.from_numpy(found)

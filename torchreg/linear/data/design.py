"""The data matrix of a linear model as the solvers see it: centred and weighted, without a copy of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchreg.linear.data import native_columns, native_gram
from torchreg.linear.data.columns import CONSTANT, HARMLESS, Columns, DenseColumns, weighted

_BLOCK = 1 << 22  # elements that are held in float64 at a time
_FEW = 1 << 20  # likewise of columns that are centred
_NARROWEST = 64  # columns of a product that is as fast as a wide one
_LOOKED_AT = 8  # samples, which tell of a mean that may be far larger than a column's deviations
_LOST = {torch.float64: 2.5e-13, torch.float32: 3e-5}
"""The part of a product with X that may be lost to a large mean: eps times the ratio of mean and deviation."""


class Design(ABC):
    """Z = √V(X − 1mᵀ) with weights V and column means m, of which only X is held. All results are float64."""

    samples: int
    features: int
    device: torch.device
    eps: float
    """The relative rounding error of X's own dtype."""
    mean: Any
    """Column means in float64, a tensor or an array; None for no centring."""
    selective: bool = False
    """Whether the correlations of some columns cost no more than their share of those of all."""

    @abstractmethod
    def columns(self) -> Columns:
        """An empty set of columns."""

    @abstractmethod
    def correlations(self, residuals: Tensor) -> Tensor:
        """RZ/n for residuals R of shape (m, n): shape (m, features)."""

    def some_correlations(self, residual: Tensor, places: Tensor) -> Tensor:
        """rZ/n for one residual r of shape (n,) and the columns in these places, of a selective design."""
        raise NotImplementedError

    @abstractmethod
    def fitted(self, w: Tensor) -> Tensor:
        """WZᵀ for rows of coefficients W of shape (m, features): shape (m, n)."""

    @abstractmethod
    def gram(self) -> Tensor:
        """ZᵀZ/n, of shape (features, features)."""


@dataclass(frozen=True)
class Dense(Design):
    """A dense matrix of shape (samples, features) in float32 or float64, in rows, in columns or strided."""

    x: Tensor
    mean: Tensor | None = None
    """Column means in float64; None for no centring."""
    root: Tensor | None = None
    """Square roots of the sample weights in float64, whose squares sum to the number of samples."""

    @property
    def samples(self) -> int:  # type: ignore[override]
        """The number of rows."""
        return self.x.shape[0]

    @property
    def features(self) -> int:  # type: ignore[override]
        """The number of columns."""
        return self.x.shape[1]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where X is."""
        return self.x.device

    @property
    def eps(self) -> float:  # type: ignore[override]
        """The relative rounding error of X's own dtype."""
        return torch.finfo(self.x.dtype).eps

    def columns(self) -> Columns:
        """An empty set of columns."""
        return DenseColumns(self.x, self.mean, self.root)

    def rows(self, index: Tensor) -> Tensor:
        """Some columns of Z as rows, (k, n) in float64. Constant columns are zero if they are centred."""
        rows = self.x.T[index].double()
        if self.mean is not None:
            mean = self.mean[index].unsqueeze(1)
            rows -= mean
            constant = rows.square().mean(1, keepdim=True) < (CONSTANT * self.eps * mean).square()
            rows.masked_fill_(constant, 0)
        return rows if self.root is None else rows.mul_(self.root)

    def centred(self, index: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Some columns of Z or all, a few at a time, as `rows`: which ones of the index, and they."""
        index = torch.arange(self.features, device=self.device) if index is None else index
        step = max(1, _FEW // max(1, self.samples))
        for start in range(0, len(index), step):
            here = slice(start, min(start + step, len(index)))
            yield here, self.rows(index[here])

    def centred_products(self, residuals: Tensor, index: Tensor | None = None) -> Tensor:
        """RZ for some columns or all, from centred copies of a few: (m, n) -> (m, columns)."""
        found = residuals.new_empty(len(residuals), self.features if index is None else len(index))
        for here, rows in self.centred(index):
            torch.mm(residuals, rows.T, out=found[:, here])
        return found

    def centred_sum(self, w: Tensor, index: Tensor | None = None) -> Tensor:
        """WZᵀ likewise, for coefficients of these columns: (m, columns) -> (m, n)."""
        total = w.new_zeros(len(w), self.samples)
        for here, rows in self.centred(index):
            total.addmm_(w[:, here], rows)
        return total

    @cached_property
    def far(self) -> Tensor:
        """Columns with such large means, beside deviations, that products with X less those with means lose digits.

        Constant ones are among them: all that is left of those would be rounding. A few samples tell which may be.
        """
        if self.mean is None:
            return torch.empty(0, dtype=torch.long, device=self.device)
        most = (self.eps / _LOST[self.x.dtype] * self.mean).square()
        square = (self.x[:_LOOKED_AT].double() - self.mean).square().mean(0)
        suspects = torch.nonzero(square < most).squeeze(1)
        if not len(suspects):
            return suspects
        square = self.mean.new_empty(len(suspects))
        for here, rows in replace(self, root=None).centred(suspects):
            torch.mean(rows.square_(), 1, out=square[here])
        return suspects[square < most[suspects]]

    def correlations(self, residuals: Tensor) -> Tensor:
        """RZ/n, by one product with X, and from centred copies of columns with large means."""
        if self._in_place and len(residuals) <= native_columns.most_rows():
            return self._dots(residuals)
        rooted = residuals if self.root is None else residuals * self.root
        found = self._product(rooted.to(self.x.dtype)).double()
        if self.mean is not None:
            found -= rooted.sum(1, keepdim=True) * self.mean
        if len(self.far):
            found[:, self.far] = self.centred_products(residuals, self.far)
        return found / self.samples

    def some_correlations(self, residual: Tensor, places: Tensor) -> Tensor:
        """rZ/n for one residual r of shape (n,) and the columns in these places, of a selective design."""
        return self._dots(residual.unsqueeze(0), places)[0]

    def _dots(self, residuals: Tensor, places: Tensor | None = None) -> Tensor:
        """RZ/n, compiled, of some columns or all. Large means are taken off each number, others off the sums."""
        if self.root is not None:
            residuals = residuals * self.root
        far = len(self.far) > 0
        found = native_columns.dots(self.x, residuals, self._runs, places, self.mean if far else None)
        if self.mean is not None and not far:
            found -= residuals.sum(1, keepdim=True) * (self.mean if places is None else self.mean[places])
        return found / self.samples

    @cached_property
    def _runs(self) -> list[slice]:
        return weighted(self.root, self.samples)

    @property
    def selective(self) -> bool:  # type: ignore[override]
        """Where there are compiled products with its columns."""
        return self._in_place

    @cached_property
    def _in_place(self) -> bool:
        return native_columns.serves(self.x)

    def _product(self, rows: Tensor) -> Tensor:
        """Rows times X: (m, n) -> (m, features)."""
        first, *others = (self._part(rows, run) for run in self._runs)
        for part in others:
            first += part
        return first

    def _part(self, rows: Tensor, run: slice) -> Tensor:
        """Rows times X, over some samples."""
        x, rows = self.x[run], rows[:, run]
        if len(rows) == 1:
            return (x.T @ rows[0]).unsqueeze(0)
        return (x.T @ rows.T).T if x.stride(0) == 1 else rows @ x

    def fitted(self, w: Tensor) -> Tensor:
        """WZᵀ, by one product with X, and from centred copies of columns with large means."""
        near = w.index_fill(1, self.far, 0) if len(self.far) else w
        found = (near.to(self.x.dtype) @ self.x.T).double()
        if self.mean is not None:
            found -= (near @ self.mean).unsqueeze(1)
        if self.root is not None:
            found *= self.root
        return found + self.centred_sum(w[:, self.far], self.far) if len(self.far) else found

    def gram(self) -> Tensor:
        """ZᵀZ/n by one product; in blocks of rows where X must be centred, weighted or widened first."""
        if self.root is None and self.x.dtype == torch.float64:
            whole = inner(self.x)
            if self.mean is None:
                return whole.div_(self.samples)
            whole.div_(self.samples).addr_(self.mean, self.mean, alpha=-1)
            if bool((self.mean.square() <= HARMLESS * whole.diagonal()).all()):
                return whole
        total = torch.zeros(self.features, self.features, dtype=torch.float64, device=self.device)
        step = max(1, _BLOCK // max(1, self.features))
        for start in range(0, self.samples, step):
            block = self.x[start : start + step].double()
            if self.mean is not None:
                block = block - self.mean
            if self.root is not None:
                block = block * self.root[start : start + step, None]
            total += inner(block)
        total /= self.samples
        if self.mean is not None:
            constant = total.diagonal() < (CONSTANT * self.eps * self.mean).square()
            total.masked_fill_(constant, 0).masked_fill_(constant.unsqueeze(1), 0)
        return total


class Held:
    """Columns of Z as rows of a buffer that doubles when it is full."""

    def __init__(self, design: Dense) -> None:
        self._design, self._count = design, 0
        self._buffer = torch.empty(0, design.samples, dtype=torch.float64, device=design.device)

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> Tensor:
        """The columns, (held, n)."""
        return self._buffer[: self._count]

    def add(self, index: Tensor) -> Tensor:
        """Copy more columns: those, (new, n)."""
        new = self._design.rows(index)
        start, self._count = self._count, self._count + len(new)
        if self._count > len(self._buffer):
            room = min(max(2 * self._count, 128), self._design.features)
            grown = self._buffer.new_empty(room, self._design.samples)
            grown[:start] = self._buffer[:start]
            self._buffer = grown
        self._buffer[start : self._count] = new
        return new


def inner(x: Tensor) -> Tensor:
    """XᵀX, of which a lower half of blocks is computed: torch has no symmetric product.

    NumPy has one, but in what BLAS: for a processor newer than itself that may be the slowest kernel of all.
    """
    features = x.shape[1]
    if native_gram.pays(len(x), features, features, x):
        return native_gram.inner(x)
    step, found = max(_NARROWEST, features // 8), x.new_empty(features, features)
    for start in range(0, features, step):
        end = min(start + step, features)
        torch.mm(x[:, start:end].T, x[:, :end], out=found[start:end, :end])
        found[:start, start:end] = found[start:end, :start].T
    return found


def means_and_moment(x: Tensor, root: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
    """Column means of a matrix, and Zᵀz/n for a centred target z, in one pass over it; compiled.

    Both are sums of differences from one of the samples: of a constant column nothing is left, and others lose no digit
    to a large mean.

    Args:
        x: X of shape (n, p), of a kind that `native_columns` serves.
        root: √V of shape (n,), or none: square roots of weights that sum to n.
        target: z of shape (n,), weighted by √V.
    """
    rows = torch.stack([torch.ones_like(target), target] if root is None else [root.square(), root * target])
    runs = weighted(root, len(x))
    reference = x[runs[0].start].double()
    shift, moment = native_columns.dots(x, rows, runs, means=reference) / len(x)
    return reference + shift, moment - rows[1].mean() * shift


def weighted_mean(x: Tensor, weights: Tensor | None) -> Tensor:
    """Column means of a matrix in float64, with weights that sum to the number of rows."""
    if x.dtype == torch.float64 or not len(x):
        return x.mean(0, dtype=torch.float64) if weights is None else weights @ x / x.shape[0]
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    step = max(1, _BLOCK // max(1, x.shape[1]))  # torch would widen all of X at once
    for start in range(0, len(x), step):
        block = x[start : start + step].double()
        total += block.sum(0) if weights is None else weights[start : start + step] @ block
    return total / len(x)


def mean_squares(design: Design) -> Tensor:
    """ΣZ²/n of each column."""
    if not isinstance(design, Dense):
        return torch.from_numpy(design.squares)  # type: ignore[attr-defined]
    n, x = max(1, design.samples), design.x
    if design.root is None and x.dtype == torch.float64:
        squares = torch.linalg.vector_norm(x, dim=0).square() / n
    else:
        step = max(1, _BLOCK // n)
        weights = x.new_ones(len(x), dtype=torch.float64) if design.root is None else design.root.square()
        parts = [weights @ x[:, i : i + step].double().square() / n for i in range(0, x.shape[1], step)]
        squares = torch.cat(parts)
    if design.mean is None:
        return squares
    squares = (squares - design.mean.square()).clamp(min=0)
    for here, rows in design.centred(design.far):
        squares[design.far[here]] = rows.square_().sum(1) / n
    return squares

"""Some columns of a data matrix, as many as are needed, and their inner products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from torchreg.linear.data import native_columns, native_gram

HARMLESS = 100.0  # a mean square this many times the variance costs two digits of a Gram matrix
CONSTANT = 16.0  # a column that varies by fewer roundings of its mean than this is constant
_BLOCK, _SHORTEST = 1 << 20, 256  # elements, and samples, that are read at a time
_RUNS = 8  # of samples with weight, at most: in more and shorter ones a product takes longer than it saves
_COPIED = 8  # one column in so many may be copied where each lies scattered over the rows of X


def weighted(root: Tensor | None, samples: int) -> list[slice]:
    """Runs of samples that hold all weight: a fold's others, which lie together, need not be read."""
    whole = [slice(0, samples)]
    if root is None:
        return whole
    changes = torch.nonzero(torch.diff((root > 0).to(torch.int8))).squeeze(1)
    if not 0 < len(changes) <= _RUNS:
        return whole
    bounds = [0, *(changes + 1).tolist(), samples]
    return [slice(*bounds[i : i + 2]) for i in range(0 if float(root[0]) > 0 else 1, len(bounds) - 1, 2)]


def _common_weight(root: Tensor | None, runs: list[slice]) -> float | None:
    """The weight of the samples in these runs if they have the same one."""
    if root is None:
        return 1.0
    bounds = [bound for run in runs for bound in root[run].aminmax()]
    return float(bounds[0]) ** 2 if bool((torch.stack(bounds) == bounds[0]).all()) else None


class Columns(ABC):
    """Some columns of a design, as many as have been added."""

    @abstractmethod
    def add(self, index: Tensor, out: Tensor | None = None) -> Tensor:
        """Take in more columns and return their inner products over n with all that are in, shape (new, all).

        Args:
            index: of the new ones.
            out: where the products go, if there is room for them already.
        """

    @abstractmethod
    def combine(self, coefficients: Tensor) -> Tensor:
        """Sums of all columns, one for each row of the coefficients: (m, all) -> (m, n)."""

    @abstractmethod
    def correlations(self, residuals: Tensor, places: Tensor) -> Tensor:
        """RZ/n of the columns in these places, for residuals R of shape (m, n): shape (m, places)."""


class DenseColumns(Columns):
    """Columns of a dense Z = √V(X − 1mᵀ), read from X block by block.

    Where X lies in rows a copy in X's own dtype is kept while it is small: there each entry read costs a cache line.

    Args:
        x: shape (samples, features).
        mean: m in float64, if there is one.
        root: √V in float64, likewise.
    """

    def __init__(self, x: Tensor, mean: Tensor | None, root: Tensor | None) -> None:
        self._x, self._mean, self._root = x, mean, root
        self._runs = weighted(root, len(x))
        self._lies_in_columns, self._in_place = x.stride(0) == 1, native_columns.serves(x)
        self._weight = _common_weight(root, self._runs)
        self._index = torch.empty(0, dtype=torch.long, device=x.device)
        self._room = 0 if self._lies_in_columns else x.shape[1] // _COPIED
        self._copy = x.new_empty(0, x.shape[0])
        self._constant = torch.empty(0, dtype=torch.bool, device=x.device)
        self._far = False
        """Whether any mean is so large that products of differences are not differences of products."""
        self._copies = not self._lies_in_columns or x.dtype != torch.float64 or self._weight is None
        """Whether products are made of copies: of columns that lie scattered, or are weighted, widened or, once a mean
        has been too large for anything else, centred."""

    def add(self, index: Tensor, out: Tensor | None = None) -> Tensor:
        """By one product of the new columns with all."""
        start = len(self._index)
        self._index = torch.cat([self._index, index])
        self._keep(index)
        count = len(self._index)
        products = self._x.new_empty(len(index), count, dtype=torch.float64) if out is None else out
        self._multiply(start, products)
        if self._mean is None:
            return products
        squares = products[:, start:].diagonal()
        if not (self._far or bool((self._mean[index].square() <= HARMLESS * squares).all())):
            self._far = True
            self._multiply(start, products)
        if self._far:
            eps = torch.finfo(self._x.dtype).eps
            constant = products[:, start:].diagonal() < (CONSTANT * eps * self._mean[index]).square()
            before = self._constant.new_zeros(start - len(self._constant))
            self._constant = torch.cat([self._constant, before, constant])
            products.masked_fill_(self._constant, 0).masked_fill_(constant.unsqueeze(1), 0)
        return products

    def combine(self, coefficients: Tensor) -> Tensor:
        """Of those alone that have coefficients."""
        places = torch.nonzero(coefficients.any(0)).squeeze(1)
        w = coefficients[:, places]
        if self._in_place and len(w) == 1 and not self._far:
            found = native_columns.combination(self._x, self._index[places], w[0], self._runs).unsqueeze(0)
        else:
            found = w.new_zeros(len(w), len(self._x))
            for samples in self._blocks(len(places)):
                torch.mm(w, self._rows(samples, places), out=found[:, samples])
        if self._mean is not None and not self._far:
            found -= (w @ self._mean[self._index[places]]).unsqueeze(1)
        return found if self._root is None else found.mul_(self._root)

    def correlations(self, residuals: Tensor, places: Tensor) -> Tensor:
        """By products with blocks of samples."""
        if self._root is not None:
            residuals = residuals * self._root
        if self._in_place and len(residuals) <= native_columns.most_rows() and not self._far:
            found = native_columns.dots(self._x, residuals, self._runs, self._index[places])
        else:
            found = residuals.new_zeros(len(residuals), len(places))
            for samples in self._blocks(len(places)):
                found += residuals[:, samples] @ self._rows(samples, places).T
        if self._mean is not None and not self._far:
            found -= residuals.sum(1, keepdim=True) * self._mean[self._index[places]]
        return found.div_(max(1, len(self._x)))

    def _keep(self, index: Tensor) -> None:
        """Copy more columns while there is room for all."""
        count = len(self._index)
        start = count - len(index)
        if count > self._room:
            self._copy = self._copy[:0].clone()
            return
        if count > len(self._copy):
            grown = self._copy.new_empty(min(max(2 * count, 128), self._room), len(self._x))
            grown[:start] = self._copy[:start]
            self._copy = grown
        self._copy[start:count] = self._x.T[index]

    def _multiply(self, start: int, total: Tensor) -> None:
        """Write ZᵀZ/n of the columns from `start` on with all."""
        total.zero_()
        symmetric = native_gram.pays(len(self._x), len(self._index), len(total), total)
        if symmetric and not (self._copies or self._far):
            if self._multiply_in_place(start, total):
                return
            self._copies = True
            total.zero_()
        for samples in self._blocks(len(self._index)):
            if symmetric:
                native_gram.add(self._centred(samples), start, total)
            else:
                self._add_products(samples, start, total)
        if symmetric:
            native_gram.mirrored(total[:, start:])
        total.div_(max(1, len(self._x)))

    def _multiply_in_place(self, start: int, total: Tensor) -> bool:
        """As `_multiply`, of X's own columns; False if means are so large that this would cost digits."""
        assert self._weight is not None
        for run in self._runs:
            native_gram.add(self._x[run].T, start, total, self._index)
        native_gram.mirrored(total[:, start:])
        total.mul_(self._weight / max(1, len(self._x)))
        if self._mean is None:
            return True
        mean, square = self._mean[self._index], total[:, start:].diagonal()
        if not bool(((2 * mean[start:].square() <= square) & square.isfinite()).all()):
            return False
        total.addr_(mean[start:], mean, alpha=-1)
        return True

    def _centred(self, samples: slice) -> Tensor:
        """Columns as `_rows` has them, centred and weighted, each in one piece."""
        rows = self._rows(samples)
        if self._mean is not None and not self._far:
            rows = rows - self._mean[self._index].unsqueeze(1)
        if self._root is not None:
            rows = rows * self._root[samples]
        return rows.contiguous()

    def _add_products(self, samples: slice, start: int, total: Tensor) -> None:
        """By a general product of matrices. Unless means are large only one side is centred."""
        right = self._rows(samples)
        left = right[start:]
        if self._mean is not None and not self._far:
            left = left - self._mean[self._index[start:]].unsqueeze(1)
        if self._root is not None:
            left = left * self._root[samples].square()
        total.addmm_(left, right.T)

    def _blocks(self, columns: int) -> Iterator[slice]:
        """Samples that are read at a time."""
        step = max(_SHORTEST, _BLOCK // max(1, columns))
        return (slice(i, min(i + step, run.stop)) for run in self._runs for i in range(run.start, run.stop, step))

    def _rows(self, samples: slice, places: Tensor | None = None) -> Tensor:
        """Columns in some places, or all, as rows in float64; less their means if these are large."""
        index = self._index if places is None else self._index[places]
        if len(self._copy):
            rows = self._copy[: len(self._index), samples]
            rows = rows if places is None else rows.index_select(0, places)
        elif self._lies_in_columns:
            rows = self._x.T[:, samples].index_select(0, index)
        else:
            rows = self._x[samples].index_select(1, index).T
        rows = rows.double()
        return rows if self._mean is None or not self._far else rows - self._mean[index].unsqueeze(1)

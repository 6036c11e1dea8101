"""A weight cut into groups: their sums, norms and maxima, all groups at once and without copies of the weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

_LONG = 1 << 16
"""Weights of a group up to which torch's norm is exact to a few units in the last place of float32 on a CPU."""


class Cut(ABC):
    """Groups of a weight of a known shape.

    Values of groups are vectors with one entry for each. Sums and maxima are taken of tensors that are `arranged`, and
    `spread` values broadcast to those.

    Attributes:
        count: the number of groups.
        sizes: the number of weights in each: an int where all are alike, else an int64 vector.
        loose: whether the last group stands for weights that are in none.
    """

    count: int
    sizes: int | Tensor
    loose: bool = False
    spans: bool = False
    """Whether groups reach beyond what this process holds, so that sums are taken by several processes together."""
    agreed: bool = True
    """Whether all who take part in a sum take part in the same ones, so that they may stop an iteration together."""

    def gathered(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors that are cut together as one that can be `arranged`."""
        return tensors[0]

    def parted(self, x: Tensor) -> list[Tensor]:
        """The other way round."""
        return [x]

    @abstractmethod
    def arranged(self, x: Tensor) -> Tensor:
        """A view of ``x``, of the weight's shape, in which the groups are told apart by dimensions."""

    @abstractmethod
    def sums(self, y: Tensor) -> Tensor:
        """The sum of each group of an arranged tensor."""

    @abstractmethod
    def maxima(self, y: Tensor) -> Tensor:
        """The largest of each group of an arranged tensor without negative entries; there are no empty groups."""

    @abstractmethod
    def norms(self, y: Tensor) -> Tensor:
        """‖y‖₂ of each group of an arranged tensor, real; its derivative at a zero group is zero."""

    @abstractmethod
    def spread(self, values: Tensor) -> Tensor:
        """The value of each group at all its weights: a tensor that broadcasts to arranged ones."""

    def alive(self, tensors: Sequence[Tensor]) -> Tensor:
        """Which groups of the tensors cut together have a weight that is not zero: bool, without a loose one."""
        nonzero = self.arranged(self.gathered([t != 0 for t in tensors]))
        if isinstance(self.sizes, int) and self.sizes == 1:
            return nonzero.reshape(-1)
        return (self.sums(nonzero.float()) > 0)[: self.count - self.loose]

    def run(self, x: Tensor) -> int | None:
        """The size of the groups if each is a run of neighbours in the memory of the dense tensor ``x``, else None."""
        return None

    def labels(self, shape: Sequence[int]) -> Tensor:
        """The group of every weight of this shape, that of the cut: an int64 tensor that broadcasts to it."""
        raise NotImplementedError(f"{type(self).__name__} is of several tensors: each has labels of its own.")

    def sums_of(self, *tensors: Tensor) -> list[Tensor]:
        """The `sums` of several arranged tensors."""
        return [self.sums(y) for y in tensors]


class Grid(Cut):
    """Groups that are told apart by the ``kept`` dimensions of a view of the ``shape``."""

    def __init__(self, shape: tuple[int, ...], kept: tuple[int, ...]) -> None:
        self.shape = shape
        self.inner = [dim for dim in range(len(shape)) if dim not in kept]
        self.grid = tuple(size if dim in kept else 1 for dim, size in enumerate(shape))
        self.count = math.prod(self.grid)
        self.sizes = math.prod([shape[dim] for dim in self.inner])

    def arranged(self, x: Tensor) -> Tensor:
        return x if x.shape == self.shape else x.view(self.shape)

    def sums(self, y: Tensor) -> Tensor:
        return (y.sum(self.inner) if self.inner else y).reshape(-1)

    def maxima(self, y: Tensor) -> Tensor:
        return (y.amax(self.inner) if self.inner else y).reshape(-1)

    def norms(self, y: Tensor) -> Tensor:
        if not self.inner:
            return y.abs().reshape(-1)
        if isinstance(self.sizes, int) and self.sizes <= _LONG and _along_memory(y, self.inner):
            return torch.linalg.vector_norm(y, dim=self.inner).reshape(-1)
        return _root(self.sums(_squares(y)))  # torch's norm is slow across memory, and inexact for many weights

    def spread(self, values: Tensor) -> Tensor:
        return values.reshape(self.grid)

    def labels(self, shape: Sequence[int]) -> Tensor:
        ids, at, merged = torch.arange(self.count).view(self.grid), 0, []
        expanded = list(self.grid)
        for size in shape:  # made of one or more dimensions of the view
            start, product = at, 1
            while at == start or (product != size and at < len(self.shape)):
                product *= self.shape[at]
                at += 1
            if any(self.grid[d] != 1 for d in range(start, at)):
                expanded[start:at] = self.shape[start:at]
                merged.append(size)
            else:
                merged.append(1)
        return ids.expand(expanded).reshape(merged)

    def run(self, x: Tensor) -> int | None:
        y = self.arranged(x)
        outwards = sorted((stride, dim) for dim, stride in enumerate(y.stride()) if y.shape[dim] > 1)
        is_inner = [dim in self.inner for _, dim in outwards]
        return max(1, math.prod(y.shape[dim] for dim in self.inner)) if is_inner == sorted(is_inner)[::-1] else None


class Labelled(Cut):
    """Groups by labels of as many dimensions as the weight, which broadcast to it."""

    def __init__(self, shape: tuple[int, ...], labels: Tensor, sizes: Tensor) -> None:
        self._labels = labels
        self.inner = [dim for dim, size in enumerate(shape) if labels.shape[dim] != size]
        self.count = len(sizes)
        self.sizes = sizes * math.prod([shape[dim] for dim in self.inner])

    def arranged(self, x: Tensor) -> Tensor:
        return x

    def sums(self, y: Tensor) -> Tensor:
        partial = y.sum(self.inner, keepdim=True) if self.inner else y
        return partial.new_zeros(self.count).index_add(0, self._index(y), partial.reshape(-1))

    def maxima(self, y: Tensor) -> Tensor:
        partial = y.amax(self.inner, keepdim=True) if self.inner else y
        return partial.new_zeros(self.count).scatter_reduce(0, self._index(y), partial.reshape(-1), "amax")

    def norms(self, y: Tensor) -> Tensor:
        return _root(self.sums(_squares(y)))

    def spread(self, values: Tensor) -> Tensor:
        return values[self._labels.to(values.device)]

    def labels(self, shape: Sequence[int]) -> Tensor:
        return self._labels

    def _index(self, y: Tensor) -> Tensor:
        return self._labels.reshape(-1).to(y.device)


class Runs(Cut):
    """Groups of several tensors, which lie one after the other in a vector, cut into slices of a dimension.

    A slice is a run of neighbours there, and belongs to one group; those with the label −1 to none, which stand as one
    more group at the end, `loose`, whose size is given as 0.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        dims: Sequence[int],
        labels: Sequence[Tensor],
        count: int,
        device: torch.device,
    ) -> None:
        self.dims = list(dims)
        self.moved = [(shape[dim], *shape[:dim], *shape[dim + 1 :]) for shape, dim in zip(shapes, dims, strict=True)]
        self.grids = [(shape[0], math.prod(shape[1:])) for shape in self.moved]
        together = torch.cat([label.to(device) for label in labels])
        self.loose = any(bool((label < 0).any()) for label in labels)
        self.count = count + self.loose
        self.index = torch.where(together < 0, count, together)
        runs = [torch.full((slices,), length, device=device) for slices, length in self.grids]
        self.runs = torch.cat(runs)
        sizes = torch.zeros(self.count, dtype=torch.int64, device=device).index_add(0, self.index, self.runs)
        self.sizes = torch.cat([sizes[:count], sizes.new_zeros(1)]) if self.loose else sizes

    def gathered(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.movedim(dim, 0).reshape(-1) for t, dim in zip(tensors, self.dims, strict=True)])

    def parted(self, x: Tensor) -> list[Tensor]:
        pieces = x.split([slices * length for slices, length in self.grids])
        return [
            piece.view(shape).movedim(0, dim) for piece, shape, dim in zip(pieces, self.moved, self.dims, strict=True)
        ]

    def arranged(self, x: Tensor) -> Tensor:
        return x

    def sums(self, y: Tensor) -> Tensor:
        partial = torch.cat([rows.sum(1) for rows in self._rows(y)])
        return partial.new_zeros(self.count).index_add(0, self.index, partial)

    def maxima(self, y: Tensor) -> Tensor:
        partial = torch.cat([rows.amax(1) if rows.shape[1] else rows.sum(1) for rows in self._rows(y)])
        return partial.new_zeros(self.count).scatter_reduce(0, self.index, partial, "amax")

    def norms(self, y: Tensor) -> Tensor:
        return _root(self.sums(_squares(y)))

    def spread(self, values: Tensor) -> Tensor:
        total = sum(slices * length for slices, length in self.grids)
        return values[self.index].repeat_interleave(self.runs, output_size=total)

    def _rows(self, y: Tensor) -> list[Tensor]:
        """One row for each slice, tensor by tensor."""
        pieces = y.split([slices * length for slices, length in self.grids])
        return [piece.view(grid) for piece, grid in zip(pieces, self.grids, strict=True)]


def _squares(y: Tensor) -> Tensor:
    return (y * y.conj()).real if y.is_complex() else y * y


def _root(squares: Tensor) -> Tensor:
    """The square root, whose derivative is taken to be zero at zero."""
    return torch.where(squares == 0, 0, torch.where(squares == 0, 1, squares).sqrt())


def _along_memory(y: Tensor, dims: Sequence[int]) -> bool:
    """Whether neighbours in memory are of the same slice."""
    return any(y.stride(dim) == 1 for dim in dims if y.shape[dim] > 1)

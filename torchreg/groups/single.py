"""Groups of one weight: rows, columns, channels, kernels, heads, blocks, or any labelling."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchreg.cuts import Cut, Grid, Labelled
from torchreg.groups.base import Groups, checked_int, from_dict

NAMES: dict[str, tuple[int, ...]] = {
    "rows": (0,),
    "out_features": (0,),
    "out_channels": (0,),
    "filters": (0,),
    "columns": (1,),
    "in_features": (1,),
    "in_channels": (1,),
    "kernels": (0, 1),
    "tensor": (),
}
"""The dimensions whose indices tell the groups apart: one group for each row, each in-channel, each pair of channels.

They are those of the weights of linear layers and convolutions, (out, in, …). Those of a transposed convolution are
(in, out, …): its out-channels are the columns.
"""


@dataclasses.dataclass(frozen=True, repr=False)
class Slices(Groups):
    """One group for each index of some dimensions: all weights that share it.

    Args:
        dims: the dimensions that tell the groups apart; none makes the whole tensor one group.
        name: what the groups are called; see `NAMES`.

    Raises:
        ValueError: if a dimension is negative or given twice.
        TypeError: if one is no integer.

    >>> from torchreg.groups import Slices, as_groups
    >>> Slices((0,)).count((8, 3, 5, 5)), Slices((0,)).sizes((8, 3, 5, 5))
    (8, 75)
    >>> as_groups("kernels").count((8, 3, 5, 5))
    24
    """

    dims: tuple[int, ...]
    name: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        given = (self.dims,) if isinstance(self.dims, int) else tuple(self.dims)
        dims = tuple(checked_int("dims", dim, least=0) for dim in given)
        if len(set(dims)) != len(dims):
            raise ValueError(f"Expected `dims` to be different dimensions, got {given}.")
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(f"Expected `name` to be a string or None, got {self.name!r}.")
        object.__setattr__(self, "dims", tuple(sorted(dims)))

    def of(self, shape: Sequence[int]) -> Cut:  # noqa: D102
        missing = [dim for dim in self.dims if dim >= len(shape)]
        if missing:
            raise ValueError(
                f"Expected a weight with a dimension {missing[0]} for the groups {self}, got the shape {tuple(shape)}."
            )
        return Grid(tuple(shape), self.dims)

    def __repr__(self) -> str:
        return f"Slices(dims={self.dims})" if self.name is None else repr(self.name)

    def __str__(self) -> str:
        return self.name or repr(self)


@dataclasses.dataclass(frozen=True)
class Blocks(Groups):
    """Blocks of k neighbours along a dimension, by default the last.

    Args:
        k: the size of a block; it must divide the dimension.
        dim: the dimension, from the end if it is negative.

    Raises:
        ValueError: if k is below 1.
        TypeError: if k or the dimension is no integer.

    >>> from torchreg.groups import Blocks
    >>> Blocks(4).count((2, 12))
    6
    """

    k: int
    dim: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", checked_int("k", self.k, least=1))
        object.__setattr__(self, "dim", checked_int("dim", self.dim))

    def of(self, shape: Sequence[int]) -> Cut:  # noqa: D102
        dim = _dimension(self, self.dim, shape)
        if shape[dim] % self.k:
            raise ValueError(
                f"Expected k={self.k} of {self} to divide the size {shape[dim]} of dimension {dim} of the weight's "
                f"shape {tuple(shape)}."
            )
        arranged = (*shape[:dim], shape[dim] // self.k, self.k, *shape[dim + 1 :])
        return Grid(arranged, tuple(d for d in range(len(arranged)) if d != dim + 1))


@dataclasses.dataclass(frozen=True)
class Heads(Groups):
    """The heads of an attention layer's projection: equal parts of its rows, or of its columns.

    ``Heads(12)`` are those of a query, key or value projection, and ``Heads(12, dim=1)`` those of an output projection.
    ``Heads(12, packed=3)`` are those of query, key and value in one weight (3·E, E), such as the ``in_proj_weight`` of
    `torch.nn.MultiheadAttention`: the group of a head is its part of all three.

    Args:
        heads: how many there are; packed·heads must divide the dimension.
        packed: how many projections lie in the weight one after the other.
        dim: 0 for rows, 1 for columns.

    Raises:
        ValueError: if a number is below 1, or the dimension negative.
        TypeError: if one is no integer.

    >>> import torch
    >>> from torchreg.groups import Heads
    >>> attention = torch.nn.MultiheadAttention(8, num_heads=2)
    >>> cut = Heads(2, packed=3).of(attention.in_proj_weight.shape)
    >>> cut.count, cut.sizes  # 2 heads of 4 rows in each of query, key and value
    (2, 96)
    """

    heads: int
    packed: int = 1
    dim: int = 0

    def __post_init__(self) -> None:
        for name, least in (("heads", 1), ("packed", 1), ("dim", 0)):
            object.__setattr__(self, name, checked_int(name, getattr(self, name), least=least))

    def of(self, shape: Sequence[int]) -> Cut:  # noqa: D102
        dim = _dimension(self, self.dim, shape)
        parts = self.packed * self.heads
        if shape[dim] % parts:
            raise ValueError(
                f"Expected packed·heads={parts} of {self} to divide the size {shape[dim]} of dimension {dim} of the "
                f"weight's shape {tuple(shape)}."
            )
        return Grid((*shape[:dim], self.packed, self.heads, shape[dim] // parts, *shape[dim + 1 :]), (dim + 1,))


@dataclasses.dataclass(frozen=True, eq=False)
class Labels(Groups):
    """Any groups: weights with the same label are one.

    Args:
        labels: an int64 tensor of the weight's shape, or one that broadcasts to it, with the labels 0 … n − 1, each of
            which occurs. It is copied.

    Raises:
        ValueError: if a label is negative or missing.
        TypeError: if it is no int64 tensor.

    >>> import torch
    >>> from torchreg.groups import Labels
    >>> Labels(torch.tensor([0, 1, 1])).sizes((4, 3))  # of columns
    tensor([4, 8])
    """

    labels: Tensor
    _sizes: Tensor = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        allowed = "Expected `labels` to be an int64 tensor with the labels 0 … n − 1"
        if not isinstance(self.labels, Tensor):
            raise TypeError(f"{allowed}, got {type(self.labels).__name__}.")
        if self.labels.dtype != torch.int64 or self.labels.layout != torch.strided:
            raise TypeError(f"{allowed}, dense, got {self.labels.dtype} and the layout {self.labels.layout}.")
        if self.labels.numel() and int(self.labels.min()) < 0:
            raise ValueError(f"{allowed}, got the label {int(self.labels.min())}.")
        if self.labels.numel() and int(self.labels.max()) >= self.labels.numel():
            raise ValueError(f"{allowed}, got the label {int(self.labels.max())} among {self.labels.numel()}.")
        sizes = torch.bincount(self.labels.flatten())
        if bool((sizes == 0).any()):
            raise ValueError(f"{allowed}, each of which occurs; {int((sizes == 0).nonzero()[0])} does not.")
        object.__setattr__(self, "labels", self.labels.detach().clone())
        object.__setattr__(self, "_sizes", sizes)

    def of(self, shape: Sequence[int]) -> Cut:  # noqa: D102
        own, ndim = self.labels.shape, len(shape)
        lined_up = (1,) * (ndim - len(own)) + tuple(own)
        if len(own) > ndim or any(a not in (1, b) for a, b in zip(lined_up, shape, strict=True)):
            raise ValueError(
                f"Expected labels that broadcast to the weight's shape {tuple(shape)}, got the shape {tuple(own)}."
            )
        return Labelled(tuple(shape), self.labels.reshape(lined_up), self._sizes)

    def to(self, device: torch.device | str) -> Groups:  # noqa: D102
        moved = object.__new__(Labels)
        object.__setattr__(moved, "labels", self.labels.to(device))
        object.__setattr__(moved, "_sizes", self._sizes.to(device))
        return moved

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Labels):
            return NotImplemented
        a, b = self.labels, other.labels
        return a.shape == b.shape and a.device == b.device and torch.equal(a, b)

    def __hash__(self) -> int:
        return hash((Labels, tuple(self.labels.shape)))

    def __str__(self) -> str:
        return f"{len(self._sizes)} labels"


def as_groups(value: Any) -> Groups:
    """Groups from one of the `NAMES`, from their dict form, or as they are.

    >>> from torchreg.groups import as_groups
    >>> as_groups("rows") == as_groups("out_channels")
    True

    Raises:
        ValueError: if the name or dict form is unknown.
        TypeError: if it is nothing of that kind.
    """
    if isinstance(value, Groups):
        return value
    if isinstance(value, Mapping):
        return from_dict(value)
    if isinstance(value, str):
        if value not in NAMES:
            raise ValueError(f"Expected `groups` to be one of {', '.join(map(repr, NAMES))}, got {value!r}.")
        return Slices(NAMES[value], value)
    hint = "; a tensor of labels goes into torchreg.groups.Labels" if isinstance(value, Tensor) else ""
    raise TypeError(f"Expected `groups` to be a name or a value of torchreg.groups, got {type(value).__name__}{hint}.")


def _dimension(groups: Groups, dim: int, shape: Sequence[int]) -> int:
    """The dimension counted from the front, or raise where the weight has none such."""
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"Expected a weight with a dimension {dim} for {groups}, got the shape {tuple(shape)}.")
    return dim % len(shape)

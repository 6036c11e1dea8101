"""How an operation moves channels: the index that a channel has before it, and those that it has after it.

They are read from what autograd saves of an operation, because torch-pruning's own maps know fewer dimensions and take
the parts of a split in the order of their use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class IndexMap:
    """The identity; the others are its subclasses."""

    def forward(self, i: int) -> Sequence[int]:
        """Where channel ``i`` of the input is found in the output."""
        return (i,)

    def backward(self, i: int) -> Sequence[int]:
        """Which channels of the input are found at ``i`` of the output."""
        return (i,)

    def count(self, n: int) -> int:
        """How many channels there are behind it, for ``n`` before it."""
        return n


IDENTITY = IndexMap()


@dataclass(frozen=True)
class Part(IndexMap):
    """Every ``step``-th channel from ``start`` on: slices, and the parts of a split."""

    start: int
    size: int
    step: int = 1

    def forward(self, i: int) -> Sequence[int]:  # noqa: D102
        place, rest = divmod(i - self.start, self.step)
        return (place,) if not rest and 0 <= place < self.size else ()

    def backward(self, i: int) -> Sequence[int]:  # noqa: D102
        return (self.start + i * self.step,) if 0 <= i < self.size else ()

    def count(self, n: int) -> int:  # noqa: D102
        return self.size


@dataclass(frozen=True)
class Placed(IndexMap):
    """An input of a concatenation, which begins at ``start``."""

    start: int
    size: int

    def forward(self, i: int) -> Sequence[int]:  # noqa: D102
        return (self.start + i,) if i < self.size else ()

    def backward(self, i: int) -> Sequence[int]:  # noqa: D102
        return (i - self.start,) if 0 <= i - self.start < self.size else ()


@dataclass(frozen=True)
class Flattened(IndexMap):
    """A channel becomes ``k`` neighbours: what is flattened lies behind the channels."""

    k: int

    def forward(self, i: int) -> Sequence[int]:  # noqa: D102
        return range(i * self.k, (i + 1) * self.k)

    def backward(self, i: int) -> Sequence[int]:  # noqa: D102
        return (i // self.k,)

    def count(self, n: int) -> int:  # noqa: D102
        return n * self.k


@dataclass(frozen=True)
class Tiled(IndexMap):
    """A channel is found ``k`` times, at a distance of ``n``: what is flattened lies before the channels."""

    n: int
    k: int

    def forward(self, i: int) -> Sequence[int]:  # noqa: D102
        return range(i, self.n * self.k, self.n)

    def backward(self, i: int) -> Sequence[int]:  # noqa: D102
        return (i % self.n,)

    def count(self, n: int) -> int:  # noqa: D102
        return n * self.k


@dataclass(frozen=True)
class Inverse(IndexMap):
    """Another map backwards."""

    of: IndexMap

    def forward(self, i: int) -> Sequence[int]:  # noqa: D102
        return self.of.backward(i)

    def backward(self, i: int) -> Sequence[int]:  # noqa: D102
        return self.of.forward(i)

    def count(self, n: int) -> int:  # noqa: D102
        return n // self.of.count(1)


def output_shape(grad_fn: Any, output: int = 0) -> tuple[int, ...] | None:
    """The shape of an operation's output."""
    metadata = getattr(grad_fn, "_input_metadata", None)
    return tuple(metadata[output].shape) if metadata and output < len(metadata) else None


def _dimension(grad_fn: Any, ndim: int) -> int:
    dim = int(grad_fn._saved_dim)
    return dim - 2**64 + ndim if dim >= 2**63 else dim  # autograd keeps −1 as an unsigned number


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _along_channels(shape: Sequence[int], dim: int, channels: int | None) -> bool:
    return dim == 1 and len(shape) != 3 if channels is None else dim >= 1 and shape[dim] == channels


def of_split(grad_fn: Any, output: int, channels: int | None) -> IndexMap:
    """The map to one output of ``split``, ``chunk``, ``tensor_split`` or ``unbind``."""
    if "Unbind" in grad_fn.name():
        parts = len(grad_fn._input_metadata)
        if int(grad_fn._saved_dim) or channels is None or channels % parts:
            return IDENTITY
        return Part(output * (channels // parts), channels // parts)  # query, key and value moved to the front
    shape = grad_fn._saved_self_sym_sizes
    dim = _dimension(grad_fn, len(shape))
    if not _along_channels(shape, dim, channels):
        return IDENTITY
    if hasattr(grad_fn, "_saved_split_sizes"):
        sizes = list(grad_fn._saved_split_sizes)
        return Part(sum(sizes[:output]), sizes[output])
    size = int(grad_fn._saved_split_size)
    return Part(output * size, min(size, shape[dim] - output * size))


def into(grad_fn: Any, position: int, channels: Sequence[int | None]) -> IndexMap:
    """The map from an input of an operation to its output.

    Args:
        grad_fn: autograd's node of the operation.
        position: which of its inputs.
        channels: how many channels each input has, where that is known.
    """
    name, shape = grad_fn.name(), output_shape(grad_fn)
    if shape is None:
        return IDENTITY
    if name.startswith("Cat"):
        sizes = [n for n in channels if n is not None]
        dim = _dimension(grad_fn, len(shape))
        if dim < 1 or len(sizes) < len(channels) or sum(sizes) != shape[dim]:
            return IDENTITY
        return Placed(sum(sizes[:position]), sizes[position])
    n = channels[position]
    if name.startswith("PixelShuffle") and n is not None:
        return Inverse(Flattened(int(grad_fn._saved_upscale_factor) ** 2))
    if name.startswith("PixelUnshuffle"):
        return Flattened(int(grad_fn._saved_downscale_factor) ** 2)
    if name.startswith("Glu"):
        halved = n is not None and n == 2 * shape[_dimension(grad_fn, len(shape))]
        return Inverse(Tiled(n // 2, 2)) if n is not None and halved else IDENTITY
    if name.startswith("Slice") and hasattr(grad_fn, "_saved_self_sym_sizes"):
        before = grad_fn._saved_self_sym_sizes
        dim = _dimension(grad_fn, len(before))
        if not _along_channels(before, dim, n):
            return IDENTITY
        start = _signed(int(grad_fn._saved_start))
        return Part(start + before[dim] if start < 0 else start, shape[dim], int(grad_fn._saved_step))
    if name.startswith("Select"):
        before = grad_fn._saved_self_sym_sizes
        if len(before) != 5 or _dimension(grad_fn, 5) or n is None or n % before[0]:
            return IDENTITY
        size = n // before[0]
        return Part(_signed(int(grad_fn._saved_index)) % before[0] * size, size)
    if "View" in name or "Reshape" in name:
        return _of_view(tuple(getattr(grad_fn, "_saved_self_sym_sizes", ())), shape, n)
    return IDENTITY


def _of_view(before: tuple[int, ...], after: tuple[int, ...], channels: int | None) -> IndexMap:
    if len(before) >= 3 and len(after) == 2 and before[0] == after[0]:
        rest = math.prod(before[2:])
        if channels == before[1] or (channels is None and len(before) > 3):
            return Flattened(rest) if rest > 1 else IDENTITY
        if channels == before[-1]:
            return Tiled(channels, math.prod(before[1:-1]))
    if len(before) == 2 and len(after) >= 4 and before[0] == after[0] and channels == before[1]:
        return Inverse(Flattened(math.prod(after[2:])))
    return IDENTITY

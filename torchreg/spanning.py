"""Groups of tensors that are spread over processes: sums of each process's part, added up over all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from torchreg import sharding
from torchreg.cuts import Cut, _root, _squares
from torchreg.groups import Shared
from torchreg.groups.base import Groups
from torchreg.sharding import Layout


@dataclasses.dataclass(eq=False)
class Piece:
    """What this process holds of a tensor, and the group of each weight.

    Attributes:
        labels: the groups, counted from ``start``: an int64 tensor that broadcasts to the part.
        shape: the shape of the part.
        where: the part's place.
        start: the number of groups of the tensors before.
        count: the number of groups of the whole tensor, or of all that share them.
    """

    labels: Tensor
    shape: tuple[int, ...]
    where: Layout
    start: int
    count: int


class Spanning(Cut):
    """Groups of several tensors, the parts of which that are here lie one after the other in a vector.

    Values of groups are of all groups of the whole tensors, the same in all processes.
    """

    spans = True

    def __init__(self, pieces: Sequence[Piece], sizes: Tensor, loose: bool = False) -> None:
        self.pieces = list(pieces)
        self.count, self.sizes, self.loose = len(sizes), sizes, loose
        self.agreed = len({piece.where.groups for piece in pieces}) <= 1

    def gathered(self, tensors: Sequence[Tensor]) -> Tensor:
        """The vector of these parts."""
        return torch.cat([t.reshape(-1) for t in tensors])

    def parted(self, x: Tensor) -> list[Tensor]:
        """The parts that a vector is made of."""
        parts = x.split([_size(p) for p in self.pieces])
        return [piece.view(p.shape) for piece, p in zip(parts, self.pieces, strict=True)]

    def arranged(self, x: Tensor) -> Tensor:  # noqa: D102
        return x

    def sums(self, y: Tensor) -> Tensor:  # noqa: D102
        return self.sums_of(y)[0]

    def sums_of(self, *tensors: Tensor) -> list[Tensor]:
        """The `sums` of several vectors, in one collective."""
        partial = [self._partial(y, add=True) for y in tensors]
        return self._together(sharding.summed, partial, torch.Tensor.add_)

    def maxima(self, y: Tensor) -> Tensor:  # noqa: D102
        return self._together(sharding.largest, [self._partial(y, add=False)], _maximum_)[0]

    def norms(self, y: Tensor) -> Tensor:  # noqa: D102
        return _root(self.sums(_squares(y)))

    def spread(self, values: Tensor) -> Tensor:  # noqa: D102
        spread = []
        for piece in self.pieces:
            own = values[piece.start : piece.start + piece.count]
            spread.append(own[piece.labels.to(values.device)].expand(piece.shape).reshape(-1))
        return torch.cat(spread)

    def _partial(self, y: Tensor, add: bool) -> dict[tuple[int, int, Layout], Tensor]:
        """The sums, or maxima, of what is here; of tensors that share groups and are held alike together."""
        found: dict[tuple[int, int, tuple[object, ...]], tuple[Layout, Tensor]] = {}
        for piece, part in zip(self.pieces, self.parted(y), strict=True):
            inner = [dim for dim, size in enumerate(piece.labels.shape) if size != piece.shape[dim]]
            labels = piece.labels.reshape(-1).to(y.device)
            key = piece.start, piece.count, piece.where.groups
            where, values = found.get(key) or (piece.where, y.new_zeros(piece.count))
            if part.numel():
                if add:
                    rows = part.sum(inner) if inner else part
                    values = values.index_add(0, labels, rows.reshape(-1))
                else:
                    rows = part.amax(inner) if inner else part
                    values = values.scatter_reduce(0, labels, rows.reshape(-1), "amax")
            found[key] = where, values
        return {(start, count, where): values for (start, count, _), (where, values) in found.items()}

    def _together(self, reduce, partial, combine):  # type: ignore[no-untyped-def]
        reduced = iter(reduce([t for one in partial for t in one.values()], [k[2] for one in partial for k in one]))
        results = []
        for one in partial:
            like = next(iter(one.values()))
            total = like.new_zeros(self.count)
            for start, count, _ in one:
                combine(total[start : start + count], next(reduced))
            results.append(total)
        return results


def joined(cuts: Sequence[Spanning]) -> Spanning:
    """Several cuts as one, whose vector is made of theirs."""
    pieces, start = [], 0
    for cut in cuts:
        pieces += [dataclasses.replace(piece, start=piece.start + start) for piece in cut.pieces]
        start += cut.count
    return Spanning(pieces, torch.cat([torch.as_tensor(cut.sizes).to(cuts[0].pieces[0].labels.device) for cut in cuts]))


def spanning(groups: Groups, weights: Sequence[Tensor]) -> Spanning:
    """The groups of whole tensors, as this process sees them."""
    if isinstance(groups, Shared):
        runs = groups.of_all([w.shape for w in weights])
        labels = [_of_slices(m.labels, m.dim, w.ndim) for m, w in zip(groups.members, weights, strict=True)]
        numbered = [torch.where(label < 0, groups.total, label) for label in labels]
        pieces = [_piece(label, w, 0, runs.count) for label, w in zip(numbered, weights, strict=True)]
        return Spanning(pieces, torch.as_tensor(runs.sizes).to(pieces[0].labels.device), runs.loose)
    pieces, sizes, start = [], [], 0
    for w in weights:
        cut = groups.of(w.shape)
        pieces.append(_piece(cut.labels(w.shape), w, start, cut.count))
        sizes.append(torch.as_tensor(cut.sizes).expand(cut.count))
        start += cut.count
    return Spanning(pieces, torch.cat(sizes).to(pieces[0].labels.device))


def _piece(labels: Tensor, w: Tensor, start: int, count: int) -> Piece:
    where = sharding.layout(w)
    return Piece(where.part(labels).to(sharding.local(w).device), tuple(where.local_shape()), where, start, count)


def _of_slices(labels: Tensor, dim: int, ndim: int) -> Tensor:
    """Labels of the slices of a dimension so that they broadcast to the tensor."""
    return labels.reshape([-1 if d == dim else 1 for d in range(ndim)])


def _size(piece: Piece) -> int:
    return torch.Size(piece.shape).numel()


def _maximum_(target: Tensor, values: Tensor) -> None:
    target.copy_(torch.maximum(target, values))

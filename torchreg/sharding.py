"""What this process holds of a tensor that is spread over several (a DTensor), and sums over all of them.

A tensor sharded by `torch.distributed.fsdp.fully_shard` or tensor parallelism is held in parts. Whatever treats each
weight by itself works on a part alone; here is what the rest needs: where the part lies in the whole, who holds the
others, and reductions over them, which take all tensors of a call in one collective.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_PLAIN = {Tensor, nn.Parameter}

_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a DTensor, be it only in one part. Of plain tensors only the type is looked at."""
    kind = type(t)
    if kind is Tensor or kind is nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # as long as nobody has imported it there are none
    return module is not None and isinstance(t, module.DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them is a DTensor."""
    kinds = set(map(type, tensors))
    if kinds <= _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in kinds)


def is_flat(p: Tensor) -> bool:
    """Whether FullyShardedDataParallel (FSDP1) holds a parameter as a share of one long vector, without its shape."""
    return getattr(p, "_fsdp_flattened", False)


def check_whole(model: nn.Module) -> None:
    """Raise ``ValueError`` if the parameters of a model are shares of FSDP1's flat vector now."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if kind is None:
        return
    for module in model.modules():
        if isinstance(module, kind) and module.training_state.name != "SUMMON_FULL_PARAMS":
            raise ValueError(
                "FullyShardedDataParallel holds the parameters as shares of one flat vector: look at them inside "
                "FullyShardedDataParallel.summon_full_params(model), or shard by torch.distributed.fsdp.fully_shard."
            )


@torch.no_grad()
def local(t: Tensor) -> Tensor:
    """The part that this process holds, sharing its memory; a plain tensor as it is."""
    if not is_sharded(t):
        return t
    part = t._local_tensor  # type: ignore[attr-defined]  # what to_local() takes longer for
    return part if type(part) is Tensor else t.to_local()  # type: ignore[attr-defined]


@torch.no_grad()
def whole(t: Tensor) -> Tensor:
    """All of a tensor, gathered from all processes; a plain one as it is."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined]


@torch.no_grad()
def beside(t: Any, p: Tensor) -> Any:
    """What of a tensor belongs to the part of ``p`` that this process holds.

    ``t`` is one number, or broadcasts to ``p``: a DTensor, perhaps of other placements, or a plain tensor that all
    processes have.
    """
    if not isinstance(t, Tensor) or not is_sharded(p) or (t.ndim == 0 and not is_sharded(t)):
        return local(t) if isinstance(t, Tensor) else t
    if is_sharded(t) and t.shape == p.shape and t.device_mesh == p.device_mesh:  # type: ignore[attr-defined]
        same = t.placements == p.placements  # type: ignore[attr-defined]
        return local(t if same else t.redistribute(p.device_mesh, p.placements))  # type: ignore[attr-defined]
    return layout(p).part(whole(t))


@torch.no_grad()
def sharded_like(part: Tensor, p: Tensor) -> Tensor:
    """A DTensor laid out like ``p`` whose part here is ``part``; for a plain ``p`` that itself."""
    if not is_sharded(p):
        return part
    kind: Any = sys.modules["torch.distributed.tensor"].DTensor
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return kind.from_local(part, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())


@dataclasses.dataclass(eq=False)
class Layout:
    """Where the part of a tensor that this process holds lies in the whole.

    Attributes:
        shape: that of the whole tensor.
        rows: for each dimension the positions that are here; None stands for all.
        owners: for each dimension a number for each position, which differs where other processes hold it; None if it
            is not sharded.
        groups: the process groups over which parts are to be summed, one after the other.
        here: whether this process is one of those that hold the tensor.
    """

    shape: torch.Size
    rows: list[Tensor | None]
    owners: list[Tensor | None]
    groups: tuple[Any, ...]
    here: bool = True

    def part(self, t: Tensor) -> Tensor:
        """The part of a whole tensor that broadcasts to ``shape``."""
        if not self.here:
            return t.new_empty(0)
        for dim, rows in enumerate(self.rows):
            own = dim - len(self.shape) + t.ndim
            if rows is not None and own >= 0 and t.shape[own] == self.shape[dim]:
                t = t.index_select(own, rows.to(t.device))
        return t

    def local_shape(self) -> list[int]:
        """The shape of the part."""
        if not self.here:
            return [0]
        return [n if rows is None else len(rows) for n, rows in zip(self.shape, self.rows, strict=True)]

    def offset(self) -> int:
        """The flat position of the first element of the part: a number that differs between parts."""
        first = [0 if rows is None or not len(rows) else int(rows[0]) for rows in self.rows]
        return sum(i * math.prod(self.shape[dim + 1 :]) for dim, i in enumerate(first))

    def seed(self) -> int:
        """What is added to the seeds of random numbers, so that parts have different ones, and replicas the same."""
        return self.offset() * 0x9E3779B1 & 0xFFFFFFFF

    def splits(self, labels: Tensor) -> bool:
        """Whether a label occurs in the parts of several processes.

        ``labels`` broadcasts to ``shape``. All processes come to the same answer.
        """
        for dim, owners in enumerate(self.owners):
            own = dim - len(self.shape) + labels.ndim
            if owners is None:
                continue
            if own < 0 or labels.shape[own] != self.shape[dim]:
                return True
            if self.splits_rows(dim, labels.movedim(own, 0).reshape(self.shape[dim], -1)):
                return True
        return False

    def splits_rows(self, dim: int, labels: Tensor) -> bool:
        """As `splits`, of labels that have a row for each position along a dimension."""
        owners = self.owners[dim]
        if owners is None:
            return False
        holders, flat = owners[:, None].expand(labels.shape).reshape(-1), labels.reshape(-1).cpu()
        count = int(flat.max()) + 1 if len(flat) else 0
        least = holders.new_full((count,), len(owners)).scatter_reduce(0, flat, holders, "amin")
        most = holders.new_full((count,), -1).scatter_reduce(0, flat, holders, "amax")
        return bool(((least != most) & (most >= 0)).any())


WHOLE = Layout(torch.Size(), [], [], ())
"""The layout of a tensor that every process has."""


def layout(p: Tensor) -> Layout:
    """Where the part of ``p`` lies that this process holds.

    Raises:
        TypeError: if ``p`` is placed in a way that is not known.
    """
    if not is_sharded(p):
        return Layout(p.shape, [None] * p.ndim, [None] * p.ndim, ())
    placed = p.device_mesh, p.placements, p.shape  # type: ignore[attr-defined]
    known, placed_then = _layouts.get(p, (None, None))
    if known is None or placed != placed_then:
        known = _layout(p)
        _layouts[p] = known, placed
    return known


def _layout(p: Any) -> Layout:
    mesh, here = p.device_mesh, p.device_mesh.get_coordinate()
    rows: list[Tensor | None] = [None] * p.ndim
    owners: list[Tensor | None] = [None] * p.ndim
    groups = []
    for dim in range(p.ndim):
        blocks, mine = [torch.arange(p.shape[dim])], 0
        for axis, placement in enumerate(p.placements):
            if not (placement.is_shard(dim) or (hasattr(placement, "split_factor") and placement.dim == dim)):
                continue
            blocks = [part for block in blocks for part in _cut(block, mesh.size(axis), placement)]
            mine = mine * mesh.size(axis) + (here[axis] if here is not None else 0)
        if len(blocks) > 1:
            rows[dim] = blocks[mine]
            owners[dim] = torch.empty(p.shape[dim], dtype=torch.int64)
            for owner, block in enumerate(blocks):
                owners[dim][block] = owner  # type: ignore[index]
    for axis, placement in enumerate(p.placements):
        sharded = placement.is_shard() or hasattr(placement, "split_factor")
        if not (sharded or placement.is_replicate()):
            raise TypeError(f"A parameter of shape {tuple(p.shape)} is placed as {placement}, which is not supported.")
        if sharded and mesh.size(axis) > 1 and here is not None:
            groups.append(mesh.get_group(axis))
    found = Layout(p.shape, rows, owners, tuple(groups), here is not None)
    if here is not None and found.local_shape() != list(p.to_local().shape):
        raise TypeError(
            f"A parameter of shape {tuple(p.shape)} is placed as {p.placements}, of which this process holds the shape "
            f"{tuple(p.to_local().shape)} instead of {tuple(found.local_shape())}: that is not supported."
        )
    return found


def _cut(block: Tensor, count: int, placement: Any) -> list[Tensor]:
    """The positions of a block that each of ``count`` processes holds."""
    strips = _chunks(block, int(getattr(placement, "split_factor", 1)))
    return [torch.cat(parts) for parts in zip(*(_chunks(strip, count) for strip in strips), strict=True)]


def _chunks(t: Tensor, count: int) -> list[Tensor]:
    """As `torch.chunk`, with empty ones for those that are missing."""
    chunks = list(t.chunk(count))
    return chunks + [t[:0]] * (count - len(chunks))


@torch.no_grad()
def summed(tensors: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
    """Each tensor summed over the processes that hold the other parts, all in one collective (per mesh dimension)."""
    return _reduced(tensors, layouts, "SUM")


@torch.no_grad()
def largest(tensors: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
    """The elementwise maximum over the processes that hold the other parts, NaN where one of them has NaN."""
    if not any(where.groups for where in layouts):
        return list(tensors)
    stacked = [torch.stack([t.nan_to_num(nan=-math.inf, posinf=math.inf), torch.isnan(t).to(t.dtype)]) for t in tensors]
    reduced = _reduced(stacked, layouts, "MAX")
    return [torch.where(unknown > 0, math.nan, value) for value, unknown in reduced]


@torch.no_grad()
def gathered(vectors: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor | None:
    """All vectors and those of the other parts in one, in some order, the same for all; None if there are none.

    Waits for a device where there are other parts, since they may be of other sizes.
    """
    by_groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for vector, where in zip(vectors, layouts, strict=True):
        by_groups.setdefault(where.groups, []).append(vector)
    results = []
    for groups, some in by_groups.items():
        together = torch.cat(some)
        for group in groups:
            together = _from_all(together, group)
        results.append(together)
    return torch.cat(results) if results else None


def _from_all(vector: Tensor, group: Any) -> Tensor:
    count = torch.distributed.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=vector.device) for _ in range(count)]
    torch.distributed.all_gather(sizes, torch.full_like(sizes[0], len(vector)), group)
    most = max(map(int, sizes))
    padded = [vector.new_empty(most) for _ in range(count)]
    torch.distributed.all_gather(padded, torch.cat([vector, vector.new_zeros(most - len(vector))]), group)
    return torch.cat([part[: int(size)] for part, size in zip(padded, sizes, strict=True)])


def _reduced(tensors: Sequence[Tensor], layouts: Sequence[Layout], op: str) -> list[Tensor]:
    results = list(tensors)
    groups: dict[Any, list[int]] = {}
    for i, where in enumerate(layouts):
        for group in where.groups:
            groups.setdefault(group, []).append(i)
    for group, members in groups.items():
        dtype = results[members[0]].dtype
        for i in members:
            dtype = torch.promote_types(dtype, results[i].dtype)
        together = torch.cat([results[i].reshape(-1).to(dtype) for i in members])
        torch.distributed.all_reduce(together, getattr(torch.distributed.ReduceOp, op), group)
        pieces = together.split([results[i].numel() for i in members])
        for i, piece in zip(members, pieces, strict=True):
            results[i] = piece.view(results[i].shape).to(results[i].dtype)
    return results

"""What is counted in a weight, on its own device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from torchreg import sharding, unsettled
from torchreg.assignments import PenalizedModel
from torchreg.penalties import tiles
from torchreg.sharding import Layout

NOT_APPLICABLE = -1
"""Stands for the rows and columns of a tensor that has none (fewer than two dimensions)."""

PIECE = 1 << 24
"""Elements of a large weight that are summed at once on a device: 128 MiB in float64."""


@torch.no_grad()
def counted(w: Tensor) -> Tensor:
    """The float64 vector (zeros, zero rows, zero columns, Σ|w|, √Σ|w|²) of a weight, on its device.

    A row is a slice of the first dimension (an output unit or filter), a column one of the second (an input unit or
    channel). A NaN is not a zero.
    """
    if w.ndim >= 2:
        nonzero = (w != 0).flatten(2) if w.ndim > 2 else (w != 0).unsqueeze(2)
        zeros = nonzero.numel() - nonzero.sum()
        rows = nonzero.shape[0] - nonzero.any(2).any(1).sum()
        columns = nonzero.shape[1] - nonzero.any(2).any(0).sum()
    else:
        zeros = (w == 0).sum()
        rows = columns = torch.full_like(zeros, NOT_APPLICABLE)
    return torch.stack([part.double() for part in (zeros, rows, columns, *_norms(w))])


@torch.no_grad()
def counted_all(weights: Sequence[Tensor]) -> list[Tensor]:
    """`counted` of each weight. What is spread over processes is counted by all of them, in one collective."""
    layouts = list(map(sharding.layout, weights))
    parts = [
        _partial(w, where) if where.groups else counted(sharding.local(w))
        for w, where in zip(weights, layouts, strict=True)
    ]
    return [
        _completed(vector, where) if where.groups else vector
        for vector, where in zip(sharding.summed(parts, layouts), layouts, strict=True)
    ]


def largest(w: Tensor) -> Tensor:
    """max |w|, NaN if there is one: one pass, where torch's norm takes 20 times as long on the CPU."""
    if w.is_complex():
        return torch.linalg.vector_norm(w, math.inf)
    return torch.stack(torch.aminmax(w)).abs().max()


def changed(before: Mapping[str, Tensor], weights: Sequence[tuple[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """Which weights are zero now, here, and how many are newly zero and revived since ``before``, in all processes."""
    now = {name: sharding.local(w.detach()) == 0 for name, w in weights}
    device = next(iter(now.values())).device if now else torch.device("cpu")
    counts, layouts = [torch.zeros(2, device=device)], [sharding.WHOLE]
    for name, w in weights:
        is_zero, was = now[name], before.get(name, now[name])
        if was.shape != is_zero.shape or was.device != is_zero.device:
            was = is_zero
        counts.append(torch.stack([(is_zero & ~was).sum(), (was & ~is_zero).sum()]).to(device, torch.float32))
        layouts.append(sharding.layout(w))
    return now, torch.stack(sharding.summed(counts, layouts)).sum(0)


def _partial(w: Tensor, where: Layout) -> Tensor:
    """What is here of the vector that `_completed` takes: zeros, Σ|w|, Σ|w|², and which rows and columns are alive."""
    part = sharding.local(w)
    nonzero = part != 0
    first, second = _norms(part) if part.numel() else (torch.zeros((), dtype=torch.float64, device=part.device),) * 2
    vector = [torch.stack([(nonzero.numel() - nonzero.sum()).double(), first.double(), second.double().square()])]
    for dim in range(2) if w.ndim >= 2 else ():
        alive = nonzero.movedim(dim, 0).flatten(1).any(1).double()
        rows = where.rows[dim]
        whole = alive.new_zeros(w.shape[dim])
        vector.append(whole.index_copy(0, rows.to(alive.device), alive) if rows is not None else alive)
    return torch.cat(vector)


def _completed(vector: Tensor, where: Layout) -> Tensor:
    """The sum over all processes as `counted` gives it."""
    zeros, first, second = vector[:3]
    rows = columns = torch.full_like(zeros, NOT_APPLICABLE)
    if len(where.shape) >= 2:
        dead = vector[3:] == 0
        rows, columns = dead[: where.shape[0]].sum().double(), dead[where.shape[0] :].sum().double()
    return torch.stack([zeros, rows, columns, first, second.sqrt()])


def _norms(w: Tensor) -> tuple[Tensor, Tensor]:
    """Σ|w| and √Σ|w|² in float64: in float32, sums drift, overflow and lose the squares of small weights."""
    dtype = torch.complex128 if w.is_complex() else torch.float64  # torch copies each piece to this type
    size = tiles.TILE if w.device.type == "cpu" else PIECE
    whole = w.numel() <= size or not tiles.is_dense(w)
    pieces = [w] if whole else w.as_strided((w.numel(),), (1,)).split(size)

    def norm(order: int) -> Tensor:
        parts = [torch.linalg.vector_norm(piece, order, dtype=dtype) for piece in pieces]
        return torch.linalg.vector_norm(torch.stack(parts), order)

    return norm(1), norm(2)


def named_weights(source: Any) -> Iterator[tuple[str, Tensor]]:
    """The (name, tensor) pairs of a source, floating point or complex ones, each tensor once.

    Args:
        source: a module (all its parameters), a `Regularizer` (the penalised ones), an optimizer, a mapping from
            names to tensors such as a state dict, or an iterable of tensors or (name, tensor) pairs.

    Raises:
        TypeError: if it is none of these.
        ValueError: if a tensor holds no values: on the meta device, or a lazy module's before its first call.
    """
    seen: set[Any] = set()
    for name, tensor in _pairs(source):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Expected tensors to count zeros in, got {type(tensor).__name__} for {name!r}.")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if tensor.device.type == "meta" or is_lazy(tensor):
            raise ValueError(f"Expected tensors with values, got {name!r} on the meta device or not initialised yet.")
        unsettled.settle([tensor])
        key = _identity(tensor)
        if key not in seen:
            seen.add(key)
            yield name, tensor if tensor.layout == torch.strided else tensor.to_dense()


def which_weights(source: Any) -> str:
    """What a source's weights are called, if it tells."""
    return "averaged" if isinstance(source, AveragedModel) else ""


def _pairs(source: Any) -> Iterable[tuple[str, Any]]:
    if hasattr(source, "assignments") and hasattr(source, "penalized"):
        regularizer: PenalizedModel = source
        sharding.check_whole(regularizer.model)
        return [(a.name, a.parameter) for a in regularizer.assignments if a.penalty is not None]
    if isinstance(source, nn.Module):
        sharding.check_whole(source)
        return source.named_parameters()
    if isinstance(source, Optimizer):
        return [pair for i, group in enumerate(source.param_groups) for pair in _group_pairs(i, group)]
    if isinstance(source, Tensor):
        return [("tensor", source)]
    if isinstance(source, Mapping):
        return [(str(name), tensor) for name, tensor in source.items()]
    if isinstance(source, Iterable) and not isinstance(source, (str, bytes)):
        entries = list(source)
        return [e if isinstance(e, tuple) and len(e) == 2 else (str(i), e) for i, e in enumerate(entries)]
    raise TypeError(
        "Expected a module, a Regularizer, an optimizer, a mapping from names to tensors or an iterable of tensors, "
        f"got {type(source).__name__}."
    )


def _group_pairs(index: int, group: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    names = group.get("param_names") or [f"group{index}.{k}" for k in range(len(group["params"]))]
    return list(zip(names, group["params"], strict=True))


def _identity(tensor: Tensor) -> Any:
    """Equal for two names of the same memory (a tied weight in a state dict is two tensors on one storage)."""
    here = sharding.local(tensor)
    if here.layout != torch.strided or here.numel() == 0:
        return id(tensor)
    tensor = here
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype

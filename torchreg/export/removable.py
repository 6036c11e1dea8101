"""Which channels of a model can be removed now, because they are zero or nobody uses them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from torchreg.coupling.probe import Probe
from torchreg.coupling.values import Coupling
from torchreg.groups import Member

MOST_PATTERNS = 32
"""Ways in which only some of a channel's makers are zero that are tested for each coupling."""


def removable(model: nn.Module, couplings: Sequence[Coupling], probe: Probe) -> list[Tensor]:
    """For each coupling, which of its channels can be removed: bool vectors; at least one channel stays.

    A channel can go if all its users are zero, or if its makers are, or so many of them that it is zero: a norm's scale
    and shift will do, whatever the convolution before holds. A channel that goes takes its slices with it, which may
    leave others without makers or users: so it is repeated until nothing changes.
    """
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    held = {member.name for coupling in couplings for member in coupling.members}
    nonzero = {name: tensors[name].detach() != 0 for name in held}
    result = [torch.zeros(coupling.count, dtype=torch.bool) for coupling in couplings]
    proved: dict[tuple[int, tuple[int, ...]], bool] = {}
    changed = True
    while changed:
        changed = False
        for index, coupling in enumerate(couplings):
            dead = _dead(index, coupling, nonzero, probe, proved) | result[index]
            if bool(dead.all()):
                dead[int(result[index].logical_not().nonzero()[0])] = False
            if torch.equal(dead, result[index]):
                continue
            result[index], changed = dead, True
            for member in coupling.makers + coupling.users:
                slices = member.slices(dead).to(nonzero[member.name].device)
                nonzero[member.name].index_fill_(member.dim, slices, False)
    return result


def _dead(
    index: int,
    coupling: Coupling,
    nonzero: dict[str, Tensor],
    probe: Probe,
    proved: dict[tuple[int, tuple[int, ...]], bool],
) -> Tensor:
    dead = coupling.zero_channels(nonzero, coupling.users)
    if coupling.vanishes:
        dead |= coupling.zero_channels(nonzero, coupling.makers)
    segments = [segment for member in coupling.makers for segment in _segments(member)]
    zero = torch.stack([coupling.zero_channels(nonzero, [segment]) for segment in segments])
    zero[:, dead] = False
    patterns, which, counts = zero.unique(dim=1, return_inverse=True, return_counts=True)
    for i in counts.argsort(descending=True)[:MOST_PATTERNS].tolist():
        makers = tuple(patterns[:, i].nonzero().flatten().tolist())
        if not makers:
            continue
        channels = which == i
        key = index, makers
        if key not in proved:
            proved[key] = probe.zero_without_makers(coupling, channels, [segments[j] for j in makers])
        if proved[key]:
            dead |= channels
    return dead


def _segments(member: Member) -> Iterator[Member]:
    """The parts of a tensor that each hold all channels once: query, key and value of packed rows."""
    held = (member.labels >= 0).nonzero().flatten()
    labels = member.labels[held]
    starts = [0, *((labels[1:] < labels[:-1]).nonzero().flatten() + 1).tolist(), len(held)]
    for start, stop in itertools.pairwise(starts):
        part = torch.full_like(member.labels, -1)
        part[held[start:stop]] = labels[start:stop]
        yield Member(member.name, member.dim, part)

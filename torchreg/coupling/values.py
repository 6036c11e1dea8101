"""What a coupling is: the channels of a model that can only be removed together, and the tensors that hold them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from torchreg import tables
from torchreg.groups import Member, Shared


@dataclass(frozen=True, eq=False)
class Coupling:
    """Channels that can only be removed together from all the tensors that hold them.

    Attributes:
        name: the first layer that makes them, such as ``"layer1.0.conv1"``.
        count: how many channels there are. A channel is what can be removed by itself: an attention head with all its
            rows, or all that belongs to one group of a grouped convolution.
        makers: where a channel is made: weight rows, biases, a norm's scale and shift. If all are zero, so is the
            channel (unless `vanishes` is false).
        users: where it is consumed: the columns of the next layers. If all are zero, it has no effect.
        others: what only has to be cut along: running statistics, PReLU's slopes.
        vanishes: whether zero makers make the channel zero. Not so after a sigmoid, say: then only channels with zero
            users can be removed.
        heads: whether they are attention heads: then the attention module has to be told how many are left.
    """

    name: str
    count: int
    makers: tuple[Member, ...]
    users: tuple[Member, ...]
    others: tuple[Member, ...] = ()
    vanishes: bool = True
    heads: bool = False

    @property
    def members(self) -> tuple[Member, ...]:
        """Makers, users and others."""
        return self.makers + self.users + self.others

    def zero_channels(self, tensors: Mapping[str, Tensor], members: Sequence[Member]) -> Tensor:
        """Which channels are exactly zero in all of ``members``: bool, one per channel.

        Args:
            tensors: the model's parameters (and buffers) by name.
            members: those to look at; a channel that none of them holds is not zero.
        """
        held = torch.zeros(self.count, dtype=torch.bool)
        alive = torch.zeros(self.count, dtype=torch.bool)
        for member in members:
            w = tensors[member.name].detach()
            nonzero = (w != 0).transpose(0, member.dim).flatten(1).any(1).cpu() if w.ndim > 1 else (w != 0).cpu()
            labels = member.labels
            held[labels[labels >= 0]] = True
            alive[labels[(labels >= 0) & nonzero]] = True
        return held & ~alive


@dataclass(frozen=True)
class LeftAlone:
    """Channels that can't be removed.

    Attributes:
        name: the first layer that makes them.
        count: how many there are.
        reason: why not.
    """

    name: str
    count: int
    reason: str


@dataclass(frozen=True, eq=False)
class Couplings(Sequence[Coupling]):
    """The couplings of a model, in the order of its layers; ``print()`` shows a table.

    ``couplings[0]`` is the first one, ``couplings["layer1.0.conv1"]`` the one of that name.

    Attributes:
        couplings: the channels that can be removed.
        left_alone: those that can't, and why.
    """

    couplings: tuple[Coupling, ...]
    left_alone: tuple[LeftAlone, ...] = field(default=())

    @overload
    def __getitem__(self, key: int | str) -> Coupling: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Coupling, ...]: ...
    def __getitem__(self, key: int | str | slice) -> Coupling | tuple[Coupling, ...]:
        if not isinstance(key, str):
            return self.couplings[key]
        for coupling in self.couplings:
            if coupling.name == key:
                return coupling
        raise KeyError(f"No coupling {key!r} among {len(self)}: {', '.join(c.name for c in self)}.")

    def groups(self, *names: str, users: bool = False) -> Shared:
        """The channels as groups that a penalty takes: ``GroupLasso(1e-3, couplings.groups())``.

        A group is a channel in all tensors that make it (weight rows, bias, norm), so that it can be removed once it is
        zero; of a channel that does not vanish then, such as one before a sigmoid, also in those that use it.

        Args:
            names: globs on the couplings' names; by default all of them.
            users: whether the columns of the next layers belong to a channel too. Layers that make one coupling and
                use another are then in groups that overlap, which is refused: choose every second.

        Raises:
            ValueError: if a name matches no coupling, there is none, or groups overlap.
        """
        for glob in names:
            if not any(fnmatch.fnmatchcase(c.name, glob) for c in self):
                raise ValueError(f"The name {glob!r} matches none of the couplings {', '.join(c.name for c in self)}.")
        chosen = [c for c in self if not names or any(fnmatch.fnmatchcase(c.name, glob) for glob in names)]
        return _shared(chosen, users=users)

    def __len__(self) -> int:
        return len(self.couplings)

    def __iter__(self) -> Iterator[Coupling]:
        return iter(self.couplings)

    def __str__(self) -> str:
        rows = [(c.name, str(c.count), ", ".join(_names(c.makers)), ", ".join(_names(c.users))) for c in self.couplings]
        text = tables.render(("coupling", "channels", "made by", "used by"), rows, left=4)
        if not self.left_alone:
            return text
        rest = [(c.name, str(c.count), c.reason) for c in self.left_alone]
        return f"{text}\n\n{tables.render(('left alone', 'channels', 'because'), rest, left=3)}"


def _shared(couplings: Iterable[Coupling], *, users: bool = False) -> Shared:
    """A group for each channel of each coupling, numbered through.

    Raises:
        ValueError: if there are none, or two of them would overlap.
    """
    labels: dict[str, tuple[int, Tensor]] = {}
    owners: dict[str, str] = {}
    parts: list[tuple[str, int]] = []
    offset = 0
    for coupling in couplings:
        for m in coupling.makers + (coupling.users if users or not coupling.vanishes else ()):
            shifted = torch.where(m.labels < 0, -1, m.labels + offset)
            dim, known = labels.get(m.name, (m.dim, torch.full_like(shifted, -1)))
            if dim != m.dim or bool(((known >= 0) & (shifted >= 0)).any()):
                raise ValueError(
                    f"The couplings {owners[m.name]!r} and {coupling.name!r} both hold weights of {m.name!r}, and "
                    "groups that overlap have no proximal operator: choose couplings by name, or leave their users out."
                )
            labels[m.name] = dim, torch.where(shifted >= 0, shifted, known)
            owners[m.name] = coupling.name
        parts.append((coupling.name, coupling.count))
        offset += coupling.count
    if not parts:
        raise ValueError("Expected at least one coupling to make groups of, got none.")
    return Shared(tuple(Member(name, dim, vector) for name, (dim, vector) in labels.items()), tuple(parts))


def _names(members: Sequence[Member]) -> list[str]:
    return list(dict.fromkeys(member.name for member in members))

"""Groups that reach over several tensors, such as a row with its bias: zero together, they can be taken out together.

`Shared` says which slices of which parameters belong together, by the parameters' names. A penalty with such groups
acts on all tensors of a rule at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchreg.cuts import Cut, Runs
from torchreg.groups.base import Groups, checked_int


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """What a parameter has in groups that reach over several: its slices along a dimension.

    Args:
        name: the parameter's qualified name.
        dim: the dimension whose slices belong to the groups.
        labels: the group of each slice: an int64 vector with one number for each, −1 for a slice that is in none. It is
            copied.

    Raises:
        ValueError: if a label is below −1, or the dimension negative.
        TypeError: if the labels are none.

    >>> import torch
    >>> from torchreg.groups import Member
    >>> Member("0.bias", 0, torch.arange(3))
    Member('0.bias', dim=0, 3 slices)
    """

    name: str
    dim: int
    labels: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Expected `name` to be a parameter's name, got {self.name!r}.")
        object.__setattr__(self, "dim", checked_int("dim", self.dim, least=0))
        labels = self.labels
        allowed = f"Expected the labels of {self.name!r} to be an int64 vector with a group for each slice, −1 for none"
        if not isinstance(labels, Tensor):
            raise TypeError(f"{allowed}, got {type(labels).__name__}.")
        if labels.dtype != torch.int64 or labels.layout != torch.strided or labels.ndim != 1:
            raise TypeError(f"{allowed}, got {labels.dtype}, {labels.ndim} dimensions, the layout {labels.layout}.")
        if labels.numel() and int(labels.min()) < -1:
            raise ValueError(f"{allowed}, got the label {int(labels.min())}.")
        object.__setattr__(self, "labels", labels.detach().cpu().clone())

    def slices(self, groups: Tensor) -> Tensor:
        """The indices along `dim` of the slices of some groups: those where the bool vector ``groups`` is true."""
        return ((self.labels >= 0) & groups[self.labels.clamp(min=0)]).nonzero().flatten()

    def check(self, shape: Sequence[int]) -> None:
        """Raise ``ValueError`` unless a parameter of this shape has these slices."""
        if self.dim >= len(shape) or shape[self.dim] != len(self.labels):
            raise ValueError(
                f"Expected parameter {self.name!r} to have {len(self.labels)} slices along dimension {self.dim}, as "
                f"the groups have that it shares, got the shape {tuple(shape)}."
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Member):
            return NotImplemented
        same = (self.name, self.dim) == (other.name, other.dim)
        return same and (self.labels is other.labels or torch.equal(self.labels, other.labels))

    def __hash__(self) -> int:
        return hash((self.name, self.dim, len(self.labels)))

    def __repr__(self) -> str:
        return f"Member({self.name!r}, dim={self.dim}, {len(self.labels)} slices)"


@dataclasses.dataclass(frozen=True)
class Shared(Groups):
    """Groups shared by several parameters: group g is what all members label with g.

    A bare penalty with such groups applies to exactly the parameters that they name, and as a rule's key they select
    them: ``{shared: GroupLasso(1e-3, shared), WEIGHTS: L1(1e-4)}``. A member that is frozen, or that an earlier rule
    takes, is left out of its groups, and a group without any other is none.

    Args:
        members: the parameters, each once.
        parts: pairs of a name and a number of groups: what the first groups, the next ones, … are called in reports.

    Raises:
        ValueError: if there are no members, one is named twice (its groups would overlap), a group between 0 and the
            largest has no slice, or the parts do not add up to the number of groups.
        TypeError: if the members or parts are none.

    >>> import torch, torchreg
    >>> from torchreg.groups import Member, Shared
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> unit = torch.arange(3)
    >>> units = Shared([Member("0.weight", 0, unit), Member("0.bias", 0, unit), Member("2.weight", 1, unit)])
    >>> reg = torchreg.Regularizer(model, torchreg.GroupLasso(1e-2, units))
    >>> [name for name, _, _ in reg.penalized()]
    ['0.weight', '0.bias', '2.weight']
    """

    members: tuple[Member, ...]
    parts: tuple[tuple[str, int], ...] = ()
    _known: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.members, (str, Mapping)) or not isinstance(self.members, Iterable):
            raise TypeError(f"Expected `members` to be a list of Member, got {type(self.members).__name__}.")
        members = tuple(_member(m) for m in self.members)
        if not members:
            raise ValueError("Expected `members` to hold at least one parameter, got none.")
        names = [m.name for m in members]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"Parameter {twice!r} is a member twice: groups that overlap have no proximal operator.")
        parts = tuple(map(_part, self.parts))
        used = torch.bincount(torch.cat([m.labels[m.labels >= 0] for m in members]))
        if parts and sum(count for _, count in parts) != len(used):
            raise ValueError(f"Expected the parts to have {len(used)} groups together, got {sum(c for _, c in parts)}.")
        if bool((used == 0).any()):
            raise ValueError(f"Group {int((used == 0).nonzero()[0])} of {len(used)} has no slice of any parameter.")
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "parts", parts)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that share the groups."""
        return tuple(m.name for m in self.members)

    @property
    def total(self) -> int:
        """The number of groups."""
        if "total" not in self._known:
            largest = max((int(m.labels.max()) + 1 for m in self.members if len(m.labels)), default=0)
            self._known["total"] = sum(count for _, count in self.parts) or largest
        return self._known["total"]

    def of(self, shape: Sequence[int]) -> Cut:  # noqa: D102
        raise ValueError(
            f"The groups are shared by the {len(self.members)} parameters {_listed(self.names)}: one of them alone, of "
            f"shape {tuple(shape)}, can't be cut."
        )

    def of_all(self, shapes: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Runs:
        """The groups of tensors of these shapes, one for each member, in their order.

        Raises:
            ValueError: if there are not as many shapes as members, or one does not fit.
        """
        device = torch.device(device)
        key = (device, *map(tuple, shapes))
        if key not in self._known:
            if len(shapes) != len(self.members):
                raise ValueError(
                    f"The groups are shared by the {len(self.members)} parameters {_listed(self.names)}, which must be "
                    f"given together, got {len(shapes)}."
                )
            for member, shape in zip(self.members, shapes, strict=True):
                member.check(shape)
            dims, labels = [m.dim for m in self.members], [m.labels for m in self.members]
            self._known[key] = Runs(shapes, dims, labels, self.total, device)
        return self._known[key]

    def bound(self, names: Sequence[str]) -> Shared:
        """The groups that the members of these names have, with these members only, in this order.

        Raises:
            ValueError: if one of them is no member.
        """
        names = tuple(names)
        if names == self.names:
            return self
        if names not in self._known:
            by_name = {m.name: m for m in self.members}
            unknown = next((name for name in names if name not in by_name), None)
            if unknown is not None:
                raise ValueError(f"Parameter {unknown!r} has no part in groups shared by {_listed(self.names)}.")
            self._known[names] = self._with([by_name[name] for name in names])
        return self._known[names]

    def restricted(self, positions: Sequence[int]) -> Shared:
        """The groups that the members at these positions have, with these members only."""
        return self.bound([self.members[i].name for i in positions])

    def connected(self) -> list[list[int]]:
        """The positions of the members, those together that have groups in common, also by way of others."""
        sets: list[tuple[list[int], set[int]]] = []
        for i, member in enumerate(self.members):
            positions, labels = [i], set(member.labels[member.labels >= 0].tolist())
            for met in [s for s in sets if s[1] & labels]:
                sets.remove(met)
                positions, labels = met[0] + positions, met[1] | labels
            sets.append((sorted(positions), labels))
        return [positions for positions, _ in sets]

    def to_dict(self) -> dict[str, Any]:  # noqa: D102
        members = [{"name": m.name, "dim": m.dim, "labels": m.labels} for m in self.members]
        return {"type": "Shared", "members": members, "parts": [list(part) for part in self.parts]}

    def __call__(self, name: str, parameter: Any = None) -> bool:
        """Whether a parameter of this name shares the groups: as a rule's key they select it."""
        return name in self.names

    def __str__(self) -> str:
        return f"{self.total} groups shared by {len(self.members)} parameters"

    def _with(self, members: Sequence[Member]) -> Shared:
        """Some members of these groups; groups that none of them has are gone, and the others keep their order."""
        held = torch.zeros(self.total, dtype=torch.bool)
        for member in members:
            held[member.labels[member.labels >= 0]] = True
        members, parts = tuple(members), self.parts
        if not bool(held.all()):
            number = torch.cat([held.cumsum(0) - 1, torch.tensor([-1])])  # the last is that of the label −1
            members = tuple(Member(m.name, m.dim, number[m.labels]) for m in members)
            pieces = held.split([count for _, count in parts]) if parts else ()
            left = [(name, int(piece.sum())) for (name, _), piece in zip(parts, pieces, strict=True)]
            parts = tuple((name, count) for name, count in left if count)
        new = object.__new__(Shared)
        for name, value in (("members", members), ("parts", parts), ("_known", {"total": int(held.sum())})):
            object.__setattr__(new, name, value)
        return new


def _member(value: Any) -> Member:
    if isinstance(value, Mapping) and set(value) == {"name", "dim", "labels"}:
        return Member(**value)
    if not isinstance(value, Member):
        raise TypeError(f"Expected `members` to hold values of torchreg.groups.Member, got {type(value).__name__}.")
    return value


def _part(value: Any) -> tuple[str, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"Expected `parts` to hold pairs of a name and a number of groups, got {value!r}.")
    return str(value[0]), checked_int("parts", value[1], least=0)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:4]))
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown

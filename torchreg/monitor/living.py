"""Which groups of weights are alive: not all zero."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torchreg import sharding, tables
from torchreg.assignments import Assignment, by_rule
from torchreg.groups import Groups, Shared, as_groups
from torchreg.monitor.counting import named_weights
from torchreg.monitor.transfer import fetch
from torchreg.spanning import spanning


@dataclass(frozen=True)
class LivingGroups:
    """The groups of one tensor, or one part of those that several share.

    Attributes:
        name: the parameter, or the part (such as the layer that makes coupled channels).
        groups: how the weights are cut.
        count: the number of groups.
        alive: how many of them have a weight that is not zero.
    """

    name: str
    groups: str
    count: int
    alive: int

    @property
    def zero(self) -> int:
        """How many groups are all zero."""
        return self.count - self.alive


@dataclass(frozen=True)
class GroupReport:
    """The zero groups of a model; ``print()`` shows a table. Made by `torchreg.group_sparsity`."""

    entries: tuple[LivingGroups, ...]

    @property
    def total(self) -> LivingGroups:
        """All groups together."""
        return LivingGroups("total", "", sum(e.count for e in self.entries), sum(e.alive for e in self.entries))

    @property
    def fraction(self) -> float:
        """Zero groups over groups, 0 if there are none."""
        return self.total.zero / self.total.count if self.total.count else 0.0

    def __getitem__(self, name: str) -> LivingGroups:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(f"No groups of {name!r} in this report of {len(self.entries)}.")

    def to_dict(self) -> dict[str, Any]:
        """``{"groups": [...], "total": {...}}`` in plain Python values."""
        return {"groups": [_plain(entry) for entry in self.entries], "total": _plain(self.total)}

    def to_csv(self) -> str:
        """One line per entry, with a heading, the total last."""
        out = io.StringIO()
        rows = [_plain(entry) for entry in (*self.entries, self.total)]
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def __str__(self) -> str:
        columns = ("parameter", "groups", "count", "alive", "zero", "sparsity")
        return tables.render(columns, [_cells(entry) for entry in self.entries], footer=_cells(self.total), left=2)


def group_sparsity(source: Any, groups: Groups | str | None = None) -> GroupReport:
    """Count the groups of weights that are all zero: rows, channels, heads, or what several tensors share.

    The counting happens on the weights' own device, with one transfer to the host at the end.

    Args:
        source: a `Regularizer`, whose penalties say what the groups are; or, with ``groups``, anything that
            `torchreg.sparsity` takes, such as a model or a state dict.
        groups: how to cut the weights: a name such as ``"out_channels"`` or a value of `torchreg.groups`. Tensors that
            don't have such groups are left out; those that share groups are looked for by their names.

    Raises:
        TypeError: if ``source`` is no regularizer and ``groups`` is not given, or they are not what they should be.
        ValueError: if no tensor has such groups.

    >>> import torch, torchreg
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 3))
    >>> _ = torch.nn.init.zeros_(model[0].weight[:3])
    >>> print(torchreg.group_sparsity(model, "out_channels"))
    parameter   groups         count   alive   zero   sparsity
    ──────────────────────────────────────────────────────────
    0.weight    out_channels       4       1      3     75.0 %
    1.weight    out_channels       2       2      0      0.0 %
    ──────────────────────────────────────────────────────────
    total                          6       3      3     50.0 %
    """
    living = list(living_groups(source, groups))
    if not living:
        what = "penalty of the regularizer has groups" if groups is None else f"tensor has groups {as_groups(groups)}"
        raise ValueError(f"No {what}.")
    counts = fetch([torch.stack([alive.sum()]) for _, _, alive in living])
    return GroupReport(
        tuple(
            LivingGroups(name, kind, len(alive), int(count))
            for (name, kind, alive), count in zip(living, counts, strict=True)
        )
    )


@torch.no_grad()
def living_groups(source: Any, groups: Groups | str | None = None) -> list[tuple[str, str, Tensor]]:
    """For each tensor, or part of what several share: its name, its kind of groups, and which are alive (bool)."""
    if groups is None:
        if not hasattr(source, "assignments"):
            raise TypeError(f"Expected `groups` beside a source that is no Regularizer, got {type(source).__name__}.")
        found = []
        for penalty, some in by_rule(source.assignments):
            cut = getattr(penalty, "groups", None)
            if isinstance(cut, Groups):
                found += _living(cut, [(a.name, a.parameter.detach()) for a in some])
        return found
    cut = as_groups(groups)
    named = [(name, w.detach()) for name, w in named_weights(source)]
    if isinstance(cut, Shared):
        by_name = dict(named)
        present = [name for name in cut.names if name in by_name]
        return _living(cut.bound(present), [(name, by_name[name]) for name in present]) if present else []
    return _living(cut, [(name, w) for name, w in named if w.ndim > 1 and _fits(cut, w)])


def has_groups(source: Any) -> bool:
    """Whether a source is a regularizer with a penalty that has groups."""
    assignments: Sequence[Assignment] = getattr(source, "assignments", ())
    return any(isinstance(getattr(a.penalty, "groups", None), Groups) for a in assignments)


def _living(groups: Groups, weights: list[tuple[str, Tensor]]) -> list[tuple[str, str, Tensor]]:
    spread = _spread(groups, weights) if sharding.any_sharded(w for _, w in weights) else None
    if isinstance(groups, Shared):
        if spread is None:
            cut = groups.of_all([w.shape for _, w in weights], weights[0][1].device)
            spread = [cut.alive([w for _, w in weights])]
        alive = spread[0][: groups.total]
        if not groups.parts:
            return [(", ".join(groups.names[:3]) + (", …" if len(groups.names) > 3 else ""), "shared", alive)]
        pieces = alive.split([count for _, count in groups.parts])
        return [(name, "shared", piece) for (name, _), piece in zip(groups.parts, pieces, strict=True)]
    if spread is not None:
        return [(name, str(groups), alive) for (name, _), alive in zip(weights, spread, strict=True)]
    return [(name, str(groups), groups.of(w.shape).alive([w])) for name, w in weights]


def _spread(groups: Groups, weights: list[tuple[str, Tensor]]) -> list[Tensor]:
    """Which groups of each weight are alive in any process."""
    cut = spanning(groups, [w for _, w in weights])
    alive = cut.alive([sharding.local(w) for _, w in weights])
    return [alive[piece.start : piece.start + piece.count] for piece in cut.pieces]


def _fits(groups: Groups, w: Tensor) -> bool:
    try:
        groups.of(w.shape)
    except ValueError:
        return False
    return True


def _plain(entry: LivingGroups) -> Mapping[str, Any]:
    return {**asdict(entry), "zero": entry.zero, "fraction": entry.zero / entry.count if entry.count else 0.0}


def _cells(e: LivingGroups) -> tuple[str, ...]:
    share = 100 * e.zero / e.count if e.count else 0.0
    return e.name, e.groups, f"{e.count:,}", f"{e.alive:,}", f"{e.zero:,}", f"{share:.1f} %"

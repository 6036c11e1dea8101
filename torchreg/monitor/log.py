"""One log of the monitor: what is asked of the device, and what is made of the answers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torchreg.kernels import COUNTS
from torchreg.monitor.report import SparsityReport, TensorSparsity, entry
from torchreg.penalties import Penalty

STRENGTH_SCALE = "strength scale"
"""A scalar that is asked for and not written."""


class Log:
    """What a log asks for, by kind and name, and the answers under the same names.

    Attributes:
        step: the step it is written at.
        positions: the row of each weight in the counts of the optimizer's step, where it was counted there.
        earlier: where steps have counted the changes of a weight before others had gradients, by name.
        shapes: of all weights, by name.
        penalties: the penalty of each weight whose counts tell its value.
        measured: the user's own measures, by tag.
        weights: which weights they are, if not those that are trained.
    """

    def __init__(self, step: int, weights: str = "") -> None:
        self.step = step
        self.weights = weights
        self.asked: dict[tuple[str, str], Tensor] = {}
        self.answers: dict[tuple[str, str], Tensor] = {}
        self.positions: dict[str, int] = {}
        self.earlier: dict[str, tuple[str, int]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.penalties: dict[str, Penalty] = {}
        self.measured: dict[str, float] = {}
        self._rows: list[list[float]] = []

    def tag(self, name: str) -> str:
        """The tag of what is written."""
        return f"{self.weights}/{name}" if self.weights else name

    def ask(self, kind: str, name: str, tensor: Tensor) -> None:
        """Ask for a tensor on its device."""
        self.asked[kind, name] = tensor

    def can_sum(self, penalized: list[tuple[str, torch.nn.Parameter, Penalty]]) -> bool:
        """Whether the counts tell the value of all penalties; if so they are remembered."""
        if not all(name in self.positions and p.value_of_sums(0.0, 0.0) is not None for name, _, p in penalized):
            return False
        self.penalties = {name: penalty for name, _, penalty in penalized}
        return True

    def take(self, answers: list[Tensor]) -> None:
        """The answers, on the host, in the order in which they were asked for."""
        self.answers = dict(zip(self.asked, answers, strict=True))
        self.asked = {}
        self._rows = [row for _, rows in self.received("counts") for row in rows.tolist()]

    def received(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """The (name, tensor) answers of a kind."""
        return ((name, tensor) for (k, name), tensor in self.answers.items() if k == kind)

    def report(self) -> SparsityReport:
        """The counts of all weights."""
        return SparsityReport(tuple(self._entry(name, shape) for name, shape in self.shapes.items()), self.weights)

    def changes(self) -> tuple[int, int]:
        """Weights that became zero, and that left it, since the last log."""
        new, revived = self.answers["changes", ""].tolist()
        for row in map(self._counted, self.positions):
            new, revived = new + row["new"], revived + row["revived"]
        for part, position in self.earlier.values():
            more = self.answers["earlier", part][position].tolist()
            new, revived = new + more[0], revived + more[1]
        return int(new), int(revived)

    def penalty(self) -> float:
        """The value of the penalties."""
        scale = float(self.answers["scalar", STRENGTH_SCALE])
        rows = ((penalty, self._counted(name)) for name, penalty in self.penalties.items())
        return scale * sum(penalty.value_of_sums(row["l1"], row["l2"]) or 0.0 for penalty, row in rows)

    def _counted(self, name: str) -> dict[str, float]:
        return dict(zip(COUNTS, self._rows[self.positions[name]], strict=True))

    def _entry(self, name: str, shape: tuple[int, ...]) -> TensorSparsity:
        if ("weight", name) in self.answers:
            return entry(name, shape, self.answers["weight", name].tolist())
        row = self._counted(name)
        return TensorSparsity(
            name=name,
            shape=shape,
            size=math.prod(shape),
            zeros=int(row["zeros"]),
            rows=None,
            zero_rows=None,
            columns=None,
            zero_columns=None,
            l1_norm=row["l1"],
            l2_norm=math.sqrt(row["l2"]) if row["l2"] >= 0 else math.nan,
        )

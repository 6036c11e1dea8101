"""The table that a fused step works from: all tensors of one device and dtype, over all param groups."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreg.kernels import graphs
from torchreg.kernels.changes import Changes
from torchreg.kernels.fused_form import run, strengths
from torchreg.kernels.pieces import cut
from torchreg.kernels.problem import AdamStep, SGDStep, Tensors
from torchreg.penalties.base import arithmetic
from torchreg.penalties.separable import _Shrinkage
from torchreg.penalties.tiles import is_dense

COLUMNS = ("w", "g", "m", "v", "x", "size", "l1", "l2", "seed", "group", "first", "step", "run")
"""int64, per tensor: addresses (0: none), elements, the row of its hyperparameters, whether its momentum is fresh, the
number of the step, and the elements of every group of weights that are shrunk together (0: none are). ``m`` is the
momentum or first moment, ``v`` and ``x`` are Adam's second one and its maximum."""

ADDRESSES = 5
"""The first columns: of the weights, the gradients and the optimizer's buffers."""

COUNTS = ("zeros", "new", "revived", "l1", "l2")
"""float64, per piece: zeros, newly zero, revived, Σ|w| and Σw². New and revived add up until they are taken."""

CHANGES = slice(COUNTS.index("new"), COUNTS.index("revived") + 1)
"""The columns of `COUNTS` that add up."""

Part = tuple[Any, Any]
"""The tensors and the step of a param group: `SGDTensors` with an `SGDStep`, or Adam's."""


class Plan:
    """What one launch is told. It is kept between steps: only what changed is made again.

    Attributes:
        params: the parameters, in the order of the table's columns.
        table: int64, a row for each of `COLUMNS`, a column per tensor.
        hypers: float64, a row per param group, a column for each of the step's ``HYPERS``.
        pieces: int64, the tensor, the first element and the number of elements of every piece; see `cut`.
        counts: float64, a row per piece, a column for each of `COUNTS`.
        changes: the newly zero and revived that were counted before the table was laid out anew.
        traced: hyperparameters that are tensors on a device, as (row, column, tensor): the host does not read them.
        late: columns of the table some of whose entries are tensors on a device, by name.
        uploads: a device's copies of these arrays, by name, each with what it was copied from.
        is_captured: whether the step is captured in a graph.
        captured: memory that captured graphs read and write at every replay.
        view: what a compiled kernel is given of these arrays, which stay in their places until they are laid out anew.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        piece_size: int,
        step: type[SGDStep] | type[AdamStep] = SGDStep,
    ) -> None:
        self.device, self.dtype, self.piece_size = device, dtype, piece_size
        self.params: list[Tensor] = []
        self.table = np.zeros((len(COLUMNS), 0), dtype=np.int64)
        self.hypers = np.zeros((0, len(step.HYPERS)))
        self.pieces = np.zeros((3, 0), dtype=np.int64)
        self.counts = torch.zeros(0, len(COUNTS), dtype=torch.float64, device=device)
        self.changes = Changes(device)
        self.traced: list[tuple[int, int, Tensor]] = []
        self.late: dict[str, list[int | Tensor]] = {}
        self.uploads: dict[str, tuple[Any, Tensor]] = {}
        self.is_captured = False
        self.captured: list[Tensor] = []
        self.view: Any = None
        self._strengths: dict[tuple[int, str], tuple[Tensor, int | None, tuple[Any, Any], Tensor]] = {}
        self._contiguous = False
        self._beside: set[int] = set()  # the param groups whose gradients and buffers were contiguous, too
        self._told: list[SGDStep | AdamStep | None] = []  # the step whose numbers are in each row of hypers
        self._filled: set[str] = set()  # columns that hold something only for this step
        self._owners: Tensor | None = None
        self._rooms: dict[tuple[int, str], Tensor] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []

    def update(self, parts: Sequence[Part], same: bool = False, alike: bool = False) -> None:
        """Take over the tensors and hyperparameters of a step.

        Args:
            parts: the tensors of each param group that are of this plan's device and dtype.
            same: whether the parameters and their memory are those of the last update, which then must have succeeded.
            alike: whether gradients and buffers are what those of the last update were, but for where they lie.
        """
        self._copies, self.traced, self.late = [], [], {}
        self.is_captured = graphs.is_captured()
        if not same:
            self._lay_out(parts)
        for name in self._filled:
            self.table[COLUMNS.index(name)] = 0
        quick, self._contiguous, self._filled = same and self._contiguous, True, set()
        known, self._beside = self._beside if alike else set(), set()
        columns: dict[str, list[Any]] = {}
        start = 0
        for row, (tensors, step) in enumerate(parts):
            here = slice(start, start + len(tensors.params))
            table = self.table[:, here]
            if quick and self._quick_addresses(table, tensors, row in known):
                self._beside.add(row)
            else:
                self._addresses(table, tensors)
            if self._told[row] is not step or self.is_captured:
                self._hyperparameters(row, step)
                self._strength_addresses(table, tensors.params, step)
            for name, values in {"seed": tensors.seeds, **step.columns(tensors)}.items():
                if values:
                    columns.setdefault(name, [0] * len(self.params))[here] = values
            start = here.stop
        for name, values in columns.items():
            self._filled.add(name)
            if any(isinstance(value, Tensor) for value in values):
                self.late[name] = values
            elif name == "seed":
                self.table[COLUMNS.index(name)] = np.array(values, dtype=np.uint64) & np.uint64(0xFFFFFFFF)
            else:
                self.table[COLUMNS.index(name)] = values

    def _lay_out(self, parts: Sequence[Part]) -> None:
        """Begin a table. The pieces, and what was counted of them, stay where they are those of the last one."""
        params = [p for tensors, _ in parts for p in tensors.params]
        table = np.zeros((len(COLUMNS), len(params)), dtype=np.int64)
        table[COLUMNS.index("size")] = [p.numel() for p in params]
        table[COLUMNS.index("group")] = [row for row, (tensors, _) in enumerate(parts) for _ in tensors.params]
        table[COLUMNS.index("run")] = [run(p, step.penalty) or 0 for tensors, step in parts for p in tensors.params]
        shapes = [COLUMNS.index(name) for name in ("size", "run")]
        if not (identical(self.params, params) and np.array_equal(table[shapes], self.table[shapes])):
            self._cut(*table[shapes])
        self.params, self.table, self._filled = params, table, set()
        self.hypers, self._told = np.zeros((len(parts), self.hypers.shape[1])), [None] * len(parts)
        self.view = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has arrays of its own, of which neither the view is nor any graph."""
        return self.__dict__ | {"view": None, "captured": []}

    def memory(self) -> list[Tensor]:
        """What a step reads and writes on the device beside the optimizer's own tensors and what is uploaded."""
        return [self.counts, *self._rooms.values(), *(laid_out for *_, laid_out in self._strengths.values())]

    def owners(self) -> Tensor:
        """The tensor of each piece, on the device."""
        if self._owners is None:
            self._owners = torch.from_numpy(self.pieces[0].copy()).to(self.device, non_blocking=True)
        return self._owners

    def finish(self) -> None:
        """After the step: write back what was worked on in a copy."""
        for original, copy in self._copies:
            original.copy_(copy)
        self._copies = []

    def leave(self) -> Changes:
        """The newly zero and revived of all steps since they were taken last. The plan is given up, or cut anew."""
        if len(self.counts):
            self.changes.add(self.params, self.pieces[0], self.counts[:, CHANGES])
        return self.changes

    def _cut(self, sizes: Any, runs: Any) -> None:
        self.leave()
        self.pieces = cut(tuple(sizes.tolist()), self.piece_size, tuple(runs.tolist()))
        self.counts = torch.zeros(self.pieces.shape[1], len(COUNTS), dtype=torch.float64, device=self.device)
        self._owners = None

    def _quick_addresses(self, table: Any, tensors: Tensors, contiguous: bool) -> bool:
        """Only the gradients and buffers may have moved. Whether all of them are (known to be) contiguous."""
        buffers = tensors.buffers()
        if not contiguous and not self._are_contiguous([*tensors.grads, *itertools.chain(*buffers.values())]):
            return False
        table[COLUMNS.index("g")] = list(map(Tensor.data_ptr, tensors.grads))
        for name, entries in buffers.items():
            table[COLUMNS.index(name)] = list(map(Tensor.data_ptr, entries)) or 0
        return True

    def _are_contiguous(self, tensors: list[Tensor]) -> bool:
        return (
            {t.dtype for t in tensors} == {self.dtype}
            and all(map(Tensor.is_contiguous, tensors))
            and not any(map(Tensor.is_neg, tensors))
        )

    def _addresses(self, table: Any, tensors: Tensors) -> None:
        """Where the tensors are. What is not laid out like its parameter, or not dense, is worked on in a copy."""
        buffers = {name: entries for name, entries in tensors.buffers().items() if entries}
        for i, p in enumerate(tensors.params):
            g = tensors.grads[i]
            w = p if p.is_contiguous() or is_dense(p) else self._copied(p, "w", p)
            stride = w.stride()
            self._contiguous &= p.is_contiguous()
            if g.stride() != stride or g.dtype != self.dtype or g.is_neg():  # a view that is negated when it is read
                g = self._room(p, "g", w).copy_(g)
            table[0, i], table[1, i] = w.data_ptr(), g.data_ptr()
            for name, entries in buffers.items():
                m = entries[i]
                if m.stride() != stride or m.dtype != self.dtype:
                    m = self._copied(p, name, m, w)
                table[COLUMNS.index(name), i] = m.data_ptr()
        for name in COLUMNS[2:ADDRESSES]:
            if name not in buffers:
                table[COLUMNS.index(name)] = 0

    def _copied(self, p: Tensor, role: str, original: Tensor, like: Tensor | None = None) -> Tensor:
        original = original.detach()
        room = self._room(p, role, like)
        self._copies.append((original, room))
        return room.copy_(original)

    def _room(self, p: Tensor, role: str, like: Tensor | None) -> Tensor:
        """Memory for a copy, at the same address in every step: a captured graph works there too."""
        if like is None:
            like = torch.empty(p.shape, dtype=p.dtype, device="meta")
        room = self._rooms.get((id(p), role))
        if room is None or room.shape != like.shape or room.stride() != like.stride():
            room = self._rooms[id(p), role] = torch.empty_like(like, device=self.device, requires_grad=False)
        return room

    def _hyperparameters(self, row: int, step: SGDStep | AdamStep) -> None:
        values = step.hypers(strengths(step.penalty))
        is_fixed = not any(isinstance(value, Tensor) for value in values)
        self._told[row] = step if is_fixed else None
        self.hypers[row] = [
            self._known(row, column, value) if isinstance(value, Tensor) else value
            for column, value in enumerate(values)
        ]

    def _known(self, row: int, column: int, value: Tensor) -> float:
        """What the host knows of a hyperparameter that is a tensor."""
        if value.ndim and value.numel() != 1:
            return 1.0  # strengths of each coordinate, which the table points to
        if "cpu" in (value.device.type, self.device.type):
            return float(value)
        self.traced.append((row, column, value.detach().reshape(())))
        return math.nan

    def _strength_addresses(self, table: Any, params: list[Tensor], step: SGDStep | AdamStep) -> None:
        """Strengths of each coordinate, laid out like the weight; kept while they and the weight stay the same.

        A graph that is captured lays them out at every replay.
        """
        if not isinstance(step.penalty, _Shrinkage):
            return
        for name, strength in zip(("l1", "l2"), step.penalty.parts(), strict=True):
            if not isinstance(strength, Tensor) or strength.numel() == 1:
                continue
            for i, p in enumerate(params):
                key = id(p), name
                layout = p.shape, p.stride()
                known, seen, made_for, laid_out = self._strengths.get(key, (None, None, layout, p))
                version = None if strength.is_inference() else strength._version  # None: changes can't be seen
                is_new = known is not strength or made_for != layout
                if is_new:
                    like = p.detach() if is_dense(p) else p.detach().contiguous()
                    laid_out = torch.empty_like(arithmetic(like))
                if is_new or version is None or version != seen or self.is_captured:
                    laid_out.copy_(strength.expand(p.shape))
                    self._strengths[key] = strength, version, layout, laid_out
                table[COLUMNS.index(name), i] = laid_out.data_ptr()
            self._filled.add(name)


def identical(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects."""
    return len(a) == len(b) and all(map(operator.is_, a, b))

"""Sparse gradients: only rows that have one are touched, and the others take the shrinkage they missed when read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchreg import sharding, unsettled
from torchreg.kernels import native_rows, pages
from torchreg.optim.groups import param_name
from torchreg.optim.hyperparameters import rounding_seed
from torchreg.optim.lookups import LookupHandle
from torchreg.optim.missed import DIAGONAL, UNIFORM, ClosedForm, Strengths, strengths_of
from torchreg.optim.penalized import PenalizedOptimizer
from torchreg.penalties.base import HALF, arithmetic
from torchreg.wording import one_line

_PIECE = 1 << 16
"""Rows that are settled at once when all are."""

Rows = Tensor | slice
_ALL = slice(None)


@dataclasses.dataclass
class RowStep:
    """The step of one table: which rows have a gradient, and which, in computing precision."""

    group: dict[str, Any]
    step: Any
    p: Tensor
    rows: Rows
    grads: Tensor
    strengths: Strengths
    entries: native_rows.Entries | None = None
    """Where the kernel takes the step: which of ``grads`` are whose."""


class SettlingOptimizer(PenalizedOptimizer):
    """An optimizer that takes sparse gradients, whose cost is that of the rows that have one.

    Rows are brought up to date when they are read: by `settle_lookups` before an embedding looks them up, by `settle`,
    or all by `flush`. Until then they hold the value of their last settling.
    """

    _row_entries: ClassVar[tuple[str, ...]] = ("settled",)
    """The entries of the state that hold a number or more for each row."""

    _watched: list[LookupHandle]
    _lazy: set[int]
    """The ids of the parameters that have had a sparse gradient."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._lazy, self._is_told, self._watched = set(), False, []
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `PenalizedOptimizer`."""
        own = ("_lazy", "_is_told", "_watched")
        self._check_rows(state)
        super().__setstate__({key: value for key, value in state.items() if key not in own})
        if "_watched" not in self.__dict__:
            self._is_told, self._watched = False, []
        self._lazy = set()
        for p, entries in self.state.items():
            if any(key in entries for key in self._row_entries):
                self._be_lazy(p)

    @torch.no_grad()
    def settle(self, param: Tensor, rows: Tensor | None = None) -> None:
        """Bring rows of a parameter up to date: the steps without a gradient that they have missed, as one.

        Call it before rows are read, unless `settle_lookups` does. Rows that missed nothing stay as they are.

        Args:
            param: a parameter of this optimizer.
            rows: indices into its first dimension, of any shape, also repeated ones; all rows by default.

        Raises:
            ValueError: if it is no parameter of this optimizer.
            TypeError: if the rows are no tensor of integers.
            IndexError: if there is no such row.
        """
        if not any(param is p for group in self.param_groups for p in group["params"]):
            raise ValueError("Expected `param` to be a parameter of this optimizer.")
        if rows is not None and (not isinstance(rows, Tensor) or rows.dtype not in (torch.int64, torch.int32)):
            given = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"Expected `rows` to be a tensor of int64 or int32, got {given}.")
        self._is_told = self._is_told or rows is not None
        self._settle(param, None if rows is None else rows.reshape(-1))

    @torch.no_grad()
    def flush(self) -> None:
        """Bring all rows of all parameters up to date: before weights are saved, exported or looked at."""
        for group in self.param_groups:
            for p in group["params"]:
                self._settle(p)

    def settle_lookups(self, module: nn.Module) -> LookupHandle:
        """Bring rows up to date before the embeddings of a module look them up.

        Every `torch.nn.Embedding` and `torch.nn.EmbeddingBag` with ``sparse=True`` whose weight this optimizer has gets
        hooks: before its forward pass the rows looked up are settled, and before its state dict is made, or one is
        loaded, all rows are. Copies of the module or of the optimizer do not have them: call it again.

        Returns:
            A handle with ``remove()``.

        Raises:
            TypeError: if ``module`` is none.
            ValueError: if it has no such embedding.
        """
        handle = LookupHandle(self, module)
        self._is_told = True
        self._watched.append(handle)
        return handle

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, strings and tensors; penalties in their dict form.

        What rows have missed is in it, so that a resumed run goes on from the weights as they are. Tables under
        `settle_lookups` are flushed, as they are when their module's state dict is made.
        """
        self._watched = [handle for handle in self._watched if handle.is_active]
        with torch.no_grad():
            for handle in self._watched:
                for p in handle.weights():
                    self._settle(p)
        return super().state_dict()

    def _loaded(self, state_dict: Mapping[str, Any]) -> None:
        ids = (saved for group in state_dict["param_groups"] for saved in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        for saved, p in zip(ids, params, strict=True):  # torch gives tensors of the state the type of the weight
            for key in self._row_entries:
                if key in self.state.get(p, {}):
                    value = state_dict["state"][saved][key]
                    self.state[p][key] = value.detach().to(device=p.device, dtype=torch.float64, copy=True)

    def _is_sparse(self, p: Tensor) -> bool:
        """Whether a parameter with a gradient is stepped row by row."""
        return p.grad is not None and (p.grad.layout is torch.sparse_coo or id(p) in self._lazy)

    def _row_steps(self, group: dict[str, Any], index: int, step: Any) -> list[RowStep]:
        """What is to be done for the tables of a group. Nothing is changed.

        Raises:
            TypeError, ValueError, RuntimeError: if rows can't be stepped by themselves.
        """
        steps = []
        for position, p in enumerate(group["params"]):
            if not self._is_sparse(p):
                continue
            try:
                self._check_table(group, p)
                strengths = strengths_of(group["penalty"], p, self._form(group))
                table = self._native(group, step, p, strengths)
                if table is None:
                    rows, grads = rows_of(p)
                    table = RowStep(group, step, p, rows, arithmetic(grads), strengths)
                self._check_told(p, table.rows, table.grads)
            except (RuntimeError, TypeError, ValueError) as error:
                name = param_name(group, position)
                raise type(error)(f"Parameter {name} of group {index} has a sparse gradient: {error}") from None
            steps.append(table)
        return steps

    def _native(self, group: dict[str, Any], step: Any, p: Tensor, strengths: Strengths) -> RowStep | None:
        """The step of a table that the compiled kernel takes; None where it can't."""
        grad = p.grad
        assert grad is not None
        if strengths.group or (strengths.l2 and self._form(group) is DIAGONAL) or grad.layout is not torch.sparse_coo:
            return None
        indices, values = grad.detach()._indices()[0], grad.detach()._values()
        state = {key: t for key, t in self.state.get(p, {}).items() if isinstance(t, Tensor)}
        numbers = [state.pop(key) for key in self._row_entries if key in state]
        if values.dtype != p.dtype or not native_rows.takes(p, values, *state.values(), numbers=numbers):
            return None
        entries = native_rows.entries_of(indices, p.shape[0])
        return None if entries is None else RowStep(group, step, p, entries.rows, values, strengths, entries)

    @torch.no_grad()
    def _take_row_steps(self, steps: list[RowStep], grad_scale: Tensor | None = None) -> None:
        for table in steps:
            p, state, form = table.p, self.state[table.p], self._form(table.group)
            self._be_lazy(p)
            if grad_scale is not None:
                table.grads = table.grads / grad_scale.to(p.device)
            if table.entries is None:
                self._settle(p, None if isinstance(table.rows, slice) else table.rows)
            keep, length = self._shrinks_by(table)
            if "settled" not in state and (keep != 1 or any(table.strengths)):
                self._begin(p, form, table.strengths)
            if "settled" in state:
                before = Strengths(*state["missed_of"])
                other = before != table.strengths or len(state["missed"]) != len(form.start)
                if other or form.must_restart(state["missed"], length, before):
                    self._settle(p)
                    self._begin(p, form, table.strengths)
                now, state["missed"] = state["missed"], form.after(state["missed"], length, keep, table.strengths)
                if table.entries is not None:
                    metric = self._native_metric(p, state) if form is DIAGONAL else None
                    table.entries.missed = native_rows.missed(
                        state["settled"], now, table.strengths.l1, metric, state["missed"]
                    )
                else:
                    put(state["settled"], table.rows, _row(state["missed"], p).expand(len(table.grads), -1))
            self._step_rows(table, state, self._rounding(table, state))
            if table.entries is not None:
                native_rows.lay_together(state, self._row_entries)

    def _rounding(self, table: RowStep, state: dict[str, Any]) -> int | Tensor | None:
        """The seed of a table in half precision."""
        if table.p.dtype not in HALF or not table.group.get("stochastic_rounding") or table.group["penalty"] is None:
            return None
        params = (p for group in self.param_groups for p in group["params"])
        return rounding_seed(int(state.get("step", 0)) + 1, next(i for i, p in enumerate(params) if p is table.p))

    def _begin(self, p: Tensor, form: ClosedForm, strengths: Strengths) -> None:
        """Begin new totals. No row has missed anything."""
        state = self.state[p]
        state["missed"], state["missed_of"] = form.start, list(strengths)
        start = _row(form.start, p)
        if "settled" not in state or state["settled"].shape[1:] != start.shape[1:]:
            room = torch.empty(p.shape[0], len(form.start), dtype=start.dtype, device=p.device)
            state["settled"] = pages.advised(room)
        state["settled"].copy_(start)

    def _settle(self, p: Tensor, rows: Tensor | None = None) -> None:
        state = self.state.get(p)
        if not state or "settled" not in state or not p.shape[0]:
            return
        if rows is not None:
            self._settle_some(p, rows, state)
            return
        for start in range(0, p.shape[0], _PIECE):
            self._settle_some(p, slice(start, start + _PIECE), state)

    def _settle_some(self, p: Tensor, rows: Rows, state: Mapping[str, Any]) -> None:
        if isinstance(rows, Tensor) and self._settle_natively(p, rows, state):
            return
        since, now = taken(state["settled"], rows), _row(state["missed"], p)
        if p.device.type == "cpu" and bool((since == now).all()):
            return
        w = arithmetic(taken(p.detach(), rows))
        form = UNIFORM if len(state["missed"]) == len(UNIFORM.start) else DIAGONAL
        metric = self._metric(p, rows, state) if form is DIAGONAL else None
        new = form.settled(w, since, now[0], Strengths(*state["missed_of"]), metric)
        put(p, rows, new)
        put(state["settled"], rows, now.expand_as(since))

    def _settle_natively(self, p: Tensor, rows: Tensor, state: Mapping[str, Any]) -> bool:
        """Settle rows by the compiled kernel; False where it can't."""
        l1, l2, group = state["missed_of"]
        is_uniform = len(state["missed"]) == len(UNIFORM.start)
        if group or (l2 and not is_uniform) or not native_rows.takes(p, numbers=[state["settled"]]):
            return False
        metric = None if is_uniform else self._native_metric(p, state)
        if not is_uniform and metric is None:
            return False
        return native_rows.settle(p, rows.long(), native_rows.missed(state["settled"], state["missed"], l1, metric))

    def _check_told(self, p: Tensor, rows: Rows, grads: Tensor) -> None:
        """Raise if rows were read before they were settled: their gradient is that of other weights.

        A dense gradient tells that the weight was read in another way than by the hooks of `settle_lookups`.
        """
        state = self.state.get(p, {})
        if "settled" not in state or (self._is_told and isinstance(rows, Tensor)):
            return
        is_behind = (taken(state["settled"], rows) != _row(state["missed"], p)).any(1)
        if isinstance(rows, slice):
            is_behind &= (grads.flatten(1) != 0).any(1)
        if bool(is_behind.any()):
            raise RuntimeError(
                "rows were looked up that had missed steps; call the optimizer's settle_lookups(model) once (again for "
                "a copy), or its settle(parameter, rows) before rows are read in another way, as by a tied layer."
            )

    def _check_table(self, group: Mapping[str, Any], p: Tensor) -> None:
        """Raise unless the rows of a parameter can be stepped by themselves."""
        assert p.grad is not None
        if sharding.is_sharded(p) or p.is_complex():
            raise TypeError("a table that is complex or sharded over processes can't be stepped row by row.")
        if p.grad.layout is torch.sparse_coo and p.grad.sparse_dim() != 1:
            raise TypeError(f"it has {p.grad.sparse_dim()} sparse dimensions, and rows are one.")
        for key in ("fused", "differentiable", "capturable"):
            if group.get(key):
                raise RuntimeError(f"`{key}=True` can't be had for it.")

    def _be_lazy(self, p: Tensor) -> None:
        if id(p) not in self._lazy:
            self._lazy.add(id(p))
            unsettled.register(p, self._settle)

    def _group_of(self, p: Tensor) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(p is q for q in group["params"]))

    def _check_rows(self, state: Mapping[str, Any]) -> None:
        """Raise unless the loaded entries of tables are what they should be."""
        for i, group in enumerate(state["param_groups"]):
            for position, p in enumerate(group["params"]):
                entries = state["state"].get(p) if isinstance(p, Tensor) else None
                if entries:
                    for problem in _problems(entries, p, self._row_entries):
                        raise ValueError(f"The loaded state of parameter {position} of group {i}: {problem}.")

    def _form(self, group: Mapping[str, Any]) -> ClosedForm:
        """The closed form of missed steps in this group."""
        return UNIFORM

    def _metric(self, p: Tensor, rows: Rows, state: Mapping[str, Any]) -> Tensor:
        """What a step is multiplied by for each weight of these rows, where they are not alike."""
        raise NotImplementedError

    def _native_metric(self, p: Tensor, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the compiled kernel computes `_metric` from; None where it can't."""
        return None

    def _shrinks_by(self, table: RowStep) -> tuple[float, float]:
        """What a step without gradient keeps of a weight before it shrinks it, and the length of that step."""
        raise NotImplementedError

    def _step_rows(self, table: RowStep, state: dict[str, Any], seed: int | Tensor | None) -> None:
        """Step the rows that have a gradient, which are settled."""
        raise NotImplementedError


def taken(t: Tensor, rows: Rows) -> Tensor:
    """These rows: a view of a slice."""
    if isinstance(rows, Tensor):
        return t.index_select(0, rows)
    return t if rows == _ALL else t[rows]


def put(t: Tensor, rows: Rows, values: Tensor) -> None:
    """Overwrite these rows."""
    t = t.detach()
    if isinstance(rows, Tensor):
        t.index_copy_(0, rows.long(), values.to(t.dtype))
    else:
        taken(t, rows).copy_(values)


def _row(totals: list[float], p: Tensor) -> Tensor:
    return torch.tensor([totals], dtype=torch.float64, device=p.device)


def rows_of(p: Tensor) -> tuple[Rows, Tensor]:
    """The rows that have a gradient, each once, and their gradients."""
    assert p.grad is not None
    if p.grad.layout is not torch.sparse_coo:
        return _ALL, p.grad
    grad = p.grad.coalesce()
    return grad.indices()[0], grad.values()


def _problems(entries: Mapping[str, Any], p: Tensor, keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        value = entries.get(key)
        if value is not None and (not isinstance(value, Tensor) or value.shape[:1] != p.shape[:1] or value.ndim > 2):
            given = f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            yield f"expected {key!r} to be a tensor with {p.shape[0] if p.ndim else 0} rows, got {given}"
    if isinstance(entries.get("settled"), Tensor):
        width, missed, of = entries["settled"].shape[-1], entries.get("missed"), entries.get("missed_of")
        if not _are_numbers(missed, width):
            yield f"expected 'missed' to be {width} finite numbers, got {one_line(missed)}"
        if not _are_numbers(of, len(Strengths._fields)):
            yield f"expected 'missed_of' to be three strengths, got {one_line(of)}"


def _are_numbers(values: Any, count: int) -> bool:
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(type(v) in (int, float) and 0 <= v < math.inf for v in values)

"""What a trainer attaches to its optimizer: penalties, what moves their strength, and the monitor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchreg.hook import PenaltyHandle
from torchreg.integrations.routes import ROUTES, holds, made_proximal, raw
from torchreg.monitor import SparsityMonitor, SparsityReport
from torchreg.penalties import L1
from torchreg.regularizer import Regularizer
from torchreg.scales import checked_count

_KEYS = {"steps", "penalties", "strength_scale", "schedules", "monitor"}


class Regularization:
    """Penalties in a training that a trainer runs, with what moves their strength and watches the zeros.

    A step counts when the optimizer takes it: micro-batches that are accumulated, steps that a GradScaler skips and
    steps without any gradient move no schedule and shrink nothing. (A fused step on CUDA that skips by itself counts:
    the host does not know.)

    Args:
        rules: a penalty, rules as `torchreg.Regularizer` takes them, or a Regularizer of the model. With the route
            ``"groups"`` it may be None.
        route: how the penalty acts. ``"hook"``: its gradient is added inside the optimizer's steps, by
            `Regularizer.attach`. ``"proximal"``: the param groups are divided by penalty and the steps end in
            the proximal operator, which gives exact zeros: one of torch's is wrapped in `torchreg.Proximal`, one of
            torchreg's takes the penalties itself. ``"groups"``: the optimizer was built with penalties
            (`Regularizer.param_groups`), and stays as it is.
        schedule: what moves the strength: a function of the optimizer (of the regularizer for the route ``"hook"``)
            that returns a schedule of `torchreg.schedules`, a `torchreg.TargetSparsity`, or a list of such. It is
            stepped after each step of the optimizer.
        every: steps between logs.
        monitor: more arguments for `torchreg.SparsityMonitor`, such as ``{"histograms": True}``.

    Attributes:
        regularizer: the rules' `Regularizer`, while attached; None without rules.
        schedules: what ``schedule`` returned, as a list.
        monitor: the `SparsityMonitor`, while attached.
        steps: the optimizer's steps so far.

    Raises:
        TypeError: if ``schedule`` is not callable.
        ValueError: if the route is unknown, or lacks rules.

    >>> import torch, torchreg
    >>> from torchreg.integrations import Regularization
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 0.05)
    >>> regularization = Regularization(torchreg.L1(1.0), route="proximal")
    >>> (optimizer,) = regularization.attach(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    >>> model.weight.grad = torch.tensor([[0.0, -1.0]])
    >>> optimizer.step()
    >>> model.weight.data, regularization.steps
    (tensor([[0.0000, 0.0500]]), 1)
    """

    def __init__(
        self,
        rules: Any = None,
        *,
        route: str = "hook",
        schedule: Callable[[Any], Any] | None = None,
        every: int = 100,
        monitor: Mapping[str, Any] | None = None,
    ) -> None:
        if route not in ROUTES:
            raise ValueError(f"Expected `route` to be one of {', '.join(map(repr, ROUTES))}, got {route!r}.")
        if rules is None and route != "groups":
            raise ValueError(f"Expected `rules` for the route {route!r}: a penalty, rules or a Regularizer, got None.")
        if schedule is not None and not callable(schedule):
            raise TypeError(
                f"Expected `schedule` to be a function of the optimizer, such as lambda optimizer: "
                f"TargetSparsity(optimizer, 0.9, until=1000), got {type(schedule).__name__}."
            )
        self.rules, self.route, self.every = rules, route, every
        self._schedule, self._options = schedule, dict(monitor or {})
        self.regularizer: Regularizer | None = None
        self.schedules: list[Any] = []
        self.monitor: SparsityMonitor | None = None
        self.steps = 0
        self._watched, self._watches = 0, True
        self._handles: list[PenaltyHandle] = []
        self._prepared: tuple[Regularizer, weakref.ref[Optimizer]] | None = None
        self._hook: RemovableHandle | None = None
        self._counted: weakref.ref[Optimizer] | None = None
        self._loaded: Mapping[str, Any] = {}
        self._last: dict[str, Any] = {}

    @property
    def attached(self) -> bool:
        """Whether it is attached to an optimizer."""
        return self._hook is not None

    def is_attached_to(self, optimizer: Any) -> bool:
        """Whether it counts the steps of this optimizer."""
        return self.attached and self._counted is not None and self._counted() is raw(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        """Copies are not attached, as copies of optimizers have no hooks; attached, they go on with this state."""
        plain = Regularization(self.rules or L1(0.0), route=self.route, schedule=self._schedule, every=self.every)
        return {**plain.__dict__, "rules": self.rules, "_options": self._options, "_loaded": self.state_dict()}

    def attach(
        self,
        model: nn.Module,
        optimizers: Iterable[Any],
        *,
        lr_schedulers: Iterable[Any] = (),
        writer: Any = None,
        watch: bool = True,
    ) -> list[Optimizer]:
        """Make the optimizers apply the penalties, and begin to count their steps.

        A state that was loaded before is taken over now.

        Args:
            model: whose parameters the rules choose from.
            optimizers: the optimizers of the training; wrappers of Lightning and Accelerate may be around them.
            lr_schedulers: learning rate schedulers built for them, which have to know if param groups are divided.
            writer: what the monitor writes to; None writes nothing.
            watch: whether the monitor counts steps by itself. Otherwise call `watch` after them.

        Returns:
            The optimizers to step from now on, in the same order.

        Raises:
            RuntimeError: if it is attached already.
            ValueError: if no optimizer holds a penalised parameter, an optimizer applies penalties already (route
                ``"hook"``) or none does (``"groups"``), or one of its param groups can't be divided.
        """
        if self.attached:
            raise RuntimeError("This Regularization is attached already: detach() it first.")
        found, lr_schedulers = [raw(optimizer) for optimizer in optimizers], list(lr_schedulers)
        prepared = self._prepared is not None and any(self._prepared[1]() is optimizer for optimizer in found)
        regularizer = self._prepared[0] if prepared and self._prepared else self._regularizer(model)
        mine = [i for i, optimizer in enumerate(found) if self._concerns(optimizer, regularizer)]
        if not mine:
            what = "applies penalties" if self.route == "groups" else "holds a penalised parameter"
            raise ValueError(
                f"None of the {len(found)} optimizers {what}: {', '.join(type(o).__name__ for o in found)}."
            )
        handles: list[PenaltyHandle] = []
        try:
            for i in mine:
                if self.route == "hook":
                    assert regularizer is not None
                    handles.append(regularizer.attach(found[i]))
                elif self.route == "proximal" and not prepared:
                    assert regularizer is not None
                    own = [s for s in lr_schedulers if getattr(s, "optimizer", None) is found[i]]
                    found[i] = made_proximal(found[i], regularizer, own)
            schedules = self._scheduled(regularizer if self.route == "hook" else found[mine[0]])
            source = model if regularizer is None else regularizer
            options = {"optimizer": found[mine[0]], "every": self.every, **self._options}
            monitor = SparsityMonitor(source, writer, **options)
        except BaseException:
            for handle in handles:
                handle.remove()
            raise
        self.regularizer, self.schedules, self.monitor, self._handles = regularizer, schedules, monitor, handles
        self._counted, self._watches = weakref.ref(found[mine[0]]), watch
        self._hook = found[mine[0]].register_step_post_hook(self._after_step)
        hooks: Any = found[mine[0]]._optimizer_step_post_hooks
        hooks.move_to_end(self._hook.id, last=False)  # before one that zeroes the gradients
        self.steps = self._watched = 0
        if self._loaded:
            loaded, self._loaded = self._loaded, {}
            try:
                self.load_state_dict(loaded)
            except BaseException:
                self.detach()
                raise
        return found

    def made_proximal(self, model: nn.Module, optimizer: Optimizer) -> Optimizer:
        """For the route ``"proximal"``, divide an optimizer's param groups now, before others build on them.

        Returns:
            The optimizer to step, which `attach` takes as it is.
        """
        regularizer = self._regularizer(model)
        if self.route != "proximal" or regularizer is None:
            raise ValueError(f"Expected the route 'proximal', got {self.route!r}.")
        made = made_proximal(optimizer, regularizer)
        self._prepared = regularizer, weakref.ref(made)
        return made

    def adopt(self, model: nn.Module, optimizer: Optimizer) -> None:
        """For the route ``"proximal"``, let `attach` take an optimizer as it is that a copy of this has made so."""
        regularizer = self._regularizer(model)
        if self.route != "proximal" or regularizer is None:
            raise ValueError(f"Expected the route 'proximal', got {self.route!r}.")
        for group in optimizer.param_groups:
            group["strength_scale"] = regularizer.strength_scale
        self._prepared = regularizer, weakref.ref(optimizer)

    def detach(self) -> None:
        """Write the last log, and let go of the optimizers. A proximal one stays so. Twice does no harm.

        The state stays that of the end, for checkpoints that are written afterwards.
        """
        if self._hook is None:
            return
        self._last = self.state_dict()
        self._hook.remove()
        self._hook = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for schedule in self.schedules:
            if hasattr(schedule, "remove"):
                schedule.remove()
        if self.monitor is not None:
            self.monitor.close()

    def watch(self, loss: Tensor | float | None = None) -> SparsityReport | None:
        """Tell the monitor of the steps since the last call.

        Args:
            loss: the data's loss.

        Returns:
            The report, if one was made now.
        """
        if self.monitor is None:
            return None
        before = self.monitor.report
        while self._watched < self.steps:
            self._watched += 1
            self.monitor.step(loss=loss)
        return self.monitor.report if self.monitor.report is not before else None

    def state_dict(self) -> dict[str, Any]:
        """Penalties, strength scale, schedules and the steps: numbers, strings and tensors only.

        Where the optimizer applies the penalties, its own state has them too.
        """
        if not self.attached:
            return dict(self._loaded or self._last)
        scale = None if self.regularizer is None else self.regularizer.strength_scale.detach().clone()
        assert self.monitor is not None
        return {
            "steps": self.steps,
            "penalties": self._handles[0].state_dict() if self._handles else None,
            "strength_scale": scale,
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "monitor": self.monitor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was saved: now, or as soon as it is attached.

        Raises:
            ValueError, TypeError: if it is no such state, or one of other penalties or schedules (nothing is changed).
        """
        if not isinstance(state, Mapping) or (state and set(state) != _KEYS):
            raise ValueError(f"Expected the state of a Regularization, with the keys {', '.join(sorted(_KEYS))}.")
        if not self.attached or not state:
            self._loaded = dict(state)
            return
        if len(state["schedules"]) != len(self.schedules) or bool(state["penalties"]) != bool(self._handles):
            raise ValueError(
                f"The saved state is of {len(state['schedules'])} schedules, {_by(state['penalties'])}; "
                f"here are {len(self.schedules)}, {_by(self._handles)}."
            )
        steps, before = checked_count("steps", state["steps"]), self.state_dict()
        try:
            self._load({**state, "steps": steps})
        except BaseException:
            self._load(before)
            raise

    def _load(self, state: Mapping[str, Any]) -> None:
        assert self.monitor is not None
        if self._handles:
            self._handles[0].load_state_dict(state["penalties"])
        elif self.regularizer is not None and state["strength_scale"] is not None:
            self.regularizer.strength_scale = state["strength_scale"]
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        self.monitor.load_state_dict(state["monitor"])
        self.steps = self._watched = state["steps"]

    def _regularizer(self, model: nn.Module) -> Regularizer | None:
        if self.rules is None or isinstance(self.rules, Regularizer):
            return self.rules
        return Regularizer(model, self.rules)

    def _concerns(self, optimizer: Optimizer, regularizer: Regularizer | None) -> bool:
        if self.route == "groups":
            penalized = any(group.get("penalty") is not None for group in optimizer.param_groups)
            return penalized and bool(getattr(optimizer, "applies_penalties", False))
        assert regularizer is not None
        return holds(optimizer, regularizer)

    def _scheduled(self, holder: Any) -> list[Any]:
        made = self._schedule(holder) if self._schedule is not None else []
        schedules = list(made) if isinstance(made, Sequence) else [made]
        for schedule in schedules:
            if not all(callable(getattr(schedule, name, None)) for name in ("step", "state_dict", "load_state_dict")):
                raise TypeError(
                    f"Expected `schedule` to return schedules or a TargetSparsity, got {type(schedule).__name__}."
                )
        return schedules

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            return
        self.steps += 1
        for schedule in self.schedules:
            schedule.step()
        if self._watches:
            self.watch()


def _by(penalties: Any) -> str:
    return "with the penalties in the route 'hook'" if penalties else "without a hook"

"""Any torch optimizer, with a proximal operator at the end of its steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchreg import kernels, sharding
from torchreg.hook import is_attached
from torchreg.optim.base import ProxPoint, usable_penalty
from torchreg.optim.groups import (
    acting,
    adopt_penalties,
    check_form,
    check_penalized_params,
    check_required,
    check_state_shapes,
    checked_penalty,
    checked_scale,
    packed,
    param_name,
    share_scales,
)
from torchreg.optim.hyperparameters import product, rounding_seed, scalar
from torchreg.optim.loading import all_or_nothing
from torchreg.optim.metrics import Metric, ProxSteps
from torchreg.penalties import Penalty
from torchreg.penalties.base import HALF, Step
from torchreg.penalties.separable import is_shrinkage

_LATER = {"foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay", "amsgrad"}
"""Hyperparameters that torch's optimizers fill in where a checkpoint lacks them."""

_COUNT = "proximal_steps"
"""A number in the state, which loading would round to the parameter's type if it were a tensor."""


def _shared(name: str, doc: str) -> Any:
    """An attribute that is the inner optimizer's."""

    def get(self: Proximal) -> Any:
        return getattr(self.inner, name)

    def put(self: Proximal, value: Any) -> None:
        setattr(self.inner, name, value)

    def delete(self: Proximal) -> None:
        delattr(self.inner, name)

    return property(get, put, delete, doc)


class Proximal(Optimizer):
    r"""Any torch optimizer, with the penalty's proximal operator at the end of its steps.

    .. math::
        w \leftarrow \operatorname{prox}_{s \tau R}(\text{the optimizer's step from } w), \qquad
        \tau_i = \gamma \, G / d_i

    with the learning rate γ, the strength scale s, the momentum's gain G on a constant gradient and what the optimizer
    divides the i-th gradient by in this very step, d_i: its metric. So a weight is shrunk by the step that moved it,
    and the fixed points are the minimisers of f + s·R whatever the optimizer (with weight decay, of the problem that
    has it too):

    ============  ===============================================  =========================
    optimizer     d                                                G
    ============  ===============================================  =========================
    SGD           1                                                as in `ProxSGD`
    Adam, AdamW   √v̂ + ε (amsgrad: of the largest v)               1
    NAdam         √v̂ + ε                                           →1, by its schedule of μ
    RAdam         (√v + ε)/(r_t √(1−β₂^t)); 1 before rectified     1
    RMSprop       √v + ε (centered: √(v−ḡ²) + ε)                   1/(1−μ)
    Adagrad       (√Σg² + ε)(1 + (t−1)·lr_decay)                   1
    Adamax        u, the decaying maximum of abs(g) + ε            1
    ============  ===============================================  =========================

    Muon, Adafactor, Lion and LBFGS have no such metric, and nothing is known of the classes of others (also of
    subclasses of these, which may change the update): there ``metric`` must be given.

    It shares the optimizer's param groups and state, so that schedulers may hold either of the two. `ProxSGD` and
    `ProxAdamW` are faster than this around SGD and AdamW (one pass over memory), and in half precision round the sum
    of the step and the shrinkage once; here the optimizer has rounded its step already.

    Args:
        optimizer: an instance of any torch optimizer, built from `Regularizer.param_groups`, or from groups with
            ``penalty`` and ``strength_scale``: optimizers of torch keep keys that they do not know.
        metric: None takes the optimizer's own; ``"identity"`` shrinks all weights alike by γ·G (G = 1 where it is not
            known); or a function of (optimizer, param group, parameter), called after the optimizer's step, that
            returns τ: a number, a 0-d tensor, or one value per coordinate.
        penalty: R for the groups that name none; None is none.
        strength_scale: s for the groups that name none, a float or 0-d tensor that a schedule may move.
        stochastic_rounding: how shrunk half-precision weights are rounded; False rounds to nearest.

    Attributes:
        inner: the optimizer.

    Hooks on this optimizer run around the whole step, hooks on the inner one around the descent; global hooks see both.
    A step that ``found_inf`` skips shrinks nothing. ``state_dict()`` holds numbers, strings and tensors only, penalties
    included, and loads with ``torch.load(weights_only=True)``; that of the bare optimizer loads too, and leaves the
    penalties. A closure is evaluated once before the descent, except where an unknown optimizer needs it.

    Raises:
        TypeError: if ``optimizer`` is no torch optimizer, applies penalties itself, or has no known metric and none is
            given; if a penalty is no `Penalty`, a penalised weight has a sparse gradient (no weight is changed then),
            or is complex where the optimizer's metric treats its two parts apart.
        ValueError: if a regularizer is attached to the optimizer, a group is differentiable, lists a penalised
            parameter twice or has a momentum of 1 or more, or a loaded state has other shapes (nothing is changed).

    >>> import torch, torchreg
    >>> w = torch.nn.Parameter(torch.tensor([2.0, 0.1]))
    >>> adam = torch.optim.Adam([{"params": [w], "penalty": torchreg.L1(0.5)}], lr=0.5)
    >>> opt = torchreg.Proximal(adam)
    >>> w.grad = torch.tensor([1.0, 0.01])
    >>> opt.step()  # √v̂ = |g|: w moves by 0.5·sign(g) and shrinks by 0.5·0.5/|g|
    >>> w.data
    tensor([1.2500, 0.0000])

    Source: Yun, Lozano and Yang, Adaptive proximal gradient methods for structured neural networks, NeurIPS 2021.
    """

    applies_penalties = True

    inner: Optimizer
    param_groups = _shared("param_groups", "The inner optimizer's param groups.")
    state = _shared("state", "The inner optimizer's state.")
    defaults = _shared("defaults", "The inner optimizer's defaults.")
    grad_scale = _shared("grad_scale", "What GradScaler leaves to a fused optimizer to divide by.")
    found_inf = _shared("found_inf", "Whether GradScaler wants a fused optimizer to skip the step.")

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        metric: str | Metric | None = None,
        penalty: Penalty | None = None,
        strength_scale: float | Tensor = 1.0,
        stochastic_rounding: bool = True,
    ) -> None:
        _check_optimizer(optimizer)
        own = {"penalty": checked_penalty(penalty), "strength_scale": checked_scale(strength_scale)}
        self._steps = ProxSteps(optimizer, metric)
        self._stochastic_rounding = stochastic_rounding
        for i, group in enumerate(optimizer.param_groups):
            self._check_group({**own, **group}, i)
        for target in (optimizer.defaults, *optimizer.param_groups):
            for key, value in own.items():
                target.setdefault(key, value)
        self._wrap(optimizer)

    def _wrap(self, optimizer: Optimizer) -> None:
        self.inner = optimizer
        optimizer.applies_penalties = True  # type: ignore[attr-defined]  # so that no regularizer is attached to it
        self._prox_pre_hooks: OrderedDict[int, Callable[..., None]] = OrderedDict()
        super().__setstate__({})  # the hooks of a torch optimizer

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner, "metric": self._steps.metric, "stochastic_rounding": self._stochastic_rounding}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Used by unpickling and deepcopy; hooks are not copied, as in torch."""
        self._steps = ProxSteps(state["inner"], state["metric"])
        self._stochastic_rounding = state["stochastic_rounding"]
        self._wrap(state["inner"])

    def __repr__(self) -> str:
        return f"Proximal({self.inner!r})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; see `torch.optim.Optimizer.zero_grad`."""
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; see `torch.optim.Optimizer.add_param_group`."""
        self.inner.add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1], len(self.param_groups) - 1)
        except (RuntimeError, TypeError, ValueError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state as numbers, strings and tensors; penalties in their dict form."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = packed(self.inner.state_dict())
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer or of the bare inner one, which leaves the penalties as they are.

        Raises:
            ValueError: if it is no optimizer's state, or one of other groups, shapes or hyperparameters.
            TypeError: if a penalty or buffer in it is of the wrong type. In no case is anything changed then.
        """
        check_form(state_dict)
        with all_or_nothing(self.inner):
            self._load(dict(state_dict))

    def _load(self, state_dict: dict[str, Any]) -> None:
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        current = self.param_groups
        groups = [dict(group) for group in state_dict["param_groups"]]
        if [len(group["params"]) for group in groups] == [len(group["params"]) for group in current]:
            self._adopt(groups, current, state_dict["state"])
        self.inner.load_state_dict({**state_dict, "param_groups": groups})  # raises where the groups don't fit
        share_scales(self.param_groups, current)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _adopt(self, groups: list[dict[str, Any]], current: list[dict[str, Any]], state: Mapping[Any, Any]) -> None:
        """Turn the loaded groups' penalties into objects, in place, or raise: the inner optimizer checks little."""
        needed = set(self.defaults) - _LATER - {"penalty", "strength_scale"}
        name = type(self.inner).__name__
        check_required(groups, sorted(needed.intersection(*current)), f"Proximal({name}) or {name}")
        loaded = [{**group, "params": mine["params"]} for group, mine in zip(groups, current, strict=True)]
        adopt_penalties(loaded, current)
        for i, group in enumerate(loaded):
            self._check_group(group, i)
        if self._steps.known is not None:
            ids = (saved for group in groups for saved in group["params"])
            params = (p for group in loaded for p in group["params"])
            by_param = {p: state.get(saved, {}) for saved, p in zip(ids, params, strict=True)}
            check_state_shapes(loaded, by_param, self._steps.known.buffers)
        for group, new in zip(groups, loaded, strict=True):
            group["penalty"], group["strength_scale"] = new["penalty"], new["strength_scale"]

    def register_prox_pre_hook(self, hook: Callable[[Optimizer, list[ProxPoint]], None]) -> RemovableHandle:
        """Call ``hook(optimizer, points)`` in every step between the descent and the proximal operators.

        It gets a `ProxPoint` for every penalised group that has gradients, and may change the groups'
        ``strength_scale``, which the proximal operators then take. Copies of the optimizer do not have the hook.
        """
        handle = RemovableHandle(self._prox_pre_hooks)
        self._prox_pre_hooks[handle.id] = hook
        return handle

    def effective_step(self, group: Mapping[str, Any]) -> float | Tensor | None:
        """γ·G·strength_scale, the step of the proximal operator in this group; None where each weight has its own."""
        if group["penalty"] is None:
            return 0.0
        return self._steps.base(group) if self._steps.is_uniform else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        for i, group in enumerate(self.param_groups):
            if isinstance(group.get("penalty", {}), Mapping) or "strength_scale" not in group:
                raise RuntimeError(f"Group {i} has lost its penalty: load checkpoints by Proximal, not by its `inner`.")
        penalized = [i for i, group in enumerate(self.param_groups) if usable_penalty(group) is not None]
        for i in penalized:
            group = self.param_groups[i]
            self._steps.check(group, i)
            if self._steps.is_uniform:
                group["penalty"].check_step(self._steps.base(group))
        loss = None
        if closure is not None and self._steps.known is not None:
            with torch.enable_grad():
                loss = closure()
            closure = None
        moved = {} if closure is not None else self._with_gradients(penalized)
        if closure is None:
            self.inner.step()
        else:
            loss = self.inner.step(closure)
            moved = self._with_gradients(penalized)
        self._count()
        self._proximal_operators(moved)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """As the inner optimizer says, unless what comes after its step has to know whether it was taken."""
        if self._prox_pre_hooks or not getattr(self.inner, "_step_supports_amp_scaling", False):
            return False
        penalties = [group["penalty"] for group in self.param_groups if group["penalty"] is not None]
        return all(penalty.strengths() and not penalty.is_joint for penalty in penalties)

    def _with_gradients(self, penalized: list[int]) -> dict[int, list[tuple[int, Tensor]]]:
        """By penalised group, its parameters that have a gradient, each with its position among all parameters."""
        chosen: dict[int, list[tuple[int, Tensor]]] = {}
        offset = 0
        for i, group in enumerate(self.param_groups):
            for position, p in enumerate(group["params"]):
                if i not in penalized or p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise TypeError(
                        f"Parameter {param_name(group, position)} of group {i} (shape {tuple(p.shape)}) has a penalty "
                        f"and a gradient that is {p.grad.layout}: build its embedding with sparse=False."
                    )
                chosen.setdefault(i, []).append((offset + position, p))
            offset += len(group["params"])
        return chosen

    def _proximal_operators(self, moved: dict[int, list[tuple[int, Tensor]]]) -> None:
        if self._prox_pre_hooks:
            groups = {i: [p for _, p in entries] for i, entries in moved.items()}
            points = [
                ProxPoint(
                    self.param_groups[i],
                    [sharding.local(p) for p in params],
                    [self._steps.unit(self.param_groups[i], p) for p in params],
                    params,
                )
                for i, params in groups.items()
            ]
            for hook in list(self._prox_pre_hooks.values()):
                hook(self, points)
        spread = []
        for i, entries in moved.items():
            group = self.param_groups[i]
            penalty = usable_penalty(group)
            rounds = self._stochastic_rounding and any(p.dtype in HALF for _, p in entries)
            if sharding.any_sharded(p for _, p in entries):
                params = [p for _, p in entries]
                steps = [self._scaled(self._steps.unit(group, p), group, p) for p in params]
                seeds = [self._seed(p, index) + sharding.layout(p).seed() for index, p in entries] if rounds else []
                parts = [sharding.local(p) for p in params]
                spread.append((acting(penalty, group, params), params, parts, steps, seeds))
                continue
            if is_shrinkage(penalty) and penalty.shrinkage(1.0) is not None and not rounds:
                for w, unit in (piece for _, p in entries for piece in self._steps.pieces(group, p)):
                    kernels.shrink([w], penalty, [self._scaled(unit, group, w)])
                continue
            for part in [entries] if penalty.is_joint else [[entry] for entry in entries]:  # one metric at a time
                params = [p for _, p in part]
                steps = [self._scaled(self._steps.unit(group, p), group, p) for p in params]
                seeds = [self._seed(p, index) for index, p in part] if rounds else []
                kernels.shrink(params, acting(penalty, group, params), steps, seeds)
        if spread:
            kernels.shrink_sharded(spread)
            torch.autograd.graph.increment_version([p for _, params, _, _, _ in spread for p in params])

    def _scaled(self, unit: Step, group: Mapping[str, Any], p: Tensor) -> Step:
        """The step times the strength scale, or zero where the device has skipped the descent."""
        step = product(unit, scalar(group["strength_scale"]))
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return step
        if not isinstance(step, Tensor):
            step = torch.full((), step, device=p.device, dtype=torch.promote_types(p.real.dtype, torch.float32))
        return torch.where(found_inf.to(step.device).reshape(()) == 0, step, 0.0)

    def _count(self) -> None:
        """Count the steps of what is rounded where the optimizer does not.

        All parameters get a counter: torch.distributed.checkpoint expects a state for all or for none.
        """
        if not self._stochastic_rounding or (self._steps.known is not None and self._steps.known.counts):
            return
        penalized = (p for group in self.param_groups if group["penalty"] is not None for p in group["params"])
        if any(p.dtype in HALF for p in penalized):
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                self.state[p][_COUNT] = self.state[p].get(_COUNT, 0) + 1

    def _seed(self, p: Tensor, index: int) -> int | Tensor:
        state = self.state[p]
        step = state[_COUNT] if _COUNT in state else state["step"]
        on_device = isinstance(step, Tensor) and step.device.type != "cpu"
        return rounding_seed(step.long() if on_device else int(step), index)

    def _check_group(self, group: Mapping[str, Any], index: int) -> None:
        """Raise unless the group's penalty can be applied to each of its parameters."""
        checked_penalty(group["penalty"])
        checked_scale(group["strength_scale"])
        check_penalized_params(group, index)
        if group["penalty"] is not None:
            self._steps.check(group, index)


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        given = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(f"Expected `optimizer` to be an instance of a torch.optim.Optimizer, got {given}.")
    if getattr(type(optimizer), "applies_penalties", False):
        raise TypeError(f"{type(optimizer).__name__} applies penalties itself: use it without Proximal.")
    if is_attached(optimizer):
        raise ValueError(
            f"A regularizer is attached to this {type(optimizer).__name__}, which would apply penalties twice: "
            "remove() its handle first."
        )

"""What all proximal optimizers share: fused steps, and the order of a step."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, _use_grad_for_differentiable
from torch.utils.hooks import RemovableHandle

from torchreg import kernels
from torchreg.kernels.plan import identical
from torchreg.optim.groups import acting, checked_penalty, checked_scale
from torchreg.optim.preview import previewed
from torchreg.optim.settling import RowStep, SettlingOptimizer
from torchreg.penalties import L1, L2, ElasticNet
from torchreg.penalties.base import HALF, Step
from torchreg.penalties.parts import divided, spans
from torchreg.penalties.separable import is_shrinkage
from torchreg.sharding import any_sharded, local

_UNSHRUNK = L1(0.0)
"""Takes the place of a penalty while the descent is computed alone: rounding and arithmetic stay those of a penalty."""


@dataclasses.dataclass
class ProxPoint:
    """The weights of a param group between its descent and its proximal operator.

    Attributes:
        group: the param group.
        params: its parameters that have a gradient, moved by the gradient and not yet shrunk.
        steps: τ for each of them without the strength scale: a float, a 0-d tensor, or one value per coordinate.
        origins: of a preview, whose ``params`` are vectors of some weights, the parameters that these are of.
        positions: of a preview, which: flat indices, or None for all weights.
    """

    group: dict[str, Any]
    params: list[Tensor]
    steps: list[Step]
    origins: list[Tensor] | None = None
    positions: list[Tensor | None] | None = None


class _KnownStep(NamedTuple):
    """The step of a param group, and the hyperparameters that it was made of; ``numbers`` are those of tensors."""

    values: list[Any]
    numbers: list[float | None]
    step: Any


Hook = Callable[[Optimizer, list[ProxPoint]], None]
Shrunk = tuple[dict[str, Any], Any, list[Tensor]]
"""A group with some of its tensors, of which only the proximal operator is left to do, and whose they are."""

Sampler = Callable[[dict[str, Any], list[Tensor]], list[Tensor | None] | None]
"""From a group and those of its parameters that have gradients to flat indices in each, or None for the group."""


class ProximalOptimizer(SettlingOptimizer):
    """An optimizer whose groups may hold ``penalty`` and ``strength_scale``, and whose steps end in the prox."""

    _local = ("fused",)
    _update: ClassVar[kernels.Update]

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._fused = kernels.FusedSteps(self._update)
        self._known_steps: dict[int, _KnownStep] = {}
        self._prox_pre_hooks: OrderedDict[int, Hook] = OrderedDict()
        self._preview_hooks: OrderedDict[int, tuple[Hook, Sampler]] = OrderedDict()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `PenalizedOptimizer`; what is prepared for fused steps, and the hooks, are no part of the state."""
        own = ("_fused", "_known_steps", "_prox_pre_hooks", "_preview_hooks")
        super().__setstate__({key: value for key, value in state.items() if key not in own})
        self._fused, self._known_steps = kernels.FusedSteps(self._update), {}
        if "_prox_pre_hooks" not in self.__dict__:
            self._prox_pre_hooks, self._preview_hooks = OrderedDict(), OrderedDict()

    @_use_grad_for_differentiable
    def step(self, closure: Any = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def step_counts(self) -> kernels.FusedSteps | None:
        """What the last steps counted of the weights on their way, or None if the last was not a fused one."""
        return self._fused if self._fused.counted() or self._fused.has_changes() else None

    def register_prox_pre_hook(self, hook: Hook) -> RemovableHandle:
        """Call ``hook(optimizer, points)`` in every step between the descent and the proximal operators.

        It gets a `ProxPoint` for every penalised group that has gradients, and may change the groups'
        ``strength_scale``, which the proximal operators then take. Such a step passes over memory twice. Copies of the
        optimizer do not have the hook.
        """
        handle = RemovableHandle(self._prox_pre_hooks)
        self._prox_pre_hooks[handle.id] = hook
        return handle

    def register_prox_preview_hook(self, hook: Hook, sampler: Sampler) -> RemovableHandle:
        """Call ``hook(optimizer, points)`` before every step with where a sample of the weights will be amid it.

        As `register_prox_pre_hook`, but the step takes one pass over memory: the points are computed for the weights
        that ``sampler(group, params)`` chooses of a penalised group, apart from the step.
        """
        handle = RemovableHandle(self._preview_hooks)
        self._preview_hooks[handle.id] = (hook, sampler)
        return handle

    def _step(self) -> None:
        """The step, once the closure has been called."""
        gradients = [self._gradients(group, i) for i, group in enumerate(self.param_groups)]  # may raise
        grad_scale, found_inf = (_known(self, name) for name in ("grad_scale", "found_inf"))
        on_device = found_inf is not None and self._step_supports_amp_scaling and not self._needs_host()
        if found_inf is not None and not on_device and bool(found_inf):
            return
        steps = [self._group_step(i, group) for i, group in enumerate(self.param_groups)]  # may raise: no change yet
        origins = [tensors.params for tensors in gradients]
        spread = {i for i, params in enumerate(origins) if any_sharded(params)}
        for i, step in enumerate(steps):
            if step.penalty is not None:
                step.check()
            if step.differentiable and i in spread:
                raise RuntimeError("`differentiable` can't be had for parameters that are sharded over processes.")
        tables: list[RowStep] = []
        for i, (group, step) in enumerate(zip(self.param_groups, steps, strict=True)):
            if len(origins[i]) < len(group["params"]):
                tables += self._tables(group, i, step)
        whole = {i for i, step in enumerate(steps) if step.penalty is not None and self._is_apart(step.penalty)}
        counts = any(map(_rounds, self.param_groups))
        offset, parts = 0, []
        for i, (group, tensors, step) in enumerate(zip(self.param_groups, gradients, steps, strict=True)):
            self._add_state(tensors, group, offset, counts)
            if i in spread:
                tensors = tensors.parts()
            if grad_scale is not None and not on_device:
                tensors.grads = [g / grad_scale.to(g.device) for g in tensors.grads]
            parts.append((tensors, step))
            offset += len(group["params"])
        if self._preview_hooks:
            parts = self._previewed(parts, origins, grad_scale if on_device else None)
        taken: list[tuple[Any, Any]] = []
        wishes: list[kernels.selection.Wish] = []
        apart: list[Shrunk] = []
        for i, (group, (tensors, step)) in enumerate(zip(self.param_groups, parts, strict=True)):
            for own, indices in divided(step.penalty, origins[i]) if i in spread - whole else [(step.penalty, None)]:
                some = tensors if indices is None else tensors.take(indices)
                if step.penalty is not None and (own is None or i in whole):
                    apart.append((group, some, origins[i] if indices is None else [origins[i][k] for k in indices]))
                    own = _UNSHRUNK
                taken.append((some, step if own is step.penalty else dataclasses.replace(step, penalty=own)))
                wishes.append((group["fused"], group["foreach"]))
        if not tables or any(tensors.params for tensors, _ in taken):
            amp = (grad_scale, found_inf) if on_device else ()
            kernels.proximal_step(self._update, taken, wishes, self._fused, *amp)
        if apart or tables:
            self._fused.clear()  # it counted before the weights were shrunk
        if apart:
            self._proximal_operators(apart)
        if tables:
            self._take_row_steps(tables, grad_scale)
        for i in spread:
            torch.autograd.graph.increment_version(origins[i])

    def _group_step(self, index: int, group: dict[str, Any]) -> Any:
        """As `_hyperparameters`, which depends on the group's values alone: while these stay, so does the step."""
        if torch.compiler.is_compiling():
            return self._hyperparameters(group)
        values = list(group.values())
        numbers = [_host_number(value) for value in values if isinstance(value, Tensor)]
        known = self._known_steps.get(index)
        if known is not None and identical(known.values, values) and known.numbers == numbers:
            return known.step
        step = self._hyperparameters(group)
        readable = None not in numbers and not (numbers and group.get("capturable"))
        if readable and all(_is_fixed(value) for key, value in group.items() if key not in ("params", "param_names")):
            self._known_steps[index] = _KnownStep(values, numbers, step)
        return step

    def _tables(self, group: dict[str, Any], index: int, step: Any) -> list[RowStep]:
        """The parameters of a group that are stepped row by row; see `SettlingOptimizer`."""
        steps = self._row_steps(group, index, step)
        if steps and group["penalty"] is not None and (self._prox_pre_hooks or self._preview_hooks):
            raise RuntimeError(
                f"Group {index} has sparse gradients, of which hooks that choose strengths, such as TargetSparsity's, "
                "can't be told: build its embeddings with sparse=False."
            )
        return steps

    @torch.no_grad()
    def _previewed(
        self, parts: list[tuple[Any, Any]], origins: list[list[Tensor]], grad_scale: Tensor | None
    ) -> list[tuple[Any, Any]]:
        """The parts of a step with the strengths that preview hooks have chosen."""
        for hook, sampler in list(self._preview_hooks.values()):
            points = []
            for group, (tensors, step), params in zip(self.param_groups, parts, origins, strict=True):
                positions = sampler(group, params) if step.penalty is not None and params else None
                if positions is None:
                    continue
                unit = self._hyperparameters({**group, "strength_scale": 1.0})
                moved, steps = previewed(self._update, tensors, unit, positions, grad_scale)
                points.append(ProxPoint(group, moved, steps, params, positions))
            hook(self, points)
        return [
            (tensors, step if step.penalty is None else self._chosen(group, step))
            for group, (tensors, step) in zip(self.param_groups, parts, strict=True)
        ]

    def _chosen(self, group: Mapping[str, Any], step: Any) -> Any:
        """The step with the strength scale that its group has now."""
        return dataclasses.replace(step, prox_step=self._hyperparameters(group).prox_step)

    def _is_apart(self, penalty: Any) -> bool:
        """Whether the proximal operator is taken after the descent of all groups, instead of with it."""
        return bool(self._prox_pre_hooks) or penalty.is_joint

    def _needs_host(self) -> bool:
        """Whether the host has to know if the step is taken."""
        return False

    def _proximal_operators(self, parts: list[Shrunk]) -> None:
        units = [
            self._hyperparameters({**group, "strength_scale": 1.0}).prox_steps(tensors) for group, tensors, _ in parts
        ]
        points = [
            ProxPoint(group, tensors.params, steps, params)
            for (group, tensors, params), steps in zip(parts, units, strict=True)
            if tensors.params
        ]
        with torch.no_grad():
            for hook in list(self._prox_pre_hooks.values()):
                hook(self, points)
        spread = []
        for group, tensors, params in parts:
            step = self._hyperparameters(group)
            assert step.penalty is not None
            seeds = tensors.seeds if step.stochastic_rounding else []
            penalty, steps = acting(step.penalty, group, params), step.prox_steps(tensors)
            if any_sharded(params):
                spread.append((penalty, params, tensors.params, steps, seeds))
            else:
                kernels.shrink(tensors.params, penalty, steps, seeds, step.differentiable)
        if spread:
            kernels.shrink_sharded(spread)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells GradScaler to leave scale and found_inf to the step, which then waits for no device."""
        if self._prox_pre_hooks:
            return False
        return all(
            g["fused"]
            and all(p.device.type == "cuda" for p in g["params"])
            and not (g["penalty"] is not None and (self._is_apart(g["penalty"]) or spans(g["penalty"], g["params"])))
            for g in self.param_groups
        )

    def _gradients(self, group: Mapping[str, Any], index: int) -> Any:
        """The parameters that have a gradient, and their gradients.

        Not named ``_init_group`` as in torch: torch.compile calls a method of that name instead of tracing it.
        """
        return self._update.tensors(*self._with_gradients(group, index, self._lazy))

    def _check_params(self, group: Mapping[str, Any]) -> None:
        """Raise unless a fused step can be had for every parameter of a group that asks for it."""
        if not group["fused"]:
            return
        metric = group.get("metric") == "adam"
        for p in map(local, group["params"]):
            reason = kernels.selection.obstacle(p, group["penalty"], metric)
            reason = reason or kernels.selection.unavailable(p.device, self._update.step.KERNEL)
            if reason is not None:
                raise RuntimeError(f"`fused=True` can't be had for a parameter of shape {tuple(p.shape)}: {reason}.")

    def _hyperparameters(self, group: Mapping[str, Any]) -> Any:
        """The step of a group, as kernels are told it; may raise."""
        raise NotImplementedError

    def _add_state(self, tensors: Any, group: Mapping[str, Any], offset: int, counts: bool) -> None:
        """Add the state of the parameters to ``tensors``, created where it is missing.

        ``offset`` is the number of parameters in earlier groups, ``counts`` whether rounding seeds are needed.
        """
        raise NotImplementedError


def usable_penalty(group: Mapping[str, Any]) -> Any:
    """The group's penalty or None, checked against the parameters where it might not fit: it may be a new one."""
    penalty = checked_penalty(group["penalty"])
    if penalty is not None:
        if not is_shrinkage(penalty):
            for p in _of_each_kind(group["params"]):
                penalty.check_weight(p)
            penalty.check_together([p.shape for p in group["params"]])
        elif any(isinstance(s, Tensor) for s in penalty.strengths().values()):
            for p in group["params"]:
                penalty.check_shape(p.shape)
    return penalty


def _is_fixed(value: Any) -> bool:
    """Whether a hyperparameter stays what it is as long as it is the same object, and the same number if a tensor."""
    if value is None or isinstance(value, (int, float, str, Tensor)):
        return True
    if isinstance(value, tuple):
        return not any(isinstance(entry, Tensor) for entry in value) and all(map(_is_fixed, value))
    own = type(value) in (L1, L2, ElasticNet)  # another class may compute its strengths
    return own and not any(isinstance(strength, Tensor) for strength in value.strengths().values())


def _host_number(value: Tensor) -> float | None:
    """What the host can read of a hyperparameter without waiting for a device; None if nothing."""
    if type(value) is not Tensor or not value.is_cpu or value.numel() != 1 or value.requires_grad:
        return None
    return value.item()


def _of_each_kind(params: list[Tensor]) -> Iterable[Tensor]:
    """A parameter of every shape, dtype and layout: what a penalty says of it, it says of all of them."""
    if torch.compiler.is_compiling():
        return params
    return {(p.shape, p.dtype, p.layout): p for p in params}.values()


def check_implementation(group: Mapping[str, Any]) -> None:
    """Raise unless the wishes of a group for an implementation, and its penalty and scale, make sense."""
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    for name in ("fused", "foreach"):
        if group[name] and group["differentiable"]:
            raise RuntimeError(f"`{name}=True` records no gradients: use {name}=None or False with `differentiable`.")
    penalty = checked_penalty(group["penalty"])
    if penalty is not None and penalty.is_joint and group["differentiable"]:
        raise RuntimeError(
            f"{penalty.type_name} acts on all weights of a rule and can't be used with `differentiable`."
        )
    checked_scale(group["strength_scale"])


def _known(optimizer: Any, name: str) -> Tensor | None:
    """What GradScaler tells a fused step."""
    value = getattr(optimizer, name, None)
    return None if value is None else local(value)


def _rounds(group: Mapping[str, Any]) -> bool:
    """Whether the group's steps round stochastically."""
    if group["penalty"] is None or not group["stochastic_rounding"]:
        return False
    return not {p.dtype for p in group["params"]}.isdisjoint(HALF)

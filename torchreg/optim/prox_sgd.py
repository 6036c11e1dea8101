"""Proximal stochastic gradient descent."""

from __future__ import annotations

import itertools
import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, _use_grad_for_differentiable

from torchreg import kernels
from torchreg.kernels.reference import HALF
from torchreg.optim.gain import sgd_momentum_gain
from torchreg.optim.groups import (
    adopt_penalties,
    check_form,
    check_keys,
    check_penalized_params,
    check_required,
    check_state_shapes,
    checked_penalty,
    checked_scale,
    packed,
    share_scales,
)
from torchreg.penalties import Penalty
from torchreg.penalties.base import host_scalar


class ProxSGD(Optimizer):
    r"""Stochastic gradient descent with momentum whose steps end in the penalty's proximal operator.

    Minimises f(w) + s·R(w), and leaves *exact* zeros where R asks for them (L1, Elastic Net):

    .. math::
        m &\leftarrow \mu m + (1-d)\,g \quad\text{(first step: } m = g\text{)} \\
        u &\leftarrow g + \mu m \text{ if nesterov, else } m \\
        w &\leftarrow \operatorname{prox}_{\tau R}(w - \gamma u), \qquad \tau = \gamma \, G \, s

    with the learning rate γ, the strength scale s and the momentum's gain on a constant gradient G = (1−d)/(1−μ)
    (1 + μ(1−d)/(1−μ) with Nesterov, 1 without momentum). Coupled weight decay is added to g, as in torch.

    This differs from torch.optim.SGD in:

    1. a group may hold ``penalty`` and ``strength_scale``; with neither it is the same, bit for bit in float64;
    2. momentum buffers start as zeros, and ``p.grad`` is never modified (torch's foreach Nesterov does);
    3. half-precision weights with a penalty are updated in float32 and rounded once, stochastically by default, so
       that shrinkage below half an ulp acts on average;
    4. sparse gradients and unknown group keys are refused;
    5. ``momentum`` must be below 1 where there is a penalty.

    It differs from most proximal SGD in thresholding by γ·G·λ instead of γ·λ: without G the problem solved is the
    one with λ/G, at μ = 0.9 ten times too weak.

    Args:
        params: parameters, named parameters or param groups; see `Regularizer.param_groups`.
        lr: γ, the learning rate: a float or a one-element tensor.
        momentum: μ.
        dampening: d.
        weight_decay: coupled L2, ½·weight_decay·‖w‖².
        nesterov: use Nesterov momentum (needs μ > 0 and d = 0).
        penalty: R for the groups that name none; None is none.
        strength_scale: s, a float or 0-d tensor that a schedule may move.
        maximize: ascend f instead of descending. The penalty still shrinks.
        foreach: use multi-tensor operations; None chooses (yes on accelerators).
        differentiable: let autograd record the step.
        capturable: never read a tensor on the host, so that CUDA graphs can capture the step.
        fused: one pass over memory, which also counts zeros (`step_counts`): on CUDA by Triton, on the CPU where a C
            compiler is found (``TORCHREG_NATIVE=0`` switches that off). None chooses: yes beside a penalty, on the
            CPU from 65536 weights. True raises where it can't be had. ``torchreg doctor`` tells what a machine has.
        stochastic_rounding: how half-precision weights with a penalty are rounded; False rounds to nearest.

    A step with ``found_inf`` set changes nothing. ``state_dict()`` holds numbers, strings and tensors only, penalties
    included, and loads with ``torch.load(weights_only=True)``; as with lr, a loaded penalty replaces the current one,
    and one that the checkpoint lacks (from ``torch.optim.SGD``) leaves it.

    Raises:
        ValueError: if a hyperparameter is out of range, a group has an unknown key or lists a penalised parameter
            twice, or a loaded state has other shapes (nothing is changed then).
        RuntimeError: if ``foreach=True`` or ``fused=True`` can't be had, with the reason.
        TypeError: if a penalty is no `Penalty`, or a gradient is sparse (no weight is changed then).

    >>> import torch, torchreg
    >>> w = torch.nn.Parameter(torch.tensor([2.0, 0.1]))
    >>> opt = torchreg.ProxSGD([w], lr=0.5, penalty=torchreg.L1(1.0))
    >>> w.grad = torch.tensor([1.0, 0.0])
    >>> opt.step()
    >>> w.data
    tensor([1., 0.])

    Source: Lions and Mercier, Splitting algorithms for the sum of two nonlinear operators, SIAM J. Numer. Anal., 1979;
    momentum as in Sutskever et al., ICML 2013, in torch's form.
    """

    applies_penalties = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        penalty: Penalty | None = None,
        strength_scale: float | Tensor = 1.0,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        stochastic_rounding: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "penalty": penalty,
            "strength_scale": strength_scale,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "capturable": capturable,
            "fused": fused,
            "stochastic_rounding": stochastic_rounding,
        }
        _check_group(defaults)
        self._fused = kernels.FusedSGD()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Used by unpickling, deepcopy and load_state_dict alike; checks before it changes anything."""
        groups, current = state["param_groups"], self.__dict__.get("param_groups", [])
        check_required(groups, ("lr", "momentum", "dampening", "weight_decay"), "ProxSGD or torch.optim.SGD")
        adopt_penalties(groups, current)
        check_state_shapes(groups, state["state"], ("momentum_buffer",))
        for i, group in enumerate(groups):
            for key, default in _LATER_KEYS.items():
                group.setdefault(key, default)
            if i < len(current):
                group["fused"] = current[i]["fused"]  # a matter of the machine, not of the checkpoint's
            _check_group(group)
        share_scales(groups, current)
        self._fused = kernels.FusedSGD()
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see `torch.optim.Optimizer.add_param_group`. Unknown keys are refused."""
        if isinstance(param_group, dict):
            check_keys(param_group, self.defaults)
            _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            check_penalized_params(self.param_groups[-1], index=len(self.param_groups) - 1)
            _check_fused(self.param_groups[-1])
        except (RuntimeError, TypeError, ValueError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, strings and tensors; penalties in their dict form."""
        return packed(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of `ProxSGD` or torch.optim.SGD; one that does not fit is refused and changes nothing.

        Raises:
            ValueError: if it is no optimizer's state, or one of other groups, shapes or hyperparameters.
            TypeError: if a hyperparameter or penalty in it is of the wrong type.
        """
        check_form(state_dict)
        super().load_state_dict(state_dict)

    @staticmethod
    def effective_step(group: Mapping[str, Any]) -> float | Tensor:
        """τ = lr·G·strength_scale, the step of the proximal operator in this group (a weight's threshold is τ·λ)."""
        if group["penalty"] is None:
            return 0.0
        gain = sgd_momentum_gain(group["momentum"], group["dampening"], group["nesterov"])
        lr, scale = _number(group, "lr"), _number(group, "strength_scale")
        if isinstance(lr, Tensor) and isinstance(scale, Tensor):
            scale = scale.to(lr.device)
        step = lr * gain * scale
        if not isinstance(step, Tensor) and not (step >= 0 and math.isfinite(step)):
            raise ValueError(
                "Expected `lr` and `strength_scale` to be non-negative and finite beside a penalty, "
                f"got {group['lr']} and {group['strength_scale']}."
            )
        return step

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

        gradients = [self._gradients(group, i) for i, group in enumerate(self.param_groups)]  # may raise
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        on_device = found_inf is not None and self._step_supports_amp_scaling and not self._starts_damped()
        if found_inf is not None and not on_device and bool(found_inf):
            return loss
        steps = [self._hyperparameters(group) for group in self.param_groups]  # may raise: before any change
        count = any(map(_rounds, self.param_groups))
        offset, parts = 0, []
        for group, tensors, step in zip(self.param_groups, gradients, steps, strict=True):
            if grad_scale is not None and not on_device:
                tensors.grads = [g / grad_scale.to(g.device) for g in tensors.grads]
            self._add_state(tensors, group, offset, count)
            parts.append((tensors, step))
            offset += len(group["params"])
        wishes = [(group["fused"], group["foreach"]) for group in self.param_groups]
        amp = (grad_scale, found_inf) if on_device else ()
        kernels.prox_sgd(parts, wishes, self._fused, *amp)
        return loss

    def step_counts(self) -> kernels.FusedSGD | None:
        """What the last step counted of the weights on its way, or None if it was not a fused one."""
        return self._fused if self._fused.counted() else None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells GradScaler to leave scale and found_inf to the step, which then waits for no device."""
        return all(g["fused"] and all(p.device.type == "cuda" for p in g["params"]) for g in self.param_groups)

    def _starts_damped(self) -> bool:
        """Whether a momentum buffer starts whose first gradient is not dampened: the host has to know if it does."""
        return any(
            g["momentum"] != 0
            and g["dampening"] != 0
            and any(self.state[p].get("momentum_buffer") is None for p in g["params"] if p.grad is not None)
            for g in self.param_groups
        )

    def _hyperparameters(self, group: Mapping[str, Any]) -> kernels.SGDStep:
        penalty = checked_penalty(group["penalty"])
        if penalty is not None and any(isinstance(s, Tensor) for s in penalty.strengths().values()):
            for p in group["params"]:
                penalty.check_shape(p.shape)
        return kernels.SGDStep(
            lr=_read(_number(group, "lr"), group),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            penalty=penalty,
            prox_step=self.effective_step(group),
            stochastic_rounding=group["stochastic_rounding"],
            differentiable=group["differentiable"],
        )

    def _gradients(self, group: Mapping[str, Any], index: int) -> kernels.SGDTensors:
        """The parameters that have a gradient, and their gradients.

        Not named ``_init_group`` as in torch: torch.compile calls a method of that name instead of tracing it.
        """
        params, grads, dense = [], [], torch.strided
        for position, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None:
                continue
            if grad.layout is not dense:
                name = group["param_names"][position] if "param_names" in group else f"{position} of group {index}"
                raise TypeError(
                    f"ProxSGD needs dense gradients, but the one of parameter {name} (shape {tuple(p.shape)}) is "
                    f"{grad.layout}; build its embedding with sparse=False."
                )
            params.append(p)
            grads.append(grad)
        return kernels.SGDTensors(params, grads)

    def _add_state(self, tensors: kernels.SGDTensors, group: Mapping[str, Any], offset: int, count: bool) -> None:
        """Momentum buffers and rounding seeds, created where they are missing.

        With ``count`` all get a step counter, also those that are not rounded: torch.distributed.checkpoint expects
        a state for all parameters or for none.
        """
        if group["momentum"] != 0:
            states = [self.state[p] for p in tensors.params]
            buffers = [state.get("momentum_buffer") for state in states]
            tensors.first = list(map(operator.is_, buffers, itertools.repeat(None)))
            if any(tensors.first):
                for i, p in enumerate(tensors.params):
                    if buffers[i] is None:
                        buffers[i] = torch.zeros_like(p, memory_format=torch.preserve_format)
                        states[i]["momentum_buffer"] = buffers[i]
            tensors.momentum_buffers = buffers
        if count:
            positions = (i for i, p in enumerate(group["params"], start=offset) if p.grad is not None)
            tensors.seeds += [self._rounding_seed(p, i, group) for p, i in zip(tensors.params, positions, strict=True)]

    def _rounding_seed(self, p: Tensor, index: int, group: Mapping[str, Any]) -> int | Tensor:
        """Count the step; a number that differs between steps and between parameters, and agrees between replicas."""
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), device=p.device if group["capturable"] else "cpu")
        state["step"] += 1
        step = state["step"].long() if group["capturable"] else int(state["step"])
        return step * 0x9E3779B1 + index * 0x85EBCA77


def _rounds(group: Mapping[str, Any]) -> bool:
    """Whether the group's steps round stochastically."""
    if group["penalty"] is None or not group["stochastic_rounding"]:
        return False
    return not {p.dtype for p in group["params"]}.isdisjoint(HALF)


def _number(group: Mapping[str, Any], key: str) -> float | Tensor:
    """A hyperparameter as a float, or as a 0-d tensor where the host may not read it."""
    value = group[key]
    if not isinstance(value, Tensor):
        return value
    value = value.reshape(())
    return value if group["capturable"] else host_scalar(value)


def _read(lr: float | Tensor, group: Mapping[str, Any]) -> float | Tensor:
    """The learning rate as torch.optim.SGD uses it: a number, read from the device unless capturable."""
    if not isinstance(lr, Tensor) or group["capturable"] or lr.requires_grad or torch.compiler.is_compiling():
        return lr
    return lr.item()


def _check_group(group: Mapping[str, Any]) -> None:
    """Raise unless the hyperparameters make sense; the wording of the first five is torch.optim.SGD's."""
    for key in ("lr", "momentum", "dampening", "weight_decay"):
        if not isinstance(group[key], (numbers.Real, Tensor)):
            raise TypeError(f"Expected `{key}` to be a number, got {group[key]!r}.")
    lr, momentum = group["lr"], group["momentum"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not momentum >= 0.0:
        raise ValueError(f"Invalid momentum value: {momentum}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    if group["nesterov"] and (momentum <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused=True` records no gradients: use fused=None or False with `differentiable`.")
    if group["foreach"] and group["differentiable"]:
        raise RuntimeError("`foreach=True` records no gradients: use foreach=None or False with `differentiable`.")
    if checked_penalty(group["penalty"]) is not None:
        sgd_momentum_gain(momentum, group["dampening"], group["nesterov"])
    checked_scale(group["strength_scale"])


def _check_fused(group: Mapping[str, Any]) -> None:
    """Raise unless a fused step can be had for every parameter of a group that asks for it."""
    if not group["fused"]:
        return
    for p in group["params"]:
        reason = kernels.selection.obstacle(p, group["penalty"]) or kernels.selection.unavailable(p.device)
        if reason is not None:
            raise RuntimeError(f"`fused=True` can't be had for a parameter of shape {tuple(p.shape)}: {reason}.")


_LATER_KEYS: dict[str, Any] = {
    "nesterov": False,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "capturable": False,
    "fused": None,
    "stochastic_rounding": True,
}

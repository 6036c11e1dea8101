"""The metric and the gain of torch's optimizers: how far each coordinate moves for a unit of constant gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from torchreg import sharding
from torchreg.kernels.problem import adam_metric_step
from torchreg.optim.gain import sgd_momentum_gain
from torchreg.optim.groups import check_takes_steps, checked_scale, param_name
from torchreg.optim.hyperparameters import product, scaled_step
from torchreg.penalties import tiles
from torchreg.penalties.base import HALF, Step, arithmetic, checked_step, host_scalar, like

Metric = Callable[[Optimizer, dict[str, Any], Tensor], Step]
"""A metric of the user's own: from (optimizer, param group, parameter), after the optimizer's step, to τ."""

_State = Mapping[str, Any]


@dataclass(frozen=True)
class Known:
    """What is known of an optimizer.

    Attributes:
        gain: how far the momentum moves a weight, in the long run, for a unit of gradient and learning rate.
        metric: from the parameter's state after the step, its group and lr·gain to the step of each coordinate; None
            where all coordinates have the same.
        buffers: the entries of the state that have their parameter's shape.
        counts: whether the state holds the number of steps as ``step``.
    """

    gain: Callable[[_State], float]
    metric: Callable[[_State, _State, Step], Step] | None
    buffers: tuple[str, ...]
    counts: bool = True


class ProxSteps:
    """The step of the proximal operator for each parameter of an optimizer.

    Args:
        optimizer: the optimizer that descends.
        metric: None for its own, ``"identity"``, or a function; see `torchreg.Proximal`.

    Raises:
        TypeError: if ``metric`` is none of these, or None where the optimizer has none.
    """

    def __init__(self, optimizer: Optimizer, metric: str | Metric | None) -> None:
        if metric is not None and metric != "identity" and not callable(metric):
            raise TypeError(f'Expected `metric` to be None, "identity" or a function, got {metric!r}.')
        self.known = known(optimizer)
        if metric is None and self.known is None:
            raise TypeError(
                f"{type(optimizer).__name__} has no metric to shrink weights in: {_why_none(optimizer)}. "
                'metric="identity" shrinks all weights alike by lr·λ, which solves no problem with a known strength; '
                "a function (optimizer, group, parameter) -> step gives a metric of your own."
            )
        self.metric = metric
        self._optimizer = optimizer

    @property
    def is_uniform(self) -> bool:
        """Whether all weights of a group have the step `base`."""
        return self.metric == "identity" or (self.metric is None and self.known is not None and not self.known.metric)

    def base(self, group: Mapping[str, Any]) -> Step:
        """γ·G·strength_scale, checked where the host knows it."""
        gain = 1.0 if self.known is None else self.known.gain(group)
        return scaled_step({"capturable": False, **group}, gain)

    def unit(self, group: dict[str, Any], p: Tensor) -> Step:
        """τ of a parameter without the strength scale, from the state that the optimizer's step has left.

        Of one that is spread over processes it is that of what is here.
        """
        if self.metric is not None and not isinstance(self.metric, str):
            return checked_step(sharding.beside(self.metric(self._optimizer, group, p), p), sharding.local(p))
        step = self.base({**group, "strength_scale": 1.0})
        if self.is_uniform or self.known is None or self.known.metric is None:
            return step
        return self.known.metric(self._state(p), group, step)

    def _state(self, p: Tensor) -> _State:
        """The optimizer's state of a parameter, or of what is here of it."""
        state = self._optimizer.state[p]
        if not sharding.is_sharded(p):
            return state
        return {key: sharding.local(value) if isinstance(value, Tensor) else value for key, value in state.items()}

    def pieces(self, group: dict[str, Any], p: Tensor) -> Iterator[tuple[Tensor, Step]]:
        """The parameter with its `unit`, or both in tiles, whose temporaries stay in the cache.

        Tiles are for penalties that take each weight by itself, all alike.
        """
        known = self.known
        buffers: dict[str, Tensor] = {}
        if self.metric is None and known is not None and known.metric is not None and p.dtype not in HALF:
            state = self._optimizer.state[p]
            buffers = {key: state[key] for key in known.buffers if isinstance(state.get(key), Tensor)}
        if not buffers or not tiles.is_tiled(p) or any(b.stride() != p.stride() for b in buffers.values()):
            yield p, self.unit(group, p)
            return
        assert known is not None
        assert known.metric is not None
        step = self.base({**group, "strength_scale": 1.0})
        for w, *parts in zip(tiles.tiles(p), *map(tiles.tiles, buffers.values()), strict=True):
            yield w, known.metric({**state, **dict(zip(buffers, parts, strict=True))}, group, step)

    def check(self, group: Mapping[str, Any], index: int) -> None:
        """Raise unless a step can be had for each parameter of a penalised group.

        Raises:
            ValueError: if the group has no learning rate, a momentum of 1 or more, or is differentiable.
            TypeError: if a parameter is complex where the metric treats its two parts apart, or the penalty takes no
                steps that differ between weights.
        """
        if group.get("differentiable"):
            raise ValueError(f"Group {index} has a penalty and `differentiable`: ProxSGD and ProxAdamW offer both.")
        if callable(self.metric):
            checked_scale(group["strength_scale"])
            return
        if "lr" not in group:
            raise ValueError(f"Group {index} has no `lr` to take the penalty's step from: give a function as `metric`.")
        self.base(group)
        if self.metric is None and self.known is not None and self.known.metric is not None:
            check_takes_steps(group["penalty"], type(self._optimizer).__name__)
            for position, p in enumerate(group["params"]):
                if p.is_complex():
                    raise TypeError(
                        f"Parameter {param_name(group, position)} of group {index} is complex and has a penalty: "
                        f"{type(self._optimizer).__name__} scales real and imaginary parts apart, so use "
                        'metric="identity" or torch.view_as_real.'
                    )


def known(optimizer: Optimizer) -> Known | None:
    """What is known of an optimizer of exactly torch's class: a subclass may change the update."""
    return _KNOWN.get(type(optimizer))


def _why_none(optimizer: Optimizer) -> str:
    """Why a penalty has no natural step in an optimizer that is not known, as the end of a sentence."""
    name = type(optimizer).__name__
    if name in _NONE:
        return _NONE[name]
    bases = [base.__name__ for base in _KNOWN if isinstance(optimizer, base)]
    if bases:
        return f"it is a subclass of torch.optim.{bases[-1]} that may change the update"
    return f"it is none of those whose update is known ({', '.join(cls.__name__ for cls in _KNOWN)})"


def _adam(state: _State, group: _State, lr: Step) -> Step:
    """lr/(√v̂ + ε), with amsgrad the largest v so far."""
    v = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return adam_metric_step(lr, v, _counted(state["step"]), group["betas"][1], group["eps"])


def _nadam(state: _State, group: _State, lr: Step) -> Step:
    """Adam's with G_t = (1−μ_t)/(1−Πμ_1…t) + μ_{t+1}(1−β₁^t)/(1−Πμ_1…t+1).

    That is what the step t makes of a gradient that has always been the same; it tends to 1.
    """
    beta1, _ = group["betas"]
    t, past = host_scalar(state["step"]), host_scalar(state["mu_product"])
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"]))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * group["momentum_decay"]))
    gain = (1 - mu) / (1 - past) + mu_next * (1 - beta1**t) / (1 - past * mu_next)
    return adam_metric_step(product(lr, gain), state["exp_avg_sq"], state["step"], group["betas"][1], group["eps"])


def _radam(state: _State, group: _State, lr: Step) -> Step:
    """lr·r_t·√(1−β₂^t)/(√v + ε) with the rectification r_t, and lr as long as there is none (ρ_t ≤ 5)."""
    _, beta2 = group["betas"]
    t, v = host_scalar(state["step"]), arithmetic(state["exp_avg_sq"])
    correction = 1 - beta2**t
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / correction
    ratio = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    if not isinstance(rho, Tensor):
        return like(lr, v) * (ratio * correction) ** 0.5 / (v.sqrt() + group["eps"]) if rho > 5 else lr
    scaled = like(lr, v)
    return torch.where(rho > 5, scaled * (ratio * correction).sqrt().to(v.dtype) / (v.sqrt() + group["eps"]), scaled)


def _rmsprop(state: _State, group: _State, lr: Step) -> Step:
    """lr·G/(√v + ε), and √(v − ḡ²) if centered."""
    v = arithmetic(state["square_avg"])
    if group["centered"]:
        mean = arithmetic(state["grad_avg"])
        v = v.addcmul(mean, mean, value=-1)
    return like(lr, v) / (v.sqrt() + group["eps"])


def _adagrad(state: _State, group: _State, lr: Step) -> Step:
    """lr/(1 + (t−1)·lr_decay)/(√Σg² + ε)."""
    total = arithmetic(state["sum"])
    decay = 1.0 if group["lr_decay"] == 0 else 1 + (host_scalar(state["step"]) - 1) * group["lr_decay"]
    return like(product(lr, 1 / decay), total) / (total.sqrt() + group["eps"])


def _adamax(state: _State, group: _State, lr: Step) -> Step:
    """lr/u, where u is the decaying maximum of |g| + ε."""
    largest = arithmetic(state["exp_inf"])
    return like(lr, largest) / largest


def _counted(step: Any) -> Tensor:
    return step if isinstance(step, Tensor) else torch.tensor(float(step))


def _no_gain(group: _State) -> float:
    return 1.0


def _sgd_gain(group: _State) -> float:
    return sgd_momentum_gain(group["momentum"], group["dampening"], group["nesterov"])


def _rmsprop_gain(group: _State) -> float:
    return sgd_momentum_gain(group["momentum"])


_ADAM = Known(_no_gain, _adam, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))

_KNOWN: dict[type[Optimizer], Known] = {
    SGD: Known(_sgd_gain, None, ("momentum_buffer",), counts=False),
    Adam: _ADAM,
    AdamW: _ADAM,
    NAdam: Known(_no_gain, _nadam, ("exp_avg", "exp_avg_sq")),
    RAdam: Known(_no_gain, _radam, ("exp_avg", "exp_avg_sq")),
    RMSprop: Known(_rmsprop_gain, _rmsprop, ("square_avg", "grad_avg", "momentum_buffer")),
    Adagrad: Known(_no_gain, _adagrad, ("sum",)),
    Adamax: Known(_no_gain, _adamax, ("exp_avg", "exp_inf")),
}

_NONE = {
    "Muon": "it orthogonalises the update of a whole matrix, so that no weight has a step of its own",
    "Adafactor": "it rescales the update of a whole tensor by its size and that of the weights",
    "Lion": "it moves by the sign of the momentum, whatever the size of the gradient that a penalty has to balance",
    "LBFGS": "it moves along a direction of its curvature estimate, which is no diagonal one",
    "Rprop": "it moves by the sign of the gradient, whatever its size that a penalty has to balance",
}

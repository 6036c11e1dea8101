"""What every implementation of a proximal step is given: tensors and hyperparameters, for each kind of update."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchreg import sharding
from torchreg.kernels.fused_form import Strengths
from torchreg.penalties import Penalty
from torchreg.penalties.base import Step, arithmetic, like

Number = float | Tensor


@dataclass
class Tensors:
    """The tensors of one param group, one entry per parameter.

    ``seeds`` drive stochastic rounding, the same on every replica: a number or an int64 0-d tensor per parameter,
    empty where nothing is rounded.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    seeds: list[int | Tensor] = field(default_factory=list, kw_only=True)

    def take(self, indices: list[int]) -> Any:
        """The entries at ``indices``."""

        def some(entries: list[Any]) -> list[Any]:
            return [entries[i] for i in indices] if entries else []

        return type(self)(**{f.name: some(getattr(self, f.name)) for f in fields(self)})

    def parts(self) -> Any:
        """What is here of these tensors, sharing their memory, if they are spread over processes.

        Each part has random numbers of its own when it is rounded.

        Raises:
            TypeError: if a buffer is not spread as its parameter is.
        """
        found: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, entries in list(found.items()):
            if any(entries is buffers for buffers in self.buffers().values()):
                for p, buffer in zip(self.params, entries, strict=False):
                    _check_alike(p, buffer, name)
                found[name] = [sharding.local(buffer) for buffer in entries]
        found["params"] = [sharding.local(p) for p in self.params]
        found["grads"] = [sharding.beside(g, p) for g, p in zip(self.grads, self.params, strict=True)]
        found["seeds"] = [s + sharding.layout(p).seed() for p, s in zip(self.params, self.seeds, strict=False)]
        return type(self)(**found)

    def buffers(self) -> dict[str, list[Tensor]]:
        """The optimizer's buffers by their names in a fused step's table; each list is empty or full."""
        return {}

    def advance(self) -> None:
        """Count the step, where the state holds a counter."""

    def withdraw(self, found_inf: Tensor) -> None:
        """Take the counted step back where ``found_inf`` is 1, without reading it."""


@dataclass
class SGDTensors(Tensors):
    """With ``momentum_buffers``, and ``first``, which tells whether a buffer is fresh (zeros). Both may be empty."""

    momentum_buffers: list[Tensor] = field(default_factory=list)
    first: list[bool] = field(default_factory=list)

    def buffers(self) -> dict[str, list[Tensor]]:  # noqa: D102
        return {"m": self.momentum_buffers}


@dataclass
class AdamTensors(Tensors):
    """With Adam's moments; ``max_exp_avg_sqs`` are empty without amsgrad. ``state_steps`` count steps done."""

    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    state_steps: list[Tensor] = field(default_factory=list)

    def buffers(self) -> dict[str, list[Tensor]]:  # noqa: D102
        return {"m": self.exp_avgs, "v": self.exp_avg_sqs, "x": self.max_exp_avg_sqs}

    def advance(self) -> None:  # noqa: D102
        if all(step.is_cpu and step.dtype == torch.float32 for step in self.state_steps):
            for address in map(Tensor.data_ptr, self.state_steps):  # a tensor operation on each would cost 2 µs
                ctypes.c_float.from_address(address).value += 1
        else:
            torch._foreach_add_(self.state_steps, 1)

    def withdraw(self, found_inf: Tensor) -> None:  # noqa: D102
        for step in self.state_steps:
            step.sub_(found_inf.reshape(()).to(step.device))


@dataclass(frozen=True)
class SGDStep:
    """The hyperparameters of one param group's step, in torch.optim.SGD's terms.

    ``prox_step`` is the step τ of the proximal operator: learning rate times momentum gain times strength scale.
    """

    KERNEL: ClassVar = "prox_sgd"
    """The name of its fused kernels."""

    HYPERS: ClassVar = (
        *("lr", "momentum", "gain", "decay", "prox_step", "sign", "nesterov", "rounds"),
        *Strengths._fields,
    )
    """What a fused step is told; ``gain`` is 1 − dampening, ``sign`` −1 to maximise."""

    lr: Number
    momentum: float
    dampening: float
    weight_decay: Number
    nesterov: bool
    maximize: bool
    penalty: Penalty | None
    prox_step: Number
    stochastic_rounding: bool
    differentiable: bool = False

    @property
    def is_uniform(self) -> bool:
        """Whether all weights have the same proximal step."""
        return True

    def check(self) -> None:
        """Raise ``ValueError`` if the penalty refuses so long a step."""
        if self.penalty is not None:
            self.penalty.check_step(self.prox_step)

    def hypers(self, strengths: Strengths) -> tuple[Number, ...]:
        """The values of `HYPERS`."""
        return (
            self.lr,
            self.momentum,
            1 - self.dampening,
            self.weight_decay,
            self.prox_step,
            -1.0 if self.maximize else 1.0,
            float(self.nesterov),
            float(self.stochastic_rounding and self.penalty is not None),
            *strengths,
        )

    def columns(self, tensors: SGDTensors) -> dict[str, list[Any]]:
        """What a fused step is told of each tensor beside addresses."""
        damped = self.dampening != 0  # else a fresh buffer, all zeros, needs no care, and the table stays as it is
        return {"first": tensors.first} if damped and tensors.first else {}

    def prox_steps(self, tensors: SGDTensors) -> list[Step]:
        """The step of each parameter's proximal operator."""
        return [self.prox_step] * len(tensors.params)


@dataclass(frozen=True)
class AdamStep:
    """The hyperparameters of one param group's step, in torch.optim.AdamW's terms.

    ``prox_step`` is learning rate times strength scale. In Adam's own metric it is divided by √v̂ + ε, else
    (``identity``) taken as it is.
    """

    KERNEL: ClassVar = "prox_adam"
    """The name of its fused kernels."""

    HYPERS: ClassVar = (
        *("lr", "beta1", "beta2", "eps", "decay", "keep", "prox_step", "sign", "identity", "rounds"),
        *Strengths._fields,
    )
    """What a fused step is told; ``decay`` is coupled, ``keep`` is 1 − lr·weight_decay if decoupled."""

    lr: Number
    beta1: Number
    beta2: Number
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    amsgrad: bool
    maximize: bool
    penalty: Penalty | None
    prox_step: Number
    identity: bool
    stochastic_rounding: bool
    capturable: bool = False
    differentiable: bool = False

    @property
    def is_uniform(self) -> bool:
        """Whether all weights have the same proximal step."""
        return self.identity

    def check(self) -> None:
        """Raise ``ValueError`` if the penalty refuses so long a step; it takes any where steps differ."""
        if self.penalty is not None and self.identity:
            self.penalty.check_step(self.prox_step)

    def hypers(self, strengths: Strengths) -> tuple[Number, ...]:
        """The values of `HYPERS`."""
        decoupled = self.decoupled_weight_decay
        lr = self.lr.double() if isinstance(self.lr, Tensor) else self.lr
        return (
            self.lr,
            self.beta1,
            self.beta2,
            self.eps,
            0.0 if decoupled else self.weight_decay,
            1 - lr * self.weight_decay if decoupled else 1.0,
            self.prox_step,
            -1.0 if self.maximize else 1.0,
            float(self.identity),
            float(self.stochastic_rounding and self.penalty is not None),
            *strengths,
        )

    def columns(self, tensors: AdamTensors) -> dict[str, list[Any]]:
        """What a fused step is told of each tensor beside addresses."""
        steps = tensors.state_steps
        return {"step": list(map(Tensor.item, steps)) if all(step.is_cpu for step in steps) else steps}

    def prox_steps(self, tensors: AdamTensors) -> list[Step]:
        """The step of each parameter's proximal operator, once the moments have taken in the gradient.

        prox_step/(√v̂ + ε) for each coordinate, in the precision that penalties compute in.
        """
        if self.identity:
            return [self.prox_step] * len(tensors.params)
        return [
            adam_metric_step(self.prox_step, v, step, self.beta2, self.eps)
            for v, step in zip(tensors.max_exp_avg_sqs or tensors.exp_avg_sqs, tensors.state_steps, strict=True)
        ]


@dataclass(frozen=True)
class Update:
    """A kind of optimizer: its tensors, and its step without fused kernels.

    ``eager`` takes the tensors, the step and the group's wish for multi-tensor operations.
    """

    tensors: type[Tensors]
    step: type[SGDStep] | type[AdamStep]
    eager: Callable[[Any, Any, bool | None], None]


def _check_alike(p: Tensor, buffer: Tensor, name: str) -> None:
    """Raise ``TypeError`` unless a buffer is spread over processes as its parameter is."""
    if sharding.is_sharded(p) != sharding.is_sharded(buffer) or (
        sharding.is_sharded(p) and sharding.local(p).shape != sharding.local(buffer).shape
    ):
        raise TypeError(
            f"The state `{name}` of a parameter of shape {tuple(p.shape)} is not sharded as the parameter is: load it "
            "by torch.distributed.checkpoint.state_dict.set_optimizer_state_dict."
        )


def adam_metric_step(prox_step: Number, exp_avg_sq: Tensor, step: Tensor, beta2: Number, eps: float) -> Tensor:
    """``prox_step/(√v̂ + ε)`` for each coordinate, with v̂ = v/(1 − β₂^t)."""
    v = arithmetic(exp_avg_sq)
    on_host = step.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(beta2, Tensor)
    correction = (1 - beta2 ** float(step)) ** 0.5 if on_host else like((1 - beta2 ** step.double()).sqrt(), v)
    return like(prox_step, v) / (v.sqrt() / correction + eps)

"""Proximal stochastic gradient descent."""

from __future__ import annotations

import itertools
import numbers
import operator
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchreg import kernels
from torchreg.optim.base import (
    ProximalOptimizer,
    check_implementation,
    usable_penalty,
)
from torchreg.optim.gain import sgd_momentum_gain
from torchreg.optim.hyperparameters import number, read, rounding_seed, scaled_step
from torchreg.optim.row_steps import sgd_rows
from torchreg.optim.settling import RowStep
from torchreg.penalties import Penalty


class ProxSGD(ProximalOptimizer):
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
    4. unknown group keys are refused;
    5. ``momentum`` must be below 1 where there is a penalty.

    Sparse gradients (``nn.Embedding(sparse=True)``) cost what the rows that have one do. The result is that of
    shrinking all rows in every step; without a gradient a row's momentum waits. Rows take the steps that they have
    missed when they are read: call `settle_lookups` once. L1, L2, Elastic Net and group lasso of rows have a closed
    form of missed steps, others are refused, as is dampening; see docs/embeddings.md.

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
            L1, L2, Elastic Net have it, and (sparse) group lasso where groups are neighbours in memory, as rows are.
            Where ``torch.compile`` traces the step, it fuses the eager form instead, whatever is said here.
        stochastic_rounding: how half-precision weights with a penalty are rounded; False rounds to nearest.

    A step with ``found_inf`` set changes nothing. ``state_dict()`` holds numbers, strings and tensors only, penalties
    included, and loads with ``torch.load(weights_only=True)``; as with lr, a loaded penalty replaces the current one,
    and one that the checkpoint lacks (from ``torch.optim.SGD``) leaves it.

    Raises:
        ValueError: if a hyperparameter is out of range, a group has an unknown key or lists a penalised parameter
            twice, or a loaded state has other shapes (nothing is changed then).
        RuntimeError: if ``foreach=True`` or ``fused=True`` can't be had, with the reason.
        TypeError: if a penalty is no `Penalty`, or a gradient is sparse and the penalty has no closed form of
            missed steps (no weight is changed then).

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

    _required = ("lr", "momentum", "dampening", "weight_decay")
    _origin = "ProxSGD or torch.optim.SGD"
    _buffers = ("momentum_buffer",)
    _later: ClassVar = {
        "nesterov": False,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "capturable": False,
        "fused": None,
        "stochastic_rounding": True,
    }
    _update = kernels.SGD

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
        super().__init__(params, defaults)

    @staticmethod
    def effective_step(group: Mapping[str, Any]) -> float | Tensor:
        """τ = lr·G·strength_scale, the step of the proximal operator in this group (a weight's threshold is τ·λ)."""
        if group["penalty"] is None:
            return 0.0
        return scaled_step(group, sgd_momentum_gain(group["momentum"], group["dampening"], group["nesterov"]))

    def _needs_host(self) -> bool:
        """Whether a momentum buffer starts whose first gradient is not dampened: the host has to know if it does."""
        return any(
            g["momentum"] != 0
            and g["dampening"] != 0
            and any(self.state[p].get("momentum_buffer") is None for p in g["params"] if p.grad is not None)
            for g in self.param_groups
        )

    def _hyperparameters(self, group: Mapping[str, Any]) -> kernels.SGDStep:
        return kernels.SGDStep(
            lr=read(number(group, "lr"), group),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            penalty=usable_penalty(group),
            prox_step=self.effective_step(group),
            stochastic_rounding=group["stochastic_rounding"],
            differentiable=group["differentiable"],
        )

    def _add_state(self, tensors: kernels.SGDTensors, group: Mapping[str, Any], offset: int, counts: bool) -> None:
        """Momentum buffers and rounding seeds, created where they are missing.

        With ``counts`` all get a step counter, also those that are not rounded: torch.distributed.checkpoint expects
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
        if counts:
            params = enumerate(group["params"], start=offset)
            positions = (i for i, p in params if p.grad is not None and not self._is_sparse(p))
            tensors.seeds += [self._seed(p, i, group) for p, i in zip(tensors.params, positions, strict=True)]

    def _seed(self, p: Tensor, index: int, group: Mapping[str, Any]) -> int | Tensor:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), device=p.device if group["capturable"] else "cpu")
        state["step"] += 1
        return rounding_seed(state["step"].long() if group["capturable"] else int(state["step"]), index)

    def _check_table(self, group: Mapping[str, Any], p: Tensor) -> None:
        super()._check_table(group, p)
        if group["momentum"] != 0 and group["dampening"] != 0:
            raise ValueError("`dampening` must be 0 beside momentum, since each row has a first step of its own.")
        if not float(group["lr"]) * float(group["weight_decay"]) < 1:
            raise ValueError(f"lr·weight_decay must be below 1, got {group['lr']}·{group['weight_decay']}.")

    def _shrinks_by(self, table: RowStep) -> tuple[float, float]:
        step: kernels.SGDStep = table.step
        return 1 - float(step.lr) * float(step.weight_decay), float(step.prox_step)

    def _step_rows(self, table: RowStep, state: dict[str, Any], seed: int | Tensor | None) -> None:
        if seed is not None:
            state["step"] = state.get("step", torch.zeros((), device="cpu")) + 1
        sgd_rows(table, state, seed)

    def _check_group(self, group: Mapping[str, Any]) -> None:
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
        check_implementation(group)
        if group["penalty"] is not None:
            sgd_momentum_gain(momentum, group["dampening"], group["nesterov"])

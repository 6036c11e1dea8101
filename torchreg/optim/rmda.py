"""RMDA: regularised dual averaging with momentum, whose support settles under minibatch noise."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchreg import sharding
from torchreg.optim.base import usable_penalty
from torchreg.optim.groups import acting, checked_penalty, checked_scale
from torchreg.optim.hyperparameters import product, scalar
from torchreg.optim.penalized import PenalizedOptimizer
from torchreg.penalties import Penalty, sharded
from torchreg.penalties.base import HALF
from torchreg.penalties.sharded import Shrinking


class RMDA(PenalizedOptimizer):
    r"""Regularised modernised dual averaging: the zeros settle although every minibatch pulls at them.

    Minimises f(w) + s·R(w). With the steps t = 1, 2, … since the last restart, W₀ the weights then, the learning rate γ
    and c = 1 − momentum:

    .. math::
        V_t &= V_{t-1} + \gamma\sqrt{t}\, g_t, \qquad \alpha_t = \alpha_{t-1} + \gamma\sqrt{t} \\
        \tilde W_t &= \operatorname{argmin}_W\; \langle V_t, W\rangle + s\,\alpha_t R(W)
            + \tfrac12\sqrt{t}\,\lVert W - W_0\rVert^2
            = \operatorname{prox}_{s\,\tau_t R}\bigl(W_0 - V_t/\sqrt{t}\bigr), \qquad \tau_t = \alpha_t/\sqrt{t} \\
        W_t &= (1-c)\,W_{t-1} + c\,\tilde W_t

    The gradient in V is an average over all steps, whose noise vanishes, where that of ProxSGD stays: so the support of
    W̃ becomes that of the solution after finitely many steps and stays (manifold identification). A weight of W that
    is zero in W̃ decays by 1 − c in each step, and is *exactly* zero once the momentum is 0.

    The recipe of the paper: train in stages with falling learning rates, and call `restart` at the beginning of each,
    since what has been averaged so far belongs to another place; in the last stage call `settle` once an epoch, which
    takes the momentum to 0.

    >>> import torch, torchreg
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> opt = torchreg.RMDA([w], lr=0.1, momentum=0.9, penalty=torchreg.L1(1.0))
    >>> target, generator = torch.tensor([3.0, 0.5]), torch.Generator().manual_seed(0)
    >>> for stage in range(3):
    ...     for step in range(300):
    ...         w.grad = w.detach() - target + torch.randn(2, generator=generator)
    ...         opt.step()
    ...         if stage == 2:
    ...             opt.settle(step + 1)
    ...     if stage < 2:
    ...         opt.restart()
    >>> print(w[1].item(), opt.param_groups[0]["momentum"])
    0.0 0.0

    Args:
        params: parameters, named parameters or param groups; see `Regularizer.param_groups`.
        lr: γ, the learning rate: a float or a one-element tensor.
        momentum: 1 − c, in [0, 1).
        penalty: R for the groups that name none; None is none.
        strength_scale: s, a float or 0-d tensor that a schedule may move.
        maximize: ascend f instead of descending. The penalty still shrinks.

    With a learning rate of 0 a step changes nothing. ``state_dict()`` holds numbers, strings and tensors only,
    penalties included, and loads with ``torch.load(weights_only=True)``. The state is two tensors per parameter. Steps
    can't be captured in CUDA graphs.

    Raises:
        ValueError: if a hyperparameter is out of range, a group has an unknown key or lists a penalised parameter
            twice, a penalty (MCP, SCAD) refuses so long a step, which grows with t until a `restart`, or a loaded state
            has other shapes (nothing is changed then).
        TypeError: if a penalty is no `Penalty`, a parameter is of half precision, in which a sum of all gradients has
            no room, or a gradient is sparse (no weight is changed then).

    Source: Huang and Lee, Training structured neural networks through manifold identification and variance reduction,
    ICLR 2022; without R: Jelassi and Defazio, Dual averaging is surprisingly effective for deep learning optimization,
    2020; without momentum: Xiao, Dual averaging methods for regularized stochastic learning, JMLR, 2010.
    """

    _required = ("lr", "momentum", "maximize")
    _origin = "RMDA"
    _buffers = ("initial", "grad_sum")
    _later: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.99,
        *,
        penalty: Penalty | None = None,
        strength_scale: float | Tensor = 1.0,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "penalty": penalty,
            "strength_scale": strength_scale,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin a new average at the weights of now: where the learning rate changes by stages."""
        for state in self.state.values():
            state.clear()

    def settle(self, count: int) -> None:
        """Set every group's momentum to ``max(1 − c√count, 0)``, c being that of the first call.

        Call it with 1, 2, 3, … in the epochs of the last stage: the zeros become exact when the momentum has become 0.

        Raises:
            ValueError: if ``count`` is below 1.
            TypeError: if it is no integer.
        """
        if isinstance(count, bool) or not isinstance(count, numbers.Integral):
            raise TypeError(f"Expected `count` to be an integer of at least 1, got {count!r}.")
        if count < 1:
            raise ValueError(f"Expected `count` to be an integer of at least 1, got {count}.")
        for group in self.param_groups:
            first = group.setdefault("initial_momentum", group["momentum"])
            group["momentum"] = max(1 - (1 - first) * math.sqrt(count), 0.0)

    def effective_step(self, group: Mapping[str, Any]) -> float | Tensor:
        """τ = s·α_t/√t of the last step of a group: a weight of W̃ is zero up to τ times the strength."""
        state = next((self.state[p] for p in group["params"] if self.state.get(p)), None)
        if group["penalty"] is None or state is None or state["step"] == 0:
            return 0.0
        return product(state["alpha"] / math.sqrt(state["step"]), scalar(group["strength_scale"]))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        self._check_not_captured()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        chosen = []
        for i, group in enumerate(self.param_groups):  # may raise: before any change
            self._check_group(group)
            chosen.append((group, usable_penalty(group), self._with_gradients(group, i)[0]))
        for group, penalty, params in chosen:
            if penalty is not None:
                self._check_steps(group, penalty, params)
        moved = [self._moved(group, params) for group, _, params in chosen]
        self._shrink([(group, penalty, new) for (group, penalty, _), new in zip(chosen, moved, strict=True)])
        for (group, _, _), new in zip(chosen, moved, strict=True):
            if group["momentum"] == 0:
                for p, w in new.items():
                    p.copy_(w)
            elif new:  # no lerp, which takes differences: inf would become NaN
                torch._foreach_mul_(list(new), group["momentum"])
                torch._foreach_add_(list(new), list(new.values()), alpha=1 - group["momentum"])
        return loss

    def _check_steps(self, group: Mapping[str, Any], penalty: Penalty, params: list[Tensor]) -> None:
        """Raise ``ValueError`` if the penalty refuses the step τ that is next, which grows with t."""
        lr, scale = scalar(group["lr"]), scalar(group["strength_scale"])
        for t, alpha in {(self.state[p].get("step", 0), self.state[p].get("alpha", 0.0)) for p in params}:
            root = math.sqrt(t + 1)
            penalty.check_step(product((alpha + product(lr, root)) / root, scale))

    def _moved(self, group: dict[str, Any], params: list[Tensor]) -> dict[Tensor, Tensor]:
        """W₀ − V/√t of a group's parameters, once its state has taken in the gradients; none where lr = 0."""
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=0,
                    alpha=0.0,
                    initial=p.detach().clone(memory_format=torch.preserve_format),
                    grad_sum=torch.zeros_like(p, memory_format=torch.preserve_format),
                )
        lr = scalar(group["lr"])
        if not isinstance(lr, Tensor) and lr == 0:
            return {}
        together: dict[int, list[Tensor]] = {}  # parameters that were unfrozen later count from there
        for p in params:
            self.state[p]["step"] += 1
            together.setdefault(self.state[p]["step"], []).append(p)
        averages: dict[Tensor, Tensor] = {}
        for t, some in together.items():
            averages.update(zip(some, self._averaged(some, lr, t, group["maximize"]), strict=True))
        return averages

    def _shrink(self, moved: list[tuple[dict[str, Any], Penalty | None, dict[Tensor, Tensor]]]) -> None:
        """Overwrite what has been moved by the proximal operators."""
        spread = []
        for group, penalty, new in moved:
            if penalty is None or not new:
                continue
            scale = scalar(group["strength_scale"])
            steps = [product(self.state[p]["alpha"] / math.sqrt(self.state[p]["step"]), scale) for p in new]
            acts = acting(penalty, group, list(new))
            if sharding.any_sharded(new):
                spread.append(Shrinking(acts, list(new), list(map(sharding.local, new.values())), steps))
            else:
                acts.prox_all_(list(new.values()), steps)
        sharded.prox_all_(spread)

    def _averaged(self, params: list[Tensor], lr: float | Tensor, t: int, maximize: bool) -> list[Tensor]:
        """W₀ − V/√t after V and α have taken in the gradients of step t."""
        states = [self.state[p] for p in params]
        sums, root = [state["grad_sum"] for state in states], math.sqrt(t)
        grads = [p.grad for p in params if p.grad is not None]  # all of them
        sign = -1.0 if maximize else 1.0
        if isinstance(lr, Tensor):
            torch._foreach_add_(sums, [g * (lr.to(g.device) * (sign * root)) for g in grads])
        else:
            torch._foreach_add_(sums, grads, alpha=sign * lr * root)
        for state in states:
            state["alpha"] = state["alpha"] + product(lr, root)
        return list(torch._foreach_add([state["initial"] for state in states], sums, alpha=-1 / root))

    def _check_group(self, group: Mapping[str, Any]) -> None:
        for key in ("lr", "momentum"):
            value = group[key]
            if isinstance(value, bool) or not isinstance(
                value, numbers.Real if key == "momentum" else (numbers.Real, Tensor)
            ):
                raise TypeError(f"Expected `{key}` to be a number, got {value!r}.")
        lr = scalar(group["lr"]) if not isinstance(group["lr"], Tensor) or group["lr"].numel() == 1 else None
        if lr is None:
            raise ValueError("Tensor lr must be 1-element")
        if not isinstance(lr, Tensor) and not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"Invalid learning rate: {lr}")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"Invalid momentum value: {group['momentum']}; expected 1 − c in [0, 1).")
        checked_penalty(group["penalty"])
        checked_scale(group["strength_scale"])

    def _check_params(self, group: Mapping[str, Any]) -> None:
        for p in group["params"]:
            if p.dtype in HALF:
                raise TypeError(
                    f"A parameter of shape {tuple(p.shape)} is of {p.dtype}, in which a sum of all gradients has no "
                    "room: keep the weights in float32 (and use autocast)."
                )

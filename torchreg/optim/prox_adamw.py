"""AdamW whose steps end in a proximal operator, in Adam's own metric."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _get_scalar_dtype

from torchreg import kernels
from torchreg.kernels import native_rows, pages
from torchreg.optim.base import (
    ProximalOptimizer,
    check_implementation,
    usable_penalty,
)
from torchreg.optim.groups import check_takes_steps
from torchreg.optim.hyperparameters import number, read, rounding_seed, scaled_step
from torchreg.optim.missed import DIAGONAL, UNIFORM, ClosedForm
from torchreg.optim.row_steps import adam_rows, inverse_root
from torchreg.optim.settling import Rows, RowStep, taken
from torchreg.penalties import Penalty
from torchreg.penalties.base import arithmetic

METRICS = ("adam", "identity")


class ProxAdamW(ProximalOptimizer):
    r"""AdamW whose steps end in the penalty's proximal operator, taken in Adam's own metric.

    Minimises f(w) + s·R(w), and leaves *exact* zeros where R asks for them (L1, Elastic Net, MCP, …):

    .. math::
        w &\leftarrow (1 - \gamma\,\omega)\,w \\
        m &\leftarrow \beta_1 m + (1-\beta_1)\,g, \qquad v \leftarrow \beta_2 v + (1-\beta_2)\,g^2 \\
        \hat m &= m/(1-\beta_1^t), \qquad \hat v = v/(1-\beta_2^t) \\
        \tau_i &= \gamma / (\sqrt{\hat v_i} + \epsilon) \\
        w_i &\leftarrow \operatorname{prox}_{s \tau_i R}(w_i - \tau_i \hat m_i)

    with the learning rate γ, the weight decay ω and the strength scale s. Each weight is shrunk by the step that moved
    it, so that the fixed points are the minimisers of f + s·R (where ω = 0). L1 in the loss under Adam is divided by
    √v̂ like any gradient and so nearly independent of its strength; shrinking all weights by γ·λ after Adam's step
    (``metric="identity"``) has fixed points of another problem, in which the strength depends on a weight's gradients.

    This differs from torch.optim.AdamW in:

    1. a group may hold ``penalty`` and ``strength_scale``; with neither it is the same, bit for bit in float64;
    2. ``decoupled_weight_decay=False`` gives Adam's coupled weight decay;
    3. half-precision weights with a penalty are updated in float32 and rounded once, stochastically by default, so
       that shrinkage below half an ulp acts on average;
    4. unknown group keys are refused.

    A weight that never got a gradient has v̂ = 0 and τ = γ/ε, which is huge: L1 zeroes it in the first step.

    Sparse gradients (``nn.Embedding(sparse=True)``) cost what the rows that have one do. Each row then is a
    parameter of its own, with moments and bias corrections of its own, which wait where it has no gradient; from
    its first one on it is shrunk in every step. (torch.optim.SparseAdam corrects all rows by the number of all
    steps.) Rows take the steps that they have missed when they are read: call `settle_lookups` once. L1, L2 and
    Elastic Net have a closed form of missed steps, with ``metric="identity"`` also group lasso of rows; others are
    refused, as is a weight decay; see docs/embeddings.md.

    Args:
        params: parameters, named parameters or param groups; see `Regularizer.param_groups`.
        lr: γ, the learning rate: a float or a one-element tensor.
        betas: (β₁, β₂), floats or tensors.
        eps: ε.
        weight_decay: ω. AdamW's default, 0.01, shrinks beside any penalty: set it to 0 to solve f + s·R alone.
        amsgrad: use the maximum of all v so far in v's place.
        penalty: R for the groups that name none; None is none.
        strength_scale: s, a float or 0-d tensor that a schedule may move.
        metric: ``"adam"``, or ``"identity"``: τ = γ for all weights, the decoupled form.
        decoupled_weight_decay: False adds ω·w to the gradient, as torch.optim.Adam does.
        maximize: ascend f instead of descending. The penalty still shrinks.
        foreach: use multi-tensor operations; None chooses (yes on accelerators).
        capturable: never read a tensor on the host, so that CUDA graphs can capture the step.
        differentiable: let autograd record the step.
        fused: one pass over memory, which also counts zeros (`step_counts`): on CUDA by Triton, on the CPU where a C
            compiler is found (``TORCHREG_NATIVE=0`` switches that off). None chooses: yes beside a penalty, on the
            CPU from 65536 weights. True raises where it can't be had. ``torchreg doctor`` tells what a machine has.
            L1, L2, Elastic Net have it, and (sparse) group lasso where groups are neighbours in memory, as rows are.
            Where ``torch.compile`` traces the step, it fuses the eager form instead, whatever is said here.
        stochastic_rounding: how half-precision weights with a penalty are rounded; False rounds to nearest.

    A step with ``found_inf`` set changes nothing. ``state_dict()`` holds numbers, strings and tensors only, penalties
    included, and loads with ``torch.load(weights_only=True)``; as with lr, a loaded penalty replaces the current one,
    and one that the checkpoint lacks (from ``torch.optim.AdamW``) leaves it.

    Raises:
        ValueError: if a hyperparameter is out of range, a group has an unknown key or lists a penalised parameter
            twice, or a loaded state has other shapes (nothing is changed then).
        RuntimeError: if ``foreach=True`` or ``fused=True`` can't be had, with the reason.
        TypeError: if a penalty is no `Penalty`, a gradient is sparse and the penalty has no closed form of missed
            steps (no weight is changed then), or a complex weight with a penalty is to be shrunk in Adam's metric,
            which treats its two parts apart.

    >>> import torch, torchreg
    >>> w = torch.nn.Parameter(torch.tensor([2.0, 0.1]))
    >>> opt = torchreg.ProxAdamW([w], lr=0.5, weight_decay=0, penalty=torchreg.L1(0.5))
    >>> w.grad = torch.tensor([1.0, 0.01])
    >>> opt.step()  # √v̂ = |g|: w moves by 0.5·sign(g) and shrinks by 0.5·0.5/|g|
    >>> w.data
    tensor([1.2500, 0.0000])

    Source: Loshchilov and Hutter, Decoupled weight decay regularization, ICLR 2019; the proximal operator in Adam's
    metric as in Yun, Lozano and Yang, Adaptive proximal gradient methods for structured neural networks, NeurIPS 2021.
    """

    _required = ("lr", "betas", "eps", "weight_decay")
    _origin = "ProxAdamW or torch.optim.AdamW"
    _buffers = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _row_entries = ("settled", "row_steps")
    _later: ClassVar = {
        "amsgrad": False,
        "metric": "adam",
        "decoupled_weight_decay": True,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "stochastic_rounding": True,
    }
    _update = kernels.ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        penalty: Penalty | None = None,
        strength_scale: float | Tensor = 1.0,
        metric: str = "adam",
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        stochastic_rounding: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "penalty": penalty,
            "strength_scale": strength_scale,
            "metric": metric,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `ProximalOptimizer`; step counters that are numbers become tensors, as in torch."""
        for i, group in enumerate(state["param_groups"]):
            for position, p in enumerate(group["params"]):
                _check_entries(state["state"].get(p) if isinstance(p, Tensor) else None, f"{position} of group {i}")
        super().__setstate__(state)
        for group in self.param_groups:
            for p in group["params"]:
                entries = self.state.get(p, {})
                if "step" in entries and not isinstance(entries["step"], Tensor):
                    entries["step"] = _counter(p, group).fill_(float(entries["step"]))

    @staticmethod
    def effective_step(group: Mapping[str, Any]) -> float | Tensor | None:
        """γ·strength_scale, the step of the proximal operator in this group (a weight's threshold is that times λ).

        None in Adam's metric, where it is divided by √v̂ + ε and so another one for each weight.
        """
        if group["penalty"] is None:
            return 0.0
        return None if group["metric"] == "adam" else scaled_step(group, 1.0)

    def _hyperparameters(self, group: Mapping[str, Any]) -> kernels.AdamStep:
        beta1, beta2 = _checked_betas(group["betas"])
        _check_metric(group)
        penalty = usable_penalty(group)
        if penalty is not None and group["metric"] == "adam":
            check_takes_steps(penalty, "Adam")
        return kernels.AdamStep(
            lr=read(number(group, "lr"), group),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            penalty=penalty,
            prox_step=0.0 if group["penalty"] is None else scaled_step(group, 1.0),
            identity=group["metric"] == "identity",
            stochastic_rounding=group["stochastic_rounding"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
        )

    def _add_state(self, tensors: kernels.AdamTensors, group: Mapping[str, Any], offset: int, counts: bool) -> None:
        states = [self.state[p] for p in tensors.params]
        for p, state in zip(tensors.params, states, strict=True):
            if not state:
                state["step"] = _counter(p, group)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if group["amsgrad"] and "max_exp_avg_sq" not in state:
                state["max_exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        tensors.exp_avgs = [state["exp_avg"] for state in states]
        tensors.exp_avg_sqs = [state["exp_avg_sq"] for state in states]
        if group["amsgrad"]:
            tensors.max_exp_avg_sqs = [state["max_exp_avg_sq"] for state in states]
        tensors.state_steps = [state["step"] for state in states]
        if counts:
            params = enumerate(group["params"], start=offset)
            positions = [i for i, p in params if p.grad is not None and not self._is_sparse(p)]
            on_device = group["capturable"] or group["fused"]
            steps = [step.long() if on_device else int(step) for step in tensors.state_steps]
            tensors.seeds = [rounding_seed(step + 1, i) for step, i in zip(steps, positions, strict=True)]

    def _form(self, group: Mapping[str, Any]) -> ClosedForm:
        return UNIFORM if group["metric"] == "identity" else DIAGONAL

    def _check_table(self, group: Mapping[str, Any], p: Tensor) -> None:
        super()._check_table(group, p)
        if float(group["weight_decay"]) != 0:
            raise ValueError(f"`weight_decay` must be 0 (an L2 penalty does the same), got {group['weight_decay']}.")

    def _shrinks_by(self, table: RowStep) -> tuple[float, float]:
        return 1.0, float(table.step.prox_step)

    def _metric(self, p: Tensor, rows: Rows, state: Mapping[str, Any]) -> Tensor:
        group = self._group_of(p)
        square, count = arithmetic(taken(_squares(group, state), rows)), taken(state["row_steps"], rows)
        return inverse_root(square, count, float(group["betas"][1]), group["eps"])

    def _native_metric(self, p: Tensor, state: Mapping[str, Any]) -> dict[str, Any] | None:
        if "row_steps" not in state:
            return None
        group = self._group_of(p)
        square, steps = _squares(group, state), state["row_steps"]
        if not native_rows.takes(p, square, numbers=[steps]):
            return None
        return {"scale": square, "steps": steps, "beta2": float(group["betas"][1]), "eps": float(group["eps"])}

    def _step_rows(self, table: RowStep, state: dict[str, Any], seed: int | Tensor | None) -> None:
        p = table.p
        state.setdefault("step", torch.zeros((), device="cpu"))
        if "row_steps" not in state:
            state["row_steps"] = torch.full(p.shape[:1], float(state["step"]), dtype=torch.float64, device=p.device)
        for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if table.step.amsgrad else [])):
            if name not in state:
                state[name] = pages.zeros_like(p)
        state["step"] += 1
        adam_rows(table, state, seed)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raise unless the hyperparameters make sense; the wording of the first is torch.optim.AdamW's."""
        lr, betas = group["lr"], group["betas"]
        for key in ("lr", "eps", "weight_decay"):
            if not isinstance(group[key], (numbers.Real, Tensor)):
                raise TypeError(f"Expected `{key}` to be a number, got {group[key]!r}.")
        if isinstance(lr, Tensor):
            if group["foreach"] and not group["capturable"]:
                raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not group["eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        _checked_betas(betas)
        for i, beta in enumerate(betas):
            if isinstance(beta, Tensor) and not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
            raise ValueError("betas must be either both floats or both Tensors")
        for i, beta in enumerate(betas):
            if isinstance(beta, Tensor) and group["foreach"] and not group["capturable"]:
                raise ValueError(f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True")
            if isinstance(beta, Tensor) and beta.numel() != 1:
                raise ValueError(f"Tensor betas[{i}] must be 1-element")
        if not group["weight_decay"] >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
        _check_metric(group)
        check_implementation(group)

    def _check_params(self, group: Mapping[str, Any]) -> None:
        super()._check_params(group)
        if group["penalty"] is not None and group["metric"] == "adam":
            check_takes_steps(group["penalty"], "Adam")
            for p in group["params"]:
                if p.is_complex():
                    raise TypeError(
                        f"A complex parameter of shape {tuple(p.shape)} has a penalty: Adam scales real and imaginary "
                        'parts apart, so use metric="identity" or torch.view_as_real.'
                    )


def _check_entries(entries: Any, which: str) -> None:
    """Raise unless the loaded state of a parameter is Adam's, or none."""
    if not entries:
        return
    missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in entries]
    if missing:
        raise ValueError(
            f"The loaded state of parameter {which} lacks {', '.join(map(repr, missing))}: it is of another optimizer."
        )
    step = entries["step"]
    if not isinstance(step, (numbers.Real, Tensor)):
        raise TypeError(f"Expected the loaded 'step' of parameter {which} to be a number, got {type(step).__name__}.")
    if isinstance(step, Tensor) and step.numel() != 1:
        raise ValueError(f"Expected the loaded 'step' of parameter {which} to be a number, got {tuple(step.shape)}.")
    if not (isinstance(step, Tensor) and step.device.type != "cpu") and not 0 <= float(step) < math.inf:
        raise ValueError(f"Expected the loaded 'step' of parameter {which} to be 0 or more, got {float(step)}.")


def _check_metric(group: Mapping[str, Any]) -> None:
    if group["metric"] not in METRICS:
        raise ValueError(f"Expected `metric` to be one of {METRICS}, got {group['metric']!r}.")


def _checked_betas(betas: Any) -> Any:
    """Return the two numbers, or raise. Tensors are not read."""
    if (
        not isinstance(betas, (tuple, list))
        or len(betas) != 2
        or not all(isinstance(beta, (numbers.Real, Tensor)) for beta in betas)
    ):
        raise TypeError(f"Expected `betas` to be two numbers in [0, 1), got {betas!r}.")
    for i, beta in enumerate(betas):
        if not isinstance(beta, Tensor) and not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    return betas


def _squares(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    squares: Tensor = state["max_exp_avg_sq" if group["amsgrad"] and "max_exp_avg_sq" in state else "exp_avg_sq"]
    return squares


def _counter(p: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A step counter, where torch.optim.AdamW keeps it."""
    if group["capturable"] or group["fused"]:
        return torch.zeros((), dtype=_get_scalar_dtype(is_fused=group["fused"]), device=p.device)
    return torch.tensor(0.0, dtype=_get_scalar_dtype())

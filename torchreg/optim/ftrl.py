"""Follow the regularised leader: Adagrad's step sizes, and zeros that need no catching up."""

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
from torchreg.optim.groups import check_takes_steps, checked_penalty, checked_scale, param_name
from torchreg.optim.hyperparameters import scalar
from torchreg.optim.missed import check_by_rows
from torchreg.optim.settling import Rows, SettlingOptimizer, put, rows_of, taken
from torchreg.penalties import Penalty
from torchreg.penalties.base import HALF
from torchreg.wording import one_line

_BUFFERS = ("linear", "sum", "quadratic")
_NUMBERS = ("step", "strength", "settled_strength")


class FTRL(SettlingOptimizer):
    r"""FTRL-Proximal: each weight has Adagrad's step size, and is a function of sums, so that zeros are exact at once.

    Minimises f(w) + s·R(w). With the learning rate α, the first weights w₀, and n = 0, h = β/α, z = −h·w₀, T = 0:

    .. math::
        \sigma &= (\sqrt{n + g^2} - \sqrt n)/\alpha, \qquad n \leftarrow n + g^2 \\
        z &\leftarrow z + g - \sigma w, \qquad h \leftarrow h + \sigma, \qquad T \leftarrow T + s \\
        w &\leftarrow \operatorname{argmin}_w\; \langle z, w\rangle + \tfrac12 h\,w^2 + T\,R(w)
           = \operatorname{prox}_{(T/h) R}(-z/h)

    all coordinate by coordinate, with a diagonal metric h. It is made for models with many rare features: a weight
    whose gradient is zero changes neither z nor h, so that sparse gradients (``nn.Embedding(sparse=True)``) cost what
    the rows that have one do, and a row that is read is computed afresh from its sums: nothing has to be remembered of
    the steps it missed. Call `settle_lookups` once; see docs/embeddings.md.

    This differs from the paper and from TensorFlow's FTRL in:

    1. the penalty counts in every step, as the loss does, so that its strength is in units of the objective whatever
       the number of steps; ``cumulative=False`` counts it once in all, as they do (T = s);
    2. the weights begin where they are, not at zero;
    3. any penalty with a proximal operator in a diagonal metric will do;
    4. h is a sum: a change of the learning rate acts on what comes after it. At a rate of 0 a step changes nothing.

    Args:
        params: parameters, named parameters or param groups; see `Regularizer.param_groups`.
        lr: α, the learning rate: a float or a one-element tensor.
        beta: β > 0: a weight's first steps are at most α/β times its gradient.
        penalty: R for the groups that name none; None is none.
        strength_scale: s, a float or 0-d tensor that a schedule may move.
        cumulative: False counts the penalty once instead of once for each step.
        maximize: ascend f instead of descending. The penalty still shrinks.

    ``state_dict()`` holds numbers, strings and tensors only, penalties included, and loads with
    ``torch.load(weights_only=True)``. The state is three tensors per parameter. Steps can't be captured in CUDA graphs.

    Raises:
        ValueError: if a hyperparameter is out of range, a group has an unknown key or lists a penalised parameter
            twice, or a loaded state has other shapes (nothing is changed then).
        TypeError: if a penalty is none, is shared by several parameters or has no known proximal operator in a diagonal
            metric; if a parameter is complex, sharded over processes, or of half precision, in which sums of all
            gradients have no room; if a gradient is sparse and the penalty's groups are not rows (no weight is changed
            then).

    >>> import torch, torchreg
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> opt = torchreg.FTRL([w], lr=1.0, penalty=torchreg.L1(0.5))
    >>> for _ in range(200):
    ...     w.grad = w.detach() - torch.tensor([2.0, 0.3])
    ...     opt.step()
    >>> w.data
    tensor([1.5000, 0.0000])

    Source: McMahan et al., Ad click prediction: a view from the trenches, KDD 2013; the penalty in every step as in
    McMahan, Follow-the-regularized-leader and mirror descent: equivalence theorems and L1 regularization, AISTATS 2011.
    """

    _required = ("lr", "beta", "cumulative")
    _origin = "FTRL"
    _buffers = _BUFFERS
    _row_entries = ()
    _later: ClassVar[Mapping[str, Any]] = {"maximize": False}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        beta: float = 1.0,
        *,
        penalty: Penalty | None = None,
        strength_scale: float | Tensor = 1.0,
        cumulative: bool = True,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "penalty": penalty,
            "strength_scale": strength_scale,
            "cumulative": cumulative,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `SettlingOptimizer`."""
        super().__setstate__(state)
        for p in self.state:
            self._be_lazy(p)

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
        plan = [self._checked(group, index) for index, group in enumerate(self.param_groups)]  # may raise
        for group, (lr, scale, gradients) in zip(self.param_groups, plan, strict=True):
            for p, rows, grad in gradients:
                self._step_rows_of(group, p, rows, grad, lr, scale)
        return loss

    def effective_step(self, group: Mapping[str, Any]) -> float | Tensor | None:
        """None: each weight has its own step T/h, unless there is no penalty."""
        return 0.0 if group["penalty"] is None else None

    def _checked(self, group: dict[str, Any], index: int) -> tuple[float, float, list[tuple[Tensor, Rows, Tensor]]]:
        """The learning rate, the scale, and the parameters of a group with their gradients."""
        self._check_group(group)
        penalty = usable_penalty(group)
        gradients = []
        for position, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            try:
                if p.grad.layout is torch.sparse_coo:
                    self._check_table(group, p)
                    check_by_rows(penalty, p)
                rows, grad = rows_of(p)
                self._check_told(p, rows, grad)
            except (RuntimeError, TypeError, ValueError) as error:
                name = param_name(group, position)
                raise type(error)(f"Parameter {name} of group {index} has a sparse gradient: {error}") from None
            gradients.append((p, rows, -grad if group["maximize"] else grad))
        return float(scalar(group["lr"])), float(scalar(group["strength_scale"])), gradients

    def _step_rows_of(
        self, group: dict[str, Any], p: Tensor, rows: Rows, grad: Tensor, lr: float, scale: float
    ) -> None:
        state = self.state[p]
        if not state:
            state.update({name: torch.zeros_like(p) for name in _BUFFERS}, **dict.fromkeys(_NUMBERS, 0))
            self._be_lazy(p)
        if lr == 0:
            return
        if state["step"] == 0:
            state["quadratic"].fill_(group["beta"] / lr)
            state["linear"].copy_(-state["quadratic"] * p)
        self._settle(p, rows if isinstance(rows, Tensor) else None)
        z, n, h = (taken(state[name], rows) for name in _BUFFERS)
        w = taken(p.detach(), rows)
        total = n + grad * grad
        sigma = (total.sqrt() - n.sqrt()) / lr
        z, h = z + grad - sigma * w, h + sigma
        for name, values in zip(_BUFFERS, (z, total, h), strict=True):
            put(state[name], rows, values)
        state["step"] += 1
        state["strength"] = state["strength"] + scale if group["cumulative"] else scale
        put(p, rows, _leader(group["penalty"], z, h, state["strength"]))
        if isinstance(rows, slice) or group["penalty"] is None:
            state["settled_strength"] = state["strength"]

    def _settle(self, p: Tensor, rows: Tensor | None = None) -> None:
        state = self.state.get(p)
        if not state or state["strength"] == state["settled_strength"]:
            return
        group = self._group_of(p)
        of = slice(None) if rows is None else rows
        if group["penalty"] is not None:
            z, h = taken(state["linear"], of), taken(state["quadratic"], of)
            put(p, of, _leader(group["penalty"], z, h, state["strength"]))
        if rows is None:
            state["settled_strength"] = state["strength"]

    def _check_told(self, p: Tensor, rows: Rows, grads: Tensor) -> None:
        """Raise unless rows are settled before they are read: their gradient is that of other weights.

        A dense gradient tells that the weight was read in another way than by the hooks of `settle_lookups`.
        """
        state = self.state.get(p)
        if not state or state["strength"] == state["settled_strength"]:
            return
        if not self._is_told:
            raise RuntimeError(_UNTOLD)
        penalty = self._group_of(p)["penalty"]
        if isinstance(rows, slice) and penalty is not None:
            z, h = state["linear"], state["quadratic"]
            rounding = 16 * torch.finfo(p.dtype).eps * (z / h).abs()
            is_behind = (_leader(penalty, z, h, state["strength"]) - p).abs() > rounding
            if bool((is_behind & (grads != 0)).any()):
                raise RuntimeError(_UNTOLD)

    def _check_rows(self, state: Mapping[str, Any]) -> None:
        for i, group in enumerate(state["param_groups"]):
            for position, p in enumerate(group["params"]):
                entries = state["state"].get(p) if isinstance(p, Tensor) else None
                if not entries:
                    continue
                where = f"The loaded state of parameter {position} of group {i}"
                missing = [key for key in (*_BUFFERS, *_NUMBERS) if key not in entries]
                if missing:
                    raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}: it is of another optimizer.")
                for key in _NUMBERS:
                    value = entries[key]
                    if type(value) not in (int, float) or not 0 <= value < math.inf:
                        raise ValueError(f"{where}: expected {key!r} to be 0 or more, got {one_line(value)}.")

    def _check_group(self, group: Mapping[str, Any]) -> None:
        for key in ("lr", "beta"):
            value = group[key]
            allowed = (numbers.Real, Tensor) if key == "lr" else numbers.Real
            if isinstance(value, bool) or not isinstance(value, allowed):
                raise TypeError(f"Expected `{key}` to be a number, got {one_line(value)}.")
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not 0 <= float(group["lr"]) < math.inf:
            raise ValueError(f"Invalid learning rate: {group['lr']}")
        if not 0 < group["beta"] < math.inf:
            raise ValueError(f"Invalid beta value: {group['beta']}; expected it to be above 0.")
        penalty = checked_penalty(group["penalty"])
        checked_scale(group["strength_scale"])
        if penalty is not None and penalty.is_joint:
            raise TypeError(f"FTRL can't take {penalty.type_name} with groups that several parameters share.")
        if penalty is not None:
            check_takes_steps(penalty, "FTRL")

    def _check_params(self, group: Mapping[str, Any]) -> None:
        for p in group["params"]:
            if p.dtype in HALF or p.is_complex() or sharding.is_sharded(p):
                kind = "sharded over processes" if sharding.is_sharded(p) else f"of {p.dtype}"
                raise TypeError(
                    f"A parameter of shape {tuple(p.shape)} is {kind}: FTRL takes whole ones of float32 or float64."
                )


_UNTOLD = (
    "rows may have been looked up that are not up to date; call the optimizer's settle_lookups(model) once (again for "
    "a copy), or its settle(parameter, rows) before rows are read in another way, as by a tied layer."
)


def _leader(penalty: Penalty | None, z: Tensor, h: Tensor, strength: float) -> Tensor:
    """argmin ⟨z, w⟩ + ½h·w² + T·R(w)."""
    w = -z / h
    return w + 0 if penalty is None else penalty.prox(w, strength / h)

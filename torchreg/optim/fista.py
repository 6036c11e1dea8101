"""FISTA: accelerated proximal gradient for full-batch problems."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchreg.optim.accelerated import FRESH, Solve
from torchreg.optim.anderson import History
from torchreg.optim.composite import Composite
from torchreg.optim.groups import checked_penalty, checked_scale
from torchreg.optim.penalized import PenalizedOptimizer
from torchreg.penalties import Penalty
from torchreg.penalties.base import HALF

_HISTORY_SIZE = 7


class FISTA(PenalizedOptimizer):
    r"""Accelerated proximal gradient, with adaptive restart and backtracking, for full-batch problems.

    Minimises f(w) + s·R(w) to a given accuracy, with *exact* zeros, where f is the whole data's loss:

    .. math::
        y &= x_k + \beta_k (x_k - x_{k-1}) \\
        x_{k+1} &= \operatorname{prox}_{\tau_k s R}(y - \tau_k \nabla f(y))

    The step τ adapts to the curvature L of f between y and x_{k+1}, which the two gradients tell: the next one is 1/L,
    at most ten times the last.

    At first β = 0, and a step is taken, however long, if the objective falls by 0.01·‖x_{k+1} − x_k‖²/2τ. Where the
    problem is well conditioned, nothing is faster. After four steps that are refused, or 30 that are not, β = 1, and τ
    is shortened where τL > 1.1 (or > 1, if the objective rises). The momentum restarts (β = 0 once) where it points
    uphill, ⟨y − x_{k+1}, x_{k+1} − x_k⟩ > 0; and a step that would raise the objective is taken back and repeated
    without momentum.

    Before that, from two points on, an iteration tries where the last points lead to (Anderson's extrapolation):

    .. math::
        x_{k+1} = \operatorname{prox}_{\tau_k s R}\Big(\sum_i a_i\,(x_i - \tau_k \nabla f(x_i))\Big), \quad
        a = \operatorname*{argmin}_{\sum a_i = 1}\Big\|\sum_i a_i\,(x_i - \operatorname{prox}_{\tau s R}
        (x_i - \tau\nabla f(x_i)))\Big\|

    in the metric of lr, which is taken if the objective falls by a hundredth of what proximal gradient would promise,
    or, where rounding hides that, the violation of the optimality conditions by a tenth; else the points but the last
    are forgotten. After r refusals in a row, 2^r − 2 iterations (62 at most) pass before the next try. Once the zeros
    are found this is close to conjugate gradients on the rest. So the objective never rises, rounding apart: penalties
    and losses that aren't convex are allowed, and lead to a stationary point.

    ``step(closure)`` is a whole solve: it iterates until the optimality conditions hold, and the next call goes on from
    there. The closure is that of `torch.optim.LBFGS`: it zeroes the gradients, computes f over all data *without* the
    penalty, calls backward and returns f. It is called about once an iteration, with momentum twice, and once more for
    each refusal. Each iteration waits for the device.

    Args:
        params: parameters, named parameters or param groups; see `Regularizer.param_groups`.
        lr: the first step τ; with several groups also their ratio, which stays.
        max_iter: iterations of a call of ``step``.
        tolerance_kkt: when to stop: the largest violation of the optimality conditions (`torchreg.kkt_residual`), as a
            fraction of the largest modulus of ∇f seen so far.
        penalty: R for the groups that name none; None is none.
        strength_scale: s, a float or 0-d tensor that a schedule may move.
        backtracking: False keeps τ = lr, which must be at most 1/L then.
        restart: False keeps the momentum of the original, β_k = (t_k − 1)/t_{k+1} with t_1 = 1 and
            t_{k+1} = ½ + ½√(1 + 4·t_k²·τ_{k−1}/τ_k), from the start; the objective may ripple then.
        history_size: how many points the extrapolation sees; each takes the memory of four times the weights during a
            step, and of two times in the state. 0 does without, and so does restart=False.

    ``state_dict()`` holds numbers, strings and tensors only, and loads with ``torch.load(weights_only=True)``.

    Raises:
        ValueError: if a hyperparameter is out of range or differs between groups, or the loss is not finite at the
            start, or not at any step length. The weights are the best so far then.
        TypeError: if no closure is given, a parameter is of half precision, or a gradient is sparse.

    >>> import torch, torchreg
    >>> w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    >>> opt = torchreg.FISTA([w], penalty=torchreg.L1(1.0))
    >>> def closure():
    ...     opt.zero_grad()
    ...     loss = (w - torch.tensor([3.0, 0.5])).square().sum() / 2
    ...     loss.backward()
    ...     return loss
    >>> loss = opt.step(closure)
    >>> w.data
    tensor([2., 0.], dtype=torch.float64)
    >>> opt.converged, opt.n_iter
    (True, 1)

    Source: Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm for linear inverse problems, SIAM J.
    Imaging Sci., 2009; β = 1 and its restart: Liang, Luo and Schönlieb, Improving FISTA: faster, smarter, and greedier,
    SIAM J. Sci. Comput., 2022, after O'Donoghue and Candès, Adaptive restart for accelerated gradient schemes, Found.
    Comput. Math., 2015; long steps: Wright, Nowak and Figueiredo, Sparse reconstruction by separable approximation,
    IEEE Trans. Signal Process., 2009; growing steps with momentum: Scheinberg, Goldfarb and Bai, Found. Comput. Math.,
    2014; the safeguard: Li and Lin, NeurIPS 2015; the extrapolation: Mai and Johansson, Anderson acceleration of
    proximal gradient methods, ICML, 2020.
    """

    _required = ("lr", "max_iter", "tolerance_kkt", "backtracking", "restart")
    _later: ClassVar = {"history_size": _HISTORY_SIZE}
    _origin = "FISTA"
    _buffers = ("previous",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        *,
        max_iter: int = 1000,
        tolerance_kkt: float = 1e-6,
        penalty: Penalty | None = None,
        strength_scale: float | Tensor = 1.0,
        backtracking: bool = True,
        restart: bool = True,
        history_size: int = _HISTORY_SIZE,
    ) -> None:
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "tolerance_kkt": tolerance_kkt,
            "penalty": penalty,
            "strength_scale": strength_scale,
            "backtracking": backtracking,
            "restart": restart,
            "history_size": history_size,
        }
        super().__init__(params, defaults)

    def _loaded(self, state_dict: Mapping[str, Any]) -> None:
        for p, entries in self.state.items():
            kept = entries.get("history")
            if kept is None:
                continue
            if not isinstance(kept, Tensor) or kept.layout is not torch.strided:
                raise TypeError(f"The state dict's `history` must be a dense tensor, got {_described(kept)}.")
            if kept.ndim < 2 or len(kept) == 0 or kept.shape[1:] != (2, *p.shape):
                raise ValueError(
                    f"The state dict's history of a parameter of shape {tuple(p.shape)} has the shape "
                    f"{tuple(kept.shape)}, not (points, 2, ...)."
                )

    @property
    def n_iter(self) -> int:
        """Iterations of the last call of ``step``."""
        return self._numbers()["n_iter"]

    @property
    def n_evaluations(self) -> int:
        """How often the last call of ``step`` called the closure."""
        return self._numbers()["n_evaluations"]

    @property
    def kkt_residual(self) -> float:
        """The largest violation of the optimality conditions at the weights, in units of the gradient."""
        return self._numbers()["kkt_residual"]

    @property
    def converged(self) -> bool:
        """Whether the last call of ``step`` reached ``tolerance_kkt``."""
        return self._numbers()["converged"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """Iterate until the optimality conditions hold, or ``max_iter`` times.

        Args:
            closure: zeroes the gradients, computes the loss f over all data without the penalty, calls backward and
                returns f.

        Returns:
            f at the weights found, a 0-d tensor. ``.grad`` holds its gradient there.
        """
        if not callable(closure):
            raise TypeError(
                "FISTA needs a closure in step(): a function that zeroes the gradients, computes the loss of all data "
                f"without the penalty, calls backward() and returns it; got {closure!r}."
            )
        first = self._first_group()
        for group in self.param_groups:
            checked_scale(group["strength_scale"])
            self._check_group(group)
        problem = Composite(self.param_groups, closure)
        numbers = self._numbers()
        history = self._history(problem, first, numbers["residual_step"])
        solve = Solve(problem, numbers, self._previous(problem), history, first)
        try:
            solve.run(first["max_iter"], first["tolerance_kkt"])
        finally:
            problem.put(solve.x.weights, solve.x.grads)
            for p, w in zip(problem.params, solve.previous, strict=True):
                self.state[p]["previous"] = w
            for p, kept in zip(problem.params, history.pack(solve.x), strict=False):
                self.state[p]["history"] = kept
            numbers.update(n_evaluations=problem.evaluations, residual_step=history.step)
            self.state[first["params"][0]].update(numbers)
        return torch.tensor(solve.x.loss, dtype=problem.params[0].dtype.to_real())

    def _previous(self, problem: Composite) -> list[Tensor]:
        return [self.state[p].get("previous", w) for p, w in zip(problem.params, problem.start.weights, strict=True)]

    def _history(self, problem: Composite, settings: Mapping[str, Any], step: float) -> History:
        kept = {p: self.state[p].pop("history", None) for p in list(self.state)}
        history = History(problem, settings["history_size"] if settings["restart"] else 0, step)
        history.unpack([kept.get(p) for p in problem.params])
        return history

    def _first_group(self) -> dict[str, Any]:
        """The group whose settings are those of the solve."""
        first = next((group for group in self.param_groups if group["params"]), self.param_groups[0])
        for key in ("max_iter", "tolerance_kkt", "backtracking", "restart", "history_size"):
            if any(group[key] != first[key] for group in self.param_groups):
                raise ValueError(f"Expected `{key}` to be the same in all param groups: it is of the whole solve.")
        return first

    def _numbers(self) -> dict[str, Any]:
        """The numbers of the solve, which are in the state of the first parameter."""
        state = self.state.get(self._first_group()["params"][0], {})
        return {key: state.get(key, value) for key, value in FRESH.items()}

    def _check_group(self, group: Mapping[str, Any]) -> None:
        for key in ("lr", "tolerance_kkt"):
            value = group[key]
            if isinstance(value, bool) or not isinstance(value, (numbers.Real, Tensor)):
                raise TypeError(f"Expected `{key}` to be a number, got {value!r}.")
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"Expected `{key}` to be a number, got a tensor of shape {tuple(value.shape)}.")
        for key in ("backtracking", "restart"):
            if not isinstance(group[key], bool):
                raise TypeError(f"Expected `{key}` to be True or False, got {group[key]!r}.")
        if not (group["lr"] > 0 and math.isfinite(group["lr"])):
            raise ValueError(f"Invalid learning rate: {group['lr']}; FISTA needs a positive one to begin with.")
        if not group["tolerance_kkt"] >= 0:
            raise ValueError(f"Expected `tolerance_kkt` to be a non-negative number, got {group['tolerance_kkt']}.")
        for key, least in (("max_iter", 1), ("history_size", 0)):
            if isinstance(group[key], bool) or not isinstance(group[key], numbers.Integral):
                raise TypeError(f"Expected `{key}` to be an integer of at least {least}, got {group[key]!r}.")
            if group[key] < least:
                raise ValueError(f"Expected `{key}` to be an integer of at least {least}, got {group[key]}.")
        checked_penalty(group["penalty"])
        checked_scale(group["strength_scale"])

    def _check_params(self, group: Mapping[str, Any]) -> None:
        for p in group["params"]:
            if p.dtype in HALF:
                raise TypeError(
                    f"A parameter of shape {tuple(p.shape)} is of {p.dtype}: FISTA compares losses and gradients that "
                    "differ by little, so use float32 or float64."
                )


def _described(value: Any) -> str:
    return str(value.layout) if isinstance(value, Tensor) else repr(value)[:50]

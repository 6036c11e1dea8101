"""FISTA: accelerated proximal gradient for full-batch problems."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchreg.optim.anderson import History
from torchreg.optim.composite import Composite, Point, difference
from torchreg.optim.groups import checked_penalty, checked_scale
from torchreg.optim.penalized import PenalizedOptimizer
from torchreg.penalties import Penalty
from torchreg.penalties.base import HALF

_SLACK = 1.1
"""How far beyond 1/L a step may go while the objective falls; proximal gradient itself converges below 2/L."""
_DECREASE = 0.01
"""By how much of ‖x_{k+1} − x_k‖²/2τ the objective must fall for a step that is longer still."""
_PATIENCE = 4
"""Steps of that kind that the objective refuses before there is momentum: the first, which is a guess, and three."""
_LONGEST = 30
"""Iterations without momentum, however well they go."""
_ATTEMPTS = 60
_HISTORY_SIZE = 7
_LESS = 0.9
"""Of the violations may be left by a leap where the objective is too large for its fall to be seen."""
_PAUSE = 6
"""After so many leaps in a row that have been refused, two to that power iterations pass before the next one."""
_FRESH = {"momentum": 1.0, "pull": 0.0, "step_size": 1.0, "residual_step": 1.0, "steepest": 0.0, "highest": 0.0}
_COUNTS = {"refused": 0, "spectral": 0, "refused_leaps": 0, "waited": 0}
_REPORT = {"n_iter": 0, "n_evaluations": 0, "kkt_residual": math.nan, "converged": False}


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
        solve = _Solve(problem, numbers, self._previous(problem), history, first)
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
        fresh = {**_FRESH, **_COUNTS, **_REPORT}
        return {key: state.get(key, value) for key, value in fresh.items()}

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


class _Solve:
    """One call of ``step``: the present point x, the one before, and the numbers that go into the state."""

    def __init__(
        self,
        problem: Composite,
        numbers: dict[str, Any],
        previous: list[Tensor],
        history: History,
        settings: Mapping[str, Any],
    ) -> None:
        self.problem = problem
        self.x = problem.start
        self.previous = previous
        self.numbers = numbers
        self._backtracking, self._restart = settings["backtracking"], settings["restart"]
        self._value = problem.objective(self.x)
        self.history = history
        self._noise = 10 * problem.noise

    def run(self, max_iter: int, tolerance: float) -> None:
        state = self.numbers
        state["n_iter"] = 0
        while not self._is_optimal(tolerance) and state["n_iter"] < max_iter:
            state["n_iter"] += 1
            if self._leap():
                continue
            y = self._extrapolated()
            new, curvature = self._forward_backward(y)
            if y is not self.x and self._restart and self._rises(new):
                y = self.x
                new, curvature = self._forward_backward(y)
            moved = difference(new.weights, self.x.weights)
            if self.problem.dot(moved, moved) == 0 and y is self.x:
                break  # nothing moves any more: as near as the arithmetic comes
            uphill = self.problem.dot(difference(y.weights, new.weights), moved, metric=True) > 0
            before = state["step_size"]
            self._move(new, curvature)
            if self._restart:
                state["spectral"] += self._is_spectral()
                state["pull"] = 0.0 if uphill or self._is_spectral() else 1.0
            else:
                t = state["momentum"]
                state["momentum"] = (1 + math.sqrt(1 + 4 * t * t * before / state["step_size"])) / 2
                state["pull"] = (t - 1) / state["momentum"]

    def _is_optimal(self, tolerance: float) -> bool:
        state = self.numbers
        state["steepest"] = max(state["steepest"], self.problem.steepest(self.x))
        state["highest"] = max(state["highest"], abs(self._value))
        state["kkt_residual"] = self.problem.residual(self.x)
        state["converged"] = state["kkt_residual"] <= tolerance * state["steepest"]
        return state["converged"]

    def _is_spectral(self) -> bool:
        """Whether steps are as long as the last curvature allows, without momentum, while the objective falls."""
        state = self.numbers
        return self._backtracking and self._restart and state["refused"] < _PATIENCE and state["spectral"] < _LONGEST

    def _leap(self) -> bool:
        """Take the step from where the last points lead to; False if there are too few or it lowers too little."""
        self._shorten_for_penalties()
        state = self.numbers
        step = state["step_size"]
        self.history.add(self.x, step)
        if state["waited"] < 2 ** min(state["refused_leaps"], _PAUSE) - 2:
            state["waited"] += 1
            return False
        found = self.history.mixed()
        if found is None:
            self.history.forget()
            return False
        mix, fall = found
        new = self.problem.at(self.problem.forward_backward(mix, step))
        way = difference(new.weights, self.x.weights)
        length = self.problem.dot(way, way, metric=True)
        state["waited"] = 0
        if length == 0 or not math.isfinite(new.loss) or not self._gains(new, _DECREASE * fall):
            state["refused_leaps"] += 1
            self.history.forget()
            return False
        state["refused_leaps"] = 0
        self._move(new, self._curvature(way, length, self.x, new))
        return True

    def _gains(self, new: Point, fall: float) -> bool:
        """Whether the objective falls by so much, or, where that is below its rounding, the violations by a tenth."""
        if self._rises(new, fall):
            return False
        visible = fall > self._noise * self.numbers["highest"]
        return visible or self.problem.residual(new) <= _LESS * self.numbers["kkt_residual"]

    def _move(self, new: Point, curvature: float) -> None:
        """Let that be the present point; the next step is as long as the curvature on the way to it allows."""
        self.previous, self.x, self._value = self.x.weights, new, self.problem.objective(new)
        if self._backtracking:
            longest = 1 / curvature if curvature > 0 else math.inf
            self.numbers["step_size"] = min(longest, 10 * self.numbers["step_size"])

    def _extrapolated(self) -> Point:
        """y, or x where there is no momentum or it leads to where f is not finite."""
        pull = self.numbers["pull"]
        if pull == 0:
            return self.x
        y = self.problem.at([w.lerp(v, -pull) for w, v in zip(self.x.weights, self.previous, strict=True)])
        if math.isfinite(y.loss):
            return y
        self.numbers.update(momentum=1.0, pull=0.0)
        return self.x

    def _forward_backward(self, y: Point) -> tuple[Point, float]:
        """The next point and the curvature of f on the way to it, with a step that is short enough for it."""
        state = self.numbers
        for attempt in range(_ATTEMPTS):
            self._shorten_for_penalties()
            new = self.problem.at(self.problem.forward_backward(y, state["step_size"]))
            if not self._backtracking and math.isfinite(new.loss):
                return new, 0.0
            if not self._backtracking:
                break
            if not math.isfinite(new.loss):
                state["step_size"] *= 0.1
                continue
            way = difference(new.weights, y.weights)
            length = self.problem.dot(way, way, metric=True)
            curvature = self._curvature(way, length, y, new)
            ratio, fall = curvature * state["step_size"], length / (2 * state["step_size"])
            if ratio <= 1 and (y is not self.x or fall <= self._noise * state["highest"]):
                return new, curvature
            if ratio <= _SLACK and not self._rises(new):
                return new, curvature
            if y is self.x and self._is_spectral():
                if not self._rises(new, _DECREASE * fall):
                    return new, curvature
                state["refused"] += attempt == 0
            least = 1 + 1e-6 if ratio > 1 and attempt < 2 else 2.0  # where f is quadratic, the ratio itself is enough
            state["step_size"] /= min(max(ratio, least), 10.0)
        raise ValueError(
            f"The loss is not finite or not smooth near the weights: no step down to {state['step_size']:.3g} times lr "
            "lowers it. The weights are the best found so far."
        )

    def _rises(self, new: Point, fall: float = 0.0) -> bool:
        """Whether the objective falls by less than that, rounding apart (or is NaN)."""
        return not self.problem.objective(new) <= self._value - fall + self._noise * abs(self._value)

    def _shorten_for_penalties(self) -> None:
        """For MCP and SCAD, whose proximal operator is none for a long step."""
        for _ in range(_ATTEMPTS if self._backtracking else 0):
            try:
                self.problem.check_step(self.numbers["step_size"])
            except ValueError:
                self.numbers["step_size"] *= 0.5
            else:
                return
        self.problem.check_step(self.numbers["step_size"])

    def _curvature(self, way: list[Tensor], length: float, y: Point, new: Point) -> float:
        """L = ⟨∇f(x) − ∇f(y), x − y⟩/‖x − y‖²: where f is convex, a step of up to 1/L does not raise the objective.

        Losses would tell it, too, but near the optimum they differ by no more than their rounding.
        """
        return self.problem.dot(way, difference(new.grads, y.grads)) / length if length else 0.0

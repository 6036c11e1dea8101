"""One solve of FISTA: accelerated proximal gradient with restart, backtracking and leaps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchreg.optim.anderson import History
from torchreg.optim.composite import Composite, Point, difference

_SLACK = 1.1
"""How far beyond 1/L a step may go while the objective falls; proximal gradient itself converges below 2/L."""
_DECREASE = 0.01
"""By how much of ‖x_{k+1} − x_k‖²/2τ the objective must fall for a step that is longer still."""
_PATIENCE = 4
"""Steps of that kind that the objective refuses before there is momentum: the first, which is a guess, and three."""
_LONGEST = 30
"""Iterations without momentum, however well they go."""
_ATTEMPTS = 60
_LESS = 0.9
"""Of the violations may be left by a leap where the objective is too large for its fall to be seen."""
_PAUSE = 6
"""After so many leaps in a row that have been refused, two to that power iterations pass before the next one."""

FRESH = {
    "momentum": 1.0,
    "pull": 0.0,
    "step_size": 1.0,
    "residual_step": 1.0,
    "steepest": 0.0,
    "highest": 0.0,
    "refused": 0,
    "spectral": 0,
    "refused_leaps": 0,
    "waited": 0,
    "n_iter": 0,
    "n_evaluations": 0,
    "kkt_residual": math.nan,
    "converged": False,
}
"""The numbers of a solve that has not begun."""


class Solve:
    """One call of ``step``: the present point x, the one before, and the numbers that go into the state."""

    def __init__(
        self,
        problem: Composite,
        numbers: dict[str, Any],
        previous: list[Tensor],
        history: History,
        settings: Mapping[str, Any],
    ) -> None:
        self.problem, self.x = problem, problem.start
        self.numbers, self.previous, self.history = numbers, previous, history
        self._backtracking, self._restart = settings["backtracking"], settings["restart"]
        self._noise = 10 * problem.noise

    def run(self, max_iter: int, tolerance: float) -> None:
        """Iterate until the violations are below the tolerance times the steepest slope, or so many times."""
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
        state["highest"] = max(state["highest"], abs(self.problem.objective(self.x)))
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
        self.previous, self.x = self.x.weights, new
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
        value = self.problem.objective(self.x)
        return not self.problem.objective(new) <= value - fall + self._noise * abs(value)

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

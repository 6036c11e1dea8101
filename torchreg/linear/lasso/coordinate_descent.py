"""Coordinate descent, compiled from C: for sparse problems with many non-zero coefficients, and for who asks for it."""

from __future__ import annotations

import ctypes
import functools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreg.kernels import toolchain
from torchreg.linear.data.design import Dense, Held
from torchreg.linear.data.sparse_design import Sparse
from torchreg.linear.lasso import sparse_descent
from torchreg.linear.lasso.problem import Fit, Problem, Strength, duality_gaps
from torchreg.linear.lasso.solution import Solution
from torchreg.linear.lasso.sparse_descent import Quadratic

_TARGET = 1e-13  # the relative gap that ends the sweeps
_FIRST, _START = 1e-3, 0.03  # changes that don't count at first: so much of √(‖z‖²/n), or of the relative gap if less
_FALL, _STEEPEST = 0.03, 1e-5  # those of the next sweeps, relative to the last ones', at most and at least
_SAFE = 0.05  # less than what would do, as the gap falls with the changes once no column outside matters
_LEAST = 1e-16  # changes that are rounding
_OFF = 1e-11  # those that are small enough also where the gap falls with their square, as it does with L2
_STALLED = 5  # times in a row that sweeps down to those leave more than half of the gap
_NEAR = 0.9  # of the strength: a pull from which on a column may come to matter


@functools.cache
def unavailable() -> str | None:
    """Why there are no compiled sweeps on this machine, or None. Builds them, once."""
    return toolchain.obstacle(_function) or sparse_descent.unavailable()


def solve_by_coordinates(
    problem: Problem, strengths: list[Strength], limit: int, start: Tensor | None
) -> list[Solution]:
    """Solutions for strengths in falling order, each from the one before, to a relative gap of 1e-13.

    The sweeps go over the columns that are not zero or that the sequential strong rule can't rule out; all columns are
    checked in between, by one product with X. Sparse columns whose signs have settled take conjugate gradients.

    Args:
        problem: on the CPU.
        strengths: falling.
        limit: the most sweeps for each.
        start: coefficients (features,) to begin with.

    Source: Friedman, Hastie and Tibshirani, Regularization paths for generalized linear models via coordinate descent,
    Journal of Statistical Software, 2010; Tibshirani et al., Strong rules for discarding predictors in lasso-type
    problems, JRSS B 2012.
    """
    state = (_SparseState if isinstance(problem.design, Sparse) else _DenseState)(problem, start)
    before, found = problem.largest, []
    every = torch.arange(problem.design.features, device="cpu")
    for strength in strengths:
        gap, sweeps = state.descend(strength, max(2 * strength.l1 - before, 0.0), limit)
        before = strength.l1
        found.append(Solution(every, torch.from_numpy(state.w.copy()), gap, sweeps))
    return found


class _State(ABC):
    """Coefficients with their residual, and the pull at every column."""

    centred: Tensor
    """The residual, centred and weighted."""
    pull: Tensor

    def __init__(self, problem: Problem, start: Tensor | None) -> None:
        self.problem = problem
        self.w = np.zeros(problem.design.features) if start is None else start.double().numpy().copy()

    @abstractmethod
    def refresh(self) -> None:
        """Residual and pull, without what sweeps have rounded."""

    @abstractmethod
    def sweep(self, index: Any, strength: Strength, least: float, limit: int) -> int:
        """Sweep over some columns until no prediction changes by more than `least`."""

    def gap(self, strength: Strength) -> float:
        """The duality gap of the refreshed state."""
        n, w, r, pull = max(1, self.problem.design.samples), self.w, self.centred, self.pull.numpy()
        active = pull - strength.l2 * w if strength.l2 else pull
        largest = active.max() if self.problem.positive else max(active.max(), -active.min())
        slope = 0.0 if strength.l1 else np.linalg.norm(pull.clip(min=0) if self.problem.positive else pull)
        numbers = r @ r / n, r @ self.problem.target / n, np.abs(w).sum(), w @ w, [slope]
        fit = Fit(*(r.new_tensor([a]) for a in numbers))
        forces = r.new_tensor([[largest]])  # the largest is all that counts, and of the slopes their norm
        return duality_gaps(fit, forces, [strength], n, self.problem.positive)[0]

    def descend(self, strength: Strength, threshold: float, limit: int) -> tuple[float, int]:
        """Sweep to the target. The gap, and the sweeps."""
        power, l1 = self.problem.power, strength.l1
        sweeps, stalled, gap = 0, 0, self.gap(strength)
        change = min(_FIRST, _START * gap / power) if power else 0.0
        inside = np.zeros(len(self.w), dtype=bool)
        while (gap > _TARGET * power or (strength.l2 and sweeps and change > _OFF)) and sweeps < limit:
            force = (self.pull if self.problem.positive else self.pull.abs()).numpy()
            violated = bool(((force > l1) & ~inside).any())
            if sweeps:
                needed = _SAFE * _TARGET * power / gap if gap else 0.0
                change = max(_LEAST, change * (_FALL if violated else max(_STEEPEST, min(_FALL, needed))))
            inside = (force > threshold) | (self.w != 0)
            threshold = _NEAR * l1
            sweeps += self.sweep(np.flatnonzero(inside), strength, change * power**0.5, limit - sweeps)
            self.refresh()
            before, gap = gap, self.gap(strength)
            stalled = stalled + 1 if change == _LEAST and gap >= 0.5 * before else 0
            if stalled >= _STALLED:
                break
        return gap, sweeps


class _SparseState(_State):
    """Columns in CSC format, whose means are not subtracted."""

    def __init__(self, problem: Problem, start: Tensor | None) -> None:
        super().__init__(problem, start)
        assert isinstance(problem.design, Sparse)
        self.design = design = problem.design
        self.columns = Quadratic(design, design.mean is not None, problem.positive)
        self.columns.w = self.w
        samples = max(1, design.samples)
        self.weights = 1 / samples if design.weights is None else design.weights / samples
        self.refresh()

    def refresh(self) -> None:
        """Residual and pull, without what sweeps have rounded."""
        design, target = self.design, self.problem.target
        if not self.w.any():
            self.centred, self.pull = target, self.problem.moment
            return
        fitted = self.columns.combine(self.w)
        if design.mean is not None:
            fitted -= design.mean @ self.w
        if design.root is not None:
            fitted *= design.root
        self.centred = target - torch.from_numpy(fitted)
        self.pull = design.correlations(self.centred.unsqueeze(0))[0]

    def sweep(self, index: Any, strength: Strength, least: float, limit: int) -> int:
        """Sweep over some columns until no prediction changes by more than `least`."""
        new = index[np.isnan(self.columns.squares[index])]
        self.columns.weigh(self.weights, new, self.design.mean)
        slopes = self.centred.numpy() / max(1, self.design.samples)
        if self.design.root is not None:
            slopes *= self.design.root
        return self.columns.descend(slopes, index, strength, least, limit)


class _DenseState(_State):
    """Columns that are copied when they are first needed, centred and weighted."""

    def __init__(self, problem: Problem, start: Tensor | None) -> None:
        super().__init__(problem, start)
        assert isinstance(problem.design, Dense)
        self.columns = Held(problem.design)
        self.place = np.full(problem.design.features, -1)
        self.refresh()

    def refresh(self) -> None:
        """Residual and pull, without what sweeps have rounded."""
        design = self.problem.design
        self.centred = self.problem.target - design.fitted(torch.from_numpy(self.w).unsqueeze(0))[0]
        self.pull = design.correlations(self.centred.unsqueeze(0))[0]

    def sweep(self, index: Any, strength: Strength, least: float, limit: int) -> int:
        """Sweep over some columns until no prediction changes by more than `least`."""
        new = index[self.place[index] < 0]
        self.place[new] = np.arange(len(new)) + len(self.columns)
        self.columns.add(torch.from_numpy(new))
        rows = self.columns.rows
        inside = np.flatnonzero(self.place >= 0)
        w = np.empty(len(inside))
        w[self.place[inside]] = self.w[inside]
        squares = rows.square().mean(1).numpy()
        residual = self.centred.numpy().copy()
        done = _function()(
            rows.data_ptr(),
            *(_pointer(a) for a in (squares, residual, w)),
            rows.shape[1],
            _pointer(np.ascontiguousarray(self.place[index], dtype=np.int64)),
            len(index),
            strength.l1,
            strength.l2,
            int(self.problem.positive),
            least,
            limit,
        )
        self.w[inside] = w[self.place[inside]]
        return done


def _pointer(array: Any) -> ctypes.c_void_p | None:
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


@functools.cache
def _function() -> Any:
    """The sweeps over dense columns."""
    text = Path(__file__).with_name("coordinate.c").read_text(encoding="utf-8")
    function = toolchain.library("coordinate", text).torchreg_dense_sweeps
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    function.argtypes = [*[pointer] * 4, integer, pointer, integer, real, real, ctypes.c_int, real, integer]
    function.restype = integer
    return function

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
from torchreg.linear.design import Dense, Held
from torchreg.linear.problem import Fit, Problem, Strength, duality_gaps
from torchreg.linear.solution import Solution
from torchreg.linear.sparse_design import Sparse

_TARGET = 1e-13  # the relative gap that ends the sweeps
_FIRST, _FALL = 1e-3, 0.03  # what still counts as a change: at first, and from one check to the next
_ROUNDS = 100
_TYPES = {"float32": "float", "float64": "double"}


@functools.cache
def unavailable() -> str | None:
    """Why there are no compiled sweeps on this machine, or None. Builds them, once."""
    try:
        for name in _TYPES:
            _function(name)
    except toolchain.Unavailable as reason:
        return str(reason)
    return None


def solve_by_coordinates(
    problem: Problem, strengths: list[Strength], limit: int, start: Tensor | None
) -> list[Solution]:
    """Solutions for strengths in falling order, each from the one before, to a relative gap of 1e-13.

    The sweeps go over the columns that are not zero or that the sequential strong rule can't rule out; all columns are
    checked in between, by one product with X.

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
    every = torch.arange(problem.design.features)
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
        n, w, r = max(1, self.problem.design.samples), torch.from_numpy(self.w), self.centred
        fit = Fit(
            (r @ r / n).unsqueeze(0),
            (r @ self.problem.target / n).unsqueeze(0),
            w.abs().sum().unsqueeze(0),
            w.square().sum().unsqueeze(0),
            self.pull.unsqueeze(0),
        )
        active = (self.pull - strength.l2 * w).unsqueeze(0)
        return float(duality_gaps(fit, active, [strength], n, self.problem.positive)[0])

    def descend(self, strength: Strength, threshold: float, limit: int) -> tuple[float, int]:
        """Sweep to the target. The gap, and the sweeps."""
        power = self.problem.power
        change, sweeps, gap = _FIRST, 0, self.gap(strength)
        for _ in range(_ROUNDS):
            if gap <= _TARGET * power or sweeps >= limit:
                break
            force = self.pull if self.problem.positive else self.pull.abs()
            index = np.flatnonzero((force.numpy() > threshold) | (self.w != 0))
            threshold = strength.l1  # from now on: violations
            sweeps += self.sweep(index, strength, change * power**0.5, limit - sweeps)
            self.refresh()
            before, gap = gap, self.gap(strength)
            if change < 1e-14 and gap >= before:
                break
            change *= _FALL
        return gap, sweeps


class _SparseState(_State):
    """Columns in CSC format, whose means are not subtracted."""

    def __init__(self, problem: Problem, start: Tensor | None) -> None:
        super().__init__(problem, start)
        assert isinstance(problem.design, Sparse)
        self.design = problem.design
        self.x = self.design.x
        self.rows, self.starts = (np.ascontiguousarray(a, dtype=np.int32) for a in (self.x.indices, self.x.indptr))
        self.squares = np.ascontiguousarray(self.design.squares, dtype=np.float64)
        self.refresh()

    def refresh(self) -> None:
        """Residual and pull, without what sweeps have rounded."""
        design, problem = self.design, self.problem
        root = design.root
        target = problem.target.numpy() if root is None else _unweighted(problem.target.numpy(), root)
        self.residual = np.ascontiguousarray(target - self.x @ self.w, dtype=np.float64)
        self.shift = 0.0 if design.mean is None else float(design.mean @ self.w)
        centred = torch.from_numpy(self.residual + self.shift)
        self.centred = centred if root is None else centred * torch.from_numpy(root)
        self.pull = design.correlations(self.centred.unsqueeze(0))[0]

    def sweep(self, index: Any, strength: Strength, least: float, limit: int) -> int:
        """Sweep over some columns until no prediction changes by more than `least`."""
        shift = ctypes.c_double(self.shift)
        return _function(self.x.dtype.name)(
            *(_pointer(a) for a in (self.x.data, self.rows, self.starts, self.design.weights, self.design.mean)),
            *(_pointer(a) for a in (self.squares, self.residual, self.w)),
            ctypes.byref(shift),
            self.design.samples,
            _pointer(np.ascontiguousarray(index, dtype=np.int64)),
            len(index),
            strength.l1,
            strength.l2,
            int(self.problem.positive),
            least,
            limit,
        )


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
        done = _function("dense")(
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


def _unweighted(target: Any, root: Any) -> Any:
    """What weighted targets were; those without weight don't matter."""
    return np.divide(target, root, out=np.zeros_like(target), where=root > 0)


def _pointer(array: Any) -> ctypes.c_void_p | None:
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


@functools.cache
def _function(kind: str) -> Any:
    """The sweeps over sparse columns of a dtype, or over dense ones."""
    text = Path(__file__).with_name("coordinate.c").read_text(encoding="utf-8")
    value = _TYPES.get(kind, "double")
    library = toolchain.library(f"coordinate-{value}", f"#define VALUE {value}\n{text}")
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    common: list[Any] = [integer, pointer, integer, real, real, ctypes.c_int, real, integer]
    function = library.torchreg_dense_sweeps if kind == "dense" else library.torchreg_sweeps
    function.argtypes = [*[pointer] * (4 if kind == "dense" else 9), *common]
    function.restype = integer
    return function

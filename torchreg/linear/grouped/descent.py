"""Coordinate descent over groups on a Gram matrix, compiled from C: near a solution soon, but never there."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchreg.kernels import toolchain
from torchreg.linear.grouped.blocks import Blocks
from torchreg.linear.lasso.problem import Strength

_INNER = 8  # sweeps over the groups that are not zero, for one over all
_POINTS = 6  # that an extrapolation takes
_LARGE = 1 << 18  # products of a sweep from which on it costs more than its part of an extrapolation
_RIDGE = 1e-12  # of the mean square of their differences, which may depend on one another


@functools.cache
def unavailable() -> str | None:
    """Why there are no compiled sweeps on this machine, or None. Builds them, once."""
    return toolchain.obstacle(_functions)


def sweep(
    gram: Tensor, moment: Tensor, blocks: Blocks, strength: Strength, w: Tensor, least: float, limit: int
) -> tuple[Tensor, int]:
    """Sweeps from w, of shape (targets, k), on the CPU, until no group's gradient moves by more than `least`.

    Each group takes a proximal gradient step with a bound on its own curvature: the exact minimiser for a group of one
    column. After every five sweeps, if these are large, they go on from where the last points lead to, if the objective
    is less there.

    Returns:
        The new coefficients, and the number of sweeps.

    Source: Qin, Scheinberg and Goldfarb, Efficient block-coordinate descent algorithms for the group lasso,
    Mathematical Programming Computation, 2013; Bertrand and Massias, Anderson acceleration of coordinate descent,
    AISTATS, 2021.
    """
    state, sweeps, since_all = _State(gram, moment, blocks, strength, w), 0, 0
    extrapolates = w.numel() * len(gram) >= _LARGE
    while sweeps < limit:
        sweeps += 1
        settled = not state.sweep(only_alive=since_all > 0) > least  # also where nothing is a number
        if settled and since_all == 0:
            break
        since_all = 0 if settled or since_all == _INNER else since_all + 1
        if extrapolates and not settled:
            state.extrapolate()
    return state.w + 0.0, sweeps


class _State:
    """Coefficients and the pull at all of them, which sweeps change in place."""

    def __init__(self, gram: Tensor, moment: Tensor, blocks: Blocks, strength: Strength, w: Tensor) -> None:
        gram = gram if gram.stride(-1) == 1 else gram.contiguous()
        self.w = w.clone(memory_format=torch.contiguous_format)
        self._moment, self._blocks, self._l2 = moment, blocks, strength.l2
        self._pull = torch.addmm(moment, self.w, gram, alpha=-1).contiguous()
        self._strengths = strength.l1 * blocks.weights
        counts = torch.bincount(blocks.labels, minlength=blocks.count)
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        member = torch.argsort(blocks.labels, stable=True)
        largest = int(counts.max()) if len(counts) else 0
        curvature, change = torch.empty_like(self._strengths), self.w.new_empty(len(w), largest)
        given, changed = (gram, starts, member, self._strengths), (self.w, self._pull, curvature, change)
        self._held = given, changed
        self._points: list[tuple[Tensor, Tensor]] = []
        self._problem = _Problem(
            *(len(gram), gram.stride(0), len(w), blocks.count),
            *(t.data_ptr() for t in given),
            strength.l2,
            *(t.data_ptr() for t in changed),
        )
        self._bounds, self._sweep = _functions()
        self._bounds(ctypes.byref(self._problem))

    def sweep(self, only_alive: bool) -> float:
        """A step of each group, or of those that are not zero. How far a group's gradient moves at most."""
        return self._sweep(ctypes.byref(self._problem), only_alive)

    def extrapolate(self) -> None:
        """Note the present point, and if these are enough, go to where they lead."""
        self._points.append((self.w.clone(), self._pull.clone()))
        if len(self._points) < _POINTS:
            return
        after = self._points[1:]
        moves = torch.stack([w.flatten() for w, _ in self._points]).diff(dim=0)
        inner = moves @ moves.T
        inner.diagonal().add_(_RIDGE * inner.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(inner)
        shares = torch.cholesky_solve(inner.new_ones(len(inner), 1), factor).flatten()
        shares = shares / shares.sum()
        w, pull = (torch.einsum("i,itk->tk", shares, torch.stack(list(t))) for t in zip(*after, strict=True))
        if not failed and self._value(w, pull) < self._value(self.w, self._pull):
            self.w.copy_(w)
            self._pull.copy_(pull)
            self._points = [(w, pull)]
        else:
            self._points = self._points[-1:]

    def _value(self, w: Tensor, pull: Tensor) -> float:
        """The objective; ½·tr(WGWᵀ) − tr(BWᵀ) is −½·tr(W(B + P)ᵀ) with the pull P = B − WG, which is affine in W."""
        smooth = 0.5 * (self._l2 * w.square().sum() - (w * (self._moment + pull)).sum())
        return float(smooth + self._blocks.norms(w) @ self._strengths)


class _Problem(ctypes.Structure):
    """The C text's, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("k", "stride", "targets", "groups")),
        *((name, ctypes.c_void_p) for name in ("gram", "starts", "member", "strength")),
        ("l2", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("w", "pull", "curvature", "change")),
    )


@functools.cache
def _functions() -> tuple[Any, Any]:
    """What bounds the groups' curvatures, and the sweep."""
    library = toolchain.library("block", Path(__file__).with_name("block.c").read_text(encoding="utf-8"))
    bounds, sweep = library.torchreg_block_bounds, library.torchreg_block_sweep
    bounds.argtypes, bounds.restype = [ctypes.c_void_p], None
    sweep.argtypes, sweep.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_double
    return bounds, sweep

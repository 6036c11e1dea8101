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


@functools.cache
def unavailable() -> str | None:
    """Why there are no compiled sweeps on this machine, or None. Builds them, once."""
    return toolchain.obstacle(_function)


def sweep(
    gram: Tensor, moment: Tensor, blocks: Blocks, strength: Strength, w: Tensor, least: float, limit: int
) -> tuple[Tensor, int]:
    """Sweeps from w, of shape (targets, k), on the CPU, until no group's gradient moves by more than `least`.

    Each group takes a proximal gradient step with a bound on its own curvature: the exact minimiser for a group of one
    column.

    Returns:
        The new coefficients, and the number of sweeps.

    Source: Qin, Scheinberg and Goldfarb, Efficient block-coordinate descent algorithms for the group lasso,
    Mathematical Programming Computation, 2013.
    """
    gram, w = gram if gram.stride(-1) == 1 else gram.contiguous(), w.clone(memory_format=torch.contiguous_format)
    pull = torch.addmm(moment, w, gram, alpha=-1).contiguous()
    counts = torch.bincount(blocks.labels, minlength=blocks.count)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    member = torch.argsort(blocks.labels, stable=True)
    strengths = strength.l1 * blocks.weights
    largest = int(counts.max()) if len(counts) else 0
    change, curvature = w.new_empty(len(w), largest), torch.empty_like(strengths)
    sweeps = _function()(
        len(gram),
        gram.stride(0),
        len(w),
        blocks.count,
        *(t.data_ptr() for t in (gram, starts, member, strengths)),
        strength.l2,
        *(t.data_ptr() for t in (w, pull, curvature, change)),
        least,
        limit,
    )
    return w + 0.0, int(sweeps)


@functools.cache
def _function() -> Any:
    text = Path(__file__).with_name("block.c").read_text(encoding="utf-8")
    function = toolchain.library("block", text).torchreg_block_sweeps
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    function.argtypes = [*[integer] * 4, *[pointer] * 4, real, *[pointer] * 4, real, integer]
    function.restype = integer
    return function

"""What the Triton kernels of groups share: a tile holds whole groups, one a row. Imported on first use only."""

from __future__ import annotations

import triton
import triton.language as tl

from torchreg.kernels.plan import COLUMNS
from torchreg.penalties import secular

DOWN64, UP64 = tl.constexpr(2.0**-600), tl.constexpr(2.0**600)
DOWN32, UP32 = tl.constexpr(2.0**-80), tl.constexpr(2.0**100)
EPS64, EPS32 = tl.constexpr(2.0**-52), tl.constexpr(2.0**-23)
NEAR64, NEAR32 = tl.constexpr(2.0**-29), tl.constexpr(2.0**-14.5)
ITERATIONS = tl.constexpr(secular.ITERATIONS)
RUN = tl.constexpr(COLUMNS.index("run"))


@triton.jit
def counted(zeros, new, revived, total, squares, old, final, inside):
    """What was counted in each row, and what there is in a tile of weights before and after the step."""
    is_zero = inside & (final == 0)
    was_zero = inside & (old == 0)
    zeros += tl.sum(is_zero.to(tl.int32), axis=1, keep_dims=True)
    new += tl.sum((is_zero & (old != 0)).to(tl.int32), axis=1, keep_dims=True)
    revived += tl.sum((was_zero & (final != 0)).to(tl.int32), axis=1, keep_dims=True)
    total += tl.sum(tl.where(inside, tl.abs(final), 0.0), axis=1, keep_dims=True)
    squares += tl.sum(tl.where(inside, final * final, 0.0), axis=1, keep_dims=True)
    return zeros, new, revived, total, squares


@triton.jit
def norms(y, COMPUTE: tl.constexpr):
    """‖y‖₂ of every row, as a column: scaled by a power of two where squares would leave the range of the type."""
    largest = tl.max(tl.abs(y), axis=1, keep_dims=True)
    if tl.float64 == COMPUTE:
        scale = tl.where(largest > 1e140, DOWN64, tl.where(largest < 1e-140, UP64, 1.0)).to(COMPUTE)
    else:
        scale = tl.where(largest > 1e15, DOWN32, tl.where(largest < 1e-15, UP32, 1.0)).to(COMPUTE)
    scaled = y * scale
    return tl.sqrt(tl.sum(scaled * scaled, axis=1, keep_dims=True)) / scale


@triton.jit
def left(norm, threshold, divisor):
    """What every weight of a group is multiplied by. NaN stays NaN, and an infinite group as it is."""
    ratio = tl.where(norm == float("inf"), 1.0, (norm - threshold) / norm)
    return tl.where(norm <= threshold, 0.0, ratio) / divisor


@triton.jit
def _between(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def left_apart(y, a, COMPUTE: tl.constexpr):
    """What every weight of a group is multiplied by in a diagonal metric: see `torchreg.penalties.secular`.

    Args:
        y: the weights, 0 where there are none.
        a: what the group's norm pulls them with, finite, and 1 where there are none.
        COMPUTE: their type.
    """
    norm = norms(y, COMPUTE)
    unit = tl.where((norm > 0) & (norm < float("inf")), norm, 1.0)
    u, b = tl.abs(y) / unit, a / unit
    t = tl.where(u == 0, 0.0, u / b)
    alive = tl.sum(t * t, axis=1, keep_dims=True) > 1
    eps = EPS64 if tl.float64 == COMPUTE else EPS32
    least = eps * eps
    jensen = 1.0 - tl.sum(tl.where(u == 0, 0.0, u * u * b), axis=1, keep_dims=True)
    low = _between(tl.maximum(jensen, tl.max(u - b, axis=1, keep_dims=True)), least, 1.0)
    root = tl.where(alive, low, 1.0)
    low, high = root, root * 0.0 + 1.0
    open_ = alive.to(tl.int32)
    iteration = 0
    while (iteration < ITERATIONS) & (tl.max(open_) > 0):
        inverse = 1.0 / (b + root)
        t = u * inverse
        s = tl.sum(t * t, axis=1, keep_dims=True)
        slope = tl.sum(t * t * inverse, axis=1, keep_dims=True)
        newton = root + s * (tl.sqrt(s) - 1.0) / tl.where(slope > 0, slope, 1.0)
        newton = _between(newton, least, 1.0)
        high = tl.where(s < 1, tl.minimum(high, root), high)
        low = tl.maximum(low, tl.minimum(newton, high))
        far = (newton > 1.25 * root) | (root > 1.25 * newton)
        near = tl.abs(s - 1.0) <= NEAR64 if tl.float64 == COMPUTE else tl.abs(s - 1.0) <= NEAR32
        next_ = tl.where(far & (high > 4.0 * low) & (near == 0), tl.sqrt(low * high), newton)
        root = tl.where(open_ != 0, next_, root)
        open_ = tl.where(near, 0, open_)
        iteration += 1
    rho = tl.where(norm != norm, norm, tl.where(alive, root, 0.0))
    whole = (b == 0) | (norm == float("inf"))
    return tl.where(whole, 1.0, rho / (rho + tl.where(whole, 1.0, b)))

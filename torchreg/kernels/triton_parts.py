"""What the Triton kernels of proximal steps share: columns of their tables, rounding, soft-thresholding, counting.

Imported on first use only: Triton comes with PyTorch's CUDA builds and is no dependency.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchreg.kernels.plan import COLUMNS, COUNTS

W = tl.constexpr(COLUMNS.index("w"))
G = tl.constexpr(COLUMNS.index("g"))
M = tl.constexpr(COLUMNS.index("m"))
V = tl.constexpr(COLUMNS.index("v"))
X = tl.constexpr(COLUMNS.index("x"))
SIZE = tl.constexpr(COLUMNS.index("size"))
L1S = tl.constexpr(COLUMNS.index("l1"))
L2S = tl.constexpr(COLUMNS.index("l2"))
SEED = tl.constexpr(COLUMNS.index("seed"))
GROUP = tl.constexpr(COLUMNS.index("group"))
FIRST = tl.constexpr(COLUMNS.index("first"))
STEP = tl.constexpr(COLUMNS.index("step"))

ZEROS = tl.constexpr(COUNTS.index("zeros"))
NEW = tl.constexpr(COUNTS.index("new"))
REVIVED = tl.constexpr(COUNTS.index("revived"))
SUM = tl.constexpr(COUNTS.index("l1"))
SQUARES = tl.constexpr(COUNTS.index("l2"))
ALL_COUNTS = tl.constexpr(len(COUNTS))


@triton.jit
def _hash(x):
    """Of uint32: see `torchreg.kernels.rounding`."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def rounded(values, offsets, seed, rounds, DTYPE: tl.constexpr):
    """Float32 to a half type: to nearest, or at random where ``rounds``. No −0.0."""
    nearest = values.to(DTYPE)
    back = nearest.to(tl.float32)
    magnitude = tl.abs(values)
    bits = nearest.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    largest = 0x7F80 if tl.bfloat16 == DTYPE else 0x7C00
    exact = (bits >= largest) | (back == values)
    bits = bits - (tl.abs(back) > magnitude).to(tl.int32)
    low = bits.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    high = (bits + 1).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    upper = (offsets >> 32).to(tl.uint32) ^ seed
    state = _hash(offsets.to(tl.uint32) ^ _hash(upper))
    uniform = (state >> 8).to(tl.float32) * (1.0 / 16777216.0)
    chosen = tl.where(uniform * (high - low) < magnitude - low, high, low)
    chosen = tl.where(values < 0, -chosen, chosen)
    chosen = tl.where(rounds != 0, chosen, back)
    return (tl.where(exact, back, chosen) + 0.0).to(DTYPE)


@triton.jit
def as_stored(values, offsets, seed, rounds, DTYPE: tl.constexpr):
    """In the type of the weights."""
    if tl.bfloat16 == DTYPE or tl.float16 == DTYPE:
        stored = rounded(values, offsets, seed, rounds, DTYPE)
    else:
        stored = values.to(DTYPE)
    return stored


@triton.jit
def at_most(x, largest):
    """NaN stays NaN, as it does not in Triton's minimum."""
    return tl.where(x > largest, largest, x)


@triton.jit
def thresholded(x, bound):
    """NaN stays NaN, be it in x or in the bound, and what is shrunk away is x − x = +0.0."""
    inside = tl.where(x < bound, x, bound)
    return x - tl.where(inside > -bound, inside, -bound)


@triton.jit
def write_counts(row, acts, zeros, new, revived, total, squares):
    """Into the piece's own row, without atomics; new and revived weights add up until they are taken."""
    tl.store(row + ZEROS, tl.sum(zeros).to(tl.float64), mask=acts)
    tl.store(row + NEW, tl.load(row + NEW) + tl.sum(new).to(tl.float64), mask=acts)
    tl.store(row + REVIVED, tl.load(row + REVIVED) + tl.sum(revived).to(tl.float64), mask=acts)
    tl.store(row + SUM, tl.sum(total).to(tl.float64), mask=acts)
    tl.store(row + SQUARES, tl.sum(squares).to(tl.float64), mask=acts)

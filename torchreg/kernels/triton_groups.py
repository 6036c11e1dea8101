"""What the Triton kernels of groups share: a tile holds whole groups, one a row. Imported on first use only."""

from __future__ import annotations

import triton
import triton.language as tl

from torchreg.kernels.plan import COLUMNS

DOWN64, UP64 = tl.constexpr(2.0**-600), tl.constexpr(2.0**600)
DOWN32, UP32 = tl.constexpr(2.0**-80), tl.constexpr(2.0**100)
RUN = tl.constexpr(COLUMNS.index("run"))


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

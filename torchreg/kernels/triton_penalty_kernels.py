"""The Triton kernels of penalties. Imported on first use only: Triton comes with PyTorch's CUDA builds.

Tables of addresses are int64 tensors, cast to pointers here; see `torchreg.kernels.penalty_table` for their rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchreg.kernels.penalty_table import ROWS, STRENGTHS

W = tl.constexpr(ROWS.index("w"))
G = tl.constexpr(ROWS.index("g"))
OUT = tl.constexpr(ROWS.index("out"))
SIZE = tl.constexpr(ROWS.index("size"))
L1 = tl.constexpr(STRENGTHS.index("l1"))
L2 = tl.constexpr(STRENGTHS.index("l2"))


@triton.jit
def _pointer(table, row, tensors, tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + row * tensors + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, offsets, end, COMPUTE: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + offsets, mask=offsets < end, other=0.0).to(COMPUTE)
    else:
        return tl.load(pointer + offsets).to(COMPUTE)


@triton.jit
def penalty_value(
    table,
    tensors,
    pieces,
    count,
    strengths,
    partials,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ l1·|w| + l2·w² of one piece of a tensor per program."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(pieces + program)
    start = tl.load(pieces + count + program)
    if ALIGNED:
        start = tl.multiple_of(start, PIECE)
    end = tl.minimum(tl.load(table + SIZE * tensors + tensor), start + PIECE)
    w_pointer = _pointer(table, W, tensors, tensor, DTYPE, ALIGNED)
    total = tl.zeros([BLOCK], dtype=COMPUTE)
    squares = tl.zeros([BLOCK], dtype=COMPUTE)
    for block in range(start, end, BLOCK):
        offsets = block + tl.arange(0, BLOCK)
        if block + BLOCK <= end:  # the same twice: without a mask, threads read 16 bytes at once
            w = _load(w_pointer, offsets, end, COMPUTE, MASKED=False)
        else:
            w = _load(w_pointer, offsets, end, COMPUTE, MASKED=True)
        total += tl.abs(w)
        squares += w * w
    l1 = tl.load(strengths + L1 * tensors + tensor)
    l2 = tl.load(strengths + L2 * tensors + tensor)
    absolute = tl.where(l1 != 0, l1 * tl.sum(total.to(tl.float64)), 0.0)  # 0 · inf is NaN
    squared = tl.where(l2 != 0, l2 * tl.sum(squares.to(tl.float64)), 0.0)
    tl.store(partials + program, absolute + squared)


@triton.jit
def _gradient_block(
    w_pointer,
    g_pointer,
    out_pointer,
    offsets,
    end,
    l1,
    doubled_l2,
    factor,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of the gradient."""
    w = _load(w_pointer, offsets, end, COMPUTE, MASKED)
    sign = tl.where(w > 0, l1, 0.0) - tl.where(w < 0, l1, 0.0)  # of NaN: 0
    both = (doubled_l2 != 0) | (l1 == 0)  # 0 · inf is NaN, which without l1 is what the reference gives
    slope = tl.where(both, sign + doubled_l2 * w, sign) * factor
    if ADDED:
        slope += _load(g_pointer, offsets, end, COMPUTE, MASKED)
    if MASKED:
        tl.store(out_pointer + offsets, slope.to(DTYPE), mask=offsets < end)
    else:
        tl.store(out_pointer + offsets, slope.to(DTYPE))


@triton.jit
def penalty_gradient(
    table,
    tensors,
    pieces,
    count,
    strengths,
    factor,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDED: tl.constexpr,
):
    """``factor·(l1·sign(w) + 2·l2·w)`` of one piece of a tensor per program, added to the gradient where ``ADDED``."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(pieces + program)
    start = tl.load(pieces + count + program)
    if ALIGNED:
        start = tl.multiple_of(start, PIECE)
    end = tl.minimum(tl.load(table + SIZE * tensors + tensor), start + PIECE)
    w_pointer = _pointer(table, W, tensors, tensor, DTYPE, ALIGNED)
    g_pointer = _pointer(table, G, tensors, tensor, DTYPE, ALIGNED)
    out_pointer = _pointer(table, OUT, tensors, tensor, DTYPE, ALIGNED)
    l1 = tl.load(strengths + L1 * tensors + tensor).to(COMPUTE)
    doubled_l2 = (2.0 * tl.load(strengths + L2 * tensors + tensor)).to(COMPUTE)
    scale = tl.load(factor).to(COMPUTE)
    for block in range(start, end, BLOCK):
        offsets = block + tl.arange(0, BLOCK)
        if block + BLOCK <= end:
            _gradient_block(
                w_pointer,
                g_pointer,
                out_pointer,
                offsets,
                end,
                l1,
                doubled_l2,
                scale,
                DTYPE=DTYPE,
                COMPUTE=COMPUTE,
                ADDED=ADDED,
                MASKED=False,
            )
        else:
            _gradient_block(
                w_pointer,
                g_pointer,
                out_pointer,
                offsets,
                end,
                l1,
                doubled_l2,
                scale,
                DTYPE=DTYPE,
                COMPUTE=COMPUTE,
                ADDED=ADDED,
                MASKED=True,
            )

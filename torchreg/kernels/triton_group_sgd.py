"""The proximal SGD step of penalties on groups, in Triton. Imported on first use only.

Tables of addresses are int64 tensors, cast to pointers here; see `torchreg.kernels.plan` for their rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchreg.kernels.problem import SGDStep
from torchreg.kernels.triton_groups import RUN, counted, left, norms
from torchreg.kernels.triton_parts import (
    ALL_COUNTS,
    FIRST,
    GROUP,
    SEED,
    G,
    M,
    W,
    as_stored,
    at_most,
    thresholded,
    write_counts,
)
from torchreg.kernels.triton_prox_sgd import (
    ALL_HYPERS,
    DECAY,
    GAIN,
    L1,
    L2,
    LR,
    MOMENTUM,
    NESTEROV,
    PROX_STEP,
    ROUNDS,
    SIGN,
)

NORM = tl.constexpr(SGDStep.HYPERS.index("norm"))
SIZED = tl.constexpr(SGDStep.HYPERS.index("sized"))


@triton.jit(do_not_specialize=["tensors", "count", "begin"])  # else other numbers of tensors would compile it anew
def prox_sgd_groups(
    table,
    tensors,
    pieces,
    count,
    begin,
    hypers,
    counts,
    grad_scale,
    found_inf,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    LARGEST: tl.constexpr,
    SCALED: tl.constexpr,
    GUARDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The proximal SGD step: one program per piece of a tensor, which is of whole groups, of at most COLS weights."""
    program = begin + tl.program_id(0).to(tl.int64)
    tensor = tl.load(pieces + program)
    start = tl.load(pieces + count + program)
    size = tl.load(pieces + 2 * count + program)
    run = tl.load(table + RUN * tensors + tensor)
    hyper = hypers + tl.load(table + GROUP * tensors + tensor) * ALL_HYPERS
    acts = program >= 0
    if GUARDED:
        acts = tl.load(found_inf) == 0

    m_address = tl.load(table + M * tensors + tensor)
    w_pointer = tl.load(table + W * tensors + tensor).to(tl.pointer_type(DTYPE))
    g_pointer = tl.load(table + G * tensors + tensor).to(tl.pointer_type(DTYPE))
    m_pointer = m_address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        start = tl.multiple_of(start, 8)
        run = tl.multiple_of(run, 8)
        w_pointer = tl.multiple_of(w_pointer, 16)
        g_pointer = tl.multiple_of(g_pointer, 16)
        m_pointer = tl.multiple_of(m_pointer, 16)
    seed = tl.load(table + SEED * tensors + tensor).to(tl.uint32)

    lr = tl.load(hyper + LR).to(COMPUTE)
    momentum = tl.load(hyper + MOMENTUM).to(COMPUTE)
    first = tl.load(table + FIRST * tensors + tensor) != 0
    gain = tl.where(first, 1.0, tl.load(hyper + GAIN)).to(COMPUTE)
    decay = tl.load(hyper + DECAY).to(COMPUTE)
    step = tl.load(hyper + PROX_STEP)
    threshold = at_most(step * tl.load(hyper + L1), LARGEST).to(COMPUTE)
    weight = tl.where(tl.load(hyper + SIZED) != 0, tl.sqrt(run.to(tl.float64)), 1.0)
    shrinkage = at_most(step * tl.load(hyper + NORM) * weight, LARGEST).to(COMPUTE)
    divisor = (1.0 + 2.0 * step * tl.load(hyper + L2)).to(COMPUTE)
    sign = tl.load(hyper + SIGN).to(COMPUTE)
    nesterov = tl.load(hyper + NESTEROV) != 0
    rounds = tl.load(hyper + ROUNDS)
    if SCALED:
        sign = sign / tl.load(grad_scale).to(COMPUTE)

    nothing = tl.zeros([ROWS, COLS], dtype=tl.int64)
    zeros = tl.zeros([ROWS, 1], dtype=tl.int32)
    new = tl.zeros([ROWS, 1], dtype=tl.int32)
    revived = tl.zeros([ROWS, 1], dtype=tl.int32)
    total = tl.zeros([ROWS, 1], dtype=COMPUTE)
    squares = tl.zeros([ROWS, 1], dtype=COMPUTE)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    end = tl.where(acts, start + size, start)
    for top in range(start, end, ROWS * run):
        offsets = top + row * run + column
        inside = (column < run) & (top + row * run < end)
        old = tl.load(w_pointer + offsets, mask=inside, other=1.0).to(COMPUTE)
        g = tl.load(g_pointer + offsets, mask=inside, other=0.0).to(COMPUTE)
        u = sign * g
        u = tl.where(decay != 0, u + decay * old, u)
        has_m = inside & (nothing + m_address != 0)
        buffer = tl.load(m_pointer + offsets, mask=has_m, other=0.0).to(COMPUTE)
        buffer = momentum * buffer + gain * u
        tl.store(m_pointer + offsets, buffer.to(DTYPE), mask=has_m)
        u = tl.where(has_m, tl.where(nesterov, u + momentum * buffer, buffer), u)
        y = tl.where(inside, thresholded(old - lr * u, threshold), 0.0)
        value = y * left(norms(y, COMPUTE), shrinkage, divisor) + 0.0
        stored = as_stored(value, offsets, seed, rounds, DTYPE)
        tl.store(w_pointer + offsets, stored, mask=inside)
        zeros, new, revived, total, squares = counted(
            zeros, new, revived, total, squares, old, stored.to(COMPUTE), inside
        )

    write_counts(counts + program * ALL_COUNTS, acts, zeros, new, revived, total, squares)

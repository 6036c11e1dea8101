"""The proximal AdamW step of penalties on groups, in Triton. Imported on first use only.

Tables of addresses are int64 tensors, cast to pointers here; see `torchreg.kernels.plan` for their rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchreg.kernels.problem import AdamStep
from torchreg.kernels.triton_groups import RUN, counted, left, left_apart, norms
from torchreg.kernels.triton_parts import (
    ALL_COUNTS,
    GROUP,
    SEED,
    STEP,
    G,
    M,
    V,
    W,
    X,
    as_stored,
    at_most,
    thresholded,
    write_counts,
)
from torchreg.kernels.triton_prox_adam import (
    ALL_HYPERS,
    BETA1,
    BETA2,
    DECAY,
    EPS,
    IDENTITY,
    KEEP,
    L1,
    L2,
    LR,
    PROX_STEP,
    ROUNDS,
    SIGN,
    power,
    square_root,
)

NORM = tl.constexpr(AdamStep.HYPERS.index("norm"))
SIZED = tl.constexpr(AdamStep.HYPERS.index("sized"))


@triton.jit(do_not_specialize=["tensors", "count", "begin"])  # else other numbers of tensors would compile it anew
def prox_adam_groups(
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
    """The proximal AdamW step: one program per piece of a tensor, which is of whole groups, of at most COLS weights."""
    program = begin + tl.program_id(0).to(tl.int64)
    tensor = tl.load(pieces + program)
    start = tl.load(pieces + count + program)
    size = tl.load(pieces + 2 * count + program)
    run = tl.load(table + RUN * tensors + tensor)
    hyper = hypers + tl.load(table + GROUP * tensors + tensor) * ALL_HYPERS
    acts = program >= 0
    if GUARDED:
        acts = tl.load(found_inf) == 0

    x_address = tl.load(table + X * tensors + tensor)
    w_pointer = tl.load(table + W * tensors + tensor).to(tl.pointer_type(DTYPE))
    g_pointer = tl.load(table + G * tensors + tensor).to(tl.pointer_type(DTYPE))
    m_pointer = tl.load(table + M * tensors + tensor).to(tl.pointer_type(DTYPE))
    v_pointer = tl.load(table + V * tensors + tensor).to(tl.pointer_type(DTYPE))
    x_pointer = x_address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        start = tl.multiple_of(start, 8)
        run = tl.multiple_of(run, 8)
        w_pointer = tl.multiple_of(w_pointer, 16)
        g_pointer = tl.multiple_of(g_pointer, 16)
        m_pointer = tl.multiple_of(m_pointer, 16)
        v_pointer = tl.multiple_of(v_pointer, 16)
        x_pointer = tl.multiple_of(x_pointer, 16)
    seed = tl.load(table + SEED * tensors + tensor).to(tl.uint32)

    steps = tl.load(table + STEP * tensors + tensor)
    beta1, beta2 = tl.load(hyper + BETA1), tl.load(hyper + BETA2)
    lr = (tl.load(hyper + LR) / (1.0 - power(beta1, steps))).to(COMPUTE)
    scale = (1.0 / square_root(1.0 - power(beta2, steps))).to(COMPUTE)
    grown1, grown2 = (1.0 - beta1).to(COMPUTE), (1.0 - beta2).to(COMPUTE)
    beta2 = beta2.to(COMPUTE)
    eps = tl.load(hyper + EPS).to(COMPUTE)
    decay = tl.load(hyper + DECAY).to(COMPUTE)
    keep = tl.load(hyper + KEEP).to(COMPUTE)
    step = tl.load(hyper + PROX_STEP)
    threshold = at_most(step * tl.load(hyper + L1), LARGEST).to(COMPUTE)
    doubled = at_most(2.0 * step * tl.load(hyper + L2), LARGEST).to(COMPUTE)
    weight = tl.where(tl.load(hyper + SIZED) != 0, tl.sqrt(run.to(tl.float64)), 1.0)
    pull = at_most(step * tl.load(hyper + NORM) * weight, LARGEST).to(COMPUTE)
    sign = tl.load(hyper + SIGN).to(COMPUTE)
    identity = tl.load(hyper + IDENTITY)
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
        m = tl.load(m_pointer + offsets, mask=inside, other=0.0).to(COMPUTE)
        v = tl.load(v_pointer + offsets, mask=inside, other=0.0).to(COMPUTE)
        u = sign * g
        u = tl.where(decay != 0, u + decay * old, u)
        m = m + grown1 * (u - m)  # as torch.lerp
        v = beta2 * v + grown2 * u * u
        tl.store(m_pointer + offsets, m.to(DTYPE), mask=inside)
        tl.store(v_pointer + offsets, v.to(DTYPE), mask=inside)
        has_x = inside & (nothing + x_address != 0)
        x = tl.load(x_pointer + offsets, mask=has_x, other=0.0).to(COMPUTE)
        x = tl.where((x > v) | (x != x), x, v)  # NaN wins, as in torch.maximum
        tl.store(x_pointer + offsets, x.to(DTYPE), mask=has_x)
        inverse = 1.0 / (square_root(tl.where(has_x, x, v)) * scale + eps)
        moved = keep * old - lr * (m * inverse)
        metric = tl.where(identity != 0, 1.0, inverse)
        bound = threshold * metric
        y = thresholded(moved, tl.where(bound > LARGEST, LARGEST, bound).to(COMPUTE))
        y = tl.where(inside, y / (1.0 + doubled * metric), 0.0)
        if identity != 0:
            value = y * left(norms(y, COMPUTE) * (1.0 + doubled), pull, 1.0) + 0.0
        else:
            a = pull * inverse / (1.0 + doubled * inverse)
            a = tl.where(inside, at_most(a, LARGEST), 1.0).to(COMPUTE)
            value = y * left_apart(y, a, COMPUTE) + 0.0
        stored = as_stored(value, offsets, seed, rounds, DTYPE)
        tl.store(w_pointer + offsets, stored, mask=inside)
        zeros, new, revived, total, squares = counted(
            zeros, new, revived, total, squares, old, stored.to(COMPUTE), inside
        )

    write_counts(counts + program * ALL_COUNTS, acts, zeros, new, revived, total, squares)

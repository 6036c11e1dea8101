"""The proximal SGD step in Triton. Imported on first use only.

Tables of addresses are int64 tensors, cast to pointers here; see `torchreg.kernels.plan` for their rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchreg.kernels.problem import SGDStep
from torchreg.kernels.triton_parts import (
    ALL_COUNTS,
    FIRST,
    GROUP,
    L1S,
    L2S,
    SEED,
    SIZE,
    G,
    M,
    W,
    as_stored,
    at_most,
    thresholded,
    write_counts,
)

LR = tl.constexpr(SGDStep.HYPERS.index("lr"))
MOMENTUM = tl.constexpr(SGDStep.HYPERS.index("momentum"))
GAIN = tl.constexpr(SGDStep.HYPERS.index("gain"))
DECAY = tl.constexpr(SGDStep.HYPERS.index("decay"))
PROX_STEP = tl.constexpr(SGDStep.HYPERS.index("prox_step"))
L1 = tl.constexpr(SGDStep.HYPERS.index("l1"))
L2 = tl.constexpr(SGDStep.HYPERS.index("l2"))
SIGN = tl.constexpr(SGDStep.HYPERS.index("sign"))
NESTEROV = tl.constexpr(SGDStep.HYPERS.index("nesterov"))
ROUNDS = tl.constexpr(SGDStep.HYPERS.index("rounds"))
ALL_HYPERS = tl.constexpr(len(SGDStep.HYPERS))


@triton.jit
def _update(
    w_pointer,
    g_pointer,
    m_pointer,
    l1_pointer,
    l2_pointer,
    m_address,
    l1_address,
    l2_address,
    offsets,
    inside,
    lr,
    momentum,
    gain,
    decay,
    threshold,
    divisor,
    sign,
    prox_step,
    nesterov,
    seed,
    rounds,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block: the weights before and after the step."""
    nothing = tl.zeros([BLOCK], dtype=tl.int64)
    has_m, has_l1, has_l2 = nothing + m_address != 0, nothing + l1_address != 0, nothing + l2_address != 0
    if MASKED:
        has_m, has_l1, has_l2 = has_m & inside, has_l1 & inside, has_l2 & inside
        old = tl.load(w_pointer + offsets, mask=inside, other=1.0).to(COMPUTE)
        g = tl.load(g_pointer + offsets, mask=inside, other=0.0).to(COMPUTE)
    else:
        old = tl.load(w_pointer + offsets).to(COMPUTE)
        g = tl.load(g_pointer + offsets).to(COMPUTE)
    u = sign * g
    u = tl.where(decay != 0, u + decay * old, u)
    buffer = tl.load(m_pointer + offsets, mask=has_m, other=0.0).to(COMPUTE)
    buffer = momentum * buffer + gain * u
    tl.store(m_pointer + offsets, buffer.to(DTYPE), mask=has_m)
    u = tl.where(has_m, tl.where(nesterov, u + momentum * buffer, buffer), u)
    moved = old - lr * u

    l1 = tl.load(l1_pointer + offsets, mask=has_l1, other=0.0)
    l2 = tl.load(l2_pointer + offsets, mask=has_l2, other=0.0)
    bound = tl.where(has_l1, prox_step * l1, threshold)
    value = thresholded(moved, bound)
    value = value / tl.where(has_l2, 1.0 + 2.0 * prox_step * l2, divisor) + 0.0
    stored = as_stored(value, offsets, seed, rounds, DTYPE)
    if MASKED:
        tl.store(w_pointer + offsets, stored, mask=inside)
    else:
        tl.store(w_pointer + offsets, stored)
    return old, stored.to(COMPUTE)


@triton.jit(do_not_specialize=["tensors", "count", "begin"])  # else other numbers of tensors would compile it anew
def prox_sgd(
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
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The proximal SGD step: one program per piece of a tensor."""
    program = begin + tl.program_id(0).to(tl.int64)
    tensor = tl.load(pieces + program)
    start = tl.load(pieces + count + program)
    size = tl.load(table + SIZE * tensors + tensor)
    hyper = hypers + tl.load(table + GROUP * tensors + tensor) * ALL_HYPERS
    acts = program >= 0
    if GUARDED:
        acts = tl.load(found_inf) == 0

    w_address = tl.load(table + W * tensors + tensor)
    g_address = tl.load(table + G * tensors + tensor)
    m_address = tl.load(table + M * tensors + tensor)
    l1_address = tl.load(table + L1S * tensors + tensor)
    l2_address = tl.load(table + L2S * tensors + tensor)
    if ALIGNED:
        start = tl.multiple_of(start, PIECE)
    w_pointer = w_address.to(tl.pointer_type(DTYPE))
    g_pointer = g_address.to(tl.pointer_type(DTYPE))
    m_pointer = m_address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        w_pointer = tl.multiple_of(w_pointer, 16)
        g_pointer = tl.multiple_of(g_pointer, 16)
        m_pointer = tl.multiple_of(m_pointer, 16)
    l1_pointer = tl.multiple_of(l1_address.to(tl.pointer_type(COMPUTE)), 16)  # the plan's own memory
    l2_pointer = tl.multiple_of(l2_address.to(tl.pointer_type(COMPUTE)), 16)
    seed = tl.load(table + SEED * tensors + tensor).to(tl.uint32)

    lr = tl.load(hyper + LR).to(COMPUTE)
    momentum = tl.load(hyper + MOMENTUM).to(COMPUTE)
    first = tl.load(table + FIRST * tensors + tensor) != 0
    gain = tl.where(first, 1.0, tl.load(hyper + GAIN)).to(COMPUTE)
    decay = tl.load(hyper + DECAY).to(COMPUTE)
    step = tl.load(hyper + PROX_STEP)
    threshold = at_most(step * tl.load(hyper + L1), LARGEST).to(COMPUTE)
    divisor = (1.0 + 2.0 * step * tl.load(hyper + L2)).to(COMPUTE)
    sign = tl.load(hyper + SIGN).to(COMPUTE)
    nesterov = tl.load(hyper + NESTEROV) != 0
    rounds = tl.load(hyper + ROUNDS)
    prox_step = step.to(COMPUTE)
    if SCALED:
        sign = sign / tl.load(grad_scale).to(COMPUTE)

    zeros = tl.zeros([BLOCK], dtype=tl.int32)
    new = tl.zeros([BLOCK], dtype=tl.int32)
    revived = tl.zeros([BLOCK], dtype=tl.int32)
    total = tl.zeros([BLOCK], dtype=COMPUTE)
    squares = tl.zeros([BLOCK], dtype=COMPUTE)
    end = tl.where(acts, tl.minimum(size, start + PIECE), start)
    for block in range(start, end, BLOCK):
        offsets = block + tl.arange(0, BLOCK)
        inside = offsets < end
        if block + BLOCK <= end:  # the same twice: without a mask, threads read 16 bytes at once
            old, final = _update(
                w_pointer,
                g_pointer,
                m_pointer,
                l1_pointer,
                l2_pointer,
                m_address,
                l1_address,
                l2_address,
                offsets,
                inside,
                lr,
                momentum,
                gain,
                decay,
                threshold,
                divisor,
                sign,
                prox_step,
                nesterov,
                seed,
                rounds,
                DTYPE=DTYPE,
                COMPUTE=COMPUTE,
                MASKED=False,
                BLOCK=BLOCK,
            )
        else:
            old, final = _update(
                w_pointer,
                g_pointer,
                m_pointer,
                l1_pointer,
                l2_pointer,
                m_address,
                l1_address,
                l2_address,
                offsets,
                inside,
                lr,
                momentum,
                gain,
                decay,
                threshold,
                divisor,
                sign,
                prox_step,
                nesterov,
                seed,
                rounds,
                DTYPE=DTYPE,
                COMPUTE=COMPUTE,
                MASKED=True,
                BLOCK=BLOCK,
            )
        is_zero = inside & (final == 0)
        was_zero = inside & (old == 0)
        zeros += is_zero.to(tl.int32)
        new += (is_zero & (old != 0)).to(tl.int32)
        revived += (was_zero & (final != 0)).to(tl.int32)
        total += tl.where(inside, tl.abs(final), 0.0)
        squares += tl.where(inside, final * final, 0.0)

    write_counts(counts + program * ALL_COUNTS, acts, zeros, new, revived, total, squares)

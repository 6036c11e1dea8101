"""The proximal AdamW step in Triton. Imported on first use only.

Tables of addresses are int64 tensors, cast to pointers here; see `torchreg.kernels.plan` for their rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchreg.kernels.problem import AdamStep
from torchreg.kernels.triton_parts import (
    ALL_COUNTS,
    GROUP,
    L1S,
    L2S,
    SEED,
    SIZE,
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

LR = tl.constexpr(AdamStep.HYPERS.index("lr"))
BETA1 = tl.constexpr(AdamStep.HYPERS.index("beta1"))
BETA2 = tl.constexpr(AdamStep.HYPERS.index("beta2"))
EPS = tl.constexpr(AdamStep.HYPERS.index("eps"))
DECAY = tl.constexpr(AdamStep.HYPERS.index("decay"))
KEEP = tl.constexpr(AdamStep.HYPERS.index("keep"))
PROX_STEP = tl.constexpr(AdamStep.HYPERS.index("prox_step"))
L1 = tl.constexpr(AdamStep.HYPERS.index("l1"))
L2 = tl.constexpr(AdamStep.HYPERS.index("l2"))
SIGN = tl.constexpr(AdamStep.HYPERS.index("sign"))
IDENTITY = tl.constexpr(AdamStep.HYPERS.index("identity"))
ROUNDS = tl.constexpr(AdamStep.HYPERS.index("rounds"))
ALL_HYPERS = tl.constexpr(len(AdamStep.HYPERS))


@triton.jit
def square_root(x):
    """To the last bit in both precisions."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _update(
    w_pointer,
    g_pointer,
    m_pointer,
    v_pointer,
    x_pointer,
    l1_pointer,
    l2_pointer,
    x_address,
    l1_address,
    l2_address,
    offsets,
    inside,
    lr,
    beta2,
    grown1,
    grown2,
    root,
    eps,
    decay,
    keep,
    prox_step,
    threshold,
    doubled,
    sign,
    identity,
    seed,
    rounds,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    LARGEST: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block: the weights before and after the step."""
    nothing = tl.zeros([BLOCK], dtype=tl.int64)
    has_x, has_l1, has_l2 = nothing + x_address != 0, nothing + l1_address != 0, nothing + l2_address != 0
    if MASKED:
        has_x, has_l1, has_l2 = has_x & inside, has_l1 & inside, has_l2 & inside
        old = tl.load(w_pointer + offsets, mask=inside, other=1.0).to(COMPUTE)
        g = tl.load(g_pointer + offsets, mask=inside, other=0.0).to(COMPUTE)
        m = tl.load(m_pointer + offsets, mask=inside, other=0.0).to(COMPUTE)
        v = tl.load(v_pointer + offsets, mask=inside, other=0.0).to(COMPUTE)
    else:
        old = tl.load(w_pointer + offsets).to(COMPUTE)
        g = tl.load(g_pointer + offsets).to(COMPUTE)
        m = tl.load(m_pointer + offsets).to(COMPUTE)
        v = tl.load(v_pointer + offsets).to(COMPUTE)
    u = sign * g
    u = tl.where(decay != 0, u + decay * old, u)
    m = m + grown1 * (u - m)  # as torch.lerp
    v = beta2 * v + grown2 * u * u
    if MASKED:
        tl.store(m_pointer + offsets, m.to(DTYPE), mask=inside)
        tl.store(v_pointer + offsets, v.to(DTYPE), mask=inside)
    else:
        tl.store(m_pointer + offsets, m.to(DTYPE))
        tl.store(v_pointer + offsets, v.to(DTYPE))
    x = tl.load(x_pointer + offsets, mask=has_x, other=0.0).to(COMPUTE)
    x = tl.where((x > v) | (x != x), x, v)  # NaN wins, as in torch.maximum
    tl.store(x_pointer + offsets, x.to(DTYPE), mask=has_x)
    v = tl.where(has_x, x, v)

    inverse = 1.0 / (square_root(v) * root + eps)
    moved = keep * old - lr * (m * inverse)
    metric = tl.where(identity != 0, 1.0, inverse)
    l1 = tl.load(l1_pointer + offsets, mask=has_l1, other=0.0)
    l2 = tl.load(l2_pointer + offsets, mask=has_l2, other=0.0)
    bound = tl.where(has_l1, prox_step * l1, threshold) * metric
    bound = tl.where(bound > LARGEST, LARGEST, bound).to(COMPUTE)
    value = thresholded(moved, bound)
    value = value / (1.0 + tl.where(has_l2, 2.0 * prox_step * l2, doubled) * metric) + 0.0
    stored = as_stored(value, offsets, seed, rounds, DTYPE)
    if MASKED:
        tl.store(w_pointer + offsets, stored, mask=inside)
    else:
        tl.store(w_pointer + offsets, stored)
    return old, stored.to(COMPUTE)


@triton.jit
def power(base, exponent):
    """``base^exponent`` in float64, for an exponent below 2^32."""
    result = base * 0.0 + 1.0
    for _ in range(32):
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit(do_not_specialize=["tensors", "count", "begin"])  # else other numbers of tensors would compile it anew
def prox_adam(
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
    """The proximal AdamW step: one program per piece of a tensor."""
    program = begin + tl.program_id(0).to(tl.int64)
    tensor = tl.load(pieces + program)
    start = tl.load(pieces + count + program)
    size = tl.load(table + SIZE * tensors + tensor)
    hyper = hypers + tl.load(table + GROUP * tensors + tensor) * ALL_HYPERS
    acts = program >= 0
    if GUARDED:
        acts = tl.load(found_inf) == 0

    x_address = tl.load(table + X * tensors + tensor)
    l1_address = tl.load(table + L1S * tensors + tensor)
    l2_address = tl.load(table + L2S * tensors + tensor)
    w_pointer = tl.load(table + W * tensors + tensor).to(tl.pointer_type(DTYPE))
    g_pointer = tl.load(table + G * tensors + tensor).to(tl.pointer_type(DTYPE))
    m_pointer = tl.load(table + M * tensors + tensor).to(tl.pointer_type(DTYPE))
    v_pointer = tl.load(table + V * tensors + tensor).to(tl.pointer_type(DTYPE))
    x_pointer = x_address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        start = tl.multiple_of(start, PIECE)
        w_pointer = tl.multiple_of(w_pointer, 16)
        g_pointer = tl.multiple_of(g_pointer, 16)
        m_pointer = tl.multiple_of(m_pointer, 16)
        v_pointer = tl.multiple_of(v_pointer, 16)
        x_pointer = tl.multiple_of(x_pointer, 16)
    l1_pointer = tl.multiple_of(l1_address.to(tl.pointer_type(COMPUTE)), 16)  # the plan's own memory
    l2_pointer = tl.multiple_of(l2_address.to(tl.pointer_type(COMPUTE)), 16)
    seed = tl.load(table + SEED * tensors + tensor).to(tl.uint32)

    steps = tl.load(table + STEP * tensors + tensor)
    beta1, beta2 = tl.load(hyper + BETA1), tl.load(hyper + BETA2)
    lr = (tl.load(hyper + LR) / (1.0 - power(beta1, steps))).to(COMPUTE)
    root = (1.0 / square_root(1.0 - power(beta2, steps))).to(COMPUTE)
    grown1, grown2 = (1.0 - beta1).to(COMPUTE), (1.0 - beta2).to(COMPUTE)
    beta2 = beta2.to(COMPUTE)
    eps = tl.load(hyper + EPS).to(COMPUTE)
    decay = tl.load(hyper + DECAY).to(COMPUTE)
    keep = tl.load(hyper + KEEP).to(COMPUTE)
    step = tl.load(hyper + PROX_STEP)
    prox_step = at_most(step, LARGEST).to(COMPUTE)
    threshold = at_most(step * tl.load(hyper + L1), LARGEST).to(COMPUTE)
    doubled = at_most(2.0 * step * tl.load(hyper + L2), LARGEST).to(COMPUTE)
    sign = tl.load(hyper + SIGN).to(COMPUTE)
    identity = tl.load(hyper + IDENTITY)
    rounds = tl.load(hyper + ROUNDS)
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
                v_pointer,
                x_pointer,
                l1_pointer,
                l2_pointer,
                x_address,
                l1_address,
                l2_address,
                offsets,
                inside,
                lr,
                beta2,
                grown1,
                grown2,
                root,
                eps,
                decay,
                keep,
                prox_step,
                threshold,
                doubled,
                sign,
                identity,
                seed,
                rounds,
                DTYPE=DTYPE,
                COMPUTE=COMPUTE,
                LARGEST=LARGEST,
                MASKED=False,
                BLOCK=BLOCK,
            )
        else:
            old, final = _update(
                w_pointer,
                g_pointer,
                m_pointer,
                v_pointer,
                x_pointer,
                l1_pointer,
                l2_pointer,
                x_address,
                l1_address,
                l2_address,
                offsets,
                inside,
                lr,
                beta2,
                grown1,
                grown2,
                root,
                eps,
                decay,
                keep,
                prox_step,
                threshold,
                doubled,
                sign,
                identity,
                seed,
                rounds,
                DTYPE=DTYPE,
                COMPUTE=COMPUTE,
                LARGEST=LARGEST,
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

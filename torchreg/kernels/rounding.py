"""Stochastic rounding from float32 to the half types, reproducible from a seed and the element's offset."""

from __future__ import annotations

import torch
from torch import Tensor

from torchreg.penalties.tiles import is_dense

_MASK = 0xFFFFFFFF


def store(target: Tensor, values: Tensor, seed: int | Tensor | None) -> None:
    """Write float32 ``values`` into a half-precision ``target``: rounded to nearest without a seed. No −0.0."""
    if seed is None:
        target.copy_(values).add_(0)
    else:
        stochastic_round_(target, values, seed)


def stochastic_round_(target: Tensor, values: Tensor, seed: int | Tensor) -> None:
    """Write float32 ``values`` into a float16 or bfloat16 ``target``, rounding up or down at random.

    The expectation is the exact value, so that changes below half an ulp act on average. What the target's type
    holds exactly is written exactly, zeros included. NaN and what rounds to infinity are as in nearest rounding.

    The random number of an element is a hash of ``seed`` and its offset in memory (in index order where the
    tensor is not dense), so that replicas which hold the same values round them the same way.
    """
    nearest = values.to(target.dtype)
    magnitude = values.abs()
    bits = nearest.abs().view(torch.int16).to(torch.int32)
    bits = bits - (nearest.abs().float() > magnitude).to(torch.int32)  # towards zero
    low = bits.to(torch.int16).view(target.dtype).float()
    high = (bits + 1).to(torch.int16).view(target.dtype).float()
    fraction = (magnitude - low) / (high - low)
    up = _uniform(target, seed) < fraction
    rounded = torch.copysign(torch.where(up, high, low), values)
    exact = ~torch.isfinite(nearest) | (nearest.float() == values)
    target.copy_(torch.where(exact, nearest.float(), rounded) + 0)  # no −0.0


def _uniform(target: Tensor, seed: int | Tensor) -> Tensor:
    """One number in [0, 1) per element: 24 bits of a hash of (seed, offset)."""
    offsets = torch.arange(target.numel(), dtype=torch.int64, device=target.device)
    offsets = offsets.as_strided(target.shape, target.stride()) if is_dense(target) else offsets.view(target.shape)
    if isinstance(seed, Tensor):
        seed = seed.to(target.device)
    state = _hash((offsets & _MASK) ^ _hash((offsets >> 32) ^ (seed & _MASK)))
    return (state >> 8).float() * 2.0**-24


def _hash(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) whose output bits look independent.

    Source: Wellons, Prospecting for hash functions, 2018 (the constants of "lowbias32", public domain).
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)

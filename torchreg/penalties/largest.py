"""Which of many numbers are the largest, of equal ones the first."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MANY, _SAMPLE = 1 << 16, 1 << 12
_FEW = 8
"""Numbers up to which comparing each with each is faster than sorting them."""


def largest(scores: Tensor, k: int) -> Tensor:
    """A mask of the k largest of a flat tensor, the first of equal ones; NaN counts as infinite."""
    n = scores.numel()
    if k in (0, n):
        return torch.full_like(scores, k != 0, dtype=torch.bool)
    scores = torch.where(torch.isnan(scores), math.inf, scores)
    readable = scores.device.type == "cpu" and not torch.compiler.is_compiling()
    cutoff = _estimated_cutoff(scores, k) if readable and n >= _MANY else _cutoff(scores, k)
    above, level = scores > cutoff, scores == cutoff
    free = k - torch.count_nonzero(above)
    if readable and torch.count_nonzero(level) == free:
        return above | level
    return above | (level & (level.cumsum(0, dtype=torch.int64) <= free))


def largest_along(scores: Tensor, dim: int, n: int) -> Tensor:
    """A mask of the n largest along a dimension, the first of equal ones; there are no NaNs."""
    if scores.shape[dim] > _FEW:
        order = scores.argsort(dim=dim, descending=True, stable=True)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(dim, order.narrow(dim, 0, n), True)
    places = scores.unbind(dim)
    larger = [torch.zeros_like(place, dtype=torch.uint8) for place in places]  # how many go before each
    for i in range(len(places)):
        for j in range(i):
            before = places[j] >= places[i]
            larger[i] += before
            larger[j] += ~before
    return torch.stack(larger, dim) < n


def _cutoff(scores: Tensor, k: int) -> Tensor:
    """The k-th largest, by the shorter of both ends."""
    n = scores.numel()
    if 2 * k <= n:
        return torch.topk(scores, k, sorted=False).values.amin()
    return torch.topk(scores, n - k + 1, largest=False, sorted=False).values.amax()


def _estimated_cutoff(scores: Tensor, k: int) -> Tensor:
    """The k-th largest, looked for where a sample says that it is: selecting among all is slow on a CPU."""
    n = scores.numel()
    sample = scores[:: n // _SAMPLE].sort(descending=True).values
    rank, margin = k * len(sample) // n, len(sample) // 16
    high = sample[rank - margin] if rank >= margin else math.inf
    low = sample[rank + margin] if rank + margin < len(sample) else -math.inf
    near = scores[(scores >= low) & (scores <= high)]
    among = k - int(torch.count_nonzero(scores > high))
    return _cutoff(near, among) if 1 <= among <= near.numel() else _cutoff(scores, k)

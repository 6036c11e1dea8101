"""Samples of a weight: which positions, and what is there."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def taken(w: Tensor, index: Tensor | None) -> Tensor:
    """The elements at flat positions, or all of them, as a vector."""
    if index is None:
        return w.flatten()
    return w.view(-1).index_select(0, index) if w.is_contiguous() else torch.take(w, index)


def spread(size: int, count: int, device: torch.device) -> Tensor:
    """``count`` different positions below ``size``, one in each of as many equal parts, spread by the golden ratio.

    So they are spread evenly over rows as over columns.
    """
    i = torch.arange(count + 1, device=device)
    edges = i * size // count
    jitter = (i[:-1].double() * ((math.sqrt(5) - 1) / 2)) % 1
    return edges[:-1] + (jitter * edges.diff()).long()

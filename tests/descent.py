"""Descents that end where the weights no longer move."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

EVERY = 25
"""Steps between two looks: momentum may hold a weight still for a few."""


def descend(step: Callable[[], object], params: Iterable[Tensor], most: int, still: float = 1e-14) -> None:
    """Take ``most`` steps at most, fewer where the last 25 have moved no weight by ``still``."""
    params = list(params)
    before = [p.detach().clone() for p in params]
    for i in range(1, most + 1):
        step()
        if i % EVERY == 0:
            if all(((p.detach() - b).abs() < still).all() for p, b in zip(params, before, strict=True)):
                return
            before = [p.detach().clone() for p in params]

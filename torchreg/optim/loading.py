"""Checkpoints are loaded wholly or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def all_or_nothing(optimizer: Any) -> Iterator[None]:
    """Leave an optimizer as it was if the body raises, and say so in one line: a state dict can hold anything.

    Raises:
        ValueError: for errors of torch's own.
    """
    groups, state, defaults = optimizer.param_groups, optimizer.state, dict(optimizer.defaults)
    kept = [dict(group) for group in groups], {p: dict(entries) for p, entries in state.items()}
    scales = [group.get("strength_scale") for group in groups]
    values = [scale.detach().clone() if isinstance(scale, Tensor) else None for scale in scales]
    try:
        yield
    except Exception as error:
        for group, before in zip(groups, kept[0], strict=True):
            group.clear()
            group.update(before)
        state.clear()
        state.update(kept[1])
        optimizer.param_groups, optimizer.state, optimizer.defaults = groups, state, defaults
        with torch.no_grad():
            for scale, value in zip(scales, values, strict=True):
                if isinstance(scale, Tensor) and value is not None:
                    scale.copy_(value)
        if type(error) in (ValueError, TypeError, RuntimeError) and "\n" not in str(error):
            raise
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"The state dict can't be loaded ({type(error).__name__}: {words}).") from None

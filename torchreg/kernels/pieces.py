"""How tensors are cut into pieces: one program of a GPU, or a share of a thread, works on each."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


@functools.lru_cache(maxsize=32)
def cut(sizes: tuple[int, ...], piece_size: int) -> Any:
    """The tensor and the first element of every piece of at most ``piece_size`` elements: int64, two rows."""
    per_tensor = -(-np.array(sizes, dtype=np.int64) // piece_size)
    owner = np.repeat(np.arange(len(sizes)), per_tensor)
    position = np.arange(len(owner)) - np.repeat(np.cumsum(per_tensor) - per_tensor, per_tensor)
    pieces = np.stack([owner, position * piece_size]).astype(np.int64)
    pieces.setflags(write=False)
    return pieces

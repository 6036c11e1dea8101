"""How tensors are cut into pieces: one program of a GPU, or a share of a thread, works on each."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


@functools.lru_cache(maxsize=32)
def cut(sizes: tuple[int, ...], piece_size: int, runs: tuple[int, ...] = ()) -> Any:
    """The tensor, the first element and the number of elements of every piece: int64, three rows.

    Pieces have at most ``piece_size`` elements. Where ``runs`` has a number for their tensor that is not 0, they are of
    whole runs of so many neighbours, and of one run at least.
    """
    run = np.maximum(np.array(runs or [1] * len(sizes), dtype=np.int64), 1)
    sizes_array, most = np.array(sizes, dtype=np.int64), np.maximum(piece_size // run, 1) * run
    per_tensor = -(-sizes_array // most)
    owner = np.repeat(np.arange(len(sizes)), per_tensor)
    position = np.arange(len(owner)) - np.repeat(np.cumsum(per_tensor) - per_tensor, per_tensor)
    start = position * most[owner]
    pieces = np.stack([owner, start, np.minimum(sizes_array[owner] - start, most[owner])]).astype(np.int64)
    pieces.setflags(write=False)
    return pieces

"""How tensors are cut into pieces: one program of a GPU, or a share of a thread, works on each."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

LONGEST = 1 << 14
"""Neighbours in a run that a program of a GPU holds in its registers, at most."""


@functools.lru_cache(maxsize=32)
def cut(sizes: tuple[int, ...], piece_size: int, runs: tuple[int, ...] = ()) -> Any:
    """The tensor, the first element and the number of elements of every piece: int64, three rows.

    Pieces have at most ``piece_size`` elements. Where ``runs`` has a number for their tensor that is not 0, they are of
    whole runs of so many neighbours, and of one run at least. They are in the order of `widths`.
    """
    run = np.maximum(np.array(runs or [1] * len(sizes), dtype=np.int64), 1)
    sizes_array, most = np.array(sizes, dtype=np.int64), np.maximum(piece_size // run, 1) * run
    per_tensor = -(-sizes_array // most)
    owner = np.repeat(np.arange(len(sizes)), per_tensor)
    position = np.arange(len(owner)) - np.repeat(np.cumsum(per_tensor) - per_tensor, per_tensor)
    start = position * most[owner]
    pieces = np.stack([owner, start, np.minimum(sizes_array[owner] - start, most[owner])]).astype(np.int64)
    if any(runs):
        pieces = np.ascontiguousarray(pieces[:, np.argsort(widths(runs)[owner], kind="stable")])
    pieces.setflags(write=False)
    return pieces


def widths(runs: Any) -> Any:
    """The power of two that every run fits in, 16 at least: what one program's tile is wide. 0 where there are none."""
    runs = np.array(runs, dtype=np.int64)
    fitting = 1 << np.maximum(np.ceil(np.log2(np.maximum(runs, 1))), 4).astype(np.int64)
    return np.where(runs == 0, 0, fitting)

"""Compiled kernels on several threads: the pieces of a table are shared out by their elements."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

_SMALLEST = 1 << 18  # elements: below, starting threads costs more than they save


def run(function: Any, argument: Any, pieces: Any) -> None:
    """Call ``function(argument, from, to)`` for all pieces, on as many threads as torch uses where that pays.

    The kernel runs without the interpreter's lock.

    Args:
        function: a compiled function.
        argument: its first argument.
        pieces: the tensor, the first element and the number of elements of every piece, three rows.
    """
    cuts = _cuts(pieces)
    calls = [(argument, ctypes.c_int64(a), ctypes.c_int64(b)) for a, b in itertools.pairwise(cuts)]
    waiting = [_pool(os.getpid(), len(calls)).submit(function, *call) for call in calls[1:]]
    function(*calls[0])
    for future in waiting:
        future.result()


def _cuts(pieces: Any) -> list[int]:
    """Where the pieces are divided among threads."""
    count, threads = pieces.shape[1], torch.get_num_threads()
    if threads == 1 or not count:
        return [0, count]
    ends = np.cumsum(pieces[2])
    if ends[-1] < _SMALLEST:
        return [0, count]
    shares = np.linspace(0, ends[-1], threads + 1)[1:-1]
    return sorted({0, *(int(cut) for cut in np.searchsorted(ends, shares)), count})


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="torchreg")

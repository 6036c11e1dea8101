"""Small linear algebra on one thread: a second one made a Cholesky step of 200 columns up to ten times slower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_LARGE = 1024  # columns from which on a factorisation gains by more threads


@contextlib.contextmanager
def threads_for(columns: int) -> Iterator[None]:
    """Within the block torch uses one thread on the CPU if there are few columns; afterwards as many as before."""
    before = torch.get_num_threads()
    if columns >= _LARGE or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Huge pages: rows anywhere in a large table take long to be found among many small ones."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch
from torch import Tensor

_HUGE = 1 << 21
"""Bytes of a huge page. Where they are larger, or there are none, the advice is refused or of no use, and no harm."""
_MADV_HUGEPAGE = 14


def advised(t: Tensor) -> Tensor:
    """The tensor itself, which nothing was written to yet: Linux is advised to give it huge pages."""
    if type(t) is not Tensor or t.nbytes < _HUGE or t.device.type != "cpu" or sys.platform != "linux":
        return t
    start = -(-t.data_ptr() // _HUGE) * _HUGE
    end = (t.data_ptr() + t.nbytes) // _HUGE * _HUGE
    if end > start:
        _madvise()(start, end - start, _MADV_HUGEPAGE)
    return t


def zeros_like(t: Tensor) -> Tensor:
    """Zeros of a tensor's shape, dtype, device and layout in memory."""
    return advised(torch.empty_like(t)).zero_()


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function

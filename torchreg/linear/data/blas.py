"""What torch's own products of matrices are worth on this machine."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")


@functools.cache
def is_slow() -> bool:
    """Whether torch multiplies by MKL on another maker's processor, where that has older and narrower kernels.

    On an AMD processor of 2024 it takes twice the time of our own in C, and for a few rows three times.
    """
    return torch.backends.mkl.is_available() and "AuthenticAMD" in _processor()


def _processor() -> str:
    if _CPU_INFO.is_file():
        with _CPU_INFO.open(encoding="utf-8", errors="replace") as lines:
            return next((line for line in lines if line.startswith("vendor_id")), "")
    return platform.processor()

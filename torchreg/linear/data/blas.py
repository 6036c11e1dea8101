"""What torch's own products of matrices are worth on this machine."""

from __future__ import annotations

import functools

import torch

from torchreg.kernels import toolchain


@functools.cache
def is_slow() -> bool:
    """Whether torch multiplies by MKL on another maker's processor, where that has older and narrower kernels.

    On an AMD processor of 2024 it takes twice the time of our own in C, and for a few rows three times.
    """
    return torch.backends.mkl.is_available() and toolchain.is_amd()

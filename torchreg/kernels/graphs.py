"""Captured CUDA graphs: what is done while one is recorded is not done then, but at every replay."""

from __future__ import annotations

import torch


def is_captured() -> bool:
    """Whether what happens now is captured in a torch.cuda.CUDAGraph, whose replays would repeat the host's numbers."""
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    return torch.cuda.is_current_stream_capturing()

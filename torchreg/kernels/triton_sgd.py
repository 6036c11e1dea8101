"""The proximal SGD step on a GPU: one Triton launch over all tensors of a dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from torchreg.kernels.plan import Plan

PIECE_SIZE = 1 << 13
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Why there is no Triton kernel here, or None."""
    return "not built yet"


def run(plan: Plan, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
    """One step of every tensor of the plan."""
    raise NotImplementedError

"""Which implementation a step takes on a device, and why."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchreg.kernels import native, triton_sgd
from torchreg.kernels.problem import SGDStep
from torchreg.penalties import Penalty
from torchreg.penalties.separable import _Shrinkage

SMALLEST = 1 << 16
"""Weights on the CPU from which the compiled kernel is chosen unasked: below, building it does not pay."""


def unavailable(device: torch.device) -> str | None:
    """Why a device has no fused step, or None. On the CPU this builds the kernel, where it can be built."""
    if device.type == "cpu":
        return native.unavailable()
    if device.type == "cuda":
        return triton_sgd.unavailable()
    return f"there is none for {device.type}, only for cpu and cuda"


def obstacle(p: Tensor, penalty: Penalty | None) -> str | None:
    """Why this parameter can't take part in a fused step, or None; the device's own reason is `unavailable`."""
    dtypes = native.DTYPES if p.device.type == "cpu" else triton_sgd.DTYPES
    if type(p) not in (Tensor, nn.Parameter) or type(p.data) is not Tensor:
        return f"its type is {type(p.data).__name__}, not a plain tensor"
    if p.is_neg():
        return "it is a view that is negated when it is read"
    if p.layout != torch.strided:
        return f"its layout is {p.layout}"
    if p.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"its dtype is {p.dtype}; on {p.device.type} there is a fused step for {names}"
    if penalty is not None and not isinstance(penalty, _Shrinkage):
        return f"the penalty {penalty.type_name} has no fused form"
    return None


def fused_positions(parameters: list[Tensor], step: SGDStep, wish: bool | None, foreach: bool | None) -> list[int]:
    """Which parameters of a group a fused step could take.

    Raises:
        RuntimeError: if one was asked for and can't be had.
    """
    if wish is False or (wish is None and foreach is not None) or step.differentiable:
        return []
    positions = []
    for i, p in enumerate(parameters):
        reason = obstacle(p, step.penalty)
        if reason is None:
            positions.append(i)
        elif wish:
            raise RuntimeError(f"`fused=True` can't be had for a parameter of shape {tuple(p.shape)}: {reason}.")
    return positions


def pays(parameters: list[Tensor]) -> bool:
    """Whether a fused step of these is chosen unasked: on a GPU always, on the CPU for many weights."""
    on_cpu = sum(p.numel() for p in parameters if p.device.type == "cpu")
    return on_cpu >= SMALLEST or on_cpu == 0

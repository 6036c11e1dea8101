"""Learning rates and strength scales: floats, or tensors that the host may not always read."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreg.optim.groups import checked_scale
from torchreg.penalties.base import host_scalar


def scalar(value: float | Tensor) -> float | Tensor:
    """A float, or a 0-d tensor where reading it would stall a device."""
    return host_scalar(value.reshape(())) if isinstance(value, Tensor) else value


def product(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    """Their product, also where they are tensors of two devices: on that of the first."""
    return a * (b.to(a.device) if isinstance(a, Tensor) and isinstance(b, Tensor) else b)


def number(group: Mapping[str, Any], key: str) -> float | Tensor:
    """A hyperparameter as a float, or as a 0-d tensor where the host may not read it."""
    value = group[key]
    if isinstance(value, Tensor) and group["capturable"]:
        return value.reshape(())
    if isinstance(value, (bool, np.number)):  # comparisons with numpy's give what tensors can't compute with
        return float(value)
    return scalar(value)


def read(lr: float | Tensor, group: Mapping[str, Any]) -> float | Tensor:
    """The learning rate as torch's optimizers use it: a number, read from the device unless capturable."""
    if not isinstance(lr, Tensor) or group["capturable"] or lr.requires_grad or torch.compiler.is_compiling():
        return lr
    return lr.item()


def scaled_step(group: Mapping[str, Any], gain: float) -> float | Tensor:
    """lr·gain·strength_scale, checked where the host knows it."""
    if not isinstance(group["lr"], (numbers.Real, Tensor)):
        raise TypeError(f"Expected `lr` to be a number, got {group['lr']!r}.")
    if type(group["strength_scale"]) is not float:
        checked_scale(group["strength_scale"])
    lr, scale = number(group, "lr"), number(group, "strength_scale")
    step = product(lr * gain, scale)
    if not isinstance(step, Tensor) and not (step >= 0 and math.isfinite(step)):
        raise ValueError(
            "Expected `lr` and `strength_scale` to be non-negative and finite beside a penalty, "
            f"got {group['lr']} and {group['strength_scale']}."
        )
    return step


def rounding_seed(step: int | Tensor, index: int) -> int | Tensor:
    """A number that differs between steps and between parameters, and agrees between replicas."""
    return step * 0x9E3779B1 + index * 0x85EBCA77

"""Where a sample of the weights will be between the descent and the proximal operator, before the step is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchreg.kernels.problem import Update
from torchreg.penalties.base import Step, arithmetic


def previewed(
    update: Update, tensors: Any, step: Any, positions: Sequence[Tensor | None], grad_scale: Tensor | None = None
) -> tuple[list[Tensor], list[Step]]:
    """The weights at ``positions`` (flat indices, None for all) after the descent, as vectors, and their steps τ.

    ``step`` holds τ without the strength scale. A copy of what the descent reads at those positions is moved by the
    specification of the step, half precision in float32; nothing else is changed or waited for.
    """
    buffers = list(tensors.buffers().values())
    copied: dict[str, list[Any]] = {}
    for entry in dataclasses.fields(tensors):
        values = getattr(tensors, entry.name)
        if values and (entry.name in ("params", "grads") or any(values is buffer for buffer in buffers)):
            copied[entry.name] = [_taken(value, at) for value, at in zip(values, positions, strict=True)]
        else:
            copied[entry.name] = [v.clone() if isinstance(v, Tensor) else v for v in values]
    sample = type(tensors)(**copied)
    if grad_scale is not None:
        sample.grads = [grad / grad_scale.to(grad.device) for grad in sample.grads]
    alone: dict[str, Any] = {"penalty": None, "differentiable": False}
    if any(count.device.type != "cpu" for count in copied.get("state_steps", ())):
        alone["capturable"] = True  # else torch reads the counters
    descent = dataclasses.replace(step, **alone)
    update.eager(sample, descent, False)
    return sample.params, descent.prox_steps(sample)


def _taken(value: Tensor, at: Tensor | None) -> Tensor:
    flat = value.detach()
    if at is None:
        taken = flat.flatten().clone()
    else:
        taken = flat.view(-1).index_select(0, at) if flat.is_contiguous() else torch.take(flat, at)
    return arithmetic(taken)

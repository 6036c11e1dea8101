"""Many small tensors from a device to the host in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, contiguous. All tensors of one device travel as one buffer: one wait, not one each."""
    fetched: list[Tensor] = [torch.empty(0)] * len(tensors)
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(i)
    for device, indices in by_device.items():
        flat = [tensors[i].detach().contiguous().view(-1) for i in indices]
        if device.type == "cpu":
            parts = flat
        else:
            # The widest type first keeps every part aligned to its own element size.
            order = sorted(range(len(flat)), key=lambda k: -flat[k].element_size())
            packed = torch.cat([flat[k].view(torch.uint8) for k in order]).cpu()
            pieces = packed.split([flat[k].numel() * flat[k].element_size() for k in order])
            by_order = {k: piece.view(flat[k].dtype) for k, piece in zip(order, pieces, strict=True)}
            parts = [by_order[k] for k in range(len(flat))]
        for i, part in zip(indices, parts, strict=True):
            fetched[i] = part.view(tensors[i].shape)
    return fetched

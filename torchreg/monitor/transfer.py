"""Many small tensors from a device to the host in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, contiguous. All tensors of one device travel as one buffer: one wait, not one each."""
    fetched: dict[int, Tensor] = {}
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(i)
    for device, indices in by_device.items():
        here = [tensors[i].detach() for i in indices]
        there = here if device.type == "cpu" else unpacked(packed(here).cpu(), here)
        fetched.update(zip(indices, (t.contiguous() for t in there), strict=True))
    return [fetched[i] for i in range(len(tensors))]


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of the tensors in one uint8 tensor on their device."""
    return torch.cat([tensors[i].contiguous().view(-1).view(torch.uint8) for i in _order(tensors)])


def unpacked(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that `packed` packed, from their bytes; ``like`` has their dtypes and shapes."""
    order = _order(like)
    pieces = buffer.split([like[i].numel() * like[i].element_size() for i in order])
    found = {i: piece.view(like[i].dtype).view(like[i].shape) for i, piece in zip(order, pieces, strict=True)}
    return [found[i] for i in range(len(like))]


def _order(tensors: Sequence[Tensor]) -> list[int]:
    """The widest types first: every part stays aligned to its own element size."""
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())

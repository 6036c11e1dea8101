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


class Transfer:
    """Tensors on their way to the CPU.

    Args:
        tensors: of any devices.
        wait: whether to wait for them now. Otherwise those of a CUDA device are copied behind the host's back.

    Attributes:
        arrived: whether they are there already.
    """

    def __init__(self, tensors: Sequence[Tensor], wait: bool) -> None:
        devices = {tensor.device for tensor in tensors}
        self.arrived = wait or not any(device.type == "cuda" for device in devices)
        if self.arrived:
            self._tensors = fetch(tensors)
            return
        self._parts: list[tuple[list[int], list[Tensor], list[Tensor], torch.cuda.Event | None]] = []
        for device in devices:
            indices = [i for i, tensor in enumerate(tensors) if tensor.device == device]
            here = [tensors[i].detach() for i in indices]
            if device.type != "cuda":
                self._parts.append((indices, here, fetch(here), None))
                continue
            with torch.cuda.device(device):
                buffer = packed(here)
                host = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
                host.copy_(buffer, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._parts.append((indices, here, [host], event))

    def tensors(self) -> list[Tensor]:
        """The tensors on the CPU, contiguous, in the order in which they were given."""
        if self.arrived:
            return self._tensors
        found: dict[int, Tensor] = {}
        for indices, like, fetched, event in self._parts:
            if event is not None:
                event.synchronize()  # a log later it has long happened
                fetched = [t.contiguous() for t in unpacked(fetched[0], like)]
            found.update(zip(indices, fetched, strict=True))
        return [found[i] for i in range(len(found))]


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

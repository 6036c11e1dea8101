"""Which layer of a network reads its features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def input_layer(network: nn.Module, x: Tensor, outputs: int) -> nn.Linear:
    """The one linear layer that reads the features, and all that reads them.

    Args:
        network: any module.
        x: some samples.
        outputs: how many numbers the network is to give for each.

    Raises:
        ValueError: if there is no such layer, it is frozen, or the output depends on the features in another way too,
            or is of another shape.
    """
    x = x[:2].detach().clone().requires_grad_()
    readers: list[nn.Linear] = []

    def note(layer: Any, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0] is x and layer not in readers:
            readers.append(layer)

    handles = [m.register_forward_pre_hook(note) for m in network.modules() if isinstance(m, nn.Linear)]
    network.eval()
    try:
        with torch.enable_grad():
            shape = tuple(network(x).shape)
            if shape != (len(x), outputs):
                raise ValueError(
                    f"Expected the network to give {outputs} numbers for each sample, (samples, {outputs}), got the "
                    f"shape {shape} for {len(x)} samples."
                )
            if len(readers) == 1 and not readers[0].weight.requires_grad:
                raise ValueError("Expected a network whose input layer is trained: its weight has requires_grad=False.")
            if len(readers) == 1 and not _reads_otherwise(network, readers[0], x):
                return readers[0]
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError(
        f"Expected a network that reads its {x.shape[1]} features by one torch.nn.Linear and by nothing else, got one "
        f"with {len(readers)} of them"
        + (
            " and another way from its input to its output."
            if readers
            else "; the layer must be given the input itself."
        )
    )


def _reads_otherwise(network: nn.Module, layer: nn.Linear, x: Tensor) -> bool:
    """Whether the output depends on x where the layer's weight is zero."""
    weight = layer.weight.detach().clone()
    try:
        with torch.no_grad():
            layer.weight.zero_()
        output = network(x)
        (gradient,) = torch.autograd.grad(output.sum(), x, allow_unused=True)
        return gradient is not None and bool((gradient != 0).any())
    finally:
        with torch.no_grad():
            layer.weight.copy_(weight)

"""A linear layer that reads only some of its inputs."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SelectedLinear(nn.Linear):
    """A linear layer without the columns that are zero: it takes the same input and reads a part of it.

    y = x[…, inputs]·Wᵀ + b; ``in_features`` is the width of the input, not that of the weight.

    Args:
        linear: the layer.
        inputs: int64, the features that it reads.

    >>> import torch
    >>> from torchreg.compacted.selection import SelectedLinear
    >>> linear = torch.nn.Linear(4, 2)
    >>> linear.weight.data[:, 1:3] = 0
    >>> small, x = SelectedLinear(linear, torch.tensor([0, 3])), torch.randn(5, 4)
    >>> small.weight.shape, torch.allclose(small(x), linear(x))
    (torch.Size([2, 2]), True)
    """

    def __init__(self, linear: nn.Linear, inputs: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.inputs: Tensor
        self.register_buffer("inputs", inputs.to(linear.weight.device))
        weight = linear.weight.detach().index_select(1, self.inputs)
        self.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
        self.register_parameter("bias", linear.bias)
        self.training = linear.training

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return F.linear(input.index_select(-1, self.inputs), self.weight, self.bias)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, reads={len(self.inputs)}"


def unread(linear: nn.Linear) -> Tensor:
    """Which inputs a linear layer multiplies by zeros only: bool."""
    return (linear.weight.detach() == 0).all(0)


def pays(linear: nn.Linear, columns: int) -> bool:
    """Whether leaving out so many columns saves more than picking the others costs: products against copies."""
    kept = linear.in_features - columns
    return 4 * columns >= linear.in_features and kept > 0 and columns * linear.out_features >= 16 * kept

"""LeNet-300-100 and LeNet-5 in Caffe's form, and their smaller equivalents once units are dead.

A unit is dead if it reads nothing (its value is then a constant, which the next layer's bias takes over) or if nothing
reads it. `compact` leaves such units out, `expand` puts a small network's weights back where they were: all three
networks compute the same function, with the same number of weights that are not zero.

Source: LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied to document recognition, Proc. IEEE, 1998;
LeNet-5's variant from Caffe's examples (Jia et al., 2014), which has no nonlinearity after its convolutions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kept = dict[str, Tensor]
"""The units of the full network that are there, by layer."""


class LeNet300(nn.Module):
    """784 pixels, 300 and 100 rectified units, 10 classes: 266,200 weights."""

    full: ClassVar = {"pixels": 784, "hidden1": 300, "hidden2": 100}

    def __init__(self, kept: Kept | None = None) -> None:
        super().__init__()
        self.kept = kept or {layer: torch.arange(size) for layer, size in self.full.items()}
        pixels, hidden1, hidden2 = map(len, self.kept.values())
        self.fc1 = nn.Linear(pixels, hidden1)
        self.fc2 = nn.Linear(hidden1, hidden2)
        self.fc3 = nn.Linear(hidden2, 10)
        self.dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Logits; x has the columns ``kept["pixels"]`` of the images."""
        p = self.dropout if self.training else 0.0
        x = F.relu(self.fc1(F.dropout(x, p / 2, p > 0)))
        x = F.relu(self.fc2(F.dropout(x, p, p > 0)))
        return self.fc3(F.dropout(x, p, p > 0))

    @torch.no_grad()
    def fold_(self) -> None:
        for _ in range(2):  # a unit may die with its last reader or source
            for layer, following in ((self.fc1, self.fc2), (self.fc2, self.fc3)):
                constant = (layer.weight == 0).all(1)
                following.bias += following.weight[:, constant] @ F.relu(layer.bias[constant])
                following.weight[:, constant] = 0
            for layer, following in ((self.fc2, self.fc3), (self.fc1, self.fc2)):
                unread = (following.weight == 0).all(0)
                layer.weight[unread] = 0
                layer.bias[unread | (layer.weight == 0).all(1)] = 0

    def alive(self) -> Kept:
        read = [(layer.weight != 0).any(0).nonzero().flatten() for layer in (self.fc1, self.fc2, self.fc3)]
        return dict(zip(self.full, read, strict=True))

    def places(self, kept: Kept) -> dict[str, tuple[Tensor, ...]]:
        """For each parameter, where those units are in this network."""
        pixels, hidden1, hidden2 = kept.values()
        classes = torch.arange(10)
        ends = {"fc1": (hidden1, pixels), "fc2": (hidden2, hidden1), "fc3": (classes, hidden2)}
        return _with_biases(ends)


class LeNet5(nn.Module):
    """20 and 50 channels of 5 × 5, each pooled, 500 rectified units, 10 classes: 430,500 weights."""

    full: ClassVar = {"channels1": 20, "channels2": 50, "features": 800, "hidden": 500}

    def __init__(self, kept: Kept | None = None) -> None:
        super().__init__()
        self.kept = kept or {layer: torch.arange(size) for layer, size in self.full.items()}
        channels1, channels2, features, hidden = map(len, self.kept.values())
        self.conv1 = nn.Conv2d(1, channels1, 5)
        self.conv2 = nn.Conv2d(channels1, channels2, 5)
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, 10)
        place = torch.zeros(50).long()
        place[self.kept["channels2"]] = torch.arange(channels2)
        channel, position = self.kept["features"] // 16, self.kept["features"] % 16
        self.features = 16 * place[channel] + position
        self.dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Logits; x has the 784 pixels of the images as columns."""
        p = self.dropout if self.training else 0.0
        x = self.conv1(x.view(-1, 1, 28, 28)).contiguous(memory_format=torch.channels_last)  # pools faster on CPUs
        x = F.max_pool2d(self.conv2(F.max_pool2d(x, 2)), 2).flatten(1)
        if len(self.features) < x.shape[1]:
            x = x.index_select(1, self.features)
        x = F.relu(self.fc1(F.dropout(x, p, p > 0)))
        return self.fc2(F.dropout(x, p, p > 0))

    @torch.no_grad()
    def fold_(self) -> None:
        for _ in range(4):  # a unit may die with its last reader or source
            constant = (self.conv1.weight == 0).flatten(1).all(1)
            self.conv2.bias += self.conv2.weight[:, constant].sum((2, 3)) @ self.conv1.bias[constant]
            self.conv2.weight[:, constant] = 0
            constant = (self.conv2.weight == 0).flatten(1).all(1)[self.features // 16]
            self.fc1.bias += self.fc1.weight[:, constant] @ self.conv2.bias[self.features[constant] // 16]
            self.fc1.weight[:, constant] = 0
            constant = (self.fc1.weight == 0).all(1)
            self.fc2.bias += self.fc2.weight[:, constant] @ F.relu(self.fc1.bias[constant])
            self.fc2.weight[:, constant] = 0

            unread = (self.fc2.weight == 0).all(0)
            self.fc1.weight[unread] = 0
            self.fc1.bias[unread] = 0
            unread = ~_occurs(self.features[(self.fc1.weight != 0).any(0)] // 16, len(self.conv2.bias))
            self.conv2.weight[unread] = 0
            self.conv2.bias[unread] = 0
            unread = (self.conv2.weight == 0).all(3).all(2).all(0)
            self.conv1.weight[unread] = 0
            self.conv1.bias[unread] = 0

    def alive(self) -> Kept:
        features = (self.fc1.weight != 0).any(0).nonzero().flatten()
        channels2 = _occurs(self.features[features] // 16, len(self.conv2.bias)).nonzero().flatten()
        channels1 = (self.conv2.weight != 0).any(3).any(2).any(0).nonzero().flatten()
        hidden = (self.fc2.weight != 0).any(0).nonzero().flatten()
        return {"channels1": channels1, "channels2": channels2, "features": features, "hidden": hidden}

    def places(self, kept: Kept) -> dict[str, tuple[Tensor, ...]]:
        """For each parameter, where those units are in this network."""
        channels1, channels2, features, hidden = kept.values()
        ends = {
            "conv1": (channels1, torch.arange(1)),
            "conv2": (channels2, channels1),
            "fc1": (hidden, features),
            "fc2": (torch.arange(10), hidden),
        }
        return _with_biases(ends)


Network = LeNet300 | LeNet5


@torch.no_grad()
def compact(network: Network) -> Network:
    """A smaller network with the same function; the given one's dead units are folded into biases."""
    network.fold_()
    alive = {layer: units if len(units) else torch.zeros(1).long() for layer, units in network.alive().items()}
    small = type(network)({layer: network.kept[layer][units] for layer, units in alive.items()})
    for name, place in network.places(alive).items():
        small.get_parameter(name).copy_(network.get_parameter(name)[place])
    return small


@torch.no_grad()
def expand(network: Network) -> Network:
    """The network of full size with the same function."""
    full = type(network)()
    for name, place in full.places(network.kept).items():
        full.get_parameter(name).zero_()[place] = network.get_parameter(name)
    return full


def weights(network: nn.Module) -> list[Tensor]:
    """The tensors that are counted: no biases."""
    return [p for p in network.parameters() if p.ndim > 1]


def size(network: nn.Module) -> int:
    return sum(w.numel() for w in weights(network))


def nonzero(network: nn.Module) -> int:
    return sum(int(torch.count_nonzero(w)) for w in weights(network))


def _with_biases(ends: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, ...]]:
    """Rows and columns of each layer's weight as an index, and the rows of its bias."""
    places: dict[str, tuple[Tensor, ...]] = {}
    for layer, (rows, columns) in ends.items():
        places |= {f"{layer}.weight": (rows[:, None], columns), f"{layer}.bias": (rows,)}
    return places


def _occurs(values: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, values, True)

"""Small networks and their training on data that are in memory: batches, AdamW, a learning rate that comes and goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

WARM_UP = 0.1
"""The part of the training in which the learning rate rises."""
_ROWS = 8192
"""Rows that are predicted at once."""


@dataclass(frozen=True)
class Rows:
    """Samples and their targets: classes as integers, or real numbers (samples, targets)."""

    x: Tensor
    y: Tensor

    def columns(self, chosen: Tensor) -> Rows:
        """The same samples with some of their features."""
        return Rows(self.x.index_select(1, chosen), self.y)

    @property
    def classifies(self) -> bool:
        """Whether the targets are classes."""
        return not self.y.is_floating_point()

    def loss(self, output: Tensor, rows: Tensor) -> Tensor:
        """Cross-entropy, or half the mean squared error."""
        y = self.y[rows]
        return F.cross_entropy(output, y) if self.classifies else 0.5 * F.mse_loss(output, y)

    def merits(self, network: nn.Module) -> Tensor:
        """For every sample 1 or 0, as its class is found or not; of real targets the negative squared error."""
        output = predicted(network, self.x)
        if self.classifies:
            return (output.argmax(1) == self.y).float()
        return -(output - self.y).square().mean(1)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The rows of each batch of an epoch. The rest is dropped."""
        n = len(self.y)
        order = torch.randperm(n, generator=generator, device="cpu").to(self.y.device)
        size = min(size, n)
        yield from order[: n // size * size].view(-1, size)


def perceptron(features: int, hidden: Sequence[int], outputs: int, dropout: float) -> nn.Sequential:
    """Linear layers with ReLU, and dropout, between them."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(features, width), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        features = width
    return nn.Sequential(*layers, nn.Linear(features, outputs))


def batch_size(wanted: int | str, samples: int) -> int:
    """The size asked for; "auto" is 1/32 of the samples, from 8 to 256."""
    return min(max(samples // 32, 8), 256) if isinstance(wanted, str) else wanted


def train(
    network: nn.Module,
    optimizer: Optimizer,
    rows: Rows,
    factor: float = 1.0,
    *,
    epochs: int,
    batch: int,
    generator: torch.Generator,
) -> None:
    """Train with a learning rate that rises to ``factor`` times the optimizer's and then falls to 0 along a cosine.

    Afterwards it is the optimizer's again.

    Raises:
        ValueError: if the weights become NaN or infinite.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = epochs * (len(rows.y) // min(batch, len(rows.y)))
    warm, t = max(1, round(WARM_UP * steps)), 0
    network.train()
    for _ in range(epochs):
        for some in rows.batches(batch, generator):
            t += 1
            part = t / warm if t < warm else 0.5 * (1 + math.cos(math.pi * (t - warm) / max(1, steps - warm + 1)))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor * part
            step(network, optimizer, rows, some)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    check_finite(network)


def step(network: nn.Module, optimizer: Optimizer, rows: Rows, some: Tensor) -> None:
    """One step on a batch."""
    optimizer.zero_grad()
    rows.loss(network(rows.x[some]), some).backward()
    optimizer.step()


def check_finite(network: nn.Module) -> None:
    """Raise ``ValueError`` if training has diverged."""
    if not all(bool(p.isfinite().all()) for p in network.parameters()):
        raise ValueError("The weights became NaN or infinite: lower the learning rates, or let `standardize` be True.")


@torch.no_grad()
def predicted(network: nn.Module, x: Tensor) -> Tensor:
    """The network's output in evaluation mode."""
    network.eval()
    return torch.cat([network(part) for part in x.split(_ROWS)])


NetworkFactory = Callable[[int, int], nn.Module]
"""Makes a network of a number of features and one of outputs."""

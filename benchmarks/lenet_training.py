"""Runs the phases of a recipe: ProxSGD on batches of images, a number of weights that shrinks, zeros that then stay."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lenet_data import Images
from lenet_networks import LeNet300, Network, compact, nonzero, size, weights
from lenet_recipes import Moves, Phase, Recipe
from torch import Tensor

import torchreg

EVERY = 50
"""Steps between two cuts along a ramp."""


@dataclass(frozen=True)
class State:
    """What a phase hands on."""

    network: Network
    teacher: Tensor | None
    """The teacher's probabilities for all rows of the images, if there is a teacher."""
    seconds: float
    """Processor time until here."""


def start(recipe: Recipe, images: Images, seed: int) -> tuple[State, Images]:
    """A new network, and the images that it trains on."""
    begin = time.process_time()
    torch.manual_seed(seed)
    network = recipe.network()
    for name, p in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(p)
    moves = recipe.moves
    if moves != Moves():
        images = images.moved(moves.copies, moves.degrees, moves.scale, moves.shift, seed)
    return State(network, None, time.process_time() - begin), images


def run(
    phase: Phase, state: State, images: Images, seed: int, tell: Callable[[str], None] = lambda text: None
) -> State:
    """Train through one phase. Dead units are left out as soon as that saves a tenth."""
    begin = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # for dropout
    network, present, step, frozen = copy.deepcopy(state.network), None, 0, None
    if phase.cut is not None:
        cut_(network, phase.cut)
    steps = phase.epochs * (len(images) // phase.batch)
    for epoch in range(phase.epochs):
        small = compact(network)
        if epoch == 0 or size(small) < 0.9 * size(network):
            network, visible, optimizer = small, seen(small, images), _optimizer(small, phase)
            network.dropout = phase.dropout
            present = present or nonzero(network)
            frozen = frozen and torchreg.freeze_zeros(weights(network))
        network.train()
        for rows in visible.batches(phase.batch, generator):
            done = step / steps
            for group in optimizer.param_groups:
                group["lr"] = phase.lr[1] + (phase.lr[0] - phase.lr[1]) * (1 + math.cos(math.pi * done)) / 2
            if phase.keep is not None and done < phase.settled and step % EVERY == 0:
                cut_(network, _ramp(present, phase.keep, done / (0.9 * phase.settled)))
            if frozen is None and done >= phase.settled:
                cut_(network, phase.keep or present)
                frozen = torchreg.freeze_zeros(weights(network))
            optimizer.zero_grad()
            logits = network(visible.rows(rows))
            loss = F.cross_entropy(logits, visible.labels[rows % len(visible)])
            if phase.soft:
                loss = (1 - phase.soft) * loss + phase.soft * F.cross_entropy(logits, state.teacher[rows])
            loss.backward()
            optimizer.step()
            step += 1
        tell(f"epoch {epoch + 1}/{phase.epochs}: loss {loss.item():.3f}, {nonzero(network)} weights")
    if frozen is not None:
        frozen.remove()
    if phase.keep is not None:
        cut_(network, phase.keep)
    teacher = probabilities(network, images) if phase.teaches else state.teacher
    return State(network, teacher, state.seconds + time.process_time() - begin)


def _optimizer(network: Network, phase: Phase) -> torchreg.ProxSGD:
    regularizer = torchreg.Regularizer(network, torchreg.ElasticNet(phase.strength, phase.l2))
    return torchreg.ProxSGD(regularizer.param_groups(), lr=phase.lr[0], momentum=phase.momentum)


@torch.no_grad()
def cut_(network: Network, keep: int) -> None:
    """Zero all but the weights of largest magnitude, among those that are no dead unit's."""
    network.fold_()
    torchreg.TopK(keep, scope="rule").prox_all_(weights(network), [1.0] * len(weights(network)))
    network.fold_()


def _ramp(first: int, last: int, done: float) -> int:
    return int(last + (first - last) * (1 - min(done, 1)) ** 3)


@torch.no_grad()
def probabilities(network: Network, images: Images) -> Tensor:
    network.eval()
    images = seen(network, images)
    parts = torch.arange(len(images.pixels)).split(250)
    return torch.cat([F.softmax(network(images.rows(rows)), 1) for rows in parts])


def error(network: Network, images: Images) -> float:
    """Percent of the images that are classified wrongly."""
    return 100 * (probabilities(network, images).argmax(1) != images.labels).double().mean().item()


def seen(network: Network, images: Images) -> Images:
    """The images as a network takes them: LeNet-300-100 without the pixels that it no longer reads."""
    if isinstance(network, LeNet300) and len(network.kept["pixels"]) < images.pixels.shape[1]:
        return images.columns(network.kept["pixels"])
    return images

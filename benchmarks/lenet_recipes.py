"""How each network is made sparse: phases of training as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from lenet_networks import LeNet5, LeNet300


@dataclass(frozen=True)
class Phase:
    """Some epochs of ProxSGD. Before it, dead units are left out of the network.

    Args:
        lr: of the first and the last step; between them it follows a cosine.
        strength: of the L1 penalty on all weights that are counted.
        l2: of the L2 penalty on them.
        dropout: of hidden units; of pixels half of it.
        cut: weights that are left before it: the largest. None leaves all.
        keep: weights that are left at its end: the smallest ones go along a cubic ramp.
        settled: the part of it after which the zeros stay what they are.
        soft: part of the loss that is the cross-entropy with the teacher's probabilities, instead of with the labels.
        teaches: whether the network at its end is the teacher of those that follow.
    """

    epochs: int
    lr: tuple[float, float]
    batch: int = 128
    momentum: float = 0.9
    strength: float = 0.0
    l2: float = 0.0
    dropout: float = 0.0
    cut: int | None = None
    keep: int | None = None
    settled: float = 1.0
    soft: float = 0.0
    teaches: bool = False


@dataclass(frozen=True)
class Moves:
    """Moved copies of the training images; see `Images.moved`."""

    copies: int = 0
    degrees: float = 0.0
    scale: float = 0.0
    shift: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """What to train on, the phases that all compressions share, then those of each."""

    network: type[LeNet300] | type[LeNet5]
    shared: tuple[Phase, ...]
    then: dict[int, tuple[Phase, ...]]
    moves: Moves = Moves()


def _lenet300(compression: int, epochs: int) -> Phase:
    keep = 266_200 // compression
    return Phase(epochs, (0.06, 0.0), batch=256, strength=1e-4, cut=12_000, keep=keep, settled=0.6, soft=0.5)


def _lenet5(compression: int, epochs: int) -> Phase:
    keep = 430_500 // compression
    return Phase(epochs, (0.02, 0.0), batch=64, strength=1e-4, cut=4000, keep=keep, settled=0.6, soft=0.9)


RECIPES = {
    "LeNet-300-100": Recipe(
        LeNet300,
        moves=Moves(copies=8, degrees=7, scale=0.07, shift=1),
        shared=(
            Phase(20, (0.05, 0.001), dropout=0.1, teaches=True),
            Phase(40, (0.05, 0.005), strength=2e-4, soft=0.5),
        ),
        then={
            68: (_lenet300(68, epochs=50),),
            100: (_lenet300(100, epochs=70),),
            150: (_lenet300(150, epochs=100),),
            200: (_lenet300(200, epochs=120),),
        },
    ),
    "LeNet-5": Recipe(
        LeNet5,
        moves=Moves(copies=4, degrees=7, scale=0.07, shift=1),
        shared=(
            Phase(8, (0.03, 0.001), batch=64, teaches=True),
            Phase(15, (0.03, 0.005), batch=64, strength=2e-4, soft=0.5),
        ),
        then={200: (_lenet5(200, epochs=24),), 280: (_lenet5(280, epochs=30),)},
    ),
}

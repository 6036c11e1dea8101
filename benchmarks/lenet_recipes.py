"""How each network is made sparse: phases of training as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """The phases that all compressions share, then those of each."""

    network: type[LeNet300] | type[LeNet5]
    shared: tuple[Phase, ...]
    then: dict[int, tuple[Phase, ...]]
    moves: Moves = field(default_factory=Moves)


def _lenet300(compression: int) -> tuple[Phase, ...]:
    keep = 266_200 // compression
    return (Phase(20, (0.02, 0.0), strength=1e-4, cut=max(3900, keep), keep=keep, settled=0.6),)


RECIPES = {
    "LeNet-300-100": Recipe(
        LeNet300,
        shared=(Phase(3, (0.05, 0.05), dropout=0.1), Phase(40, (0.05, 0.005), strength=2e-4, dropout=0.1)),
        then={68: (Phase(10, (0.005, 0.0), l2=2.5e-4, cut=3900, settled=0.0),)}
        | {compression: _lenet300(compression) for compression in (100, 150, 200)},
    ),
}

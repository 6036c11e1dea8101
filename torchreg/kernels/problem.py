"""What every implementation of a proximal SGD step is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torchreg.penalties import Penalty


@dataclass
class SGDTensors:
    """The tensors of one param group, one entry per parameter.

    ``momentum_buffers`` and ``first`` are empty without momentum; ``first`` tells whether a buffer is fresh (zeros).
    ``seeds`` drive stochastic rounding, the same on every replica: a number or an int64 0-d tensor per parameter,
    empty where nothing is rounded.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    momentum_buffers: list[Tensor] = field(default_factory=list)
    first: list[bool] = field(default_factory=list)
    seeds: list[int | Tensor] = field(default_factory=list)

    def take(self, indices: list[int]) -> SGDTensors:
        """The entries at ``indices``."""

        def some(entries: list[Any]) -> list[Any]:
            return [entries[i] for i in indices] if entries else []

        return SGDTensors(
            some(self.params), some(self.grads), some(self.momentum_buffers), some(self.first), some(self.seeds)
        )


@dataclass(frozen=True)
class SGDStep:
    """The hyperparameters of one param group's step, in torch.optim.SGD's terms.

    ``prox_step`` is the step τ of the proximal operator: learning rate times momentum gain times strength scale.
    """

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float | Tensor
    nesterov: bool
    maximize: bool
    penalty: Penalty | None
    prox_step: float | Tensor
    stochastic_rounding: bool
    differentiable: bool = False

"""What is compared: penalties, the routes by which they act, and the settings that all share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import torchreg
from torchreg.penalties import Penalty

MOMENTUM = 0.9


@dataclass(frozen=True)
class Settings:
    """What all runs share. Strengths are in objective units: the loss is the mean cross-entropy.

    Attributes:
        target: the fraction of zeros that the proximal methods are to reach, whatever the strengths; None is none.
        refit: epochs without a penalty after a proximal method, with its zeros frozen. They begin with the learning
            rates of the first phase: on the digits a third to a thirtieth of them has the same validation accuracy.
    """

    seeds: int
    steps: int
    hidden: int
    batch: int
    lr: float
    adam_lr: float
    l1: float
    l2: float
    target: float | None = None
    refit: int = 0

    @property
    def until(self) -> int:
        """The step at which the target is to be reached."""
        return max(1, self.steps // 2)


@dataclass(frozen=True)
class Method:
    """The parts of the penalty that act, the route by which they do (none, loss or prox), and SGD or Adam."""

    name: str
    label: str
    route: str
    uses: tuple[str, ...]
    adam: bool = False

    def strengths(self, settings: Settings) -> tuple[float, float]:
        """The strengths of L1 and of L2, 0 where the method does not use them."""
        return settings.l1 if "l1" in self.uses else 0.0, settings.l2 if "l2" in self.uses else 0.0

    def penalty(self, settings: Settings) -> Penalty:
        """The penalty by its usual name."""
        l1, l2 = self.strengths(settings)
        if "l2" not in self.uses:
            return torchreg.L1(l1)
        return torchreg.ElasticNet(l1, l2) if "l1" in self.uses else torchreg.L2(l2)

    def lr(self, settings: Settings) -> float:
        """The first learning rate."""
        return settings.adam_lr if self.adam else settings.lr

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The one that knows no penalty."""
        if self.adam:
            return torch.optim.Adam(model.parameters(), lr=lr)
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)

    def proximal(self, reg: torchreg.Regularizer, lr: float) -> torch.optim.Optimizer:
        """The one whose steps end in the penalty's proximal operator."""
        if self.adam:
            return torchreg.ProxAdamW(reg.param_groups(), lr=lr, weight_decay=0)
        return torchreg.ProxSGD(reg.param_groups(), lr=lr, momentum=MOMENTUM)


METHODS = (
    Method("none", "no penalty", "none", ()),
    Method("l2-loss", "L2 in the loss", "loss", ("l2",)),
    Method("l1-loss", "L1 in the loss", "loss", ("l1",)),
    Method("l1-prox", "L1 by ProxSGD", "prox", ("l1",)),
    Method("elastic-net-prox", "Elastic Net by ProxSGD", "prox", ("l1", "l2")),
    Method("l1-loss-adam", "L1 in the loss, Adam", "loss", ("l1",), adam=True),
    Method("l1-prox-adam", "L1 by ProxAdamW", "prox", ("l1",), adam=True),
)

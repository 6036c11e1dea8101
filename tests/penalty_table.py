"""The one table of penalties that the property tests share: adding a row is how a new penalty gets tested."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from torch import Tensor

from torchreg import L1, L2, ElasticNet
from torchreg.penalties import Penalty


@dataclass(frozen=True)
class PenaltyCase:
    """A penalty's constructor, its strengths, and the penalty of one weight as a formula of its modulus."""

    name: str
    make: Callable[..., Penalty]
    strengths: tuple[float, ...]
    formula: Callable[..., Tensor]
    threshold: bool  # whether the prox makes zeros

    def penalty(self, factor: float | Tensor = 1.0) -> Penalty:
        """The penalty with its strengths times a number, or times a tensor: one strength per weight."""
        return self.make(*(s * factor for s in self.strengths))

    def brute_value(self, w: Tensor, factor: float | Tensor = 1.0) -> Tensor:
        """The penalty of each weight, from the formula."""
        return self.formula(w.abs(), *(s * factor for s in self.strengths))


def _elastic_net(m: Tensor, l1: float | Tensor, l2: float | Tensor) -> Tensor:
    return l1 * m + l2 * m**2


PENALTIES = [
    PenaltyCase("L1", L1, (0.7,), lambda m, s: s * m, True),
    PenaltyCase("L2", L2, (0.3,), lambda m, s: s * m**2, False),
    PenaltyCase("ElasticNet", ElasticNet, (0.5, 0.2), _elastic_net, True),
    PenaltyCase("ElasticNet-lasso", ElasticNet, (0.5, 0.0), _elastic_net, True),
    PenaltyCase("ElasticNet-ridge", ElasticNet, (0.0, 0.4), _elastic_net, False),
]

every_penalty = pytest.mark.parametrize("case", PENALTIES, ids=lambda case: case.name)
every_threshold = pytest.mark.parametrize("case", [c for c in PENALTIES if c.threshold], ids=lambda case: case.name)

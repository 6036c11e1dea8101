"""The one table of penalties that the property tests share: adding a row is how a new penalty gets tested."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from torchreg import L0, L1, L2, MCP, SCAD, ElasticNet, LHalf, LogSum
from torchreg.penalties import Penalty


@dataclass(frozen=True)
class PenaltyCase:
    """A penalty's constructor, its strengths, and the penalty of one weight as a formula of its modulus."""

    name: str
    make: Callable[..., Penalty]
    strengths: tuple[float, ...]
    formula: Callable[..., Tensor]
    threshold: bool  # whether the prox makes zeros
    soft: bool = True  # whether it makes them up to step·strength, with nothing in between
    convex: bool = True
    multiples: bool = True  # whether twice the strength is twice the penalty
    gradient: bool = True  # whether a loss term can apply it
    frugal: bool = True  # whether value and gradient need no temporaries even for weights of less than a tile

    def penalty(self, factor: float | Tensor = 1.0) -> Penalty:
        """The penalty with its strengths times a number, or times a tensor: one strength per weight."""
        return self.make(*(s * factor for s in self.strengths))

    def brute_value(self, w: Tensor, factor: float | Tensor = 1.0) -> Tensor:
        """The penalty of each weight, from the formula."""
        return self.formula(w.abs(), *(s * factor for s in self.strengths))


def _elastic_net(m: Tensor, l1: float | Tensor, l2: float | Tensor) -> Tensor:
    return l1 * m + l2 * m**2


def _mcp(m: Tensor, s: float | Tensor) -> Tensor:
    return torch.where(m <= 3 * s, s * m - m**2 / 6, 1.5 * torch.as_tensor(s) ** 2)


def _scad(m: Tensor, s: float | Tensor) -> Tensor:
    middle = (2 * 3.7 * s * m - m**2 - torch.as_tensor(s) ** 2) / (2 * 2.7)
    beyond = torch.as_tensor(s) ** 2 * 4.7 / 2
    return torch.where(m <= s, s * m, torch.where(m <= 3.7 * s, middle, beyond))


def _log_sum(epsilon: float) -> Callable[..., Tensor]:
    return lambda m, s: s * epsilon * torch.log1p(m / epsilon)


PENALTIES = [
    PenaltyCase("L1", L1, (0.7,), lambda m, s: s * m, True),
    PenaltyCase("L2", L2, (0.3,), lambda m, s: s * m**2, False),
    PenaltyCase("ElasticNet", ElasticNet, (0.5, 0.2), _elastic_net, True),
    PenaltyCase("ElasticNet-lasso", ElasticNet, (0.5, 0.0), _elastic_net, True),
    PenaltyCase("ElasticNet-ridge", ElasticNet, (0.0, 0.4), _elastic_net, False),
    PenaltyCase("MCP", lambda s: MCP(s, 3.0), (0.6,), _mcp, True, convex=False, multiples=False, frugal=False),
    PenaltyCase("SCAD", SCAD, (0.5,), _scad, True, convex=False, multiples=False, frugal=False),
    PenaltyCase("LogSum", lambda s: LogSum(s, 5.0), (0.6,), _log_sum(5.0), True, convex=False, frugal=False),
    PenaltyCase(
        "LogSum-sharp", lambda s: LogSum(s, 0.2), (0.6,), _log_sum(0.2), True, soft=False, convex=False, frugal=False
    ),
    PenaltyCase("LHalf", LHalf, (0.3,), lambda m, s: s * m**0.5, True, soft=False, convex=False, frugal=False),
    PenaltyCase(
        "L0", L0, (0.3,), lambda m, s: s * (m != 0).to(m), True, soft=False, convex=False, gradient=False, frugal=False
    ),
]


def _every(chosen: Callable[[PenaltyCase], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [c for c in PENALTIES if chosen(c)], ids=lambda case: case.name)


every_penalty = _every(lambda case: True)
every_threshold = _every(lambda case: case.threshold)
every_soft_threshold = _every(lambda case: case.threshold and case.soft)
every_convex_penalty = _every(lambda case: case.convex)
every_penalty_with_a_gradient = _every(lambda case: case.gradient)
every_frugal_penalty = _every(lambda case: case.frugal)

"""FISTA for least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from torchreg.linear.lasso.accelerated import Certificate, Composite, accelerate
from torchreg.linear.lasso.problem import Problem, Strength
from torchreg.linear.lasso.solution import Solution

TARGET = 1e-13
"""The relative gap that ends the iterations."""
CLOSE = 1e-7
"""One from which on Newton steps take over, where they are small."""


def is_close(gap: float, power: float, eps: float) -> bool:
    """Whether Newton steps may take over."""
    return gap <= max(CLOSE, 16 * eps) * power


class LeastSquares(Composite):
    """½/n·‖z − Zw‖²."""

    rows, bend = 1, 1.0

    def __init__(self, problem: Problem, strength: Strength) -> None:
        self.problem, self.design, self.strength = problem, problem.design, strength
        self.positive = problem.positive
        self.samples = max(1, problem.design.samples)

    def slopes(self, scores: Tensor) -> Tensor:
        """−residual/n."""
        return (scores - self.problem.target) / self.samples

    def centring(self, scores: Tensor) -> Tensor:
        """None: Z and z are centred."""
        return torch.zeros_like(scores[:, 0])

    def certificate(self, scores: Tensor, w: Tensor, pull: Tensor) -> Certificate:
        """At the scaled residual; the dual is 1-strongly concave in it."""
        l1, l2 = self.strength.l1, self.strength.l2
        residual = self.problem.target - scores[0]
        active = pull - l2 * w
        force = active.clamp(min=0) if self.positive else active.abs()
        largest = force.max() if force.numel() else force.new_zeros(())
        scale = torch.where(largest > l1, l1 / largest.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
        energy = residual @ residual / self.samples + l2 * w.square().sum()
        if l1:
            dual = scale * (residual @ self.problem.target) / self.samples - 0.5 * scale.square() * energy
            gap = float(0.5 * energy + l1 * w.abs().sum() - dual)
        else:
            slope = (active.clamp(min=0) + torch.where(w > 0, active.clamp(max=0), 0)) if self.positive else active
            gap = float(slope.square().sum()) * (0.5 / l2 if l2 else self.samples)
        gap = max(0.0, gap)
        return Certificate(gap, scale * force, (2 * gap) ** 0.5)


def solve_by_fista(
    problem: Problem, strengths: list[Strength], limit: int, start: Tensor | None, target: float = TARGET
) -> list[Solution]:
    """Solutions for strengths in falling order, each from the one before.

    Args:
        problem: what is minimised.
        strengths: falling.
        limit: the most iterations for each.
        start: coefficients (features,) to begin with.
        target: the relative gap that ends the iterations.
    """
    features = problem.design.features
    w = problem.target.new_zeros(1, features) if start is None else start.reshape(1, -1)
    every, found = torch.arange(features, device=w.device), []
    for strength in strengths:
        composite = LeastSquares(problem, strength)
        w, _, gap, steps = accelerate(composite, problem.power, target, limit, w, w.new_zeros(1))
        found.append(Solution(every, w[0], gap, steps))
    return found

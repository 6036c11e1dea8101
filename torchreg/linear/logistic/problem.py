"""Logistic regression as a minimisation problem, and the duality gap that certifies a solution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchreg.linear.data.design import Design
from torchreg.linear.lasso.problem import Strength
from torchreg.linear.logistic.loss import Loss

_STEPS = 100
_BALANCED = 1e-17  # slopes of intercepts that are rounding
_LONGEST = 2.0  # by which an intercept moves in a step: further than that the quadratic model is not to be trusted


@dataclass(frozen=True)
class LogisticProblem:
    """Σ v·loss(Zw + c) + l1·Σ|w| + ½·l2·Σw² for coefficients w of shape (rows, features) and intercepts c."""

    design: Design
    """Z: centred if there is an intercept, and not weighted."""
    loss: Loss
    strength: Strength
    intercept: bool

    @cached_property
    def null(self) -> Tensor:
        """The best intercepts (rows,) without features."""
        constant = self.loss.constant()
        return constant if self.intercept else torch.zeros_like(constant)

    @cached_property
    def at_zero(self) -> Tensor:
        """Its scores (rows, n)."""
        return self.null.unsqueeze(1).expand(-1, self.design.samples)

    @cached_property
    def power(self) -> float:
        """The objective without features: gaps are relative to it."""
        return float(self.loss.value(self.at_zero))

    def pull(self, slopes: Tensor) -> Tensor:
        """The negative gradient of the loss in all coefficients, (rows, features)."""
        return self.design.correlations(slopes) * -self.design.samples

    def penalty(self, w: Tensor) -> Tensor:
        """l1·Σ|w| + ½·l2·Σw²."""
        return self.strength.l1 * w.abs().sum() + 0.5 * self.strength.l2 * w.square().sum()

    def centring(self, scores: Tensor, limit: int = _STEPS) -> Tensor:
        """What intercepts (rows,) must move by to be the best ones for the other terms of these scores."""
        best = shift = torch.zeros_like(scores[:, 0])
        least = torch.inf
        for _ in range(limit if self.intercept else 0):
            here = scores + shift.unsqueeze(1)
            slope = self.loss.slopes(here).sum(1)
            size = float(slope.abs().max())
            if not size < least:
                break
            best, least = shift, size
            if size <= _BALANCED:
                break
            step = self.loss.curvature(here).eliminated() @ slope
            shift = shift - step.clamp(-_LONGEST, _LONGEST)
        return best

    def gap(self, scores: Tensor, w: Tensor, pull: Tensor) -> float:
        """How far the objective is from the smallest one, at most: primal minus dual value.

        The dual value is that of class probabilities q = (1 − s)·labels + s·p, for p of the scores and the
        largest s ≤ 1 for which no pull exceeds l1; with l2 > 0 also that of s = 1. The gap is written as
        Σ v·KL(q‖p) plus, for each coefficient, its penalty and the conjugate of that less its product with the pull,
        so that nothing cancels. Intercepts must be the best ones for the coefficients.

        Args:
            scores: (rows, n).
            w: (rows, features).
            pull: the same shape.

        Source: Ndiaye et al., Gap safe screening rules for sparsity enforcing penalties, JMLR 2017.
        """
        return self.bound(scores, w, pull)[0]

    def bound(self, scores: Tensor, w: Tensor, pull: Tensor) -> tuple[float, float]:
        """The gap, and the s whose dual value gives it."""
        l1, l2 = self.strength.l1, self.strength.l2
        largest = float(pull.abs().max()) if pull.numel() else 0.0
        scale = min(1.0, l1 / largest) if largest else 1.0
        bounds = [(self._at(scores, w, pull, s), s) for s in ({scale, 1.0} if l2 else {scale})]
        bounds.append((float(self.loss.value(scores) + self.penalty(w)), 0.0))  # the dual value of the labels is 0
        gap, scale = min(bounds)
        return max(0.0, gap), scale

    def _at(self, scores: Tensor, w: Tensor, pull: Tensor, scale: float) -> float:
        l1, l2 = self.strength.l1, self.strength.l2
        force = scale * pull
        terms = l1 * w.abs() - force * w
        if l2:
            beyond = (force.abs() - l1).clamp(min=0)
            agree = (beyond > 0) & (force * w >= 0)
            apart = terms + 0.5 * l2 * w.square() + beyond.square() / (2 * l2)
            terms = torch.where(agree, (l2 * w.abs() - beyond).square() / (2 * l2), apart)
        return float(self.loss.divergence(scores, scale) + terms.sum())

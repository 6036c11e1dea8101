"""What a solver hands back for one strength, and the last digits of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg.linear.lasso.problem import Strength
from torchreg.linear.quadratic.newton import factorise

ACCURATE = 1e-14
"""A gap of this part of ½‖z‖²/n is rounding."""


@dataclass(frozen=True)
class Solution:
    """Coefficients that may differ from zero, with the duality gap and the number of Newton steps."""

    index: Tensor
    values: Tensor
    gap: float
    steps: int

    def full(self, features: int) -> Tensor:
        """All coefficients, shape (features,) in float64."""
        w = self.values.new_zeros(features)
        w[self.index[: len(self.values)]] = self.values
        return w


def errors(w: Tensor, pull: Tensor, strength: Strength) -> Tensor:
    """By how much the optimality conditions are violated on the support of w."""
    support = torch.nonzero(w).squeeze(1)
    return _errors(w[support], pull[support], strength)


def _errors(here: Tensor, there: Tensor, strength: Strength) -> Tensor:
    signed = there - strength.l1 * torch.sign(here)
    return signed.sub_(here, alpha=strength.l2) if strength.l2 else signed


def refined(gram: Tensor, w: Tensor, pull: Tensor, strength: Strength, positive: bool) -> tuple[Tensor | None, float]:
    """One step of iterative refinement on the support of w, from a pull Zᵀ(z − Zw)/n that is not taken from the Gram.

    Returns:
        The refined coefficients, or None where there is nothing to gain, or the signs would change; and the largest
        error of w.
    """
    support = torch.nonzero(w).squeeze(1)
    if not len(support):
        return None, 0.0
    here = w[support]
    error = _errors(here, pull[support], strength)
    worst = float(error.abs().max())
    if not worst > ACCURATE * float(pull.abs().max()):
        return None, worst
    matrix = gram[support.unsqueeze(1), support]
    matrix.diagonal().add_(strength.l2)
    factor, stuck = factorise(matrix)
    if stuck is not None:
        return None, worst
    moved = here + torch.cholesky_solve(error.unsqueeze(1), factor).squeeze(1)
    if (strength.l1 or positive) and bool((moved * here <= 0).any()):
        return None, worst
    result = w.clone()
    result[support] = moved
    return result, worst

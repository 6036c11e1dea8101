"""One eigendecomposition that serves all strengths of ridge regression, and its exact leave-one-out errors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchreg.linear.quadratic.threads import threads_for
from torchreg.linear.ridge.problem import RidgeProblem

_LOST = 1e-11  # eigenvalues of a Gram matrix below this part of the largest have fewer than five digits
_ROOM = 1 << 24  # elements of intermediate results at a time


class Spectrum:
    """Z = U·diag(√values)·Vᵀ, from the Gram matrix of the smaller side, or from Z itself where that loses digits.

    Args:
        problem: what is solved.
        smallest: the smallest strength.
        svd: True for Z itself (dense data), False for the Gram matrix, None for what is accurate.
    """

    def __init__(self, problem: RidgeProblem, smallest: float, svd: bool | None = None) -> None:
        self.problem = problem
        size = min(problem.design.samples, problem.design.features)
        with threads_for(size):
            z = problem.matrix() if svd else None
            if z is None:
                self._from_gram()
                floor = self.values.min() if not problem.dual else 0.0
                if svd is None and bool(floor + smallest < _LOST * self.values.max()):
                    z = problem.matrix()
            if z is not None:
                self._from_data(z)
        self._kept = self.values > self._noise
        """Directions that can be told from none."""

    def _from_gram(self) -> None:
        problem = self.problem
        values, vectors = torch.linalg.eigh(problem.gram)
        self.values, self.loadings = values.clamp(min=0), None
        self.vectors = vectors
        """Columns: of V, or of U if there are no more samples than features."""
        self.on_samples = problem.dual
        moments = problem.targets if problem.dual else problem.pull(problem.targets)
        self.moments = moments @ vectors
        self._noise = len(values) * torch.finfo(torch.float64).eps * self.values.max()

    def _from_data(self, z: Tensor) -> None:
        u, s, vh = torch.linalg.svd(z, full_matrices=False)
        self.values, self.vectors, self.loadings = s.square(), vh.T, (u * s).T
        self.moments = (self.problem.targets @ u) * s
        self.on_samples = False
        self._noise = (max(z.shape) * torch.finfo(torch.float64).eps * s.max()).square()

    def coefficients(self, alphas: Tensor) -> Tensor:
        """Minimisers of all targets at each strength, the shortest where there are many.

        Args:
            alphas: shape (m,).

        Returns:
            shape (m, targets, features).
        """
        weights = self._weights(alphas)  # (m, k)
        inside = weights.unsqueeze(1) * self.moments  # (m, targets, k)
        found = inside.flatten(0, 1) @ self.vectors.T
        if self.on_samples:
            found = self.problem.pull(found)
        return found.unflatten(0, (len(alphas), -1))

    def _weights(self, alphas: Tensor) -> Tensor:
        sums = self.values + alphas.unsqueeze(1)
        return torch.where(self._kept & (sums > 0), 1 / torch.where(sums > 0, sums, 1), 0)

    def errors(self, alphas: Tensor) -> Iterator[Tensor]:
        """Leave-one-out errors for more samples than features, times roots of weights: (targets, samples) a strength.

        With H = Z(ZᵀZ + alpha)⁻¹Zᵀ they are (z − Hz)ᵢ/(1 − Hᵢᵢ − vᵢ/Σv); the last term is the intercept's.
        """
        problem = self.problem
        left = torch.ones(len(alphas), len(problem.root), dtype=torch.float64, device=alphas.device)
        weights = self._weights(alphas)
        step = max(1, _ROOM // len(problem.root))
        for start in range(0, len(self.values), step):
            here = slice(start, start + step)
            loaded = problem.fitted(self.vectors.T[here]) if self.loadings is None else self.loadings[here]
            left -= weights[:, here] @ loaded.square()
        if problem.centred:
            left -= problem.root.square() / len(problem.root)
        for alpha, rest in zip(alphas, left, strict=True):
            yield (problem.targets - problem.fitted(self.coefficients(alpha[None])[0])) / rest


def leave_one_out(problem: RidgeProblem, alphas: Tensor, svd: bool | None = None) -> Iterator[Tensor]:
    """What each sample is off by under the model of all others, times the root of its weight.

    Args:
        problem: what is solved.
        alphas: positive strengths, shape (m,).
        svd: as in `Spectrum`.

    Yields:
        shape (targets, samples), for each strength.

    Source: Rifkin and Lippert, Notes on regularized least squares, MIT-CSAIL-TR-2007-025, 2007.
    """
    if not problem.dual:
        yield from Spectrum(problem, float(alphas.min()), svd).errors(alphas)
        return
    values, vectors, lifted = _on_samples(problem, float(alphas.min()), svd)
    moments = problem.targets @ vectors
    squares = vectors.square()
    for alpha in alphas:
        weights = 1 / (values + alpha)
        rest = squares @ weights
        if problem.centred:
            rest = rest - problem.root.square() / (len(problem.root) * (lifted + alpha))
        yield (moments * weights) @ vectors.T / rest


def _on_samples(problem: RidgeProblem, smallest: float, svd: bool | None) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and vectors of ZZᵀ + lifted·rrᵀ, where r = root/‖root‖ is a null vector of a centred Z.

    At its own eigenvalue 0 it would be the largest part of the inverse, and be subtracted from it again.
    """
    gram = problem.gram
    lifted = gram.norm()
    lifted = torch.where(lifted > 0, lifted, torch.ones_like(lifted))
    if problem.centred:
        r = problem.root / len(problem.root) ** 0.5
        gram = gram.addr(r, r * lifted)
    with threads_for(len(gram)):
        values, vectors = torch.linalg.eigh(gram)
        if svd is None and float(values.min()) + smallest < _LOST * float(values.max()):
            svd = True
        z = problem.matrix() if svd else None
        if z is not None:
            if problem.centred:
                z = torch.cat([z, (r * lifted.sqrt()).unsqueeze(1)], 1)
            vectors, roots, _ = torch.linalg.svd(z, full_matrices=False)
            values = roots.square()
    return values.clamp(min=0), vectors, lifted

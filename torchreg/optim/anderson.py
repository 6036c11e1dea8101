"""Anderson extrapolation: where the last points of proximal gradient steps lead to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchreg.optim.composite import Composite, Point, difference

_LONGER = 10.0
"""By which factor the solver's step may exceed that of the residuals until they are computed anew."""
_RIDGE = 100
"""Added to the diagonal of correlations, in units of rounding: turns may depend on one another."""


class History:
    """The last points, and their residuals r_i = w_i − prox_{τR}(w_i − τ∇f(w_i)).

    Args:
        problem: f and R.
        size: of how many points at most.
        step: the τ of the residuals, which stays while the solver's is one to ten times as long.
    """

    def __init__(self, problem: Composite, size: int, step: float) -> None:
        self._problem, self._size = problem, size
        self.step = step
        self.points: list[Point] = []
        self._residuals: list[list[Tensor]] = []

    def pack(self, last: Point) -> list[Tensor]:
        """The points up to the last one: for each parameter a tensor that holds point i's weights and gradient in [i].

        Empty if no points are kept.
        """
        if self._size == 0:
            return []
        points = [*(p for p in self.points if p is not last), last][-self._size :]
        kept = [w.new_empty(len(points), 2, *w.shape) for w in last.weights]
        for i, point in enumerate(points):
            for t, w, g in zip(kept, point.weights, point.grads, strict=True):
                t[i, 0], t[i, 1] = w, g
        return kept

    def unpack(self, kept: Sequence[Tensor | None]) -> None:
        """Go on from there, if the problem starts where it ended: the last point is left out, as it is to be added."""
        tensors = [t for t in kept if t is not None]
        if self._size == 0 or len(tensors) < len(kept) or len({len(t) for t in tensors}) > 1:
            return
        start = self._problem.start
        *points, last = (
            Point(
                _laid_out(start.weights, [t[i, 0] for t in tensors]),
                math.nan,
                _laid_out(start.grads, [t[i, 1] for t in tensors]),
            )
            for i in range(len(tensors[0]))
        )
        if all(map(torch.equal, [*last.weights, *last.grads], [*start.weights, *start.grads])):
            self.points, self._residuals = points, []

    def add(self, point: Point, step: float) -> None:
        """Add the present point, reached by a solver whose next step is that long."""
        if self._size == 0:
            return
        if not self.step <= step <= self.step * _LONGER:
            self.step, self._residuals = step, []
        points = [*self.points, point]
        residuals = self._residuals + [self._residual(p) for p in points[len(self._residuals) :]]
        self.points, self._residuals = points[-self._size :], residuals[-self._size :]

    def forget(self) -> None:
        """Leave only the last point."""
        self.points, self._residuals = self.points[-1:], self._residuals[-1:]

    def mixed(self) -> tuple[Point, float] | None:
        """Where to step from next, if there are points enough to tell.

        Returns:
            Σ a_i·w_i and Σ a_i·∇f(w_i), where Σ a_i = 1 and ‖Σ a_i·r_i‖ is least, without a loss; and ‖r‖²/2τ of the
            last point, the fall of f + R that a step of proximal gradient would promise there.
        """
        if len(self.points) < 2:
            return None
        gram = self._problem.gram(_turns(tensors) for tensors in zip(*self._residuals, strict=True))
        norms = gram.diagonal().sqrt()
        if not (norms.isfinite().all() and norms.all()):
            return None
        gram /= norms * norms[:, None]
        gram.diagonal().add_(_RIDGE * self._problem.noise)
        factors = (torch.linalg.solve(gram[:-1, :-1], gram[:-1, -1]) * norms[-1] / norms[:-1]).tolist()
        shares = [b - a for a, b in zip([0.0, *factors], [*factors, 1.0], strict=True)]
        weights, grads = zip(*((p.weights, p.grads) for p in self.points), strict=True)
        mix = Point(_combined(weights, shares), math.nan, _combined(grads, shares))
        return mix, float(norms[-1]) ** 2 / (2 * self.step)

    def _residual(self, point: Point) -> list[Tensor]:
        return difference(point.weights, self._problem.forward_backward(point, self.step))


def _laid_out(likes: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Copies that lie in memory as others do, so that sums over them are rounded alike."""
    return [torch.empty_like(like).copy_(t) for like, t in zip(likes, values, strict=True)]


def _turns(residuals: Sequence[Tensor]) -> Tensor:
    """By what each residual differs from the one before, and the last one, as rows."""
    rows = torch.stack([(torch.view_as_real(r) if r.is_complex() else r).flatten() for r in residuals])
    for row, after in itertools.pairwise(rows):
        torch.sub(after, row, out=row)
    return rows


def _combined(lists: Sequence[list[Tensor]], shares: Sequence[float]) -> list[Tensor]:
    sums = [t * shares[-1] for t in lists[-1]]
    for tensors, share in zip(lists[:-1], shares[:-1], strict=True):
        for total, t in zip(sums, tensors, strict=True):
            total.add_(t, alpha=share)
    return sums

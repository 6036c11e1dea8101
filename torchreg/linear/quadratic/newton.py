"""Block active-set Newton steps on a Gram matrix: the exact minimiser of a quadratic with an L1 penalty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEPENDENT = 1e-13  # of a column's own square: what is left of it outside the span of the others
SLACK = 1e-13  # of the largest moment: correlations this little beyond the strength are rounding
CROSSINGS = 12
MANY = 40
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Minimum:
    """A minimiser, the number of linear systems that were solved for it, and whether it is one: or limit was hit."""

    w: Tensor
    steps: int
    exact: bool


def minimise(
    gram: Tensor,
    moment: Tensor,
    l1: float,
    l2: float = 0.0,
    *,
    start: Tensor | None = None,
    positive: bool = False,
    limit: int = 1000,
) -> Minimum:
    """The minimiser of ½wᵀGw − bᵀw + l1·Σ|w| + ½·l2·Σw², by Newton steps on the faces of the L1 norm.

    On the coefficients that are not zero, with their signs held fast, the objective is a quadratic whose minimiser is
    one Cholesky solve away. Coefficients that would change their sign are stopped at zero, at the best of some points
    of the projected segment; at the minimiser of a face all zeros that violate the optimality conditions enter, in
    blocks by violation, where they move away from zero with the right sign. Each step lowers the objective, and there
    are finitely many faces: the result is exact to rounding. Where columns are linearly dependent a step along the null
    direction takes one of them out instead.

    Args:
        gram: G, symmetric and positive semidefinite, (k, k) in float64.
        moment: b, (k,).
        l1, l2: non-negative.
        start: where to begin, zero without.
        positive: whether w ≥ 0 is asked for.
        limit: the most steps.

    Source: Kim and Park, Fast active-set-type algorithms for L1-regularized linear regression, AISTATS 2010; Bertsekas,
    Projected Newton methods for optimization problems with simple constraints, SIAM Journal on Control and
    Optimization, 1982.
    """
    w = torch.zeros_like(moment) if start is None else start.clone()
    return _Faces(gram, moment, l1, l2, positive).descend(w, limit)


class _Faces:
    def __init__(self, gram: Tensor, moment: Tensor, l1: float, l2: float, positive: bool) -> None:
        self.gram, self.moment, self.l1, self.l2, self.positive = gram, moment, l1, l2, positive
        self.kinked = l1 > 0 or positive
        largest = float(moment.abs().max()) if moment.numel() else 0.0
        self.slack = l1 + SLACK * largest
        self.barred = torch.zeros_like(moment, dtype=torch.bool)
        """Zeros that look like violations and can't enter: dependent on the others, or by rounding."""

    def descend(self, w: Tensor, limit: int) -> Minimum:
        settled, steps = False, 0
        while True:
            support = torch.nonzero(w).squeeze(1)
            signs = torch.sign(w[support])
            index = support
            settled = settled or not len(support)
            if settled:
                pull = self.pull(w, support)
                entering = self.entering(w, pull, len(support))
                if not len(entering):
                    return Minimum(w, steps, True)
                index = torch.cat([support, entering])
                signs = torch.cat([signs, torch.sign(pull[entering])])
            if steps >= limit:
                return Minimum(w, steps, False)
            steps += 1
            w, settled = self.step(w, index, signs, len(support))

    def pull(self, w: Tensor, support: Tensor) -> Tensor:
        """The negative gradient of the quadratic part."""
        if 2 * len(support) < len(w):
            return self.moment - w[support] @ self.gram[support] - self.l2 * w
        return torch.addmv(self.moment, self.gram, w, alpha=-1) - self.l2 * w

    def entering(self, w: Tensor, pull: Tensor, held: int) -> Tensor:
        """Zeros whose pull exceeds the strength, strongest first; at most half of them where there are many."""
        force = pull if self.positive else pull.abs()
        found = torch.nonzero((w == 0) & (force > self.slack) & ~self.barred).squeeze(1)
        if len(found) > 1:
            found = found[torch.argsort(force[found], descending=True)]
        if len(found) > max(MANY, held // 2):
            found = found[: max(MANY // 2, len(found) // 2)]
        return found

    def step(self, w: Tensor, index: Tensor, signs: Tensor, held: int) -> tuple[Tensor, bool]:
        """Towards the minimiser of the face of these signs. The first `held` are not zero, the others enter.

        Returns:
            The new point, and whether it is the minimiser of its face.
        """
        while True:
            matrix = self.matrix(index)
            factor, stuck = factorise(matrix)
            if stuck is not None:
                if stuck > held:  # those before it are independent; the others may enter later
                    index, signs = index[:stuck], signs[:stuck]
                    continue
                moved = self.exchange(w, index, signs, stuck, held)
                if moved is not None:
                    return moved, False
                self.barred[index[stuck]] = True
                index, signs = _without(index, stuck), _without(signs, stuck)
                if len(index) == held:
                    return w, True
                continue
            x = torch.cholesky_solve((self.moment[index] - self.l1 * signs).unsqueeze(1), factor).squeeze(1)
            if not self.kinked or held == len(index):
                break
            fits = x * signs > 0
            fits[:held] = True
            count = int(fits.sum())
            if count == len(index):
                break
            if count > held:
                index, signs = index[fits], signs[fits]
            elif len(index) > held + 1:
                index, signs = index[: held + 1], signs[: held + 1]
            else:
                self.barred[index[held]] = True
                return w, True
        return self.segment(w, index, signs, held, x, matrix)

    def matrix(self, index: Tensor) -> Tensor:
        matrix = self.gram[index][:, index]
        if self.l2:
            matrix.diagonal().add_(self.l2)
        return matrix

    def segment(
        self, w: Tensor, index: Tensor, signs: Tensor, held: int, x: Tensor, matrix: Tensor
    ) -> tuple[Tensor, bool]:
        """The best of some points between w and x, where coefficients that cross zero stay there."""
        result = torch.zeros_like(w)
        crosses = x * signs < 0
        crosses[held:] = False
        if not self.kinked or not bool(crosses.any()):
            result[index] = x + 0.0  # no negative zeros
            return result, True
        here = w[index]
        when = torch.where(crosses, here / (here - x), torch.inf)
        first = torch.sort(when[crosses]).values[:CROSSINGS]
        times = torch.cat([first, first.new_tensor(SHARES)]).unsqueeze(1)
        points = torch.where(times >= when, 0.0, here + times * (x - here))
        if not self.positive:
            points = torch.cat([points, x.unsqueeze(0)])
        values = 0.5 * ((points @ matrix) * points).sum(1) - points @ self.moment[index] + self.l1 * points.abs().sum(1)
        result[index] = points[values.argmin()] + 0.0
        return result, False

    def exchange(self, w: Tensor, index: Tensor, signs: Tensor, stuck: int, held: int) -> Tensor | None:
        """Move along the direction that changes no prediction until a coefficient is zero, where the penalty falls.

        Returns:
            The new point, or None where the entering column brings nothing.
        """
        head, last, signs = index[:stuck], index[stuck], signs[: stuck + 1]
        direction = signs.new_ones(stuck + 1)
        if stuck:
            factor, _ = torch.linalg.cholesky_ex(self.matrix(head))
            direction[:stuck] = -torch.cholesky_solve(self.gram[head, last].unsqueeze(1), factor).squeeze(1)
        enters = stuck == held
        slope = direction * signs
        if enters:
            direction, slope = direction * signs[-1], slope * signs[-1]
        if enters and (not self.l1 or float(slope.sum()) >= -1e-9 * float(slope.abs().sum())):
            return None
        if not enters and (float(slope.sum()) > 0 or not bool((slope < 0).any())):
            direction, slope = -direction, -slope
        index = index[: stuck + 1]
        here = w[index]
        when = torch.where(slope < 0, -here / direction, torch.inf)
        when[here == 0] = torch.inf
        first = int(when.argmin())
        if not torch.isfinite(when[first]):
            return None
        result = w.clone()
        moved = here + when[first] * direction
        moved[first] = 0.0
        result[index] = moved
        return result


def factorise(matrix: Tensor) -> tuple[Tensor, int | None]:
    """The lower Cholesky factor, and the first column that depends on those before it, if any."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    failed = int(info)
    pivots = factor.diagonal().square()
    if failed:
        pivots = pivots[: failed - 1]
    dependent = torch.nonzero(~(pivots > DEPENDENT * matrix.diagonal()[: len(pivots)])).squeeze(1)
    if len(dependent):
        return factor, int(dependent[0])
    return factor, failed - 1 if failed else None


def _without(t: Tensor, position: int) -> Tensor:
    return torch.cat([t[:position], t[position + 1 :]])

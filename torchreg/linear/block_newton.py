"""Newton steps on the groups that are not zero: the exact minimiser of a quadratic with a penalty of group norms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchreg.linear import block_descent
from torchreg.linear.blocks import Blocks
from torchreg.linear.newton import CROSSINGS, MANY, SHARES, SLACK, Minimum
from torchreg.linear.problem import Strength

_LIFT = 1e-10  # of a norm's curvature across it is added along it: where columns are dependent there may be none
_COARSE = 5e-2  # of the strength: an error of the gradient that is small enough to look for other groups
_CLOSE = 1e-6  # of it: what coordinate descent is asked for before Newton steps, which square it
_FINE = 1e-10  # of the largest moment
_ROUNDING = 1e-8  # from here on an error that Newton steps no longer lower is rounding
_SWEEPS = 50  # of coordinate descent, before Newton steps
_PER_STEP = 10  # of them, for one step that users allow
_BACKWARDS = 40  # halvings of a step
_TURNS = 10  # a group that has entered this often by now only moves by rounding


def minimise(
    gram: Tensor,
    moment: Tensor,
    blocks: Blocks,
    strength: Strength,
    *,
    start: Tensor | None = None,
    limit: int = 1000,
    coarse: bool = False,
) -> Minimum:
    """The minimiser of ½·tr(WGWᵀ) − tr(BWᵀ) + l1·Σ_g v_g‖W_g‖ + ½·l2·‖W‖² over W of shape (targets, columns).

    Where no group is zero the penalty is smooth. Newton steps are taken on the groups that are not zero; those that
    would pass zero are stopped there, at the best of some points of the segment; at the minimiser all zeros that
    violate the optimality conditions, ‖(B − WG)_g‖ ≤ l1·v_g, enter in blocks, by an exact step along their gradients.
    The Hessian is (G + l2 + D)⊗I − UCUᵀ, with D = l1·v_g/‖W_g‖ for each column and one vector of U for each group, so
    that a step costs two Cholesky factors of the number of columns, whatever the number of targets. Without the second
    term it is a step on an upper bound of the objective, which never fails.

    On the CPU, where a compiler is found, sweeps of coordinate descent come first.

    Args:
        gram: G, symmetric and positive semidefinite, (k, k) in float64.
        moment: B, (targets, k).
        blocks: the groups of the k columns and their weights v.
        strength: l1 positive, l2 non-negative.
        start: where to begin, zero without.
        limit: the most steps; ten sweeps count as one.
        coarse: whether a twentieth of the strength is close enough to zero for the gradient, or some sweeps are enough.

    Source: Roth and Fischer, The Group-Lasso for generalized linear models: uniqueness of solutions and efficient
    algorithms, ICML 2008; Qin, Scheinberg and Goldfarb, Efficient block-coordinate descent algorithms for the group
    lasso, Mathematical Programming Computation, 2013.
    """
    w, steps = torch.zeros_like(moment) if start is None else start.clone(), 0
    if gram.device.type == "cpu" and block_descent.unavailable() is None:
        least = (_COARSE if coarse else _CLOSE) * strength.l1 * float(blocks.weights.min())
        w, sweeps = block_descent.sweep(gram, moment, blocks, strength, w, least, min(limit * _PER_STEP, _SWEEPS))
        steps = math.ceil(sweeps / _PER_STEP)
        if coarse or steps >= limit:
            return Minimum(w, steps, False)
    found = _Descent(gram, moment, blocks, strength).run(w, limit - steps, coarse)
    return Minimum(found.w, steps + found.steps, found.exact)


class _Descent:
    def __init__(self, gram: Tensor, moment: Tensor, blocks: Blocks, strength: Strength) -> None:
        self.gram, self.moment, self.blocks, self.strength = gram, moment, blocks, strength
        self.l2, self.strengths = strength.l2, strength.l1 * blocks.weights
        self.largest = float(moment.abs().max()) if moment.numel() else 0.0
        self.entered = torch.zeros(blocks.count, dtype=torch.int32, device=moment.device)

    def run(self, w: Tensor, limit: int, coarse: bool) -> Minimum:
        steps, fine = 0, False
        while True:
            settled = False
            while not settled:
                alive = self.blocks.norms(w) > 0
                if not bool(alive.any()):
                    break
                groups = torch.nonzero(alive).squeeze(1)
                face = Face(self.gram, self.moment, self.blocks, self.strength, groups)
                w, taken, settled = face.descend(w, limit - steps, fine)
                steps += taken
                if steps >= limit:
                    return Minimum(w, steps, False)
            pull = self.pull(w)
            entering = self.entering(w, pull)
            if len(entering):
                w = self.enter(w, pull, entering)
                fine = False
            elif fine or coarse or not settled:
                return Minimum(w, steps, True)
            else:
                fine = True

    def pull(self, w: Tensor) -> Tensor:
        """The negative gradient of the quadratic part."""
        return torch.addmm(self.moment, w, self.gram, alpha=-1) - self.l2 * w

    def entering(self, w: Tensor, pull: Tensor) -> Tensor:
        """Groups at zero whose pull exceeds their strength, strongest first; at most half of them if they are many."""
        norms = self.blocks.norms(w)
        excess = self.blocks.norms(pull) - self.strengths
        excess = excess.masked_fill((norms > 0) | (self.entered >= _TURNS), 0)
        found = torch.nonzero(excess > SLACK * self.largest).squeeze(1)
        if len(found) > max(MANY, int((norms > 0).sum()) // 2):
            strongest = torch.argsort(excess[found], descending=True)
            found = found[strongest[: max(MANY // 2, len(found) // 2)]]
        self.entered[found] += 1
        return found

    def enter(self, w: Tensor, pull: Tensor, groups: Tensor) -> Tensor:
        """A step of these groups along their pulls, to its own minimum."""
        columns = self.blocks.columns(groups)
        norms = self.blocks.norms(pull)
        part = pull[:, columns]
        room = 1 - self.strengths[groups] / norms[groups]
        scale = torch.zeros_like(norms)
        scale[groups] = room
        curvature = self.blocks.sums(self.gram.diagonal()) + self.l2
        direction = part * self.blocks.spread(scale / curvature.clamp(min=torch.finfo(w.dtype).tiny))[columns]
        slope = (direction * part * self.blocks.spread(scale)[columns]).sum()
        bend = ((direction @ self.gram[columns][:, columns]) * direction).sum() + self.l2 * direction.square().sum()
        w = w.clone()
        w[:, columns] = direction * (slope / bend if bool(bend > 0) else 1.0)
        return w


class Face:
    """The groups that are not zero. Arrays here hold their columns only."""

    def __init__(self, gram: Tensor, moment: Tensor, blocks: Blocks, strength: Strength, groups: Tensor) -> None:
        self.columns = blocks.columns(groups)
        if blocks.alone:
            self.blocks = Blocks(torch.arange(len(groups), device=groups.device), blocks.weights[groups])
        else:
            position = torch.empty(blocks.count, dtype=torch.long, device=groups.device)
            position[groups] = torch.arange(len(groups), device=groups.device)
            self.blocks = Blocks(position[blocks.labels[self.columns]], blocks.weights[groups])
        self.strengths = strength.l1 * self.blocks.weights
        self.gram, self.l2 = gram[self.columns][:, self.columns], strength.l2
        if strength.l2:
            self.gram.diagonal().add_(strength.l2)
        self.moment = moment[:, self.columns]
        self.coarse = _COARSE * float(self.strengths.min())
        self.fine = _FINE * float(moment.abs().max())

    def descend(self, w: Tensor, limit: int, fine: bool) -> tuple[Tensor, int, bool]:
        """Newton steps until the gradient is zero or a group is.

        Returns:
            The new point, the number of steps, and whether the gradient is zero.
        """
        result, w, steps = torch.zeros_like(w), w[:, self.columns], 0
        pull = self.pull(w)
        error = self.error(w, pull)
        size, settled = float(error.abs().max()), False
        while True:
            settled = size <= (self.fine if fine else self.coarse)
            if settled or steps >= limit:
                break
            steps += 1
            moved, emptied = self.step(w, pull, error)
            if emptied:
                w = moved
                break
            pull = self.pull(moved)
            error = self.error(moved, pull)
            before, size = size, float(error.abs().max())
            if size > 0.5 * before and before <= _ROUNDING / _FINE * self.fine:
                w, settled = (moved if size < before else w), True
                break
            w = moved
        result[:, self.columns] = w
        return result, steps, settled

    def refined(self, w: Tensor, pull: Tensor, accurate: float) -> Tensor | None:
        """A Newton step from w, with a known negative gradient (targets, k) of least squares; zeros stay zero.

        Returns:
            The new point, or None where the error is less than is accurate.
        """
        result, here = torch.zeros_like(w), w[:, self.columns]
        error = self.error(here, pull[:, self.columns] - self.l2 * here)
        if not float(error.abs().max()) > accurate:
            return None
        result[:, self.columns] = here + newton_step(
            self.gram, self.blocks, self.strengths, here, self.blocks.norms(here), error
        )
        return result

    def pull(self, w: Tensor) -> Tensor:
        """The negative gradient of the quadratic part."""
        return torch.addmm(self.moment, w, self.gram, alpha=-1)

    def error(self, w: Tensor, pull: Tensor) -> Tensor:
        """The negative gradient."""
        return pull - w * self.blocks.spread(self.strengths / self.blocks.norms(w))

    def step(self, w: Tensor, pull: Tensor, error: Tensor) -> tuple[Tensor, bool]:
        """A new point, and whether groups became zero on the way there."""
        norms = self.blocks.norms(w)
        d = newton_step(self.gram, self.blocks, self.strengths, w, norms, error)
        inward = -self.blocks.sums((w * d).sum(0))
        when = torch.where(inward > 0, norms.square() / inward, torch.inf)
        crosses = when < 1
        if not bool(crosses.any()):
            moved = w + d
            if self.falls(w, moved, norms, pull, error):
                return moved, False
            for _ in range(_BACKWARDS):
                d = 0.5 * d
                moved = w + d
                if float(self.change(w, moved.unsqueeze(0), norms, pull)) < 0:
                    return moved, False
            return moved, False
        first = torch.sort(when[crosses]).values[:CROSSINGS]
        times = torch.cat([first, first.new_tensor(SHARES)])
        inside = times.unsqueeze(1) < when
        kept = inside if self.blocks.alone else inside[:, self.blocks.labels]
        points = torch.where(kept.unsqueeze(1), w + times.view(-1, 1, 1) * d, 0.0)
        points = torch.cat([points, (w + d).unsqueeze(0), (w + 0.5 * float(first[0]) * d).unsqueeze(0)])
        changes = self.change(w, points, norms, pull)
        best = int(changes.argmin())
        if not float(changes[best]) < 0:  # the nearest group is as good as zero
            best = 0
        return points[best] + 0.0, best < len(times) and not bool(inside[best].all())

    def falls(self, w: Tensor, moved: Tensor, norms: Tensor, pull: Tensor, error: Tensor) -> bool:
        """Whether a full step brings the gradient or the objective down."""
        if float(self.error(moved, self.pull(moved)).abs().max()) <= 0.5 * float(error.abs().max()):
            return True
        return float(self.change(w, moved.unsqueeze(0), norms, pull)) <= 0

    def change(self, w: Tensor, points: Tensor, norms: Tensor, pull: Tensor) -> Tensor:
        """Of the objective, from w to each of some points (m, targets, columns)."""
        d = points - w
        smooth = (d * (0.5 * (d @ self.gram) - pull)).sum((1, 2))
        return smooth + (self.blocks.norms(points) - norms) @ self.strengths


def newton_step(gram: Tensor, blocks: Blocks, strengths: Tensor, w: Tensor, norms: Tensor, error: Tensor) -> Tensor:
    """H⁻¹ times an error, both of shape (targets, columns), for the Hessian H at w, of whose groups none is zero."""
    curvature = strengths / norms
    spread = blocks.spread(curvature)
    unit = w / blocks.spread(norms)
    upper = gram + torch.diag(spread)
    if len(w) == 1:
        across = (1 - _LIFT) * spread * unit[0]
        if blocks.alone:
            upper.diagonal().sub_(across * unit[0])
        else:
            same = blocks.labels.unsqueeze(1) == blocks.labels
            upper -= torch.where(same, across.unsqueeze(1) * unit[0], 0.0)
        factor, failed = torch.linalg.cholesky_ex(upper)
        if not bool(failed):
            return torch.cholesky_solve(error.T, factor).T
        upper = gram + torch.diag(spread)
    factor, failed = torch.linalg.cholesky_ex(upper)
    if bool(failed):
        factor = torch.linalg.cholesky(upper + torch.diag(1e-12 * upper.diagonal()))
    inverse = torch.cholesky_inverse(factor)
    safe = error @ inverse
    if len(w) == 1:
        return safe
    coupled = inverse * (unit.T @ unit)
    if not blocks.alone:
        coupled = blocks.sums(blocks.sums(coupled).T)
    matrix = torch.diag(1 / ((1 - _LIFT) * curvature)) - coupled
    along = blocks.sums((unit * safe).sum(0))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        return safe
    more = torch.cholesky_solve(along.unsqueeze(1), factor).squeeze(1)
    return safe + (unit * blocks.spread(more)) @ inverse

"""Newton steps on the groups that are not zero: the exact minimiser of a quadratic with a penalty of group norms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchreg.linear.grouped import descent as block_descent
from torchreg.linear.grouped.blocks import Blocks
from torchreg.linear.grouped.hessian import Hessian
from torchreg.linear.lasso.problem import Strength
from torchreg.linear.quadratic.newton import CROSSINGS, MANY, SHARES, SLACK

_COARSE = 5e-2  # of the strength: an error of the gradient that is small enough to look for other groups
_CLOSE = 1e-5  # of it: what coordinate descent is asked for before Newton steps, which square it
_FINE = 1e-10  # of the largest moment
_ROUNDING = 1e-8  # from here on an error that Newton steps no longer lower is rounding
_SWEEPS = 30  # of coordinate descent, before Newton steps
_COLUMNS_PER_SWEEP = 10  # more sweeps for more columns: a Newton step of k columns costs as much as k/30 sweeps
_PER_STEP = 10  # of them, for one step that users allow
_QUICK = 0.1  # of the error may be left by a step for the next one to use the same Hessian
_BACKWARDS = 40  # halvings of a step
_TURNS = 10  # a group that has entered this often by now only moves by rounding


@dataclass(frozen=True)
class BlockMinimum:
    """A minimiser, the steps it took, and the last face on the way there."""

    w: Tensor
    steps: int
    face: Face | None


def minimise(
    gram: Tensor,
    moment: Tensor,
    blocks: Blocks,
    strength: Strength,
    *,
    start: Tensor | None = None,
    limit: int = 1000,
    coarse: bool = False,
) -> BlockMinimum:
    """The minimiser of ½·tr(WGWᵀ) − tr(BWᵀ) + l1·Σ_g v_g‖W_g‖ + ½·l2·‖W‖² over W of shape (targets, columns).

    Where no group is zero the penalty is smooth. Newton steps are taken on the groups that are not zero; those that
    would pass zero are stopped there, at the best of some points of the segment; at the minimiser all zeros that
    violate the optimality conditions, ‖(B − WG)_g‖ ≤ l1·v_g, enter in blocks, by an exact step along their gradients.
    On the CPU, where a compiler is found, sweeps of coordinate descent come first.

    Args:
        gram: G, symmetric and positive semidefinite, (k, k) in float64.
        moment: B, (targets, k).
        blocks: the groups of the k columns and their weights v.
        strength: l1 positive, l2 non-negative.
        start: where to begin, zero without.
        limit: the most steps; ten sweeps count as one, and take half of the limit at most.
        coarse: whether a twentieth of the strength is close enough to zero for the gradient, or some sweeps are enough.

    Source: Roth and Fischer, The Group-Lasso for generalized linear models: uniqueness of solutions and efficient
    algorithms, ICML 2008; Qin, Scheinberg and Goldfarb, Efficient block-coordinate descent algorithms for the group
    lasso, Mathematical Programming Computation, 2013.
    """
    moment = moment.masked_fill(gram.diagonal() == 0, 0)  # a constant column's is rounding
    w, steps = torch.zeros_like(moment) if start is None else start.clone(), 0
    if gram.device.type == "cpu" and block_descent.unavailable() is None:
        least = (_COARSE if coarse else _CLOSE) * strength.l1 * float(blocks.weights.min())
        most = min(-(-limit * _PER_STEP // 2), max(_SWEEPS, len(gram) // _COLUMNS_PER_SWEEP))
        w, sweeps = block_descent.sweep(gram, moment, blocks, strength, w, least, most)
        steps = math.ceil(sweeps / _PER_STEP)
        if coarse or steps >= limit:
            return BlockMinimum(w, steps, None)
    descent = _Descent(gram, moment, blocks, strength)
    w, taken = descent.run(w, limit - steps, coarse)
    return BlockMinimum(w, steps + taken, descent.face)


class _Descent:
    def __init__(self, gram: Tensor, moment: Tensor, blocks: Blocks, strength: Strength) -> None:
        self.gram, self.moment, self.blocks, self.strength = gram, moment, blocks, strength
        self.l2, self.strengths = strength.l2, strength.l1 * blocks.weights
        self.largest = float(moment.abs().max()) if moment.numel() else 0.0
        self.curvature = blocks.sums(gram.diagonal()) + strength.l2
        self.face: Face | None = None
        self.entered = torch.zeros(blocks.count, dtype=torch.int32, device=moment.device)

    def run(self, w: Tensor, limit: int, coarse: bool) -> tuple[Tensor, int]:
        """Descend from w, and let groups in, until none wants to enter. The minimiser and the steps."""
        steps, fine = 0, False
        while True:
            settled = False
            while not settled:
                alive = self.blocks.norms(w) > 0
                if not bool(alive.any()):
                    break
                groups = torch.nonzero(alive).squeeze(1)
                if self.face is None or not torch.equal(groups, self.face.groups):
                    self.face = Face(self.gram, self.moment, self.blocks, self.strength, groups)
                w, taken, settled = self.face.descend(w, limit - steps, fine)
                steps += taken
                if steps >= limit:
                    return w, steps
            pull = self.pull(w)
            entering = self.entering(w, pull)
            if len(entering):
                w, steps = self.enter(w, pull, entering), steps + 1
                fine = False
            elif fine or coarse or not settled:
                return w, steps
            else:
                fine = True

    def pull(self, w: Tensor) -> Tensor:
        """The negative gradient of the quadratic part."""
        return torch.addmm(self.moment, w, self.gram, alpha=-1) - self.l2 * w

    def entering(self, w: Tensor, pull: Tensor) -> Tensor:
        """Groups at zero whose pull exceeds their strength, strongest first; at most half of them if they are many."""
        norms = self.blocks.norms(w)
        excess = self.blocks.norms(pull) - self.strengths
        excess = excess.masked_fill((norms > 0) | (self.entered >= _TURNS) | (self.curvature <= 0), 0)
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
        direction = part * self.blocks.spread(scale / self.curvature)[columns]
        slope = (direction * part * self.blocks.spread(scale)[columns]).sum()
        bend = ((direction @ self.gram[columns][:, columns]) * direction).sum() + self.l2 * direction.square().sum()
        w = w.clone()
        w[:, columns] = direction * (slope / bend if bool(bend > 0) else 1.0)
        return w


@dataclass(frozen=True)
class _Point:
    """Coefficients of a face with their groups' norms, the pull (B − WG), the negative gradient and its size."""

    w: Tensor
    norms: Tensor
    pull: Tensor
    error: Tensor
    size: float
    emptied: bool = False
    """Whether groups became zero on the way here; only w is known then."""


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
        self.groups = groups
        self.hessian: Hessian | None = None

    def descend(self, w: Tensor, limit: int, fine: bool) -> tuple[Tensor, int, bool]:
        """Newton steps until the gradient is zero or a group is; one Hessian serves as long as it does so quickly.

        Returns:
            The new point, the number of steps, and whether the gradient is zero.
        """
        result, here, steps, settled = torch.zeros_like(w), self.at(w[:, self.columns]), 0, False
        while True:
            settled = here.size <= (self.fine if fine else self.coarse)
            if settled or steps >= limit:
                break
            steps += 1
            fresh = self.hessian is None
            moved = self.step(here)
            if moved.emptied:
                here, self.hessian = moved, None
                break
            if fresh and moved.size > 0.5 * here.size and here.size <= _ROUNDING / _FINE * self.fine:
                here, settled = (moved if moved.size < here.size else here), True
                break
            if moved.size > _QUICK * here.size:
                self.hessian = None
            here = moved
        result[:, self.columns] = here.w
        return result, steps, settled

    def refined(self, w: Tensor, pull: Tensor, accurate: float) -> Tensor | None:
        """A Newton step from w, with a known negative gradient (targets, k) of least squares; zeros stay zero.

        Returns:
            The new point, or None where the error is less than is accurate.
        """
        result, here = torch.zeros_like(w), w[:, self.columns]
        norms = self.blocks.norms(here)
        error = self.error(here, pull[:, self.columns] - self.l2 * here, norms)
        if not float(error.abs().max()) > accurate:
            return None
        if self.hessian is None:
            self.hessian = Hessian(self.gram, self.blocks, self.strengths, here, norms)
        result[:, self.columns] = here + self.hessian.solve(error)
        return result

    def at(self, w: Tensor) -> _Point:
        """A point whose groups are not zero."""
        pull = torch.addmm(self.moment, w, self.gram, alpha=-1)
        norms = self.blocks.norms(w)
        error = self.error(w, pull, norms)
        return _Point(w, norms, pull, error, float(error.abs().max()))

    def error(self, w: Tensor, pull: Tensor, norms: Tensor) -> Tensor:
        """The negative gradient."""
        return pull - w * self.blocks.spread(self.strengths / norms)

    def step(self, here: _Point) -> _Point:
        """The next point; a full step brings the gradient or the objective down, or a shorter one the objective."""
        w, norms = here.w, here.norms
        if self.hessian is None:
            self.hessian = Hessian(self.gram, self.blocks, self.strengths, w, norms)
        d = self.hessian.solve(here.error)
        inward = -self.blocks.sums((w * d).sum(0))
        when = torch.where(inward > 0, norms.square() / inward, torch.inf)
        crosses = when <= 1
        if not bool(crosses.any()):
            moved = self.at(w + d)
            for _ in range(_BACKWARDS):
                if moved.size <= 0.5 * here.size or float(self.change(here, moved.w.unsqueeze(0))) <= 0:
                    break
                self.hessian, d = None, 0.5 * d
                moved = self.at(w + d)
            return moved
        self.hessian = None
        first = torch.sort(when[crosses]).values[:CROSSINGS]
        times = torch.cat([first, first.new_tensor(SHARES)])
        inside = times.unsqueeze(1) < when
        kept = inside if self.blocks.alone else inside[:, self.blocks.labels]
        points = torch.where(kept.unsqueeze(1), w + times.view(-1, 1, 1) * d, 0.0)
        points = torch.cat([points, (w + 0.5 * float(first[0]) * d).unsqueeze(0)])
        changes = self.change(here, points)
        best = int(changes.argmin())
        if not float(changes[best]) < 0:  # the nearest group is as good as zero
            best = 0
        if best < len(times) and not bool(inside[best].all()):
            return replace(here, w=points[best] + 0.0, emptied=True)
        return self.at(points[best])

    def change(self, here: _Point, points: Tensor) -> Tensor:
        """Of the objective, from here to each of some points (m, targets, columns)."""
        d = points - here.w
        smooth = (d * (0.5 * (d @ self.gram) - here.pull)).sum((1, 2))
        return smooth + (self.blocks.norms(points) - here.norms) @ self.strengths

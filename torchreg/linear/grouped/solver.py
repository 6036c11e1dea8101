"""Solutions of problems with group norms: a working set of groups, Newton steps on it, and the last digits from X."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg.linear.grouped.blocks import Blocks
from torchreg.linear.grouped.newton import Face, minimise
from torchreg.linear.grouped.problem import BlockProblem
from torchreg.linear.lasso.problem import NOT_FINITE, Problem, Strength
from torchreg.linear.lasso.solution import ACCURATE
from torchreg.linear.lasso.solver import is_narrow, solve
from torchreg.linear.lasso.working_set import WorkingSet
from torchreg.linear.quadratic.threads import threads_for

_FEWEST = 50  # columns that may enter at a time
_RATIO = 2.5  # of intermediate strengths
_NEAR = 0.9  # of the strength: a pull from which on a group may enter ahead of time
_LEFT = 1e-6  # of ‖Y‖²: a residual below is a difference of nearly equal numbers where it comes from the Gram matrix
_AT_ONCE = 0.7  # of the strength before: from here on its solution is near enough to look for the new one at once
_REFINEMENTS = 4
_ON_THE_WAY = 1000  # steps at most for an intermediate strength


@dataclass(frozen=True)
class BlockSolution:
    """Coefficients (targets, features) in float64, with their duality gap and the number of Newton steps."""

    w: Tensor
    gap: float
    steps: int


def solve_blocks(
    problem: BlockProblem, strengths: list[Strength], *, limit: int = 1000, start: Tensor | None = None
) -> Iterator[BlockSolution]:
    """Solutions for strengths in falling order, each from the one before.

    Args:
        problem: what is minimised.
        strengths: at least one.
        limit: the most Newton steps for one strength, not counting those at larger strengths on the way there.
        start: coefficients (targets, features) to begin with.

    Raises:
        ValueError: if the data are too large for float64.
    """
    if not (problem.moment.isfinite().all() and math.isfinite(problem.power)):
        raise ValueError(NOT_FINITE)
    state = _State(problem, start, len(strengths))
    for strength in strengths:
        if strength.l1 > 0:
            yield state.solve(strength, limit)
        else:
            yield _apart(problem, strength, limit)


def _apart(problem: BlockProblem, strength: Strength, limit: int) -> BlockSolution:
    """Without group norms: each target on its own, as in ridge regression or least squares."""
    found = [solve(Problem(problem.design, z), [strength], limit=limit)[0] for z in problem.target]
    w = torch.stack([f.full(problem.design.features) for f in found])
    return BlockSolution(w, sum(f.gap for f in found), max(f.steps for f in found))


class _All:
    """All columns, as a working set that is full from the beginning, and has no copy of them."""

    def __init__(self, problem: BlockProblem) -> None:
        self._problem = problem
        self.index = torch.arange(problem.design.features, device=problem.design.device)
        self.gram, self.moment = problem.design.gram(), problem.moment
        if not bool(self.gram.isfinite().all()):
            raise ValueError(NOT_FINITE)

    def __len__(self) -> int:
        return len(self.index)

    def residuals(self, w: Tensor) -> Tensor:
        """Y − WZᵀ."""
        return self._problem.target - self._problem.design.fitted(w)


class _State:
    """Coefficients of the columns that have been needed so far, and the pull at all columns."""

    def __init__(self, problem: BlockProblem, start: Tensor | None, strengths: int) -> None:
        self.problem = problem
        device, count = problem.design.device, problem.blocks.count
        self._local = torch.empty(count, dtype=torch.long, device=device)
        self._inside = torch.zeros(count, dtype=torch.bool, device=device)
        self._groups = torch.empty(0, dtype=torch.long, device=device)
        self.w = problem.target.new_zeros(len(problem.target), 0)
        self.before = problem.largest
        self.face: Face | None = None
        self.working: WorkingSet | _All
        self._by_gram = is_narrow(problem.design, strengths) and strengths > 1
        if is_narrow(problem.design, strengths):
            self.working = _All(problem)
            self.enter(torch.arange(count, device=device))
        else:
            self.working = WorkingSet(problem)
        if start is not None:
            self.enter(torch.nonzero(problem.blocks.norms(start) > 0).squeeze(1))
            self.w = start[:, self.working.index]
            self.before = 0.0
        self.check()

    @property
    def blocks(self) -> Blocks:
        """Of the columns inside."""
        everything = self.problem.blocks
        if everything.alone:
            return Blocks(torch.arange(len(self._groups), device=self.w.device), everything.weights[self._groups])
        return Blocks(self._local[everything.labels[self.working.index]], everything.weights[self._groups])

    def enter(self, groups: Tensor) -> None:
        """Take in groups that are not inside yet."""
        groups = groups[~self._inside[groups]]
        if not len(groups):
            return
        self._local[groups] = torch.arange(len(groups), device=groups.device) + len(self._groups)
        self._inside[groups] = True
        self._groups = torch.cat([self._groups, groups])
        if isinstance(self.working, WorkingSet):
            self.working.add(self.problem.blocks.columns(groups))
        self.w = torch.nn.functional.pad(self.w, (0, len(self.working) - self.w.shape[1]))

    def check(self) -> None:
        """The pull at all columns, and what else a certificate takes, by one product with X or the Gram matrix."""
        problem, w, n = self.problem, self.w, max(1, self.problem.design.samples)
        self.energy = self.agreement = problem.power
        self.pull = problem.moment
        if not bool(w.any()):
            return
        if self._by_gram:
            product, aligned = w @ self.working.gram, float((w * problem.moment).sum())
            self.energy = problem.power - 2 * aligned + float((w * product).sum())
            self.agreement, self.pull = problem.power - aligned, problem.moment - product
        if not self._by_gram or self.energy <= _LEFT * problem.power:
            residual = self.working.residuals(w)
            self.energy = float(residual.square().sum()) / n
            self.agreement = float((residual * problem.target).sum()) / n
            self.pull = problem.design.correlations(residual)
        constant = self.working.index[self.working.gram.diagonal() == 0]
        if len(constant):
            self.pull = self.pull.index_fill(1, constant, 0)

    def full(self) -> Tensor:
        """Coefficients of all columns."""
        return self.pull.new_zeros(self.pull.shape).index_copy_(1, self.working.index, self.w)

    def gap(self, strength: Strength) -> float:
        """The duality gap of the state that was checked."""
        return self.problem.gap(self.energy, self.agreement, self.pull, self.full(), strength)

    def solve(self, strength: Strength, limit: int) -> BlockSolution:
        steps = on_the_way = 0
        stage = self.next(strength)
        while stage is not strength:
            on_the_way += self.descend(stage, 2 * stage.l1 - self.before, _ON_THE_WAY, coarse=True)
            self.check()
            self.before, stage = stage.l1, self.next(strength)
        least = 2 * stage.l1 - self.before
        coarse = strength.l1 < _AT_ONCE * self.before
        while steps < limit:
            steps += self.descend(strength, least, limit - steps, coarse)
            self.check()
            least = strength.l1 + self.problem.rounding
            violated = bool((self.outside() > least).any())
            if not violated and not coarse:
                break
            coarse = violated
        self.before = strength.l1
        gap = self.refine(strength) if steps < limit else self.gap(strength)
        return BlockSolution(self.full(), gap, on_the_way + steps)

    def next(self, strength: Strength) -> Strength:
        """The next smaller strength on the way to this one."""
        if not 0 < strength.l1 < self.before / _RATIO:
            return strength
        grow = self.before / _RATIO / strength.l1
        return Strength(strength.l1 * grow, strength.l2 * grow)

    def outside(self) -> Tensor:
        """Forces of the groups outside."""
        return self.problem.forces(self.pull).masked_fill(self._inside, 0)

    def descend(self, strength: Strength, least: float, limit: int, coarse: bool = False) -> int:
        """Let groups outside in that pull at least this strongly, and minimise on those inside. The number of steps."""
        forces = self.outside()
        found = torch.nonzero(forces >= max(least, _NEAR * strength.l1)).squeeze(1)
        held = int(torch.count_nonzero(self.blocks.norms(self.w)))
        most = max(_FEWEST * self.problem.blocks.count // max(1, self.problem.design.features), held, 5)
        if len(found) > most:
            found = found[torch.topk(forces[found], most).indices]
        self.enter(found)
        if not len(self._groups):
            return 0
        gram, moment = self.working.gram, self.working.moment
        with threads_for(len(self.working)):
            best = minimise(gram, moment, self.blocks, strength, start=self.w, limit=limit, coarse=coarse)
        self.w, self.face = best.w, best.face
        return best.steps

    def refine(self, strength: Strength) -> float:
        """Newton steps with a gradient that is not taken from the Gram matrix. The gap."""
        gap = self.gap(strength)
        accurate = ACCURATE * float(self.problem.moment.abs().max())
        for _ in range(_REFINEMENTS):
            w, face = self.w, self.face
            if face is None or not bool(w.any()):
                break
            moved = face.refined(w, self.pull[:, self.working.index], accurate)
            if moved is None:
                break
            self.w = moved
            self.check()
            finer = self.gap(strength)
            if not finer < gap:
                self.w = w
                self.check()
                break
            gap = finer
        return gap

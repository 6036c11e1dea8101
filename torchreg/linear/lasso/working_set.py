"""Wide problems: the few columns that matter, found by their violations of the optimality conditions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from torchreg.linear.lasso.descent import descend
from torchreg.linear.lasso.problem import NOT_FINITE, Fit, Problem, Strength, duality_gaps
from torchreg.linear.lasso.solution import ACCURATE, Solution, errors, refined

_FEWEST, _LONG = 100, 750
"""Columns that may enter at a time; three quarters of that where they have more samples, since products cost more."""
_ROOMS = {"cpu": (1000, 4000)}
"""Columns for which a Gram matrix has room at first, and then, before it doubles. On the CPU memory that is not written
to costs nothing, and further copies would; but what is written far apart takes longer."""
_ROOM = (1000,)  # likewise elsewhere
_CHUNK = 4
_LONGEST_CHUNK = 8
_ON_THE_WAY = 1000  # steps at most for an intermediate strength
_FIRST = 6.0  # ratio of the largest strength to the first intermediate one
_AT_ONCE = 1.25  # ratio of an intermediate strength to the last one, up to which it is left out
_BY_STEPS = ((6, 10.0), (15, 1.6), (math.inf, 1.35))  # ratio to the next one, by the Newton steps at the last one
_BY_MISSED = ((0.25, 10.0), (0.5, 4.0), (2.0, 2.0), (5.0, 1.6), (math.inf, 1.35))  # by its violators over its non-zeros
_NEAR = 0.95  # of the strength: a correlation from which on a column may enter ahead of time
_NEAR_EXPECTED = 0.97  # likewise a correlation that is expected there
_NEAR_VIOLATORS = 0.9  # likewise with violators: it might be the next one, and cost one more product with X
_DEEP = 8  # columns of X for each of the working set: with fewer a product with X costs less than what it tells
_SPREAD = 3.0  # standard deviations by which pulls may have changed when not all columns are read
_SIMILAR = 0.7  # change of a residual over its norm, up to which it is much the same
_STRONG = 0.93  # standard deviations that 35 % of all pulls exceed
_FAINT = 0.4  # and 70 %: where that many columns are to be read, all are


class WorkingSet:
    """Columns that have been needed so far, with their Gram matrix, which grows."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.index = torch.empty(0, dtype=torch.long, device=problem.design.device)
        self.inside = torch.zeros(problem.design.features, dtype=torch.bool, device=problem.design.device)
        self._columns = problem.design.columns()
        self._gram = torch.empty(0, 0, dtype=torch.float64, device=problem.design.device)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def gram(self) -> Tensor:
        """Of the columns inside."""
        return self._gram[: len(self), : len(self)]

    @property
    def moment(self) -> Tensor:
        """Of the columns inside."""
        return self.problem.moment[..., self.index]

    @property
    def portion(self) -> int:
        """How many columns may enter at a time, unless more have coefficients already."""
        return _FEWEST * 3 // 4 if self.problem.design.samples > _LONG else _FEWEST

    @property
    def is_small(self) -> bool:
        """Whether it pays to look at few of X's columns at a time, which the design has to allow."""
        design = self.problem.design
        return design.selective and 0 < _DEEP * len(self) < design.features

    def add(self, index: Tensor) -> None:
        """Take columns in that are not inside yet.

        Raises:
            ValueError: if they are too large for float64.
        """
        if not len(index):
            return
        start, end = len(self), len(self) + len(index)
        if end > len(self._gram):
            room = next((r for r in _ROOMS.get(index.device.type, _ROOM) if end <= r), 2 * end)
            room = min(room, self.problem.design.features)
            grown = self._gram.new_empty(room, room)
            grown[:start, :start] = self._gram[:start, :start]
            self._gram = grown
        inner = self._columns.add(index, self._gram[start:end, :end])
        if not bool(inner[:, start:].diagonal().isfinite().all()):  # by Cauchy and Schwarz none else is larger
            raise ValueError(NOT_FINITE)
        self._gram[:start, start:end] = inner[:, :start].T
        self.index = torch.cat([self.index, index])
        self.inside[index] = True

    def forces(self, pull: Tensor) -> Tensor:
        """How strongly each column outside pulls at its coefficient of zero."""
        return (pull if self.problem.positive else pull.abs()).masked_fill(self.inside, 0)

    def padded(self, w: Tensor) -> Tensor:
        """Coefficients of the first columns with zeros for those that came later."""
        return torch.nn.functional.pad(w, (0, len(self) - len(w)))

    def solve(self, w: Tensor, strengths: Sequence[Strength], limit: int) -> tuple[list[Tensor], list[int]]:
        """The minimisers over the columns inside, each from the one before, and the steps that they took."""
        start, positive = self.padded(w), self.problem.positive
        found = descend(self.gram, self.moment, strengths, start=start, positive=positive, limit=limit)
        return [f.w for f in found], [f.steps for f in found]

    def residuals(self, w: Tensor) -> Tensor:
        """z − Zw for rows w of coefficients."""
        return self.problem.target - self._columns.combine(w)

    def refined(self, w: Tensor, strength: Strength) -> tuple[Tensor, Tensor]:
        """`w` without the rounding of the Gram matrix, as far as X itself allows, and its residual z − Zw."""
        support = torch.nonzero(w).squeeze(1)
        residual = self.residuals(w.unsqueeze(0))
        finer, was = refined(self.gram, w, self._pull(residual, support), strength, self.problem.positive)
        if finer is None:
            return w, residual
        finer_residual = self.residuals(finer.unsqueeze(0))
        after = errors(finer, self._pull(finer_residual, support), strength)
        return (finer, finer_residual) if float(after.abs().max()) <= was else (w, residual)

    def _pull(self, residual: Tensor, places: Tensor) -> Tensor:
        """Zᵀr/n in some places, zero elsewhere, for a residual r of shape (1, n)."""
        pull = residual.new_zeros(len(self))
        pull[places] = self._columns.correlations(residual, places)[0]
        return pull


class Check:
    """The optimality conditions of some coefficients over all columns, by one product with X if pulls are not known.

    Args:
        working: the columns that have coefficients.
        w: coefficients, one vector for each strength.
        strengths: as many.
        residuals: z − Zw, if they are known.
        pull: Zᵀ(z − Zw)/n, likewise.
        seen: z − Zw when all columns were read, if that is not now.
    """

    def __init__(
        self,
        working: WorkingSet,
        w: list[Tensor],
        strengths: list[Strength],
        residuals: Tensor | None = None,
        pull: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> None:
        self.working, self.w, self.strengths = working, torch.stack(w), strengths
        self.residuals = working.residuals(self.w) if residuals is None else residuals
        self._l1 = self.residuals.new_tensor([s.l1 for s in strengths]).unsqueeze(1)
        self._seen = self.residuals if seen is None else seen
        if pull is not None:
            self.pull = pull
        elif self.w.shape[1]:
            self.pull = working.problem.design.correlations(self.residuals)
        else:
            self.pull = working.problem.moment.expand(len(self.w), -1)

    def followed_by(self, w: Tensor, strength: Strength) -> Check | None:
        """A check of other coefficients that reads few columns, those that are likely to violate their conditions.

        The others keep their pulls, so that it certifies nothing. None where these are not few.

        Pulls of columns that have no part in the residual, or in its change, are as good as normally distributed, with
        a standard deviation of the column's norm times that of the residual, or of its change, over n√n. Where the
        residual is much the same, the third of the columns that pull strongest holds nearly all violators; those that
        come to light with all the others are few.
        """
        working, problem = self.working, self.working.problem
        if not working.is_small:
            return None
        residuals = working.residuals(w.unsqueeze(0))
        unit = math.sqrt(float(working.gram.diagonal().mean())) / problem.design.samples
        was, change = float(self._seen.norm()), float((residuals - self._seen).norm())
        least = strength.l1 - _SPREAD * unit * change
        if change < _SIMILAR * was:
            least = min(max(least, _STRONG * unit * was), strength.l1)
        if least <= _FAINT * unit * was:
            return None
        near = torch.nonzero((self.pull[0] if problem.positive else self.pull[0].abs()) >= least).squeeze(1)
        pull = self.pull.clone()
        pull[0, near] = problem.design.some_correlations(residuals[0], near)
        return Check(working, [w], [strength], residuals, pull, self._seen)

    @cached_property
    def forces(self) -> Tensor:
        """`WorkingSet.forces` of each, for the columns that are inside when they are first asked for."""
        return self.working.forces(self.pull)

    def violated(self) -> list[bool]:
        """Whether any column outside should be inside, for each."""
        slack = self._l1 + self.working.problem.rounding
        return (self.forces > slack).any(1).tolist()

    def gaps(self) -> list[float]:
        """The duality gap of each."""
        problem, n = self.working.problem, max(1, self.working.problem.design.samples)
        active = self.pull
        if any(s.l2 for s in self.strengths):
            l2 = self._l1.new_tensor([s.l2 for s in self.strengths]).unsqueeze(1)
            active = active.index_add(1, self.working.index, -l2 * self.w)
        fit = Fit(
            self.residuals.square().sum(1) / n,
            self.residuals @ problem.target / n,
            self.w.abs().sum(1),
            self.w.square().sum(1),
            self.pull,
        )
        return duality_gaps(fit, active, self.strengths, n, problem.positive)


class _Course:
    """Where the pulls of a path are heading: between its kinks they are linear in the strength."""

    def __init__(self, l1: float, pull: Tensor) -> None:
        self.l1, self.pull = l1, pull
        self.slope: Tensor | None = None

    def reach(self, l1: float, pull: Tensor) -> None:
        """Note the pulls at a smaller strength."""
        if l1 < self.l1:
            self.slope = (pull - self.pull) / (l1 - self.l1)
        self.l1, self.pull = l1, pull

    def prepare(self, working: WorkingSet, l1: float, nonzero: int) -> None:
        """Let columns in that may come to matter down to this strength."""
        if self.slope is None:
            least, pull = max(2 * l1 - self.l1, _NEAR * l1), self.pull
        else:
            least, pull = _NEAR_EXPECTED * l1, self.pull + (l1 - self.l1) * self.slope
        _enter(working, working.forces(pull), least, max(4 * _FEWEST, nonzero))


def solve_path(problem: Problem, strengths: list[Strength], limit: int, start: Tensor | None) -> Iterator[Solution]:
    """Solutions for falling strengths, each from the one before, checked for several strengths at a time.

    Before a chunk of strengths the columns enter whose correlations with the residual, drawn on in a straight line from
    the last two strengths, come near the smallest one. Where there is no line yet, it is those that the sequential
    strong rule can't rule out, whose correlation is at least 2·l1 − l1 of the strength before, and of these only those
    near l1 itself. Most of the others never come to matter, and their Gram matrix costs more than the checks that find
    the few that do.

    Source: Tibshirani et al., Strong rules for discarding predictors in lasso-type problems, JRSS B 2012; Efron et al.,
    Least angle regression, Annals of Statistics, 2004; Qian et al., A fast and scalable framework for large-scale and
    ultrahigh-dimensional sparse regression, PLOS Genetics 2020.
    """
    working = WorkingSet(problem)
    w, check = _begin(working, start, strengths[0])
    course = _Course(problem.largest, check.pull[0])
    done, size, steps = 0, _CHUNK, [0] * len(strengths)
    while done < len(strengths):
        chunk = strengths[done : done + size]
        course.prepare(working, chunk[-1].l1, _nonzero(w))
        found, taken = working.solve(w, chunk, limit)
        for i, more in enumerate(taken):
            steps[done + i] += more
        check = Check(working, found, chunk)
        gaps, violated = check.gaps(), check.violated()
        accepted = 0
        while accepted < len(chunk) and not (violated[accepted] and steps[done + accepted] < limit):
            yield Solution(working.index, found[accepted], gaps[accepted], steps[done + accepted])
            w = found[accepted]
            accepted += 1
        for i in range(max(0, accepted - 2), accepted):
            course.reach(chunk[i].l1, check.pull[i])
        if accepted < len(chunk):
            _enter_violators(working, check, accepted)
            size = max(2, size - 1)
        else:
            size = min(size + 1, _LONGEST_CHUNK)
        done += accepted


def solve_one(problem: Problem, strength: Strength, limit: int, start: Tensor | None) -> Solution:
    """The solution for one strength, by way of larger ones unless a start is given: the limit is for the last one only.

    On correlated designs a working set that is filled at once for a small strength has solutions far from sparse, which
    cost as much as they mislead; a sequence of strengths keeps the set close to the supports.
    """
    working = WorkingSet(problem)
    w, check = _begin(working, start, strength)
    steps = on_the_way = 0
    if start is not None and check.gaps()[0] <= ACCURATE * problem.power and not check.violated()[0]:
        return Solution(working.index, w, check.gaps()[0], 0)
    before = problem.largest
    stage = strength if start is not None else _next(before, strength, _FIRST)
    while True:
        _enter(
            working, check.forces[0], max(2 * stage.l1 - before, _NEAR * stage.l1), max(working.portion, _nonzero(w))
        )
        on_the_way += steps
        (w,), (steps,) = working.solve(w, [stage], limit if stage is strength else _ON_THE_WAY)
        if stage is strength:
            break
        check = check.followed_by(w, stage) or Check(working, [w], [stage])
        before, stage = stage.l1, _next(stage.l1, strength, _ratio(check, steps))
    while True:
        checked = check.followed_by(w, strength)
        if checked is None and working.is_small and check.strengths[0] is not strength:
            checked = Check(working, [w], [strength])  # after so long a way some are surely missing
        if checked is None or not checked.violated()[0] or steps >= limit:
            w, residual = working.refined(w, strength)
            checked = Check(working, [w], [strength], residual)
            if not checked.violated()[0] or steps >= limit:
                break
        check = checked
        _enter_violators(working, check, 0)
        (w,), (taken,) = working.solve(w, [strength], limit - steps)
        steps += taken
    return Solution(working.index, w, checked.gaps()[0], on_the_way + steps)


def _begin(working: WorkingSet, start: Tensor | None, strength: Strength) -> tuple[Tensor, Check]:
    """Coefficients of a working set that holds the start's support, and their check."""
    if start is None:
        target = working.problem.target
        w = target.new_zeros(0)
        return w, Check(working, [w], [strength], target.unsqueeze(0))
    support = torch.nonzero(start).squeeze(1)
    working.add(support)
    w = start[support]
    return w, Check(working, [w], [strength])


def _ratio(check: Check, steps: int) -> float:
    """To the next intermediate strength: a small one where the last one took many steps, or missed many columns."""
    missed = int((check.forces[0] > check.strengths[0].l1).sum()) / max(1, _nonzero(check.w[0]))
    by_steps = next(ratio for most, ratio in _BY_STEPS if steps <= most)
    return min(by_steps, next(ratio for most, ratio in _BY_MISSED if missed <= most))


def _next(before: float, strength: Strength, ratio: float) -> Strength:
    """The strength on the way to this one that is smaller than the one before by this ratio."""
    if not 0 < _AT_ONCE * strength.l1 < before / ratio:
        return strength
    grow = before / ratio / strength.l1
    return Strength(strength.l1 * grow, strength.l2 * grow)


def _nonzero(w: Tensor) -> int:
    return int(torch.count_nonzero(w))


def _enter(working: WorkingSet, forces: Tensor, least: float, most: int) -> None:
    """Let columns outside in that pull at least this strongly, the strongest first."""
    found = torch.nonzero((forces >= least) & ~working.inside).squeeze(1)
    if len(found) > most:
        found = found[torch.topk(forces[found], most).indices]
    working.add(found)


def _enter_violators(working: WorkingSet, check: Check, row: int) -> None:
    """Let violators in, and columns that are near to be: few at a time where it costs little to look again."""
    forces, held = check.forces[row], _nonzero(check.w[row])
    least = _NEAR_VIOLATORS * (check.strengths[row].l1 + working.problem.rounding)
    _enter(working, forces, least, max(working.portion, held // 3 if working.is_small else held))

"""Shrinkage that a row has missed, of many steps without a gradient as one: closed forms.

A closed form keeps a few running totals over all steps of a table. What a row has missed follows from the totals now
and those at which it was settled, whatever the learning rates and strength scales were in between.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchreg.penalties import GroupLasso, Penalty
from torchreg.penalties.grouped import is_group_shrinkage, remaining
from torchreg.penalties.separable import _Shrinkage, is_shrinkage, soft_threshold

Totals = list[float]

_WORN = 1e30
"""Totals that grow exponentially start again beyond this: what is small beside them would be lost."""
_STEADY = 1.25
"""How far a step may be from the mean of those since all rows were settled, where it enters to second order."""


class Strengths(NamedTuple):
    """The strengths of Σ|w|, Σw² and, for each row, ‖w‖₂."""

    l1: float = 0.0
    l2: float = 0.0
    group: float = 0.0


class Uniform:
    """One step τ for all weights: |w|, or a row's norm, goes to max(a·|w| − τλ, 0)/(1 + 2τ·l2); a is what is kept.

    With P = Π a/(1 + 2τ·l2) and S = Σ τλ/(a·P), the P being that before the step, n − m steps take a modulus x to
    (P_n/P_m)·max(x − P_m(S_n − S_m), 0).
    """

    start: Totals = [0.0, 1.0]  # noqa: RUF012

    def must_restart(self, totals: Totals, step: float, strengths: Strengths) -> bool:
        """Whether all rows have to be settled before the next step is added."""
        return totals[0] > _WORN or totals[1] < 1 / _WORN

    def after(self, totals: Totals, step: float, keep: float, strengths: Strengths) -> Totals:
        """The totals after one more step τ, which keeps the part ``keep`` of a weight before it shrinks it."""
        total, product = totals
        l1, l2, group = strengths
        return [total + step * (l1 + group) / (keep * product), product * keep / (1 + 2 * step * l2)]

    def settled(self, w: Tensor, since: Tensor, now: Tensor, strengths: Strengths, metric: Tensor | None) -> Tensor:
        """Rows ``w`` that were settled at the totals ``since`` (a row each), as they are at ``now``."""
        before = since[:, 1]
        threshold, factor = column(before * (now[0] - since[:, 0]), w), column(now[1] / before, w)
        if strengths.group:
            norms = torch.linalg.vector_norm(w.flatten(1), dim=1)
            return (w * (remaining(column(norms, w), threshold) * factor)).add_(0)
        if strengths.l1:
            w = soft_threshold(w, threshold)
        return (w * factor).add_(0)


class Diagonal:
    """A step c·x for each weight, where x stays as long as there is no gradient: Adam's 1/(√v̂ + ε).

    n steps divide a weight by D = Π(1 + 2c·x·l2), after they have taken Σ c·x·l1 from its modulus, or with l2 > 0
    l1/(2·l2)·(D − 1). log D = n·log(1 + q·c̄) − ½(q/(1 + q·c̄))²·Σ(c − c̄)², q = 2x·l2, is exact for equal steps; the
    next order is negligible as long as they differ little.
    """

    start: Totals = [0.0, 0.0, 0.0]  # noqa: RUF012

    def must_restart(self, totals: Totals, step: float, strengths: Strengths) -> bool:
        """Whether all rows have to be settled before the next step is added."""
        if not strengths.l2 or not step or not totals[1]:
            return False
        mean = totals[0] / totals[1]
        return not mean / _STEADY <= step <= mean * _STEADY

    def after(self, totals: Totals, step: float, keep: float, strengths: Strengths) -> Totals:
        """The totals after one more step c."""
        return totals if not step else [totals[0] + step, totals[1] + 1, totals[2] + step * step]

    def settled(self, w: Tensor, since: Tensor, now: Tensor, strengths: Strengths, metric: Tensor | None) -> Tensor:
        """Rows ``w`` that were settled at the totals ``since`` (a row each), as they are at ``now``."""
        assert metric is not None
        total, count, squares = (now - since).unbind(1)
        if not strengths.l2:
            return soft_threshold(w, metric * column(total * strengths.l1, w))
        count = count.clamp_min(1)
        mean, spread = total / count, (squares - total * total / count).clamp_min(0)
        pull = metric * (2 * strengths.l2)
        at_mean = pull * column(mean, w)
        growth = column(count, w) * at_mean.log1p() - (pull / (1 + at_mean)).square() * column(spread / 2, w)
        growth = growth.expm1()
        if strengths.l1:
            w = soft_threshold(w, growth * (strengths.l1 / (2 * strengths.l2)))
        return (w / (1 + growth)).add_(0)


ClosedForm = Uniform | Diagonal
UNIFORM, DIAGONAL = Uniform(), Diagonal()


def strengths_of(penalty: Penalty | None, p: Tensor, form: ClosedForm) -> Strengths:
    """The strengths of a penalty whose missed steps have a closed form on the rows of ``p``.

    Raises:
        TypeError: if there is none.
    """
    if penalty is None:
        return Strengths()
    known = is_shrinkage(penalty) or (isinstance(penalty, GroupLasso) and is_group_shrinkage(penalty))
    why = _why_not_by_rows(penalty, p) if known else "its proximal operator has no closed form of many steps"
    if not why and penalty.is_grouped and form is DIAGONAL:
        why = "its groups are shrunk in Adam's metric"
    if why:
        raise TypeError(
            f"{penalty.type_name} can't be put on rows that get no gradient: {why}. L1, L2 and ElasticNet of one "
            "strength can, and GroupLasso of rows where all weights have one step; or build the embedding with "
            "sparse=False."
        )
    if isinstance(penalty, GroupLasso):
        return Strengths(group=float(penalty.strength) * (_size(p) ** 0.5 if penalty.group_weight == "sqrt" else 1.0))
    assert isinstance(penalty, _Shrinkage)
    return Strengths(*map(float, penalty.parts()))


def check_by_rows(penalty: Penalty | None, p: Tensor) -> None:
    """Raise ``TypeError`` unless the penalty takes rows of ``p`` by themselves, all alike."""
    why = "" if penalty is None else _why_not_by_rows(penalty, p)
    if penalty is not None and why:
        raise TypeError(
            f"{penalty.type_name} can't be put on single rows: {why}; build the embedding with sparse=False."
        )


def _why_not_by_rows(penalty: Penalty, p: Tensor) -> str:
    if any(isinstance(strength, Tensor) and strength.ndim for strength in penalty.strengths().values()):
        return "its strength differs between weights"
    if is_group_shrinkage(penalty):
        whole = not penalty.is_joint and penalty.run(p.new_empty(p.shape, device="meta")) == _size(p)
        return "" if whole else "its groups are not the rows"
    return "" if penalty.is_separable else "it acts on all rows together"


def _size(p: Tensor) -> int:
    """The weights of a row."""
    return math.prod(p.shape[1:])


def column(values: Tensor, w: Tensor) -> Tensor:
    """One value for each row of ``w``, in its dtype."""
    return values.to(w.dtype).view(-1, *[1] * (w.ndim - 1))

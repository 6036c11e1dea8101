"""Newton steps for a Gram matrix and several strengths: compiled on a CPU, all together on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchreg.linear.lasso.problem import Strength
from torchreg.linear.quadratic import native_newton
from torchreg.linear.quadratic.newton import Minimum, minimise
from torchreg.linear.quadratic.threads import threads_for
from torchreg.linear.quadratic.together import minimise_together

_TOGETHER = ("cuda",)  # devices that take many systems in the time of one
_FEW = 4  # problems that are no crowd
_WIDEST = 2048  # columns: beyond, one system alone is enough for a device
_SMALL = 4096  # columns up to which keeping the factor wins over LAPACK's blocked factorisation of all its rows


def descend(
    gram: Tensor,
    moment: Tensor,
    strengths: Sequence[Strength],
    *,
    start: Tensor | None = None,
    positive: bool = False,
    limit: int = 1000,
) -> list[Minimum]:
    """Minimisers for each strength, each from the one before, by `torchreg.linear.quadratic.newton.minimise`.

    Args:
        gram: G, (k, k) in float64.
        moment: b, (k,).
        strengths: in any order; falling ones take the fewest steps.
        start: where the first begins.
        positive: whether w ≥ 0 is asked for.
        limit: the most steps for each.
    """
    if gram.device.type == "cpu" and len(moment) <= _SMALL and native_newton.unavailable() is None:
        l1, l2 = [s.l1 for s in strengths], [s.l2 for s in strengths]
        return native_newton.minimise_all(gram, moment, l1, l2, start=start, positive=positive, limit=limit)
    found: list[Minimum] = []
    with threads_for(len(moment)):
        for s in strengths:
            found.append(minimise(gram, moment, s.l1, s.l2, start=start, positive=positive, limit=limit))
            start = found[-1].w
    return found


def descend_together(
    grams: Sequence[Tensor], moments: Sequence[Tensor], strengths: Sequence[Strength], *, positive: bool, limit: int
) -> list[list[Minimum]]:
    """For each Gram matrix the minimisers for all strengths, as `descend` finds them.

    On a GPU all problems are solved at once, in rounds of linear systems; those that stay open go by `descend`'s steps.

    Args:
        grams: (k, k) each, in float64.
        moments: (k,) each.
        strengths: in falling order.
        positive: whether w ≥ 0 is asked for.
        limit: the most steps for each.
    """
    crowd = len(grams) * len(strengths) >= _FEW and 0 < len(moments[0]) <= _WIDEST and limit > 0
    if grams[0].device.type not in _TOGETHER or not crowd:
        return [
            descend(gram, moment, strengths, positive=positive, limit=limit)
            for gram, moment in zip(grams, moments, strict=True)
        ]
    l1, l2 = (moments[0].new_tensor([getattr(s, name) for s in strengths]) for name in ("l1", "l2"))
    w, steps, exact = minimise_together(torch.stack(list(grams)), torch.stack(list(moments)), l1, l2, positive)
    found = []
    for i, (taken, done) in enumerate(zip(steps.tolist(), exact.tolist(), strict=True)):
        row = [Minimum(w[i, j], *pair) for j, pair in enumerate(zip(taken, done, strict=True))]
        for j, s in enumerate(strengths):
            if not row[j].exact:  # from the last one: where systems ended may be far off, or negative
                start = row[j - 1].w if j else None
                (better,) = descend(grams[i], moments[i], [s], start=start, positive=positive, limit=limit)
                row[j] = Minimum(better.w, row[j].steps + better.steps, better.exact)
        found.append(row)
    return found

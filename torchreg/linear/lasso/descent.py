"""Newton steps for one Gram matrix and several strengths: compiled where that is faster."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchreg.linear.lasso.problem import Strength
from torchreg.linear.quadratic import native_newton
from torchreg.linear.quadratic.newton import Minimum, minimise
from torchreg.linear.quadratic.threads import threads_for

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

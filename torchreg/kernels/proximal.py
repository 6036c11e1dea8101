"""Proximal operators by themselves, for weights that have already been moved by a gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchreg.kernels.rounding import HALF, store
from torchreg.penalties import Penalty
from torchreg.penalties.base import Step, paired

_OTHER_STEP = 0x5BD1E995
"""Tells the seeds of this rounding from those of the descent."""


def shrink(
    params: Sequence[Tensor],
    penalty: Penalty,
    steps: Sequence[Step],
    seeds: Sequence[int | Tensor] = (),
    differentiable: bool = False,
) -> None:
    """Overwrite all weights of a rule with their proximal operator, which autograd records if it is ``differentiable``.

    Half-precision weights are computed in float32 and rounded once: stochastically if there are ``seeds``.
    """
    computed = [p.float() if p.dtype in HALF else p for p in params]
    if differentiable:
        for w, step in paired(computed, steps):
            w.copy_(penalty.prox(w.clone(), step))
    else:
        penalty.prox_all_(computed, steps)
    for i, (param, w) in enumerate(zip(params, computed, strict=True)):
        if w is not param:
            store(param, w, seeds[i] + _OTHER_STEP if seeds else None)

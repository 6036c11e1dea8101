"""Proximal operators by themselves, for weights that have already been moved by a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchreg.kernels.rounding import store
from torchreg.penalties import Penalty, sharded
from torchreg.penalties.base import Step, arithmetic, paired
from torchreg.penalties.sharded import Shrinking

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

    Half-precision weights are computed in float32 and rounded once: stochastically if there are ``seeds``. Steps that
    the penalty would refuse are taken as those of a diagonal metric, which it takes at any length.
    """
    computed = [arithmetic(p) for p in params]
    if differentiable:
        for w, step in paired(computed, steps):
            w.copy_(penalty.prox(w.clone(), step))
    else:
        pairs = [_taken_anyway(penalty, w, step) for w, step in paired(computed, steps)]
        penalty.prox_all_([w for w, _ in pairs], [step for _, step in pairs])
    for i, (param, w) in enumerate(zip(params, computed, strict=True)):
        if w is not param:
            store(param, w, seeds[i] + _OTHER_STEP if seeds else None)


def shrink_sharded(
    rules: Sequence[tuple[Penalty, Sequence[Tensor], Sequence[Tensor], Sequence[Step], Sequence[int | Tensor]]],
) -> None:
    """As `shrink`, of weights that are spread over processes: all rules of a step together.

    A rule is its penalty, its parameters, what is here of them, and the steps and seeds of that.
    """
    computed = [[arithmetic(part) for part in parts] for _, _, parts, _, _ in rules]
    sharded.prox_all_(
        [
            Shrinking(penalty, params, values, [_of_metric(penalty, w, s) for w, s in zip(values, steps, strict=True)])
            for (penalty, params, _, steps, _), values in zip(rules, computed, strict=True)
        ]
    )
    for (_, _, parts, _, seeds), values in zip(rules, computed, strict=True):
        for i, (part, w) in enumerate(zip(parts, values, strict=True)):
            if w is not part:
                store(part, w, seeds[i] + _OTHER_STEP if seeds else None)


def _of_metric(penalty: Penalty, w: Tensor, step: Step) -> Step:
    return _taken_anyway(penalty, w, step)[1] if w.ndim else step


def _taken_anyway(penalty: Penalty, w: Tensor, step: Step) -> tuple[Tensor, Step]:
    """The weight and its step, which is no longer a number if the penalty refuses that: the weights have moved."""
    try:
        penalty.check_step(step)
    except ValueError:
        w = w.view(1) if w.ndim == 0 else w
        return w, torch.as_tensor(step, dtype=w.real.dtype, device=w.device).expand(w.shape)
    return w, step

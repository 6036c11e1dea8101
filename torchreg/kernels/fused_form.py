"""Which penalties a fused step knows, and what it is told of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchreg.kernels.pieces import LONGEST
from torchreg.penalties import Penalty
from torchreg.penalties.base import Strength
from torchreg.penalties.grouped import Grouped, is_group_shrinkage
from torchreg.penalties.separable import _Shrinkage, is_shrinkage
from torchreg.penalties.tiles import is_dense


class Strengths(NamedTuple):
    """``l1 Σ|w| + norm Σ_g c_g ‖w_g‖₂ + l2 Σw²``, with c_g = √size where ``sized`` is 1, and 1 where it is 0."""

    l1: Strength = 0.0
    l2: Strength = 0.0
    norm: Strength = 0.0
    sized: float = 0.0


def strengths(penalty: Penalty | None) -> Strengths:
    """What a penalty that has a fused form consists of; none consists of nothing."""
    if isinstance(penalty, Grouped):
        l1, norm, l2 = penalty.parts()
        return Strengths(l1, l2, norm, float(penalty.group_weight == "sqrt"))
    return Strengths(*penalty.parts()) if isinstance(penalty, _Shrinkage) else Strengths()


def obstacle(p: Tensor, penalty: Penalty | None, metric: bool) -> str | None:
    """Why the penalty has no fused form at this parameter, in Adam's ``metric`` or with one step for all, or None."""
    if penalty is None or is_shrinkage(penalty):
        return None
    if not is_group_shrinkage(penalty):
        return f"the penalty {penalty.type_name} has no fused form"
    size = run(p, penalty)
    if size is None:
        return f"its groups ({penalty.groups}) do not lie in memory one after the other"
    if p.device.type != "cpu" and size > LONGEST:
        return f"its groups have {size} weights, and a fused step on {p.device.type} takes {LONGEST} at most"
    return None


def run(p: Tensor, penalty: Penalty | None) -> int | None:
    """The size of the penalty's groups where each is a run of neighbours in memory; 0 if it has no groups."""
    if not isinstance(penalty, Grouped):
        return 0
    like = p.detach()  # what is not dense is worked on in a contiguous copy
    return penalty.run(like if is_dense(like) else torch.empty(p.shape, device="meta"))

"""What a penalty is on the part of a weight that this process holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from torchreg import sharding
from torchreg.groups import Blocks, Groups, Heads, Labels, Slices
from torchreg.penalties.base import Penalty
from torchreg.penalties.grouped import Grouped, is_group_shrinkage
from torchreg.penalties.n_of_m import NM
from torchreg.penalties.separable import L1

_MATHEMATICS = ("value", "_value", "grad_all", "_grad", "residual_all", "_residual", "strengths_max", "_factors")

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def of_part(penalty: Penalty, p: Tensor) -> Penalty | None:
    """The penalty on the part of ``p`` that is here, or None if it depends on what other processes hold."""
    if not sharding.is_sharded(p):
        return None if penalty.is_joint else penalty
    entries = _known.setdefault(p, [])
    layout = sharding.layout(p)
    for known, where, found in entries:
        if known is penalty and where is layout:
            return found
    found = None if penalty.is_joint else _of_part(penalty, p)
    entries[:] = [*entries[-7:], (penalty, layout, found)]  # of a regularizer, an optimizer and a schedule
    return found


def divided(penalty: Penalty | None, weights: Sequence[Tensor]) -> list[tuple[Penalty | None, list[int] | None]]:
    """The positions of the weights by the penalty on their parts (see `of_part`); None for all."""
    found: dict[int, tuple[Penalty | None, list[int]]] = {}
    for i, p in enumerate(weights):
        own = None if penalty is None else of_part(penalty, p)
        found.setdefault(id(own), (own, []))[1].append(i)
    return [(own, indices if len(found) > 1 else None) for own, indices in found.values()]


def spans(penalty: Penalty, weights: Sequence[Tensor]) -> bool:
    """Whether the penalty on what is here of a weight depends on what other processes hold."""
    return any(sharding.is_sharded(p) and of_part(penalty, p) is None for p in weights)


def adds_up(penalty: Penalty) -> TypeGuard[Grouped]:
    """Whether it is known how sums over groups make all of this penalty: its class has no mathematics of its own."""
    own = type(penalty)
    return is_group_shrinkage(penalty) and all(getattr(own, name) is getattr(Grouped, name) for name in _MATHEMATICS)


def check_flat(penalty: Penalty, p: Tensor) -> None:
    """Raise ``ValueError`` if a penalty needs the shape of a parameter that FSDP1 has flattened."""
    if sharding.is_flat(p) and not (penalty.is_separable and not _by_weight(penalty)):
        raise ValueError(
            f"FullyShardedDataParallel has flattened the parameter into a share of one vector, in which "
            f"{penalty.type_name} can't tell its weights apart: shard by torch.distributed.fsdp.fully_shard, which "
            "keeps shapes."
        )


def _of_part(penalty: Penalty, p: Tensor) -> Penalty | None:
    layout = sharding.layout(p)
    if not layout.here:
        return L1(0.0)
    if penalty.is_separable:
        return penalty._with_strengths(lambda s: sharding.beside(s, p)) if _by_weight(penalty) else penalty
    if not layout.groups:
        return penalty
    if isinstance(penalty, Grouped):
        return _of_groups(penalty, p)
    if isinstance(penalty, NM):
        rows = layout.rows[penalty._axis(p.shape)]
        return penalty if rows is None else None
    return None


def _of_groups(penalty: Grouped, p: Tensor) -> Grouped | None:
    groups, layout, here = penalty.groups, sharding.layout(p), sharding.local(p)
    assert isinstance(groups, Groups)
    if isinstance(groups, Blocks):  # labels would take more memory than the weight
        dim = groups.dim % p.ndim
        split = layout.splits_rows(dim, (torch.arange(p.shape[dim]) // groups.k)[:, None])
    else:
        labels = groups.of(p.shape).labels(p.shape)
        split = layout.splits(labels)
    if split:
        return None
    if not here.numel():
        return penalty._with_groups(Slices(()))
    if isinstance(groups, (Slices, Blocks)) or (isinstance(groups, Heads) and layout.rows[groups.dim] is None):
        return penalty
    return penalty._with_groups(Labels(layout.part(labels).unique(return_inverse=True)[1].to(here.device)))


def _by_weight(penalty: Penalty) -> bool:
    """Whether there are strengths of each weight, or such as are DTensors."""
    strengths = [s for s in penalty.strengths().values() if isinstance(s, Tensor)]
    return any(s.ndim or sharding.is_sharded(s) for s in strengths)

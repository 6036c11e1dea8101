"""Exact zeros for weights that were averaged over steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchreg import sharding, unsettled
from torchreg.assignments import clean_name, parameters_of, unwrapped
from torchreg.monitor import SparsityReport
from torchreg.monitor.report import sparsity
from torchreg.penalties import Penalty
from torchreg.regularizer import Regularizer


@torch.no_grad()
def reprox(averaged: Any, current: Any) -> SparsityReport:
    r"""Give averaged weights (EMA, SWA) the exact zeros of the weights that they are an average of.

    An average w̄ = Σ a_k·w_k is zero only where all of its weights w_k were, back to the first: one step at which a
    weight was alive leaves it small, and never zero again. This takes, in place, the nearest weights with the pattern
    of the current ones,

    .. math::
        \bar w \leftarrow \operatorname{argmin}_v \{ \|v - \bar w\|^2 : v_i = 0 \text{ where } w_i = 0 \}
        = \operatorname{prox}_{\iota_{M(w)}}(\bar w),

    the proximal operator of the indicator of the manifold M(w) on which the penalty has put w: zeros, whole groups, 2:4
    patterns, TopK, or for `torchreg.NuclearNorm` the rank. It depends on no step: another soft threshold would shrink
    the survivors a second time, and zero nothing once the learning rate has decayed. Proximal methods find the
    manifold of the minimiser after finitely many steps and stay on it; what the average holds outside it is left of the
    steps before. It keeps a target's fraction of zeros, and done twice it does nothing more.

    The current weights should be those of the last step, after the strength has reached its end.

    Args:
        averaged: what is changed: an ``AveragedModel`` of torch.optim.swa_utils, a module, or a state dict.
        current: where the pattern is: a `Regularizer` (its penalised parameters), a module or a state dict (all
            parameters). Names must agree, but for the ``module.`` of an ``AveragedModel``.

    Returns:
        The zeros of the averaged weights afterwards, as a report.

    Raises:
        TypeError: if one is none of these.
        ValueError: if an averaged weight is missing, has another shape, or is sharded otherwise (nothing is changed).

    >>> import torch, torchreg
    >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    >>> for weights in ([[1.0, 1.0, 1.0]], [[2.0, 0.0, 0.0]], [[3.0, 0.0, 1.0]]):
    ...     model.weight.data = torch.tensor(weights)
    ...     average.update_parameters(model)
    >>> average.module.weight.data
    tensor([[2.2500, 0.2500, 0.7500]])
    >>> torchreg.reprox(average, model).total.zeros
    1
    >>> average.module.weight.data
    tensor([[2.2500, 0.0000, 0.7500]])

    Source: that proximal methods identify the manifold: Hare and Lewis, Identifying active constraints via partial
    smoothness and prox-regularity, Journal of Convex Analysis, 2004.
    """
    mine = _named("averaged", averaged)
    pairs: list[tuple[str, Tensor, Tensor, Penalty | None]] = []
    for names, w, penalty in _current(current):
        found = [name for n in names for name in (n, f"module.{n}") if name in mine]
        if not found:
            raise ValueError(f"There is no averaged weight for {names[0]!r} among {len(mine)}.")
        for name, v in _distinct(found, mine).items():
            if v.shape != w.shape or sharding.local(v).shape != sharding.local(w).shape:
                raise ValueError(
                    f"The averaged weight {name!r} has the shape {tuple(v.shape)}, and is of {tuple(w.shape)} or "
                    "sharded otherwise."
                )
            if (
                penalty is not None
                and type(penalty).with_pattern is not Penalty.with_pattern
                and sharding.is_sharded(w)
            ):
                raise ValueError(f"{penalty.type_name} of {name!r} needs the whole weight, which is sharded.")
            pairs.append((name, v, w, penalty))
    for _, v, w, penalty in pairs:
        here, pattern = sharding.local(v), sharding.local(w).to(sharding.local(v).device)
        here.copy_(here.masked_fill(pattern == 0, 0) if penalty is None else penalty.with_pattern(here, pattern))
    return SparsityReport(sparsity([(name, v) for name, v, _, _ in pairs]).tensors, "averaged")


def _distinct(names: list[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of these names, each once: a weight that is tied now may have several averages."""
    found: dict[Any, str] = {}
    for name in names:
        v = sharding.local(tensors[name])
        found.setdefault((v.data_ptr(), v.shape, v.stride()) if v.numel() else name, name)
    return {name: tensors[name] for name in found.values()}


def _current(source: Any) -> list[tuple[tuple[str, ...], Tensor, Penalty | None]]:
    """The names, the weight and the penalty of each parameter."""
    if isinstance(source, Regularizer):
        unsettled.settle(a.parameter for a in source.assignments)
        return [(a.aliases, a.parameter.detach(), a.penalty) for a in source.assignments if a.penalty is not None]
    if isinstance(source, nn.Module):
        found = parameters_of(_inside(source))
        unsettled.settle(a.parameter for a in found)
        return [(a.aliases, a.parameter.detach(), None) for a in found]
    return [((name,), w, None) for name, w in _named("current", source).items()]


def _named(what: str, source: Any) -> dict[str, Tensor]:
    """Floating point tensors by the names that the user knows."""
    if isinstance(source, nn.Module) and not isinstance(source, Regularizer):
        return {name: a.parameter.detach() for a in parameters_of(_inside(source)) for name in a.aliases}
    if isinstance(source, Mapping) and all(isinstance(w, Tensor) for w in source.values()):
        names = [name for name, w in source.items() if w.is_floating_point() or w.is_complex()]
        return {clean_name(name): source[name].detach() for name in names}
    raise TypeError(f"Expected `{what}` to be a module or a state dict of one, got {type(source).__name__}.")


def _inside(model: nn.Module) -> nn.Module:
    """The module inside an average and the parallel wrappers, in any order."""
    inner = unwrapped(model)
    while isinstance(inner, torch.optim.swa_utils.AveragedModel):
        inner = unwrapped(inner.module)
    return inner

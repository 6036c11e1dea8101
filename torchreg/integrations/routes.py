"""How a penalty gets into the steps of an optimizer that was built without it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from torchreg.optim import Proximal
from torchreg.regularizer import Regularizer

ROUTES = ("hook", "proximal", "groups")
"""By ``attach``; by the proximal operator, in the groups that rules give; or as the optimizer's groups say already."""

_PER_GROUP = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "base_momentums",
    "max_momentums",
)
"""What torch's learning rate schedulers keep for each param group."""


def raw(optimizer: Any) -> Optimizer:
    """The torch optimizer inside the wrappers of Lightning and Accelerate, whose steps run no hooks.

    Raises:
        TypeError: if there is none.
    """
    inner = optimizer
    while not getattr(type(inner), "applies_penalties", False):
        wrapped = getattr(inner, "_optimizer", None) or getattr(inner, "optimizer", None)
        if wrapped is None:
            break
        inner = wrapped
    if not isinstance(inner, Optimizer):
        raise TypeError(f"Expected a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    return inner


def holds(optimizer: Optimizer, regularizer: Regularizer) -> bool:
    """Whether the optimizer steps a parameter that the regularizer penalises."""
    mine = {id(a.parameter) for a in regularizer.assignments if a.penalty is not None}
    return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])


def made_proximal(optimizer: Optimizer, regularizer: Regularizer, schedulers: Iterable[Any] = ()) -> Optimizer:
    """An optimizer of the same kind whose steps end in the proximal operators of a regularizer's penalties.

    Its param groups are divided by penalty, and keep all their hyperparameters. One of torch's is wrapped in
    `torchreg.Proximal`; one that applies penalties stays the same object.

    Args:
        optimizer: any that `torchreg.Proximal` takes, or a proximal one without penalties.
        regularizer: says which parameter has which penalty.
        schedulers: learning rate schedulers built for the optimizer, whose lists of a value for each group follow.

    Raises:
        ValueError: if the optimizer's groups have penalties already, or learning rate schedulers of it are not among
            ``schedulers``. Nothing is changed then, nor where a penalty or an optimizer is refused.
    """
    old = [dict(group) for group in optimizer.param_groups]
    if any(group.get("penalty") is not None for group in old):
        raise ValueError(
            "The optimizer's param groups have penalties already: use the route 'groups', or one mapping of all rules."
        )
    schedulers = list(schedulers)
    parts = [_divided(group, regularizer) for group in old]
    origins = [i for i, some in enumerate(parts) for _ in some]
    if len(origins) > len(old) and not schedulers and any("initial_lr" in group for group in old):
        raise ValueError(
            "A learning rate scheduler counts on the optimizer's param groups, which have to be divided by penalty: "
            "build the optimizer from Regularizer.param_groups(), or the scheduler afterwards."
        )
    try:
        _replace(optimizer, [part for some in parts for part in some])
        found = optimizer if getattr(optimizer, "applies_penalties", False) else Proximal(optimizer)
    except BaseException:
        optimizer.param_groups[:] = old
        raise
    for scheduler in schedulers:
        _follow(scheduler, origins, len(old))
    return found


def _divided(group: dict[str, Any], regularizer: Regularizer) -> list[dict[str, Any]]:
    """The group's parameters by penalty, the first one's first."""
    penalized = regularizer.param_groups()
    where = {id(p): i for i, other in enumerate(penalized) for p in other["params"]}
    members: dict[int | None, list[int]] = {}
    for position, p in enumerate(group["params"]):
        members.setdefault(where.get(id(p)), []).append(position)
    parts = []
    for i, positions in members.items():
        part = {**group, "params": [group["params"][k] for k in positions]}
        if "param_names" in group:
            part["param_names"] = [group["param_names"][k] for k in positions]
        part["penalty"] = None if i is None else penalized[i]["penalty"]
        part["strength_scale"] = regularizer.strength_scale
        if i is not None and "name" in penalized[i]:
            part["name"] = penalized[i]["name"]
        parts.append(part)
    return parts


def _replace(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Give the optimizer other groups, in the same list, checked by itself."""
    optimizer.param_groups.clear()
    for group in groups:
        names = group.pop("param_names", None)
        params = group["params"] if names is None else list(zip(names, group["params"], strict=True))
        optimizer.add_param_group({**group, "params": params})


def _follow(scheduler: Any, origins: list[int], before: int) -> None:
    """Give a scheduler's lists an entry for each of the new groups, and those of schedulers in it."""
    for name in _PER_GROUP:
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) == before:
            setattr(scheduler, name, [values[i] for i in origins])
    for inner in getattr(scheduler, "_schedulers", ()):
        _follow(inner, origins, before)

"""Param groups that carry penalties: their checks, and their form in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchreg.penalties import Penalty, from_dict

_SCHEDULER_KEYS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
_LABEL_KEYS = {"params", "param_names", "name"}


def check_keys(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if the group has a key that the optimizer would silently ignore."""
    unknown = set(group) - set(defaults) - _SCHEDULER_KEYS - _LABEL_KEYS
    if unknown:
        raise ValueError(
            f"Unknown key {', '.join(map(repr, sorted(map(str, unknown))))} in a param group; "
            f"allowed are 'params' and {', '.join(map(repr, defaults))}."
        )


def checked_penalty(penalty: Any) -> Penalty | None:
    """Return ``penalty`` if it is one or None, or raise ``TypeError``."""
    if penalty is None or isinstance(penalty, Penalty):
        return penalty
    given = f"the class {penalty.__name__}" if isinstance(penalty, type) else type(penalty).__name__
    hint = "; rules for a model's parameters go to torchreg.Regularizer" if isinstance(penalty, Mapping) else ""
    raise TypeError(f"Expected `penalty` to be a penalty such as L1(1e-4) or None, got {given}{hint}.")


def checked_scale(scale: Any) -> float | Tensor:
    """Return a strength scale, or raise. A tensor's value is not read: that would stall a device."""
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or not scale.is_floating_point():
            raise ValueError(
                "Expected `strength_scale` to be a float or 0-d tensor, "
                f"got a tensor of shape {tuple(scale.shape)} and {scale.dtype}."
            )
        return scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"Expected `strength_scale` to be a non-negative float or 0-d tensor, got {scale!r}.")
    if not (scale >= 0 and math.isfinite(scale)):
        raise ValueError(f"Expected `strength_scale` to be a non-negative float or 0-d tensor, got {scale}.")
    return float(scale)


def check_penalized_params(group: Mapping[str, Any], index: int) -> None:
    """Raise unless the group's penalty can be applied to each of its parameters, once."""
    penalty = group["penalty"]
    if penalty is None:
        return
    seen: set[int] = set()
    for position, p in enumerate(group["params"]):
        name = group["param_names"][position] if "param_names" in group else f"{position}"
        where = f"Parameter {name} of group {index}"
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(f"{where} is of {p.dtype}; a penalty needs floating point or complex.")
        if id(p) in seen:
            raise ValueError(f"{where} is listed twice: it would be shrunk twice.")
        seen.add(id(p))
        try:
            penalty.check_shape(p.shape)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def packed(state_dict: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with penalties in their plain dict form."""
    groups = [
        {**group, "penalty": group["penalty"].to_dict()} if isinstance(group.get("penalty"), Penalty) else group
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def adopt_penalties(groups: list[dict[str, Any]], current: list[dict[str, Any]]) -> None:
    """Turn loaded groups' penalties back into objects, in place; what a group lacks comes from the current one.

    A strength scale that is a tensor now stays that tensor, which schedules and regularizers share, and takes over
    the loaded value.
    """
    adopted = []
    for i, group in enumerate(groups):
        mine: Mapping[str, Any] = current[i] if i < len(current) else {}
        penalty = group.get("penalty", mine.get("penalty"))
        scale = group.get("strength_scale", mine.get("strength_scale", 1.0))
        adopted.append(
            (from_dict(penalty) if isinstance(penalty, Mapping) else checked_penalty(penalty), checked_scale(scale))
        )
    for i, (group, (penalty, scale)) in enumerate(zip(groups, adopted, strict=True)):
        if penalty is not None and group["params"]:
            penalty = penalty.to(group["params"][0].device)
        group["penalty"], group["strength_scale"] = penalty, scale
        check_penalized_params(group, i)
    for i, group in enumerate(groups):
        shared = current[i].get("strength_scale") if i < len(current) else None
        if isinstance(shared, Tensor):
            with torch.no_grad():
                shared.copy_(torch.as_tensor(group["strength_scale"]).reshape(shared.shape))
            group["strength_scale"] = shared


def check_state_shapes(groups: Iterable[Mapping[str, Any]], state: Mapping[Any, Any], keys: Iterable[str]) -> None:
    """Raise ``ValueError`` if a loaded buffer has another shape than its parameter."""
    for i, group in enumerate(groups):
        for position, p in enumerate(group["params"]):
            for key in keys:
                buffer = state.get(p, {}).get(key) if isinstance(p, Tensor) else None
                if isinstance(buffer, Tensor) and buffer.shape != p.shape:
                    raise ValueError(
                        f"The loaded {key!r} of parameter {position} of group {i} has the shape {tuple(buffer.shape)}, "
                        f"its parameter {tuple(p.shape)}: the checkpoint is of another model."
                    )

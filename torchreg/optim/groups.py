"""Param groups that carry penalties: their checks, and their form in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchreg.penalties import Penalty, from_dict, parts
from torchreg.penalties.base import host_scalar
from torchreg.wording import one_line

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
    """Return a strength scale, or raise. A device's tensor is not read: that would stall it."""
    allowed = "Expected `strength_scale` to be a non-negative float or 0-d tensor"
    if isinstance(scale, Tensor) and (scale.numel() != 1 or not scale.is_floating_point()):
        raise ValueError(f"{allowed}, got a tensor of shape {tuple(scale.shape)} and {scale.dtype}.")
    value = host_scalar(scale.reshape(())) if isinstance(scale, Tensor) else scale
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{allowed}, got {one_line(value)}.")
    if not isinstance(value, Tensor) and not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{allowed}, got {value}.")
    return scale if isinstance(scale, Tensor) else float(scale)


def param_name(group: Mapping[str, Any], position: int) -> str:
    """What a parameter is called in an error."""
    return group["param_names"][position] if "param_names" in group else str(position)


def check_penalized_params(group: Mapping[str, Any], index: int) -> None:
    """Raise unless the group's penalty can be applied to each of its parameters, once."""
    penalty = group["penalty"]
    if penalty is None:
        return
    seen: set[int] = set()
    for position, p in enumerate(group["params"]):
        where = f"Parameter {param_name(group, position)} of group {index}"
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(f"{where} is of {p.dtype}; a penalty needs floating point or complex.")
        if id(p) in seen:
            raise ValueError(f"{where} is listed twice: it would be shrunk twice.")
        seen.add(id(p))
        try:
            parts.check_flat(penalty, p)
            penalty.check_weight(p)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None
    try:
        penalty.check_together([p.shape for p in group["params"]])
    except ValueError as error:
        raise ValueError(f"Group {index}: {error}") from None


def acting(penalty: Penalty, group: Mapping[str, Any], params: Sequence[Tensor]) -> Penalty:
    """A group's penalty on those of its parameters that are stepped."""
    if not penalty.is_joint or len(params) == len(group["params"]):
        return penalty
    stepped = set(map(id, params))
    return penalty.restricted([i for i, p in enumerate(group["params"]) if id(p) in stepped])


def check_takes_steps(penalty: Penalty, optimizer: str) -> None:
    """Raise ``TypeError`` if the penalty's proximal operator is unknown where each weight has a step of its own."""
    if not penalty.takes_steps:
        raise TypeError(
            f"{penalty.type_name} has no known proximal operator in {optimizer}'s metric, where each weight has a step "
            'of its own: use metric="identity", or ProxSGD.'
        )


def packed(state_dict: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with penalties in their plain dict form, and strength scales as they are now."""
    return {**state_dict, "param_groups": [_packed_group(group) for group in state_dict["param_groups"]]}


def _packed_group(group: Mapping[str, Any]) -> dict[str, Any]:
    plain = dict(group)
    if isinstance(plain.get("penalty"), Penalty):
        plain["penalty"] = plain["penalty"].to_dict()
    if isinstance(plain.get("strength_scale"), Tensor):
        plain["strength_scale"] = plain["strength_scale"].detach().clone()
    return plain


def check_form(state_dict: Any) -> None:
    """Raise ``ValueError`` unless this looks like an optimizer's state dict."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        given = f"the keys {sorted(map(str, state_dict))}" if isinstance(state_dict, Mapping) else one_line(state_dict)
        raise ValueError(f"Expected an optimizer's state dict, with 'state' and 'param_groups', got {given:.200}.")
    groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(groups, list) or not all(isinstance(g, Mapping) and "params" in g for g in groups):
        raise ValueError("Expected 'param_groups' of a state dict to be a list of dicts, each with 'params'.")
    if not isinstance(state, Mapping) or not all(isinstance(entries, Mapping) for entries in state.values()):
        raise ValueError("Expected 'state' of a state dict to be a dict with a dict for each parameter.")


def check_required(groups: Iterable[Mapping[str, Any]], required: Iterable[str], optimizer: str) -> None:
    """Raise ``ValueError`` if a loaded group lacks a hyperparameter."""
    for i, group in enumerate(groups):
        missing = [key for key in required if key not in group]
        if missing:
            raise ValueError(
                f"Group {i} of the state dict lacks {', '.join(map(repr, missing))}: it is of another optimizer than "
                f"{optimizer}."
            )


def adopt_penalties(groups: list[dict[str, Any]], current: list[dict[str, Any]]) -> None:
    """Turn loaded groups' penalties back into objects, in place; what a group lacks comes from the current one."""
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


def share_scales(groups: list[dict[str, Any]], current: list[dict[str, Any]]) -> None:
    """Keep strength scales that are tensors now, which schedules and regularizers share; they take the loaded value."""
    for i, group in enumerate(groups):
        shared = current[i].get("strength_scale") if i < len(current) else None
        if isinstance(shared, Tensor):
            with torch.no_grad():
                shared.copy_(torch.as_tensor(group["strength_scale"]).reshape(shared.shape))
            group["strength_scale"] = shared


def check_state_shapes(groups: Iterable[Mapping[str, Any]], state: Mapping[Any, Any], keys: Iterable[str]) -> None:
    """Raise unless every loaded buffer is a tensor of its parameter's shape, or None."""
    for i, group in enumerate(groups):
        for position, p in enumerate(group["params"]):
            for key in keys:
                buffer = state.get(p, {}).get(key) if isinstance(p, Tensor) else None
                if buffer is not None and not isinstance(buffer, Tensor):
                    raise TypeError(f"Expected the loaded {key!r} to be a tensor, got {type(buffer).__name__}.")
                if buffer is not None and buffer.shape != p.shape:
                    raise ValueError(
                        f"The loaded {key!r} of parameter {position} of group {i} has the shape {tuple(buffer.shape)}, "
                        f"its parameter {tuple(p.shape)}: the checkpoint is of another model."
                    )

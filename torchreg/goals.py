"""What a target is: a fraction of zeros for some param groups together."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchreg import sharding
from torchreg.optim.groups import param_name
from torchreg.penalties import sharded
from torchreg.penalties.grouped import Grouped
from torchreg.scales import Scales
from torchreg.wording import one_line
from torchreg.zeroing import makes_zeros


@dataclass
class Goal:
    """A fraction of zeros for some groups together."""

    name: str
    fraction: float
    scales: Scales
    of: str
    start: float = 0.0
    warned: bool = False
    warned_of_empty: bool = False

    def names(self) -> list[str]:
        """What `weights` are called."""
        places = [
            (group, i) for group in self.scales.groups() for i, p in enumerate(group["params"]) if p.requires_grad
        ]
        return [param_name(group, i) for group, i in places]

    @torch.no_grad()
    def alive(self) -> Tensor:
        """Whether each of the `weights` holds anything but zeros, or nothing at all."""
        weights = self.weights()
        counts = [(sharding.local(w) != 0).any().long().reshape(1) for w in weights]
        whole = sharding.summed(counts, list(map(sharding.layout, weights)))
        return torch.cat([c.to(whole[0].device) + (w.numel() == 0) for c, w in zip(whole, weights, strict=True)])

    def weights(self) -> list[Tensor]:
        """The trainable parameters of its groups."""
        return [p for group in self.scales.groups() for p in group["params"] if p.requires_grad]

    @torch.no_grad()
    def zero_groups(self) -> Tensor:
        """The fraction of the groups of weights that are all zero: a float64 0-d tensor."""
        alive = [sharded.alive_groups(penalty, [w.detach() for w in some]) for penalty, some in self._grouped()]
        counts = torch.stack([a.sum().to(alive[0].device) for a in alive])
        return 1 - counts.sum().double() / max(1, sum(map(len, alive)))

    def grain(self) -> float:
        """The largest fraction of them that becomes zero at once."""
        shaped = [(penalty, [p.shape for p in some]) for penalty, some in self._grouped()]
        if self.of == "groups":
            return 1 / max(1, sum(penalty.count_groups(shapes) for penalty, shapes in shaped))
        largest = [penalty.largest_group(shapes) for penalty, shapes in shaped]
        return max(largest, default=0) / max(1, sum(p.numel() for p in self.weights()))

    def _grouped(self) -> list[tuple[Grouped, list[Tensor]]]:
        """The penalties on groups, each with its trainable parameters that are not empty."""
        return [
            (group["penalty"].restricted(chosen), [group["params"][i] for i in chosen])
            for group in self.scales.groups()
            if isinstance(group["penalty"], Grouped)
            and (chosen := [i for i, p in enumerate(group["params"]) if p.requires_grad and p.numel()])
        ]


def goals(optimizer: Any, target: Any, of: str) -> list[Goal]:
    """The goals, checked; nothing is changed."""
    if of not in ("weights", "groups"):
        raise ValueError(f"Expected `of` to be 'weights' or 'groups', got {of!r}.")
    if isinstance(target, Mapping):
        if not target:
            raise ValueError("Expected `target` to name at least one rule, got none.")
        pairs = [(str(key), checked_fraction(f"target of {key!r}", value), key) for key, value in target.items()]
    else:
        pairs = [("all", checked_fraction("target", target), None)]
    goals = [Goal(name, fraction, Scales(optimizer, groups), of) for name, fraction, groups in pairs]
    holder = goals[0].scales.holder
    if not hasattr(holder, "register_prox_pre_hook"):
        raise TypeError(
            f"Expected a proximal optimizer with `register_prox_pre_hook` (ProxSGD, ProxAdamW or Proximal), got "
            f"{type(holder).__name__}."
        )
    chosen = [i for goal in goals for i in goal.scales.indices]
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"Expected `target` to name every param group once, got {list(target)}.")
    if not isinstance(target, Mapping):  # constraints too: they are penalised weights that no scale moves
        chosen = [i for i, group in enumerate(holder.param_groups) if group["penalty"] is not None]
    for i in chosen:
        if any(map(sharding.is_flat, holder.param_groups[i]["params"])):
            raise ValueError(
                "FullyShardedDataParallel holds the parameters as shares of one flat vector, which have no threshold "
                "together: shard by torch.distributed.fsdp.fully_shard."
            )
        _check_makes_zeros(holder.param_groups[i], i, per_rule=isinstance(target, Mapping))
        if of == "groups" and not isinstance(holder.param_groups[i]["penalty"], Grouped):
            has = holder.param_groups[i]["penalty"].type_name
            raise ValueError(
                f"Param group {i} has {has}, which has no groups: a target of groups needs GroupLasso, say."
            )
    for goal in goals:
        if not any(p.requires_grad for group in goal.scales.groups() for p in group["params"]):
            raise ValueError(f"The groups of the target {goal.name} hold no trainable parameter.")
    return goals


def _check_makes_zeros(group: Mapping[str, Any], index: int, per_rule: bool) -> None:
    penalty = group["penalty"]
    if makes_zeros(penalty):
        return
    hint = "" if per_rule else "; give a target for each of the other rules instead"
    raise ValueError(f"Param group {index} has {penalty.type_name}, whose strength does not zero weights{hint}.")


def checked_fraction(name: str, value: Any, most: float = math.nextafter(1, 0)) -> float:
    """Return a number in [0, 1), or up to ``most``, or raise."""
    allowed = f"Expected `{name}` to be a fraction in [0, 1{']' if most == 1 else ')'}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{allowed}, got {one_line(value)}.")
    number = float(value)
    if not 0 <= number <= most:
        raise ValueError(f"{allowed}, got {number}.")
    return number


def place(scales: Scales) -> None:
    """Make the scales tensors beside the weights: a float, or a tensor elsewhere, could not be set without waiting."""
    placed: dict[Any, Tensor] = {}
    for group in scales.groups():
        scale, device = group["strength_scale"], group["params"][0].device
        if not isinstance(scale, Tensor):
            group["strength_scale"] = placed.setdefault(device, torch.tensor(scale, device=device))
        elif scale.device != device:
            group["strength_scale"] = placed.setdefault((id(scale), device), scale.detach().to(device))

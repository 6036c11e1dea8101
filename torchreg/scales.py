"""Strength scales: who holds them, which of them to move, and how to write to them."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchreg.wording import one_line

Groups = int | str | Sequence[int | str] | None
"""Which param groups: a position, a rule's name (the group's ``name``), several of them, or None for all penalised."""


class Scales:
    """The strength scales of an optimizer's penalised groups, or the one of a regularizer.

    A scale that is a tensor is filled in place, on its device, so that all who share it see it: other groups, the
    regularizer, a captured CUDA graph. One that is a float is replaced.

    Args:
        holder: an optimizer that applies penalties, a `torchreg.Regularizer`, or the handle of its ``attach``.
        groups: which groups; see `Groups`. Of a regularizer, which has one scale for all its rules, only None.
        separate: whether every chosen group needs a scale of its own.

    Raises:
        TypeError: if the holder or ``groups`` are of the wrong kind.
        ValueError: if a chosen group has no penalty or does not exist, or the optimizer applies none.
    """

    def __init__(self, holder: Any, groups: Groups = None, *, separate: bool = False) -> None:
        self.holder = _resolved(holder)
        self._separate = separate
        self._one = _is_regularizer(self.holder)
        if self._one:
            if groups is not None or separate:
                raise ValueError(
                    "A regularizer has one strength scale for all its rules: give `groups` for the optimizer built "
                    "from its param_groups(), or use one regularizer per schedule."
                )
            self.indices: list[int] = [0]
            return
        self.indices = _chosen(self.holder, groups)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def names(self) -> list[str]:
        """What the chosen groups are called: their rule, or their position."""
        if self._one:
            return ["regularizer"]
        return [str(self.holder.param_groups[i].get("name", i)) for i in self.indices]

    def groups(self) -> list[dict[str, Any]]:
        """The chosen groups as they are now: loading a state replaces an optimizer's dicts."""
        return [self.holder.param_groups[i] for i in self.indices]

    def read(self) -> list[float | Tensor]:
        """The chosen scales."""
        if self._one:
            return [self.holder.strength_scale]
        return [group["strength_scale"] for group in self.groups()]

    @torch.no_grad()
    def write(self, values: Iterable[float | Tensor]) -> None:
        """Set the chosen scales."""
        for i, (scale, value) in enumerate(zip(self.read(), values, strict=True)):
            if not isinstance(scale, Tensor):
                self.groups()[i]["strength_scale"] = value
            elif isinstance(value, Tensor):
                scale.copy_(value.reshape(scale.shape))
            else:
                scale.fill_(value)

    def unshare(self) -> None:
        """Give the chosen groups tensors of their own in place of those shared with groups which don't move along."""
        if self._one:
            return
        groups = self.holder.param_groups
        held = [groups[i]["strength_scale"] for i in self.indices]
        rest = [groups[i]["strength_scale"] for i in _movable(groups) if i not in self.indices]
        copies: dict[int, Tensor] = {}
        for k, (i, scale) in enumerate(zip(self.indices, held, strict=True)):
            apart = rest + (held[:k] + held[k + 1 :] if self._separate else [])
            if isinstance(scale, Tensor) and any(scale is other for other in apart):
                copy = scale.detach().clone()
                groups[i]["strength_scale"] = copy if self._separate else copies.setdefault(id(scale), copy)


def checked_count(name: str, value: Any, least: int = 0) -> int:
    """Return ``value`` if it is an integer of at least ``least``, or raise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"Expected `{name}` to be an integer of at least {least}, got {one_line(value)}.")
    if value < least:
        raise ValueError(f"Expected `{name}` to be an integer of at least {least}, got {value}.")
    return int(value)


def checked_number(name: str, value: Any) -> float:
    """Return ``value`` as a float if it may be a strength scale, or raise."""
    allowed = f"Expected `{name}` to be a non-negative finite number"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{allowed}, got {one_line(value)}.")
    number = float(value)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"{allowed}, got {value}.")
    return number


def _resolved(holder: Any) -> Any:
    """The regularizer of a handle, the optimizer inside a wrapper such as Accelerate's, or the thing itself."""
    if isinstance(holder, type):
        raise TypeError(f"Expected an optimizer or a Regularizer, got the class {holder.__name__}.")
    holder = getattr(holder, "regularizer", holder)
    if _is_regularizer(holder):
        if not any(a.penalty is not None for a in holder.assignments):
            raise ValueError("The regularizer penalises no parameter: there is no strength to move.")
        return holder
    if not hasattr(holder, "param_groups"):
        raise TypeError(f"Expected an optimizer or a Regularizer, got {type(holder).__name__}.")
    inner = holder
    while inner is not None and not getattr(inner, "applies_penalties", False):
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        raise ValueError(
            f"{type(holder).__name__} applies no penalties: there is no strength to move. With a penalty in the loss "
            "or attached to the optimizer, give the Regularizer; or use a proximal optimizer such as torchreg.ProxSGD."
        )
    return inner


def _is_regularizer(holder: Any) -> bool:
    return hasattr(holder, "assignments") and isinstance(getattr(holder, "strength_scale", None), Tensor)


def _chosen(optimizer: Any, wanted: Groups) -> list[int]:
    groups = optimizer.param_groups
    penalised = _movable(groups)
    if not penalised:
        raise ValueError(f"None of the {len(groups)} param groups has a penalty with a strength to move.")
    if wanted is None:
        return penalised
    entries = [wanted] if isinstance(wanted, (int, str)) else list(wanted) if isinstance(wanted, Iterable) else None
    if entries is None:
        raise TypeError(f"Expected `groups` to be positions or names of param groups, got {type(wanted).__name__}.")
    if not entries:
        raise ValueError("Expected `groups` to name at least one param group, got none.")
    indices = [i for entry in entries for i in _found(groups, entry)]
    for i in indices:
        if i not in penalised:
            what = "no penalty" if groups[i].get("penalty") is None else "a constraint for a penalty"
            raise ValueError(f"Param group {i} has {what}: there is no strength to move. Groups with one: {penalised}.")
    if len(set(indices)) != len(indices):
        raise ValueError(f"Expected `groups` to name every param group once, got {wanted!r}.")
    return indices


def _movable(groups: list[dict[str, Any]]) -> list[int]:
    """The positions of the groups whose penalty has a strength (a constraint has none)."""
    return [i for i, group in enumerate(groups) if group.get("penalty") is not None and group["penalty"].strengths()]


def _found(groups: list[dict[str, Any]], entry: Any) -> list[int]:
    """The groups of one position or name."""
    if isinstance(entry, str):
        names = [str(group["name"]) for group in groups if "name" in group]
        found = [i for i, group in enumerate(groups) if group.get("name") == entry]
        if not found:
            close = difflib.get_close_matches(entry, names, n=3, cutoff=0.4) or names
            hint = f"; closest: {', '.join(map(repr, close))}" if close else " (no group has a name)"
            raise ValueError(f"No param group is named {entry!r}{hint}.")
        return found
    if isinstance(entry, bool) or not isinstance(entry, numbers.Integral):
        raise TypeError(f"Expected the position or the name of a param group, got {entry!r}.")
    position = int(entry)
    if not 0 <= position < len(groups):
        raise ValueError(f"Expected a param group's position from 0 to {len(groups) - 1}, got {position}.")
    return [position]

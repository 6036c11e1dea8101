"""The parameters of a model, each with the penalty that a rule gave it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from torchreg.penalties import Penalty

_WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass
class Assignment:
    """One parameter of a model, and the penalty that a rule gave it (None: left alone, and why)."""

    name: str
    module: nn.Module
    attribute: str
    aliases: tuple[str, ...]
    penalty: Penalty | None = None
    rule: str = ""
    rule_index: int | None = None
    reason: str = ""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the model holds it now (moving or sharding a model may replace it).

        Raises:
            RuntimeError: if the model has it no more: parametrizing or pruning a layer replaces its weight.
        """
        p = self.module._parameters.get(self.attribute)
        if p is None:
            raise RuntimeError(_gone(self.name))
        return p

    @property
    def trainable(self) -> bool:
        """Whether the parameter is not frozen."""
        return is_trainable(self.parameter)


def is_trainable(p: Tensor) -> bool:
    """Whether a parameter is not frozen. (What torch.func puts in its place is no parameter, and counts.)"""
    return p.requires_grad or not isinstance(p, nn.Parameter)


class PenalizedModel(Protocol):
    """A model whose parameters have penalties: what optimality and the hook need of a `torchreg.Regularizer`."""

    model: nn.Module
    assignments: list[Assignment]
    strength_scale: Tensor

    def penalized(self) -> Iterator[tuple[str, nn.Parameter, Penalty]]:
        """The (name, parameter, penalty) of every trainable penalised parameter."""

    def __call__(self) -> Tensor:
        """The penalty's value."""


def by_rule(assignments: Iterable[Assignment]) -> list[tuple[Penalty | None, list[Assignment]]]:
    """The parameters that have a penalty by the same rule, in the order of the rules; those left alone come last.

    A penalty whose groups they share is given with the part that these have in them.
    """
    groups: dict[tuple[int, Penalty] | None, list[Assignment]] = {}
    for a in assignments:
        groups.setdefault(None if a.penalty is None else (a.rule_index or 0, a.penalty), []).append(a)
    order = sorted(groups, key=lambda key: (key is None, key and key[0]))
    return [(key and _bound(key[1], groups[key]), groups[key]) for key in order]


def _bound(penalty: Penalty, chosen: Iterable[Assignment]) -> Penalty:
    """The penalty on these parameters."""
    members = penalty.members()
    if members is None:
        return penalty
    known = set(members)
    return penalty.bound([next((name for name in a.aliases if name in known), a.name) for a in chosen])


def outdated(model: nn.Module, assignments: list[Assignment]) -> str:
    """What differs between the model's parameters and those that the rules were applied to; empty if nothing does."""
    names = {id(a.parameter): a.name for a in parameters_of(unwrapped(model))}
    seen: set[int] = set()
    for a in assignments:
        p = a.module._parameters.get(a.attribute)
        if id(p) in seen:
            return f"Parameter {a.name!r} is tied to another one since the rules were applied: apply them again."
        if id(p) not in names:
            return _gone(a.name)
        seen.add(id(p))
    new = next((name for key, name in names.items() if key not in seen), None)
    return "" if new is None else f"Parameter {new!r} is new in the model: apply the rules again."


def check_current(model: nn.Module, assignments: list[Assignment]) -> None:
    """Raise a RuntimeError if the model's parameters are no longer those that the rules were applied to."""
    if message := outdated(model, assignments):
        raise RuntimeError(message)


def _gone(name: str) -> str:
    return f"Parameter {name!r} is no longer in the model (parametrized, pruned or replaced?): apply the rules again."


def parameters_of(model: nn.Module) -> list[Assignment]:
    """One assignment per distinct parameter, all its names collected."""
    by_id: dict[int, Assignment] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, p in module._parameters.items():
            if p is None:
                continue
            name = clean_name(f"{prefix}.{attribute}" if prefix else attribute)
            known = by_id.get(id(p))
            if known is None:
                by_id[id(p)] = Assignment(name, module, attribute, (name,))
            elif name not in known.aliases:
                known.aliases += (name,)
    return list(by_id.values())


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and the parallel wrappers, whose parameters have the names the user knows."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def clean_name(name: str) -> str:
    """The name without the parts that torch.compile, FSDP and activation checkpointing add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def shape_text(p: Tensor) -> str:
    """The sizes of a parameter."""
    if isinstance(p, nn.parameter.UninitializedParameter):
        return "not initialised"
    return "×".join(map(str, p.shape)) or "scalar"


def strengths_text(a: Assignment) -> str:
    """The penalty's name and fields that are not at their defaults; a strength alone needs no name."""
    assert a.penalty is not None
    fields = {f.name: (getattr(a.penalty, f.name), f.default) for f in dataclasses.fields(a.penalty)}  # type: ignore[arg-type]
    shown = {name: value for name, (value, default) in fields.items() if isinstance(value, Tensor) or value != default}
    names = len(shown) > 1 or not shown.keys() <= set(a.penalty.strength_names())
    text = ", ".join(f"{name}={_number(value)}" if names else _number(value) for name, value in shown.items())
    return f"{a.penalty.type_name} {text}".strip() + ("" if a.parameter.requires_grad else " (frozen: skipped)")


def _number(value: object) -> str:
    if isinstance(value, Tensor) and value.ndim:
        return f"{value.min().item():.4g}…{value.max().item():.4g}" if value.numel() else "empty"
    return f"{float(value):.4g}" if isinstance(value, (float, Tensor)) else str(value)

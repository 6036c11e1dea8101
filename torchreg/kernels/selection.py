"""Which implementation a step takes on a device, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchreg.kernels import fused_form, native, triton_step
from torchreg.kernels.likeness import Likeness
from torchreg.kernels.plan import Part, identical
from torchreg.kernels.problem import AdamStep, SGDStep
from torchreg.penalties import Penalty

Wish = tuple[bool | None, bool | None]
"""What a param group says of (fused, foreach)."""

Chosen = tuple[int, list[int] | None]

SMALLEST = 1 << 16
"""Weights on the CPU from which the compiled kernel is chosen unasked: below, building it does not pay."""


def unavailable(device: torch.device, kernel: str = SGDStep.KERNEL) -> str | None:
    """Why a device has no fused step, or None. On the CPU this builds the kernel, where it can be built."""
    if device.type == "cpu":
        return native.unavailable(kernel)
    if device.type == "cuda":
        return triton_step.unavailable()
    return f"there is none for {device.type}, only for cpu and cuda"


def obstacle(p: Tensor, penalty: Penalty | None, metric: bool = False) -> str | None:
    """Why this parameter can't take part in a fused step, or None; the device's own reason is `unavailable`.

    ``metric`` tells that every weight has a proximal step of its own.
    """
    dtypes = native.DTYPES if p.device.type == "cpu" else triton_step.DTYPES
    if type(p) not in (Tensor, nn.Parameter) or type(p.data) is not Tensor:
        return f"its type is {type(p.data).__name__}, not a plain tensor"
    if p.is_neg():
        return "it is a view that is negated when it is read"
    if p.layout != torch.strided:
        return f"its layout is {p.layout}"
    if p.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"its dtype is {p.dtype}; on {p.device.type} there is a fused step for {names}"
    return fused_form.obstacle(p, penalty, metric)


def fused_positions(
    parameters: list[Tensor], step: SGDStep | AdamStep, wish: bool | None, foreach: bool | None
) -> list[int]:
    """Which parameters of a group a fused step could take.

    Raises:
        RuntimeError: if one was asked for and can't be had.
    """
    if wish is False or (wish is None and foreach is not None) or step.differentiable:
        return []
    positions = []
    for i, p in enumerate(parameters):
        reason = obstacle(p, step.penalty, not step.is_uniform)
        if reason is None:
            positions.append(i)
        elif wish:
            raise RuntimeError(f"`fused=True` can't be had for a parameter of shape {tuple(p.shape)}: {reason}.")
    return positions


def pays(device: torch.device, parameters: list[Tensor]) -> bool:
    """Whether a fused step of those on a device is chosen unasked: on a GPU always, on the CPU for many weights."""
    return device.type != "cpu" or sum(p.numel() for p in parameters if p.device.type == "cpu") >= SMALLEST


class Arrangement:
    """Which tensors of which part go to which fused step, and which go to none.

    Attributes:
        kinds: for each device and dtype the (part, indices) of a fused step; None stands for all.
        alone: the (part, indices) that are taken by other forms.
    """

    def __init__(self, parts: Sequence[Part], wishes: Sequence[Wish]) -> None:
        positions = [
            fused_positions(tensors.params, step, *wish) for (tensors, step), wish in zip(parts, wishes, strict=True)
        ]
        _leave_repetitions(parts, positions)
        _settle(parts, wishes, positions)
        self.kinds: dict[tuple[torch.device, torch.dtype], list[Chosen]] = {}
        self.alone: list[Chosen] = []
        for i, ((tensors, _), chosen) in enumerate(zip(parts, positions, strict=True)):
            here: dict[tuple[torch.device, torch.dtype], list[int]] = {}
            for position in chosen:
                p = tensors.params[position]
                here.setdefault((p.device, p.dtype), []).append(position)
            for kind, indices in here.items():
                self.kinds.setdefault(kind, []).append((i, None if len(indices) == len(tensors.params) else indices))
            rest = sorted(set(range(len(tensors.params))) - set(chosen))
            if rest:
                self.alone.append((i, None if not chosen else rest))
        self._wishes, self._steps = list(wishes), [step for _, step in parts]
        self._params = [tensors.params for tensors, _ in parts]
        self._fused = [tensors.params[i] for (tensors, _), chosen in zip(parts, positions, strict=True) for i in chosen]
        self._addresses = list(map(Tensor.data_ptr, self._fused))
        self._likeness, self._forms = Likeness(self._fused), _forms(self._fused)
        self._shapes = _shapes(parts)

    def fits(self, parts: Sequence[Part], wishes: Sequence[Wish]) -> bool:
        """Whether it holds for this step too: the same parameters in the same memory, penalties and wishes."""
        return (
            len(parts) == len(self._params)
            and all(map(identical, self._params, (tensors.params for tensors, _ in parts)))
            and self._wishes == wishes
            and all(_are_alike(step, known) for (_, step), known in zip(parts, self._steps, strict=True))
            and self._addresses == list(map(Tensor.data_ptr, self._fused))
            and self._shapes == _shapes(parts)
            and self._are_as_they_were()
        )

    def _are_as_they_were(self) -> bool:
        if self._likeness.holds(self._fused):
            return True
        if self._forms != _forms(self._fused):
            return False
        self._likeness = Likeness(self._fused)
        return True


def _are_alike(a: SGDStep | AdamStep, b: SGDStep | AdamStep) -> bool:
    """Whether the same parameters can take both steps."""
    return a is b or _signature(a) == _signature(b)


def _signature(step: SGDStep | AdamStep) -> tuple[object, ...]:
    return type(step.penalty), getattr(step.penalty, "groups", None), step.is_uniform, step.differentiable


def _shapes(parts: Sequence[Part]) -> list[Any]:
    """What tells that the groups of a parameter came to lie otherwise in the same memory."""
    grouped = [tensors.params for tensors, step in parts if step.penalty is not None and step.penalty.is_grouped]
    return [(p.shape, p.stride()) for params in grouped for p in params]


def _forms(params: list[Tensor]) -> tuple[list[Any], ...]:
    """What tells that a parameter became another view of the same memory."""
    return (
        list(map(Tensor.numel, params)),
        list(map(Tensor.is_contiguous, params)),
        list(map(Tensor.is_neg, params)),
        [p.dtype for p in params],
    )


def _leave_repetitions(parts: Sequence[Part], positions: list[list[int]]) -> None:
    """A parameter that is listed twice is stepped twice, one after the other: not by two threads at once."""
    seen: set[int] = set()
    for (tensors, _), chosen in zip(parts, positions, strict=True):
        once = []
        for i in chosen:
            if id(tensors.params[i]) not in seen:
                seen.add(id(tensors.params[i]))
                once.append(i)
        chosen[:] = once


def _settle(parts: Sequence[Part], wishes: Sequence[Wish], positions: list[list[int]]) -> None:
    """Empty the positions of groups that nobody asked to fuse and where it does not pay or can't be had."""
    candidates = [tensors.params[i] for (tensors, _), chosen in zip(parts, positions, strict=True) for i in chosen]
    penalised = any(step.penalty is not None and tensors.params for tensors, step in parts)
    unasked = {device: penalised and pays(device, candidates) for device in {p.device for p in candidates}}
    for (tensors, step), (wish, _), chosen in zip(parts, wishes, positions, strict=True):
        for device in {tensors.params[i].device for i in chosen}:
            refused = wish is None and not unasked[device]
            reason = None if refused else unavailable(device, step.KERNEL)
            if reason is not None and wish:
                raise RuntimeError(f"`fused=True` can't be had on {device}: {reason}.")
            if refused or reason is not None:
                chosen[:] = [i for i in chosen if tensors.params[i].device != device]

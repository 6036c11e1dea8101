"""Strength over time: siblings of torch's learning rate schedulers that move a penalty's strength scale.

>>> import torch, torchreg
>>> model = torch.nn.Linear(3, 1)
>>> reg = torchreg.Regularizer(model, torchreg.L1(1e-2))
>>> optimizer = torchreg.ProxSGD(reg.param_groups(), lr=0.1)
>>> schedule = torchreg.schedules.WarmupStrength(optimizer, until=4)
>>> for _ in range(6):
...     print(schedule.get_last_scale(), end=" ")
...     optimizer.step()
...     schedule.step()
[0.0] [0.25] [0.5] [0.75] [1.0] [1.0]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torchreg.scales import Groups, Scales, checked_count, checked_number
from torchreg.wording import one_line

__all__ = [
    "ChainedStrength",
    "CosineStrength",
    "CubicStrength",
    "LambdaStrength",
    "LinearStrength",
    "SequentialStrength",
    "StrengthScheduler",
    "WarmupStrength",
]


class StrengthScheduler:
    """Base of the schedules: sets ``strength_scale`` = s(t) after t calls of ``step()``, beginning with s(0) at once.

    The strength that acts is strength·s(t). A schedule is a function of t alone, so that a resumed run takes the
    values of an uninterrupted one, bit for bit. The user calls ``step()`` after ``optimizer.step()``, as often as
    wished (each step or each epoch); nothing advances inside ``optimizer.step()``.

    Args:
        optimizer: a proximal optimizer (its groups' scales move), or for the routes by a loss term or by ``attach`` the
            `torchreg.Regularizer`. A scale that is a tensor is filled in place, without waiting for a device.
        groups: which param groups to move: a position, the name of a rule (its key, as in the groups of
            `Regularizer.param_groups`), or several of them; all penalised ones by default. What is chosen from groups
            that share a tensor gets one of its own, and no longer follows the regularizer's ``strength_scale``.

    Subclasses define `scales_at`.

    Raises:
        TypeError: if ``optimizer`` or ``groups`` are of the wrong kind.
        ValueError: if a chosen group has no penalty, or the optimizer applies none.
    """

    def __init__(self, optimizer: Any, *, groups: Groups = None, separate: bool = False) -> None:
        self._begin(optimizer, Scales(optimizer, groups, separate=separate))

    def _begin(self, optimizer: Any, scales: Scales) -> None:
        self.optimizer = optimizer
        self.last_epoch = 0
        self._scales = scales
        first = self._checked(0)
        scales.unshare()
        self._apply(first)

    def scales_at(self, step: int) -> list[float]:
        """s(t) of each chosen group at t = ``step``."""
        raise NotImplementedError(f"{type(self).__name__} must define scales_at()")

    def get_scale(self) -> list[float]:
        """s(t) of each chosen group, now."""
        return self.scales_at(self.last_epoch)

    def get_last_scale(self) -> list[float]:
        """What was last written to each chosen group."""
        return list(self._last_scale)

    def step(self) -> None:
        """Advance by one and write the new scales."""
        scales = self._checked(self.last_epoch + 1)
        self.last_epoch += 1
        self._apply(scales)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken: all that changes. The settings are the constructor's."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to the saved step and write its scales.

        Raises:
            ValueError: if it is not the state of a schedule (nothing is changed then).
            TypeError: if the saved step is no integer.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != {"last_epoch"}:
            given = (
                f"the keys {sorted(map(str, state_dict))}" if isinstance(state_dict, Mapping) else one_line(state_dict)
            )
            raise ValueError(f"Expected the state of a strength schedule, with the key 'last_epoch', got {given:.200}.")
        last_epoch = checked_count("last_epoch", state_dict["last_epoch"])
        scales = self._checked(last_epoch)
        self.last_epoch = last_epoch
        self._apply(scales)

    def _checked(self, step: int) -> list[float]:
        return [checked_number(f"strength_scale at step {step}", scale) for scale in self.scales_at(step)]

    def _apply(self, scales: list[float]) -> None:
        self._last_scale = scales
        self._scales.write(scales)


class LambdaStrength(StrengthScheduler):
    """The strength scale as a function of the step: s(t) = f(t).

    Args:
        optimizer: see `StrengthScheduler`.
        function: f, from the number of steps to a non-negative number, or a list with one for each chosen group. It
            must depend on nothing else: it is not saved.
        groups: see `StrengthScheduler`.

    Raises:
        TypeError: if a function is not callable or returns no number.
        ValueError: if there are not as many functions as groups, or one returns a negative or infinite number.

    >>> import torch, torchreg
    >>> reg = torchreg.Regularizer(torch.nn.Linear(3, 1), torchreg.L1(1e-2))
    >>> schedule = torchreg.schedules.LambdaStrength(reg, lambda t: 1 / (1 + t))
    >>> schedule.step()
    >>> reg.strength_scale
    tensor(0.5000)
    """

    def __init__(
        self,
        optimizer: Any,
        function: Callable[[int], float] | Sequence[Callable[[int], float]],
        *,
        groups: Groups = None,
    ) -> None:
        listed = isinstance(function, Sequence)
        functions = list(function) if isinstance(function, Sequence) else [function]
        for f in functions:
            if not callable(f):
                raise TypeError(f"Expected `function` to be callable or a list of callables, got {f!r}.")
        if listed:
            chosen = Scales(optimizer, groups)
            if len(functions) != len(chosen):
                raise ValueError(f"Expected {len(chosen)} functions, one for each group, got {len(functions)}.")
        self._functions = functions if listed else None
        self._function = functions[0]
        super().__init__(optimizer, groups=groups, separate=listed and len(functions) > 1)

    def scales_at(self, step: int) -> list[float]:  # noqa: D102
        if self._functions is None:
            return [self._function(step)] * len(self._scales)
        return [f(step) for f in self._functions]


class _Ramp(StrengthScheduler):
    """From ``start`` to ``end`` between the steps ``after`` and ``until``; the subclass says how."""

    def __init__(
        self,
        optimizer: Any,
        *,
        until: int,
        after: int = 0,
        start: float = 0.0,
        end: float = 1.0,
        groups: Groups = None,
    ) -> None:
        self.start, self.end = checked_number("start", start), checked_number("end", end)
        self.after = checked_count("after", after)
        self.until = checked_count("until", until)
        if not self.after < self.until:
            raise ValueError(f"Expected `until` to be greater than `after`, got {until} and {after}.")
        super().__init__(optimizer, groups=groups)

    @staticmethod
    def _rest(progress: float) -> float:
        """What is left of end − start, after the given part of the way."""
        raise NotImplementedError

    def scales_at(self, step: int) -> list[float]:
        if step <= self.after:
            scale = self.start
        elif step >= self.until:
            scale = self.end
        else:
            rest = self._rest((step - self.after) / (self.until - self.after))
            scale = self.end + (self.start - self.end) * rest
        return [scale] * len(self._scales)


class LinearStrength(_Ramp):
    """From ``start`` to ``end`` in a straight line: s(t) = end + (start − end)·(1 − p).

    Here p = (t − after)/(until − after), kept within 0 and 1.

    Args:
        optimizer: see `StrengthScheduler`.
        until: the step from which on the scale is ``end``.
        after: the step up to which it is ``start``.
        start: the first scale, 0 or more.
        end: the last scale, 0 or more.
        groups: see `StrengthScheduler`.

    Raises:
        ValueError: if ``until`` is not greater than ``after``, or a scale is negative or infinite.
        TypeError: if one is no number.

    >>> import torch, torchreg
    >>> reg = torchreg.Regularizer(torch.nn.Linear(3, 1), torchreg.L1(1e-2))
    >>> schedule = torchreg.schedules.LinearStrength(reg, until=4, start=1.0, end=3.0)
    >>> [schedule.scales_at(t)[0] for t in range(6)]
    [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    """

    @staticmethod
    def _rest(progress: float) -> float:
        return 1 - progress


class WarmupStrength(LinearStrength):
    """From nothing to full strength in a straight line: `LinearStrength` with its defaults, by its usual name.

    s(t) = min(max((t − after)/(until − after), 0), 1). Dense training for ``after`` steps gives weights time to become
    useful before they are asked whether they are.

    >>> import torch, torchreg
    >>> reg = torchreg.Regularizer(torch.nn.Linear(3, 1), torchreg.L1(1e-2))
    >>> schedule = torchreg.schedules.WarmupStrength(reg, until=4, after=2)
    >>> [schedule.scales_at(t)[0] for t in range(6)]
    [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    """

    def __init__(self, optimizer: Any, *, until: int, after: int = 0, groups: Groups = None) -> None:
        super().__init__(optimizer, until=until, after=after, groups=groups)


class CosineStrength(_Ramp):
    """From ``start`` to ``end`` on half a cosine: s(t) = end + (start − end)·(1 + cos πp)/2, p as in `LinearStrength`.

    The arguments are those of `LinearStrength`.

    >>> import torch, torchreg
    >>> reg = torchreg.Regularizer(torch.nn.Linear(3, 1), torchreg.L1(1e-2))
    >>> schedule = torchreg.schedules.CosineStrength(reg, until=4)
    >>> [round(schedule.scales_at(t)[0], 3) for t in range(5)]
    [0.0, 0.146, 0.5, 0.854, 1.0]

    Source: the shape is that of Loshchilov and Hutter, SGDR, ICLR 2017.
    """

    @staticmethod
    def _rest(progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class CubicStrength(_Ramp):
    """From ``start`` to ``end``, fast at first: s(t) = end + (start − end)·(1 − p)³, p as in `LinearStrength`.

    The arguments are those of `LinearStrength`.

    >>> import torch, torchreg
    >>> reg = torchreg.Regularizer(torch.nn.Linear(3, 1), torchreg.L1(1e-2))
    >>> schedule = torchreg.schedules.CubicStrength(reg, until=4)
    >>> [schedule.scales_at(t)[0] for t in range(5)]
    [0.0, 0.578125, 0.875, 0.984375, 1.0]

    Source: the shape is that of Zhu and Gupta, To prune, or not to prune, ICLR workshop 2018 (arXiv 2017).
    """

    @staticmethod
    def _rest(progress: float) -> float:
        return (1 - progress) ** 3


class _Combined(StrengthScheduler):
    """Schedules of the same groups as one; only this one is stepped."""

    def __init__(self, optimizer: Any, schedulers: Sequence[StrengthScheduler]) -> None:
        name = type(self).__name__
        if isinstance(schedulers, StrengthScheduler) or not isinstance(schedulers, Sequence):
            raise TypeError(f"Expected `schedulers` of {name} to be a list, got {type(schedulers).__name__}.")
        if not schedulers:
            raise ValueError(f"Expected `schedulers` of {name} to hold at least one schedule, got none.")
        for part in schedulers:
            if not isinstance(part, StrengthScheduler):
                raise TypeError(f"Expected `schedulers` of {name} to be strength schedules, got {type(part).__name__}.")
        first, holder = schedulers[0]._scales, Scales(optimizer).holder
        for part in schedulers:
            if part._scales.holder is not holder or part._scales.indices != first.indices:
                raise ValueError(f"Expected the schedulers of {name} to move the same groups of the given optimizer.")
        self.schedulers = list(schedulers)
        self._begin(optimizer, first)


class SequentialStrength(_Combined):
    """One schedule after the other, each from its own step 0 on; like torch's SequentialLR.

    Args:
        optimizer: what the schedules move.
        schedulers: the schedules, built for the same groups. Step only the whole.
        milestones: the steps at which the second, third, … takes over: one fewer than schedules, increasing.

    Raises:
        ValueError: if the milestones don't fit, or the schedules move different groups.
        TypeError: if one is no schedule.

    >>> import torch, torchreg
    >>> from torchreg.schedules import LinearStrength, SequentialStrength, WarmupStrength
    >>> reg = torchreg.Regularizer(torch.nn.Linear(3, 1), torchreg.L1(1e-2))
    >>> up, down = WarmupStrength(reg, until=2), LinearStrength(reg, until=2, start=1.0, end=0.5)
    >>> schedule = SequentialStrength(reg, [up, down], milestones=[3])
    >>> [schedule.scales_at(t)[0] for t in range(6)]
    [0.0, 0.5, 1.0, 1.0, 0.75, 0.5]
    """

    def __init__(self, optimizer: Any, schedulers: Sequence[StrengthScheduler], milestones: Sequence[int]) -> None:
        if isinstance(milestones, str) or not isinstance(milestones, Iterable):
            raise TypeError(f"Expected `milestones` to be a list of integers, got {milestones!r}.")
        steps = [checked_count("milestones", step, least=1) for step in milestones]
        if any(b <= a for a, b in itertools.pairwise(steps)):
            raise ValueError(f"Expected `milestones` to increase, got {steps}.")
        if isinstance(schedulers, Sequence) and len(schedulers) and len(steps) != len(schedulers) - 1:
            raise ValueError(f"Expected {len(schedulers) - 1} milestones for {len(schedulers)}, got {len(steps)}.")
        self.milestones = steps
        super().__init__(optimizer, schedulers)

    def scales_at(self, step: int) -> list[float]:  # noqa: D102
        past = [milestone for milestone in self.milestones if milestone <= step]
        return self.schedulers[len(past)].scales_at(step - past[-1] if past else step)


class ChainedStrength(_Combined):
    """The product of schedules; like torch's ChainedScheduler.

    Args:
        optimizer: what the schedules move.
        schedulers: the schedules, built for the same groups. Step only the whole.

    Raises:
        ValueError: if there is none, or they move different groups.
        TypeError: if one is no schedule.

    >>> import torch, torchreg
    >>> from torchreg.schedules import ChainedStrength, LambdaStrength, WarmupStrength
    >>> reg = torchreg.Regularizer(torch.nn.Linear(3, 1), torchreg.L1(1e-2))
    >>> schedule = ChainedStrength(reg, [WarmupStrength(reg, until=2), LambdaStrength(reg, lambda t: 0.5**t)])
    >>> [schedule.scales_at(t)[0] for t in range(4)]
    [0.0, 0.25, 0.25, 0.125]
    """

    def __init__(self, optimizer: Any, schedulers: Sequence[StrengthScheduler]) -> None:
        super().__init__(optimizer, schedulers)

    def scales_at(self, step: int) -> list[float]:  # noqa: D102
        parts = [part.scales_at(step) for part in self.schedulers]
        return [math.prod(scales) for scales in zip(*parts, strict=True)]

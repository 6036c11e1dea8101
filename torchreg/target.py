"""A target instead of a strength: the fraction of zeros is given, and the threshold follows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from torchreg import sharding
from torchreg.goals import Goal, checked_fraction, goals, place
from torchreg.kernels.graphs import is_captured
from torchreg.monitor.transfer import Transfer, fetch
from torchreg.optim.groups import acting, checked_scale
from torchreg.penalties import sharded
from torchreg.penalties.base import Step, host_scalar
from torchreg.penalties.grouped import Grouped
from torchreg.penalties.parts import of_part
from torchreg.sampling import spread, taken
from torchreg.scales import checked_count
from torchreg.wording import one_line
from torchreg.zeroing import longest_scale, nearest_quantile, zeroing_scale

TOLERANCE = 0.005
"""Half a point: how far from its target a fraction may be without a warning."""

SAMPLE = 1 << 16
"""Weights that a quantile is taken of. It is then right within 0.12 points (a standard deviation, at 90 % zeros)."""

_MARGIN = 1 + 1e-6
"""The weight at the quantile is to be shrunk away, whatever the rounding of its threshold."""


_CHECK = 10
"""How many steps there are between looks at whether the target is kept."""


class TargetSparsity:
    """Moves the strength scale of a proximal optimizer so that a given fraction of the weights is exactly zero.

    After t steps the fraction is to be, on a ramp that is steep at first and leaves time to recover at the end,

        s(t) = target + (s₀ − target)·(1 − p)³,    p = (t − after)/(until − after) within 0 and 1,

    with the fraction s₀ at the beginning. Between the gradient's part of a step and its proximal operator, which zeroes
    the weights with |w| ≤ scale·τ·λ, the scale is set to the quantile of |w|/(τ·λ) at s(t): so many weights are zero
    then. It adapts to the loss, the learning rate and the optimizer's metric, and unlike a controller it has no gain to
    tune and nothing to wind up. ProxSGD and ProxAdamW work that out for a sample before the step.

    No step waits for a device: the quantile is taken there, of an evenly spread sample where there are more than 2¹⁶
    weights. (Of weights that are sharded over processes all gather the samples of all, for which they wait.)
    If half a point is missing at ``until`` or later, a warning says so, on CUDA with a delay. One threshold for all
    tensors leaves none of them a share of its own: a warning, once, names one that has become zero everywhere.

    Call ``step()`` after each ``optimizer.step()``; nothing advances inside it. The strengths of the penalties only
    matter relative to each other, except of MCP and SCAD, whose steps have a limit: without Adam's metric they zero
    weights up to γ·λ and (a − 1)·λ at most. To stop training at the target and refit:
    `remove`, then `torchreg.freeze_zeros`. Beside it use no schedule for the same groups.

    Args:
        optimizer: a proximal optimizer, whose penalties make zeros of single weights, such as L1 and Elastic Net, or of
            groups, such as `GroupLasso`: the fraction is then right but for half a group.
        target: the fraction of zeros, 0 ≤ target < 1, over all penalised weights that get gradients, or one per rule: a
            mapping from names (the rules' keys, as in `Regularizer.param_groups`) or positions of param groups. Groups
            that are not in it keep their scale, apart from the regularizer's.
        until: the step at which the target is to be reached.
        after: the step up to which nothing is zeroed (the scale is 0).
        every: how often the threshold is chosen before ``until``. With more than 1 it is kept in between, which makes
            the way cheaper and less steady: a threshold that empties some weights in a step empties more in several.
        of: "weights", or "groups": then it is the fraction of the groups of group penalties (rows, channels, …).

    Raises:
        TypeError: if an argument is of the wrong kind, or the optimizer has no ``register_prox_pre_hook``.
        ValueError: if a target is outside [0, 1), ``until`` is not greater than ``after``, no group has a penalty, or a
            group's penalty can't make zeros or has no groups, or an unknown rule is named.

    >>> import torch, torchreg
    >>> w = torch.nn.Parameter(torch.arange(1.0, 11.0))
    >>> optimizer = torchreg.ProxSGD([w], lr=0.1, penalty=torchreg.L1(1.0))
    >>> target = torchreg.TargetSparsity(optimizer, 0.3, until=2, every=1)
    >>> for _ in range(3):
    ...     w.grad = torch.zeros(10)
    ...     optimizer.step()
    ...     target.step()
    >>> target.reached()
    {'all': 0.3}

    Source: the ramp is that of Zhu and Gupta, To prune, or not to prune, ICLR workshop 2018 (arXiv 2017).
    """

    def __init__(
        self,
        optimizer: Any,
        target: float | Mapping[int | str, float],
        *,
        until: int,
        after: int = 0,
        every: int = 1,
        of: str = "weights",
    ) -> None:
        self.until, self.after = checked_count("until", until, least=1), checked_count("after", after)
        self.every = checked_count("every", every, least=1)
        if not self.after < self.until:
            raise ValueError(f"Expected `until` to be greater than `after`, got {until} and {after}.")
        self._goals = goals(optimizer, target, of)
        self.optimizer = self._goals[0].scales.holder
        self.last_epoch = 0
        self._samples: dict[tuple[int, int, torch.device], Tensor] = {}
        self._pending: Transfer | None = None
        for goal in self._goals:
            goal.scales.unshare()
            place(goal.scales)
        for goal, reached in zip(self._goals, fetch([self._zeros(goal) for goal in self._goals]), strict=True):
            goal.start = reached.item()
        self._hook: RemovableHandle | None = None
        self._called = self._removed = False
        self._arm()

    def wanted(self, step: int | None = None) -> dict[str, float]:
        """s(t), the fraction that each goal asks for after ``step`` steps, by default now."""
        at = self.last_epoch if step is None else checked_count("step", step)
        return {goal.name: self._wanted(goal, at) for goal in self._goals}

    @torch.no_grad()
    def reached(self) -> dict[str, float]:
        """The fraction of zeros of each goal, counted now over all its weights. Waits for the device."""
        zeros = fetch([self._zeros(goal, sample=False) for goal in self._goals])
        return {goal.name: zero.item() for goal, zero in zip(self._goals, zeros, strict=True)}

    def step(self) -> None:
        """Advance by one. To be called after ``optimizer.step()``."""
        self.last_epoch += 1
        if self._pending is not None:
            self._judge(self._pending)
        elif self.last_epoch >= self.until and (self.last_epoch - self.until) % _CHECK == 0:
            with torch.no_grad():
                asked = [self._zeros(goal) for goal in self._goals]
                if (self.last_epoch - self.until) % (10 * _CHECK) == 0:
                    asked += [goal.alive() for goal in self._goals]
                self._pending = Transfer(asked, wait=False)
            if self._pending.arrived:
                self._judge(self._pending)
        self._arm()

    def remove(self) -> None:
        """Let go of the optimizer; the scales stay as they are. Calling it twice does no harm."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._removed = True

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and each goal's scales and first fraction: numbers and tensors only."""
        return {
            "last_epoch": self.last_epoch,
            "due": self._hook is not None,
            "start": [goal.start for goal in self._goals],
            "scales": [torch.as_tensor(scale).detach().clone() for goal in self._goals for scale in goal.scales.read()],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the state was saved, bit for bit.

        Raises:
            ValueError: if it is no such state, or one of other goals (nothing is changed then).
            TypeError: if the saved step is no integer, or another entry not of its type.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != {"last_epoch", "due", "start", "scales"}:
            raise ValueError("Expected the state of a TargetSparsity: 'last_epoch', 'due', 'start' and 'scales'.")
        last_epoch = checked_count("last_epoch", state_dict["last_epoch"])
        for key in ("start", "scales"):
            if not isinstance(state_dict[key], (list, tuple)):
                raise TypeError(f"Expected {key!r} of the saved state to be a list, got {one_line(state_dict[key])}.")
        if not isinstance(state_dict["due"], (bool, int)):
            raise TypeError(f"Expected 'due' of the saved state to be a bool, got {one_line(state_dict['due'])}.")
        start = [checked_fraction(f"start of goal {i}", s, most=1.0) for i, s in enumerate(state_dict["start"])]
        scales = [checked_scale(scale) for scale in state_dict["scales"]]
        if len(start) != len(self._goals) or len(scales) != sum(len(g.scales) for g in self._goals):
            raise ValueError(
                f"The saved state is of {len(start)} goals in {len(scales)} groups; here are "
                f"{len(self._goals)} in {sum(len(g.scales) for g in self._goals)}."
            )
        self.last_epoch, self._pending = last_epoch, None
        for goal, first in zip(self._goals, start, strict=True):
            goal.start = first
            goal.scales.write(scales[: len(goal.scales)])
            del scales[: len(goal.scales)]
        self._called = True  # what was due here is due no more
        self._arm(still_due=bool(state_dict["due"]))

    def _arm(self, still_due: bool = False) -> None:
        """Have the optimizer call `_choose` in its next step if the threshold is to be chosen in that, or still is."""
        if self._hook is not None and self._called:
            self._hook.remove()
            self._hook = None
        next_ = self.last_epoch + 1
        due = next_ == 1 or next_ >= self.until or (next_ >= self.after and (next_ - self.after) % self.every == 0)
        due = due or still_due
        if due and self._hook is None and not self._removed:
            self._called = False
            if hasattr(self.optimizer, "register_prox_preview_hook"):
                self._hook = self.optimizer.register_prox_preview_hook(self._choose, self._sampler)
            else:
                self._hook = self.optimizer.register_prox_pre_hook(self._choose)

    def _wanted(self, goal: Goal, step: int) -> float:
        if step < self.after:
            return 0.0
        progress = min((step - self.after) / (self.until - self.after), 1.0)
        return goal.fraction + (goal.start - goal.fraction) * (1 - progress) ** 3

    def _choose(self, optimizer: Any, points: list[Any]) -> None:
        """Set the scales to what makes the wanted fraction of the points zero."""
        if self.last_epoch + 1 < self.until and is_captured():
            raise RuntimeError(
                "A step before `until` can't be captured in a torch.cuda.CUDAGraph, whose replays would all ask for "
                f"the same zeros: capture one from step {self.until} on; this is step {self.last_epoch + 1}."
            )
        self._called = True
        for goal in self._goals:
            groups = goal.scales.groups()
            mine = [point for point in points if any(point.group is group for group in groups)]
            ratios = self._ratios(mine)
            if ratios is None:
                continue
            wanted = math.floor(self._wanted(goal, self.last_epoch + 1) * ratios.numel() + 0.5)
            if wanted == 0:
                goal.scales.write([0.0] * len(groups))
                continue
            quantile = nearest_quantile(ratios, wanted) * _MARGIN
            for limit in (longest_scale(point.group["penalty"], step) for point in mine for step in point.steps):
                quantile = quantile.clamp(max=limit.to(quantile) if isinstance(limit, Tensor) else limit)
            old = [torch.as_tensor(scale, device=quantile.device) for scale in goal.scales.read()]
            goal.scales.write([torch.where(quantile.isfinite(), quantile, scale) for scale in old])

    def _sampler(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor | None] | None:
        """Which weights of a group to have moved; None if it is no goal's."""
        if isinstance(group["penalty"], Grouped) and self._sample(group, params) is not None:
            return [None] * len(params)  # what becomes of one depends on its whole group
        return self._sample(group, params)

    def _sample(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor | None] | None:
        """Which weights of a group to look at; None if it is no goal's."""
        for goal in self._goals:
            if any(group is chosen for chosen in goal.scales.groups()):
                total = sum(p.numel() for p in goal.weights())
                return [self._index(p, total) for p in params]
        return None

    def _goal_of(self, group: dict[str, Any]) -> Goal:
        return next(goal for goal in self._goals if any(group is chosen for chosen in goal.scales.groups()))

    def _ratios(self, points: list[Any]) -> Tensor | None:
        """The scale from which on each weight, or each of a sample, is zero; NaN if at none, None if nothing moves."""
        parts: list[tuple[Tensor, sharding.Layout]] = []
        for point in points:
            origins = point.origins or point.params
            if isinstance(point.group["penalty"], Grouped):
                parts += self._of_groups(point, origins)
                continue
            positions = point.positions or self._sampler(point.group, origins) or []
            for k, step in enumerate(point.steps):
                step = host_scalar(step)
                if origins[k].numel() == 0 or (not isinstance(step, Tensor) and step == 0):
                    continue
                at = positions[k]
                weight = point.params[k] if point.positions else taken(point.params[k], at)
                shape = sharding.local(origins[k]).shape
                if isinstance(step, Tensor) and step.ndim and not point.positions:
                    step = taken(step.expand(shape), at)
                penalty = of_part(point.group["penalty"], origins[k])
                assert penalty is not None  # of single weights
                where = sharding.layout(origins[k])
                parts.append((zeroing_scale(penalty, weight, step, shape, at), where))
        return sharding.gathered([part.to(parts[0][0]) for part, _ in parts], [where for _, where in parts])

    def _of_groups(self, point: Any, origins: list[Tensor]) -> list[tuple[Tensor, sharding.Layout]]:
        """As `_ratios`, where weights become zero group by group."""
        penalty = acting(point.group["penalty"], point.group, origins)
        moving = [i for i, step in enumerate(point.steps) if isinstance(step, Tensor) or step != 0]
        if penalty.is_joint and len(moving) != len(point.steps):
            return []
        chosen = [i for i in moving if origins[i].numel()]
        params = [origins[i] for i in chosen]
        shapes = [sharding.local(p).shape for p in params]
        weights = [point.params[i].view(shape) for i, shape in zip(chosen, shapes, strict=True)]
        steps = [_shaped(point.steps[i], shape) for i, shape in zip(chosen, shapes, strict=True)]
        assert isinstance(penalty, Grouped)
        spread = sharding.any_sharded(params)
        if self._goal_of(point.group).of == "groups":
            if spread:
                return [(sharded.group_scales(penalty, params, weights, steps), sharding.WHOLE)]
            return [(penalty.group_scales(weights, steps), sharding.WHOLE)] if weights else []
        if spread:
            scales = sharded.zeroing_scales(penalty, params, weights, steps)
        else:
            scales = penalty.zeroing_scales(weights, steps)
        at = self._sample(point.group, params) or []
        found = [taken(scale.contiguous(), index) for scale, index in zip(scales, at, strict=True)]
        return list(zip(found, map(sharding.layout, params), strict=True))

    def _zeros(self, goal: Goal, sample: bool = True) -> Tensor:
        """The fraction of zeros among a goal's weights, or among a sample of them: a float64 0-d tensor."""
        if goal.of == "groups":
            return goal.zero_groups()
        weights = [p.detach() for p in goal.weights()]
        total = sum(w.numel() for w in weights)
        parts = [sharding.local(w) if not sample else taken(sharding.local(w), self._index(w, total)) for w in weights]
        counts = [torch.stack([(w == 0).sum(), torch.full_like((w == 0).sum(), w.numel())]) for w in parts]
        whole = sharding.summed(counts, list(map(sharding.layout, goal.weights())))
        zeros, there = torch.stack([count.to(whole[0].device) for count in whole]).sum(0).double()
        return zeros / there.clamp_min(1)

    def _index(self, w: Tensor, total: int) -> Tensor | None:
        """Positions in what is here of a tensor of its share in a sample of SAMPLE from ``total``, or None for all."""
        w = sharding.local(w)
        if total <= SAMPLE or w.numel() == 0:
            return None
        size, count = w.numel(), -(-w.numel() * SAMPLE // total)
        key = (size, count, w.device)
        if key not in self._samples:
            self._samples[key] = spread(size, count, w.device)
        return self._samples[key]

    def _judge(self, pending: Transfer) -> None:
        """Warn of goals that are missed, and of tensors that are empty."""
        self._pending = None
        found = pending.tensors()
        for goal, alive in zip(self._goals, found[len(self._goals) :], strict=False):
            self._warn_of_empty(
                goal, [name for name, some in zip(goal.names(), alive.tolist(), strict=True) if not some]
            )
        for goal, reached in zip(self._goals, found, strict=False):
            if goal.warned or abs(reached.item() - goal.fraction) <= TOLERANCE + goal.grain() / 2:
                continue
            goal.warned = True
            warnings.warn(
                f"The target of {goal.fraction:.1%} zeros ({goal.name}) is missed: {reached.item():.1%} at step "
                f"{self.last_epoch}. Zeros that get no gradient never wake, and weights without one, with a strength "
                "of 0 or NaN never become zero; MCP and SCAD zero none beyond γ and a − 1 times their strength.",
                stacklevel=3,
            )

    def _warn_of_empty(self, goal: Goal, names: list[str]) -> None:
        if goal.warned_of_empty or not names:
            return
        goal.warned_of_empty = True
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        warnings.warn(
            f"Parameter {names[0]!r}{more} is zero everywhere at step {self.last_epoch}: one threshold for all weights "
            f"of the target {goal.name} ({goal.fraction:.1%} zeros) leaves no tensor a share of its own. Give its rule "
            "a target or a weaker strength of its own, or ask for fewer zeros.",
            stacklevel=3,
        )


def _shaped(step: Step, shape: torch.Size) -> Step:
    return step.reshape(shape) if isinstance(step, Tensor) and step.ndim and step.numel() == shape.numel() else step

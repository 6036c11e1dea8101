"""Fused steps: all param groups of an optimizer in one pass, one launch per device and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchreg.kernels import native, triton_step
from torchreg.kernels.changes import Changes
from torchreg.kernels.likeness import Likeness
from torchreg.kernels.plan import CHANGES, COUNTS, Part, Plan
from torchreg.kernels.problem import Tensors, Update
from torchreg.kernels.selection import Arrangement, Chosen, Wish


class FusedSteps:
    """The fused steps of one optimizer, with the plans that they keep from one step to the next."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self._plans: dict[tuple[torch.device, torch.dtype], Plan] = {}
        self._captured: list[Plan] = []
        self._left: dict[tuple[torch.device, torch.dtype], Changes] = {}
        self._arrangement: Arrangement | None = None
        self._likeness = Likeness([])  # of the last step's gradients and buffers, which fitted their parameters,
        self._lengths: list[int] = []  # and how many buffers of each name each group had

    def step(
        self,
        parts: Sequence[Part],
        wishes: Sequence[Wish],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> list[Chosen]:
        """One step of every parameter that a fused step takes, in place. Returns the others.

        Args:
            parts: the tensors and hyperparameters of every param group.
            wishes: what they say of the implementation.
            grad_scale: what the gradients are divided by; on GPUs only.
            found_inf: where it is 1 nothing changes; on GPUs only, where no host waits for it.

        Raises:
            ValueError: if a gradient or buffer is not of its parameter's size or device; nothing is changed then.
        """
        known = self._arrangement
        arrangement = known if known is not None and known.fits(parts, wishes) else Arrangement(parts, wishes)
        self._arrangement = None  # until all is done
        taken = {
            kind: [
                (parts[i][0] if indices is None else parts[i][0].take(indices), parts[i][1]) for i, indices in chosen
            ]
            for kind, chosen in arrangement.kinds.items()
        }
        those = [tensors for some in taken.values() for tensors, _ in some]
        lists = [entries for tensors in those for entries in tensors.buffers().values()]
        lengths, buffers = list(map(len, lists)), [entry for entries in lists for entry in entries]
        beside = [*(grad for tensors in those for grad in tensors.grads), *buffers]
        alike = arrangement is known and lengths == self._lengths and self._likeness.holds(beside)
        if not alike:
            for tensors in those:
                _check(tensors)
        changed = [*(p for tensors in those for p in tensors.params), *buffers]
        torch.autograd.graph.increment_version(changed)  # may raise
        for kind in set(self._plans) - set(taken):  # counts are of this step, but for changes, which add up
            self._left[kind] = self._plans[kind].leave()
            self._forget({kind})
        for kind, here in taken.items():
            device, dtype = kind
            plan = self._plans.get(kind)
            same = plan is not None and arrangement is known
            if plan is None:
                size = native.PIECE_SIZE if device.type == "cpu" else triton_step.PIECE_SIZE
                plan = self._plans[kind] = Plan(device, dtype, size, self._update.step)
                plan.changes = self._left.pop(kind, plan.changes)
            for tensors, _ in here:
                tensors.advance()
            plan.update(here, same, same and alike)
            if device.type == "cpu":
                native.run(self._update.step.KERNEL, plan)
            else:
                triton_step.run(self._update.step.KERNEL, plan, _on(device, grad_scale), _on(device, found_inf))
            plan.finish()
            if found_inf is not None:
                for tensors, _ in here:
                    tensors.withdraw(found_inf)
        self._arrangement = arrangement
        if not alike:
            self._likeness, self._lengths = Likeness(beside), lengths
        return arrangement.alone

    def clear(self) -> None:
        """Forget the counts: the last step was not a fused one."""
        self._forget(set(self._plans))
        self._left.clear()
        self._arrangement = None

    def _forget(self, kinds: set[tuple[torch.device, torch.dtype]]) -> None:
        """Leave plans; but those that captured graphs were told of are kept, since nobody tells when graphs go."""
        dropped = [self._plans.pop(kind) for kind in kinds]
        self._captured += [plan for plan in dropped if plan.captured]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_captured": []}

    def counted(self) -> list[Tensor]:
        """The parameters that the last step counted."""
        return [p for plan in self._plans.values() for p in plan.params]

    def take_counts(self) -> list[Tensor]:
        """What was counted, without waiting: per device a float64 tensor, a row per parameter of `counted`, in order.

        The columns are zeros, newly zero, revived, Σ|w| and Σw² after the last step; newly zero and revived weights
        are summed over the steps since the last call, those left out of which `take_changes` tells.
        """
        taken = []
        for plan in self._plans.values():
            owners = plan.owners()
            rows = plan.counts.new_zeros(len(plan.params), len(COUNTS)).index_add_(0, owners, plan.counts)
            plan.counts[:, CHANGES] = 0
            taken.append(rows)
        return taken

    def has_changes(self) -> bool:
        """Whether `take_changes` has something to tell, though the last step may have found no gradients."""
        return bool(self._left)

    def take_changes(self) -> list[tuple[dict[int, int], Tensor]]:
        """What has been counted beside that since the last call, while other parameters had gradients.

        For every device and dtype there are float64 rows of newly zero and revived weights, and the row of each
        parameter by its id.
        """
        everywhere = [plan.changes for plan in self._plans.values()] + list(self._left.values())
        self._left = {}
        return [(rows, sums) for rows, sums in (changes.take() for changes in everywhere) if rows]


def _on(device: torch.device, value: Tensor | None) -> Tensor | None:
    """On the device of a plan: GradScaler has one for all of them."""
    return value if value is None else value.to(device, non_blocking=True)


def _check(tensors: Tensors) -> None:
    """Raise unless all that belongs to a parameter is of its size and on its device: a kernel sees addresses only."""
    for entries in (tensors.grads, *tensors.buffers().values()):
        for p, entry in zip(tensors.params, entries, strict=bool(entries)):
            what = "gradient" if entries is tensors.grads else "state"
            if entry.numel() != p.numel():
                raise ValueError(
                    f"The {what} of a parameter of shape {tuple(p.shape)} has the shape {tuple(entry.shape)}: if the "
                    "parameter was resized, give the optimizer a new one, or resize its gradient and state too."
                )
            if entry.device != p.device:
                raise ValueError(f"The {what} of a parameter on {p.device} is on {entry.device}: move one of them.")

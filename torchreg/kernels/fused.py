"""Fused steps: all param groups of an optimizer in one pass, one launch per device and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchreg.kernels import native, triton_sgd
from torchreg.kernels.plan import COUNTS, Part, Plan


class FusedSGD:
    """The fused steps of one optimizer, with the plans that they keep from one step to the next."""

    def __init__(self) -> None:
        self._plans: dict[tuple[torch.device, torch.dtype], Plan] = {}

    def step(self, parts: Sequence[Part], grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """One step of every parameter, in place.

        Args:
            parts: the tensors and hyperparameters of every param group.
            grad_scale: what the gradients are divided by; on a GPU only.
            found_inf: where it is 1 nothing changes; on a GPU only, where no host waits for it.
        """
        kinds: dict[tuple[torch.device, torch.dtype], list[Part]] = {}
        for tensors, step in parts:
            torch.autograd.graph.increment_version([*tensors.params, *tensors.momentum_buffers])  # may raise
            here: dict[tuple[torch.device, torch.dtype], list[int]] = {}
            for i, p in enumerate(tensors.params):
                here.setdefault((p.device, p.dtype), []).append(i)
            for kind, indices in here.items():
                whole = len(indices) == len(tensors.params)
                kinds.setdefault(kind, []).append((tensors if whole else tensors.take(indices), step))
        self._plans = {kind: self._plans[kind] for kind in kinds if kind in self._plans}  # counts are of this step
        for kind, chosen in kinds.items():
            device, dtype = kind
            size = native.PIECE_SIZE if device.type == "cpu" else triton_sgd.PIECE_SIZE
            plan = self._plans.setdefault(kind, Plan(device, dtype, size))
            plan.update(chosen)
            if device.type == "cpu":
                native.run(plan)
            else:
                triton_sgd.run(plan, grad_scale, found_inf)
            plan.finish()

    def clear(self) -> None:
        """Forget the counts: the last step was not a fused one."""
        self._plans.clear()

    def counted(self) -> list[Tensor]:
        """The parameters that the last step counted."""
        return [p for plan in self._plans.values() for p in plan.params]

    def take_counts(self) -> list[Tensor]:
        """What was counted, without waiting: per device a float64 tensor, a row per parameter of `counted`, in order.

        The columns are zeros, newly zero, revived, Σ|w| and Σw² after the last step; newly zero and revived weights
        are summed over the steps since the last call.
        """
        taken = []
        for plan in self._plans.values():
            owners = plan.owners()
            rows = plan.counts.new_zeros(len(plan.params), len(COUNTS)).index_add_(0, owners, plan.counts)
            plan.counts[:, COUNTS.index("new") : COUNTS.index("revived") + 1] = 0
            taken.append(rows)
        return taken

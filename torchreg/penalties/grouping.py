"""What penalties and constraints on groups of weights share: whose groups they are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch

from torchreg.groups import Groups, Shared
from torchreg.penalties.base import Penalty

G = TypeVar("G", bound="TakesGroups")


class TakesGroups(Penalty, abstract=True):
    """A penalty with ``groups``: of each tensor, or shared by all tensors of a rule, which then act together."""

    groups: Groups | str | None

    @property
    def is_grouped(self) -> bool:
        """Whether there are groups."""
        return self.groups is not None

    @property
    def is_joint(self) -> bool:
        """Whether the groups are shared."""
        return isinstance(self.groups, Shared)

    def members(self) -> tuple[str, ...] | None:
        """The parameters that share the groups, or None."""
        return self.groups.names if isinstance(self.groups, Shared) else None

    def bound(self: G, names: Sequence[str]) -> G:
        """The penalty on those of its members, in this order."""
        return self._with_groups(self.groups.bound(names)) if isinstance(self.groups, Shared) else self

    def restricted(self: G, positions: Sequence[int]) -> G:
        """The penalty on the members at these positions."""
        return self._with_groups(self.groups.restricted(positions)) if isinstance(self.groups, Shared) else self

    def to(self: G, device: torch.device | str) -> G:
        """The same penalty with the tensors of its groups on ``device``."""
        moved = super().to(device)
        return moved._with_groups(self.groups.to(device)) if isinstance(self.groups, Groups) else moved

    def check_together(self, shapes: Sequence[torch.Size]) -> None:
        """Raise ``ValueError`` unless tensors of these shapes share the groups, if they are shared."""
        if isinstance(self.groups, Shared):
            self.groups.of_all(shapes)

    def _with_groups(self: G, groups: Groups) -> G:
        if groups is self.groups:
            return self
        new = copy.copy(self)
        object.__setattr__(new, "groups", groups)
        return new

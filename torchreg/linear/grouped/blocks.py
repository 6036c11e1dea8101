"""A partition of the columns of a data matrix into groups that are zero together."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Blocks:
    """Groups of columns, for coefficients of shape (targets, columns): a group's norm is over columns and targets.

    Args:
        labels: the group of each column, (columns,), from 0 on.
        weights: what each group's norm counts, positive, (groups,) in float64.
    """

    def __init__(self, labels: Tensor, weights: Tensor) -> None:
        self.labels, self.weights = labels, weights

    @classmethod
    def single(cls, columns: int, device: torch.device) -> Blocks:
        """Every column a group of its own."""
        return cls(torch.arange(columns, device=device), torch.ones(columns, dtype=torch.float64, device=device))

    @property
    def count(self) -> int:
        """The number of groups."""
        return len(self.weights)

    @cached_property
    def alone(self) -> bool:
        """Whether column i is group i."""
        labels = self.labels
        return len(labels) == self.count and bool((labels == torch.arange(len(labels), device=labels.device)).all())

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of all pairs of columns in one group."""
        row, column = torch.nonzero(self.labels.unsqueeze(1) == self.labels, as_tuple=True)
        return row, column

    def sums(self, values: Tensor) -> Tensor:
        """Of each group's columns: (..., columns) -> (..., groups)."""
        if self.alone:
            return values
        return values.new_zeros(*values.shape[:-1], self.count).index_add_(-1, self.labels, values)

    def spread(self, values: Tensor) -> Tensor:
        """Each group's value at its columns: (groups,) -> (columns,)."""
        return values if self.alone else values[self.labels]

    def norms(self, w: Tensor) -> Tensor:
        """The groups' norms: (..., targets, columns) -> (..., groups)."""
        return self.sums(w.square().sum(-2)).sqrt()

    def columns(self, groups: Tensor) -> Tensor:
        """The columns of some groups."""
        if self.alone:
            return groups
        chosen = torch.zeros(self.count, dtype=torch.bool, device=self.labels.device)
        chosen[groups] = True
        return torch.nonzero(chosen[self.labels]).squeeze(1)

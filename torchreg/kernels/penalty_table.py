"""The table that one pass over many weights works from: the penalty's value, or its gradient at all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROWS = ("w", "g", "out", "size")
"""int64, per tensor: addresses (0: none) and elements."""

STRENGTHS = ("l1", "l2")
"""float64, per tensor: R(w) = l1·Σ|w| + l2·Σw²."""


@dataclass
class PenaltyTable:
    """Weights of one device and dtype, contiguous or dense, with what is read and written beside them.

    Attributes:
        table: int64, a row for each of `ROWS`, a column per tensor.
        strengths: float64, a row for each of `STRENGTHS`, a column per tensor.
        addresses: where every weight lies.
        shapes: the shape of every tensor.
        sizes: the elements of every tensor.
    """

    device: torch.device
    dtype: torch.dtype
    table: Any
    strengths: Any
    addresses: tuple[int, ...]
    shapes: list[torch.Size]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, weights: Sequence[Tensor], strengths: Sequence[tuple[float, float]]) -> PenaltyTable:
        """The table of these tensors, which must outlive it."""
        addresses, sizes = tuple(map(Tensor.data_ptr, weights)), tuple(map(Tensor.numel, weights))
        table = np.zeros((len(ROWS), len(weights)), dtype=np.int64)
        table[ROWS.index("w")], table[ROWS.index("size")] = addresses, sizes
        numbers = np.array(strengths, dtype=np.float64).reshape(-1, len(STRENGTHS)).T.copy()
        shapes = [w.shape for w in weights]
        return cls(weights[0].device, weights[0].dtype, table, numbers, addresses, shapes, sizes)

    def lies_at(self, weights: Sequence[Tensor]) -> bool:
        """Whether these weights are where it says."""
        return self.addresses == tuple(map(Tensor.data_ptr, weights))

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors, weights or others, are of the weights' shapes and dtype and on their device."""
        return (
            self.shapes == [t.shape for t in tensors]
            and {t.dtype for t in tensors} == {self.dtype}
            and {t.device for t in tensors} == {self.device}
        )

    def writing(self, grads: Sequence[Tensor | None], outs: Sequence[Tensor]) -> PenaltyTable:
        """A copy that says what is added and where the results go, each laid out like its weight.

        A gradient may be None; one that is its ``out`` is added to in place.
        """
        table = self.table.copy()
        table[ROWS.index("g")] = [0 if t is None else t.data_ptr() for t in grads]
        table[ROWS.index("out")] = list(map(Tensor.data_ptr, outs))
        return dataclasses.replace(self, table=table)

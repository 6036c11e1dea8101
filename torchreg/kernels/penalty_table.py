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
        sizes: the elements of every tensor.
    """

    device: torch.device
    dtype: torch.dtype
    table: Any
    strengths: Any
    addresses: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, weights: Sequence[Tensor], strengths: Sequence[tuple[float, float]]) -> PenaltyTable:
        """The table of these tensors, which must outlive it."""
        addresses, sizes = tuple(map(Tensor.data_ptr, weights)), tuple(map(Tensor.numel, weights))
        table = np.zeros((len(ROWS), len(weights)), dtype=np.int64)
        table[ROWS.index("w")], table[ROWS.index("size")] = addresses, sizes
        numbers = np.array(strengths, dtype=np.float64).reshape(-1, len(STRENGTHS)).T.copy()
        return cls(weights[0].device, weights[0].dtype, table, numbers, addresses, sizes)

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        """Whether it tells where these weights are, how large and of which type."""
        return (
            self.addresses == tuple(map(Tensor.data_ptr, weights))
            and self.sizes == tuple(map(Tensor.numel, weights))
            and {w.dtype for w in weights} == {self.dtype}
        )

    def fits(self, others: Sequence[Tensor]) -> bool:
        """Whether other tensors are as large as the weights, of their type and on their device."""
        return (
            self.sizes == tuple(map(Tensor.numel, others))
            and {t.dtype for t in others} == {self.dtype}
            and {t.device for t in others} == {self.device}
        )

    def writing(self, grads: Sequence[Tensor | None], outs: Sequence[Tensor]) -> PenaltyTable:
        """A copy that says what is added and where the results go, each laid out like its weight.

        A gradient may be None; one that is its ``out`` is added to in place.
        """
        table = self.table.copy()
        table[ROWS.index("g")] = [0 if t is None else t.data_ptr() for t in grads]
        table[ROWS.index("out")] = list(map(Tensor.data_ptr, outs))
        return dataclasses.replace(self, table=table)

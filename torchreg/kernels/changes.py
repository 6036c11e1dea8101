"""Newly zero and revived weights of steps whose tables have been laid out anew since."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_SPARE = 64


class Changes:
    """What pieces have counted on one device, added up for each parameter. Nothing waits for the device.

    A copy begins at 0.
    """

    def __init__(self, device: torch.device) -> None:
        self._rows: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._sums = torch.zeros(0, 2, dtype=torch.float64, device=device)

    def __reduce__(self) -> Any:
        return Changes, (self._sums.device,)

    def add(self, params: Sequence[Tensor], owners: Any, counts: Tensor) -> None:
        """Take over a float64 row of (newly zero, revived) for every piece.

        Args:
            params: those that the pieces are of.
            owners: the position of its parameter for every piece, an array on the host.
            counts: the rows, on the device.
        """
        if len(self._sums) > 2 * len(self._rows) + _SPARE:  # most parameters are no more
            live = list(self._rows.items())
            self._sums = self._sums[[row for _, row in live]]
            for row, (p, _) in enumerate(live):
                self._rows[p] = row
        total = len(self._sums)
        for p in params:
            total += self._rows.setdefault(p, total) == total
        self._sums = torch.cat([self._sums, self._sums.new_zeros(total - len(self._sums), 2)])
        rows = np.array([self._rows[p] for p in params], dtype=np.int64)[owners]
        self._sums.index_add_(0, torch.from_numpy(rows).to(self._sums.device, non_blocking=True), counts)

    def take(self) -> tuple[dict[int, int], Tensor]:
        """Rows of (newly zero, revived), and the row of each parameter by its id. The sums begin at 0 again."""
        taken = {id(p): row for p, row in self._rows.items()}, self._sums
        self._rows, self._sums = WeakIdKeyDictionary(), self._sums.new_zeros(0, 2)
        return taken

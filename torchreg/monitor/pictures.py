"""Histograms and mask images of weights, made on the weights' device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

BINS = 64
LARGEST_IMAGE = 512
SMALLEST_IMAGE = 256
FRAME = 2
BLUE = (190, 206, 226)

Picture: TypeAlias = "np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]"
"""uint8, height × width × red, green and blue."""


@torch.no_grad()
def nonzero_histogram(w: Tensor) -> Tensor:
    """A float64 vector (count, least, greatest, sum, sum of squares, counts of 64 equal bins) of the finite non-zeros.

    Complex weights are shown by their modulus.
    """
    x = (w.abs() if w.is_complex() else w).flatten().float()
    chosen = (x != 0) & torch.isfinite(x)
    if not x.numel():
        return torch.zeros(5 + BINS, dtype=torch.float64, device=w.device)
    least, greatest = x.masked_fill(~chosen, math.inf).min(), x.masked_fill(~chosen, -math.inf).max()
    position = (x - least) / (greatest - least) * BINS
    index = position.nan_to_num(0.0, 0.0, 0.0).clamp(0, BINS - 1).long()
    counts = torch.zeros(BINS, dtype=torch.int64, device=w.device).scatter_add_(0, index, chosen.long())
    kept = x.masked_fill(~chosen, 0).double()
    moments = torch.stack([chosen.sum().double(), least.double(), greatest.double(), kept.sum(), kept.square().sum()])
    return torch.cat([moments, counts.double()])


@dataclass(frozen=True)
class Histogram:
    """A fetched histogram in the form that TensorBoard's writers take."""

    count: float
    least: float
    greatest: float
    total: float
    total_squares: float
    limits: list[float]
    counts: list[float]

    @classmethod
    def from_vector(cls, vector: Tensor) -> Histogram | None:
        """Read the result of `nonzero_histogram`; None where there is no non-zero weight."""
        count, least, greatest, total, squares, *counts = vector.tolist()
        if not count:
            return None
        width = (greatest - least) or 1e-12
        limits = [least + width * (i + 1) / BINS for i in range(BINS)]
        return cls(count, least, greatest, total, squares, limits, counts)


@torch.no_grad()
def mask_image(w: Tensor) -> Tensor:
    """A uint8 image of the weight as a matrix (first dimension × the rest): white where weights are, black for zeros.

    Sides over 512 are averaged down, so that a pixel shows the fraction of its weights that are not zero.
    """
    kept = (w.flatten(1) != 0).float()
    rows, columns = kept.shape
    if max(rows, columns) > LARGEST_IMAGE:
        size = (min(rows, LARGEST_IMAGE), min(columns, LARGEST_IMAGE))
        kept = torch.nn.functional.adaptive_avg_pool2d(kept[None, None], size)[0, 0]
    return (kept * 255).round().to(torch.uint8)


class Barcode:
    """Which of some groups were alive, log by log: an image with a row for each log, the latest at the bottom.

    With more than 512 logs every second one is dropped, those to come included; more than 512 groups are averaged.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._rows: list[np.ndarray[Any, Any]] = []
        self._every, self._seen = 1, 0

    def add(self, alive: Tensor) -> None:
        """The bool vector of a log."""
        if self._seen % self._every == 0:
            self._rows.append(np.packbits(alive.numpy()))
        self._seen += 1
        if len(self._rows) > LARGEST_IMAGE:
            self._rows, self._every = self._rows[::2], 2 * self._every

    def image(self) -> Picture:
        """White where a group was alive, framed."""
        rows = np.stack([np.unpackbits(row, count=self.count) for row in self._rows])
        shown = torch.from_numpy(rows).float()
        if self.count > LARGEST_IMAGE:
            shown = torch.nn.functional.adaptive_avg_pool1d(shown[None], LARGEST_IMAGE)[0]
        wide, high = max(1, SMALLEST_IMAGE // shown.shape[1]), max(1, SMALLEST_IMAGE // shown.shape[0])
        grey = (shown * 255).round().to(torch.uint8).numpy()
        return framed(np.kron(grey, np.ones((high, wide), dtype=np.uint8)))


def enlarged(image: Tensor) -> Picture:
    """The image with every pixel repeated until its longer side is at least 256, so that it is legible; framed."""
    factor = max(1, -(-SMALLEST_IMAGE // max(1, *image.shape)))
    return framed(np.kron(image.numpy(), np.ones((factor, factor), dtype=np.uint8)))


def framed(grey: np.ndarray[Any, np.dtype[np.uint8]]) -> Picture:
    """The grey image in a blue frame, which shows where a white one ends on TensorBoard's white page.

    One that is taller than wide is made square: TensorBoard stretches images to the width of their card.
    """
    high, wide = grey.shape
    margin = max(0, high - wide)
    picture = np.empty((high + 2 * FRAME, wide + margin + 2 * FRAME, 3), dtype=np.uint8)
    picture[:] = BLUE
    left = FRAME + margin // 2
    picture[FRAME : FRAME + high, left : left + wide] = grey[:, :, None]
    return picture

"""MNIST as tensors: the split that recipes are chosen on, slightly moved copies of the training images, batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 28
HELD_OUT = 5000
"""Training images that are left out of training and judge the recipes."""
MEAN, DEVIATION = 0.1307, 0.3081
"""Of the training images' pixels, scaled to [0, 1]."""


@dataclass(frozen=True)
class Images:
    """Images as rows of bytes, and their labels. With copies, row i + k·n shows image i, moved."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows, as floats of mean 0 and deviation 1."""
        return self.pixels.index_select(0, indices).float().mul_(1 / (255 * DEVIATION)).sub_(MEAN / DEVIATION)

    def columns(self, indices: Tensor) -> Images:
        """The same images, some of their pixels only."""
        return Images(self.pixels.index_select(1, indices), self.labels)

    def split(self, seed: int, held_out: int | None = None) -> tuple[Images, Images]:
        """All but some images, and those."""
        held_out = HELD_OUT if held_out is None else held_out
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return tuple(Images(self.pixels[part], self.labels[part]) for part in (order[held_out:], order[:held_out]))

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The rows of each batch of an epoch; of every image one of its copies, by chance. The rest is dropped."""
        order = torch.randperm(len(self), generator=generator)
        copies = len(self.pixels) // len(self)
        if copies > 1:
            order += len(self) * torch.randint(copies, (len(self),), generator=generator)
        yield from order[: len(order) // size * size].view(-1, size)

    def moved(self, copies: int, degrees: float, scale: float, shift: float, seed: int) -> Images:
        """These images and moved copies: turned, scaled and shifted, each by amounts drawn uniformly up to the given.

        Args:
            degrees: of the angle.
            scale: of the size's deviation from 1; width and height are drawn apart.
            shift: in pixels.
        """
        generator = torch.Generator().manual_seed(seed)
        rows = [self.pixels]
        for _ in range(copies):
            for part in self.pixels.split(5000):
                draw = 2 * torch.rand(5, len(part), generator=generator) - 1
                angle, (width, height), shifts = draw[0] * degrees * torch.pi / 180, 1 + scale * draw[1:3], draw[3:]
                x, y = shifts * (2 * shift / SIDE)
                cos, sin = angle.cos(), angle.sin()
                matrix = torch.stack([cos * width, -sin * height, x, sin * width, cos * height, y], 1).view(-1, 2, 3)
                image = part.view(-1, 1, SIDE, SIDE).float()
                grid = F.affine_grid(matrix, list(image.shape), align_corners=False)
                rows.append(F.grid_sample(image, grid, align_corners=False).round_().byte().flatten(1))
        return Images(torch.cat(rows), self.labels)


def load(path: Path) -> tuple[Images, Images]:
    """The training and test images of MNIST, in the form that Keras distributes: mnist.npz.

    Source: LeCun, Cortes and Burges, The MNIST database of handwritten digits, 1998.
    """
    with np.load(path) as arrays:
        x, y = (tuple(torch.from_numpy(arrays[f"{part}_{what}"]) for what in ("train", "test")) for part in "xy")
    return tuple(Images(pixels.flatten(1).byte(), labels.long()) for pixels, labels in zip(x, y, strict=True))

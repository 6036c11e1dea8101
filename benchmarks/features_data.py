"""The data and splits on which feature selection is compared, as two papers split them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FILES = {"MNIST": "mnist.npz", "Fashion-MNIST": "fashion_mnist.npz", "Mice Protein": "mice_protein.npz"}


@dataclass(frozen=True)
class Split:
    """What a selector may see, and what it is judged by."""

    x: Any
    y: Any
    x_judge: Any
    y_judge: Any

    def validation(self, seed: int, held_out: int) -> Split:
        """The same without those that judge: some of the others do, the test samples are left out."""
        order = np.random.RandomState(seed).permutation(len(self.y))
        judge, rest = order[:held_out], order[held_out:]
        return Split(self.x[rest], self.y[rest], self.x[judge], self.y[judge])


def missing(folder: Path, names: list[str]) -> str | None:
    """What is to be said if a file is not there."""
    absent = [FILES[name] for name in names if not (folder / FILES[name]).is_file()]
    if not absent:
        return None
    return (
        f"no {', '.join(absent)} in {folder}: mnist.npz and fashion_mnist.npz hold x_train, y_train, x_test, y_test "
        "as Keras distributes MNIST; mice_protein.npz holds x (1080, 77), NaN where a value is missing, and y"
    )


def load(folder: Path, name: str, whole: bool, seed: int) -> Split:
    """A data set.

    Args:
        folder: where the files are.
        name: of the data set.
        whole: 60,000 images to train on and 10,000 to judge by. Otherwise, as LassoNet's authors do, four fifths of
            the 10,000 test images, and the rest of those; others for each seed.
        seed: of the split.
    """
    with np.load(folder / FILES[name]) as arrays:
        if name == "Mice Protein":
            x, y = _filled(arrays["x"], arrays["y"])
        elif whole:
            return Split(*(arrays[key] if key[0] == "y" else _rows(arrays[key]) for key in _KEYS))
        else:
            x, y = _rows(arrays["x_test"]), arrays["y_test"]
    order = np.random.RandomState(seed).permutation(len(y))
    train, judge = order[: len(y) * 4 // 5], order[len(y) * 4 // 5 :]
    return Split(x[train], y[train], x[judge], y[judge])


_KEYS = ("x_train", "y_train", "x_test", "y_test")


def _rows(images: Any) -> Any:
    return (images.reshape(len(images), -1) / 255).astype(np.float32)


def _filled(x: Any, y: Any) -> tuple[Any, Any]:
    """Missing values are the mean of their class, and all are scaled to [0, 1], as LassoNet's authors do.

    Both look at the samples that judge too, in LassoNet's run and in ours.
    """
    x = x.astype(np.float64)
    for label in np.unique(y):
        some = x[y == label]
        x[y == label] = np.where(np.isnan(some), np.nanmean(some, axis=0), some)
    return ((x - x.min(0)) / (x.max(0) - x.min(0))).astype(np.float32), y

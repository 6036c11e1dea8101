"""Data to compare penalties on: scikit-learn's digits, or arrays from an .npz file."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchreg.cli.arguments import check_file
from torchreg.cli.claims import check_archive
from torchreg.cli.output import CommandError, printable, reason

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
LEAST_TRAIN, LEAST_TEST = 20, 10


@dataclass(frozen=True)
class Dataset:
    """A classification problem. The inputs are float32 rows, in [−1, 1] for training; the labels int64 from 0.

    ``input_shape`` is the shape of one sample in the file, such as (28, 28).
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    input_shape: tuple[int, ...]
    classes: int

    @property
    def inputs(self) -> int:
        """Features per sample."""
        return self.x_train.shape[1]


def load_digits() -> Dataset:
    """scikit-learn's digits: 1797 images of 8×8 pixels, two thirds for training, stratified.

    Raises:
        CommandError: if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits as digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise CommandError(
            "the digits come with scikit-learn: pip install 'torchreg-sparse[sklearn]', or give --data FILE.npz"
        ) from None
    bunch = digits()
    x_train, x_test, y_train, y_test = train_test_split(
        bunch.images, bunch.target, test_size=1 / 3, stratify=bunch.target, random_state=0
    )
    return from_arrays("digits", x_train, y_train, x_test, y_test)


def load_npz(path: Path) -> Dataset:
    """The arrays x_train, y_train, x_test, y_test of an .npz file, such as Keras's mnist.npz.

    The inputs are flattened and divided by the largest modulus in x_train. Nothing is unpickled.

    Raises:
        CommandError: if the file or an array is missing, malformed or not a classification problem.
    """
    arrays = read_npz(path, ARRAYS)
    return from_arrays(printable(path.stem), *(arrays[name] for name in ARRAYS))


def read_npz(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """Arrays of an .npz file by their names, and the optional ones that it has. Nothing is unpickled.

    Raises:
        CommandError: if the file or a needed array is missing or malformed.
    """
    check_file(path, f"--data {str(path)!r}")
    if not zipfile.is_zipfile(path):
        raise CommandError(f"--data {str(path)!r} is not an .npz file")
    check_archive(path, f"--data {str(path)!r}", stored=False)
    try:
        with warnings.catch_warnings(), np.load(path, allow_pickle=False) as archive:
            warnings.simplefilter("ignore")
            missing = [name for name in needed if name not in archive.files]
            if missing:
                found = ", ".join(archive.files[:8]) or "nothing"
                raise CommandError(f"--data {str(path)!r} has no array {', '.join(missing)}; it holds {found}")
            arrays = {name: archive[name] for name in (*needed, *optional) if name in archive.files}
    except CommandError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise CommandError(f"--data {str(path)!r} can't be read: {reason(error)}") from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise CommandError(f"--data {str(path)!r}: {name} is not an array")
    return arrays


def from_arrays(name: str, x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> Dataset:
    """Check, flatten and scale arrays.

    Raises:
        CommandError: if they are not a classification problem.
    """
    for part, x, y, least in (("train", x_train, y_train, LEAST_TRAIN), ("test", x_test, y_test, LEAST_TEST)):
        _check_inputs(f"x_{part}", x)
        _check_labels(f"y_{part}", y)
        if len(x) != len(y):
            raise CommandError(f"x_{part} has {len(x)} samples but y_{part} has {len(y)}")
        if len(x) < least:
            raise CommandError(f"x_{part} has {len(x)} samples, at least {least} are needed")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise CommandError(f"samples of x_train have the shape {x_train.shape[1:]}, those of x_test {x_test.shape[1:]}")
    scale = max(abs(float(x_train.max())), abs(float(x_train.min())))
    if scale == 0:
        raise CommandError("x_train is all zeros")
    labels = np.unique(y_train)
    if len(labels) < 2:
        raise CommandError(f"y_train holds one class only ({labels[0]})")
    if len(labels) > len(x_train) // 2:
        raise CommandError(f"y_train holds {len(labels)} classes in {len(x_train)} samples: are these class labels?")
    unknown = np.setdiff1d(y_test, labels)
    if len(unknown):
        raise CommandError(f"y_test holds the label {unknown[0]}, which y_train lacks")
    scaled_test = _scaled(x_test, scale)
    if not torch.isfinite(scaled_test).all():
        raise CommandError("x_test holds values too large beside those of x_train")
    return Dataset(
        name=name,
        x_train=_scaled(x_train, scale),
        y_train=torch.from_numpy(np.searchsorted(labels, y_train.reshape(-1)).astype(np.int64)),
        x_test=scaled_test,
        y_test=torch.from_numpy(np.searchsorted(labels, y_test.reshape(-1)).astype(np.int64)),
        input_shape=tuple(x_train.shape[1:]),
        classes=len(labels),
    )


def _check_inputs(name: str, x: Any) -> None:
    if x.dtype.kind not in "uifb":
        raise CommandError(f"{name} must hold real numbers, got the dtype {x.dtype}")
    if x.ndim < 2 or 0 in x.shape[1:]:
        raise CommandError(f"{name} must have the shape (samples, features...), got {x.shape}")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise CommandError(f"{name} holds {'NaN' if np.isnan(x).any() else 'infinite values'}")


def _check_labels(name: str, y: Any) -> None:
    if y.dtype.kind not in "ui":
        raise CommandError(f"{name} must hold integer class labels, got the dtype {y.dtype}")
    if y.ndim != 1 and y.shape[1:] != (1,):
        raise CommandError(f"{name} must have the shape (samples,), got {y.shape}")


def _scaled(x: Any, scale: float) -> Tensor:
    wide = np.float32 if x.dtype.itemsize <= 2 else np.float64  # float32 would overflow before the division
    rows = x.reshape(len(x), -1).astype(wide)
    rows /= scale
    with np.errstate(over="ignore"):
        return torch.from_numpy(rows.astype(np.float32, copy=False))

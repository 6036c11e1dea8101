"""What is predicted: classes or real numbers, as users give them and as networks see them."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.preprocessing import StandardScaler
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target

_LABELS = ("binary", "multiclass")


class Classes:
    """Labels, which networks see as integers."""

    task = "classification"

    def __init__(self, y: Any) -> None:
        self.labels = np.unique(column_or_1d(y, warn=True))
        self.outputs = len(self.labels)
        if self.outputs < 2:
            raise ValueError(f"The number of classes has to be greater than one; got {self.outputs} class.")

    def encode(self, y: Any) -> Any:
        """Labels' positions."""
        y = column_or_1d(y)
        codes = np.searchsorted(self.labels, y).clip(max=self.outputs - 1)
        if not (self.labels[codes] == y).all():
            raise ValueError("y_val has labels that are not in y.")
        return codes

    def decode(self, output: Any) -> Any:
        """The labels of the largest outputs."""
        return self.labels[output.argmax(axis=1)]

    def strata(self, codes: Any, fewest: int) -> Any:
        """Labels to stratify a split by whose smaller part has ``fewest`` samples, or None where it can't be."""
        return codes if np.bincount(codes).min() >= 2 and fewest >= self.outputs else None


class Numbers:
    """Real targets, one or several, which networks see scaled to mean 0 and deviation 1."""

    task = "regression"

    def __init__(self, y: Any) -> None:
        y = np.asarray(y, dtype=np.float64)
        self.shape = y.shape[1:]
        self.outputs = int(np.prod(self.shape, dtype=int))
        self.scaler = StandardScaler().fit(y.reshape(len(y), -1))

    def encode(self, y: Any) -> Any:
        """Scaled numbers, shape (samples, targets)."""
        y = np.asarray(y, dtype=np.float64)
        return self.scaler.transform(y.reshape(len(y), -1)).astype(np.float32)

    def decode(self, output: Any) -> Any:
        """The user's numbers, in the shape of theirs."""
        return self.scaler.inverse_transform(output).reshape(len(output), *self.shape)

    def strata(self, codes: Any, fewest: int) -> Any:
        """None."""
        return None


def read_targets(y: Any, task: str) -> Classes | Numbers:
    """What the targets of a fit are.

    Args:
        y: checked, without NaN.
        task: "classification", "regression" or "auto".

    Raises:
        ValueError: if they don't fit the task, or are of one class.
    """
    kind = type_of_target(y, input_name="y")
    if task == "regression" or (task == "auto" and kind not in _LABELS):
        return Numbers(y)
    check_classification_targets(y)
    if kind not in _LABELS:
        raise ValueError(f"Expected one label for each sample, got targets that are {kind}.")
    return Classes(y)

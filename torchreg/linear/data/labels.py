"""Data of a classification: labels become numbers, class weights become sample weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, validate_data
from torch import Tensor

from torchreg.linear.data.inputs import Data, as_tensor, asked_dtype, read, without_duplicates

_SMALL_INDICES = ("liblinear", "sag", "saga")  # solvers that scikit-learn refuses 64-bit indices for


@dataclass(frozen=True)
class Labelled:
    """Checked data of a classification."""

    data: Data
    """X; as y the numbers of the classes."""
    classes: Any
    """The labels in rising order, a NumPy array."""
    codes: Tensor
    """Each sample's class, (n,) of int64, where X is."""
    weights: Tensor
    """Weights (n,) in float64 that sum to 1."""
    mass: float
    """What the weights summed to: the number of samples, unless there are weights."""


def read_labelled(estimator: Any, x: Any, y: Any, sample_weight: Any, class_weight: Any) -> Labelled:
    """Check the data of a fit, and note the features on the estimator.

    Args:
        estimator: for which they are checked; its `device` and `dtype` say where they are to be, and as what.
        x, y, sample_weight: as users give them.
        class_weight: None, "balanced", or weights by label.

    Raises:
        ValueError, TypeError: as scikit-learn does, for shapes that don't match, NaN, infinity, no data, targets that
            are no classes, or only one class; and for negative weights.
    """
    if isinstance(y, Tensor):
        y = y.detach().cpu().numpy()
    if isinstance(x, Tensor):
        if y is not None:
            y = np.asarray(y)
            y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
            check_classification_targets(y)
            classes, codes = np.unique(y, return_inverse=True)
            data = read(estimator, x, codes)
        else:
            data = read(estimator, x, y)  # raises
    else:
        dtype = asked_dtype(estimator.dtype)
        large = estimator.solver not in _SMALL_INDICES
        dtypes = [np.float64, np.float32] if dtype is None else np.dtype(str(dtype).removeprefix("torch.")).type
        x, y = validate_data(estimator, x, y, accept_sparse="csc", dtype=dtypes, copy=False, accept_large_sparse=large)
        check_classification_targets(y)
        classes, codes = np.unique(y, return_inverse=True)
        device = torch.device("cpu" if estimator.device == "auto" or sparse.issparse(x) else estimator.device)
        matrix = without_duplicates(x) if sparse.issparse(x) else as_tensor(x).to(device)
        data = Data(matrix, torch.from_numpy(codes).to(device).unsqueeze(1).double(), True, None, None)
    if len(classes) < 2:
        raise ValueError(
            "This solver needs samples of at least 2 classes in the data, but the data contains only one class: "
            f"{classes[0]!r}"
        )
    weights = _weights(y, classes, codes, sample_weight, class_weight)
    mass = float(weights.sum())
    if not mass > 0:
        raise ValueError("Sample weights must contain at least one non-zero number.")
    home = data.y.device
    return Labelled(
        data,
        classes,
        torch.from_numpy(codes.astype(np.int64)).to(home),
        torch.from_numpy(weights / mass).to(home),
        mass,
    )


def _weights(y: Any, classes: Any, codes: Any, sample_weight: Any, class_weight: Any) -> Any:
    """Sample weights times class weights, (n,) in float64."""
    if isinstance(sample_weight, Tensor):
        sample_weight = sample_weight.detach().cpu().numpy()
    given = _check_sample_weight(sample_weight, y, dtype=np.float64, ensure_non_negative=True)
    if class_weight is None:
        return given
    each = compute_class_weight(class_weight, classes=classes, y=y, sample_weight=given)
    if (each < 0).any():
        raise ValueError(f"Expected non-negative class weights, got {class_weight!r}.")
    return given * each[codes]

"""What users hand in, NumPy arrays, frames, sparse matrices or torch tensors, as one kind of data."""

from __future__ import annotations

import numbers
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.utils import assert_all_finite
from sklearn.utils.validation import _check_sample_weight, check_array, validate_data
from torch import Tensor

from torchreg.linear.data import native_columns
from torchreg.linear.data.design import Dense, Design, means_and_moment, weighted_mean
from torchreg.linear.data.sparse_design import Sparse, sparse_mean

_INFINITE = "Input {} contains NaN or infinity."
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Data:
    """Checked data of a regression."""

    x: Any
    """A tensor (samples, features), or a scipy CSC matrix."""
    y: Tensor
    """Targets (samples, targets) in float64, where X is."""
    single: bool
    """Whether y had one dimension."""
    weights: Tensor | None
    """Sample weights (samples,) in float64 that sum to the number of samples."""
    home: torch.device | None
    """Where results go as tensors; None for NumPy arrays."""
    writeable: bool = False
    """Whether X is the user's own array and can be written to."""

    @property
    def dtype(self) -> torch.dtype:
        """X's own."""
        return self.x.dtype if isinstance(self.x, Tensor) else _DTYPES[self.x.dtype.name]

    @cached_property
    def mean(self) -> Tensor:
        """Of X's columns, weighted, in float64."""
        if self._sums is not None:
            return self._sums[0]
        return (weighted_mean if isinstance(self.x, Tensor) else sparse_mean)(self.x, self.weights)

    def design(self, centred: bool, overwrite: bool = False) -> tuple[Design, Tensor | None]:
        """The design, and its column means if it is centred, in place if X may be overwritten: then only once."""
        root = None if self.weights is None else self.weights.sqrt()
        mean = self.mean if centred else None
        if not isinstance(self.x, Tensor):
            return Sparse(self.x, mean, root), mean
        if mean is not None and overwrite and self.writeable:
            return Dense(self.x.sub_(mean), None, root), mean
        return Dense(self.x, mean, root), mean

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor] | None:
        """X's column means, and Zᵀz/n for the only target, centred, where one pass over X yields both."""
        if not isinstance(self.x, Tensor) or self.y.shape[1] > 1 or not native_columns.serves(self.x):
            return None
        root = None if self.weights is None else self.weights.sqrt()
        return means_and_moment(self.x, root, self.targets(True)[0][0])

    def moment(self, design: Design) -> Tensor | None:
        """Zᵀz/n of the data's design Z and their only target, if it came with the means."""
        centred = isinstance(design, Dense) and design.mean is not None
        return self._sums[1] if centred and self._sums is not None else None

    def targets(self, centred: bool) -> tuple[Tensor, Tensor]:
        """Targets (targets, samples), centred and weighted like the design, and their means."""
        y = self.y.T
        mean = weighted_mean(self.y, self.weights) if centred else y.new_zeros(len(y))
        y = y - mean.unsqueeze(1)
        return (y if self.weights is None else y * self.weights.sqrt()), mean

    def result(self, t: Tensor) -> Any:
        """A result as the user's kind of array, in X's dtype."""
        t = t.to(self.dtype)
        return t.cpu().numpy() if self.home is None else t.to(self.home)


def to_split(x: Any, cv: Any) -> Any:
    """What scikit-learn's splitters are given for X: its number of samples, where they would only copy it."""
    counted = isinstance(x, Tensor) or (sparse.issparse(x) and (cv is None or isinstance(cv, numbers.Integral)))
    return np.empty((x.shape[0], 1)) if counted else x


def read(
    estimator: Any, x: Any, y: Any, sample_weight: Any = None, check_input: bool = True, finite: bool = True
) -> Data:
    """Check the data of a fit, and note the features on the estimator.

    Args:
        estimator: for which they are checked; its `device` and `dtype` say where they are to be, and as what.
        x, y, sample_weight: as users give them.
        check_input: False for arrays that have been checked.
        finite: False to leave X's values to `refuse_infinite`, later: that saves a pass over X.

    Raises:
        ValueError, TypeError: as scikit-learn does, for shapes that don't match, NaN, infinity or no data.
    """
    finite = finite or _any_zero(sample_weight)  # which no sum with weights would find
    if isinstance(x, Tensor):
        return _read_tensors(estimator, x, y, sample_weight, finite)
    dtype = asked_dtype(estimator.dtype)
    dtypes = [np.float64, np.float32] if dtype is None else np.dtype(str(dtype).removeprefix("torch.")).type
    y = y.detach().cpu().numpy() if isinstance(y, Tensor) else y
    if check_input:
        x, y = validate_data(
            estimator,
            x,
            y,
            accept_sparse="csc",
            dtype=dtypes,
            copy=False,
            multi_output=True,
            y_numeric=True,
            accept_large_sparse=getattr(estimator, "_takes_large_indices", False),
            ensure_all_finite=finite or not isinstance(x, np.ndarray),
        )
        if sparse.issparse(y) or y.dtype != x.dtype:
            y = check_array(y, dtype=x.dtype.type, ensure_2d=False, input_name="y")
    elif sample_weight is None and not sparse.issparse(x) and not x.flags.f_contiguous:
        raise ValueError("Expected X in columns (Fortran order) with check_input=False, got it in rows.")
    x = without_duplicates(x)
    if isinstance(sample_weight, numbers.Number):
        sample_weight = None
    if sample_weight is not None:
        sample_weight = _check_sample_weight(sample_weight, x, dtype=x.dtype, ensure_non_negative=True)
    device = torch.device("cpu" if estimator.device == "auto" else estimator.device)
    matrix = x if sparse.issparse(x) else as_tensor(x).to(device)
    if sparse.issparse(x):
        device = torch.device("cpu")
    targets = as_tensor(y).to(device, torch.float64, copy=True)  # X may be overwritten, and y a part of it
    weights = None if sample_weight is None else _normalised(as_tensor(sample_weight).to(device, torch.float64))
    writeable = not sparse.issparse(x) and x.flags.writeable
    return Data(matrix, targets.reshape(len(targets), -1), y.ndim == 1, weights, None, writeable)


def without_duplicates(x: Any) -> Any:
    """An array, or a sparse matrix with one entry for each place, in order: a copy if it has others."""
    if sparse.issparse(x) and not x.has_canonical_format:
        x = x.copy()
        x.sum_duplicates()
    return x


def refuse_infinite(estimator: Any, data: Data, moment: Tensor) -> None:
    """Raise scikit-learn's error if X holds NaN or infinity: if it does, so do its products with the targets."""
    if bool(moment.isfinite().all()):
        return
    if data.home is not None and isinstance(data.x, Tensor):
        if not bool(data.x.isfinite().all()):
            raise ValueError(_INFINITE.format("X"))
    else:
        values = data.x.cpu().numpy() if isinstance(data.x, Tensor) else data.x.data
        assert_all_finite(values, estimator_name=type(estimator).__name__, input_name="X")


def _read_tensors(estimator: Any, x: Tensor, y: Any, sample_weight: Any, finite: bool) -> Data:
    if x.ndim != 2:
        raise ValueError(f"Expected 2D array, got {x.ndim}D tensor instead: X has shape {tuple(x.shape)}.")
    if 0 in x.shape:
        raise ValueError(f"Found array with 0 sample(s) or 0 feature(s) (shape={tuple(x.shape)}), expected at least 1.")
    if x.is_complex():
        raise ValueError("Complex data not supported: X is a complex tensor.")
    if y is None:
        raise ValueError(f"{type(estimator).__name__} requires y to be passed, but the target y is None.")
    home = x.device
    device = home if estimator.device == "auto" else torch.device(estimator.device)
    dtype = asked_dtype(estimator.dtype) or (torch.float32 if x.dtype in _NARROW else torch.float64)
    x = x.detach()
    matrix: Any = _scipy(x, dtype) if x.layout != torch.strided else x.to(device, dtype)
    device = device if isinstance(matrix, Tensor) else torch.device("cpu")
    y = torch.as_tensor(y if isinstance(y, Tensor) else np.asarray(y), device=device).detach().double()
    if y.ndim not in (1, 2) or len(y) != len(x):
        raise ValueError(
            f"Found input variables with inconsistent numbers of samples: X has shape {tuple(x.shape)}, "
            f"y {tuple(y.shape)}."
        )
    values = matrix if isinstance(matrix, Tensor) else torch.from_numpy(matrix.data)
    for name, t in (("X", values), ("y", y)) if finite else (("y", y),):
        if not bool(t.sum().isfinite()) and not bool(t.isfinite().all()):
            raise ValueError(_INFINITE.format(name))
    if sample_weight is None or isinstance(sample_weight, numbers.Number):
        weights = None
    else:
        weights = torch.as_tensor(sample_weight, dtype=torch.float64, device=device).detach()
        if weights.shape != (len(x),) or not bool((weights >= 0).all() & weights.isfinite().all()):
            raise ValueError(f"Expected {len(x)} finite non-negative sample weights, got shape {tuple(weights.shape)}.")
        weights = _normalised(weights)
    estimator.n_features_in_ = x.shape[1]
    if hasattr(estimator, "feature_names_in_"):
        del estimator.feature_names_in_
    return Data(matrix, y.reshape(len(y), -1), y.ndim == 1, weights, home)


_NARROW = {torch.float32, torch.float16, torch.bfloat16}


def _scipy(x: Tensor, dtype: torch.dtype) -> Any:
    """A sparse tensor's entries in CSC format on the CPU."""
    coo = x.to_sparse_coo().coalesce().cpu()
    values = coo.values().to(dtype).numpy()
    rows, columns = coo.indices().numpy()
    return sparse.coo_array((values, (rows, columns)), shape=tuple(x.shape)).tocsc()


def asked_dtype(given: Any) -> torch.dtype | None:
    """The dtype that an estimator asks for."""
    if given is None or given == "auto":
        return None
    name = str(given).removeprefix("torch.") if isinstance(given, (torch.dtype, str)) else np.dtype(given).name
    if name not in _DTYPES:
        raise ValueError(f"Expected `dtype` to be 'auto', float32 or float64, got {given!r}.")
    return _DTYPES[name]


def as_tensor(array: Any) -> Tensor:
    """An array's memory as a tensor, which is only read."""
    array = np.asarray(array)
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        return torch.from_numpy(array)


def _any_zero(weights: Any) -> bool:
    """Whether some of the sample weights that a user gave are zero."""
    if weights is None or isinstance(weights, numbers.Number):
        return False
    return bool(((weights if isinstance(weights, Tensor) else np.asarray(weights)) == 0).any())


def _normalised(weights: Tensor) -> Tensor:
    total = float(weights.sum())
    if not total > 0:
        raise ValueError("Sample weights must contain at least one non-zero number.")
    return weights * (len(weights) / total)

"""Linear models hold X and what their working sets need: neither a copy of X, nor a sparse X filled in."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchreg.linear import Lasso, LassoCV, LogisticRegression, Ridge, alpha_max, lasso_path


class Largest(TorchDispatchMode):
    """Notes the largest memory that an operation has given a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return result


def needed(fit: Any, x: Any, y: Any) -> int:
    """The most that NumPy's arrays took together, or a tensor alone, beside what was there before."""
    most = alpha_max(x, y)
    with Largest():  # what it imports is not counted
        fit(x[:50, :50], y[:50], most)
    with Largest() as largest:
        tracemalloc.start()
        try:
            fit(x, y, most)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    return max(peak, largest.nbytes)


def labels(y: Any) -> Any:
    return (y > np.median(y)).astype(int)


FITS = {
    "single": lambda x, y, most: Lasso(0.3 * most).fit(x, y),
    "weighted": lambda x, y, most: Lasso(0.3 * most).fit(x, y, np.linspace(0.5, 2, len(y))),
    "path": lambda x, y, most: lasso_path(x, y, alphas=[0.5 * most, 0.3 * most]),
    "folds": lambda x, y, most: LassoCV(alphas=[0.5 * most, 0.3 * most], cv=3).fit(x, y),
    "ridge": lambda x, y, most: Ridge(10.0).fit(x, y),
    "classes": lambda x, y, most: LogisticRegression(C=0.1 / (most * len(y)), l1_ratio=1.0).fit(x, labels(y)),
}
fits = pytest.mark.parametrize("fit", FITS.values(), ids=FITS)


@fits
def test_a_sparse_matrix_is_not_copied(fit: Any) -> None:
    generator = np.random.default_rng(0)
    size, entries = 20_000, 4_000_000
    places = (generator.integers(0, size, entries), generator.integers(0, size, entries))
    x = sparse.coo_matrix((generator.standard_normal(entries), places), shape=(size, size)).tocsc()
    x.sum_duplicates()
    y = np.asarray(x[:, :20].sum(1)).ravel() + 0.02 * generator.standard_normal(size)
    assert needed(fit, x, y) < 0.6 * (x.data.nbytes + x.indices.nbytes)


@fits
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_dense_matrix_is_not_copied(order: str, fit: Any) -> None:
    generator = np.random.default_rng(0)
    x = np.asarray(generator.standard_normal((400, 20_000)), order=order)
    y = x[:, :20].sum(1) + generator.standard_normal(400)
    assert needed(fit, x, y) < 0.6 * x.nbytes
